//! Which runs are one run: what a client sends so that many requests mean the same (CONTRACT row 16).
//!
//! A client names its run with `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header-07). A Letta SDK sends none,
//! but counts its tries in `x-stainless-retry-count`: its second try is the same run as the first if everything in it is
//! the same. A request with neither header is a run of its own.

use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::error::Error;
use crate::mcp::Variables;

use super::access::{Caller, X_BARE_PASSWORD};
use super::guard::ToolId;
pub use super::tokens::Digest;

pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
const RETRY_COUNT: &str = "x-stainless-retry-count";
/// The longest key, in characters.
const MAX_KEY: usize = 255;

/// What a request says about being one of several.
pub struct Repeat {
    /// The caller's token, or the credentials as they were sent to a Portolan without tokens. Callers are told apart by
    /// it, and nobody can read them from it.
    caller: Digest,
    way: Option<Way>,
}

enum Way {
    Key(String),
    /// The number of tries before this one.
    Tries(u64),
}

/// A run that may be asked for more than once.
#[derive(Clone, Debug)]
pub struct Call {
    /// The same for all requests that mean one run.
    pub identity: Digest,
    /// The same for equal arguments and values of variables, whatever the order of their keys.
    pub arguments: Digest,
    pub server_id: String,
    pub naming: Naming,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Naming {
    /// By a key: every request with it means the same run.
    Key,
    /// By its content, the first try: other runs of the same content are none of its business.
    First,
    /// By its content, a later try.
    Again,
}

impl<S: Send + Sync> FromRequestParts<S> for Repeat {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        let headers = &parts.headers;
        let way = match key(headers)? {
            Some(key) => Some(Way::Key(key)),
            None => tries(headers).map(Way::Tries),
        };
        let known = parts.extensions.get::<Caller>().and_then(Caller::id);
        Ok(Self { caller: known.unwrap_or_else(|| credentials(headers)), way })
    }
}

/// Anything but a number is no SDK's.
fn tries(headers: &HeaderMap) -> Option<u64> {
    headers.get(RETRY_COUNT)?.to_str().ok()?.parse().ok()
}

/// The first try of a run that is known by its content only: were it not taken note of, its repetition would mean an equal
/// run from before.
pub fn must_be_noted(headers: &HeaderMap) -> bool {
    !headers.contains_key(IDEMPOTENCY_KEY) && tries(headers) == Some(0)
}

fn key(headers: &HeaderMap) -> Result<Option<String>, Error> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let fine = (1..=MAX_KEY).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    if !fine || values.next().is_some() {
        let reason = format!("Idempotency-Key must be one text of 1 to {MAX_KEY} visible ASCII characters.");
        return Err(Error::invalid(place(), reason));
    }
    Ok(Some(text.to_owned()))
}

fn place() -> Vec<Value> {
    vec![json!("header"), json!(IDEMPOTENCY_KEY)]
}

/// A key that was used for other arguments: one of the two requests is a mistake.
pub fn key_taken() -> Error {
    let reason =
        "This Idempotency-Key was used for a run with other arguments or variables; each run needs its own key.";
    Error::invalid(place(), reason)
}

fn credentials(headers: &HeaderMap) -> Digest {
    let mut hash = Sha256::new();
    for name in [AUTHORIZATION, X_BARE_PASSWORD] {
        for value in headers.get_all(&name) {
            part(&mut hash, value.as_bytes());
        }
        hash.update(b"|");
    }
    hash.finalize().into()
}

impl Repeat {
    /// `None` for a run of its own.
    pub fn call(
        &self,
        ToolId { server_id, tool_id }: &ToolId,
        arguments: &Map<String, Value>,
        variables: &Variables,
    ) -> Option<Call> {
        let way = self.way.as_ref()?;
        let mut hash = Sha256::new();
        object(&mut hash, arguments);
        // With other values it may be another account that a tool works for.
        for (name, value) in variables.iter() {
            part(&mut hash, name.as_bytes());
            part(&mut hash, value.expose().as_bytes());
        }
        let arguments: Digest = hash.finalize().into();
        let mut hash = Sha256::new();
        hash.update(self.caller);
        part(&mut hash, server_id.as_bytes());
        part(&mut hash, tool_id.as_bytes());
        let naming = match way {
            Way::Key(key) => {
                part(&mut hash, key.as_bytes());
                Naming::Key
            }
            Way::Tries(tries) => {
                hash.update(arguments);
                if *tries == 0 { Naming::First } else { Naming::Again }
            }
        };
        Some(Call { identity: hash.finalize().into(), arguments, server_id: server_id.clone(), naming })
    }
}

/// With its length before it, no part runs into the next.
fn part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_be_bytes());
    hash.update(bytes);
}

fn object(hash: &mut Sha256, object: &Map<String, Value>) {
    let mut entries: Vec<_> = object.iter().collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    hash.update(b"{");
    for (key, content) in entries {
        hash.update(b"k");
        part(hash, key.as_bytes());
        value(hash, content);
    }
    hash.update(b"}");
}

/// As deep as the body, whose depth serde_json limits.
fn value(hash: &mut Sha256, content: &Value) {
    match content {
        Value::Null => hash.update(b"n"),
        Value::Bool(true) => hash.update(b"t"),
        Value::Bool(false) => hash.update(b"f"),
        Value::Number(number) => {
            hash.update(b"#");
            part(hash, number.to_string().as_bytes());
        }
        Value::String(text) => {
            hash.update(b"s");
            part(hash, text.as_bytes());
        }
        Value::Array(items) => {
            hash.update(b"[");
            items.iter().for_each(|item| value(hash, item));
            hash.update(b"]");
        }
        Value::Object(content) => object(hash, content),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn digest(text: &str) -> Digest {
        let mut hash = Sha256::new();
        value(&mut hash, &serde_json::from_str(text).unwrap());
        hash.finalize().into()
    }

    #[test]
    fn only_equal_arguments_have_the_same_digest() {
        assert_eq!(digest(r#"{"a":1,"b":{"c":[],"d":null}}"#), digest(r#"{"b":{"d":null,"c":[]},"a":1}"#));
        let different = [
            "{}",
            "[]",
            "null",
            "0",
            "false",
            "true",
            r#""""#,
            r#""0""#,
            "1",
            "1.0",
            "[[]]",
            "[[],[]]",
            "[{}]",
            r#"{"a":1}"#,
            r#"{"a":"1"}"#,
            r#"{"a":[1]}"#,
            r#"{"a1":null}"#,
            r#"{"a":{"b":1}}"#,
            r#"{"a":{},"b":1}"#,
            r#"["a","b"]"#,
            r#"["ab"]"#,
            r#"["b","a"]"#,
            r#"["a",["b"]]"#,
            r#"["ks"]"#,
        ];
        for (index, one) in different.iter().enumerate() {
            for other in &different[index + 1..] {
                assert_ne!(digest(one), digest(other), "{one} {other}");
            }
        }
    }
}
