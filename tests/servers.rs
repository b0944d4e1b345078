//! `/v1/mcp-servers/`: register, list, retrieve, change, delete (CONTRACT rows 1 to 10).

use portolan::store::{Database, Place};
use serde_json::{Value, json};

use crate::fake;
use crate::harness::{Answer, Portolan};

const DEAD: &str = "http://127.0.0.1:1/mcp";

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_type_is_answered_with_lettas_keys_in_lettas_order() {
    let portolan = Portolan::start().await;
    let ours = ["type", "created_at", "updated_at", "status"];
    let stdio = portolan.create("a", json!({"mcp_server_type":"stdio","command":"/nonexistent","args":[]})).await;
    let lettas = ["mcp_server_type", "command", "args", "env", "id", "server_name"];
    assert_eq!(keys(&stdio), [&lettas[..], &ours].concat());
    assert_eq!(stdio["env"], Value::Null);
    for kind in ["sse", "streamable_http"] {
        let remote = portolan.create(kind, json!({ "mcp_server_type": kind, "server_url": DEAD })).await;
        let lettas =
            ["mcp_server_type", "server_url", "auth_header", "auth_token", "custom_headers", "id", "server_name"];
        assert_eq!(keys(&remote), [&lettas[..], &ours].concat());
        assert_eq!((&remote["mcp_server_type"], &remote["type"]), (&json!(kind), &json!(kind)));
        assert_eq!(remote["custom_headers"], Value::Null);
        let retrieved = portolan.get(&format!("/v1/mcp-servers/{}", remote["id"].as_str().unwrap())).await.expect(200);
        assert_eq!(retrieved, remote);
    }
    let list = portolan.get("/v1/mcp-servers/").await.expect(200);
    let names: Vec<_> = list.as_array().unwrap().iter().map(|server| server["server_name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "sse", "streamable_http"]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_generations_and_missing_types_are_understood() {
    let portolan = Portolan::start().await;
    let command = "/nonexistent";
    for (number, (fields, kind)) in [
        (json!({"config":{"command":command,"args":["a"]}}), "stdio"),
        (json!({"config":{"server_url":DEAD}}), "streamable_http"),
        (json!({"config":{"server_url":DEAD,"type":"sse"}}), "sse"),
        (json!({"config":{"server_url":DEAD,"type":"sse","mcp_server_type":"sse"}}), "sse"),
        (json!({"config":{"mcp_server_type":"stdio","command":command,"args":["a"],"env":{"K":"V"}}}), "stdio"),
        (json!({"type":"stdio","command":command,"args":["a"],"env":{"K":"V"}}), "stdio"),
        (json!({"command":command,"args":["a"]}), "stdio"),
        (json!({"server_url":DEAD}), "sse"),
        (json!({"server_url":DEAD,"type":"streamable_http"}), "streamable_http"),
        (json!({"server_url":DEAD,"mcp_server_type":"streamable_http"}), "streamable_http"),
        (json!({"server_url":DEAD,"type":"sse","auth_token":null,"custom_headers":null}), "sse"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut body = fields.clone();
        body["server_name"] = json!(format!("  s{number} "));
        let server = portolan.post("/v1/mcp-servers/", &body).await.expect(200);
        assert_eq!(server["mcp_server_type"], kind, "{fields}");
        assert_eq!(server["server_name"], format!("s{number}"), "names are trimmed");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_forms_of_every_path_are_served_directly() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("s", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let tool = portolan.tool_id(id, "echo").await;
    for path in [
        "/v1/mcp-servers".to_owned(),
        format!("/v1/mcp-servers/{id}"),
        format!("/v1/mcp-servers/{id}/tools"),
        format!("/v1/mcp-servers/{id}/tools/{tool}"),
        "/v1/health".to_owned(),
        "/v1/ready".to_owned(),
        "/docs".to_owned(),
        "/console/app.js".to_owned(),
    ] {
        portolan.get(&path).await.expect_status(200);
        portolan.get(&format!("{path}/")).await.expect_status(200);
    }
    let run = json!({"args":{"message":"m"}});
    for path in [format!("/v1/mcp-servers/{id}/tools/{tool}/run"), format!("/v1/mcp-servers/{id}/tools/{tool}/run/")] {
        assert_eq!(portolan.post(&path, &run).await.expect(200)["func_return"], "m");
    }
    assert_eq!(portolan.get("/latest/mcp-servers/").await.status, 404);
    portolan.stop().await;
}

impl Answer {
    #[track_caller]
    fn expect_status(self, status: u16) {
        assert_eq!(self.status, status, "{}", self.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_server_is_stored_and_the_answer_says_so() {
    let portolan = Portolan::start().await;
    for (name, config, part) in [
        ("refused", json!({"server_url":DEAD}), "refused"),
        ("unknown", json!({"server_url":"http://nonexistent.invalid/mcp"}), "lookup"),
        ("sse", json!({"mcp_server_type":"sse","server_url":DEAD}), "refused"),
        ("missing", json!({"command":"/nonexistent","args":[]}), "not found"),
        ("exits", json!({"command":"/bin/sh","args":["-c","echo 'no key\u{7}' >&2; exit 3"]}), "exit status: 3"),
    ] {
        let server = portolan.create(name, config).await;
        assert_eq!(server["status"]["state"], "unreachable", "{server}");
        let error = server["status"]["error"].as_str().unwrap();
        assert!(error.contains(part), "{error}");
        assert_eq!(server["status"]["tool_count"], 0);
        assert_eq!(server["status"]["last_synced_at"], Value::Null);
        if name == "exits" {
            assert!(error.contains(r"no key\u{7}"), "its last words, escaped: {error}");
        }
    }
    let fake =
        fake::http::serve(fake::Fake::new(serde_json::from_value(json!({"require_header":["x-key","k"]})).unwrap()));
    let server = portolan.create("closed", json!({ "server_url": fake.url })).await;
    assert_eq!(server["status"]["state"], "auth_required", "{server}");
    let open =
        portolan.create("open", json!({"server_url": fake.url, "auth_header": "X-Key", "auth_token": "k"})).await;
    assert_eq!(open["status"]["state"], "ready", "{open}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_first_sync_goes_on_after_the_answer() {
    let portolan = Portolan::start_with(|settings| {
        settings.upstream.create_sync_timeout = std::time::Duration::from_millis(200);
    })
    .await;
    let (server, _script) = portolan.create_stdio("slow", &json!({"list_delay_ms": 1500})).await;
    assert_eq!(server["status"]["state"], "never_connected");
    assert!(server["status"]["error"].as_str().unwrap().contains("still being connected"));
    let path = format!("/v1/mcp-servers/{}", server["id"].as_str().unwrap());
    let deadline = tokio::time::Instant::now() + crate::harness::PATIENCE;
    loop {
        let status = portolan.get(&path).await.expect(200)["status"].take();
        if status["state"] == "ready" {
            assert!(status["tool_count"].as_u64().unwrap() > 0);
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{status}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_name_is_a_conflict_that_no_sdk_repeats() {
    let portolan = Portolan::start().await;
    let first = portolan.create("one", json!({ "server_url": DEAD })).await;
    let second = portolan.create("two", json!({ "server_url": DEAD })).await;
    let again = json!({"server_name":" one ","config":{"server_url":"http://127.0.0.1:2/mcp"}});
    let answer = portolan.post("/v1/mcp-servers/", &again).await;
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert_eq!(answer.expect(409)["code"], "name_taken");
    let rename = format!("/v1/mcp-servers/{}", second["id"].as_str().unwrap());
    let answer = portolan.patch(&rename, &json!({"server_name":"one"})).await;
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert_eq!(answer.expect(409)["code"], "name_taken");
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200), json!([first, second]), "nothing was changed");
    let mut expected = second.clone();
    let renamed = portolan.patch(&rename, &json!({"server_name":"three"})).await.expect(200);
    expected["server_name"] = json!("three");
    expected["updated_at"] = renamed["updated_at"].clone();
    assert_eq!(renamed, expected);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_an_sdk_repeats_makes_one_server() {
    let portolan = Portolan::start().await;
    let body = json!({"server_name":"once","config":{"server_url":DEAD,"auth_token":"t"}});
    let first = portolan.post("/v1/mcp-servers/", &body).await.expect(200);
    let repeated = async |body: &Value, count: &str| {
        let request = portolan.request("POST", "/v1/mcp-servers/").header("x-stainless-retry-count", count).json(body);
        Answer::of("POST", "/v1/mcp-servers/", request).await
    };
    assert_eq!(repeated(&body, "1").await.expect(200)["id"], first["id"]);
    assert_eq!(repeated(&body, "2").await.expect(200)["id"], first["id"]);
    assert_eq!(repeated(&body, "0").await.status, 409, "a second create is no repetition");
    let other = json!({"server_name":"once","config":{"server_url":DEAD,"auth_token":"u"}});
    assert_eq!(repeated(&other, "1").await.status, 409, "nor is another configuration");
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().len(), 1);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_headers_are_answered_and_sent_exactly_as_given() {
    let portolan = Portolan::start().await;
    let fake = fake::http::serve(fake::Fake::new(fake::Script::default()));
    let given = json!({
        "mcp_server_type": "streamable_http", "server_url": fake.url,
        "auth_header": "X-API-Key", "auth_token": "abc", "custom_headers": {"X-One": "1", "X-Two": "zwei"},
    });
    let body = json!({ "server_name": "headers", "config": given });
    let server = portolan.post("/v1/mcp-servers/?reveal=true", &body).await.expect(200);
    for (key, value) in given.as_object().unwrap() {
        assert_eq!(&server[key], value, "{key}");
    }
    let seen = fake.requests();
    assert!(!seen.is_empty());
    for request in seen {
        let sent = ["x-api-key", "x-one", "x-two", "authorization"].map(|name| request.header(name).map(str::to_owned));
        assert_eq!(sent, [Some("abc".to_owned()), Some("1".to_owned()), Some("zwei".to_owned()), None]);
    }
    let id = server["id"].as_str().unwrap();
    let path = format!("/v1/mcp-servers/{id}");
    let sent = async |change: Value, name: &str| {
        portolan.patch(&path, &json!({ "config": change })).await.expect(200);
        portolan.refresh(id).await.expect(200);
        fake.requests().last().unwrap().header(name).map(str::to_owned)
    };
    assert_eq!(
        sent(json!({"auth_header":"Authorization","auth_token":"Bearer t"}), "authorization").await.unwrap(),
        "Bearer t"
    );
    assert_eq!(sent(json!({"auth_header":"","auth_token":"t"}), "authorization").await.unwrap(), "Bearer t");
    assert_eq!(sent(json!({"auth_token":""}), "authorization").await, None);
    assert_eq!(sent(json!({"custom_headers":{"X-Three":"3"}}), "x-one").await, None, "maps replace");
    assert_eq!(sent(json!({"custom_headers":{}}), "x-three").await, None);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_keeps_what_it_does_not_name_and_switches_type_when_it_can() {
    let portolan = Portolan::start().await;
    let config = json!({"mcp_server_type":"sse","server_url":DEAD,"auth_header":"X-K","auth_token":"t","custom_headers":{"a":"b"}});
    let body = json!({ "server_name": "p", "config": config });
    let server = portolan.post("/v1/mcp-servers/?reveal=true", &body).await.expect(200);
    let path = format!("/v1/mcp-servers/{}?reveal=true", server["id"].as_str().unwrap());
    let without = |server: &Value| {
        let mut server = server.clone();
        server.as_object_mut().unwrap().retain(|key, _| !["updated_at", "status"].contains(&key.as_str()));
        server
    };
    let mut expected = without(&server);
    let mut check = async |change: Value, differences: Value| {
        let answer = portolan.patch(&path, &change).await.expect(200);
        for (key, value) in differences.as_object().unwrap() {
            expected[key] = value.clone();
        }
        assert_eq!(without(&answer), expected, "{change}");
        assert_eq!(without(&portolan.get(&path).await.expect(200)), expected, "{change}");
    };
    check(json!({}), json!({})).await;
    check(json!({"config":null,"server_name":null}), json!({})).await;
    check(
        json!({"server_name":null,"config":{"mcp_server_type":"sse","server_url":null,"auth_token":null,"custom_headers":null}}),
        json!({}),
    )
    .await;
    check(json!({"config":{"mcp_server_type":"sse","auth_token":"n2"}}), json!({"auth_token":"n2"})).await;
    check(
        json!({"token":"n3","server_url":"http://127.0.0.1:2/x"}),
        json!({"auth_token":"n3","server_url":"http://127.0.0.1:2/x"}),
    )
    .await;
    check(json!({"config":{"custom_headers":{"c":"d"}}}), json!({"custom_headers":{"c":"d"}})).await;
    check(json!({"config":{"auth_token":"","custom_headers":{}}}), json!({"auth_token":null,"custom_headers":null}))
        .await;
    let switched = json!({"mcp_server_type":"streamable_http","type":"streamable_http"});
    check(json!({"config":{"mcp_server_type":"streamable_http","server_url":null}}), switched).await;
    for refused in [
        json!({"config":{"mcp_server_type":"stdio"}}),
        json!({"config":{"mcp_server_type":"stdio","args":["a"]}}),
        // Only a named type changes the type.
        json!({"config":{"command":"c"}}),
        json!({"command":"c","args":[]}),
        json!({"config":{"env":{}}}),
    ] {
        portolan.patch(&path, &refused).await.expect(422);
    }
    check(json!({}), json!({})).await;
    let stdio = portolan
        .patch(&path, &json!({"config":{"mcp_server_type":"stdio","command":"c","args":["x y"],"env":{"K":"V"}}}))
        .await
        .expect(200);
    assert_eq!(
        (&stdio["type"], &stdio["command"], &stdio["args"], &stdio["env"], &stdio["server_url"]),
        (&json!("stdio"), &json!("c"), &json!(["x y"]), &json!({"K":"V"}), &Value::Null)
    );
    for refused in [json!({"server_url":DEAD}), json!({"config":{"auth_token":"x"}})] {
        portolan.patch(&path, &refused).await.expect(422);
    }
    let kept = portolan.patch(&path, &json!({"config":{"command":"d","args":["z"]}})).await.expect(200);
    assert_eq!((&kept["command"], &kept["env"]), (&json!("d"), &json!({"K":"V"})), "env is kept");
    let cleared = portolan.patch(&path, &json!({"config":{"command":null,"args":null,"env":{}}})).await.expect(200);
    assert_eq!((&cleared["command"], &cleared["env"]), (&json!("d"), &Value::Null));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_at_once_neither_is_lost() {
    let portolan = Portolan::start().await;
    let server = portolan.create("both", json!({"command":"/nonexistent","args":["0"]})).await;
    let path = format!("/v1/mcp-servers/{}", server["id"].as_str().unwrap());
    for round in 0..10 {
        let env = json!({"config":{"env":{"ROUND":format!("{round}")}}});
        let args = json!({"config":{"args":[format!("{round}")]}});
        let name = json!({ "server_name": format!("both {round}") });
        let (env, args, name) =
            tokio::join!(portolan.patch(&path, &env), portolan.patch(&path, &args), portolan.patch(&path, &name));
        for answer in [env, args, name] {
            answer.expect(200);
        }
        let server = portolan.get(&path).await.expect(200);
        assert_eq!(server["env"]["ROUND"], format!("{round}"));
        assert_eq!(server["args"], json!([format!("{round}")]));
        assert_eq!(server["server_name"], format!("both {round}"));
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_and_malformed_ids_are_not_found_on_every_route() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("known", &json!({})).await;
    let (other, _other_script) = portolan.create_stdio("other", &json!({})).await;
    let known = server["id"].as_str().unwrap();
    let foreign_tool = portolan.tool_id(other["id"].as_str().unwrap(), "echo").await;
    let long = "x".repeat(3000);
    let unknown = "mcp_server-00000000-0000-4000-8000-000000000000";
    for id in [
        unknown,
        "nonsense",
        "%00",
        "a%00b",
        "..%2f..%2fetc",
        "%ff",
        "%F0%9F%92%A9",
        "a'b;--",
        "null",
        "connect",
        &long,
    ] {
        portolan.get(&format!("/v1/mcp-servers/{id}")).await.expect(404);
        portolan.patch(&format!("/v1/mcp-servers/{id}"), &json!({"server_name":"n"})).await.expect(404);
        portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(404);
        // Below `connect` there are ids, and nothing to be changed.
        portolan.refresh(id).await.expect(if id == "connect" { 405 } else { 404 });
        portolan.get(&format!("/v1/mcp-servers/{id}/tools")).await.expect(404);
        for (server, tool) in [(known, id), (id, foreign_tool.as_str()), (id, id)] {
            portolan.get(&format!("/v1/mcp-servers/{server}/tools/{tool}")).await.expect(404);
            portolan.post(&format!("/v1/mcp-servers/{server}/tools/{tool}/run"), &json!({})).await.expect(404);
        }
    }
    portolan.get(&format!("/v1/mcp-servers/{known}/tools/{foreign_tool}")).await.expect(404);
    portolan.post(&format!("/v1/mcp-servers/{known}/tools/{foreign_tool}/run"), &json!({})).await.expect(404);
    portolan.delete(&format!("/v1/mcp-servers/{known}")).await.expect(204);
    portolan.delete(&format!("/v1/mcp-servers/{known}")).await.expect(404);
    portolan.get(&format!("/v1/mcp-servers/{known}/tools")).await.expect(404);
    assert_eq!(
        portolan.tools(other["id"].as_str().unwrap()).await.len(),
        other["status"]["tool_count"].as_u64().unwrap() as usize
    );
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_read_hides_no_other_and_can_be_mended() {
    let portolan = Portolan::start().await;
    let broken = portolan.create("broken", json!({ "server_url": DEAD })).await;
    let fine = portolan.create("fine", json!({ "server_url": DEAD })).await;
    let id = broken["id"].as_str().unwrap();
    // What an older or newer version may have written.
    let config = Place { table: "servers", column: "config", id };
    let foreign = portolan.app.store.seal(config, b"{\"type\":\"carrier_pigeon\"}");
    let spoil = "UPDATE servers SET config = $2, state = 'sleeping', era = 'bronze' WHERE id = $1";
    let spoiled = match &portolan.app.store.database {
        Database::Postgres(pool) => sqlx::query(spoil).bind(id).bind(foreign).execute(pool).await.map(|_| ()),
        Database::Sqlite { write, .. } => sqlx::query(spoil).bind(id).bind(foreign).execute(write).await.map(|_| ()),
    };
    spoiled.unwrap();
    let list = portolan.get("/v1/mcp-servers/").await.expect(200);
    assert_eq!(list[1], fine);
    assert_eq!(list[0]["id"], broken["id"]);
    assert!(list[0]["status"]["error"].as_str().unwrap().contains("cannot be read"), "{list}");
    portolan.refresh(id).await.expect(404);
    let path = format!("/v1/mcp-servers/{id}");
    portolan.patch(&path, &json!({"config":{"auth_token":"t"}})).await.expect(422);
    let mended = portolan.patch(&path, &json!({"config":{"server_url":DEAD}})).await.expect(200);
    assert_eq!(mended["server_url"], DEAD);
    portolan.delete(&path).await.expect(204);
    portolan.stop().await;
}
