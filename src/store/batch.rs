//! Several servers at once: all that is asked for happens, or nothing does.

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::Connection;

use crate::model::{Action, By, Connector, Offered, SignIn, State, definition_hash, sha256_hex};

use super::journal;
use super::servers::{FORGET, GIVE_UP, client};
use super::{Error, Store, now, on_db};

/// A server that comes with what is known of it elsewhere.
pub struct NewServer {
    /// `mcp_server-<uuid4>`
    pub id: String,
    pub server_name: String,
    pub connector: Connector,
    /// `None`: now.
    pub created_at: Option<DateTime<Utc>>,
    /// Each with its id, `tool-<uuid4>`, in the server's order; names are unique. The next sync makes them what the server
    /// offers, and keeps the ids of those that it does.
    pub tools: Vec<(String, Offered)>,
    pub sign_in: Option<SignIn>,
}

/// One change among several.
pub enum Step {
    Add(Box<NewServer>),
    /// A new configuration for the server as it was at this revision. One with another client ends the sign-in.
    Configure {
        id: String,
        revision: i64,
        connector: Connector,
    },
    /// Removes the server as it was at this revision, and its tools.
    Remove {
        id: String,
        revision: i64,
    },
}

impl Step {
    /// Where it stands among others: rows that are there, and then new names.
    fn turn(&self) -> (bool, &str) {
        match self {
            Self::Configure { id, .. } | Self::Remove { id, .. } => (false, id),
            Self::Add(server) => (true, &server.server_name),
        }
    }
}

impl Store {
    /// Does all steps in one transaction. `progress` hears after each how many are done. They are done in an order that all
    /// Portolans have in common: of two that wait for each other's rows one would fail.
    ///
    /// # Errors
    /// [`Error::NameTaken`] when another server has one of the names or ids, [`Error::Overtaken`] when a server is not at the
    /// revision given: then nothing was done.
    pub async fn change_servers(
        &self,
        steps: &[Step],
        by: &By,
        mut progress: impl FnMut(usize) + Send,
    ) -> Result<(), Error> {
        const ADD: &str = "INSERT INTO servers (id, server_name, type, config, revision, state, created_at, updated_at) \
                           VALUES ($1, $2, $3, $4, 1, $5, $6, $7)";
        const ADD_TOOL: &str = "INSERT INTO tools (id, server_id, name, name_digest, position, definition, definition_hash) \
                                VALUES ($1, $2, $3, $4, $5, $6, $7)";
        const SIGN_IN: &str = "INSERT INTO sign_ins (server_id, material, version, updated_at) VALUES ($1, $2, $4, $3)";
        const CONFIGURE: &str = "UPDATE servers SET type = $3, config = $4, revision = revision + 1, era = NULL, state = $5, \
                                 error = NULL, updated_at = $6 WHERE id = $1 AND revision = $2 RETURNING server_name";
        // As `update_server` does it.
        const LOCK: &str = "UPDATE servers SET revision = revision WHERE id = $1 AND revision = $2 RETURNING config";
        const REMOVE: &str = "DELETE FROM servers WHERE id = $1 AND revision = $2 RETURNING server_name";
        let now = now();
        let mut ordered: Vec<&Step> = steps.iter().collect();
        ordered.sort_by_key(|step| step.turn());
        let write = async {
            on_db!(self, long write pool => {
                let mut notes = self.notes();
                let mut transaction = pool.begin().await?;
                let mut told = Vec::new();
                for (done, step) in (1..).zip(&ordered) {
                    match step {
                        Step::Add(server) => {
                            sqlx::query(ADD)
                                .bind(&server.id)
                                .bind(&server.server_name)
                                .bind(server.connector.server_type().as_str())
                                .bind(self.sealed_config(&server.id, &server.connector))
                                .bind(State::NeverConnected.as_str())
                                .bind(server.created_at.unwrap_or(now))
                                .bind(now)
                                .execute(&mut *transaction)
                                .await
                                .map_err(super::servers::taken)?;
                            for (position, (id, tool)) in (0_i64..).zip(&server.tools) {
                                sqlx::query(ADD_TOOL)
                                    .bind(id)
                                    .bind(&server.id)
                                    .bind(&tool.name)
                                    .bind(sha256_hex(&tool.name))
                                    .bind(position)
                                    .bind(&tool.definition)
                                    .bind(definition_hash(&tool.definition))
                                    .execute(&mut *transaction)
                                    .await
                                    .map_err(super::servers::taken)?;
                            }
                            if let Some(sign_in) = &server.sign_in {
                                sqlx::query(SIGN_IN)
                                    .bind(&server.id)
                                    .bind(self.sealed_sign_in(&server.id, sign_in))
                                    .bind(now)
                                    .bind(super::sign_ins::first_version())
                                    .execute(&mut *transaction)
                                    .await?;
                            }
                            let mut details = journal::registered(&server.connector);
                            if !server.tools.is_empty() {
                                details["tools"] = json!({ "count": server.tools.len() });
                            }
                            if server.sign_in.is_some() {
                                details["sign_in"] = json!(true);
                            }
                            told.push((Action::ServerCreated, &server.id, server.server_name.clone(), details));
                        }
                        Step::Configure { id, revision, connector } => {
                            let old: Option<String> = sqlx::query_scalar(LOCK)
                                .bind(id)
                                .bind(revision)
                                .fetch_optional(&mut *transaction)
                                .await?;
                            let name: Option<String> = sqlx::query_scalar(CONFIGURE)
                                .bind(id)
                                .bind(revision)
                                .bind(connector.server_type().as_str())
                                .bind(self.sealed_config(id, connector))
                                .bind(State::NeverConnected.as_str())
                                .bind(now)
                                .fetch_optional(&mut *transaction)
                                .await?;
                            let old = old.and_then(|old| self.opened_config(id, &old));
                            let name = name.ok_or(Error::Overtaken)?;
                            let mut forgotten = 0;
                            if old.as_ref().and_then(client) != client(connector) {
                                // In the order of `update_server`.
                                sqlx::query(GIVE_UP).bind(id).execute(&mut *transaction).await?;
                                forgotten = sqlx::query(FORGET).bind(id).execute(&mut *transaction).await?.rows_affected();
                            }
                            let details = journal::reconfigured(old.as_ref(), connector);
                            told.push((Action::ServerUpdated, id, name.clone(), details));
                            if forgotten > 0 {
                                told.push((Action::SignInRemoved, id, name, json!({})));
                            }
                        }
                        Step::Remove { id, revision } => {
                            let remove = sqlx::query_scalar(REMOVE).bind(id).bind(revision);
                            let name: Option<String> = remove.fetch_optional(&mut *transaction).await?;
                            told.push((Action::ServerDeleted, id, name.ok_or(Error::Overtaken)?, json!({})));
                        }
                    }
                    progress(done);
                }
                // Not one at a time: all others who change something wait meanwhile.
                for told in told.chunks(journal::ROWS_AT_ONCE) {
                    let mut insert = sqlx::QueryBuilder::new(journal::INSERT);
                    insert.push_values(told, |mut values, (action, server_id, server_name, details)| {
                        values
                            .push_bind(super::now())
                            .push_bind(by.name())
                            .push_bind(action.as_str())
                            .push_bind(server_id.as_str())
                            .push_bind(server_name)
                            .push_bind(details.to_string());
                    });
                    insert.push(" RETURNING id");
                    let ids: Vec<i64> =
                        insert.build_query_scalar().persistent(false).fetch_all(&mut *transaction).await?;
                    notes.wrote(ids);
                }
                transaction.commit().await?;
                notes.committed();
                Ok(())
            })
        };
        self.known.during_all(&ids(steps), write).await
    }

    /// What `sign_ins.material` of this server is to hold.
    pub(super) fn sealed_sign_in(&self, server_id: &str, sign_in: &SignIn) -> String {
        let text = serde_json::to_vec(sign_in).expect("a sign-in is strings and a time");
        let text = secrecy::zeroize::Zeroizing::new(text);
        self.seal(super::sign_ins::sign_in_of(server_id), &text)
    }
}

/// The servers of which something may be known before.
fn ids(steps: &[Step]) -> Vec<&str> {
    let known = steps.iter().filter_map(|step| match step {
        Step::Add(_) => None,
        Step::Configure { id, .. } | Step::Remove { id, .. } => Some(id.as_str()),
    });
    known.collect()
}
