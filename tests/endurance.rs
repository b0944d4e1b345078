//! Sessions over time: killed, overrun, idle, repaired and replaced. A long form with the real numbers stands beside each short
//! one; `cargo test -- --ignored` runs it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use portolan::mcp::Variables;
use portolan::telemetry::Span;
use serde_json::{Map, Value, json};

use crate::fake::script::with_tools;
use crate::fake::{self, Fake, Running};
use crate::harness::{
    Answer, Database, FakeProgram, Portolan, Remote, Script, client, eventually, fake_mcp, kill, patiently,
    processes_naming, scripts, sockets_to, zombies_of,
};
use crate::process::{self, Program};

const KINDS: [&str; 3] = ["stdio", "http", "sse"];
const MODERN: &str = fake::script::MODERN;
const CHANGED: &str = r#"{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}"#;

fn typed(script: &Value) -> fake::Script {
    serde_json::from_value(script.clone()).unwrap()
}

/// A registered server, and the fake behind it: a child, or a program that listens.
struct Upstream {
    kind: &'static str,
    id: String,
    script: Script,
    program: Option<FakeProgram>,
}

impl Upstream {
    async fn new(portolan: &Portolan, kind: &'static str, script: &Value) -> Self {
        let script = portolan.script(script);
        let program = (kind != "stdio").then(|| FakeProgram::start(kind, &script, None));
        let config = match &program {
            None => json!({"command": fake_mcp(), "args": ["stdio", script.0]}),
            Some(program) if kind == "sse" => json!({"mcp_server_type": "sse", "server_url": program.url}),
            Some(program) => json!({ "server_url": program.url }),
        };
        let server = portolan.create(&format!("{kind} {}", script.0.display()), config).await;
        assert_eq!(server["status"]["state"], "ready", "{server}");
        Self { kind, id: server["id"].as_str().unwrap().to_owned(), script, program }
    }

    /// The processes of a stdio server.
    fn children(&self) -> Vec<u32> {
        processes_naming(&self.script.0.to_string_lossy())
    }

    /// SIGKILL; a listening one is there again at once, on the same port.
    fn kill(&mut self) {
        match &mut self.program {
            None => kill(self.children()[0]),
            Some(program) => {
                program.kill();
                let again = FakeProgram::start(self.kind, &self.script, Some(program.addr));
                *program = again;
            }
        }
    }

    fn handshakes(&self) -> usize {
        self.script.count("initialize")
    }

    async fn path(&self, portolan: &Portolan, tool: &str) -> String {
        format!("/v1/mcp-servers/{}/tools/{}/run", self.id, portolan.tool_id(&self.id, tool).await)
    }
}

async fn status(portolan: &Portolan, id: &str) -> Value {
    portolan.get(&format!("/v1/mcp-servers/{id}")).await.expect(200)["status"].take()
}

/// Waits until the server's status is as `test` wants it.
async fn status_becomes(portolan: &Portolan, id: &str, what: &str, test: impl Fn(&Value) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let status = status(portolan, id).await;
        if test(&status) {
            return;
        }
        assert!(Instant::now() < deadline, "in vain: {what}: {status}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn echo(message: &str) -> Value {
    json!({"args": {"message": message}})
}

/// Killed in the middle of a call: one clean answer, and the next call works.
async fn killed_mid_call(times: usize) {
    let portolan = Portolan::start().await;
    for kind in KINDS {
        let mut upstream = Upstream::new(&portolan, kind, &json!({})).await;
        let (slow, quick) = (upstream.path(&portolan, "slow").await, upstream.path(&portolan, "echo").await);
        for time in 0..times {
            let calls = upstream.script.count("tools/call");
            let body = json!({"args": {"ms": 60_000}});
            let run = portolan.post(&slow, &body);
            let killing = async {
                eventually("the call is under way", || upstream.script.count("tools/call") > calls).await;
                let killed = Instant::now();
                tokio::task::block_in_place(|| upstream.kill());
                killed
            };
            let (answer, killed) = tokio::join!(run, killing);
            let took = killed.elapsed();
            let body = answer.expect(200);
            assert_eq!(body["status"], "error", "{kind} {time}: {body}");
            assert!(body["func_return"].as_str().unwrap().contains("may have run"), "{kind} {time}: {body}");
            assert!(took < Duration::from_secs(2), "{kind} {time}: {took:?}");
            let again = Instant::now();
            let message = format!("{kind} {time}");
            let body = patiently(async || portolan.post(&quick, &echo(&message)).await).await;
            assert_eq!(body.expect(200)["func_return"], message);
            assert!(again.elapsed() < Duration::from_secs(5), "{kind} {time}: {:?}", again.elapsed());
            let seen = upstream.script.seen();
            let sent = seen.iter().filter(|(_, message)| message["params"]["name"] == "slow").count();
            assert_eq!(sent, time + 1, "{kind}: no call is sent twice");
            if kind == "stdio" {
                assert_eq!(upstream.children().len(), 1, "{time}");
            }
        }
        assert_eq!(status(&portolan, &upstream.id).await["state"], "ready");
    }
    eventually("no zombie", || zombies_of(std::process::id()).is_empty()).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_during_a_call_costs_that_call_and_no_other() {
    killed_mid_call(5).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: 50 times for each transport"]
async fn a_server_killed_during_a_call_50_times_costs_those_calls_and_no_other() {
    killed_mid_call(50).await;
}

/// Many calls at once on one session to a server that answers in no order, and each one twice, with old ones in between. Past the
/// front door, whose own limit is lower.
async fn jumbled_answers(callers: usize) {
    for kind in KINDS {
        let portolan = Portolan::start_with(|settings| {
            settings.upstream.max_calls_per_server = callers;
            settings.upstream.max_queue_per_server = callers;
            settings.upstream.run_timeout = Duration::from_secs(120);
        })
        .await;
        let upstream = Upstream::new(&portolan, kind, &json!({"jumble_ms": 300})).await;
        let (store, mcp) = (&portolan.app.store, &portolan.app.mcp);
        let tool_id = portolan.tool_id(&upstream.id, "echo").await;
        let found = store.tool(&upstream.id, &tool_id).await.unwrap().unwrap();
        let calls = (0..callers).map(|caller| {
            let (mcp, found) = (mcp.clone(), found.clone());
            tokio::spawn(async move {
                let message = format!("caller {caller} {}", uuid::Uuid::new_v4());
                let arguments = Map::from_iter([("message".to_owned(), json!(message))]);
                let place = mcp.enter(&found.server).await.map_err(|error| error.to_string())?;
                let outcome = mcp
                    .run_tool(
                        &place,
                        &found,
                        arguments,
                        &Variables::default(),
                        &AtomicBool::default(),
                        &mut Span::default(),
                    )
                    .await
                    .map_err(|error| error.to_string())?;
                if outcome.text == message { Ok(()) } else { Err(format!("not {message:?} but {:?}", outcome.text)) }
            })
        });
        let wrong: Vec<_> = join_all(calls).await.into_iter().filter_map(|call| call.unwrap().err()).collect();
        assert!(wrong.is_empty(), "{kind}: {} of {callers}, the first: {}", wrong.len(), wrong[0]);
        assert_eq!(upstream.handshakes(), 1, "{kind}: one session");
        drop(upstream);
        portolan.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_reaches_another_caller() {
    jumbled_answers(1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: 10,000 callers on each transport"]
async fn no_answer_reaches_another_of_10_000_callers() {
    jumbled_answers(10_000).await;
}

/// More stdio servers than may run.
async fn more_servers_than_children(servers: usize, cap: usize, idle: Duration) {
    let portolan = Portolan::start_with(|settings| {
        settings.upstream.max_children = cap;
        settings.upstream.idle_timeout = idle;
    })
    .await;
    let folder = portolan.folder().to_string_lossy().into_owned();
    let (stop, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let sampling = std::thread::spawn({
        let (stop, most, folder) = (stop.clone(), most.clone(), folder.clone());
        move || {
            while !stop.load(Relaxed) {
                most.fetch_max(processes_naming(&folder).len(), Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
    let mut upstreams = Vec::new();
    for _ in 0..servers {
        upstreams.push(Upstream::new(&portolan, "stdio", &json!({})).await);
    }
    let called = async {
        for upstream in &upstreams {
            let path = upstream.path(&portolan, "echo").await;
            let body = patiently(async || portolan.post(&path, &echo(&upstream.id)).await).await.expect(200);
            assert_eq!(body["func_return"], upstream.id);
        }
    };
    called.await;
    // The last ones called are the ones that still run: a call to one of them starts nothing.
    let last = upstreams.last().unwrap();
    let starts = last.script.starts();
    let path = last.path(&portolan, "echo").await;
    portolan.post(&path, &echo("again")).await.expect(200);
    assert_eq!(last.script.starts(), starts);
    let deadline = Instant::now() + idle + Duration::from_secs(10);
    while !processes_naming(&folder).is_empty() {
        assert!(Instant::now() < deadline, "left after the idle time: {:?}", processes_naming(&folder));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.store(true, Relaxed);
    sampling.join().unwrap();
    assert_eq!(most.load(Relaxed), cap, "as many as may run, and never more");
    assert_eq!(status(&portolan, &last.id).await["state"], "ready", "closing what is idle says nothing about it");
    eventually("no zombie", || zombies_of(std::process::id()).is_empty()).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn never_more_children_than_may_run() {
    more_servers_than_children(40, 8, Duration::from_secs(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: 300 servers"]
async fn never_more_than_32_children_of_300_servers() {
    more_servers_than_children(300, 32, Duration::from_secs(10)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn children_that_are_busy_are_not_closed_for_others() {
    let portolan = Portolan::start_with(|settings| settings.upstream.max_children = 2).await;
    let first = Upstream::new(&portolan, "stdio", &json!({})).await;
    let second = Upstream::new(&portolan, "stdio", &json!({})).await;
    let third = Upstream::new(&portolan, "stdio", &json!({})).await;
    let slow = [first.path(&portolan, "slow").await, second.path(&portolan, "slow").await];
    let body = json!({"args": {"ms": 2_000}});
    let busy = || first.script.count("tools/call") + second.script.count("tools/call") == 2;
    let path = third.path(&portolan, "echo").await;
    let most = AtomicUsize::new(0);
    let third_call = async {
        eventually("both calls are under way", busy).await;
        // It waits for a child to be free, or is told when to come again.
        patiently(async || portolan.post(&path, &echo("later")).await).await
    };
    let sampling = async {
        while most.fetch_max(portolan.children().len(), Relaxed) <= 2 && third.script.count("tools/call") == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let calls = async { tokio::join!(portolan.post(&slow[0], &body), portolan.post(&slow[1], &body), third_call) };
    let ((one, two, later), ()) = tokio::join!(calls, sampling);
    assert_eq!(most.load(Relaxed), 2);
    for answer in [one, two] {
        assert_eq!(answer.expect(200)["func_return"], "done");
    }
    assert_eq!(later.expect(200)["func_return"], "later");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_server_holds_up_nobody_else() {
    const WAITERS: usize = 500;
    const CALLS: usize = 16;
    const QUEUED: usize = 64;
    let deadline = Duration::from_secs(3);
    let portolan = Portolan::start_with(|settings| {
        settings.upstream.run_timeout = deadline;
        settings.upstream.max_calls_per_server = CALLS;
        settings.upstream.max_queue_per_server = QUEUED;
    })
    .await;
    for kind in KINDS {
        let hung = Upstream::new(&portolan, kind, &json!({})).await;
        let well = Upstream::new(&portolan, kind, &json!({})).await;
        let (never, quick) = (hung.path(&portolan, "never").await, well.path(&portolan, "echo").await);
        let started = Instant::now();
        let body = json!({});
        let waiting = async {
            let answers = join_all((0..WAITERS).map(|_| portolan.post(&never, &body))).await;
            (answers, started.elapsed())
        };
        let others = async {
            eventually("the server hangs", || hung.script.count("tools/call") == CALLS).await;
            // Half of the time: nobody's is over, however long the callers took to come.
            while started.elapsed() < deadline / 2 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let sent = hung.script.count("tools/call");
            assert!(sent == CALLS || started.elapsed() > deadline, "{kind}: {sent} calls were sent, not {CALLS}");
            let mut asked = 0;
            while started.elapsed() < deadline {
                let message = format!("well {asked}");
                let answer = tokio::time::timeout(deadline, portolan.post(&quick, &echo(&message))).await;
                assert_eq!(answer.expect("it is not held up").expect(200)["func_return"], message);
                asked += 1;
            }
            asked
        };
        let ((answers, took), asked) = tokio::join!(waiting, others);
        assert!(asked > 5, "{kind}: {asked} calls to another server");
        assert!(took < deadline + Duration::from_secs(3), "{kind}: the last waiter was answered after {took:?}");
        let busy = answers.iter().filter(|answer| answer.status == 503).count();
        // Those who wait get what is left of their own time when the first ones' is over: next to nothing.
        assert!((WAITERS - CALLS - QUEUED..=WAITERS - CALLS).contains(&busy), "{kind}: {busy} were turned away");
        for answer in answers {
            if answer.status == 503 {
                assert!(answer.header("retry-after").is_some(), "{}", answer.text);
                answer.expect(503);
            } else {
                assert_eq!(answer.expect(200)["status"], "error");
            }
        }
        let sent = hung.script.count("tools/call");
        assert!((CALLS..=CALLS + QUEUED).contains(&sent), "{kind}: {sent} calls were sent");
        let path = hung.path(&portolan, "echo").await;
        assert_eq!(
            patiently(async || portolan.post(&path, &echo("on")).await).await.expect(200)["func_return"],
            "on",
            "{kind}"
        );
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_at_once_share_one_opening_over_each_transport() {
    let portolan = Portolan::start().await;
    for kind in KINDS {
        let upstream = Upstream::new(&portolan, kind, &json!({})).await;
        portolan.app.mcp.forget(&upstream.id);
        let (handshakes, starts) = (upstream.handshakes(), upstream.script.starts());
        let path = upstream.path(&portolan, "echo").await;
        let calls = (0..50).map(|caller| {
            let (portolan, path) = (&portolan, &path);
            async move {
                let message = format!("{kind} {caller}");
                let body = patiently(async || portolan.post(path, &echo(&message)).await).await.expect(200);
                assert_eq!(body["func_return"], message);
            }
        });
        join_all(calls).await;
        assert_eq!(upstream.handshakes(), handshakes + 1, "{kind}");
        assert!(upstream.script.count("server/discover") <= 1, "{kind}: what it speaks is known");
        let started = if kind == "stdio" { starts + 1 } else { starts };
        assert_eq!(upstream.script.starts(), started, "{kind}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_is_closed_and_nobody_notices() {
    let portolan = Portolan::start_with(|settings| settings.upstream.idle_timeout = Duration::from_secs(1)).await;
    let (http, sse) = (fake::http::serve(Fake::new(typed(&json!({})))), fake::sse::serve(Fake::new(typed(&json!({})))));
    let stdio = Upstream::new(&portolan, "stdio", &json!({})).await;
    let over_http = portolan.create("http", json!({ "server_url": http.url })).await;
    let over_sse = portolan.create("sse", json!({"mcp_server_type": "sse", "server_url": sse.url})).await;
    let deleted = |http: &Running| http.requests().iter().filter(|seen| seen.method == "DELETE").count();
    for round in 1..=2 {
        eventually("the child is ended", || stdio.children().is_empty()).await;
        eventually("the session is ended", || deleted(&http) == round && http.sessions() == 0).await;
        eventually("the stream is closed", || sse.streams() == 0).await;
        for id in [&stdio.id, over_http["id"].as_str().unwrap(), over_sse["id"].as_str().unwrap()] {
            assert_eq!(status(&portolan, id).await["state"], "ready");
            assert_eq!(portolan.run(id, "echo", json!({"message": "x"})).await["func_return"], "x");
        }
        assert_eq!(stdio.script.starts(), round + 1);
    }
    // A session is not idle while a call is under way on it.
    let pid = portolan.run(&stdio.id, "pid", json!({})).await;
    assert_eq!(portolan.run(&stdio.id, "slow", json!({"ms": 2_500})).await["func_return"], "done");
    assert_eq!(portolan.run(&stdio.id, "pid", json!({})).await["func_return"], pid["func_return"]);
    portolan.stop().await;
}

fn seconds(answer: &Answer) -> u64 {
    answer.header("retry-after").expect("it says when to come again").parse().expect("seconds")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_to_open_is_left_alone_for_a_while() {
    let portolan = Portolan::start().await;
    let upstream = Upstream::new(&portolan, "stdio", &json!({})).await;
    let path = upstream.path(&portolan, "echo").await;
    upstream.script.set(&json!({"exit_at": "start", "exit_code": 7}));
    portolan.app.mcp.forget(&upstream.id);
    eventually("its child is ended", || upstream.children().is_empty()).await;

    let first = portolan.post(&path, &echo("x")).await;
    assert_eq!(first.header("x-should-retry"), Some("false"));
    let body = first.expect(502);
    assert!(body["error"]["detail"].as_str().unwrap().contains("exit status: 7"), "{body}");
    let seen = status(&portolan, &upstream.id).await;
    assert_eq!(seen["state"], "unreachable");
    assert!(seen["error"].as_str().unwrap().contains("exit status: 7"), "{seen}");

    let starts = upstream.script.starts();
    let mut rest = 0;
    for _ in 0..20 {
        let again = portolan.post(&path, &echo("x")).await;
        assert_eq!(again.header("x-should-retry"), None, "nothing was sent: it may be repeated");
        rest = seconds(&again);
        assert!((1..=60).contains(&rest), "{rest}");
        assert!(again.expect(503)["detail"].as_str().unwrap().contains("exit status: 7"));
    }
    assert_eq!(upstream.script.starts(), starts, "nobody asked the server");
    tokio::time::sleep(Duration::from_secs(rest)).await;
    portolan.post(&path, &echo("x")).await.expect(502);
    assert!(upstream.script.starts() > starts, "after its rest it is tried again");

    // Repaired, it is tried after its rest by a run, and at once by a refresh.
    upstream.script.set(&json!({}));
    assert_eq!(patiently(async || portolan.post(&path, &echo("well")).await).await.expect(200)["func_return"], "well");
    assert_eq!(status(&portolan, &upstream.id).await["state"], "ready");
    upstream.script.set(&json!({"exit_at": "start"}));
    portolan.app.mcp.forget(&upstream.id);
    eventually("its child is ended", || upstream.children().is_empty()).await;
    portolan.post(&path, &echo("x")).await.expect(502);
    portolan.post(&path, &echo("x")).await.expect(503);
    let starts = upstream.script.starts();
    portolan.refresh(&upstream.id).await.expect(404);
    assert!(upstream.script.starts() > starts, "a refresh that somebody asks for is made");
    upstream.script.set(&json!({}));
    portolan.refresh(&upstream.id).await.expect(200);
    assert_eq!(portolan.post(&path, &echo("at once")).await.expect(200)["func_return"], "at once");
    assert_eq!(status(&portolan, &upstream.id).await["state"], "ready");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listening_server_that_is_down_is_left_alone_for_a_while() {
    let portolan = Portolan::start().await;
    for kind in ["http", "sse"] {
        let script = typed(&json!({}));
        let running =
            if kind == "http" { fake::http::serve(Fake::new(script)) } else { fake::sse::serve(Fake::new(script)) };
        let registered = if kind == "http" { "streamable_http" } else { "sse" };
        let config = json!({"mcp_server_type": registered, "server_url": running.url});
        let id = portolan.create(kind, config).await["id"].as_str().unwrap().to_owned();
        let path = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(&id, "echo").await);
        portolan.app.mcp.forget(&id);
        running.set_script(typed(&json!({"status": 500, "get_status": 500})));
        portolan.post(&path, &echo("x")).await.expect(502);
        let asked = running.requests().len();
        for _ in 0..20 {
            portolan.post(&path, &echo("x")).await.expect(503);
        }
        assert!(running.requests().len() <= asked + 1, "at most a goodbye");
        running.set_script(typed(&json!({})));
        assert_eq!(
            patiently(async || portolan.post(&path, &echo("well")).await).await.expect(200)["func_return"],
            "well"
        );
        assert_eq!(status(&portolan, &id).await["state"], "ready");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_dies_soon_after_each_opening_is_a_failure() {
    let portolan = Portolan::start().await;
    for at in ["initialized", "call"] {
        let upstream = Upstream::new(&portolan, "stdio", &json!({})).await;
        let path = upstream.path(&portolan, "echo").await;
        let starts = upstream.script.starts();
        upstream.script.set(&json!({"acts": {at: {"deaf": true, "steps": [{"exit": 5}]}}}));
        portolan.app.mcp.forget(&upstream.id);
        for _ in 0..20 {
            let answer = portolan.post(&path, &echo("x")).await;
            match answer.status {
                200 => assert_eq!(answer.expect(200)["status"], "error"),
                502 | 503 => {}
                _ => panic!("{}", answer.text),
            }
        }
        let started = upstream.script.starts() - starts;
        assert!((1..=6).contains(&started), "{at}: {started} starts for 20 runs");
        status_becomes(&portolan, &upstream.id, at, |status| status["state"] == "unreachable").await;
        upstream.script.set(&json!({}));
        portolan.refresh(&upstream.id).await.expect(200);
        assert_eq!(
            patiently(async || portolan.post(&path, &echo("well")).await).await.expect(200)["func_return"],
            "well"
        );
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_is_true_without_anybody_asking_the_server() {
    let portolan = Portolan::start().await;
    let upstream = Upstream::new(&portolan, "stdio", &json!({})).await;
    let id = &upstream.id;
    for _ in 0..2 {
        kill(upstream.children()[0]);
        let dead = |status: &Value| {
            status["state"] == "unreachable"
                && status["error"].as_str().is_some_and(|error| error.contains("signal: 9"))
        };
        status_becomes(&portolan, id, "the status says that the child was killed", dead).await;
        let path = upstream.path(&portolan, "echo").await;
        assert_eq!(
            patiently(async || portolan.post(&path, &echo("back")).await).await.expect(200)["func_return"],
            "back"
        );
        let ready = status(&portolan, id).await;
        assert_eq!((&ready["state"], &ready["error"]), (&json!("ready"), &Value::Null));
    }
    // What Portolan itself ends is no failure.
    portolan.app.mcp.forget(id);
    eventually("its child is ended", || upstream.children().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(status(&portolan, id).await["state"], "ready");
    portolan.stop().await;
}

/// HTTP+SSE has no newer revision than its own.
async fn changed_lists(revision: &str) {
    let portolan = Portolan::start().await;
    let old = |names: &[&str]| json!({"list_changed": true, "get_stream": true, "tools": with_tools(names)});
    let declared = |names: &[&str]| {
        let mut script = old(names);
        script["revisions"] = json!([revision]);
        script
    };
    let stdio = Upstream::new(&portolan, "stdio", &declared(&["changed"])).await;
    let http = fake::http::serve(Fake::new(typed(&declared(&[]))));
    let sse = fake::sse::serve(Fake::new(typed(&old(&[]))));
    let over_http = portolan.create("http", json!({ "server_url": http.url })).await;
    let over_sse = portolan.create("sse", json!({"mcp_server_type": "sse", "server_url": sse.url})).await;
    eventually("the session listens to the server", || http.streams() + http.fake().listeners() == 1).await;
    let ids = [stdio.id.as_str(), over_http["id"].as_str().unwrap(), over_sse["id"].as_str().unwrap()];
    stdio.script.set(&declared(&["changed", "fresh"]));
    http.set_script(typed(&declared(&["fresh"])));
    sse.set_script(typed(&old(&["fresh"])));
    portolan.run(&stdio.id, "changed", json!({})).await;
    http.list_changed();
    sse.list_changed();
    for (kind, id) in KINDS.iter().zip(ids) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !portolan.tools(id).await.iter().any(|tool| tool["name"] == "fresh") {
            assert!(Instant::now() < deadline, "{kind}: the new tool is not there");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(portolan.run(id, "echo", json!({"message": "on"})).await["func_return"], "on", "{kind}");
    }

    // A storm of them leads to a few lists.
    let lists = |running: &Running| running.requests().iter().filter(|seen| seen.rpc() == "tools/list").count();
    let before = [stdio.script.count("tools/list"), lists(&http), lists(&sse)];
    let storm = json!({"call": {"times": 1, "steps": [{"repeat": [1000, {"say": CHANGED}]}, "answer"]}});
    let mut script = declared(&["changed", "fresh"]);
    script["acts"] = storm;
    stdio.script.set(&script);
    // The script is read at the next list.
    portolan.refresh(&stdio.id).await.expect(200);
    portolan.run(&stdio.id, "echo", json!({"message": "storm"})).await;
    for _ in 0..1_000 {
        http.list_changed();
        sse.list_changed();
    }
    let after = || [stdio.script.count("tools/list") - 1, lists(&http), lists(&sse)];
    eventually("all are listed again", || after().iter().zip(before).all(|(after, before)| *after > before)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = after();
    for ((kind, before), after) in KINDS.iter().zip(before).zip(after) {
        assert!((1..=6).contains(&(after - before)), "{kind}: {} lists", after - before);
    }
    for id in ids {
        assert_eq!(portolan.run(id, "echo", json!({"message": "on"})).await["func_return"], "on");
    }
    if revision == MODERN {
        let subscribed = http.requests().iter().filter(|seen| seen.rpc() == "subscriptions/listen").count();
        assert_eq!([stdio.script.count("subscriptions/listen"), subscribed], [1, 1], "one subscription per session");
        assert!(http.requests().iter().all(|seen| seen.method != "GET"));
    }
    drop(stdio);
    portolan.stop().await;
    eventually("nothing listens any more", || http.streams() + http.fake().listeners() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_list_is_read_again_by_itself() {
    changed_lists("2025-11-25").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_list_of_a_server_of_today_is_read_again_by_itself() {
    changed_lists(MODERN).await;
}

/// A registered server in this process, at an address of its own.
async fn listening(portolan: &Portolan, kind: &str, script: &Value) -> (String, Running) {
    let fake = Fake::new(typed(script));
    let running = if kind == "sse" { fake::sse::serve(fake) } else { fake::http::serve(fake) };
    let registered = if kind == "sse" { "sse" } else { "streamable_http" };
    let config = json!({"mcp_server_type": registered, "server_url": running.url});
    let server = portolan.create(&format!("{kind} {}", running.addr), config).await;
    assert_eq!(server["status"]["state"], "ready", "{server}");
    (server["id"].as_str().unwrap().to_owned(), running)
}

fn listen_again(kind: &str, addr: std::net::SocketAddr, script: &Value) -> Running {
    let fake = Fake::new(typed(script));
    if kind == "sse" { fake::sse::serve_on(addr, fake) } else { fake::http::serve_on(addr, fake) }
}

/// The sweep that looks for servers is made four times in the idle time.
const OFTEN: Duration = Duration::from_secs(2);

/// A server that goes away and comes back. `script` has what tells of its going; `call`: a call does.
async fn away_and_back(portolan: &Portolan, kind: &str, script: &Value, call: bool) {
    let (id, running) = listening(portolan, kind, script).await;
    let path = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(&id, "echo").await);
    let addr = running.addr;
    if kind == "http" && !call {
        eventually("the session listens to the server", || running.streams() == 1).await;
    }
    running.stop().await;
    let away = |status: &Value| status["state"] == "unreachable";
    if call {
        // The end of a kept connection may cross a call on it, of which nobody knows then.
        tokio::time::sleep(Duration::from_millis(500)).await;
        // It may just have been looked for.
        let refused = portolan.post(&path, &echo("x")).await;
        assert!(matches!(refused.status, 502 | 503), "{}", refused.text);
    }
    status_becomes(portolan, &id, "it is away", away).await;
    // It is looked for more than once.
    tokio::time::sleep(OFTEN).await;
    assert!(away(&status(portolan, &id).await));
    let running = listen_again(kind, addr, script);
    status_becomes(portolan, &id, "it is found again", |status| status["state"] == "ready").await;
    assert_eq!(status(portolan, &id).await["error"], Value::Null);
    let called = running.requests().iter().filter(|seen| seen.rpc() == "tools/call").count();
    assert_eq!(called, 0, "{kind}: it was found without a call");
    assert_eq!(portolan.post(&path, &echo("back")).await.expect(200)["func_return"], "back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_away_at_a_call_is_found_again_without_another() {
    let portolan = Portolan::start_with(|settings| settings.upstream.idle_timeout = OFTEN).await;
    let plain = json!({});
    tokio::join!(away_and_back(&portolan, "http", &plain, true), away_and_back(&portolan, "sse", &plain, true));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_session_ended_by_itself_is_found_again_without_a_call() {
    let portolan = Portolan::start_with(|settings| settings.upstream.idle_timeout = OFTEN).await;
    let (plain, tells) = (json!({}), json!({"list_changed": true, "get_stream": true}));
    tokio::join!(away_and_back(&portolan, "sse", &plain, false), away_and_back(&portolan, "http", &tells, false));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_never_there_is_listed_once_it_comes() {
    let portolan = Portolan::start_with(|settings| settings.upstream.idle_timeout = OFTEN).await;
    for kind in ["http", "sse"] {
        // A port that was free just now.
        let gone = listen_again(kind, fake::anywhere(), &json!({}));
        let (url, addr) = (gone.url.clone(), gone.addr);
        gone.stop().await;
        let registered = if kind == "sse" { "sse" } else { "streamable_http" };
        let config = json!({"mcp_server_type": registered, "server_url": url});
        let server = portolan.create(kind, config).await;
        assert_eq!(server["status"]["state"], "unreachable", "{server}");
        let id = server["id"].as_str().unwrap();
        assert!(portolan.tools(id).await.is_empty());
        let _running = listen_again(kind, addr, &json!({}));
        status_becomes(&portolan, id, "it is found", |status| status["state"] == "ready").await;
        assert!(portolan.tools(id).await.iter().any(|tool| tool["name"] == "echo"), "{kind}: its tools are listed");
        assert_eq!(portolan.run(id, "echo", json!({"message": "here"})).await["func_return"], "here");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_ended_is_not_started_without_a_call() {
    let idle = Duration::from_secs(1);
    let portolan = Portolan::start_with(|settings| settings.upstream.idle_timeout = idle).await;
    let failed = portolan.create_stdio("failed", &json!({"exit_at": "start"})).await;
    let killed = Upstream::new(&portolan, "stdio", &json!({})).await;
    kill(killed.children()[0]);
    status_becomes(&portolan, &killed.id, "it was killed", |status| status["state"] == "unreachable").await;
    let starts = failed.1.starts();
    // Longer than a rest after the failures, and many sweeps.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!((failed.1.starts(), killed.script.starts()), (starts, 1), "nobody asked for them");
    assert_eq!(portolan.children(), Vec::<u32>::new());
    portolan.run(&killed.id, "echo", json!({"message": "x"})).await;
    assert_eq!(killed.script.starts(), 2, "a call does");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_listening_server_is_true_without_anybody_asking_it() {
    let portolan = Portolan::start().await;
    let away = |status: &Value| status["state"] == "unreachable" && status["error"].is_string();
    // The end of its stream is the end of an HTTP+SSE session, also when the server is still there.
    let (id, running) = listening(&portolan, "sse", &json!({})).await;
    assert_eq!(status(&portolan, &id).await["state"], "ready");
    running.cut_streams();
    status_becomes(&portolan, &id, "the stream has ended", away).await;
    assert_eq!(portolan.run(&id, "echo", json!({"message": "back"})).await["func_return"], "back");
    assert_eq!(status(&portolan, &id).await["state"], "ready");
    let mut sse = Upstream::new(&portolan, "sse", &json!({})).await;
    sse.program.as_mut().unwrap().kill();
    status_becomes(&portolan, &sse.id, "its process was killed", away).await;
    // Streamable HTTP: where a stream of notices is open its end tells, in each era.
    for revision in ["2025-11-25", MODERN] {
        let script = json!({"list_changed": true, "get_stream": true, "revisions": [revision]});
        let mut http = Upstream::new(&portolan, "http", &script).await;
        let listens = || {
            http.script.count("subscriptions/listen")
                + http.script.seen().iter().filter(|(_, seen)| seen["http"] == "GET").count()
                > 0
        };
        eventually("the session listens to the server", listens).await;
        http.program.as_mut().unwrap().kill();
        status_becomes(&portolan, &http.id, "its process was killed", away).await;
    }
    portolan.stop().await;
}

fn refusal(status: u16, seconds: u64) -> Value {
    let seconds = seconds.to_string();
    json!({"times": 1, "status": status, "headers": {"retry-after": seconds}, "steps": []})
}

/// Servers that answer once with a status and `Retry-After: 4`, at a call or at the handshake.
async fn pauses(at_the_handshake: bool) {
    let portolan = Portolan::start().await;
    let mut pausing = Vec::new();
    for kind in ["http", "sse"] {
        for status in [429, 503] {
            let (id, running) = listening(&portolan, kind, &json!({})).await;
            let path = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(&id, "echo").await);
            let at = match kind {
                _ if !at_the_handshake => "call",
                "sse" => "open",
                _ => "initialize",
            };
            pausing.push((kind, status, at, id, running, path));
        }
    }
    let trials = pausing.iter().map(|(kind, status, at, id, running, path)| {
        let (portolan, name) = (&portolan, format!("{kind} {status} {at}"));
        async move {
            let asked = || running.requests().iter().filter(|seen| seen.method != "DELETE").count();
            running.set_script(typed(&json!({"acts": {*at: refusal(*status, 4)}})));
            if *at != "call" {
                portolan.app.mcp.forget(id);
            }
            let first = portolan.post(path, &echo("x")).await;
            let refused = Instant::now();
            if *at == "call" {
                assert_eq!(first.expect(200)["status"], "error", "{name}");
            } else {
                first.expect(502);
            }
            let before = asked();
            // By the server's clock it is over after 4 s.
            while refused.elapsed() < Duration::from_millis(3_500) {
                let again = portolan.post(path, &echo("x")).await;
                let waited = refused.elapsed().as_secs_f64();
                if again.status != 503 {
                    assert!(waited > 3.5, "{name}: {} after {waited} s: {}", again.status, again.text);
                    break;
                }
                assert!((1..=4).contains(&seconds(&again)), "{name}: {}", seconds(&again));
                again.expect(503);
                assert_eq!(asked(), before, "{name}: after {waited} s");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let run = patiently(async || portolan.post(path, &echo("well")).await).await.expect(200);
            assert_eq!(run["func_return"], "well", "{name}");
        }
    });
    join_all(trials).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_a_pause_at_a_call_is_left_alone_for_so_long() {
    pauses(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_a_pause_at_the_handshake_is_left_alone_for_so_long() {
    pauses(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_a_pause_at_the_first_question_is_asked_no_other() {
    let portolan = Portolan::start().await;
    for status in [429, 503] {
        let script = json!({"revisions": [MODERN], "acts": {"initialize": refusal(status, 4)}});
        let http = fake::http::serve(Fake::new(typed(&script)));
        let server = portolan.create(&status.to_string(), json!({ "server_url": http.url })).await;
        assert_eq!(server["status"]["state"], "unreachable", "{server}");
        assert!(server["status"]["error"].as_str().unwrap().contains(&status.to_string()), "{server}");
        let asked: Vec<_> = http.requests().iter().map(|seen| seen.rpc().to_owned()).collect();
        assert_eq!(asked, ["server/discover"], "{status}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_beyond_all_measure_is_not_believed() {
    let portolan = Portolan::start().await;
    let (id, running) = listening(&portolan, "http", &json!({})).await;
    let path = format!("/v1/mcp-servers/{id}/tools/{}/run", portolan.tool_id(&id, "echo").await);
    running.set_script(typed(&json!({"acts": {"call": refusal(503, 100_000)}})));
    portolan.post(&path, &echo("x")).await.expect(200);
    let resting = portolan.post(&path, &echo("x")).await;
    assert_eq!(seconds(&resting), 30, "no client is asked to sleep for longer");
    let detail = resting.expect(503)["detail"].take();
    assert!(detail.as_str().unwrap().contains(" again in 300 s"), "{detail}");
    portolan.refresh(&id).await.expect(200);
    assert_eq!(portolan.post(&path, &echo("asked for")).await.expect(200)["func_return"], "asked for");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_child_that_was_used_longest_ago_makes_room() {
    let portolan = Portolan::start_with(|settings| settings.upstream.max_children = 3).await;
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(Upstream::new(&portolan, "stdio", &json!({})).await);
    }
    // Used in turn, and then the first once more.
    for used in [0, 1, 2, 0] {
        let path = servers[used].path(&portolan, "echo").await;
        portolan.post(&path, &echo("x")).await.expect(200);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(servers.iter().all(|server| server.children().len() == 1));
    servers.push(Upstream::new(&portolan, "stdio", &json!({})).await);
    let running: Vec<_> = servers.iter().map(|server| server.children().len()).collect();
    assert_eq!(running, [1, 0, 1, 1]);
    // And so on: the third is now the oldest.
    let path = servers[1].path(&portolan, "echo").await;
    portolan.post(&path, &echo("x")).await.expect(200);
    let running: Vec<_> = servers.iter().map(|server| server.children().len()).collect();
    assert_eq!(running, [1, 1, 0, 1]);
    assert_eq!(servers.iter().map(|server| server.script.starts()).collect::<Vec<_>>(), [1, 2, 1, 1]);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_declares_no_changes_is_not_listened_to() {
    let portolan = Portolan::start().await;
    let http = fake::http::serve(Fake::new(typed(&json!({"get_stream": true}))));
    let server = portolan.create("http", json!({ "server_url": http.url })).await;
    portolan.run(server["id"].as_str().unwrap(), "echo", json!({"message": "x"})).await;
    assert!(http.requests().iter().all(|seen| seen.method != "GET"));
    // One that declares them and ends its stream at once is not asked in a loop.
    let restless = fake::http::serve(Fake::new(typed(&json!({"list_changed": true, "get_ends": true}))));
    portolan.create("restless", json!({ "server_url": restless.url })).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let asked = restless.requests().iter().filter(|seen| seen.method == "GET").count();
    assert!((1..=5).contains(&asked), "{asked} times in 2 s");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_or_delete_lets_calls_in_flight_finish() {
    let portolan = Portolan::start().await;
    for kind in KINDS {
        for how in ["change", "delete"] {
            let upstream = Upstream::new(&portolan, kind, &json!({})).await;
            let slow = upstream.path(&portolan, "slow").await;
            let quick = upstream.path(&portolan, "pid").await;
            let one = format!("/v1/mcp-servers/{}", upstream.id);
            let old = portolan.run(&upstream.id, "pid", json!({})).await["func_return"].take();
            // Long enough for a new child to start on a busy machine.
            let body = json!({"args": {"ms": if kind == "stdio" && how == "change" { 8_000 } else { 1_500 }}});
            let meanwhile = async {
                eventually("the call is under way", || {
                    upstream.script.seen().iter().any(|(_, message)| message["params"]["name"] == "slow")
                })
                .await;
                if how == "delete" {
                    portolan.delete(&one).await.expect(204);
                    portolan.post(&quick, &json!({})).await.expect(404);
                    return;
                }
                let change = match kind {
                    "stdio" => json!({"env": {"CHANGED": "yes"}}),
                    _ => json!({"custom_headers": {"x-changed": "yes"}}),
                };
                portolan.patch(&one, &json!({ "config": change })).await.expect(200);
                let handshakes = upstream.handshakes();
                let new = patiently(async || portolan.post(&quick, &json!({})).await).await.expect(200);
                assert_eq!(upstream.handshakes(), handshakes + 1, "{kind}: a session of its own");
                if kind == "stdio" {
                    assert_ne!(new["func_return"], old, "the new configuration has its own child");
                    assert_eq!(upstream.children().len(), 2, "the old one still works");
                }
            };
            let (run, ()) = tokio::join!(portolan.post(&slow, &body), meanwhile);
            assert_eq!(run.expect(200)["func_return"], "done", "{kind}, {how}");
            if kind == "stdio" {
                let left = if how == "delete" { 0 } else { 1 };
                eventually("the old child ends", || upstream.children().len() == left).await;
                let old: u32 = old.as_str().unwrap().parse().unwrap();
                assert!(!upstream.children().contains(&old));
            } else if how == "delete" {
                let port = upstream.program.as_ref().unwrap().addr.port();
                let closed = || {
                    kind == "sse" && sockets_to(port) <= 2
                        || upstream.script.seen().iter().any(|(_, seen)| seen["http"] == "DELETE")
                };
                eventually("the old session ends", closed).await;
            }
        }
    }
    portolan.stop().await;
}

/// Ends what is left of a failed test.
struct Sweeper<'a>(&'a Path);

impl Drop for Sweeper<'_> {
    fn drop(&mut self) {
        processes_naming(&self.0.to_string_lossy()).into_iter().for_each(kill);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_child_survives_the_kill_of_portolan() {
    let folder = tempfile::tempdir().unwrap();
    let _sweeper = Sweeper(folder.path());
    let database = Database::new().await;
    let mut program = Program::start(process::command(folder.path(), database.url().as_deref()));
    let portolan = Remote::new(&program.url);
    let fake = fake_mcp().display().to_string();
    for (name, script, shell) in [
        ("plain", json!({}), None),
        ("stubborn", json!({"stubborn": true}), None),
        ("busy", json!({}), None),
        ("behind a shell", json!({}), Some("$FAKE; true")),
        ("with a process beside", json!({}), Some("tail -n 0 -f $SCRIPT & $FAKE")),
        ("stubborn behind a shell", json!({"stubborn": true}), Some("trap '' TERM; $FAKE; true")),
    ] {
        let file = Script(scripts(folder.path()).join(format!("{}.json", name.replace(' ', "-"))));
        file.set(&script);
        let path = file.0.to_string_lossy().into_owned();
        let config = match shell {
            None => json!({"command": fake, "args": ["stdio", path]}),
            Some(line) => {
                let line = line.replace("$FAKE", &format!("{fake} stdio {path}")).replace("$SCRIPT", &path);
                json!({"command": "/bin/sh", "args": ["-c", line]})
            }
        };
        let server = portolan.create(name, config).await;
        assert_eq!(server["status"]["state"], "ready", "{server}");
        if name == "busy" {
            let path = portolan.path(server["id"].as_str().unwrap(), "never").await;
            // Its answer never comes.
            tokio::spawn(client().post(format!("{}{path}", program.url)).json(&json!({})).send());
            eventually("it is busy", || file.count("tools/call") == 1).await;
        }
    }
    let place = folder.path().to_string_lossy().into_owned();
    let running = processes_naming(&place).len();
    assert!(running >= 9, "{running} processes");
    program.signal("-KILL");
    let killed = Instant::now();
    program.exit_code();
    while !processes_naming(&place).is_empty() {
        let left: Vec<_> = processes_naming(&place)
            .into_iter()
            .map(|pid| {
                String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
                    .replace('\0', " ")
            })
            .collect();
        assert!(killed.elapsed() < Duration::from_secs(5), "left: {left:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    database.remove().await;
}
