//! A tool's result as one text.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{compact, depth};

/// How deep a result may nest; most readers of JSON, our callers' among them, go no deeper.
const MAX_DEPTH: usize = 128;

/// A tool result as Letta shows it: one text, and whether the tool says it failed (CONTRACT row 13).
pub struct ToolResult {
    pub is_error: bool,
    pub text: String,
}

/// Why an answer is no tool result that can be passed on.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Unfit {
    #[error("The server's answer is not a tool result.")]
    Shape,
    #[error("The server's answer is nested deeper than {MAX_DEPTH} levels.")]
    Depth,
}

impl ToolResult {
    /// Text blocks joined by one space, other blocks as compact JSON; without blocks the structured content as compact
    /// JSON.
    pub fn read(raw: &RawValue) -> Result<Self, Unfit> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct CallToolResult<'a> {
            #[serde(borrow)]
            content: Option<Vec<&'a RawValue>>,
            #[serde(borrow)]
            structured_content: Option<&'a RawValue>,
            is_error: Option<bool>,
        }
        // serde would take an array of three for the struct, too.
        let object = Some(raw.get()).filter(|text| text.starts_with('{')).ok_or(Unfit::Shape)?;
        let result: CallToolResult<'_> = serde_json::from_str(object).map_err(|_| Unfit::Shape)?;
        if depth(object) > MAX_DEPTH {
            return Err(Unfit::Depth);
        }
        let blocks: Vec<_> = result.content.iter().flatten().map(|block| block_text(block)).collect();
        let text = match (&blocks[..], result.structured_content) {
            ([], Some(structured)) => compact(structured.get()),
            ([], None) => "Empty response from tool".to_owned(),
            (blocks, _) => blocks.join(" "),
        };
        Ok(Self { is_error: result.is_error.unwrap_or(false), text })
    }
}

fn block_text(block: &RawValue) -> String {
    #[derive(Deserialize)]
    struct TextBlock {
        r#type: String,
        text: String,
    }
    match serde_json::from_str::<TextBlock>(block.get()) {
        Ok(TextBlock { r#type, text }) if r#type == "text" => text,
        _ => compact(block.get()),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn answer(result: &str) -> (bool, String) {
        let raw = RawValue::from_string(result.to_owned()).unwrap();
        let answer = ToolResult::read(&raw).unwrap();
        (answer.is_error, answer.text)
    }

    #[test]
    fn results_become_one_text() {
        for (result, text) in [
            (
                r#"{"content":[{"type":"text","text":"one"},{"type":"text","text":"two\nlines"},{"type":"text","text":""}]}"#,
                "one two\nlines ",
            ),
            (
                r#"{"content":[{"type":"text","text":"pic:"},{ "type": "image", "data": "a\"  b" }]}"#,
                r#"pic: {"type":"image","data":"a\"  b"}"#,
            ),
            (
                r#"{"content":[],"structuredContent":{ "n": 123456789012345678901234567890 }}"#,
                r#"{"n":123456789012345678901234567890}"#,
            ),
            (r#"{"content":[]}"#, "Empty response from tool"),
            (r#"{}"#, "Empty response from tool"),
        ] {
            assert_eq!(answer(result), (false, text.to_owned()), "{result}");
        }
        assert_eq!(answer(r#"{"isError":true,"content":[{"type":"text","text":"no"}]}"#), (true, "no".to_owned()));
    }

    #[test]
    fn what_is_no_tool_result_is_not_taken_for_one() {
        for result in ["null", "\"text\"", "[]", "[null,null,null]", r#"{"content":"text"}"#, r#"{"isError":"yes"}"#] {
            let raw = RawValue::from_string(result.to_owned()).unwrap();
            assert_eq!(ToolResult::read(&raw).err(), Some(Unfit::Shape), "{result}");
        }
        let nested =
            |levels| format!(r#"{{"content":[],"structuredContent":{}{}}}"#, "[".repeat(levels), "]".repeat(levels));
        let read = |json: String| ToolResult::read(&RawValue::from_string(json).unwrap()).err();
        assert_eq!((read(nested(127)), read(nested(128))), (None, Some(Unfit::Depth)));
    }
}
