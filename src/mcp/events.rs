//! Server-sent events from a response body, each of bounded size.

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt};
use sse_stream::{Error, Sse, SseStream};

/// Why a stream of events broke off.
#[derive(Debug, thiserror::Error)]
enum BrokenOff {
    #[error("the server sent an event larger than {0} bytes")]
    TooLarge(usize),
    #[error(transparent)]
    Body(reqwest::Error),
}

/// The events of `body`; the stream fails at an event of more than `max` bytes.
pub fn events(
    body: impl Stream<Item = reqwest::Result<Bytes>> + Send + 'static,
    max: usize,
) -> BoxStream<'static, Result<Sse, Error>> {
    let mut size = EventSize::default();
    let bounded = body.map(move |chunk| {
        let chunk = chunk.map_err(|error| BrokenOff::Body(error.without_url()))?;
        if size.add(&chunk) > max { Err(BrokenOff::TooLarge(max)) } else { Ok(chunk) }
    });
    SseStream::from_bytes_stream(bounded).boxed()
}

/// Counts the bytes of the event that is being read: an empty line ends one, comments do not count.
#[derive(Default)]
struct EventSize {
    event: usize,
    line: usize,
    comment: bool,
    after_cr: bool,
}

impl EventSize {
    /// The largest size that the current event had within `chunk`.
    fn add(&mut self, chunk: &[u8]) -> usize {
        let mut largest = 0;
        for &byte in chunk {
            let half_of_crlf = byte == b'\n' && self.after_cr;
            self.after_cr = byte == b'\r';
            if half_of_crlf {
                continue;
            }
            match byte {
                b'\n' | b'\r' => {
                    self.event = match (self.line, self.comment) {
                        (0, _) => 0,
                        (_, true) => self.event,
                        (line, false) => self.event + line + 1,
                    };
                    self.line = 0;
                    self.comment = false;
                }
                _ => {
                    self.comment |= self.line == 0 && byte == b':';
                    self.line += 1;
                }
            }
            largest = largest.max(self.event + self.line);
        }
        largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_ends_at_an_empty_line_whatever_the_line_ends() {
        for text in ["data: abc\n\ndata: de", "data: abc\r\n\r\ndata: de", "data: abc\r\rdata: de"] {
            let mut size = EventSize::default();
            size.add(text.as_bytes());
            assert_eq!(size.event + size.line, 8, "{text:?}");
        }
    }

    #[test]
    fn many_short_lines_make_one_large_event() {
        for end in ["\n", "\r\n", "\r"] {
            let mut size = EventSize::default();
            let largest = (0..100).map(|_| size.add(format!("data: 1{end}").as_bytes())).max();
            assert_eq!(largest, Some(800), "{end:?}");
        }
    }

    #[test]
    fn comments_do_not_add_up() {
        let mut size = EventSize::default();
        let largest = (0..100).map(|_| size.add(b": ping\n")).max();
        assert_eq!(largest, Some(6));
    }
}
