//! `portolan migrate-letta`: takes over what a Letta V1 database has of MCP servers. It says what becomes of each, and then
//! does it in one transaction; what is here already stays as it is.

mod plan;
mod unseal;

use std::fs;

use crate::app::make_data_folder;
use crate::config::{MigrateLetta, Settings};
use crate::model::{By, Secret};
use crate::store::{self, LettaDatabase, LettaRows, Step, Store};

use super::{open_store, say, shown};
use plan::{Choice, Fate, Here, Line, Plan, counted};
use unseal::Opener;

/// # Errors
/// One sentence for the person who runs it: nothing was written then.
pub async fn run(settings: &Settings, wanted: &MigrateLetta) -> Result<(), String> {
    let source = LettaDatabase::new(wanted.from.expose()).map_err(|error| error.to_string())?;
    let storage = &settings.storage;
    let target = storage.database_url.as_ref().map(Secret::expose);
    // The second look finds the same database by another name, too.
    if source.is(target, &storage.data_dir)
        || LettaDatabase::is_at(target, &storage.data_dir).await.map_err(|error| error.to_string())?
    {
        return Err("Letta and Portolan need a database each; give Portolan's with --database-url.".to_owned());
    }
    let opener = opener(wanted)?;
    let rows = source.read(wanted.schema.as_deref(), wanted.any_version).await.map_err(|error| error.to_string())?;
    let organization = wanted.organization.as_deref().map(|name| organization(&rows, name)).transpose()?;
    if rows.servers.is_empty() {
        return Err(format!("Letta has no MCP servers in {}.", source.describe()));
    }
    make_data_folder(settings).map_err(|error| error.to_string())?;
    let store = open_store(settings).await?;
    let choice = Choice { organization, without_secrets: wanted.without_secrets };
    let done = migrate(&store, &source, &rows, &opener, &choice, wanted.dry_run).await;
    store.close().await;
    done
}

/// With what the secrets of this Letta open.
fn opener(wanted: &MigrateLetta) -> Result<Opener, String> {
    if wanted.unsealed {
        return Ok(Opener::Unsealed);
    }
    let key = match &wanted.encryption_key_file {
        Some(file) => {
            let text = fs::read_to_string(file);
            let text = text.map_err(|error| format!("Cannot read the key in {}: {error}.", file.display()))?;
            Some(Secret::from(text.trim().to_owned()))
        }
        None => wanted.letta_encryption_key.clone(),
    };
    Ok(key.filter(|key| !key.expose().is_empty()).map_or(Opener::NoKey, Opener::Key))
}

/// The id of an organization that is given by its id or its name.
fn organization<'a>(rows: &'a LettaRows, wanted: &str) -> Result<&'a str, String> {
    let by_name = rows.organizations.iter().filter(|one| one.name.as_deref() == Some(wanted)).map(|one| &one.id);
    let by_id = rows.servers.iter().map(|server| &server.organization_id).filter(|id| *id == wanted);
    let mut ids: Vec<_> = by_name.chain(by_id).map(String::as_str).collect();
    ids.dedup();
    match ids[..] {
        [id] => Ok(id),
        [] => Err("No server in this Letta is of that organization.".to_owned()),
        _ => {
            let ids: Vec<_> = ids.into_iter().map(shown).collect();
            Err(format!("Several organizations have this name; choose by id: {}.", ids.join(", ")))
        }
    }
}

async fn migrate(
    store: &Store,
    source: &LettaDatabase,
    rows: &LettaRows,
    opener: &Opener,
    choice: &Choice<'_>,
    dry_run: bool,
) -> Result<(), String> {
    let here = here(store).await.map_err(failed)?;
    let plan = Plan::new(rows, opener, &here, choice);
    show(&plan, opener);
    let (coming, staying) = (plan.servers.len(), plan.count(Fate::Stays));
    if coming == 0 && plan.count(Fate::Here) == 0 {
        return Err("None of these servers can come.".to_owned());
    }
    if coming == 0 {
        say("There is nothing to do: what can come is here already.");
    } else if dry_run {
        say("This was a dry run: nothing was written. Without --dry-run, what comes is written in one transaction.");
    } else {
        let steps: Vec<_> = plan.servers.into_iter().map(|server| Step::Add(Box::new(server))).collect();
        store.change_servers(&steps, &By::MIGRATION).await.map_err(failed)?;
        say(format_args!("{} came to {}.", counted(coming, "server"), store.describe()));
    }
    if staying > 0 {
        say(format_args!(
            "{} in {}.",
            if staying == 1 { "1 server stays".to_owned() } else { format!("{staying} servers stay") },
            source.describe()
        ));
    }
    Ok(())
}

async fn here(store: &Store) -> Result<Here, store::Error> {
    let mut here = Here { servers: store.servers().await?, ..Here::default() };
    for server in &here.servers {
        here.tools.extend(store.tools(&server.id).await?.into_iter().map(|tool| tool.id));
    }
    Ok(here)
}

fn failed(error: store::Error) -> String {
    match error {
        store::Error::NameTaken => {
            "Somebody registered a server of the same name meanwhile; nothing was written. Try again.".to_owned()
        }
        error => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("Nothing was written: {error}{cause}.")
        }
    }
}

/// Prints a row for each server, with its notes under it, and what else there is to say.
fn show(plan: &Plan, opener: &Opener) {
    let fate = |fate| match fate {
        Fate::Comes => "comes",
        Fate::Here => "is here",
        Fate::Stays => "stays",
    };
    let row = |line: &Line| {
        [line.server_name.clone(), line.server_type.clone(), fate(line.fate).to_owned(), line.with.clone()]
    };
    let rows: Vec<_> = plan.lines.iter().map(|line| (row(line), line.notes.as_slice())).collect();
    let head = (["SERVER", "TYPE", "WHAT", "WITH"].map(str::to_owned), [].as_slice());
    let rows: Vec<_> = [head].into_iter().chain(rows).collect();
    let width = |column: usize| rows.iter().map(|(row, _)| row[column].chars().count()).max().unwrap_or_default();
    let (names, types, fates) = (width(0), width(1), width(2));
    for ([name, server_type, fate, with], notes) in &rows {
        say(format!("{name:names$}  {server_type:types$}  {fate:fates$}  {with}").trim_end());
        for note in *notes {
            say(format_args!("  - {note}"));
        }
    }
    say("");
    for remark in &plan.remarks {
        say(remark);
    }
    if plan.closed > 0 {
        say(match opener {
            Opener::Key(_) => {
                "The key given does not open all there is: it is what LETTA_ENCRYPTION_KEY was in Letta. With --without-secrets \
                 these servers come without what is sealed."
            }
            Opener::NoKey | Opener::Unsealed => {
                "Set LETTA_ENCRYPTION_KEY to what it was in Letta, or name a file with --encryption-key-file. With --unsealed \
                 every value is taken as it stands, for a Letta that had no key; with --without-secrets these servers come \
                 without what is sealed."
            }
        });
    }
    if !plan.to_refresh.is_empty() {
        let names: Vec<_> = plan.to_refresh.iter().map(|name| shown(name)).collect();
        say(format_args!(
            "Letta keeps one tool of a name and gives it to the server that came last: refresh {} afterwards (POST \
             /v1/tools/mcp/servers/NAME/resync), which repairs it.",
            names.join(", ")
        ));
    }
}
