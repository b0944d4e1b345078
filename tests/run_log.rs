//! The run log: a row for each run, whatever came of it and however it was asked for; no run waits for it, a stop loses none,
//! and what is not meant to be kept is not.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use portolan::config::{Settings, ToolPolicy};
use portolan::model::{By, sha256_hex};
use portolan::store::Database as Pools;
use serde_json::{Map, Value, json};

use crate::fake::{self, Fake, Script};
use crate::harness::{Answer, Portolan, Remote, eventually};

const RUNS: &str = "/v1/portolan/runs";
const ADMIN: &str = "ptl_admin_of_the_run_log";
const RUNNER: &str = "ptl_runner_of_the_run_log";
/// Holds every row that a test makes.
const LONG: Duration = Duration::from_secs(120);

/// Settings under which there are two callers, `PORTOLAN_TOKEN` and `runner`.
fn guarded(folder: &Path) -> impl FnOnce(&mut Settings) {
    let file = folder.join("tokens");
    std::fs::write(&file, format!("runner:run:{}\n", sha256_hex(RUNNER))).unwrap();
    move |settings| {
        settings.tokens.token = Some(ADMIN.to_owned().into());
        settings.tokens.tokens_file = Some(file);
    }
}

async fn page(remote: &Remote, query: &str) -> (Vec<Value>, Option<String>) {
    let answer = remote.send("GET", &format!("{RUNS}?{query}"), None).await.expect(200);
    let next = answer["next"].as_str().map(str::to_owned);
    (answer["runs"].as_array().unwrap().clone(), next)
}

async fn runs(remote: &Remote, query: &str) -> Vec<Value> {
    page(remote, query).await.0
}

/// All rows that a query finds, page by page, and `between` after each page.
async fn all(remote: &Remote, query: &str, between: impl AsyncFn()) -> Vec<Value> {
    let (mut found, mut after) = (Vec::new(), String::new());
    loop {
        let (runs, next) = page(remote, &format!("{query}&after={after}")).await;
        found.extend(runs);
        let Some(next) = next else { return found };
        after = next;
        between().await;
    }
}

fn column<'a>(runs: &'a [Value], key: &str) -> Vec<&'a str> {
    runs.iter().map(|run| run[key].as_str().unwrap_or("")).collect()
}

/// A Portolan without tokens and an HTTP server with the tools of the fake's default script.
async fn scene(change: impl FnOnce(&mut Settings)) -> (Portolan, fake::Running, String) {
    let portolan = Portolan::start_with(change).await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let server = portolan.create("search", json!({ "server_url": http.url })).await;
    (portolan, http, server["id"].as_str().unwrap().to_owned())
}

/// Everything in the tables of the logs, as the database has it.
async fn tables(portolan: &Portolan) -> String {
    const ROWS: &str = "SELECT id || ' ' || coalesce(caller, '') || ' ' || server_name || ' ' || tool_name || ' ' || outcome \
                        || ' ' || coalesce(error_code, '') || ' ' || coalesce(content, '') FROM runs UNION ALL SELECT \
                        coalesce(caller, '') || ' ' || action || ' ' || coalesce(server_name, '') || ' ' || details FROM changes";
    let rows: Vec<String> = match &portolan.app.store.database {
        Pools::Postgres(pool) => sqlx::query_scalar(ROWS).fetch_all(pool).await.unwrap(),
        Pools::Sqlite { read, .. } => sqlx::query_scalar(ROWS).fetch_all(read).await.unwrap(),
    };
    rows.join("\n")
}

/// Holds the table until it is dropped: no row can be written.
async fn hold(portolan: &Portolan) -> Box<dyn Send> {
    match &portolan.app.store.database {
        Pools::Postgres(pool) => {
            let mut transaction = pool.begin().await.unwrap();
            sqlx::query("LOCK TABLE runs IN SHARE MODE").execute(&mut *transaction).await.unwrap();
            Box::new(transaction)
        }
        Pools::Sqlite { write, .. } => Box::new(write.begin().await.unwrap()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_has_one_row_however_it_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let portolan = Portolan::start_with(guarded(folder.path())).await;
    let (admin, runner) = (portolan.remote_with(ADMIN), portolan.remote_with(RUNNER));
    let http = fake::http::serve(Fake::new(Script::default()));
    let server = admin.create("search", json!({ "server_url": http.url })).await;
    let id = server["id"].as_str().unwrap();
    let path = admin.path(id, "echo").await;
    let body = json!({"args": {"message": "héllo"}});
    runner.post(&path, &body).await.expect(200);
    let keyed = || runner.request("POST", &path).header("idempotency-key", "one").json(&body);
    for _ in 0..3 {
        Answer::of("POST", &path, keyed()).await.expect(200);
    }
    let retried =
        |count: &'static str| admin.request("POST", &path).header("x-stainless-retry-count", count).json(&body);
    for count in ["0", "1", "2"] {
        Answer::of("POST", &path, retried(count)).await.expect(200);
    }
    let legacy = "/v1/tools/mcp/servers/search/tools/echo/execute";
    runner.post(legacy, &json!({"args": {"message": "héllo"}})).await.expect(200);

    let found = runs(&admin, "").await;
    assert_eq!(column(&found, "caller"), ["runner", "PORTOLAN_TOKEN", "runner", "runner"], "newest first");
    for run in &found {
        assert_eq!((&run["server_name"], &run["tool_name"]), (&json!("search"), &json!("echo")), "{run}");
        assert_eq!((&run["mcp_server_id"], &run["outcome"]), (&json!(id), &json!("success")), "{run}");
        assert!(path.contains(run["tool_id"].as_str().unwrap()));
        assert_eq!((&run["args_bytes"], &run["result_bytes"]), (&json!(20), &json!(6)), "{run}");
        assert_eq!((&run["args"], &run["result"], &run["error_code"]), (&Value::Null, &Value::Null, &Value::Null));
        assert!(run["duration_ms"].as_u64().unwrap() < 60_000);
    }
    assert!(!tables(&portolan).await.contains("llo"), "what was said is not kept");
    for path in [RUNS, "/v1/portolan/changes"] {
        assert_eq!(runner.send("GET", path, None).await.expect(403)["code"], "forbidden");
        portolan.get(path).await.expect(401);
        admin.send("GET", path, None).await.expect(200);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_fails_is_there_with_its_code_and_what_is_no_run_is_not() {
    let (portolan, http, id) = scene(|settings| settings.upstream.tools.tool_changes = ToolPolicy::Hold).await;
    let remote = portolan.remote();
    assert_eq!(portolan.run(&id, "fail", json!({})).await["status"], "error");
    let path = remote.path(&id, "echo").await;
    let missing = path.replace(path.split('/').nth(5).unwrap(), "tool-00000000-0000-4000-8000-000000000000");
    portolan.post(&missing, &json!({})).await.expect(404);
    portolan.post(&path, &json!({"args": []})).await.expect(422);
    drop(http);
    let template = json!({"config": {"custom_headers": {"x-mark": "{{ NOBODY_HAS_IT }}"}}});
    portolan.patch(&format!("/v1/mcp-servers/{id}"), &template).await.expect(200);
    assert_eq!(portolan.post(&path, &json!({})).await.expect(422)["code"], "variable_missing");
    let dead = json!({"config": {"custom_headers": {}}});
    portolan.patch(&format!("/v1/mcp-servers/{id}"), &dead).await.expect(200);
    assert_eq!(portolan.post(&path, &json!({})).await.expect(502)["code"], "mcp_connection_error");
    let script = portolan.script(&json!({ "tools": [{"name": "args", "inputSchema": {"type": "object"}}] }));
    let config =
        json!({ "mcp_server_type": "stdio", "command": crate::harness::fake_mcp(), "args": ["stdio", script.0] });
    let held = portolan.create("held", config).await["id"].as_str().unwrap().to_owned();
    script.set(&json!({ "tools": [{"name": "args", "description": "new", "inputSchema": {"type": "object"}}] }));
    portolan.refresh(&held).await.expect(200);
    portolan.try_run(&held, "args", json!({})).await.expect(403);

    let found = runs(&remote, "").await;
    assert_eq!(column(&found, "error_code"), ["tool_held", "mcp_connection_error", "variable_missing", ""]);
    assert_eq!(column(&found, "outcome"), ["failed", "failed", "failed", "error"]);
    assert_eq!(found[3]["result_bytes"], "it failed badly".len());
    assert_eq!(found[0]["server_name"], "held");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_cut_off_is_there_too() {
    let portolan = Portolan::start_with(|settings| settings.entry.drain_timeout = Duration::from_secs(1)).await;
    let fake = Fake::new(Script::default());
    let http = fake::http::serve(fake.clone());
    let server = portolan.create("search", json!({ "server_url": http.url })).await;
    let remote = portolan.remote();
    let path = remote.path(server["id"].as_str().unwrap(), "never").await;
    let request = remote.request("POST", &path).json(&json!({})).send();
    let waiting = tokio::spawn(request);
    eventually("the call arrives", || fake.running() == 1).await;
    waiting.abort();
    eventually("the call is given up", || fake.running() == 0).await;
    let cut = loop {
        match runs(&remote, "").await.pop() {
            Some(run) => break run,
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    assert_eq!((&cut["outcome"], &cut["error_code"]), (&json!("error"), &json!("cancelled")));
    // One that a stop ends, too: its client is told so.
    let second = remote.request("POST", &path).json(&json!({}));
    let waiting = tokio::spawn(async move { second.send().await.unwrap().text().await.unwrap() });
    eventually("the call arrives", || fake.running() == 1).await;
    let portolan = portolan.reopen(|_| {}).await;
    assert!(waiting.await.unwrap().contains("stopped"));
    let found = runs(&portolan.remote(), "").await;
    assert_eq!(column(&found, "error_code"), ["cancelled", "cancelled"]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_found_by_what_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let portolan = Portolan::start_with(guarded(folder.path())).await;
    let (admin, runner) = (portolan.remote_with(ADMIN), portolan.remote_with(RUNNER));
    let http = fake::http::serve(Fake::new(Script::default()));
    let mut ids = Vec::new();
    for name in ["one", "two"] {
        let server = admin.create(name, json!({ "server_url": http.url })).await;
        let id = server["id"].as_str().unwrap().to_owned();
        admin.run(&id, "echo", json!({"message": name})).await;
        runner.run(&id, "fail", json!({})).await;
        ids.push(id);
    }
    let found = runs(&admin, "").await;
    assert_eq!(column(&found, "tool_name"), ["fail", "echo", "fail", "echo"]);
    let tool = found[0]["tool_id"].as_str().unwrap();
    let places = async |query: String| -> Vec<usize> {
        let some = runs(&admin, &query).await;
        some.iter().map(|run| found.iter().position(|one| one == run).unwrap()).collect()
    };
    assert_eq!(places(format!("mcp_server_id={}", ids[0])).await, [2, 3]);
    assert_eq!(places(format!("tool_id={tool}")).await, [0]);
    assert_eq!(places("caller=runner".into()).await, [0, 2]);
    assert_eq!(places("caller=PORTOLAN_TOKEN&outcome=success".into()).await, [1, 3]);
    assert_eq!(places("outcome=error".into()).await, [0, 2]);
    assert_eq!(places("outcome=failed".into()).await, [] as [usize; 0]);
    assert_eq!(places(format!("outcome=error&mcp_server_id={}&caller=runner&limit=1", ids[1])).await, [0]);
    assert_eq!(places("caller=nobody".into()).await, [] as [usize; 0]);
    assert_eq!(
        places("mcp_server_id=&tool_id=&caller=&outcome=&since=&until=&limit=&after=".into()).await,
        [0, 1, 2, 3]
    );
    let at = found[1]["started_at"].as_str().unwrap();
    let from: Vec<_> = (0..4).filter(|place| found[*place]["started_at"].as_str().unwrap() >= at).collect();
    let before: Vec<_> = (0..4).filter(|place| found[*place]["started_at"].as_str().unwrap() < at).collect();
    assert_eq!(places(format!("since={at}")).await, from);
    assert_eq!(places(format!("until={at}")).await, before);
    assert_eq!(places("since=2000-01-01T00:00:00+01:00&until=0000-01-01T00:00:00Z".into()).await, [] as [usize; 0]);
    assert_eq!(places("until=9999-12-31T23:59:59-23:59".into()).await, [0, 1, 2, 3]);
    for (query, key) in [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=x", "limit"),
        ("limit=1&limit=2", "limit"),
        ("after=x", "after"),
        ("after=0000000000000001", "after"),
        ("after=0123456789ABCDEF0123456789ABCDEF", "after"),
        ("outcome=bad", "outcome"),
        ("since=yesterday", "since"),
        ("until=2026-13-01T00:00:00Z", "until"),
        ("caller=a%00b", "caller"),
    ] {
        let refused = admin.send("GET", &format!("{RUNS}?{query}"), None).await.expect(422);
        assert_eq!(refused["errors"][0]["loc"], json!(["query", key]), "{query}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_have_each_row_once_while_others_come_in() {
    let (portolan, _http, id) = scene(|_| {}).await;
    let remote = portolan.remote();
    let path = remote.path(&id, "echo").await;
    let run = async || drop(remote.post(&path, &json!({"args": {"message": ""}})).await.expect(200));
    for _ in 0..25 {
        run().await;
    }
    let before = runs(&remote, "limit=500").await;
    assert_eq!(before.len(), 25);
    for query in ["limit=4".to_owned(), format!("limit=4&mcp_server_id={id}"), "limit=4&outcome=success".to_owned()] {
        let now = runs(&remote, "limit=500").await;
        let found = all(&remote, &query, async || run().await).await;
        assert_eq!(found, now, "{query}");
    }
    let (five, next) = page(&remote, "limit=5").await;
    assert!(five.len() == 5 && next.is_some());
    let count = runs(&remote, "limit=500").await.len();
    assert_eq!(page(&remote, &format!("limit={count}")).await.1, None, "nothing is left");
    portolan.stop().await;
}

/// Runs from `callers` at a time, and after a stop each of them is there.
async fn none_is_missing(number: usize, callers: usize) {
    let (portolan, _http, id) = scene(|_| {}).await;
    let remote = portolan.remote();
    let path = remote.path(&id, "echo").await;
    let run = |number: usize| {
        let (remote, path) = (&remote, &path);
        async move {
            let body = json!({"args": {"message": "x".repeat(number % 50)}});
            crate::harness::patiently(async || remote.post(path, &body).await).await.expect(200);
        }
    };
    stream::iter(0..number).map(run).buffer_unordered(callers).collect::<()>().await;
    let log = portolan.app.run_log.clone();
    let portolan = portolan.reopen(|_| {}).await;
    assert_eq!((log.depth(), log.dropped()), (0, 0));
    let found = all(&portolan.remote(), "limit=500&outcome=success", async || ()).await;
    let ids: BTreeSet<_> = column(&found, "id").into_iter().collect();
    assert_eq!((found.len(), ids.len()), (number, number));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_loses_no_row() {
    none_is_missing(1_000, 32).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long"]
async fn a_stop_loses_none_of_ten_thousand_rows() {
    none_is_missing(10_000, 32).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_costs_rows_and_no_run() {
    const MOST: usize = 16_384;
    let (portolan, _http, id) = scene(|_| {}).await;
    let tool = portolan.tool_id(&id, "echo").await;
    let found = portolan.app.store.tool(&id, &tool).await.unwrap().unwrap();
    let held = hold(&portolan).await;
    let log = portolan.app.run_log.clone();
    let by = By::default();
    for _ in 0..MOST * 2 {
        log.begin(&by, &found, &Map::new(), &Arc::default()).ended(false, "");
    }
    let (depth, dropped) = (log.depth(), log.dropped() as usize);
    assert_eq!(depth + dropped, MOST * 2, "waiting or counted");
    assert!((MOST..MOST + 1_000).contains(&depth), "{depth} and what is being written");
    // The runs themselves go on, and so does the page of runs.
    assert_eq!(portolan.run(&id, "echo", json!({"message": "on"})).await["func_return"], "on");
    // The writer may have made room for one more.
    let now_dropped = log.dropped() as usize;
    assert!((dropped..=dropped + 1).contains(&now_dropped), "{now_dropped} after {dropped}");
    assert_eq!(runs(&portolan.remote(), "").await, [] as [Value; 0]);
    drop(held);
    let deadline = tokio::time::Instant::now() + LONG;
    while log.depth() > 0 {
        assert!(tokio::time::Instant::now() < deadline, "{} rows wait", log.depth());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let found = all(&portolan.remote(), "limit=500", async || ()).await;
    assert_eq!(found.len(), MOST * 2 + 1 - now_dropped, "what was not dropped is there, once");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_is_kept_sealed_where_it_is_asked_for() {
    let (portolan, _http, id) = scene(|settings| settings.run_log.log_arguments = true).await;
    let remote = portolan.remote();
    portolan.run(&id, "echo", json!({"message": "canary-said", "n": [1, null]})).await;
    let long = "é".repeat(20_000);
    portolan.run(&id, "echo", json!({ "message": long })).await;
    let calls = runs(&remote, "").await;
    assert_eq!(calls[1]["args"], json!({"message": "canary-said", "n": [1, null]}));
    assert_eq!((&calls[1]["result"], &calls[1]["args_cut"]), (&json!("canary-said"), &json!(false)));
    let (args, result) = (calls[0]["args"].as_str().unwrap(), calls[0]["result"].as_str().unwrap());
    assert!(args.starts_with(r#"{"message":"éé"#) && long.starts_with(result), "the start of each");
    for (text, most) in [(args, 16 * 1024), (result, 16 * 1024)] {
        assert!((most - 1..=most).contains(&text.len()), "{}", text.len());
    }
    assert_eq!((&calls[0]["args_cut"], &calls[0]["result_cut"]), (&json!(true), &json!(true)));
    assert_eq!((&calls[0]["args_bytes"], &calls[0]["result_bytes"]), (&json!(40_014), &json!(40_000)));
    let stored = tables(&portolan).await;
    assert!(!stored.contains("canary") && stored.contains(" v1."), "{stored}");
    // Without the setting what was kept is there still, and nothing is added.
    let portolan = portolan.reopen(|_| {}).await;
    portolan.run(&id, "echo", json!({"message": "unheard"})).await;
    let later = runs(&portolan.remote(), "").await;
    assert_eq!(
        (&later[0]["args"], &later[0]["result"], &later[0]["args_cut"]),
        (&Value::Null, &Value::Null, &json!(false))
    );
    assert_eq!(later[1..], calls[..]);
    portolan.stop().await;
}

/// What was said is sealed with the new key after a rotation, and a key that seals nothing else is missed.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_goes_with_a_rotation_of_keys() {
    let folder = tempfile::tempdir().unwrap();
    let keys = |keys: &[u8]| {
        let lines: String = keys.iter().map(|key| format!("{key:02x}").repeat(32) + "\n").collect();
        std::fs::write(folder.path().join("keys"), lines).unwrap();
        let owner = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(folder.path().join("keys"), owner).unwrap();
    };
    keys(&[1]);
    let file = folder.path().join("keys");
    let (portolan, _http, id) = scene(|settings| {
        settings.run_log.log_arguments = true;
        settings.secrets.key = None;
        settings.secrets.key_file = Some(file);
    })
    .await;
    let remote = portolan.remote();
    for number in 0..120 {
        remote.run(&id, "echo", json!({ "message": format!("said {number}") })).await;
    }
    let before = runs(&remote, "limit=500").await;
    portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204);
    let store = &portolan.app.store;
    let (old, new) = ("72cd6e8422c4", "75877bb41d39");
    assert_eq!(store.sealed_by().await.unwrap(), [(old.to_owned(), 1)].into(), "the runs of one server");
    keys(&[2, 1]);
    store.reload_keys().await.unwrap();
    keys(&[2]);
    assert!(store.reload_keys().await.unwrap_err().to_string().contains("still seals"));
    let rotated = store.rotate(|_, _| ()).await.unwrap();
    assert_eq!((rotated.sealed_by, rotated.unopened), ([(new.to_owned(), 1)].into(), 0));
    store.reload_keys().await.unwrap();
    assert_eq!(runs(&remote, "limit=500").await, before);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_is_forgotten_and_what_is_not_stays() {
    const KEEP: Duration = Duration::from_millis(1);
    let (portolan, _http, id) = scene(|_| {}).await;
    for number in 0..3 {
        portolan.run(&id, "echo", json!({ "message": number.to_string() })).await;
    }
    let changes = async |portolan: &Portolan| {
        let answer = portolan.get("/v1/portolan/changes").await.expect(200);
        answer["changes"].as_array().unwrap().len()
    };
    let portolan = portolan.reopen(|settings| settings.run_log.keep_runs = KEEP).await;
    let deadline = tokio::time::Instant::now() + LONG;
    while !runs(&portolan.remote(), "").await.is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "old runs stay");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let kept = changes(&portolan).await;
    assert!(kept >= 2, "changes have a time of their own");
    let portolan = portolan.reopen(|settings| settings.run_log.keep_changes = KEEP).await;
    portolan.run(&id, "echo", json!({"message": ""})).await;
    while changes(&portolan).await > 0 {
        assert!(tokio::time::Instant::now() < deadline, "old changes stay");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(runs(&portolan.remote(), "").await.len(), 1, "runs have a time of their own");
    portolan.stop().await;
}
