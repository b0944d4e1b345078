//! Trace context, the W3C recommendation (levels 1 and 2): which trace a request belongs to, as `traceparent` and
//! `tracestate` say it. What is not exactly in their grammar is ignored, as the recommendation has it: a wrong one never
//! fails a request.

use std::collections::HashSet;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use crate::model::hex;

pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Trace flags (level 2, section 3.2.2.5): this trace is recorded; its id is random. Others have no meaning yet and are not
/// passed on.
pub const SAMPLED: u8 = 0b01;
pub const RANDOM: u8 = 0b10;

/// The most members of a `tracestate`, and the most bytes of it that are passed on; longer ones lose their last members
/// (level 1, section 3.3.1.5).
const MAX_MEMBERS: usize = 32;
const MAX_STATE: usize = 512;

pub type TraceId = [u8; 16];
pub type SpanId = [u8; 8];

/// A caller's place in a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceContext {
    pub trace: TraceId,
    /// The caller's own span.
    pub span: SpanId,
    pub flags: u8,
    /// What other vendors keep with the trace; empty when there is none.
    pub state: Arc<str>,
}

impl TraceContext {
    /// What a request's header fields say; `None` without a `traceparent`, with several, and with one that is not valid.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut given = headers.get_all(TRACEPARENT).iter();
        let (Some(parent), None) = (given.next(), given.next()) else { return None };
        let (trace, span, flags) = read_parent(parent.as_bytes())?;
        let state = headers.get_all(TRACESTATE).iter().map(HeaderValue::to_str).collect::<Result<Vec<_>, _>>();
        let state = state.ok().and_then(|state| read_state(&state.join(","))).unwrap_or_default();
        Some(Self { trace, span, flags, state: state.into() })
    }

    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// The header fields by which the next one in the trace knows it.
    pub fn fields(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let field = |text: &str| HeaderValue::from_str(text).expect("it was read from a field, or is hexadecimal");
        let state = (!self.state.is_empty()).then(|| (TRACESTATE, field(&self.state)));
        [(TRACEPARENT, field(&self.parent()))].into_iter().chain(state)
    }

    /// The same as members of an object, in JSON without its braces (MCP 2026-07-28, `_meta`; SEP-414).
    pub fn members(&self) -> String {
        let mut members = format!(r#""traceparent":"{}""#, self.parent());
        if !self.state.is_empty() {
            members += &format!(r#","tracestate":{}"#, Value::from(&*self.state));
        }
        members
    }

    fn parent(&self) -> String {
        format!("00-{}-{}-{:02x}", hex(&self.trace), hex(&self.span), self.flags)
    }
}

/// Ids and flags of a `traceparent` (level 1, section 3.2). Of a version to come the parts are read that are known now.
fn read_parent(text: &[u8]) -> Option<(TraceId, SpanId, u8)> {
    let parts: Vec<_> = text.splitn(5, |byte| *byte == b'-').collect();
    let (version, trace, span, flags, rest) = match parts[..] {
        [version, trace, span, flags] => (version, trace, span, flags, false),
        [version, trace, span, flags, _] => (version, trace, span, flags, true),
        _ => return None,
    };
    let ([version], [flags]) = (from_hex::<1>(version)?, from_hex::<1>(flags)?);
    if version == 0xff || (version == 0 && rest) {
        return None;
    }
    let (trace, span) = (from_hex::<16>(trace)?, from_hex::<8>(span)?);
    (trace != [0; 16] && span != [0; 8]).then_some((trace, span, flags & (SAMPLED | RANDOM)))
}

/// So many bytes in lower-case hexadecimal, and nothing else.
fn from_hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// A `tracestate` in one line (level 1, section 3.3.1); `None` when any of it is wrong.
fn read_state(text: &str) -> Option<String> {
    let members: Vec<_> =
        text.split(',').map(|member| member.trim_matches([' ', '\t'])).filter(|member| !member.is_empty()).collect();
    let mut keys = HashSet::new();
    let is_valid = |member: &&str| {
        member.split_once('=').is_some_and(|(key, value)| is_key(key) && is_value(value) && keys.insert(key.to_owned()))
    };
    if members.len() > MAX_MEMBERS || !members.iter().all(is_valid) {
        return None;
    }
    let mut state = String::new();
    for member in members {
        let comma = usize::from(!state.is_empty());
        if state.len() + comma + member.len() > MAX_STATE {
            break;
        }
        if comma > 0 {
            state.push(',');
        }
        state.push_str(member);
    }
    Some(state)
}

/// Level 2, section 3.3.1.3.1; what level 1 allows is among it.
fn is_key(key: &str) -> bool {
    let is_first = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_next = |byte: u8| is_first(byte) || matches!(byte, b'_' | b'-' | b'*' | b'/' | b'@');
    key.len() <= 256 && key.bytes().next().is_some_and(is_first) && key.bytes().all(is_next)
}

/// Visible ASCII and spaces but `,` and `=`, not empty, no space at the end (level 1, section 3.3.1.3.2).
fn is_value(value: &str) -> bool {
    let is_allowed = |byte: u8| matches!(byte, 0x20..=0x7e) && !matches!(byte, b',' | b'=');
    (1..=256).contains(&value.len()) && value.bytes().all(is_allowed) && !value.ends_with(' ')
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn of(fields: &[(&'static str, &str)]) -> Option<TraceContext> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        TraceContext::of(&headers)
    }

    fn state(text: &str) -> String {
        of(&[("traceparent", PARENT), ("tracestate", text)]).unwrap().state.to_string()
    }

    #[test]
    fn a_valid_context_is_read_and_written_as_it_was() {
        let context = of(&[("traceparent", PARENT), ("tracestate", "rojo=00f067aa0ba902b7,congo=t61r\"\\")]).unwrap();
        assert!(context.is_sampled());
        let fields: Vec<_> = context.fields().map(|(_, value)| value.to_str().unwrap().to_owned()).collect();
        assert_eq!(fields, [PARENT, "rojo=00f067aa0ba902b7,congo=t61r\"\\"]);
        let members: Value = serde_json::from_str(&format!("{{{}}}", context.members())).unwrap();
        assert_eq!(members["traceparent"], PARENT);
        assert_eq!(members["tracestate"], "rojo=00f067aa0ba902b7,congo=t61r\"\\");
    }

    #[test]
    fn flags_without_a_meaning_are_not_passed_on_and_later_versions_are_understood() {
        let flags = |parent: &str| of(&[("traceparent", parent)]).map(|context| context.flags);
        let id = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        assert_eq!(flags(&format!("00-{id}-00")), Some(0));
        assert_eq!(flags(&format!("00-{id}-03")), Some(3));
        assert_eq!(flags(&format!("00-{id}-ff")), Some(3));
        assert_eq!(flags(&format!("cc-{id}-01")), Some(1));
        assert_eq!(flags(&format!("cc-{id}-01-what-the-future-will-be-like")), Some(1));
    }

    #[test]
    fn garbage_is_ignored() {
        for parent in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47366-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "0x-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01,00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "é",
        ] {
            assert_eq!(of(&[("traceparent", parent)]), None, "{parent}");
        }
        assert_eq!(of(&[("traceparent", PARENT), ("traceparent", PARENT)]), None);
        assert_eq!(of(&[("tracestate", "a=1")]), None);
    }

    #[test]
    fn a_wrong_tracestate_costs_the_state_alone() {
        for wrong in ["a", "a=", "A=1", "=1", "a=1,a=2", "a=1=2", "@a=1", "_a=1", "a=é", "a b=1"] {
            assert_eq!(state(wrong), "", "{wrong}");
        }
        assert_eq!(state(&(0..33).map(|n| format!("a{n}=1")).collect::<Vec<_>>().join(",")), "");
        assert_eq!(state(&format!("{}=1", "a".repeat(257))), "");
        assert_eq!(state(&format!("a={}", "1".repeat(257))), "");
        for right in ["a=1", "0a=1", "a_-*/0=1", "tenant@system=1", "a=1,b=2", "a= 1", "a=b c"] {
            assert_eq!(state(right), right);
        }
        assert_eq!(state(" a=1 ,\t, b=2,"), "a=1,b=2");
        assert_eq!(state(""), "");
    }

    #[test]
    fn several_fields_are_one_state_and_a_long_one_loses_its_end() {
        let two = of(&[("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]).unwrap();
        assert_eq!(&*two.state, "a=1,b=2");
        let long = (0..5).map(|n| format!("a{n}={}", "1".repeat(200))).collect::<Vec<_>>();
        assert_eq!(state(&long.join(",")), long[..2].join(","));
    }
}
