//! Runs what fuzzing found worth keeping, with the tests.

use std::path::Path;

/// Calls `target` with each file of `fuzz/corpus/{name}`.
pub fn replay(name: &str, target: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let files = std::fs::read_dir(folder).expect("each target has a corpus");
    let mut count = 0;
    for file in files {
        let data = std::fs::read(file.expect("the folder can be read").path()).expect("the file can be read");
        target(&data);
        count += 1;
    }
    assert!(count > 0, "{name} has no corpus");
}
