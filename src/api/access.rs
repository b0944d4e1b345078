//! Who may come in: each route says what its caller must be allowed, and is closed to everybody else (CONTRACT row 21).
//!
//! Two layers, and either alone keeps strangers out. [`admit`] is around everything, also what is no route: it finds out
//! who asks, and lets nobody in but callers with a token, and strangers to the open routes. [`authorize`] is around one
//! route and compares its scope with the caller's. Both decide on the route that was matched, never on the text of a path,
//! and neither reads a body.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, Method};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Span;

use crate::error::Error;
use crate::model::By;
pub use crate::model::Scope;
use crate::serve::Peer;
use crate::telemetry::metrics::{Metrics, TokenFailure};

use super::Route;
use super::attempts::Attempts;
use super::tokens::{Digest, Token, Tokens};

/// Letta's own header for its password; proxies that use `Authorization` themselves leave it alone.
pub const X_BARE_PASSWORD: HeaderName = HeaderName::from_static("x-bare-password");

/// What a route asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: health, and pages without data.
    Open,
    Needs(Scope),
}

/// Who asks, as [`admit`] found out; in the extensions of every request but those of strangers to open routes.
#[derive(Clone, Debug)]
pub struct Caller {
    pub scope: Scope,
    /// `None` where there are no tokens.
    token: Option<Arc<Token>>,
}

impl Caller {
    /// Anybody who reaches a Portolan without tokens, which only listens on loopback.
    fn anybody() -> Self {
        Self { scope: Scope::Admin, token: None }
    }

    fn with(token: Arc<Token>) -> Self {
        Self { scope: token.scope, token: Some(token) }
    }

    /// What the token is called; at most 64 characters.
    pub fn name(&self) -> Option<&str> {
        self.token.as_deref().map(|token| token.name.as_str())
    }

    /// This caller in the logs of runs and changes.
    pub fn by(&self) -> By {
        By::caller(self.name())
    }

    /// The same for all requests with one token, and for no others.
    pub fn id(&self) -> Option<Digest> {
        self.token.as_deref().map(|token| token.digest)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        parts.extensions.get().cloned().ok_or(Error::Unauthorized)
    }
}

/// What [`admit`] goes by.
#[derive(Clone)]
pub struct Door {
    tokens: Tokens,
    attempts: Arc<Attempts>,
    metrics: Metrics,
    /// Methods and paths without a slash at their end.
    open: Arc<[(Method, &'static str)]>,
}

impl Door {
    pub fn new(tokens: Tokens, routes: &[Route], metrics: Metrics) -> Self {
        let open = routes.iter().filter(|route| route.access == Access::Open);
        let open = open.map(|route| (route.method.clone(), route.path.trim_end_matches('/'))).collect();
        Self { tokens, attempts: Arc::default(), metrics, open }
    }

    /// Whether the matched route is one for everybody. HEAD is GET without a body (RFC 9110, 9.3.2).
    fn is_open(&self, request: &Request) -> bool {
        let Some(path) = request.extensions().get::<MatchedPath>() else { return false };
        let path = path.as_str().trim_end_matches('/');
        let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
        self.open.iter().any(|(open_method, open_path)| open_method == method && *open_path == path)
    }

    /// A wrong token is looked for before it is counted: the right one is let in however many wrong ones came from its
    /// address, which may be that of a proxy.
    fn caller(&self, request: &Request) -> Result<Caller, Error> {
        let Some(tokens) = self.tokens.current() else { return Ok(Caller::anybody()) };
        let found = match Credential::of(request.headers()) {
            Credential::None => {
                self.metrics.token_failed(TokenFailure::Missing);
                return Err(Error::Unauthorized);
            }
            Credential::Unusable => None,
            Credential::Token(token) => tokens.find(token),
        };
        found.map(Caller::with).ok_or_else(|| {
            self.metrics.token_failed(TokenFailure::Wrong);
            let peer = request.extensions().get::<Peer>().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0);
            match self.attempts.fail(peer) {
                Some(retry_after) => Error::Guessing { retry_after },
                None => Error::Unauthorized,
            }
        })
    }
}

/// The layer around everything.
pub async fn admit(State(door): State<Door>, mut request: Request, next: Next) -> Result<Response, Error> {
    if !door.is_open(&request) {
        let caller = door.caller(&request)?;
        if let Some(name) = caller.name() {
            Span::current().record("caller.name", name);
        }
        request.extensions_mut().insert(caller);
    }
    Ok(next.run(request).await)
}

/// The layer around one route.
pub async fn authorize(access: Access, request: Request, next: Next) -> Result<Response, Error> {
    if let Access::Needs(scope) = access {
        let caller: &Caller = request.extensions().get().ok_or(Error::Unauthorized)?;
        if caller.scope < scope {
            return Err(Error::Forbidden);
        }
    }
    Ok(next.run(request).await)
}

/// What a request carries to be let in.
#[derive(Debug, PartialEq)]
enum Credential<'a> {
    None,
    Token(&'a [u8]),
    /// Another scheme, or more than one token: who would be meant is not for Portolan to guess.
    Unusable,
}

impl<'a> Credential<'a> {
    /// `Authorization: Bearer TOKEN` (RFC 6750, 2.1) or `X-BARE-PASSWORD: password TOKEN`; both, if it is the same token.
    fn of(headers: &'a HeaderMap) -> Self {
        let mut found = Self::None;
        for (header, scheme) in [(AUTHORIZATION, "bearer"), (X_BARE_PASSWORD, "password")] {
            let mut values = headers.get_all(header).iter();
            let Some(value) = values.next() else { continue };
            let Some(token) = after(scheme, value.as_bytes()).filter(|_| values.next().is_none()) else {
                return Self::Unusable;
            };
            match found {
                Self::Token(other) if other != token => return Self::Unusable,
                _ => found = Self::Token(token),
            }
        }
        found
    }
}

/// The token after a scheme, which is the same in any case (RFC 9110, 11.1) and ends with one space or more.
fn after<'a>(scheme: &str, value: &'a [u8]) -> Option<&'a [u8]> {
    let (name, rest) = value.split_at_checked(scheme.len())?;
    let token = rest.trim_ascii_start();
    (name.eq_ignore_ascii_case(scheme.as_bytes()) && rest.starts_with(b" ") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_request_carries_one_token_or_none_that_counts() {
        use Credential::{None, Token, Unusable};
        const A: &str = "authorization";
        const X: &str = "x-bare-password";
        let table: [(&[(&'static str, &'static str)], Credential<'_>); 27] = [
            (&[], None),
            (&[("proxy-authorization", "Bearer t")], None),
            (&[("cookie", "Authorization=Bearer t")], None),
            (&[(A, "Bearer t")], Token(b"t")),
            (&[(A, "bEARER t")], Token(b"t")),
            (&[(A, "Bearer   t")], Token(b"t")),
            (&[(A, "Bearer a b")], Token(b"a b")),
            (&[(A, "Bearer Bearer t")], Token(b"Bearer t")),
            (&[(X, "password t")], Token(b"t")),
            (&[(X, "Password t")], Token(b"t")),
            (&[(A, "Bearer t"), (X, "password t")], Token(b"t")),
            (&[(A, "")], Unusable),
            (&[(A, "Bearer")], Unusable),
            (&[(A, "Bearer ")], Unusable),
            (&[(A, "Bearert")], Unusable),
            (&[(A, "Bearer\tt")], Unusable),
            (&[(A, "t")], Unusable),
            (&[(A, "Basic t")], Unusable),
            (&[(A, "password t")], Unusable),
            (&[(X, "t")], Unusable),
            (&[(X, "Bearer t")], Unusable),
            (&[(X, "password ")], Unusable),
            (&[(A, "Bearer t"), (A, "Bearer t")], Unusable),
            (&[(X, "password t"), (X, "password t")], Unusable),
            (&[(A, "Bearer t"), (X, "password u")], Unusable),
            (&[(A, "Basic u"), (X, "password t")], Unusable),
            (&[(A, "Bearer t"), (X, "")], Unusable),
        ];
        for (fields, credential) in table {
            let mut headers = HeaderMap::new();
            for (name, value) in fields {
                headers.append(*name, value.parse().unwrap());
            }
            assert_eq!(Credential::of(&headers), credential, "{fields:?}");
        }
    }
}
