//! How Portolans on one PostgreSQL hear of each other: LISTEN on a connection for that alone, NOTIFY after a commit.
//!
//! A notification is a hint and nothing more: it may be lost, it may come twice, and a database or a proxy may have none at
//! all. Whoever waits for one looks at the tables each [`POLL`], too. It is sent after the commit and not in its
//! transaction: those that notify commit one after the other in the whole database, and where there is no NOTIFY they
//! would fail.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use sqlx::postgres::{PgListener, PgPool, PgPoolOptions};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Database, Store};

/// How often those who wait for notifications look without one.
pub(super) const POLL: Duration = Duration::from_secs(10);
/// How long a statement may take, and a new connection. One that has been cut without a word is known by this alone: the
/// system would wait for a quarter of an hour.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long after a failure the next connection is tried.
const PAUSE: Duration = Duration::from_secs(1);
/// The least time between two notifications of one topic: those that are wanted meanwhile become one.
const GAP: Duration = Duration::from_millis(20);
/// How long the last notifications may take at a stop.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(4);

/// What there is to hear.
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

/// What is heard and what is to be said.
pub(super) struct Feed {
    heard: [watch::Sender<u64>; 2],
    said: [Mutex<Saying>; 2],
    /// The database has no NOTIFY.
    is_mute: AtomicBool,
    tasks: TaskTracker,
    stop: CancellationToken,
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

impl Feed {
    pub(super) fn new() -> Self {
        let (heard, said, is_mute) = Default::default();
        Self { heard, said, is_mute, tasks: TaskTracker::new(), stop: CancellationToken::new() }
    }

    fn said(&self, topic: Topic) -> MutexGuard<'_, Saying> {
        self.said[topic as usize].lock().expect("no code panics while it holds it")
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
    /// Begins to listen to other Portolans on the same database; ends with [`Store::close`]. To be called once, in the
    /// runtime that serves. On SQLite there are no others.
    pub fn follow(&self) {
        if let Database::Postgres(pool) = &self.database {
            let (store, pool) = (self.clone(), pool.clone());
            let following = async move { store.listen(&pool).await };
            self.feed.tasks.spawn(self.feed.stop.clone().run_until_cancelled_owned(following));
        }
    }

    /// Changes when any Portolan on this database has announced this, and at the latest after 10 s, be there news or not.
    /// Only while this one follows; never on SQLite.
    pub fn heard(&self, topic: Topic) -> watch::Receiver<u64> {
        self.feed.heard[topic as usize].subscribe()
    }

    /// Lets all Portolans on this database hear that there is something new, this one too. To be called after the commit, in
    /// a runtime. Nobody waits for it, many at once become few, and one that fails is not repeated.
    pub fn announce(&self, topic: Topic) {
        let Database::Postgres(pool) = &self.database else { return };
        if self.feed.is_mute.load(Ordering::Relaxed) {
            return;
        }
        let mut said = self.feed.said(topic);
        if *said != Saying::Nothing {
            *said = Saying::Again;
            return;
        }
        *said = Saying::Once;
        let (store, pool) = (self.clone(), pool.clone());
        self.feed.tasks.spawn(async move { store.say(&pool, topic).await });
    }

    async fn say(&self, pool: &PgPool, topic: Topic) {
        loop {
            let notify = sqlx::query("SELECT pg_notify($1, '')").bind(topic.channel()).execute(pool);
            match timeout(ANSWER_TIMEOUT, notify).await {
                Ok(Err(error)) if is_missing(&error) => {
                    if !self.feed.is_mute.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, "the database has no NOTIFY: other Portolans hear of changes within 15 s");
                    }
                }
                Ok(Err(error)) => tracing::debug!(%error, "others were not notified"),
                Err(_) => tracing::debug!("others were not notified in time"),
                Ok(Ok(_)) => {}
            }
            sleep(GAP).await;
            let mut said = self.feed.said(topic);
            match *said {
                Saying::Again => *said = Saying::Once,
                Saying::Once | Saying::Nothing => {
                    *said = Saying::Nothing;
                    return;
                }
            }
        }
    }

    /// Listens for ever, on one connection after the other.
    async fn listen(&self, pool: &PgPool) {
        loop {
            match connect(pool).await {
                Ok(mut line) => {
                    self.feed.tell_all();
                    let error = self.hear(&mut line).await;
                    tracing::info!(error, "the connection for notifications is lost");
                }
                Err(error) => tracing::warn!(error, "no connection for notifications"),
            }
            self.feed.tell_all();
            sleep(PAUSE).await;
        }
    }

    /// Passes on what is heard on a connection until that is lost; why it was.
    async fn hear(&self, line: &mut PgListener) -> String {
        let mut look = Instant::now() + POLL;
        loop {
            match timeout_at(look, line.try_recv()).await {
                Ok(Ok(Some(news))) => {
                    if let Some(topic) = Topic::ALL.into_iter().find(|topic| topic.channel() == news.channel()) {
                        self.feed.tell(topic);
                    }
                }
                Ok(Ok(None)) => return "it was closed".to_owned(),
                Ok(Err(error)) => return error.to_string(),
                Err(_) => {
                    look = Instant::now() + POLL;
                    self.feed.tell_all();
                    match timeout(ANSWER_TIMEOUT, sqlx::query("SELECT 1").execute(&mut *line)).await {
                        Ok(Ok(_)) => {}
                        Ok(Err(error)) => return error.to_string(),
                        Err(_) => return "it did not answer in time".to_owned(),
                    }
                }
            }
        }
    }
}

/// A connection that listens, apart from those for everything else.
async fn connect(pool: &PgPool) -> Result<PgListener, String> {
    let options = (*pool.connect_options()).clone().application_name("portolan listens");
    // One alone: this is how sqlx makes a listener.
    let own = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(ANSWER_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .connect_lazy_with(options);
    let connecting = async {
        let mut line = PgListener::connect_with(&own).await?;
        // Who has lost it has to look at what was missed.
        line.eager_reconnect(false);
        line.listen_all(Topic::ALL.map(Topic::channel)).await?;
        Ok::<_, sqlx::Error>(line)
    };
    match timeout(2 * ANSWER_TIMEOUT, connecting).await {
        Ok(connected) => connected.map_err(|error| error.to_string()),
        Err(_) => Err("it did not answer in time".to_owned()),
    }
}

/// Whether the database does not know such a thing: feature_not_supported, or of class 42, syntax_error, undefined_function
/// or insufficient_privilege.
fn is_missing(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|refusal| refusal.code());
    code.is_some_and(|code| ["0A000", "42601", "42883", "42501"].contains(&&*code))
}
