//! What holds for any body that a client may send; see [`crate::mcp::fuzz`].

use axum::response::IntoResponse;

use crate::error::Error;

use super::guard;
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

fn refused(error: Error) {
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    assert!(error.into_response().status().is_client_error());
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_holds() {
        crate::corpus::replay("body", super::body);
        crate::corpus::replay("tokens", super::tokens);
    }
}
