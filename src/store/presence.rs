//! Whether PostgreSQL is there, and how long anybody waits to find out.
//!
//! A statement that gets no answer says nothing of why: the server may be slow, or gone without a word, as when packets are
//! dropped. So an operation that takes long has somebody look whether a new connection is answered. While none is, all
//! operations end at once instead of waiting one after the other, and somebody looks again and again until one is.
//!
//! sqlx gives no access to the sockets of its connections, so TCP cannot be told to probe them. What it would find is found
//! here: a connection that was idle is looked at before it is used, one in use is given up with its operation, and none
//! comes back to the pool that does not answer in time ([`Lease`]).

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{Connection, Executor, PgConnection, Postgres};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long an operation may wait for a connection: one that is free, or a new one.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// After somebody did not get one in that time, for how long others wait less, and how long: a request waits several times.
const CROWDED: Duration = Duration::from_secs(2);
const CROWDED_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a connection may have been idle to be used without a look at it, and how long that look may take.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a connection may take to be ready for others after an operation. Longer takes one whose operation was given up.
const RETURN_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an operation may take before somebody looks whether the database is there; how long that may take; and when it is
/// looked again if it is not. Less than the time of an operation, all together.
const SUSPICION: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
const PROBE_PAUSE: Duration = Duration::from_millis(250);
/// Of each connection, for what a client cannot end: a statement that goes on when nobody waits for it any more, a wait for a
/// lock, which ends before its operation does, and a transaction whose process has stopped, which would hold up all others
/// for ever. Set by a statement, because poolers such as PgBouncer refuse them when a connection is opened.
const WAITS: &str = "SET statement_timeout = '60s'; SET lock_timeout = '3s'; \
                     SET idle_in_transaction_session_timeout = '15s'";

/// How long an operation may take. Either ends sooner when the database turns out to be away.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// A request waits for it, which is answered within 5 s.
    Short,
    /// It reads or writes very much.
    Long,
}

impl Patience {
    fn limit(self) -> Duration {
        match self {
            Self::Short => Duration::from_secs(4),
            Self::Long => Duration::from_secs(60),
        }
    }
}

/// What is known of one database. Clones share everything.
#[derive(Clone)]
pub(super) struct Presence(Arc<Shared>);

struct Shared {
    options: PgConnectOptions,
    /// Nobody was answered the last time somebody looked.
    away: tokio::sync::watch::Sender<bool>,
    is_looking: AtomicBool,
    /// Until when connections are hard to get.
    crowded_until: Mutex<Option<Instant>>,
    /// How many operations the database has answered.
    answers: AtomicU64,
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Presence {
    /// Of the database that was just there.
    pub(super) fn new(options: PgConnectOptions) -> Self {
        Self(Arc::new(Shared {
            options,
            away: tokio::sync::watch::Sender::new(false),
            is_looking: AtomicBool::new(false),
            crowded_until: Mutex::new(None),
            answers: AtomicU64::new(0),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }))
    }

    /// Waits for an operation, as long as the database is there and `patience` lasts.
    pub(super) async fn during<T: Send, E: From<sqlx::Error> + Send>(
        &self,
        patience: Patience,
        mut operation: BoxFuture<'_, Result<T, E>>,
    ) -> Result<T, E> {
        if *self.0.away.borrow() {
            return Err(unanswered().into());
        }
        let began = Instant::now();
        let done = match timeout(SUSPICION, &mut operation).await {
            Ok(done) => done,
            Err(_) => {
                self.look();
                let mut away = self.0.away.subscribe();
                tokio::select! {
                    biased;
                    done = timeout_at(began + patience.limit(), &mut operation) => {
                        done.unwrap_or_else(|_| Err(unanswered().into()))
                    }
                    _ = away.wait_for(|away| *away) => Err(unanswered().into()),
                }
            }
        };
        if done.is_ok() {
            self.0.answers.fetch_add(1, Ordering::Relaxed);
        }
        done
    }

    /// A connection for one operation.
    pub(super) async fn lease(&self, pool: &PgPool) -> sqlx::Result<Lease> {
        let is_crowded = self.crowded_until().is_some_and(|until| Instant::now() < until);
        let time = if is_crowded { CROWDED_TIMEOUT } else { ACQUIRE_TIMEOUT };
        let acquired = timeout(time, pool.acquire()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut));
        if !is_crowded && matches!(acquired, Err(sqlx::Error::PoolTimedOut)) {
            *self.crowded_until() = Some(Instant::now() + CROWDED);
        }
        Ok(Lease { connection: acquired?, tasks: self.0.tasks.clone() })
    }

    fn crowded_until(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.crowded_until.lock().expect("no code panics while it holds the time")
    }

    /// Nobody looks any more.
    pub(super) async fn close(&self) {
        self.0.closing.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// Has somebody look whether the database is there, unless somebody does.
    fn look(&self) {
        if self.0.closing.is_cancelled() || self.0.is_looking.swap(true, Ordering::AcqRel) {
            return;
        }
        let (presence, closing) = (self.clone(), self.0.closing.clone());
        self.0.tasks.spawn(async move { closing.run_until_cancelled(presence.look_until_there()).await });
    }

    async fn look_until_there(self) {
        let shared = &*self.0;
        let answers = shared.answers.load(Ordering::Relaxed);
        let mut away_since = None;
        while let Err(reason) = probe(&shared.options).await {
            match away_since {
                // It answers others, and takes no new connection: those who need one wait for theirs.
                None if shared.answers.load(Ordering::Relaxed) != answers => break,
                None => {
                    away_since = Some(Instant::now());
                    shared.away.send_replace(true);
                    tracing::error!(
                        reason,
                        "the database is away; what needs it is answered with 503 until it is back"
                    );
                }
                Some(_) => {}
            }
            sleep(PROBE_PAUSE).await;
        }
        shared.away.send_replace(false);
        if let Some(since) = away_since {
            tracing::info!(seconds = since.elapsed().as_secs(), "the database is back");
        }
        shared.is_looking.store(false, Ordering::Release);
    }
}

/// Whether a new connection is answered. A refusal is an answer, too: connections that are open may be as good as ever.
async fn probe(options: &PgConnectOptions) -> Result<(), String> {
    // What a server says that is starting or stopping: that it cannot be connected to now.
    const NOT_NOW: [&str; 3] = ["57P01", "57P02", "57P03"];
    let asked = async {
        let mut connection = PgConnection::connect_with(options).await?;
        // A pooler takes connections while the database behind it is away.
        connection.execute("SELECT 1").await?;
        connection.close().await
    };
    match timeout(PROBE_TIMEOUT, asked).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(sqlx::Error::Database(refusal)))
            if !refusal.code().is_some_and(|code| NOT_NOW.contains(&code.as_ref()) || code.starts_with("08")) =>
        {
            Ok(())
        }
        Ok(Err(error)) => Err(super::one_line(&error)),
        Err(_) => Err(format!("it does not answer within {} s", PROBE_TIMEOUT.as_secs())),
    }
}

/// The database has not said anything, and may have done what it was asked for.
fn unanswered() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "the database does not answer"))
}

/// As many connections to the database of these options at most, opened when they are needed.
pub(super) fn pool(options: PgConnectOptions, connections: usize) -> PgPool {
    PgPoolOptions::new()
        .max_connections(u32::try_from(connections).unwrap_or(u32::MAX))
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .after_connect(|connection, _| Box::pin(async move { connection.execute(WAITS).await.map(|_| ()) }))
        // A look at a connection costs a round trip: only for one that was idle long enough to have been cut.
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for > TRUSTED_IDLE {
                    timeout(LOOK_TIMEOUT, connection.ping()).await.map_err(|_| unanswered())??;
                }
                Ok(true)
            })
        })
        .connect_lazy_with(options)
}

/// A connection that goes back to its pool when it is dropped, unless it does not answer by then: the pool itself would
/// wait for that without an end, and have one connection less meanwhile.
pub(super) struct Lease {
    connection: PoolConnection<Postgres>,
    tasks: TaskTracker,
}

impl Deref for Lease {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Given up, it closes the connection.
        self.tasks.spawn(timeout(RETURN_TIMEOUT, self.connection.return_to_pool()));
    }
}
