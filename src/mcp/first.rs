//! The first syncs of servers: of one that was just registered, and of many that came together, by an import or while
//! nobody served. Those are connected to in the background, a few at a time, and how far that is can be watched.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::model::{By, Server, State};

use super::{Mcp, SyncError, Variables};

/// How many servers that came together are connected to at a time.
const AT_A_TIME: usize = 4;
/// How long one of them keeps the next one waiting, at most.
const PATIENCE: Duration = Duration::from_secs(120);

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
    }
}

impl Mcp {
    /// Lists the tools of a new server for the first time, in the background: the sync goes on when the caller leaves.
    /// Waits at most `patience`; `false` when it is still going on. What came of it is in the server's status. `given` are
    /// the values that the request brings, and `by` is who asked for it, here and below.
    pub async fn first_sync(&self, server: Server, given: &Variables, patience: Duration, by: &By) -> bool {
        timeout(patience, self.begin_first_sync(server, given, by, |_| {})).await.is_ok()
    }

    /// `ended` hears whether it worked, if it is not cut off by a stop.
    fn begin_first_sync(
        &self,
        server: Server,
        given: &Variables,
        by: &By,
        ended: impl FnOnce(bool) + Send + 'static,
    ) -> JoinHandle<Option<()>> {
        let (mcp, given, by) = (self.clone(), given.clone(), by.clone());
        let sync = async move {
            let turn = mcp.turn(&server.id);
            let _turn = turn.lock().await;
            // A repeated create may have waited for the turn of the first, and has nothing left to do.
            let result = match mcp.store.server(&server.id).await {
                Ok(Some(current)) if current.state == State::NeverConnected => {
                    mcp.sync(&current, None, &given, true, &by).await.map(|_| ())
                }
                Ok(_) => Ok(()),
                Err(error) => Err(error.into()),
            };
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
        let (mcp, by) = (self.clone(), by.clone());
        let are_many = server_ids.len() > AT_A_TIME;
        let sync = move |id: String| {
            let (mcp, by) = (mcp.clone(), by.clone());
            async move {
                let first = mcp.first.clone();
                let ended = move |has_worked| first.send_modify(|first| first.end_one(has_worked));
                match mcp.store.server(&id).await {
                    Ok(Some(server)) => {
                        let sync = mcp.begin_first_sync(server, &Variables::default(), &by, ended);
                        let _ = timeout(PATIENCE, sync).await;
                        if are_many {
                            mcp.pool.rest(&id);
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
        };
        let stop = self.stop.clone();
        let all = stream::iter(server_ids).for_each_concurrent(AT_A_TIME, sync);
        self.tracker.spawn(async move { stop.run_until_cancelled(all).await });
    }

    /// Connects to the servers that came while nobody served, in the background.
    pub(super) fn catch_up(&self) {
        let mcp = self.clone();
        self.tracker.spawn(async move {
            // What the database has to say is said where it is asked for an answer.
            if let Ok(new) = mcp.store.new_servers().await {
                mcp.first_syncs(new, &By::ITSELF);
            }
        });
    }

    /// How far the first syncs are, from now on.
    pub fn watch_first_syncs(&self) -> watch::Receiver<FirstSyncs> {
        self.first.subscribe()
    }
}
