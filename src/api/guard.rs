//! Who and what may come in: path ids, and bodies of bounded size, of the right type, that are strict JSON.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use axum::body::HttpBody;
use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Path, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use bytes::BytesMut;
use http_body_util::BodyExt;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Duration, Instant, timeout_at};

use crate::app::App;
use crate::error::{Error, Issue};
use crate::serve::Full;

/// The largest body of a request that changes a server, and of a run, in bytes.
const MAX_BODY: usize = 1024 * 1024;
const MAX_RUN_BODY: usize = 4 * MAX_BODY;
/// How much of a body that is too large is read all the same, so that its sender gets to reading the answer.
const MAX_REFUSED: usize = 16 * 1024 * 1024;
/// The first bytes of every body are free, so that a few large bodies refuse no small one: there are no more of them than
/// connections.
const FREE: usize = 16 * 1024;
/// The most values in a body, those within others too: each takes a hundred bytes and more, fifty times what the
/// shortest takes in the body, and many runs may wait with their arguments.
const MAX_VALUES: usize = 100_000;
/// The longest key of an object in a body, in bytes: as long as the longest value that a configuration takes.
const MAX_KEY: usize = 32 * 1024;
/// How many bytes of a body buy another second for the rest of it, so that 4 MiB may take nine minutes on a slow line;
/// but at no time may more than `--body-timeout` pass without any.
const BYTES_PER_SECOND: f64 = 8192.0;

/// The server a path names. An id of any other shape than ours names nothing: 404 (CONTRACT row 9).
pub struct ServerId(pub String);

impl<S: Send + Sync> FromRequestParts<S> for ServerId {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let Path(id) = Path::<String>::from_request_parts(parts, state).await.map_err(|_| Error::NoServer)?;
        if is_id(&id) { Ok(Self(id)) } else { Err(Error::NoServer) }
    }
}

/// The tool a path names, and the server it is looked for at.
pub struct ToolId {
    pub server_id: String,
    pub tool_id: String,
}

impl<S: Send + Sync> FromRequestParts<S> for ToolId {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let ids = Path::<(String, String)>::from_request_parts(parts, state).await;
        let Path((server_id, tool_id)) = ids.map_err(|_| Error::NoTool)?;
        match (is_id(&server_id), is_id(&tool_id)) {
            (true, true) => Ok(Self { server_id, tool_id }),
            (true, false) => Err(Error::NoTool),
            (false, _) => Err(Error::NoServer),
        }
    }
}

/// A path that ends with the id of a sign-in; nothing hangs on which.
pub struct SessionId;

impl<S: Send + Sync> FromRequestParts<S> for SessionId {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let Path(id) = Path::<String>::from_request_parts(parts, state).await.map_err(|_| Error::NoRoute)?;
        if is_id(&id) { Ok(Self) } else { Err(Error::NoRoute) }
    }
}

/// The server that a path names in place of an id, as Letta's older SDKs do; white space around a name does not count, as
/// where it was given.
pub struct ServerName(pub String);

impl<S: Send + Sync> FromRequestParts<S> for ServerName {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let name = names(parts, state).await.and_then(|names| names.into_iter().next());
        // No name has control characters, and PostgreSQL has no text with NUL.
        let name = name.filter(|name| !name.contains(char::is_control)).ok_or(Error::NoServerNamed)?;
        Ok(Self(name.trim().to_owned()))
    }
}

/// The tool that a path names, and the server it is looked for at.
pub struct ToolName {
    pub server_name: String,
    pub tool_name: String,
}

impl<S: Send + Sync> FromRequestParts<S> for ToolName {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let ServerName(server_name) = ServerName::from_request_parts(parts, state).await?;
        let tool_name = names(parts, state).await.and_then(|names| names.into_iter().nth(1));
        Ok(Self { server_name, tool_name: tool_name.ok_or(Error::NoToolNamed)? })
    }
}

/// The names in a path, in their order. The last one may be a word of ours, `…/servers/test`: a server may be called so.
async fn names<S: Send + Sync>(parts: &mut Parts, state: &S) -> Option<Vec<String>> {
    let Path(given) = Path::<Vec<(String, String)>>::from_request_parts(parts, state).await.ok()?;
    let own = parts.extensions.get::<MatchedPath>()?.as_str().trim_end_matches('/').rsplit('/').next()?.to_owned();
    Some(given.into_iter().map(|(_, name)| name).chain([own]).collect())
}

fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

/// The JSON body of a create or an update: an object without NUL characters.
pub struct JsonBody(pub Map<String, Value>);

impl FromRequest<App> for JsonBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &App) -> Result<Self, Error> {
        let is_json = is_json(&request);
        let body = read(request, MAX_BODY, app).await?;
        if !is_json {
            return Err(Error::UnsupportedMediaType);
        }
        server_object(&body.bytes).map(Self)
    }
}

/// What the body of a create or an update says.
pub fn server_object(body: &[u8]) -> Result<Map<String, Value>, Error> {
    let object = object(body, "request body")?;
    refuse_nul_in(&object, &mut vec![json!("body")])?;
    Ok(object)
}

/// What a file of servers says.
pub fn file_object(text: &[u8]) -> Result<Map<String, Value>, Error> {
    if text.len() > MAX_BODY {
        return Err(Error::BodyTooLarge { limit: MAX_BODY });
    }
    let object = object(text, "file")?;
    refuse_nul_in(&object, &mut vec![json!("body")])?;
    Ok(object)
}

/// A body that is a file, to be read as one.
pub struct FileBody(pub Vec<u8>);

impl FromRequest<App> for FileBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &App) -> Result<Self, Error> {
        let is_json = is_json(&request);
        let body = read(request, MAX_BODY, app).await?;
        if is_json { Ok(Self(body.bytes.to_vec())) } else { Err(Error::UnsupportedMediaType) }
    }
}

/// The JSON body of a run; none at all, of whatever type, is an empty object.
pub struct RunBody(pub Map<String, Value>);

impl FromRequest<App> for RunBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &App) -> Result<Self, Error> {
        object_if_any(request, MAX_RUN_BODY, app).await.map(Self)
    }
}

/// A JSON body that may be missing, which is an empty object.
pub struct OptionalBody(pub Map<String, Value>);

impl FromRequest<App> for OptionalBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &App) -> Result<Self, Error> {
        object_if_any(request, MAX_BODY, app).await.map(Self)
    }
}

async fn object_if_any(request: Request, limit: usize, app: &App) -> Result<Map<String, Value>, Error> {
    let is_json = is_json(&request);
    let body = read(request, limit, app).await?;
    match (body.bytes.is_empty(), is_json) {
        (true, _) => Ok(Map::new()),
        (false, true) => object(&body.bytes, "request body"),
        (false, false) => Err(Error::UnsupportedMediaType),
    }
}

/// The body of a request that needs none. It may be any JSON; every other type is refused, as where it is read: a page may
/// send those elsewhere without having asked.
pub struct UnusedBody;

impl FromRequest<App> for UnusedBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &App) -> Result<Self, Error> {
        let is_json = is_json(&request);
        let body = read(request, MAX_BODY, app).await?;
        if is_json || body.bytes.is_empty() { Ok(Self) } else { Err(Error::UnsupportedMediaType) }
    }
}

fn is_json(request: &Request) -> bool {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

/// Room for the bodies that are being read, in bytes. Nobody waits for it: a body that finds none is refused.
#[derive(Clone)]
pub struct Bodies(Arc<Semaphore>);

impl Bodies {
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))))
    }

    /// `None` when there is not so much room.
    fn take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        self.0.clone().try_acquire_many_owned(bytes.try_into().ok()?).ok()
    }
}

/// A whole body; dropping it gives its room back.
struct Held {
    bytes: BytesMut,
    room: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// Takes `data` too; `None` when there is no room for it.
    fn hold(&mut self, data: &[u8], bodies: &Bodies) -> Option<()> {
        let before = self.bytes.len().max(FREE);
        let more = (self.bytes.len() + data.len()).saturating_sub(before);
        if more > 0 {
            let room = bodies.take(more)?;
            match &mut self.room {
                Some(held) => held.merge(room),
                None => self.room = Some(room),
            }
        }
        self.bytes.extend_from_slice(data);
        Some(())
    }
}

/// Reads a body of at most `limit` bytes. It may be silent for `--body-timeout`, see [`BYTES_PER_SECOND`].
async fn read(request: Request, limit: usize, app: &App) -> Result<Held, Error> {
    let patience = app.settings.entry.body_timeout;
    let full = super::full(&request);
    let mut body = request.into_body();
    let expected = body.size_hint().lower().min(limit as u64) as usize;
    let mut held = Held { bytes: BytesMut::with_capacity(expected), room: None };
    let mut refused = 0;
    let mut deadline = Instant::now() + patience;
    // What is too large anyway buys no time.
    while refused <= MAX_REFUSED {
        let frame = match timeout_at(deadline, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(None) => break,
            _ if refused > 0 => break,
            Ok(Some(Err(error))) => {
                return Err(if error.into_inner().is::<Full>() { full } else { Error::BodyIncomplete });
            }
            Err(_) => return Err(Error::BodyIncomplete),
        };
        let Ok(data) = frame.into_data() else { continue };
        if refused > 0 || held.bytes.len() + data.len() > limit {
            refused += data.len();
            // None of it is wanted any more.
            held = Held { bytes: BytesMut::new(), room: None };
        } else {
            if held.hold(&data, &app.bodies).is_none() {
                return Err(full);
            }
            let bought = Duration::from_secs_f64(data.len() as f64 / BYTES_PER_SECOND);
            deadline = (deadline + bought).min(Instant::now() + patience);
        }
    }
    if refused > 0 { Err(Error::BodyTooLarge { limit }) } else { Ok(held) }
}

/// `what` it is, for messages.
fn object(body: &[u8], what: &str) -> Result<Map<String, Value>, Error> {
    let body_issue = |msg: String| Error::Invalid(vec![Issue { loc: vec![json!("body")], msg }]);
    match serde_json::from_slice(body) {
        Ok(Strict(Value::Object(object))) => Ok(object),
        Ok(_) => Err(body_issue(format!("The {what} must be a JSON object."))),
        Err(error) => {
            let place = format!("line {} column {}", error.line(), error.column());
            // Only our own message is shown: it names a key, where serde_json's could quote the body.
            let reason = error.to_string();
            Err(body_issue(match reason.strip_prefix(DUPLICATE) {
                Some(rest) => {
                    let key = rest.rsplit_once(" at line ").map_or(rest, |(key, _)| key);
                    format!("The key {key} appears twice in one object ({place}).")
                }
                None if reason.starts_with(TOO_MANY) => {
                    format!("The {what} has more than {MAX_VALUES} values, counting those within others.")
                }
                None if reason.starts_with(TOO_LONG) => format!("A key has more than {MAX_KEY} bytes ({place})."),
                None if reason.starts_with(TOO_DEEP) => format!("The {what} is nested too deeply ({place})."),
                None => format!("The {what} is not valid JSON ({place})."),
            }))
        }
    }
}

/// PostgreSQL has no text with NUL, and neither has an argument, an environment variable or a header.
pub(super) fn refuse_nul_in(object: &Map<String, Value>, loc: &mut Vec<Value>) -> Result<(), Error> {
    for (key, value) in object {
        loc.push(json!(shown(key)));
        if key.contains('\0') {
            return Err(nul(loc));
        }
        refuse_nul(value, loc)?;
        loc.pop();
    }
    Ok(())
}

fn refuse_nul(value: &Value, loc: &mut Vec<Value>) -> Result<(), Error> {
    match value {
        Value::String(text) if text.contains('\0') => Err(nul(loc)),
        Value::Object(object) => refuse_nul_in(object, loc),
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                loc.push(json!(index));
                refuse_nul(item, loc)?;
                loc.pop();
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn nul(loc: &[Value]) -> Error {
    Error::invalid(loc.to_vec(), "A NUL character is not allowed here.")
}

/// A key as an answer may show it: escaped, and no longer than 64 characters.
pub fn shown(key: &str) -> String {
    key.chars().take(64).flat_map(char::escape_debug).collect()
}

const DUPLICATE: &str = "duplicate key ";
const TOO_MANY: &str = "too many values";
const TOO_LONG: &str = "key too long";
/// serde_json's own words, for more than 127 objects and arrays within each other.
const TOO_DEEP: &str = "recursion limit exceeded";

/// A JSON value of at most [`MAX_VALUES`], 127 deep, in which no key is longer than [`MAX_KEY`] and no object has one
/// twice: with two, client and server could each mean
/// another one.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        StrictSeed(&Cell::new(MAX_VALUES)).deserialize(deserializer).map(Self)
    }
}

/// How many values may still come.
#[derive(Clone, Copy)]
struct StrictSeed<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for StrictSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.set(self.0.get().checked_sub(1).ok_or_else(|| D::Error::custom(TOO_MANY))?);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictSeed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            array.push(item);
        }
        // Even one item is given the room of four.
        array.shrink_to_fit();
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if key.len() > MAX_KEY {
                return Err(A::Error::custom(TOO_LONG));
            }
            let value = entries.next_value_seed(self)?;
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("{DUPLICATE}{}", shown(&key))));
            }
            map.insert(key, value);
        }
        Ok(map.into())
    }
}
