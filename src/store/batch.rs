//! Several servers at once: all that is asked for happens, or nothing does.

use chrono::{DateTime, Utc};

use crate::model::{Connector, Offered, SignIn, State, definition_hash, sha256_hex};

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
    /// A new configuration for the server as it was at this revision.
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

impl Store {
    /// Does all steps in their order, in one transaction. `progress` hears after each how many are done.
    ///
    /// # Errors
    /// [`Error::NameTaken`] when another server has one of the names or ids, [`Error::Overtaken`] when a server is not at the
    /// revision given: then nothing was done.
    pub async fn change_servers(&self, steps: &[Step], mut progress: impl FnMut(usize)) -> Result<(), Error> {
        const ADD: &str = "INSERT INTO servers (id, server_name, type, config, revision, state, created_at, updated_at) \
                           VALUES ($1, $2, $3, $4, 1, $5, $6, $7)";
        const ADD_TOOL: &str = "INSERT INTO tools (id, server_id, name, name_digest, position, definition, definition_hash) \
                                VALUES ($1, $2, $3, $4, $5, $6, $7)";
        const SIGN_IN: &str = "INSERT INTO sign_ins (server_id, material, version, updated_at) VALUES ($1, $2, $4, $3)";
        const CONFIGURE: &str = "UPDATE servers SET type = $3, config = $4, revision = revision + 1, era = NULL, state = $5, \
                                 error = NULL, updated_at = $6 WHERE id = $1 AND revision = $2";
        const REMOVE: &str = "DELETE FROM servers WHERE id = $1 AND revision = $2";
        let now = now();
        let write = async {
            on_db!(self, write pool => {
                let mut transaction = pool.begin().await?;
                for (done, step) in (1..).zip(steps) {
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
                        }
                        Step::Configure { id, revision, connector } => {
                            let done = sqlx::query(CONFIGURE)
                                .bind(id)
                                .bind(revision)
                                .bind(connector.server_type().as_str())
                                .bind(self.sealed_config(id, connector))
                                .bind(State::NeverConnected.as_str())
                                .bind(now)
                                .execute(&mut *transaction)
                                .await?;
                            if done.rows_affected() == 0 {
                                return Err(Error::Overtaken);
                            }
                        }
                        Step::Remove { id, revision } => {
                            let remove = sqlx::query(REMOVE).bind(id).bind(revision);
                            if remove.execute(&mut *transaction).await?.rows_affected() == 0 {
                                return Err(Error::Overtaken);
                            }
                        }
                    }
                    progress(done);
                }
                transaction.commit().await?;
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
