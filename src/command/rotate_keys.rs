//! `portolan rotate-keys`: seals all stored secrets again with the first key, while Portolan serves.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::config::Settings;
use crate::progress::Progress;
use crate::store::{Error, Store};

use super::{Document, Failure, open_store, say, value};

/// What came of it, and what each key seals then.
#[derive(Serialize)]
struct Report {
    dry_run: bool,
    /// Servers that were sealed again.
    sealed: i64,
    /// Servers that cannot be opened; a dry run does not look.
    unopened: Option<i64>,
    keys: Vec<Key>,
}

#[derive(Serialize)]
struct Key {
    id: String,
    role: Role,
    /// How many it seals.
    servers: i64,
}

#[derive(Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    First,
    /// It only opens.
    Opens,
    /// It is not among the keys, and seals something all the same.
    Missing,
}

/// # Errors
/// One sentence, also when a server could not be sealed again.
pub async fn run(settings: &Settings, dry_run: bool, as_json: bool) -> Result<(), Failure> {
    let store = open_store(settings).await?;
    let done = if dry_run { count(&store).await } else { rotate(&store).await };
    store.close().await;
    let report = done.map_err(failed)?;
    let failure = match report.unopened {
        Some(left @ 1..) => Some(Failure::from(format!(
            "{} could not be opened and stay as they were; the list of servers says why.",
            servers(left)
        ))),
        _ => None,
    };
    match (as_json, failure) {
        (true, None) => say(Document(value(&report))),
        (true, Some(failure)) => return Err(failure.with(&report)),
        (false, failure) => {
            tell(&report);
            return failure.map_or(Ok(()), Err);
        }
    }
    Ok(())
}

async fn count(store: &Store) -> Result<Report, Error> {
    let sealed_by = store.sealed_by().await?;
    Ok(Report { dry_run: true, sealed: 0, unopened: None, keys: keys(store, &sealed_by) })
}

async fn rotate(store: &Store) -> Result<Report, Error> {
    let mut progress = Progress::of_command();
    let rotated = store.rotate(|seen, all| {
        let number = |of: i64| usize::try_from(of).unwrap_or_default();
        progress.tell(number(seen), number(all), format_args!("sealing again: {seen} of {}", servers(all)));
    });
    let rotated = rotated.await?;
    let keys = keys(store, &rotated.sealed_by);
    Ok(Report { dry_run: false, sealed: rotated.sealed, unopened: Some(rotated.unopened), keys })
}

fn keys(store: &Store, sealed_by: &BTreeMap<String, i64>) -> Vec<Key> {
    let ring = store.key_ids();
    let missing = sealed_by.keys().filter(|id| !ring.contains(id)).map(|id| (id.clone(), Role::Missing));
    let roles = [Role::First].into_iter().chain(std::iter::repeat(Role::Opens));
    let keys = ring.iter().cloned().zip(roles).chain(missing);
    keys.map(|(id, role)| Key { servers: sealed_by.get(&id).copied().unwrap_or(0), id, role }).collect()
}

fn tell(report: &Report) {
    let first = report.keys.iter().find(|key| key.role == Role::First);
    if let Some(Key { id, .. }) = first.filter(|_| !report.dry_run) {
        say(format_args!("{} sealed again with key {id}.", servers(report.sealed)));
    }
    for Key { id, role, servers: number } in &report.keys {
        let number = (*number, servers(*number));
        match (role, report.dry_run, number) {
            (Role::First, true, (_, servers)) => say(format_args!("Key {id}, the first, seals {servers}.")),
            (Role::First, false, _) => {}
            (Role::Opens, true, (_, servers)) => say(format_args!("Key {id}, which only opens, seals {servers}.")),
            (Role::Opens, false, (0, _)) => {
                say(format_args!("Key {id} seals nothing any more: take it out of the key file."));
            }
            (Role::Opens, false, (_, servers)) => say(format_args!("Key {id} is still needed: it seals {servers}.")),
            (Role::Missing, _, (_, servers)) => {
                say(format_args!("Key {id}, which is not among the keys, seals {servers}."));
            }
        }
    }
}

fn servers(number: i64) -> String {
    if number == 1 { "1 server".to_owned() } else { format!("{number} servers") }
}

fn failed(error: Error) -> String {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("The rotation stopped, and can be begun again: {error}{cause}.")
}
