//! A sign-in that was made before its server was registered goes with the registration. That is the order in which
//! letta-code does it, and Letta links them so, too: by the caller and the URL.

use crate::model::{Action, By, Connector, Server};
use crate::store;

use super::super::Mcp;
use super::connect::Ended;

impl Mcp {
    /// Takes over the last sign-in that `by` has made to the URL of this server, which is new, when it was not registered
    /// yet. It is there for as long as the sign-in might have taken, and for one server.
    pub async fn adopt_sign_in(&self, server: &Server, by: &By) -> Result<(), store::Error> {
        let Ok(Connector::Sse(remote) | Connector::StreamableHttp(remote)) = &server.config.0 else { return Ok(()) };
        for made in self.store.unclaimed_authorizations(by.name().unwrap_or_default()).await? {
            let Some(Ok(Ended::Well(Some(sign_in)))) = made.material.map(|made| serde_json::from_slice(&made)) else {
                continue;
            };
            if sign_in.server_url != remote.server_url {
                continue;
            }
            let (made, action) = (Some(made.id.as_str()), Action::SignInAdopted);
            // Another new server may have been quicker.
            if self.store.put_sign_in(&server.id, &sign_in, made, action, by).await?.is_some() {
                tracing::info!(server.id, caller.name = by.name(), "a new server takes a sign-in over");
                break;
            }
        }
        Ok(())
    }
}
