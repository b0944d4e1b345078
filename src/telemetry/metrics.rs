//! What is counted and measured, and how it is written for Prometheus.
//!
//! One [`Metrics`] is made when Portolan opens and handed down. What happens is counted where it happens, at the cost of
//! some atomic additions; how things stand (sessions, children, memory) is looked at when somebody asks, see
//! [`Readings`]. A label has one of a few values that are known here, or is a code of an error: no name, id, address or
//! text of a user ever becomes one, so the number of series has nothing to do with the number of servers.

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};

use crate::model::ServerType;

/// The upper ends of the buckets of histograms, in seconds; all that takes longer is in one more. Whole answers over HTTP
/// have few, because there is a histogram for each route.
const REQUEST_BOUNDS: &[f64] = &[0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0];
const CALL_BOUNDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
const STORE_BOUNDS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// A label with few values: its name, all values in order, and which is meant.
trait Label: Copy {
    const NAME: &'static str;
    const VALUES: &'static [&'static str];
    fn index(self) -> usize;
}

macro_rules! label {
    ($(#[$doc:meta])* $kind:ident = $name:literal { $($(#[$about:meta])* $value:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $kind { $($(#[$about])* $value,)* }

        impl Label for $kind {
            const NAME: &'static str = $name;
            const VALUES: &'static [&'static str] = &[$($text),*];

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

impl Label for ServerType {
    const NAME: &'static str = "transport";
    const VALUES: &'static [&'static str] = &["stdio", "sse", "streamable_http"];

    fn index(self) -> usize {
        match self {
            Self::Stdio => 0,
            Self::Sse => 1,
            Self::StreamableHttp => 2,
        }
    }
}

label! {
    /// What came of one `tools/call` that was made on a session.
    CallResult = "result" {
        /// A result, be it one that says the tool failed.
        Answered = "answered",
        /// A JSON-RPC error.
        RpcError = "rpc_error",
        /// Turned away before any tool saw it.
        Refused = "refused",
        TimedOut = "timed_out",
        /// The answer is larger than may be taken.
        TooLarge = "too_large",
        /// The session ended under it.
        Lost = "lost",
        /// The session was dead before anything was sent; the call may be made again on another.
        NotSent = "not_sent",
        /// Whoever waited for it left.
        Cancelled = "cancelled",
    }
}

label! {
    /// Why a session is opened.
    Opening = "kind" {
        /// There was none, or it was closed because nobody used it.
        First = "first",
        /// The one before was lost.
        Reconnect = "reconnect",
    }
}

label! {
    /// What came of an opening.
    OpenResult = "result" {
        Opened = "opened",
        /// The server could not be reached, or did not speak MCP.
        Unreachable = "unreachable",
        /// The server wants a sign-in.
        AuthRequired = "auth_required",
        /// It is for Portolan itself to say no: no place for a child, a policy, a value that is missing, a stop.
        Refused = "refused",
    }
}

label! {
    /// How a live session stands.
    SessionState = "state" {
        Opening = "opening",
        /// Nobody uses it.
        Idle = "idle",
        Busy = "busy",
    }
}

label! {
    /// The kinds of what the database is asked.
    Operation = "operation" {
        Read = "read",
        Write = "write",
    }
}

label! {
    /// Why a caller was not let in.
    TokenFailure = "reason" {
        /// No token came.
        Missing = "missing",
        /// None that is known came.
        Wrong = "wrong",
        /// A known one came that may not do this.
        Scope = "scope",
    }
}

label! {
    /// What came of asking an authorization server for tokens without a person.
    RefreshResult = "result" {
        Renewed = "renewed",
        /// The authorization server said no.
        Refused = "refused",
        /// It could not be asked, or its answer is of no use.
        Failed = "failed",
    }
}

label! {
    StatusClass = "status" {
        Success = "2xx",
        Redirection = "3xx",
        ClientError = "4xx",
        ServerError = "5xx",
    }
}

impl StatusClass {
    fn of(status: u16) -> Self {
        match status {
            ..300 => Self::Success,
            300..400 => Self::Redirection,
            400..500 => Self::ClientError,
            500.. => Self::ServerError,
        }
    }
}

/// How long things took.
#[derive(Debug)]
pub struct Times {
    bounds: &'static [f64],
    /// One more than there are bounds, each alone.
    buckets: Box<[AtomicU64]>,
    micros: AtomicU64,
}

impl Times {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, buckets: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), micros: AtomicU64::new(0) }
    }

    pub fn record(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl EncodeMetric for Times {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let ends = self.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<_> = ends.zip(self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed))).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let seconds = Duration::from_micros(self.micros.load(Ordering::Relaxed)).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(seconds, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// A metric for each of some label values, all of them there from the beginning. Clones share them.
#[derive(Debug)]
struct Each<M, const N: usize> {
    names: [&'static str; N],
    series: Arc<[([String; N], M)]>,
}

impl<M, const N: usize> Clone for Each<M, N> {
    fn clone(&self) -> Self {
        Self { names: self.names, series: self.series.clone() }
    }
}

impl<M, const N: usize> Each<M, N> {
    fn new(names: [&'static str; N], values: impl IntoIterator<Item = [String; N]>, make: impl Fn() -> M) -> Self {
        Self { names, series: values.into_iter().map(|values| (values, make())).collect() }
    }

    fn at(&self, index: usize) -> &M {
        &self.series[index].1
    }
}

impl<M> Each<M, 1> {
    fn of<A: Label>(make: impl Fn() -> M) -> Self {
        Self::new([A::NAME], A::VALUES.iter().map(|a| [(*a).to_owned()]), make)
    }
}

impl<M> Each<M, 2> {
    /// In the order of the first label.
    fn of_two<A: Label, B: Label>(make: impl Fn() -> M) -> Self {
        let values = A::VALUES.iter().flat_map(|a| B::VALUES.iter().map(|b| [(*a).to_owned(), (*b).to_owned()]));
        Self::new([A::NAME, B::NAME], values, make)
    }

    fn at_two<A: Label, B: Label>(&self, a: A, b: B) -> &M {
        self.at(a.index() * B::VALUES.len() + b.index())
    }
}

impl<M: EncodeMetric, const N: usize> EncodeMetric for Each<M, N> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (values, metric) in self.series.iter() {
            let labels: [(&str, &str); N] = std::array::from_fn(|at| (self.names[at], values[at].as_str()));
            metric.encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        self.series.first().map_or(MetricType::Unknown, |(_, metric)| metric.metric_type())
    }
}

/// The codes of errors, and how often each was told. A code is a word of Portolan's own, so there are only so many.
type Codes = Family<[(&'static str, &'static str); 1], Counter>;

/// Makes a metric known, and hands it back to those who count.
fn count<M: EncodeMetric + Clone + fmt::Debug + Send + Sync + 'static>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    metric: M,
) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// The same of times.
fn time<const N: usize>(registry: &mut Registry, name: &str, help: &str, times: Each<Times, N>) -> Each<Times, N> {
    registry.register_with_unit(name, help, Unit::Seconds, times.clone());
    times
}

/// All that is counted. Clones share everything.
#[derive(Clone)]
pub struct Metrics(Arc<Counted>);

pub struct Counted {
    /// Requests over HTTP, but for those that a page's browser asks beforehand (CORS).
    pub requests: Requests,
    /// Operations of the store, which is to be given them.
    pub operations: Operations,
    runs: Runs,
    calls: Each<Counter, 2>,
    call_times: Each<Times, 1>,
    openings: Each<Gauge, 1>,
    opens: Each<Counter, 3>,
    open_times: Each<Times, 1>,
    lost: Each<Counter, 1>,
    token_failures: Each<Counter, 1>,
    refreshes: Each<Counter, 1>,
    registry: Registry,
    started: SystemTime,
}

impl Deref for Metrics {
    type Target = Counted;

    fn deref(&self) -> &Counted {
        &self.0
    }
}

impl Metrics {
    /// Nothing was counted yet. `routes` are the methods and paths of the route table.
    pub fn new<'a>(routes: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut registry = Registry::with_prefix("portolan");
        let known = &mut registry;
        let version = [[env!("CARGO_PKG_VERSION").to_owned()]];
        let build = Each::new(["version"], version, || ConstGauge::new(1_i64));
        count(known, "build_info", "The version that runs; always 1", build);
        let requests = Requests::new(routes, known);
        let runs = Runs::new(known);
        let calls = count(
            known,
            "upstream_calls",
            "Calls of tools that were made on a session, by what came of them",
            Each::of_two::<ServerType, CallResult>(Counter::default),
        );
        let call_times = time(
            known,
            "upstream_call_duration",
            "How long servers took to answer calls of tools, from when a session was there",
            Each::of::<ServerType>(|| Times::new(CALL_BOUNDS)),
        );
        let openings = Each::of::<ServerType>(Gauge::default);
        let all = ServerType::VALUES.iter().flat_map(|transport| {
            let kinds = Opening::VALUES.iter();
            kinds.flat_map(move |kind| OpenResult::VALUES.iter().map(move |result| [*transport, *kind, *result]))
        });
        let names = [ServerType::NAME, Opening::NAME, OpenResult::NAME];
        let opens = count(
            known,
            "session_opens",
            "Attempts to open a session, for the first time or after one was lost, by what came of them",
            Each::new(names, all.map(|values| values.map(str::to_owned)), Counter::default),
        );
        let open_times = time(
            known,
            "session_open_duration",
            "How long attempts to open a session took, well or not",
            Each::of::<ServerType>(|| Times::new(CALL_BOUNDS)),
        );
        let lost = count(
            known,
            "sessions_lost",
            "Sessions that ended by themselves, or failed a call",
            Each::of::<ServerType>(Counter::default),
        );
        let operations = Operations::new(known);
        let token_failures = count(
            known,
            "token_failures",
            "Requests that were turned away for want of a token, of the right one, or of a scope",
            Each::of::<TokenFailure>(Counter::default),
        );
        let refreshes = count(
            known,
            "oauth_refreshes",
            "Tokens asked of authorization servers without a person, by what came of it",
            Each::of::<RefreshResult>(Counter::default),
        );
        Self(Arc::new(Counted {
            requests,
            operations,
            runs,
            calls,
            call_times,
            openings,
            opens,
            open_times,
            lost,
            token_failures,
            refreshes,
            registry,
            started: SystemTime::now(),
        }))
    }

    /// A run begins. Dropped without [`Run::end`], it was cut off; `sent` says whether it may have reached its tool.
    pub fn begin_run(&self, sent: &Arc<AtomicBool>) -> Run {
        Run { metrics: self.clone(), began: Instant::now(), transport: None, sent: sent.clone(), ended: false }
    }

    /// A call is made on a session. Dropped without [`UpstreamCall::end`], it was cancelled.
    pub fn begin_call(&self, transport: ServerType) -> UpstreamCall {
        UpstreamCall { metrics: self.clone(), began: Instant::now(), transport, result: CallResult::Cancelled }
    }

    /// A session is being opened. Dropped without [`SessionOpen::end`], it counts as refused.
    pub fn begin_open(&self, transport: ServerType, kind: Opening) -> SessionOpen {
        self.openings.at(transport.index()).inc();
        SessionOpen { metrics: self.clone(), began: Instant::now(), transport, kind, result: OpenResult::Refused }
    }

    pub fn lost_session(&self, transport: ServerType) {
        self.lost.at(transport.index()).inc();
    }

    pub fn token_failed(&self, reason: TokenFailure) {
        self.token_failures.at(reason.index()).inc();
    }

    pub fn refreshed(&self, result: RefreshResult) {
        self.refreshes.at(result.index()).inc();
    }

    /// Everything, with how things stand, in the text format of OpenMetrics 1.0.0 or in that of Prometheus (0.0.4).
    pub fn write(&self, readings: &Readings, format: Format) -> String {
        let mut text = String::with_capacity(64 * 1024);
        let written = encode_registry(&mut text, &self.registry)
            .and_then(|()| encode_registry(&mut text, &readings.standing(&self.openings)))
            .and_then(|()| encode_registry(&mut text, &readings.process(self.started)))
            .and_then(|()| encode_eof(&mut text));
        written.expect("a String takes any text");
        match format {
            Format::OpenMetrics => text,
            Format::Prometheus => to_prometheus(&text),
        }
    }
}

/// Which text format is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Prometheus,
    OpenMetrics,
}

impl Format {
    /// What the header `Accept` asks for; Prometheus' own format unless OpenMetrics is named.
    pub fn accepted(accept: &str) -> Self {
        let names = |range: &str| {
            let mut parts = range.split(';').map(str::trim);
            let is_named = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/openmetrics-text"));
            is_named && parts.all(|part| !matches!(part, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
        };
        if accept.split(',').any(names) { Self::OpenMetrics } else { Self::Prometheus }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The older format calls a counter by the name of its samples, and knows neither units nor an end.
fn to_prometheus(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut lines = openmetrics.lines().peekable();
    while let Some(line) = lines.next() {
        let next_is_counter =
            lines.peek().is_some_and(|next| next.starts_with("# TYPE ") && next.ends_with(" counter"));
        let is_counter = line.starts_with("# TYPE ") && line.ends_with(" counter");
        let about = line.strip_prefix("# ").and_then(|about| about.split_once(' '));
        match about.and_then(|(word, rest)| Some((word, rest.split_once(' ')?))) {
            _ if line == "# EOF" => {}
            Some(("UNIT", _)) => {}
            Some((word, (name, rest))) if is_counter || word == "HELP" && next_is_counter => {
                text.extend(["# ", word, " ", name, "_total ", rest, "\n"]);
            }
            _ => text.extend([line, "\n"]),
        }
    }
    text
}

/// Requests over HTTP, by route.
pub struct Requests {
    /// By path without a slash at its end: the method and which route it is.
    routes: HashMap<String, Vec<(String, usize)>>,
    answered: Each<Counter, 3>,
    times: Each<Times, 2>,
    errors: Codes,
}

/// What belongs to no route stands under this name.
const OTHER: &str = "other";

impl Requests {
    fn new<'a>(routes: impl IntoIterator<Item = (&'a str, &'a str)>, registry: &mut Registry) -> Self {
        let mut known: Vec<_> = routes.into_iter().map(|(method, path)| [method.to_owned(), path.to_owned()]).collect();
        let mut by_path: HashMap<String, Vec<(String, usize)>> = HashMap::new();
        for (index, [method, path]) in known.iter().enumerate() {
            by_path.entry(bare(path).to_owned()).or_default().push((method.clone(), index));
        }
        known.push([OTHER, OTHER].map(str::to_owned));
        let classes = known.iter().flat_map(|[method, path]| {
            StatusClass::VALUES.iter().map(|class| [method.clone(), path.clone(), (*class).to_owned()])
        });
        let answered = Each::new(["method", "route", StatusClass::NAME], classes, Counter::default);
        let help = "Requests that were answered, by route and class of status";
        let answered = count(registry, "http_requests", help, answered);
        let times = Each::new(["method", "route"], known, || Times::new(REQUEST_BOUNDS));
        let help = "How long requests took until the head of their answer was there";
        let times = time(registry, "http_request_duration", help, times);
        let errors = count(registry, "http_errors", "Answers that tell of an error, by its code", Codes::default());
        Self { routes: by_path, answered, times, errors }
    }

    /// A request was answered. `route` is the path of its route, as the router knows it.
    pub fn answered(&self, method: &str, route: Option<&str>, status: u16, time: Duration) {
        // HEAD is GET without a body.
        let method = if method == "HEAD" { "GET" } else { method };
        let known = route.and_then(|route| self.routes.get(bare(route)));
        let known = known.and_then(|methods| methods.iter().find(|(known, _)| known == method));
        let index = known.map_or(self.times.series.len() - 1, |(_, index)| *index);
        self.answered.at(index * StatusClass::VALUES.len() + StatusClass::of(status).index()).inc();
        self.times.at(index).record(time);
    }

    /// The answer told of an error with this code.
    pub fn failed(&self, code: &'static str) {
        self.errors.get_or_create(&[("code", code)]).inc();
    }
}

fn bare(path: &str) -> &str {
    path.trim_end_matches('/')
}

struct Runs {
    success: Counter,
    error: Counter,
    /// By outcome and code: these two, and what has a code.
    all: Family<[(&'static str, &'static str); 2], Counter>,
    times: Each<Times, 1>,
}

impl Runs {
    fn new(registry: &mut Registry) -> Self {
        let help = "Runs by outcome, with the code of the error when no call was made (failed), or cancelled. Requests that \
                    mean one run count as one";
        let all = count(registry, "runs", help, Family::<[(&'static str, &'static str); 2], Counter>::default());
        let of = |outcome| all.get_or_create_owned(&[("outcome", outcome), ("code", "")]);
        let (success, error) = (of("success"), of("error"));
        let help = "How long runs took, with the wait for their turn and for a session";
        let times = time(registry, "run_duration", help, Each::of::<ServerType>(|| Times::new(CALL_BOUNDS)));
        Self { success, error, all, times }
    }

    fn count(&self, outcome: &'static str, code: &'static str) {
        self.all.get_or_create(&[("outcome", outcome), ("code", code)]).inc();
    }
}

/// What came of a run, as its answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    Success,
    /// The tool failed, or no answer of it arrived.
    Error,
    /// The answer was an error of ours, with this code.
    Failed(&'static str),
}

/// A run under way.
pub struct Run {
    metrics: Metrics,
    began: Instant,
    transport: Option<ServerType>,
    sent: Arc<AtomicBool>,
    ended: bool,
}

impl Run {
    /// It is for a server that is reached so.
    pub fn goes_to(&mut self, transport: ServerType) {
        self.transport = Some(transport);
    }

    pub fn end(mut self, end: RunEnd) {
        self.ended = true;
        let runs = &self.metrics.runs;
        match end {
            RunEnd::Success => {
                runs.success.inc();
            }
            RunEnd::Error => {
                runs.error.inc();
            }
            RunEnd::Failed(code) => runs.count("failed", code),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let runs = &self.metrics.runs;
        if !self.ended {
            // In the words of the run log.
            runs.count(if self.sent.load(Ordering::Relaxed) { "error" } else { "failed" }, "cancelled");
        }
        if let Some(transport) = self.transport {
            runs.times.at(transport.index()).record(self.began.elapsed());
        }
    }
}

/// A call under way.
pub struct UpstreamCall {
    metrics: Metrics,
    began: Instant,
    transport: ServerType,
    result: CallResult,
}

impl UpstreamCall {
    pub fn end(mut self, result: CallResult) {
        self.result = result;
    }
}

impl Drop for UpstreamCall {
    fn drop(&mut self) {
        self.metrics.calls.at_two(self.transport, self.result).inc();
        self.metrics.call_times.at(self.transport.index()).record(self.began.elapsed());
    }
}

/// An opening under way.
pub struct SessionOpen {
    metrics: Metrics,
    began: Instant,
    transport: ServerType,
    kind: Opening,
    result: OpenResult,
}

impl SessionOpen {
    pub fn end(mut self, result: OpenResult) {
        self.result = result;
    }
}

impl Drop for SessionOpen {
    fn drop(&mut self) {
        let Self { metrics, began, transport, kind, result } = self;
        metrics.openings.at(transport.index()).dec();
        let index = (transport.index() * Opening::VALUES.len() + kind.index()) * OpenResult::VALUES.len();
        metrics.opens.at(index + result.index()).inc();
        metrics.open_times.at(transport.index()).record(began.elapsed());
    }
}

/// Operations of the store: how long they take, and how many fail. Clones share everything.
#[derive(Clone)]
pub struct Operations {
    times: Each<Times, 1>,
    errors: Each<Counter, 1>,
}

impl Default for Operations {
    /// Nobody reads these.
    fn default() -> Self {
        Self::new(&mut Registry::default())
    }
}

impl Operations {
    fn new(registry: &mut Registry) -> Self {
        let help = "How long operations of the database took, with the wait for a connection";
        let times = Each::of::<Operation>(|| Times::new(STORE_BOUNDS));
        let times = time(registry, "store_operation_duration", help, times);
        let help = "Operations that the database did not do: it was away, busy, or refused a statement";
        let errors = count(registry, "store_errors", help, Each::of::<Operation>(Counter::default));
        Self { times, errors }
    }

    /// An operation that began then has ended; `failed` when the database is to blame for what came of it.
    pub fn done(&self, operation: Operation, began: Instant, failed: bool) {
        self.times.at(operation.index()).record(began.elapsed());
        if failed {
            self.errors.at(operation.index()).inc();
        }
    }
}

/// How things stand at the moment.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    pub requests: Use,
    pub connections: Use,
    /// Live sessions that nobody uses, and that somebody does, by transport.
    pub idle_sessions: [usize; 3],
    pub busy_sessions: [usize; 3],
    pub children: Use,
    pub calls: usize,
    pub queued_calls: usize,
    /// Of answers of servers, in bytes; the first 64 KiB of each are not counted.
    pub held_bytes: Use,
    /// Rows of the run log that wait to be written, and those that never will be.
    pub run_log_queued: usize,
    pub run_log_dropped: u64,
    /// Spans that no collector got.
    pub spans_dropped: u64,
    /// How long ago it was certain that no change by others was missed; zero where there are no others.
    pub changes_age: Duration,
    /// Others can notify of changes, and how often they did, of these or of runs.
    pub changes_listening: bool,
    pub changes_notifications: u64,
}

/// How much there is of something, and how much there may be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Use {
    pub now: usize,
    pub most: usize,
}

impl Readings {
    /// One more session of this transport.
    pub fn add_session(&mut self, transport: ServerType, is_busy: bool) {
        let sessions = if is_busy { &mut self.busy_sessions } else { &mut self.idle_sessions };
        sessions[transport.index()] += 1;
    }

    fn standing(&self, openings: &Each<Gauge, 1>) -> Registry {
        let mut registry = Registry::with_prefix("portolan");
        let mut one = |name: &str, help: &str, value: usize| registry.register(name, help, ConstGauge::new(value));
        one("http_requests_in_flight", "Requests that are being answered, this one too if it is", self.requests.now);
        one("http_requests_limit", "How many requests may be in flight (--max-requests)", self.requests.most);
        one("http_connections", "Open connections of clients", self.connections.now);
        one("http_connections_limit", "How many connections may be open (--max-connections)", self.connections.most);
        one("children", "Commands that run as MCP servers, or are being started or ended", self.children.now);
        one("children_limit", "How many commands may run (--max-children)", self.children.most);
        one("upstream_calls_in_flight", "Calls of tools that have a place at their server", self.calls);
        one("upstream_calls_queued", "Calls of tools that wait for a place at their server", self.queued_calls);
        one("run_log_queued", "Rows of the run log that wait to be written", self.run_log_queued);
        let help = "Whether other Portolans on the same PostgreSQL can notify this one: 1 or 0";
        one("changes_listening", help, usize::from(self.changes_listening));
        let help = "Notifications by Portolans on the same PostgreSQL, this one too, that arrived";
        registry.register("changes_notifications", help, ConstCounter::new(self.changes_notifications));
        let help =
            "Since when others may have changed something unnoticed; from 15 s on runs ask the database (0 on SQLite)";
        let age = self.changes_age.as_secs_f64();
        registry.register_with_unit("changes_age", help, Unit::Seconds, ConstGauge::new(age));
        let help = "Rows of the run log that were dropped because the database did not keep up";
        registry.register("run_log_dropped", help, ConstCounter::new(self.run_log_dropped));
        let help = "Spans that were lost on their way to the collector";
        registry.register("spans_dropped", help, ConstCounter::new(self.spans_dropped));
        let mut bytes = |name: &str, help: &str, value: usize| {
            registry.register_with_unit(name, help, Unit::Bytes, ConstGauge::new(value));
        };
        let help = "Answers of servers that are held in memory, without the first 64 KiB of each";
        bytes("upstream_answers_held", help, self.held_bytes.now);
        let help = "How much of answers may be held (--max-bytes-in-flight)";
        bytes("upstream_answers_held_limit", help, self.held_bytes.most);
        let sessions = ServerType::VALUES.iter().enumerate().flat_map(|(at, transport)| {
            let opening = usize::try_from(openings.at(at).get()).unwrap_or_default();
            let counts = [opening, self.idle_sessions[at], self.busy_sessions[at]];
            SessionState::VALUES
                .iter()
                .zip(counts)
                .map(|(state, count)| ([(*transport).to_owned(), (*state).to_owned()], ConstGauge::new(count)))
        });
        let sessions = Each { names: [ServerType::NAME, SessionState::NAME], series: sessions.collect() };
        registry.register("sessions", "Sessions to MCP servers, by transport and state", sessions);
        registry
    }

    /// What Prometheus' own clients tell of their processes, under the same names; what the system does not tell is absent.
    fn process(&self, started: SystemTime) -> Registry {
        let mut registry = Registry::with_prefix("process");
        let started = started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let help = "When the process was started, in seconds since 1970";
        registry.register_with_unit("start_time", help, Unit::Seconds, ConstGauge::new(started));
        #[cfg(target_os = "linux")]
        linux::register(&mut registry);
        registry
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use super::{ConstCounter, ConstGauge, Registry, Unit};

    pub fn register(registry: &mut Registry) {
        if let Some(seconds) = cpu_seconds() {
            let help = "Processor time that the process used, in its own code and in the system's";
            registry.register_with_unit("cpu", help, Unit::Seconds, ConstCounter::new(seconds));
        }
        if let Some(bytes) = resident_bytes() {
            registry.register_with_unit(
                "resident_memory",
                "Memory of the process",
                Unit::Bytes,
                ConstGauge::new(bytes),
            );
        }
        // The folder that is read is open itself.
        if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
            registry.register("open_fds", "Open files and sockets", ConstGauge::new(files.count().saturating_sub(1)));
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit.map_or(f64::INFINITY, |limit| limit as f64);
        registry.register("max_fds", "How many files and sockets may be open", ConstGauge::new(limit));
    }

    /// Fields 14 and 15 of /proc/self/stat (proc_pid_stat(5)), in ticks.
    fn cpu_seconds() -> Option<f64> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The name of the program stands in parentheses and may hold any character; the state follows, field 3.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace().skip(11);
        let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
        Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    /// The second field of /proc/self/statm (proc_pid_statm(5)), in pages.
    fn resident_bytes() -> Option<u64> {
        let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
        let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
        Some(pages * rustix::param::page_size() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_for_those_who_name_it() {
        for (accept, format) in [
            ("", Format::Prometheus),
            ("*/*", Format::Prometheus),
            ("text/plain;version=0.0.4", Format::Prometheus),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("Application/OpenMetrics-Text; version=1.0.0; charset=utf-8", Format::OpenMetrics),
            // As Prometheus asks.
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
            ("application/openmetrics-text;q=0, text/plain", Format::Prometheus),
            ("application/openmetrics-texts", Format::Prometheus),
        ] {
            assert_eq!(Format::accepted(accept), format, "{accept}");
        }
    }

    #[test]
    fn the_older_format_calls_a_counter_by_its_samples() {
        let open = "# HELP a_seconds Help.\n# TYPE a_seconds counter\n# UNIT a_seconds seconds\na_seconds_total 1\n\
                    # HELP b Of a counter.\n# TYPE b gauge\nb{c=\"# TYPE d counter\"} 2\n# HELP e E.\n# TYPE e counter\n# EOF\n";
        let old = "# HELP a_seconds_total Help.\n# TYPE a_seconds_total counter\na_seconds_total 1\n\
                   # HELP b Of a counter.\n# TYPE b gauge\nb{c=\"# TYPE d counter\"} 2\n# HELP e_total E.\n# TYPE e_total counter\n";
        assert_eq!(to_prometheus(open), old);
    }

    #[test]
    fn a_time_is_in_the_bucket_that_ends_with_it_or_after_it() {
        let times = Times::new(&[0.001, 0.5]);
        for micros in [0, 1_000, 1_001, 500_000, 500_001, 9_000_000] {
            times.record(Duration::from_micros(micros));
        }
        let counts: Vec<_> = times.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        assert_eq!(counts, [2, 2, 2]);
        assert_eq!(times.micros.load(Ordering::Relaxed), 10_002_002);
    }

    #[test]
    fn labels_are_where_their_values_say() {
        let each: Each<Counter, 2> = Each::of_two::<ServerType, OpenResult>(Counter::default);
        for transport in [ServerType::Stdio, ServerType::Sse, ServerType::StreamableHttp] {
            for result in [OpenResult::Opened, OpenResult::Unreachable, OpenResult::AuthRequired, OpenResult::Refused] {
                each.at_two(transport, result).inc();
                let found =
                    each.series.iter().find(|(_, counter)| counter.get() == 1).map(|(values, _)| values.clone());
                let told = OpenResult::VALUES[result.index()];
                assert_eq!(found, Some([transport.as_str().to_owned(), told.to_owned()]));
                each.at_two(transport, result).inc();
            }
        }
    }
}
