//! What happens between calls: lists that changed are read again, sessions that ended are told in their server's status,
//! idle ones are closed, and servers that were away are looked for.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::Mcp;
use super::pool::jitter;

/// How long after a notice a list is read again, so that many notices make one list; doubled while they go on coming.
const RELIST: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// How many lists are read at a time because of notices, and how many servers are looked for.
const AT_A_TIME: usize = 4;
/// The longest time between two looks at the sessions.
const SWEEP: Duration = Duration::from_secs(10);

/// How a session tells what nobody asked it.
#[derive(Clone)]
pub struct Bell {
    server_id: Arc<str>,
    news: Arc<News>,
}

impl Bell {
    pub fn server_id(&self) -> &str {
        &self.server_id
    }

    pub fn list_changed(&self) {
        self.ring(|item| item.list_changed = true);
    }

    /// The session ended by itself.
    pub fn ended(&self) {
        self.ring(|item| item.ended = true);
    }

    fn ring(&self, set: impl FnOnce(&mut Item)) {
        set(self.news.items().entry(self.server_id.clone()).or_default());
        self.news.rung.notify_one();
    }
}

/// What sessions have told and nobody has read; one entry per server at most.
#[derive(Default)]
pub struct News {
    items: Mutex<HashMap<Arc<str>, Item>>,
    rung: Notify,
}

#[derive(Default)]
struct Item {
    list_changed: bool,
    ended: bool,
}

impl News {
    pub fn bell(self: &Arc<Self>, server_id: &str) -> Bell {
        Bell { server_id: server_id.into(), news: self.clone() }
    }

    fn items(&self) -> MutexGuard<'_, HashMap<Arc<str>, Item>> {
        self.items.lock().expect("no code panics while it holds the items")
    }

    async fn next(&self) -> HashMap<Arc<str>, Item> {
        self.rung.notified().await;
        std::mem::take(&mut *self.items())
    }
}

/// The lists that are to be read again, and whether another notice came since that was begun.
#[derive(Clone, Default)]
struct Relists(Arc<Mutex<HashMap<Arc<str>, bool>>>);

impl Relists {
    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, bool>> {
        self.0.lock().expect("no code panics while it holds the lists")
    }

    /// `true` when somebody has to begin.
    fn want(&self, server_id: &Arc<str>) -> bool {
        match self.lock().entry(server_id.clone()) {
            Entry::Occupied(mut again) => {
                again.insert(true);
                false
            }
            Entry::Vacant(first) => {
                first.insert(false);
                true
            }
        }
    }

    fn begin(&self, server_id: &Arc<str>) {
        self.lock().insert(server_id.clone(), false);
    }

    /// `true` when no notice came since the beginning.
    fn is_over(&self, server_id: &Arc<str>) -> bool {
        let mut lists = self.lock();
        let over = lists.get(server_id).is_none_or(|again| !again);
        if over {
            lists.remove(server_id);
        }
        over
    }
}

/// How often sign-ins are forgotten whose time is over.
const FORGET: Duration = Duration::from_secs(60);

/// Runs until Portolan stops.
pub async fn watch(mcp: Mcp, news: Arc<News>) {
    let relists = Relists::default();
    let turns = Arc::new(Semaphore::new(AT_A_TIME));
    let looks = Arc::new(Semaphore::new(AT_A_TIME));
    let mut sweeps = interval((mcp.settings.idle_timeout / 4).clamp(Duration::from_millis(50), SWEEP));
    sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut endings = interval(FORGET);
    endings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = mcp.stop.cancelled() => return,
            items = news.next() => {
                for (server_id, item) in items {
                    if item.ended {
                        let (mcp, server_id) = (mcp.clone(), server_id.clone());
                        mcp.tracker.clone().spawn(async move { mcp.pool.settle(&server_id).await });
                    }
                    if item.list_changed {
                        relist(&mcp, &relists, &turns, server_id);
                    }
                }
            }
            _ = endings.tick() => {
                let store = mcp.store.clone();
                mcp.tracker.spawn(async move {
                    if let Err(error) = store.forget_old_authorizations().await {
                        tracing::warn!(%error, "old sign-ins cannot be forgotten");
                    }
                });
            }
            _ = sweeps.tick() => {
                for server_id in mcp.pool.sweep() {
                    let Ok(turn) = looks.clone().try_acquire_owned() else { break };
                    let looking = mcp.clone();
                    mcp.tracker.spawn(async move {
                        looking.look_for(&server_id).await;
                        drop(turn);
                    });
                }
            }
        }
    }
}

/// Lists the tools of a server again in a while, once for all notices that come until then.
fn relist(mcp: &Mcp, relists: &Relists, turns: &Arc<Semaphore>, server_id: Arc<str>) {
    if !relists.want(&server_id) {
        return;
    }
    let (mcp, relists, turns) = (mcp.clone(), relists.clone(), turns.clone());
    let (tracker, stop) = (mcp.tracker.clone(), mcp.stop.clone());
    let relisting = async move {
        let mut delay = RELIST.0;
        loop {
            sleep(delay + jitter(delay)).await;
            let turn = turns.acquire().await;
            relists.begin(&server_id);
            mcp.relist(&server_id).await;
            drop(turn);
            // A server that answers each list with a notice is listed ever less often.
            sleep(delay).await;
            if relists.is_over(&server_id) {
                return;
            }
            delay = (delay * 2).min(RELIST.1);
        }
    };
    tracker.spawn(async move { stop.run_until_cancelled(relisting).await });
}
