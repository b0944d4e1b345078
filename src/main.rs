//! The command line: parse it, run one command, set the exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use portolan::app::App;
use portolan::config::{Cli, Command, Settings};
use portolan::telemetry;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { command, settings } = Cli::parse();
    let result = match command.unwrap_or(Command::Serve) {
        Command::Serve => serve(settings).await,
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

async fn serve(settings: Settings) -> Result<(), String> {
    telemetry::init(&settings.logs.log)?;
    let listen = settings.entry.listen.clone();
    let unusable = |error| format!("Cannot listen on {listen}: {error}.");
    let listener = TcpListener::bind(&listen).await.map_err(unusable)?;
    let address = listener.local_addr().map_err(unusable)?;
    let shutdown = stop_on_signals()?;
    let app = App::open(settings).await.map_err(|error| error.to_string())?;
    let lines = format!(
        "Portolan {} listens on http://{address}\nDatabase: {}\nAPI reference: http://{address}/docs\n",
        env!("CARGO_PKG_VERSION"),
        app.store.describe(),
    );
    // Whoever started this may have closed the pipe; that is no reason not to serve.
    let _ = std::io::stdout().write_all(lines.as_bytes());
    if app.serve(listener, shutdown).await {
        Ok(())
    } else {
        Err("A session did not end in time; it was cut.".to_owned())
    }
}

/// SIGTERM or SIGINT stop Portolan gracefully; a second one stops it at once.
fn stop_on_signals() -> Result<CancellationToken, String> {
    let listen = |kind| signal(kind).map_err(|error| format!("Cannot wait for signals: {error}."));
    let (mut term, mut int) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let asked = shutdown.clone();
    tokio::spawn(async move {
        for times in 1.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            if times > 1 {
                std::process::exit(130);
            }
            asked.cancel();
        }
    });
    Ok(shutdown)
}
