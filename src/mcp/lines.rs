//! The lines that a child writes, each of bounded size.

use bytes::{Buf, BytesMut};
use memchr::memchr;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::budget::{Held, Oversize};

/// How much is read at a time, and the buffer that is kept between lines, in bytes.
const CHUNK: usize = 16 * 1024;
const KEPT: usize = 64 * 1024;
/// How much of either end of a line that cannot be taken is kept.
const END: usize = 1024;

/// One line, without its end.
pub enum Line {
    Whole(BytesMut, Held),
    /// It was too large to be taken, and was read over; its first and its last bytes may tell whose it was.
    Untaken {
        head: Vec<u8>,
        tail: Vec<u8>,
        why: Oversize,
    },
}

pub struct Lines<R> {
    input: R,
    buffer: BytesMut,
    scanned: usize,
    max: usize,
    held: Held,
    /// The line that is being read over.
    over: Option<(Vec<u8>, Vec<u8>, Oversize)>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub fn new(input: R, max: usize, held: Held) -> Self {
        Self { input, buffer: BytesMut::new(), scanned: 0, max, held, over: None }
    }

    /// The next line; `None` at the end of the input, where half a line is none. Cancel-safe.
    pub async fn next(&mut self) -> Option<Line> {
        loop {
            if let Some(line) = self.line() {
                return Some(line);
            }
            if self.buffer.is_empty() && self.buffer.capacity() > KEPT {
                self.buffer = BytesMut::new();
            }
            self.buffer.reserve(CHUNK);
            match self.input.read_buf(&mut self.buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return None,
            }
        }
    }

    fn line(&mut self) -> Option<Line> {
        let end = memchr(b'\n', &self.buffer[self.scanned..]).map(|at| self.scanned + at);
        let length = end.unwrap_or(self.buffer.len());
        if self.over.is_none() {
            let why = match length > self.max {
                true => Some(Oversize::TooLarge(self.max)),
                false => self.held.resize(length).err(),
            };
            if let Some(why) = why {
                drop(self.held.take());
                self.over = Some((self.buffer[..length.min(END)].to_vec(), Vec::new(), why));
            }
        }
        match (&mut self.over, end) {
            (None, None) => {
                self.scanned = length;
                None
            }
            (None, Some(end)) => {
                let mut line = self.buffer.split_to(end);
                self.buffer.advance(1);
                self.scanned = 0;
                if line.last() == Some(&b'\r') {
                    line.truncate(line.len() - 1);
                }
                Some(Line::Whole(line, self.held.take()))
            }
            (Some((_, tail, _)), end) => {
                tail.extend_from_slice(&self.buffer[length.saturating_sub(END)..length]);
                tail.drain(..tail.len().saturating_sub(END));
                self.scanned = 0;
                match end {
                    None => {
                        self.buffer = BytesMut::new();
                        None
                    }
                    Some(end) => {
                        self.buffer.advance(end + 1);
                        let (head, tail, why) = self.over.take()?;
                        Some(Line::Untaken { head, tail, why })
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::mcp::budget::Budget;

    #[tokio::test]
    async fn lines_come_whole_and_large_ones_are_read_over() {
        let share = Budget::new(1024 * 1024).share();
        let large = format!("head{}tail", "x".repeat(500_000));
        let exact = "e".repeat(100_000);
        let input = format!("first\r\n\n{large}\n{exact}\nlast\nhalf");
        let mut lines = Lines::new(input.as_bytes(), 100_000, Held::nothing(&share));
        let whole = |line| match line {
            Some(Line::Whole(line, _)) => String::from_utf8(line.to_vec()).unwrap(),
            _ => panic!("a whole line was expected"),
        };
        assert_eq!(whole(lines.next().await), "first");
        assert_eq!(whole(lines.next().await), "");
        let Some(Line::Untaken { head, tail, why: Oversize::TooLarge(_) }) = lines.next().await else { panic!() };
        assert!(head.starts_with(b"head") && tail.ends_with(b"tail") && tail.len() == END);
        assert_eq!(whole(lines.next().await), exact);
        assert_eq!(whole(lines.next().await), "last");
        assert!(lines.next().await.is_none());
    }

    #[tokio::test]
    async fn a_line_without_room_is_read_over_and_the_next_is_taken() {
        let share = Budget::new(100_000).share();
        let input = format!("{}\nnext\n", "x".repeat(400_000));
        let mut lines = Lines::new(input.as_bytes(), 1_000_000, Held::nothing(&share));
        assert!(matches!(lines.next().await, Some(Line::Untaken { why: Oversize::NoRoom, .. })));
        assert!(matches!(lines.next().await, Some(Line::Whole(line, _)) if &line[..] == b"next"));
    }
}
