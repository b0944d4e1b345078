//! The data Portolan keeps, as plain values that are also the rows of its tables.
//!
//! Nothing in here speaks HTTP, MCP or SQL. A [`Secret`] leaves this form only through
//! [`Secret::expose`], so that every place that reads one can be found.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::FromRow;

/// A value that must not be printed: its `Debug` hides it and it has no `Display` and no `Serialize`.
#[derive(Clone, Deserialize)]
#[serde(from = "String")]
pub struct Secret(SecretString);

impl Secret {
    /// The value in clear.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl From<String> for Secret {
    fn from(value: String) -> Self {
        Self(value.into())
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.expose() == other.expose()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Does not compile when [`Secret`] can be written anywhere by itself: the call is ambiguous then.
#[cfg(test)]
const _: fn() = || {
    trait Unwritable<Reason> {
        fn holds() {}
    }
    struct Always;
    struct AsText;
    struct AsData;
    impl<T: ?Sized> Unwritable<Always> for T {}
    impl<T: ?Sized + fmt::Display> Unwritable<AsText> for T {}
    impl<T: ?Sized + Serialize> Unwritable<AsData> for T {}
    <Secret as Unwritable<_>>::holds();
};

/// SHA-256 of a text, in hexadecimal.
pub fn sha256_hex(text: &str) -> String {
    hex(&Sha256::digest(text))
}

/// Bytes in hexadecimal, in lower case.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a caller may do; each scope includes those before it (CONTRACT row 21).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// See servers and tools.
    Read,
    /// Run tools, too.
    Run,
    /// Everything: a shell on this host, because stdio servers are commands.
    Admin,
}

impl Scope {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Run => "run",
            Self::Admin => "admin",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Read, Self::Run, Self::Admin].into_iter().find(|known| known.as_str() == name)
    }
}

/// Named secrets: environment variables of a child process, or HTTP header fields.
pub type SecretMap = BTreeMap<String, Secret>;

/// Explicit exits for secrets: only a field that names one of these in `serialize_with` is written in clear.
pub mod clear {
    use super::*;

    pub fn one<S: Serializer>(value: &Secret, out: S) -> Result<S::Ok, S::Error> {
        value.expose().serialize(out)
    }

    pub fn option<S: Serializer>(value: &Option<Secret>, out: S) -> Result<S::Ok, S::Error> {
        value.as_ref().map(Secret::expose).serialize(out)
    }

    pub fn option_map<S: Serializer>(value: &Option<SecretMap>, out: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(map) => out.collect_map(map.iter().map(|(name, secret)| (name, secret.expose()))),
            None => out.serialize_none(),
        }
    }
}

/// How an MCP server is reached; the value of `mcp_server_type` on the wire and of `servers.type` in the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerType {
    /// A command that Portolan starts, speaking MCP on its standard input and output.
    Stdio,
    /// The HTTP+SSE transport of MCP revision 2024-11-05.
    Sse,
    /// The streamable HTTP transport of MCP revision 2025-03-26 and later.
    StreamableHttp,
}

impl ServerType {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdio => "stdio",
            Self::Sse => "sse",
            Self::StreamableHttp => "streamable_http",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Stdio, Self::Sse, Self::StreamableHttp].into_iter().find(|known| known.as_str() == name)
    }
}

impl From<String> for ServerType {
    /// The type of a row. One that only a newer version knows has a configuration that cannot be read either; it is
    /// shown as some remote server.
    fn from(name: String) -> Self {
        Self::from_name(&name).unwrap_or(Self::StreamableHttp)
    }
}

/// A command to start.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Stdio {
    pub command: String,
    pub args: Vec<String>,
    #[serde(serialize_with = "clear::option_map")]
    pub env: Option<SecretMap>,
}

/// A URL to connect to, and what to send with every request there.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Remote {
    pub server_url: String,
    pub auth_header: Option<String>,
    #[serde(serialize_with = "clear::option")]
    pub auth_token: Option<Secret>,
    #[serde(serialize_with = "clear::option_map")]
    pub custom_headers: Option<SecretMap>,
    /// As whom Portolan signs in there by OAuth; `None`: as a client that it registers itself when the server asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oauth: Option<OauthClient>,
}

/// A client that somebody has registered with the authorization server of an MCP server.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct OauthClient {
    pub client_id: String,
    #[serde(serialize_with = "clear::option")]
    pub client_secret: Option<Secret>,
    /// The scopes to ask for, separated by spaces; `None`: those that the server asks for.
    pub scope: Option<String>,
    pub grant_type: GrantType,
}

/// How an access token is had (RFC 6749, 4.1 and 4.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GrantType {
    /// A person signs in.
    #[default]
    AuthorizationCode,
    /// The client signs in as itself.
    ClientCredentials,
}

/// A sign-in to one server by OAuth: as whom, and what was given for it. Its serialized form, secrets in clear, is what
/// the column `sign_ins.material` seals.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct SignIn {
    /// The URL of the server when it was made; it is void for any other.
    pub server_url: String,
    /// The authorization server; `None` when it was taken over from Letta, which does not keep it, until it is found.
    pub issuer: Option<String>,
    pub client_id: String,
    #[serde(serialize_with = "clear::option")]
    pub client_secret: Option<Secret>,
    /// Where the authorization server was told to send the browser.
    pub redirect_uri: Option<String>,
    #[serde(serialize_with = "clear::one")]
    pub access_token: Secret,
    #[serde(serialize_with = "clear::option")]
    pub refresh_token: Option<Secret>,
    pub scope: Option<String>,
    /// `None`: the authorization server did not say.
    pub expires_at: Option<DateTime<Utc>>,
}

impl fmt::Debug for SignIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SignIn(…)")
    }
}

/// How to connect to one MCP server. Its serialized form, secrets in clear, is what the column `servers.config` seals.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Connector {
    Stdio(Stdio),
    Sse(Remote),
    StreamableHttp(Remote),
}

impl Connector {
    pub fn server_type(&self) -> ServerType {
        match self {
            Self::Stdio(_) => ServerType::Stdio,
            Self::Sse(_) => ServerType::Sse,
            Self::StreamableHttp(_) => ServerType::StreamableHttp,
        }
    }
}

impl fmt::Debug for Connector {
    /// Only the type: commands, URLs and headers can carry secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.server_type().as_str())
    }
}

/// The configuration of a server as its row holds it: a row whose text cannot be read is still a server that can be
/// listed, changed and deleted (CONTRACT row 10).
#[derive(Clone, Debug)]
pub struct Config(pub Result<Connector, Unreadable>);

/// Why a stored configuration cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("The stored configuration of this server cannot be read; set it again with PATCH, or delete the server.")]
    Foreign,
    #[error(
        "The stored configuration of this server is sealed with a key that Portolan does not have; add that key to the key \
         file again, or delete the server."
    )]
    NoKey,
    #[error(
        "The stored configuration of this server was changed in the database and cannot be opened; restore it from a \
         backup, or delete the server."
    )]
    Damaged,
}

impl Unreadable {
    /// It may be whole, once its key is back: it must not be written over.
    pub fn is_sealed(self) -> bool {
        matches!(self, Self::NoKey | Self::Damaged)
    }
}

impl Config {
    /// Reads what [`Connector`]'s serialized form is.
    pub fn read(text: &[u8]) -> Self {
        Self(serde_json::from_slice(text).map_err(|_| Unreadable::Foreign))
    }
}

impl Default for Config {
    /// What is not opened.
    fn default() -> Self {
        Self(Err(Unreadable::NoKey))
    }
}

/// What is known of a server's reachability; `status.state` on the wire (CONTRACT row 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    NeverConnected,
    Ready,
    Unreachable,
    AuthRequired,
    /// The policy for commands forbids it; said, and never stored: another process may have another policy.
    Disabled,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NeverConnected => "never_connected",
            Self::Ready => "ready",
            Self::Unreachable => "unreachable",
            Self::AuthRequired => "auth_required",
            Self::Disabled => "disabled",
        }
    }
}

impl From<String> for State {
    /// The state of a row; one that only a newer version knows is at least not ready.
    fn from(name: String) -> Self {
        [Self::NeverConnected, Self::Ready, Self::AuthRequired]
            .into_iter()
            .find(|known| known.as_str() == name)
            .unwrap_or(Self::Unreachable)
    }
}

/// Which handshake a server understands. Found on the first connect and remembered, because finding it can cost 10 s
/// with a server that ignores unknown methods (MCP 2026-07-28, backward compatibility).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Era {
    /// `initialize`, up to revision 2025-11-25.
    Initialize,
    /// `server/discover` and metadata on each request, from revision 2026-07-28.
    Discover,
}

impl Era {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Initialize => "initialize",
            Self::Discover => "discover",
        }
    }

    /// The era of a stored name; an unknown one is found again on the next connect.
    fn from_name(name: &str) -> Option<Self> {
        [Self::Initialize, Self::Discover].into_iter().find(|era| era.as_str() == name)
    }
}

/// A registered MCP server.
#[derive(Clone, Debug, FromRow)]
pub struct Server {
    /// `mcp_server-<uuid4>`
    pub id: String,
    pub server_name: String,
    #[sqlx(rename = "type", try_from = "String")]
    pub server_type: ServerType,
    /// Not of the row itself: the store opens it.
    #[sqlx(skip)]
    pub config: Config,
    /// Grows by one with each change of `config`; a session opened for an older revision is not used any more.
    pub revision: i64,
    /// The name of its [`Era`], once a connect succeeded.
    pub era: Option<String>,
    #[sqlx(try_from = "String")]
    pub state: State,
    /// Why `state` is not `ready`, in one sentence; the store opens it, too.
    #[sqlx(skip)]
    pub error: Option<String>,
    /// When its tools were last listed with success.
    pub last_synced_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    pub tool_count: i64,
}

impl Server {
    /// Which handshake its last successful connect used.
    pub fn era(&self) -> Option<Era> {
        self.era.as_deref().and_then(Era::from_name)
    }
}

/// A tool of a registered MCP server.
#[derive(Clone, Debug, FromRow)]
pub struct Tool {
    /// `tool-<uuid4>`; kept as long as the server offers a tool of this name.
    #[sqlx(rename = "tool_id")]
    pub id: String,
    pub server_id: String,
    pub name: String,
    /// Its place in the server's own list, from 0.
    pub position: i64,
    /// The MCP tool definition, byte for byte as the server sent it (JSON).
    pub definition: String,
    /// Its [`definition_hash`]; rows of an older version have none.
    pub definition_hash: Option<String>,
    /// `None` while the definition may be used under every policy; else the hash of what was last approved, empty when
    /// nothing ever was.
    pub approved_hash: Option<String>,
    /// The last changes of the definition, newest first: a JSON array of `{at, old, new, what}`.
    pub changes: String,
}

impl Tool {
    /// The hash of its definition.
    pub fn hash(&self) -> Cow<'_, str> {
        match &self.definition_hash {
            Some(hash) => hash.into(),
            None => definition_hash(&self.definition).into(),
        }
    }
}

/// SHA-256, in hexadecimal, of a tool definition in canonical JSON: the order of keys, white space and the spelling of
/// texts do not count, everything else does.
pub fn definition_hash(definition: &str) -> String {
    match serde_json::from_str::<Value>(definition) {
        Ok(mut value) => {
            value.sort_all_objects();
            sha256_hex(&value.to_string())
        }
        Err(_) => sha256_hex(definition),
    }
}

/// A tool and its server; the server's `tool_count` is not counted here.
#[derive(Clone, Debug)]
pub struct ServerTool {
    pub server: Server,
    pub tool: Tool,
}

/// A tool as a server offers it now.
#[derive(Clone, Debug, PartialEq)]
pub struct Offered {
    pub name: String,
    /// The MCP tool definition, byte for byte (JSON).
    pub definition: String,
}

/// A tool whose definition is not what it was, and the keys of the definition that differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Changed {
    pub name: String,
    pub what: Vec<String>,
    /// The hashes of both.
    pub old: String,
    pub new: String,
    /// It is not run until it is approved.
    pub held: bool,
}

/// A text of a tool that holds characters which people do not see, or see in another place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flag {
    /// `control`, `bidi`, `zero_width`, `tag`, `variation_selector` or `private_use`.
    pub kind: &'static str,
    /// Where in the definition: a JSON pointer (RFC 6901), with such characters written as `\u{…}`.
    pub at: String,
}

/// A tool with such texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flagged {
    pub name: String,
    pub flags: Vec<Flag>,
}

/// A tool that a server offers and Portolan cannot keep.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Skipped {
    pub name: String,
    pub reason: String,
}

/// What a sync did to the tools of a server, by name; the answer of refresh (CONTRACT row 11).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ToolChanges {
    pub deleted: Vec<String>,
    pub updated: Vec<String>,
    pub added: Vec<String>,
    pub unchanged: u64,
    pub skipped: Vec<Skipped>,
    pub changed: Vec<Changed>,
    /// The tools that are not run until they are approved, changed by this sync or before.
    pub held: Vec<String>,
    pub flagged: Vec<Flagged>,
}

/// Who asked for a run or a change: the name of a token, or a command line of Portolan's own, which no token has the name of
/// because of its space. Nobody's name where Portolan is open to all who reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct By(Option<Cow<'static, str>>);

impl By {
    /// What Portolan does by itself: a server said that its tools changed, a sign-in is over.
    pub const ITSELF: Self = Self(Some(Cow::Borrowed("portolan serve")));
    pub const IMPORT: Self = Self(Some(Cow::Borrowed("portolan import")));
    pub const MIGRATION: Self = Self(Some(Cow::Borrowed("portolan migrate-letta")));

    /// `None` and the empty text are nobody's name.
    pub fn caller(name: Option<&str>) -> Self {
        Self(name.filter(|name| !name.is_empty()).map(|name| Cow::Owned(name.to_owned())))
    }

    pub fn name(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    /// The answer was a result (CONTRACT row 13).
    Success,
    /// The same, with the status `error`.
    Error,
    /// The answer was an error of Portolan's: nothing was sent to the tool (CONTRACT row 14).
    Failed,
}

impl RunOutcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Error => "error",
            Self::Failed => "failed",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Success, Self::Error, Self::Failed].into_iter().find(|known| known.as_str() == name)
    }
}

impl TryFrom<String> for RunOutcome {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::from_name(&name).ok_or(name)
    }
}

/// What was said in a run, as far as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunContent {
    /// The arguments as JSON, or the start of that text.
    pub args: String,
    pub args_cut: bool,
    /// The text of the result, or the start of it; none of a run that had no result.
    pub result: Option<String>,
    pub result_cut: bool,
}

/// A row of the run log.
#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct Run {
    /// `run-<UUIDv7 of started_at>`
    pub id: String,
    /// Whole milliseconds, as the id has it.
    pub started_at: DateTime<Utc>,
    /// From the request for a session to the answer.
    pub duration_ms: i64,
    pub caller: Option<String>,
    pub mcp_server_id: String,
    /// The names that server and tool had.
    pub server_name: String,
    pub tool_id: String,
    pub tool_name: String,
    #[sqlx(try_from = "String")]
    pub outcome: RunOutcome,
    /// Why it failed, as the answer had it; `cancelled` of a run that was cut off.
    pub error_code: Option<String>,
    /// The bytes of the arguments as JSON, and of the text of the result.
    pub args_bytes: i64,
    pub result_bytes: i64,
    /// Sealed in the table.
    #[sqlx(skip)]
    pub content: Option<RunContent>,
}

/// What can happen to servers, tools and sign-ins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    ServerCreated,
    ServerUpdated,
    ServerDeleted,
    ToolsChanged,
    ToolApproved,
    SignInCompleted,
    /// One from before the registration of its server went with that.
    SignInAdopted,
    SignInRemoved,
}

impl Action {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ServerCreated => "server.created",
            Self::ServerUpdated => "server.updated",
            Self::ServerDeleted => "server.deleted",
            Self::ToolsChanged => "tools.changed",
            Self::ToolApproved => "tool.approved",
            Self::SignInCompleted => "sign_in.completed",
            Self::SignInAdopted => "sign_in.adopted",
            Self::SignInRemoved => "sign_in.removed",
        }
    }
}

/// A row of the log of changes.
#[derive(Clone, Debug, PartialEq, FromRow, Serialize)]
pub struct Change {
    pub id: i64,
    pub at: DateTime<Utc>,
    /// See [`By`].
    pub caller: Option<String>,
    /// See [`Action`].
    pub action: String,
    /// None of a sign-in to a server that is not registered.
    pub mcp_server_id: Option<String>,
    pub server_name: Option<String>,
    /// A JSON object of names and counts, never of values.
    #[serde(serialize_with = "as_json")]
    pub details: String,
}

fn as_json<S: Serializer>(text: &str, out: S) -> Result<S::Ok, S::Error> {
    serde_json::from_str::<Value>(text).unwrap_or_default().serialize(out)
}
