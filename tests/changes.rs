//! Who changed what: each change that happened has a row, one that did not has none, and no row tells a secret.

use std::path::Path;
use std::process::{Command, Stdio};

use portolan::config::{Settings, ToolPolicy};
use portolan::model::sha256_hex;
use serde_json::{Value, json};

use crate::fake::{self, Fake, Script};
use crate::harness::{Portolan, Remote, fake_mcp};
use crate::process::command;

const CHANGES: &str = "/v1/portolan/changes";
const ADMIN: &str = "ptl_admin_of_the_changes";
const OTHER: &str = "ptl_other_admin_of_the_changes";

fn guarded(folder: &Path) -> impl FnOnce(&mut Settings) {
    let file = folder.join("tokens");
    std::fs::write(&file, format!("ops:admin:{}\n", sha256_hex(OTHER))).unwrap();
    move |settings| {
        settings.tokens.token = Some(ADMIN.to_owned().into());
        settings.tokens.tokens_file = Some(file);
        settings.upstream.tools.tool_changes = ToolPolicy::Hold;
    }
}

async fn changes(remote: &Remote, query: &str) -> Vec<Value> {
    let answer = remote.send("GET", &format!("{CHANGES}?{query}"), None).await.expect(200);
    answer["changes"].as_array().unwrap().clone()
}

/// The changes after this one, oldest first: action, server, who, details.
async fn since(remote: &Remote, last: &mut i64) -> Vec<(String, String, String, Value)> {
    let new: Vec<_> = changes(remote, "limit=500").await.into_iter().rev().collect();
    let new: Vec<_> = new.into_iter().filter(|change| change["id"].as_i64().unwrap() > *last).collect();
    *last = new.last().map_or(*last, |change| change["id"].as_i64().unwrap());
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let row = |change: &Value| {
        (text(&change["action"]), text(&change["server_name"]), text(&change["caller"]), change["details"].clone())
    };
    new.iter().map(row).collect()
}

fn row(action: &str, server: &str, caller: &str, details: Value) -> (String, String, String, Value) {
    (action.to_owned(), server.to_owned(), caller.to_owned(), details)
}

fn tools(names: &[(&str, &str)]) -> Value {
    let tool = |(name, description): &(&str, &str)| json!({ "name": name, "description": description, "inputSchema": {"type": "object"} });
    json!({ "tools": names.iter().map(tool).collect::<Vec<_>>() })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_has_its_row_and_a_failed_one_none() {
    let folder = tempfile::tempdir().unwrap();
    let portolan = Portolan::start_with(guarded(folder.path())).await;
    let (admin, ops) = (portolan.remote_with(ADMIN), portolan.remote_with(OTHER));
    let mut last = 0;
    let script = portolan.script(&tools(&[("one", ""), ("two", "")]));
    let config = json!({
        "mcp_server_type": "stdio", "command": fake_mcp(), "args": ["stdio", script.0], "env": {"CANARY_NAME": "canary-1"},
    });
    let id = ops.create("first", config.clone()).await["id"].as_str().unwrap().to_owned();
    let one = format!("/v1/mcp-servers/{id}");
    assert_eq!(
        since(&admin, &mut last).await,
        [
            row("server.created", "first", "ops", json!({"type": "stdio"})),
            row("tools.changed", "first", "ops", json!({"added": {"count": 2, "names": ["one", "two"]}})),
        ]
    );
    // What is refused did not happen.
    ops.post("/v1/mcp-servers/", &json!({ "server_name": "first", "config": config })).await.expect(409);
    ops.post("/v1/mcp-servers/", &json!({ "server_name": "", "config": {} })).await.expect(422);
    ops.create("second", json!({"server_url": "http://127.0.0.1:1/mcp"})).await;
    ops.send("PATCH", &one, Some(&json!({"server_name": "second"}))).await.expect(409);
    ops.send("PATCH", &one, Some(&json!({"config": {"command": 1}}))).await.expect(422);
    let nobody = "/v1/mcp-servers/mcp_server-00000000-0000-4000-8000-000000000000";
    ops.send("PATCH", nobody, Some(&json!({"server_name": "x"}))).await.expect(404);
    ops.send("DELETE", nobody, None).await.expect(404);
    ops.send("PATCH", &format!("{one}/refresh"), None).await.expect(200);
    let created = row("server.created", "second", "ops", json!({"type": "streamable_http"}));
    assert_eq!(since(&admin, &mut last).await, [created], "and a list that is the same changes nothing");

    let env = json!({"server_name": "1st", "config": {"env": {"CANARY_NAME": "canary-2"}}});
    admin.send("PATCH", &one, Some(&env)).await.expect(200);
    let details = json!({"changed": ["env"], "renamed_from": "first"});
    assert_eq!(since(&admin, &mut last).await, [row("server.updated", "1st", "PORTOLAN_TOKEN", details)]);
    script.set(&tools(&[("one", "other"), ("three", "")]));
    ops.send("PATCH", &format!("{one}/refresh"), None).await.expect(200);
    let details = json!({
        "added": {"count": 1, "names": ["three"]}, "updated": {"count": 1, "names": ["one"]},
        "deleted": {"count": 1, "names": ["two"]}, "held": {"count": 2},
    });
    assert_eq!(since(&admin, &mut last).await, [row("tools.changed", "1st", "ops", details)]);
    let approve = ops.path(&id, "one").await.replace("/run", "/approve");
    ops.post(&approve, &json!({"hash": "0".repeat(64)})).await.expect(409);
    for _ in 0..2 {
        ops.send("POST", &approve, None).await.expect(200);
    }
    let approved = since(&admin, &mut last).await;
    let [(action, _, caller, details)] = &approved[..] else { panic!("{approved:?}") };
    assert_eq!((&**action, &**caller), ("tool.approved", "ops"));
    assert!(approve.contains(details["tool_id"].as_str().unwrap()), "{details}");
    ops.send("DELETE", &one, None).await.expect(204);
    ops.send("DELETE", &one, None).await.expect(404);
    assert_eq!(since(&admin, &mut last).await, [row("server.deleted", "1st", "ops", json!({}))]);

    // The older routes, by names.
    let http = fake::http::serve(Fake::new(Script::default()));
    let flat =
        json!({"server_name": "old", "type": "streamable_http", "server_url": http.url, "auth_token": "canary-3"});
    ops.send("PUT", "/v1/tools/mcp/servers", Some(&flat)).await.expect(200);
    let created = since(&admin, &mut last).await;
    assert_eq!(created[0], row("server.created", "old", "ops", json!({"type": "streamable_http"})));
    assert_eq!((&*created[1].0, created.len()), ("tools.changed", 2));
    let names = created[1].3["added"]["names"].as_array().unwrap();
    assert!(names.len() <= 20 && created[1].3["added"]["count"].as_u64().unwrap() >= names.len() as u64);
    let token = json!({"auth_token": "canary-4"});
    ops.send("PATCH", "/v1/tools/mcp/servers/old", Some(&token)).await.expect(200);
    let details = json!({"changed": ["auth_token"]});
    assert_eq!(since(&admin, &mut last).await, [row("server.updated", "old", "ops", details)]);
    ops.send("DELETE", "/v1/tools/mcp/servers/old", None).await.expect(200);
    assert_eq!(since(&admin, &mut last).await, [row("server.deleted", "old", "ops", json!({}))]);

    // Several at once, or none.
    let dead = "http://127.0.0.1:1/mcp";
    let file = json!({"mcpServers": {"second": {"url": dead, "headers": {"x-mark": "canary-5"}}, "third": {"command": "nothing"}}});
    let import = |query: &str| format!("/v1/portolan/import?{query}");
    ops.post(&import("dry_run=true"), &file).await.expect(200);
    let wrong = json!({"mcpServers": {"fourth": {"command": "nothing"}, "fifth": {"url": "nowhere"}}});
    ops.post(&import(""), &wrong).await.expect(422);
    assert_eq!(since(&admin, &mut last).await, []);
    ops.post(&import(""), &file).await.expect(200);
    assert_eq!(
        since(&admin, &mut last).await,
        [
            row("server.updated", "second", "ops", json!({"changed": ["custom_headers"]})),
            row("server.created", "third", "ops", json!({"type": "stdio"})),
        ]
    );
    ops.post(&import("mode=replace"), &json!({"mcpServers": {"third": {"command": "nothing"}}})).await.expect(200);
    assert_eq!(since(&admin, &mut last).await, [row("server.deleted", "second", "ops", json!({}))]);

    let all = changes(&admin, "limit=500").await;
    assert!(!json!(all).to_string().to_lowercase().contains("canary"), "names of the keys of a configuration at most");
    let ids: Vec<_> = all.iter().map(|change| change["id"].as_i64().unwrap()).collect();
    assert!(ids.is_sorted_by(|one, next| one > next), "newest first: {ids:?}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_line_and_a_server_that_changes_by_itself_are_told_apart() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let file = portolan.folder().join("mcp.json");
    std::fs::write(&file, json!({"mcpServers": {"imported": {"url": http.url}}}).to_string()).unwrap();
    let url = portolan.database_url();
    let data = portolan.folder().join("data");
    let mut import: Command = command(portolan.folder(), url.as_deref());
    import.arg("import").arg(&file).arg("--data-dir").arg(&data).stdout(Stdio::null());
    assert!(tokio::task::spawn_blocking(move || import.status()).await.unwrap().unwrap().success());
    let mut last = 0;
    let remote = portolan.remote();
    let details = json!({"type": "streamable_http"});
    assert_eq!(since(&remote, &mut last).await, [row("server.created", "imported", "portolan import", details)]);
    // Nobody asks for its first list but Portolan.
    let portolan = portolan.reopen(|_| {}).await;
    let remote = portolan.remote();
    let deadline = tokio::time::Instant::now() + crate::harness::PATIENCE;
    let listed = loop {
        let new = since(&remote, &mut last).await;
        if !new.is_empty() {
            break new;
        }
        assert!(tokio::time::Instant::now() < deadline, "its tools are not listed");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!((&*listed[0].0, &*listed[0].2), ("tools.changed", "portolan serve"));
    portolan.create("open", json!({"server_url": "http://127.0.0.1:1/mcp"})).await;
    let details = json!({"type": "streamable_http"});
    assert_eq!(
        since(&remote, &mut last).await,
        [row("server.created", "open", "-", details)],
        "without tokens, nobody"
    );
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_found_by_what_is_asked_for_page_by_page() {
    let folder = tempfile::tempdir().unwrap();
    let portolan = Portolan::start_with(guarded(folder.path())).await;
    let (admin, ops) = (portolan.remote_with(ADMIN), portolan.remote_with(OTHER));
    let dead = json!({"server_url": "http://127.0.0.1:1/mcp"});
    let mut ids = Vec::new();
    for (number, remote) in [&admin, &ops, &admin, &ops, &admin].into_iter().enumerate() {
        let server = remote.create(&format!("s{number}"), dead.clone()).await;
        ids.push(server["id"].as_str().unwrap().to_owned());
    }
    let found = changes(&admin, "").await;
    assert_eq!(found.len(), 5);
    let places = async |query: String| -> Vec<usize> {
        let some = changes(&admin, &query).await;
        some.iter().map(|change| found.iter().position(|one| one == change).unwrap()).collect()
    };
    assert_eq!(places("caller=ops".into()).await, [1, 3]);
    assert_eq!(places(format!("mcp_server_id={}", ids[0])).await, [4]);
    let at = found[2]["at"].as_str().unwrap();
    assert_eq!(places(format!("since={at}")).await, [0, 1, 2]);
    assert_eq!(places(format!("until={at}&caller=ops")).await, [3]);
    let mut after = String::new();
    let mut paged = Vec::new();
    loop {
        let answer = admin.send("GET", &format!("{CHANGES}?limit=2&after={after}"), None).await.expect(200);
        paged.extend(answer["changes"].as_array().unwrap().clone());
        let Some(next) = answer["next"].as_str() else { break };
        after = next.to_owned();
        // What comes meanwhile is on no later page.
        admin.create(&format!("new {after}"), dead.clone()).await;
    }
    assert_eq!(paged, found);
    for query in ["limit=0", "limit=501", "after=1", "after=ffffffffffffffff", "since=x", "until=x", "caller=%00"] {
        assert_eq!(
            admin.send("GET", &format!("{CHANGES}?{query}"), None).await.expect(422)["code"],
            "invalid_request",
            "{query}"
        );
    }
    portolan.stop().await;
}

/// Whoever reads by ids must not be overtaken: an id that is seen later than a greater one would never be read.
#[tokio::test(flavor = "multi_thread")]
async fn ids_are_seen_in_their_order() {
    use futures_util::{StreamExt, stream};
    let portolan = Portolan::start().await;
    let dead = json!({"server_url": "http://127.0.0.1:1/mcp"});
    let over = tokio_util::sync::CancellationToken::new();
    let create = async {
        let create = |number: usize| {
            let (portolan, dead) = (&portolan, dead.clone());
            async move { drop(portolan.create(&format!("s{number}"), dead).await) }
        };
        stream::iter(0..100).map(create).buffer_unordered(8).collect::<()>().await;
        over.cancel();
    };
    let remote = portolan.remote();
    let read = async {
        let (mut last, mut seen) = (0, 0);
        loop {
            let ended = over.is_cancelled();
            seen += since(&remote, &mut last).await.len();
            if ended {
                return seen;
            }
        }
    };
    let ((), seen) = tokio::join!(create, read);
    assert_eq!(seen, 100, "all were new when they were first seen");
    portolan.stop().await;
}
