//! How Portolan is: health, readiness and metrics.

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE, VARY};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::app::App;
use crate::error::Error;
use crate::telemetry::metrics::Format;

pub async fn health() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION"), "status": "ok" }))
}

pub async fn ready(State(app): State<App>) -> Result<Json<Value>, Error> {
    app.store.ping().await?;
    Ok(Json(json!({ "status": "ok" })))
}

pub async fn metrics(State(app): State<App>, headers: HeaderMap) -> Result<Response, Error> {
    let accept: Vec<_> = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let format = Format::accepted(&accept.join(","));
    // The system is asked for the process, a file for each that is open, and there may be thousands of sessions.
    let text = spawn_blocking(move || app.metrics.write(&app.readings(), format)).await;
    let text = text.map_err(|broken| Error::Internal(broken.into()))?;
    Ok(([(CONTENT_TYPE, format.content_type()), (VARY, "accept")], text).into_response())
}
