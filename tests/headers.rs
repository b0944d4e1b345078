//! Header fields: what is no clean HTTP is refused when it is written and nothing is stored, what is taken arrives as it was
//! written and once, and nothing of Portolan's own clients goes along (CONTRACT row 7, RFC 9110 §5).

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use portolan::model::Remote;
use serde_json::{Value, json};

use crate::fake::{self, Fake, Script};
use crate::harness::Portolan;

/// Keeps the head of every request, byte for byte, and answers 404.
struct Recorder {
    addr: SocketAddr,
    heads: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Recorder {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let heads: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let kept = heads.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                // A connection that breaks is the client's affair.
                let _over = Self::answer(&mut stream, &kept);
            }
        });
        Self { addr, heads }
    }

    fn answer(stream: &mut TcpStream, kept: &Mutex<Vec<Vec<u8>>>) -> std::io::Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read(&mut byte)? == 0 {
                return Ok(());
            }
            head.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&head).to_lowercase();
        let length = text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body)?;
        kept.lock().unwrap().push(head);
        stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    }

    fn url(&self) -> String {
        format!("http://{}/mcp", self.addr)
    }

    /// The requests since the last look: each the request line, and the fields by name.
    fn take(&self) -> Vec<(String, BTreeMap<String, Vec<String>>)> {
        std::mem::take(&mut *self.heads.lock().unwrap()).iter().map(|head| read_head(head)).collect()
    }
}

/// A head that is clean: ASCII, each line ended by CR LF and by nothing else, `name: value`.
fn read_head(head: &[u8]) -> (String, BTreeMap<String, Vec<String>>) {
    let text = std::str::from_utf8(head).expect("a head is ASCII");
    assert!(text.is_ascii(), "{text:?}");
    let lines = text.strip_suffix("\r\n\r\n").expect("a head ends");
    assert_eq!(lines.matches(['\r', '\n', '\0']).count(), 2 * lines.matches("\r\n").count(), "{text:?}");
    let mut lines = lines.split("\r\n");
    let request = lines.next().unwrap().to_owned();
    let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in lines {
        let (name, value) = line.split_once(": ").or_else(|| Some((line.strip_suffix(':')?, ""))).expect("a field");
        assert!(!name.is_empty() && !name.contains([' ', '\t']), "{line:?}");
        fields.entry(name.to_ascii_lowercase()).or_default().push(value.to_owned());
    }
    (request, fields)
}

const SECRET: &str = "hunter2-secret";

fn config(url: &str, key: &str, value: Value) -> Value {
    let mut config = json!({"mcp_server_type": "streamable_http", "server_url": url});
    config[key] = value;
    config
}

/// Values that are no field values, or not the same to every reader.
fn bad_values() -> Vec<String> {
    let mut values: Vec<String> = (0..=0x1f_u8)
        .chain([0x7f])
        .filter(|byte| *byte != b'\t')
        .flat_map(|byte| {
            let c = byte as char;
            [format!("{SECRET}{c}"), format!("{c}{SECRET}"), format!("a{c}X-Injected: {SECRET}")]
        })
        .collect();
    values.extend(
        [
            "a\r\nX-Injected: 1",
            "a\nX-Injected: 1",
            "a\rX-Injected: 1",
            "a\r\n X-Folded: 1",
            "a\r\n\tfolded",
            "a\n folded",
            "a\r\n\r\nGET / HTTP/1.1",
            "a\n\nGET /",
            "\r\n",
            "\n",
            "\r",
            "\r\nHost: evil",
            "Bearer x\r\nHost: evil",
            "Bearer x\n",
            "Bearer \r\n x",
            "a\u{0}b",
            "a\u{85}X-Injected: 1",
            "a\u{2028}X-Injected: 1",
            "a\u{2029}b",
            "a\u{c}b",
            "a\u{b}b",
            "嘊嘍X-Injected: 1",
            "č\u{10a}X-Injected: 1",
            "é",
            "ü",
            "€",
            "日本",
            "\u{feff}a",
            "a\u{200b}b",
            "a\u{202e}b",
            "a\u{ad}b",
            "\u{ff1a}",
            "a\u{a0}b",
            "\u{80}",
            "\u{ff}",
            "\u{7f}",
            "🔑",
            " ",
            "  ",
            "\t",
            " \t ",
            " a",
            "a ",
            "\ta",
            "a\t",
            "  a  ",
            " Bearer x",
            "Bearer x ",
            "Bearer ",
        ]
        .map(str::to_owned),
    );
    values.push("a".repeat(32 * 1024 + 1));
    values.push("é".repeat(20 * 1024));
    values
}

/// Names that are no field names, or not for configurations.
fn bad_names() -> Vec<String> {
    let mut names: Vec<String> =
        "()<>@,;:\\\"/[]?={} \t".chars().flat_map(|c| [format!("X{c}Y"), format!("{c}X"), format!("X{c}")]).collect();
    names.extend((0..=0x1f_u8).chain([0x7f]).map(|byte| format!("X{}Y", byte as char)));
    names.extend(
        [
            "",
            " ",
            "X: y\r\nZ",
            "X\r\nZ: y",
            "X\nZ",
            "X\rZ",
            "é",
            "X-é",
            "Ｘ",
            "X\u{ad}",
            "X\u{200b}",
            "\u{feff}X",
            "X\u{2028}",
            "日本",
            "Xſ",
            "Κ",
            ":authority",
            ":path",
            "X:",
            "Host:",
            "accept",
            "Accept",
            "ACCEPT",
            "Accept-Encoding",
            "Connection",
            "cOnNeCtIoN",
            "Content-Encoding",
            "Content-Length",
            "content-length",
            "CONTENT-LENGTH",
            "Content-Type",
            "Expect",
            "Keep-Alive",
            "Last-Event-ID",
            "Mcp-Method",
            "Mcp-Name",
            "MCP-Protocol-Version",
            "Mcp-Session-Id",
            "MCP-SESSION-ID",
            "Mcp-Param-City",
            "MCP-PARAM-X",
            "Proxy-Connection",
            "TE",
            "te",
            "Trailer",
            "Transfer-Encoding",
            "transfer-encoding",
            "Upgrade",
            "X-Agent-Id",
            "x-agent-id",
        ]
        .map(str::to_owned),
    );
    names.push("X".repeat(257));
    names.push("X".repeat(30_000));
    names
}

/// Configurations in which a header comes twice.
fn clashes(url: &str) -> Vec<(Value, &'static str)> {
    let with_user = url.replace("http://", "http://user:pass@");
    let both = |mut config: Value, token: Value, header: Value| {
        (config["auth_token"], config["auth_header"]) = (token, header);
        config
    };
    let custom = |headers: Value| config(url, "custom_headers", headers);
    let secret = || json!(SECRET);
    vec![
        (custom(json!({"X-A": "1", "x-a": "2"})), "custom_headers"),
        (custom(json!({"X-A": "1", "X-a": "1"})), "custom_headers"),
        (custom(json!({"Cookie": "1", "cookie": "2"})), "custom_headers"),
        (both(custom(json!({"Authorization": "x"})), secret(), json!(null)), "custom_headers"),
        (both(custom(json!({"AUTHORIZATION": "x"})), secret(), json!(null)), "custom_headers"),
        (both(custom(json!({"authorization": "x"})), secret(), json!("Authorization")), "custom_headers"),
        (both(custom(json!({"x-api-key": "x"})), secret(), json!("X-API-Key")), "custom_headers"),
        (both(custom(json!({"X-API-KEY": "x"})), json!(null), json!("X-API-Key")), "custom_headers"),
        (config(&with_user, "auth_token", secret()), "auth_token"),
        (both(config(&with_user, "auth_token", secret()), secret(), json!("authorization")), "auth_header"),
        (config(&with_user, "custom_headers", json!({"Authorization": "x"})), "custom_headers"),
        (config(&with_user, "oauth", json!({"client_id": "c"})), "oauth"),
        (custom(json!({"X-A": "a".repeat(32 * 1024), "X-B": "b".repeat(32 * 1024)})), "custom_headers"),
        (custom(Value::Object((0..257).map(|number| (format!("X-{number}"), json!("1"))).collect())), "custom_headers"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_clean_header_is_refused_and_nothing_is_stored() {
    let recorder = Recorder::start();
    let portolan = Portolan::start().await;
    let url = recorder.url();
    let server = portolan.create("there", json!({"server_url": url, "custom_headers": {"X-Old": "1"}})).await;
    let path = format!("/v1/mcp-servers/{}", server["id"].as_str().unwrap());
    let before = portolan.get(&path).await.expect(200);
    recorder.take();
    let mut payloads: Vec<(Value, &str)> = Vec::new();
    for value in bad_values() {
        payloads.push((config(&url, "auth_token", json!(value)), "auth_token"));
        payloads.push((config(&url, "custom_headers", json!({"X-A": value})), "custom_headers"));
        let mut named = config(&url, "auth_token", json!(value));
        named["auth_header"] = json!("X-API-Key");
        payloads.push((named, "auth_token"));
    }
    for name in bad_names() {
        payloads.push((config(&url, "custom_headers", json!({ name.clone(): SECRET })), "custom_headers"));
        if !name.is_empty() {
            let mut named = config(&url, "auth_token", json!(SECRET));
            named["auth_header"] = json!(name);
            payloads.push((named, "auth_header"));
        }
    }
    payloads.extend(clashes(&url));
    assert!(payloads.len() > 600, "{}", payloads.len());
    for (config, key) in &payloads {
        for answer in [
            portolan.post("/v1/mcp-servers/", &json!({"server_name": "never", "config": config})).await,
            portolan.patch(&path, &json!({ "config": config })).await,
        ] {
            assert_eq!(answer.status, 422, "{config}: {}", answer.text);
            assert!(!answer.text.contains(SECRET), "{}", answer.text);
            assert!(answer.text.is_ascii() || *key != "auth_token", "the value is repeated: {}", answer.text);
            let body: Value = serde_json::from_str(&answer.text).unwrap();
            let locs: Vec<_> = body["errors"].as_array().unwrap().iter().map(|error| &error["loc"]).collect();
            assert!(locs.iter().any(|loc| loc.as_array().unwrap().contains(&json!(key))), "{config}: {body}");
        }
    }
    // In the flat body and in the shape of SSE it is the same function; one of each.
    let flat = json!({"server_name": "never", "type": "sse", "server_url": url, "custom_headers": {"X": "a\nb"}});
    portolan.post("/v1/mcp-servers/", &flat).await.expect(422);
    portolan.patch(&path, &json!({"token": "a\nb"})).await.expect(422);
    assert_eq!(portolan.get(&path).await.expect(200), before, "a refused change changes nothing");
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().len(), 1);
    assert_eq!(recorder.take(), [], "nothing was sent");
    portolan.stop().await;
}

/// Configurations that are taken, and the fields that arrive.
fn good() -> Vec<(Value, Vec<(&'static str, String)>)> {
    let field = |name: &'static str, value: &str| (name, value.to_owned());
    let printable: String = ('!'..='~').collect();
    let mut good = vec![
        (json!({"auth_token": "abc"}), vec![field("authorization", "Bearer abc")]),
        (json!({"auth_token": "Bearer abc"}), vec![field("authorization", "Bearer abc")]),
        (json!({"auth_token": "bearer abc"}), vec![field("authorization", "bearer abc")]),
        (json!({"auth_token": "BearerX abc"}), vec![field("authorization", "Bearer BearerX abc")]),
        (json!({"auth_token": "Basic dTpw"}), vec![field("authorization", "Bearer Basic dTpw")]),
        (json!({"auth_token": "abc", "auth_header": "Authorization"}), vec![field("authorization", "abc")]),
        (json!({"auth_token": "abc", "auth_header": "X-API-Key"}), vec![field("x-api-key", "abc")]),
        (json!({"auth_header": "X-API-Key"}), vec![]),
        (
            json!({"auth_token": "a", "custom_headers": {"X-B": "b"}}),
            vec![field("authorization", "Bearer a"), field("x-b", "b")],
        ),
        (
            json!({"custom_headers": {"X-Tab": "a\tb", "X-Space": "a  b"}}),
            vec![field("x-tab", "a\tb"), field("x-space", "a  b")],
        ),
        (json!({"custom_headers": {"X-All": printable}}), vec![field("x-all", &printable)]),
        (json!({"custom_headers": {"X-Empty": ""}}), vec![field("x-empty", "")]),
        (json!({"custom_headers": {"!#$%&'*+.^_`|~0aZ-": "1"}}), vec![field("!#$%&'*+.^_`|~0az-", "1")]),
        (json!({"custom_headers": {"Cookie": "a=b; c=d"}}), vec![field("cookie", "a=b; c=d")]),
        (json!({"custom_headers": {"User-Agent": "mine/1"}}), vec![field("user-agent", "mine/1")]),
        (json!({"custom_headers": {"Host": "virtual.example.com"}}), vec![field("host", "virtual.example.com")]),
        (json!({"custom_headers": {"X-Long": "a".repeat(30_000)}}), vec![field("x-long", &"a".repeat(30_000))]),
        // No template: it is sent as it stands.
        (json!({"custom_headers": {"X-Braces": "{{ token }}"}}), vec![field("x-braces", "{{ token }}")]),
        (json!({"custom_headers": {"X-Filled": "a {{ B | c }} d"}}), vec![field("x-filled", "a c d")]),
        (
            json!({"custom_headers": {"X-Percent": "%0d%0aX-Injected: 1"}}),
            vec![field("x-percent", "%0d%0aX-Injected: 1")],
        ),
        (
            json!({"custom_headers": {"X-Escaped": "\\r\\nX-Injected: 1"}}),
            vec![field("x-escaped", "\\r\\nX-Injected: 1")],
        ),
    ];
    let many: serde_json::Map<_, _> =
        (0..90).map(|number| (format!("X-{number}"), json!(number.to_string()))).collect();
    good.push((json!({ "custom_headers": many }), vec![field("x-0", "0"), field("x-89", "89")]));
    good
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_arrives_clean_and_once_without_the_callers_own() {
    let recorder = Recorder::start();
    let portolan = Portolan::start().await;
    for (number, (mut config, expected)) in good().into_iter().enumerate() {
        let kind = if number % 2 == 0 { "streamable_http" } else { "sse" };
        (config["server_url"], config["mcp_server_type"]) = (json!(recorder.url()), json!(kind));
        let body = json!({"server_name": number.to_string(), "config": config});
        let request = portolan
            .request("POST", "/v1/mcp-servers/")
            .header("authorization", "Bearer the-callers")
            .header("cookie", "session=the-callers")
            .header("x-bare-password", "password the-callers")
            .header("x-the-callers", "the-callers")
            .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
            .header("x-forwarded-for", "10.9.8.7")
            .header("user-agent", "the-callers/1")
            .header("accept-language", "tlh")
            .header("x-stainless-lang", "python")
            .json(&body);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 200, "{body}: {}", answer.text().await.unwrap());
        let requests = recorder.take();
        assert!(!requests.is_empty(), "it is connected to at once");
        for (line, fields) in requests {
            assert!(line.ends_with(" /mcp HTTP/1.1"), "{line}");
            let mut wanted: BTreeMap<&str, String> = expected.iter().cloned().collect();
            wanted.entry("user-agent").or_insert_with(|| format!("portolan/{}", env!("CARGO_PKG_VERSION")));
            wanted.entry("host").or_insert_with(|| recorder.addr.to_string());
            for (name, value) in wanted {
                assert_eq!(fields.get(name), Some(&vec![value]), "{config}");
            }
            // Beside what is configured, only HTTP's and MCP's own.
            let own = [
                "accept",
                "content-length",
                "content-type",
                "host",
                "mcp-method",
                "mcp-protocol-version",
                "user-agent",
            ];
            for (name, values) in &fields {
                assert_eq!(values.len(), 1, "{name} came twice");
                let configured = expected.iter().any(|(expected, _)| expected == name)
                    || (name.starts_with("x-") && name[2..].parse::<u8>().is_ok());
                assert!(own.contains(&name.as_str()) || configured, "{name} was not asked for");
                assert!(!values[0].contains("the-callers"), "{name}: {}", values[0]);
            }
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_and_a_run_pass_nothing_of_the_caller_on_but_the_agent_id() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let sse = fake::sse::serve(Fake::new(Script::default()));
    for (kind, fake) in [("streamable_http", &http), ("sse", &sse)] {
        let server = portolan.create(kind, json!({"mcp_server_type": kind, "server_url": fake.url})).await;
        let id = server["id"].as_str().unwrap();
        let tool_id = portolan.tool_id(id, "echo").await;
        let run = format!("/v1/mcp-servers/{id}/tools/{tool_id}/run");
        for (method, path) in [("PATCH", format!("/v1/mcp-servers/{id}/refresh?agent_id=agent-7")), ("POST", run)] {
            let request = portolan.request(method, &path).header("authorization", "Bearer the-callers");
            let request = request.header("cookie", "the-callers").header("x-agent-id", "the-callers");
            let request = request.header("x-the-callers", "1").header("idempotency-key", "the-callers");
            let answer = request.json(&json!({"args": {"message": "x"}})).send().await.unwrap();
            assert_eq!(answer.status().as_u16(), 200, "{path}");
        }
        let requests = fake.requests();
        assert!(requests.iter().any(|seen| seen.header("x-agent-id") == Some("agent-7")), "{kind}");
        for seen in &requests {
            let own = seen.headers.iter().all(|(name, value)| {
                !name.as_str().contains("the-callers") && !value.to_str().unwrap().contains("the-callers")
            });
            let foreign = ["authorization", "cookie", "idempotency-key"].iter().any(|name| seen.header(name).is_some());
            assert!(own && !foreign, "{:?}", seen.headers);
            assert!(seen.header("x-agent-id").is_none_or(|agent| agent == "agent-7" && seen.rpc() == "tools/list"));
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_header_that_is_no_clean_one_is_not_sent() {
    // As a row of another version, or of another hand, may hold it.
    let recorder = Recorder::start();
    let portolan = Portolan::start().await;
    for (number, (name, value)) in
        [("X-A", "a\r\nX-Injected: 1"), ("X A", "1"), ("Content-Length", "0"), ("X-A", " a")].into_iter().enumerate()
    {
        let remote = Remote {
            server_url: recorder.url(),
            auth_header: None,
            auth_token: None,
            custom_headers: Some([(name.to_owned(), value.to_owned().into())].into()),
            oauth: None,
        };
        let connector = portolan::model::Connector::StreamableHttp(remote);
        let id = format!("mcp_server-00000000-0000-4000-8000-00000000000{number}");
        let by = portolan::model::By::default();
        let server = portolan.app.store.create_server(&id, &number.to_string(), &connector, &by).await.unwrap();
        let refused = portolan.refresh(&server.id).await.expect(404);
        let error = refused["detail"]["error"].as_str().unwrap();
        assert_eq!(error, "A configured header is not valid HTTP; set custom_headers and auth_token again.");
    }
    assert_eq!(recorder.take(), []);
    portolan.stop().await;
}
