//! The table `shared_runs`: runs that another replica, or a later start, may ask about. One with an `Idempotency-Key` has a row
//! from before it begins; of another there is one only when a question of the table `run_questions` is about it.

use std::time::Duration;

use secrecy::zeroize::Zeroizing;
use sqlx::FromRow;

use super::runs::SEALED_WITH;
use super::{Database, Error, Place, Store, on_db};

/// How many rows one statement of a sweep removes.
const SWEPT_AT_ONCE: i64 = 500;
/// The bytes of a digest, with which the content begins.
const DIGEST: usize = 32;

pub(super) fn outcome_of(id: &str) -> Place<'_> {
    Place { table: "shared_runs", column: "content", id }
}

/// A run that is to be known, from its beginning.
#[derive(Clone, Debug)]
pub struct NewSharedRun {
    pub id: String,
    pub replica: String,
    /// Which run of this replica: one that comes later under the same id is another one.
    pub attempt: i64,
    pub mcp_server_id: String,
    /// The digest of its arguments.
    pub arguments: [u8; DIGEST],
    /// How long ago it began.
    pub age: Duration,
    /// From when it is written; the clock of the database says when that is over, which is the same for all.
    pub kept_for: Duration,
}

/// What the answer to a question says of a run that its replica knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Nobody has got its outcome, or waits for it.
    Lost,
    Known,
    /// It was not sent, and its client was told to try again.
    Refused,
}

impl Claim {
    fn as_str(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Known => "known",
            Self::Refused => "refused",
        }
    }

    /// What only a newer version writes is known, but not what it means.
    fn read(text: &str) -> Self {
        [Self::Lost, Self::Refused].into_iter().find(|claim| claim.as_str() == text).unwrap_or(Self::Known)
    }
}

/// How far a run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    Running,
    /// The JSON of its outcome; `None` when that is not kept, or cannot be opened.
    Ended(Option<Vec<u8>>),
    /// It never reached its tool.
    Unsent,
}

impl Progress {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Ended(_) => "ended",
            Self::Unsent => "unsent",
        }
    }
}

/// A run that another replica has, or an earlier start had.
#[derive(Clone, Debug)]
pub struct SharedRun {
    pub replica: String,
    pub attempt: i64,
    /// The digest of its arguments; `None` when it cannot be opened.
    pub arguments: Option<[u8; DIGEST]>,
    pub progress: Progress,
}

/// The answer of one replica to a question.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Of its row.
    pub id: String,
    pub claim: Claim,
    /// How long ago it began, by the clock of the database.
    pub age: Duration,
}

#[derive(FromRow)]
struct Row {
    replica: String,
    attempt: i64,
    state: String,
    content: String,
}

impl Store {
    /// Makes a run known before it begins, unless there is one of this id whose time is not over; whether it did.
    pub async fn begin_shared_run(&self, run: &NewSharedRun) -> Result<bool, Error> {
        self.add_shared_run(run, &Progress::Running, None).await
    }

    /// Answers a question: what there is of the run that it asks for. Once for each replica.
    pub async fn claim_run(
        &self,
        run: &NewSharedRun,
        progress: &Progress,
        question: i64,
        claim: Claim,
    ) -> Result<bool, Error> {
        self.add_shared_run(run, progress, Some((question, claim))).await
    }

    async fn add_shared_run(
        &self,
        run: &NewSharedRun,
        progress: &Progress,
        claim: Option<(i64, Claim)>,
    ) -> Result<bool, Error> {
        // One that is under way at a replica that lives is left to it, whatever its time.
        macro_rules! sql {
            ($now:literal, $expires:literal, $began:literal) => {
                concat!(
                    "INSERT INTO shared_runs (id, replica, attempt, mcp_server_id, state, content, sealed_with, \
                     question, claim, expires_at, began_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, ",
                    $expires,
                    ", ",
                    $began,
                    ") ON CONFLICT (id) DO UPDATE SET replica = $2, attempt = $3, mcp_server_id = $4, state = $5, \
                     content = $6, sealed_with = $7, question = $8, claim = $9, expires_at = excluded.expires_at, \
                     began_at = excluded.began_at WHERE shared_runs.expires_at <= ",
                    $now,
                    " AND NOT (shared_runs.state = 'running' \
                     AND EXISTS (SELECT 1 FROM replicas WHERE replicas.id = shared_runs.replica))",
                )
            };
        }
        let sql = match self.database {
            Database::Postgres(_) => sql!(
                "CURRENT_TIMESTAMP",
                "CURRENT_TIMESTAMP + make_interval(secs => $10)",
                "CURRENT_TIMESTAMP - make_interval(secs => $11)"
            ),
            Database::Sqlite { .. } => sql!(
                "strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now')",
                "strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now', $10 || ' seconds')",
                "strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now', -$11 || ' seconds')"
            ),
        };
        let content = self.sealed_outcome(run, progress);
        let rows = on_db!(self, write pool => sqlx::query(sql)
            .bind(&run.id)
            .bind(&run.replica)
            .bind(run.attempt)
            .bind(&run.mcp_server_id)
            .bind(progress.as_str())
            .bind(&content)
            .bind(&content[..SEALED_WITH])
            .bind(claim.map(|(question, _)| question))
            .bind(claim.map(|(_, claim)| claim.as_str()))
            .bind(run.kept_for.as_secs_f64())
            .bind(run.age.as_secs_f64())
            .execute(pool)
            .await
            .map(|done| done.rows_affected()))?;
        Ok(rows > 0)
    }

    /// The content is sealed: arguments and outcomes are other people's data, and few arguments are so many that nobody could
    /// find them by their digest.
    fn sealed_outcome(&self, run: &NewSharedRun, progress: &Progress) -> String {
        let outcome = match progress {
            Progress::Ended(Some(json)) => json.as_slice(),
            _ => &[],
        };
        self.seal(outcome_of(&run.id), &Zeroizing::new([&run.arguments, outcome].concat()))
    }

    /// Says what came of a run of this replica; `false` when it is not known any more.
    pub async fn end_shared_run(
        &self,
        run: &NewSharedRun,
        progress: &Progress,
        kept_for: Duration,
    ) -> Result<bool, Error> {
        let sql = match self.database {
            Database::Postgres(_) => {
                "UPDATE shared_runs SET state = $4, content = $5, sealed_with = $6, \
                 expires_at = CURRENT_TIMESTAMP + make_interval(secs => $7) \
                 WHERE id = $1 AND replica = $2 AND attempt = $3"
            }
            Database::Sqlite { .. } => {
                "UPDATE shared_runs SET state = $4, content = $5, sealed_with = $6, \
                 expires_at = strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now', $7 || ' seconds') \
                 WHERE id = $1 AND replica = $2 AND attempt = $3"
            }
        };
        let content = self.sealed_outcome(run, progress);
        let rows = on_db!(self, write pool => sqlx::query(sql)
            .bind(&run.id)
            .bind(&run.replica)
            .bind(run.attempt)
            .bind(progress.as_str())
            .bind(&content)
            .bind(&content[..SEALED_WITH])
            .bind(kept_for.as_secs_f64())
            .execute(pool)
            .await
            .map(|done| done.rows_affected()))?;
        Ok(rows > 0)
    }

    /// Forgets a run of this replica that never reached its tool: the next request may make it.
    pub async fn free_shared_run(&self, run: &NewSharedRun) -> Result<(), Error> {
        self.free_attempt(&run.id, &run.replica, run.attempt).await
    }

    /// As [`Self::free_shared_run`], of a run that is known by its row alone.
    pub async fn free_attempt(&self, id: &str, replica: &str, attempt: i64) -> Result<(), Error> {
        const SQL: &str = "DELETE FROM shared_runs WHERE id = $1 AND replica = $2 AND attempt = $3";
        on_db!(self, write pool => sqlx::query(SQL)
            .bind(id)
            .bind(replica)
            .bind(attempt)
            .execute(pool)
            .await
            .map(|_| ()))?;
        Ok(())
    }

    pub async fn shared_run(&self, id: &str) -> Result<Option<SharedRun>, Error> {
        const SQL: &str = "SELECT replica, attempt, state, content FROM shared_runs WHERE id = $1";
        let row: Option<Row> = on_db!(self, read pool => sqlx::query_as(SQL).bind(id).fetch_optional(pool).await)?;
        Ok(row.map(|Row { replica, attempt, state, content }| {
            let content = self.open_sealed(outcome_of(id), &content).ok();
            let parts = content.as_ref().and_then(|content| content.split_first_chunk::<DIGEST>());
            let outcome = parts.map(|(_, outcome)| outcome.to_vec()).filter(|outcome| !outcome.is_empty());
            let progress = match state.as_str() {
                "running" => Progress::Running,
                "unsent" => Progress::Unsent,
                _ => Progress::Ended(outcome),
            };
            SharedRun { replica, attempt, arguments: parts.map(|(arguments, _)| *arguments), progress }
        }))
    }

    /// What replicas have said of the run that this question asks for.
    pub async fn claims(&self, question: i64) -> Result<Vec<Claimed>, Error> {
        let sql = match self.database {
            Database::Postgres(_) => {
                "SELECT id, claim, EXTRACT(EPOCH FROM CURRENT_TIMESTAMP - began_at)::float8 FROM shared_runs \
                 WHERE question = $1"
            }
            Database::Sqlite { .. } => {
                "SELECT id, claim, (julianday('now') - julianday(began_at)) * 86400.0 FROM shared_runs \
                 WHERE question = $1"
            }
        };
        let rows: Vec<(String, String, f64)> =
            on_db!(self, read pool => sqlx::query_as(sql).bind(question).fetch_all(pool).await)?;
        let claimed = |(id, claim, age): (_, String, f64)| Claimed {
            id,
            claim: Claim::read(&claim),
            age: Duration::try_from_secs_f64(age).unwrap_or_default(),
        };
        Ok(rows.into_iter().map(claimed).collect())
    }

    /// Forgets what was answered to a question.
    pub async fn forget_claims(&self, question: i64) -> Result<(), Error> {
        const SQL: &str = "DELETE FROM shared_runs WHERE question = $1";
        on_db!(self, write pool => sqlx::query(SQL).bind(question).execute(pool).await.map(|_| ()))?;
        Ok(())
    }

    /// Removes some of the runs whose time is over; how many, 0 when there are no more than what another Portolan removes just
    /// now.
    pub async fn forget_shared_runs(&self) -> Result<u64, Error> {
        let sql = match self.database {
            // Several sweep at once: none waits for another.
            Database::Postgres(_) => {
                "DELETE FROM shared_runs WHERE id IN (SELECT id FROM shared_runs \
                 WHERE expires_at <= CURRENT_TIMESTAMP AND NOT (state = 'running' AND question IS NULL \
                 AND EXISTS (SELECT 1 FROM replicas WHERE replicas.id = shared_runs.replica)) \
                 ORDER BY expires_at LIMIT $1 FOR UPDATE OF shared_runs SKIP LOCKED)"
            }
            Database::Sqlite { .. } => {
                "DELETE FROM shared_runs WHERE id IN (SELECT id FROM shared_runs \
                 WHERE expires_at <= strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now') ORDER BY expires_at LIMIT $1)"
            }
        };
        Ok(on_db!(self, write pool => {
            sqlx::query(sql).bind(SWEPT_AT_ONCE).execute(pool).await.map(|done| done.rows_affected())
        })?)
    }
}
