//! Server-sent events from a response body (WHATWG HTML, 9.2.6), each of bounded size.

use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt};

use super::budget::{Held, Oversize};
use super::remote::HttpError;

/// The longest id that is kept, in bytes.
const MAX_ID: usize = 1024;

/// One event. A field that is absent is empty.
#[derive(Debug, Default, PartialEq)]
pub struct Event {
    /// The kind of event; empty for `message`.
    pub name: String,
    pub data: String,
    id: String,
    /// After how many milliseconds a client shall come back, if this event says so.
    pub retry: Option<u64>,
}

/// Reads events from a body.
pub struct Events {
    body: BoxStream<'static, reqwest::Result<Bytes>>,
    parser: Parser,
    max: usize,
    held: Held,
}

impl Events {
    /// The stream fails at an event of more than `max` bytes, and at one that `held` finds no room for.
    pub fn new(body: impl Stream<Item = reqwest::Result<Bytes>> + Send + 'static, max: usize, held: Held) -> Self {
        Self { body: body.boxed(), parser: Parser::default(), max, held }
    }

    /// This stream goes on where an event of this id ended another one.
    pub fn after(mut self, id: String) -> Self {
        self.parser.event.id = id;
        self
    }

    /// The last id that the stream gave.
    pub fn last_id(&self) -> &str {
        &self.parser.event.id
    }

    /// The next event and the room it takes; `None` at the end of the body. Cancel-safe.
    ///
    /// # Errors
    /// [`HttpError::Oversize`], or why the body broke off. No event follows.
    pub async fn next(&mut self) -> Option<Result<(Event, Held), HttpError>> {
        loop {
            if let Some(event) = self.parser.next() {
                return Some(Ok((event, self.held.take())));
            }
            let size = self.parser.size();
            if size > self.max {
                return Some(Err(Oversize::TooLarge(self.max).into()));
            }
            if let Err(oversize) = self.held.resize(size) {
                return Some(Err(oversize.into()));
            }
            match self.body.next().await? {
                Ok(chunk) => self.parser.push(&chunk),
                Err(error) => return Some(Err(error.into())),
            }
        }
    }
}

#[derive(Default)]
struct Parser {
    /// What has arrived and is no whole line yet, and how much of it is known to hold no line end.
    text: BytesMut,
    scanned: usize,
    event: Event,
    has_data: bool,
    /// The last line ended with CR: an LF that follows belongs to it.
    after_cr: bool,
    begun: bool,
}

impl Parser {
    fn push(&mut self, chunk: &[u8]) {
        self.text.extend_from_slice(chunk);
    }

    /// The bytes of the event that is being read.
    fn size(&self) -> usize {
        self.text.len() + self.event.data.len() + self.event.name.len()
    }

    fn next(&mut self) -> Option<Event> {
        while let Some(line) = self.line() {
            if line.is_empty() {
                let id = std::mem::take(&mut self.event.id);
                let event = std::mem::replace(&mut self.event, Event { id, ..Event::default() });
                // An event without data is none, but what it said of coming back holds.
                if std::mem::take(&mut self.has_data) || event.retry.is_some() {
                    return Some(event);
                }
                continue;
            }
            let line = String::from_utf8_lossy(&line);
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "data" => {
                    if std::mem::replace(&mut self.has_data, true) {
                        self.event.data.push('\n');
                    }
                    self.event.data.push_str(value);
                }
                "event" => self.event.name = value.to_owned(),
                "id" if !value.contains('\0') && value.len() <= MAX_ID => self.event.id = value.to_owned(),
                "retry" => self.event.retry = value.parse().ok().or(self.event.retry),
                _ => {}
            }
        }
        None
    }

    /// The next whole line, without its end: LF, CRLF or CR.
    fn line(&mut self) -> Option<BytesMut> {
        if std::mem::take(&mut self.after_cr) {
            match self.text.first() {
                Some(b'\n') => self.text.advance(1),
                Some(_) => {}
                None => {
                    self.after_cr = true;
                    return None;
                }
            }
        }
        let Some(end) = self.text[self.scanned..].iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
            self.scanned = self.text.len();
            return None;
        };
        let mut line = self.text.split_to(self.scanned + end);
        self.scanned = 0;
        self.after_cr = self.text.get_u8() == b'\r';
        if !std::mem::replace(&mut self.begun, true) && line.starts_with(b"\xef\xbb\xbf") {
            line.advance(3);
        }
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, chunk: usize) -> Vec<(String, String, String, Option<u64>)> {
        let mut parser = Parser::default();
        let mut events = Vec::new();
        for chunk in text.as_bytes().chunks(chunk) {
            parser.push(chunk);
            while let Some(event) = parser.next() {
                events.push((event.name, event.data, parser.event.id.clone(), event.retry));
            }
        }
        events
    }

    #[test]
    fn events_are_the_same_whatever_the_line_ends_and_chunks() {
        let text = "\u{feff}: hello\nevent: a\ndata: 1\ndata:2\nid: x\n\ndata\n\nevent: lost\n\nretry: 50\n\ndata: {\"é\": 1}\n\ndata: cut";
        let event = |name: &str, data: &str, retry| (name.to_owned(), data.to_owned(), "x".to_owned(), retry);
        let expected =
            [event("a", "1\n2", None), event("", "", None), event("", "", Some(50)), event("", "{\"é\": 1}", None)];
        for end in ["\n", "\r\n", "\r"] {
            for chunk in [1, 2, 3, 7, 1000] {
                assert_eq!(parse(&text.replace('\n', end), chunk), expected, "{end:?} {chunk}");
            }
        }
    }

    #[test]
    fn many_short_lines_make_one_large_event_and_comments_do_not() {
        let mut parser = Parser::default();
        for _ in 0..100 {
            parser.push(b"data: 1\n");
            assert_eq!(parser.next(), None);
        }
        assert_eq!(parser.size(), 199);
        for _ in 0..100 {
            parser.push(b": ping\n");
            assert_eq!(parser.next(), None);
        }
        assert_eq!(parser.size(), 199);
    }
}
