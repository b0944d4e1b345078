//! Tool lists: refresh, order, ids, and what servers do to them (CONTRACT rows 9, 11, 12).

use serde_json::{Value, json};

use crate::harness::{Portolan, eventually};

fn tool(name: &str) -> Value {
    json!({"name": name, "description": format!("does {name}"), "inputSchema": {"type": "object", "properties": {"a": {"type": "string"}}}})
}

fn names(tools: &[Value]) -> Vec<&str> {
    tools.iter().map(|tool| tool["name"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_is_lettas_to_the_letter() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("probe", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let tools = portolan.tools(id).await;
    let add = tools.iter().find(|tool| tool["name"] == "add").unwrap();
    let mut expected: Value = serde_json::from_str(include_str!("data/tool_add.json")).unwrap();
    expected["id"] = add["id"].clone();
    expected["metadata_"]["mcp"]["server_id"] = json!(id);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(add), keys(&expected), "key order");
    assert_eq!(keys(&add["json_schema"]), keys(&expected["json_schema"]));
    let mut shown = add.clone();
    let mcp = shown["metadata_"]["mcp"].as_object_mut().unwrap();
    let definition = mcp.shift_remove("definition").unwrap();
    for ours in ["definition_hash", "changes", "held", "flags"] {
        mcp.shift_remove(ours).unwrap();
    }
    assert_eq!(shown, expected);
    assert_eq!(definition["inputSchema"]["title"], "addArguments");
    let retrieved =
        portolan.get(&format!("/v1/mcp-servers/{id}/tools/{}", add["id"].as_str().unwrap())).await.expect(200);
    assert_eq!(&retrieved, add);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paging_is_followed_to_its_end() {
    let portolan = Portolan::start().await;
    let all: Vec<_> = (0..250).map(|number| tool(&format!("tool {number:03}"))).collect();
    let (server, script) = portolan.create_stdio("many", &json!({ "tools": all, "page_size": 45 })).await;
    assert_eq!(server["status"]["tool_count"], 250);
    let id = server["id"].as_str().unwrap();
    let tools = portolan.tools(id).await;
    assert_eq!(names(&tools), names(&all), "the server's order");
    assert_eq!(script.methods().iter().filter(|method| *method == "tools/list").count(), 6);
    let again = portolan.refresh(id).await.expect(200);
    assert_eq!(
        again,
        json!({"deleted":[],"updated":[],"added":[],"unchanged":250,"skipped":[],"changed":[],"held":[],"flagged":[]})
    );
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_without_end_is_an_error_and_changes_nothing() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("loop", &json!({"tools": [tool("a"), tool("b")]})).await;
    let id = server["id"].as_str().unwrap();
    let before = portolan.tools(id).await;
    for trouble in [
        json!({"tools": [tool("c")], "page_size": 1, "repeat_cursor": true}),
        json!({"endless": true, "page_size": 100}),
        json!({"list_error": {"code": -32603, "message": "inner trouble"}}),
    ] {
        script.set(&trouble);
        let answer = portolan.refresh(id).await;
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        let body = answer.expect(404);
        assert_eq!(body["detail"]["code"], "MCPServerUnavailable");
        assert_eq!(body["detail"]["message"], "Could not connect to MCP server loop to resync tools");
        assert_eq!(portolan.tools(id).await, before, "{trouble}");
        let status = portolan.get(&format!("/v1/mcp-servers/{id}")).await.expect(200)["status"].take();
        assert_eq!(status["state"], "unreachable");
        assert_eq!(status["error"], body["detail"]["error"]);
    }
    script.set(&json!({"tools": [tool("a"), tool("b")]}));
    assert_eq!(portolan.refresh(id).await.expect(200)["unchanged"], 2);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_says_what_changed_and_keeps_ids() {
    let portolan = Portolan::start().await;
    let (server, script) =
        portolan.create_stdio("changing", &json!({"tools": [tool("a"), tool("b"), tool("c")]})).await;
    let id = server["id"].as_str().unwrap();
    let before = portolan.tools(id).await;
    let mut b = tool("b");
    b["outputSchema"] = json!({"type": "object"});
    b["title"] = json!("B");
    let mut a = tool("a");
    a["description"] = json!("does it better");
    script.set(&json!({"tools": [tool("d"), b, a]}));
    let mut refreshed = portolan.refresh(id).await.expect(200);
    for changed in refreshed["changed"].as_array_mut().unwrap() {
        let hashes = ["old", "new"].map(|key| changed.as_object_mut().unwrap().shift_remove(key).unwrap());
        assert_ne!(hashes[0], hashes[1]);
    }
    assert_eq!(
        refreshed,
        json!({
            "deleted": ["c"], "updated": ["b", "a"], "added": ["d"], "unchanged": 0, "skipped": [],
            "changed": [
                {"name": "b", "what": ["outputSchema", "title"], "held": false},
                {"name": "a", "what": ["description"], "held": false},
            ],
            "held": [], "flagged": [],
        })
    );
    let after = portolan.tools(id).await;
    assert_eq!(names(&after), ["d", "b", "a"]);
    assert_eq!((&after[1]["id"], &after[2]["id"]), (&before[1]["id"], &before[0]["id"]));
    assert_eq!(after[2]["json_schema"]["description"], "does it better");
    assert_eq!(after[1]["metadata_"]["mcp"]["definition"]["title"], "B");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_dropped_silently() {
    let portolan = Portolan::start().await;
    let invalid = json!({"name": "invalid", "inputSchema": {"type": "object", "properties": {"a": {}}}});
    let literal = json!({"name": "literal", "inputSchema": {"type": "object", "properties": {"a": true}}});
    let absent = json!({"name": "null", "inputSchema": {"type": "object", "properties": null}});
    let long = "n".repeat(5000);
    let listed = json!([
        tool("twice"), tool("twice"), {"name": "no schema"}, 17, {"inputSchema": {}}, invalid, literal, absent,
        tool(&long), tool("dotted.name/with-hyphen and space"),
    ]);
    let (server, _script) = portolan.create_stdio("odd", &json!({ "tools": listed })).await;
    let id = server["id"].as_str().unwrap();
    let tools = portolan.tools(id).await;
    assert_eq!(names(&tools), ["twice", "invalid", "literal", "null", &long, "dotted.name/with-hyphen and space"]);
    assert_eq!(tools[1]["json_schema"]["mcp:SCHEMA_STATUS"], "INVALID");
    assert_eq!(tools[1]["json_schema"]["mcp:SCHEMA_WARNINGS"], json!(["root.properties.a: Missing 'type'"]));
    let refreshed = portolan.refresh(id).await.expect(200);
    assert_eq!(refreshed["unchanged"], 6);
    let skipped: Vec<_> = refreshed["skipped"].as_array().unwrap().iter().map(|skip| &skip["name"]).collect();
    assert_eq!(skipped, ["twice", "no schema", "(tool 4)", "(tool 5)"]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_odd_tool_does_not_cost_the_list() {
    let portolan = Portolan::start().await;
    let deep = format!("{}{{}}{}", r#"{"not":"#.repeat(200), "}".repeat(200));
    // Written out: no JSON value could hold half a surrogate pair.
    let tools = [
        &format!(r#"{{"name":"deep","inputSchema":{deep}}}"#),
        r#"{"name":"huge","inputSchema":{"maximum":1e400}}"#,
        r#"{"name":"cut","description":"half \ud83d","inputSchema":{"type":"object"}}"#,
        r#"{"name":"icons","inputSchema":{"type":"object"},"icons":"none","annotations":{"readOnlyHint":"yes"}}"#,
        r#"{"name":"fine","inputSchema":{"type":"object"}}"#,
    ];
    let list = format!(r#"{{"jsonrpc":"2.0","id":{{id}},"result":{{"tools":[{}]}}}}"#, tools.join(","));
    let script = json!({"acts": {"list": {"steps": [{ "say": list }]}}});
    let (server, _script) = portolan.create_stdio("odd", &script).await;
    assert_eq!(server["status"]["state"], "ready", "{server}");
    assert_eq!(server["status"]["error"], "The tool \"deep\" and 1 more could not be kept; a refresh says why.");
    let id = server["id"].as_str().unwrap();
    let tools = portolan.tools(id).await;
    assert_eq!(names(&tools), ["cut", "icons", "fine"]);
    assert_eq!(tools[0]["description"], "half \u{fffd}");
    let skipped = portolan.refresh(id).await.expect(200)["skipped"].take();
    assert_eq!((&skipped[0]["name"], &skipped[1]["name"]), (&json!("deep"), &json!("huge")));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tools_is_ready() {
    let portolan = Portolan::start().await;
    let none = json!({"list_error": {"code": -32601, "message": "Method not found"}});
    let (server, _script) = portolan.create_stdio("none", &none).await;
    assert_eq!((&server["status"]["state"], &server["status"]["tool_count"]), (&json!("ready"), &json!(0)), "{server}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_with_the_same_tools_are_independent() {
    let portolan = Portolan::start().await;
    let (first, _a) = portolan.create_stdio("first", &json!({"tools": [tool("echo")]})).await;
    let (second, _b) = portolan.create_stdio("second", &json!({"tools": [tool("echo")]})).await;
    let (first, second) = (first["id"].as_str().unwrap(), second["id"].as_str().unwrap());
    let ours = portolan.tools(first).await;
    let theirs = portolan.tools(second).await;
    assert_ne!(ours[0]["id"], theirs[0]["id"]);
    assert_eq!((&ours[0]["tags"], &theirs[0]["tags"]), (&json!(["mcp:first"]), &json!(["mcp:second"])));
    portolan.delete(&format!("/v1/mcp-servers/{second}")).await.expect(204);
    assert_eq!(portolan.tools(first).await, ours);
    assert_eq!(portolan.run(first, "echo", json!({"message":"still"})).await["func_return"], "still");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_and_metadata_follow_a_rename() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("old", &json!({"tools": [tool("a")]})).await;
    let id = server["id"].as_str().unwrap();
    let before = portolan.tools(id).await;
    portolan.patch(&format!("/v1/mcp-servers/{id}"), &json!({"server_name":"new: name"})).await.expect(200);
    let after = portolan.tools(id).await;
    assert_eq!(after[0]["id"], before[0]["id"]);
    assert_eq!(after[0]["tags"], json!(["mcp:new: name"]));
    assert_eq!(after[0]["metadata_"]["mcp"]["server_name"], "new: name");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refreshes_at_once_agree() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("busy", &json!({"tools": [tool("a")]})).await;
    let id = server["id"].as_str().unwrap();
    script.set(&json!({"tools": [tool("a"), tool("b")], "list_delay_ms": 100}));
    let (one, two, three) = tokio::join!(portolan.refresh(id), portolan.refresh(id), portolan.refresh(id));
    let added: Vec<_> = [one, two, three].into_iter().map(|answer| answer.expect(200)["added"].clone()).collect();
    assert_eq!(added.iter().filter(|added| **added == json!(["b"])).count(), 1, "{added:?}");
    assert_eq!(names(&portolan.tools(id).await), ["a", "b"]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_configuration_ends_the_session_and_the_next_call_uses_the_new_one() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("moving", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let old = portolan.children();
    assert_eq!(old.len(), 1);
    let args = json!(["stdio", "marker", server["args"][1]]);
    let changed = portolan.patch(&format!("/v1/mcp-servers/{id}"), &json!({"config":{"args": args}})).await.expect(200);
    assert_eq!(changed["status"]["state"], "never_connected");
    eventually("the old child ends", || !portolan.children().contains(&old[0])).await;
    let argv = portolan.run(id, "argv", json!({})).await;
    assert!(argv["func_return"].as_str().unwrap().contains("marker"), "{argv}");
    assert_eq!(portolan.children().len(), 1);
    portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204);
    eventually("a deleted server's child ends", || portolan.children().is_empty()).await;
    portolan.stop().await;
}
