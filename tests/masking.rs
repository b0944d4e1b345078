//! Secrets in answers: masked unless an admin asks, and what a mask means that comes back (CONTRACT row 6).

use portolan::config::SecretsInResponses;
use serde_json::{Value, json};

use crate::fake::{self, Fake, Script};
use crate::harness::Portolan;

const DEAD: &str = "http://127.0.0.1:1/mcp";
const MASK: &str = "********";

fn path(server: &Value) -> String {
    format!("/v1/mcp-servers/{}", server["id"].as_str().unwrap())
}

/// The connection of an answer, as a change may name it.
fn config(server: &Value) -> Value {
    let mut config = server.clone();
    config
        .as_object_mut()
        .unwrap()
        .retain(|key, _| !["id", "server_name", "type", "created_at", "updated_at", "status"].contains(&key.as_str()));
    config
}

async fn revision(portolan: &Portolan, server: &Value) -> i64 {
    portolan.app.store.server(server["id"].as_str().unwrap()).await.unwrap().unwrap().revision
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_masked_in_every_answer_and_an_admin_may_see_them() {
    let portolan = Portolan::start().await;
    for (name, given, shown) in [
        (
            "remote",
            json!({
                "mcp_server_type": "streamable_http", "server_url": "http://user:pw@127.0.0.1:1/mcp?api_key=abc&team=maps",
                "auth_header": "X-K", "auth_token": "Bearer abc", "custom_headers": {"X-One": "1", "X-Two": "Bearer zwei"},
            }),
            json!({
                "mcp_server_type": "streamable_http",
                "server_url": "http://user:********@127.0.0.1:1/mcp?api_key=********&team=maps", "auth_header": "X-K",
                "auth_token": "Bearer ********", "custom_headers": {"X-One": MASK, "X-Two": "Bearer ********"},
            }),
        ),
        (
            "bare",
            json!({"mcp_server_type": "sse", "server_url": DEAD, "auth_token": "abc"}),
            json!({
                "mcp_server_type": "sse", "server_url": DEAD, "auth_header": null, "auth_token": MASK,
                "custom_headers": null,
            }),
        ),
        (
            "stdio",
            json!({
                "mcp_server_type": "stdio", "command": "/nonexistent", "args": ["--api-key", "abc", "--token=t", "-v"],
                "env": {"API_KEY": "abc", "PLAIN": "ghp_16C7e42F292c6912E7710c838347", "DEBUG": "1", "DB": "pg://u:p@h"},
            }),
            json!({
                "mcp_server_type": "stdio", "command": "/nonexistent",
                "args": ["--api-key", MASK, "--token=********", "-v"],
                "env": {"API_KEY": MASK, "PLAIN": MASK, "DEBUG": "1", "DB": MASK},
            }),
        ),
    ] {
        let created = portolan.create(name, given.clone()).await;
        assert_eq!(config(&created), shown, "create");
        let one = path(&created);
        assert_eq!(config(&portolan.get(&one).await.expect(200)), shown, "get");
        assert_eq!(config(&portolan.patch(&one, &json!({})).await.expect(200)), shown, "patch");
        let list = portolan.get("/v1/mcp-servers/").await.expect(200);
        assert_eq!(config(list.as_array().unwrap().last().unwrap()), shown, "list");
        let mut clear = given.clone();
        for key in shown.as_object().unwrap().keys() {
            clear[key] = given.get(key).cloned().unwrap_or_default();
        }
        assert_eq!(config(&portolan.get(&format!("{one}?reveal=true")).await.expect(200)), clear);
        assert_eq!(config(&portolan.patch(&format!("{one}?reveal=true"), &json!({})).await.expect(200)), clear);
        let list = portolan.get("/v1/mcp-servers/?reveal=true").await.expect(200);
        assert_eq!(config(list.as_array().unwrap().last().unwrap()), clear);
        for query in ["reveal=false", "reveal=", "other=true"] {
            assert_eq!(config(&portolan.get(&format!("{one}?{query}")).await.expect(200)), shown, "{query}");
        }
        for query in ["reveal=yes", "reveal=1", "reveal=true&reveal=true"] {
            let refused = portolan.get(&format!("{one}?{query}")).await.expect(422);
            assert_eq!(refused["errors"][0]["loc"], json!(["query", "reveal"]));
        }
    }
    let body = json!({"server_name": "revealed", "config": {"server_url": DEAD, "auth_token": "abc"}});
    assert_eq!(portolan.post("/v1/mcp-servers/?reveal=true", &body).await.expect(200)["auth_token"], "abc");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_answers_as_letta_did() {
    let portolan =
        Portolan::start_with(|settings| settings.secrets.secrets_in_responses = SecretsInResponses::Full).await;
    let server = portolan.create("full", json!({"server_url": DEAD, "auth_token": "Bearer abc"})).await;
    assert_eq!(server["auth_token"], "Bearer abc");
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200)[0]["auth_token"], "Bearer abc");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_sent_back_changes_nothing() {
    let portolan = Portolan::start().await;
    for given in [
        json!({
            "mcp_server_type": "sse", "server_url": "http://u:p@127.0.0.1:1/s/0123456789abcdef0123456789?key=a&key=b",
            "auth_header": "X-Token", "auth_token": "t", "custom_headers": {"a": "b", "X-Bearer": "bearer c"},
        }),
        json!({
            "mcp_server_type": "stdio", "command": "/nonexistent",
            "args": ["--header", "Authorization: Bearer a", "--key", "b", "https://u:p@h?token=c", "plain"],
            "env": {"TOKEN": "a", "PLAIN": "b"},
        }),
    ] {
        let server = portolan.create(given["mcp_server_type"].as_str().unwrap(), given.clone()).await;
        let one = path(&server);
        let clear = config(&portolan.get(&format!("{one}?reveal=true")).await.expect(200));
        let flat = config(&server);
        for back in [json!({ "config": config(&server) }), flat, json!({ "config": clear })] {
            portolan.patch(&one, &back).await.expect(200);
            assert_eq!(revision(&portolan, &server).await, 1, "{back}");
        }
        assert_eq!(config(&portolan.get(&format!("{one}?reveal=true")).await.expect(200)), clear);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mask_stands_for_what_is_stored_and_for_nothing_else() {
    let portolan = Portolan::start().await;
    let given = json!({
        "mcp_server_type": "sse", "server_url": "http://u:pw@127.0.0.1:1/mcp?key=k",
        "auth_header": "X-Token", "auth_token": "Bearer t",
        "custom_headers": {"X-One": "1", "X-Two": "2"},
    });
    let server = portolan.create("remote", given).await;
    let clear = format!("{}?reveal=true", path(&server));
    let same = json!({"server_url": "http://u:pw@127.0.0.1:1/mcp?key=k", "auth_token": "Bearer t"});
    for (change, expected) in [
        (json!({"auth_token": MASK}), same.clone()),
        (json!({"auth_token": "Bearer ********"}), same.clone()),
        (
            json!({"custom_headers": {"x-two": MASK, "X-Three": "3"}}),
            json!({"custom_headers": {"x-two": "2", "X-Three": "3"}}),
        ),
        (
            json!({"server_url": "http://u:********@127.0.0.1:1/other?key=********&n=1", "auth_token": MASK}),
            json!({"server_url": "http://u:pw@127.0.0.1:1/other?key=k&n=1", "auth_token": "Bearer t"}),
        ),
        (
            json!({"server_url": "http://127.0.0.1:1/other", "custom_headers": {"x-two": MASK}}),
            json!({"server_url": "http://127.0.0.1:1/other", "custom_headers": {"x-two": "2"}}),
        ),
    ] {
        let changed = portolan.patch(&clear, &json!({ "config": change })).await.expect(200);
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&changed[key], value, "{change}");
        }
    }
    let before = portolan.get(&clear).await.expect(200);
    for (change, loc) in [
        (json!({"custom_headers": {"X-Unknown": MASK}}), json!(["body", "config", "custom_headers", "X-Unknown"])),
        (json!({"custom_headers": {"x-two": "Bearer ********"}}), json!(["body", "config", "custom_headers", "x-two"])),
        (json!({"server_url": "http://u:********@127.0.0.1:1/mcp"}), json!(["body", "config", "server_url"])),
        (json!({"server_url": "http://127.0.0.1:1/mcp?token=********"}), json!(["body", "config", "server_url"])),
        // Another port, host, scheme: another origin.
        (json!({"server_url": "http://127.0.0.1:2/mcp", "auth_token": MASK}), json!(["body", "config", "auth_token"])),
        (
            json!({"server_url": "https://127.0.0.1:1/mcp", "auth_token": "Bearer ********"}),
            json!(["body", "config", "auth_token"]),
        ),
        (
            json!({"server_url": "http://localhost:1/mcp", "custom_headers": {"x-two": MASK}}),
            json!(["body", "config", "custom_headers", "x-two"]),
        ),
        (json!({"server_url": "http://127.0.0.1:2/mcp?key=********"}), json!(["body", "config", "server_url"])),
        (
            json!({"mcp_server_type": "stdio", "command": "c", "env": {"A": MASK}}),
            json!(["body", "config", "env", "A"]),
        ),
    ] {
        let refused = portolan.patch(&clear, &json!({ "config": change })).await.expect(422);
        assert_eq!(refused["errors"][0]["loc"], loc, "{refused}");
        assert!(refused["detail"].as_str().unwrap().contains("mask"), "{refused}");
    }
    assert_eq!(portolan.get(&clear).await.expect(200), before, "nothing was changed");
    // A new origin with the secret given again is fine.
    let moved = json!({"config": {"server_url": "http://127.0.0.1:2/mcp", "auth_token": "n", "custom_headers": {"x-two": "m"}}});
    let moved = portolan.patch(&clear, &moved).await.expect(200);
    assert_eq!((&moved["auth_token"], &moved["custom_headers"]), (&json!("n"), &json!({"x-two": "m"})));

    let given =
        json!({"command": "/nonexistent", "args": ["--key", "a", "--token=b"], "env": {"TOKEN": "t", "PLAIN": "p"}});
    let stdio = portolan.create("stdio", given).await;
    let clear = format!("{}?reveal=true", path(&stdio));
    let change =
        json!({"config": {"args": ["-v", "--token=********", "--key", MASK], "env": {"TOKEN": MASK, "NEW": "n"}}});
    let changed = portolan.patch(&clear, &change).await.expect(200);
    assert_eq!(changed["args"], json!(["-v", "--token=b", "--key", "a"]));
    assert_eq!(changed["env"], json!({"TOKEN": "t", "NEW": "n"}));
    for (change, loc) in [
        (json!({"args": ["--other", MASK]}), json!(["body", "config", "args", 1])),
        (json!({"env": {"OTHER": MASK}}), json!(["body", "config", "env", "OTHER"])),
    ] {
        let refused = portolan.patch(&clear, &json!({ "config": change })).await.expect(422);
        assert_eq!(refused["errors"][0]["loc"], loc, "{refused}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mask_in_a_create_is_refused() {
    let portolan = Portolan::start().await;
    for (masked, plain) in [
        (json!({"server_url": DEAD, "auth_token": MASK}), json!({"server_url": DEAD, "auth_token": "*"})),
        (
            json!({"server_url": DEAD, "auth_token": "Bearer ********"}),
            json!({"server_url": DEAD, "auth_token": "Bearer *"}),
        ),
        (
            json!({"server_url": DEAD, "custom_headers": {"a": MASK}}),
            json!({"server_url": DEAD, "custom_headers": {"a": "*********"}}),
        ),
        (json!({"server_url": "http://u:********@127.0.0.1:1/"}), json!({"server_url": "http://u:***@127.0.0.1:1/"})),
        (json!({"server_url": "http://127.0.0.1:1/?key=********"}), json!({"server_url": "http://127.0.0.1:1/?key=*"})),
        (
            json!({"command": "/nonexistent", "env": {"A": MASK}}),
            json!({"command": "/nonexistent", "env": {"A": "**"}}),
        ),
        (
            json!({"command": "/nonexistent", "args": ["--key=********"]}),
            json!({"command": "/nonexistent", "args": ["*.*"]}),
        ),
    ] {
        let body = |config: &Value| json!({ "server_name": config.to_string(), "config": config });
        let refused = portolan.post("/v1/mcp-servers/", &body(&masked)).await.expect(422);
        assert!(refused["detail"].as_str().unwrap().contains("mask"), "{refused}");
        portolan.post("/v1/mcp-servers/", &body(&plain)).await.expect(200);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_masked_is_still_sent_in_full() {
    let portolan = Portolan::start().await;
    let fake = fake::http::serve(Fake::new(Script::default()));
    let given = json!({"server_url": fake.url, "auth_token": "abc", "custom_headers": {"X-One": "1"}});
    let server = portolan.create("sent", given).await;
    portolan.patch(&path(&server), &json!({ "config": config(&server) })).await.expect(200);
    portolan.refresh(server["id"].as_str().unwrap()).await.expect(200);
    for request in fake.requests() {
        assert_eq!(request.header("authorization"), Some("Bearer abc"));
        assert_eq!(request.header("x-one"), Some("1"));
    }
    portolan.stop().await;
}
