//! `portolan key`: keys that seal stored secrets.

use crate::config::KeyCommand;
use crate::store::new_key;

use super::say;

pub fn run(command: KeyCommand) {
    match command {
        KeyCommand::New => say(new_key().as_str()),
    }
}
