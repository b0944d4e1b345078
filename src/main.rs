//! The command line: parse it, run one command, set the exit code.

use std::convert::Infallible;
use std::future::pending;
use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;

use portolan::api::Import;
use portolan::app::{App, BECOME, FirstSyncs, KEEP, Unclean, become_child, ensure_guarded, keep_child, key_notice};
use portolan::command::{self, Failure};
use portolan::config::{Cli, Command, Settings, Token};
use portolan::progress::Progress;
use portolan::telemetry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How many files Portolan may have open beside its client connections: the database, sessions, three pipes a child.
const OTHER_FILES: u64 = 1024;

fn main() -> ExitCode {
    // Each child has two such processes, or had: they take the time and memory that they need and no more.
    match std::env::args_os().nth(1) {
        Some(hidden) if hidden == KEEP => {
            keep_child();
            return ExitCode::SUCCESS;
        }
        Some(hidden) if hidden == BECOME => {
            become_child();
            return ExitCode::FAILURE;
        }
        _ => {}
    }
    close_to_others();
    let cli = Cli::read().unwrap_or_else(|error| {
        // Help and the version are what was asked for.
        if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
            let text = error.render().to_string();
            let sentence = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
            command::say(Failure::from(sentence.to_owned()).document());
        }
        error.exit()
    });
    let as_json = cli.json;
    match perform(cli.command.unwrap_or(Command::Serve), cli.settings, as_json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if as_json && !failure.is_late {
                command::say(failure.document());
            }
            // Nothing can be done about a closed standard error.
            let _ = writeln!(std::io::stderr(), "portolan: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn perform(command: Command, mut settings: Settings, as_json: bool) -> Result<(), Failure> {
    if command.uses_database() {
        settings.storage.read_url().map_err(|error| error.to_string())?;
    }
    match command {
        Command::Serve => run(serve(settings, as_json)),
        Command::Healthcheck(wanted) => run(command::healthcheck::run(&settings.entry.listen, &wanted, as_json)),
        Command::Token(Token::New { name, scope, file }) => {
            command::token::make(&name, scope, file.as_deref(), as_json)
        }
        Command::Key(key) => run(command::key::run(&settings, key, as_json)),
        Command::MigrateLetta(wanted) => run(async {
            telemetry::init(&settings.logs.log)?;
            command::migrate_letta::run(&settings, &wanted, as_json).await
        }),
        Command::RotateKeys { dry_run } => run(async {
            telemetry::init(&settings.logs.log)?;
            command::rotate_keys::run(&settings, dry_run, as_json).await
        }),
        Command::Import { file, format, replace, dry_run } => run(async {
            telemetry::init(&settings.logs.log)?;
            command::import::run(&settings, &file, Import { format, replace, dry_run }, as_json).await
        }),
        Command::Export { format, secrets, output } => run(async {
            telemetry::init(&settings.logs.log)?;
            command::export::run(&settings, format, secrets, output.as_deref(), as_json).await
        }),
    }
}

fn run(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| format!("Cannot start threads: {error}."))?;
    let result = runtime.block_on(command);
    // What is left are threads that look names up, and that may take their time.
    runtime.shutdown_background();
    result
}

async fn serve(mut settings: Settings, as_json: bool) -> Result<(), Failure> {
    telemetry::init(&settings.logs.log)?;
    take_orphans();
    // From now on: signals that nobody listens for do not end the first process of a container.
    let mut signals = Signals::listen()?;
    fit_open_files(&mut settings.entry.max_connections);
    let listen = settings.entry.listen.clone();
    let unusable = |error| format!("Cannot listen on {listen}: {error}.");
    let listener = TcpListener::bind(&listen).await.map_err(unusable)?;
    let address = listener.local_addr().map_err(unusable)?;
    ensure_guarded(&settings, address).map_err(|error| error.to_string())?;
    let metrics = listen_for_metrics(settings.metrics.metrics_listen.as_deref()).await?;
    let app = tokio::select! {
        app = App::open(settings) => app.map_err(|error| error.to_string())?,
        () = signals.next() => {
            tracing::info!("stopped before it served");
            return Ok(());
        }
    };
    let (version, database) = (env!("CARGO_PKG_VERSION"), app.store.describe());
    let (url, notice) = (format!("http://{address}"), key_notice(&app.store));
    let metrics_url = metrics.as_ref().map(|(_, address)| format!("http://{address}/metrics"));
    let mut lines = match as_json {
        true => {
            let metrics = metrics_url.as_deref();
            json!({ "version": version, "url": url, "metrics_url": metrics, "database": database, "notice": notice })
                .to_string()
        }
        false => format!(
            "Portolan {version} listens on {url}\nDatabase: {database}\nConsole: {url}/ · API reference: {url}/docs"
        ),
    };
    lines.push('\n');
    if let Some(notice) = notice.filter(|_| !as_json) {
        lines += &format!("{notice}\n");
    }
    if let Some(url) = metrics_url.filter(|_| !as_json) {
        lines += &format!("Metrics: {url}\n");
    }
    if app.tokens.current().is_none() {
        tracing::info!("no token is set: every program on this machine may come in");
    }
    let syncing = show_first_syncs(app.mcp.watch_first_syncs());
    let reloading = reload(app.clone(), listen_for(SignalKind::hangup())?);
    let reaping = reap_orphans(app.clone(), listen_for(SignalKind::child())?);
    // Whoever started this may have closed the pipe; that is no reason not to serve.
    let _ = std::io::stdout().write_all(lines.as_bytes());
    let shutdown = CancellationToken::new();
    let serving = serve_both(app, listener, metrics.map(|(listener, _)| listener), shutdown.clone());
    let stopping = async {
        signals.next().await;
        shutdown.cancel();
        signals.next().await;
    };
    tokio::select! {
        ended = serving => ended.map_err(|unclean| Failure::late(&unclean.to_string())),
        never = reloading => match never {},
        never = syncing => match never {},
        never = reaping => match never {},
        () = stopping => Err(Failure::late("Stopped at once by a second signal.")),
    }
}

async fn listen_for_metrics(address: Option<&str>) -> Result<Option<(TcpListener, SocketAddr)>, String> {
    let Some(wanted) = address else { return Ok(None) };
    let unusable = |error| format!("Cannot listen on {wanted} for --metrics-listen: {error}.");
    let listener = TcpListener::bind(wanted).await.map_err(unusable)?;
    let address = listener.local_addr().map_err(unusable)?;
    Ok(Some((listener, address)))
}

/// The metrics can be read until all else has ended.
async fn serve_both(
    app: App,
    listener: TcpListener,
    metrics: Option<TcpListener>,
    shutdown: CancellationToken,
) -> Result<(), Unclean> {
    let Some(metrics) = metrics else { return app.serve(listener, shutdown).await };
    let ended = CancellationToken::new();
    let telling = app.clone().serve_metrics(metrics, ended.clone());
    let serving = async {
        let unclean = app.serve(listener, shutdown).await;
        ended.cancel();
        unclean
    };
    tokio::join!(serving, telling).0
}

/// Shows how far the first syncs are of servers that came together.
async fn show_first_syncs(mut first: watch::Receiver<FirstSyncs>) -> Infallible {
    let mut progress = Progress::of_server();
    first.mark_changed();
    while first.changed().await.is_ok() {
        let now @ FirstSyncs { all, done, failed } = *first.borrow_and_update();
        let line = format!("first sync: {done} of {all} servers, {failed} failed");
        if !now.are_over() {
            progress.tell(done, all, line);
        } else if all > 0 {
            progress.clear();
            tracing::info!("{line}");
        }
    }
    // Nobody connects to anything any more.
    pending().await
}

/// Keeps processes of the same user out of this one's memory and environment, where the keys are.
fn close_to_others() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "commands of the same user may read this process");
    }
}

/// Takes in what the keeper of a child leaves behind, should it be killed.
fn take_orphans() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        tracing::warn!(%error, "what commands leave behind may be lost");
    }
}

/// As the first process of a container, takes note of the end of what others left to it: a process that somebody started
/// in the container, and that outlived its parent, would stay there as a zombie.
async fn reap_orphans(app: App, mut somebody_left: Signal) -> Infallible {
    while rustix::process::getpid().is_init() && somebody_left.recv().await.is_some() {
        let reaping = app.mcp.clone();
        if let Err(broken) = tokio::task::spawn_blocking(move || reaping.reap_orphans()).await {
            tracing::error!(%broken, "processes that ended were not taken note of");
        }
    }
    pending().await
}

/// Raises the number of files that this process may open to what `connections` need, or if that is not allowed, lowers
/// `connections` to what it suffices for.
fn fit_open_files(connections: &mut usize) {
    let limits = getrlimit(Resource::Nofile);
    let wanted = *connections as u64 + OTHER_FILES;
    let mut limit = limits.current.unwrap_or(u64::MAX);
    if limit < wanted {
        let raised = wanted.min(limits.maximum.unwrap_or(u64::MAX));
        if setrlimit(Resource::Nofile, Rlimit { current: Some(raised), ..limits }).is_ok() {
            limit = raised;
        }
    }
    let room = (limit - OTHER_FILES.min(limit / 2)).max(1);
    if room < *connections as u64 {
        tracing::warn!(
            wanted = *connections,
            taken = room,
            "the limit of open files (ulimit -Hn) is {limit}, so fewer client connections are taken than --max-connections"
        );
        *connections = room as usize;
    }
}

/// Reads the tokens, the variables and the keys again at each SIGHUP.
async fn reload(app: App, mut hangup: Signal) -> Infallible {
    while hangup.recv().await.is_some() {
        let reloading = app.tokens.clone();
        match tokio::task::spawn_blocking(move || reloading.reload()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!("the tokens stay as they were: {error}"),
            Err(broken) => tracing::error!(%broken, "the tokens stay as they were"),
        }
        let reloading = app.mcp.clone();
        match tokio::task::spawn_blocking(move || reloading.reload_variables()).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(variables))) => tracing::info!(variables, "variables read again"),
            Ok(Err(error)) => tracing::error!("the variables stay as they were: {error}"),
            Err(broken) => tracing::error!(%broken, "the variables stay as they were"),
        }
        match app.store.reload_keys().await {
            Ok(keys) => tracing::info!(keys, "keys read again"),
            Err(error) => tracing::error!("the keys stay as they were: {error}"),
        }
    }
    // There are no signals any more; serving goes on.
    pending().await
}

fn listen_for(kind: SignalKind) -> Result<Signal, String> {
    signal(kind).map_err(|error| format!("Cannot wait for signals: {error}."))
}

/// SIGTERM and SIGINT: the first stops Portolan gracefully, the second at once.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn listen() -> Result<Self, String> {
        Ok(Self { term: listen_for(SignalKind::terminate())?, int: listen_for(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
