//! The database is away, full or locked: every request is answered in time, nothing that was answered with success is lost,
//! and all goes on by itself when it is back.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use portolan::config::Settings;
use portolan::store::Database as Pools;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, SqliteConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::fake::{self, Fake, Script};
use crate::harness::{Answer, PATIENCE, Portolan, patiently};

/// Nobody listens there.
const DEAD: &str = "http://127.0.0.1:9/mcp";
/// A request is answered within 5 s; twice that on a machine that is busy with other tests, and still less than any of the
/// waits that there would be otherwise, one after the other.
const IN_TIME: Duration = Duration::from_secs(10);

/// What becomes of connections to PostgreSQL.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Link {
    Through,
    /// New ones are taken, and nothing goes through any of them.
    Silent,
    /// All are cut, and nobody listens.
    Gone,
    /// Those that are there go on; new ones are refused as by a server that has too many.
    Full,
}

/// Stands between Portolan and PostgreSQL.
pub(crate) struct Proxy {
    address: SocketAddr,
    link: watch::Sender<Link>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// `None` where the tests have no PostgreSQL.
    pub(crate) async fn start() -> Option<Self> {
        let server = reqwest::Url::parse(&std::env::var("PORTOLAN_TEST_POSTGRES_URL").ok()?).unwrap();
        let target = format!("{}:{}", server.host_str().unwrap(), server.port().unwrap_or(5432));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (link, watched) = watch::channel(Link::Through);
        Some(Self { address, link, task: tokio::spawn(listen(listener, target, watched)) })
    }

    /// Has Portolan use it.
    pub(crate) fn stand_before(&self, settings: &mut Settings) {
        let url = settings.storage.database_url.as_ref().unwrap().expose().to_owned();
        let mut url = reqwest::Url::parse(&url).unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(self.address.port())).unwrap();
        settings.storage.database_url = Some(String::from(url).into());
    }

    pub(crate) fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(listener: TcpListener, target: String, mut link: watch::Receiver<Link>) {
    let (address, mut listener) = (listener.local_addr().unwrap(), Some(listener));
    let mut relays = JoinSet::new();
    loop {
        let now = *link.borrow_and_update();
        if now == Link::Gone {
            listener = None;
            relays.shutdown().await;
            link.changed().await.unwrap();
            continue;
        }
        if listener.is_none() {
            listener = Some(TcpListener::bind(address).await.unwrap());
        }
        tokio::select! {
            _ = link.changed() => {}
            taken = listener.as_ref().unwrap().accept() => {
                let stream = taken.unwrap().0;
                if now == Link::Full {
                    relays.spawn(async move { drop(refuse(stream).await) });
                } else {
                    relays.spawn(relay(stream, target.clone(), link.clone()));
                }
            }
        }
    }
}

async fn relay(mut client: TcpStream, target: String, link: watch::Receiver<Link>) {
    if spoken(&mut link.clone()).await.is_none() {
        return;
    }
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.split(), server.split());
    tokio::select! {
        _ = pass(&mut from_client, &mut to_server, link.clone()) => {}
        _ = pass(&mut from_server, &mut to_client, link.clone()) => {}
    }
}

async fn spoken(link: &mut watch::Receiver<Link>) -> Option<()> {
    link.wait_for(|link| *link != Link::Silent).await.ok().map(drop)
}

async fn pass(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    mut link: watch::Receiver<Link>,
) -> Option<()> {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut bytes).await.ok().filter(|count| *count > 0)?;
        spoken(&mut link).await?;
        to.write_all(&bytes[..count]).await.ok()?;
    }
}

/// Says what PostgreSQL says when it has too many connections (protocol 3.0: SSLRequest, StartupMessage, ErrorResponse).
async fn refuse(mut stream: TcpStream) -> std::io::Result<()> {
    const SSL_REQUEST: u32 = 80_877_103;
    loop {
        let length = stream.read_u32().await?;
        let mut rest = vec![0; length as usize - 4];
        stream.read_exact(&mut rest).await?;
        if rest[..4] != SSL_REQUEST.to_be_bytes() {
            break;
        }
        stream.write_all(b"N").await?;
    }
    let fields = b"SFATAL\0VFATAL\0C53300\0Msorry, too many clients already\0\0";
    stream.write_all(b"E").await?;
    stream.write_u32(fields.len() as u32 + 4).await?;
    stream.write_all(fields).await?;
    stream.shutdown().await
}

/// One request of each kind that needs the database, and more of them at once than it has connections.
async fn ask_all(portolan: &Portolan, id: &str, round: String) -> Vec<(&'static str, Answer, Duration)> {
    let one = &format!("/v1/mcp-servers/{id}");
    let tools = &format!("{one}/tools");
    let body = |kind: &str, number: usize| json!({ "server_name": format!("{kind}-{round}-{number}"), "config": { "server_url": DEAD } });
    let ask = async |number: usize| {
        let began = Instant::now();
        let (what, answer) = match number % 8 {
            0 => ("list", portolan.get("/v1/mcp-servers/").await),
            1 => ("get", portolan.get(one).await),
            2 => ("tools", portolan.get(tools).await),
            3 => ("create", portolan.post("/v1/mcp-servers/", &body("new", number)).await),
            4 => ("runs", portolan.get("/v1/portolan/runs").await),
            5 => ("changes", portolan.get("/v1/portolan/changes").await),
            6 => ("ready", portolan.get("/v1/ready").await),
            _ => ("refresh", portolan.refresh("mcp_server-00000000-0000-4000-8000-000000000000").await),
        };
        (what, answer, began.elapsed())
    };
    join_all((0..48).map(ask)).await
}

/// All is answered in time, by a 503 that says when to come again, if not as `or` allows.
fn assert_unavailable(answers: Vec<(&'static str, Answer, Duration)>, or: &[u16]) -> usize {
    let mut unavailable = 0;
    for (what, answer, took) in answers {
        assert!(took < IN_TIME, "{what}: {took:?}");
        if or.contains(&answer.status) {
            continue;
        }
        assert!(answer.header("retry-after").is_some(), "{what}: {}", answer.text);
        assert_eq!(answer.expect(503)["code"], "unavailable", "{what}");
        unavailable += 1;
    }
    unavailable
}

/// What needs no database is there while it is away.
async fn assert_alive(portolan: &Portolan) {
    let began = Instant::now();
    portolan.get("/v1/health").await.expect(200);
    assert!(portolan.get("/metrics").await.text.contains("portolan_store_errors"));
    for path in ["/", "/docs", "/openapi.yaml"] {
        assert_eq!(portolan.get(path).await.status, 200, "{path}");
    }
    assert!(began.elapsed() < IN_TIME);
}

/// A create that SDKs would repeat, until it is done. One that was cut off may have been done.
async fn create(portolan: &Portolan, name: &str) {
    let body = json!({ "server_name": name, "config": { "server_url": DEAD } });
    let answer = patiently(async || portolan.post("/v1/mcp-servers/", &body).await).await;
    answer.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_silent_or_gone_is_answered_for_in_time_and_used_again_when_it_is_back() {
    let Some(proxy) = Proxy::start().await else { return };
    let portolan = Portolan::start_with(|settings| proxy.stand_before(settings)).await;
    let server = portolan.create("kept", json!({ "server_url": DEAD })).await;
    let id = server["id"].as_str().unwrap();
    for (round, link) in [Link::Silent, Link::Gone, Link::Silent].into_iter().enumerate() {
        // Connections are there, and busy.
        let before = ask_all(&portolan, id, format!("before-{round}")).await;
        assert_eq!(assert_unavailable(before, &[200, 404]), 0);
        proxy.set(link);
        for again in 0..2 {
            let (answers, ()) =
                tokio::join!(ask_all(&portolan, id, format!("{round}-{again}")), assert_alive(&portolan));
            assert_eq!(assert_unavailable(answers, &[]), 48, "{link:?}");
        }
        proxy.set(Link::Through);
        create(&portolan, &format!("back-{round}")).await;
        // Each connection of the pool is a good one.
        let after = ask_all(&portolan, id, format!("after-{round}")).await;
        assert_eq!(assert_unavailable(after, &[200, 404]), 0);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_is_under_way_when_the_database_falls_silent_is_given_up() {
    let Some(proxy) = Proxy::start().await else { return };
    let portolan = Portolan::start_with(|settings| proxy.stand_before(settings)).await;
    // Of no pool: this one holds what a change waits for.
    let mut blocker = PgConnection::connect(&portolan.database_url().unwrap()).await.unwrap();
    let mut transaction = blocker.begin().await.unwrap();
    transaction.execute("LOCK TABLE servers IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let asked = async || {
        let began = Instant::now();
        let answer = portolan.get("/v1/mcp-servers/").await;
        (answer.status, began.elapsed())
    };
    // A lock that is not had is no reason to think that the database is away.
    let (locked, ready) = tokio::join!(asked(), async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        portolan.get("/v1/ready").await.status
    });
    assert_eq!((locked.0, ready), (503, 200));
    assert!(locked.1 < IN_TIME, "{locked:?}");
    let (cut, ()) = tokio::join!(asked(), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        proxy.set(Link::Silent);
    });
    assert_eq!(cut.0, 503);
    assert!(cut.1 < IN_TIME, "{cut:?}");
    transaction.rollback().await.unwrap();
    proxy.set(Link::Through);
    assert_eq!(patiently(async || portolan.get("/v1/mcp-servers/").await).await.status, 200);
    portolan.stop().await;
}

/// The server is not blamed for what Portolan cannot look up: Letta's 404 of a refresh is never repeated by an SDK.
#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_cannot_ask_which_configuration_is_the_present_one_is_503() {
    let Some(proxy) = Proxy::start().await else { return };
    let portolan = Portolan::start_with(|settings| {
        proxy.stand_before(settings);
        settings.upstream.handshake_timeout = Duration::from_secs(2);
    })
    .await;
    let fake = fake::http::serve(Fake::new(Script::default()));
    let server = portolan.create("slow", json!({ "server_url": fake.url })).await;
    let id = server["id"].as_str().unwrap();
    let path = format!("/v1/mcp-servers/{id}");
    // The next session is of a new configuration, and is not had before that one is replaced as well.
    fake.set_script(serde_json::from_value(json!({ "silent_at": "initialize" })).unwrap());
    let config =
        |version: &str| json!({ "config": { "server_url": fake.url, "custom_headers": { "x-version": version } } });
    let asked_with = |version: &str| fake.requests().iter().any(|seen| seen.header("x-version") == Some(version));
    portolan.patch(&path, &config("1")).await.expect(200);
    let (refreshed, ()) = tokio::join!(portolan.refresh(id), async {
        while !asked_with("1") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        portolan.patch(&path, &config("2")).await.expect(200);
        proxy.set(Link::Gone);
    });
    assert_eq!((refreshed.status, refreshed.header("retry-after")), (503, Some("1")), "{}", refreshed.text);
    proxy.set(Link::Through);
    portolan.stop().await;
}

/// Nobody asks for them again, as somebody does who registers one server.
#[tokio::test(flavor = "multi_thread")]
async fn servers_that_came_together_are_connected_to_when_the_database_is_back() {
    let Some(proxy) = Proxy::start().await else { return };
    let portolan = Portolan::start_with(|settings| proxy.stand_before(settings)).await;
    let slow = Script { list_delay_ms: 300, ..Script::default() };
    let fake = fake::http::serve(Fake::new(slow));
    let servers: serde_json::Map<_, _> =
        (0..24).map(|number| (format!("s{number}"), json!({ "url": format!("{}?{number}", fake.url) }))).collect();
    portolan.post("/v1/portolan/import", &json!({ "mcpServers": servers })).await.expect(200);
    while fake.requests().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    proxy.set(Link::Gone);
    tokio::time::sleep(Duration::from_secs(1)).await;
    proxy.set(Link::Through);
    let deadline = Instant::now() + 4 * PATIENCE;
    loop {
        let listed = patiently(async || portolan.get("/v1/mcp-servers/").await).await.expect(200);
        let ready = listed.as_array().unwrap().iter().filter(|server| server["status"]["state"] == "ready").count();
        if ready == 24 {
            break;
        }
        assert!(Instant::now() < deadline, "{ready} of 24 are ready");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_ended_and_a_server_that_takes_no_more_harm_no_request_for_long() {
    let Some(proxy) = Proxy::start().await else { return };
    let portolan = Portolan::start_with(|settings| proxy.stand_before(settings)).await;
    let server = portolan.create("kept", json!({ "server_url": DEAD })).await;
    let id = server["id"].as_str().unwrap();
    let url = portolan.database_url().unwrap();
    for round in 0..3 {
        let (answers, ()) = tokio::join!(ask_all(&portolan, id, format!("ended-{round}")), async {
            const END: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                               WHERE datname = current_database() AND pid <> pg_backend_pid()";
            let mut connection = PgConnection::connect(&url).await.unwrap();
            connection.execute(END).await.unwrap();
        });
        assert_unavailable(answers, &[200, 404]);
        create(&portolan, &format!("after-{round}")).await;
    }
    proxy.set(Link::Full);
    let answers = ask_all(&portolan, id, "full".to_owned()).await;
    assert!(assert_unavailable(answers, &[200, 404]) < 48, "connections that are there go on");
    portolan.get(&format!("/v1/mcp-servers/{id}")).await.expect(200);
    proxy.set(Link::Through);
    let answers = ask_all(&portolan, id, "room".to_owned()).await;
    assert_eq!(assert_unavailable(answers, &[200, 404]), 0);
    portolan.stop().await;
}

fn is_sqlite() -> bool {
    std::env::var("PORTOLAN_TEST_POSTGRES_URL").is_err()
}

/// Does something to the one connection that writes to SQLite.
async fn on_writer(portolan: &Portolan, sql: String) {
    let Pools::Sqlite { write, .. } = &portolan.app.store.database else { panic!("it is SQLite") };
    sqlx::query(AssertSqlSafe(sql)).execute(write).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_that_another_process_has_locked_is_waited_for_and_not_for_long() {
    if !is_sqlite() {
        return;
    }
    let portolan = Portolan::start().await;
    portolan.create("kept", json!({ "server_url": DEAD })).await;
    let file = portolan.folder().join("data/portolan.db");
    let mut other = SqliteConnection::connect(&format!("sqlite:{}", file.display())).await.unwrap();
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let body = |name: &str| json!({ "server_name": name, "config": { "server_url": DEAD } });
    let ask = async |number: usize| {
        let began = Instant::now();
        let answer = portolan.post("/v1/mcp-servers/", &body(&format!("locked-{number}"))).await;
        ("create", answer, began.elapsed())
    };
    let reads = async {
        portolan.get("/v1/mcp-servers/").await.expect(200);
        portolan.get("/v1/ready").await.expect(200);
    };
    let (answers, ()) = tokio::join!(join_all((0..8).map(ask)), reads);
    for (what, answer, took) in answers {
        assert!(took < 2 * IN_TIME, "{what}: {took:?}");
        assert!(answer.header("retry-after").is_some(), "{}", answer.text);
        assert_eq!(answer.expect(503)["code"], "unavailable");
    }
    other.execute("ROLLBACK").await.unwrap();
    let list = portolan.get("/v1/mcp-servers/").await.expect(200);
    assert_eq!(list.as_array().unwrap().len(), 1, "nothing was done: {list}");
    for number in 0..8 {
        create(&portolan, &format!("locked-{number}")).await;
    }
    portolan.stop().await;
}

/// Registers servers until the disk is full, has all else go on, and more registered when there is room again.
async fn fill_up(portolan: &Portolan, fill: impl AsyncFn(), empty: impl AsyncFn()) {
    let http = fake::http::serve(Fake::new(Script::default()));
    let tooled = portolan.create("tooled", json!({ "server_url": http.url })).await;
    let tooled = tooled["id"].as_str().unwrap();
    assert_eq!(portolan.run(tooled, "echo", json!({ "message": "before" })).await["status"], "success");
    fill().await;
    let body = |number: usize| {
        let token = "x".repeat(16 * 1024);
        json!({ "server_name": format!("more-{number}"), "config": { "server_url": DEAD, "auth_token": token } })
    };
    let mut kept = Vec::new();
    let full = loop {
        let answer = portolan.post("/v1/mcp-servers/", &body(kept.len())).await;
        if answer.status != 200 {
            break answer;
        }
        kept.push(answer.expect(200)["id"].clone());
        assert!(kept.len() < 2_000, "the disk is never full");
    };
    assert_eq!(full.header("x-should-retry"), Some("false"), "{}", full.text);
    assert_eq!(full.expect(507)["code"], "storage_full");
    // Reads go on, and so do runs, whose rows wait.
    let has_all = async |kept: &[Value]| {
        let list = portolan.get("/v1/mcp-servers/").await.expect(200);
        let ids: Vec<Value> = list.as_array().unwrap().iter().map(|server| server["id"].clone()).collect();
        assert!(kept.iter().all(|id| ids.contains(id)), "one that was acknowledged is gone");
        assert_eq!(ids.len(), kept.len() + 1, "one that was refused is there");
    };
    has_all(&kept).await;
    portolan.get("/v1/ready").await.expect(200);
    for number in 0..3 {
        let run = portolan.run(tooled, "echo", json!({ "message": number.to_string() })).await;
        assert_eq!(run["status"], "success", "{run}");
    }
    for _ in 0..3 {
        let answer = portolan.post("/v1/mcp-servers/", &body(kept.len())).await;
        assert_eq!(answer.expect(507)["code"], "storage_full");
    }
    empty().await;
    portolan.post("/v1/mcp-servers/", &body(kept.len())).await.expect(200);
    kept.push(portolan.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().last().unwrap()["id"].clone());
    has_all(&kept).await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let runs = portolan.get("/v1/portolan/runs").await.expect(200);
        if runs["runs"].as_array().unwrap().len() == 4 {
            break;
        }
        assert!(Instant::now() < deadline, "{runs}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_that_may_not_grow_is_507_and_read_all_the_same() {
    if !is_sqlite() {
        return;
    }
    let portolan = Portolan::start().await;
    let limit = |pages: u64| format!("PRAGMA max_page_count = {pages}");
    let fill = async || {
        let Pools::Sqlite { read, .. } = &portolan.app.store.database else { panic!("it is SQLite") };
        let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(read).await.unwrap();
        on_writer(&portolan, limit(pages as u64 + 40)).await;
    };
    fill_up(&portolan, fill, async || on_writer(&portolan, limit(4_294_967_294)).await).await;
    portolan.stop().await;
}

/// A small file system in memory, where this user may mount one; unmounted when it is dropped.
struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    fn mount(folder: &Path) -> Option<Self> {
        std::fs::create_dir(folder).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(folder).output();
        mounted.is_ok_and(|done| done.status.success()).then(|| Self { folder: folder.to_owned() })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_is_507_until_there_is_room_again() {
    if !is_sqlite() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(&folder.path().join("disk")) else {
        // As another user than root; `a_sqlite_file_that_may_not_grow_is_507_and_read_all_the_same` has the rest of it.
        return;
    };
    let portolan = Portolan::start_with(|settings| settings.storage.data_dir = disk.folder.join("data")).await;
    let ballast = disk.folder.join("ballast");
    let fill = async || {
        let mut file = std::fs::File::create(&ballast).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
    };
    fill_up(&portolan, fill, async || std::fs::remove_file(&ballast).unwrap()).await;
    portolan.stop().await;
    drop(disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_health_need_no_database() {
    let Some(proxy) = Proxy::start().await else { return };
    let portolan = Portolan::start_with(|settings| {
        proxy.stand_before(settings);
        settings.tokens.token = Some("ptl_admin_without_a_database".to_owned().into());
    })
    .await;
    let admin = portolan.remote_with("ptl_admin_without_a_database");
    admin.send("GET", "/v1/ready", None).await.expect(200);
    proxy.set(Link::Gone);
    let began = Instant::now();
    assert_eq!(portolan.get("/v1/mcp-servers/").await.status, 401, "a token is looked at first");
    assert_eq!(portolan.remote_with("wrong").send("GET", "/v1/mcp-servers/", None).await.status, 401);
    admin.send("GET", "/v1/health", None).await.expect(200);
    assert_eq!(admin.send("GET", "/v1/mcp-servers/", None).await.status, 503);
    assert!(began.elapsed() < IN_TIME);
    proxy.set(Link::Through);
    let again = patiently(async || admin.send("GET", "/v1/mcp-servers/", None).await).await;
    assert_eq!(again.status, 200);
    portolan.stop().await;
}
