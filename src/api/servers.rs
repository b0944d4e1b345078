//! `/v1/mcp-servers/`: register, list, retrieve, change, delete, refresh. What these do to a server, `legacy` does by name.

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequestParts, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use chrono::TimeDelta;
use futures_util::stream::unfold;
use serde::Deserialize;
use serde_json::{Map, json};
use uuid::Uuid;

use crate::app::App;
use crate::error::Error;
use crate::mcp::{AgentId, SyncError, Variables};
use crate::model::{By, Connector, Server, ServerType, State as ServerState};
use crate::store::{self, ServerUpdate};

use super::access::Caller;
use super::guard::{JsonBody, ServerId, UnusedBody, refuse_nul_in};
use super::reveal::Shown;
use super::variables::Given;
use super::wire::{CreateServer, ServerObject, UpdateServer};

/// How many servers of a list are read at a time.
const PAGE: i64 = 500;

/// How old a server may be to be taken for the outcome of an earlier try of the same create: an SDK gives up waiting
/// after 60 s, and tries three times.
const REPEATED_CREATE: TimeDelta = TimeDelta::minutes(5);

pub async fn create(
    State(app): State<App>,
    headers: HeaderMap,
    caller: Caller,
    shown: Shown,
    Given(given): Given,
    JsonBody(body): JsonBody,
) -> Result<Response, Error> {
    let server = add(&app, headers, &caller, CreateServer::read(body)?, given).await?;
    Ok(Json(show(&app, &server, shown)).into_response())
}

/// Registers a server that the policy allows, and connects to it.
pub(super) async fn add(
    app: &App,
    headers: HeaderMap,
    caller: &Caller,
    request: CreateServer,
    given: Variables,
) -> Result<Server, Error> {
    app.mcp.check(&request.connector).map_err(Error::Disabled)?;
    let (creating, by) = (app.clone(), caller.by());
    app.to_the_end(async move { register(&creating, &headers, &by, &request, &given).await }).await
}

/// Name and connector as a create of them would store them; for what comes another way and is held to the same rules.
///
/// # Errors
/// [`Error::Invalid`] with all that a create would refuse.
pub fn as_registered(server_name: &str, connector: &Connector) -> Result<(String, Connector), Error> {
    let body =
        Map::from_iter([("server_name".to_owned(), json!(server_name)), ("config".to_owned(), json!(connector))]);
    refuse_nul_in(&body, &mut vec![json!("body")])?;
    let request = CreateServer::read(body)?;
    Ok((request.server_name, request.connector))
}

/// A server as its row has it, and as this process knows it.
fn show<'a>(app: &App, server: &'a Server, shown: Shown) -> ServerObject<'a> {
    let forbidden = server.config.0.as_ref().ok().and_then(|connector| app.mcp.check(connector).err());
    let confinement = app.mcp.confinement(&server.id).filter(|_| server.server_type == ServerType::Stdio);
    ServerObject::new(server, shown).here(forbidden.map(|why| why.to_string()), confinement)
}

async fn register(
    app: &App,
    headers: &HeaderMap,
    by: &By,
    request: &CreateServer,
    given: &Variables,
) -> Result<Server, Error> {
    let id = format!("mcp_server-{}", Uuid::new_v4());
    let server = match app.store.create_server(&id, &request.server_name, &request.connector, by).await {
        Ok(server) => {
            tracing::info!(server.id, server.r#type = server.server_type.as_str(), "server registered");
            // Without it the server is registered all the same, and says that it wants a sign-in.
            if let Err(error) = app.mcp.adopt_sign_in(&server, by).await {
                tracing::error!(server.id, %error, "cannot look for a sign-in of before");
            }
            server
        }
        Err(store::Error::NameTaken) => earlier_try(app, headers, request).await?.ok_or(Error::NameTaken)?,
        Err(error) => return Err(error.into()),
    };
    let mut done = true;
    if server.last_synced_at.is_none() {
        let patience = app.settings.upstream.create_sync_timeout;
        done = app.mcp.first_sync(server.clone(), given, patience, by).await;
    }
    let mut server = match app.store.server(&server.id).await {
        Ok(Some(current)) => current,
        // It was registered, and somebody else has deleted it since.
        Ok(None) => server,
        // It is registered: an error here would make clients register it again.
        Err(error) => {
            tracing::error!(server.id, %error, "cannot read a server that was just registered");
            server
        }
    };
    if !done && server.state == ServerState::NeverConnected {
        server.error = Some("The server is still being connected; its tools will appear when it answers.".to_owned());
    }
    Ok(server)
}

/// The server that an earlier try of the same create made, when the SDK says that this is a repetition (CONTRACT row 4).
async fn earlier_try(app: &App, headers: &HeaderMap, request: &CreateServer) -> Result<Option<Server>, Error> {
    let retries = headers.get("x-stainless-retry-count").and_then(|count| count.to_str().ok()?.parse::<u32>().ok());
    if retries.unwrap_or(0) == 0 {
        return Ok(None);
    }
    let server = app.store.server_by_name(&request.server_name).await?;
    Ok(server.filter(|server| {
        server.config.0.as_ref().ok() == Some(&request.connector)
            && server.revision == 1
            && store::now() - server.created_at < REPEATED_CREATE
    }))
}

/// All servers, a few of them in memory at a time: there may be a million.
pub async fn list(State(app): State<App>, shown: Shown) -> Result<Response, Error> {
    // Whether they can be read is known before the answer begins.
    let first = app.store.servers_after(None, PAGE).await?;
    if !is_full(&first) {
        return Ok(Json(first.iter().map(|server| show(&app, server, shown)).collect::<Vec<_>>()).into_response());
    }
    let body = Body::from_stream(unfold(Some((b'[', first)), move |state| {
        let app = app.clone();
        async move {
            let (before, page) = state?;
            let (mut json, mut separator) = (Vec::new(), before);
            for server in &page {
                json.push(std::mem::replace(&mut separator, b','));
                serde_json::to_writer(&mut json, &show(&app, server, shown)).expect("a server is JSON");
            }
            let last = page.last().filter(|_| is_full(&page)).map(|last| (last.created_at, &*last.id));
            let next = match last {
                Some(last) => app.store.servers_after(Some(last), PAGE).await,
                None => Ok(vec![]),
            };
            match next {
                Ok(next) if next.is_empty() => {
                    json.push(b']');
                    Some((Ok(json), None))
                }
                Ok(next) => Some((Ok(json), Some((separator, next)))),
                // Nothing but its end can say that this answer is not whole.
                Err(error) => {
                    tracing::error!(%error, "a list of servers was cut off: the rest of them cannot be read");
                    Some((Err(error), None))
                }
            }
        }
    }));
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

fn is_full(page: &[Server]) -> bool {
    i64::try_from(page.len()) == Ok(PAGE)
}

pub async fn retrieve(State(app): State<App>, ServerId(id): ServerId, shown: Shown) -> Result<Response, Error> {
    let server = app.store.server(&id).await?.ok_or(Error::NoServer)?;
    Ok(Json(show(&app, &server, shown)).into_response())
}

pub async fn update(
    State(app): State<App>,
    ServerId(id): ServerId,
    caller: Caller,
    shown: Shown,
    JsonBody(body): JsonBody,
) -> Result<Response, Error> {
    let server = change(&app, id, UpdateServer::read(body)?, caller.by()).await?;
    Ok(Json(show(&app, &server, shown)).into_response())
}

pub(super) async fn change(app: &App, id: String, request: UpdateServer, by: By) -> Result<Server, Error> {
    let changing = app.clone();
    app.to_the_end(async move {
        let mut reconfigured = false;
        let forgets_sign_in = request.sets_client();
        let change = |server: &Server| -> Result<ServerUpdate, Error> {
            let server_name = request.server_name.clone().unwrap_or_else(|| server.server_name.clone());
            let connector = request.connector(server)?;
            if let Some(connector) = &connector {
                changing.mcp.check(connector).map_err(Error::Disabled)?;
            }
            reconfigured = connector.is_some();
            Ok(ServerUpdate { server_name, connector, forgets_sign_in })
        };
        let server = changing.store.update_server(&id, &by, change).await?.ok_or(Error::NoServer)?;
        if reconfigured {
            changing.mcp.reconfigured(&id, server.revision);
        }
        Ok(server)
    })
    .await
}

pub async fn delete(
    State(app): State<App>,
    ServerId(id): ServerId,
    caller: Caller,
    _: UnusedBody,
) -> Result<StatusCode, Error> {
    remove(&app, id, caller.by()).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn remove(app: &App, id: String, by: By) -> Result<(), Error> {
    let deleting = app.clone();
    app.to_the_end(async move {
        if !deleting.store.delete_server(&id, &by).await? {
            return Err(Error::NoServer);
        }
        deleting.mcp.deleted(&id);
        tracing::info!(server.id = id, "server deleted");
        Ok(())
    })
    .await
}

/// The agent that a request asks for, in its query.
pub struct ForAgent(Option<AgentId>);

impl FromRequestParts<App> for ForAgent {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Asked {
            agent_id: Option<String>,
        }
        let bad_agent = || Error::invalid(vec![json!("query"), json!("agent_id")], "This is not a valid agent id.");
        let query = Query::<Asked>::from_request_parts(parts, app).await.map_err(|_| bad_agent())?;
        // JavaScript SDKs send a null as an empty value (docs/CONTRACT.md, what the SDKs send).
        let agent = query.0.agent_id.filter(|agent| !agent.is_empty());
        Ok(Self(agent.map(|agent| AgentId::new(&agent).ok_or_else(bad_agent)).transpose()?))
    }
}

pub async fn refresh(
    State(app): State<App>,
    ServerId(id): ServerId,
    caller: Caller,
    agent: ForAgent,
    Given(given): Given,
    _: UnusedBody,
) -> Result<Response, Error> {
    let server = app.store.server(&id).await?.ok_or(Error::NoServer)?;
    resync(&app, server, agent, &given, &caller.by()).await
}

pub(super) async fn resync(
    app: &App,
    server: Server,
    ForAgent(agent): ForAgent,
    given: &Variables,
    by: &By,
) -> Result<Response, Error> {
    match app.mcp.sync_tools(&server, agent.as_ref(), given, by).await {
        Ok(changes) => Ok(Json(changes).into_response()),
        Err(SyncError::Gone) => Err(Error::NoServer),
        Err(SyncError::Server(error)) if error.is_unasked() => Err(error.into()),
        Err(SyncError::Server(source)) => Err(Error::Refresh { server_name: server.server_name, source }),
        Err(SyncError::Store(error)) => Err(error.into()),
    }
}
