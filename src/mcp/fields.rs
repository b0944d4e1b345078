//! Which header fields a server may be configured with. Pure functions on final values: to be asked when a field is
//! written, and again when a template in it was filled in.

use http::{HeaderName, HeaderValue};
use url::Url;

use crate::model::{Remote, Secret};

/// The longest name and the longest value of one field, and the most that all fields of a server take, in bytes; servers
/// take heads of 8 KiB and more.
const MAX_NAME: usize = 256;
const MAX_VALUE: usize = 32 * 1024;
const MAX_ALL: usize = 64 * 1024;

/// Header fields that belong to HTTP or MCP itself and cannot be configured; so do those that begin with `mcp-param-`.
const RESERVED: [&str; 19] = [
    "accept",
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "keep-alive",
    "last-event-id",
    "mcp-method",
    "mcp-name",
    "mcp-protocol-version",
    "mcp-session-id",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-agent-id",
];

/// What is wrong with a field; each message is one sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    #[error("This is not a valid HTTP header name.")]
    Name,
    #[error("This header is set by Portolan itself.")]
    Reserved,
    #[error("This is not a valid HTTP header value.")]
    Value,
    #[error("This header is given twice.")]
    Twice,
    #[error("A user in server_url and oauth would both set Authorization; give one of them.")]
    UserAndOauth,
    #[error("The headers of a server may take 64 KiB in all.")]
    TooMuch,
}

/// A field name as RFC 9110 §5.1 has it, a token, that a configuration may set.
///
/// # Errors
/// [`FieldError::Name`], [`FieldError::Reserved`].
pub fn field_name(name: &str) -> Result<HeaderName, FieldError> {
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| FieldError::Name)?;
    if name.as_str().len() > MAX_NAME {
        return Err(FieldError::Name);
    }
    let reserved = RESERVED.contains(&name.as_str()) || name.as_str().starts_with(super::mirror::PREFIX);
    if reserved { Err(FieldError::Reserved) } else { Ok(name) }
}

/// A field value as RFC 9110 §5.5 has it, of ASCII alone: of other bytes servers make different texts. White space at its
/// ends would not arrive. It counts as sensitive.
///
/// # Errors
/// [`FieldError::Value`].
pub fn field_value(value: &str) -> Result<HeaderValue, FieldError> {
    let whole = value.is_ascii() && value.len() <= MAX_VALUE && value.trim_matches([' ', '\t']).len() == value.len();
    let mut field = HeaderValue::from_str(value).ok().filter(|_| whole).ok_or(FieldError::Value)?;
    field.set_sensitive(true);
    Ok(field)
}

/// Where a configuration has something wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    AuthHeader,
    AuthToken,
    CustomHeaders,
    CustomHeader(&'a str),
    Oauth,
}

/// All that is wrong with the header fields of a server. User and password in its URL are an `Authorization`, too.
pub fn faults(remote: &Remote) -> Vec<(Place<'_>, FieldError)> {
    let mut faults = Vec::new();
    let token_header = match (&remote.auth_header, &remote.auth_token) {
        (Some(name), _) => Some(name.as_str()),
        (None, Some(_)) => Some("authorization"),
        (None, None) => None,
    };
    let has_userinfo = Url::parse(&remote.server_url).is_ok_and(|url| url.authority().contains('@'));
    let mut seen: Vec<String> = has_userinfo.then(|| "authorization".to_owned()).into_iter().collect();
    let mut bytes = remote.auth_token.as_ref().map_or(0, |token| token.expose().len());
    if let Some(name) = &remote.auth_header
        && let Err(fault) = field_name(name)
    {
        faults.push((Place::AuthHeader, fault));
    }
    if let Some(fault) = remote.auth_token.as_ref().and_then(|token| field_value(token.expose()).err()) {
        faults.push((Place::AuthToken, fault));
    }
    if let Some(name) = token_header.map(str::to_ascii_lowercase) {
        if remote.auth_token.is_some() && seen.contains(&name) {
            let place = if remote.auth_header.is_some() { Place::AuthHeader } else { Place::AuthToken };
            faults.push((place, FieldError::Twice));
        }
        seen.push(name);
    }
    for (name, value) in remote.custom_headers.iter().flatten() {
        bytes += name.len() + value.expose().len();
        let lower = name.to_ascii_lowercase();
        let fault = field_name(name).map(drop).and_then(|()| field_value(Secret::expose(value)).map(drop)).err();
        if let Some(fault) = fault.or_else(|| seen.contains(&lower).then_some(FieldError::Twice)) {
            faults.push((Place::CustomHeader(name), fault));
        }
        seen.push(lower);
    }
    if has_userinfo && remote.oauth.is_some() {
        faults.push((Place::Oauth, FieldError::UserAndOauth));
    }
    if bytes > MAX_ALL {
        faults.push((Place::CustomHeaders, FieldError::TooMuch));
    }
    faults
}
