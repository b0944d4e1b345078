//! Servers that stall, lie, flood and die, in one table over the three transports. Whatever they do, the answer is clean and in
//! time, other servers go on, the odd one is used again once it behaves, and nothing of it is left when it is deleted.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::{FutureExt, StreamExt, stream};
use portolan::config::Upstream;
use serde_json::{Value, json};

use crate::fake::tcp::{self, Manner};
use crate::fake::{self, Fake, Running};
use crate::harness::{
    self, Answer, Database, FakeProgram, Portolan, Remote, eventually, fake_mcp, processes_naming, sockets_to,
};
use crate::process;

const CONNECT: Duration = Duration::from_secs(1);
const HANDSHAKE: Duration = Duration::from_secs(2);
const START: Duration = Duration::from_secs(3);
const LIST: Duration = Duration::from_secs(2);
const RUN: Duration = Duration::from_secs(2);
/// What an answer may come after its deadline.
const MARGIN: Duration = Duration::from_secs(1);
/// How long a test repeats what is answered 503, as an SDK does.
const REPEATING: Duration = Duration::from_secs(5);
/// The largest message of the table; the largest of all has a test of its own.
const MAX_MESSAGE: usize = 256 * 1024;
const AT_ONCE: usize = 8;
/// How a fault begins that may be the machine's: such a row is played again when nothing else of the table is.
const LATE: &str = "it took";
const REPLAYS: usize = 3;
/// A prime.
const STRIDE: usize = 37;
/// Stands in texts of servers that no error may repeat.
const MARK: &str = "LEAK-7b1f";
/// A result that is not an echo.
const ODD: &str = r#"{"jsonrpc":"2.0","id":{id},"result":{"content":[{"type":"text","text":"odd"}]}}"#;

fn limits(upstream: &mut Upstream) {
    upstream.connect_timeout = CONNECT;
    upstream.handshake_timeout = HANDSHAKE;
    upstream.start_timeout = START;
    upstream.list_timeout = LIST;
    upstream.run_timeout = RUN;
    upstream.max_message_bytes = MAX_MESSAGE;
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Over {
    Stdio,
    /// The shell runs this with the fake server as `$FAKE`.
    Shell(&'static str),
    Http,
    Sse,
    /// No MCP server at all, registered as one of this type.
    Tcp(Manner, &'static str),
}
use Over::{Http, Shell, Sse, Stdio, Tcp};

const ALL: [Over; 3] = [Stdio, Http, Sse];
const NET: [Over; 2] = [Http, Sse];

/// What the test does, in turn; a create comes first, a delete last.
#[derive(Clone, Debug)]
enum Do {
    Run(&'static str, Value),
    /// Without a repetition after 503.
    RunOnce(&'static str, Value),
    Refresh,
    /// A new script, from the next list or start on.
    Become(Value),
    /// HTTP: forgets its sessions, as after a restart.
    LoseSessions,
    Rest(u64),
    /// How many sessions were opened by now.
    Handshakes(usize),
    /// How many processes of this server there are in the end.
    Processes(usize),
    KillInner,
    /// The server's port closes.
    Vanish,
    /// Calls until one succeeds.
    Back,
}
use Do::{Back, Become, Handshakes, KillInner, LoseSessions, Processes, Refresh, Rest, Run, RunOnce, Vanish};

/// What comes of it; a text is a part of the error.
#[derive(Clone, Copy, Debug)]
enum Expect {
    /// Create: `ready`. Refresh: 200.
    Well,
    /// Create: `unreachable`. Refresh: Letta's 404.
    Down(&'static str),
    /// Create: `auth_required`. Refresh: Letta's 404.
    SignIn,
    /// Run: success with this text.
    Says(&'static str),
    /// Run: 200 with `status: "error"`.
    Fails(&'static str),
    /// Run: 200 before the deadline.
    Answered,
    /// Run: 502, not to be repeated.
    NotSent,
    /// Run: 503 and when to come again.
    Later,
    /// Run: it did not take place, whether it was sent or not.
    Declined,
    /// Any of these.
    Settled,
}
use Expect::{Answered, Declined, Down, Fails, Later, NotSent, Says, Settled, SignIn, Well};

struct Row {
    name: String,
    over: Over,
    script: Value,
    created: Expect,
    then: Vec<(Do, Expect)>,
}

impl Row {
    /// Without the call after it: nothing tells this server from one that is slow.
    fn alone(mut self) -> Self {
        self.then.truncate(1);
        self
    }

    /// The call after it may have to wait until the rest of the odd one has passed.
    fn then_patiently(mut self) -> Self {
        *self.then.last_mut().expect("every row has steps") = (Back, Settled);
        self
    }

    /// The call after it comes some time after it.
    fn then_after(mut self, ms: u64) -> Self {
        self.then.insert(1, (Rest(ms), Settled));
        self
    }
}

fn echo() -> (Do, Expect) {
    (Run("echo", json!({"message": "after"})), Says("after"))
}

/// What is odd is one call; the next must be as if nothing had been.
fn call(name: &str, over: Over, act: Value, expect: Expect) -> Row {
    call_with(name, over, json!({}), act, expect)
}

fn call_with(name: &str, over: Over, mut script: Value, mut act: Value, expect: Expect) -> Row {
    act["times"] = json!(1);
    script["acts"]["call"] = act;
    let run = (Run("echo", json!({"message": "hello"})), expect);
    Row { name: format!("call: {name}"), over, script, created: Well, then: vec![run, echo()] }
}

/// What is odd is the opening or the list; once repaired, a refresh finds the server well at once.
fn open(name: &str, over: Over, script: Value, created: Expect) -> Row {
    let mut then = vec![(Refresh, created), (Become(json!({})), Settled), (Refresh, Well), echo()];
    if matches!(created, Settled) {
        then.remove(0);
    }
    Row { name: format!("open: {name}"), over, script, created, then }
}

fn stage(name: &str, over: Over, stage: &str, act: Value, created: Expect) -> Row {
    let script = json!({"acts": {stage: act}});
    open(&format!("{name} at {stage}"), over, script, created)
}

fn say(texts: &[&str]) -> Value {
    let steps: Vec<Value> = texts.iter().map(|text| json!({ "say": text })).collect();
    json!({ "steps": steps })
}

fn steps(steps: Value) -> Value {
    json!({ "steps": steps })
}

fn table() -> Vec<Row> {
    let mut rows = Vec::new();
    for families in [noise, ids, halves, sizes, shapes, versions, stalls, exits, statuses, bodies, lists, floods, pipes]
    {
        families(&mut rows);
    }
    rows
}

/// Lines, events and bytes that are no messages.
fn noise(rows: &mut Vec<Row>) {
    let garbage = format!(
        "{MARK} starting up...\n\n{{\"not\": \"JSON-RPC\"}}\n[]\n17\n\"text\"\nnull\n{{\"id\":\n\u{7}\u{1b}[2J\n"
    );
    rows.push(open("no noise", Stdio, json!({}), Well));
    rows.push(open("garbage lines before the first message", Stdio, json!({"banner": garbage.repeat(100)}), Well));
    rows.push(open(
        "a banner without a newline",
        Stdio,
        json!({"banner": format!("{MARK} Welcome! ")}),
        Down("in time"),
    ));
    rows.push(call(
        "garbage lines before the answer",
        Stdio,
        steps(json!([{"raw": garbage}, "answer"])),
        Says("hello"),
    ));
    rows.push(call(
        "invalid UTF-8 before the answer",
        Stdio,
        steps(json!([{"bytes": [255, 254, 0, 128, 10]}, "answer"])),
        Says("hello"),
    ));
    rows.push(call(
        "CRLF and blank lines",
        Stdio,
        steps(json!([{"raw": "\r\n\r\n \n"}, {"raw": ODD}, {"raw": "\r\n\r\n"}])),
        Says("odd"),
    ));
    let broken = [ODD.split("odd").next().unwrap_or_default(), ODD.split("odd").nth(1).unwrap_or_default()];
    for over in ALL {
        let middle = json!([{"raw": if over == Stdio { "" } else { "data: " }}, {"raw": broken[0]}, {"bytes": [233, 255]},
            {"raw": broken[1]}, {"raw": if over == Stdio { "\n" } else { "\n\n" }}]);
        rows.push(call("invalid UTF-8 inside a result", over, steps(middle), Answered));
    }
    let others = ": comment\n\nevent: other\ndata: {}\n\nid: 7\nretry: 1\n\ndata\n\ndata:\n\nx: y\n\n";
    let garbage = "event: message\ndata: LEAK-7b1f\n\ndata: {\n\nLEAK-7b1f\n\n\u{feff}\n\n";
    for over in NET {
        rows.push(call("events of other kinds", over, steps(json!([{"raw": others}, "answer"])), Says("hello")));
        rows.push(call("events that are no messages", over, steps(json!([{"raw": garbage}, "answer"])), Says("hello")));
        let lines =
            r#"data: {"jsonrpc":"2.0","id":{id},"#.to_owned() + "\n" + r#"data: "result":{"content":[]}}"# + "\n\n";
        rows.push(call(
            "an event of several lines",
            over,
            steps(json!([{"raw": lines}])),
            Says("Empty response from tool"),
        ));
    }
}

/// Answers to whom they do not belong.
fn ids(rows: &mut Vec<Row>) {
    let to = |id: &str| ODD.replace("{id}", id);
    for over in ALL {
        rows.push(call("its own answer", over, steps(json!(["answer"])), Says("hello")));
        rows.push(call("a wrong id and no other answer", over, say(&[&to("987654")]), Fails("")));
        rows.push(call(
            "a wrong id, then the answer",
            over,
            steps(json!([{"say": to("987654")}, "answer"])),
            Says("hello"),
        ));
        rows.push(call("two answers", over, steps(json!(["answer", {"say": ODD}])), Says("hello")));
        rows.push(call("an id as a text", over, say(&[&to("\"{id}\"")]), Says("odd")));
        rows.push(call(
            "answers to nobody",
            over,
            steps(json!([
            {"say": to("\"nobody\"")}, {"say": to("null")}, {"say": to("-1")}, {"say": to("1e300")}, {"say": to("[1]")},
            {"say": to("99999999999999999999999")}, "answer"])),
            Says("hello"),
        ));
        rows.push(call(
            "an error with the id null",
            over,
            say(&[r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"LEAK-7b1f"}}"#]),
            Fails(""),
        ));
        // What comes late is for nobody: the next call is sent while it is on its way.
        let late = steps(json!([{"pause": 2300}, {"say": ODD}]));
        rows.push(call("an answer after the deadline", over, late, Fails("did not answer")));
    }
}

/// Messages that break off.
fn halves(rows: &mut Vec<Row>) {
    let half = r#"{"jsonrpc":"2.0","id":{id},"result":{"content":[{"type":"text","te"#;
    for end in [json!({"exit": 0}), json!({"exit": 3}), json!("kill"), json!("cut")] {
        rows.push(call(&format!("half a line, then {end}"), Stdio, steps(json!([{"raw": half}, end])), Fails("")));
    }
    for (end, expect) in
        [(json!("cut"), Fails("may have run")), (json!({"pause": 0}), Fails("")), (json!("silence"), Fails(""))]
    {
        let json = json!({"reply": "json"});
        rows.push(call_with(
            &format!("half a JSON body, then {end}"),
            Http,
            json,
            steps(json!([{"raw": half}, end])),
            expect,
        ));
        rows.push(call(
            &format!("half an event, then {end}"),
            Http,
            steps(json!([{"raw": "data: "}, {"raw": half}, end])),
            expect,
        ));
    }
    rows.push(call(
        "half an event, then the end of the stream",
        Sse,
        steps(json!([{"raw": "data: "}, {"raw": half}, "cut"])),
        Fails("may have run"),
    ));
    rows.push(call(
        "half an event, then silence",
        Sse,
        steps(json!([{"raw": "data: "}, {"raw": half}, "silence"])),
        Fails(""),
    ));
    // The stream never gets any further, and nothing tells it from a slow one.
    rows.last_mut().expect("just pushed").then.truncate(1);
    for over in ALL {
        rows.push(call("half a message that is framed as a whole one", over, say(&[half]), Answered));
    }
}

/// Messages at the limit, and over it.
fn sizes(rows: &mut Vec<Row>) {
    let head = r#"{"jsonrpc":"2.0","id":{id},"result":{"content":[{"type":"text","text":""#;
    let tail = r#"{"jsonrpc":"2.0","result":{"content":[{"type":"text","text":""#;
    for (over, style, start, end) in [
        (Stdio, json!({}), "", "\n"),
        (Http, json!({"reply": "json"}), "", ""),
        (Http, json!({"reply": "sse"}), "data: ", "\n\n"),
        (Sse, json!({}), "data: ", "\n\n"),
    ] {
        let frame = |bytes: usize, parts: [&str; 2]| {
            steps(json!([{"raw": start}, {"raw": parts[0]}, {"fill": bytes}, {"raw": parts[1]}, {"raw": end}]))
        };
        let name = |what: &str| format!("{what}{}", style["reply"].as_str().unwrap_or_default());
        let under = frame(MAX_MESSAGE - 2048, [head, "\"}]}}"]);
        rows.push(call_with(&name("an answer just under the limit "), over, style.clone(), under, Answered));
        for (what, parts) in [("head", [head, "\"}]}}"]), ("tail", [tail, "\"}]},\"id\":{id}}"])] {
            let over_it = frame(MAX_MESSAGE + 2048, parts);
            let name = name(&format!("an answer over the limit, its id at the {what} "));
            let mut row = call_with(&name, over, style.clone(), over_it, Fails("larger"));
            // The rest of the message is passed over; the session is as good as before.
            if over == Stdio {
                row.then.push((Handshakes(1), Settled));
            }
            rows.push(row);
        }
        let huge =
            frame(3 * MAX_MESSAGE, [r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"data":""#, "\"}}"]);
        if over == Stdio {
            let mut both = huge;
            both["steps"].as_array_mut().expect("steps").push(json!("answer"));
            rows.push(call("a notification over the limit, then the answer", over, both, Answered));
        }
        let list = frame(2 * MAX_MESSAGE, [r#"{"jsonrpc":"2.0","id":{id},"result":{"tools":[{"name":""#, "\"}]}}"]);
        let mut script = style.clone();
        script["acts"] = json!({ "list": list });
        rows.push(open(&name("a list over the limit "), over, script, Down("")));
    }
}

/// JSON that is no answer, or an odd one.
fn shapes(rows: &mut Vec<Row>) {
    let deep = |depth: usize| {
        ODD.replace(
            r#""content":["#,
            &format!(r#""structuredContent":{}{},"content":["#, "[".repeat(depth), "]".repeat(depth)),
        )
    };
    for over in ALL {
        let odd = [
            ("a batch with the answer in it", format!("[{ODD}]"), Says("odd")),
            ("an empty batch, then the answer", format!("[]@{ODD}"), Says("odd")),
            ("neither result nor error", r#"{"jsonrpc":"2.0","id":{id}}"#.to_owned(), Answered),
            (
                "both result and error",
                ODD.replace("\"result\"", r#""error":{"code":1,"message":"m"},"result""#),
                Answered,
            ),
            ("result: null", r#"{"jsonrpc":"2.0","id":{id},"result":null}"#.to_owned(), Fails("not a tool result")),
            (
                "result: a text",
                r#"{"jsonrpc":"2.0","id":{id},"result":"LEAK-7b1f"}"#.to_owned(),
                Fails("not a tool result"),
            ),
            ("error: null", r#"{"jsonrpc":"2.0","id":{id},"error":null}"#.to_owned(), Answered),
            ("error: a text", r#"{"jsonrpc":"2.0","id":{id},"error":"LEAK-7b1f"}"#.to_owned(), Fails("")),
            ("error without a message", r#"{"jsonrpc":"2.0","id":{id},"error":{"code":5}}"#.to_owned(), Fails("")),
            (
                "an error",
                r#"{"jsonrpc":"2.0","id":{id},"error":{"code":5,"message":"five"}}"#.to_owned(),
                Fails("five"),
            ),
            ("content: a number", ODD.replace(r#"[{"type":"text","text":"odd"}]"#, "5"), Answered),
            ("no jsonrpc", ODD.replace(r#""jsonrpc":"2.0","#, ""), Says("odd")),
            ("jsonrpc 1.0", ODD.replace("2.0", "1.0"), Says("odd")),
            ("a number that JSON has not", ODD.replace("\"odd\"", "NaN"), Answered),
            ("JSON 200 deep", deep(200), Answered),
            ("JSON 100,000 deep", deep(100_000), Answered),
        ];
        for (name, text, expect) in odd {
            rows.push(call(name, over, say(&text.split('@').collect::<Vec<_>>()), expect));
        }
    }
}

/// Handshakes that are odd.
fn versions(rows: &mut Vec<Row>) {
    let greeting = |version: &str| {
        let rest = r#""capabilities":{"tools":{}},"serverInfo":{"name":"n","version":"1"}"#;
        say(&[&format!(r#"{{"jsonrpc":"2.0","id":{{id}},"result":{{{version}{rest}}}}}"#)])
    };
    for over in ALL {
        for (name, version, created) in [
            ("a known version", r#""protocolVersion":"2025-06-18","#, Well),
            ("an unknown version", r#""protocolVersion":"1999-LEAK-7b1f","#, Down("")),
            ("a version that is a number", r#""protocolVersion":7,"#, Down("")),
            ("no version", "", Down("")),
        ] {
            rows.push(stage(name, over, "initialize", greeting(version), created));
        }
        let refusal = r#"{"jsonrpc":"2.0","id":{id},"error":{"code":-32000,"message":"LEAK-7b1f"}}"#;
        rows.push(stage("an error", over, "initialize", say(&[refusal]), Down("")));
        rows.push(stage("null", over, "initialize", say(&[r#"{"jsonrpc":"2.0","id":{id},"result":null}"#]), Down("")));
    }
}

/// Nothing happens, or not enough.
fn stalls(rows: &mut Vec<Row>) {
    for kind in ["streamable_http", "sse"] {
        use Manner::*;
        for manner in [Full, Silent, Closed, Banner, Ignored, DrippedHead, EndlessHead] {
            let then = vec![(Refresh, Down(""))];
            let name = format!("connect: {manner:?} for {kind}");
            rows.push(Row { name, over: Tcp(manner, kind), script: json!({}), created: Down(""), then });
        }
    }
    for over in ALL {
        rows.push(open("silence at the handshake", over, json!({"silent_at": "initialize"}), Down("in time")));
        rows.push(open("silence at the list", over, json!({"silent_at": "list"}), Down("in time")));
        rows.push(open("an answer that takes its time", over, json!({"list_delay_ms": 300}), Well));
        let run = (Run("never", json!({})), Fails("did not answer within 2 s"));
        let call = |name: &str, then| Row { name: name.to_owned(), over, script: json!({}), created: Well, then };
        rows.push(call("call: silence", vec![run, echo()]));
        rows.push(call("call: slow, but in time", vec![(Run("slow", json!({"ms": 500})), Says("done")), echo()]));
    }
    for over in NET {
        rows.push(stage(
            "a request that is held",
            over,
            if over == Sse { "open" } else { "initialize" },
            json!({"hold": true}),
            Down(""),
        ));
    }
    rows.push(call("a request that is held", Http, json!({"hold": true}), Fails("did not answer")));
    rows.push(call(
        "a POST that is held, answered on the stream",
        Sse,
        json!({"hold": true, "steps": ["answer"]}),
        Says("hello"),
    ));
    rows.push(open("a child that ignores EOF and SIGTERM", Stdio, json!({"stubborn": true}), Well));
    rows.push(open("a DELETE that is never answered", Http, json!({"acts": {"close": {"hold": true}}}), Well));
    rows.push(open("a DELETE that is answered 500", Http, json!({"acts": {"close": {"status": 500}}}), Well));
    let big = json!({"message": "x".repeat(1024 * 1024)});
    rows.push(Row {
        name: "call: standard input is not read".to_owned(),
        over: Stdio,
        script: json!({"tools": fake::script::with_tools(&["deaf"])}),
        created: Well,
        then: vec![
            (Run("deaf", json!({})), Says("done")),
            (Run("echo", big), Fails("did not answer")),
            (Back, Settled),
        ],
    });
    for over in ALL {
        let then = vec![(Run("echo", json!({"message": "x".repeat(200_000)})), Answered), echo()];
        rows.push(Row { name: "call: 200 KB that are read".to_owned(), over, script: json!({}), created: Well, then });
    }
}

/// Ends, with each code, at each step.
fn exits(rows: &mut Vec<Row>) {
    for (end, words) in
        [(json!({"exit": 0}), "exit status: 0"), (json!({"exit": 3}), "exit status: 3"), (json!("kill"), "signal: 9")]
    {
        for at in ["start", "initialize"] {
            rows.push(stage(&end.to_string(), Stdio, at, steps(json!([end])), Down(words)));
        }
        for at in ["initialized", "list"] {
            rows.push(stage(&end.to_string(), Stdio, at, json!({"deaf": true, "steps": [end]}), Down("")));
        }
        rows.push(call(&end.to_string(), Stdio, steps(json!([end])), Fails("may have run")));
    }
    for over in NET {
        for at in ["initialize", "list"] {
            rows.push(stage("a cut connection", over, at, steps(json!(["cut"])), Down("")));
        }
        rows.push(call("a cut connection", over, steps(json!(["cut"])), Fails("may have run")));
        let cut = steps(json!(["answer", {"pause": 50}, "cut"]));
        rows.push(call("the answer, then a cut", over, cut, Says("hello")).then_after(500));
        rows.push(Row {
            name: "call: nobody is there any more".to_owned(),
            over,
            script: json!({}),
            created: Well,
            then: vec![
                (Vanish, Settled),
                // The end of a kept connection may cross a request on it, of which nobody knows then.
                (Rest(500), Settled),
                (RunOnce("echo", json!({})), NotSent),
                (RunOnce("echo", json!({})), Later),
                (Rest(2_000), Settled),
                (RunOnce("echo", json!({})), Declined),
            ],
        });
    }
    rows.push(
        call("the answer, then an exit", Stdio, steps(json!(["answer", {"pause": 50}, {"exit": 1}])), Says("hello"))
            .then_after(500),
    );
    let closed = Shell("exec $FAKE 3>&1 1>&-");
    rows.push(open("standard output closed, and life goes on", closed, json!({}), Down("")));
    // What it has for a script does not open its output.
    rows.last_mut().expect("just pushed").then.truncate(1);
}

/// What HTTP statuses say.
fn statuses(rows: &mut Vec<Row>) {
    for over in NET {
        let at = if over == Sse { "open" } else { "initialize" };
        for (status, part) in
            [(403, "403"), (404, "404"), (429, "429"), (500, "500"), (503, "503"), (204, ""), (302, "302")]
        {
            let act = json!({"status": status, "steps": [{"raw": MARK}]});
            rows.push(stage(&status.to_string(), over, at, act, Down(part)));
        }
        rows.push(stage(
            "401",
            over,
            at,
            json!({"status": 401, "headers": {"www-authenticate": "Bearer realm=\"LEAK-7b1f\""}}),
            SignIn,
        ));
        for (status, expect) in [
            (400, Fails("did not take the call")),
            (401, Fails("did not take the call")),
            (403, Fails("did not take the call")),
            (500, Fails("")),
            (503, Fails("")),
        ] {
            rows.push(call(&format!("HTTP {status}"), over, json!({"status": status, "steps": []}), expect));
        }
        let elsewhere = json!({"status": 307, "headers": {"location": "http://127.0.0.1:1/mcp"}});
        rows.push(call("a redirect to another origin", over, elsewhere, Fails("307")));
        let limited = json!({"acts": {"call": {"times": 1, "status": 429, "headers": {"retry-after": "2"}}}});
        let hello = || json!({"message": "hello"});
        rows.push(Row {
            name: "call: 429 with Retry-After".to_owned(),
            over,
            script: limited,
            created: Well,
            then: vec![
                (RunOnce("echo", hello()), Declined),
                (RunOnce("echo", hello()), Later),
                (Rest(2_200), Settled),
                (RunOnce("echo", hello()), Says("hello")),
            ],
        });
    }
    rows.push(Row {
        name: "call: a redirect on the own origin".to_owned(),
        over: Http,
        script: json!({}),
        created: Well,
        then: vec![(Become(json!({"redirect": "/deep/mcp"})), Settled), echo()],
    });
    rows.push(Row {
        name: "call: a session that expired".to_owned(),
        over: Http,
        script: json!({}),
        created: Well,
        then: vec![(LoseSessions, Settled), echo(), (Handshakes(2), Settled), echo(), (Handshakes(2), Settled)],
    });
    rows.push(Row {
        name: "call: a session that expired, and no other to be had".to_owned(),
        over: Http,
        script: json!({}),
        created: Well,
        then: vec![
            (Become(json!({"acts": {"initialize": {"status": 503, "headers": {"retry-after": "2"}}}})), Settled),
            (LoseSessions, Settled),
            (RunOnce("echo", json!({"message": "hello"})), Declined),
            (RunOnce("echo", json!({"message": "hello"})), Later),
            (Become(json!({})), Settled),
            (Rest(2_200), Settled),
            echo(),
        ],
    });
}

/// Bodies of answers to a POST.
fn bodies(rows: &mut Vec<Row>) {
    let json = || json!({"reply": "json"});
    for (name, style, act, expect) in [
        ("202 and nothing after it", json(), json!({"status": 202}), Fails("")),
        ("a web page", json(), json!({"headers": {"content-type": "text/html"}, "steps": [{"raw": MARK}]}), Answered),
        ("no content type", json(), json!({"headers": {"content-type": ""}, "steps": [{"raw": MARK}]}), Answered),
        ("an empty JSON body", json(), json!({"steps": []}), Answered),
        ("a JSON body that is none", json(), json!({"steps": [{"raw": MARK}]}), Answered),
        ("an event stream without an event", json!({}), json!({"steps": []}), Fails("may have run")),
        (
            "an event stream without the answer",
            json!({}),
            say(&[r#"{"jsonrpc":"2.0","method":"notifications/message"}"#]),
            Fails("may have run"),
        ),
        (
            "an event stream that goes on after the answer",
            json!({}),
            steps(json!(["answer", "silence"])),
            Says("hello"),
        ),
        (
            "events without end after the answer",
            json!({}),
            steps(json!(["answer", {"repeat": [1_000_000, {"raw": ": more\n\n"}]}])),
            Says("hello"),
        ),
        (
            "comments without end and no answer",
            json!({}),
            steps(json!([{"repeat": [1_000_000, {"raw": ": more\n\n"}]}, "silence"])),
            Fails(""),
        ),
        ("a JSON body of one byte a second", json(), steps(json!([{"drip": 1000}, "answer"])), Fails("did not answer")),
        ("an event of one byte a second", json!({}), steps(json!([{"drip": 1000}, "answer"])), Fails("did not answer")),
        (
            "an event of one byte at a time",
            json!({}),
            steps(json!([{"drip": 1}, {"raw": "data: "}, {"raw": ODD}, {"raw": "\n\n"}])),
            Says("odd"),
        ),
        ("a body that is cut at its start", json(), steps(json!(["cut"])), Fails("may have run")),
    ] {
        rows.push(call_with(name, Http, style, act, expect));
    }
    rows.push(
        call("an event of one byte a second", Sse, steps(json!([{"drip": 1000}, "answer"])), Fails("did not answer"))
            .alone(),
    );
    rows.push(
        call("a line of one byte a second", Stdio, steps(json!([{"drip": 1000}, "answer"])), Fails("did not answer"))
            .alone(),
    );
    rows.push(call(
        "a line of one byte at a time",
        Stdio,
        steps(json!([{"drip": 1}, {"raw": ODD}, {"raw": "\n"}])),
        Says("odd"),
    ));
    rows.push(stage(
        "a web page",
        Sse,
        "open",
        json!({"headers": {"content-type": "text/html"}, "steps": [{"raw": MARK}]}),
        Down(""),
    ));
    rows.push(stage("an event stream that ends", Sse, "open", steps(json!(["cut"])), Down("")));
    rows.push(stage("no endpoint", Sse, "open", steps(json!(["silence"])), Down("in time")));
    for endpoint in ["http://127.0.0.1:1/messages", "//LEAK-7b1f.example/x", "file:///etc/passwd", " "] {
        rows.push(open(&format!("the endpoint {endpoint}"), Sse, json!({ "endpoint": endpoint }), Down("own origin")));
    }
}

/// Lists of tools.
fn lists(rows: &mut Vec<Row>) {
    for over in ALL {
        rows.push(open("pages that end", over, json!({"page_size": 3}), Well));
        rows.push(open("pages without end", over, json!({"endless": true, "page_size": 100}), Down("")));
        rows.push(open(
            "a cursor that comes again",
            over,
            json!({"repeat_cursor": true}),
            Down("does not come to an end"),
        ));
        rows.push(open("an error", over, json!({"list_error": {"code": -32603, "message": MARK}}), Down("-32603")));
        for (name, result) in [
            ("no tools", "{}"),
            ("tools: null", r#"{"tools":null}"#),
            ("null", "null"),
            ("tools: a text", r#"{"tools":"x"}"#),
        ] {
            let list = say(&[&format!(r#"{{"jsonrpc":"2.0","id":{{id}},"result":{result}}}"#)]);
            rows.push(stage(name, over, "list", list, Down("")));
        }
    }
}

/// More than anybody asked for.
fn floods(rows: &mut Vec<Row>) {
    let ping = r#"{"jsonrpc":"2.0","id":"p{n}","method":"ping"}"#;
    let note = r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"{n}"}}"#;
    for over in ALL {
        for (name, text) in [("requests", ping), ("notifications", note)] {
            let flood = |times: usize| json!({"deaf": true, "steps": [{"repeat": [times, {"say": text}]}, "answer"]});
            rows.push(call(&format!("10 {name} before the answer"), over, flood(10), Says("hello")));
            if text == note {
                rows.push(call(&format!("10,000 {name} before the answer"), over, flood(10_000), Says("hello")));
            }
            // Over HTTP, what is not read is a POST that is not answered.
            let unread = json!({"acts": {"reply": {"hold": true}}});
            let name = format!("100,000 {name} before the answer, and nothing is read");
            let expect = match (text == ping, over) {
                // How many are taken in 2 s is the machine's matter.
                (false, _) => Settled,
                // The end of what it may leave unread crosses the deadline.
                (true, Stdio) => Fails(""),
                (true, _) => Fails("did not answer"),
            };
            rows.push(call_with(&name, over, unread, flood(100_000), expect).then_patiently());
        }
        // Over HTTP each answer is a POST, and how many can be made in 2 s is the machine's matter.
        for (times, expect) in [(100, Says("hello")), (1_000, if over == Stdio { Says("hello") } else { Settled })] {
            let act = steps(json!([{"repeat": [times, {"say": ping}]}, "answer"]));
            rows.push(
                call(&format!("{times} requests that are read before the answer"), over, act, expect).then_patiently(),
            );
        }
    }
    let changed = r#"{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}"#;
    let storm = steps(json!([{"repeat": [1000, {"say": changed}]}, "answer"]));
    for over in ALL {
        rows.push(call("1,000 times list_changed", over, storm.clone(), Says("hello")));
    }
    rows.push(call("8 MB of standard error", Stdio, steps(json!([{"stderr": 8 << 20}, "answer"])), Says("hello")));
    rows.push(open(
        "8 MB of standard error before the handshake",
        Stdio,
        json!({"acts": {"start": {"steps": [{"stderr": 8 << 20}]}}}),
        Well,
    ));
}

/// Processes behind processes.
fn pipes(rows: &mut Vec<Row>) {
    let mut grandchild = call(
        "an exit while a grandchild keeps the pipes",
        Stdio,
        steps(json!(["spawn", {"exit": 3}])),
        Fails("may have run"),
    );
    grandchild.then.push((Processes(1), Settled));
    rows.push(grandchild);
    rows.push(call(
        "a kill while a grandchild keeps the pipes",
        Stdio,
        steps(json!(["spawn", "kill"])),
        Fails("may have run"),
    ));
    rows.push(call(
        "an exit while a process of another group keeps the pipes",
        Stdio,
        steps(json!(["spawn_away", {"exit": 3}])),
        Fails(""),
    ));
    rows.push(stage(
        "a grandchild that keeps the pipes",
        Stdio,
        "initialize",
        steps(json!(["spawn", {"exit": 3}])),
        Down("exit status: 3"),
    ));
    rows.push(open("a wrapper", Shell("$FAKE; exit 5"), json!({}), Well));
    for (name, shell, expect) in [
        ("a wrapper that goes with its inner process", "$FAKE; exit 5", Fails("may have run")),
        ("a wrapper that outlives its inner process", "$FAKE; sleep 300", Fails("")),
        ("a wrapper with a process beside", "tail -n 0 -f $SCRIPT & $FAKE", Fails("may have run")),
    ] {
        let kill = steps(json!(["kill"]));
        let row = call(name, Shell(shell), kill, expect);
        rows.push(if shell.contains("sleep") { row.alone() } else { row });
    }
    rows.push(Row {
        name: "a wrapper whose inner process is killed between calls".to_owned(),
        over: Shell("$FAKE; exit 5"),
        script: json!({}),
        created: Well,
        then: vec![echo(), (KillInner, Settled), echo()],
    });
}

/// A row at work.
struct Bench<'a> {
    portolan: &'a Remote,
    healthy: &'a Healthy,
    folder: &'a Path,
    script: harness::Script,
    running: Option<Running>,
    tcp: Option<tcp::Listener>,
    over: Over,
    id: String,
    /// The next call finds a session.
    open: bool,
}

/// Servers that behave, to be called beside the others.
struct Healthy {
    runs: Vec<String>,
    asked: AtomicUsize,
    _fakes: [Running; 2],
}

impl Healthy {
    async fn new(portolan: &Remote, folder: &Path) -> Self {
        let (http, sse) = (
            fake::http::serve(Fake::new(fake::Script::default())),
            fake::sse::serve(Fake::new(fake::Script::default())),
        );
        let stdio = json!({"command": fake_mcp(), "args": ["stdio", harness::Script::new(folder, &json!({})).0]});
        let over_http = json!({ "server_url": http.url });
        let over_sse = json!({"mcp_server_type": "sse", "server_url": sse.url});
        let mut runs = Vec::new();
        for (name, config) in [("healthy stdio", stdio), ("healthy http", over_http), ("healthy sse", over_sse)] {
            let server = portolan.create(name, config).await;
            let id = server["id"].as_str().expect("an id");
            runs.push(portolan.path(id, "echo").await);
        }
        let healthy = Self { runs, asked: AtomicUsize::new(0), _fakes: [http, sse] };
        for _ in &healthy.runs {
            healthy.check(portolan, "before all others").await.expect("it is well");
        }
        healthy
    }

    /// Deletes the servers and closes their ports.
    async fn leave(self, portolan: &Remote) {
        for run in &self.runs {
            let server: Vec<_> = run.split('/').take(4).collect();
            portolan.send("DELETE", &server.join("/"), None).await.expect(204);
        }
    }

    async fn check(&self, portolan: &Remote, when: &str) -> Result<(), String> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        let message = format!("healthy {number}");
        let run = portolan.post(&self.runs[number % self.runs.len()], &json!({"args": {"message": message}})).await;
        let text = run.text.clone();
        if run.status == 200 && run.expect(200)["func_return"] == message {
            Ok(())
        } else {
            Err(format!("a healthy server {when}: {text}"))
        }
    }
}

/// An error for people: one line, no text of the server's, no place of the machine's.
fn clean(text: &str, folder: &str) -> Result<(), String> {
    let faults = [
        (text.is_empty(), "it is empty"),
        (!text.ends_with('.'), "it is no sentence"),
        (text.contains('\n') || text.chars().count() > 600, "it is not short"),
        (text.contains(MARK), "it repeats the server"),
        (text.contains(folder) || text.contains("127.0.0.1") || text.contains(".rs"), "it names a place"),
    ];
    match faults.iter().find(|(wrong, _)| *wrong) {
        Some((_, fault)) => Err(format!("{fault}: {text:?}")),
        None => Ok(()),
    }
}

impl<'a> Bench<'a> {
    fn set_up(portolan: &'a Remote, healthy: &'a Healthy, folder: &'a Path, row: &Row) -> (Self, Value) {
        let script = harness::Script::new(folder, &row.script);
        let typed = || serde_json::from_value(row.script.clone()).expect("the script is one");
        let (mut running, mut tcp) = (None, None);
        let config = match row.over {
            Stdio => json!({"command": fake_mcp(), "args": ["stdio", script.0]}),
            Shell(line) => {
                let program = fake_mcp();
                let fake = format!("{} stdio {}", program.display(), script.0.display());
                let line = line.replace("$FAKE", &fake).replace("$SCRIPT", &script.0.to_string_lossy());
                json!({"command": "/bin/sh", "args": ["-c", line]})
            }
            Http => json!({ "server_url": running.insert(fake::http::serve(Fake::new(typed()))).url }),
            Sse => {
                let url = &running.insert(fake::sse::serve(Fake::new(typed()))).url;
                json!({"mcp_server_type": "sse", "server_url": url})
            }
            Tcp(manner, kind) => {
                let addr = tcp.insert(tcp::listen(manner)).addr;
                json!({"mcp_server_type": kind, "server_url": format!("http://{addr}/mcp")})
            }
        };
        let open = false;
        (Self { portolan, healthy, folder, script, running, tcp, over: row.over, id: String::new(), open }, config)
    }

    fn opening(&self) -> Duration {
        match self.over {
            Stdio | Shell(_) => START,
            Http | Sse | Tcp(..) => HANDSHAKE,
        }
    }

    fn folder(&self) -> String {
        self.folder.to_string_lossy().into_owned()
    }

    /// An answer within its deadline, and a healthy server's beside it.
    async fn timed(&self, deadline: Duration, answer: impl Future<Output = Answer>) -> Result<Answer, String> {
        let started = Instant::now();
        let timed = async {
            let answer = answer.await;
            (answer, started.elapsed())
        };
        let ((answer, took), beside) = tokio::join!(timed, self.healthy.check(self.portolan, "at the same time"));
        beside?;
        if took > deadline + MARGIN {
            return Err(format!("{LATE} {took:?} of {deadline:?}: {}", answer.text));
        }
        Ok(answer)
    }

    async fn create(&mut self, row: &Row, config: Value) -> Result<(), String> {
        let body = json!({"server_name": format!("{} {:?} {}", row.name, row.over, self.script.0.display()), "config": config});
        let body = json!({"server_name": body["server_name"].as_str().expect("a text").chars().take(250).collect::<String>(), "config": body["config"]});
        let answer = self.timed(self.opening() + LIST, self.portolan.post("/v1/mcp-servers/", &body)).await?;
        let server = answer.expect(200);
        self.id = server["id"].as_str().expect("an id").to_owned();
        self.open = matches!(row.created, Well);
        let state = server["status"]["state"].as_str().unwrap_or_default();
        self.status(state, &server["status"], row.created)
    }

    fn status(&self, state: &str, status: &Value, expect: Expect) -> Result<(), String> {
        let error = status["error"].as_str().unwrap_or_default();
        let (right, part) = match expect {
            Well => (state == "ready", ""),
            Down(part) => (state == "unreachable", part),
            SignIn => (state == "auth_required", "sign-in"),
            _ => (state != "never_connected", ""),
        };
        if !right || !error.contains(part) {
            return Err(format!("expected {expect:?}, got {status}"));
        }
        if state == "ready" { Ok(()) } else { clean(error, &self.folder()) }
    }

    async fn act(&mut self, what: &Do, expect: Expect) -> Result<(), String> {
        match what {
            Run(tool, args) => {
                let repeating = Instant::now();
                loop {
                    let answer = self.run(tool, args).await?;
                    if answer.status != 503 || matches!(expect, Later) || repeating.elapsed() > REPEATING {
                        return self.ran(answer, expect);
                    }
                    let seconds = answer.header("retry-after").and_then(|text| text.parse().ok());
                    tokio::time::sleep(Duration::from_secs(seconds.ok_or("503 without Retry-After")?)).await;
                }
            }
            RunOnce(tool, args) => {
                let answer = self.run(tool, args).await?;
                self.ran(answer, expect)
            }
            Refresh => {
                let refresh = format!("/v1/mcp-servers/{}/refresh", self.id);
                let answer = self.timed(self.opening() + LIST, self.portolan.send("PATCH", &refresh, None)).await?;
                self.open = matches!(expect, Well);
                match (answer.status, expect) {
                    (200, Well) => Ok(()),
                    (404, Down(_) | SignIn) if answer.header("x-should-retry") == Some("false") => {
                        let state = if matches!(expect, SignIn) { "auth_required" } else { "unreachable" };
                        let status = json!({"error": answer.expect(404)["detail"]["error"]});
                        self.status(state, &status, expect)
                    }
                    _ => Err(format!("a refresh, expected {expect:?}: {} {}", answer.status, answer.text)),
                }
            }
            Become(script) => {
                self.script.set(script);
                if let Some(running) = &self.running {
                    running.set_script(serde_json::from_value(script.clone()).expect("the script is one"));
                }
                Ok(())
            }
            LoseSessions => {
                self.running.as_ref().expect("an HTTP server").drop_sessions();
                self.open = false;
                Ok(())
            }
            Rest(ms) => {
                tokio::time::sleep(Duration::from_millis(*ms)).await;
                Ok(())
            }
            Vanish => {
                drop(self.running.take());
                self.open = false;
                Ok(())
            }
            Back => {
                let deadline = Instant::now() + harness::PATIENCE;
                loop {
                    self.open = false;
                    let answer = self.run("echo", &json!({"message": "back"})).await?;
                    if self.ran(answer, Says("back")).is_ok() {
                        return Ok(());
                    }
                    if Instant::now() > deadline {
                        return Err("it never works again".to_owned());
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
            Handshakes(expected) => {
                let made = match &self.running {
                    Some(running) => running.requests().iter().filter(|seen| seen.rpc() == "initialize").count(),
                    None => self.script.count("initialize"),
                };
                if made == *expected { Ok(()) } else { Err(format!("{made} handshakes, not {expected}")) }
            }
            Processes(expected) => {
                let path = self.script.0.to_string_lossy().into_owned();
                eventually("as many processes as there should be", || processes_naming(&path).len() == *expected).await;
                Ok(())
            }
            KillInner => {
                let path = self.script.0.to_string_lossy().into_owned();
                let own = |pid: &u32| {
                    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    !line.starts_with(b"/bin/sh")
                };
                let inner = processes_naming(&path).into_iter().find(own).expect("it runs");
                harness::kill(inner);
                eventually("the wrapper ends, too", || processes_naming(&path).is_empty()).await;
                self.open = false;
                Ok(())
            }
        }
    }

    async fn run(&self, tool: &str, args: &Value) -> Result<Answer, String> {
        let path = self.portolan.path(&self.id, tool).await;
        let deadline = if self.open { RUN } else { self.opening() + RUN };
        let body = json!({ "args": args });
        // Not `post`: its check of the answer's shape gives up at JSON that is 128 deep.
        let run = async {
            let response = self.portolan.request("POST", &path).json(&body).send().await.expect("Portolan answers");
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            Answer { status, headers, text: response.text().await.expect("the body arrives") }
        };
        self.timed(deadline, run).await
    }

    fn ran(&mut self, answer: Answer, expect: Expect) -> Result<(), String> {
        let wrong = |why: &str| {
            Err(format!(
                "{why}, expected {expect:?}: {} {}",
                answer.status,
                answer.text.chars().take(500).collect::<String>()
            ))
        };
        let body = match serde_json::from_str::<Value>(&answer.text) {
            Ok(body) => body,
            Err(error) if error.to_string().contains("recursion") => {
                // Only a reader with a limit of its own minds.
                let failed = answer.text.contains(r#""status":"error""#);
                json!({"status": if failed { "error" } else { "success" }, "func_return": "It is deep."})
            }
            Err(_) => return wrong("no JSON"),
        };
        let said = body["func_return"].as_str().unwrap_or_default();
        let failed = body["status"] == "error";
        self.open = answer.status == 200 && !failed;
        match answer.status {
            200 if failed => clean(said, &self.folder()).or_else(|fault| {
                // A JSON-RPC error is the server's own word (CONTRACT row 13).
                if matches!(expect, Fails(part) if said == part) || said == "m" || said == "null" {
                    Ok(())
                } else {
                    Err(fault)
                }
            })?,
            200 => {}
            502 if answer.header("x-should-retry") == Some("false") => {
                clean(body["error"]["detail"].as_str().unwrap_or_default(), &self.folder())?;
            }
            503 if answer
                .header("retry-after")
                .is_some_and(|seconds| seconds.parse::<u32>().is_ok_and(|it| it > 0)) =>
            {
                clean(body["detail"].as_str().unwrap_or_default(), &self.folder())?;
            }
            _ => return wrong("not an answer to a run"),
        }
        let right = match expect {
            Says(text) => answer.status == 200 && !failed && said == text,
            Fails(part) => answer.status == 200 && failed && said.contains(part),
            Answered => answer.status == 200 && !said.contains("did not answer within"),
            NotSent => answer.status == 502,
            Later => answer.status == 503,
            Declined => failed || answer.status != 200,
            Settled => true,
            Well | Down(_) | SignIn => false,
        };
        if right { Ok(()) } else { wrong("an answer to a run") }
    }

    /// After the server was deleted nothing of it is left.
    async fn clear(self) -> Result<(), String> {
        if !self.id.is_empty() {
            let path = format!("/v1/mcp-servers/{}", self.id);
            let deleting = self.portolan.send("DELETE", &path, None);
            let answer =
                tokio::time::timeout(Duration::from_secs(5), deleting).await.map_err(|_| "a delete takes too long")?;
            drop(answer.expect(204));
        }
        self.healthy.check(self.portolan, "right after").await?;
        let port =
            self.running.as_ref().map(|running| running.addr.port()).or(self.tcp.as_ref().map(|tcp| tcp.addr.port()));
        let path = self.script.0.to_string_lossy().into_owned();
        // What left its group is not Portolan's any more.
        for pid in processes_naming(&path) {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let group = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let led = group
                .rsplit_once(')')
                .and_then(|(_, rest)| rest.split_whitespace().nth(2))
                .is_some_and(|leader| leader == pid.to_string());
            if line.starts_with(b"tail") && led {
                harness::kill(pid);
            }
        }
        if let Some(running) = &self.running {
            let left = || running.streams() + running.fake().running();
            let deadline = Instant::now() + harness::PATIENCE;
            while left() > 0 {
                if Instant::now() > deadline {
                    let (streams, calls) = (running.streams(), running.fake().running());
                    return Err(format!("left behind: {streams} streams, {calls} calls at the server"));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        drop((self.running, self.tcp));
        let deadline = Instant::now() + harness::PATIENCE;
        loop {
            let (children, sockets) = (processes_naming(&path), port.map_or(0, sockets_to));
            if children.is_empty() && sockets == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("left behind: children {children:?}, {sockets} sockets"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn play(portolan: &Remote, healthy: &Healthy, folder: &Path, row: &Row) -> Result<(), String> {
    let (mut bench, config) = Bench::set_up(portolan, healthy, folder, row);
    let mut played = bench.create(row, config).await.map_err(|fault| format!("create: {fault}"));
    for (number, (what, expect)) in row.then.iter().enumerate() {
        if played.is_err() {
            break;
        }
        let shown: String = format!("{what:?}").chars().take(80).collect();
        played = bench.act(what, *expect).await.map_err(|fault| format!("step {}, {shown}: {fault}", number + 1));
    }
    let cleared = bench.clear().await;
    played.and(cleared)
}

/// All rows of the table, or those whose name has a part of `PORTOLAN_TEST_ROW`.
#[expect(clippy::print_stderr, reason = "a run with rows played again is to be told from one without")]
async fn play_all(portolan: &Remote, healthy: &Healthy, folder: &Path) {
    let rows = table();
    assert!(rows.len() >= 60 && !rows.len().is_multiple_of(STRIDE), "every row has its turn");
    let chosen = std::env::var("PORTOLAN_TEST_ROW").unwrap_or_default();
    // Families are taken apart: the floods, for one, would be all at once.
    let order = (0..rows.len()).map(|number| &rows[number * STRIDE % rows.len()]);
    let rows = order.filter(|row| row.name.contains(&chosen));
    let play = async |row| {
        let started = Instant::now();
        let played = AssertUnwindSafe(play(portolan, healthy, folder, row)).catch_unwind().await;
        let fault = match played {
            Ok(Ok(())) => None,
            Ok(Err(fault)) => Some(fault),
            Err(panic) => Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "it panicked".to_owned())),
        };
        (row, fault, started.elapsed())
    };
    let mut played: Vec<_> = stream::iter(rows).map(play).buffer_unordered(AT_ONCE).collect().await;
    let mut again = 0;
    for one in &mut played {
        if let Some(fault) = one.1.as_ref().filter(|fault| fault.contains(LATE) && again < REPLAYS) {
            eprintln!("played again: {} [{:?}]: {fault}", one.0.name, one.0.over);
            again += 1;
            *one = play(one.0).await;
        }
    }
    let mut faults = String::new();
    for (row, fault, took) in &played {
        if let Some(fault) = fault {
            faults += &format!("\n- {} [{:?}] ({took:.1?}): {fault}", row.name, row.over);
        }
    }
    let failed = faults.lines().count().saturating_sub(1);
    assert!(faults.is_empty(), "{failed} of {} rows:{faults}", played.len());
    for _ in 0..2 * healthy.runs.len() {
        healthy.check(portolan, "after all others").await.unwrap_or_else(|fault| panic!("{fault}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_server_does_the_answer_is_clean_and_nothing_stays() {
    let portolan = Portolan::start_with(|settings| limits(&mut settings.upstream)).await;
    let remote = portolan.remote();
    // What is started at its first use is there before.
    Healthy::new(&remote, portolan.folder()).await.leave(&remote).await;
    drop(remote);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = harness::tasks();
    let remote = portolan.remote();
    let healthy = Healthy::new(&remote, portolan.folder()).await;
    play_all(&remote, &healthy, portolan.folder()).await;
    healthy.leave(&remote).await;
    // With it go the test's own connections.
    drop(remote);
    let deadline = Instant::now() + harness::PATIENCE;
    while harness::tasks() > before {
        assert!(Instant::now() < deadline, "{before} tasks before, {} after", harness::tasks());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eventually("no zombie", || harness::zombies_of(std::process::id()).is_empty()).await;
    portolan.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: the table twice, for what a whole process keeps of it"]
async fn whatever_servers_do_the_process_is_as_small_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut start = process::command(folder.path(), database.url().as_deref());
    let seconds = |time: Duration| format!("{}s", time.as_secs());
    start.args(["--connect-timeout", &seconds(CONNECT), "--handshake-timeout", &seconds(HANDSHAKE)]);
    start.args(["--start-timeout", &seconds(START), "--list-timeout", &seconds(LIST), "--run-timeout", &seconds(RUN)]);
    start.args(["--max-message-bytes", &MAX_MESSAGE.to_string()]);
    let mut program = process::Program::start(start);
    let pid = program.child.id();
    let files = || std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count();
    let (mut memory, mut least) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let remote = Remote::new(&program.url);
        let healthy = Healthy::new(&remote, folder.path()).await;
        play_all(&remote, &healthy, folder.path()).await;
        healthy.leave(&remote).await;
        drop(remote);
        eventually("no zombie", || harness::zombies_of(pid).is_empty()).await;
        // Sockets and pipes close in their time.
        let mut open = files();
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            open = open.min(files());
        }
        least.push(open);
        memory.push(harness::memory(pid, "VmRSS"));
    }
    // The first round opens what the database needs.
    assert!(least[1] <= least[0], "open files after one round and after two: {least:?}");
    assert!(memory[1] < memory[0] + 16 * 1024 * 1024, "bytes after one round and after two: {memory:?}");
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    database.remove().await;
}

/// A real program, so that the memory is Portolan's alone: 200 MB over each transport, and `stderr` bytes beside.
async fn what_is_too_large_takes_no_room(stderr: usize) {
    const HUGE: usize = 200_000_000;
    let folder = tempfile::tempdir().unwrap();
    let database = Database::new().await;
    let mut start = process::command(folder.path(), database.url().as_deref());
    start.args(["--run-timeout", "60s"]);
    let mut program = process::Program::start(start);
    let pid = program.child.id();
    let portolan = Remote::new(&program.url);
    let script = |name: &str, script: &Value| {
        let script_file = harness::Script(harness::scripts(folder.path()).join(format!("{name}.json")));
        script_file.set(script);
        script_file
    };
    let result = |start: &str, end: &str| {
        let head = r#"{"jsonrpc":"2.0","id":{id},"result":{"content":[{"type":"text","text":""#;
        let steps =
            json!([{"stderr": stderr}, {"raw": start}, {"raw": head}, {"fill": HUGE}, {"raw": "\"}]}}"}, {"raw": end}]);
        json!({"times": 1, "steps": steps})
    };
    let stdio = script("stdio", &json!({"acts": {"call": result("", "\n")}}));
    let http = script("http", &json!({"reply": "json", "acts": {"call": result("", "")}}));
    let events = script("events", &json!({"acts": {"call": result("data: ", "\n\n")}}));
    let sse = script("sse", &json!({"acts": {"call": result("data: ", "\n\n")}}));
    let mut servers = vec![("stdio", json!({"command": fake_mcp(), "args": ["stdio", stdio.0]}))];
    let fakes = [("http", "streamable_http", &http), ("http", "streamable_http", &events), ("sse", "sse", &sse)]
        .map(|(kind, registered, script)| (registered, FakeProgram::start(kind, script, None)));
    for (kind, fake) in &fakes {
        servers.push((kind, json!({"mcp_server_type": kind, "server_url": fake.url})));
    }
    let mut ids = Vec::new();
    for (number, (kind, config)) in servers.into_iter().enumerate() {
        let server = portolan.create(&format!("{kind} {number}"), config).await;
        assert_eq!(server["status"]["state"], "ready", "{server}");
        ids.push((kind, server["id"].as_str().unwrap().to_owned()));
    }
    let before = harness::memory(pid, "VmRSS");
    for (kind, id) in &ids {
        let run = portolan.run(id, "echo", json!({"message": "hello"})).await;
        let text = run["func_return"].as_str().unwrap();
        assert!(run["status"] == "error" && text.contains("larger"), "{kind}: {run}");
        clean(text, &folder.path().to_string_lossy()).unwrap_or_else(|fault| panic!("{kind}: {fault}"));
        let run = portolan.run(id, "echo", json!({"message": "after"})).await;
        assert_eq!(run["func_return"], "after", "{kind}");
    }
    assert_eq!(stdio.count("initialize"), 1, "the session survives the line");
    let peak = harness::memory(pid, "VmHWM");
    assert!(peak < before + 96 * 1024 * 1024, "{before} bytes before, {peak} at most");
    // The allowed twin.
    for (kind, id) in &ids {
        let run = portolan.run(id, "wide", json!({"bytes": 15_000_000})).await;
        assert_eq!(run["func_return"].as_str().map(str::len), Some(15_000_000), "{kind}");
    }
    program.signal("-TERM");
    assert_eq!(program.exit_code(), Some(0));
    assert_eq!(processes_naming(&stdio.0.to_string_lossy()), Vec::<u32>::new(), "a child was left");
    drop(fakes);
    database.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_bodies_and_events_of_200_mb_take_no_room() {
    what_is_too_large_takes_no_room(64 << 20).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: 1 GB of standard error"]
async fn lines_bodies_and_events_of_200_mb_take_no_room_beside_1_gb_of_standard_error() {
    what_is_too_large_takes_no_room(1 << 30).await;
}
