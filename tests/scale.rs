//! Many servers: what a start and a list take does not grow with what is registered, and several Portolans that start at once
//! share what is to be done. The long form, `cargo test -- --ignored`, has a million.

use std::path::Path;
use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};
use portolan::model::{By, Connector, Remote as Upstream};
use portolan::store::{NewServer, Step};
use serde_json::{Value, json};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};

use crate::fake::{self, Fake, Script};
use crate::harness::{Database, Portolan, Remote, eventually, fake_mcp, memory, scripts};
use crate::process::{Program, command};

/// A command; from before its server was known by any program.
const COMMAND: [&str; 2] = ["stays", "goes"];

/// One place where Portolan is started again and again.
struct Place {
    folder: tempfile::TempDir,
    database: Database,
}

/// What a start took.
struct Taken {
    ready: Duration,
    /// Bytes of files on SQLite, rows of `servers` on PostgreSQL.
    read: u64,
    resident: u64,
}

impl Place {
    async fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), database: Database::new().await }
    }

    fn start(&self) -> Program {
        Program::start(command(self.folder.path(), self.database.url().as_deref()))
    }

    async fn sql(&self, sql: String) {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql));
        match self.database.url() {
            Some(url) => sql.execute(&mut PgConnection::connect(&url).await.unwrap()).await.map(drop).unwrap(),
            None => {
                let mut connection = self.file().connect().await.unwrap();
                sql.execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
        }
    }

    fn file(&self) -> SqliteConnectOptions {
        SqliteConnectOptions::new().filename(self.folder.path().join("portolan-data/portolan.db"))
    }

    /// `count` more servers like this one but for their ids and names, each with a configuration of 2 kB and a tool.
    async fn fill(&self, count: usize, pattern: &str) {
        let padding = if self.database.url().is_some() { "repeat('0', 2000)" } else { "hex(zeroblob(1000))" };
        let last = count - 1;
        let number = format!("WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {last})");
        let id = "mcp_server-00000000-0000-4000-8000-' || CAST(100000000000 + i AS TEXT)";
        self.sql(format!(
            "{number} INSERT INTO servers \
             (id, server_name, type, config, revision, era, state, error, last_synced_at, created_at, updated_at) \
             SELECT '{id}, 'server ' || CAST(i AS TEXT), type, config || {padding}, revision, era, 'ready', NULL, \
             updated_at, created_at, updated_at FROM n, servers WHERE servers.id = '{pattern}'; \
             {number} INSERT INTO tools (id, server_id, name, name_digest, position, definition) \
             SELECT 'tool-' || CAST(i AS TEXT), '{id}, 'echo', 'digest', 0, '{{}}' FROM n; ANALYZE;"
        ))
        .await;
    }

    /// Rows of `servers` that were ever read, when nobody is connected any more.
    async fn rows_read(&self) -> u64 {
        const OTHERS: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'portolan'";
        const READ: &str =
            "SELECT (seq_tup_read + idx_tup_fetch)::bigint FROM pg_stat_user_tables WHERE relname = 'servers'";
        let mut connection = PgConnection::connect(&self.database.url().unwrap()).await.unwrap();
        while sqlx::query_scalar::<_, i64>(OTHERS).fetch_one(&mut connection).await.unwrap() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        sqlx::query_scalar::<_, i64>(READ).fetch_one(&mut connection).await.unwrap().try_into().unwrap()
    }

    /// A start at which there is everything to be done that a start does behind its back: one server was never connected
    /// to, and of one that another Portolan has deleted a folder is left.
    async fn measured_start(&self, upstream: &str) -> Taken {
        let program = self.start();
        let remote = Remote::new(&program.url);
        let script = scripts(self.folder.path()).join("script.json");
        let config = json!({"command": fake_mcp(), "args": ["stdio", script]});
        for name in COMMAND {
            remote.create(name, config.clone()).await;
        }
        let new = remote.create("new", json!({ "server_url": upstream })).await["id"].as_str().unwrap().to_owned();
        assert_eq!(homes(self.folder.path()), 2);
        stop(program);
        self.sql(format!(
            "DELETE FROM servers WHERE server_name = 'goes'; \
             UPDATE servers SET state = 'never_connected', last_synced_at = NULL WHERE id = '{new}';"
        ))
        .await;
        let before = if self.database.url().is_some() { self.rows_read().await } else { 0 };

        let began = Instant::now();
        let program = self.start();
        let remote = Remote::new(&program.url);
        remote.send("GET", "/v1/ready", None).await.expect(200);
        let ready = began.elapsed();
        eventually("the folder of the deleted one is removed", || homes(self.folder.path()) == 1).await;
        let path = format!("/v1/mcp-servers/{new}");
        let deadline = Instant::now() + Duration::from_secs(60);
        while remote.send("GET", &path, None).await.expect(200)["status"]["state"] != "ready" {
            assert!(Instant::now() < deadline, "the new server was not connected to");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (resident, bytes) = (memory(program.child.id(), "VmHWM"), bytes_read(program.child.id()));
        stop(program);
        let read = match self.database.url() {
            Some(_) => self.rows_read().await - before,
            None => bytes,
        };
        self.sql("DELETE FROM servers WHERE server_name IN ('new', 'stays');".to_owned()).await;
        Taken { ready, read, resident }
    }
}

fn stop(mut program: Program) {
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
}

/// How many servers have a folder.
fn homes(folder: &Path) -> usize {
    std::fs::read_dir(folder.join("portolan-data/children")).map_or(0, Iterator::count)
}

/// What a process has read of files; 0 where one of another user, or that keeps others out, is not told of.
fn bytes_read(pid: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse().ok()).unwrap_or_default()
}

#[expect(clippy::print_stdout, reason = "the figures are worth to be seen")]
async fn a_start_beside(servers: usize) {
    let place = Place::new().await;
    let upstream = fake::http::serve(Fake::new(Script::default()));
    let program = place.start();
    let pattern = Remote::new(&program.url).create("pattern", json!({ "server_url": upstream.url })).await;
    stop(program);
    let few = place.measured_start(&upstream.url).await;
    place.fill(servers, pattern["id"].as_str().unwrap()).await;
    let many = place.measured_start(&upstream.url).await;
    for (beside, Taken { ready, read, resident }) in [(1, &few), (servers, &many)] {
        println!("a start beside {beside} servers: ready after {ready:?}, {read} read, {resident} bytes resident");
    }
    // One in a hundred of what there is would be too much.
    let all = if place.database.url().is_some() { servers } else { servers * 2_000 } as u64;
    let more = many.read.saturating_sub(few.read);
    let allowed = if place.database.url().is_some() { 50 } else { 512 * 1024 };
    assert!(more < allowed && allowed < all / 5, "{more} of {all} more were read");
    assert!(many.resident < few.resident + 16 * 1024 * 1024, "{} instead of {} bytes", many.resident, few.resident);
    place.database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_does_not_read_all_servers() {
    a_start_beside(2_000).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes and gigabytes"]
async fn a_start_does_not_read_a_million_servers() {
    a_start_beside(1_000_000).await;
}

/// Servers at this address, as an import adds them.
async fn add(portolan: &Portolan, url: &str, count: i64) -> Vec<String> {
    let began = Utc::now();
    let new = |number| {
        let id = format!("mcp_server-{}", uuid::Uuid::new_v4());
        let connector = Connector::StreamableHttp(Upstream {
            server_url: url.to_owned(),
            auth_header: None,
            auth_token: None,
            custom_headers: None,
            oauth: None,
        });
        // Not in the order of their ids.
        let created_at = Some(began - TimeDelta::seconds(count - number));
        NewServer { id, server_name: format!("new {number}"), connector, created_at, tools: vec![], sign_in: None }
    };
    let steps: Vec<_> = (0..count).map(|number| Step::Add(Box::new(new(number)))).collect();
    portolan.app.store.change_servers(&steps, &By::ITSELF, |_| {}).await.unwrap();
    let ids = steps.into_iter().map(|step| match step {
        Step::Add(server) => server.id,
        _ => unreachable!("all are added"),
    });
    ids.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_many_is_whole_and_in_order() {
    let portolan = Portolan::start().await;
    for count in [499, 1, 500, 41] {
        // Older ones come before those that are there.
        add_named(&portolan, count).await;
        let listed = portolan.get("/v1/mcp-servers/").await.expect(200);
        let listed: Vec<_> =
            listed.as_array().unwrap().iter().map(|server| server["created_at"].as_str().unwrap()).collect();
        let stored = portolan.app.store.servers().await.unwrap();
        assert_eq!(listed.len(), stored.len());
        assert!(listed.is_sorted());
    }
    portolan.stop().await;
}

async fn add_named(portolan: &Portolan, count: usize) {
    let ids = add(portolan, "http://127.0.0.1:9/mcp", count as i64).await;
    // The next ones may have the same names.
    for id in &ids {
        let answer = portolan.patch(&format!("/v1/mcp-servers/{id}"), &json!({ "server_name": id })).await;
        answer.expect(200);
    }
}

/// A million servers are too many for each of the replicas that start at once to connect to all of them.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_at_once_share_the_servers_that_came_before() {
    const NEW: usize = 60;
    let portolan = Portolan::start().await;
    let upstream = fake::http::serve(Fake::new(Script::default()));
    let ids = add(&portolan, &upstream.url, NEW as i64).await;
    let replicas: [_; 2] = tokio::join!(portolan.replica(|_| {}), portolan.replica(|_| {})).into();
    // SQLite has one process, which is started again.
    let portolan = if portolan.shares_its_database() { portolan } else { portolan.reopen(|_| {}).await };
    let deadline = Instant::now() + Duration::from_secs(60);
    for id in ids {
        while state(&portolan, &id).await != "ready" {
            assert!(Instant::now() < deadline, "{id} was not connected to");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    for replica in replicas.into_iter().flatten() {
        replica.stop().await;
    }
    let listed = upstream.requests().iter().filter(|request| request.rpc() == "tools/list").count();
    // Some may be met by two at the same moment.
    assert!((NEW..NEW * 3 / 2).contains(&listed), "{NEW} servers were listed {listed} times");
    portolan.stop().await;
}

async fn state(portolan: &Portolan, id: &str) -> Value {
    portolan.get(&format!("/v1/mcp-servers/{id}")).await.expect(200)["status"]["state"].take()
}
