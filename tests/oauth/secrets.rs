//! What a sign-in is made of stays where it belongs: neither answers nor the log at its most talkative nor the database have it.

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Value, json};

use crate::fake::oauth::{Registration, Rules, Said};
use crate::harness::{Database, Remote};
use crate::process::{Program, command};
use crate::secrets::dump;

use super::{BOTH, CALLBACK, Kind, PUBLIC, Upstream, Watch, visit};

#[tokio::test(flavor = "multi_thread")]
async fn no_token_and_no_code_is_found_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let log = folder.path().join("log");
    let rules = |registration| Rules { registration, ..Rules::default() };
    let mut upstreams: Vec<_> = BOTH
        .into_iter()
        .zip([Said::Basic, Said::Post])
        .map(|(kind, said)| Upstream::start(kind, rules(Registration::Secret(said))))
        .collect();
    // One that refuses whatever it is brought, and one for a machine.
    upstreams.push(Upstream::start(Kind::Http, rules(Registration::Public)));
    upstreams.push(Upstream::start(Kind::Http, rules(Registration::Closed)));
    let [first, second, wrong, machine] = &upstreams[..] else { panic!("four") };
    let mut start = command(folder.path(), database.url().as_deref());
    let allowed: Vec<_> = upstreams.iter().map(|upstream| upstream.authority.authority()).collect();
    start
        .env("PORTOLAN_LOG", "trace")
        .env("PORTOLAN_PUBLIC_URL", PUBLIC)
        .env("PORTOLAN_EGRESS_ALLOW", allowed.join(","))
        .stderr(std::fs::File::create(&log).unwrap());
    if database.url().is_none() {
        start.env("PORTOLAN_KEY", crate::harness::KEY);
    }
    start.arg("--data-dir").arg(folder.path().join("data"));
    let mut program = Program::start(start);
    let remote = Remote::new(&program.url);
    let mut answers = Vec::new();
    let mut ids = Vec::new();
    for (number, upstream) in [first, second, wrong].into_iter().enumerate() {
        let server = remote.create(&format!("server {number}"), upstream.config()).await;
        let id = server["id"].as_str().unwrap().to_owned();
        let path = format!("/v1/mcp-servers/connect/{id}");
        let mut watch = Watch::open(remote.request("GET", &path), &path).await;
        let back = visit(&watch.url().await).await;
        if number == 2 {
            upstream.authority.set(|rules| rules.iss = Some("https://other.example.com".into()));
            upstream.authority.revoke();
        }
        let back = if number == 2 { super::with_param(&back, "iss", Some("https://other.example.com")) } else { back };
        let before = answers.len();
        for accept in ["application/json", "text/html"] {
            let request = remote.request("GET", &back[url::Position::BeforePath..]).header("accept", accept);
            answers.push(request.send().await.unwrap().text().await.unwrap());
        }
        while let Some(event) = watch.next().await {
            answers.push(event.to_string());
        }
        if number < 2 {
            assert!(answers[before].contains("Authorization successful"), "{answers:?}");
            upstream.authority.expire();
            let ran: Value = remote.run(&id, "echo", json!({"message": "m"})).await;
            assert_eq!(ran["status"], "success", "{ran}");
            upstream.authority.revoke();
            let path = remote.path(&id, "echo").await;
            answers.push(remote.post(&path, &json!({"args": {"message": "m"}})).await.text);
        }
        ids.push(id);
    }
    machine.authority.register("machine", Some((Said::Basic, "secret-of-a-machine")), CALLBACK);
    let oauth =
        json!({"client_id": "machine", "client_secret": "secret-of-a-machine", "grant_type": "client_credentials"});
    let server = remote.create("machine", machine.config_with(oauth)).await;
    assert_eq!(server["status"]["state"], "ready", "{server}");
    ids.push(server["id"].as_str().unwrap().to_owned());
    answers.push(server.to_string());
    for id in &ids {
        for path in ["", "/tools"] {
            let answer = remote.send("GET", &format!("/v1/mcp-servers/{id}{path}"), None).await;
            answers.push(format!("{:?} {}", answer.headers, answer.text));
        }
    }

    let mut secrets: Vec<_> = upstreams.iter().flat_map(|upstream| upstream.authority.secrets()).collect();
    assert!(secrets.len() > 12, "{secrets:?}");
    let basic: Vec<_> = upstreams.iter().flat_map(|upstream| upstream.authority.asked()).collect();
    let basic = basic.iter().filter_map(|asked| asked.authorization.as_deref()?.strip_prefix("Basic "));
    let basic: Vec<_> = basic.map(str::to_owned).collect();
    assert!(!basic.is_empty() && BASE64_STANDARD.decode(&basic[0]).is_ok());
    secrets.extend(basic);
    let none = |what: &str, text: &str| {
        for secret in &secrets {
            assert!(!text.contains(secret.as_str()), "{what} has {secret}");
        }
    };
    answers.iter().for_each(|answer| none("an answer", answer));
    none("the database while it is open", &dump(&database, &folder.path().join("data")).await);
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("signed in to a server") && log.contains("request answered"), "the log is on");
    none("the log", &log);
    none("the database after the end", &dump(&database, &folder.path().join("data")).await);
    database.remove().await;
}
