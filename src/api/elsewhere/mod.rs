//! Runs that this process does not have in its memory: those of other replicas, and those with an `Idempotency-Key` from
//! before it started (CONTRACT row 16). Whatever happens, none of them is made twice.
//!
//! A run with a key has a row in the database from before it begins. Who writes it first makes the run; others wait for what
//! comes of it as long as its replica lives. Its outcome is in the row before anybody gets it, unless the database is away.
//!
//! A run without a key is in the memory of its replica alone, and costs the database nothing. When an SDK tries again and this
//! replica does not know its first try, it asks those that live, and makes the run when none of them knows it. Of two that
//! ask for one run, the one with the later question waits for the other; so nobody waits in a circle.
//!
//! A replica lives as long as its beats come. What one that ended without a word had sent, nobody knows: it is not made again.

mod asked;
mod keyed;

use std::collections::HashSet;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config::Runs as Settings;
use crate::error::Error;
use crate::mcp;
use crate::store::{self, NewSharedRun, Replica, SharedProgress as Progress, Store};

use super::repeats::{Digest, key_taken};
use super::wire::ToolExecutionResult;

pub use asked::{Asking, Known, Recall, Verdict};

/// How long a request waits for the database before it begins: nothing was sent then.
const RECORD_TIMEOUT: Duration = Duration::from_secs(4);
/// How long those who wait for an outcome wait for its row.
const WRITE_FIRST: Duration = Duration::from_secs(2);
/// How long it is tried to write what came of a run, and how long one attempt may take.
const WRITE_FOR: Duration = Duration::from_secs(10 * 60);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How many bytes of outcomes wait for the database; beyond that rows say only that a run has ended.
const MAX_UNWRITTEN: usize = 64 * 1024 * 1024;
/// How many rows are removed later of which nobody knows whether they were written.
const MAX_DOUBTS: usize = 1_000;
/// Between two looks at a run elsewhere, and at whether its replica lives.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const LOOK_AT_REPLICAS_EVERY: Duration = Duration::from_secs(2);
/// After a beat that the database did not take.
const BEAT_AGAIN: Duration = Duration::from_millis(500);
/// How many beats there are in the time after which a replica without any is lost.
const BEATS: u32 = 6;
/// How much longer than a run may take one waits for its end elsewhere.
const GRACE: Duration = Duration::from_secs(60);
/// How long a stop waits for what is still to be written.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
const SWEEP_EVERY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10 * 60));
const SWEEP_PAUSE: Duration = Duration::from_millis(20);

/// Clones share everything.
#[derive(Clone)]
pub struct Elsewhere(Arc<Shared>);

struct Shared {
    store: Store,
    settings: Settings,
    /// The name of this replica, another one at each start.
    replica: String,
    /// How long a run takes at most.
    longest: Duration,
    attempts: AtomicI64,
    /// Those of them with a key whose rows may say `running`: under way, or with an outcome that is not written.
    under_way: Mutex<HashSet<i64>>,
    /// The last question that is answered, with all before it.
    answered: AtomicI64,
    /// Bytes of outcomes that are not written yet.
    unwritten: AtomicUsize,
    /// Room for rows of which nobody knows whether they were written.
    doubts: Arc<Semaphore>,
    /// Since when beats have come without a gap, and the last one.
    beats: Mutex<Option<(Instant, Instant)>>,
    closing: CancellationToken,
    abandoned: CancellationToken,
    /// What is done for as long as this replica serves, and what is to be finished before it ends.
    tasks: TaskTracker,
    writes: TaskTracker,
}

impl Elsewhere {
    /// A run takes `longest` at most.
    pub fn new(store: Store, settings: Settings, longest: Duration) -> Self {
        Self(Arc::new(Shared {
            store,
            settings,
            replica: Uuid::new_v4().simple().to_string(),
            longest,
            attempts: AtomicI64::new(0),
            under_way: Mutex::default(),
            answered: AtomicI64::new(0),
            unwritten: AtomicUsize::new(0),
            doubts: Arc::new(Semaphore::new(MAX_DOUBTS)),
            beats: Mutex::new(None),
            closing: CancellationToken::new(),
            abandoned: CancellationToken::new(),
            tasks: TaskTracker::new(),
            writes: TaskTracker::new(),
        }))
    }

    /// Whether there may be other replicas.
    pub fn is_shared(&self) -> bool {
        self.0.store.is_shared()
    }

    /// Says that this replica lives, before it serves, and goes on saying so. `recall` says what it knows of a run that
    /// another one asks for, and `taken` hears the number of what another one was told of.
    pub async fn open(
        &self,
        recall: impl Fn(&Digest, i64) -> Recall + Send + Sync + 'static,
        taken: impl Fn(&Digest, u64) + Send + Sync + 'static,
    ) {
        let closing = &self.0.closing;
        self.0.tasks.spawn(closing.clone().run_until_cancelled_owned(self.clone().sweep()));
        if self.is_shared() {
            self.beat().await;
            self.0.tasks.spawn(closing.clone().run_until_cancelled_owned(self.clone().pulse()));
            self.0.tasks.spawn(closing.clone().run_until_cancelled_owned(self.clone().attend(recall, taken)));
        }
    }

    /// Writes what is left to be written, and says that this replica has ended; no run is under way any more.
    pub async fn close(&self) {
        self.0.closing.cancel();
        self.0.tasks.close();
        self.0.writes.close();
        self.0.tasks.wait().await;
        if timeout(CLOSE_TIMEOUT, self.0.writes.wait()).await.is_err() {
            tracing::error!("the database did not take in time what came of runs; they are not known after this stop");
            self.0.abandoned.cancel();
            self.0.writes.wait().await;
        } else if self.is_shared() {
            // One that is not told takes this replica for dead soon.
            let _ = timeout(WRITE_TIMEOUT.min(CLOSE_TIMEOUT), self.0.store.leave(&self.0.replica)).await;
        }
    }

    /// `false` when the database did not take it.
    async fn beat(&self) -> bool {
        let answered_up_to = self.0.answered.load(Ordering::Acquire);
        let done = timeout(RECORD_TIMEOUT, self.0.store.beat(&self.0.replica, answered_up_to)).await;
        let is_done = matches!(done, Ok(Ok(())));
        if is_done {
            let mut beats = self.beats();
            let now = Instant::now();
            let first = match *beats {
                Some((first, last)) if last.elapsed() < self.0.settings.replica_lost_after / 2 => first,
                _ => now,
            };
            *beats = Some((first, now));
        }
        is_done
    }

    /// Apart from the answers, however many there are to give: who is busy lives.
    async fn pulse(self) {
        let every = self.0.settings.replica_lost_after / BEATS;
        loop {
            // The first one came before this task, and may have failed.
            let is_alive = self.beat().await;
            sleep(if is_alive { every } else { every.min(BEAT_AGAIN) }).await;
        }
    }

    fn beats(&self) -> std::sync::MutexGuard<'_, Option<(Instant, Instant)>> {
        self.0.beats.lock().expect("no code panics while it holds the times")
    }

    /// The other replicas that live. While the database is away nobody's beats come: after that this one must have been there
    /// for as long as makes another one lost, before the silence of others says anything.
    async fn others(&self) -> Result<Vec<Replica>, store::Error> {
        let lost_after = self.0.settings.replica_lost_after;
        let is_steady =
            self.beats().is_some_and(|(first, last)| first.elapsed() >= lost_after && last.elapsed() < lost_after / 2);
        let mut others = self.0.store.others(&self.0.replica).await?;
        others.retain(|other| !is_steady || other.age < lost_after.as_secs_f64());
        Ok(others)
    }

    /// Whether what this replica began may still come to an end.
    async fn lives(&self, replica: &str) -> Result<bool, store::Error> {
        // What this one has not written yet it will.
        Ok(replica == self.0.replica || self.others().await?.iter().any(|other| other.id == replica))
    }

    fn row(&self, id: String, attempt: i64, server_id: &str, arguments: Digest, kept_for: Duration) -> NewSharedRun {
        NewSharedRun {
            id,
            replica: self.0.replica.clone(),
            attempt,
            mcp_server_id: server_id.to_owned(),
            arguments,
            age: Duration::ZERO,
            kept_for,
        }
    }

    fn under_way(&self) -> std::sync::MutexGuard<'_, HashSet<i64>> {
        self.0.under_way.lock().expect("no code panics while it holds the attempts")
    }

    /// What came of a run elsewhere, when its end is there. It is known that there is one: a database that is away is waited
    /// for, and nobody is told that nothing was done.
    ///
    /// # Errors
    /// [`Error::RunUnknown`] when it will never be known.
    async fn follow(&self, id: &str, arguments: Option<&Digest>) -> Result<Followed, Error> {
        let deadline = Instant::now() + self.0.longest + GRACE;
        let mut looked_at = None;
        loop {
            match self.look(id, arguments, &mut looked_at).await {
                Ok(Some(followed)) => return Ok(followed),
                Ok(None) | Err(Error::Unavailable(_) | Error::Overload { .. }) => {}
                Err(error @ (Error::Invalid(_) | Error::RunUnknown { .. })) => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "a run elsewhere cannot be followed");
                    return Err(Error::RunUnknown { replied: false });
                }
            }
            if Instant::now() >= deadline {
                return Err(Error::RunUnknown { replied: true });
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// `None` as long as it is under way.
    async fn look(
        &self,
        id: &str,
        arguments: Option<&Digest>,
        looked_at: &mut Option<Instant>,
    ) -> Result<Option<Followed>, Error> {
        let ended = |outcome: Option<Vec<u8>>| Followed::Ended(outcome.map_or_else(not_kept, Bytes::from));
        // The row of a key goes when nothing was sent, that of an answer when its time is over.
        let gone = || match arguments {
            Some(_) => Ok(Some(Followed::Gone)),
            None => Err(Error::RunUnknown { replied: false }),
        };
        let Some(run) = self.0.store.shared_run(id).await? else { return gone() };
        // Of one that cannot be opened nobody knows what it was, but that it was.
        if let (Some(ours), Some(theirs)) = (arguments, &run.arguments)
            && ours != theirs
        {
            return Err(key_taken());
        }
        match run.progress {
            Progress::Ended(outcome) => return Ok(Some(ended(outcome))),
            Progress::Unsent => return Ok(Some(Followed::Gone)),
            Progress::Running => {}
        }
        if run.replica == self.0.replica && arguments.is_some() && !self.under_way().contains(&run.attempt) {
            // Given up before anything was sent, and written all the same.
            self.0.store.free_attempt(id, &run.replica, run.attempt).await?;
            return Ok(Some(Followed::Gone));
        }
        if looked_at.is_some_and(|at| at.elapsed() < LOOK_AT_REPLICAS_EVERY) {
            return Ok(None);
        }
        if self.lives(&run.replica).await? {
            *looked_at = Some(Instant::now());
            return Ok(None);
        }
        // It may have written the end between the two looks, and left.
        match self.0.store.shared_run(id).await?.map(|run| run.progress) {
            None => gone(),
            Some(Progress::Unsent) => Ok(Some(Followed::Gone)),
            Some(Progress::Ended(outcome)) => Ok(Some(ended(outcome))),
            Some(Progress::Running) => Err(Error::RunUnknown { replied: true }),
        }
    }

    /// Writes what came of a run, for as long as it takes; done when it is written, or when it takes too long to wait for it.
    async fn write(&self, run: Arc<NewSharedRun>, mut progress: Option<Progress>, kept_for: Duration) {
        let bytes = |progress: &Option<Progress>| match progress {
            Some(Progress::Ended(Some(json))) => json.len(),
            _ => 0,
        };
        let most = self.0.settings.max_kept_outcome_bytes;
        if bytes(&progress) > most || bytes(&progress) + self.0.unwritten.load(Ordering::Relaxed) > MAX_UNWRITTEN {
            progress = Some(Progress::Ended(None));
        }
        let bytes = bytes(&progress);
        self.0.unwritten.fetch_add(bytes, Ordering::Relaxed);
        let (done, written) = oneshot::channel::<()>();
        let this = self.clone();
        let writing = async move {
            let abandoned = this.0.abandoned.clone();
            if abandoned.run_until_cancelled(this.try_to_write(&run, progress.as_ref(), kept_for)).await != Some(true) {
                tracing::error!("what came of a run with an Idempotency-Key could not be written down");
            }
            this.0.unwritten.fetch_sub(bytes, Ordering::Relaxed);
            // Whoever waited may have gone on.
            let _ = done.send(());
        };
        self.0.writes.spawn(writing);
        let _ = timeout(WRITE_FIRST, written).await;
    }

    /// `false` when it will never be written. Of a run whose outcome is not written the row stays that of one under way.
    async fn try_to_write(&self, run: &NewSharedRun, progress: Option<&Progress>, kept_for: Duration) -> bool {
        let deadline = Instant::now() + WRITE_FOR;
        let (mut pause, longest_pause) = RETRY;
        loop {
            let store = &self.0.store;
            let written = async {
                match progress {
                    Some(progress) => store.end_shared_run(run, progress, kept_for).await.map(|_| ()),
                    None => store.free_shared_run(run).await,
                }
            };
            match timeout(WRITE_TIMEOUT, written).await {
                Ok(Ok(())) => {
                    self.under_way().remove(&run.attempt);
                    return true;
                }
                // Also a full disk may have room again.
                Ok(Err(store::Error::Unavailable(_) | store::Error::Full(_))) | Err(_) if Instant::now() < deadline => {
                }
                _ => return false,
            }
            sleep(pause).await;
            pause = (pause * 2).min(longest_pause);
        }
    }

    /// Forgets what nobody may ask about any more.
    async fn sweep(self) {
        let every = (self.0.settings.key_window / 4).clamp(SWEEP_EVERY.0, SWEEP_EVERY.1);
        loop {
            sleep(every).await;
            let store = &self.0.store;
            let swept = async {
                while store.forget_shared_runs().await? > 0 {
                    sleep(SWEEP_PAUSE).await;
                }
                while store.forget_questions().await? > 0 {
                    sleep(SWEEP_PAUSE).await;
                }
                store.forget_replicas().await
            };
            if let Err(error) = swept.await {
                tracing::warn!(%error, "old runs with keys cannot be forgotten; it is tried again");
            }
        }
    }
}

enum Followed {
    Ended(Bytes),
    /// It was not sent, and is to be made.
    Gone,
}

/// The answer to whoever repeats a run whose outcome had no room.
pub fn not_kept() -> Bytes {
    let reason = "This run was made already; its result is no longer kept.";
    ToolExecutionResult::failed(reason, Duration::ZERO).json()
}

fn away() -> Error {
    Error::Overload { source: mcp::Error::Store, retry_after: Duration::from_secs(1) }
}
