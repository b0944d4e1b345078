//! JSON text as servers write it: without a parsed value in between, numbers keep their digits.

use std::borrow::Cow;

/// The text without the white space between its tokens.
pub fn compact(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    let mut in_string = false;
    let mut escaped = false;
    for character in json.chars() {
        if in_string {
            in_string = escaped || character != '"';
            escaped = !escaped && character == '\\';
        } else if character.is_ascii_whitespace() {
            continue;
        } else {
            in_string = character == '"';
        }
        text.push(character);
    }
    text
}

/// The text with U+FFFD for each half of a surrogate pair. JavaScript writes such halves when it cuts an emoji in two;
/// they are JSON by the letter (RFC 8259 §8.2), but most readers, our callers' among them, refuse the whole text for one.
pub fn mend(json: &str) -> Cow<'_, str> {
    let mut mended = String::new();
    let mut copied = 0;
    let mut at = 0;
    while let Some(found) = json.get(at..).and_then(|rest| rest.find('\\')) {
        let escape = at + found;
        match unit(json, escape) {
            Some(0xd800..=0xdbff) if matches!(unit(json, escape + 6), Some(0xdc00..=0xdfff)) => at = escape + 12,
            Some(0xd800..=0xdfff) => {
                mended.push_str(&json[copied..escape]);
                mended.push_str("\\ufffd");
                at = escape + 6;
                copied = at;
            }
            _ => at = escape + 2,
        }
    }
    if copied == 0 {
        return json.into();
    }
    mended.push_str(&json[copied..]);
    mended.into()
}

/// How deep the arrays and objects of a JSON text nest; 0 for a plain value.
pub fn depth(json: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let mut in_string = false;
    let mut escaped = false;
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// The UTF-16 unit that an escape at this place stands for.
fn unit(json: &str, at: usize) -> Option<u32> {
    let digits = json.get(at..at + 6)?.strip_prefix("\\u")?;
    u32::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_goes_and_digits_stay() {
        let json = "{ \"a b\" : [ 123456789012345678901234567890 , \"\\\" c\" ]\n}";
        assert_eq!(compact(json), "{\"a b\":[123456789012345678901234567890,\"\\\" c\"]}");
    }

    #[test]
    fn depth_counts_what_nests_outside_of_strings() {
        for (json, deep) in [("1", 0), ("[]", 1), (r#"{"a":[{}],"b":"[[[["}"#, 3), (r#"["\\\"[[",[]]"#, 2)] {
            assert_eq!(depth(json), deep, "{json}");
        }
    }

    #[test]
    fn halves_of_pairs_are_mended_and_pairs_are_not() {
        for (json, mended) in [
            (r#""cut \ud83d""#, r#""cut \ufffd""#),
            (r#""\udc4d\ud83d x""#, r#""\ufffd\ufffd x""#),
            (r#""\ud83d\udc4d""#, r#""\ud83d\udc4d""#),
            (r#""\\ud83d é \u00e9""#, r#""\\ud83d é \u00e9""#),
            (r#""\ud83"#, r#""\ud83"#),
        ] {
            assert_eq!(mend(json), mended);
        }
    }
}
