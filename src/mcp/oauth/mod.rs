//! Sign-in to MCP servers by OAuth: MCP authorization 2025-11-25 and 2026-07-28, RFC 6749, 7591, 7636, 8414, 8707, 9207, 9728.
//!
//! [`Signer`] is what the requests to a server use; `connect` is how a person signs in, `provider` and `token` are what the
//! authorization server is asked, `way` is how it is reached,
//! `adopt` is for a sign-in from before its server was registered.

mod adopt;
mod connect;
mod provider;
mod signer;
mod token;
mod way;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config;
use crate::model::{Connector, Remote, Server};
use crate::store::Store;
use crate::telemetry::metrics::Metrics;

use super::egress::Egress;
use super::remote::has_authorization;

pub use signer::Signer;
pub use way::Problem;

use signer::Source;

/// How long an authorization server is waited for when Portolan stops; less than the end of all sessions may take.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// What a connect tells, in this order; the last one is `Success` or `Error` (CONTRACT row 24).
#[derive(Debug)]
pub enum ConnectEvent {
    ConnectionAttempt {
        server_name: String,
    },
    /// Each tool as the server wrote it.
    Success {
        tools: Vec<Box<RawValue>>,
    },
    /// One sentence for the person who connects.
    Error {
        message: String,
    },
    OauthRequired,
    /// What to open in a browser; `session_id` is `mcp-oauth-<8 hex>`.
    AuthorizationUrl {
        url: String,
        session_id: String,
    },
    WaitingForAuth,
}

/// Whom to connect to: a registered server, or a connector that is not registered.
pub enum Subject {
    Registered(Server),
    Unregistered { server_name: String, connector: Connector },
}

/// Why the answer of an authorization server was not taken, in Letta's sentences.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignInError {
    #[error("Missing state parameter")]
    MissingState,
    #[error("Invalid or expired state parameter")]
    InvalidState,
    /// What the authorization server says, bounded and without control characters.
    #[error("OAuth error: {error} - {description}")]
    Refused { error: String, description: String },
    #[error("Missing authorization code")]
    MissingCode,
    #[error("Failed to store authorization code")]
    NotStored,
    #[error("OAuth callback failed: {0}")]
    Failed(String),
}

/// The sign-ins to all servers. Clones share everything.
#[derive(Clone)]
pub struct SignIns(Arc<Shared>);

struct Shared {
    store: Store,
    egress: Egress,
    metrics: Metrics,
    tracker: TaskTracker,
    settings: config::SignIn,
    stop: CancellationToken,
    /// Who holds a lease.
    me: String,
    /// By the server's id; those in use.
    sources: Mutex<HashMap<String, Weak<Source>>>,
    /// A sign-in ended that was begun, well or not.
    finished: Notify,
    /// How many connects are under way, by whom they are to.
    connects: Mutex<HashMap<String, usize>>,
}

impl SignIns {
    pub fn new(
        store: Store,
        egress: Egress,
        metrics: Metrics,
        tracker: TaskTracker,
        settings: config::SignIn,
        stop: CancellationToken,
    ) -> Self {
        Self(Arc::new(Shared {
            store,
            egress,
            metrics,
            tracker,
            settings,
            stop,
            me: Uuid::new_v4().to_string(),
            sources: Mutex::default(),
            finished: Notify::new(),
            connects: Mutex::default(),
        }))
    }

    pub fn store(&self) -> &Store {
        &self.0.store
    }

    fn egress(&self) -> &Egress {
        &self.0.egress
    }

    fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn tracker(&self) -> &TaskTracker {
        &self.0.tracker
    }

    /// What comes of `work`; `None` when a stop leaves it no time. An authorization server that has been asked may answer a
    /// moment later: what it gives is given once.
    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let stopped = async {
            self.0.stop.cancelled().await;
            sleep(STOP_PATIENCE).await;
        };
        tokio::select! {
            done = work => Some(done),
            () = stopped => None,
        }
    }

    fn me(&self) -> &str {
        &self.0.me
    }

    /// The sign-in of a server for a new session, as it is stored now. `None` when an `Authorization` of its own is
    /// configured: that one goes out, and nothing beside it.
    pub fn of(&self, server_id: &str, remote: &Remote) -> Option<Signer> {
        if !signs_in(remote) {
            return None;
        }
        let mut sources = self.0.sources.lock().expect("no code panics while it holds the sources");
        sources.retain(|_, source| source.strong_count() > 0);
        let known = sources.get(server_id).and_then(Weak::upgrade).filter(|source| source.is_for(remote));
        Some(match known {
            Some(source) => {
                source.look_again();
                Signer::of(source)
            }
            None => {
                let signer = Signer::new(self.clone(), Some(server_id.to_owned()), remote);
                sources.insert(server_id.to_owned(), Arc::downgrade(signer.source()));
                signer
            }
        })
    }

    /// Somebody has signed in elsewhere, or a sign-in is gone: to this server, or to one that is not registered.
    pub fn changed(&self, server_id: Option<&str>) {
        let sources = self.0.sources.lock().expect("no code panics while it holds the sources");
        if let Some(source) = server_id.and_then(|server_id| sources.get(server_id)?.upgrade()) {
            source.look_again();
        }
        drop(sources);
        self.0.finished.notify_waiters();
    }

    /// Anything may have happened elsewhere. Returns the servers that somebody has signed in to, whose sessions may be of
    /// another sign-in now.
    pub fn may_have_changed(&self) -> Vec<String> {
        let sources = self.0.sources.lock().expect("no code panics while it holds the sources");
        let known = sources.iter().filter_map(|(server_id, source)| Some((server_id, source.upgrade()?)));
        let mut signed_in = vec![];
        for (server_id, source) in known {
            source.look_again();
            if source.has_signed() {
                signed_in.push(server_id.clone());
            }
        }
        drop(sources);
        self.0.finished.notify_waiters();
        signed_in
    }

    /// As [`SignIns::of`], of a connector that is not registered.
    pub fn apart(&self, remote: &Remote) -> Option<Signer> {
        signs_in(remote).then(|| Signer::new(self.clone(), None, remote))
    }
}

/// Whether OAuth is for this server: it is configured, or no other `Authorization` is.
fn signs_in(remote: &Remote) -> bool {
    remote.oauth.is_some() || !has_authorization(remote)
}
