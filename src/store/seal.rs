//! Secrets at rest: each is sealed into an envelope that opens only with its key and only in its own place.
//!
//! An envelope is `v1.<key id>.<nonce>.<ciphertext>`: XChaCha20-Poly1305 with a random nonce, the last two in base64url
//! without padding. What is authenticated beside the text is the version, the key id, the table, the column and the row's
//! id, so an envelope that was moved or changed, by one bit even, does not open. The id of a key is the first 48 bits of
//! its SHA-256, in hexadecimal: it tells keys apart and says nothing about them.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chacha20poly1305::aead::{Aead, Generate, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use secrecy::zeroize::Zeroizing;
use sha2::{Digest, Sha256};

use crate::model::hex;

/// How envelopes of this version begin.
pub const VERSION: &str = "v1";
pub const KEY_BYTES: usize = 32;
/// The characters of a key's id.
pub const KEY_ID_CHARS: usize = 12;
const NONCE_BYTES: usize = 24;

/// One key. It is zeroed when it is dropped, and nothing prints it.
pub struct Key {
    id: String,
    cipher: XChaCha20Poly1305,
}

impl Key {
    pub fn new(bytes: &[u8; KEY_BYTES]) -> Self {
        let digest = Sha256::digest(bytes);
        let id = hex(&digest[..KEY_ID_CHARS / 2]);
        Self { id, cipher: XChaCha20Poly1305::new(bytes.into()) }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Seals `text` for one column of one row.
    pub fn seal(&self, place: Place<'_>, text: &[u8]) -> String {
        let nonce = XNonce::generate();
        let sealed = self.cipher.encrypt(&nonce, Payload { msg: text, aad: &place.bound_to(&self.id) });
        let sealed = sealed.expect("a text of a row is far shorter than what the cipher takes");
        format!("{VERSION}.{}.{}.{}", self.id, URL_SAFE_NO_PAD.encode(nonce), URL_SAFE_NO_PAD.encode(sealed))
    }

    fn open(&self, place: Place<'_>, nonce: &[u8; NONCE_BYTES], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let payload = Payload { msg: sealed, aad: &place.bound_to(&self.id) };
        self.cipher.decrypt(nonce.into(), payload).ok().map(Zeroizing::new)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.id)
    }
}

/// Where a sealed text belongs.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub table: &'static str,
    pub column: &'static str,
    /// The row's primary key.
    pub id: &'a str,
}

impl Place<'_> {
    /// What is authenticated beside the text. The id comes last: no part but that can hold a NUL.
    fn bound_to(&self, key_id: &str) -> Vec<u8> {
        format!("portolan\0{VERSION}\0{key_id}\0{}\0{}\0{}", self.table, self.column, self.id).into_bytes()
    }
}

/// Why an envelope does not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unopened {
    /// It is sealed with a key that is not on the ring.
    NoKey,
    /// It is no envelope of a version that is known, was changed, or belongs elsewhere.
    Damaged,
}

/// The key that seals, and those that only open, in the order of their file.
#[derive(Debug)]
pub struct Keyring {
    first: Key,
    others: Vec<Key>,
}

impl Keyring {
    pub fn new(first: Key, others: Vec<Key>) -> Self {
        Self { first, others }
    }

    /// The key that seals.
    pub fn first(&self) -> &Key {
        &self.first
    }

    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.first).chain(&self.others)
    }

    pub fn key(&self, id: &str) -> Option<&Key> {
        self.keys().find(|key| key.id == id)
    }

    /// Opens what one of the keys sealed for this very place.
    pub fn open(&self, place: Place<'_>, envelope: &str) -> Result<Zeroizing<Vec<u8>>, Unopened> {
        let mut parts = envelope.split('.');
        let (Some(VERSION), Some(key_id), Some(nonce), Some(sealed), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Unopened::Damaged);
        };
        if !is_key_id(key_id) {
            return Err(Unopened::Damaged);
        }
        let key = self.key(key_id).ok_or(Unopened::NoKey)?;
        let decode = |text| URL_SAFE_NO_PAD.decode(text).map_err(|_| Unopened::Damaged);
        let nonce = decode(nonce)?.try_into().map_err(|_| Unopened::Damaged)?;
        key.open(place, &nonce, &decode(sealed)?).ok_or(Unopened::Damaged)
    }
}

/// The id of the key that sealed this, by what the envelope says; `None` for anything but an envelope.
pub fn key_id(envelope: &str) -> Option<&str> {
    let id = envelope.strip_prefix(VERSION)?.strip_prefix('.')?.split('.').next()?;
    is_key_id(id).then_some(id)
}

fn is_key_id(text: &str) -> bool {
    text.len() == KEY_ID_CHARS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const PLACE: Place<'static> = Place { table: "servers", column: "config", id: "mcp_server-1" };

    fn ring(first: u8, others: &[u8]) -> Keyring {
        let key = |byte: &u8| Key::new(&[*byte; KEY_BYTES]);
        Keyring::new(key(&first), others.iter().map(key).collect())
    }

    #[test]
    fn what_is_sealed_opens_in_its_place_with_any_key_of_the_ring() {
        let sealed = ring(1, &[]).first().seal(PLACE, b"hunter2");
        assert!(!sealed.contains("hunter2"));
        for ring in [ring(1, &[]), ring(2, &[1]), ring(3, &[2, 1])] {
            assert_eq!(ring.open(PLACE, &sealed).unwrap().as_slice(), b"hunter2");
        }
        assert_eq!(ring(2, &[3]).open(PLACE, &sealed).unwrap_err(), Unopened::NoKey);
        assert_ne!(sealed, ring(1, &[]).first().seal(PLACE, b"hunter2"), "each has its own nonce");
        assert_eq!(key_id(&sealed), Some(ring(1, &[]).first().id()));
        assert_eq!(key_id("{\"type\":\"stdio\"}"), None);
    }

    /// Written once and for all: what this opens must open with every later version, and with any other implementation of
    /// the format.
    #[test]
    fn the_format_does_not_drift() {
        let key = Key::new(&std::array::from_fn(|index| index as u8));
        assert_eq!(key.id(), "630dcd2966c4");
        // Made by another implementation.
        let golden = "v1.630dcd2966c4.ZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7.B1GNyY9Lq7ilQ-lbzwCftMXeWMgCXWUSmhCzAGBzTKo";
        let ring = Keyring::new(key, vec![]);
        assert_eq!(ring.open(PLACE, golden).unwrap().as_slice(), b"{\"type\":\"stdio\"}");
    }

    #[test]
    fn an_envelope_opens_nowhere_else() {
        let ring = ring(1, &[]);
        let sealed = ring.first().seal(PLACE, b"hunter2");
        assert!(ring.open(PLACE, &sealed).is_ok());
        for elsewhere in [
            Place { id: "mcp_server-2", ..PLACE },
            Place { column: "error", ..PLACE },
            Place { table: "oauth", ..PLACE },
            Place { column: "config\0mcp_server-1", id: "", ..PLACE },
        ] {
            assert_eq!(ring.open(elsewhere, &sealed).unwrap_err(), Unopened::Damaged, "{elsewhere:?}");
        }
    }

    #[test]
    fn a_change_of_any_character_is_noticed() {
        let ring = ring(1, &[2]);
        let sealed = ring.first().seal(PLACE, b"hunter2");
        for place in 0..sealed.len() {
            for bit in 0..7 {
                let mut bytes = sealed.clone().into_bytes();
                bytes[place] ^= 1 << bit;
                let changed = String::from_utf8(bytes).unwrap();
                assert!(ring.open(PLACE, &changed).is_err(), "bit {bit} of character {place}: {changed}");
            }
            let mut shorter = sealed.clone();
            shorter.remove(place);
            assert!(ring.open(PLACE, &shorter).is_err(), "without character {place}");
            assert!(ring.open(PLACE, &sealed[..place]).is_err(), "cut at {place}");
        }
        // The other key's id before this key's text.
        let swapped = sealed.replace(ring.first().id(), ring.others[0].id());
        assert_eq!(ring.open(PLACE, &swapped).unwrap_err(), Unopened::Damaged);
        for longer in [format!("{sealed}A"), format!("{sealed}="), format!("{sealed}."), format!(" {sealed}")] {
            assert_eq!(ring.open(PLACE, &longer).unwrap_err(), Unopened::Damaged);
        }
        for text in ["", "v1", "v1...", "{}", "v2.000000000000.AAAA.AAAA"] {
            assert_eq!(ring.open(PLACE, text).unwrap_err(), Unopened::Damaged, "{text}");
        }
    }

    #[test]
    fn nothing_prints_a_key() {
        let printed = format!("{:?}", ring(7, &[8]));
        assert!(!printed.contains("7, 7") && !printed.contains("0707"), "{printed}");
    }
}
