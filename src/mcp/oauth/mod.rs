//! Sign-in to MCP servers by OAuth: MCP authorization 2025-11-25 and 2026-07-28, RFC 6749, 7591, 7636, 8414, 8707, 9207, 9728.

mod connect;

use serde_json::value::RawValue;

use crate::model::{Connector, Server};

/// What a connect tells, in this order; the last one is `Success` or `Error` (CONTRACT row 24).
#[derive(Debug)]
pub enum ConnectEvent {
    ConnectionAttempt {
        server_name: String,
    },
    /// Each tool as the server wrote it.
    Success {
        tools: Vec<Box<RawValue>>,
    },
    /// One sentence for the person who connects.
    Error {
        message: String,
    },
    OauthRequired,
    /// What to open in a browser; `session_id` is `mcp-oauth-<8 hex>`.
    AuthorizationUrl {
        url: String,
        session_id: String,
    },
    WaitingForAuth,
}

/// Whom to connect to: a registered server, or a connector that is not registered.
pub enum Subject {
    Registered(Server),
    Unregistered { server_name: String, connector: Connector },
}

/// Why the answer of an authorization server was not taken, in Letta's sentences.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignInError {
    #[error("Missing state parameter")]
    MissingState,
    #[error("Invalid or expired state parameter")]
    InvalidState,
    /// What the authorization server says, bounded and without control characters.
    #[error("OAuth error: {error} - {description}")]
    Refused { error: String, description: String },
    #[error("Missing authorization code")]
    MissingCode,
    #[error("Failed to store authorization code")]
    NotStored,
    #[error("OAuth callback failed: {0}")]
    Failed(String),
}
