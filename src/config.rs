//! Every setting, one struct per concern. A field's doc comment is its line in `--help`; each is a flag and an
//! environment variable alike, and the flag wins.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::model::Secret;

/// Portolan: the MCP-servers part of the Letta API, served from your own machine.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub settings: Settings,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the API (what happens without a command, too)
    Serve,
    /// Make a key that seals stored secrets, or give one up
    #[command(subcommand)]
    Key(KeyCommand),
    /// Seal all stored secrets again with the first key of the key file, while Portolan serves
    RotateKeys {
        /// Only say how many servers each key seals
        #[arg(long)]
        dry_run: bool,
    },
    /// Ends children that are left when Portolan was killed; Portolan starts it by itself
    #[command(hide = true)]
    KeepChildren,
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

#[derive(Args, Clone, Debug)]
pub struct Settings {
    #[command(flatten)]
    pub entry: Entry,
    #[command(flatten)]
    pub storage: Storage,
    #[command(flatten)]
    pub secrets: Secrets,
    #[command(flatten)]
    pub logs: Logs,
    #[command(flatten)]
    pub upstream: Upstream,
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

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "write a whole number, 1 or more".to_owned())
}

fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(text.to_owned().into())
}
