//! Running tools: what comes back, and what a lost session does (CONTRACT rows 13 and 14).

use std::time::Duration;

use serde_json::{Value, json};

use crate::fake::script::with_tools;
use crate::fake::{self, Fake, Script};
use crate::harness::{Portolan, eventually, kill};

const ALL: [&str; 21] = [
    "echo",
    "add",
    "two_texts",
    "image",
    "resource",
    "link",
    "structured",
    "text_and_structured",
    "empty",
    "fail",
    "rpc_error",
    "weird",
    "args",
    "pid",
    "slow",
    "progress",
    "die",
    "die_after",
    "count",
    "wide",
    "never",
];

fn script(names: &[&str]) -> Script {
    serde_json::from_value(json!({ "tools": with_tools(names) })).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_one_text_and_the_whole_result_untouched_over_each_transport() {
    let portolan = Portolan::start().await;
    let (http, sse) = (fake::http::serve(Fake::new(script(&ALL))), fake::sse::serve(Fake::new(script(&ALL))));
    let (stdio, _script) = portolan.create_stdio("stdio", &json!({ "tools": with_tools(&ALL) })).await;
    let over_http = portolan.create("http", json!({ "server_url": http.url })).await;
    let over_sse = portolan.create("sse", json!({ "mcp_server_type": "sse", "server_url": sse.url })).await;
    for server in [stdio, over_http, over_sse] {
        assert_eq!(server["status"]["state"], "ready", "{server}");
        let id = server["id"].as_str().unwrap();
        for (tool, args, status, text) in [
            ("echo", json!({"message": "héllo \u{0}\n"}), "success", "héllo \u{0}\n"),
            ("add", json!({"a": 2, "b": 40}), "success", "42"),
            ("two_texts", json!({}), "success", "one two\nlines "),
            ("image", json!({}), "success", r#"pic: {"type":"image","data":"aGVsbG8=","mimeType":"image/png"}"#),
            ("structured", json!({}), "success", r#"{"n":1,"big":123456789012345678901234567890}"#),
            ("empty", json!({}), "success", "Empty response from tool"),
            ("fail", json!({}), "error", "it failed badly"),
            ("rpc_error", json!({}), "error", "inner trouble"),
            ("weird", json!({}), "success", r#"{"type":"hologram","v":1}"#),
            ("progress", json!({"steps": 3, "ms": 5}), "success", "done"),
        ] {
            let run = portolan.run(id, tool, args).await;
            assert_eq!((&run["status"], &run["func_return"]), (&json!(status), &json!(text)), "{tool}");
            let keys: Vec<_> = run.as_object().unwrap().keys().map(String::as_str).collect();
            let lettas = ["status", "func_return", "agent_state", "stdout", "stderr", "sandbox_config_fingerprint"];
            assert_eq!(keys, [&lettas[..], &["result", "duration_ms"]].concat());
        }
        let raw = portolan.try_run(id, "structured", json!({})).await.text;
        assert!(raw.contains(r#""big":123456789012345678901234567890"#) && raw.contains(r#""x-extra":true"#), "{raw}");
        let resource = portolan.run(id, "resource", json!({})).await;
        let block: Value = serde_json::from_str(resource["func_return"].as_str().unwrap()).unwrap();
        assert_eq!((&block["type"], &block["resource"]["text"]), (&json!("resource"), &json!("body")));
        assert_eq!(resource["result"]["content"][0], block);
        let wide = portolan.run(id, "wide", json!({"bytes": 3_000_000})).await;
        assert_eq!(wide["func_return"].as_str().unwrap().len(), 3_000_000);
        let both = portolan.run(id, "text_and_structured", json!({})).await;
        assert!(
            !both["func_return"].as_str().unwrap().contains('{') && both["result"]["structuredContent"].is_object()
        );
        assert_eq!(portolan.run(id, "rpc_error", json!({})).await["result"], Value::Null);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_without_body_has_no_arguments_and_heartbeats_stay_here() {
    let portolan = Portolan::start().await;
    let listed = json!([
        {"name": "args", "inputSchema": {"type": "object", "properties": {"a": {"type": "string"}}}},
        {"name": "echo", "inputSchema": {"type": "object", "properties": {"request_heartbeat": {"type": "string"}, "message": {}}}},
        {"name": "meta", "inputSchema": {"type": "object"}},
    ]);
    let (server, script) = portolan.create_stdio("hb", &json!({ "tools": listed })).await;
    let id = server["id"].as_str().unwrap();
    let tool = portolan.tool_id(id, "args").await;
    let path = format!("/v1/mcp-servers/{id}/tools/{tool}/run");
    for request in [
        portolan.request("POST", &path),
        portolan.request("POST", &path).header("content-type", "text/plain"),
        portolan.request("POST", &path).json(&json!({})),
        portolan.request("POST", &path).json(&json!({"args": {}})),
        portolan.request("POST", &path).json(&json!({"args": {"request_heartbeat": true}})),
        portolan.request("POST", &path).header("content-type", "APPLICATION/JSON; charset=utf-8").body("{}"),
    ] {
        let answer = crate::harness::Answer::of("POST", &path, request).await.expect(200);
        assert_eq!(answer["func_return"], "{}");
    }
    let args = portolan.run(id, "args", json!({"a": "x", "request_heartbeat": true, "n": {"deep": [1, null]}})).await;
    assert_eq!(args["func_return"], r#"{"a":"x","n":{"deep":[1,null]}}"#);
    portolan.run(id, "echo", json!({"message": "m", "request_heartbeat": "mine"})).await;
    let (_, last) = script.seen().pop().unwrap();
    assert_eq!(last["params"]["arguments"]["request_heartbeat"], "mine", "the tool declares it");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_kept_and_shared() {
    let portolan = Portolan::start().await;
    let (server, script) =
        portolan.create_stdio("kept", &json!({ "tools": with_tools(&["count", "pid", "never"]) })).await;
    let id = server["id"].as_str().unwrap();
    let pid = portolan.run(id, "pid", json!({})).await["func_return"].clone();
    for count in 1..=5 {
        assert_eq!(portolan.run(id, "count", json!({})).await["func_return"], count.to_string());
    }
    assert_eq!(portolan.run(id, "pid", json!({})).await["func_return"], pid);
    assert_eq!(script.methods().iter().filter(|method| *method == "initialize").count(), 1);
    let called = |name: &str| script.seen().iter().any(|(_, message)| message["params"]["name"] == name);
    tokio::select! {
        never = portolan.run(id, "never", json!({})) => panic!("{never}"),
        () = async {
            eventually("the first call is under way", || called("never")).await;
            let echo = portolan.run(id, "echo", json!({"message": "overtakes"})).await;
            assert_eq!(echo["func_return"], "overtakes", "a call that takes its time holds up no other");
        } => {}
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_at_once_open_one_session_and_get_their_own_answers() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("flight", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    kill(portolan.children()[0]);
    eventually("the child is gone", || portolan.children().is_empty()).await;
    let tool = portolan.tool_id(id, "echo").await;
    let path = format!("/v1/mcp-servers/{id}/tools/{tool}/run");
    let calls = (0..50).map(|number| {
        let (portolan, path) = (&portolan, &path);
        async move {
            let message = format!("caller {number}");
            let run = portolan.post(path, &json!({"args": {"message": message}})).await.expect(200);
            assert_eq!(run["func_return"], message);
        }
    });
    futures_util::future::join_all(calls).await;
    assert_eq!(portolan.children().len(), 1);
    assert_eq!(
        script.methods().iter().filter(|method| *method == "initialize").count(),
        2,
        "one before the kill, one after"
    );
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_death_between_calls_the_next_call_reconnects() {
    let portolan = Portolan::start().await;
    let (stdio, _script) = portolan.create_stdio("stdio", &json!({ "tools": with_tools(&["pid"]) })).await;
    let id = stdio["id"].as_str().unwrap();
    for _ in 0..3 {
        let pid = portolan.run(id, "pid", json!({})).await["func_return"].clone();
        kill(pid.as_str().unwrap().parse().unwrap());
        eventually("it is reaped", || portolan.children().is_empty()).await;
        let run = portolan.run(id, "pid", json!({})).await;
        assert_eq!(run["status"], "success");
        assert_ne!(run["func_return"], pid);
    }

    let http = fake::http::serve(Fake::new(Script::default()));
    let server = portolan.create("http", json!({ "server_url": http.url })).await;
    let id = server["id"].as_str().unwrap();
    let echo = json!({"message": "back"});
    http.drop_sessions();
    assert_eq!(portolan.run(id, "echo", echo.clone()).await["func_return"], "back", "a session that expired");
    let addr = http.addr;
    http.stop().await;
    let away = portolan.try_run(id, "echo", echo.clone()).await;
    assert_eq!(away.header("x-should-retry"), Some("false"));
    let body = away.expect(502);
    assert_eq!(body["error"]["type"], "mcp_connection_error");
    assert!(body["error"]["detail"].as_str().unwrap().contains("refused"), "{body}");
    let path = format!("/v1/mcp-servers/{id}");
    assert_eq!(portolan.get(&path).await.expect(200)["status"]["state"], "unreachable");
    let _again = fake::http::serve_on(addr, Fake::new(Script::default()));
    assert_eq!(portolan.run(id, "echo", echo.clone()).await["func_return"], "back");
    assert_eq!(portolan.get(&path).await.expect(200)["status"]["state"], "ready");

    let sse = fake::sse::serve(Fake::new(Script::default()));
    let server = portolan.create("sse", json!({ "mcp_server_type": "sse", "server_url": sse.url })).await;
    let id = server["id"].as_str().unwrap();
    sse.cut_streams();
    eventually("the stream is gone", || sse.streams() == 0).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(portolan.run(id, "echo", echo).await["func_return"], "back");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_during_a_call_is_an_error_result_and_never_a_repeat() {
    let portolan = Portolan::start().await;
    let (stdio, log) = portolan.create_stdio("stdio", &json!({ "tools": with_tools(&["die", "die_after"]) })).await;
    let (http, sse) = (fake::http::serve(Fake::new(script(&ALL))), fake::sse::serve(Fake::new(script(&ALL))));
    let over_http = portolan.create("http", json!({ "server_url": http.url })).await;
    let over_sse = portolan.create("sse", json!({ "mcp_server_type": "sse", "server_url": sse.url })).await;
    for server in [&stdio, &over_http, &over_sse] {
        let id = server["id"].as_str().unwrap();
        let run = portolan.run(id, "die", json!({})).await;
        assert_eq!(run["status"], "error", "{run}");
        assert!(run["func_return"].as_str().unwrap().contains("may have run"), "{run}");
        assert_eq!(portolan.run(id, "echo", json!({"message": "on"})).await["func_return"], "on");
    }
    let calls = |requests: Vec<Value>| requests.iter().filter(|body| body["params"]["name"] == "die").count();
    assert_eq!(calls(log.seen().into_iter().map(|(_, message)| message).collect()), 1);
    assert_eq!(calls(http.requests().into_iter().map(|seen| seen.body).collect()), 1);
    assert_eq!(calls(sse.requests().into_iter().map(|seen| seen.body).collect()), 1);
    let id = stdio["id"].as_str().unwrap();
    let last = portolan.run(id, "die_after", json!({})).await;
    assert_eq!(last["status"], "success", "an answer that was written counts, {last}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_turned_away_says_so_and_the_status_knows() {
    let portolan = Portolan::start().await;
    for kind in ["streamable_http", "sse"] {
        let running = match kind {
            "sse" => fake::sse::serve(Fake::new(Script::default())),
            _ => fake::http::serve(Fake::new(Script::default())),
        };
        let config = json!({ "mcp_server_type": kind, "server_url": running.url });
        let server = portolan.create(kind, config).await;
        let id = server["id"].as_str().unwrap();
        let tool = portolan.tool_id(id, "echo").await;
        let path = format!("/v1/mcp-servers/{id}/tools/{tool}/run");
        running.set_script(serde_json::from_value(json!({"require_header": ["x-key", "k"]})).unwrap());
        let run = portolan.post(&path, &json!({})).await.expect(200);
        assert_eq!(run["status"], "error");
        let text = run["func_return"].as_str().unwrap();
        assert!(text.contains("did not take the call") && text.contains("sign-in"), "{text}");
        let one = format!("/v1/mcp-servers/{id}");
        assert_eq!(portolan.get(&one).await.expect(200)["status"]["state"], "auth_required");
        running.set_script(Script::default());
        let body = json!({"args": {"message": "in again"}});
        assert_eq!(portolan.post(&path, &body).await.expect(200)["func_return"], "in again");
        assert_eq!(portolan.get(&one).await.expect(200)["status"]["state"], "ready");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_over_its_time_is_an_error_result_and_is_cancelled() {
    let portolan = Portolan::start_with(|settings| settings.upstream.run_timeout = Duration::from_millis(300)).await;
    let (stdio, log) = portolan.create_stdio("stdio", &json!({ "tools": with_tools(&["never"]) })).await;
    let http = fake::http::serve(Fake::new(script(&["never"])));
    let over_http = portolan.create("http", json!({ "server_url": http.url })).await;
    for server in [&stdio, &over_http] {
        let run = portolan.run(server["id"].as_str().unwrap(), "never", json!({})).await;
        assert_eq!(run["status"], "error");
        assert!(run["func_return"].as_str().unwrap().contains("did not answer within 0.3 s"), "{run}");
    }
    eventually("the stdio server is told", || log.methods().iter().any(|method| method == "notifications/cancelled"))
        .await;
    eventually("the HTTP server is told", || http.fake().running() == 0).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_cancels_its_run() {
    let portolan = Portolan::start().await;
    let (server, log) = portolan.create_stdio("left", &json!({ "tools": with_tools(&["never"]) })).await;
    let id = server["id"].as_str().unwrap();
    let tool = portolan.tool_id(id, "never").await;
    let path = format!("/v1/mcp-servers/{id}/tools/{tool}/run");
    let waiting = portolan.request("POST", &path).json(&json!({})).timeout(Duration::from_millis(300)).send();
    assert!(waiting.await.unwrap_err().is_timeout());
    eventually("the server is told", || log.methods().iter().any(|method| method == "notifications/cancelled")).await;
    portolan.stop().await;
}
