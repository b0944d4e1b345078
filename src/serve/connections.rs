//! Who is connected, whose turn it is, and the limits on the turns of clients.
//!
//! A connection is in one [`Phase`]. In all but [`Phase::Work`] Portolan waits for the client, and so it does while a
//! write makes no progress. A sweep each [`TICK`] cuts those that have waited too long. Between sweeps a request costs
//! some stores to atomics, no clock and no timer.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

use crate::config::Entry;

use super::Load;

/// How often the limits are looked at. They are counted in sweeps: a client has all of its time and up to two sweeps
/// more; it loses none when Portolan itself was held up.
pub const TICK: Duration = Duration::from_millis(250);
/// How long a client that was answered before all of its request was read has to notice. Closed at once, the kernel
/// would reset the connection, and the answer would be lost with it (RFC 9112, 9.6).
const LINGER: Duration = Duration::from_secs(2);
/// How many bytes of an answer pay for a sweep that its client let Portolan wait: 8 KiB for a second, as bodies do. A
/// client that takes a byte now and then would otherwise keep its answer for ever.
const BYTES_PER_SWEEP: u64 = 8192 * TICK.as_millis() as u64 / 1000;
/// How long an event stream has, after shutdown began, to end in order.
const LAST_EVENTS: Duration = Duration::from_secs(1);
/// What part of all connections makes room when one place is needed: to find out who waits longest costs a look at all.
const ROOM: usize = 64;
/// How many sweeps a connection waits for its client at least before another takes its place.
const FAIR_CHANCE: u32 = 1;

/// Whose turn it is, as far as requests go.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(u8)]
enum Phase {
    /// The client's: its connection is new, or the first byte of another request was there.
    Head,
    /// Portolan's: a request is being answered.
    Work,
    /// The client's: the rest of the request's body.
    Body,
    /// The client's: it may send another request.
    Idle,
    /// The client's: the last answer was sent, before all of its request was read.
    Linger,
    /// Nobody's: the connection is about to be closed, and begins no request any more.
    Cut,
}

impl Phase {
    const ALL: [Self; 6] = [Self::Head, Self::Work, Self::Body, Self::Idle, Self::Linger, Self::Cut];
}

/// A phase and the sweep since which it lasts, in one word: a cut must not meet a request that just began.
#[derive(Clone, Copy, PartialEq)]
struct Turn {
    phase: Phase,
    since: u32,
}

impl Turn {
    fn word(self) -> u64 {
        u64::from(self.since) << 8 | self.phase as u64
    }

    fn of(word: u64) -> Self {
        Self { phase: Phase::ALL[(word & 0xff) as usize], since: (word >> 8) as u32 }
    }
}

/// All open connections.
pub struct Connections {
    shutdown: CancellationToken,
    open: Mutex<HashMap<u64, Arc<Connection>>>,
    next: AtomicU64,
    max_connections: usize,
    /// Somebody waits for a place.
    wanted: AtomicBool,
    left: Notify,
    /// How many sweeps there were; starts at 1, so that 0 can stand for never.
    now: AtomicU32,
    /// The sweep since which no new connection is taken.
    draining: AtomicU32,
    load: Arc<Load>,
    max_requests: usize,
    /// In sweeps.
    header: u32,
    keep_alive: u32,
    write: u32,
}

fn sweeps(time: Duration) -> u32 {
    u32::try_from(time.as_millis().div_ceil(TICK.as_millis())).unwrap_or(u32::MAX)
}

impl Connections {
    /// None of them; they are counted in `load`, and `shutdown` ends their event streams.
    pub fn new(entry: &Entry, load: Arc<Load>, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            shutdown,
            open: Mutex::default(),
            next: AtomicU64::new(0),
            max_connections: entry.max_connections,
            wanted: AtomicBool::new(false),
            left: Notify::new(),
            now: AtomicU32::new(1),
            draining: AtomicU32::new(0),
            load,
            max_requests: entry.max_requests,
            header: sweeps(entry.header_timeout),
            keep_alive: sweeps(entry.keep_alive_timeout),
            write: sweeps(entry.write_timeout),
        })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.open.lock().expect("no code panics while it holds the connections")
    }

    pub fn are_none(&self) -> bool {
        self.open().is_empty()
    }

    fn now(&self) -> u32 {
        self.now.load(Ordering::Relaxed)
    }

    /// Starts the task of a new connection. Like all that cuts connections, for the accept loop alone.
    pub fn add<F: Future<Output = ()> + Send + 'static>(
        self: &Arc<Self>,
        tasks: &TaskTracker,
        serve: impl FnOnce(Guest) -> F,
    ) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            all: self.clone(),
            task: OnceLock::new(),
            turn: AtomicU64::new(Turn { phase: Phase::Head, since: self.now() }.word()),
            stalled: AtomicU32::new(0),
            debt: AtomicU64::new(0),
            counted: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            unread: AtomicBool::new(false),
            heard: AtomicBool::new(false),
            half: AtomicBool::new(false),
            hung_up: AtomicBool::new(false),
            streams_events: AtomicBool::new(false),
        });
        self.load.connections.fetch_add(1, Ordering::Relaxed);
        // In before it starts, so that it leaves after.
        self.open().insert(id, connection.clone());
        let task = tasks.spawn(serve(Guest { id, connection: connection.clone() }));
        connection.task.set(task.abort_handle()).expect("it is set here alone");
    }

    /// Whether one more connection may be open. If there is no place, those that wait longest for their clients go.
    pub fn ensure_room(&self) -> bool {
        // Before the look: who leaves after it must see this.
        self.wanted.store(true, Ordering::SeqCst);
        let full = self.open().len() >= self.max_connections;
        let room = !full || self.cut_longest_waiting();
        if room {
            self.wanted.store(false, Ordering::Relaxed);
        }
        room
    }

    /// Done when there may be room again.
    pub async fn room_told(&self) {
        self.left.notified().await;
    }

    /// Cuts the connections that wait longest for their clients, the idle last: they kept nobody waiting. `false` if none
    /// waits long enough.
    pub fn cut_longest_waiting(&self) -> bool {
        let mut open = self.open();
        let now = self.now();
        let waits = |(id, connection): (&u64, &Arc<Connection>)| {
            let turn = connection.turn();
            let age = now.wrapping_sub(connection.waits_since(turn)?);
            let is_idle = turn.phase == Phase::Idle && !connection.is_stalled();
            (age > FAIR_CHANCE).then_some((is_idle, Reverse(age), *id, turn))
        };
        let mut waiting: Vec<_> = open.iter().filter_map(waits).collect();
        waiting.sort_unstable_by_key(|(is_idle, age, id, _)| (*is_idle, *age, *id));
        let (most, mut cut) = (1 + open.len() / ROOM, 0);
        for (_, _, id, turn) in waiting {
            if open.get(&id).is_some_and(|connection| connection.cut(turn, "another needs its place")) {
                open.remove(&id);
                cut += 1;
            }
            if cut == most {
                break;
            }
        }
        cut > 0
    }

    /// From now on the idle are closed, and event streams whose clients do not read.
    pub fn drain(&self) {
        self.draining.store(self.now(), Ordering::Relaxed);
        self.sweep();
    }

    /// Cuts whoever was waited for too long. To be called each [`TICK`].
    pub fn sweep(&self) {
        let now = self.now().wrapping_add(1).max(1);
        self.now.store(now, Ordering::Relaxed);
        for connection in self.open().values() {
            let turn = connection.turn();
            if let Some(reason) = connection.is_late(turn, now) {
                connection.cut(turn, reason);
            }
        }
    }

    pub fn cut_all(&self) {
        self.open().values().for_each(|connection| connection.abort());
    }
}

/// A connection for as long as its task lives; leaves the list on drop.
pub struct Guest {
    id: u64,
    connection: Arc<Connection>,
}

impl Guest {
    pub fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.connection.release();
        self.connection.all.open().remove(&self.id);
        self.connection.all.load.connections.fetch_sub(1, Ordering::Relaxed);
        self.connection.tell_of_room();
    }
}

/// One open connection, as its stream and its bodies see it.
pub struct Connection {
    all: Arc<Connections>,
    task: OnceLock<AbortHandle>,
    turn: AtomicU64,
    /// The sweep since which a write makes no progress.
    stalled: AtomicU32,
    /// What the client owes for the waits before this one, in bytes that it must take; see [`BYTES_PER_SWEEP`].
    debt: AtomicU64,
    /// Its request is one of those in flight.
    counted: AtomicBool,
    /// Its answer is complete, but not yet sent.
    answered: AtomicBool,
    /// Its request's body is not read to the end.
    unread: AtomicBool,
    /// Any byte came from the client.
    heard: AtomicBool,
    /// What came last is the beginning of a head, as far as one can know.
    half: AtomicBool,
    /// The client sends no more.
    hung_up: AtomicBool,
    streams_events: AtomicBool,
}

impl Connection {
    fn turn(&self) -> Turn {
        Turn::of(self.turn.load(Ordering::Acquire))
    }

    /// `false` when it is cut.
    fn enter(&self, phase: Phase) -> bool {
        let next = Turn { phase, since: self.all.now() }.word();
        let step = |turn| (Turn::of(turn).phase != Phase::Cut).then_some(next);
        self.turn.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_ok()
    }

    /// Cuts it, unless its turn has changed since it was looked at.
    fn cut(&self, seen: Turn, reason: &'static str) -> bool {
        let cut = Turn { phase: Phase::Cut, ..seen }.word();
        let is_cut = seen.phase != Phase::Cut
            && self.turn.compare_exchange(seen.word(), cut, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if is_cut {
            tracing::debug!(reason, phase = ?seen.phase, "cutting a connection");
            self.release();
            self.abort();
        }
        is_cut
    }

    fn abort(&self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }

    /// The sweep since which its client is waited for.
    fn waits_since(&self, turn: Turn) -> Option<u32> {
        match (self.stalled.load(Ordering::Relaxed), turn.phase) {
            (_, Phase::Cut) | (0, Phase::Work) => None,
            (0, _) => Some(turn.since),
            (stalled, _) => Some(stalled),
        }
    }

    fn is_late(&self, turn: Turn, now: u32) -> Option<&'static str> {
        let longer = |since: u32, limit: u32| now.wrapping_sub(since) > limit;
        let stalled = self.stalled.load(Ordering::Relaxed);
        let owed = u32::try_from(self.debt.load(Ordering::Relaxed) / BYTES_PER_SWEEP).unwrap_or(u32::MAX);
        if stalled != 0 && longer(stalled, self.all.write.saturating_sub(owed)) {
            return Some("its client does not read the answer");
        }
        let draining = self.all.draining.load(Ordering::Relaxed);
        match turn.phase {
            Phase::Head | Phase::Idle if draining != 0 => Some("Portolan stops"),
            Phase::Head if longer(turn.since, self.all.header) => Some("no whole request came"),
            Phase::Idle if longer(turn.since, self.all.keep_alive) => Some("no other request came"),
            Phase::Linger if longer(turn.since, sweeps(LINGER)) => Some("its client does not close it"),
            _ if draining != 0
                && self.streams_events.load(Ordering::Relaxed)
                && longer(draining, sweeps(LAST_EVENTS)) =>
            {
                Some("Portolan stops, and its client does not read the end of the events")
            }
            // A body's time is the business of who reads it.
            _ => None,
        }
    }

    /// The head of a request is there, with its body if it is `whole`. `false` when it is too late for that.
    pub fn begin(&self, whole: bool) -> bool {
        self.answered.store(false, Ordering::Relaxed);
        self.unread.store(!whole, Ordering::Relaxed);
        if !whole {
            // What came with its head is taken for its body.
            self.half.store(false, Ordering::Relaxed);
        }
        self.streams_events.store(false, Ordering::Relaxed);
        self.enter(Phase::Work)
    }

    /// Counts its request as one in flight, if one more may be.
    pub fn try_admit(&self) -> bool {
        // The answer before this one may not be sent yet.
        if self.counted.load(Ordering::Relaxed) {
            return true;
        }
        let room = self.all.load.requests.fetch_add(1, Ordering::AcqRel) < self.all.max_requests;
        if room {
            self.counted.store(true, Ordering::Relaxed);
        } else {
            self.all.load.requests.fetch_sub(1, Ordering::AcqRel);
        }
        room
    }

    /// Counts it again, even if that is one too many: its answer is there, and may as well be sent.
    fn readmit(&self) {
        if !self.counted.swap(true, Ordering::AcqRel) {
            self.all.load.requests.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Counts it no more. Requests that wait for their clients are not in flight: slow clients could be all of them.
    fn release(&self) {
        if self.counted.swap(false, Ordering::AcqRel) {
            self.all.load.requests.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn tell_of_room(&self) {
        if self.all.wanted.load(Ordering::SeqCst) {
            self.all.left.notify_one();
        }
    }

    /// Bytes came, and what came so far ends as a head does (`ends_head`), or not.
    pub fn hear(&self, ends_head: bool) {
        self.heard.store(true, Ordering::Relaxed);
        if !self.unread.load(Ordering::Relaxed) {
            self.half.store(!ends_head, Ordering::Relaxed);
        }
        if self.turn().phase == Phase::Idle {
            self.enter(Phase::Head);
        }
    }

    /// The client has sent all it will.
    pub fn hang_up(&self) {
        self.hung_up.store(true, Ordering::Relaxed);
    }

    /// A part of the request's body is waited for.
    pub fn await_body(&self) {
        if self.turn().phase == Phase::Work {
            self.enter(Phase::Body);
            self.release();
        }
    }

    /// A part of the request's body came: what was waited for it does not count any more.
    pub fn body_flows(&self) {
        if self.turn().phase == Phase::Body {
            self.enter(Phase::Body);
        }
    }

    /// The request's body is all there. `false` when it was waited for, and there is no place for the request now.
    #[must_use]
    pub fn body_ended(&self) -> bool {
        self.unread.store(false, Ordering::Relaxed);
        self.resume()
    }

    /// Nobody waits for the request's body any more. What is left to do is to send an error, with a place or without.
    pub fn body_left(&self) {
        self.resume();
    }

    fn resume(&self) -> bool {
        self.turn().phase != Phase::Body || !self.enter(Phase::Work) || self.try_admit()
    }

    /// Whether an answer leaves a part of its request unread.
    pub fn leaves_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// The answer has no end of its own; returns what ends it.
    pub fn stream_events(&self) -> WaitForCancellationFutureOwned {
        self.streams_events.store(true, Ordering::Relaxed);
        self.all.shutdown.clone().cancelled_owned()
    }

    /// The whole answer was handed over for sending.
    pub fn complete(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    /// A write found no room.
    pub fn stall(&self) {
        if self.stalled.load(Ordering::Relaxed) == 0 {
            self.stalled.store(self.all.now(), Ordering::Relaxed);
            self.release();
        }
    }

    /// A write wrote so many bytes.
    pub fn progress(&self, bytes: usize) {
        let stalled = self.stalled.load(Ordering::Relaxed);
        let mut debt = self.debt.load(Ordering::Relaxed);
        if stalled != 0 {
            debt += u64::from(self.all.now().wrapping_sub(stalled)) * BYTES_PER_SWEEP;
        }
        if debt != 0 {
            self.debt.store(debt.saturating_sub(bytes as u64), Ordering::Relaxed);
        }
        if stalled != 0 {
            self.stalled.store(0, Ordering::Relaxed);
            if self.turn().phase == Phase::Work {
                self.readmit();
            }
        }
    }

    pub fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed) != 0
    }

    /// Nothing is left to be sent.
    pub fn flushed(&self) {
        if self.answered.load(Ordering::Relaxed) {
            self.answered.store(false, Ordering::Relaxed);
            self.debt.store(0, Ordering::Relaxed);
            self.enter(if self.half.load(Ordering::Relaxed) { Phase::Head } else { Phase::Idle });
            self.release();
            self.tell_of_room();
        }
    }

    /// Whether closing it must wait until the client has noticed.
    pub fn lingers(&self) -> bool {
        let refused_head = self.turn().phase == Phase::Head && self.heard.load(Ordering::Relaxed);
        let lingers = !self.hung_up.load(Ordering::Relaxed) && (self.leaves_unread() || refused_head);
        lingers && self.enter(Phase::Linger)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::config::Cli;

    use super::*;

    /// Connections whose sweeps a test makes itself.
    struct Hall {
        all: Arc<Connections>,
        tasks: TaskTracker,
    }

    impl Hall {
        fn open(change: impl FnOnce(&mut Entry)) -> Self {
            let mut entry = Cli::parse_from(["portolan"]).settings.entry;
            change(&mut entry);
            Self { all: Connections::new(&entry, Arc::default(), CancellationToken::new()), tasks: TaskTracker::new() }
        }

        fn enter(&self, phase: Phase) -> Arc<Connection> {
            let mut entered = None;
            self.all.add(&self.tasks, |guest| {
                entered = Some(guest.connection());
                async move {
                    std::future::pending::<()>().await;
                    drop(guest);
                }
            });
            let connection = entered.expect("it is made at once");
            connection.enter(phase);
            connection
        }

        fn pass(&self, seconds: u64) {
            (0..sweeps(Duration::from_secs(seconds))).for_each(|_| self.all.sweep());
        }
    }

    fn is_cut(connection: &Connection) -> bool {
        connection.turn().phase == Phase::Cut
    }

    #[tokio::test]
    async fn an_answer_has_to_be_read_at_a_rate() {
        let hall = Hall::open(|entry| entry.write_timeout = Duration::from_secs(30));
        let [miser, fair, idle, once_quick] = [(); 4].map(|()| hall.enter(Phase::Work));
        once_quick.progress(100 * 1024 * 1024);
        once_quick.stall();
        for _ in 0..10 {
            miser.stall();
            fair.stall();
            hall.pass(29);
            miser.progress(1);
            fair.progress(29 * 8192);
        }
        assert!(is_cut(&miser), "a byte now and then is not enough");
        assert!(is_cut(&once_quick), "what was quick buys no rest");
        assert!(!is_cut(&fair), "8 KiB a second are");
        assert!(!is_cut(&idle), "nobody is cut for what is not sent");
        // The next answer starts without what the last one owed.
        fair.stall();
        hall.pass(29);
        fair.progress(1);
        fair.complete();
        fair.flushed();
        assert!(fair.begin(true));
        fair.stall();
        hall.pass(29);
        assert!(!is_cut(&fair));
        hall.pass(3);
        assert!(is_cut(&fair));
    }

    #[tokio::test]
    async fn a_body_that_flows_does_not_make_room_and_one_that_stalls_does() {
        let hall = Hall::open(|_| {});
        let [flowing, stalled] = [(); 2].map(|()| hall.enter(Phase::Work));
        flowing.await_body();
        hall.pass(1);
        stalled.await_body();
        hall.pass(1);
        flowing.body_flows();
        assert!(hall.all.cut_longest_waiting());
        assert!(is_cut(&stalled) && !is_cut(&flowing));
        assert!(!hall.all.cut_longest_waiting(), "nobody else waits");
    }

    #[tokio::test]
    async fn the_idle_make_room_last() {
        let hall = Hall::open(|_| {});
        let idle = hall.enter(Phase::Idle);
        hall.pass(1);
        let unread = hall.enter(Phase::Work);
        unread.stall();
        hall.pass(1);
        let others = [Phase::Body, Phase::Head, Phase::Linger].map(|phase| {
            let connection = hall.enter(phase);
            hall.pass(1);
            connection
        });
        for waits in [&unread].into_iter().chain(&others).chain([&idle]) {
            assert!(!is_cut(waits));
            assert!(hall.all.cut_longest_waiting());
            assert!(is_cut(waits));
        }
    }
}
