//! A server's list of tools, sorted into what can be kept and what cannot.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::model::{Offered, Skipped, Tool};

use super::json::depth;

/// How many tools of one server are kept.
pub const MAX_TOOLS: usize = 5_000;
/// How many tools that are not kept are named, and the characters of each name.
const MAX_SKIPPED: usize = 1_000;
const MAX_SKIPPED_NAME: usize = 255;
/// What the parts of a tool that is kept may have, in bytes and in levels.
const MAX_SCHEMA_BYTES: usize = 256 * 1024;
const MAX_SCHEMA_DEPTH: usize = 64;
const MAX_TEXT_BYTES: usize = 64 * 1024;

/// The parts of a tool definition that Portolan reads.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Definition {
    pub name: String,
    #[serde(default)]
    pub description: Option<String>,
    pub input_schema: Value,
}

/// The definition of a kept tool.
pub fn definition(tool: &Tool) -> Definition {
    serde_json::from_str(&tool.definition).unwrap_or_else(|_| Definition {
        name: tool.name.clone(),
        description: None,
        input_schema: Value::Object(Map::new()),
    })
}

/// Sorts a server's list into what can be kept and what cannot, with the reason; nothing is lost silently.
pub fn accept(listed: &[Box<RawValue>]) -> (Vec<Offered>, Vec<Skipped>) {
    let mut names = HashSet::new();
    let mut offered = Vec::new();
    let mut skipped = Vec::new();
    for (index, raw) in listed.iter().enumerate() {
        let result = read_tool(raw.get()).and_then(|definition| {
            if offered.len() >= MAX_TOOLS {
                return Err((definition.name, "the server has more than 5,000 tools"));
            }
            if !names.insert(definition.name.clone()) {
                return Err((definition.name, "another tool of this server has the same name"));
            }
            Ok(definition)
        });
        match result {
            Ok(definition) => offered.push(Offered { name: definition.name, definition: raw.get().to_owned() }),
            Err(_) if skipped.len() > MAX_SKIPPED => {}
            Err(_) if skipped.len() == MAX_SKIPPED => {
                skipped.push(Skipped { name: "(more)".to_owned(), reason: "too many to name".to_owned() });
            }
            Err((name, reason)) => {
                let name = match name.chars().count() {
                    0 => format!("(tool {})", index + 1),
                    1..=MAX_SKIPPED_NAME => name,
                    _ => name.chars().take(MAX_SKIPPED_NAME).collect(),
                };
                skipped.push(Skipped { name, reason: reason.to_owned() });
            }
        }
    }
    (offered, skipped)
}

fn read_tool(raw: &str) -> Result<Definition, (String, &'static str)> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let name = serde_json::from_str(raw).map(|Named { name }| name).unwrap_or_default();
    let Ok(value) = serde_json::from_str::<Value>(raw) else {
        return Err((name, "its definition cannot be read: it is nested too deeply, or a number is too large"));
    };
    let refuse = |reason| Err((name.clone(), reason));
    if name.is_empty() || name.contains('\0') {
        return Err((String::new(), "it has no usable name"));
    }
    if !value["inputSchema"].is_object() {
        return refuse("its inputSchema is not an object");
    }
    if !matches!(value.get("description"), None | Some(Value::Null | Value::String(_))) {
        return refuse("its description is not a text");
    }
    if name.len() > MAX_TEXT_BYTES || value["description"].as_str().is_some_and(|text| text.len() > MAX_TEXT_BYTES) {
        return refuse("its name or description is larger than 64 KiB");
    }
    let schema = value["inputSchema"].to_string();
    if raw.len() > MAX_SCHEMA_BYTES + 2 * MAX_TEXT_BYTES || schema.len() > MAX_SCHEMA_BYTES {
        return refuse("its inputSchema is larger than 256 KiB, or its definition than 384 KiB");
    }
    if depth(&schema) > MAX_SCHEMA_DEPTH {
        return refuse("its inputSchema is nested deeper than 64");
    }
    serde_json::from_value(value).map_err(|_| (name, "its definition cannot be read"))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_sorted_into_kept_and_skipped() {
        let list = [
            r#"{"name":"a","inputSchema":{}}"#,
            r#"{"name":"a","inputSchema":{"type":"object"}}"#,
            r#"{"name":"no schema"}"#,
            r#"{"inputSchema":{}}"#,
            r#"{"name":"nul\u0000","inputSchema":{}}"#,
            r#"{"name":"odd","inputSchema":{},"annotations":{"readOnlyHint":"yes"},"icons":7}"#,
            r#"{"name":"number","inputSchema":{},"description":5}"#,
            r#"{"name":"huge","inputSchema":{"maximum":1e400}}"#,
            "17",
        ]
        .map(|raw| RawValue::from_string(raw.to_owned()).unwrap());
        let (offered, skipped) = accept(&list);
        let kept: Vec<_> = offered.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(kept, ["a", "odd"]);
        let skipped: Vec<_> = skipped.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(skipped, ["a", "no schema", "(tool 4)", "(tool 5)", "number", "huge", "(tool 9)"]);
    }

    #[test]
    fn schemas_that_are_too_deep_or_too_large_are_skipped_with_the_reason() {
        let nested = |levels| format!("{}{}{}", r#"{"properties":"#.repeat(levels), "{}", "}".repeat(levels));
        let tool = |schema: String| read_tool(&format!(r#"{{"name":"t","inputSchema":{schema}}}"#)).map(|_| ());
        assert!(tool(nested(62)).is_ok());
        assert_eq!(tool(nested(64)).unwrap_err().1, "its inputSchema is nested deeper than 64");
        assert!(tool(format!(r#"{{"x":"{}"}}"#, "y".repeat(MAX_SCHEMA_BYTES - 100))).is_ok());
        assert!(tool(format!(r#"{{"x":"{}"}}"#, "y".repeat(MAX_SCHEMA_BYTES))).is_err());
    }
}
