//! What holds for any body that a client may send; see [`crate::mcp::fuzz`].

use std::collections::BTreeSet;

use axum::response::IntoResponse;
use clap::ValueEnum;

use crate::error::Error;
use crate::interchange::{Format, leave_out, read, write};

use super::guard;
use super::import::{Import, same};
use super::parse_tokens;
use super::wire::{CreateServer, UpdateServer, run_arguments};

/// A body of a create, an update and a run: whatever is wrong is said without a panic, and a body that is taken has no
/// NUL in it.
pub fn body(data: &[u8]) {
    let object = match guard::server_object(data) {
        Ok(object) => object,
        Err(error) => return refused(error),
    };
    let text = serde_json::to_string(&object).expect("an object is JSON");
    assert!(!text.replace(r"\\", "").contains(r"\u0000"));
    match CreateServer::read(object.clone()) {
        Ok(create) => {
            assert!(!create.server_name.is_empty());
            let again = CreateServer::read(object.clone());
            assert!(again.is_ok_and(|again| again.connector == create.connector));
        }
        Err(error) => refused(error),
    }
    if let Err(error) = UpdateServer::read(object.clone()) {
        refused(error);
    }
    if let Err(error) = run_arguments(object) {
        refused(error);
    }
}

/// A tokens file: read without a panic, and without a token or a name twice.
pub fn tokens(data: &[u8]) {
    let Ok(tokens) = parse_tokens(data) else { return };
    let names: std::collections::HashSet<_> = tokens.iter().map(|token| &token.name).collect();
    assert_eq!(names.len(), tokens.len());
}

/// A file of servers: read without a panic, what is wrong is a 422, and what is taken is the same after it was written.
pub fn file(data: &[u8]) {
    let document = match Import::default().read(data) {
        Ok(document) => document,
        Err(error) => return refused(error),
    };
    for entry in &document.entries {
        let Ok(create) = CreateServer::read(entry.body()) else { continue };
        let servers = [(&*create.server_name, &create.connector)];
        let file = write(Format::Letta, &servers, &BTreeSet::new()).file;
        let again = read(file, Some(Format::Letta)).expect("what was written can be read");
        let again = CreateServer::read(again.entries[0].body()).expect("what was taken is taken again");
        assert!(again.server_name == create.server_name && same(&again.connector, &create.connector));
        // Whatever is left out, the file is one.
        for format in Format::value_variants() {
            let (bare, made) = leave_out(&servers);
            let file = write(*format, &[(servers[0].0, &bare[0])], &made).file;
            assert!(read(file, Some(*format)).is_ok());
        }
    }
}

fn refused(error: Error) {
    assert!(matches!(error, Error::Invalid(_) | Error::BodyTooLarge { .. }), "{error:?}");
    assert!(error.into_response().status().is_client_error());
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_holds() {
        crate::corpus::replay("body", super::body);
        crate::corpus::replay("tokens", super::tokens);
        crate::corpus::replay("file", super::file);
    }
}
