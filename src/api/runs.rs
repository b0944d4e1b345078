//! One run of many requests: what is under way, and what came of it, for those who ask again (CONTRACT row 16). The tool
//! sees one call, however often a client sends it.
//!
//! A run of its own is a future of its request and ends with it. A run that may be asked for again is a task, because it
//! outlives the request that started it; requests wait for it. Each is known by the identity of its [`Call`] until its
//! time is over, here in the memory of this process; [`Elsewhere`] knows what others have of it, and what was before.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::config::Runs as Settings;
use crate::error::Error;
use crate::mcp;

use super::drip::Ended;
use super::elsewhere::{Asking, Elsewhere, Known, Recall, Verdict, not_kept};
use super::repeats::{Call, Digest, Naming, key_taken};
use super::wire::ToolExecutionResult;

/// How many ended runs are remembered of each kind, with their outcomes or without; an entry takes about 300 bytes.
const MAX_ENDED: usize = 100_000;
const ENTRY_BYTES: usize = 300;
/// How many equal runs without a key are remembered after their ends: to look through them takes the time of all.
const MAX_EQUAL: usize = 64;
/// How many first tries that were refused are remembered.
const MAX_REFUSED: usize = 1_000;
/// How many requests may wait for one run: those for a hung tool must leave room for others.
const MAX_WAITING: usize = 64;

/// Whether a run may have reached its tool: set before the call is sent, and never taken back.
pub type Sent = Arc<AtomicBool>;

/// Runs under way and ended ones. Clones share everything.
#[derive(Clone)]
pub struct Runs {
    settings: Settings,
    tracker: TaskTracker,
    ending: CancellationToken,
    book: Arc<Mutex<Book>>,
    elsewhere: Elsewhere,
}

/// The run that a request means.
pub struct Joined {
    pub outcome: BoxFuture<'static, Ended>,
    /// Whether another request started it, as far as that is known by now.
    pub is_repeated: Arc<AtomicBool>,
}

/// Apart, so that the many outcomes of runs without a key, which are of use for a minute, push none with a key out.
struct Book {
    keyed: Shelf,
    unkeyed: Shelf,
}

impl Book {
    fn shelf(&mut self, naming: Naming) -> &mut Shelf {
        if naming == Naming::Key { &mut self.keyed } else { &mut self.unkeyed }
    }
}

impl Runs {
    /// Runs that outlive their request are tasks on `tracker`.
    pub fn new(settings: Settings, elsewhere: Elsewhere, tracker: TaskTracker) -> Self {
        let shelf = |window| Shelf::new(window, settings.max_kept_outcome_bytes, settings.max_kept_bytes / 2);
        let book = Book { keyed: shelf(settings.key_window), unkeyed: shelf(settings.retry_window) };
        let (ending, book) = (CancellationToken::new(), Arc::new(Mutex::new(book)));
        let runs = Self { settings, tracker, ending, book, elsewhere };
        runs.tracker.spawn(runs.ending.clone().run_until_cancelled_owned(runs.clone().sweep()));
        runs
    }

    /// Outcomes are other people's data: they go when their time is over, also when no run comes any more.
    async fn sweep(self) {
        loop {
            sleep(self.settings.retry_window).await;
            let mut book = self.book();
            book.keyed.sweep();
            book.unkeyed.sweep();
        }
    }

    /// A run that nobody else can ask for: dropped before its end, it is cancelled.
    pub fn alone<W>(&self, work: impl FnOnce(Sent) -> W) -> BoxFuture<'static, Ended>
    where
        W: Future<Output = Result<Bytes, Error>> + Send + 'static,
    {
        let sent = Sent::default();
        self.guarded(sent.clone(), Arc::default(), work(sent)).in_current_span().boxed()
    }

    /// The one run that `call` means. Starts it with `work` if there is none.
    ///
    /// `work` fails only when nothing was sent to the tool; such a run is forgotten, so that the next request makes it.
    ///
    /// # Errors
    /// When its key belongs to a run with other arguments, and [`Error::Crowded`].
    pub fn once<W>(&self, call: &Call, work: impl FnOnce(Sent) -> W + Send + 'static) -> Result<Joined, Error>
    where
        W: Future<Output = Result<Bytes, Error>> + Send + 'static,
    {
        let mut book = self.book();
        let shelf = book.shelf(call.naming);
        shelf.expire();
        let asks = call.naming == Naming::Again && self.elsewhere.is_shared();
        let found = match asks {
            true => shelf.recall(&call.identity, None)?,
            false => shelf.find(call)?.map_or(Recall::Nothing, Recall::Known),
        };
        let local = match found {
            // Who has lost its client is meant, whatever there is elsewhere.
            Recall::Known(known) if !asks || known.is_lost => {
                shelf.take(&Place { identity: call.identity, number: known.number });
                return Ok(Joined { outcome: known.outcome, is_repeated: Arc::new(AtomicBool::new(true)) });
            }
            local => local,
        };
        let asking = if asks { Asking::begun() } else { Asking::default() };
        let run = Arc::new(Run { asking, is_made: AtomicBool::new(!asks), ..Run::default() });
        let place = Place { identity: call.identity, number: shelf.begin(call, &run) };
        let outcome = run.wait();
        drop(book);
        let (sent, is_repeated) = (Sent::default(), Arc::new(AtomicBool::new(false)));
        let work = match call.naming {
            Naming::Key => self.recorded(call, sent.clone(), is_repeated.clone(), work),
            Naming::Again if asks => self.asked(call.clone(), local, &run, sent.clone(), is_repeated.clone(), work),
            _ => self.guarded(sent.clone(), is_repeated.clone(), work(sent.clone())).boxed(),
        };
        let driven = self.clone().drive(call.naming, place, run, sent, work);
        self.tracker.spawn(driven.in_current_span());
        Ok(Joined { outcome, is_repeated })
    }

    /// A run with a key: written down before it begins, and with its outcome before anybody gets that. Not made when it was
    /// elsewhere, or before this start.
    fn recorded<W>(
        &self,
        call: &Call,
        sent: Sent,
        is_repeated: Arc<AtomicBool>,
        work: impl FnOnce(Sent) -> W + Send + 'static,
    ) -> BoxFuture<'static, Ended>
    where
        W: Future<Output = Result<Bytes, Error>> + Send + 'static,
    {
        let record = self.elsewhere.record(call, is_repeated.clone());
        let (begun, is_sent) = (record.clone(), sent.clone());
        let made = self.guarded(sent, is_repeated, async move {
            match begun.begin().await? {
                Some(json) => Ok(json),
                None => work(is_sent).await,
            }
        });
        async move {
            let ended = made.await;
            record.end(&ended).await;
            ended
        }
        .boxed()
    }

    /// A try again: made when no replica knows its first try.
    fn asked<W>(
        &self,
        call: Call,
        local: Recall,
        run: &Arc<Run>,
        sent: Sent,
        is_repeated: Arc<AtomicBool>,
        work: impl FnOnce(Sent) -> W + Send + 'static,
    ) -> BoxFuture<'static, Ended>
    where
        W: Future<Output = Result<Bytes, Error>> + Send + 'static,
    {
        let (runs, elsewhere) = (self.clone(), self.elsewhere.clone());
        let (run, is_sent, is_known) = (run.clone(), sent.clone(), is_repeated.clone());
        let refused = match &local {
            Recall::Refused { number, .. } => Some(*number),
            _ => None,
        };
        let made = async move {
            let take = |number| runs.book().unkeyed.take(&Place { identity: call.identity, number });
            match elsewhere.ask(&call, local, &run.asking, &is_repeated).await? {
                Verdict::Made => {
                    refused.into_iter().for_each(take);
                    run.is_made.store(true, Ordering::Relaxed);
                    work(is_sent).await.map_err(Arc::new)
                }
                Verdict::Known(known) => {
                    is_repeated.store(true, Ordering::Relaxed);
                    take(known.number);
                    known.outcome.await
                }
                Verdict::Ended(json) => Ok(json),
            }
        };
        self.guarded(sent, is_known, made).boxed()
    }

    /// Tells other replicas that this one lives, before it serves, and answers what they ask.
    pub async fn open(&self) {
        let runs = self.clone();
        let recall = move |identity: &Digest, question| {
            let mut book = runs.book();
            book.unkeyed.expire();
            book.unkeyed.recall(identity, Some(question)).unwrap_or(Recall::Nothing)
        };
        let runs = self.clone();
        let taken = move |identity: &Digest, number| runs.book().unkeyed.take(&Place { identity: *identity, number });
        self.elsewhere.open(recall, taken).await;
    }

    /// Writes down what is still to be written of runs, all of which have ended.
    pub async fn close(&self) {
        self.elsewhere.close().await;
    }

    /// Ends what is under way: those who wait get an error at once.
    pub fn end(&self) {
        self.ending.cancel();
    }

    /// `work` until its end or that of Portolan. What the tool did before that, or before a panic, nobody knows: that is an
    /// outcome (CONTRACT row 13). What was not sent by then never is, and may be repeated (row 14); but of one that
    /// `is_repeated`, the first may have been sent.
    fn guarded<E: Into<Arc<Error>> + 'static>(
        &self,
        sent: Sent,
        is_repeated: Arc<AtomicBool>,
        work: impl Future<Output = Result<Bytes, E>> + Send + 'static,
    ) -> impl Future<Output = Ended> + Send + 'static {
        let (ending, started, work) = (self.ending.clone(), Instant::now(), AssertUnwindSafe(work).catch_unwind());
        let failed = move |reason: &str| Ok(ToolExecutionResult::failed(reason, started.elapsed()).json());
        async move {
            tokio::select! {
                biased;
                () = ending.cancelled() => match sent.load(Ordering::Relaxed) {
                    true => failed("Portolan was stopped before the tool answered; the tool may have run."),
                    false if is_repeated.load(Ordering::Relaxed) => Err(Arc::new(Error::RunUnknown { replied: false })),
                    false => Err(Arc::new(mcp::Error::Stopping.into())),
                },
                ended = work => match ended {
                    Ok(ended) => ended.map_err(Into::into),
                    Err(_) => {
                        tracing::error!("a run panicked");
                        failed("Something went wrong inside Portolan during the run; the tool may have run.")
                    }
                },
            }
        }
    }

    async fn drive(self, naming: Naming, place: Place, run: Arc<Run>, sent: Sent, work: impl Future<Output = Ended>) {
        let started = Instant::now();
        tokio::select! {
            ended = work => {
                // Behind an early head an error is a result, which no SDK repeats; a key tells repetitions by itself.
                // And who could not be asked has refused nothing: the first try may be under way.
                let leads_to_more = naming != Naming::Key
                    && run.is_made.load(Ordering::Relaxed)
                    && started.elapsed() < self.settings.early_head_after;
                let mut book = self.book();
                match ended {
                    Ok(json) => book.shelf(naming).end(&place, &run, json, run.waiting() > 0),
                    Err(error) => book.shelf(naming).refuse(&place, &run, error, leads_to_more),
                }
            }
            // Whoever names a run by a key will ask for it again: it goes on to its end, which its deadline bounds.
            () = self.orphaned(&place, &run, &sent, started), if naming != Naming::Key => {}
        }
    }

    /// Done when nobody has waited for the run during the grace; then it has ended, for all who still ask.
    async fn orphaned(&self, place: &Place, run: &Run, sent: &AtomicBool, started: Instant) {
        loop {
            run.until(|waiting| waiting == 0).await;
            if timeout(self.settings.orphan_grace, run.until(|waiting| waiting > 0)).await.is_ok() {
                continue;
            }
            let mut book = self.book();
            // Under the lock nobody joins between the look and the end.
            if run.waiting() == 0 {
                tracing::info!("a run is cancelled: its client did not come back");
                if !sent.load(Ordering::Relaxed) {
                    return book.unkeyed.remove(place);
                }
                let reason = "Nobody waited for this run any more, so it was cancelled; the tool may have run.";
                let outcome = ToolExecutionResult::failed(reason, started.elapsed()).json();
                // Its client would have come by now: who comes later rather means another run.
                return book.unkeyed.end(place, run, outcome, true);
            }
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("no code panics while it holds the book")
    }
}

/// A run under way, as its task and those who wait for it share it.
struct Run {
    progress: watch::Sender<Progress>,
    /// Whether other replicas are being asked for it.
    asking: Asking,
    /// It is the business of this replica, not the outcome of another one's, nor a question of whose it is.
    is_made: AtomicBool,
}

#[derive(Default)]
struct Progress {
    waiting: usize,
    ended: Option<Ended>,
}

impl Default for Run {
    fn default() -> Self {
        let progress = watch::Sender::new(Progress::default());
        Self { progress, asking: Asking::default(), is_made: AtomicBool::new(true) }
    }
}

impl Run {
    fn waiting(&self) -> usize {
        self.progress.borrow().waiting
    }

    fn tell(&self, ended: Ended) {
        self.progress.send_modify(|progress| progress.ended = Some(ended));
    }

    async fn until(&self, test: impl Fn(usize) -> bool) {
        let reached = self.progress.subscribe().wait_for(|progress| test(progress.waiting)).await.is_ok();
        debug_assert!(reached, "the sender is in self");
    }

    /// One more who waits, from now until the future has ended or is dropped.
    fn wait(self: &Arc<Self>) -> BoxFuture<'static, Ended> {
        struct Waiting(Arc<Run>);
        impl Drop for Waiting {
            fn drop(&mut self) {
                self.0.progress.send_modify(|progress| progress.waiting -= 1);
            }
        }
        self.progress.send_modify(|progress| progress.waiting += 1);
        let waiting = Waiting(self.clone());
        async move {
            let mut progress = waiting.0.progress.subscribe();
            let ended = progress.wait_for(|progress| progress.ended.is_some()).await;
            ended.expect("the sender is in waiting").ended.clone().expect("this was waited for")
        }
        .boxed()
    }
}

/// Where a run is in the book.
#[derive(Clone, Copy)]
struct Place {
    identity: Digest,
    number: u64,
}

/// The runs of one kind, each known for `window` after its outcome was last handed out.
struct Shelf {
    window: Duration,
    max_outcome: usize,
    max_bytes: usize,
    /// By identity, oldest first. With a key there is one of each.
    entries: HashMap<Digest, Vec<Entry>>,
    /// By identity, the last run that was not sent, and whose client was told to try again: the number of it, and when.
    refused: HashMap<Digest, (u64, Instant)>,
    /// Counts beginnings and hand-outs.
    clock: u64,
    /// Ended runs in the order in which their outcomes were last handed out: when, and which.
    ended: BTreeMap<u64, (Instant, Place)>,
    /// Those of them whose outcomes are kept, and the bytes of these.
    kept: BTreeSet<u64>,
    bytes: usize,
}

struct Entry {
    number: u64,
    began: Instant,
    arguments: Digest,
    state: State,
}

enum State {
    Running(Arc<Run>),
    Ended {
        /// In the order of hand-outs.
        end: u64,
        outcome: Outcome,
        /// Somebody waited for it or came for it later.
        taken: bool,
    },
}

enum Outcome {
    Kept(Bytes),
    /// There was no room for it.
    Dropped,
}

impl Entry {
    /// Whoever asked for this run has not got its outcome, and does not wait for it either.
    fn is_orphan(&self) -> bool {
        match &self.state {
            State::Running(run) => run.waiting() == 0,
            State::Ended { taken, .. } => !taken,
        }
    }

    fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended { .. })
    }
}

/// What a repetition means.
enum Choice {
    Nothing,
    /// One that was not sent, and whose client was told to try again: the number of it, and when.
    Refused(u64, Instant),
    /// The run with this index.
    Entry(usize),
    /// It will be known when the run that asks itself has its number.
    Later,
}

impl Shelf {
    fn new(window: Duration, max_outcome: usize, max_bytes: usize) -> Self {
        Self {
            window,
            max_outcome,
            max_bytes,
            entries: HashMap::new(),
            refused: HashMap::new(),
            clock: 0,
            ended: BTreeMap::new(),
            kept: BTreeSet::new(),
            bytes: 0,
        }
    }

    /// The run that a repetition means, to be waited for; `None` when there is none.
    fn find(&mut self, call: &Call) -> Result<Option<Known>, Error> {
        if call.naming == Naming::First {
            return Ok(None);
        }
        let chosen = match self.choose(&call.identity, None) {
            Choice::Entry(chosen) => chosen,
            Choice::Refused(..) => {
                // One try again for one refusal.
                self.refused.remove(&call.identity);
                return Ok(None);
            }
            Choice::Nothing | Choice::Later => return Ok(None),
        };
        if self.entries[&call.identity][chosen].arguments != call.arguments {
            return Err(key_taken());
        }
        self.hand_out(&call.identity, chosen, MAX_WAITING).map(Some)
    }

    /// What there is to say of a run without a key, to this replica or to another one, which asks `question`.
    fn recall(&mut self, identity: &Digest, question: Option<i64>) -> Result<Recall, Error> {
        // Of another replica one waits for all who wait there.
        let most = if question.is_some() { usize::MAX } else { MAX_WAITING };
        match self.choose(identity, question) {
            Choice::Nothing => Ok(Recall::Nothing),
            Choice::Later => Ok(Recall::Later),
            Choice::Refused(number, at) => Ok(Recall::Refused { number, at }),
            Choice::Entry(chosen) => self.show(identity, chosen, most).map(Recall::Known),
        }
    }

    /// Which run a repetition means.
    fn choose(&self, identity: &Digest, question: Option<i64>) -> Choice {
        let mut seen = Vec::new();
        let entries = self.entries.get(identity).map_or(&[][..], Vec::as_slice);
        for (index, entry) in entries.iter().enumerate() {
            match (&entry.state, question) {
                (State::Running(run), Some(question)) => match run.asking.is_before(question) {
                    None => return Choice::Later,
                    Some(true) => seen.push(index),
                    // It waits for that question's.
                    Some(false) => {}
                },
                _ => seen.push(index),
            }
        }
        // Of several identical calls the one whose client has gone is the likeliest to be asked for again. Then it is the
        // newest, be it one that was refused.
        if let Some(orphan) = seen.iter().rev().find(|index| entries[**index].is_orphan()) {
            return Choice::Entry(*orphan);
        }
        let newest = seen.last().copied();
        match (self.refused.get(identity), newest) {
            (Some((number, at)), newest)
                if newest.is_none_or(|newest| *number > entries[newest].number) && at.elapsed() <= self.window =>
            {
                Choice::Refused(*number, *at)
            }
            (_, Some(newest)) => Choice::Entry(newest),
            (_, None) => Choice::Nothing,
        }
    }

    /// The outcome of this run, or the wait for it, unless `most` wait for it already.
    fn show(&self, identity: &Digest, chosen: usize, most: usize) -> Result<Known, Error> {
        let entry = &self.entries[identity][chosen];
        let is_lost = entry.is_orphan();
        let outcome = match &entry.state {
            State::Running(run) if run.waiting() >= most => return Err(Error::Crowded),
            State::Running(run) => run.wait(),
            State::Ended { outcome: Outcome::Kept(json), .. } => ready(Ok(json.clone())).boxed(),
            State::Ended { outcome: Outcome::Dropped, .. } => ready(Ok(not_kept())).boxed(),
        };
        Ok(Known { began: entry.began, number: entry.number, is_lost, outcome })
    }

    /// As [`Self::show`], for somebody who gets it now.
    fn hand_out(&mut self, identity: &Digest, chosen: usize, most: usize) -> Result<Known, Error> {
        let known = self.show(identity, chosen, most)?;
        self.take(&Place { identity: *identity, number: known.number });
        Ok(known)
    }

    /// Somebody gets the outcome of this run, if it has ended, or tries again because it was refused.
    fn take(&mut self, place: &Place) {
        if self.refused.get(&place.identity).is_some_and(|(number, _)| *number == place.number) {
            self.refused.remove(&place.identity);
        }
        let now = self.clock + 1;
        let Some(Entry { state: State::Ended { end, taken, .. }, .. }) = self.entry(place) else { return };
        *taken = true;
        let before = std::mem::replace(end, now);
        self.clock = now;
        self.ended.remove(&before).expect("what has ended is in the order of ends");
        self.ended.insert(now, (Instant::now(), *place));
        if self.kept.remove(&before) {
            self.kept.insert(now);
        }
    }

    /// The number of a new run.
    fn begin(&mut self, call: &Call, run: &Arc<Run>) -> u64 {
        self.clock += 1;
        let entry = Entry {
            number: self.clock,
            began: Instant::now(),
            arguments: call.arguments,
            state: State::Running(run.clone()),
        };
        self.entries.entry(call.identity).or_insert_with(|| Vec::with_capacity(1)).push(entry);
        self.clock
    }

    /// Tells those who wait, and keeps what came of a run for those who come. `taken`: somebody has got it.
    fn end(&mut self, place: &Place, run: &Run, json: Bytes, taken: bool) {
        run.tell(Ok(json.clone()));
        self.clock += 1;
        let end = self.clock;
        let outcome = if json.len() <= self.max_outcome {
            self.bytes += json.len() + ENTRY_BYTES;
            self.kept.insert(end);
            Outcome::Kept(json)
        } else {
            Outcome::Dropped
        };
        let entry = self.entry(place).expect("what is under way is in the book");
        entry.state = State::Ended { end, outcome, taken };
        self.ended.insert(end, (Instant::now(), *place));
        self.pass(&place.identity);
        self.make_room();
    }

    /// Tells those who wait why nothing was sent, and forgets the run. When it `leads_to_more`, those who were told to try
    /// again are not to be given the outcome of an equal run from before.
    fn refuse(&mut self, place: &Place, run: &Run, error: Arc<Error>, leads_to_more: bool) {
        let is_awaited = leads_to_more && run.waiting() > 0 && error.asks_for_repetition();
        run.tell(Err(error));
        self.remove(place);
        if !is_awaited {
            return;
        }
        if self.refused.len() >= MAX_REFUSED
            && let Some((&oldest, _)) = self.refused.iter().min_by_key(|(_, (number, _))| *number)
        {
            self.refused.remove(&oldest);
        }
        self.refused.insert(place.identity, (place.number, Instant::now()));
    }

    /// Forgets what is never chosen any more: what was taken and is older than a run that was sent. Of what may be, no
    /// more is known than [`MAX_EQUAL`].
    fn pass(&mut self, identity: &Digest) {
        let entries = self.entries.get(identity).into_iter().flatten();
        let mut ended: Vec<_> = entries.filter(|entry| entry.is_ended()).collect();
        // The newest stays.
        ended.pop();
        let (lost, passed): (Vec<_>, Vec<_>) = ended.into_iter().partition(|entry| entry.is_orphan());
        let oldest = lost.iter().take((lost.len() + 1).saturating_sub(MAX_EQUAL));
        let forgotten: Vec<_> = passed.iter().chain(oldest).map(|entry| entry.number).collect();
        for number in forgotten {
            self.remove(&Place { identity: *identity, number });
        }
    }

    fn make_room(&mut self) {
        while self.bytes > self.max_bytes
            && let Some(end) = self.kept.pop_first()
        {
            let place = self.ended[&end].1;
            let entry = self.entry(&place).expect("what is kept is in the book");
            if let State::Ended { outcome, .. } = &mut entry.state
                && let Outcome::Kept(json) = std::mem::replace(outcome, Outcome::Dropped)
            {
                self.bytes -= json.len() + ENTRY_BYTES;
            }
        }
        while self.ended.len() > MAX_ENDED {
            self.forget_oldest();
        }
    }

    /// Forgets those whose time is over.
    fn expire(&mut self) {
        while let Some((_, (at, _))) = self.ended.first_key_value()
            && at.elapsed() > self.window
        {
            self.forget_oldest();
        }
    }

    fn sweep(&mut self) {
        self.expire();
        self.refused.retain(|_, (_, at)| at.elapsed() <= self.window);
    }

    fn forget_oldest(&mut self) {
        if let Some((_, (_, place))) = self.ended.pop_first() {
            self.remove(&place);
        }
    }

    fn remove(&mut self, place: &Place) {
        let Some(entries) = self.entries.get_mut(&place.identity) else { return };
        let Some(index) = entries.iter().position(|entry| entry.number == place.number) else { return };
        let entry = entries.remove(index);
        if entries.is_empty() {
            self.entries.remove(&place.identity);
        }
        if let State::Ended { end, outcome, .. } = entry.state {
            self.ended.remove(&end);
            self.kept.remove(&end);
            if let Outcome::Kept(json) = outcome {
                self.bytes -= json.len() + ENTRY_BYTES;
            }
        }
    }

    fn entry(&mut self, place: &Place) -> Option<&mut Entry> {
        self.entries.get_mut(&place.identity)?.iter_mut().find(|entry| entry.number == place.number)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::Parser;

    use crate::config::Cli;
    use crate::store::{KeySource, Store};

    use super::*;

    fn call(identity: u8, naming: Naming) -> Call {
        Call { identity: [identity; 32], arguments: [0; 32], server_id: String::new(), naming }
    }

    /// What an SDK is told to repeat.
    fn busy() -> Error {
        mcp::Error::QueueFull.into()
    }

    fn shelf() -> Shelf {
        Shelf::new(Duration::from_secs(60), 1_000, 1_000_000)
    }

    fn begin(shelf: &mut Shelf, identity: u8) -> (Place, Arc<Run>) {
        let (first, run) = (call(identity, Naming::First), Arc::new(Run::default()));
        (Place { identity: first.identity, number: shelf.begin(&first, &run) }, run)
    }

    /// A first try that was answered with `text`; `taken` when its client was there.
    fn made(shelf: &mut Shelf, text: &'static str, taken: bool) {
        let (place, run) = begin(shelf, 0);
        shelf.end(&place, &run, Bytes::from_static(text.as_bytes()), taken);
    }

    fn refused(shelf: &mut Shelf, identity: u8, error: Error, awaited: bool, leads_to_more: bool) {
        let (place, run) = begin(shelf, identity);
        let _waiting = awaited.then(|| run.wait());
        shelf.refuse(&place, &run, Arc::new(error), leads_to_more);
    }

    /// What a second try gets; `None` when it is a run.
    fn again(shelf: &mut Shelf) -> Option<Bytes> {
        let found = shelf.find(&call(0, Naming::Again)).unwrap()?;
        Some(found.outcome.now_or_never().expect("it has ended").unwrap())
    }

    #[test]
    fn who_was_refused_and_told_to_try_again_gets_a_run() {
        let mut shelf = shelf();
        made(&mut shelf, "before", true);
        refused(&mut shelf, 0, busy(), true, true);
        assert_eq!(again(&mut shelf), None);
        assert_eq!(again(&mut shelf).unwrap(), "before", "one try again for one refusal");
    }

    #[test]
    fn a_refusal_that_no_sdk_repeats_makes_no_second_run() {
        let mut shelf = shelf();
        made(&mut shelf, "before", true);
        refused(&mut shelf, 0, Error::NoTool, true, true);
        refused(&mut shelf, 0, mcp::Error::Closed.into(), true, true);
        refused(&mut shelf, 0, busy(), false, true);
        refused(&mut shelf, 0, busy(), true, false);
        assert_eq!(again(&mut shelf).unwrap(), "before");
    }

    #[test]
    fn what_was_sent_and_lost_is_meant_before_what_was_refused() {
        let mut shelf = shelf();
        made(&mut shelf, "lost", false);
        refused(&mut shelf, 0, busy(), true, true);
        assert_eq!(again(&mut shelf).unwrap(), "lost");
        assert_eq!(again(&mut shelf), None, "then the one that was refused");
        refused(&mut shelf, 0, busy(), true, true);
        made(&mut shelf, "newer", true);
        assert_eq!(again(&mut shelf).unwrap(), "newer");
    }

    #[test]
    fn what_others_are_told_is_used_up_only_when_they_have_heard_it() {
        let mut shelf = shelf();
        made(&mut shelf, "before", true);
        refused(&mut shelf, 0, busy(), true, true);
        let mut number = None;
        for _ in 0..2 {
            let Ok(Recall::Refused { number: refused, .. }) = shelf.recall(&[0; 32], Some(1)) else { panic!() };
            number = Some(refused);
        }
        shelf.take(&Place { identity: [0; 32], number: number.unwrap() });
        assert_eq!(again(&mut shelf).unwrap(), "before");
        made(&mut shelf, "lost", false);
        for is_lost in [true, true, false] {
            let Ok(Recall::Known(known)) = shelf.recall(&[0; 32], Some(1)) else { panic!() };
            assert_eq!(known.is_lost, is_lost);
            // Heard after the second time.
            if number.replace(known.number) == Some(known.number) {
                shelf.take(&Place { identity: [0; 32], number: known.number });
            }
        }
    }

    #[test]
    fn what_was_not_sent_pushes_out_nothing_that_was() {
        let mut shelf = shelf();
        made(&mut shelf, "sent", true);
        for number in 0..=MAX_REFUSED as u32 {
            let mut one = call(1, Naming::First);
            one.identity[..4].copy_from_slice(&number.to_be_bytes());
            let run = Arc::new(Run::default());
            let place = Place { identity: one.identity, number: shelf.begin(&one, &run) };
            let _waiting = run.wait();
            shelf.refuse(&place, &run, Arc::new(busy()), true);
        }
        assert_eq!((shelf.refused.len(), shelf.entries.len(), shelf.ended.len()), (MAX_REFUSED, 1, 1));
        assert_eq!(again(&mut shelf).unwrap(), "sent");
    }

    #[test]
    fn of_equal_runs_only_the_last_are_known() {
        let mut shelf = shelf();
        for _ in 0..MAX_EQUAL * 3 {
            made(&mut shelf, "lost", false);
        }
        assert_eq!((shelf.entries[&[0; 32]].len(), shelf.ended.len()), (MAX_EQUAL, MAX_EQUAL));
        made(&mut shelf, "last", false);
        assert_eq!(again(&mut shelf).unwrap(), "last");
        for _ in 0..MAX_EQUAL * 3 {
            made(&mut shelf, "taken", true);
        }
        assert_eq!(shelf.entries[&[0; 32]].len(), MAX_EQUAL, "the lost ones but the oldest, and the last");
    }

    #[test]
    fn an_outcome_is_known_until_a_while_after_it_was_last_handed_out() {
        let mut shelf = shelf();
        shelf.window = Duration::from_secs(6);
        let pass = |shelf: &mut Shelf, seconds| {
            shelf.ended.values_mut().for_each(|(at, _)| *at -= Duration::from_secs(seconds));
            shelf.expire();
        };
        made(&mut shelf, "here", true);
        for _ in 0..3 {
            pass(&mut shelf, 5);
            assert_eq!(again(&mut shelf).unwrap(), "here");
        }
        pass(&mut shelf, 7);
        assert_eq!(again(&mut shelf), None);
    }

    #[tokio::test]
    async fn what_begins_after_the_end_is_not_made() {
        let settings = Cli::parse_from(["portolan"]).settings.runs;
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(None, folder.path(), 1, KeySource::Unset).await.unwrap();
        let elsewhere = Elsewhere::new(store, settings.clone(), Duration::from_secs(60));
        let runs = Runs::new(settings, elsewhere, TaskTracker::new());
        let made = |_| async { Ok(Bytes::from_static(b"{}")) };
        assert_eq!(runs.alone(made).await.unwrap(), "{}");
        runs.end();
        for naming in [Naming::Key, Naming::First, Naming::Again] {
            let late = runs.once(&call(naming as u8, naming), made).unwrap();
            assert!(late.outcome.await.unwrap_err().asks_for_repetition(), "{naming:?}");
        }
        assert!(runs.alone(made).await.unwrap_err().asks_for_repetition());
        let halfway = |sent: Sent| async move {
            sent.store(true, Ordering::Relaxed);
            std::future::pending().await
        };
        assert!(runs.alone(halfway).await.is_err(), "it was not even begun");
    }

    #[test]
    fn only_so_many_wait_for_one_run() {
        let mut shelf = shelf();
        let (place, run) = begin(&mut shelf, 0);
        let mut find = || shelf.find(&call(0, Naming::Again));
        let mut waiting: Vec<_> = (0..MAX_WAITING).map(|_| find().unwrap().unwrap()).collect();
        assert!(matches!(find(), Err(Error::Crowded)));
        waiting.pop();
        assert!(find().unwrap().is_some(), "one has left");
        shelf.end(&place, &run, Bytes::from_static(b"{}"), true);
        assert_eq!(again(&mut shelf).unwrap(), "{}", "nobody waits for what has ended");
    }

    /// What is counted must be what is there, in whatever order runs begin, end, are found and forgotten.
    #[test]
    fn the_book_balances() {
        let mut shelf = Shelf::new(Duration::from_secs(60), 1_000, 5_000);
        let mut under_way = Vec::new();
        let mut dice = 1_u32;
        let mut roll = |sides: u32| {
            dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (dice >> 16) % sides
        };
        for _ in 0..20_000 {
            match roll(5) {
                0 | 1 => {
                    let first = call(roll(20) as u8, Naming::First);
                    let run = Arc::new(Run::default());
                    let waiting = (roll(2) == 0).then(|| run.wait());
                    let number = shelf.begin(&first, &run);
                    under_way.push((Place { identity: first.identity, number }, run, waiting));
                }
                2 | 3 if !under_way.is_empty() => {
                    let (place, run, _waiting) = under_way.swap_remove(roll(under_way.len() as u32) as usize);
                    let length = match roll(6) {
                        0 => {
                            shelf.refuse(&place, &run, Arc::new(busy()), roll(2) == 0);
                            continue;
                        }
                        1 => 1_001,
                        _ => roll(1_000) as usize,
                    };
                    shelf.end(&place, &run, Bytes::from(vec![b' '; length]), run.waiting() > 0);
                }
                4 => drop(shelf.find(&call(roll(20) as u8, Naming::Again)).unwrap()),
                _ => {}
            }
            if roll(500) == 0 {
                shelf.forget_oldest();
            }
            let entries = || shelf.entries.values().flatten();
            let kept = entries().filter_map(|entry| match &entry.state {
                State::Ended { outcome: Outcome::Kept(json), .. } => Some(json.len() + ENTRY_BYTES),
                _ => None,
            });
            assert_eq!((kept.clone().sum::<usize>(), kept.count()), (shelf.bytes, shelf.kept.len()));
            assert!(shelf.bytes <= shelf.max_bytes);
            let running = entries().filter(|entry| matches!(entry.state, State::Running(_))).count();
            assert_eq!((running, entries().count()), (under_way.len(), under_way.len() + shelf.ended.len()));
            assert!(shelf.entries.values().all(|entries| !entries.is_empty()));
        }
        assert!(!shelf.ended.is_empty());
        for (place, run, _waiting) in under_way {
            shelf.end(&place, &run, Bytes::new(), true);
        }
        shelf.window = Duration::ZERO;
        shelf.sweep();
        assert!(
            shelf.refused.is_empty()
                && shelf.entries.is_empty()
                && shelf.ended.is_empty()
                && shelf.kept.is_empty()
                && shelf.bytes == 0
        );
    }

    #[test]
    fn the_memory_of_runs_has_an_end() {
        let mut shelf = Shelf::new(Duration::from_secs(60), 0, 0);
        for number in 0..=MAX_ENDED as u32 {
            let mut one = call(0, Naming::Key);
            one.identity[..4].copy_from_slice(&number.to_be_bytes());
            let run = Arc::new(Run::default());
            let place = Place { identity: one.identity, number: shelf.begin(&one, &run) };
            shelf.end(&place, &run, Bytes::from_static(b"{}"), true);
        }
        assert_eq!(shelf.entries.len(), MAX_ENDED);
        assert!(shelf.find(&call(0, Naming::Key)).unwrap().is_none(), "the oldest is forgotten first");
        let mut last = call(0, Naming::Key);
        last.identity[..4].copy_from_slice(&(MAX_ENDED as u32).to_be_bytes());
        assert!(shelf.find(&last).unwrap().is_some());
        last.arguments = [1; 32];
        assert!(shelf.find(&last).is_err(), "a key is known by its arguments also when its outcome is gone");
    }
}
