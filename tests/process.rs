//! The program: its first lines, its exit codes, its stop.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Database, KEY, client, eventually, fake_mcp, processes_naming, scripts};

/// The real program, running.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) url: String,
    lines: [String; 3],
    rest: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

pub(crate) fn command(folder: &Path, database: Option<&str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portolan"));
    command
        .env_remove("DATABASE_URL")
        .env_remove("PORTOLAN_KEY")
        .env_remove("PORTOLAN_KEY_FILE")
        .env("PORTOLAN_LISTEN", "127.0.0.1:0")
        .current_dir(folder);
    command.stderr(Stdio::null());
    if let Some(database) = database {
        command.env("DATABASE_URL", database).env("PORTOLAN_KEY", KEY);
    }
    command
}

impl Program {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut rest = BufReader::new(child.stdout.take().unwrap()).lines();
        let lines = [(); 3].map(|()| rest.next().expect("three lines").unwrap());
        let url = lines[0].split(' ').next_back().unwrap().to_owned();
        Self { child, url, lines, rest }
    }

    /// What it has said on standard output beside its first lines, when it is known to have said all: it is ended.
    pub(crate) fn rest(&mut self) -> Vec<String> {
        self.rest.by_ref().map_while(Result::ok).collect()
    }

    pub(crate) fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success());
    }

    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(40);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "it does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // After a failed assertion; a program that has exited is not harmed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a command wrote to standard error beside its progress.
pub(crate) fn without_progress(text: &str) -> String {
    const PARTS: [&str; 5] = [
        "reading Letta's database",
        "looking at servers: ",
        "writing servers: ",
        "storing servers: ",
        "sealing again: ",
    ];
    let is_progress = |line: &&str| PARTS.iter().any(|part| line.starts_with(part));
    text.split_inclusive('\n').filter(|line| !is_progress(line)).collect()
}

/// Exit code and standard error of a start that fails.
pub(crate) fn refusal(mut command: Command) -> (Option<i32>, String) {
    let output = command.stderr(Stdio::piped()).output().unwrap();
    assert!(output.stdout.is_empty());
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_where_its_metrics_are_if_they_have_an_address_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let with = |address: &str| {
        let mut command = command(folder.path(), database.url().as_deref());
        command.args(["--metrics-listen", address]);
        command
    };
    let mut program = Program::start(with("127.0.0.1:0"));
    // SQLite makes a key, and says so before.
    let skipped = if database.url().is_some() { 0 } else { 1 };
    let line = program.rest.nth(skipped).unwrap().unwrap();
    let url = line.strip_prefix("Metrics: ").unwrap_or_else(|| panic!("{line}"));
    let told = client().get(url).send().await.unwrap();
    assert_eq!(told.status(), 200);
    assert!(told.text().await.unwrap().contains("\nportolan_build_info{"));
    assert_eq!(client().get(format!("{}/metrics", program.url)).send().await.unwrap().status(), 404);
    let taken = url.strip_prefix("http://").unwrap().split('/').next().unwrap();
    let (code, said) = refusal(with(taken));
    assert_eq!(code, Some(1));
    assert!(said.contains(&format!("Cannot listen on {taken} for --metrics-listen: ")), "{said}");
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_where_it_listens_what_it_keeps_and_where_the_docs_are() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut program = Program::start(command(folder.path(), database.url().as_deref()));
    let [listens, kept, docs] = program.lines.clone();
    assert!(
        listens.starts_with(&format!("Portolan {} listens on http://127.0.0.1:", env!("CARGO_PKG_VERSION"))),
        "{listens}"
    );
    assert!(!listens.ends_with(":0"), "{listens}");
    if database.url().is_some() {
        assert!(kept.starts_with("Database: PostgreSQL at 127.0.0.1:"), "{kept}");
    } else {
        assert_eq!(kept, "Database: SQLite in ./portolan-data/portolan.db");
    }
    assert_eq!(docs, format!("Console: {0}/ · API reference: {0}/docs", program.url));
    let data = folder.path().join("portolan-data");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&data).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    let client = client();
    for (path, kind, part) in [
        ("/docs", "text/html; charset=utf-8", "swagger-ui"),
        ("/docs/docs.js", "text/javascript; charset=utf-8", "/openapi.yaml"),
        ("/docs/swagger-ui-bundle.js", "text/javascript; charset=utf-8", "SwaggerUI"),
        ("/docs/swagger-ui.css", "text/css; charset=utf-8", ".swagger-ui"),
        ("/openapi.yaml", "application/yaml", "openapi: 3.1"),
        ("/", "text/html; charset=utf-8", "/console/app.js"),
    ] {
        let answer = client.get(format!("{}{path}", program.url)).send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), answer.headers()["content-type"].to_str().unwrap()),
            (200, kind),
            "{path}"
        );
        let text = answer.text().await.unwrap();
        assert!(text.contains(part), "{path}");
        assert!(path != "/docs" || !text.contains("//cdn"), "everything comes from here");
    }
    if database.url().is_none() {
        for file in ["portolan.db", "portolan.db-wal"] {
            let mode =
                std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(data.join(file)).unwrap().permissions());
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
    }
    let body = json!({"server_name": "kept", "config": {"command": fake_mcp(), "args": ["stdio"], "env": {"K": "v"}}});
    let registering = client.post(format!("{}/v1/mcp-servers", program.url)).json(&body).send().await.unwrap();
    let registered: Value = registering.json().await.unwrap();
    assert_eq!(registered["status"]["state"], "ready", "{registered}");
    let tools = format!("/v1/mcp-servers/{}/tools", registered["id"].as_str().unwrap());
    let read = async |url: String| client.get(url).send().await.unwrap().json::<Value>().await.unwrap();
    let before = read(format!("{}{tools}", program.url)).await;
    program.signal("-INT");
    assert_eq!(program.exit_code(), Some(0));
    // What was registered is there after a restart, here with flags instead of variables.
    let mut again = command(folder.path(), database.url().as_deref());
    again.env_remove("PORTOLAN_LISTEN").args(["serve", "--listen", "127.0.0.1:0", "--log", "warn"]);
    let mut program = Program::start(again);
    let mut registered = registered;
    // No child of this process has been started yet.
    registered["status"]["confinement"] = Value::Null;
    assert_eq!(read(format!("{}/v1/mcp-servers", program.url)).await, json!([registered]));
    assert_eq!(read(format!("{}{tools}", program.url)).await, before);
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    database.remove().await;
}

#[test]
fn what_it_cannot_use_is_one_clear_sentence_and_no_zero() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "text").unwrap();
    let spoilt = folder.path().join("spoilt.db");
    std::fs::write(&spoilt, "this is no database, and it is long enough to be looked at as one".repeat(20)).unwrap();
    for (database, part) in [
        ("mysql://root:hunter2@127.0.0.1/x".to_owned(), "must start with postgres: or sqlite:"),
        ("nonsense".to_owned(), "must start with postgres: or sqlite:"),
        ("sqlite::memory:".to_owned(), "in-memory"),
        ("sqlite:/nonexistent/folder/x.db".to_owned(), "Cannot open the SQLite database"),
        (format!("sqlite:{}", spoilt.display()), "not a database"),
        ("postgres://u:hunter2@127.0.0.1:1/x".to_owned(), "refused"),
        ("postgres://u:hunter2@nonexistent.invalid/x".to_owned(), "Cannot open the PostgreSQL database"),
        ("postgres://u:hunter2@127.0.0.1:notaport/x".to_owned(), "cannot be read"),
    ] {
        let (code, text) = refusal(command(folder.path(), Some(&database)));
        assert_eq!(code, Some(1), "{database}");
        assert!(text.contains(part), "{database}: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "one sentence: {text}");
        assert!(text.trim_end().ends_with('.') && !text.contains("hunter2"), "{text}");
    }
    let mut taken = command(folder.path(), None);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    taken.args(["--listen", &listener.local_addr().unwrap().to_string()]);
    let (code, text) = refusal(taken);
    assert!(code == Some(1) && text.contains("Cannot listen on"), "{text}");
    let mut no_folder = command(folder.path(), None);
    no_folder.args(["--data-dir", &format!("{}/x", file.display())]);
    let (code, text) = refusal(no_folder);
    assert!(code == Some(1) && text.contains("Cannot make the data folder"), "{text}");
    let mut every_page = command(folder.path(), None);
    every_page.args(["--cors-origins", "*"]);
    let (code, text) = refusal(every_page);
    assert!(code == Some(1) && text.contains("no token is set"), "{text}");
    let mut no_time = command(folder.path(), None);
    no_time.args(["--run-timeout", "soon"]);
    let (code, text) = refusal(no_time);
    assert!(code == Some(2) && text.contains("a number and a unit"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_finishes_what_is_under_way_and_leaves_no_child() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    for signal in ["-TERM", "-INT"] {
        let mut program = Program::start(command(folder.path(), database.url().as_deref()));
        let client = client();
        let script = scripts(folder.path()).join(format!("{signal}.json"));
        // This one outlives the end of its input and SIGTERM; only SIGKILL ends it.
        let tools = json!([{"name": "slow", "inputSchema": {"type": "object"}}]);
        std::fs::write(&script, json!({"stubborn": true, "tools": tools}).to_string()).unwrap();
        let servers = format!("{}/v1/mcp-servers", program.url);
        let body = json!({"server_name": signal, "config": {"command": fake_mcp(), "args": ["stdio", script]}});
        let server: Value = client.post(&servers).json(&body).send().await.unwrap().json().await.unwrap();
        assert_eq!(server["status"]["state"], "ready", "{server}");
        let one = format!("{servers}/{}/tools", server["id"].as_str().unwrap());
        let tools: Value = client.get(&one).send().await.unwrap().json().await.unwrap();
        let run = format!("{one}/{}/run", tools[0]["id"].as_str().unwrap());
        let runs: Vec<_> =
            (0..10).map(|_| tokio::spawn(client.post(&run).json(&json!({"args": {"ms": 1500}})).send())).collect();
        let calls = || {
            let log = std::fs::read_to_string(format!("{}.log", script.display())).unwrap_or_default();
            log.matches("tools/call").count()
        };
        eventually("all runs are under way", || calls() == 10).await;
        program.signal(signal);
        for run in runs {
            let answer: Value = run.await.unwrap().expect("it is answered").json().await.unwrap();
            assert_eq!(answer["func_return"], "done", "{answer}");
        }
        assert_eq!(program.exit_code(), Some(0));
        assert_eq!(processes_naming(&folder.path().to_string_lossy()), Vec::<u32>::new());
        assert!(client.get(&servers).send().await.is_err());
    }
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_also_ends_what_is_being_opened_or_listed() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut start = command(folder.path(), database.url().as_deref());
    start.args(["--create-sync-timeout", "200ms"]);
    let mut program = Program::start(start);
    for stage in ["initialize", "list"] {
        let script = scripts(folder.path()).join(format!("{stage}.json"));
        std::fs::write(&script, json!({"silent_at": stage, "stubborn": true}).to_string()).unwrap();
        let body = json!({"server_name": stage, "config": {"command": fake_mcp(), "args": ["stdio", script]}});
        let answer = client().post(format!("{}/v1/mcp-servers", program.url)).json(&body).send().await.unwrap();
        assert_eq!(answer.json::<Value>().await.unwrap()["status"]["state"], "never_connected");
    }
    assert_eq!(processes_naming(&folder.path().to_string_lossy()).len(), 2);
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    assert_eq!(processes_naming(&folder.path().to_string_lossy()), Vec::<u32>::new());
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_does_not_wait_for_ever_and_a_second_signal_does_not_wait_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    for (second, code) in [(false, Some(0)), (true, Some(1))] {
        let mut start = command(folder.path(), database.url().as_deref());
        start.args(["--drain-timeout", if second { "1h" } else { "500ms" }]);
        let mut program = Program::start(start);
        let mut stream = std::net::TcpStream::connect(program.url.trim_start_matches("http://")).unwrap();
        std::io::Write::write_all(
            &mut stream,
            b"POST /v1/mcp-servers HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{",
        )
        .unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        program.signal("-TERM");
        if second {
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(program.child.try_wait().unwrap().is_none(), "it waits for the request");
            program.signal("-TERM");
        }
        assert_eq!(program.exit_code(), code);
        let mut rest = String::new();
        // Cut: no answer, or a reset.
        let _ = stream.read_to_string(&mut rest);
        assert_eq!(rest, "");
    }
    database.remove().await;
}
