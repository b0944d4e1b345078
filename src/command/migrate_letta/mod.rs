//! `portolan migrate-letta`: takes over what a Letta V1 database has of MCP servers. It says what becomes of each, and then
//! does it in one transaction; what is here already stays as it is.

mod plan;
mod unseal;

use std::fs;

use serde::Serialize;

use crate::app::make_data_folder;
use crate::config::{MigrateLetta, Settings};
use crate::model::{By, Secret};
use crate::progress::Progress;
use crate::store::{self, LettaDatabase, LettaRows, Step, Store};

use super::{Document, Failure, open_store, say, shown, value};
use plan::{Choice, Fate, Here, Line, Plan, counted};
use unseal::Opener;

/// What becomes, or would, of what a Letta has.
#[derive(Serialize)]
struct Report<'a> {
    dry_run: bool,
    /// How many servers were written.
    came: usize,
    servers: &'a [Line],
    /// What is to be said of no server in particular.
    remarks: &'a [String],
    /// Servers to refresh afterwards, by name: Letta gave some of their tools to others.
    to_refresh: &'a [String],
    /// How many servers have a secret that cannot be opened.
    closed: usize,
    /// Where all this is: kind and place, no credentials.
    from: &'a str,
    to: String,
}

/// # Errors
/// One sentence for the person who runs it: nothing was written then.
pub async fn run(settings: &Settings, wanted: &MigrateLetta, as_json: bool) -> Result<(), Failure> {
    let source = LettaDatabase::new(wanted.from.expose()).map_err(|error| error.to_string())?;
    let storage = &settings.storage;
    let target = storage.database_url.as_ref().map(Secret::expose);
    let mut progress = Progress::of_command();
    progress.tell(0, 0, "reading Letta's database");
    // The second look finds the same database by another name, too.
    if source.is(target, &storage.data_dir)
        || LettaDatabase::is_at(target, &storage.data_dir).await.map_err(|error| error.to_string())?
    {
        let one = "Letta and Portolan need a database each; give Portolan's with --database-url.";
        return Err(one.to_owned().into());
    }
    let opener = opener(wanted)?;
    let rows = source.read(wanted.schema.as_deref(), wanted.any_version).await.map_err(|error| error.to_string())?;
    let organization = wanted.organization.as_deref().map(|name| organization(&rows, name)).transpose()?;
    if rows.servers.is_empty() {
        return Err(format!("Letta has no MCP servers in {}.", source.describe()).into());
    }
    // The opening of the other one may have something to say.
    progress.clear();
    make_data_folder(settings).map_err(|error| error.to_string())?;
    let store = open_store(settings).await?;
    let choice = Choice { organization, without_secrets: wanted.without_secrets };
    let migration = Migration { store: &store, source: &source, rows: &rows, opener: &opener, as_json };
    let done = migration.run(&choice, wanted.dry_run, progress).await;
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

struct Migration<'a> {
    store: &'a Store,
    source: &'a LettaDatabase,
    rows: &'a LettaRows,
    opener: &'a Opener,
    as_json: bool,
}

impl Migration<'_> {
    async fn run(&self, choice: &Choice<'_>, dry_run: bool, mut progress: Progress) -> Result<(), Failure> {
        let here = here(self.store).await.map_err(failed)?;
        let mut plan = Plan::new(self.rows, self.opener, &here, choice, |known, all| {
            progress.tell(known, all, format_args!("looking at servers: {known} of {all}"));
        });
        progress.clear();
        if !self.as_json {
            show(&plan, self.opener);
        }
        let steps: Vec<_> = plan.servers.drain(..).map(|server| Step::Add(Box::new(server))).collect();
        let coming = steps.len();
        let report = |came| Report {
            dry_run,
            came,
            servers: &plan.lines,
            remarks: &plan.remarks,
            to_refresh: &plan.to_refresh,
            closed: plan.closed,
            from: self.source.describe(),
            to: self.store.describe(),
        };
        if coming == 0 && plan.count(Fate::Here) == 0 {
            return Err(Failure::from("None of these servers can come.".to_owned()).with(&report(0)));
        }
        let came = if dry_run { 0 } else { coming };
        if came > 0 {
            let show = |done| progress.tell(done, coming, format_args!("writing servers: {done} of {coming}"));
            let written = self.store.change_servers(&steps, &By::MIGRATION, show).await;
            progress.clear();
            written.map_err(|error| Failure::from(failed(error)).with(&report(0)))?;
        }
        match self.as_json {
            true => say(Document(value(&report(came)))),
            false => self.tell(coming, dry_run, plan.count(Fate::Stays)),
        }
        Ok(())
    }

    /// Says how it ended.
    fn tell(&self, coming: usize, dry_run: bool, staying: usize) {
        if coming == 0 {
            say("There is nothing to do: what can come is here already.");
        } else if dry_run {
            say(
                "This was a dry run: nothing was written. Without --dry-run, what comes is written in one transaction.",
            );
        } else {
            say(format_args!("{} came to {}.", counted(coming, "server"), self.store.describe()));
        }
        if staying > 0 {
            say(format_args!(
                "{} in {}.",
                if staying == 1 { "1 server stays".to_owned() } else { format!("{staying} servers stay") },
                self.source.describe()
            ));
        }
    }
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
        let with = if line.fate == Fate::Comes { line.with.words() } else { String::new() };
        [shown(&line.server_name), shown(&line.mcp_server_type), fate(line.fate).to_owned(), with]
    };
    let notes = |line: &Line| line.reasons.iter().chain(&line.notes).cloned().collect::<Vec<_>>();
    let rows: Vec<_> = plan.lines.iter().map(|line| (row(line), notes(line))).collect();
    let head = (["SERVER", "TYPE", "WHAT", "WITH"].map(str::to_owned), vec![]);
    let rows: Vec<_> = [head].into_iter().chain(rows).collect();
    let width = |column: usize| rows.iter().map(|(row, _)| row[column].chars().count()).max().unwrap_or_default();
    let (names, types, fates) = (width(0), width(1), width(2));
    for ([name, server_type, fate, with], notes) in &rows {
        say(format!("{name:names$}  {server_type:types$}  {fate:fates$}  {with}").trim_end());
        for note in notes {
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
