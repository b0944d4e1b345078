//! A second process that outlives Portolan by a moment, to end what Portolan started.
//!
//! A SIGKILL leaves Portolan no time to end its children. The kernel's death signal reaches those it started itself, and
//! none of theirs. So the groups of all children are told to a keeper, this same program, over a pipe; the end of the
//! pipe is the end of Portolan, and the keeper kills what is left.

use std::collections::HashSet;
use std::io::{BufRead, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process_group};

/// The command of this program that runs a keeper.
pub const COMMAND: &str = "keep-children";

/// Clones share one process, which is started with the first child.
#[derive(Clone, Default)]
pub struct Keeper(Arc<Mutex<Option<Child>>>);

/// A group that the keeper knows of; dropping it tells that the group has ended.
pub struct Kept {
    keeper: Keeper,
    group: u32,
}

impl Keeper {
    /// Makes the group of this child known. `None` without a keeper, which is then in the log.
    pub fn keep(&self, group: u32) -> Option<Kept> {
        let mut process = self.0.lock().expect("no code panics while it holds the process");
        if process.is_none() {
            *process =
                start().inspect_err(|error| tracing::warn!(%error, "the keeper of children cannot be started")).ok();
        }
        drop(process);
        self.tell('+', group).then(|| Kept { keeper: self.clone(), group })
    }

    /// A few bytes that the keeper reads at once: this does not block.
    fn tell(&self, sign: char, group: u32) -> bool {
        let mut process = self.0.lock().expect("no code panics while it holds the process");
        let pipe = process.as_mut().and_then(|process| process.stdin.as_mut());
        let told = pipe.is_some_and(|pipe| pipe.write_all(format!("{sign}{group}\n").as_bytes()).is_ok());
        if !told && let Some(mut gone) = process.take() {
            // It was killed: the next child starts another.
            let _ = gone.kill();
            let _ = gone.wait();
        }
        told
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.keeper.tell('-', self.group);
    }
}

fn start() -> std::io::Result<Child> {
    use std::os::unix::process::CommandExt;
    // Not by its path: the file may have been replaced since. In a group of its own, signals to ours pass it by.
    let mut command = Command::new("/proc/self/exe");
    command.arg(COMMAND).env_clear().process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

/// What the keeper does: reads groups from standard input, and kills those that are left at its end.
pub fn keep_children() {
    let mut groups = HashSet::new();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.split_at_checked(1) {
            Some(("+", group)) => groups.insert(group.to_owned()),
            Some(("-", group)) => groups.remove(group),
            _ => false,
        };
    }
    for group in groups.iter().filter_map(|group| Pid::from_raw(group.parse().ok()?)) {
        // Fails when nobody of the group is left.
        let _ = kill_process_group(group, Signal::KILL);
    }
}
