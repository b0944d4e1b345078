//! Which arguments of a call a server wants as HTTP header fields, too: `x-mcp-header` in a tool's inputSchema (MCP
//! 2026-07-28, streamable HTTP, standard headers).

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::{HeaderName, HeaderValue};
use serde_json::{Map, Value};

/// The key of an annotation; a definition without it mirrors nothing.
pub const ANNOTATION: &str = "x-mcp-header";
pub const PREFIX: &str = "mcp-param-";
/// How deep properties are looked at.
const MAX_DEPTH: usize = 64;

/// The header fields for `arguments`. An annotation that is no valid field name, or an argument that is no plain value,
/// makes no field.
pub fn fields(input_schema: &Value, arguments: &Map<String, Value>) -> Vec<(HeaderName, HeaderValue)> {
    let mut found = Vec::new();
    if let Some(properties) = input_schema.get("properties").and_then(Value::as_object) {
        collect(properties, arguments, MAX_DEPTH, &mut found);
    }
    found
}

fn collect(
    properties: &Map<String, Value>,
    arguments: &Map<String, Value>,
    depth: usize,
    found: &mut Vec<(HeaderName, HeaderValue)>,
) {
    for (name, schema) in properties {
        let Some(argument) = arguments.get(name) else { continue };
        if let Some(header) = schema.get(ANNOTATION).and_then(Value::as_str)
            && let Ok(field) = HeaderName::from_bytes(format!("{PREFIX}{header}").as_bytes())
            && let Some(value) = text(argument)
            && !header.is_empty()
        {
            found.push((field, encode(&value)));
        }
        let inner = schema.get("properties").and_then(Value::as_object);
        if let (Some(properties), Some(arguments), 1..) = (inner, argument.as_object(), depth) {
            collect(properties, arguments, depth - 1, found);
        }
    }
}

fn text(argument: &Value) -> Option<String> {
    match argument {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(argument.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A value that would not pass as it is goes as `=?base64?…?=`: one with other than visible ASCII in it, with white space
/// at an end, or one that looks so encoded already.
pub fn encode(value: &str) -> HeaderValue {
    let plain = value.bytes().all(|byte| (0x20..=0x7e).contains(&byte));
    let trimmed = value.trim_matches([' ', '\t']).len() == value.len();
    let looks_encoded = value.starts_with("=?base64?") && value.ends_with("?=");
    let encoded = if plain && trimmed && !looks_encoded {
        HeaderValue::from_str(value)
    } else {
        HeaderValue::from_str(&format!("=?base64?{}?=", BASE64_STANDARD.encode(value)))
    };
    encoded.expect("visible ASCII and base64 are valid header values")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn annotated_arguments_become_fields() {
        let schema = json!({"properties": {
            "tenant": {"type": "string", "x-mcp-header": "Tenant"},
            "count": {"type": "integer", "x-mcp-header": "Count"},
            "inner": {"properties": {"flag": {"type": "boolean", "x-mcp-header": "Flag"}}},
            "absent": {"x-mcp-header": "Absent"},
            "bad": {"x-mcp-header": "not a token"},
            "list": {"x-mcp-header": "List"},
            "empty": {"x-mcp-header": ""},
        }});
        let arguments =
            json!({"tenant": "blé", "count": 5, "inner": {"flag": true}, "bad": "x", "list": [], "empty": ""});
        let fields = fields(&schema, arguments.as_object().unwrap_or(&Map::new()));
        let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap_or(""))).collect();
        let expected =
            [("mcp-param-tenant", "=?base64?YmzDqQ==?="), ("mcp-param-count", "5"), ("mcp-param-flag", "true")];
        assert_eq!(fields, expected);
    }

    #[test]
    fn only_what_needs_it_is_encoded() {
        for (value, encoded) in
            [("a b", "a b"), (" a", "=?base64?IGE=?="), ("=?base64?IGE=?=", "=?base64?PT9iYXNlNjQ/SUdFPT89?=")]
        {
            assert_eq!(encode(value), encoded);
        }
    }
}
