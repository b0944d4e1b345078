//! What holds for any bytes that a server may send, one function per fuzz target; each panics where it does not.
//! `cargo test` runs them over `fuzz/corpus`, `cargo fuzz` over what it makes up (docs/FUZZING.md).

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{FutureExt, stream};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::io::{AsyncRead, ReadBuf};

use super::budget::{Budget, Held};
use super::events::{Event, Events};
use super::lines::{Line, Lines};
use super::message::{self, Inbound};
use super::template::{Template, Unfilled, expand, is_name};
use super::{
    Room, Variables, address, fields, json_schema, listing, message::id_of_a_part, result, scope, server_url, template,
};

/// The largest line and event of these targets, and all the room there is.
const MAX: usize = 4096;
const ROOM: usize = 64 * 1024;

/// Server-sent events: the same ones, however the body is cut into chunks, each within the limit.
pub fn events(data: &[u8]) {
    let (chunk, text) = chunked(data);
    let whole = read_events(text, text.len().max(1));
    let cut = read_events(text, chunk);
    // The end of a chunk is where an event that is too large is noticed: later with large chunks, never sooner.
    assert!(whole.len() >= cut.len());
    assert_eq!(whole[..cut.len()], cut);
    // A byte that is not UTF-8 grows to three.
    if String::from_utf8_lossy(text).len() <= MAX {
        assert_eq!(whole.len(), cut.len());
    }
}

fn read_events(text: &[u8], chunk: usize) -> Vec<Event> {
    let chunks: Vec<_> = text.chunks(chunk).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
    let mut events = Events::new(stream::iter(chunks), MAX, Held::nothing(&Budget::new(ROOM).share()));
    let mut read = Vec::new();
    while let Some(Ok((event, _held))) = events.next().now_or_never().expect("the body is there") {
        read.push(event);
    }
    read
}

/// The lines of a child: those that `split` finds, and nothing of one that is too large but its ends; then whatever a
/// line says as JSON-RPC, as a tool and as a result.
pub fn lines(data: &[u8]) {
    let (chunk, text) = chunked(data);
    let mut expected: Vec<_> = text.split(|byte| *byte == b'\n').collect();
    // Half a line is none.
    expected.pop();
    let mut lines = Lines::new(Chunks { rest: text, chunk }, MAX, Held::nothing(&Budget::new(ROOM).share()));
    let mut expected = expected.into_iter();
    while let Some(line) = lines.next().now_or_never().expect("the output is there") {
        let whole = expected.next().expect("no line is made up");
        match line {
            Line::Whole(line, _) => {
                assert_eq!(line, whole.strip_suffix(b"\r").unwrap_or(whole));
                messages(&line);
            }
            Line::Untaken { head, tail, .. } => {
                assert!(whole.len() > MAX && whole.starts_with(&head) && whole.ends_with(&tail));
                let _ = id_of_a_part(&head, &tail);
            }
        }
    }
    assert_eq!(expected.next(), None, "no line is lost");
}

fn messages(line: &[u8]) {
    for inbound in message::read(line) {
        match inbound {
            Inbound::Answer { result: Ok(result), .. } => {
                serde_json::from_str::<&RawValue>(result.get()).expect("a result is JSON");
                let _ = result::ToolResult::read(&result);
                list(&result);
            }
            Inbound::Request { id, method } => {
                let reply = message::reply(&id, &method);
                serde_json::from_slice::<&RawValue>(&reply).expect("a reply is JSON");
                assert!(!reply.contains(&b'\n'), "a reply is one line");
            }
            Inbound::Answer { result: Err(_), .. } | Inbound::Notification { .. } => {}
        }
    }
}

fn list(result: &RawValue) {
    #[derive(serde::Deserialize)]
    struct Tools {
        tools: Vec<Box<RawValue>>,
    }
    let Ok(Tools { tools }) = serde_json::from_str(result.get()) else { return };
    for tool in listing::accept(&tools).0 {
        let definition: Value = serde_json::from_str(&tool.definition).expect("a kept tool is JSON");
        let schema = json_schema(&tool.name, None, &definition["inputSchema"], &mut Room::default());
        assert!(schema["parameters"].is_object());
    }
}

/// The URL of a server: one that is taken is taken again as the parser writes it, is http or https, has a host, and no
/// address that nobody may connect to. And the same bytes as name and value of a header field.
pub fn url(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(url) = server_url(text) {
        assert!(matches!(url.scheme(), "http" | "https") && url.has_host());
        assert!(address::literal(&url).is_none_or(|address| scope(address).is_ok()));
        assert_eq!(server_url(url.as_str()), Ok(url), "it reads as itself");
    }
    if let Ok(name) = fields::field_name(text) {
        assert!(name.as_str().bytes().all(|byte| byte.is_ascii_graphic() && byte != b':'));
    }
    if fields::field_value(text).is_ok() {
        assert!(text.bytes().all(|byte| byte == b'\t' || byte == b' ' || byte.is_ascii_graphic()));
    }
}

/// A text with templates: they are those that Letta's regular expression finds, and what comes of them is what is between
/// them and values or defaults, within the limit. And the same bytes as the variables of a request.
pub fn templates(data: &[u8]) {
    if let Ok(variables) = Variables::read(data) {
        let values: Vec<_> = variables.iter().collect();
        assert!(
            values.len() <= 100 && values.iter().all(|(name, value)| is_name(name) && !value.expose().contains('\0'))
        );
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let found: Vec<Template<'_>> = template::templates(text).collect();
    let value = |name: &str| (name.len() % 2 == 1).then_some("{{ V }}");
    let mut expected = Ok(String::new());
    let mut from = 0;
    for Template { range, name, default } in &found {
        assert!(is_name(name) && from <= range.start);
        let default = default.clone().map(|default| &text[default]);
        match (&mut expected, value(name).or(default)) {
            (Ok(expected), Some(value)) => *expected += &(text[from..range.start].to_owned() + value),
            (Ok(_), None) => expected = Err(Unfilled::NoValue(name)),
            (Err(_), _) => {}
        }
        from = range.end;
    }
    match (expand(text, value), expected) {
        (Ok(filled), Ok(expected)) => assert_eq!(filled, expected + &text[from..]),
        (Err(Unfilled::TooLong), _) => assert!(text.len() > MAX, "a value is short"),
        (filled, expected) => assert_eq!(filled, expected),
    }
    // The reference takes its time.
    if text.len() <= MAX {
        assert_eq!(found, regular(text));
    }
}

/// What the regular expression finds, one choice of it after the other.
fn regular(text: &str) -> Vec<Template<'_>> {
    let mut found = Vec::new();
    let mut from = 0;
    for (start, _) in text.char_indices() {
        if start >= from
            && let Some(template) = regular_at(text, start)
        {
            from = template.range.end;
            found.push(template);
        }
    }
    found
}

fn regular_at(text: &str, start: usize) -> Option<Template<'_>> {
    let rest = text[start..].strip_prefix("{{")?.trim_start();
    let is_name = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    let name = &rest[..rest.bytes().take_while(|byte| is_name(*byte)).count()];
    if name.bytes().next()?.is_ascii_digit() {
        return None;
    }
    let rest = rest[name.len()..].trim_start();
    let place = |rest: &str| text.len() - rest.len();
    let template = |rest: &str, default: Option<Range<usize>>| {
        rest.trim_start().strip_prefix("}}").map(|rest| Template { range: start..place(rest), name, default })
    };
    if let Some(given) = rest.strip_prefix('|') {
        let spaces = given.char_indices().take_while(|(_, c)| c.is_whitespace()).map(|(at, c)| at + c.len_utf8());
        for skipped in std::iter::once(0).chain(spaces).collect::<Vec<_>>().into_iter().rev() {
            let first = &given[skipped..];
            for (at, c) in first.char_indices().take_while(|(_, c)| *c != '}') {
                let after = &first[at + c.len_utf8()..];
                if let Some(found) = template(after, Some(place(first)..place(after))) {
                    return Some(found);
                }
            }
        }
    }
    template(rest, None)
}

/// The first byte says how the others are cut.
fn chunked(data: &[u8]) -> (usize, &[u8]) {
    data.split_first().map_or((1, data), |(first, rest)| (usize::from(*first).max(1), rest))
}

/// Bytes that arrive `chunk` at a time.
struct Chunks<'a> {
    rest: &'a [u8],
    chunk: usize,
}

impl AsyncRead for Chunks<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let length = self.rest.len().min(self.chunk).min(buffer.remaining());
        let (now, later) = self.rest.split_at(length);
        buffer.put_slice(now);
        self.rest = later;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_holds() {
        crate::corpus::replay("events", super::events);
        crate::corpus::replay("lines", super::lines);
        crate::corpus::replay("url", super::url);
        crate::corpus::replay("templates", super::templates);
    }

    /// As good as random, and the same in every run.
    #[test]
    fn made_up_templates_hold() {
        const PIECES: [&str; 16] =
            ["{{", "}}", "{", "}", "|", "A", "B_2", "9", "a", " ", "\t", "\u{3000}", "é", "{{ A | ", " }}", "{{ AB "];
        let mut dice = 1_u32;
        for _ in 0..20_000 {
            let mut roll = |sides: u32| {
                dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((dice >> 16) % sides) as usize
            };
            let text: String = (0..roll(14)).map(|_| PIECES[roll(16)]).collect();
            super::templates(text.as_bytes());
        }
    }
}
