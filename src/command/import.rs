//! `portolan import`: registers the servers of a configuration file, on the database itself.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::api::{Import, Report};
use crate::app::{Commands, make_data_folder};
use crate::config::Settings;
use crate::error::Error;
use crate::model::By;
use crate::progress::Progress;

use super::{Document, Failure, open_store, say, shown, value};

/// One byte more than the largest file, so that a larger one is known.
const MOST: u64 = 1024 * 1024 + 1;

/// # Errors
/// One sentence for each thing that is wrong, with its place in the file; nothing was stored then.
pub async fn run(settings: &Settings, file: &Path, asked: Import, as_json: bool) -> Result<(), Failure> {
    let text = read(file).map_err(|error| format!("Cannot read {}: {error}.", file.display()))?;
    let commands = Commands::read(&settings.children).map_err(|error| error.to_string())?;
    make_data_folder(settings).map_err(|error| error.to_string())?;
    let store = open_store(settings).await?;
    let mut progress = Progress::of_command();
    let show = |done, all| progress.tell(done, all, format_args!("storing servers: {done} of {all}"));
    let done = asked.run(&store, text, &By::IMPORT, |connector| commands.check(connector), show).await;
    store.close().await;
    drop(progress);
    let report = done.map_err(failed)?.report;
    match as_json {
        true => say(Document(value(&report))),
        false => tell(&report),
    }
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

fn failed(error: Error) -> Failure {
    match error {
        Error::Invalid(issues) => {
            let detail: Vec<_> = issues.iter().map(|issue| &*issue.msg).collect();
            Failure { issues: issues.clone(), ..detail.join("\n").into() }
        }
        Error::BodyTooLarge { limit } => {
            format!("The file is larger than {limit} bytes, the most that is read.").into()
        }
        other => {
            let cause = std::error::Error::source(&other).map(|cause| format!(" ({cause})")).unwrap_or_default();
            format!("{other}{cause}").into()
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
