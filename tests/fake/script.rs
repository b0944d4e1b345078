//! What the fake does: one JSON object, every field optional, unknown fields refused.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The first revision without `initialize`.
pub(crate) const MODERN: &str = "2026-07-28";

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Script {
    /// Raw tool definitions, as `tools/list` gives them.
    pub(crate) tools: Vec<Value>,
    /// 0: one page.
    pub(crate) page_size: usize,
    /// Every page names the same next page.
    pub(crate) repeat_cursor: bool,
    /// Every page has new tools and a new cursor.
    pub(crate) endless: bool,
    /// A JSON-RPC error object, answered instead of a list.
    pub(crate) list_error: Option<Value>,
    pub(crate) list_delay_ms: u64,
    /// `ttlMs` of the lists, 2026-07-28 only.
    pub(crate) ttl_ms: u64,
    /// The protocol revisions it speaks.
    pub(crate) revisions: Vec<String>,
    /// `initialize` answers with whatever revision was asked for.
    pub(crate) echo_revision: bool,
    /// No answer at all to an unknown method.
    pub(crate) ignore_unknown: bool,
    /// Where it dies without an answer, and how; `exit_code` is also that of the tools die and die_after.
    pub(crate) exit_at: Option<Stage>,
    pub(crate) exit_code: i32,
    /// Where it stays silent for ever.
    pub(crate) silent_at: Option<Stage>,
    /// What it does in place of what a stage asks for.
    pub(crate) acts: BTreeMap<Stage, Act>,
    /// Declares that it tells of changes of its list.
    pub(crate) list_changed: bool,
    /// echo answers after 0 to so many ms, whatever came first; before each answer comes an old one, and after it the same
    /// again. 0: at once, and once.
    pub(crate) jumble_ms: u64,

    /// stdio: written to stdout before anything else, as it is.
    pub(crate) banner: String,
    /// Programs: written to stderr at the start, as it is.
    pub(crate) stderr: String,
    /// stdio: outlives the end of its input, and SIGTERM.
    pub(crate) stubborn: bool,

    /// Streamable HTTP: how a POST is answered.
    pub(crate) reply: PostReply,
    /// Streamable HTTP: issues session ids and asks for them.
    pub(crate) sessions: bool,
    /// Streamable HTTP: GET opens an event stream (else 405) …
    pub(crate) get_stream: bool,
    /// … which says `retry: 0` and ends at once.
    pub(crate) get_ends: bool,
    /// Streamable HTTP: how a server that is not 2026-07-28 refuses `server/discover`.
    pub(crate) discover_http_status: u16,
    /// Both HTTP transports: 401 unless this header has this value.
    pub(crate) require_header: Option<(String, String)>,
    /// The challenge of that 401.
    pub(crate) www_authenticate: String,
    /// Both: answered to every POST.
    pub(crate) status: Option<u16>,
    /// Both: answered to every GET.
    pub(crate) get_status: Option<u16>,
    /// Both: 307 to this URL, whatever the method.
    pub(crate) redirect: Option<String>,

    /// HTTP+SSE: `relative`, `root`, `absolute`, or the very text of the endpoint event.
    pub(crate) endpoint: String,
    /// Event streams: how lines end.
    pub(crate) line_end: LineEnd,
    /// Event streams: a comment before every event.
    pub(crate) comments: bool,
    /// Event streams: bytes per chunk; 0: one chunk per event.
    pub(crate) chunk: usize,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            tools: standard_tools(),
            page_size: 0,
            repeat_cursor: false,
            endless: false,
            list_error: None,
            list_delay_ms: 0,
            ttl_ms: 0,
            revisions: ["2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05"].map(String::from).into(),
            echo_revision: false,
            ignore_unknown: false,
            exit_at: None,
            exit_code: 1,
            silent_at: None,
            acts: BTreeMap::new(),
            list_changed: false,
            jumble_ms: 0,
            banner: String::new(),
            stderr: String::new(),
            stubborn: false,
            reply: PostReply::Sse,
            sessions: true,
            get_stream: false,
            get_ends: false,
            discover_http_status: 400,
            require_header: None,
            www_authenticate: "Bearer".into(),
            status: None,
            get_status: None,
            redirect: None,
            endpoint: "relative".into(),
            line_end: LineEnd::Lf,
            comments: false,
            chunk: 0,
        }
    }
}

impl Script {
    pub(crate) fn read(file: &Path) -> Result<Self, String> {
        let text = std::fs::read(file).map_err(|error| error.to_string())?;
        serde_json::from_slice(&text).map_err(|error| error.to_string())
    }

    pub(crate) fn speaks(&self, revision: &str) -> bool {
        self.revisions.iter().any(|own| own == revision)
    }

    pub(crate) fn modern_only(&self) -> bool {
        self.revisions.iter().all(|own| own == MODERN)
    }

    /// The definition of a tool: the listed one, or that of the unlisted [`tenant`].
    pub(crate) fn tool(&self, name: &str) -> Option<Value> {
        let listed = self.tools.iter().find(|tool| tool["name"] == name);
        listed.cloned().or_else(|| (name == "tenant").then(tenant))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Stage {
    /// Programs: before anything is read.
    Start,
    /// A GET, of either HTTP transport.
    Open,
    /// Also `server/discover`, where that is spoken.
    Initialize,
    /// The notification after it.
    Initialized,
    List,
    Call,
    /// A client's answer to a request of the server's.
    Reply,
    /// The end of the input, or DELETE.
    Close,
}

/// A misbehaviour.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Act {
    /// How often, before it behaves again; 0: always.
    pub(crate) times: usize,
    /// HTTP: the status of the answer, and fields beside the usual ones or in their place.
    pub(crate) status: Option<u16>,
    pub(crate) headers: BTreeMap<String, String>,
    /// HTTP: the request gets no answer, not even a status.
    pub(crate) hold: bool,
    /// stdio: nothing is read while it lasts.
    pub(crate) deaf: bool,
    pub(crate) steps: Vec<Step>,
}

/// `{id}` in a text is that of the request, `{n}` the number of the repetition.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Step {
    /// What a server that behaves says here.
    Answer,
    /// A message: a line, an event, or (part of) a JSON body.
    Say(String),
    /// The very text, or bytes.
    Raw(String),
    Bytes(Vec<u8>),
    /// So many bytes `x`.
    Fill(usize),
    Repeat(usize, Box<Step>),
    Pause(u64),
    /// What follows comes one byte at a time, so many ms apart.
    Drip(u64),
    /// So many bytes to standard error.
    Stderr(usize),
    /// A process that inherits the pipes, in this one's group or in its own; its command line names the script.
    Spawn,
    SpawnAway,
    /// The end of the process; of the connection where the fake is part of a test.
    Exit(i32),
    /// The same by SIGKILL.
    Kill,
    /// The end of the connection, in the middle of the body.
    Cut,
    /// Nothing more, and no end either.
    Silence,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PostReply {
    Sse,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LineEnd {
    Lf,
    Cr,
    CrLf,
}

/// A tool definition with the least that is valid.
pub(crate) fn tool(name: &str, properties: &Value) -> Value {
    json!({"name": name, "description": format!("d {name}"), "inputSchema": {"type": "object", "properties": properties}})
}

/// A tool with an argument that 2026-07-28 clients repeat in a header. Unlisted: put it into `tools`.
pub(crate) fn tenant() -> Value {
    tool("tenant", &json!({"tenant": {"type": "string", "x-mcp-header": "Tenant"}}))
}

/// The standard tools, and these, which a script must list to have them called.
pub(crate) fn with_tools(names: &[&str]) -> Value {
    let mut tools = standard_tools();
    for name in names {
        if !tools.iter().any(|tool| tool["name"] == **name) {
            tools.push(tool(name, &json!({})));
        }
    }
    json!(tools)
}

pub(crate) fn standard_tools() -> Vec<Value> {
    let plain =
        ["two_texts", "image", "resource", "link", "structured", "text_and_structured", "empty", "fail"].into_iter();
    let plain =
        plain.chain(["rpc_error", "weird", "args", "argv", "env", "pid", "headers", "meta", "die", "die_after"]);
    let plain = plain.chain(["count", "spawn_child", "never"]);
    let integer = json!({"type": "integer"});
    let add = json!({"type": "object", "title": "addArguments", "properties": {
        "a": {"type": "integer", "title": "A"}, "b": {"type": "integer", "default": 2}}, "required": ["a"]});
    let mut tools = vec![
        tool("echo", &json!({"message": {"type": "string"}})),
        json!({"name": "add", "description": "d add", "inputSchema": add}),
        tool("slow", &json!({"ms": integer})),
        tool("progress", &json!({"steps": integer, "ms": integer})),
        tool("wide", &json!({"bytes": integer})),
    ];
    tools.extend(plain.map(|name| tool(name, &json!({}))));
    tools
}
