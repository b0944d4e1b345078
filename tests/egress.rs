//! Which addresses are connected to, through every door by which one comes in: what a client registers, redirects, the
//! endpoint event of HTTP+SSE, names, and what a server supplies (CONTRACT row 19).
//!
//! A [`Trap`] listens where nobody may connect, and must be untouched at the end. Linux has all of 127/8 without setup.

use std::collections::HashMap;
use std::error::Error as _;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use http::Method;
use portolan::config::{Cli, Lookup, Settings};
use portolan::mcp::{Egress, Forbidden, Trust};
use portolan::model::{By, Connector, Remote};
use reqwest::Url;
use serde_json::{Value, json};

use crate::fake::{self, Fake, Running, Script};
use crate::harness::{Database, Portolan, client};
use crate::process::{Program, command};

const REFUSED: &str = "This address may not be connected to: ";
/// What `--egress-deny` has in these tests.
const DENIED: &str = "127.66.0.0/16";

/// A listener that nobody may connect to. The kernel takes connections for it, and keeps them until they are looked for.
pub(crate) struct Trap(TcpListener);

impl Trap {
    pub(crate) fn at(address: impl Into<SocketAddr>) -> Self {
        let listener = TcpListener::bind(address.into()).expect("the address is free");
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    fn denied() -> Self {
        Self::at((Ipv4Addr::new(127, 66, 0, 1), 0))
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Asserts that nobody came, and that it would have been noticed.
    pub(crate) fn assert_untouched(self) {
        let came = self.0.accept();
        assert!(came.is_err(), "somebody connected to the forbidden address {}", self.addr());
        let _somebody = TcpStream::connect(self.addr()).unwrap();
        assert!(self.0.accept().is_ok(), "the trap works");
    }
}

/// Names that a test gives addresses, and how often each was looked up.
#[derive(Clone, Default)]
pub(crate) struct Zone(Arc<Mutex<Names>>);

type Names = HashMap<String, (Vec<IpAddr>, usize)>;

impl Zone {
    pub(crate) fn set(&self, name: &str, addresses: &[&str]) {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        self.0.lock().unwrap().entry(name.to_owned()).or_default().0 = addresses;
    }

    fn asked(&self, name: &str) -> usize {
        self.0.lock().unwrap().get(name).map_or(0, |(_, asked)| *asked)
    }

    pub(crate) fn lookup(&self) -> Lookup {
        let zone = self.clone();
        Lookup(Some(Arc::new(move |name| {
            let mut names = zone.0.lock().unwrap();
            let Some((addresses, asked)) = names.get_mut(name.trim_end_matches('.')) else { return Vec::new() };
            *asked += 1;
            addresses.clone()
        })))
    }
}

fn deny(settings: &mut Settings) {
    settings.egress.egress_deny = vec![DENIED.parse().unwrap()];
}

/// A server that answers by the path: `/redirect/STATUS/HEX` with that status and the text in HEX as `location`, and
/// `/sse/HEX` with that text in an endpoint event.
struct Pointer {
    addr: SocketAddr,
}

impl Pointer {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    // A connection that breaks is the client's affair.
                    let _over = Self::answer(&mut stream);
                });
            }
        });
        Self { addr }
    }

    fn answer(stream: &mut TcpStream) -> std::io::Result<()> {
        let mut head = Vec::new();
        let mut bytes = [0; 4096];
        while !head.windows(4).any(|window| window == b"\r\n\r\n") {
            match stream.read(&mut bytes)? {
                0 => return Ok(()),
                read => head.extend_from_slice(&bytes[..read]),
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let path = head.split(' ').nth(1).unwrap_or_default();
        let mut steps = path.split('/').skip(1);
        let text = |hex: Option<&str>| {
            let hex = hex.unwrap_or_default();
            let digits = (0..hex.len()).step_by(2);
            digits.map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap_or(b'?')).collect::<Vec<_>>()
        };
        match steps.next() {
            Some("redirect") => {
                write!(
                    stream,
                    "HTTP/1.1 {} Moved\r\ncontent-length: 0\r\nconnection: close\r\nlocation: ",
                    steps.next().unwrap()
                )?;
                stream.write_all(&text(steps.next()))?;
                stream.write_all(b"\r\n\r\n")
            }
            Some("sse") if head.starts_with("GET ") => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")?;
                stream.write_all(b"event: endpoint\ndata: ")?;
                stream.write_all(&text(steps.next()))?;
                stream.write_all(b"\n\n")?;
                // Until the client leaves.
                stream.set_read_timeout(Some(Duration::from_secs(10)))?;
                stream.read(&mut bytes).map(drop)
            }
            _ => stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"),
        }
    }

    fn redirect(&self, status: u16, location: &str) -> String {
        format!("http://{}/redirect/{status}/{}", self.addr, hex(location))
    }

    fn endpoint(&self, text: &str) -> String {
        format!("http://{}/sse/{}", self.addr, hex(text))
    }
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

/// URLs that everybody reads as this address and port.
fn readable(address: Ipv4Addr, port: u16, path: &str) -> Vec<String> {
    let octets = address.octets();
    let bits = u32::from(address);
    let forms: [fn(u32) -> String; 3] = [|n| n.to_string(), |n| format!("0{n:o}"), |n| format!("0x{n:x}")];
    let mut hosts = Vec::new();
    for parts in 1..=4_usize {
        let rest = bits & (u32::MAX >> (8 * (parts - 1)));
        let values: Vec<u32> = octets[..parts - 1].iter().map(|octet| u32::from(*octet)).chain([rest]).collect();
        for choice in 0..3_usize.pow(parts as u32) {
            let written =
                values.iter().enumerate().map(|(at, value)| forms[choice / 3_usize.pow(at as u32) % 3](*value));
            hosts.push(written.collect::<Vec<_>>().join("."));
        }
        let with = |form: fn(&u32) -> String| values.iter().map(form).collect::<Vec<_>>().join(".");
        hosts.push(with(|n| format!("0X{n:X}")));
        hosts.push(with(|n| format!("0x0000000{n:x}")));
        hosts.push(with(|n| format!("0000000{n:o}")));
        hosts.push(with(u32::to_string) + ".");
    }
    let [a, b, c, d] = octets;
    let (high, low) = (bits >> 16, bits & 0xffff);
    hosts.extend([
        format!("[::ffff:{address}]"),
        format!("[::FFFF:{address}]"),
        format!("[::ffff:{high:x}:{low:x}]"),
        format!("[::FFFF:{high:X}:{low:X}]"),
        format!("[0:0:0:0:0:ffff:{address}]"),
        format!("[0:0::0:0:ffff:{address}]"),
        format!("[0000:0000:0000:0000:0000:ffff:{high:04x}:{low:04x}]"),
        format!("[::ffff:{a:02x}{b:02x}:{c:02x}{d:02x}]"),
    ]);
    let mut urls: Vec<_> = hosts.iter().map(|host| format!("http://{host}:{port}{path}")).collect();
    urls.extend([
        format!("HTTP://{address}:{port}{path}"),
        format!("hTtP://{bits}:{port}{path}"),
        format!("http://good.test@{address}:{port}{path}"),
        format!("http://good.test:80@{address}:{port}{path}"),
        format!("http://good.test%40{address}@{address}:{port}{path}"),
        format!("http://:@{address}:{port}{path}"),
        format!("http://{address}:000{port}{path}"),
        format!("http://{address}:{port}{path}?@good.test"),
        format!("http://{address}:{port}{path}?x=http://good.test/"),
    ]);
    urls
}

/// URLs that are meant to be read as this address by one reader and not by another, or that hide it.
fn unreadable(address: Ipv4Addr, port: u16, path: &str) -> Vec<String> {
    let text = address.to_string();
    let bits = u32::from(address);
    let (high, low) = (bits >> 16, bits & 0xffff);
    let (not_high, not_low) = (!high & 0xffff, !low & 0xffff);
    let mut hosts = vec![
        // IPv6 that stands for IPv4: compatible, NAT64, stateless translation, 6to4, Teredo, ISATAP.
        format!("[::{address}]"),
        format!("[::{high:x}:{low:x}]"),
        format!("[0:0:0:0:0:0:{address}]"),
        format!("[64:ff9b::{address}]"),
        format!("[64:FF9B::{high:X}:{low:X}]"),
        format!("[0064:ff9b:0:0:0:0:{high:x}:{low:x}]"),
        format!("[64:ff9b:1::{address}]"),
        format!("[64:ff9b:1:{high:x}:{:x}:{:x}::]", low >> 8, (low & 0xff) << 8),
        format!("[::ffff:0:{address}]"),
        format!("[::ffff:0:{high:x}:{low:x}]"),
        format!("[2002:{high:x}:{low:x}::]"),
        format!("[2002:{high:X}:{low:X}::1]"),
        format!("[2002:{high:x}:{low:x}:1:2:3:4:5]"),
        format!("[2001:0:808:808:8000:3f:{not_high:x}:{not_low:x}]"),
        format!("[2001::8000:3f:{not_high:x}:{not_low:x}]"),
        format!("[2001:0:{high:x}:{low:x}:8000:3f:f7f7:f7f7]"),
        format!("[fe80::5efe:{address}]"),
        format!("[2001:470:1:2:0:5efe:{address}]"),
        format!("[fd00::200:5efe:{address}]"),
        // Zone ids.
        format!("[::ffff:{address}%25lo]"),
        format!("[::ffff:{address}%lo]"),
        "[fe80::1%25lo]".to_owned(),
        "[fe80::1%lo]".to_owned(),
        "[::1%251]".to_owned(),
        // No addresses.
        format!("[{address}]"),
        format!("[::ffff:{address}"),
        format!("::ffff:{address}"),
        format!("[[::ffff:{address}]]"),
        format!("[v1.{address}]"),
        format!("{text}.1"),
        format!("{text}.."),
        format!(".{text}."),
        text.replacen('.', "..", 1),
        format!("{}", u64::from(bits) + (1 << 32)),
        format!("0x1{bits:08x}"),
        format!("{}.256", text.rsplit_once('.').unwrap().0),
        format!("{}.08", text.rsplit_once('.').unwrap().0),
        // Percent-encoded.
        text.bytes().map(|byte| format!("%{byte:02x}")).collect(),
        text.replace('.', "%2e"),
        text.replacen('1', "%31", 1),
        text.replacen('1', "%2531", 1),
        format!("{text}%00"),
        format!("{text}%20"),
        format!("{text}%2f"),
        format!("{text}%00.good.test"),
        format!("%09{text}"),
        "%6c%6f%63alhost".to_owned(),
    ];
    // Digits and dots that IDNA turns into ASCII.
    let zeros = ['0', '０', '𝟎', '𝟘', '𝟢', '𝟬', '𝟶', '₀'];
    let foreign = |zero: char, dot: char| -> String {
        let digit = |c: char| char::from_u32(zero as u32 + (c as u32 - '0' as u32)).unwrap();
        text.chars().map(|c| if c == '.' { dot } else { digit(c) }).collect()
    };
    for zero in zeros {
        hosts.extend(
            ['.', '。', '．', '｡'].into_iter().filter(|dot| (zero, *dot) != ('0', '.')).map(|dot| foreign(zero, dot)),
        );
    }
    let circled =
        |c: char| if c == '0' { '⓪' } else { char::from_u32('①' as u32 + c as u32 - '1' as u32).unwrap() };
    hosts.push(text.chars().map(|c| if c == '.' { '.' } else { circled(c) }).collect());
    for invisible in ['\u{ad}', '\u{200b}', '\u{200c}', '\u{200d}', '\u{2060}', '\u{feff}', '\u{fe0f}', '\u{202e}'] {
        hosts.extend([
            format!("{invisible}{text}"),
            format!("{text}{invisible}"),
            text.replacen('.', &format!("{invisible}."), 1),
        ]);
        hosts.push(format!("local{invisible}host"));
    }
    let mut urls: Vec<_> = hosts.iter().map(|host| format!("http://{host}:{port}{path}")).collect();
    for white in
        ['\t', '\n', '\r', '\0', ' ', '\u{1}', '\u{b}', '\u{c}', '\u{7f}', '\u{85}', '\u{a0}', '\u{2028}', '\u{3000}']
    {
        urls.extend([
            format!("{white}http://{text}:{port}{path}"),
            format!("ht{white}tp://{text}:{port}{path}"),
            format!("http:/{white}/{text}:{port}{path}"),
            format!("http://{white}{text}:{port}{path}"),
            format!("http://{}:{port}{path}", text.replacen('.', &format!("{white}."), 1)),
            format!("http://{text}{white}:{port}{path}"),
            format!("http://{text}:{port}{white}{path}"),
            format!("http://good.test{white}@{text}:{port}{path}"),
            format!("http://{text}:{port}{path}{white}"),
        ]);
    }
    urls.extend([
        format!("http://good.test\\@{text}:{port}{path}"),
        format!("http://{text}:{port}\\@good.test{path}"),
        format!("http://{text}:{port}\\.good.test{path}"),
        format!("http:\\\\{text}:{port}{path}"),
        format!("http:/\\{text}:{port}{path}"),
        format!("\\\\{text}:{port}{path}"),
        format!("http:/{text}:{port}{path}"),
        format!("http:{text}:{port}{path}"),
        format!("http:///{text}:{port}{path}"),
        format!("http:////{text}:{port}{path}"),
        format!("//{text}:{port}{path}"),
        format!("///{text}:{port}{path}"),
        format!("://{text}:{port}{path}"),
        format!("{text}:{port}{path}"),
        format!("http://{text}:{port}#@good.test{path}"),
        format!("http://{text}:{port}{path}#"),
        format!("http://{text}:{port}{path}#x"),
        format!("http://good.test#@{text}:{port}{path}"),
        format!("http://good.test@evil.test@{text}:{port}{path}"),
        format!("http://a:b@c:d@{text}:{port}{path}"),
        format!("http://@@{text}:{port}{path}"),
        format!("http://{text}:{port}:{port}{path}"),
        format!("http://{text}:{port}:80@good.test@{text}:{port}{path}"),
        format!("http://{text}:0{path}"),
        format!("http://{text}:00000{path}"),
        format!("http://{text}:65536{path}"),
        format!("http://{text}:{}{path}", u32::from(port) + 65536),
        format!("http://{text}:-{port}{path}"),
        format!("http://{text}:+{port}{path}"),
        format!("http://{text}:0x{port:x}{path}"),
        format!("http://{text}:{port}.0{path}"),
        format!("http://{text}:８０{path}"),
        format!("http://{text}:٨٠{path}"),
        format!("http://{text}:http{path}"),
        "http://".to_owned(),
        "http:".to_owned(),
        "http://:80/".to_owned(),
        "http://@/".to_owned(),
        "http://user@/".to_owned(),
        "http://user@:80/".to_owned(),
        "http://?".to_owned(),
        "http://*/".to_owned(),
        "http://<127.0.0.1>/".to_owned(),
        "http://127.0.0.1|/".to_owned(),
        "http://127.0.0.1^/".to_owned(),
    ]);
    for scheme in [
        "ftp",
        "file",
        "gopher",
        "ws",
        "wss",
        "javascript",
        "data",
        "dict",
        "ldap",
        "unix",
        "http+unix",
        "httpx",
        "httpss",
        "h",
        "jar:http",
        "view-source:http",
        "url:http",
        "blob:http",
        "https:http",
        "about",
    ] {
        urls.push(format!("{scheme}://{text}:{port}{path}"));
    }
    urls
}

/// Registers a server of every URL, and asserts that each is refused, or stored and unreachable for a reason that begins
/// with `reason`.
async fn none_is_reached(portolan: &Portolan, kind: &str, urls: &[String], reason: &str) {
    for (number, url) in urls.iter().enumerate() {
        let config = json!({"mcp_server_type": kind, "server_url": url, "auth_token": "hunter2-secret"});
        let body = json!({"server_name": format!("{kind} {number}"), "config": config});
        let answer = portolan.post("/v1/mcp-servers/", &body).await;
        if answer.status == 422 {
            continue;
        }
        let server = answer.expect(200);
        assert_eq!(server["status"]["state"], "unreachable", "{url:?}: {server}");
        let error = server["status"]["error"].as_str().unwrap();
        assert!(error.starts_with(reason), "{url:?}: {error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[test]
fn there_are_enough_spellings_and_none_comes_twice() {
    let address = Ipv4Addr::new(127, 66, 0, 1);
    let (readable, unreadable) = (readable(address, 8000, "/mcp"), unreadable(address, 8000, "/mcp"));
    let mut all: Vec<_> = readable.iter().chain(&unreadable).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), readable.len() + unreadable.len());
    assert!(readable.len() > 140 && unreadable.len() > 250, "{} and {}", readable.len(), unreadable.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_a_denied_address_gets_a_connection_at_create() {
    let trap = Trap::denied();
    let portolan = Portolan::start_with(deny).await;
    let SocketAddr::V4(addr) = trap.addr() else { unreachable!() };
    let reason = format!("{REFUSED}--egress-deny names it.");
    none_is_reached(&portolan, "streamable_http", &readable(*addr.ip(), addr.port(), "/mcp"), &reason).await;
    let unreadable = unreadable(*addr.ip(), addr.port(), "/mcp");
    let stored = portolan.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().len();
    for url in &unreadable {
        let body = json!({"server_name": "never", "config": {"server_url": url}});
        let answer = portolan.post("/v1/mcp-servers/", &body).await;
        assert_eq!(answer.status, 422, "{url:?}: {}", answer.text);
        let body: Value = serde_json::from_str(&answer.text).unwrap();
        assert_eq!(body["errors"][0]["loc"], json!(["body", "config", "server_url"]), "{url:?}: {body}");
        assert!(!answer.text.contains(&addr.port().to_string()), "the value is repeated: {}", answer.text);
    }
    let after = portolan.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().len();
    assert_eq!(after, stored, "nothing is stored for a 422");
    trap.assert_untouched();
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_a_denied_address_gets_a_connection_at_patch() {
    let trap = Trap::denied();
    let http = fake::http::serve(Fake::new(Script::default()));
    let portolan = Portolan::start_with(deny).await;
    let SocketAddr::V4(addr) = trap.addr() else { unreachable!() };
    let server = portolan.create("moving", json!({ "server_url": http.url })).await;
    let path = format!("/v1/mcp-servers/{}", server["id"].as_str().unwrap());
    for kind in ["streamable_http", "sse"] {
        for url in readable(*addr.ip(), addr.port(), "/mcp") {
            portolan.patch(&path, &json!({"config": {"mcp_server_type": kind, "server_url": url}})).await.expect(200);
            let refused = portolan.refresh(server["id"].as_str().unwrap()).await.expect(404);
            assert_eq!(refused["detail"]["error"], format!("{REFUSED}--egress-deny names it."), "{url}");
        }
    }
    for url in unreadable(*addr.ip(), addr.port(), "/mcp") {
        let before = portolan.get(&path).await.expect(200);
        let refused = portolan.patch(&path, &json!({"config": {"server_url": url}})).await;
        assert_eq!(refused.status, 422, "{url:?}: {}", refused.text);
        assert_eq!(portolan.get(&path).await.expect(200), before);
    }
    // Back at an allowed address, it works.
    let back = json!({"config": {"mcp_server_type": "streamable_http", "server_url": http.url}});
    portolan.patch(&path, &back).await.expect(200);
    portolan.refresh(server["id"].as_str().unwrap()).await.expect(200);
    trap.assert_untouched();
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_plain_spelling_of_an_allowed_address_works() {
    let http = fake::http::serve_on(([127, 77, 0, 1], 0).into(), Fake::new(Script::default()));
    let portolan = Portolan::start_with(deny).await;
    let IpAddr::V4(address) = http.addr.ip() else { unreachable!() };
    for (number, url) in readable(address, http.addr.port(), "/mcp").iter().enumerate() {
        let server = portolan.create(&number.to_string(), json!({ "server_url": url })).await;
        assert_eq!(server["status"]["state"], "ready", "{url}: {server}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn loopback_works_however_it_is_called() {
    let v4 = fake::http::serve(Fake::new(Script::default()));
    let v6 = fake::http::serve_on((Ipv6Addr::LOCALHOST, 0).into(), Fake::new(Script::default()));
    let sse = fake::sse::serve(Fake::new(Script::default()));
    let portolan = Portolan::start_with(deny).await;
    let (four, six, old) = (v4.addr.port(), v6.addr.port(), sse.addr.port());
    for (kind, url) in [
        ("streamable_http", format!("http://localhost:{four}/mcp")),
        ("streamable_http", format!("http://LOCALHOST:{four}/mcp")),
        ("streamable_http", format!("http://127.1:{four}/mcp")),
        ("streamable_http", format!("http://[::1]:{six}/mcp")),
        ("streamable_http", format!("http://[0:0:0:0:0:0:0:1]:{six}/mcp")),
        ("sse", format!("http://localhost:{old}/sse")),
        ("sse", format!("http://127.1:{old}/sse")),
    ] {
        let server = portolan.create(&url, json!({"mcp_server_type": kind, "server_url": url})).await;
        assert_eq!(server["status"]["state"], "ready", "{url}: {server}");
    }
    portolan.stop().await;
}

/// What no setting allows.
const NEVER: [&str; 6] =
    ["169.254.169.254", "169.254.10.20", "100.100.100.200", "168.63.129.16", "224.0.0.251", "0.0.0.0"];

#[tokio::test(flavor = "multi_thread")]
async fn what_no_setting_allows_is_refused_when_it_is_written() {
    let portolan = Portolan::start_with(|settings| {
        settings.egress.egress_allow =
            Cli::parse_from(["portolan", "--egress-allow", "0.0.0.0/0,::/0,*.internal,*.goog"])
                .settings
                .egress
                .egress_allow;
    })
    .await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let server = portolan.create("here", json!({ "server_url": http.url })).await;
    let path = format!("/v1/mcp-servers/{}", server["id"].as_str().unwrap());
    let mut urls: Vec<String> =
        NEVER[..2].iter().flat_map(|address| readable(address.parse().unwrap(), 80, "/")).collect();
    urls.extend(NEVER.iter().map(|address| format!("http://{address}/")));
    urls.extend(
        [
            "[fe80::1]",
            "[fd00:ec2::254]",
            "[fd20:ce::254]",
            "[ff02::1]",
            "[::]",
            "0",
            "[::ffff:0.0.0.0]",
            "255.255.255.255",
            "240.0.0.1",
            "192.0.2.1",
            "[2001:db8::1]",
            "[64:ff9b::a9fe:a9fe]",
            "[2002:a9fe:a9fe::]",
            "metadata.google.internal",
            "METADATA.google.internal.",
            "metadata.goog",
            "instance-data",
        ]
        .iter()
        .map(|host| format!("https://{host}/mcp")),
    );
    for url in &urls {
        let body = json!({"server_name": "never", "config": {"server_url": url}});
        let refused = portolan.post("/v1/mcp-servers/", &body).await.expect(422);
        assert!(refused["errors"][0]["msg"].as_str().unwrap().starts_with(REFUSED), "{url}: {refused}");
        let refused = portolan.patch(&path, &json!({"config": {"server_url": url}})).await.expect(422);
        assert!(refused["errors"][0]["msg"].as_str().unwrap().starts_with(REFUSED), "{url}: {refused}");
    }
    assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200).as_array().unwrap().len(), 1);
    portolan.refresh(server["id"].as_str().unwrap()).await.expect(200);
    portolan.stop().await;
}

/// Those spellings that can stand in a header field or an event.
fn on_one_line(urls: Vec<String>) -> Vec<String> {
    urls.into_iter().filter(|url| !url.contains(['\r', '\n', '\0'])).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_redirect_leads_to_a_forbidden_address_or_another_origin() {
    let trap = Trap::denied();
    let elsewhere = fake::http::serve(Fake::new(Script::default()));
    let pointer = Pointer::start();
    let portolan = Portolan::start_with(deny).await;
    let SocketAddr::V4(addr) = trap.addr() else { unreachable!() };
    let mut targets = readable(*addr.ip(), addr.port(), "/mcp");
    targets.extend(on_one_line(unreadable(*addr.ip(), addr.port(), "/mcp")));
    targets.extend(["http://169.254.169.254/latest/meta-data/", "http://metadata.google.internal/"].map(str::to_owned));
    let codes = [301, 302, 303, 307, 308];
    let mut urls: Vec<_> =
        targets.iter().enumerate().map(|(at, target)| pointer.redirect(codes[at % 5], target)).collect();
    // Another origin is one, however harmless its address.
    let harmless = ["http://127.66.0.1", &elsewhere.url, &elsewhere.url.replace("127.0.0.1", "localhost")];
    urls.extend(codes.iter().flat_map(|code| harmless.map(|target| pointer.redirect(*code, target))));
    none_is_reached(&portolan, "streamable_http", &urls, "The server").await;
    let few: Vec<_> = urls.iter().step_by(9).cloned().collect();
    none_is_reached(&portolan, "sse", &few, "The server").await;
    assert_eq!(elsewhere.connections(), 0, "a token left its origin");
    trap.assert_untouched();

    // The allowed twin: 307 and 308 on one origin, with the token.
    let script = json!({"redirect": "/moved/mcp", "require_header": ["authorization", "Bearer hunter2"]});
    let moved = fake::http::serve(Fake::new(serde_json::from_value(script).unwrap()));
    let config = json!({"server_url": moved.url, "auth_token": "hunter2"});
    let server = portolan.create("moved", config).await;
    assert_eq!(server["status"]["state"], "ready", "{server}");
    assert!(moved.requests().iter().any(|seen| seen.path == "/moved/mcp"));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_endpoint_event_leads_away() {
    let trap = Trap::denied();
    let elsewhere = fake::sse::serve(Fake::new(Script::default()));
    let pointer = Pointer::start();
    let portolan = Portolan::start_with(deny).await;
    let SocketAddr::V4(addr) = trap.addr() else { unreachable!() };
    let mut texts = readable(*addr.ip(), addr.port(), "/messages");
    texts.extend(on_one_line(unreadable(*addr.ip(), addr.port(), "/messages")));
    let port = pointer.addr.port();
    texts.extend([
        elsewhere.url.clone(),
        format!("//{}/messages", elsewhere.addr),
        format!("https://127.0.0.1:{port}/messages"),
        format!("http://localhost:{port}/messages"),
        format!("http://127.0.0.1:{port}@127.66.0.1:{}/", addr.port()),
        format!("http://127.0.0.1:{port}.good.test/"),
        format!("http://127.66.0.1:{port}/"),
        "http://127.0.0.1/messages".to_owned(),
        "http://169.254.169.254/".to_owned(),
        "file:///etc/passwd".to_owned(),
        "javascript:alert(1)".to_owned(),
    ]);
    let urls: Vec<_> = texts.iter().map(|text| pointer.endpoint(text)).collect();
    none_is_reached(&portolan, "sse", &urls, "The server").await;
    assert_eq!(elsewhere.connections(), 0, "a token left its origin");
    trap.assert_untouched();

    // The allowed twins: relative to the stream, and absolute on its origin.
    for endpoint in ["relative", "root", "absolute"] {
        let script = serde_json::from_value(json!({ "endpoint": endpoint })).unwrap();
        let sse = fake::sse::serve(Fake::new(script));
        let server = portolan.create(endpoint, json!({"mcp_server_type": "sse", "server_url": sse.url})).await;
        assert_eq!(server["status"]["state"], "ready", "{server}");
    }
    portolan.stop().await;
}

fn egress(arguments: &[&str], zone: &Zone) -> Egress {
    let mut settings = Cli::parse_from([&["portolan"], arguments].concat()).settings;
    settings.egress.lookup = zone.lookup();
    Egress::new(&settings.egress, Duration::from_secs(2), None).unwrap()
}

/// Why a request was refused: when its destination was asked for, or when its name was looked up. `None` when it was
/// answered.
async fn refusal(egress: &Egress, url: &str, trust: Trust<'_>) -> Option<Forbidden> {
    let destination = match egress.to(url, trust).await {
        Ok(destination) => destination,
        Err(error) => {
            let text = error.to_string();
            let all = [
                Forbidden::LinkLocal,
                Forbidden::Metadata,
                Forbidden::Unspecified,
                Forbidden::Multicast,
                Forbidden::Reserved,
                Forbidden::Hidden,
                Forbidden::Own,
                Forbidden::Database,
                Forbidden::Denied,
                Forbidden::NotPublic,
                Forbidden::NotHttps,
            ];
            // An unusable URL goes nowhere either.
            let why = all.into_iter().find(|why| text == format!("{REFUSED}{why}."));
            return why.or_else(|| text.starts_with("The server_url").then_some(Forbidden::Reserved));
        }
    };
    let error = destination.request(Method::GET).send().await.err()?;
    let mut cause = error.source();
    while let Some(next) = cause {
        if let Some(forbidden) = next.downcast_ref() {
            return Some(*forbidden);
        }
        cause = next.source();
    }
    panic!("{url} failed for another reason: {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_supplies_is_on_its_origin_or_public_and_https() {
    let trap = Trap::at((Ipv4Addr::new(127, 66, 0, 1), 0));
    let SocketAddr::V4(addr) = trap.addr() else { unreachable!() };
    let http = fake::http::serve(Fake::new(Script::default()));
    let by = Url::parse(&http.url).unwrap();
    let zone = Zone::default();
    let names = [
        ("private.test", vec!["10.0.0.1"], Forbidden::NotPublic),
        ("loopback.test", vec!["127.66.0.1"], Forbidden::NotPublic),
        ("both.test", vec!["::1", "127.66.0.1"], Forbidden::NotPublic),
        ("tailnet.test", vec!["100.64.1.1"], Forbidden::NotPublic),
        ("mapped.test", vec!["::ffff:127.66.0.1"], Forbidden::NotPublic),
        ("nat64.test", vec!["64:ff9b::127.66.0.1"], Forbidden::Hidden),
        ("cloud.test", vec!["169.254.169.254"], Forbidden::Metadata),
        ("unique-local.test", vec!["fd12::1"], Forbidden::NotPublic),
    ];
    for (name, addresses, _) in &names {
        zone.set(name, addresses);
    }
    let open = egress(&[], &zone);
    let supplied = Trust::Supplied { by: &by };
    let mut urls = readable(*addr.ip(), addr.port(), "/.well-known/oauth-protected-resource");
    urls.extend(unreadable(*addr.ip(), addr.port(), "/.well-known/oauth-protected-resource"));
    for url in urls {
        assert!(refusal(&open, &url, supplied).await.is_some(), "{url:?}");
        let https = url.replacen("http", "https", 1);
        assert!(refusal(&open, &https, supplied).await.is_some(), "{https:?}");
    }
    for (name, _, why) in names {
        for port in ["", &format!(":{}", addr.port()), ":443"] {
            assert_eq!(
                refusal(&open, &format!("https://{name}{port}/token"), supplied).await,
                Some(why),
                "{name}{port}"
            );
            let plain = format!("http://{name}{port}/token");
            assert_eq!(refusal(&open, &plain, supplied).await, Some(Forbidden::NotHttps), "{plain}");
        }
    }
    // Another port of the same host is another origin.
    let beside = format!("http://{}:{}/", by.host_str().unwrap(), by.port().unwrap() ^ 1);
    assert_eq!(refusal(&open, &beside, supplied).await, Some(Forbidden::NotHttps));
    trap.assert_untouched();
    // The allowed twins: the origin itself, what the administrator lists, and that a public address passes the check.
    assert_eq!(refusal(&open, by.join("/authorize").unwrap().as_str(), supplied).await, None);
    let listing = egress(&["--egress-allow", "127.0.0.0/8"], &zone);
    let other = fake::http::serve(Fake::new(Script::default()));
    assert_eq!(refusal(&open, &other.url, supplied).await, Some(Forbidden::NotHttps));
    assert_eq!(refusal(&listing, &other.url, supplied).await, None);
    for public in
        ["https://1.1.1.1/", "https://[2606:4700::1111]/", "https://example.com/", "https://[64:ff9b::101:101]/"]
    {
        assert!(open.to(public, supplied).await.is_ok(), "{public}");
    }
}

/// A Portolan that looks names up in `zone`.
async fn with_names(zone: &Zone, change: impl FnOnce(&mut Settings)) -> Portolan {
    let lookup = zone.lookup();
    Portolan::start_with(|settings| {
        settings.egress.lookup = lookup;
        change(settings);
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn names_lead_only_to_their_allowed_addresses() {
    let trap = Trap::denied();
    let zone = Zone::default();
    let portolan = with_names(&zone, deny).await;
    let port = trap.addr().port();
    let http = fake::http::serve_on(([127, 77, 0, 2], port).into(), Fake::new(Script::default()));
    for (number, (addresses, why)) in [
        (vec!["127.66.0.1"], "--egress-deny names it"),
        (vec!["127.66.0.1", "127.66.0.1"], "--egress-deny names it"),
        (vec!["::ffff:127.66.0.1"], "--egress-deny names it"),
        (vec!["64:ff9b::127.66.0.1"], "it is an IPv6 address that stands for an IPv4 address which is not public"),
        (vec!["2002:7f42:1::"], "it is an IPv6 address that stands for an IPv4 address which is not public"),
        (vec!["169.254.169.254"], "it is that of a cloud's metadata service"),
        (vec!["fd00:ec2::254"], "it is that of a cloud's metadata service"),
        (vec!["169.254.1.1"], "it is a link-local address"),
        (vec!["fe80::1"], "it is a link-local address"),
        (vec!["0.0.0.0"], "it is an unspecified address"),
        (vec!["::"], "it is an unspecified address"),
        (vec!["224.0.0.1"], "it is a multicast or broadcast address"),
        (vec!["240.0.0.1"], "it is in a range that is reserved and belongs to no server"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("n{number}.test");
        zone.set(&name, &addresses);
        for (kind, dot) in [("streamable_http", ""), ("sse", ".")] {
            let url = format!("http://{name}{dot}:{port}/mcp");
            let server = portolan.create(&url, json!({"mcp_server_type": kind, "server_url": url})).await;
            assert_eq!(server["status"]["state"], "unreachable", "{server}");
            assert_eq!(server["status"]["error"], format!("{REFUSED}{why}."), "{addresses:?}");
        }
    }
    // Of several addresses the forbidden ones are left out.
    zone.set("mixed.test", &["169.254.169.254", "127.66.0.1", "127.77.0.2", "fe80::1"]);
    let server = portolan.create("mixed", json!({"server_url": format!("http://mixed.test:{port}/mcp")})).await;
    assert_eq!(server["status"]["state"], "ready", "{server}");
    assert!(http.connections() > 0);
    let unknown = portolan.create("unknown", json!({"server_url": "http://unknown.test/mcp"})).await;
    assert_eq!(unknown["status"]["error"], "The server cannot be used: the name is not known.");
    trap.assert_untouched();
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_changes_its_mind_reaches_nothing() {
    let trap = Trap::denied();
    let zone = Zone::default();
    let portolan = with_names(&zone, deny).await;
    let port = trap.addr().port();
    let start = || -> Running {
        let address = SocketAddr::from(([127, 77, 0, 3], port));
        fake::http::serve_on(address, Fake::new(Script::default()))
    };
    let http = start();
    zone.set("flip.test", &["127.77.0.3"]);
    let server = portolan.create("flip", json!({"server_url": format!("http://flip.test:{port}/mcp")})).await;
    let id = server["id"].as_str().unwrap();
    assert_eq!(portolan.run(id, "echo", json!({"message": "a"})).await["func_return"], "a");

    // A connection to the allowed address goes on being used.
    zone.set("flip.test", &["127.66.0.1"]);
    assert_eq!(portolan.run(id, "echo", json!({"message": "b"})).await["func_return"], "b");
    // A new one goes nowhere, however often it is asked for: the name is not even looked up each time.
    http.stop().await;
    let asked = zone.asked("flip.test");
    for _ in 0..20 {
        let answer = portolan.try_run(id, "echo", json!({"message": "c"})).await;
        assert!(answer.status == 502 || answer.status == 503, "{} {}", answer.status, answer.text);
    }
    let answer = portolan.try_run(id, "echo", json!({"message": "c"})).await;
    let rest: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!(answer.status == 503 && (1..=30).contains(&rest), "{} {}", answer.status, answer.text);
    assert!(zone.asked("flip.test") - asked < 8, "{} look-ups for 20 runs", zone.asked("flip.test") - asked);
    let refused = portolan.refresh(id).await.expect(404);
    assert_eq!(refused["detail"]["error"], format!("{REFUSED}--egress-deny names it."));
    let status = portolan.get(&format!("/v1/mcp-servers/{id}")).await.expect(200)["status"].clone();
    assert_eq!(status["state"], "unreachable");
    assert_eq!(status["error"], format!("{REFUSED}--egress-deny names it."));

    // Back where it was, it works again.
    zone.set("flip.test", &["127.77.0.3"]);
    let again = start();
    portolan.refresh(id).await.expect(200);
    assert_eq!(portolan.run(id, "echo", json!({"message": "d"})).await["func_return"], "d");
    assert!(again.connections() > 0);
    trap.assert_untouched();
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_alternates_is_never_followed_to_the_forbidden_address() {
    let trap = Trap::denied();
    let port = trap.addr().port();
    let http = fake::http::serve_on(([127, 77, 0, 4], port).into(), Fake::new(Script::default()));
    let turn = std::sync::atomic::AtomicUsize::new(0);
    // The answer to a check and the answer to the dialling one would differ.
    let lookup = Lookup(Some(Arc::new(move |_| {
        let odd = turn.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 2 == 1;
        vec![if odd { [127, 66, 0, 1] } else { [127, 77, 0, 4] }.into()]
    })));
    let portolan = Portolan::start_with(|settings| {
        deny(settings);
        settings.egress.lookup = lookup;
    })
    .await;
    let mut ready = 0;
    for number in 0..20 {
        let name = format!("n{number}.test");
        let server = portolan.create(&name, json!({"server_url": format!("http://{name}:{port}/mcp")})).await;
        ready += usize::from(server["status"]["state"] == "ready");
    }
    assert!(ready > 0, "the allowed address is reached");
    assert!(http.connections() > 0);
    trap.assert_untouched();
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn portolan_does_not_connect_to_itself() {
    let zone = Zone::default();
    let portolan = with_names(&zone, |_| {}).await;
    let own = Url::parse(&portolan.url("/")).unwrap().port().unwrap();
    // Another address of this machine with the same port counts as well, and can be watched.
    let trap = Trap::at((Ipv4Addr::new(127, 88, 0, 1), own));
    zone.set("self.test", &["127.0.0.1"]);
    zone.set("other.test", &["127.88.0.1", "::1"]);
    let mut urls = readable(Ipv4Addr::LOCALHOST, own, "/mcp");
    urls.extend(readable(Ipv4Addr::new(127, 88, 0, 1), own, "/v1/mcp-servers/"));
    urls.extend(["self.test", "other.test", "[::1]"].map(|host| format!("http://{host}:{own}/mcp")));
    none_is_reached(&portolan, "streamable_http", &urls, &format!("{REFUSED}Portolan itself listens there.")).await;
    none_is_reached(&portolan, "sse", &urls[..9], &format!("{REFUSED}Portolan itself listens there.")).await;
    trap.assert_untouched();
    // Another port of the same address is another server.
    let http = fake::http::serve(Fake::new(Script::default()));
    zone.set("self.test", &["127.0.0.1"]);
    let url = format!("http://self.test:{}/mcp", http.addr.port());
    assert_eq!(portolan.create("twin", json!({ "server_url": url })).await["status"]["state"], "ready");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn portolan_does_not_connect_to_its_database() {
    let zone = Zone::default();
    let portolan = with_names(&zone, |settings| {
        settings.egress.egress_allow =
            Cli::parse_from(["portolan", "--egress-allow", "127.0.0.0/8,*.test"]).settings.egress.egress_allow;
    })
    .await;
    let Some((host, port)) = portolan.app.store.address() else {
        // SQLite is a file.
        assert!(!portolan.shares_its_database());
        return portolan.stop().await;
    };
    zone.set(&host, &["127.0.0.1"]);
    zone.set("data.test", &["127.0.0.1"]);
    let host = host.parse().unwrap_or(Ipv4Addr::LOCALHOST);
    let mut urls = readable(host, port, "/mcp");
    urls.extend(["data.test", "[::1]", "127.99.0.1"].map(|host| format!("http://{host}:{port}/mcp")));
    none_is_reached(&portolan, "streamable_http", &urls, &format!("{REFUSED}Portolan's database is there.")).await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let url = format!("http://data.test:{}/mcp", http.addr.port());
    assert_eq!(portolan.create("twin", json!({ "server_url": url })).await["status"]["state"], "ready");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_url_is_judged_again_when_it_is_used() {
    // As a row of another version, or of another hand, may hold it.
    let portolan = Portolan::start_with(deny).await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let unusable = "The server_url is not one that can be used; set it again with PATCH.";
    let rows = [
        ("http://169.254.169.254/mcp".to_owned(), Some(format!("{REFUSED}{}.", Forbidden::Metadata))),
        ("http://[::127.0.0.1]/mcp".to_owned(), Some(format!("{REFUSED}{}.", Forbidden::Hidden))),
        ("http://a@b@127.0.0.1/mcp".to_owned(), Some(unusable.to_owned())),
        ("ftp://127.0.0.1/".to_owned(), Some(unusable.to_owned())),
        (http.url.clone(), None),
    ];
    for (number, (server_url, error)) in rows.into_iter().enumerate() {
        let remote = Remote { server_url, auth_header: None, auth_token: None, custom_headers: None, oauth: None };
        for connector in [Connector::StreamableHttp(remote.clone()), Connector::Sse(remote)] {
            if error.is_none() && matches!(connector, Connector::Sse(_)) {
                continue;
            }
            let id = format!("mcp_server-{}", uuid::Uuid::new_v4());
            let name = format!("{number} {connector:?}");
            portolan.app.store.create_server(&id, &name, &connector, &By::default()).await.unwrap();
            let answer = portolan.refresh(&id).await;
            match &error {
                Some(error) => assert_eq!(answer.expect(404)["detail"]["error"], *error),
                None => drop(answer.expect(200)),
            }
        }
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_takes_public_https_and_what_is_listed() {
    let zone = Zone::default();
    let http = fake::http::serve_on(([127, 77, 0, 5], 0).into(), Fake::new(Script::default()));
    let port = http.addr.port();
    let trap = Trap::at((Ipv4Addr::new(127, 66, 0, 9), 0));
    let trapped = trap.addr().port();
    let list = format!("listed.test:{port},*.listed.test,127.77.0.0/24,127.66.0.9:{port},[::1]:{port}");
    let portolan = with_names(&zone, |settings| {
        let arguments = ["portolan", "--egress", "strict", "--egress-allow", &list, "--egress-deny", "127.77.0.6"];
        settings.egress.egress = Cli::parse_from(arguments).settings.egress.egress;
        settings.egress.egress_allow = Cli::parse_from(arguments).settings.egress.egress_allow;
        settings.egress.egress_deny = Cli::parse_from(arguments).settings.egress.egress_deny;
    })
    .await;
    zone.set("listed.test", &["127.77.0.5"]);
    zone.set("a.b.listed.test", &["127.77.0.5"]);
    zone.set("elsewhere.test", &["127.66.0.9"]);
    zone.set("in-the-network.test", &["127.77.0.5"]);
    zone.set("half.test", &["127.66.0.9", "127.77.0.5"]);
    for host in ["listed.test", "LISTED.test.", "a.b.listed.test", "127.77.0.5", "in-the-network.test", "half.test"] {
        let url = format!("http://{host}:{port}/mcp");
        let server = portolan.create(&url, json!({ "server_url": url })).await;
        assert_eq!(server["status"]["state"], "ready", "{url}: {server}");
    }
    let (not_https, not_public) = (
        "it is not https, and --egress-allow does not name it",
        "it is not public, and --egress-allow does not name it",
    );
    for (url, why) in [
        (format!("http://127.66.0.9:{trapped}/mcp"), not_https),
        (format!("https://127.66.0.9:{trapped}/mcp"), not_public),
        (format!("http://elsewhere.test:{trapped}/mcp"), not_https),
        (format!("https://elsewhere.test:{trapped}/mcp"), not_public),
        (
            format!("http://listed.test.elsewhere.test:{trapped}/mcp"),
            "The server cannot be used: the name is not known",
        ),
        (format!("http://notlisted.test:{trapped}/mcp"), "The server cannot be used: the name is not known"),
        (format!("http://[::1]:{trapped}/mcp"), not_https),
        (format!("http://localhost:{trapped}/mcp"), "The server cannot be used: the name is not known"),
        (format!("http://10.1.2.3:{trapped}/mcp"), not_https),
        (format!("https://10.1.2.3:{trapped}/mcp"), not_public),
        (format!("https://[fd12::1]:{trapped}/mcp"), not_public),
        (format!("http://93.184.215.14:{trapped}/mcp"), not_https),
        ("http://127.77.0.6/mcp".to_owned(), "--egress-deny names it"),
    ] {
        let server = portolan.create(&url, json!({ "server_url": url })).await;
        assert_eq!(server["status"]["state"], "unreachable", "{url}: {server}");
        let error = server["status"]["error"].as_str().unwrap();
        assert!(error == format!("{REFUSED}{why}.") || error == format!("{why}."), "{url}: {error}");
    }
    // A name that is listed for one port may be what it likes on another.
    zone.set("listed.test", &["127.66.0.9"]);
    let url = format!("https://listed.test:{trapped}/mcp");
    let server = portolan.create("another port", json!({ "server_url": url })).await;
    assert_eq!(server["status"]["error"], format!("{REFUSED}{not_public}."));
    trap.assert_untouched();
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_the_environment_are_not_used_and_the_settings_are_read_from_it() {
    let trap = Trap::denied();
    let proxy = format!("http://{}", trap.addr());
    let http = fake::http::serve(Fake::new(Script::default()));
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut command = command(folder.path(), database.url().as_deref());
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env(name, &proxy).env(name.to_lowercase(), &proxy);
    }
    command.env("NO_PROXY", "").env("PORTOLAN_EGRESS", "strict");
    command
        .env("PORTOLAN_EGRESS_ALLOW", "localhost, 127.0.0.1:1")
        .env("PORTOLAN_EGRESS_DENY", "127.66.0.0/16,fd00::/8");
    let mut program = Program::start(command);
    let register = async |name: &str, url: &str| -> Value {
        let body = json!({"server_name": name, "config": {"server_url": url}});
        let answer = client().post(format!("{}/v1/mcp-servers/", program.url)).json(&body).send().await.unwrap();
        answer.json::<Value>().await.unwrap()["status"].clone()
    };
    let port = http.addr.port();
    let listed = register("listed", &format!("http://localhost:{port}/mcp")).await;
    assert_eq!(listed["state"], "ready", "{listed}");
    let unlisted = register("unlisted", &http.url).await;
    assert_eq!(unlisted["error"], format!("{REFUSED}{}.", Forbidden::NotHttps));
    let denied = register("denied", &format!("https://127.66.0.1:{}/", trap.addr().port())).await;
    assert_eq!(denied["error"], format!("{REFUSED}{}.", Forbidden::Denied));
    let own = register("own", &program.url.replace("127.0.0.1", "localhost")).await;
    assert_eq!(own["error"], format!("{REFUSED}{}.", Forbidden::Own));
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    trap.assert_untouched();
    database.remove().await;
}

/// Answers 404 over TLS, as `localhost`; the certificate is one that nobody knows by default (`openssl req -x509`, P-256, a
/// hundred years).
fn https() -> SocketAddr {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificate = include_bytes!("data/localhost.der").to_vec();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(include_bytes!("data/localhost.key.der").to_vec());
    let tls = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let tls = tls.with_no_client_auth().with_single_cert(vec![certificate.into()], key.into()).unwrap();
    let tls = Arc::new(tls);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let mut connection = rustls::ServerConnection::new(tls.clone()).unwrap();
            let mut stream = rustls::Stream::new(&mut connection, &mut socket);
            // A client that does not trust the certificate hangs up.
            if stream.read(&mut [0; 4096]).is_ok() {
                let answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                let _hung_up = stream.write_all(answer).and_then(|()| stream.flush());
            }
        }
    });
    addr
}

#[tokio::test(flavor = "multi_thread")]
async fn https_is_trusted_by_the_certificates_of_the_system_and_the_name_alone() {
    let https = https();
    let folder = tempfile::tempdir().unwrap();
    let encoded = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, include_bytes!("data/localhost.der"));
    let known = folder.path().join("known.pem");
    std::fs::write(&known, format!("-----BEGIN CERTIFICATE-----\n{encoded}\n-----END CERTIFICATE-----\n")).unwrap();
    let (by_name, by_address) = (format!("https://localhost:{}/", https.port()), format!("https://{https}/"));
    let reached = "The server cannot be used: the server answered HTTP 404 Not Found.";
    let unknown = "The server cannot be used: invalid peer certificate: ";
    for (trusted, url, expected) in
        [(true, &by_name, reached), (true, &by_address, unknown), (false, &by_name, unknown)]
    {
        let database = Database::new().await;
        let data = tempfile::tempdir().unwrap();
        let mut command = command(data.path(), database.url().as_deref());
        command.env("PORTOLAN_EGRESS", "strict").env("PORTOLAN_EGRESS_ALLOW", "127.0.0.0/8");
        if trusted {
            command.env("SSL_CERT_FILE", &known);
        }
        let mut program = Program::start(command);
        let body = json!({"server_name": "s", "config": {"server_url": url}});
        let answer = client().post(format!("{}/v1/mcp-servers/", program.url)).json(&body).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        let error = answer["status"]["error"].as_str().unwrap();
        assert!(error.starts_with(expected), "{trusted} {url}: {error}");
        program.signal("-TERM");
        assert_eq!(program.exit_code(), Some(0));
        database.remove().await;
    }
}
