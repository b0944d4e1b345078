//! Web pages stay out of an open Portolan: what browsers say of their requests, row by row as they would send it, each
//! refusal beside what is let in. `tests/browser` has the same with a real browser.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::{PATIENCE, Portolan, Script, openapi};

/// What a row asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ask {
    Create,
    /// Of a known tool, without a body.
    Run,
    Refresh,
    Delete,
    List,
    Docs,
    Console,
    Health,
    NoSuchPath,
    Preflight,
}
use Ask::*;

/// The header fields of a row; `{port}` is Portolan's.
struct Row {
    ask: Ask,
    host: &'static str,
    /// Empty: there is none.
    origin: &'static str,
    /// `Sec-Fetch-Site`, `-Mode` and `-Dest`, as far as they are there.
    fetch: &'static str,
    /// Of the body; empty: a body without a type, `-`: no body.
    kind: &'static str,
    status: u16,
    /// Of a refusal.
    code: &'static str,
}

const fn row(
    ask: Ask,
    host: &'static str,
    origin: &'static str,
    fetch: &'static str,
    kind: &'static str,
    status: u16,
    code: &'static str,
) -> Row {
    Row { ask, host, origin, fetch, kind, status, code }
}

const US: &str = "127.0.0.1:{port}";
const OUR_PAGE: &str = "http://127.0.0.1:{port}";
const EVIL: &str = "https://evil.test";
const JSON: &str = "application/json";
const FORM: &str = "application/x-www-form-urlencoded";
const MULTIPART: &str = "multipart/form-data; boundary=x";
const TEXT: &str = "text/plain;charset=UTF-8";
const HOST: &str = "host_not_allowed";
const PAGE: &str = "origin_not_allowed";
const UNCLEAR: &str = "host_unclear";
const TYPE: &str = "unsupported_media_type";

const OFF: &[Row] = &[
    // What is no browser: curl, Python, and Node, whose fetch names its mode alone.
    row(Create, US, "", "", JSON, 200, ""),
    row(Create, US, "", "", "application/json; charset=utf-8", 200, ""),
    row(Create, US, "", " cors", JSON, 200, ""),
    row(Run, US, "", " cors", "-", 200, ""),
    row(Refresh, US, "", "", "-", 200, ""),
    // Names of loopback, also where a mapped port hides ours.
    row(Create, "localhost:{port}", "", "", JSON, 200, ""),
    row(Create, "localhost", "", "", JSON, 200, ""),
    row(Create, "LOCALHOST.:9", "", "", JSON, 200, ""),
    row(List, "127.8.9.10:{port}", "", "", "-", 200, ""),
    row(List, "127.1:{port}", "", "", "-", 200, ""),
    row(List, "2130706433", "", "", "-", 200, ""),
    row(List, "[::1]:{port}", "", "", "-", 200, ""),
    row(List, "[::ffff:127.0.0.1]:{port}", "", "", "-", 200, ""),
    // DNS rebinding: to the browser, the page and Portolan are one origin.
    row(Create, "evil.test:{port}", "http://evil.test:{port}", "same-origin cors empty", JSON, 403, HOST),
    row(List, "evil.test:{port}", "", "same-origin cors empty", "-", 403, HOST),
    row(Run, "evil.test:{port}", "http://evil.test:{port}", "", "-", 403, HOST),
    row(Delete, "evil.test:{port}", "http://evil.test:{port}", "", "-", 403, HOST),
    row(Refresh, "evil.test:{port}", "http://evil.test:{port}", "", "-", 403, HOST),
    row(Docs, "evil.test:{port}", "", "none navigate document", "-", 403, HOST),
    row(Console, "evil.test:{port}", "", "none navigate document", "-", 403, HOST),
    row(Health, "evil.test:{port}", "", "", "-", 403, HOST),
    row(NoSuchPath, "evil.test:{port}", "", "", "-", 403, HOST),
    row(List, "localhost.evil.test", "", "", "-", 403, HOST),
    row(List, "127.0.0.1.evil.test:{port}", "", "", "-", 403, HOST),
    row(List, "foo.localhost:{port}", "", "", "-", 403, HOST),
    row(List, "localhost..", "", "", "-", 403, HOST),
    // Addresses that are not loopback, 0.0.0.0 among them, which some systems take for it.
    row(Create, "0.0.0.0:{port}", EVIL, "", TEXT, 403, HOST),
    row(List, "0.0.0.0:{port}", "", "", "-", 403, HOST),
    row(List, "[::]:{port}", "", "", "-", 403, HOST),
    row(List, "192.168.1.7:{port}", "", "", "-", 403, HOST),
    row(List, "128.0.0.1:{port}", "", "", "-", 403, HOST),
    // No host that anybody could mean.
    row(List, "", "", "", "-", 400, UNCLEAR),
    row(List, "localhost@evil.test", "", "", "-", 400, UNCLEAR),
    row(List, "evil.test@localhost", "", "", "-", 400, UNCLEAR),
    row(List, "localhost, evil.test", "", "", "-", 400, UNCLEAR),
    row(List, "localhost/evil.test", "", "", "-", 400, UNCLEAR),
    row(List, "localhost:", "", "", "-", 400, UNCLEAR),
    row(List, "localhost:99999", "", "", "-", 400, UNCLEAR),
    row(List, "[::1", "", "", "-", 400, UNCLEAR),
    // A page of ours.
    row(Create, US, OUR_PAGE, "same-origin cors empty", JSON, 200, ""),
    row(Create, "localhost:{port}", "http://localhost:{port}", "same-origin cors empty", JSON, 200, ""),
    row(Create, US, OUR_PAGE, "", JSON, 200, ""),
    row(Run, US, OUR_PAGE, "same-origin cors empty", "-", 200, ""),
    // The same behind a proxy that takes TLS off.
    row(Create, "localhost", "https://localhost", "same-origin cors empty", JSON, 200, ""),
    row(Create, "localhost:443", "https://localhost", "same-origin cors empty", JSON, 200, ""),
    row(Create, "localhost", "https://localhost:8443", "same-origin cors empty", JSON, 403, PAGE),
    // Other pages: fetch and XMLHttpRequest with JSON, were the preflight to let them.
    row(Create, US, EVIL, "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, EVIL, "", JSON, 403, PAGE),
    row(Create, US, "http://localhost:{port}", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "http://127.0.0.1:1", "same-site cors empty", JSON, 403, PAGE),
    row(Create, US, "http://127.0.0.1", "same-site cors empty", JSON, 403, PAGE),
    row(Create, US, "http://127.0.0.1:{port}.evil.test", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "http://127.0.0.1:{port}/", "same-origin cors empty", JSON, 403, PAGE),
    row(Create, US, "http://a@127.0.0.1:{port}", "", JSON, 403, PAGE),
    row(Create, US, "ftp://127.0.0.1:{port}", "", JSON, 403, PAGE),
    row(Create, US, "chrome-extension://abcdefghijklmnop", "none cors empty", JSON, 403, PAGE),
    row(Create, US, "file://", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "null", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "null", "same-origin cors empty", JSON, 403, PAGE),
    row(Preflight, US, EVIL, "cross-site cors empty", "-", 403, PAGE),
    row(Preflight, US, "null", "", "-", 403, PAGE),
    row(Preflight, US, OUR_PAGE, "same-origin cors empty", "-", 405, "method_not_allowed"),
    // What needs no preflight: fetch with no-cors, sendBeacon, forms of every type, in old browsers, from a sandbox.
    row(Create, US, EVIL, "cross-site no-cors empty", TEXT, 403, PAGE),
    row(Create, US, EVIL, "", TEXT, 403, PAGE),
    row(Create, US, "null", "cross-site no-cors empty", TEXT, 403, PAGE),
    row(Create, US, "null", "cross-site navigate iframe", FORM, 403, PAGE),
    row(Create, US, EVIL, "cross-site navigate document", FORM, 403, PAGE),
    row(Create, US, EVIL, "cross-site navigate document", MULTIPART, 403, PAGE),
    row(Create, US, EVIL, "cross-site navigate document", "text/plain", 403, PAGE),
    row(Create, US, "", "cross-site navigate document", FORM, 403, PAGE),
    row(Create, US, EVIL, "", FORM, 403, PAGE),
    row(Create, US, EVIL, "cross-site no-cors empty", "", 403, PAGE),
    row(Run, US, EVIL, "cross-site no-cors empty", "-", 403, PAGE),
    row(Run, US, EVIL, "", "-", 403, PAGE),
    row(Run, US, "null", "cross-site navigate iframe", FORM, 403, PAGE),
    row(Run, US, "", "cross-site no-cors empty", "-", 403, PAGE),
    row(Refresh, US, EVIL, "cross-site cors empty", "-", 403, PAGE),
    row(Delete, US, EVIL, "cross-site cors empty", "-", 403, PAGE),
    // The types of those bodies are refused whoever sends them.
    row(Create, US, "", "", TEXT, 415, TYPE),
    row(Create, US, "", "", FORM, 415, TYPE),
    row(Create, US, "", "", MULTIPART, 415, TYPE),
    row(Create, US, "", "", "", 415, TYPE),
    row(Create, US, "", "", "-", 415, TYPE),
    row(Create, US, "", "", "application/jsonp", 415, TYPE),
    row(Create, US, "", "", "text/plain; application/json", 415, TYPE),
    row(Create, US, OUR_PAGE, "same-origin no-cors empty", TEXT, 415, TYPE),
    row(Run, US, "", "", TEXT, 415, TYPE),
    row(Run, US, "", "", FORM, 415, TYPE),
    row(Run, US, "", "", "", 415, TYPE),
    row(Refresh, US, "", "", TEXT, 415, TYPE),
    row(Refresh, US, "", "", FORM, 415, TYPE),
    row(Refresh, US, "", "", "", 415, TYPE),
    row(Refresh, US, "", "", JSON, 200, ""),
    row(Delete, US, "", "", TEXT, 415, TYPE),
    row(Delete, US, "", "", MULTIPART, 415, TYPE),
    // Images, scripts, frames, web sockets: reads without an origin.
    row(List, US, "", "cross-site no-cors image", "-", 403, PAGE),
    row(List, US, "", "same-site no-cors script", "-", 403, PAGE),
    row(List, US, "", "cross-site navigate iframe", "-", 403, PAGE),
    row(List, US, "", "cross-site navigate document", "-", 403, PAGE),
    row(List, US, "", "elsewhere no-cors image", "-", 403, PAGE),
    row(List, US, EVIL, "cross-site websocket empty", "-", 403, PAGE),
    row(List, US, EVIL, "", "-", 403, PAGE),
    row(List, US, "", "same-origin cors empty", "-", 200, ""),
    row(List, US, "", "none navigate document", "-", 200, ""),
    row(NoSuchPath, US, EVIL, "cross-site cors empty", "-", 403, PAGE),
    row(NoSuchPath, US, "", "cross-site navigate document", "-", 403, PAGE),
    row(NoSuchPath, US, "", "", "-", 404, "not_found"),
    // A link to a page that is there for everybody, but not in a frame.
    row(Docs, US, "", "cross-site navigate document", "-", 200, ""),
    row(Console, US, "", "cross-site navigate document", "-", 200, ""),
    row(Console, US, "", "none navigate document", "-", 200, ""),
    row(Console, US, "", "cross-site navigate iframe", "-", 403, PAGE),
    row(Health, US, "", "cross-site navigate document", "-", 200, ""),
    row(Docs, US, "", "cross-site navigate iframe", "-", 403, PAGE),
    row(Docs, US, "", "cross-site no-cors image", "-", 403, PAGE),
    row(Docs, US, EVIL, "cross-site navigate document", "-", 403, PAGE),
    row(Health, US, EVIL, "cross-site cors empty", "-", 403, PAGE),
];

const APP: &str = "https://app.example.com";

/// With `--cors-origins https://app.example.com,http://localhost:3000 --allowed-hosts portolan.example.com,192.168.1.7`.
const LISTED: &[Row] = &[
    row(Create, US, APP, "cross-site cors empty", JSON, 200, ""),
    row(Create, US, APP, "", JSON, 200, ""),
    row(Create, US, "http://localhost:3000", "cross-site cors empty", JSON, 200, ""),
    row(Run, US, APP, "cross-site cors empty", "-", 200, ""),
    row(Preflight, US, APP, "cross-site cors empty", "-", 200, ""),
    row(NoSuchPath, US, APP, "cross-site cors empty", "-", 404, "not_found"),
    row(Create, US, APP, "cross-site no-cors empty", TEXT, 415, TYPE),
    row(Create, US, "http://app.example.com", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "https://app.example.com:8443", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "https://evil.app.example.com", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "https://app.example.com.evil.test", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "http://localhost", "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, EVIL, "cross-site cors empty", JSON, 403, PAGE),
    row(Create, US, "null", "cross-site cors empty", JSON, 403, PAGE),
    row(List, US, "", "cross-site no-cors image", "-", 403, PAGE),
    row(Create, "portolan.example.com", "https://portolan.example.com", "same-origin cors empty", JSON, 200, ""),
    row(Create, "Portolan.Example.com.:8443", "", "", JSON, 200, ""),
    row(List, "192.168.1.7:{port}", "", "", "-", 200, ""),
    row(List, US, "", "", "-", 200, ""),
    row(List, "example.com", "", "", "-", 403, HOST),
    row(List, "x.portolan.example.com", "", "", "-", 403, HOST),
    row(List, "192.168.1.8", "", "", "-", 403, HOST),
    row(Create, "evil.test", APP, "cross-site cors empty", JSON, 403, HOST),
];

/// A Portolan with one server, whose tool leaves a trace of every run.
struct Scene {
    portolan: Portolan,
    id: String,
    run: String,
    script: Script,
    port: String,
    creates: usize,
}

impl Scene {
    async fn new(arguments: &[&str]) -> Self {
        let given = arguments.iter().map(|one| one.to_string());
        let arguments: Vec<_> = std::iter::once("portolan".to_owned()).chain(given).collect();
        let portolan = Portolan::start_with(|settings| {
            settings.browsers = <portolan::config::Cli as clap::Parser>::parse_from(arguments).settings.browsers;
        })
        .await;
        let (server, script) = portolan.create_stdio("known", &json!({})).await;
        let id = server["id"].as_str().unwrap().to_owned();
        let run = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(&id, "empty").await);
        let port = portolan.url("").rsplit(':').next().unwrap().to_owned();
        Self { portolan, id, run, script, port, creates: 0 }
    }

    /// What must not change: the servers, and how often a tool was called and listed.
    async fn state(&self) -> (usize, usize, usize) {
        let servers = self.portolan.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().len();
        (servers, self.script.count("tools/call"), self.script.count("tools/list"))
    }

    /// Sends a whole request on a connection of its own: the answer's status, fields and body.
    async fn exchange(&self, request: &str) -> (u16, Vec<(String, String)>, String) {
        let mut socket = TcpStream::connect(format!("127.0.0.1:{}", self.port)).await.expect("it listens");
        socket.write_all(request.as_bytes()).await.expect("the connection is open");
        let mut answer = Vec::new();
        timeout(PATIENCE, socket.read_to_end(&mut answer)).await.expect("it ends").expect("it can be read");
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("it has a head");
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let fields = lines.map(|line| line.split_once(": ").unwrap());
        (status, fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(), body.to_owned())
    }

    async fn play(&mut self, row: &Row) {
        let what = format!(
            "{:?} host={:?} origin={:?} fetch={:?} type={:?}",
            row.ask, row.host, row.origin, row.fetch, row.kind
        );
        let one = format!("/v1/mcp-servers/{}", self.id);
        let (method, path) = match row.ask {
            Create => ("POST", "/v1/mcp-servers/".to_owned()),
            Run => ("POST", self.run.clone()),
            Refresh => ("PATCH", format!("{one}/refresh")),
            Delete => ("DELETE", one),
            List => ("GET", "/v1/mcp-servers/".to_owned()),
            Docs => ("GET", "/docs".to_owned()),
            Console => ("GET", "/".to_owned()),
            Health => ("GET", "/v1/health".to_owned()),
            NoSuchPath => ("GET", "/v1/nothing".to_owned()),
            Preflight => ("OPTIONS", "/v1/mcp-servers/".to_owned()),
        };
        let mut fields = format!("host: {}\r\nconnection: close\r\n", row.host);
        if !row.origin.is_empty() {
            fields += &format!("origin: {}\r\n", row.origin);
        }
        for (name, value) in ["site", "mode", "dest"].iter().zip(row.fetch.split(' ')).filter(|(_, v)| !v.is_empty()) {
            fields += &format!("sec-fetch-{name}: {value}\r\n");
        }
        if row.fetch.contains("websocket") {
            fields +=
                "upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
        }
        if row.ask == Preflight {
            fields += "access-control-request-method: POST\r\naccess-control-request-headers: content-type\r\n";
        }
        self.creates += 1;
        let body = match (row.kind, row.ask) {
            ("-", _) => String::new(),
            (_, Create) => {
                let config = json!({ "mcp_server_type": "sse", "server_url": "http://127.0.0.1:1/sse" });
                json!({ "server_name": format!("n{}", self.creates), "config": config }).to_string()
            }
            _ => "{}".to_owned(),
        };
        if !matches!(row.kind, "" | "-") {
            fields += &format!("content-type: {}\r\n", row.kind);
        }
        if !body.is_empty() || method == "POST" {
            fields += &format!("content-length: {}\r\n", body.len());
        }
        let request = format!("{method} {path} HTTP/1.1\r\n{fields}\r\n{body}").replace("{port}", &self.port);

        let before = self.state().await;
        let (status, headers, body) = self.exchange(&request).await;
        let field = |name: &str| headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        assert_eq!(status, row.status, "{what}: {body}");
        let cors = headers.iter().any(|(name, _)| name.starts_with("access-control-allow"));
        let listed = [APP, "http://localhost:3000"].contains(&row.origin) && !self.is_closed();
        assert_eq!(cors, listed, "{what}: {headers:?}");
        if listed {
            assert_eq!(field("access-control-allow-origin"), Some(row.origin), "{what}");
            assert_eq!(field("access-control-allow-credentials"), None, "{what}");
            let vary = headers.iter().filter(|(name, _)| name == "vary").map(|(_, value)| value.as_str());
            assert!(vary.flat_map(|value| value.split(',')).any(|name| name.trim() == "origin"), "{what}: {headers:?}");
        }
        if row.ask != Preflight || row.status != 200 {
            openapi::check(method, &path, status, &headers, body.as_bytes());
            assert_eq!(field("cross-origin-resource-policy"), Some("same-origin"), "{what}");
            assert_eq!(field("x-content-type-options"), Some("nosniff"), "{what}");
        }
        let (servers, calls, lists) = self.state().await;
        if row.status >= 400 {
            let body: Value = serde_json::from_str(&body).unwrap();
            assert_eq!(body["code"], row.code, "{what}");
            assert_eq!((servers, calls, lists), before, "{what}: something was done");
        } else {
            let more = |ask| before.0 + usize::from(ask);
            assert_eq!(servers, more(row.ask == Create), "{what}: the twin is taken");
            assert_eq!(calls, before.1 + usize::from(row.ask == Run), "{what}: the twin runs");
            assert_eq!(lists, before.2 + usize::from(row.ask == Refresh), "{what}: the twin is listed");
        }
    }

    fn is_closed(&self) -> bool {
        self.portolan.app.settings.browsers.cors_origins.is_empty()
    }
}

#[tokio::test]
async fn an_open_portolan_keeps_web_pages_out() {
    let mut scene = Scene::new(&[]).await;
    for row in OFF {
        scene.play(row).await;
    }
    // The last twin, because it ends the scene.
    let before = scene.state().await.0;
    scene.portolan.delete(&format!("/v1/mcp-servers/{}", scene.id)).await.expect(204);
    assert_eq!(scene.state().await.0, before - 1);
    scene.portolan.stop().await;
}

#[tokio::test]
async fn listed_pages_and_names_come_in_and_no_others() {
    let origins = "https://app.example.com/,http://LocalHost:3000";
    let hosts = "Portolan.example.com,192.168.1.7";
    let mut scene = Scene::new(&["--cors-origins", origins, "--allowed-hosts", hosts]).await;
    for row in LISTED {
        scene.play(row).await;
    }
    scene.portolan.stop().await;
}

#[tokio::test]
async fn a_request_names_its_host_once() {
    let scene = Scene::new(&["--allowed-hosts", "a.test"]).await;
    let list = "/v1/mcp-servers/";
    let url = format!("http://127.0.0.1:{}{list}", scene.port);
    let close = "connection: close\r\n";
    let us = format!("127.0.0.1:{}", scene.port);
    for (target, version, fields, status) in [
        (list, "1.1", format!("host: {us}\r\n"), 200),
        (list, "1.1", String::new(), 400),
        (list, "1.0", String::new(), 200),
        (list, "1.0", "host: evil.test\r\n".to_owned(), 403),
        (list, "1.1", format!("host: {us}\r\nhost: {us}\r\n"), 400),
        (list, "1.1", format!("host: {us}\r\nhost: evil.test\r\n"), 400),
        (list, "1.1", format!("host: evil.test\r\nhost: {us}\r\n"), 400),
        (list, "1.1", "host: a.test\u{e9}\r\n".to_owned(), 400),
        // The target as a whole URL counts, and so does the field beside it.
        (&url, "1.1", format!("host: {us}\r\n"), 200),
        ("http://a.test/v1/mcp-servers/", "1.1", "host: A.test\r\n".to_owned(), 200),
        ("http://evil.test/v1/mcp-servers/", "1.1", format!("host: {us}\r\n"), 400),
        (&url, "1.1", "host: evil.test\r\n".to_owned(), 400),
        ("http://evil.test/v1/mcp-servers/", "1.1", "host: evil.test\r\n".to_owned(), 403),
        ("http://evil.test/v1/mcp-servers/", "1.0", String::new(), 403),
        (list, "1.1", format!("host: {us}\r\norigin: http://{us}\r\n"), 200),
        (list, "1.1", format!("host: {us}\r\norigin: http://{us}\r\norigin: http://{us}\r\n"), 403),
        (list, "1.1", format!("host: {us}\r\nsec-fetch-site: none\r\nsec-fetch-site: cross-site\r\n"), 403),
        (list, "1.0", format!("origin: http://{us}\r\n"), 403),
    ] {
        let request = format!("GET {target} HTTP/{version}\r\n{fields}{close}\r\n");
        let (answer, headers, body) = scene.exchange(&request).await;
        assert_eq!(answer, status, "{request}: {body}");
        openapi::check("GET", list, answer, &headers, body.as_bytes());
    }
    scene.portolan.stop().await;
}

/// What a page could not put into the header is a mistake, which would keep a page out silently; and every page at an
/// open Portolan is one that starts programs.
#[tokio::test]
async fn settings_that_nobody_can_mean_are_refused() {
    let parse = |flag: &str, value: &str| {
        <portolan::config::Cli as clap::Parser>::try_parse_from(["portolan", flag, value])
            .map(|cli| cli.settings.browsers)
    };
    for wrong in [
        "",
        "null",
        "app.example.com",
        "https://",
        "https://a.test/x",
        "https://a.test?x",
        "https://u@a.test",
        "file:///",
    ] {
        assert!(parse("--cors-origins", wrong).is_err(), "{wrong}");
    }
    for right in ["https://a.test", "http://[::1]:3000", "chrome-extension://abcdef", "https://a.test:443/"] {
        assert!(parse("--cors-origins", right).is_ok(), "{right}");
    }
    for wrong in ["", "*", "https://a.test", "a.test:80", "a.test/", "[::1]:80", "a b"] {
        assert!(parse("--allowed-hosts", wrong).is_err(), "{wrong}");
    }
    for right in ["a.test", "a.test.", "::1", "[::1]", "10.0.0.1", "bücher.example"] {
        assert!(parse("--allowed-hosts", right).is_ok(), "{right}");
    }
    let every = parse("--cors-origins", "https://a.test,*").unwrap();
    let reason = portolan::api::Origins::new(&every, true).err().expect("no page may start programs").to_string();
    assert!(reason.contains("no token is set"), "{reason}");
    assert!(portolan::api::Origins::new(&every, false).is_ok());
}
