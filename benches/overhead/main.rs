//! What Portolan costs: the start, the memory, and what a run takes beyond the call it makes. Each figure stands beside the bar it
//! must reach; a missed bar is told and fails nothing, a wrong answer ends the benchmark.
//!
//! `cargo bench --bench overhead -- [--json FILE]`, alone on the machine. With `PORTOLAN_TEST_POSTGRES_URL` (a server where databases
//! may be made) PostgreSQL is measured as well as SQLite.
//!
//! Portolan is the real program. The upstream is the fake server of the tests, as processes: this program run again with `fake`.
//! Both sides of a ratio take turns, batch by batch, and the ratio is the median over the turns, so that whatever else the machine
//! does hits both. The callers, and what they call directly, are in this process, which has as many threads as Portolan.
//!
//! With one caller most of a time is waking the next process up, which takes several times as long on another processor as on the
//! same one; where the system puts them is chance, and shows in the ranges. `taskset -c 0 cargo bench …` takes chance out: all that is
//! left is the work itself.
#![expect(clippy::print_stdout, reason = "the table is the output")]

mod call;
mod database;
mod direct;
#[path = "../../tests/fake/mod.rs"]
mod fake;
mod measure;
mod portolan;
mod report;
mod upstream;

use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use call::Caller;
use database::Database;
use measure::{Laps, take_turns, take_turns_in_crowds};
use portolan::Portolan;
use report::{Bar, Report};
use upstream::{Kind, Upstream};

const STARTS: usize = 10;
const SESSIONS: usize = 50;
/// One caller: turns, and calls per turn.
const TURNS: usize = 60;
const CALLS: usize = 100;
const CALLERS: usize = 16;
/// Sixteen callers: turns, and calls per turn of each caller.
const CROWD_TURNS: usize = 10;
const CROWD_CALLS: usize = 80;
const FEW: usize = 10;
const MANY: usize = 10_000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, kind] = &arguments[..]
        && first == "fake"
    {
        upstream::serve(kind);
    }
    // Cargo adds `--bench`.
    let mut arguments = arguments.into_iter().filter(|argument| argument != "--bench");
    let json = match (arguments.next(), arguments.next(), arguments.next()) {
        (None, ..) => None,
        (Some(flag), Some(file), None) if flag == "--json" => Some(PathBuf::from(file)),
        _ => panic!("usage: overhead [--json FILE]"),
    };
    rustls::crypto::ring::default_provider().install_default().expect("nobody was here before");
    tokio::runtime::Runtime::new().expect("threads can be had").block_on(bench(json.as_deref()));
}

async fn bench(json: Option<&Path>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut report = Report::new();
    if cfg!(debug_assertions) {
        report.remark("This is a debug build: no figure means anything. Use cargo bench.");
    }
    start(&mut report, &folder).await;
    sessions(&mut report, &folder).await;
    let mut databases = vec![Database::sqlite()];
    match std::env::var("PORTOLAN_TEST_POSTGRES_URL") {
        Ok(server) => databases.push(Database::postgres(server)),
        Err(_) => report.remark("PostgreSQL was NOT measured: PORTOLAN_TEST_POSTGRES_URL is not set."),
    }
    for database in &databases {
        runs(&mut report, database, &folder).await;
    }
    for database in &databases {
        growth(&mut report, database, &folder).await;
    }
    report.finish();
    if let Some(file) = json {
        report.write_json(file);
    }
}

/// Size, time from spawn to the first answer, idle memory; always on SQLite.
async fn start(report: &mut Report, folder: &TempDir) {
    report.section("Start (SQLite)");
    let program = std::fs::metadata(portolan::PROGRAM).expect("cargo built it");
    report.value("size of the program, stripped", program.len() as f64 / 1e6, "MB", Bar::AtMost(20.0));

    let existing = folder.path().join("existing");
    let upstream = Upstream::start(Kind::Http).await;
    let (portolan, _) = Portolan::start(&existing, None).await;
    portolan.register("upstream", upstream.config()).await;
    portolan.stop().await;

    let (mut old, mut new) = (Laps::default(), Laps::default());
    let mut idle = Laps::default();
    for number in 0..STARTS {
        let (portolan, took) = Portolan::start(&existing, None).await;
        old.add(took);
        // Whatever the start still does in the background is part of being idle.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        idle.0.push(portolan.resident());
        portolan.stop().await;
        let (portolan, took) = Portolan::start(&folder.path().join(format!("new-{number}")), None).await;
        new.add(took);
        portolan.stop().await;
    }
    report.laps("ready on an existing file", &old, "ms", Bar::AtMost(100.0));
    report.laps("ready on an empty folder", &new, "ms", Bar::None);
    report.laps("resident when idle", &idle, "MB", Bar::AtMost(25.0));
}

/// What a live idle session costs in memory.
async fn sessions(report: &mut Report, folder: &TempDir) {
    report.section("Memory of sessions (SQLite)");
    for (kind, bar) in [(Kind::Stdio, Bar::AtMost(70.0)), (Kind::Http, Bar::AtMost(150.0)), (Kind::Sse, Bar::None)] {
        let upstream = Upstream::start(kind).await;
        let (portolan, _) = Portolan::start(&folder.path().join(format!("sessions-{kind:?}")), None).await;
        // The first ones also grow buffers, pools and caches that the others share.
        for number in 0..SESSIONS / 2 {
            portolan.register(&format!("first-{number}"), upstream.config()).await;
        }
        let before = portolan.resident();
        for number in 0..SESSIONS {
            portolan.register(&format!("more-{number}"), upstream.config()).await;
        }
        let each = (portolan.resident() - before) * 1e3 / SESSIONS as f64;
        report.value(&format!("one live idle session, {}", kind.name()), each, "kB", bar);
        portolan.stop().await;
    }
}

/// One run and sixteen at a time, against the same call on a kept session without Portolan.
async fn runs(report: &mut Report, database: &Database, folder: &TempDir) {
    let (url, owned) = database.make().await;
    let (portolan, _) = Portolan::start(&folder.path().join(format!("runs-{}", database.name())), url.as_deref()).await;
    for kind in Kind::ALL {
        let upstream = Upstream::start(kind).await;
        let registered = portolan.register(kind.name(), upstream.config()).await;
        let session = direct::session(&upstream).await;

        report.section(&format!("One caller: {}, {}", database.name(), kind.name()));
        let callers = vec![
            Caller::health(portolan.connect().await),
            Caller::lookup(portolan.connect().await, &registered),
            direct::floor(&upstream).await,
            Caller::direct(session.peer().clone()),
            Caller::run(portolan.connect().await, &registered),
        ];
        let [health, lookup, floor, direct, run] = take_turns(callers, TURNS, CALLS).await;
        report.times("GET /v1/health", &health);
        report.times("GET one tool, which reads what a run reads", &lookup);
        report.times("the call, plainest: no rmcp", &floor);
        report.times("the call, direct: rmcp, kept session", &direct);
        report.times("the call, run through Portolan", &run);
        let ratio = |turn: usize| run[turn].p50() / (health[turn].p50() + direct[turn].p50());
        report.laps("run / (health + direct), of p50", &Laps((0..TURNS).map(ratio).collect()), "", Bar::AtMost(1.15));

        report.section(&format!("{CALLERS} callers: {}, {}", database.name(), kind.name()));
        let mut crowds = vec![vec![], vec![], vec![], vec![]];
        for _ in 0..CALLERS {
            crowds[0].push(Caller::health(portolan.connect().await));
            crowds[1].push(Caller::lookup(portolan.connect().await, &registered));
            crowds[2].push(Caller::direct(session.peer().clone()));
            crowds[3].push(Caller::run(portolan.connect().await, &registered));
        }
        let [health, lookup, direct, run] = take_turns_in_crowds(crowds, CROWD_TURNS, CROWD_CALLS).await;
        report.laps("GET /v1/health", &health, "calls/s", Bar::None);
        report.laps("GET one tool, which reads what a run reads", &lookup, "calls/s", Bar::None);
        report.laps("the call, direct: rmcp, one kept session", &direct, "calls/s", Bar::None);
        report.laps("the call, run through Portolan", &run, "calls/s", Bar::None);
        let ratio = Laps(run.0.iter().zip(&direct.0).map(|(run, direct)| run / direct).collect());
        // HTTP+SSE is a transport of the past: told, not asked for.
        let bar = if kind == Kind::Sse { Bar::None } else { Bar::AtLeast(0.5) };
        report.laps("run / direct, of calls/s", &ratio, "", bar);
        drop(session);
    }
    report.section(&format!("After all runs: {}", database.name()));
    report.value("resident", portolan.resident(), "MB", Bar::None);
    portolan.stop().await;
    owned.remove().await;
}

/// The same requests with few servers registered and with many, over stdio, the quickest upstream.
async fn growth(report: &mut Report, database: &Database, folder: &TempDir) {
    report.section(&format!("Growth from {FEW} to {MANY} servers: {}", database.name()));
    let upstream = Upstream::start(Kind::Stdio).await;
    let mut houses = Vec::new();
    let mut callers = Vec::new();
    for servers in [FEW, MANY] {
        let data = folder.path().join(format!("growth-{}-{servers}", database.name()));
        let (url, owned) = database.make().await;
        let (portolan, _) = Portolan::start(&data, url.as_deref()).await;
        let registered = portolan.register("live", upstream.config()).await;
        // Port 9 is nobody's: the pattern of the servers that are only there.
        let dead = json!({ "mcp_server_type": "streamable_http", "server_url": "http://127.0.0.1:9/mcp" });
        let pattern = portolan.create("pattern", dead).await;
        database.fill(url.as_deref(), &data, servers - 2, &pattern, &registered.server).await;
        assert_eq!(portolan.count().await, servers, "all servers are registered");
        callers.push(Caller::retrieve(portolan.connect().await, servers - 2));
        callers.push(Caller::run(portolan.connect().await, &registered));
        houses.push((portolan, owned));
    }
    let [get_few, run_few, get_many, run_many] = take_turns(callers, TURNS, CALLS).await;
    for (what, few, many) in [("GET one server", get_few, get_many), ("a run", run_few, run_many)] {
        report.times(&format!("{what}, {FEW} servers"), &few);
        report.times(&format!("{what}, {MANY} servers"), &many);
        let ratio = few.iter().zip(&many).map(|(few, many)| many.p50() / few.p50());
        report.laps(&format!("{what}: many / few, of p50"), &Laps(ratio.collect()), "", Bar::AtMost(1.2));
    }
    for (portolan, owned) in houses {
        portolan.stop().await;
        owned.remove().await;
    }
}
