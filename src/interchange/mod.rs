//! The configuration files of other programs: what they say of MCP servers, and the same written back.
//!
//! Pure: files become the bodies of creates, servers become files. Whether such a server may be had is checked where
//! creates are. Their placeholders (`${VAR}`, `${env:VAR}`, `${input:id}`) are templates here (CONTRACT row 17).

mod left_out;
mod placeholders;
mod read;
mod text;
mod write;

use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

pub use left_out::leave_out;
pub use placeholders::canonical;
pub use read::{Document, Entry, Variable, read};
pub use text::plain_json;
pub use write::{Written, headers, write};

/// Whose file it is. All but VS Code's have the servers under `mcpServers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Claude Code's `.mcp.json`, Claude Desktop's `claude_desktop_config.json`
    Claude,
    /// Cursor's `mcp.json`
    Cursor,
    /// Windsurf's `mcp_config.json`
    Windsurf,
    /// VS Code's `mcp.json`: the servers under `servers`, and `inputs`
    #[value(name = "vscode")]
    VsCode,
    /// Letta's `mcp_config.json`
    Letta,
}

impl Format {
    /// The key under which the servers are.
    fn top(self) -> &'static str {
        if self == Self::VsCode { "servers" } else { "mcpServers" }
    }
}

/// What is wrong with a file, and where in it: keys and indexes from the top.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    pub place: Vec<Value>,
    pub msg: String,
}

/// What a file says of a server and Portolan does not take over, or what Portolan keeps and a file has no place for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Passed {
    /// `None`: it stands beside the servers.
    pub server: Option<String>,
    /// `None`: all of the server.
    pub key: Option<String>,
    pub reason: String,
}

/// Whether a URL without a type is one of the older HTTP+SSE transport: such servers are at `/sse` by convention.
fn is_sse(url: &str) -> bool {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    path.trim_end_matches('/').ends_with("/sse")
}
