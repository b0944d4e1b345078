//! What an import does: servers of a file are added, changed or removed, all of them or none; and what an export shows.
//!
//! A server that another Portolan or another request changes meanwhile is looked at again. What an export left out is taken
//! for what is stored: a placeholder that an export of now would write in this place means no change.

use std::collections::BTreeSet;

use chrono::TimeDelta;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::error::{Error, Issue};
use crate::interchange::{
    Document, Entry, Format, Passed, Variable, Written, canonical, headers, leave_out, plain_json, read, write,
};
use crate::mcp::{self, is_templated};
use crate::model::{By, Connector, Remote, Server, Stdio};
use crate::store::{self, NewServer, Step, Store, now};

use super::guard::{file_object, shown};
use super::wire::{CreateServer, same_origin};

/// How often a plan is made anew because a server was changed meanwhile.
const ATTEMPTS: usize = 5;

/// What is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Import {
    /// `None`: found by the file's shape.
    pub format: Option<Format>,
    /// Remove the servers that are not in the file, too.
    pub replace: bool,
    /// Only say what would happen.
    pub dry_run: bool,
}

/// What came of it, or would; servers by their names.
#[derive(Debug, Serialize)]
pub struct Report {
    pub dry_run: bool,
    pub added: Vec<String>,
    pub changed: Vec<String>,
    pub unchanged: Vec<String>,
    pub removed: Vec<String>,
    pub ignored: Vec<Passed>,
    pub variables: Vec<Variable>,
}

/// What was done, for whoever has sessions to these servers.
pub struct Imported {
    pub report: Report,
    pub added: Vec<String>,
    /// With the revision that each has now.
    pub changed: Vec<(String, i64)>,
    pub removed: Vec<String>,
}

impl Import {
    /// Does what the file says to the stored servers, in one transaction; `by` asks for it. `check` says whether such a
    /// server may be had; `progress` hears how many steps of how many are done.
    ///
    /// # Errors
    /// [`Error::Invalid`] with all that is wrong and where in the file, [`Error::BodyTooLarge`]; what the store says. Then
    /// nothing was done.
    pub async fn run(
        self,
        store: &Store,
        file: Vec<u8>,
        by: &By,
        check: impl Fn(&Connector) -> Result<(), mcp::Error>,
        mut progress: impl FnMut(usize, usize) + Send,
    ) -> Result<Imported, Error> {
        // A file can be large and hostile: no other request waits while it is read.
        let reading = spawn_blocking(move || self.read(&file));
        let Document { entries, disabled, passed, variables } =
            reading.await.map_err(|broken| Error::Internal(broken.into()))??;
        let mut attempt = 1;
        loop {
            let servers = store.servers().await?;
            let plan = Plan::new(&entries, &servers, &check)?.removing(self.replace, &disabled);
            let all = plan.steps.len();
            let done = match self.dry_run || all == 0 {
                true => Ok(()),
                false => {
                    progress(0, all);
                    store.change_servers(&plan.steps, by, |done| progress(done, all)).await
                }
            };
            match done {
                Ok(()) => {
                    let Plan { mut report, added, changed, removed, .. } = plan;
                    report.dry_run = self.dry_run;
                    (report.ignored, report.variables) = (passed, variables);
                    return Ok(Imported { report, added, changed, removed });
                }
                Err(store::Error::Overtaken | store::Error::NameTaken) if attempt < ATTEMPTS => attempt += 1,
                Err(store::Error::NameTaken) => return Err(store::Error::Overtaken.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What a file says.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::BodyTooLarge`].
    pub(super) fn read(self, file: &[u8]) -> Result<Document, Error> {
        let text = plain_json(file).map_err(|msg| Error::invalid(vec![json!("body")], msg))?;
        let object = file_object(&text).map_err(|error| match error {
            Error::Invalid(issues) => {
                Error::Invalid(issues.into_iter().map(|found| issue(&found.loc[1..], &found.msg)).collect())
            }
            other => other,
        })?;
        read(object, self.format)
            .map_err(|faults| Error::Invalid(faults.into_iter().map(|fault| issue(&fault.place, &fault.msg)).collect()))
    }
}

/// What is wrong in a file, with its place in words.
fn issue(place: &[Value], msg: &str) -> Issue {
    let mut words = String::new();
    let mut loc = vec![json!("body")];
    for step in place {
        match step.as_str().map(shown) {
            Some(key) => {
                let is_word = key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
                let dot = if words.is_empty() { "" } else { "." };
                words += &if is_word && !key.is_empty() { format!("{dot}{key}") } else { format!("[\"{key}\"]") };
                loc.push(key.into());
            }
            None => {
                words += &format!("[{step}]");
                loc.push(step.clone());
            }
        }
    }
    Issue { loc, msg: if words.is_empty() { msg.to_owned() } else { format!("{words}: {msg}") } }
}

/// What is to be done to the servers as they were read.
struct Plan {
    report: Report,
    steps: Vec<Step>,
    added: Vec<String>,
    changed: Vec<(String, i64)>,
    removed: Vec<String>,
    /// Servers that are not in the file.
    others: Vec<(String, String, i64)>,
}

impl Plan {
    fn new(
        entries: &[Entry],
        servers: &[Server],
        check: impl Fn(&Connector) -> Result<(), mcp::Error>,
    ) -> Result<Self, Error> {
        let (opened, bare, _) = without_secrets(servers);
        let shown = |server: &Server| {
            let place = opened.iter().position(|(name, _)| *name == server.server_name)?;
            Some((opened[place].1, &bare[place]))
        };
        let report = Report {
            dry_run: false,
            added: vec![],
            changed: vec![],
            unchanged: vec![],
            removed: vec![],
            ignored: vec![],
            variables: vec![],
        };
        let (steps, added, changed, removed) = (vec![], vec![], vec![], vec![]);
        let others = servers.iter().map(|server| (server.server_name.clone(), server.id.clone(), server.revision));
        let mut plan = Self { report, steps, added, changed, removed, others: others.collect() };
        let mut issues = Vec::new();
        let now = now();
        for (number, entry) in (0..).zip(entries) {
            let stored = servers.iter().find(|server| server.server_name == entry.server_name.trim());
            let mut body = entry.body();
            if let Some((stored, bare)) = stored.and_then(shown)
                && let Some(config) = body.get_mut("config").and_then(Value::as_object_mut)
            {
                restore(config, stored, bare);
            }
            let asked = match checked(entry, body, &check, stored) {
                Ok(asked) => asked,
                Err(found) => {
                    issues.extend(found);
                    continue;
                }
            };
            let CreateServer { server_name, connector } = asked;
            plan.others.retain(|(name, ..)| *name != server_name);
            match stored {
                None => {
                    let id = format!("mcp_server-{}", Uuid::new_v4());
                    plan.added.push(id.clone());
                    plan.report.added.push(server_name.clone());
                    // They are listed in the order of the file.
                    let created_at = Some(now + TimeDelta::microseconds(number));
                    let new = NewServer { id, server_name, connector, created_at, tools: vec![], sign_in: None };
                    plan.steps.push(Step::Add(Box::new(new)));
                }
                Some(server) => match &server.config.0 {
                    Ok(stored) if same(stored, &connector) => plan.report.unchanged.push(server_name),
                    stored => {
                        let connector = with_client_of(connector, stored.as_ref().ok());
                        let (id, revision) = (server.id.clone(), server.revision);
                        plan.changed.push((id.clone(), revision + 1));
                        plan.report.changed.push(server_name);
                        plan.steps.push(Step::Configure { id, revision, connector });
                    }
                },
            }
        }
        if issues.is_empty() { Ok(plan) } else { Err(Error::Invalid(issues)) }
    }

    /// With `replace`, also removes what is not in the file; what is switched off there is in it.
    fn removing(mut self, replace: bool, disabled: &[String]) -> Self {
        let others = std::mem::take(&mut self.others).into_iter();
        for (name, id, revision) in others.filter(|(name, ..)| replace && !disabled.contains(name)) {
            self.report.removed.push(name);
            self.removed.push(id.clone());
            self.steps.push(Step::Remove { id, revision });
        }
        self
    }
}

/// The server of an entry, if it passes all that a create has to pass.
fn checked(
    entry: &Entry,
    body: Map<String, Value>,
    check: impl Fn(&Connector) -> Result<(), mcp::Error>,
    stored: Option<&Server>,
) -> Result<CreateServer, Vec<Issue>> {
    let at = |key: &str| entry.place(&[json!("body"), json!("config"), json!(key)]);
    if body["config"]["server_url"].as_str().is_some_and(is_templated) {
        return Err(vec![issue(&at("server_url"), "A placeholder cannot stand in a URL here; write the URL itself.")]);
    }
    let asked = CreateServer::read(body).map_err(|error| match error {
        Error::Invalid(issues) => {
            issues.iter().map(|found| issue(&entry.place(&found.loc), &found.msg)).collect::<Vec<_>>()
        }
        other => vec![issue(&entry.place(&[]), &other.to_string())],
    })?;
    check(&asked.connector).map_err(|error| vec![issue(&at("command"), &error.to_string())])?;
    // It may be whole, once its key is back.
    match stored.and_then(|server| server.config.0.as_ref().err()) {
        Some(unreadable) if unreadable.is_sealed() => Err(vec![issue(&entry.place(&[]), &unreadable.to_string())]),
        _ => Ok(asked),
    }
}

/// The servers that can be opened, by name, each as an export without secrets shows it, and the variables that stand for
/// these.
fn without_secrets(servers: &[Server]) -> (Vec<(&str, &Connector)>, Vec<Connector>, BTreeSet<String>) {
    let opened = servers.iter().filter_map(|server| Some((&*server.server_name, server.config.0.as_ref().ok()?)));
    let opened: Vec<_> = opened.collect();
    let (bare, made) = leave_out(&opened);
    (opened, bare, made)
}

/// Puts what is stored in place of what stands for it in an export, in the same place, and with a URL only on the same
/// origin: a secret goes nowhere else than it did.
fn restore(config: &mut Map<String, Value>, stored: &Connector, bare: &Connector) {
    match (stored, bare) {
        (Connector::Stdio(stored), Connector::Stdio(bare)) => restore_stdio(config, stored, bare),
        (Connector::Sse(stored), Connector::Sse(bare))
        | (Connector::StreamableHttp(stored), Connector::StreamableHttp(bare)) => restore_remote(config, stored, bare),
        _ => {}
    }
}

/// Whether a text of a file is that of an export, and stands for something else that is stored.
fn stands_for(text: &str, bare: &str, stored: &str) -> bool {
    bare != stored && canonical(text) == canonical(bare)
}

fn restore_stdio(config: &mut Map<String, Value>, stored: &Stdio, bare: &Stdio) {
    let (stored_env, bare_env) = (stored.env.iter().flatten(), bare.env.iter().flatten());
    for ((name, stored), (_, bare)) in stored_env.zip(bare_env) {
        if let Some(Value::String(text)) = config.get_mut("env").and_then(|env| env.get_mut(name))
            && stands_for(text, bare.expose(), stored.expose())
        {
            *text = stored.expose().to_owned();
        }
    }
    for arg in config.get_mut("args").and_then(Value::as_array_mut).into_iter().flatten() {
        // Each name is in one argument alone, wherever that has moved.
        if let Value::String(text) = arg
            && let Some((stored, _)) =
                stored.args.iter().zip(&bare.args).find(|(stored, bare)| stands_for(text, bare, stored))
        {
            stored.clone_into(text);
        }
    }
}

fn restore_remote(config: &mut Map<String, Value>, stored: &Remote, bare: &Remote) {
    let Some(Value::String(url)) = config.get_mut("server_url") else { return };
    if !same_origin(url, &stored.server_url) {
        return;
    }
    if stands_for(url, &bare.server_url, &stored.server_url) {
        stored.server_url.clone_into(url);
    }
    let token_name = config.get("auth_header").and_then(Value::as_str).unwrap_or("Authorization").to_owned();
    for ((name, stored), (_, bare)) in headers(stored).iter().zip(&headers(bare)) {
        if let Some(Value::String(token)) = config.get_mut("auth_token")
            && token_name.eq_ignore_ascii_case(name)
            && stands_for(token, bare, stored)
        {
            stored.clone_into(token);
        }
        for (given, value) in config.get_mut("custom_headers").and_then(Value::as_object_mut).into_iter().flatten() {
            if let Value::String(value) = value
                && given.eq_ignore_ascii_case(name)
                && stands_for(value, bare, stored)
            {
                stored.clone_into(value);
            }
        }
    }
}

/// Whether two configurations mean the same, however their headers are given and their templates spelt.
pub(super) fn same(one: &Connector, other: &Connector) -> bool {
    match (one, other) {
        (Connector::Stdio(one), Connector::Stdio(other)) => {
            let args = |stdio: &Stdio| stdio.args.iter().map(|arg| canonical(arg)).collect::<Vec<_>>();
            let env = |stdio: &Stdio| {
                let env = stdio.env.iter().flatten();
                env.map(|(name, value)| (name.clone(), canonical(value.expose()))).collect::<Vec<_>>()
            };
            one.command == other.command && args(one) == args(other) && env(one) == env(other)
        }
        (Connector::Sse(one), Connector::Sse(other))
        | (Connector::StreamableHttp(one), Connector::StreamableHttp(other)) => {
            let sent = |remote: &Remote| {
                let sent = headers(remote).into_iter();
                let mut sent: Vec<_> =
                    sent.map(|(name, value)| (name.to_ascii_lowercase(), canonical(&value))).collect();
                sent.sort();
                sent
            };
            one.server_url == other.server_url && sent(one) == sent(other)
        }
        _ => false,
    }
}

/// A configuration with the client that the server is signed in at as, which files do not have, if it is at the same place.
fn with_client_of(mut connector: Connector, stored: Option<&Connector>) -> Connector {
    if let (
        Connector::Sse(remote) | Connector::StreamableHttp(remote),
        Some(Connector::Sse(old) | Connector::StreamableHttp(old)),
    ) = (&mut connector, stored)
        && same_origin(&remote.server_url, &old.server_url)
    {
        remote.oauth = remote.oauth.take().or_else(|| old.oauth.clone());
    }
    connector
}

/// The servers as a file of this format, without their secrets unless they are asked for.
pub fn export(servers: &[Server], format: Format, with_secrets: bool) -> Written {
    let (opened, bare, made) = without_secrets(servers);
    let mut written = if with_secrets {
        write(format, &opened, &BTreeSet::new())
    } else {
        let bare: Vec<_> = opened.iter().zip(&bare).map(|((name, _), bare)| (*name, bare)).collect();
        write(format, &bare, &made)
    };
    for server in servers {
        if let Err(unreadable) = &server.config.0 {
            let (server, reason) = (Some(server.server_name.clone()), unreadable.to_string());
            written.left_out.push(Passed { server, key: None, reason });
        }
    }
    written
}
