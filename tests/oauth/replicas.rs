//! Sign-ins where several Portolans serve over one PostgreSQL: each step may come to another of them. On SQLite, which one
//! process has for itself, there is nothing to look at.

use chrono::TimeDelta;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::{Duration, Instant, sleep};

use crate::database::{Link, Proxy};
use crate::fake::oauth::{Refresh, Registration, Rules, Said, TOKEN};
use crate::fake::{self, Fake, Script};
use crate::harness::{PATIENCE, Portolan, eventually};

use super::{CALLBACK, Kind, Upstream, Watch, allow, come_back, echo, register, sign_in, state, visit};

/// Three that serve on one database; none where that is for one process alone.
async fn three(upstreams: &[&Upstream]) -> Option<[Portolan; 3]> {
    let settings = || allow(upstreams.iter().map(|upstream| &upstream.authority));
    let one = Portolan::start_with(settings()).await;
    let Some(two) = one.replica(settings()).await else {
        one.stop().await;
        return None;
    };
    let three = one.replica(settings()).await.unwrap();
    Some([one, two, three])
}

async fn stop([one, two, three]: [Portolan; 3]) {
    for portolan in [three, two, one] {
        portolan.stop().await;
    }
}

/// Asks until it is so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// With which tokens the MCP server was asked since `from`, but for the goodbyes of sessions of before.
fn shown(upstream: &Upstream, from: usize) -> Vec<Option<String>> {
    let seen = upstream.server.requests().split_off(from);
    let seen = seen.iter().filter(|seen| seen.method != "DELETE");
    seen.map(|seen| seen.header("authorization").map(str::to_owned)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_step_of_a_sign_in_may_come_to_another_one() {
    for registration in [Registration::Public, Registration::Secret(Said::Basic)] {
        let upstream = Upstream::start(Kind::Http, Rules { registration, ..Rules::default() });
        let Some(all) = three(&[&upstream]).await else { return };
        let [one, two, three] = &all;
        let id = register(one, "notes", upstream.config()).await;
        // Who connects watches here, comes back there, and somebody else runs.
        let mut watch = Watch::start(two, &id).await;
        let url = watch.url().await;
        assert_eq!(come_back(three, &visit(&url).await).await["status"], "success");
        assert!(watch.success().await.iter().any(|tool| tool["name"] == "echo"));
        for portolan in &all {
            echo(portolan, &id).await;
            assert_eq!(state(portolan, &id).await, "ready");
        }
        assert_eq!((upstream.authority.granted("authorization_code"), upstream.authority.reused()), (1, 0));

        // The user says no, elsewhere.
        upstream.authority.set(|rules| rules.refuses = true);
        upstream.authority.revoke();
        let mut watch = Watch::start(one, &id).await;
        let url = watch.url().await;
        assert_eq!(come_back(two, &visit(&url).await).await["status"], "error");
        let said = watch.failure().await;
        assert!(said.contains("access_denied"), "{said}");
        stop(all).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_counts_once_wherever_it_comes() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let Some(all) = three(&[&upstream]).await else { return };
    let id = register(&all[0], "notes", upstream.config()).await;
    let mut watch = Watch::start(&all[0], &id).await;
    let back = visit(&watch.url().await).await;
    let told = join_all(all.iter().map(|portolan| come_back(portolan, &back))).await;
    let taken = told.iter().filter(|told| told["status"] == "success").count();
    assert_eq!(taken, 1, "{told:?}");
    let others = told.iter().filter(|told| told["message"] == "Invalid or expired state parameter").count();
    assert_eq!(others, 2, "{told:?}");
    watch.success().await;
    assert_eq!((upstream.authority.tried("authorization_code"), upstream.authority.reused()), (1, 0));
    stop(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tabs_at_two_replicas_are_two_sign_ins() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let Some(all) = three(&[&upstream]).await else { return };
    let [one, two, three] = &all;
    let id = register(one, "notes", upstream.config()).await;
    let (mut first, mut second) = (Watch::start(one, &id).await, Watch::start(two, &id).await);
    let (first_back, second_back) = (visit(&first.url().await).await, visit(&second.url().await).await);
    assert_eq!(come_back(three, &second_back).await["status"], "success");
    second.success().await;
    assert_eq!(come_back(two, &first_back).await["status"], "success");
    first.success().await;
    assert_eq!((upstream.authority.granted("authorization_code"), upstream.authority.reused()), (2, 0));
    for portolan in &all {
        echo(portolan, &id).await;
    }
    // Whoever signs in last is the one whose tokens all use in the end.
    upstream.authority.expire();
    for portolan in &all {
        echo(portolan, &id).await;
    }
    assert_eq!((upstream.authority.tried("refresh_token"), upstream.authority.reused()), (1, 0));
    stop(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_from_before_a_registration_is_taken_over_by_any() {
    const CONNECT: &str = "/v1/tools/mcp/servers/connect";
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let Some(all) = three(&[&upstream]).await else { return };
    let [one, two, three] = &all;
    let body = json!({"server_name": "notes", "server_url": upstream.server.url, "type": "streamable_http"});
    let mut watch = Watch::open("POST", one.request("POST", CONNECT).json(&body), CONNECT).await;
    assert_eq!(come_back(two, &visit(&watch.url().await).await).await["status"], "success");
    assert!(watch.success().await.iter().any(|tool| tool["name"] == "echo"));
    let id = register(three, "notes", upstream.config()).await;
    assert_eq!(state(one, &id).await, "ready");
    for portolan in &all {
        echo(portolan, &id).await;
    }
    // It is for one server: of two that are registered at once with another one there is one at most.
    let mut watch = Watch::open(
        "POST",
        two.request("POST", CONNECT).json(&json!({
            "server_name": "others", "server_url": upstream.server.url, "type": "streamable_http",
        })),
        CONNECT,
    )
    .await;
    assert_eq!(come_back(one, &visit(&watch.url().await).await).await["status"], "success");
    watch.success().await;
    let (second, third) =
        tokio::join!(register(one, "second", upstream.config()), register(two, "third", upstream.config()));
    let mut states = [state(three, &second).await, state(three, &third).await];
    states.sort_unstable();
    assert_eq!(states, ["auth_required", "ready"]);
    stop(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_tokens_that_one_got_are_found_by_the_others() {
    for kind in super::BOTH {
        let upstream = Upstream::start(kind, Rules::default());
        let Some(all) = three(&[&upstream]).await else { return };
        let id = register(&all[0], "notes", upstream.config()).await;
        sign_in(&all[0], &id).await;
        for portolan in &all {
            echo(portolan, &id).await;
        }
        for round in 1..=3 {
            upstream.authority.expire();
            // One after the other: the first one gets new tokens, and the refresh token of before is worth nothing any more.
            for turn in 0..3 {
                echo(&all[(round + turn) % 3], &id).await;
            }
            assert_eq!(
                (upstream.authority.tried("refresh_token"), upstream.authority.reused()),
                (round, 0),
                "{kind:?}"
            );
        }
        // Twice, while another one has nothing to do: the next token that it finds is worth nothing either.
        upstream.authority.expire();
        echo(&all[0], &id).await;
        upstream.authority.expire();
        let told = all[1].try_run(&id, "echo", json!({"message": "m"})).await;
        assert_eq!(told.status, 200, "{}", told.text);
        assert_eq!((upstream.authority.tried("refresh_token"), upstream.authority.reused()), (5, 0), "{kind:?}");
        // All at once.
        let hold = upstream.authority.hold(TOKEN);
        upstream.authority.expire();
        let release = async {
            eventually("somebody wants new tokens", || upstream.authority.tried("refresh_token") > 5).await;
            drop(hold);
        };
        tokio::join!(join_all(all.iter().chain(&all).map(|portolan| echo(portolan, &id))), release);
        assert_eq!((upstream.authority.tried("refresh_token"), upstream.authority.reused()), (6, 0), "{kind:?}");
        assert_eq!(upstream.authority.granted("authorization_code"), 1, "nobody was signed out");
        stop(all).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_died_over_new_tokens_holds_nobody_up_for_long() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let Some(all) = three(&[&upstream]).await else { return };
    let [one, two, _] = &all;
    let id = register(one, "notes", upstream.config()).await;
    sign_in(one, &id).await;
    let store = &one.app.store;
    let version = store.sign_in(&id).await.unwrap().unwrap().version;
    // It took the lease and was never seen again.
    assert!(store.lease_sign_in(&id, version, "dead", TimeDelta::seconds(2)).await.unwrap());
    assert!(!store.lease_sign_in(&id, version, "another", TimeDelta::seconds(2)).await.unwrap(), "one at a time");
    upstream.authority.expire();
    echo(two, &id).await;
    assert_eq!(upstream.authority.tried("refresh_token"), 1);
    // One from before a clock was set back by a day.
    let version = store.sign_in(&id).await.unwrap().unwrap().version;
    assert!(store.lease_sign_in(&id, version, "tomorrow", TimeDelta::days(1)).await.unwrap());
    upstream.authority.expire();
    echo(one, &id).await;
    assert_eq!((upstream.authority.tried("refresh_token"), upstream.authority.reused()), (2, 0));
    stop(all).await;
}

/// Who used the refresh token of before a second time would end the whole sign-in.
#[tokio::test(flavor = "multi_thread")]
async fn new_tokens_that_cannot_be_stored_when_they_come_are_stored_when_the_database_is_back() {
    let Some(proxy) = Proxy::start().await else { return };
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let one = Portolan::start_with(|settings| {
        allow([&upstream.authority])(settings);
        proxy.stand_before(settings);
    })
    .await;
    let two = one.replica(allow([&upstream.authority])).await.unwrap();
    let id = register(&one, "notes", upstream.config()).await;
    sign_in(&one, &id).await;
    echo(&one, &id).await;
    let version = async || two.app.store.sign_in(&id).await.unwrap().unwrap().version;
    let before = version().await;
    let hold = upstream.authority.hold(TOKEN);
    upstream.authority.expire();
    let (told, ()) = tokio::join!(one.try_run(&id, "echo", json!({"message": "m"})), async {
        eventually("it wants new tokens", || upstream.authority.tried("refresh_token") == 1).await;
        proxy.set(Link::Gone);
        drop(hold);
    });
    assert!([200, 503].contains(&told.status), "{}", told.text);
    assert_eq!(version().await, before, "there is no way to store them");
    proxy.set(Link::Through);
    until("they are stored", async || version().await > before).await;
    for portolan in [&two, &one] {
        until("it runs", async || portolan.try_run(&id, "echo", json!({"message": "m"})).await.status == 200).await;
        echo(portolan, &id).await;
    }
    assert_eq!((upstream.authority.tried("refresh_token"), upstream.authority.reused()), (1, 0));
    two.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_signs_in_on_one_replica_is_who_all_are() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let Some(all) = three(&[&upstream]).await else { return };
    let [one, two, three] = &all;
    let id = register(one, "notes", upstream.config()).await;
    let token = |from: usize| shown(&upstream, from).pop().flatten().unwrap();
    // Another person has the page open, and says yes much later.
    let mut late = Watch::start(three, &id).await;
    let late_back = visit(&late.url().await).await;
    sign_in(one, &id).await;
    for portolan in &all {
        echo(portolan, &id).await;
    }
    let first = token(0);
    assert_eq!(come_back(two, &late_back).await["status"], "success");
    late.success().await;
    // The token of the first one would be good for an hour.
    for portolan in &all {
        until("the second one is used", async || {
            let from = upstream.server.requests().len();
            echo(portolan, &id).await;
            !shown(&upstream, from).contains(&Some(first.clone()))
        })
        .await;
    }
    let from = upstream.server.requests().len();
    for portolan in &all {
        echo(portolan, &id).await;
    }
    let second = token(from);
    assert_ne!(first, second);
    assert!(shown(&upstream, from).iter().all(|shown| shown.as_ref() == Some(&second)));

    // The sign-in is removed, with the session of each replica open.
    two.patch(&format!("/v1/mcp-servers/{id}"), &json!({"config": {"oauth": {}}})).await.expect(200);
    for portolan in &all {
        until("nobody is signed in", async || {
            portolan.try_run(&id, "echo", json!({"message": "m"})).await.status != 200
        })
        .await;
    }
    let from = upstream.server.requests().len();
    for portolan in &all {
        let refused = portolan.try_run(&id, "echo", json!({"message": "m"})).await;
        assert!(matches!(refused.status, 502 | 503), "{}", refused.text);
        portolan.refresh(&id).await.expect(404);
    }
    let shown = shown(&upstream, from);
    assert!(!shown.is_empty() && shown.iter().all(Option::is_none), "what was removed is sent by nobody: {shown:?}");
    sign_in(two, &id).await;
    for portolan in &all {
        until("it can be used", async || portolan.try_run(&id, "echo", json!({"message": "m"})).await.status == 200)
            .await;
    }
    stop(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_has_a_token_for_all() {
    let rules = Rules {
        registration: Registration::Closed,
        metadata: json!({"token_endpoint_auth_methods_supported": ["client_secret_basic"]}),
        ..Rules::default()
    };
    let upstream = Upstream::start(Kind::Http, rules);
    upstream.authority.register("machine", Some((Said::Basic, "machine-secret")), CALLBACK);
    let Some(all) = three(&[&upstream]).await else { return };
    let oauth = json!({"client_id": "machine", "client_secret": "machine-secret", "grant_type": "client_credentials"});
    let id = register(&all[0], "notes", upstream.config_with(oauth)).await;
    for portolan in &all {
        echo(portolan, &id).await;
    }
    assert_eq!(upstream.authority.granted("client_credentials"), 1);
    upstream.authority.expire();
    join_all(all.iter().map(|portolan| echo(portolan, &id))).await;
    assert_eq!(upstream.authority.granted("client_credentials"), 2);
    stop(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_that_is_over_is_over_for_all_until_the_next_one() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let Some(all) = three(&[&upstream]).await else { return };
    let id = register(&all[0], "notes", upstream.config()).await;
    sign_in(&all[0], &id).await;
    for portolan in &all {
        echo(portolan, &id).await;
    }
    upstream.authority.set(|rules| rules.refresh = Refresh::Refuses);
    upstream.authority.expire();
    let told: Vec<Value> = join_all(
        all.iter().map(async |portolan| portolan.try_run(&id, "echo", json!({"message": "m"})).await.expect(502)),
    )
    .await;
    for told in told {
        assert!(told["detail"].as_str().unwrap().contains(&format!("/v1/mcp-servers/connect/{id}")), "{told}");
    }
    assert_eq!((upstream.authority.tried("refresh_token"), upstream.authority.reused()), (1, 0));
    upstream.authority.set(|rules| rules.refresh = Refresh::Rotates);
    sign_in(&all[1], &id).await;
    for portolan in &all {
        until("it can be used again", async || {
            portolan.try_run(&id, "echo", json!({"message": "m"})).await.status == 200
        })
        .await;
        assert_eq!(state(portolan, &id).await, "ready");
    }
    stop(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_goes_to_no_other_place_from_any_replica() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let Some(all) = three(&[&upstream]).await else { return };
    let [one, two, three] = &all;
    let id = register(one, "notes", upstream.config()).await;
    sign_in(one, &id).await;
    for portolan in &all {
        echo(portolan, &id).await;
    }
    let elsewhere = fake::http::serve(Fake::new(Script::default()));
    two.patch(&format!("/v1/mcp-servers/{id}"), &json!({"config": {"server_url": elsewhere.url}})).await.expect(200);
    for portolan in [three, one, two] {
        let calls = || elsewhere.requests().iter().filter(|seen| seen.rpc() == "tools/call").count();
        until("it goes to the new place", async || {
            let before = calls();
            echo(portolan, &id).await;
            calls() > before
        })
        .await;
    }
    assert!(elsewhere.requests().iter().all(|seen| seen.header("authorization").is_none()));
    stop(all).await;
}
