//! Every outbound byte: which addresses are connected to, and the HTTP clients that do it.
//!
//! A [`Destination`] is the only way to send something, and [`Egress`] the only one to get one. Whoever registers a
//! server may name private addresses, because that is where self-hosted ones are; what another server names
//! ([`Trust::Supplied`]) is on the origin that was configured, or public and https. `--egress strict` judges both like the
//! latter. What the operator's own settings name ([`Trust::Operator`]) may be anywhere. Nobody gets to what `address`
//! refuses, to Portolan itself, to its database, or to `--egress-deny`.
//!
//! An address in a URL is checked here; a name is looked up by the HTTP client when it makes a connection, and gets from
//! us only those of its addresses that may be connected to. The client dials what was checked, and nothing looks the name
//! up a second time: a name that changes its mind (DNS rebinding) reaches nothing. A connection that was made is kept
//! and used again.
//!
//! Redirects are followed on one origin alone, those of what the operator names not at all, and no proxy of the environment
//! is used.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use http::Method;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use rustls_platform_verifier::BuilderVerifierExt;
use url::{Host, Url};

use crate::config::{self, Allowed, Lookup, Profile};

use super::Error;
use super::address::{Forbidden, Scope, UrlError, literal, meant, plain, scope, server_url};

/// How many redirects are followed in a row.
const MAX_REDIRECTS: usize = 3;

/// How long an unused connection to a server is kept.
const IDLE_CONNECTION: Duration = Duration::from_secs(60);

/// The system's certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(String);

/// Who names an address.
#[derive(Clone, Copy, Debug)]
pub enum Trust<'a> {
    /// Whoever starts Portolan.
    Operator,
    /// Whoever registers servers.
    Configured,
    /// The server at this URL.
    Supplied { by: &'a Url },
}

/// Which addresses a name may resolve to, beside the rules for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Reach {
    /// As the operator says: anywhere, and nowhere else.
    Named,
    Anywhere,
    /// Public ones, and networks of the allow-list.
    Public,
    /// Networks of the allow-list.
    Listed,
}

/// The way out. Clones share everything.
#[derive(Clone)]
pub struct Egress(Arc<Shared>);

struct Shared {
    rules: Arc<Rules>,
    connect_timeout: Duration,
    /// Reading the system's certificates takes 45 ms and memory: once for all clients.
    tls: rustls::ClientConfig,
    /// By what names may resolve to, and the port if it is one of ours: a resolver is told the name alone. Twelve at most.
    clients: Mutex<HashMap<(Reach, Option<u16>), reqwest::Client>>,
}

/// One URL that may be connected to, as far as its text tells.
#[derive(Clone)]
pub struct Destination {
    client: reqwest::Client,
    url: Url,
}

impl Egress {
    /// `database` is where Portolan's own is, if it has an address.
    ///
    /// # Errors
    /// When the system's certificates cannot be used.
    pub fn new(
        settings: &config::Egress,
        connect_timeout: Duration,
        database: Option<(String, u16)>,
    ) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let no_tls = |error: rustls::Error| TlsError(error.to_string());
        let tls = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let tls = tls.and_then(|tls| tls.with_platform_verifier()).map_err(no_tls)?;
        let mut tls = tls.with_no_client_auth();
        tls.alpn_protocols = vec!["http/1.1".into()];
        let rules = Rules {
            is_strict: settings.egress == Profile::Strict,
            allow: settings.egress_allow.clone(),
            deny: settings.egress_deny.clone(),
            lookup: settings.lookup.clone(),
            listeners: Default::default(),
            database,
        };
        Ok(Self(Arc::new(Shared { rules: Arc::new(rules), connect_timeout, tls, clients: Mutex::default() })))
    }

    /// Portolan listens on this port, and connects to itself no more. For two ports at most.
    pub fn listens_on(&self, port: u16) {
        // A process listens for clients, and perhaps for those who ask for metrics.
        let [first, second] = &self.0.rules.listeners;
        if let Err(port) = first.set(port) {
            let _ = second.set(port);
        }
    }

    /// The way to a URL that `trust` names.
    ///
    /// # Errors
    /// [`Error::Url`], or one of [`Forbidden`] as an error of HTTP: nothing was sent.
    pub async fn to(&self, url: &str, trust: Trust<'_>) -> Result<Destination, Error> {
        let url = server_url(url).map_err(|error| match error {
            UrlError::Forbidden(forbidden) => forbidden.into(),
            UrlError::Syntax | UrlError::Ambiguous => Error::Url,
        })?;
        let rules = &self.0.rules;
        let reach = rules.reach(&url, trust);
        let port = url.port_or_known_default().unwrap_or_default();
        if let Some(address) = literal(&url) {
            rules.check(address, reach, &rules.ours(port).await)?;
        } else if rules.is_database(&url) {
            return Err(Forbidden::Database.into());
        } else if reach == Reach::Listed && !rules.allow.iter().any(|entry| matches!(entry, Allowed::Network(_))) {
            return Err(Forbidden::NotHttps.into());
        }
        let client = self.client(reach, Some(port).filter(|port| rules.is_port_of_ours(*port)))?;
        Ok(Destination { client, url })
    }

    fn client(&self, reach: Reach, port_of_ours: Option<u16>) -> Result<reqwest::Client, Error> {
        let mut clients = self.0.clients.lock().expect("no code panics while it holds the clients");
        if let Some(client) = clients.get(&(reach, port_of_ours)) {
            return Ok(client.clone());
        }
        let names = Names { rules: self.0.rules.clone(), reach, port_of_ours };
        let built = reqwest::Client::builder()
            .user_agent(concat!("portolan/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            .tls_backend_preconfigured(self.0.tls.clone())
            .dns_resolver(names)
            .redirect(if reach == Reach::Named { Policy::none() } else { same_origin_redirects() })
            .referer(false)
            .no_proxy()
            .tcp_nodelay(true)
            .connect_timeout(self.0.connect_timeout)
            .pool_idle_timeout(IDLE_CONNECTION)
            .build();
        let client = built.map_err(|error| Error::Http(error.into()))?;
        clients.insert((reach, port_of_ours), client.clone());
        Ok(client)
    }
}

impl Destination {
    pub fn request(&self, method: Method) -> reqwest::RequestBuilder {
        self.client.request(method, self.url.clone())
    }

    /// The address that this one names: relative ones are resolved against its own URL. `None` for another origin,
    /// because the server's headers and token go there. User and password stay what they are.
    pub fn beside(&self, reference: &str) -> Option<Self> {
        Some(Self { client: self.client.clone(), url: beside(&self.url, reference)? })
    }
}

fn beside(base: &Url, reference: &str) -> Option<Url> {
    let mut url = base.join(Some(reference.trim()).filter(|reference| !reference.is_empty())?).ok()?;
    let stays = url.origin() == base.origin();
    // They can be set: the URL has a host.
    let _ = url.set_username(base.username());
    let _ = url.set_password(base.password());
    stays.then_some(url)
}

/// What is ours on one port.
enum Ours {
    /// Nothing.
    Nothing,
    Some {
        listener: bool,
        /// Where the database is; `None` when it cannot be found out.
        database: Option<Vec<IpAddr>>,
    },
}

struct Rules {
    is_strict: bool,
    allow: Vec<Allowed>,
    deny: Vec<ipnet::IpNet>,
    lookup: Lookup,
    /// The ports that Portolan listens on.
    listeners: [OnceLock<u16>; 2],
    database: Option<(String, u16)>,
}

impl Rules {
    fn reach(&self, url: &Url, trust: Trust<'_>) -> Reach {
        let is_trusted = match trust {
            Trust::Operator => return Reach::Named,
            Trust::Configured => true,
            Trust::Supplied { by } => by.origin() == url.origin(),
        };
        if (is_trusted && !self.is_strict) || self.allows(url) {
            Reach::Anywhere
        } else if url.scheme() == "https" {
            Reach::Public
        } else {
            Reach::Listed
        }
    }

    /// Whether the allow-list has the very host of this URL.
    fn allows(&self, url: &Url) -> bool {
        let port = url.port_or_known_default();
        let on = |wanted: &Option<u16>| wanted.is_none() || *wanted == port;
        match url.host() {
            Some(Host::Domain(host)) => self.allow.iter().any(|entry| match entry {
                Allowed::Name { name, port } => on(port) && name == plain(host),
                Allowed::Suffix { name, port } => {
                    on(port) && plain(host).strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'))
                }
                Allowed::Address { .. } | Allowed::Network(_) => false,
            }),
            _ => self.allow.iter().any(|entry| match entry {
                Allowed::Address { address, port: wanted } => {
                    literal(url).map(meant) == Some(*address) && Some(*wanted) == port
                }
                _ => false,
            }),
        }
    }

    fn is_listened_on(&self, port: u16) -> bool {
        self.listeners.iter().any(|listener| listener.get() == Some(&port))
    }

    fn is_port_of_ours(&self, port: u16) -> bool {
        self.is_listened_on(port) || self.database.as_ref().is_some_and(|database| database.1 == port)
    }

    /// Whether a URL has the database's own name.
    fn is_database(&self, url: &Url) -> bool {
        self.database.as_ref().is_some_and(|(host, port)| {
            let same = url.host_str().is_some_and(|name| plain(name).eq_ignore_ascii_case(plain(host)));
            same && url.port_or_known_default() == Some(*port)
        })
    }

    async fn ours(&self, port: u16) -> Ours {
        if !self.is_port_of_ours(port) {
            return Ours::Nothing;
        }
        let database = match &self.database {
            Some((host, at)) if *at == port => self.look_up(host).await.ok(),
            _ => Some(Vec::new()),
        };
        Ours::Some { listener: self.is_listened_on(port), database }
    }

    /// Whether this address may be connected to.
    fn check(&self, address: IpAddr, reach: Reach, ours: &Ours) -> Result<(), Forbidden> {
        let scope = scope(address)?;
        let meant = meant(address);
        if let Ours::Some { listener, database } = ours {
            if *listener && is_local(meant) {
                return Err(Forbidden::Own);
            }
            // A database on this machine mostly listens on several of its addresses.
            let is_there = |at: &IpAddr| *at == meant || (is_local(*at) && is_local(meant));
            if database.as_ref().is_none_or(|database| database.iter().any(is_there)) {
                return Err(Forbidden::Database);
            }
        }
        if self.deny.iter().any(|network| network.contains(&address) || network.contains(&meant)) {
            return Err(Forbidden::Denied);
        }
        let listed = || {
            let mut networks = self.allow.iter();
            networks.any(|entry| matches!(entry, Allowed::Network(network) if network.contains(&meant)))
        };
        match reach {
            Reach::Named | Reach::Anywhere => Ok(()),
            Reach::Public if scope == Scope::Public || listed() => Ok(()),
            Reach::Public => Err(Forbidden::NotPublic),
            Reach::Listed if listed() => Ok(()),
            Reach::Listed => Err(Forbidden::NotHttps),
        }
    }

    /// All addresses of a name.
    async fn look_up(&self, name: &str) -> std::io::Result<Vec<IpAddr>> {
        if let Ok(address) = name.parse() {
            return Ok(vec![address]);
        }
        match &self.lookup.0 {
            Some(lookup) => {
                let found = Some(lookup(name)).filter(|found| !found.is_empty());
                found.ok_or_else(|| std::io::Error::other("the name is not known"))
            }
            None => Ok(tokio::net::lookup_host((name, 0)).await?.map(|found| found.ip()).collect()),
        }
    }
}

/// Whether an address is one of this machine's: something can be bound to it.
fn is_local(address: IpAddr) -> bool {
    address.is_loopback() || UdpSocket::bind((address, 0)).is_ok()
}

/// The resolver of one client.
struct Names {
    rules: Arc<Rules>,
    reach: Reach,
    port_of_ours: Option<u16>,
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let (rules, reach, port) = (self.rules.clone(), self.reach, self.port_of_ours);
        Box::pin(async move {
            let found = rules.look_up(name.as_str()).await?;
            let ours = match port {
                Some(port) => rules.ours(port).await,
                None => Ours::Nothing,
            };
            let mut refusal = None;
            let mut allowed = Vec::with_capacity(found.len());
            for address in found {
                match rules.check(address, reach, &ours) {
                    // The client puts the port in.
                    Ok(()) => allowed.push(SocketAddr::new(address, 0)),
                    Err(forbidden) => refusal = refusal.or(Some(forbidden)),
                }
            }
            match refusal {
                Some(forbidden) if allowed.is_empty() => Err(forbidden.into()),
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

/// Follows 307 and 308, which keep method and body, on the origin that an administrator wrote; frameworks send these for
/// a missing slash. What leads elsewhere is answered to the caller as it is: the server's token must not go there.
fn same_origin_redirects() -> Policy {
    Policy::custom(|attempt| {
        let first = attempt.previous().first();
        let stays = first.is_some_and(|first| first.origin() == attempt.url().origin());
        let keeps = matches!(attempt.status().as_u16(), 307 | 308);
        if stays && keeps && attempt.previous().len() <= MAX_REDIRECTS { attempt.follow() } else { attempt.stop() }
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_resolved_against_the_base_and_stay_on_its_origin() {
        let base = Url::parse("http://127.0.0.1:9/a/sse?x=1").unwrap();
        let joined = |endpoint| beside(&base, endpoint).map(String::from);
        assert_eq!(joined("messages?s=1").unwrap(), "http://127.0.0.1:9/a/messages?s=1");
        assert_eq!(joined("/messages?s=1").unwrap(), "http://127.0.0.1:9/messages?s=1");
        assert_eq!(joined("http://127.0.0.1:9/b").unwrap(), "http://127.0.0.1:9/b");
        for foreign in ["http://127.0.0.1:8/b", "https://127.0.0.1:9/b", "//example.com/b", "file:///etc/passwd", ""] {
            assert_eq!(joined(foreign), None, "{foreign}");
        }
    }
}
