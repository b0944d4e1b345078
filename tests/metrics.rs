//! What is counted: names and labels that stay, counts that are right, series that do not grow with the servers, and who may
//! read them. What dashboards, alerts and documents say of metrics is held against the same list.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::join_all;
use portolan::model::{By, Connector, Offered, Remote as RemoteConfig, sha256_hex};
use portolan::store::{NewServer, Step};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::fake::{self, Fake, Script};
use crate::harness::{FakeProgram, PATIENCE, Portolan, Remote, client, eventually, kill, patiently};

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Names and values, in order.
type Labels = Vec<(String, String)>;

/// What a text in one of the two formats says. [`Scrape::read`] takes nothing that breaks the rules of its format.
pub(crate) struct Scrape {
    families: BTreeMap<String, Family>,
    /// By the name of the sample and its labels in order.
    samples: BTreeMap<(String, Labels), f64>,
}

#[derive(Debug, Default)]
struct Family {
    kind: String,
    help: String,
    unit: Option<String>,
    labels: BTreeMap<String, BTreeSet<String>>,
}

impl Family {
    /// The names that samples of the family may have.
    fn samples(&self, name: &str, is_open: bool) -> Vec<String> {
        match self.kind.as_str() {
            "counter" if is_open => vec![format!("{name}_total")],
            "counter" | "gauge" => vec![name.to_owned()],
            "histogram" => ["bucket", "sum", "count"].map(|part| format!("{name}_{part}")).into(),
            other => panic!("{name} is a {other}"),
        }
    }
}

impl Scrape {
    /// OpenMetrics 1.0.0, or the text format 0.0.4 of Prometheus, as far as both are of use here.
    #[track_caller]
    pub(crate) fn read(text: &str, is_open: bool) -> Self {
        let mut read = Self { families: BTreeMap::new(), samples: BTreeMap::new() };
        let body = if is_open { text.strip_suffix("# EOF\n").expect("it has an end") } else { text };
        assert!(body.ends_with('\n') && !body.contains("\n\n") && !body.contains("# EOF"), "lines, and no empty ones");
        let mut current = String::new();
        for line in body.lines() {
            if let Some(about) = line.strip_prefix("# ") {
                let (word, rest) = about.split_once(' ').expect("a word");
                let (name, value) = rest.split_once(' ').expect("a name");
                assert_name(name);
                let family = read.families.entry(name.to_owned()).or_default();
                if word == "HELP" {
                    assert!(family.help.is_empty() && family.kind.is_empty(), "{name} comes twice");
                    assert!(!value.contains('\\') && value.ends_with('.'), "{line}");
                    value.clone_into(&mut family.help);
                    name.clone_into(&mut current);
                }
                assert_eq!(name, current, "what belongs to one family stands together");
                match word {
                    "HELP" => {}
                    "TYPE" => value.clone_into(&mut family.kind),
                    "UNIT" if is_open => family.unit = Some(value.to_owned()),
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (name, labels, value) = sample(line);
            let family = read.families.get_mut(&current).expect("a family is told of before its samples");
            assert!(family.samples(&current, is_open).contains(&name), "{line} is not of {current}");
            for (label, value) in &labels {
                family.labels.entry(label.clone()).or_default().insert(value.clone());
            }
            assert!(value >= 0.0 && (value.is_finite() || name == "process_max_fds"), "{line}");
            assert!(read.samples.insert((name, labels), value).is_none(), "{line} comes twice");
        }
        for (name, family) in &read.families {
            assert!(!family.kind.is_empty() && !family.labels.contains_key("__name__"), "{name}");
            let plain = name.strip_suffix("_total").unwrap_or(name);
            assert_eq!(plain != name, !is_open && family.kind == "counter", "{name} is a {}", family.kind);
            assert!(family.unit.as_ref().is_none_or(|unit| plain.ends_with(&format!("_{unit}"))), "{name}");
            if family.kind == "histogram" {
                read.assert_histogram(name);
            }
        }
        read
    }

    /// Buckets grow, the last one is everything, and the sum fits.
    fn assert_histogram(&self, name: &str) {
        let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
        for ((_, labels), count) in self.samples.iter().filter(|((sample, _), _)| *sample == format!("{name}_bucket")) {
            let (end, others): (Vec<_>, Vec<_>) = labels.iter().cloned().partition(|(label, _)| label == "le");
            let end = if end[0].1 == "+Inf" { f64::INFINITY } else { end[0].1.parse().unwrap() };
            series.entry(others).or_default().push((end, *count));
        }
        assert!(!series.is_empty(), "{name}");
        for (labels, mut buckets) in series {
            buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
            assert!(
                buckets.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1),
                "{name} {buckets:?}"
            );
            let of = |part: &str| self.samples[&(format!("{name}_{part}"), labels.clone())];
            let (end, all) = *buckets.last().unwrap();
            assert_eq!((end, all), (f64::INFINITY, of("count")), "{name}");
            assert!(of("sum") > 0.0 || all == 0.0 || all > 0.0 && of("sum") >= 0.0, "{name}");
        }
    }

    /// The sample with this name and exactly these labels, as `name{label="value"}`.
    #[track_caller]
    pub(crate) fn get(&self, series: &str) -> f64 {
        let (name, mut labels, _) = sample(&format!("{series} 0"));
        labels.sort();
        *self.samples.get(&(name, labels)).unwrap_or_else(|| panic!("there is no {series}"))
    }

    /// The same, 0 for a series that is not there.
    fn or_zero(&self, series: &str) -> f64 {
        let (name, labels, _) = sample(&format!("{series} 0"));
        self.samples.get(&(name, labels)).copied().unwrap_or_default()
    }

    /// What of it is to stay: of each family its type, its labels with their values if these are few, and its help.
    fn promise(&self) -> String {
        // What the route table, the codes of errors and the version say is said there.
        const OPEN: [&str; 4] = ["code", "method", "route", "version"];
        let mut text = String::new();
        for (name, Family { kind, help, labels, .. }) in &self.families {
            let labels = labels.iter().map(|(label, values)| match OPEN.contains(&label.as_str()) {
                true => label.clone(),
                false => {
                    let mut values: Vec<_> = values.iter().map(String::as_str).collect();
                    values.sort_by(|one, other| match (one.parse::<f64>(), other.parse::<f64>()) {
                        (Ok(one), Ok(other)) => one.total_cmp(&other),
                        _ => one.cmp(other),
                    });
                    format!("{label}={}", values.join("|"))
                }
            });
            text += &format!("{name} {kind} {{{}}}\n    {help}\n", labels.collect::<Vec<_>>().join(", "));
        }
        text
    }

    /// Every series there is, by name and labels.
    fn series(&self) -> BTreeSet<String> {
        self.samples.keys().map(|(name, labels)| format!("{name} {labels:?}")).collect()
    }
}

#[track_caller]
fn assert_name(name: &str) {
    let is_fine = |character: char| character.is_ascii_lowercase() || character == '_' || character.is_ascii_digit();
    assert!(name.starts_with(|first: char| first.is_ascii_lowercase()) && name.chars().all(is_fine), "{name:?}");
}

/// A line `name{label="value",…} number`; the labels in order.
#[track_caller]
fn sample(line: &str) -> (String, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    let (name, mut rest) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}').expect("an end of the labels")),
        None => (series, ""),
    };
    assert_name(name);
    let mut labels = Vec::new();
    while !rest.is_empty() {
        let (label, quoted) = rest.split_once("=\"").expect("a label");
        assert_name(label);
        let (value, after) = quoted.split_once('"').expect("the end of a value");
        assert!(!value.contains(['\\', '\n']), "no value of ours needs escapes: {line}");
        labels.push((label.to_owned(), value.to_owned()));
        rest = if after.is_empty() { after } else { after.strip_prefix(',').expect("a comma") };
        assert!(after.is_empty() || !rest.is_empty(), "{line}");
    }
    labels.sort();
    assert!(labels.windows(2).all(|pair| pair[0].0 != pair[1].0), "{line}");
    let value = if value == "+Inf" || value == "inf" { f64::INFINITY } else { value.parse().expect("a number") };
    (name.to_owned(), labels, value)
}

/// What a Portolan without tokens tells.
pub(crate) async fn scrape(portolan: &Portolan) -> Scrape {
    let answer = portolan.get("/metrics").await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some(PROMETHEUS)), "{}", answer.text);
    Scrape::read(&answer.text, false)
}

/// Waits until series have this value together, and returns what was told then.
async fn settle(portolan: &Portolan, series: &[&str], value: f64) -> Scrape {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let told = scrape(portolan).await;
        let now: f64 = series.iter().map(|series| told.or_zero(series)).sum();
        if now == value {
            return told;
        }
        assert!(Instant::now() < deadline, "{series:?} is {now}, not {value}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn run_path(portolan: &Portolan, id: &str, tool: &str) -> String {
    format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(id, tool).await)
}

const PROMISE: &str = include_str!("data/metrics.txt");

#[tokio::test(flavor = "multi_thread")]
async fn names_types_labels_and_help_are_as_they_were() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("some", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    assert_eq!(portolan.run(id, "echo", json!({"message": "m"})).await["status"], "success");
    let unknown = format!("/v1/mcp-servers/{id}/tools/tool-{}/run", Uuid::new_v4());
    portolan.post(&unknown, &json!({})).await.expect(404);
    let told = scrape(&portolan).await;
    let promise = told.promise();
    assert!(promise == PROMISE, "tests/data/metrics.txt, docs/metrics.md and deploy/ must follow:\n{promise}");
    let routes: BTreeSet<_> = portolan::api::routes().iter().map(|route| route.path.to_owned()).collect();
    let labels = &told.families["portolan_http_requests_total"].labels;
    let shown: BTreeSet<_> = labels["route"].iter().filter(|route| *route != "other").cloned().collect();
    assert_eq!(shown, routes);
    assert_eq!(told.get(&format!("portolan_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"))), 1.0);

    // The other format says the same.
    let request = portolan.request("GET", "/metrics").header("accept", "text/html, application/openmetrics-text;q=0.5");
    let answer = crate::harness::Answer::of("GET", "/metrics", request).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some(OPENMETRICS)));
    assert_eq!(answer.header("vary"), Some("accept"));
    let open = Scrape::read(&answer.text, true);
    let names = |scrape: &Scrape| scrape.samples.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&open), names(&told));
    assert_eq!(open.families["portolan_run_duration_seconds"].unit.as_deref(), Some("seconds"));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_are_those_of_what_happened() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("child", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let upstream = Fake::new(Script::default());
    let http = fake::http::serve(upstream);
    let remote = portolan.create("remote", json!({"server_url": http.url})).await;
    let remote_id = remote["id"].as_str().unwrap();
    let before = scrape(&portolan).await;
    for transport in ["stdio", "streamable_http"] {
        let opened =
            format!("portolan_session_opens_total{{transport=\"{transport}\",kind=\"first\",result=\"opened\"}}");
        assert_eq!(before.get(&opened), 1.0);
        assert_eq!(before.get(&format!("portolan_sessions{{transport=\"{transport}\",state=\"idle\"}}")), 1.0);
    }
    assert_eq!(before.get("portolan_children"), 1.0);

    // Each outcome, and what is refused.
    for _ in 0..3 {
        assert_eq!(portolan.run(id, "echo", json!({"message": "m"})).await["status"], "success");
    }
    assert_eq!(portolan.run(id, "fail", json!({})).await["status"], "error");
    assert_eq!(portolan.run(id, "rpc_error", json!({})).await["status"], "error");
    assert_eq!(portolan.run(remote_id, "echo", json!({"message": "m"})).await["status"], "success");
    let unknown = format!("/v1/mcp-servers/{id}/tools/tool-{}/run", Uuid::new_v4());
    for _ in 0..2 {
        portolan.post(&unknown, &json!({})).await.expect(404);
    }
    portolan.post(&run_path(&portolan, id, "echo").await, &json!({"args": 1})).await.expect(422);
    portolan.get("/nowhere").await.expect(404);
    portolan.send("PUT", "/v1/mcp-servers/", None).await.expect(405);
    let after = scrape(&portolan).await;
    for (series, count) in [
        ("portolan_runs_total{outcome=\"success\",code=\"\"}", 4.0),
        ("portolan_runs_total{outcome=\"error\",code=\"\"}", 2.0),
        ("portolan_runs_total{outcome=\"failed\",code=\"not_found\"}", 2.0),
        ("portolan_run_duration_seconds_count{transport=\"stdio\"}", 5.0),
        ("portolan_run_duration_seconds_count{transport=\"streamable_http\"}", 1.0),
        ("portolan_run_duration_seconds_count{transport=\"sse\"}", 0.0),
        ("portolan_upstream_calls_total{transport=\"stdio\",result=\"answered\"}", 4.0),
        ("portolan_upstream_calls_total{transport=\"stdio\",result=\"rpc_error\"}", 1.0),
        ("portolan_upstream_calls_total{transport=\"streamable_http\",result=\"answered\"}", 1.0),
        ("portolan_upstream_call_duration_seconds_count{transport=\"stdio\"}", 5.0),
        ("portolan_http_errors_total{code=\"not_found\"}", 3.0),
        ("portolan_http_errors_total{code=\"invalid_request\"}", 1.0),
        ("portolan_http_errors_total{code=\"method_not_allowed\"}", 1.0),
        ("portolan_http_requests_total{method=\"POST\",route=\"/v1/mcp-servers/\",status=\"2xx\"}", 2.0),
        ("portolan_http_request_duration_seconds_count{method=\"POST\",route=\"/v1/mcp-servers/\"}", 2.0),
        ("portolan_http_requests_total{method=\"other\",route=\"other\",status=\"4xx\"}", 2.0),
        ("portolan_token_failures_total{reason=\"missing\"}", 0.0),
        ("portolan_upstream_calls_in_flight", 0.0),
        ("portolan_upstream_calls_queued", 0.0),
        ("portolan_children", 1.0),
    ] {
        assert_eq!(after.get(series), count, "{series}");
    }
    let run = "method=\"POST\",route=\"/v1/mcp-servers/{mcp_server_id}/tools/{tool_id}/run\"";
    assert_eq!(after.get(&format!("portolan_http_requests_total{{{run},status=\"2xx\"}}")), 6.0);
    assert_eq!(after.get(&format!("portolan_http_requests_total{{{run},status=\"4xx\"}}")), 3.0);
    for operation in ["read", "write"] {
        let count = format!("portolan_store_operation_duration_seconds_count{{operation=\"{operation}\"}}");
        assert!(before.get(&count) > 0.0 && after.get(&count) >= before.get(&count), "{count}");
        assert_eq!(after.get(&format!("portolan_store_errors_total{{operation=\"{operation}\"}}")), 0.0);
    }
    assert!(after.get("process_resident_memory_bytes") > 1e6 && after.get("process_open_fds") > 5.0);
    assert!(after.get("process_cpu_seconds_total") > 0.0 && after.get("process_max_fds") > 5.0);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    assert!((now - 600.0..=now).contains(&after.get("process_start_time_seconds")));

    // A taken name is nobody's fault but the client's; a database that is gone is.
    let taken = json!({"server_name": "child", "config": {"server_url": http.url}});
    portolan.post("/v1/mcp-servers/", &taken).await.expect(409);
    assert_eq!(scrape(&portolan).await.get("portolan_store_errors_total{operation=\"write\"}"), 0.0);
    // What the log would write now would be counted, too.
    eventually("the runs are logged", || portolan.app.run_log.depth() == 0).await;
    portolan.app.store.close().await;
    portolan.get("/v1/mcp-servers/").await.expect(503);
    portolan
        .post("/v1/mcp-servers/", &json!({"server_name": "more", "config": {"server_url": http.url}}))
        .await
        .expect(503);
    let gone = scrape(&portolan).await;
    assert_eq!(gone.get("portolan_store_errors_total{operation=\"read\"}"), 1.0);
    assert_eq!(gone.get("portolan_store_errors_total{operation=\"write\"}"), 1.0);
    assert_eq!(gone.get("portolan_http_errors_total{code=\"unavailable\"}"), 2.0);
    portolan.stop_without_database().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session_is_counted_and_so_is_the_next_one() {
    let portolan = Portolan::start().await;
    let (server, _script) = portolan.create_stdio("child", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    let opens = |transport: &str, kind: &str, result: &str| {
        format!("portolan_session_opens_total{{transport=\"{transport}\",kind=\"{kind}\",result=\"{result}\"}}")
    };
    // It ends under a call.
    assert_eq!(portolan.run(id, "die", json!({})).await["status"], "error");
    settle(&portolan, &["portolan_sessions_lost_total{transport=\"stdio\"}"], 1.0).await;
    assert_eq!(portolan.run(id, "echo", json!({"message": "m"})).await["status"], "success");
    let told = scrape(&portolan).await;
    assert_eq!(told.get("portolan_upstream_calls_total{transport=\"stdio\",result=\"lost\"}"), 1.0);
    assert_eq!(told.get("portolan_runs_total{outcome=\"error\",code=\"\"}"), 1.0);
    assert_eq!(
        (told.get(&opens("stdio", "first", "opened")), told.get(&opens("stdio", "reconnect", "opened"))),
        (1.0, 1.0)
    );
    // It is killed while nobody uses it.
    let pid = portolan.run(id, "pid", json!({})).await["func_return"].as_str().unwrap().parse().unwrap();
    kill(pid);
    settle(&portolan, &["portolan_sessions_lost_total{transport=\"stdio\"}"], 2.0).await;
    settle(&portolan, &["portolan_sessions{transport=\"stdio\",state=\"idle\"}"], 0.0).await;
    assert_eq!(portolan.run(id, "echo", json!({"message": "m"})).await["status"], "success");
    let told = scrape(&portolan).await;
    assert_eq!(told.get(&opens("stdio", "reconnect", "opened")), 2.0);
    assert_eq!(told.get("portolan_sessions{transport=\"stdio\",state=\"opening\"}"), 0.0);

    // A remote server is away, which is an outcome of its own, and comes back.
    let script = portolan.script(&json!({}));
    let mut program = FakeProgram::start("http", &script, None);
    let remote = portolan.create("remote", json!({"server_url": program.url})).await;
    let path = run_path(&portolan, remote["id"].as_str().unwrap(), "echo").await;
    let body = json!({"args": {"message": "m"}});
    portolan.post(&path, &body).await.expect(200);
    program.kill();
    portolan.post(&path, &body).await.expect(502);
    let told = scrape(&portolan).await;
    assert_eq!(told.get("portolan_runs_total{outcome=\"failed\",code=\"mcp_connection_error\"}"), 1.0);
    assert_eq!(told.get("portolan_sessions_lost_total{transport=\"streamable_http\"}"), 1.0);
    assert!(told.get(&opens("streamable_http", "reconnect", "unreachable")) >= 1.0);
    assert_eq!(told.get(&opens("streamable_http", "reconnect", "opened")), 0.0);
    let again = FakeProgram::start("http", &script, Some(program.addr));
    patiently(async || portolan.post(&path, &body).await).await.expect(200);
    let told = scrape(&portolan).await;
    assert_eq!(told.get(&opens("streamable_http", "first", "opened")), 1.0);
    assert_eq!(told.get(&opens("streamable_http", "reconnect", "opened")), 1.0);
    drop(again);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_nobody_uses_go_and_come_back_as_new_ones() {
    let portolan = Portolan::start_with(|settings| settings.upstream.idle_timeout = Duration::from_millis(300)).await;
    let (server, _script) = portolan.create_stdio("child", &json!({})).await;
    let id = server["id"].as_str().unwrap();
    settle(&portolan, &["portolan_children"], 0.0).await;
    settle(&portolan, &["portolan_sessions{transport=\"stdio\",state=\"idle\"}"], 0.0).await;
    assert_eq!(portolan.run(id, "echo", json!({"message": "m"})).await["status"], "success");
    let told = scrape(&portolan).await;
    let opened =
        |kind: &str| format!("portolan_session_opens_total{{transport=\"stdio\",kind=\"{kind}\",result=\"opened\"}}");
    assert_eq!((told.get(&opened("first")), told.get(&opened("reconnect"))), (2.0, 0.0));
    assert_eq!(told.get("portolan_sessions_lost_total{transport=\"stdio\"}"), 0.0);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_portolan_tells_what_it_is_busy_with() {
    let portolan = Portolan::start_with(|settings| {
        settings.upstream.max_calls_per_server = 2;
        settings.entry.max_requests = 5;
    })
    .await;
    let (server, _script) = portolan.create_stdio("child", &json!({})).await;
    let path = run_path(&portolan, server["id"].as_str().unwrap(), "never").await;
    let remote = portolan.remote();
    let calls: Vec<_> = (0..5)
        .map(|_| {
            let request = remote.request("POST", &path).json(&json!({}));
            tokio::spawn(async move {
                // One that finds no room, because somebody reads metrics just then, comes again.
                while request.try_clone().unwrap().send().await.is_ok_and(|answer| answer.status() == 503) {}
            })
        })
        .collect();
    settle(&portolan, &["portolan_upstream_calls_queued"], 3.0).await;
    let told = scrape(&portolan).await;
    assert_eq!(told.get("portolan_upstream_calls_in_flight"), 2.0);
    assert_eq!(told.get("portolan_sessions{transport=\"stdio\",state=\"busy\"}"), 1.0);
    // It takes no more, and says so.
    assert_eq!(told.get("portolan_http_requests_in_flight"), 5.0);
    assert_eq!(told.get("portolan_http_requests_limit"), 5.0);
    assert!(told.get("portolan_http_connections") >= 6.0);
    portolan.get("/v1/mcp-servers/").await.expect(503);
    assert!(scrape(&portolan).await.get("portolan_http_errors_total{code=\"overloaded\"}") >= 1.0);
    // Their clients leave.
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    for call in calls {
        assert!(call.await.is_err(), "it is not answered");
    }
    drop(remote);
    settle(&portolan, &["portolan_http_requests_in_flight"], 1.0).await;
    settle(&portolan, &["portolan_sessions{transport=\"stdio\",state=\"idle\"}"], 1.0).await;
    let cut =
        ["error", "failed"].map(|outcome| format!("portolan_runs_total{{outcome=\"{outcome}\",code=\"cancelled\"}}"));
    settle(&portolan, &[&cut[0], &cut[1]], 5.0).await;
    let told = scrape(&portolan).await;
    // Those that waited may have had their turn by then.
    let cancelled = told.get("portolan_upstream_calls_total{transport=\"stdio\",result=\"cancelled\"}");
    assert!((2.0..=5.0).contains(&cancelled) && told.get(&cut[0]) == cancelled, "{cancelled}");
    assert_eq!((told.get("portolan_upstream_calls_queued"), told.get("portolan_upstream_calls_in_flight")), (0.0, 0.0));
    portolan.stop().await;
}

/// Traffic with every one of so many servers, some of it refused, makes no series that traffic with one does not make.
async fn cardinality(servers: usize) {
    let portolan = Portolan::start().await;
    // Nothing listens there any more.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let steps: Vec<_> = (0..servers)
        .map(|number| {
            let connector = Connector::StreamableHttp(RemoteConfig {
                server_url: format!("http://127.0.0.1:{port}/mcp/{number}"),
                auth_header: None,
                auth_token: None,
                custom_headers: None,
                oauth: None,
            });
            let offered = Offered {
                name: format!("tool-of-{number}"),
                definition: json!({"name": format!("tool-of-{number}"), "inputSchema": {"type": "object"}}).to_string(),
            };
            Step::Add(Box::new(NewServer {
                id: format!("mcp_server-{}", Uuid::new_v4()),
                server_name: format!("server {number}"),
                connector,
                created_at: None,
                tools: vec![(format!("tool-{}", Uuid::new_v4()), offered)],
                sign_in: None,
            }))
        })
        .collect();
    portolan.app.store.change_servers(&steps, &By::IMPORT, |_| ()).await.unwrap();
    let paths: Vec<_> = steps
        .iter()
        .map(|step| match step {
            Step::Add(server) => {
                let path = format!("/v1/mcp-servers/{}", server.id);
                (format!("{path}/tools/{}/run", server.tools[0].0), path)
            }
            _ => panic!("all are added"),
        })
        .collect();
    let visit = async |(run, path): &(String, String)| {
        portolan.get(path).await.expect(200);
        let body = json!({"args": {"secret": path}});
        let run = portolan.post(run, &body).await;
        assert_eq!(run.status, 502, "{}", run.text);
        portolan.get(&format!("{path}/tools/{path}")).await.expect(404);
    };
    visit(&paths[0]).await;
    // The scrape is a request, too.
    scrape(&portolan).await;
    let first = scrape(&portolan).await;
    for some in paths[1..].chunks(16) {
        join_all(some.iter().map(visit)).await;
    }
    let last = scrape(&portolan).await;
    assert_eq!(last.series(), first.series());
    let failed = "portolan_runs_total{outcome=\"failed\",code=\"mcp_connection_error\"}";
    assert_eq!((first.get(failed), last.get(failed)), (1.0, servers as f64));
    let text = portolan.get("/metrics").await.text;
    for theirs in ["server ", "tool-of-", "mcp_server-", "127.0.0.1", &port.to_string()] {
        assert!(!text.lines().any(|line| !line.starts_with('#') && line.contains(&format!("\"{theirs}"))), "{theirs}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_servers_make_no_more_series_than_one() {
    cardinality(1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: 10,000 servers"]
async fn ten_thousand_servers_make_no_more_series_than_one() {
    cardinality(10_000).await;
}

const ADMIN: &str = "ptl_admin-DAw2Zb8iEwJ0mYw5cUuV1o7x";
const READ: &str = "ptl_read-77Zb8iEwJ0mYw5cUuV1o7xs3";

#[tokio::test(flavor = "multi_thread")]
async fn reading_metrics_takes_a_token_and_the_narrowest_will_do() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(&file, format!("reader:read:{}\n", sha256_hex(READ))).unwrap();
    let portolan = Portolan::start_with(|settings| {
        settings.tokens.token = Some(ADMIN.to_owned().into());
        settings.tokens.tokens_file = Some(file);
    })
    .await;
    let (reader, wrong) = (portolan.remote_with(READ), portolan.remote_with("ptl_wrong-x0Zb8iEwJ0mYw5cUuV1o7xs"));
    assert!(!portolan.get("/metrics").await.text.contains("portolan_"));
    portolan.get("/metrics").await.expect(401);
    wrong.send("GET", "/metrics", None).await.expect(401);
    let create = json!({"server_name": "s", "config": {"server_url": "http://127.0.0.1:9/"}});
    reader.post("/v1/mcp-servers/", &create).await.expect(403);
    for token in [READ, ADMIN] {
        let told = portolan.remote_with(token).send("GET", "/metrics", None).await;
        assert_eq!(told.status, 200);
        let told = Scrape::read(&told.text, false);
        let reasons = ["missing", "wrong", "scope"];
        let counts = reasons.map(|reason| told.get(&format!("portolan_token_failures_total{{reason=\"{reason}\"}}")));
        assert_eq!(counts, [2.0, 1.0, 1.0]);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_on_an_address_of_their_own_need_no_token_and_are_nowhere_else() {
    let portolan = Portolan::start_with(|settings| {
        settings.tokens.token = Some(ADMIN.to_owned().into());
        settings.metrics.metrics_listen = Some("127.0.0.1:0".to_owned());
    })
    .await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let serving = tokio::spawn(portolan.app.clone().serve_metrics(listener, stop.clone()));
    let metrics = Remote::new(&format!("http://{address}"));
    let told = metrics.send("GET", "/metrics", None).await;
    assert_eq!(told.status, 200);
    Scrape::read(&told.text, false);
    // A scraper may call it as it likes, and gets nothing else.
    let elsewhere = metrics.request("GET", "/metrics").header("host", "anything.example");
    assert_eq!(elsewhere.send().await.unwrap().status(), 200);
    assert_eq!(metrics.send("HEAD", "/metrics", None).await.status, 200);
    metrics.send("POST", "/metrics", None).await.expect(405);
    for path in ["/", "/v1/health", "/v1/mcp-servers/", "/openapi.yaml"] {
        assert_eq!(metrics.request("GET", path).bearer_auth(ADMIN).send().await.unwrap().status(), 404, "{path}");
    }
    let admin = portolan.remote_with(ADMIN);
    admin.send("GET", "/metrics", None).await.expect(404);
    admin.send("GET", "/v1/mcp-servers/", None).await.expect(200);
    // Portolan connects to no address of its own.
    let server = admin.create("itself", json!({"server_url": format!("http://{address}/metrics")})).await;
    assert_eq!(server["status"]["state"], "unreachable");
    assert!(server["status"]["error"].as_str().unwrap().contains("may not be connected to"), "{server}");
    // It holds few connections, and a silent one does not keep the others out.
    let silent: Vec<_> = join_all((0..80).map(|_| tokio::net::TcpStream::connect(address))).await;
    let deadline = Instant::now() + PATIENCE;
    // A connection that was kept may have made room for another.
    while !client().get(format!("http://{address}/metrics")).send().await.is_ok_and(|told| told.status() == 200) {
        assert!(Instant::now() < deadline, "nobody gets in");
        sleep(Duration::from_millis(20)).await;
    }
    drop(silent);
    stop.cancel();
    serving.await.unwrap();
    portolan.stop().await;
}

/// The files that use metrics, and the texts in them that do.
fn queries() -> Vec<(String, String)> {
    fn collect(place: &str, value: &Value, found: &mut Vec<(String, String)>) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    match value.as_str().filter(|_| ["expr", "definition"].contains(&key.as_str())) {
                        Some(text) => found.push((format!("{place}/{key}"), text.to_owned())),
                        None => collect(&format!("{place}/{key}"), value, found),
                    }
                }
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(at, item)| collect(&format!("{place}/{at}"), item, found));
            }
            _ => {}
        }
    }
    let dashboard: Value = serde_json::from_str(include_str!("../deploy/grafana/portolan.json")).unwrap();
    let alerts: Value = serde_norway::from_str(include_str!("../deploy/prometheus/alerts.yaml")).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 10 && dashboard["title"] == "Portolan");
    let rules = alerts["groups"][0]["rules"].as_array().unwrap();
    for rule in rules {
        for key in ["alert", "expr"] {
            assert!(rule[key].as_str().is_some_and(|text| !text.is_empty()), "{rule}");
        }
        assert!(rule["annotations"]["summary"].is_string() && rule["labels"]["severity"].is_string(), "{rule}");
    }
    let mut found = Vec::new();
    collect("dashboard", &dashboard, &mut found);
    let of_panels = found.len();
    collect("alerts", &alerts, &mut found);
    assert!(of_panels > 10 && found.len() - of_panels == rules.len());
    found
}

/// The families of [`PROMISE`]: name, type, and labels with their values where these are few.
fn promised() -> BTreeMap<&'static str, (&'static str, BTreeMap<&'static str, Vec<&'static str>>)> {
    let lines = PROMISE.lines().filter(|line| !line.starts_with(' '));
    let families = lines.map(|line| {
        let (name, rest) = line.split_once(' ').unwrap();
        let (kind, labels) = rest.split_once(' ').unwrap();
        let labels = labels.trim_matches(['{', '}']).split(", ").filter(|label| !label.is_empty());
        let labels = labels.map(|label| match label.split_once('=') {
            Some((label, values)) => (label, values.split('|').collect()),
            None => (label, Vec::new()),
        });
        (name, (kind, labels.collect()))
    });
    families.collect()
}

/// What a query asks for that does not exist. It reads as much of PromQL as the files need: names of metrics, the labels
/// that follow them in braces, and those after `by`.
fn unknown(query: &str) -> Vec<String> {
    let promised = promised();
    let mut wrong = Vec::new();
    let mut known_labels = BTreeSet::from(["job", "instance"]);
    let mut any = false;
    let is_of_a_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let mut rest = query;
    let next = |rest: &str| ["portolan_", "process_"].iter().filter_map(|prefix| rest.find(prefix)).min();
    while let Some(start) = next(rest) {
        let name = rest[start..].split(|character| !is_of_a_name(character)).next().unwrap();
        rest = &rest[start + name.len()..];
        let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        let family = promised
            .get(name)
            .filter(|(kind, _)| *kind != "histogram")
            .or_else(|| promised.get(of_histogram?).filter(|(kind, _)| *kind == "histogram"));
        let Some((_, labels)) = family else {
            wrong.push(name.to_owned());
            continue;
        };
        any = true;
        known_labels.extend(labels.keys());
        // A variable of a dashboard asks for the values of a label.
        if let Some(label) = query.strip_prefix("label_values(").and_then(|asked| asked.rsplit(", ").next()) {
            wrong.extend(
                Some(label.trim_end_matches(')')).filter(|label| !known_labels.contains(label)).map(str::to_owned),
            );
        }
        let Some(matchers) = rest.strip_prefix('{').and_then(|rest| rest.split_once("\"}")).map(|(inside, _)| inside)
        else {
            continue;
        };
        for matcher in matchers.split("\",") {
            let (label, value) = matcher.trim().split_once('"').unwrap();
            let (label, exact) = (label.trim_end_matches(['=', '~', '!']), !label.contains('~'));
            match labels.get(label) {
                _ if ["job", "instance"].contains(&label) => {}
                None => wrong.push(format!("{name}{{{label}}}")),
                Some(values) if !values.is_empty() => {
                    let meant: Vec<_> = if exact { vec![value] } else { value.split('|').collect() };
                    let missing = meant.into_iter().filter(|value| !values.contains(value) && *value != ".*");
                    wrong.extend(missing.map(|value| format!("{name}{{{label}=\"{value}\"}}")));
                }
                Some(_) => {}
            }
        }
    }
    if !any {
        wrong.push("no metric at all".to_owned());
    }
    for group in query.split("by (").skip(1) {
        let labels = group.split(')').next().unwrap().split(',').map(str::trim);
        wrong.extend(labels.filter(|label| !known_labels.contains(label)).map(|label| format!("by ({label})")));
    }
    wrong
}

#[test]
fn dashboard_and_alerts_ask_for_what_there_is() {
    for (place, query) in queries() {
        assert_eq!(unknown(&query), Vec::<String>::new(), "{place}: {query}");
    }
    // What is wrong is found.
    assert_eq!(unknown("rate(portolan_runs_total{outcome=\"success\"}[5m])"), Vec::<String>::new());
    assert_eq!(unknown("sum by (server) (portolan_runs_total)"), ["by (server)"]);
    assert_eq!(unknown("portolan_run_total + portolan_children"), ["portolan_run_total"]);
    assert_eq!(unknown("portolan_runs_total{server=\"a\"}"), ["portolan_runs_total{server}"]);
    assert_eq!(unknown("portolan_runs_total{outcome=~\"error|odd\"}"), ["portolan_runs_total{outcome=\"odd\"}"]);
    assert_eq!(unknown("portolan_run_duration_seconds"), ["portolan_run_duration_seconds", "no metric at all"]);
    assert_eq!(unknown("up"), ["no metric at all"]);
}

#[test]
fn the_document_lists_all_metrics() {
    let mut table = String::from("| metric | type | labels | what |\n|---|---|---|---|\n");
    let mut lines = PROMISE.lines();
    while let (Some(line), Some(help)) = (lines.next(), lines.next()) {
        let name = line.split(' ').next().unwrap();
        let (kind, labels) = &promised()[name];
        let labels = labels.keys().filter(|label| **label != "le").map(|label| format!("`{label}`"));
        let labels = labels.collect::<Vec<_>>().join(", ");
        table += &format!("| `{name}` | {kind} | {labels} | {} |\n", help.trim().trim_end_matches('.'));
    }
    assert!(include_str!("../docs/metrics.md").contains(&table), "docs/metrics.md must have this table:\n{table}");
}
