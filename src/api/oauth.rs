//! Sign-in to MCP servers: a connect and what it tells, where authorization servers send the browser back to, and the
//! document that says who Portolan is (CONTRACT row 24).

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, REFERRER_POLICY, VARY};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::unfold;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

use crate::app::App;
use crate::error::Error;
use crate::mcp::{ConnectEvent, SignInError, Subject, Variables};

use super::access::Caller;
use super::guard::{ServerId, SessionId};
use super::page;
use super::variables::Given;
use super::wire::{frame, masked_url};

/// How long a stream may be silent: proxies give up on an idle connection after a minute, some after half of one.
const PING_EVERY: Duration = Duration::from_secs(15);
const PING: Bytes = Bytes::from_static(b": ping\n\n");

/// Proxies that gather an answer before they send it on leave this one alone.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

pub async fn connect(
    State(app): State<App>,
    ServerId(id): ServerId,
    caller: Caller,
    Given(given): Given,
    method: Method,
) -> Result<Response, Error> {
    let server = app.store.server(&id).await?.ok_or(Error::NoServer)?;
    // HEAD asks what a GET would be answered with, and starts nothing (RFC 9110, 9.3.2).
    if method == Method::HEAD {
        return Ok(streaming(Body::empty()));
    }
    Ok(stream(&app, Subject::Registered(server), &caller, given))
}

/// Connects, and tells of it as it happens. Whoever drops the answer ends the connecting, and so does a stop of Portolan,
/// which ends all event streams.
pub(super) fn stream(app: &App, subject: Subject, caller: &Caller, given: Variables) -> Response {
    let redirect_uri = app.settings.upstream.sign_in.redirect_uri();
    let events = app.mcp.connect(subject, redirect_uri, &caller.by(), given);
    streaming(Body::from_stream(frames(events, PING_EVERY)))
}

fn streaming(body: Body) -> Response {
    const HEAD: [(HeaderName, &str); 3] =
        [(CONTENT_TYPE, "text/event-stream; charset=utf-8"), (CACHE_CONTROL, "no-store"), (X_ACCEL_BUFFERING, "no")];
    (HEAD, body).into_response()
}

/// The frames of a connect, with a comment after each time without one.
fn frames(events: Receiver<ConnectEvent>, ping_every: Duration) -> impl Stream<Item = Result<Bytes, Infallible>> {
    unfold(events, move |mut events| async move {
        let bytes = match timeout(ping_every, events.recv()).await {
            Ok(event) => frame(&event?),
            Err(_) => PING,
        };
        Some((Ok(bytes), events))
    })
}

/// What an authorization server sends the browser with (RFC 6749, 4.1.2; RFC 9207).
#[derive(Deserialize)]
pub struct Brought {
    state: Option<String>,
    code: Option<String>,
    error: Option<String>,
    error_description: Option<String>,
    iss: Option<String>,
}

type BroughtQuery = Result<Query<Brought>, QueryRejection>;

/// As [`callback`], on the path that Letta had before 0.16.4. What counts is the state.
pub async fn callback_of_session(
    _: SessionId,
    app: State<App>,
    method: Method,
    headers: HeaderMap,
    brought: BroughtQuery,
) -> Response {
    callback(app, method, headers, brought).await
}

/// The browser of whoever signed in, or a program that was told where it came to. Who holds the state may finish the sign-in.
pub async fn callback(State(app): State<App>, method: Method, headers: HeaderMap, brought: BroughtQuery) -> Response {
    // A link is looked at with HEAD before somebody follows it: the code is good once.
    let outcome = match (method, brought) {
        (Method::HEAD, _) => Err(SignInError::MissingState),
        (_, Err(_)) => Err(SignInError::Failed("the parameters cannot be read".to_owned())),
        (_, Ok(Query(brought))) => finish(&app, brought).await,
    };
    let mut response = match page::is_preferred(&headers) {
        true => as_page(&outcome),
        false => as_json(&outcome),
    };
    let headers = response.headers_mut();
    // The query of this page is in the history of the browser: it goes no further.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(VARY, HeaderValue::from_static("accept"));
    response
}

async fn finish(app: &App, brought: Brought) -> Result<String, SignInError> {
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let (state, code, iss) = (given(brought.state), given(brought.code), given(brought.iss));
    let error = given(brought.error);
    let answer = match &error {
        Some(error) => Err((error.as_str(), brought.error_description.as_deref())),
        None => Ok(code.as_deref().unwrap_or_default()),
    };
    app.mcp.finish_sign_in(state.as_deref(), answer, iss.as_deref()).await
}

fn as_json(outcome: &Result<String, SignInError>) -> Response {
    let body = match outcome {
        Ok(server_url) => json!({
            "status": "success", "message": "Authorization successful", "server_url": masked_url(server_url),
        }),
        Err(error) => json!({ "status": "error", "message": error.to_string() }),
    };
    Json(body).into_response()
}

fn as_page(outcome: &Result<String, SignInError>) -> Response {
    match outcome {
        Ok(server_url) => {
            let server = format!("Portolan may now use {} on your behalf.", masked_url(server_url));
            page::page("Signed in", &[&server, "You can close this page."])
        }
        Err(error) => {
            let reason = format!("{error}.");
            page::page("Not signed in", &[&reason, "Connect the server again to get a new link."])
        }
    }
}

/// Who Portolan is, for authorization servers that know their clients by such documents (MCP 2025-11-25, Client ID
/// Metadata Documents), which have https URLs alone.
pub async fn client_metadata(State(app): State<App>) -> Result<Response, Error> {
    let settings = &app.settings.upstream.sign_in;
    let both = settings.client_metadata_url().zip(settings.redirect_uri());
    let (client_id, redirect_uri) = both.ok_or(Error::NoRoute)?;
    let document = json!({
        "client_id": client_id,
        "client_name": "Portolan",
        "application_type": "web",
        "redirect_uris": [redirect_uri],
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
        "token_endpoint_auth_method": "none",
    });
    Ok(Json(document).into_response())
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use tokio::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn a_silent_stream_is_kept_open_and_ends_with_its_events() {
        let (sender, events) = channel(1);
        let mut frames = Box::pin(frames(events, Duration::from_millis(1)));
        for _ in 0..2 {
            assert_eq!(frames.next().await, Some(Ok(PING)));
        }
        sender.send(ConnectEvent::WaitingForAuth).await.expect("somebody listens");
        let told = loop {
            match frames.next().await {
                Some(Ok(frame)) if frame == PING => {}
                other => break other,
            }
        };
        assert_eq!(told, Some(Ok(frame(&ConnectEvent::WaitingForAuth))));
        drop(sender);
        while let Some(Ok(frame)) = frames.next().await {
            assert_eq!(frame, PING);
        }
    }
}
