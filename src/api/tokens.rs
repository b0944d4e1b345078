//! The tokens that Portolan knows: where they are given, how their file is read, and which one a request carries.
//!
//! Of each only the SHA-256 is kept. The file has a line `name:scope:sha256` for each token; blank lines and those that
//! begin with `#` say nothing. It is read strictly, and as a whole: one wrong line and none of it counts.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::config;
use crate::model::{Scope, Secret, hex};

pub type Digest = [u8; 32];

/// The most tokens of a file: each request is compared with all of them.
const MAX_TOKENS: usize = 1000;
/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;
/// The longest name, in characters.
const MAX_NAME: usize = 64;
/// A token with fewer characters can be guessed; what Letta took for a password is taken.
const SHORT: usize = 16;

/// The settings that hold a token, and the names of their tokens.
const TOKEN: &str = "PORTOLAN_TOKEN";
const TOKEN_FILE: &str = "PORTOLAN_TOKEN_FILE";
const PASSWORD: &str = "LETTA_SERVER_PASSWORD";
const TOKENS_FILE: &str = "PORTOLAN_TOKENS_FILE";

/// A token as Portolan knows it.
#[derive(Clone, PartialEq)]
pub struct Token {
    pub name: String,
    pub scope: Scope,
    pub digest: Digest,
}

impl fmt::Debug for Token {
    /// Without the digest: a weak token could be found from it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.scope.as_str())
    }
}

/// Why tokens cannot be used; each message is one sentence for the administrator, and repeats nothing of a file.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("{0} is empty; give it a token, or leave it out.")]
    Empty(&'static str),
    #[error("No request could carry {0}: it begins or ends with white space, or holds control characters.")]
    Unsendable(&'static str),
    #[error("The file of {TOKEN_FILE} is a tokens file; name it with {TOKENS_FILE}.")]
    TokensFile,
    #[error("Cannot read the file {file:?} of {setting}: {cause}.")]
    Unreadable { setting: &'static str, file: PathBuf, cause: io::Error },
    #[error("Line {line} of the tokens file {problem}.")]
    Line { line: usize, problem: &'static str },
    #[error("The tokens file has more than {MAX_TOKENS} tokens.")]
    TooMany,
    #[error("The tokens file has no token; `portolan token new --scope admin --file FILE NAME` adds one.")]
    None,
}

/// All tokens, or that there are none and everybody may come in. Clones share everything.
#[derive(Clone)]
pub struct Tokens {
    settings: config::Tokens,
    current: Arc<RwLock<Option<Set>>>,
}

/// Tokens at one time; more than one may have the same digest, and the first counts.
#[derive(Clone)]
pub struct Set(Arc<[Arc<Token>]>);

impl Tokens {
    /// Reads the tokens that `settings` name.
    ///
    /// # Errors
    /// When one of them cannot be used, or there is none where some should be.
    pub fn open(settings: config::Tokens) -> Result<Self, TokenError> {
        let set = if settings.are_given() { Some(Set::read(&settings)?) } else { None };
        if set.as_ref().is_some_and(|set| set.0.is_empty()) {
            return Err(TokenError::None);
        }
        Ok(Self { settings, current: Arc::new(RwLock::new(set)) })
    }

    /// Reads the files again, if there are any. What is not in them any more is worth nothing from now on, the last token
    /// included.
    ///
    /// # Errors
    /// When a file cannot be used; all tokens stay as they were.
    pub fn reload(&self) -> Result<(), TokenError> {
        if !self.settings.are_in_files() {
            return Ok(());
        }
        let set = Set::read(&self.settings)?;
        let tokens = set.0.len();
        // The value is replaced as a whole: nobody can have left half of it.
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(set);
        match tokens {
            0 => tracing::warn!("no token is left: nobody may come in"),
            _ => tracing::info!(tokens, "tokens read again"),
        }
        Ok(())
    }

    /// `None` when everybody may come in.
    pub fn current(&self) -> Option<Set> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Set {
    fn read(settings: &config::Tokens) -> Result<Self, TokenError> {
        let mut tokens = Vec::new();
        let mut admin = |name: &'static str, token: &Secret| -> Result<(), TokenError> {
            let token = usable(name, token.expose())?;
            if name != PASSWORD && token.chars().count() < SHORT {
                tracing::warn!(
                    "{name} has fewer than {SHORT} characters and can be guessed; `portolan token new` makes better"
                );
            }
            let digest = Sha256::digest(token).into();
            tokens.push(Token { name: name.to_owned(), scope: Scope::Admin, digest });
            Ok(())
        };
        if let Some(token) = &settings.token {
            admin(TOKEN, token)?;
        }
        if let Some(file) = &settings.token_file {
            let bytes = contents(TOKEN_FILE, file)?;
            // Its lines are no secrets, and one of them would open everything.
            if looks_like_lines(&bytes) {
                return Err(TokenError::TokensFile);
            }
            let text = String::from_utf8(bytes).map_err(|_| TokenError::Unsendable(TOKEN_FILE))?;
            admin(TOKEN_FILE, &text.trim().to_owned().into())?;
        }
        if let Some(password) = &settings.letta_server_password {
            admin(PASSWORD, password)?;
        }
        if let Some(file) = &settings.tokens_file {
            tokens.extend(parse(&contents(TOKENS_FILE, file)?)?);
        }
        Ok(Self(tokens.into_iter().map(Arc::new).collect()))
    }

    /// The token that a request carries. How long it takes says nothing about how much of a digest is right, nor which
    /// token was found.
    pub fn find(&self, token: &[u8]) -> Option<Arc<Token>> {
        let digest: Digest = Sha256::digest(token).into();
        let mut found = Choice::from(0);
        let mut place = 0;
        for (number, known) in (0_u64..).zip(self.0.iter()) {
            let is_it = known.digest.ct_eq(&digest) & !found;
            place.conditional_assign(&number, is_it);
            found |= is_it;
        }
        bool::from(found).then(|| self.0[place as usize].clone())
    }
}

/// A token that a request can carry.
fn usable<'a>(setting: &'static str, token: &'a str) -> Result<&'a str, TokenError> {
    if token.is_empty() {
        return Err(TokenError::Empty(setting));
    }
    if token.trim() != token || token.chars().any(char::is_control) {
        return Err(TokenError::Unsendable(setting));
    }
    Ok(token)
}

fn contents(setting: &'static str, path: &Path) -> Result<Vec<u8>, TokenError> {
    let read = || {
        // Opening a pipe could wait for ever.
        if !path.metadata()?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let file = File::open(path)?;
        #[cfg(unix)]
        if std::os::unix::fs::PermissionsExt::mode(&file.metadata()?.permissions()) & 0o077 != 0 {
            tracing::warn!("other users of this machine may open the file of {setting}; chmod 600 keeps them out");
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(io::Error::other("it is larger than a mebibyte"));
        }
        Ok(bytes)
    };
    read().map_err(|cause| TokenError::Unreadable { setting, file: path.to_owned(), cause })
}

/// Whether this is a tokens file, be it one with mistakes: a token does not look like one of its lines.
fn looks_like_lines(file: &[u8]) -> bool {
    let text = file.trim_ascii();
    let digest = text.rsplit(|byte| *byte == b':').next().unwrap_or_default();
    let is_line = text.contains(&b':') && digest.len() == 64 && digest.iter().all(u8::is_ascii_hexdigit);
    text.starts_with(b"#") || is_line
}

/// The tokens of a tokens file.
///
/// # Errors
/// When a line is not as it must be: names which one, never its text.
pub fn parse(file: &[u8]) -> Result<Vec<Token>, TokenError> {
    let mut tokens: Vec<Token> = Vec::new();
    for (number, line) in file.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let earlier = |token: Token| match &tokens {
            tokens if tokens.iter().any(|other| other.name == token.name) => Err("has the name of an earlier line"),
            tokens if tokens.iter().any(|other| other.digest == token.digest) => {
                Err("has the token of an earlier line")
            }
            _ => Ok(token),
        };
        let token = Token::parse(line).and_then(earlier);
        tokens.push(token.map_err(|problem| TokenError::Line { line: number + 1, problem })?);
        if tokens.len() > MAX_TOKENS {
            return Err(TokenError::TooMany);
        }
    }
    Ok(tokens)
}

impl Token {
    /// A token called `name`.
    ///
    /// # Errors
    /// What is wrong with the name.
    pub fn new(name: &str, scope: Scope, token: &str) -> Result<Self, &'static str> {
        let digest = Sha256::digest(token).into();
        Ok(Self { name: checked(name)?.to_owned(), scope, digest })
    }

    fn parse(line: &[u8]) -> Result<Self, &'static str> {
        let form = "is not of the form name:scope:sha256";
        let line = str::from_utf8(line).map_err(|_| form)?;
        let mut parts = line.split(':');
        let (Some(name), Some(scope), Some(digest), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form);
        };
        let name = checked(name)?.to_owned();
        let scope = Scope::from_name(scope).ok_or("has a scope that is not read, run or admin")?;
        let digest = from_hex(digest).ok_or("does not end with a SHA-256, which is 64 hexadecimal digits")?;
        Ok(Self { name, scope, digest })
    }

    /// Its line in a tokens file, without the line's end.
    pub fn line(&self) -> String {
        format!("{}:{}:{}", self.name, self.scope.as_str(), hex(&self.digest))
    }
}

/// A name that a line of the file, a line of the log and a person can carry.
fn checked(name: &str) -> Result<&str, &'static str> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if !(1..=MAX_NAME).contains(&name.len()) || !name.bytes().all(fine) {
        return Err("has a name that is not 1 to 64 letters, digits, dots, hyphens and underscores");
    }
    if [TOKEN, TOKEN_FILE, PASSWORD].contains(&name) {
        return Err("has the name of a setting");
    }
    Ok(name)
}

/// What [`hex`] made of a digest.
pub(super) fn from_hex(text: &str) -> Option<Digest> {
    let mut digest = Digest::default();
    if text.len() != 2 * digest.len() || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (number, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * number..][..2], 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn token(name: &str, scope: Scope, text: &str) -> Token {
        Token::new(name, scope, text).unwrap()
    }

    #[test]
    fn a_line_is_read_as_it_is_written() {
        let all =
            [token("a", Scope::Read, "one"), token("b.c-d_9", Scope::Run, "two"), token("C", Scope::Admin, "three")];
        let mut file = "# a remark: with:colons\n\n".to_owned();
        for token in &all {
            file += &format!("  {} \r\n", token.line());
        }
        assert_eq!(parse(file.as_bytes()).unwrap(), all);
        assert_eq!(parse(file.trim_end().as_bytes()).unwrap(), all, "the last line needs no end");
        assert_eq!(
            parse(token("a", Scope::Run, "x").line().replace("run", "RUN").to_uppercase().as_bytes()).ok(),
            None
        );
        assert_eq!(parse(b"").unwrap(), []);
        assert_eq!(format!("{:?}", all[0]), "a (read)");
        // `printf one | sha256sum`
        assert_eq!(all[0].line(), "a:read:7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed");
    }

    #[test]
    fn a_wrong_line_is_named_by_its_number_and_not_repeated() {
        let digest = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";
        let good = token("first", Scope::Run, "x").line();
        let long = "n".repeat(65);
        for (line, part) in [
            ("ptl_hunter2".to_owned(), "name:scope:sha256"),
            (format!("n:run:{digest}:hunter2"), "name:scope:sha256"),
            (format!("n:{digest}"), "name:scope:sha256"),
            (format!("\u{feff}n:run:{digest}"), "has a name"),
            (format!(":run:{digest}"), "has a name"),
            (format!("{long}:run:{digest}"), "has a name"),
            (format!("hunter 2:run:{digest}"), "has a name"),
            (format!("hünter:run:{digest}"), "has a name"),
            (format!("PORTOLAN_TOKEN:run:{digest}"), "the name of a setting"),
            (format!("LETTA_SERVER_PASSWORD:run:{digest}"), "the name of a setting"),
            (format!("n::{digest}"), "scope"),
            (format!("n:Run:{digest}"), "scope"),
            (format!("n:run,admin:{digest}"), "scope"),
            (format!("n:run :{digest}"), "scope"),
            ("n:run:".to_owned(), "SHA-256"),
            ("n:run:hunter2".to_owned(), "SHA-256"),
            (format!("n:run:{}", &digest[1..]), "SHA-256"),
            (format!("n:run:{digest}0"), "SHA-256"),
            (format!("n:run:+{}", &digest[1..]), "SHA-256"),
            (format!("n:run: {}", &digest[1..]), "SHA-256"),
            (format!("n:run:{}é", &digest[2..]), "SHA-256"),
            (format!("first:run:{digest}"), "the name of an earlier line"),
            (good.replace("first", "second"), "the token of an earlier line"),
        ] {
            let error = parse(format!("{good}\n\n# hunter2\n{line}\n").as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("Line 4 of the tokens file ") && error.contains(part), "{line:?}: {error}");
            assert!(!error.contains("hunter2") && !error.contains(&digest[1..10]), "{error}");
        }
        let error = parse(b"n:run:\xff\xfe").unwrap_err().to_string();
        assert!(error.contains("Line 1"), "{error}");
        let many: String = (0..=MAX_TOKENS)
            .map(|number| token(&format!("n{number}"), Scope::Read, &number.to_string()).line() + "\n")
            .collect();
        assert!(matches!(parse(many.as_bytes()), Err(TokenError::TooMany)));
        assert_eq!(parse(&many.as_bytes()[..many.trim_end().rfind('\n').unwrap()]).unwrap().len(), MAX_TOKENS);
    }

    #[test]
    fn the_first_of_equal_tokens_is_found_and_no_other_text() {
        let set = |tokens: &[Token]| Set(tokens.iter().cloned().map(Arc::new).collect());
        let tokens: Vec<_> = ["a", "b", "c"].map(|name| token(name, Scope::Run, &format!("{name}-token"))).into();
        for one in &tokens {
            let found = set(&tokens).find(format!("{}-token", one.name).as_bytes()).unwrap();
            assert_eq!(*found, *one);
        }
        for wrong in ["", "a", "a-toke", "a-token ", "A-token", "a-tokena-token"] {
            assert!(set(&tokens).find(wrong.as_bytes()).is_none(), "{wrong:?}");
        }
        assert!(set(&tokens).find(&tokens[0].digest).is_none(), "a digest opens nothing");
        assert!(set(&[]).find(b"a-token").is_none());
        let twice = [token("wide", Scope::Admin, "t"), token("narrow", Scope::Read, "t")];
        assert_eq!(set(&twice).find(b"t").unwrap().name, "wide");
    }
}
