//! The fake MCP server as a process of its own: this program, run again.

use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::fake::{Fake, Running, http, sse, stdio};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Stdio,
    Http,
    Sse,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Stdio, Self::Http, Self::Sse];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdio => "stdio",
            Self::Http => "streamable HTTP",
            Self::Sse => "HTTP+SSE",
        }
    }
}

/// Does what the process was started for.
pub(crate) fn serve(kind: &str) -> ! {
    fn listen(running: Running) -> ! {
        let mut stdout = std::io::stdout();
        writeln!(stdout, "{}", running.url).and_then(|()| stdout.flush()).expect("the benchmark reads the URL");
        running.wait();
        std::process::exit(1)
    }
    let fake = Fake::standalone(None);
    match kind {
        "stdio" => stdio::run(&fake),
        "http" => listen(http::serve(fake)),
        "sse" => listen(sse::serve(fake)),
        _ => panic!("no such fake: {kind}"),
    }
}

/// A server to call: a listening process, or, for stdio, the command that everybody starts for himself.
pub(crate) struct Upstream {
    pub(crate) kind: Kind,
    /// Empty for stdio.
    pub(crate) url: String,
    _process: Option<Child>,
}

impl Upstream {
    pub(crate) async fn start(kind: Kind) -> Self {
        let mut upstream = Self { kind, url: String::new(), _process: None };
        if kind != Kind::Stdio {
            let mut process = upstream.command().spawn().expect("this program can be run again");
            let mut lines = BufReader::new(process.stdout.take().expect("a pipe was asked for")).lines();
            upstream.url = lines.next_line().await.expect("it can be read").expect("the fake prints its URL");
            upstream._process = Some(process);
        }
        upstream
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(program());
        command.args(["fake", self.word()]).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// What Portolan is told of it.
    pub(crate) fn config(&self) -> Value {
        match self.kind {
            Kind::Stdio => {
                json!({ "mcp_server_type": "stdio", "command": program(), "args": ["fake", self.word()] })
            }
            Kind::Http => json!({ "mcp_server_type": "streamable_http", "server_url": self.url }),
            Kind::Sse => json!({ "mcp_server_type": "sse", "server_url": self.url }),
        }
    }

    fn word(&self) -> &'static str {
        match self.kind {
            Kind::Stdio => "stdio",
            Kind::Http => "http",
            Kind::Sse => "sse",
        }
    }
}

fn program() -> std::path::PathBuf {
    std::env::current_exe().expect("this program has a path")
}
