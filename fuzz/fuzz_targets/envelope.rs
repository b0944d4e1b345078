#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| portolan::store::fuzz::envelope(data));
