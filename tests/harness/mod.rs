//! A Portolan for one test, on the database the run is for, and the checks that every test makes.
//!
//! The database is SQLite in a temporary folder, or, with `PORTOLAN_TEST_POSTGRES_URL`, a fresh database of that server.
//! Every answer is held against `openapi.yaml`, and so is the body of every request that succeeds. [`Portolan::stop`] asserts that no child, session or task is left.

pub(crate) mod openapi;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Parser;
use portolan::app::{App, Unclean};
use portolan::config::{Cli, Settings};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// What a test waits at most for something that happens by itself.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What seals in the databases of tests, where PostgreSQL needs to be given one.
pub(crate) const KEY: &str = "dGVzdHMgYWxvbmUgc2VhbCB3aXRoIHRoaXMgb25lISE=";

pub(crate) struct Portolan {
    url: String,
    pub(crate) app: App,
    client: reqwest::Client,
    shutdown: CancellationToken,
    serving: Option<JoinHandle<Result<(), Unclean>>>,
    database: Database,
    folder: TempDir,
}

/// The database of one test; ended by [`Database::remove`].
pub(crate) struct Database {
    postgres: Option<(String, String)>,
    /// Another Portolan of the test removes it.
    is_borrowed: bool,
}

impl Database {
    pub(crate) async fn new() -> Self {
        let Ok(server) = std::env::var("PORTOLAN_TEST_POSTGRES_URL") else { return Self::none() };
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        let mut connection = PgConnection::connect(&server).await.expect("the test server takes connections");
        connection.execute(AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.expect("the test user may create");
        Self { postgres: Some((server, name)), is_borrowed: false }
    }

    /// SQLite, whatever the run is for.
    pub(crate) fn none() -> Self {
        Self { postgres: None, is_borrowed: false }
    }

    /// The same database for another Portolan, which ends before the one that has it.
    fn lent(&self) -> Self {
        Self { postgres: self.postgres.clone(), is_borrowed: true }
    }

    pub(crate) fn url(&self) -> Option<String> {
        let (server, name) = self.postgres.as_ref()?;
        let mut url = reqwest::Url::parse(server).expect("the test server's URL is one");
        url.set_path(name);
        Some(url.into())
    }

    pub(crate) async fn remove(self) {
        let Some((server, name)) = self.postgres.filter(|_| !self.is_borrowed) else { return };
        let mut connection = PgConnection::connect(&server).await.expect("the test server takes connections");
        let drop = AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"));
        connection.execute(drop).await.expect("the test user may drop");
    }
}

/// Settings as a command line of `arguments` gives them, but none of this process's environment.
pub(crate) fn settings(folder: &Path, database: &Database, change: impl FnOnce(&mut Settings)) -> Settings {
    let mut settings = Cli::parse_from(["portolan"]).settings;
    settings.storage.data_dir = folder.join("data");
    settings.storage.database_url = database.url().map(Into::into);
    // SQLite makes one.
    settings.secrets.key = database.url().map(|_| KEY.to_owned().into());
    settings.upstream.handshake_timeout = Duration::from_secs(10);
    settings.children.program = env!("CARGO_BIN_EXE_portolan").into();
    change(&mut settings);
    settings
}

impl Portolan {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Settings)) -> Self {
        Self::start_on(Database::new().await, change).await
    }

    /// Another Portolan that serves on the same database, with a data folder of its own; to be stopped before this one. `None`
    /// where the database is not shared.
    pub(crate) async fn replica(&self, change: impl FnOnce(&mut Settings)) -> Option<Self> {
        self.shares_its_database().then_some(())?;
        Some(Self::start_on(self.database.lent(), change).await)
    }

    async fn start_on(database: Database, change: impl FnOnce(&mut Settings)) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let settings = settings(folder.path(), &database, change);
        let app = App::open(settings).await.expect("Portolan starts");
        let client = client();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let shutdown = CancellationToken::new();
        let serving = Some(tokio::spawn(app.clone().serve(listener, shutdown.clone())));
        Self { url, app, client, shutdown, serving, database, folder }
    }

    /// Stops gracefully and starts again, with other settings, on what it kept.
    pub(crate) async fn reopen(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        self.shutdown.cancel();
        let serving = self.serving.take().expect("it serves");
        assert_eq!(serving.await.expect("it does not panic"), Ok(()));
        let settings = settings(self.folder.path(), &self.database, change);
        self.app = App::open(settings).await.expect("Portolan starts");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        self.url = format!("http://{}", listener.local_addr().expect("it is bound"));
        self.shutdown = CancellationToken::new();
        self.serving = Some(tokio::spawn(self.app.clone().serve(listener, self.shutdown.clone())));
        self
    }

    /// Whether other processes may use its database.
    pub(crate) fn shares_its_database(&self) -> bool {
        self.database.postgres.is_some()
    }

    /// The URL of its database, where that is not SQLite in its data folder.
    pub(crate) fn database_url(&self) -> Option<String> {
        self.database.url()
    }

    /// The inside of another Portolan on the same database; of this one where the database is not shared.
    pub(crate) async fn another(&self) -> App {
        self.another_with(|_| {}).await
    }

    /// The same with other settings.
    pub(crate) async fn another_with(&self, change: impl FnOnce(&mut Settings)) -> App {
        if !self.shares_its_database() {
            return self.app.clone();
        }
        let settings = settings(&self.folder.path().join("another"), &self.database, change);
        App::open(settings).await.expect("Portolan starts")
    }

    /// This Portolan with connections of its own.
    pub(crate) fn remote(&self) -> Remote {
        Remote::new(&self.url)
    }

    /// This Portolan with a token for each request.
    pub(crate) fn remote_with(&self, token: &str) -> Remote {
        Remote::with_token(&self.url, token)
    }

    /// The folder of everything that this test keeps on disk: what names it on its command line belongs to this test.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    pub(crate) fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method.parse().expect("a method"), self.url(path))
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, None).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, Some(body)).await
    }

    pub(crate) async fn patch(&self, path: &str, body: &Value) -> Answer {
        self.send("PATCH", path, Some(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, None).await
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(body);
        }
        Answer::of(method, path, request).await
    }

    /// Registers a server and returns its object.
    pub(crate) async fn create(&self, server_name: &str, config: Value) -> Value {
        let body = json!({ "server_name": server_name, "config": config });
        self.post("/v1/mcp-servers/", &body).await.expect(200)
    }

    pub(crate) async fn refresh(&self, id: &str) -> Answer {
        self.send("PATCH", &format!("/v1/mcp-servers/{id}/refresh"), None).await
    }

    pub(crate) async fn tools(&self, id: &str) -> Vec<Value> {
        let tools = self.get(&format!("/v1/mcp-servers/{id}/tools")).await.expect(200);
        tools.as_array().expect("a bare array").clone()
    }

    pub(crate) async fn tool_id(&self, id: &str, name: &str) -> String {
        let tools = self.tools(id).await;
        let tool = tools.iter().find(|tool| tool["name"] == name).unwrap_or_else(|| panic!("no tool {name}"));
        tool["id"].as_str().expect("an id").to_owned()
    }

    /// Runs a tool by its name and returns the answer's body, whatever came of the run. As an SDK does, it tries again
    /// when it is told to.
    pub(crate) async fn run(&self, id: &str, tool: &str, args: Value) -> Value {
        for _ in 0..3 {
            let answer = self.try_run(id, tool, args.clone()).await;
            let Some(seconds) = answer.header("retry-after").filter(|_| answer.status == 503) else {
                return answer.expect(200);
            };
            tokio::time::sleep(Duration::from_secs(seconds.parse().expect("whole seconds"))).await;
        }
        self.try_run(id, tool, args).await.expect(200)
    }

    pub(crate) async fn try_run(&self, id: &str, tool: &str, args: Value) -> Answer {
        let tool_id = self.tool_id(id, tool).await;
        self.post(&format!("/v1/mcp-servers/{id}/tools/{tool_id}/run"), &json!({ "args": args })).await
    }

    /// Registers the fake server as a child of Portolan that does what `script` says.
    pub(crate) async fn create_stdio(&self, server_name: &str, script: &Value) -> (Value, Script) {
        let script = self.script(script);
        let config = json!({ "mcp_server_type": "stdio", "command": fake_mcp(), "args": ["stdio", script.0] });
        (self.create(server_name, config).await, script)
    }

    /// A script file for the fake server.
    pub(crate) fn script(&self, script: &Value) -> Script {
        Script::new(self.folder.path(), script)
    }

    /// The children that Portolan started for this test: all of them name a script in its folder.
    pub(crate) fn children(&self) -> Vec<u32> {
        processes_naming(&self.folder.path().to_string_lossy())
    }

    /// Stops gracefully, and asserts that nothing is left.
    pub(crate) async fn stop(self) {
        assert_eq!(self.end().await, Ok(()));
    }

    /// Stops gracefully after its database has gone for good: nobody takes what is left of the run log, if there is any.
    pub(crate) async fn stop_without_database(self) {
        let ended = self.end().await;
        assert!(matches!(ended, Ok(()) | Err(Unclean::RunLog)), "{ended:?}");
    }

    async fn end(mut self) -> Result<(), Unclean> {
        self.shutdown.cancel();
        let serving = self.serving.take().expect("it is stopped once");
        let ended = tokio::time::timeout(Duration::from_secs(40), serving).await;
        let ended = ended.expect("Portolan stops").expect("it does not panic");
        assert_eq!(self.children(), Vec::<u32>::new(), "a child was left");
        std::mem::replace(&mut self.database, Database::none()).remove().await;
        ended
    }
}

impl Drop for Portolan {
    fn drop(&mut self) {
        assert!(self.serving.is_none() || std::thread::panicking(), "a test ends its Portolan with stop()");
    }
}

/// An HTTP client for tests.
pub(crate) fn client() -> reqwest::Client {
    client_builder().build().expect("an HTTP client")
}

fn client_builder() -> reqwest::ClientBuilder {
    // Portolan may have installed it already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy()
}

/// A Portolan as its clients know it, be it a part of the test or a process of its own.
pub(crate) struct Remote {
    url: String,
    client: reqwest::Client,
}

impl Remote {
    pub(crate) fn new(url: &str) -> Self {
        Self { url: url.to_owned(), client: client() }
    }

    pub(crate) fn with_token(url: &str, token: &str) -> Self {
        let value = format!("Bearer {token}").parse().expect("a header can hold it");
        let headers = [(reqwest::header::AUTHORIZATION, value)].into_iter().collect();
        let client = client_builder().default_headers(headers).build().expect("an HTTP client");
        Self { url: url.to_owned(), client }
    }

    pub(crate) fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method.parse().expect("a method"), format!("{}{path}", self.url))
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let request = self.request(method, path);
        Answer::of(method, path, if let Some(body) = body { request.json(body) } else { request }).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, Some(body)).await
    }

    /// Registers a server and returns its object.
    pub(crate) async fn create(&self, server_name: &str, config: Value) -> Value {
        let body = json!({ "server_name": server_name, "config": config });
        self.post("/v1/mcp-servers/", &body).await.expect(200)
    }

    /// The path on which a tool is run.
    pub(crate) async fn path(&self, id: &str, tool: &str) -> String {
        let tools = self.send("GET", &format!("/v1/mcp-servers/{id}/tools"), None).await.expect(200);
        let found = tools.as_array().and_then(|tools| tools.iter().find(|one| one["name"] == tool));
        let tool_id = found.and_then(|tool| tool["id"].as_str()).unwrap_or_else(|| panic!("no tool {tool}"));
        format!("/v1/mcp-servers/{id}/tools/{tool_id}/run")
    }

    /// Runs a tool by its name, again after each 503 as an SDK does, and returns the answer's body.
    pub(crate) async fn run(&self, id: &str, tool: &str, args: Value) -> Value {
        let path = self.path(id, tool).await;
        let body = json!({ "args": args });
        patiently(async || self.post(&path, &body).await).await.expect(200)
    }
}

/// Asks again after each 503, as an SDK does, for a while.
pub(crate) async fn patiently(ask: impl AsyncFn() -> Answer) -> Answer {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let answer = ask().await;
        if answer.status != 503 || tokio::time::Instant::now() > deadline {
            return answer;
        }
        let seconds = answer.header("retry-after").and_then(|seconds| seconds.parse().ok());
        tokio::time::sleep(Duration::from_secs(seconds.expect("a 503 says when to come again"))).await;
    }
}

/// A folder in `folder` where fake servers write: beside Portolan's own, and not around it.
pub(crate) fn scripts(folder: &Path) -> PathBuf {
    let scripts = folder.join("scripts");
    std::fs::create_dir_all(&scripts).expect("the folder is writable");
    scripts
}

/// A file that tells the fake server what to do, read again at every list of tools.
pub(crate) struct Script(pub(crate) PathBuf);

impl Script {
    pub(crate) fn new(folder: &Path, script: &Value) -> Self {
        let file = Self(scripts(folder).join(format!("{}.json", uuid::Uuid::new_v4())));
        file.set(script);
        file
    }

    pub(crate) fn set(&self, script: &Value) {
        // Renamed into place: the fake server never reads half of it.
        let new = self.0.with_extension("new");
        std::fs::write(&new, script.to_string()).expect("the folder is writable");
        std::fs::rename(new, &self.0).expect("the folder is writable");
    }

    /// Every message that fake servers with this script received: which process, and what.
    pub(crate) fn seen(&self) -> Vec<(u64, Value)> {
        let log = std::fs::read_to_string(format!("{}.log", self.0.display())).unwrap_or_default();
        // A fake that was killed may have left half a line.
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.map(|line| (line["pid"].as_u64().expect("a pid"), line["message"].clone())).collect()
    }

    /// How many processes were started with this script.
    pub(crate) fn starts(&self) -> usize {
        std::fs::read_to_string(format!("{}.starts", self.0.display())).unwrap_or_default().lines().count()
    }

    /// How many messages of this method were received.
    pub(crate) fn count(&self, method: &str) -> usize {
        self.methods().iter().filter(|seen| *seen == method).count()
    }

    /// The methods of those messages.
    pub(crate) fn methods(&self) -> Vec<String> {
        self.seen().iter().map(|(_, message)| message["method"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

/// The program of the fake server: `cargo test` builds it as an example.
pub(crate) fn fake_mcp() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_portolan")).with_file_name("examples").join("fake-mcp");
    assert!(program.exists(), "{} is missing: build it with cargo build --example fake-mcp", program.display());
    program
}

/// The processes whose command line contains `text`.
pub(crate) fn processes_naming(text: &str) -> Vec<u32> {
    let ours = std::process::id();
    let entries = std::fs::read_dir("/proc").expect("this is Linux").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let names = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    };
    pids.filter(|pid| *pid != ours).filter(names).collect()
}

/// How many sockets of this machine's programs are connected, or being connected, to a local port.
pub(crate) fn sockets_to(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("this is Linux");
    let remote = format!(":{port:04X}");
    let of_a_program = |line: &&str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        // A socket that no program holds any more has no inode.
        fields.get(2).is_some_and(|address| address.ends_with(&remote))
            && fields.get(9).is_some_and(|inode| *inode != "0")
    };
    table.lines().skip(1).filter(of_a_program).count()
}

/// Children of `parent` that ended and that it does not reap.
pub(crate) fn zombies_of(parent: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("this is Linux").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let zombie = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name of the program stands in parentheses and may hold any character.
        let Some((_, rest)) = stat.rsplit_once(')') else { return false };
        let mut fields = rest.split_whitespace();
        fields.next() == Some("Z") && fields.next() == Some(&parent.to_string())
    };
    pids.filter(zombie).collect()
}

/// A field of a process's `/proc` status in bytes: `VmRSS`, `VmHWM`.
pub(crate) fn memory(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("Linux knows it");
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("it is a number");
    kilobytes * 1024
}

/// How many tasks the test's runtime has: Portolan's, and those of the connections on both ends.
pub(crate) fn tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// The fake server as a listening process. Dropping it kills it.
pub(crate) struct FakeProgram {
    child: std::process::Child,
    pub(crate) url: String,
    pub(crate) addr: std::net::SocketAddr,
}

impl FakeProgram {
    /// `kind` is `http` or `sse`; without an address it takes a free port.
    pub(crate) fn start(kind: &str, script: &Script, addr: Option<std::net::SocketAddr>) -> Self {
        let mut command = Command::new(fake_mcp());
        let addr = addr.unwrap_or_else(|| ([127, 0, 0, 1], 0).into());
        command.args([kind, "--listen", &addr.to_string(), "--script"]).arg(&script.0);
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("the fake can be run");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).expect("it says where it listens");
        let url = reqwest::Url::parse(line.trim()).expect("it listens");
        let port = url.port().expect("it names its port");
        Self { child, url: url.into(), addr: ([127, 0, 0, 1], port).into() }
    }

    /// SIGKILL; done when it is gone.
    pub(crate) fn kill(&mut self) {
        // One that is gone already is not harmed.
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

impl Drop for FakeProgram {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Kills a process that this test's Portolan started, and waits until it has let go of its files: a pipe that it was to
/// read takes bytes until the last of its threads is gone, which may be after the first.
pub(crate) fn kill(pid: u32) {
    let killed = Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill can be run");
    assert!(killed.success());
    let deadline = std::time::Instant::now() + PATIENCE;
    let has_files = || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        threads > 1 || stat.is_ok_and(|stat| !stat.contains(") Z "))
    };
    while has_files() {
        assert!(std::time::Instant::now() < deadline, "a killed process goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until `test` is true.
pub(crate) async fn eventually(what: &str, mut test: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !test() {
        assert!(tokio::time::Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An answer that `openapi.yaml` allows, to a request that it allows if the answer is a success.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) async fn of(method: &str, path: &str, request: reqwest::RequestBuilder) -> Self {
        let (client, request) = request.build_split();
        let request = request.expect("a request can be made of this");
        let sent = request.body().and_then(reqwest::Body::as_bytes).unwrap_or_default().to_vec();
        let response = client.execute(request).await.expect("Portolan answers");
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let body = response.bytes().await.expect("the body arrives");
        let pairs: Vec<_> = headers
            .iter()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        openapi::check(method, path, status, &pairs, &body);
        openapi::check_request(method, path, status, &sent);
        Self { status, headers, text: String::from_utf8_lossy(&body).into_owned() }
    }

    /// The body, of an answer with this status.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        if self.text.is_empty() { Value::Null } else { serde_json::from_str(&self.text).expect("the body is JSON") }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}
