//! Answers in time: the head of a run that takes long goes out early, and spaces keep the connection busy until its JSON
//! is there (CONTRACT row 15). JSON may begin with white space (RFC 8259, section 2), so every reader takes it.
//!
//! SDKs give up on a read after 60 s, and repeat; proxies give up on an idle connection.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::unfold;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::config::Runs as Settings;
use crate::error::Error;

use super::wire::ToolExecutionResult;

/// The JSON of a run's answer, or why nothing was sent to the tool.
pub type Ended = Result<Bytes, Arc<Error>>;

/// The answer that `run` becomes, with its JSON in another `shape`. Whoever drops the answer, or its body, drops the run.
pub async fn answer(mut run: BoxFuture<'static, Ended>, settings: &Settings, shape: fn(Bytes) -> Bytes) -> Response {
    let started = Instant::now();
    match timeout(settings.early_head_after, &mut run).await {
        Ok(Ok(json)) => with_head(shape(json).into()),
        Ok(Err(error)) => error.answer(),
        Err(_) => with_head(late(run, started, settings, shape)),
    }
}

fn with_head(body: Body) -> Response {
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

/// A space at once and then from time to time, at last the JSON. The status is settled: an error is told as a result.
fn late(run: BoxFuture<'static, Ended>, started: Instant, settings: &Settings, shape: fn(Bytes) -> Bytes) -> Body {
    let not_run = move |error: Arc<Error>| ToolExecutionResult::failed(error.sentence(), started.elapsed()).json();
    let mut spaces = interval(settings.drip_every);
    spaces.set_missed_tick_behavior(MissedTickBehavior::Delay);
    Body::from_stream(unfold(Some((run, spaces)), move |state| async move {
        let (mut run, mut spaces) = state?;
        let (chunk, rest) = tokio::select! {
            biased;
            ended = &mut run => (shape(ended.unwrap_or_else(not_run)), None),
            _ = spaces.tick() => (Bytes::from_static(b" "), Some((run, spaces))),
        };
        Some((Ok::<_, Infallible>(chunk), rest))
    }))
}
