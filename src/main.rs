//! The command line: parse it, run one command, set the exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use portolan::app::{App, Keeper, keep_children};
use portolan::config::{Cli, Command, Settings};
use portolan::telemetry;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let Cli { command, settings } = Cli::parse();
    let result = match command.unwrap_or(Command::Serve) {
        Command::Serve => run(serve(settings)),
        Command::KeepChildren => {
            keep_children();
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Nothing can be done about a closed standard error.
            let _ = writeln!(std::io::stderr(), "portolan: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| format!("Cannot start threads: {error}."))?;
    runtime.block_on(command)
}

async fn serve(settings: Settings) -> Result<(), String> {
    telemetry::init(&settings.logs.log)?;
    let listen = settings.entry.listen.clone();
    let unusable = |error| format!("Cannot listen on {listen}: {error}.");
    let listener = TcpListener::bind(&listen).await.map_err(unusable)?;
    let address = listener.local_addr().map_err(unusable)?;
    let app = App::open_kept(settings, Some(Keeper::default())).await.map_err(|error| error.to_string())?;
    let lines = format!(
        "Portolan {} listens on http://{address}\nDatabase: {}\nAPI reference: http://{address}/docs\n",
        env!("CARGO_PKG_VERSION"),
        app.store.describe(),
    );
    let mut signals = Signals::listen()?;
    // Whoever started this may have closed the pipe; that is no reason not to serve.
    let _ = std::io::stdout().write_all(lines.as_bytes());
    let shutdown = CancellationToken::new();
    let serving = app.serve(listener, shutdown.clone());
    let stopping = async {
        signals.next().await;
        shutdown.cancel();
        signals.next().await;
    };
    tokio::select! {
        clean = serving => if clean { Ok(()) } else { Err("A session did not end in time and was left.".to_owned()) },
        () = stopping => Err("Stopped at once by a second signal.".to_owned()),
    }
}

/// SIGTERM and SIGINT: the first stops Portolan gracefully, the second at once.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn listen() -> Result<Self, String> {
        let listen = |kind| signal(kind).map_err(|error| format!("Cannot wait for signals: {error}."));
        Ok(Self { term: listen(SignalKind::terminate())?, int: listen(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
