//! Runs without a key that an SDK asks for again: other replicas are asked for the first try, and answered when they ask.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use tokio::time::{Instant, sleep, timeout};

use crate::api::drip::Ended;
use crate::api::repeats::{Call, Digest};
use crate::api::tokens::from_hex;
use crate::api::wire::ToolExecutionResult;
use crate::error::Error;
use crate::model::hex;
use crate::store::{
    self, Claim, Claimed, NewSharedRun, QUESTIONS_AT_ONCE, Question, Replica, SharedProgress as Progress, Topic,
};

use super::{BEATS, Elsewhere, Followed, GRACE, RECORD_TIMEOUT, WRITE_TIMEOUT, away};

/// How long replicas that live have to answer, and how often it is looked whether they have.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Where the database has no NOTIFY, too, answers come in time.
const QUESTIONS_EVERY: Duration = Duration::from_secs(2);
/// How many questions are answered at once, of the connections to the database that all share.
const ANSWERS_AT_ONCE: usize = 4;

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

impl Elsewhere {
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
            sleep(LOOK_EVERY).await;
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
    pub(super) async fn attend(self, recall: impl Fn(&Digest, i64) -> Recall, taken: impl Fn(&Digest, u64)) {
        let every = self.0.settings.replica_lost_after / BEATS;
        // Behind one that is not answered yet.
        let (mut ahead, mut told) = (BTreeSet::new(), false);
        let mut heard = self.0.store.heard(Topic::Runs);
        loop {
            let first = self.0.answered.load(Ordering::Acquire);
            let mut answered = first;
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
            // There are no more than were read at once, or one of them waits for something.
            if !matches!(questions, Ok(Ok(questions)) if questions.len() >= QUESTIONS_AT_ONCE && answered > first) {
                let _ = timeout(QUESTIONS_EVERY.min(every), heard.changed()).await;
            }
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
                let progress = match outcome.await {
                    Ok(json) => Progress::Ended(Some(json.into())),
                    // It was waited for here, too, and somebody may have made it.
                    Err(unknown) if matches!(*unknown, Error::RunUnknown { .. }) => {
                        let told = ToolExecutionResult::failed(unknown.to_string(), Duration::ZERO).json();
                        Progress::Ended(Some(told.into()))
                    }
                    Err(_) => Progress::Unsent,
                };
                this.write(Arc::new(run), Some(progress), GRACE).await;
            });
        }
        true
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
