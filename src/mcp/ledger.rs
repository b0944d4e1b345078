//! What is known of each tool request on one session: whether it was sent, and its result exactly as the server wrote it.
//!
//! rmcp's typed results drop unknown fields and fail a whole list for one odd tool, so the transports hand every inbound
//! text to the ledger first: the results of `tools/list` and `tools/call` are kept raw here, and rmcp gets a shorter one. Whether a request was sent decides between "never ran" and "may have run" when a session is lost.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use rmcp::model::{ClientJsonRpcMessage, ClientRequest, ErrorData, RequestId, ServerJsonRpcMessage, Tool};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::json::mend;

/// Clones share one ledger. An entry lives from the sending of its request until [`Ledger::close`].
#[derive(Clone, Default)]
pub struct Ledger(Arc<Mutex<HashMap<i64, Entry>>>);

struct Entry {
    method: Method,
    sent: bool,
    result: Option<Box<RawValue>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Method {
    List,
    Call,
}

/// What the ledger knows of a request whose time is over.
pub struct Closed {
    /// At least a part of it may have reached the server.
    pub sent: bool,
    pub result: Option<Box<RawValue>>,
}

/// The parts of an inbound message that say what it answers.
#[derive(Deserialize)]
struct Envelope<'a> {
    id: Option<Id<'a>>,
    #[serde(borrow)]
    method: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    result: Option<&'a RawValue>,
}

/// A null result is a result.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Ours are numbers; some servers send them back as strings.
#[derive(Deserialize)]
#[serde(untagged)]
enum Id<'a> {
    Number(i64),
    Text(#[serde(borrow)] Cow<'a, str>),
    Other(IgnoredAny),
}

impl Id<'_> {
    fn number(&self) -> Option<i64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Text(text) => text.parse().ok(),
            Self::Other(_) => None,
        }
    }
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, HashMap<i64, Entry>> {
        self.0.lock().expect("no code panics while it holds the ledger")
    }

    /// Opens an entry if `message` is a request for tools; to be called before it is sent.
    pub fn open(&self, message: &ClientJsonRpcMessage) {
        let ClientJsonRpcMessage::Request(request) = message else { return };
        let method = match request.request {
            ClientRequest::ListToolsRequest(_) => Method::List,
            ClientRequest::CallToolRequest(_) => Method::Call,
            _ => return,
        };
        if let RequestId::Number(id) = request.id {
            self.entries().insert(id, Entry { method, sent: false, result: None });
        }
    }

    /// Notes that the request's bytes are on their way, or (`false`) that none of them left.
    pub fn mark_sent(&self, id: Option<i64>, sent: bool) {
        let Some(id) = id else { return };
        if let Some(entry) = self.entries().get_mut(&id) {
            entry.sent = sent;
        }
    }

    /// Ends the entry of a request and tells what is known of it.
    pub fn close(&self, id: &RequestId) -> Closed {
        let entry = match id {
            RequestId::Number(id) => self.entries().remove(id),
            RequestId::String(_) => None,
        };
        // No entry: rmcp never handed the request to the transport.
        entry.map_or(Closed { sent: false, result: None }, |entry| Closed { sent: entry.sent, result: entry.result })
    }

    /// Reads one inbound text: what rmcp shall see of it, one message (or several, for a JSON-RPC batch of revision
    /// 2025-03-26). What is no JSON-RPC is dropped, unless it answers one of our requests: that request then fails at
    /// once rather than at its deadline.
    pub fn read(&self, text: &[u8]) -> Vec<ServerJsonRpcMessage> {
        // A wrong byte in one text block must not cost the message.
        let text = String::from_utf8_lossy(text);
        let text = text.as_bytes();
        if text.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
            let parts: Vec<&RawValue> = serde_json::from_slice(text).unwrap_or_default();
            return parts.into_iter().filter_map(|part| self.read_one(part.get().as_bytes())).collect();
        }
        self.read_one(text).into_iter().collect()
    }

    fn read_one(&self, text: &[u8]) -> Option<ServerJsonRpcMessage> {
        let envelope: Option<Envelope<'_>> = serde_json::from_slice(text).ok();
        let answers = envelope.as_ref().filter(|envelope| envelope.method.is_none());
        let id = answers.and_then(|envelope| envelope.id.as_ref()?.number());
        if let (Some(id), Some(result)) = (id, answers.and_then(|envelope| envelope.result))
            && let Some(method) = self.keep(id, result)
        {
            // Tools that are only just readable alone may nest too deeply inside a message.
            let message = serde_json::from_str(&thin(id, method, result));
            return message.or_else(|_| serde_json::from_str(&thin(id, Method::Call, result))).ok();
        }
        match serde_json::from_slice(text) {
            Ok(message) => Some(message),
            Err(_) => {
                tracing::debug!(message.bytes = text.len(), "dropped a message that is no JSON-RPC 2.0");
                let unreadable = ErrorData::internal_error("The server's answer is no JSON-RPC 2.0.", None);
                let id = id.or_else(|| id_of(text)).filter(|id| self.entries().contains_key(id))?;
                Some(ServerJsonRpcMessage::error(unreadable, Some(RequestId::Number(id))))
            }
        }
    }

    /// As [`Ledger::read`] for one text that rmcp parses itself: a result that is kept is replaced by what rmcp needs.
    pub fn thin(&self, text: String) -> String {
        let Ok(envelope) = serde_json::from_str::<Envelope<'_>>(&text) else { return text };
        let (None, Some(id), Some(result)) =
            (envelope.method, envelope.id.as_ref().and_then(Id::number), envelope.result)
        else {
            return text;
        };
        match self.keep(id, result) {
            Some(method) => {
                let message = thin(id, method, result);
                let readable = serde_json::from_str::<ServerJsonRpcMessage>(&message).is_ok();
                if readable { message } else { thin(id, Method::Call, result) }
            }
            None => text,
        }
    }

    /// Keeps the first result of an open request; a second one is a replay and changes nothing. `None` when no such
    /// request is open.
    fn keep(&self, id: i64, result: &RawValue) -> Option<Method> {
        let mut entries = self.entries();
        let entry = entries.get_mut(&id)?;
        if entry.result.is_none() {
            entry.result = Some(match mend(result.get()) {
                Cow::Borrowed(_) => result.to_owned(),
                Cow::Owned(mended) => RawValue::from_string(mended).unwrap_or_else(|_| result.to_owned()),
            });
        }
        Some(entry.method)
    }
}

/// The answer that rmcp gets in place of a kept one.
fn thin(id: i64, method: Method, result: &RawValue) -> String {
    let result = match method {
        Method::List => readable_tools(result),
        Method::Call => "{}".to_owned(),
    };
    format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{result}}}"#)
}

/// The tools of a list that rmcp can read: it learns from them which arguments a server wants as header fields.
fn readable_tools(result: &RawValue) -> String {
    #[derive(Deserialize)]
    struct Page<'a> {
        #[serde(borrow)]
        tools: Vec<&'a RawValue>,
    }
    let page: Option<Page<'_>> = serde_json::from_str(result.get()).ok();
    let tools = page.map(|page| page.tools).unwrap_or_default();
    let readable = tools.into_iter().map(RawValue::get).filter(|tool| serde_json::from_str::<Tool>(tool).is_ok());
    format!(r#"{{"tools":[{}]}}"#, readable.collect::<Vec<_>>().join(","))
}

/// The id of an answer that breaks off being JSON somewhere behind it.
fn id_of(text: &[u8]) -> Option<i64> {
    /// Reads the keys of an object in turn; what was found stays found when the rest fails.
    struct Keys<'a>(&'a mut Option<i64>);

    impl<'de> Visitor<'de> for Keys<'_> {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a JSON-RPC message")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while let Some(key) = map.next_key::<String>()? {
                match key.as_str() {
                    "id" => *self.0 = map.next_value::<Id<'_>>()?.number(),
                    _ => drop(map.next_value::<IgnoredAny>()?),
                }
            }
            Ok(())
        }
    }

    let mut id = None;
    // Only what stands before the fault matters.
    let _ = serde_json::Deserializer::from_slice(text).deserialize_map(Keys(&mut id));
    id
}

/// The number of a request, for [`Ledger::mark_sent`]; other messages have none.
pub fn request_number(message: &ClientJsonRpcMessage) -> Option<i64> {
    match message {
        ClientJsonRpcMessage::Request(request) => match request.id {
            RequestId::Number(id) => Some(id),
            RequestId::String(_) => None,
        },
        _ => None,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use rmcp::model::{CallToolRequest, CallToolRequestParams};

    fn ledger_with_call(id: i64) -> Ledger {
        let ledger = Ledger::default();
        let request = ClientRequest::CallToolRequest(CallToolRequest::new(CallToolRequestParams::new("t")));
        ledger.open(&ClientJsonRpcMessage::request(request, RequestId::Number(id)));
        ledger
    }

    fn raw(ledger: &Ledger, id: i64) -> Option<String> {
        ledger.close(&RequestId::Number(id)).result.map(|raw| raw.get().to_owned())
    }

    #[test]
    fn a_result_is_kept_to_the_letter_and_rmcp_sees_an_empty_one() {
        let ledger = ledger_with_call(3);
        let seen = ledger.read(br#" {"jsonrpc":"2.0","id":"3","result":{ "n": 123456789012345678901234567890 }}"#);
        assert!(matches!(&seen[..], [ServerJsonRpcMessage::Response(answer)] if answer.id == RequestId::Number(3)));
        assert_eq!(raw(&ledger, 3).unwrap(), r#"{ "n": 123456789012345678901234567890 }"#);
    }

    #[test]
    fn half_a_surrogate_pair_is_the_one_thing_that_is_mended() {
        let ledger = ledger_with_call(1);
        ledger.read(br#"{"jsonrpc":"2.0","id":1,"result":{"cut":"\ud83d", "whole":"\ud83d\udc4d"}}"#);
        assert_eq!(raw(&ledger, 1).unwrap(), r#"{"cut":"\ufffd", "whole":"\ud83d\udc4d"}"#);
    }

    #[test]
    fn a_replay_does_not_change_a_result() {
        let ledger = ledger_with_call(1);
        ledger.thin(r#"{"jsonrpc":"2.0","id":1,"result":{"first":1}}"#.to_owned());
        ledger.thin(r#"{"jsonrpc":"2.0","id":1,"result":{"second":1}}"#.to_owned());
        assert_eq!(raw(&ledger, 1).unwrap(), r#"{"first":1}"#);
    }

    #[test]
    fn thinned_text_is_still_an_answer_for_rmcp() {
        let ledger = ledger_with_call(1);
        let text = ledger.thin(r#"{"jsonrpc":"2.0","id":1,"result":{"content":[]}}"#.to_owned());
        assert!(matches!(serde_json::from_str(&text).unwrap(), ServerJsonRpcMessage::Response(_)));
        let other = r#"{"jsonrpc":"2.0","id":2,"result":{"content":[]}}"#;
        assert_eq!(ledger.thin(other.to_owned()), other, "an answer to nobody passes as it is");
    }

    #[test]
    fn one_odd_tool_does_not_cost_the_list() {
        let ledger = Ledger::default();
        let request = ClientRequest::ListToolsRequest(rmcp::model::ListToolsRequest::default());
        ledger.open(&ClientJsonRpcMessage::request(request, RequestId::Number(1)));
        let deep = format!("{}1{}", "[".repeat(300), "]".repeat(300));
        let odd = [r#"{"name":5}"#, r#"{"maximum":1e400}"#, r#""\ud83d""#, &deep].join(",");
        let text =
            format!(r#"{{"jsonrpc":"2.0","id":1,"result":{{"tools":[{odd},{{"name":"a","inputSchema":{{}}}}]}}}}"#);
        let seen = ledger.read(text.as_bytes());
        let [ServerJsonRpcMessage::Response(answer)] = &seen[..] else { panic!("{seen:?}") };
        let rmcp::model::ServerResult::ListToolsResult(list) = &answer.result else { panic!("{answer:?}") };
        assert_eq!(list.tools.len(), 1);
        assert!(raw(&ledger, 1).unwrap().contains("1e400"));
    }

    #[test]
    fn an_unreadable_answer_fails_its_request_at_once() {
        let ledger = ledger_with_call(7);
        let seen = ledger.read(br#"{"id":7}"#);
        assert!(matches!(&seen[..], [ServerJsonRpcMessage::Error(error)] if error.id == Some(RequestId::Number(7))));
        let not_json = b"{\"jsonrpc\":\"2.0\",\"id\":7,\"result\":{\"v\":NaN}}";
        assert!(matches!(&ledger.read(not_json)[..], [ServerJsonRpcMessage::Error(_)]));
        let latin_1 = b"{\"jsonrpc\":\"2.0\",\"id\":7,\"result\":\"\xe9\"}";
        assert!(matches!(&ledger.read(latin_1)[..], [ServerJsonRpcMessage::Response(_)]));
        for noise in [&b"starting up..."[..], b"{\"id\":8,\"result\":NaN}", b"17", b""] {
            assert!(ledger.read(noise).is_empty());
        }
    }

    #[test]
    fn a_null_result_is_a_result() {
        let ledger = ledger_with_call(7);
        assert_eq!(ledger.read(br#"{"jsonrpc":"2.0","id":7,"result":null}"#).len(), 1);
        assert_eq!(raw(&ledger, 7).unwrap(), "null");
    }

    #[test]
    fn a_batch_is_taken_apart() {
        let ledger = ledger_with_call(1);
        let seen = ledger.read(
            br#"[{"jsonrpc":"2.0","id":1,"result":{}},{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}]"#,
        );
        assert_eq!(seen.len(), 2);
        assert_eq!(raw(&ledger, 1).unwrap(), "{}");
    }
}
