//! One run of many requests: what is under way, and what came of it, for those who ask again (CONTRACT row 16). The tool
//! sees one call, however often a client sends it.
//!
//! A run of its own is a future of its request and ends with it. A run that may be asked for again is a task, because it
//! outlives the request that started it; requests wait for it. Each is known by the identity of its [`Call`] until its
//! time is over. All of this is lost with the process, and replicas do not share it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
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

use super::drip::Ended;
use super::repeats::{Call, Digest, Naming, key_taken};
use super::wire::ToolExecutionResult;

/// How many ended runs are remembered of each kind, with their outcomes or without; an entry takes about 300 bytes.
const MAX_ENDED: usize = 100_000;
const ENTRY_BYTES: usize = 300;

/// Runs under way and ended ones. Clones share everything.
#[derive(Clone)]
pub struct Runs {
    settings: Settings,
    tracker: TaskTracker,
    ending: CancellationToken,
    book: Arc<Mutex<Book>>,
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
    pub fn new(settings: Settings, tracker: TaskTracker) -> Self {
        let shelf = |window| Shelf::new(window, settings.max_kept_outcome_bytes, settings.max_kept_bytes / 2);
        let book = Book { keyed: shelf(settings.key_window), unkeyed: shelf(settings.retry_window) };
        let runs = Self { settings, tracker, ending: CancellationToken::new(), book: Arc::new(Mutex::new(book)) };
        runs.tracker.spawn(runs.ending.clone().run_until_cancelled_owned(runs.clone().sweep()));
        runs
    }

    /// Outcomes are other people's data: they go when their time is over, also when no run comes any more.
    async fn sweep(self) {
        loop {
            sleep(self.settings.retry_window).await;
            let mut book = self.book();
            book.keyed.expire();
            book.unkeyed.expire();
        }
    }

    /// A run that nobody else can ask for: dropped before its end, it is cancelled.
    pub fn alone(
        &self,
        work: impl Future<Output = Result<Bytes, Error>> + Send + 'static,
    ) -> BoxFuture<'static, Ended> {
        self.guarded(work).in_current_span().boxed()
    }

    /// The one run that `call` means, and whether another request started it. Starts it with `work` if there is none.
    ///
    /// `work` fails only when nothing was sent to the tool; such a run is forgotten, so that the next request makes it.
    ///
    /// # Errors
    /// When its key belongs to a run with other arguments.
    pub fn once(
        &self,
        call: &Call,
        work: impl Future<Output = Result<Bytes, Error>> + Send + 'static,
    ) -> Result<(BoxFuture<'static, Ended>, bool), Error> {
        let mut book = self.book();
        let shelf = book.shelf(call.naming);
        shelf.expire();
        if let Some(known) = shelf.find(call)? {
            return Ok((known, true));
        }
        let run = Arc::new(Run::default());
        let place = Place { identity: call.identity, number: shelf.begin(call, &run) };
        let waiting = run.wait();
        drop(book);
        let driven = self.clone().drive(call.naming, place, run, self.guarded(work));
        self.tracker.spawn(driven.in_current_span());
        Ok((waiting, false))
    }

    /// Ends what is under way: those who wait get an error at once.
    pub fn end(&self) {
        self.ending.cancel();
    }

    /// `work` until its end or that of Portolan. What the tool did before that, or before a panic, nobody knows: that is an
    /// outcome (CONTRACT row 13).
    fn guarded(
        &self,
        work: impl Future<Output = Result<Bytes, Error>> + Send + 'static,
    ) -> impl Future<Output = Ended> + Send + 'static {
        let (ending, started) = (self.ending.clone(), Instant::now());
        let failed = move |reason: &str| Ok(ToolExecutionResult::failed(reason, started.elapsed()).json());
        async move {
            match ending.run_until_cancelled_owned(AssertUnwindSafe(work).catch_unwind()).await {
                Some(Ok(ended)) => ended.map_err(Arc::new),
                Some(Err(_)) => {
                    tracing::error!("a run panicked");
                    failed("Something went wrong inside Portolan during the run; the tool may have run.")
                }
                None => failed("Portolan was stopped before the tool answered; the tool may have run."),
            }
        }
    }

    async fn drive(self, naming: Naming, place: Place, run: Arc<Run>, work: impl Future<Output = Ended>) {
        let started = Instant::now();
        tokio::select! {
            ended = work => self.book().shelf(naming).end(&place, &run, ended),
            // Whoever names a run by a key will ask for it again: it goes on to its end, which its deadline bounds.
            () = self.orphaned(&place, &run, started), if naming != Naming::Key => {}
        }
    }

    /// Done when nobody has waited for the run during the grace; then it has ended, for all who still ask.
    async fn orphaned(&self, place: &Place, run: &Run, started: Instant) {
        loop {
            run.until(|waiting| waiting == 0).await;
            if timeout(self.settings.orphan_grace, run.until(|waiting| waiting > 0)).await.is_ok() {
                continue;
            }
            let mut book = self.book();
            // Under the lock nobody joins between the look and the end.
            if run.waiting() == 0 {
                tracing::info!("a run is cancelled: its client did not come back");
                let reason = "Nobody waited for this run any more, so it was cancelled; the tool may have run.";
                let outcome = ToolExecutionResult::failed(reason, started.elapsed()).json();
                return book.unkeyed.end(place, run, Ok(outcome));
            }
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("no code panics while it holds the book")
    }
}

/// A run under way, as its task and those who wait for it share it.
struct Run(watch::Sender<Progress>);

#[derive(Default)]
struct Progress {
    waiting: usize,
    ended: Option<Ended>,
}

impl Default for Run {
    fn default() -> Self {
        Self(watch::Sender::new(Progress::default()))
    }
}

impl Run {
    fn waiting(&self) -> usize {
        self.0.borrow().waiting
    }

    async fn until(&self, test: impl Fn(usize) -> bool) {
        let reached = self.0.subscribe().wait_for(|progress| test(progress.waiting)).await.is_ok();
        debug_assert!(reached, "the sender is in self");
    }

    /// One more who waits, from now until the future has ended or is dropped.
    fn wait(self: &Arc<Self>) -> BoxFuture<'static, Ended> {
        struct Waiting(Arc<Run>);
        impl Drop for Waiting {
            fn drop(&mut self) {
                self.0.0.send_modify(|progress| progress.waiting -= 1);
            }
        }
        self.0.send_modify(|progress| progress.waiting += 1);
        let waiting = Waiting(self.clone());
        async move {
            let mut progress = waiting.0.0.subscribe();
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

/// The runs of one kind, each known for `window` after its end.
struct Shelf {
    window: Duration,
    max_outcome: usize,
    max_bytes: usize,
    /// By identity, oldest first. With a key there is one of each.
    entries: HashMap<Digest, Vec<Entry>>,
    /// Counts beginnings and ends.
    clock: u64,
    /// Ended runs in the order of their ends: when, and which.
    ended: BTreeMap<u64, (Instant, Place)>,
    /// Those of them whose outcomes are kept, and the bytes of these.
    kept: BTreeSet<u64>,
    bytes: usize,
}

struct Entry {
    number: u64,
    arguments: Digest,
    state: State,
}

enum State {
    Running(Arc<Run>),
    Ended {
        /// In the order of ends.
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
    /// Nothing was sent to the tool.
    NotSent,
}

impl Entry {
    /// Whoever asked for this run has not got its outcome, and does not wait for it either.
    fn is_orphan(&self) -> bool {
        match &self.state {
            State::Running(run) => run.waiting() == 0,
            State::Ended { taken, .. } => !taken,
        }
    }
}

impl Shelf {
    fn new(window: Duration, max_outcome: usize, max_bytes: usize) -> Self {
        Self {
            window,
            max_outcome,
            max_bytes,
            entries: HashMap::new(),
            clock: 0,
            ended: BTreeMap::new(),
            kept: BTreeSet::new(),
            bytes: 0,
        }
    }

    /// The run that a repetition means, to be waited for; `None` when there is none, or only one that was not sent.
    fn find(&mut self, call: &Call) -> Result<Option<BoxFuture<'static, Ended>>, Error> {
        if call.naming == Naming::First {
            return Ok(None);
        }
        let Some(entries) = self.entries.get_mut(&call.identity) else { return Ok(None) };
        // Of several identical calls the one whose client has gone is the likeliest to be asked for again.
        let chosen = entries.iter().rposition(Entry::is_orphan).unwrap_or(entries.len() - 1);
        let entry = &mut entries[chosen];
        let outcome = match &mut entry.state {
            State::Ended { outcome: Outcome::NotSent, .. } => {
                let place = Place { identity: call.identity, number: entry.number };
                self.remove(&place);
                return Ok(None);
            }
            _ if entry.arguments != call.arguments => return Err(key_taken()),
            State::Running(run) => return Ok(Some(run.wait())),
            State::Ended { outcome: Outcome::Kept(outcome), taken, .. } => {
                *taken = true;
                outcome.clone()
            }
            State::Ended { outcome: Outcome::Dropped, taken, .. } => {
                *taken = true;
                let reason = "This run was made already; its result is no longer kept.";
                ToolExecutionResult::failed(reason, Duration::ZERO).json()
            }
        };
        Ok(Some(ready(Ok(outcome)).boxed()))
    }

    /// The number of a new run.
    fn begin(&mut self, call: &Call, run: &Arc<Run>) -> u64 {
        // What has ended and was taken is never chosen before this run, and is not known for longer.
        let known = self.entries.get(&call.identity).into_iter().flatten();
        let passed: Vec<_> = known
            .filter(|entry| matches!(entry.state, State::Ended { taken: true, .. }))
            .map(|entry| Place { identity: call.identity, number: entry.number })
            .collect();
        for place in &passed {
            self.remove(place);
        }
        self.clock += 1;
        let entry = Entry { number: self.clock, arguments: call.arguments, state: State::Running(run.clone()) };
        self.entries.entry(call.identity).or_insert_with(|| Vec::with_capacity(1)).push(entry);
        self.clock
    }

    /// Tells those who wait, and keeps what came of it for those who come.
    fn end(&mut self, place: &Place, run: &Run, ended: Ended) {
        let taken = run.waiting() > 0;
        run.0.send_modify(|progress| progress.ended = Some(ended.clone()));
        let outcome = match ended {
            Ok(json) if json.len() <= self.max_outcome => Outcome::Kept(json),
            Ok(_) => Outcome::Dropped,
            Err(_) => Outcome::NotSent,
        };
        self.clock += 1;
        let end = self.clock;
        if let Outcome::Kept(json) = &outcome {
            self.bytes += json.len() + ENTRY_BYTES;
            self.kept.insert(end);
        }
        let entry = self.entry(place).expect("what is under way is in the book");
        entry.state = State::Ended { end, outcome, taken };
        self.ended.insert(end, (Instant::now(), *place));
        self.make_room();
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
    use super::*;

    fn call(identity: u8, naming: Naming) -> Call {
        Call { identity: [identity; 32], arguments: [0; 32], naming }
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
                    let ended = match roll(6) {
                        0 => Err(Arc::new(Error::NoTool)),
                        1 => Ok(Bytes::from(vec![b' '; 1_001])),
                        _ => Ok(Bytes::from(vec![b' '; roll(1_000) as usize])),
                    };
                    shelf.end(&place, &run, ended);
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
            shelf.end(&place, &run, Ok(Bytes::new()));
        }
        shelf.window = Duration::ZERO;
        shelf.expire();
        assert!(shelf.entries.is_empty() && shelf.ended.is_empty() && shelf.kept.is_empty() && shelf.bytes == 0);
    }

    #[test]
    fn the_memory_of_runs_has_an_end() {
        let mut shelf = Shelf::new(Duration::from_secs(60), 0, 0);
        for number in 0..=MAX_ENDED as u32 {
            let mut one = call(0, Naming::Key);
            one.identity[..4].copy_from_slice(&number.to_be_bytes());
            let run = Arc::new(Run::default());
            let place = Place { identity: one.identity, number: shelf.begin(&one, &run) };
            shelf.end(&place, &run, Ok(Bytes::from_static(b"{}")));
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
