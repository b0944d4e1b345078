//! Speaks MCP, itself, and knows no handler: the front door to sessions and tool lists.
//!
//! [`Mcp::first_sync`] and [`Mcp::sync_tools`] make the stored tools of a server equal to what it offers,
//! [`Mcp::run_tool`] runs one, [`Mcp::forget`] and [`Mcp::reconfigured`] end a server's session, [`Mcp::close`] all.

mod address;
mod budget;
pub mod child;
mod commands;
mod confine;
mod egress;
mod error;
mod events;
mod exchange;
mod fields;
mod first;
mod follow;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hidden;
mod homes;
mod http;
mod json;
mod keeper;
mod lines;
mod listing;
mod message;
mod mirror;
mod oauth;
mod order;
mod pool;
#[cfg(target_os = "linux")]
mod reach;
mod remote;
mod result;
mod schema;
mod session;
mod sse;
mod stdio;
mod template;
mod traced;
mod users;
mod variables;
mod variants;
mod watch;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::http::HeaderValue;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Upstream;
use crate::model::{By, Connector, Era, Flagged, Offered, Server, ServerTool, Skipped, Tool, ToolChanges};
use crate::secrets::scrub;
use crate::store::{self, Listing, Over, Store};
use crate::telemetry::Span;
use crate::telemetry::metrics::{CallResult, Metrics, Readings};

pub use address::{Forbidden, Scope, UrlError, scope, server_url};
pub use budget::Held;
pub use commands::{Commands, TemplatesError};
pub use confine::become_child;
pub use egress::{Destination, Egress, TlsError, Trust};
pub use error::{Error, SyncError};
pub use fields::{FieldError, Place as FieldPlace, faults, field_name, field_value};
pub use first::FirstSyncs;
pub use hidden::flags;
pub use keeper::keep_child;
pub use listing::{accept, definition};
pub use oauth::{ConnectEvent, SignInError, Subject};
pub use order::{BECOME, KEEP};
pub use pool::Place;
pub use schema::{Health, Room, json_schema, listed_schema};
pub use template::{bare, hidden_parts, is_templated, templates};
pub use variables::{Variables, VariablesError, VariablesFile, VariablesFileError};

use budget::Budget;
use child::Children;
use exchange::Answer;
use message::RpcError;
use oauth::SignIns;
use pool::Pool;
use result::ToolResult;
use schema::{HEARTBEAT, declares};
use session::{CallError, Context, Listed, Session};
use template::Filled;
use watch::{News, watch};

/// How long the end of all sessions may take at a stop: a child has two periods of grace, a remote server a moment for
/// the goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How many servers are looked through at a time for the owners of old folders.
const IDS_AT_ONCE: i64 = 1_000;

/// How often a sync asks for a list, if others go on storing different ones; the last one is stored whatever there is.
const LISTS: u32 = 3;

/// How often a session that was let go while it was opened is opened again, for one call or list.
const ATTEMPTS: u32 = 2;

/// The agent a refresh is made for; goes to the server as `X-Agent-Id` (docs/CONTRACT.md).
#[derive(Clone, Debug, PartialEq)]
pub struct AgentId(HeaderValue);

impl AgentId {
    /// `None` for a text that is not a valid header value: visible ASCII, at most 255 characters.
    pub fn new(text: &str) -> Option<Self> {
        let value = field_value(text).ok()?;
        (text.len() <= 255).then_some(Self(value))
    }
}

/// What came of a run that reached the server.
#[derive(Debug)]
pub struct Outcome {
    pub is_error: bool,
    /// The result in one text (CONTRACT row 13).
    pub text: String,
    /// The MCP CallToolResult as the server wrote it; none when the server gave none.
    pub result: Option<Box<RawValue>>,
    /// From the request for a place to the answer.
    pub duration: Duration,
    /// The room that the result takes, as long as it is there.
    pub held: Option<Held>,
}

/// Sessions to all servers, and what was learned from them. Clones share everything.
#[derive(Clone)]
pub struct Mcp {
    store: Store,
    pool: Arc<Pool>,
    /// The way out, for all that is sent.
    pub egress: Egress,
    sign_ins: SignIns,
    settings: Upstream,
    children: Children,
    variables: VariablesFile,
    metrics: Metrics,
    tracker: TaskTracker,
    stop: CancellationToken,
    /// One sync of a server at a time, so that an older list never lands on a newer one.
    syncing: Arc<Mutex<HashMap<String, Arc<Turn>>>>,
    /// How far the first syncs are.
    first: tokio::sync::watch::Sender<FirstSyncs>,
}

/// Holds what came of the last sync, for those who came before it began.
type Turn = tokio::sync::Mutex<Option<Synced>>;

struct Synced {
    began: Instant,
    agent: Option<AgentId>,
    given: Variables,
    result: Result<ToolChanges, Error>,
}

impl Mcp {
    /// Sessions and background work are tasks on `tracker`. To be called in the runtime that serves.
    pub fn new(
        store: Store,
        settings: Upstream,
        egress: Egress,
        children: Children,
        variables: VariablesFile,
        metrics: Metrics,
        tracker: TaskTracker,
    ) -> Self {
        let stop = CancellationToken::new();
        let sign_ins = SignIns::new(
            store.clone(),
            egress.clone(),
            metrics.clone(),
            tracker.clone(),
            settings.sign_in.clone(),
            stop.clone(),
        );
        let context = Context {
            sign_ins: sign_ins.clone(),
            settings: settings.clone(),
            egress: egress.clone(),
            tracker: tracker.clone(),
            children: children.clone(),
            budget: Budget::new(settings.max_bytes_in_flight),
            metrics: metrics.clone(),
            stop: stop.clone(),
        };
        let news = Arc::new(News::default());
        let pool = Arc::new(Pool::new(context, store.clone(), news.clone(), variables.clone()));
        let (syncing, first) = (Arc::default(), tokio::sync::watch::Sender::default());
        let mcp = Self {
            store,
            pool,
            egress,
            sign_ins,
            settings,
            children,
            variables,
            metrics,
            tracker,
            stop,
            syncing,
            first,
        };
        mcp.tracker.spawn(watch(mcp.clone(), news));
        mcp.follow();
        mcp.tidy();
        mcp.catch_up();
        mcp
    }

    /// Lists the server's tools, following all pages, and makes the stored ones equal to them in one transaction. `given` are
    /// the values that the request brings, and `by` is who asked for it, here and below.
    ///
    /// # Errors
    /// [`SyncError::Server`] when the list cannot be had; the stored tools are as they were, and the reason is noted in
    /// the server's status.
    pub async fn sync_tools(
        &self,
        server: &Server,
        agent: Option<&AgentId>,
        given: &Variables,
        by: &By,
    ) -> Result<ToolChanges, SyncError> {
        let arrived = Instant::now();
        let turn = self.turn(&server.id);
        let mut last = turn.lock().await;
        // Of those who wait, the next one asks the server for all.
        if let Some(Synced { began, agent: asked_for, given: had, result }) = &*last
            && *began > arrived
            && asked_for.as_ref() == agent
            && had == given
        {
            return result.clone().map_err(Into::into);
        }
        let began = Instant::now();
        // The row may have changed while others had their turn.
        let server = self.store.server(&server.id).await?.ok_or(SyncError::Gone)?;
        let synced = self.sync(&server, agent, given, true, by).await.map(|(_, changes)| changes);
        let result = match &synced {
            Ok(changes) => Some(Ok(changes.clone())),
            Err(SyncError::Server(error)) => Some(Err(error.clone())),
            Err(_) => None,
        };
        *last = result.map(|result| Synced { began, agent: agent.cloned(), given: given.clone(), result });
        synced
    }

    fn turn(&self, server_id: &str) -> Arc<Turn> {
        let mut syncing = self.syncing.lock().expect("no code panics while it holds the map");
        // Entries that nobody waits for are dropped on the way.
        syncing.retain(|_, turn| Arc::strong_count(turn) > 1);
        syncing.entry(server_id.to_owned()).or_default().clone()
    }

    /// Lists again what a server says has changed.
    async fn relist(&self, server_id: &str) {
        let turn = self.turn(server_id);
        let _turn = turn.lock().await;
        let synced = match self.store.server(server_id).await {
            Ok(Some(server)) => self.sync(&server, None, &Variables::default(), false, &By::ITSELF).await.map(|_| ()),
            Ok(None) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = synced {
            tracing::warn!(server.id = server_id, %error, "the changed list of a server cannot be had");
        }
    }

    /// Opens a session to a server that was away, if it is back.
    async fn look_for(&self, server_id: &str) {
        match self.store.server(server_id).await {
            // Nobody has seen its tools yet. A failure is noted where it happens, here and below.
            Ok(Some(server)) if server.last_synced_at.is_none() => {
                drop(server);
                self.relist(server_id).await;
            }
            Ok(Some(server)) => drop(self.session(&server, &Variables::default(), false).await),
            Ok(None) => self.pool.forget(server_id),
            Err(_) => {}
        }
    }

    /// Lists the tools of a server, and makes the stored ones equal to them. `now`: somebody asked for it, and wants no answer
    /// of before. Where another Portolan stores a list meanwhile, the server is asked again: an older list never lands on a
    /// newer one, whoever got it.
    async fn sync(
        &self,
        server: &Server,
        agent: Option<&AgentId>,
        given: &Variables,
        now: bool,
        by: &By,
    ) -> Result<(Listed, ToolChanges), SyncError> {
        let mut server = Cow::Borrowed(server);
        let mut lists = 1;
        loop {
            let over = if lists < LISTS { Over::Of(server.last_synced_at) } else { Over::Any };
            let (listed, era) = self.list(&server, agent, given, now).await?;
            match self.keep(&server, given, &listed, era, over, by).await {
                Err(SyncError::Store(store::Error::Overtaken)) => {
                    server = Cow::Owned(self.store.server(&server.id).await?.ok_or(SyncError::Gone)?);
                    lists += 1;
                }
                kept => return Ok((listed, kept?)),
            }
        }
    }

    /// Makes the stored tools of a server equal to what it listed.
    async fn keep(
        &self,
        server: &Server,
        given: &Variables,
        listed: &Listed,
        era: Era,
        over: Over,
        by: &By,
    ) -> Result<ToolChanges, SyncError> {
        let (offered, skipped) = accept(&listed.tools);
        // A server may call a tool by what it was given.
        let filled = server.config.0.as_ref().ok().and_then(|connector| self.filled(connector, given).ok());
        let secrets = filled.map(|filled| filled.secrets).unwrap_or_default();
        let notice = notice(&skipped).map(|notice| scrub(&notice, &secrets));
        let hold = self.settings.tools.holds();
        let (notice, shown) = (notice.as_deref(), &|name: &str| scrub(name, &secrets));
        let listing = Listing { era: Some(era), notice, offered: &offered, hold, shown, over };
        let synced = self.store.sync_tools(&server.id, server.revision, &listing, by).await?;
        let Some(mut changes) = synced else {
            let exists = self.store.server(&server.id).await?.is_some();
            return Err(if exists { Error::Reconfigured } else { Error::Deleted }.into());
        };
        tracing::info!(
            server.id,
            tools.added = changes.added.len(),
            tools.updated = changes.updated.len(),
            tools.deleted = changes.deleted.len(),
            tools.skipped = skipped.len(),
            tools.held = changes.held.len(),
            "tools synced"
        );
        for changed in &changes.changed {
            let (old, new) = (&changed.old, &changed.new);
            tracing::warn!(server.id, tool.hash.old = old, tool.hash.new = new, "the definition of a tool changed");
        }
        changes.skipped = skipped;
        changes.flagged = flagged(&offered);
        Ok(changes)
    }

    /// Lists on the live session; on one that proves dead, once more on a new one.
    async fn list(
        &self,
        server: &Server,
        agent: Option<&AgentId>,
        given: &Variables,
        now: bool,
    ) -> Result<(Listed, Era), Error> {
        let mut second = false;
        let mut attempts = ATTEMPTS;
        loop {
            let (session, new) = match self.session(server, given, now).await {
                // Somebody has signed in, maybe at another replica, or a sign-in has ended: nothing was configured.
                Err(Error::Reconfigured) if attempts > 0 && self.is_current(server).await? => {
                    attempts -= 1;
                    continue;
                }
                opened => opened?,
            };
            let deadline = Instant::now() + self.settings.list_timeout;
            match session.list_tools(agent, deadline).await {
                Ok(listed) => return Ok((listed, session.era())),
                Err(Error::Closed | Error::SessionExpired | Error::Exited { .. } | Error::Http(_))
                    if !new && !second =>
                {
                    self.pool.drop_session(&server.id, &session);
                    second = true;
                }
                Err(error) if error.is_unasked() => return Err(error),
                Err(error) => {
                    // A session that cannot even list is not worth keeping.
                    self.pool.discard(server, &session, &error).await;
                    return Err(error);
                }
            }
        }
    }

    /// Whether this is the configuration of the server still.
    async fn is_current(&self, server: &Server) -> Result<bool, Error> {
        let current = self.store.server(&server.id).await.map_err(|_| Error::Store)?;
        Ok(current.is_some_and(|current| current.revision == server.revision))
    }

    /// The live session of a server, and whether it was opened just now. An opening goes on when the caller leaves.
    async fn session(&self, server: &Server, given: &Variables, now: bool) -> Result<(Arc<Session>, bool), Error> {
        if let Some(session) = self.pool.live(server, given) {
            return Ok((session, false));
        }
        let (pool, server, given) = (self.pool.clone(), server.clone(), given.clone());
        let opening = self.tracker.spawn(async move { pool.session(&server, &given, now).await });
        // It ends without an outcome only with the runtime.
        opening.await.unwrap_or(Err(Error::Stopping))
    }

    /// A place among the calls of a server, in turn. Who had to wait for it ([`Place::was_awaited`]) is to read again what is to
    /// be called: nobody has told this request of a change meanwhile.
    ///
    /// # Errors
    /// When there is none within the run timeout, and so nothing was run.
    pub async fn enter(&self, server: &Server) -> Result<Place, Error> {
        self.pool.enter(&server.id, self.settings.run_timeout).await
    }

    /// Runs a tool of a server with `arguments`, on the live session, at its `place` and within the time of that.
    /// `request_heartbeat`, which Letta adds to every schema, is taken out unless the tool itself declares it (CONTRACT row
    /// 13). `sent` is set before the call may reach the server: whoever drops this future knows by it whether the tool may
    /// have run. What is done for it becomes a part of `span`.
    ///
    /// # Errors
    /// When no session can be had, or the server did not take the call, and so nothing was run. All that can happen
    /// after that is an [`Outcome`].
    pub async fn run_tool(
        &self,
        place: &Place,
        ServerTool { server, tool }: &ServerTool,
        mut arguments: Map<String, Value>,
        given: &Variables,
        sent: &AtomicBool,
        span: &mut Span,
    ) -> Result<Outcome, Error> {
        let deadline = place.deadline;
        if arguments.contains_key(HEARTBEAT) && !declares(&definition(tool).input_schema, HEARTBEAT) {
            arguments.shift_remove(HEARTBEAT);
        }
        let mut server = Cow::Borrowed(server);
        let call = Call { tool, arguments: &arguments, given, deadline, sent, span };
        let mut called = self.call(&server, &call).await;
        // A kept session was found dead, or of an old configuration, before anything was sent: a new one is as good. That may
        // be let go, too, when somebody signs in just then.
        for _ in 0..ATTEMPTS {
            if !matches!(called, Err(Failed { again: true, .. })) {
                break;
            }
            if let Ok(Ok(current)) = timeout_at(deadline, self.store.server(&server.id)).await {
                server = Cow::Owned(current.ok_or(Error::Deleted)?);
            }
            called = self.call(&server, &call).await;
        }
        let called = called.map_err(|failed| failed.error);
        if let Err(error) = &called
            && !matches!(error, CallError::NotSent(_))
        {
            span.fail(&traced::failure(error));
        }
        let (is_error, text, answer) = match called {
            Ok((answer, mut calling)) => {
                let read = ToolResult::read(&answer.result);
                let failure = match &read {
                    Ok(result) => result.is_error.then_some("tool_error"),
                    Err(_) => Some("unreadable_result"),
                };
                if let Some(failure) = failure {
                    calling.fail(failure);
                    span.fail(failure);
                }
                calling.end();
                match read {
                    Ok(result) => (result.is_error, result.text, Some(answer)),
                    Err(unreadable) => (true, unreadable.to_string(), None),
                }
            }
            Err(CallError::NotSent(error)) => return Err(error),
            Err(CallError::Rpc(RpcError { message, .. })) => (true, message, None),
            Err(CallError::Refused(error)) => (true, format!("The server did not take the call. {error}"), None),
            Err(CallError::TimedOut) => {
                let seconds = self.settings.run_timeout.as_secs_f64();
                (true, format!("The tool did not answer within {seconds} s; it may still be running."), None)
            }
            Err(CallError::Untaken(oversize)) => {
                (true, format!("The tool has run, but its answer cannot be taken: {oversize}."), None)
            }
            Err(CallError::Lost(error)) => {
                (true, format!("The connection was lost during the call; the tool may have run. {error}"), None)
            }
        };
        let (result, held) = answer.map(|answer| (answer.result, answer.held)).unzip();
        Ok(Outcome { is_error, text, result, duration: place.asked.elapsed(), held })
    }

    /// One attempt at a call, and its span, which is to say what became of it. A session that could not take it is let go.
    async fn call(&self, server: &Server, call: &Call<'_>) -> Result<(Answer, Span), Failed> {
        let Call { tool, arguments, given, deadline, sent, span } = *call;
        let opening = traced::opening(span, server);
        let session = timeout_at(deadline, self.session(server, given, false)).await.unwrap_or(Err(Error::NotReady));
        traced::opened(opening, &session);
        let (session, new) = session.map_err(|error| {
            let again = matches!(error, Error::Reconfigured);
            Failed { error: CallError::NotSent(error), again }
        })?;
        sent.store(true, Ordering::Relaxed);
        let calling = traced::call(span, server, tool, &session, new);
        let counted = self.metrics.begin_call(session.transport());
        let called = session.call_tool(tool, arguments, calling.context(), deadline).await;
        counted.end(called.as_ref().map_or_else(CallError::result, |_| CallResult::Answered));
        match called {
            Ok(answer) => Ok((answer, calling)),
            Err(error) => {
                traced::failed(calling, &error);
                let again = !new && matches!(&error, CallError::NotSent(error) if !error.is_unasked());
                match &error {
                    CallError::NotSent(error) if error.is_unasked() => {}
                    // A new session says more of the server than this one.
                    CallError::NotSent(_) if again => self.pool.drop_session(&server.id, &session),
                    CallError::Lost(error) | CallError::Refused(error) if error.is_about_one_call() => {
                        self.pool.drop_session(&server.id, &session);
                    }
                    // What turned the call away or lost it may be all that is wrong: the next call gets a session of
                    // its own.
                    CallError::NotSent(error) | CallError::Refused(error) | CallError::Lost(error) => {
                        self.pool.discard(server, &session, error).await;
                    }
                    CallError::Rpc(_) | CallError::TimedOut | CallError::Untaken(_) => {}
                }
                Err(Failed { error, again })
            }
        }
    }

    /// Ends the server's session; calls that are under way finish on it.
    pub fn forget(&self, server_id: &str) {
        self.pool.forget(server_id);
    }

    /// As [`Mcp::forget`], of a server that was deleted: what its command kept on disk goes with it.
    pub fn deleted(&self, server_id: &str) {
        self.forget(server_id);
        let (children, server_id) = (self.children.clone(), server_id.to_owned());
        self.tracker.spawn_blocking(move || children.forget(&server_id));
    }

    /// Removes what commands of servers kept on disk that are not there any more, in the background.
    fn tidy(&self) {
        let mcp = self.clone();
        self.tracker.spawn(async move {
            let looking = mcp.children.clone();
            let Ok(mut folders) = tokio::task::spawn_blocking(move || looking.folders()).await else { return };
            let ids: Vec<String> = folders.known.values().cloned().collect();
            let Ok(existing) = mcp.store.existing_servers(&ids).await else { return };
            folders.known.retain(|_, id| !existing.contains(id));
            let mut last = String::new();
            while !folders.unknown.is_empty() {
                let Ok(ids) = mcp.store.server_ids_after(&last, IDS_AT_ONCE).await else { return };
                ids.iter().for_each(|id| folders.keep(id));
                let Some(id) = ids.into_iter().next_back() else { break };
                last = id;
            }
            let gone = folders.known.into_keys().chain(folders.unknown);
            let _ = tokio::task::spawn_blocking(move || mcp.children.remove_folders(gone)).await;
        });
    }

    /// Whether such a server may be had here. An argument with templates may be any; what it is then is looked at before
    /// each start.
    ///
    /// # Errors
    /// [`Error::StdioOff`], [`Error::NoTemplate`]: the policy for commands forbids it.
    pub fn check(&self, connector: &Connector) -> Result<(), Error> {
        self.children.check_unfilled(connector)
    }

    /// Takes note of the end of processes that are children of this one only because their parents are gone; see
    /// [`Children::reap_orphans`]. Takes a moment.
    pub fn reap_orphans(&self) {
        self.children.reap_orphans();
    }

    fn filled(&self, connector: &Connector, given: &Variables) -> Result<Filled, Error> {
        Filled::new(connector, &self.variables.choose_for(connector, given)?)
    }

    /// Reads the operator's variables again; how many there are now, `None` without a file.
    ///
    /// # Errors
    /// One sentence for the administrator; all values stay as they were.
    pub fn reload_variables(&self) -> Result<Option<usize>, VariablesFileError> {
        self.variables.reload()
    }

    /// How the last child of a server was confined; `None` when this process started none.
    pub fn confinement(&self, server_id: &str) -> Option<Arc<[String]>> {
        self.children.level(server_id)
    }

    /// Ends sessions of before `revision` of the server's configuration; calls that are under way finish.
    pub fn reconfigured(&self, server_id: &str, revision: i64) {
        self.pool.reconfigured(server_id, revision);
    }

    /// How sessions, children and calls stand, for the metrics.
    pub fn read(&self, readings: &mut Readings) {
        self.pool.read(readings);
    }

    /// Ends all sessions and their children, also those that are being opened or listed; done when nothing is left
    /// (`true`), or after 10 s.
    pub async fn close(&self) -> bool {
        self.pool.close();
        self.stop.cancel();
        self.tracker.close();
        timeout(CLOSE_TIMEOUT, self.tracker.wait()).await.is_ok()
    }
}

/// A call that is to be made.
struct Call<'a> {
    tool: &'a Tool,
    arguments: &'a Map<String, Value>,
    given: &'a Variables,
    deadline: Instant,
    sent: &'a AtomicBool,
    /// Of the run.
    span: &'a Span,
}

/// A call without a result, and whether another attempt may be made: nothing was sent, and the reason may be gone.
struct Failed {
    error: CallError,
    again: bool,
}

/// How many tools with hidden characters a sync names.
const MAX_FLAGGED: usize = 100;

fn flagged(offered: &[Offered]) -> Vec<Flagged> {
    let flagged = offered.iter().map(|tool| Flagged { name: tool.name.clone(), flags: flags(&tool.definition) });
    flagged.filter(|tool| !tool.flags.is_empty()).take(MAX_FLAGGED).collect()
}

/// What a status says of tools that were not kept.
fn notice(skipped: &[Skipped]) -> Option<String> {
    let first = skipped.first()?;
    let others = match skipped.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let name: String = first.name.chars().take(100).flat_map(char::escape_debug).collect();
    Some(format!("The tool \"{name}\"{others} could not be kept; a refresh says why."))
}
