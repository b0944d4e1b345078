//! The schema: what older versions left is taken over whole, whoever dies on the way, by one of those that start at once; what a
//! newer version left is refused.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use portolan::model::{By, Connector, Offered, Run, RunContent, RunOutcome, SignIn};
use portolan::store::{KeySource, NewServer, RUNS_AT_ONCE, Step, Store, now, run_id};
use serde_json::{Value, json};
use sqlx::migrate::Migrator;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, SqliteConnection};
use tempfile::TempDir;

use crate::harness::{Database, KEY, Remote};
use crate::process::{Program, command};

/// Nobody listens there.
const DEAD: &str = "http://127.0.0.1:9/mcp";
/// How long a start may take that takes over what there is, on a slow machine.
const START: Duration = Duration::from_secs(120);

fn connector(number: usize) -> Value {
    json!({
        "type": "streamable_http", "server_url": DEAD, "auth_header": null, "auth_token": format!("token-{number}"),
        "custom_headers": null,
    })
}

/// A database in a folder of its own, at some schema.
struct Place {
    folder: TempDir,
    database: Database,
}

/// One connection, of the one kind or the other.
macro_rules! on {
    ($place:expr, $connection:ident => $body:expr) => {
        match $place.database.url() {
            Some(url) => {
                let mut $connection = PgConnection::connect(&url).await.unwrap();
                let done = $body;
                $connection.close().await.unwrap();
                done
            }
            None => {
                let url = format!("sqlite:{}?mode=rwc", $place.file().display());
                let mut $connection = SqliteConnection::connect(&url).await.unwrap();
                let done = $body;
                $connection.close().await.unwrap();
                done
            }
        }
    };
}

impl Place {
    async fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap(), database: Database::new().await };
        std::fs::create_dir(place.data()).unwrap();
        std::fs::set_permissions(place.data(), PermissionsExt::from_mode(0o700)).unwrap();
        place
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("portolan-data")
    }

    fn file(&self) -> PathBuf {
        self.data().join("portolan.db")
    }

    fn migrator(&self) -> Migrator {
        if self.database.url().is_some() {
            sqlx::migrate!("migrations/postgres")
        } else {
            sqlx::migrate!("migrations/sqlite")
        }
    }

    fn newest(&self) -> i64 {
        self.migrator().iter().map(|migration| migration.version).max().unwrap()
    }

    fn command(&self) -> Command {
        let mut command = command(self.folder.path(), self.database.url().as_deref());
        command.env("PORTOLAN_KEY", KEY);
        command
    }

    async fn count(&self, table: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM {table}");
        on!(self, connection => sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap())
    }

    /// The tables with what is stored, and how many rows each has.
    async fn counts(&self) -> Vec<(String, i64)> {
        let tables: Vec<String> = match self.database.url() {
            Some(url) => {
                const SQL: &str = "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public' ORDER BY 1";
                let mut connection = PgConnection::connect(&url).await.unwrap();
                sqlx::query_scalar(SQL).fetch_all(&mut connection).await.unwrap()
            }
            None => {
                const SQL: &str = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1";
                let url = format!("sqlite:{}?mode=rwc", self.file().display());
                let mut connection = SqliteConnection::connect(&url).await.unwrap();
                sqlx::query_scalar(SQL).fetch_all(&mut connection).await.unwrap()
            }
        };
        let mut counts = Vec::new();
        for table in tables.into_iter().filter(|table| !table.starts_with("_sqlx") && !table.starts_with("sqlite_")) {
            let count = self.count(&table).await;
            counts.push((table, count));
        }
        counts
    }

    /// A database at the newest schema with `rows` servers, each with a tool, a sign-in and a run.
    async fn filled(rows: usize) -> Self {
        let place = Self::new().await;
        let key = KeySource::new(Some(KEY.to_owned().into()), None).unwrap();
        let store = Store::open(place.database.url().as_deref(), &place.data(), 4, key).await.unwrap();
        let definition = r#"{"name":"echo","inputSchema":{"type":"object"}}"#;
        let sign_in = json!({
            "server_url": DEAD, "issuer": null, "client_id": "portolan", "client_secret": null, "redirect_uri": null,
            "access_token": "access", "refresh_token": null, "scope": null, "expires_at": null,
        });
        let sign_in: SignIn = serde_json::from_value(sign_in).unwrap();
        let (mut steps, mut runs) = (Vec::new(), Vec::new());
        for number in 0..rows {
            let id = format!("mcp_server-{}", uuid::Uuid::new_v4());
            let tool_id = format!("tool-{}", uuid::Uuid::new_v4());
            let offered = Offered { name: "echo".to_owned(), definition: definition.to_owned() };
            let connector: Connector = serde_json::from_value(connector(number)).unwrap();
            let content = RunContent {
                args: json!({ "number": number }).to_string(),
                args_cut: false,
                result: Some("done".to_owned()),
                result_cut: false,
            };
            let started_at = chrono::SubsecRound::trunc_subsecs(now(), 3);
            runs.push(Run {
                id: run_id(started_at),
                started_at,
                duration_ms: 1,
                caller: None,
                mcp_server_id: id.clone(),
                server_name: format!("server-{number}"),
                tool_id: tool_id.clone(),
                tool_name: "echo".to_owned(),
                outcome: RunOutcome::Success,
                error_code: None,
                args_bytes: 1,
                result_bytes: 4,
                content: Some(content),
            });
            steps.push(Step::Add(Box::new(NewServer {
                id,
                server_name: format!("server-{number}"),
                connector,
                created_at: None,
                tools: vec![(tool_id, offered)],
                sign_in: Some(sign_in.clone()),
            })));
        }
        store.change_servers(&steps, &By::IMPORT, |_| {}).await.unwrap();
        for runs in runs.chunks(RUNS_AT_ONCE) {
            store.add_runs(runs).await.unwrap();
        }
        store.close().await;
        // No start has anything to do at them.
        let settled = "UPDATE servers SET state = 'ready', last_synced_at = created_at";
        on!(place, connection => connection.execute(settled).await.map(|_| ()).unwrap());
        place
    }

    /// A database at an earlier schema with as much of `full` as that has room for; at the first one in clear.
    async fn earlier(full: &Self, schema: i64) -> Self {
        let place = Self::new().await;
        match (full.database.url(), place.database.url()) {
            (Some(full), Some(old)) => {
                let mut from = PgConnection::connect(&full).await.unwrap();
                let mut to = PgConnection::connect(&old).await.unwrap();
                place.migrator().run_to(schema, &mut to).await.unwrap();
                to.execute("SET session_replication_role = replica").await.unwrap();
                for (table, _) in place.counts().await {
                    let read = format!("SELECT coalesce(jsonb_agg(to_jsonb(t)), '[]')::text FROM {table} t");
                    let rows: String = sqlx::query_scalar(AssertSqlSafe(read)).fetch_one(&mut from).await.unwrap();
                    let write =
                        format!("INSERT INTO {table} SELECT * FROM jsonb_populate_recordset(NULL::{table}, $1::jsonb)");
                    sqlx::query(AssertSqlSafe(write)).bind(rows).execute(&mut to).await.unwrap();
                }
                if place.counts().await.iter().any(|(table, _)| table == "changes") {
                    const SEQUENCE: &str =
                        "SELECT setval(pg_get_serial_sequence('changes', 'id'), (SELECT max(id) FROM changes))";
                    to.execute(SEQUENCE).await.unwrap();
                }
                from.close().await.unwrap();
                to.close().await.unwrap();
            }
            _ => {
                const COLUMNS: &str = "SELECT group_concat(name) FROM pragma_table_info($1)";
                let url = format!("sqlite:{}?mode=rwc", place.file().display());
                let mut to = SqliteConnection::connect(&url).await.unwrap();
                to.execute("PRAGMA journal_mode = WAL").await.unwrap();
                place.migrator().run_to(schema, &mut to).await.unwrap();
                to.execute("PRAGMA foreign_keys = OFF").await.unwrap();
                let attach = format!("ATTACH '{}' AS whole", full.file().display());
                to.execute(AssertSqlSafe(attach)).await.unwrap();
                for (table, _) in place.counts().await {
                    let columns: String = sqlx::query_scalar(COLUMNS).bind(&table).fetch_one(&mut to).await.unwrap();
                    let copy = format!("INSERT INTO {table} ({columns}) SELECT {columns} FROM whole.{table}");
                    to.execute(AssertSqlSafe(copy)).await.unwrap();
                }
                to.close().await.unwrap();
            }
        }
        if schema == 1 {
            const CLEAR: &str = "UPDATE servers SET config = $2 WHERE server_name = $1";
            let rows = place.count("servers").await as usize;
            on!(place, connection => {
                let mut transaction = connection.begin().await.unwrap();
                for number in 0..rows {
                    let clear = sqlx::query(CLEAR).bind(format!("server-{number}")).bind(connector(number).to_string());
                    clear.execute(&mut *transaction).await.unwrap();
                }
                transaction.commit().await.unwrap();
            });
        }
        place
    }

    /// The same once more.
    async fn copy(&self) -> Self {
        let place = Self::new().await;
        match (self.database.url(), place.database.url()) {
            (Some(from), Some(to)) => {
                let name = |url: &str| url.rsplit('/').next().unwrap().to_owned();
                let server = std::env::var("PORTOLAN_TEST_POSTGRES_URL").unwrap();
                let mut connection = PgConnection::connect(&server).await.unwrap();
                for sql in [
                    format!("DROP DATABASE {}", name(&to)),
                    format!("CREATE DATABASE {} TEMPLATE {}", name(&to), name(&from)),
                ] {
                    connection.execute(AssertSqlSafe(sql)).await.unwrap();
                }
                connection.close().await.unwrap();
            }
            _ => {
                std::fs::copy(self.file(), place.file()).unwrap();
            }
        }
        place
    }

    /// Starts the program, and holds all that it shows against what was there.
    async fn check(&self, rows: usize, before: &[(String, i64)]) {
        let began = Instant::now();
        let mut program = Program::start(self.command());
        assert!(began.elapsed() < START, "{:?}", began.elapsed());
        let remote = Remote::new(&program.url);
        let list = remote.send("GET", "/v1/mcp-servers/?reveal=true", None).await.expect(200);
        let list = list.as_array().unwrap();
        assert_eq!(list.len(), rows);
        for server in list {
            let number = server["server_name"].as_str().unwrap().strip_prefix("server-").unwrap();
            assert_eq!(server["auth_token"], format!("token-{number}"), "{server}");
        }
        let id = list[rows / 2]["id"].as_str().unwrap();
        let tools = remote.send("GET", &format!("/v1/mcp-servers/{id}/tools"), None).await.expect(200);
        assert_eq!(tools.as_array().unwrap().len(), 1);
        let has = |table: &str| before.iter().any(|(name, _)| name == table);
        let runs = remote.send("GET", "/v1/portolan/runs?limit=1", None).await.expect(200);
        if has("runs") {
            assert_eq!(runs["runs"][0]["result"], "done", "{runs}");
        }
        let changes = remote.send("GET", "/v1/portolan/changes?limit=1", None).await.expect(200);
        assert_eq!(changes["changes"].as_array().unwrap().len(), usize::from(has("changes")), "{changes}");
        // What there is can be changed.
        let path = format!("/v1/mcp-servers/{id}");
        remote.send("PATCH", &path, Some(&json!({ "server_name": "renamed" }))).await.expect(200);
        program.signal("-TERM");
        assert_eq!(program.exit_code(), Some(0));
        let after = self.counts().await;
        // The start itself writes to these.
        let is_kept = |table: &str| !matches!(table, "changes" | "replicas");
        for (table, count) in before.iter().filter(|(table, _)| is_kept(table)) {
            assert!(after.contains(&(table.clone(), *count)), "{table}: {after:?}");
        }
        assert_eq!(self.count("_sqlx_migrations").await, self.migrator().iter().count() as i64);
    }
}

/// Every earlier schema, each with so many rows.
async fn upgrade(rows: usize) {
    let full = Place::filled(rows).await;
    for schema in 1..full.newest() {
        let old = Place::earlier(&full, schema).await;
        let before = old.counts().await;
        assert!(before.iter().any(|(table, count)| table == "servers" && *count == rows as i64), "{before:?}");
        old.check(rows, &before).await;
        old.database.remove().await;
    }
    full.database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_every_earlier_version_left_is_taken_over() {
    upgrade(60).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: 10,000 rows at each earlier schema"]
async fn ten_thousand_rows_of_every_earlier_version_are_taken_over() {
    upgrade(10_000).await;
}

/// A look from outside at whether somebody changes the schema, by the lock that is held meanwhile.
enum Watch {
    Postgres(PgConnection),
    Sqlite(SqliteConnection),
}

impl Watch {
    async fn new(place: &Place) -> Self {
        match place.database.url() {
            Some(url) => Self::Postgres(PgConnection::connect(&url).await.unwrap()),
            None => {
                let options = SqliteConnectOptions::new().filename(place.file()).busy_timeout(Duration::ZERO);
                Self::Sqlite(SqliteConnection::connect_with(&options).await.unwrap())
            }
        }
    }

    async fn is_held(&mut self) -> bool {
        match self {
            // Portolan has no other one of this kind.
            Self::Postgres(connection) => {
                const HELD: &str = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND \
                                    database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
                sqlx::query_scalar(HELD).fetch_one(connection).await.unwrap()
            }
            // Any write holds it; whether it was this one shows what is there afterwards.
            Self::Sqlite(connection) => match connection.begin_with("BEGIN IMMEDIATE").await {
                Ok(transaction) => {
                    transaction.rollback().await.unwrap();
                    false
                }
                Err(_) => true,
            },
        }
    }

    /// Waits until it is held, or not; gives up after `longest`.
    async fn until(&mut self, held: bool, longest: Duration) {
        let began = Instant::now();
        while self.is_held().await != held && began.elapsed() < longest {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// How long a start takes, and how long of that the lock is held.
    async fn time(&mut self, command: Command) -> (Duration, Duration) {
        let began = Instant::now();
        let start = tokio::task::spawn_blocking(move || Program::start(command));
        let (mut since, mut time) = (None, Duration::ZERO);
        while !start.is_finished() {
            match (self.is_held().await, since) {
                (true, None) => since = Some(Instant::now()),
                (false, Some(since)) if time.is_zero() => time = since.elapsed(),
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
        drop(start.await.unwrap());
        (began.elapsed(), time)
    }
}

/// Kills starts at random moments while they change the schema, so many at each of these schemas; how many of them were at it,
/// for each.
async fn kill(rows: usize, kills: usize, schemas: impl Fn(i64) -> Vec<i64>) -> Vec<(i64, usize)> {
    let full = Place::filled(rows).await;
    let mut met = Vec::new();
    for schema in schemas(full.newest()) {
        let old = Place::earlier(&full, schema).await;
        let before = old.counts().await;
        let whole = old.copy().await;
        let (start, change) = Watch::new(&whole).await.time(whole.command()).await;
        whole.database.remove().await;
        let mut inside = 0;
        for _ in 0..kills {
            let place = old.copy().await;
            let mut watch = Watch::new(&place).await;
            let mut started = place.command().stdout(Stdio::null()).spawn().unwrap();
            watch.until(true, start).await;
            let moment = uuid::Uuid::new_v4().as_u128() % (change.as_micros() * 3 / 4).max(1);
            tokio::time::sleep(Duration::from_micros(moment as u64)).await;
            let is_held = watch.is_held().await;
            started.kill().unwrap();
            started.wait().unwrap();
            // PostgreSQL notices in its own time.
            watch.until(false, START).await;
            drop(watch);
            inside += usize::from(is_held && place.count("_sqlx_migrations").await == schema);
            place.check(rows, &before).await;
            place.database.remove().await;
        }
        met.push((schema, inside));
        old.database.remove().await;
    }
    full.database.remove().await;
    met
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_killed_while_it_takes_over_leaves_nothing_half_done() {
    let met = kill(300, 4, |_| vec![1]).await;
    assert!(met[0].1 >= 1, "this has shown nothing: {met:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: 20 kills at each earlier schema, with 10,000 rows at the first one"]
async fn twenty_starts_that_are_killed_while_they_take_over_leave_nothing_half_done() {
    let first = kill(10_000, 20, |_| vec![1]).await;
    assert!(first[0].1 >= 10, "{first:?}");
    // Most of the later changes take no longer than a look at the lock.
    let later = kill(1_000, 20, |newest| (2..newest).collect()).await;
    let inside: usize = first.iter().chain(&later).map(|(_, inside)| inside).sum();
    assert!(inside >= 20, "{first:?} {later:?}");
}

/// Starts eight programs on the same database at once.
async fn start_eight(place: &Place) -> Vec<Program> {
    let starts: Vec<_> = (0..8)
        .map(|_| {
            let command = place.command();
            tokio::task::spawn_blocking(move || Program::start(command))
        })
        .collect();
    let mut programs = Vec::new();
    for start in starts {
        programs.push(start.await.expect("it starts"));
    }
    programs
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_eight_that_start_at_once_one_makes_the_schema_and_all_serve() {
    let place = Place::new().await;
    let programs = start_eight(&place).await;
    let remotes: Vec<_> = programs.iter().map(|program| Remote::new(&program.url)).collect();
    remotes[0].create("seen", json!({ "server_url": DEAD })).await;
    for remote in &remotes {
        remote.send("GET", "/v1/ready", None).await.expect(200);
        let list = remote.send("GET", "/v1/mcp-servers/", None).await.expect(200);
        assert_eq!(list[0]["server_name"], "seen");
    }
    assert_eq!(place.count("_sqlx_migrations").await, place.migrator().iter().count() as i64);
    assert_eq!(place.count("sealing_keys").await, 1);
    drop(programs);
    place.database.remove().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_eight_that_start_at_once_on_the_first_schema_one_takes_it_over() {
    let full = Place::filled(200).await;
    let old = Place::earlier(&full, 1).await;
    let programs = start_eight(&old).await;
    for program in &programs {
        let list = Remote::new(&program.url).send("GET", "/v1/mcp-servers/?reveal=true", None).await.expect(200);
        let tokens = list.as_array().unwrap().iter().filter(|server| server["auth_token"].is_string());
        assert_eq!(tokens.count(), 200);
    }
    assert_eq!(old.count("sealing_keys").await, 1);
    drop(programs);
    for place in [full, old] {
        place.database.remove().await;
    }
}

/// Standard error of a start that is refused.
fn refusal(place: &Place) -> String {
    let output = place.command().stderr(Stdio::piped()).output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    String::from_utf8(output.stderr).unwrap()
}

fn bytes(file: &Path) -> Vec<u8> {
    std::fs::read(file).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_and_one_that_was_changed_are_refused_before_anything_is_written() {
    const INSERT: &str = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
                          SELECT 9999, description, success, checksum, 0 FROM _sqlx_migrations WHERE version = 1";
    const DELETE: &str = "DELETE FROM _sqlx_migrations WHERE version = 9999";
    let full = Place::filled(3).await;
    for schema in [2, full.newest()] {
        let old = Place::earlier(&full, schema).await;
        let before = old.counts().await;
        let tables = before.len();
        on!(old, connection => connection.execute(INSERT).await.map(|_| ()).unwrap());
        let file = old.database.url().is_none().then(|| bytes(&old.file()));
        let said = refusal(&old);
        assert!(said.contains("it is at schema 9999, and this version knows none after"), "{said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert_eq!(file, old.database.url().is_none().then(|| bytes(&old.file())), "nothing was written");
        on!(old, connection => connection.execute(DELETE).await.map(|_| ()).unwrap());

        let change = "UPDATE _sqlx_migrations SET checksum = \
                      (SELECT checksum FROM _sqlx_migrations WHERE version = 1) WHERE version = 2";
        on!(old, connection => connection.execute(change).await.map(|_| ()).unwrap());
        let said = refusal(&old);
        assert!(said.contains("its schema 2 is not the one of this version"), "{said}");
        assert_eq!(old.counts().await.len(), tables, "nothing was made");
        let right = old.migrator().iter().find(|migration| migration.version == 2).unwrap().checksum.to_vec();
        on!(old, connection => {
            let restore = sqlx::query("UPDATE _sqlx_migrations SET checksum = $1 WHERE version = 2").bind(&right);
            restore.execute(&mut connection).await.map(|_| ()).unwrap();
        });
        old.check(3, &before).await;
        old.database.remove().await;
    }
    full.database.remove().await;
}
