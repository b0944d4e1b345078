//! A child process of ours: how it is started, what it gets, and its certain death.
//!
//! It runs in a process group of its own. Whoever owns it calls [`supervise`], which reaps it and ends the whole group.
//! The kernel kills it should Portolan die; what it started itself is the keeper's.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::model::{Secret, Stdio as Config};
use crate::secrets::scrub;

/// What a child gets of Portolan's own environment; the rest comes from its configuration.
const INHERITED: [&str; 6] = ["PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR"];
/// How long a child has to leave after its standard input closed, and again after SIGTERM (MCP 2025-11-25, lifecycle,
/// shutdown); then its group is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How much of standard error is kept, in bytes, and how much of its last line an error shows, in characters.
const STDERR_KEPT: usize = 64 * 1024;
const STDERR_SHOWN: usize = 300;
/// How many files a child may open at first; it may raise that itself.
#[cfg(target_os = "linux")]
const USUAL_FILES: u64 = 1024;

/// Starts children, all from one thread: the kernel sends a death signal at the end of the thread that started the
/// child, not of the process. A thread that is stuck with a command (on a file system that is away, say) is followed by
/// another one, and kept: its death would be that of the children it started before.
pub struct Spawner(Mutex<Vec<mpsc::UnboundedSender<Order>>>);

type Order = (Command, oneshot::Sender<io::Result<Child>>);

/// How many threads may be stuck.
const STUCK: usize = 16;

impl Spawner {
    /// To be called in the runtime that is to wait for the children. The threads end when the spawner is dropped.
    pub fn new() -> Self {
        Self(Mutex::new(vec![Self::thread()]))
    }

    fn thread() -> mpsc::UnboundedSender<Order> {
        // As many orders wait as sessions are being opened.
        let (orders, mut next) = mpsc::unbounded_channel::<Order>();
        let runtime = tokio::runtime::Handle::current();
        let thread = move || {
            let _runtime = runtime.enter();
            while let Some((mut command, started)) = next.blocking_recv() {
                if started.is_closed() {
                    continue;
                }
                // Whoever asked may have left; the group then ends before it is known to anybody.
                if let Err(Ok(child)) = started.send(command.spawn())
                    && let Some(group) = group(&child)
                {
                    let _ = kill_process_group(group, Signal::KILL);
                }
            }
        };
        std::thread::Builder::new().name("children".to_owned()).spawn(thread).expect("a thread can be started");
        orders
    }

    /// Starts a child by `deadline`.
    pub async fn spawn(&self, command: Command, deadline: Instant) -> io::Result<Child> {
        let (started, child) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts children is gone");
        let threads = || self.0.lock().expect("no code panics while it holds the threads");
        let (number, thread) = {
            let threads = threads();
            (threads.len(), threads.last().cloned().ok_or_else(gone)?)
        };
        thread.send((command, started)).map_err(|_| gone())?;
        match timeout_at(deadline, child).await {
            Ok(child) => child.map_err(|_| gone())?,
            Err(_) => {
                let mut threads = threads();
                if threads.len() == number && number <= STUCK {
                    tracing::error!("a command cannot be started in time, and holds up the thread that starts it");
                    threads.push(Self::thread());
                }
                Err(io::ErrorKind::TimedOut.into())
            }
        }
    }
}

/// The command of a server, with the pipes and the environment that it gets.
pub fn command(config: &Config, split_args: bool) -> Command {
    let mut command = Command::new(&config.command);
    if split_args {
        command.args(config.args.iter().flat_map(|arg| arg.split_whitespace()));
    } else {
        command.args(&config.args);
    }
    command.env_clear();
    command.envs(INHERITED.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    command.envs(config.env.iter().flatten().map(|(name, value)| (name, value.expose())));
    // Its group is ended by the owner; this is for the end of the runtime, which ends no task in order.
    command.process_group(0).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    #[cfg(target_os = "linux")]
    die_with_us(&mut command);
    command
}

/// Asks the kernel to kill the child at the end of the thread that starts it, which is that of Portolan; and gives the
/// child back the number of open files that is usual, of which Portolan may have raised its own: some programs take
/// time or memory for each that they may open.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "code between fork and exec")]
fn die_with_us(command: &mut Command) {
    use rustix::process::{Resource, Rlimit, getpid, getppid, getrlimit, set_parent_process_death_signal, setrlimit};
    let portolan = getpid();
    let before_exec = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        let files = getrlimit(Resource::Nofile);
        let usual = files.current.map(|current| current.min(USUAL_FILES));
        setrlimit(Resource::Nofile, Rlimit { current: usual, ..files })?;
        // Portolan may have died before it was asked for.
        if getppid() == Some(portolan) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: the closure makes four system calls; it takes no lock and no memory.
    unsafe {
        command.pre_exec(before_exec);
    }
}

/// The process group that a child leads.
fn group(child: &Child) -> Option<Pid> {
    child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
}

/// Waits for the end of the child, or brings it about; returns how it ended.
pub async fn supervise(mut child: Child, end: &CancellationToken) -> Option<ExitStatus> {
    let group = group(&child);
    let signal = |signal| {
        if let Some(group) = group {
            // Fails only when nobody of the group is left.
            let _ = kill_process_group(group, signal);
        }
    };
    let left_by_itself = tokio::select! {
        status = child.wait() => Some(status.ok()),
        () = end.cancelled() => None,
    };
    let status = match left_by_itself {
        Some(status) => status,
        // The transport has closed standard input by now, which asks a server to leave.
        None => match timeout(GRACE, child.wait()).await {
            Ok(status) => status.ok(),
            Err(_) => {
                signal(Signal::TERM);
                timeout(GRACE, child.wait()).await.ok().and_then(Result::ok)
            }
        },
    };
    // Whatever the leader left behind in its group goes with it.
    signal(Signal::KILL);
    match status {
        Some(status) => Some(status),
        None => child.wait().await.ok(),
    }
}

/// The last bytes of a child's standard error.
#[derive(Default)]
pub struct Stderr {
    kept: VecDeque<u8>,
    /// Something came before that.
    cut: bool,
}

impl Stderr {
    pub fn push(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        let excess = self.kept.len().saturating_sub(STDERR_KEPT);
        self.kept.drain(..excess);
        self.cut |= excess > 0;
    }

    /// The last line, escaped, without the secrets that the server was given.
    pub fn last_line(&self, secrets: &[Secret]) -> Option<String> {
        let bytes: Vec<u8> = self.kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
        // A line whose beginning is gone may begin within a secret, which is then not found.
        if self.cut && text.trim() == line {
            return None;
        }
        let line = scrub(line, secrets);
        Some(line.chars().take(STDERR_SHOWN).flat_map(char::escape_debug).collect())
    }
}
