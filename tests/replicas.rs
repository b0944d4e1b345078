//! Several Portolans on one PostgreSQL: what one does is so for all, whatever else goes on. On SQLite, which one process has
//! for itself, there is nothing to look at. Sign-ins across them are in `oauth::replicas`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::join_all;
use portolan::config::{Profile, Settings, ToolPolicy};
use portolan::store::Database as Pools;
use serde_json::{Map, Value, json};
use sqlx::postgres::PgPool;
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep, timeout};

use crate::fake::{self, Fake, Running, Script};
use crate::harness::{PATIENCE, Portolan, eventually};

const DEAD: &str = "http://127.0.0.1:1/mcp";
const IMPORT: &str = "/v1/portolan/import";
/// For what takes several steps on a machine that is busy.
const LONG: Duration = Duration::from_secs(60);

/// Two that serve on one database, with these settings; none where that is for one process alone.
async fn two(change: impl Fn(&mut Settings)) -> Option<(Portolan, Portolan)> {
    let one = Portolan::start_with(&change).await;
    match one.replica(&change).await {
        Some(other) => Some((one, other)),
        None => {
            one.stop().await;
            None
        }
    }
}

async fn stop(one: Portolan, other: Portolan) {
    other.stop().await;
    one.stop().await;
}

/// Asks until it is so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        sleep(Duration::from_millis(50)).await;
    }
}

fn pool(portolan: &Portolan) -> &PgPool {
    match &portolan.app.store.database {
        Pools::Postgres(pool) => pool,
        Pools::Sqlite { .. } => panic!("replicas have PostgreSQL"),
    }
}

fn id(server: &Value) -> &str {
    server["id"].as_str().unwrap()
}

fn path(server: &Value) -> String {
    format!("/v1/mcp-servers/{}", id(server))
}

fn http(script: Value) -> Running {
    fake::http::serve(Fake::new(serde_json::from_value(script).unwrap()))
}

/// A configuration that sends `mark` with each request, as a token would be sent.
fn marked(url: &str, mark: &str) -> Value {
    json!({ "server_url": url, "custom_headers": { "x-mark": mark } })
}

/// With which mark a run arrives through this one, and where; none when it is refused.
async fn mark(portolan: &Portolan, path: &str) -> Option<String> {
    let answer = portolan.post(path, &json!({})).await;
    if answer.status != 200 {
        return None;
    }
    let ran = answer.expect(200);
    let headers: Value = serde_json::from_str(ran["func_return"].as_str()?).ok()?;
    Some(headers["x-mark"].as_str()?.to_owned())
}

async fn run_path(portolan: &Portolan, server: &Value, tool: &str) -> String {
    format!("{}/tools/{}/run", path(server), portolan.tool_id(id(server), tool).await)
}

/// Waits until `portolan` has closed what it had open at `http` with this mark, and none of it is seen any more.
async fn is_gone(http: &Running, mark: &str, use_it: impl AsyncFn()) {
    let before = http.requests().len();
    for _ in 0..10 {
        use_it().await;
        sleep(Duration::from_millis(50)).await;
    }
    let seen = http.requests().split_off(before);
    assert!(!seen.is_empty(), "it was used");
    // The session of before ends with its own header.
    let old: Vec<_> =
        seen.iter().filter(|seen| seen.method != "DELETE" && seen.header("x-mark") == Some(mark)).collect();
    assert!(old.is_empty(), "{old:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_registers_another_runs() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, _script) = one.create_stdio("shared", &json!({})).await;
    let ran = other.run(id(&server), "echo", json!({ "message": "over there" })).await;
    assert_eq!(ran["func_return"], "over there", "{ran}");
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_want_a_name_at_once_one_gets_it() {
    let Some((one, other)) = two(|_| {}).await else { return };
    for round in 0..10 {
        let name = format!("wanted-{round}");
        let body = json!({ "server_name": name, "config": { "server_url": DEAD } });
        let (here, there) = tokio::join!(one.post("/v1/mcp-servers/", &body), other.post("/v1/mcp-servers/", &body));
        let mut said = [here.status, there.status];
        said.sort_unstable();
        assert_eq!(said, [200, 409], "{} {}", here.text, there.text);
    }
    // Renamed, too.
    let (first, second) =
        (one.create("a", json!({ "server_url": DEAD })).await, one.create("b", json!({ "server_url": DEAD })).await);
    for round in 0..10 {
        let wanted = json!({ "server_name": format!("renamed-{round}") });
        let (first, second) = (path(&first), path(&second));
        let (here, there) = tokio::join!(one.patch(&first, &wanted), other.patch(&second, &wanted));
        let mut said = [here.status, there.status];
        said.sort_unstable();
        assert_eq!(said, [200, 409], "{} {}", here.text, there.text);
    }
    assert_eq!(one.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().len(), 12);
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_at_once_none_is_lost() {
    let Some((one, other)) = two(|_| {}).await else { return };
    let server = one.create("both", json!({ "server_url": DEAD })).await;
    let path = path(&server);
    for round in 0..20 {
        let name = json!({ "server_name": format!("name-{round}") });
        let config = json!({ "config": { "custom_headers": { "x-mark": format!("{round}") } } });
        let (here, there) = tokio::join!(one.patch(&path, &name), other.patch(&path, &config));
        here.expect(200);
        there.expect(200);
        for portolan in [&one, &other] {
            let now = portolan.get(&format!("{path}?reveal=true")).await.expect(200);
            assert_eq!(now["server_name"], format!("name-{round}"));
            assert_eq!(now["custom_headers"]["x-mark"], format!("{round}"));
        }
    }
    stop(one, other).await;
}

/// A file of these servers in this order.
fn file(names: impl Iterator<Item = usize>, mark: usize) -> Value {
    let server = |number| (format!("s{number}"), json!({ "url": DEAD, "headers": { "X-Mark": format!("{mark}") } }));
    json!({ "mcpServers": names.map(server).collect::<Map<_, _>>() })
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_at_once_add_each_server_once() {
    const SERVERS: usize = 8;
    let Some((one, other)) = two(|_| {}).await else { return };
    for round in 0..4 {
        let names = |from: usize| (0..SERVERS).map(move |number| from + round * SERVERS + number);
        let (forwards, backwards) = (file(names(0), 1), file(names(0).rev(), 1));
        let (here, there) = tokio::join!(one.post(IMPORT, &forwards), other.post(IMPORT, &backwards));
        let said = [here.expect(200), there.expect(200)];
        let count = |what: &str| said.iter().map(|said| said[what].as_array().unwrap().len()).sum::<usize>();
        assert_eq!((count("added"), count("unchanged")), (SERVERS, SERVERS), "{said:?}");
    }
    stop(one, other).await;
}

/// Everything that takes the rows of several tables, by many on both replicas: they wait for each other in one direction, and
/// whatever is refused is refused with a reason.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_in_a_circle() {
    const SERVERS: usize = 5;
    const ROUNDS: usize = 12;
    let Some((one, other)) = two(|_| {}).await else { return };
    let live = http(json!({}));
    let listed = one.create("listed", json!({ "server_url": live.url })).await;
    one.post(IMPORT, &file(0..SERVERS, 0)).await.expect(200);
    let ids: Vec<String> = {
        let all = one.get("/v1/mcp-servers/").await.expect(200);
        all.as_array().unwrap().iter().map(path).collect()
    };
    let work = async |portolan: &Portolan, number: usize| {
        let mut said = Vec::new();
        for round in 0..ROUNDS {
            let mark = round * 10 + number;
            let answer = match (number + round) % 6 {
                0 => portolan.post(IMPORT, &file(0..SERVERS, mark)).await,
                1 => portolan.post(IMPORT, &file((0..SERVERS).rev(), mark)).await,
                2 => {
                    let change = json!({ "config": { "custom_headers": { "x-mark": format!("{mark}") } } });
                    portolan.patch(&ids[1 + round % SERVERS], &change).await
                }
                3 => portolan.refresh(id(&listed)).await,
                4 => {
                    let body =
                        json!({ "server_name": format!("come-{}", round / 2), "config": { "server_url": DEAD } });
                    portolan.post("/v1/mcp-servers/", &body).await
                }
                _ => {
                    let all = portolan.get("/v1/mcp-servers/").await.expect(200);
                    let coming = all
                        .as_array()
                        .unwrap()
                        .iter()
                        .find(|server| server["server_name"].as_str().unwrap().starts_with("come-"));
                    match coming {
                        Some(server) => portolan.delete(&path(server)).await,
                        None => continue,
                    }
                }
            };
            said.push((answer.status, answer.text));
        }
        said
    };
    let all = (0..6).map(|number| work(if number % 2 == 0 { &one } else { &other }, number));
    let said: Vec<_> = timeout(LONG, join_all(all)).await.expect("nobody waits for ever").concat();
    for (status, text) in &said {
        assert!(matches!(status, 200 | 204 | 404 | 409 | 503), "{status}: {text}");
    }
    let done = said.iter().filter(|(status, _)| matches!(status, 200 | 204)).count();
    assert!(done > said.len() / 2, "{done} of {}", said.len());
    // What a connection knows of deadlocks it tells at its end.
    let url = one.database_url().unwrap();
    other.stop().await;
    one.app.store.close().await;
    let mut last = PgConnection::connect(&url).await.unwrap();
    const DEADLOCKS: &str = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(sqlx::query_scalar::<_, i64>(DEADLOCKS).fetch_one(&mut last).await.unwrap(), 0);
    last.close().await.unwrap();
    one.stop_without_database().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_list_lands_on_no_newer_one() {
    let Some((one, other)) = two(|_| {}).await else { return };
    let tool = |name: &str| json!({ "name": name, "inputSchema": { "type": "object", "properties": {} } });
    let script = |names: &[&str], delay: u64| -> Script {
        let tools: Vec<_> = names.iter().map(|name| tool(name)).collect();
        serde_json::from_value(json!({ "tools": tools, "list_delay_ms": delay })).unwrap()
    };
    let live = fake::http::serve(Fake::new(script(&["args"], 0)));
    let server = one.create("listed", json!({ "server_url": live.url })).await;
    other.refresh(id(&server)).await.expect(200);
    let lists = || live.requests().iter().filter(|seen| seen.rpc() == "tools/list").count();
    // The list of before is on its way for so long that the next one, which has one tool more, is stored before it.
    let before = lists();
    live.set_script(script(&["args"], 2_000));
    let slow = one.refresh(id(&server));
    let quick = async {
        eventually("the slow list is asked for", || lists() > before).await;
        live.set_script(script(&["args", "late"], 0));
        other.refresh(id(&server)).await.expect(200)
    };
    let (slow, quick) = tokio::join!(slow, quick);
    assert_eq!(quick["added"], json!(["late"]));
    let slow = slow.expect(200);
    assert_eq!((&slow["deleted"], &slow["unchanged"]), (&json!([]), &json!(2)), "it was asked for again");
    for portolan in [&one, &other] {
        let names: Vec<_> = portolan.tools(id(&server)).await.iter().map(|tool| tool["name"].clone()).collect();
        assert_eq!(names, ["args", "late"]);
    }
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_a_list_is_told_to_many_and_kept_once() {
    let Some((one, other)) = two(|_| {}).await else { return };
    let script = |more: &[&str]| {
        json!({
            "tools": fake::script::with_tools(more), "list_changed": true, "get_stream": true,
        })
    };
    let live = http(script(&[]));
    let server = one.create("telling", json!({ "server_url": live.url })).await;
    for portolan in [&one, &other] {
        portolan.run(id(&server), "echo", json!({ "message": "m" })).await;
    }
    eventually("both listen", || live.streams() == 2).await;
    live.set_script(serde_json::from_value(script(&["tenant"])).unwrap());
    live.list_changed();
    until("the new tool is there", async || other.tools(id(&server)).await.iter().any(|tool| tool["name"] == "tenant"))
        .await;
    let count = "SELECT count(*) FROM changes WHERE action = 'tools.changed' AND mcp_server_id = $1";
    let changes: i64 = sqlx::query_scalar(count).bind(id(&server)).fetch_one(pool(&one)).await.unwrap();
    assert_eq!(changes, 2, "the first list, and this one");
    stop(one, other).await;
}

/// Which version of its row a server has.
async fn version(portolan: &Portolan, server: &Value) -> String {
    let sql = "SELECT xmin::text FROM servers WHERE id = $1";
    sqlx::query_scalar(sql).bind(id(server)).fetch_one(pool(portolan)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_write_nothing_of_a_server_that_is_well() {
    let Some((one, other)) = two(|settings| settings.upstream.idle_timeout = Duration::from_millis(200)).await else {
        return;
    };
    let live = http(json!({}));
    let server = one.create("well", json!({ "server_url": live.url })).await;
    let before = version(&one, &server).await;
    for _ in 0..3 {
        for portolan in [&one, &other] {
            assert_eq!(portolan.run(id(&server), "echo", json!({ "message": "m" })).await["status"], "success");
        }
        eventually("sessions that nobody uses are closed", || live.sessions() == 0).await;
    }
    assert_eq!(version(&one, &server).await, before, "nothing was written, also for new sessions");
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_cannot_reach_a_server_harms_no_other() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|settings| settings.egress.egress = Profile::Strict).await else {
        return one.stop().await;
    };
    let live = http(json!({}));
    let server = one.create("near", json!({ "server_url": live.url })).await;
    let run = run_path(&one, &server, "echo").await;
    let refused = other.post(&run, &json!({})).await;
    assert_eq!(refused.status, 502, "{}", refused.text);
    // The status is that of the last attempt, whoever made it.
    assert_eq!(one.get(&path(&server)).await.expect(200)["status"]["state"], "unreachable");
    let before = version(&one, &server).await;
    for _ in 0..5 {
        assert!(matches!(other.post(&run, &json!({})).await.status, 502 | 503));
        one.post(&run, &json!({ "args": { "message": "m" } })).await.expect(200);
    }
    assert_eq!(version(&one, &server).await, before, "what is known is not written again");
    one.refresh(id(&server)).await.expect(200);
    assert_eq!(other.get(&path(&server)).await.expect(200)["status"]["state"], "ready");
    stop(one, other).await;
}

/// A key file in `folder` of these keys, each 32 bytes of one value.
fn key_file(folder: &Path, keys: &[u8]) -> PathBuf {
    let file = folder.join("keys");
    std::fs::write(&file, keys.iter().map(|key| format!("{key:02x}").repeat(32) + "\n").collect::<String>()).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_change_on_one_replica_after_the_other() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let keyed = |folder: &Path| {
        let file = key_file(folder, &[1]);
        move |settings: &mut Settings| {
            (settings.secrets.key, settings.secrets.key_file) = (None, Some(file));
        }
    };
    let one = Portolan::start_with(keyed(here.path())).await;
    let Some(other) = one.replica(keyed(there.path())).await else { return one.stop().await };
    let reload = async |portolan: &Portolan, folder: &Path, keys: &[u8]| {
        key_file(folder, keys);
        portolan.app.store.reload_keys().await
    };
    let live = http(json!({}));
    let old = one.create("old", marked(&live.url, "old")).await;
    let run = run_path(&one, &old, "headers").await;
    assert_eq!(mark(&other, &run).await.as_deref(), Some("old"));

    // In the wrong order: the one seals with a key that the other has not got.
    reload(&one, here.path(), &[2, 1]).await.unwrap();
    let new = one.create("new", marked(&live.url, "{{ MARK | new }}")).await;
    let new_run = run_path(&one, &new, "headers").await;
    let refused = other.post(&new_run, &json!({})).await;
    assert!(matches!(refused.status, 502 | 503), "{}", refused.text);
    assert_eq!(
        other.patch(&path(&new), &json!({ "config": { "server_url": DEAD } })).await.expect(409)["code"],
        "config_sealed"
    );
    assert_eq!(other.get(&path(&new)).await.expect(200)["status"]["state"], "unreachable");
    // That is the other's trouble: the server is well.
    assert_eq!(one.get(&path(&new)).await.expect(200)["status"]["state"], "ready");
    assert_eq!(mark(&one, &new_run).await.as_deref(), Some("new"));
    // What is sealed with the key that both have goes on, in both directions.
    other.patch(&path(&old), &json!({ "config": { "custom_headers": { "x-mark": "changed" } } })).await.expect(200);
    until("the one has opened what the other sealed", async || mark(&one, &run).await.as_deref() == Some("changed"))
        .await;

    // The key comes, and all is as if it had been there.
    reload(&other, there.path(), &[1, 2]).await.unwrap();
    until("the server can be used", async || mark(&other, &new_run).await.as_deref() == Some("new")).await;
    // The first key of each seals: all that the old one sealed is sealed again while it goes on doing so.
    let rotated = one.app.store.rotate(|_, _| {}).await.unwrap();
    assert_eq!(rotated.unopened, 0);
    other.patch(&path(&old), &json!({ "config": { "custom_headers": { "x-mark": "late" } } })).await.expect(200);
    assert!(reload(&one, here.path(), &[2]).await.is_err(), "it is needed still");
    until("what was sealed late is opened", async || mark(&one, &run).await.as_deref() == Some("late")).await;
    reload(&other, there.path(), &[2, 1]).await.unwrap();
    one.app.store.rotate(|_, _| {}).await.unwrap();
    reload(&one, here.path(), &[2]).await.unwrap();
    reload(&other, there.path(), &[2]).await.unwrap();
    for portolan in [&one, &other] {
        assert_eq!(mark(portolan, &run).await.as_deref(), Some("late"));
        assert_eq!(mark(portolan, &new_run).await.as_deref(), Some("new"));
    }
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_of_all_are_in_one_log_and_are_forgotten_by_any() {
    let Some((one, other)) = two(|settings| settings.run_log.keep_runs = Duration::from_secs(4)).await else { return };
    let live = http(json!({}));
    let server = one.create("logged", json!({ "server_url": live.url })).await;
    let run = run_path(&one, &server, "echo").await;
    for portolan in [&one, &other] {
        for _ in 0..3 {
            portolan.post(&run, &json!({ "args": { "message": "m" } })).await.expect(200);
        }
    }
    for portolan in [&one, &other] {
        until("the runs of both are there", async || {
            let runs = portolan.get("/v1/portolan/runs").await.expect(200);
            runs["runs"].as_array().unwrap().len() == 6
        })
        .await;
    }
    until("both have swept", async || {
        let runs: i64 = sqlx::query_scalar("SELECT count(*) FROM runs").fetch_one(pool(&one)).await.unwrap();
        runs == 0
    })
    .await;
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_counts_everywhere() {
    let hold = |settings: &mut Settings| settings.upstream.tools.tool_changes = ToolPolicy::Hold;
    let Some((one, other)) = two(hold).await else { return };
    let tool = |description: &str| {
        json!({ "tools": [{
        "name": "args", "description": description, "inputSchema": { "type": "object", "properties": {} },
    }] })
    };
    let (server, script) = one.create_stdio("held", &tool("first")).await;
    let run = run_path(&one, &server, "args").await;
    for round in 0..2 {
        for portolan in [&one, &other] {
            until("it may be run", async || portolan.post(&run, &json!({})).await.status == 200).await;
        }
        script.set(&tool(&format!("changed {round}")));
        one.refresh(id(&server)).await.expect(200);
        assert_eq!(one.post(&run, &json!({})).await.status, 403);
        until("it is held there, too", async || other.post(&run, &json!({})).await.status == 403).await;
        let approve = run.replace("/run", "/approve");
        other.send("POST", &approve, None).await.expect(200);
        assert_eq!(other.post(&run, &json!({})).await.status, 200);
    }
    until("it may be run", async || one.post(&run, &json!({})).await.status == 200).await;
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_configuration_is_used_by_all_and_the_one_of_before_by_nobody() {
    let Some((one, other)) = two(|_| {}).await else { return };
    let (first, second) = (http(json!({ "get_stream": true })), http(json!({})));
    let server = one.create("moving", marked(&first.url, "a")).await;
    let (run, slow) = (run_path(&one, &server, "headers").await, run_path(&one, &server, "slow").await);
    for portolan in [&one, &other] {
        assert_eq!(mark(portolan, &run).await.as_deref(), Some("a"));
    }
    // A run that is under way elsewhere goes on to its end.
    let running = async { other.post(&slow, &json!({ "args": { "ms": 3_000 } })).await.expect(200) };
    let changing = async {
        eventually("the run is under way", || first.fake().running() > 0).await;
        one.patch(&path(&server), &json!({ "config": { "custom_headers": { "x-mark": "b" } } })).await.expect(200);
        until("the other uses the new header", async || mark(&other, &run).await.as_deref() == Some("b")).await;
        is_gone(&first, "a", async || {
            for portolan in [&one, &other] {
                assert_eq!(mark(portolan, &run).await.as_deref(), Some("b"));
            }
        })
        .await;
    };
    let (ran, ()) = tokio::join!(running, changing);
    assert_eq!(ran["func_return"], "done", "{ran}");
    eventually("the sessions of before are closed", || first.sessions() == 2).await;

    // To another place, changed on the other one.
    other.patch(&path(&server), &json!({ "config": { "server_url": second.url } })).await.expect(200);
    other.refresh(id(&server)).await.expect(200);
    let count = || second.requests().iter().filter(|seen| seen.rpc() == "tools/call").count();
    until("the one goes there, too", async || {
        let before = count();
        mark(&one, &run).await.is_some() && count() > before
    })
    .await;
    eventually("nobody is left there", || first.sessions() == 0).await;
    let seen = first.requests().len();
    for portolan in [&one, &other] {
        assert!(mark(portolan, &run).await.is_some());
    }
    assert_eq!(first.requests().len(), seen, "nor comes back");
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_lists_change_for_all() {
    let Some((one, other)) = two(|_| {}).await else { return };
    let (server, script) = one.create_stdio("before", &json!({ "tools": fake::script::with_tools(&[]) })).await;
    let run = run_path(&one, &server, "echo").await;
    let tool = run.strip_suffix("/run").unwrap();
    for portolan in [&one, &other] {
        portolan.post(&run, &json!({ "args": { "message": "m" } })).await.expect(200);
    }
    one.patch(&path(&server), &json!({ "server_name": "after" })).await.expect(200);
    until("the other has the new name", async || other.get(tool).await.expect(200)["tags"] == json!(["mcp:after"]))
        .await;

    script.set(&json!({ "tools": [
        { "name": "args", "inputSchema": { "type": "object", "properties": { "request_heartbeat": { "type": "boolean" } } } },
    ] }));
    let args = run_path(&one, &server, "args").await;
    let heartbeat = json!({ "args": { "request_heartbeat": true } });
    assert_eq!(other.post(&args, &heartbeat).await.expect(200)["func_return"], "{}", "not declared");
    one.refresh(id(&server)).await.expect(200);
    until("the other knows the new definition", async || {
        other.post(&args, &heartbeat).await.expect(200)["func_return"] == r#"{"request_heartbeat":true}"#
    })
    .await;
    until("a tool that is gone is gone there, too", async || other.post(&run, &json!({})).await.status == 404).await;
    stop(one, other).await;
}

/// Whether a process is there.
fn lives(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_server_ends_everywhere() {
    let Some((one, other)) = two(|_| {}).await else { return };
    let (server, _script) = one.create_stdio("ending", &json!({})).await;
    let (stays, _other_script) = one.create_stdio("staying", &json!({})).await;
    let mut pids = Vec::new();
    for portolan in [&one, &other] {
        for server in [&server, &stays] {
            let ran = portolan.run(id(server), "pid", json!({})).await;
            pids.push(ran["func_return"].as_str().unwrap().to_owned());
        }
    }
    assert!(pids.iter().all(|pid| lives(pid)), "{pids:?}");
    let homes = |portolan: &Portolan| std::fs::read_dir(portolan.folder().join("data/children")).unwrap().count();
    assert_eq!((homes(&one), homes(&other)), (2, 2));
    let run = run_path(&one, &server, "echo").await;
    one.delete(&path(&server)).await.expect(204);
    until("the other does not run it any more", async || other.post(&run, &json!({})).await.status == 404).await;
    eventually("its processes have ended", || !lives(&pids[0]) && !lives(&pids[2])).await;
    eventually("and left nothing", || homes(&one) == 1 && homes(&other) == 1).await;
    assert!(lives(&pids[1]) && lives(&pids[3]), "those of another server go on");
    stop(one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_deleted_while_another_connects_to_it_leaves_nothing() {
    let Some((one, other)) = two(|_| {}).await else { return };
    let (server, script) = one.create_stdio("brief", &json!({})).await;
    script.set(&json!({ "list_delay_ms": 1_500 }));
    let lists = script.count("tools/list");
    let refreshing = other.refresh(id(&server));
    let deleting = async {
        eventually("the other asks for a list", || script.count("tools/list") > lists).await;
        one.delete(&path(&server)).await.expect(204);
    };
    let (refreshed, ()) = tokio::join!(refreshing, deleting);
    refreshed.expect(404);
    eventually("no process is left", || one.children().is_empty()).await;
    assert_eq!(one.get("/v1/mcp-servers/").await.expect(200), json!([]));
    stop(one, other).await;
}
