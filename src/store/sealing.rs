//! What of the database is sealed, with which keys, and how they change.
//!
//! The table `sealing_keys` names the keys that seal in this database, each with a text that it sealed. Portolan does not
//! start without one of them: it would show every secret as lost, and seal new ones with a key that others do not have.
//! Nor is a key made for a database in which something was sealed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use futures_util::future::BoxFuture;
use secrecy::zeroize::Zeroizing;
use sqlx::postgres::PgPool;
use sqlx::{Connection, FromRow};

use crate::model::{Config, Connector, Server, Unreadable};
use crate::telemetry::metrics::Operation;

use super::keys::{KeyError, KeySource};
use super::presence::{Lease, Patience, Presence};
use super::runs::content_of;
use super::seal::{Key, Keyring, Place, Unopened, key_id};
use super::shared_runs::outcome_of;
use super::sign_ins::{authorization_of, sign_in_of};
use super::{Database, Error, OpenError, Store, on_db};

/// What each key seals in `sealing_keys`.
pub(super) const KNOWN: &[u8] = b"portolan";
/// Rows that one step of a rotation reads, and seals again in one transaction.
const ROWS_AT_ONCE: i64 = 50;
/// How often a rotation goes through all rows, if others go on changing them.
const PASSES: usize = 10;

/// The keys in use, and where they come from.
pub(super) struct Seal {
    ring: RwLock<Arc<Keyring>>,
    source: KeySource,
    made: Option<PathBuf>,
}

impl Seal {
    /// Gets the keys of a database that is up to date, and makes one for a SQLite database that is to have one. `made` is the
    /// file of one that was made for it already.
    pub(super) async fn open(
        database: &Database,
        presence: Option<&Presence>,
        source: KeySource,
        data_dir: &Path,
        made: Option<PathBuf>,
    ) -> Result<Self, SealError> {
        let unlocked = Unlocked { database, presence };
        let (ring, source, made) = match (source, database) {
            (KeySource::Unset, Database::Sqlite { .. }) => {
                let source = KeySource::in_folder(data_dir);
                let mut made = made;
                let ring = match source.read() {
                    Err(KeyError::Missing(file)) if unlocked.is_unsealed().await? => {
                        made = source.make()?.then_some(file);
                        source.read()?
                    }
                    Err(KeyError::Missing(file)) => return Err(KeyError::Gone(file).into()),
                    read => read?,
                };
                (ring, source, made)
            }
            (source, _) => (source.read()?, source, None),
        };
        for (key, rows) in unlocked.admit(&ring).await? {
            tracing::warn!(key, rows, "servers are sealed with a key that is not among the keys; they cannot be used");
        }
        if let Database::Sqlite { write, .. } = database
            && let Err(error) = clean(write).await
        {
            tracing::warn!(%error, "what was stored in clear may still be in the database file; the next start tries again");
        }
        Ok(Self { ring: RwLock::new(Arc::new(ring)), source, made })
    }

    fn ring(&self) -> Arc<Keyring> {
        self.ring.read().expect("no code panics while it changes the keys").clone()
    }
}

/// Why the keys at hand cannot be used with this database; one sentence for the person who starts Portolan.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(
        "This is not the key that the database is sealed with: that is key {theirs}, and key {ours} was given; give the \
         right one with --key-file or PORTOLAN_KEY (if it is lost for good: portolan key forget {theirs})."
    )]
    Wrong { theirs: String, ours: String },
    #[error(
        "What the database knows of key {0} was changed, so the key cannot be checked; restore the table sealing_keys \
         from a backup."
    )]
    Check(String),
    #[error(
        "Key {key} is not among the keys any more, and still seals {rows} of the servers; the keys stay as they were. \
         Add it again, run portolan rotate-keys, and then take it out."
    )]
    Needed { key: String, rows: i64 },
    #[error("The keys cannot be checked: {}.", super::one_line(&.0))]
    Database(#[from] sqlx::Error),
}

fn config_of(id: &str) -> Place<'_> {
    Place { table: "servers", column: "config", id }
}

fn error_of(id: &str) -> Place<'_> {
    Place { table: "servers", column: "error", id }
}

pub(super) fn known_of(key_id: &str) -> Place<'_> {
    Place { table: "sealing_keys", column: "known", id: key_id }
}

/// A row of `servers`, as it is stored: `config`, and `error`, which may quote a server's own words, are sealed.
#[derive(FromRow)]
pub(super) struct ServerRow {
    #[sqlx(flatten)]
    server: Server,
    config: String,
    error: Option<String>,
}

impl Store {
    fn unlocked(&self) -> Unlocked<'_> {
        Unlocked { database: &self.database, presence: self.presence.as_ref() }
    }

    /// The server of a row. A configuration that cannot be opened hides nothing else of it.
    pub(super) fn opened(&self, row: ServerRow) -> Server {
        let ServerRow { mut server, config, error } = row;
        let ring = self.seal.ring();
        server.config = match ring.open(config_of(&server.id), &config) {
            Ok(text) => Config::read(&text),
            Err(Unopened::NoKey) => Config(Err(Unreadable::NoKey)),
            Err(Unopened::Damaged) => Config(Err(Unreadable::Damaged)),
        };
        // An error is only what was found last time; one that cannot be opened will be found again.
        let error = error.and_then(|error| ring.open(error_of(&server.id), &error).ok());
        server.error = error.map(|error| String::from_utf8_lossy(&error).into_owned());
        server
    }

    /// The connector that `servers.config` of this row holds; `None` when it cannot be opened.
    pub(super) fn opened_config(&self, id: &str, envelope: &str) -> Option<Connector> {
        Config::read(&self.seal.ring().open(config_of(id), envelope).ok()?).0.ok()
    }

    /// What `servers.config` of this row is to hold.
    pub(super) fn sealed_config(&self, id: &str, connector: &Connector) -> String {
        self.seal.ring().first().seal(config_of(id), super::servers::to_text(connector).as_bytes())
    }

    /// What `servers.error` of this row is to hold.
    pub(super) fn sealed_error(&self, id: &str, error: Option<&str>) -> Option<String> {
        error.map(|error| self.seal.ring().first().seal(error_of(id), error.as_bytes()))
    }

    /// Seals a text for one column of one row, with the first key.
    pub fn seal(&self, place: Place<'_>, text: &[u8]) -> String {
        self.seal.ring().first().seal(place, text)
    }

    /// Opens what was sealed for this very place.
    pub fn open_sealed(&self, place: Place<'_>, envelope: &str) -> Result<Zeroizing<Vec<u8>>, Unopened> {
        self.seal.ring().open(place, envelope)
    }

    /// The key file, if it was made at this start.
    pub fn made_key(&self) -> Option<&Path> {
        self.seal.made.as_deref()
    }

    /// Reads the key file again, and seals with its first key from now on; how many keys there are. What a variable gave
    /// stays as it is.
    ///
    /// # Errors
    /// When the file cannot be used, or lacks a key that is needed still; the keys then stay as they were.
    pub async fn reload_keys(&self) -> Result<usize, SealError> {
        let store = self.clone();
        let read = tokio::task::spawn_blocking(move || store.seal.source.read()).await;
        let ring = read.unwrap_or_else(|broken| std::panic::resume_unwind(broken.into_panic()))?;
        let lost = self.unlocked().admit(&ring).await?;
        let known = self.seal.ring();
        if let Some((key, rows)) = lost.into_iter().find(|(key, _)| known.key(key).is_some()) {
            return Err(SealError::Needed { key, rows });
        }
        let keys = ring.keys().count();
        *self.seal.ring.write().expect("no code panics while it changes the keys") = Arc::new(ring);
        Ok(keys)
    }
}

/// Makes a key known to a database, on a connection.
macro_rules! make_known {
    ($connection:expr, $key:expr) => {{
        let key = $key;
        sqlx::query("INSERT INTO sealing_keys (id, known, created_at) VALUES ($1, $2, $3)")
            .bind(key.id())
            .bind(key.seal($crate::store::sealing::known_of(key.id()), $crate::store::sealing::KNOWN))
            .bind($crate::store::now())
            .execute($connection)
            .await?;
    }};
}
pub(super) use make_known;

/// Seals in the transaction that brings sealing what older versions wrote in clear, with the first key of a ring, which it
/// makes known. Later, what is in clear was not written by Portolan, whatever else somebody removed.
macro_rules! adopt {
    ($connection:expr, $ring:expr) => {{
        let (connection, first) = ($connection, $ring.first());
        let rows: Vec<$crate::store::sealing::Stored> =
            sqlx::query_as("SELECT id, config, error FROM servers").fetch_all(&mut *connection).await?;
        for row in &rows {
            let (config, error) = row.sealed_with(first);
            sqlx::query("UPDATE servers SET config = $2, error = $3 WHERE id = $1")
                .bind(&row.id)
                .bind(config)
                .bind(error)
                .execute(&mut *connection)
                .await?;
        }
        $crate::store::sealing::make_known!(&mut *connection, first);
    }};
}
pub(super) use adopt;

/// A database whose keys are not known yet.
pub(super) struct Unlocked<'a> {
    database: &'a Database,
    /// Of one that is another process.
    presence: Option<&'a Presence>,
}

impl Unlocked<'_> {
    async fn lease(&self, pool: &PgPool) -> sqlx::Result<Lease> {
        self.presence.expect("PostgreSQL has one").lease(pool).await
    }

    /// Within its time, as `on_db!` wants it; counted nowhere.
    async fn counted<T: Send, E: From<sqlx::Error> + Send>(
        &self,
        _kind: Operation,
        patience: Patience,
        operation: BoxFuture<'_, Result<T, E>>,
    ) -> Result<T, E> {
        match self.presence {
            Some(presence) => presence.during(patience, operation).await,
            None => operation.await,
        }
    }

    /// Whether nothing was ever sealed in it.
    async fn is_unsealed(&self) -> sqlx::Result<bool> {
        const SQL: &str = "SELECT count(*) FROM sealing_keys";
        let keys: i64 = on_db!(self, write pool => sqlx::query_scalar(SQL).fetch_one(pool).await)?;
        Ok(keys == 0 && self.keys_in_use().await?.is_empty())
    }

    /// The ids of the keys that seal anything. From one key to the next along an index, because a start waits for it, and
    /// there may be a million rows of each.
    async fn keys_in_use(&self) -> sqlx::Result<BTreeSet<String>> {
        // What `seal::key_id` reads, with the version before it.
        const NEXT: [&str; 5] = [
            "SELECT substr(config, 1, 15) FROM servers WHERE substr(config, 1, 3) = 'v1.' AND substr(config, 1, 15) > $1 \
             ORDER BY substr(config, 1, 15) LIMIT 1",
            "SELECT substr(material, 1, 15) FROM sign_ins WHERE substr(material, 1, 3) = 'v1.' \
             AND substr(material, 1, 15) > $1 ORDER BY substr(material, 1, 15) LIMIT 1",
            // Few, and gone after minutes.
            "SELECT substr(material, 1, 15) FROM authorizations WHERE substr(material, 1, 3) = 'v1.' \
             AND substr(material, 1, 15) > $1 ORDER BY substr(material, 1, 15) LIMIT 1",
            "SELECT sealed_with FROM runs WHERE sealed_with IS NOT NULL AND sealed_with > $1 ORDER BY sealed_with LIMIT 1",
            "SELECT sealed_with FROM shared_runs WHERE sealed_with > $1 ORDER BY sealed_with LIMIT 1",
        ];
        let mut keys = BTreeSet::new();
        for next in NEXT {
            let mut last = String::new();
            loop {
                let found: Option<String> =
                    on_db!(self, long write pool => sqlx::query_scalar(next).bind(&last).fetch_optional(pool).await)?;
                let Some(found) = found else { break };
                keys.insert(found.chars().skip("v1.".len()).collect());
                last = found;
            }
        }
        Ok(keys)
    }

    /// How many servers each key seals, or the sign-ins to them, or what was said in their runs, by its id. Looks at all.
    async fn sealed_by(&self) -> sqlx::Result<BTreeMap<String, i64>> {
        // What `seal::key_id` reads. UNION counts a server once.
        const SQL: &str = "SELECT substr(sealed, 4, 12) AS key_id, count(*) FROM \
                           (SELECT substr(config, 1, 15) AS sealed, id FROM servers UNION \
                           SELECT substr(material, 1, 15), server_id FROM sign_ins UNION \
                           SELECT substr(material, 1, 15), coalesce(server_id, id) FROM authorizations UNION \
                           SELECT sealed_with, mcp_server_id FROM runs WHERE sealed_with IS NOT NULL UNION \
                           SELECT sealed_with, mcp_server_id FROM shared_runs) AS all_sealed \
                           WHERE substr(sealed, 1, 3) = 'v1.' GROUP BY 1";
        let rows: Vec<(String, i64)> = on_db!(self, long write pool => sqlx::query_as(SQL).fetch_all(pool).await)?;
        Ok(rows.into_iter().collect())
    }

    /// Takes a key out of those that this database is known to be sealed with; `false` when it is not among them.
    async fn forget_key(&self, id: &str) -> sqlx::Result<bool> {
        const SQL: &str = "DELETE FROM sealing_keys WHERE id = $1";
        let rows =
            on_db!(self, write pool => sqlx::query(SQL).bind(id).execute(pool).await.map(|done| done.rows_affected()))?;
        Ok(rows > 0)
    }

    /// Checks that these are keys of this database, and makes the first one known there. One at a time: of two that start on
    /// a new database with different keys, the second is refused. Where there is nothing to write nobody waits, however many
    /// start. Returns the keys that are not on the ring and the servers they seal.
    async fn admit(&self, ring: &Keyring) -> Result<Vec<(String, i64)>, SealError> {
        const KEYS: &str = "SELECT id, known FROM sealing_keys ORDER BY created_at, id";
        // What changes nothing takes the write lock on SQLite.
        let lock = match self.database {
            Database::Postgres(_) => "LOCK TABLE sealing_keys IN EXCLUSIVE MODE",
            Database::Sqlite { .. } => "DELETE FROM sealing_keys WHERE 1 = 0",
        };
        let first = ring.first();
        let known: Vec<(String, String)> = on_db!(self, write pool => sqlx::query_as(KEYS).fetch_all(pool).await)?;
        if check(ring, &known)? {
            return self.unknown_to(ring).await;
        }
        on_db!(self, write pool => {
            let mut transaction = pool.begin().await?;
            sqlx::query(lock).execute(&mut *transaction).await?;
            let keys: Vec<(String, String)> = sqlx::query_as(KEYS).fetch_all(&mut *transaction).await?;
            if !check(ring, &keys)? {
                make_known!(&mut *transaction, first);
            }
            transaction.commit().await?;
            Ok::<_, SealError>(())
        })?;
        self.unknown_to(ring).await
    }

    /// The keys that are not on the ring and the servers they seal. Looks at all servers only where there is such a key.
    async fn unknown_to(&self, ring: &Keyring) -> Result<Vec<(String, i64)>, SealError> {
        if self.keys_in_use().await?.iter().all(|key| ring.key(key).is_some()) {
            return Ok(vec![]);
        }
        let sealed_by = self.sealed_by().await?;
        Ok(sealed_by.into_iter().filter(|(key, _)| ring.key(key).is_none()).collect())
    }
}

/// Whether a database with these keys knows the first one on the ring already.
///
/// # Errors
/// [`SealError::Wrong`] when it knows others alone, [`SealError::Check`].
fn check(ring: &Keyring, keys: &[(String, String)]) -> Result<bool, SealError> {
    let first = ring.first();
    let ours: Vec<_> = keys.iter().filter(|(id, _)| ring.key(id).is_some()).collect();
    if let Some((theirs, _)) = keys.last().filter(|_| ours.is_empty()) {
        return Err(SealError::Wrong { theirs: theirs.clone(), ours: first.id().to_owned() });
    }
    for (id, known) in ours {
        if ring.open(known_of(id), known).ok().is_none_or(|text| text.as_slice() != KNOWN) {
            return Err(SealError::Check(id.clone()));
        }
    }
    Ok(keys.iter().any(|(id, _)| id == first.id()))
}

/// The sealed columns of a server.
#[derive(FromRow)]
pub(super) struct Stored {
    pub(super) id: String,
    config: String,
    error: Option<String>,
}

impl Stored {
    /// What is in clear here, in envelopes of this key.
    pub(super) fn sealed_with(&self, key: &Key) -> (String, Option<String>) {
        let error = self.error.as_ref().map(|error| key.seal(error_of(&self.id), error.as_bytes()));
        (key.seal(config_of(&self.id), self.config.as_bytes()), error)
    }
}

/// Leaves nothing in a SQLite file of what was there before its secrets were sealed: pages that are not in use, and the
/// journal. Done once, which the file remembers.
async fn clean(pool: &sqlx::SqlitePool) -> sqlx::Result<()> {
    let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(pool).await?;
    if version > 0 {
        return Ok(());
    }
    for statement in ["VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA user_version = 1"] {
        sqlx::query(statement).execute(pool).await?;
    }
    Ok(())
}

/// What a rotation did.
#[derive(Debug, Default, PartialEq)]
pub struct Rotated {
    /// The servers that were sealed again, with the first key.
    pub sealed: i64,
    /// The keys that still seal servers, and how many, the first key too.
    pub sealed_by: BTreeMap<String, i64>,
    /// Servers that could not be opened, and are as they were.
    pub unopened: i64,
}

impl Store {
    /// How many servers each key seals, by its id.
    pub async fn sealed_by(&self) -> Result<BTreeMap<String, i64>, Error> {
        Ok(self.unlocked().sealed_by().await?)
    }

    /// The ids of the keys, that of the first one first.
    pub fn key_ids(&self) -> Vec<String> {
        self.seal.ring().keys().map(|key| key.id().to_owned()).collect()
    }

    /// Seals all that other keys sealed again with the first one, a few servers at a time, while others read and write.
    /// What is changed meanwhile is left to its writer, and looked at again. May be cut off at any time and begun
    /// anew. `progress` hears before and after each step how many servers have been looked at, and of how many; both begin
    /// again with each look.
    pub async fn rotate(&self, mut progress: impl FnMut(i64, i64)) -> Result<Rotated, Error> {
        const COUNT: &str = "SELECT count(*) FROM servers";
        let ring = self.seal.ring();
        let mut rotated = Rotated::default();
        for _ in 0..PASSES {
            let all: i64 = on_db!(self, long read pool => sqlx::query_scalar(COUNT).fetch_one(pool).await)?;
            // Some may come meanwhile.
            let pass = self.rotate_once(&ring, &mut rotated, |seen| progress(seen, all.max(seen))).await?;
            rotated.unopened = pass.unopened;
            if pass.overtaken == 0 {
                break;
            }
        }
        rotated.sealed_by = self.sealed_by().await?;
        // With a key that seals nothing any more, Portolan is not to start.
        for key in ring.keys().skip(1).filter(|key| !rotated.sealed_by.contains_key(key.id())) {
            self.unlocked().forget_key(key.id()).await?;
        }
        Ok(rotated)
    }

    async fn rotate_once(
        &self,
        ring: &Keyring,
        rotated: &mut Rotated,
        mut progress: impl FnMut(i64),
    ) -> Result<Pass, Error> {
        const READ: &str = "SELECT id, config, error FROM servers WHERE id > $1 ORDER BY id LIMIT $2";
        const SEAL: &str = "UPDATE servers SET config = $2, error = $3 \
                            WHERE id = $1 AND config = $4 AND coalesce(error, '') = $5";
        let mut pass = Pass::default();
        let mut after = String::new();
        let mut seen = 0;
        loop {
            progress(seen);
            let rows: Vec<Stored> = on_db!(self, long read pool => sqlx::query_as(READ)
                .bind(&after)
                .bind(ROWS_AT_ONCE)
                .fetch_all(pool)
                .await)?;
            let Some(last) = rows.last() else { break };
            after.clone_from(&last.id);
            on_db!(self, long write pool => {
                let mut transaction = pool.begin().await?;
                for row in &rows {
                    let Some((config, error)) = sealed_again(ring, row, &mut pass) else { continue };
                    let done = sqlx::query(SEAL)
                        .bind(&row.id)
                        .bind(config)
                        .bind(error)
                        .bind(&row.config)
                        .bind(row.error.as_deref().unwrap_or_default())
                        .execute(&mut *transaction)
                        .await?;
                    if done.rows_affected() == 0 {
                        pass.overtaken += 1;
                    } else {
                        rotated.sealed += 1;
                    }
                }
                transaction.commit().await
            })?;
            seen += i64::try_from(rows.len()).expect("a step has few rows");
        }
        self.rotate_others(ring, &mut pass).await?;
        Ok(pass)
    }

    /// The same for the sign-ins to servers, which are not counted apart, for those that are under way, and for what was
    /// said in runs.
    async fn rotate_others(&self, ring: &Keyring, pass: &mut Pass) -> Result<(), Error> {
        type PlaceOf = fn(&str) -> Place<'_>;
        const TABLES: [(&str, &str, PlaceOf); 4] = [
            (
                "SELECT server_id, material FROM sign_ins WHERE server_id > $1 ORDER BY server_id LIMIT $2",
                "UPDATE sign_ins SET material = $2 WHERE server_id = $1 AND material = $3",
                sign_in_of,
            ),
            (
                "SELECT id, material FROM authorizations WHERE id > $1 ORDER BY id LIMIT $2",
                "UPDATE authorizations SET material = $2 WHERE id = $1 AND material = $3",
                authorization_of,
            ),
            (
                "SELECT id, content FROM runs WHERE sealed_with IS NOT NULL AND id > $1 ORDER BY id LIMIT $2",
                "UPDATE runs SET content = $2, sealed_with = substr($2, 1, 15) WHERE id = $1 AND content = $3",
                content_of,
            ),
            (
                "SELECT id, content FROM shared_runs WHERE id > $1 ORDER BY id LIMIT $2",
                "UPDATE shared_runs SET content = $2, sealed_with = substr($2, 1, 15) WHERE id = $1 AND content = $3",
                outcome_of,
            ),
        ];
        let first = ring.first();
        for (read, seal, place_of) in TABLES {
            let mut after = String::new();
            loop {
                let rows: Vec<(String, String)> = on_db!(self, long read pool => sqlx::query_as(read)
                    .bind(&after)
                    .bind(ROWS_AT_ONCE)
                    .fetch_all(pool)
                    .await)?;
                let Some((last, _)) = rows.last() else { break };
                after.clone_from(last);
                on_db!(self, long write pool => {
                    let mut transaction = pool.begin().await?;
                    for (id, material) in rows.iter().filter(|(_, material)| key_id(material) != Some(first.id())) {
                        let Ok(text) = ring.open(place_of(id), material) else {
                            pass.unopened += 1;
                            continue;
                        };
                        let done = sqlx::query(seal)
                            .bind(id)
                            .bind(first.seal(place_of(id), &text))
                            .bind(material)
                            .execute(&mut *transaction)
                            .await?;
                        if done.rows_affected() == 0 {
                            pass.overtaken += 1;
                        }
                    }
                    transaction.commit().await
                })?;
            }
        }
        Ok(())
    }

    /// Lets a database start with another key than the lost one that sealed in it; `false` when it knows no such key.
    ///
    /// # Errors
    /// One sentence for the person who has lost it.
    pub async fn forget_lost_key(url: Option<&str>, data_dir: &Path, id: &str) -> Result<bool, OpenError> {
        // Its schema stays as it is: what was never sealed could not be sealed without a key.
        let (database, _) = Database::open(url, data_dir, 1, None).await?;
        let presence = database.presence();
        let unlocked = Unlocked { database: &database, presence: presence.as_ref() };
        let forgotten = match database.has_sealing().await {
            true => unlocked.forget_key(id).await.map_err(SealError::from),
            false => Ok(false),
        };
        if let Some(presence) = presence {
            presence.close().await;
        }
        database.close().await;
        Ok(forgotten?)
    }
}

/// What one pass of a rotation left.
#[derive(Default)]
struct Pass {
    /// Changed by others between read and write.
    overtaken: i64,
    unopened: i64,
}

/// The sealed columns of a row under the first key; `None` when they are, or cannot be opened.
fn sealed_again(ring: &Keyring, row: &Stored, pass: &mut Pass) -> Option<(String, Option<String>)> {
    let first = ring.first();
    let is_first = |envelope: &str| key_id(envelope) == Some(first.id());
    let Ok(config) = ring.open(config_of(&row.id), &row.config) else {
        pass.unopened += 1;
        return None;
    };
    if is_first(&row.config) && row.error.as_deref().is_none_or(is_first) {
        return None;
    }
    let error = row.error.as_ref().and_then(|error| ring.open(error_of(&row.id), error).ok());
    let error = error.map(|error| first.seal(error_of(&row.id), &error));
    Some((first.seal(config_of(&row.id), &config), error))
}
