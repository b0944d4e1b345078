//! Running tools: what comes back, and what a lost session does (CONTRACT rows 13 and 14).

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::fake::script::with_tools;
use crate::fake::{self, Fake, Script};
use crate::harness::{PATIENCE, Portolan, eventually, kill};

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

/// The ids of the calls of `never` among these messages, and those of the cancelled requests.
fn cancellations(messages: &[Value]) -> (Vec<Value>, Vec<Value>) {
    let called = messages.iter().filter(|message| message["params"]["name"] == "never");
    let cancelled = messages.iter().filter(|message| message["method"] == "notifications/cancelled");
    let cancelled = cancelled.map(|message| message["params"]["requestId"].clone());
    (called.map(|message| message["id"].clone()).collect(), cancelled.collect())
}

fn bodies(running: &fake::Running) -> Vec<Value> {
    running.requests().into_iter().map(|seen| seen.body).collect()
}

/// Nobody waits for a call any more: the caller has left, or its time is over.
async fn cancelled(caller_leaves: bool) {
    let time = if caller_leaves { Duration::from_secs(60) } else { Duration::from_millis(700) };
    let portolan = Portolan::start_with(|settings| settings.upstream.run_timeout = time).await;
    let (stdio, log) = portolan.create_stdio("stdio", &json!({ "tools": with_tools(&["never"]) })).await;
    let sse = fake::sse::serve(Fake::new(script(&["never"])));
    let http = fake::http::serve(Fake::new(script(&["never"])));
    let modern = json!({"revisions": [fake::script::MODERN], "tools": with_tools(&["never"])});
    let modern = fake::http::serve(Fake::new(serde_json::from_value(modern).unwrap()));
    let over_sse = portolan.create("sse", json!({ "mcp_server_type": "sse", "server_url": sse.url })).await;
    let over_http = portolan.create("http", json!({ "server_url": http.url })).await;
    let over_modern = portolan.create("modern", json!({ "server_url": modern.url })).await;
    for (kind, server) in [("stdio", &stdio), ("sse", &over_sse), ("http", &over_http), ("modern", &over_modern)] {
        let seen = || match kind {
            "stdio" => log.seen().into_iter().map(|(_, message)| message).collect(),
            "sse" => bodies(&sse),
            "http" => bodies(&http),
            _ => bodies(&modern),
        };
        let id = server["id"].as_str().unwrap();
        // Requests before it: its id is not the first.
        portolan.run(id, "echo", json!({"message": "x"})).await;
        let path = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, "never").await);
        if caller_leaves {
            let waiting = portolan.request("POST", &path).json(&json!({})).send();
            tokio::select! {
                answer = waiting => panic!("{kind}: {answer:?}"),
                () = eventually("the call is under way", || cancellations(&seen()).0.len() == 1) => {}
            }
        } else {
            let run = portolan.post(&path, &json!({})).await.expect(200);
            assert_eq!(run["status"], "error", "{kind}");
            assert!(run["func_return"].as_str().unwrap().contains("did not answer within 0.7 s"), "{kind}: {run}");
        }
        if kind != "modern" {
            eventually("the server is told", || !cancellations(&seen()).1.is_empty()).await;
        }
        for running in [&sse, &http, &modern] {
            eventually("the server works on it no more", || running.fake().running() == 0).await;
        }
        assert_eq!(portolan.run(id, "echo", json!({"message": "on"})).await["func_return"], "on", "{kind}");
    }
    let stdio = log.seen().into_iter().map(|(_, message)| message).collect();
    // What was still to be said has been said then.
    portolan.stop().await;
    for (kind, messages) in [("stdio", stdio), ("sse", bodies(&sse)), ("http", bodies(&http))] {
        let (called, cancelled) = cancellations(&messages);
        assert_eq!(called.len(), 1, "{kind}");
        assert_eq!(cancelled, called, "{kind}: it is this very request that is cancelled, and once");
    }
    let (called, cancelled) = cancellations(&bodies(&modern));
    assert_eq!((called.len(), cancelled.len()), (1, 0), "the end of its connection tells it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_over_its_time_is_an_error_result_and_is_cancelled() {
    cancelled(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_cancels_its_run() {
    cancelled(true).await;
}

/// Calls a server 100 times, and counts the connections that it sees.
async fn connections_of_100_calls(kind: &str, style: &Value) -> usize {
    let portolan = Portolan::start().await;
    let fake = Fake::new(serde_json::from_value(style.clone()).unwrap());
    let running = if kind == "sse" { fake::sse::serve(fake) } else { fake::http::serve(fake) };
    let server = portolan.create(kind, json!({ "mcp_server_type": kind, "server_url": running.url })).await;
    let id = server["id"].as_str().unwrap();
    let path = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, "echo").await);
    for call in 0..100 {
        let message = format!("call {call}");
        let run = portolan.post(&path, &json!({"args": {"message": message}})).await.expect(200);
        assert_eq!(run["func_return"], message);
    }
    let calls = running.requests().iter().filter(|seen| seen.rpc() == "tools/call").count();
    assert_eq!(calls, 100, "{kind} {style}");
    portolan.stop().await;
    running.connections()
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_kept_from_call_to_call() {
    for style in [
        json!({"reply": "sse"}),
        json!({"reply": "json"}),
        json!({"reply": "sse", "chunk": 7}),
        json!({"reply": "sse", "revisions": [fake::script::MODERN]}),
    ] {
        let connections = connections_of_100_calls("streamable_http", &style).await;
        assert!(connections <= 5, "{style}: {connections} connections");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_http_and_sse_are_kept_from_call_to_call() {
    let connections = connections_of_100_calls("sse", &json!({})).await;
    assert!(connections <= 5, "{connections} connections");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_leave_room_for_those_of_other_servers() {
    const LARGE: usize = 3_000_000;
    let portolan = Portolan::start_with(|settings| settings.upstream.max_bytes_in_flight = 16_000_000).await;
    for kind in ["stdio", "streamable_http", "sse"] {
        let mut running = Vec::new();
        let mut servers = Vec::new();
        for name in ["hungry", "modest"] {
            let server = match kind {
                "stdio" => portolan.create_stdio(name, &json!({})).await.0,
                kind => {
                    let fake = Fake::new(Script::default());
                    let fake = if kind == "sse" { fake::sse::serve(fake) } else { fake::http::serve(fake) };
                    let config = json!({ "mcp_server_type": kind, "server_url": fake.url });
                    running.push(fake);
                    portolan.create(&format!("{kind} {name}"), config).await
                }
            };
            servers.push(server["id"].as_str().unwrap().to_owned());
        }
        let wide = json!({ "bytes": LARGE });
        let length = |run: &Value| run["func_return"].as_str().map(str::len);
        for server in &servers {
            assert_eq!(length(&portolan.run(server, "wide", wide.clone()).await), Some(LARGE), "{kind}");
        }
        let path = format!("/v1/mcp-servers/{}/tools/{}/run", servers[0], portolan.tool_id(&servers[0], "wide").await);
        let url = reqwest::Url::parse(&portolan.url(&path)).unwrap();
        let body = json!({ "args": wide }).to_string();
        let mut readers = Vec::new();
        for _ in 0..4 {
            // The kernel must not take the answer in the reader's place.
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(4096).unwrap();
            let mut stream = socket.connect(url.socket_addrs(|| None).unwrap()[0]).await.unwrap();
            let head = format!(
                "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all((head + &body).as_bytes()).await.unwrap();
            readers.push(stream);
        }
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let run = portolan.run(&servers[0], "wide", wide.clone()).await;
            if run["status"] == "error" {
                let text = run["func_return"].as_str().unwrap();
                assert!(text.contains("leave no room") && text.ends_with('.'), "{kind}: {text}");
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "{kind}: there is always room");
        }
        for _ in 0..3 {
            assert_eq!(length(&portolan.run(&servers[1], "wide", wide.clone()).await), Some(LARGE), "{kind}: another");
        }
        let small = portolan.run(&servers[0], "echo", json!({"message": "small"})).await;
        assert_eq!(small["func_return"], "small", "{kind}: what is small fits");
        drop(readers);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while length(&portolan.run(&servers[0], "wide", wide.clone()).await) != Some(LARGE) {
            assert!(tokio::time::Instant::now() < deadline, "{kind}: the room does not come back");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for server in &servers {
            portolan.delete(&format!("/v1/mcp-servers/{server}")).await.expect(204);
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_over_the_limit_costs_others_only_where_they_share_its_stream() {
    const LIMIT: usize = 256 * 1024;
    let portolan = Portolan::start_with(|settings| settings.upstream.max_message_bytes = LIMIT).await;
    for kind in ["stdio", "streamable_http", "sse"] {
        let (start, end) = if kind == "stdio" { ("", "\n") } else { ("data: ", "\n\n") };
        let steps = json!([
            {"pause": 700}, {"raw": start},
            {"raw": r#"{"jsonrpc":"2.0","id":{id},"result":{"content":[{"type":"text","text":""#},
            {"fill": LIMIT + 2048}, {"raw": "\"}]}}"}, {"raw": end}]);
        let acts = json!({"acts": {"call": {"times": 1, "steps": steps}}});
        let fake = || Fake::new(serde_json::from_value(acts.clone()).unwrap());
        let mut running = None;
        let mut log = None;
        let server = match kind {
            "stdio" => {
                let (server, script) = portolan.create_stdio(kind, &acts).await;
                log = Some(script);
                server
            }
            kind => {
                let fake = if kind == "sse" { fake::sse::serve(fake()) } else { fake::http::serve(fake()) };
                let config = json!({ "mcp_server_type": kind, "server_url": running.insert(fake).url });
                portolan.create(kind, config).await
            }
        };
        let id = server["id"].as_str().unwrap();
        let called = || match (&running, &log) {
            (Some(running), _) => running.requests().iter().filter(|seen| seen.rpc() == "tools/call").count(),
            (None, log) => log.as_ref().unwrap().count("tools/call"),
        };
        let other = async {
            eventually("the first call is under way", || called() == 1).await;
            portolan.run(id, "slow", json!({"ms": 2_500})).await
        };
        let (large, other) = tokio::join!(portolan.run(id, "echo", json!({"message": "x"})), other);
        let text = large["func_return"].as_str().unwrap();
        assert!(large["status"] == "error" && text.contains("larger") && text.ends_with('.'), "{kind}: {large}");
        if kind == "sse" {
            let text = other["func_return"].as_str().unwrap();
            assert!(other["status"] == "error" && text.contains("may have run"), "{other}");
            assert!(text.ends_with('.') && !text.contains('\n'), "{other}");
        } else {
            assert_eq!(other["func_return"], "done", "{kind}: it has nothing to do with it");
        }
        for _ in 0..3 {
            assert_eq!(portolan.run(id, "echo", json!({"message": "on"})).await["func_return"], "on", "{kind}");
        }
        assert_eq!(called(), 5, "{kind}: nothing is called twice");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_answers_the_call_is_no_lost_session_whatever_its_words() {
    let portolan = Portolan::start().await;
    for status in [400, 404] {
        for (words, id) in [("database session failed", "{id}"), ("Session not found", "null")] {
            let error = json!({"code": -32000, "message": words});
            let raw = format!(r#"{{"jsonrpc":"2.0","id":{id},"error":{error}}}"#);
            let act = json!({"times": 1, "status": status, "steps": [{ "raw": raw }]});
            let script = json!({"reply": "json", "tools": with_tools(&["count"]), "acts": {"call": act}});
            let http = fake::http::serve(Fake::new(serde_json::from_value(script).unwrap()));
            let server = portolan.create(&format!("{status} {id}"), json!({ "server_url": http.url })).await;
            let run = portolan.run(server["id"].as_str().unwrap(), "count", json!({})).await;
            let count = |method: &str| http.requests().iter().filter(|seen| seen.rpc() == method).count();
            if id == "null" {
                assert_eq!((&run["status"], &run["func_return"]), (&json!("success"), &json!("1")), "{status}: {run}");
                assert_eq!((count("tools/call"), count("initialize")), (2, 2), "{status}: once in each session");
            } else {
                assert_eq!((&run["status"], &run["func_return"]), (&json!("error"), &json!(words)), "{status}: {run}");
                assert_eq!((count("tools/call"), count("initialize")), (1, 1), "{status}");
            }
        }
    }
    portolan.stop().await;
}
