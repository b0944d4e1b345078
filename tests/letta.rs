//! `portolan migrate-letta`: what a Letta V1 database has arrives, or is named with the reason, and the database is not
//! touched. The data is what a real Letta 0.16.8 wrote (tests/data/letta-0.16.8.sql); as a SQLite file in all runs, and where
//! there is a PostgreSQL server also there, in the schema of Letta's image and in `public`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use portolan::model::SignIn;
use portolan::store::{Database as Pools, Place};
use serde_json::{Value, json};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::fake::{self, Fake, Script};
use crate::harness::{Database, KEY, Portolan, fake_mcp};
use crate::process::without_progress;

const LETTA_KEY: &str = "made-up-letta-encryption-key-1";
const DATA: &str = include_str!("data/letta-0.16.8.sql");

const FILES: &str = "mcp_server-c988e3b8-0348-48fb-bf8a-c19eb738e2d7";
const WEATHER: &str = "mcp_server-b747a65b-df0f-41e5-bc16-be29cc64442e";
const TICKETS: &str = "mcp_server-e3a5ea9e-ecc7-499d-ab73-a9261ccf4caf";
const SEALED_HTTP: &str = "mcp_server-bf5c580c-eaf9-40e7-a332-f1c257eb4036";
const SEALED_SSE: &str = "mcp_server-e264289e-5623-4385-b089-57f544f20ccb";
const MANY: &str = "mcp_server-8395ccef-7377-47ba-80ee-f5fe67806b04";
const THIEF: &str = "mcp_server-6db902f7-23c3-4c92-bae3-4a1700d7f308";
const SIGNED_IN: &str = "mcp_server-73a21472-199a-4d4d-bd2e-9630d93d22a8";
const LOCAL: &str = "mcp_server-52ef934b-d96e-44b5-a298-c9f3796c267c";
const READ: &str = "tool-e9ff5f1b-a630-43df-9e97-bd4324d9d7a2";
const WRITE: &str = "tool-cde5245c-8107-4648-8431-e9e4b3bf6d3e";
const SEARCH: &str = "tool-6bc2e52f-5d66-4fff-a337-4f6b12160525";
const LIST: &str = "tool-ba91f494-f758-4d81-a72e-6622807fbba0";
const USER: &str = "user-00000000-0000-4000-8000-000000000000";
const ORGANIZATION: &str = "org-00000000-0000-4000-8000-000000000000";

/// Where Letta keeps its tables.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Sqlite,
    /// In this schema.
    Postgres(&'static str),
}

/// Those that this run can try.
fn kinds() -> Vec<Kind> {
    let mut kinds = vec![Kind::Sqlite];
    if std::env::var("PORTOLAN_TEST_POSTGRES_URL").is_ok() {
        kinds.extend([Kind::Postgres("letta"), Kind::Postgres("public")]);
    }
    kinds
}

/// A Letta database of one test.
struct Letta {
    kind: Kind,
    file: PathBuf,
    database: Database,
    _folder: tempfile::TempDir,
}

impl Letta {
    async fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("letta.db");
        match kind {
            Kind::Sqlite => {
                let options = SqliteConnectOptions::new().filename(&file).create_if_missing(true);
                let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
                sqlx::raw_sql(AssertSqlSafe(sqlite())).execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
                Self { kind, file, database: Database::none(), _folder: folder }
            }
            Kind::Postgres(schema) => {
                let database = Database::new().await;
                let data = match schema {
                    "letta" => DATA.to_owned(),
                    schema => DATA.replace("CREATE SCHEMA letta;", "").replace("letta.", &format!("{schema}.")),
                };
                let mut connection = PgConnection::connect(&database.url().unwrap()).await.unwrap();
                sqlx::raw_sql(AssertSqlSafe(data)).execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
                Self { kind, file, database, _folder: folder }
            }
        }
    }

    fn url(&self) -> String {
        self.database.url().unwrap_or_else(|| format!("sqlite:{}", self.file.display()))
    }

    /// Does statements in which `{}` stands before each table.
    async fn execute(&self, sql: &str) {
        match self.kind {
            Kind::Sqlite => {
                let options = SqliteConnectOptions::new().filename(&self.file);
                let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
                sqlx::raw_sql(AssertSqlSafe(sql.replace("{}", ""))).execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
            Kind::Postgres(schema) => {
                let mut connection = PgConnection::connect(&self.database.url().unwrap()).await.unwrap();
                let sql = AssertSqlSafe(sql.replace("{}", &format!("{schema}.")));
                sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
        }
    }

    /// All that there is: of a file its bytes, its time and what is beside it, else all rows of all tables.
    async fn state(&self) -> Vec<String> {
        if self.kind == Kind::Sqlite {
            return files(self.file.parent().unwrap());
        }
        let mut connection = PgConnection::connect(&self.database.url().unwrap()).await.unwrap();
        const TABLES: &str = "SELECT n.nspname || '.' || c.relname || ' ' || CAST(c.relkind AS text) FROM pg_class c \
                              JOIN pg_namespace n ON n.oid = c.relnamespace \
                              WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') ORDER BY 1";
        let mut state: Vec<String> = sqlx::query_scalar(TABLES).fetch_all(&mut connection).await.unwrap();
        for table in state.clone().iter().filter_map(|table| table.strip_suffix(" r")) {
            let sql = format!(
                "SELECT '{table}' || CAST(ctid AS text) || CAST(xmin AS text) || CAST(t AS text) FROM {table} t ORDER BY ctid"
            );
            let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut connection).await.unwrap();
            state.extend(rows);
        }
        connection.close().await.unwrap();
        state
    }

    async fn remove(self) {
        self.database.remove().await;
    }
}

/// The statements of the data in SQLite's words, with times as SQLAlchemy writes them there.
fn sqlite() -> String {
    let mut script = String::new();
    for statement in DATA.split_inclusive(";\n") {
        let statement = statement.trim_start();
        if statement.starts_with("CREATE TABLE ") {
            script += &statement.replacen("letta.", "", 1).replace(" DEFAULT now()", "");
        } else if statement.starts_with("INSERT INTO ") {
            script += &statement.replacen("letta.", "", 1).replace("+00'", "'");
        }
    }
    assert_eq!(script.matches("CREATE TABLE ").count(), 6);
    script
}

/// Name, time and bytes of each file of a folder.
fn files(folder: &Path) -> Vec<String> {
    let read = |entry: std::fs::DirEntry| {
        let (path, modified) = (entry.path(), entry.metadata().unwrap().modified().unwrap());
        let bytes = std::fs::read(&path).unwrap();
        format!("{} {modified:?} {} {:x?}", path.display(), bytes.len(), bytes)
    };
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| read(entry.unwrap())).collect();
    files.sort();
    files
}

/// What the command said, and its progress.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
    progress: Vec<String>,
}

impl Said {
    #[track_caller]
    fn done(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{}", self.out);
        self.out
    }

    /// The one sentence of a refusal.
    #[track_caller]
    fn refused(self, part: &str) {
        assert!(self.code == Some(1) && self.err.contains(part), "{:?}: {}", self.code, self.err);
        assert_eq!(self.err.trim_end().lines().count(), 1, "one sentence: {}", self.err);
    }
}

/// Runs `portolan migrate-letta` with the settings of a Portolan.
async fn migrate(portolan: &Portolan, from: &str, key: Option<&str>, options: &[&str]) -> Said {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portolan"));
    for variable in ["DATABASE_URL", "PORTOLAN_KEY", "PORTOLAN_KEY_FILE", "LETTA_PG_URI", "LETTA_ENCRYPTION_KEY"] {
        command.env_remove(variable);
    }
    command.arg("migrate-letta").args(["--from", from, "--log", "warn"]).args(options);
    command.arg("--data-dir").arg(portolan.folder().join("data"));
    if let Some(url) = portolan.database_url() {
        command.env("DATABASE_URL", url).env("PORTOLAN_KEY", KEY);
    }
    if let Some(key) = key {
        command.env("LETTA_ENCRYPTION_KEY", key);
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (all, out) = (text(output.stderr), text(output.stdout));
    let err = without_progress(&all);
    let progress = all.lines().filter(|line| !err.contains(line)).map(str::to_owned).collect();
    let said = Said { code: output.status.code(), out, err, progress };
    for secret in ["made-up", LETTA_KEY, "FILES_API", "Authorization\":"] {
        assert!(!said.out.contains(secret) && !said.err.contains(secret), "{}{}", said.out, said.err);
    }
    said
}

/// The row of a server in the table, without its columns, and its notes.
#[track_caller]
fn row(out: &str, name: &str) -> (String, Vec<String>) {
    let mut lines = out.lines().skip_while(|line| !line.starts_with(&format!("{name} ")));
    let row = lines.next().unwrap_or_else(|| panic!("{name} is not in\n{out}"));
    let notes = lines.map_while(|line| line.strip_prefix("  - ")).map(str::to_owned).collect();
    (row.split_whitespace().skip(name.split(' ').count()).collect::<Vec<_>>().join(" "), notes)
}

/// What servers arrived, by name, with their secrets.
async fn servers(portolan: &Portolan) -> BTreeMap<String, Value> {
    let list = portolan.get("/v1/mcp-servers/?reveal=true").await.expect(200);
    let list = list.as_array().unwrap().iter();
    list.map(|server| (server["server_name"].as_str().unwrap().to_owned(), server.clone())).collect()
}

fn ids(tools: &[Value]) -> BTreeSet<&str> {
    tools.iter().map(|tool| tool["id"].as_str().unwrap()).collect()
}

async fn sign_in(portolan: &Portolan, server_id: &str) -> Option<SignIn> {
    const SQL: &str = "SELECT material FROM sign_ins WHERE server_id = $1";
    let store = &portolan.app.store;
    let sealed: Option<String> = match &store.database {
        Pools::Postgres(pool) => sqlx::query_scalar(SQL).bind(server_id).fetch_optional(pool).await.unwrap(),
        Pools::Sqlite { read, .. } => sqlx::query_scalar(SQL).bind(server_id).fetch_optional(read).await.unwrap(),
    };
    let place = Place { table: "sign_ins", column: "material", id: server_id };
    sealed.map(|sealed| serde_json::from_slice(&store.open_sealed(place, &sealed).unwrap()).unwrap())
}

/// The `json_schema` of each tool in the data, by the id of the tool.
async fn schemas(letta: &Letta) -> BTreeMap<String, Value> {
    assert_eq!(letta.kind, Kind::Sqlite);
    let options = SqliteConnectOptions::new().filename(&letta.file).read_only(true);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let rows: Vec<(String, String)> =
        sqlx::query_as("SELECT id, json_schema FROM tools").fetch_all(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    rows.into_iter().map(|(id, schema)| (id, serde_json::from_str(&schema).unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_server_tool_header_token_and_sign_in_arrives_and_nothing_changes_in_letta() {
    let plain = Letta::new(Kind::Sqlite).await;
    let schemas = schemas(&plain).await;
    for kind in kinds() {
        let letta = Letta::new(kind).await;
        let portolan = Portolan::start().await;
        let before = letta.state().await;
        let dry = migrate(&portolan, &letta.url(), Some(LETTA_KEY), &["--dry-run"]).await.done();
        assert!(dry.contains("This was a dry run: nothing was written."), "{dry}");
        assert_eq!(servers(&portolan).await.len(), 0, "{kind:?}");
        let done = migrate(&portolan, &letta.url(), Some(LETTA_KEY), &[]).await.done();
        let table = |out: &str| out.split("\n\n").next().unwrap().to_owned();
        assert_eq!(table(&dry), table(&done), "the dry run says what is done");
        assert!(done.contains("10 servers came to "), "{done}");

        let servers = servers(&portolan).await;
        let expected = json!({
            "files": [FILES, {"command": "python3", "args": ["/srv/mcp/tools.py", "read", "write", "search"],
                "env": {"FILES_ROOT": "/data", "FILES_API_KEY": "made-up-plain-env-1"}}],
            "weather": [WEATHER, {"server_url": "https://mcp.example.com/mcp", "custom_headers": null,
                "auth_header": "Authorization", "auth_token": "Bearer made-up-old-plaintext-token-1"}],
            "tickets": [TICKETS, {"server_url": "https://mcp.example.com/sse", "auth_token": null,
                "custom_headers": {"X-Api-Key": "made-up-plain-header-1", "X-Team": "blue"}}],
            "sealed-http": [SEALED_HTTP, {"server_url": "https://sealed.example.com/mcp",
                "auth_token": "Bearer made-up-sealed-token-1", "auth_header": "Authorization"}],
            "sealed-sse-renamed": [SEALED_SSE, {"server_url": "https://sealed.example.com/sse", "auth_header": null}],
            "many": [MANY, {"command": "python3", "args": ["/srv/mcp/tools.py", "120"], "env": null}],
            "thief": [THIEF, {"command": "python3", "args": ["/srv/mcp/tools.py", "search", "list"]}],
            "templated": ["mcp_server-83e1237d-c0ad-45e4-a64d-9cd6373f5e7f",
                {"auth_token": "Bearer {{ TPL_TOKEN | made-up-default }}"}],
            "local": [LOCAL, {"server_url": "http://localhost:9000/mcp"}],
            "signed-in": [SIGNED_IN, {"server_url": "https://oauth.example.com/mcp", "auth_token": null}],
        });
        let names: Vec<_> = servers.keys().collect();
        let mut all: Vec<_> = expected.as_object().unwrap().keys().collect();
        all.sort();
        assert_eq!(names, all);
        for (name, server) in &servers {
            assert_eq!(server["id"], expected[name][0], "{name}");
            assert_eq!(server["status"]["state"], "never_connected", "{name}");
            for (key, value) in expected[name][1].as_object().unwrap() {
                assert_eq!(&server[key], value, "{name}.{key}");
            }
        }
        assert_eq!(servers["files"]["created_at"].as_str().unwrap()[..26], *"2026-11-21T04:21:39.691436");
        assert_eq!(servers["sealed-sse-renamed"]["type"], "sse");
        let headers = servers["sealed-sse-renamed"]["custom_headers"].as_object().unwrap();
        assert!(headers.len() == 2 && headers.values().any(|value| value == "made-up-sealed-header-1"), "{headers:?}");

        for (server, tools) in [(FILES, &[READ, WRITE][..]), (THIEF, &[SEARCH, LIST])] {
            assert_eq!(ids(&portolan.tools(server).await), tools.iter().copied().collect());
        }
        let many = portolan.tools(MANY).await;
        assert_eq!((many.len(), many[7]["name"].as_str()), (120, Some("tool_007")), "in the server's order");
        for tool in many.iter().chain(&portolan.tools(FILES).await) {
            assert_eq!(tool["json_schema"], schemas[tool["id"].as_str().unwrap()]);
            let definition = &tool["metadata_"]["mcp"]["definition"];
            assert!(!definition.to_string().contains("request_heartbeat"), "{definition}");
        }
        assert!(row(&done, "files").1[1].contains("tool search is a tool of server thief in Letta"), "{done}");
        assert!(done.contains("Tool vic_echo does not come") && done.contains("refresh files afterwards"), "{done}");
        assert!(done.contains("1 sign-in does not come: never finished"), "{done}");

        let signed_in = sign_in(&portolan, SIGNED_IN).await.unwrap();
        assert_eq!(signed_in.access_token.expose(), "made-up-access-1");
        assert_eq!(signed_in.refresh_token.unwrap().expose(), "made-up-refresh-1");
        assert_eq!(signed_in.client_secret.unwrap().expose(), "made-up-client-secret-1");
        assert_eq!((signed_in.client_id.as_str(), signed_in.scope.as_deref()), ("client-made-up-1", Some("tools")));
        assert_eq!(signed_in.expires_at.unwrap().to_rfc3339(), "2031-01-01T00:00:00+00:00");
        assert_eq!((signed_in.server_url.as_str(), signed_in.issuer), ("https://oauth.example.com/mcp", None));
        assert!(sign_in(&portolan, WEATHER).await.is_none());

        // Once more, and nothing changes.
        let rows = portolan.get("/v1/mcp-servers/?reveal=true").await.text;
        let again = migrate(&portolan, &letta.url(), Some(LETTA_KEY), &[]).await.done();
        assert!(again.contains("There is nothing to do"), "{again}");
        assert_eq!(row(&again, "sealed-http"), ("streamable_http is here".to_owned(), vec![]));
        assert_eq!(portolan.get("/v1/mcp-servers/?reveal=true").await.text, rows);
        assert_eq!(portolan.tools(MANY).await, many);
        assert_eq!(letta.state().await, before, "{kind:?}: Letta is as it was");
        portolan.stop().await;
        letta.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_key_what_is_sealed_stays_and_the_rest_comes() {
    for kind in kinds() {
        for (key, why) in [
            (None, "it is sealed, and no key was given"),
            (Some("another-key"), "it is sealed with another key than the one given, or damaged"),
        ] {
            let letta = Letta::new(kind).await;
            let portolan = Portolan::start().await;
            let done = migrate(&portolan, &letta.url(), key, &[]).await.done();
            let sealed = ["sealed-http", "sealed-sse-renamed", "templated", "signed-in"];
            for name in sealed {
                let (line, notes) = row(&done, name);
                assert!(line.ends_with(" stays") && notes.len() == 1 && notes[0].ends_with(why), "{line} {notes:?}");
            }
            assert!(done.contains("6 servers came to ") && done.contains("4 servers stay in "), "{done}");
            assert!(done.contains("--without-secrets"), "it says what to do: {done}");
            let came = servers(&portolan).await;
            assert!(came.len() == 6 && sealed.iter().all(|name| !came.contains_key(*name)), "{came:?}");
            assert_eq!(came["tickets"]["custom_headers"]["X-Api-Key"], "made-up-plain-header-1");
            if key.is_none() {
                // The key from a file brings what stayed …
                let file = portolan.folder().join("letta-key");
                std::fs::write(&file, format!("{LETTA_KEY}\n")).unwrap();
                let file = file.to_str().unwrap();
                let done = migrate(&portolan, &letta.url(), None, &["--encryption-key-file", file]).await.done();
                assert!(done.contains("4 servers came to "), "{done}");
                let token = &servers(&portolan).await["sealed-http"]["auth_token"];
                assert_eq!(token, "Bearer made-up-sealed-token-1");
                assert!(sign_in(&portolan, SIGNED_IN).await.is_some());
            } else {
                // … and who has lost it takes the servers alone.
                let done = migrate(&portolan, &letta.url(), key, &["--without-secrets"]).await.done();
                assert!(done.contains("4 servers came to "), "{done}");
                assert_eq!(row(&done, "sealed-http").1, [format!("its token does not come: {why}")]);
                let server = &servers(&portolan).await["sealed-http"];
                assert_eq!((&server["auth_token"], &server["id"]), (&Value::Null, &json!(SEALED_HTTP)));
                assert!(sign_in(&portolan, SIGNED_IN).await.is_none());
            }
            portolan.stop().await;
            letta.remove().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_is_used_as_it_is_and_a_refresh_repairs_what_letta_gave_away() {
    let letta = Letta::new(*kinds().last().unwrap()).await;
    let portolan = Portolan::start_with(|settings| {
        settings.upstream.tools.tool_changes = portolan::config::ToolPolicy::Hold;
    })
    .await;
    let tool = |name: &str| {
        json!({"name": name, "title": "As the server has it", "description": format!("does {name}"),
            "inputSchema": {"type": "object", "properties": {"message": {"type": "string"}}}})
    };
    let script = portolan.script(&json!({"tools": [tool("search"), tool("write"), tool("echo")]}));
    // One text for all arguments, which Letta splits.
    let config = json!({"command": fake_mcp(), "args": [format!("stdio {}", script.0.display())], "env": null});
    let guarded = Script {
        require_header: Some(("authorization".to_owned(), "Bearer made-up-old-plaintext-token-1".to_owned())),
        ..Script::default()
    };
    let http = fake::http::serve(Fake::new(guarded));
    letta
        .execute(&format!(
            "UPDATE {{}}mcp_server SET stdio_config = '{config}' WHERE id = '{FILES}'; \
             UPDATE {{}}mcp_server SET server_url = '{}' WHERE id = '{WEATHER}'; \
             UPDATE {{}}tools SET name = 'echo' WHERE id = '{READ}'",
            http.url
        ))
        .await;
    migrate(&portolan, &letta.url(), None, &[]).await.done();

    let run = async |tool: &str| {
        let path = format!("/v1/mcp-servers/{FILES}/tools/{tool}/run");
        portolan.post(&path, &json!({"args": {"message": "as before"}})).await.expect(200)
    };
    assert_eq!(run(READ).await["func_return"], "as before", "a tool of Letta, by its id there");
    let refreshed = portolan.refresh(FILES).await.expect(200);
    assert_eq!(refreshed["added"], json!(["search"]));
    assert_eq!((&refreshed["deleted"], &refreshed["held"]), (&json!([]), &json!([])), "{refreshed}");
    let tools = portolan.tools(FILES).await;
    let names: Vec<_> = tools.iter().map(|tool| tool["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["search", "write", "echo"]);
    assert_eq!((&tools[1]["id"], &tools[2]["id"]), (&json!(WRITE), &json!(READ)), "ids are kept");
    assert_ne!(tools[0]["id"], SEARCH, "that one is the other server's");
    assert_eq!(tools[2]["metadata_"]["mcp"]["definition"]["title"], "As the server has it");
    assert!(ids(&portolan.tools(THIEF).await).contains(SEARCH));
    assert_eq!(run(READ).await["func_return"], "as before");

    assert_ne!(portolan.refresh(WEATHER).await.expect(200)["added"], json!([]), "it got the token it wants");
    portolan.stop().await;
    letta.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_come_is_named_with_the_reason() {
    for kind in kinds() {
        let letta = Letta::new(kind).await;
        let portolan = Portolan::start().await;
        let taken = portolan.create("tickets", json!({"server_url": "http://127.0.0.1:1/mcp"})).await;
        let copy = |id: &str, of: &str, name: &str, organization: &str, more: &str| {
            let (columns, values): (Vec<_>, Vec<_>) = more.split(';').filter_map(|pair| pair.split_once('=')).unzip();
            let add = |list: Vec<&str>| list.iter().map(|item| format!(", {item}")).collect::<String>();
            format!(
                "INSERT INTO {{}}mcp_server (id, server_name, server_type, organization_id, is_deleted{}) \
                 VALUES ('mcp_server-00000000-0000-4000-8000-{id:0>12}', '{name}', '{of}', '{organization}', false{});",
                add(columns),
                add(values)
            )
        };
        // Begun before their servers were registered.
        let sign_in_of = |number: &str, url: &str, user: &str, end: &str| {
            format!(
                "INSERT INTO {{}}mcp_oauth (id, state, server_url, server_name, token_type, status, created_at, updated_at, \
                 is_deleted, organization_id, user_id, access_token_enc, client_id, expires_at) \
                 VALUES ('mcp-oauth-{number}', 's{number}', '{url}', 'x', 'Bearer', 'authorized', '2026-11-22 00:00:00', \
                 '2026-11-22 00:00:00', false, '{ORGANIZATION}', '{user}', 'access-{number}', 'client', {end});"
            )
        };
        let http = "server_url='https://a.example.com/'";
        let long = "n".repeat(256);
        let sql = [
            copy("1", "stdio", "no command", ORGANIZATION, "stdio_config='{\"args\": []}'"),
            copy("2", "streamable_http", "no url", ORGANIZATION, ""),
            copy("3", "sse", "bad url", ORGANIZATION, "server_url='ftp://a.example.com/'"),
            copy("4", "websocket", "new type", ORGANIZATION, http),
            copy("5", "sse", &long, ORGANIZATION, http),
            copy("6", "sse", "bad header", ORGANIZATION, &format!("{http};custom_headers_enc='{{\"a b\": \"c\"}}'")),
            copy("7", "sse", "no headers", ORGANIZATION, &format!("{http};custom_headers_enc='[1]'")),
            copy(
                "8",
                "sse",
                " both ",
                ORGANIZATION,
                &format!("{http};token_enc='t';custom_headers_enc='{{\"\\\"X-Q\\\"\": \"q\"}}'"),
            ),
            copy(
                "9",
                "sse",
                "twice",
                ORGANIZATION,
                &format!("{http};token_enc='t';custom_headers_enc='{{\"authorization\": \"q\"}}'"),
            ),
            copy("NOT_LOWER_CA", "sse", "bad id", ORGANIZATION, http),
            copy("10", "sse", "control\u{1b}[31m", ORGANIZATION, http),
            "INSERT INTO {}organizations (id, name, is_deleted, privileged_tools) VALUES ('org-2', 'second', false, false);"
                .to_owned(),
            "INSERT INTO {}users (id, name, is_deleted, organization_id) VALUES ('user-2', 'b', false, 'org-2');".to_owned(),
            copy("11", "sse", "weather", "org-2", &format!("{http};created_at='2026-12-01 00:00:00'")),
            copy("12", "sse", "only there", "org-2", http),
            sign_in_of("3", "http://localhost:9000/mcp", USER, "NULL"),
            sign_in_of("4", "https://mcp.example.com/mcp", USER, "'2020-01-01 00:00:00'"),
            sign_in_of("5", "https://mcp.example.com/sse", "user-2", "NULL"),
            format!("UPDATE {{}}mcp_server SET is_deleted = true WHERE id = '{THIEF}';"),
            format!("UPDATE {{}}tools SET id = 'tool/odd' WHERE id = '{WRITE}';"),
        ];
        letta.execute(&sql.concat()).await;
        let before = letta.state().await;
        let done = migrate(&portolan, &letta.url(), None, &[]).await.done();
        for (name, kind, note) in [
            ("no command", "stdio", "its command cannot be read"),
            ("no url", "streamable_http", "it has no URL"),
            ("bad url", "sse", "Portolan refuses its server_url: "),
            ("new type", "websocket", "Portolan does not know this type of server"),
            (&long[..255], "sse", "Portolan refuses its server_name: A name has 1 to 255 characters"),
            ("bad header", "sse", "Portolan refuses its custom_headers.a b: "),
            ("no headers", "sse", "its headers cannot be read"),
            ("bad id", "sse", "its id is not one that Letta makes"),
            ("control\\u{1b}[31m", "sse", "Portolan refuses its server_name: "),
            ("tickets", "sse", "another server in Portolan has this name"),
        ] {
            let (line, notes) = row(&done, name);
            assert_eq!(line, format!("{kind} stays"), "{done}");
            assert!(notes[0].starts_with(note), "{notes:?}");
        }
        let mut clash = done.lines().skip_while(|line| !line.starts_with("weather ") || !line.contains("stays"));
        assert!(clash.nth(1).unwrap().contains("an older server, of another organization"), "{done}");
        for part in ["1 server that Letta counts as deleted does not come", "These are the servers of 2 organizations"]
        {
            assert!(done.contains(part), "{part}: {done}");
        }
        let orphans = done.lines().find(|line| line.starts_with("Tools ")).unwrap();
        assert!(orphans.contains("list") && orphans.contains("vic_echo"), "{orphans}");
        assert!(
            row(&done, "files").1.iter().any(|note| note.starts_with("tool write does not come: its id")),
            "{done}"
        );

        let came = servers(&portolan).await;
        assert_eq!(came["tickets"]["id"], taken["id"], "the other one is as it was");
        assert_eq!(came["tickets"]["server_url"], taken["server_url"]);
        let both = &came["both"];
        assert_eq!((&both["auth_token"], &both["custom_headers"]), (&json!("Bearer t"), &json!({"X-Q": "q"})));
        let twice = &came["twice"];
        assert_eq!((&twice["auth_token"], &twice["custom_headers"]), (&Value::Null, &json!({"authorization": "q"})));
        assert_eq!(came["weather"]["id"], WEATHER);
        assert_eq!(came["only there"]["id"], "mcp_server-00000000-0000-4000-8000-000000000012");
        assert!(!came.contains_key("thief"));
        assert_eq!(sign_in(&portolan, LOCAL).await.unwrap().access_token.expose(), "access-3", "found by its URL");
        let notes = row(&done, "weather").1;
        assert!(
            notes.contains(&"its sign-in does not come: it has expired and cannot be renewed".to_owned()),
            "{notes:?}"
        );
        assert!(done.contains("1 sign-in does not come: of a server that is not here, or of another user."), "{done}");
        // The tool that was taken over has one server left that lists it.
        assert!(ids(&portolan.tools(FILES).await).contains(SEARCH));

        // What is changed here stays as it is, and a name that is free by then comes.
        let patch = json!({"server_name": "mine", "config": {"server_url": "https://other.example.com/"}});
        portolan.patch(&format!("/v1/mcp-servers/{WEATHER}"), &patch).await.expect(200);
        portolan.delete(&format!("/v1/mcp-servers/{}", taken["id"].as_str().unwrap())).await.expect(204);
        let again = migrate(&portolan, &letta.url(), None, &["--organization", "second"]).await.done();
        assert_eq!(row(&again, "only there").0, "sse is here");
        assert!(again.contains("1 server came to ") && !again.contains("tickets"), "{again}");
        let again = migrate(&portolan, &letta.url(), None, &["--organization", ORGANIZATION]).await.done();
        let (line, notes) = row(&again, "weather");
        assert_eq!(line, "streamable_http is here");
        assert!(notes[0].contains("called mine in Portolan") && notes[1].contains("and stays"), "{notes:?}");
        let came = servers(&portolan).await;
        assert_eq!(came["mine"]["server_url"], "https://other.example.com/");
        assert_eq!(
            (&came["weather"]["id"], &came["tickets"]["id"]),
            (&json!("mcp_server-00000000-0000-4000-8000-000000000011"), &json!(TICKETS))
        );
        assert_eq!(letta.state().await, before);
        portolan.stop().await;
        letta.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn older_versions_lack_columns_and_tables_and_come_all_the_same() {
    for kind in kinds() {
        let letta = Letta::new(kind).await;
        let portolan = Portolan::start().await;
        letta
            .execute(
                "ALTER TABLE {}mcp_server DROP COLUMN token_enc; \
                 UPDATE {}mcp_server SET custom_headers = custom_headers_enc WHERE custom_headers_enc LIKE '{%'; \
                 ALTER TABLE {}mcp_server DROP COLUMN custom_headers_enc; \
                 DROP TABLE {}mcp_tools; \
                 UPDATE {}mcp_oauth SET access_token = 'made-up-old-access', refresh_token = NULL; \
                 ALTER TABLE {}mcp_oauth DROP COLUMN access_token_enc; \
                 ALTER TABLE {}mcp_oauth DROP COLUMN refresh_token_enc; \
                 ALTER TABLE {}mcp_oauth DROP COLUMN client_secret_enc; \
                 UPDATE {}tools SET metadata_ = NULL; \
                 CREATE TABLE {}alembic_version (version_num varchar(32) NOT NULL); \
                 INSERT INTO {}alembic_version VALUES ('f6cd5a1e519d')"
                    // PostgreSQL does not make JSON of text by itself.
                    .replace(
                        "= custom_headers_enc W",
                        match kind {
                            Kind::Sqlite => "= custom_headers_enc W",
                            Kind::Postgres(_) => "= custom_headers_enc::json W",
                        },
                    )
                    .as_str(),
            )
            .await;
        let done = migrate(&portolan, &letta.url(), None, &[]).await.done();
        assert!(done.contains("10 servers came to "), "{done}");
        let came = servers(&portolan).await;
        assert_eq!(came["weather"]["auth_token"], "Bearer made-up-old-plaintext-token-1");
        assert_eq!(came["tickets"]["custom_headers"]["X-Team"], "blue");
        assert_eq!(ids(&portolan.tools(FILES).await), BTreeSet::from([READ, WRITE]), "found by the tag alone");
        assert_eq!(sign_in(&portolan, SIGNED_IN).await.unwrap().access_token.expose(), "made-up-old-access");

        // A version that nobody knows is read only when that is asked for.
        letta.execute("UPDATE {}alembic_version SET version_num = 'ffffffffffff'").await;
        let refused = migrate(&portolan, &letta.url(), None, &[]).await;
        refused.refused("is of a version of Letta that is not known here (ffffffffffff)");
        migrate(&portolan, &letta.url(), None, &["--any-version"]).await.done();
        letta.execute("ALTER TABLE {}mcp_server DROP COLUMN server_url").await;
        let refused = migrate(&portolan, &letta.url(), None, &["--any-version"]).await;
        refused.refused("its table mcp_server has no server_url");
        portolan.stop().await;
        letta.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_read_gets_one_sentence() {
    let portolan = Portolan::start().await;
    let folder = tempfile::tempdir().unwrap();
    let sqlite = |name: &str| format!("sqlite:{}", folder.path().join(name).display());
    let refused = async |from: &str, options: &[&str], part: &str| {
        migrate(&portolan, from, None, options).await.refused(part);
    };
    refused("mysql://localhost/letta", &[], "is given as postgres://… or sqlite:FILE").await;
    refused("postgres://letta@127.0.0.1:1/letta", &[], "Cannot read the PostgreSQL database").await;
    refused(&sqlite("missing"), &[], "No such file").await;
    assert!(!folder.path().join("missing").exists(), "none is made");
    std::fs::write(folder.path().join("empty"), "").unwrap();
    refused(&sqlite("empty"), &[], "no Letta has used it").await;
    std::fs::write(folder.path().join("text"), "not a database".repeat(100)).unwrap();
    refused(&sqlite("text"), &[], "file is not a database").await;
    let options = SqliteConnectOptions::new().filename(folder.path().join("other")).create_if_missing(true);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::raw_sql("CREATE TABLE tools (id text)").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    refused(&sqlite("other"), &[], "There are no MCP servers of a Letta in").await;
    for kind in kinds() {
        let letta = Letta::new(kind).await;
        refused(&letta.url(), &["--schema", "elsewhere"], "no MCP servers of a Letta in").await;
        refused(&letta.url(), &["--organization", "nobody"], "No server in this Letta is of that organization.").await;
        if kind == Kind::Postgres("letta") {
            letta.execute("CREATE TABLE public.mcp_server (LIKE letta.mcp_server)").await;
            refused(&letta.url(), &[], "in the schemas letta and public; choose with --schema").await;
            migrate(&portolan, &letta.url(), None, &["--schema", "letta", "--dry-run"]).await.done();
            letta.execute("DROP TABLE public.mcp_server").await;
            // Whatever a schema is called, it does not steer a terminal.
            let add = "CREATE SCHEMA \"z\u{1b}[2J\"; CREATE TABLE \"z\u{1b}[2J\".mcp_server (LIKE letta.mcp_server)";
            letta.execute(add).await;
            refused(&letta.url(), &[], r"in the schemas letta and z\u{1b}[2J; choose").await;
            letta.execute("DROP SCHEMA \"z\u{1b}[2J\" CASCADE").await;
        }
        letta.execute("DELETE FROM {}mcp_oauth; DELETE FROM {}mcp_server").await;
        refused(&letta.url(), &[], "Letta has no MCP servers in ").await;
        letta.remove().await;
    }
    // Portolan's own database is none of Letta's, and would be written to.
    let own = portolan.database_url();
    let own = own.unwrap_or_else(|| format!("sqlite:{}", portolan.folder().join("data/portolan.db").display()));
    refused(&own, &[], "Letta and Portolan need a database each").await;
    assert_eq!(servers(&portolan).await.len(), 0);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_a_letta_is_no_target_however_it_is_spelled() {
    for kind in kinds() {
        let (letta, other) = (Letta::new(kind).await, Letta::new(kind).await);
        let portolan = Portolan::start().await;
        let mut targets = vec![letta.url(), other.url()];
        match kind {
            Kind::Sqlite => {
                let link = letta.file.with_file_name("link.db");
                std::fs::hard_link(&letta.file, &link).unwrap();
                targets.push(format!("sqlite:{}", link.display()));
            }
            Kind::Postgres(_) => targets.push(letta.url().replace("127.0.0.1", "localhost")),
        }
        let before = (letta.state().await, other.state().await);
        for target in targets {
            let said = migrate(&portolan, &letta.url(), None, &["--database-url", &target]).await;
            said.refused("Letta and Portolan need a database each; give Portolan's with --database-url.");
        }
        assert_eq!((letta.state().await, other.state().await), before);
        assert_eq!(servers(&portolan).await.len(), 0);
        migrate(&portolan, &letta.url(), None, &["--unsealed", "--dry-run"]).await.done();
        portolan.stop().await;
        letta.remove().await;
        other.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_letta_left_with_a_journal_is_read_whole_and_left_alone() {
    let letta = Letta::new(Kind::Sqlite).await;
    let portolan = Portolan::start().await;
    let options = SqliteConnectOptions::new().filename(&letta.file).journal_mode(SqliteJournalMode::Wal);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let rename = format!("UPDATE mcp_server SET server_name = 'in the journal' WHERE id = '{MANY}'");
    sqlx::raw_sql(AssertSqlSafe(rename)).execute(&mut connection).await.unwrap();
    // As a Letta that is killed leaves it.
    let left = tempfile::tempdir().unwrap();
    for suffix in ["", "-wal"] {
        let from = format!("{}{suffix}", letta.file.display());
        std::fs::copy(from, left.path().join(format!("letta.db{suffix}"))).unwrap();
    }
    connection.close().await.unwrap();
    let before = files(left.path());
    assert_eq!(before.len(), 2);
    let url = format!("sqlite://{}", left.path().join("letta.db").display());
    migrate(&portolan, &url, None, &[]).await.done();
    assert_eq!(servers(&portolan).await["in the journal"]["id"], MANY);
    assert_eq!(files(left.path()), before);
    portolan.stop().await;
    letta.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_report_in_json_says_what_the_lines_say() {
    const PARTS: [(&str, &str); 5] = [
        ("tools", "tool"),
        ("variables", "variable"),
        ("tokens", "token"),
        ("headers", "header"),
        ("sign_ins", "sign-in"),
    ];
    for kind in kinds() {
        let letta = Letta::new(kind).await;
        let portolan = Portolan::start().await;
        let url = letta.url();
        let document = |said: &Said| serde_json::from_str::<Value>(&said.out).expect("one document");
        // Without the key some stay.
        let plain = migrate(&portolan, &url, None, &["--dry-run"]).await.done();
        let dry = migrate(&portolan, &url, None, &["--dry-run", "--json"]).await;
        let report = document(&dry);
        assert_eq!(dry.progress[..2], ["reading Letta's database", "looking at servers: 0 of 10"]);
        dry.done();
        let written = migrate(&portolan, &url, None, &["--json"]).await;
        assert!(written.progress.iter().any(|line| line.starts_with("writing servers: ")), "{:?}", written.progress);
        let written = document(&written);
        assert_eq!((&report["dry_run"], &report["came"], &report["closed"]), (&json!(true), &json!(0), &json!(4)));
        assert_eq!((&written["dry_run"], &written["came"]), (&json!(false), &json!(6)));
        assert_eq!((&written["servers"], &written["remarks"]), (&report["servers"], &report["remarks"]));
        let listed = report["servers"].as_array().unwrap();
        assert_eq!(listed.len(), 10);
        let came = servers(&portolan).await;
        for server in listed {
            let name = server["server_name"].as_str().unwrap();
            let (line, notes) = row(&plain, name);
            let kind = server["mcp_server_type"].as_str().unwrap();
            let mut words = vec![];
            for (key, noun) in PARTS {
                let number = server["with"][key].as_u64().unwrap();
                if number > 0 || key == "tools" {
                    words.push(format!("{number} {noun}{}", if number == 1 { "" } else { "s" }));
                }
            }
            match server["fate"].as_str().unwrap() {
                "comes" => {
                    assert_eq!(line, format!("{kind} comes {}", words.join(", ")), "{name}");
                    assert_eq!(came[name]["id"], server["id"]);
                }
                fate => assert_eq!((line, fate), (format!("{kind} stays"), "stays"), "{name}"),
            }
            let said: Vec<_> = ["reasons", "notes"].iter().flat_map(|key| server[key].as_array().unwrap()).collect();
            assert_eq!(said, notes.iter().map(|note| note.as_str()).collect::<Vec<_>>(), "{name}");
        }
        for remark in report["remarks"].as_array().unwrap() {
            assert!(plain.contains(remark.as_str().unwrap()), "{remark}");
        }
        assert!(report["to"].is_string() && plain.contains(report["from"].as_str().unwrap()), "{report}");

        // An error comes with what is known all the same.
        let other = Portolan::start().await;
        letta.execute("UPDATE {}mcp_server SET server_type = 'new'").await;
        let refused = migrate(&other, &url, None, &["--json"]).await;
        let report = document(&refused);
        assert_eq!((refused.code, &report["error"]["detail"]), (Some(1), &json!("None of these servers can come.")));
        assert_eq!(report["servers"].as_array().unwrap().len(), 10);
        refused.refused("None of these servers can come.");
        let nowhere = migrate(&other, "sqlite:/nowhere/letta.db", None, &["--json"]).await;
        let error = document(&nowhere)["error"]["detail"].as_str().unwrap().to_owned();
        assert_eq!(document(&nowhere).as_object().unwrap().len(), 1);
        nowhere.refused(&error);
        other.stop().await;
        portolan.stop().await;
        letta.remove().await;
    }
}
