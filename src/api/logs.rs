//! `/v1/portolan/runs` and `/v1/portolan/changes`: what was run, and who changed what; newest first, a page at a time.

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, TimeZone, Utc};

use crate::app::App;
use crate::error::Error;
use crate::model::RunOutcome;
use crate::store::{ChangesWanted, RunsWanted, run_id_of};

use super::portolan::parameter;
use super::wire::{ChangesPage, RunsPage};

/// How many rows a page has unless it is asked for, and the most it may have.
const PAGE: (i64, i64) = (50, 500);
/// The longest text to look for, in characters: longer than any name or id.
const MAX_TEXT: usize = 255;

pub async fn runs(State(app): State<App>, uri: Uri) -> Result<Response, Error> {
    let limit = parameter(&uri, "limit", limit)?.unwrap_or(PAGE.0);
    let wanted = RunsWanted {
        mcp_server_id: parameter(&uri, "mcp_server_id", text)?,
        tool_id: parameter(&uri, "tool_id", text)?,
        caller: parameter(&uri, "caller", text)?,
        outcome: parameter(&uri, "outcome", outcome)?,
        since: parameter(&uri, "since", time)?,
        until: parameter(&uri, "until", time)?,
        before: parameter(&uri, "after", |cursor| run_id_of(cursor).ok_or_else(strange_cursor))?,
        // One more says whether there is a next page.
        limit: limit + 1,
    };
    app.run_log.flush().await;
    let mut runs = app.store.runs(&wanted).await?;
    let more = runs.len() as i64 > limit;
    runs.truncate(limit as usize);
    let last = runs.last().filter(|_| more);
    let next = last.map(|last| last.id.trim_start_matches("run-").replace('-', ""));
    Ok(Json(RunsPage::new(&runs, next)).into_response())
}

pub async fn changes(State(app): State<App>, uri: Uri) -> Result<Response, Error> {
    let limit = parameter(&uri, "limit", limit)?.unwrap_or(PAGE.0);
    let wanted = ChangesWanted {
        mcp_server_id: parameter(&uri, "mcp_server_id", text)?,
        caller: parameter(&uri, "caller", text)?,
        since: parameter(&uri, "since", time)?,
        until: parameter(&uri, "until", time)?,
        before: parameter(&uri, "after", change_id_of)?,
        limit: limit + 1,
    };
    let mut changes = app.store.changes(&wanted).await?;
    let more = changes.len() as i64 > limit;
    changes.truncate(limit as usize);
    let next = changes.last().filter(|_| more).map(|last| format!("{:016x}", last.id));
    Ok(Json(ChangesPage { changes: &changes, next }).into_response())
}

fn limit(text: &str) -> Result<i64, String> {
    let number = text.parse().ok().filter(|number| (1..=PAGE.1).contains(number));
    number.ok_or_else(|| format!("This must be a whole number from 1 to {}.", PAGE.1))
}

fn text(text: &str) -> Result<String, String> {
    match text.chars().count() > MAX_TEXT || text.contains('\0') {
        true => Err(format!("This must be at most {MAX_TEXT} characters, without NUL.")),
        false => Ok(text.to_owned()),
    }
}

fn outcome(name: &str) -> Result<RunOutcome, String> {
    RunOutcome::from_name(name).ok_or_else(|| "This must be success, error or failed.".to_owned())
}

/// A `+` that somebody did not write as `%2B` came as a space. SQLite compares times as texts, which goes well up to the year
/// 9999.
fn time(text: &str) -> Result<DateTime<Utc>, String> {
    let last = Utc.with_ymd_and_hms(9999, 12, 31, 0, 0, 0).single().expect("there is such a day");
    match DateTime::parse_from_rfc3339(&text.replace(' ', "+")) {
        Ok(time) => Ok(time.to_utc().clamp(DateTime::UNIX_EPOCH, last)),
        Err(_) => Err("This must be a time as RFC 3339 has it, for example 2026-01-31T00:00:00Z.".to_owned()),
    }
}

fn strange_cursor() -> String {
    "This must be the next of an earlier answer.".to_owned()
}

fn change_id_of(cursor: &str) -> Result<i64, String> {
    let is_plain = cursor.len() == 16 && cursor.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    i64::from_str_radix(cursor, 16).ok().filter(|_| is_plain).ok_or_else(strange_cursor)
}
