//! Sign-ins among the changes.

use serde_json::{Value, json};

use crate::fake::oauth::Rules;
use crate::harness::Portolan;

use super::{CALLBACK, Kind, Upstream, Watch, allow, come_back, register, registered, sign_in, visit};

/// Action, server and who, oldest first, of what concerns sign-ins.
async fn told(portolan: &Portolan) -> Vec<(String, Value, Value)> {
    let answer = portolan.get("/v1/portolan/changes?limit=500").await.expect(200);
    let changes = answer["changes"].as_array().unwrap().iter().rev();
    let of_sign_ins = changes.filter(|change| change["action"].as_str().unwrap().starts_with("sign_in."));
    of_sign_ins
        .map(|change| {
            assert_eq!(change["details"], json!({}), "nothing of what it is made of");
            (change["action"].as_str().unwrap().to_owned(), change["server_name"].clone(), change["caller"].clone())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_is_a_change_and_one_that_fails_is_none() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let mut watch = Watch::start(&portolan, &id).await;
    watch.url().await;
    drop(watch);
    assert_eq!(told(&portolan).await, [], "one that was only begun is none");
    sign_in(&portolan, &id).await;
    let completed = ("sign_in.completed".to_owned(), json!("notes"), Value::Null);
    assert_eq!(told(&portolan).await, std::slice::from_ref(&completed));
    let store = &portolan.app.store;
    let version = store.sign_in(&id).await.unwrap().unwrap().version;
    assert!(
        !store.remove_sign_in(&id, version - 1).await.unwrap() && store.remove_sign_in(&id, version).await.unwrap()
    );
    let removed = ("sign_in.removed".to_owned(), json!("notes"), json!("portolan serve"));
    assert_eq!(told(&portolan).await, [completed, removed]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_from_before_a_registration_is_adopted() {
    const CONNECT: &str = "/v1/tools/mcp/servers/connect";
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let portolan = Portolan::start_with(allow([&upstream.authority])).await;
    let body = json!({"server_name": "notes", "type": "streamable_http", "server_url": upstream.server.url});
    let mut watch = Watch::open("POST", portolan.request("POST", CONNECT).json(&body), CONNECT).await;
    let url = watch.url().await;
    assert_eq!(come_back(&portolan, &visit(&url).await).await["status"], "success");
    watch.success().await;
    let completed = ("sign_in.completed".to_owned(), Value::Null, Value::Null);
    assert_eq!(told(&portolan).await, std::slice::from_ref(&completed));
    register(&portolan, "notes", upstream.config()).await;
    let adopted = ("sign_in.adopted".to_owned(), json!("notes"), Value::Null);
    assert_eq!(told(&portolan).await, [completed, adopted]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_takes_the_client_away_ends_the_sign_in() {
    const IMPORT: &str = "/v1/portolan/import";
    let [upstream, other] = [(); 2].map(|()| Upstream::start(Kind::Http, Rules::default()));
    let portolan = Portolan::start_with(allow([&upstream.authority, &other.authority])).await;
    upstream.authority.register("by-hand", None, CALLBACK);
    upstream.authority.set(|rules| rules.metadata = json!({"token_endpoint_auth_methods_supported": ["none"]}));
    let id = register(&portolan, "notes", upstream.config_with(json!({"client_id": "by-hand"}))).await;
    sign_in(&portolan, &id).await;
    let file = |url: &str| json!({"mcpServers": {"notes": {"url": url, "headers": {"x-mark": "one"}}}});
    let import = async |url: &str| {
        let report = portolan.post(IMPORT, &file(url)).await.expect(200);
        assert_eq!(report["changed"], json!(["notes"]), "{report}");
        portolan.app.store.sign_in(&id).await.unwrap().is_some()
    };
    let completed = ("sign_in.completed".to_owned(), json!("notes"), Value::Null);
    assert!(import(&upstream.server.url).await, "at the same place it has the same client");
    assert_eq!(told(&portolan).await, std::slice::from_ref(&completed));
    assert!(!import(&other.server.url).await, "no client of its own goes elsewhere, and no sign-in as that");
    let removed = ("sign_in.removed".to_owned(), json!("notes"), Value::Null);
    assert_eq!(told(&portolan).await, [completed, removed]);
    portolan.stop().await;
}
