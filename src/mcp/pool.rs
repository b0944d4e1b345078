//! One live session per server: opened at its first use, shared by all callers, closed when nobody uses it, and opened
//! again after its end.
//!
//! The lock of a slot is the single flight: whoever comes while a session is being opened waits for that attempt and
//! shares its outcome, a failure too. After a failure the server rests, longer each time, and calls fail at once
//! meanwhile. A session is in use as long as somebody holds its `Arc`; the pool's own hold ends when the server's
//! configuration has a newer revision, when the server is deleted, or when Portolan stops, and calls that are under way
//! finish on it.
//!
//! A server whose templates get values from requests has a session more for each set of values, for the requests with
//! these values alone. Their failures say nothing of the server: its status tells of the session without.

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
use crate::telemetry::metrics::{OpenResult, Opening, Readings, Use};

use super::Error;
use super::oauth::Signer;
use super::session::{Context, Session};
use super::template::{Filled, Filling, Mark, Needs};
use super::variables::{Variables, VariablesFile};
use super::variants::Variants;
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
/// How many servers that are away are remembered for longer, to be looked for; of others the next call finds out.
const MAX_AWAY: usize = 10_000;

pub struct Pool {
    context: Context,
    store: Store,
    news: Arc<News>,
    variables: VariablesFile,
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
    /// What the templates of the configuration need, once somebody has looked, and the revision.
    needs: Mutex<Option<(i64, Arc<Needs>)>>,
    /// The slots of those who bring values of their own. These have none themselves.
    variants: Mutex<Variants<Self>>,
}

/// The places of a server's calls; they stay with the server when its configuration changes.
#[derive(Clone)]
struct Turns {
    calls: Arc<Semaphore>,
    queued: Arc<AtomicUsize>,
}

impl Slot {
    fn new(turns: Turns) -> Arc<Self> {
        let (live, history, needs, variants) = Default::default();
        Arc::new(Self { live, history, turns, needs, variants })
    }
}

#[derive(Clone)]
struct Live {
    /// Of the configuration it was opened with.
    revision: i64,
    /// Of the values that its templates got.
    mark: Option<Mark>,
    session: Arc<Session>,
}

/// How the last attempts went.
#[derive(Default)]
struct History {
    /// In a row.
    failures: u32,
    last: Option<Failure>,
    /// There was a session, and it did not end because nobody used it.
    has_lost: bool,
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

/// What came of an opening, as it is counted.
fn result<T>(opened: &Result<T, Error>) -> OpenResult {
    match opened {
        Ok(_) => OpenResult::Opened,
        Err(error) if error.is_ours() => OpenResult::Refused,
        Err(error) if error.state() == State::AuthRequired => OpenResult::AuthRequired,
        Err(_) => OpenResult::Unreachable,
    }
}

/// A call's place at its server; dropping it lets the next one in.
pub struct Place {
    _permit: OwnedSemaphorePermit,
    /// It was not free at once: what the call is to be sent with may have been changed meanwhile.
    pub was_awaited: bool,
    /// When it was.
    pub asked: Instant,
    /// Until then the call may take.
    pub deadline: Instant,
}

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

/// A server that stays away is not written down each time.
fn is_news(server: &Server, error: &Error) -> bool {
    server.state != error.state() || server.error.as_deref() != Some(&*error.to_string())
}

impl Slot {
    fn live(&self) -> MutexGuard<'_, Option<Live>> {
        self.live.lock().expect("no code panics while it holds the session")
    }

    /// A row may have been read before a change that has its session already: the newer session serves it too. The
    /// values must be the same.
    fn usable(&self, revision: i64, wanted: Option<&Mark>) -> Option<Arc<Session>> {
        let live = self.live();
        let Live { revision: opened, mark, session } = live.as_ref()?;
        let serves = *opened >= revision && mark.as_ref() == wanted;
        (serves && !session.is_closed()).then(|| session.clone())
    }

    /// Whether nothing in it is of a revision that does not fit, whatever the values. What is being opened may be: it began
    /// with a row that is not looked at here.
    fn is_of(&self, fits: impl Fn(i64) -> bool) -> bool {
        let Ok(history) = self.history.try_lock() else { return self.has(fits) };
        let failure = history.last.as_ref().is_none_or(|failure| fits(failure.revision));
        failure && (self.live().is_none() || self.has(fits))
    }

    /// Whether it has a session of a revision that fits.
    fn has(&self, fits: impl Fn(i64) -> bool) -> bool {
        self.live().as_ref().is_some_and(|live| fits(live.revision) && !live.session.is_closed())
    }

    /// Nobody uses its session, if it has one.
    fn is_idle(&self) -> bool {
        self.live().as_ref().is_none_or(|live| Arc::strong_count(&live.session) == 1)
    }

    fn take_idle(&self, since: Duration) -> Option<Live> {
        self.live().take_if(|live| Arc::strong_count(&live.session) == 1 && live.session.used().elapsed() >= since)
    }

    /// What the templates of the server's configuration need.
    fn needs(&self, server: &Server) -> Arc<Needs> {
        let mut known = self.needs.lock().expect("no code panics while it holds the needs");
        if let Some((revision, needs)) = &*known
            && *revision == server.revision
        {
            return needs.clone();
        }
        // One that cannot be opened now may be once its key has come, at the same revision.
        let Ok(connector) = &server.config.0 else { return Arc::default() };
        let needs = Arc::new(Needs::of(connector));
        *known = Some((server.revision, needs.clone()));
        needs
    }

    fn variants(&self) -> MutexGuard<'_, Variants<Self>> {
        self.variants.lock().expect("no code panics while it holds the variants")
    }

    /// The slot for these values, if there is one: this one, but for values of a request.
    fn known(self: &Arc<Self>, filling: &Filling) -> Option<Arc<Self>> {
        match &filling.mark {
            Some(mark) if filling.is_own => self.variants().get(mark),
            _ => Some(self.clone()),
        }
    }

    /// The slot for these values.
    ///
    /// # Errors
    /// [`Error::NoVariantFree`].
    fn of(self: &Arc<Self>, filling: &Filling) -> Result<Arc<Self>, Error> {
        match &filling.mark {
            Some(mark) if filling.is_own => {
                let make = || Self::new(self.turns.clone());
                self.variants().get_or_make(mark, make, Self::is_idle).ok_or(Error::NoVariantFree)
            }
            _ => Ok(self.clone()),
        }
    }

    /// The variant that has this session.
    fn holder(&self, session: &Arc<Session>) -> Option<Arc<Self>> {
        let holds = |live: &Live| Arc::ptr_eq(&live.session, session);
        self.variants().all().into_iter().find(|variant| variant.live().as_ref().is_some_and(holds))
    }

    /// Lets go of every session.
    fn clear(&self) {
        self.live().take();
        let mut variants = self.variants();
        variants.retain(|variant| {
            variant.live().take();
            false
        });
    }

    /// Closes variants that nobody has used for long, and forgets those that are not worth remembering.
    fn sweep(&self, idle_timeout: Duration) {
        let now = Instant::now();
        self.variants().retain(|variant| {
            let idle = variant.take_idle(idle_timeout);
            if Arc::strong_count(variant) > 1 || variant.live().is_some() {
                return true;
            }
            let Ok(mut history) = variant.history.try_lock() else { return true };
            if let Some(idle) = idle {
                history.end(&idle, None);
            }
            history.last.as_ref().is_some_and(|failure| now < failure.until)
        });
    }

    /// Takes the session out of the slot if it is this one.
    fn take(&self, session: &Arc<Session>) -> Option<Live> {
        self.live().take_if(|live| Arc::ptr_eq(&live.session, session))
    }
}

impl Pool {
    pub fn new(context: Context, store: Store, news: Arc<News>, variables: VariablesFile) -> Self {
        let slots = Mutex::new(Slots { by_server: HashMap::new(), closed: false });
        let children = Arc::new(Semaphore::new(context.settings.max_children));
        Self { context, store, news, variables, slots, children }
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

    /// A place among the calls of a server, in turn, within `time`, which is that of the call, too.
    ///
    /// # Errors
    /// [`Error::QueueFull`] when too many wait already, [`Error::QueueTimeout`], [`Error::Stopping`].
    pub async fn enter(&self, server_id: &str, time: Duration) -> Result<Place, Error> {
        let asked = Instant::now();
        let deadline = asked + time;
        // Not the slot: who waits here must not keep the session of an old configuration.
        let Turns { calls, queued } = self.slot(server_id)?.turns.clone();
        if let Ok(permit) = calls.clone().try_acquire_owned() {
            return Ok(Place { _permit: permit, was_awaited: false, asked, deadline });
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
        let permit = permit.map_err(|_| Error::Stopping)?;
        Ok(Place { _permit: permit, was_awaited: true, asked, deadline })
    }

    /// The session of this server for a request that brings these values, if there is a live one.
    pub fn live(&self, server: &Server, given: &Variables) -> Option<Arc<Session>> {
        let slot = self.slots().by_server.get(&server.id).cloned()?;
        let needs = slot.needs(server);
        let session = if needs.is_empty() {
            slot.usable(server.revision, None)?
        } else {
            let filling = self.variables.choose(&needs, given).ok()?;
            slot.known(&filling)?.usable(server.revision, filling.mark.as_ref())?
        };
        session.touch();
        Some(session)
    }

    /// The live session of this server for a request that brings these values, and whether it was opened for this call.
    /// To be awaited to its end: an opening that is dropped half-way is lost to those who wait for it. `now` does not wait
    /// for the end of a rest.
    ///
    /// # Errors
    /// Why it could not be opened, which is in the server's status then, but for a request's values; [`Error::NoValue`];
    /// [`Error::BadValue`]; [`Error::Resting`]; [`Error::Deleted`]; [`Error::Reconfigured`] when the server was changed
    /// meanwhile; [`Error::NoChildFree`]; [`Error::NoVariantFree`]; [`Error::Stopping`].
    pub async fn session(&self, server: &Server, given: &Variables, now: bool) -> Result<(Arc<Session>, bool), Error> {
        let arrived = Instant::now();
        let main = self.slot(&server.id)?;
        let needs = main.needs(server);
        let filling = match self.variables.choose(&needs, given) {
            Ok(filling) => filling,
            Err(error) => {
                if server.last_synced_at.is_none() && is_news(server, &error) {
                    self.note(server, &mut *main.history.lock().await, Err(&error)).await;
                }
                return Err(error);
            }
        };
        let slot = main.of(&filling)?;
        let mut history = slot.history.lock().await;
        if let Some(session) = slot.usable(server.revision, filling.mark.as_ref()) {
            session.touch();
            return Ok((session, false));
        }
        self.check_current(&server.id, &slot, &filling)?;
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
        // Values were chosen for what was configured before.
        if main.needs(&server) != needs {
            return Err(Error::Reconfigured);
        }
        let kind = if history.has_lost { Opening::Reconnect } else { Opening::First };
        let counted = self.context.metrics.begin_open(server.server_type, kind);
        let opened = self.open(&server, &filling).await;
        counted.end(result(&opened));
        // After a forget or a stop in the meantime its caller may find out why.
        self.check_current(&server.id, &slot, &filling)?;
        match opened {
            Ok(session) => {
                tracing::info!(server.id, server.r#type = server.server_type.as_str(), "session opened");
                history.last = None;
                history.has_lost = false;
                // A server that was never listed is ready when it has been.
                if server.last_synced_at.is_some() && !filling.is_own {
                    self.note(&server, &mut history, Ok(session.era())).await;
                }
                // Looked at again after the wait: from now on a forget finds the session.
                self.check_current(&server.id, &slot, &filling)?;
                *slot.live() = Some(Live { revision: server.revision, mark: filling.mark, session: session.clone() });
                Ok((session, true))
            }
            Err(error) => {
                let mut pause = Duration::ZERO;
                if !error.is_ours() {
                    history.failures += 1;
                    pause = error.pause().unwrap_or_else(|| back_off(BACK_OFF, history.failures));
                }
                // What comes of values says nothing of the server, unless nothing else is known of it.
                let of_values = error.is_about_values() || filling.mark.is_some() && matches!(error, Error::NoTemplate);
                let is_told = match (of_values, filling.is_own) {
                    (false, _) if error.is_ours() => false,
                    (_, true) => server.state == State::NeverConnected,
                    (true, false) => server.last_synced_at.is_none(),
                    (false, false) => true,
                };
                if is_told && is_news(&server, &error) {
                    self.note(&server, &mut history, Err(&error)).await;
                }
                // Noted also when it is ours: those who wait share it.
                history.fail(server.revision, &error, pause, server.server_type == ServerType::Stdio);
                Err(error)
            }
        }
    }

    async fn open(&self, server: &Server, filling: &Filling) -> Result<Arc<Session>, Error> {
        let connector = server.config.0.as_ref().map_err(|unreadable| Error::Config(*unreadable))?;
        let filled = Filled::new(connector, filling)?;
        let signer = match connector {
            Connector::Stdio(_) => None,
            Connector::Sse(remote) | Connector::StreamableHttp(remote) => self.context.sign_ins.of(&server.id, remote),
        };
        self.connect(&server.id, &filled, signer, server.era()).await.map(Arc::new)
    }

    /// A session of its own to a connector that is not registered, for a request that brings these values. It ends when it
    /// is dropped; `id` is that of no server.
    pub async fn open_apart(
        &self,
        id: &str,
        connector: &Connector,
        given: &Variables,
        signer: Option<Signer>,
    ) -> Result<Session, Error> {
        let filled = Filled::new(connector, &self.variables.choose_for(connector, given)?)?;
        let counted = self.context.metrics.begin_open(connector.server_type(), Opening::First);
        let opened = self.connect(id, &filled, signer, None).await;
        counted.end(result(&opened));
        opened
    }

    async fn connect(
        &self,
        id: &str,
        filled: &Filled,
        signer: Option<Signer>,
        era: Option<Era>,
    ) -> Result<Session, Error> {
        // Before it makes another child leave.
        self.context.children.check(&filled.connector)?;
        let permit = match &filled.connector {
            Connector::Stdio(_) => Some(self.child_permit().await?),
            Connector::Sse(_) | Connector::StreamableHttp(_) => None,
        };
        let bell = self.news.bell(id);
        Session::open(filled, signer, era, &self.context, bell, permit).await
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
        let mut slots: Vec<_> = self.slots().by_server.values().cloned().collect();
        let variants: Vec<_> = slots.iter().flat_map(|slot| slot.variants().all()).collect();
        slots.extend(variants);
        let idle = slots.iter().filter_map(|slot| {
            let live = slot.live();
            let session = &live.as_ref()?.session;
            (session.has_child() && Arc::strong_count(session) == 1).then(|| (session.used(), slot))
        });
        let Some((_, slot)) = idle.min_by_key(|(used, _)| *used) else { return false };
        // Somebody may have taken it meanwhile: then it is not idle any more.
        slot.live().take_if(|live| Arc::strong_count(&live.session) == 1).is_some()
    }

    /// Whether this slot still is the server's for these values.
    fn check_current(&self, server_id: &str, slot: &Arc<Slot>, filling: &Filling) -> Result<(), Error> {
        let slots = self.slots();
        let current = slots.by_server.get(server_id).and_then(|current| current.known(filling));
        match current {
            _ if slots.closed => Err(Error::Stopping),
            Some(current) if Arc::ptr_eq(&current, slot) => Ok(()),
            _ => Err(Error::Reconfigured),
        }
    }

    /// Takes a session that has ended out of its slot, and returns why it ended.
    fn bury(&self, slot: &Slot, history: &mut History) -> Option<(i64, Error)> {
        let live = slot.live().take_if(|live| live.session.is_closed())?;
        let error = live.session.ended();
        history.end(&live, error.as_ref());
        self.lose(&live, history);
        Some((live.revision, error?))
    }

    /// Lets go of a session that failed a call with `error`, unless another one has taken its place; the server's status
    /// says why. A server that asks for a pause gets it.
    pub async fn discard(&self, server: &Server, session: &Arc<Session>, error: &Error) {
        session.retire();
        let Ok(main) = self.slot(&server.id) else { return };
        let variant = main.holder(session);
        let is_variant = variant.is_some();
        let slot = variant.unwrap_or(main);
        // Whoever opens a session just now found this one retired, and says how that went. Whoever has heard of its end
        // just now says why, and is waited for, so that the status is told when the caller is.
        let Ok(mut history) = timeout(SETTLE_TIMEOUT, slot.history.lock()).await else { return };
        let Some(live) = slot.take(session) else { return };
        history.end(&live, Some(error));
        self.lose(&live, &mut history);
        if !error.is_ours() && !is_variant {
            self.note(server, &mut history, Err(error)).await;
        }
    }

    /// Lets go of a session that proved to be dead before a call was sent on it.
    pub fn drop_session(&self, server_id: &str, session: &Arc<Session>) {
        session.retire();
        let main = self.slots().by_server.get(server_id).cloned();
        if let Some(slot) = main.map(|main| main.holder(session).unwrap_or(main))
            && let Some(live) = slot.take(session)
            && let Ok(mut history) = slot.history.try_lock()
        {
            history.end(&live, None);
            self.lose(&live, &mut history);
        }
    }

    /// Counts a session that was lost.
    fn lose(&self, live: &Live, history: &mut History) {
        history.has_lost = true;
        self.context.metrics.lost_session(live.session.transport());
    }

    /// How sessions, children and calls stand.
    pub fn read(&self, readings: &mut Readings) {
        let settings = &self.context.settings;
        let free = self.children.available_permits();
        readings.children = Use { now: settings.max_children.saturating_sub(free), most: settings.max_children };
        let (now, most) = self.context.budget.usage();
        readings.held_bytes = Use { now, most };
        let mains: Vec<_> = self.slots().by_server.values().cloned().collect();
        for main in mains {
            readings.calls += settings.max_calls_per_server.saturating_sub(main.turns.calls.available_permits());
            readings.queued_calls += main.turns.queued.load(Ordering::Relaxed);
            let variants = main.variants().all();
            for slot in variants.iter().chain([&main]) {
                if let Some(Live { session, .. }) = &*slot.live()
                    && !session.is_closed()
                {
                    readings.add_session(session.transport(), Arc::strong_count(session) > 1);
                }
            }
        }
    }

    /// Takes note of sessions that have ended by themselves.
    pub async fn settle(&self, server_id: &str) {
        let Some(slot) = self.slots().by_server.get(server_id).cloned() else { return };
        let variants = slot.variants().all();
        for variant in variants {
            if variant.live().as_ref().is_some_and(|live| live.session.is_closed()) {
                let mut history = variant.history.lock().await;
                self.bury(&variant, &mut history);
            }
        }
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
        let (mut rested, mut away) = (Vec::new(), 0);
        self.slots().by_server.retain(|server_id, slot| {
            slot.sweep(settings.idle_timeout);
            let idle = slot.take_idle(settings.idle_timeout);
            let Ok(mut history) = slot.history.try_lock() else { return true };
            if let Some(idle) = idle {
                tracing::debug!(server.id = server_id, "idle session closed");
                history.end(&idle, None);
            }
            let is_used = slot.live().is_some()
                || !slot.variants().is_empty()
                || Arc::strong_count(slot) > 1
                || slot.turns.calls.available_permits() < settings.max_calls_per_server;
            if is_used {
                return true;
            }
            let Some(failure) = &history.last else { return false };
            if failure.may_return && failure.until <= now {
                rested.push((failure.until, server_id.clone()));
            }
            away += usize::from(failure.may_return);
            (failure.may_return && away <= MAX_AWAY) || now < failure.until + MEMORY
        });
        rested.sort();
        rested.into_iter().map(|(_, server_id)| server_id).collect()
    }

    /// The servers that have a session, had one, or have been tried.
    pub fn servers(&self) -> Vec<String> {
        self.slots().by_server.keys().cloned().collect()
    }

    /// Whether this server is among [`Pool::servers`].
    pub fn has(&self, server_id: &str) -> bool {
        self.slots().by_server.contains_key(server_id)
    }

    /// Lets go of whatever session this server has.
    pub fn forget(&self, server_id: &str) {
        let slot = self.slots().by_server.remove(server_id);
        if let Some(slot) = slot {
            slot.clear();
        }
    }

    /// Lets go of a session of before `revision`, and of one that is just being opened.
    pub fn reconfigured(&self, server_id: &str, revision: i64) {
        self.keep(server_id, |of| of >= revision);
    }

    /// As [`Pool::reconfigured`], also of one of after `revision`. A database that was restored, or whose standby did not have
    /// all of it, gives numbers a second time. Who has changed the server here just now loses a session for nothing.
    pub fn restored(&self, server_id: &str, revision: i64) {
        self.keep(server_id, |of| of == revision);
    }

    fn keep(&self, server_id: &str, fits: impl Fn(i64) -> bool) {
        let mut slots = self.slots();
        let Some(slot) = slots.by_server.get_mut(server_id) else { return };
        if slot.is_of(&fits) {
            slot.variants().retain(|variant| variant.is_of(&fits));
        } else {
            let old = std::mem::replace(slot, Slot::new(slot.turns.clone()));
            old.clear();
        }
    }

    /// Lets go of the server's session, and of one that is just being opened; its calls keep their places.
    pub fn renew(&self, server_id: &str) {
        let mut slots = self.slots();
        if let Some(slot) = slots.by_server.get_mut(server_id) {
            let old = std::mem::replace(slot, Slot::new(slot.turns.clone()));
            old.clear();
        }
    }

    /// Closes the server's session if nobody uses it.
    pub fn rest(&self, server_id: &str) {
        let slot = self.slots().by_server.get(server_id).cloned();
        let Some(slot) = slot else { return };
        if let Ok(mut history) = slot.history.try_lock()
            && let Some(idle) = slot.take_idle(Duration::ZERO)
        {
            history.end(&idle, None);
        }
    }

    /// Lets go of all sessions, for good.
    pub fn close(&self) {
        let mut slots = self.slots();
        slots.closed = true;
        for (_, slot) in slots.by_server.drain() {
            slot.clear();
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
