//! Every setting, one struct per concern. A field's doc comment is its line in `--help`; each is a flag and an
//! environment variable alike, and the flag wins.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::{NonEmptyStringValueParser, OsStr, Resettable};
use clap::{Arg, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use url::{Host, Url};

use crate::interchange::Format;
use crate::model::{Scope, Secret};

/// Portolan: the MCP-servers part of the Letta API, served from your own machine.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub settings: Settings,
    /// Print one JSON document on standard output, and nothing else: what was done, or {"error": …}
    #[arg(long, global = true)]
    pub json: bool,
}

impl Cli {
    /// What the command line says, and the environment where it says nothing. A variable that is set and empty is one that is
    /// not set: compose files and unit files pass those that nobody gave a value. Not so where that would open a door or
    /// lead to another database ([`NEVER_EMPTY`]).
    ///
    /// # Errors
    /// Those of clap, help and version among them.
    pub fn read() -> Result<Self, clap::Error> {
        let mut command = Self::command().mut_args(without_empty_variable);
        let matches = command.try_get_matches_from_mut(std::env::args_os())?;
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }
}

/// Settings whose empty variable is taken as it stands, and refused: without them strangers come in, secrets are sealed with
/// another key, servers are in another database, or commands and addresses are no longer kept in bounds.
const NEVER_EMPTY: [&str; 18] = [
    "token",
    "token_file",
    "tokens_file",
    "letta_server_password",
    "key",
    "key_file",
    "database_url",
    "database_url_file",
    "data_dir",
    "stdio",
    "stdio_templates",
    "egress",
    "egress_deny",
    "child_user",
    "child_wrapper",
    "child_landlock",
    "child_max_processes",
    "tool_changes",
];

fn without_empty_variable(setting: Arg) -> Arg {
    let is_empty = setting.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    match is_empty && !NEVER_EMPTY.contains(&setting.get_id().as_str()) {
        true => setting.env(Resettable::<OsStr>::Reset),
        false => setting,
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the API (what happens without a command, too)
    Serve,
    /// Ask the Portolan of this machine how it is, as a container's health check does: status 0 when it is well
    Healthcheck(Healthcheck),
    /// Make a key that seals stored secrets, or give one up
    #[command(subcommand)]
    Key(KeyCommand),
    /// Take over the MCP servers of a Letta V1 database, which is only read: servers, tools, headers, tokens and sign-ins
    MigrateLetta(MigrateLetta),
    /// Seal all stored secrets again with the first key of the key file, while Portolan serves
    RotateKeys {
        /// Only say how many servers each key seals
        #[arg(long)]
        dry_run: bool,
    },
    /// Make tokens for clients
    #[command(subcommand)]
    Token(Token),
    /// Register the servers of a configuration file: mcpServers (Claude, Cursor, Windsurf, Letta) or servers (VS Code)
    Import {
        /// The file, at most 1 MiB; - reads standard input
        file: PathBuf,
        /// Whose file it is; without it, its shape says so
        #[arg(long, value_enum)]
        format: Option<Format>,
        /// Also remove the servers that are not in the file
        #[arg(long)]
        replace: bool,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Write the servers as the configuration file of another program
    Export {
        /// For which program
        #[arg(long, value_enum, default_value = "claude")]
        format: Format,
        /// With secrets in clear; without it, each is a variable to be set
        #[arg(long)]
        secrets: bool,
        /// The file to write, with mode 0600 when it holds secrets; without it, standard output
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

impl Command {
    /// Whether it needs the database, and so its URL.
    pub fn uses_database(&self) -> bool {
        !matches!(self, Self::Healthcheck(_) | Self::Token(_) | Self::Key(KeyCommand::New))
    }
}

/// What a health check asks, and whom.
#[derive(Args, Clone, Debug)]
pub struct Healthcheck {
    /// Where Portolan is, as `http://127.0.0.1:8283`; without it, where --listen says, on this machine
    #[arg(long, value_parser = plain_url, value_name = "URL")]
    pub url: Option<Url>,
    /// Also ask whether its database answers. Not for what starts Portolan anew: that does not bring a database back
    #[arg(long)]
    pub ready: bool,
}

#[derive(Clone, Debug, Subcommand)]
pub enum KeyCommand {
    /// Print a new key; (umask 077; portolan key new > portolan.key) keeps it in a file
    New,
    /// Go on without a key that is lost for good; the servers it sealed can only be deleted then
    Forget {
        /// The id of the key, as the refused start names it
        id: String,
    },
}

/// Where Letta's data is, and what of it to take.
#[derive(Args, Clone, Debug)]
pub struct MigrateLetta {
    /// Letta's database, postgres://… or sqlite:FILE; better given as the variable, because it has a password
    #[arg(long, env = "LETTA_PG_URI", hide_env_values = true, value_parser = secret, value_name = "URL")]
    pub from: Secret,
    /// Only say what would come and what would not
    #[arg(long)]
    pub dry_run: bool,
    /// File that holds Letta's LETTA_ENCRYPTION_KEY, instead of that variable
    #[arg(long, value_name = "FILE")]
    pub encryption_key_file: Option<PathBuf>,
    /// What Letta sealed its secrets with; given as the variable
    #[arg(long, env = "LETTA_ENCRYPTION_KEY", hide = true, hide_env_values = true, value_parser = secret, value_name = "KEY")]
    pub letta_encryption_key: Option<Secret>,
    /// Take every value as it stands: Letta had no LETTA_ENCRYPTION_KEY, and some only look sealed
    #[arg(long)]
    pub unsealed: bool,
    /// Take servers whose secrets cannot be opened without them, rather than leave those servers
    #[arg(long)]
    pub without_secrets: bool,
    /// Take the servers of one organization, by its id or name; without it, those of all
    #[arg(long, value_name = "ORGANIZATION")]
    pub organization: Option<String>,
    /// PostgreSQL schema of Letta's tables; without it, the one that has them
    #[arg(long, value_name = "NAME")]
    pub schema: Option<String>,
    /// Read a version of Letta's schema that is not known here, too
    #[arg(long)]
    pub any_version: bool,
}

#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make a token: print it once, and the line by which Portolan knows it
    New {
        /// What it is called in the tokens file and in the log: 1 to 64 letters, digits, dots, hyphens and underscores
        name: String,
        /// What it allows: read (see servers and tools), run (run tools, too) or admin (everything; a shell on this host)
        #[arg(long, value_parser = scope, value_name = "SCOPE")]
        scope: Scope,
        /// Tokens file to add the line to; made with mode 0600 when missing
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
}

#[derive(Args, Clone, Debug)]
pub struct Settings {
    #[command(flatten)]
    pub entry: Entry,
    #[command(flatten)]
    pub browsers: Browsers,
    #[command(flatten)]
    pub tokens: Tokens,
    #[command(flatten)]
    pub storage: Storage,
    #[command(flatten)]
    pub secrets: Secrets,
    #[command(flatten)]
    pub logs: Logs,
    #[command(flatten)]
    pub metrics: Metrics,
    #[command(flatten)]
    pub run_log: RunLog,
    #[command(flatten)]
    pub traces: Traces,
    #[command(flatten)]
    pub upstream: Upstream,
    #[command(flatten)]
    pub variables: Variables,
    #[command(flatten)]
    pub egress: Egress,
    #[command(flatten)]
    pub children: Children,
    #[command(flatten)]
    pub runs: Runs,
}

/// Where clients come in.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Clients")]
pub struct Entry {
    /// Address and port to listen on; port 0 takes a free one and prints it
    #[arg(long, env = "PORTOLAN_LISTEN", default_value = "127.0.0.1:8283", global = true, value_name = "ADDRESS")]
    pub listen: String,
    /// How long a client may take for the headers of a request
    #[arg(long, env = "PORTOLAN_HEADER_TIMEOUT", default_value = "10s", value_parser = duration, global = true, value_name = "TIME")]
    pub header_timeout: Duration,
    /// How long a request's body may be silent; each 8 KiB of it buys a second
    #[arg(long, env = "PORTOLAN_BODY_TIMEOUT", default_value = "10s", value_parser = duration, global = true, value_name = "TIME")]
    pub body_timeout: Duration,
    /// How long a client may leave its answer unread; each 8 KiB that it takes buys a second
    #[arg(long, env = "PORTOLAN_WRITE_TIMEOUT", default_value = "30s", value_parser = duration, global = true, value_name = "TIME")]
    pub write_timeout: Duration,
    /// How long a connection is kept for another request; with less than 70s, an SDK that meets the end of one may be given
    /// the outcome of an equal run just before
    #[arg(long, env = "PORTOLAN_KEEP_ALIVE_TIMEOUT", default_value = "75s", value_parser = duration, global = true, value_name = "TIME")]
    pub keep_alive_timeout: Duration,
    /// How many connections may be open; those that wait longest for their clients make room for the next
    #[arg(long, env = "PORTOLAN_MAX_CONNECTIONS", default_value_t = 8192, value_parser = at_least_one, global = true, value_name = "NUMBER")]
    pub max_connections: usize,
    /// How many requests may be in flight, not counting those that wait for their clients; more are answered 503
    #[arg(long, env = "PORTOLAN_MAX_REQUESTS", default_value_t = 1024, value_parser = at_least_one, global = true, value_name = "NUMBER")]
    pub max_requests: usize,
    /// How many bytes of request bodies may be held while they are read, the first 16 KiB of each apart; more are answered
    /// 503
    #[arg(long, env = "PORTOLAN_MAX_BODY_BYTES_IN_FLIGHT", default_value_t = 256 * 1024 * 1024, global = true, value_name = "BYTES")]
    pub max_body_bytes_in_flight: usize,
    /// How long a stop waits for requests that are being answered; after nine tenths of it, runs are answered with an error
    #[arg(long, env = "PORTOLAN_DRAIN_TIMEOUT", default_value = "25s", value_parser = duration, global = true, value_name = "TIME")]
    pub drain_timeout: Duration,
}

/// Web pages stay out, unless they are listed here.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Browsers")]
pub struct Browsers {
    /// Names under which Portolan is reached, beside localhost, 127.0.0.1 and ::1, separated by commas, without ports; with a
    /// token and none listed, any name
    #[arg(long, env = "PORTOLAN_ALLOWED_HOSTS", value_delimiter = ',', value_parser = host, global = true, value_name = "NAMES")]
    pub allowed_hosts: Vec<Host>,
    /// Web pages of other origins that may use Portolan, as `https://app.example.com`, separated by commas; * is all of them and
    /// needs a token
    #[arg(long, env = "PORTOLAN_CORS_ORIGINS", value_delimiter = ',', value_parser = origin, global = true, value_name = "ORIGINS")]
    pub cors_origins: Vec<Origin>,
}

/// Where a web page comes from: scheme, host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Any,
    /// As browsers write it in the header `Origin`.
    One(String),
}

/// Who may come in. Without any of these everybody may who reaches Portolan, and it listens on loopback alone.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Tokens")]
pub struct Tokens {
    /// File of tokens, a line name:scope:sha256 for each, as `portolan token new` writes them; read again on SIGHUP
    #[arg(long, env = "PORTOLAN_TOKENS_FILE", global = true, value_name = "FILE")]
    pub tokens_file: Option<PathBuf>,
    /// An admin token; better given as the variable, because every user of this machine can read command lines
    #[arg(long, env = "PORTOLAN_TOKEN", hide_env_values = true, value_parser = secret, global = true, value_name = "TOKEN")]
    pub token: Option<Secret>,
    /// File that holds an admin token and nothing else; read again on SIGHUP
    #[arg(long, env = "PORTOLAN_TOKEN_FILE", global = true, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// An admin token under the name that Letta gave it; better given as the variable, too
    #[arg(long, env = "LETTA_SERVER_PASSWORD", hide_env_values = true, value_parser = secret, global = true, value_name = "TOKEN")]
    pub letta_server_password: Option<Secret>,
}

impl Tokens {
    /// Whether there is any; a file without a token refuses to be one.
    pub fn are_given(&self) -> bool {
        self.token.is_some() || self.letta_server_password.is_some() || self.are_in_files()
    }

    /// Whether some can change while Portolan runs.
    pub fn are_in_files(&self) -> bool {
        self.tokens_file.is_some() || self.token_file.is_some()
    }
}

/// What Portolan keeps, and where.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Storage")]
pub struct Storage {
    /// Folder for everything Portolan keeps on disk; made with mode 0700 when missing
    #[arg(long, env = "PORTOLAN_DATA_DIR", default_value = "./portolan-data", global = true, value_name = "FOLDER")]
    pub data_dir: PathBuf,
    /// Database, postgres://… or sqlite:FILE; without it, SQLite in the data folder
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_parser = secret, global = true, value_name = "URL")]
    pub database_url: Option<Secret>,
    /// File that holds that URL and nothing else, for secrets that come as files
    #[arg(long, env = "DATABASE_URL_FILE", global = true, value_name = "FILE")]
    pub database_url_file: Option<PathBuf>,
    /// How many connections to PostgreSQL this Portolan holds at most; those of all replicas must fit into its max_connections
    #[arg(long, env = "PORTOLAN_DATABASE_CONNECTIONS", default_value_t = 16, value_parser = at_least_one, global = true, value_name = "NUMBER")]
    pub database_connections: usize,
}

/// Why the URL of the database cannot be had from its file; each message is one sentence for the person who starts Portolan.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseUrlError {
    #[error("Give one of DATABASE_URL and a file that holds it (--database-url-file, DATABASE_URL_FILE), not both.")]
    Both,
    #[error("The file of --database-url-file cannot be read: {0}.")]
    Unreadable(std::io::Error),
    #[error("The file of --database-url-file is empty; it should hold a URL, postgres://… or sqlite:FILE.")]
    Empty,
}

impl Storage {
    /// Takes the URL from its file, if it is in one.
    ///
    /// # Errors
    /// One sentence for the person who starts Portolan; nothing of the file is in it.
    pub fn read_url(&mut self) -> Result<(), DatabaseUrlError> {
        let Some(file) = &self.database_url_file else { return Ok(()) };
        if self.database_url.is_some() {
            return Err(DatabaseUrlError::Both);
        }
        let text = std::fs::read_to_string(file).map_err(DatabaseUrlError::Unreadable)?;
        let url = Some(text.trim()).filter(|url| !url.is_empty()).ok_or(DatabaseUrlError::Empty)?;
        self.database_url = Some(url.to_owned().into());
        Ok(())
    }
}

/// Secrets that Portolan keeps, and who sees them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Secrets")]
pub struct Secrets {
    /// File of the keys that stored secrets are sealed with, one in each line; the first one seals, the others only open.
    /// SQLite without a key makes portolan.key in the data folder
    #[arg(long, env = "PORTOLAN_KEY_FILE", global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// The one key itself, 32 bytes in base64 or hexadecimal. Give it as a variable: command lines can be read by all
    #[arg(long, env = "PORTOLAN_KEY", hide_env_values = true, value_parser = secret, global = true, value_name = "KEY")]
    pub key: Option<Secret>,
    /// How answers show tokens, header values and what else is secret: masked, or in full to admins, as Letta did
    #[arg(long, env = "PORTOLAN_SECRETS_IN_RESPONSES", default_value = "masked", global = true, value_name = "HOW")]
    pub secrets_in_responses: SecretsInResponses,
}

/// How answers show secrets (CONTRACT row 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SecretsInResponses {
    Masked,
    Full,
}

/// What Portolan tells its administrator.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logs")]
pub struct Logs {
    /// What to log on standard error: a level (error, warn, info, debug, trace), or levels per module as in
    /// `info,portolan::mcp=debug`
    #[arg(long, env = "PORTOLAN_LOG", default_value = "info", global = true, value_name = "FILTER")]
    pub log: String,
}

/// What Portolan tells Prometheus.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Metrics")]
pub struct Metrics {
    /// Address and port for the metrics alone, without a token: whoever reaches it may read them; without it, they are at
    /// /metrics of --listen, for tokens
    #[arg(long, env = "PORTOLAN_METRICS_LISTEN", global = true, value_name = "ADDRESS")]
    pub metrics_listen: Option<String>,
}

/// What is remembered of runs and changes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Run log")]
pub struct RunLog {
    /// Keep the arguments and the result of each run, too, sealed, the first 16 KiB of each; admins can read them
    #[arg(long, env = "PORTOLAN_LOG_ARGUMENTS", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, value_parser = switch, action = clap::ArgAction::Set, global = true, value_name = "true|false")]
    pub log_arguments: bool,
    /// How long runs are remembered
    #[arg(long, env = "PORTOLAN_KEEP_RUNS", default_value = "30days", value_parser = long_time, global = true, value_name = "TIME")]
    pub keep_runs: Duration,
    /// How long changes to servers, tools and sign-ins are remembered
    #[arg(long, env = "PORTOLAN_KEEP_CHANGES", default_value = "365days", value_parser = long_time, global = true, value_name = "TIME")]
    pub keep_changes: Duration,
}

/// Traces of runs, for a collector that speaks OpenTelemetry.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Traces")]
pub struct Traces {
    /// Collector that is sent a trace of each run (OTLP over HTTP, protobuf), as `http://localhost:4318`; /v1/traces is added.
    /// Without one, there are none
    #[arg(long, env = "PORTOLAN_OTLP_ENDPOINT", hide_env_values = true, value_parser = secret, global = true, value_name = "URL")]
    pub otlp_endpoint: Option<Secret>,
    /// The same under the name that OpenTelemetry gave it
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", hide_env_values = true, value_parser = secret, global = true, value_name = "URL")]
    pub otel_exporter_otlp_endpoint: Option<Secret>,
    /// The same, the whole URL with its path
    #[arg(long, env = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", hide_env_values = true, value_parser = secret, global = true, value_name = "URL")]
    pub otel_exporter_otlp_traces_endpoint: Option<Secret>,
    /// How many of the runs are traced whose callers are in no trace, from 0 (none) to 1 (all); others are as their callers say
    #[arg(long, env = "PORTOLAN_OTLP_SAMPLE", default_value_t = 1.0, value_parser = share, global = true, value_name = "SHARE")]
    pub otlp_sample: f64,
    /// File of header fields for the collector, a line name=value for each, values percent-encoded
    #[arg(long, env = "PORTOLAN_OTLP_HEADERS_FILE", global = true, value_name = "FILE")]
    pub otlp_headers_file: Option<PathBuf>,
    /// The same, separated by commas; better given as the variable, because every user of this machine can read command lines
    #[arg(long, env = "PORTOLAN_OTLP_HEADERS", hide_env_values = true, value_parser = secret, global = true, value_name = "HEADERS")]
    pub otlp_headers: Option<Secret>,
    /// The same under the name that OpenTelemetry gave it
    #[arg(long, env = "OTEL_EXPORTER_OTLP_HEADERS", hide_env_values = true, value_parser = secret, global = true, value_name = "HEADERS")]
    pub otel_exporter_otlp_headers: Option<Secret>,
}

/// The address of a collector says too little or too much. Whatever it is, it is not repeated: a password may stand in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoCollector;

impl Traces {
    /// The URL that traces are sent to; `None` when there is no collector.
    ///
    /// # Errors
    /// [`NoCollector`].
    pub fn endpoint(&self) -> Result<Option<Url>, NoCollector> {
        // An empty text stands for no setting (OpenTelemetry, environment variables).
        let given = |setting: &Option<Secret>| match setting.as_ref().map(|text| text.expose().trim()) {
            None | Some("") => Ok(None),
            Some(text) => collector(text).map(Some),
        };
        let below = |mut url: Url| {
            url.set_path(&format!("{}/v1/traces", url.path().trim_end_matches('/')));
            url
        };
        let own = given(&self.otlp_endpoint)?.map(below);
        let traces = given(&self.otel_exporter_otlp_traces_endpoint)?;
        let all = given(&self.otel_exporter_otlp_endpoint)?.map(below);
        Ok(own.or(traces).or(all))
    }

    /// The header fields for the collector, unless they are in a file.
    pub fn headers(&self) -> Option<&Secret> {
        self.otlp_headers.as_ref().or(self.otel_exporter_otlp_headers.as_ref())
    }
}

/// The MCP servers that Portolan connects to.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "MCP servers")]
pub struct Upstream {
    /// How long a TCP and TLS connection to a server may take
    #[arg(long, env = "PORTOLAN_CONNECT_TIMEOUT", default_value = "5s", value_parser = duration, global = true, value_name = "TIME")]
    pub connect_timeout: Duration,
    /// How long reaching a server by URL may take, connection and handshake
    #[arg(long, env = "PORTOLAN_HANDSHAKE_TIMEOUT", default_value = "15s", value_parser = duration, global = true, value_name = "TIME")]
    pub handshake_timeout: Duration,
    /// How long a server that is started may take to be ready; the first start of an npx server downloads it
    #[arg(long, env = "PORTOLAN_START_TIMEOUT", default_value = "45s", value_parser = duration, global = true, value_name = "TIME")]
    pub start_timeout: Duration,
    /// How long a server may take to list all its tools
    #[arg(long, env = "PORTOLAN_LIST_TIMEOUT", default_value = "30s", value_parser = duration, global = true, value_name = "TIME")]
    pub list_timeout: Duration,
    /// How long the answer to a create waits for the first list of tools; the list goes on without it
    #[arg(long, env = "PORTOLAN_CREATE_SYNC_TIMEOUT", default_value = "20s", value_parser = duration, global = true, value_name = "TIME")]
    pub create_sync_timeout: Duration,
    /// How long one run of a tool may take, its wait for its turn included
    #[arg(long, env = "PORTOLAN_RUN_TIMEOUT", default_value = "5m", value_parser = duration, global = true, value_name = "TIME")]
    pub run_timeout: Duration,
    /// How long a session to a server that nobody uses is kept
    #[arg(long, env = "PORTOLAN_IDLE_TIMEOUT", default_value = "5m", value_parser = duration, global = true, value_name = "TIME")]
    pub idle_timeout: Duration,
    /// How many calls one server gets at a time; more wait in its queue
    #[arg(long, env = "PORTOLAN_MAX_CALLS_PER_SERVER", default_value_t = 16, value_parser = at_least_one, global = true, value_name = "NUMBER")]
    pub max_calls_per_server: usize,
    /// How many calls may wait for one server; more are answered 503
    #[arg(long, env = "PORTOLAN_MAX_QUEUE_PER_SERVER", default_value_t = 64, global = true, value_name = "NUMBER")]
    pub max_queue_per_server: usize,
    /// How many stdio servers may run at a time; the one that is idle longest makes room for the next
    #[arg(long, env = "PORTOLAN_MAX_CHILDREN", default_value_t = 64, value_parser = at_least_one, global = true, value_name = "NUMBER")]
    pub max_children: usize,
    /// The largest line, event or body taken from a server, in bytes
    #[arg(long, env = "PORTOLAN_MAX_MESSAGE_BYTES", default_value_t = 16 * 1024 * 1024, global = true, value_name = "BYTES")]
    pub max_message_bytes: usize,
    /// How many bytes of answers from all servers may be held at a time, shared fairly between servers
    #[arg(long, env = "PORTOLAN_MAX_BYTES_IN_FLIGHT", default_value_t = 256 * 1024 * 1024, global = true, value_name = "BYTES")]
    pub max_bytes_in_flight: usize,
    /// Split each argument of a stdio server at white space, as Letta did; for rows written for Letta
    #[arg(long, env = "PORTOLAN_LEGACY_ARG_SPLIT", global = true)]
    pub legacy_arg_split: bool,
    #[command(flatten)]
    pub tools: Tools,
    #[command(flatten)]
    pub sign_in: SignIn,
}

/// Where the answer of a sign-in comes to, and what says who Portolan is, below the public URL.
const CALLBACK_PATH: &str = "/v1/tools/mcp/oauth/callback";
const CLIENT_METADATA_PATH: &str = "/v1/tools/mcp/oauth/client-metadata.json";

/// Sign-ins to MCP servers by OAuth.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sign-in")]
pub struct SignIn {
    /// Where browsers reach Portolan, as `https://portolan.example.com`; they come back there from a sign-in to an MCP server
    #[arg(long, env = "PORTOLAN_PUBLIC_URL", value_parser = base_url, global = true, value_name = "URL")]
    pub public_url: Option<Url>,
    /// The same under the name that Letta gave it
    #[arg(long, env = "LETTA_AGENTS_ENDPOINT", value_parser = base_url, global = true, value_name = "URL")]
    pub letta_agents_endpoint: Option<Url>,
    /// How long a person may take to sign in
    #[arg(long, env = "PORTOLAN_SIGN_IN_TIMEOUT", default_value = "5m", value_parser = duration, global = true, value_name = "TIME")]
    pub sign_in_timeout: Duration,
}

impl SignIn {
    /// Where an authorization server is to send the browser; `None` when Portolan does not know where it is reached.
    pub fn redirect_uri(&self) -> Option<String> {
        self.below(CALLBACK_PATH)
    }

    /// Where authorization servers can read who Portolan is; `None` when they would not take it (Client ID Metadata
    /// Document, draft-ietf-oauth-client-id-metadata-document: https alone).
    pub fn client_metadata_url(&self) -> Option<String> {
        self.below(CLIENT_METADATA_PATH).filter(|url| url.starts_with("https://"))
    }

    fn below(&self, path: &str) -> Option<String> {
        let base = self.public_url.as_ref().or(self.letta_agents_endpoint.as_ref())?;
        Some(format!("{}{path}", base.as_str().trim_end_matches('/')))
    }
}

/// What servers offer.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Tools")]
pub struct Tools {
    /// What to do about tools that are not what they were when their server was registered, or came later: report it, or
    /// also hold them back until an admin approves them
    #[arg(
        long,
        env = "PORTOLAN_TOOL_CHANGES",
        value_enum,
        default_value = "report",
        global = true,
        value_name = "POLICY"
    )]
    pub tool_changes: ToolPolicy,
}

impl Tools {
    /// Whether tools are held that nobody has approved.
    pub fn holds(&self) -> bool {
        self.tool_changes == ToolPolicy::Hold
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ToolPolicy {
    /// Every definition is used as it comes; what changed is in the answer of a refresh and in the tool
    Report,
    /// A definition that nobody has approved is not run
    Hold,
}

/// Values for `{{ VARIABLE }}` in tokens, headers, arguments and environments of servers.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Variables")]
pub struct Variables {
    /// JSON file of values for templates in servers, {"NAME": "value"}; a request's own come before them. Read again on
    /// SIGHUP
    #[arg(long, env = "PORTOLAN_VARIABLES_FILE", global = true, value_name = "FILE")]
    pub variables_file: Option<PathBuf>,
}

/// Which addresses Portolan connects to.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Addresses")]
pub struct Egress {
    /// Where servers may be: open allows private addresses to whoever registers a server, strict public ones over https
    /// alone
    #[arg(long, env = "PORTOLAN_EGRESS", default_value = "open", global = true, value_name = "open|strict")]
    pub egress: Profile,
    /// What may be connected to in spite of strict: names, *.suffixes and addresses, each alone or with a port, and networks
    /// like 10.0.0.0/8; separated by commas
    #[arg(long, env = "PORTOLAN_EGRESS_ALLOW", value_delimiter = ',', value_parser = allowed, global = true, value_name = "LIST")]
    pub egress_allow: Vec<Allowed>,
    /// Addresses and networks that are never connected to, separated by commas; they go before all that is allowed
    #[arg(long, env = "PORTOLAN_EGRESS_DENY", value_delimiter = ',', value_parser = network, global = true, value_name = "LIST")]
    pub egress_deny: Vec<IpNet>,
    /// Where names are looked up: the system's resolver, unless a test has its own
    #[arg(skip)]
    pub lookup: Lookup,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    Open,
    Strict,
}

/// An entry of `--egress-allow`. Names are in lower case and have no dot at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    Name {
        name: String,
        port: Option<u16>,
    },
    /// All names under this one, but not itself.
    Suffix {
        name: String,
        port: Option<u16>,
    },
    Address {
        address: IpAddr,
        port: u16,
    },
    Network(IpNet),
}

/// A way to look up names that takes the place of the system's; an empty list is a name that does not exist.
#[derive(Clone, Default)]
pub struct Lookup(pub Option<Arc<LookUp>>);

type LookUp = dyn Fn(&str) -> Vec<IpAddr> + Send + Sync;

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Lookup(…)" } else { "Lookup" })
    }
}

/// Servers that are commands: which may be started, and what they may do on this host.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Servers that are commands")]
pub struct Children {
    /// Which commands may be registered and started: any, those of --stdio-templates, or none
    #[arg(
        long,
        env = "PORTOLAN_STDIO",
        default_value = "any",
        ignore_case = true,
        global = true,
        value_name = "POLICY"
    )]
    pub stdio: StdioPolicy,
    /// Letta's name for --stdio off
    #[arg(long, env = "MCP_DISABLE_STDIO", value_parser = switch, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, global = true, hide = true, value_name = "BOOL")]
    pub mcp_disable_stdio: bool,
    /// JSON file that names the commands of --stdio templates: {"NAME": {"command": "…", "args": ["exact", ["one", "of"]],
    /// "env": ["MAY_BE_SET"]}}
    #[arg(long, env = "PORTOLAN_STDIO_TEMPLATES", global = true, value_name = "FILE")]
    pub stdio_templates: Option<PathBuf>,
    /// Folder for the private folders of commands; without it, `children` in the data folder
    #[arg(long, env = "PORTOLAN_CHILD_DIR", global = true, value_name = "FOLDER")]
    pub child_dir: Option<PathBuf>,
    /// User and group that commands run as, by name or number: needs root, or CAP_SETUID, CAP_SETGID,
    /// CAP_CHOWN and CAP_KILL
    #[arg(long, env = "PORTOLAN_CHILD_USER", value_parser = NonEmptyStringValueParser::new(), global = true, value_name = "USER[:GROUP]")]
    pub child_user: Option<String>,
    /// Command that each command line is put after, split at white space: `bwrap --ro-bind / / --dev /dev --`; confining
    /// files is left to it unless --child-landlock is `required`
    #[arg(long, env = "PORTOLAN_CHILD_WRAPPER", value_parser = NonEmptyStringValueParser::new(), global = true, value_name = "COMMAND")]
    pub child_wrapper: Option<String>,
    /// Whether Landlock keeps commands out of Portolan's files and of homes: where the kernel has it, or else not at all;
    /// always, or else they are not started; never
    #[arg(long, env = "PORTOLAN_CHILD_LANDLOCK", default_value = "best-effort", global = true, value_name = "MODE")]
    pub child_landlock: Landlock,
    /// Files and folders in homes that all commands may use, as PATH is written; Portolan's own files are not among them
    #[arg(long, env = "PORTOLAN_CHILD_PATHS", value_delimiter = ':', global = true, value_name = "PATHS")]
    pub child_paths: Vec<PathBuf>,
    /// How many files each process of a command may open; it starts with 1,024 of them
    #[arg(long, env = "PORTOLAN_CHILD_MAX_FILES", default_value_t = 16_384, value_parser = clap::value_parser!(u64).range(16..), global = true, value_name = "NUMBER")]
    pub child_max_files: u64,
    /// How many processes and threads the user of a command may have when it starts another; counts all that this user has,
    /// so give commands a user of their own. Not for root
    #[arg(long, env = "PORTOLAN_CHILD_MAX_PROCESSES", value_parser = clap::value_parser!(u64).range(1..), global = true, value_name = "NUMBER")]
    pub child_max_processes: Option<u64>,
    /// This program, for its hidden commands; not by its path, because the file may have been replaced since. Tests are
    /// other programs
    #[arg(long, default_value = OWN_PROGRAM, global = true, hide = true, value_name = "FILE")]
    pub program: PathBuf,
}

#[cfg(target_os = "linux")]
const OWN_PROGRAM: &str = "/proc/self/exe";
#[cfg(not(target_os = "linux"))]
const OWN_PROGRAM: &str = "portolan";

/// Which commands may be servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StdioPolicy {
    Any,
    Templates,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Landlock {
    BestEffort,
    Required,
    Off,
}

/// Runs that take long, and runs that are asked for again (CONTRACT rows 15 and 16). Hidden: the defaults fit the SDKs; tests
/// change them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Runs")]
pub struct Runs {
    /// How long a run may be silent before the head of its answer goes out
    #[arg(long, env = "PORTOLAN_EARLY_HEAD_AFTER", default_value = "15s", value_parser = duration, global = true, hide = true)]
    pub early_head_after: Duration,
    /// How often a space follows that head
    #[arg(long, env = "PORTOLAN_DRIP_EVERY", default_value = "10s", value_parser = duration, global = true, hide = true)]
    pub drip_every: Duration,
    /// How long after it was last handed out the outcome of a run without a key is kept for an SDK that tries again: one
    /// that does not get it reads for 60 s, then waits 8 s at most
    #[arg(long, env = "PORTOLAN_RETRY_WINDOW", default_value = "70s", value_parser = duration, global = true, hide = true)]
    pub retry_window: Duration,
    /// How long a run without a key goes on when nobody waits for it; an SDK tries again within 8 s
    #[arg(long, env = "PORTOLAN_ORPHAN_GRACE", default_value = "15s", value_parser = duration, global = true, hide = true)]
    pub orphan_grace: Duration,
    /// How long after it was last handed out the outcome of a run with a key is kept
    #[arg(long, env = "PORTOLAN_KEY_WINDOW", default_value = "24h", value_parser = duration, global = true, hide = true)]
    pub key_window: Duration,
    /// How long after it last said that it lives a replica counts as lost; it says so six times as often
    #[arg(long, env = "PORTOLAN_REPLICA_LOST_AFTER", default_value = "30s", value_parser = duration, global = true, hide = true)]
    pub replica_lost_after: Duration,
    /// The largest outcome that is kept, in bytes
    #[arg(long, env = "PORTOLAN_MAX_KEPT_OUTCOME_BYTES", default_value_t = 4 * 1024 * 1024, global = true, hide = true)]
    pub max_kept_outcome_bytes: usize,
    /// How many bytes of outcomes are kept in all, one half for runs with a key and one for those without
    #[arg(long, env = "PORTOLAN_MAX_KEPT_BYTES", default_value_t = 64 * 1024 * 1024, global = true, hide = true)]
    pub max_kept_bytes: usize,
}

/// Clocks overflow with times that nobody means.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time.is_zero() || time > LONGEST => Err("it must be more than zero and at most a day".to_owned()),
        Ok(time) => Ok(time),
        Err(_) => Err("write a number and a unit, for example 500ms, 20s or 5m".to_owned()),
    }
}

/// No calendar goes back further than it must.
const LONGEST_MEMORY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

fn long_time(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time.is_zero() || time > LONGEST_MEMORY => {
            Err("it must be more than zero and at most 100 years".to_owned())
        }
        Ok(time) => Ok(time),
        Err(_) => Err("write a number and a unit, for example 12h or 30days".to_owned()),
    }
}

fn host(text: &str) -> Result<Host, String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    // An IPv6 address needs its brackets only where a port may follow.
    let bare = name.parse().map(Host::Ipv6).ok();
    bare.or_else(|| Host::parse(name).ok().filter(|_| !name.contains('*'))).ok_or_else(|| {
        "write a host name or an address, without scheme and port, for example portolan.example.com".to_owned()
    })
}

fn origin(text: &str) -> Result<Origin, String> {
    if text == "*" {
        return Ok(Origin::Any);
    }
    let url = Url::parse(text).ok().filter(|url| {
        let bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
        bare && url.username().is_empty() && url.password().is_none()
    });
    let written = url.and_then(|url| {
        let host = url.host_str().filter(|host| !host.is_empty())?;
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        Some(Origin::One(format!("{}://{host}{port}", url.scheme())))
    });
    written.ok_or_else(|| "write scheme, host and port alone, for example https://app.example.com".to_owned())
}

fn base_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| {
        let bare = url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
        matches!(url.scheme(), "http" | "https") && url.host().is_some() && bare && url.password().is_none()
    });
    url.ok_or_else(|| "write scheme and host alone, for example https://portolan.example.com".to_owned())
}

fn plain_url(text: &str) -> Result<Url, String> {
    let url = base_url(text).ok().filter(|url| url.scheme() == "http" && url.path() == "/");
    url.ok_or_else(|| "write http, host and port alone, for example http://127.0.0.1:8283".to_owned())
}

/// A password has a place of its own, and logs may show the rest.
fn collector(text: &str) -> Result<Url, NoCollector> {
    let url = Url::parse(text).ok().filter(|url| {
        let bare = url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
        matches!(url.scheme(), "http" | "https") && url.host().is_some() && bare && url.password().is_none()
    });
    url.ok_or(NoCollector)
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "write a number from 0 to 1, for example 0.1".to_owned())
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "write a whole number, 1 or more".to_owned())
}

/// A switch as Letta's settings spell it. What is neither is an error: who means to close a door must not leave it open.
fn switch(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Ok(true),
        "" | "0" | "false" | "f" | "no" | "n" | "off" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

fn scope(text: &str) -> Result<Scope, String> {
    Scope::from_name(text).ok_or_else(|| "write read, run or admin".to_owned())
}

fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(text.to_owned().into())
}

fn network(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map_err(|_| "write an address or a network, for example 10.1.2.3 or 10.0.0.0/8".to_owned())
}

fn allowed(text: &str) -> Result<Allowed, String> {
    let mistake =
        || "write a name, *.name, an address or a network, for example *.example.com:8443 or 10.0.0.0/8".to_owned();
    let text = text.trim();
    if let Ok(network) = network(text) {
        return Ok(Allowed::Network(network));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok().filter(|port| *port > 0).ok_or_else(mistake)?)),
        None => (text, None),
    };
    let suffix = host.strip_prefix("*.");
    let address = match Host::parse(suffix.unwrap_or(host)).map_err(|_| mistake())? {
        Host::Domain(name) => {
            let name = name.strip_suffix('.').unwrap_or(&name).to_owned();
            return match suffix {
                _ if name.is_empty() || name.contains('*') => Err(mistake()),
                Some(_) => Ok(Allowed::Suffix { name, port }),
                None => Ok(Allowed::Name { name, port }),
            };
        }
        Host::Ipv4(address) => IpAddr::from(address),
        Host::Ipv6(address) => address.into(),
    };
    match port {
        _ if suffix.is_some() => Err(mistake()),
        Some(port) => Ok(Allowed::Address { address, port }),
        None => Ok(Allowed::Network(address.into())),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_more_particular_name_of_a_collector_wins() {
        let endpoint = |arguments: &[&str]| {
            let cli = Cli::parse_from(["portolan"].iter().chain(arguments));
            cli.settings.traces.endpoint().unwrap().map(String::from)
        };
        let (own, all, traces) = (
            "--otlp-endpoint=http://a:1/x/",
            "--otel-exporter-otlp-endpoint=http://b:2",
            "--otel-exporter-otlp-traces-endpoint=https://c/own/path",
        );
        assert_eq!(endpoint(&[own, all, traces]).unwrap(), "http://a:1/x/v1/traces");
        assert_eq!(endpoint(&[all, traces]).unwrap(), "https://c/own/path");
        assert_eq!(endpoint(&[all]).unwrap(), "http://b:2/v1/traces");
        assert_eq!(endpoint(&["--otlp-endpoint=", all]).unwrap(), "http://b:2/v1/traces");
        assert_eq!(endpoint(&["--otlp-endpoint="]), None);
        for wrong in ["a:1", "ftp://a", "http://", "http://u:p@a", "http://a?x=1", "http://a#x", "/v1/traces"] {
            assert!(collector(wrong).is_err(), "{wrong}");
        }
        assert!(share("0").is_ok() && share("1").is_ok() && share("0.25").is_ok());
        assert!(share("-0.1").is_err() && share("1.1").is_err() && share("NaN").is_err() && share("").is_err());
    }

    #[test]
    fn an_allow_list_has_names_suffixes_addresses_and_networks() {
        let name = |name: &str, port| Ok(Allowed::Name { name: name.to_owned(), port });
        assert_eq!(allowed("Example.COM."), name("example.com", None));
        assert_eq!(allowed(" example.com:8443"), name("example.com", Some(8443)));
        let suffix = Allowed::Suffix { name: "example.com".to_owned(), port: Some(1) };
        assert_eq!(allowed("*.example.com:1"), Ok(suffix));
        assert_eq!(allowed("10.0.0.0/8"), Ok(Allowed::Network("10.0.0.0/8".parse().unwrap())));
        assert_eq!(allowed("10.0.0.1"), Ok(Allowed::Network("10.0.0.1/32".parse().unwrap())));
        assert_eq!(allowed("::1"), Ok(Allowed::Network("::1/128".parse().unwrap())));
        let address = |text: &str, port| Ok(Allowed::Address { address: text.parse().unwrap(), port });
        assert_eq!(allowed("127.1:80"), address("127.0.0.1", 80));
        assert_eq!(allowed("[::1]:80"), address("::1", 80));
        for wrong in ["", "*", "*.", "a b", "a:0", "a:65536", "a:b", "10.0.0.0/33", "http://a", "*.10.0.0.1", "a.*.b"] {
            assert!(allowed(wrong).is_err(), "{wrong}");
        }
        assert_eq!(network("fd00::/8"), Ok("fd00::/8".parse().unwrap()));
        assert!(network("example.com").is_err());
    }
}
