//! What holds for any text that stands where an envelope should; see [`crate::mcp::fuzz`].

use super::seal::{KEY_BYTES, Key, Keyring, Place};

const PLACE: Place<'static> = Place { table: "servers", column: "config", id: "mcp_server-1" };
/// The one envelope of the corpus that this key sealed.
const GENUINE: &str = "v1.630dcd2966c4.ZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7.B1GNyY9Lq7ilQ-lbzwCftMXeWMgCXWUSmhCzAGBzTKo";

/// Nothing opens but what was sealed, and everything that was sealed does, in its own place alone.
pub fn envelope(data: &[u8]) {
    let ring = Keyring::new(Key::new(&std::array::from_fn::<u8, KEY_BYTES, _>(|index| index as u8)), Vec::new());
    if let Ok(text) = std::str::from_utf8(data) {
        assert_eq!(ring.open(PLACE, text).is_ok(), text == GENUINE);
    }
    let sealed = ring.first().seal(PLACE, data);
    assert_eq!(ring.open(PLACE, &sealed).expect("it was sealed here").as_slice(), data);
    assert!(ring.open(Place { id: "mcp_server-2", ..PLACE }, &sealed).is_err());
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_holds() {
        crate::corpus::replay("envelope", super::envelope);
    }
}
