//! Logs: one line per event on standard error, with dotted fields (`server.id`, `tool.name`).

use tracing_subscriber::EnvFilter;

/// rmcp logs message contents at info and below, and URLs at error; its own words stay out of the log.
const ALWAYS: [&str; 2] = ["rmcp=off", "sqlx=warn"];

/// Sends the log to standard error from now on. `filter` is the setting `--log`.
///
/// # Errors
/// One sentence when the filter cannot be read.
pub fn init(filter: &str) -> Result<(), String> {
    let mut layers = EnvFilter::try_new(filter).map_err(|_| {
        format!("The log filter {filter:?} cannot be read; write a level such as info, or levels per module.")
    })?;
    for directive in ALWAYS {
        layers = layers.add_directive(directive.parse().expect("a constant directive is well-formed"));
    }
    tracing_subscriber::fmt()
        .with_env_filter(layers)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    Ok(())
}
