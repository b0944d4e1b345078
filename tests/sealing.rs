//! Secrets at rest: keys, what happens without the right one, rows that cannot be opened, rotation while Portolan serves.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use futures_util::{StreamExt, stream};
use portolan::store::{Database as Pools, KeySource, Store};
use serde_json::{Value, json};
use sqlx::migrate::Migrator;

use crate::fake::{self, Fake, Script};
use crate::harness::{Database, Portolan, Remote, eventually};
use crate::process::{Program, command, without_progress};

const DEAD: &str = "http://127.0.0.1:1/mcp";

/// A key file of these keys, each 32 bytes of one value.
pub(crate) fn key_file(folder: &Path, keys: &[u8]) -> PathBuf {
    let file = folder.join("keys");
    let lines: String = keys.iter().map(|key| format!("{key:02x}").repeat(32) + "\n").collect();
    let new = file.with_extension("new");
    std::fs::write(&new, lines).unwrap();
    std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::rename(new, &file).unwrap();
    file
}

/// The program with the keys of the key file.
fn keyed(folder: &Path, database: &Database) -> Command {
    let mut command = command(folder, database.url().as_deref());
    command.env_remove("PORTOLAN_KEY").env("PORTOLAN_KEY_FILE", folder.join("keys"));
    command
}

/// What a command that ends says: its exit code, and both outputs.
async fn said(mut command: Command) -> (Option<i32>, String, String) {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap();
    let Output { status, stdout, stderr } = output.unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), without_progress(&String::from_utf8(stderr).unwrap()))
}

async fn refused(command: Command, part: &str) {
    let (code, _, text) = said(command).await;
    assert!(code == Some(1) && text.contains(part), "{code:?}: {text}");
    assert_eq!(text.trim_end().lines().count(), 1, "one sentence: {text}");
}

/// Does a statement with texts as its parameters on the database of a store.
async fn execute(store: &Store, sql: &'static str, texts: &[&str]) {
    macro_rules! on {
        ($pool:expr) => {{
            let mut query = sqlx::query(sql);
            for text in texts {
                query = query.bind(*text);
            }
            query.execute($pool).await.unwrap().rows_affected()
        }};
    }
    let rows = match &store.database {
        Pools::Postgres(pool) => on!(pool),
        Pools::Sqlite { write, .. } => on!(write),
    };
    assert!(rows > 0, "{sql}");
}

async fn stored(store: &Store, id: &str) -> String {
    const SQL: &str = "SELECT config FROM servers WHERE id = $1";
    match &store.database {
        Pools::Postgres(pool) => sqlx::query_scalar(SQL).bind(id).fetch_one(pool).await.unwrap(),
        Pools::Sqlite { read, .. } => sqlx::query_scalar(SQL).bind(id).fetch_one(read).await.unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_tampered_with_is_shown_so_harms_no_other_and_is_not_written_over() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let create = async |name: &str| {
        portolan.create(name, json!({"server_url": http.url, "auth_token": format!("token of {name}")})).await
    };
    let (flipped, moved, fine) = (create("flipped").await, create("moved").await, create("fine").await);
    let id = |server: &Value| server["id"].as_str().unwrap().to_owned();
    let one = |server: &Value| format!("/v1/mcp-servers/{}", id(server));
    let store = &portolan.app.store;
    let whole = stored(store, &id(&flipped)).await;
    assert!(whole.starts_with("v1.") && !whole.contains("http"), "{whole}");
    let mut bytes = whole.clone().into_bytes();
    let last = bytes.len() - 10;
    bytes[last] = if bytes[last] == b'A' { b'B' } else { b'A' };
    let damaged = String::from_utf8(bytes).unwrap();
    let change = "UPDATE servers SET config = $2 WHERE id = $1";
    execute(store, change, &[&id(&flipped), &damaged]).await;
    let foreign = stored(store, &id(&fine)).await;
    execute(store, change, &[&id(&moved), &foreign]).await;
    // In clear, as if somebody who may write to the database had made a server of their own.
    let planted = create("planted").await;
    let clear = json!({"type": "stdio", "command": "/bin/true", "args": [], "env": null}).to_string();
    execute(store, change, &[&id(&planted), &clear]).await;
    // And one whose key is gone.
    let keyless = create("keyless").await;
    let sealed = stored(store, &id(&keyless)).await;
    let without_key = format!("v1.000000000000.{}", sealed.splitn(3, '.').nth(2).unwrap());
    execute(store, change, &[&id(&keyless), &without_key]).await;

    let list = portolan.get("/v1/mcp-servers/?reveal=true").await.expect(200);
    assert_eq!(list.as_array().unwrap().len(), 5);
    assert_eq!((&list[2]["auth_token"], &list[2]["status"]["state"]), (&json!("token of fine"), &json!("ready")));
    for (server, shown, text, part) in [
        (&flipped, &list[0], &damaged, "was changed"),
        (&moved, &list[1], &foreign, "was changed"),
        (&planted, &list[3], &clear, "was changed"),
        (&keyless, &list[4], &without_key, "key that Portolan does not have"),
    ] {
        assert_eq!(shown["status"]["state"], "unreachable", "{shown}");
        assert!(shown["status"]["error"].as_str().unwrap().contains(part), "{shown}");
        assert_eq!((&shown["server_url"], &shown["auth_token"]), (&json!(""), &Value::Null));
        // Nothing is run on a new session, though the tools are known.
        portolan.app.mcp.forget(&id(server));
        let tools = portolan.tools(&id(server)).await;
        let run = format!("{}/tools/{}/run", one(server), tools[0]["id"].as_str().unwrap());
        let answer = portolan.post(&run, &json!({})).await;
        assert!([502, 503].contains(&answer.status), "{}", answer.text);
        portolan.refresh(&id(server)).await.expect(404);
        // A rename keeps what may be whole once its key is back; a change of it is refused.
        let renamed = json!({"server_name": format!("renamed {}", server["server_name"])});
        assert_eq!(portolan.patch(&one(server), &renamed).await.expect(200)["status"]["state"], "unreachable");
        for config in [
            json!({"server_url": DEAD}),
            json!({"mcp_server_type": "stdio", "command": "c"}),
            json!({"auth_token": ""}),
        ] {
            let answer = portolan.patch(&one(server), &json!({ "config": config })).await;
            assert_eq!(answer.header("x-should-retry"), Some("false"));
            let refused = answer.expect(409);
            assert_eq!(refused["code"], "config_sealed");
            assert!(refused["detail"].as_str().unwrap().contains(part), "{refused}");
        }
        assert_eq!(stored(store, &id(server)).await, *text, "not a byte is changed");
    }
    // What was whole is whole again.
    execute(store, change, &[&id(&flipped), &whole]).await;
    let mended = portolan.get(&format!("{}?reveal=true", one(&flipped))).await.expect(200);
    assert_eq!(mended["auth_token"], "token of flipped");
    portolan.delete(&one(&moved)).await.expect(204);
    assert_eq!(portolan.run(&id(&fine), "echo", json!({"message": "m"})).await["func_return"], "m");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_start_without_the_right_key_and_no_new_key_for_an_old_database() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let is_postgres = database.url().is_some();
    let plain = || {
        let mut command = command(folder.path(), database.url().as_deref());
        command.env_remove("PORTOLAN_KEY");
        command
    };
    let made = folder.path().join("portolan-data/portolan.key");
    if is_postgres {
        refused(plain(), "portolan key new").await;
        let mut empty = plain();
        empty.env("PORTOLAN_KEY", "");
        refused(empty, "PORTOLAN_KEY is empty").await;
        let (code, key, _) = said({
            let mut command = plain();
            command.args(["key", "new"]);
            command
        })
        .await;
        assert_eq!((code, key.trim_end().len()), (Some(0), 44), "32 bytes in base64");
        std::fs::write(folder.path().join("keys"), &key).unwrap();
        std::fs::set_permissions(folder.path().join("keys"), PermissionsExt::from_mode(0o600)).unwrap();
    }
    let right = || if is_postgres { keyed(folder.path(), &database) } else { plain() };
    let mut program = Program::start(right());
    let remote = Remote::new(&program.url);
    let server = remote.create("kept", json!({"server_url": DEAD, "auth_token": "t"})).await;
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    if is_postgres {
        assert_eq!(program.rest(), Vec::<String>::new());
    } else {
        let [line] = &program.rest()[..] else { panic!("it says that it made a key") };
        assert!(line.starts_with("A key was made in ./portolan-data/portolan.key"), "{line}");
        assert_eq!(std::fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o600);
    }

    let mut wrong = plain();
    wrong.env("PORTOLAN_KEY", "ab".repeat(32));
    refused(wrong, "This is not the key that the database is sealed with").await;
    let mut both = plain();
    both.env("PORTOLAN_KEY", "ab".repeat(32)).env("PORTOLAN_KEY_FILE", folder.path().join("keys"));
    refused(both, "not both").await;
    let mut missing = plain();
    missing.args(["--key-file", "nowhere"]);
    refused(missing, "does not exist").await;
    if !is_postgres {
        let aside = folder.path().join("aside");
        std::fs::rename(&made, &aside).unwrap();
        refused(plain(), "put it back from your copy").await;
        assert!(!made.exists(), "no new key was made");
        std::fs::rename(aside, &made).unwrap();
    }
    let program = Program::start(right());
    let kept = Remote::new(&program.url).send("GET", "/v1/mcp-servers/?reveal=true", None).await.expect(200);
    assert_eq!((&kept[0]["id"], &kept[0]["auth_token"]), (&server["id"], &json!("t")));
    drop(program);

    // A key that is lost for good is given up in so many words; its servers can be deleted then.
    let other = || {
        let mut other = plain();
        other.env("PORTOLAN_KEY", "ab".repeat(32));
        other
    };
    let (_, _, text) = said(other()).await;
    let lost = text.split("that is key ").nth(1).unwrap()[..12].to_owned();
    let forget = |id: &str| {
        let mut forget = plain();
        forget.args(["key", "forget", id]);
        forget
    };
    refused(forget("000000000000"), "knows no key").await;
    assert_eq!(said(forget(&lost)).await.0, Some(0));
    let program = Program::start(other());
    let remote = Remote::new(&program.url);
    let sealed = remote.send("GET", "/v1/mcp-servers/", None).await.expect(200);
    assert!(sealed[0]["status"]["error"].as_str().unwrap().contains("does not have"), "{sealed}");
    remote.create("new", json!({"server_url": DEAD, "auth_token": "n"})).await;
    let gone = format!("/v1/mcp-servers/{}", sealed[0]["id"].as_str().unwrap());
    remote.send("DELETE", &gone, None).await.expect(204);
    drop(program);
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_first_starts_with_different_keys_one_is_refused() {
    for _ in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::new().await;
        let data = folder.path().join("portolan-data");
        std::fs::create_dir(&data).unwrap();
        // Its schema is there: SQLite is for one process alone, and takes no two that make it at once.
        match database.url() {
            Some(url) => {
                let pool = sqlx::PgPool::connect(&url).await.unwrap();
                sqlx::migrate!("migrations/postgres").run(&pool).await.unwrap();
                pool.close().await;
            }
            None => {
                let file = data.join("portolan.db");
                let pool = sqlx::SqlitePool::connect(&format!("sqlite:{}?mode=rwc", file.display())).await.unwrap();
                sqlx::migrate!("migrations/sqlite").run(&pool).await.unwrap();
                pool.close().await;
            }
        }
        let start = |key: &str| {
            let mut start = command(folder.path(), database.url().as_deref());
            start.env("PORTOLAN_KEY", key.repeat(32)).args(["rotate-keys", "--dry-run"]);
            start.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let starts = ["aa", "bb", "cc"].map(start);
        let outputs = starts.map(|start| start.wait_with_output().unwrap());
        let texts: Vec<_> = outputs.iter().map(|output| String::from_utf8_lossy(&output.stderr)).collect();
        assert_eq!(outputs.iter().filter(|output| output.status.success()).count(), 1, "{texts:?}");
        assert_eq!(texts.iter().filter(|text| text.contains("This is not the key")).count(), 2, "{texts:?}");
        database.remove().await;
    }
}

/// Every file of a folder that contains `text`.
fn files_with(folder: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_with(&path, text));
        } else if std::fs::read(&path).unwrap().windows(text.len()).any(|window| window == text.as_bytes()) {
            found.push(path);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_older_versions_stored_in_clear_is_sealed_and_leaves_no_trace() {
    const ROW: &str = "INSERT INTO servers (id, server_name, type, config, revision, state, error, created_at, updated_at) \
                       VALUES ($1, $4, 'streamable_http', $2, 1, 'unreachable', $3, '2026-01-01T00:00:00Z', \
                       '2026-01-01T00:00:00Z')";
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    // The schema of before, and nothing of now.
    let kind = if database.url().is_some() { "postgres" } else { "sqlite" };
    let old = folder.path().join("old");
    std::fs::create_dir(&old).unwrap();
    let first = "0001_servers_and_tools.sql";
    std::fs::copy(Path::new("migrations").join(kind).join(first), old.join(first)).unwrap();
    let migrator = Migrator::new(old).await.unwrap();
    let data = folder.path().join("portolan-data");
    std::fs::create_dir(&data).unwrap();
    let config = |number: usize| {
        json!({
            "type": "streamable_http", "server_url": DEAD, "auth_header": null,
            "auth_token": format!("canary-{number}-{}", "x".repeat(2_000)), "custom_headers": {"h": "canary-header"},
        })
        .to_string()
    };
    macro_rules! fill {
        ($pool:expr, $sql:expr) => {{
            migrator.run($pool).await.unwrap();
            for number in 0..60 {
                let query = sqlx::query($sql).bind(format!("mcp_server-{}", uuid::Uuid::new_v4())).bind(config(number));
                query.bind("canary-error").bind(format!("server-{number}")).execute($pool).await.unwrap();
            }
            // Pages that are free now.
            sqlx::query("DELETE FROM servers WHERE server_name LIKE '%5_'").execute($pool).await.unwrap();
            $pool.close().await;
        }};
    }
    let file = data.join("portolan.db");
    match database.url() {
        Some(url) => {
            let sql = ROW.replace("'2026-01-01T00:00:00Z'", "TIMESTAMPTZ '2026-01-01T00:00:00Z'");
            let pool = sqlx::PgPool::connect(&url).await.unwrap();
            fill!(&pool, sqlx::AssertSqlSafe(sql.clone()));
        }
        None => {
            let pool = sqlx::SqlitePool::connect(&format!("sqlite:{}?mode=rwc", file.display())).await.unwrap();
            fill!(&pool, ROW);
            assert!(!files_with(&data, "canary-header").is_empty());
        }
    }
    let mut program = Program::start(command(folder.path(), database.url().as_deref()));
    let remote = Remote::new(&program.url);
    let list = remote.send("GET", "/v1/mcp-servers/?reveal=true", None).await.expect(200);
    assert_eq!(list.as_array().unwrap().len(), 50);
    for server in list.as_array().unwrap() {
        let number = server["server_name"].as_str().unwrap().rsplit('-').next().unwrap();
        assert!(server["auth_token"].as_str().unwrap().starts_with(&format!("canary-{number}-x")), "{server}");
        assert_eq!(server["status"]["error"], "canary-error");
    }
    assert_eq!(files_with(&data, "canary-"), Vec::<PathBuf>::new(), "while it runs");
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    assert_eq!(files_with(&data, "canary-"), Vec::<PathBuf>::new(), "after its end");
    // The next start finds all of it sealed, and seals nothing again.
    let program = Program::start(command(folder.path(), database.url().as_deref()));
    let again = Remote::new(&program.url).send("GET", "/v1/mcp-servers/?reveal=true", None).await.expect(200);
    assert_eq!(again[0]["auth_token"], list[0]["auth_token"]);
    if let Some(url) = database.url() {
        let pool = sqlx::PgPool::connect(&url).await.unwrap();
        let clear = "SELECT count(*) FROM servers WHERE config LIKE '%canary%' OR error LIKE '%canary%'";
        assert_eq!(sqlx::query_scalar::<_, i64>(clear).fetch_one(&pool).await.unwrap(), 0);
        pool.close().await;
    }
    drop(program);
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_rotate_under_load_also_when_the_rotation_is_killed_half_way() {
    const SERVERS: usize = 1_000;
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    key_file(folder.path(), &[1]);
    let mut start = keyed(folder.path(), &database);
    let log = folder.path().join("log");
    start.stderr(std::fs::File::create(&log).unwrap());
    let mut program = Program::start(start);
    let remote = Remote::new(&program.url);
    let http = fake::http::serve(Fake::new(Script::default()));
    let live = remote.create("live", json!({"server_url": http.url, "custom_headers": {"x-mark": "0"}})).await;
    let run = remote.path(live["id"].as_str().unwrap(), "headers").await;
    let live = format!("/v1/mcp-servers/{}", live["id"].as_str().unwrap());
    let token = |number: usize| format!("token-{number}");
    let ids: Vec<String> = stream::iter(1..SERVERS)
        .map(|number| {
            let config = json!({"server_url": DEAD, "auth_token": token(number)});
            let remote = &remote;
            async move { remote.create(&format!("s{number}"), config).await["id"].as_str().unwrap().to_owned() }
        })
        .buffered(16)
        .collect()
        .await;

    let over = AtomicBool::new(false);
    let calls = AtomicUsize::new(0);
    let reload = async |keys: &[u8], said: &str| {
        let before = std::fs::read_to_string(&log).unwrap().matches(said).count();
        key_file(folder.path(), keys);
        program.signal("-HUP");
        eventually(said, || std::fs::read_to_string(&log).unwrap().matches(said).count() > before).await;
    };
    let rotate = |more: &[&str]| {
        let mut rotate = keyed(folder.path(), &database);
        rotate.arg("rotate-keys").args(more);
        rotate
    };
    let (old, new) = ("72cd6e8422c4", "75877bb41d39");
    let rotation = async {
        reload(&[1, 2], "keys read again").await;
        reload(&[2, 1], "keys read again").await;
        let mut killed = rotate(&[]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let kill = move || {
            let mut lines = BufReader::new(killed.stderr.take().unwrap()).lines();
            let line = lines.nth(1).unwrap().unwrap();
            killed.kill().unwrap();
            killed.wait().unwrap();
            line
        };
        let line = tokio::task::spawn_blocking(kill).await.unwrap();
        assert_eq!(line, format!("sealing again: {} of {SERVERS} servers", SERVERS / 10));
        let (code, counts, _) = said(rotate(&["--dry-run"])).await;
        assert_eq!(code, Some(0));
        let left: usize =
            counts.lines().find(|line| line.contains(old)).unwrap().split(' ').nth(6).unwrap().parse().unwrap();
        assert!(left > 0 && left < SERVERS, "half-way: {counts}");
        // A key that is needed still is not let go.
        reload(&[2], "is not among the keys any more, and still seals").await;
        key_file(folder.path(), &[2, 1]);
        let (code, text, errors) = said(rotate(&[])).await;
        assert_eq!((code, &*errors), (Some(0), ""), "{text}");
        assert!(text.contains(&format!("sealed again with key {new}.")), "{text}");
        assert!(text.contains(&format!("Key {old} seals nothing any more")), "{text}");
        reload(&[2], "keys read again").await;
        over.store(true, SeqCst);
    };
    let read = async {
        let mut number = 0;
        while !over.load(SeqCst) {
            number = (number + 7) % ids.len();
            // The first hundred are being changed.
            let answer =
                remote.send("GET", &format!("/v1/mcp-servers/{}?reveal=true", ids[number]), None).await.expect(200);
            assert!(number < 100 || answer["auth_token"] == token(number + 1), "{answer}");
            calls.fetch_add(1, SeqCst);
        }
    };
    let change = async {
        let mut marks = vec![String::new(); 100];
        let mut round = 0;
        while !over.load(SeqCst) {
            round += 1;
            let place = round % marks.len();
            marks[place] = format!("changed-{round}");
            let config = json!({"config": {"auth_token": marks[place]}});
            remote.send("PATCH", &format!("/v1/mcp-servers/{}", ids[place]), Some(&config)).await.expect(200);
            let mark = json!({"config": {"custom_headers": {"x-mark": format!("{round}")}}});
            remote.send("PATCH", &live, Some(&mark)).await.expect(200);
            let ran = remote.post(&run, &json!({})).await.expect(200);
            let headers: Value = serde_json::from_str(ran["func_return"].as_str().unwrap()).unwrap();
            assert_eq!(headers["x-mark"], format!("{round}"));
            calls.fetch_add(2, SeqCst);
        }
        marks
    };
    let ((), (), marks) = tokio::join!(rotation, read, change);
    assert!(calls.load(SeqCst) > 20, "there was load");
    // With the new key alone, after a restart too, everything is there, and what was changed meanwhile as it was changed.
    for _ in 0..2 {
        let list = Remote::new(&program.url).send("GET", "/v1/mcp-servers/?reveal=true", None).await.expect(200);
        let list =
            list.as_array().unwrap().iter().map(|server| (server["id"].as_str().unwrap(), &server["auth_token"]));
        let tokens: std::collections::HashMap<_, _> = list.collect();
        for (number, id) in ids.iter().enumerate() {
            let expected = marks.get(number).filter(|mark| !mark.is_empty()).cloned().unwrap_or(token(number + 1));
            assert_eq!(*tokens[&**id], expected, "server {number}");
        }
        program.signal("-TERM");
        assert_eq!(program.exit_code(), Some(0));
        program = Program::start(keyed(folder.path(), &database));
    }
    drop(program);
    // The old key opens nothing, and is refused.
    key_file(folder.path(), &[1]);
    refused(keyed(folder.path(), &database), "This is not the key").await;
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_writes_in_clear_is_never_taken_for_what_was_sealed() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let keys = key_file(folder.path(), &[1]);
    let mut program = Program::start(keyed(folder.path(), &database));
    let server = Remote::new(&program.url).create("kept", json!({"server_url": DEAD, "auth_token": "t"})).await;
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));

    // Also with nothing left that says that anything was ever sealed.
    let key = KeySource::new(None, Some(keys)).unwrap();
    let store = Store::open(database.url().as_deref(), &folder.path().join("portolan-data"), 2, key).await.unwrap();
    execute(&store, "DELETE FROM sealing_keys WHERE id <> $1", &[""]).await;
    let planted = r#"{"type":"streamable_http","server_url":"http://127.0.0.1:9/planted"}"#;
    execute(&store, "UPDATE servers SET config = $1", &[planted]).await;
    store.close().await;
    let program = Program::start(keyed(folder.path(), &database));
    let remote = Remote::new(&program.url);
    for hang_up in [false, true] {
        if hang_up {
            program.signal("-HUP");
        }
        let list = remote.send("GET", "/v1/mcp-servers/?reveal=true", None).await.expect(200);
        assert_eq!((&list[0]["id"], &list[0]["server_url"]), (&server["id"], &json!("")), "{list}");
        assert_eq!(list[0]["status"]["state"], "unreachable");
    }
    drop(program);
    database.remove().await;
}
