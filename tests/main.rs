//! Portolan's promises, a file each, against a running Portolan and fake MCP servers.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fake;
mod harness;

mod bad_input;
mod children;
mod endurance;
mod entry;
mod house;
mod known;
mod masking;
mod misbehaviour;
mod process;
mod repeats;
mod runs;
mod sealing;
mod secrets;
mod servers;
mod tools;
mod transports;
