//! What browsers are given: the console, the page of the API reference, and the document that it shows. `build.rs` packed
//! them into the program, compressed, and so they go out to whoever takes gzip.
//!
//! Nothing is used from a cache unasked, so that the next version is seen as soon as it runs, all of its files at once; what
//! is unchanged is a `304` (RFC 9110, 13.1.2).

use std::io::Read;
use std::sync::OnceLock;

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH,
    REFERRER_POLICY, VARY,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use flate2::read::GzDecoder;

use crate::error::Error;

const CROSS_ORIGIN_OPENER_POLICY: HeaderName = HeaderName::from_static("cross-origin-opener-policy");

/// Scripts, styles and calls from here and to here alone, no markup out of text, and no frame around it. The console shows
/// pictures and plays sounds that tools return.
const CONSOLE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; \
                              media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                              require-trusted-types-for 'script'; trusted-types 'none'";

/// The same for Swagger UI, which sets styles on elements and carries its icons as data.
const DOCS_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
                           img-src 'self' data:; font-src 'self' data:; connect-src 'self'; base-uri 'none'; \
                           form-action 'none'; frame-ancestors 'none'";

/// One file.
struct Asset {
    path: &'static str,
    kind: &'static str,
    /// Of the content: another one is another content.
    mark: &'static str,
    packed: &'static [u8],
    /// For clients without gzip, once one came: any number of them share it.
    plain: OnceLock<Bytes>,
}

include!(concat!(env!("OUT_DIR"), "/assets.rs"));

pub async fn console(headers: HeaderMap) -> Result<Response, Error> {
    page("console/index.html", CONSOLE_POLICY, &headers)
}

pub async fn console_file(file: Result<Path<String>, PathRejection>, headers: HeaderMap) -> Result<Response, Error> {
    file_of("console", file, &headers)
}

pub async fn docs(headers: HeaderMap) -> Result<Response, Error> {
    page("docs/docs.html", DOCS_POLICY, &headers)
}

pub async fn docs_file(file: Result<Path<String>, PathRejection>, headers: HeaderMap) -> Result<Response, Error> {
    file_of("docs", file, &headers)
}

pub async fn openapi(headers: HeaderMap) -> Result<Response, Error> {
    Ok(find("openapi.yaml").ok_or(Error::NoRoute)?.answer(&headers))
}

fn page(path: &str, policy: &'static str, headers: &HeaderMap) -> Result<Response, Error> {
    let mut response = find(path).ok_or(Error::NoRoute)?.answer(headers);
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    // A page that opened this one in a window keeps no hold of it.
    response.headers_mut().insert(CROSS_ORIGIN_OPENER_POLICY, HeaderValue::from_static("same-origin"));
    Ok(response)
}

/// A file of `folder`; its page is none, as it has an address and a policy of its own.
fn file_of(folder: &str, file: Result<Path<String>, PathRejection>, headers: &HeaderMap) -> Result<Response, Error> {
    let Path(name) = file.map_err(|_| Error::NoRoute)?;
    let asset = find(&format!("{folder}/{name}")).filter(|asset| !asset.path.ends_with(".html"));
    Ok(asset.ok_or(Error::NoRoute)?.answer(headers))
}

fn find(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}

impl Asset {
    fn answer(&self, headers: &HeaderMap) -> Response {
        // Weak, because it stands for the packed bytes and for the plain ones (RFC 9110, 8.8.1).
        let etag = format!("W/\"{}\"", self.mark);
        let known = listed(headers, &IF_NONE_MATCH).any(|tag| tag == etag || tag == "*");
        let common = [
            (ETAG, etag),
            (CACHE_CONTROL, "no-cache".to_owned()),
            (VARY, "accept-encoding".to_owned()),
            (REFERRER_POLICY, "no-referrer".to_owned()),
        ];
        if known {
            return (StatusCode::NOT_MODIFIED, common).into_response();
        }
        let kind = (CONTENT_TYPE, self.kind);
        if takes_gzip(headers) {
            (common, [kind, (CONTENT_ENCODING, "gzip")], self.packed).into_response()
        } else {
            (common, [kind], self.plain()).into_response()
        }
    }

    fn plain(&self) -> Bytes {
        let unpack = || {
            let mut plain = Vec::new();
            GzDecoder::new(self.packed).read_to_end(&mut plain).expect("build.rs packed it whole");
            plain.into()
        };
        self.plain.get_or_init(unpack).clone()
    }
}

/// The entries of a field that is a list, in all its lines.
fn listed<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let lines = headers.get_all(name).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim)
}

/// Whether a client names gzip, or anything, without a weight of nothing (RFC 9110, 12.5.3). Who does not say gets plain
/// bytes.
fn takes_gzip(headers: &HeaderMap) -> bool {
    let weight = |wanted: &str| {
        listed(headers, &ACCEPT_ENCODING).find_map(|entry| {
            let mut parts = entry.split(';').map(str::trim);
            parts.next().filter(|coding| coding.eq_ignore_ascii_case(wanted))?;
            let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
            Some(weight.map_or(1.0, |weight| weight.parse().unwrap_or(0.0)))
        })
    };
    weight("gzip").or_else(|| weight("*")).is_some_and(|weight: f32| weight > 0.0)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_for_those_who_take_it() {
        for (accept, expected) in [
            ("", false),
            ("identity", false),
            ("br, zstd", false),
            ("gzipped", false),
            ("gzip;q=0", false),
            ("gzip;q=0, *", false),
            ("*;q=0", false),
            ("gzip; q=0.0", false),
            ("gzip;q=x", false),
            ("gzip", true),
            ("GZIP;Q=0.1", true),
            ("gzip, deflate, br, zstd", true),
            ("br;q=1.0, gzip;q=0.8, *;q=0.1", true),
            ("*", true),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT_ENCODING, accept.parse().unwrap())]);
            assert_eq!(takes_gzip(&headers), expected, "{accept}");
        }
        assert!(!takes_gzip(&HeaderMap::new()));
    }

    #[test]
    fn every_file_of_the_console_is_packed_whole() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("console");
        let mut served = 0;
        for asset in ASSETS.iter().filter(|asset| asset.path.starts_with("console/")) {
            let file = folder.join(asset.path.strip_prefix("console/").unwrap());
            assert_eq!(asset.plain(), std::fs::read(file).unwrap(), "{}", asset.path);
            served += 1;
        }
        assert!(served > 10);
        assert!(find("console/package.json").is_none() && find("console/preact.source.js").is_none());
    }
}
