//! The HTTP+SSE transport of MCP revision 2024-11-05: one GET stream brings everything, POSTs carry what we say.
//!
//! The end of the stream is the end of the session: a new stream would be a new session that knows of no handshake.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, Method, StatusCode};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::model::Remote;

use super::budget::{Held, Share};
use super::egress::{Destination, Trust};
use super::events::Events;
use super::exchange::{Answer, Exchange};
use super::message;
use super::oauth::Signer;
use super::remote::{
    EVENT_STREAM, HttpError, JSON, NOTICE_TIMEOUT, Replies, X_AGENT_ID, is_media_type, read_over, send, unsigned_fields,
};
use super::session::{Ask, CallError, Context};
use super::watch::Bell;
use super::{AgentId, Error, traced};

/// One session with one server.
#[derive(Clone)]
pub struct SseWire(Arc<Shared>);

struct Shared {
    fields: HeaderMap,
    signer: Option<Signer>,
    endpoint: Destination,
    exchange: Arc<Exchange>,
    replies: Replies,
    tracker: TaskTracker,
    bell: Bell,
    /// The session is to end, or has.
    end: CancellationToken,
}

impl SseWire {
    /// Opens the stream, waits for the `endpoint` event until `deadline`, and reads on in a task until `end`, which it
    /// brings about when the stream ends.
    ///
    /// # Errors
    /// [`Error::Http`] when the stream cannot be had, [`Error::Endpoint`] when its first event names no address of the
    /// same origin, [`Error::HandshakeTimeout`].
    pub async fn open(
        remote: &Remote,
        signer: Option<Signer>,
        context: &Context,
        share: Arc<Share>,
        bell: Bell,
        end: CancellationToken,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let fields = unsigned_fields(remote, signer.as_ref())?;
        let server = context.egress.to(&remote.server_url, Trust::Configured).await?;
        let request = server.request(Method::GET).headers(fields.clone()).header(ACCEPT, EVENT_STREAM);
        let opening = async {
            let response = send(signer.as_ref(), request, |_| {}).await?;
            if response.status() != StatusCode::OK {
                return Err(Error::Http(HttpError::of(&response, signer.as_ref())));
            }
            if !is_media_type(&response, EVENT_STREAM) {
                return Err(HttpError::ContentType.into());
            }
            let max = context.settings.max_message_bytes;
            let mut events = Events::new(response.bytes_stream(), max, Held::nothing(&share));
            loop {
                let (event, _) = events.next().await.ok_or(Error::Closed)??;
                if event.name == "endpoint" {
                    return Ok((server.beside(&event.data).ok_or(Error::Endpoint)?, events));
                }
            }
        };
        let (endpoint, events) =
            timeout_at(deadline, opening).await.map_err(|_| Error::HandshakeTimeout { stderr: None })??;
        let wire = Self(Arc::new(Shared {
            fields,
            signer,
            endpoint,
            exchange: Arc::default(),
            replies: Replies::new(context.tracker.clone()),
            tracker: context.tracker.clone(),
            bell,
            end,
        }));
        context.tracker.spawn(wire.clone().read(events));
        Ok(wire)
    }

    /// Sends a request and waits for its answer until `deadline`.
    pub async fn request(&self, ask: &Ask<'_>, deadline: Instant) -> Result<Answer, CallError> {
        let mut waiting = self.0.exchange.open().map_err(CallError::NotSent)?;
        let id = waiting.id;
        let mut post = self.post(message::request(id, ask.method, ask.params).into());
        if let Some(AgentId(agent)) = ask.agent {
            post = post.header(X_AGENT_ID, agent);
        }
        for (name, value) in traced::fields(ask.trace, &self.0.fields) {
            post = post.header(name, value);
        }
        let mut pending = Pending { wire: self, id, over: false };
        let mut posting = Box::pin(self.clone().send(post));
        let exchanging = async {
            tokio::select! {
                reply = waiting.reply() => {
                    // The answer was there before the server was done with accepting the question: the connection is of
                    // use again only when that has been read.
                    self.0.tracker.spawn(timeout_at(Instant::now() + NOTICE_TIMEOUT, posting));
                    return Ok(reply);
                }
                posted = &mut posting => match posted {
                    Ok(()) => {}
                    Err(error) if error.is_unsent() => return Err(CallError::NotSent(error.into())),
                    // The sign-in is over, and nothing was done.
                    Err(error @ HttpError::SignIn(_)) if self.0.signer.as_ref().is_some_and(Signer::has_signed) => {
                        return Err(CallError::NotSent(error.into()));
                    }
                    Err(HttpError::Status { status, retry_after }) if status.is_server_error() => {
                        return Err(CallError::Lost(HttpError::Status { status, retry_after }.into()));
                    }
                    Err(error @ (HttpError::Status { .. } | HttpError::SignIn(_))) => {
                        return Err(CallError::Refused(error.into()));
                    }
                    Err(error) => return Err(CallError::Lost(error.into())),
                },
            }
            Ok(waiting.reply().await)
        };
        let Ok(reply) = timeout_at(deadline, exchanging).await else { return Err(CallError::TimedOut) };
        pending.over = true;
        reply?.into_result()
    }

    /// Sends what has no answer.
    pub async fn notify(&self, body: Bytes, deadline: Instant) -> Result<(), HttpError> {
        timeout_at(deadline, self.clone().send(self.post(body))).await.unwrap_or(Err(HttpError::TimedOut))
    }

    /// Why the session has ended, once it has.
    pub fn ended(&self) -> Option<Error> {
        self.0.exchange.ended()
    }

    fn post(&self, body: Bytes) -> reqwest::RequestBuilder {
        let shared = &self.0;
        let request = shared.endpoint.request(Method::POST).headers(shared.fields.clone());
        request.header(CONTENT_TYPE, JSON).body(body)
    }

    async fn send(self, request: reqwest::RequestBuilder) -> Result<(), HttpError> {
        let signer = self.0.signer.as_ref();
        let response = send(signer, request, |_| {}).await?;
        if !response.status().is_success() {
            return Err(HttpError::of(&response, signer));
        }
        read_over(response).await;
        Ok(())
    }

    async fn read(self, mut events: Events) {
        let reason = self.0.end.run_until_cancelled(self.read_events(&mut events)).await;
        self.0.exchange.end(&reason.unwrap_or(Error::Closed));
        self.0.bell.ended();
        self.0.end.cancel();
    }

    async fn read_events(&self, events: &mut Events) -> Error {
        loop {
            let (event, held) = match events.next().await {
                Some(Ok(event)) => event,
                Some(Err(HttpError::Oversize(oversize))) => {
                    // The stream cannot be read on from the middle of an event.
                    self.0.exchange.fail_the_only(oversize);
                    return Error::Oversize(oversize);
                }
                Some(Err(error)) => return error.into(),
                None => return Error::Closed,
            };
            if !matches!(&*event.name, "" | "message") {
                continue;
            }
            for (id, method) in self.0.exchange.receive(event.data.as_bytes(), held, &self.0.bell) {
                let (wire, body) = (self.clone(), message::reply(&id, &method));
                let sending = async move {
                    let answered = wire.notify(body.into(), Instant::now() + NOTICE_TIMEOUT).await;
                    // It asks and takes no answer: what it wrote behind its requests would not be read for long.
                    if matches!(answered, Err(HttpError::TimedOut)) {
                        wire.0.exchange.end(&Error::NotReading);
                        wire.0.end.cancel();
                    }
                };
                self.0.replies.send(sending).await;
            }
        }
    }
}

/// A request that is under way; dropped before it is over, it tells the server so.
struct Pending<'a> {
    wire: &'a SseWire,
    id: u64,
    over: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let (wire, id) = (self.wire.clone(), self.id);
        self.wire.0.tracker.spawn(async move {
            let _ = wire.notify(message::cancelled(id).into(), Instant::now() + NOTICE_TIMEOUT).await;
        });
    }
}
