//! The older API, which knows servers and tools by their names: the same rows, tools, policies and runs as by their ids, in
//! Letta's older shapes (CONTRACT row 22).

use std::time::Duration;

use portolan::config::StdioPolicy;
use portolan::model::sha256_hex;
use serde_json::{Value, json};

use crate::fake::{self, Fake};
use crate::harness::{Answer, Portolan, Script, fake_mcp};

const ALL: &str = "/v1/tools/mcp/servers";
const DEAD: &str = "http://127.0.0.1:1/mcp";
const MASK: &str = "********";

/// A path below [`ALL`], of names as they are.
fn path(names: &[&str]) -> String {
    names.iter().fold(ALL.to_owned(), |path, name| path + "/" + &encoded(name))
}

/// A name as a step of a path: every byte but letters and digits with a percent sign.
fn encoded(name: &str) -> String {
    let step =
        |byte: u8| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    name.bytes().map(step).collect()
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|one| one["server_name"].as_str().or(one["name"].as_str()).unwrap()).collect()
}

async fn put(portolan: &Portolan, body: &Value) -> Answer {
    portolan.send("PUT", ALL, Some(body)).await
}

/// Puts a stdio fake that does what `script` says.
async fn put_stdio(portolan: &Portolan, name: &str, script: &Value) -> Script {
    let script = portolan.script(script);
    put(portolan, &stdio(name, &script)).await.expect(200);
    script
}

fn stdio(name: &str, script: &Script) -> Value {
    json!({"server_name": name, "type": "stdio", "command": fake_mcp(), "args": ["stdio", script.0]})
}

/// What the newer API says of the server with this name.
async fn by_id(portolan: &Portolan, name: &str) -> Value {
    let list = portolan.get("/v1/mcp-servers/").await.expect(200);
    let found = list.as_array().unwrap().iter().find(|server| server["server_name"] == name).cloned();
    found.unwrap_or_else(|| panic!("no server {name}"))
}

fn id(server: &Value) -> &str {
    server["id"].as_str().unwrap()
}

fn tool(name: &str, description: &str) -> Value {
    json!({"name": name, "description": description, "inputSchema": {"type": "object", "properties": {}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_told_as_lettas_configurations_in_the_order_of_their_registration() {
    let portolan = Portolan::start().await;
    assert_eq!(portolan.get(ALL).await.expect(200), json!({}));
    let stdio = json!({"server_name": "z", "command": "/nonexistent", "args": ["a"], "env": {"K": "V"}});
    let list = put(&portolan, &stdio).await.expect(200);
    let shown =
        json!({"server_name": "z", "type": "stdio", "command": "/nonexistent", "args": ["a"], "env": {"K": "V"}});
    assert_eq!(list.to_string(), json!([shown]).to_string(), "Letta's keys in Letta's order");
    put(&portolan, &json!({"server_name": "sse", "server_url": DEAD, "type": null})).await.expect(200);
    let full = json!({
        "server_name": "http", "type": "streamable_http", "server_url": DEAD, "auth_header": "Authorization",
        "auth_token": "Bearer {{ TOKEN | none }}", "custom_headers": {"X-One": "1"},
    });
    let list = put(&portolan, &full).await.expect(200);
    assert_eq!(names(&list), ["z", "sse", "http"], "all of them, the oldest first");
    let remote = ["server_name", "type", "server_url", "auth_header", "auth_token", "custom_headers"];
    assert_eq!((keys(&list[1]), keys(&list[2])), (remote.to_vec(), remote.to_vec()));
    assert_eq!(list[1]["type"], "sse", "the type that Letta takes when there is none");
    assert_eq!((&list[1]["auth_token"], &list[1]["custom_headers"]), (&Value::Null, &Value::Null));

    // What is secret is masked, unless an admin asks.
    let shown = json!({"auth_token": "Bearer ********", "custom_headers": {"X-One": MASK}});
    for (key, value) in shown.as_object().unwrap() {
        assert_eq!(list[2][key], *value);
    }
    let by_name = portolan.get(ALL).await.expect(200);
    assert_eq!(keys(&by_name), ["z", "sse", "http"]);
    assert_eq!(by_name["http"], list[2]);
    assert_eq!(
        portolan.get(&format!("{ALL}?reveal=true")).await.expect(200)["http"],
        full,
        "the template as it is stored"
    );

    // The newer API has the same rows.
    let newer = portolan.get("/v1/mcp-servers/").await.expect(200);
    assert_eq!(names(&newer), ["z", "sse", "http"]);
    assert_eq!(newer[2]["server_url"], DEAD);
    portolan.create("newer", json!({"server_url": DEAD})).await;
    assert_eq!(portolan.get(ALL).await.expect(200)["newer"]["type"], "streamable_http");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_name_is_a_conflict_that_no_sdk_repeats_and_a_repetition_is_none() {
    let portolan = Portolan::start().await;
    let body = json!({"server_name": "one", "server_url": DEAD});
    put(&portolan, &body).await.expect(200);
    let answer = put(&portolan, &body).await;
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert_eq!(answer.expect(409)["code"], "name_taken");
    let again = portolan.request("PUT", ALL).header("x-stainless-retry-count", "1").json(&body);
    assert_eq!(names(&Answer::of("PUT", ALL, again).await.expect(200)), ["one"], "an SDK that tries again");
    put(&portolan, &json!({"server_name": "two", "server_url": DEAD})).await.expect(200);
    let rename = portolan.patch(&path(&["two"]), &json!({"server_name": "one"})).await;
    assert_eq!(rename.header("x-should-retry"), Some("false"));
    assert_eq!(rename.expect(409)["code"], "name_taken");
    for (bad, at) in [
        (json!({"server_name": "x"}), "body"),
        (json!({"server_name": "x", "server_url": "ftp://x"}), "server_url"),
        (json!({"server_name": "x", "server_url": DEAD, "command": "c"}), "server_url"),
        (json!({"server_name": "x", "server_url": DEAD, "auth_token": MASK}), "auth_token"),
        (json!({"server_name": "x", "server_url": DEAD, "custom_headers": {"a": null}}), "a"),
        (json!({"server_name": "", "server_url": DEAD}), "server_name"),
        (json!({"server_name": "x", "server_url": DEAD, "token": "t"}), "token"),
    ] {
        let told = put(&portolan, &bad).await.expect(422);
        assert_eq!(told["errors"][0]["loc"].as_array().unwrap().last().unwrap(), at, "{told}");
    }
    assert_eq!(keys(&portolan.get(ALL).await.expect(200)), ["one", "two"]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_keeps_what_it_does_not_name_and_null_clears_headers() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(fake::Script::default()));
    let given = json!({
        "server_name": "h", "type": "streamable_http", "server_url": http.url, "auth_header": "X-Key", "auth_token": "one",
        "custom_headers": {"X-One": "1"},
    });
    put(&portolan, &given).await.expect(200);
    let one = path(&["h"]);
    let revealed = format!("{one}?reveal=true");
    let change = async |body: Value| portolan.patch(&revealed, &body).await.expect(200);
    // Absent and null keep.
    assert_eq!(change(json!({})).await.to_string(), given.to_string(), "Letta's keys in Letta's order");
    assert_eq!(change(json!({"server_url": null, "token": null, "auth_header": null})).await, given);
    assert_eq!(
        portolan.patch(&one, &json!({"auth_token": MASK})).await.expect(200)["auth_token"],
        MASK,
        "a mask keeps"
    );
    assert_eq!(change(json!({"token": "two"})).await["auth_token"], "two");
    assert_eq!(change(json!({"custom_headers": {"X-Two": "2"}})).await["custom_headers"], json!({"X-Two": "2"}));
    let cleared = change(json!({"server_url": null, "custom_headers": null})).await;
    assert_eq!((&cleared["custom_headers"], &cleared["auth_token"]), (&Value::Null, &json!("two")));
    // By its id null keeps.
    change(json!({"custom_headers": {"X-Two": "2"}})).await;
    let server = by_id(&portolan, "h").await;
    let newer = format!("/v1/mcp-servers/{}", id(&server));
    let kept = portolan.patch(&newer, &json!({"custom_headers": null, "config": null})).await;
    assert_eq!(kept.expect(200)["custom_headers"], json!({"X-Two": MASK}));
    // The next call uses what was changed.
    portolan.send("POST", &path(&["h", "tools", "headers", "execute"]), None).await.expect(200);
    assert_eq!(http.requests().last().unwrap().header("x-two"), Some("2"));
    assert_eq!(http.requests().last().unwrap().header("x-key"), Some("two"));
    change(json!({"custom_headers": null, "auth_token": ""})).await;
    portolan.send("POST", &path(&["h", "tools", "headers", "execute"]), None).await.expect(200);
    assert_eq!(http.requests().last().unwrap().header("x-two"), None);
    assert_eq!(http.requests().last().unwrap().header("x-key"), None);
    // A rename keeps its id, and the old name is nobody's.
    assert_eq!(change(json!({"server_name": " renamed "})).await["server_name"], "renamed");
    assert_eq!(id(&by_id(&portolan, "renamed").await), id(&server));
    for (method, body) in [("PATCH", Some(json!({}))), ("DELETE", None)] {
        let error = portolan.send(method, &one, body.as_ref()).await.expect(404);
        assert_eq!(
            (&error["code"], &error["detail"]),
            (&json!("not_found"), &json!("There is no MCP server with this name."))
        );
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_changed_in_a_stdio_config() {
    let portolan = Portolan::start().await;
    let (old, new) = (portolan.script(&json!({})), portolan.script(&json!({})));
    let mut given = stdio("s", &old);
    given["env"] = json!({"PLAIN": "kept"});
    put(&portolan, &given).await.expect(200);
    let one = path(&["s"]);
    let config = stdio("whatever", &new);
    let changed = portolan.patch(&one, &json!({ "stdio_config": config })).await.expect(200);
    let mut expected = stdio("s", &new);
    expected["env"] = json!({"PLAIN": "kept"});
    assert_eq!(changed, expected, "without env it is kept, and the name in there is none");
    portolan
        .send("POST", &path(&["s", "tools", "echo", "execute"]), Some(&json!({"args": {"message": "m"}})))
        .await
        .expect(200);
    assert_eq!((old.count("tools/call"), new.count("tools/call")), (0, 1));
    let changed = portolan.patch(&one, &json!({"stdio_config": {"env": {}}, "server_name": "t"})).await.expect(200);
    assert_eq!((&changed["env"], &changed["server_name"]), (&Value::Null, &json!("t")));
    let one = path(&["t"]);
    for (bad, loc) in [
        (json!({"stdio_config": []}), json!(["body", "stdio_config"])),
        (json!({"stdio_config": {"command": " "}}), json!(["body", "stdio_config", "command"])),
        (json!({"stdio_config": {"server_name": 1}}), json!(["body", "stdio_config", "server_name"])),
        (json!({"stdio_config": {"type": "sse"}}), json!(["body", "stdio_config", "type"])),
        (json!({"stdio_config": {"cmd": "c"}}), json!(["body", "stdio_config", "cmd"])),
        (json!({"stdio_config": {}, "custom_headers": {}}), json!(["body", "custom_headers"])),
        (json!({"stdio_config": {}, "config": {}}), json!(["body", "stdio_config"])),
        (json!({"server_url": DEAD}), json!(["body", "server_url"])),
    ] {
        let told = portolan.patch(&one, &bad).await.expect(422);
        assert_eq!(told["errors"][0]["loc"], loc, "{bad} {told}");
    }
    // Nulls are about nothing; the same on a server that is a command.
    for nothing in [json!({"stdio_config": null}), json!({"custom_headers": null, "token": null})] {
        assert_eq!(portolan.patch(&one, &nothing).await.expect(200), changed);
    }
    // From a URL to a command, and the newer API has no such key.
    put(&portolan, &json!({"server_name": "u", "server_url": DEAD})).await.expect(200);
    let switched = portolan.patch(&path(&["u"]), &json!({ "stdio_config": config })).await.expect(200);
    assert_eq!(
        switched,
        json!({"server_name": "u", "type": "stdio", "command": fake_mcp(), "args": ["stdio", new.0], "env": null})
    );
    let newer = format!("/v1/mcp-servers/{}", id(&by_id(&portolan, "u").await));
    portolan.patch(&newer, &json!({ "stdio_config": config })).await.expect(422);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_answers_the_servers_that_are_left() {
    let portolan = Portolan::start().await;
    for name in ["a", "b", "c"] {
        put_stdio(&portolan, name, &json!({})).await;
    }
    assert_eq!(portolan.children().len(), 3);
    let gone = by_id(&portolan, "b").await;
    assert_eq!(names(&portolan.delete(&path(&["b"])).await.expect(200)), ["a", "c"]);
    portolan.get(&format!("/v1/mcp-servers/{}", id(&gone))).await.expect(404);
    crate::harness::eventually("its child is gone", || portolan.children().len() == 2).await;
    portolan.delete(&path(&["b"])).await.expect(404);
    assert_eq!(names(&portolan.delete(&path(&["c"])).await.expect(200)), ["a"]);
    assert_eq!(portolan.delete(&path(&["a"])).await.expect(200), json!([]));
    portolan.stop().await;
}

/// Names that a path might lose, split or take for a word of ours; a tool of each has the same name.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_its_name_a_server_and_a_tool_are_reached_by_it() {
    let portolan = Portolan::start().await;
    for name in [
        "plain",
        "two words",
        "a/b",
        "/",
        "名前 / ü",
        "100%",
        "%2F",
        "a?b#c",
        "a&b=c+d",
        "a\\b",
        "\"q\"",
        "{mcp_server_name}",
        "test",
        "connect",
        "tools",
        "execute",
        "servers",
        "...",
        "Case",
        "case",
        "🦀",
    ] {
        let script = json!({"tools": [tool(name, "d"), tool("args", "")]});
        put_stdio(&portolan, name, &script).await;
        let live = portolan.get(&path(&[name, "tools"])).await.expect(200);
        assert_eq!(names(&live), [name, "args"], "{name}");
        let added = portolan.send("POST", &path(&[name, name]), None).await.expect(200);
        let server = by_id(&portolan, name).await;
        assert_eq!(added, portolan.tools(id(&server)).await[0], "{name}");
        assert_eq!(added["tags"], json!([format!("mcp:{name}")]));
        let resynced = portolan.send("POST", &path(&[name, "resync"]), None).await.expect(200);
        assert_eq!(resynced["unchanged"], 2, "{name}");
        let run = json!({"args": {"a": name}});
        let run = portolan.send("POST", &path(&[name, "tools", "args", "execute"]), Some(&run)).await.expect(200);
        assert_eq!(run, json!({"result": json!({"a": name}).to_string(), "success": true}), "{name}");
        let unknown = portolan.send("POST", &path(&[name, "tools", name, "execute"]), None).await.expect(200);
        assert_eq!(unknown["success"], false, "the fake does not know what it listed: {unknown}");
        let changed = portolan.patch(&path(&[name]), &json!({"stdio_config": {"env": {"A": "1"}}})).await.expect(200);
        assert_eq!(changed["env"], json!({"A": "1"}), "{name}");
        assert_eq!(portolan.get(ALL).await.expect(200)[name], changed, "{name}");
    }
    for name in ["test", "connect", "a/b", "Case"] {
        let before = keys(&portolan.get(ALL).await.expect(200)).len();
        let left = portolan.delete(&path(&[name])).await.expect(200);
        assert_eq!(left.as_array().unwrap().len(), before - 1);
        assert!(!names(&left).contains(&name) && names(&left).contains(&"case"));
    }
    // What no name can be names nothing.
    for name in ["\0", "a\0b", "plain\n", "", "x"] {
        let told = portolan.delete(&format!("{ALL}/{}", encoded(name))).await;
        assert!([404, 405].contains(&told.status), "{name:?} {}", told.text);
    }
    assert_eq!(portolan.delete(&format!("{ALL}/%FF")).await.expect(404)["code"], "not_found");
    portolan.delete(&format!("{ALL}/%20plain%20")).await.expect(200);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_forms_of_every_path_are_served_directly() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(fake::Script::default()));
    let flat = |name: &str| json!({"server_name": name, "server_url": http.url, "type": "streamable_http"});
    for slash in ["", "/"] {
        let name = if slash.is_empty() { "a" } else { "b" };
        let at = |names: &[&str]| path(names) + slash;
        for (method, path, body) in [
            ("PUT", ALL.to_owned() + slash, Some(flat(name))),
            ("GET", ALL.to_owned() + slash, None),
            ("POST", at(&["test"]), Some(flat("t"))),
            ("POST", at(&["connect"]), Some(flat("t"))),
            ("PATCH", at(&[name]), Some(json!({}))),
            ("GET", at(&[name, "tools"]), None),
            ("POST", at(&[name, "echo"]), None),
            ("POST", at(&[name, "resync"]), None),
            ("POST", at(&[name, "tools", "count", "execute"]), None),
            ("DELETE", at(&[name]), None),
        ] {
            let answer = portolan.send(method, &path, body.as_ref()).await;
            assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text);
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_are_listed_as_they_are_now_with_their_health() {
    let portolan = Portolan::start().await;
    let add = json!({"name": "add", "title": "Add", "inputSchema": {"type": "object", "properties": {"a": {"type": "number"}},
        "required": ["a"]}, "icons": [], "annotations": {"readOnlyHint": true}, "_meta": {"k": 1}});
    let loose = json!({"name": "loose", "inputSchema": {"type": "object", "properties": {"a": {}}}});
    let bare = json!({"name": "bare", "description": "b", "inputSchema": {}});
    let script = put_stdio(&portolan, "s", &json!({"tools": [add, loose, bare]})).await;
    let live = path(&["s", "tools"]);
    let listed = portolan.get(&live).await.expect(200);
    let expected = json!([
        {"name": "add", "title": "Add", "description": null, "inputSchema": {"type": "object", "properties": {"a": {"type":
            "number"}}, "required": ["a"], "additionalProperties": false}, "outputSchema": null,
            "annotations": {"readOnlyHint": true}, "_meta": {"k": 1}, "icons": [],
            "health": {"status": "STRICT_COMPLIANT", "reasons": []}},
        {"name": "loose", "title": null, "description": null, "inputSchema": {"type": "object", "properties": {"a": {}},
            "additionalProperties": false}, "outputSchema": null, "annotations": null, "_meta": null,
            "health": {"status": "INVALID", "reasons": ["root.properties.a: Missing 'type'"]}},
        {"name": "bare", "title": null, "description": "b", "inputSchema": {}, "outputSchema": null, "annotations": null,
            "_meta": null, "health": null},
    ]);
    assert_eq!(listed.to_string(), expected.to_string(), "Letta's keys in Letta's order");
    // What is stored is as it was.
    script.set(&json!({"tools": [tool("new", "n"), {"name": "unusable"}]}));
    assert_eq!(names(&portolan.get(&live).await.expect(200)), ["new"]);
    let stored = portolan.tools(id(&by_id(&portolan, "s").await)).await;
    assert_eq!(names(&json!(stored)), ["add", "loose", "bare"]);
    portolan.get(&path(&["nope", "tools"])).await.expect(404);
    put(&portolan, &json!({"server_name": "away", "server_url": DEAD})).await.expect(200);
    let away = portolan.get(&path(&["away", "tools"])).await;
    assert_eq!(away.header("x-should-retry"), Some("false"));
    assert_eq!(away.expect(502)["error"]["type"], "mcp_connection_error");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_is_added_by_finding_it_and_a_new_one_by_looking_again() {
    let portolan = Portolan::start().await;
    let script = put_stdio(&portolan, "s", &json!({"tools": [tool("args", "old")]})).await;
    let server = by_id(&portolan, "s").await;
    let added = portolan.send("POST", &path(&["s", "args"]), None).await.expect(200);
    let tool_id = portolan.tool_id(id(&server), "args").await;
    let newer = format!("/v1/mcp-servers/{}/tools/{tool_id}", id(&server));
    assert_eq!(added, portolan.get(&newer).await.expect(200), "the same tool, with the same id");
    assert_eq!(script.count("tools/list"), 1, "it was there");
    // An SDK sends no body, or an empty one.
    portolan.send("POST", &path(&["s", "args"]), Some(&json!({}))).await.expect(200);

    script.set(&json!({"tools": [tool("args", "old"), tool("new", "n")]}));
    let new = portolan.send("POST", &path(&["s", "new"]), None).await.expect(200);
    assert_eq!((&new["name"], &new["description"]), (&json!("new"), &json!("n")));
    assert_eq!(portolan.tool_id(id(&server), "args").await, tool_id, "the others keep their ids");
    let unknown = portolan.send("POST", &path(&["s", "nope"]), None).await.expect(404);
    assert_eq!(unknown["code"], "not_found");
    portolan.send("POST", &path(&["nope", "args"]), None).await.expect(404);
    // Who cannot be asked is no reason to say that there is no such tool.
    put(&portolan, &json!({"server_name": "away", "server_url": DEAD})).await.expect(200);
    let away = portolan.send("POST", &path(&["away", "args"]), None).await;
    assert_eq!(away.header("x-should-retry"), Some("false"));
    away.expect(502);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_registers_nothing_and_leaves_nothing() {
    let portolan = Portolan::start().await;
    let test = path(&["test"]);
    let script = portolan.script(&json!({"tools": [tool("a", "d"), {"name": "unusable"}]}));
    let tried = portolan.post(&test, &stdio("s", &script)).await.expect(200);
    let expected = json!({
        "status": "success",
        "tools": [{"name": "a", "title": null, "description": "d", "inputSchema": {"type": "object", "properties": {}},
            "outputSchema": null, "annotations": null, "_meta": null}],
        "skipped": [{"name": "unusable", "reason": "its inputSchema is not an object"}],
    });
    assert_eq!(tried.to_string(), expected.to_string(), "Letta's keys in Letta's order");
    crate::harness::eventually("its child is gone", || portolan.children().is_empty()).await;
    let folders = portolan.folder().join("data/children");
    let is_empty = || std::fs::read_dir(&folders).is_ok_and(|mut folder| folder.next().is_none());
    crate::harness::eventually("its folders are gone", is_empty).await;
    for kind in ["sse", "streamable_http"] {
        let fake = Fake::new(fake::Script::default());
        let running = if kind == "sse" { fake::sse::serve(fake) } else { fake::http::serve(fake) };
        let body = json!({"server_name": "s", "type": kind, "server_url": running.url, "auth_token": "t"});
        let tried = portolan.post(&test, &body).await.expect(200);
        assert_eq!(tried["tools"].as_array().unwrap().len(), fake::script::standard_tools().len());
        assert_eq!(running.requests().last().unwrap().header("authorization"), Some("Bearer t"));
        // A 401 is no list.
        let script = fake::Script { require_header: Some(("x-k".into(), "v".into())), ..fake::Script::default() };
        running.set_script(script);
        portolan.post(&test, &body).await.expect(502);
        crate::harness::eventually("its session is closed", || running.streams() == 0).await;
    }
    for (bad, part) in [
        (json!({"server_name": "s", "server_url": DEAD}), "refused"),
        (json!({"server_name": "s", "command": "/nonexistent", "args": []}), "not found"),
    ] {
        let answer = portolan.post(&test, &bad).await;
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        let error = answer.expect(502);
        assert_eq!(error["error"]["type"], "mcp_connection_error");
        assert!(error["error"]["detail"].as_str().unwrap().contains(part), "{error}");
    }
    assert_eq!(portolan.get(ALL).await.expect(200), json!({}), "nothing is registered");

    // A name that is taken is no matter, and its server is none of the test's business.
    let kept = put_stdio(&portolan, "s", &json!({})).await;
    let before = by_id(&portolan, "s").await;
    portolan.post(&test, &stdio("s", &script)).await.expect(200);
    assert_eq!(by_id(&portolan, "s").await, before);
    assert_eq!(kept.starts(), 1);
    // What a registration refuses is refused.
    portolan.post(&test, &json!({"server_name": "s", "server_url": "ftp://x"})).await.expect(422);
    portolan.post(&test, &json!({"server_name": "s", "server_url": DEAD, "auth_token": MASK})).await.expect(422);
    portolan.post(&test, &json!({"server_name": "s", "server_url": "http://169.254.169.254/"})).await.expect(422);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_for_commands_holds_for_every_way_to_name_one() {
    let portolan = Portolan::start_with(|settings| settings.children.stdio = StdioPolicy::Off).await;
    let http = fake::http::serve(Fake::new(fake::Script::default()));
    let url = json!({"server_name": "u", "type": "streamable_http", "server_url": http.url});
    put(&portolan, &url).await.expect(200);
    portolan.post(&path(&["test"]), &url).await.expect(200);
    let told = portolan.post(&path(&["connect"]), &url).await;
    assert!(told.status == 200 && told.text.contains(r#"data: {"event":"success""#), "{}", told.text);
    let script = portolan.script(&json!({}));
    let command = stdio("c", &script);
    for (method, path, body) in [
        ("PUT", ALL.to_owned(), command.clone()),
        ("POST", path(&["test"]), command.clone()),
        ("POST", path(&["connect"]), command.clone()),
        ("PATCH", path(&["u"]), json!({ "stdio_config": command })),
    ] {
        let error = portolan.send(method, &path, Some(&body)).await.expect(403);
        assert_eq!(error["code"], "stdio_disabled", "{method} {path}");
    }
    assert_eq!(script.starts(), 0);
    assert_eq!(keys(&portolan.get(ALL).await.expect(200)), ["u"]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resync_is_a_refresh() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(fake::Script { tools: vec![tool("a", "")], ..fake::Script::default() }));
    put(&portolan, &json!({"server_name": "h", "type": "streamable_http", "server_url": http.url})).await.expect(200);
    http.set_script(fake::Script { tools: vec![tool("b", "")], ..fake::Script::default() });
    let resync = path(&["h", "resync"]);
    let changes = portolan.send("POST", &format!("{resync}?agent_id=agent-1"), None).await.expect(200);
    assert_eq!(keys(&changes)[..3], ["deleted", "updated", "added"]);
    assert_eq!((&changes["deleted"], &changes["added"]), (&json!(["a"]), &json!(["b"])));
    assert_eq!(http.requests().last().unwrap().header("x-agent-id"), Some("agent-1"));
    portolan.send("POST", &format!("{resync}?agent_id="), None).await.expect(200);
    portolan.send("POST", &format!("{resync}?agent_id=a%0ab"), None).await.expect(422);
    portolan.send("POST", &path(&["nope", "resync"]), None).await.expect(404);
    drop(http);
    let away = portolan.send("POST", &resync, None).await;
    assert_eq!(away.header("x-should-retry"), Some("false"));
    assert_eq!(away.expect(404)["detail"]["code"], "MCPServerUnavailable");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_is_executed_once_however_often_it_is_asked_for() {
    let portolan = Portolan::start_with(|settings| {
        settings.runs.early_head_after = Duration::from_millis(200);
        settings.runs.drip_every = Duration::from_millis(100);
    })
    .await;
    let script = put_stdio(&portolan, "s", &json!({})).await;
    let execute = |tool: &str| path(&["s", "tools", tool, "execute"]);
    let ask = async |tool: &str, headers: &[(&str, &str)], args: Value| {
        let request = portolan.request("POST", &execute(tool)).json(&json!({ "args": args }));
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        Answer::of("POST", &execute(tool), request).await
    };
    let echo = ask("echo", &[], json!({"message": "hi"})).await;
    assert_eq!(echo.text, r#"{"result":"hi","success":true}"#, "Letta's to the letter");
    assert_eq!(portolan.send("POST", &execute("count"), None).await.expect(200)["result"], "1", "without a body");
    assert_eq!(ask("fail", &[], json!({})).await.expect(200)["success"], false);
    assert_eq!(ask("rpc_error", &[], json!({})).await.expect(200)["success"], false);
    ask("nope", &[], json!({})).await.expect(404);
    portolan.send("POST", &execute("echo"), Some(&json!({"args": null}))).await.expect(422);
    portolan.send("POST", &execute("echo"), Some(&json!({"arguments": {}}))).await.expect(422);

    // An SDK that tries again, one that names its run, and one that asks for neither.
    let calls = || script.seen().iter().filter(|(_, message)| message["params"]["name"] == "slow").count();
    let slow = json!({"ms": 1_000});
    let first = [("x-stainless-retry-count", "0")];
    let (one, two) = tokio::join!(ask("slow", &first, slow.clone()), async {
        crate::harness::eventually("it is called", || calls() == 1).await;
        ask("slow", &[("x-stainless-retry-count", "1")], slow.clone()).await
    });
    assert!(one.text.starts_with(' '), "it has an early head: {}", one.text);
    assert_eq!(two.header("x-portolan-repeated"), Some("true"));
    assert_eq!(one.expect(200), json!({"result": "done", "success": true}));
    assert_eq!(two.expect(200), json!({"result": "done", "success": true}));
    assert_eq!(calls(), 1);
    let key = [("idempotency-key", "k")];
    let (one, two) = (ask("count", &key, json!({})).await.expect(200), ask("count", &key, json!({})).await.expect(200));
    assert_eq!((&one["result"], &two["result"]), (&json!("2"), &json!("2")));
    ask("count", &key, json!({"other": 1})).await.expect(422);
    assert_eq!(ask("count", &[], json!({})).await.expect(200)["result"], "3");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_away_when_it_was_registered_is_executed_on_when_it_is_back() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(fake::Script::default()));
    let (addr, url) = (http.addr, http.url.clone());
    drop(http);
    put(&portolan, &json!({"server_name": "h", "type": "streamable_http", "server_url": url})).await.expect(200);
    let execute = path(&["h", "tools", "echo", "execute"]);
    let args = json!({"args": {"message": "m"}});
    let away = portolan.post(&execute, &args).await;
    assert_eq!(away.header("x-should-retry"), Some("false"));
    assert_eq!(away.expect(502)["error"]["type"], "mcp_connection_error");
    let _http = fake::http::serve_on(addr, Fake::new(fake::Script::default()));
    let back = portolan.post(&execute, &args).await;
    assert_eq!(back.expect(200), json!({"result": "m", "success": true}));
    portolan.post(&path(&["h", "tools", "nope", "execute"]), &args).await.expect(404);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_for_sign_ins_is_shown_without_its_secret() {
    let portolan = Portolan::start().await;
    let body = json!({"server_name": "signs", "type": "sse", "server_url": DEAD, "oauth": {"client_id": "c", "client_secret": "s-e-c"}});
    let list = put(&portolan, &body).await.expect(200);
    assert_eq!((&list[0]["oauth"]["client_id"], &list[0]["oauth"]["client_secret"]), (&json!("c"), &json!(MASK)));
    let listed = portolan.get(ALL).await.expect(200);
    assert_eq!(listed["signs"]["oauth"]["client_secret"], MASK);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_only_run_tools_does_not_say_what_a_server_is_first_known_with() {
    const ADMIN: &str = "ptl_admin-DAw2Zb8iEwJ0mYw5cUuV1o7x";
    const RUN: &str = "ptl_run-kq0Zb8iEwJ0mYw5cUuV1o7xs3";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(&file, format!("runner:run:{}\n", sha256_hex(RUN))).unwrap();
    let portolan = Portolan::start_with(|settings| {
        settings.tokens.token = Some(ADMIN.to_owned().into());
        settings.tokens.tokens_file = Some(file);
    })
    .await;
    let (admin, runner) = (portolan.remote_with(ADMIN), portolan.remote_with(RUN));
    let http = fake::http::serve(Fake::new(fake::Script::default()));
    let (addr, url) = (http.addr, http.url.clone());
    drop(http);
    let body = json!({"server_name": "h", "type": "streamable_http", "server_url": url});
    admin.send("PUT", ALL, Some(&body)).await.expect(200);
    let _http = fake::http::serve_on(addr, Fake::new(fake::Script::default()));
    let execute = path(&["h", "tools", "echo", "execute"]);
    let args = json!({"args": {"message": "m"}});
    runner.post(&execute, &args).await.expect(404);
    let servers = admin.send("GET", "/v1/mcp-servers/", None).await.expect(200);
    let tools = format!("/v1/mcp-servers/{}/tools", id(&servers[0]));
    assert_eq!(admin.send("GET", &tools, None).await.expect(200), json!([]), "nothing is known of it");
    // Whoever looks at it keeps nothing of that.
    let live = path(&["h", "tools"]);
    assert_eq!(admin.send("GET", &live, None).await.expect(200)[0]["name"], "echo");
    assert_eq!(runner.send("GET", &live, None).await.expect(200)[0]["name"], "echo");
    assert_eq!(admin.send("GET", &tools, None).await.expect(200), json!([]));
    admin.post(&execute, &args).await.expect(200);
    assert_eq!(runner.post(&execute, &args).await.expect(200), json!({"result": "m", "success": true}));
    portolan.stop().await;
}
