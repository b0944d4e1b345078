//! stdio servers: a child process of ours, one JSON-RPC message per line on its pipes (MCP 2025-11-25, transports).
//!
//! A child runs in a process group of its own and has one owner, a task that outlives every caller: it reaps the child,
//! and ends the whole group when the session ends or the child's leader is gone. It also ends with Portolan, however
//! that ends: by the kernel's death signal, and its group by the keeper. Standard error is drained always (a full pipe
//! would stop the child); its last bytes are kept to explain an early exit.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Buf, Bytes};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::model::{Secret, Stdio as Config};

use super::Error;
use super::budget::{Held, Share};
use super::exchange::{Answer, Exchange, Reply};
use super::lines::{Line, Lines};
use super::message;
use super::session::{Ask, CallError, Context};
use super::watch::Bell;

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
/// How long the end of standard error may take after the end of the child, and the rest of its output.
const LAST_WORDS: Duration = Duration::from_millis(200);
const REST_OF_OUTPUT: Duration = Duration::from_millis(500);
/// How many files a child may open at first; it may raise that itself.
#[cfg(target_os = "linux")]
const USUAL_FILES: u64 = 1024;
/// How long a child may leave its standard input unread while something waits to be written.
const STALL: Duration = Duration::from_secs(30);
/// How long a child may go on asking without reading our answers.
const ASKING: Duration = Duration::from_secs(5);
/// At this many waiting messages the child's own requests are not read on, and at twice as many, notices to it are
/// dropped. Our requests are bounded by --max-calls-per-server.
const QUEUE: usize = 64;
const MAX_NOTICES: usize = 2 * QUEUE;

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

    async fn spawn(&self, command: Command, deadline: Instant) -> io::Result<Child> {
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

/// One session with one child.
pub struct StdioWire(Arc<Shared>);

struct Shared {
    exchange: Arc<Exchange>,
    input: Mutex<Input>,
    /// Rung when a line is queued.
    waits: Notify,
    /// Rung when the queue got shorter.
    written: Notify,
    facts: Mutex<Facts>,
    /// The child is gone and reaped.
    exited: CancellationToken,
    /// The session is to end, or has.
    end: CancellationToken,
    bell: Bell,
    /// What the child's environment holds and no error may show.
    secrets: Vec<Secret>,
    stall: Duration,
}

/// The child's standard input, and what waits for it.
struct Input {
    /// `None` once it is closed.
    pipe: Option<Arc<pipe::Sender>>,
    queue: VecDeque<Outgoing>,
}

struct Outgoing {
    request: Option<u64>,
    begun: bool,
    rest: Bytes,
}

#[derive(Default)]
struct Facts {
    exit: Option<ExitStatus>,
    stderr: VecDeque<u8>,
}

impl StdioWire {
    /// Starts the command. `permit` is given back when the child is gone; the end of the session cancels `end`.
    ///
    /// # Errors
    /// [`Error::Spawn`] when the command cannot be started.
    pub async fn open(
        config: &Config,
        context: &Context,
        share: Arc<Share>,
        bell: Bell,
        permit: Option<Arc<OwnedSemaphorePermit>>,
        end: CancellationToken,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let command = command(config, context.settings.legacy_arg_split);
        let cannot = |error: io::Error| Error::Spawn(error.kind());
        let mut child = context.spawner.spawn(command, deadline).await.map_err(cannot)?;
        let kept = context.keeper.as_ref().and_then(|keeper| Some(keeper.keep(child.id()?)));
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            unreachable!("all three were asked to be pipes");
        };
        let pipe = stdin.into_owned_fd().and_then(pipe::Sender::from_owned_fd).map_err(cannot)?;
        let pipe = Arc::new(pipe);
        let shared = Arc::new(Shared {
            exchange: Arc::default(),
            input: Mutex::new(Input { pipe: Some(pipe.clone()), queue: VecDeque::new() }),
            waits: Notify::new(),
            written: Notify::new(),
            facts: Mutex::default(),
            exited: CancellationToken::new(),
            end,
            bell,
            secrets: config.env.iter().flatten().map(|(_, value)| value.clone()).collect(),
            stall: STALL.min(context.settings.run_timeout),
        });
        let lines = Lines::new(stdout, context.settings.max_message_bytes, Held::nothing(&share));
        let drained = context.tracker.spawn(shared.clone().drain(stderr));
        context.tracker.spawn(shared.clone().own(child, drained, (permit, kept)));
        context.tracker.spawn(shared.clone().write(pipe));
        context.tracker.spawn(shared.clone().read(lines));
        Ok(Self(shared))
    }

    /// Sends a request and waits for its answer until `deadline`.
    pub async fn request(&self, ask: &Ask<'_>, deadline: Instant) -> Result<Answer, CallError> {
        let mut waiting = self.0.exchange.open().map_err(CallError::NotSent)?;
        let mut line = message::request(waiting.id, ask.method, ask.params);
        line.push(b'\n');
        let mut pending = Pending { shared: &self.0, id: waiting.id, over: false };
        self.0.push(Some(waiting.id), line.into());
        match timeout_at(deadline, waiting.reply()).await {
            Ok(reply) => {
                pending.over = true;
                match reply {
                    Reply::Ended(error) if self.0.withdraw(waiting.id) => Err(CallError::NotSent(error)),
                    reply => reply.into_result(),
                }
            }
            Err(_) if self.0.withdraw(waiting.id) => {
                pending.over = true;
                Err(CallError::NotSent(Error::NotReading))
            }
            Err(_) => Err(CallError::TimedOut),
        }
    }

    /// Sends what has no answer.
    pub fn notify(&self, mut body: Vec<u8>) {
        body.push(b'\n');
        self.0.push(None, body.into());
    }

    /// Asks for notices of the server; its answers to that say nothing more.
    pub fn subscribe(&self, params: &str) {
        if let Ok(waiting) = self.0.exchange.open() {
            self.notify(message::request(waiting.id, message::LISTEN, params));
        }
    }

    /// Ends the child, and waits for that until `deadline`.
    pub async fn leave(&self, deadline: Instant) {
        self.0.end.cancel();
        let _ = timeout_at(deadline, self.0.exited.cancelled()).await;
    }

    /// The last line that the child wrote to standard error.
    pub fn last_line(&self) -> Option<String> {
        last_line(&self.0.facts().stderr, &self.0.secrets)
    }

    /// Why the session has ended, once it has.
    pub fn ended(&self) -> Option<Error> {
        self.0.exchange.ended()
    }
}

fn command(config: &Config, split_args: bool) -> Command {
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

/// A request that is under way; dropped before it is over, it is taken back, or the server is told.
struct Pending<'a> {
    shared: &'a Shared,
    id: u64,
    over: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.over && !self.shared.withdraw(self.id) {
            let mut line = message::cancelled(self.id);
            line.push(b'\n');
            self.shared.push(None, line.into());
        }
    }
}

impl Shared {
    fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().expect("no code panics while it holds the input")
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().expect("no code panics while it holds the facts")
    }

    /// Writes a line at once if the pipe has room, else leaves it to [`Shared::write`].
    fn push(&self, request: Option<u64>, line: Bytes) {
        let mut input = self.input();
        // What nobody waits for is not worth more than this.
        if request.is_none() && input.queue.len() >= MAX_NOTICES {
            return;
        }
        input.queue.push_back(Outgoing { request, begun: false, rest: line });
        if input.queue.len() == 1 {
            let _ = input.flush();
        }
        if !input.queue.is_empty() {
            self.waits.notify_one();
        }
    }

    /// Takes a request back of which nothing was written; `false` when it is too late for that.
    fn withdraw(&self, id: u64) -> bool {
        let mut input = self.input();
        let place = input.queue.iter().position(|line| line.request == Some(id) && !line.begun);
        place.and_then(|place| input.queue.remove(place)).is_some()
    }

    /// Writes what waits, as the child reads it. A child that reads nothing for too long is given up.
    async fn write(self: Arc<Self>, pipe: Arc<pipe::Sender>) {
        let writing = async {
            loop {
                self.waits.notified().await;
                let mut progress = Instant::now();
                loop {
                    let flushed = self.input().flush();
                    match flushed {
                        Ok(true) => break self.written.notify_waiters(),
                        Ok(false) => {}
                        // Nobody reads any more: what waits for an answer must not wait for its deadline.
                        Err(_) => return Error::Closed,
                    }
                    let before = self.input().left();
                    if timeout_at(progress + self.stall, pipe.writable()).await.is_err() {
                        // One that has calls to work on may read on afterwards; those have their own deadlines.
                        if self.exchange.waiting() <= self.input().requests() {
                            return Error::NotReading;
                        }
                        progress = Instant::now();
                    }
                    if self.input().flush().is_err() {
                        return Error::Closed;
                    }
                    if self.input().left() < before {
                        progress = Instant::now();
                        self.written.notify_waiters();
                    }
                }
            }
        };
        let ended = tokio::select! {
            reason = writing => Some(reason),
            () = self.exited.cancelled() => None,
            () = self.end.cancelled() => None,
        };
        self.input().pipe = None;
        match ended {
            Some(reason @ Error::NotReading) => {
                self.exchange.end(&reason);
                self.end.cancel();
            }
            // The reader knows more of why the child left, if it gets to it.
            Some(_) => {
                let _ = timeout(REST_OF_OUTPUT, self.exited.cancelled()).await;
                self.end.cancel();
            }
            None => {}
        }
    }

    /// Reads what the child says until it is gone, or was given up.
    async fn read(self: Arc<Self>, mut lines: Lines<ChildStdout>) {
        let over = async {
            self.exited.cancelled().await;
            // The answers that a child wrote before it left are still in the pipe.
            tokio::time::sleep(REST_OF_OUTPUT).await;
        };
        let reading = async {
            while let Some(line) = lines.next().await
                && self.take(line).await
            {}
        };
        tokio::select! {
            () = reading => {}
            () = over => {}
            () = self.end.cancelled() => self.exchange.end(&Error::Closed),
        }
        // The pipe closes a moment before the child can be reaped.
        let _ = timeout(REST_OF_OUTPUT, self.exited.cancelled()).await;
        self.exchange.end(&self.last_words().unwrap_or(Error::Closed));
        self.bell.ended();
        self.end.cancel();
    }

    /// `false` when the session cannot go on.
    async fn take(&self, line: Line) -> bool {
        let (text, held) = match line {
            Line::Whole(text, held) => (text, held),
            Line::Untaken { head, tail, why } => {
                return match message::id_of_a_part(&head, &tail) {
                    Some(id) => {
                        self.exchange.deliver(id, Reply::Untaken(why));
                        true
                    }
                    None if self.exchange.fail_the_only(why) => true,
                    None => {
                        self.exchange.end(&Error::Oversize(why));
                        false
                    }
                };
            }
        };
        for (id, method) in self.exchange.receive(&text, held, &self.bell) {
            // A child that asks faster than it reads our answers waits; so does what it wrote behind.
            let room = async {
                loop {
                    let written = self.written.notified();
                    if self.input().queue.len() < QUEUE {
                        break;
                    }
                    written.await;
                }
            };
            if timeout(ASKING, room).await.is_err() {
                self.exchange.end(&Error::NotReading);
                return false;
            }
            let mut reply = message::reply(&id, &method);
            reply.push(b'\n');
            self.push(None, reply.into());
        }
        true
    }

    /// How the child ended, in words, if it has.
    fn last_words(&self) -> Option<Error> {
        let facts = self.facts();
        facts.exit.map(|status| Error::Exited { status, stderr: last_line(&facts.stderr, &self.secrets) })
    }

    /// Reaps the child, after its own end or the session's; `held` is what ends with it.
    async fn own(self: Arc<Self>, child: Child, mut drained: tokio::task::JoinHandle<()>, held: impl Send) {
        let status = supervise(child, &self.end).await;
        // What a dying child said last is still in the pipe; somebody who left its group may hold that pipe open.
        if timeout(LAST_WORDS, &mut drained).await.is_err() {
            drained.abort();
        }
        self.facts().exit = status;
        drop(held);
        self.exited.cancel();
    }

    async fn drain(self: Arc<Self>, mut stderr: ChildStderr) {
        let mut buffer = vec![0; 8 * 1024];
        while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
            let kept = &mut self.facts().stderr;
            kept.extend(&buffer[..count]);
            let excess = kept.len().saturating_sub(STDERR_KEPT);
            kept.drain(..excess);
        }
    }
}

impl Input {
    /// Writes as much as the pipe takes; `true` when nothing is left.
    fn flush(&mut self) -> io::Result<bool> {
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::BrokenPipe.into()) };
        while let Some(line) = self.queue.front_mut() {
            match pipe.try_write(&line.rest) {
                Ok(count) => {
                    line.begun = true;
                    line.rest.advance(count);
                    if line.rest.is_empty() {
                        self.queue.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// How many requests wait of which nothing is written.
    fn requests(&self) -> usize {
        self.queue.iter().filter(|line| line.request.is_some() && !line.begun).count()
    }

    /// How many bytes wait.
    fn left(&self) -> usize {
        self.queue.iter().map(|line| line.rest.len()).sum()
    }
}

/// The process group that a child leads.
fn group(child: &Child) -> Option<Pid> {
    child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
}

/// Waits for the end of the child, or brings it about; returns how it ended.
async fn supervise(mut child: Child, end: &CancellationToken) -> Option<ExitStatus> {
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
