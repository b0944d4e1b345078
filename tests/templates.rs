//! `{{ VARIABLE | default }}` in a server's token, headers, arguments and environment (CONTRACT row 17): whose values fill
//! them, what becomes of values that cannot, and that nobody gets a session with another's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use portolan::config::StdioPolicy;
use serde_json::{Value, json};

use crate::fake::{self, Fake, Running};
use crate::harness::{Answer, Database, Portolan, client, eventually, fake_mcp, patiently};
use crate::process::{Program, command};
use crate::secrets::{assert_none, dump};

const VARIABLES: &str = "x-portolan-variables";

async fn send(portolan: &Portolan, method: &str, path: &str, body: Option<&Value>, variables: &str) -> Answer {
    let request = portolan.request(method, path).header(VARIABLES, variables);
    Answer::of(method, path, if let Some(body) = body { request.json(body) } else { request }).await
}

/// As a header can hold it.
fn ascii(variables: &Value) -> String {
    let escaped = |c: char| match c {
        ' '..='~' => c.to_string(),
        _ => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    variables.to_string().chars().map(escaped).collect()
}

async fn create(portolan: &Portolan, server_name: &str, config: &Value, variables: &Value) -> Value {
    let body = json!({ "server_name": server_name, "config": config });
    send(portolan, "POST", "/v1/mcp-servers/", Some(&body), &ascii(variables)).await.expect(200)
}

async fn refresh(portolan: &Portolan, id: &str, variables: &Value) -> Answer {
    send(portolan, "PATCH", &format!("/v1/mcp-servers/{id}/refresh"), None, &ascii(variables)).await
}

async fn run_path(portolan: &Portolan, id: &str, tool: &str) -> String {
    format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, tool).await)
}

async fn run(portolan: &Portolan, id: &str, tool: &str, variables: &Value) -> Answer {
    let path = run_path(portolan, id, tool).await;
    send(portolan, "POST", &path, Some(&json!({"args": {}})), &ascii(variables)).await
}

/// What a tool says of itself, as JSON.
async fn told(portolan: &Portolan, id: &str, tool: &str, variables: &Value) -> Value {
    let run = run(portolan, id, tool, variables).await.expect(200);
    serde_json::from_str(run["func_return"].as_str().unwrap()).unwrap()
}

async fn status(portolan: &Portolan, id: &str) -> Value {
    portolan.get(&format!("/v1/mcp-servers/{id}")).await.expect(200)["status"].clone()
}

fn id_of(server: &Value) -> &str {
    server["id"].as_str().unwrap()
}

fn both_http_transports() -> [(&'static str, Running); 2] {
    [
        ("streamable_http", fake::http::serve(Fake::new(fake::Script::default()))),
        ("sse", fake::sse::serve(Fake::new(fake::Script::default()))),
    ]
}

fn handshakes(fake: &Running) -> usize {
    fake.requests().iter().filter(|seen| seen.rpc() == "initialize").count()
}

/// The fake as a command, with arguments before its script.
fn fake_command(portolan: &Portolan, script: &Value, args: &[&str], env: Value) -> Value {
    let script = portolan.script(script).0.display().to_string();
    let args: Vec<&str> = ["stdio"].into_iter().chain(args.iter().copied()).chain([&*script]).collect();
    json!({ "command": fake_mcp(), "args": args, "env": env })
}

#[tokio::test(flavor = "multi_thread")]
async fn each_caller_has_sessions_with_its_own_values_over_http() {
    let portolan = Portolan::start().await;
    for (kind, fake) in both_http_transports() {
        let config = json!({
            "mcp_server_type": kind, "server_url": fake.url, "auth_token": "Bearer {{ TOKEN }}",
            "custom_headers": {"X-Team": "team-{{TEAM|none}}", "X-Plain": "{{ plain }}"},
        });
        let (alice, bob) = (json!({"TOKEN": "alices", "TEAM": "red"}), json!({"TOKEN": "bobs", "UNUSED": "1"}));
        let server = create(&portolan, kind, &config, &alice).await;
        let id = id_of(&server);
        assert_eq!(server["status"]["state"], "ready", "{server}");
        let path = format!("/v1/mcp-servers/{id}?reveal=true");
        let shown = portolan.get(&path).await.expect(200);
        assert_eq!(shown["custom_headers"]["X-Team"], "team-{{TEAM|none}}", "as it was written");
        assert_eq!(portolan.get(&path[..path.len() - 12]).await.expect(200)["auth_token"], "Bearer {{ TOKEN }}");
        for (variables, token, team) in [
            (&alice, "Bearer alices", "team-red"),
            (&bob, "Bearer bobs", "team-none"),
            (&alice, "Bearer alices", "team-red"),
        ] {
            let headers = told(&portolan, id, "headers", variables).await;
            assert_eq!((&headers["authorization"], &headers["x-team"]), (&json!(token), &json!(team)), "{kind}");
            assert_eq!(headers["x-plain"], "{{ plain }}", "this is no template");
        }
        // What is not used makes no difference.
        told(&portolan, id, "headers", &json!({"TOKEN": "bobs", "OTHER": "2"})).await;
        assert_eq!(handshakes(&fake), 2, "{kind}: one session for each");
        // Without a value nothing is sent, and no SDK repeats it.
        let seen = fake.requests().len();
        for variables in [json!({}), json!({"TEAM": "red"})] {
            let answer = run(&portolan, id, "headers", &variables).await;
            assert_eq!(answer.header("x-should-retry"), Some("false"));
            let answer = answer.expect(422);
            assert_eq!(answer["code"], "variable_missing", "{answer}");
            assert!(answer["detail"].as_str().unwrap().starts_with("The variable TOKEN has no value"), "{answer}");
        }
        let answer = refresh(&portolan, id, &json!({})).await.expect(404);
        assert!(answer["detail"]["error"].as_str().unwrap().contains("The variable TOKEN has no value"), "{answer}");
        assert_eq!(fake.requests().len(), seen, "{kind}");
        assert_eq!(status(&portolan, id).await["state"], "ready", "it says nothing of the server");
        refresh(&portolan, id, &bob).await.expect(200);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_caller_has_a_command_with_its_own_values() {
    let portolan = Portolan::start().await;
    let env = json!({"KEY": "{{ KEY | fallback }}", "PLAIN": "plain", "{{ KEY }}": "name"});
    let config = fake_command(&portolan, &json!({}), &["--name={{ NAME }}", "{{ EMPTY | }}x"], env);
    let alice = json!({"NAME": "a b\t-c \"d' $HOME", "KEY": "alices key"});
    let server = create(&portolan, "command", &config, &alice).await;
    let id = id_of(&server);
    assert_eq!(server["status"]["state"], "ready", "{server}");
    let argv = told(&portolan, id, "argv", &alice).await;
    let argv: Vec<&str> = argv.as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    assert_eq!(&argv[1..4], ["stdio", "--name=a b\t-c \"d' $HOME", " x"], "a value makes no argument");
    assert_eq!(argv.len(), 5);
    let env = told(&portolan, id, "env", &alice).await;
    assert_eq!((&env["KEY"], &env["{{ KEY }}"]), (&json!("alices key"), &json!("name")));
    let bob = json!({"NAME": "bob"});
    let pid = async |variables: &Value| told(&portolan, id, "pid", variables).await;
    let (alices, bobs) = (pid(&alice).await, pid(&bob).await);
    assert_ne!(alices, bobs);
    assert_eq!((pid(&alice).await, pid(&bob).await), (alices, bobs), "they are kept");
    assert_eq!(told(&portolan, id, "env", &bob).await["KEY"], "fallback");
    assert_eq!(portolan.children().len(), 2);
    let answer = run(&portolan, id, "pid", &json!({})).await.expect(422);
    assert_eq!(answer["code"], "variable_missing");
    // Both end with the server.
    portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204);
    eventually("the children end", || portolan.children().is_empty()).await;
    portolan.stop().await;
}

/// The operator's file.
fn keep(folder: &Path, variables: &Value) -> PathBuf {
    let file = folder.join("variables.json");
    std::fs::write(&file, variables.to_string()).unwrap();
    file
}

async fn start_with_file(file: PathBuf) -> Portolan {
    Portolan::start_with(|settings| settings.variables.variables_file = Some(file)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_requests_value_comes_before_the_operators_and_that_before_the_default() {
    let folder = tempfile::tempdir().unwrap();
    let filed = json!({"A": "filed", "B": "filed", "HOME": "filed"});
    let portolan = start_with_file(keep(folder.path(), &filed)).await;
    for (kind, fake) in both_http_transports() {
        let value = |name: &str| format!("{{{{ {name} | default }}}}");
        let headers = json!({"X-A": value("A"), "X-B": value("B"), "X-C": value("C"), "X-Path": value("PATH")});
        let config = json!({"mcp_server_type": kind, "server_url": fake.url, "custom_headers": headers});
        let server = create(&portolan, kind, &config, &json!({})).await;
        let id = id_of(&server);
        assert_eq!(server["status"]["state"], "ready", "{server}");
        let told_by = async |variables: Value| {
            let headers = told(&portolan, id, "headers", &variables).await;
            ["x-a", "x-b", "x-c", "x-path"].map(|name| headers[name].as_str().unwrap().to_owned())
        };
        assert_eq!(told_by(json!({})).await, ["filed", "filed", "default", "default"], "never the environment");
        assert_eq!(told_by(json!({"B": "asked", "C": "asked"})).await, ["filed", "asked", "asked", "default"]);
        // A value that holds a template is not read again.
        assert_eq!(told_by(json!({"A": "{{ B }}"})).await, ["{{ B }}", "filed", "default", "default"]);
        assert_eq!(told_by(json!({"A": ""})).await[0], "");
        assert_eq!(handshakes(&fake), 4);
        // Other values of the operator mean another session, for whoever uses them.
        keep(folder.path(), &json!({"A": "new"}));
        assert_eq!(portolan.app.mcp.reload_variables().unwrap(), Some(1));
        assert_eq!(told_by(json!({})).await, ["new", "default", "default", "default"]);
        assert_eq!(told_by(json!({"B": "asked", "C": "asked"})).await, ["new", "asked", "asked", "default"]);
        assert_eq!(handshakes(&fake), 6);
        std::fs::write(folder.path().join("variables.json"), "{").unwrap();
        assert!(portolan.app.mcp.reload_variables().is_err());
        assert_eq!(told_by(json!({})).await[0], "new", "a file that cannot be read changes nothing");
        keep(folder.path(), &filed);
        portolan.app.mcp.reload_variables().unwrap();
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_a_value_says_so_and_can_be_used_once_there_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let portolan = start_with_file(keep(folder.path(), &json!({}))).await;
    let fake = fake::http::serve(Fake::new(fake::Script::default()));
    let config = json!({"server_url": fake.url, "auth_token": "{{ TOKEN }}"});
    let server = portolan.create("empty", config).await;
    let id = id_of(&server);
    let error = server["status"]["error"].as_str().unwrap();
    assert!(server["status"]["state"] == "unreachable" && error.contains("TOKEN"), "{server}");
    assert!(fake.requests().is_empty(), "the literal is never sent");
    // A caller without a value learns why; one with a value makes it ready.
    refresh(&portolan, id, &json!({"TOKEN": "a\nb"})).await.expect(404);
    assert_eq!(status(&portolan, id).await["error"], error, "another caller's value says nothing of the server");
    assert!(fake.requests().is_empty());
    refresh(&portolan, id, &json!({"TOKEN": "mine"})).await.expect(200);
    let ready = status(&portolan, id).await;
    assert_eq!((&ready["state"], &ready["error"]), (&json!("ready"), &Value::Null));
    run(&portolan, id, "headers", &json!({})).await.expect(422);
    keep(folder.path(), &json!({"TOKEN": "the operators"}));
    portolan.app.mcp.reload_variables().unwrap();
    assert_eq!(told(&portolan, id, "headers", &json!({})).await["authorization"], "Bearer the operators");
    assert_eq!(told(&portolan, id, "headers", &json!({"TOKEN": "mine"})).await["authorization"], "Bearer mine");
    assert_eq!(status(&portolan, id).await["state"], "ready");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_is_not_as_it_must_be_is_refused_and_not_repeated() {
    let portolan = Portolan::start().await;
    let fake = fake::http::serve(Fake::new(fake::Script::default()));
    let config = json!({"server_url": fake.url, "auth_token": "{{ TOKEN | none }}"});
    let server = create(&portolan, "there", &config, &json!({"TOKEN": "fine"})).await;
    let id = id_of(&server);
    let seen = fake.requests().len();
    let path = run_path(&portolan, id, "headers").await;
    let many: BTreeMap<String, &str> = (0..101).map(|number| (format!("V{number}"), "hunter2")).collect();
    for bad in [
        "",
        "hunter2",
        "TOKEN=hunter2",
        r#"["hunter2"]"#,
        r#"{"TOKEN": 7777}"#,
        r#"{"TOKEN": null, "A": "hunter2"}"#,
        r#"{"TOKEN": "hunter2""#,
        r#"{"hunter2": "1"}"#,
        r#"{"TOKEN": "hunter2", "TOKEN": "hunter2"}"#,
        r#"{"TOKEN": "hunter2\u0000"}"#,
        &json!(many).to_string(),
        &json!({"TOKEN": "hunter2".repeat(2400)}).to_string(),
    ] {
        let new = json!({"server_name": "never", "config": config});
        for (method, path, body) in [
            ("POST", "/v1/mcp-servers/", Some(&new)),
            ("PATCH", &*format!("/v1/mcp-servers/{id}/refresh"), None),
            ("POST", &*path, Some(&json!({"args": {}}))),
        ] {
            let answer = send(&portolan, method, path, body, bad).await;
            assert!(!answer.text.contains("hunter2") && !answer.text.contains("7777"), "{}", answer.text);
            let answer = answer.expect(422);
            assert_eq!(answer["errors"][0]["loc"], json!(["header", VARIABLES]), "{answer}");
            assert!(answer["detail"].as_str().unwrap().contains(VARIABLES), "{answer}");
        }
    }
    let twice = portolan.request("POST", &path).header(VARIABLES, "{}").header(VARIABLES, "{}");
    Answer::of("POST", &path, twice).await.expect(422);
    assert_eq!(fake.requests().len(), seen, "nothing was sent");
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().len(), 1);
    assert_eq!(told(&portolan, id, "headers", &json!({"TOKEN": "good"})).await["authorization"], "Bearer good");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_makes_no_header_or_argument_is_sent_nowhere() {
    let portolan = Portolan::start().await;
    for (kind, fake) in both_http_transports() {
        let config = json!({
            "mcp_server_type": kind, "server_url": fake.url, "auth_token": "Bearer {{ TOKEN | none }}",
            "custom_headers": {"X-A": "{{ A | none }}", "X-B": "{{ A | none }}{{ A | none }}{{ A | none }}"},
        });
        let server = create(&portolan, kind, &config, &json!({})).await;
        let id = id_of(&server);
        let seen = fake.requests().len();
        let mut bad = vec![("A", "a".repeat(14 * 1024))];
        for value in [
            "hunter2\r\nX-Injected: 1",
            "hunter2\nX-Injected: 1",
            "hunter2\rx",
            "hunter2\r\n\r\nGET / HTTP/1.1",
            "hunter2\u{7f}",
            "hunter2\u{1}",
            "hunter2é",
            "hunter2 ",
            "hunter2\u{2028}",
        ] {
            bad.extend(["A", "TOKEN"].map(|name| (name, value.to_owned())));
        }
        for (name, value) in bad {
            let variables = json!({ name: value });
            let answer = run(&portolan, id, "headers", &variables).await;
            assert_eq!(answer.header("x-should-retry"), Some("false"));
            assert!(!answer.text.contains("hunter2") && !answer.text.contains("aaaa"), "{}", answer.text);
            let answer = answer.expect(422);
            assert_eq!(answer["code"], "variable_invalid", "{answer}");
            let place = if name == "TOKEN" { "auth_token" } else { "the header X-" };
            assert!(answer["detail"].as_str().unwrap().contains(place), "{answer}");
            refresh(&portolan, id, &variables).await.expect(404);
        }
        assert_eq!(fake.requests().len(), seen, "{kind}: nothing was sent");
        assert_eq!(status(&portolan, id).await["state"], "ready");
        let headers = told(&portolan, id, "headers", &json!({"A": "a\tb ~!", "TOKEN": "fine"})).await;
        assert_eq!((&headers["x-a"], &headers["authorization"]), (&json!("a\tb ~!"), &json!("Bearer fine")));
    }
    let long = "{{ A | x }}".repeat(4);
    let config = fake_command(&portolan, &json!({}), &[&long], json!({}));
    let server = create(&portolan, "command", &config, &json!({})).await;
    let answer = run(&portolan, id_of(&server), "pid", &json!({"A": "a".repeat(10_000)})).await.expect(422);
    assert_eq!(answer["code"], "variable_invalid", "{answer}");
    assert_eq!(portolan.children().len(), 1, "the one without values");
    assert_eq!(told(&portolan, id_of(&server), "argv", &json!({"A": "é\n"})).await[2], "é\né\né\né\n");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_with_other_values_are_other_runs() {
    let portolan = Portolan::start().await;
    let fake = fake::http::serve(Fake::new(fake::Script::default()));
    let config = json!({"server_url": fake.url, "auth_token": "{{ TOKEN }}"});
    let server = create(&portolan, "repeated", &config, &json!({"TOKEN": "alice"})).await;
    let path = run_path(&portolan, id_of(&server), "headers").await;
    let ask = async |name: &'static str, value: &'static str, token: &str| {
        let request = portolan.request("POST", &path).header(name, value);
        let request = request.header(VARIABLES, json!({ "TOKEN": token }).to_string()).json(&json!({"args": {}}));
        let answer = Answer::of("POST", &path, request).await;
        let repeated = answer.header("x-portolan-repeated").is_some();
        (answer.status, repeated, answer.text)
    };
    let tries = "x-stainless-retry-count";
    let first = ask(tries, "0", "alice").await;
    assert!(first.0 == 200 && first.2.contains("Bearer alice"), "{first:?}");
    let other = ask(tries, "1", "bob").await;
    assert!(!other.1 && other.2.contains("Bearer bob") && !other.2.contains("alice"), "{other:?}");
    let again = ask(tries, "1", "alice").await;
    assert!(again.1 && again.2 == first.2, "{again:?}");
    let key = "idempotency-key";
    assert_eq!(ask(key, "one", "alice").await.0, 200);
    let taken = ask(key, "one", "bob").await;
    assert!(taken.0 == 422 && !taken.2.contains("alice"), "{taken:?}");
    assert!(ask(key, "one", "alice").await.1);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callers_failure_is_not_the_servers() {
    let portolan = Portolan::start().await;
    let required = Some(("authorization".to_owned(), "Bearer good".to_owned()));
    let script = fake::Script { require_header: required, ..fake::Script::default() };
    let fake = fake::http::serve(Fake::new(script));
    let config = json!({"server_url": fake.url, "auth_token": "{{ TOKEN | good }}"});
    let unseen = create(&portolan, "unseen", &config, &json!({"TOKEN": "bad"})).await;
    assert_eq!(unseen["status"]["state"], "auth_required", "whoever registers it learns why: {unseen}");
    let server = create(&portolan, "seen", &config, &json!({})).await;
    let id = id_of(&server);
    let before = status(&portolan, id).await;
    assert_eq!(before["state"], "ready");
    let answer = run(&portolan, id, "headers", &json!({"TOKEN": "bad"})).await;
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert_eq!(answer.expect(502)["code"], "mcp_connection_error");
    refresh(&portolan, id, &json!({"TOKEN": "worse"})).await.expect(404);
    assert_eq!(status(&portolan, id).await, before);
    run(&portolan, id, "headers", &json!({})).await.expect(200);
    run(&portolan, id, "headers", &json!({"TOKEN": "good"})).await.expect(200);
    // A session of its own that dies under a call is opened again, and the status does not hear of it.
    let died = run(&portolan, id, "die", &json!({"TOKEN": "good"})).await.expect(200);
    assert_eq!(died["status"], "error", "{died}");
    assert_eq!(status(&portolan, id).await, before);
    patiently(async || run(&portolan, id, "headers", &json!({"TOKEN": "good"})).await).await.expect(200);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_and_a_delete_end_the_sessions_of_all_callers() {
    let portolan = Portolan::start().await;
    for (kind, fake) in both_http_transports() {
        let config = json!({
            "mcp_server_type": kind, "server_url": fake.url, "auth_token": "{{ TOKEN | none }}", "custom_headers": {"X-A": "1"},
        });
        let server = create(&portolan, kind, &config, &json!({})).await;
        let id = id_of(&server);
        let callers = [json!({}), json!({"TOKEN": "alice"}), json!({"TOKEN": "bob"})];
        for caller in &callers {
            told(&portolan, id, "headers", caller).await;
        }
        eventually("a session for each", || fake.sessions() == 3).await;
        let change = json!({"config": {"custom_headers": {"X-A": "{{ A | 2 }}"}}});
        portolan.patch(&format!("/v1/mcp-servers/{id}"), &change).await.expect(200);
        eventually("the old sessions end", || fake.sessions() == 0).await;
        for (caller, token) in callers.iter().zip(["none", "alice", "bob"]) {
            let headers = told(&portolan, id, "headers", caller).await;
            assert_eq!(headers["authorization"], format!("Bearer {token}"), "{kind}");
            assert_eq!(headers["x-a"], "2", "{kind}");
        }
        portolan.delete(&format!("/v1/mcp-servers/{id}")).await.expect(204);
        eventually("all sessions end", || fake.sessions() == 0).await;
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_has_so_many_sessions_with_values_and_the_idle_make_room() {
    const MOST: usize = 16;
    let portolan = Portolan::start_with(|settings| settings.upstream.max_calls_per_server = 2 * MOST).await;
    let fake = fake::http::serve(Fake::new(fake::Script::default()));
    let config = json!({"server_url": fake.url, "auth_token": "{{ TOKEN | none }}"});
    let server = create(&portolan, "shared", &config, &json!({})).await;
    let id = id_of(&server);
    for caller in 0..MOST + 4 {
        let headers = told(&portolan, id, "headers", &json!({ "TOKEN": caller.to_string() })).await;
        assert_eq!(headers["authorization"], format!("Bearer {caller}"));
    }
    eventually("those that were used longest ago leave", || fake.sessions() == MOST + 1).await;
    // When all are in use, one more has to wait.
    let path = run_path(&portolan, id, "never").await;
    let busy: Vec<_> = (0..MOST)
        .map(|caller| {
            let variables = json!({ "TOKEN": format!("busy-{caller}") }).to_string();
            tokio::spawn(portolan.request("POST", &path).header(VARIABLES, variables).json(&json!({"args": {}})).send())
        })
        .collect();
    eventually("all of them run", || fake.fake().running() == MOST).await;
    let answer = run(&portolan, id, "headers", &json!({"TOKEN": "late"})).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{}", answer.text);
    assert_eq!(told(&portolan, id, "headers", &json!({"TOKEN": "busy-3"})).await["authorization"], "Bearer busy-3");
    assert_eq!(told(&portolan, id, "headers", &json!({})).await["authorization"], "Bearer none");
    busy.iter().for_each(tokio::task::JoinHandle::abort);
    let headers = patiently(async || run(&portolan, id, "headers", &json!({"TOKEN": "late"})).await).await.expect(200);
    assert!(headers["func_return"].as_str().unwrap().contains("Bearer late"));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_sessions_with_values_are_closed() {
    let portolan = Portolan::start_with(|settings| settings.upstream.idle_timeout = Duration::from_millis(300)).await;
    let fake = fake::http::serve(Fake::new(fake::Script::default()));
    let config = json!({"server_url": fake.url, "auth_token": "{{ TOKEN | none }}"});
    let server = create(&portolan, "idle", &config, &json!({"TOKEN": "alice"})).await;
    told(&portolan, id_of(&server), "headers", &json!({"TOKEN": "bob"})).await;
    assert_eq!(handshakes(&fake), 2);
    eventually("they are closed", || fake.sessions() == 0).await;
    told(&portolan, id_of(&server), "headers", &json!({"TOKEN": "bob"})).await;
    assert_eq!(handshakes(&fake), 3);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rule_for_commands_looks_at_what_is_started() {
    // Beside the operator's file a command can make no other.
    let (folder, operators) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = operators.path().join("templates.json");
    let allowed =
        json!({"fake": {"command": fake_mcp(), "args": ["stdio", ["one", "two"], folder.path().join("x.json")]}});
    std::fs::write(&file, allowed.to_string()).unwrap();
    std::fs::write(folder.path().join("x.json"), "{}").unwrap();
    let portolan = Portolan::start_with(|settings| {
        settings.children.stdio = StdioPolicy::Templates;
        settings.children.stdio_templates = Some(file);
    })
    .await;
    let script = folder.path().join("x.json");
    let config = |args: &[&str]| {
        let args = [args, &[script.to_str().unwrap()]].concat();
        json!({ "command": fake_mcp(), "args": args })
    };
    for args in [&["stdio", "{{ MODE }}", "more"] as &[&str], &["other", "{{ MODE }}"], &["stdio {{ MODE }}"]] {
        let body = json!({"server_name": "never", "config": config(args)});
        let refused = send(&portolan, "POST", "/v1/mcp-servers/", Some(&body), r#"{"MODE": "one"}"#).await.expect(403);
        assert_eq!(refused["code"], "stdio_not_in_templates");
    }
    let server = create(&portolan, "mode", &config(&["stdio", "{{ MODE }}"]), &json!({"MODE": "one"})).await;
    let id = id_of(&server);
    assert_eq!(server["status"]["state"], "ready", "{server}");
    for mode in ["three", "one two", "", "one\0", "{{ MODE }}"] {
        let answer = run(&portolan, id, "argv", &json!({ "MODE": mode })).await;
        assert!(answer.status == 502 || mode.contains('\0') && answer.status == 422, "{mode:?}: {}", answer.text);
    }
    assert_eq!(told(&portolan, id, "argv", &json!({"MODE": "two"})).await[2], "two");
    assert_eq!(status(&portolan, id).await["state"], "ready");
    let server = create(&portolan, "wrong", &config(&["stdio", "{{ MODE | three }}"]), &json!({})).await;
    assert!(server["status"]["error"].as_str().unwrap().contains("--stdio-templates"), "{server}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_argument_with_a_template_is_not_split() {
    let portolan = Portolan::start_with(|settings| settings.upstream.legacy_arg_split = true).await;
    let config = fake_command(&portolan, &json!({}), &["--a b", "--name {{ NAME | c d }}", "{{ NAME | }}"], json!({}));
    let server = create(&portolan, "split", &config, &json!({})).await;
    let id = id_of(&server);
    assert_eq!(server["status"]["state"], "ready", "{server}");
    let argv =
        async |variables: Value| told(&portolan, id, "argv", &variables).await.as_array().unwrap()[2..6].to_vec();
    assert_eq!(argv(json!({})).await, ["--a", "b", "--name c d", " "]);
    assert_eq!(argv(json!({"NAME": "x --evil y"})).await, ["--a", "b", "--name x --evil y", "x --evil y"]);
    assert_eq!(argv(json!({"NAME": ""})).await, ["--a", "b", "--name ", ""], "one stays one");
    portolan.stop().await;
}

/// What every value here contains.
const BIRD: &str = "-bird";

#[tokio::test(flavor = "multi_thread")]
async fn values_are_found_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let (log, file) = (folder.path().join("log"), folder.path().join("variables.json"));
    std::fs::write(&file, json!({"FILED": format!("canary-filed{BIRD}")}).to_string()).unwrap();
    let mut start = command(folder.path(), database.url().as_deref());
    let key = format!("{:x<32}", "a key");
    start.env("PORTOLAN_KEY", key.bytes().map(|byte| format!("{byte:02x}")).collect::<String>());
    start.env("PORTOLAN_LOG", "trace").env("PORTOLAN_HANDSHAKE_TIMEOUT", "5s").env("PORTOLAN_START_TIMEOUT", "5s");
    start.stderr(std::fs::File::create(&log).unwrap()).stdout(Stdio::piped());
    start.arg("--data-dir").arg(folder.path().join("data")).arg("--variables-file").arg(&file);
    let mut program = Program::start(start);
    let client = client();
    let mut answers = Vec::new();
    let ask = async |method: &str, path: String, body: Option<Value>| {
        let variables = json!({"GIVEN": format!("canary-given{BIRD}"), "OTHER": format!("canary-other{BIRD}\r\n")});
        let request = client.request(method.parse().unwrap(), format!("{}{path}", program.url));
        let request = request.header(VARIABLES, variables.to_string());
        let answer = if let Some(body) = &body { request.json(body) } else { request }.send().await.unwrap();
        let text = format!("{:?} {}", answer.headers(), answer.status());
        (text, answer.json::<Value>().await.unwrap_or_default())
    };
    let upstream = fake::http::serve(Fake::new(fake::Script { status: Some(500), ..fake::Script::default() }));
    let works = fake::http::serve(Fake::new(fake::Script::default()));
    let says = "echo \"$A and $B, $*\" >&2; exit 3";
    let stdio = json!({
        "command": "/bin/sh", "args": ["-c", says, "sh", "{{ GIVEN }}", "{{ FILED }}"],
        "env": {"A": "{{ GIVEN }}", "B": "x{{ FILED }}"},
    });
    let remote = |url: &str, kind: &str, name: &str| {
        let value = format!("{{{{ {name} }}}}");
        json!({"mcp_server_type": kind, "server_url": url, "auth_token": value, "custom_headers": {"X-A": "{{ FILED }}"}})
    };
    let configs = [
        ("dies", stdio),
        ("fails", remote(&upstream.url, "streamable_http", "GIVEN")),
        ("fails over sse", remote(&upstream.url, "sse", "GIVEN")),
        ("invalid", remote(&works.url, "streamable_http", "OTHER")),
        ("missing", remote(&works.url, "streamable_http", "MISSING")),
        ("works", remote(&works.url, "streamable_http", "GIVEN")),
    ];
    for (name, config) in configs {
        let body = json!({"server_name": name, "config": config});
        let created = ask("POST", "/v1/mcp-servers/".to_owned(), Some(body)).await;
        let path = format!("/v1/mcp-servers/{}", created.1["id"].as_str().unwrap());
        if name == "dies" {
            let error = created.1["status"]["error"].as_str().unwrap();
            assert!(error.contains("\"******** and ********, ******** ********\""), "{error}");
        }
        answers.push(created);
        answers.push(ask("PATCH", format!("{path}/refresh"), None).await);
        answers.push(ask("GET", format!("{path}?reveal=true"), None).await);
        let tools = ask("GET", format!("{path}/tools"), None).await;
        if let Some(tool) = tools.1.as_array().and_then(|tools| tools.iter().find(|tool| tool["name"] == "headers")) {
            let run = format!("{path}/tools/{}/run", tool["id"].as_str().unwrap());
            let said = ask("POST", run, Some(json!({"args": {}}))).await;
            let heard = said.1["func_return"].as_str().unwrap();
            assert!(heard.contains("canary-given-bird") && heard.contains("canary-filed-bird"), "the control: {heard}");
        }
        answers.push(tools);
    }
    for (head, body) in &answers {
        assert_none("an answer", &format!("{head} {body}"));
    }
    assert_none("the database", &dump(&database, &folder.path().join("data")).await);
    program.signal("-HUP");
    eventually("a reload", || std::fs::read_to_string(&log).unwrap().contains("variables read again")).await;
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    assert_none("the log", &std::fs::read_to_string(log).unwrap());
    assert_none("the database after the end", &dump(&database, &folder.path().join("data")).await);
    database.remove().await;
}

#[test]
fn a_file_that_cannot_be_used_is_no_start() {
    let folder = tempfile::tempdir().unwrap();
    for (text, part) in [
        (Some("{"), "must be a JSON object of strings"),
        (Some(r#"{"hunter2": "x"}"#), "capital letters"),
        (None, "Cannot read the file"),
    ] {
        let file = folder.path().join("variables.json");
        let _ = std::fs::remove_file(&file);
        if let Some(text) = text {
            std::fs::write(&file, text).unwrap();
        }
        let mut start = command(folder.path(), None);
        let output = start.arg("--variables-file").arg(&file).stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(part) && !said.contains("hunter2"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_opens_a_session_takes_values() {
    let portolan = Portolan::start().await;
    let fake = fake::http::serve(Fake::new(fake::Script::default()));
    let config = json!({"type": "streamable_http", "server_url": fake.url, "custom_headers": {"x-team": "{{ TEAM }}"}});
    let flat = |name: &str| {
        let mut flat = config.clone();
        flat["server_name"] = json!(name);
        flat
    };
    let created = create(&portolan, "one", &config, &json!({"TEAM": "first"})).await;
    let connect = format!("/v1/mcp-servers/connect/{}", id_of(&created));
    let (tried, by_name) = (flat("tried"), "/v1/tools/mcp/servers");
    let calls = [
        ("POST", format!("{by_name}/test"), Some(tried.clone())),
        ("GET", format!("{by_name}/one/tools"), None),
        ("POST", format!("{by_name}/one/echo"), None),
        ("POST", format!("{by_name}/one/resync"), None),
        ("POST", format!("{by_name}/one/tools/echo/execute"), Some(json!({"args": {"message": "hi"}}))),
        ("PUT", by_name.to_owned(), Some(flat("two"))),
    ];
    for (number, (method, path, body)) in calls.iter().enumerate() {
        let team = format!("team-{number}");
        send(&portolan, method, path, body.as_ref(), &ascii(&json!({ "TEAM": team }))).await.expect(200);
        // A tool that is known needs no session.
        if !path.ends_with("/echo") {
            let came = fake.requests().iter().any(|seen| seen.header("x-team") == Some(team.as_str()));
            assert!(came, "{method} {path}");
        }
        let refused = send(&portolan, method, path, body.as_ref(), "[]").await.expect(422);
        assert_eq!(refused["errors"][0]["loc"], json!(["header", VARIABLES]), "{method} {path}");
    }
    let missing = send(&portolan, "GET", &calls[1].1, None, "{}").await.expect(422);
    assert_eq!(missing["code"], "variable_missing");
    send(&portolan, "GET", &connect, None, "[]").await.expect(422);
    for (variables, told) in [(json!({"TEAM": "connected"}), r#""event":"success""#), (json!({}), "TEAM")] {
        let response = portolan.request("GET", &connect).header(VARIABLES, ascii(&variables)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let events = response.text().await.unwrap();
        assert!(events.contains(told), "{events}");
    }
    assert!(fake.requests().iter().any(|seen| seen.header("x-team") == Some("connected")));
    portolan.stop().await;
}
