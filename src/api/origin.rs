//! Web pages stay out: a browser sends a page's requests from inside the user's machine, to addresses that nobody else
//! reaches, and an open Portolan on loopback starts programs for whoever asks.
//!
//! What a page cannot forge tells it apart. *Host* is the name the browser dialled: a page whose name was made to mean
//! 127.0.0.1 after it was loaded (DNS rebinding) still sends its own name. *Origin* goes with every request that may
//! change something, and with all that a page may read (Fetch, 3.2). *Sec-Fetch-Site* goes with the rest, images and
//! scripts (Fetch Metadata). What is no browser sends none of the last two, with the exception of JavaScript's `fetch`
//! outside of one, which sends `Sec-Fetch-Mode` alone. Bodies are the fourth rule, in `guard`: `application/json` is a
//! type that a page may not send elsewhere without having asked first.
//!
//! CORS is off. `--cors-origins` lists the pages that may come in all the same.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use axum::middleware::Next;
use axum::response::Response;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use url::{Host, Url};

use crate::config::{Browsers, Origin};
use crate::error::Error;

use super::{Access, X_REQUEST_ID, routes};

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const SEC_FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

/// How long a browser may remember that a listed page may come in.
const PREFLIGHT_AGE: Duration = Duration::from_secs(10 * 60);

/// The listed pages may list every origin only where callers need a token: otherwise any page could start programs.
#[derive(Debug, thiserror::Error)]
#[error(
    "--cors-origins * would let every web page start programs here, because no token is set; list the origins one by one, or \
     set a token."
)]
pub struct EveryPage;

/// Which requests may come in, by what browsers say of them. Clones share everything.
#[derive(Clone)]
pub struct Origins(Arc<Rules>);

struct Rules {
    /// The names beside those of loopback; `None`: any.
    hosts: Option<Vec<Host>>,
    pages: Vec<Origin>,
    /// The routes that another page may link to, as the router has them.
    linked: Vec<String>,
}

impl Origins {
    /// `open` says that no token is asked for.
    ///
    /// # Errors
    /// When every page would get at an open Portolan.
    pub fn new(settings: &Browsers, open: bool) -> Result<Self, EveryPage> {
        let pages = settings.cors_origins.clone();
        if open && pages.contains(&Origin::Any) {
            return Err(EveryPage);
        }
        // A page under another name has no token, so where one is asked for its name does not matter.
        let hosts = (open || !settings.allowed_hosts.is_empty()).then(|| settings.allowed_hosts.clone());
        let linked = routes().into_iter().filter(|route| route.access == Access::Open);
        let linked = linked.map(|route| route.path.trim_end_matches('/').to_owned()).collect();
        Ok(Self(Arc::new(Rules { hosts, pages, linked })))
    }

    /// The layer that lets listed pages read their answers; `None` when no page is listed. It answers their preflight
    /// requests by itself.
    pub fn cors(&self) -> Option<CorsLayer> {
        const SHOWN: [&str; 3] = ["retry-after", "x-portolan-repeated", "x-should-retry"];
        let pages = &self.0.pages;
        if pages.is_empty() {
            return None;
        }
        let one = |page: &Origin| match page {
            Origin::Any => None,
            Origin::One(text) => HeaderValue::from_str(text).ok(),
        };
        let allowed = match pages.contains(&Origin::Any) {
            true => AllowOrigin::any(),
            false => AllowOrigin::list(pages.iter().filter_map(one)),
        };
        let shown = SHOWN.into_iter().map(HeaderName::from_static).chain([X_REQUEST_ID]);
        Some(
            CorsLayer::new()
                .allow_origin(allowed)
                .allow_methods([Method::GET, Method::HEAD, Method::POST, Method::PATCH, Method::DELETE])
                // A listed page may do everything: which fields it sends beside changes nothing.
                .allow_headers(AllowHeaders::mirror_request())
                .expose_headers(shown.collect::<Vec<_>>())
                .max_age(PREFLIGHT_AGE),
        )
    }
}

impl Rules {
    fn judge(&self, request: &Request) -> Result<(), Error> {
        let target = target(request)?;
        if !target.as_ref().is_none_or(|target| self.is_ours(&target.host)) {
            return Err(Error::HostNotAllowed);
        }
        let headers = request.headers();
        let listed = match single(headers, &ORIGIN) {
            Single::None => false,
            Single::One(origin) if self.lists(origin) => true,
            Single::One(origin) if target.is_some_and(|target| target.is_origin(origin)) => false,
            Single::One(_) | Single::Unclear => return Err(Error::PageNotAllowed),
        };
        match single(headers, &SEC_FETCH_SITE) {
            Single::None | Single::One("same-origin" | "none") => Ok(()),
            _ if listed || self.is_link(request) => Ok(()),
            _ => Err(Error::PageNotAllowed),
        }
    }

    fn is_ours(&self, host: &Host) -> bool {
        let Some(listed) = &self.hosts else { return true };
        is_loopback(host) || listed.contains(host)
    }

    fn lists(&self, origin: &str) -> bool {
        let is_it = |page: &Origin| match page {
            // A page without an origin, in a sandbox or a file, could be anybody's, also of the listed ones.
            Origin::Any => origin != "null",
            Origin::One(known) => known == origin,
        };
        self.pages.iter().any(is_it)
    }

    /// Whether the user follows another page's link to a page of ours that is there for everybody. The other page sees
    /// nothing of it; inside a frame it could.
    fn is_link(&self, request: &Request) -> bool {
        let says = |name, value| matches!(single(request.headers(), &name), Single::One(said) if said == value);
        let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().trim_end_matches('/'));
        matches!(*request.method(), Method::GET | Method::HEAD)
            && says(SEC_FETCH_MODE, "navigate")
            && says(SEC_FETCH_DEST, "document")
            && path.is_some_and(|path| self.linked.iter().any(|linked| linked == path))
    }
}

/// A header field that may stand there once.
enum Single<'a> {
    None,
    One(&'a str),
    /// Several times, or not in ASCII.
    Unclear,
}

fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Single<'a> {
    let mut values = headers.get_all(name).iter();
    match (values.next().map(HeaderValue::to_str), values.next()) {
        (None, _) => Single::None,
        (Some(Ok(value)), None) => Single::One(value),
        _ => Single::Unclear,
    }
}

/// Where a request says that it is going.
#[derive(PartialEq)]
struct Target {
    host: Host,
    port: Option<u16>,
}

impl Target {
    /// As browsers read it: `127.1` is 127.0.0.1, and a name's case and last dot do not count.
    fn read(text: &str) -> Option<Self> {
        let authority: Authority = text.parse().ok().filter(|_| !text.contains('@'))?;
        let port = authority.port_u16();
        // `host:` and `host:99999` have a colon and no port.
        if port.is_none() && text.len() != authority.host().len() {
            return None;
        }
        Some(Self { host: read_host(authority.host())?, port })
    }

    /// Whether a page of this origin came from here. A proxy may have taken TLS off, so the scheme does not count, but for
    /// the port that it stands for.
    fn is_origin(&self, origin: &str) -> bool {
        let Ok(url) = Url::parse(origin) else { return false };
        let default = match url.scheme() {
            "http" => 80,
            "https" => 443,
            _ => return false,
        };
        url.origin().ascii_serialization() == origin
            && url.host_str().and_then(read_host).is_some_and(|host| host == self.host)
            && url.port().unwrap_or(default) == self.port.unwrap_or(default)
    }
}

fn read_host(text: &str) -> Option<Host> {
    Host::parse(text.strip_suffix('.').unwrap_or(text)).ok()
}

/// One `Host`, unless HTTP/1.0 left it out, and the same in the target if that is a whole URL (RFC 9112, 3.2).
fn target(request: &Request) -> Result<Option<Target>, Error> {
    let field = match single(request.headers(), &HOST) {
        Single::None if request.version() < Version::HTTP_11 => None,
        Single::None | Single::Unclear => return Err(Error::HostUnclear),
        Single::One(text) => Some(Target::read(text).ok_or(Error::HostUnclear)?),
    };
    let Some(authority) = request.uri().authority() else { return Ok(field) };
    let target = Target::read(authority.as_str()).ok_or(Error::HostUnclear)?;
    if field.is_some_and(|field| field != target) { Err(Error::HostUnclear) } else { Ok(Some(target)) }
}

fn is_loopback(host: &Host) -> bool {
    match host {
        Host::Domain(name) => name == "localhost",
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.to_canonical().is_loopback(),
    }
}

/// The layer around all routes.
pub async fn check(State(origins): State<Origins>, request: Request, next: Next) -> Result<Response, Error> {
    if let Err(error) = origins.0.judge(&request) {
        tracing::debug!(reason = %error, "refused what a browser says of a request");
        return Err(error);
    }
    Ok(next.run(request).await)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use axum::body::Body;
    use clap::Parser;

    use super::*;
    use crate::config::Cli;

    fn judge(arguments: &[&str], open: bool, host: &str, origin: &str) -> Option<Error> {
        let settings = Cli::parse_from(["portolan"].iter().chain(arguments)).settings;
        let request = Request::get("/v1/mcp-servers/").header(HOST, host);
        let request = if origin.is_empty() { request } else { request.header(ORIGIN, origin) };
        Origins::new(&settings.browsers, open).unwrap().0.judge(&request.body(Body::empty()).unwrap()).err()
    }

    #[test]
    fn with_a_token_any_name_will_do_until_one_is_listed() {
        let listed = ["--allowed-hosts", "a.test"];
        for (arguments, open, host, is_ours) in [
            (&[][..], true, "a.test", false),
            (&[], false, "a.test", true),
            (&listed, true, "a.test", true),
            (&listed, false, "a.test", true),
            (&listed, false, "b.test", false),
            (&listed, false, "localhost", true),
        ] {
            let refused = judge(arguments, open, host, "");
            assert_eq!(refused.is_none(), is_ours, "{arguments:?} {open} {host}");
            assert!(refused.is_none_or(|error| matches!(error, Error::HostNotAllowed)));
        }
    }

    #[test]
    fn pages_are_refused_also_where_a_token_is_asked_for() {
        for (arguments, origin, comes_in) in [
            (&[][..], "http://a.test", true),
            (&[], "https://b.test", false),
            (&["--cors-origins", "https://b.test"], "https://b.test", true),
            (&["--cors-origins", "https://b.test"], "https://c.test", false),
            (&["--cors-origins", "*"], "https://c.test", true),
            (&["--cors-origins", "*"], "null", false),
        ] {
            assert_eq!(judge(arguments, false, "a.test", origin).is_none(), comes_in, "{arguments:?} {origin}");
        }
    }
}
