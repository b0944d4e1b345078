//! Commands: with `--json`, standard output is one document; progress is on standard error, on a terminal in one line that
//! is gone in the end, elsewhere in lines.

use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use portolan::model::sha256_hex;
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fake::{self, Fake, Script};
use crate::harness::{Answer, Database, Portolan, Remote, eventually};
use crate::process::{Program, command};

/// Nobody listens there.
const DEAD: &str = "http://127.0.0.1:1/mcp";
/// To the first column, and nothing in the line.
const CLEAR: &str = "\r\u{1b}[K";

/// A database of its own, and the program on it.
struct Place {
    folder: TempDir,
    database: Database,
}

struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    /// The one document on standard output.
    #[track_caller]
    fn document(&self, code: i32) -> Value {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        assert!(self.out.ends_with('\n'), "{}", self.out);
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }
}

impl Place {
    async fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), database: Database::new().await }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = command(self.folder.path(), self.database.url().as_deref());
        command.args(args);
        command
    }

    async fn say(&self, args: &[&str]) -> Said {
        said(self.command(args)).await
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let file = self.folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        // The program warns of a key file that others may read.
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        file
    }

    /// A file of so many servers at this URL.
    fn servers(&self, number: usize, url: &str) -> String {
        let servers = (0..number).map(|number| (format!("s{number}"), json!({ "url": url })));
        let text = json!({ "mcpServers": servers.collect::<serde_json::Map<_, _>>() }).to_string();
        self.file("servers.json", &text).to_str().unwrap().to_owned()
    }
}

async fn said(mut command: Command) -> Said {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// A terminal of this width: its own side, and that of a program.
fn terminal(columns: u16) -> (std::fs::File, OwnedFd) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    tcsetwinsize(&theirs, Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    (ours.into(), theirs)
}

/// Adds what a program writes to the terminal that is its standard error, until it ends.
fn watch(mut terminal: std::fs::File, text: &Mutex<String>) {
    let mut buffer = [0; 4096];
    // Nobody has the other side any more: EIO.
    while let Ok(count @ 1..) = terminal.read(&mut buffer) {
        text.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

/// The same as [`said`], with a terminal as standard error.
async fn said_on_terminal(mut command: Command, columns: u16) -> Said {
    let (ours, theirs) = terminal(columns);
    command.stdout(Stdio::piped()).stderr(theirs);
    let run = move || {
        let mut child = command.spawn().unwrap();
        // It has one of the program's side, too.
        drop(command);
        let err = Mutex::default();
        watch(ours, &err);
        let mut out = String::new();
        child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        Said { code: child.wait().unwrap().code(), out, err: err.into_inner().unwrap() }
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

async fn post_file(portolan: &Portolan, query: &str, file: &Path) -> Answer {
    let path = format!("/v1/portolan/import{query}");
    let body = std::fs::read(file).unwrap();
    Answer::of("POST", &path, portolan.request("POST", &path).header("content-type", "application/json").body(body))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn import_and_export_answer_in_json_what_the_api_does() {
    let place = Place::new().await;
    let portolan = Portolan::start().await;
    let file = place.file(
        "servers.json",
        r#"{"mcpServers": {
            "a": {"url": "http://127.0.0.1:1/mcp", "headers": {"X-A": "${TOKEN:-none}"}, "timeout": 3},
            "b": {"command": "true", "env": {"A_TOKEN": "secret-b"}}
        }}"#,
    );
    let path = file.to_str().unwrap();
    for (more, query) in [(["--dry-run"].as_slice(), "?dry_run=true"), (&[], ""), (&[], "")] {
        let document = place.say(&[&["import", path, "--json"], more].concat()).await.document(0);
        assert_eq!(document, post_file(&portolan, query, &file).await.expect(200), "{query}");
    }
    let plain = place.say(&["import", path]).await;
    assert_eq!(plain.code, Some(0), "{}", plain.err);
    let again = place.say(&["--json", "import", path]).await;
    let names = again.document(0)["unchanged"].clone();
    assert_eq!(names, json!(["a", "b"]));
    for name in ["a", "b"] {
        assert!(plain.out.contains(&format!("unchanged  {name}\n")), "{}", plain.out);
    }
    assert!(
        plain.out.contains("ignored    a, timeout: ") && !again.document(0)["ignored"].as_array().unwrap().is_empty()
    );

    let export = portolan.get("/v1/portolan/export?format=vscode").await.expect(200);
    assert_eq!(place.say(&["export", "--format", "vscode", "--json"]).await.document(0), export);
    let output = place.folder.path().join("out.json");
    let report = place.say(&["export", "--json", "--output", output.to_str().unwrap()]).await;
    assert_eq!(report.document(0), json!({"output": output, "left_out": []}));
    assert_eq!(report.err, "");
    let written: Value = serde_json::from_str(&std::fs::read_to_string(&output).unwrap()).unwrap();
    assert_eq!(written, portolan.get("/v1/portolan/export").await.expect(200));

    // What is wrong is said as the API says it, and in the same words to people.
    let broken = place.file("broken.json", r#"{"mcpServers": {"a": {"url": 1}, "b": {"command": 2}}}"#);
    let refused = place.say(&["import", broken.to_str().unwrap(), "--json"]).await;
    let error = refused.document(1)["error"].clone();
    let answer = post_file(&portolan, "", &broken).await.expect(422);
    assert_eq!(error["errors"], answer["errors"]);
    assert_eq!(error["errors"].as_array().unwrap().len(), 2);
    let plain = place.say(&["import", broken.to_str().unwrap()]).await;
    assert_eq!((plain.code, &*plain.out), (Some(1), ""));
    assert_eq!(plain.err, refused.err);
    assert_eq!(plain.err, format!("portolan: {}\n", error["detail"].as_str().unwrap()));
    portolan.stop().await;
    place.database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_tokens_are_made_in_json_too() {
    let place = Place::new().await;
    let made = place.say(&["key", "new", "--json"]).await;
    assert_eq!(made.err, "");
    let made = made.document(0);
    let keys = place.file("keys", &format!("{}\n", made["key"].as_str().unwrap()));
    let keyed = |args: &[&str]| {
        let mut command = place.command(args);
        command.env_remove("PORTOLAN_KEY").env("PORTOLAN_KEY_FILE", &keys);
        command
    };
    let servers = place.servers(3, DEAD);
    let imported = said(keyed(&["import", &servers])).await;
    assert_eq!(imported.code, Some(0), "{}", imported.err);
    let id = made["id"].clone();
    let counted = said(keyed(&["rotate-keys", "--dry-run", "--json"])).await;
    let keys_then = json!([{"id": id, "role": "first", "servers": 3}]);
    let expected = json!({"dry_run": true, "sealed": 0, "unopened": null, "keys": keys_then});
    assert_eq!((counted.document(0), &*counted.err), (expected, ""));

    // A second key: the same three servers, sealed again.
    let other = place.say(&["key", "new", "--json"]).await.document(0);
    assert_ne!(other["id"], id);
    place.file("keys", &format!("{}\n{}\n", other["key"].as_str().unwrap(), made["key"].as_str().unwrap()));
    let rotated = said(keyed(&["rotate-keys", "--json"])).await;
    assert_eq!(
        rotated.document(0),
        json!({"dry_run": false, "sealed": 3, "unopened": 0, "keys": [
            {"id": other["id"], "role": "first", "servers": 3},
            {"id": id, "role": "opens", "servers": 0},
        ]})
    );
    assert_eq!(rotated.err, "sealing again: 0 of 3 servers\n");
    let plain = said(keyed(&["rotate-keys"])).await;
    let (first, old) = (other["id"].as_str().unwrap(), id.as_str().unwrap());
    assert_eq!(
        plain.out,
        format!(
            "0 servers sealed again with key {first}.\nKey {old} seals nothing any more: take it out of the key file.\n"
        )
    );
    let unknown = said(keyed(&["key", "forget", "0123456789ab", "--json"])).await;
    let detail = unknown.document(1)["error"]["detail"].as_str().unwrap().to_owned();
    assert!(detail.starts_with("The database knows no key"), "{detail}");
    assert_eq!(unknown.err, format!("portolan: {detail}\n"));

    let file = place.folder.path().join("tokens");
    let token = place.say(&["token", "new", "ci", "--scope", "run", "--json", "--file", file.to_str().unwrap()]).await;
    assert_eq!(token.err, "");
    let token = token.document(0);
    let line = format!("ci:run:{}", sha256_hex(token["token"].as_str().unwrap()));
    assert_eq!(token, json!({"name": "ci", "scope": "run", "token": token["token"], "line": line, "file": file}));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), format!("{line}\n"));
    let twice = place.say(&["token", "new", "ci", "--scope", "run", "--json", "--file", file.to_str().unwrap()]).await;
    assert!(twice.document(1)["error"]["detail"].as_str().unwrap().contains("of this name"));
    place.database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_and_a_wrong_command_line_are_told_in_json() {
    let place = Place::new().await;
    let wrong = place.say(&["import", "--json", "--formt", "claude", "x"]).await;
    let detail = wrong.document(2)["error"]["detail"].as_str().unwrap().to_owned();
    assert!(
        detail.contains("--formt") && wrong.err.starts_with(&format!("error: {detail}")),
        "{detail}: {}",
        wrong.err
    );
    let plain = place.say(&["import", "--formt", "claude", "x"]).await;
    assert_eq!((plain.code, &*plain.out, plain.err.lines().next()), (Some(2), "", wrong.err.lines().next()));
    let help = place.say(&["--json", "--help"]).await;
    assert!(help.code == Some(0) && help.out.contains("--json"), "{}", help.out);

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let refused = place.say(&["serve", "--json", "--listen", &address]).await;
    let detail = refused.document(1)["error"]["detail"].as_str().unwrap().to_owned();
    assert!(detail.starts_with(&format!("Cannot listen on {address}")), "{detail}");

    let mut started = place.command(&["serve", "--json"]);
    let mut child = started.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    let document: Value = serde_json::from_str(&line).unwrap();
    let keys: Vec<_> = document.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["version", "url", "metrics_url", "database", "notice"]);
    assert_eq!(document["notice"].is_string(), place.database.url().is_none(), "of the key that SQLite makes");
    Remote::new(document["url"].as_str().unwrap()).send("GET", "/v1/ready", None).await.expect(200);
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    line.clear();
    out.read_to_string(&mut line).unwrap();
    assert_eq!(line, "", "one document");
    place.database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_lines_in_a_pipe_and_one_line_on_a_terminal() {
    let place = Place::new().await;
    let servers = place.servers(120, DEAD);
    let import = |more: &[&str]| place.command(&[&["import", &servers, "--replace"], more].concat());
    let empty = place.file("empty.json", r#"{"mcpServers": {}}"#);
    let again = async || {
        let emptied = place.say(&["import", empty.to_str().unwrap(), "--replace"]).await;
        assert_eq!(emptied.code, Some(0), "{}", emptied.err);
    };
    // The key of a new database is told of once.
    again().await;
    let dry = said(import(&["--dry-run"])).await;
    assert_eq!((dry.code, &*dry.err), (Some(0), ""), "nothing is stored");
    let piped = said(import(&[])).await;
    assert_eq!(piped.err, "storing servers: 0 of 120\nstoring servers: 50 of 120\nstoring servers: 100 of 120\n");
    assert!(piped.out.ends_with("Servers: 120 added, 0 changed, 0 unchanged, 0 removed.\n"), "{}", piped.out);
    assert!(!piped.out.contains(" of 120"), "{}", piped.out);

    let mut drawn = vec![];
    for (columns, term, colours) in
        [(80, "xterm", None), (80, "xterm", Some("1")), (20, "xterm", None), (80, "dumb", None)]
    {
        again().await;
        let mut import = import(&["--json"]);
        import.env("TERM", term).env_remove("NO_COLOR");
        import.envs(colours.map(|value| ("NO_COLOR", value)));
        let said = said_on_terminal(import, columns).await;
        assert_eq!(said.document(0)["added"].as_array().unwrap().len(), 120);
        drawn.push(said.err);
    }
    let [wide, colourless, narrow, dumb] = &drawn[..] else { panic!("four") };
    assert_eq!(dumb, "");
    for (text, columns, first) in [
        (wide, 80, "storing servers: 0 of 120"),
        (colourless, 80, "storing servers: 0 of 120"),
        (narrow, 20, "storing servers: 0 "),
    ] {
        let mut lines = text.split(CLEAR);
        assert_eq!((lines.next(), lines.next()), (Some(""), Some(first)), "{text:?}");
        assert!(text.ends_with(CLEAR) && !text.contains('\n'), "cleared: {text:?}");
        assert!(text.split(CLEAR).all(|line| line.len() < columns), "{text:?}");
    }
    place.database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn first_syncs_are_shown_and_keep_nobody_waiting() {
    let place = Place::new().await;
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let hung = format!("http://{}/mcp", silent.local_addr().unwrap());
    let imported = place.say(&["import", &place.servers(6, &hung)]).await;
    assert_eq!(imported.code, Some(0), "{}", imported.err);
    let log = place.folder.path().join("log");
    let mut serve = place.command(&[]);
    serve.stderr(std::fs::File::create(&log).unwrap());
    let mut program = Program::start(serve);
    let logged = |text: &str| std::fs::read_to_string(&log).unwrap().contains(text);
    let answer = Remote::new(&program.url).send("GET", "/v1/ready", None).await.expect(200);
    eventually("it says that it began", || logged("first sync: 0 of 6 servers, 0 failed")).await;
    assert!(!logged("first sync: 6 of 6"), "it was ready before: {answer}");
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    drop(program);

    // Some work, and some do not; on a terminal a line is written over, and lines of the log stand alone.
    let http = fake::http::serve(Fake::new(Script::default()));
    let live = place.servers(4, &http.url);
    assert_eq!(place.say(&["import", &live, "--replace"]).await.code, Some(0));
    let dead = place.file("dead.json", &json!({"mcpServers": {"d1": {"url": DEAD}, "d2": {"url": DEAD}}}).to_string());
    assert_eq!(place.say(&["import", dead.to_str().unwrap()]).await.code, Some(0));
    let (ours, theirs) = terminal(80);
    let mut serve = place.command(&[]);
    serve.env("TERM", "xterm").stderr(theirs);
    let mut program = Program::start(serve);
    let text = Arc::<Mutex<String>>::default();
    let reading = tokio::task::spawn_blocking({
        let text = text.clone();
        move || watch(ours, &text)
    });
    let end = "first sync: 6 of 6 servers, 2 failed";
    eventually("all are over", || text.lock().unwrap().contains(end)).await;
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    drop(program);
    reading.await.unwrap();
    let text = text.lock().unwrap().clone();
    assert!(text.contains(&format!("{CLEAR}first sync: ")), "{text:?}");
    let said: Vec<_> = text.split('\n').filter(|line| line.contains(end)).collect();
    assert_eq!(said.len(), 1, "{text:?}");
    assert!(text.split('\n').all(|line| line.is_empty() || line.contains(CLEAR)), "each takes the place: {text:?}");
    place.database.remove().await;
}
