//! What Letta keeps secret, in clear again: its `letta/helpers/crypto_utils.py` (0.13 to 0.16.8) says how it is sealed.
//!
//! Base64 of a salt, a nonce, and AES-256-GCM of the text; the key comes from `LETTA_ENCRYPTION_KEY` by PBKDF2 with SHA-256.
//! A Letta without that key writes the text itself into the same column, and both may stand in one database.

use std::num::NonZeroU32;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::pbkdf2::{PBKDF2_HMAC_SHA256, derive};
use secrecy::zeroize::Zeroizing;

use crate::model::Secret;

const SALT: usize = 16;
const NONCE: usize = 12;
const TAG: usize = 16;
const ROUNDS: NonZeroU32 = NonZeroU32::new(100_000).expect("it is not zero");

/// How these begin Letta knows for texts, however long.
const PLAIN: [&str; 17] = [
    "sk-", "pk-", "api-", "key-", "token-", "Bearer ", "xoxb-", "xoxp-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_",
    "AKIA", "ABIA", "ACCA", "ASIA",
];

/// With what the secrets of one Letta open.
pub enum Opener {
    Key(Secret),
    /// Nothing opens.
    NoKey,
    /// Nothing is sealed, whatever it looks like.
    Unsealed,
}

/// Why a secret cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Closed {
    #[error("it is sealed, and no key was given")]
    NoKey,
    #[error("it is sealed with another key than the one given, or damaged")]
    WrongKey,
}

impl Opener {
    /// The secret of a pair of columns: what `sealed` holds goes before what older versions wrote in clear, which Letta
    /// itself does not read any more once there is the other. An empty text is none.
    ///
    /// # Errors
    /// [`Closed`], when there is one and it cannot be had.
    pub fn open(&self, sealed: Option<&str>, clear: Option<&str>) -> Result<Option<Secret>, Closed> {
        let given = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(|text| Secret::from(text.to_owned()));
        let Some(sealed) = sealed.filter(|sealed| !sealed.is_empty()) else { return Ok(given(clear)) };
        let opened = match (self, envelope(sealed)) {
            (Self::Unsealed, _) | (_, None) => Ok(sealed.to_owned().into()),
            (Self::NoKey, Some(_)) => Err(Closed::NoKey),
            (Self::Key(key), Some(envelope)) => opened(key, envelope).ok_or(Closed::WrongKey),
        };
        match (opened, given(clear)) {
            (Ok(text), _) => Ok(Some(text).filter(|text| !text.expose().is_empty())),
            (Err(_), Some(clear)) => Ok(Some(clear)),
            (Err(closed), None) => Err(closed),
        }
    }
}

/// What Letta can have sealed: its base64 has no other spelling. Letta takes a text that is base64 of the right length for
/// sealed, too; but of many hexadecimal digits one that is has others among them.
fn envelope(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let plain = PLAIN.iter().any(|start| text.starts_with(start)) || text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let bytes = if plain { None } else { STANDARD.decode(text).ok() };
    bytes.filter(|bytes| bytes.len() > SALT + NONCE + TAG).map(Zeroizing::new)
}

fn opened(key: &Secret, mut envelope: Zeroizing<Vec<u8>>) -> Option<Secret> {
    let (salt, rest) = envelope.split_at_mut(SALT);
    let (nonce, sealed) = rest.split_at_mut(NONCE);
    let mut derived = Zeroizing::new([0; 32]);
    derive(PBKDF2_HMAC_SHA256, ROUNDS, salt, key.expose().as_bytes(), derived.as_mut());
    let derived = UnboundKey::new(&AES_256_GCM, derived.as_ref()).expect("the key has 32 bytes");
    let nonce = Nonce::try_assume_unique_for_key(nonce).expect("the nonce has 12 bytes");
    let text = LessSafeKey::new(derived).open_in_place(nonce, Aad::empty(), sealed).ok()?;
    str::from_utf8(text).ok().map(|text| text.to_owned().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Sealed by Letta 0.16.8 with this key: `made-up-sealed-token-1`.
    const KEY: &str = "made-up-letta-encryption-key-1";
    const SEALED: &str = "INkTjLTXMFl39rPnj7EZM4a3ARBmkkJwd3hH6pQfWwdfDB9zn08D5uY0SsHoIv2eZMiUmNvERQOJOrxDSSFgKYS9";

    fn key(text: &str) -> Opener {
        Opener::Key(text.to_owned().into())
    }

    fn of(opener: &Opener, sealed: Option<&str>, clear: Option<&str>) -> Result<Option<String>, Closed> {
        opener.open(sealed, clear).map(|secret| secret.map(|secret| secret.expose().to_owned()))
    }

    #[test]
    fn what_letta_sealed_opens_with_its_key_alone() {
        assert_eq!(of(&key(KEY), Some(SEALED), None), Ok(Some("made-up-sealed-token-1".to_owned())));
        assert_eq!(of(&key("another"), Some(SEALED), None), Err(Closed::WrongKey));
        assert_eq!(of(&Opener::NoKey, Some(SEALED), None), Err(Closed::NoKey));
        assert_eq!(of(&Opener::Unsealed, Some(SEALED), None), Ok(Some(SEALED.to_owned())));
        let damaged = SEALED.replace("wdf", "wdg");
        assert_eq!(of(&key(KEY), Some(&damaged), None), Err(Closed::WrongKey));
    }

    #[test]
    fn a_text_in_the_sealed_column_is_taken_as_it_is() {
        let hexadecimal = "0123456789abcdef".repeat(4);
        let slack = format!("xoxb-{}", "a".repeat(80));
        for text in ["short", r#"{"X-Api-Key": "made-up-plain-header-1"}"#, &hexadecimal, &slack, "AKIA0000"] {
            for opener in [Opener::NoKey, key(KEY)] {
                assert_eq!(of(&opener, Some(text), None), Ok(Some(text.to_owned())), "{text}");
            }
        }
        // Nothing tells this one from what is sealed.
        let long = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567".to_owned();
        assert_eq!(of(&Opener::NoKey, Some(&long), None), Err(Closed::NoKey));
        assert_eq!(of(&Opener::Unsealed, Some(&long), None), Ok(Some(long.clone())));
    }

    #[test]
    fn the_old_column_fills_in_for_the_other() {
        let old = Some("old".to_owned());
        assert_eq!(of(&Opener::NoKey, None, Some("old")), Ok(old.clone()));
        assert_eq!(of(&Opener::NoKey, Some(""), Some("old")), Ok(old.clone()));
        assert_eq!(of(&Opener::NoKey, Some(SEALED), Some("old")), Ok(old));
        assert_eq!(of(&Opener::NoKey, Some("new"), Some("old")), Ok(Some("new".to_owned())));
        assert_eq!(of(&Opener::NoKey, None, None), Ok(None));
        assert_eq!(of(&Opener::NoKey, Some(""), Some("")), Ok(None));
    }
}
