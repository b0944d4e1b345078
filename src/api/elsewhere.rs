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

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config::Runs as Settings;
use crate::error::Error;
use crate::mcp;
use crate::store::{self, Claim, Claimed, NewSharedRun, Question, Replica, SharedProgress as Progress, Store, Topic};

use super::drip::Ended;
use super::repeats::{Call, Digest, key_taken};
use super::wire::ToolExecutionResult;

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
/// How long replicas that live have to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks at a run elsewhere, at the replicas, and at what they ask.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const LOOK_FOR_ANSWERS_EVERY: Duration = Duration::from_millis(100);
const LOOK_AT_REPLICAS_EVERY: Duration = Duration::from_secs(2);
/// Where the database has no NOTIFY, too, answers come in time.
const QUESTIONS_EVERY: Duration = Duration::from_secs(2);
/// After a beat that the database did not take.
const BEAT_AGAIN: Duration = Duration::from_millis(500);
/// How many questions are answered at once, of the connections to the database that all share.
const ANSWERS_AT_ONCE: usize = 4;
/// How many beats there are in the time after which a replica without any is lost.
const BEATS: u32 = 6;
/// How much longer than a run may take one waits for its end elsewhere.
const GRACE: Duration = Duration::from_secs(60);
/// How long a stop waits for what is still to be written.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
const SWEEP_EVERY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10 * 60));
const SWEEP_PAUSE: Duration = Duration::from_millis(20);

/// What a replica says of a run without a key, out of its memory.
pub enum Recall {
    Nothing,
    /// It was not sent, and its client was told to try again, then.
    Refused {
        number: u64,
        at: Instant,
    },
    Known(Known),
    /// It asks for this run itself, and does not know yet whether before or after the question.
    Later,
}

pub struct Known {
    pub began: Instant,
    /// Which of equal runs it is.
    pub number: u64,
    /// Nobody has got its outcome, or waits for it.
    pub is_lost: bool,
    pub outcome: BoxFuture<'static, Ended>,
}

/// What becomes of a try again.
pub enum Verdict {
    /// It is made here.
    Made,
    /// It is the one that this replica knows.
    Known(Known),
    /// This came of it elsewhere.
    Ended(Bytes),
}

/// A question that a run under way here has asked.
#[derive(Default)]
pub struct Asking(AtomicI64);

impl Asking {
    const UNNUMBERED: i64 = -1;

    /// A run that is to ask.
    pub fn begun() -> Self {
        Self(AtomicI64::new(Self::UNNUMBERED))
    }

    /// Whether it is made, or waited for, before what `question` asks for is; `None` when that is not known yet.
    pub fn is_before(&self, question: i64) -> Option<bool> {
        match self.0.load(Ordering::Acquire) {
            Self::UNNUMBERED => None,
            number => Some(number < question),
        }
    }

    fn number(&self, question: i64) {
        self.0.store(question, Ordering::Release);
    }

    /// It waits for another run that this replica knows, and will itself tell of.
    fn wait_here(&self) {
        self.number(i64::MAX);
    }

    /// It asks no more: it is made here.
    fn end(&self) {
        self.number(0);
    }
}

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

    // --- Who lives ---------------------------------------------------------------------------------------------------

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

    // --- Runs with a key ---------------------------------------------------------------------------------------------

    /// The row of a run with a key. `is_repeated` will say whether another request, elsewhere or before this start, began it.
    pub fn record(&self, call: &Call, is_repeated: Arc<AtomicBool>) -> Record {
        let attempt = self.0.attempts.fetch_add(1, Ordering::Relaxed);
        let kept_for = self.0.settings.key_window + self.0.longest + GRACE;
        let run = self.row(hex(&call.identity), attempt, &call.server_id, call.arguments, kept_for);
        self.under_way().insert(attempt);
        Record { elsewhere: self.clone(), run: Arc::new(run), is_repeated }
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
        let Some(run) = self.0.store.shared_run(id).await? else { return Ok(Some(Followed::Gone)) };
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
            None | Some(Progress::Unsent) => Ok(Some(Followed::Gone)),
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

    // --- Runs without a key ------------------------------------------------------------------------------------------

    /// What becomes of a try again that `local` is what this replica knows of. While it asks, `asking` says so to others.
    ///
    /// # Errors
    /// [`Error::RunUnknown`] when a replica that lives does not answer, and what the database says.
    pub async fn ask(
        &self,
        call: &Call,
        local: Recall,
        asking: &Asking,
        is_repeated: &AtomicBool,
    ) -> Result<Verdict, Error> {
        let verdict = self.verdict(call, local, asking, is_repeated).await?;
        is_repeated.store(!matches!(verdict, Verdict::Made), Ordering::Relaxed);
        Ok(verdict)
    }

    async fn verdict(
        &self,
        call: &Call,
        local: Recall,
        asking: &Asking,
        is_repeated: &AtomicBool,
    ) -> Result<Verdict, Error> {
        let others = match timeout(RECORD_TIMEOUT, self.others()).await {
            Ok(Ok(others)) => others,
            failed => match local {
                // As good as it gets: it is one that this client, or another with an equal run, asked for.
                Recall::Known(_) => return Ok(decide(local, asking)),
                _ => return Err(failed.map_or_else(|_| away(), |failed| failed.expect_err("it failed").into())),
            },
        };
        if others.is_empty() {
            return Ok(decide(local, asking));
        }
        let identity = hex(&call.identity);
        let asked = self.0.store.ask(&identity, &call.server_id, &self.0.replica, self.0.longest + GRACE);
        let question = timeout(RECORD_TIMEOUT, asked).await.map_err(|_| away())??;
        asking.number(question);
        self.0.store.announce(Topic::Runs);
        let verdict = self.answer_to(question, &others, local, asking, is_repeated).await;
        self.forget(question);
        verdict
    }

    async fn answer_to(
        &self,
        question: i64,
        others: &[Replica],
        local: Recall,
        asking: &Asking,
        is_repeated: &AtomicBool,
    ) -> Result<Verdict, Error> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut is_claimed = false;
        let claims = loop {
            match self.answers(question, others).await {
                Ok((all_answered, claims)) => {
                    is_claimed |= !claims.is_empty();
                    let lost = claims.iter().filter(|one| one.claim == Claim::Lost);
                    if let Some(lost) = lost.min_by_key(|one| one.age) {
                        return self.followed(&lost.id, is_repeated).await;
                    }
                    if all_answered {
                        break claims;
                    }
                }
                Err(store::Error::Unavailable(_)) if Instant::now() < deadline => {}
                Err(error) if !is_claimed => return Err(error.into()),
                Err(_) => return Err(Error::RunUnknown { replied: false }),
            }
            if Instant::now() >= deadline {
                return Err(Error::RunUnknown { replied: false });
            }
            // Nobody is told of answers: all would have to hear of all.
            sleep(LOOK_FOR_ANSWERS_EVERY).await;
        };
        let ours = match &local {
            Recall::Refused { at, .. } | Recall::Known(Known { began: at, .. }) => Some(at.elapsed()),
            _ => None,
        };
        let newest = claims.iter().min_by_key(|one| one.age);
        match newest {
            Some(Claimed { age, .. }) if ours.is_some_and(|ours| ours <= *age) => Ok(decide(local, asking)),
            Some(Claimed { claim: Claim::Refused, .. }) => {
                asking.end();
                Ok(Verdict::Made)
            }
            Some(Claimed { id, .. }) => self.followed(id, is_repeated).await,
            None => Ok(decide(local, asking)),
        }
    }

    /// Whether all have answered by now, and what.
    async fn answers(&self, question: i64, others: &[Replica]) -> Result<(bool, Vec<Claimed>), store::Error> {
        // First who has answered, then what: a replica writes them in the other order.
        let now = self.0.store.others(&self.0.replica).await?;
        let has_answered = |other: &Replica| now.iter().any(|now| now.id == other.id && now.answered_up_to >= question);
        Ok((others.iter().all(has_answered), self.0.store.claims(question).await?))
    }

    async fn followed(&self, id: &str, is_repeated: &AtomicBool) -> Result<Verdict, Error> {
        // Before the head of a long answer goes out.
        is_repeated.store(true, Ordering::Relaxed);
        match self.follow(id, None).await? {
            Followed::Ended(json) => Ok(Verdict::Ended(json)),
            // Whoever comes again asks again.
            Followed::Gone => Err(Error::NotSent),
        }
    }

    /// Forgets a question and what was answered to it. What is left over goes when its time is over.
    fn forget(&self, question: i64) {
        let (store, abandoned) = (self.0.store.clone(), self.0.abandoned.clone());
        let forgotten = async move {
            let _ = timeout(WRITE_TIMEOUT, async {
                store.forget_question(question).await?;
                store.forget_claims(question).await
            })
            .await;
        };
        self.0.writes.spawn(abandoned.run_until_cancelled_owned(forgotten));
    }

    /// Answers what others ask.
    async fn attend(self, recall: impl Fn(&Digest, i64) -> Recall, taken: impl Fn(&Digest, u64)) {
        let every = self.0.settings.replica_lost_after / BEATS;
        // Behind one that is not answered yet.
        let (mut ahead, mut told) = (BTreeSet::new(), false);
        let mut heard = self.0.store.heard(Topic::Runs);
        loop {
            let mut answered = self.0.answered.load(Ordering::Acquire);
            let questions = timeout(WRITE_TIMEOUT, self.0.store.questions_after(answered)).await;
            if let Ok(Ok(questions)) = &questions {
                told = false;
                for some in questions.chunks(ANSWERS_AT_ONCE) {
                    let answers = some.iter().map(async |question| {
                        (ahead.contains(&question.id) || self.answer(question, &recall, &taken).await, question.id)
                    });
                    let done = join_all(answers).await;
                    ahead.extend(done.into_iter().filter(|(is_done, _)| *is_done).map(|(_, id)| id));
                    let before = answered;
                    for id in questions.iter().map(|question| question.id) {
                        if id > answered && !ahead.contains(&id) {
                            break;
                        }
                        answered = answered.max(id);
                    }
                    ahead = ahead.split_off(&(answered + 1));
                    self.0.answered.store(answered, Ordering::Release);
                    if answered > before {
                        // If it fails, the next one says so too.
                        self.beat().await;
                    }
                }
            } else if !told {
                told = true;
                tracing::warn!("other replicas cannot be answered: the database is away; it is tried again");
            }
            let _ = timeout(QUESTIONS_EVERY.min(every), heard.changed()).await;
        }
    }

    /// `false` when it is to be tried again.
    async fn answer(
        &self,
        question: &Question,
        recall: &impl Fn(&Digest, i64) -> Recall,
        taken: &impl Fn(&Digest, u64),
    ) -> bool {
        if question.asked_by == self.0.replica {
            return true;
        }
        let Some(identity) = from_hex(&question.identity) else { return true };
        let (claim, at, number, outcome) = match recall(&identity, question.id) {
            Recall::Nothing => return true,
            Recall::Later => return false,
            Recall::Refused { number, at } => (Claim::Refused, at, number, None),
            Recall::Known(Known { began, number, is_lost, outcome }) => {
                (if is_lost { Claim::Lost } else { Claim::Known }, began, number, Some(outcome))
            }
        };
        let id = format!("{}.{}", question.id, self.0.replica);
        // The same each time, and none of a run with a key.
        let row = self.row(id, -question.id, &question.mcp_server_id, Digest::default(), self.0.longest + GRACE);
        let run = NewSharedRun { age: at.elapsed(), ..row };
        let claimed = self.0.store.claim_run(&run, &Progress::Running, question.id, claim);
        // One that an earlier attempt wrote after all is as good.
        if !matches!(timeout(WRITE_TIMEOUT, claimed).await, Ok(Ok(_))) {
            return false;
        }
        taken(&identity, number);
        if let Some(outcome) = outcome {
            let this = self.clone();
            self.0.writes.spawn(async move {
                let progress = outcome.await.map_or(Progress::Unsent, |json| Progress::Ended(Some(json.into())));
                this.write(Arc::new(run), Some(progress), GRACE).await;
            });
        }
        true
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

/// The row of a run with a key.
#[derive(Clone)]
pub struct Record {
    elsewhere: Elsewhere,
    run: Arc<NewSharedRun>,
    is_repeated: Arc<AtomicBool>,
}

impl Record {
    /// Writes it, before the run begins; what came of the run, when there was one already.
    ///
    /// # Errors
    /// When its key belongs to a run with other arguments, [`Error::RunUnknown`], and what the database says.
    pub async fn begin(&self) -> Result<Option<Bytes>, Error> {
        let Elsewhere(shared) = &self.elsewhere;
        loop {
            self.is_repeated.store(false, Ordering::Relaxed);
            let begun = timeout(RECORD_TIMEOUT, shared.store.begin_shared_run(&self.run)).await;
            if begun.map_err(|_| away())?? {
                return Ok(None);
            }
            self.is_repeated.store(true, Ordering::Relaxed);
            if let Followed::Ended(json) = self.elsewhere.follow(&self.run.id, Some(&self.run.arguments)).await? {
                return Ok(Some(json));
            }
        }
    }

    /// Writes what came of the run, unless it is another one's. A run that was not sent is forgotten.
    pub async fn end(self, ended: &Ended) {
        if !self.is_repeated.load(Ordering::Relaxed) {
            // Also when nobody knows whether it was ever written.
            let progress = ended.as_ref().ok().map(|json| Progress::Ended(Some(json.to_vec())));
            let kept_for = self.elsewhere.0.settings.key_window;
            if progress.is_none() {
                self.elsewhere.under_way().remove(&self.run.attempt);
                self.free_later();
            }
            self.elsewhere.write(self.run, progress, kept_for).await;
        } else {
            self.elsewhere.under_way().remove(&self.run.attempt);
        }
    }
}

impl Record {
    /// A statement that was given up may still be carried out, after the row was removed.
    fn free_later(&self) {
        let (this, run) = (self.elsewhere.clone(), self.run.clone());
        let closing = this.0.closing.clone();
        let freed = async move {
            sleep(WRITE_TIMEOUT).await;
            let _ = timeout(WRITE_TIMEOUT, this.0.store.free_shared_run(&run)).await;
        };
        self.elsewhere.0.tasks.spawn(closing.run_until_cancelled_owned(freed));
    }
}

/// What this replica makes of a try again when nobody else has a say.
fn decide(local: Recall, asking: &Asking) -> Verdict {
    if let Recall::Known(known) = local {
        asking.wait_here();
        return Verdict::Known(known);
    }
    asking.end();
    Verdict::Made
}

/// The answer to whoever repeats a run whose outcome had no room.
pub fn not_kept() -> Bytes {
    let reason = "This run was made already; its result is no longer kept.";
    ToolExecutionResult::failed(reason, Duration::ZERO).json()
}

fn away() -> Error {
    Error::Overload { source: mcp::Error::Store, retry_after: Duration::from_secs(1) }
}

fn hex(digest: &Digest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Digest> {
    let byte = |index: usize| u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..text.len() / 2).map(byte).collect();
    bytes?.try_into().ok()
}
