//! Connecting to a server while somebody watches, who may be asked to sign in.
//!
//! The answer of the authorization server comes by another request, maybe to another Portolan, so what it is taken with
//! and what came of it stand in the database. A state opens the one sign-in that it was made for, once.

use std::time::Duration;

use chrono::TimeDelta;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::model::{Action, By, Connector, OauthClient, Remote, Secret, Server, SignIn, clear, sha256_hex};
use crate::store::{self, NewAuthorization, Progress, now};

use super::super::remote::HttpError;
use super::super::session::Listed;
use super::super::{Error, Mcp, SyncError, Variables};
use super::provider::{Provider, bare};
use super::signer::{is_same_place, with_tokens};
use super::token::{self, Endpoint, Grant, known_code};
use super::way::{Problem, Way};
use super::{ConnectEvent, SignInError, SignIns, Subject};

/// How many events wait for their reader; a connect has six at most.
const EVENTS: usize = 8;
/// How many connects may be under way to one server, and in all.
const CONNECTS: (usize, usize) = (8, 128);
/// How long finding the authorization server and registering there may take, and how long asking it for tokens.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the browser of a person who has signed in waits for the tools.
const BROWSER_PATIENCE: Duration = Duration::from_secs(10);
/// How often to look whether another Portolan has got the answer.
const LOOK: Duration = Duration::from_millis(500);
/// The most of an authorization server's own words that is shown, in characters.
const MAX_WORDS: usize = 200;

const NO_PUBLIC_URL: &str =
    "This server asks for a sign-in, and Portolan does not know where browsers reach it; set PORTOLAN_PUBLIC_URL.";
const CROWDED: &str = "As many connects as may be under way wait already; try again when one of them has ended.";
const OVERTAKEN: &str =
    "This sign-in was given up for newer ones to the same server, or because the server was changed; connect again.";

/// What the answer to a sign-in is taken with; sealed in `authorizations.material`.
#[derive(Serialize, Deserialize)]
struct Pending {
    server_url: String,
    redirect_uri: String,
    client_id: String,
    #[serde(serialize_with = "clear::option")]
    client_secret: Option<Secret>,
    #[serde(serialize_with = "clear::one")]
    verifier: Secret,
    issuer: Option<String>,
    promises_issuer: bool,
    endpoint: Endpoint,
    resource: String,
    scope: Option<String>,
}

/// What came of it, in the same place.
#[derive(Serialize, Deserialize)]
pub(super) enum Ended {
    /// With the tokens for a server that is not registered.
    Well(Option<Box<SignIn>>),
    Badly(String),
}

impl Subject {
    fn server_name(&self) -> &str {
        match self {
            Self::Registered(server) => &server.server_name,
            Self::Unregistered { server_name, .. } => server_name,
        }
    }

    fn server_id(&self) -> Option<&str> {
        match self {
            Self::Registered(server) => Some(&server.id),
            Self::Unregistered { .. } => None,
        }
    }

    fn remote(&self) -> Option<&Remote> {
        let connector = match self {
            Self::Registered(server) => server.config.0.as_ref().ok()?,
            Self::Unregistered { connector, .. } => connector,
        };
        match connector {
            Connector::Stdio(_) => None,
            Connector::Sse(remote) | Connector::StreamableHttp(remote) => Some(remote),
        }
    }
}

impl Mcp {
    /// Connects to a server and says how it goes; a registered one has its tools synced at the end. A server that asks for
    /// a sign-in has its person sent to its authorization server, which sends them back to `redirect_uri`. Ends when the
    /// receiver is dropped. `by` is who asks, `given` its values for templates.
    pub fn connect(
        &self,
        subject: Subject,
        redirect_uri: Option<String>,
        by: &By,
        given: Variables,
    ) -> mpsc::Receiver<ConnectEvent> {
        let (events, receiver) = mpsc::channel(EVENTS);
        let (mcp, stop, by) = (self.clone(), self.stop.clone(), by.clone());
        let connecting = async move {
            let attending = async {
                let server_name = subject.server_name().to_owned();
                let _ = events.send(ConnectEvent::ConnectionAttempt { server_name }).await;
                let connected = match mcp.sign_ins.seat(&subject) {
                    Some(_seat) => mcp.attend(&subject, &given, redirect_uri.as_deref(), &by, &events).await,
                    None => Err(CROWDED.to_owned()),
                };
                let _ = events
                    .send(match connected {
                        Ok(tools) => ConnectEvent::Success { tools },
                        Err(message) => ConnectEvent::Error { message },
                    })
                    .await;
            };
            tokio::select! {
                () = attending => {}
                () = events.closed() => {}
                () = stop.cancelled() => {
                    // One that has not read the six events before reads no seventh.
                    let _ = events.try_send(ConnectEvent::Error { message: Error::Stopping.to_string() });
                }
            }
        };
        self.tracker.spawn(connecting);
        receiver
    }

    /// The tools, or one sentence.
    async fn attend(
        &self,
        subject: &Subject,
        given: &Variables,
        redirect_uri: Option<&str>,
        by: &By,
        events: &mpsc::Sender<ConnectEvent>,
    ) -> Result<Vec<Box<RawValue>>, String> {
        let asked = match self.tools_of(subject, given, None, by).await {
            Ok(tools) => return Ok(tools),
            // Nothing but a 401 is a question, and only a person can answer it.
            Err(SyncError::Server(Error::Http(HttpError::SignIn(asked)))) if asked.may_sign_in() => asked,
            Err(error) => return Err(sentence(&error)),
        };
        let remote = subject.remote().ok_or_else(|| sentence(&Error::Url.into()))?;
        let _ = events.send(ConnectEvent::OauthRequired).await;
        let redirect_uri = redirect_uri.ok_or(NO_PUBLIC_URL)?;
        let caller = by.name().unwrap_or_default();
        let beginning = self.sign_ins.begin(subject, remote, asked.challenge(), redirect_uri, caller);
        let begun = timeout(BEGIN_TIMEOUT, beginning).await.unwrap_or(Err(Problem::TimedOut));
        let (id, url) = begun.map_err(failed)?;
        let until = Instant::now() + self.sign_ins.0.settings.sign_in_timeout;
        let session_id = format!("mcp-oauth-{}", &id[..8]);
        let _ = events.send(ConnectEvent::AuthorizationUrl { url, session_id }).await;
        let _ = events.send(ConnectEvent::WaitingForAuth).await;
        let sign_in = self.sign_ins.wait(&id, until).await?;
        self.tools_of(subject, given, sign_in.as_deref(), by).await.map_err(|error| sentence(&error))
    }

    /// The tools of a server, kept if it is registered.
    async fn tools_of(
        &self,
        subject: &Subject,
        given: &Variables,
        sign_in: Option<&SignIn>,
        by: &By,
    ) -> Result<Vec<Box<RawValue>>, SyncError> {
        match subject {
            Subject::Registered(server) => self.sync_and_list(server, given, by).await,
            Subject::Unregistered { connector, .. } => Ok(self.list_apart(connector, given, sign_in).await?),
        }
    }

    /// Takes the answer of an authorization server, which comes with `state`, and `iss` if it says who it is (RFC 9207):
    /// a code, or an error with its description. Goes on when the caller leaves. Returns the URL of the server that was
    /// signed in to, without what may be secret in it.
    ///
    /// # Errors
    /// [`SignInError`]; a state is used up by its first answer, whatever that was.
    pub async fn finish_sign_in(
        &self,
        state: Option<&str>,
        answer: Result<&str, (&str, Option<&str>)>,
        iss: Option<&str>,
    ) -> Result<String, SignInError> {
        let state = state.filter(|state| !state.is_empty()).ok_or(SignInError::MissingState)?.to_owned();
        // Before anything is begun that goes on without the caller, who may be anybody.
        let known = self.sign_ins.store().knows_state(&sha256_hex(&state)).await;
        if !known.map_err(|_| SignInError::NotStored)? {
            return Err(SignInError::InvalidState);
        }
        let answer = match answer {
            Ok(code) => Ok(code.to_owned()),
            Err((error, description)) => Err((error.to_owned(), description.map(str::to_owned))),
        };
        let (mcp, iss) = (self.clone(), iss.map(str::to_owned));
        let finishing = self.tracker.spawn(async move { mcp.finish(&state, answer, iss.as_deref()).await });
        finishing.await.unwrap_or_else(|_| Err(SignInError::Failed(Problem::Stopping.to_string())))
    }

    async fn finish(
        &self,
        state: &str,
        answer: Result<String, (String, Option<String>)>,
        iss: Option<&str>,
    ) -> Result<String, SignInError> {
        let ins = &self.sign_ins;
        let away = |_: store::Error| SignInError::NotStored;
        let taken = ins.store().take_authorization(&sha256_hex(state)).await.map_err(away)?;
        let taken = taken.ok_or(SignInError::InvalidState)?;
        let (server_id, caller) = (taken.server_id.as_deref(), &taken.caller);
        let by = By::caller(Some(caller));
        let pending: Option<Pending> = taken.material.and_then(|material| serde_json::from_slice(&material).ok());
        let outcome = match pending {
            Some(pending) => self.exchange(server_id, &taken.id, pending, answer, iss, &by).await,
            None => Err(SignInError::NotStored),
        };
        if let (Ok(_), Some(server_id)) = (&outcome, server_id) {
            // The next session is that of whoever has signed in now. Before anybody hears of it, who would open that one.
            self.pool.renew(server_id);
        }
        let (progress, ended) = match &outcome {
            Ok((_, apart)) => (Progress::Done, Ended::Well(apart.clone().map(Box::new))),
            Err(error) => (Progress::Failed, Ended::Badly(reason_of(error))),
        };
        let ended = serde_json::to_vec(&ended).expect("it is strings and a time");
        // Whoever waits would wait in vain; the sign-in itself is stored.
        if let Err(error) = ins.store().finish_authorization(&taken.id, progress, &ended).await {
            tracing::error!(%error, "the end of a sign-in cannot be noted");
        }
        ins.0.finished.notify_waiters();
        match outcome {
            Ok((server_url, _)) => {
                tracing::info!(server.id = server_id, caller.name = caller, "signed in to a server");
                if let Some(server_id) = server_id {
                    self.sync_signed_in(server_id, &by).await;
                }
                Ok(server_url)
            }
            Err(error) => {
                tracing::info!(server.id = server_id, caller.name = caller, "a sign-in to a server failed");
                Err(error)
            }
        }
    }

    /// Lists the tools of a server that somebody has signed in to: whoever began that may not be there any more. Goes on
    /// when it takes longer than a browser is to wait.
    async fn sync_signed_in(&self, server_id: &str, by: &By) {
        let (mcp, stop, server_id, by) = (self.clone(), self.stop.clone(), server_id.to_owned(), by.clone());
        let syncing = async move {
            if let Ok(Some(server)) = mcp.store.server(&server_id).await {
                // A failure is noted where it happens.
                let _ = mcp.sync_tools(&server, None, &Variables::default(), &by).await;
            }
        };
        let syncing = self.tracker.spawn(async move { stop.run_until_cancelled(syncing).await });
        let _ = timeout(BROWSER_PATIENCE, syncing).await;
    }

    /// Tokens for a code; stored for a registered server, returned for any other.
    async fn exchange(
        &self,
        server_id: Option<&str>,
        authorization: &str,
        pending: Pending,
        answer: Result<String, (String, Option<String>)>,
        iss: Option<&str>,
        by: &By,
    ) -> Result<(String, Option<SignIn>), SignInError> {
        let ins = &self.sign_ins;
        let failed = |problem: Problem| SignInError::Failed(problem.to_string());
        if !is_from(iss, pending.issuer.as_deref(), pending.promises_issuer) {
            return Err(failed(Problem::Issuer));
        }
        let code = match answer {
            Ok(code) if code.is_empty() => return Err(SignInError::MissingCode),
            Ok(code) => code,
            Err((error, description)) => {
                let description = description.as_deref().unwrap_or("no description");
                return Err(SignInError::Refused { error: words(&error), description: words(description) });
            }
        };
        let url = bare(&pending.server_url).map_err(failed)?;
        let way = Way::new(ins.egress().clone(), url.clone());
        let grant = Grant::Code { code: &code, verifier: &pending.verifier, redirect_uri: &pending.redirect_uri };
        let secret = pending.client_secret.as_ref();
        let asking = token::ask(&way, &pending.endpoint, &pending.client_id, secret, &grant, &pending.resource);
        // What came is stored, also when a stop has begun: it is given once.
        let asked =
            ins.unless_stopped(timeout(EXCHANGE_TIMEOUT, asking)).await.ok_or_else(|| failed(Problem::Stopping))?;
        let tokens = asked.unwrap_or(Err(Problem::TimedOut)).map_err(failed)?;
        let made = SignIn {
            server_url: pending.server_url,
            issuer: pending.issuer,
            client_id: pending.client_id,
            client_secret: pending.client_secret,
            redirect_uri: Some(pending.redirect_uri),
            access_token: tokens.access_token.clone(),
            refresh_token: None,
            scope: pending.scope,
            expires_at: None,
        };
        let sign_in = with_tokens(made, tokens);
        let Some(server_id) = server_id else { return Ok((url.into(), Some(sign_in))) };
        // Never for a server that has moved meanwhile: whoever reads it next would find it void, and this says so now.
        let stays = match ins.store().server(server_id).await.map_err(|_| SignInError::NotStored)? {
            Some(server) => {
                let subject = Subject::Registered(server);
                subject.remote().is_some_and(|remote| is_same_place(&sign_in.server_url, &remote.server_url))
            }
            None => false,
        };
        if !stays {
            return Err(SignInError::Failed("the server was changed or deleted meanwhile".to_owned()));
        }
        let action = Action::SignInCompleted;
        match ins.store().put_sign_in(server_id, &sign_in, Some(authorization), action, by).await {
            Ok(Some(_)) => Ok((url.into(), None)),
            Ok(None) => Err(SignInError::Failed("the server was changed or deleted meanwhile".to_owned())),
            Err(_) => Err(SignInError::NotStored),
        }
    }

    /// The tools of a connector that is not registered, each as the server wrote it; nothing is stored.
    pub async fn try_out(&self, connector: &Connector, given: &Variables) -> Result<Vec<Box<RawValue>>, Error> {
        self.list_apart(connector, given, None).await
    }

    async fn list_apart(
        &self,
        connector: &Connector,
        given: &Variables,
        sign_in: Option<&SignIn>,
    ) -> Result<Vec<Box<RawValue>>, Error> {
        /// A command has folders under the name of its server, which go with it, also when the caller leaves.
        struct Apart<'a>(&'a Mcp, String);
        impl Drop for Apart<'_> {
            fn drop(&mut self) {
                self.0.deleted(&self.1);
            }
        }
        let apart = Apart(self, format!("unregistered-{}", Uuid::new_v4()));
        let signer = match connector {
            Connector::Stdio(_) => None,
            Connector::Sse(remote) | Connector::StreamableHttp(remote) => self.sign_ins.apart(remote),
        };
        let signer = match sign_in {
            Some(sign_in) => signer.map(|signer| signer.signed_in(sign_in)),
            None => signer,
        };
        let session = self.pool.open_apart(&apart.1, connector, given, signer).await?;
        let Listed { tools, .. } = session.list_tools(None, Instant::now() + self.settings.list_timeout).await?;
        Ok(tools)
    }

    /// The tools of a registered server as it lists them now, each as it wrote it; nothing is stored. `now`: a session is
    /// tried for also while a failure of before would be answered.
    pub async fn live_tools(&self, server: &Server, given: &Variables, now: bool) -> Result<Vec<Box<RawValue>>, Error> {
        let place = self.pool.enter(&server.id, self.settings.list_timeout).await?;
        if !place.was_awaited {
            return Ok(self.list(server, None, given, now).await?.0.tools);
        }
        let current = self.store.server(&server.id).await.map_err(|_| Error::Store)?.ok_or(Error::Deleted)?;
        Ok(self.list(&current, None, given, now).await?.0.tools)
    }

    /// As [`Mcp::sync_tools`]; returns the tools as the server wrote them.
    async fn sync_and_list(
        &self,
        server: &Server,
        given: &Variables,
        by: &By,
    ) -> Result<Vec<Box<RawValue>>, SyncError> {
        let turn = self.turn(&server.id);
        let _turn = turn.lock().await;
        let server = self.store.server(&server.id).await?.ok_or(SyncError::Gone)?;
        Ok(self.sync(&server, None, given, true, by).await?.0.tools)
    }
}

impl SignIns {
    /// Room for one more connect.
    fn seat(&self, subject: &Subject) -> Option<Seat> {
        let whom = subject.server_id().unwrap_or(subject.server_name()).to_owned();
        let mut connects = self.0.connects.lock().expect("no code panics while it holds the connects");
        if connects.values().sum::<usize>() >= CONNECTS.1 || connects.get(&whom).is_some_and(|here| *here >= CONNECTS.0)
        {
            return None;
        }
        *connects.entry(whom.clone()).or_default() += 1;
        Some(Seat { ins: self.clone(), whom })
    }

    /// Finds the authorization server and prepares to take its answer: the id of the sign-in, and the page to open.
    async fn begin(
        &self,
        subject: &Subject,
        remote: &Remote,
        challenge: Option<&str>,
        redirect_uri: &str,
        caller: &str,
    ) -> Result<(String, String), Problem> {
        let provider = Provider::find(self.egress(), &remote.server_url, challenge).await?;
        self.admit(subject, remote, &provider).await?;
        let (issuer, endpoint) = (provider.issuer().map(str::to_owned), provider.endpoint());
        let settings = &self.0.settings;
        // The document names this address alone.
        let named = settings.redirect_uri().is_some_and(|named| named == redirect_uri);
        let metadata_url = settings.client_metadata_url().filter(|_| named);
        let client: Option<&OauthClient> = remote.oauth.as_ref();
        let begun = provider.begin(client, metadata_url.as_deref(), redirect_uri).await?;
        let pending = Pending {
            server_url: remote.server_url.clone(),
            redirect_uri: redirect_uri.to_owned(),
            client_id: begun.client_id,
            client_secret: begun.client_secret,
            verifier: begun.verifier,
            issuer,
            promises_issuer: begun.promises_issuer,
            endpoint,
            resource: begun.resource,
            scope: begun.scope,
        };
        let material = serde_json::to_vec(&pending).expect("it is strings");
        let material = secrecy::zeroize::Zeroizing::new(material);
        let time = TimeDelta::from_std(settings.sign_in_timeout).unwrap_or(TimeDelta::MAX);
        let id = Uuid::new_v4().simple().to_string();
        let new = NewAuthorization {
            id: &id,
            state_digest: &sha256_hex(&begun.state),
            server_id: subject.server_id(),
            caller,
            material: &material,
            expires_at: now() + time,
        };
        self.store().begin_authorization(&new).await.map_err(|_| Problem::Store)?;
        Ok((id, begun.url.into()))
    }

    /// Whether this authorization server may see the configured secret of the client: the first one that it was used at,
    /// and no other that the MCP server comes to name.
    async fn admit(&self, subject: &Subject, remote: &Remote, provider: &Provider) -> Result<(), Problem> {
        let has_secret = remote.oauth.as_ref().is_some_and(|client| client.client_secret.is_some());
        let Some(server_id) = subject.server_id().filter(|_| has_secret) else { return Ok(()) };
        let stored = self.store().sign_in(server_id).await.map_err(|_| Problem::Store)?;
        let Some(sign_in) = stored.and_then(|stored| stored.sign_in.ok()) else { return Ok(()) };
        if sign_in.issuer.is_none()
            || sign_in.issuer.as_deref() == provider.issuer()
            || !is_same_place(&sign_in.server_url, &remote.server_url)
        {
            return Ok(());
        }
        Err(if provider.is_published { Problem::ClientElsewhere } else { Problem::Metadata })
    }

    /// Waits for the end of a sign-in; the tokens of a server that is not registered come with it.
    async fn wait(&self, id: &str, until: Instant) -> Result<Option<Box<SignIn>>, String> {
        loop {
            let finished = self.0.finished.notified();
            match self.store().authorization(id).await {
                Ok(Some(begun)) if matches!(begun.progress, Progress::Done | Progress::Failed) => {
                    let ended = begun.material.and_then(|material| serde_json::from_slice(&material).ok());
                    // Nobody else waits for it, but for a sign-in whose server may yet be registered. What is not removed
                    // goes when its time is over.
                    if !matches!(ended, Some(Ended::Well(Some(_)))) {
                        let _ = self.store().forget_authorization(id).await;
                    }
                    return match ended {
                        Some(Ended::Well(sign_in)) => Ok(sign_in),
                        Some(Ended::Badly(reason)) => Err(reason),
                        None => Err(failed(Problem::Store)),
                    };
                }
                Ok(None) if Instant::now() < until => return Err(OVERTAKEN.to_owned()),
                // A database that is away may come back in time.
                Ok(_) | Err(_) => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let seconds = self.0.settings.sign_in_timeout.as_secs_f64();
                return Err(format!("Nobody has signed in within {seconds} s; connect again."));
            }
            let _ = timeout(LOOK.min(left), finished).await;
        }
    }
}

/// A connect that is under way.
struct Seat {
    ins: SignIns,
    whom: String,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut connects = self.ins.0.connects.lock().expect("no code panics while it holds the connects");
        if let Some(here) = connects.get_mut(&self.whom) {
            *here -= 1;
            if *here == 0 {
                connects.remove(&self.whom);
            }
        }
    }
}

fn sentence(error: &SyncError) -> String {
    match error {
        SyncError::Gone => Error::Deleted.to_string(),
        SyncError::Server(error) => error.to_string(),
        SyncError::Store(_) => Error::Store.to_string(),
    }
}

fn failed(problem: Problem) -> String {
    format!("The sign-in failed: {problem}.")
}

/// What whoever waits is told; of an authorization server's words its code alone, if it is a known one.
fn reason_of(error: &SignInError) -> String {
    let reason = match error {
        SignInError::Refused { error, .. } => Problem::Refused(known_code(error)).to_string(),
        SignInError::Failed(reason) => reason.clone(),
        SignInError::MissingCode => "the authorization server sent no code".to_owned(),
        _ => "its answer could not be stored".to_owned(),
    };
    format!("The sign-in failed: {reason}.")
}

/// Whether an answer is from the expected authorization server (RFC 9207, 2.4; MCP 2026-07-28, authorization).
fn is_from(received: Option<&str>, expected: Option<&str>, is_promised: bool) -> bool {
    match received {
        Some(received) => expected == Some(received),
        None => !is_promised,
    }
}

/// Other people's words, made harmless.
fn words(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MAX_WORDS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_who_it_is_from_if_that_was_promised_and_is_believed_only_if_it_fits() {
        let (ours, other) = (Some("https://a.example"), Some("https://b.example"));
        for promised in [true, false] {
            assert!(is_from(ours, ours, promised));
            assert!(!is_from(other, ours, promised) && !is_from(ours, None, promised));
        }
        assert!(is_from(None, ours, false) && !is_from(None, ours, true));
        assert!(is_from(None, None, false) && !is_from(None, None, true));
    }

    #[test]
    fn other_peoples_words_are_bounded_and_one_line() {
        assert_eq!(words("a\nb\u{1b}[1mc\u{0}"), "ab[1mc");
        assert_eq!(words(&"é".repeat(1_000)).chars().count(), MAX_WORDS);
        let refused = SignInError::Refused { error: "access_denied".to_owned(), description: "No".to_owned() };
        assert_eq!(refused.to_string(), "OAuth error: access_denied - No");
        assert_eq!(reason_of(&refused), "The sign-in failed: the authorization server refused it (access_denied).");
    }
}
