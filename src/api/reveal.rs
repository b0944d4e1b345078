//! Whether an answer shows secrets: masked, unless an admin asks for them with `?reveal=true` (CONTRACT row 6).

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde_json::json;
use url::form_urlencoded;

use crate::app::App;
use crate::config::SecretsInResponses;
use crate::error::Error;

use super::access::{Caller, Scope};

/// How the answer at hand shows secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    Masked,
    InClear,
}

impl Shown {
    fn new(query: &str, scope: Scope, setting: SecretsInResponses) -> Result<Self, Error> {
        let mut asked = form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name == "reveal");
        let reveal = match (asked.next().as_ref().map(|(_, value)| &**value), asked.next()) {
            (None | Some("" | "false"), None) => false,
            (Some("true"), None) => true,
            _ => {
                return Err(Error::invalid(vec![json!("query"), json!("reveal")], "This must be true or false, once."));
            }
        };
        match (scope, reveal || setting == SecretsInResponses::Full) {
            (Scope::Admin, true) => Ok(Self::InClear),
            _ if reveal => Err(Error::Forbidden),
            _ => Ok(Self::Masked),
        }
    }
}

impl FromRequestParts<App> for Shown {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, app).await?;
        Self::new(parts.uri.query().unwrap_or_default(), caller.scope, app.settings.secrets.secrets_in_responses)
    }
}

#[cfg(test)]
mod tests {
    use SecretsInResponses::{Full, Masked};

    use super::*;

    #[test]
    fn an_admin_alone_sees_secrets_and_has_to_ask() {
        let shown = |query, scope, setting| Shown::new(query, scope, setting).ok();
        for scope in [Scope::Read, Scope::Run, Scope::Admin] {
            for query in ["", "reveal=", "reveal=false", "other=true"] {
                assert_eq!(shown(query, scope, Masked), Some(Shown::Masked), "{query}");
            }
            assert!(shown("reveal=yes", scope, Masked).is_none());
            assert!(shown("reveal=true&reveal=true", scope, Masked).is_none());
        }
        assert_eq!(shown("a=b&reveal=true", Scope::Admin, Masked), Some(Shown::InClear));
        assert_eq!(shown("", Scope::Admin, Full), Some(Shown::InClear));
        for scope in [Scope::Read, Scope::Run] {
            for setting in [Masked, Full] {
                assert!(matches!(Shown::new("reveal=true", scope, setting), Err(Error::Forbidden)));
            }
            assert_eq!(shown("", scope, Full), Some(Shown::Masked), "Letta knew admins alone");
        }
    }
}
