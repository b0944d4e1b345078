//! The tables `replicas` and `run_questions`: which Portolans serve this database, and what they ask each other. Of use on
//! PostgreSQL alone; how old a beat is the database says, whose clock is the same for all.

use std::time::Duration;

use sqlx::FromRow;

use super::{Database, Error, Store, on_db};

/// How many questions one statement reads, and removes.
pub const QUESTIONS_AT_ONCE: usize = 200;
/// How old the beat of a replica becomes before nobody cares any more whether it lives, in seconds.
pub const LONG_DEAD: f64 = 600.0;

/// A Portolan on the same database.
#[derive(Clone, Debug, FromRow)]
pub struct Replica {
    pub id: String,
    /// How long ago it said that it lives, in seconds.
    pub age: f64,
    /// The last question that it has answered.
    pub answered_up_to: i64,
}

/// Which replica knows this run?
#[derive(Clone, Debug, FromRow)]
pub struct Question {
    pub id: i64,
    /// Of the run.
    pub identity: String,
    pub mcp_server_id: String,
    pub asked_by: String,
}

impl Store {
    /// Says that this replica lives, and which questions it has answered.
    pub async fn beat(&self, replica: &str, answered_up_to: i64) -> Result<(), Error> {
        const SQL: &str = "INSERT INTO replicas (id, beat_at, answered_up_to) VALUES ($1, CURRENT_TIMESTAMP, $2) \
                           ON CONFLICT (id) DO UPDATE SET beat_at = CURRENT_TIMESTAMP, \
                           answered_up_to = CASE WHEN replicas.answered_up_to > $2 THEN replicas.answered_up_to ELSE $2 END";
        on_db!(self, write pool => {
            sqlx::query(SQL).bind(replica).bind(answered_up_to).execute(pool).await.map(|_| ())
        })?;
        Ok(())
    }

    /// Says that this replica has ended.
    pub async fn leave(&self, replica: &str) -> Result<(), Error> {
        const SQL: &str = "DELETE FROM replicas WHERE id = $1";
        on_db!(self, write pool => sqlx::query(SQL).bind(replica).execute(pool).await.map(|_| ()))?;
        Ok(())
    }

    /// The other replicas that have lived within [`LONG_DEAD`]. None where the database is not shared.
    pub async fn others(&self, replica: &str) -> Result<Vec<Replica>, Error> {
        const SQL: &str = "SELECT id, EXTRACT(EPOCH FROM CURRENT_TIMESTAMP - beat_at)::float8 AS age, answered_up_to \
                           FROM replicas WHERE id <> $1 AND beat_at > CURRENT_TIMESTAMP - make_interval(secs => $2)";
        if !self.is_shared() {
            return Ok(Vec::new());
        }
        Ok(on_db!(self, read pool => sqlx::query_as(SQL).bind(replica).bind(LONG_DEAD).fetch_all(pool).await)?)
    }

    /// Forgets replicas that ended without a word long ago.
    pub async fn forget_replicas(&self) -> Result<(), Error> {
        const SQL: &str = "DELETE FROM replicas WHERE beat_at < CURRENT_TIMESTAMP - make_interval(secs => $1)";
        if self.is_shared() {
            on_db!(self, write pool => sqlx::query(SQL).bind(LONG_DEAD).execute(pool).await.map(|_| ()))?;
        }
        Ok(())
    }

    /// Asks all replicas for a run; the number of the question.
    pub async fn ask(
        &self,
        identity: &str,
        mcp_server_id: &str,
        asked_by: &str,
        kept_for: Duration,
    ) -> Result<i64, Error> {
        let sql = match self.database {
            Database::Postgres(_) => {
                "INSERT INTO run_questions (identity, mcp_server_id, asked_by, expires_at) \
                 VALUES ($1, $2, $3, CURRENT_TIMESTAMP + make_interval(secs => $4)) RETURNING id"
            }
            Database::Sqlite { .. } => {
                "INSERT INTO run_questions (identity, mcp_server_id, asked_by, expires_at) \
                 VALUES ($1, $2, $3, strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now', $4 || ' seconds')) RETURNING id"
            }
        };
        Ok(on_db!(self, write pool => sqlx::query_scalar(sql)
            .bind(identity)
            .bind(mcp_server_id)
            .bind(asked_by)
            .bind(kept_for.as_secs_f64())
            .fetch_one(pool)
            .await)?)
    }

    /// The first questions after this one.
    pub async fn questions_after(&self, answered_up_to: i64) -> Result<Vec<Question>, Error> {
        const SQL: &str =
            "SELECT id, identity, mcp_server_id, asked_by FROM run_questions WHERE id > $1 ORDER BY id LIMIT $2";
        Ok(on_db!(self, read pool => {
            sqlx::query_as(SQL).bind(answered_up_to).bind(QUESTIONS_AT_ONCE as i64).fetch_all(pool).await
        })?)
    }

    /// Forgets a question.
    pub async fn forget_question(&self, question: i64) -> Result<(), Error> {
        const SQL: &str = "DELETE FROM run_questions WHERE id = $1";
        on_db!(self, write pool => sqlx::query(SQL).bind(question).execute(pool).await.map(|_| ()))?;
        Ok(())
    }

    /// Removes some of the questions whose time is over; how many, 0 when there are no more.
    pub async fn forget_questions(&self) -> Result<u64, Error> {
        let sql = match self.database {
            Database::Postgres(_) => {
                "DELETE FROM run_questions WHERE id IN \
                 (SELECT id FROM run_questions WHERE expires_at <= CURRENT_TIMESTAMP ORDER BY expires_at LIMIT $1)"
            }
            Database::Sqlite { .. } => {
                "DELETE FROM run_questions WHERE id IN (SELECT id FROM run_questions \
                 WHERE expires_at <= strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now') ORDER BY expires_at LIMIT $1)"
            }
        };
        Ok(on_db!(self, write pool => {
            sqlx::query(sql).bind(QUESTIONS_AT_ONCE as i64).execute(pool).await.map(|done| done.rows_affected())
        })?)
    }
}
