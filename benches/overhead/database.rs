//! The databases to measure on, and rows for them.

use std::path::Path;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, PgConnection};

use super::portolan::Registered;

pub(crate) struct Database {
    /// The URL of a PostgreSQL server; SQLite without.
    server: Option<String>,
}

/// A database that was made on a server.
pub(crate) struct Owned(Option<(String, String)>);

impl Database {
    pub(crate) fn sqlite() -> Self {
        Self { server: None }
    }

    pub(crate) fn postgres(server: String) -> Self {
        Self { server: Some(server) }
    }

    pub(crate) fn name(&self) -> &'static str {
        if self.server.is_some() { "PostgreSQL" } else { "SQLite" }
    }

    /// A fresh database: its URL, none for SQLite, which is in Portolan's data folder.
    pub(crate) async fn make(&self) -> (Option<String>, Owned) {
        let Some(server) = &self.server else { return (None, Owned(None)) };
        let name = format!("bench_{}", uuid::Uuid::new_v4().simple());
        let mut connection = PgConnection::connect(server).await.expect("the PostgreSQL server takes connections");
        connection.execute(AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.expect("its user may create");
        let mut url = url::Url::parse(server).expect("PORTOLAN_TEST_POSTGRES_URL is a URL");
        url.set_path(&name);
        (Some(url.into()), Owned(Some((server.clone(), name))))
    }

    /// Registers `count` more servers, like `pattern` but for their names, with three tools each, like those of `live`.
    /// Straight into the tables of a running Portolan: over the API it would take minutes.
    pub(crate) async fn fill(&self, url: Option<&str>, data: &Path, count: usize, pattern: &str, live: &str) {
        let Some(last) = count.checked_sub(1) else { return };
        let number = format!("WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {last})");
        let uuid = format!("0000000-0000-4000-8000-' || CAST({FIRST} + n.i AS TEXT)");
        let sql = format!(
            "{number} INSERT INTO servers \
             (id, server_name, type, config, revision, era, state, error, last_synced_at, created_at, updated_at) \
             SELECT 'mcp_server-0{uuid}, 'server ' || CAST(n.i AS TEXT), type, config, revision, era, state, error, \
             last_synced_at, created_at, updated_at FROM n, servers WHERE servers.id = '{pattern}'; \
             {number} INSERT INTO tools (id, server_id, name, name_digest, position, definition) \
             SELECT 'tool-' || CAST(position AS TEXT) || '{uuid}, 'mcp_server-0{uuid}, name, name_digest, position, \
             definition FROM n, tools WHERE tools.server_id = '{live}' AND position < 3; \
             ANALYZE;"
        );
        let sql = sqlx::raw_sql(AssertSqlSafe(sql));
        match url {
            Some(url) => {
                let mut connection = PgConnection::connect(url).await.expect("the database takes connections");
                sql.execute(&mut connection).await.expect("the tables are as they were");
            }
            None => {
                let file = SqliteConnectOptions::new().filename(data.join("portolan.db"));
                let mut connection = file.connect().await.expect("the file is there");
                sql.execute(&mut connection).await.expect("the tables are as they were");
                connection.close().await.expect("nothing is open");
            }
        }
    }
}

/// Twelve digits, as the end of a UUID has.
const FIRST: u64 = 100_000_000_000;

/// One of the servers that [`Database::fill`] registers, from 0. `echo` is the first of the fake's tools.
pub(crate) fn filler(number: usize) -> Registered {
    let uuid = format!("00000000-0000-4000-8000-{}", FIRST + number as u64);
    Registered { server: format!("mcp_server-{uuid}"), tool: format!("tool-{uuid}") }
}

impl Owned {
    pub(crate) async fn remove(self) {
        let Some((server, name)) = self.0 else { return };
        let mut connection = PgConnection::connect(&server).await.expect("the PostgreSQL server takes connections");
        let drop = AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"));
        connection.execute(drop).await.expect("its user may drop");
    }
}
