//! Speaks SQL and nothing else: one [`Store`] over PostgreSQL or SQLite, the same statements on both.
//!
//! A lookup that finds nothing is `None`, never an error. Every text that goes in has been checked for NUL at the door:
//! SQLite would keep one, PostgreSQL refuses it.

mod batch;
mod changes;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod journal;
mod keys;
mod known;
mod letta;
mod runs;
mod seal;
mod sealing;
mod servers;
mod sign_ins;
mod tools;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, SubsecRound, Utc};
use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteError, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection};

pub use batch::{NewServer, Step};
pub use journal::ChangesWanted;
pub use keys::{KeyError, KeySource, new_key};
pub use letta::{
    LettaDatabase, LettaError, LettaMapping, LettaOrganization, LettaRows, LettaServer, LettaSignIn, LettaTool,
};
pub use runs::{ROWS_AT_ONCE as RUNS_AT_ONCE, RunsWanted, run_id, run_id_of};
pub use seal::{Place, Unopened};
pub use sealing::{Rotated, SealError};
pub use servers::{Reached, ServerUpdate};
pub use sign_ins::{Authorization, NewAuthorization, Progress, StoredSignIn};
pub use tools::Listing;

use known::{Known, SHARED_TRUST};
use sealing::Seal;

use crate::telemetry::metrics::{Operation, Operations};

/// How long a connection to PostgreSQL may have been idle to be used without a look at it.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);
/// How long a statement may wait for a connection, and a connection for the database.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a change may wait for its turn to write to SQLite.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Settings of each connection to PostgreSQL: how long a statement waits for a lock, and how long a transaction may pause.
/// One whose process has stopped would hold up all others for ever.
const POSTGRES_WAITS: [(&str, &str); 2] = [("lock_timeout", "5s"), ("idle_in_transaction_session_timeout", "15s")];
/// How long to leave a SQLite file alone that another process is about to open or close.
const OPEN_PAUSE: Duration = Duration::from_millis(50);
const SQLITE_READERS: u32 = 8;
/// Fails in a database of before there was sealing.
const SEALING: &str = "SELECT 1 FROM sealing_keys";

/// Where servers and tools are kept, and what is known of them without asking. Clones share everything.
#[derive(Clone)]
pub struct Store {
    pub database: Database,
    known: Arc<Known>,
    seal: Arc<Seal>,
    operations: Operations,
}

/// Connections to the one or the other.
#[derive(Clone, Debug)]
pub enum Database {
    /// Several Portolans may share it.
    Postgres(PgPool),
    /// For one process alone. SQLite takes one writer at a time: with a pool of one connection writers wait their turn
    /// without holding up readers.
    Sqlite { read: SqlitePool, write: SqlitePool },
}

/// Runs the same code on the pool of either database: `read` for a lookup, `write` for what changes something.
macro_rules! on_pool {
    ($store:expr, read $pool:ident => $body:expr) => {
        match &$store.database {
            $crate::store::Database::Postgres($pool) => $body,
            $crate::store::Database::Sqlite { read: $pool, .. } => $body,
        }
    };
    ($store:expr, write $pool:ident => $body:expr) => {
        match &$store.database {
            $crate::store::Database::Postgres($pool) => $body,
            $crate::store::Database::Sqlite { write: $pool, .. } => $body,
        }
    };
}
use on_pool;

/// As [`on_pool`], counted. The code is a future of its own, whose value is a `Result`: `?` and `return` end it alone.
macro_rules! on_db {
    ($store:expr, read $pool:ident => $body:expr) => {
        $store.counted($crate::telemetry::metrics::Operation::Read, async { $crate::store::on_pool!($store, read $pool => $body) }).await
    };
    ($store:expr, write $pool:ident => $body:expr) => {
        $store.counted($crate::telemetry::metrics::Operation::Write, async { $crate::store::on_pool!($store, write $pool => $body) }).await
    };
}
use on_db;

/// An error that may be the database's.
trait Blame {
    /// Whether the database was away, or refused what it should have done.
    fn is_of_database(&self) -> bool;
}

impl Blame for sqlx::Error {
    fn is_of_database(&self) -> bool {
        true
    }
}

impl Blame for Error {
    fn is_of_database(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Refused(_))
    }
}

/// A statement that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another server has this name already.
    #[error("the name is taken")]
    NameTaken,
    /// What was to be changed is not as it was read.
    #[error("it was changed meanwhile")]
    Overtaken,
    /// The database cannot be reached or is too busy; nothing is known to be wrong with the statement.
    #[error("the database is not available")]
    Unavailable(#[source] sqlx::Error),
    #[error("the database refused a statement")]
    Refused(#[source] sqlx::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        /// PostgreSQL, classes of SQLSTATE: connection, transaction rollback (a deadlock, say), resources, operator
        /// intervention; and of others: a standby that takes no writes, a transaction that was idle for too long, a lock
        /// that was not had in time.
        const AWAY: [&str; 7] = ["08", "40", "53", "57", "25006", "25P03", "55P03"];
        /// SQLite: what is locked, and SQLITE_READONLY, SQLITE_IOERR and SQLITE_FULL.
        const UNWRITABLE: [u32; 3] = [8, 10, 13];
        let away = match &error {
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => true,
            sqlx::Error::Database(refusal) => match sqlite_code(&error) {
                Some(code) => LOCKED.contains(&code) || UNWRITABLE.contains(&code),
                None => refusal.code().is_some_and(|code| AWAY.iter().any(|class| code.starts_with(class))),
            },
            _ => false,
        };
        if away { Self::Unavailable(error) } else { Self::Refused(error) }
    }
}

/// SQLITE_BUSY and SQLITE_LOCKED.
const LOCKED: [u32; 2] = [5, 6];

/// What SQLite answered: the low byte of whatever extended code says more.
fn sqlite_code(error: &sqlx::Error) -> Option<u32> {
    let refusal = error.as_database_error()?;
    refusal.try_downcast_ref::<SqliteError>()?;
    refusal.code()?.parse::<u32>().ok().map(|code| code & 0xff)
}

/// Why a database cannot be used; each message is one sentence for the person who starts Portolan.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "The database URL must start with postgres: or sqlite: (for example postgres://user@host/portolan or sqlite:portolan.db)."
    )]
    Scheme,
    #[error("The database URL cannot be read: {0}.")]
    Url(String),
    #[error("An in-memory SQLite database cannot be used; give a file, for example sqlite:portolan.db.")]
    InMemory,
    #[error("Cannot open {place}: {reason}.")]
    Connect { place: String, reason: String },
    #[error("Cannot bring {place} to the schema of this version: {reason}.")]
    Migrate { place: String, reason: String },
    #[error(transparent)]
    Seal(#[from] SealError),
}

/// The file of a SQLite database, if the URL names one.
pub fn sqlite_file(url: &str) -> Option<PathBuf> {
    let options = url.starts_with("sqlite:").then(|| SqliteConnectOptions::from_str(url).ok())??;
    Some(options.get_filename().to_owned())
}

impl Store {
    /// Opens the database that `url` names, or `portolan.db` in `data_dir` without one, and brings its schema up to date.
    /// What is secret in it opens with `keys`; SQLite without any has a key file in `data_dir`. PostgreSQL is given `connections`
    /// at most.
    ///
    /// # Errors
    /// One sentence for the person who starts Portolan, without credentials.
    pub async fn open(
        url: Option<&str>,
        data_dir: &Path,
        connections: usize,
        keys: KeySource,
    ) -> Result<Self, OpenError> {
        if let (Some(url), KeySource::Unset) = (url, &keys)
            && is_postgres(url)
        {
            return Err(SealError::from(KeyError::Unset).into());
        }
        if !matches!(keys, KeySource::Unset) {
            // Before the schema changes: only the start that brings in sealing takes over what was stored in clear.
            keys.read().map_err(SealError::from)?;
        }
        let (database, adopt) = Database::open(url, data_dir, connections).await?;
        let seal = Seal::open(&database, keys, data_dir, adopt).await?;
        let trusted_for = match database {
            Database::Postgres(_) => Some(SHARED_TRUST),
            Database::Sqlite { .. } => None,
        };
        let (known, seal) = (Arc::new(Known::new(trusted_for)), Arc::new(seal));
        Ok(Self { database, known, seal, operations: Operations::default() })
    }

    /// The same store, whose operations are counted in `operations` from now on.
    pub fn counted_in(self, operations: Operations) -> Self {
        Self { operations, ..self }
    }

    async fn counted<T, E: Blame>(
        &self,
        kind: Operation,
        operation: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let began = Instant::now();
        let done = operation.await;
        self.operations.done(kind, began, done.as_ref().is_err_and(Blame::is_of_database));
        done
    }

    /// Whether the database answers; for `/v1/ready`.
    pub async fn ping(&self) -> Result<(), Error> {
        Ok(on_db!(self, read pool => sqlx::query("SELECT 1").execute(pool).await.map(|_| ()))?)
    }

    /// Ends all connections, after the statements that are running.
    pub async fn close(&self) {
        self.database.close().await;
    }

    /// Host and port of a database that is reached over the network.
    pub fn address(&self) -> Option<(String, u16)> {
        match &self.database {
            Database::Sqlite { .. } => None,
            Database::Postgres(pool) => {
                let options = pool.connect_options();
                // A host that begins like a path is the folder of a socket.
                let is_remote = options.get_socket().is_none() && !options.get_host().starts_with('/');
                is_remote.then(|| (options.get_host().to_owned(), options.get_port()))
            }
        }
    }

    /// What the start-up lines say of this store: kind and place, no credentials.
    pub fn describe(&self) -> String {
        match &self.database {
            Database::Sqlite { write, .. } => format!("SQLite in {}", write.connect_options().get_filename().display()),
            Database::Postgres(pool) => {
                let options = pool.connect_options();
                format!("PostgreSQL at {}:{}", options.get_host(), options.get_port())
            }
        }
    }
}

fn is_postgres(url: &str) -> bool {
    url.starts_with("postgres:") || url.starts_with("postgresql:")
}

impl Database {
    async fn close(&self) {
        match self {
            Self::Postgres(pool) => pool.close().await,
            Self::Sqlite { read, write } => {
                read.close().await;
                write.close().await;
            }
        }
    }

    /// Opens it and brings its schema up to date; also whether it was of before there was sealing.
    async fn open(url: Option<&str>, data_dir: &Path, connections: usize) -> Result<(Self, bool), OpenError> {
        match url {
            None => Self::open_sqlite(SqliteConnectOptions::new().filename(data_dir.join("portolan.db"))).await,
            Some(url) if url.starts_with("sqlite:") => {
                if url.contains(":memory:") || url.contains("mode=memory") {
                    return Err(OpenError::InMemory);
                }
                let options = SqliteConnectOptions::from_str(url).map_err(|error| OpenError::Url(one_line(&error)))?;
                Self::open_sqlite(options).await
            }
            Some(url) if is_postgres(url) => {
                let options = PgConnectOptions::from_str(url).map_err(|error| OpenError::Url(one_line(&error)))?;
                Self::open_postgres(options, connections).await
            }
            Some(_) => Err(OpenError::Scheme),
        }
    }

    async fn open_sqlite(options: SqliteConnectOptions) -> Result<(Self, bool), OpenError> {
        let place = format!("the SQLite database {}", options.get_filename().display());
        make_private(options.get_filename());
        let options = options
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            // What was secret does not stay in pages that are free.
            .pragma("secure_delete", "ON")
            .busy_timeout(ACQUIRE_TIMEOUT)
            .disable_statement_logging();
        let deadline = Instant::now() + ACQUIRE_TIMEOUT;
        let write = loop {
            let pool = SqlitePoolOptions::new()
                .max_connections(1)
                .test_before_acquire(false)
                .acquire_timeout(WRITE_TIMEOUT)
                .connect_with(options.clone())
                .await;
            match pool {
                Ok(pool) => break pool,
                // The busy timeout does not cover the switch to WAL, which waits for nobody: another process is at it.
                Err(error)
                    if sqlite_code(&error).is_some_and(|code| LOCKED.contains(&code)) && Instant::now() < deadline =>
                {
                    tokio::time::sleep(OPEN_PAUSE).await;
                }
                Err(error) => return Err(OpenError::Connect { place, reason: one_line(&error) }),
            }
        };
        let adopt = sqlx::query(SEALING).execute(&write).await.is_err();
        migrated(place, sqlx::migrate!("migrations/sqlite").run(&write).await)?;
        let read = SqlitePoolOptions::new()
            .max_connections(SQLITE_READERS)
            .test_before_acquire(false)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(options);
        Ok((Self::Sqlite { read, write }, adopt))
    }

    async fn open_postgres(options: PgConnectOptions, connections: usize) -> Result<(Self, bool), OpenError> {
        let place = format!(
            "the PostgreSQL database {:?} at {}:{}",
            options.get_database().unwrap_or("(default)"),
            options.get_host(),
            options.get_port()
        );
        let options = options.application_name("portolan").disable_statement_logging();
        // A pool retries a refused connection until its time is up and then says only that; one connection says why.
        let refused = |reason| OpenError::Connect { place: place.clone(), reason };
        let mut first = tokio::time::timeout(ACQUIRE_TIMEOUT, sqlx::PgConnection::connect_with(&options))
            .await
            .map_err(|_| refused(format!("it did not answer within {} s", ACQUIRE_TIMEOUT.as_secs())))?
            .map_err(|error| refused(one_line(&error)))?;
        let adopt = sqlx::query(SEALING).execute(&mut first).await.is_err();
        // Without limits to its waits: another Portolan may be at the same for long.
        migrated(place, sqlx::migrate!("migrations/postgres").run(&mut first).await)?;
        // Best effort: the connection worked, how it ends changes nothing.
        let _ = first.close().await;
        let pool = PgPoolOptions::new()
            .max_connections(u32::try_from(connections).unwrap_or(u32::MAX))
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // A look at a connection costs a round trip: only for one that was idle long enough to have been cut.
            .test_before_acquire(false)
            .before_acquire(|connection, meta| {
                Box::pin(async move {
                    if meta.idle_for > TRUSTED_IDLE {
                        connection.ping().await?;
                    }
                    Ok(true)
                })
            })
            .connect_lazy_with(options.options(POSTGRES_WAITS));
        Ok((Self::Postgres(pool), adopt))
    }
}

/// Makes the database file readable for its owner alone before SQLite makes it for everybody; new journals take the mode
/// over. What goes wrong here goes wrong again at the open, which says so.
fn make_private(file: &Path) {
    let _ = std::fs::OpenOptions::new().append(true).create(true).open(file);
    #[cfg(unix)]
    for suffix in ["", "-wal", "-shm"] {
        let mut name = file.as_os_str().to_owned();
        name.push(suffix);
        let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        let _ = std::fs::set_permissions(name, owner_only);
    }
}

/// The time as both databases keep it: UTC, whole microseconds.
pub fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
}

fn migrated(place: String, result: Result<(), MigrateError>) -> Result<(), OpenError> {
    result.map_err(|error| OpenError::Migrate {
        place,
        reason: match error {
            MigrateError::VersionMissing(_) | MigrateError::VersionMismatch(_) => {
                "it was written by another version of Portolan; start that version or a newer one".to_owned()
            }
            other => one_line(&other),
        },
    })
}

fn one_line(error: &dyn std::error::Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ").trim_end_matches('.').to_owned()
}
