//! From the bytes of a file to plain JSON: VS Code writes comments and trailing commas, Windows a byte order mark.

/// The text with spaces in place of comments and of commas before a closing bracket, so that every line and column stays
/// what it was. Whether the rest is JSON is for whoever reads it.
///
/// # Errors
/// One sentence, with the place of what is no UTF-8.
pub fn plain_json(file: &[u8]) -> Result<Vec<u8>, String> {
    if let Err(error) = std::str::from_utf8(file) {
        let before = &file[..error.valid_up_to()];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
        return Err(format!("The file is not UTF-8 (line {line} column {column})."));
    }
    let mut text = file.strip_prefix(b"\xef\xbb\xbf").unwrap_or(file).to_vec();
    if text.trim_ascii().is_empty() {
        return Err("The file is empty.".to_owned());
    }
    blank(&mut text);
    Ok(text)
}

fn blank(text: &mut [u8]) {
    // The last byte that is neither space nor comment.
    let mut last = 0;
    // A comma behind a value, which only a closing bracket makes one too many.
    let mut comma = None;
    // No comment ends from here on: looked for again and again, the end would take quadratic time.
    let mut endless = false;
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        let end = match (byte, text.get(at + 1)) {
            (b'"', _) => string_end(text, at),
            (b'/', Some(b'/')) => {
                text[at..].iter().position(|byte| *byte == b'\n').map_or(text.len(), |more| at + more)
            }
            // One that does not end stays, and is no JSON.
            (b'/', Some(b'*')) if !endless => {
                let end = text[at + 2..].windows(2).position(|pair| pair == b"*/");
                endless = end.is_none();
                end.map_or(at + 1, |more| at + 2 + more + 2)
            }
            _ => at + 1,
        };
        if byte == b'/' && end > at + 1 {
            text[at..end].iter_mut().filter(|byte| !matches!(byte, b'\n' | b'\r')).for_each(|byte| *byte = b' ');
        } else if !byte.is_ascii_whitespace() {
            if let (b']' | b'}', Some(comma)) = (byte, comma) {
                text[comma] = b' ';
            }
            comma = (byte == b',' && !matches!(last, b'[' | b'{' | b',' | b':' | 0)).then_some(at);
            last = byte;
        }
        at = end;
    }
}

/// Behind the string that begins at `start`.
fn string_end(text: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while let Some(byte) = text.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    text.len()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn comments_and_trailing_commas_leave_every_place_where_it_was() {
        for (text, plain) in [
            ("{\"a\": 1, // c, }\n}", "{\"a\": 1         \n}"),
            ("{/* \n ] */\"a\": [1, 2, ],}", "{   \n     \"a\": [1, 2  ] }"),
            (r#"{"u": "https://h//x", "e": "\"/*", "s": ",}"}"#, r#"{"u": "https://h//x", "e": "\"/*", "s": ",}"}"#),
            ("\u{feff}{}", "{}"),
            ("{}//", "{}  "),
            // No JSON before, no JSON after.
            ("[,]", "[,]"),
            ("[1,,]", "[1,,]"),
            ("{,}", "{,}"),
            ("{\"a\":,}", "{\"a\":,}"),
            ("{} /* ", "{} /* "),
            ("\"open", "\"open"),
            ("\"open\\", "\"open\\"),
        ] {
            assert_eq!(String::from_utf8(plain_json(text.as_bytes()).unwrap()).unwrap(), plain, "{text}");
        }
        // In quadratic time this would not end.
        let endless = "/*a".repeat(1024 * 1024 / 3);
        assert_eq!(plain_json(endless.as_bytes()).unwrap(), endless.as_bytes());
        assert_eq!(plain_json(b"{\n \"a\": \"\xff\"}").unwrap_err(), "The file is not UTF-8 (line 2 column 8).");
        for empty in ["", " \n", "\u{feff}"] {
            assert_eq!(plain_json(empty.as_bytes()).unwrap_err(), "The file is empty.");
        }
    }
}
