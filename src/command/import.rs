//! `portolan import`: registers the servers of a configuration file, on the database itself.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::api::{Import, Report};
use crate::app::{Commands, make_data_folder};
use crate::config::Settings;
use crate::error::Error;
use crate::model::By;

use super::{open_store, say, shown};

/// One byte more than the largest file, so that a larger one is known.
const MOST: u64 = 1024 * 1024 + 1;

/// # Errors
/// One sentence for each thing that is wrong, with its place in the file; nothing was stored then.
pub async fn run(settings: &Settings, file: &Path, asked: Import) -> Result<(), String> {
    let text = read(file).map_err(|error| format!("Cannot read {}: {error}.", file.display()))?;
    let commands = Commands::read(&settings.children).map_err(|error| error.to_string())?;
    make_data_folder(settings).map_err(|error| error.to_string())?;
    let store = open_store(settings).await?;
    let done = asked.run(&store, text, &By::IMPORT, |connector| commands.check(connector)).await;
    store.close().await;
    tell(&done.map_err(failed)?.report);
    Ok(())
}

fn read(file: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    match file.to_str() {
        Some("-") => io::stdin().take(MOST).read_to_end(&mut text)?,
        _ => File::open(file)?.take(MOST).read_to_end(&mut text)?,
    };
    Ok(text)
}

fn failed(error: Error) -> String {
    match error {
        Error::Invalid(issues) => issues.into_iter().map(|issue| issue.msg).collect::<Vec<_>>().join("\n"),
        Error::BodyTooLarge { limit } => format!("The file is larger than {limit} bytes, the most that is read."),
        other => {
            let cause = std::error::Error::source(&other).map(|cause| format!(" ({cause})")).unwrap_or_default();
            format!("{other}{cause}")
        }
    }
}

fn tell(report: &Report) {
    let done = [
        ("added", &report.added),
        ("changed", &report.changed),
        ("unchanged", &report.unchanged),
        ("removed", &report.removed),
    ];
    for (what, names) in done {
        names.iter().for_each(|name| say(format_args!("{what:<10} {}", shown(name))));
    }
    for passed in &report.ignored {
        let place = passed.server.iter().chain(&passed.key).map(|key| shown(key)).collect::<Vec<_>>().join(", ");
        say(format_args!("ignored    {place}: {}", passed.reason));
    }
    for variable in &report.variables {
        let servers = variable.servers.iter().map(|name| shown(name)).collect::<Vec<_>>().join(", ");
        let need = if variable.has_default { "has a default" } else { "has to be set" };
        say(format_args!("variable   {} {need}; for {servers}", shown(&variable.name)));
    }
    let counts = done.map(|(what, names)| format!("{} {what}", names.len())).join(", ");
    let end = if report.dry_run { " A dry run: nothing was stored." } else { "" };
    say(format_args!("Servers: {counts}.{end}"));
}
