//! An OAuth authorization server, [`Authority`], and [`Guard`], which keeps those without its tokens from a fake MCP server.
//!
//! The authority is as strict as a good one: exact redirect addresses, PKCE with S256 alone, codes for one use, secrets of
//! clients, tokens for the one server they were asked for (RFC 8707), and refresh tokens that end all that came from a sign-in
//! when they come twice. [`Rules`] say where it is not as a good one would be. It keeps a record of all that it was asked.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use ::http::{HeaderMap, Method, StatusCode, header, request::Parts};
use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    handler::Handler,
    response::Response,
};
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use futures_util::stream;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use url::{Url, form_urlencoded};
use uuid::Uuid;

use super::{
    anywhere,
    http::{header as field, json as in_json, plain, with},
    locked,
};

/// Where a client finds out about the authority (RFC 8414, 3).
pub(crate) const METADATA: &str = "/.well-known/oauth-authorization-server";
/// Where a client finds out about the MCP server (RFC 9728, 3), its own path after it.
pub(crate) const RESOURCE: &str = "/.well-known/oauth-protected-resource";

const REGISTER: &str = "/register";
const AUTHORIZE: &str = "/authorize";
pub(crate) const TOKEN: &str = "/token";

const BODY_LIMIT: usize = 1 << 20;

/// What the authority does, and what it does wrong.
#[derive(Clone)]
pub(crate) struct Rules {
    /// How long access tokens last, in seconds; `None`: it does not say, and they last an hour.
    pub(crate) expires_in: Option<u64>,
    /// How long they really last; `None`: as it says.
    pub(crate) lasts: Option<Duration>,
    pub(crate) refresh: Refresh,
    /// The user says no.
    pub(crate) refuses: bool,
    /// The `iss` beside a code (RFC 9207): `None`: its own name; empty: none at all.
    pub(crate) iss: Option<String>,
    pub(crate) registration: Registration,
    /// Takes URLs for the ids of clients, and reads their documents from this origin, whatever theirs is.
    pub(crate) client_documents: Option<String>,
    /// Put over its metadata; null takes a member away.
    pub(crate) metadata: Value,
    /// What is answered in place of what a path is for.
    pub(crate) instead: HashMap<String, Instead>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            expires_in: Some(3600),
            lasts: None,
            refresh: Refresh::Rotates,
            refuses: false,
            iss: None,
            registration: Registration::Public,
            client_documents: None,
            metadata: json!({}),
            instead: HashMap::new(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Refresh {
    /// Another refresh token each time; the old one is worth nothing any more.
    Rotates,
    /// Gives out no refresh tokens.
    Never,
    /// `invalid_grant`
    Refuses,
    /// 500
    Fails,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Registration {
    Closed,
    /// Clients without a secret.
    Public,
    /// Gives a secret, to be sent in this way.
    Secret(Said),
}

/// How a client says its secret (RFC 6749, 2.3.1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Said {
    Basic,
    Post,
}

/// A misbehaviour.
#[derive(Clone, Debug)]
pub(crate) enum Instead {
    Status(u16),
    /// JSON, whatever it is.
    Text(String),
    /// 307 to there.
    Redirect(String),
    /// A document without end, as fast as it is taken.
    Huge,
    /// A document without end, a byte at a time.
    Drips,
}

/// One request that the authority has seen.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: Method,
    pub(crate) path: String,
    /// Of the query and, in a form or an object, of the body.
    pub(crate) params: BTreeMap<String, String>,
    pub(crate) authorization: Option<String>,
}

impl Asked {
    pub(crate) fn param(&self, name: &str) -> &str {
        self.params.get(name).map(String::as_str).unwrap_or_default()
    }
}

#[derive(Clone)]
struct Client {
    id: String,
    secret: Option<(Said, String)>,
    redirect_uris: Vec<String>,
}

struct Code {
    client_id: String,
    redirect_uri: String,
    challenge: String,
    resource: String,
    scope: String,
    used: bool,
    family: usize,
}

struct Token {
    client_id: String,
    resource: String,
    scope: String,
    family: usize,
    /// Of an access token.
    ends: Instant,
    /// A refresh token that was used.
    spent: bool,
}

#[derive(Default)]
struct Books {
    clients: HashMap<String, Client>,
    codes: HashMap<String, Code>,
    access: HashMap<String, Token>,
    refresh: HashMap<String, Token>,
    /// Sign-ins of which nothing is good any more.
    ended: HashSet<usize>,
    /// Codes and refresh tokens that came twice.
    reused: usize,
    families: usize,
    /// How often tokens were given, by `grant_type`.
    granted: HashMap<String, usize>,
    asked: Vec<Asked>,
    /// Paths that are not answered before somebody says so.
    held: HashMap<String, Arc<Semaphore>>,
}

/// What listeners share.
struct Issuer {
    /// Its own URL, without a slash at the end.
    url: OnceLock<String>,
    rules: Mutex<Rules>,
    books: Mutex<Books>,
    accepted: AtomicUsize,
}

/// An authorization server. Dropping it closes its port, if it has one.
pub(crate) struct Authority {
    issuer: Arc<Issuer>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// Answers to a path wait until this is dropped.
pub(crate) struct Hold(Arc<Semaphore>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Authority {
    /// Listens on any free port of 127.0.0.1.
    pub(crate) fn start(rules: Rules) -> Self {
        let mut authority = Self::embedded(rules);
        let listener = std::net::TcpListener::bind(anywhere()).expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        authority.issuer.url.set(format!("http://{addr}")).expect("it is new");
        let (issuer, counting, stop) = (authority.issuer.clone(), authority.issuer.clone(), authority.stop.clone());
        authority.thread = Some(super::listen(listener, listening.with_state(issuer), stop, move || {
            counting.accepted.fetch_add(1, Relaxed);
        }));
        authority
    }

    /// On the very origin of the MCP server that it guards.
    pub(crate) fn embedded(rules: Rules) -> Self {
        let issuer = Issuer {
            url: OnceLock::new(),
            rules: Mutex::new(rules),
            books: Mutex::default(),
            accepted: AtomicUsize::new(0),
        };
        Self { issuer: Arc::new(issuer), stop: CancellationToken::new(), thread: None }
    }

    /// What keeps others from an MCP server.
    pub(crate) fn guard(&self) -> Arc<Guard> {
        let is_embedded = self.thread.is_none();
        Arc::new(Guard {
            issuer: self.issuer.clone(),
            is_embedded,
            metadata: Mutex::new(json!({})),
            challenge: Mutex::default(),
        })
    }

    /// Its name, and the start of all its URLs.
    pub(crate) fn url(&self) -> String {
        self.issuer.url().to_owned()
    }

    /// As `--egress-allow` has it.
    pub(crate) fn authority(&self) -> String {
        self.url().trim_start_matches("http://").to_owned()
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut locked(&self.issuer.rules));
    }

    /// Registers a client by hand.
    pub(crate) fn register(&self, id: &str, secret: Option<(Said, &str)>, redirect_uri: &str) {
        let secret = secret.map(|(method, secret)| (method, secret.to_owned()));
        let client = Client { id: id.to_owned(), secret, redirect_uris: vec![redirect_uri.to_owned()] };
        self.books().clients.insert(id.to_owned(), client);
    }

    pub(crate) fn hold(&self, path: &str) -> Hold {
        let gate = Arc::new(Semaphore::new(0));
        self.books().held.insert(path.to_owned(), gate.clone());
        Hold(gate)
    }

    /// Access tokens that were given are worth nothing any more; their refresh tokens are.
    pub(crate) fn expire(&self) {
        let now = Instant::now();
        self.books().access.values_mut().for_each(|token| token.ends = now);
    }

    /// No token that was given is worth anything any more.
    pub(crate) fn revoke(&self) {
        let mut books = self.books();
        let families = 0..books.families;
        books.ended.extend(families);
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.books().asked.clone()
    }

    /// How often it was asked for this path.
    pub(crate) fn count(&self, path: &str) -> usize {
        self.books().asked.iter().filter(|asked| asked.path == path).count()
    }

    /// How often it gave tokens for this `grant_type`.
    pub(crate) fn granted(&self, grant_type: &str) -> usize {
        self.books().granted.get(grant_type).copied().unwrap_or_default()
    }

    /// How often somebody tried for tokens with this `grant_type`.
    pub(crate) fn tried(&self, grant_type: &str) -> usize {
        let books = self.books();
        books.asked.iter().filter(|asked| asked.path == TOKEN && asked.param("grant_type") == grant_type).count()
    }

    /// Codes and refresh tokens that came twice.
    pub(crate) fn reused(&self) -> usize {
        self.books().reused
    }

    /// How many TCP connections came in.
    pub(crate) fn connections(&self) -> usize {
        self.issuer.accepted.load(Relaxed)
    }

    /// Every secret that it gave out or was shown, but for secrets of clients that were registered by hand.
    pub(crate) fn secrets(&self) -> Vec<String> {
        let books = self.books();
        let given = books.codes.keys().chain(books.access.keys()).chain(books.refresh.keys());
        let mut secrets: Vec<_> = given.cloned().collect();
        secrets.extend(books.clients.values().filter_map(|client| Some(client.secret.as_ref()?.1.clone())));
        for name in ["code_verifier", "state"] {
            secrets.extend(books.asked.iter().filter_map(|asked| asked.params.get(name).cloned()));
        }
        secrets
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        locked(&self.issuer.books)
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Keeps those without a token from one MCP server.
pub(crate) struct Guard {
    issuer: Arc<Issuer>,
    is_embedded: bool,
    metadata: Mutex<Value>,
    challenge: Mutex<Option<String>>,
}

impl Guard {
    /// Put over what it says of the MCP server; null takes a member away.
    pub(crate) fn set_metadata(&self, metadata: Value) {
        *locked(&self.metadata) = metadata;
    }

    /// In place of its own `WWW-Authenticate`.
    pub(crate) fn set_challenge(&self, challenge: &str) {
        *locked(&self.challenge) = Some(challenge.to_owned());
    }

    pub(crate) fn unset_challenge(&self) {
        *locked(&self.challenge) = None;
    }

    /// What a request to the server at `addr` is answered in the server's place; `None` when it carries a token.
    pub(super) async fn answer(&self, addr: SocketAddr, head: &Parts, body: &[u8]) -> Option<Response> {
        let path = head.uri.path();
        if self.is_embedded {
            self.issuer.url.get_or_init(|| format!("http://{addr}"));
        }
        if let Some(of) = path.strip_prefix(RESOURCE) {
            let mut document = json!({
                "resource": format!("http://{addr}{of}"),
                "authorization_servers": [self.issuer.url()],
                "bearer_methods_supported": ["header"],
                "scopes_supported": ["tools"],
            });
            put_over(&mut document, &locked(&self.metadata));
            let instead = locked(&self.issuer.rules).instead.get(RESOURCE).cloned();
            return Some(match instead {
                Some(instead) => misbehave(instead),
                None => in_json(StatusCode::OK, document.to_string()),
            });
        }
        if self.is_embedded && [METADATA, REGISTER, AUTHORIZE, TOKEN].contains(&path) {
            return Some(self.issuer.answer(head, body).await);
        }
        // The address that its messages are posted to belongs to the stream.
        let of = path.strip_suffix("messages").map_or_else(|| path.to_owned(), |base| format!("{base}sse"));
        let bearer = field(&head.headers, "authorization").and_then(|value| value.strip_prefix("Bearer "));
        if bearer.is_some_and(|token| self.issuer.knows(token, &format!("http://{addr}{of}"))) {
            return None;
        }
        let error = if bearer.is_some() { r#"error="invalid_token", "# } else { "" };
        let own = || format!(r#"Bearer {error}resource_metadata="http://{addr}{RESOURCE}{of}""#);
        let challenge = locked(&self.challenge).clone().unwrap_or_else(own);
        Some(with(plain(StatusCode::UNAUTHORIZED), header::WWW_AUTHENTICATE, &challenge))
    }
}

async fn listening(State(issuer): State<Arc<Issuer>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    match to_bytes(body, BODY_LIMIT).await {
        Ok(body) => issuer.answer(&head, &body).await,
        Err(_) => plain(StatusCode::PAYLOAD_TOO_LARGE),
    }
}

/// Why a request for tokens is refused (RFC 6749, 5.2).
type Refusal = (StatusCode, &'static str);

const INVALID_REQUEST: Refusal = (StatusCode::BAD_REQUEST, "invalid_request");
const INVALID_CLIENT: Refusal = (StatusCode::UNAUTHORIZED, "invalid_client");
const INVALID_GRANT: Refusal = (StatusCode::BAD_REQUEST, "invalid_grant");
const INVALID_TARGET: Refusal = (StatusCode::BAD_REQUEST, "invalid_target");

impl Issuer {
    fn url(&self) -> &str {
        self.url.get().expect("an embedded authority was asked for its URL before its server was asked for anything")
    }

    fn rules(&self) -> Rules {
        locked(&self.rules).clone()
    }

    /// Whether this is a token for the server at `resource`.
    fn knows(&self, token: &str, resource: &str) -> bool {
        let books = locked(&self.books);
        let found = books.access.get(token);
        found.is_some_and(|token| {
            token.resource == resource && Instant::now() < token.ends && !books.ended.contains(&token.family)
        })
    }

    async fn answer(&self, head: &Parts, body: &[u8]) -> Response {
        let path = head.uri.path();
        let asked = Asked {
            method: head.method.clone(),
            path: path.to_owned(),
            params: params(head, body),
            authorization: field(&head.headers, "authorization").map(str::to_owned),
        };
        let held = {
            let mut books = locked(&self.books);
            books.asked.push(asked.clone());
            books.held.get(path).cloned()
        };
        if let Some(held) = held {
            // It is never given, only closed.
            let _opened = held.acquire().await;
        }
        let rules = self.rules();
        if let Some(instead) = rules.instead.get(path) {
            return misbehave(instead.clone());
        }
        match (&head.method, path) {
            (&Method::GET, METADATA) => in_json(StatusCode::OK, self.metadata(&rules).to_string()),
            (&Method::POST, REGISTER) => self.register(&rules, body),
            (&Method::GET, AUTHORIZE) => self.authorize(&rules, &asked).await,
            (&Method::POST, TOKEN) => match self.token(&rules, &asked, &head.headers) {
                Ok(tokens) => with(in_json(StatusCode::OK, tokens.to_string()), header::CACHE_CONTROL, "no-store"),
                Err((status, error)) => in_json(status, json!({ "error": error }).to_string()),
            },
            _ => plain(StatusCode::NOT_FOUND),
        }
    }

    fn metadata(&self, rules: &Rules) -> Value {
        let url = self.url();
        let mut document = json!({
            "issuer": url,
            "authorization_endpoint": format!("{url}{AUTHORIZE}"),
            "token_endpoint": format!("{url}{TOKEN}"),
            "registration_endpoint": format!("{url}{REGISTER}"),
            "response_types_supported": ["code"],
            "grant_types_supported": ["authorization_code", "refresh_token", "client_credentials"],
            "code_challenge_methods_supported": ["S256"],
            "token_endpoint_auth_methods_supported": ["none", "client_secret_basic", "client_secret_post"],
            "authorization_response_iss_parameter_supported": true,
            "client_id_metadata_document_supported": rules.client_documents.is_some(),
            "scopes_supported": ["tools"],
        });
        if rules.registration == Registration::Closed {
            put_over(&mut document, &json!({ "registration_endpoint": null }));
        }
        put_over(&mut document, &rules.metadata);
        document
    }

    /// RFC 7591, 3.
    fn register(&self, rules: &Rules, body: &[u8]) -> Response {
        let refuse = |error: &str| in_json(StatusCode::BAD_REQUEST, json!({ "error": error }).to_string());
        let Ok(Value::Object(wanted)) = serde_json::from_slice(body) else { return refuse("invalid_client_metadata") };
        let uris = wanted.get("redirect_uris").and_then(Value::as_array).cloned().unwrap_or_default();
        let redirect_uris: Vec<_> = uris.iter().filter_map(|uri| Some(uri.as_str()?.to_owned())).collect();
        if redirect_uris.is_empty() || redirect_uris.len() != uris.len() {
            return refuse("invalid_redirect_uri");
        }
        let secret = match rules.registration {
            Registration::Closed => return plain(StatusCode::NOT_FOUND),
            Registration::Public => None,
            Registration::Secret(method) => Some((method, secret("secret"))),
        };
        let client = Client { id: format!("client-{}", Uuid::new_v4()), secret, redirect_uris };
        let mut answer = json!({ "client_id": client.id, "client_id_issued_at": 1_700_000_000 });
        answer.as_object_mut().expect("it is one").extend(wanted);
        answer["token_endpoint_auth_method"] = json!("none");
        if let Some((method, secret)) = &client.secret {
            let method = match method {
                Said::Basic => "client_secret_basic",
                Said::Post => "client_secret_post",
            };
            put_over(
                &mut answer,
                &json!({
                    "client_secret": secret, "client_secret_expires_at": 0, "token_endpoint_auth_method": method
                }),
            );
        }
        locked(&self.books).clients.insert(client.id.clone(), client);
        in_json(StatusCode::CREATED, answer.to_string())
    }

    /// The user is asked, and answers at once. What may be wrong with the address that the user is sent back to is told to the
    /// user (RFC 6749, 4.1.2.1), the rest to the client.
    async fn authorize(&self, rules: &Rules, asked: &Asked) -> Response {
        let client_id = asked.param("client_id");
        let known = locked(&self.books).clients.get(client_id).cloned();
        let client = match (known, &rules.client_documents) {
            (Some(client), _) => Some(client),
            (None, Some(origin)) if client_id.starts_with("https://") => described(client_id, origin).await,
            _ => None,
        };
        let Some(client) = client else { return told(StatusCode::BAD_REQUEST, "unknown client") };
        let redirect_uri = asked.param("redirect_uri");
        if !client.redirect_uris.iter().any(|known| known == redirect_uri) {
            return told(StatusCode::BAD_REQUEST, "unknown redirect_uri");
        }
        let (challenge, resource) = (asked.param("code_challenge"), asked.param("resource"));
        let error = if rules.refuses {
            Some(("access_denied", "The user <b>said</b> no"))
        } else if asked.param("response_type") != "code" {
            Some(("unsupported_response_type", "code"))
        } else if asked.param("code_challenge_method") != "S256" || challenge.len() != 43 {
            Some(("invalid_request", "PKCE"))
        } else if asked.param("state").is_empty() {
            Some(("invalid_request", "state"))
        } else if !resource.starts_with("http") {
            Some(("invalid_target", "resource"))
        } else {
            None
        };
        let mut back = Url::parse(redirect_uri).expect("clients register URLs");
        let mut query = back.query_pairs_mut();
        match error {
            Some((error, description)) => {
                query.append_pair("error", error).append_pair("error_description", description);
            }
            None => {
                let mut books = locked(&self.books);
                books.families += 1;
                let code = Code {
                    client_id: client.id,
                    redirect_uri: redirect_uri.to_owned(),
                    challenge: challenge.to_owned(),
                    resource: resource.to_owned(),
                    scope: asked.param("scope").to_owned(),
                    used: false,
                    family: books.families - 1,
                };
                let text = secret("code");
                query.append_pair("code", &text);
                books.codes.insert(text, code);
            }
        }
        query.append_pair("state", asked.param("state"));
        match rules.iss.as_deref() {
            None => drop(query.append_pair("iss", self.url())),
            Some("") => {}
            Some(other) => drop(query.append_pair("iss", other)),
        }
        drop(query);
        with(plain(StatusCode::FOUND), header::LOCATION, back.as_str())
    }

    fn token(&self, rules: &Rules, asked: &Asked, headers: &HeaderMap) -> Result<Value, Refusal> {
        let form = field(headers, "content-type").unwrap_or_default();
        if !form.starts_with("application/x-www-form-urlencoded") {
            return Err(INVALID_REQUEST);
        }
        let mut books = locked(&self.books);
        let client = authenticate(&books, asked)?;
        let grant_type = asked.param("grant_type");
        let resource = asked.param("resource");
        let (family, resource, scope, is_person) = match grant_type {
            "authorization_code" => {
                let code = books.codes.get_mut(asked.param("code")).ok_or(INVALID_GRANT)?;
                if code.used {
                    let family = code.family;
                    books.ended.insert(family);
                    books.reused += 1;
                    return Err(INVALID_GRANT);
                }
                // Whatever comes of it: nobody gets a second try.
                code.used = true;
                let verifier = asked.param("code_verifier");
                let digest = BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(verifier));
                let is_right = code.client_id == client.id
                    && code.redirect_uri == asked.param("redirect_uri")
                    && (43..=128).contains(&verifier.len())
                    && code.challenge == digest;
                if !is_right {
                    return Err(INVALID_GRANT);
                }
                if code.resource != resource {
                    return Err(INVALID_TARGET);
                }
                (code.family, code.resource.clone(), code.scope.clone(), true)
            }
            "refresh_token" => {
                match rules.refresh {
                    Refresh::Refuses | Refresh::Never => return Err(INVALID_GRANT),
                    Refresh::Fails => return Err((StatusCode::INTERNAL_SERVER_ERROR, "server_error")),
                    Refresh::Rotates => {}
                }
                let token = books.refresh.get_mut(asked.param("refresh_token")).ok_or(INVALID_GRANT)?;
                let family = token.family;
                if token.client_id != client.id {
                    return Err(INVALID_GRANT);
                }
                if token.resource != resource {
                    return Err(INVALID_TARGET);
                }
                if std::mem::replace(&mut token.spent, true) {
                    books.ended.insert(family);
                    books.reused += 1;
                    return Err(INVALID_GRANT);
                }
                let (resource, scope) = (token.resource.clone(), token.scope.clone());
                if books.ended.contains(&family) {
                    return Err(INVALID_GRANT);
                }
                (family, resource, scope, true)
            }
            "client_credentials" => {
                if client.secret.is_none() {
                    return Err((StatusCode::BAD_REQUEST, "unauthorized_client"));
                }
                if !resource.starts_with("http") {
                    return Err(INVALID_TARGET);
                }
                books.families += 1;
                (books.families - 1, resource.to_owned(), asked.param("scope").to_owned(), false)
            }
            _ => return Err((StatusCode::BAD_REQUEST, "unsupported_grant_type")),
        };
        *books.granted.entry(grant_type.to_owned()).or_default() += 1;
        let lasts = rules.lasts.unwrap_or(Duration::from_secs(rules.expires_in.unwrap_or(3600)));
        let token = || Token {
            client_id: client.id.clone(),
            resource: resource.clone(),
            scope: scope.clone(),
            family,
            ends: Instant::now() + lasts,
            spent: false,
        };
        let access = secret("access");
        let mut answer = json!({ "access_token": access, "token_type": "Bearer" });
        books.access.insert(access, token());
        if let Some(seconds) = rules.expires_in {
            answer["expires_in"] = json!(seconds);
        }
        if !scope.is_empty() {
            answer["scope"] = json!(scope);
        }
        if is_person && rules.refresh != Refresh::Never {
            let refresh = secret("refresh");
            answer["refresh_token"] = json!(refresh);
            books.refresh.insert(refresh, token());
        }
        Ok(answer)
    }
}

/// The client that asks for tokens, which says its secret, if it has one, in the one way that was agreed.
fn authenticate(books: &Books, asked: &Asked) -> Result<Client, Refusal> {
    let basic = asked.authorization.as_deref().and_then(|value| value.strip_prefix("Basic "));
    let basic = basic.map(|basic| -> Option<_> {
        let text = String::from_utf8(BASE64_STANDARD.decode(basic).ok()?).ok()?;
        let (id, secret) = text.split_once(':')?;
        Some((decoded(id), decoded(secret)))
    });
    let (id, said) = match basic {
        Some(None) => return Err(INVALID_REQUEST),
        // Not both (RFC 6749, 2.3).
        Some(Some(_)) if asked.params.contains_key("client_secret") => return Err(INVALID_REQUEST),
        Some(Some((id, secret))) => (id, Some((Said::Basic, secret))),
        None => {
            let posted = asked.params.get("client_secret").map(|secret| (Said::Post, secret.clone()));
            (asked.param("client_id").to_owned(), posted)
        }
    };
    // One that describes itself in a document is taken at its word, which the code proves.
    let unregistered = || Client { id: id.clone(), secret: None, redirect_uris: Vec::new() };
    let client = match books.clients.get(&id) {
        Some(client) => client.clone(),
        None if id.starts_with("https://") => unregistered(),
        None => return Err(INVALID_CLIENT),
    };
    if client.secret == said { Ok(client) } else { Err(INVALID_CLIENT) }
}

/// The client of a client-id metadata document, read from another origin than it has.
async fn described(client_id: &str, origin: &str) -> Option<Client> {
    let path = Url::parse(client_id).ok()?.path().to_owned();
    let client = reqwest::Client::builder().no_proxy().build().ok()?;
    let document: Value = client.get(format!("{origin}{path}")).send().await.ok()?.json().await.ok()?;
    let uris = document["redirect_uris"].as_array()?.iter().filter_map(|uri| Some(uri.as_str()?.to_owned())).collect();
    let is_right = document["client_id"] == client_id
        && document["client_name"].is_string()
        && document["token_endpoint_auth_method"] == "none";
    is_right.then(|| Client { id: client_id.to_owned(), secret: None, redirect_uris: uris })
}

fn params(head: &Parts, body: &[u8]) -> BTreeMap<String, String> {
    let query = head.uri.query().unwrap_or_default();
    let mut params: BTreeMap<_, _> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    match serde_json::from_slice::<Map<String, Value>>(body) {
        Ok(object) => params.extend(object.into_iter().map(|(key, value)| match value {
            Value::String(text) => (key, text),
            other => (key, other.to_string()),
        })),
        Err(_) => params.extend(form_urlencoded::parse(body).into_owned()),
    }
    params
}

fn decoded(text: &str) -> String {
    form_urlencoded::parse(format!("v={text}").as_bytes()).next().map_or_else(String::new, |(_, value)| value.into())
}

fn secret(kind: &str) -> String {
    format!("{kind}-{}", Uuid::new_v4().simple())
}

fn put_over(document: &mut Value, changes: &Value) {
    let (Some(document), Some(changes)) = (document.as_object_mut(), changes.as_object()) else { return };
    for (key, value) in changes {
        match value {
            Value::Null => drop(document.shift_remove(key)),
            value => drop(document.insert(key.clone(), value.clone())),
        }
    }
}

fn told(status: StatusCode, reason: &str) -> Response {
    let mut response = Response::new(Body::from(reason.to_owned()));
    *response.status_mut() = status;
    response
}

fn misbehave(instead: Instead) -> Response {
    let endless = |chunk: Bytes, pause: Duration| {
        let pieces = stream::unfold(Bytes::from_static(b"{\"issuer\":\""), move |piece| {
            let chunk = chunk.clone();
            async move {
                tokio::time::sleep(pause).await;
                Some((Ok::<_, std::io::Error>(piece), chunk))
            }
        });
        let mut response = Response::new(Body::from_stream(pieces));
        let kind = "application/json".parse().expect("it is a header value");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    };
    match instead {
        Instead::Status(status) => plain(StatusCode::from_u16(status).expect("a status")),
        Instead::Text(text) => in_json(StatusCode::OK, text),
        Instead::Redirect(to) => with(plain(StatusCode::TEMPORARY_REDIRECT), header::LOCATION, &to),
        Instead::Huge => endless(Bytes::from(vec![b'x'; 64 * 1024]), Duration::ZERO),
        Instead::Drips => endless(Bytes::from_static(b"x"), Duration::from_millis(20)),
    }
}
