//! `portolan export`: the servers as a configuration file of another program.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::api::export;
use crate::config::Settings;
use crate::interchange::{Format, Written};

use super::{open_store, shown};

/// Writes the file, and on standard error what it does not say.
///
/// # Errors
/// One sentence; a file that was there is as it was.
pub async fn run(settings: &Settings, format: Format, secrets: bool, output: Option<&Path>) -> Result<(), String> {
    let store = open_store(settings).await?;
    let servers = store.servers().await;
    store.close().await;
    let servers = servers.map_err(|error| format!("The servers cannot be read: {error}."))?;
    let Written { file, left_out } = export(&servers, format, secrets);
    let text = serde_json::to_string_pretty(&file).expect("a file is texts in lists and objects") + "\n";
    match output {
        Some(file) => {
            keep(file, &text, secrets).map_err(|error| format!("Cannot write {}: {error}.", file.display()))?
        }
        None => {
            let printed = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
            printed.map_err(|error| format!("Cannot print the file: {error}."))?;
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
