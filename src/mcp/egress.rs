//! Every outbound byte: the one HTTP client behind streamable HTTP and HTTP+SSE.
//!
//! It follows no redirect, uses no proxy of the environment, and keeps connections open between calls.

use std::time::Duration;

/// How long an unused connection to a server is kept.
const IDLE_CONNECTION: Duration = Duration::from_secs(60);

/// The client that all sessions share (building one reads the system's certificates, about 45 ms).
///
/// # Errors
/// When the system's certificate store cannot be used.
pub fn client(connect_timeout: Duration) -> reqwest::Result<reqwest::Client> {
    // Only the first install in a process succeeds; a later one changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .user_agent(concat!("portolan/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .tcp_nodelay(true)
        .connect_timeout(connect_timeout)
        .pool_idle_timeout(IDLE_CONNECTION)
        .build()
}
