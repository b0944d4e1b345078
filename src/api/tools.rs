//! `/v1/mcp-servers/{mcp_server_id}/tools`: list, retrieve, run.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use crate::app::App;
use crate::error::Error;
use crate::model::{Server, Tool};

use super::guard::{Ids, RunBody};
use super::wire::{ToolExecutionResult, ToolObject, run_arguments};

pub async fn list(State(app): State<App>, Ids(id): Ids<String>) -> Result<Response, Error> {
    let server = app.store.server(&id).await?.ok_or(Error::NoServer)?;
    let tools = app.store.tools(&id).await?;
    Ok(Json(tools.iter().map(|tool| ToolObject::new(&server, tool)).collect::<Vec<_>>()).into_response())
}

pub async fn retrieve(State(app): State<App>, Ids(ids): Ids<(String, String)>) -> Result<Response, Error> {
    let (server, tool) = find(&app, &ids).await?;
    Ok(Json(ToolObject::new(&server, &tool)).into_response())
}

pub async fn run(
    State(app): State<App>,
    Ids(ids): Ids<(String, String)>,
    RunBody(body): RunBody,
) -> Result<Json<ToolExecutionResult>, Error> {
    let arguments = run_arguments(body)?;
    let (server, tool) = find(&app, &ids).await?;
    let outcome = app.mcp.run_tool(&server, &tool, arguments).await.map_err(Error::Connect)?;
    Ok(Json(outcome.into()))
}

async fn find(app: &App, (server_id, tool_id): &(String, String)) -> Result<(Server, Tool), Error> {
    let server = app.store.server(server_id).await?.ok_or(Error::NoServer)?;
    let tool = app.store.tool(server_id, tool_id).await?.ok_or(Error::NoTool)?;
    Ok((server, tool))
}
