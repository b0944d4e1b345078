//! JSON-RPC 2.0 as MCP uses it: what goes out, and what comes in with its result left exactly as the server wrote it.
//!
//! Servers are forgiven what harms nobody: a missing `jsonrpc`, an id that comes back as a string, a byte that is not
//! UTF-8, a batch (revision 2025-03-26). An answer that cannot be read still fails its own request at once.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::json::mend;

/// One message of a server.
#[derive(Debug)]
pub enum Inbound {
    /// To the request of ours with this id.
    Answer {
        id: u64,
        result: Result<Box<RawValue>, RpcError>,
    },
    /// A question of the server's; its id goes back as it came.
    Request {
        id: Box<RawValue>,
        method: String,
    },
    Notification {
        method: String,
    },
}

/// A JSON-RPC error; also what an answer that cannot be read is turned into.
#[derive(Clone, Debug, Deserialize)]
pub struct RpcError {
    pub code: i64,
    #[serde(default)]
    pub message: String,
}

/// JSON-RPC 2.0, error codes.
pub const METHOD_NOT_FOUND: i64 = -32601;
const INTERNAL_ERROR: i64 = -32603;

/// The text of a request with `params`, which are JSON; no line end.
pub fn request(id: u64, method: &str, params: &str) -> Vec<u8> {
    format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"{method}","params":{params}}}"#).into_bytes()
}

/// Our last word in the handshake of `initialize`.
pub const INITIALIZED: &[u8] = br#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;

/// What a server says when its list of tools is another one (MCP 2025-11-25, tools).
pub const LIST_CHANGED: &str = "notifications/tools/list_changed";

/// Tells a server that nobody waits for the answer to request `id` any more (MCP 2025-11-25, cancellation).
pub fn cancelled(id: u64) -> Vec<u8> {
    let params = format!(r#"{{"requestId":{id},"reason":"nobody waits for it"}}"#);
    format!(r#"{{"jsonrpc":"2.0","method":"notifications/cancelled","params":{params}}}"#).into_bytes()
}

/// Our answer to a server's question. Portolan declares no capability, so that only `ping` has a result.
pub fn reply(id: &RawValue, method: &str) -> Vec<u8> {
    if method == "ping" {
        return format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{{}}}}"#).into_bytes();
    }
    let error = r#"{"code":-32601,"message":"Portolan offers no client features."}"#;
    format!(r#"{{"jsonrpc":"2.0","id":{id},"error":{error}}}"#).into_bytes()
}

/// Subscribes to notices (MCP 2026-07-28, subscriptions).
pub const LISTEN: &str = "subscriptions/listen";

/// Reads one inbound text: one message, several of a batch, or none when it is no JSON-RPC.
pub fn read(text: &[u8]) -> Vec<Inbound> {
    // A wrong byte in one text block must not cost the message.
    let text = String::from_utf8_lossy(text);
    if text.trim_ascii_start().starts_with('[') {
        let parts: Vec<&RawValue> = serde_json::from_str(&text).unwrap_or_default();
        return parts.into_iter().filter_map(|part| read_one(part.get())).collect();
    }
    read_one(&text).into_iter().collect()
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    method: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present")]
    result: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

/// A null result is a result.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

fn read_one(text: &str) -> Option<Inbound> {
    // serde would take an array for the struct, too.
    let envelope = text.trim_ascii_start().starts_with('{').then(|| serde_json::from_str::<Envelope<'_>>(text).ok());
    let Some(envelope) = envelope? else {
        // It breaks off being JSON somewhere, but may say before that whose answer it is.
        return Start::read(text).answers().map(unreadable);
    };
    match envelope {
        Envelope { id: None, method: Some(method), .. } => Some(Inbound::Notification { method: method.into_owned() }),
        Envelope { id: Some(id), method: Some(method), .. } => {
            Some(Inbound::Request { id: id.to_owned(), method: method.into_owned() })
        }
        Envelope { id: Some(id), method: None, result, error } => {
            let id = number(id.get())?;
            let error = error.map(RawValue::get).filter(|error| *error != "null");
            Some(match (result, error) {
                (Some(result), None) => Inbound::Answer { id, result: Ok(accept(result)) },
                (None, Some(error)) => match serde_json::from_str(error) {
                    Ok(error) => Inbound::Answer { id, result: Err(error) },
                    Err(_) => unreadable(id),
                },
                _ => unreadable(id),
            })
        }
        Envelope { id: None, method: None, .. } => None,
    }
}

fn accept(result: &RawValue) -> Box<RawValue> {
    match mend(result.get()) {
        Cow::Borrowed(_) => result.to_owned(),
        Cow::Owned(mended) => RawValue::from_string(mended).unwrap_or_else(|_| result.to_owned()),
    }
}

fn unreadable(id: u64) -> Inbound {
    let message = "The server's answer is no JSON-RPC 2.0.".to_owned();
    Inbound::Answer { id, result: Err(RpcError { code: INTERNAL_ERROR, message }) }
}

/// An id of ours; some servers send them back as strings.
fn number(id: &str) -> Option<u64> {
    id.trim_matches('"').parse().ok()
}

/// What the start of a message says before it breaks off.
#[derive(Default)]
struct Start {
    id: Option<u64>,
    /// It is a message of the server's own, whatever its id.
    has_method: bool,
}

impl Start {
    fn read(text: &str) -> Self {
        /// Reads the keys of an object in turn; what was found stays found when the rest fails.
        struct Keys<'a>(&'a mut Start);

        impl<'de> Visitor<'de> for Keys<'_> {
            type Value = ();

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON-RPC message")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
                while let Some(key) = map.next_key::<String>()? {
                    self.0.has_method |= key == "method";
                    match key.as_str() {
                        "id" => self.0.id = number(map.next_value::<&RawValue>()?.get()),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(())
            }
        }

        let mut start = Self::default();
        // Only what stands before the fault matters.
        let _ = serde_json::Deserializer::from_str(text).deserialize_map(Keys(&mut start));
        start
    }

    /// The request of ours that it answers.
    fn answers(&self) -> Option<u64> {
        self.id.filter(|_| !self.has_method)
    }
}

/// The id of an answer of which only the first and the last bytes were kept: servers write it at either end.
pub fn id_of_a_part(head: &[u8], tail: &[u8]) -> Option<u64> {
    let start = Start::read(&String::from_utf8_lossy(head));
    if start.has_method || start.id.is_some() {
        return start.answers();
    }
    let tail = String::from_utf8_lossy(tail);
    let after = tail.rsplit_once("\"id\"")?.1.trim_ascii_start().strip_prefix(':')?;
    let id = after.trim_ascii().trim_end_matches('}').split(',').next()?;
    number(id.trim_ascii())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn answer(text: &str) -> (u64, Result<String, String>) {
        match read(text.as_bytes()).pop() {
            Some(Inbound::Answer { id, result }) => {
                (id, result.map(|raw| raw.get().to_owned()).map_err(|error| error.message))
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_result_is_kept_to_the_letter() {
        let text = r#" {"jsonrpc":"2.0","id":"3","result":{ "n": 123456789012345678901234567890 }}"#;
        assert_eq!(answer(text), (3, Ok(r#"{ "n": 123456789012345678901234567890 }"#.to_owned())));
        assert_eq!(answer(r#"{"jsonrpc":"2.0","id":7,"result":null}"#), (7, Ok("null".to_owned())));
        assert_eq!(answer(r#"{"result":{},"error":null,"id":7}"#), (7, Ok("{}".to_owned())));
        let half = r#"{"jsonrpc":"2.0","id":1,"result":{"cut":"\ud83d", "whole":"\ud83d\udc4d"}}"#;
        assert_eq!(answer(half).1.unwrap(), r#"{"cut":"\ufffd", "whole":"\ud83d\udc4d"}"#);
    }

    #[test]
    fn an_unreadable_answer_fails_its_request_at_once() {
        for text in [
            r#"{"id":7}"#,
            r#"{"jsonrpc":"2.0","id":7,"result":{"v":NaN}}"#,
            r#"{"id":7,"result":1,"error":{"code":1,"message":""}}"#,
            r#"{"id":7,"error":"no"}"#,
        ] {
            let (id, result) = answer(text);
            assert!(id == 7 && result.is_err(), "{text}");
        }
        let latin_1 = b"{\"jsonrpc\":\"2.0\",\"id\":7,\"result\":\"\xe9\"}";
        assert!(matches!(&read(latin_1)[..], [Inbound::Answer { result: Ok(_), .. }]));
        for noise in [&b"starting up..."[..], b"17", b"", b"null", b"{}", b"[1]", b"{\"id\":{},\"result\":1}"] {
            assert!(read(noise).is_empty());
        }
    }

    #[test]
    fn questions_and_notices_are_told_apart_and_a_batch_is_taken_apart() {
        let seen = read(
            br#"[{"jsonrpc":"2.0","id":1,"result":{}},{"method":"notifications/x"},{"id":"q","method":"ping"},{"id":null}]"#,
        );
        let [Inbound::Answer { .. }, Inbound::Notification { .. }, Inbound::Request { id, method }] = &seen[..] else {
            panic!("{seen:?}")
        };
        assert_eq!(reply(id, method), br#"{"jsonrpc":"2.0","id":"q","result":{}}"#);
        assert!(reply(id, "sampling/createMessage").ends_with(br#"features."}}"#));
    }

    #[test]
    fn the_id_is_found_at_either_end_of_a_cut_message() {
        assert_eq!(id_of_a_part(br#"{"jsonrpc":"2.0","id":12,"result":{"te"#, b"xxx"), Some(12));
        assert_eq!(id_of_a_part(br#"{"result":{"te"#, br#"xt"}]},"jsonrpc":"2.0","id":12}"#), Some(12));
        assert_eq!(id_of_a_part(br#"{"result":{"te"#, br#"xt"}]},"id": "12" , "jsonrpc":"2.0"}"#), Some(12));
        assert_eq!(id_of_a_part(br#"{"jsonrpc":"2.0","method":"m","params":{"te"#, br#"xt"},"id":12}"#), None);
        assert_eq!(id_of_a_part(b"garbage", b"garbage"), None);
    }
}
