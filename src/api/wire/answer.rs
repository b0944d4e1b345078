//! What a client reads: Letta's keys in Letta's order, nulls present, then what Portolan adds.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::api::reveal::Shown;
use crate::mcp::{Held, Outcome, Room, definition, flags, json_schema};
use crate::model::{Connector, Flag, Remote, Server, ServerType, State, Stdio, Tool, sha256_hex};

use super::mask::masked;

/// Letta's default user, which every tool was made by.
const USER: &str = "user-00000000-0000-4000-8000-000000000000";

/// A server as Letta shows it, then what Portolan adds (CONTRACT row 5).
#[derive(Serialize)]
pub struct ServerObject<'a> {
    mcp_server_type: ServerType,
    #[serde(flatten)]
    connector: ConnectorObject,
    id: &'a str,
    server_name: &'a str,
    r#type: ServerType,
    created_at: String,
    updated_at: String,
    status: Status<'a>,
}

/// Their keys are those of Letta, in Letta's order.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum ConnectorObject {
    Stdio(Stdio),
    Remote(Remote),
}

impl From<Connector> for ConnectorObject {
    fn from(connector: Connector) -> Self {
        match connector {
            Connector::Stdio(stdio) => Self::Stdio(stdio),
            Connector::Sse(remote) | Connector::StreamableHttp(remote) => Self::Remote(remote),
        }
    }
}

impl ConnectorObject {
    /// What is stored, as it may be shown.
    pub(super) fn of(server: &Server, shown: Shown) -> Self {
        match (&server.config.0, shown) {
            (Ok(connector), Shown::Masked) => masked(connector).into(),
            (Ok(connector), Shown::InClear) => connector.clone().into(),
            (Err(_), _) => Self::empty(server.server_type),
        }
    }

    /// What stands in place of a configuration that cannot be read.
    fn empty(server_type: ServerType) -> Self {
        match server_type {
            ServerType::Stdio => Self::Stdio(Stdio { command: String::new(), args: vec![], env: None }),
            ServerType::Sse | ServerType::StreamableHttp => Self::Remote(Remote {
                server_url: String::new(),
                auth_header: None,
                auth_token: None,
                custom_headers: None,
                oauth: None,
            }),
        }
    }
}

#[derive(Serialize)]
struct Status<'a> {
    state: State,
    error: Option<Cow<'a, str>>,
    tool_count: i64,
    last_synced_at: Option<String>,
    confinement: Option<Arc<[String]>>,
}

impl<'a> ServerObject<'a> {
    pub fn new(server: &'a Server, shown: Shown) -> Self {
        let (state, error) = match &server.config.0 {
            Ok(_) => (server.state, server.error.as_deref().map(Into::into)),
            Err(unreadable) => (State::Unreachable, Some(unreadable.to_string().into())),
        };
        Self {
            mcp_server_type: server.server_type,
            connector: ConnectorObject::of(server, shown),
            id: &server.id,
            server_name: &server.server_name,
            r#type: server.server_type,
            created_at: rfc3339(server.created_at),
            updated_at: rfc3339(server.updated_at),
            status: Status {
                state,
                error,
                tool_count: server.tool_count,
                last_synced_at: server.last_synced_at.map(rfc3339),
                confinement: None,
            },
        }
    }
}

impl ServerObject<'_> {
    /// What only this process knows: why it may not use the server, if so, and how the server's last child was confined.
    pub fn here(mut self, disabled: Option<String>, confinement: Option<Arc<[String]>>) -> Self {
        self.status.confinement = confinement;
        if let Some(reason) = disabled {
            (self.status.state, self.status.error) = (State::Disabled, Some(reason.into()));
        }
        self
    }
}

fn rfc3339(time: chrono::DateTime<chrono::Utc>) -> String {
    time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)
}

/// A tool as Letta shows it (CONTRACT row 12), with the untouched MCP definition under `metadata_.mcp.definition`.
#[derive(Serialize)]
pub struct ToolObject<'a> {
    id: &'a str,
    tool_type: &'static str,
    description: Option<String>,
    source_type: &'static str,
    name: &'a str,
    tags: [String; 1],
    source_code: String,
    json_schema: Value,
    args_json_schema: Map<String, Value>,
    return_char_limit: u32,
    pip_requirements: (),
    npm_requirements: (),
    default_requires_approval: (),
    enable_parallel_execution: bool,
    created_by_id: &'static str,
    last_updated_by_id: &'static str,
    metadata_: Metadata<'a>,
    project_id: (),
}

#[derive(Serialize)]
struct Metadata<'a> {
    mcp: Origin<'a>,
    tool_hash: String,
}

#[derive(Serialize)]
struct Origin<'a> {
    server_name: &'a str,
    server_id: &'a str,
    definition: Option<&'a RawValue>,
    definition_hash: Cow<'a, str>,
    changes: Option<&'a RawValue>,
    held: bool,
    flags: Vec<Flag>,
}

impl<'a> ToolObject<'a> {
    /// What the answer has room for is counted in `room`, shared by all tools of one answer. `hold` says that what is not
    /// approved is not run.
    pub fn new(server: &'a Server, tool: &'a Tool, hold: bool, room: &mut Room) -> Self {
        let parts = definition(tool);
        // What Letta stores as the code of every MCP tool; its own clients show it.
        let source_code = format!(
            "def {}(**kwargs):\n    raise RuntimeError(\"Something went wrong - we should never be using the \
             persisted source code for MCP. Please reach out to Letta team\")",
            tool.name
        );
        let hash = sha256_hex(&format!("{source_code}|python|"));
        Self {
            id: &tool.id,
            tool_type: "external_mcp",
            json_schema: json_schema(&tool.name, parts.description.as_deref(), &parts.input_schema, room),
            description: parts.description,
            source_type: "python",
            name: &tool.name,
            tags: [format!("mcp:{}", server.server_name)],
            source_code,
            args_json_schema: Map::new(),
            return_char_limit: 50_000,
            pip_requirements: (),
            npm_requirements: (),
            default_requires_approval: (),
            enable_parallel_execution: false,
            created_by_id: USER,
            last_updated_by_id: USER,
            metadata_: Metadata {
                mcp: Origin {
                    server_name: &server.server_name,
                    server_id: &server.id,
                    definition: serde_json::from_str(&tool.definition).ok(),
                    definition_hash: tool.hash(),
                    changes: serde_json::from_str(&tool.changes).ok(),
                    held: hold && tool.approved_hash.is_some(),
                    flags: flags(&tool.definition),
                },
                tool_hash: hash[..12].to_owned(),
            },
            project_id: (),
        }
    }
}

/// The tools of a server as a JSON array, written one by one: all of them at once as values would take several times the
/// memory.
pub fn tools_array(server: &Server, tools: &[Tool], hold: bool) -> Vec<u8> {
    let mut room = Room::default();
    let mut array = vec![b'['];
    for tool in tools {
        if array.len() > 1 {
            array.push(b',');
        }
        serde_json::to_writer(&mut array, &ToolObject::new(server, tool, hold, &mut room)).expect("a tool is JSON");
    }
    array.push(b']');
    array
}

/// What came of a run, with Letta's six keys and Portolan's two (CONTRACT row 13).
#[derive(Serialize)]
pub struct ToolExecutionResult {
    status: &'static str,
    func_return: String,
    agent_state: (),
    stdout: (),
    stderr: (),
    sandbox_config_fingerprint: (),
    result: Option<Box<RawValue>>,
    duration_ms: f64,
    #[serde(skip)]
    held: Option<Held>,
}

/// The text of an answer, and the room that it takes as long as it is there.
struct Body {
    text: Vec<u8>,
    _held: Option<Held>,
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

impl ToolExecutionResult {
    /// A run without a result, and why, in one sentence for its caller.
    pub fn failed(reason: impl Into<String>, duration: Duration) -> Self {
        Outcome { is_error: true, text: reason.into(), result: None, duration, held: None }.into()
    }

    /// The body of the answer.
    pub fn json(mut self) -> Bytes {
        let text = serde_json::to_vec(&self).expect("a result is JSON");
        let mut held = self.held.take();
        if let Some(held) = &mut held {
            // It may be larger than the server's message, and find no room for that: the answer is there already.
            let _ = held.resize(text.len());
        }
        Bytes::from_owner(Body { text, _held: held })
    }
}

impl From<Outcome> for ToolExecutionResult {
    fn from(outcome: Outcome) -> Self {
        Self {
            status: if outcome.is_error { "error" } else { "success" },
            func_return: outcome.text,
            agent_state: (),
            stdout: (),
            stderr: (),
            sandbox_config_fingerprint: (),
            result: outcome.result,
            duration_ms: (outcome.duration.as_secs_f64() * 1_000_000.0).round() / 1_000.0,
            held: outcome.held,
        }
    }
}
