//! `/v1/tools/mcp/servers`: the same servers and tools, as Letta's older SDKs and its command line know them: by their
//! names (CONTRACT row 22).

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use tokio::task::spawn_blocking;

use crate::app::App;
use crate::error::Error;
use crate::mcp::{Subject, SyncError, Variables};
use crate::model::{By, Server};

use super::access::{Caller, Scope};
use super::guard::{JsonBody, RunBody, ServerName, ToolId, ToolName, UnusedBody};
use super::oauth;
use super::observed::Asked;
use super::repeats::Repeat;
use super::reveal::Shown;
use super::servers::{self, ForAgent};
use super::tools;
use super::variables::Given;
use super::wire::{Configs, CreateServer, ServerConfig, UpdateServer, execution, live_tools, run_arguments, trial};

pub async fn list(State(app): State<App>, shown: Shown) -> Result<Response, Error> {
    let servers = app.store.servers().await?;
    Ok(Json(Configs::new(&servers, shown)).into_response())
}

/// Answers all servers, the new one among them.
pub async fn add(
    State(app): State<App>,
    headers: HeaderMap,
    caller: Caller,
    shown: Shown,
    Given(given): Given,
    JsonBody(body): JsonBody,
) -> Result<Response, Error> {
    let server = servers::add(&app, headers, &caller, CreateServer::read(body)?, given).await?;
    let servers = match app.store.servers().await {
        Ok(servers) => servers,
        // It is registered: an error here would make clients register it again.
        Err(error) => {
            tracing::error!(server.id, %error, "cannot read the servers when one was just registered");
            vec![server]
        }
    };
    Ok(all(&servers, shown))
}

pub async fn update(
    State(app): State<App>,
    ServerName(name): ServerName,
    caller: Caller,
    shown: Shown,
    JsonBody(body): JsonBody,
) -> Result<Response, Error> {
    let request = UpdateServer::read_legacy(body)?;
    let server = named(&app, &name).await?;
    let server = servers::change(&app, server.id, request, caller.by()).await?;
    Ok(Json(ServerConfig::new(&server, shown)).into_response())
}

/// Answers the servers that are left.
pub async fn delete(
    State(app): State<App>,
    ServerName(name): ServerName,
    caller: Caller,
    shown: Shown,
    _: UnusedBody,
) -> Result<Response, Error> {
    // Read before: after the deletion an error would make clients delete once more, and find nothing.
    let mut servers = app.store.servers().await?;
    let place = servers.iter().position(|server| server.server_name == name).ok_or(Error::NoServerNamed)?;
    servers::remove(&app, servers.remove(place).id, caller.by()).await?;
    Ok(all(&servers, shown))
}

fn all(servers: &[Server], shown: Shown) -> Response {
    Json(servers.iter().map(|server| ServerConfig::new(server, shown)).collect::<Vec<_>>()).into_response()
}

/// What the server lists now; what is stored stays as it is. Only an admin has a server that failed tried again at once.
pub async fn tools(
    State(app): State<App>,
    ServerName(name): ServerName,
    caller: Caller,
    Given(given): Given,
) -> Result<Response, Error> {
    let server = named(&app, &name).await?;
    let listed = app.mcp.live_tools(&server, &given, is_admin(&caller)).await?;
    json_of(move || live_tools(&listed)).await
}

/// Whether such a server could be used, and with which tools. Registers nothing.
pub async fn test(State(app): State<App>, Given(given): Given, JsonBody(body): JsonBody) -> Result<Response, Error> {
    let request = CreateServer::read(body)?;
    app.mcp.check(&request.connector).map_err(Error::Disabled)?;
    // To its end also when the caller leaves: what it started is tidied away.
    let trying = app.clone();
    let listed = app.to_the_end(async move { Ok(trying.mcp.try_out(&request.connector, &given).await?) }).await?;
    json_of(move || trial(&listed)).await
}

/// As the connect of a registered server, which it is when exactly this one is registered.
pub async fn connect(
    State(app): State<App>,
    caller: Caller,
    Given(given): Given,
    JsonBody(body): JsonBody,
) -> Result<Response, Error> {
    let CreateServer { server_name, connector } = CreateServer::read(body)?;
    app.mcp.check(&connector).map_err(Error::Disabled)?;
    let registered = app.store.server_by_name(&server_name).await?;
    let same = registered.filter(|server| server.config.0.as_ref().ok() == Some(&connector));
    let subject = same.map_or(Subject::Unregistered { server_name, connector }, Subject::Registered);
    Ok(oauth::stream(&app, subject, &caller, given))
}

/// A server's tools can be thousands and hostile: no other request waits while they are mapped.
async fn json_of(map: impl FnOnce() -> Vec<u8> + Send + 'static) -> Result<Response, Error> {
    let json = spawn_blocking(map).await.map_err(|broken| Error::Internal(broken.into()))?;
    Ok(([(CONTENT_TYPE, "application/json")], json).into_response())
}

/// Answers the tool; all tools of a server are there from its registration on, and one that is not may be new.
pub async fn add_tool(
    State(app): State<App>,
    names: ToolName,
    caller: Caller,
    Given(given): Given,
    _: UnusedBody,
) -> Result<Response, Error> {
    let server = named(&app, &names.server_name).await?;
    let ids = match tool_named(&app, &server, &names.tool_name).await? {
        Some(ids) => ids,
        None => {
            sync(&app, &server, &given, &caller.by()).await?;
            tool_named(&app, &server, &names.tool_name).await?.ok_or(Error::NoToolNamed)?
        }
    };
    Ok(tools::object(&app, &*tools::find(&app, &ids).await?))
}

pub async fn resync(
    State(app): State<App>,
    ServerName(name): ServerName,
    caller: Caller,
    agent: ForAgent,
    Given(given): Given,
    _: UnusedBody,
) -> Result<Response, Error> {
    let server = named(&app, &name).await?;
    servers::resync(&app, server, agent, &given, &caller.by()).await
}

/// A run: the one that `…/run` makes, in another shape.
pub async fn execute(
    State(app): State<App>,
    names: ToolName,
    caller: Caller,
    repeat: Repeat,
    Given(given): Given,
    asked: Asked,
    RunBody(body): RunBody,
) -> Result<Response, Error> {
    let arguments = run_arguments(body)?;
    let server = named(&app, &names.server_name).await?;
    let mut ids = tool_named(&app, &server, &names.tool_name).await?;
    // It was away when it was registered, and nobody has seen its tools yet. What is trusted from then on is an admin's to
    // ask for: a run brings variables of its own.
    if ids.is_none() && server.last_synced_at.is_none() && is_admin(&caller) {
        sync(&app, &server, &given, &caller.by()).await?;
        ids = tool_named(&app, &server, &names.tool_name).await?;
    }
    let ids = ids.ok_or(Error::NoToolNamed)?;
    tools::answer(&app, ids, asked, &repeat, given, arguments, execution).await
}

fn is_admin(caller: &Caller) -> bool {
    caller.scope >= Scope::Admin
}

async fn named(app: &App, name: &str) -> Result<Server, Error> {
    app.store.server_by_name(name).await?.ok_or(Error::NoServerNamed)
}

async fn tool_named(app: &App, server: &Server, name: &str) -> Result<Option<ToolId>, Error> {
    let found = app.store.tool_by_name(&server.id, name).await?;
    Ok(found.map(|tool_id| ToolId { server_id: server.id.clone(), tool_id }))
}

async fn sync(app: &App, server: &Server, given: &Variables, by: &By) -> Result<(), Error> {
    match app.mcp.sync_tools(server, None, given, by).await {
        Ok(_) => Ok(()),
        Err(SyncError::Gone) => Err(Error::NoServerNamed),
        Err(SyncError::Server(error)) => Err(error.into()),
        Err(SyncError::Store(error)) => Err(error.into()),
    }
}
