//! Portolan's promises, a file each, against a running Portolan and fake MCP servers.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fake;
mod harness;

mod access;
mod bad_input;
mod browsers;
mod changes;
mod children;
mod commands;
mod confinement;
mod console;
mod containers;
mod database;
mod documents;
mod egress;
mod endurance;
mod entry;
mod feed;
mod headers;
mod house;
mod import;
mod known;
mod legacy;
mod letta;
mod masking;
mod metrics;
mod misbehaviour;
mod oauth;
mod once;
mod process;
mod repeats;
mod replicas;
mod run_log;
mod runs;
mod scale;
mod sealing;
mod secrets;
mod servers;
mod templates;
mod tool_changes;
mod tools;
mod traces;
mod transports;
mod upgrades;
