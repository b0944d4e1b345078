//! One live session per server: opened at its first use, shared by all callers, opened again after its end.
//!
//! The lock of a slot is the single flight: whoever comes while a session is being opened waits for that attempt and
//! shares its outcome, a failure too. A session is in use as long as somebody holds its `Arc`; the pool's own hold ends when the server's configuration has a
//! newer revision, when the server is deleted, or when Portolan stops, and calls that are under way finish on it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use tokio::sync::Mutex as Lock;

use crate::model::Server;

use super::Error;
use super::session::{Context, Session};

pub struct Pool {
    context: Context,
    slots: Mutex<Slots>,
}

struct Slots {
    by_server: HashMap<String, Arc<Lock<Slot>>>,
    /// Portolan stops: no session is opened any more.
    closed: bool,
}

#[derive(Default)]
struct Slot {
    /// The session, and the revision of the configuration it was opened with.
    live: Option<(i64, Arc<Session>)>,
    /// How the last attempt failed, when, and for which revision.
    failed: Option<(Instant, i64, Error)>,
}

impl Slot {
    /// A row may have been read before a change that has its session already: the newer session serves it too.
    fn live(&self, revision: i64) -> Option<Arc<Session>> {
        let (opened, session) = self.live.as_ref()?;
        (*opened >= revision && !session.is_closed()).then(|| session.clone())
    }
}

impl Pool {
    pub fn new(context: Context) -> Self {
        let slots = Mutex::new(Slots { by_server: HashMap::new(), closed: false });
        Self { context, slots }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().expect("no code panics while it holds the slots")
    }

    /// The session of this server, if there is a live one and nobody is just opening another.
    pub fn live(&self, server: &Server) -> Option<Arc<Session>> {
        let slot = self.slots().by_server.get(&server.id).cloned()?;
        slot.try_lock().ok()?.live(server.revision)
    }

    /// The live session of this server, and whether it was opened for this call. To be awaited to its end: an opening
    /// that is dropped half-way is lost to those who wait for it.
    ///
    /// # Errors
    /// Why it could not be opened; [`Error::Reconfigured`] when the server was forgotten meanwhile, and
    /// [`Error::Stopping`] once [`Pool::close`] was called.
    pub async fn session(&self, server: &Server) -> Result<(Arc<Session>, bool), Error> {
        let arrived = Instant::now();
        let slot = {
            let mut slots = self.slots();
            if slots.closed {
                return Err(Error::Stopping);
            }
            match slots.by_server.get(&server.id) {
                Some(slot) => slot.clone(),
                None => slots.by_server.entry(server.id.clone()).or_default().clone(),
            }
        };
        let mut held = slot.lock().await;
        if let Some(session) = held.live(server.revision) {
            return Ok((session, false));
        }
        self.check_current(&server.id, &slot)?;
        if let Some((at, revision, error)) = &held.failed
            && *at > arrived
            && *revision == server.revision
        {
            return Err(error.clone());
        }
        held.live = None;
        let opened = match &server.config.0 {
            Ok(connector) => Session::open(connector, server.era(), &self.context).await.map(Arc::new),
            Err(unreadable) => Err(Error::Config(*unreadable)),
        };
        let session = opened.inspect_err(|error| {
            held.failed = Some((Instant::now(), server.revision, error.clone()));
        })?;
        tracing::info!(server.id, server.r#type = server.server_type.as_str(), "session opened");
        held.failed = None;
        // After a forget or a stop in the meantime its caller may find out why.
        self.check_current(&server.id, &slot)?;
        held.live = Some((server.revision, session.clone()));
        Ok((session, true))
    }

    /// Whether this slot still is the server's.
    fn check_current(&self, server_id: &str, slot: &Arc<Lock<Slot>>) -> Result<(), Error> {
        let slots = self.slots();
        match slots.by_server.get(server_id) {
            _ if slots.closed => Err(Error::Stopping),
            Some(current) if Arc::ptr_eq(current, slot) => Ok(()),
            _ => Err(Error::Reconfigured),
        }
    }

    /// Lets go of a session that proved to be dead, unless another one has taken its place.
    pub fn discard(&self, server_id: &str, session: &Arc<Session>) {
        session.retire();
        let Some(slot) = self.slots().by_server.get(server_id).cloned() else { return };
        // Whoever holds the lock looks at the session himself, and finds it retired.
        if let Ok(mut held) = slot.try_lock()
            && held.live.as_ref().is_some_and(|(_, current)| Arc::ptr_eq(current, session))
        {
            held.live = None;
        }
    }

    /// Lets go of whatever session this server has.
    pub fn forget(&self, server_id: &str) {
        self.slots().by_server.remove(server_id);
    }

    /// Lets go of all sessions, for good.
    pub fn close(&self) {
        let mut slots = self.slots();
        slots.closed = true;
        slots.by_server.clear();
    }
}
