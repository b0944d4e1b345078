//! Portolan as its users have it: the program, started on a folder.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::call::{Caller, Connection};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_portolan");

pub(crate) struct Portolan {
    process: Child,
    pub(crate) address: SocketAddr,
    /// Open until the end, as a terminal would be.
    _stdout: Lines<BufReader<ChildStdout>>,
}

/// A server whose tools Portolan has, and its tool `echo`.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) server: String,
    pub(crate) tool: String,
}

impl Registered {
    pub(crate) fn tool_path(&self) -> String {
        format!("/v1/mcp-servers/{}/tools/{}", self.server, self.tool)
    }

    pub(crate) fn run_path(&self) -> String {
        self.tool_path() + "/run"
    }
}

impl Portolan {
    /// Starts it, on SQLite without a URL; also how long that took until `GET /v1/health` was answered.
    pub(crate) async fn start(data: &Path, database_url: Option<&str>) -> (Self, Duration) {
        Self::start_with(data, database_url, &[]).await
    }

    /// The same with settings that are not the defaults.
    pub(crate) async fn start_with(data: &Path, database_url: Option<&str>, settings: &[&str]) -> (Self, Duration) {
        let log = File::options().create(true).append(true).open(data.with_extension("log")).expect("it can be made");
        let mut command = Command::new(PROGRAM);
        // Settings of whoever runs the benchmark are none of ours.
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(database_url.map(|url| ("DATABASE_URL", url)));
        // 32 bytes like any others; SQLite would make its own.
        command.env("PORTOLAN_KEY", "5f".repeat(32));
        command.args(["--listen", "127.0.0.1:0", "--data-dir"]).arg(data).args(settings);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);
        let start = Instant::now();
        let mut process = command.spawn().expect("Portolan can be run");
        let mut stdout = BufReader::new(process.stdout.take().expect("a pipe was asked for")).lines();
        let Some(line) = stdout.next_line().await.expect("it can be read") else {
            let log = std::fs::read_to_string(data.with_extension("log")).unwrap_or_default();
            panic!("Portolan did not start: {log}");
        };
        let url = line.rsplit(' ').next().and_then(|url| url.strip_prefix("http://"));
        let address = url.and_then(|url| url.parse().ok()).expect("its first line ends with its URL");
        let portolan = Self { process, address, _stdout: stdout };
        Caller::health(portolan.connect().await).call().await;
        (portolan, start.elapsed())
    }

    /// A new connection.
    pub(crate) async fn connect(&self) -> Connection {
        Connection::open(self.address).await
    }

    async fn request(&self, method: &str, path: &str, body: &str) -> Value {
        let mut connection = self.connect().await;
        let answer = connection.exchange(method, path, body).await;
        assert_eq!(answer.status(), "200", "{method} {path}: {}", String::from_utf8_lossy(answer.body));
        serde_json::from_slice(answer.body).expect("answers are JSON")
    }

    /// Registers a server, which need not be there, and returns its id.
    pub(crate) async fn create(&self, name: &str, config: Value) -> String {
        let body = json!({ "server_name": name, "config": config }).to_string();
        let server = self.request("POST", "/v1/mcp-servers/", &body).await;
        server["id"].as_str().expect("a server has an id").to_owned()
    }

    /// Registers a server that is there.
    pub(crate) async fn register(&self, name: &str, config: Value) -> Registered {
        let server = self.create(name, config).await;
        let tool = self.tool(&server, "echo").await;
        Registered { server, tool }
    }

    /// The id of a tool of a server.
    pub(crate) async fn tool(&self, server: &str, name: &str) -> String {
        let tools = self.request("GET", &format!("/v1/mcp-servers/{server}/tools"), "").await;
        let found = tools.as_array().and_then(|tools| tools.iter().find(|tool| tool["name"] == name));
        found.and_then(|tool| tool["id"].as_str()).expect("the fake's tools were listed").to_owned()
    }

    /// How many servers are registered.
    pub(crate) async fn count(&self) -> usize {
        // A list has no known length, which is all that a Connection takes.
        let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
        let answer = client.get(format!("http://{}/v1/mcp-servers/", self.address)).send().await.expect("it answers");
        answer.json::<Vec<Value>>().await.expect("a bare array").len()
    }

    /// Its resident memory in MB, children apart.
    pub(crate) fn resident(&self) -> f64 {
        let id = self.process.id().expect("it runs");
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("this is Linux");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
        line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number of KiB") * 1024.0 / 1e6
    }

    /// Stops it as an administrator does; what is left behind is an error.
    pub(crate) async fn stop(mut self) {
        let id = self.process.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw).expect("it runs");
        kill_process(id, Signal::TERM).expect("it is ours");
        let status = tokio::time::timeout(Duration::from_secs(40), self.process.wait()).await.expect("it stops");
        assert!(status.expect("it can be waited for").success(), "Portolan says that it did not stop cleanly");
    }
}
