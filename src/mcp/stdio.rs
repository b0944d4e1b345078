//! stdio servers: a child process of ours, one JSON-RPC message per line on its pipes (MCP 2025-11-25, transports).
//!
//! The child has one owner, a task that outlives every caller and ends it with the session. Standard error is drained
//! always (a full pipe would stop the child); its last bytes are kept to explain an early exit.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Buf, Bytes};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionread;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::model::Secret;

use super::Error;
use super::budget::{Held, Share};
use super::child::{Child, Children, Kept, Stderr, supervise};
use super::exchange::{Answer, Exchange, Reply};
use super::lines::{Line, Lines};
use super::message;
use super::session::{Ask, CallError, Context};
use super::template::FilledStdio;
use super::watch::Bell;

/// How long the end of standard error may take after the end of the child, and the rest of its output.
const LAST_WORDS: Duration = Duration::from_millis(200);
const REST_OF_OUTPUT: Duration = Duration::from_millis(500);
/// How long others may hold the standard input of a child that has ended, and how often to look.
const LAST_READERS: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(5);
/// How long a child may leave its standard input unread while something waits to be written.
const STALL: Duration = Duration::from_secs(30);
/// How long a child may go on asking without reading our answers.
const ASKING: Duration = Duration::from_secs(5);
/// At this many waiting messages the child's own requests are not read on, and at twice as many, notices to it are
/// dropped. Our requests are bounded by --max-calls-per-server.
const QUEUE: usize = 64;
const MAX_NOTICES: usize = 2 * QUEUE;

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
    /// What the child was given and no error may show.
    secrets: Vec<Secret>,
    stall: Duration,
}

/// The child's standard input, and what waits for it.
struct Input {
    /// `None` once it is closed.
    pipe: Option<Arc<pipe::Sender>>,
    queue: VecDeque<Outgoing>,
    /// How many bytes were written.
    written: u64,
    /// At which of them each request begins that was, and is not over.
    begun: HashMap<u64, u64>,
    /// How many of them were read, once nobody reads any more.
    read: Option<u64>,
}

struct Outgoing {
    request: Option<u64>,
    begun: bool,
    rest: Bytes,
}

#[derive(Default)]
struct Facts {
    exit: Option<ExitStatus>,
    stderr: Stderr,
}

impl StdioWire {
    /// Starts the command. `permit` is given back when the child is gone; the end of the session cancels `end`.
    ///
    /// # Errors
    /// Those of [`Children::start`].
    pub async fn open(
        command: FilledStdio<'_>,
        context: &Context,
        share: Arc<Share>,
        bell: Bell,
        permit: Option<Arc<OwnedSemaphorePermit>>,
        end: CancellationToken,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let split = context.settings.legacy_arg_split;
        let Child { stdin, stdout, stderr, kept } =
            context.children.start(bell.server_id(), command, split, deadline).await?;
        let pipe = Arc::new(stdin);
        let shared = Arc::new(Shared {
            exchange: Arc::default(),
            input: Mutex::new(Input::new(pipe.clone())),
            waits: Notify::new(),
            written: Notify::new(),
            facts: Mutex::default(),
            exited: CancellationToken::new(),
            end,
            bell,
            secrets: command.filled.secrets.clone(),
            stall: STALL.min(context.settings.run_timeout),
        });
        let lines = Lines::new(stdout, context.settings.max_message_bytes, Held::nothing(&share));
        let drained = context.tracker.spawn(shared.clone().drain(stderr));
        context.tracker.spawn(shared.clone().own(kept, context.children.clone(), drained, permit));
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
                    Reply::Ended(error) if self.0.withdraw(waiting.id) || self.0.input().is_unread(waiting.id) => {
                        Err(CallError::NotSent(error))
                    }
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
        self.0.facts().stderr.last_line(&self.0.secrets)
    }

    /// Why the session has ended, once it has.
    pub fn ended(&self) -> Option<Error> {
        self.0.exchange.ended()
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
        self.shared.input().begun.remove(&self.id);
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
        match ended {
            Some(reason @ Error::NotReading) => {
                self.input().pipe = None;
                self.exchange.end(&reason);
                self.end.cancel();
            }
            // The reader knows more of why the child left, if it gets to it.
            Some(_) => {
                let _ = timeout(REST_OF_OUTPUT, self.exited.cancelled()).await;
                self.end.cancel();
            }
            // What a child that has left did not read is in the pipe still: the reader looks, and closes it.
            None if self.exited.is_cancelled() => {}
            None => self.input().pipe = None,
        }
    }

    /// Reads what the child says until it is gone, or was given up.
    async fn read(self: Arc<Self>, mut lines: Lines<pipe::Receiver>) {
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
            // A child that has left by itself says more of its end than that.
            () = self.end.cancelled() => if !self.exited.is_cancelled() {
                self.exchange.end(&Error::Closed);
            },
        }
        // The pipe closes a moment before the child can be reaped.
        let _ = timeout(REST_OF_OUTPUT, self.exited.cancelled()).await;
        if self.exited.is_cancelled() {
            self.note_unread().await;
        }
        self.input().pipe = None;
        self.exchange.end(&self.last_words().unwrap_or(Error::Closed));
        self.bell.ended();
        self.end.cancel();
    }

    /// Looks what nobody has read and nobody will: such calls were not made. What the child started may hold its standard
    /// input for a moment longer, as the server that `npx` starts does.
    async fn note_unread(&self) {
        let Some(pipe) = self.input().pipe.clone() else { return };
        let deadline = Instant::now() + LAST_READERS;
        while has_reader(&pipe) {
            if Instant::now() >= deadline {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
        if let Ok(unread) = ioctl_fionread(&*pipe) {
            let mut input = self.input();
            input.read = Some(input.written.saturating_sub(unread));
        }
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
        facts.exit.map(|status| Error::Exited { status, stderr: facts.stderr.last_line(&self.secrets) })
    }

    /// Reaps the child, after its own end or the session's; `held` is what ends with it.
    async fn own(
        self: Arc<Self>,
        kept: Kept,
        children: Children,
        mut drained: tokio::task::JoinHandle<()>,
        held: impl Send,
    ) {
        let ended = async |status| {
            // What a dying child said last is still in the pipe; somebody who left its group may hold that pipe open.
            if timeout(LAST_WORDS, &mut drained).await.is_err() {
                drained.abort();
            }
            self.facts().exit = status;
            drop(held);
            self.exited.cancel();
        };
        supervise(kept, &children, &self.end, ended).await;
    }

    async fn drain(self: Arc<Self>, mut stderr: pipe::Receiver) {
        let mut buffer = vec![0; 8 * 1024];
        while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
            self.facts().stderr.push(&buffer[..count]);
        }
    }
}

/// Whether anybody has the other end of a pipe; also when that cannot be said.
fn has_reader(pipe: &pipe::Sender) -> bool {
    let mut ends = [PollFd::new(pipe, PollFlags::empty())];
    let polled = poll(&mut ends, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_err() || !ends[0].revents().contains(PollFlags::ERR)
}

impl Input {
    fn new(pipe: Arc<pipe::Sender>) -> Self {
        Self { pipe: Some(pipe), queue: VecDeque::new(), written: 0, begun: HashMap::new(), read: None }
    }

    /// Whether nothing of this request was read by anybody, of what was written of it, and will be.
    fn is_unread(&self, id: u64) -> bool {
        self.read.zip(self.begun.get(&id)).is_some_and(|(read, begin)| *begin >= read)
    }

    /// Writes as much as the pipe takes; `true` when nothing is left.
    fn flush(&mut self) -> io::Result<bool> {
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::BrokenPipe.into()) };
        while let Some(line) = self.queue.front_mut() {
            match pipe.try_write(&line.rest) {
                Ok(count) => {
                    if let Some(id) = line.request.filter(|_| !line.begun) {
                        self.begun.insert(id, self.written);
                    }
                    self.written += count as u64;
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
