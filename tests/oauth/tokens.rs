//! The time after a sign-in: tokens that expire, are refused or taken back, restarts, other keys, other URLs, and several that
//! want new tokens at once.

use std::time::Duration;

use futures_util::future::join_all;
use portolan::app::App;
use portolan::config::Settings;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::fake::oauth::{Authority, Refresh, Registration, Rules, Said, TOKEN};
use crate::fake::{self, Fake, Script};
use crate::harness::{KEY, Portolan, Remote, eventually};

use super::{
    BOTH, CALLBACK, Kind, LONG, Upstream, Watch, allow, come_back, echo, register, registered, sign_in, state, visit,
};

/// A run that does not reach the tool, because of its sign-in: what the answer says. A repeat is of use only when the
/// authorization server is away (CONTRACT rows 14 and 27).
async fn refused(portolan: &Portolan, id: &str, status: u16) -> String {
    let answer = portolan.try_run(id, "echo", json!({"message": "m"})).await;
    let again = (answer.header("x-should-retry"), answer.header("retry-after").is_some());
    assert_eq!((answer.status, again), (status, if status == 502 { (Some("false"), false) } else { (None, true) }));
    answer.expect(status)["detail"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_expire_are_fetched_again() {
    for kind in BOTH {
        let upstream = Upstream::start(kind, Rules::default());
        let (portolan, id) = registered(&upstream).await;
        sign_in(&portolan, &id).await;
        for round in 1..=2 {
            upstream.authority.expire();
            echo(&portolan, &id).await;
            assert_eq!(upstream.authority.granted("refresh_token"), round, "{kind:?}");
        }
        upstream.authority.expire();
        portolan.refresh(&id).await.expect(200);
        echo(&portolan, &id).await;
        assert_eq!(upstream.authority.granted("refresh_token"), 3, "a refresh of the tools wants a token as well");
        assert_eq!((upstream.authority.reused(), upstream.authority.granted("authorization_code")), (0, 1));
        let refresh = upstream.authority.asked().into_iter().rfind(|asked| asked.path == TOKEN).unwrap();
        assert_eq!(refresh.param("resource"), upstream.server.url, "RFC 8707");
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_fetched_before_the_old_one_ends() {
    // It is good for longer than it says, so that nobody has to refuse it.
    let rules = Rules { expires_in: Some(4), lasts: Some(Duration::from_secs(3600)), ..Rules::default() };
    let upstream = Upstream::start(Kind::Http, rules);
    let (portolan, id) = registered(&upstream).await;
    sign_in(&portolan, &id).await;
    upstream.authority.set(|rules| rules.expires_in = Some(3600));
    let mut runs = 1;
    let deadline = tokio::time::Instant::now() + LONG;
    while upstream.authority.granted("refresh_token") == 0 {
        assert!(tokio::time::Instant::now() < deadline, "the token is used for ever");
        echo(&portolan, &id).await;
        runs += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    echo(&portolan, &id).await;
    assert_eq!(upstream.authority.tried("refresh_token"), 1, "the new one lasts");
    let calls = upstream.server.requests().iter().filter(|seen| seen.rpc() == "tools/call").count();
    assert_eq!(calls, runs, "no call was refused and made again");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_which_nobody_knows_the_end_is_used_until_it_is_refused() {
    let upstream = Upstream::start(Kind::Http, Rules { expires_in: None, ..Rules::default() });
    let (portolan, id) = registered(&upstream).await;
    sign_in(&portolan, &id).await;
    echo(&portolan, &id).await;
    assert_eq!(upstream.authority.tried("refresh_token"), 0);
    upstream.authority.expire();
    echo(&portolan, &id).await;
    assert_eq!(upstream.authority.granted("refresh_token"), 1);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_that_is_gone_is_told_with_what_to_open_and_harms_nobody_else() {
    for gone in ["refused", "revoked", "none"] {
        let rules =
            Rules { refresh: if gone == "none" { Refresh::Never } else { Refresh::Rotates }, ..Rules::default() };
        let (upstream, other) = (Upstream::start(Kind::Http, rules), Upstream::start(Kind::Http, Rules::default()));
        let portolan = Portolan::start_with(allow([&upstream.authority, &other.authority])).await;
        let id = register(&portolan, "notes", upstream.config()).await;
        let well = register(&portolan, "well", other.config()).await;
        sign_in(&portolan, &id).await;
        sign_in(&portolan, &well).await;
        echo(&portolan, &id).await;
        match gone {
            "refused" => {
                upstream.authority.set(|rules| rules.refresh = Refresh::Refuses);
                upstream.authority.expire();
            }
            "revoked" => upstream.authority.revoke(),
            _ => upstream.authority.expire(),
        }
        let calls = |seen: &[fake::Seen]| seen.iter().filter(|seen| seen.rpc() == "tools/call").count();
        let told = refused(&portolan, &id, 502).await;
        assert!(told.contains(&format!("/v1/mcp-servers/connect/{id}")), "{gone}: {told}");
        assert_eq!(state(&portolan, &id).await, "auth_required", "{gone}");
        let refresh = portolan.refresh(&id).await.expect(404);
        let told = refresh["detail"]["error"].as_str().unwrap();
        assert!(told.contains(&format!("/v1/mcp-servers/connect/{id}")), "{gone}: {told}");
        echo(&portolan, &well).await;
        assert_eq!(state(&portolan, &well).await, "ready");

        // The next sign-in makes it well again.
        upstream.authority.set(|rules| rules.refresh = Refresh::Rotates);
        sign_in(&portolan, &id).await;
        let before = calls(&upstream.server.requests());
        echo(&portolan, &id).await;
        assert_eq!(calls(&upstream.server.requests()), before + 1, "{gone}");
        assert_eq!(state(&portolan, &id).await, "ready");
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_is_away_ends_no_sign_in() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    sign_in(&portolan, &id).await;
    upstream.authority.set(|rules| rules.refresh = Refresh::Fails);
    upstream.authority.expire();
    let told = refused(&portolan, &id, 503).await;
    assert!(!told.contains("/connect/"), "a person cannot help: {told}");
    assert_eq!(upstream.authority.reused(), 0);
    upstream.authority.set(|rules| rules.refresh = Refresh::Rotates);
    echo(&portolan, &id).await;
    assert_eq!((upstream.authority.granted("authorization_code"), upstream.authority.granted("refresh_token")), (1, 1));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_lasts_over_restarts() {
    for registration in [Registration::Public, Registration::Secret(Said::Basic), Registration::Secret(Said::Post)] {
        for kind in BOTH {
            let upstream = Upstream::start(kind, Rules { registration, ..Rules::default() });
            let (portolan, id) = registered(&upstream).await;
            sign_in(&portolan, &id).await;
            let portolan = portolan.reopen(allow([&upstream.authority])).await;
            echo(&portolan, &id).await;
            // The secret of the client is there as well.
            let portolan = portolan.reopen(allow([&upstream.authority])).await;
            upstream.authority.expire();
            echo(&portolan, &id).await;
            assert_eq!(upstream.authority.granted("refresh_token"), 1, "{registration:?} {kind:?}");
            assert_eq!(upstream.authority.granted("authorization_code"), 1);
            portolan.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_goes_on_after_a_restart_in_its_middle() {
    for registration in [Registration::Public, Registration::Secret(Said::Basic)] {
        let upstream = Upstream::start(Kind::Http, Rules { registration, ..Rules::default() });
        let (portolan, id) = registered(&upstream).await;
        let mut watch = Watch::start(&portolan, &id).await;
        let url = watch.url().await;
        let reading = tokio::spawn(async move { watch.next().await });
        let portolan = portolan.reopen(allow([&upstream.authority])).await;
        assert_eq!(reading.await.unwrap(), None);
        let told = come_back(&portolan, &visit(&url).await).await;
        assert_eq!(told["status"], "success", "{told}");
        portolan.refresh(&id).await.expect(200);
        echo(&portolan, &id).await;
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_that_want_a_new_token_at_once_share_it() {
    for kind in BOTH {
        let upstream = Upstream::start(kind, Rules::default());
        let (portolan, id) = registered(&upstream).await;
        sign_in(&portolan, &id).await;
        let hold = upstream.authority.hold(TOKEN);
        upstream.authority.expire();
        let release = async {
            eventually("somebody wants a new token", || upstream.authority.tried("refresh_token") > 0).await;
            drop(hold);
        };
        tokio::join!(join_all((0..4).map(|_| echo(&portolan, &id))), release);
        assert_eq!((upstream.authority.tried("refresh_token"), upstream.authority.reused()), (1, 0), "{kind:?}");
        portolan.stop().await;
    }
}

/// A second Portolan on the same database, serving.
async fn serve(app: App) -> (Remote, CancellationToken, tokio::task::JoinHandle<Result<(), portolan::app::Unclean>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let remote = Remote::new(&format!("http://{}", listener.local_addr().unwrap()));
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(app.serve(listener, shutdown.clone()));
    (remote, shutdown, serving)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_portolans_on_one_database_share_a_sign_in_and_its_tokens() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    if !portolan.shares_its_database() {
        // SQLite belongs to one process.
        return portolan.stop().await;
    }
    let other = portolan.another_with(allow([&upstream.authority])).await;
    let (remote, shutdown, serving) = serve(other).await;
    // The browser comes back to another replica than it left from.
    let mut watch = Watch::start(&portolan, &id).await;
    let back = visit(&watch.url().await).await;
    let told = remote.send("GET", &back[url::Position::BeforePath..], None).await.expect(200);
    assert_eq!(told["status"], "success", "{told}");
    watch.success().await;
    assert_eq!(remote.run(&id, "echo", json!({"message": "m"})).await["status"], "success");
    for round in 1..=3 {
        let hold = upstream.authority.hold(TOKEN);
        upstream.authority.expire();
        let both = async {
            tokio::join!(echo(&portolan, &id), async {
                let ran: Value = remote.run(&id, "echo", json!({"message": "m"})).await;
                assert_eq!(ran["status"], "success", "{ran}");
            })
        };
        let release = async {
            eventually("somebody wants a new token", || upstream.authority.tried("refresh_token") >= round).await;
            drop(hold);
        };
        tokio::join!(both, release);
        assert_eq!((upstream.authority.tried("refresh_token"), upstream.authority.reused()), (round, 0));
    }
    shutdown.cancel();
    assert_eq!(serving.await.unwrap(), Ok(()));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_signs_in_by_itself() {
    for said in [Said::Basic, Said::Post] {
        for kind in BOTH {
            let method = if said == Said::Basic { "client_secret_basic" } else { "client_secret_post" };
            let rules = Rules {
                registration: Registration::Closed,
                metadata: json!({"token_endpoint_auth_methods_supported": [method]}),
                ..Rules::default()
            };
            let upstream = Upstream::start(kind, rules);
            upstream.authority.register("machine", Some((said, "machine-secret")), CALLBACK);
            // No browser has to find the way back.
            let portolan = Portolan::start_with(|settings| {
                allow([&upstream.authority])(settings);
                settings.upstream.sign_in.public_url = None;
            })
            .await;
            let oauth = |secret: &str| json!({"client_id": "machine", "client_secret": secret, "grant_type": "client_credentials"});
            let id = register(&portolan, "notes", upstream.config_with(oauth("machine-secret"))).await;
            assert_eq!(state(&portolan, &id).await, "ready", "{said:?} {kind:?}");
            echo(&portolan, &id).await;
            upstream.authority.expire();
            echo(&portolan, &id).await;
            upstream.authority.revoke();
            echo(&portolan, &id).await;
            assert_eq!(upstream.authority.granted("client_credentials"), 3, "{said:?} {kind:?}");
            let refreshes = |result: &str| format!("portolan_oauth_refreshes_total{{result=\"{result}\"}}");
            let told = crate::metrics::scrape(&portolan).await;
            assert_eq!(["renewed", "refused", "failed"].map(|result| told.get(&refreshes(result))), [3.0, 0.0, 0.0]);
            let portolan = portolan.reopen(allow([&upstream.authority])).await;
            echo(&portolan, &id).await;
            // Another secret is no secret.
            let wrong = register(&portolan, "wrong", upstream.config_with(oauth("other-secret"))).await;
            assert_ne!(state(&portolan, &wrong).await, "ready");
            let told = crate::metrics::scrape(&portolan).await;
            assert!(told.get(&refreshes("refused")) >= 1.0 && told.get(&refreshes("renewed")) <= 1.0);
            echo(&portolan, &id).await;
            portolan.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_goes_to_no_other_url_than_the_one_that_was_signed_in_to() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    sign_in(&portolan, &id).await;
    echo(&portolan, &id).await;
    // Another server, and another path of the same one.
    let thief = fake::http::serve(Fake::new(Script::default()));
    let path = format!("/v1/mcp-servers/{id}");
    let elsewhere = upstream.server.url.replace("/mcp", "/other/mcp");
    for url in [&thief.url, &elsewhere] {
        let before = upstream.server.requests().len();
        portolan.patch(&path, &json!({"config": {"server_url": url}})).await.expect(200);
        portolan.refresh(&id).await;
        let seen = if *url == thief.url { thief.requests() } else { upstream.server.requests().split_off(before) };
        assert!(!seen.is_empty());
        assert!(seen.iter().all(|seen| seen.header("authorization").is_none()), "{seen:?}");
    }
    assert_eq!(state(&portolan, &id).await, "auth_required");
    // The twin: a change that is none of the URL, after a sign-in.
    portolan.patch(&path, &json!({"config": {"server_url": upstream.server.url}})).await.expect(200);
    sign_in(&portolan, &id).await;
    portolan.patch(&path, &json!({"config": {"custom_headers": {"X-More": "1"}}})).await.expect(200);
    echo(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configured_token_is_not_replaced() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    sign_in(&portolan, &id).await;
    let before = upstream.server.requests().len();
    let path = format!("/v1/mcp-servers/{id}");
    portolan.patch(&path, &json!({"config": {"auth_token": "configured"}})).await.expect(200);
    portolan.refresh(&id).await.expect(404);
    // The session of before ends with its own token.
    let seen = upstream.server.requests().split_off(before);
    let shown: Vec<_> =
        seen.iter().filter(|seen| seen.method != "DELETE").map(|seen| seen.header("authorization")).collect();
    assert!(!shown.is_empty() && shown.iter().all(|token| *token == Some("Bearer configured")), "{shown:?}");
    assert_eq!(state(&portolan, &id).await, "auth_required");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_one_authority_are_not_shown_to_another() {
    // The MCP server comes to name another authorization server.
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let other = Authority::start(Rules::default());
    let portolan = Portolan::start_with(allow([&upstream.authority, &other])).await;
    let id = register(&portolan, "notes", upstream.config()).await;
    sign_in(&portolan, &id).await;
    upstream.guard.set_metadata(json!({"authorization_servers": [other.url()]}));
    upstream.authority.expire();
    let _told = portolan.try_run(&id, "echo", json!({"message": "m"})).await;
    let secrets = upstream.authority.secrets();
    for asked in other.asked() {
        assert!(secrets.iter().all(|secret| !format!("{asked:?}").contains(secret)), "{asked:?}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_of_a_client_stays_where_it_was_first_used() {
    const SECRET: &str = "by-hand-and-secret";
    let closed = || Rules { registration: Registration::Closed, ..Rules::default() };
    let (upstream, other) = (Upstream::start(Kind::Http, closed()), Authority::start(closed()));
    for authority in [&upstream.authority, &other] {
        authority.register("by-hand", Some((Said::Basic, SECRET)), CALLBACK);
    }
    let portolan = Portolan::start_with(allow([&upstream.authority, &other])).await;
    let oauth = |secret: &str| json!({"client_id": "by-hand", "client_secret": secret});
    let id = register(&portolan, "notes", upstream.config_with(oauth(SECRET))).await;
    let path = format!("/v1/mcp-servers/{id}");
    sign_in(&portolan, &id).await;
    // Also when there is nothing left of the sign-in but where it was made.
    upstream.authority.set(|rules| rules.refresh = Refresh::Refuses);
    upstream.authority.expire();
    for moved in [false, true] {
        if moved {
            upstream.guard.set_metadata(json!({"authorization_servers": [other.url()]}));
            upstream.authority.expire();
        }
        let told = refused(&portolan, &id, 502).await;
        assert!(told.contains(&format!("/v1/mcp-servers/connect/{id}")), "{told}");
        assert_eq!(state(&portolan, &id).await, "auth_required");
        let again = json!({"config": {"oauth": oauth("********")}});
        portolan.patch(&path, &again).await.expect(200);
        if moved {
            let told = Watch::start(&portolan, &id).await.failure().await;
            assert!(told.contains("oauth.client_secret"), "{told}");
        } else {
            // The twin: at the same one.
            upstream.authority.set(|rules| rules.refresh = Refresh::Rotates);
            sign_in(&portolan, &id).await;
            echo(&portolan, &id).await;
        }
    }
    assert_eq!((other.tried("authorization_code"), other.tried("refresh_token")), (0, 0));
    // Whoever gives the secret again means it.
    portolan.patch(&path, &json!({"config": {"oauth": oauth(SECRET)}})).await.expect(200);
    let mut watch = Watch::start(&portolan, &id).await;
    let url = watch.url().await;
    assert_eq!(come_back(&portolan, &visit(&url).await).await["status"], "success");
    assert_eq!(other.granted("authorization_code"), 1);
    drop(watch);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_that_was_removed_is_not_taken_for_the_next_one() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let store = &portolan.app.store;
    let mut last = 0;
    for _ in 0..3 {
        sign_in(&portolan, &id).await;
        let version = store.sign_in(&id).await.unwrap().unwrap().version;
        assert!(version > last, "{version} after {last}");
        store.remove_sign_in(&id, last).await.unwrap();
        assert!(store.sign_in(&id).await.unwrap().is_some(), "that was the one before");
        store.remove_sign_in(&id, version).await.unwrap();
        assert!(store.sign_in(&id).await.unwrap().is_none());
        // The session of before ends with its token.
        upstream.authority.revoke();
        refused(&portolan, &id, 502).await;
        last = version;
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audience_is_asked_for_and_kept() {
    // Two servers behind one authorization server: a token of the one is none of the other.
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let sibling = Fake::guarded(Script::default(), upstream.authority.guard());
    let sibling = fake::http::serve(sibling);
    let portolan = Portolan::start_with(allow([&upstream.authority])).await;
    let id = register(&portolan, "notes", upstream.config()).await;
    let config = json!({"mcp_server_type": "streamable_http", "server_url": sibling.url});
    let other = register(&portolan, "sibling", config).await;
    sign_in(&portolan, &id).await;
    assert_eq!(state(&portolan, &other).await, "auth_required");
    sign_in(&portolan, &other).await;
    echo(&portolan, &id).await;
    echo(&portolan, &other).await;
    let shown = |seen: Vec<fake::Seen>| -> Vec<_> {
        seen.iter().filter_map(|seen| seen.header("authorization").map(str::to_owned)).collect()
    };
    let (first, second) = (shown(upstream.server.requests()), shown(sibling.requests()));
    assert!(first.iter().all(|token| !second.contains(token)));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_key_keeps_sign_ins_and_what_is_under_way() {
    let upstream =
        Upstream::start(Kind::Http, Rules { registration: Registration::Secret(Said::Basic), ..Rules::default() });
    let other = Upstream::start(Kind::Http, Rules::default());
    let authorities = || allow([&upstream.authority, &other.authority]);
    const NEW: &str = "YW5vdGhlciBrZXkgZm9yIHRoZSBzYW1lIHNlY3JldHM=";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    let with_keys = |keys: String| {
        std::fs::write(&file, keys).unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let (allow, file) = (authorities(), file.clone());
        move |settings: &mut Settings| {
            allow(settings);
            (settings.secrets.key, settings.secrets.key_file) = (None, Some(file));
        }
    };
    let portolan = Portolan::start_with(with_keys(KEY.to_owned())).await;
    let id = register(&portolan, "notes", upstream.config()).await;
    let pending = register(&portolan, "pending", other.config()).await;
    sign_in(&portolan, &id).await;
    let mut watch = Watch::start(&portolan, &pending).await;
    let url = watch.url().await;
    drop(watch);
    // Both keys for the time of the rotation, then the new one alone.
    let portolan = portolan.reopen(with_keys(format!("{NEW}\n{KEY}\n"))).await;
    portolan.app.store.rotate(|_, _| {}).await.unwrap();
    let portolan = portolan.reopen(with_keys(NEW.to_owned())).await;
    echo(&portolan, &id).await;
    upstream.authority.expire();
    echo(&portolan, &id).await;
    assert_eq!(upstream.authority.granted("refresh_token"), 1);
    assert_eq!(come_back(&portolan, &visit(&url).await).await["status"], "success");
    echo_after_refresh(&portolan, &pending).await;
    portolan.stop().await;
}

async fn echo_after_refresh(portolan: &Portolan, id: &str) {
    portolan.refresh(id).await.expect(200);
    echo(portolan, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_server_takes_its_sign_in_with_it() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    sign_in(&portolan, &id).await;
    portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204);
    let before = upstream.server.requests().len();
    let id = register(&portolan, "notes", upstream.config()).await;
    assert_eq!(state(&portolan, &id).await, "auth_required");
    // The session of before ends with its own token.
    let seen = upstream.server.requests().split_off(before);
    let mut seen = seen.iter().filter(|seen| seen.method != "DELETE");
    assert!(seen.all(|seen| seen.header("authorization").is_none()));
    sign_in(&portolan, &id).await;
    echo(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_no_authority() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let portolan = Portolan::start_with(|settings| {
        allow([&upstream.authority])(settings);
        settings.entry.drain_timeout = Duration::from_millis(100);
    })
    .await;
    let id = register(&portolan, "notes", upstream.config()).await;
    sign_in(&portolan, &id).await;
    upstream.authority.expire();
    let asked = upstream.authority.count(TOKEN);
    let _held = upstream.authority.hold(TOKEN);
    let remote = portolan.remote();
    let path = remote.path(&id, "echo").await;
    // The answer is that of a stop, or cut off by it.
    let running = tokio::spawn(async move { remote.request("POST", &path).json(&json!({})).send().await.is_ok() });
    eventually("new tokens are asked for", || upstream.authority.count(TOKEN) > asked).await;
    // It asserts that nothing is left.
    portolan.stop().await;
    let _ = running.await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_that_was_begun_as_another_client_is_not_finished() {
    let upstream = Upstream::start(Kind::Http, Rules { registration: Registration::Closed, ..Rules::default() });
    for client in ["first", "second"] {
        upstream.authority.register(client, None, CALLBACK);
    }
    let portolan = Portolan::start_with(allow([&upstream.authority])).await;
    let id = register(&portolan, "notes", upstream.config_with(json!({"client_id": "first"}))).await;
    let path = format!("/v1/mcp-servers/{id}");
    let mut older = Watch::start(&portolan, &id).await;
    let old_tab = visit(&older.url().await).await;
    // A change of something else leaves it as it is.
    portolan.patch(&path, &json!({"server_name": "other"})).await.expect(200);
    portolan.patch(&path, &json!({"config": {"custom_headers": {"x-a": "b"}}})).await.expect(200);
    let mut kept = Watch::start(&portolan, &id).await;
    let kept_tab = visit(&kept.url().await).await;
    portolan.patch(&path, &json!({"server_name": "notes"})).await.expect(200);
    assert_eq!(come_back(&portolan, &kept_tab).await["status"], "success");
    kept.success().await;

    portolan.patch(&path, &json!({"config": {"oauth": {"client_id": "second"}}})).await.expect(200);
    let said = older.failure().await;
    assert!(said.contains("because the server was changed"), "{said}");
    sign_in(&portolan, &id).await;
    let told = come_back(&portolan, &old_tab).await;
    assert_eq!(told["message"], "Invalid or expired state parameter", "{told}");
    assert_eq!(upstream.authority.granted("authorization_code"), 2);
    echo(&portolan, &id).await;
    portolan.stop().await;
}
