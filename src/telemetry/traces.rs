//! Traces: which runs are recorded, and the spans of one. A run is a span, what it asks of its server are spans below it,
//! and the trace of the caller goes on in them and is passed on to the server (`context`). Spans that have ended leave the
//! run at once, into a bounded queue, from which `export` sends them.
//!
//! Without a collector every span is empty: nothing is measured, kept or passed on.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::HeaderMap;

use crate::config;
use crate::mcp::Egress;

use super::context::{RANDOM, SAMPLED, SpanId, TraceContext};
use super::export::{Collector, CollectorError, Queue};
use super::otlp::{Kind, Record, Value as Kept};

/// The longest text of an attribute or a name, in bytes: tools may be called anything.
const MAX_TEXT: usize = 256;

/// The way of spans to a collector; without one, nothing. Clones share everything.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Shared>>);

struct Shared {
    /// Of the traces that begin here, 0 to 1.
    sample: f64,
    queue: Queue,
}

impl Traces {
    /// Off without an endpoint. To be called in the runtime that serves.
    ///
    /// # Errors
    /// One sentence for the person who starts Portolan.
    pub async fn open(settings: &config::Traces, egress: &Egress) -> Result<Self, CollectorError> {
        let Some(collector) = Collector::new(settings, egress).await? else { return Ok(Self::default()) };
        Ok(Self(Some(Arc::new(Shared { sample: settings.otlp_sample, queue: Queue::new(collector) }))))
    }

    /// The span of a request, in its caller's trace or in one that begins here. A caller that is in a trace says whether
    /// it is recorded; of others it is `--otlp-sample` of them. It counts from [`Span::begin`] on.
    pub fn start(&self, headers: &HeaderMap, name: impl FnOnce() -> String) -> Span {
        let Some(shared) = &self.0 else { return Span::default() };
        let caller = TraceContext::of(headers);
        let (context, parent) = match caller {
            Some(caller) => {
                let parent = caller.span;
                (TraceContext { span: random(), ..caller }, Some(parent))
            }
            None => {
                let sampled = if draw() < shared.sample { SAMPLED } else { 0 };
                let (trace, flags) = (random(), sampled | RANDOM);
                (TraceContext { trace, span: random(), flags, state: Arc::default() }, None)
            }
        };
        Span::new(shared.clone(), context, parent.map(|parent| (parent, true)), Kind::Server, name(), false)
    }

    /// How many spans were lost: the queue was full, or the collector did not take them.
    pub fn lost(&self) -> u64 {
        self.0.as_ref().map_or(0, |shared| shared.queue.lost())
    }

    /// Sends what has ended until now, within a few seconds; nothing is recorded any more.
    pub async fn close(&self) {
        if let Some(shared) = &self.0 {
            shared.queue.close().await;
        }
    }
}

/// Random bytes, which are never all zero (W3C trace context, level 1, section 3.2.2).
fn random<const N: usize>() -> [u8; N] {
    loop {
        let mut bytes = [0; N];
        getrandom::fill(&mut bytes).expect("the operating system has random numbers");
        if bytes != [0; N] {
            return bytes;
        }
    }
}

/// A random number from 0 up to, but not, 1.
fn draw() -> f64 {
    (u64::from_le_bytes(random()) >> 11) as f64 / (1_u64 << 53) as f64
}

/// A part of a run, or nothing. One that has begun and is dropped before its end was cancelled, and says so.
#[derive(Default)]
pub struct Span(Option<Box<Live>>);

struct Live {
    shared: Arc<Shared>,
    context: TraceContext,
    /// Its id, and whether it is somebody else's.
    parent: Option<(SpanId, bool)>,
    kind: Kind,
    name: String,
    wall: SystemTime,
    started: Instant,
    begun: bool,
    attributes: Vec<(&'static str, Kept)>,
    is_error: bool,
}

/// The value of an attribute.
pub enum Value<'a> {
    Text(&'a str),
    Flag(bool),
    Number(i64),
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Value<'_> {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<u16> for Value<'_> {
    fn from(number: u16) -> Self {
        Self::Number(number.into())
    }
}

fn bounded(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}

impl Span {
    fn new(
        shared: Arc<Shared>,
        context: TraceContext,
        parent: Option<(SpanId, bool)>,
        kind: Kind,
        name: String,
        begun: bool,
    ) -> Self {
        let (wall, started) = (SystemTime::now(), Instant::now());
        let name = bounded(&name);
        let (attributes, is_error) = Default::default();
        Self(Some(Box::new(Live { shared, context, parent, kind, name, wall, started, begun, attributes, is_error })))
    }

    /// From now on it counts, whatever becomes of it.
    #[must_use]
    pub fn begin(mut self) -> Self {
        if let Some(live) = &mut self.0 {
            live.begun = true;
        }
        self
    }

    /// A part of this one that asks something of a server, from now on.
    pub fn child(&self, name: impl FnOnce() -> String) -> Self {
        let Some(live) = &self.0 else { return Self::default() };
        let context = TraceContext { span: random(), ..live.context.clone() };
        Self::new(live.shared.clone(), context, Some((live.context.span, false)), Kind::Client, name(), true)
    }

    /// Never arguments, results, URLs or secrets. Texts are cut after 256 bytes.
    pub fn set<'a>(&mut self, key: &'static str, value: impl Into<Value<'a>>) {
        let Some(live) = self.0.as_mut().filter(|live| live.context.is_sampled()) else { return };
        let value = match value.into() {
            Value::Text(text) => Kept::Text(bounded(text)),
            Value::Flag(flag) => Kept::Flag(flag),
            Value::Number(number) => Kept::Number(number),
        };
        live.attributes.push((key, value));
    }

    /// It failed; `kind` is one of few words (OpenTelemetry, `error.type`).
    pub fn fail(&mut self, kind: &str) {
        self.set("error.type", kind);
        if let Some(live) = &mut self.0 {
            live.is_error = true;
        }
    }

    /// Whether anybody will see it.
    pub fn is_on(&self) -> bool {
        self.0.as_ref().is_some_and(|live| live.context.is_sampled())
    }

    /// What the next one in the trace is to know.
    pub fn context(&self) -> Option<&TraceContext> {
        self.0.as_ref().map(|live| &live.context)
    }

    /// It has ended now.
    pub fn end(mut self) {
        if let Some(live) = self.0.take() {
            live.record();
        }
    }

    /// It did not come about.
    pub fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if self.0.as_ref().is_some_and(|live| live.begun) {
            self.fail("cancelled");
            if let Some(live) = self.0.take() {
                live.record();
            }
        }
    }
}

impl Live {
    fn record(self) {
        let Self { shared, context, parent, kind, name, wall, started, attributes, is_error, .. } = self;
        if !context.is_sampled() {
            return;
        }
        let TraceContext { trace, span, flags, state } = context;
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let start = nanos(wall.duration_since(UNIX_EPOCH).unwrap_or_default());
        // The clock on the wall may be set meanwhile.
        let end = start.saturating_add(nanos(started.elapsed()));
        let (parent, is_remote) = parent.map_or((None, false), |(parent, is_remote)| (Some(parent), is_remote));
        shared.queue.push(Record {
            trace,
            span,
            parent,
            is_remote,
            flags,
            state,
            name,
            kind,
            start,
            end,
            attributes,
            is_error,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_spread_over_the_whole_range() {
        let draws: Vec<f64> = (0..1_000).map(|_| draw()).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        assert!(draws.iter().any(|draw| *draw < 0.25) && draws.iter().any(|draw| *draw > 0.75));
    }

    #[test]
    fn without_a_collector_a_span_is_nothing() {
        let traces = Traces::default();
        let mut span = traces.start(&HeaderMap::new(), || unreachable!("nobody needs its name")).begin();
        span.set("a", "b");
        assert!(span.context().is_none());
        assert!(span.child(|| unreachable!("nobody needs its name")).context().is_none());
        span.end();
    }
}
