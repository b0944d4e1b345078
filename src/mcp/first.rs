//! The first syncs of servers: of one that was just registered, and of many that came together, by an import or while
//! nobody served. Those are connected to in the background, a few at a time, and how far that is can be watched.
//!
//! Several Portolans that start on one database share what came while nobody served, without a word to each other: each
//! takes some servers from a random place at a time, in an order of its own, and what another has connected to by then is
//! passed over.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use futures_util::future::ready;
use futures_util::{StreamExt, stream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::model::{By, Server, State};
use crate::store::{self, now};

use super::pool::jitter;
use super::{Error, Mcp, SyncError, Variables};

/// How many servers that came together are connected to at a time.
const AT_A_TIME: usize = 4;
/// How many of those that came while nobody served are taken at a time.
const PORTION: usize = 32;
/// How many of them may stay as they are after an attempt; one more, and the rest is left to the next start.
const MAX_LEFT: usize = 1_000;
/// How long one of them keeps the next one waiting, at most.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often one is tried while the database is away, and the longest pauses, first and last: a quarter of an
/// hour at most.
const TRIES: u32 = 60;
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(16));

/// How far the first syncs are of servers that came together. One that takes long is not done before it has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirstSyncs {
    pub all: usize,
    /// With those that failed.
    pub done: usize,
    pub failed: usize,
}

impl FirstSyncs {
    pub fn are_over(&self) -> bool {
        self.done == self.all
    }

    /// More come to those that are under way.
    fn begin(&mut self, more: usize) {
        if self.are_over() {
            *self = Self::default();
        }
        self.all += more;
    }

    fn end_one(&mut self, has_worked: bool) {
        self.done += 1;
        self.failed += usize::from(!has_worked);
        // What came while this goes on may be done with it.
        self.all = self.all.max(self.done);
    }

    /// Fewer are left: others were quicker. `false` when nothing changes.
    fn leave(&mut self, fewer: usize) -> bool {
        let all = self.all.saturating_sub(fewer).max(self.done);
        std::mem::replace(&mut self.all, all) != all
    }
}

/// Asks again when it was the database that was away: what is connected to in the background is asked for by nobody later.
async fn until_it_is_back<T, F>(tries: u32, ask: impl Fn() -> F) -> Result<T, SyncError>
where
    F: Future<Output = Result<T, SyncError>>,
{
    let mut pause = PAUSE.0;
    for _ in 1..tries {
        match ask().await {
            Err(SyncError::Store(store::Error::Unavailable(_)) | SyncError::Server(Error::Store)) => {}
            done => return done,
        }
        sleep(jitter(pause)).await;
        pause = (pause * 2).min(PAUSE.1);
    }
    ask().await
}

impl Mcp {
    /// Lists the tools of a new server for the first time, in the background: the sync goes on when the caller leaves.
    /// Waits at most `patience`; `false` when it is still going on. What came of it is in the server's status. `given` are
    /// the values that the request brings, and `by` is who asked for it, here and below.
    pub async fn first_sync(&self, server: Server, given: &Variables, patience: Duration, by: &By) -> bool {
        timeout(patience, self.begin_first_sync(server, given, by, 1, |_| {})).await.is_ok()
    }

    /// `tries` as long as the database is away: who waits for it hears of that at once. `ended` hears whether it worked, if it is
    /// not cut off by a stop.
    fn begin_first_sync(
        &self,
        server: Server,
        given: &Variables,
        by: &By,
        tries: u32,
        ended: impl FnOnce(bool) + Send + 'static,
    ) -> JoinHandle<Option<()>> {
        let (mcp, given, by) = (self.clone(), given.clone(), by.clone());
        let sync = async move {
            let (this, id, given, by) = (&mcp, &server.id, &given, &by);
            let result = until_it_is_back(tries, || async move {
                let turn = this.turn(id);
                let _turn = turn.lock().await;
                // A repeated create may have waited for the turn of the first, and has nothing left to do.
                match this.store.server(id).await? {
                    Some(current) if current.state == State::NeverConnected => {
                        this.sync(&current, None, given, true, by).await.map(|_| ())
                    }
                    _ => Ok(()),
                }
            })
            .await;
            ended(result.is_ok());
            if let Err(SyncError::Store(error)) = result {
                tracing::error!(server.id, %error, "the first sync of a server cannot be stored");
            }
        };
        let stop = self.stop.clone();
        self.tracker.spawn(async move { stop.run_until_cancelled(sync).await })
    }

    /// As [`Mcp::first_sync`], of several new servers, a few at a time; nobody waits for it. Of many at once no session is
    /// kept: they would take the places of those that are used.
    pub fn first_syncs(&self, server_ids: Vec<String>, by: &By) {
        if server_ids.is_empty() {
            return;
        }
        self.first.send_modify(|first| first.begin(server_ids.len()));
        let (mcp, by, stop) = (self.clone(), by.clone(), self.stop.clone());
        let are_many = server_ids.len() > AT_A_TIME;
        let all = async move {
            let sync = |id: String| {
                let (mcp, by) = (&mcp, &by);
                async move { mcp.first_sync_of_many(&id, by, are_many).await }
            };
            stream::iter(server_ids).for_each_concurrent(AT_A_TIME, sync).await;
        };
        self.tracker.spawn(async move { stop.run_until_cancelled(all).await });
    }

    /// One of several that were begun.
    async fn first_sync_of_many(&self, id: &str, by: &By, are_many: bool) {
        let first = self.first.clone();
        let ended = move |has_worked| first.send_modify(|first| first.end_one(has_worked));
        match until_it_is_back(TRIES, || async { Ok(self.store.server(id).await?) }).await {
            Ok(Some(server)) => {
                let sync = self.begin_first_sync(server, &Variables::default(), by, TRIES, ended);
                let _ = timeout(PATIENCE, sync).await;
                if are_many {
                    self.pool.rest(id);
                }
            }
            // It was deleted.
            Ok(None) => ended(true),
            Err(error) => {
                tracing::error!(server.id = id, %error, "a new server cannot be read for its first sync");
                ended(false);
            }
        }
    }

    /// Connects to the servers that came while nobody served, in the background: it has all of them in mind at no time.
    pub(super) fn catch_up(&self) {
        let (mcp, stop) = (self.clone(), self.stop.clone());
        let catching_up = async move {
            let began = now();
            // What the database has to say is said where it is asked for an answer.
            let Ok(all) = until_it_is_back(TRIES, || async { Ok(mcp.store.count_new_servers().await?) }).await else {
                return;
            };
            let all = usize::try_from(all).unwrap_or_default();
            if all == 0 {
                return;
            }
            mcp.first.send_modify(|first| first.begin(all));
            let mut taken = 0;
            // Those that would come again and again: what came of their attempt could not be noted, or takes its time.
            let mut left = HashSet::new();
            while left.len() <= MAX_LEFT {
                let place = format!("mcp_server-{}", Uuid::new_v4());
                let (place, wanted) = (&place, PORTION + left.len());
                let new = || async { Ok(mcp.store.new_servers(place, began, wanted).await?) };
                let Ok(mut ids) = until_it_is_back(TRIES, new).await else { break };
                ids.retain(|id| !left.contains(id));
                ids.truncate(PORTION);
                if ids.is_empty() {
                    break;
                }
                let order = RandomState::new();
                ids.sort_by_cached_key(|id| order.hash_one(id));
                taken += ids.len();
                let (mcp, are_many) = (&mcp, all > AT_A_TIME);
                let sync = |id: String| async move {
                    mcp.first_sync_of_many(&id, &By::ITSELF, are_many).await;
                    let is_new = |it: Server| it.state == State::NeverConnected && it.last_synced_at.is_none();
                    let is_left = mcp.store.server(&id).await.map_or(true, |server| server.is_some_and(is_new));
                    is_left.then_some(id)
                };
                let stayed = stream::iter(ids).map(sync).buffer_unordered(AT_A_TIME);
                left.extend(stayed.filter_map(ready).collect::<Vec<_>>().await);
            }
            mcp.first.send_if_modified(|first| first.leave(all.saturating_sub(taken)));
        };
        self.tracker.spawn(async move { stop.run_until_cancelled(catching_up).await });
    }

    /// How far the first syncs are, from now on.
    pub fn watch_first_syncs(&self) -> watch::Receiver<FirstSyncs> {
        self.first.subscribe()
    }
}
