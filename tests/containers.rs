//! What containers need of the program: a health check without a shell, settings that are passed whether or not they have a
//! value, a database URL in a file, a stop during a start. `tests/containers/run.py` has the container files themselves.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use clap::CommandFactory;
use portolan::config::Cli;
use serde_json::{Value, json};

use crate::harness::{Database, KEY};
use crate::process::{Program, command, refusal};

/// A health check with these arguments, which knows neither database nor key.
fn healthcheck(folder: &Path, args: &[&str]) -> Command {
    let mut command = command(folder, None);
    command.env_remove("PORTOLAN_LISTEN").arg("healthcheck").args(args);
    command
}

fn said(mut command: Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

/// A program that is no Portolan: it answers one request so, or not at all.
fn other(answer: Option<&'static str>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let _ = client.read(&mut request);
        if let Some(answer) = answer {
            client.write_all(answer.as_bytes()).unwrap();
        }
        // Until the client has gone.
        let _ = client.read(&mut request);
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_health_check_says_how_the_portolan_of_this_machine_is() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut start = command(folder.path(), database.url().as_deref());
    start.env("PORTOLAN_TOKEN", "a-token-that-no-check-knows").args(["--allowed-hosts", "portolan.example.com"]);
    start.env("PORTOLAN_LISTEN", "0.0.0.0:0");
    let mut program = Program::start(start);
    let port = program.url.rsplit(':').next().unwrap().to_owned();
    let loopback = format!("http://127.0.0.1:{port}");
    for (args, url) in [
        (vec!["--url", &loopback], format!("{loopback}/v1/health")),
        (vec!["--url", &loopback, "--ready"], format!("{loopback}/v1/ready")),
        (vec!["--listen", &format!("127.0.0.1:{port}")], format!("{loopback}/v1/health")),
        (vec!["--listen", &format!("localhost:{port}"), "--ready"], format!("http://localhost:{port}/v1/ready")),
        (vec!["--listen", &format!("0.0.0.0:{port}")], format!("http://0.0.0.0:{port}/v1/health")),
        (vec!["--listen", &format!("[::]:{port}")], format!("http://[::]:{port}/v1/health")),
    ] {
        let (code, out) = said(healthcheck(folder.path(), &args));
        assert_eq!((code, &*out), (Some(0), &*format!("Portolan is well at {url}.\n")), "{args:?}");
        let (code, out) = said(healthcheck(folder.path(), &[&args[..], &["--json"]].concat()));
        assert_eq!(code, Some(0), "{args:?}");
        assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), json!({"url": url, "status": 200}));
    }
    // It finds the address where the server does, and needs nothing of what the server needs.
    let mut check = healthcheck(folder.path(), &[]);
    check.env("PORTOLAN_LISTEN", format!("0.0.0.0:{port}")).env("DATABASE_URL", "nonsense").env("PORTOLAN_TOKEN", "");
    check.env("PORTOLAN_KEY", "nonsense").env("PORTOLAN_KEY_FILE", "/nonexistent");
    check.env("DATABASE_URL_FILE", "/nonexistent").env("PORTOLAN_DATA_DIR", "/nonexistent/folder");
    assert_eq!(said(check).0, Some(0));
    let is_shared = database.url().is_some();
    database.remove().await;
    if is_shared {
        // The database is gone, and the process is not to be started anew for that.
        let (code, said_of_it) = refusal(healthcheck(folder.path(), &["--url", &loopback, "--ready"]));
        assert_eq!(code, Some(1), "{said_of_it}");
        assert_eq!(said_of_it, "portolan: Portolan is not ready: its database does not answer.\n");
        assert_eq!(said(healthcheck(folder.path(), &["--url", &loopback])).0, Some(0));
    }
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    let (code, said_of_it) = refusal(healthcheck(folder.path(), &["--url", &loopback]));
    assert!(
        code == Some(1) && said_of_it.contains(&format!("does not answer at {loopback}/v1/health: ")),
        "{said_of_it}"
    );
}

#[test]
fn a_health_check_that_fails_is_one_clear_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let url = |answer| format!("http://{}", other(answer));
    let answer = |status: &str, body: &str| {
        let length = body.len();
        &*format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}").leak()
    };
    for (url, args, part) in [
        (url(None), &[][..], "did not answer within 3 s"),
        (url(Some("SSH-2.0-OpenSSH\r\n")), &[], "does not answer at"),
        (url(Some(answer("200 OK", "<html>"))), &[], "is no Portolan"),
        (url(Some(answer("200 OK", r#"{"status":"starting"}"#))), &[], "is no Portolan"),
        (url(Some(answer("403 Forbidden", r#"{"code":"host_not_allowed"}"#))), &[], "answered 403 Forbidden"),
        (url(Some(answer("503 Service Unavailable", r#"{"code":"unavailable"}"#))), &["--ready"], "is not ready"),
        // The control: what is taken for a Portolan that is well.
        (url(Some(answer("200 OK", r#"{"status":"ok"}"#))), &[], ""),
    ] {
        let args = [&["--url", &*url, "--json"][..], args].concat();
        let (code, out) = said(healthcheck(folder.path(), &args));
        let document: Value = serde_json::from_str(&out).unwrap();
        let sentence = document["error"]["detail"].as_str().unwrap_or_default();
        assert!(document["url"].as_str().unwrap().starts_with(&*url), "{document}");
        assert_eq!(code, Some(if part.is_empty() { 0 } else { 1 }), "{document}");
        assert!(sentence.contains(part) && (part.is_empty() || sentence.ends_with('.')), "{document}");
    }
    let (code, text) = refusal(healthcheck(folder.path(), &["--listen", "127.0.0.1:0"]));
    assert!(code == Some(1) && text.contains("name the one it took with --url"), "{text}");
    for url in ["https://127.0.0.1", "127.0.0.1:8283", "http://u:p@127.0.0.1", "http://127.0.0.1/v1"] {
        let (code, text) = refusal(healthcheck(folder.path(), &["--url", url]));
        assert!(code == Some(2) && text.contains("write http, host and port alone"), "{url}: {text}");
    }
}

/// What must not be taken for unset when it is set and empty.
const NEVER_EMPTY: [&str; 18] = [
    "PORTOLAN_TOKEN",
    "PORTOLAN_TOKEN_FILE",
    "PORTOLAN_TOKENS_FILE",
    "LETTA_SERVER_PASSWORD",
    "PORTOLAN_KEY",
    "PORTOLAN_KEY_FILE",
    "DATABASE_URL",
    "DATABASE_URL_FILE",
    "PORTOLAN_DATA_DIR",
    "PORTOLAN_STDIO",
    "PORTOLAN_STDIO_TEMPLATES",
    "PORTOLAN_EGRESS",
    "PORTOLAN_EGRESS_DENY",
    "PORTOLAN_CHILD_USER",
    "PORTOLAN_CHILD_WRAPPER",
    "PORTOLAN_CHILD_LANDLOCK",
    "PORTOLAN_CHILD_MAX_PROCESSES",
    "PORTOLAN_TOOL_CHANGES",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_variable_that_is_set_and_empty_is_one_that_is_not_set() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut all = Cli::command();
    all.build();
    let all: Vec<_> = all.get_arguments().filter_map(|setting| setting.get_env()?.to_str()).collect();
    assert!(NEVER_EMPTY.iter().all(|variable| all.contains(variable)), "{all:?}");
    let mut start = command(folder.path(), database.url().as_deref());
    let others: Vec<_> =
        all.iter().filter(|variable| **variable != "PORTOLAN_LISTEN" && !NEVER_EMPTY.contains(variable)).collect();
    assert!(others.len() > 40, "{others:?}");
    start.envs(others.iter().map(|variable| (variable, "")));
    let mut program = Program::start(start);
    // It is what it would be without them.
    assert_eq!(said(healthcheck(folder.path(), &["--url", &program.url, "--ready"])).0, Some(0));
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    if database.url().is_none() {
        assert!(folder.path().join("portolan-data/portolan.db").exists());
    }
    for variable in NEVER_EMPTY {
        let mut start = command(folder.path(), None);
        start.env(variable, "").env("PORTOLAN_LOG", "error");
        let (code, text) = refusal(start);
        assert!(matches!(code, Some(1 | 2)) && !text.is_empty(), "{variable}: {text}");
    }
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_url_may_be_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let file = folder.path().join("database-url");
    let given = database.url().unwrap_or_else(|| format!("sqlite:{}", folder.path().join("named.db").display()));
    let with_file = || {
        let mut command = command(folder.path(), None);
        command.env("DATABASE_URL_FILE", &file).env("PORTOLAN_KEY", KEY).env("PORTOLAN_LOG", "error");
        command
    };
    std::fs::write(&file, format!("{given}\n")).unwrap();
    let mut program = Program::start(with_file());
    assert_eq!(said(healthcheck(folder.path(), &["--url", &program.url, "--ready"])).0, Some(0));
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    assert_eq!(folder.path().join("named.db").exists(), database.url().is_none());
    // Commands find it, too.
    let mut rotate = with_file();
    rotate.args(["rotate-keys", "--dry-run", "--json"]);
    assert_eq!(said(rotate).0, Some(0));
    let mut both = with_file();
    both.env("DATABASE_URL", &given);
    for (text, start, part) in [
        (&*given, both, "not both"),
        (" \n", with_file(), "is empty"),
        ("mysql://u:hunter2@127.0.0.1/x", with_file(), "must start with postgres: or sqlite:"),
        ("", with_file(), "cannot be read"),
    ] {
        std::fs::write(&file, text).unwrap();
        if text.is_empty() {
            std::fs::remove_file(&file).unwrap();
        }
        let (code, said) = refusal(start);
        assert!(code == Some(1) && said.contains(part) && !said.contains("hunter2"), "{part}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "one sentence: {said}");
    }
    database.remove().await;
}

#[test]
fn a_stop_during_the_start_ends_it() {
    let folder = tempfile::tempdir().unwrap();
    for signal in ["-TERM", "-INT"] {
        // A database that takes the connection and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("postgres://postgres@{}/x", silent.local_addr().unwrap());
        let child = command(folder.path(), Some(&url)).spawn().unwrap();
        let (_connection, _) = silent.accept().unwrap();
        let pid = child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        let mut child = child;
        let deadline = std::time::Instant::now() + Duration::from_secs(40);
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if std::time::Instant::now() > deadline => panic!("it does not stop"),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        // Not ended by the signal itself, which passes by the first process of a container.
        assert_eq!(status.code(), Some(0), "{signal}");
    }
}
