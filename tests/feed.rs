//! What one Portolan changes, others on the same PostgreSQL honour, although they remember servers and tools and ask the
//! database for nothing while they run known tools. On SQLite, which one process has for itself, there is nothing to look at.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use portolan::store::Database;
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use sqlx::postgres::PgPool;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};

use crate::fake::{self, Fake, Running, Script};
use crate::harness::Portolan;
use crate::metrics::Scrape;

/// For what takes up to 15 s by itself, on a machine that does much else.
const LONG: Duration = Duration::from_secs(60);

/// Asks until it is so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn metrics(portolan: &Portolan) -> Scrape {
    Scrape::read(&portolan.get("/metrics").await.text, false)
}

async fn notifications(portolan: &Portolan) -> f64 {
    metrics(portolan).await.get("portolan_changes_notifications_total")
}

/// Until it follows what others change, and listens for notifications.
async fn follows(portolan: &Portolan) {
    until("it follows changes", async || portolan.app.store.epoch().is_some()).await;
}

fn pool(portolan: &Portolan) -> &PgPool {
    match &portolan.app.store.database {
        Database::Postgres(pool) => pool,
        Database::Sqlite { .. } => panic!("replicas have PostgreSQL"),
    }
}

fn http() -> Running {
    fake::http::serve(Fake::new(Script::default()))
}

fn marked(mark: &str) -> Value {
    json!({ "x-mark": mark })
}

/// Registers a server that gets the mark `1` with each request, and returns its path and that of a run.
async fn register(portolan: &Portolan, name: &str, url: &str) -> (String, String) {
    let server = portolan.create(name, json!({ "server_url": url, "custom_headers": marked("1") })).await;
    let id = server["id"].as_str().unwrap();
    let tool_id = portolan.tool_id(id, "headers").await;
    (format!("/v1/mcp-servers/{id}"), format!("/v1/mcp-servers/{id}/tools/{tool_id}/run"))
}

async fn mark(portolan: &Portolan, server: &str, mark: &str) {
    portolan.patch(server, &json!({ "config": { "custom_headers": marked(mark) } })).await.expect(200);
}

/// The mark with which a run arrives; none when it is answered with an error.
async fn seen(portolan: &Portolan, run: &str) -> Option<String> {
    let answer = portolan.post(run, &json!({})).await;
    if answer.status != 200 {
        return None;
    }
    let headers: Value = serde_json::from_str(answer.expect(200)["func_return"].as_str()?).ok()?;
    Some(headers["x-mark"].as_str()?.to_owned())
}

/// Until runs go on for this time while nobody can read tools from the database.
async fn remembers(portolan: &Portolan, run: &str, time: Duration) {
    let pool = pool(portolan);
    until("runs ask the database for nothing", async || {
        assert_eq!(seen(portolan, run).await.as_deref(), Some("1"));
        sqlx::query("ALTER TABLE tools RENAME TO away").execute(pool).await.unwrap();
        let (tools, began) = (run.rsplit_once("/tools/").unwrap().0, Instant::now());
        let asks = portolan.get(&format!("{tools}/tools")).await.status;
        let mut works = true;
        while works && began.elapsed() <= time {
            works = seen(portolan, run).await.is_some();
            sleep(Duration::from_millis(50)).await;
        }
        sqlx::query("ALTER TABLE away RENAME TO tools").execute(pool).await.unwrap();
        assert_eq!(asks, 500, "what does ask fails");
        works
    })
    .await;
}

/// Ends the connections on which Portolans follow this database.
async fn cut_feeds(portolan: &Portolan) {
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE application_name = 'portolan feed' AND datname = current_database()";
    let ended: i64 = sqlx::query_scalar(sql).fetch_one(pool(portolan)).await.unwrap();
    assert!(ended > 0, "there are such connections");
}

/// Stands between a Portolan and its PostgreSQL.
struct Between {
    addr: SocketAddr,
    is_cut: Arc<AtomicBool>,
    drops_notifications: Arc<AtomicBool>,
    dropped: Arc<AtomicUsize>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Between {
    async fn new(url: &str) -> Self {
        let url = reqwest::Url::parse(url).unwrap();
        let server = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5432));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (is_cut, drops_notifications, dropped) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (cut, drops, counted) = (is_cut.clone(), drops_notifications.clone(), dropped.clone());
        let accepting = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                if cut.load(Ordering::SeqCst) {
                    continue;
                }
                let (server, cut) = (TcpStream::connect(&server).await.unwrap(), cut.clone());
                let (drops, counted) = (drops.clone(), counted.clone());
                tokio::spawn(async move {
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    let is_cut = async {
                        while !cut.load(Ordering::SeqCst) {
                            sleep(Duration::from_millis(10)).await;
                        }
                    };
                    tokio::select! {
                        () = pass(from_client, to_server) => {}
                        () = pass_messages(from_server, to_client, &drops, &counted) => {}
                        () = is_cut => {}
                    }
                });
            }
        });
        Self { addr, is_cut, drops_notifications, dropped, accepting }
    }

    /// The database of `url` by this way; without TLS, which would hide what is said.
    fn url(&self, url: &str) -> String {
        let mut url = reqwest::Url::parse(url).unwrap();
        url.set_host(Some(&self.addr.ip().to_string())).unwrap();
        url.set_port(Some(self.addr.port())).unwrap();
        url.query_pairs_mut().append_pair("sslmode", "disable");
        url.into()
    }

    fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::SeqCst);
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let _ = tokio::io::copy(&mut from, &mut to).await;
}

/// Passes on what PostgreSQL says, message by message: a letter, and a length that counts itself. The letter of a
/// notification is A.
async fn pass_messages(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    drops: &AtomicBool,
    dropped: &AtomicUsize,
) {
    let passing = async {
        loop {
            let mut head = [0; 5];
            from.read_exact(&mut head).await?;
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let mut body = vec![0; length - 4];
            from.read_exact(&mut body).await?;
            if head[0] == b'A' && drops.load(Ordering::SeqCst) {
                dropped.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            to.write_all(&head).await?;
            to.write_all(&body).await?;
        }
    };
    let _: std::io::Result<()> = passing.await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_elsewhere_is_honoured_while_runs_ask_no_database() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let http = http();
    let (server, run) = register(&one, "shared", &http.url).await;
    follows(&other).await;
    assert_eq!(seen(&other, &run).await.as_deref(), Some("1"));
    remembers(&other, &run, Duration::from_secs(3)).await;

    let before = notifications(&other).await;
    mark(&one, &server, "2").await;
    until("the change is honoured", async || seen(&other, &run).await.as_deref() == Some("2")).await;
    assert!(notifications(&other).await > before, "it was told at once");
    assert!(metrics(&other).await.get("portolan_changes_listening") == 1.0);
    one.delete(&server).await.expect(204);
    until("the deletion is honoured", async || other.post(&run, &json!({})).await.status == 404).await;
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_before_a_change_elsewhere_ends_and_one_of_after_does_not() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let http = http();
    let (server, run) = register(&one, "shared", &http.url).await;
    follows(&one).await;
    follows(&other).await;
    assert_eq!(seen(&other, &run).await.as_deref(), Some("1"));
    assert_eq!(http.sessions(), 2, "one each");
    let opened = || http.requests().iter().filter(|seen| seen.rpc() == "initialize").count();

    let before = notifications(&one).await;
    mark(&one, &server, "2").await;
    assert_eq!(seen(&one, &run).await.as_deref(), Some("2"));
    until("nobody has a session of before", async || http.sessions() == 1).await;
    let count = opened();
    until("it hears of its own change, too", async || notifications(&one).await > before).await;
    for _ in 0..10 {
        assert_eq!(seen(&one, &run).await.as_deref(), Some("2"));
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(opened(), count, "its own change ends its session once");

    let bystander = self::http();
    let (_, theirs) = register(&one, "bystander", &bystander.url).await;
    assert_eq!(seen(&other, &theirs).await.as_deref(), Some("1"));
    assert_eq!(seen(&other, &run).await.as_deref(), Some("2"));
    one.delete(&server).await.expect(204);
    until("no session is left", async || http.sessions() == 0).await;
    assert_eq!(bystander.sessions(), 2, "of others they stay");
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_honoured_without_notifications() {
    let one = Portolan::start().await;
    let Some(url) = one.database_url() else { return one.stop().await };
    let between = Between::new(&url).await;
    between.drops_notifications.store(true, Ordering::SeqCst);
    let url = between.url(&url);
    let other = one.replica(|settings| settings.storage.database_url = Some(url.into())).await.unwrap();
    let http = http();
    let (server, run) = register(&one, "shared", &http.url).await;
    follows(&other).await;
    assert_eq!(seen(&other, &run).await.as_deref(), Some("1"));
    mark(&one, &server, "2").await;
    until("the change is honoured", async || seen(&other, &run).await.as_deref() == Some("2")).await;
    until("it was notified in vain", async || between.dropped.load(Ordering::SeqCst) > 0).await;
    assert_eq!(notifications(&other).await, 0.0);
    other.stop().await;
    one.stop().await;
}

/// What was missed is not in the rows of changes any more: it was written behind Portolan's back.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_lost_connection_everything_is_read_anew() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let http = http();
    let (server, run) = register(&one, "shared", &http.url).await;
    follows(&other).await;
    assert_eq!(seen(&other, &run).await.as_deref(), Some("1"));
    assert_eq!(http.sessions(), 2);
    let id = server.rsplit('/').next().unwrap();
    let sql = AssertSqlSafe("DELETE FROM servers WHERE id = $1");
    sqlx::query(sql).bind(id).execute(pool(&one)).await.unwrap();
    // A change that is told of another server says nothing of this one.
    let before = notifications(&other).await;
    one.create("bystander", json!({ "server_url": http.url })).await;
    until("something is told", async || notifications(&other).await > before).await;
    cut_feeds(&one).await;
    until("the server is looked for", async || other.post(&run, &json!({})).await.status == 404).await;
    until("its sessions end", async || http.sessions() == 1).await;
    until("it follows again", async || other.app.store.epoch().is_some()).await;
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_a_replica_runs_known_tools_for_15_s() {
    let one = Portolan::start().await;
    let Some(url) = one.database_url() else { return one.stop().await };
    let between = Between::new(&url).await;
    let url = between.url(&url);
    let other = one.replica(|settings| settings.storage.database_url = Some(url.into())).await.unwrap();
    let http = http();
    let (server, run) = register(&one, "shared", &http.url).await;
    follows(&other).await;
    remembers(&other, &run, Duration::ZERO).await;
    assert_eq!(seen(&other, &run).await.as_deref(), Some("1"));

    let cut = Instant::now();
    between.cut(true);
    until("it is cut off", async || other.get(&server).await.status == 503).await;
    // The last read may be 10 s old: there are 5 s at least.
    if cut.elapsed() < Duration::from_secs(4) {
        assert_eq!(seen(&other, &run).await.as_deref(), Some("1"));
    }
    mark(&one, &server, "2").await;
    until("memory is trusted no more", async || {
        let answer = other.post(&run, &json!({})).await;
        if answer.status == 503 {
            let seconds: u32 = answer.header("retry-after").expect("when to come again").parse().unwrap();
            assert!(seconds >= 1);
        }
        answer.status == 503
    })
    .await;
    let used = http.requests().len();
    for _ in 0..5 {
        other.post(&run, &json!({})).await.expect(503);
    }
    let old = http.requests().split_off(used).iter().filter(|seen| seen.header("x-mark") == Some("1")).count();
    assert_eq!(old, 0, "what may have been changed is not used");
    assert!(metrics(&other).await.get("portolan_changes_age_seconds") > 10.0);
    assert_eq!(metrics(&other).await.get("portolan_changes_listening"), 0.0);

    between.cut(false);
    until("it is back, with what was changed", async || seen(&other, &run).await.as_deref() == Some("2")).await;
    until("it follows again", async || other.app.store.epoch().is_some()).await;
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_tells_those_who_serve() {
    let one = Portolan::start().await;
    let Some(url) = one.database_url() else { return one.stop().await };
    let http = http();
    let (server, run) = register(&one, "shared", &http.url).await;
    follows(&one).await;
    assert_eq!(seen(&one, &run).await.as_deref(), Some("1"));
    let before = notifications(&one).await;
    let file = one.folder().join("servers.json");
    let servers = json!({ "mcpServers": { "shared": { "url": http.url, "headers": marked("2") } } });
    std::fs::write(&file, servers.to_string()).unwrap();
    let mut import = tokio::process::Command::new(env!("CARGO_BIN_EXE_portolan"));
    import.args(["import", "--replace", "--format", "claude"]).arg(&file);
    import.env_clear().env("DATABASE_URL", url).env("PORTOLAN_KEY", crate::harness::KEY);
    import.env("PORTOLAN_DATA_DIR", one.folder().join("import"));
    let done = import.output().await.unwrap();
    assert!(done.status.success(), "{done:?}");
    until("the import is honoured", async || seen(&one, &run).await.as_deref() == Some("2")).await;
    assert!(notifications(&one).await > before, "it was told at once");
    assert_eq!(one.get(&server).await.expect(200)["server_name"], "shared");
    one.stop().await;
}
