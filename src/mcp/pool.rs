//! One live session per server: opened at its first use, shared by all callers, closed when nobody uses it, and opened
//! again after its end.
//!
//! The lock of a slot is the single flight: whoever comes while a session is being opened waits for that attempt and
//! shares its outcome, a failure too. After a failure the server rests, longer each time, and calls fail at once
//! meanwhile. A session is in use as long as somebody holds its `Arc`; the pool's own hold ends when the server's
//! configuration has a newer revision, when the server is deleted, or when Portolan stops, and calls that are under way
//! finish on it.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Mutex as Lock, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use crate::model::{Connector, Era, Server, State};
use crate::store::{Reached, Store};

use super::Error;
use super::session::{Context, Session};
use super::watch::News;

/// How long a server rests after a failure: doubled from the first to the last. One that could be opened and ended soon
/// after that rests less: it may well be that one call ended it.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
const SHORT_REST: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));
/// A session that ends within this time, and has answered nothing, counts as a failure.
const SOON: Duration = Duration::from_secs(10);
/// How long an opening waits for another child to leave, and how often it looks for one that can.
const CHILD_TIMEOUT: Duration = Duration::from_secs(15);
const CHILD_LOOK: Duration = Duration::from_millis(50);
/// How long a call that failed waits for others to be done with noting it.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long after a rest a server that failed is remembered.
const MEMORY: Duration = Duration::from_secs(600);

pub struct Pool {
    context: Context,
    store: Store,
    news: Arc<News>,
    slots: Mutex<Slots>,
    /// One permit per child that may run.
    children: Arc<Semaphore>,
}

struct Slots {
    by_server: HashMap<String, Arc<Slot>>,
    /// Portolan stops: no session is opened any more.
    closed: bool,
}

struct Slot {
    live: Mutex<Option<Live>>,
    /// Held while a session is being opened.
    history: Lock<History>,
    calls: Arc<Semaphore>,
    queued: AtomicUsize,
}

#[derive(Clone)]
struct Live {
    /// Of the configuration it was opened with.
    revision: i64,
    session: Arc<Session>,
}

/// How the last attempts went.
#[derive(Default)]
struct History {
    failures: u32,
    failed: Option<Failed>,
}

#[derive(Clone)]
struct Failed {
    at: Instant,
    /// No attempt is made before.
    until: Instant,
    revision: i64,
    error: Error,
    /// The server may come back by itself, and be looked for without being asked.
    remote: bool,
}

/// A call's place at its server; dropping it lets the next one in.
pub struct Place(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// A random time up to `most`, so that many that wait do not come back at once.
pub fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    most.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}

fn rest(scale: (Duration, Duration), failures: u32) -> Duration {
    let full = scale.0.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(scale.1);
    full / 2 + jitter(full / 2)
}

impl Slot {
    fn live(&self) -> MutexGuard<'_, Option<Live>> {
        self.live.lock().expect("no code panics while it holds the session")
    }

    /// A row may have been read before a change that has its session already: the newer session serves it too.
    fn usable(&self, revision: i64) -> Option<Arc<Session>> {
        let live = self.live();
        let Live { revision: opened, session } = live.as_ref()?;
        (*opened >= revision && !session.is_closed()).then(|| session.clone())
    }

    /// Takes the session out of the slot if it is this one.
    fn take(&self, session: &Arc<Session>) -> Option<Live> {
        self.live().take_if(|live| Arc::ptr_eq(&live.session, session))
    }
}

impl Pool {
    pub fn new(context: Context, store: Store, news: Arc<News>) -> Self {
        let slots = Mutex::new(Slots { by_server: HashMap::new(), closed: false });
        let children = Arc::new(Semaphore::new(context.settings.max_children));
        Self { context, store, news, slots, children }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().expect("no code panics while it holds the slots")
    }

    fn slot(&self, server_id: &str) -> Result<Arc<Slot>, Error> {
        let mut slots = self.slots();
        if slots.closed {
            return Err(Error::Stopping);
        }
        if let Some(slot) = slots.by_server.get(server_id) {
            return Ok(slot.clone());
        }
        let slot = Arc::new(Slot {
            live: Mutex::default(),
            history: Lock::default(),
            calls: Arc::new(Semaphore::new(self.context.settings.max_calls_per_server)),
            queued: AtomicUsize::new(0),
        });
        slots.by_server.insert(server_id.to_owned(), slot.clone());
        Ok(slot)
    }

    /// A place among the calls of a server, in turn, by `deadline`.
    ///
    /// # Errors
    /// [`Error::QueueFull`] when too many wait already, or the wait takes too long; [`Error::Stopping`].
    pub async fn enter(&self, server_id: &str, deadline: Instant) -> Result<Place, Error> {
        let slot = self.slot(server_id)?;
        if let Ok(permit) = slot.calls.clone().try_acquire_owned() {
            return Ok(Place(permit));
        }
        struct Queued<'a>(&'a AtomicUsize);
        impl Drop for Queued<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let before = slot.queued.fetch_add(1, Ordering::Relaxed);
        let _queued = Queued(&slot.queued);
        if before >= self.context.settings.max_queue_per_server {
            return Err(Error::QueueFull);
        }
        let permit = timeout_at(deadline, slot.calls.clone().acquire_owned()).await;
        permit.ok().and_then(Result::ok).map(Place).ok_or(Error::QueueFull)
    }

    /// The session of this server, if there is a live one.
    pub fn live(&self, server: &Server) -> Option<Arc<Session>> {
        let slot = self.slots().by_server.get(&server.id).cloned()?;
        let session = slot.usable(server.revision)?;
        session.touch();
        Some(session)
    }

    /// The live session of this server, and whether it was opened for this call. To be awaited to its end: an opening
    /// that is dropped half-way is lost to those who wait for it. `now` does not wait for the end of a rest.
    ///
    /// # Errors
    /// Why it could not be opened, which is in the server's status then; [`Error::Resting`]; [`Error::Deleted`];
    /// [`Error::Reconfigured`] when the server was changed meanwhile; [`Error::NoChildFree`]; [`Error::Stopping`].
    pub async fn session(&self, server: &Server, now: bool) -> Result<(Arc<Session>, bool), Error> {
        let arrived = Instant::now();
        let slot = self.slot(&server.id)?;
        let mut history = slot.history.lock().await;
        if let Some(session) = slot.usable(server.revision) {
            session.touch();
            return Ok((session, false));
        }
        self.check_current(&server.id, &slot)?;
        self.bury(&slot, &mut history);
        if let Some(failed) = history.failed.as_ref().filter(|failed| failed.revision == server.revision) {
            if failed.at > arrived {
                return Err(failed.error.clone());
            }
            let rest = failed.until.saturating_duration_since(Instant::now());
            if !now && !rest.is_zero() {
                return Err(Error::Resting { reason: Box::new(failed.error.clone()), rest });
            }
        }
        // The row at hand may be of before a change; what is started must be what is configured.
        let server = match self.store.server(&server.id).await {
            Ok(Some(current)) => current,
            Ok(None) => return Err(Error::Deleted),
            Err(error) => {
                tracing::error!(server.id, %error, "cannot read the server to be opened");
                return Err(Error::Store);
            }
        };
        let opened = self.open(&server).await;
        // After a forget or a stop in the meantime its caller may find out why.
        self.check_current(&server.id, &slot)?;
        match opened {
            Ok(session) => {
                tracing::info!(server.id, server.r#type = server.server_type.as_str(), "session opened");
                history.failed = None;
                // A server that was never listed is ready when it has been.
                if server.last_synced_at.is_some() {
                    self.note(&server, &mut history, Ok(session.era())).await;
                }
                // Looked at again after the wait: from now on a forget finds the session.
                self.check_current(&server.id, &slot)?;
                *slot.live() = Some(Live { revision: server.revision, session: session.clone() });
                Ok((session, true))
            }
            Err(error) => {
                if !error.is_ours() {
                    self.fail(&mut history, &server, &error, REST, None);
                    self.note(&server, &mut history, Err(&error)).await;
                }
                Err(error)
            }
        }
    }

    async fn open(&self, server: &Server) -> Result<Arc<Session>, Error> {
        let connector = server.config.0.as_ref().map_err(|unreadable| Error::Config(*unreadable))?;
        let permit = match connector {
            Connector::Stdio(_) => Some(self.child_permit().await?),
            Connector::Sse(_) | Connector::StreamableHttp(_) => None,
        };
        let bell = self.news.bell(&server.id);
        Session::open(connector, server.era(), &self.context, bell, permit).await.map(Arc::new)
    }

    /// Room for one more child; the one that is idle longest makes it.
    async fn child_permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        let waiting = async {
            loop {
                let children = self.children.clone();
                // A permit comes back when its child is gone, and that takes the child's time.
                let patience = if self.children.available_permits() == 0 && self.close_idlest_child() {
                    CHILD_TIMEOUT
                } else {
                    CHILD_LOOK
                };
                if let Ok(Ok(permit)) = timeout(patience, children.acquire_owned()).await {
                    return permit;
                }
            }
        };
        timeout(CHILD_TIMEOUT, waiting).await.map_err(|_| Error::NoChildFree)
    }

    fn close_idlest_child(&self) -> bool {
        let slots: Vec<_> = self.slots().by_server.values().cloned().collect();
        let idle = slots.iter().filter_map(|slot| {
            let live = slot.live();
            let session = &live.as_ref()?.session;
            (session.has_child() && Arc::strong_count(session) == 1).then(|| (session.used(), slot))
        });
        let Some((_, slot)) = idle.min_by_key(|(used, _)| *used) else { return false };
        // Somebody may have taken it meanwhile: then it is not idle any more.
        slot.live().take_if(|live| Arc::strong_count(&live.session) == 1).is_some()
    }

    /// Whether this slot still is the server's.
    fn check_current(&self, server_id: &str, slot: &Arc<Slot>) -> Result<(), Error> {
        let slots = self.slots();
        match slots.by_server.get(server_id) {
            _ if slots.closed => Err(Error::Stopping),
            Some(current) if Arc::ptr_eq(current, slot) => Ok(()),
            _ => Err(Error::Reconfigured),
        }
    }

    /// Takes a session that has ended out of its slot, and counts an early end as a failure. Returns why it ended.
    fn bury(&self, slot: &Slot, history: &mut History) -> Option<(i64, Error)> {
        let Live { revision, session } = slot.live().take_if(|live| live.session.is_closed())?;
        if session.has_served() {
            history.failures = 0;
        }
        let error = session.ended()?;
        if !session.has_served() && session.opened().elapsed() < SOON {
            history.failures += 1;
            // The first time may be bad luck.
            let wait = if history.failures > 1 { rest(SHORT_REST, history.failures - 1) } else { Duration::ZERO };
            let now = Instant::now();
            let remote = !session.has_child();
            history.failed = Some(Failed { at: now, until: now + wait, revision, error: error.clone(), remote });
        }
        Some((revision, error))
    }

    fn fail(
        &self,
        history: &mut History,
        server: &Server,
        error: &Error,
        scale: (Duration, Duration),
        asked: Option<Duration>,
    ) {
        history.failures += 1;
        let now = Instant::now();
        let until = now + asked.unwrap_or_else(|| rest(scale, history.failures));
        let remote = matches!(server.config.0, Ok(Connector::Sse(_) | Connector::StreamableHttp(_)))
            && error.state() == State::Unreachable;
        history.failed = Some(Failed { at: now, until, revision: server.revision, error: error.clone(), remote });
    }

    /// Lets go of a session that failed a call with `error`, unless another one has taken its place; the server's status
    /// says why. A server that asks for a pause gets it.
    pub async fn discard(&self, server: &Server, session: &Arc<Session>, error: &Error) {
        session.retire();
        let Ok(slot) = self.slot(&server.id) else { return };
        // Whoever opens a session just now found this one retired, and says how that went. Whoever has heard of its end
        // just now says why, and is waited for, so that the status is told when the caller is.
        let Ok(mut history) = timeout(SETTLE_TIMEOUT, slot.history.lock()).await else { return };
        if slot.take(session).is_none() {
            return;
        }
        if let Some(pause) = error.pause() {
            self.fail(&mut history, server, error, REST, Some(pause));
        } else if !session.has_served() && session.opened().elapsed() < SOON && !error.is_ours() {
            history.failures += 1;
        }
        if !error.is_ours() {
            self.note(server, &mut history, Err(error)).await;
        }
    }

    /// Lets go of a session that proved to be dead before a call was sent on it.
    pub fn drop_session(&self, server_id: &str, session: &Arc<Session>) {
        session.retire();
        if let Some(slot) = self.slots().by_server.get(server_id) {
            slot.take(session);
        }
    }

    /// Takes note of a session that has ended by itself.
    pub async fn settle(&self, server_id: &str) {
        let Some(slot) = self.slots().by_server.get(server_id).cloned() else { return };
        let mut history = slot.history.lock().await;
        let Some((revision, error)) = self.bury(&slot, &mut history) else { return };
        tracing::info!(server.id = server_id, reason = %error, "session ended by itself");
        if let Ok(Some(server)) = self.store.server(server_id).await
            && server.revision == revision
        {
            self.note(&server, &mut history, Err(&error)).await;
        }
    }

    /// Notes in the server's status what came of an attempt to reach it; the locked history keeps such notes in the order
    /// of the attempts. That it cannot be noted harms no answer.
    async fn note(&self, server: &Server, _history: &mut History, attempt: Result<Era, &Error>) {
        let reached = match attempt {
            Ok(era) if server.state == State::Ready && server.era() == Some(era) => return,
            Ok(era) => Reached { state: State::Ready, error: None, era: Some(era) },
            // What a stop cut off says nothing about the server.
            Err(_) if self.context.stop.is_cancelled() => return,
            // A server that was silent in the era it is known for may have been replaced by one of the other.
            Err(error @ Error::HandshakeTimeout { .. }) => {
                Reached { state: State::Unreachable, error: Some(error.to_string()), era: None }
            }
            Err(error) => Reached { state: error.state(), error: Some(error.to_string()), era: server.era() },
        };
        if let Err(error) = self.store.record_reached(&server.id, server.revision, &reached).await {
            tracing::error!(server.id, %error, "cannot note the state of a server");
        }
    }

    /// Closes sessions that nobody has used for long, and forgets what is not worth remembering. Returns the remote
    /// servers that failed and have rested: somebody may look for them.
    pub fn sweep(&self) -> Vec<String> {
        let now = Instant::now();
        let idle_timeout = self.context.settings.idle_timeout;
        let mut rested = Vec::new();
        self.slots().by_server.retain(|server_id, slot| {
            let idle = slot.live().take_if(|live| {
                Arc::strong_count(&live.session) == 1 && now.duration_since(live.session.used()) >= idle_timeout
            });
            if idle.is_some() {
                tracing::debug!(server.id = server_id, "idle session closed");
            }
            let Ok(history) = slot.history.try_lock() else { return true };
            if let Some(failed) = history.failed.as_ref().filter(|_| slot.live().is_none()) {
                if failed.remote && failed.until <= now {
                    rested.push(server_id.clone());
                }
                if now < failed.until + MEMORY || failed.remote {
                    return true;
                }
            }
            slot.live().is_some() || Arc::strong_count(slot) > 1
        });
        rested
    }

    /// Lets go of whatever session this server has.
    pub fn forget(&self, server_id: &str) {
        self.slots().by_server.remove(server_id);
    }

    /// Lets go of a session of before `revision`, and of one that is just being opened.
    pub fn reconfigured(&self, server_id: &str, revision: i64) {
        let mut slots = self.slots();
        let newer = slots.by_server.get(server_id).is_some_and(|slot| slot.usable(revision).is_some());
        if !newer {
            slots.by_server.remove(server_id);
        }
    }

    /// Lets go of all sessions, for good.
    pub fn close(&self) {
        let mut slots = self.slots();
        slots.closed = true;
        slots.by_server.clear();
    }
}
