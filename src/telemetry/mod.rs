//! Logs: one line per event on standard error, with dotted fields (`server.id`, `tool.name`). In `metrics`, what is counted.

pub mod metrics;

mod context;
mod export;
mod otlp;
mod traces;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::progress;

pub use context::{TRACEPARENT, TRACESTATE, TraceContext};
pub use export::CollectorError;
pub use traces::{Span, Traces};

/// Sends the log to standard error from now on. `filter` is the setting `--log`.
///
/// # Errors
/// One sentence when the filter cannot be read.
pub fn init(filter: &str) -> Result<(), String> {
    let wanted = EnvFilter::try_new(filter).map_err(|_| {
        format!("The log filter {filter:?} cannot be read; write a level such as info, or levels per module.")
    })?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(progress::log)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_filter(wanted.and(filter_fn(is_discreet)));
    tracing_subscriber::registry().with(lines).init();
    Ok(())
}

/// Portolan alone is logged, and when connections to the database are short, whatever filter somebody sets: others log
/// header fields, bodies, statements and parts of the database's URL, and secrets stay out of the log.
fn is_discreet(metadata: &Metadata<'_>) -> bool {
    let mut target = metadata.target().split("::");
    match (target.next(), target.next()) {
        (Some("portolan"), _) => true,
        (Some("sqlx"), Some("pool")) => *metadata.level() <= Level::WARN,
        _ => false,
    }
}
