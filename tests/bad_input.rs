//! What Portolan refuses: each a clear 4xx in the documented shape, with nothing stored or changed (CONTRACT rows 2, 3, 20).

use serde_json::{Value, json};

use crate::harness::{Answer, Portolan};

const SECRET: &str = "hunter2-secret";

/// Bodies that no create takes, and a place that their answer names.
fn bad_creates() -> Vec<(Value, &'static str)> {
    let stdio = json!({"mcp_server_type": "stdio", "command": "c", "args": []});
    let http = json!({"mcp_server_type": "streamable_http", "server_url": "http://h/"});
    let with = |base: &Value, key: &str, value: Value| {
        let mut config = base.clone();
        config[key] = value;
        json!({"server_name": "n", "config": config})
    };
    let mut bodies = vec![
        (json!({}), "server_name"),
        (json!({"server_name": "n"}), "body"),
        (json!({"server_name": "n", "config": {}}), "config"),
        (json!({"server_name": "n", "config": []}), "config"),
        (json!({"server_name": "n", "config": "http://h/"}), "config"),
        (json!({"config": stdio}), "server_name"),
        (json!({"server_name": null, "config": stdio}), "server_name"),
        (json!({"server_name": 5, "config": stdio}), "server_name"),
        (json!({"server_name": ["n"], "config": stdio}), "server_name"),
        (json!({"server_name": "", "config": stdio}), "server_name"),
        (json!({"server_name": " \t ", "config": stdio}), "server_name"),
        (json!({"server_name": "a\nb", "config": stdio}), "server_name"),
        (json!({"server_name": "a\u{0}b", "config": stdio}), "server_name"),
        (json!({"server_name": "x".repeat(256), "config": stdio}), "server_name"),
        (json!({"server_name": "n", "config": stdio, "command": "c"}), "command"),
        (json!({"server_name": "n", "config": http, "type": "sse"}), "type"),
        (json!({"server_name": "n", "config": stdio, "extra": SECRET}), "extra"),
        (json!({"server_name": "n", "command": "c", "args": [], "server_url": "http://h/"}), "server_url"),
        (json!({"server_name": "n", "type": "stdio", "server_url": "http://h/"}), "server_url"),
        (json!({"server_name": "n", "type": "sse", "command": "c"}), "command"),
        (json!({"server_name": "n", "type": "sse", "mcp_server_type": "stdio", "server_url": "http://h/"}), "type"),
        (json!({"server_name": "n", "server_url": "http://h/", "token": SECRET}), "token"),
        (with(&stdio, "mcp_server_type", json!("websocket")), "mcp_server_type"),
        (with(&stdio, "mcp_server_type", json!(7)), "mcp_server_type"),
        (with(&stdio, "unknown", json!(SECRET)), "unknown"),
        (with(&stdio, "command", json!("")), "command"),
        (with(&stdio, "command", json!("  ")), "command"),
        (with(&stdio, "command", json!(null)), "command"),
        (with(&stdio, "command", json!(["c"])), "command"),
        (with(&stdio, "command", json!("c\u{0}")), "command"),
        (with(&stdio, "command", json!("c".repeat(5000))), "command"),
        (with(&stdio, "args", json!("a b")), "args"),
        (with(&stdio, "args", json!([1])), "args"),
        (with(&stdio, "args", json!([null])), "args"),
        (with(&stdio, "args", json!(["a\u{0}"])), "args"),
        (with(&stdio, "args", json!(vec!["a"; 300])), "args"),
        (with(&stdio, "env", json!([])), "env"),
        (with(&stdio, "env", json!({"A": 1})), "A"),
        (with(&stdio, "env", json!({"A": null})), "A"),
        (with(&stdio, "env", json!({"": SECRET})), ""),
        (with(&stdio, "env", json!({"A=B": SECRET})), "A=B"),
        (with(&stdio, "env", json!({"A": "b\u{0}"})), "A"),
        (with(&stdio, "server_url", json!("http://h/")), "server_url"),
        (with(&stdio, "auth_token", json!(SECRET)), "auth_token"),
        (with(&http, "args", json!([])), "args"),
        (with(&http, "auth_header", json!("bad header")), "auth_header"),
        (with(&http, "auth_header", json!("Content-Length")), "auth_header"),
        (with(&http, "auth_header", json!(1)), "auth_header"),
        (with(&http, "auth_token", json!("hunter2-secret\r\nX: y")), "auth_token"),
        (with(&http, "auth_token", json!("hunter2-secret é")), "auth_token"),
        (with(&http, "auth_token", json!({"a": SECRET})), "auth_token"),
        (with(&http, "custom_headers", json!("X: y")), "custom_headers"),
        (with(&http, "custom_headers", json!({"X": 1})), "X"),
        (with(&http, "custom_headers", json!({"X": null})), "X"),
        (with(&http, "custom_headers", json!({"X:": SECRET})), "X:"),
        (with(&http, "custom_headers", json!({"": SECRET})), ""),
        (with(&http, "custom_headers", json!({"X": "a\nb"})), "X"),
        (with(&http, "custom_headers", json!({"Mcp-Session-Id": SECRET})), "Mcp-Session-Id"),
        (with(&http, "custom_headers", json!({"X-A": "1", "x-a": SECRET})), "x-a"),
        (
            json!({"server_name": "n", "config": {"server_url": "http://h/", "auth_token": SECRET, "custom_headers": {"authorization": "x"}}}),
            "authorization",
        ),
        (json!({"server_name": "n", "config": {"mcp_server_type": "sse"}}), "server_url"),
    ];
    for url in [
        json!(""),
        json!("h"),
        json!("ftp://h/"),
        json!("file:///etc/passwd"),
        json!("javascript:alert(1)"),
        json!("http://"),
        json!("http:///path"),
        json!("http:h://x"),
        json!("https:127.0.0.1:1/?://b"),
        json!("http://h:99999/"),
        json!("http://h/ b"),
        json!(" http://h/"),
        json!("http://h/\n"),
        json!("http://h/#fragment"),
        json!("http:\\\\h\\"),
        json!("//h/"),
        json!(format!("http://h/{}", "x".repeat(3000))),
        json!(1),
        json!(["http://h/"]),
        json!({"a": "b"}),
    ] {
        bodies
            .push((json!({"server_name": "n", "config": {"mcp_server_type": "sse", "server_url": url}}), "server_url"));
    }
    bodies
}

/// Texts that are no body at all, for every route that takes one.
fn bad_texts() -> Vec<Vec<u8>> {
    let deep = format!("{{\"args\":{}{}}}", "[".repeat(1000), "]".repeat(1000));
    vec![
        b"{".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"\"text\"".to_vec(),
        b"{\"server_name\":\"n\"} trailing".to_vec(),
        b"{'server_name':'n'}".to_vec(),
        b"{\"server_name\":\"\xff\xfe\"}".to_vec(),
        b"{\"server_name\":\"\0\"}".to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        b"{\"args\":NaN}".to_vec(),
        br#"{"server_name":"a","server_name":"b","config":{"server_url":"http://h/"}}"#.to_vec(),
        br#"{"args":{"a":1,"a":2}}"#.to_vec(),
        br#"{"args":{"x":[{"deep":1,"deep":2}]}}"#.to_vec(),
        deep.into_bytes(),
    ]
}

fn assert_clear(body: &Value, place: &str) {
    assert_eq!(body["code"], "invalid_request", "{body}");
    assert!(!body.to_string().contains(SECRET), "the answer repeats a value: {body}");
    let errors = body["errors"].as_array().unwrap();
    assert!(!errors.is_empty());
    let named = errors.iter().any(|error| error["loc"].as_array().unwrap().contains(&json!(place)));
    assert!(named, "{place} is not named: {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_creates_are_refused_by_place_and_store_nothing() {
    let portolan = Portolan::start().await;
    for (body, place) in bad_creates() {
        let answer = portolan.post("/v1/mcp-servers/", &body).await;
        assert_eq!(answer.status, 422, "{body}: {}", answer.text);
        assert_clear(&answer.expect(422), place);
    }
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200), json!([]));
    let crowd: serde_json::Map<String, Value> = (0..5000).map(|number| (format!("k{number}"), json!(1))).collect();
    let crowded = portolan.post("/v1/mcp-servers/", &Value::Object(crowd)).await.expect(422);
    assert_eq!(crowded["errors"].as_array().unwrap().len(), 100, "an answer names no more");
    let allowed = json!({"server_name": "n", "config": {"server_url": "http://127.0.0.1:1/", "auth_token": SECRET}});
    portolan.post("/v1/mcp-servers/", &allowed).await.expect(200);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_has_a_number_of_values() {
    const MOST: usize = 100_000;
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("s", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let run = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, "count").await);
    // The body, `args` and the array are values, too; and so is what an array or an object holds.
    let flat = |count| json!({"args": {"x": vec![0; count - 3]}});
    let deep =
        |count| json!({"args": {"x": vec![json!([0]); (count - 4) / 3], "y": vec![json!({"": 0}); (count - 4) / 6]}});
    for body in [flat(MOST), deep(MOST)] {
        portolan.post(&run, &body).await.expect(200);
    }
    for (path, body) in [(&run[..], flat(MOST + 1)), (&run, deep(MOST + 6)), ("/v1/mcp-servers/", flat(MOST + 1))] {
        let body = portolan.post(path, &body).await.expect(422);
        assert_eq!(body["detail"], "The request body has more than 100000 values, counting those within others.");
    }
    let calls = script.methods().iter().filter(|method| *method == "tools/call").count();
    assert_eq!(calls, 2);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_has_a_depth_and_its_keys_a_length() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("s", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let run = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, "count").await);
    let deep = |more: usize| (0..more).fold(json!(0), |inner, _| json!([inner]));
    let keyed = |length: usize| json!({"args": {"x": {"k".repeat(length): 1}}});
    // The body and `args` are two more, and the fake server reads 127 as well.
    for body in [json!({"args": {"x": deep(120)}}), keyed(32 * 1024)] {
        portolan.post(&run, &body).await.expect(200);
    }
    for (path, body, reason) in [
        (&run[..], json!({"args": {"x": deep(126)}}), "The request body is nested too deeply (line 1 column "),
        (&run, keyed(32 * 1024 + 1), "A key has more than 32768 bytes (line 1 column "),
        (
            "/v1/mcp-servers/",
            json!({"server_name": deep(127)}),
            "The request body is nested too deeply (line 1 column ",
        ),
        ("/v1/mcp-servers/", json!({"k".repeat(40_000): SECRET}), "A key has more than 32768 bytes (line 1 column "),
    ] {
        let refused = portolan.post(path, &body).await;
        assert!(refused.text.len() < 1000 && !refused.text.contains(SECRET));
        let refused = refused.expect(422);
        assert!(refused["detail"].as_str().unwrap().starts_with(reason), "{refused}");
    }
    assert_eq!(script.methods().iter().filter(|method| *method == "tools/call").count(), 2);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_changes_are_refused_by_place_and_change_nothing() {
    let portolan = Portolan::start().await;
    let remote = portolan.create("n", json!({"server_url": "http://127.0.0.1:1/"})).await;
    let stdio = portolan.create("m", json!({"command": "/nonexistent", "args": []})).await;
    let before = portolan.get("/v1/mcp-servers/").await.expect(200);
    let mut refused = 0;
    for (body, place) in bad_creates() {
        let kind = body["config"]["mcp_server_type"].as_str().or(body["type"].as_str()).unwrap_or("");
        let server = if kind == "stdio" || body.get("command").is_some() { &stdio } else { &remote };
        let path = format!("/v1/mcp-servers/{}", server["id"].as_str().unwrap());
        // What only lacks a field, or has null for it, is a change that keeps it.
        let absent = |pointer| body.pointer(pointer).is_none_or(Value::is_null);
        let only_lacking = match place {
            "server_name" => absent("/server_name"),
            "body" | "config" => absent("/config") || body["config"] == json!({}),
            "command" => absent("/command") && body["config"].is_object() && absent("/config/command"),
            "server_url" => absent("/server_url") && absent("/config/server_url"),
            // In a change this is another name for auth_token.
            "token" => true,
            _ => false,
        };
        if only_lacking {
            continue;
        }
        refused += 1;
        let answer = portolan.patch(&path, &body).await;
        assert_eq!(answer.status, 422, "{body}: {}", answer.text);
        assert_clear(&answer.expect(422), place);
    }
    assert!(refused > 60, "{refused}");
    let path = format!("/v1/mcp-servers/{}", remote["id"].as_str().unwrap());
    let twice = json!({"token": SECRET, "auth_token": SECRET});
    assert_clear(&portolan.patch(&path, &twice).await.expect(422), "token");
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200), before);
    portolan.patch(&path, &json!({ "token": SECRET })).await.expect(200);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_json_object_is_refused_on_every_route() {
    let portolan = Portolan::start().await;
    let (server, log) = portolan.create_stdio("s", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let run = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, "echo").await);
    let one = format!("/v1/mcp-servers/{id}");
    let before = portolan.get("/v1/mcp-servers/").await.expect(200);
    for text in bad_texts() {
        for (method, path) in [("POST", "/v1/mcp-servers/"), ("PATCH", &one), ("POST", &run)] {
            let request = portolan.request(method, path).header("content-type", "application/json").body(text.clone());
            let body = Answer::of(method, path, request).await.expect(422);
            assert_eq!(body["errors"][0]["loc"], json!(["body"]), "{body}");
        }
    }
    let duplicate =
        portolan.request("POST", &run).header("content-type", "application/json").body(r#"{"args":{"a":1,"a":2}}"#);
    let detail = Answer::of("POST", &run, duplicate).await.expect(422)["detail"].take();
    assert!(detail.as_str().unwrap().contains("key a appears twice"), "{detail}");
    for args in [
        json!({"args": null}),
        json!({"args": []}),
        json!({"args": "x"}),
        json!({"args": {}, "extra": 1}),
        json!({"message": "x"}),
    ] {
        portolan.post(&run, &args).await.expect(422);
    }
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200), before);
    assert!(!log.methods().contains(&"tools/call".to_owned()), "nothing was run");
    portolan.post(&run, &json!({"args": {"message": "fine"}})).await.expect(200);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_and_other_content_types_are_refused() {
    let portolan = Portolan::start().await;
    let (server, _log) = portolan.create_stdio("s", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let run = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, "echo").await);
    let one = format!("/v1/mcp-servers/{id}");
    let large = json!({"server_name": "x".repeat(2 * 1024 * 1024)});
    portolan.post("/v1/mcp-servers/", &large).await.expect(413);
    portolan.patch(&one, &large).await.expect(413);
    let megabytes = |count: usize| json!({"args": {"message": "x".repeat(count * 1024 * 1024)}});
    portolan.post(&run, &megabytes(5)).await.expect(413);
    assert_eq!(portolan.post(&run, &megabytes(3)).await.expect(200)["status"], "success");
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/xml",
        "application/jsonx",
        "",
    ] {
        for (method, path) in [("POST", "/v1/mcp-servers/"), ("PATCH", one.as_str()), ("POST", run.as_str())] {
            let request = portolan.request(method, path).header("content-type", kind).body("{\"args\":{}}");
            Answer::of(method, path, request).await.expect(415);
        }
    }
    let bare = portolan.request("PATCH", &one).body("{}");
    Answer::of("PATCH", &one, bare).await.expect(415);
    // The Python SDK says application/json on requests that have no body.
    for (method, path, status) in [("GET", "/v1/mcp-servers/", 200), ("DELETE", one.as_str(), 204)] {
        let request = portolan.request(method, path).header("content-type", "application/json");
        Answer::of(method, path, request).await.expect(status);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_methods_and_paths_are_told_apart() {
    let portolan = Portolan::start().await;
    let id = "mcp_server-00000000-0000-4000-8000-000000000000";
    for (path, allowed) in [
        ("/v1/mcp-servers/".to_owned(), "GET,HEAD,POST"),
        (format!("/v1/mcp-servers/{id}"), "DELETE,GET,HEAD,PATCH"),
        (format!("/v1/mcp-servers/{id}/refresh"), "PATCH"),
        (format!("/v1/mcp-servers/{id}/tools"), "GET,HEAD"),
        (format!("/v1/mcp-servers/{id}/tools/tool-1/run"), "POST"),
        ("/v1/health/".to_owned(), "GET,HEAD"),
    ] {
        for method in ["PUT", "OPTIONS", "TRACE", "PROPFIND"] {
            let answer = portolan.send(method, &path, None).await;
            let mut methods: Vec<_> = answer.header("allow").unwrap().split(',').map(str::trim).collect();
            methods.sort_unstable();
            assert_eq!(methods.join(","), allowed, "{method} {path}");
            assert_eq!(answer.expect(405)["code"], "method_not_allowed");
        }
    }
    for path in [
        "/console",
        "/v1",
        "/v1/",
        "/v2/mcp-servers/",
        "/mcp-servers/",
        "/v1/mcp-servers//",
        "/v1/tools",
        "/docs/nope.js",
        "/console/nope.js",
        "/console/%2e%2e%2fCargo.toml",
        "/docs/%ff",
        "/docs/%2e%2e%2fCargo.toml",
    ] {
        assert_eq!(portolan.get(path).await.expect(404)["code"], "not_found", "{path}");
    }
    portolan.stop().await;
}
