//! What an admin reads of runs and changes.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use crate::model::{Change, Run, RunOutcome};

/// Some of the runs, newest first.
#[derive(Serialize)]
pub struct RunsPage<'a> {
    runs: Vec<RunObject<'a>>,
    /// What asks for those after them.
    next: Option<String>,
}

#[derive(Serialize)]
struct RunObject<'a> {
    id: &'a str,
    #[serde(serialize_with = "whole_milliseconds")]
    started_at: DateTime<Utc>,
    duration_ms: i64,
    caller: Option<&'a str>,
    mcp_server_id: &'a str,
    server_name: &'a str,
    tool_id: &'a str,
    tool_name: &'a str,
    outcome: RunOutcome,
    error_code: Option<&'a str>,
    args_bytes: i64,
    result_bytes: i64,
    args: Option<Args<'a>>,
    args_cut: bool,
    result: Option<&'a str>,
    result_cut: bool,
}

/// Arguments of which only the start was kept are no JSON any more.
#[derive(Serialize)]
#[serde(untagged)]
enum Args<'a> {
    Whole(&'a RawValue),
    Start(&'a str),
}

fn whole_milliseconds<S: Serializer>(time: &DateTime<Utc>, out: S) -> Result<S::Ok, S::Error> {
    out.serialize_str(&time.to_rfc3339_opts(SecondsFormat::Millis, true))
}

impl<'a> RunsPage<'a> {
    pub fn new(runs: &'a [Run], next: Option<String>) -> Self {
        let runs = runs.iter().map(|run| {
            let content = run.content.as_ref();
            RunObject {
                id: &run.id,
                started_at: run.started_at,
                duration_ms: run.duration_ms,
                caller: run.caller.as_deref(),
                mcp_server_id: &run.mcp_server_id,
                server_name: &run.server_name,
                tool_id: &run.tool_id,
                tool_name: &run.tool_name,
                outcome: run.outcome,
                error_code: run.error_code.as_deref(),
                args_bytes: run.args_bytes,
                result_bytes: run.result_bytes,
                args: content.map(|content| match serde_json::from_str(&content.args) {
                    Ok(whole) if !content.args_cut => Args::Whole(whole),
                    _ => Args::Start(&content.args),
                }),
                args_cut: content.is_some_and(|content| content.args_cut),
                result: content.and_then(|content| content.result.as_deref()),
                result_cut: content.is_some_and(|content| content.result_cut),
            }
        });
        Self { runs: runs.collect(), next }
    }
}

/// Some of the changes, newest first.
#[derive(Serialize)]
pub struct ChangesPage<'a> {
    pub changes: &'a [Change],
    /// What asks for those after them.
    pub next: Option<String>,
}
