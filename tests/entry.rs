//! The way in: slow, greedy and absent clients are cut, everybody else is answered, and a stop finishes what it should.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use clap::Parser;
use futures_util::{StreamExt, stream};
use portolan::config::{Cli, Entry};
use portolan::serve::{Full, serve};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::harness::{
    Database, FakeProgram, PATIENCE, Portolan, Script, client, eventually, fake_mcp, processes_naming,
};
use crate::process::{Program, command};

/// A limit that does not matter.
const NEVER: Duration = Duration::from_secs(3600);
/// The limit under test, and how fast what is slow drips.
const SHORT: Duration = Duration::from_millis(500);
const DRIP: Duration = Duration::from_millis(50);

const HEALTH: &str = "GET /v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n";
/// Sends its body, `{}`, when it is told to.
const CAREFUL: &str = "POST /v1/mcp-servers/ HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
    expect: 100-continue\r\ncontent-length: 2\r\n\r\n";
/// More than a megabyte.
const BIG: &str = "GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// A client that does on its connection what it is told.
struct Caller {
    socket: TcpStream,
    /// Read beyond the last answer.
    rest: Vec<u8>,
}

impl Caller {
    async fn at(url: &str) -> Self {
        let socket = TcpStream::connect(url.trim_start_matches("http://")).await.expect("it listens");
        Self { socket, rest: Vec::new() }
    }

    async fn to(portolan: &Portolan) -> Self {
        Self::at(&portolan.url("")).await
    }

    /// With a buffer so small that what it does not read stays with its sender.
    async fn cramped(url: &str) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 * 1024).unwrap();
        let address: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
        Self { socket: socket.connect(address).await.expect("it listens"), rest: Vec::new() }
    }

    async fn send(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).await.expect("the connection is open");
    }

    /// Sends bytes until the connection breaks, or all are sent.
    async fn drip(&mut self, text: &str) {
        for byte in text.as_bytes() {
            if self.socket.write_all(&[*byte]).await.is_err() {
                return;
            }
            sleep(DRIP).await;
        }
    }

    /// The next answer: its status, its head in small letters, its body.
    async fn answer(&mut self) -> (u16, String, Vec<u8>) {
        timeout(PATIENCE, self.read_answer()).await.expect("an answer comes in time")
    }

    async fn read_answer(&mut self) -> (u16, String, Vec<u8>) {
        let end = self.until(b"\r\n\r\n").await;
        let head = String::from_utf8(self.rest.drain(..end).collect()).unwrap().to_ascii_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length =
            head.split("content-length: ").nth(1).map(|rest| rest.split('\r').next().unwrap().parse().unwrap());
        let end = match length {
            Some(length) => {
                while self.rest.len() < length {
                    self.read().await;
                }
                length
            }
            None => self.until(b"0\r\n\r\n").await,
        };
        (status, head, self.rest.drain(..end).collect())
    }

    async fn until(&mut self, end: &[u8]) -> usize {
        loop {
            if let Some(at) = self.rest.windows(end.len()).position(|bytes| bytes == end) {
                return at + end.len();
            }
            self.read().await;
        }
    }

    async fn read(&mut self) {
        let read = self.socket.read_buf(&mut self.rest).await.expect("the connection is whole");
        assert_ne!(read, 0, "ended after {:?}", String::from_utf8_lossy(&self.rest));
    }

    async fn is_answered(&mut self) {
        self.send(HEALTH).await;
        assert_eq!(self.answer().await.0, 200);
    }

    /// Everything that comes until the connection ends, however it ends.
    async fn end(mut self) -> String {
        let reading = async { while self.socket.read_buf(&mut self.rest).await.is_ok_and(|read| read > 0) {} };
        timeout(PATIENCE, reading).await.expect("the connection ends in time");
        String::from_utf8_lossy(&self.rest).into_owned()
    }

    /// Waits, reading nothing, until the connection is gone.
    async fn is_reset(&mut self) {
        eventually(
            "the connection is reset",
            || matches!(self.socket.try_write(b"G"), Err(error) if error.kind() != std::io::ErrorKind::WouldBlock),
        )
        .await;
    }
}

fn entry(change: impl FnOnce(&mut Entry)) -> Entry {
    let mut entry = Cli::parse_from(["portolan"]).settings.entry;
    change(&mut entry);
    entry
}

/// A router of the test's own behind the real way in.
struct Served {
    url: String,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl Served {
    async fn start(router: Router, entry: Entry) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone();
        let serving = tokio::spawn(async move { serve(listener, router, &entry, Default::default(), stop).await });
        Self { url, shutdown, serving }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        timeout(PATIENCE, self.serving).await.expect("it stops in time").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_come_in_time_on_a_new_connection_and_on_a_kept_one() {
    let portolan = Portolan::start_with(|settings| {
        settings.entry.header_timeout = SHORT;
        settings.entry.keep_alive_timeout = NEVER;
    })
    .await;
    let silent = Caller::to(&portolan).await;
    let mut slow = Caller::to(&portolan).await;
    let mut kept = Caller::to(&portolan).await;
    kept.is_answered().await;
    let head = format!("GET /v1/health HTTP/1.1\r\nhost: localhost\r\nx: {}", "a".repeat(1000));
    let (_, (), ()) = tokio::join!(
        async { assert_eq!(silent.end().await, "") },
        async {
            slow.drip(&head).await;
            assert_eq!(slow.end().await, "");
        },
        async {
            for _ in 0..20 {
                Caller::to(&portolan).await.is_answered().await;
                sleep(DRIP).await;
            }
        }
    );
    // Idle for longer than a header may take, and then quick.
    let (first, second) = HEALTH.split_at(9);
    kept.send(first).await;
    sleep(DRIP).await;
    kept.send(second).await;
    assert_eq!(kept.answer().await.0, 200);
    kept.drip(&head).await;
    assert_eq!(kept.end().await, "", "a later request has no more time");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_kept_for_its_time_and_closed_after_it() {
    let portolan = Portolan::start_with(|settings| {
        settings.entry.header_timeout = NEVER;
        settings.entry.keep_alive_timeout = Duration::from_secs(1);
    })
    .await;
    let mut caller = Caller::to(&portolan).await;
    caller.is_answered().await;
    for _ in 0..3 {
        sleep(SHORT).await;
        caller.is_answered().await;
    }
    assert_eq!(caller.end().await, "");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_drips_is_given_up_and_one_that_flows_is_not() {
    let portolan = Portolan::start_with(|settings| settings.entry.body_timeout = SHORT).await;
    let head = |length: usize| {
        format!(
            "POST /v1/mcp-servers/ HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    let mut dripping = Caller::to(&portolan).await;
    dripping.send(&head(10_000)).await;
    let mut stopping = Caller::to(&portolan).await;
    stopping.send(&head(500_000)).await;
    stopping.send(&" ".repeat(400_000)).await;
    let mut flowing = Caller::to(&portolan).await;
    flowing.send(&head(12 * 8192 + 2)).await;
    tokio::join!(
        async {
            dripping.drip(&" ".repeat(200)).await;
            let end = dripping.end().await;
            assert!(end.starts_with("HTTP/1.1 400") && end.contains("body_incomplete"), "{end}");
        },
        async {
            let end = stopping.end().await;
            assert!(
                end.starts_with("HTTP/1.1 400") && end.contains("body_incomplete"),
                "what was quick buys no rest: {end}"
            );
        },
        async {
            for _ in 0..12 {
                flowing.send(&" ".repeat(8192)).await;
                sleep(DRIP * 3).await;
            }
            flowing.send("{}").await;
            let (status, _, body) = flowing.answer().await;
            assert_eq!(status, 422, "it was read to its end: {}", String::from_utf8_lossy(&body));
            flowing.is_answered().await;
        },
    );
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_cut_and_a_slow_reader_is_not() {
    let portolan = Portolan::start_with(|settings| settings.entry.write_timeout = SHORT).await;
    let mut deaf = Caller::cramped(&portolan.url("")).await;
    deaf.send(&BIG.repeat(20)).await;
    let mut slow = Caller::cramped(&portolan.url("")).await;
    slow.send(BIG).await;
    tokio::join!(deaf.is_reset(), async {
        let started = Instant::now();
        let end = slow.until(b"\r\n\r\n").await;
        let head = String::from_utf8(slow.rest[..end].to_vec()).unwrap();
        let length: usize = head.split("content-length: ").nth(1).unwrap().split('\r').next().unwrap().parse().unwrap();
        while slow.rest.len() < end + length {
            slow.read().await;
            sleep(Duration::from_millis(10)).await;
        }
        assert!(started.elapsed() > SHORT, "it took longer than a silence may");
        slow.rest.clear();
        slow.is_answered().await;
    });
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_have_a_number_and_a_size() {
    let portolan = Portolan::start().await;
    let fields = |count: usize| {
        let fields: String = (1..count).map(|number| format!("x-{number}: v\r\n")).collect();
        format!("GET /v1/health HTTP/1.1\r\nhost: localhost\r\n{fields}\r\n")
    };
    let sized =
        |bytes: usize| format!("GET /v1/health HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "v".repeat(bytes));
    for (request, status) in [
        (fields(100), 200),
        (fields(101), 431),
        (sized(31 * 1024), 200),
        (sized(33 * 1024), 431),
        // Most of it was not read when the answer is sent, and the answer arrives all the same.
        (sized(3 * 1024 * 1024), 431),
    ] {
        let mut caller = Caller::to(&portolan).await;
        caller.send(&request).await;
        assert_eq!(caller.answer().await.0, status);
        if status == 200 {
            caller.is_answered().await;
        } else {
            assert_eq!(caller.end().await, "");
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_head_that_comes_early_has_no_more_time_than_another() {
    let (say, words) = mpsc::unbounded_channel();
    let limits = entry(|entry| {
        entry.header_timeout = SHORT;
        entry.keep_alive_timeout = NEVER;
    });
    let served = Served::start(router(words), limits).await;
    const FULL: &str = "GET /full HTTP/1.1\r\n\r\n";
    // With the request before it, and while that one is answered.
    let mut together = Caller::at(&served.url).await;
    together.send(&format!("{FULL}{FULL}GET /fu")).await;
    for _ in 0..2 {
        assert_eq!(together.answer().await.0, 200);
    }
    let mut between = Caller::at(&served.url).await;
    between.send("GET /work HTTP/1.1\r\n\r\n").await;
    sleep(DRIP).await;
    between.send("GET /fu").await;
    sleep(DRIP).await;
    say.send("done").unwrap();
    assert_eq!(between.answer().await.0, 200);
    let mut idle = Caller::at(&served.url).await;
    idle.send(&format!("{FULL}{FULL}")).await;
    for _ in 0..2 {
        assert_eq!(idle.answer().await.0, 200);
    }
    assert_eq!(together.end().await, "");
    assert_eq!(between.end().await, "");
    sleep(SHORT).await;
    idle.send(FULL).await;
    assert_eq!(idle.answer().await.0, 200, "without such a half it is idle");
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_clients_heads_alone_and_careful_senders_are_answered() {
    let portolan = Portolan::start().await;
    let mut old = Caller::to(&portolan).await;
    old.send("GET /v1/health HTTP/1.0\r\n\r\n").await;
    let end = old.end().await;
    assert!(end.starts_with("HTTP/1.0 200") && end.ends_with('}'), "{end}");
    let mut head = Caller::to(&portolan).await;
    head.send(&HEALTH.replace("GET", "HEAD")).await;
    let end = head.until(b"\r\n\r\n").await;
    assert!(head.rest.starts_with(b"HTTP/1.1 200"));
    head.rest.drain(..end);
    head.is_answered().await;
    let mut careful = Caller::to(&portolan).await;
    careful.send(CAREFUL).await;
    let end = careful.until(b"\r\n\r\n").await;
    assert_eq!(String::from_utf8(careful.rest.drain(..end).collect()).unwrap(), "HTTP/1.1 100 Continue\r\n\r\n");
    careful.send("{}").await;
    assert_eq!(careful.answer().await.0, 422);
    careful.is_answered().await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_share_a_room_and_small_ones_need_none() {
    const PART: usize = 600_000;
    let portolan = Portolan::start_with(|settings| {
        settings.entry.max_body_bytes_in_flight = 1_000_000;
        settings.entry.body_timeout = NEVER;
    })
    .await;
    let upload = async || {
        let mut caller = Caller::to(&portolan).await;
        let head =
            "POST /v1/mcp-servers/ HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length:";
        caller.send(&format!("{head} {}\r\n\r\n", PART + 2)).await;
        caller.send(&" ".repeat(PART)).await;
        caller
    };
    let (mut one, mut other) = (upload().await, upload().await);
    // Whoever is the second to be read.
    let ((status, head, body), mut first) = tokio::select! {
        refused = one.answer() => (refused, other),
        refused = other.answer() => (refused, one),
    };
    assert_eq!(status, 503);
    assert!(head.contains("retry-after: 1"), "{head}");
    assert!(String::from_utf8_lossy(&body).contains("overloaded"));
    portolan.post("/v1/mcp-servers/", &json!({})).await.expect(422);
    first.send("{}").await;
    assert_eq!(first.answer().await.0, 422, "it was read to its end");
    first.is_answered().await;
    for _ in 0..5 {
        let mut next = upload().await;
        next.send("{}").await;
        assert_eq!(next.answer().await.0, 422, "its room is free again");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_shows_of_a_path_what_its_route_says_and_ids() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let log = folder.path().join("log");
    let mut start = command(folder.path(), database.url().as_deref());
    start.args(["--log", "debug"]).stderr(std::fs::File::create(&log).unwrap());
    let mut program = Program::start(start);
    let mut caller = Caller::at(&program.url).await;
    let known = "v1/mcp-servers/mcp_server-9faa85df-8741-4948-8341-e23da3699097/tools";
    let foreign = "v1/mcp-servers/sk-something/tools";
    for path in [known.to_owned(), foreign.to_owned(), "short/path".to_owned(), "x".repeat(20_000)] {
        caller.send(&format!("GET /{path} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await;
        assert_eq!(caller.answer().await.0, 404);
    }
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    let text = std::fs::read_to_string(&log).unwrap();
    for shown in
        [&format!("http.path=/{known}"), "http.path=/v1/mcp-servers/{mcp_server_id}/tools", "http.path=(unknown)"]
    {
        assert!(text.contains(shown), "{shown}: {text}");
    }
    assert!(!text.contains("sk-something") && !text.contains("short/path") && !text.contains("xxx"), "{text}");
    database.remove().await;
}

/// Runs of one tool, from the moment when the server has all of them.
async fn runs(portolan: &Portolan, tool: &str, args: Value, count: usize) -> JoinSet<Value> {
    let (server, script) = portolan.create_stdio("upstream", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let path = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, tool).await);
    let mut runs = JoinSet::new();
    for _ in 0..count {
        let run = portolan.request("POST", &path).json(&json!({ "args": args })).send();
        runs.spawn(async move { run.await.expect("it is answered").json().await.expect("completely") });
    }
    eventually("all runs are under way", || {
        script.methods().iter().filter(|method| *method == "tools/call").count() == count
    })
    .await;
    runs
}

/// What is under way ends, or waits, a moment after its client knows.
async fn has_room(portolan: &Portolan) {
    let deadline = Instant::now() + PATIENCE;
    while portolan.get("/v1/mcp-servers").await.status != 200 {
        assert!(Instant::now() < deadline, "there is no room");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_too_many_is_refused_and_health_answers() {
    let portolan = Portolan::start_with(|settings| {
        settings.entry.max_requests = 4;
        settings.entry.body_timeout = NEVER;
        settings.entry.write_timeout = NEVER;
    })
    .await;
    let mut begun = Caller::to(&portolan).await;
    let head = "POST /v1/mcp-servers/ HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n";
    begun.send(&format!("{head}{{")).await;
    let mut runs = runs(&portolan, "never", json!({}), 4).await;
    for path in ["/v1/mcp-servers", "/v1/mcp-servers/x/tools/", "/openapi.yaml", "/docs"] {
        let answer = portolan.get(path).await;
        assert_eq!((answer.header("retry-after"), answer.header("x-should-retry")), (Some("1"), None));
        assert_eq!(answer.expect(503)["code"], "overloaded");
    }
    for path in ["/v1/health", "/v1/health/", "/v1/ready", "/v1/ready/"] {
        portolan.get(path).await.expect(200);
    }
    // The answer arrives, although nobody reads this body.
    let refused = portolan.post("/v1/mcp-servers/", &json!({"x": "v".repeat(8 * 1024 * 1024)})).await;
    assert_eq!(refused.expect(503)["code"], "overloaded");
    let mut careful = Caller::to(&portolan).await;
    careful.send(CAREFUL).await;
    assert_eq!(careful.answer().await.0, 503, "it is not told to go on");
    assert_eq!(careful.end().await, "");
    // While its body was waited for others took all places.
    begun.send("}").await;
    let (status, head, body) = begun.answer().await;
    assert_eq!((status, head.contains("retry-after: 1")), (503, true));
    assert!(String::from_utf8_lossy(&body).contains("overloaded"));
    // Their callers leave.
    runs.shutdown().await;
    has_room(&portolan).await;
    begun.send(CAREFUL).await;
    begun.until(b"100 Continue\r\n\r\n").await;
    begun.rest.clear();
    begun.send("{}").await;
    assert_eq!(begun.answer().await.0, 422, "the same connection is served again");
    // Those who keep Portolan waiting are not counted.
    let mut waiting = Vec::new();
    for _ in 0..6 {
        let mut caller = Caller::to(&portolan).await;
        caller
            .send("POST /v1/mcp-servers/ HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{")
            .await;
        waiting.push(caller);
    }
    for _ in 0..6 {
        let mut caller = Caller::cramped(&portolan.url("")).await;
        caller.send(&BIG.repeat(10)).await;
        waiting.push(caller);
    }
    has_room(&portolan).await;
    waiting[0].send("}").await;
    assert_eq!(waiting[0].answer().await.0, 422, "and are served when they go on");
    drop(waiting);
    portolan.stop().await;
}

/// `/work` waits for a word, `/lines` streams words, `/events` streams events for ever.
fn router(words: mpsc::UnboundedReceiver<&'static str>) -> Router {
    let words = std::sync::Arc::new(tokio::sync::Mutex::new(words));
    let (one, many) = (words.clone(), words);
    let bytes = |text: &'static str| Ok::<_, std::convert::Infallible>(Bytes::from_static(text.as_bytes()));
    let endless = move |text: &'static str, pause: Duration| {
        Body::from_stream(stream::unfold((), move |()| async move {
            sleep(pause).await;
            Some((bytes(text), ()))
        }))
    };
    const LOUD: &str = match std::str::from_utf8(&[b'e'; 65536]) {
        Ok(text) => text,
        Err(_) => "",
    };
    let events = |body| ([(CONTENT_TYPE, "text/event-stream; charset=utf-8")], body);
    Router::new()
        .route("/work", get(async move || one.lock().await.recv().await.unwrap()))
        .route(
            "/lines",
            get(async move || {
                let words = many.lock_owned().await;
                let words = stream::unfold(words, |mut words| async move { Some((words.recv().await?, words)) });
                Body::from_stream(words.map(bytes))
            }),
        )
        .route("/events", get(async move || events(endless("data: x\n\n", DRIP))))
        .route("/loud", get(async move || events(endless(LOUD, Duration::ZERO))))
        .route("/full", get(async |full: Option<axum::Extension<Full>>| full.is_some().to_string()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_in_flight_until_its_answer_is_sent() {
    let (say, words) = mpsc::unbounded_channel();
    let served = Served::start(router(words), entry(|entry| entry.max_requests = 1)).await;
    let mut asking = Caller::at(&served.url).await;
    let mut full = async || {
        asking.send("GET /full HTTP/1.1\r\n\r\n").await;
        String::from_utf8(asking.answer().await.2).unwrap()
    };
    assert_eq!(full().await, "false");
    let mut streaming = Caller::at(&served.url).await;
    streaming.send("GET /lines HTTP/1.1\r\n\r\n").await;
    streaming.until(b"\r\n\r\n").await;
    assert_eq!(full().await, "true");
    say.send("a word").unwrap();
    streaming.until(b"a word").await;
    assert_eq!(full().await, "true");
    drop(say);
    streaming.until(b"0\r\n\r\n").await;
    // The client may have read the end before its sender knows.
    let deadline = Instant::now() + PATIENCE;
    while full().await == "true" {
        assert!(Instant::now() < deadline);
    }
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_idle_longest_makes_room_for_the_next() {
    let portolan = Portolan::start_with(|settings| settings.entry.max_connections = 3).await;
    let mut oldest = Caller::to(&portolan).await;
    oldest.is_answered().await;
    sleep(SHORT).await;
    let mut older = Caller::to(&portolan).await;
    older.is_answered().await;
    let mut old = Caller::to(&portolan).await;
    old.is_answered().await;
    oldest.is_answered().await;
    // It has sent half a header, and now waits longest of all.
    let mut slow = older;
    slow.send("GET /v1/hea").await;
    sleep(SHORT).await;
    oldest.is_answered().await;
    old.is_answered().await;
    let mut next = Caller::to(&portolan).await;
    next.is_answered().await;
    assert_eq!(slow.end().await, "");
    for caller in [&mut oldest, &mut old, &mut next] {
        caller.is_answered().await;
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_who_is_being_served_makes_room() {
    let portolan = Portolan::start_with(|settings| settings.entry.max_connections = 3).await;
    // The harness asks over connections of its own.
    let mut runs = runs(&portolan, "slow", json!({"ms": 1500}), 3).await;
    let mut next = Caller::to(&portolan).await;
    next.send(HEALTH).await;
    let first = tokio::select! {
        biased;
        run = runs.join_next() => run.unwrap().unwrap(),
        _ = next.answer() => panic!("all places are taken"),
    };
    assert_eq!(first["func_return"], "done");
    assert_eq!(next.answer().await.0, 200);
    for run in runs.join_all().await {
        assert_eq!(run["func_return"], "done");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_finishes_answers_and_waits_neither_for_the_idle_nor_for_events() {
    let (say, words) = mpsc::unbounded_channel();
    let served = Served::start(router(words), entry(|entry| entry.drain_timeout = NEVER)).await;
    let call = async |path: &str| {
        let mut caller = Caller::cramped(&served.url).await;
        caller.send(&format!("GET {path} HTTP/1.1\r\n\r\n")).await;
        caller
    };
    let mut idle = call("/full").await;
    assert_eq!(idle.answer().await.0, 200);
    let fresh = Caller::at(&served.url).await;
    let mut half = Caller::at(&served.url).await;
    half.send("GET /ful").await;
    let mut events = call("/events").await;
    events.until(b"data: x").await;
    let mut unread = call("/loud").await;
    unread.until(b"\r\n\r\n").await;
    let mut lines = call("/lines").await;
    lines.until(b"\r\n\r\n").await;
    say.send("before").unwrap();
    lines.until(b"before").await;
    served.shutdown.cancel();
    for gone in [idle, fresh, half] {
        assert_eq!(gone.end().await, "");
    }
    let end = events.end().await;
    assert!(end.ends_with("0\r\n\r\n"), "events end in order: {end}");
    unread.is_reset().await;
    assert!(!served.serving.is_finished(), "one answer is not complete");
    say.send("after").unwrap();
    drop(say);
    let end = lines.end().await;
    assert!(end.contains("after") && end.ends_with("0\r\n\r\n"), "{end}");
    assert!(TcpStream::connect(served.url.trim_start_matches("http://")).await.is_err());
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_cuts_what_is_not_finished_in_time() {
    let (_say, words) = mpsc::unbounded_channel();
    let served = Served::start(router(words), entry(|entry| entry.drain_timeout = SHORT)).await;
    let mut working = Caller::at(&served.url).await;
    working.send("GET /work HTTP/1.1\r\n\r\n").await;
    let mut other = Caller::at(&served.url).await;
    other.send("GET /full HTTP/1.1\r\n\r\n").await;
    assert_eq!(other.answer().await.0, 200);
    served.stop().await;
    assert_eq!(working.end().await, "");
}

/// A server of the fake with the tool `slow`, registered at a running program: the URL of its run.
async fn register(client: &reqwest::Client, url: &str, name: &str, script: &std::path::Path) -> String {
    register_as(client, url, name, json!({"command": fake_mcp(), "args": ["stdio", script]})).await
}

async fn register_as(client: &reqwest::Client, url: &str, name: &str, config: Value) -> String {
    let body = json!({"server_name": name, "config": config});
    let server: Value =
        client.post(format!("{url}/v1/mcp-servers")).json(&body).send().await.unwrap().json().await.unwrap();
    let tools = format!("{url}/v1/mcp-servers/{}/tools", server["id"].as_str().unwrap());
    let listed: Value = client.get(&tools).send().await.unwrap().json().await.unwrap();
    let slow = listed.as_array().unwrap().iter().find(|tool| tool["name"] == "slow").unwrap();
    format!("{tools}/{}/run", slow["id"].as_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_calls_outlive_a_stop() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut start = command(folder.path(), database.url().as_deref());
    start.env("PORTOLAN_EARLY_HEAD_AFTER", "1s");
    let mut program = Program::start(start);
    let client = client();
    // Servers elsewhere: a stream of news and one of answers are open all the time.
    let elsewhere = tempfile::tempdir().unwrap();
    let news = Script::new(elsewhere.path(), &json!({"list_changed": true, "get_stream": true}));
    let events = Script::new(elsewhere.path(), &json!({}));
    let remotes = [FakeProgram::start("http", &news, None), FakeProgram::start("sse", &events, None)];
    let mut dripping = Vec::new();
    for (remote, kind) in remotes.iter().zip(["streamable_http", "sse"]) {
        let config = json!({"mcp_server_type": kind, "server_url": remote.url});
        let run = register_as(&client, &program.url, kind, config).await;
        for _ in 0..5 {
            // Its head is there when it drips.
            let run = client.post(&run).json(&json!({"args": {"ms": 8000}})).send();
            dripping.push(tokio::spawn(run));
        }
    }
    let mut runs = JoinSet::new();
    let mut scripts = Vec::new();
    for number in 0..10 {
        let script = crate::harness::scripts(folder.path()).join(format!("{number}.json"));
        std::fs::write(&script, "{}").unwrap();
        let run = register(&client, &program.url, &format!("server {number}"), &script).await;
        scripts.push(script);
        for _ in 0..10 {
            runs.spawn(client.post(&run).json(&json!({"args": {"ms": 5000}})).send());
        }
    }
    let mut bystanders = Vec::new();
    for text in ["", "GET /v1/hea", HEALTH].into_iter().cycle().take(30) {
        let mut bystander = Caller::at(&program.url).await;
        bystander.send(text).await;
        bystanders.push(bystander);
    }
    eventually("all calls are under way", || {
        let calls = |script| std::fs::read_to_string(format!("{}.log", std::path::Path::display(script)));
        scripts.iter().all(|script| calls(script).unwrap_or_default().matches("tools/call").count() == 10)
    })
    .await;
    let mut heads = Vec::new();
    for run in dripping {
        heads.push(run.await.unwrap().expect("its head comes early"));
    }
    program.signal("-TERM");
    let signalled = Instant::now();
    for head in heads {
        assert_eq!(head.status(), 200);
        let text = head.text().await.expect("completely");
        assert!(text.starts_with(' ') && text.contains("done"), "{text}");
    }
    let mut done = 0;
    while let Some(answer) = runs.join_next().await {
        let answer = answer.unwrap().expect("it is answered");
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.json::<Value>().await.expect("completely")["func_return"], "done");
        done += 1;
    }
    assert_eq!(done, 100);
    assert_eq!(program.exit_code(), Some(0));
    assert!(signalled.elapsed() < Duration::from_secs(25), "the drain time");
    assert_eq!(processes_naming(&folder.path().to_string_lossy()), Vec::<u32>::new());
    for bystander in bystanders {
        bystander.end().await;
    }
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_takes_the_children_along() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut program = Program::start(command(folder.path(), database.url().as_deref()));
    let client = client();
    let script = crate::harness::scripts(folder.path()).join("stubborn.json");
    std::fs::write(&script, json!({"stubborn": true}).to_string()).unwrap();
    let run = register(&client, &program.url, "stubborn", &script).await;
    let running = tokio::spawn(client.post(&run).json(&json!({"args": {"ms": 600_000}})).send());
    let calls = || std::fs::read_to_string(format!("{}.log", script.display())).unwrap_or_default();
    eventually("the call is under way", || calls().contains("tools/call")).await;
    let named = folder.path().to_string_lossy().into_owned();
    assert_eq!(processes_naming(&named).len(), 1);
    program.signal("-TERM");
    // It is stopping when it takes no more connections.
    eventually("it stops", || std::net::TcpStream::connect(program.url.trim_start_matches("http://")).is_err()).await;
    assert!(program.child.try_wait().unwrap().is_none(), "it waits for the call");
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(1));
    assert!(running.await.unwrap().is_err(), "the call is cut");
    eventually("the child is gone", || processes_naming(&named).is_empty()).await;
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn few_files_mean_few_connections_and_still_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let log = folder.path().join("log");
    let mut start = std::process::Command::new("/bin/sh");
    start.args(["-c", "ulimit -n 100 && exec \"$0\"", env!("CARGO_BIN_EXE_portolan")]);
    let plain = command(folder.path(), database.url().as_deref());
    start.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?)))).current_dir(folder.path());
    let mut program = Program::start({
        start.stderr(Stdio::from(std::fs::File::create(&log).unwrap()));
        start
    });
    let mut callers = Vec::new();
    for _ in 0..200 {
        let mut caller = Caller::at(&program.url).await;
        caller.is_answered().await;
        callers.push(caller);
    }
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("wanted=8192") && text.contains("taken=50"), "{text}");
    callers.last_mut().unwrap().is_answered().await;
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_files_it_waits_and_goes_on_when_there_are_some() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let log = folder.path().join("log");
    let mut start = command(folder.path(), database.url().as_deref());
    start.stderr(std::fs::File::create(&log).unwrap());
    let mut program = Program::start(start);
    let mut kept = Caller::at(&program.url).await;
    kept.is_answered().await;
    let pid = Pid::from_raw(i32::try_from(program.child.id()).unwrap());
    let files = std::fs::read_dir(format!("/proc/{}/fd", program.child.id())).unwrap().count() as u64;
    let limit = |current| Rlimit { current: Some(current), maximum: getrlimit(Resource::Nofile).maximum };
    let usual = prlimit(pid, Resource::Nofile, limit(files)).unwrap();
    let mut next = Caller::at(&program.url).await;
    next.send(HEALTH).await;
    let mut another = Caller::at(&program.url).await;
    another.send(HEALTH).await;
    eventually("it complains", || std::fs::read_to_string(&log).unwrap().contains("cannot accept a connection")).await;
    // The idle connection's file is the next one's.
    let first = tokio::select! {
        _ = next.answer() => &mut another,
        _ = another.answer() => &mut next,
    };
    assert_eq!(kept.end().await, "");
    prlimit(pid, Resource::Nofile, usual).unwrap();
    assert_eq!(first.answer().await.0, 200);
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    database.remove().await;
}

/// Clients that are slow with their headers, with their bodies and with reading, as many as `count`; beside them, everybody
/// else is answered, and all of the slow are cut.
async fn crowd(count: usize) {
    let limits = getrlimit(Resource::Nofile);
    if limits.current.is_some_and(|current| current < 2 * count as u64) {
        setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits }).expect("up to the maximum it may");
    }
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut start = command(folder.path(), database.url().as_deref());
    start.args(["--header-timeout", "3s", "--body-timeout", "3s", "--write-timeout", "3s"]);
    // Fewer than those who are slow with a body, or with reading.
    start.args(["--max-requests", &(count / 4).to_string()]);
    let mut program = Program::start(start);
    let client = client();
    let script = crate::harness::scripts(folder.path()).join("script.json");
    std::fs::write(&script, "{}").unwrap();
    let run = register(&client, &program.url, "beside", &script).await;
    let mut slow = JoinSet::new();
    for number in 0..count {
        let mut caller = Caller::cramped(&program.url).await;
        slow.spawn(async move {
            let drip = match number % 3 {
                0 => "GET /v1/mcp-servers HTTP/1.1\r\nhost: localhost\r\nx: ",
                1 => "POST /v1/mcp-servers HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99999\r\n\r\n",
                _ => {
                    let _ = caller.socket.write_all(BIG.repeat(20).as_bytes()).await;
                    // What has arrived can be read after the cut, too: only a write tells.
                    while caller.socket.read_u8().await.is_ok() && caller.socket.write_all(b"G").await.is_ok() {
                        sleep(Duration::from_secs(1)).await;
                    }
                    return;
                }
            };
            let _ = caller.socket.write_all(drip.as_bytes()).await;
            let (mut reader, mut writer) = caller.socket.into_split();
            let dripping = async {
                while writer.write_all(b"x").await.is_ok() {
                    sleep(Duration::from_millis(500)).await;
                }
            };
            let mut answer = Vec::new();
            tokio::select! {
                () = dripping => {}
                _ = reader.read_to_end(&mut answer) => {}
            }
        });
    }
    let servers = format!("{}/v1/mcp-servers", program.url);
    let deadline = Instant::now() + 6 * PATIENCE;
    let mut answered = 0;
    while !slow.is_empty() || answered < 20 {
        assert!(Instant::now() < deadline, "{} slow clients are not cut", slow.len());
        let [listed, called] =
            [client.get(&servers), client.post(&run).json(&json!({"args": {"ms": 1}}))].map(|request| {
                // On a connection of its own.
                timeout(PATIENCE, request.header("connection", "close").send())
            });
        let (listed, called) = tokio::join!(listed, called);
        assert_eq!(listed.expect("in time").unwrap().status(), 200);
        let called: Value = called.expect("in time").unwrap().json().await.unwrap();
        assert_eq!(called["func_return"], "done");
        answered += 1;
        while slow.try_join_next().is_some() {}
    }
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_hundred_slow_clients_keep_nobody_from_being_answered() {
    crowd(400).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: tests/run --full"]
async fn four_thousand_slow_clients_keep_nobody_from_being_answered() {
    crowd(4000).await;
}
