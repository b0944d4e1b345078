//! Traces (docs/traces.md): what a collector is told of a run and what it is never told, whose trace goes on where, and that
//! a collector that is away, slow or broken costs no run anything.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use portolan::config::{Profile, Settings};
use prost::Message;
use serde_json::{Value, json};

use crate::fake::script::MODERN;
use crate::fake::tcp::{Manner, listen};
use crate::fake::{self, Fake, Script};
use crate::harness::{Answer, Database, PATIENCE, Portolan, eventually, settings};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const STATE: &str = "rojo=00f067aa0ba902b7,congo=t61\"r";
const RUN: &str = "POST /v1/mcp-servers/{mcp_server_id}/tools/{tool_id}/run";

/// A collector that takes OTLP over HTTP, and keeps what it is sent.
struct Collector {
    addr: SocketAddr,
    kept: Arc<Kept>,
}

#[derive(Default)]
struct Kept {
    requests: Mutex<Vec<(String, HeaderMap, Bytes)>>,
    /// What it answers before it takes anything.
    answers: Mutex<VecDeque<(StatusCode, String)>>,
}

impl Collector {
    async fn start() -> Self {
        Self::that_answers_first([]).await
    }

    /// These statuses, with these addresses to go to.
    async fn that_answers_first(answers: impl IntoIterator<Item = (StatusCode, String)>) -> Self {
        let kept = Arc::new(Kept { answers: Mutex::new(answers.into_iter().collect()), ..Kept::default() });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = axum::handler::Handler::with_state(take, kept.clone());
        // It ends with the test's runtime.
        tokio::spawn(axum::serve(listener, service.into_make_service()).into_future());
        Self { addr, kept }
    }

    fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    fn requests(&self) -> Vec<(String, HeaderMap, Bytes)> {
        self.kept.requests.lock().unwrap().clone()
    }

    /// What each request said, as OpenTelemetry's own messages read it.
    fn exports(&self) -> Vec<ExportTraceServiceRequest> {
        self.requests().iter().map(|(.., body)| ExportTraceServiceRequest::decode(&body[..]).unwrap()).collect()
    }

    fn spans(&self) -> Vec<Span> {
        let resources = self.exports().into_iter().flat_map(|export| export.resource_spans);
        resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
    }

    /// Whether these bytes are anywhere in what was sent to it.
    fn knows(&self, text: &str) -> bool {
        self.requests().iter().any(|(.., body)| body.windows(text.len()).any(|part| part == text.as_bytes()))
    }
}

async fn take(State(kept): State<Arc<Kept>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 64 << 20).await.unwrap();
    kept.requests.lock().unwrap().push((head.uri.path().to_owned(), head.headers, body));
    let answer = kept.answers.lock().unwrap().pop_front();
    let (status, to) = answer.unwrap_or((StatusCode::OK, String::new()));
    (status, [("location", to)]).into_response()
}

fn tracing_to(url: &str) -> impl FnOnce(&mut Settings) {
    let url = url.to_owned().into();
    move |settings| settings.traces.otlp_endpoint = Some(url)
}

fn attributes(span: &Span) -> BTreeMap<String, Value> {
    let value = |value: Any| match value {
        Any::StringValue(text) => json!(text),
        Any::BoolValue(flag) => json!(flag),
        Any::IntValue(number) => json!(number),
        other => panic!("{other:?}"),
    };
    let pairs = span.attributes.iter().cloned();
    pairs.map(|pair| (pair.key, value(pair.value.unwrap().value.unwrap()))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_error(span: &Span) -> bool {
    span.status.as_ref().is_some_and(|status| status.code == 2)
}

/// The only span of this name.
#[track_caller]
fn only<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    let names: Vec<_> = spans.iter().map(|span| &span.name).collect();
    assert_eq!(found.len(), 1, "{name} in {names:?}");
    found[0]
}

fn script(fields: Value) -> Script {
    serde_json::from_value(fields).unwrap()
}

/// A run of `echo` or another tool by a caller that sends these header fields.
async fn run_with(portolan: &Portolan, id: &str, tool: &str, args: Value, fields: &[(&str, &str)]) -> Answer {
    let path = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, tool).await);
    let request = portolan.request("POST", &path).json(&json!({ "args": args }));
    let request = fields.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    Answer::of("POST", &path, request).await
}

fn id(server: &Value) -> String {
    assert_eq!(server["status"]["state"], "ready", "{server}");
    server["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_a_span_and_so_are_the_session_that_is_opened_for_it_and_the_call() {
    let collector = Collector::start().await;
    let portolan = Portolan::start_with(tracing_to(&collector.url())).await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let sse = fake::sse::serve(Fake::new(Script::default()));
    let modern = fake::http::serve(Fake::new(script(json!({ "revisions": [MODERN] }))));
    let (stdio, _script) = portolan.create_stdio("stdio", &json!({})).await;
    let servers = [
        ("stdio", stdio, None, "2025-11-25"),
        (
            "streamable_http",
            portolan.create("http", json!({ "server_url": http.url })).await,
            Some(http.addr),
            "2025-11-25",
        ),
        (
            "sse",
            portolan.create("sse", json!({"mcp_server_type": "sse", "server_url": sse.url})).await,
            Some(sse.addr),
            "2025-11-25",
        ),
        (
            "streamable_http",
            portolan.create("modern", json!({ "server_url": modern.url })).await,
            Some(modern.addr),
            MODERN,
        ),
    ];
    for (_, server, ..) in &servers {
        let id = id(server);
        portolan.app.mcp.forget(&id);
        for message in ["opens", "reuses"] {
            let ran = run_with(&portolan, &id, "echo", json!({ "message": message }), &[]).await.expect(200);
            assert_eq!(ran["func_return"], message);
        }
    }
    let traces = portolan.app.traces.clone();
    portolan.stop().await;
    assert_eq!(traces.lost(), 0);

    for export in collector.exports() {
        for resource in export.resource_spans {
            let described = resource.resource.unwrap().attributes;
            let name = described.iter().find(|pair| pair.key == "service.name").unwrap().value.clone().unwrap();
            assert_eq!(name.value, Some(Any::StringValue("portolan".to_owned())));
            assert_eq!(resource.scope_spans[0].scope.as_ref().unwrap().name, "portolan");
        }
    }
    assert!(
        collector
            .requests()
            .iter()
            .all(|(path, headers, _)| { path == "/v1/traces" && headers["content-type"] == "application/x-protobuf" })
    );
    let spans = collector.spans();
    assert_eq!(spans.len(), servers.len() * 5, "two runs, two calls, one session each");
    for (transport, server, addr, revision) in &servers {
        let of_server = |span: &&Span| attributes(span).get("portolan.server.id") == Some(&server["id"]);
        let runs: Vec<_> = spans.iter().filter(of_server).collect();
        assert_eq!(runs.len(), 2);
        for (run, is_reused) in runs.into_iter().zip([false, true]) {
            assert_eq!((&*run.name, run.kind, is_error(run)), (RUN, 2, false));
            assert!(run.parent_span_id.is_empty() && run.trace_id.len() == 16 && run.flags & 1 == 1, "a root");
            let told = attributes(run);
            let expected = [
                ("http.request.method", json!("POST")),
                ("http.route", json!(&RUN[5..])),
                ("http.response.status_code", json!(200)),
                ("url.scheme", json!("http")),
                ("gen_ai.tool.name", json!("echo")),
                ("portolan.server.name", server["server_name"].clone()),
                ("portolan.transport", json!(transport)),
                ("portolan.run.outcome", json!("success")),
            ];
            for (key, value) in expected {
                assert_eq!(told[key], value, "{key}");
            }
            let children: Vec<Span> = spans.iter().filter(|span| span.parent_span_id == run.span_id).cloned().collect();
            assert!(children.iter().all(|child| child.trace_id == run.trace_id && child.kind == 3 && !is_error(child)));
            assert_eq!(children.len(), if is_reused { 1 } else { 2 });
            let call = only(&children, "tools/call echo");
            let told = attributes(call);
            let expected = [
                ("mcp.method.name", json!("tools/call")),
                ("mcp.protocol.version", json!(revision)),
                ("gen_ai.operation.name", json!("execute_tool")),
                ("gen_ai.tool.name", json!("echo")),
                ("portolan.session.reused", json!(is_reused)),
                ("portolan.transport", json!(transport)),
                ("network.transport", json!(if addr.is_none() { "pipe" } else { "tcp" })),
            ];
            for (key, value) in expected {
                assert_eq!(told[key], value, "{key}");
            }
            assert_eq!(told.get("server.address"), addr.map(|addr| json!(addr.ip().to_string())).as_ref());
            assert_eq!(told.get("server.port"), addr.map(|addr| json!(addr.port())).as_ref());
            assert!(run.start_time_unix_nano <= call.start_time_unix_nano);
            assert!(call.start_time_unix_nano <= call.end_time_unix_nano);
            if !is_reused {
                let opening = only(&children, "open session");
                assert_eq!(attributes(opening)["portolan.transport"], json!(transport));
                assert!(opening.start_time_unix_nano <= call.start_time_unix_nano);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trace_of_a_caller_goes_on_in_the_run_and_at_its_server() {
    let collector = Collector::start().await;
    let portolan = Portolan::start_with(tracing_to(&collector.url())).await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let sse = fake::sse::serve(Fake::new(Script::default()));
    let modern = fake::http::serve(Fake::new(script(json!({ "revisions": [MODERN] }))));
    let servers = [
        (&http, id(&portolan.create("http", json!({ "server_url": http.url })).await)),
        (&sse, id(&portolan.create("sse", json!({"mcp_server_type": "sse", "server_url": sse.url})).await)),
        (&modern, id(&portolan.create("modern", json!({ "server_url": modern.url })).await)),
    ];
    let (old, old_script) = portolan.create_stdio("old", &json!({})).await;
    let (new, new_script) = portolan.create_stdio("new", &json!({ "revisions": [MODERN] })).await;
    let ids: Vec<_> = servers.iter().map(|(_, id)| id.clone()).chain([id(&old), id(&new)]).collect();
    let parent = format!("00-{TRACE}-{CALLER}-01");
    for id in &ids {
        let fields = [("traceparent", &*parent), ("tracestate", STATE)];
        run_with(&portolan, id, "echo", json!({"message": "x"}), &fields).await.expect(200);
    }
    let call = |script: &crate::harness::Script| {
        let seen = script.seen().into_iter().map(|(_, message)| message);
        seen.filter(|message| message["method"] == "tools/call").collect::<Vec<_>>()
    };
    let (told_old, told_new) = (call(&old_script), call(&new_script));
    portolan.stop().await;

    let spans = collector.spans();
    let (runs, calls): (Vec<_>, Vec<_>) = spans.iter().partition(|span| span.kind == 2);
    assert_eq!((runs.len(), calls.len()), (5, 5));
    for span in &spans {
        assert_eq!((hex(&span.trace_id), &*span.trace_state), (TRACE.to_owned(), STATE));
    }
    for run in runs {
        assert_eq!(hex(&run.parent_span_id), CALLER);
        assert_eq!(run.flags, 0x301, "sampled, and the parent is remote");
    }
    let mut passed: Vec<_> = calls.iter().map(|call| format!("00-{TRACE}-{}-01", hex(&call.span_id))).collect();
    assert!(calls.iter().all(|call| call.flags == 0x101), "sampled, and the parent is ours");
    // Each server is told of its own call, and of nothing else.
    let mut sent = Vec::new();
    for (server, _) in &servers {
        for seen in server.requests() {
            let is_call = seen.rpc() == "tools/call";
            assert_eq!(seen.header("traceparent").is_some(), is_call, "{}", seen.rpc());
            assert_eq!(seen.header("tracestate"), is_call.then_some(STATE));
            sent.extend(seen.header("traceparent").map(str::to_owned));
            let meta = &seen.body["params"]["_meta"];
            let is_in_meta = is_call && seen.header("mcp-protocol-version") == Some(MODERN);
            assert_eq!(meta["traceparent"].as_str(), seen.header("traceparent").filter(|_| is_in_meta));
            assert_eq!(meta["tracestate"].as_str(), is_in_meta.then_some(STATE));
            if is_in_meta {
                assert_eq!(meta["io.modelcontextprotocol/protocolVersion"], MODERN, "the rest stays");
            }
        }
    }
    assert_eq!((told_old.len(), told_new.len()), (1, 1));
    assert!(told_old[0]["params"].get("_meta").is_none(), "it would not know what that is");
    let told = &told_new[0];
    assert_eq!(told["params"]["_meta"]["tracestate"], STATE);
    sent.push(told["params"]["_meta"]["traceparent"].as_str().unwrap().to_owned());
    // The call of the older command is in the trace, and its server does not know.
    sent.sort();
    passed.sort();
    passed.retain(|passed| sent.contains(passed));
    assert_eq!(sent, passed);
    assert_eq!(sent.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_recorded_is_passed_on_as_such_and_garbage_begins_a_trace() {
    let collector = Collector::start().await;
    let portolan = Portolan::start_with(tracing_to(&collector.url())).await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let id = id(&portolan.create("http", json!({ "server_url": http.url })).await);
    let passed = || {
        let calls = http.requests().into_iter().filter(|seen| seen.rpc() == "tools/call");
        calls.last().unwrap().header("traceparent").unwrap().to_owned()
    };
    let unsampled = format!("00-{TRACE}-{CALLER}-00");
    run_with(&portolan, &id, "echo", json!({"message": "x"}), &[("traceparent", &unsampled)]).await.expect(200);
    let passed_on = passed();
    assert!(passed_on.starts_with(&format!("00-{TRACE}-")) && passed_on.ends_with("-00"), "{passed_on}");
    assert!(!passed_on.contains(CALLER), "the call is the next one in the trace");
    let short = format!("00-{TRACE}-{CALLER}");
    let upper = format!("00-{}-{CALLER}-01", TRACE.to_uppercase());
    let zero = format!("00-{}-{CALLER}-01", "0".repeat(32));
    let garbage = [&*short, &*upper, &*zero, "", "x", "ff"];
    for wrong in garbage {
        let fields = [("traceparent", wrong), ("tracestate", STATE)];
        run_with(&portolan, &id, "echo", json!({"message": "x"}), &fields).await.expect(200);
        assert!(!passed().contains(TRACE));
    }
    portolan.stop().await;
    let spans = collector.spans();
    let runs: Vec<_> = spans.iter().filter(|span| span.kind == 2).collect();
    assert_eq!(runs.len(), garbage.len(), "the unsampled one is not told");
    assert!(runs.iter().all(|run| run.parent_span_id.is_empty() && run.trace_state.is_empty()));
    assert!(runs.iter().all(|run| hex(&run.trace_id) != TRACE));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_of_the_traces_that_begin_here_is_recorded() {
    for (share, recorded) in [(0.0, 1), (1.0, 4)] {
        let collector = Collector::start().await;
        let url = collector.url();
        let portolan = Portolan::start_with(|settings| {
            tracing_to(&url)(settings);
            settings.traces.otlp_sample = share;
        })
        .await;
        let http = fake::http::serve(Fake::new(Script::default()));
        let id = id(&portolan.create("http", json!({ "server_url": http.url })).await);
        for _ in 0..3 {
            run_with(&portolan, &id, "echo", json!({"message": "x"}), &[]).await.expect(200);
        }
        let sampled = format!("00-{TRACE}-{CALLER}-01");
        run_with(&portolan, &id, "echo", json!({"message": "x"}), &[("traceparent", &sampled)]).await.expect(200);
        portolan.stop().await;
        let runs = collector.spans().iter().filter(|span| span.kind == 2).count();
        assert_eq!(runs, recorded, "{share}: a caller that records is recorded");
        let passed = http.requests().into_iter().filter(|seen| seen.rpc() == "tools/call");
        let passed: Vec<_> = passed.map(|seen| seen.header("traceparent").unwrap().to_owned()).collect();
        let sampled = passed.iter().filter(|passed| u8::from_str_radix(&passed[53..], 16).unwrap() & 1 == 1).count();
        assert_eq!((passed.len(), sampled), (4, recorded), "{passed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configured_header_field_stands() {
    let collector = Collector::start().await;
    let portolan = Portolan::start_with(tracing_to(&collector.url())).await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let config = json!({"server_url": http.url, "custom_headers": {"Traceparent": "mine"}});
    let id = id(&portolan.create("http", config).await);
    let parent = format!("00-{TRACE}-{CALLER}-01");
    let fields = [("traceparent", &*parent), ("tracestate", STATE)];
    run_with(&portolan, &id, "echo", json!({"message": "x"}), &fields).await.expect(200);
    portolan.stop().await;
    for seen in http.requests() {
        let sent: Vec<_> = seen.headers.get_all("traceparent").iter().collect();
        assert_eq!(sent, ["mine"], "{}", seen.rpc());
        assert_eq!(seen.header("tracestate"), None, "that of another trace");
    }
    assert_eq!(hex(&only(&collector.spans(), "tools/call echo").trace_id), TRACE);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_nothing_is_passed_on() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let modern = fake::http::serve(Fake::new(script(json!({ "revisions": [MODERN] }))));
    let sse = fake::sse::serve(Fake::new(Script::default()));
    let ids = [
        id(&portolan.create("http", json!({ "server_url": http.url })).await),
        id(&portolan.create("modern", json!({ "server_url": modern.url })).await),
        id(&portolan.create("sse", json!({"mcp_server_type": "sse", "server_url": sse.url})).await),
    ];
    let parent = format!("00-{TRACE}-{CALLER}-01");
    for id in &ids {
        let fields = [("traceparent", &*parent), ("tracestate", STATE)];
        run_with(&portolan, id, "echo", json!({"message": "x"}), &fields).await.expect(200);
    }
    portolan.stop().await;
    for seen in [&http, &modern, &sse].into_iter().flat_map(fake::Running::requests) {
        assert!(seen.header("traceparent").is_none() && seen.header("tracestate").is_none());
        assert!(!seen.body.to_string().contains("traceparent"), "{}", seen.body);
    }
    assert!([http, modern, sse].iter().all(|server| server.requests().iter().any(|seen| seen.rpc() == "tools/call")));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_argument_result_url_or_secret_is_told() {
    let collector = Collector::start().await;
    let url = collector.url();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headers");
    std::fs::write(&file, "api-key=canary-collector\nx-more=a%2Cb\n").unwrap();
    let portolan = Portolan::start_with(|settings| {
        tracing_to(&url)(settings);
        settings.traces.otlp_headers_file = Some(file);
        settings.tokens.token = Some("canary-token-of-the-caller".to_owned().into());
    })
    .await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let config = json!({
        "server_url": http.url.replace("127.0.0.1", "canary-user:canary-password@127.0.0.1").replace("/mcp", "/canary-path/mcp?key=canary-query"),
        "custom_headers": {"X-Key": "canary-header"},
    });
    let remote = portolan.remote_with("canary-token-of-the-caller");
    let server = remote.create("http", config).await;
    let (stdio, gone) = (
        json!({"command": crate::harness::fake_mcp(), "args": ["stdio", portolan.script(&json!({})).0], "env": {"TOKEN": "canary-env"}}),
        json!({"server_url": "http://127.0.0.1:1/canary-path"}),
    );
    let stdio = remote.create("stdio", stdio).await;
    remote.create("gone", gone).await;
    for id in [id(&server), id(&stdio)] {
        let ran = remote.run(&id, "echo", json!({"message": "canary-argument"})).await;
        assert_eq!(ran["func_return"], "canary-argument");
        for failing in ["fail", "rpc_error"] {
            remote.run(&id, failing, json!({"message": "canary-argument"})).await;
        }
    }
    portolan.stop().await;
    assert_eq!(collector.spans().iter().filter(|span| span.kind == 2).count(), 6);
    assert!(collector.knows("127.0.0.1") && collector.knows("echo"), "what may be told is");
    assert!(!collector.knows("canary"));
    assert!(!collector.knows("boom"), "nor what a tool says of its failure");
    for (_, headers, _) in collector.requests() {
        assert_eq!(
            (&headers["api-key"], &headers["x-more"]),
            (&"canary-collector".parse().unwrap(), &"a,b".parse().unwrap())
        );
        assert!(headers.get("authorization").is_none());
    }
    let seen = http.requests();
    assert!(seen.iter().all(|seen| seen.header("api-key").is_none()), "the collector's fields are for it alone");
    assert!(seen.iter().any(|seen| seen.header("x-key") == Some("canary-header")));
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_their_kind() {
    let collector = Collector::start().await;
    let url = collector.url();
    let portolan = Portolan::start_with(|settings| {
        tracing_to(&url)(settings);
        settings.upstream.run_timeout = Duration::from_secs(2);
    })
    .await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let server_id = id(&portolan.create("http", json!({ "server_url": http.url })).await);
    for tool in ["fail", "rpc_error", "never"] {
        run_with(&portolan, &server_id, tool, json!({}), &[]).await.expect(200);
    }
    let unknown = format!("/v1/mcp-servers/{server_id}/tools/tool-{}/run", uuid::Uuid::new_v4());
    portolan.post(&unknown, &json!({})).await.expect(404);
    // The client leaves; a run without a key ends with it.
    let path = portolan.remote().path(&server_id, "slow").await;
    let request = portolan.request("POST", &path).json(&json!({"args": {"ms": 60_000}}));
    assert!(request.timeout(Duration::from_millis(500)).send().await.is_err());
    eventually("the run is given up", || portolan.app.readings().calls == 0).await;
    // Nobody listens there any more.
    http.stop().await;
    portolan.app.mcp.forget(&server_id);
    run_with(&portolan, &server_id, "echo", json!({"message": "x"}), &[]).await.expect(502);
    portolan.stop().await;

    let spans = collector.spans();
    let told = |tool: &str| {
        let runs = spans
            .iter()
            .filter(|span| span.kind == 2 && attributes(span).get("gen_ai.tool.name") == Some(&json!(tool)));
        let [run] = runs.collect::<Vec<_>>()[..] else { panic!("one run of {tool}") };
        let below: Vec<Span> = spans.iter().filter(|span| span.parent_span_id == run.span_id).cloned().collect();
        (run, attributes(run), below)
    };
    for (tool, kind) in [("fail", "tool_error"), ("never", "timeout")] {
        let (run, of_run, below) = told(tool);
        let call = only(&below, &format!("tools/call {tool}"));
        assert!(is_error(run) && is_error(call), "{tool}");
        assert_eq!((&of_run["error.type"], &attributes(call)["error.type"]), (&json!(kind), &json!(kind)));
        assert_eq!(
            (&of_run["portolan.run.outcome"], &of_run["http.response.status_code"]),
            (&json!("error"), &json!(200))
        );
        assert!(run.status.as_ref().unwrap().message.is_empty(), "a message may say anything");
    }
    let (_, of_run, below) = told("rpc_error");
    let of_call = attributes(only(&below, "tools/call rpc_error"));
    assert_eq!(of_call["error.type"], of_call["rpc.response.status_code"]);
    assert_eq!(of_call["error.type"], of_run["error.type"]);
    assert!(of_call["error.type"].as_str().unwrap().parse::<i64>().unwrap() < 0, "a code of JSON-RPC");
    let (run, of_run, below) = told("slow");
    assert!(is_error(run) && of_run["error.type"] == "cancelled", "{of_run:?}");
    assert_eq!(attributes(only(&below, "tools/call slow"))["error.type"], "cancelled");
    let (run, of_run, below) = told("echo");
    assert!(is_error(run));
    assert_eq!(
        (&of_run["error.type"], &of_run["http.response.status_code"]),
        (&json!("mcp_connection_error"), &json!(502))
    );
    assert_eq!(of_run["portolan.run.outcome"], "failed");
    let opening = only(&below, "open session");
    assert!(is_error(opening) && attributes(opening)["error.type"] == "connect", "{:?}", attributes(opening));
    let nowhere: Vec<_> =
        spans.iter().filter(|span| attributes(span).get("error.type") == Some(&json!("not_found"))).collect();
    assert!(nowhere.len() == 1 && !is_error(nowhere[0]), "what a client did wrong is no failure of Portolan");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_for_one_run_are_one_span() {
    let collector = Collector::start().await;
    let portolan = Portolan::start_with(tracing_to(&collector.url())).await;
    let http = fake::http::serve(Fake::new(Script::default()));
    let id = id(&portolan.create("http", json!({ "server_url": http.url })).await);
    for _ in 0..3 {
        let fields = [("idempotency-key", "k")];
        assert_eq!(run_with(&portolan, &id, "count", json!({}), &fields).await.expect(200)["func_return"], "1");
    }
    let path = "/v1/tools/mcp/servers/http/tools/count/execute";
    assert_eq!(portolan.post(path, &json!({})).await.expect(200)["result"], "2");
    portolan.stop().await;
    let spans = collector.spans();
    assert_eq!(spans.len(), 4);
    only(&spans, RUN);
    only(&spans, "POST /v1/tools/mcp/servers/{mcp_server_name}/tools/{tool_name}/execute");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_harms_no_run_and_no_stop() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = free.local_addr().unwrap();
    drop(free);
    let (silent, closing) = (listen(Manner::Silent), listen(Manner::Closed));
    let refusing = Collector::that_answers_first((0..100).map(|_| (StatusCode::BAD_REQUEST, String::new()))).await;
    let busy = Collector::that_answers_first((0..100).map(|_| (StatusCode::SERVICE_UNAVAILABLE, String::new()))).await;
    for addr in [nobody, silent.addr, closing.addr, refusing.addr, busy.addr] {
        let portolan = Portolan::start_with(tracing_to(&format!("http://{addr}"))).await;
        let http = fake::http::serve(Fake::new(Script::default()));
        let id = id(&portolan.create("http", json!({ "server_url": http.url })).await);
        let runs = async {
            for _ in 0..10 {
                let ran = run_with(&portolan, &id, "echo", json!({"message": "x"}), &[]).await.expect(200);
                assert_eq!(ran["func_return"], "x");
            }
        };
        // Ten times the deadline of an export, if they waited for one.
        tokio::time::timeout(4 * PATIENCE, runs).await.expect("runs do not wait for a collector");
        let traces = portolan.app.traces.clone();
        portolan.stop().await;
        assert_eq!(traces.lost(), 20, "a run and a call each, and all of them counted: {addr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_finds_room_is_lost_and_counted() {
    let silent = listen(Manner::Silent);
    let portolan = Portolan::start_with(tracing_to(&format!("http://{}", silent.addr))).await;
    for _ in 0..3_000 {
        portolan.app.traces.start(&HeaderMap::new(), || "too many".to_owned()).begin().end();
    }
    assert!(portolan.app.traces.lost() > 0, "at most 2,048 wait, and a batch is under way");
    let traces = portolan.app.traces.clone();
    portolan.stop().await;
    assert_eq!(traces.lost(), 3_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_collector_has_no_time_for_is_sent_again() {
    let busy = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS].map(|status| (status, String::new()));
    let collector = Collector::that_answers_first(busy).await;
    let portolan = Portolan::start_with(tracing_to(&collector.url())).await;
    let traces = portolan.app.traces.clone();
    traces.start(&HeaderMap::new(), || "patient".to_owned()).begin().end();
    eventually("it is taken", || collector.requests().len() >= 3).await;
    portolan.stop().await;
    assert_eq!(traces.lost(), 0);
    let exports = collector.exports();
    assert_eq!(exports.len(), 3);
    assert!(exports.iter().all(|export| *export == exports[0]), "the same each time");
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_of_a_collector_are_not_followed() {
    let other = Collector::start().await;
    let own_path = "/elsewhere".to_owned();
    for to in [format!("{}/v1/traces", other.url()), own_path] {
        let collector = Collector::that_answers_first([(StatusCode::TEMPORARY_REDIRECT, to)]).await;
        let portolan = Portolan::start_with(tracing_to(&collector.url())).await;
        let traces = portolan.app.traces.clone();
        traces.start(&HeaderMap::new(), || "stays".to_owned()).begin().end();
        portolan.stop().await;
        assert_eq!((traces.lost(), collector.requests().len(), other.requests().len()), (1, 1, 0));
    }
    let portolan = Portolan::start_with(tracing_to(&other.url())).await;
    portolan.app.traces.start(&HeaderMap::new(), || "goes".to_owned()).begin().end();
    portolan.stop().await;
    assert_eq!(other.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_collector_may_be_private_but_not_forbidden() {
    let collector = Collector::start().await;
    let url = collector.url();
    let portolan = Portolan::start_with(|settings| {
        tracing_to(&url)(settings);
        settings.egress.egress = Profile::Strict;
    })
    .await;
    portolan.app.traces.start(&HeaderMap::new(), || "private".to_owned()).begin().end();
    // The same address is none that a server may have.
    let config = json!({"server_url": format!("{url}/mcp")});
    let refused = portolan.create("private", config).await;
    assert_eq!(refused["status"]["state"], "unreachable", "{refused}");
    portolan.stop().await;
    assert_eq!(collector.spans().len(), 1);

    let folder = tempfile::tempdir().unwrap();
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, "canary").unwrap();
    let missing = folder.path().join("missing");
    let starts = async |change: &dyn Fn(&mut Settings)| {
        let settings = settings(folder.path(), &Database::none(), |settings| {
            tracing_to(&url)(settings);
            change(settings);
        });
        portolan::app::App::open(settings).await.map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(starts(&|_| {}).await, Ok(()));
    let denied =
        starts(&|settings| settings.egress.egress_deny = vec!["127.0.0.0/8".parse().unwrap()]).await.unwrap_err();
    assert!(denied.contains("--otlp-endpoint"), "{denied}");
    let metadata: portolan::model::Secret = "http://169.254.169.254/".to_owned().into();
    let denied = starts(&|settings| settings.traces.otlp_endpoint = Some(metadata.clone())).await.unwrap_err();
    assert!(denied.contains("--otlp-endpoint"), "{denied}");
    let wordy: portolan::model::Secret = "https://user:canary@collector.test".to_owned().into();
    let denied = starts(&|settings| settings.traces.otlp_endpoint = Some(wordy.clone())).await.unwrap_err();
    assert!(denied.contains("--otlp-endpoint") && !denied.contains("canary"), "{denied}");
    let unreadable = starts(&|settings| settings.traces.otlp_headers_file = Some(missing.clone())).await.unwrap_err();
    assert!(unreadable.contains("--otlp-headers-file"), "{unreadable}");
    let mistaken = starts(&|settings| settings.traces.otlp_headers_file = Some(wrong.clone())).await.unwrap_err();
    assert!(mistaken.contains("name=value") && !mistaken.contains("canary"), "{mistaken}");
}
