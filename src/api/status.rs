//! How Portolan is: health and readiness.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::app::App;
use crate::error::Error;

pub async fn health() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION"), "status": "ok" }))
}

pub async fn ready(State(app): State<App>) -> Result<Json<Value>, Error> {
    app.store.ping().await?;
    Ok(Json(json!({ "status": "ok" })))
}
