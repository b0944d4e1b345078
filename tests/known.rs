//! Runs of known tools need no database, and still honour every change that was acknowledged before them.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use portolan::model::{By, Config, Connector};
use portolan::store::ServerUpdate;
use serde_json::{Value, json};

use crate::fake::{self, Fake, Script};
use crate::harness::{Portolan, eventually};

/// Registers a server on `url` that gets `mark` as a header with every request.
async fn create(portolan: &Portolan, name: &str, url: &str, mark: u64) -> String {
    let config = json!({ "server_url": url, "custom_headers": marked(mark) });
    portolan.create(name, config).await["id"].as_str().unwrap().to_owned()
}

fn marked(mark: u64) -> Value {
    json!({ "x-mark": mark.to_string() })
}

async fn run_path(portolan: &Portolan, id: &str, tool: &str) -> String {
    format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, tool).await)
}

/// The mark that a run of the tool `headers` arrived with.
fn mark(run: &Value) -> u64 {
    assert_eq!(run["status"], "success", "{run}");
    let headers: Value = serde_json::from_str(run["func_return"].as_str().unwrap()).unwrap();
    headers["x-mark"].as_str().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_a_known_tool_needs_no_database() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let id = create(&portolan, "known", &http.url, 0).await;
    let (known, unknown) = (run_path(&portolan, &id, "headers").await, run_path(&portolan, &id, "count").await);
    // Until it is certain that others are heard nothing is remembered.
    eventually("changes by others are followed", || portolan.app.store.epoch().is_some()).await;
    assert_eq!(mark(&portolan.post(&known, &json!({})).await.expect(200)), 0);
    portolan.app.store.close().await;
    let run = portolan.post(&known, &json!({})).await;
    // What others may change is known for some seconds after the last word of them, if there was none of this server. The
    // test of that with two Portolans is in `feed`.
    if run.status != 503 || !portolan.shares_its_database() {
        assert_eq!(mark(&run.expect(200)), 0);
    }
    portolan.post(&unknown, &json!({})).await.expect(503);
    portolan.stop_without_database().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_follows_every_change_of_its_server() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let id = create(&portolan, "old", &http.url, 0).await;
    let other = create(&portolan, "other", &http.url, 99).await;
    let (path, server) = (run_path(&portolan, &id, "headers").await, format!("/v1/mcp-servers/{id}"));
    let theirs = run_path(&portolan, &other, "headers").await;
    for number in 1..=5 {
        let change = json!({ "config": { "custom_headers": marked(number) } });
        portolan.patch(&server, &change).await.expect(200);
        assert_eq!(mark(&portolan.post(&path, &json!({})).await.expect(200)), number);
        assert_eq!(mark(&portolan.post(&theirs, &json!({})).await.expect(200)), 99);
    }
    let tool = path.strip_suffix("/run").unwrap();
    assert_eq!(portolan.get(tool).await.expect(200)["tags"], json!(["mcp:old"]));
    portolan.patch(&server, &json!({ "server_name": "new" })).await.expect(200);
    assert_eq!(portolan.get(tool).await.expect(200)["tags"], json!(["mcp:new"]));
    assert_eq!(mark(&portolan.post(&path, &json!({})).await.expect(200)), 5);
    portolan.delete(&server).await.expect(204);
    portolan.post(&path, &json!({})).await.expect(404);
    portolan.get(tool).await.expect(404);
    assert_eq!(mark(&portolan.post(&theirs, &json!({})).await.expect(200)), 99);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_follows_every_refresh() {
    let portolan = Portolan::start().await;
    let args = |properties: Value| json!({"name": "args", "inputSchema": {"type": "object", "properties": properties}});
    let declared = args(json!({ "request_heartbeat": { "type": "boolean" } }));
    let (server, script) = portolan.create_stdio("listed", &json!({ "tools": [declared] })).await;
    let id = server["id"].as_str().unwrap();
    let path = run_path(&portolan, id, "args").await;
    let body = json!({ "args": { "request_heartbeat": true } });
    let run = portolan.post(&path, &body).await.expect(200);
    assert_eq!(run["func_return"], r#"{"request_heartbeat":true}"#, "the tool declares it");
    script.set(&json!({ "tools": [args(json!({}))] }));
    assert_eq!(portolan.refresh(id).await.expect(200)["updated"], json!(["args"]));
    let run = portolan.post(&path, &body).await.expect(200);
    assert_eq!(run["func_return"], "{}", "the tool declares it no more");
    script.set(&json!({ "tools": [] }));
    assert_eq!(portolan.refresh(id).await.expect(200)["deleted"], json!(["args"]));
    portolan.post(&path, &body).await.expect(404);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_during_a_run_is_for_the_next() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let id = create(&portolan, "slow", &http.url, 1).await;
    let (slow, headers) = (run_path(&portolan, &id, "slow").await, run_path(&portolan, &id, "headers").await);
    let body = json!({ "args": { "ms": 300 } });
    let change = async {
        eventually("the run is under way", || http.fake().running() > 0).await;
        let change = json!({ "config": { "custom_headers": marked(2) } });
        portolan.patch(&format!("/v1/mcp-servers/{id}"), &change).await.expect(200);
        mark(&portolan.post(&headers, &json!({})).await.expect(200))
    };
    let (run, next) = tokio::join!(portolan.post(&slow, &body), change);
    assert_eq!((run.expect(200)["func_return"].clone(), next), (json!("done"), 2));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_run_uses_what_was_before_an_acknowledged_change() {
    const CHANGES: u64 = 40;
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let id = create(&portolan, "busy", &http.url, 0).await;
    let (path, server) = (run_path(&portolan, &id, "headers").await, format!("/v1/mcp-servers/{id}"));
    let acknowledged = AtomicU64::new(0);
    let change = async {
        for number in 1..=CHANGES {
            let change = json!({ "config": { "custom_headers": marked(number) } });
            portolan.patch(&server, &change).await.expect(200);
            acknowledged.store(number, SeqCst);
            assert_eq!(mark(&portolan.post(&path, &json!({})).await.expect(200)), number);
        }
    };
    let runs = futures_util::future::join_all((0..4).map(|_| async {
        let mut runs = 0;
        while acknowledged.load(SeqCst) < CHANGES {
            let before = acknowledged.load(SeqCst);
            let run = portolan.post(&path, &json!({})).await;
            // A run that meets two changes in a row is told to come again.
            if run.status == 200 {
                let found = mark(&run.expect(200));
                assert!(found >= before, "change {before} was acknowledged, and the run used {found}");
                runs += 1;
            }
        }
        runs
    }));
    let ((), runs) = tokio::join!(change, runs);
    assert!(runs.iter().sum::<u64>() >= CHANGES, "{runs:?}");
    portolan.stop().await;
}

/// On SQLite, which one process has for itself, the change is made on the same store: it is honoured at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_another_portolan_makes_is_honoured_within_two_seconds() {
    const BOUND: Duration = Duration::from_secs(2);
    let portolan = Portolan::start().await;
    let another = portolan.another().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let id = create(&portolan, "shared", &http.url, 1).await;
    let path = run_path(&portolan, &id, "headers").await;
    assert_eq!(mark(&portolan.post(&path, &json!({})).await.expect(200)), 1);

    let change = |server: &portolan::model::Server| {
        let Config(Ok(Connector::StreamableHttp(mut remote))) = server.config.clone() else { panic!("it is HTTP") };
        remote.custom_headers = Some([("x-mark".to_owned(), "2".to_owned().into())].into());
        let connector = Some(Connector::StreamableHttp(remote));
        let server_name = server.server_name.clone();
        Ok::<_, portolan::store::Error>(ServerUpdate { server_name, connector, forgets_sign_in: false })
    };
    another.store.update_server(&id, &By::default(), change).await.unwrap().unwrap();
    let changed = Instant::now();
    loop {
        let asked = Instant::now();
        if mark(&portolan.post(&path, &json!({})).await.expect(200)) == 2 {
            break;
        }
        assert!(asked - changed < BOUND, "the old configuration is still in use");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    assert!(another.store.delete_server(&id, &By::default()).await.unwrap());
    let deleted = Instant::now();
    loop {
        let asked = Instant::now();
        if portolan.post(&path, &json!({})).await.status == 404 {
            break;
        }
        assert!(asked - deleted < BOUND, "the deleted server is still in use");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    portolan.stop().await;
}
