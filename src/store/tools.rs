//! The table `tools`.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value};
use sqlx::FromRow;

use crate::model::{Changed, Era, Offered, ServerTool, State, Tool, ToolChanges, sha256_hex};

use super::sealing::ServerRow;
use super::{Error, Store, now, on_db};

/// The columns of [`Tool`], as `tools` has them.
macro_rules! columns {
    () => {
        "tools.id AS tool_id, server_id, name, position, definition"
    };
}

/// Tools inserted by one statement; six values each, and SQLite takes 32,766.
const ROWS_AT_ONCE: usize = 500;

const LIST: &str = concat!("SELECT ", columns!(), " FROM tools WHERE server_id = $1 ORDER BY position");

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
    /// is known, because every run waits for it; what another Portolan wrote to the same database may be a second late.
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
        if let Some(row) = &found {
            self.known.remember(reading, row);
        }
        Ok(found)
    }

    /// Makes the tools of a server equal to `offered` (names unique, in the server's order) and notes that it is ready,
    /// with a `notice` for its status, in one transaction. A tool keeps its id as long as its name is offered. `None` when
    /// the server is gone or its configuration is no longer `revision`; then nothing is changed.
    pub async fn sync_tools(
        &self,
        server_id: &str,
        revision: i64,
        era: Option<Era>,
        notice: Option<&str>,
        offered: &[Offered],
    ) -> Result<Option<ToolChanges>, Error> {
        // The first statement also takes the server's row lock (on SQLite: the write lock) against a second sync.
        const READY: &str = "UPDATE servers SET state = $3, error = $6, era = $4, last_synced_at = $5 \
                             WHERE id = $1 AND revision = $2 RETURNING id";
        const DELETE: &str = "DELETE FROM tools WHERE id = $1";
        const UPDATE: &str = "UPDATE tools SET position = $2, definition = $3 WHERE id = $1";
        const INSERT: &str = "INSERT INTO tools (id, server_id, name, name_digest, position, definition) ";
        let write = async {
            on_db!(self, write pool => {
                let mut transaction = pool.begin().await?;
                let ready: Option<(String,)> = sqlx::query_as(READY)
                    .bind(server_id)
                    .bind(revision)
                    .bind(State::Ready.as_str())
                    .bind(era.map(Era::as_str))
                    .bind(now())
                    .bind(self.sealed_error(server_id, notice))
                    .fetch_optional(&mut *transaction)
                    .await?;
                if ready.is_none() {
                    return Ok(None);
                }
                let current: Vec<Tool> = sqlx::query_as(LIST).bind(server_id).fetch_all(&mut *transaction).await?;
                let plan = Plan::new(&current, offered);
                for tool in &plan.delete {
                    sqlx::query(DELETE).bind(&tool.id).execute(&mut *transaction).await?;
                }
                for (tool, position, offered) in &plan.update {
                    sqlx::query(UPDATE)
                        .bind(&tool.id)
                        .bind(position)
                        .bind(&offered.definition)
                        .execute(&mut *transaction)
                        .await?;
                }
                for rows in plan.insert.chunks(ROWS_AT_ONCE) {
                    let mut insert = sqlx::QueryBuilder::new(INSERT);
                    insert.push_values(rows, |mut row, (position, offered)| {
                        row.push_bind(format!("tool-{}", uuid::Uuid::new_v4()))
                            .push_bind(server_id)
                            .push_bind(&offered.name)
                            .push_bind(sha256_hex(&offered.name))
                            .push_bind(*position)
                            .push_bind(&offered.definition);
                    });
                    insert.build().execute(&mut *transaction).await?;
                }
                transaction.commit().await?;
                Ok(Some(plan.changes))
            })
        };
        self.known.during(server_id, write).await
    }
}

/// The rows a sync writes, and what its answer says of them.
struct Plan<'a> {
    delete: Vec<&'a Tool>,
    update: Vec<(&'a Tool, i64, &'a Offered)>,
    insert: Vec<(i64, &'a Offered)>,
    changes: ToolChanges,
}

impl<'a> Plan<'a> {
    fn new(current: &'a [Tool], offered: &'a [Offered]) -> Self {
        let mut plan = Self { delete: vec![], update: vec![], insert: vec![], changes: ToolChanges::default() };
        let mut known: HashMap<&str, &Tool> = current.iter().map(|tool| (tool.name.as_str(), tool)).collect();
        for (position, offered) in (0..).zip(offered) {
            let Some(tool) = known.remove(offered.name.as_str()) else {
                plan.changes.added.push(offered.name.clone());
                plan.insert.push((position, offered));
                continue;
            };
            let what = differences(&tool.definition, &offered.definition);
            if tool.position != position || tool.definition != offered.definition {
                plan.update.push((tool, position, offered));
            }
            if what.is_empty() {
                plan.changes.unchanged += 1;
            } else {
                plan.changes.updated.push(offered.name.clone());
                plan.changes.changed.push(Changed { name: offered.name.clone(), what });
            }
        }
        plan.delete = current.iter().filter(|tool| known.contains_key(tool.name.as_str())).collect();
        plan.changes.deleted = plan.delete.iter().map(|tool| tool.name.clone()).collect();
        plan
    }
}

/// The top-level keys whose values differ between two tool definitions; spelling and key order do not count.
fn differences(old: &str, new: &str) -> Vec<String> {
    if old == new {
        return vec![];
    }
    let read = |text| serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default();
    let (old, new) = (read(old), read(new));
    let mut keys: Vec<_> = new.keys().chain(old.keys().filter(|key| !new.contains_key(*key))).collect();
    keys.retain(|key| old.get(*key) != new.get(*key));
    keys.into_iter().cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str, position: i64, definition: &str) -> Tool {
        Tool {
            id: format!("tool-{name}"),
            server_id: "mcp_server-1".to_owned(),
            name: name.to_owned(),
            position,
            definition: definition.to_owned(),
        }
    }

    fn offered(name: &str, definition: &str) -> Offered {
        Offered { name: name.to_owned(), definition: definition.to_owned() }
    }

    #[test]
    fn differences_name_the_keys_that_changed() {
        assert_eq!(differences(r#"{"a":1,"b":{"x":1,"y":2}}"#, r#"{"b":{"y":2,"x":1}, "a":1}"#), Vec::<String>::new());
        assert_eq!(differences(r#"{"a":1,"b":2}"#, r#"{"a":2,"c":3}"#), ["a", "c", "b"]);
    }

    #[test]
    fn a_plan_follows_the_servers_order_and_keeps_ids() {
        let current = [tool("gone", 0, "{}"), tool("same", 1, r#"{"a":1}"#), tool("new text", 2, r#"{"a":1}"#)];
        let listing = [offered("new text", r#"{"a":2}"#), offered("fresh", "{}"), offered("same", r#"{"a":1}"#)];
        let plan = Plan::new(&current, &listing);
        assert_eq!(plan.changes.added, ["fresh"]);
        assert_eq!(plan.changes.updated, ["new text"]);
        assert_eq!(plan.changes.deleted, ["gone"]);
        assert_eq!(plan.changes.unchanged, 1);
        let moved: Vec<_> = plan.update.iter().map(|(tool, position, _)| (tool.id.as_str(), *position)).collect();
        assert_eq!(moved, [("tool-new text", 0), ("tool-same", 2)]);
    }
}
