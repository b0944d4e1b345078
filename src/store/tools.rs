//! The table `tools`.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::{Connection, FromRow};

use crate::model::{Action, By, Era, Offered, ServerTool, State, Tool, ToolChanges, sha256_hex};

use super::changes::{Plan, Trust};
use super::journal::{self, Note, note};
use super::sealing::ServerRow;
use super::{Error, Store, now, on_db};

/// The columns of [`Tool`], as `tools` has them.
macro_rules! columns {
    () => {
        "tools.id AS tool_id, server_id, name, position, definition, definition_hash, approved_hash, changes"
    };
}

/// Tools inserted by one statement; nine values each, and SQLite takes 32,766.
const ROWS_AT_ONCE: usize = 500;
/// How many tools that are gone are remembered of one server, the last ones.
const MAX_GONE: i64 = 1_000;

const LIST: &str = concat!("SELECT ", columns!(), " FROM tools WHERE server_id = $1 ORDER BY position");

/// What a server offers, and what is to become of it.
pub struct Listing<'a> {
    pub era: Option<Era>,
    /// For the status of the server.
    pub notice: Option<&'a str>,
    /// Names are unique, in the server's order.
    pub offered: &'a [Offered],
    /// Whether what is not as it was approved waits for [`Store::approve_tool`]; if not, all that is offered is approved.
    pub hold: bool,
    /// The name of a tool as the log of changes may show it.
    pub shown: &'a (dyn Fn(&str) -> String + Sync),
    pub over: Over,
}

/// Over which stored list this one may be written.
#[derive(Clone, Copy)]
pub enum Over {
    /// That of then, when the server was synced last before this list was asked for, or an equal one. What another Portolan
    /// has stored since may be newer than what is at hand.
    Of(Option<DateTime<Utc>>),
    Any,
}

/// A tool and its server, as they are stored.
#[derive(FromRow)]
struct Row {
    #[sqlx(flatten)]
    server: ServerRow,
    #[sqlx(flatten)]
    tool: Tool,
}

impl Store {
    /// The tools of a server in the server's own order.
    pub async fn tools(&self, server_id: &str) -> Result<Vec<Tool>, Error> {
        Ok(on_db!(self, read pool => sqlx::query_as(LIST).bind(server_id).fetch_all(pool).await)?)
    }

    /// A tool of this server, with the server; a tool of another one is not found (CONTRACT row 9). From memory when it
    /// is known, because every run waits for it; what another Portolan wrote to the same database may be a moment late, and
    /// 15 s at most.
    pub async fn tool(&self, server_id: &str, tool_id: &str) -> Result<Option<Arc<ServerTool>>, Error> {
        const SQL: &str = concat!(
            "SELECT servers.id, server_name, type, config, revision, era, state, error, last_synced_at, created_at, \
             updated_at, CAST(0 AS BIGINT) AS tool_count, ",
            columns!(),
            " FROM tools JOIN servers ON servers.id = server_id WHERE tools.id = $1 AND server_id = $2"
        );
        if let Some(known) = self.known.find(server_id, tool_id) {
            return Ok(Some(known));
        }
        let reading = self.known.reading();
        let found: Option<Row> = on_db!(self, read pool => sqlx::query_as(SQL)
            .bind(tool_id)
            .bind(server_id)
            .fetch_optional(pool)
            .await)?;
        let found = found.map(|Row { server, tool }| Arc::new(ServerTool { server: self.opened(server), tool }));
        // One that cannot be opened may be once its key has come, which is no change of it.
        if let Some(row) = &found
            && row.server.config.0.is_ok()
        {
            self.known.remember(reading, row);
        }
        Ok(found)
    }

    /// The id of the tool that a server calls by this name.
    pub async fn tool_by_name(&self, server_id: &str, name: &str) -> Result<Option<String>, Error> {
        const SQL: &str = "SELECT id FROM tools WHERE server_id = $1 AND name_digest = $2";
        let found: Option<(String,)> = on_db!(self, read pool => sqlx::query_as(SQL)
            .bind(server_id)
            .bind(sha256_hex(name))
            .fetch_optional(pool)
            .await)?;
        Ok(found.map(|(id,)| id))
    }

    /// Makes the tools of a server equal to what it offers and notes that it is ready, in one transaction. A tool keeps its
    /// id as long as its name is offered. `None` when the server is gone or its configuration is no longer `revision`; then
    /// nothing is changed, nor on [`Error::Overtaken`], when it would be written over another list than [`Over`] allows.
    pub async fn sync_tools(
        &self,
        server_id: &str,
        revision: i64,
        listing: &Listing<'_>,
        by: &By,
    ) -> Result<Option<ToolChanges>, Error> {
        let Listing { era, notice, offered, hold, shown, over } = *listing;
        // The first statement also takes the server's row lock (on SQLite: the write lock) against a second sync.
        const LOCK: &str = "UPDATE servers SET revision = revision WHERE id = $1 AND revision = $2 RETURNING last_synced_at, server_name";
        const READY: &str = "UPDATE servers SET state = $3, error = $6, era = $4, last_synced_at = $5 \
                             WHERE id = $1 AND revision = $2";
        const DELETE: &str = "DELETE FROM tools WHERE id = $1";
        const UPDATE: &str = "UPDATE tools SET position = $2, definition = $3, definition_hash = $4, approved_hash = $5, \
                              changes = $6 WHERE id = $1";
        const INSERT: &str = "INSERT INTO tools (id, server_id, name, name_digest, position, definition, definition_hash, \
                              approved_hash, changes) ";
        const GONE: &str =
            "SELECT name_digest, definition_hash, approved_hash, changes FROM gone_tools WHERE server_id = $1";
        const LEAVE: &str = "INSERT INTO gone_tools (server_id, name_digest, definition_hash, approved_hash, changes, gone_at) \
                             VALUES ($1, $2, $3, $4, $5, $6)";
        const RETURN: &str = "DELETE FROM gone_tools WHERE server_id = $1 AND name_digest = $2";
        const FORGET: &str = "DELETE FROM gone_tools WHERE server_id = $1 AND name_digest NOT IN (SELECT name_digest FROM \
                              gone_tools WHERE server_id = $1 ORDER BY gone_at DESC, name_digest LIMIT $2)";
        let now = now();
        let write = async {
            on_db!(self, write pool => {
                let mut notes = self.notes();
                let mut transaction = pool.begin().await?;
                let found: Option<(Option<DateTime<Utc>>, String)> =
                    sqlx::query_as(LOCK).bind(server_id).bind(revision).fetch_optional(&mut *transaction).await?;
                let Some((last_synced_at, server_name)) = found else { return Ok(None) };
                sqlx::query(READY)
                    .bind(server_id)
                    .bind(revision)
                    .bind(State::Ready.as_str())
                    .bind(era.map(Era::as_str))
                    .bind(now)
                    .bind(self.sealed_error(server_id, notice))
                    .execute(&mut *transaction)
                    .await?;
                let current: Vec<Tool> = sqlx::query_as(LIST).bind(server_id).fetch_all(&mut *transaction).await?;
                let gone = sqlx::query_as(GONE).bind(server_id).fetch_all(&mut *transaction).await?;
                let trust = Trust { is_first: last_synced_at.is_none(), hold };
                let plan = Plan::new(&current, gone, offered, trust, now);
                if matches!(over, Over::Of(before) if before != last_synced_at) && !plan.is_empty() {
                    return Err(Error::Overtaken);
                }
                for digest in &plan.returned {
                    sqlx::query(RETURN).bind(server_id).bind(digest).execute(&mut *transaction).await?;
                }
                for tool in &plan.delete {
                    sqlx::query(DELETE).bind(&tool.id).execute(&mut *transaction).await?;
                    sqlx::query(LEAVE)
                        .bind(server_id)
                        .bind(sha256_hex(&tool.name))
                        .bind(tool.hash())
                        .bind(&tool.approved_hash)
                        .bind(&tool.changes)
                        .bind(now)
                        .execute(&mut *transaction)
                        .await?;
                }
                if !plan.delete.is_empty() {
                    sqlx::query(FORGET).bind(server_id).bind(MAX_GONE).execute(&mut *transaction).await?;
                }
                for (tool, row) in &plan.update {
                    sqlx::query(UPDATE)
                        .bind(&tool.id)
                        .bind(row.position)
                        .bind(&row.offered.definition)
                        .bind(&row.hash)
                        .bind(&row.approved_hash)
                        .bind(&row.changes)
                        .execute(&mut *transaction)
                        .await?;
                }
                for rows in plan.insert.chunks(ROWS_AT_ONCE) {
                    let mut insert = sqlx::QueryBuilder::new(INSERT);
                    insert.push_values(rows, |mut values, row| {
                        values
                            .push_bind(format!("tool-{}", uuid::Uuid::new_v4()))
                            .push_bind(server_id)
                            .push_bind(&row.offered.name)
                            .push_bind(sha256_hex(&row.offered.name))
                            .push_bind(row.position)
                            .push_bind(&row.offered.definition)
                            .push_bind(&row.hash)
                            .push_bind(&row.approved_hash)
                            .push_bind(&row.changes);
                    });
                    insert.build().execute(&mut *transaction).await?;
                }
                let details = journal::synced(&plan.changes, shown);
                if let Some(details) = details {
                    let (server_id, server_name) = (Some(server_id), Some(server_name.as_str()));
                    note!(notes, transaction, Note { by, action: Action::ToolsChanged, server_id, server_name, details })?;
                }
                transaction.commit().await?;
                notes.committed();
                Ok::<_, Error>(Some(plan.changes))
            })
        };
        self.known.during(server_id, write).await
    }

    /// Approves a tool as it is now, or only if its definition has this `hash`; `false` when it has another one by then, or
    /// is gone.
    pub async fn approve_tool(
        &self,
        server_id: &str,
        tool_id: &str,
        hash: Option<&str>,
        by: &By,
    ) -> Result<bool, Error> {
        const FIND: &str = concat!("SELECT ", columns!(), " FROM tools WHERE id = $1 AND server_id = $2");
        const APPROVE: &str = "UPDATE tools SET approved_hash = NULL WHERE id = $1 AND server_id = $2 AND definition = $3 \
             AND approved_hash IS NOT NULL RETURNING (SELECT server_name FROM servers WHERE servers.id = server_id)";
        const IS_APPROVED: &str =
            "SELECT 1 FROM tools WHERE id = $1 AND server_id = $2 AND definition = $3 AND approved_hash IS NULL";
        let write = async {
            on_db!(self, write pool => {
                let mut notes = self.notes();
                let mut transaction = pool.begin().await?;
                let tool: Option<Tool> =
                    sqlx::query_as(FIND).bind(tool_id).bind(server_id).fetch_optional(&mut *transaction).await?;
                let Some(tool) = tool.filter(|tool| hash.is_none_or(|hash| tool.hash() == hash)) else { return Ok(false) };
                let approve = sqlx::query_scalar(APPROVE).bind(tool_id).bind(server_id).bind(&tool.definition);
                let name: Option<String> = approve.fetch_optional(&mut *transaction).await?;
                let Some(name) = name else {
                    // It was not held, or somebody else has approved it meanwhile: then nothing changes, and nothing is noted.
                    let found = sqlx::query(IS_APPROVED).bind(tool_id).bind(server_id).bind(&tool.definition);
                    return Ok(found.fetch_optional(&mut *transaction).await?.is_some());
                };
                let (server_id, server_name) = (Some(server_id), Some(name.as_str()));
                let details = json!({ "tool_id": tool_id, "definition_hash": tool.hash() });
                note!(notes, transaction, Note { by, action: Action::ToolApproved, server_id, server_name, details })?;
                transaction.commit().await?;
                notes.committed();
                Ok::<_, sqlx::Error>(true)
            })
        };
        Ok(self.known.during(server_id, write).await?)
    }
}
