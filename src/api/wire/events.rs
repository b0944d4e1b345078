//! What a connect tells, as Letta frames it: `data: {json}` and an empty line, nothing else (CONTRACT row 24).

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use crate::mcp::ConnectEvent;

/// The event as one frame of an event stream.
pub fn frame(event: &ConnectEvent) -> Bytes {
    let json = serde_json::to_string(&Event::from(event)).expect("an event is strings and JSON");
    // No line may end inside a frame. Servers write their JSON over several lines; within strings it has none.
    format!("data: {}\n\n", json.replace(['\r', '\n'], " ")).into()
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    ConnectionAttempt { server_name: &'a str },
    Success { tools: Vec<ListedTool<'a>> },
    Error { message: &'a str },
    OauthRequired { message: &'static str },
    AuthorizationUrl { url: &'a str, session_id: &'a str },
    WaitingForAuth { message: &'static str },
}

impl<'a> From<&'a ConnectEvent> for Event<'a> {
    fn from(event: &'a ConnectEvent) -> Self {
        match event {
            ConnectEvent::ConnectionAttempt { server_name } => Self::ConnectionAttempt { server_name },
            ConnectEvent::Success { tools } => {
                Self::Success { tools: tools.iter().map(|tool| ListedTool(tool)).collect() }
            }
            ConnectEvent::Error { message } => Self::Error { message },
            ConnectEvent::OauthRequired => Self::OauthRequired { message: "OAuth authentication required" },
            ConnectEvent::AuthorizationUrl { url, session_id } => Self::AuthorizationUrl { url, session_id },
            ConnectEvent::WaitingForAuth => Self::WaitingForAuth { message: "Waiting for user authorization..." },
        }
    }
}

/// A tool as its server lists it: Letta's keys in Letta's order, nulls present and `_meta` called `meta`, then what else
/// there is.
struct ListedTool<'a>(&'a RawValue);

/// Letta's key, and MCP's.
const KEYS: [(&str, &str); 7] = [
    ("name", "name"),
    ("title", "title"),
    ("description", "description"),
    ("inputSchema", "inputSchema"),
    ("outputSchema", "outputSchema"),
    ("annotations", "annotations"),
    ("meta", "_meta"),
];

impl Serialize for ListedTool<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Ok(mut given) = serde_json::from_str::<BTreeMap<Cow<'_, str>, &RawValue>>(self.0.get()) else {
            return self.0.serialize(serializer);
        };
        let known = KEYS.map(|(key, of_mcp)| (Cow::Borrowed(key), given.remove(of_mcp)));
        given.retain(|key, _| KEYS.iter().all(|(known, _)| known != key));
        serializer.collect_map(known.into_iter().chain(given.into_iter().map(|(key, value)| (key, Some(value)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(event: &ConnectEvent) -> String {
        String::from_utf8(frame(event).to_vec()).expect("JSON is UTF-8")
    }

    #[test]
    fn every_event_is_one_frame_with_lettas_keys() {
        let raw = |json: &str| RawValue::from_string(json.to_owned()).expect("it is JSON");
        let tools = vec![
            raw(
                "{\"_meta\": {\"a\": 1.0}, \"name\": \"a\\nb\",\r\n \"icons\": [],\n\"inputSchema\": {\"maximum\": 1e400}, \"meta\": 2}",
            ),
            raw("7"),
        ];
        for (event, expected) in [
            (
                ConnectEvent::ConnectionAttempt { server_name: "a\n\ndata: b".into() },
                r#"{"event":"connection_attempt","server_name":"a\n\ndata: b"}"#,
            ),
            (
                ConnectEvent::Success { tools },
                r#"{"event":"success","tools":[{"name":"a\nb","title":null,"description":null,"inputSchema":{"maximum": 1e400},"outputSchema":null,"annotations":null,"meta":{"a": 1.0},"icons":[]},7]}"#,
            ),
            (ConnectEvent::Error { message: "No.".into() }, r#"{"event":"error","message":"No."}"#),
            (ConnectEvent::OauthRequired, r#"{"event":"oauth_required","message":"OAuth authentication required"}"#),
            (
                ConnectEvent::AuthorizationUrl { url: "https://a.test/?b".into(), session_id: "mcp-oauth-1".into() },
                r#"{"event":"authorization_url","url":"https://a.test/?b","session_id":"mcp-oauth-1"}"#,
            ),
            (
                ConnectEvent::WaitingForAuth,
                r#"{"event":"waiting_for_auth","message":"Waiting for user authorization..."}"#,
            ),
        ] {
            assert_eq!(text(&event), format!("data: {expected}\n\n"));
        }
    }
}
