//! stdio: one message per line. Read and answered on one thread, with one write for all answers that are ready; what takes its
//! time is made on a runtime beside it.

use std::{
    io::{BufRead, BufReader, Write, stdin, stdout},
    process::exit,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use futures_util::StreamExt;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    Fake,
    act::{self, Scene},
    answer::{Message, Origin, Reply},
    say,
    script::Stage,
};

const BUFFER: usize = 64 << 10;

/// Serves until the input ends.
pub(crate) fn run(fake: &Arc<Fake>) -> ! {
    let script = fake.script();
    say(&mut stdout(), &script.banner);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads can be had");
    if script.stubborn {
        let _entered = runtime.enter();
        // A handler once set stays set, and SIGTERM then does nothing.
        let _terminate = signal(SignalKind::terminate()).expect("SIGTERM can be handled");
    }
    let mut log = fake.log_file();
    let from = Origin { session: "", headers: None };
    let mut input = BufReader::with_capacity(BUFFER, stdin().lock());
    let mut line = Vec::new();
    let mut output = Vec::with_capacity(BUFFER);
    loop {
        line.clear();
        if !matches!(input.read_until(b'\n', &mut line), Ok(1..)) {
            break;
        }
        let message = Message::parse(&line);
        if let Some(log) = &mut log {
            let mut text = String::from_utf8_lossy(line.trim_ascii()).into_owned();
            if message.is_err() {
                text = Value::from(text).to_string();
            }
            let entry = format!("{{\"pid\":{},\"message\":{text}}}\n", std::process::id());
            log.write_all(entry.as_bytes()).expect("the log can be written");
        }
        let reply = match message {
            Ok(message) => fake.handle(&message, &from),
            Err(error) => Reply::Now(error),
        };
        let ends = matches!(reply, Reply::Last(_) | Reply::Gone);
        match reply {
            Reply::Now(text) | Reply::Refused(_, text) | Reply::Last(text) => {
                output.extend_from_slice(text.as_bytes());
                output.push(b'\n');
            }
            Reply::Later(mut messages) => {
                runtime.spawn(async move {
                    while let Some(message) = messages.next().await {
                        send(&mut (message + "\n").into_bytes());
                    }
                });
            }
            Reply::Act(scene) => {
                send(&mut output);
                if scene.act.deaf {
                    runtime.block_on(act::play(scene));
                } else {
                    runtime.spawn(act::play(scene));
                }
            }
            Reply::Nothing | Reply::Gone => {}
        }
        let deaf = fake.deaf.load(Relaxed);
        if ends || deaf || output.len() >= BUFFER || !input.buffer().contains(&b'\n') {
            send(&mut output);
        }
        if ends {
            exit(fake.script().exit_code);
        }
        if deaf {
            sleep_for_ever();
        }
    }
    if let Some(act) = fake.act(Stage::Close) {
        runtime.block_on(act::play(Scene::new(fake, act, None, None)));
    }
    if fake.script().stubborn {
        sleep_for_ever();
    }
    exit(0)
}

/// One write; the lock keeps lines whole.
pub(super) fn send(text: &mut Vec<u8>) {
    let mut stdout = stdout().lock();
    if stdout.write_all(text).and_then(|()| stdout.flush()).is_err() {
        exit(0);
    }
    text.clear();
}

fn sleep_for_ever() -> ! {
    loop {
        std::thread::park();
    }
}
