//! The table `changes`: who changed what of servers, tools and sign-ins. A row is written in the transaction of its change,
//! so that there is one of each change that happened and none of one that did not.
//!
//! Ids grow in the order in which changes become visible (the migration says how), so that other Portolans on the same
//! database read what is new after the last id that they have seen.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use crate::model::{Action, By, Change, Connector, ToolChanges};

use super::{Database, Error, Store, on_db};

/// How many names of tools a row tells, and the characters of each: they are a server's own words.
const MAX_NAMES: usize = 20;
const MAX_NAME_CHARS: usize = 100;
/// How many rows one statement of a sweep removes: others write between two of them.
const SWEPT_AT_ONCE: i64 = 500;

/// How many rows one statement writes, six values each, of which SQLite takes 32,766.
pub(super) const ROWS_AT_ONCE: usize = 500;
/// Before the rows.
pub(super) const INSERT: &str = "INSERT INTO changes (at, caller, action, mcp_server_id, server_name, details) ";

/// A change, in the words of its row.
pub(super) struct Note<'a> {
    pub by: &'a By,
    pub action: Action,
    pub server_id: Option<&'a str>,
    pub server_name: Option<&'a str>,
    /// Names and counts, never values.
    pub details: Value,
}

/// Writes a [`Note`] in a transaction, as one of these [`Notes`](super::feed::Notes). The last thing that happens there: on
/// PostgreSQL those who note something wait for each other.
macro_rules! note {
    ($notes:expr, $transaction:expr, $note:expr) => {{
        let note: $crate::store::journal::Note<'_> = $note;
        sqlx::query_scalar::<_, i64>(
            "INSERT INTO changes (at, caller, action, mcp_server_id, server_name, details) VALUES ($1, $2, $3, $4, $5, $6) \
             RETURNING id",
        )
        .bind($crate::store::now())
        .bind(note.by.name())
        .bind(note.action.as_str())
        .bind(note.server_id)
        .bind(note.server_name)
        .bind(note.details.to_string())
        .fetch_one(&mut *$transaction)
        .await
        .map(|id| $notes.wrote([id]))
    }};
}
pub(super) use note;

/// Which changes are asked for; of these the newest.
#[derive(Clone, Debug, Default)]
pub struct ChangesWanted {
    pub mcp_server_id: Option<String>,
    pub caller: Option<String>,
    /// From this time on, and before that one.
    pub since: Option<DateTime<Utc>>,
    pub until: Option<DateTime<Utc>>,
    /// Those before this one.
    pub before: Option<i64>,
    pub limit: i64,
}

impl Store {
    /// The changes that are wanted, the newest first.
    pub async fn changes(&self, wanted: &ChangesWanted) -> Result<Vec<Change>, Error> {
        const SELECT: &str =
            "SELECT id, at, caller, action, mcp_server_id, server_name, details FROM changes WHERE 1 = 1";
        Ok(on_db!(self, long read pool => {
            let mut query = sqlx::QueryBuilder::new(SELECT);
            if let Some(server_id) = &wanted.mcp_server_id {
                query.push(" AND mcp_server_id = ").push_bind(server_id);
            }
            if let Some(caller) = &wanted.caller {
                query.push(" AND caller = ").push_bind(caller);
            }
            if let Some(since) = wanted.since {
                query.push(" AND at >= ").push_bind(since);
            }
            if let Some(until) = wanted.until {
                query.push(" AND at < ").push_bind(until);
            }
            if let Some(before) = wanted.before {
                query.push(" AND id < ").push_bind(before);
            }
            query.push(" ORDER BY id DESC LIMIT ").push_bind(wanted.limit);
            query.build_query_as().fetch_all(pool).await
        })?)
    }

    /// Removes some of the changes from before `end`; how many, 0 when there are no more than what another Portolan removes
    /// just now.
    pub async fn forget_changes(&self, end: DateTime<Utc>) -> Result<u64, Error> {
        let sql = match self.database {
            // Several sweep at once: none waits for another.
            Database::Postgres(_) => {
                "DELETE FROM changes WHERE id IN \
                 (SELECT id FROM changes WHERE at < $1 ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED)"
            }
            Database::Sqlite { .. } => {
                "DELETE FROM changes WHERE id IN (SELECT id FROM changes WHERE at < $1 ORDER BY at LIMIT $2)"
            }
        };
        Ok(on_db!(self, long write pool => {
            sqlx::query(sql).bind(end).bind(SWEPT_AT_ONCE).execute(pool).await.map(|done| done.rows_affected())
        })?)
    }
}

/// What is told of a new server.
pub(super) fn registered(connector: &Connector) -> Value {
    json!({ "type": connector.server_type().as_str() })
}

/// What is told of a configuration that took the place of another: the keys that differ.
pub(super) fn reconfigured(old: Option<&Connector>, new: &Connector) -> Value {
    let Some(old) = old else { return json!({ "changed": ["config"] }) };
    let keys = |connector| serde_json::to_value(connector).map(|value| value.as_object().cloned().unwrap_or_default());
    let (old, new) = (keys(old).unwrap_or_default(), keys(new).unwrap_or_default());
    json!({ "changed": different(&old, &new) })
}

fn different<'a>(old: &'a Map<String, Value>, new: &'a Map<String, Value>) -> Vec<&'a str> {
    let differs = |key: &&String| old.get(*key) != new.get(*key);
    let gone = old.keys().filter(|key| !new.contains_key(*key));
    new.keys().chain(gone).filter(differs).map(String::as_str).collect()
}

/// What is told of a sync: how many tools came, changed and went, and some of their names, as `shown` makes them; `None`
/// when nothing did.
pub(super) fn synced(changes: &ToolChanges, shown: &(dyn Fn(&str) -> String + Sync)) -> Option<Value> {
    let mut details = Map::new();
    for (what, names) in [("added", &changes.added), ("updated", &changes.updated), ("deleted", &changes.deleted)] {
        if !names.is_empty() {
            let told = names.iter().take(MAX_NAMES);
            let told: Vec<String> = told.map(|name| shown(name).chars().take(MAX_NAME_CHARS).collect()).collect();
            details.insert(what.to_owned(), json!({ "count": names.len(), "names": told }));
        }
    }
    if details.is_empty() {
        return None;
    }
    if !changes.held.is_empty() {
        details.insert("held".to_owned(), json!({ "count": changes.held.len() }));
    }
    Some(Value::Object(details))
}
