//! What the program does besides serving, one file per command. Each writes lines to standard output, and ends with one
//! sentence where it fails.

pub mod export;
pub mod import;
pub mod key;
pub mod migrate_letta;
pub mod rotate_keys;
pub mod token;

use std::fmt::Display;
use std::io::Write;

use crate::app;
use crate::config::Settings;
use crate::store::Store;

/// The store of these settings. Of a key that was made for it, standard error tells: the output may be a file.
async fn open_store(settings: &Settings) -> Result<Store, String> {
    let store = app::open_store(settings).await.map_err(|error| error.to_string())?;
    if let Some(notice) = app::key_notice(&store) {
        let _ = writeln!(std::io::stderr(), "{notice}");
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
fn say(line: impl Display) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
