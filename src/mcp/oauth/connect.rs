//! Connecting to a server while somebody watches.

use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::{Connector, Server};

use super::super::session::Listed;
use super::super::{Error, Mcp, SyncError, Variables};
use super::{ConnectEvent, SignInError, Subject};

/// How many events wait for their reader; a connect has six at most.
const EVENTS: usize = 8;

impl Mcp {
    /// Connects to a server and says how it goes; a registered one has its tools synced at the end. Ends when the receiver
    /// is dropped. `caller` is the name of who asks, `given` its values for templates.
    pub fn connect(
        &self,
        subject: Subject,
        _redirect_uri: Option<String>,
        _caller: &str,
        given: Variables,
    ) -> mpsc::Receiver<ConnectEvent> {
        let (events, receiver) = mpsc::channel(EVENTS);
        let (mcp, stop) = (self.clone(), self.stop.clone());
        let connecting = async move {
            let server_name = match &subject {
                Subject::Registered(server) => server.server_name.clone(),
                Subject::Unregistered { server_name, .. } => server_name.clone(),
            };
            let attending = async {
                let _ = events.send(ConnectEvent::ConnectionAttempt { server_name }).await;
                let listed = match &subject {
                    Subject::Registered(server) => {
                        mcp.sync_and_list(server, &given).await.map_err(|error| error.to_string())
                    }
                    Subject::Unregistered { connector, .. } => {
                        mcp.try_out(connector, &given).await.map_err(|error| error.to_string())
                    }
                };
                let last = match listed {
                    Ok(tools) => ConnectEvent::Success { tools },
                    Err(message) => ConnectEvent::Error { message },
                };
                let _ = events.send(last).await;
            };
            tokio::select! {
                () = attending => {}
                () = events.closed() => {}
            }
        };
        self.tracker.spawn(async move { stop.run_until_cancelled(connecting).await });
        receiver
    }

    /// Takes the answer of an authorization server, which comes with `state`. Returns the URL of the server that was
    /// signed in to.
    pub async fn finish_sign_in(
        &self,
        state: Option<&str>,
        _answer: Result<&str, (&str, Option<&str>)>,
        _iss: Option<&str>,
    ) -> Result<String, SignInError> {
        match state.filter(|state| !state.is_empty()) {
            None => Err(SignInError::MissingState),
            Some(_) => Err(SignInError::InvalidState),
        }
    }

    /// The tools of a connector that is not registered, each as the server wrote it; nothing is stored.
    pub async fn try_out(&self, connector: &Connector, given: &Variables) -> Result<Vec<Box<RawValue>>, Error> {
        // A command has folders under the name of its server, which go with it.
        let id = format!("unregistered-{}", Uuid::new_v4());
        let listed = self.list_apart(&id, connector, given).await;
        self.deleted(&id);
        Ok(listed?.tools)
    }

    async fn list_apart(&self, id: &str, connector: &Connector, given: &Variables) -> Result<Listed, Error> {
        let session = self.pool.open_apart(id, connector, given).await?;
        session.list_tools(None, Instant::now() + self.settings.list_timeout).await
    }

    /// The tools of a registered server as it lists them now, each as it wrote it; nothing is stored.
    pub async fn live_tools(&self, server: &Server, given: &Variables) -> Result<Vec<Box<RawValue>>, Error> {
        Ok(self.list(server, None, given, true).await?.0.tools)
    }

    /// As [`Mcp::sync_tools`]; returns the tools as the server wrote them.
    pub(super) async fn sync_and_list(
        &self,
        server: &Server,
        given: &Variables,
    ) -> Result<Vec<Box<RawValue>>, SyncError> {
        let turn = self.turn(&server.id);
        let _turn = turn.lock().await;
        let server = self.store.server(&server.id).await?.ok_or(SyncError::Gone)?;
        let (listed, era) = self.list(&server, None, given, true).await?;
        self.keep(&server, given, &listed, era).await?;
        Ok(listed.tools)
    }
}
