//! Why a server cannot be used, and what follows from that.

use std::time::Duration;

use http::StatusCode;

use crate::model::{State, Unreadable};
use crate::store;

use super::address::Forbidden;
use super::budget::Oversize;
use super::oauth::Problem;
use super::remote::HttpError;

/// How long a server is left alone whose address may not be connected to.
const FORBIDDEN_PAUSE: Duration = Duration::from_secs(30);

/// Why a server cannot be used now; each message is one sentence for the person who registered it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", spawn_reason(*.0))]
    Spawn(std::io::ErrorKind),
    #[error("The command was not started: --child-landlock is required, and this kernel has no Landlock.")]
    Unconfined,
    #[error("Servers that are commands are switched off here; --stdio and MCP_DISABLE_STDIO set that.")]
    StdioOff,
    #[error("This command line is none of those that --stdio-templates names, and may not be used.")]
    NoTemplate,
    /// A template of its configuration cannot be filled in.
    #[error(
        "The variable {name} has no value; give it one in the header x-portolan-variables or in the file of \
         --variables-file, or write a default, as {{{{ {name} | default }}}}."
    )]
    NoValue { name: String },
    /// What came of a template is not what may be configured.
    #[error("The values of its variables make {place} one that cannot be used; nothing was sent.")]
    BadValue { place: String },
    #[error("As many callers as may have values of their own at this server are busy; try again in a moment.")]
    NoVariantFree,
    #[error("The command ended ({status}){}.", last_words(.stderr.as_deref()))]
    Exited { status: std::process::ExitStatus, stderr: Option<String> },
    #[error("{}", http_reason(.0))]
    Http(HttpError),
    #[error("The server_url is not one that can be used; set it again with PATCH.")]
    Url,
    #[error(
        "The server did not finish the MCP handshake in time{}; --handshake-timeout and --start-timeout set it.",
        last_words(.stderr.as_deref())
    )]
    HandshakeTimeout { stderr: Option<String> },
    #[error("The server refused the MCP handshake with JSON-RPC error {code}.")]
    HandshakeRefused { code: i64 },
    #[error("The server's answer to the MCP handshake cannot be understood.")]
    Handshake,
    #[error("The server speaks no MCP revision that Portolan knows.")]
    Revision,
    #[error("The server's endpoint event names no address on the server's own origin.")]
    Endpoint,
    #[error("The server ended the connection.")]
    Closed,
    #[error("The server does not know its session any more.")]
    SessionExpired,
    #[error("The server does not read what it is sent.")]
    NotReading,
    #[error("The server was not ready within the time that a run may take; --run-timeout sets it.")]
    NotReady,
    #[error("The server's answer cannot be taken: {0}.")]
    Oversize(#[from] Oversize),
    #[error("The database is not available; try again in a moment.")]
    Store,
    #[error("The server's answer is not a list of tools.")]
    List,
    #[error("The server refused to list its tools with JSON-RPC error {code}.")]
    ListRefused { code: i64 },
    #[error("The server did not list its tools in time; --list-timeout sets it.")]
    ListTimeout,
    #[error("The server's list of tools does not come to an end: a cursor came twice, or the list is too large.")]
    Paging,
    #[error("The server's configuration was changed meanwhile; refresh it again.")]
    Reconfigured,
    #[error("The server was deleted meanwhile.")]
    Deleted,
    #[error("A configured header is not valid HTTP; set custom_headers and auth_token again.")]
    Header,
    #[error(transparent)]
    Config(Unreadable),
    #[error("Portolan is stopping.")]
    Stopping,
    #[error("The server has as many calls as it may have, and as many waiting; try again in a moment.")]
    QueueFull,
    #[error("The server had no time for this call, which was not sent; try again in a moment.")]
    QueueTimeout,
    #[error("As many stdio servers as may run are busy; try again in a moment, or raise --max-children.")]
    NoChildFree,
    #[error("{reason} Portolan tries it again in {} s.", .rest.as_secs_f64().ceil())]
    Resting { reason: Box<Error>, rest: Duration },
}

impl Error {
    /// The server was there and did not like how it was greeted; another handshake may do.
    pub(super) fn is_about_the_handshake(&self) -> bool {
        matches!(
            self,
            Self::HandshakeRefused { .. } | Self::Handshake | Self::Revision | Self::Closed | Self::Exited { .. }
        ) || match self {
            // One that asks for a pause gets it.
            Self::Http(HttpError::Status { status, retry_after }) => {
                retry_after.is_none() && *status != StatusCode::TOO_MANY_REQUESTS
            }
            Self::Http(HttpError::ContentType | HttpError::NoAnswer) => true,
            _ => false,
        }
    }

    /// It is about Portolan, and says nothing about the server.
    pub(super) fn is_ours(&self) -> bool {
        // Another Portolan on the same database may have the key.
        matches!(self, Self::Config(unreadable) if unreadable.is_sealed())
            || matches!(
                self,
                Self::StdioOff
                    | Self::NoTemplate
                    | Self::NoValue { .. }
                    | Self::BadValue { .. }
                    | Self::NoVariantFree
                    | Self::Reconfigured
                    | Self::Deleted
                    | Self::Stopping
                    | Self::Store
                    | Self::QueueFull
                    | Self::QueueTimeout
                    | Self::NoChildFree
                    | Self::NotReady
                    | Self::Resting { .. }
            )
    }

    /// Nobody has asked the server: the same request may find its answer in a moment, or at another Portolan.
    pub fn is_unasked(&self) -> bool {
        matches!(self, Self::Store | Self::Stopping)
    }

    /// It is about the values of variables.
    pub fn is_about_values(&self) -> bool {
        matches!(self, Self::NoValue { .. } | Self::BadValue { .. })
    }

    /// It is about one call: the server may be well.
    pub(super) fn is_about_one_call(&self) -> bool {
        match self {
            Self::SessionExpired | Self::Oversize(_) => true,
            Self::Http(HttpError::Status { .. }) => self.pause().is_none(),
            Self::Http(HttpError::ContentType | HttpError::NoAnswer | HttpError::Oversize(_)) => true,
            _ => false,
        }
    }

    /// How long the server asks not to be called.
    pub(super) fn pause(&self) -> Option<Duration> {
        match self {
            Self::Http(HttpError::Status { retry_after, .. }) => *retry_after,
            // Only another configuration, or another answer to the look-up of a name, makes a difference.
            Self::Http(HttpError::Forbidden(_)) | Self::Url => Some(FORBIDDEN_PAUSE),
            _ => None,
        }
    }

    /// The server may come back by itself, and is worth a look now and then.
    pub(super) fn may_pass(&self) -> bool {
        let is_refused = matches!(self, Self::Http(HttpError::Forbidden(_)) | Self::Url);
        !self.is_ours() && !is_refused && self.state() == State::Unreachable
    }

    /// In what time another attempt may do, when the attempt at hand was not even made.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Resting { rest, .. } => Some(*rest),
            Self::Http(HttpError::NoToken(_))
            | Self::QueueFull
            | Self::QueueTimeout
            | Self::NoChildFree
            | Self::NoVariantFree
            | Self::Store
            | Self::Stopping => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    pub(super) fn state(&self) -> State {
        match self {
            Self::Http(HttpError::SignIn(_)) => State::AuthRequired,
            _ => State::Unreachable,
        }
    }
}

impl From<HttpError> for Error {
    fn from(error: HttpError) -> Self {
        match error {
            // The server has no part in it.
            HttpError::NoToken(problem) if matches!(*problem, Problem::Store) => Self::Store,
            HttpError::NoToken(problem) if matches!(*problem, Problem::Stopping) => Self::Stopping,
            error => Self::Http(error),
        }
    }
}

impl From<Forbidden> for Error {
    fn from(forbidden: Forbidden) -> Self {
        Self::Http(HttpError::Forbidden(forbidden))
    }
}

fn http_reason(error: &HttpError) -> String {
    match error {
        HttpError::Forbidden(forbidden) => format!("This address may not be connected to: {forbidden}."),
        error => format!("The server cannot be used: {error}."),
    }
}

fn spawn_reason(kind: std::io::ErrorKind) -> &'static str {
    match kind {
        std::io::ErrorKind::NotFound => "The command was not found; check its name and the PATH of Portolan.",
        std::io::ErrorKind::PermissionDenied => "The command may not be executed; check its permissions.",
        std::io::ErrorKind::TimedOut => "The command could not be started in time.",
        _ => "The command could not be started.",
    }
}

fn last_words(stderr: Option<&str>) -> String {
    stderr.map(|text| format!("; its standard error ends with \"{text}\"")).unwrap_or_default()
}

/// Why a sync did not happen.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    #[error("the server was deleted meanwhile")]
    Gone,
    #[error(transparent)]
    Server(Error),
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl From<Error> for SyncError {
    fn from(error: Error) -> Self {
        match error {
            Error::Deleted => Self::Gone,
            error => Self::Server(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_portolan_itself_cannot_look_up_is_no_fault_of_the_server() {
        for problem in [Problem::Store, Problem::Stopping] {
            let error = Error::from(HttpError::from(problem));
            assert!(error.is_unasked() && error.is_ours() && error.retry_after().is_some(), "{error}");
        }
        let error = Error::from(HttpError::from(Problem::TimedOut));
        assert!(!error.is_unasked() && error.retry_after().is_some(), "{error}");
    }
}
