//! The tables `sign_ins` and `authorizations`: sign-ins to servers by OAuth, and those that are under way.
//!
//! Several Portolans may want new tokens for one server at a time, and some authorization servers take a second use of a
//! refresh token for theft: whoever asks them holds the lease of the row, and writes only over the version it has read.

use chrono::{DateTime, TimeDelta, Utc};
use secrecy::zeroize::Zeroizing;
use serde_json::json;
use sqlx::{Connection, FromRow};

use crate::model::{Action, By, SignIn};

use super::journal::{Note, note};
use super::seal::Unopened;
use super::{Database, Error, Place, Store, Topic, now, on_db};

/// How many sign-ins to one server may be under way; one more, and the oldest is given up.
const PENDING: i64 = 32;

/// A sign-in as it is stored.
pub struct StoredSignIn {
    /// Grows with each write, also over a removal.
    pub version: i64,
    /// `Err` when its envelope does not open; [`Unopened::Damaged`] also for a text that cannot be read.
    pub sign_in: Result<SignIn, Unopened>,
    /// When this version was written.
    pub updated_at: DateTime<Utc>,
}

/// A sign-in that is begun.
pub struct NewAuthorization<'a> {
    pub id: &'a str,
    /// SHA-256 of the state, in hexadecimal.
    pub state_digest: &'a str,
    /// `None` for a server that is not registered.
    pub server_id: Option<&'a str>,
    /// The name of who began it.
    pub caller: &'a str,
    /// What its answer is taken with, in clear.
    pub material: &'a [u8],
    pub expires_at: DateTime<Utc>,
}

/// How far a sign-in that was begun has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Its answer has not come.
    Pending,
    /// Its answer is here, and its tokens are not.
    Taken,
    Done,
    Failed,
}

impl Progress {
    fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Taken => "taken",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

impl From<String> for Progress {
    fn from(name: String) -> Self {
        let known = [Self::Pending, Self::Taken, Self::Done].into_iter().find(|known| known.as_str() == name);
        known.unwrap_or(Self::Failed)
    }
}

/// A sign-in that was begun, as it is now.
pub struct Authorization {
    pub id: String,
    pub server_id: Option<String>,
    pub caller: String,
    pub progress: Progress,
    /// What its answer is taken with, or what came of it; `None` when its envelope does not open.
    pub material: Option<Zeroizing<Vec<u8>>>,
}

#[derive(FromRow)]
struct AuthorizationRow {
    id: String,
    server_id: Option<String>,
    caller: String,
    #[sqlx(try_from = "String")]
    status: Progress,
    material: String,
}

pub(super) fn sign_in_of(server_id: &str) -> Place<'_> {
    Place { table: "sign_ins", column: "material", id: server_id }
}

/// The version of a sign-in where there is none: greater than any of those that were removed, so that nobody who has
/// read one of them takes the new one for it.
pub(super) fn first_version() -> i64 {
    now().timestamp_micros()
}

pub(super) fn authorization_of(id: &str) -> Place<'_> {
    Place { table: "authorizations", column: "material", id }
}

impl Store {
    /// The sign-in to a server.
    pub async fn sign_in(&self, server_id: &str) -> Result<Option<StoredSignIn>, Error> {
        const SQL: &str = "SELECT material, version, updated_at FROM sign_ins WHERE server_id = $1";
        let row: Option<(String, i64, DateTime<Utc>)> =
            on_db!(self, read pool => sqlx::query_as(SQL).bind(server_id).fetch_optional(pool).await)?;
        Ok(row.map(|(material, version, updated_at)| {
            let opened = self.open_sealed(sign_in_of(server_id), &material);
            let sign_in = opened.and_then(|text| serde_json::from_slice(&text).map_err(|_| Unopened::Damaged));
            StoredSignIn { version, sign_in, updated_at }
        }))
    }

    /// Writes a new sign-in over whatever there is, and returns its version; that of an authorization only while that is
    /// not given up. One that is adopted takes the place of its authorization. `None` when there is no such server, or the
    /// authorization was given up. `action` says how it came.
    pub async fn put_sign_in(
        &self,
        server_id: &str,
        sign_in: &SignIn,
        authorization: Option<&str>,
        action: Action,
        by: &By,
    ) -> Result<Option<i64>, Error> {
        // Who gives it up waits until this is written, and comes after it.
        const HOLD: &str = "UPDATE authorizations SET status = status WHERE id = $1";
        const TAKE: &str = "DELETE FROM authorizations WHERE id = $1";
        let hold = if matches!(action, Action::SignInAdopted) { TAKE } else { HOLD };
        // Of a server that is gone nothing is selected, and nothing written.
        const SQL: &str = "INSERT INTO sign_ins (server_id, material, version, updated_at) \
                           SELECT id, $2, $4, $3 FROM servers WHERE id = $1 \
                           ON CONFLICT (server_id) DO UPDATE SET material = excluded.material, \
                           version = sign_ins.version + 1, refresher = NULL, lease_until = NULL, \
                           updated_at = excluded.updated_at \
                           RETURNING version, (SELECT server_name FROM servers WHERE id = $1)";
        // The server first, as those do who change or remove it and then end what belongs to it: of two that wait for each
        // other's rows one would fail.
        let lock = match self.database {
            Database::Postgres(_) => "SELECT 1 FROM servers WHERE id = $1 FOR KEY SHARE",
            Database::Sqlite { .. } => "UPDATE servers SET revision = revision WHERE id = $1",
        };
        let material = self.sealed_sign_in(server_id, sign_in);
        // A transaction for the reason that `create_server` gives.
        on_db!(self, write pool => {
            let mut notes = self.notes();
            let mut transaction = pool.begin().await?;
            sqlx::query(lock).bind(server_id).execute(&mut *transaction).await?;
            if let Some(id) = authorization
                && sqlx::query(hold).bind(id).execute(&mut *transaction).await?.rows_affected() == 0
            {
                return Ok(None);
            }
            let put: Option<(i64, String)> = sqlx::query_as(SQL)
                .bind(server_id)
                .bind(material)
                .bind(now())
                .bind(first_version())
                .fetch_optional(&mut *transaction)
                .await?;
            let Some((version, name)) = put else { return Ok(None) };
            let (server_id, server_name) = (Some(server_id), Some(name.as_str()));
            note!(notes, transaction, Note { by, action, server_id, server_name, details: json!({}) })?;
            transaction.commit().await?;
            notes.committed();
            Ok(Some(version))
        })
    }

    /// Takes the lease of a sign-in for `time`; `false` when it is not at this version any more, or somebody else has it. By the
    /// clock of the database, because those of two machines may differ by more than a lease takes. One that ends later than
    /// any that was given is from before that clock was set back, and holds nobody up.
    pub async fn lease_sign_in(
        &self,
        server_id: &str,
        version: i64,
        refresher: &str,
        time: TimeDelta,
    ) -> Result<bool, Error> {
        const SQL: &str = "UPDATE sign_ins SET refresher = $3, lease_until = $4 WHERE server_id = $1 AND version = $2 \
                           AND (lease_until IS NULL OR lease_until < $5 OR lease_until > $6)";
        let now = self.shared_now().await?;
        let rows = on_db!(self, write pool => sqlx::query(SQL)
            .bind(server_id)
            .bind(version)
            .bind(refresher)
            .bind(now + time)
            .bind(now)
            .bind(now + time * 2)
            .execute(pool)
            .await
            .map(|done| done.rows_affected()))?;
        Ok(rows > 0)
    }

    /// The time by the one clock that all Portolans on this database have.
    async fn shared_now(&self) -> Result<DateTime<Utc>, Error> {
        if !self.is_shared() {
            return Ok(now());
        }
        Ok(on_db!(self, read pool => sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(pool).await)?)
    }

    /// Gives the lease of a sign-in back that was taken and not used.
    pub async fn release_sign_in(&self, server_id: &str, version: i64, refresher: &str) -> Result<(), Error> {
        const SQL: &str = "UPDATE sign_ins SET refresher = NULL, lease_until = NULL \
                           WHERE server_id = $1 AND version = $2 AND refresher = $3";
        on_db!(self, write pool => sqlx::query(SQL)
            .bind(server_id)
            .bind(version)
            .bind(refresher)
            .execute(pool)
            .await
            .map(|_| ()))?;
        Ok(())
    }

    /// Writes new tokens over those of `version`, and ends the lease; `false` when somebody else has written meanwhile. No
    /// change that is noted, and nobody is told: it is the same sign-in, the token of before is good until its end, and who
    /// finds that it is not (401) looks here. A row for each hour of each server would bury the others.
    pub async fn renew_sign_in(&self, server_id: &str, version: i64, sign_in: &SignIn) -> Result<bool, Error> {
        const SQL: &str = "UPDATE sign_ins SET material = $3, version = version + 1, refresher = NULL, lease_until = NULL, \
                           updated_at = $4 WHERE server_id = $1 AND version = $2";
        let material = self.sealed_sign_in(server_id, sign_in);
        let rows = on_db!(self, write pool => sqlx::query(SQL)
            .bind(server_id)
            .bind(version)
            .bind(material)
            .bind(now())
            .execute(pool)
            .await
            .map(|done| done.rows_affected()))?;
        Ok(rows > 0)
    }

    /// Removes a sign-in that is of no use any more; `false` when somebody has written another since `version`.
    pub async fn remove_sign_in(&self, server_id: &str, version: i64) -> Result<bool, Error> {
        const SQL: &str = "DELETE FROM sign_ins WHERE server_id = $1 AND version = $2 \
                           RETURNING (SELECT server_name FROM servers WHERE id = server_id)";
        on_db!(self, write pool => {
            let mut notes = self.notes();
            let mut transaction = pool.begin().await?;
            let removed: Option<Option<String>> =
                sqlx::query_scalar(SQL).bind(server_id).bind(version).fetch_optional(&mut *transaction).await?;
            let Some(name) = removed else { return Ok(false) };
            let (action, details) = (Action::SignInRemoved, json!({}));
            let (server_id, server_name) = (Some(server_id), name.as_deref());
            note!(notes, transaction, Note { by: &By::ITSELF, action, server_id, server_name, details })?;
            transaction.commit().await?;
            notes.committed();
            Ok(true)
        })
    }

    /// Notes that somebody begins to sign in; [`Error::Refused`] when the server is gone. Of those that are under way to
    /// the same server the oldest are given up.
    pub async fn begin_authorization(&self, new: &NewAuthorization<'_>) -> Result<(), Error> {
        const INSERT: &str = "INSERT INTO authorizations (id, state_digest, server_id, caller, material, status, created_at, \
                              expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
        const BOUND: &str = "DELETE FROM authorizations WHERE coalesce(server_id, '') = $1 AND id NOT IN (SELECT id FROM \
                             authorizations WHERE coalesce(server_id, '') = $1 ORDER BY created_at DESC, id LIMIT $2)";
        let material = self.seal(authorization_of(new.id), new.material);
        on_db!(self, write pool => {
            let mut transaction = pool.begin().await?;
            sqlx::query(INSERT)
                .bind(new.id)
                .bind(new.state_digest)
                .bind(new.server_id)
                .bind(new.caller)
                .bind(material)
                .bind(Progress::Pending.as_str())
                .bind(now())
                .bind(new.expires_at)
                .execute(&mut *transaction)
                .await?;
            sqlx::query(BOUND)
                .bind(new.server_id.unwrap_or_default())
                .bind(PENDING)
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await
        })?;
        Ok(())
    }

    /// Whether a sign-in was begun with this state. A look, for what anybody may ask: it waits for no writer.
    pub async fn knows_state(&self, state_digest: &str) -> Result<bool, Error> {
        const SQL: &str = "SELECT 1 FROM authorizations WHERE state_digest = $1";
        let found: Option<(i32,)> =
            on_db!(self, read pool => sqlx::query_as(SQL).bind(state_digest).fetch_optional(pool).await)?;
        Ok(found.is_some())
    }

    /// Takes the sign-in that was begun with this state, once and in time; `None` for any other.
    pub async fn take_authorization(&self, state_digest: &str) -> Result<Option<Authorization>, Error> {
        const SQL: &str = "UPDATE authorizations SET status = $2 WHERE state_digest = $1 AND status = $3 AND expires_at > $4 \
                           RETURNING id, server_id, caller, status, material";
        // A transaction for the reason that `create_server` gives.
        let row: Option<AuthorizationRow> = on_db!(self, write pool => {
            let mut transaction = pool.begin().await?;
            let row = sqlx::query_as(SQL)
                .bind(state_digest)
                .bind(Progress::Taken.as_str())
                .bind(Progress::Pending.as_str())
                .bind(now())
                .fetch_optional(&mut *transaction)
                .await?;
            transaction.commit().await?;
            Ok::<_, sqlx::Error>(row)
        })?;
        Ok(row.map(|row| self.opened_authorization(row)))
    }

    /// A sign-in that was begun.
    pub async fn authorization(&self, id: &str) -> Result<Option<Authorization>, Error> {
        const SQL: &str = "SELECT id, server_id, caller, status, material FROM authorizations WHERE id = $1";
        let row: Option<AuthorizationRow> =
            on_db!(self, read pool => sqlx::query_as(SQL).bind(id).fetch_optional(pool).await)?;
        Ok(row.map(|row| self.opened_authorization(row)))
    }

    fn opened_authorization(&self, row: AuthorizationRow) -> Authorization {
        let AuthorizationRow { id, server_id, caller, status, material } = row;
        let material = self.open_sealed(authorization_of(&id), &material).ok();
        Authorization { id, server_id, caller, progress: status, material }
    }

    /// Notes how a sign-in ended, for whoever waits for it. One that went well for a server that is not registered is kept
    /// here alone, and so a change by whoever began it.
    pub async fn finish_authorization(&self, id: &str, progress: Progress, material: &[u8]) -> Result<(), Error> {
        const SQL: &str =
            "UPDATE authorizations SET status = $2, material = $3 WHERE id = $1 RETURNING server_id, caller";
        let material = self.seal(authorization_of(id), material);
        on_db!(self, write pool => {
            let mut notes = self.notes();
            let mut transaction = pool.begin().await?;
            let ended: Option<(Option<String>, String)> = sqlx::query_as(SQL)
                .bind(id)
                .bind(progress.as_str())
                .bind(material)
                .fetch_optional(&mut *transaction)
                .await?;
            if let (Some((None, caller)), Progress::Done) = (ended, progress) {
                let by = &By::caller(Some(&caller));
                let (action, details) = (Action::SignInCompleted, json!({}));
                note!(notes, transaction, Note { by, action, server_id: None, server_name: None, details })?;
            }
            transaction.commit().await?;
            notes.committed();
            // Whoever waits for it, noted or not.
            self.announce(Topic::Changes);
            Ok::<_, sqlx::Error>(())
        })?;
        Ok(())
    }

    /// The sign-ins that this caller has made to servers which were not registered, the last one first.
    pub async fn unclaimed_authorizations(&self, caller: &str) -> Result<Vec<Authorization>, Error> {
        const SQL: &str = "SELECT id, server_id, caller, status, material FROM authorizations WHERE server_id IS NULL \
                           AND caller = $1 AND status = $2 AND expires_at > $3 ORDER BY created_at DESC, id";
        let rows: Vec<AuthorizationRow> = on_db!(self, read pool => sqlx::query_as(SQL)
            .bind(caller)
            .bind(Progress::Done.as_str())
            .bind(now())
            .fetch_all(pool)
            .await)?;
        Ok(rows.into_iter().map(|row| self.opened_authorization(row)).collect())
    }

    /// Forgets a sign-in that was begun; `false` when somebody else has.
    pub async fn forget_authorization(&self, id: &str) -> Result<bool, Error> {
        const SQL: &str = "DELETE FROM authorizations WHERE id = $1";
        let rows = on_db!(self, write pool => sqlx::query(SQL)
            .bind(id)
            .execute(pool)
            .await
            .map(|done| done.rows_affected()))?;
        Ok(rows > 0)
    }

    /// Forgets those whose time is over.
    pub async fn forget_old_authorizations(&self) -> Result<(), Error> {
        let sql = match self.database {
            // Several forget at once: none waits for another.
            Database::Postgres(_) => {
                "DELETE FROM authorizations WHERE id IN \
                 (SELECT id FROM authorizations WHERE expires_at < $1 FOR UPDATE SKIP LOCKED)"
            }
            Database::Sqlite { .. } => "DELETE FROM authorizations WHERE expires_at < $1",
        };
        on_db!(self, write pool => sqlx::query(sql).bind(now()).execute(pool).await.map(|_| ()))?;
        Ok(())
    }
}
