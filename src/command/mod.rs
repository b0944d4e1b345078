//! What the program does besides serving, one file per command. Each writes its result to standard output, as lines or
//! as one JSON document, shows its progress on standard error, and ends with one sentence where it fails.

pub mod export;
pub mod healthcheck;
pub mod import;
pub mod key;
pub mod migrate_letta;
pub mod rotate_keys;
pub mod token;

use std::fmt::{self, Display, Write as _};
use std::io::{self, Write};

use serde::Serialize;
use serde_json::{Map, Value, json, to_value};

use crate::app;
use crate::config::Settings;
use crate::error::Issue;
use crate::store::Store;

/// Why a command did not do all that it was asked for. Its `Display` is for the person who runs it.
pub struct Failure {
    /// One sentence, or several lines of one each.
    detail: String,
    /// What is wrong with a file, as the API says it.
    issues: Vec<Issue>,
    /// What there is to report all the same.
    report: Box<Map<String, Value>>,
    /// The document was printed before this happened.
    pub is_late: bool,
}

impl Failure {
    /// That of a program that had said already that all is well.
    pub fn late(detail: &str) -> Self {
        Self { is_late: true, ..detail.to_owned().into() }
    }

    fn with(mut self, report: &impl Serialize) -> Self {
        if let Value::Object(report) = value(report) {
            *self.report = report;
        }
        self
    }

    /// What `--json` prints: the report, if there is one, and `error`.
    pub fn document(&self) -> Document {
        let mut error = json!({ "detail": self.detail });
        if !self.issues.is_empty() {
            error["errors"] = json!(self.issues);
        }
        let mut document = (*self.report).clone();
        document.insert("error".to_owned(), error);
        Document(document.into())
    }
}

impl From<String> for Failure {
    fn from(detail: String) -> Self {
        Self { detail, issues: vec![], report: Box::default(), is_late: false }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

/// One JSON document as a terminal may show it: what would move the cursor or hide is written as escapes, which mean the
/// same.
pub struct Document(pub Value);

impl Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.to_string().chars() {
            // JSON escapes what comes before the space by itself.
            if c != '\u{7f}' && (c.is_ascii() || c.escape_debug().len() == 1) {
                f.write_char(c)?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(f, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

fn value(report: &impl Serialize) -> Value {
    to_value(report).expect("a report is texts, numbers and lists of them")
}

/// The store of these settings. Of a key that was made for it, standard error tells: the output may be a file.
async fn open_store(settings: &Settings) -> Result<Store, String> {
    let store = app::open_store(settings).await.map_err(|error| error.to_string())?;
    if let Some(notice) = app::key_notice(&store) {
        let _ = writeln!(io::stderr(), "{notice}");
    }
    Ok(store)
}

/// Somebody else's text as a terminal may show it.
fn shown(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars().take(255) {
        let mut escaped = c.escape_debug();
        match escaped.len() > 1 && !matches!(c, '"' | '\'' | '\\') {
            true => shown.extend(&mut escaped),
            false => shown.push(c),
        }
    }
    shown
}

/// Writes one line. A reader that has gone is no reason to stop half-way.
pub fn say(line: impl Display) {
    let _ = print(line);
}

/// Writes one line that is no use to anybody if it is not read.
fn print(line: impl Display) -> io::Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{line}").and_then(|()| out.flush())
}
