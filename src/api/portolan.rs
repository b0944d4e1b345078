//! `/v1/portolan/`: servers come from the files of other programs, and go there.

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use clap::ValueEnum;
use serde_json::json;
use url::form_urlencoded;

use crate::app::App;
use crate::error::Error;
use crate::interchange::Format;

use super::access::Caller;
use super::guard::FileBody;
use super::import::{self, Import, Imported};
use super::reveal::Shown;

pub async fn import(
    State(app): State<App>,
    uri: Uri,
    caller: Caller,
    FileBody(file): FileBody,
) -> Result<Response, Error> {
    let asked = Import {
        format: parameter(&uri, "format", format_of)?,
        replace: parameter(&uri, "mode", |mode| choice(mode, "merge", "replace"))?.unwrap_or(false),
        dry_run: parameter(&uri, "dry_run", |dry_run| choice(dry_run, "false", "true"))?.unwrap_or(false),
    };
    let (importing, by) = (app.clone(), caller.by());
    let report = app.to_the_end(async move {
        let App { store, mcp, .. } = &importing;
        let Imported { report, added, changed, removed } =
            asked.run(store, file, &by, |connector| mcp.check(connector), |_, _| {}).await?;
        if report.dry_run {
            return Ok(report);
        }
        for (id, revision) in changed {
            mcp.reconfigured(&id, revision);
        }
        removed.iter().for_each(|id| mcp.deleted(id));
        let (more, other, fewer) = (report.added.len(), report.changed.len(), report.removed.len());
        tracing::info!(servers.added = more, servers.changed = other, servers.removed = fewer, "servers imported");
        mcp.first_syncs(added, &by);
        Ok(report)
    });
    Ok(Json(report.await?).into_response())
}

pub async fn export(State(app): State<App>, uri: Uri, shown: Shown) -> Result<Response, Error> {
    let format = parameter(&uri, "format", format_of)?.unwrap_or(Format::Claude);
    let servers = app.store.servers().await?;
    let written = import::export(&servers, format, shown == Shown::InClear);
    Ok(Json(written.into_one()).into_response())
}

/// A parameter of the query, once; empty means absent.
pub(super) fn parameter<T>(
    uri: &Uri,
    name: &str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, Error> {
    let mut given = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).filter(|(key, _)| key == name);
    let value = given.next().map(|(_, value)| value).filter(|value| !value.is_empty());
    let wrong = |msg: String| Error::invalid(vec![json!("query"), json!(name)], msg);
    if given.next().is_some() {
        return Err(wrong("This is given more than once.".to_owned()));
    }
    value.map(|value| read(&value).map_err(wrong)).transpose()
}

fn choice(value: &str, no: &str, yes: &str) -> Result<bool, String> {
    match value {
        _ if value == no => Ok(false),
        _ if value == yes => Ok(true),
        _ => Err(format!("This must be {no} or {yes}.")),
    }
}

fn format_of(value: &str) -> Result<Format, String> {
    Format::from_str(value, false).map_err(|_| "This must be claude, cursor, windsurf, vscode or letta.".to_owned())
}
