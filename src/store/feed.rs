//! How Portolans on one PostgreSQL hear of each other: each reads the rows of `changes` that are new, and forgets what they
//! concern.
//!
//! One connection, for that alone, does both: it listens for notifications, and reads at each one and every [`POLL`]. A
//! notification is a hint and nothing more. It may be lost, it may come twice, and a database or a proxy may have none at
//! all; then the reads alone do. It is sent after the commit and not in its transaction: those that notify commit one
//! after the other in the whole database, and where there is no NOTIFY they would fail.
//!
//! A read that began at some time has seen all that was committed before it (migration 5 says why). So what is known
//! without asking is so until [`LEASE`] after the beginning of the last read; who cannot read for longer knows nothing, and
//! says so. After a lost connection, and after a time without a read, nothing that was known before is trusted, whatever
//! the rows tell that are still there: they are swept, and a database may come back as it was some time ago.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use sqlx::postgres::{PgListener, PgPool, PgPoolOptions};
use sqlx::{Connection, FromRow};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Database, Store, on_db};

/// The longest time between two reads: often enough for a lease, and seldom enough for a thousand Portolans, whose reads of
/// nothing new are a hundred statements a second.
const POLL: Duration = Duration::from_secs(10);
/// How long a statement may take, and a new connection. One that has been cut without a word is known by this alone: the
/// system would wait for a quarter of an hour.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long after the beginning of a read that ended well its Portolan is current: until the end of the next one, which
/// begins 10 s after it and takes 3 s at most, and a bit. Also how late a change is honoured at worst.
const LEASE: Duration = Duration::from_secs(15);
/// How long after a failure the next connection is tried.
const PAUSE: Duration = Duration::from_secs(1);
/// How many rows one statement reads, and how many statements follow each other before it is less work to start anew.
const PAGE: i64 = 1_000;
const PAGES: usize = 10;
/// The least time between two notifications of one topic: those that are wanted meanwhile become one.
const GAP: Duration = Duration::from_millis(20);
/// How often a notification is tried on connections that are hard to get, and the pause between two tries: after that the
/// others hear of it by themselves almost as soon.
const TRIES: u32 = 4;
const TRY_PAUSE: Duration = Duration::from_millis(500);
/// How long the last notifications may take at a stop.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How many pages a reader of [`News`] may be behind.
const BEHIND: usize = 64;

/// What Portolans tell each other at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// There are new rows in `changes`.
    Changes,
    /// A run that others may wait for has an outcome.
    Runs,
}

impl Topic {
    const ALL: [Self; 2] = [Self::Changes, Self::Runs];

    fn channel(self) -> &'static str {
        match self {
            Self::Changes => "portolan_changes",
            Self::Runs => "portolan_runs",
        }
    }
}

/// What others have changed; what this process wrote itself is no news to it.
#[derive(Clone, Debug)]
pub enum News {
    Changed(Arc<[Changed]>),
    /// Something may have been missed: all may be different.
    Everything,
}

/// A change by another process, in the words of its row.
#[derive(Clone, Debug, FromRow)]
pub struct Changed {
    id: i64,
    /// The name of a [`crate::model::Action`], or of one that a newer Portolan knows.
    pub action: String,
    pub mcp_server_id: Option<String>,
}

/// How well this process is informed.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// How long ago the last read of changes began that ended well; since the start, before the first.
    pub age: Duration,
    /// Notifications can arrive.
    pub listens: bool,
    /// How many arrived.
    pub notifications: u64,
}

/// What is heard and what is to be said.
pub(super) struct Feed {
    began: Instant,
    heard: [watch::Sender<u64>; 2],
    news: broadcast::Sender<News>,
    /// Somebody reads what is new.
    follows: AtomicBool,
    listens: AtomicBool,
    notifications: AtomicU64,
    /// The ids of rows that this process wrote, or was about to, and that were not read yet.
    own: Mutex<HashSet<i64>>,
    said: [Mutex<Saying>; 2],
    /// The database has no NOTIFY.
    is_mute: AtomicBool,
    /// It has no LISTEN, or what is between has none.
    is_deaf: AtomicBool,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// The rows of `changes` that one transaction of this process writes. They are no news here, unless nobody here learns that
/// they were committed: without [`Notes::committed`] they are like those of others.
pub(super) struct Notes<'a> {
    store: &'a Store,
    ids: Vec<i64>,
}

impl Notes<'_> {
    /// It writes these. To be called before the commit: nobody can have read them then.
    pub(super) fn wrote(&mut self, ids: impl IntoIterator<Item = i64>) {
        let before = self.ids.len();
        self.ids.extend(ids);
        let feed = &self.store.feed;
        if feed.follows.load(Ordering::Relaxed) {
            feed.own().extend(&self.ids[before..]);
        }
    }

    /// They are there for good: the others are told, if there are any.
    pub(super) fn committed(mut self) {
        if !std::mem::take(&mut self.ids).is_empty() {
            self.store.announce(Topic::Changes);
        }
    }
}

impl Drop for Notes<'_> {
    fn drop(&mut self) {
        let feed = &self.store.feed;
        if self.ids.is_empty() || !feed.follows.load(Ordering::Relaxed) {
            return;
        }
        let mut own = feed.own();
        let not_read = self.ids.iter().filter(|id| own.remove(id)).count();
        drop(own);
        // Some were read as our own already: committed, and nobody was told what they were.
        if not_read < self.ids.len() {
            let _ = feed.news.send(News::Everything);
        }
    }
}

/// How far the notification of a topic is.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Saying {
    #[default]
    Nothing,
    Once,
    /// Somebody wants one more since it was begun.
    Again,
}

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("it was closed")]
    Closed,
    #[error("it did not answer in time")]
    TimedOut,
    #[error(transparent)]
    Failed(#[from] sqlx::Error),
}

impl Feed {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            heard: Default::default(),
            news: broadcast::Sender::new(BEHIND),
            follows: AtomicBool::new(false),
            listens: AtomicBool::new(false),
            notifications: AtomicU64::new(0),
            own: Mutex::default(),
            said: Default::default(),
            is_mute: AtomicBool::new(false),
            is_deaf: AtomicBool::new(false),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    fn own(&self) -> MutexGuard<'_, HashSet<i64>> {
        self.own.lock().expect("no code panics while it holds the ids")
    }

    fn said(&self, topic: Topic) -> MutexGuard<'_, Saying> {
        self.said[topic as usize].lock().expect("no code panics while it holds what is to be said")
    }

    fn tell(&self, topic: Topic) {
        self.heard[topic as usize].send_modify(|times| *times += 1);
    }

    fn tell_all(&self) {
        Topic::ALL.into_iter().for_each(|topic| self.tell(topic));
    }

    /// Ends its tasks, after the notifications that are under way.
    pub(super) async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        let _ = timeout(CLOSE_TIMEOUT, self.tasks.wait()).await;
    }
}

impl Store {
    /// Begins to follow what other processes change in the same database; ends with [`Store::close`]. To be called once, in
    /// the runtime that serves. On SQLite there are no others.
    pub fn follow(&self) {
        if let Database::Postgres(pool) = &self.database {
            self.feed.follows.store(true, Ordering::Relaxed);
            let (store, pool) = (self.clone(), pool.clone());
            let following = async move { store.keep_reading(&pool).await };
            self.feed.tasks.spawn(self.feed.stop.clone().run_until_cancelled_owned(following));
        }
    }

    /// Changes when any process on this database has announced this, and at the latest after 10 s, be there news or not.
    /// Only while this one follows; never on SQLite.
    pub fn heard(&self, topic: Topic) -> watch::Receiver<u64> {
        self.feed.heard[topic as usize].subscribe()
    }

    /// What others change from now on, after it was forgotten here. Who reads too late has missed everything.
    pub fn news(&self) -> broadcast::Receiver<News> {
        self.feed.news.subscribe()
    }

    /// The name of the present time without a gap in which every change by others is known within 15 s; `None` while that
    /// cannot be said. What was read from the database in it, and is concerned by no [`News`] since, is so still.
    pub fn epoch(&self) -> Option<u64> {
        self.known.epoch()
    }

    /// How well this process is informed of what others change; `None` on SQLite, where there are no others.
    pub fn standing(&self) -> Option<Standing> {
        let Database::Postgres(_) = &self.database else { return None };
        let began = self.feed.began;
        let last_read = self.known.end().and_then(|end| Instant::from_std(end).checked_sub(LEASE));
        Some(Standing {
            age: last_read.map_or(began, |read| read.max(began)).elapsed(),
            listens: self.feed.listens.load(Ordering::Relaxed),
            notifications: self.feed.notifications.load(Ordering::Relaxed),
        })
    }

    /// Lets all processes on this database hear that there is something new, this one too. To be called after the commit, in
    /// a runtime. Nobody waits for it, many at once become few, and one that fails is tried a few times.
    pub fn announce(&self, topic: Topic) {
        if matches!(self.database, Database::Sqlite { .. }) || self.feed.is_mute.load(Ordering::Relaxed) {
            return;
        }
        let mut said = self.feed.said(topic);
        if *said != Saying::Nothing {
            *said = Saying::Again;
            return;
        }
        *said = Saying::Once;
        let store = self.clone();
        self.feed.tasks.spawn(async move { store.say(topic).await });
    }

    /// For what one transaction is about to write.
    pub(super) fn notes(&self) -> Notes<'_> {
        Notes { store: self, ids: vec![] }
    }

    async fn say(&self, topic: Topic) {
        let mut failures = 0;
        loop {
            let said: Result<_, sqlx::Error> = on_db!(self, write pool => {
                sqlx::query("SELECT pg_notify($1, '')").bind(topic.channel()).execute(pool).await.map(|_| ())
            });
            match said {
                Err(error) if is_missing(&error) => {
                    if !self.feed.is_mute.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, "the database has no NOTIFY: others hear of changes within 15 s");
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "others were not notified of a change");
                    failures += 1;
                    if failures < TRIES {
                        sleep(TRY_PAUSE).await;
                        continue;
                    }
                }
                Ok(()) => {}
            }
            failures = 0;
            sleep(GAP).await;
            let mut said = self.feed.said(topic);
            *said = if *said == Saying::Again { Saying::Once } else { Saying::Nothing };
            if *said == Saying::Nothing {
                return;
            }
        }
    }

    /// Reads what is new for ever, on one connection after the other.
    async fn keep_reading(&self, pool: &PgPool) {
        let mut is_away = false;
        loop {
            match self.connect(pool).await {
                Ok(mut line) => {
                    if is_away {
                        tracing::info!("changes that other Portolans make are followed again");
                    }
                    is_away = false;
                    let Err(lost) = self.read_on(&mut line).await;
                    self.feed.listens.store(false, Ordering::Relaxed);
                    // One that does not answer any more takes its time to end, in a task of sqlx's; the next does not wait.
                    drop(line);
                    tracing::warn!(error = %lost, "the connection that follows changes is lost");
                }
                Err(error) if !is_away => {
                    is_away = true;
                    tracing::warn!(%error, "changes that other Portolans make cannot be followed");
                }
                Err(_) => {}
            }
            self.feed.tell_all();
            sleep(PAUSE).await;
        }
    }

    /// A connection that listens, apart from those for everything else: however busy these are, changes are read.
    async fn connect(&self, pool: &PgPool) -> Result<PgListener, Lost> {
        let options = (*pool.connect_options()).clone().application_name("portolan feed");
        // This is how sqlx makes a listener. The second connection is for a look at the first.
        let own = PgPoolOptions::new()
            .max_connections(2)
            .acquire_timeout(ANSWER_TIMEOUT)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_before_acquire(false)
            .connect_lazy_with(options);
        let mut line = in_time(PgListener::connect_with(&own)).await?;
        // Who has lost it has to look at what was missed.
        line.eager_reconnect(false);
        if self.feed.is_deaf.load(Ordering::Relaxed) {
            return Ok(line);
        }
        let deaf = if is_shared(&own, &mut line).await? {
            Some("what is between gives each statement another connection".to_owned())
        } else {
            match in_time(line.listen_all(Topic::ALL.map(Topic::channel))).await {
                Err(Lost::Failed(error)) if is_missing(&error) => Some(error.to_string()),
                listening => listening.map(|()| None)?,
            }
        };
        self.feed.listens.store(deaf.is_none(), Ordering::Relaxed);
        if let Some(reason) = deaf {
            self.feed.is_deaf.store(true, Ordering::Relaxed);
            tracing::warn!(reason, "the database does not notify: changes by other Portolans are honoured within 15 s");
        }
        Ok(line)
    }

    /// Reads what is new on this connection until that is lost.
    async fn read_on(&self, line: &mut PgListener) -> Result<Infallible, Lost> {
        let mut began = Instant::now();
        let mut last = self.begin(line).await?;
        self.feed.tell_all();
        loop {
            match timeout_at(began + POLL, line.try_recv()).await {
                Ok(heard) => {
                    let first = heard?.ok_or(Lost::Closed)?;
                    let mut topics = HashSet::from([first.channel().to_owned()]);
                    let mut count = 1;
                    while let Some(next) = line.next_buffered() {
                        topics.insert(next.channel().to_owned());
                        count += 1;
                    }
                    self.feed.notifications.fetch_add(count, Ordering::Relaxed);
                    if topics.contains(Topic::Runs.channel()) {
                        self.feed.tell(Topic::Runs);
                    }
                    // Others may be told so often that it is never quiet.
                    if !topics.contains(Topic::Changes.channel()) && began.elapsed() < POLL {
                        continue;
                    }
                }
                Err(_) => self.feed.tell(Topic::Runs),
            }
            began = Instant::now();
            last = self.read(line, last).await?;
            self.feed.tell(Topic::Changes);
        }
    }

    /// Forgets everything, and returns the id of the last change there is: what is read later is of after it.
    async fn begin(&self, line: &mut PgListener) -> Result<i64, Lost> {
        const LAST: &str = "SELECT coalesce(max(id), 0) FROM changes";
        let began = Instant::now();
        let last = in_time(sqlx::query_scalar(LAST).fetch_one(line)).await?;
        self.known.begin((began + LEASE).into_std());
        self.feed.own().retain(|id| *id > last);
        // Nobody may be there to hear it, here and below.
        let _ = self.feed.news.send(News::Everything);
        Ok(last)
    }

    /// Reads what is new after `last`, and returns the new last one.
    async fn read(&self, line: &mut PgListener, mut last: i64) -> Result<i64, Lost> {
        const NEW: &str = "SELECT id, action, mcp_server_id FROM changes WHERE id > $1 ORDER BY id LIMIT $2";
        for _ in 0..PAGES {
            let began = Instant::now();
            let rows: Vec<Changed> = in_time(sqlx::query_as(NEW).bind(last).bind(PAGE).fetch_all(&mut *line)).await?;
            let is_all = (rows.len() as i64) < PAGE;
            last = rows.last().map_or(last, |row| row.id);
            self.take(rows, last);
            if is_all {
                if self.known.go_on((began + LEASE).into_std()) {
                    return Ok(last);
                }
                break;
            }
        }
        self.begin(line).await
    }

    /// Forgets what these changes concern, and passes them on but for our own.
    fn take(&self, mut rows: Vec<Changed>, last: i64) {
        if rows.is_empty() {
            return;
        }
        self.known.forget(rows.iter().filter_map(|row| row.mcp_server_id.as_deref()));
        let mut own = self.feed.own();
        rows.retain(|row| !own.contains(&row.id));
        // Also those that were never committed.
        own.retain(|id| *id > last);
        drop(own);
        if !rows.is_empty() {
            let _ = self.feed.news.send(News::Changed(rows.into()));
        }
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Lost> {
    Ok(timeout(ANSWER_TIMEOUT, answer).await.map_err(|_| Lost::TimedOut)??)
}

/// Whether what is between here and the database gives connections away between two statements. A LISTEN would stay on one
/// that is somebody else's a moment later, who would be told what nobody asked for. A second connection holds one in a
/// transaction: it must be another than the first one has, before and after.
async fn is_shared(own: &PgPool, line: &mut PgListener) -> Result<bool, Lost> {
    const WHICH: &str = "SELECT pg_backend_pid()";
    let mine: Result<i32, _> = in_time(sqlx::query_scalar(WHICH).fetch_one(&mut *line)).await;
    let before = match mine {
        // One that tells connections apart in no way: whether it knows LISTEN is seen next.
        Err(Lost::Failed(error)) if is_missing(&error) => return Ok(false),
        mine => mine?,
    };
    let mut holder = in_time(own.acquire()).await?;
    let mut transaction = in_time(holder.begin()).await?;
    let held: i32 = in_time(sqlx::query_scalar(WHICH).fetch_one(&mut *transaction)).await?;
    let after: i32 = in_time(sqlx::query_scalar(WHICH).fetch_one(&mut *line)).await?;
    in_time(transaction.rollback()).await?;
    in_time(holder.close()).await?;
    Ok(before != after || before == held)
}

/// Whether the database has no such thing, or not for us: feature_not_supported, and of class 42 syntax_error,
/// undefined_function and insufficient_privilege.
fn is_missing(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|refusal| refusal.code());
    code.is_some_and(|code| ["0A000", "42601", "42883", "42501"].contains(&&*code))
}
