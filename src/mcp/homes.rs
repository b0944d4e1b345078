//! The private folders of commands: a home that lasts as long as the server is registered, so that what `npx` or `uvx`
//! fetched is there at the next start, and a folder for temporary files of each child: an old one and a new one of the same
//! server may live side by side for a while.
//!
//! They are named after the SHA-256 of the server's id: ids are never paths. A file beside them says which id that is, so
//! that the servers of a few folders can be asked for among a million.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::OFlags;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::model::sha256_hex;

use super::order::{Order, User};

/// The folders of all servers. Clones share everything.
#[derive(Clone)]
pub struct Homes {
    folder: PathBuf,
    tracker: TaskTracker,
    lived_in: Arc<Mutex<HashMap<String, Lived>>>,
}

#[derive(Default)]
struct Lived {
    by: usize,
    /// The server was deleted; the last one out takes the folders along.
    deleted: bool,
}

/// The folders of a child that lives there; its drop is the end of that.
pub struct Residence {
    homes: Homes,
    pub server_id: String,
    name: String,
    child: Uuid,
    /// No other child of the server lived there when this one came.
    pub alone: bool,
}

/// The folders that there are, by their names.
pub struct Folders {
    /// Each with the id of its server.
    pub known: HashMap<String, String>,
    /// Those that do not say it: they are of before they did.
    pub unknown: HashSet<String>,
}

impl Folders {
    /// Takes out those of before whose server has this id.
    pub fn keep(&mut self, server_id: &str) {
        self.unknown.remove(&sha256_hex(server_id));
    }
}

/// The file with the id.
const ID: &str = "id";
/// No id is as long.
const MAX_ID: u64 = 1024;
/// How the names of folders for temporary files begin; the rest is the child's.
const TMP: &str = "tmp-";

impl Homes {
    /// What takes long goes on `tracker`.
    pub fn new(folder: PathBuf, tracker: TaskTracker) -> Self {
        Self { folder, tracker, lived_in: Arc::default() }
    }

    /// What owns the background work of children.
    pub fn tracker(&self) -> &TaskTracker {
        &self.tracker
    }

    /// All folders.
    pub fn folders(&self) -> Folders {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let names = names.filter(|name| name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let mut folders = Folders { known: HashMap::new(), unknown: HashSet::new() };
        for name in names {
            match self.id_of(&name) {
                Some(id) => drop(folders.known.insert(name, id)),
                None => drop(folders.unknown.insert(name)),
            }
        }
        folders
    }

    /// The id that is written in a folder, if it is that of the folder.
    fn id_of(&self, name: &str) -> Option<String> {
        read_id(&self.folder.join(name)).filter(|id| sha256_hex(id) == name)
    }

    fn lived_in(&self) -> MutexGuard<'_, HashMap<String, Lived>> {
        self.lived_in.lock().expect("no code panics while it holds the map")
    }

    /// The folders of a server, which its keeper makes.
    pub fn enter(&self, server_id: &str) -> Residence {
        let name = sha256_hex(server_id);
        let mut lived_in = self.lived_in();
        let lived = lived_in.entry(name.clone()).or_default();
        lived.by += 1;
        let alone = lived.by == 1;
        drop(lived_in);
        Residence { homes: self.clone(), server_id: server_id.to_owned(), name, child: Uuid::new_v4(), alone }
    }

    /// Removes the folders of a server that was deleted: now, or with the end of its last child. May take a while.
    pub fn remove(&self, server_id: &str) {
        let name = sha256_hex(server_id);
        // Removing takes long, and whoever starts a child waits for the map.
        let is_lived_in = self.lived_in().get_mut(&name).map(|lived| lived.deleted = true).is_some();
        if !is_lived_in {
            self.clear(&name);
        }
    }

    /// Removes folders by their names, whose servers somebody else has deleted. Their names are to be older than the look
    /// for the servers, or a server that is new would lose its folder.
    pub fn clear_all(&self, names: impl Iterator<Item = String>) {
        for name in names {
            let is_lived_in = self.lived_in().contains_key(&name);
            if !is_lived_in {
                self.clear(&name);
            }
        }
    }

    fn clear(&self, name: &str) {
        let folder = self.folder.join(name);
        if let Err(error) = remove(&folder) {
            tracing::warn!(%error, folder = name, "the private folder of a deleted server cannot be removed");
        }
    }
}

impl Residence {
    pub fn home(&self) -> PathBuf {
        self.homes.folder.join(&self.name).join("home")
    }

    pub fn tmp(&self) -> PathBuf {
        self.homes.folder.join(&self.name).join(format!("{TMP}{}", self.child.simple()))
    }
}

impl Drop for Residence {
    fn drop(&mut self) {
        let mut lived_in = self.homes.lived_in();
        let Some(lived) = lived_in.get_mut(&self.name) else { return };
        lived.by -= 1;
        if lived.by > 0 {
            return;
        }
        let deleted = lived.deleted;
        lived_in.remove(&self.name);
        drop(lived_in);
        if deleted {
            // A home may hold many files: not on a thread that serves. Without a runtime, nobody is being served.
            let (homes, name) = (self.homes.clone(), self.name.clone());
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(homes.tracker.clone().spawn_blocking_on(move || homes.clear(&name), &runtime)),
                Err(_) => homes.clear(&name),
            }
        }
    }
}

/// A user of the child's own must be able to pass, and to see nothing.
fn mode(user: Option<User>) -> u32 {
    if user.is_some() { 0o711 } else { 0o700 }
}

/// Makes a folder in which there will be private ones; one that is there keeps the rights that it gives.
pub fn make(folder: &Path, user: Option<User>) -> io::Result<()> {
    let wanted = mode(user);
    DirBuilder::new().mode(wanted).recursive(true).create(folder)?;
    let mode = fs::metadata(folder)?.permissions().mode() & 0o7777;
    if mode & wanted != wanted {
        fs::set_permissions(folder, fs::Permissions::from_mode(mode | wanted))?;
    }
    Ok(())
}

/// Makes the folders of a child, for its user alone, and removes what earlier ones left behind.
pub fn prepare(order: &Order) -> io::Result<()> {
    let own = order.home.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let us = rustix::process::geteuid().as_raw();
    // Whatever else stands in its place, others made it, and what is done to it here would be done elsewhere.
    if fs::symlink_metadata(own).is_ok_and(|own| !own.is_dir() || own.uid() != us) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    make(own, order.user)?;
    // Without it, its server is looked for among all.
    let _ = write_id(own, &order.server_id);
    if order.alone {
        let entries = fs::read_dir(own)?.flatten();
        for old in entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(TMP.as_bytes())) {
            // What cannot be removed is in nobody's way.
            let _ = remove(&old.path());
        }
    }
    let owner = order.user.unwrap_or(User { uid: us, gid: fs::metadata(own)?.gid() });
    // What a child put in the place of its home, or left as another user, is no home.
    if fs::symlink_metadata(&order.home).is_ok_and(|home| !home.is_dir() || home.uid() != owner.uid) {
        remove(&order.home)?;
    }
    for folder in [&order.home, &order.tmp] {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if order.user.is_some() {
            lchown(folder, Some(owner.uid), Some(owner.gid))?;
        }
    }
    Ok(())
}

/// Says in a folder whose it is, unless that is said.
fn write_id(own: &Path, id: &str) -> io::Result<()> {
    if read_id(own).as_deref() == Some(id) {
        return Ok(());
    }
    let file = own.join(ID);
    remove(&file)?;
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file)?.write_all(id.as_bytes())
}

/// What [`write_id`] wrote. A child that is not confined may have put anything in its place, a pipe that nobody fills too.
fn read_id(own: &Path) -> Option<String> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(own.join(ID)).ok()?;
    let mut id = String::new();
    file.take(MAX_ID).read_to_string(&mut id).ok()?;
    Some(id)
}

/// Removes a file, or a folder with all that is in it, also where its owner took away the right to.
pub fn remove(path: &Path) -> io::Result<()> {
    let first = remove_once(path);
    if matches!(&first, Err(error) if error.kind() == io::ErrorKind::PermissionDenied) {
        open_up(path);
        return remove_once(path);
    }
    first
}

fn remove_once(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Gives the owner of folders all rights to them. Symbolic links are left alone.
fn open_up(folder: &Path) {
    let Ok(metadata) = fs::symlink_metadata(folder) else { return };
    if !metadata.is_dir() {
        return;
    }
    if metadata.permissions().mode() & 0o700 != 0o700 {
        let _ = fs::set_permissions(folder, fs::Permissions::from_mode(0o700));
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        open_up(&entry.path());
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn folders_that_were_closed_are_removed_and_what_a_link_points_to_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        fs::create_dir_all(outside.join("kept")).unwrap();
        let own = folder.path().join("own");
        fs::create_dir_all(own.join("a/b")).unwrap();
        fs::write(own.join("a/b/file"), "text").unwrap();
        std::os::unix::fs::symlink(&outside, own.join("a/link")).unwrap();
        fs::set_permissions(own.join("a/b"), fs::Permissions::from_mode(0o000)).unwrap();
        remove(&own).unwrap();
        assert!(!own.exists());
        assert!(outside.join("kept").exists());
        // A link in the place of the folder goes, and nothing else.
        std::os::unix::fs::symlink(&outside, &own).unwrap();
        remove(&own).unwrap();
        assert!(outside.join("kept").exists() && fs::symlink_metadata(&own).is_err());
    }

    #[test]
    fn folders_outlive_their_server_only_as_long_as_a_child_lives_in_them() {
        let folder = tempfile::tempdir().unwrap();
        let homes = Homes::new(folder.path().to_owned(), TaskTracker::new());
        let make = |residence: &Residence| fs::create_dir_all(residence.home()).unwrap();
        let (first, second) = (homes.enter("../../a"), homes.enter("../../a"));
        make(&first);
        assert!(
            first.home().starts_with(folder.path()) && first.home().components().all(|part| part.as_os_str() != "..")
        );
        homes.remove("../../a");
        drop(first);
        assert!(second.home().exists());
        let home = second.home();
        drop(second);
        assert!(!home.parent().unwrap().exists());
        let kept = homes.enter("kept");
        make(&kept);
        drop(kept);
        let left = homes.enter("left");
        make(&left);
        let gone = left.home();
        drop(left);
        fs::write(gone.parent().unwrap().join(ID), "left").unwrap();
        // What says another id than its name is one that says none.
        fs::write(folder.path().join(sha256_hex("kept")).join(ID), "left").unwrap();
        let mut folders = homes.folders();
        assert_eq!(folders.known.values().collect::<Vec<_>>(), ["left"]);
        assert_eq!(folders.unknown.iter().collect::<Vec<_>>(), [&sha256_hex("kept")]);
        folders.keep("kept");
        assert!(folders.unknown.is_empty());
        homes.clear_all([sha256_hex("left")].into_iter());
        assert!(homes.enter("kept").home().exists() && !gone.exists());
    }
}
