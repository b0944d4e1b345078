//! The values that a request brings for the templates of a server (CONTRACT row 17).

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde_json::json;

use crate::error::Error;
use crate::mcp::Variables;

/// What the header `x-portolan-variables` says; nothing without it.
pub struct Given(pub Variables);

impl<S: Send + Sync> FromRequestParts<S> for Given {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        let mut values = parts.headers.get_all(Variables::HEADER).iter();
        let refused = |why: &str| {
            let reason = format!("The header {} {why}", Variables::HEADER);
            Err(Error::invalid(vec![json!("header"), json!(Variables::HEADER)], reason))
        };
        match (values.next(), values.next()) {
            (None, _) => Ok(Self(Variables::default())),
            (Some(json), None) => match Variables::read(json.as_bytes()) {
                Ok(variables) => Ok(Self(variables)),
                Err(error) => refused(&error.to_string()),
            },
            (Some(_), Some(_)) => refused("may be sent once."),
        }
    }
}
