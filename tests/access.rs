//! Who may come in: nobody without a token once there are tokens, and nobody further than the token's scope.

use std::fs::Permissions;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use axum::http::Method;
use futures_util::future::join_all;
use portolan::api::{Access, routes};
use portolan::config::Settings;
use portolan::model::{Scope, sha256_hex};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::time::timeout;

use crate::fake::{self, Fake};
use crate::harness::{Answer, Database, PATIENCE, Portolan, Remote, Script, eventually, fake_mcp};
use crate::process::{Program, command, refusal};

const ADMIN: &str = "ptl_admin-DAw2Zb8iEwJ0mYw5cUuV1o7x";
const RUN: &str = "ptl_run-kq0Zb8iEwJ0mYw5cUuV1o7xs3";
const READ: &str = "ptl_read-77Zb8iEwJ0mYw5cUuV1o7xs3";
const WRONG: &str = "ptl_wrong-x0Zb8iEwJ0mYw5cUuV1o7xs";

const SERVERS: &str = "/v1/mcp-servers/";
const JSON: &str = "content-type: application/json\r\n";

/// A line of a tokens file.
fn line(name: &str, scope: &str, token: &str) -> String {
    format!("{name}:{scope}:{}\n", sha256_hex(token))
}

/// A Portolan that knows three tokens, one of each scope.
async fn guarded() -> (Portolan, TempDir) {
    guarded_with(|_| {}).await
}

async fn guarded_with(change: impl FnOnce(&mut Settings)) -> (Portolan, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(&file, line("runner", "run", RUN) + &line("reader", "read", READ)).unwrap();
    let portolan = Portolan::start_with(|settings| {
        settings.tokens.token = Some(ADMIN.to_owned().into());
        settings.tokens.tokens_file = Some(file);
        settings.upstream.sign_in.public_url = Some("https://portolan.test".parse().unwrap());
        change(settings);
    })
    .await;
    (portolan, folder)
}

fn stdio(script: &Script) -> Value {
    json!({"mcp_server_type": "stdio", "command": fake_mcp(), "args": ["stdio", script.0]})
}

/// An address of this machine that nobody has come from.
fn somewhere() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    Ipv4Addr::from_bits(u32::from_be_bytes([127, 1, 0, 0]) + NEXT.fetch_add(1, Ordering::Relaxed))
}

fn authority(portolan: &Portolan) -> String {
    portolan.url("").trim_start_matches("http://").to_owned()
}

/// What comes back for a request as it stands, sent from `from`, until the connection ends.
async fn exchange(portolan: &Portolan, from: Ipv4Addr, request: String) -> String {
    let to: SocketAddr = authority(portolan).parse().unwrap();
    // The right host; what stands in a body has its length already.
    let request = request.replacen("host: h\r\n", &format!("host: {to}\r\n"), 1);
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    let mut stream = socket.connect(to).await.expect("it listens");
    let talking = async {
        // It may be refused before its end.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    timeout(PATIENCE, talking).await.expect("the connection ends in time")
}

fn status(answer: &str) -> u16 {
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    status.and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no answer: {answer:?}"))
}

/// A request as it stands on the wire. `fields` are whole lines.
fn wire(method: &str, target: &str, fields: &str, body: &str) -> String {
    let length = if body.is_empty() { String::new() } else { format!("{JSON}content-length: {}\r\n", body.len()) };
    // Who names a host in the target must name the same one in the header.
    let host = target.strip_prefix("http://").and_then(|rest| rest.split('/').next()).unwrap_or("h");
    format!("{method} {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{fields}{length}\r\n{body}")
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

/// Spellings of a path that some server, proxy or framework takes for the same, and whether this one does.
fn spellings(path: &str, authority: &str) -> Vec<(String, bool)> {
    let bare = path.trim_end_matches('/');
    if bare.is_empty() {
        let same = [
            "/".to_owned(),
            "/?a=b&c=/v1/health".to_owned(),
            format!("http://{authority}"),
            "http://localhost/".to_owned(),
        ];
        let other = ["//", "///", "/.", "/..", "/%2f", "/%00", "/;", "\\", "*"].map(str::to_owned);
        return same.into_iter().map(|path| (path, true)).chain(other.into_iter().map(|path| (path, false))).collect();
    }
    let (first, rest) = bare[1..].split_once('/').unwrap_or((&bare[1..], ""));
    let inner = if rest.is_empty() { String::new() } else { format!("/{rest}") };
    let encoded: String = first.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let same = [
        bare.to_owned(),
        format!("{bare}/"),
        format!("{bare}?a=b&c=/v1/health"),
        format!("{bare}?"),
        format!("{bare}#/v1/health"),
        format!("http://{authority}{bare}"),
        format!("http://localhost{bare}/"),
    ];
    let other = [
        format!("{bare}//"),
        format!("/{bare}"),
        format!("//{bare}/"),
        format!("/{first}/{inner}"),
        format!("/./{}", &bare[1..]),
        format!("{bare}/."),
        format!("{bare}/.."),
        format!("/x/..{bare}"),
        format!("/{first}/x/..{inner}"),
        format!("/%2e{bare}"),
        format!("/x/%2e%2e{bare}"),
        format!("/{encoded}{inner}"),
        format!("/{}", bare[1..].replace('/', "%2F")),
        format!("/{}", bare[1..].replace('/', "%252f")),
        format!("/{}", bare[1..].replace('/', "\\")),
        format!("/{}", bare[1..].replace('/', "/;/")),
        bare.to_uppercase(),
        format!("{bare};x=1"),
        format!("/{first};x{inner}"),
        format!("{bare}%20"),
        format!("{bare}%00"),
        format!("{bare}%00.css"),
        format!("{bare}."),
        format!("{bare}%0d%0a"),
        format!("{bare}%c0%af"),
        format!("{bare}%3fa=b"),
        format!("/v1/health/..{bare}"),
        format!("/v1/health/%2e%2e{bare}"),
        format!("/v1/health{bare}"),
        format!("/docs/..{bare}"),
        format!("/docs/..%2f{}", bare[1..].replace('/', "%2f")),
        format!("http://{authority}/v1/health/..{bare}"),
        bare[1..].to_owned(),
        "*".to_owned(),
    ];
    // A path of one segment is not changed by all of these.
    let other = other.into_iter().filter(|spelt| !same.contains(spelt)).map(|path| (path, false)).collect::<Vec<_>>();
    same.into_iter().map(|path| (path, true)).chain(other).collect()
}

/// What everything that was refused must have left alone.
struct Kept<'a> {
    portolan: &'a Portolan,
    admin: Remote,
    id: String,
    tool_id: String,
    script: Script,
    /// What is smuggled in.
    bait: Script,
    before: Value,
}

impl<'a> Kept<'a> {
    async fn new(portolan: &'a Portolan) -> Self {
        let admin = portolan.remote_with(ADMIN);
        // One tool is called as a step of a path.
        let mut tools = fake::script::standard_tools();
        tools.push(json!({"name": "tools", "inputSchema": {"type": "object"}}));
        let tools = json!({ "tools": tools });
        let (script, bait) = (portolan.script(&tools), portolan.script(&tools));
        let server = admin.create("kept", stdio(&script)).await;
        assert_eq!(server["status"]["state"], "ready", "{server}");
        let id = server["id"].as_str().unwrap().to_owned();
        let tool_id = admin.path(&id, "echo").await.rsplit('/').nth(1).unwrap().to_owned();
        for name in ["test", "connect", "gone"] {
            admin.create(name, json!({"server_url": "http://127.0.0.1:1/mcp"})).await;
        }
        let before = admin.send("GET", SERVERS, None).await.expect(200);
        Self { portolan, admin, id, tool_id, script, bait, before }
    }

    async fn is_untouched(&self) {
        assert_eq!(self.admin.send("GET", SERVERS, None).await.expect(200), self.before);
        assert_eq!((self.script.starts(), self.bait.starts()), (1, 0), "a process was started");
        assert_eq!(self.portolan.children().len(), 1);
        assert_eq!((self.script.count("tools/list"), self.script.count("tools/call")), (1, 0));
    }

    fn path(&self, method: &Method, template: &str) -> String {
        let path = template.replace("{mcp_server_id}", &self.id).replace("{tool_id}", &self.tool_id);
        // The other one is deleted by its id.
        let name = if method == Method::DELETE { "gone" } else { "kept" };
        let path = path.replace("{mcp_server_name}", name);
        let path = path.replace("{mcp_tool_name}", "echo").replace("{tool_name}", "echo");
        let file = if template.starts_with("/console") { "app.js" } else { "docs.js" };
        path.replace("{file}", file).replace("{session_id}", "mcp-oauth-0")
    }

    fn flat(&self, name: &str) -> String {
        let mut body = stdio(&self.bait);
        body["server_name"] = json!(name);
        body.to_string()
    }

    /// A body that the route would take.
    fn body(&self, method: &Method, template: &str) -> String {
        match (method, template) {
            (&Method::POST, SERVERS) => json!({"server_name": "bait", "config": stdio(&self.bait)}).to_string(),
            (&Method::POST, path) if path.ends_with("/run") || path.ends_with("/execute") => {
                json!({"args": {"message": "m"}}).to_string()
            }
            (&Method::POST, "/v1/tools/mcp/servers/test" | "/v1/tools/mcp/servers/connect") => self.flat("tried"),
            (&Method::POST, "/v1/portolan/import") => {
                json!({"mcpServers": {"imported": stdio(&self.bait)}}).to_string()
            }
            (&Method::PUT, _) => self.flat("put"),
            (&Method::PATCH, "/v1/tools/mcp/servers/{mcp_server_name}") => {
                json!({"stdio_config": stdio(&self.bait)}).to_string()
            }
            (&Method::PATCH, "/v1/tools/mcp/servers/test" | "/v1/tools/mcp/servers/connect") => json!({}).to_string(),
            (&Method::PATCH, "/v1/mcp-servers/{mcp_server_id}") => json!({"config": stdio(&self.bait)}).to_string(),
            _ => String::new(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_route_lets_a_stranger_or_a_narrow_token_in_however_it_is_spelt() {
    let (portolan, _folder) = guarded().await;
    let kept = Kept::new(&portolan).await;
    let digest = sha256_hex(ADMIN);
    let strangers = [
        String::new(),
        bearer(WRONG),
        bearer(&digest),
        "authorization:\r\n".to_owned(),
        "authorization: Bearer\r\n".to_owned(),
        format!("authorization: Basic {ADMIN}\r\n"),
        format!("authorization: {ADMIN}\r\n"),
        format!("x-bare-password: {ADMIN}\r\n"),
        bearer(ADMIN) + &bearer(ADMIN),
        bearer(ADMIN) + "x-bare-password: password other\r\n",
    ];
    for route in routes() {
        let (method, path) = (&route.method, kept.path(&route.method, route.path));
        let body = kept.body(method, route.path);
        let spelt = spellings(&path, &authority(&portolan));
        let refused = join_all(spelt.iter().map(async |(target, same)| {
            let mut refused = 0;
            for fields in &strangers {
                let answer = exchange(&portolan, somewhere(), wire(method.as_str(), target, fields, &body));
                let (status, told) = (status(&answer.await), format!("{method} {target} {fields:?}"));
                match (route.access, *same) {
                    (Access::Open, true) => assert_eq!(status, 200, "{told}"),
                    // 404 of the open route /docs/{file}, 400 of what is no HTTP.
                    (Access::Open, false) => assert!([400, 401, 404].contains(&status), "{status} {told}"),
                    (Access::Needs(_), true) => assert_eq!(status, 401, "{told}"),
                    (Access::Needs(_), false) => assert!([400, 401, 404].contains(&status), "{status} {told}"),
                }
                refused += usize::from(status == 401);
            }
            refused / strangers.len()
        }));
        let refused: usize = refused.await.into_iter().sum();
        let Access::Needs(scope) = route.access else { continue };
        assert!(refused >= 30, "{method} {path}: {refused} spellings");
        let narrow = [(Scope::Read, READ), (Scope::Run, RUN)].into_iter().filter(|(narrow, _)| *narrow < scope);
        for (_, token) in narrow {
            for (target, same) in &spelt {
                let request = wire(method.as_str(), target, &bearer(token), &body);
                let status = status(&exchange(&portolan, somewhere(), request).await);
                let expected: &[u16] = if *same { &[403] } else { &[400, 403, 404, 405] };
                assert!(expected.contains(&status), "{status} {method} {target} {token}");
            }
        }
    }
    kept.is_untouched().await;

    // The twins: the same requests with the right token, what deletes last.
    let mut twins = routes();
    twins.sort_by_key(|route| route.method == Method::DELETE);
    for route in twins {
        let (method, path) = (&route.method, kept.path(&route.method, route.path));
        let body = kept.body(method, route.path);
        for (target, _) in spellings(&path, &authority(&portolan)).iter().filter(|(_, same)| *same) {
            let answer =
                exchange(&portolan, Ipv4Addr::LOCALHOST, wire(method.as_str(), target, &bearer(ADMIN), &body)).await;
            let again = [409, 404].contains(&status(&answer)) && *target != path.trim_end_matches('/');
            assert!((200..300).contains(&status(&answer)) || again, "{method} {target}: {answer}");
        }
    }
    assert!(kept.bait.starts() > 0 && kept.script.count("tools/call") + kept.bait.count("tools/call") > 0);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_route_is_nothing_for_strangers_either() {
    let (portolan, _folder) = guarded().await;
    let kept = Kept::new(&portolan).await;
    let reader = portolan.remote_with(READ);
    let stranger = portolan.remote();
    for path in [
        "//",
        "/console",
        "/console/a/b",
        "/v1",
        "/v1/",
        "/v2/mcp-servers",
        "/latest/mcp-servers/",
        "/v1/tools/mcp",
        "/v1/mcp-servers/a/b",
        "/v1/healthy",
        "/v1/health/x",
        "/v1/ready/x",
        "/docs/a/b",
        "/openapi.json",
        "/metrics/x",
        "/favicon.ico",
    ] {
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"] {
            let answer = stranger.send(method, path, None).await;
            assert_eq!(answer.status, 401, "{method} {path}");
            assert_eq!(reader.send(method, path, None).await.status, 404, "{method} {path}");
        }
    }
    let table = routes();
    for path in table.iter().map(|route| route.path) {
        let has = |method: &str| table.iter().find(|route| route.path == path && route.method == method);
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get", "BEARER"]
        {
            // HEAD is served wherever GET is.
            let row = has(if method == "HEAD" { "GET" } else { method });
            let is_open = row.is_some_and(|route| route.access == Access::Open);
            let answer = stranger.send(method, &kept.path(&Method::GET, path), None).await;
            assert_eq!(answer.status, if is_open { 200 } else { 401 }, "{method} {path}");
            if row.is_none() {
                assert_eq!(
                    reader.send(method, &kept.path(&Method::GET, path), None).await.status,
                    405,
                    "{method} {path}"
                );
            }
        }
    }
    for target in ["*", "http://localhost", "http://localhost/", "localhost:80"] {
        let is_root = target.starts_with("http:");
        for method in ["OPTIONS", "GET", "CONNECT"] {
            for (fields, expected) in [(String::new(), 401), (bearer(READ), 404)] {
                // The page at the root is for everybody, and answers GET alone.
                let expected = match (is_root, method, expected) {
                    (true, "GET", _) => 200,
                    (true, _, 404) => 405,
                    _ => expected,
                };
                let answer = exchange(&portolan, somewhere(), wire(method, target, &fields, "")).await;
                // Some of it is no HTTP request.
                assert!([400, expected].contains(&status(&answer)), "{method} {target}: {answer}");
            }
        }
    }
    kept.is_untouched().await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_is_what_it_says() {
    let (portolan, _folder) = guarded().await;
    let admin = portolan.remote_with(ADMIN);
    let http = fake::http::serve(Fake::new(fake::Script::default()));
    let server = admin.create("one", json!({"server_url": http.url})).await;
    let id = server["id"].as_str().unwrap();
    let one = format!("{SERVERS}{id}");
    let run = admin.path(id, "echo").await;
    let tool = run.trim_end_matches("/run").to_owned();
    let another = json!({"server_name": "another", "config": {"server_url": http.url}});
    let args = json!({"args": {"message": "m"}});
    let table: [(Scope, &str, String, Option<Value>); 9] = [
        (Scope::Read, "GET", SERVERS.to_owned(), None),
        (Scope::Read, "GET", one.clone(), None),
        (Scope::Read, "GET", format!("{one}/tools"), None),
        (Scope::Read, "GET", tool, None),
        (Scope::Run, "POST", run, Some(args)),
        (Scope::Admin, "POST", SERVERS.to_owned(), Some(another)),
        (Scope::Admin, "PATCH", one.clone(), Some(json!({"server_name": "two"}))),
        (Scope::Admin, "PATCH", format!("{one}/refresh"), None),
        (Scope::Admin, "DELETE", one, None),
    ];
    for (has, token) in [(Scope::Read, READ), (Scope::Run, RUN), (Scope::Admin, ADMIN)] {
        let caller = portolan.remote_with(token);
        for (needs, method, path, body) in &table {
            let answer = caller.send(method, path, body.as_ref()).await;
            if has < *needs {
                let told = answer.expect(403);
                assert_eq!(told["code"], "forbidden", "{method} {path}");
            } else {
                assert!((200..300).contains(&answer.status), "{has:?} {method} {path}: {}", answer.text);
            }
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_comes_in_either_header_but_not_two_in_one_request() {
    let folder = tempfile::tempdir().unwrap();
    let (tokens, token) = (folder.path().join("tokens"), folder.path().join("token"));
    std::fs::write(&tokens, format!("# ours\n\n{}", line("reader", "read", READ))).unwrap();
    std::fs::write(&token, "from-a-file-0123456789\n").unwrap();
    let portolan = Portolan::start_with(|settings| {
        settings.tokens.token = Some(ADMIN.to_owned().into());
        settings.tokens.token_file = Some(token);
        settings.tokens.tokens_file = Some(tokens);
        settings.tokens.letta_server_password = Some("päss word".to_owned().into());
    })
    .await;
    let send = async |fields: &[(&str, &str)]| {
        let mut request = portolan.request("GET", SERVERS);
        for (name, value) in fields {
            request = request.header(*name, value.as_bytes());
        }
        Answer::of("GET", SERVERS, request).await
    };
    let (a, x) = ("authorization", "x-bare-password");
    let admin = format!("Bearer {ADMIN}");
    let reader = format!("Bearer {READ}");
    for fine in [
        &[(a, admin.as_str())][..],
        &[(a, reader.as_str())],
        &[(a, "Bearer from-a-file-0123456789")],
        &[(a, "Bearer päss word")],
        &[(x, "password päss word")],
        &[(x, &admin.replace("Bearer", "password"))],
        &[(x, &reader.replace("Bearer", "PASSWORD"))],
        &[(a, &admin.replace("Bearer", "bearer"))],
        &[(a, &admin.replace("Bearer", "BEARER  "))],
        &[(a, &admin), (x, &admin.replace("Bearer", "password"))],
        &[(a, &admin), ("cookie", "authorization=x"), ("proxy-authorization", "Bearer x")],
    ] {
        assert_eq!(send(fine).await.status, 200, "{fine:?}");
    }
    let mut refused = 0;
    for wrong in [
        &[][..],
        &[(a, ADMIN)],
        &[(a, "Bearer from-a-file-0123456789\\n")],
        &[(a, "Bearer pass word")],
        &[(a, "Bearer päss")],
        &[(a, &format!("{admin}x"))],
        &[(a, admin.trim_end_matches('x'))],
        &[(a, &admin.to_lowercase())],
        &[(a, &format!("{admin},{reader}"))],
        &[(a, &format!("Bearer {}", sha256_hex(READ)))],
        &[(a, &format!("Bearer {}", line("reader", "read", READ).trim()))],
        &[(x, &admin)],
        &[(a, &admin.replace("Bearer", "password"))],
        &[(a, &admin), (a, &admin)],
        &[(a, &admin), (x, "password other")],
        &[(a, &admin), (x, &reader.replace("Bearer", "password"))],
        &[(a, "Basic Og=="), (x, &admin.replace("Bearer", "password"))],
        &[("proxy-authorization", &admin)],
        &[("cookie", &format!("authorization={ADMIN}"))],
        &[("x-api-key", ADMIN)],
    ] {
        let answer = send(wrong).await;
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Bearer")), "{wrong:?}");
        let told = answer.expect(401);
        assert_eq!((&told["detail"], &told["code"]), (&json!("Unauthorized"), &json!("unauthorized")));
        refused += 1;
    }
    assert_eq!(refused, 20);
    let query = format!("{SERVERS}?token={ADMIN}&access_token={ADMIN}&authorization=Bearer%20{ADMIN}");
    assert_eq!(portolan.get(&query).await.status, 401);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tokens_whoever_reaches_loopback_may_do_everything() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("open", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    for _ in 0..30 {
        let answer = portolan.remote_with(WRONG).send("GET", &format!("{SERVERS}{id}"), None).await;
        assert_eq!(answer.status, 200, "what SDKs send for an api key counts for nothing");
    }
    portolan.delete(&format!("{SERVERS}{id}")).await.expect(204);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_are_limited_by_address_and_the_right_token_never() {
    let (portolan, _folder) = guarded().await;
    let (stranger, admin) = (portolan.remote_with(WRONG), portolan.remote_with(ADMIN));
    let (mut refused, mut limited) = (0, 0);
    for _ in 0..100 {
        let answer = stranger.send("GET", SERVERS, None).await;
        if answer.status == 429 {
            assert_eq!(answer.header("x-should-retry"), Some("false"));
            assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() > 0);
            assert_eq!(answer.expect(429)["code"], "too_many_attempts");
            limited += 1;
        } else {
            answer.expect(401);
            refused += 1;
        }
        admin.send("GET", SERVERS, None).await.expect(200);
    }
    assert!(refused >= 20 && limited >= 50, "{refused} {limited}");
    // No credential is no guess; and another address has done nothing.
    portolan.remote().send("GET", SERVERS, None).await.expect(401);
    portolan.remote_with(READ).send("POST", SERVERS, Some(&json!({}))).await.expect(403);
    let elsewhere = exchange(&portolan, somewhere(), wire("GET", SERVERS, &bearer(WRONG), "")).await;
    assert_eq!(status(&elsewhere), 401);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_refused_before_anything_of_the_request_is_looked_at() {
    let (portolan, _folder) = guarded().await;
    let admin = portolan.remote_with(ADMIN);
    let unknown = "/v1/mcp-servers/mcp_server-00000000-0000-4000-8000-000000000000";
    for (method, path, body, known) in [
        ("GET", unknown.to_owned(), "", 404),
        ("DELETE", unknown.to_owned(), "", 404),
        ("PATCH", unknown.to_owned(), "{", 422),
        ("POST", SERVERS.to_owned(), "{", 422),
        ("POST", SERVERS.to_owned(), r#"{"server_name": ""}"#, 422),
        ("PATCH", format!("{unknown}/refresh?agent_id=%ff"), "", 422),
        ("POST", format!("{unknown}/tools/x/run"), "{}", 404),
    ] {
        let send = async |client: &Remote| {
            let request = client.request(method, &path).header("content-type", "application/json").body(body);
            Answer::of(method, &path, request).await.status
        };
        assert_eq!((send(&portolan.remote()).await, send(&admin).await), (401, known), "{method} {path}");
    }
    // Who waits to be told to go on is not, and a body that is announced is not waited for.
    for (length, more) in [(2, "expect: 100-continue\r\n"), (4_000_000, ""), (400_000_000, "")] {
        let head = format!(
            "POST {SERVERS} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{JSON}content-length: {length}\r\n{more}\r\n"
        );
        let answer = exchange(&portolan, somewhere(), head).await;
        assert_eq!(status(&answer), 401, "{answer}");
    }
    let head = format!(
        "POST {SERVERS} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{}{JSON}content-length: 2\r\nexpect: 100-continue\r\n\r\n{{}}",
        bearer(ADMIN)
    );
    let answer = exchange(&portolan, somewhere(), head).await;
    assert_eq!(status(&answer), 100, "{answer}");
    assert!(answer.contains("HTTP/1.1 422 "), "{answer}");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_is_its_token_when_runs_are_repeated() {
    let (portolan, _folder) = guarded().await;
    let admin = portolan.remote_with(ADMIN);
    let script = portolan.script(&json!({}));
    let server = admin.create("one", stdio(&script)).await;
    let path = admin.path(server["id"].as_str().unwrap(), "echo").await;
    let body = json!({"args": {"message": "m"}});
    let run = async |header: &str, value: String| {
        let request = portolan.request("POST", &path).header("idempotency-key", "one").header(header, value);
        let answer = Answer::of("POST", &path, request.json(&body)).await;
        let repeated = answer.header("x-portolan-repeated").is_some();
        assert_eq!(answer.expect(200)["func_return"], "m");
        repeated
    };
    assert!(!run("authorization", format!("Bearer {RUN}")).await);
    assert!(run("authorization", format!("bearer  {RUN}")).await);
    assert!(run("x-bare-password", format!("password {RUN}")).await);
    assert!(!run("authorization", format!("Bearer {ADMIN}")).await, "another caller");
    assert!(run("x-bare-password", format!("password {ADMIN}")).await);
    assert_eq!(script.count("tools/call"), 2);
    portolan.stop().await;
}

/// Requests that try to get a command started with a token that may not.
fn smuggled(kept: &Kept<'_>, remote: &str, token: &str) -> Vec<String> {
    let config = stdio(&kept.bait);
    let create = json!({"server_name": "bait", "config": config}).to_string();
    let flat = json!({"server_name": "bait", "command": fake_mcp(), "args": ["stdio", kept.bait.0]}).to_string();
    let typed = json!({"server_name": "bait", "type": "stdio", "command": fake_mcp(), "args": ["stdio", kept.bait.0]});
    let untyped = json!({"server_name": "bait", "config": {"command": fake_mcp(), "args": ["stdio", kept.bait.0]}});
    let change = json!({"config": config}).to_string();
    let flat_change = json!({"type": "stdio", "command": fake_mcp(), "args": ["stdio", kept.bait.0]}).to_string();
    let (run, one) = (format!("{SERVERS}{}/tools/{}/run", kept.id, kept.tool_id), format!("{SERVERS}{}", kept.id));
    let auth = bearer(token);
    let as_is =
        |method: &str, target: &str, more: &str, body: &str| wire(method, target, &format!("{auth}{more}"), body);
    let of_type = |kind: &str, body: &str| {
        let length = body.len();
        let head = format!("POST {SERVERS} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{auth}");
        format!("{head}{kind}content-length: {length}\r\n\r\n{body}")
    };
    let keep_alive = |request: String| request.replace("connection: close\r\n", "");
    let hidden = wire("POST", SERVERS, "", &create);
    let chunked = |body: &str| format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let mut all = vec![
        as_is("POST", SERVERS, "", &create),
        as_is("POST", SERVERS, "", &flat),
        as_is("POST", SERVERS, "", &typed.to_string()),
        as_is("POST", SERVERS, "", &untyped.to_string()),
        as_is("POST", SERVERS, "", &format!("[{create}]")),
        as_is("PUT", SERVERS, "", &create),
        as_is("post", SERVERS, "", &create),
        as_is("PATCH", SERVERS, "", &create),
        as_is("POST", SERVERS, "x-stainless-retry-count: 1\r\n", &create),
        as_is("POST", SERVERS, "idempotency-key: k\r\n", &create),
        as_is("POST", &format!("{SERVERS}?scope=admin&admin=true"), "", &create),
        as_is("POST", SERVERS, "x-forwarded-user: admin\r\nx-remote-user: admin\r\nx-scope: admin\r\n", &create),
        as_is("POST", "/v1/health", &format!("x-original-url: {SERVERS}\r\nx-rewrite-url: {SERVERS}\r\n"), &create),
        as_is(
            "POST",
            "/v1/health",
            &format!("x-forwarded-prefix: {SERVERS}\r\nx-forwarded-uri: {SERVERS}\r\n"),
            &create,
        ),
        of_type("", &create),
        of_type("content-type: text/plain\r\n", &create),
        of_type("content-type: application/x-www-form-urlencoded\r\n", &create),
        of_type("content-type: multipart/form-data; boundary=x\r\n", &create),
        of_type("content-type: application/json; charset=utf-16\r\n", &create),
        of_type("content-type: application/merge-patch+json\r\n", &create),
        as_is("PATCH", &one, "", &change),
        as_is("PATCH", &one, "", &flat_change),
        as_is("PUT", &one, "", &change),
        as_is("POST", &one, "", &change),
        as_is("PATCH", remote, "", &change),
        as_is("PATCH", remote, "", &flat_change),
        as_is("PATCH", &format!("{remote}/"), "", &change),
        as_is("PATCH", &format!("{one}/refresh"), "", ""),
        as_is("PATCH", &format!("{one}/refresh/?agent_id=a"), "", ""),
        as_is("POST", &format!("{one}/refresh"), "", ""),
        as_is("DELETE", &one, "", ""),
        as_is("PUT", "/v1/tools/mcp/servers", "", &flat),
        as_is("POST", "/v1/tools/mcp/servers/test", "", &flat),
        as_is("POST", "/v1/tools/mcp/servers/connect", "", &flat),
        as_is("POST", "/latest/mcp-servers/", "", &create),
        as_is("POST", &format!("{run}/../../.."), "", &create),
        as_is("POST", &format!("{run}/..%2f..%2f.."), "", &create),
        wire("POST", SERVERS, &(bearer(token) + &bearer(WRONG)), &create),
        wire("POST", SERVERS, &(bearer(READ) + &bearer(RUN)), &create),
        wire("POST", SERVERS, &format!("{auth}x-bare-password: password {WRONG}\r\n"), &create),
        wire("POST", SERVERS, &bearer(&format!("{token}:admin")), &create),
        wire("POST", SERVERS, &bearer(&format!("{token}, admin")), &create),
        // A second request, without a token, on the connection of one with a token; and one inside another's body.
        keep_alive(as_is("GET", SERVERS, "", "")) + &hidden,
        keep_alive(as_is("POST", &run, "", &hidden)) + &hidden,
        format!(
            "GET {SERVERS} HTTP/1.1\r\nhost: h\r\n{auth}transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n{}",
            chunked(&hidden)
        ),
        format!(
            "POST {SERVERS} HTTP/1.1\r\nhost: h\r\n{auth}{JSON}connection: close\r\ntransfer-encoding: chunked\r\n\
             trailer: authorization\r\n\r\n{:x}\r\n{create}\r\n0\r\nauthorization: Bearer {WRONG}\r\n\r\n",
            create.len()
        ),
    ];
    for header in ["x-http-method-override", "x-http-method", "x-method-override"] {
        for (target, method, body) in [(SERVERS, "POST", &create), (one.as_str(), "PATCH", &change)] {
            all.push(as_is("GET", &format!("{target}?_method={method}"), &format!("{header}: {method}\r\n"), body));
            all.push(as_is("POST", "/v1/health", &format!("{header}: {method}\r\n"), body));
        }
    }
    let tricks = spellings(SERVERS, "localhost").into_iter().chain(spellings(remote, "localhost"));
    all.extend(
        tricks.flat_map(|(target, _)| [as_is("POST", &target, "", &create), as_is("PATCH", &target, "", &change)]),
    );
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn no_narrow_token_gets_a_command_started() {
    let (portolan, _folder) = guarded().await;
    let admin = portolan.remote_with(ADMIN);
    let http = fake::http::serve(Fake::new(fake::Script::default()));
    let server = admin.create("remote", json!({"server_url": http.url})).await;
    let remote = format!("{SERVERS}{}", server["id"].as_str().unwrap());
    let kept = Kept::new(&portolan).await;
    for token in [READ, RUN] {
        let ways = smuggled(&kept, &remote, token);
        assert!(ways.len() >= 40, "{}", ways.len());
        for way in ways {
            let answers = exchange(&portolan, somewhere(), way.clone()).await;
            // What may be read with the token is; the hidden requests of two ways are told apart by their number.
            let mut statuses = answers.split("HTTP/1.1 ").skip(1).map(|answer| answer[..3].parse::<u16>().unwrap());
            let first = statuses.next().unwrap_or_else(|| panic!("no answer to {way}"));
            let may_be_fine = way.starts_with("GET") || (token == RUN && way.contains("/run HTTP"));
            assert!((400..500).contains(&first) || may_be_fine, "{first} {way}");
            assert!(statuses.all(|status| (400..500).contains(&status)), "{answers} {way}");
        }
    }
    kept.is_untouched().await;
    // The twin of the first way, and of a change: an admin does start a command.
    let create = json!({"server_name": "bait", "config": stdio(&kept.bait)});
    admin.post(SERVERS, &create).await.expect(200);
    assert_eq!(kept.bait.starts(), 1);
    admin.send("PATCH", &remote, Some(&json!({"config": stdio(&kept.bait)}))).await.expect(200);
    admin.send("PATCH", &format!("{remote}/refresh"), None).await.expect(200);
    assert_eq!(kept.bait.starts(), 2);
    portolan.stop().await;
}

/// The program with what it logs in a file.
fn logged(folder: &Path, database: Option<&str>) -> (Command, PathBuf) {
    let log = folder.join("log");
    let mut start = command(folder, database);
    start.stderr(std::fs::File::create(&log).unwrap()).env("PORTOLAN_LOG", "debug");
    (start, log)
}

/// `portolan token new`; its standard output and standard error.
fn token_new(folder: &Path, arguments: &[&str]) -> Result<(String, String), String> {
    let mut start = command(folder, None);
    let output = start.args(["token", "new"]).args(arguments).stderr(Stdio::piped()).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    if output.status.success() { Ok((out, err)) } else { Err(err) }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_it_makes_let_in_and_hangup_reads_them_again() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let file = folder.path().join("tokens");
    let file = file.to_str().unwrap();
    let make = |name: &str, scope: &str| {
        let (token, told) = token_new(folder.path(), &["--scope", scope, name, "--file", file]).unwrap();
        assert!(told.contains(file) && told.contains("SIGHUP") && !told.contains(token.trim()), "{told}");
        token.trim_end_matches('\n').to_owned()
    };
    let (admin, first) = (make("boss", "admin"), make("first", "read"));
    assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    for token in [&admin, &first] {
        assert!(token.starts_with("ptl_") && token.len() == 47, "{token}");
        assert!(!std::fs::read_to_string(file).unwrap().contains(token));
    }
    // Without a file the line is told; it is one of the file's form.
    let (printed, told) = token_new(folder.path(), &["printed", "--scope", "run"]).unwrap();
    assert!(told.contains(&line("printed", "run", printed.trim())) && !told.contains(printed.trim()), "{told}");
    for (arguments, part) in [
        (&["first", "--scope", "run", "--file", file][..], "of this name already"),
        (&["hunter 2", "--scope", "run"], "has a name that is not"),
        (&["", "--scope", "run"], "has a name that is not"),
        (&["n", "--scope", "root"], "read, run or admin"),
        (&["n"], "--scope"),
        (&["n", "--scope", "run", "--file", "/nonexistent/tokens"], "Cannot add to"),
    ] {
        let error = token_new(folder.path(), arguments).unwrap_err();
        assert!(error.contains(part) && !error.contains("ptl_"), "{error}");
    }

    let (mut start, log) = logged(folder.path(), database.url().as_deref());
    start.env("PORTOLAN_TOKENS_FILE", file);
    let mut program = Program::start(start);
    let asks = async |token: &str| {
        let answer = Remote::with_token(&program.url, token).send("GET", SERVERS, None).await;
        answer.status
    };
    let said = |text: &str| std::fs::read_to_string(&log).unwrap().matches(text).count();
    assert_eq!((asks(&admin).await, asks(&first).await, asks(WRONG).await), (200, 200, 401));
    let second = make("second", "read");
    assert_eq!(asks(&second).await, 401, "not before the signal");
    program.signal("-HUP");
    eventually("the tokens are read again", || said("tokens read again") == 1).await;
    assert_eq!((asks(&first).await, asks(&second).await), (200, 200));
    // One that is removed is worth nothing.
    let without: String = std::fs::read_to_string(file)
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with("first:"))
        .collect::<Vec<_>>()
        .join("\n");
    std::fs::write(file, &without).unwrap();
    program.signal("-HUP");
    eventually("the tokens are read again", || said("tokens read again") == 2).await;
    assert_eq!((asks(&admin).await, asks(&first).await, asks(&second).await), (200, 401, 200));
    // A bad file changes nothing, and the log says which line, and not what it is.
    std::fs::write(file, format!("{without}\nhunter2-in-clear\n")).unwrap();
    program.signal("-HUP");
    eventually("the file is refused", || said("stay as they were") == 1).await;
    std::fs::remove_file(file).unwrap();
    program.signal("-HUP");
    eventually("the file is missed", || said("stay as they were") == 2).await;
    assert_eq!((asks(&admin).await, asks(&first).await, asks(&second).await), (200, 401, 200));
    assert!(said("Line 3 of the tokens file") == 1 && said("hunter2") == 0);
    // Without any token nobody comes in, which is not the same as having had none.
    assert_eq!(said("other users of this machine"), 0);
    std::fs::write(file, "# none\n").unwrap();
    std::fs::set_permissions(file, Permissions::from_mode(0o644)).unwrap();
    program.signal("-HUP");
    eventually("nobody may come in", || said("nobody may come in") == 1).await;
    assert_eq!((asks(&admin).await, Remote::new(&program.url).send("GET", SERVERS, None).await.status), (401, 401));
    assert_eq!(said("other users of this machine"), 1);
    // The log names callers and guessers, and no token.
    assert!(said(r#"caller.name="boss""#) > 0 && said(r#"caller.name="second""#) > 0);
    assert_eq!(said("wrong tokens"), 1, "once a minute");
    for token in [&admin, &first, &second, WRONG] {
        assert_eq!(said(&token[4..20]), 0);
    }
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_loopback_it_starts_with_a_token_alone() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let start = |listen: &str| {
        let mut start = command(folder.path(), database.url().as_deref());
        start.env("PORTOLAN_LISTEN", listen);
        start
    };
    // Not every machine has IPv6.
    let ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    let can_be = |listen: &&str| ipv6 || !listen.starts_with('[');
    for listen in ["0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0"].into_iter().filter(can_be) {
        let (code, text) = refusal(start(listen));
        assert_eq!(code, Some(1), "{listen}");
        assert_eq!(text.trim_end().lines().count(), 1, "one sentence: {text}");
        for part in ["PORTOLAN_TOKEN", "--tokens-file", "portolan token new", "--listen 127.0.0.1:"] {
            assert!(text.contains(part), "{listen}: {text}");
        }
        assert!(!folder.path().join("portolan-data").exists(), "nothing was made");
    }
    for (listen, variable) in [("0.0.0.0:0", "PORTOLAN_TOKEN"), ("[::]:0", "LETTA_SERVER_PASSWORD")] {
        if !can_be(&listen) {
            continue;
        }
        let mut guarded = start(listen);
        guarded.env(variable, ADMIN);
        let mut program = Program::start(guarded);
        let port = program.url.rsplit(':').next().unwrap().to_owned();
        let url =
            if listen.starts_with('[') { format!("http://[::1]:{port}") } else { format!("http://127.0.0.1:{port}") };
        assert_eq!(Remote::new(&url).send("GET", SERVERS, None).await.status, 401);
        assert_eq!(Remote::with_token(&url, ADMIN).send("GET", SERVERS, None).await.status, 200);
        program.signal("-TERM");
        assert_eq!(program.exit_code(), Some(0));
    }
    // What is loopback under another name.
    for listen in ["localhost:0", "127.1.2.3:0", "[::1]:0", "[::ffff:127.0.0.1]:0"].into_iter().filter(can_be) {
        let mut program = Program::start(start(listen));
        assert_eq!(Remote::new(&program.url).send("GET", SERVERS, None).await.status, 200, "{listen}");
        program.signal("-TERM");
        assert_eq!(program.exit_code(), Some(0));
    }
    database.remove().await;
}

#[test]
fn tokens_that_cannot_be_used_are_one_clear_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let good = line("a", "admin", ADMIN);
    for (variable, value, part) in [
        ("PORTOLAN_TOKEN", String::new(), "PORTOLAN_TOKEN is empty"),
        ("LETTA_SERVER_PASSWORD", String::new(), "LETTA_SERVER_PASSWORD is empty"),
        ("PORTOLAN_TOKEN", "hunter2-hunter2-hunter2\n".to_owned(), "No request could carry PORTOLAN_TOKEN"),
        ("LETTA_SERVER_PASSWORD", " hunter2".to_owned(), "No request could carry LETTA_SERVER_PASSWORD"),
        ("PORTOLAN_TOKEN_FILE", file("empty", b" \n"), "PORTOLAN_TOKEN_FILE is empty"),
        ("PORTOLAN_TOKEN_FILE", file("two", b"hunter2\nhunter2"), "No request could carry PORTOLAN_TOKEN_FILE"),
        ("PORTOLAN_TOKEN_FILE", file("bytes", b"hunter2\xff"), "No request could carry PORTOLAN_TOKEN_FILE"),
        ("PORTOLAN_TOKEN_FILE", file("lines", good.as_bytes()), "is a tokens file"),
        ("PORTOLAN_TOKEN_FILE", "/nonexistent".to_owned(), "Cannot read the file"),
        ("PORTOLAN_TOKENS_FILE", "/nonexistent".to_owned(), "Cannot read the file"),
        ("PORTOLAN_TOKENS_FILE", folder.path().to_str().unwrap().to_owned(), "it is no file"),
        ("PORTOLAN_TOKENS_FILE", file("huge", &vec![b'#'; 1024 * 1024 + 1]), "larger than a mebibyte"),
        ("PORTOLAN_TOKENS_FILE", file("none", b"# nobody\n"), "has no token"),
        ("PORTOLAN_TOKENS_FILE", file("raw", b"hunter2"), "Line 1 of the tokens file is not of the form"),
        ("PORTOLAN_TOKENS_FILE", file("twice", (good.clone() + &good).as_bytes()), "Line 2 of the tokens file"),
    ] {
        let mut start = command(folder.path(), None);
        start.env(variable, &value).env("PORTOLAN_LOG", "error");
        let (code, text) = refusal(start);
        assert_eq!(code, Some(1), "{variable} {part}: {text}");
        assert!(text.contains(part) && !text.contains("hunter2"), "{variable} {part}: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "one sentence: {text}");
    }
    // A short one works, and is warned of; the help shows no value.
    let (mut start, log) = logged(folder.path(), None);
    start.env("PORTOLAN_TOKEN", "hunter2").env("LETTA_SERVER_PASSWORD", "pw");
    let mut program = Program::start(start);
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    let log = std::fs::read_to_string(log).unwrap();
    assert_eq!(log.matches("can be guessed").count(), 1, "{log}");
    assert!(!log.contains("hunter2"));
    let mut help = command(folder.path(), None);
    help.arg("--help").env("PORTOLAN_TOKEN", "hunter2").env("LETTA_SERVER_PASSWORD", "hunter2");
    let help = help.output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(
        help.contains("PORTOLAN_TOKENS_FILE") && help.contains("LETTA_SERVER_PASSWORD") && !help.contains("hunter2")
    );
}
