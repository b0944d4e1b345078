//! `portolan key`: keys that seal stored secrets.

use serde_json::json;

use crate::config::{KeyCommand, Settings};
use crate::store::{Store, new_key};

use super::{Document, Failure, say};

/// # Errors
/// One sentence for the person who runs it.
pub async fn run(settings: &Settings, command: KeyCommand, as_json: bool) -> Result<(), Failure> {
    match command {
        KeyCommand::New => {
            let (key, id) = new_key();
            match as_json {
                true => say(Document(json!({ "id": id, "key": *key }))),
                false => say(key.as_str()),
            }
        }
        KeyCommand::Forget { id } => {
            let url = settings.storage.database_url.as_ref().map(|url| url.expose());
            let forgotten = Store::forget_lost_key(url, &settings.storage.data_dir, &id).await;
            if !forgotten.map_err(|error| error.to_string())? {
                let unknown = "The database knows no key of this id; a refused start names the one it asks for.";
                return Err(unknown.to_owned().into());
            }
            match as_json {
                true => say(Document(json!({ "id": id, "forgotten": true }))),
                false => say(format_args!(
                    "Key {id} is forgotten. What it sealed opens again when it comes back to the key file."
                )),
            }
        }
    }
    Ok(())
}
