//! `portolan key`: keys that seal stored secrets.

use crate::config::{KeyCommand, Settings};
use crate::store::{Store, new_key};

use super::say;

/// # Errors
/// One sentence for the person who runs it.
pub async fn run(settings: &Settings, command: KeyCommand) -> Result<(), String> {
    match command {
        KeyCommand::New => say(new_key().as_str()),
        KeyCommand::Forget { id } => {
            let url = settings.storage.database_url.as_ref().map(|url| url.expose());
            let forgotten = Store::forget_lost_key(url, &settings.storage.data_dir, &id).await;
            if !forgotten.map_err(|error| error.to_string())? {
                return Err(
                    "The database knows no key of this id; a refused start names the one it asks for.".to_owned()
                );
            }
            say(format_args!("Key {id} is forgotten. What it sealed opens again when it comes back to the key file."));
        }
    }
    Ok(())
}
