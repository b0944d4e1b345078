//! What handlers share, and the life of a process: open, serve, drain, close. Tests and `main` run the same.

use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::Settings;
use crate::mcp::Mcp;
use crate::store::{OpenError, Store};
use crate::{api, serve};

/// Clones share everything.
#[derive(Clone)]
pub struct App {
    pub settings: Arc<Settings>,
    pub store: Store,
    pub mcp: Mcp,
}

/// Why Portolan does not start; each message is one sentence for the person who starts it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("Cannot make the data folder {folder:?}: {cause}.")]
    DataDir { folder: std::path::PathBuf, cause: std::io::Error },
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error("Cannot use the system's certificates for TLS: {0}.")]
    Client(#[from] reqwest::Error),
}

impl App {
    /// Makes the data folder if it is missing and opens the database.
    pub async fn open(settings: Settings) -> Result<Self, StartError> {
        let folder = &settings.storage.data_dir;
        make_private(folder).map_err(|cause| StartError::DataDir { folder: folder.clone(), cause })?;
        let url = settings.storage.database_url.as_ref().map(|url| url.expose());
        let store = Store::open(url, folder).await?;
        let mcp = Mcp::new(store.clone(), settings.upstream.clone())?;
        Ok(Self { settings: Arc::new(settings), store, mcp })
    }

    /// Serves the API on `listener` until `shutdown`, then finishes the requests that are under way within the drain
    /// time, ends every session and child, and closes the database. `false` when a session did not end in time.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) -> bool {
        serve::serve(listener, api::router(self.clone()), self.settings.entry.drain_timeout, shutdown).await;
        let clean = self.mcp.close().await;
        self.store.close().await;
        clean
    }
}

/// The folder holds other people's keys: only its owner gets in.
fn make_private(folder: &Path) -> std::io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)
}
