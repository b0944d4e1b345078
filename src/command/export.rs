//! `portolan export`: the servers as a configuration file of another program.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::api::export;
use crate::config::Settings;
use crate::interchange::{Format, Written};

use super::{Document, Failure, open_store, print, say, shown};

/// Writes the file, and on standard error what it does not say. With `as_json`, the latter is in the answer: the one of the
/// API when the file is printed, else a report of what was written.
///
/// # Errors
/// One sentence; a file that was there is as it was.
pub async fn run(
    settings: &Settings,
    format: Format,
    secrets: bool,
    output: Option<&Path>,
    as_json: bool,
) -> Result<(), Failure> {
    let store = open_store(settings).await?;
    let servers = store.servers().await;
    store.close().await;
    let servers = servers.map_err(|error| format!("The servers cannot be read: {error}."))?;
    let written = export(&servers, format, secrets);
    let unprinted = |error: io::Error| format!("Cannot print the file: {error}.");
    if as_json && output.is_none() {
        print(Value::from(written.into_one())).map_err(unprinted)?;
        return Ok(());
    }
    let Written { file, left_out } = written;
    let text = serde_json::to_string_pretty(&file).expect("a file is texts in lists and objects");
    match output {
        None => print(text).map_err(unprinted)?,
        Some(file) => {
            let kept = keep(file, &(text + "\n"), secrets);
            kept.map_err(|error| format!("Cannot write {}: {error}.", file.display()))?;
            if as_json {
                say(Document(json!({ "output": file.to_string_lossy(), "left_out": left_out })));
                return Ok(());
            }
        }
    }
    for passed in left_out {
        let place = passed.server.iter().chain(&passed.key).map(|key| shown(key)).collect::<Vec<_>>().join(", ");
        // Nothing can be done about a closed standard error.
        let _ = writeln!(io::stderr(), "left out   {place}: {}", passed.reason);
    }
    Ok(())
}

/// Puts the whole file in the place of the old one, or leaves that.
fn keep(file: &Path, text: &str, secrets: bool) -> io::Result<()> {
    // A link stays one.
    let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let mut name = file.file_name().ok_or(io::ErrorKind::IsADirectory)?.to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = file.with_file_name(name);
    let mode = if secrets { 0o600 } else { 0o666 };
    let written = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new).and_then(|mut out| {
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        std::fs::rename(&new, &file)
    });
    if written.is_err() {
        // It may not be there.
        let _ = std::fs::remove_file(&new);
    }
    written
}
