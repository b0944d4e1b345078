//! `fake-mcp stdio [ANYTHING…] [SCRIPT.json]`, `fake-mcp http [--listen ADDRESS] [--script FILE]` and the same with `sse`: the fake
//! MCP server as a program. The last two listen on a free loopback port and print their URL as the first line.

#[path = "mod.rs"]
mod fake;

use std::{io::Write, path::PathBuf};

use fake::{Fake, Running, http, sse, stdio};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let script = match &arguments[..] {
        [.., flag, file] if flag == "--script" => Some(file),
        [.., file] if file.ends_with(".json") => Some(file),
        _ => None,
    };
    let fake = Fake::standalone(script.map(PathBuf::from));
    let address = match &arguments[..] {
        [_, _, flag, address, ..] if flag == "--listen" => {
            address.parse().expect("--listen takes an address and a port")
        }
        _ => fake::anywhere(),
    };
    match arguments.get(1).map(String::as_str) {
        Some("stdio") => {
            fake.start();
            stdio::run(&fake)
        }
        Some("http") => {
            fake.start();
            listen(http::serve_on(address, fake));
        }
        Some("sse") => {
            fake.start();
            listen(sse::serve_on(address, fake));
        }
        _ => panic!("usage: fake-mcp stdio|http|sse [SCRIPT.json]"),
    }
}

fn listen(running: Running) {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{}", running.url).and_then(|()| stdout.flush()).expect("somebody reads the URL");
    running.wait();
}
