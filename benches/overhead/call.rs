//! Everything that is timed: one kind of call each, over a connection or session of its own, its answer checked.
//!
//! HTTP is written and read by hand, one write and usually one read per request: the less a caller costs, the more of the time is
//! the server's. It knows what the servers here send, and fails at anything else.

use std::net::SocketAddr;

use rmcp::model::CallToolRequestParams;
use rmcp::service::{Peer, RoleClient};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout};

use super::portolan::Registered;

/// A kept HTTP/1.1 connection.
pub(crate) struct Connection {
    stream: TcpStream,
    address: SocketAddr,
    /// Sent with every request; each line ends in CR LF.
    pub(crate) fields: String,
    written: Vec<u8>,
    read: Vec<u8>,
}

pub(crate) struct Answer<'a> {
    head: &'a str,
    pub(crate) body: &'a [u8],
}

impl Answer<'_> {
    pub(crate) fn status(&self) -> &str {
        self.head.get(9..12).expect("a status line")
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        field(self.head, name)
    }
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let fields = head.split("\r\n").skip(1).filter_map(|line| line.split_once(": "));
    fields.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the server listens");
        stream.set_nodelay(true).expect("a fresh socket takes options");
        Self { stream, address, fields: String::new(), written: Vec::new(), read: Vec::new() }
    }

    pub(crate) async fn send(&mut self, method: &str, path: &str, body: &str) {
        self.written.clear();
        let (address, fields, length) = (self.address, &self.fields, body.len());
        // An empty body is none: GET and DELETE.
        let kind = if body.is_empty() {
            String::new()
        } else {
            format!("content-type: application/json\r\ncontent-length: {length}\r\n")
        };
        self.written.extend_from_slice(
            format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\n{kind}{fields}\r\n{body}").as_bytes(),
        );
        self.stream.write_all(&self.written).await.expect("the connection is kept");
    }

    /// Reads until what is there satisfies `enough`.
    async fn read_until<T>(&mut self, enough: impl Fn(&[u8]) -> Option<T>) -> T {
        loop {
            if let Some(found) = enough(&self.read) {
                return found;
            }
            let read = self.stream.read_buf(&mut self.read).await.expect("the connection is kept");
            assert!(read > 0, "the server closed the connection: {:?}", String::from_utf8_lossy(&self.read));
        }
    }

    pub(crate) async fn exchange(&mut self, method: &str, path: &str, body: &str) -> Answer<'_> {
        self.read.clear();
        self.send(method, path, body).await;
        let head = self.read_until(|read| find(read, b"\r\n\r\n")).await;
        let text = std::str::from_utf8(&self.read[..head]).expect("a head is ASCII");
        let length = field(text, "content-length").map_or(0, |length| length.parse().expect("a length"));
        assert!(field(text, "transfer-encoding").is_none(), "a body of known length: {text}");
        let end = head + 4 + length;
        self.read_until(|read| (read.len() >= end).then_some(())).await;
        assert_eq!(self.read.len(), end, "one answer for one request");
        let head = std::str::from_utf8(&self.read[..head]).expect("checked above");
        Answer { head, body: &self.read[end - length..] }
    }

    /// The data of the next event of the stream that this connection has become.
    pub(crate) async fn event(&mut self) -> String {
        // The fake sends every event as one chunk.
        let end = self.read_until(|read| find(read, b"\n\n\r\n")).await;
        let rest = self.read.split_off(end + 4);
        let event = std::mem::replace(&mut self.read, rest);
        let data = find(&event, b"data: ").expect("an event has data") + 6;
        String::from_utf8(event[data..end].to_vec()).expect("JSON is UTF-8")
    }
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

/// One who calls, always the same way; the text it sends is another one each time.
pub(crate) struct Caller {
    way: Way,
    calls: usize,
}

enum Way {
    Health(Connection),
    Lookup(Connection, String),
    /// Each of these servers in turn.
    Retrieve(Connection, Vec<Registered>),
    /// The same.
    Run(Connection, Vec<String>),
    Direct(Peer<RoleClient>),
    Pipe(Box<Pipe>),
    Http(Connection),
    /// Where to post, and the stream that answers.
    Sse(Connection, String, Connection),
}

/// A prime that divides no number of servers: each one in turn, neighbours never.
const STRIDE: usize = 7919;

struct Pipe {
    _process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Caller {
    fn new(way: Way) -> Self {
        Self { way, calls: 0 }
    }

    pub(crate) fn health(connection: Connection) -> Self {
        Self::new(Way::Health(connection))
    }

    pub(crate) fn lookup(connection: Connection, registered: &Registered) -> Self {
        Self::new(Way::Lookup(connection, registered.tool_path()))
    }

    pub(crate) fn retrieve(connection: Connection, servers: Vec<Registered>) -> Self {
        Self::new(Way::Retrieve(connection, servers))
    }

    pub(crate) fn run(connection: Connection, registered: &Registered) -> Self {
        Self::runs(connection, std::slice::from_ref(registered))
    }

    pub(crate) fn runs(connection: Connection, servers: &[Registered]) -> Self {
        Self::new(Way::Run(connection, servers.iter().map(Registered::run_path).collect()))
    }

    pub(crate) fn direct(peer: Peer<RoleClient>) -> Self {
        Self::new(Way::Direct(peer))
    }

    pub(crate) fn pipe(mut process: Child) -> Self {
        let input = process.stdin.take().expect("a pipe was asked for");
        let output = BufReader::new(process.stdout.take().expect("a pipe was asked for"));
        Self::new(Way::Pipe(Box::new(Pipe { _process: process, input, output })))
    }

    pub(crate) fn http(connection: Connection) -> Self {
        Self::new(Way::Http(connection))
    }

    pub(crate) fn sse(post: Connection, path: String, events: Connection) -> Self {
        Self::new(Way::Sse(post, path, events))
    }

    /// Calls once; a wrong answer is the end.
    pub(crate) async fn call(&mut self) {
        self.calls += 1;
        let number = self.calls;
        let text = format!("hello {number}");
        match &mut self.way {
            Way::Health(connection) => {
                let answer = connection.exchange("GET", "/v1/health", "").await;
                expect(&answer, r#""status":"ok""#);
            }
            Way::Lookup(connection, path) => {
                let answer = connection.exchange("GET", path, "").await;
                expect(&answer, r#""name":"echo""#);
            }
            Way::Retrieve(connection, servers) => {
                let id = &servers[number * STRIDE % servers.len()].server;
                let answer = connection.exchange("GET", &format!("/v1/mcp-servers/{id}"), "").await;
                expect(&answer, id);
            }
            Way::Run(connection, paths) => {
                let path = &paths[number * STRIDE % paths.len()];
                let body = format!(r#"{{"args":{{"message":"{text}"}}}}"#);
                let answer = connection.exchange("POST", path, &body).await;
                expect(&answer, &format!(r#""status":"success","func_return":"{text}""#));
            }
            Way::Direct(peer) => {
                let arguments = [("message".to_owned(), Value::from(&*text))].into_iter().collect();
                let params = CallToolRequestParams::new("echo").with_arguments(arguments);
                let result = peer.call_tool(params).await.expect("the call succeeds");
                let answer = result.content.first().and_then(|block| block.as_text());
                assert_eq!(answer.map(|block| &*block.text), Some(&*text));
            }
            Way::Pipe(pipe) => {
                pipe.input.write_all((message(number, &text) + "\n").as_bytes()).await.expect("the fake reads");
                let mut line = String::with_capacity(128);
                pipe.output.read_line(&mut line).await.expect("the fake answers");
                assert!(line.contains(&result(number, &text)), "{line}");
            }
            Way::Http(connection) => {
                let answer = connection.exchange("POST", "/mcp", &message(number, &text)).await;
                expect(&answer, &result(number, &text));
            }
            Way::Sse(post, path, events) => {
                let answer = post.exchange("POST", path, &message(number, &text)).await;
                assert_eq!(answer.status(), "202");
                let event = events.event().await;
                assert!(event.contains(&result(number, &text)), "{event}");
            }
        }
    }
}

fn expect(answer: &Answer<'_>, part: &str) {
    let right = answer.status() == "200" && find(answer.body, part.as_bytes()).is_some();
    assert!(right, "expected {part}, got {} {}", answer.status(), String::from_utf8_lossy(answer.body));
}

fn message(id: usize, text: &str) -> String {
    format!(
        r#"{{"jsonrpc":"2.0","id":{id},"method":"tools/call","params":{{"name":"echo","arguments":{{"message":"{text}"}}}}}}"#
    )
}

fn result(id: usize, text: &str) -> String {
    format!(r#""id":{id},"result":{{"content":[{{"type":"text","text":"{text}"}}]"#)
}

/// The first message of a session.
pub(crate) fn initialize() -> String {
    let client = json!({ "name": "bench", "version": "0" });
    let params = json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client });
    json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params }).to_string()
}
