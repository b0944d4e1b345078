//! One JSON-RPC message in, its answer out, whatever the transport.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    future::{pending, ready},
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use axum::http::HeaderMap;
use futures_util::{
    Stream, StreamExt,
    stream::{self, abortable},
};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use tokio::{sync::mpsc, time::sleep};

use super::{
    Fake,
    act::Scene,
    locked, say,
    script::{MODERN, Script, Stage},
};

/// Notifications, then the answer.
pub(crate) type Messages = Pin<Box<dyn Stream<Item = String> + Send>>;

pub(crate) enum Reply {
    Nothing,
    Now(String),
    /// A JSON-RPC error, with its code.
    Refused(i64, String),
    Later(Messages),
    /// An answer, and then death.
    Last(String),
    /// Death.
    Gone,
    /// What the script has for this instead.
    Act(Scene),
}

impl Reply {
    fn messages(self) -> Messages {
        match self {
            Self::Now(text) | Self::Refused(_, text) | Self::Last(text) => Box::pin(stream::iter([text])),
            Self::Later(messages) => messages,
            Self::Nothing | Self::Gone | Self::Act(_) => Box::pin(stream::empty()),
        }
    }
}

/// A message as received; borrowed from the bytes it came in.
#[derive(Deserialize)]
pub(crate) struct Message<'a> {
    #[serde(borrow, default)]
    pub(crate) id: Option<&'a RawValue>,
    /// Empty in a response.
    #[serde(borrow, default)]
    pub(crate) method: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(crate) params: Params<'a>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct Params<'a> {
    #[serde(borrow)]
    pub(crate) name: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) arguments: Option<&'a RawValue>,
    #[serde(borrow, rename = "_meta")]
    meta: Option<&'a RawValue>,
    cursor: Option<String>,
    #[serde(borrow, rename = "protocolVersion")]
    protocol_version: Cow<'a, str>,
    #[serde(borrow, rename = "requestId")]
    request_id: Option<&'a RawValue>,
    notifications: Notifications,
}

/// What a client wants to be told of (MCP 2026-07-28, subscriptions).
#[derive(Deserialize, Default)]
#[serde(default)]
struct Notifications {
    #[serde(rename = "toolsListChanged")]
    tools_list_changed: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct Meta<'a> {
    #[serde(borrow, rename = "io.modelcontextprotocol/protocolVersion")]
    pub(crate) revision: Cow<'a, str>,
    #[serde(borrow, rename = "progressToken")]
    progress_token: Option<&'a RawValue>,
}

impl<'a> Message<'a> {
    /// The message, or the error to answer.
    pub(crate) fn parse(text: &'a [u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Id {
            id: Value,
        }
        if text.trim_ascii_start().first() != Some(&b'{') {
            return Err(error("null", -32700, "Parse error"));
        }
        serde_json::from_slice(text).map_err(|reason| match serde_json::from_slice::<Id>(text) {
            Ok(Id { id }) => error(&id.to_string(), -32602, &format!("Invalid params: {reason}")),
            Err(_) => error("null", -32700, "Parse error"),
        })
    }

    /// The request's id; None in notifications and responses.
    pub(crate) fn request(&self) -> Option<&'a str> {
        self.id.filter(|_| !self.method.is_empty()).map(RawValue::get)
    }

    pub(crate) fn meta(&self) -> Meta<'a> {
        self.params.meta.and_then(|meta| serde_json::from_str(meta.get()).ok()).unwrap_or_default()
    }
}

/// Who sent a message.
pub(crate) struct Origin<'a> {
    pub(crate) session: &'a str,
    pub(crate) headers: Option<&'a HeaderMap>,
}

pub(crate) fn error(id: &str, code: i64, message: &str) -> String {
    error_object(id, &json!({"code": code, "message": message}))
}

fn error_object(id: &str, error: &Value) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{id},"error":{error}}}"#)
}

pub(crate) fn unsupported(id: &str, script: &Script, requested: &str) -> String {
    let data = json!({"supported": script.revisions, "requested": requested});
    error_object(id, &json!({"code": -32022, "message": "Unsupported protocol version", "data": data}))
}

struct Answer<'a> {
    id: &'a str,
    modern: bool,
}

impl Answer<'_> {
    /// A result of these fields, written as they are.
    fn fields(&self, fields: &[&str]) -> String {
        let mut text = String::with_capacity(96 + self.id.len() + fields.iter().map(|part| part.len()).sum::<usize>());
        for part in [r#"{"jsonrpc":"2.0","id":"#, self.id, r#","result":{"#].iter().chain(fields) {
            text.push_str(part);
        }
        text.push_str(match (self.modern, fields.is_empty()) {
            (false, _) => "}}",
            (true, false) => r#","resultType":"complete"}}"#,
            (true, true) => r#""resultType":"complete"}}"#,
        });
        text
    }

    /// A text already in its JSON quotes.
    fn quoted(&self, text: &str) -> String {
        self.fields(&[r#""content":[{"type":"text","text":"#, text, "}]"])
    }

    fn text(&self, text: &str) -> String {
        self.quoted(&Value::from(text).to_string())
    }

    fn refuse(&self, code: i64, message: &str) -> Reply {
        Reply::Refused(code, error(self.id, code, message))
    }
}

fn stage(script: &Script, message: &Message<'_>) -> Option<Stage> {
    match &*message.method {
        "initialize" => Some(Stage::Initialize),
        "server/discover" if script.speaks(MODERN) => Some(Stage::Initialize),
        "notifications/initialized" => Some(Stage::Initialized),
        "tools/list" => Some(Stage::List),
        "tools/call" => Some(Stage::Call),
        "" => Some(Stage::Reply),
        _ => None,
    }
}

/// A notice for one subscription; `rest` is JSON that follows its `_meta`.
fn notice(id: &str, method: &str, rest: &str) -> String {
    let meta = format!(r#""_meta":{{"io.modelcontextprotocol/subscriptionId":{id}}}"#);
    format!(r#"{{"jsonrpc":"2.0","method":"{method}","params":{{{meta}{rest}}}}}"#)
}

const LISTEN: &str = "subscriptions/listen";
const LIST_CHANGED: &str = "notifications/tools/list_changed";
const SERVER: &str = r#"{"name":"fake-mcp","version":"1.0.0"}"#;

impl Fake {
    pub(crate) fn handle(self: &Arc<Self>, message: &Message<'_>, from: &Origin<'_>) -> Reply {
        if message.method == "tools/list" {
            self.read_again();
        }
        let stage = stage(&self.script(), message);
        match stage.and_then(|stage| self.act(stage)) {
            Some(act) => {
                let usual = act.has_answer().then(|| self.behave(message, from).messages());
                Reply::Act(Scene::new(self, act, message.request(), usual))
            }
            None => self.behave(message, from),
        }
    }

    fn behave(self: &Arc<Self>, message: &Message<'_>, from: &Origin<'_>) -> Reply {
        let Some(id) = message.request() else {
            if message.method == "notifications/cancelled" {
                let id = message.params.request_id.map_or("", RawValue::get);
                // Taken out first: aborting wakes nobody under the lock.
                let call = locked(&self.pending).remove(&(from.session.into(), id.into()));
                if let Some(call) = call {
                    call.abort();
                }
            }
            return Reply::Nothing;
        };
        let script = self.script();
        let meta = message.meta();
        let speaks_modern = script.speaks(MODERN);
        let answer = Answer { id, modern: speaks_modern && meta.revision == MODERN };

        let stage = stage(&script, message);
        if stage.is_some() && stage == script.exit_at {
            return Reply::Gone;
        }
        if stage.is_some() && stage == script.silent_at {
            return self.later(from, id, stream::pending());
        }
        if speaks_modern && !meta.revision.is_empty() && !script.speaks(&meta.revision) {
            return Reply::Refused(-32022, unsupported(id, &script, &meta.revision));
        }
        if script.modern_only() && !answer.modern && message.method != "initialize" {
            return answer.refuse(-32602, "Invalid params: request requires protocolVersion in request _meta");
        }
        match &*message.method {
            "initialize" if !script.modern_only() => {
                let asked = &*message.params.protocol_version;
                let own = script.revisions.iter().map(String::as_str).filter(|own| *own != MODERN);
                let newest = own.clone().max().unwrap_or_default();
                let revision = if script.echo_revision || own.clone().any(|own| own == asked) { asked } else { newest };
                let revision = Value::from(revision).to_string();
                let tools = if script.list_changed { r#"{"listChanged":true}"# } else { "{}" };
                let capabilities = format!(r#","capabilities":{{"tools":{tools}}},"serverInfo":"#);
                Reply::Now(answer.fields(&[r#""protocolVersion":"#, &revision, &capabilities, SERVER]))
            }
            "server/discover" if answer.modern => {
                let versions = json!(script.revisions).to_string();
                let tools = if script.list_changed { r#"{"listChanged":true}"# } else { "{}" };
                let rest = format!(r#","capabilities":{{"tools":{tools}}},"ttlMs":0,"cacheScope":"private","#);
                let meta = format!(r#""_meta":{{"io.modelcontextprotocol/serverInfo":{SERVER}}}"#);
                Reply::Now(answer.fields(&[r#""supportedVersions":"#, &versions, &rest, &meta]))
            }
            "ping" if !answer.modern => Reply::Now(answer.fields(&[])),
            "tools/list" => {
                let reply = list(&script, &answer, message.params.cursor.as_deref());
                match reply {
                    Reply::Now(text) if script.list_delay_ms > 0 => self.after(from, id, script.list_delay_ms, text),
                    reply => reply,
                }
            }
            LISTEN if answer.modern && script.list_changed => self.listen(from, id, &message.params.notifications),
            "tools/call" => self.call(message, &meta, from, &answer),
            _ if script.ignore_unknown => self.later(from, id, stream::pending()),
            method => answer.refuse(-32601, &format!("Method not found: {method}")),
        }
    }

    /// An answer that takes its time; a `notifications/cancelled` or a closed connection ends it.
    fn later(
        self: &Arc<Self>,
        from: &Origin<'_>,
        id: &str,
        messages: impl Stream<Item = String> + Send + 'static,
    ) -> Reply {
        struct Pending(Arc<Fake>, (String, String));
        impl Drop for Pending {
            fn drop(&mut self) {
                locked(&self.0.pending).remove(&self.1);
            }
        }
        let (messages, abort) = abortable(messages);
        let key = (from.session.to_owned(), id.to_owned());
        locked(&self.pending).insert(key.clone(), abort);
        let entry = Pending(self.clone(), key);
        Reply::Later(Box::pin(messages.inspect(move |_| {
            let _held_as_long_as_the_stream = &entry;
        })))
    }

    /// Acknowledges a subscription, and tells of each change until the client ends it.
    fn listen(self: &Arc<Self>, from: &Origin<'_>, id: &str, wanted: &Notifications) -> Reply {
        let mut accepted = json!({});
        let (changes, mut told) = mpsc::unbounded_channel();
        if wanted.tools_list_changed {
            accepted["toolsListChanged"] = true.into();
            locked(&self.listeners).push(changes);
        }
        let rest = format!(r#","notifications":{accepted}"#);
        let acknowledged = notice(id, "notifications/subscriptions/acknowledged", &rest);
        let id = id.to_owned();
        let changes = stream::poll_fn(move |context| told.poll_recv(context));
        let changes = changes.map({
            let id = id.clone();
            move |()| notice(&id, LIST_CHANGED, "")
        });
        self.later(from, &id, stream::once(ready(acknowledged)).chain(changes).chain(stream::pending()))
    }

    fn after(self: &Arc<Self>, from: &Origin<'_>, id: &str, ms: u64, text: String) -> Reply {
        self.later(
            from,
            id,
            stream::once(async move {
                sleep(Duration::from_millis(ms)).await;
                text
            }),
        )
    }

    fn jumbled(self: &Arc<Self>, from: &Origin<'_>, id: &str, ms: u64, text: String) -> Reply {
        let old = {
            let mut old = locked(&self.old);
            old.push_back(text.clone());
            // One that was answered long ago, if there are any yet.
            if old.len() > 100 { old.pop_front() } else { None }
        };
        // As good as random, and the same in every run.
        let wait = id.bytes().fold(7, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(byte.into())) % ms;
        let messages = stream::once(async move { sleep(Duration::from_millis(wait)).await });
        let messages =
            messages.flat_map(move |()| stream::iter(old.clone().into_iter().chain([text.clone(), text.clone()])));
        self.later(from, id, messages)
    }

    fn call(self: &Arc<Self>, message: &Message<'_>, meta: &Meta<'_>, from: &Origin<'_>, answer: &Answer<'_>) -> Reply {
        #[derive(Deserialize)]
        struct Echo<'a> {
            #[serde(borrow)]
            message: &'a RawValue,
        }
        let raw = message.params.arguments.map_or("null", RawValue::get);
        // The benchmarks live here: the text goes back in the quotes and escapes it came in.
        if message.params.name == "echo" {
            return match serde_json::from_str::<Echo<'_>>(raw) {
                Ok(echo) if echo.message.get().starts_with('"') => {
                    let text = answer.quoted(echo.message.get());
                    match self.script().jumble_ms {
                        0 => Reply::Now(text),
                        ms => self.jumbled(from, answer.id, ms, text),
                    }
                }
                _ => answer.refuse(-32602, "Invalid params: echo takes a string named message"),
            };
        }
        let arguments: Value = serde_json::from_str(raw).unwrap_or_default();
        let number = |name: &str, default: u64| arguments[name].as_u64().unwrap_or(default);
        let string = |name: &str| arguments[name].as_str().unwrap_or_default();
        let fields = |fields: &str| Reply::Now(answer.fields(&[fields]));
        let text = |text: &str| Reply::Now(answer.text(text));
        match &*message.params.name {
            "add" => {
                let b = arguments.get("b").map_or(Some(2), Value::as_i64);
                match arguments["a"].as_i64().zip(b).and_then(|(a, b)| a.checked_add(b)) {
                    Some(sum) => text(&sum.to_string()),
                    None => answer.refuse(-32602, "Invalid params: add takes integers a and b"),
                }
            }
            "two_texts" => fields(
                r#""content":[{"type":"text","text":"one"},{"type":"text","text":"two\nlines"},{"type":"text","text":""}]"#,
            ),
            "image" => fields(
                r#""content":[{"type":"text","text":"pic:"},{"type":"image","data":"aGVsbG8=","mimeType":"image/png"}]"#,
            ),
            "resource" => fields(
                r#""content":[{"type":"resource","resource":{"uri":"file:///a.txt","mimeType":"text/plain","text":"body"}}]"#,
            ),
            "link" => fields(
                r#""content":[{"type":"resource_link","uri":"file:///a.txt","name":"a.txt","mimeType":"text/plain"}]"#,
            ),
            "structured" => fields(
                r#""content":[],"structuredContent":{"n":1,"big":123456789012345678901234567890},"x-extra":true"#,
            ),
            "text_and_structured" => {
                fields(r#""content":[{"type":"text","text":"n is 1"}],"structuredContent":{"n":1}"#)
            }
            "empty" => fields(r#""content":[]"#),
            "fail" => fields(
                r#""content":[{"type":"text","text":"it failed"},{"type":"text","text":"badly"}],"isError":true"#,
            ),
            "rpc_error" => answer.refuse(-32603, "inner trouble"),
            "weird" => fields(r#""content":[{"type":"hologram","v":1}]"#),
            "args" => text(raw),
            "argv" => text(&json!(std::env::args().collect::<Vec<_>>()).to_string()),
            "env" => text(&json!(std::env::vars().collect::<BTreeMap<_, _>>()).to_string()),
            "pid" => text(&std::process::id().to_string()),
            "headers" => {
                let mut all = BTreeMap::<&str, String>::new();
                for (name, value) in from.headers.into_iter().flatten() {
                    let value = String::from_utf8_lossy(value.as_bytes());
                    all.entry(name.as_str()).and_modify(|all| *all += &format!(", {value}")).or_insert(value.into());
                }
                text(&json!(all).to_string())
            }
            "meta" => text(message.params.meta.map_or("null", RawValue::get)),
            "tenant" => text(string("tenant")),
            "slow" => self.after(from, answer.id, number("ms", 0), answer.text("done")),
            "progress" => {
                let (steps, ms) = (number("steps", 3), number("ms", 0));
                let token = meta.progress_token.map(|token| token.get().to_owned());
                let steps = stream::iter(1..=steps).then(move |step| {
                    let note = token.as_ref().map(|token| {
                        let params = format!(
                            r#""progressToken":{token},"progress":{step},"total":{steps},"message":"step {step}""#
                        );
                        format!(r#"{{"jsonrpc":"2.0","method":"notifications/progress","params":{{{params}}}}}"#)
                    });
                    async move {
                        sleep(Duration::from_millis(ms)).await;
                        note
                    }
                });
                let done = answer.text("done");
                self.later(from, answer.id, steps.filter_map(ready).chain(stream::once(ready(done))))
            }
            // Says that the list has changed, and answers.
            "changed" if answer.modern => {
                self.tell_of_a_change();
                text("done")
            }
            "changed" => {
                let note = format!(r#"{{"jsonrpc":"2.0","method":"{LIST_CHANGED}"}}"#);
                self.later(from, answer.id, stream::iter([note, answer.text("done")]))
            }
            "die" => Reply::Gone,
            "die_after" => Reply::Last(answer.text("dying")),
            "count" => text(&(self.count.fetch_add(1, Relaxed) + 1).to_string()),
            "wide" => text(&"x".repeat(usize::try_from(number("bytes", 0)).unwrap_or(0))),
            "spawn_child" => match std::process::Command::new("sleep").arg("300").spawn() {
                Ok(child) => {
                    let pid = child.id();
                    locked(&self.children).push(child);
                    text(&pid.to_string())
                }
                Err(reason) => answer.refuse(-32603, &reason.to_string()),
            },
            // What a shell says to a script, both outputs and the exit code.
            "sh" => match std::process::Command::new("/bin/sh").args(["-c", string("script")]).output() {
                Ok(said) => {
                    let code = said.status.code().unwrap_or(-1);
                    let [out, err] = [said.stdout, said.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
                    text(&json!({ "code": code, "out": out, "err": err }).to_string())
                }
                Err(reason) => answer.refuse(-32603, &reason.to_string()),
            },
            "never" => self.later(from, answer.id, stream::once(pending())),
            // The given text in place of an answer, whatever it is.
            "raw" => Reply::Now(string("text").to_owned()),
            // stdio: answers, and reads nothing more.
            "deaf" => {
                self.deaf.store(true, Relaxed);
                text("done")
            }
            // So many bytes to stderr, in lines; waits until they are taken.
            "stderr" => {
                for _ in 0..number("bytes", 0).div_ceil(64) {
                    say(&mut std::io::stderr(), &format!("{}\n", "e".repeat(63)));
                }
                text("done")
            }
            name => answer.refuse(-32602, &format!("Unknown tool: {name}")),
        }
    }
}

fn list(script: &Script, answer: &Answer<'_>, cursor: Option<&str>) -> Reply {
    if let Some(error) = &script.list_error {
        return Reply::Refused(error["code"].as_i64().unwrap_or_default(), error_object(answer.id, error));
    }
    let start = match cursor {
        None => 0,
        Some("again") if script.repeat_cursor => 0,
        Some(cursor) => match cursor.parse() {
            Ok(start) if script.endless || start < script.tools.len() => start,
            _ => return answer.refuse(-32602, "Invalid params: unknown cursor"),
        },
    };
    let (tools, next) = if script.endless {
        let end = start + script.page_size.max(1);
        let tools: Vec<_> = (start..end).map(|n| super::script::tool(&format!("endless_{n}"), &json!({}))).collect();
        (json!(tools), Some(end.to_string()))
    } else {
        let size = if script.page_size == 0 { usize::MAX } else { script.page_size };
        let end = start.saturating_add(size).min(script.tools.len());
        let next = (end < script.tools.len()).then(|| end.to_string());
        (json!(script.tools[start..end]), if script.repeat_cursor { Some("again".into()) } else { next })
    };
    let tools = tools.to_string();
    let next = next.map_or_else(String::new, |next| format!(r#","nextCursor":"{next}""#));
    let cache = format!(r#","ttlMs":{},"cacheScope":"private""#, script.ttl_ms);
    Reply::Now(answer.fields(&[r#""tools":"#, &tools, &next, if answer.modern { &cache } else { "" }]))
}
