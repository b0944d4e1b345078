//! The table `servers`.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use secrecy::zeroize::Zeroizing;
use serde_json::{Value, json};
use sqlx::Connection;

use crate::model::{Action, By, Connector, Era, OauthClient, Server, State};

use super::journal::{self, Note, note};
use super::sealing::ServerRow;
use super::{Error, Store, now, on_db};

/// The columns of [`Server`], after `SELECT` or `RETURNING`.
macro_rules! columns {
    () => {
        "id, server_name, type, config, revision, era, state, error, last_synced_at, created_at, updated_at, \
         (SELECT count(*) FROM tools WHERE tools.server_id = servers.id) AS tool_count"
    };
}

/// What the index `servers_to_connect` has; in its words, which a parameter does not have.
macro_rules! is_new {
    () => {
        "state = 'never_connected' AND last_synced_at IS NULL"
    };
}

/// How many ids one statement asks for. Those without a name are sent in a transaction: a pooler may give each message between
/// two transactions to another connection.
const IDS_AT_ONCE: usize = 500;

/// Ends the sign-ins to a server that are under way.
pub(super) const GIVE_UP: &str = "DELETE FROM authorizations WHERE server_id = $1";
/// Ends the sign-in to a server.
pub(super) const FORGET: &str = "DELETE FROM sign_ins WHERE server_id = $1";

/// What a change to a server writes.
pub struct ServerUpdate {
    pub server_name: String,
    /// A new configuration; the state of the old one is forgotten with it.
    pub connector: Option<Connector>,
    /// Removes the sign-in, and with it what says at which authorization server the client may be used.
    pub forgets_sign_in: bool,
}

/// What an attempt to reach a server found.
pub struct Reached {
    pub state: State,
    pub error: Option<String>,
    pub era: Option<Era>,
}

impl Store {
    /// Adds a server with no tools, never connected; nothing can be known of a new id. [`Error::NameTaken`] when another has its name.
    pub async fn create_server(
        &self,
        id: &str,
        server_name: &str,
        connector: &Connector,
        by: &By,
    ) -> Result<Server, Error> {
        const SQL: &str = concat!(
            "INSERT INTO servers (id, server_name, type, config, revision, state, created_at, updated_at) \
             VALUES ($1, $2, $3, $4, 1, $5, $6, $6) RETURNING ",
            columns!()
        );
        let config = self.sealed_config(id, connector);
        // A transaction, although it is one statement: sqlx takes one row from SQLite and hears nothing of a commit that
        // fails after it.
        on_db!(self, write pool => {
            let mut notes = self.notes();
            let mut transaction = pool.begin().await?;
            let server: ServerRow = sqlx::query_as(SQL)
                .bind(id)
                .bind(server_name)
                .bind(connector.server_type().as_str())
                .bind(config)
                .bind(State::NeverConnected.as_str())
                .bind(now())
                .fetch_one(&mut *transaction)
                .await
                .map_err(taken)?;
            let (server_id, server_name) = (Some(id), Some(server_name));
            let details = journal::registered(connector);
            note!(notes, transaction, Note { by, action: Action::ServerCreated, server_id, server_name, details })?;
            transaction.commit().await?;
            notes.committed();
            Ok(self.opened(server))
        })
    }

    /// All servers, oldest first. A row whose configuration cannot be read is among them (CONTRACT row 10).
    pub async fn servers(&self) -> Result<Vec<Server>, Error> {
        const SQL: &str = concat!("SELECT ", columns!(), " FROM servers ORDER BY created_at, id");
        let rows: Vec<ServerRow> = on_db!(self, long read pool => sqlx::query_as(SQL).fetch_all(pool).await)?;
        Ok(rows.into_iter().map(|row| self.opened(row)).collect())
    }

    /// As many servers as `limit` says, oldest first, after the one that was created then and has that id; without one, the
    /// oldest.
    pub async fn servers_after(&self, last: Option<(DateTime<Utc>, &str)>, limit: i64) -> Result<Vec<Server>, Error> {
        const FIRST: &str = concat!("SELECT ", columns!(), " FROM servers ORDER BY created_at, id LIMIT $1");
        const NEXT: &str = concat!(
            "SELECT ",
            columns!(),
            " FROM servers WHERE (created_at, id) > ($2, $3) ORDER BY created_at, id LIMIT $1"
        );
        let rows: Vec<ServerRow> = on_db!(self, read pool => match last {
            None => sqlx::query_as(FIRST).bind(limit).fetch_all(pool).await,
            Some((at, id)) => sqlx::query_as(NEXT).bind(limit).bind(at).bind(id).fetch_all(pool).await,
        })?;
        Ok(rows.into_iter().map(|row| self.opened(row)).collect())
    }

    /// How many servers nobody has connected to.
    pub async fn count_new_servers(&self) -> Result<i64, Error> {
        const SQL: &str = concat!("SELECT count(*) FROM servers WHERE ", is_new!());
        Ok(on_db!(self, read pool => sqlx::query_scalar(SQL).fetch_one(pool).await)?)
    }

    /// The ids of some that nobody has connected to, and that are from before `end`: in the order of their ids from the first
    /// one after `place` on, which is no server's id and may be anywhere among them, and then from the beginning.
    pub async fn new_servers(&self, place: &str, end: DateTime<Utc>, limit: usize) -> Result<Vec<String>, Error> {
        // IS TRUE keeps SQLite from the index by age, which has all servers.
        const AFTER: &str = concat!(
            "SELECT id FROM servers WHERE ",
            is_new!(),
            " AND id > $2 AND (created_at <= $1) IS TRUE ORDER BY id LIMIT $3"
        );
        const BEFORE: &str = concat!(
            "SELECT id FROM servers WHERE ",
            is_new!(),
            " AND id < $2 AND (created_at <= $1) IS TRUE ORDER BY id LIMIT $3"
        );
        let mut ids: Vec<String> = Vec::new();
        for sql in [AFTER, BEFORE] {
            let room = i64::try_from(limit - ids.len()).expect("a portion is small");
            if room == 0 {
                break;
            }
            ids.extend(on_db!(self, read pool => sqlx::query_scalar::<_, String>(sql)
                .bind(end)
                .bind(place)
                .bind(room)
                .fetch_all(pool)
                .await)?);
        }
        Ok(ids)
    }

    /// Those of these ids that are ids of servers.
    pub async fn existing_servers(&self, ids: &[String]) -> Result<HashSet<String>, Error> {
        let mut existing = HashSet::new();
        for ids in ids.chunks(IDS_AT_ONCE) {
            let found: Vec<String> = on_db!(self, read pool => {
                let mut query = sqlx::QueryBuilder::new("SELECT id FROM servers WHERE id IN (");
                let mut values = query.separated(", ");
                for id in ids {
                    values.push_bind(id);
                }
                query.push(")");
                let mut transaction = pool.begin().await?;
                let found = query.build_query_scalar().persistent(false).fetch_all(&mut *transaction).await?;
                transaction.commit().await.map(|()| found)
            })?;
            existing.extend(found);
        }
        Ok(existing)
    }

    /// As many ids of servers as `limit` says, in their order, after this one.
    pub async fn server_ids_after(&self, last: &str, limit: i64) -> Result<Vec<String>, Error> {
        const SQL: &str = "SELECT id FROM servers WHERE id > $1 ORDER BY id LIMIT $2";
        Ok(on_db!(self, read pool => sqlx::query_scalar(SQL).bind(last).bind(limit).fetch_all(pool).await)?)
    }

    /// The server with this id.
    pub async fn server(&self, id: &str) -> Result<Option<Server>, Error> {
        const SQL: &str = concat!("SELECT ", columns!(), " FROM servers WHERE id = $1");
        let row: Option<ServerRow> =
            on_db!(self, read pool => sqlx::query_as(SQL).bind(id).fetch_optional(pool).await)?;
        Ok(row.map(|row| self.opened(row)))
    }

    /// The revisions of the configurations of those of these servers that there are, at most 10,000.
    pub async fn revisions(&self, ids: &[&str]) -> Result<HashMap<String, i64>, Error> {
        let rows: Vec<(String, i64)> = on_db!(self, read pool => {
            let mut query = sqlx::QueryBuilder::new("SELECT id, revision FROM servers WHERE id IN (");
            let mut separated = query.separated(", ");
            for id in ids {
                separated.push_bind(*id);
            }
            // Nothing is in an empty list on SQLite, and PostgreSQL takes none.
            separated.push("NULL");
            query.push(")");
            let mut transaction = pool.begin().await?;
            let found = query.build_query_as().persistent(false).fetch_all(&mut *transaction).await?;
            transaction.commit().await.map(|()| found)
        })?;
        Ok(rows.into_iter().collect())
    }

    /// The server with this name.
    pub async fn server_by_name(&self, server_name: &str) -> Result<Option<Server>, Error> {
        const SQL: &str = concat!("SELECT ", columns!(), " FROM servers WHERE server_name = $1");
        let row: Option<ServerRow> =
            on_db!(self, read pool => sqlx::query_as(SQL).bind(server_name).fetch_optional(pool).await)?;
        Ok(row.map(|row| self.opened(row)))
    }

    /// Changes a server as `change` says of its present row, in one transaction that holds the row, so that of two
    /// changes at once neither is lost. `None` when there is no such server; an error of `change` leaves it as it was.
    pub async fn update_server<E: From<Error> + Send>(
        &self,
        id: &str,
        by: &By,
        change: impl FnOnce(&Server) -> Result<ServerUpdate, E> + Send,
    ) -> Result<Option<Server>, E> {
        // An UPDATE that changes nothing takes the row lock on PostgreSQL and the write lock on SQLite.
        const LOCK: &str = concat!("UPDATE servers SET revision = revision WHERE id = $1 RETURNING ", columns!());
        const RENAME: &str =
            concat!("UPDATE servers SET server_name = $2, updated_at = $3 WHERE id = $1 RETURNING ", columns!());
        const CONFIGURE: &str = concat!(
            "UPDATE servers SET server_name = $2, updated_at = $3, type = $4, config = $5, revision = revision + 1, \
             era = NULL, state = $6, error = NULL WHERE id = $1 RETURNING ",
            columns!()
        );
        let write = async {
            on_db!(self, write pool => {
                let mut notes = self.notes();
                let mut transaction = pool.begin().await.map_err(Error::from)?;
                let current: Option<ServerRow> =
                    sqlx::query_as(LOCK).bind(id).fetch_optional(&mut *transaction).await.map_err(Error::from)?;
                let Some(current) = current else { return Ok(Ok(None)) };
                let current = self.opened(current);
                let update = match change(&current) {
                    Ok(update) => update,
                    Err(refusal) => return Ok(Err(refusal)),
                };
                let client_changes = update.connector.as_ref().is_some_and(|new| {
                    current.config.0.as_ref().ok().and_then(client) != client(new)
                });
                let changed: Result<ServerRow, _> = match &update.connector {
                    None => sqlx::query_as(RENAME)
                        .bind(id)
                        .bind(&update.server_name)
                        .bind(now())
                        .fetch_one(&mut *transaction)
                        .await,
                    Some(connector) => sqlx::query_as(CONFIGURE)
                        .bind(id)
                        .bind(&update.server_name)
                        .bind(now())
                        .bind(connector.server_type().as_str())
                        .bind(self.sealed_config(id, connector))
                        .bind(State::NeverConnected.as_str())
                        .fetch_one(&mut *transaction)
                        .await,
                };
                let changed = changed.map_err(taken)?;
                // Those that are under way are for the client of before. First, because the holder of one may just write
                // what it brought.
                if update.forgets_sign_in || client_changes {
                    sqlx::query(GIVE_UP).bind(id).execute(&mut *transaction).await.map_err(Error::from)?;
                }
                let mut forgotten = 0;
                if update.forgets_sign_in {
                    let forget = sqlx::query(FORGET).bind(id).execute(&mut *transaction).await;
                    forgotten = forget.map_err(Error::from)?.rows_affected();
                }
                let (server_id, server_name) = (Some(id), Some(update.server_name.as_str()));
                let details = updated(&current, &update);
                note!(notes, transaction, Note { by, action: Action::ServerUpdated, server_id, server_name, details })
                    .map_err(Error::from)?;
                if forgotten > 0 {
                    let details = json!({});
                    note!(notes, transaction, Note { by, action: Action::SignInRemoved, server_id, server_name, details })
                        .map_err(Error::from)?;
                }
                transaction.commit().await.map_err(Error::from)?;
                notes.committed();
                Ok::<_, Error>(Ok(Some(self.opened(changed))))
            })
        };
        self.known.during(id, write).await?
    }

    /// Removes a server and its tools; `false` when there is none.
    pub async fn delete_server(&self, id: &str, by: &By) -> Result<bool, Error> {
        const SQL: &str = "DELETE FROM servers WHERE id = $1 RETURNING server_name";
        let write = async {
            on_db!(self, write pool => {
                let mut notes = self.notes();
                let mut transaction = pool.begin().await?;
                let name: Option<String> = sqlx::query_scalar(SQL).bind(id).fetch_optional(&mut *transaction).await?;
                let Some(name) = name else { return Ok(false) };
                let (server_id, server_name) = (Some(id), Some(name.as_str()));
                let details = json!({});
                note!(notes, transaction, Note { by, action: Action::ServerDeleted, server_id, server_name, details })?;
                transaction.commit().await?;
                notes.committed();
                Ok(true)
            })
        };
        self.known.during(id, write).await
    }

    /// Notes what an attempt to reach the server found, unless its configuration has changed since.
    pub async fn record_reached(&self, id: &str, revision: i64, reached: &Reached) -> Result<(), Error> {
        const SQL: &str = "UPDATE servers SET state = $3, error = $4, era = $5 WHERE id = $1 AND revision = $2";
        let write = async {
            on_db!(self, write pool => sqlx::query(SQL)
                .bind(id)
                .bind(revision)
                .bind(reached.state.as_str())
                .bind(self.sealed_error(id, reached.error.as_deref()))
                .bind(reached.era.map(Era::as_str))
                .execute(pool)
                .await
                .map(|_| ()))
        };
        Ok(self.known.during(id, write).await?)
    }
}

/// As which client a server is signed in at, if one is configured.
pub(super) fn client(connector: &Connector) -> Option<&OauthClient> {
    match connector {
        Connector::Stdio(_) => None,
        Connector::Sse(remote) | Connector::StreamableHttp(remote) => remote.oauth.as_ref(),
    }
}

/// What the log of changes tells of an update: the keys that differ, and the name of before.
fn updated(current: &Server, update: &ServerUpdate) -> Value {
    let mut details = match &update.connector {
        Some(connector) => journal::reconfigured(current.config.0.as_ref().ok(), connector),
        None => json!({ "changed": [] }),
    };
    if current.server_name != update.server_name {
        details["renamed_from"] = json!(current.server_name);
    }
    details
}

/// What is sealed of a connector.
pub(super) fn to_text(connector: &Connector) -> Zeroizing<String> {
    Zeroizing::new(serde_json::to_string(connector).expect("a connector is strings and maps of strings"))
}

pub(super) fn taken(error: sqlx::Error) -> Error {
    match error.as_database_error() {
        Some(refusal) if refusal.is_unique_violation() => Error::NameTaken,
        _ => error.into(),
    }
}
