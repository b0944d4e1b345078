//! What becomes of each server of a Letta: it comes, it is here already, or it stays, and why. Nothing here reads or writes
//! anything; no value that is secret is in any text.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use uuid::{Uuid, Variant};

use crate::api::as_registered;
use crate::error::Error;
use crate::mcp::accept;
use crate::model::{Connector, Offered, Remote, Secret, SecretMap, Server, ServerType, SignIn, Stdio};
use crate::store::{LettaRows, LettaServer, LettaSignIn, LettaTool, NewServer};

use super::super::shown;
use super::unseal::{Closed, Opener};

/// What the person who migrates has chosen.
pub struct Choice<'a> {
    /// The one whose servers come, by its id; `None`: those of all.
    pub organization: Option<&'a str>,
    /// Servers whose secrets cannot be had come without them.
    pub without_secrets: bool,
}

/// What Portolan has already.
#[derive(Default)]
pub struct Here {
    pub servers: Vec<Server>,
    /// The ids of their tools.
    pub tools: BTreeSet<String>,
}

pub struct Plan {
    /// What becomes of each server, oldest first.
    pub lines: Vec<Line>,
    /// What is to be said of no server in particular, a sentence each.
    pub remarks: Vec<String>,
    /// What comes.
    pub servers: Vec<NewServer>,
    /// The names of servers whose tools are not all theirs in Letta any more.
    pub to_refresh: Vec<String>,
    /// How many servers have a secret that cannot be had.
    pub closed: usize,
}

/// What becomes of one server; its names as Letta has them.
#[derive(Serialize)]
pub struct Line {
    pub id: String,
    pub server_name: String,
    pub mcp_server_type: String,
    pub fate: Fate,
    /// What comes with it.
    pub with: Parts,
    /// Why it stays.
    pub reasons: Vec<String>,
    /// What is different, and what does not come with it.
    pub notes: Vec<String>,
}

/// How many of each come with a server.
#[derive(Default, Serialize)]
pub struct Parts {
    pub tools: usize,
    pub variables: usize,
    pub tokens: usize,
    pub headers: usize,
    pub sign_ins: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    Comes,
    /// It is in Portolan, and stays as it is there.
    Here,
    /// It stays in Letta.
    Stays,
}

impl Plan {
    /// `progress` hears of how many servers it is known, and of how many there are: to open a secret takes time.
    pub fn new(
        rows: &LettaRows,
        opener: &Opener,
        here: &Here,
        choice: &Choice<'_>,
        mut progress: impl FnMut(usize, usize) + Send,
    ) -> Self {
        let mut plan = Self { lines: vec![], remarks: vec![], servers: vec![], to_refresh: vec![], closed: 0 };
        let owners = Owners::new(rows);
        let mut names: BTreeMap<String, Holder> =
            here.servers.iter().map(|server| (server.server_name.clone(), Holder::Here)).collect();
        let mut sign_ins = SignIns { rows: &rows.sign_ins, used: BTreeSet::new() };
        let chosen = |server: &&LettaServer| choice.organization.is_none_or(|id| id == server.organization_id);
        let all = rows.servers.iter().filter(chosen).count();
        for (known, row) in rows.servers.iter().filter(chosen).enumerate() {
            progress(known, all);
            let mut draft = Draft { row, opener, notes: vec![], reasons: vec![], closed: vec![] };
            let present = here.servers.iter().find(|server| server.id == row.id);
            let connector = draft.connector();
            let sign_in = connector.as_ref().and_then(|connector| sign_ins.of(&mut draft, connector));
            let (server_name, connector) = draft.checked(connector);
            if let Some(present) = present {
                let whole = draft.closed.is_empty() && draft.reasons.is_empty();
                plan.lines.push(here_already(row, present, &server_name, connector.as_ref().filter(|_| whole)));
                continue;
            }
            plan.closed += usize::from(!draft.closed.is_empty());
            draft.refuse_closed(choice.without_secrets);
            draft.refuse_taken(names.get(&server_name));
            let mut tools = owners.tools_of(&row.id);
            let Some(connector) = connector.filter(|_| draft.reasons.is_empty()) else {
                if !tools.is_empty() {
                    draft.notes.push(format!("{} with it", stay(&tools)));
                }
                plan.lines.push(draft.line(Fate::Stays, Parts::default()));
                continue;
            };
            draft.drop_tools_in_use(&mut tools, here);
            let tools = draft.definitions(&tools);
            let stolen = owners.stolen_from(&row.id);
            draft.name_stolen(stolen);
            if !stolen.is_empty() {
                plan.to_refresh.push(server_name.clone());
            }
            names.insert(server_name.clone(), Holder::Coming);
            plan.lines.push(draft.line(Fate::Comes, Parts::of(&connector, tools.len(), sign_in.is_some())));
            let created_at = row.created_at();
            plan.servers.push(NewServer { id: row.id.clone(), server_name, connector, created_at, tools, sign_in });
        }
        plan.remark(rows, &owners, &sign_ins, choice);
        plan
    }

    /// What belongs to no server, and therefore to none of the lines.
    fn remark(&mut self, rows: &LettaRows, owners: &Owners<'_>, sign_ins: &SignIns<'_>, choice: &Choice<'_>) {
        let listed = |organization: &str| choice.organization.is_none_or(|id| id == organization);
        let orphans: Vec<_> = owners.orphans.iter().filter(|tool| listed(&tool.organization_id)).collect();
        if !orphans.is_empty() {
            let names: Vec<_> = orphans.iter().map(|tool| shown(&tool.name)).collect();
            let (noun, verb, it) = if orphans.len() == 1 { ("Tool", "does", "it") } else { ("Tools", "do", "them") };
            self.remarks
                .push(format!("{noun} {} {verb} not come: no server in Letta has {it} any more.", names.join(", ")));
        }
        let left = |(place, sign_in): &(usize, &LettaSignIn)| {
            let is_listed = |id: &String| rows.servers.iter().any(|server| &server.id == id);
            !sign_ins.used.contains(place)
                && listed(&sign_in.organization_id)
                && !sign_in.server_id.as_ref().is_some_and(is_listed)
        };
        let left: Vec<_> = rows.sign_ins.iter().enumerate().filter(left).map(|(_, sign_in)| sign_in).collect();
        let (done, begun): (Vec<_>, Vec<_>) = left.into_iter().partition(|sign_in| sign_in.status == AUTHORIZED);
        for (left, why) in
            [(begun, "never finished, or failed"), (done, "of a server that is not here, or of another user")]
        {
            if !left.is_empty() {
                let verb = if left.len() == 1 { "does" } else { "do" };
                self.remarks.push(format!("{} {verb} not come: {why}.", counted(left.len(), "sign-in")));
            }
        }
        if rows.deleted > 0 {
            let verb = if rows.deleted == 1 { "does" } else { "do" };
            self.remarks
                .push(format!("{} that Letta counts as deleted {verb} not come.", counted(rows.deleted, "server")));
        }
        let organizations: BTreeSet<_> = rows.servers.iter().map(|server| &server.organization_id).collect();
        if organizations.len() > 1 && choice.organization.is_none() {
            self.remarks.push(format!(
                "These are the servers of {} organizations; --organization takes those of one.",
                organizations.len()
            ));
        }
    }

    pub fn count(&self, fate: Fate) -> usize {
        self.lines.iter().filter(|line| line.fate == fate).count()
    }
}

/// Who has a name.
enum Holder {
    Here,
    Coming,
}

fn here_already(row: &LettaServer, present: &Server, server_name: &str, connector: Option<&Connector>) -> Line {
    let mut notes = vec![];
    if present.server_name != server_name {
        notes.push(format!("it is called {} in Portolan", shown(&present.server_name)));
    }
    match (&present.config.0, connector) {
        (Ok(present), Some(connector)) if present != connector => notes.push(
            "its connection is another one than Letta has, and stays; to take Letta's, delete it in Portolan first"
                .to_owned(),
        ),
        (Err(_), _) => notes.push("its connection cannot be opened in Portolan, and stays as it is".to_owned()),
        _ => {}
    }
    Line::new(row, Fate::Here, Parts::default(), vec![], notes)
}

impl Line {
    fn new(row: &LettaServer, fate: Fate, with: Parts, reasons: Vec<String>, notes: Vec<String>) -> Self {
        let (id, server_name) = (row.id.clone(), row.server_name.clone());
        Self { id, server_name, mcp_server_type: row.server_type.clone(), fate, with, reasons, notes }
    }
}

/// What is known so far of one server.
struct Draft<'a> {
    row: &'a LettaServer,
    opener: &'a Opener,
    notes: Vec<String>,
    /// Why it does not come.
    reasons: Vec<String>,
    /// Which of its secrets cannot be had.
    closed: Vec<(&'static str, Closed)>,
}

impl Draft<'_> {
    fn line(self, fate: Fate, with: Parts) -> Line {
        Line::new(self.row, fate, with, self.reasons, self.notes)
    }

    fn note(&mut self, note: &str) {
        self.notes.push(note.to_owned());
    }

    fn open(&mut self, what: &'static str, sealed: Option<&str>, clear: Option<&str>) -> Option<Secret> {
        self.opener.open(sealed, clear).unwrap_or_else(|closed| {
            self.closed.push((what, closed));
            None
        })
    }

    fn connector(&mut self) -> Option<Connector> {
        match ServerType::from_name(&self.row.server_type) {
            Some(ServerType::Stdio) => self.stdio().map(Connector::Stdio),
            Some(ServerType::Sse) => self.remote().map(Connector::Sse),
            Some(ServerType::StreamableHttp) => self.remote().map(Connector::StreamableHttp),
            None => {
                self.reasons.push("Portolan does not know this type of server".to_owned());
                None
            }
        }
    }

    /// The command as Letta ran it: it splits each argument at white space (docs/CONTRACT.md, row 18).
    fn stdio(&mut self) -> Option<Stdio> {
        #[derive(Deserialize)]
        struct Config {
            command: String,
            args: Vec<String>,
            env: Option<SecretMap>,
        }
        let config = self.row.stdio_config.as_deref().and_then(|text| serde_json::from_str::<Config>(text).ok());
        let Some(Config { command, args, env }) = config else {
            self.reasons.push("its command cannot be read".to_owned());
            return None;
        };
        let split: Vec<_> = args.iter().flat_map(|arg| arg.split_whitespace()).map(str::to_owned).collect();
        if split != args {
            self.notes.push(format!(
                "its arguments come as Letta ran them, split at white space: {} became {}",
                args.len(),
                split.len()
            ));
        }
        Some(Stdio { command, args: split, env: env.filter(|env| !env.is_empty()) })
    }

    /// The URL with what Letta sent there, or meant to (docs/CONTRACT.md, row 7): a token as `Authorization: Bearer …`,
    /// headers without the quotes and colons that people copy with them.
    fn remote(&mut self) -> Option<Remote> {
        let row = self.row;
        let Some(server_url) = row.server_url.clone() else {
            self.reasons.push("it has no URL".to_owned());
            return None;
        };
        let token = self.open("token", row.token_enc.as_deref(), row.token.as_deref());
        if token.is_some() && row.token_enc.as_deref().is_none_or(str::is_empty) {
            self.note("its token comes from a column that the last versions of Letta do not read");
        }
        let text = self.open("set of headers", row.custom_headers_enc.as_deref(), row.custom_headers.as_deref());
        let headers = text.and_then(|text| match serde_json::from_str::<Option<SecretMap>>(text.expose()) {
            Ok(headers) => headers,
            Err(_) => {
                self.reasons.push("its headers cannot be read".to_owned());
                None
            }
        });
        let headers = headers.filter(|headers| !headers.is_empty()).map(|headers| {
            let clean: SecretMap =
                headers.iter().map(|(name, value)| (clean_name(name), clean_value(value.expose()).into())).collect();
            if clean != headers {
                self.note("its headers come as Letta sent them, without quotes, colons and spaces around them");
            }
            clean
        });
        let mut token = token.map(|token| Secret::from(format!("Bearer {}", token.expose().trim())));
        if let (Some(_), Some(headers)) = (&token, &headers) {
            if headers.keys().any(|name| name.eq_ignore_ascii_case("authorization")) {
                self.note("its token does not come: Letta sent the header Authorization that it has, too, instead");
                token = None;
            } else {
                self.note("Letta did not send its token, because it has headers; Portolan sends both");
            }
        }
        let auth_header = token.as_ref().map(|_| "Authorization".to_owned());
        Some(Remote { server_url, auth_header, auth_token: token, custom_headers: headers, oauth: None })
    }

    /// Name and connector as a create would store them; what it would refuse is a reason.
    fn checked(&mut self, connector: Option<Connector>) -> (String, Option<Connector>) {
        let as_it_is = self.row.server_name.clone();
        if !is_id(&self.row.id, "mcp_server-") {
            self.reasons.push(NO_ID.to_owned());
        }
        let Some(connector) = connector else { return (as_it_is, None) };
        match as_registered(&as_it_is, &connector) {
            Ok((server_name, connector)) => {
                if server_name != as_it_is {
                    self.note("its name comes without the spaces around it");
                }
                (server_name, Some(connector))
            }
            Err(Error::Invalid(issues)) => {
                for issue in issues {
                    let keys = issue.loc.iter().filter(|key| !matches!(key.as_str(), Some("body" | "config")));
                    let keys: Vec<_> = keys.map(|key| key.as_str().map_or_else(|| key.to_string(), shown)).collect();
                    self.reasons.push(format!("Portolan refuses its {}: {}", keys.join("."), issue.msg));
                }
                (as_it_is, Some(connector))
            }
            Err(error) => {
                self.reasons.push(error.to_string());
                (as_it_is, Some(connector))
            }
        }
    }

    /// What cannot be opened keeps the server away: another try with the right key then brings all of it.
    fn refuse_closed(&mut self, without_secrets: bool) {
        for (what, closed) in std::mem::take(&mut self.closed) {
            match without_secrets {
                true => self.notes.push(format!("its {what} does not come: {closed}")),
                false => self.reasons.push(format!("its {what} cannot be opened: {closed}")),
            }
        }
    }

    /// Of those with one name, the first that comes has it; one that does not come anyway needs no other reason.
    fn refuse_taken(&mut self, holder: Option<&Holder>) {
        let reason = match holder {
            _ if !self.reasons.is_empty() => return,
            None => return,
            Some(Holder::Here) => "another server in Portolan has this name; rename one",
            Some(Holder::Coming) => {
                "an older server, of another organization, has this name; choose one with --organization"
            }
        };
        self.reasons.push(reason.to_owned());
    }

    fn name_stolen(&mut self, tools: &[(&str, &LettaServer)]) {
        for (tool, thief) in tools {
            self.notes.push(format!(
                "tool {} is a tool of server {} in Letta since that has one of this name, too; a refresh brings back its own",
                shown(tool),
                shown(&thief.server_name)
            ));
        }
    }

    fn drop_tools_in_use(&mut self, tools: &mut Vec<&LettaTool>, here: &Here) {
        tools.retain(|tool| {
            let fault = match (is_id(&tool.id, "tool-"), here.tools.contains(&tool.id)) {
                (false, _) => NO_ID,
                (_, true) => "it is a tool of another server in Portolan",
                _ => return true,
            };
            self.notes.push(format!("tool {} does not come: {fault}", shown(&tool.name)));
            false
        });
    }

    /// The tools with their ids and the definitions that their schemas still tell of.
    fn definitions(&mut self, tools: &[&LettaTool]) -> Vec<(String, Offered)> {
        let raw: Vec<Box<RawValue>> =
            tools.iter().map(|tool| to_raw_value(&definition(tool)).expect("a value can be written")).collect();
        let (offered, skipped) = accept(&raw);
        for tool in skipped {
            self.notes.push(format!("tool {} does not come: {}", shown(&tool.name), tool.reason));
        }
        let mut ids = BTreeMap::new();
        for tool in tools {
            ids.entry(tool.name.as_str()).or_insert(&tool.id);
        }
        offered.into_iter().map(|tool| (ids[tool.name.as_str()].clone(), tool)).collect()
    }
}

const NO_ID: &str = "its id is not one that Letta makes";

/// Ids of every release of Letta, and of Portolan: a prefix, and a random UUID (version 4) in its usual spelling.
fn is_id(text: &str, prefix: &str) -> bool {
    let rest = text.strip_prefix(prefix);
    rest.is_some_and(|rest| {
        Uuid::try_parse(rest)
            .is_ok_and(|id| id.get_version_num() == 4 && id.get_variant() == Variant::RFC4122 && id.to_string() == rest)
    })
}

/// The MCP definition that Letta made `json_schema` of, as far as it can be had: without what Letta adds to every tool.
fn definition(tool: &LettaTool) -> Value {
    let schema: Value =
        tool.json_schema.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let mut input = match schema.get("parameters") {
        Some(Value::Object(parameters)) => parameters.clone(),
        _ => Map::from_iter([("type".to_owned(), json!("object"))]),
    };
    const HEARTBEAT: &str = "request_heartbeat";
    if let Some(Value::Object(properties)) = input.get_mut("properties") {
        properties.shift_remove(HEARTBEAT);
    }
    if let Some(Value::Array(required)) = input.get_mut("required") {
        required.retain(|name| name != HEARTBEAT);
    }
    let description = tool.description.as_deref().or_else(|| schema["description"].as_str());
    let mut definition = Map::from_iter([("name".to_owned(), json!(tool.name))]);
    definition.extend(description.map(|text| ("description".to_owned(), json!(text))));
    definition.insert("inputSchema".to_owned(), input.into());
    definition.into()
}

/// Letta's own `_sanitize_dict_key` and `_sanitize_dict_value`.
fn clean_name(name: &str) -> String {
    clean_value(name).trim_end_matches(':').trim().to_owned()
}

fn clean_value(value: &str) -> String {
    let value = value.trim();
    let quotes = ['"', '\''].into_iter().find(|quote| value.starts_with(*quote) && value.ends_with(*quote));
    match quotes {
        Some(_) if value.len() > 1 => value[1..value.len() - 1].to_owned(),
        Some(_) => String::new(),
        None => value.to_owned(),
    }
}

impl Parts {
    fn of(connector: &Connector, tools: usize, sign_in: bool) -> Self {
        let mut parts = Self { tools, sign_ins: usize::from(sign_in), ..Self::default() };
        match connector {
            Connector::Stdio(stdio) => parts.variables = stdio.env.as_ref().map_or(0, SecretMap::len),
            Connector::Sse(remote) | Connector::StreamableHttp(remote) => {
                parts.tokens = usize::from(remote.auth_token.is_some());
                parts.headers = remote.custom_headers.as_ref().map_or(0, SecretMap::len);
            }
        }
        parts
    }

    /// In a few words, with its tools even if there are none.
    pub fn words(&self) -> String {
        let mut text = counted(self.tools, "tool");
        let others = [
            (self.variables, "variable"),
            (self.tokens, "token"),
            (self.headers, "header"),
            (self.sign_ins, "sign-in"),
        ];
        for (number, noun) in others.into_iter().filter(|(number, _)| *number > 0) {
            write!(text, ", {}", counted(number, noun)).expect("a string takes all");
        }
        text
    }
}

fn stay(tools: &[&LettaTool]) -> String {
    format!("{} {}", counted(tools.len(), "tool"), if tools.len() == 1 { "stays" } else { "stay" })
}

pub fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Whose each tool is. Letta keeps one row for all tools of a name, which the server that registers it last takes over.
struct Owners<'a> {
    tools: BTreeMap<&'a str, Vec<&'a LettaTool>>,
    /// By the server that they were taken from, the tool and who has it now.
    stolen: BTreeMap<&'a str, Vec<(&'a str, &'a LettaServer)>>,
    orphans: Vec<&'a LettaTool>,
}

impl<'a> Owners<'a> {
    fn new(rows: &'a LettaRows) -> Self {
        let servers: BTreeMap<&str, &LettaServer> = rows.servers.iter().map(|row| (row.id.as_str(), row)).collect();
        let mut listed_by = BTreeMap::<&str, Vec<&str>>::new();
        for mapping in rows.mappings.iter().filter(|mapping| servers.contains_key(mapping.server_id.as_str())) {
            let by = listed_by.entry(&mapping.tool_id).or_default();
            if !by.contains(&mapping.server_id.as_str()) {
                by.push(&mapping.server_id);
            }
        }
        let mut owners = Self { tools: BTreeMap::new(), stolen: BTreeMap::new(), orphans: vec![] };
        for tool in &rows.tools {
            let metadata: Value = parsed(tool.metadata.as_deref());
            let named = |name: &str| {
                let is_it = |row: &&LettaServer| row.server_name == name && row.organization_id == tool.organization_id;
                rows.servers.iter().find(is_it).map(|row| row.id.as_str())
            };
            let registered = metadata["mcp"]["server_id"].as_str().and_then(|id| Some(servers.get(id)?.id.as_str()));
            let listed = listed_by.get(tool.id.as_str()).map(Vec::as_slice).unwrap_or_default();
            // Rows from before there were mappings have a name alone.
            let by_name = || metadata["mcp"]["server_name"].as_str().and_then(named);
            let by_tag = || {
                let tags = parsed(tool.tags.as_deref());
                let names = tags.as_array().into_iter().flatten().filter_map(|tag| tag.as_str()?.strip_prefix("mcp:"));
                names.filter_map(named).next()
            };
            match registered.or_else(|| listed.first().copied()).or_else(by_name).or_else(by_tag) {
                Some(owner) => {
                    owners.tools.entry(owner).or_default().push(tool);
                    for other in listed.iter().filter(|other| **other != owner) {
                        owners.stolen.entry(other).or_default().push((&tool.name, servers[owner]));
                    }
                }
                None => owners.orphans.push(tool),
            }
        }
        owners
    }

    fn tools_of(&self, server_id: &str) -> Vec<&'a LettaTool> {
        self.tools.get(server_id).cloned().unwrap_or_default()
    }

    fn stolen_from(&self, server_id: &str) -> &[(&'a str, &'a LettaServer)] {
        self.stolen.get(server_id).map(Vec::as_slice).unwrap_or_default()
    }
}

fn parsed(text: Option<&str>) -> Value {
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

const AUTHORIZED: &str = "authorized";

/// The sign-ins of a Letta, each for one server.
struct SignIns<'a> {
    rows: &'a [LettaSignIn],
    used: BTreeSet<usize>,
}

impl SignIns<'_> {
    /// The latest sign-in to this server; Letta finds it by its URL.
    fn of(&mut self, draft: &mut Draft<'_>, connector: &Connector) -> Option<SignIn> {
        let (Connector::Sse(remote) | Connector::StreamableHttp(remote)) = connector else { return None };
        let row = draft.row;
        let mut found = vec![];
        for (place, sign_in) in self.rows.iter().enumerate().filter(|(place, _)| !self.used.contains(place)) {
            let linked = sign_in.server_id.as_deref() == Some(&row.id);
            let same_url = sign_in.server_url == remote.server_url && sign_in.organization_id == row.organization_id;
            let same_user = row.created_by.is_none() || sign_in.user_id == row.created_by;
            match sign_in.status.as_str() {
                AUTHORIZED if linked && !same_url => draft.note("a sign-in does not come: it was for another URL"),
                AUTHORIZED if linked || (sign_in.server_id.is_none() && same_url && same_user) => found.push(place),
                _ if linked => draft.note("a sign-in does not come: it was never finished, or failed"),
                _ => {}
            }
        }
        let latest = found.pop()?;
        for _ in found {
            draft.note("a sign-in does not come: there is a later one");
        }
        let sign_in = draft.sign_in(&self.rows[latest], Utc::now());
        self.used.insert(latest);
        sign_in
    }
}

impl Draft<'_> {
    fn sign_in(&mut self, row: &LettaSignIn, now: DateTime<Utc>) -> Option<SignIn> {
        let closed = self.closed.len();
        let access_token = self.open("sign-in", row.access_token_enc.as_deref(), row.access_token.as_deref());
        let refresh_token = self.open("sign-in", row.refresh_token_enc.as_deref(), row.refresh_token.as_deref());
        let client_secret = self.open("sign-in", row.client_secret_enc.as_deref(), row.client_secret.as_deref());
        if self.closed.len() > closed {
            self.closed.truncate(closed + 1);
            return None;
        }
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let fault = match (&access_token, given(&row.client_id), row.expires_at()) {
            (None, ..) => "it has no access token",
            (_, None, _) => "it does not say for which client it is",
            (_, _, Some(end)) if end <= now && refresh_token.is_none() => "it has expired and cannot be renewed",
            (Some(access_token), Some(client_id), expires_at) => {
                return Some(SignIn {
                    server_url: row.server_url.clone(),
                    issuer: None,
                    client_id,
                    client_secret,
                    redirect_uri: given(&row.redirect_uri),
                    access_token: access_token.clone(),
                    refresh_token,
                    scope: given(&row.scope),
                    expires_at,
                });
            }
        };
        self.notes.push(format!("its sign-in does not come: {fault}"));
        None
    }
}
