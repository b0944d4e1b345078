#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| portolan::mcp::fuzz::templates(data));
