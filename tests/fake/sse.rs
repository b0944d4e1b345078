//! HTTP+SSE, the transport of 2024-11-05: GET on a path that ends in `/sse` opens a session and names the path its messages are
//! posted to; the answers come on the stream. The session ends with the stream. Also the framing of events for `http`.

use std::{io, net::SocketAddr, sync::Arc};

use ::http::{HeaderValue, Method, StatusCode, header, request::Parts};
use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    response::Response,
};
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use uuid::Uuid;

use super::{
    Fake, Running, Session, Shared,
    act::{self, Piece, Pieces, Scene},
    answer::{Message, Origin, Reply},
    anywhere,
    http::{json, plain, receive},
    locked,
    script::{Act, LineEnd, Script, Stage},
};

/// Listens on any free port.
pub(crate) fn serve(fake: Arc<Fake>) -> Running {
    serve_on(anywhere(), fake)
}

/// Listens on this address, as after a restart.
pub(crate) fn serve_on(addr: SocketAddr, fake: Arc<Fake>) -> Running {
    Running::start(addr, "sse", fake, answer)
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let script = shared.fake.script();
    let (head, body) = match receive(&shared, &script, request).await {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    match (&head.method, head.uri.path()) {
        (&Method::GET, path) if path.ends_with("/sse") => open(&shared, &script, path).await,
        (&Method::POST, path) if path.ends_with("/messages") => post(&shared, &script, &head, &body).await,
        (_, path) if path.ends_with("/sse") || path.ends_with("/messages") => plain(StatusCode::METHOD_NOT_ALLOWED),
        _ => plain(StatusCode::NOT_FOUND),
    }
}

async fn open(shared: &Arc<Shared>, script: &Script, path: &str) -> Response {
    struct Open(Arc<Shared>, String);
    impl Drop for Open {
        fn drop(&mut self) {
            locked(&self.0.sessions).remove(&self.1);
            self.0.fake.abandon(&self.1);
        }
    }
    let id = Uuid::new_v4().to_string();
    let base = path.strip_suffix("sse").unwrap_or_default();
    let (path, endpoint) = match &*script.endpoint {
        "relative" => (format!("{base}messages"), format!("messages?session_id={id}")),
        "root" => ("/messages".into(), format!("/messages?session_id={id}")),
        "absolute" => ("/messages".into(), format!("http://{}/messages?session_id={id}", shared.addr)),
        literal => (String::new(), literal.into()),
    };
    let (events, receiver) = mpsc::unbounded_channel();
    let endpoint = event(script, "endpoint", &endpoint);
    let mut head = plain(StatusCode::OK);
    match shared.fake.act(Stage::Open) {
        Some(act) if act.hold => return std::future::pending().await,
        Some(act) => {
            head = act::head(&act, "text/event-stream");
            let usual = Box::pin(stream::iter([endpoint]));
            let scene = Scene::new(&shared.fake, act, None, Some(usual));
            let _receiver_is_here = events.send(scene.pieces(|text| text.to_owned()));
        }
        None => drop(events.send(act::text(endpoint))),
    }
    if head.status() != StatusCode::OK {
        return head;
    }
    locked(&shared.sessions).insert(id.clone(), Session { path, events: Some(events) });
    let open = Open(shared.clone(), id);
    let events = stream(receiver).inspect(move |_| {
        let _held_as_long_as_the_stream = &open;
    });
    let mut response = response(body(script, events));
    response.headers_mut().extend(std::mem::take(head.headers_mut()));
    response
}

async fn post(shared: &Arc<Shared>, script: &Script, head: &Parts, body: &[u8]) -> Response {
    let query = head.uri.query().unwrap_or_default();
    let id = query.split('&').find_map(|pair| pair.strip_prefix("session_id=")).unwrap_or_default();
    let events = match locked(&shared.sessions).get(id) {
        Some(Session { path, events }) if path.is_empty() || path == head.uri.path() => events.clone(),
        _ => None,
    };
    let Some(events) = events else { return plain(StatusCode::NOT_FOUND) };
    let message = match Message::parse(body) {
        Ok(message) => message,
        Err(error) => return json(StatusCode::BAD_REQUEST, error),
    };
    match shared.fake.handle(&message, &Origin { session: id, headers: Some(&head.headers) }) {
        Reply::Nothing => {}
        Reply::Now(text) | Reply::Refused(_, text) => {
            let _hung_up = events.send(act::text(event(script, "message", &text)));
        }
        Reply::Last(text) => {
            let _hung_up = events.send(act::text(event(script, "message", &text)));
            shared.fade();
        }
        Reply::Later(mut messages) => {
            let script = script.clone();
            // Not the sender itself: the session's must be the last, so that dropping it ends the stream.
            let events = events.downgrade();
            tokio::spawn(async move {
                while let Some(message) = messages.next().await {
                    let Some(events) = events.upgrade() else { return };
                    let _hung_up = events.send(act::text(event(&script, "message", &message)));
                }
            });
        }
        Reply::Act(scene) => {
            let (act, script) = (scene.act.clone(), script.clone());
            let _hung_up = events.send(scene.pieces(move |text| event(&script, "message", text)));
            drop(events);
            if act.hold {
                std::future::pending::<()>().await;
            }
            return act::head(&Act { status: Some(act.status.unwrap_or(202)), ..act }, "");
        }
        Reply::Gone => {
            locked(&shared.sessions).remove(id);
            drop(events);
            shared.cut()
        }
    }
    plain(StatusCode::ACCEPTED)
}

/// One event as it goes over the wire.
pub(super) fn event(script: &Script, name: &str, data: &str) -> String {
    let mut text = String::with_capacity(data.len() + 40);
    if script.comments {
        text.push_str(": ping\n\n");
    }
    for part in ["event: ", name, "\ndata: ", data, "\n\n"] {
        text.push_str(part);
    }
    match script.line_end {
        LineEnd::Lf => text,
        LineEnd::Cr => text.replace('\n', "\r"),
        LineEnd::CrLf => text.replace('\n', "\r\n"),
    }
}

pub(super) fn stream(mut events: UnboundedReceiver<Pieces>) -> impl Stream<Item = Piece> + Send {
    stream::poll_fn(move |context| events.poll_recv(context)).flatten()
}

pub(super) fn once(event: String) -> impl Stream<Item = Piece> + Send {
    stream::iter([event.into()])
}

/// The events in chunks of the script's size.
pub(super) fn body(script: &Script, events: impl Stream<Item = Piece> + Send + 'static) -> Body {
    let size = script.chunk;
    let events = events.then(Piece::take);
    if size == 0 {
        return Body::from_stream(events);
    }
    Body::from_stream(events.flat_map(move |event| {
        let event = event.unwrap_or_default();
        let pieces = (0..event.len()).step_by(size).map(move |at| event.slice(at..event.len().min(at + size)));
        stream::iter(pieces).then(async |piece: Bytes| {
            // A pause after each, else they leave in one write.
            tokio::task::yield_now().await;
            Ok::<_, io::Error>(piece)
        })
    }))
}

pub(super) fn response(body: Body) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
