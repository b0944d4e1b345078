//! Never twice, whoever is asked: a run that is asked for again at another replica, or after a restart (CONTRACT row 16). The
//! fakes of a script share its log, so it says how often a tool was really called, by whatever replica.

use std::time::Duration;

use portolan::config::Settings;
use portolan::store::Database as Pools;
use reqwest::RequestBuilder;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use crate::harness::{
    Answer, Database, PATIENCE, Portolan, Remote, Script, eventually, fake_mcp, processes_naming, scripts,
};
use crate::process::{Program, command};
use crate::sealing::key_file;

const KEY: &str = "idempotency-key";
const TRIES: &str = "x-stainless-retry-count";
const REPEATED: &str = "x-portolan-repeated";
/// How long a tool takes that others shall meet while it runs, in ms.
const WHILE: u64 = 1500;

/// One tool of a stdio server, and how often it was called.
struct Tool<'a> {
    name: &'static str,
    path: String,
    script: &'a Script,
}

impl<'a> Tool<'a> {
    async fn of(portolan: &Portolan, server: &Value, script: &'a Script, name: &'static str) -> Self {
        let id = server["id"].as_str().unwrap();
        let tool_id = portolan.tool_id(id, name).await;
        Self { name, path: format!("/v1/mcp-servers/{id}/tools/{tool_id}/run"), script }
    }

    fn request(&self, portolan: &Portolan, (name, value): (&str, &str), args: &Value) -> RequestBuilder {
        portolan.request("POST", &self.path).json(&json!({ "args": args })).header(name, value)
    }

    async fn run(&self, portolan: &Portolan, header: (&str, &str), args: Value) -> Answer {
        Answer::of("POST", &self.path, self.request(portolan, header, &args)).await
    }

    /// Starts a run and leaves when the tool has been called.
    async fn run_and_leave(&self, portolan: &Portolan, header: (&str, &str), args: Value) {
        let before = self.calls();
        tokio::select! {
            answer = self.request(portolan, header, &args).send() => panic!("{answer:?}"),
            () = eventually("the tool is called", || self.calls() > before) => {}
        }
    }

    fn calls(&self) -> usize {
        self.script.seen().iter().filter(|(_, message)| message["params"]["name"] == self.name).count()
    }
}

fn slow(ms: u64) -> Value {
    json!({ "ms": ms })
}

fn repeated(answer: &Answer) -> bool {
    answer.header(REPEATED) == Some("true")
}

/// What is written down of runs.
async fn contents(portolan: &Portolan) -> Vec<String> {
    const SQL: &str = "SELECT content FROM shared_runs ORDER BY id";
    match &portolan.app.store.database {
        Pools::Postgres(pool) => sqlx::query_scalar(SQL).fetch_all(pool).await.unwrap(),
        Pools::Sqlite { read, .. } => sqlx::query_scalar(SQL).fetch_all(read).await.unwrap(),
    }
}

#[track_caller]
fn refused(answer: Answer) -> Value {
    assert_eq!(answer.header("x-should-retry"), Some("false"), "{}", answer.text);
    assert!(!repeated(&answer));
    let body = answer.expect(409);
    assert_eq!(body["code"], "run_unknown", "{body}");
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_one_run_whichever_replica_is_asked() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, script) = one.create_stdio("keyed", &json!({})).await;
    let tool = Tool::of(&one, &server, &script, "slow").await;
    let key = (KEY, "k");
    let (first, second, third) = tokio::join!(
        tool.run(&one, key, slow(WHILE)),
        tool.run(&other, key, slow(WHILE)),
        tool.run(&other, key, slow(WHILE)),
    );
    assert_eq!(tool.calls(), 1);
    let answers = [&first, &second, &third];
    assert!(first.text.contains("done"), "{}", first.text);
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.text == first.text));
    assert_eq!(answers.iter().filter(|answer| !repeated(answer)).count(), 1, "one of them started it");
    for replica in [&one, &other] {
        let later = tool.run(replica, key, slow(WHILE)).await;
        assert!(repeated(&later) && later.text == first.text, "{}", later.text);
        let body = tool.run(replica, key, slow(1)).await.expect(422);
        assert_eq!(body["errors"][0]["loc"], json!(["header", "idempotency-key"]));
    }
    // One that the other replica has never seen.
    assert!(!repeated(&tool.run(&one, (KEY, "l"), slow(1)).await));
    tool.run(&other, (KEY, "l"), slow(2)).await.expect(422);
    assert!(repeated(&tool.run(&other, (KEY, "l"), slow(1)).await));
    assert_eq!(tool.calls(), 2);
    assert!(!repeated(&tool.run(&other, (KEY, "m"), slow(1)).await), "another key is another run");
    assert_eq!(tool.calls(), 3);
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_outlives_a_restart() {
    let portolan = Portolan::start_with(|settings| settings.runs.max_kept_outcome_bytes = 20_000).await;
    let (server, script) = portolan.create_stdio("restart", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let wide = Tool::of(&portolan, &server, &script, "wide").await;
    let first = count.run(&portolan, (KEY, "k"), json!({})).await;
    assert!(!repeated(&first) && first.status == 200, "{}", first.text);
    wide.run(&portolan, (KEY, "large"), json!({"bytes": 20_000})).await.expect(200);
    let portolan = portolan.reopen(|_| {}).await;
    for _ in 0..2 {
        let again = count.run(&portolan, (KEY, "k"), json!({})).await;
        assert!(repeated(&again) && again.text == first.text, "{}", again.text);
    }
    count.run(&portolan, (KEY, "k"), json!({"other": 1})).await.expect(422);
    let large = wide.run(&portolan, (KEY, "large"), json!({"bytes": 20_000})).await;
    assert!(repeated(&large));
    assert_eq!(large.expect(200)["func_return"], "This run was made already; its result is no longer kept.");
    assert_eq!((count.calls(), wide.calls()), (1, 1));
    assert!(!repeated(&count.run(&portolan, (KEY, "l"), json!({})).await));
    assert_eq!(count.calls(), 2);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_a_stop_cut_off_is_not_made_again() {
    let portolan = Portolan::start_with(|settings| settings.entry.drain_timeout = Duration::from_secs(2)).await;
    let (server, script) = portolan.create_stdio("cut", &json!({})).await;
    let never = Tool::of(&portolan, &server, &script, "never").await;
    never.run_and_leave(&portolan, (KEY, "k"), json!({})).await;
    let portolan = portolan.reopen(|_| {}).await;
    let again = never.run(&portolan, (KEY, "k"), json!({})).await;
    assert!(repeated(&again), "{}", again.text);
    let body = again.expect(200);
    assert!(body["func_return"].as_str().unwrap().contains("the tool may have run"), "{body}");
    assert_eq!(never.calls(), 1);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_with_a_key_whose_portolan_was_killed_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let start = || {
        let mut command = command(folder.path(), database.url().as_deref());
        command.args(["--replica-lost-after", "3s", "--early-head-after", "2m"]);
        Program::start(command)
    };
    let mut first = start();
    let script = Script::new(&scripts(folder.path()), &json!({}));
    let remote = Remote::new(&first.url);
    let config = json!({ "command": fake_mcp(), "args": ["stdio", script.0] });
    let server = remote.create("killed", config).await;
    let id = server["id"].as_str().unwrap();
    let (never, count) = (remote.path(id, "never").await, remote.path(id, "count").await);
    let calls = |name: &str| script.seen().iter().filter(|(_, message)| message["params"]["name"] == name).count();
    let ask = async |portolan: &Remote, path: &str, key: &str| {
        let request = portolan.request("POST", path).json(&json!({})).header(KEY, key);
        Answer::of("POST", path, request).await
    };
    let done = ask(&remote, &count, "done").await;
    let asked = remote.request("POST", &never).json(&json!({})).header(KEY, "k");
    tokio::select! {
        answer = asked.send() => panic!("{answer:?}"),
        () = eventually("the tool is called", || calls("never") == 1) => {}
    }
    first.signal("-KILL");
    first.exit_code();
    eventually("its children end with it", || processes_naming(&script.0.to_string_lossy()).is_empty()).await;

    let mut second = start();
    let remote = Remote::new(&second.url);
    for _ in 0..2 {
        let body = refused(ask(&remote, &never, "k").await);
        assert!(body["detail"].as_str().unwrap().contains("ended before it was known"), "{body}");
    }
    let again = ask(&remote, &count, "done").await;
    assert!(repeated(&again) && again.text == done.text, "who was answered is answered again: {}", again.text);
    assert_eq!((calls("never"), calls("count")), (1, 1));
    assert!(!repeated(&ask(&remote, &count, "new").await));
    assert_eq!(calls("count"), 2);
    second.signal("-TERM");
    assert_eq!(second.exit_code(), Some(0));
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_database_nothing_is_sent_for_a_key() {
    let portolan = Portolan::start().await;
    let (server, script) = portolan.create_stdio("away", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let known = count.run(&portolan, (KEY, "known"), json!({})).await;
    portolan.app.store.close().await;
    let answer = count.run(&portolan, (KEY, "k"), json!({})).await;
    assert!(answer.header("retry-after").is_some() && answer.header("x-should-retry").is_none());
    assert_eq!(answer.expect(503)["code"], "unavailable");
    assert_eq!(count.calls(), 1);
    let again = count.run(&portolan, (KEY, "known"), json!({})).await;
    assert!(repeated(&again) && again.text == known.text, "what is in memory needs no database");
    portolan.stop_without_database().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_at_the_end_of_a_run_with_a_key_gets_its_outcome_later() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, script) = one.create_stdio("later", &json!({})).await;
    let tool = Tool::of(&one, &server, &script, "slow").await;
    let mut database = PgConnection::connect(&one.database_url().unwrap()).await.unwrap();
    let (first, ()) = tokio::join!(tool.run(&one, (KEY, "k"), slow(WHILE)), async {
        eventually("the tool is called", || tool.calls() == 1).await;
        database.execute("BEGIN").await.unwrap();
        database.execute("LOCK TABLE shared_runs IN ACCESS EXCLUSIVE MODE").await.unwrap();
    });
    assert!(first.text.contains("done") && !repeated(&first), "{}", first.text);
    let here = tool.run(&one, (KEY, "k"), slow(WHILE)).await;
    assert!(repeated(&here) && here.text == first.text, "{}", here.text);
    let refused = tool.run(&one, (KEY, "new"), slow(WHILE)).await;
    assert!(refused.header("retry-after").is_some(), "{}", refused.text);
    refused.expect(503);
    assert_eq!(tool.calls(), 1);
    database.execute("ROLLBACK").await.unwrap();
    database.close().await.unwrap();
    let there = tool.run(&other, (KEY, "k"), slow(WHILE)).await;
    assert!(repeated(&there) && there.text == first.text, "{}", there.text);
    assert_eq!(tool.calls(), 1);
    // What nobody knew to be written or not is free again.
    assert!(!repeated(&tool.run(&other, (KEY, "new"), slow(WHILE)).await));
    assert_eq!(tool.calls(), 2);
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_are_sealed_and_stay_readable_when_keys_change() {
    let folder = tempfile::tempdir().unwrap();
    let keys = key_file(folder.path(), &[1]);
    let with_keys = |settings: &mut Settings| {
        settings.secrets.key = None;
        settings.secrets.key_file = Some(keys.clone());
    };
    let portolan = Portolan::start_with(with_keys).await;
    let (server, script) = portolan.create_stdio("sealed", &json!({})).await;
    let args = Tool::of(&portolan, &server, &script, "args").await;
    let first = args.run(&portolan, (KEY, "k"), json!({"said": "in confidence"})).await;
    assert!(first.text.contains("in confidence"));
    let stored = contents(&portolan).await;
    assert!(stored.len() == 1 && stored[0].starts_with("v1."), "{stored:?}");
    key_file(folder.path(), &[2, 1]);
    let portolan = portolan.reopen(with_keys).await;
    portolan.app.store.rotate(|_, _| {}).await.unwrap();
    let sealed_again = contents(&portolan).await;
    assert_ne!(sealed_again, stored);
    key_file(folder.path(), &[2]);
    let portolan = portolan.reopen(with_keys).await;
    let again = args.run(&portolan, (KEY, "k"), json!({"said": "in confidence"})).await;
    assert!(repeated(&again) && again.text == first.text, "{}", again.text);
    args.run(&portolan, (KEY, "k"), json!({})).await.expect(422);
    assert_eq!(args.calls(), 1);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_came_to_nothing_is_free_everywhere() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, script) = one.create_stdio("free", &json!({})).await;
    let count = Tool::of(&one, &server, &script, "count").await;
    script.set(&json!({"exit_at": "initialize"}));
    let failed = count.run(&other, (KEY, "k"), json!({})).await;
    assert!(!repeated(&failed));
    failed.expect(502);
    let made = count.run(&one, (KEY, "k"), json!({})).await;
    assert!(!repeated(&made) && made.status == 200, "{}", made.text);
    let again = count.run(&other, (KEY, "k"), json!({})).await;
    assert!(repeated(&again) && again.text == made.text, "{}", again.text);
    assert_eq!(count.calls(), 1);
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_of_keys_goes_when_its_time_is_over() {
    let portolan = Portolan::start_with(|settings| settings.runs.key_window = Duration::from_millis(400)).await;
    let (server, script) = portolan.create_stdio("window", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    for key in ["a", "b", "c"] {
        count.run(&portolan, (KEY, key), json!({})).await.expect(200);
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !contents(&portolan).await.is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "old rows stay");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!repeated(&count.run(&portolan, (KEY, "a"), json!({})).await));
    assert_eq!(count.calls(), 4);
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sdk_that_tries_again_elsewhere_gets_the_outcome_of_its_first_try() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, script) = one.create_stdio("elsewhere", &json!({})).await;
    let tool = Tool::of(&one, &server, &script, "slow").await;
    // While it runs.
    tool.run_and_leave(&one, (TRIES, "0"), slow(WHILE)).await;
    let again = tool.run(&other, (TRIES, "1"), slow(WHILE)).await;
    assert!(repeated(&again) && again.text.contains("done"), "{}", again.text);
    assert_eq!(tool.calls(), 1);
    for replica in [&one, &other] {
        let third = tool.run(replica, (TRIES, "2"), slow(WHILE)).await;
        assert!(repeated(&third) && third.text == again.text, "{}", third.text);
    }
    // After its end, got by its client or not.
    let got = tool.run(&one, (TRIES, "0"), slow(2)).await;
    let again = tool.run(&other, (TRIES, "1"), slow(2)).await;
    assert!(repeated(&again) && again.text == got.text, "{}", again.text);
    tool.run_and_leave(&one, (TRIES, "0"), slow(300)).await;
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let again = tool.run(&other, (TRIES, "1"), slow(300)).await;
    assert!(repeated(&again) && again.text.contains("done"), "{}", again.text);
    assert_eq!(tool.calls(), 3);
    // One that none of them knows is a run, and the first try of an equal one always is.
    assert!(!repeated(&tool.run(&other, (TRIES, "1"), slow(4)).await));
    assert!(!repeated(&tool.run(&one, (TRIES, "0"), slow(4)).await));
    assert_eq!(tool.calls(), 5);
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_a_run_waits_for_a_database_that_is_away() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, script) = one.create_stdio("followed", &json!({})).await;
    let tool = Tool::of(&one, &server, &script, "slow").await;
    let mut database = PgConnection::connect(&one.database_url().unwrap()).await.unwrap();
    tool.run_and_leave(&one, (TRIES, "0"), slow(9_000)).await;
    let (again, ()) = tokio::join!(tool.run(&other, (TRIES, "1"), slow(9_000)), async {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while contents(&one).await.is_empty() {
            assert!(tokio::time::Instant::now() < deadline, "nobody has the run");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The other one looks each 100 ms: by then it has seen it.
        tokio::time::sleep(Duration::from_secs(2)).await;
        database.execute("BEGIN").await.unwrap();
        database.execute("LOCK TABLE shared_runs IN ACCESS EXCLUSIVE MODE").await.unwrap();
        tokio::time::sleep(Duration::from_secs(7)).await;
        database.execute("ROLLBACK").await.unwrap();
    });
    assert!(repeated(&again) && again.text.contains("done"), "{}", again.text);
    assert_eq!(tool.calls(), 1);
    database.close().await.unwrap();
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_under_way_is_left_to_its_replica_when_its_time_is_over() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|settings| settings.runs.key_window = Duration::from_millis(400)).await else {
        return one.stop().await;
    };
    let (server, script) = one.create_stdio("over", &json!({})).await;
    let tool = Tool::of(&one, &server, &script, "slow").await;
    let mut database = PgConnection::connect(&one.database_url().unwrap()).await.unwrap();
    let (first, second) = tokio::join!(tool.run(&one, (KEY, "k"), slow(WHILE)), async {
        eventually("the tool is called", || tool.calls() == 1).await;
        let over = "UPDATE shared_runs SET expires_at = CURRENT_TIMESTAMP - interval '1 day'";
        database.execute(AssertSqlSafe(over.to_owned())).await.unwrap();
        // The other one sweeps meanwhile.
        tokio::time::sleep(Duration::from_millis(500)).await;
        tool.run(&other, (KEY, "k"), slow(WHILE)).await
    });
    assert!(repeated(&second) && second.text == first.text, "{}", second.text);
    assert_eq!(tool.calls(), 1);
    database.close().await.unwrap();
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_run_elsewhere_is_meant_before_an_equal_one_that_was_answered_here() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, script) = one.create_stdio("equal", &json!({})).await;
    let tool = Tool::of(&one, &server, &script, "slow").await;
    let answered = tool.run(&other, (TRIES, "0"), slow(WHILE)).await;
    tool.run_and_leave(&one, (TRIES, "0"), slow(WHILE)).await;
    let lost = tool.run(&other, (TRIES, "1"), slow(WHILE)).await;
    assert!(repeated(&lost) && lost.text != answered.text, "the two differ in duration_ms");
    assert_eq!(tool.calls(), 2);
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_are_asked_for_one_unknown_run_make_it_once() {
    let one = Portolan::start().await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let third = one.replica(|_| {}).await.unwrap();
    let (server, script) = one.create_stdio("at once", &json!({})).await;
    let tool = Tool::of(&one, &server, &script, "slow").await;
    for round in 0..3 {
        let args = slow(300 + round);
        let asked = [&one, &other, &third].map(|replica| tool.run(replica, (TRIES, "1"), args.clone()));
        let answers = futures_util::future::join_all(asked).await;
        assert_eq!(tool.calls() as u64, round + 1);
        let text = answers[0].text.clone();
        assert!(answers.iter().all(|answer| answer.status == 200 && answer.text == text), "{text}");
        assert_eq!(answers.iter().filter(|answer| !repeated(answer)).count(), 1, "one of them made it");
    }
    third.stop().await;
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_try_that_was_refused_elsewhere_is_a_run_here() {
    let one = Portolan::start_with(|settings| {
        settings.upstream.max_calls_per_server = 1;
        settings.upstream.max_queue_per_server = 0;
    })
    .await;
    let Some(other) = one.replica(|_| {}).await else { return one.stop().await };
    let (server, script) = one.create_stdio("refused", &json!({})).await;
    let count = Tool::of(&one, &server, &script, "count").await;
    let never = Tool::of(&one, &server, &script, "never").await;
    // An equal run from before is none of the client's that is refused.
    count.run(&one, (TRIES, "0"), json!({})).await.expect(200);
    let full = tokio::spawn(never.request(&one, (TRIES, "0"), &json!({})).send());
    eventually("there is no room", || never.calls() == 1).await;
    count.run(&one, (TRIES, "0"), json!({})).await.expect(503);
    let again = count.run(&other, (TRIES, "1"), json!({})).await;
    assert!(!repeated(&again), "{}", again.text);
    assert_eq!(count.calls(), 2);
    full.abort();
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_lives_and_does_not_answer_may_have_the_run() {
    let portolan = Portolan::start().await;
    let Some(url) = portolan.database_url() else { return portolan.stop().await };
    let (server, script) = portolan.create_stdio("silent", &json!({})).await;
    let count = Tool::of(&portolan, &server, &script, "count").await;
    let mut database = PgConnection::connect(&url).await.unwrap();
    let silent = "INSERT INTO replicas (id, beat_at, answered_up_to) VALUES ('silent', now(), 0)";
    database.execute(AssertSqlSafe(silent.to_owned())).await.unwrap();
    let body = refused(count.run(&portolan, (TRIES, "1"), json!({})).await);
    assert!(body["detail"].as_str().unwrap().contains("did not say so in time"), "{body}");
    assert_eq!(count.calls(), 0);
    // A first try asks nobody.
    assert_eq!(count.run(&portolan, (TRIES, "0"), json!({"x": 1})).await.expect(200)["func_return"], "1");
    database.execute(AssertSqlSafe("DELETE FROM replicas WHERE id = 'silent'".to_owned())).await.unwrap();
    assert_eq!(count.run(&portolan, (TRIES, "1"), json!({})).await.expect(200)["func_return"], "2");
    database.close().await.unwrap();
    portolan.stop().await;
}
