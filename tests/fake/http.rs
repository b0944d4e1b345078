//! Streamable HTTP, with sessions up to 2025-11-25 and without from 2026-07-28, on every path that ends in `/mcp`.
#![expect(clippy::result_large_err, reason = "a refusal is a response like any other")]

use std::{net::SocketAddr, sync::Arc};

use ::http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts};
use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    response::Response,
};
use futures_util::StreamExt;
use serde_json::{Value, value::RawValue};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    Fake, Running, Session, Shared,
    act::{self, Piece, Scene},
    answer::{Message, Origin, Reply, error, unsupported},
    anywhere, locked,
    script::{MODERN, PostReply, Script, Stage},
    sse,
};

const SESSION: &str = "mcp-session-id";
const HEADER_MISMATCH: i64 = -32020;
const BODY_LIMIT: usize = 256 << 20;

/// Listens on any free port.
pub(crate) fn serve(fake: Arc<Fake>) -> Running {
    serve_on(anywhere(), fake)
}

/// Listens on this address, as after a restart.
pub(crate) fn serve_on(addr: SocketAddr, fake: Arc<Fake>) -> Running {
    Running::start(addr, "mcp", fake, answer)
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let script = shared.fake.script();
    let (head, body) = match receive(&shared, &script, request).await {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    if !head.uri.path().ends_with("/mcp") {
        return plain(StatusCode::NOT_FOUND);
    }
    let answer = match head.method {
        Method::POST => post(&shared, &script, &head, &body).await,
        Method::GET if script.acts.contains_key(&Stage::Open) => Ok(played(&shared, &script, Stage::Open).await),
        Method::DELETE if script.acts.contains_key(&Stage::Close) => Ok(played(&shared, &script, Stage::Close).await),
        Method::GET if script.get_stream || script.get_ends => get(&shared, &script, &head),
        Method::DELETE => session(&shared, &script, &head).map(|id| {
            locked(&shared.sessions).remove(id);
            plain(StatusCode::OK)
        }),
        _ => Err(plain(StatusCode::METHOD_NOT_ALLOWED)),
    };
    answer.unwrap_or_else(|refusal| refusal)
}

/// What the script has for a request without a message.
async fn played(shared: &Shared, script: &Script, stage: Stage) -> Response {
    match shared.fake.act(stage) {
        Some(act) => act::response(Scene::new(&shared.fake, act, None, None), script).await,
        None => plain(StatusCode::METHOD_NOT_ALLOWED),
    }
}

/// Reads and notes a request; the refusals that both HTTP transports make.
pub(super) async fn receive(shared: &Shared, script: &Script, request: Request) -> Result<(Parts, Bytes), Response> {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, BODY_LIMIT).await.map_err(|_| plain(StatusCode::PAYLOAD_TOO_LARGE))?;
    shared.saw(&head, &body);
    if let Some(guard) = shared.fake.guard.get()
        && let Some(refusal) = guard.answer(shared.addr, &head, &body).await
    {
        return Err(refusal);
    }
    if let Some((name, value)) = &script.require_header
        && header(&head.headers, name) != Some(value)
    {
        return Err(with(plain(StatusCode::UNAUTHORIZED), header::WWW_AUTHENTICATE, &script.www_authenticate));
    }
    // A relative one is an address here, which is not sent on again.
    if let Some(to) = script.redirect.as_deref().filter(|to| *to != head.uri.path()) {
        return Err(with(plain(StatusCode::TEMPORARY_REDIRECT), header::LOCATION, to));
    }
    let status = match head.method {
        Method::POST => script.status,
        Method::GET => script.get_status,
        _ => None,
    };
    match status {
        Some(status) => Err(plain(StatusCode::from_u16(status).expect("the script names an HTTP status"))),
        None => Ok((head, body)),
    }
}

/// The session a request belongs to; empty where there are none.
fn session<'a>(shared: &Shared, script: &Script, head: &'a Parts) -> Result<&'a str, Response> {
    match header(&head.headers, SESSION) {
        id if !script.sessions => Ok(id.unwrap_or_default()),
        None => {
            Err(json(StatusCode::BAD_REQUEST, error("null", -32000, "Bad Request: Mcp-Session-Id header is required")))
        }
        Some(id) if locked(&shared.sessions).contains_key(id) => Ok(id),
        Some(_) => Err(json(StatusCode::NOT_FOUND, error("null", -32001, "Session not found"))),
    }
}

fn get(shared: &Shared, script: &Script, head: &Parts) -> Result<Response, Response> {
    let id = session(shared, script, head)?;
    if script.get_ends {
        return Ok(sse::response("retry: 0\n\n".into()));
    }
    let (events, receiver) = mpsc::unbounded_channel();
    let mut sessions = locked(&shared.sessions);
    sessions.entry(id.to_owned()).or_insert_with(|| Session { path: String::new(), events: None }).events =
        Some(events);
    Ok(sse::response(sse::body(script, sse::stream(receiver))))
}

async fn post(shared: &Arc<Shared>, script: &Script, head: &Parts, body: &[u8]) -> Result<Response, Response> {
    let message = Message::parse(body).map_err(|error| json(StatusCode::BAD_REQUEST, error))?;
    let id = message.request();
    let revision = header(&head.headers, "mcp-protocol-version");
    let initialize = message.method == "initialize";
    let refuse = |code, reason: &str| json(StatusCode::BAD_REQUEST, error(id.unwrap_or("null"), code, reason));

    let modern = script.speaks(MODERN)
        && (script.modern_only()
            || revision == Some(MODERN)
            || message.method == "server/discover"
            || message.meta().revision == MODERN);
    if let Some(revision) = revision.filter(|revision| !initialize && !script.speaks(revision)) {
        if script.speaks(MODERN) {
            return Err(json(StatusCode::BAD_REQUEST, unsupported(id.unwrap_or("null"), script, revision)));
        }
        if message.method != "server/discover" {
            return Err(refuse(-32000, "Bad Request: Unsupported protocol version"));
        }
    }
    let mut opened = None;
    let session = if modern {
        if id.is_some() && !initialize {
            check_headers(script, &head.headers, revision, &message)
                .map_err(|reason| refuse(HEADER_MISMATCH, &reason))?;
        }
        ""
    } else if message.method == "server/discover" && !script.ignore_unknown {
        let status = StatusCode::from_u16(script.discover_http_status).expect("the script names an HTTP status");
        return Err(json(status, error(id.unwrap_or("null"), -32601, "Method not found: server/discover")));
    } else if message.method == "server/discover" || initialize && !script.sessions {
        ""
    } else if initialize {
        &*opened.insert(Uuid::new_v4().to_string())
    } else {
        session(shared, script, head)?
    };

    let reply = shared.fake.handle(&message, &Origin { session, headers: Some(&head.headers) });
    if let (Some(id), Reply::Now(_) | Reply::Act(_)) = (&opened, &reply) {
        locked(&shared.sessions).insert(id.clone(), Session { path: String::new(), events: None });
    }
    let mut response = match reply {
        Reply::Nothing => plain(StatusCode::ACCEPTED),
        Reply::Gone => shared.cut(),
        Reply::Act(scene)
            if id.is_none() && scene.act.status.is_none() && scene.act.steps.is_empty() && !scene.act.hold =>
        {
            plain(StatusCode::ACCEPTED)
        }
        Reply::Act(scene) => act::response(scene, script).await,
        Reply::Refused(code, text) if modern => json(status_of(code), text),
        Reply::Now(text) | Reply::Refused(_, text) => written(script, text),
        Reply::Last(text) => {
            shared.fade();
            written(script, text)
        }
        // A subscription is a stream in any case.
        Reply::Later(messages) if script.reply == PostReply::Sse || message.method == "subscriptions/listen" => {
            let framed = script.clone();
            let events = messages.map(move |message| Piece::from(sse::event(&framed, "message", &message)));
            sse::response(sse::body(script, events))
        }
        Reply::Later(messages) => match messages.fold(None, async |_, message| Some(message)).await {
            Some(answer) => json(StatusCode::OK, answer),
            None => plain(StatusCode::ACCEPTED),
        },
    };
    if let Some(id) = &opened {
        response = with(response, header::HeaderName::from_static(SESSION), id);
    }
    Ok(response)
}

fn written(script: &Script, text: String) -> Response {
    match script.reply {
        PostReply::Json => json(StatusCode::OK, text),
        PostReply::Sse => {
            let event = sse::event(script, "message", &text);
            sse::response(if script.chunk == 0 { event.into() } else { sse::body(script, sse::once(event)) })
        }
    }
}

/// 2026-07-28: which HTTP status an error has.
fn status_of(code: i64) -> StatusCode {
    match code {
        -32601 => StatusCode::NOT_FOUND,
        -32022..=-32020 => StatusCode::BAD_REQUEST,
        _ => StatusCode::OK,
    }
}

/// 2026-07-28: the headers must repeat what the body says.
fn check_headers(
    script: &Script,
    headers: &HeaderMap,
    revision: Option<&str>,
    message: &Message<'_>,
) -> Result<(), String> {
    let meta = message.meta();
    if revision != Some(&*meta.revision) {
        return Err(format!("MCP-Protocol-Version {revision:?} does not match _meta {:?}", meta.revision));
    }
    check(headers, "Mcp-Method", Some(&message.method))?;
    if message.method != "tools/call" {
        return Ok(());
    }
    let params = &message.params;
    check(headers, "Mcp-Name", Some(&params.name))?;
    let Some(tool) = script.tool(&params.name) else { return Ok(()) };
    let arguments = params.arguments.map_or("null", RawValue::get);
    let arguments: Value = serde_json::from_str(arguments).unwrap_or_default();
    check_arguments(headers, &tool["inputSchema"], &arguments)
}

fn check_arguments(headers: &HeaderMap, schema: &Value, arguments: &Value) -> Result<(), String> {
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(annotation) = schema["x-mcp-header"].as_str() {
            let value = match &arguments[name] {
                Value::String(text) => Some(text.clone()),
                value @ (Value::Bool(_) | Value::Number(_)) => Some(value.to_string()),
                _ => None,
            };
            check(headers, &format!("Mcp-Param-{annotation}"), value.as_deref())?;
        }
        check_arguments(headers, schema, &arguments[name])?;
    }
    Ok(())
}

fn check(headers: &HeaderMap, name: &str, body: Option<&str>) -> Result<(), String> {
    let decoded = header(headers, name).map(|value| match value.strip_prefix("=?base64?") {
        Some(value) => from_base64(value.trim_end_matches("?=")),
        None => Some(value.into()),
    });
    match (decoded, body) {
        (None, None) => Ok(()),
        (Some(Some(header)), Some(body)) if header == body => Ok(()),
        (header, body) => Err(format!("{name} header {header:?} does not match body {body:?}")),
    }
}

fn from_base64(text: &str) -> Option<String> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut held, mut bytes) = (0_usize, 0, Vec::new());
    for byte in text.trim_end_matches('=').bytes() {
        bits = (bits << 6 | DIGITS.iter().position(|digit| *digit == byte)?) & 0xffff;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff).ok()?);
        }
    }
    String::from_utf8(bytes).ok()
}

pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

pub(super) fn plain(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

pub(super) fn json(status: StatusCode, text: String) -> Response {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(super) fn with(mut response: Response, name: header::HeaderName, value: &str) -> Response {
    response.headers_mut().insert(name, value.parse().expect("the script's headers are well-formed"));
    response
}
