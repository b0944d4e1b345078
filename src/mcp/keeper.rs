//! A second process that outlives Portolan by a moment, to end what Portolan started.
//!
//! A SIGKILL leaves Portolan no time to end its children. The kernel's death signal reaches those it started itself, and
//! none of theirs. So the groups of all children are told to a keeper, this same program, over a pipe; the end of the
//! pipe is the end of Portolan, and the keeper kills what is left.

use std::collections::HashSet;
use std::io::{BufRead, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::signal::unix::{SignalKind, signal};

/// The command of this program that runs a keeper.
pub const COMMAND: &str = "keep-children";

/// Clones share one process, which is started with the first child.
#[derive(Clone, Default)]
pub struct Keeper(Arc<Mutex<Told>>);

#[derive(Default)]
struct Told {
    process: Option<Child>,
    groups: HashSet<u32>,
}

/// A group that the keeper knows of; dropping it tells that the group has ended.
pub struct Kept {
    keeper: Keeper,
    group: u32,
}

impl Keeper {
    /// Makes the group of this child known.
    pub fn keep(&self, group: u32) -> Kept {
        let mut told = self.told();
        told.groups.insert(group);
        if !told.tell(&format!("+{group}\n")) {
            told.start_again();
        }
        drop(told);
        Kept { keeper: self.clone(), group }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().expect("no code panics while it holds the process")
    }
}

impl Told {
    /// A few bytes that the keeper reads at once: this does not block.
    fn tell(&mut self, line: &str) -> bool {
        let pipe = self.process.as_mut().and_then(|process| process.stdin.as_mut());
        pipe.is_some_and(|pipe| pipe.write_all(line.as_bytes()).is_ok())
    }

    /// Starts the keeper, or another one if somebody killed it, and tells it all.
    fn start_again(&mut self) {
        if let Some(mut gone) = self.process.take() {
            let _ = gone.kill();
            let _ = gone.wait();
        }
        match start() {
            Ok(process) => self.process = Some(process),
            Err(error) => tracing::warn!(%error, "the keeper of children cannot be started"),
        }
        let all: String = self.groups.iter().map(|group| format!("+{group}\n")).collect();
        self.tell(&all);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut told = self.keeper.told();
        told.groups.remove(&self.group);
        // A keeper that is gone will be told of those that are left by the one after it.
        told.tell(&format!("-{}\n", self.group));
    }
}

fn start() -> std::io::Result<Child> {
    use std::os::unix::process::CommandExt;
    // Not by its path: the file may have been replaced since. In a group of its own, signals to ours pass it by.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("portolan").arg(COMMAND).env_clear().process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

/// What the keeper does: reads groups from standard input, and kills those that are left at its end. Signals that ask it
/// to go are meant for Portolan, whose end is its own.
pub fn keep_children() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let _deaf: Vec<_> = runtime
        .iter()
        .flat_map(|runtime| {
            let _inside = runtime.enter();
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal)
        })
        .collect();
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
