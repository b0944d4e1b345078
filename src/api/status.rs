//! How Portolan is, and what its API is: health, readiness, metrics, the OpenAPI document and its page.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_SECURITY_POLICY, CONTENT_TYPE, VARY};
use axum::response::{Html, IntoResponse, Response};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::app::App;
use crate::error::Error;
use crate::telemetry::metrics::Format;

const OPENAPI: &str = include_str!("../../openapi.yaml");
const DOCS: &str = include_str!("docs.html");
const DOCS_SCRIPT: &str = include_str!("docs.js");

/// Scripts and styles from here alone; Swagger UI sets styles on elements and carries its icons as data.
const DOCS_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
                           img-src 'self' data:; font-src 'self' data:; connect-src 'self'; base-uri 'none'; \
                           form-action 'none'; frame-ancestors 'none'";

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

pub async fn openapi() -> Response {
    ([(CONTENT_TYPE, "application/yaml")], OPENAPI).into_response()
}

pub async fn docs() -> Response {
    ([(CONTENT_SECURITY_POLICY, DOCS_POLICY)], Html(DOCS)).into_response()
}

pub async fn docs_file(file: Result<Path<String>, PathRejection>) -> Result<Response, Error> {
    let Path(file) = file.map_err(|_| Error::NoRoute)?;
    let (kind, bytes): (&str, &'static [u8]) = match file.as_str() {
        "docs.js" => ("text/javascript; charset=utf-8", DOCS_SCRIPT.as_bytes()),
        name => swagger_ui_redist::SwaggerUi::static_files()
            .iter()
            .find(|(known, _)| known.file_name() == name)
            .map(|(known, bytes)| (content_type(known.file_name()), *bytes))
            .ok_or(Error::NoRoute)?,
    };
    Ok(([(CONTENT_TYPE, kind)], bytes).into_response())
}

fn content_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        _ => "image/png",
    }
}
