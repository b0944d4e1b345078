//! Three transports and every revision: how a server is found to speak what it speaks.

use serde_json::{Value, json};

use crate::fake::{self, Fake, Script};
use crate::harness::{Portolan, eventually};

const REVISIONS: [&str; 4] = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"];
const MODERN: &str = fake::script::MODERN;

fn script(fields: Value) -> Script {
    serde_json::from_value(fields).unwrap()
}

async fn works(portolan: &Portolan, server: &Value) {
    assert_eq!(server["status"]["state"], "ready", "{server}");
    let id = server["id"].as_str().unwrap();
    assert_eq!(portolan.run(id, "echo", json!({"message": "ok"})).await["func_return"], "ok");
    assert_eq!(portolan.run(id, "structured", json!({})).await["result"]["x-extra"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn streamable_http_speaks_every_revision_in_every_style() {
    let portolan = Portolan::start().await;
    for revision in REVISIONS[1..].iter().copied().chain([MODERN]) {
        for style in [
            json!({"reply": "sse"}),
            json!({"reply": "json"}),
            json!({"reply": "json", "sessions": false}),
            json!({"reply": "sse", "line_end": "crlf", "comments": true, "chunk": 7}),
            json!({"reply": "sse", "discover_http_status": 200}),
            json!({"reply": "sse", "discover_http_status": 404, "get_stream": true}),
        ] {
            let mut fields = style.clone();
            fields["revisions"] = json!([revision]);
            let http = fake::http::serve(Fake::new(script(fields)));
            let server = portolan.create(&format!("{revision} {style}"), json!({ "server_url": http.url })).await;
            works(&portolan, &server).await;
            let spoken = http.requests().last().unwrap().header("mcp-protocol-version").unwrap().to_owned();
            assert_eq!(spoken, revision, "{style}");
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stdio_speaks_every_revision() {
    let portolan = Portolan::start().await;
    for revision in REVISIONS.into_iter().chain([MODERN]) {
        let (server, script) = portolan.create_stdio(revision, &json!({ "revisions": [revision] })).await;
        works(&portolan, &server).await;
        let methods = script.methods();
        assert_eq!(methods.contains(&"initialize".to_owned()), revision != MODERN, "{methods:?}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_and_sse_resolves_its_endpoint_and_stays_on_its_origin() {
    let portolan = Portolan::start().await;
    for style in [
        json!({"endpoint": "relative"}),
        json!({"endpoint": "root"}),
        json!({"endpoint": "absolute"}),
        json!({"line_end": "crlf", "comments": true}),
        json!({"line_end": "cr", "chunk": 3}),
    ] {
        let sse = fake::sse::serve(Fake::new(script(style.clone())));
        let url = sse.url.replace("/sse", "/deep/base/sse?key=1");
        let config = json!({"mcp_server_type": "sse", "server_url": url, "auth_token": "t"});
        let server = portolan.create(&style.to_string(), config).await;
        works(&portolan, &server).await;
        assert!(sse.requests().iter().all(|seen| seen.header("authorization") == Some("Bearer t")));
    }
    let elsewhere = fake::sse::serve(Fake::new(Script::default()));
    let endpoint = elsewhere.url.replace("/sse", "/messages?session_id=1");
    let sse = fake::sse::serve(Fake::new(script(json!({ "endpoint": endpoint }))));
    let server = portolan.create("foreign", json!({"mcp_server_type": "sse", "server_url": sse.url})).await;
    assert!(server["status"]["error"].as_str().unwrap().contains("own origin"), "{server}");
    assert!(elsewhere.requests().is_empty(), "nothing goes to another origin");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_era_is_found_once_and_remembered() {
    let portolan = Portolan::start().await;
    for (revisions, first) in [(json!(["2025-11-25"]), "initialize"), (json!([MODERN]), "server/discover")] {
        let (server, script) = portolan.create_stdio(&revisions.to_string(), &json!({ "revisions": revisions })).await;
        let id = server["id"].as_str().unwrap();
        let found = script.seen().len();
        crate::harness::kill(portolan.children()[0]);
        eventually("the child is gone", || portolan.children().is_empty()).await;
        portolan.run(id, "echo", json!({"message": "again"})).await;
        assert_eq!(script.methods()[found], first, "the second connect asks at once for what the server speaks");
        portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204);
        eventually("the child is gone", || portolan.children().is_empty()).await;
    }
    let (server, script) = portolan.create_stdio("upgraded", &json!({"revisions": ["2025-06-18"]})).await;
    let id = server["id"].as_str().unwrap();
    script.set(&json!({ "revisions": [MODERN] }));
    crate::harness::kill(portolan.children()[0]);
    eventually("the child is gone", || portolan.children().is_empty()).await;
    assert_eq!(portolan.run(id, "echo", json!({"message": "new era"})).await["func_return"], "new era");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ignores_unknown_methods_is_still_reached() {
    // Such a server gets 10 s to answer `server/discover`.
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("mute", &json!({"ignore_unknown": true})).await;
    works(&portolan, &server).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_that_a_modern_server_wants_as_headers_are_sent_so() {
    let portolan = Portolan::start().await;
    let mut tools = fake::script::standard_tools();
    tools.push(fake::script::tenant());
    let http = fake::http::serve(Fake::new(script(json!({ "revisions": [MODERN], "tools": tools }))));
    let server = portolan.create("tenants", json!({ "server_url": http.url })).await;
    let id = server["id"].as_str().unwrap();
    // On the session of the sync, and on new ones that have listed nothing yet.
    for _ in 0..30 {
        let run = portolan.run(id, "tenant", json!({"tenant": "blue"})).await;
        assert_eq!(run["status"], "success", "{run}");
        portolan.app.mcp.forget(id);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_followed_on_one_origin_and_odd_answers_are_told_apart() {
    let portolan = Portolan::start().await;
    let elsewhere = fake::http::serve(Fake::new(Script::default()));
    for (fields, part) in [
        (json!({ "redirect": elsewhere.url }), "HTTP 307"),
        (json!({"status": 500}), "HTTP 500"),
        (json!({"status": 403}), "HTTP 403"),
        (json!({"status": 404}), "HTTP 404"),
    ] {
        for kind in ["streamable_http", "sse"] {
            let fields = if kind == "sse" && fields.get("status").is_some() {
                json!({ "get_status": fields["status"] })
            } else {
                fields.clone()
            };
            let running = if kind == "sse" {
                fake::sse::serve(Fake::new(script(fields.clone())))
            } else {
                fake::http::serve(Fake::new(script(fields.clone())))
            };
            let config = json!({ "mcp_server_type": kind, "server_url": running.url });
            let server = portolan.create(&format!("{kind} {fields}"), config).await;
            assert_eq!(server["status"]["state"], "unreachable");
            assert!(server["status"]["error"].as_str().unwrap().contains(part), "{server}");
        }
    }
    assert!(elsewhere.requests().is_empty());
    let here = fake::http::serve(Fake::new(script(json!({"redirect": "/mcp"}))));
    let url = here.url.replace("/mcp", "/old");
    let server = portolan.create("on its origin", json!({"server_url": url, "auth_token": "t"})).await;
    works(&portolan, &server).await;
    assert!(here.requests().iter().all(|seen| seen.header("authorization") == Some("Bearer t")));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_for_an_agent_says_so_to_the_server() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let sse = fake::sse::serve(Fake::new(Script::default()));
    for (kind, running) in [("streamable_http", &http), ("sse", &sse)] {
        let config = json!({ "mcp_server_type": kind, "server_url": running.url });
        let server = portolan.create(kind, config).await;
        let path = format!("/v1/mcp-servers/{}/refresh", server["id"].as_str().unwrap());
        let last = |running: &fake::Running| running.requests().last().unwrap().header("x-agent-id").map(str::to_owned);
        portolan.send("PATCH", &format!("{path}?agent_id=agent-1"), None).await.expect(200);
        assert_eq!(last(running).as_deref(), Some("agent-1"));
        portolan.send("PATCH", &format!("{path}?agent_id="), None).await.expect(200);
        assert_eq!(last(running), None, "an empty one is none");
        portolan.send("PATCH", &format!("{path}?agent_id=a%0d%0ab"), None).await.expect(422);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_gets_its_arguments_as_they_are_and_only_a_known_environment() {
    let portolan = Portolan::start().await;
    let mut tools = fake::script::standard_tools();
    for name in ["argv", "env"] {
        tools.push(json!({"name": name, "inputSchema": {"type": "object"}}));
    }
    let script = portolan.script(&json!({ "tools": tools }));
    let args = json!(["stdio", "two words", "", "$HOME", "a;b", script.0]);
    let config = json!({"command": crate::harness::fake_mcp(), "args": args, "env": {"MINE": "a b", "PATH": "/bin"}});
    let server = portolan.create("args", config).await;
    let id = server["id"].as_str().unwrap();
    let read = |run: Value| serde_json::from_str::<Value>(run["func_return"].as_str().unwrap()).unwrap();
    let argv = read(portolan.run(id, "argv", json!({})).await);
    let given = args.as_array().unwrap();
    assert!(argv.as_array().unwrap().ends_with(given), "{argv}");
    let env = read(portolan.run(id, "env", json!({})).await);
    assert_eq!((&env["MINE"], &env["PATH"]), (&json!("a b"), &json!("/bin")));
    let known = ["MINE", "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR"];
    assert!(env.as_object().unwrap().keys().all(|name| known.contains(&name.as_str())), "{env}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn letta_rows_can_have_their_arguments_split() {
    let portolan = Portolan::start_with(|settings| settings.upstream.legacy_arg_split = true).await;
    let mut tools = fake::script::standard_tools();
    tools.push(json!({"name": "argv", "inputSchema": {"type": "object"}}));
    let script = portolan.script(&json!({ "tools": tools }));
    let config = json!({"command": crate::harness::fake_mcp(), "args": ["stdio  two words", script.0]});
    let server = portolan.create("split", config).await;
    let argv = portolan.run(server["id"].as_str().unwrap(), "argv", json!({})).await;
    assert!(argv["func_return"].as_str().unwrap().contains(r#""stdio","two","words""#), "{argv}");
    portolan.stop().await;
}
