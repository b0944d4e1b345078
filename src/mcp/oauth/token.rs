//! The token endpoint (RFC 6749, 4.1.3, 4.4.2, 5 and 6), by hand: rmcp tells a refusal from an accident for refresh tokens
//! alone, cannot be told the resource of an earlier sign-in, and takes no status but 200 for a new token.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use secrecy::zeroize::Zeroizing;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::form_urlencoded::{Serializer, byte_serialize};

use crate::model::Secret;

use super::super::remote::{HttpError, JSON};
use super::way::{Problem, Way};

/// What a refusal may say (RFC 6749, 5.2 and 4.1.2.1; RFC 8707, 2).
const CODES: [&str; 11] = [
    "invalid_request",
    INVALID_CLIENT,
    INVALID_GRANT,
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
    "invalid_target",
    "access_denied",
    "unsupported_response_type",
    "server_error",
    "temporarily_unavailable",
];
/// Those of them that say nothing about the request.
const ACCIDENTS: [&str; 2] = ["server_error", "temporarily_unavailable"];
/// The grant is of no use any more.
pub const INVALID_GRANT: &str = "invalid_grant";
/// The client is not known, or does not say in the right way who it is.
const INVALID_CLIENT: &str = "invalid_client";
/// The longest token, in bytes: it must fit into a header field.
const MAX_TOKEN: usize = 16 * 1024;

/// A token endpoint, and how it wants clients to say who they are.
#[derive(Clone, Serialize, Deserialize)]
pub struct Endpoint {
    pub url: String,
    /// A secret goes into the body; else into `Authorization`, which RFC 6749 (2.3.1) has every server take.
    pub posts_secret: bool,
}

/// What a token is given for.
pub enum Grant<'a> {
    Code { code: &'a str, verifier: &'a Secret, redirect_uri: &'a str },
    Refresh { refresh_token: &'a Secret },
    Client { scope: Option<&'a str> },
}

pub struct Tokens {
    pub access_token: Secret,
    pub refresh_token: Option<Secret>,
    pub scope: Option<String>,
    /// In seconds.
    pub expires_in: Option<i64>,
}

/// Which of the known codes this is; other people's words stay out of our sentences.
pub fn known_code(code: &str) -> &'static str {
    CODES.into_iter().find(|known| *known == code).unwrap_or("another reason")
}

/// Asks for tokens.
///
/// # Errors
/// [`Problem::Refused`] when the authorization server means it; all else may be an accident.
pub async fn ask(
    way: &Way,
    endpoint: &Endpoint,
    client_id: &str,
    client_secret: Option<&Secret>,
    grant: &Grant<'_>,
    resource: &str,
) -> Result<Tokens, Problem> {
    let asking = async |endpoint: &Endpoint| {
        let (headers, body) = request(endpoint, client_id, client_secret, grant, resource);
        let answer = way.send(Method::POST, &endpoint.url, headers, body).await?;
        read(answer.status(), &Zeroizing::new(answer.into_body()))
    };
    match asking(endpoint).await {
        // Not all take a secret as they say: who is not known has used nothing up, and may say it the other way.
        Err(Problem::Refused(INVALID_CLIENT)) if client_secret.is_some() => {
            asking(&Endpoint { posts_secret: !endpoint.posts_secret, ..endpoint.clone() }).await
        }
        outcome => outcome,
    }
}

fn request(
    endpoint: &Endpoint,
    client_id: &str,
    client_secret: Option<&Secret>,
    grant: &Grant<'_>,
    resource: &str,
) -> (HeaderMap, Vec<u8>) {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    headers.insert(ACCEPT, HeaderValue::from_static(JSON));
    let mut form = Serializer::new(String::new());
    match grant {
        Grant::Code { code, verifier, redirect_uri } => {
            form.append_pair("grant_type", "authorization_code").append_pair("code", code);
            form.append_pair("code_verifier", verifier.expose()).append_pair("redirect_uri", redirect_uri);
        }
        Grant::Refresh { refresh_token } => {
            form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", refresh_token.expose());
        }
        Grant::Client { scope } => {
            form.append_pair("grant_type", "client_credentials");
            if let Some(scope) = scope {
                form.append_pair("scope", scope);
            }
        }
    }
    form.append_pair("resource", resource);
    match client_secret {
        Some(secret) if !endpoint.posts_secret => {
            headers.insert(AUTHORIZATION, basic(client_id, secret));
        }
        Some(secret) => {
            form.append_pair("client_id", client_id).append_pair("client_secret", secret.expose());
        }
        None => {
            form.append_pair("client_id", client_id);
        }
    }
    (headers, form.finish().into_bytes())
}

/// RFC 6749, 2.3.1: both parts are written as in a form before they are joined.
fn basic(client_id: &str, secret: &Secret) -> HeaderValue {
    let form = |text: &str| byte_serialize(text.as_bytes()).collect::<String>();
    let pair = format!("{}:{}", form(client_id), form(secret.expose()));
    let mut value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(pair))).expect("base64 is a legal value");
    value.set_sensitive(true);
    value
}

fn read(status: StatusCode, body: &[u8]) -> Result<Tokens, Problem> {
    #[derive(Deserialize)]
    struct Refusal {
        error: String,
    }
    #[derive(Deserialize)]
    struct Granted {
        access_token: String,
        token_type: Option<String>,
        refresh_token: Option<String>,
        scope: Option<String>,
        /// A number; some write it as a text.
        expires_in: Option<Value>,
    }
    if !status.is_success() {
        let is_final = status.is_client_error()
            && !matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS);
        return Err(match serde_json::from_slice::<Refusal>(body) {
            Ok(refusal) if is_final && !ACCIDENTS.contains(&&*refusal.error) => {
                Problem::Refused(known_code(&refusal.error))
            }
            _ => Problem::Http(Box::new(HttpError::Status { status, retry_after: None })),
        });
    }
    // Some say 200 to whatever they refuse.
    let granted: Granted = serde_json::from_slice(body).map_err(|_| match serde_json::from_slice::<Refusal>(body) {
        Ok(refusal) => Problem::Refused(known_code(&refusal.error)),
        Err(_) => Problem::Answer,
    })?;
    let is_bearer = granted.token_type.as_deref().is_none_or(|kind| kind.eq_ignore_ascii_case("bearer"));
    let is_token =
        |text: &str| !text.is_empty() && text.len() <= MAX_TOKEN && text.bytes().all(|b| b.is_ascii_graphic());
    if !is_bearer || !is_token(&granted.access_token) {
        return Err(Problem::Answer);
    }
    let expires_in = match granted.expires_in {
        Some(Value::Number(number)) => number.as_f64().map(|seconds| seconds as i64),
        Some(Value::String(text)) => text.trim().parse().ok(),
        _ => None,
    };
    Ok(Tokens {
        access_token: granted.access_token.into(),
        refresh_token: granted
            .refresh_token
            .filter(|text| !text.is_empty() && text.len() <= MAX_TOKEN)
            .map(Secret::from),
        scope: granted.scope,
        // A year is as good as for ever, and can be added to any time. No time at all is how some say that there is no end.
        expires_in: expires_in.filter(|seconds| *seconds > 0).map(|seconds| seconds.min(366 * 24 * 3600)),
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_from_an_accident() {
        let refused =
            |status: u16, body: &str| read(StatusCode::from_u16(status).unwrap(), body.as_bytes()).err().unwrap();
        let gone = r#"{"error":"invalid_grant","error_description":"secret words"}"#;
        assert!(matches!(refused(400, gone), Problem::Refused(INVALID_GRANT)));
        assert!(matches!(refused(200, gone), Problem::Refused(INVALID_GRANT)));
        assert!(matches!(refused(401, r#"{"error":"invalid_client"}"#), Problem::Refused("invalid_client")));
        assert!(matches!(refused(400, r#"{"error":"<script>"}"#), Problem::Refused("another reason")));
        for (status, body) in [(503, gone), (429, gone), (400, "<html>"), (302, "")] {
            assert!(matches!(refused(status, body), Problem::Http(_)), "{status} {body}");
        }
        assert!(matches!(refused(200, "{}"), Problem::Answer));
        assert!(matches!(refused(200, r#"{"access_token":"a b","token_type":"Bearer"}"#), Problem::Answer));
        assert!(matches!(refused(200, r#"{"access_token":"a","token_type":"mac"}"#), Problem::Answer));
    }

    #[test]
    fn tokens_are_read_with_and_without_what_may_be_missing() {
        let tokens = |body: &str| read(StatusCode::CREATED, body.as_bytes()).ok().unwrap();
        let bare = tokens(r#"{"access_token":"a","token_type":"bearer"}"#);
        assert!(bare.access_token.expose() == "a" && bare.refresh_token.is_none() && bare.expires_in.is_none());
        let year = 366 * 24 * 3600;
        for (written, seconds) in [
            ("60", Some(60)),
            ("\"60\"", Some(60)),
            ("60.9", Some(60)),
            ("0", None),
            ("-1", None),
            ("1e99", Some(year)),
        ] {
            let tokens = tokens(&format!(r#"{{"access_token":"a","expires_in":{written},"refresh_token":"r"}}"#));
            assert_eq!(tokens.expires_in, seconds, "{written}");
            assert_eq!(tokens.refresh_token.unwrap().expose(), "r");
        }
    }

    #[test]
    fn a_client_says_who_it_is_as_in_a_form() {
        let value = basic("a:b c", &Secret::from("p%w".to_owned()));
        let encoded = value.to_str().unwrap().strip_prefix("Basic ").unwrap();
        assert_eq!(STANDARD.decode(encoded).unwrap(), b"a%3Ab+c:p%25w");
        assert!(value.is_sensitive());
    }
}
