//! The fake MCP server: what tests and benchmarks connect Portolan to. A [`Script`] says what it does, [`Fake`] does it, and
//! `stdio`, `http` and `sse` carry it, `act` is for what no server should do. `fake-mcp` (main.rs) is the same thing as a program.
//! `tcp` has listeners that do not get as far as HTTP, `oauth` who signs in to a server that wants tokens.
//!
//! A listening fake owns a thread with a runtime of its own: dropping its [`Running`] closes the port and every connection.
#![expect(dead_code, reason = "the tests use one part, the program fake-mcp another")]

mod act;
mod answer;
pub(crate) mod http;
pub(crate) mod oauth;
pub(crate) mod script;
pub(crate) mod sse;
pub(crate) mod stdio;
pub(crate) mod tcp;

use std::{
    collections::{HashMap, VecDeque},
    fs,
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Child,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use ::http::{HeaderMap, request::Parts};
use axum::{
    handler::{Handler, HandlerService},
    serve::ListenerExt,
};
use futures_util::future::AbortHandle;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use act::{Pieces, Scene};
use oauth::Guard;
pub(crate) use script::Script;
use script::{Act, Stage};

/// One fake server: its script, and what outlives a request.
pub(crate) struct Fake {
    script: RwLock<Arc<Script>>,
    file: Option<PathBuf>,
    /// The program rather than a part of a test: it dies for real, and keeps no record of requests.
    standalone: bool,
    count: AtomicU64,
    deaf: AtomicBool,
    children: Mutex<Vec<Child>>,
    /// Answers still being made, by session and request id.
    pending: Mutex<HashMap<(String, String), AbortHandle>>,
    /// How often each act was done.
    acted: Mutex<HashMap<Stage, usize>>,
    /// Answers to be given once more.
    old: Mutex<VecDeque<String>>,
    /// Who is told of changes of the list (MCP 2026-07-28, subscriptions).
    listeners: Mutex<Vec<UnboundedSender<()>>>,
    /// Who keeps those without a token out.
    guard: OnceLock<Arc<Guard>>,
}

impl Fake {
    /// A server inside the test's process.
    pub(crate) fn new(script: Script) -> Arc<Self> {
        Arc::new(Self::with(script, None, false))
    }

    /// The same behind a guard.
    pub(crate) fn guarded(script: Script, guard: Arc<Guard>) -> Arc<Self> {
        let fake = Self::new(script);
        let _it_is_new = fake.guard.set(guard);
        fake
    }

    /// The server of the program `fake-mcp`; the file is read again at every `tools/list`.
    pub(crate) fn standalone(file: Option<PathBuf>) -> Arc<Self> {
        let script = file.as_deref().map_or_else(Script::default, |file| {
            Script::read(file).unwrap_or_else(|reason| panic!("script {}: {reason}", file.display()))
        });
        Arc::new(Self::with(script, file, true))
    }

    fn with(script: Script, file: Option<PathBuf>, standalone: bool) -> Self {
        Self {
            script: RwLock::new(Arc::new(script)),
            file,
            standalone,
            count: AtomicU64::new(0),
            deaf: AtomicBool::new(false),
            children: Mutex::default(),
            pending: Mutex::default(),
            acted: Mutex::default(),
            old: Mutex::default(),
            listeners: Mutex::default(),
            guard: OnceLock::new(),
        }
    }

    pub(crate) fn script(&self) -> Arc<Script> {
        self.script.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_script(&self, script: Script) {
        *self.script.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(script);
    }

    /// How many answers are being made right now: slow, never and progress calls that nobody cancelled or hung up on.
    pub(crate) fn running(&self) -> usize {
        locked(&self.pending).len()
    }

    /// How many `subscriptions/listen` are open.
    pub(crate) fn listeners(&self) -> usize {
        let mut listeners = locked(&self.listeners);
        listeners.retain(|listener| !listener.is_closed());
        listeners.len()
    }

    /// Tells those who listen that the list has changed.
    fn tell_of_a_change(&self) {
        locked(&self.listeners).retain(|listener| listener.send(()).is_ok());
    }

    /// Ends the answers under way of one session.
    fn abandon(&self, session: &str) {
        let pending = locked(&self.pending);
        let calls: Vec<_> = pending.iter().filter(|((of, _), _)| of == session).map(|(_, call)| call.clone()).collect();
        // Aborting wakes tasks that take this lock.
        drop(pending);
        calls.iter().for_each(AbortHandle::abort);
    }

    /// What a program does before it listens: a line in the script's `.starts`, `stderr`, its act, then `exit_at: "start"`.
    pub(crate) fn start(self: &Arc<Self>) {
        let script = self.script();
        if let Some(mut starts) = self.file_beside(".starts") {
            say(&mut starts, &format!("{}\n", std::process::id()));
        }
        say(&mut std::io::stderr(), &script.stderr);
        if let Some(act) = self.act(Stage::Start) {
            act::play_on_stdout(Scene::new(self, act, None, None));
        }
        if script.exit_at == Some(Stage::Start) {
            std::process::exit(script.exit_code);
        }
    }

    fn read_again(&self) {
        let Some(file) = &self.file else { return };
        match Script::read(file) {
            Ok(script) => self.set_script(script),
            Err(reason) => say(&mut std::io::stderr(), &format!("script kept as it was: {reason}\n")),
        }
    }

    /// What the script has for this stage, unless it was done often enough.
    fn act(&self, stage: Stage) -> Option<Act> {
        let act = self.script().acts.get(&stage)?.clone();
        // A program counts beside its script: the next process goes on from there.
        if let Some(mut count) = self.file_beside(&format!(".{stage:?}")) {
            say(&mut count, ".");
            let times = count.metadata().map_or(0, |metadata| metadata.len());
            return (act.times == 0 || times <= act.times as u64).then_some(act);
        }
        let mut acted = locked(&self.acted);
        let times = acted.entry(stage).or_default();
        *times += 1;
        (act.times == 0 || *times <= act.times).then_some(act)
    }

    fn log_file(&self) -> Option<fs::File> {
        self.file_beside(".log")
    }

    fn file_beside(&self, ending: &str) -> Option<fs::File> {
        let mut name = self.file.as_deref().map(Path::as_os_str)?.to_owned();
        name.push(ending);
        Some(fs::File::options().append(true).create(true).open(name).expect("the folder of the script is writable"))
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        for child in self.children.get_mut().unwrap_or_else(PoisonError::into_inner) {
            let _gone_already = child.kill().and_then(|()| child.wait());
        }
    }
}

/// One HTTP request the fake has seen.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    /// Null when there was none, or it was not JSON.
    pub(crate) body: Value,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The JSON-RPC method of the body; empty when there is none.
    pub(crate) fn rpc(&self) -> &str {
        self.body["method"].as_str().unwrap_or_default()
    }
}

/// A session of either HTTP transport.
struct Session {
    /// Where its messages must be posted; empty: anywhere.
    path: String,
    /// Its open event stream; dropping this ends the stream.
    events: Option<UnboundedSender<Pieces>>,
}

/// What the connections of one listening fake share.
struct Shared {
    fake: Arc<Fake>,
    addr: SocketAddr,
    seen: Mutex<Vec<Seen>>,
    sessions: Mutex<HashMap<String, Session>>,
    /// How many connections came in so far.
    accepted: AtomicUsize,
}

impl Shared {
    fn saw(&self, head: &Parts, body: &[u8]) {
        if !self.fake.standalone {
            locked(&self.seen).push(Seen {
                method: head.method.to_string(),
                path: head.uri.path_and_query().map_or_else(String::new, ToString::to_string),
                headers: head.headers.clone(),
                body: serde_json::from_slice(body).unwrap_or_default(),
            });
        } else if let Some(mut log) = self.fake.log_file() {
            let message =
                serde_json::from_slice::<Value>(body).unwrap_or_else(|_| json!({"http": head.method.as_str()}));
            say(&mut log, &format!("{}\n", json!({"pid": std::process::id(), "message": message})));
        }
    }

    /// Dies without an answer: the program ends; in a test this one connection does.
    fn cut(&self) -> ! {
        if self.fake.standalone {
            std::process::exit(self.fake.script().exit_code);
        }
        // Takes the connection's task down without a word from the panic hook.
        std::panic::resume_unwind(Box::new("cut"))
    }

    /// Dies after the answer under way: the program ends; in a test its sessions do.
    fn fade(self: &Arc<Self>) {
        let shared = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            if shared.fake.standalone {
                std::process::exit(shared.fake.script().exit_code);
            }
            locked(&shared.sessions).clear();
        });
    }
}

/// A listening fake. Dropping it closes the port and all connections before it returns.
pub(crate) struct Running {
    pub(crate) url: String,
    pub(crate) addr: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start<H, T>(addr: SocketAddr, path: &str, fake: Arc<Fake>, handler: H) -> Self
    where
        H: Handler<T, Arc<Shared>>,
        T: Send + 'static,
    {
        let listener = TcpListener::bind(addr).expect("the address is free");
        let addr = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared {
            fake,
            addr,
            seen: Mutex::default(),
            sessions: Mutex::default(),
            accepted: AtomicUsize::new(0),
        });
        let stop = CancellationToken::new();
        let (state, stopped) = (shared.clone(), stop.clone());
        let counting = state.clone();
        let thread = listen(listener, handler.with_state(state), stopped, move || {
            counting.accepted.fetch_add(1, Relaxed);
        });
        Self { url: format!("http://{addr}/{path}"), addr, shared, stop, thread: Some(thread) }
    }

    pub(crate) fn fake(&self) -> &Arc<Fake> {
        &self.shared.fake
    }

    pub(crate) fn set_script(&self, script: Script) {
        self.shared.fake.set_script(script);
    }

    /// Every HTTP request seen so far, oldest first.
    pub(crate) fn requests(&self) -> Vec<Seen> {
        locked(&self.shared.seen).clone()
    }

    /// How many TCP connections came in so far.
    pub(crate) fn connections(&self) -> usize {
        self.shared.accepted.load(Relaxed)
    }

    /// How many sessions are open.
    pub(crate) fn sessions(&self) -> usize {
        locked(&self.shared.sessions).len()
    }

    /// How many event streams are open (GET streams of streamable HTTP, sessions of HTTP+SSE).
    pub(crate) fn streams(&self) -> usize {
        locked(&self.shared.sessions).values().filter(|session| session.events.is_some()).count()
    }

    /// Forgets all sessions, as a restart does.
    pub(crate) fn drop_sessions(&self) {
        locked(&self.shared.sessions).clear();
    }

    /// Ends all open event streams. An HTTP+SSE session ends with its stream; one of streamable HTTP lives on.
    pub(crate) fn cut_streams(&self) {
        locked(&self.shared.sessions).values_mut().for_each(|session| session.events = None);
    }

    /// Sends a JSON-RPC message on every open event stream.
    pub(crate) fn notify(&self, message: &str) {
        let event = sse::event(&self.shared.fake.script(), "message", message);
        for session in locked(&self.shared.sessions).values() {
            if let Some(events) = &session.events {
                let _hung_up = events.send(act::text(event.clone()));
            }
        }
    }

    /// Says that the list has changed: on every open event stream, and to every subscription.
    pub(crate) fn list_changed(&self) {
        self.notify(r#"{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}"#);
        self.shared.fake.tell_of_a_change();
    }

    /// Stops; the address can be bound again at once.
    pub(crate) async fn stop(self) {
        tokio::task::spawn_blocking(|| drop(self)).await.expect("stopping does not panic");
    }

    /// Serves until the process ends.
    pub(crate) fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Serves in a thread of its own until it is stopped; `accepted` is called for each connection.
fn listen<H, T, S>(
    listener: TcpListener,
    service: HandlerService<H, T, S>,
    stop: CancellationToken,
    mut accepted: impl FnMut() + Send + 'static,
) -> JoinHandle<()>
where
    H: Handler<T, S>,
    T: Send + 'static,
    S: Clone + Send + Sync + 'static,
{
    listener.set_nonblocking(true).expect("a fresh socket takes options");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("threads can be had");
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("the socket does not block");
            let listener = listener.tap_io(move |stream| {
                accepted();
                stream.set_nodelay(true).unwrap_or_default();
            });
            let serving = axum::serve(listener, service.into_make_service()).into_future();
            tokio::select! {
                _ = serving => {}
                () = stop.cancelled() => {}
            }
        });
    })
}

/// Loopback, any free port.
pub(crate) fn anywhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

/// Data under these locks stays whole at every step, so a panic elsewhere does not spoil it.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn say(to: &mut impl Write, text: &str) {
    let _closed = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}
