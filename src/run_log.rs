//! The run log: a row for each run, written behind its back.
//!
//! A run leaves what is to be told of it in a queue and goes on; one task takes it from there and writes several rows at a
//! time. A run never waits for the log: when the queue is full, because the database is away or slow, the row is dropped and
//! counted. A stop writes all that is queued. The same module forgets runs and changes whose time is over.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::{SubsecRound, TimeDelta};
use serde_json::{Map, Value};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::RunLog as Settings;
use crate::model::{By, Run, RunContent, RunOutcome, ServerTool};
use crate::store::{self, RUNS_AT_ONCE, Store, now, run_id};

/// How many rows wait at most; one takes about 500 bytes, apart from arguments and result.
const QUEUE: usize = 16_384;
/// How many bytes of arguments and results wait at most; rows go without theirs then.
const MAX_CONTENT: usize = 64 * 1024 * 1024;
/// How much of the arguments of a run is kept, and how much of its result, in bytes.
const MAX_TEXT: usize = 16 * 1024;
/// The longest name of a tool in the log, in bytes: it is a server's own word.
const MAX_TOOL_NAME: usize = 1024;
/// How long the first row waits for others: each statement is a write to the disk.
const GATHER: Duration = Duration::from_millis(250);
/// Between two attempts to write.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How long one attempt may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a stop waits for the rows that are left.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a reader waits for the rows before it.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// How often dropped rows are warned about, at most.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// The longest time between two sweeps, the first one after a start, and between two statements of a sweep, in which others
/// write.
const SWEEP_EVERY: Duration = Duration::from_secs(60 * 60);
const FIRST_SWEEP: Duration = Duration::from_secs(60);
const SWEEP_PAUSE: Duration = Duration::from_millis(20);

/// The code of a run that was cut off: its client left, or Portolan stopped.
const CANCELLED: &str = "cancelled";

/// Clones share everything.
#[derive(Clone)]
pub struct RunLog(Arc<Shared>);

struct Shared {
    settings: Settings,
    store: Store,
    queue: mpsc::Sender<Entry>,
    /// Rows that are queued or being written, and the bytes of their contents.
    waiting: AtomicUsize,
    content: AtomicUsize,
    dropped: AtomicU64,
    warned: Mutex<Option<Instant>>,
    /// Somebody waits for rows that are gathered.
    hurry: Notify,
    closing: CancellationToken,
    abandoned: CancellationToken,
    tasks: TaskTracker,
}

enum Entry {
    Run(Box<Run>),
    /// Told when all before it is written or lost.
    Flush(oneshot::Sender<()>),
}

impl RunLog {
    /// To be called in the runtime that serves; [`RunLog::close`] ends its tasks.
    pub fn new(settings: Settings, store: Store) -> Self {
        let (queue, entries) = mpsc::channel(QUEUE);
        let log = Self(Arc::new(Shared {
            settings,
            store,
            queue,
            waiting: AtomicUsize::new(0),
            content: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
            warned: Mutex::new(None),
            hurry: Notify::new(),
            closing: CancellationToken::new(),
            abandoned: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }));
        let abandoned = log.0.abandoned.clone();
        log.0.tasks.spawn(abandoned.run_until_cancelled_owned(log.clone().write(entries)));
        let closing = log.0.closing.clone();
        log.0.tasks.spawn(closing.run_until_cancelled_owned(log.clone().sweep()));
        log
    }

    /// A run that begins. `sent` says whether it may have reached its tool when it is cut off.
    pub fn begin(
        &self,
        by: &By,
        found: &ServerTool,
        arguments: &Map<String, Value>,
        sent: &Arc<AtomicBool>,
    ) -> Recording {
        let started_at = now().trunc_subsecs(3);
        let keeps = self.0.settings.log_arguments;
        let mut args = Start { kept: Vec::new(), room: if keeps { MAX_TEXT } else { 0 }, bytes: 0 };
        serde_json::to_writer(&mut args, arguments).expect("arguments came as JSON");
        let args_bytes = args.bytes as i64;
        let content = keeps.then(|| {
            let args_cut = args.bytes > args.kept.len();
            RunContent { args: args.into_text(), args_cut, result: None, result_cut: false }
        });
        let ServerTool { server, tool } = found;
        let run = Run {
            id: run_id(started_at),
            started_at,
            duration_ms: 0,
            caller: by.name().map(str::to_owned),
            mcp_server_id: server.id.clone(),
            server_name: server.server_name.clone(),
            tool_id: tool.id.clone(),
            tool_name: start_of(&tool.name, MAX_TOOL_NAME).to_owned(),
            outcome: RunOutcome::Failed,
            error_code: None,
            args_bytes,
            result_bytes: 0,
            content,
        };
        Recording { log: self.clone(), begun: Instant::now(), sent: sent.clone(), run: Some(Box::new(run)) }
    }

    /// Rows that are not written yet.
    pub fn depth(&self) -> usize {
        self.0.waiting.load(Ordering::Relaxed)
    }

    /// Rows that were never written, since the start.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Waits until what has ended before is written, but not for long: a reader sees the runs of its own process, unless the
    /// database is away.
    pub async fn flush(&self) {
        let (written, done) = oneshot::channel();
        if self.depth() > 0 && self.0.queue.try_send(Entry::Flush(written)).is_ok() {
            self.0.hurry.notify_one();
            let _ = timeout(FLUSH_TIMEOUT, done).await;
        }
    }

    /// Writes all that is queued, and ends; no run comes after this. `false` when it could not be written in time.
    pub async fn close(&self) -> bool {
        self.0.closing.cancel();
        self.0.tasks.close();
        if timeout(CLOSE_TIMEOUT, self.0.tasks.wait()).await.is_ok() {
            return true;
        }
        tracing::error!(runs = self.depth(), "runs are missing in the run log: the database did not take them in time");
        self.0.abandoned.cancel();
        self.0.tasks.wait().await;
        false
    }

    fn queue(&self, mut run: Box<Run>) {
        let shared = &*self.0;
        let bytes = content_bytes(&run);
        // Whoever adds to it at the same time may get a little more than there is.
        if bytes > 0 && shared.content.load(Ordering::Relaxed) + bytes > MAX_CONTENT {
            run.content = None;
        }
        let bytes = content_bytes(&run);
        // Before the row can be written, which takes it away again.
        shared.waiting.fetch_add(1, Ordering::Relaxed);
        shared.content.fetch_add(bytes, Ordering::Relaxed);
        if shared.queue.try_send(Entry::Run(run)).is_err() {
            self.settle(1, bytes);
            self.lose(1, None);
        }
    }

    fn settle(&self, runs: usize, bytes: usize) {
        self.0.waiting.fetch_sub(runs, Ordering::Relaxed);
        self.0.content.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// `refusal` is what the database said to them, if that is why.
    fn lose(&self, runs: u64, refusal: Option<&store::Error>) {
        let dropped = self.0.dropped.fetch_add(runs, Ordering::Relaxed) + runs;
        let mut warned = self.0.warned.lock().expect("no code panics while it holds the time");
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            match refusal {
                None => tracing::warn!(runs.dropped = dropped, "the run log cannot keep up; runs are missing in it"),
                Some(error) => {
                    let cause = std::error::Error::source(error);
                    tracing::error!(%error, ?cause, runs.dropped = dropped, "a run cannot be logged");
                }
            }
        }
    }

    /// Writes what comes until there is an end of it.
    async fn write(self, mut entries: mpsc::Receiver<Entry>) {
        let mut taken = Vec::with_capacity(RUNS_AT_ONCE);
        while self.take(&mut entries, &mut taken).await {
            let mut runs = Vec::with_capacity(taken.len());
            let mut waiting = Vec::new();
            for entry in taken.drain(..) {
                match entry {
                    Entry::Run(run) => runs.push(*run),
                    Entry::Flush(written) => waiting.push(written),
                }
            }
            if !runs.is_empty() {
                self.add(&runs).await;
                self.settle(runs.len(), runs.iter().map(content_bytes).sum());
            }
            for written in waiting {
                // Who waited may be gone.
                let _ = written.send(());
            }
        }
    }

    /// Takes what came, once there is something, and what comes in a while after it; `false` when nothing will any more.
    async fn take(&self, entries: &mut mpsc::Receiver<Entry>, taken: &mut Vec<Entry>) -> bool {
        let closing = &self.0.closing;
        let first = tokio::select! {
            biased;
            first = entries.recv_many(taken, RUNS_AT_ONCE) => first,
            () = closing.cancelled() => {
                entries.close();
                entries.recv_many(taken, RUNS_AT_ONCE).await
            }
        };
        let is_asked_for = taken.iter().any(|entry| matches!(entry, Entry::Flush(_)));
        if first > 0 && taken.len() < RUNS_AT_ONCE && !is_asked_for {
            // Nothing is taken meanwhile: each run would have to wake whoever waits for it.
            tokio::select! {
                () = sleep(GATHER) => {}
                () = self.0.hurry.notified() => {}
                () = closing.cancelled() => {}
            }
            while taken.len() < RUNS_AT_ONCE
                && let Ok(entry) = entries.try_recv()
            {
                taken.push(entry);
            }
        }
        first > 0
    }

    /// Tries until it is done, or will never be. While it is tried the queue fills up, and no further.
    async fn add(&self, runs: &[Run]) {
        let mut pause = RETRY.0;
        let mut told = false;
        loop {
            let added = timeout(WRITE_TIMEOUT, self.0.store.add_runs(runs)).await;
            match added {
                Ok(Ok(())) => return,
                Ok(Err(error @ (store::Error::Refused(_) | store::Error::NameTaken | store::Error::Overtaken))) => {
                    match runs {
                        [_] => return self.lose(1, Some(&error)),
                        // One of them is what the database does not take.
                        _ => {
                            for run in runs {
                                Box::pin(self.add(std::slice::from_ref(run))).await;
                            }
                            return;
                        }
                    }
                }
                Ok(Err(store::Error::Unavailable(_) | store::Error::Full(_))) | Err(_) if !told => {
                    told = true;
                    tracing::warn!(runs = self.depth(), "the database does not take the run log; it is tried again");
                }
                Ok(Err(store::Error::Unavailable(_) | store::Error::Full(_))) | Err(_) => {}
            }
            let closing = &self.0.closing;
            tokio::select! {
                () = sleep(pause) => {}
                // There is little time left.
                () = closing.cancelled(), if !closing.is_cancelled() => {}
            }
            pause = (pause * 2).min(if closing.is_cancelled() { RETRY.0 } else { RETRY.1 });
        }
    }

    /// Forgets runs and changes whose time is over, a few at a time.
    async fn sweep(self) {
        let Settings { keep_runs, keep_changes, .. } = self.0.settings;
        let every = (keep_runs.min(keep_changes) / 4).clamp(Duration::from_millis(100), SWEEP_EVERY);
        let mut sweeps = interval_at(Instant::now() + every.min(FIRST_SWEEP), every);
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let before = |time| now() - TimeDelta::from_std(time).expect("the settings have a longest time");
        loop {
            sweeps.tick().await;
            let store = &self.0.store;
            let swept = async {
                while store.forget_runs(before(keep_runs)).await? > 0 {
                    sleep(SWEEP_PAUSE).await;
                }
                while store.forget_changes(before(keep_changes)).await? > 0 {
                    sleep(SWEEP_PAUSE).await;
                }
                Ok::<_, store::Error>(())
            };
            if let Err(error) = swept.await {
                tracing::warn!(%error, "old runs and changes cannot be forgotten; it is tried again");
            }
        }
    }
}

fn content_bytes(run: &Run) -> usize {
    let content = run.content.as_ref();
    content.map_or(0, |content| content.args.len() + content.result.as_deref().map_or(0, str::len))
}

/// A run under way, as the log will tell it: dropped before it has ended, it was cut off.
pub struct Recording {
    log: RunLog,
    begun: Instant,
    sent: Arc<AtomicBool>,
    run: Option<Box<Run>>,
}

impl Recording {
    /// The run has a result, which is `text`.
    pub fn ended(mut self, is_error: bool, text: &str) {
        if let Some(run) = &mut self.run {
            run.result_bytes = text.len() as i64;
            if let Some(content) = &mut run.content {
                let kept = start_of(text, MAX_TEXT);
                (content.result, content.result_cut) = (Some(kept.to_owned()), kept.len() < text.len());
            }
        }
        self.end(if is_error { RunOutcome::Error } else { RunOutcome::Success }, None);
    }

    /// Nothing was sent to the tool; the code is that of the answer.
    pub fn failed(mut self, code: &str) {
        self.end(RunOutcome::Failed, Some(code));
    }

    fn end(&mut self, outcome: RunOutcome, code: Option<&str>) {
        let Some(mut run) = self.run.take() else { return };
        run.duration_ms = self.begun.elapsed().as_millis() as i64;
        run.outcome = outcome;
        run.error_code = code.map(str::to_owned);
        self.log.queue(run);
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let sent = self.sent.load(Ordering::Relaxed);
        self.end(if sent { RunOutcome::Error } else { RunOutcome::Failed }, Some(CANCELLED));
    }
}

fn start_of(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

/// Counts what is written, and keeps the start of it.
struct Start {
    kept: Vec<u8>,
    room: usize,
    bytes: usize,
}

impl Start {
    /// What was kept, without half a character at its end.
    fn into_text(self) -> String {
        let text = String::from_utf8(self.kept);
        text.unwrap_or_else(|cut| {
            let whole = cut.utf8_error().valid_up_to();
            String::from_utf8_lossy(&cut.as_bytes()[..whole]).into_owned()
        })
    }
}

impl io::Write for Start {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.room.saturating_sub(self.kept.len()).min(bytes.len());
        self.kept.extend_from_slice(&bytes[..room]);
        self.bytes += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_of_a_text_ends_with_a_whole_character() {
        for (room, kept) in [(0, ""), (1, "["), (2, "[\""), (3, "[\""), (4, "[\"é"), (9, "[\"é\"]")] {
            let mut start = Start { kept: Vec::new(), room, bytes: 0 };
            serde_json::to_writer(&mut start, &["é"]).expect("it takes all");
            assert_eq!((start.bytes, start.into_text().as_str()), (6, kept), "{room}");
        }
        assert_eq!((start_of("aé", 2), start_of("aé", 3), start_of("", 1)), ("a", "aé", ""));
    }
}
