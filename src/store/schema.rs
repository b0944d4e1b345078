//! The schema of the database, brought up to date at a start: by one of those that start at once, while the others wait.
//!
//! All that is missing is done in one transaction, with the sealing of what was stored in clear before there was sealing: a
//! process that dies on its way leaves the database as it was. The lock of those that do it ends with that transaction,
//! too, so that it neither outlives them nor goes to somebody else's session where a pooler hands connections out by
//! transactions. What cannot be brought up to date is refused before anything is written.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::migrate::{AppliedMigration, Migrate, MigrateError, Migrator};
use sqlx::{Connection, Executor, PgConnection, SqlitePool};
use tokio::time::{Instant, sleep};

use super::seal::Keyring;
use super::sealing::adopt;
use super::{is_locked, one_line};

const TABLE: &str = "_sqlx_migrations";
/// The one from which on secrets are sealed.
const SEALING: i64 = 2;
/// How long a start waits for another that brings the schema up to date.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
const PAUSE: Duration = Duration::from_millis(200);
const TELL_EVERY: Duration = Duration::from_secs(30);

/// Why the schema stays as it is.
#[derive(Debug, thiserror::Error)]
pub(super) enum SchemaError {
    #[error(
        "it is at schema {theirs}, and this version knows none after {ours}; start the newer version that wrote it, or restore \
         a backup from before"
    )]
    Newer { theirs: i64, ours: i64 },
    #[error(
        "its schema {0} is not the one of this version, so it was changed or written by a program that was; start that \
         program, or restore a backup"
    )]
    Foreign(i64),
    #[error("another Portolan has been at it for {} minutes; see what that one does, and start this one again", PATIENCE.as_secs() / 60)]
    Waited,
    #[error("its tables changed while this one started; start it again")]
    Changed,
    #[error("{}", one_line(.0))]
    Database(#[from] sqlx::Error),
    #[error("{}", one_line(.0))]
    Migration(#[from] MigrateError),
}

/// What is to be done to a database.
enum Missing {
    Nothing,
    /// Some of the schema; `sealing` with what seals.
    Some {
        sealing: bool,
    },
}

/// Compares what was done to a database with what this version does.
fn missing(applied: &[AppliedMigration], migrator: &Migrator) -> Result<Missing, SchemaError> {
    let known: HashMap<i64, _> = migrator.iter().map(|migration| (migration.version, &migration.checksum)).collect();
    let ours = known.keys().copied().max().unwrap_or_default();
    if let Some(theirs) = applied.iter().map(|done| done.version).max().filter(|theirs| *theirs > ours) {
        return Err(SchemaError::Newer { theirs, ours });
    }
    if let Some(foreign) = applied.iter().find(|done| known.get(&done.version) != Some(&&done.checksum)) {
        return Err(SchemaError::Foreign(foreign.version));
    }
    if applied.len() == known.len() {
        return Ok(Missing::Nothing);
    }
    Ok(Missing::Some { sealing: !applied.iter().any(|done| done.version == SEALING) })
}

/// Tells now and then that another Portolan is at it.
struct Wait {
    until: Instant,
    tell: Instant,
}

impl Wait {
    fn begin() -> Self {
        Self { until: Instant::now() + PATIENCE, tell: Instant::now() }
    }

    async fn pause(&mut self) -> Result<(), SchemaError> {
        let now = Instant::now();
        if now >= self.until {
            return Err(SchemaError::Waited);
        }
        if now >= self.tell {
            self.tell = now + TELL_EVERY;
            tracing::info!(
                "another Portolan brings the database to its schema; this one waits for it, at most {} minutes",
                PATIENCE.as_secs() / 60
            );
        }
        sleep(PAUSE).await;
        Ok(())
    }
}

/// Does what is missing in a transaction that nobody else has, and ends it. `ring` seals what is in clear.
macro_rules! bring_up {
    ($transaction:ident, $migrator:expr, $ring:expr) => {{
        let connection = &mut *$transaction;
        connection.ensure_migrations_table(TABLE).await?;
        match missing(&connection.list_applied_migrations(TABLE).await?, $migrator)? {
            Missing::Nothing => {}
            Missing::Some { sealing } => {
                $migrator.run_direct(None, &mut *connection, false).await?;
                if sealing {
                    let ring: Option<&Keyring> = $ring;
                    adopt!(connection, ring.ok_or(SchemaError::Changed)?);
                }
            }
        }
        $transaction.commit().await?;
    }};
}

/// Brings a PostgreSQL database up to date. `ring` is needed where nothing was ever sealed.
pub(super) async fn bring_up_postgres(
    connection: &mut PgConnection,
    ring: Option<&Keyring>,
) -> Result<(), SchemaError> {
    /// Of the transaction alone: one whose process has stopped is not to hold up all others for ever, nor one that waits for
    /// tables that somebody uses.
    const WAITS: &str = "SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL lock_timeout = '60s'; \
                         SET LOCAL statement_timeout = 0";
    const LOCK: &str = "SELECT pg_try_advisory_xact_lock(hashtext('portolan.schema'))";
    let mut migrator = sqlx::migrate!("migrations/postgres");
    // Its own lock would outlive the transaction.
    migrator.set_locking(false);
    // It fails where there is no such table.
    if let Ok(applied) = connection.list_applied_migrations(TABLE).await
        && let Missing::Nothing = missing(&applied, &migrator)?
    {
        return Ok(());
    }
    let mut wait = Wait::begin();
    loop {
        let mut transaction = connection.begin().await?;
        transaction.execute(WAITS).await?;
        if sqlx::query_scalar(LOCK).fetch_one(&mut *transaction).await? {
            bring_up!(transaction, &migrator, ring);
            return Ok(());
        }
        transaction.rollback().await?;
        wait.pause().await?;
    }
}

/// As [`bring_up_postgres`], of a SQLite file.
pub(super) async fn bring_up_sqlite(pool: &SqlitePool, ring: Option<&Keyring>) -> Result<(), SchemaError> {
    let migrator = sqlx::migrate!("migrations/sqlite");
    let mut connection = pool.acquire().await?;
    if let Ok(applied) = connection.list_applied_migrations(TABLE).await
        && let Missing::Nothing = missing(&applied, &migrator)?
    {
        return Ok(());
    }
    let mut wait = Wait::begin();
    loop {
        match connection.begin_with("BEGIN IMMEDIATE").await {
            Ok(mut transaction) => {
                bring_up!(transaction, &migrator, ring);
                return Ok(());
            }
            Err(error) if is_locked(&error) => wait.pause().await?,
            Err(error) => return Err(error.into()),
        }
    }
}
