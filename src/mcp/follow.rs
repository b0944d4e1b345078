//! What other Portolans on the same database have changed, as far as it concerns sessions here. The store has forgotten it
//! already; here sessions of an old configuration end, and sign-ins are looked at again.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::sleep;

use crate::model::Action;
use crate::store::{Changed, News};

use super::Mcp;
use super::pool::jitter;

/// How many servers one statement looks for.
const AT_A_TIME: usize = 1_000;
/// How often the database is asked for what has changed, and the longest pause before it is asked again.
const TRIES: u32 = 3;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(500);

/// The servers that changes are about.
#[derive(Default)]
struct About<'a> {
    configured: BTreeSet<&'a str>,
    deleted: BTreeSet<&'a str>,
    signed_in: BTreeSet<&'a str>,
}

impl<'a> About<'a> {
    fn of(changes: &'a [Changed]) -> Self {
        const NOTHING: [Action; 3] = [Action::ServerCreated, Action::ToolsChanged, Action::ToolApproved];
        const SIGN_IN: [Action; 3] = [Action::SignInCompleted, Action::SignInAdopted, Action::SignInRemoved];
        let mut about = Self::default();
        for Changed { action, mcp_server_id, .. } in changes {
            let Some(id) = mcp_server_id.as_deref() else { continue };
            let is_one_of = |actions: &[Action]| actions.iter().any(|known| known.as_str() == action);
            if is_one_of(&[Action::ServerDeleted]) {
                about.deleted.insert(id);
            } else if is_one_of(&SIGN_IN) {
                about.signed_in.insert(id);
            } else if is_one_of(&[Action::ServerUpdated]) {
                about.configured.insert(id);
            } else if !is_one_of(&NOTHING) {
                // Of a newer Portolan.
                about.configured.insert(id);
                about.signed_in.insert(id);
            }
        }
        about
    }
}

/// What others have changed, `None` when that may be anything; none at all after the end of the store.
async fn next(news: &mut Receiver<News>) -> Option<Option<Arc<[Changed]>>> {
    match news.recv().await {
        Ok(News::Changed(changes)) => Some(Some(changes)),
        Ok(News::Everything) | Err(RecvError::Lagged(_)) => Some(None),
        Err(RecvError::Closed) => None,
    }
}

impl Mcp {
    /// Follows what others change, in the background, until Portolan stops. What needs no look into the database never waits
    /// for what does, which takes its time when that is busy.
    pub(super) fn follow(&self) {
        let (mcp, stop) = (self.clone(), self.stop.clone());
        let (mut news, mut news_to_look_up) = (self.store.news(), self.store.news());
        let following = async move {
            let let_go = async {
                while let Some(changes) = next(&mut news).await {
                    match changes {
                        Some(changes) => mcp.others_changed(&changes),
                        None => mcp.others_may_have_changed_all(),
                    }
                }
            };
            let look_up = async {
                while let Some(changes) = next(&mut news_to_look_up).await {
                    match changes {
                        Some(changes) => mcp.match_up_changed(&changes).await,
                        None => mcp.match_up_all().await,
                    }
                }
            };
            tokio::join!(let_go, look_up);
        };
        self.tracker.spawn(async move { stop.run_until_cancelled(following).await });
    }

    fn others_changed(&self, changes: &[Changed]) {
        let about = About::of(changes);
        for change in changes.iter().filter(|change| change.mcp_server_id.is_none()) {
            tracing::debug!(action = change.action, "a change elsewhere is about no server");
            self.sign_ins.changed(None);
        }
        // One that came back begins again with the first revision, which says nothing of a session from before.
        about.deleted.iter().for_each(|id| self.pool.renew(id));
        for id in about.signed_in {
            self.sign_ins.changed(Some(id));
            // The next session is that of whoever has signed in now; and of nobody, if that is over.
            self.pool.renew(id);
        }
    }

    fn others_may_have_changed_all(&self) {
        self.sign_ins.may_have_changed().iter().for_each(|id| self.pool.renew(id));
    }

    async fn match_up_changed(&self, changes: &[Changed]) {
        let about = About::of(changes);
        // What a command keeps on disk is here also when it has no session.
        let configured = about.configured.iter().filter(|id| self.pool.has(id));
        let asked: Vec<&str> = configured.chain(&about.deleted).copied().collect();
        self.match_up(&asked, Self::reconfigured).await;
    }

    async fn match_up_all(&self) {
        let servers = self.pool.servers();
        let asked: Vec<&str> = servers.iter().map(String::as_str).collect();
        self.match_up(&asked, |mcp, id, revision| mcp.pool.restored(id, revision)).await;
    }

    /// Ends sessions of these servers that are not of their present configuration: `end` those of a server that has this
    /// revision now.
    async fn match_up(&self, server_ids: &[&str], end: fn(&Self, &str, i64)) {
        for server_ids in server_ids.chunks(AT_A_TIME) {
            let found = self.revisions(server_ids).await;
            for id in server_ids {
                match found.as_ref().map(|found| found.get(*id)) {
                    Some(Some(revision)) => end(self, id, *revision),
                    Some(None) => self.deleted(id),
                    // Better a session too few.
                    None => self.pool.renew(id),
                }
            }
        }
    }

    /// `None` when the database does not say.
    async fn revisions(&self, server_ids: &[&str]) -> Option<HashMap<String, i64>> {
        for attempt in 1..=TRIES {
            match self.store.revisions(server_ids).await {
                Ok(found) => return Some(found),
                Err(error) if attempt == TRIES => {
                    tracing::warn!(%error, "servers that others changed cannot be read: their sessions end");
                }
                Err(_) => sleep(jitter(PAUSE)).await,
            }
        }
        None
    }
}
