//! One live session per server: opened at its first use, shared by all callers, opened again after its end.
//!
//! The lock of a slot is the single flight: whoever comes while a session is being opened waits for that one. A session
//! is in use as long as somebody holds its `Arc`; the pool's own hold ends when the server's configuration has another
//! revision, when the server is deleted, or when Portolan stops, and calls that are under way finish on the old one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Mutex as Lock;

use crate::model::{Era, Server};

use super::Error;
use super::session::{Context, Session};

pub struct Pool {
    context: Context,
    slots: Mutex<Slots>,
}

struct Slots {
    by_server: HashMap<String, Arc<Slot>>,
    /// Portolan stops: no session is opened any more.
    closed: bool,
}

#[derive(Default)]
struct Slot {
    /// The session and the revision of the configuration it was opened with.
    session: Lock<Option<(i64, Arc<Session>)>>,
}

impl Pool {
    pub fn new(context: Context) -> Self {
        Self { context, slots: Mutex::new(Slots { by_server: HashMap::new(), closed: false }) }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().expect("no code panics while it holds the slots")
    }

    /// The live session of this server, opened if there is none for its present configuration.
    ///
    /// # Errors
    /// Why it could not be opened; [`Error::Stopping`] once [`Pool::close`] was called.
    pub async fn session(&self, server: &Server) -> Result<Arc<Session>, Error> {
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
        let mut held = slot.session.lock().await;
        if let Some((revision, session)) = &*held
            && *revision == server.revision
            && !session.is_closed()
        {
            return Ok(session.clone());
        }
        *held = None;
        let connector = server.config.0.as_ref().map_err(|unreadable| Error::Config(*unreadable))?;
        let era = server.era.as_deref().and_then(Era::from_name);
        let session = Arc::new(Session::open(connector, era, &self.context).await?);
        tracing::info!(server.id, server.r#type = server.server_type.as_str(), "session opened");
        // A stop or a forget while it was being opened: this caller may still use it, the next one opens its own.
        let slots = self.slots();
        if !slots.closed && slots.by_server.get(&server.id).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
            *held = Some((server.revision, session.clone()));
        }
        Ok(session)
    }

    /// Lets go of a session that proved to be dead, unless another one has taken its place.
    pub async fn discard(&self, server_id: &str, session: &Arc<Session>) {
        let Some(slot) = self.slots().by_server.get(server_id).cloned() else { return };
        let mut held = slot.session.lock().await;
        if held.as_ref().is_some_and(|(_, current)| Arc::ptr_eq(current, session)) {
            *held = None;
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
