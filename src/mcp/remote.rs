//! What both HTTP transports have in common: header fields, reasons, and the answers to a server's own requests.

use std::sync::Arc;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::model::Remote;

use super::Error;
use super::address::Forbidden;
use super::budget::Oversize;
use super::fields::{field_name, field_value};
use super::oauth::{Problem, Signer};

pub const EVENT_STREAM: &str = "text/event-stream";
pub const JSON: &str = "application/json";
pub const X_AGENT_ID: HeaderName = HeaderName::from_static("x-agent-id");

/// How long a goodbye, a notice of cancellation or our answer to a server's request may take.
pub const NOTICE_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest body that is read over, in bytes.
const SAYS_NOTHING: usize = 64 * 1024;
/// How many of a server's requests are being answered at a time.
const REPLIES: usize = 8;
/// The longest `WWW-Authenticate` that is read, in bytes.
const MAX_CHALLENGE: usize = 4 * 1024;
/// The longest `Retry-After` that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// Why an HTTP exchange did not come about; texts name no URL.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HttpError {
    /// Nothing was sent.
    #[error("{0}")]
    Connect(String),
    /// Nothing was sent: the name has no address that may be connected to.
    #[error("{0}")]
    Forbidden(Forbidden),
    #[error("the server did not answer in time")]
    TimedOut,
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("its answer cannot be taken: {0}")]
    Oversize(#[from] Oversize),
    #[error("{0}")]
    SignIn(Box<Asked>),
    /// Nothing was sent: a new token is needed.
    #[error("no token can be had for it, because {0}")]
    NoToken(Box<Problem>),
    #[error("the server answered HTTP {status}")]
    Status { status: StatusCode, retry_after: Option<Duration> },
    #[error("the server answered with a body that is neither JSON nor an event stream")]
    ContentType,
    #[error("the server's answer is no JSON-RPC answer to the request")]
    NoAnswer,
}

impl From<reqwest::Error> for HttpError {
    fn from(error: reqwest::Error) -> Self {
        let reason = innermost(&error);
        if let Some(forbidden) = reason.downcast_ref() {
            return Self::Forbidden(*forbidden);
        }
        let reason = if std::ptr::addr_eq(reason, &error) {
            "the request could not be made".to_owned()
        } else {
            reason.to_string()
        };
        match error {
            error if error.is_connect() && error.is_timeout() => Self::Connect("the connection timed out".to_owned()),
            error if error.is_connect() || error.is_builder() => Self::Connect(reason),
            error if error.is_timeout() => Self::TimedOut,
            _ => Self::Broken(reason),
        }
    }
}

impl From<Problem> for HttpError {
    fn from(problem: Problem) -> Self {
        Self::NoToken(Box::new(problem))
    }
}

/// What a server wants that answers 401, and what can be done about it.
#[derive(Clone, Debug)]
pub struct Asked {
    challenge: Option<String>,
    answer: Answerable,
}

/// Who can answer a 401.
#[derive(Clone, Debug)]
enum Answerable {
    /// Whoever has configured the server's `Authorization`.
    Configured,
    /// Whoever has configured the client that signs in as itself.
    Client,
    /// A person who signs in to the server with this id, if it is registered.
    Person(Option<String>),
}

impl Asked {
    fn new(headers: &HeaderMap, signer: Option<&Signer>) -> Self {
        let challenges = || headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        // One that says where to sign in says most.
        let telling = challenges().find(|challenge| challenge.to_ascii_lowercase().contains("resource_metadata"));
        let challenge = telling.or_else(|| challenges().next()).filter(|challenge| challenge.len() <= MAX_CHALLENGE);
        let answer = match signer {
            None => Answerable::Configured,
            Some(signer) if signer.is_machine() => Answerable::Client,
            Some(signer) => Answerable::Person(signer.connects().map(str::to_owned)),
        };
        Self { challenge: challenge.map(str::to_owned), answer }
    }

    /// `WWW-Authenticate`.
    pub fn challenge(&self) -> Option<&str> {
        self.challenge.as_deref()
    }

    /// Whether a person can answer it by a sign-in.
    pub fn may_sign_in(&self) -> bool {
        matches!(self.answer, Answerable::Person(_))
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("it asks for a sign-in (HTTP 401); ")?;
        match &self.answer {
            Answerable::Configured | Answerable::Person(None) => f.write_str("check auth_token and custom_headers"),
            Answerable::Client => f.write_str("it takes no token of the client in oauth; check that"),
            Answerable::Person(Some(id)) => {
                write!(f, "open /v1/mcp-servers/connect/{id} to sign in, or check auth_token and custom_headers")
            }
        }
    }
}

impl HttpError {
    /// Nobody was reached, and so nothing was sent.
    pub fn is_unsent(&self) -> bool {
        self.is_gone() || matches!(self, Self::NoToken(_))
    }

    /// Nobody is there.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Forbidden(_))
    }

    /// What a status other than 2xx means; `signer` signs the requests to this server.
    pub fn of(response: &reqwest::Response, signer: Option<&Signer>) -> Self {
        match response.status() {
            StatusCode::UNAUTHORIZED => Self::SignIn(Box::new(Asked::new(response.headers(), signer))),
            status => Self::Status { status, retry_after: retry_after(response) },
        }
    }
}

/// The last cause of an error: the operating system's or TLS's words, without the URL that the outer ones carry.
fn innermost(error: &reqwest::Error) -> &(dyn std::error::Error + 'static) {
    let mut cause: &(dyn std::error::Error + 'static) = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause
}

/// The header fields that a server's configuration asks for (CONTRACT row 7): `auth_header` and `auth_token` as they
/// are given, a token alone as `Authorization` with `Bearer ` added if it is absent, and the custom headers.
///
/// # Errors
/// [`Error::Header`] when a field is no legal HTTP; such a configuration is refused when it is written.
pub fn header_fields(remote: &Remote) -> Result<HeaderMap, Error> {
    let mut fields = HeaderMap::new();
    let mut add = |name: &str, value: &str| -> Result<(), Error> {
        let name = field_name(name).map_err(|_| Error::Header)?;
        fields.insert(name, field_value(value).map_err(|_| Error::Header)?);
        Ok(())
    };
    for (name, value) in remote.custom_headers.iter().flatten() {
        add(name, value.expose())?;
    }
    if let Some(token) = &remote.auth_token {
        let token = token.expose();
        match &remote.auth_header {
            Some(name) => add(name, token)?,
            None if starts_with_bearer(token) => add("authorization", token)?,
            None => add("authorization", &format!("Bearer {token}"))?,
        }
    }
    Ok(fields)
}

/// Whether a configuration names an `Authorization` itself, be it as user and password in the URL.
pub fn has_authorization(remote: &Remote) -> bool {
    let has_user =
        url::Url::parse(&remote.server_url).is_ok_and(|url| !url.username().is_empty() || url.password().is_some());
    has_user || header_fields(remote).is_ok_and(|fields| fields.contains_key(AUTHORIZATION))
}

/// As [`header_fields`], without the `Authorization` that whoever signs the requests puts there.
pub fn unsigned_fields(remote: &Remote, signer: Option<&Signer>) -> Result<HeaderMap, Error> {
    let mut fields = header_fields(remote)?;
    if signer.is_some() {
        fields.remove(AUTHORIZATION);
    }
    Ok(fields)
}

/// Sends a request, signed by `signer` if there is one; as [`Signer::send`].
pub async fn send(
    signer: Option<&Signer>,
    request: reqwest::RequestBuilder,
    mut sent: impl FnMut(bool),
) -> Result<reqwest::Response, HttpError> {
    match signer {
        Some(signer) => signer.send(request, sent).await,
        None => {
            sent(true);
            Ok(request.send().await?)
        }
    }
}

fn starts_with_bearer(token: &str) -> bool {
    token.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("bearer "))
}

/// Our answers to a server's own requests, a few at a time: a server that asks more waits, and so does what it wrote
/// behind its request.
pub struct Replies {
    turns: Arc<Semaphore>,
    tracker: TaskTracker,
}

impl Replies {
    pub fn new(tracker: TaskTracker) -> Self {
        Self { turns: Arc::new(Semaphore::new(REPLIES)), tracker }
    }

    /// Sends one in a task; done when that has begun.
    pub async fn send(&self, sending: impl Future<Output = ()> + Send + 'static) {
        let turn = self.turns.clone().acquire_owned().await.expect("the semaphore is never closed");
        self.tracker.spawn(async move {
            sending.await;
            drop(turn);
        });
    }
}

/// Reads a body that says nothing, so that its connection can be used again; a long one costs its connection.
pub async fn read_over(mut response: reqwest::Response) {
    let mut left = SAYS_NOTHING;
    let reading = async {
        while let Ok(Some(chunk)) = response.chunk().await
            && chunk.len() <= left
        {
            left -= chunk.len();
        }
    };
    // Its end may take its time, and nobody waits for that.
    let _ = timeout(NOTICE_TIMEOUT, reading).await;
}

/// Whether an answer is of this media type, whatever its parameters and case (RFC 9110 §8.3.1).
pub fn is_media_type(response: &reqwest::Response, wanted: &str) -> bool {
    let kind = text_header(response, &CONTENT_TYPE).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(wanted)
}

fn text_header(response: &reqwest::Response, name: &HeaderName) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

/// `Retry-After`, in seconds or as a date (RFC 9110, 10.2.3).
fn retry_after(response: &reqwest::Response) -> Option<Duration> {
    let text = text_header(response, &RETRY_AFTER)?;
    let time = match text.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = chrono::DateTime::parse_from_rfc2822(text.trim()).ok()?;
            (date.to_utc() - chrono::Utc::now()).to_std().ok()?
        }
    };
    Some(time.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn sent(auth_header: Option<&str>, auth_token: Option<&str>, custom: &[(&str, &str)]) -> Vec<(String, String)> {
        let remote = Remote {
            server_url: "http://127.0.0.1/mcp".to_owned(),
            auth_header: auth_header.map(str::to_owned),
            auth_token: auth_token.map(|token| token.to_owned().into()),
            custom_headers: Some(custom.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned().into())).collect()),
            oauth: None,
        };
        let fields = header_fields(&remote).unwrap();
        fields.iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned())).collect()
    }

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn tokens_and_headers_are_sent_as_given() {
        assert_eq!(sent(Some("X-API-Key"), Some("abc"), &[]), [pair("x-api-key", "abc")]);
        assert_eq!(sent(Some("Authorization"), Some("Bearer t"), &[]), [pair("authorization", "Bearer t")]);
        assert_eq!(sent(None, Some("t"), &[]), [pair("authorization", "Bearer t")]);
        assert_eq!(sent(None, Some("bearer t"), &[]), [pair("authorization", "bearer t")]);
        let both = sent(None, Some("t"), &[("X-A", "1")]);
        assert!(both.contains(&pair("authorization", "Bearer t")) && both.contains(&pair("x-a", "1")), "{both:?}");
        assert_eq!(sent(Some("X-API-Key"), None, &[]), []);
    }
}
