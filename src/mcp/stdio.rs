//! stdio servers: our own child process, and the transport over its pipes.
//!
//! A child runs in a process group of its own and has one owner, a task that outlives every caller: it reaps the child,
//! and ends the whole group when the [`Process`] handle is dropped or the child's leader is gone. Standard error is
//! drained always (a full pipe would stop the child); its last bytes are kept to explain an early exit.

use std::collections::VecDeque;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use rmcp::model::{ClientJsonRpcMessage, ServerJsonRpcMessage};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::codec::{AnyDelimiterCodec, FramedRead};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::model::{Secret, Stdio as Config};

use super::Error;
use super::ledger::{Ledger, request_number};

/// What a child gets of Portolan's own environment; the rest comes from its configuration.
const INHERITED: [&str; 6] = ["PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR"];
/// How long a child has to leave after its standard input closed, and again after SIGTERM (MCP 2025-11-25, lifecycle,
/// shutdown); then its group is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How much of standard error is kept, in bytes, and how much of its last line an error shows, in characters.
const STDERR_KEPT: usize = 64 * 1024;
const STDERR_SHOWN: usize = 300;
/// Values of the environment shorter than this say nothing, and may be part of any word.
const SHORTEST_SECRET: usize = 4;
/// How long the end of standard error may take after the end of the child.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How many messages may wait for a child that does not read.
const QUEUE: usize = 64;

/// A started child. Dropping it ends the child and its group.
pub struct Process {
    exited: CancellationToken,
    facts: Arc<Mutex<Facts>>,
    /// What its environment holds and no error may show.
    secrets: Vec<Secret>,
    _end: DropGuard,
}

#[derive(Default)]
struct Facts {
    exit: Option<std::process::ExitStatus>,
    stderr: VecDeque<u8>,
}

/// Starts the command and returns its transport and its handle.
///
/// # Errors
/// [`Error::Spawn`] when the command cannot be started.
pub fn spawn(
    config: &Config,
    split_args: bool,
    max_line: usize,
    ledger: Ledger,
    tracker: &TaskTracker,
    stop: &CancellationToken,
) -> Result<(StdioTransport, Process), Error> {
    let mut command = Command::new(&config.command);
    if split_args {
        command.args(config.args.iter().flat_map(|arg| arg.split_whitespace()));
    } else {
        command.args(&config.args);
    }
    command.env_clear();
    command.envs(INHERITED.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    command.envs(config.env.iter().flatten().map(|(name, value)| (name, value.expose())));
    // Its group is ended by the owner below; this is for the end of the runtime, which ends no task in order.
    command.process_group(0).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());

    let mut child = command.spawn().map_err(|error| Error::Spawn(error.kind()))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
        unreachable!("all three were asked to be pipes");
    };

    let facts = Arc::new(Mutex::new(Facts::default()));
    let exited = CancellationToken::new();
    let end = stop.child_token();
    let mut drained = tracker.spawn(drain(stderr, facts.clone()));
    tracker.spawn({
        let (facts, exited, end) = (facts.clone(), exited.clone(), end.clone());
        async move {
            let status = supervise(child, &end).await;
            // What a dying child said last is still in the pipe; somebody who left its group may hold that pipe open.
            if timeout(LAST_WORDS, &mut drained).await.is_err() {
                drained.abort();
            }
            facts.lock().expect("no code panics while it holds the facts").exit = status;
            exited.cancel();
        }
    });
    let (queue, outgoing) = mpsc::channel(QUEUE);
    tracker.spawn(write(stdin, outgoing, ledger.clone(), exited.clone(), end.clone()));
    let transport = StdioTransport {
        lines: FramedRead::new(stdout, AnyDelimiterCodec::new_with_max_length(b"\n".into(), vec![], max_line)),
        read: VecDeque::new(),
        queue: Some(queue),
        ledger,
    };
    let secrets = config.env.iter().flatten().map(|(_, value)| value.clone()).collect();
    Ok((transport, Process { exited, facts, secrets, _end: end.drop_guard() }))
}

impl Process {
    /// Done when the child is gone and reaped.
    pub fn exited(&self) -> CancellationToken {
        self.exited.clone()
    }

    /// How the child ended, in words, if it has.
    pub fn last_words(&self) -> Option<Error> {
        let facts = self.facts.lock().expect("no code panics while it holds the facts");
        facts.exit.map(|status| Error::Exited { status, stderr: last_line(&facts.stderr, &self.secrets) })
    }
}

/// Waits for the end of the child, or brings it about; returns how it ended.
async fn supervise(mut child: Child, end: &CancellationToken) -> Option<std::process::ExitStatus> {
    let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
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

async fn drain(mut stderr: ChildStderr, facts: Arc<Mutex<Facts>>) {
    let mut buffer = vec![0; 8 * 1024];
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        let kept = &mut facts.lock().expect("no code panics while it holds the facts").stderr;
        kept.extend(&buffer[..count]);
        let excess = kept.len().saturating_sub(STDERR_KEPT);
        kept.drain(..excess);
    }
}

/// Writes whole messages one after the other, so that an abandoned call never leaves half a line behind.
async fn write(
    mut stdin: ChildStdin,
    mut outgoing: mpsc::Receiver<(Option<i64>, Vec<u8>)>,
    ledger: Ledger,
    exited: CancellationToken,
    end: CancellationToken,
) {
    while let Some((request, line)) = outgoing.recv().await {
        let mut written = 0;
        while written < line.len() {
            // Biased: a pipe whose reader is gone may still take bytes.
            let result = tokio::select! {
                biased;
                () = exited.cancelled() => return,
                result = stdin.write(&line[written..]) => result,
            };
            match result {
                Ok(count @ 1..) => {
                    if written == 0 {
                        ledger.mark_sent(request, true);
                    }
                    written += count;
                }
                // Nobody reads any more: what waits for an answer must not wait for its deadline.
                _ => return end.cancel(),
            }
        }
    }
}

/// The last line of standard error, escaped, without the values that the server's own environment holds.
fn last_line(stderr: &VecDeque<u8>, secrets: &[Secret]) -> Option<String> {
    let bytes: Vec<u8> = stderr.iter().copied().collect();
    let text = String::from_utf8_lossy(&bytes);
    let mut line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?.to_owned();
    // Each line of each value, the longest first: a shorter one may be a part of it.
    let mut values: Vec<&str> = secrets.iter().flat_map(|secret| secret.expose().lines()).map(str::trim).collect();
    values.retain(|value| value.len() >= SHORTEST_SECRET);
    values.sort_by_key(|value| std::cmp::Reverse(value.len()));
    for value in values {
        line = line.replace(value, "********");
    }
    Some(line.chars().take(STDERR_SHOWN).flat_map(char::escape_debug).collect())
}

/// One JSON-RPC message per line (MCP 2025-11-25, transports, stdio).
pub struct StdioTransport {
    lines: FramedRead<ChildStdout, AnyDelimiterCodec>,
    read: VecDeque<ServerJsonRpcMessage>,
    /// `None` once closed; the writer then closes the child's standard input.
    queue: Option<mpsc::Sender<(Option<i64>, Vec<u8>)>>,
    ledger: Ledger,
}

/// The child takes no more messages.
#[derive(Debug, thiserror::Error)]
#[error("the command has ended")]
pub struct Gone;

impl StdioTransport {
    pub fn send(
        &mut self,
        message: &ClientJsonRpcMessage,
    ) -> impl Future<Output = Result<(), Gone>> + Send + 'static + use<> {
        self.ledger.open(message);
        let mut line = serde_json::to_vec(message).expect("a JSON-RPC message is JSON");
        line.push(b'\n');
        let request = request_number(message);
        let queue = self.queue.clone();
        async move { queue.ok_or(Gone)?.send((request, line)).await.map_err(|_| Gone) }
    }

    /// The next message; `None` at the end of the output, or at a line over the limit. Cancel-safe.
    pub async fn receive(&mut self) -> Option<ServerJsonRpcMessage> {
        while self.read.is_empty() {
            match self.lines.next().await? {
                Ok(line) => self.read.extend(self.ledger.read(&line)),
                Err(error) => {
                    tracing::warn!(%error, "the output of a stdio server cannot be read");
                    return None;
                }
            }
        }
        self.read.pop_front()
    }

    pub fn close(&mut self) {
        self.queue = None;
    }
}
