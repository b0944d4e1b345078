//! Canaries: secrets are planted wherever Portolan is given one, every route and every failure is gone through with the log
//! at its most talkative, and none is found in an answer, the log, the database, or what a process listing shows.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use futures_util::{StreamExt, stream};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::Row;

use crate::fake::{self, Fake, Script};
use crate::harness::{Database, client, eventually, fake_mcp};
use crate::process::{Program, command};

/// By its place: nothing in its looks says that it is one.
fn canary(name: &str) -> String {
    format!("canary-{name}-bird")
}

/// By its looks.
fn token_of(name: &str) -> String {
    format!("sk-canary-{name}-bird")
}

/// What every canary contains.
const BIRD: &str = "-bird";

/// An upstream that answers each request with all that it was sent, in the way that the path says.
async fn parrot() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(echo);
    tokio::spawn(async move { axum::serve(listener, router).await });
    address.to_string()
}

async fn echo(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let mut heard = format!("{} ", parts.uri);
    for value in parts.headers.values() {
        heard += &format!("{} ", value.to_str().unwrap_or_default());
    }
    heard += &String::from_utf8_lossy(&body);
    let visible: String = heard.chars().filter(|c| c.is_ascii_graphic() && *c != '"' && *c != '\\').collect();
    let id = serde_json::from_slice::<Value>(&body).map(|message| message["id"].clone()).unwrap_or_default();
    let error = json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32000, "message": heard, "data": heard}});
    let answer = |status: u16, kind: &str, text: String| {
        let mut response = Response::new(Body::from(text));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        response.headers_mut().insert("content-type", HeaderValue::from_str(kind).unwrap());
        response
    };
    let with = |mut response: Response, name: &'static str, value: String| {
        response.headers_mut().insert(name, HeaderValue::from_str(&value).unwrap());
        response
    };
    match parts.uri.path().split('/').nth(1).unwrap_or_default() {
        "error-500" => answer(500, "text/plain", heard),
        "error-400" => answer(400, "application/json", error.to_string()),
        "challenge" => {
            with(answer(401, "text/plain", heard), "www-authenticate", format!("Bearer error=\"{visible}\""))
        }
        "redirect" => with(answer(307, "text/plain", heard), "location", format!("http://127.0.0.1:9/?{visible}")),
        "pause" => with(answer(429, "text/plain", heard), "retry-after", visible),
        "rpc-error" => answer(200, "application/json", error.to_string()),
        "no-json" => answer(200, "application/json", heard),
        "html" => answer(200, "text/html", heard),
        "session" => with(answer(200, "application/json", "{}".to_owned()), "mcp-session-id", visible),
        "events" => answer(200, "text/event-stream", format!("event: {visible}\ndata: {visible}\n\n")),
        "endpoint" => {
            answer(200, "text/event-stream", format!("event: endpoint\ndata: http://127.0.0.1:9/{visible}\n\n"))
        }
        _ => answer(404, "text/plain", heard),
    }
}

/// Everything that a client was told.
struct Told {
    client: reqwest::Client,
    answers: Vec<(String, String)>,
}

impl Told {
    fn nothing(client: reqwest::Client) -> Self {
        Self { client, answers: Vec::new() }
    }

    async fn ask(&mut self, program: &Program, method: &str, path: &str, body: Option<String>) -> (u16, String) {
        self.ask_with(&canary("admin-token"), program, method, path, body).await
    }

    async fn ask_with(
        &mut self,
        token: &str,
        program: &Program,
        method: &str,
        path: &str,
        body: Option<String>,
    ) -> (u16, String) {
        let mut request = self
            .client
            .request(method.parse::<Method>().unwrap(), format!("{}{path}", program.url))
            .timeout(Duration::from_secs(30))
            .header("authorization", format!("Bearer {token}"))
            .header("x-bare-password", format!("password {token}"))
            .header("cookie", canary("client-cookie"))
            .header("x-portolan-variables", json!({"PLANTED": canary("request-variable")}).to_string());
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let mut text = format!("{:?}\n", response.headers());
        let body = response.text().await.unwrap();
        text += &body;
        self.answers.push((format!("{method} {path} -> {status}"), text));
        (status, body)
    }

    async fn json(&mut self, program: &Program, method: &str, path: &str, body: &Value) -> Value {
        let (_, text) = self.ask(program, method, path, Some(body.to_string())).await;
        serde_json::from_str(&text).unwrap_or_default()
    }
}

/// Every table of the database as one text.
pub(crate) async fn dump(database: &Database, data: &Path) -> String {
    let Some(url) = database.url() else {
        let mut text = String::new();
        for entry in std::fs::read_dir(data).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            // What commands keep in their homes is theirs.
            if name == "children" {
                continue;
            }
            assert!(name.starts_with("portolan.db"), "{name}: the key was given, and no other file is needed");
            text += &String::from_utf8_lossy(&std::fs::read(entry.path()).unwrap());
        }
        assert!(text.contains("CREATE TABLE"));
        return text;
    };
    let pool = sqlx::PgPool::connect(&url).await.unwrap();
    let tables = "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'public'";
    let tables: Vec<String> = sqlx::query_scalar(tables).fetch_all(&pool).await.unwrap();
    assert!(tables.contains(&"servers".to_owned()));
    let mut text = String::new();
    for table in tables {
        let rows = sqlx::AssertSqlSafe(format!("SELECT t::text FROM {table} t"));
        for row in sqlx::query(rows).fetch_all(&pool).await.unwrap() {
            text += &row.get::<String, _>(0);
        }
    }
    pool.close().await;
    text
}

#[track_caller]
pub(crate) fn assert_none(what: &str, text: &str) {
    for bird in [BIRD, "LWJpcm", "1iaXJk", "tYmlyZ"] {
        // The last three are what base64 makes of it, wherever it stands in a text.
        if let Some(place) = text.find(bird) {
            let start = text.floor_char_boundary(place.saturating_sub(300));
            let end = text.floor_char_boundary((place + 100).min(text.len()));
            panic!("{what}: …{}…", &text[start..end]);
        }
    }
}

fn proc(pid: u32, file: &str) -> String {
    String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default()).into_owned()
}

/// Goes through every route for one server, with canaries wherever a client can write something; one that is `registered`
/// is not deleted.
async fn ask_everything(
    client: reqwest::Client,
    program: &Program,
    id: &str,
    registered: bool,
    wrong: &[Value],
) -> Told {
    let mut told = Told::nothing(client);
    let tool_id = "tool-00000000-0000-4000-8000-000000000000";
    for route in portolan::api::routes() {
        let method = route.method.as_str();
        if method == "DELETE" && registered {
            continue;
        }
        let path = |tool: &str| {
            let path = route.path.replace("{mcp_server_id}", id).replace("{tool_id}", tool);
            path.replace("{file}", &canary("file")).replace("{session_id}", &canary("session"))
        };
        let query = format!("reveal={q}&agent_id={q}%0A&token={q}", q = canary("query"));
        told.ask(program, method, &path(tool_id), None).await;
        // The first wrong tokens are 401, those after them 429.
        let (status, _) = told.ask_with(&canary("wrong-token"), program, method, &path(tool_id), None).await;
        assert!([401, 429].contains(&status) || route.access == portolan::api::Access::Open, "{status} {}", route.path);
        told.ask(program, method, &format!("{}?{query}", path(tool_id)), None).await;
        told.ask(program, "PUT", &path(&canary("tool")), None).await;
        if method == "POST" || (method == "PATCH" && !route.path.ends_with("refresh")) {
            for body in wrong.iter().map(Value::to_string).chain([format!("{{\"a\": {}", canary("json"))]) {
                let (status, _) = told.ask(program, method, &path(tool_id), Some(body)).await;
                assert!(status >= 400, "{method} {}", route.path);
            }
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn no_planted_secret_is_found_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let log = folder.path().join("log");
    // In clear it is one more canary; the test server takes any password.
    let key = format!("{:x<32}", canary("key"));
    let mut start = command(folder.path(), database.url().as_deref());
    start
        .env("PORTOLAN_TOKEN", canary("admin-token"))
        .env("PORTOLAN_KEY", base64(&key))
        .env("PORTOLAN_LOG", "trace")
        .env("PORTOLAN_HANDSHAKE_TIMEOUT", "1s");
    start.env("PORTOLAN_START_TIMEOUT", "1s").stderr(std::fs::File::create(&log).unwrap());
    if let Some(url) = database.url() {
        let mut url = reqwest::Url::parse(&url).unwrap();
        url.set_password(Some(&canary("database-password"))).unwrap();
        start.env("DATABASE_URL", url.as_str());
    }
    start.arg("--data-dir").arg(folder.path().join("data"));
    let mut program = Program::start(start);
    let mut told = Told::nothing(client());
    let parrot = parrot().await;
    let mut ids = Vec::new();

    // Servers that fail in every way, and are given a secret in every place.
    let failures = [
        "error-500",
        "error-400",
        "challenge",
        "redirect",
        "pause",
        "rpc-error",
        "no-json",
        "html",
        "session",
        "events",
        "endpoint",
        "not-found",
    ];
    for kind in ["streamable_http", "sse"] {
        for failure in failures {
            let name = |place: &str| canary(&format!("{kind}-{failure}-{place}"));
            let config = json!({
                "mcp_server_type": kind,
                "server_url": format!(
                    "http://user:{}@{parrot}/{failure}/{}?api_key={}&page=1", name("password"), token_of("path"), name("query")
                ),
                "auth_header": "X-Key", "auth_token": name("token"),
                "custom_headers": {
                    "X-Custom": name("header"), "X-Bearer": format!("Bearer {}", name("bearer")), "X-Filled": "{{ PLANTED }}",
                },
            });
            let body = json!({"server_name": format!("{kind} {failure}"), "config": config});
            let server = told.json(&program, "POST", "/v1/mcp-servers/", &body).await;
            assert!(
                ["unreachable", "auth_required"].contains(&server["status"]["state"].as_str().unwrap()),
                "{server}"
            );
            ids.push(server["id"].as_str().unwrap().to_owned());
        }
    }
    for (name, script) in [
        ("dies", "echo \"$API_TOKEN and $PLAIN, $*\" >&2; exit 3"),
        ("hangs", "echo \"$API_TOKEN and $PLAIN, $*\" >&2; sleep 60"),
        ("chats", "echo \"$API_TOKEN and $PLAIN, $*\"; exit 0"),
        (
            "talks",
            "read x; echo \"{\\\"jsonrpc\\\":\\\"2.0\\\",\\\"id\\\":0,\\\"error\\\":{\\\"code\\\":1,\\\"message\\\":\\\"$API_TOKEN\\\"}}\"; sleep 60",
        ),
        ("floods", "echo 'before' >&2; printf \"%0100000d$API_TOKEN and $*\" 0 >&2; exit 3"),
    ] {
        let config = json!({
            "command": "/bin/sh",
            "args": ["-c", script, "sh", "--token", canary("flag"), format!("--key={}", canary("named")), token_of("argument"), "{{ PLANTED }}"],
            "env": {"API_TOKEN": canary("variable"), "PLAIN": token_of("plain-variable")},
        });
        let body = json!({"server_name": name, "config": config});
        let server = told.json(&program, "POST", "/v1/mcp-servers/", &body).await;
        if name == "dies" {
            let error = server["status"]["error"].as_str().unwrap();
            assert!(error.contains("******** and ********"), "its last words, without the secrets: {error}");
        }
        ids.push(server["id"].as_str().unwrap().to_owned());
    }
    // Servers that work, and one that refuses to list what it has.
    let script = Script { list_error: Some(json!({"code": -32000, "message": canary("listed")})), ..Script::default() };
    let refuses = fake::http::serve(Fake::new(script));
    let works = fake::http::serve(Fake::new(Script::default()));
    for (name, url) in [("refuses", &refuses.url), ("works", &works.url)] {
        let config = json!({"server_url": url, "auth_token": canary("listed")});
        let server =
            told.json(&program, "POST", "/v1/mcp-servers/", &json!({"server_name": name, "config": config})).await;
        ids.push(server["id"].as_str().unwrap().to_owned());
    }
    let config = json!({"command": fake_mcp(), "args": ["stdio"], "env": {"API_TOKEN": canary("of-a-child")}});
    let child =
        told.json(&program, "POST", "/v1/mcp-servers/", &json!({"server_name": "child", "config": config})).await;
    assert_eq!(child["status"]["state"], "ready", "{child}");
    ids.push(child["id"].as_str().unwrap().to_owned());

    // Arguments and results are their caller's alone, and so are a tool's own errors.
    let tools = |server: &str| format!("/v1/mcp-servers/{server}/tools");
    for server in &ids[ids.len() - 2..] {
        let listed = told.ask(&program, "GET", &tools(server), None).await.1;
        let listed: Value = serde_json::from_str(&listed).unwrap();
        for tool in listed.as_array().unwrap() {
            let name = tool["name"].as_str().unwrap();
            if !["echo", "headers", "env", "fail", "rpc_error", "args", "structured", "die"].contains(&name) {
                continue;
            }
            let run = format!("{}/{}/run", tools(server), tool["id"].as_str().unwrap());
            let body = json!({"args": {"message": canary("run-argument")}}).to_string();
            let (status, text) = told.ask(&program, "POST", &run, Some(body)).await;
            assert_eq!(status, 200, "{text}");
            assert!(name != "echo" || text.contains(BIRD), "the run's own result is untouched: {text}");
            told.answers.pop();
        }
    }

    // A tool that was there, and cannot be reached any more.
    let works = &ids[ids.len() - 2];
    let listed = told.ask(&program, "GET", &tools(works), None).await.1;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    for failure in failures {
        let url = format!("http://user:{}@{parrot}/{failure}?sig={}", canary("run-password"), canary("run-query"));
        let change = json!({"config": {"server_url": url, "auth_header": "X-Key", "auth_token": canary("run-token")}})
            .to_string();
        let (status, _) = told.ask(&program, "PATCH", &format!("/v1/mcp-servers/{works}"), Some(change)).await;
        assert_eq!(status, 200);
        let run = format!("{}/{}/run", tools(works), listed[0]["id"].as_str().unwrap());
        let body = json!({"args": {"message": canary("unsent-argument")}}).to_string();
        let (status, text) = told.ask(&program, "POST", &run, Some(body)).await;
        assert_eq!(status, 502, "{text}");
    }

    // Every route, for each server, with canaries wherever a client can write something.
    let wrong = [
        json!({"server_name": canary("name-\u{7}"), "config": {"server_url": canary("url"), "auth_token": format!("{}\n", canary("t"))}}),
        json!({"server_name": "w", "config": {"server_url": format!("http://{}", canary("user")), "token": canary("t"), "env": canary("e")}}),
        json!({"server_name": "w", "config": {"command": 5, "args": canary("args"), "env": {"A": [canary("env")]}}}),
        json!({"config": {"auth_token": "********", "custom_headers": {"x": format!("{}\r\n", canary("h"))}}}),
        json!({"args": {"a": canary("args")}}),
        json!([canary("list")]),
    ];
    let (id, unknown) = (canary("id"), "mcp_server-00000000-0000-4000-8000-000000000000");
    let all: Vec<&str> = ids.iter().map(String::as_str).chain([&*id, unknown]).collect();
    let asking =
        all.iter().map(|id| ask_everything(told.client.clone(), &program, id, ids.iter().any(|own| own == id), &wrong));
    let answers: Vec<Told> = stream::iter(asking).buffer_unordered(8).collect().await;
    told.answers.extend(answers.into_iter().flat_map(|told| told.answers));
    told.ask(&program, "GET", &format!("/{}", canary("path")), None).await;
    // What an admin asks for is there.
    let revealed = format!("/v1/mcp-servers/{}?reveal=true", ids[0]);
    assert!(told.ask(&program, "GET", &revealed, None).await.1.contains(&canary("streamable_http-error-500-token")));
    told.answers.pop();

    for (what, text) in &told.answers {
        assert_none(what, text);
    }
    assert_none("the database while it is open", &dump(&database, &folder.path().join("data")).await);
    // Portolan itself, and what it started for itself; the servers' own lines are theirs.
    let pid = program.child.id();
    assert_none("its command line", &proc(pid, "cmdline"));
    let helpers: Vec<u32> =
        children_of(pid).into_iter().filter(|pid| proc(*pid, "cmdline").contains("keep-child")).collect();
    assert!(!helpers.is_empty(), "the keepers");
    for helper in helpers {
        assert_none("a helper", &(proc(helper, "cmdline") + &proc(helper, "environ")));
    }
    program.signal("-HUP");
    eventually("a reload", || std::fs::read_to_string(&log).unwrap().contains("keys read again")).await;
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    let log = std::fs::read_to_string(log).unwrap();
    for line in ["server registered", "request answered", "no session for a run"] {
        assert!(log.contains(line), "the log is on");
    }
    assert_none("the log", &log);
    assert_none("the database after the end", &dump(&database, &folder.path().join("data")).await);

    // Starts that fail.
    for url in [
        format!("postgres://user:{}@127.0.0.1:1/x", canary("p")),
        format!("postgres://user:{}@nonexistent.invalid/x?sslpassword={}", canary("p"), canary("s")),
        format!("postgres://user:{}@127.0.0.1:port/x", canary("p")),
        format!("mysql://user:{}@h/x", canary("p")),
        canary("url"),
    ] {
        let mut start = command(folder.path(), Some(&url));
        let output = start.env("PORTOLAN_LOG", "trace").stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
        assert!(!output.status.success());
        assert_none("a start that fails", &String::from_utf8_lossy(&output.stderr));
    }
    let mut start = command(folder.path(), None);
    start.env("PORTOLAN_KEY", canary("not-a-key")).stderr(Stdio::piped());
    assert_none("a key that is none", &String::from_utf8_lossy(&start.output().unwrap().stderr));
    let mut help = command(folder.path(), Some(&canary("shown")));
    help.env("PORTOLAN_KEY", canary("shown")).arg("--help");
    assert_none("the help", &String::from_utf8_lossy(&help.output().unwrap().stdout));
    database.remove().await;
}

fn base64(text: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(text)
}

fn children_of(parent: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| proc(*pid, "status").contains(&format!("PPid:\t{parent}\n"))).collect()
}
