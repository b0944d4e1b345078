//! How far long work is, on standard error: on a terminal one line that is written over and cleared in the end, elsewhere
//! a line now and then. Results go to standard output, and nothing of this is among them.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// A terminal is written to this often at most.
const REDRAW: Duration = Duration::from_millis(100);
/// Elsewhere there is a line after so long,
const SILENCE: Duration = Duration::from_secs(5);
/// or after a tenth of the work, if that is so much at least.
const LEAST_STEP: usize = 50;
/// The width of a terminal that does not say.
const COLUMNS: u16 = 80;
/// To the first column, and nothing in the line.
const CLEAR: &[u8] = b"\r\x1b[K";

/// Where it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Terminal,
    Lines,
    Log,
    /// A terminal that cannot go back in a line.
    Nowhere,
}

/// The progress of one work, which may have several parts.
pub struct Progress {
    place: Place,
    /// What was told last, and when.
    told: Option<(usize, Instant)>,
    /// There is a line on the terminal.
    is_drawn: bool,
}

impl Progress {
    /// Of a command: in lines where standard error is no terminal.
    pub fn of_command() -> Self {
        Self::at(Place::Lines)
    }

    /// Of a server: in its log where standard error is no terminal.
    pub fn of_server() -> Self {
        Self::at(Place::Log)
    }

    fn at(otherwise: Place) -> Self {
        let place = match (stderr().is_terminal(), can_go_back()) {
            (false, _) => otherwise,
            (true, true) => Place::Terminal,
            (true, false) => Place::Nowhere,
        };
        Self { place, told: None, is_drawn: false }
    }

    /// `done` of `total` are done, which `line` says, if it is time to say it. A part begins with none done.
    pub fn tell(&mut self, done: usize, total: usize, line: impl Display) {
        let now = Instant::now();
        if !is_due(self.place, self.told.map(|(done, at)| (done, now - at)), done, total) {
            return;
        }
        self.told = Some((done, now));
        // Nothing can be done about a closed standard error.
        match self.place {
            Place::Terminal => {
                // Of a line as wide as the terminal, some go on to the next one.
                let fitting = columns().saturating_sub(1).into();
                let line: String = line.to_string().chars().take(fitting).collect();
                let _ = stderr().write_all(&[CLEAR, line.as_bytes()].concat());
                self.is_drawn = true;
            }
            Place::Lines => drop(writeln!(stderr(), "{line}")),
            Place::Log => tracing::info!("{line}"),
            Place::Nowhere => {}
        }
    }

    /// Nothing is left of it on a terminal.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.is_drawn) {
            let _ = stderr().write_all(CLEAR);
        }
        self.told = None;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn is_due(place: Place, told: Option<(usize, Duration)>, done: usize, total: usize) -> bool {
    let Some((before, since)) = told else { return true };
    if done == 0 || done < before {
        return true;
    }
    match place {
        Place::Terminal => since >= REDRAW,
        _ => done - before >= (total / 10).max(LEAST_STEP) || since >= SILENCE,
    }
}

/// Whether the terminal knows how to write over a line.
fn can_go_back() -> bool {
    std::env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb")
}

fn columns() -> u16 {
    let size = rustix::termios::tcgetwinsize(stderr());
    size.map(|size| size.ws_col).ok().filter(|columns| *columns > 0).unwrap_or(COLUMNS)
}

/// Standard error for the log: a line of the log takes the place of a line of progress, which is drawn again below it.
pub fn log() -> Log {
    Log { has_progress: stderr().is_terminal() && can_go_back() }
}

/// See [`log`].
pub struct Log {
    has_progress: bool,
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.has_progress {
            // At once: others write to standard error, too.
            true => stderr().write_all(&[CLEAR, line].concat())?,
            false => stderr().write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_and_each_tenth_is_told_and_none_too_often() {
        let told = |place, total: usize, since| {
            let (mut last, mut told) = (None, vec![]);
            for done in 0..=total {
                if is_due(place, last.map(|last| (last, since)), done, total) {
                    last = Some(done);
                    told.push(done);
                }
            }
            told
        };
        assert_eq!(told(Place::Lines, 3, Duration::ZERO), [0]);
        assert_eq!(told(Place::Lines, 120, Duration::ZERO), [0, 50, 100]);
        assert_eq!(told(Place::Log, 1000, Duration::ZERO).len(), 11);
        assert_eq!(told(Place::Terminal, 1000, Duration::ZERO), [0]);
        assert_eq!(told(Place::Terminal, 2, REDRAW), [0, 1, 2]);
        assert_eq!(told(Place::Lines, 2, SILENCE), [0, 1, 2]);
        assert!(is_due(Place::Terminal, Some((7, Duration::ZERO)), 0, 9), "another part");
    }
}
