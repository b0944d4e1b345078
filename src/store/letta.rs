//! A Letta V1 database, read and never written: MCP servers, their tools and sign-ins, as their rows have them.
//!
//! PostgreSQL is read in one transaction that may not write. A SQLite file is opened as one that nobody changes, so that
//! not even a lock is taken; when Letta left a journal beside it, copies of both are read instead. Which columns there are
//! is looked up: what older versions of Letta lack is absent.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, NaiveDateTime, Utc};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgRow};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, FromRow};
use tokio::time::timeout;
use uuid::Uuid;

use super::one_line;

/// How long a connection to the source may take, and reading all of it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// How many rows of a table are read.
const MAX_ROWS: usize = 200_000;

/// The versions of Letta's schema (`alembic_version`) from July 2025 up to its last release, 0.16.8; in all of them the rows
/// that are read here mean the same. Those of before 0.13 are for SQLite files, which no later Letta has.
const KNOWN_VERSIONS: &str = "
    1c28e167b74f a08c972e781b 9fa274fb0b83 45402909a46b b2c3d4e5f6a8 3e54e2fa2f7e a1b2c3d4e5f8 9275f62ad282 297e8217e952
    308a180244fc 82feb220a9b8 539afa667cff a1b2c3d4e5f7 cf3c4d025dbc 27de0f58e076 ee2b43eea55e 39577145c45d d0880aae6cee
    2e5e90d3cdf8 af842aa6f743 175dd10fb916 b1c2d3e4f5a6 2dbb2cf49e07 a1b2c3d4e5f6 d798609d65ff 89fd4648866b f6cd5a1e519d
    c6c43222e2de 6756d04c3ddb e67961ed7c32 8149a781ac1b 066857381578 c734cfc0d595 038e68cdf0df b6061da886ee 89b595051e48
    f9ad1c25fd2b 3bc3c031fbe4 567e9fe06270 3d2e9fb40a3c 57bcea83af3f 5973fd8b8c60 eff256d296cb 7f7933666957 d06594144ef3
    5d27a719b24d 18ff61fbc034 b888f21b151f 750dd87faa12 5b804970e6a0 ddb69be34a72 f3bf00ef6118 54c76f7cabca c41c87205254
    068588268b02 887a4367b560 d5103ee17ed5 ffb17eb241fc 5fb8bba2c373 f7f757414d20 05c3bc564286 d007f4ca66bf 74e860718e0d
    15b577c62f3f 4c6c9ef0387d 4537f0996495 06fbbf65d4f1 f55542f37641 f5d26b0526e8 ddecfe4902bc c4eb5a907b38 cce9a6174366
    2c059cad97cc";

/// The tables that are read: the columns of each that must be there, and those that may.
const SERVERS: Table = Table {
    name: "mcp_server",
    needed: &["id", "server_name", "server_type", "server_url", "organization_id"],
    further: &[
        "stdio_config",
        "created_at",
        "_created_by_id",
        "token",
        "token_enc",
        "custom_headers",
        "custom_headers_enc",
    ],
    only: "",
};
const TOOLS: Table = Table {
    name: "tools",
    needed: &["id", "name", "organization_id", "tool_type"],
    further: &["description", "json_schema", "tags", "metadata_", "created_at"],
    only: "tool_type = 'external_mcp'",
};
const MAPPINGS: Table =
    Table { name: "mcp_tools", needed: &["mcp_server_id", "tool_id"], further: &["created_at"], only: "" };
const SIGN_INS: Table = Table {
    name: "mcp_oauth",
    needed: &["server_url", "organization_id", "status"],
    further: &[
        "server_id",
        "user_id",
        "access_token",
        "access_token_enc",
        "refresh_token",
        "refresh_token_enc",
        "client_id",
        "client_secret",
        "client_secret_enc",
        "redirect_uri",
        "scope",
        "expires_at",
        "updated_at",
    ],
    only: "",
};
const ORGANIZATIONS: Table = Table { name: "organizations", needed: &["id"], further: &["name"], only: "" };

/// What of a Letta database is about MCP servers, oldest first; rows that count as deleted are left out.
#[derive(Default)]
pub struct LettaRows {
    pub servers: Vec<LettaServer>,
    pub tools: Vec<LettaTool>,
    pub mappings: Vec<LettaMapping>,
    pub sign_ins: Vec<LettaSignIn>,
    pub organizations: Vec<LettaOrganization>,
    /// How many servers count as deleted.
    pub deleted: usize,
}

/// A row of `mcp_server`. What is in a column that ends in `_enc` was sealed by Letta, or is the text itself when it had no
/// key; the column of the same name without `_enc` is that of older versions.
#[derive(FromRow)]
pub struct LettaServer {
    pub id: String,
    pub server_name: String,
    pub server_type: String,
    pub server_url: Option<String>,
    /// JSON: `command`, `args`, `env`.
    pub stdio_config: Option<String>,
    pub organization_id: String,
    created_at: Option<String>,
    #[sqlx(rename = "_created_by_id")]
    pub created_by: Option<String>,
    pub token: Option<String>,
    pub token_enc: Option<String>,
    /// JSON, an object of texts; so is what opens from `custom_headers_enc`.
    pub custom_headers: Option<String>,
    pub custom_headers_enc: Option<String>,
}

impl LettaServer {
    pub fn created_at(&self) -> Option<DateTime<Utc>> {
        time(&self.created_at)
    }
}

/// A row of `tools` that came from an MCP server.
#[derive(FromRow)]
pub struct LettaTool {
    pub id: String,
    pub name: String,
    pub organization_id: String,
    pub description: Option<String>,
    /// JSON (docs/CONTRACT.md, row 12).
    pub json_schema: Option<String>,
    /// JSON, a list with `mcp:` and the name that its server had when the tool was made.
    pub tags: Option<String>,
    /// JSON, an object: `mcp.server_id` is the server that registered it last.
    #[sqlx(rename = "metadata_")]
    pub metadata: Option<String>,
    created_at: Option<String>,
}

/// A row of `mcp_tools`: a server that listed the tool; it may be another's by now.
#[derive(FromRow)]
pub struct LettaMapping {
    #[sqlx(rename = "mcp_server_id")]
    pub server_id: String,
    pub tool_id: String,
    created_at: Option<String>,
}

/// A row of `mcp_oauth`.
#[derive(FromRow)]
pub struct LettaSignIn {
    /// `None` when it was begun before its server was registered.
    pub server_id: Option<String>,
    pub server_url: String,
    pub organization_id: String,
    pub user_id: Option<String>,
    /// `pending`, `authorized` or `error`.
    pub status: String,
    pub access_token: Option<String>,
    pub access_token_enc: Option<String>,
    pub refresh_token: Option<String>,
    pub refresh_token_enc: Option<String>,
    pub client_id: Option<String>,
    pub client_secret: Option<String>,
    pub client_secret_enc: Option<String>,
    pub redirect_uri: Option<String>,
    pub scope: Option<String>,
    expires_at: Option<String>,
    updated_at: Option<String>,
}

impl LettaSignIn {
    /// `None`: Letta was not told.
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        time(&self.expires_at)
    }

    pub fn updated_at(&self) -> Option<DateTime<Utc>> {
        time(&self.updated_at)
    }
}

#[derive(FromRow)]
pub struct LettaOrganization {
    pub id: String,
    pub name: Option<String>,
}

/// SQLite has times without a zone; they are UTC.
fn time(text: &Option<String>) -> Option<DateTime<Utc>> {
    let text = text.as_deref()?;
    let zoned = DateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f%#z").map(|time| time.to_utc());
    zoned.or_else(|_| NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f").map(|time| time.and_utc())).ok()
}

/// Why there is nothing to take over; each message is one sentence for the person who asks for it.
#[derive(Debug, thiserror::Error)]
pub enum LettaError {
    #[error("The Letta database is given as postgres://… or sqlite:FILE.")]
    Scheme,
    #[error("The URL of the Letta database cannot be read: {0}.")]
    Url(String),
    #[error("Cannot read {place}: {reason}.")]
    Unreadable { place: String, reason: String },
    #[error("Somebody writes to {0}; stop Letta, then try again.")]
    Busy(String),
    #[error("There is nothing in {0}: no Letta has used it.")]
    Empty(String),
    #[error("There are no MCP servers of a Letta in {place}{}.", within(.schema))]
    Foreign { place: String, schema: Option<String> },
    #[error("{place} holds more than one Letta, in the schemas {}; choose with --schema.", listed(.schemas))]
    Several { place: String, schemas: Vec<String> },
    #[error(
        "{place} is of a version of Letta that is not known here ({version}): known are 0.13 to 0.16.8; --any-version reads \
         it all the same."
    )]
    Version { place: String, version: String },
    #[error("{place} is of no version of Letta that can be read: its table {table} has no {column}.")]
    Column { place: String, table: &'static str, column: &'static str },
}

fn listed(schemas: &[String]) -> String {
    schemas.iter().map(|schema| schema.escape_debug().to_string()).collect::<Vec<_>>().join(" and ")
}

fn within(schema: &Option<String>) -> String {
    schema.as_ref().map(|schema| format!(", schema {schema:?}")).unwrap_or_default()
}

/// Where Letta's rows are.
pub struct LettaDatabase {
    at: At,
    place: String,
}

enum At {
    Postgres(Box<PgConnectOptions>),
    Sqlite(PathBuf),
}

impl LettaDatabase {
    /// Understands the URL of a database as Letta's own settings spell it, too: `postgresql+asyncpg://…`.
    ///
    /// # Errors
    /// [`LettaError::Scheme`], [`LettaError::Url`].
    pub fn new(url: &str) -> Result<Self, LettaError> {
        let (scheme, rest) = url.split_once(':').ok_or(LettaError::Scheme)?;
        let at = match scheme.split('+').next() {
            Some("postgres" | "postgresql") => {
                let options = PgConnectOptions::from_str(&format!("postgres:{rest}"));
                let options = options.map_err(|error| LettaError::Url(one_line(&error)))?;
                At::Postgres(Box::new(options))
            }
            Some("sqlite") => At::Sqlite(super::sqlite_file(&format!("sqlite:{rest}")).ok_or(LettaError::Scheme)?),
            _ => return Err(LettaError::Scheme),
        };
        let place = match &at {
            At::Postgres(options) => format!(
                "the PostgreSQL database {:?} at {}:{}",
                options.get_database().unwrap_or("(default)"),
                options.get_host(),
                options.get_port()
            ),
            At::Sqlite(file) => format!("the SQLite file {}", file.display()),
        };
        Ok(Self { at, place })
    }

    /// Kind and place, no credentials.
    pub fn describe(&self) -> &str {
        &self.place
    }

    /// Whether these settings of Portolan mean the same database: its tables would come among Letta's.
    pub fn is(&self, url: Option<&str>, data_dir: &Path) -> bool {
        match &self.at {
            At::Postgres(options) => url.and_then(|url| PgConnectOptions::from_str(url).ok()).is_some_and(|ours| {
                let place = |of: &PgConnectOptions| {
                    (of.get_host().to_owned(), of.get_port(), of.get_database().map(str::to_owned))
                };
                place(&ours) == place(options)
            }),
            At::Sqlite(file) => {
                let ours = match url {
                    Some(url) => super::sqlite_file(url),
                    None => Some(data_dir.join("portolan.db")),
                };
                let real = |file: &Path| file.canonicalize().ok();
                ours.is_some_and(|ours| real(&ours).is_some() && real(&ours) == real(file))
            }
        }
    }

    /// Whether the database of these settings of Portolan has the servers of a Letta, in any schema, however either is
    /// spelled. Nothing is written; one that is not there yet has none.
    ///
    /// # Errors
    /// [`LettaError::Unreadable`].
    pub async fn is_at(url: Option<&str>, data_dir: &Path) -> Result<bool, LettaError> {
        let target = match url {
            Some(url) => Self::new(url)?,
            None => Self::of_file(data_dir.join("portolan.db")),
        };
        let looking = async {
            let mut source = match &target.at {
                At::Postgres(_) => target.open().await?,
                At::Sqlite(file) if fs::metadata(file).map_or(0, |metadata| metadata.len()) == 0 => return Ok(false),
                // Not as one that nobody changes: a Portolan may be at work on it.
                At::Sqlite(file) => {
                    let options =
                        SqliteConnectOptions::new().filename(file).read_only(true).disable_statement_logging();
                    let connection = SqliteConnection::connect_with(&options).await;
                    let connection = connection.map_err(|error| target.unreadable(one_line(&error)))?;
                    Source { connection: Connected::Sqlite(connection), copy: None }
                }
            };
            let schemas = source.schemas().await.map_err(|error| target.unreadable(one_line(&error)));
            source.close().await;
            let is_lettas = |tables: &Columns| {
                let columns = tables.get(SERVERS.name);
                columns.is_some_and(|columns| SERVERS.needed.iter().all(|column| columns.contains(*column)))
            };
            Ok(schemas?.values().any(is_lettas))
        };
        let late = || target.unreadable(format!("it takes more than {} s", READ_TIMEOUT.as_secs()));
        timeout(READ_TIMEOUT, looking).await.map_err(|_| late())?
    }

    fn of_file(file: PathBuf) -> Self {
        Self { place: format!("the SQLite file {}", file.display()), at: At::Sqlite(file) }
    }

    /// Reads all that there is, as one moment has it; of the schema, if it is given (PostgreSQL). A version that is not known
    /// is read with `any_version` alone.
    pub async fn read(&self, schema: Option<&str>, any_version: bool) -> Result<LettaRows, LettaError> {
        let reading = async {
            let mut source = self.open().await?;
            let rows = source.read(&self.place, schema, any_version).await;
            // Nothing was written: how the connection ends changes nothing.
            source.close().await;
            rows
        };
        let late = || self.unreadable(format!("it takes more than {} s", READ_TIMEOUT.as_secs()));
        timeout(READ_TIMEOUT, reading).await.map_err(|_| late())?
    }

    fn unreadable(&self, reason: String) -> LettaError {
        LettaError::Unreadable { place: self.place.clone(), reason }
    }

    async fn open(&self) -> Result<Source, LettaError> {
        let unreadable = |error: sqlx::Error| self.unreadable(one_line(&error));
        let connection = match &self.at {
            At::Postgres(options) => {
                let options = PgConnectOptions::clone(options)
                    .application_name("portolan migrate-letta")
                    .disable_statement_logging();
                let connected = timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&options)).await;
                let late = |_| self.unreadable(format!("it did not answer within {} s", CONNECT_TIMEOUT.as_secs()));
                let mut connection = connected.map_err(late)?.map_err(unreadable)?;
                // In the transaction rather than in the options of the connection: poolers refuse those.
                const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL TIME ZONE 'UTC'; \
                                     SET LOCAL datestyle = 'ISO'";
                sqlx::raw_sql(BEGIN).execute(&mut connection).await.map_err(unreadable)?;
                Connected::Postgres(connection)
            }
            At::Sqlite(file) => return self.open_file(file).await,
        };
        Ok(Source { connection, copy: None })
    }

    async fn open_file(&self, file: &Path) -> Result<Source, LettaError> {
        let unreadable = |error: std::io::Error| self.unreadable(one_line(&error));
        let metadata = fs::metadata(file).map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(self.unreadable("it is not a file".to_owned()));
        }
        if metadata.len() == 0 {
            return Err(LettaError::Empty(self.place.clone()));
        }
        let has_journal = JOURNALS.iter().any(|suffix| fs::metadata(beside(file, suffix)).is_ok_and(|of| of.len() > 0));
        let options = SqliteConnectOptions::new().create_if_missing(false).disable_statement_logging();
        let (options, copy) = if has_journal {
            let copy = Copy::of(file).map_err(unreadable)?.ok_or_else(|| LettaError::Busy(self.place.clone()))?;
            (options.filename(copy.0.join(COPY)), Some(copy))
        } else {
            (options.filename(file).read_only(true).immutable(true), None)
        };
        let connection = SqliteConnection::connect_with(&options).await;
        let connection = connection.map_err(|error| self.unreadable(one_line(&error)))?;
        Ok(Source { connection: Connected::Sqlite(connection), copy })
    }
}

/// What SQLite keeps beside a file that it has not done with.
const JOURNALS: [&str; 2] = ["-wal", "-journal"];
const COPY: &str = "letta.db";

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// A folder of our own with copies of a database and its journals; removed in the end.
struct Copy(PathBuf);

impl Copy {
    /// `None` when somebody wrote to the file meanwhile.
    fn of(file: &Path) -> std::io::Result<Option<Self>> {
        let folder = std::env::temp_dir().join(format!("portolan-{}", Uuid::new_v4()));
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&folder)?;
        let copy = Self(folder);
        let before = state(file);
        for suffix in [""].into_iter().chain(JOURNALS) {
            match fs::copy(beside(file, suffix), copy.0.join(format!("{COPY}{suffix}"))) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && !suffix.is_empty() => {}
                copied => drop(copied?),
            }
        }
        Ok((state(file) == before).then_some(copy))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, "a copy of the Letta database was left in the folder for temporary files");
        }
    }
}

fn state(file: &Path) -> Vec<Option<(u64, SystemTime)>> {
    let state = |suffix| fs::metadata(beside(file, suffix)).and_then(|of| Ok((of.len(), of.modified()?))).ok();
    [""].into_iter().chain(JOURNALS).map(state).collect()
}

struct Source {
    connection: Connected,
    /// Lives as long as it is read.
    copy: Option<Copy>,
}

enum Connected {
    Postgres(PgConnection),
    Sqlite(SqliteConnection),
}

/// A row of the one database or the other.
trait Row: for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin {}
impl<R: for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin> Row for R {}

struct Table {
    name: &'static str,
    needed: &'static [&'static str],
    further: &'static [&'static str],
    /// Which of its rows.
    only: &'static str,
}

/// The columns of each table of one schema.
type Columns = BTreeMap<String, BTreeSet<String>>;

impl Source {
    async fn close(self) {
        let _ = match self.connection {
            Connected::Postgres(connection) => connection.close().await,
            Connected::Sqlite(connection) => connection.close().await,
        };
        drop(self.copy);
    }

    async fn rows<R: Row>(&mut self, sql: String) -> sqlx::Result<Vec<R>> {
        let sql = AssertSqlSafe(sql);
        match &mut self.connection {
            Connected::Postgres(connection) => sqlx::query_as(sql).fetch_all(connection).await,
            Connected::Sqlite(connection) => sqlx::query_as(sql).fetch_all(connection).await,
        }
    }

    async fn read(&mut self, place: &str, schema: Option<&str>, any_version: bool) -> Result<LettaRows, LettaError> {
        let unreadable =
            |error: sqlx::Error| LettaError::Unreadable { place: place.to_owned(), reason: one_line(&error) };
        let mut schemas = self.schemas().await.map_err(unreadable)?;
        if schemas.is_empty() {
            return Err(LettaError::Empty(place.to_owned()));
        }
        schemas.retain(|name, tables| tables.contains_key(SERVERS.name) && schema.is_none_or(|schema| schema == name));
        if schemas.len() > 1 {
            return Err(LettaError::Several { place: place.to_owned(), schemas: schemas.into_keys().collect() });
        }
        let Some((schema, tables)) = schemas.pop_first() else {
            return Err(LettaError::Foreign { place: place.to_owned(), schema: schema.map(str::to_owned) });
        };
        if tables.contains_key("alembic_version") && !any_version {
            let sql = format!("SELECT CAST(version_num AS TEXT) FROM {}", quoted(&schema, "alembic_version"));
            let versions: Vec<(String,)> = self.rows(sql).await.map_err(unreadable)?;
            let known: BTreeSet<_> = KNOWN_VERSIONS.split_whitespace().collect();
            if let Some((version,)) = versions.into_iter().find(|(version,)| !known.contains(version.as_str())) {
                let version = version.chars().take(64).filter(|c| !c.is_control()).collect();
                return Err(LettaError::Version { place: place.to_owned(), version });
            }
        }
        let mut selects = BTreeMap::new();
        for table in [SERVERS, TOOLS, MAPPINGS, SIGN_INS, ORGANIZATIONS] {
            let Some(columns) = tables.get(table.name) else { continue };
            if let Some(column) = table.needed.iter().find(|column| !columns.contains(**column)) {
                return Err(LettaError::Column { place: place.to_owned(), table: table.name, column });
            }
            selects.insert(table.name, table.select(&schema, columns));
        }
        let mut take = |table: Table| selects.remove(table.name);
        let (servers, tools, mappings) = (take(SERVERS), take(TOOLS), take(MAPPINGS));
        let (sign_ins, organizations) = (take(SIGN_INS), take(ORGANIZATIONS));
        let mut rows = LettaRows {
            servers: self.all(servers).await.map_err(unreadable)?,
            tools: self.all(tools).await.map_err(unreadable)?,
            mappings: self.all(mappings).await.map_err(unreadable)?,
            sign_ins: self.all(sign_ins).await.map_err(unreadable)?,
            organizations: self.all(organizations).await.map_err(unreadable)?,
            deleted: 0,
        };
        rows.servers.sort_by_cached_key(|row| (row.created_at(), row.id.clone()));
        rows.tools.sort_by_cached_key(|row| (time(&row.created_at), row.id.clone()));
        rows.mappings.sort_by_cached_key(|row| (time(&row.created_at), row.server_id.clone()));
        rows.sign_ins.sort_by_cached_key(|row| row.updated_at());
        if tables[SERVERS.name].contains("is_deleted") {
            let sql = format!("SELECT id FROM {} WHERE is_deleted", quoted(&schema, SERVERS.name));
            let deleted: Vec<(String,)> = self.rows(sql).await.map_err(unreadable)?;
            rows.deleted = deleted.len();
        }
        Ok(rows)
    }

    /// All rows of a table; none of one that is not there.
    async fn all<R: Row>(&mut self, select: Option<String>) -> sqlx::Result<Vec<R>> {
        let Some(sql) = select else { return Ok(vec![]) };
        let rows = self.rows(sql).await?;
        let all = rows.len() <= MAX_ROWS;
        all.then_some(rows).ok_or_else(|| sqlx::Error::Protocol(format!("a table has more than {MAX_ROWS} rows")))
    }

    /// What each schema has of all tables; SQLite has one without a name.
    async fn schemas(&mut self) -> sqlx::Result<BTreeMap<String, Columns>> {
        const POSTGRES: &str = "SELECT CAST(table_schema AS TEXT), CAST(table_name AS TEXT), CAST(column_name AS TEXT) \
                                FROM information_schema.columns \
                                WHERE table_schema NOT IN ('pg_catalog', 'information_schema')";
        const SQLITE: &str = "SELECT '', m.name, p.name FROM sqlite_master m JOIN pragma_table_info(m.name) p \
                              WHERE m.type = 'table'";
        let sql = match self.connection {
            Connected::Postgres(_) => POSTGRES,
            Connected::Sqlite(_) => SQLITE,
        };
        let columns: Vec<(String, String, String)> = self.rows(sql.to_owned()).await?;
        let mut schemas = BTreeMap::<String, Columns>::new();
        for (schema, table, column) in columns {
            schemas.entry(schema).or_default().entry(table).or_default().insert(column);
        }
        Ok(schemas)
    }
}

impl Table {
    /// All as text, in one form whatever the type of the column; NULL for a column that is not there.
    fn select(&self, schema: &str, columns: &BTreeSet<String>) -> String {
        let wanted = self.needed.iter().chain(self.further).map(|column| match columns.contains(*column) {
            true => format!("CAST({column} AS TEXT) AS {column}"),
            false => format!("CAST(NULL AS TEXT) AS {column}"),
        });
        let wanted = wanted.collect::<Vec<_>>().join(", ");
        let kept = if columns.contains("is_deleted") { "NOT is_deleted" } else { "1 = 1" };
        let only = if self.only.is_empty() { String::new() } else { format!(" AND {}", self.only) };
        format!("SELECT {wanted} FROM {} WHERE {kept}{only} LIMIT {}", quoted(schema, self.name), MAX_ROWS + 1)
    }
}

fn quoted(schema: &str, table: &str) -> String {
    match schema {
        "" => format!("\"{table}\""),
        schema => format!("\"{}\".\"{table}\"", schema.replace('"', "\"\"")),
    }
}
