//! `/v1/mcp-servers/{mcp_server_id}/tools`: list, retrieve, run, approve.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Map, Value};
use tokio::task::spawn_blocking;

use crate::app::App;
use crate::error::Error;
use crate::mcp::Room;
use crate::mcp::Variables;
use crate::model::ServerTool;

use super::access::Caller;
use super::drip;
use super::guard::{OptionalBody, RunBody, ServerId, ToolId};
use super::observed::Asked;
use super::repeats::Repeat;
use super::runs::{Joined, Sent};
use super::variables::Given;
use super::wire::{ToolExecutionResult, ToolObject, approved_hash, run_arguments, tools_array};

/// The answer is that of a run which another request asked for (CONTRACT row 16).
const X_PORTOLAN_REPEATED: HeaderName = HeaderName::from_static("x-portolan-repeated");

pub async fn list(State(app): State<App>, ServerId(id): ServerId) -> Result<Response, Error> {
    let server = app.store.server(&id).await?.ok_or(Error::NoServer)?;
    let tools = app.store.tools(&id).await?;
    // A server's schemas can be thousands and hostile: no other request waits while they are mapped.
    let hold = app.settings.upstream.tools.holds();
    let array = spawn_blocking(move || tools_array(&server, &tools, hold)).await;
    let array = array.map_err(|broken| Error::Internal(broken.into()))?;
    Ok(([(CONTENT_TYPE, "application/json")], array).into_response())
}

pub async fn retrieve(State(app): State<App>, ids: ToolId) -> Result<Response, Error> {
    let found = find(&app, &ids).await?;
    Ok(object(&app, &found))
}

pub(super) fn object(app: &App, found: &ServerTool) -> Response {
    let hold = app.settings.upstream.tools.holds();
    Json(ToolObject::new(&found.server, &found.tool, hold, &mut Room::default())).into_response()
}

pub async fn run(
    State(app): State<App>,
    ids: ToolId,
    asked: Asked,
    repeat: Repeat,
    Given(given): Given,
    RunBody(body): RunBody,
) -> Result<Response, Error> {
    answer(&app, ids, asked, &repeat, given, run_arguments(body)?, |json| json).await
}

/// The answer to a run: its JSON is what `shape` makes of that of a [`ToolExecutionResult`].
pub(super) async fn answer(
    app: &App,
    ids: ToolId,
    asked: Asked,
    repeat: &Repeat,
    given: Variables,
    arguments: Map<String, Value>,
    shape: fn(Bytes) -> Bytes,
) -> Result<Response, Error> {
    let call = repeat.call(&ids, &arguments, &given);
    let running = app.clone();
    let work = move |sent: Sent| {
        let mut observed = asked.begin(&sent);
        async move {
            let outcome = async {
                let mut found = find(&running, &ids).await?;
                observed.goes_to(&found, &arguments);
                check_approved(&running, &found)?;
                let place = running.mcp.enter(&found.server).await?;
                if place.was_awaited {
                    found = find(&running, &ids).await?;
                    check_approved(&running, &found)?;
                }
                Ok(running.mcp.run_tool(&place, &found, arguments, &given, &sent, observed.span()).await?)
            };
            let outcome = outcome.await;
            observed.end(&outcome);
            Ok(ToolExecutionResult::from(outcome?).json())
        }
    };
    let Joined { outcome, is_repeated } = match call {
        None => Joined { outcome: app.runs.alone(work), is_repeated: Arc::default() },
        Some(call) => app.runs.once(&call, work)?,
    };
    let mut response = drip::answer(outcome, &app.settings.runs, shape).await;
    if is_repeated.load(Ordering::Relaxed) {
        tracing::debug!("this run was asked for before");
        response.headers_mut().insert(X_PORTOLAN_REPEATED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

fn check_approved(app: &App, found: &ServerTool) -> Result<(), Error> {
    match &found.tool.approved_hash {
        Some(approved) if app.settings.upstream.tools.holds() => Err(Error::ToolHeld { is_new: approved.is_empty() }),
        _ => Ok(()),
    }
}

/// What an admin has seen may be run (`--tool-changes hold`).
pub async fn approve(
    State(app): State<App>,
    ids: ToolId,
    caller: Caller,
    OptionalBody(body): OptionalBody,
) -> Result<Response, Error> {
    let hash = approved_hash(body)?;
    find(&app, &ids).await?;
    let approving = app.clone();
    app.to_the_end(async move {
        let ToolId { server_id, tool_id } = &ids;
        let approved = approving.store.approve_tool(server_id, tool_id, hash.as_deref(), &caller.by()).await?;
        let found = find(&approving, &ids).await?;
        if !approved {
            return Err(Error::ToolChanged);
        }
        tracing::info!(server.id = server_id, tool.id = tool_id, "tool approved");
        Ok(object(&approving, &found))
    })
    .await
}

pub(super) async fn find(app: &App, ToolId { server_id, tool_id }: &ToolId) -> Result<Arc<ServerTool>, Error> {
    match app.store.tool(server_id, tool_id).await? {
        Some(found) => Ok(found),
        None if app.store.server(server_id).await?.is_some() => Err(Error::NoTool),
        None => Err(Error::NoServer),
    }
}
