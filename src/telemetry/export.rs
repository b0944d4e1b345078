//! From a bounded queue to a collector: OTLP over HTTP (opentelemetry.io, OTLP specification, OTLP/HTTP), in batches, by a
//! task of its own. Runs never wait for it: what finds no room, and what the collector does not take, is counted and lost.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use url::Url;

use crate::config;
use crate::mcp::{self, Egress, Trust};
use crate::model::Secret;

use super::otlp::{Record, Value, request};

/// How many spans may wait, each of them some kilobytes at most.
const QUEUE: usize = 2_048;
/// How many go out together, and how long the first of them waits for others.
const BATCH: usize = 512;
const LINGER: Duration = Duration::from_secs(1);
/// How long one attempt may take, how many there are, and what lies between the first two; doubled each time.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause that a collector may ask for.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// How long a stop waits for what has not been sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is said that spans are lost.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// The longest answer that is read over, and the largest file of header fields, in bytes.
const MAX_ANSWER: usize = 64 * 1024;
const MAX_FILE: u64 = 64 * 1024;

/// Why traces cannot be sent; each message is one sentence for the person who starts Portolan, and repeats no value.
#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    #[error(
        "The address of the collector (--otlp-endpoint) must be scheme, host, port and path alone, for example http://localhost:4318."
    )]
    Url,
    #[error("Traces cannot be sent to the address of --otlp-endpoint: {0}")]
    Address(mcp::Error),
    #[error("Cannot read the file {file:?} of --otlp-headers-file: {cause}.")]
    Unreadable { file: PathBuf, cause: std::io::Error },
    #[error("The header fields for the collector must be written name=value, separated by commas or line ends.")]
    Headers,
}

/// Where spans go, and with what.
pub struct Collector {
    egress: Egress,
    url: Url,
    headers: HeaderMap,
    resource: Vec<(&'static str, Value)>,
}

/// Why a batch was not taken.
enum Refusal {
    /// Another attempt may do, after this time if the collector says so.
    Later(String, Option<Duration>),
    Never(String),
}

impl Collector {
    /// `None` when no collector is named.
    ///
    /// # Errors
    /// [`CollectorError`].
    pub async fn new(settings: &config::Traces, egress: &Egress) -> Result<Option<Self>, CollectorError> {
        let Some(url) = settings.endpoint().map_err(|_| CollectorError::Url)? else { return Ok(None) };
        // Whether it may be connected to is looked at again each time; this is for whoever starts Portolan.
        egress.to(url.as_str(), Trust::Operator).await.map_err(CollectorError::Address)?;
        let headers = read_headers(settings)?;
        let text = |text: &str| Value::Text(text.to_owned());
        let resource = vec![
            ("service.name", text(env!("CARGO_PKG_NAME"))),
            ("service.version", text(env!("CARGO_PKG_VERSION"))),
            ("service.instance.id", Value::Text(uuid::Uuid::new_v4().to_string())),
        ];
        Ok(Some(Self { egress: egress.clone(), url, headers, resource }))
    }

    /// One attempt.
    async fn send(&self, spans: &[Record]) -> Result<(), Refusal> {
        let exporting = async {
            let destination = self.egress.to(self.url.as_str(), Trust::Operator).await;
            let destination = destination.map_err(|error| Refusal::Later(error.to_string(), None))?;
            let body = request(&self.resource, spans);
            let request = destination.request(Method::POST).headers(self.headers.clone());
            let sent = request.header(CONTENT_TYPE, "application/x-protobuf").body(body).send().await;
            let mut response = sent.map_err(|error| {
                let reason = if error.is_connect() { "it cannot be reached" } else { "the connection broke" };
                Refusal::Later(reason.to_owned(), None)
            })?;
            let status = response.status();
            let pause = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            // Its connection can be used again only when the answer has been read.
            let mut left = MAX_ANSWER;
            while let Ok(Some(chunk)) = response.chunk().await
                && chunk.len() <= left
            {
                left -= chunk.len();
            }
            let reason = format!("it answered HTTP {}", status.as_u16());
            match status {
                status if status.is_success() => Ok(()),
                StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT => Err(Refusal::Later(reason, pause.map(Duration::from_secs))),
                _ => Err(Refusal::Never(reason)),
            }
        };
        let late = |_| Err(Refusal::Later("it did not answer in time".to_owned(), None));
        timeout(EXPORT_TIMEOUT, exporting).await.unwrap_or_else(late)
    }
}

/// Header fields as `OTEL_EXPORTER_OTLP_HEADERS` has them (OpenTelemetry, OTLP exporter): `name=value`, the values
/// percent-encoded; in a file also a line each.
fn read_headers(settings: &config::Traces) -> Result<HeaderMap, CollectorError> {
    let text = match &settings.otlp_headers_file {
        Some(file) => Some(read(file).map_err(|cause| CollectorError::Unreadable { file: file.clone(), cause })?),
        None => settings.headers().cloned(),
    };
    let mut headers = HeaderMap::new();
    let Some(text) = text else { return Ok(headers) };
    for pair in text.expose().split([',', '\n']).map(str::trim).filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or(CollectorError::Headers)?;
        let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| CollectorError::Headers)?;
        let value = decode(value.trim()).ok_or(CollectorError::Headers)?;
        let mut value = HeaderValue::from_bytes(&value).map_err(|_| CollectorError::Headers)?;
        value.set_sensitive(true);
        headers.append(name, value);
    }
    Ok(headers)
}

fn read(file: &PathBuf) -> std::io::Result<Secret> {
    let mut text = String::new();
    std::fs::File::open(file)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text.into())
}

/// RFC 3986 §2.1; a `%` that begins no such thing stands for itself.
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let digits = after.get(..2).filter(|digits| *first == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        let encoded = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match encoded {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    (!bytes.is_empty()).then_some(bytes)
}

/// What waits for the collector, and the task that sends it.
pub struct Queue {
    sender: mpsc::Sender<Record>,
    lost: Arc<AtomicU64>,
    stop: CancellationToken,
    tracker: TaskTracker,
    /// Nobody is left who could close it.
    _end: DropGuard,
}

impl Queue {
    pub fn new(collector: Collector) -> Self {
        let (sender, spans) = mpsc::channel(QUEUE);
        let (lost, stop, tracker) = (Arc::<AtomicU64>::default(), CancellationToken::new(), TaskTracker::new());
        let mut sending =
            Sending { collector, spans, batch: Vec::new(), lost: lost.clone(), stop: stop.clone(), said: None };
        let stopping = stop.clone();
        tracker.spawn(async move {
            let late = async {
                stopping.cancelled().await;
                sleep(FLUSH_TIMEOUT).await;
            };
            tokio::select! {
                () = sending.run() => {}
                () = late => {}
            }
            sending.give_up();
        });
        tracker.close();
        Self { sender, lost, _end: stop.clone().drop_guard(), stop, tracker }
    }

    pub fn push(&self, span: Record) {
        if self.sender.try_send(span).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub async fn close(&self) {
        self.stop.cancel();
        self.tracker.wait().await;
    }
}

struct Sending {
    collector: Collector,
    spans: mpsc::Receiver<Record>,
    batch: Vec<Record>,
    lost: Arc<AtomicU64>,
    stop: CancellationToken,
    /// When it was last said that spans are lost.
    said: Option<Instant>,
}

impl Sending {
    /// Until the stop, and then until the queue is empty.
    async fn run(&mut self) {
        while !self.stop.is_cancelled() {
            let stop = self.stop.clone();
            let _stopped = stop.run_until_cancelled(self.fill()).await;
            self.export().await;
        }
        self.spans.close();
        while self.spans.recv_many(&mut self.batch, BATCH).await > 0 {
            self.export().await;
        }
    }

    /// Waits for a span, and a moment for more. To be dropped half-way: what has come is in the batch.
    async fn fill(&mut self) {
        if self.spans.recv_many(&mut self.batch, BATCH).await == 0 {
            // There is always a sender until the stop.
            return self.stop.cancelled().await;
        }
        let filling = async {
            let mut room = BATCH - self.batch.len();
            while room > 0 && self.spans.recv_many(&mut self.batch, room).await > 0 {
                room = BATCH - self.batch.len();
            }
        };
        let _full = timeout(LINGER, filling).await;
    }

    /// Sends the batch, or loses it. The stop cuts pauses short: there is one more attempt then.
    async fn export(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let mut pause = PAUSE;
        for attempt in 1..=ATTEMPTS {
            let was_stopping = self.stop.is_cancelled();
            match self.collector.send(&self.batch).await {
                Ok(()) => {
                    self.batch.clear();
                    if self.said.take().is_some() {
                        tracing::info!("the collector takes traces again");
                    }
                    return;
                }
                Err(Refusal::Later(_, asked)) if attempt < ATTEMPTS && !was_stopping => {
                    let pause = asked.map_or(pause, |asked| asked.min(MAX_PAUSE));
                    let _stopped = self.stop.run_until_cancelled(sleep(pause)).await;
                }
                Err(Refusal::Later(reason, _) | Refusal::Never(reason)) => {
                    self.lose(&reason);
                    return;
                }
            }
            pause *= 2;
        }
    }

    fn lose(&mut self, reason: &str) {
        let lost = self.lost.fetch_add(self.batch.len() as u64, Ordering::Relaxed) + self.batch.len() as u64;
        self.batch.clear();
        if self.said.is_none_or(|said| said.elapsed() >= SAY_AGAIN) {
            self.said = Some(Instant::now());
            tracing::warn!(spans.lost = lost, "traces are lost, because the collector does not take them: {reason}");
        }
    }

    /// What is left when the time is over.
    fn give_up(&mut self) {
        self.spans.close();
        while let Ok(span) = self.spans.try_recv() {
            self.batch.push(span);
        }
        if !self.batch.is_empty() {
            self.lose("Portolan is stopping");
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn values_of_header_fields_are_percent_encoded() {
        assert_eq!(decode("a%2Cb%3d").unwrap(), b"a,b=");
        assert_eq!(decode("100%").unwrap(), b"100%");
        assert_eq!(decode("%zz%4").unwrap(), b"%zz%4");
        assert_eq!(decode(""), None);
    }
}
