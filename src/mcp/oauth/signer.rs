//! The sign-in of one server, as its requests use it: a token in memory, new ones when it runs out.
//!
//! No request waits for the database while its token is good. New tokens are fetched once, whoever wants them: here by the
//! turn of the server, among several Portolans by the lease of the row ([`Store::lease_sign_in`]); who comes second reads
//! what the first has written. A fetch goes on when its caller leaves: a refresh token that was used and not stored is
//! lost.
//!
//! The token in memory is the one that is stored as far as is known: the feed of changes tells of a new sign-in, and while
//! that is interrupted ([`Store::epoch`]) each request looks into the database.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::{Instant, sleep, timeout};
use url::Url;

use crate::model::{Action, By, Connector, GrantType, OauthClient, Remote, SignIn};
use crate::secrets::{is_secret_name, is_secret_value};
use crate::store::{self, Store, StoredSignIn, now};
use crate::telemetry::metrics::RefreshResult;

use super::super::remote::{HttpError, read_over};
use super::SignIns;
use super::provider::{Provider, bare};
use super::token::{self, Grant, INVALID_GRANT, Tokens};
use super::way::Problem;

/// How long before its end a token is replaced, at most; a short-lived one in the last quarter of its life.
const MARGIN: TimeDelta = TimeDelta::seconds(45);
/// How long a Portolan alone may fetch tokens for a server. Longer than a fetch takes, so that nobody asks twice.
const LEASE: TimeDelta = TimeDelta::seconds(40);
/// How long finding the authorization server and asking it may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for another Portolan's tokens, and how often to look.
const WAIT: Duration = Duration::from_secs(45);
const LOOK: Duration = Duration::from_millis(200);
/// How long a token that is still good is used after a fetch for a new one failed, before the next try.
const REST: Duration = Duration::from_secs(5);
/// How many other tokens a request gets that is refused: what another Portolan has fetched meanwhile, which may be as old as
/// the first one, and a new one.
const OTHERS: u32 = 2;
/// How often new tokens are tried to be stored while a request waits for them, how often after that, and for how long.
const WRITES: u32 = 5;
const WRITE_AGAIN: Duration = Duration::from_millis(500);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// The sign-in of one server. Clones share everything.
#[derive(Clone)]
pub struct Signer(Arc<Source>);

pub struct Source {
    ins: SignIns,
    /// `None` for a server that is not registered: its sign-in is in memory alone.
    server_id: Option<String>,
    server_url: String,
    client: Option<OauthClient>,
    memory: Mutex<Memory>,
    turn: tokio::sync::Mutex<()>,
}

struct Memory {
    known: Known,
    /// Until then a token that is about to end is good enough.
    rest_until: Option<Instant>,
    /// There has been a token.
    has_signed: bool,
    /// How often somebody said that what is stored may be another one.
    looks: u64,
    /// When the last look into the database began.
    look: Look,
    /// What came and is not stored yet.
    unwritten: Option<Arc<Unwritten>>,
}

/// New tokens whose refresh token has taken the place of that of the stored `version`: that one may not be used again, which
/// looks like a theft and can end the whole sign-in (RFC 9700, 4.14.2).
struct Unwritten {
    version: i64,
    sign_in: SignIn,
    token: Arc<Token>,
}

/// A time among those who said so, and among the times in which the feed of changes was not interrupted.
#[derive(Clone, Copy, Default)]
struct Look {
    looks: u64,
    epoch: Option<u64>,
}

#[derive(Clone)]
enum Known {
    /// Nobody has looked.
    Unread,
    None,
    Token(Arc<Token>),
}

/// An access token.
pub struct Token {
    header: HeaderValue,
    version: i64,
    received_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
    /// This Portolan has fetched it; another one may have read it when it was old already.
    is_own: bool,
}

impl Token {
    fn new(sign_in: &SignIn, version: i64, received_at: DateTime<Utc>) -> Option<Self> {
        let mut header = HeaderValue::try_from(format!("Bearer {}", sign_in.access_token.expose())).ok()?;
        header.set_sensitive(true);
        Some(Self { header, version, received_at, expires_at: sign_in.expires_at, is_own: false })
    }

    /// One that has just come.
    fn fetched(sign_in: &SignIn, version: i64) -> Option<Arc<Self>> {
        Self::new(sign_in, version, now()).map(|token| Arc::new(Self { is_own: true, ..token }))
    }

    fn is_over(&self) -> bool {
        self.expires_at.is_some_and(|end| end <= Utc::now())
    }

    /// Whether it is time for another one.
    fn is_due(&self) -> bool {
        self.expires_at.is_some_and(|end| Utc::now() >= end - margin(self.received_at, end))
    }
}

fn margin(received_at: DateTime<Utc>, end: DateTime<Utc>) -> TimeDelta {
    ((end - received_at) / 4).clamp(TimeDelta::zero(), MARGIN)
}

/// Whether a sign-in to the one URL is good for the other: a token is not sent to another place, whatever it is called. A
/// parameter names a place, too (`?tenant=a`), but for one that holds a secret.
pub fn is_same_place(one: &str, other: &str) -> bool {
    one == other || matches!((place(one), place(other)), (Some(one), Some(other)) if one == other)
}

/// Origin and path, and what of the query is no secret.
fn place(url: &str) -> Option<(Url, Vec<(String, String)>)> {
    let pairs = Url::parse(url).ok()?;
    let pairs = pairs.query_pairs().filter(|(name, value)| !is_secret_name(name) && !is_secret_value(value));
    Some((bare(url).ok()?, pairs.map(|(name, value)| (name.into_owned(), value.into_owned())).collect()))
}

impl Signer {
    pub(super) fn new(ins: SignIns, server_id: Option<String>, remote: &Remote) -> Self {
        let known = if server_id.is_some() { Known::Unread } else { Known::None };
        let memory =
            Memory { known, rest_until: None, has_signed: false, looks: 0, look: Look::default(), unwritten: None };
        Self(Arc::new(Source {
            ins,
            server_id,
            server_url: remote.server_url.clone(),
            client: remote.oauth.clone(),
            memory: Mutex::new(memory),
            turn: tokio::sync::Mutex::default(),
        }))
    }

    /// Of a server that is not registered, to which somebody has just signed in.
    pub(super) fn signed_in(self, sign_in: &SignIn) -> Self {
        if let Some(token) = Token::fetched(sign_in, 1) {
            self.0.know(Some(token));
        }
        self
    }

    pub(super) fn source(&self) -> &Arc<Source> {
        &self.0
    }

    pub(super) fn of(source: Arc<Source>) -> Self {
        Self(source)
    }

    /// The id of the server, if it is registered and a person can sign in to it.
    pub fn connects(&self) -> Option<&str> {
        self.0.server_id.as_deref().filter(|_| !self.0.is_machine())
    }

    /// Whether there is a sign-in, or was one: a 401 then says that it is over.
    pub fn has_signed(&self) -> bool {
        self.0.has_signed()
    }

    /// Portolan signs in as itself, without a person.
    pub fn is_machine(&self) -> bool {
        self.0.is_machine()
    }

    /// Sends a request with the token there is, if there is one. A server that answers 401 has done nothing; it gets the
    /// request once more when there is another token. `sent` hears `true` before the request may reach the server, and
    /// `false` when it turned out to have done nothing.
    ///
    /// # Errors
    /// [`HttpError::NoToken`] when a new token is needed and cannot be had now: nothing was sent.
    pub async fn send(
        &self,
        request: reqwest::RequestBuilder,
        mut sent: impl FnMut(bool),
    ) -> Result<reqwest::Response, HttpError> {
        let (mut request, mut token) = (request, self.token().await?);
        let mut others = OTHERS;
        loop {
            let again = if others > 0 { request.try_clone() } else { None };
            sent(true);
            let response = signed(request, token.as_deref()).send().await?;
            let Some(again) = again.filter(|_| response.status() == StatusCode::UNAUTHORIZED) else {
                return Ok(response);
            };
            sent(false);
            let Some(other) = self.another(token.as_deref()).await? else { return Ok(response) };
            read_over(response).await;
            others = if other.is_own { 0 } else { others - 1 };
            (request, token) = (again, Some(other));
        }
    }

    async fn token(&self) -> Result<Option<Arc<Token>>, Problem> {
        let fresh = match &*self.0.memory() {
            memory if !self.0.is_told_of_others(memory) => None,
            Memory { known: Known::None, .. } => Some(None),
            Memory { known: Known::Token(token), rest_until, .. }
                if !token.is_due() || is_resting(*rest_until, token) =>
            {
                Some(Some(token.clone()))
            }
            _ => None,
        };
        match fresh {
            Some(token) => Ok(token),
            None => self.settle(None).await,
        }
    }

    /// Another token than the one that the server did not take.
    async fn another(&self, refused: Option<&Token>) -> Result<Option<Arc<Token>>, Problem> {
        self.settle(Some(refused.map_or(0, |token| token.version))).await
    }

    async fn settle(&self, refused: Option<i64>) -> Result<Option<Arc<Token>>, Problem> {
        let source = self.0.clone();
        let settling = self.0.ins.tracker().spawn(async move { source.settle(refused).await });
        // It ends without an outcome only with the runtime.
        settling.await.unwrap_or(Err(Problem::Stopping))
    }
}

fn is_resting(rest_until: Option<Instant>, token: &Token) -> bool {
    !token.is_over() && rest_until.is_some_and(|until| Instant::now() < until)
}

fn signed(request: reqwest::RequestBuilder, token: Option<&Token>) -> reqwest::RequestBuilder {
    match token {
        // In place of the one that a user in the URL makes, never beside it.
        Some(token) => request.headers(HeaderMap::from_iter([(AUTHORIZATION, token.header.clone())])),
        None => request,
    }
}

impl Source {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().expect("no code panics while it holds the token")
    }

    fn store(&self) -> &Store {
        self.ins.store()
    }

    fn is_machine(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.grant_type == GrantType::ClientCredentials)
    }

    /// Whether there is a sign-in, or was one, as far as anybody here has looked.
    pub fn has_signed(&self) -> bool {
        self.memory().has_signed
    }

    pub fn is_for(&self, remote: &Remote) -> bool {
        self.server_url == remote.server_url && self.client == remote.oauth
    }

    /// What is stored may be another one by now.
    pub fn look_again(&self) {
        let mut memory = self.memory();
        memory.known = Known::Unread;
        memory.looks += 1;
    }

    /// Whether a sign-in by others would be known by now. Of a server that is not registered there are none.
    fn is_told_of_others(&self, memory: &Memory) -> bool {
        self.server_id.is_none() || memory.look.epoch.is_some_and(|epoch| self.store().epoch() == Some(epoch))
    }

    /// Before the database is asked.
    fn look(&self) {
        let epoch = self.store().epoch();
        let mut memory = self.memory();
        memory.look = Look { looks: memory.looks, epoch };
    }

    fn know(&self, token: Option<Arc<Token>>) -> Option<Arc<Token>> {
        self.keep(token.clone(), None);
        token
    }

    /// Remembers what the last look has led to, unless there may be something else by now.
    fn keep(&self, token: Option<Arc<Token>>, rest_until: Option<Instant>) {
        let mut memory = self.memory();
        memory.has_signed |= token.is_some();
        memory.rest_until = rest_until;
        memory.known = match token {
            _ if memory.look.looks != memory.looks => Known::Unread,
            Some(token) => Known::Token(token),
            None => Known::None,
        };
    }

    /// The token to use: one that is neither due nor of the refused version or one before it.
    async fn settle(self: &Arc<Self>, refused: Option<i64>) -> Result<Option<Arc<Token>>, Problem> {
        let turn = timeout(WAIT, self.turn.lock()).await;
        let _turn = turn.map_err(|_| Problem::TimedOut)?;
        let is_wanted = |token: &Token| !token.is_due() && refused.is_none_or(|refused| token.version > refused);
        let settled = match &*self.memory() {
            memory if !self.is_told_of_others(memory) => None,
            Memory { known: Known::Token(token), .. } => Some(token.clone()),
            _ => None,
        };
        if let Some(token) = settled.filter(|token| is_wanted(token)) {
            return Ok(Some(token));
        }
        let Some(server_id) = &self.server_id else { return self.settle_unregistered(refused).await };
        let deadline = Instant::now() + WAIT;
        loop {
            self.look();
            let stored = self.store().sign_in(server_id).await.map_err(|_| Problem::Store)?;
            let Some((sign_in, version, token)) = self.usable(server_id, stored).await else {
                return if self.is_machine() { self.fetch_first(server_id).await } else { Ok(self.know(None)) };
            };
            if let Some(unwritten) = self.unwritten(version) {
                match self.write_down(server_id, &unwritten).await {
                    Ok(()) => continue,
                    Err(_) if is_wanted(&unwritten.token) => return Ok(self.know(Some(unwritten.token.clone()))),
                    Err(_) => return Err(Problem::Store),
                }
            }
            let token = Arc::new(token);
            let is_refused = refused.is_some_and(|refused| version <= refused);
            if is_wanted(&token) {
                return Ok(self.know(Some(token)));
            }
            if sign_in.refresh_token.is_none() && !self.is_machine() {
                // Whether it is over says the server.
                return Ok(self.know(Some(token).filter(|_| !is_refused)));
            }
            let me = self.ins.me();
            let leased = self.store().lease_sign_in(server_id, version, me, LEASE).await;
            if !leased.map_err(|_| Problem::Store)? {
                if Instant::now() >= deadline {
                    return Err(Problem::TimedOut);
                }
                // Somebody else is about it. A token that is still good does until then.
                if !is_refused && !token.is_over() {
                    return Ok(Some(token));
                }
                self.ins.unless_stopped(sleep(LOOK)).await.ok_or(Problem::Stopping)?;
                continue;
            }
            let fetched = self.fetch_in_time(Some(&sign_in)).await;
            match fetched {
                Ok(new) => match self.write(server_id, version, new).await {
                    Some(token) => return Ok(self.know(Some(token))),
                    None => continue,
                },
                Err(problem @ Problem::Refused(INVALID_GRANT)) if !self.is_machine() => {
                    tracing::info!(server.id = server_id, reason = %problem, "a sign-in is over");
                    let ended = if self.client.as_ref().is_some_and(|client| client.client_secret.is_some()) {
                        // The secret is for the authorization server that it was first used at: the row says which.
                        let over = SignIn { refresh_token: None, ..sign_in };
                        self.store().renew_sign_in(server_id, version, &over).await
                    } else {
                        self.store().remove_sign_in(server_id, version).await
                    };
                    if ended.map_err(|_| Problem::Store)? {
                        return Ok(self.know(None));
                    }
                    // Somebody has signed in anew meanwhile.
                }
                Err(problem) => {
                    tracing::warn!(server.id = server_id, reason = %problem, "no new token for a server");
                    // A lease that is not given back ends by itself.
                    let _ = self.store().release_sign_in(server_id, version, me).await;
                    // Of another authorization server the row stays as well: it says which one may see what is in it.
                    if matches!(problem, Problem::Refused(_) | Problem::OtherIssuer) {
                        return Ok(self.know(None));
                    }
                    if is_refused || token.is_over() {
                        return Err(problem);
                    }
                    self.keep(Some(token.clone()), Some(Instant::now() + REST));
                    return Ok(Some(token));
                }
            }
        }
    }

    /// The stored sign-in if it is one for this server as it is configured. One that is void is removed, unless it is this
    /// session that is of a configuration from before; one that does not open may be whole once its key is back.
    async fn usable(&self, server_id: &str, stored: Option<StoredSignIn>) -> Option<(SignIn, i64, Token)> {
        let StoredSignIn { version, sign_in, updated_at } = stored?;
        let sign_in = match sign_in {
            Ok(sign_in) => sign_in,
            Err(_) => {
                tracing::warn!(server.id = server_id, "the sign-in to a server is sealed and cannot be opened");
                return None;
            }
        };
        let is_same_client = self.client.as_ref().is_none_or(|client| client.client_id == sign_in.client_id);
        let token = Token::new(&sign_in, version, updated_at);
        if !is_same_place(&sign_in.server_url, &self.server_url) || !is_same_client || token.is_none() {
            if self.is_current(server_id).await {
                tracing::info!(server.id = server_id, "a sign-in is void: the server was changed");
                // Tried again by whoever reads it next.
                let _ = self.store().remove_sign_in(server_id, version).await;
            }
            return None;
        }
        Some((sign_in, version, token?))
    }

    /// Whether the server is still configured as this session has it.
    async fn is_current(&self, server_id: &str) -> bool {
        match self.store().server(server_id).await {
            Ok(Some(server)) => match &server.config.0 {
                Ok(Connector::Sse(remote) | Connector::StreamableHttp(remote)) => self.is_for(remote),
                _ => false,
            },
            _ => false,
        }
    }

    /// Stores what was fetched over `version`; `None` when somebody has signed in anew meanwhile. What cannot be stored is
    /// used all the same, because it is the only one that is good, and stored later.
    async fn write(self: &Arc<Self>, server_id: &str, version: i64, new: SignIn) -> Option<Arc<Token>> {
        let token = Token::fetched(&new, version + 1);
        for attempt in 1..=WRITES {
            match self.store().renew_sign_in(server_id, version, &new).await {
                Ok(true) => return token,
                Ok(false) => return None,
                Err(error) if attempt == WRITES => {
                    tracing::error!(server.id = server_id, %error, "new tokens cannot be stored yet");
                }
                Err(_) => sleep(LOOK * attempt).await,
            }
        }
        let token = token?;
        self.memory().unwritten = Some(Arc::new(Unwritten { version, sign_in: new, token: token.clone() }));
        let (source, server_id) = (self.clone(), server_id.to_owned());
        self.ins.tracker().spawn(async move { source.write_later(&server_id, version).await });
        Some(token)
    }

    /// Goes on to store what came over `version`, until that is done or its time is over; once more at a stop.
    async fn write_later(&self, server_id: &str, version: i64) {
        let deadline = Instant::now() + WRITE_TIMEOUT;
        loop {
            let is_last = self.ins.unless_stopped(sleep(WRITE_AGAIN)).await.is_none() || Instant::now() >= deadline;
            let Some(unwritten) = self.unwritten(version) else { return };
            match self.write_down(server_id, &unwritten).await {
                Ok(()) => return tracing::info!(server.id = server_id, "new tokens are stored after all"),
                Err(error) if is_last => {
                    return tracing::error!(server.id = server_id, %error, "new tokens cannot be stored, and end with this process");
                }
                Err(_) => {}
            }
        }
    }

    /// What is not stored yet, if it belongs over this version.
    fn unwritten(&self, version: i64) -> Option<Arc<Unwritten>> {
        self.memory().unwritten.clone().filter(|unwritten| unwritten.version == version)
    }

    /// Stores it, unless somebody has signed in anew: then it is of no use.
    async fn write_down(
        &self,
        server_id: &str,
        Unwritten { version, sign_in, .. }: &Unwritten,
    ) -> Result<(), store::Error> {
        self.store().renew_sign_in(server_id, *version, sign_in).await?;
        self.memory().unwritten.take_if(|unwritten| unwritten.version == *version);
        Ok(())
    }

    /// The first token of a client that signs in as itself.
    async fn fetch_first(&self, server_id: &str) -> Result<Option<Arc<Token>>, Problem> {
        // A session of an ended configuration may have a goodbye to say; what its client gets is nobody's any more.
        if !self.is_current(server_id).await {
            return Ok(self.know(None));
        }
        let fetched = self.fetch_in_time(None).await;
        match fetched {
            Ok(_) if !self.is_current(server_id).await => Ok(self.know(None)),
            Ok(new) => {
                let put = self.store().put_sign_in(server_id, &new, None, Action::SignInCompleted, &By::ITSELF).await;
                let version = put.map_err(|_| Problem::Store)?;
                Ok(self.know(version.and_then(|version| Token::fetched(&new, version))))
            }
            Err(problem @ Problem::Refused(_)) => {
                tracing::warn!(server.id = server_id, reason = %problem, "no token for a server");
                Ok(self.know(None))
            }
            Err(problem) => Err(problem),
        }
    }

    async fn settle_unregistered(&self, refused: Option<i64>) -> Result<Option<Arc<Token>>, Problem> {
        if !self.is_machine() {
            return Ok(self.know(None));
        }
        match self.fetch_in_time(None).await {
            Ok(new) => Ok(self.know(Token::fetched(&new, refused.unwrap_or(0) + 1))),
            Err(Problem::Refused(_)) => Ok(self.know(None)),
            Err(problem) => Err(problem),
        }
    }

    async fn fetch_in_time(&self, old: Option<&SignIn>) -> Result<SignIn, Problem> {
        // What came is stored, also when a stop has begun: it is given once.
        let fetched = self.ins.unless_stopped(timeout(FETCH_TIMEOUT, self.fetch(old))).await;
        let fetched = fetched.ok_or(Problem::Stopping).and_then(|fetched| fetched.unwrap_or(Err(Problem::TimedOut)));
        self.ins.metrics().refreshed(match &fetched {
            Ok(_) => RefreshResult::Renewed,
            Err(Problem::Refused(_)) => RefreshResult::Refused,
            Err(_) => RefreshResult::Failed,
        });
        fetched
    }

    /// New tokens from the authorization server that the server names now, which must be that of before.
    async fn fetch(&self, old: Option<&SignIn>) -> Result<SignIn, Problem> {
        let mut provider = Provider::find(self.ins.egress(), &self.server_url, None).await?;
        if let Some(known) = old.and_then(|old| old.issuer.as_deref())
            && provider.issuer() != Some(known)
        {
            // One that says nothing today says it tomorrow.
            return Err(if provider.is_published { Problem::OtherIssuer } else { Problem::Metadata });
        }
        let resource = provider.resource().await?;
        let (client_id, client_secret) = match (&self.client, old) {
            (Some(client), _) => (&client.client_id, client.client_secret.as_ref()),
            (None, Some(old)) => (&old.client_id, old.client_secret.as_ref()),
            (None, None) => return Err(Problem::Metadata),
        };
        let refresh_token = old.and_then(|old| old.refresh_token.as_ref());
        let grant = match refresh_token {
            Some(refresh_token) if !self.is_machine() => Grant::Refresh { refresh_token },
            _ => Grant::Client { scope: self.client.as_ref().and_then(|client| client.scope.as_deref()) },
        };
        let endpoint = provider.endpoint();
        let tokens = token::ask(&provider.way, &endpoint, client_id, client_secret, &grant, &resource).await?;
        let made = SignIn {
            server_url: self.server_url.clone(),
            issuer: provider.issuer().map(str::to_owned),
            client_id: client_id.clone(),
            client_secret: old.and_then(|old| old.client_secret.clone()),
            redirect_uri: old.and_then(|old| old.redirect_uri.clone()),
            access_token: tokens.access_token.clone(),
            refresh_token: old.and_then(|old| old.refresh_token.clone()),
            scope: old.and_then(|old| old.scope.clone()),
            expires_at: None,
        };
        Ok(with_tokens(made, tokens))
    }
}

/// A sign-in with these tokens. What an answer leaves out stays as it was (RFC 6749, 5.1 and 6), but for the end.
pub fn with_tokens(sign_in: SignIn, tokens: Tokens) -> SignIn {
    SignIn {
        access_token: tokens.access_token,
        refresh_token: tokens.refresh_token.or(sign_in.refresh_token),
        scope: tokens.scope.or(sign_in.scope),
        expires_at: tokens.expires_in.map(|seconds| now() + TimeDelta::seconds(seconds)),
        ..sign_in
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_own_place_alone() {
        let here = "https://a.example/mcp";
        for same in [here, "https://a.example/mcp?session=1", "https://a.example:443/mcp", "https://a.example/mcp#x"] {
            assert!(is_same_place(here, same), "{same}");
        }
        let tenant = "https://a.example/mcp?tenant=a&api_key=1";
        assert!(is_same_place(tenant, "https://a.example/mcp?api_key=2&tenant=a"));
        for other in [here, "https://a.example/mcp?tenant=b&api_key=1", "https://a.example/mcp?api_key=1"] {
            assert!(!is_same_place(tenant, other), "{other}");
        }
        for other in
            ["https://b.example/mcp", "https://a.example/", "http://a.example/mcp", "https://a.example:8/mcp", "x"]
        {
            assert!(!is_same_place(here, other), "{other}");
        }
    }

    #[test]
    fn a_token_is_replaced_before_it_ends_and_not_long_before() {
        let token = |age: i64, lifetime: Option<i64>| {
            let received_at = Utc::now() - TimeDelta::seconds(age);
            let expires_at = lifetime.map(|lifetime| received_at + TimeDelta::seconds(lifetime));
            Token { header: HeaderValue::from_static("Bearer a"), version: 1, received_at, expires_at, is_own: true }
        };
        for (age, lifetime, due) in [
            (0, Some(3600), false),
            (3500, Some(3600), false),
            (3560, Some(3600), true),
            (4000, Some(3600), true),
            (10, Some(40), false),
            (31, Some(40), true),
            (0, Some(0), true),
            (1_000_000, None, false),
        ] {
            assert_eq!(token(age, lifetime).is_due(), due, "{age} of {lifetime:?}");
        }
        assert!(token(41, Some(40)).is_over() && !token(39, Some(40)).is_over() && !token(1_000, None).is_over());
    }

    #[test]
    fn an_answer_without_a_refresh_token_keeps_the_old_one() {
        let old = SignIn {
            server_url: "https://a.example/".to_owned(),
            issuer: None,
            client_id: "c".to_owned(),
            client_secret: None,
            redirect_uri: None,
            access_token: "old".to_owned().into(),
            refresh_token: Some("kept".to_owned().into()),
            scope: Some("s".to_owned()),
            expires_at: Some(now()),
        };
        let tokens = |refresh: Option<&str>| Tokens {
            access_token: "new".to_owned().into(),
            refresh_token: refresh.map(|text| text.to_owned().into()),
            scope: None,
            expires_in: None,
        };
        let kept = with_tokens(old.clone(), tokens(None));
        assert!(kept.access_token.expose() == "new" && kept.expires_at.is_none() && kept.scope.as_deref() == Some("s"));
        assert_eq!(kept.refresh_token.unwrap().expose(), "kept");
        assert_eq!(with_tokens(old, tokens(Some("turned"))).refresh_token.unwrap().expose(), "turned");
    }
}
