//! Characters in a tool's definition that people do not see, or see in another place than a model reads them: what is
//! approved by eye may say something else. They are told, never taken out: much of it is innocent.

use serde_json::Value;

use crate::model::Flag;

/// How many flags of one tool are told, and the characters of a place.
const MAX_FLAGS: usize = 20;
const MAX_PLACE: usize = 256;

/// What is flagged in a definition: the texts and the keys of all of it.
pub fn flags(definition: &str) -> Vec<Flag> {
    // Most definitions are plain; an escape may stand for anything.
    if definition.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') && !definition.contains('\\') {
        return vec![];
    }
    let Ok(value) = serde_json::from_str::<Value>(definition) else { return vec![] };
    let mut flags = Vec::new();
    search(&value, &mut String::new(), &mut flags);
    flags
}

fn search(value: &Value, place: &mut String, flags: &mut Vec<Flag>) {
    match value {
        Value::String(text) => note(text, place == "/name", place, flags),
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                within(place, &index.to_string(), |place| search(item, place, flags));
            }
        }
        Value::Object(object) => {
            for (key, value) in object {
                within(place, &key.replace('~', "~0").replace('/', "~1"), |place| {
                    note(key, true, place, flags);
                    search(value, place, flags);
                });
            }
        }
        _ => {}
    }
}

fn within(place: &mut String, step: &str, work: impl FnOnce(&mut String)) {
    let length = place.len();
    place.push('/');
    place.push_str(step);
    work(place);
    place.truncate(length);
}

/// Adds each kind of such characters in `text` once. A name, of the tool or a key, is stricter than a text: nothing that
/// joins or breaks lines belongs there.
fn note(text: &str, is_name: bool, place: &str, flags: &mut Vec<Flag>) {
    if text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        return;
    }
    let characters: Vec<char> = text.chars().collect();
    let mut kinds: Vec<&'static str> = Vec::new();
    let mut at = 0;
    while let Some(&character) = characters.get(at) {
        let before = at.checked_sub(1).map(|at| characters[at]);
        let after = characters.get(at + 1).copied();
        at += 1;
        if character == FLAG && !is_name {
            at += emblem(&characters[at..]);
            continue;
        }
        let Some(kind) = kind(character) else { continue };
        let usual = !is_name && is_usual(character, before, after);
        if !usual && !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    for kind in kinds {
        if flags.len() < MAX_FLAGS {
            flags.push(Flag { kind, at: shown(place) });
        }
    }
}

/// What kind of invisible or misleading character this is.
fn kind(character: char) -> Option<&'static str> {
    Some(match character {
        '\u{200E}' | '\u{200F}' | '\u{061C}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => "bidi",
        '\u{200B}'..='\u{200D}' | '\u{2060}'..='\u{2065}' | '\u{FEFF}' => "zero_width",
        // Soft hyphen, grapheme joiner, fillers: as invisible.
        '\u{00AD}' | '\u{034F}' | '\u{115F}' | '\u{1160}' | '\u{17B4}' | '\u{17B5}' | '\u{180E}' => "zero_width",
        '\u{3164}' | '\u{FFA0}' => "zero_width",
        '\u{E0000}'..='\u{E007F}' => "tag",
        '\u{FE00}'..='\u{FE0F}' | '\u{180B}'..='\u{180D}' | '\u{180F}' | '\u{E0100}'..='\u{E01EF}' => {
            "variation_selector"
        }
        '\u{E000}'..='\u{F8FF}' | '\u{F0000}'.. => "private_use",
        // Lines and paragraphs of Unicode, deprecated formats, annotations.
        '\u{2028}' | '\u{2029}' | '\u{206A}'..='\u{206F}' | '\u{FFF9}'..='\u{FFFB}' => "control",
        _ if character.is_control() => "control",
        _ => return None,
    })
}

/// Whether ordinary writing has this character between these two.
fn is_usual(character: char, before: Option<char>, after: Option<char>) -> bool {
    let drawn = |side: Option<char>| side.is_some_and(|side| !side.is_ascii() && kind(side).is_none());
    match character {
        '\n' | '\r' | '\t' => true,
        // Persian and Indic words, and pictures made of several, have joiners.
        '\u{200C}' | '\u{200D}' => (drawn(before) || is_selector(before)) && drawn(after),
        // One selector after a picture, a letter that has variants, or a digit in a box.
        _ if is_selector(Some(character)) => {
            drawn(before) || before.is_some_and(|digit| digit.is_ascii_digit() || matches!(digit, '#' | '*'))
        }
        _ => false,
    }
}

fn is_selector(character: Option<char>) -> bool {
    matches!(character, Some('\u{FE00}'..='\u{FE0F}'))
}

/// The black flag, which tags make the flag of a part of a country.
const FLAG: char = '\u{1F3F4}';
const LAST_TAG: char = '\u{E007F}';

/// How many tags follow a black flag and belong to it: five or six, and the last.
fn emblem(rest: &[char]) -> usize {
    let is_tag = |character: &&char| ('\u{E0030}'..='\u{E007A}').contains(*character);
    let tags = rest.iter().take_while(is_tag).count();
    if matches!(tags, 3..=6) && rest.get(tags) == Some(&LAST_TAG) { tags + 1 } else { 0 }
}

fn shown(place: &str) -> String {
    let mut text = String::new();
    for character in place.chars().take(MAX_PLACE) {
        match kind(character) {
            Some(_) => text.extend(character.escape_unicode()),
            None => text.push(character),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn kinds(description: &str) -> Vec<&'static str> {
        flags(&json!({ "name": "t", "description": description }).to_string()).iter().map(|flag| flag.kind).collect()
    }

    #[test]
    fn what_people_do_not_see_is_flagged() {
        for (text, kind) in [
            ("a\u{0}b", "control"),
            ("a\u{1b}[31mb", "control"),
            ("a\u{85}b", "control"),
            ("a\u{2028}b", "control"),
            ("user\u{202E}txt", "bidi"),
            ("a\u{2066}b\u{2069}", "bidi"),
            ("a\u{200F}b", "bidi"),
            ("a\u{061C}b", "bidi"),
            ("pay\u{200B}pal", "zero_width"),
            ("a\u{200D}b", "zero_width"),
            ("\u{FEFF}a", "zero_width"),
            ("a\u{2060}b", "zero_width"),
            ("a\u{3164}b", "zero_width"),
            ("so\u{AD}ft", "zero_width"),
            ("a\u{E0041}\u{E0042}", "tag"),
            ("\u{1F3F4}\u{E0041}\u{E0042}\u{E0043}\u{E0044}\u{E0045}\u{E0046}\u{E0047}\u{E0048}", "tag"),
            ("a\u{FE0F}", "variation_selector"),
            ("\u{1F600}\u{FE0F}\u{FE01}", "variation_selector"),
            ("a\u{E0101}", "variation_selector"),
            ("a\u{E000}b", "private_use"),
            ("a\u{10FFFD}b", "private_use"),
        ] {
            assert_eq!(kinds(text), [kind], "{text:?}");
        }
        assert_eq!(kinds("a\u{200B}\u{202E}\u{200B}"), ["zero_width", "bidi"], "each kind once");
    }

    #[test]
    fn ordinary_writing_is_not() {
        for text in [
            "Lines\nand\ttabs\r\n",
            "naïve, 東京, Ελληνικά, עברית, العربية",
            "\u{1F468}\u{200D}\u{1F469}\u{200D}\u{1F467}",
            "\u{2764}\u{FE0F}\u{200D}\u{1F525}",
            "1\u{FE0F}\u{20E3}",
            "می\u{200C}خواهم",
            "क्\u{200D}ष",
            "\u{1F3F4}\u{E0067}\u{E0062}\u{E0065}\u{E006E}\u{E0067}\u{E007F}",
        ] {
            assert_eq!(kinds(text), Vec::<&str>::new(), "{text:?}");
        }
    }

    #[test]
    fn every_text_of_a_definition_is_looked_at() {
        let definition = json!({
            "name": "na\nme",
            "title": "a\u{200B}b",
            "inputSchema": { "properties": { "a/b\u{200B}": { "enum": ["x", "y\u{202E}"] } } },
            "annotations": { "title": "\u{7}" },
        });
        let found = flags(&definition.to_string());
        let found: Vec<_> = found.iter().map(|flag| (flag.kind, flag.at.as_str())).collect();
        let property = "/inputSchema/properties/a~1b\\u{200b}";
        let value = format!("{property}/enum/1");
        assert_eq!(
            found,
            [
                ("control", "/name"),
                ("zero_width", "/title"),
                ("zero_width", property),
                ("bidi", &value),
                ("control", "/annotations/title"),
            ]
        );
        assert_eq!(flags(&json!(vec!["\u{200B}"; 50]).to_string()).len(), MAX_FLAGS);
        assert_eq!(flags(r#"{"name":"a","description":"\u200b"}"#).len(), 1, "escaped in the definition");
        assert_eq!(flags(&json!({"k".repeat(1000): "\u{200B}"}).to_string())[0].at.len(), MAX_PLACE);
    }
}
