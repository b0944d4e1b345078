//! Speaks MCP and knows no handler: the front door to sessions and tool lists.
//!
//! [`Mcp::sync_tools`] makes the stored tools of a server equal to what it offers, [`Mcp::run_tool`] runs one,
//! [`Mcp::forget`] ends a server's session, [`Mcp::close`] all of them.

mod egress;
mod events;
mod http;
mod ledger;
mod pool;
mod schema;
mod session;
mod sse;
mod stdio;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ::http::HeaderValue;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::config::Upstream;
use crate::model::{Era, Offered, Server, Skipped, State, Tool, ToolChanges, Unreadable};
use crate::store::{self, Reached, Store};

pub use schema::{declares, json_schema};

use http::HttpError;
use pool::Pool;
use session::{CallError, Context};

/// The most tools of one server, and the most bytes and depth of one tool's parts, that are kept.
const MAX_TOOLS: usize = 5_000;
const MAX_SCHEMA_BYTES: usize = 256 * 1024;
const MAX_SCHEMA_DEPTH: usize = 64;
const MAX_TEXT_BYTES: usize = 64 * 1024;
/// How long the end of all sessions may take at a stop: a child gets two graces, rmcp its closing time.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The agent a refresh is made for; goes to the server as `X-Agent-Id` (docs/CONTRACT.md).
#[derive(Clone, Debug)]
pub struct AgentId(HeaderValue);

impl AgentId {
    /// `None` for a text that is no legal header value.
    pub fn new(text: &str) -> Option<Self> {
        HeaderValue::from_str(text).ok().map(Self)
    }
}

/// Why a server cannot be used now; each message is one sentence for the person who registered it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", spawn_reason(*.0))]
    Spawn(std::io::ErrorKind),
    #[error("The command ended before it was ready ({status}){}.", last_words(.stderr.as_deref()))]
    Exited { status: std::process::ExitStatus, stderr: Option<String> },
    #[error("The server cannot be used: {0}.")]
    Http(#[from] HttpError),
    #[error("The server asks for a sign-in (HTTP 401); check auth_token and custom_headers.")]
    AuthRequired,
    #[error("The server did not finish the MCP handshake in time.")]
    HandshakeTimeout,
    #[error("The server refused the MCP handshake with JSON-RPC error {code}.")]
    HandshakeRefused { code: i32 },
    #[error("The server's answer to the MCP handshake cannot be understood.")]
    Handshake,
    #[error("The server speaks no MCP revision that Portolan knows.")]
    Revision,
    #[error("The server's endpoint event names no address on the server's own origin.")]
    Endpoint,
    #[error("The server ended the connection.")]
    Closed,
    #[error("The server's answer is no list of tools.")]
    List,
    #[error("The server did not list its tools in time.")]
    ListTimeout,
    #[error("The server's pages of tools do not come to an end: a cursor came twice, or there are too many tools.")]
    Paging,
    #[error("The server's configuration was changed meanwhile; refresh it again.")]
    Reconfigured,
    #[error("A configured header is not legal HTTP; set custom_headers and auth_token again.")]
    Header,
    #[error(transparent)]
    Config(Unreadable),
    #[error("Portolan is stopping.")]
    Stopping,
}

impl Error {
    /// The server was there and did not like how it was greeted; another handshake may do.
    fn is_about_the_handshake(&self) -> bool {
        matches!(
            self,
            Self::HandshakeRefused { .. } | Self::Handshake | Self::Revision | Self::Closed | Self::Exited { .. }
        ) || matches!(self, Self::Http(HttpError::Status(_) | HttpError::ContentType))
    }

    fn state(&self) -> State {
        match self {
            Self::AuthRequired => State::AuthRequired,
            _ => State::Unreachable,
        }
    }
}

fn spawn_reason(kind: std::io::ErrorKind) -> &'static str {
    match kind {
        std::io::ErrorKind::NotFound => "The command was not found; check its name and the PATH of Portolan.",
        std::io::ErrorKind::PermissionDenied => "The command may not be executed; check its permissions.",
        _ => "The command could not be started.",
    }
}

fn last_words(stderr: Option<&str>) -> String {
    stderr.map(|text| format!("; its standard error ends with \"{text}\"")).unwrap_or_default()
}

/// Why a sync did not happen.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    #[error(transparent)]
    Server(#[from] Error),
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// What came of a run that reached the server.
#[derive(Debug)]
pub struct Outcome {
    pub is_error: bool,
    /// The result in one text (CONTRACT row 13).
    pub text: String,
    /// The MCP CallToolResult as the server wrote it; none when the server gave none.
    pub result: Option<Box<RawValue>>,
    /// From the request for a session to the answer.
    pub duration: Duration,
}

/// Sessions to all servers, and what was learned from them. Clones share everything.
#[derive(Clone)]
pub struct Mcp {
    store: Store,
    pool: Arc<Pool>,
    settings: Upstream,
    tracker: TaskTracker,
    /// One sync of a server at a time, so that an older list never lands on a newer one.
    syncing: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
}

impl Mcp {
    /// # Errors
    /// When the HTTP client cannot be made (no usable certificate store).
    pub fn new(store: Store, settings: Upstream) -> reqwest::Result<Self> {
        let tracker = TaskTracker::new();
        let client = egress::client(settings.connect_timeout)?;
        let pool = Pool::new(Context { settings: settings.clone(), client, tracker: tracker.clone() });
        Ok(Self { store, pool: Arc::new(pool), settings, tracker, syncing: Arc::default() })
    }

    /// Lists the server's tools and keeps them, in the background; waits at most `patience` for the outcome. The sync
    /// goes on when the caller leaves. `None` when it is still going on.
    pub async fn sync_in_background(
        &self,
        server: Server,
        patience: Duration,
    ) -> Option<Result<ToolChanges, SyncError>> {
        let mcp = self.clone();
        let sync = self.tracker.spawn(async move { mcp.sync_tools(&server, None).await });
        timeout(patience, sync).await.ok()?.ok()
    }

    /// Lists the server's tools, following all pages, and makes the stored ones equal to them in one transaction.
    ///
    /// # Errors
    /// [`SyncError::Server`] when the list cannot be had; the stored tools are as they were, and the reason is noted in
    /// the server's status.
    pub async fn sync_tools(&self, server: &Server, agent: Option<&AgentId>) -> Result<ToolChanges, SyncError> {
        let turn = {
            let mut syncing = self.syncing.lock().expect("no code panics while it holds the map");
            // Entries that nobody waits for are dropped on the way.
            syncing.retain(|_, turn| Arc::strong_count(turn) > 1);
            syncing.entry(server.id.clone()).or_default().clone()
        };
        let _turn = turn.lock().await;
        let listed = match self.list(server, agent).await {
            Ok(listed) => listed,
            Err(error) => {
                self.note(server, Err(&error)).await?;
                return Err(error.into());
            }
        };
        let (offered, skipped) = accept(&listed.tools);
        let synced = self.store.sync_tools(&server.id, server.revision, Some(listed.era), &offered).await?;
        let mut changes = synced.ok_or(Error::Reconfigured)?;
        tracing::info!(
            server.id,
            tools.added = changes.added.len(),
            tools.updated = changes.updated.len(),
            tools.deleted = changes.deleted.len(),
            tools.skipped = skipped.len(),
            "tools synced"
        );
        changes.skipped = skipped;
        Ok(changes)
    }

    /// Lists on the live session; on one that proves dead, once more on a new one.
    async fn list(&self, server: &Server, agent: Option<&AgentId>) -> Result<Listed, Error> {
        let mut second = false;
        loop {
            let session = self.pool.session(server).await?;
            let listing = timeout(self.settings.list_timeout, session.list_tools(agent, MAX_TOOLS));
            match listing.await.unwrap_or(Err(Error::ListTimeout)) {
                Ok(tools) => return Ok(Listed { tools, era: session.era() }),
                Err(Error::Closed | Error::Http(_)) if !second => {
                    self.pool.discard(&server.id, &session).await;
                    second = true;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Runs a tool of a server with `arguments`, on the live session. `request_heartbeat`, which Letta adds to every
    /// schema, is taken out unless the tool itself declares it (CONTRACT row 13).
    ///
    /// # Errors
    /// When no session can be had, and so nothing was sent. All that can happen after that is an [`Outcome`].
    pub async fn run_tool(
        &self,
        server: &Server,
        tool: &Tool,
        mut arguments: Map<String, Value>,
    ) -> Result<Outcome, Error> {
        let started = Instant::now();
        if arguments.contains_key(HEARTBEAT) && !declares(&definition(tool).input_schema, HEARTBEAT) {
            arguments.shift_remove(HEARTBEAT);
        }
        let needs_list = tool.definition.contains("x-mcp-header");
        let outcome = |is_error, text: String, result| Outcome { is_error, text, result, duration: started.elapsed() };
        let mut second = false;
        loop {
            let session = match self.pool.session(server).await {
                Ok(session) => session,
                Err(error) => {
                    // The answer is the error; that it could not be noted as well is in the log.
                    if let Err(cause) = self.note(server, Err(&error)).await {
                        tracing::error!(server.id, error = %cause, "cannot note the state of a server");
                    }
                    return Err(error);
                }
            };
            if server.state != State::Ready
                && let Err(cause) = self.note(server, Ok(session.era())).await
            {
                tracing::error!(server.id, error = %cause, "cannot note the state of a server");
            }
            let calling =
                session.call_tool(&tool.name, arguments.clone(), needs_list, MAX_TOOLS, self.settings.run_timeout);
            return Ok(match calling.await {
                Ok(result) => match Answer::read(&result) {
                    Some(answer) => outcome(answer.is_error, answer.text, Some(result)),
                    None => outcome(true, "The server's answer is no tool result.".to_owned(), Some(result)),
                },
                Err(CallError::Rpc(message)) => outcome(true, message, None),
                Err(CallError::TimedOut) => {
                    let seconds = self.settings.run_timeout.as_secs_f64();
                    outcome(true, format!("The tool did not answer within {seconds} s; it may still be running."), None)
                }
                Err(CallError::NotSent(_)) if !second => {
                    self.pool.discard(&server.id, &session).await;
                    second = true;
                    continue;
                }
                Err(CallError::NotSent(error)) => return Err(error),
                Err(CallError::Lost(error)) => outcome(
                    true,
                    format!("The connection was lost during the call; the tool may have run. {error}"),
                    None,
                ),
            });
        }
    }

    /// Notes in the server's status what came of an attempt to reach it.
    async fn note(&self, server: &Server, attempt: Result<Era, &Error>) -> Result<(), store::Error> {
        let reached = match attempt {
            Ok(era) => Reached { state: State::Ready, error: None, era: Some(era) },
            // A stop says nothing about the server.
            Err(Error::Stopping) => return Ok(()),
            Err(error) => Reached {
                state: error.state(),
                error: Some(error.to_string()),
                era: server.era.as_deref().and_then(Era::from_name),
            },
        };
        self.store.record_reached(&server.id, server.revision, &reached).await
    }

    /// Ends the server's session; calls that are under way finish on it.
    pub fn forget(&self, server_id: &str) {
        self.pool.forget(server_id);
    }

    /// Ends all sessions and their children; done when nothing is left (`true`), or after 10 s.
    pub async fn close(&self) -> bool {
        self.pool.close();
        self.tracker.close();
        timeout(CLOSE_TIMEOUT, self.tracker.wait()).await.is_ok()
    }
}

const HEARTBEAT: &str = "request_heartbeat";

struct Listed {
    tools: Vec<Box<RawValue>>,
    era: Era,
}

/// The parts of a tool definition that Portolan reads.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Definition {
    pub name: String,
    #[serde(default)]
    pub description: Option<String>,
    pub input_schema: Value,
}

/// The definition of a kept tool.
pub fn definition(tool: &Tool) -> Definition {
    serde_json::from_str(&tool.definition).unwrap_or_else(|_| Definition {
        name: tool.name.clone(),
        description: None,
        input_schema: Value::Object(Map::new()),
    })
}

/// Sorts a server's list into what can be kept and what cannot, with the reason; nothing is lost silently.
fn accept(listed: &[Box<RawValue>]) -> (Vec<Offered>, Vec<Skipped>) {
    let mut names = HashSet::new();
    let mut offered = Vec::new();
    let mut skipped = Vec::new();
    for (index, raw) in listed.iter().enumerate() {
        let result = read_tool(raw.get()).and_then(|definition| {
            if offered.len() >= MAX_TOOLS {
                return Err((definition.name, "the server has more than 5,000 tools"));
            }
            if !names.insert(definition.name.clone()) {
                return Err((definition.name, "another tool of this server has the same name"));
            }
            Ok(definition)
        });
        match result {
            Ok(definition) => offered.push(Offered { name: definition.name, definition: raw.get().to_owned() }),
            Err((name, reason)) => {
                let name = if name.is_empty() { format!("(tool {})", index + 1) } else { name };
                skipped.push(Skipped { name, reason: reason.to_owned() });
            }
        }
    }
    (offered, skipped)
}

fn read_tool(raw: &str) -> Result<Definition, (String, &'static str)> {
    let Ok(value) = serde_json::from_str::<Value>(raw) else {
        return Err((String::new(), "its definition is nested too deeply"));
    };
    let name = value["name"].as_str().unwrap_or_default().to_owned();
    let refuse = |reason| Err((name.clone(), reason));
    if name.is_empty() || name.contains('\0') {
        return Err((String::new(), "it has no usable name"));
    }
    if !value["inputSchema"].is_object() {
        return refuse("its inputSchema is not an object");
    }
    if !matches!(value.get("description"), None | Some(Value::Null | Value::String(_))) {
        return refuse("its description is not a text");
    }
    if name.len() > MAX_TEXT_BYTES || value["description"].as_str().is_some_and(|text| text.len() > MAX_TEXT_BYTES) {
        return refuse("its name or description is larger than 64 KiB");
    }
    if raw.len() > MAX_SCHEMA_BYTES + 2 * MAX_TEXT_BYTES || value["inputSchema"].to_string().len() > MAX_SCHEMA_BYTES {
        return refuse("its definition is larger than 256 KiB");
    }
    if depth(&value["inputSchema"]) > MAX_SCHEMA_DEPTH {
        return refuse("its inputSchema is nested deeper than 64");
    }
    serde_json::from_value(value).map_err(|_| (name, "its definition cannot be read"))
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// A tool result as Letta shows it: one text, and whether the tool says it failed (CONTRACT row 13).
struct Answer {
    is_error: bool,
    text: String,
}

impl Answer {
    /// Text blocks joined by one space, other blocks as compact JSON; without blocks the structured content as compact
    /// JSON. `None` when this is no CallToolResult.
    fn read(raw: &RawValue) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct CallToolResult<'a> {
            #[serde(borrow)]
            content: Option<Vec<&'a RawValue>>,
            #[serde(borrow)]
            structured_content: Option<&'a RawValue>,
            is_error: Option<bool>,
        }
        let result: CallToolResult<'_> = serde_json::from_str(raw.get()).ok()?;
        let blocks: Vec<_> = result.content.iter().flatten().map(|block| block_text(block)).collect();
        let text = match (&blocks[..], result.structured_content) {
            ([], Some(structured)) => compact(structured.get()),
            ([], None) => "Empty response from tool".to_owned(),
            (blocks, _) => blocks.join(" "),
        };
        Some(Self { is_error: result.is_error.unwrap_or(false), text })
    }
}

fn block_text(block: &RawValue) -> String {
    #[derive(Deserialize)]
    struct TextBlock {
        r#type: String,
        text: String,
    }
    match serde_json::from_str::<TextBlock>(block.get()) {
        Ok(TextBlock { r#type, text }) if r#type == "text" => text,
        _ => compact(block.get()),
    }
}

/// JSON without the white space between its tokens; numbers keep all their digits, which a parsed value would not.
fn compact(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    let mut in_string = false;
    let mut escaped = false;
    for character in json.chars() {
        if in_string {
            in_string = escaped || character != '"';
            escaped = !escaped && character == '\\';
        } else if character.is_ascii_whitespace() {
            continue;
        } else {
            in_string = character == '"';
        }
        text.push(character);
    }
    text
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn answer(result: &str) -> (bool, String) {
        let raw = RawValue::from_string(result.to_owned()).unwrap();
        let answer = Answer::read(&raw).unwrap();
        (answer.is_error, answer.text)
    }

    #[test]
    fn results_become_one_text() {
        for (result, text) in [
            (
                r#"{"content":[{"type":"text","text":"one"},{"type":"text","text":"two\nlines"},{"type":"text","text":""}]}"#,
                "one two\nlines ",
            ),
            (
                r#"{"content":[{"type":"text","text":"pic:"},{ "type": "image", "data": "a\"  b" }]}"#,
                r#"pic: {"type":"image","data":"a\"  b"}"#,
            ),
            (
                r#"{"content":[],"structuredContent":{ "n": 123456789012345678901234567890 }}"#,
                r#"{"n":123456789012345678901234567890}"#,
            ),
            (r#"{"content":[]}"#, "Empty response from tool"),
            (r#"{}"#, "Empty response from tool"),
        ] {
            assert_eq!(answer(result), (false, text.to_owned()), "{result}");
        }
        assert_eq!(answer(r#"{"isError":true,"content":[{"type":"text","text":"no"}]}"#), (true, "no".to_owned()));
    }

    #[test]
    fn what_is_no_tool_result_is_not_taken_for_one() {
        for result in ["null", "\"text\"", "[]", r#"{"content":"text"}"#, r#"{"isError":"yes"}"#] {
            let raw = RawValue::from_string(result.to_owned()).unwrap();
            assert!(Answer::read(&raw).is_none(), "{result}");
        }
    }

    #[test]
    fn a_list_is_sorted_into_kept_and_skipped() {
        let list = [
            r#"{"name":"a","inputSchema":{}}"#,
            r#"{"name":"a","inputSchema":{"type":"object"}}"#,
            r#"{"name":"no schema"}"#,
            r#"{"inputSchema":{}}"#,
            r#"{"name":"nul\u0000","inputSchema":{}}"#,
            r#"{"name":"odd","inputSchema":{},"annotations":{"readOnlyHint":"yes"},"icons":7}"#,
            r#"{"name":"number","inputSchema":{},"description":5}"#,
            "17",
        ]
        .map(|raw| RawValue::from_string(raw.to_owned()).unwrap());
        let (offered, skipped) = accept(&list);
        let kept: Vec<_> = offered.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(kept, ["a", "odd"]);
        let skipped: Vec<_> = skipped.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(skipped, ["a", "no schema", "(tool 4)", "(tool 5)", "number", "(tool 8)"]);
    }

    #[test]
    fn schemas_that_are_too_deep_or_too_large_are_skipped_with_the_reason() {
        let nested = |levels| format!("{}{}{}", r#"{"properties":"#.repeat(levels), "{}", "}".repeat(levels));
        let tool = |schema: String| read_tool(&format!(r#"{{"name":"t","inputSchema":{schema}}}"#)).map(|_| ());
        assert!(tool(nested(62)).is_ok());
        assert_eq!(tool(nested(64)).unwrap_err().1, "its inputSchema is nested deeper than 64");
        assert!(tool(format!(r#"{{"x":"{}"}}"#, "y".repeat(MAX_SCHEMA_BYTES - 100))).is_ok());
        assert!(tool(format!(r#"{{"x":"{}"}}"#, "y".repeat(MAX_SCHEMA_BYTES))).is_err());
    }
}
