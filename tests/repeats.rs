//! Never twice: runs that take long, and runs that are asked for again (CONTRACT rows 14 to 16). The fake's log says how
//! often a tool was really called.

use std::time::Duration;

use reqwest::RequestBuilder;
use serde_json::{Value, json};

use crate::fake::{self, Fake};
use crate::harness::{Answer, PATIENCE, Portolan, Script, eventually, fake_mcp, kill};

const KEY: &str = "idempotency-key";
const TRIES: &str = "x-stainless-retry-count";
const REPEATED: &str = "x-portolan-repeated";
/// How long a tool takes that others shall meet while it runs, in ms.
const WHILE: u64 = 1000;

/// One tool of a stdio server, and how often it was called.
struct Tool<'a> {
    portolan: &'a Portolan,
    name: &'static str,
    path: String,
    script: &'a Script,
}

impl<'a> Tool<'a> {
    async fn of(portolan: &'a Portolan, server: &Value, script: &'a Script, name: &'static str) -> Self {
        let id = server["id"].as_str().unwrap();
        let tool_id = portolan.tool_id(id, name).await;
        Self { portolan, name, path: format!("/v1/mcp-servers/{id}/tools/{tool_id}/run"), script }
    }

    fn request(&self, headers: &[(&str, &str)], args: Value) -> RequestBuilder {
        let request = self.portolan.request("POST", &self.path).json(&json!({ "args": args }));
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))
    }

    async fn run(&self, headers: &[(&str, &str)], args: Value) -> Answer {
        Answer::of("POST", &self.path, self.request(headers, args)).await
    }

    /// Starts a run and leaves when the tool has been called.
    async fn run_and_leave(&self, headers: &[(&str, &str)], args: Value) {
        let before = self.calls();
        tokio::select! {
            answer = self.request(headers, args).send() => panic!("{answer:?}"),
            () = eventually("the tool is called", || self.calls() > before) => {}
        }
    }

    fn calls(&self) -> usize {
        self.script.seen().iter().filter(|(_, message)| message["params"]["name"] == self.name).count()
    }

    fn cancelled(&self) -> bool {
        self.script.methods().iter().any(|method| method == "notifications/cancelled")
    }
}

fn slow(ms: u64) -> Value {
    json!({ "ms": ms })
}

fn repeated(answer: &Answer) -> bool {
    answer.header(REPEATED) == Some("true")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_neither_header_is_a_run_of_its_own() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("plain", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    for number in 1..=3 {
        let answer = count.run(&[], json!({})).await;
        assert!(!repeated(&answer));
        assert_eq!(answer.expect(200)["func_return"], number.to_string());
    }
    let answer = count.run(&[(TRIES, "soon")], json!({})).await;
    assert_eq!(answer.expect(200)["func_return"], "4", "this is no number of tries");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_makes_one_run_of_many_requests() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("keyed", &json!({})).await;
    let tool = Tool::of(&portolan, &server, &script, "slow").await;
    let key = [(KEY, "k-1")];
    let many = (0..50).map(|_| tool.run(&key, slow(WHILE)));
    let answers = futures_util::future::join_all(many).await;
    assert_eq!(tool.calls(), 1);
    assert_eq!(answers.iter().filter(|answer| !repeated(answer)).count(), 1, "one of them started it");
    let text = answers[0].text.clone();
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.text == text));
    assert!(text.contains("done"), "{text}");
    let later = tool.run(&key, slow(WHILE)).await;
    assert!(repeated(&later) && later.text == text, "{}", later.text);

    let other = tool.run(&key, slow(1)).await.expect(422);
    assert_eq!(other["errors"][0]["loc"], json!(["header", "idempotency-key"]));
    assert_eq!(tool.calls(), 1, "nothing ran");
    // A key and a number of tries: the key counts.
    let both = tool.run(&[(KEY, "k-1"), (TRIES, "0")], slow(WHILE)).await;
    assert!(repeated(&both) && both.text == text);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_means_something_else_for_another_tool_server_or_caller() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("one", &json!({})).await;
    let (twin, twins_script) = portolan.create_stdio("two", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let twins = Tool::of(&portolan, &twin, &twins_script, "count").await;
    let args = Tool::of(&portolan, &server, &script, "args").await;
    let mut number = 0;
    for headers in [
        &[(KEY, "k")][..],
        &[(KEY, "K")],
        &[(KEY, "k"), ("authorization", "Bearer a")],
        &[(KEY, "k"), ("authorization", "Bearer b")],
        &[(KEY, "k"), ("x-bare-password", "password a")],
        &[(KEY, "k"), ("x-bare-password", "Bearer a")],
    ] {
        number += 1;
        for again in [false, true] {
            let answer = count.run(headers, json!({})).await;
            assert_eq!(repeated(&answer), again, "{headers:?}");
            assert_eq!(answer.expect(200)["func_return"], number.to_string(), "{headers:?}");
        }
    }
    assert_eq!(twins.run(&[(KEY, "k")], json!({})).await.expect(200)["func_return"], "1");
    assert_eq!(args.run(&[(KEY, "k")], json!({"a": 1})).await.expect(200)["func_return"], r#"{"a":1}"#);
    assert_eq!((count.calls(), twins.calls(), args.calls()), (6, 1, 1));
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_none_is_refused() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("keys", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let long = "k".repeat(256);
    for bad in ["", "two words", "tab\tbed", "schlüssel", &long] {
        let body = count.run(&[(KEY, bad)], json!({})).await.expect(422);
        assert_eq!(body["errors"][0]["loc"], json!(["header", "idempotency-key"]), "{body}");
    }
    count.run(&[(KEY, "one"), (KEY, "two")], json!({})).await.expect(422);
    assert_eq!(count.calls(), 0);
    for good in ["!", &long[1..], "\"8e03978e-40d5-43e8-bc93-6894a57f9324\""] {
        count.run(&[(KEY, good)], json!({})).await.expect(200);
    }
    assert_eq!(count.calls(), 3);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sdk_that_tries_again_gets_the_outcome_of_its_first_try() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("tries", &json!({})).await;
    let tool = Tool::of(&portolan, &server, &script, "slow").await;
    let args = |reversed: bool| match reversed {
        false => json!({"ms": WHILE, "a": {"x": 1, "y": [null]}}),
        true => json!({"a": {"y": [null], "x": 1}, "ms": WHILE}),
    };
    tool.run_and_leave(&[(TRIES, "0")], args(false)).await;
    // The second try leaves, too; the third finds the run under way, and so does a fourth.
    let second = tool.request(&[(TRIES, "1")], args(false)).timeout(Duration::from_millis(50)).send();
    assert!(second.await.unwrap_err().is_timeout());
    let (third, fourth) = tokio::join!(tool.run(&[(TRIES, "2")], args(true)), tool.run(&[(TRIES, "1")], args(false)));
    assert!(repeated(&third) && repeated(&fourth) && third.text == fourth.text);
    assert!(third.text.contains("done"), "{}", third.text);
    let late = tool.run(&[(TRIES, "2")], args(false)).await;
    assert!(repeated(&late) && late.text == third.text, "it is known after its end");
    assert_eq!(tool.calls(), 1);
    assert!(!tool.cancelled());

    // Not the same: other arguments, another caller, a first try.
    for (number, (headers, args)) in [
        (&[(TRIES, "1")][..], slow(1)),
        (&[(TRIES, "1"), ("authorization", "Bearer x")], args(false)),
        (&[(TRIES, "0")], args(false)),
    ]
    .into_iter()
    .enumerate()
    {
        let answer = tool.run(headers, args).await;
        assert!(!repeated(&answer), "{headers:?}");
        assert_eq!(tool.calls(), 2 + number, "{headers:?}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_try_without_room_is_not_to_be_repeated_and_everything_else_is() {
    let portolan = Portolan::start_with(|settings| settings.entry.max_requests = 2).await;
    let (server, script) = portolan.create_stdio("full", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let never = Tool::of(&portolan, &server, &script, "never").await;
    assert_eq!(count.run(&[(TRIES, "0")], json!({})).await.expect(200)["func_return"], "1");
    let full: Vec<_> = (0..2).map(|_| tokio::spawn(never.request(&[], json!({})).send())).collect();
    eventually("there is no room", || never.calls() == 2).await;
    // Its repetition would be given the outcome of the run before, and the tool never be called.
    for (headers, should_retry) in [
        (&[(TRIES, "0")][..], Some("false")),
        (&[(TRIES, "1")], None),
        (&[(TRIES, "0"), (KEY, "k")], None),
        (&[], None),
    ] {
        let answer = count.run(headers, json!({})).await;
        assert_eq!(answer.header("x-should-retry"), should_retry, "{headers:?}");
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert_eq!(answer.expect(503)["code"], "overloaded");
    }
    assert_eq!(count.calls(), 1);
    full.iter().for_each(|run| run.abort());
    eventually("they are cancelled", || never.cancelled()).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_wait_for_one_run_and_others_have_room() {
    const MOST: usize = 64;
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("crowd", &json!({})).await;
    let tool = Tool::of(&portolan, &server, &script, "slow").await;
    let key = [(KEY, "k")];
    let many = futures_util::future::join_all((0..MOST + 6).map(|_| tool.run(&key, slow(WHILE * 3)))).await;
    let (answered, refused): (Vec<_>, Vec<_>) = many.into_iter().partition(|answer| answer.status == 200);
    assert_eq!((answered.len(), refused.len()), (MOST, 6));
    for answer in refused {
        assert_eq!((answer.header("retry-after"), answer.header("x-should-retry")), (Some("1"), None));
        assert_eq!(answer.expect(503)["code"], "overloaded");
    }
    assert!(repeated(&tool.run(&key, slow(WHILE * 3)).await), "after its end it is for all");
    assert_eq!(tool.calls(), 1);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_equal_runs_a_try_again_means_the_one_that_lost_its_client() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("equal", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let slow_one = Tool::of(&portolan, &server, &script, "slow").await;
    // Two equal calls that are meant: each first try is a run.
    for number in ["1", "2"] {
        assert_eq!(count.run(&[(TRIES, "0")], json!({})).await.expect(200)["func_return"], number);
    }
    let last = count.run(&[(TRIES, "1")], json!({})).await;
    assert_eq!(last.expect(200)["func_return"], "2", "both were answered: the later one");

    slow_one.run_and_leave(&[(TRIES, "0")], slow(WHILE)).await;
    // This one keeps its client, and is the later one.
    let answered = slow_one.run(&[(TRIES, "0")], slow(WHILE)).await;
    let lost = slow_one.run(&[(TRIES, "1")], slow(WHILE)).await;
    assert!(repeated(&lost) && lost.text != answered.text, "the two differ in duration_ms");
    let again = slow_one.run(&[(TRIES, "1")], slow(WHILE)).await;
    assert_eq!(again.text, answered.text, "now both were answered");
    assert_eq!(slow_one.calls(), 2);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_its_window_a_try_again_is_a_run() {
    let window = Duration::from_millis(300);
    let portolan = Portolan::start_with(|settings| {
        settings.runs.retry_window = window;
        settings.runs.key_window = window;
    })
    .await;
    let (server, script) = portolan.create_stdio("window", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    for headers in [[(TRIES, "1")], [(KEY, "k")]] {
        count.run(&headers, json!({})).await.expect(200);
        let calls = count.calls();
        tokio::time::sleep(window * 2).await;
        let answer = count.run(&headers, json!({})).await;
        assert!(!repeated(&answer) && count.calls() == calls + 1, "{headers:?}");
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_nobody_waits_for_is_cancelled_after_its_grace_and_not_made_again() {
    let portolan = Portolan::start_with(|settings| settings.runs.orphan_grace = Duration::from_millis(300)).await;
    let (server, script) = portolan.create_stdio("left", &json!({})).await;
    let never = Tool::of(&portolan, &server, &script, "never").await;
    never.run_and_leave(&[(TRIES, "0")], json!({})).await;
    assert!(!never.cancelled());
    eventually("the server is told", || never.cancelled()).await;
    let late = never.run(&[(TRIES, "1")], json!({})).await;
    assert!(repeated(&late));
    let late = late.expect(200);
    assert_eq!(late["status"], "error");
    assert!(late["func_return"].as_str().unwrap().contains("cancelled; the tool may have run"), "{late}");
    assert_eq!(never.calls(), 1);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_cancelled_in_the_queue_was_not_made() {
    let portolan = Portolan::start_with(|settings| {
        settings.runs.orphan_grace = Duration::from_millis(100);
        settings.upstream.max_calls_per_server = 1;
    })
    .await;
    let (server, script) = portolan.create_stdio("left in the queue", &json!({})).await;
    let tool = Tool::of(&portolan, &server, &script, "slow").await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let (first, ()) = tokio::join!(tool.run(&[], slow(WHILE * 2)), async {
        eventually("it is called", || tool.calls() == 1).await;
        let queued = count.request(&[(TRIES, "0")], json!({})).timeout(Duration::from_millis(300)).send();
        assert!(queued.await.unwrap_err().is_timeout());
    });
    first.expect(200);
    let again = count.run(&[(TRIES, "1")], json!({})).await;
    assert!(!repeated(&again), "{}", again.text);
    assert_eq!(again.expect(200)["func_return"], "1");
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_with_a_key_goes_on_without_its_client() {
    let portolan = Portolan::start_with(|settings| settings.runs.orphan_grace = Duration::from_millis(10)).await;
    let (server, script) = portolan.create_stdio("key left", &json!({})).await;
    let tool = Tool::of(&portolan, &server, &script, "slow").await;
    tool.run_and_leave(&[(KEY, "k")], slow(WHILE)).await;
    tokio::time::sleep(Duration::from_millis(WHILE / 2)).await;
    assert_eq!(tool.run(&[(KEY, "k")], slow(WHILE)).await.expect(200)["func_return"], "done");
    assert!(tool.calls() == 1 && !tool.cancelled());
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_its_own_is_cancelled_at_once() {
    // A grace of any kind would last longer than the test waits.
    let portolan = Portolan::start_with(|settings| settings.runs.orphan_grace = PATIENCE * 10).await;
    let (server, script) = portolan.create_stdio("own", &json!({})).await;
    let never = Tool::of(&portolan, &server, &script, "never").await;
    never.run_and_leave(&[], json!({})).await;
    eventually("the server is told", || never.cancelled()).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_sent_is_not_remembered() {
    let portolan = Portolan::start_with(|settings| settings.upstream.connect_timeout = Duration::from_secs(2)).await;
    let http = fake::http::serve(Fake::new(fake::Script::default()));
    let server = portolan.create("http", json!({ "server_url": http.url })).await;
    let script = portolan.script(&json!({}));
    let tool = Tool::of(&portolan, &server, &script, "count").await;
    let count = async |headers: &[(&str, &str)]| tool.run(headers, json!({})).await;
    let ran = |answer: Answer| answer.expect(200)["func_return"].clone();
    assert_eq!(ran(count(&[(TRIES, "0")]).await), "1");
    let addr = http.addr;
    http.stop().await;
    let mut refused = vec![count(&[(KEY, "k")]).await, count(&[(KEY, "k")]).await, count(&[(TRIES, "0")]).await];
    refused.push(count(&[(KEY, "k")]).await);
    for answer in refused {
        assert!(!repeated(&answer), "{}", answer.text);
        assert!(matches!(answer.status, 502 | 503), "{}", answer.text);
    }
    let _again = fake::http::serve_on(addr, Fake::new(fake::Script::default()));
    let one = tool.path.split("/tools").next().unwrap().to_owned();
    portolan.refresh(one.rsplit('/').next().unwrap()).await.expect(200);
    assert_eq!(ran(count(&[(TRIES, "1")]).await), "1", "the try that was refused, not the one before it");
    assert_eq!(ran(count(&[(KEY, "k")]).await), "2");
    let again = count(&[(KEY, "k")]).await;
    assert!(repeated(&again));
    assert_eq!(ran(again), "2");
    // What a repetition says of its place is no other: this tool does not exist.
    let unknown = format!("{one}/tools/tool-x/run");
    for _ in 0..2 {
        let request = portolan.request("POST", &unknown).header(KEY, "k");
        Answer::of("POST", &unknown, request).await.expect(404);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_joined_a_run_that_was_not_sent_get_the_same_error() {
    let portolan =
        Portolan::start_with(|settings| settings.upstream.start_timeout = Duration::from_millis(WHILE)).await;
    let (server, script) = portolan.create_stdio("mute", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    script.set(&json!({"silent_at": "initialize"}));
    kill(portolan.children()[0]);
    eventually("the child is gone", || portolan.children().is_empty()).await;
    let answers = futures_util::future::join_all((0..5).map(|_| count.run(&[(KEY, "k")], json!({})))).await;
    for answer in answers {
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        let body = answer.expect(502);
        assert!(body["detail"].as_str().unwrap().contains("handshake"), "{body}");
    }
    assert_eq!(count.calls(), 0);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_without_room_are_missing_and_their_runs_are_not_made_again() {
    let portolan = Portolan::start_with(|settings| {
        settings.runs.max_kept_outcome_bytes = 20_000;
        settings.runs.max_kept_bytes = 60_000;
    })
    .await;
    let (server, script) = portolan.create_stdio("room", &json!({})).await;
    let wide = Tool::of(&portolan, &server, &script, "wide").await;
    let gone = "This run was made already; its result is no longer kept.";
    // Each outcome holds its text twice.
    for (key, bytes) in [("a", 5_000), ("b", 5_000), ("large", 20_000), ("c", 5_000)] {
        let answer = wide.run(&[(KEY, key)], json!({"bytes": bytes})).await.expect(200);
        assert_eq!(answer["func_return"].as_str().unwrap().len(), bytes, "the first one gets it all");
    }
    for (key, bytes, kept) in [("a", 5_000, false), ("b", 5_000, true), ("large", 20_000, false), ("c", 5_000, true)] {
        let answer = wide.run(&[(KEY, key)], json!({"bytes": bytes})).await;
        assert!(repeated(&answer), "{key}");
        let body = answer.expect(200);
        assert_eq!(body["status"], if kept { "success" } else { "error" }, "{key}");
        assert_eq!(body["func_return"] == gone, !kept, "{key}");
    }
    // Runs without a key have a room of their own.
    for bytes in [5_001, 5_002, 5_003] {
        wide.run(&[(TRIES, "0")], json!({"bytes": bytes})).await.expect(200);
    }
    assert_eq!(wide.run(&[(TRIES, "1")], json!({"bytes": 5_001})).await.expect(200)["func_return"], gone);
    assert_eq!(wide.run(&[(KEY, "c")], json!({"bytes": 5_000})).await.expect(200)["status"], "success");
    assert_eq!(wide.calls(), 7);
    portolan.stop().await;
}

/// Early heads within a test's patience.
async fn early() -> Portolan {
    Portolan::start_with(|settings| {
        settings.runs.early_head_after = Duration::from_millis(200);
        settings.runs.drip_every = Duration::from_millis(100);
        settings.upstream.start_timeout = Duration::from_millis(WHILE);
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_run_has_an_early_head_then_spaces_then_the_same_json() {
    let portolan = early().await;
    let (server, script) = portolan.create_stdio("long", &json!({})).await;
    let tool = Tool::of(&portolan, &server, &script, "slow").await;
    let fast = tool.run(&[], slow(0)).await;
    assert!(fast.text.starts_with('{') && fast.header("content-length").is_some(), "{}", fast.text);
    for headers in [&[][..], &[(TRIES, "0")], &[(KEY, "k")]] {
        let mut response = tool.request(headers, slow(WHILE * 2)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/json");
        assert!(response.headers().contains_key("x-request-id"));
        let mut body = response.chunk().await.unwrap().expect("a space");
        assert_eq!(&body[..], b" ", "at once");
        while let Some(chunk) = response.chunk().await.unwrap() {
            body = [body, chunk].concat().into();
        }
        let text = std::str::from_utf8(&body).unwrap();
        let json = text.trim_start_matches(' ');
        assert!(text.len() - json.len() > 3, "a space every 100 ms: {text}");
        assert_eq!(serde_json::from_str::<Value>(json).unwrap()["func_return"], "done");
        if headers == [(KEY, "k")] {
            assert_eq!(tool.run(headers, slow(WHILE * 2)).await.text, json);
        }
    }
    assert_eq!(tool.calls(), 4);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_after_the_head_is_a_result() {
    let portolan = early().await;
    let (server, script) = portolan.create_stdio("mute", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    script.set(&json!({"silent_at": "initialize"}));
    kill(portolan.children()[0]);
    eventually("the child is gone", || portolan.children().is_empty()).await;
    for headers in [&[][..], &[(TRIES, "0")]] {
        let answer = count.run(headers, json!({})).await;
        assert!(answer.text.starts_with(' ') || answer.status == 503, "{}", answer.text);
        if answer.status == 200 {
            let body = answer.expect(200);
            assert_eq!(body["status"], "error");
            let text = body["func_return"].as_str().unwrap();
            assert!(text.starts_with("The tool was not called.") && text.contains("handshake"), "{text}");
        }
    }
    assert_eq!(count.calls(), 0);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_after_the_head_can_come_back_and_one_of_its_own_is_cancelled() {
    let portolan = early().await;
    let (server, script) = portolan.create_stdio("back", &json!({})).await;
    let tool = Tool::of(&portolan, &server, &script, "slow").await;
    let first = tool.request(&[(TRIES, "0")], slow(WHILE * 2)).send().await.unwrap();
    assert_eq!(first.status(), 200);
    drop(first);
    let again = tool.run(&[(TRIES, "1")], slow(WHILE * 2)).await;
    assert!(repeated(&again) && again.text.contains("done"), "{}", again.text);
    assert!(tool.calls() == 1 && !tool.cancelled());
    let never = Tool::of(&portolan, &server, &script, "never").await;
    drop(never.request(&[], json!({})).send().await.unwrap());
    eventually("the server is told", || never.cancelled()).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_a_call_is_not_called_again() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("dies", &json!({})).await;
    let die = Tool::of(&portolan, &server, &script, "die").await;
    for (first, again) in [([(TRIES, "0")], [(TRIES, "1")]), ([(KEY, "k")], [(KEY, "k")])] {
        let calls = die.calls();
        let answer = die.run(&first, json!({})).await;
        let text = answer.text.clone();
        let body = answer.expect(200);
        assert_eq!(body["status"], "error");
        assert!(body["func_return"].as_str().unwrap().contains("may have run"), "{body}");
        let repetition = die.run(&again, json!({})).await;
        assert!(repeated(&repetition) && repetition.text == text, "{}", repetition.text);
        assert_eq!(die.calls(), calls + 1);
    }
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_fails_during_a_run_changes_nothing_about_its_outcome() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("store", &json!({})).await;
    let tool = Tool::of(&portolan, &server, &script, "slow").await;
    for headers in [&[][..], &[(TRIES, "0")]] {
        tool.run(headers, slow(0)).await.expect(200);
    }
    let (first, second, ()) = tokio::join!(tool.run(&[], slow(WHILE)), tool.run(&[(TRIES, "0")], slow(WHILE)), async {
        eventually("both run", || tool.calls() == 4).await;
        portolan.app.store.close().await;
    },);
    for answer in [first, second] {
        assert_eq!(answer.expect(200)["func_return"], "done");
    }
    let again = tool.run(&[(TRIES, "1")], slow(WHILE)).await;
    assert_eq!(again.expect(200)["func_return"], "done", "a repetition needs no database");
    assert_eq!(tool.calls(), 4);
    portolan.stop_without_database().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_answers_the_runs_it_cannot_wait_for() {
    for leave in [false, true] {
        let portolan = Portolan::start_with(|settings| {
            settings.entry.drain_timeout = Duration::from_secs(2);
            settings.runs.early_head_after = Duration::from_millis(200);
        })
        .await;
        let (server, script) = portolan.create_stdio("stop", &json!({})).await;
        let never = Tool::of(&portolan, &server, &script, "never").await;
        let every = [&[][..], &[(TRIES, "0")], &[(KEY, "k")]];
        if leave {
            // What nobody waits for is not waited for.
            for headers in every {
                never.run_and_leave(headers, json!({})).await;
            }
            portolan.stop().await;
            continue;
        }
        let runs: Vec<_> = every.map(|headers| tokio::spawn(never.request(headers, json!({})).send())).into();
        eventually("all are called", || never.calls() == 3).await;
        portolan.stop().await;
        for run in runs {
            let body: Value = run.await.unwrap().expect("it is answered").json().await.expect("and not cut");
            assert_eq!(body["status"], "error");
            assert!(body["func_return"].as_str().unwrap().contains("stopped before the tool answered"), "{body}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_says_of_runs_in_the_queue_that_they_were_not_made() {
    let portolan = Portolan::start_with(|settings| {
        settings.entry.drain_timeout = Duration::from_secs(2);
        settings.runs.early_head_after = Duration::from_millis(200);
        settings.upstream.max_calls_per_server = 1;
    })
    .await;
    // What it was sent is looked at when Portolan and its folder are gone.
    let folder = tempfile::tempdir().unwrap();
    let script = Script::new(folder.path(), &json!({}));
    let server = portolan.create("queue", json!({ "command": fake_mcp(), "args": ["stdio", script.0] })).await;
    let never = Tool::of(&portolan, &server, &script, "never").await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let sent = tokio::spawn(never.request(&[(TRIES, "0")], json!({})).send());
    eventually("it is called", || never.calls() == 1).await;
    let every = [&[][..], &[(TRIES, "0")], &[(KEY, "k")]];
    // Their heads tell that they are under way.
    let queued = futures_util::future::join_all(every.map(|headers| count.request(headers, json!({})).send())).await;
    portolan.stop().await;
    let body: Value = sent.await.unwrap().expect("it is answered").json().await.expect("and not cut");
    assert!(body["func_return"].as_str().unwrap().contains("the tool may have run"), "{body}");
    for run in queued {
        let body: Value = run.expect("it is answered").json().await.expect("and not cut");
        assert_eq!(body["func_return"], "The tool was not called. Portolan is stopping.");
    }
    assert_eq!(script.methods().iter().filter(|method| *method == "tools/call").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_makes_an_sdk_repeat_what_was_done() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("taken", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let config = json!({"command": "x"});
    let gone = portolan.create("gone", json!({"server_url": "http://127.0.0.1:1/"})).await;
    let refresh = format!("/v1/mcp-servers/{}/refresh", gone["id"].as_str().unwrap());
    let all = "/v1/mcp-servers/";
    let mut answers = vec![
        portolan.get("/v1/nothing").await,
        portolan.delete(all).await,
        portolan.post(all, &json!({"server_name": "taken", "config": config})).await,
        portolan.post(all, &json!({})).await,
        portolan.post(all, &json!({"server_name": "x".repeat(2_000_000), "config": config})).await,
        Answer::of("POST", all, portolan.request("POST", all).body("text")).await,
        portolan.send("PATCH", &refresh, None).await,
        count.run(&[(KEY, "")], json!({})).await,
    ];
    script.set(&json!({"exit_at": "initialize"}));
    kill(portolan.children()[0]);
    eventually("the child is gone", || portolan.children().is_empty()).await;
    answers.push(count.run(&[], json!({})).await);
    portolan.app.store.close().await;
    answers.push(count.run(&[], json!({})).await);
    answers.push(count.run(&[(KEY, "k")], json!({})).await);
    answers.push(portolan.post(all, &json!({"server_name": "new", "config": config})).await);
    answers.push(portolan.get("/v1/ready").await);
    let mut seen: Vec<_> = answers.iter().map(|answer| answer.status).collect();
    for answer in answers {
        if !matches!(answer.status, 408 | 409 | 429 | 500..) || answer.header("x-should-retry") == Some("false") {
            continue;
        }
        assert_eq!(answer.status, 503, "{}", answer.text);
        assert!(answer.header("retry-after").is_some());
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, [404, 405, 409, 413, 415, 422, 502, 503]);
    assert_eq!(count.calls(), 0);
    portolan.stop_without_database().await;
}
