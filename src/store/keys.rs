//! Where keys come from: the environment, a file, or, for SQLite, a file that is made when there is none.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use chacha20poly1305::aead::Generate;
use secrecy::zeroize::Zeroizing;

use crate::model::Secret;

use super::seal::{KEY_BYTES, Key, Keyring};

/// The file that is made in the data folder.
const FILE_NAME: &str = "portolan.key";
/// The most of a key file that is read, in bytes.
const MAX_FILE: u64 = 64 * 1024;

/// Which keys the settings name.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// None: SQLite has its own, PostgreSQL cannot be used.
    Unset,
    /// `PORTOLAN_KEY`: one key.
    Variable(Secret),
    /// A key in each line, the one that seals first; empty lines and those that begin with `#` do not count.
    File(PathBuf),
}

/// What is wrong with a key or its file, in one sentence for the person who starts Portolan; no part of a key is in it.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("Give one of PORTOLAN_KEY and a key file (--key-file, PORTOLAN_KEY_FILE), not both.")]
    Both,
    #[error(
        "PostgreSQL needs a key that seals the stored secrets, and none is given: make one with \
         (umask 077; portolan key new > portolan.key), and name that file with --key-file or PORTOLAN_KEY_FILE."
    )]
    Unset,
    #[error(
        "The key file {} does not exist; put it back, or make a key with (umask 077; portolan key new > FILE) for a \
         database that is new.",
        .0.display()
    )]
    Missing(PathBuf),
    #[error(
        "The key file {} is gone, and secrets in the database are sealed with it: put it back from your copy (if there is \
         none, see Keys in README).",
        .0.display()
    )]
    Gone(PathBuf),
    #[error("The key file {} cannot be read: {cause}.", .file.display())]
    Unreadable { file: PathBuf, cause: std::io::Error },
    #[error("The key file {} cannot be made: {cause}.", .file.display())]
    Unmade { file: PathBuf, cause: std::io::Error },
    #[error("The key file {} can be written by other users; chmod 600 keeps them out.", .0.display())]
    Writable(PathBuf),
    #[error("{0} is empty; it should hold a key as portolan key new prints it.")]
    Empty(String),
    #[error("{0} is larger than a file of keys can be.")]
    TooLarge(String),
    #[error("{0} is no key: write 32 bytes in base64 or hexadecimal, as portolan key new prints them.")]
    Encoding(String),
    #[error("{place} has {bytes} bytes, but a key has 32; portolan key new prints one.")]
    Length { place: String, bytes: usize },
    #[error("{0} is the same key as one before it; give each key once.")]
    Twice(String),
}

impl KeySource {
    /// # Errors
    /// When both are given.
    pub fn new(variable: Option<Secret>, file: Option<PathBuf>) -> Result<Self, KeyError> {
        match (variable, file) {
            (Some(_), Some(_)) => Err(KeyError::Both),
            (Some(key), None) => Ok(Self::Variable(key)),
            (None, Some(file)) => Ok(Self::File(file)),
            (None, None) => Ok(Self::Unset),
        }
    }

    /// The source that SQLite has when none is set.
    pub(super) fn in_folder(data_dir: &Path) -> Self {
        Self::File(data_dir.join(FILE_NAME))
    }

    /// Reads the keys.
    pub(super) fn read(&self) -> Result<Keyring, KeyError> {
        match self {
            Self::Unset => Err(KeyError::Unset),
            Self::Variable(key) => parse(&[key.expose().trim()], &|_| "The key in PORTOLAN_KEY".to_owned())?
                .ok_or(KeyError::Empty("PORTOLAN_KEY".to_owned())),
            Self::File(file) => {
                let text = read_file(file)?;
                let place = format!("The key file {}", file.display());
                let text = std::str::from_utf8(&text).map_err(|_| KeyError::Encoding(place.clone()))?;
                let in_line = |line: usize| format!("Line {} of the key file {}", line + 1, file.display());
                let lines: Vec<_> = text.lines().map(str::trim).collect();
                parse(&lines, &in_line)?.ok_or(KeyError::Empty(place))
            }
        }
    }

    /// Makes the file with a new key, unless somebody else just did; `true` when it was made here.
    pub(super) fn make(&self) -> Result<bool, KeyError> {
        let Self::File(file) = self else { return Ok(false) };
        make_file(file).map_err(|cause| KeyError::Unmade { file: file.clone(), cause })
    }
}

/// A new key as a text, in base64, and its id.
pub fn new_key() -> (Zeroizing<String>, String) {
    let bytes = Zeroizing::new(<[u8; KEY_BYTES]>::generate());
    let id = Key::new(&bytes).id().to_owned();
    (Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(*bytes)), id)
}

fn read_file(file: &Path) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let unreadable = |cause: std::io::Error| match cause.kind() {
        ErrorKind::NotFound => KeyError::Missing(file.to_owned()),
        _ => KeyError::Unreadable { file: file.to_owned(), cause },
    };
    // To open a pipe is to wait for its writer.
    if !std::fs::metadata(file).map_err(unreadable)?.is_file() {
        return Err(unreadable(ErrorKind::InvalidInput.into()));
    }
    let opened = File::open(file).map_err(unreadable)?;
    let metadata = opened.metadata().map_err(unreadable)?;
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions());
        if mode & 0o022 != 0 {
            return Err(KeyError::Writable(file.to_owned()));
        }
        // No refusal: that is how containers are given their secrets.
        if mode & 0o044 != 0 {
            tracing::warn!("the key file can be read by other users; chmod 600 keeps them out");
        }
    }
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(metadata.len().min(MAX_FILE) as usize + 1));
    opened.take(MAX_FILE + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE {
        return Err(KeyError::TooLarge(format!("The key file {}", file.display())));
    }
    Ok(text)
}

/// The keys of these lines, the first one first; `None` when there are none.
fn parse(lines: &[&str], place: &dyn Fn(usize) -> String) -> Result<Option<Keyring>, KeyError> {
    let mut keys: Vec<Key> = Vec::new();
    for (number, line) in lines.iter().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        let bytes = decode(line).ok_or_else(|| KeyError::Encoding(place(number)))?;
        let bytes: &[u8; KEY_BYTES] =
            bytes.as_slice().try_into().map_err(|_| KeyError::Length { place: place(number), bytes: bytes.len() })?;
        let key = Key::new(bytes);
        if keys.iter().any(|known| known.id() == key.id()) {
            return Err(KeyError::Twice(place(number)));
        }
        keys.push(key);
    }
    let mut keys = keys.into_iter();
    Ok(keys.next().map(|first| Keyring::new(first, keys.collect())))
}

/// Hexadecimal where that is possible, else base64 of either alphabet, padded or not.
fn decode(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    if text.len().is_multiple_of(2) && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let byte = |place| u8::from_str_radix(&text[place..place + 2], 16).ok();
        return (0..text.len()).step_by(2).map(byte).collect::<Option<_>>().map(Zeroizing::new);
    }
    let lenient = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decoded =
        [STANDARD, URL_SAFE].iter().find_map(|alphabet| GeneralPurpose::new(alphabet, lenient).decode(text).ok());
    decoded.map(Zeroizing::new)
}

/// Writes a key beside the file and links it there: the file is never half of one, and of two that are made at once one
/// wins.
fn make_file(file: &Path) -> std::io::Result<bool> {
    let draft = file.with_extension(format!("key.{}", uuid::Uuid::new_v4().simple()));
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let linked = options.open(&draft).and_then(|mut out| {
        out.write_all(
            b"# The secrets in Portolan's database are sealed with this key. Keep a copy of it elsewhere.\n",
        )?;
        out.write_all(new_key().0.as_bytes())?;
        out.write_all(b"\n")?;
        out.sync_all()?;
        std::fs::hard_link(&draft, file)
    });
    // Gone or left, it changes nothing.
    let _ = std::fs::remove_file(&draft);
    match linked {
        Ok(()) => {
            if let Some(folder) = file.parent() {
                // A database that outlives its key in a power cut would be lost.
                File::open(folder).and_then(|folder| folder.sync_all())?;
            }
            Ok(true)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const BASE64: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    fn ids(source: &KeySource) -> Result<Vec<String>, String> {
        let ring = source.read().map_err(|error| error.to_string())?;
        Ok(ring.keys().map(|key| key.id().to_owned()).collect())
    }

    fn variable(text: &str) -> KeySource {
        KeySource::Variable(text.to_owned().into())
    }

    #[test]
    fn a_key_is_32_bytes_in_base64_or_hexadecimal() {
        let padless = BASE64.trim_end_matches('=');
        for text in [HEX, &HEX.to_uppercase(), BASE64, padless, &format!(" {BASE64}\n")] {
            assert_eq!(ids(&variable(text)).unwrap(), ["630dcd2966c4"], "{text}");
        }
        let high = "_".repeat(42) + "8";
        assert_eq!(ids(&variable(&high)), ids(&variable(&high.replace('_', "/"))), "either alphabet");
        assert_eq!(ids(&variable(&new_key().0)).unwrap().len(), 1);
        assert_ne!(*new_key().0, *new_key().0);
        for (text, part) in [
            ("", "empty"),
            (" \n", "empty"),
            ("correct horse", "no key"),
            (&HEX[2..], "31 bytes"),
            (&format!("{HEX}20"), "33 bytes"),
            ("AAECAwQ=", "5 bytes"),
            (&format!("{BASE64}{BASE64}"), "no key"),
        ] {
            let error = ids(&variable(text)).unwrap_err();
            assert!(error.contains(part) && error.contains("PORTOLAN_KEY"), "{text}: {error}");
            assert!(!error.contains("horse") && !error.contains("AAEC") && !error.contains("0203"), "{error}");
        }
    }

    #[test]
    fn a_key_file_has_a_key_in_each_line_the_first_of_which_seals() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        let source = KeySource::File(file.clone());
        let set = |text: &[u8], mode| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
        };
        assert!(ids(&source).unwrap_err().contains("does not exist"));
        let other = "f".repeat(64);
        set(format!("# a\n\n  {other}\r\n{BASE64}\n").as_bytes(), 0o600);
        assert_eq!(ids(&source).unwrap()[1], "630dcd2966c4");
        // As containers mount it.
        set(BASE64.as_bytes(), 0o444);
        assert_eq!(ids(&source).unwrap(), ["630dcd2966c4"]);
        for (text, mode, part) in [
            (BASE64.as_bytes(), 0o620, "written by other users"),
            (BASE64.as_bytes(), 0o602, "written by other users"),
            (b"", 0o600, "is empty"),
            (b"# only words\n", 0o600, "is empty"),
            (b"\xff\xfe", 0o600, "no key"),
            (format!("{BASE64}\n{HEX}\n").as_bytes(), 0o600, "Line 2"),
            (format!("{BASE64}\nshort\n").as_bytes(), 0o600, "Line 2"),
            (format!("{BASE64}\n{BASE64} {BASE64}\n").as_bytes(), 0o600, "Line 2"),
            (&[b'#'; 100_000], 0o600, "larger"),
        ] {
            set(text, mode);
            let error = ids(&source).unwrap_err();
            assert!(error.contains(part) && error.contains("keys") && !error.contains("AAEC"), "{part}: {error}");
        }
        assert!(ids(&KeySource::File(folder.path().to_owned())).unwrap_err().contains("cannot be read"));
    }

    #[test]
    fn a_key_is_made_once_however_many_make_it() {
        let folder = tempfile::tempdir().unwrap();
        let source = KeySource::in_folder(folder.path());
        let made = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| (source.make().unwrap(), ids(&source).unwrap()))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(made.iter().filter(|(made, _)| *made).count(), 1);
        assert!(made.iter().all(|(_, ids)| *ids == made[0].1 && ids.len() == 1), "{made:?}");
        let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().flatten().collect();
        assert_eq!(files.len(), 1, "no draft is left");
        assert_eq!(files[0].metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(KeySource::in_folder(&folder.path().join("nowhere")).make().is_err());
    }
}
