//! What handlers share, and the life of a process: open, serve, drain, close. Tests and `main` run the same.

use std::future::pending;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{Bodies, Elsewhere, EveryPage, Origins, Runs, TokenError, Tokens};
use crate::config::{Entry, Settings, Storage};
use crate::error::Error;
use crate::mcp::child::{Children, ChildrenError};
pub use crate::mcp::{BECOME, Commands, FirstSyncs, KEEP, become_child, keep_child};
use crate::mcp::{Egress, Mcp, TlsError, VariablesFile, VariablesFileError};
use crate::run_log::RunLog;
use crate::serve::Load;
use crate::store::{KeySource, OpenError, SealError, Store};
use crate::telemetry::metrics::{Metrics, Readings, Use};
use crate::telemetry::{CollectorError, Traces};
use crate::{api, serve, store};

/// How long the database may take to end its connections at a stop; a lock that somebody else holds can hold it up.
const STORE_CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Which part of the drain time runs have; in the rest those that are still under way are answered with an error.
const RUNS_SHARE: f64 = 0.9;

/// What the address of `--metrics-listen` takes: a scraper or two, and no more of Portolan's files than that.
const METRICS_CONNECTIONS: usize = 64;
const METRICS_REQUESTS: usize = 16;
const METRICS_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Clones share everything.
#[derive(Clone)]
pub struct App {
    pub settings: Arc<Settings>,
    /// Who may come in.
    pub tokens: Tokens,
    /// Servers and tools.
    pub store: Store,
    /// Sessions to the servers.
    pub mcp: Mcp,
    /// Runs under way, and those that may be asked for again.
    pub runs: Runs,
    /// What is written down of runs.
    pub run_log: RunLog,
    /// Bodies of requests that are being read.
    pub bodies: Bodies,
    /// Which web pages may come in.
    pub origins: Origins,
    /// Where the traces of runs go.
    pub traces: Traces,
    /// What is counted.
    pub metrics: Metrics,
    load: Arc<Load>,
    tracker: TaskTracker,
}

/// Why Portolan does not start; each message is one sentence for the person who starts it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "Whoever reaches {0} could start programs on this machine, so it needs a token: set PORTOLAN_TOKEN, or name a file \
         of tokens with --tokens-file (`portolan token new --help` says how to make one), or listen on this machine alone \
         with --listen 127.0.0.1:{port}.", port = .0.port()
    )]
    Unguarded(SocketAddr),
    #[error(transparent)]
    Tokens(#[from] TokenError),
    #[error("Cannot make the data folder {folder:?}: {cause}.")]
    DataDir { folder: PathBuf, cause: std::io::Error },
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error(transparent)]
    Origins(#[from] EveryPage),
    #[error(transparent)]
    Children(#[from] ChildrenError),
    #[error(transparent)]
    Variables(#[from] VariablesFileError),
    #[error(transparent)]
    Collector(#[from] CollectorError),
    #[error("Cannot use the system's certificates for TLS: {0}.")]
    Client(#[from] TlsError),
}

/// What a stop had to leave; each message is one sentence for the person who stopped Portolan.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unclean {
    #[error("A session did not end in time and was left.")]
    Session,
    #[error("Runs are missing in the run log: the database did not take them in time.")]
    RunLog,
    #[error("The database did not end its connections in time.")]
    Database,
}

/// Without a token Portolan listens on loopback alone; `address` is what it is bound to, whatever it was called.
///
/// # Errors
/// One sentence for the person who starts Portolan.
pub fn ensure_guarded(settings: &Settings, address: SocketAddr) -> Result<(), StartError> {
    if settings.tokens.are_given() || address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    Err(StartError::Unguarded(address))
}

impl App {
    /// Makes the data folder if it is missing and opens the database.
    ///
    /// # Errors
    /// One sentence for the person who starts Portolan.
    pub async fn open(settings: Settings) -> Result<Self, StartError> {
        if settings.entry.keep_alive_timeout < settings.runs.retry_window {
            // The request that met the end of its connection was never seen, and its repetition looks like that of another.
            tracing::warn!(
                "with --keep-alive-timeout below {:?}, an SDK whose connection is closed under a run may be given the outcome \
                 of an equal run just before",
                settings.runs.retry_window
            );
        }
        let origins = Origins::new(&settings.browsers, !settings.tokens.are_given())?;
        let tokens = Tokens::open(settings.tokens.clone())?;
        let folder = &settings.storage.data_dir;
        make_data_folder(&settings)?;
        let routes = api::routes();
        let metrics = Metrics::new(routes.iter().map(|route| (route.method.as_str(), route.path)));
        let store = open_store(&settings).await?.counted_in(metrics.operations.clone());
        store.follow();
        let tracker = TaskTracker::new();
        let egress = Egress::new(&settings.egress, settings.upstream.connect_timeout, store.address())?;
        let traces = Traces::open(&settings.traces, &egress).await?;
        let children =
            Children::new(settings.children.clone(), folder.join("children"), own_files(&settings), tracker.clone())?;
        let variables = VariablesFile::open(settings.variables.variables_file.clone())?;
        let upstream = settings.upstream.clone();
        let mcp = Mcp::new(store.clone(), upstream, egress, children, variables, metrics.clone(), tracker.clone());
        let elsewhere = Elsewhere::new(store.clone(), settings.runs.clone(), settings.upstream.run_timeout);
        let runs = Runs::new(settings.runs.clone(), elsewhere, tracker.clone());
        let run_log = RunLog::new(settings.run_log.clone(), store.clone());
        let bodies = Bodies::new(settings.entry.max_body_bytes_in_flight);
        let (settings, load) = (Arc::new(settings), Arc::default());
        Ok(Self { settings, tokens, store, mcp, runs, run_log, bodies, origins, traces, metrics, load, tracker })
    }

    /// Serves the API on `listener` until `shutdown`, then finishes the requests that are under way within the drain
    /// time, ends every session and child, writes what is left of the run log, and closes the database.
    ///
    /// # Errors
    /// What of that did not end in time, the first of several.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) -> Result<(), Unclean> {
        let drain = self.settings.entry.drain_timeout;
        if let Ok(address) = listener.local_addr() {
            self.mcp.egress.listens_on(address.port());
        }
        // Before the first run, for which others may ask.
        self.runs.open().await;
        let (router, load) = (api::router(self.clone()), self.load.clone());
        let serving = serve::serve(listener, router, &self.settings.entry, load, shutdown.clone());
        // A client whose connection is cut would ask for its run again, at a Portolan that knows nothing of it.
        let answering = async {
            shutdown.cancelled().await;
            sleep(drain.mul_f64(RUNS_SHARE)).await;
            self.runs.end();
            pending::<()>().await;
        };
        tokio::select! {
            () = serving => {}
            () = answering => {}
        }
        self.runs.end();
        let clean = self.mcp.close().await;
        // Nothing runs any more.
        let (logged, ..) = tokio::join!(self.run_log.close(), self.traces.close(), self.runs.close());
        let closed = timeout(STORE_CLOSE_TIMEOUT, self.store.close()).await;
        match (clean, logged, closed) {
            (false, ..) => Err(Unclean::Session),
            (_, false, _) => Err(Unclean::RunLog),
            (.., Err(_)) => Err(Unclean::Database),
            (true, true, Ok(())) => Ok(()),
        }
    }

    /// Serves the metrics alone on `listener`, which is that of `--metrics-listen`, without a token, until `shutdown`.
    pub async fn serve_metrics(self, listener: TcpListener, shutdown: CancellationToken) {
        if let Ok(address) = listener.local_addr() {
            self.mcp.egress.listens_on(address.port());
        }
        let entry = Entry {
            max_connections: METRICS_CONNECTIONS,
            max_requests: METRICS_REQUESTS,
            drain_timeout: METRICS_DRAIN_TIMEOUT,
            ..self.settings.entry.clone()
        };
        serve::serve(listener, api::metrics_router(self), &entry, Arc::default(), shutdown).await;
    }

    /// How things stand, for the metrics.
    pub fn readings(&self) -> Readings {
        let entry = &self.settings.entry;
        let mut readings = Readings {
            requests: Use { now: self.load.requests(), most: entry.max_requests },
            connections: Use { now: self.load.connections(), most: entry.max_connections },
            run_log_queued: self.run_log.depth(),
            run_log_dropped: self.run_log.dropped(),
            spans_dropped: self.traces.lost(),
            ..Readings::default()
        };
        if let Some(standing) = self.store.standing() {
            readings.changes_age = standing.age;
            readings.changes_listening = standing.listens;
            readings.changes_notifications = standing.notifications;
        }
        self.mcp.read(&mut readings);
        readings
    }

    /// Does `work` to its end even when the caller leaves: a change that is stored must also end its old session.
    pub async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        self.tracker.spawn(work).await.unwrap_or_else(|broken| Err(Error::Internal(broken.into())))
    }
}

/// Makes the folder for everything that is kept on disk, if it is missing.
///
/// # Errors
/// [`StartError::DataDir`].
pub fn make_data_folder(settings: &Settings) -> Result<(), StartError> {
    let folder = &settings.storage.data_dir;
    make_private(folder).map_err(|cause| StartError::DataDir { folder: folder.clone(), cause })
}

/// Opens the database of these settings with their keys; its folder is there.
///
/// # Errors
/// One sentence for the person who starts Portolan.
pub async fn open_store(settings: &Settings) -> Result<Store, OpenError> {
    let keys = KeySource::new(settings.secrets.key.clone(), settings.secrets.key_file.clone());
    let url = settings.storage.database_url.as_ref().map(|url| url.expose());
    let Storage { data_dir, database_connections, .. } = &settings.storage;
    Store::open(url, data_dir, *database_connections, keys.map_err(SealError::from)?).await
}

/// What there is to say when a key was made for this store: it is the only one.
pub fn key_notice(store: &Store) -> Option<String> {
    let file = store.made_key()?.display();
    Some(format!(
        "A key was made in {file}: keep a copy of it elsewhere, the stored secrets cannot be read without it."
    ))
}

/// The folder holds other people's keys: only its owner gets in. One that is there already keeps the mode it was given.
fn make_private(folder: &Path) -> std::io::Result<()> {
    if let Ok(metadata) = std::fs::metadata(folder) {
        #[cfg(unix)]
        if std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o077 != 0 {
            tracing::warn!("the data folder can be read by others; chmod 700 keeps them out");
        }
        return if metadata.is_dir() { Ok(()) } else { Err(std::io::ErrorKind::NotADirectory.into()) };
    }
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)
}

/// Portolan's own files: no command may ever reach them, whatever its configuration names.
fn own_files(settings: &Settings) -> Vec<PathBuf> {
    let mut own = vec![settings.storage.data_dir.clone()];
    own.extend(settings.secrets.key_file.clone());
    own.extend(settings.storage.database_url_file.clone());
    own.extend(settings.variables.variables_file.clone());
    own.extend(settings.traces.otlp_headers_file.clone());
    own.extend([&settings.tokens.tokens_file, &settings.tokens.token_file].into_iter().flatten().cloned());
    let url = settings.storage.database_url.as_ref().map(|url| url.expose());
    if let Some(file) = url.and_then(store::sqlite_file) {
        // SQLite keeps more files beside it, and beside what a link leads to.
        let places = [file.canonicalize().ok(), Some(file)];
        own.extend(places.into_iter().flatten().flat_map(|file| {
            ["", "-wal", "-shm", "-journal"].map(|more| PathBuf::from(format!("{}{more}", file.display())))
        }));
    }
    own
}
