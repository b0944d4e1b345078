//! The way in: accepts HTTP/1.1 connections, hands their requests to the router, and drains with a deadline.
//!
//! Nobody holds it up for ever. Each wait for a client has its limit (`connections`), no buffer of a connection grows
//! beyond [`MAX_BUFFER`], and when `--max-connections` are open, those that wait longest for their clients make room
//! for the next. A request that is above `--max-requests` reaches the router marked as [`Full`], its body unread; one
//! that is so when its body has come meets the mark at the body's end.

mod connections;
mod stream;

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::header::{CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderValue, Request, Response};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::config::Entry;

use connections::{Connection, Connections, Guest, TICK};
use stream::{Answer, Arriving, Stream};

/// The most bytes that the line and the fields of a request may have; hyper's own limit on their number is 100. Beyond
/// either, hyper answers 431 (RFC 6585, 5).
const MAX_HEADER: usize = 32 * 1024;
/// The most bytes of a request, and about the most of an answer, that a connection holds.
const MAX_BUFFER: usize = 64 * 1024;
/// The most bytes of an answer that the kernel holds for a client that does not read; it doubles the number for its own
/// needs. Without it, it would be megabytes a client. It reports room in steps of a third of this: a client that reads
/// some kilobytes a second makes progress that `--write-timeout` sees.
const SEND_BUFFER: usize = 128 * 1024;
/// How long to wait before accepting again when the system has no room: twice as long each time, up to the second.
const ACCEPT_PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// How often at most to say that nobody can be accepted.
const ACCEPT_COMPLAINTS: Duration = Duration::from_secs(1);

/// Marks a request, among its extensions or as the end of its body, that is one more than may be in flight: nothing may
/// be done for it but to say so, or what costs nothing. If it is marked at once, its body is not read.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("as many requests as may be are in flight")]
pub struct Full;

/// The address that a connection comes from, among the extensions of its requests: a client's, or a proxy's.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// How many requests are in flight, and how many connections open.
#[derive(Debug, Default)]
pub struct Load {
    requests: AtomicUsize,
    connections: AtomicUsize,
}

impl Load {
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

/// Answers requests on `listener` with `router` until `shutdown`. Then it takes no new connection, closes the idle ones,
/// ends event streams, lets each other request finish, and returns when all have, or when the drain time has passed.
/// What it has to do at the moment is told in `load`.
pub async fn serve(listener: TcpListener, router: Router, entry: &Entry, load: Arc<Load>, shutdown: CancellationToken) {
    let connections = Connections::new(entry, load, shutdown.clone());
    let tasks = TaskTracker::new();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut shortage = Shortage::default();
    // Accepted, but not let in: every place is taken, and all are Portolan's turn.
    let mut door: Option<(TcpStream, Peer)> = None;
    loop {
        tokio::select! {
            accepted = listener.accept(), if door.is_none() && shortage.until.is_none() => match accepted {
                Ok((stream, address)) => {
                    shortage.pause = Duration::ZERO;
                    door = Some((stream, Peer(address.ip())));
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    shortage.meet(&error);
                    // Sockets of ours are part of what there is too little of.
                    connections.cut_longest_waiting();
                }
            },
            () = sleep_until(shortage.until.unwrap_or_else(Instant::now)), if shortage.until.is_some() => {
                shortage.until = None;
            }
            () = connections.room_told(), if door.is_some() => {}
            _ = ticks.tick(), if !connections.are_none() => connections.sweep(),
            () = shutdown.cancelled() => break,
        }
        if door.is_some()
            && connections.ensure_room()
            && let Some((stream, peer)) = door.take()
        {
            connections.add(&tasks, |guest| connection(stream, peer, guest, router.clone(), shutdown.clone()));
        }
    }
    drop((listener, door));
    tasks.close();
    tracing::info!(connections = tasks.len(), "stopping: finishing the requests that are under way");
    connections.drain();
    let end = Instant::now() + entry.drain_timeout;
    loop {
        tokio::select! {
            () = tasks.wait() => break,
            _ = ticks.tick() => connections.sweep(),
            () = sleep_until(end) => {
                tracing::warn!(connections = tasks.len(), "drain time is over: cutting connections");
                connections.cut_all();
                tasks.wait().await;
                break;
            }
        }
    }
}

/// A lack of file descriptors or of memory, which accepting again at once would only meet again.
#[derive(Default)]
struct Shortage {
    pause: Duration,
    until: Option<Instant>,
    complained: Option<Instant>,
}

impl Shortage {
    fn meet(&mut self, error: &io::Error) {
        let (first, longest) = ACCEPT_PAUSES;
        let now = Instant::now();
        self.pause = (self.pause * 2).clamp(first, longest);
        self.until = Some(now + self.pause);
        if self.complained.is_none_or(|last| now - last >= ACCEPT_COMPLAINTS) {
            self.complained = Some(now);
            tracing::warn!(%error, "cannot accept a connection");
        }
    }
}

/// Whether the next connection may be fine: accept(2) also reports what went wrong with the one it took.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
            | PermissionDenied
            | TimedOut
    )
}

async fn connection(stream: TcpStream, peer: Peer, guest: Guest, router: Router, shutdown: CancellationToken) {
    // Best effort: without the first answers are only later, without the second they may take more memory.
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER);
    let connection = guest.connection();
    let service = service_fn(|request| answer(connection.clone(), peer, router.clone(), request));
    let mut serving = pin!(
        http1::Builder::new()
            // The limits of `connections` are finer.
            .header_read_timeout(None)
            .max_header_size(MAX_HEADER)
            .max_buf_size(MAX_BUFFER)
            .serve_connection(TokioIo::new(Stream::new(stream, connection.clone())), service)
    );
    let result = tokio::select! {
        result = &mut serving => result,
        () = shutdown.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

async fn answer(
    connection: Arc<Connection>,
    peer: Peer,
    router: Router,
    request: Request<Incoming>,
) -> Result<Response<Answer>, Infallible> {
    let whole = request.body().is_end_stream();
    if !connection.begin(whole) {
        // It was cut before this request began; the end of its task is on the way.
        std::future::pending::<()>().await;
    }
    let mut request =
        request.map(|body| if whole { Body::empty() } else { Body::new(Arriving::new(body, connection.clone())) });
    request.extensions_mut().insert(peer);
    if !connection.try_admit() {
        request.extensions_mut().insert(Full);
    }
    let mut response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
    if connection.leaves_unread() {
        // The rest of the request stands where the next one would.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let streams_events = response.headers().get(CONTENT_TYPE).is_some_and(|kind| {
        kind.as_bytes().get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
    });
    Ok(response.map(|body| Answer::new(body, connection, streams_events)))
}
