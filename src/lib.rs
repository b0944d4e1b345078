//! Portolan, the MCP-servers part of the Letta API on your own machine: clients register MCP servers over REST, Portolan
//! keeps live sessions to them and their tool lists, and runs their tools.
//!
//! "CONTRACT row N" in a comment is a row of `docs/CONTRACT.md`: the rules of the wire.
//!
//! # The house
//!
//! A folder is a layer, a file is one thing.
//!
//! | file | what it is for |
//! |---|---|
//! | `main` | parse the command line, run one command, set the exit code |
//! | [`config`] | every setting; its doc comments are `--help` |
//! | [`app`] | what handlers share; open, serve, drain, close |
//! | [`serve`] | the accept loop and the drain; `connections` (whose turn it is, and for how long), `stream` (their bytes) |
//! | [`model`] | plain data, also the table rows |
//! | [`secrets`] | what of a connection is secret, by its name, its place and its looks |
//! | [`error`] | the one HTTP-facing error: status, body, `x-should-retry` |
//! | [`telemetry`] | logs; `metrics` (what is counted, and how it is written for Prometheus); `traces` (the spans of runs), `context` (the trace that a request belongs to), `export` (their way to a collector), `otlp` (how it is told) |
//! | [`progress`] | how far long work is, on a terminal and elsewhere |
//! | [`run_log`] | a row for each run, written behind its back; what is forgotten of runs and changes, and when |
//! | [`api`] | speaks HTTP: the route table, one file per group of routes, and what they share: |
//! | `access`, `tokens`, `attempts` | who may come in, by which tokens; who guesses |
//! | `guard`, `variables` | what may come in: ids, names and bodies; values that a request brings for templates |
//! | `origin`, `reveal` | which web pages may come in; who sees secrets |
//! | `wire` | Letta's JSON, in and out; `mask` (what stands for a secret), `events` (what a connect tells) |
//! | `repeats`, `runs`, `drip` | which requests mean one run; one run of many requests; the early head of a long one |
//! | `elsewhere` | the same runs at other replicas, and before this start |
//! | `observed` | what is told of a run: in its span, in the metrics, in the run log |
//! | `import`, `page` | what an import does, and an export; what a browser sees after a sign-in |
//! | `assets` | the console and the API reference, which `build.rs` packed: files of `console/` at the top of the repository |
//! | [`interchange`] | the files of other programs: `read` and `write` (what they say of servers), `text` (from bytes to JSON), `placeholders` (theirs, and templates), `left_out` (secrets that a file does not show) |
//! | [`mcp`] | speaks MCP; its files are: |
//! | `pool`, `watch` | one live session per server; what happens between calls |
//! | `follow` | what other Portolans on the same database have changed |
//! | `first` | the first syncs of servers, of many that came together, too |
//! | `session` | handshake, list, call |
//! | `stdio`, `http`, `sse` | the transports; `remote` is what the last two have in common |
//! | `message`, `exchange` | JSON-RPC, and who waits for which answer |
//! | `lines`, `events`, `budget` | what is read, bounded, and how much of it at a time |
//! | `egress`, `address` | every outbound byte, and which addresses it may go to |
//! | `oauth` | sign-in to servers: `connect` (with a person), `signer` (what requests use), `adopt` (one from before its registration), `provider` and `token` (what an authorization server is asked), `way` (how it is reached) |
//! | `fields`, `mirror` | which header fields go out, and arguments as header fields |
//! | `commands` | which commands may be started |
//! | `template`, `variables`, `variants` | `{{ VARIABLE }}` in a configuration; the values for it; the sessions of requests that bring their own |
//! | `child`, `keeper` | a process of ours, and that neither it nor what it starts outlives us |
//! | `confine`, `reach` | what a command gives up before it is one; which files it may reach |
//! | `homes`, `users`, `order` | its private folders; the user it runs as; what these processes tell each other |
//! | `error` | why a server cannot be used |
//! | `traced` | what the spans of a run say of its server |
//! | `listing`, `schema`, `hidden` | tools; characters in them that people do not see |
//! | `result`, `json` | answers |
//! | `fuzz` (in a layer), `corpus` | what holds for any bytes from outside; in tests and under `cargo fuzz` only |
//! | [`store`] | speaks SQL: a file for each table or two that belong together; `changes` (what a new list of tools means), `journal` (the table `changes`), `known` (tools that were read before, in memory), `feed` (what Portolans on one database tell each other, and whether what is known is still so), `shared_runs` (runs that others may ask about), `replicas` (who lives, and what they ask), `presence` (whether PostgreSQL is there), `schema` (brought up to date at a start), `batch` (several servers in one transaction), `letta` (the tables of a Letta, read only), `seal` (envelopes), `keys` (where keys come from), `sealing` (what is sealed with which key, and rotation) |
//! | [`command`] | what the program does besides serving, one file per command; of `migrate_letta`, `plan` (what becomes of each server) and `unseal` (Letta's own sealing) |
//!
//! # Who may import whom
//!
//! A module, and what it may name of ours and of the crates `axum`, `rmcp` and `sqlx`. A test reads this table and the
//! `use` lines, and keeps it true.
//!
//! | module | may name |
//! |---|---|
//! | `main` | `api`, `app`, `command`, `config`, `progress`, `store`, `telemetry` |
//! | `lib` | |
//! | `app` | `api`, `config`, `error`, `mcp`, `run_log`, `serve`, `store`, `telemetry` |
//! | `serve` | `config`, `axum` |
//! | `error` | `mcp`, `model`, `store`, `axum` |
//! | `config` | `interchange`, `model` |
//! | `corpus` | |
//! | `model` | `sqlx` |
//! | `secrets` | `model` |
//! | `interchange` | `mcp`, `model`, `secrets` |
//! | `progress` | |
//! | `telemetry` | `config`, `mcp`, `model`, `progress` |
//! | `run_log` | `config`, `model`, `store` |
//! | `api` | `app`, `config`, `corpus`, `error`, `interchange`, `mcp`, `model`, `run_log`, `secrets`, `serve`, `store`, `telemetry`, `axum` |
//! | `mcp` | `config`, `corpus`, `model`, `secrets`, `store`, `telemetry`, `rmcp` |
//! | `store` | `corpus`, `model`, `telemetry`, `sqlx` |
//! | `command` | `api`, `app`, `config`, `error`, `interchange`, `mcp`, `model`, `progress`, `store` |
//!
//! Of `mcp`, `api` uses the front door, and of `serve` the mark of a request too many and the address of its client; of
//! `api`, `main` and `command` use the tokens, and `command` the rules of a create and the import; of `mcp`, `interchange` and `command` use the grammar of templates
//! and what a list of tools takes; `telemetry` uses the way out of `mcp`, which writes to its spans.
//!
//! # One request
//!
//! `POST …/tools/{tool_id}/run`: `origin` (no web page) → route table → `access` (token, scope) → `guard` (ids, body) →
//! `repeats` says whether other requests mean the same run → `runs` finds it, or starts it: `api::tools::run` gets server
//! and tool, which the store has in memory after the first time → [`mcp::Mcp::run_tool`] → `pool` gives it a place among
//! the server's calls and hands out the live session, or opens one → `session` sends the call with a deadline → the
//! transport brings the result as the server wrote it → [`run_log`] takes a note → `wire::ToolExecutionResult` → `drip`
//! sends it.

pub mod api;
pub mod app;
pub mod command;
pub mod config;
#[cfg(test)]
mod corpus;
pub mod error;
pub mod interchange;
pub mod mcp;
pub mod model;
pub mod progress;
pub mod run_log;
pub mod secrets;
pub mod serve;
pub mod store;
pub mod telemetry;
