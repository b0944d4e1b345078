//! `portolan rotate-keys`: seals all stored secrets again with the first key, while Portolan serves.

use std::collections::BTreeMap;

use crate::config::Settings;
use crate::store::{Error, Store};

use super::{open_store, say};

/// # Errors
/// One sentence, also when a server could not be sealed again.
pub async fn run(settings: &Settings, dry_run: bool) -> Result<(), String> {
    let store = open_store(settings).await?;
    let done = if dry_run { count(&store).await } else { rotate(&store).await };
    store.close().await;
    done
}

async fn count(store: &Store) -> Result<(), String> {
    let sealed_by = store.sealed_by().await.map_err(failed)?;
    let keys = store.key_ids();
    for (number, key) in keys.iter().enumerate() {
        let servers = servers(sealed_by.get(key).copied().unwrap_or(0));
        say(format_args!(
            "Key {key}, {}, seals {servers}.",
            if number == 0 { "the first" } else { "which only opens" }
        ));
    }
    for (key, rows) in missing(&sealed_by, &keys) {
        say(format_args!("Key {key}, which is not among the keys, seals {}.", servers(rows)));
    }
    Ok(())
}

async fn rotate(store: &Store) -> Result<(), String> {
    let keys = store.key_ids();
    let rotated = store.rotate(|sealed| say(format_args!("{} sealed again …", servers(sealed)))).await;
    let rotated = rotated.map_err(failed)?;
    say(format_args!("{} sealed again with key {}.", servers(rotated.sealed), keys[0]));
    for key in &keys[1..] {
        match rotated.sealed_by.get(key) {
            None => say(format_args!("Key {key} seals nothing any more: take it out of the key file.")),
            Some(rows) => say(format_args!("Key {key} is still needed: it seals {}.", servers(*rows))),
        }
    }
    for (key, rows) in missing(&rotated.sealed_by, &keys) {
        say(format_args!("Key {key}, which is not among the keys, seals {}.", servers(rows)));
    }
    match rotated.unopened {
        0 => Ok(()),
        left => {
            Err(format!("{} could not be opened and stay as they were; the list of servers says why.", servers(left)))
        }
    }
}

/// Keys that seal servers and are not on the ring.
fn missing<'a>(sealed_by: &'a BTreeMap<String, i64>, keys: &'a [String]) -> impl Iterator<Item = (&'a str, i64)> {
    sealed_by.iter().filter(|(key, _)| !keys.contains(key)).map(|(key, rows)| (key.as_str(), *rows))
}

fn servers(number: i64) -> String {
    if number == 1 { "1 server".to_owned() } else { format!("{number} servers") }
}

fn failed(error: Error) -> String {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("The rotation stopped, and can be begun again: {error}{cause}.")
}
