//! What must not work: answers that belong to no sign-in or to another one, authorization servers that lie about themselves,
//! and documents that lead to where nobody may connect.

use std::time::Duration;

use serde_json::{Value, json};

use crate::egress::{Trap, Zone};
use crate::fake::anywhere;
use crate::fake::oauth::{Instead, METADATA, RESOURCE, Rules, TOKEN};
use crate::harness::{Portolan, eventually};

use super::{
    Kind, Upstream, Watch, allow, come_back, echo, param, register, registered, sign_in, state, visit, with_param,
};

const INVALID: &str = "Invalid or expired state parameter";

fn message(told: &Value) -> &str {
    assert_eq!(told["status"], "error", "{told}");
    told["message"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_good_once_and_for_its_own_sign_in() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    for (name, value) in [("state", Some("0".repeat(43))), ("state", None), ("state", Some("%00\u{0}".into()))] {
        let told = come_back(&portolan, &with_param(&back, name, value.as_deref())).await;
        let wanted = if value.is_none() { "Missing state parameter" } else { INVALID };
        assert_eq!(message(&told), wanted);
    }
    assert_eq!(upstream.authority.tried("authorization_code"), 0, "nobody took the code anywhere");
    assert_eq!(come_back(&portolan, &back).await["status"], "success");
    watch.success().await;
    for _ in 0..2 {
        assert_eq!(message(&come_back(&portolan, &back).await), INVALID, "a replay");
    }
    assert_eq!(upstream.authority.tried("authorization_code"), 1);
    echo(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_comes_once_also_when_it_comes_twice_at_the_same_time() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    let hold = upstream.authority.hold(TOKEN);
    let release = async {
        eventually("somebody takes the code", || upstream.authority.tried("authorization_code") > 0).await;
        drop(hold);
    };
    let (one, other, ()) = tokio::join!(come_back(&portolan, &back), come_back(&portolan, &back), release);
    let (good, bad) = if one["status"] == "success" { (one, other) } else { (other, one) };
    assert_eq!((&good["status"], message(&bad)), (&json!("success"), INVALID));
    assert_eq!((upstream.authority.tried("authorization_code"), upstream.authority.reused()), (1, 0));
    watch.success().await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_and_a_state_of_two_sign_ins_do_not_go_together() {
    let (upstream, other) =
        (Upstream::start(Kind::Http, Rules::default()), Upstream::start(Kind::Http, Rules::default()));
    let portolan = Portolan::start_with(allow([&upstream.authority, &other.authority])).await;
    let id = register(&portolan, "notes", upstream.config()).await;
    let elsewhere = register(&portolan, "other", other.config()).await;
    // Of another server, and of another caller who signs in to the same one.
    for of in [&elsewhere, &id] {
        let (mut mine, mut theirs) = (Watch::start(&portolan, &id).await, Watch::start(&portolan, of).await);
        let (back, stolen) = (visit(&mine.url().await).await, visit(&theirs.url().await).await);
        assert_ne!(param(&back, "state"), param(&stolen, "state"));
        let mixed = with_param(&back, "code", param(&stolen, "code").as_deref());
        let told = come_back(&portolan, &mixed).await;
        assert!(message(&told).starts_with("OAuth callback failed: "), "{told}");
        mine.failure().await;
        assert_ne!(state(&portolan, &id).await, "ready");
        drop(theirs);
    }
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    assert_eq!(come_back(&portolan, &back).await["status"], "success");
    watch.success().await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_good_for_a_limited_time() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let portolan = Portolan::start_with(|settings| {
        allow([&upstream.authority])(settings);
        settings.upstream.sign_in.sign_in_timeout = Duration::from_secs(1);
    })
    .await;
    let id = register(&portolan, "notes", upstream.config()).await;
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    let told = watch.failure().await;
    assert!(told.to_lowercase().contains("sign"), "{told}");
    assert_eq!(message(&come_back(&portolan, &back).await), INVALID);
    assert_eq!(upstream.authority.tried("authorization_code"), 0);
    let portolan = portolan.reopen(allow([&upstream.authority])).await;
    assert_eq!(message(&come_back(&portolan, &back).await), INVALID);
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_in_another_name_is_not_taken() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    // Another authority, none where one was promised, and a slash more.
    for iss in ["https://other.example.com", "", &format!("{}/", upstream.authority.url())] {
        upstream.authority.set(|rules| rules.iss = Some(iss.to_owned()));
        let mut watch = Watch::start(&portolan, &id).await;
        let back = visit(&watch.url().await).await;
        let told = come_back(&portolan, &back).await;
        assert!(message(&told).starts_with("OAuth callback failed: "), "{iss}: {told}");
        assert!(!told.to_string().contains("other.example.com"), "{told}");
        watch.failure().await;
    }
    assert_eq!(upstream.authority.tried("authorization_code"), 0, "no code was shown to anybody");
    // The twins: its own name, and none where none was promised.
    upstream.authority.set(|rules| rules.iss = None);
    sign_in(&portolan, &id).await;
    let id = {
        portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204);
        register(&portolan, "again", upstream.config()).await
    };
    upstream.authority.set(|rules| {
        rules.iss = Some(String::new());
        rules.metadata = json!({"authorization_response_iss_parameter_supported": null});
    });
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_says_no_is_heard() {
    let upstream = Upstream::start(Kind::Http, Rules { refuses: true, ..Rules::default() });
    let (portolan, id) = registered(&upstream).await;
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    let told = come_back(&portolan, &back).await;
    assert_eq!(message(&told), "OAuth error: access_denied - The user <b>said</b> no");
    watch.failure().await;
    assert_eq!(state(&portolan, &id).await, "auth_required");
    assert_eq!(message(&come_back(&portolan, &back).await), INVALID);
    // Neither an answer nor an error is an answer.
    let mut watch = Watch::start(&portolan, &id).await;
    let back = with_param(&with_param(&visit(&watch.url().await).await, "error", None), "error_description", None);
    assert_eq!(message(&come_back(&portolan, &back).await), "Missing authorization code");
    drop(watch);
    upstream.authority.set(|rules| rules.refuses = false);
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

/// A connect does not get as far as a URL, and nothing was connected to that may not be. Then what was wrong is put right.
async fn no_url(portolan: &Portolan, id: &str, what: &str) -> String {
    let message = Watch::start(portolan, id).await.failure().await;
    assert!(!message.contains("http://") && !message.contains("127.0.0.1"), "{what}: {message}");
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_lead_to_no_private_and_no_foreign_address() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let zone = Zone::default();
    zone.set("inside.test", &["127.0.0.1"]);
    zone.set("metadata.google.internal", &["127.0.0.1"]);
    let portolan = Portolan::start_with(|settings| {
        allow([&upstream.authority])(settings);
        settings.egress.lookup = zone.lookup();
    })
    .await;
    let id = register(&portolan, "notes", upstream.config()).await;
    let trap = Trap::at(anywhere());
    let port = trap.addr().port();
    let forbidden = [
        format!("http://127.0.0.1:{port}"),
        format!("https://127.0.0.1:{port}"),
        format!("https://[::ffff:127.0.0.1]:{port}"),
        format!("https://inside.test:{port}"),
        format!("http://inside.test:{port}"),
        format!("https://metadata.google.internal:{port}"),
        "http://169.254.169.254".to_owned(),
        "http://192.0.2.1".to_owned(),
        "file:///etc/passwd".to_owned(),
    ];
    for to in &forbidden {
        upstream.guard.set_metadata(json!({"authorization_servers": [to]}));
        no_url(&portolan, &id, to).await;
        upstream.guard.set_metadata(json!({}));
        for endpoint in ["registration_endpoint"] {
            upstream.authority.set(|rules| rules.metadata = json!({endpoint: format!("{to}/x")}));
            no_url(&portolan, &id, &format!("{endpoint} {to}")).await;
        }
        // The token endpoint is wanted only when the code is there; it may be found out before.
        upstream.authority.set(|rules| rules.metadata = json!({"token_endpoint": format!("{to}/token")}));
        let mut watch = Watch::start(&portolan, &id).await;
        watch.expect("connection_attempt").await;
        let mut url = None;
        while let Some(event) = watch.next().await {
            match event["event"].as_str().unwrap() {
                "authorization_url" => url = Some(event["url"].as_str().unwrap().parse().unwrap()),
                "waiting_for_auth" => break,
                "success" => panic!("{to}: {event}"),
                _ => {}
            }
        }
        if let Some(url) = url {
            let told = come_back(&portolan, &visit(&url).await).await;
            assert!(message(&told).starts_with("OAuth callback failed: "), "{to}: {told}");
            watch.failure().await;
        }
        upstream.authority.set(|rules| rules.metadata = json!({}));
        // The challenge may name another document than the one at its usual place, which is there and good.
        upstream.guard.set_challenge(&format!(r#"Bearer resource_metadata="{to}{RESOURCE}""#));
        let mut watch = Watch::start(&portolan, &id).await;
        watch.expect("connection_attempt").await;
        watch.next().await;
        watch.next().await;
        drop(watch);
        upstream.guard.unset_challenge();
    }
    trap.assert_untouched();
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_to_open_what_is_no_page() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    for to in [
        "http://192.0.2.1/authorize",
        "http://example.com/authorize",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "data:text/html,x",
        "ssh://example.com/",
        "",
    ] {
        upstream.authority.set(|rules| rules.metadata = json!({"authorization_endpoint": to}));
        let told = Watch::start(&portolan, &id).await.failure().await;
        assert!(!told.contains("alert") && !told.contains("192.0.2.1"), "{to}: {told}");
    }
    for to in ["https://example.com/authorize", "http://localhost:1/authorize", "http://[::1]:1/authorize"] {
        upstream.authority.set(|rules| rules.metadata = json!({"authorization_endpoint": to}));
        let mut watch = Watch::start(&portolan, &id).await;
        let url = watch.url().await;
        assert!(url.as_str().starts_with(to), "{url}");
    }
    upstream.authority.set(|rules| rules.metadata = json!({}));
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_brings_none_of_the_parameters_that_portolan_sets() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let page = |query: &str| json!({"authorization_endpoint": format!("https://example.com/authorize?{query}")});
    for query in [
        "response_type=token",
        "client_id=other",
        "redirect_uri=https%3A%2F%2Fother.example.com",
        "tenant=x&scope=all",
        "state=known",
        "%72esource=https%3A%2F%2Fother.example.com",
        "code_challenge=known",
        "code_challenge_method=plain",
    ] {
        upstream.authority.set(|rules| rules.metadata = page(query));
        let told = Watch::start(&portolan, &id).await.failure().await;
        assert!(told.contains("parameters") && !told.contains("example.com"), "{query}: {told}");
    }
    upstream.authority.set(|rules| rules.metadata = page("tenant=x"));
    let url = Watch::start(&portolan, &id).await.url().await;
    assert_eq!(param(&url, "tenant").as_deref(), Some("x"), "{url}");
    upstream.authority.set(|rules| rules.metadata = json!({}));
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_is_not_taken_to_where_a_token_endpoint_sends_it() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let trap = Trap::at(anywhere());
    let elsewhere = Instead::Redirect(format!("http://{}/token", trap.addr()));
    upstream.authority.set(|rules| drop(rules.instead.insert(TOKEN.to_owned(), elsewhere.clone())));
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    let told = come_back(&portolan, &back).await;
    assert!(message(&told).starts_with("OAuth callback failed: "), "{told}");
    watch.failure().await;
    upstream.authority.set(|rules| rules.instead.clear());
    sign_in(&portolan, &id).await;
    // Nor is a refresh token.
    upstream.authority.expire();
    upstream.authority.set(|rules| drop(rules.instead.insert(TOKEN.to_owned(), elsewhere)));
    let answer = portolan.try_run(&id, "echo", json!({"message": "m"})).await;
    assert!([502, 503].contains(&answer.status), "{}", answer.text);
    trap.assert_untouched();
    upstream.authority.set(|rules| rules.instead.clear());
    echo(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_cannot_be_taken_end_a_connect_with_a_sentence() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let mut documents = vec![Instead::Status(500), Instead::Text("[]".into()), Instead::Text("canary".into())];
    documents.extend([Instead::Huge, Instead::Text(format!("{{\"a\":{}", "[".repeat(100_000)))]);
    for instead in documents {
        for path in [METADATA, "/register"] {
            upstream.authority.set(|rules| drop(rules.instead.insert(path.to_owned(), instead.clone())));
            no_url(&portolan, &id, &format!("{path} {:.40}", format!("{instead:?}"))).await;
            upstream.authority.set(|rules| rules.instead.clear());
        }
    }
    // A method of PKCE that anybody can see through, and another authority's document.
    for metadata in [
        json!({"code_challenge_methods_supported": ["plain"]}),
        json!({"issuer": "https://other.example.com"}),
        json!({"token_endpoint": null}),
    ] {
        upstream.authority.set(|rules| rules.metadata = metadata.clone());
        no_url(&portolan, &id, &metadata.to_string()).await;
    }
    // A document about another server.
    upstream.authority.set(|rules| rules.metadata = json!({}));
    upstream.guard.set_metadata(json!({"resource": "https://other.example.com/mcp"}));
    no_url(&portolan, &id, "resource").await;
    upstream.guard.set_metadata(json!({}));
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_drips_has_its_time() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    upstream.authority.set(|rules| drop(rules.instead.insert(METADATA.to_owned(), Instead::Drips)));
    no_url(&portolan, &id, "drips").await;
    upstream.authority.set(|rules| rules.instead.clear());
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}
