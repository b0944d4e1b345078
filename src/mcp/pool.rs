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
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Mutex as Lock, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use crate::model::{Connector, Era, Server, ServerType, State};
use crate::store::{Reached, Store};

use super::Error;
use super::oauth::Signer;
use super::session::{Context, Session};
use super::watch::News;

/// How long a server rests after a failure: doubled from the first to the last. One that could be opened and ended soon
/// after that rests less: it may well be that one call ended it.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
const SHORT_BACK_OFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));
/// A session that ends within this time, and has answered nothing, counts as a failure.
const SOON: Duration = Duration::from_secs(10);
/// How long an opening waits for another child to leave, how often it looks for one that can, and how long one that was
/// asked to may take.
const CHILD_TIMEOUT: Duration = Duration::from_secs(15);
const CHILD_LOOK: Duration = Duration::from_millis(50);
const CHILD_LEAVES: Duration = Duration::from_secs(5);
/// How long a call that failed waits for that to be noted.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long after its rest a server is remembered that will not come back by itself.
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
    turns: Turns,
}

/// The places of a server's calls; they stay with the server when its configuration changes.
#[derive(Clone)]
struct Turns {
    calls: Arc<Semaphore>,
    queued: Arc<AtomicUsize>,
}

impl Slot {
    fn new(turns: Turns) -> Arc<Self> {
        Arc::new(Self { live: Mutex::default(), history: Lock::default(), turns })
    }
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
    /// In a row.
    failures: u32,
    last: Option<Failure>,
}

#[derive(Clone)]
struct Failure {
    at: Instant,
    /// An opening failed, and not a session that there was: only the former is the answer of those who waited for it.
    of_opening: bool,
    /// No attempt is made before.
    until: Instant,
    revision: i64,
    error: Error,
    /// The server may come back by itself, and be looked for without being asked.
    may_return: bool,
}

impl History {
    /// Notes a failed opening that is followed by `pause`.
    fn fail(&mut self, revision: i64, error: &Error, pause: Duration, has_child: bool) {
        let at = Instant::now();
        let may_return = !has_child && error.may_pass();
        let error = error.clone();
        self.last = Some(Failure { at, of_opening: true, until: at + pause, revision, error, may_return });
    }

    /// Notes the end of a session, and why it ended if it did so by itself. One that ended soon after it was opened, and
    /// had answered nothing, counts as a failure; the first time may be bad luck.
    fn end(&mut self, live: &Live, why: Option<&Error>) {
        let session = &live.session;
        if session.has_served() {
            self.failures = 0;
        }
        let Some(error) = why.filter(|error| !error.is_ours()) else { return };
        let mut pause = Duration::ZERO;
        if !session.has_served() && session.opened().elapsed() < SOON {
            self.failures += 1;
            if self.failures > 1 {
                pause = back_off(SHORT_BACK_OFF, self.failures - 1);
            }
        }
        self.fail(live.revision, error, error.pause().unwrap_or(pause), session.has_child());
        if let Some(failure) = &mut self.last {
            failure.of_opening = false;
        }
    }
}

/// A call's place at its server; dropping it lets the next one in.
pub struct Place(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// A random time up to `most`, so that many that wait do not come back at once.
pub fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    most.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}

/// How long to leave a server alone after so many failures in a row: between half of the step and all of it.
fn back_off(scale: (Duration, Duration), failures: u32) -> Duration {
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
        let calls = Arc::new(Semaphore::new(self.context.settings.max_calls_per_server));
        let slot = Slot::new(Turns { calls, queued: Arc::default() });
        slots.by_server.insert(server_id.to_owned(), slot.clone());
        Ok(slot)
    }

    /// A place among the calls of a server, in turn, by `deadline`.
    ///
    /// # Errors
    /// [`Error::QueueFull`] when too many wait already, [`Error::QueueTimeout`], [`Error::Stopping`].
    pub async fn enter(&self, server_id: &str, deadline: Instant) -> Result<Place, Error> {
        // Not the slot: who waits here must not keep the session of an old configuration.
        let Turns { calls, queued } = self.slot(server_id)?.turns.clone();
        if let Ok(permit) = calls.clone().try_acquire_owned() {
            return Ok(Place(permit));
        }
        struct Queued(Arc<AtomicUsize>);
        impl Drop for Queued {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let before = queued.fetch_add(1, Ordering::Relaxed);
        let _queued = Queued(queued);
        if before >= self.context.settings.max_queue_per_server {
            return Err(Error::QueueFull);
        }
        let permit = timeout_at(deadline, calls.acquire_owned()).await.map_err(|_| Error::QueueTimeout)?;
        permit.map(Place).map_err(|_| Error::Stopping)
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
        if let Some(failure) = history.last.as_ref().filter(|failure| failure.revision == server.revision) {
            if failure.of_opening && failure.at > arrived {
                return Err(failure.error.clone());
            }
            let rest = failure.until.saturating_duration_since(Instant::now());
            if !now && !rest.is_zero() {
                return Err(Error::Resting { reason: Box::new(failure.error.clone()), rest });
            }
        }
        // The row at hand may be of before a change; what is started must be what is configured.
        let server = match self.store.server(&server.id).await {
            Ok(Some(current)) => current,
            Ok(None) => return Err(Error::Deleted),
            Err(error) => {
                tracing::error!(server.id, %error, "cannot read the server to be opened");
                history.fail(server.revision, &Error::Store, Duration::ZERO, true);
                return Err(Error::Store);
            }
        };
        let opened = self.open(&server).await;
        // After a forget or a stop in the meantime its caller may find out why.
        self.check_current(&server.id, &slot)?;
        match opened {
            Ok(session) => {
                tracing::info!(server.id, server.r#type = server.server_type.as_str(), "session opened");
                history.last = None;
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
                let mut pause = Duration::ZERO;
                if !error.is_ours() {
                    history.failures += 1;
                    pause = error.pause().unwrap_or_else(|| back_off(BACK_OFF, history.failures));
                    // A server that stays away is not written down each time.
                    if server.state != error.state() || server.error.as_deref() != Some(&*error.to_string()) {
                        self.note(&server, &mut history, Err(&error)).await;
                    }
                }
                // Noted also when it is ours: those who wait share it.
                history.fail(server.revision, &error, pause, server.server_type == ServerType::Stdio);
                Err(error)
            }
        }
    }

    async fn open(&self, server: &Server) -> Result<Arc<Session>, Error> {
        let connector = server.config.0.as_ref().map_err(|unreadable| Error::Config(*unreadable))?;
        let signer = match connector {
            Connector::Stdio(_) => None,
            Connector::Sse(remote) | Connector::StreamableHttp(remote) => self.context.sign_ins.of(&server.id, remote),
        };
        self.connect(&server.id, connector, signer, server.era()).await.map(Arc::new)
    }

    /// A session of its own to a connector that is not registered, which ends when it is dropped; `id` is that of no
    /// server.
    pub async fn open_apart(&self, id: &str, connector: &Connector, signer: Option<Signer>) -> Result<Session, Error> {
        self.connect(id, connector, signer, None).await
    }

    async fn connect(
        &self,
        id: &str,
        connector: &Connector,
        signer: Option<Signer>,
        era: Option<Era>,
    ) -> Result<Session, Error> {
        // Before it makes another child leave.
        self.context.children.check(connector)?;
        let permit = match connector {
            Connector::Stdio(_) => Some(self.child_permit().await?),
            Connector::Sse(_) | Connector::StreamableHttp(_) => None,
        };
        let bell = self.news.bell(id);
        Session::open(connector, signer, era, &self.context, bell, permit).await
    }

    /// Room for one more child; the one that is idle longest makes it.
    async fn child_permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        let mut permit = pin!(self.children.clone().acquire_owned());
        let deadline = Instant::now() + CHILD_TIMEOUT;
        // A permit comes back when its child is gone, and that takes the child's time: one is asked at a time.
        let mut asked: Option<Instant> = None;
        while Instant::now() < deadline {
            if let Ok(Ok(permit)) = timeout(Duration::ZERO, &mut permit).await {
                return Ok(permit);
            }
            if asked.is_none_or(|asked| asked.elapsed() > CHILD_LEAVES) && self.close_idlest_child() {
                asked = Some(Instant::now());
            }
            if let Ok(Ok(permit)) = timeout(CHILD_LOOK, &mut permit).await {
                return Ok(permit);
            }
        }
        Err(Error::NoChildFree)
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

    /// Takes a session that has ended out of its slot, and returns why it ended.
    fn bury(&self, slot: &Slot, history: &mut History) -> Option<(i64, Error)> {
        let live = slot.live().take_if(|live| live.session.is_closed())?;
        let error = live.session.ended();
        history.end(&live, error.as_ref());
        Some((live.revision, error?))
    }

    /// Lets go of a session that failed a call with `error`, unless another one has taken its place; the server's status
    /// says why. A server that asks for a pause gets it.
    pub async fn discard(&self, server: &Server, session: &Arc<Session>, error: &Error) {
        session.retire();
        let Ok(slot) = self.slot(&server.id) else { return };
        // Whoever opens a session just now found this one retired, and says how that went. Whoever has heard of its end
        // just now says why, and is waited for, so that the status is told when the caller is.
        let Ok(mut history) = timeout(SETTLE_TIMEOUT, slot.history.lock()).await else { return };
        let Some(live) = slot.take(session) else { return };
        history.end(&live, Some(error));
        if !error.is_ours() {
            self.note(server, &mut history, Err(error)).await;
        }
    }

    /// Lets go of a session that proved to be dead before a call was sent on it.
    pub fn drop_session(&self, server_id: &str, session: &Arc<Session>) {
        session.retire();
        let slot = self.slots().by_server.get(server_id).cloned();
        if let Some(slot) = slot
            && let Some(live) = slot.take(session)
            && let Ok(mut history) = slot.history.try_lock()
        {
            history.end(&live, None);
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
        let (store, id, revision) = (self.store.clone(), server.id.clone(), server.revision);
        let noting = async move {
            if let Err(error) = store.record_reached(&id, revision, &reached).await {
                tracing::error!(server.id = id, %error, "cannot note the state of a server");
            }
        };
        // It goes on when the database takes longer: a caller must not wait for that.
        let _ = timeout(SETTLE_TIMEOUT, self.context.tracker.spawn(noting)).await;
    }

    /// Closes sessions that nobody has used for long, and forgets what is not worth remembering. Returns the servers that
    /// are away, have rested and may have come back, the longest away first: somebody may look for them.
    pub fn sweep(&self) -> Vec<String> {
        let now = Instant::now();
        let settings = &self.context.settings;
        let mut rested = Vec::new();
        self.slots().by_server.retain(|server_id, slot| {
            let idle = slot.live().take_if(|live| {
                Arc::strong_count(&live.session) == 1
                    && now.duration_since(live.session.used()) >= settings.idle_timeout
            });
            let Ok(mut history) = slot.history.try_lock() else { return true };
            if let Some(idle) = idle {
                tracing::debug!(server.id = server_id, "idle session closed");
                history.end(&idle, None);
            }
            let is_used = slot.live().is_some()
                || Arc::strong_count(slot) > 1
                || slot.turns.calls.available_permits() < settings.max_calls_per_server;
            if is_used {
                return true;
            }
            let Some(failure) = &history.last else { return false };
            if failure.may_return && failure.until <= now {
                rested.push((failure.until, server_id.clone()));
            }
            failure.may_return || now < failure.until + MEMORY
        });
        rested.sort();
        rested.into_iter().map(|(_, server_id)| server_id).collect()
    }

    /// Lets go of whatever session this server has.
    pub fn forget(&self, server_id: &str) {
        let slot = self.slots().by_server.remove(server_id);
        if let Some(slot) = slot {
            slot.live().take();
        }
    }

    /// Lets go of a session of before `revision`, and of one that is just being opened.
    pub fn reconfigured(&self, server_id: &str, revision: i64) {
        let mut slots = self.slots();
        let Some(slot) = slots.by_server.get_mut(server_id) else { return };
        if slot.usable(revision).is_none() {
            let old = std::mem::replace(slot, Slot::new(slot.turns.clone()));
            old.live().take();
        }
    }

    /// Lets go of all sessions, for good.
    pub fn close(&self) {
        let mut slots = self.slots();
        slots.closed = true;
        for (_, slot) in slots.by_server.drain() {
            slot.live().take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_back_off_doubles_up_to_its_cap_and_is_never_the_same() {
        for (failures, seconds) in [(1, 1), (2, 2), (5, 16), (6, 30), (1_000, 30)] {
            let full = Duration::from_secs(seconds);
            let drawn: Vec<_> = (0..20).map(|_| back_off(BACK_OFF, failures)).collect();
            assert!(drawn.iter().all(|wait| *wait >= full / 2 && *wait <= full), "{failures}: {drawn:?}");
            assert!(drawn.windows(2).any(|pair| pair[0] != pair[1]), "jitter");
        }
    }
}
