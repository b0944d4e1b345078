//! The way to what an MCP server names for a sign-in, and why a sign-in does not come about.
//!
//! All of it goes out through [`Egress`], as what another server has named: on the server's own origin, or public and https,
//! or allowed by the operator.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method, Request, Response};
use rmcp::transport::auth::{OAuthHttpClient, OAuthHttpClientFuture, OAuthHttpRequest};
use tokio::time::timeout;
use url::Url;

use super::super::Error;
use super::super::address::Forbidden;
use super::super::egress::{Egress, Trust};
use super::super::remote::{EVENT_STREAM, HttpError};

/// How long one request may take, and how much of an answer is read, in bytes.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
const MAX_BODY: usize = 1024 * 1024;

/// Why a sign-in does not come about; each text is the end of a sentence and names no URL and no secret.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Problem {
    #[error("the authorization server cannot be used: {0}")]
    Http(Box<HttpError>),
    #[error("the sign-in leads to an address that may not be connected to: {0}")]
    Forbidden(Forbidden),
    #[error("the sign-in leads to an address that is not a usable URL")]
    Url,
    #[error("the server does not say in a usable way where to sign in")]
    Metadata,
    #[error("the authorization server is not the one that it says it is")]
    Issuer,
    #[error("the server has another authorization server than before")]
    OtherIssuer,
    #[error(
        "the server names another authorization server than the one it was signed in to; set oauth.client_secret again \
         with PATCH if that is meant"
    )]
    ClientElsewhere,
    #[error("the authorization server does not take PKCE with S256")]
    Pkce,
    #[error("the authorization server did not register Portolan; register a client there and set oauth.client_id")]
    Registration,
    #[error("the page to sign in at is neither https nor on this machine")]
    Page,
    #[error("the page to sign in at comes with parameters that are Portolan's own to set")]
    Parameters,
    /// One of the codes of RFC 6749.
    #[error("the authorization server refused it ({0})")]
    Refused(&'static str),
    #[error("the authorization server's answer cannot be understood")]
    Answer,
    #[error("the sign-in took too long")]
    TimedOut,
    #[error("the database is not available")]
    Store,
    #[error("Portolan is stopping")]
    Stopping,
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::Http(HttpError::Forbidden(forbidden)) => Self::Forbidden(forbidden),
            Error::Http(error) => Self::Http(Box::new(error)),
            _ => Self::Url,
        }
    }
}

/// The way out for one server.
#[derive(Clone)]
pub struct Way(Arc<Shared>);

struct Shared {
    egress: Egress,
    by: Url,
    /// Why the last request failed; rmcp passes texts on.
    failure: Mutex<Option<Problem>>,
}

impl Way {
    /// What the server at `by` names.
    pub fn new(egress: Egress, by: Url) -> Self {
        Self(Arc::new(Shared { egress, by, failure: Mutex::default() }))
    }

    /// Whether an address may be connected to, as far as its text tells.
    pub async fn check(&self, url: &str) -> Result<(), Problem> {
        self.0.egress.to(url, Trust::Supplied { by: &self.0.by }).await?;
        Ok(())
    }

    /// Why the last request failed, if it did; asked once.
    pub fn failure(&self) -> Option<Problem> {
        self.0.failure.lock().expect("no code panics while it holds the reason").take()
    }

    /// Sends a request, and reads its answer.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        headers: HeaderMap,
        body: Vec<u8>,
    ) -> Result<Response<Vec<u8>>, Problem> {
        let destination = self.0.egress.to(url, Trust::Supplied { by: &self.0.by }).await?;
        let exchanging = async {
            let request = destination.request(method).headers(headers).body(body);
            let mut response = request.send().await.map_err(HttpError::from)?;
            let mut answer = Response::builder().status(response.status());
            if let Some(headers) = answer.headers_mut() {
                headers.clone_from(response.headers());
            }
            let mut body = Vec::new();
            let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
            // A server that is asked whether it wants a sign-in may begin a stream without end.
            if !kind.starts_with(EVENT_STREAM) {
                while let Some(chunk) = response.chunk().await.map_err(HttpError::from)? {
                    if body.len() + chunk.len() > MAX_BODY {
                        return Err(Problem::Answer);
                    }
                    body.extend_from_slice(&chunk);
                }
            }
            answer.body(body).map_err(|_| Problem::Answer)
        };
        let answered = timeout(REQUEST_TIMEOUT, exchanging).await;
        answered.unwrap_or_else(|_| Err(Problem::Http(Box::new(HttpError::TimedOut))))
    }
}

impl From<HttpError> for Problem {
    fn from(error: HttpError) -> Self {
        Error::Http(error).into()
    }
}

impl OAuthHttpClient for Way {
    /// Redirects are followed as [`Egress`] follows them, whatever rmcp asks for: on one origin, and with their body.
    fn execute(&self, request: OAuthHttpRequest) -> OAuthHttpClientFuture<'_> {
        Box::pin(async move {
            let (parts, body) = Request::into_parts(request.request);
            let answer = self.send(parts.method, &parts.uri.to_string(), parts.headers, body).await;
            answer.map_err(|problem| {
                let told = Box::new(problem.clone());
                *self.0.failure.lock().expect("no code panics while it holds the reason") = Some(problem);
                told as _
            })
        })
    }
}
