//! Which files a command may reach, kept by Landlock: everything that its user may, but for Portolan's own files and what
//! is in homes. In homes it has what its own configuration names, and the tools on its PATH, to read.
//!
//! Landlock can only allow. So what is hidden is left out: of each folder above a hidden place, its other entries are
//! allowed, as they are at the start, and the folder itself can neither be listed nor added to.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::order::{Order, Reach};

/// The rules that this code was written and tested for; an older kernel keeps those of them that it knows.
const KNOWN: ABI = ABI::V7;
/// Folders of programs: what belongs to them stands in the folder above.
const PROGRAMS: [&str; 3] = ["bin", "sbin", "shims"];
/// What the tools of `~/.local/bin` keep beside it; the rest of `~/.local` is data of the user.
const LOCAL: [&str; 7] =
    ["lib", "share/uv", "share/pipx", "share/pnpm", "share/mise", "share/virtualenvs", "share/node"];
/// A file of these is a program: it needs what lies around it.
const SCRIPTS: [&str; 11] = ["cjs", "jar", "js", "mjs", "php", "pl", "py", "rb", "sh", "ts", "whl"];
/// A folder with one of these is a project, and a program in it needs all of it.
const PROJECTS: [&str; 5] = ["package.json", "pyproject.toml", "node_modules", "pyvenv.cfg", "Gemfile"];
/// What a command that runs as root may only read: whoever writes here is the administrator soon. But for [`SCRATCH`].
const SYSTEM: [&str; 14] = [
    "/bin", "/boot", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/proc", "/run", "/sbin", "/sys", "/usr",
    "/var",
];
const SCRATCH: &str = "/var/tmp";

/// What a command may do with a place, and below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Read,
    All,
}

/// The rules for one command, made and not yet in force.
pub struct Fence(RulesetCreated);

/// Makes the rules, with the rights to look paths up that this process has now. `None` where the kernel's Landlock (before
/// version 2, Linux 5.19) would forbid every move between folders, which hardly a program can do without, and nobody
/// insists.
pub fn fence(order: &Order, reach: &Reach) -> io::Result<Option<Fence>> {
    let moves = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer);
    if moves.is_err() && !reach.required {
        return Ok(None);
    }
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|ruleset| ruleset.scope(Scope::Signal | Scope::AbstractUnixSocket))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    let is_root = order.user.map_or_else(|| rustix::process::geteuid().is_root(), |user| user.uid == 0);
    for (place, r#use) in places(order, reach, is_root) {
        // What has gone meanwhile needs no rule.
        let Ok(place) = open(&place) else { continue };
        let access = access(&place, r#use)?;
        rules = rules.add_rule(PathBeneath::new(place, access)).map_err(io::Error::other)?;
    }
    Ok(Some(Fence(rules)))
}

/// Opens a place to name it. No link is followed: what was looked at is what is opened.
fn open(place: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match openat2(CWD, place, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        // Some containers do not let this call through.
        Err(Errno::NOSYS | Errno::PERM) => rustix::fs::open(place, flags | OFlags::NOFOLLOW, Mode::empty()),
        opened => opened,
    }
}

fn access(place: &OwnedFd, r#use: Use) -> io::Result<BitFlags<AccessFs>> {
    let access = match r#use {
        Use::Read => AccessFs::from_read(KNOWN),
        Use::All => AccessFs::from_all(KNOWN),
    };
    let is_folder = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(place)?.st_mode).is_dir();
    Ok(if is_folder { access } else { access & AccessFs::from_file(KNOWN) })
}

impl Fence {
    /// Puts the rules into force for this process and what it starts, for good. What is kept by that; `None` when the
    /// kernel has no Landlock.
    pub fn close(self) -> io::Result<Option<Vec<String>>> {
        let status = self.0.restrict_self().map_err(io::Error::other)?;
        let LandlockStatus::Available { effective_abi, .. } = status.landlock else { return Ok(None) };
        if status.ruleset == RulesetStatus::NotEnforced {
            return Ok(None);
        }
        let mut kept = vec![format!("landlock-{}", effective_abi as i32)];
        if effective_abi >= ABI::V6 {
            kept.push("signals".to_owned());
        }
        Ok(Some(kept))
    }
}

/// Every place that is allowed.
fn places(order: &Order, reach: &Reach, is_root: bool) -> Vec<(PathBuf, Use)> {
    let mut own: Vec<PathBuf> = reach.own.iter().flat_map(|path| way_to(path)).collect();
    // Root reads a disk as a file, and everything in it.
    own.extend(disks());
    let homes: Vec<PathBuf> =
        reach.homes.iter().map(|path| real(path)).filter(|home| home.parent().is_some()).collect();
    let program = std::env::current_exe().ok();
    // Whoever writes where this program is, is Portolan from its next start on.
    let kept: Vec<PathBuf> = program.iter().flat_map(|program| way_to(program)).collect();
    let hidden: Vec<PathBuf> = own.iter().chain(&homes).chain(&kept).cloned().collect();
    let mut places = Vec::new();
    let mut add =
        |place: &Path, hidden: &[PathBuf], r#use| spread(place, hidden, &mut |path| places.push((path, r#use)));
    for entry in fs::read_dir("/").into_iter().flatten().flatten() {
        let path = entry.path();
        let r#use = if is_root && SYSTEM.iter().any(|system| path == Path::new(system)) { Use::Read } else { Use::All };
        add(&path, &hidden, r#use);
    }
    add(Path::new(SCRATCH), &hidden, Use::All);
    if let Some(program) = program {
        add(&real(&program), &own, Use::Read);
    }
    for place in reach.allowed.iter().cloned().chain(named(order)) {
        if let Ok(place) = place.canonicalize() {
            add(&place, &own, Use::All);
        }
    }
    for place in tools(order, &homes) {
        if let Ok(place) = place.canonicalize() {
            add(&place, &own, Use::Read);
        }
    }
    // Portolan's own folder holds these two, and they are the command's.
    places.extend([&order.home, &order.tmp].map(|own| (real(own), Use::All)));
    places
}

/// A path without links, also when its last part does not exist.
fn real(path: &Path) -> PathBuf {
    if let Ok(real) = path.canonicalize() {
        return real;
    }
    match (path.parent().map(Path::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

/// A path without links, and each link on the way to it: whoever may replace one of these leads the path elsewhere.
fn way_to(path: &Path) -> Vec<PathBuf> {
    let mut way = Vec::new();
    let mut rest: Vec<_> = path.components().rev().map(|part| part.as_os_str().to_owned()).collect();
    let mut reached = PathBuf::new();
    while let Some(part) = rest.pop() {
        if part == ".." {
            reached.pop();
            continue;
        }
        let next = reached.join(&part);
        match fs::read_link(&next) {
            // As many as the kernel follows.
            Ok(link) if way.len() < 40 => {
                rest.extend(link.components().rev().map(|part| part.as_os_str().to_owned()));
                way.push(next);
            }
            _ => reached = next,
        }
    }
    way.push(reached);
    way
}

/// Names `place`, or where something below it is hidden, its entries that are not. Links are not followed: what they
/// point to has its own place.
fn spread(place: &Path, hidden: &[PathBuf], name: &mut impl FnMut(PathBuf)) {
    if hidden.iter().any(|hidden| place.starts_with(hidden)) {
        return;
    }
    if !hidden.iter().any(|hidden| hidden.starts_with(place)) {
        return name(place.to_owned());
    }
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| !kind.is_symlink()) {
            spread(&entry.path(), hidden, name);
        }
    }
}

/// Disks and memory as files.
fn disks() -> impl Iterator<Item = PathBuf> {
    let memory = ["/dev/mem", "/dev/kmem", "/dev/port"].map(PathBuf::from).into_iter().filter(|path| path.exists());
    let entries =
        ["/dev", "/dev/mapper"].into_iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_block_device()))
        .map(|disk| disk.path())
        .chain(memory)
}

/// The places that the server's own configuration names: an administrator wrote it. Absolute paths among its arguments, as
/// `--option=/path`, too, and in its environment.
fn named(order: &Order) -> Vec<PathBuf> {
    let (args, env) = order.naming();
    let arguments = args
        .iter()
        .skip(order.wrapper_args)
        .flat_map(|arg| [Some(arg.as_str()), arg.split_once('=').map(|(_, value)| value)]);
    let environment = env.iter().filter(|(name, _)| name != "PATH").flat_map(|(_, value)| value.split(':'));
    arguments.flatten().chain(environment).filter(|text| text.starts_with('/')).map(PathBuf::from).collect()
}

/// What is in homes and is needed to run the command: its own file, and the tools on its PATH.
fn tools(order: &Order, homes: &[PathBuf]) -> Vec<PathBuf> {
    let mut tools = Vec::new();
    let (args, env) = order.naming();
    let path = env.iter().find(|(name, _)| name == "PATH").map(|(_, value)| value.as_str()).unwrap_or_default();
    let path: Vec<PathBuf> = std::env::split_paths(path).filter(|folder| folder.is_absolute()).collect();
    for folder in &path {
        around(folder, homes, &mut tools);
    }
    let mut programs = vec![PathBuf::from(&order.program)];
    programs.extend(args.iter().filter(|arg| is_program(Path::new(arg))).map(PathBuf::from));
    for program in programs {
        let found = if program.components().count() > 1 {
            Some(program)
        } else {
            path.iter().map(|folder| folder.join(&program)).find(|file| file.exists())
        };
        follow(found, homes, &mut tools);
    }
    tools
}

fn is_program(file: &Path) -> bool {
    let is_script = file.extension().and_then(OsStr::to_str).is_some_and(|extension| SCRIPTS.contains(&extension));
    file.is_absolute()
        && fs::metadata(file)
            .is_ok_and(|metadata| metadata.is_file() && (is_script || metadata.permissions().mode() & 0o111 != 0))
}

/// A program, and what each link on the way to it needs.
fn follow(mut file: Option<PathBuf>, homes: &[PathBuf], tools: &mut Vec<PathBuf>) {
    for _ in 0..8 {
        let Some(path) = file else { return };
        if let Some(folder) = path.parent() {
            around(folder, homes, tools);
        }
        file = fs::read_link(&path).ok().and_then(|link| Some(path.parent()?.join(link)));
        tools.push(path);
    }
}

/// The folder of a program, where it is in a home, and what belongs to it. Never a home as a whole.
fn around(folder: &Path, homes: &[PathBuf], tools: &mut Vec<PathBuf>) {
    let Ok(folder) = folder.canonicalize() else { return };
    let is_inside = |folder: &Path| homes.iter().any(|home| folder.starts_with(home) && folder != home);
    if !is_inside(&folder) {
        return;
    }
    tools.push(folder.clone());
    if let Some(project) = folder
        .ancestors()
        .take_while(|above| is_inside(above))
        .find(|above| PROJECTS.iter().any(|mark| above.join(mark).exists()))
    {
        tools.push(project.to_owned());
    }
    let is_programs = folder.file_name().and_then(OsStr::to_str).is_some_and(|name| PROGRAMS.contains(&name));
    let Some(above) = folder.parent().filter(|above| is_programs && is_inside(above)) else { return };
    match above.file_name().and_then(OsStr::to_str) {
        Some(".local") => tools.extend(LOCAL.map(|part| above.join(part))),
        // Its credentials are in there. The toolchains are elsewhere.
        Some(".cargo") => tools.extend(above.parent().map(|home| home.join(".rustup"))),
        _ => tools.push(above.to_owned()),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn order(program: &str, args: &[&str], env: &[(&str, &str)], own: &Path) -> Order {
        Order {
            server_id: String::new(),
            program: program.to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
            home: own.join("data/children/x/home"),
            tmp: own.join("data/children/x/tmp"),
            alone: true,
            wrapper_args: 0,
            user: None,
            max_files: 16,
            max_processes: None,
            reach: None,
            named: None,
        }
    }

    #[test]
    fn a_link_on_the_way_to_what_is_hidden_cannot_be_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().canonicalize().unwrap();
        for made in ["real/data", "last", "middle", "x/home", "x/tmp"] {
            fs::create_dir_all(top.join(made)).unwrap();
        }
        fs::write(top.join("real/tokens"), "").unwrap();
        std::os::unix::fs::symlink("../real/tokens", top.join("last/tokens")).unwrap();
        std::os::unix::fs::symlink(top.join("real"), top.join("middle/link")).unwrap();
        let own = vec![top.join("last/tokens"), top.join("middle/link/data")];
        let order = Order { home: top.join("x/home"), tmp: top.join("x/tmp"), ..order("node", &[], &[], &top) };
        let places = places(&order, &Reach { own, ..Reach::default() }, false);
        for hidden in ["real/data", "real/tokens", "real", "last/tokens", "last", "middle/link", "middle"] {
            assert_eq!(may(&places, &top.join(hidden)), None, "{hidden}");
        }
        assert_eq!(may(&places, &top.join("x")), Some(Use::All));
    }

    /// How the longest rule at or above a path is.
    fn may(places: &[(PathBuf, Use)], path: &Path) -> Option<Use> {
        let uses: Vec<_> =
            places.iter().filter(|(place, _)| path.starts_with(place)).map(|(_, r#use)| *r#use).collect();
        if uses.contains(&Use::All) { Some(Use::All) } else { uses.first().copied() }
    }

    #[test]
    fn what_is_hidden_is_not_reached_and_what_is_named_is() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().canonicalize().unwrap();
        for made in [
            "data/children/x/home",
            "data/children/x/tmp",
            "data/children/y/home",
            "beside",
            "homes/me/notes",
            "homes/me/.ssh",
            "homes/me/.local/bin",
            "homes/me/.local/share/uv",
            "homes/me/.local/share/keyrings",
            "homes/me/.cargo/bin",
            "homes/me/.rustup",
            "homes/me/.nvm/v20/bin",
            "homes/me/bin",
            "homes/me/project/dist",
            "homes/you",
        ] {
            fs::create_dir_all(top.join(made)).unwrap();
        }
        for file in
            ["homes/me/project/package.json", "homes/me/project/dist/index.js", "data/portolan.db", "homes/me/run.py"]
        {
            fs::write(top.join(file), "").unwrap();
        }
        let at = |path: &str| top.join(path);
        std::os::unix::fs::symlink(at("data"), at("beside/link")).unwrap();
        std::os::unix::fs::symlink(at("data"), at("homes/me/notes/link")).unwrap();
        let text = |path: &str| at(path).display().to_string();
        let path =
            [".local/bin", ".cargo/bin", ".nvm/v20/bin", "bin"].map(|bin| text(&format!("homes/me/{bin}"))).join(":");
        let args = [
            &*text("homes/me/project/dist/index.js"),
            &format!("--dir={}", text("homes/me/notes")),
            &text("data"),
            "/x/y",
        ];
        let env = [("PATH", &*path), ("DATABASE", &text("data/portolan.db")), ("LINK", &text("homes/me/notes/link"))];
        let reach = Reach {
            own: vec![at("data"), at("missing.key")],
            homes: vec![at("homes/me"), at("homes/you")],
            ..Reach::default()
        };
        let places = places(&order("node", &args, &env, &top), &reach, false);
        for (path, expected) in [
            ("/usr/bin/env".to_owned(), Some(Use::All)),
            (text("beside/new"), Some(Use::All)),
            (text("data"), None),
            (text("data/portolan.db"), None),
            (text("data/children/y/home"), None),
            (text("data/children/x/home/new"), Some(Use::All)),
            (text("data/children/x/tmp/new"), Some(Use::All)),
            (text("data/children/x"), None),
            (text("homes/me"), None),
            (text("homes/you/file"), None),
            (text("homes/me/.ssh"), None),
            (text("homes/me/notes/new"), Some(Use::All)),
            (text("homes/me/project/node_modules/x"), Some(Use::Read)),
            (text("homes/me/project/dist/index.js"), Some(Use::All)),
            (text("homes/me/.local/bin/uvx"), Some(Use::Read)),
            (text("homes/me/.local/share/uv/tools"), Some(Use::Read)),
            (text("homes/me/.local/share/keyrings"), None),
            (text("homes/me/.cargo/bin/x"), Some(Use::Read)),
            (text("homes/me/.cargo/credentials.toml"), None),
            (text("homes/me/.rustup/x"), Some(Use::Read)),
            (text("homes/me/.nvm/v20/lib"), Some(Use::Read)),
            (text("homes/me/bin/x"), Some(Use::Read)),
            (text("homes/me/run.py"), None),
            // Who may create it could put one there.
            (text("missing.key"), None),
        ] {
            assert_eq!(may(&places, Path::new(&path)), expected, "{path}");
        }
        // A program in the home itself opens nothing but itself; whoever names the whole home gets it, but nothing own.
        let places_of = |args: &[&str]| super::places(&order("/bin/true", args, &[], &top), &reach, false);
        let program = places_of(&[&text("homes/me/run.py")]);
        assert_eq!(may(&program, &at("homes/me/run.py")), Some(Use::All));
        assert_eq!(may(&program, &at("homes/me/.ssh")), None);
        let all = places_of(&[&text(""), "/"]);
        assert_eq!(may(&all, &at("homes/me/.ssh")), Some(Use::All));
        assert_eq!(may(&all, &at("data/portolan.db")), None);
    }

    #[test]
    fn root_may_read_the_system_and_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let reach = Reach::default();
        let order = order("/bin/true", &[], &[], folder.path());
        let (root, user) = (places(&order, &reach, true), places(&order, &reach, false));
        assert_eq!(may(&root, Path::new("/etc/cron.d")), Some(Use::Read));
        assert_eq!(may(&user, Path::new("/etc/cron.d")), Some(Use::All));
        assert_eq!(may(&root, Path::new("/dev/null")), Some(Use::All));
        for disk in disks() {
            assert_eq!(may(&root, &disk), None, "{disk:?}");
        }
    }
}
