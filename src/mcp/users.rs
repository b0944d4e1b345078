//! The user that commands run as.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::order::User;

/// Why commands cannot run as the user that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error(
        "There is no user or group on this host as --child-user names it; write a name or a number, or both as USER:GROUP."
    )]
    Unknown,
    #[error(
        "Portolan may not start commands as another user: --child-user needs root, or the capabilities CAP_SETUID, \
         CAP_SETGID, CAP_CHOWN and CAP_KILL."
    )]
    NotAllowed,
    #[cfg(not(target_os = "linux"))]
    #[error("--child-user works on Linux only.")]
    NotHere,
}

/// The user and group of `name`, `uid`, `name:group` or `uid:gid`; the group of a user is that of `/etc/passwd`, and of a
/// number that is not there, the same number.
///
/// # Errors
/// When they are not known, or Portolan lacks the right to become them.
pub fn find_user(text: &str) -> Result<User, UserError> {
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let entry = entry(&users, user);
    let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number != u32::MAX);
    let uid = entry.as_ref().and_then(|entry| number(entry.get(2)?)).or_else(|| number(user));
    let uid = uid.ok_or(UserError::Unknown)?;
    let gid = match group {
        Some(group) => {
            let groups = fs::read_to_string("/etc/group").unwrap_or_default();
            self::entry(&groups, group).and_then(|entry| number(entry.get(2)?)).or_else(|| number(group))
        }
        None => entry.and_then(|entry| number(entry.get(3)?)).or(Some(uid)),
    };
    let user = User { uid, gid: gid.ok_or(UserError::Unknown)? };
    may_become_another().map(|()| user)
}

/// Whether a user may pass a folder on the way to what is in it, as far as its mode says.
pub fn may_pass(user: User, folder: &Path) -> bool {
    fs::metadata(folder).is_ok_and(|metadata| {
        let bit = match metadata {
            _ if metadata.uid() == user.uid => 0o100,
            _ if metadata.gid() == user.gid => 0o010,
            _ => 0o001,
        };
        user.uid == 0 || metadata.mode() & bit != 0
    })
}

/// The fields of the line of `/etc/passwd` or `/etc/group` with this name or number.
fn entry<'a>(file: &'a str, name: &str) -> Option<Vec<&'a str>> {
    let by = |place: usize| {
        file.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|line| line.get(place) == Some(&name))
    };
    by(0).or_else(|| by(2))
}

#[cfg(target_os = "linux")]
fn may_become_another() -> Result<(), UserError> {
    use rustix::thread::{CapabilitySet, capabilities};
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::CHOWN | CapabilitySet::KILL;
    let has = capabilities(None).is_ok_and(|sets| sets.effective.contains(needed));
    if has { Ok(()) } else { Err(UserError::NotAllowed) }
}

#[cfg(not(target_os = "linux"))]
fn may_become_another() -> Result<(), UserError> {
    Err(UserError::NotHere)
}
