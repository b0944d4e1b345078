//! Sign-in by the older API, whose clients connect before they register (CONTRACT rows 22 and 24).

use portolan::model::sha256_hex;

use crate::harness::Remote;

use super::*;

const CONNECT: &str = "/v1/tools/mcp/servers/connect";
const ALL: &str = "/v1/tools/mcp/servers";

/// A server as those clients tell of it.
fn flat(upstream: &Upstream, name: &str) -> Value {
    let mut body = upstream.config();
    body["server_name"] = json!(name);
    body
}

/// The stream of a connect with this body.
async fn connect(portolan: &Portolan, body: &Value) -> Stream {
    Stream::of(portolan.request("POST", CONNECT).json(body)).await
}

struct Stream {
    response: Response,
    text: String,
}

impl Stream {
    async fn of(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        assert_eq!(response.status().as_u16(), 200);
        Self { response, text: String::new() }
    }

    /// All events up to this one.
    async fn until(&mut self, event: &str) -> Vec<Value> {
        let wanted = format!("\"event\":\"{event}\"");
        while !self.text.rsplit_once("\n\n").is_some_and(|(whole, _)| whole.contains(&wanted)) {
            let chunk = timeout(LONG, self.response.chunk()).await.expect("an event in time").unwrap();
            let chunk = chunk.unwrap_or_else(|| panic!("the stream ended before {event}: {}", self.text));
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
        let frames = self.text.split("\n\n").filter_map(|frame| frame.strip_prefix("data: "));
        frames.map(|frame| serde_json::from_str(frame).unwrap()).collect()
    }

    /// Signs in, as the user does; the tools at the end.
    async fn sign_in(mut self, portolan: &Portolan) -> Vec<Value> {
        let events = self.until("waiting_for_auth").await;
        let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
        assert_eq!(names, ["connection_attempt", "oauth_required", "authorization_url", "waiting_for_auth"]);
        let url: Url = events[2]["url"].as_str().unwrap().parse().unwrap();
        assert_eq!(come_back(portolan, &visit(&url).await).await["status"], "success");
        self.success().await
    }

    async fn success(mut self) -> Vec<Value> {
        let events = self.until("success").await;
        events.last().unwrap()["tools"].as_array().unwrap().clone()
    }
}

async fn by_name(portolan: &Portolan, name: &str) -> Value {
    let list = portolan.get("/v1/mcp-servers/").await.expect(200);
    list.as_array().unwrap().iter().find(|server| server["server_name"] == name).unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_of_before_the_registration_goes_with_it() {
    for kind in BOTH {
        let upstream = Upstream::start(kind, Rules::default());
        let portolan = Portolan::start_with(allow([&upstream.authority])).await;
        let tools = connect(&portolan, &flat(&upstream, "notes")).await.sign_in(&portolan).await;
        assert!(tools.iter().any(|tool| tool["name"] == "echo"));
        assert_eq!(portolan.get(ALL).await.expect(200), json!({}), "nothing is registered");

        // Another URL is another server.
        let mut other = flat(&upstream, "other");
        other["server_url"] = json!(format!("{}?other", upstream.server.url));
        portolan.send("PUT", ALL, Some(&other)).await.expect(200);
        assert_eq!(by_name(&portolan, "other").await["status"]["state"], "auth_required");

        portolan.send("PUT", ALL, Some(&flat(&upstream, "notes"))).await.expect(200);
        let server = by_name(&portolan, "notes").await;
        assert_eq!(server["status"]["state"], "ready", "{server}");
        echo(&portolan, server["id"].as_str().unwrap()).await;
        let added = portolan.send("POST", &format!("{ALL}/notes/echo"), None).await.expect(200);
        assert_eq!(added["name"], "echo");
        assert_eq!(upstream.authority.granted("authorization_code"), 1);

        // It is for one server.
        portolan.send("PUT", ALL, Some(&flat(&upstream, "twin"))).await.expect(200);
        assert_eq!(by_name(&portolan, "twin").await["status"]["state"], "auth_required");
        assert_eq!(upstream.authority.reused(), 0);
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connect_to_what_is_registered_signs_that_in() {
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let portolan = Portolan::start_with(allow([&upstream.authority])).await;
    let body = flat(&upstream, "notes");
    portolan.send("PUT", ALL, Some(&body)).await.expect(200);
    assert_eq!(by_name(&portolan, "notes").await["status"]["state"], "auth_required");
    let tools = connect(&portolan, &body).await.sign_in(&portolan).await;
    let server = by_name(&portolan, "notes").await;
    assert_eq!((&server["status"]["state"], &server["status"]["tool_count"]), (&json!("ready"), &json!(tools.len())));
    echo(&portolan, server["id"].as_str().unwrap()).await;
    assert_eq!(connect(&portolan, &body).await.success().await.len(), tools.len(), "the second one at once");
    // Of the same name, but not the same: it is asked as what it is.
    let mut other = body.clone();
    other["auth_token"] = json!("wrong");
    let events = connect(&portolan, &other).await.until("error").await;
    assert_eq!(events[0], json!({"event": "connection_attempt", "server_name": "notes"}));
    portolan.post(CONNECT, &json!({"server_name": "notes"})).await.expect(422);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_of_before_the_registration_is_of_whoever_made_it() {
    const TOKENS: [&str; 2] = ["ptl_a-DAw2Zb8iEwJ0mYw5cUuV1o7x", "ptl_b-kq0Zb8iEwJ0mYw5cUuV1o7xs3"];
    let upstream = Upstream::start(Kind::Http, Rules::default());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    let line = |(name, token): (&str, &str)| format!("{name}:admin:{}\n", sha256_hex(token));
    std::fs::write(&file, ["a", "b"].into_iter().zip(TOKENS).map(line).collect::<String>()).unwrap();
    let portolan = Portolan::start_with(|settings| {
        allow([&upstream.authority])(settings);
        settings.tokens.tokens_file = Some(file);
    })
    .await;
    let [a, b] = TOKENS.map(|token| portolan.remote_with(token));
    let body = flat(&upstream, "notes");
    Stream::of(a.request("POST", CONNECT).json(&body)).await.sign_in(&portolan).await;
    let register = async |remote: &Remote, name: &str| {
        remote.send("PUT", ALL, Some(&flat(&upstream, name))).await.expect(200);
        let list = remote.send("GET", "/v1/mcp-servers/", None).await.expect(200);
        let server = list.as_array().unwrap().iter().find(|server| server["server_name"] == name).unwrap();
        server["status"]["state"].as_str().unwrap().to_owned()
    };
    assert_eq!(register(&b, "of b").await, "auth_required");
    assert_eq!(register(&a, "of a").await, "ready");
    portolan.stop().await;
}
