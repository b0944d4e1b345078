//! A server that offers another tool than it did: what changed is on record, and under `--tool-changes hold` nothing is run
//! that nobody has approved, however it came.

use portolan::app::App;
use portolan::config::ToolPolicy;
use portolan::model::By;
use serde_json::{Value, json};

use crate::fake::{self, Fake};
use crate::harness::{Answer, Portolan, Script, eventually};

async fn start(policy: ToolPolicy) -> Portolan {
    Portolan::start_with(|settings| settings.upstream.tools.tool_changes = policy).await
}

/// A tool of the fake server that answers with its arguments.
fn tool(description: &str) -> Value {
    named("args", description)
}

fn named(name: &str, description: &str) -> Value {
    json!({ "name": name, "description": description, "inputSchema": { "type": "object", "properties": {} } })
}

/// A server with one tool, which a refresh may find changed.
struct Scene {
    portolan: Portolan,
    id: String,
    script: Script,
}

impl Scene {
    async fn new(policy: ToolPolicy) -> Self {
        let portolan = start(policy).await;
        let (server, script) = portolan.create_stdio("changing", &json!({ "tools": [tool("old")] })).await;
        Self { portolan, id: server["id"].as_str().unwrap().to_owned(), script }
    }

    /// A refresh that finds these tools.
    async fn offer(&self, tools: &[Value]) -> Value {
        self.script.set(&json!({ "tools": tools }));
        self.portolan.refresh(&self.id).await.expect(200)
    }

    async fn path(&self, name: &str) -> String {
        format!("/v1/mcp-servers/{}/tools/{}", self.id, self.portolan.tool_id(&self.id, name).await)
    }

    /// What `metadata_.mcp` says of a tool.
    async fn mcp(&self, name: &str) -> Value {
        let tool = self.portolan.get(&self.path(name).await).await.expect(200);
        let listed = self.portolan.tools(&self.id).await.into_iter().find(|listed| listed["name"] == name);
        assert_eq!(listed.as_ref(), Some(&tool), "alone and in the list");
        tool["metadata_"]["mcp"].clone()
    }

    async fn try_run(&self, name: &str) -> Answer {
        self.portolan.try_run(&self.id, name, json!({})).await
    }

    async fn approve(&self, name: &str, body: Option<&Value>) -> Answer {
        self.portolan.send("POST", &format!("{}/approve", self.path(name).await), body).await
    }

    async fn runs(&self, name: &str) {
        assert_eq!(self.mcp(name).await["held"], false);
        assert_eq!(self.try_run(name).await.expect(200)["status"], "success");
    }

    /// The tool is held, and no call of it reaches the server.
    async fn is_held(&self, name: &str) {
        let calls = self.script.count("tools/call");
        let answer = self.try_run(name).await;
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        let error = answer.expect(403);
        assert_eq!(error["code"], "tool_held");
        assert!(error["detail"].as_str().unwrap().contains("approve"), "{error}");
        assert_eq!(self.mcp(name).await["held"], true);
        // With an SDK's count it is the same, also for the next try.
        for count in ["0", "1", "2"] {
            let path = format!("{}/run", self.path(name).await);
            let request = self.portolan.request("POST", &path).header("x-stainless-retry-count", count);
            Answer::of("POST", &path, request.json(&json!({}))).await.expect(403);
        }
        assert_eq!(self.script.count("tools/call"), calls, "nothing was sent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_on_record_and_by_default_no_more() {
    let scene = Scene::new(ToolPolicy::Report).await;
    let before = scene.mcp("args").await;
    assert_eq!((&before["changes"], &before["held"]), (&json!([]), &json!(false)));
    let respelt = format!(
        r#"{{"tools":[{}]}}"#,
        r#"{"inputSchema":{"properties":{},"type":"object"},"description":"old","name":"args"}"#
    );
    let refreshed = scene.offer(serde_json::from_str::<Value>(&respelt).unwrap()["tools"].as_array().unwrap()).await;
    assert_eq!(
        (&refreshed["unchanged"], &refreshed["changed"]),
        (&json!(1), &json!([])),
        "the order of keys is no change"
    );
    assert_eq!(scene.mcp("args").await["definition_hash"], before["definition_hash"]);

    let refreshed = scene.offer(&[tool("new")]).await;
    let changed = &refreshed["changed"][0];
    assert_eq!(
        (&changed["name"], &changed["what"], &changed["held"]),
        (&json!("args"), &json!(["description"]), &json!(false))
    );
    assert_eq!(changed["old"], before["definition_hash"]);
    assert_eq!(refreshed["held"], json!([]));
    let after = scene.mcp("args").await;
    assert_eq!(after["definition_hash"], changed["new"]);
    let record = &after["changes"][0];
    assert_eq!((&record["old"], &record["new"], &record["what"]), (&changed["old"], &changed["new"], &changed["what"]));
    let at = chrono::DateTime::parse_from_rfc3339(record["at"].as_str().unwrap()).unwrap();
    assert!((chrono::Utc::now() - at.to_utc()).num_minutes().abs() < 10);
    scene.runs("args").await;

    // Gone and back: the record goes on.
    scene.offer(&[]).await;
    let refreshed = scene.offer(&[tool("newest")]).await;
    assert_eq!((&refreshed["added"], &refreshed["changed"]), (&json!(["args"]), &json!([])));
    let after = scene.mcp("args").await;
    assert_eq!(after["changes"].as_array().unwrap().len(), 2);
    assert_eq!(after["changes"][0]["old"], changed["new"]);
    assert_eq!(after["changes"][1], *record);
    scene.runs("args").await;
    scene.portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_tool_is_held_until_an_admin_approves_it() {
    let scene = Scene::new(ToolPolicy::Hold).await;
    scene.runs("args").await;
    let old = scene.mcp("args").await["definition_hash"].clone();
    let refreshed = scene.offer(&[tool("new")]).await;
    assert_eq!((&refreshed["changed"][0]["held"], &refreshed["held"]), (&json!(true), &json!(["args"])));
    scene.is_held("args").await;
    let path = format!("{}/run", scene.path("args").await);
    let with_key = || scene.portolan.request("POST", &path).header("idempotency-key", "once").json(&json!({}));
    Answer::of("POST", &path, with_key()).await.expect(403);
    assert_eq!(scene.offer(&[tool("new")]).await["held"], json!(["args"]), "another refresh does not release it");
    scene.is_held("args").await;

    // An approval is for what was seen.
    let seen = scene.mcp("args").await["definition_hash"].clone();
    scene.offer(&[tool("newer")]).await;
    let late = scene.approve("args", Some(&json!({ "hash": seen }))).await;
    assert_eq!(late.header("x-should-retry"), Some("false"));
    assert_eq!(late.expect(409)["code"], "tool_changed");
    scene.is_held("args").await;
    let now = scene.mcp("args").await;
    assert_eq!(now["changes"].as_array().unwrap().len(), 2);
    let approved = scene.approve("args", Some(&json!({ "hash": now["definition_hash"] }))).await.expect(200);
    assert_eq!(approved["metadata_"]["mcp"]["held"], false);
    // What was not sent is not remembered.
    assert_eq!(Answer::of("POST", &path, with_key()).await.expect(200)["status"], "success");
    scene.runs("args").await;
    scene.approve("args", None).await.expect(200);
    scene.runs("args").await;
    assert_eq!(scene.offer(&[tool("newer")]).await["held"], json!([]));
    scene.runs("args").await;

    // What was approved before is not approved for ever; what is approved now is, when it comes back.
    scene.offer(&[tool("old")]).await;
    assert_eq!(scene.mcp("args").await["definition_hash"], old);
    scene.is_held("args").await;
    scene.offer(&[tool("newer")]).await;
    scene.runs("args").await;
    scene.portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_names_a_tool_that_is_there_and_nothing_else() {
    let scene = Scene::new(ToolPolicy::Hold).await;
    scene.offer(&[tool("new")]).await;
    let (other, _script) = scene.portolan.create_stdio("other", &json!({})).await;
    let path = scene.path("args").await;
    let tool_id = path.rsplit('/').next().unwrap();
    for wrong in [
        format!("/v1/mcp-servers/{}/tools/{tool_id}/approve", other["id"].as_str().unwrap()),
        format!("/v1/mcp-servers/{}/tools/tool-1/approve", scene.id),
        format!("/v1/mcp-servers/x/tools/{tool_id}/approve"),
    ] {
        scene.portolan.send("POST", &wrong, None).await.expect(404);
    }
    for wrong in
        [json!({ "hash": "x" }), json!({ "hash": 1 }), json!({ "Hash": null }), json!({ "hash": "é".repeat(32) })]
    {
        scene.approve("args", Some(&wrong)).await.expect(422);
    }
    scene.approve("args", Some(&json!({ "hash": "0".repeat(64) }))).await.expect(409);
    let text =
        scene.portolan.request("POST", &format!("{path}/approve")).header("content-type", "text/plain").body("{}");
    Answer::of("POST", &format!("{path}/approve"), text).await.expect(415);
    scene.is_held("args").await;
    let upper = scene.mcp("args").await["definition_hash"].as_str().unwrap().to_uppercase();
    scene.approve("args", Some(&json!({ "hash": upper }))).await.expect(200);
    scene.runs("args").await;
    scene.portolan.stop().await;
}

/// The first list is what was registered; everything later is new, whatever way it takes.
#[tokio::test(flavor = "multi_thread")]
async fn no_way_round_an_approval() {
    let scene = Scene::new(ToolPolicy::Hold).await;
    // A new name, beside the old one and instead of it.
    assert_eq!(scene.offer(&[tool("old"), named("echo", "new")]).await["held"], json!(["echo"]));
    scene.is_held("echo").await;
    scene.runs("args").await;
    // Gone and back as another tool.
    scene.offer(&[]).await;
    assert_eq!(scene.offer(&[tool("new")]).await["held"], json!(["args"]));
    scene.is_held("args").await;
    // Gone and back as it was.
    scene.offer(&[]).await;
    assert_eq!(scene.offer(&[tool("old")]).await["held"], json!([]));
    scene.runs("args").await;
    // Gone when it was held, and back.
    scene.offer(&[tool("new")]).await;
    scene.offer(&[]).await;
    scene.offer(&[tool("new"), named("echo", "new")]).await;
    scene.is_held("args").await;
    scene.is_held("echo").await;
    // Not kept for a while, because it could not be.
    scene.offer(&[json!({ "name": "args", "inputSchema": 5 })]).await;
    scene.offer(&[tool("newer")]).await;
    scene.is_held("args").await;
    // On another server, under another name.
    let script = scene.portolan.script(&json!({ "tools": [tool("moved")] }));
    let config = json!({ "config": { "command": crate::harness::fake_mcp(), "args": ["stdio", script.0] } });
    let one = format!("/v1/mcp-servers/{}", scene.id);
    scene.portolan.patch(&one, &config).await.expect(200);
    assert_eq!(scene.portolan.refresh(&scene.id).await.expect(200)["held"], json!(["args"]));
    scene.is_held("args").await;
    scene.approve("args", None).await.expect(200);
    assert_eq!(scene.portolan.run(&scene.id, "args", json!({})).await["status"], "success");
    scene.portolan.stop().await;
}

/// A server that begins with nothing has nothing that was registered.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_list_is_a_first_one() {
    let portolan = start(ToolPolicy::Hold).await;
    let (server, script) = portolan.create_stdio("empty", &json!({ "tools": [] })).await;
    let scene = Scene { id: server["id"].as_str().unwrap().to_owned(), portolan, script };
    assert_eq!(scene.offer(&[tool("later")]).await["held"], json!(["args"]));
    scene.is_held("args").await;
    scene.portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_listed_in_the_background_is_held_too() {
    let portolan = start(ToolPolicy::Hold).await;
    let before: fake::Script = serde_json::from_value(json!({
        "tools": [tool("old")], "list_changed": true, "get_stream": true,
    }))
    .unwrap();
    let after: fake::Script = serde_json::from_value(json!({
        "tools": [tool("new")], "list_changed": true, "get_stream": true,
    }))
    .unwrap();
    let http = fake::http::serve(Fake::new(before));
    let server = portolan.create("telling", json!({ "server_url": http.url })).await;
    let id = server["id"].as_str().unwrap();
    let path = format!("/v1/mcp-servers/{id}/tools/{}", portolan.tool_id(id, "args").await);
    portolan.post(&format!("{path}/run"), &json!({})).await.expect(200);
    eventually("Portolan listens", || http.streams() > 0).await;
    http.set_script(after);
    http.list_changed();
    let deadline = tokio::time::Instant::now() + crate::harness::PATIENCE;
    while portolan.get(&path).await.expect(200)["metadata_"]["mcp"]["held"] == false {
        assert!(tokio::time::Instant::now() < deadline, "the change is not seen");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let run = portolan.post(&format!("{path}/run"), &json!({})).await;
    assert_eq!(run.expect(403)["code"], "tool_held");
    portolan.stop().await;
}

/// A second Portolan on the same database, or the same database under another policy.
async fn reopened(scene: Scene, policy: ToolPolicy) -> Scene {
    let Scene { portolan, id, script } = scene;
    Scene { portolan: portolan.reopen(|settings| settings.upstream.tools.tool_changes = policy).await, id, script }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_may_change() {
    let scene = Scene::new(ToolPolicy::Hold).await;
    scene.offer(&[tool("new")]).await;
    scene.is_held("args").await;
    let scene = reopened(scene, ToolPolicy::Report).await;
    scene.runs("args").await;
    scene.offer(&[tool("newest")]).await;
    scene.runs("args").await;
    let scene = reopened(scene, ToolPolicy::Hold).await;
    scene.runs("args").await;
    assert_eq!(scene.offer(&[tool("newest")]).await["held"], json!([]), "what came meanwhile is where it begins");
    scene.runs("args").await;
    scene.offer(&[tool("other")]).await;
    scene.is_held("args").await;
    scene.portolan.stop().await;
}

/// An approval ends what others know of the tool after a second at most, here at once.
#[tokio::test(flavor = "multi_thread")]
async fn an_approval_by_another_portolan_counts() {
    let scene = Scene::new(ToolPolicy::Hold).await;
    scene.offer(&[tool("new")]).await;
    scene.is_held("args").await;
    let another: App = scene.portolan.another().await;
    let tool_id = scene.portolan.tool_id(&scene.id, "args").await;
    assert!(another.store.approve_tool(&scene.id, &tool_id, None, &By::default()).await.unwrap());
    let deadline = tokio::time::Instant::now() + crate::harness::PATIENCE;
    while scene.try_run("args").await.status != 200 {
        assert!(tokio::time::Instant::now() < deadline, "the approval is not seen");
    }
    scene.portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn characters_that_nobody_sees_are_flagged() {
    let scene = Scene::new(ToolPolicy::Report).await;
    assert_eq!(scene.mcp("args").await["flags"], json!([]));
    let refreshed = scene
        .offer(&[
            json!({ "name": "args", "description": "pay\u{200B}pal", "inputSchema": { "properties": { "a\u{202E}": {} } } }),
            named("e\u{E0041}cho", "visible"),
            named("fine", "Two\nlines, \u{1F468}\u{200D}\u{1F469}"),
        ])
        .await;
    let zero_width = json!({ "kind": "zero_width", "at": "/description" });
    let bidi = json!({ "kind": "bidi", "at": "/inputSchema/properties/a\\u{202e}" });
    assert_eq!(
        refreshed["flagged"],
        json!([
            { "name": "args", "flags": [zero_width, bidi] },
            { "name": "e\u{E0041}cho", "flags": [{ "kind": "tag", "at": "/name" }] },
        ])
    );
    assert_eq!(scene.mcp("args").await["flags"], json!([zero_width, bidi]));
    assert_eq!(scene.mcp("fine").await["flags"], json!([]));
    scene.portolan.stop().await;
}
