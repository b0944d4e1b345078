//! What Portolan costs: the start, the memory, and what a run takes beyond the call it makes. Each figure stands beside the bar it
//! must reach; a missed bar is told and fails nothing, a wrong answer ends the benchmark.
//!
//! `cargo bench --bench overhead -- [--json FILE] [--quick]`, alone on the machine. With `PORTOLAN_TEST_POSTGRES_URL` (a server where
//! databases may be made) PostgreSQL is measured as well as SQLite. `--quick` takes fewer turns: a look, no measurement.
//!
//! Portolan is the real program. The upstream is the fake server of the tests, as processes: this program run again with `fake`.
//! Both sides of a ratio take turns, batch by batch, and the ratio is the median over the turns, so that whatever else the machine
//! does hits both. The callers, and what they call directly, are in this process, which has as many threads as Portolan.
//!
//! With one caller most of a time is waking the next process up, which takes several times as long on another processor as on the
//! same one; where the system puts them is chance, and shows in the ranges. `taskset -c 0 cargo bench …` takes chance out: all that is
//! left is the work itself.
#![expect(clippy::print_stdout, reason = "the table is the output")]

mod beside;
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

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tempfile::TempDir;

use beside::Others;
use call::Caller;
use database::Database;
use measure::{Laps, Times, median, take_turns, take_turns_in_crowds};
use portolan::{Portolan, Registered};
use report::{Bar, Report};
use upstream::{Kind, Upstream};

/// How often things are measured.
#[derive(Clone, Copy)]
struct Scale {
    starts: usize,
    /// One caller: turns of [`CALLS`].
    turns: usize,
    /// [`CALLERS`] callers: turns of [`CROWD_CALLS`] for each.
    crowd_turns: usize,
    /// Beside others: rounds without and with them, of so many turns of [`BESIDE_CALLS`].
    rounds: usize,
    beside_turns: usize,
}

const FULL: Scale = Scale { starts: 10, turns: 60, crowd_turns: 10, rounds: 3, beside_turns: 10 };
const QUICK: Scale = Scale { starts: 3, turns: 10, crowd_turns: 3, rounds: 1, beside_turns: 5 };

const CALLS: usize = 100;
const CALLERS: usize = 16;
const CROWD_CALLS: usize = 80;
/// Enough that p99 is not the one that was unlucky.
const BESIDE_CALLS: usize = 500;
const SESSIONS: usize = 100;

/// What grows: how many servers are registered, or, with a session each, live.
#[derive(Clone, Copy, PartialEq)]
enum Growth {
    Servers,
    Sessions,
}

impl Growth {
    fn sizes(self) -> [usize; 2] {
        match self {
            Self::Servers => [10, 10_000],
            Self::Sessions => [1, 1_000],
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Servers => "servers",
            Self::Sessions => "live sessions",
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [first, kind] if first == "fake" => upstream::serve(kind),
        [first, rest @ ..] if first == "beside" => beside::serve(rest),
        _ => {}
    }
    let (mut json, mut scale) = (None, FULL);
    // Cargo adds `--bench`.
    let mut arguments = arguments.into_iter().filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        match &*argument {
            "--json" => json = Some(PathBuf::from(arguments.next().expect("--json takes a file"))),
            "--quick" => scale = QUICK,
            _ => panic!("usage: overhead [--json FILE] [--quick]"),
        }
    }
    // Thousands of connections, here and in what is started from here.
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })
        .expect("up to the maximum it may be raised");
    rustls::crypto::ring::default_provider().install_default().expect("nobody was here before");
    tokio::runtime::Runtime::new().expect("threads can be had").block_on(bench(scale, json.as_deref()));
}

async fn bench(scale: Scale, json: Option<&Path>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut report = Report::new();
    if cfg!(debug_assertions) {
        report.remark("This is a debug build: no figure means anything. Use cargo bench.");
    }
    if scale.turns < FULL.turns {
        report.remark("Quick: too few turns to rely on.");
    }
    start(&mut report, scale, &folder).await;
    sessions(&mut report, &folder).await;
    let mut databases = vec![Database::sqlite()];
    match std::env::var("PORTOLAN_TEST_POSTGRES_URL") {
        Ok(server) => databases.push(Database::postgres(server)),
        Err(_) => report.remark("PostgreSQL was NOT measured: PORTOLAN_TEST_POSTGRES_URL is not set."),
    }
    for database in &databases {
        runs(&mut report, scale, database, &folder).await;
    }
    for kind in [Growth::Servers, Growth::Sessions] {
        for database in &databases {
            growth(&mut report, scale, kind, database, &folder).await;
        }
    }
    beside(&mut report, scale, &folder).await;
    report.finish();
    if let Some(file) = json {
        report.write_json(file);
    }
}

/// Size, time from spawn to the first answer, idle memory; always on SQLite.
async fn start(report: &mut Report, scale: Scale, folder: &TempDir) {
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
    for number in 0..scale.starts {
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
        let data = folder.path().join(format!("sessions-{kind:?}"));
        let (portolan, _) = Portolan::start_with(&data, None, &["--max-children", "1000"]).await;
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
async fn runs(report: &mut Report, scale: Scale, database: &Database, folder: &TempDir) {
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
        let [health, lookup, floor, direct, run] = take_turns(callers, scale.turns, CALLS).await;
        report.times("GET /v1/health", &health);
        report.times("GET one tool", &lookup);
        report.times("the call, plainest: no rmcp", &floor);
        report.times("the call, direct: rmcp, kept session", &direct);
        report.times("the call, run through Portolan", &run);
        let ratio = |turn: usize| run[turn].p50() / (health[turn].p50() + direct[turn].p50());
        report.laps(
            "run / (health + direct), of p50",
            &Laps((0..scale.turns).map(ratio).collect()),
            "",
            Bar::AtMost(1.15),
        );

        report.section(&format!("{CALLERS} callers: {}, {}", database.name(), kind.name()));
        let mut crowds = vec![vec![], vec![], vec![], vec![], vec![]];
        for _ in 0..CALLERS {
            crowds[0].push(Caller::health(portolan.connect().await));
            crowds[1].push(Caller::lookup(portolan.connect().await, &registered));
            crowds[2].push(direct::floor(&upstream).await);
            crowds[3].push(Caller::direct(session.peer().clone()));
            crowds[4].push(Caller::run(portolan.connect().await, &registered));
        }
        let [health, lookup, floor, direct, run] = take_turns_in_crowds(crowds, scale.crowd_turns, CROWD_CALLS).await;
        report.laps("GET /v1/health", &health, "calls/s", Bar::None);
        report.laps("GET one tool", &lookup, "calls/s", Bar::None);
        report.laps("the call, plainest: no rmcp, own sessions", &floor, "calls/s", Bar::None);
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

/// The same requests with few servers or sessions and with many. Servers that are only there are beside a stdio server, the
/// quickest to run; sessions are all with one HTTP server.
async fn growth(report: &mut Report, scale: Scale, kind: Growth, database: &Database, folder: &TempDir) {
    let ([few, many], unit) = (kind.sizes(), kind.unit());
    report.section(&format!("Growth from {few} to {many} {unit}: {}", database.name()));
    let upstream = Upstream::start(if kind == Growth::Servers { Kind::Stdio } else { Kind::Http }).await;
    let (mut houses, mut asked) = (Vec::new(), Vec::new());
    for servers in [few, many] {
        let data = folder.path().join(format!("growth-{unit}-{}-{servers}", database.name()));
        let (url, owned) = database.make().await;
        let (portolan, _) = Portolan::start(&data, url.as_deref()).await;
        let registered = portolan.register("live", upstream.config()).await;
        let mut all = vec![registered.clone()];
        match kind {
            Growth::Servers => {
                // Port 9 is nobody's.
                let dead = json!({ "mcp_server_type": "streamable_http", "server_url": "http://127.0.0.1:9/mcp" });
                let (more, pattern) = (servers - 2, portolan.create("pattern", dead).await);
                database.fill(url.as_deref(), &data, more, &pattern, &registered.server).await;
                all.extend((0..more).map(database::filler));
            }
            // What is sealed opens for its own server alone, so rows cannot be copied.
            Growth::Sessions => {
                for number in 1..servers {
                    all.push(portolan.register(&format!("server {number}"), upstream.config()).await);
                }
            }
        }
        assert_eq!(portolan.count().await, servers, "all servers are registered");
        let live = if kind == Growth::Sessions { all.clone() } else { vec![registered.clone()] };
        let mut each = Caller::runs(portolan.connect().await, &live);
        for _ in &live {
            each.call().await;
        }
        report.value(&format!("resident, {servers} {unit}"), portolan.resident(), "MB", Bar::None);
        houses.push((portolan, owned));
        asked.push((registered, all, live));
    }
    // Not before: a connection that nobody uses while many servers are registered is closed.
    let mut callers = Vec::new();
    for ((portolan, _), (registered, all, live)) in houses.iter().zip(asked) {
        callers.push(Caller::retrieve(portolan.connect().await, all));
        callers.push(Caller::run(portolan.connect().await, &registered));
        callers.push(Caller::runs(portolan.connect().await, &live));
    }
    let [get_few, run_few, each_few, get_many, run_many, each_many] = take_turns(callers, scale.turns, CALLS).await;
    let bar = Bar::AtMost(1.2);
    let mut rows = vec![("GET one server", get_few, get_many, bar), ("a run", run_few, run_many, bar)];
    if kind == Growth::Sessions {
        // What was not used for long has left every cache: told, not asked for.
        rows.push(("a run, of each in turn", each_few, each_many, Bar::None));
    }
    for (what, small, large, bar) in rows {
        report.times(&format!("{what}, {few} {unit}"), &small);
        report.times(&format!("{what}, {many} {unit}"), &large);
        let ratio = small.iter().zip(&large).map(|(small, large)| large.p50() / small.p50());
        report.laps(&format!("{what}: many / few, of p50"), &Laps(ratio.collect()), "", bar);
    }
    for (portolan, owned) in houses {
        portolan.stop().await;
        owned.remove().await;
    }
}

/// Normal traffic with and without those who are of no use to it.
async fn beside(report: &mut Report, scale: Scale, folder: &TempDir) {
    let (portolan, _) = Portolan::start(&folder.path().join("beside"), None).await;
    let upstream = Upstream::start(Kind::Stdio).await;
    let registered = portolan.register("normal", upstream.config()).await;
    let hung = Upstream::start(Kind::Http).await;
    let server = portolan.register("hung", hung.config()).await.server;
    let never = Registered { tool: portolan.tool(&server, "never").await, server };
    for kind in [beside::Kind::Slow, beside::Kind::Waiting(never.run_path())] {
        report.section(&format!("Beside {}: SQLite", kind.name()));
        let measure = async || -> [Vec<Times>; 2] {
            let health = Caller::health(portolan.connect().await);
            let run = Caller::run(portolan.connect().await, &registered);
            take_turns(vec![health, run], scale.beside_turns, BESIDE_CALLS).await
        };
        let (mut health, mut run) = (Beside::default(), Beside::default());
        let mut resident = Laps::default();
        for _ in 0..scale.rounds {
            let [health_alone, run_alone] = measure().await;
            let others = Others::come(&kind, portolan.address).await;
            let [health_with, run_with] = measure().await;
            resident.0.push(portolan.resident());
            others.leave().await;
            health.add(health_alone, health_with);
            run.add(run_alone, run_with);
        }
        health.report(report, "GET /v1/health");
        run.report(report, "a run");
        report.laps("resident with them", &resident, "MB", Bar::None);
    }
    portolan.stop().await;
}

/// One kind of request, round by round, without others and beside them.
#[derive(Default)]
struct Beside {
    alone: Vec<Vec<Times>>,
    with: Vec<Vec<Times>>,
}

impl Beside {
    fn add(&mut self, alone: Vec<Times>, with: Vec<Times>) {
        self.alone.push(alone);
        self.with.push(with);
    }

    fn report(&self, report: &mut Report, what: &str) {
        report.times(&format!("{what}, alone"), self.alone.iter().flatten());
        report.times(&format!("{what}, beside them"), self.with.iter().flatten());
        let ratio = |of: fn(&Times) -> f64| {
            let middle = |turns: &Vec<Times>| median(turns.iter().map(of));
            Laps(self.alone.iter().zip(&self.with).map(|(alone, with)| middle(with) / middle(alone)).collect())
        };
        report.laps(&format!("{what}: beside / alone, of p50"), &ratio(Times::p50), "", Bar::AtMost(2.0));
        report.laps(&format!("{what}: beside / alone, of p99"), &ratio(Times::p99), "", Bar::AtMost(2.0));
    }
}
