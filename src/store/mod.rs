//! Speaks SQL and nothing else: one [`Store`] over PostgreSQL or SQLite, the same statements on both.
//!
//! A lookup that finds nothing is `None`, never an error. Every text that goes in has been checked for NUL at the door:
//! SQLite would keep one, PostgreSQL refuses it.

mod batch;
mod changes;
mod feed;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod journal;
mod keys;
mod known;
mod letta;
mod presence;
mod replicas;
mod runs;
mod schema;
mod seal;
mod sealing;
mod servers;
mod shared_runs;
mod sign_ins;
mod tools;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, SubsecRound, Utc};
use futures_util::future::BoxFuture;
use sqlx::postgres::{PgConnectOptions, PgPool};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteError, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

pub use batch::{NewServer, Step};
pub use feed::{Changed, News, Topic};
pub use journal::ChangesWanted;
pub use keys::{KeyError, KeySource, new_key};
pub use letta::{
    LettaDatabase, LettaError, LettaMapping, LettaOrganization, LettaRows, LettaServer, LettaSignIn, LettaTool,
};
pub use replicas::{LONG_DEAD, QUESTIONS_AT_ONCE, Question, Replica};
pub use runs::{ROWS_AT_ONCE as RUNS_AT_ONCE, RunsWanted, run_id, run_id_of};
pub use seal::{Place, Unopened};
pub use sealing::{Rotated, SealError};
pub use servers::{Reached, ServerUpdate};
pub use shared_runs::{Claim, Claimed, NewSharedRun, Progress as SharedProgress, SharedRun};
pub use sign_ins::{Authorization, NewAuthorization, Progress, StoredSignIn};
pub use tools::{Listing, Over};

use feed::Feed;
use known::Known;
use presence::{Lease, Patience, Presence};
use seal::Keyring;
use sealing::Seal;

use crate::telemetry::metrics::{Operation, Operations};

/// How long the first connection to a database may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a read of SQLite may wait for a connection, and a change for its turn to write, of which each may be long.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a statement may wait for another process that has locked the file.
const BUSY_TIMEOUT: Duration = Duration::from_millis(2500);
/// The same at a start, when several may write for the first time.
const START_BUSY_TIMEOUT: Duration = Duration::from_secs(10);
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
    feed: Arc<Feed>,
    seal: Arc<Seal>,
    operations: Operations,
    /// Of a database that is another process.
    presence: Option<Presence>,
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

/// Runs the same code on the pool of either database, `read` for a lookup, `write` for what changes something: counted, and
/// within its time, `long` for what reads or writes very much. The code is a future of its own,
/// whose value is a `Result`: `?` and `return` end it alone. It may name the pool once, which on PostgreSQL is one connection.
macro_rules! on_db {
    ($store:expr, read $pool:ident => $body:expr) => {
        $crate::store::on_db!(@ $store, Read, read, Short, $pool => $body)
    };
    ($store:expr, write $pool:ident => $body:expr) => {
        $crate::store::on_db!(@ $store, Write, write, Short, $pool => $body)
    };
    ($store:expr, long read $pool:ident => $body:expr) => {
        $crate::store::on_db!(@ $store, Read, read, Long, $pool => $body)
    };
    ($store:expr, long write $pool:ident => $body:expr) => {
        $crate::store::on_db!(@ $store, Write, write, Long, $pool => $body)
    };
    (@ $store:expr, $kind:ident, $side:ident, $patience:ident, $pool:ident => $body:expr) => {{
        let operation = ::std::boxed::Box::pin(async {
            match &$store.database {
                $crate::store::Database::Postgres(pool) => {
                    let mut lease = $store.lease(pool).await?;
                    let $pool = &mut *lease;
                    $body
                }
                $crate::store::Database::Sqlite { $side: $pool, .. } => $body,
            }
        });
        let (kind, patience) =
            ($crate::telemetry::metrics::Operation::$kind, $crate::store::presence::Patience::$patience);
        $store.counted(kind, patience, operation).await
    }};
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
        matches!(self, Self::Unavailable(_) | Self::Full(_) | Self::Refused(_))
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
    /// There is no room on its disk; nothing was written.
    #[error("the database has no room left")]
    Full(#[source] sqlx::Error),
    #[error("the database refused a statement")]
    Refused(#[source] sqlx::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        /// PostgreSQL, classes of SQLSTATE: connection, authorization and database, as when one is replaced; transaction
        /// rollback (a deadlock, say), resources, operator intervention, the system; and of others: a standby that takes no
        /// writes, a transaction that was idle for too long, a lock that was not had in time.
        const AWAY: [&str; 10] = ["08", "28", "3D", "40", "53", "57", "58", "25006", "25P03", "55P03"];
        const DISK_FULL: &str = "53100";
        /// SQLite: what is locked, and SQLITE_READONLY, SQLITE_IOERR and SQLITE_CANTOPEN.
        const UNUSABLE: [u32; 3] = [8, 10, 14];
        const SQLITE_FULL: u32 = 13;
        let (full, away) = match &error {
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => {
                (false, true)
            }
            // What came was not what PostgreSQL says: the connection is broken.
            sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => (false, true),
            sqlx::Error::Database(refusal) => match sqlite_code(&error) {
                Some(code) => (code == SQLITE_FULL, is_locked(&error) || UNUSABLE.contains(&code)),
                None => {
                    let code = refusal.code().unwrap_or_default();
                    (code == DISK_FULL, AWAY.iter().any(|class| code.starts_with(class)))
                }
            },
            _ => (false, false),
        };
        match (full, away) {
            (true, _) => Self::Full(error),
            (_, true) => Self::Unavailable(error),
            _ => Self::Refused(error),
        }
    }
}

/// Another process has the SQLite file: SQLITE_BUSY and SQLITE_LOCKED.
fn is_locked(error: &sqlx::Error) -> bool {
    sqlite_code(error).is_some_and(|code| matches!(code, 5 | 6))
}

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
            // Before the schema changes: it may have to be sealed what was stored in clear.
            keys.read().map_err(SealError::from)?;
        }
        let (database, made) = Database::open(url, data_dir, connections, Some(&keys)).await?;
        let presence = database.presence();
        let seal = Seal::open(&database, presence.as_ref(), keys, data_dir, made).await?;
        database.shorten_waits().await;
        let (known, seal) = (Arc::new(Known::new(presence.is_some())), Arc::new(seal));
        let feed = Arc::new(Feed::new());
        Ok(Self { database, known, feed, seal, operations: Operations::default(), presence })
    }

    /// The same store, whose operations are counted in `operations` from now on.
    pub fn counted_in(self, operations: Operations) -> Self {
        Self { operations, ..self }
    }

    /// In a box, operations of one type share this code: otherwise each brings a copy into the program.
    async fn counted<T: Send, E: Blame + From<sqlx::Error> + Send>(
        &self,
        kind: Operation,
        patience: Patience,
        operation: BoxFuture<'_, Result<T, E>>,
    ) -> Result<T, E> {
        let began = Instant::now();
        let done = match &self.presence {
            Some(presence) => presence.during(patience, operation).await,
            // SQLite ends each wait of its own.
            None => operation.await,
        };
        self.operations.done(kind, began, done.as_ref().is_err_and(Blame::is_of_database));
        done
    }

    async fn lease(&self, pool: &PgPool) -> sqlx::Result<Lease> {
        self.presence.as_ref().expect("PostgreSQL has one").lease(pool).await
    }

    /// Whether the database answers; for `/v1/ready`.
    pub async fn ping(&self) -> Result<(), Error> {
        Ok(on_db!(self, read pool => sqlx::query("SELECT 1").execute(pool).await.map(|_| ()))?)
    }

    /// Whether other Portolans may use the same database.
    pub fn is_shared(&self) -> bool {
        matches!(self.database, Database::Postgres(_))
    }

    /// Ends all connections, after the statements that are running.
    pub async fn close(&self) {
        self.feed.close().await;
        if let Some(presence) = &self.presence {
            presence.close().await;
        }
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
    fn presence(&self) -> Option<Presence> {
        match self {
            Self::Postgres(pool) => Some(Presence::new(PgConnectOptions::clone(&pool.connect_options()))),
            Self::Sqlite { .. } => None,
        }
    }

    async fn close(&self) {
        match self {
            Self::Postgres(pool) => pool.close().await,
            Self::Sqlite { read, write } => {
                read.close().await;
                write.close().await;
            }
        }
    }

    /// Opens it. With `keys` its schema is brought up to date; also the file of a key that was made for that.
    async fn open(
        url: Option<&str>,
        data_dir: &Path,
        connections: usize,
        keys: Option<&KeySource>,
    ) -> Result<(Self, Option<PathBuf>), OpenError> {
        let keys = keys.map(|source| Wanted { source, data_dir });
        match url {
            None => Self::open_sqlite(SqliteConnectOptions::new().filename(data_dir.join("portolan.db")), keys).await,
            Some(url) if url.starts_with("sqlite:") => {
                if url.contains(":memory:") || url.contains("mode=memory") {
                    return Err(OpenError::InMemory);
                }
                let options = SqliteConnectOptions::from_str(url).map_err(|error| OpenError::Url(one_line(&error)))?;
                Self::open_sqlite(options, keys).await
            }
            Some(url) if is_postgres(url) => {
                let options = PgConnectOptions::from_str(url).map_err(|error| OpenError::Url(one_line(&error)))?;
                Self::open_postgres(options, connections, keys).await
            }
            Some(_) => Err(OpenError::Scheme),
        }
    }

    async fn open_sqlite(
        options: SqliteConnectOptions,
        keys: Option<Wanted<'_>>,
    ) -> Result<(Self, Option<PathBuf>), OpenError> {
        let place = format!("the SQLite database {}", options.get_filename().display());
        make_private(options.get_filename());
        let options = options
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            // What was secret does not stay in pages that are free.
            .pragma("secure_delete", "ON")
            // Pages of 4 KiB, and bytes: on a disk that has little room, the log takes 1 MiB of it and not four.
            .pragma("wal_autocheckpoint", "256")
            .pragma("journal_size_limit", "1048576")
            .busy_timeout(BUSY_TIMEOUT)
            .disable_statement_logging();
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let write = loop {
            let pool = SqlitePoolOptions::new()
                .max_connections(1)
                .test_before_acquire(false)
                .acquire_timeout(WRITE_TIMEOUT)
                // SQLite ends a transaction that it cannot commit, on a full disk for one; sqlx does not, and would take the
                // next one for a part of it, whose commit is none.
                .after_release(|connection, _| {
                    Box::pin(async move {
                        // Behind the rollback, which nobody waits for.
                        connection.ping().await?;
                        Ok(!connection.is_in_transaction())
                    })
                })
                .connect_with(options.clone())
                .await;
            match pool {
                Ok(pool) => break pool,
                // The busy timeout does not cover the switch to WAL, which waits for nobody: another process is at it.
                Err(error) if is_locked(&error) && Instant::now() < deadline => {
                    tokio::time::sleep(OPEN_PAUSE).await;
                }
                Err(error) => return Err(OpenError::Connect { place, reason: one_line(&error) }),
            }
        };
        let read = SqlitePoolOptions::new()
            .max_connections(SQLITE_READERS)
            .test_before_acquire(false)
            .acquire_timeout(READ_TIMEOUT)
            .connect_lazy_with(options);
        let database = Self::Sqlite { read, write: write.clone() };
        let Some(keys) = keys else { return Ok((database, None)) };
        set_busy_timeout(&write, START_BUSY_TIMEOUT).await;
        let (ring, made) = keys.of_new(sqlx::query(SEALING).execute(&write).await.is_err())?;
        let done = schema::bring_up_sqlite(&write, ring.as_ref()).await;
        done.map_err(|error| OpenError::Migrate { place, reason: error.to_string() })?;
        Ok((database, made))
    }

    async fn open_postgres(
        options: PgConnectOptions,
        connections: usize,
        keys: Option<Wanted<'_>>,
    ) -> Result<(Self, Option<PathBuf>), OpenError> {
        let place = format!(
            "the PostgreSQL database {:?} at {}:{}",
            options.get_database().unwrap_or("(default)"),
            options.get_host(),
            options.get_port()
        );
        // Poolers refuse what they do not know, and nothing here is a float.
        let options = options.application_name("portolan").extra_float_digits(None).disable_statement_logging();
        // A pool retries a refused connection until its time is up and then says only that; one connection says why.
        let refused = |reason| OpenError::Connect { place: place.clone(), reason };
        let mut first = tokio::time::timeout(CONNECT_TIMEOUT, sqlx::PgConnection::connect_with(&options))
            .await
            .map_err(|_| refused(format!("it did not answer within {} s", CONNECT_TIMEOUT.as_secs())))?
            .map_err(|error| refused(one_line(&error)))?;
        let mut made = None;
        if let Some(keys) = keys {
            let ring;
            (ring, made) = keys.of_new(sqlx::query(SEALING).execute(&mut first).await.is_err())?;
            // Without the limits of operations: a schema may take its time.
            let done = schema::bring_up_postgres(&mut first, ring.as_ref()).await;
            done.map_err(|error| OpenError::Migrate { place, reason: error.to_string() })?;
        }
        // Best effort: the connection worked, how it ends changes nothing.
        let _ = first.close().await;
        Ok((Self::Postgres(presence::pool(options, connections)), made))
    }

    /// Whether its schema knows of keys.
    async fn has_sealing(&self) -> bool {
        match self {
            Self::Postgres(pool) => sqlx::query(SEALING).execute(pool).await.is_ok(),
            Self::Sqlite { read, .. } => sqlx::query(SEALING).execute(read).await.is_ok(),
        }
    }

    /// From now on requests wait.
    async fn shorten_waits(&self) {
        if let Self::Sqlite { write, .. } = self {
            set_busy_timeout(write, BUSY_TIMEOUT).await;
        }
    }
}

/// Of a SQLite database, on the connection that there is.
async fn set_busy_timeout(pool: &SqlitePool, time: Duration) {
    let set = format!("PRAGMA busy_timeout = {}", time.as_millis());
    // What goes wrong here goes wrong again with what is done next, which says so.
    let _ = sqlx::query(AssertSqlSafe(set)).execute(pool).await;
}

/// The keys of a database, and where one may be made.
struct Wanted<'a> {
    source: &'a KeySource,
    data_dir: &'a Path,
}

impl Wanted<'_> {
    /// The keys of a database in which nothing was ever sealed, if it is one; one is made where none is set, and its file
    /// given.
    fn of_new(&self, is_new: bool) -> Result<(Option<Keyring>, Option<PathBuf>), SealError> {
        if !is_new {
            return Ok((None, None));
        }
        if !matches!(self.source, KeySource::Unset) {
            return Ok((Some(self.source.read()?), None));
        }
        let source = KeySource::in_folder(self.data_dir);
        match source.read() {
            Err(KeyError::Missing(file)) => {
                let made = source.make()?.then_some(file);
                Ok((Some(source.read()?), made))
            }
            read => Ok((Some(read?), None)),
        }
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

fn one_line(error: &dyn std::error::Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ").trim_end_matches('.').to_owned()
}
