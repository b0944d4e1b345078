//! Sign-in to MCP servers, against an authorization server that checks what a good one checks: from connect over the user's
//! consent to a run (CONTRACT row 24). `tokens` is about the time after it, `refused` about what must not work, `pages` about
//! the callback, `secrets` about what nobody may see, `replicas` about several Portolans.

mod log;
mod older;
mod pages;
mod refused;
mod replicas;
mod secrets;
mod tokens;

use std::sync::Arc;
use std::time::Duration;

use portolan::config::{Allowed, Settings};
use reqwest::header::LOCATION;
use reqwest::redirect::Policy;
use reqwest::{Response, Url};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::fake::oauth::{Authority, Guard, Registration, Rules, Said};
use crate::fake::{self, Fake, Running, Script};
use crate::harness::{PATIENCE, Portolan, openapi};

/// Where browsers reach the Portolan of a test, which nobody connects to: the test is the browser.
const PUBLIC: &str = "https://portolan.test";
const CALLBACK: &str = "https://portolan.test/v1/tools/mcp/oauth/callback";

/// How long a machine that is busy may take for a step that has several exchanges.
const LONG: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Http,
    Sse,
}

const BOTH: [Kind; 2] = [Kind::Http, Kind::Sse];

/// An MCP server, and the authorization server whose tokens it wants.
struct Upstream {
    authority: Authority,
    guard: Arc<Guard>,
    server: Running,
    kind: Kind,
}

impl Upstream {
    /// Each has an origin of its own.
    fn start(kind: Kind, rules: Rules) -> Self {
        Self::behind(Authority::start(rules), kind)
    }

    fn behind(authority: Authority, kind: Kind) -> Self {
        let guard = authority.guard();
        let fake = Fake::guarded(Script::default(), guard.clone());
        let server = match kind {
            Kind::Http => fake::http::serve(fake),
            Kind::Sse => fake::sse::serve(fake),
        };
        Self { authority, guard, server, kind }
    }

    fn config(&self) -> Value {
        let kind = match self.kind {
            Kind::Http => "streamable_http",
            Kind::Sse => "sse",
        };
        json!({ "mcp_server_type": kind, "server_url": self.server.url })
    }

    /// With a client that somebody registered.
    fn config_with(&self, oauth: Value) -> Value {
        let mut config = self.config();
        config["oauth"] = oauth;
        config
    }
}

/// Settings under which these authorization servers, which are on loopback, may be connected to.
fn allow<'a>(authorities: impl IntoIterator<Item = &'a Authority>) -> impl FnOnce(&mut Settings) {
    let allowed: Vec<_> = authorities
        .into_iter()
        .map(|authority| {
            let address: std::net::SocketAddr = authority.authority().parse().unwrap();
            Allowed::Address { address: address.ip(), port: address.port() }
        })
        .collect();
    move |settings| {
        settings.upstream.sign_in.public_url = Some(PUBLIC.parse().unwrap());
        settings.egress.egress_allow = allowed;
    }
}

/// A Portolan, and the id of the server that is registered there.
async fn registered(upstream: &Upstream) -> (Portolan, String) {
    let portolan = Portolan::start_with(allow([&upstream.authority])).await;
    let id = register(&portolan, "notes", upstream.config()).await;
    (portolan, id)
}

async fn register(portolan: &Portolan, name: &str, config: Value) -> String {
    let server = portolan.create(name, config).await;
    server["id"].as_str().unwrap().to_owned()
}

/// The stream of a connect.
struct Watch {
    method: &'static str,
    path: String,
    response: Response,
    headers: Vec<(String, String)>,
    /// All that came, and how much of it was read.
    text: String,
    read: usize,
}

impl Watch {
    async fn start(portolan: &Portolan, id: &str) -> Self {
        let path = format!("/v1/mcp-servers/connect/{id}");
        Self::open("GET", portolan.request("GET", &path), &path).await
    }

    async fn open(method: &'static str, request: reqwest::RequestBuilder, path: &str) -> Self {
        let response = request.send().await.unwrap();
        assert_eq!(response.status().as_u16(), 200);
        let headers = response.headers().iter();
        let headers: Vec<_> =
            headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        Self { method, path: path.to_owned(), response, headers, text: String::new(), read: 0 }
    }

    /// The next event; `None` at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some((frame, _)) = self.text[self.read..].split_once("\n\n") {
                let (frame, length) = (frame.to_owned(), frame.len() + 2);
                self.read += length;
                if frame == ": ping" {
                    continue;
                }
                let data = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("no frame of Letta's: {frame:?}"));
                assert!(!data.contains('\n'), "{data:?}");
                return Some(serde_json::from_str(data).unwrap());
            }
            let chunk = timeout(LONG, self.response.chunk()).await.expect("an event in time").unwrap();
            let Some(chunk) = chunk else {
                assert_eq!(self.read, self.text.len(), "it ends inside a frame");
                openapi::check(self.method, &self.path, 200, &self.headers, self.text.as_bytes());
                return None;
            };
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    #[track_caller]
    fn is(event: Option<Value>, wanted: &str) -> Value {
        let event = event.unwrap_or_else(|| panic!("the stream ended before {wanted}"));
        assert_eq!(event["event"], wanted, "{event}");
        event
    }

    async fn expect(&mut self, wanted: &str) -> Value {
        Self::is(self.next().await, wanted)
    }

    /// Up to the wait for the user; returns what the user is to open.
    async fn url(&mut self) -> Url {
        self.expect("connection_attempt").await;
        let required = self.expect("oauth_required").await;
        assert_eq!(required, json!({"event": "oauth_required", "message": "OAuth authentication required"}));
        let url = self.expect("authorization_url").await;
        let session = url["session_id"].as_str().unwrap();
        let hex = session.strip_prefix("mcp-oauth-").unwrap();
        assert!(hex.len() == 8 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()), "{session}");
        assert_eq!(url.as_object().unwrap().len(), 3, "{url}");
        let waiting = self.expect("waiting_for_auth").await;
        assert_eq!(waiting, json!({"event": "waiting_for_auth", "message": "Waiting for user authorization..."}));
        url["url"].as_str().unwrap().parse().unwrap()
    }

    /// The tools at the end.
    async fn success(mut self) -> Vec<Value> {
        let success = self.expect("success").await;
        assert_eq!(self.next().await, None);
        success["tools"].as_array().unwrap().clone()
    }

    /// The sentence at the end of a connect that did not get as far as a URL, or that got no answer to take.
    async fn failure(mut self) -> String {
        loop {
            let event = self.next().await.expect("an error before the end");
            match event["event"].as_str().unwrap() {
                "connection_attempt" | "oauth_required" | "waiting_for_auth" => {}
                "error" => {
                    assert_eq!(self.next().await, None);
                    let message = event["message"].as_str().unwrap().to_owned();
                    assert!(message.ends_with('.') && !message.contains("canary"), "{message}");
                    return message;
                }
                other => panic!("{other} before an error"),
            }
        }
    }
}

/// Where the authorization server sends the browser of a user who was shown this URL.
async fn visit(url: &Url) -> Url {
    let client = reqwest::Client::builder().no_proxy().redirect(Policy::none()).build().unwrap();
    let response = client.get(url.clone()).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 302, "{}", response.text().await.unwrap());
    response.headers()[LOCATION].to_str().unwrap().parse().unwrap()
}

/// The browser comes to Portolan.
async fn come_back(portolan: &Portolan, back: &Url) -> Value {
    assert!(back.as_str().starts_with(CALLBACK), "{back}");
    let path = &back[url::Position::BeforePath..];
    portolan.get(path).await.expect(200)
}

fn param(url: &Url, name: &str) -> Option<String> {
    url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into())
}

/// Another value for a parameter; none takes it out.
fn with_param(url: &Url, name: &str, value: Option<&str>) -> Url {
    let mut changed = url.clone();
    let others: Vec<_> = url.query_pairs().filter(|(key, _)| key != name).collect();
    changed.query_pairs_mut().clear().extend_pairs(others).extend_pairs(value.map(|value| (name, value)));
    changed
}

/// A whole sign-in; returns the tools that it ends with.
async fn sign_in(portolan: &Portolan, id: &str) -> Vec<Value> {
    let mut watch = Watch::start(portolan, id).await;
    let url = watch.url().await;
    let told = come_back(portolan, &visit(&url).await).await;
    assert_eq!(told["status"], "success", "{told}");
    watch.success().await
}

async fn state(portolan: &Portolan, id: &str) -> String {
    let server = portolan.get(&format!("/v1/mcp-servers/{id}")).await.expect(200);
    server["status"]["state"].as_str().unwrap().to_owned()
}

async fn echo(portolan: &Portolan, id: &str) {
    let outcome = portolan.run(id, "echo", json!({"message": "hello"})).await;
    assert_eq!((&outcome["status"], &outcome["func_return"]), (&json!("success"), &json!("hello")), "{outcome}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_goes_from_connect_over_consent_to_a_run() {
    for kind in BOTH {
        let upstream = Upstream::start(kind, Rules::default());
        let portolan = Portolan::start_with(allow([&upstream.authority])).await;
        let server = portolan.create("notes", upstream.config()).await;
        let id = server["id"].as_str().unwrap();
        assert_eq!(server["status"]["state"], "auth_required", "{server}");
        assert_eq!(upstream.authority.connections(), 0, "nobody asked for a sign-in yet");

        let mut watch = Watch::start(&portolan, id).await;
        let url = watch.url().await;
        assert!(url.as_str().starts_with(&format!("{}/authorize?", upstream.authority.url())), "{url}");
        for (name, wanted) in [
            ("response_type", "code"),
            ("redirect_uri", CALLBACK),
            ("code_challenge_method", "S256"),
            ("resource", &upstream.server.url),
        ] {
            assert_eq!(param(&url, name).as_deref(), Some(wanted), "{url}");
        }
        assert!(param(&url, "state").unwrap().len() >= 43, "256 bits: {url}");
        let registered = upstream.authority.asked().into_iter().find(|asked| asked.path == "/register").unwrap();
        assert_eq!((registered.param("client_name"), registered.param("application_type")), ("Portolan", "web"));
        assert_eq!(registered.param("redirect_uris"), json!([CALLBACK]).to_string());

        let told = come_back(&portolan, &visit(&url).await).await;
        let wanted =
            json!({"status": "success", "message": "Authorization successful", "server_url": upstream.server.url});
        assert_eq!(told, wanted);
        let tools = watch.success().await;
        let echo_tool = tools.iter().find(|tool| tool["name"] == "echo").unwrap();
        let keys: Vec<_> = echo_tool.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["name", "title", "description", "inputSchema", "outputSchema", "annotations", "meta"]);
        assert_eq!(echo_tool["inputSchema"], json!({"type": "object", "properties": {"message": {"type": "string"}}}));
        assert_eq!(portolan.tools(id).await.len(), tools.len(), "what was listed is stored");
        assert_eq!(state(&portolan, id).await, "ready");
        echo(&portolan, id).await;

        // The sign-in is used by whatever needs it, and by a second connect.
        portolan.refresh(id).await.expect(200);
        let mut again = Watch::start(&portolan, id).await;
        again.expect("connection_attempt").await;
        assert_eq!(again.success().await.len(), tools.len());
        assert_eq!(upstream.authority.granted("authorization_code"), 1);
        assert_eq!(upstream.authority.reused(), 0);
        let text = portolan.get(&format!("/v1/mcp-servers/{id}?reveal=true")).await.expect(200).to_string();
        for secret in upstream.authority.secrets() {
            assert!(!text.contains(&secret), "{text}");
        }
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_on_the_servers_own_origin_needs_no_setting() {
    for kind in BOTH {
        let upstream = Upstream::behind(Authority::embedded(Rules::default()), kind);
        let portolan = Portolan::start_with(allow([])).await;
        let id = register(&portolan, "notes", upstream.config()).await;
        sign_in(&portolan, &id).await;
        echo(&portolan, &id).await;
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connect_that_needs_no_sign_in_is_a_success_at_once() {
    let portolan = Portolan::start().await;
    let open = fake::http::serve(Fake::new(Script::default()));
    let id = register(&portolan, "open", json!({"mcp_server_type": "streamable_http", "server_url": open.url})).await;
    let (stdio, _script) = portolan.create_stdio("command", &json!({})).await;
    for id in [id.as_str(), stdio["id"].as_str().unwrap()] {
        let mut watch = Watch::start(&portolan, id).await;
        let attempt = watch.expect("connection_attempt").await;
        assert!(["open", "command"].contains(&attempt["server_name"].as_str().unwrap()), "{attempt}");
        let tools = watch.success().await;
        assert_eq!(tools.len(), portolan.tools(id).await.len());
    }
    // A success also syncs.
    open.set_script(serde_json::from_value(json!({"tools": [fake::script::tool("late", &json!({}))]})).unwrap());
    let mut watch = Watch::start(&portolan, &id).await;
    watch.expect("connection_attempt").await;
    assert_eq!(watch.success().await[0]["name"], "late");
    assert_eq!(portolan.tools(&id).await[0]["name"], "late");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_challenge_asks_for_a_sign_in() {
    let portolan = Portolan::start_with(allow([])).await;
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let id = register(
        &portolan,
        "gone",
        json!({"mcp_server_type": "streamable_http", "server_url": format!("http://{unused}/mcp")}),
    )
    .await;
    let mut watch = Watch::start(&portolan, &id).await;
    watch.expect("connection_attempt").await;
    let error = watch.expect("error").await;
    assert_eq!(watch.next().await, None);
    let message = error["message"].as_str().unwrap();
    assert!(message.ends_with('.') && !message.contains("127.0.0.1"), "{message}");

    for id in ["mcp_server-00000000-0000-4000-8000-000000000000", "x", "%00", "tools"] {
        for slash in ["", "/"] {
            let answer = portolan.get(&format!("/v1/mcp-servers/connect/{id}{slash}")).await;
            assert_eq!(answer.expect(404)["code"], "not_found");
        }
    }
    // Without the last step it is the id of a server.
    portolan.get("/v1/mcp-servers/connect").await.expect(404);
    let head = portolan.send("HEAD", &format!("/v1/mcp-servers/connect/{id}"), None).await;
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream; charset=utf-8")));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_signed_in_to_before_it_is_registered() {
    const CONNECT: &str = "/v1/tools/mcp/servers/connect";
    for kind in BOTH {
        let upstream = Upstream::start(kind, Rules::default());
        let portolan = Portolan::start_with(allow([&upstream.authority])).await;
        let mut body = json!({"server_name": "notes", "server_url": upstream.server.url});
        body["type"] = upstream.config()["mcp_server_type"].clone();
        for round in 1..=2 {
            let mut watch = Watch::open("POST", portolan.request("POST", CONNECT).json(&body), CONNECT).await;
            let url = watch.url().await;
            assert_eq!(come_back(&portolan, &visit(&url).await).await["status"], "success");
            assert!(watch.success().await.iter().any(|tool| tool["name"] == "echo"));
            assert_eq!(upstream.authority.granted("authorization_code"), round);
            assert_eq!(portolan.get("/v1/mcp-servers/").await.expect(200), json!([]));
        }
        // Registered after it, as letta-code does, it has the sign-in; a connect by its name is one to that server.
        let id = register(&portolan, "notes", upstream.config()).await;
        assert_eq!(state(&portolan, &id).await, "ready");
        echo(&portolan, &id).await;
        let mut watch = Watch::open("POST", portolan.request("POST", CONNECT).json(&body), CONNECT).await;
        watch.expect("connection_attempt").await;
        watch.success().await;
        assert_eq!(upstream.authority.granted("authorization_code"), 2);
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_portolan_that_does_not_know_its_address_says_so() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let portolan = Portolan::start_with(|settings| {
        allow([&upstream.authority])(settings);
        settings.upstream.sign_in.public_url = None;
    })
    .await;
    let id = register(&portolan, "notes", upstream.config()).await;
    let message = Watch::start(&portolan, &id).await.failure().await;
    assert!(message.contains("PORTOLAN_PUBLIC_URL"), "{message}");
    assert_eq!(upstream.authority.granted("authorization_code"), 0);

    // Under the name that Letta gave it, it does.
    let portolan = portolan
        .reopen(|settings| {
            allow([&upstream.authority])(settings);
            settings.upstream.sign_in.public_url = None;
            settings.upstream.sign_in.letta_agents_endpoint = Some(PUBLIC.parse().unwrap());
        })
        .await;
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_was_registered_by_hand_is_used() {
    for said in [None, Some(Said::Post), Some(Said::Basic)] {
        let upstream = Upstream::start(Kind::Http, Rules { registration: Registration::Closed, ..Rules::default() });
        let portolan = Portolan::start_with(allow([&upstream.authority])).await;
        let secret = said.map(|_| "by-hand-and-secret");
        upstream.authority.register("by-hand", said.map(|said| (said, "by-hand-and-secret")), CALLBACK);
        let method = match said {
            None => "none",
            Some(Said::Post) => "client_secret_post",
            Some(Said::Basic) => "client_secret_basic",
        };
        upstream.authority.set(|rules| rules.metadata = json!({"token_endpoint_auth_methods_supported": [method]}));
        let oauth = json!({"client_id": "by-hand", "client_secret": secret, "scope": "tools more"});
        let server = portolan.create("notes", upstream.config_with(oauth)).await;
        let id = server["id"].as_str().unwrap();
        let shown = secret.map(|_| "********");
        assert_eq!(server["oauth"]["client_secret"], json!(shown), "{server}");
        let mut watch = Watch::start(&portolan, id).await;
        let url = watch.url().await;
        assert_eq!(param(&url, "client_id").as_deref(), Some("by-hand"));
        assert_eq!(param(&url, "scope").as_deref(), Some("tools more"));
        come_back(&portolan, &visit(&url).await).await;
        watch.success().await;
        echo(&portolan, id).await;
        assert_eq!(upstream.authority.count("/register"), 0);
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_knows_no_client_is_told_of() {
    let upstream = Upstream::start(Kind::Http, Rules { registration: Registration::Closed, ..Rules::default() });
    let (portolan, id) = registered(&upstream).await;
    let message = Watch::start(&portolan, &id).await.failure().await;
    assert!(message.contains("client_id") || message.contains("regist"), "{message}");
    upstream.authority.set(|rules| rules.registration = Registration::Public);
    sign_in(&portolan, &id).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_reads_documents_gets_portolans() {
    let upstream = Upstream::start(Kind::Http, Rules { registration: Registration::Closed, ..Rules::default() });
    let (portolan, id) = registered(&upstream).await;
    upstream.authority.set(|rules| rules.client_documents = Some(portolan.url("")));
    let document = portolan.get("/v1/tools/mcp/oauth/client-metadata.json").await.expect(200);
    let own = format!("{PUBLIC}/v1/tools/mcp/oauth/client-metadata.json");
    assert_eq!((&document["client_id"], &document["redirect_uris"]), (&json!(own), &json!([CALLBACK])));
    let mut watch = Watch::start(&portolan, &id).await;
    let url = watch.url().await;
    assert_eq!(param(&url, "client_id"), Some(own));
    come_back(&portolan, &visit(&url).await).await;
    watch.success().await;
    echo(&portolan, &id).await;

    // Such URLs are https.
    let portolan = portolan
        .reopen(|settings| {
            allow([&upstream.authority])(settings);
            settings.upstream.sign_in.public_url = Some("http://127.0.0.1:8283".parse().unwrap());
        })
        .await;
    portolan.get("/v1/tools/mcp/oauth/client-metadata.json").await.expect(404);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_discovery_is_awaited() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let hold = upstream.authority.hold(fake::oauth::METADATA);
    let mut watch = Watch::start(&portolan, &id).await;
    watch.expect("connection_attempt").await;
    crate::harness::eventually("discovery is asked for", || upstream.authority.count(fake::oauth::METADATA) > 0).await;
    // Letta's fixed second is long over.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    drop(hold);
    watch.expect("oauth_required").await;
    let url = watch.expect("authorization_url").await["url"].as_str().unwrap().parse().unwrap();
    come_back(&portolan, &visit(&url).await).await;
    watch.expect("waiting_for_auth").await;
    watch.success().await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_the_streams_and_a_client_that_leaves_ends_the_wait() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let (portolan, id) = registered(&upstream).await;
    let mut left = Watch::start(&portolan, &id).await;
    let url = left.url().await;
    drop(left);
    // What the user finishes counts all the same.
    let told = come_back(&portolan, &visit(&url).await).await;
    assert_eq!(told["status"], "success", "{told}");
    echo(&portolan, &id).await;

    let other = Upstream::start(Kind::Http, Rules::default());
    let portolan = portolan.reopen(allow([&upstream.authority, &other.authority])).await;
    let id = register(&portolan, "other", other.config()).await;
    let mut watch = Watch::start(&portolan, &id).await;
    watch.url().await;
    let reading = tokio::spawn(async move { watch.next().await });
    timeout(2 * PATIENCE, portolan.stop()).await.expect("nobody waits for the user");
    assert_eq!(reading.await.unwrap(), None, "the stream ends where it is");
}
