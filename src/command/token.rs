//! `portolan token new`: makes a token. The token goes to standard output alone, so that a script can take it; what else
//! there is to say goes to standard error.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use serde_json::json;

use crate::api::{Token, parse_tokens};
use crate::model::Scope;

use super::{Failure, print};

/// What every token begins with, so that it is known for one where it should not be.
const PREFIX: &str = "ptl_";

/// Makes a token of 256 random bits, adds its line to `file` if there is one, and prints it.
///
/// # Errors
/// One sentence; the file is as it was.
pub fn make(name: &str, scope: Scope, file: Option<&Path>, as_json: bool) -> Result<(), Failure> {
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|error| format!("Cannot get random bytes from the system: {error}."))?;
    let text = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(random));
    let token = Token::new(name, scope, &text).map_err(|problem| format!("The token {problem}."))?;
    let next = match file {
        Some(file) => {
            add(&token, file)?;
            let file = file.display();
            format!(
                "Portolan knows the token above by its line in {file}; it is shown this once.\nA Portolan that runs with \
                 --tokens-file {file} takes it after SIGHUP (kill -HUP PID), any other after a start with it.\n"
            )
        }
        None => format!(
            "The token above is shown this once. Add this line to the file that --tokens-file names:\n\n{}\n\nA Portolan \
             that runs with that file takes the token after SIGHUP (kill -HUP PID), any other after a start with it.\n",
            token.line()
        ),
    };
    let printed = match as_json {
        true => print(json!({
            "name": name,
            "scope": scope.as_str(),
            "token": text,
            "line": token.line(),
            "file": file.map(Path::to_string_lossy),
        })),
        false => print(&text),
    };
    printed.map_err(|error| format!("Cannot print the token, so remove its line if it has one: {error}."))?;
    if as_json {
        return Ok(());
    }
    // Nothing can be done about a closed standard error.
    let _ = io::stderr().write_all(next.as_bytes());
    Ok(())
}

/// Adds a line to the file: it has the line or is as it was, and two who add one at a time lose none.
fn add(token: &Token, file: &Path) -> Result<(), String> {
    let unusable = |error: io::Error| format!("Cannot add to {}: {error}.", file.display());
    // A link stays one.
    let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let folder = file.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new(".")).to_owned();
    let folder = File::open(folder).map_err(unusable)?;
    folder.try_lock().map_err(|_| "Somebody else adds a token at this moment; try again.".to_owned())?;
    let old = match File::open(&file) {
        Ok(old) => Some(old),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(unusable(error)),
    };
    let mut text = Vec::new();
    let mut metadata = None;
    if let Some(mut old) = old {
        old.read_to_end(&mut text).map_err(unusable)?;
        metadata = Some(old.metadata().map_err(unusable)?);
    }
    let tokens = parse_tokens(&text).map_err(|error| error.to_string())?;
    if tokens.iter().any(|other| other.name == token.name) {
        return Err("The tokens file has a token of this name already; choose another, or remove its line.".to_owned());
    }
    if !text.is_empty() && !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    text.extend(token.line().into_bytes());
    text.push(b'\n');
    let new = PathBuf::from(format!("{}.new", file.display()));
    let replace = || {
        // Left by one that was killed; whoever holds the lock may.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut replacement = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        replacement.write_all(&text)?;
        if let Some(metadata) = &metadata {
            // Whoever could read it still can.
            let made = replacement.metadata()?;
            if (made.uid(), made.gid()) != (metadata.uid(), metadata.gid()) {
                fchown(&replacement, Some(metadata.uid()), Some(metadata.gid()))?;
            }
            replacement.set_permissions(Permissions::from_mode(metadata.mode() & 0o777))?;
        }
        replacement.sync_all()?;
        std::fs::rename(&new, &file)?;
        folder.sync_all()
    };
    replace().map_err(|error| {
        // It may not be there.
        let _ = std::fs::remove_file(&new);
        unusable(error)
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn token(name: &str) -> Token {
        Token::new(name, Scope::Run, name).unwrap()
    }

    #[test]
    fn a_file_keeps_its_lines_its_mode_and_its_link() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokens");
        add(&token("a"), &file).unwrap();
        let mode = |file: &Path| file.metadata().unwrap().mode() & 0o777;
        assert_eq!(mode(&file), 0o600);
        std::fs::write(&file, format!("# remark\n{}", token("a").line())).unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("tokens", &link).unwrap();
        std::fs::write(folder.path().join("tokens.new"), "left over").unwrap();
        add(&token("b"), &link).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(text, format!("# remark\n{}\n{}\n", token("a").line(), token("b").line()));
        assert_eq!(mode(&file), 0o640);
        assert!(link.symlink_metadata().unwrap().is_symlink() && !folder.path().join("tokens.new").exists());
        for (refused, part) in [(token("a"), "of this name"), (token("b"), "of this name")] {
            assert!(add(&refused, &file).unwrap_err().contains(part));
        }
        let lock = File::open(folder.path()).unwrap();
        lock.lock().unwrap();
        assert!(add(&token("c"), &file).unwrap_err().contains("try again"));
        drop(lock);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
        add(&token("c"), &file).unwrap();
        std::fs::write(&file, "hunter2\n").unwrap();
        let error = add(&token("d"), &file).unwrap_err();
        assert!(error.contains("Line 1") && !error.contains("hunter2"), "{error}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "hunter2\n");
        assert!(add(&token("d"), &folder.path().join("none/tokens")).unwrap_err().contains("Cannot add to"));
    }
}
