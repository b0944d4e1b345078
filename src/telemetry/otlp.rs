//! Spans as OTLP has them: an `ExportTraceServiceRequest` of opentelemetry-proto 1.x, in protobuf. It is the one message
//! that Portolan writes, and its fields are never taken away or renumbered (OTLP 1.0 is stable).

use super::context::{SpanId, TraceId};

/// Who the parts of a trace are to each other (`Span.SpanKind`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Server = 2,
    Client = 3,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Text(String),
    Flag(bool),
    Number(i64),
}

/// A span that has ended.
#[derive(Clone, Debug)]
pub struct Record {
    pub trace: TraceId,
    pub span: SpanId,
    pub parent: Option<SpanId>,
    /// The parent is somebody else's.
    pub is_remote: bool,
    pub flags: u8,
    pub state: std::sync::Arc<str>,
    pub name: String,
    pub kind: Kind,
    /// Nanoseconds since 1970.
    pub start: u64,
    pub end: u64,
    pub attributes: Vec<(&'static str, Value)>,
    pub is_error: bool,
}

/// `Status.STATUS_CODE_ERROR`.
const STATUS_ERROR: u64 = 2;
/// `SpanFlags`: whether the parent is remote is known; it is.
const HAS_IS_REMOTE: u32 = 0x100;
const IS_REMOTE: u32 = 0x200;

/// One request with these spans, all of the program that `resource` describes.
pub fn request(resource: &[(&'static str, Value)], spans: &[Record]) -> Vec<u8> {
    let mut scope_spans = Message::default();
    scope_spans.message(1, &{
        let mut scope = Message::default();
        scope.text(1, env!("CARGO_PKG_NAME"));
        scope.text(2, env!("CARGO_PKG_VERSION"));
        scope
    });
    for span in spans {
        scope_spans.message(2, &encode(span));
    }
    let mut described = Message::default();
    described.attributes(1, resource);
    let mut resource_spans = Message::default();
    resource_spans.message(1, &described);
    resource_spans.message(2, &scope_spans);
    let mut request = Message::default();
    request.message(1, &resource_spans);
    request.0
}

fn encode(record: &Record) -> Message {
    let mut span = Message::default();
    span.bytes(1, &record.trace);
    span.bytes(2, &record.span);
    span.text(3, &record.state);
    if let Some(parent) = &record.parent {
        span.bytes(4, parent);
    }
    span.text(5, &record.name);
    span.number(6, record.kind as u64);
    span.fixed64(7, record.start);
    span.fixed64(8, record.end);
    span.attributes(9, &record.attributes);
    if record.is_error {
        let mut status = Message::default();
        status.number(3, STATUS_ERROR);
        span.message(15, &status);
    }
    let remote = if record.is_remote { IS_REMOTE } else { 0 };
    span.fixed32(16, u32::from(record.flags) | HAS_IS_REMOTE | remote);
    span
}

/// A protobuf message under construction (protobuf.dev, encoding).
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn tag(&mut self, field: u64, wire_type: u64) {
        self.varint(field << 3 | wire_type);
    }

    fn number(&mut self, field: u64, number: u64) {
        self.tag(field, 0);
        self.varint(number);
    }

    fn fixed64(&mut self, field: u64, number: u64) {
        self.tag(field, 1);
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn fixed32(&mut self, field: u64, number: u32) {
        self.tag(field, 5);
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.tag(field, 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    /// An empty text is one that is not there.
    fn text(&mut self, field: u64, text: &str) {
        if !text.is_empty() {
            self.bytes(field, text.as_bytes());
        }
    }

    fn message(&mut self, field: u64, message: &Self) {
        self.bytes(field, &message.0);
    }

    fn attributes(&mut self, field: u64, attributes: &[(&'static str, Value)]) {
        for (key, value) in attributes {
            let mut any = Self::default();
            match value {
                // One of several: it is there, be it empty.
                Value::Text(text) => any.bytes(1, text.as_bytes()),
                Value::Flag(flag) => any.number(2, u64::from(*flag)),
                // Two's complement, in ten bytes when it is negative.
                Value::Number(number) => any.number(3, *number as u64),
            }
            let mut pair = Self::default();
            pair.text(1, key);
            pair.message(2, &any);
            self.message(field, &pair);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
    use prost::Message as _;

    use super::*;

    #[test]
    fn what_is_written_is_what_the_official_messages_read() {
        let record = Record {
            trace: [1; 16],
            span: [2; 8],
            parent: Some([3; 8]),
            is_remote: true,
            flags: 1,
            state: "a=1".into(),
            name: "n".repeat(300),
            kind: Kind::Client,
            start: u64::MAX - 1,
            end: u64::MAX,
            attributes: vec![
                ("text", Value::Text("é".to_owned())),
                ("empty", Value::Text(String::new())),
                ("no", Value::Flag(false)),
                ("number", Value::Number(-1)),
                ("large", Value::Number(i64::MAX)),
            ],
            is_error: true,
        };
        let root = Record { parent: None, is_remote: false, is_error: false, kind: Kind::Server, ..record.clone() };
        let bytes = request(&[("service.name", Value::Text("portolan".to_owned()))], &[record, root]);
        let mut read = ExportTraceServiceRequest::decode(&*bytes).unwrap();
        let resource = read.resource_spans.remove(0);
        assert_eq!(resource.resource.unwrap().attributes[0].key, "service.name");
        let scope = &resource.scope_spans[0];
        assert_eq!(scope.scope.as_ref().unwrap().name, "portolan");
        let [span, root] = &scope.spans[..] else { panic!("two spans") };
        assert_eq!((&*span.trace_id, &*span.span_id, &*span.parent_span_id), (&[1; 16][..], &[2; 8][..], &[3; 8][..]));
        assert_eq!((&*span.trace_state, span.name.len(), span.kind, span.flags), ("a=1", 300, 3, 0x301));
        assert_eq!((span.start_time_unix_nano, span.end_time_unix_nano), (u64::MAX - 1, u64::MAX));
        let values: Vec<_> = span.attributes.iter().map(|pair| pair.value.clone().unwrap().value.unwrap()).collect();
        let text = |text: &str| Any::StringValue(text.to_owned());
        assert_eq!(values, [text("é"), text(""), Any::BoolValue(false), Any::IntValue(-1), Any::IntValue(i64::MAX)]);
        assert_eq!(span.status.as_ref().unwrap().code, 2);
        assert!(root.parent_span_id.is_empty() && root.status.is_none());
        assert_eq!((root.kind, root.flags), (2, 0x101));
    }
}
