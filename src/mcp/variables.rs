//! The values of variables in templates (CONTRACT row 17): those that a request brings, and those in the operator's file.
//! Never the process environment, where Portolan's own secrets are.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use uuid::Uuid;

use crate::model::{Connector, Secret};

use super::Error;
use super::template::{Filling, Needs, is_name};

/// The largest header and the most variables in it, and in the operator's file; bytes.
const HEADER: Limits = Limits { bytes: 16 * 1024, variables: 100 };
const FILE: Limits = Limits { bytes: 1024 * 1024, variables: 10_000 };
/// The longest name, in bytes.
const MAX_NAME: usize = 255;

#[derive(Clone, Copy)]
struct Limits {
    bytes: usize,
    variables: usize,
}

/// What is wrong with variables; each message ends a sentence that begins with what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VariablesError {
    #[error("must be a JSON object of strings.")]
    Malformed,
    #[error("may have at most {0} bytes.")]
    TooLarge(usize),
    #[error("may have at most {0} variables.")]
    TooMany(usize),
    #[error(
        "must name each variable with capital letters, digits and underscores, not beginning with a digit, and with at most \
         {MAX_NAME} of them."
    )]
    Name,
    #[error("names a variable twice.")]
    Twice,
    #[error("has a NUL character in a value.")]
    Nul,
}

/// Values by the names of their variables. Clones share them.
#[derive(Clone, Default, PartialEq)]
pub struct Variables(Arc<BTreeMap<String, Secret>>);

impl fmt::Debug for Variables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Variables(…)")
    }
}

impl Variables {
    /// The header that brings them.
    pub const HEADER: &str = "x-portolan-variables";

    /// Those of a request's header.
    ///
    /// # Errors
    /// What is wrong; nothing of the text is repeated.
    pub fn read(json: &[u8]) -> Result<Self, VariablesError> {
        read(json, HEADER)
    }

    /// By name, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Secret)> {
        self.0.iter()
    }
}

/// All entries as they stand, so that one that comes twice is seen.
struct Entries(Vec<(String, Secret)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                    if entries.len() > FILE.variables {
                        return Err(A::Error::custom("too many"));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

fn read(json: &[u8], limits: Limits) -> Result<Variables, VariablesError> {
    if json.len() > limits.bytes {
        return Err(VariablesError::TooLarge(limits.bytes));
    }
    let Entries(entries) = serde_json::from_slice(json).map_err(|_| VariablesError::Malformed)?;
    if entries.len() > limits.variables {
        return Err(VariablesError::TooMany(limits.variables));
    }
    let mut variables = BTreeMap::new();
    for (name, value) in entries {
        if name.len() > MAX_NAME || !is_name(&name) {
            return Err(VariablesError::Name);
        }
        if value.expose().contains('\0') {
            return Err(VariablesError::Nul);
        }
        if variables.insert(name, value).is_some() {
            return Err(VariablesError::Twice);
        }
    }
    Ok(Variables(Arc::new(variables)))
}

/// Why the operator's file cannot be used; each message is one sentence for the administrator.
#[derive(Debug, thiserror::Error)]
pub enum VariablesFileError {
    #[error("Cannot read the file {file:?} of --variables-file: {cause}.")]
    Unreadable { file: PathBuf, cause: io::Error },
    #[error("The file of --variables-file {0}")]
    Malformed(VariablesError),
}

/// The operator's variables. Clones share everything.
#[derive(Clone)]
pub struct VariablesFile {
    file: Option<PathBuf>,
    current: Arc<RwLock<Variables>>,
    /// For the marks of values: they mean nothing to whoever has not got it.
    key: [u8; 32],
}

impl VariablesFile {
    /// Reads the file, if there is to be one.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn open(file: Option<PathBuf>) -> Result<Self, VariablesFileError> {
        let current = file.as_deref().map(contents).transpose()?.unwrap_or_default();
        let mut key = [0; 32];
        key[..16].copy_from_slice(Uuid::new_v4().as_bytes());
        key[16..].copy_from_slice(Uuid::new_v4().as_bytes());
        Ok(Self { file, current: Arc::new(RwLock::new(current)), key })
    }

    /// Reads it again; how many variables there are now, `None` without a file. Sessions that were opened with other
    /// values are not used any more.
    ///
    /// # Errors
    /// When it cannot be used; all values stay as they were.
    pub fn reload(&self) -> Result<Option<usize>, VariablesFileError> {
        let Some(file) = &self.file else { return Ok(None) };
        let variables = contents(file)?;
        let count = variables.0.len();
        // The value is replaced as a whole: nobody can have left half of it.
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = variables;
        Ok(Some(count))
    }

    fn current(&self) -> Variables {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The values for the templates of a configuration: the request's before the operator's.
    ///
    /// # Errors
    /// [`Error::NoValue`].
    pub(super) fn choose(&self, needs: &Needs, given: &Variables) -> Result<Filling, Error> {
        let current = self.current();
        Filling::choose(needs, |name| given.0.get(name), |name| current.0.get(name), &self.key)
    }

    /// As [`VariablesFile::choose`], for a configuration that nobody has looked at.
    ///
    /// # Errors
    /// [`Error::NoValue`].
    pub(super) fn choose_for(&self, connector: &Connector, given: &Variables) -> Result<Filling, Error> {
        self.choose(&Needs::of(connector), given)
    }
}

fn contents(path: &Path) -> Result<Variables, VariablesFileError> {
    let read_all = || {
        // Opening a pipe could wait for ever.
        if !path.metadata()?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let file = File::open(path)?;
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata()?.permissions());
            // Whoever may write it chooses what servers are sent and started with.
            if mode & 0o022 != 0 {
                return Err(io::Error::other("other users may write it; chmod 600 keeps them out"));
            }
            // No refusal: that is how containers are given their secrets.
            if mode & 0o044 != 0 {
                tracing::warn!("the file of --variables-file can be read by other users; chmod 600 keeps them out");
            }
        }
        let mut bytes = Vec::new();
        file.take(FILE.bytes as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read_all().map_err(|cause| VariablesFileError::Unreadable { file: path.to_owned(), cause })?;
    read(&bytes, FILE).map_err(VariablesFileError::Malformed)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_strictly() {
        use VariablesError::*;

        let read = |text: &str| Variables::read(text.as_bytes()).map(|variables| variables.0.len());
        assert_eq!(read("{}"), Ok(0));
        assert_eq!(read(r#"{"A": "", "_B9": "é\n\"", "C": "{{ A }}"}"#), Ok(3));
        assert_eq!(read(&format!(r#"{{"{}": "1"}}"#, "A".repeat(255))), Ok(1));
        for (text, why) in [
            ("", Malformed),
            ("A=1", Malformed),
            ("[]", Malformed),
            ("null", Malformed),
            (r#""A""#, Malformed),
            (r#"{"A": 1}"#, Malformed),
            (r#"{"A": null}"#, Malformed),
            (r#"{"A": {"B": "1"}}"#, Malformed),
            (r#"{"A": "1"} x"#, Malformed),
            (r#"{"A": "1",}"#, Malformed),
            (r#"{"A": "\ud800"}"#, Malformed),
            (r#"{"a": "1"}"#, Name),
            (r#"{"": "1"}"#, Name),
            (r#"{"9A": "1"}"#, Name),
            (r#"{"A-B": "1"}"#, Name),
            (r#"{"É": "1"}"#, Name),
            (&format!(r#"{{"{}": "1"}}"#, "A".repeat(256)), Name),
            (r#"{"A": "1", "A": "1"}"#, Twice),
            (r#"{"A": "1", "\u0041": "2"}"#, Twice),
            (r#"{"A": "\u0000"}"#, Nul),
            (&format!(r#"{{"A": "{}"}}"#, "a".repeat(16 * 1024)), TooLarge(16 * 1024)),
        ] {
            assert_eq!(read(text), Err(why), "{text:.40}");
        }
        let many = |count: usize| {
            let entries: Vec<_> = (0..count).map(|number| format!(r#""A{number}": """#)).collect();
            format!("{{{}}}", entries.join(","))
        };
        assert_eq!((read(&many(100)), read(&many(101))), (Ok(100), Err(TooMany(100))));
        assert_eq!(Variables::read(b"{\"A\": \"\xff\"}"), Err(Malformed));
    }

    #[test]
    fn a_file_is_read_again_or_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("variables.json");
        assert!(VariablesFile::open(Some(path.clone())).is_err(), "it is missing");
        std::fs::write(&path, r#"{"A": "1"}"#).unwrap();
        let file = VariablesFile::open(Some(path.clone())).unwrap();
        let value = || file.current().0.get("A").map(|value| value.expose().to_owned());
        assert_eq!(value().as_deref(), Some("1"));
        std::fs::write(&path, r#"{"A": "2", "B": ""}"#).unwrap();
        assert_eq!(file.reload().unwrap(), Some(2));
        assert_eq!(value().as_deref(), Some("2"));
        for bad in ["{", r#"{"a": "3"}"#, r#"{"A": 3}"#] {
            std::fs::write(&path, bad).unwrap();
            let error = file.reload().unwrap_err().to_string();
            assert!(error.starts_with("The file of --variables-file ") && !error.contains('3'), "{error}");
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::write(&path, r#"{"A": "4"}"#).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o622)).unwrap();
            assert!(file.reload().unwrap_err().to_string().contains("chmod 600"));
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        assert_eq!(value().as_deref(), Some("2"));
        assert_eq!(file.reload().unwrap(), Some(1));
        assert_eq!(VariablesFile::open(None).unwrap().reload().unwrap(), None);
    }
}
