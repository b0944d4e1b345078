//! A Portolan for one test, on the database the run is for, and the checks that every test makes.
//!
//! The database is SQLite in a temporary folder, or, with `PORTOLAN_TEST_POSTGRES_URL`, a fresh database of that server.
//! Every answer is held against `openapi.yaml`, and so is the body of every request that succeeds. [`Portolan::stop`] asserts that no child, session or task is left.

pub(crate) mod openapi;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Parser;
use portolan::app::App;
use portolan::config::{Cli, Settings};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// What a test waits at most for something that happens by itself.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Portolan {
    url: String,
    pub(crate) app: App,
    client: reqwest::Client,
    shutdown: CancellationToken,
    serving: Option<JoinHandle<bool>>,
    database: Database,
    folder: TempDir,
}

/// The database of one test; ended by [`Database::remove`].
pub(crate) struct Database {
    postgres: Option<(String, String)>,
}

impl Database {
    pub(crate) async fn new() -> Self {
        let Ok(server) = std::env::var("PORTOLAN_TEST_POSTGRES_URL") else { return Self { postgres: None } };
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        let mut connection = PgConnection::connect(&server).await.expect("the test server takes connections");
        connection.execute(AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.expect("the test user may create");
        Self { postgres: Some((server, name)) }
    }

    pub(crate) fn url(&self) -> Option<String> {
        let (server, name) = self.postgres.as_ref()?;
        let mut url = reqwest::Url::parse(server).expect("the test server's URL is one");
        url.set_path(name);
        Some(url.into())
    }

    pub(crate) async fn remove(self) {
        let Some((server, name)) = self.postgres else { return };
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
    settings.upstream.handshake_timeout = Duration::from_secs(10);
    change(&mut settings);
    settings
}

impl Portolan {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Settings)) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let database = Database::new().await;
        let settings = settings(folder.path(), &database, change);
        let app = App::open(settings).await.expect("Portolan starts");
        let client = client();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let shutdown = CancellationToken::new();
        let serving = Some(tokio::spawn(app.clone().serve(listener, shutdown.clone())));
        Self { url, app, client, shutdown, serving, database, folder }
    }

    /// Whether other processes may use its database.
    pub(crate) fn shares_its_database(&self) -> bool {
        self.database.postgres.is_some()
    }

    /// The inside of another Portolan on the same database; of this one where the database is not shared.
    pub(crate) async fn another(&self) -> App {
        if !self.shares_its_database() {
            return self.app.clone();
        }
        let settings = settings(&self.folder.path().join("another"), &self.database, |_| {});
        App::open(settings).await.expect("Portolan starts")
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
        let file = Script(self.folder.path().join(format!("{}.json", uuid::Uuid::new_v4())));
        file.set(script);
        file
    }

    /// The children that Portolan started for this test: all of them name a script in its folder.
    pub(crate) fn children(&self) -> Vec<u32> {
        processes_naming(&self.folder.path().to_string_lossy())
    }

    /// Stops gracefully, and asserts that nothing is left.
    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        let serving = self.serving.take().expect("it is stopped once");
        let clean = tokio::time::timeout(Duration::from_secs(40), serving).await;
        assert!(clean.expect("Portolan stops").expect("it does not panic"), "a session or a task was left");
        assert_eq!(self.children(), Vec::<u32>::new(), "a child was left");
        std::mem::replace(&mut self.database, Database { postgres: None }).remove().await;
    }
}

impl Drop for Portolan {
    fn drop(&mut self) {
        assert!(self.serving.is_none() || std::thread::panicking(), "a test ends its Portolan with stop()");
    }
}

/// An HTTP client for tests.
pub(crate) fn client() -> reqwest::Client {
    // Portolan may have installed it already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().expect("an HTTP client")
}

/// A file that tells the fake server what to do, read again at every list of tools.
pub(crate) struct Script(pub(crate) PathBuf);

impl Script {
    pub(crate) fn set(&self, script: &Value) {
        // Renamed into place: the fake server never reads half of it.
        let new = self.0.with_extension("new");
        std::fs::write(&new, script.to_string()).expect("the folder is writable");
        std::fs::rename(new, &self.0).expect("the folder is writable");
    }

    /// Every message that fake servers with this script received: which process, and what.
    pub(crate) fn seen(&self) -> Vec<(u64, Value)> {
        let log = std::fs::read_to_string(format!("{}.log", self.0.display())).unwrap_or_default();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("the fake logs JSON"));
        lines.map(|line| (line["pid"].as_u64().expect("a pid"), line["message"].clone())).collect()
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

/// Kills a process that this test's Portolan started.
pub(crate) fn kill(pid: u32) {
    let killed = Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill can be run");
    assert!(killed.success());
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
