//! Streamable HTTP, MCP 2025-03-26 to 2026-07-28: one POST per message, answered with JSON or with an event stream.
//!
//! Nothing runs between calls but one task, which listens for changed lists if the server announces them, and says goodbye
//! at the end. A call that nobody waits for any more is dropped with its connection, and an older server is told so.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::model::Remote;
use crate::store::Store;

use super::budget::{Held, Oversize, Share};
use super::egress::{Destination, Trust};
use super::events::{Event, Events};
use super::exchange::Answer;
use super::message::{self, Inbound, RpcError};
use super::mirror::encode;
use super::oauth::{Problem, Signer};
use super::remote::{
    EVENT_STREAM, HttpError, JSON, NOTICE_TIMEOUT, Replies, X_AGENT_ID, is_media_type, read_over, send, unsigned_fields,
};
use super::session::{Ask, CallError, Context, Greeted};
use super::watch::Bell;
use super::{AgentId, Error, traced};

const BOTH: HeaderValue = HeaderValue::from_static("application/json, text/event-stream");
const SESSION: HeaderName = HeaderName::from_static("mcp-session-id");
const VERSION: HeaderName = HeaderName::from_static("mcp-protocol-version");
const METHOD: HeaderName = HeaderName::from_static("mcp-method");
const NAME: HeaderName = HeaderName::from_static("mcp-name");
const LAST_EVENT: HeaderName = HeaderName::from_static("last-event-id");

/// The most of an error body that is read, in bytes.
const MAX_ERROR_BODY: usize = 64 * 1024;
/// How long before a broken answer stream is resumed, however soon the server invites it, and how often.
const RESUME_DELAY: Duration = Duration::from_millis(500);
const MAX_RESUMES: usize = 100;
/// How long the end of a stream may take after its answer, so that its connection can be used again.
const REST_OF_STREAM: Duration = Duration::from_secs(1);
/// How long before a stream of notices is opened again: doubled from the first to the last.
const LISTEN_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long between two looks at a server that says nothing by itself.
const LOOK: Duration = Duration::from_secs(60);

/// One session with one server.
#[derive(Clone)]
pub struct HttpWire(Arc<Shared>);

struct Shared {
    server: Destination,
    fields: HeaderMap,
    signer: Option<Signer>,
    last_id: AtomicU64,
    /// What the handshake agreed on.
    agreed: OnceLock<Agreed>,
    /// The session that the server named in its answer to `initialize`.
    session: Mutex<Option<HeaderValue>>,
    max_body: usize,
    share: Arc<Share>,
    bell: Bell,
    replies: Replies,
    tracker: tokio_util::task::TaskTracker,
    handshake_timeout: Duration,
    /// Why the server is known to be gone.
    gone: OnceLock<HttpError>,
    store: Store,
}

struct Agreed {
    version: HeaderValue,
    modern: bool,
}

impl HttpWire {
    /// Nothing is sent before the handshake.
    ///
    /// # Errors
    /// [`Error::Header`] for a configured field that is no legal HTTP; what [`Egress::to`](super::egress::Egress::to)
    /// refuses.
    pub async fn open(
        remote: &Remote,
        signer: Option<Signer>,
        context: &Context,
        share: Arc<Share>,
        bell: Bell,
    ) -> Result<Self, Error> {
        Ok(Self(Arc::new(Shared {
            server: context.egress.to(&remote.server_url, Trust::Configured).await?,
            fields: unsigned_fields(remote, signer.as_ref())?,
            signer,
            last_id: AtomicU64::new(0),
            agreed: OnceLock::new(),
            session: Mutex::new(None),
            max_body: context.settings.max_message_bytes,
            share,
            bell,
            replies: Replies::new(context.tracker.clone()),
            tracker: context.tracker.clone(),
            handshake_timeout: context.settings.handshake_timeout,
            gone: OnceLock::new(),
            store: context.sign_ins.store().clone(),
        })))
    }

    /// Sends a request and waits for its answer until `deadline`.
    pub async fn request(&self, ask: &Ask<'_>, deadline: Instant) -> Result<Answer, CallError> {
        let id = self.0.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let mut pending = Pending { wire: self, id, sent: false, over: false };
        let answer = timeout_at(deadline, self.exchange(ask, &mut pending)).await;
        match answer {
            Ok(answer) => {
                pending.over = true;
                answer
            }
            Err(_) if pending.sent => Err(CallError::TimedOut),
            // Before it is sent a request waits for its token alone.
            Err(_) => Err(CallError::NotSent(HttpError::from(Problem::TimedOut).into())),
        }
    }

    /// Sends what has no answer.
    pub async fn notify(&self, body: Bytes, deadline: Instant) -> Result<(), HttpError> {
        let request = self.send(self.post(body), |_| {});
        let response = timeout_at(deadline, request).await.map_err(|_| HttpError::TimedOut)??;
        if !response.status().is_success() {
            return Err(HttpError::of(&response, self.0.signer.as_ref()));
        }
        read_over(response).await;
        Ok(())
    }

    async fn exchange(&self, ask: &Ask<'_>, pending: &mut Pending<'_>) -> Result<Answer, CallError> {
        let id = pending.id;
        let mut request = self.post(message::request(id, ask.method, ask.params).into());
        if self.0.agreed.get().is_some_and(|agreed| agreed.modern) || ask.modern {
            request = request.header(METHOD, ask.method);
            if ask.modern {
                request = request.header(VERSION, super::session::MODERN);
            }
            if let Some(name) = ask.tool {
                request = request.header(NAME, encode(name));
            }
            for (name, value) in ask.mirrored {
                request = request.header(name, value);
            }
        }
        if let Some(AgentId(agent)) = ask.agent {
            request = request.header(X_AGENT_ID, agent);
        }
        for (name, value) in traced::fields(ask.trace, &self.0.fields) {
            request = request.header(name, value);
        }
        let in_session = self.session().is_some();
        let response = match self.send(request, |sent| pending.sent = sent).await {
            Ok(response) => response,
            Err(error) if error.is_unsent() => {
                pending.sent = false;
                return Err(CallError::NotSent(error.into()));
            }
            Err(error) => return Err(CallError::Lost(error.into())),
        };
        let status = response.status();
        if !status.is_success() {
            return Err(refused(id, in_session, response, self.0.signer.as_ref()).await);
        }
        if let Some(session) = response.headers().get(SESSION)
            && !in_session
        {
            self.0.session.lock().expect("no code panics while it holds the session").get_or_insert(session.clone());
        }
        if matches!(status, StatusCode::ACCEPTED | StatusCode::NO_CONTENT) {
            return Err(CallError::Lost(HttpError::NoAnswer.into()));
        }
        if is_media_type(&response, EVENT_STREAM) {
            return self.streamed(id, response).await;
        }
        if !is_media_type(&response, JSON) {
            return Err(CallError::Lost(HttpError::ContentType.into()));
        }
        let mut held = Held::nothing(&self.0.share);
        let body = body(response, self.0.max_body, Some(&mut held)).await.map_err(untaken)?;
        self.take(id, &body, held).await.unwrap_or(Err(CallError::Lost(HttpError::NoAnswer.into())))
    }

    /// Reads an event stream up to the answer. A stream that breaks off is resumed if the server gave its events ids.
    async fn streamed(&self, id: u64, response: reqwest::Response) -> Result<Answer, CallError> {
        let mut events = self.events(response);
        let mut delay = RESUME_DELAY;
        for _ in 0..MAX_RESUMES {
            let broken = loop {
                let (event, held) = match events.next().await {
                    Some(Ok(event)) => event,
                    Some(Err(error @ HttpError::Oversize(_))) => return Err(untaken(error)),
                    Some(Err(error)) => break error.into(),
                    None => break Error::Closed,
                };
                let Event { data, retry, .. } = event;
                if let Some(retry) = retry {
                    delay = Duration::from_millis(retry).max(RESUME_DELAY);
                }
                if data.is_empty() {
                    continue;
                }
                if let Some(answer) = self.take(id, data.as_bytes(), held).await {
                    self.let_end(events);
                    return answer;
                }
            };
            let last_event = events.last_id().to_owned();
            if last_event.is_empty() {
                return Err(CallError::Lost(broken));
            }
            sleep(delay).await;
            let request = self.request_for(Method::GET).header(ACCEPT, EVENT_STREAM).header(LAST_EVENT, &last_event);
            let resumed = timeout(self.0.handshake_timeout, self.send(request, |_| {})).await;
            events = match resumed {
                Ok(Ok(response)) if response.status().is_success() && is_media_type(&response, EVENT_STREAM) => {
                    self.events(response).after(last_event)
                }
                _ => return Err(CallError::Lost(broken)),
            };
        }
        Err(CallError::Lost(Error::Closed))
    }

    /// What one text of the server brings: the answer to request `id` if it is among it. The server's own requests are answered.
    async fn take(&self, id: u64, text: &[u8], held: Held) -> Option<Result<Answer, CallError>> {
        let mut answer = None;
        let mut held = held;
        for inbound in message::read(text) {
            match inbound {
                Inbound::Answer { id: answered, result } if answered == id && answer.is_none() => {
                    answer = Some(match result {
                        Ok(result) => Ok(Answer { result, held: held.take() }),
                        Err(error) => Err(CallError::Rpc(error)),
                    });
                }
                Inbound::Answer { .. } => {}
                Inbound::Request { id, method } => {
                    let (wire, body) = (self.clone(), message::reply(&id, &method));
                    let sending = async move {
                        let _ = wire.notify(body.into(), Instant::now() + NOTICE_TIMEOUT).await;
                    };
                    self.0.replies.send(sending).await;
                }
                Inbound::Notification { method } if method == message::LIST_CHANGED => self.0.bell.list_changed(),
                Inbound::Notification { .. } => {}
            }
        }
        answer
    }

    /// Reads the end of a stream that has brought its answer: only then its connection can be used again.
    fn let_end(&self, mut events: Events) {
        use futures_util::FutureExt;
        // Mostly the end came with the answer.
        if let Some(None) = events.next().now_or_never() {
            return;
        }
        self.0.tracker.spawn(timeout(REST_OF_STREAM, async move { while let Some(Ok(_)) = events.next().await {} }));
    }

    fn events(&self, response: reqwest::Response) -> Events {
        Events::new(response.bytes_stream(), self.0.max_body, Held::nothing(&self.0.share))
    }

    fn post(&self, body: Bytes) -> reqwest::RequestBuilder {
        self.request_for(Method::POST).header(ACCEPT, BOTH).header(CONTENT_TYPE, JSON).body(body)
    }

    /// A request with the server's own header fields, and those of the session.
    fn request_for(&self, method: Method) -> reqwest::RequestBuilder {
        let mut request = self.0.server.request(method).headers(self.0.fields.clone());
        if let Some(Agreed { version, .. }) = self.0.agreed.get() {
            request = request.header(VERSION, version.clone());
        }
        match self.session() {
            Some(session) => request.header(SESSION, session),
            None => request,
        }
    }

    async fn send(
        &self,
        request: reqwest::RequestBuilder,
        sent: impl FnMut(bool),
    ) -> Result<reqwest::Response, HttpError> {
        send(self.0.signer.as_ref(), request, sent).await
    }

    fn session(&self) -> Option<HeaderValue> {
        self.0.session.lock().expect("no code panics while it holds the session").clone()
    }

    /// Sets what the handshake agreed on; from now on every request says so.
    pub fn agree(&self, greeted: &Greeted) {
        let version = HeaderValue::from_static(greeted.version);
        // A session shakes hands once.
        let _ = self.0.agreed.set(Agreed { version, modern: greeted.is_modern() });
    }

    /// Why the session has ended, once it has.
    pub fn ended(&self) -> Option<Error> {
        self.0.gone.get().cloned().map(Error::Http)
    }

    /// Listens for changed lists if the server announces them, and looks whether it is still there, until `end`, which a
    /// server that is gone brings about; then says goodbye.
    pub async fn listen_and_leave(self, greeted: Greeted, end: CancellationToken) {
        let attending = async {
            if greeted.announces_lists
                && let Some(gone) = self.listen(&greeted).await
            {
                return gone;
            }
            self.look(&greeted).await
        };
        if let Some(gone) = end.run_until_cancelled(attending).await {
            // Set once: this is the only place.
            let _ = self.0.gone.set(gone);
            self.0.bell.ended();
            return end.cancel();
        }
        // A server that does not take the goodbye forgets the session by itself.
        // Nor does one hear of it that may have another address or token by now.
        if self.session().is_some() && self.0.store.epoch().is_some() {
            let _ = timeout(NOTICE_TIMEOUT, self.send(self.request_for(Method::DELETE), |_| {})).await;
        }
    }

    /// Waits while nobody could have told that the server was given another address or token: what nobody has asked for is
    /// not sent to where it may not go any more.
    async fn wait_for_news(&self) {
        if self.0.store.epoch().is_some() {
            return;
        }
        while self.0.store.epoch().is_none() {
            sleep(LISTEN_AGAIN.0).await;
        }
        // What has changed meanwhile ends this session now.
        sleep(LISTEN_AGAIN.0).await;
    }

    /// Asks now and then whether the server is there; returns when nobody listens at its address any more.
    async fn look(&self, greeted: &Greeted) -> HttpError {
        let params = if greeted.is_modern() { greeted.plain_params() } else { "{}".to_owned() };
        let method = if greeted.is_modern() { "server/discover" } else { "ping" };
        let ask = Ask::new(method, &params);
        loop {
            sleep(LOOK).await;
            self.wait_for_news().await;
            if let Err(CallError::NotSent(Error::Http(gone))) =
                self.request(&ask, Instant::now() + self.0.handshake_timeout).await
                && gone.is_gone()
            {
                return gone;
            }
        }
    }

    /// Keeps a stream of notices open, as long as the server allows one: a GET stream, or `subscriptions/listen`. Returns
    /// when it does not, or, with the reason, when nobody listens at its address any more.
    async fn listen(&self, greeted: &Greeted) -> Option<HttpError> {
        let mut delay = LISTEN_AGAIN.0;
        let mut first = true;
        loop {
            if !first {
                self.wait_for_news().await;
            }
            let opened = Instant::now();
            let request = if greeted.is_modern() {
                let id = self.0.last_id.fetch_add(1, Ordering::Relaxed) + 1;
                let body = message::request(id, message::LISTEN, &greeted.listen_params());
                self.post(body.into()).header(METHOD, message::LISTEN)
            } else {
                self.request_for(Method::GET).header(ACCEPT, EVENT_STREAM)
            };
            match timeout(self.0.handshake_timeout, self.send(request, |_| {})).await {
                Ok(Ok(response)) if response.status().is_success() && is_media_type(&response, EVENT_STREAM) => {
                    // What changed while there was no stream was not told.
                    if !std::mem::take(&mut first) {
                        self.0.bell.list_changed();
                    }
                    let mut events = self.events(response);
                    while let Some(Ok((event, held))) = events.next().await {
                        self.take(0, event.data.as_bytes(), held).await;
                    }
                }
                // The server has no such stream (405), or does not want us.
                Ok(Ok(response)) if !may_come_back(response.status()) => return None,
                Ok(Err(gone)) if gone.is_gone() => return Some(gone),
                _ => {}
            }
            if opened.elapsed() >= LISTEN_AGAIN.1 {
                delay = LISTEN_AGAIN.0;
            }
            sleep(delay).await;
            delay = (delay * 2).min(LISTEN_AGAIN.1);
        }
    }
}

/// A request that is under way; dropped before it is over, it tells an older server so. A newer one learns it from the
/// end of the connection (MCP 2026-07-28, cancellation).
struct Pending<'a> {
    wire: &'a HttpWire,
    id: u64,
    sent: bool,
    over: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let modern = self.wire.0.agreed.get().is_none_or(|agreed| agreed.modern);
        if self.sent && !self.over && !modern {
            let (wire, id) = (self.wire.clone(), self.id);
            self.wire.0.tracker.spawn(async move {
                let _ = wire.notify(message::cancelled(id).into(), Instant::now() + NOTICE_TIMEOUT).await;
            });
        }
    }
}

/// Whether a server that answered this may answer otherwise later.
fn may_come_back(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS)
}

/// What a status other than 2xx means for request `id`.
async fn refused(id: u64, in_session: bool, response: reqwest::Response, signer: Option<&Signer>) -> CallError {
    let status = response.status();
    let error = HttpError::of(&response, signer);
    // The sign-in is over, and nothing was done. Without one it may be that one call which is refused.
    if matches!(error, HttpError::SignIn(_)) && signer.is_some_and(Signer::has_signed) {
        return CallError::NotSent(error.into());
    }
    if matches!(error, HttpError::SignIn(_)) || status == StatusCode::TOO_MANY_REQUESTS {
        return CallError::Refused(error.into());
    }
    if matches!(error, HttpError::Status { retry_after: Some(_), .. }) && status.is_server_error() {
        return CallError::Lost(error.into());
    }
    let is_json = is_media_type(&response, JSON);
    let said = match body(response, MAX_ERROR_BODY, None).await {
        Ok(body) if is_json && status != StatusCode::FORBIDDEN => Refusal::read(&body),
        _ => None,
    };
    // It answers this very request: the tool may have run, whatever the status.
    if let Some(Refusal { id: Some(answered), error }) = &said
        && *answered == id
    {
        return CallError::Rpc(error.clone());
    }
    // Several servers answer 400 where the specification has 404 for a session they do not know (MCP 2025-11-25, session
    // management). The request is not taken then, and may be sent again.
    let about_the_session = said.as_ref().is_some_and(|said| said.error.message.to_lowercase().contains("session"));
    match (status, said) {
        (StatusCode::NOT_FOUND, _) if in_session => CallError::NotSent(Error::SessionExpired),
        (StatusCode::BAD_REQUEST, _) if in_session && about_the_session => CallError::NotSent(Error::SessionExpired),
        (_, Some(said)) => CallError::Rpc(said.error),
        (status, None) if status.is_client_error() || status.is_redirection() => CallError::Refused(error.into()),
        (_, None) => CallError::Lost(error.into()),
    }
}

/// A JSON-RPC error in the body of a refusal, and which request of ours it answers, if it says so.
struct Refusal {
    id: Option<u64>,
    error: RpcError,
}

impl Refusal {
    fn read(body: &[u8]) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Body {
            #[serde(default)]
            id: serde_json::Value,
            error: RpcError,
        }
        let Body { id, error } = serde_json::from_slice(body).ok()?;
        let id = id.as_u64().or_else(|| id.as_str()?.parse().ok());
        Some(Self { id, error })
    }
}

fn untaken(error: HttpError) -> CallError {
    match error {
        HttpError::Oversize(oversize) => CallError::Untaken(oversize),
        error => CallError::Lost(error.into()),
    }
}

/// Reads at most `max` bytes of a body, counted on `held`.
async fn body(response: reqwest::Response, max: usize, mut held: Option<&mut Held>) -> Result<BytesMut, HttpError> {
    if response.content_length().is_some_and(|length| length > max as u64) {
        return Err(Oversize::TooLarge(max).into());
    }
    let mut stream = response.bytes_stream();
    let mut body = BytesMut::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        if body.len() + chunk.len() > max {
            return Err(Oversize::TooLarge(max).into());
        }
        if let Some(held) = &mut held {
            held.resize(body.len() + chunk.len())?;
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
