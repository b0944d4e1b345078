//! Every outbound byte: the one HTTP client behind streamable HTTP and HTTP+SSE.
//!
//! It follows redirects on one origin alone, uses no proxy of the environment, and keeps connections open between calls.

use std::time::Duration;

/// How many redirects are followed in a row.
const MAX_REDIRECTS: usize = 3;

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
        .redirect(same_origin_redirects())
        .no_proxy()
        .tcp_nodelay(true)
        .connect_timeout(connect_timeout)
        .pool_idle_timeout(IDLE_CONNECTION)
        .build()
}

/// Follows 307 and 308, which keep method and body, on the origin that an administrator wrote; frameworks send these for
/// a missing slash. What leads elsewhere is answered to the caller as it is: the server's token must not go there.
fn same_origin_redirects() -> reqwest::redirect::Policy {
    reqwest::redirect::Policy::custom(|attempt| {
        let first = attempt.previous().first();
        let stays = first.is_some_and(|first| first.origin() == attempt.url().origin());
        let keeps = matches!(attempt.status().as_u16(), 307 | 308);
        if stays && keeps && attempt.previous().len() <= MAX_REDIRECTS { attempt.follow() } else { attempt.stop() }
    })
}
