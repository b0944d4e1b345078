//! What a file says: of each server the body of a create, of each placeholder the variable that it is here, and what else
//! there is that Portolan does not take over.
//!
//! What changes what a server is or what it gets is taken over or refused; what only says how the other program treats it is
//! passed over and named.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::mcp::{is_templated, templates};

use super::placeholders::{Placeholder, placeholders, template, variable_name};
use super::{Fault, Format, Passed, is_sse};

/// The most faults that are named.
const MAX_FAULTS: usize = 100;
/// The longest text that a server can have, in bytes (CONTRACT row 2).
const MAX_TEXT: usize = 32 * 1024;

const MISPLACED: &str = "A placeholder cannot stand here; only in arguments, variables and header values.";
const FOREIGN: &str =
    "Only the program that this file is for knows what this placeholder stands for; write that itself.";
const NAMELESS: &str = "This placeholder has no name that a variable could have.";
const BAD_DEFAULT: &str =
    "A default is not empty, begins and ends without white space, and has no placeholder and no brace in it.";
const TOO_LONG: &str = "This must be a string of at most 32 KiB.";
const BAD_TYPE: &str = "This must be stdio, sse or http.";

/// What a file says.
#[derive(Debug, Default)]
pub struct Document {
    pub entries: Vec<Entry>,
    /// The names of those that are switched off: they are left alone.
    pub disabled: Vec<String>,
    pub passed: Vec<Passed>,
    pub variables: Vec<Variable>,
}

/// A server in a file.
#[derive(Debug)]
pub struct Entry {
    /// As it is written.
    pub server_name: String,
    /// As in the body of a create.
    pub config: Map<String, Value>,
    place: Vec<Value>,
    /// Under which key of the file a field of `config` stands.
    keys: BTreeMap<&'static str, String>,
}

/// What the servers of a file need to be given, or may be (CONTRACT row 17).
#[derive(Debug, Serialize)]
pub struct Variable {
    pub name: String,
    /// The placeholders that it stands for.
    pub placeholders: BTreeSet<String>,
    pub servers: BTreeSet<String>,
    /// Whether each of its places has a default.
    pub has_default: bool,
    /// The file says that it is one; `false` where it says nothing.
    pub is_password: bool,
}

impl Entry {
    /// The body of its create.
    pub fn body(&self) -> Map<String, Value> {
        let body = [("server_name", json!(self.server_name)), ("config", Value::Object(self.config.clone()))];
        body.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// Where in the file stands what is at `loc` in that body.
    pub fn place(&self, loc: &[Value]) -> Vec<Value> {
        let inside = match loc {
            [_, config, rest @ ..] if config == "config" => rest,
            _ => &[],
        };
        let mut place = self.place.clone();
        if let [field, rest @ ..] = inside {
            let key = field.as_str().and_then(|field| self.keys.get(field));
            place.push(key.map_or_else(|| field.clone(), |key| json!(key)));
            place.extend(rest.iter().cloned());
        }
        place
    }
}

/// Reads a file, of any format whose shape it has, or of the one that is named.
///
/// # Errors
/// All that is wrong with it.
pub fn read(mut file: Map<String, Value>, format: Option<Format>) -> Result<Document, Vec<Fault>> {
    let (mut top, mut format) = (Vec::new(), format);
    // The settings of older versions of VS Code.
    let settings = ["mcpServers", "servers"].iter().all(|key| !file.contains_key(*key));
    if settings && let Some(Value::Object(inner)) = file.get_mut("mcp").filter(|mcp| mcp.get("servers").is_some()) {
        file = std::mem::take(inner);
        top.push(json!("mcp"));
    }
    let key = match (format, file.contains_key("mcpServers"), file.contains_key("servers")) {
        (Some(format), ..) => format.top(),
        (None, true, false) => "mcpServers",
        (None, false, true) => {
            format = Some(Format::VsCode);
            "servers"
        }
        (None, true, true) => {
            let msg = "The file has both mcpServers and servers; say with the format which of them is meant.";
            return Err(vec![Fault { place: top, msg: msg.to_owned() }]);
        }
        (None, false, false) => {
            let msg = "This is no file of MCP servers: it has neither mcpServers nor servers.";
            return Err(vec![Fault { place: top, msg: msg.to_owned() }]);
        }
    };
    let servers = file.shift_remove(key);
    top.push(json!(key));
    let Some(Value::Object(servers)) = servers else {
        let msg = if servers.is_some() { "This must be an object." } else { "The file has no such key." };
        return Err(vec![Fault { place: top, msg: msg.to_owned() }]);
    };
    let mut reader = Reader { format, ..Reader::default() };
    if format == Some(Format::VsCode) {
        let place = [&top[..top.len() - 1], &[json!("inputs")]].concat();
        reader.read_inputs(file.shift_remove("inputs"), &place);
    }
    for key in file.keys().filter(|key| !matches!(key.as_str(), "$schema" | "portolan")) {
        reader.pass(None, key, "Only the servers of the file are taken over.");
    }
    let mut names = BTreeSet::new();
    for (name, value) in servers {
        let place = [top.as_slice(), &[json!(name)]].concat();
        if !names.insert(name.trim().to_owned()) {
            reader.fault(&place, "Another server of the file has this name already, but for white space around it.");
        }
        match value {
            Value::Object(map) => reader.read_entry(name, map, place),
            _ => reader.fault(&place, "This must be an object."),
        }
    }
    if reader.faults.is_empty() {
        reader.document.variables = reader.variables.into_values().collect();
        Ok(reader.document)
    } else {
        Err(reader.faults)
    }
}

#[derive(Default)]
struct Reader {
    format: Option<Format>,
    inputs: BTreeMap<String, Input>,
    document: Document,
    variables: BTreeMap<String, Variable>,
    faults: Vec<Fault>,
}

/// What VS Code asks for.
struct Input {
    default: Option<String>,
    is_password: bool,
}

impl Reader {
    fn fault(&mut self, place: &[Value], msg: &str) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(Fault { place: place.to_vec(), msg: msg.to_owned() });
        }
    }

    fn pass(&mut self, server: Option<&str>, key: &str, reason: &str) {
        let (server, key) = (server.map(str::to_owned), Some(key.to_owned()));
        self.document.passed.push(Passed { server, key, reason: reason.to_owned() });
    }

    fn read_inputs(&mut self, inputs: Option<Value>, place: &[Value]) {
        let inputs = match inputs {
            None | Some(Value::Null) => return,
            Some(Value::Array(inputs)) => inputs,
            Some(_) => return self.fault(place, "This must be a list of objects."),
        };
        for (number, input) in inputs.iter().enumerate() {
            let Some(id) = input.get("id").and_then(Value::as_str) else {
                self.fault(&[place, &[json!(number)]].concat(), "This must be an object with an id.");
                continue;
            };
            // Of a list, VS Code offers all and asks: none of them is what is meant.
            let default = input.get("default").and_then(Value::as_str).filter(|text| !text.is_empty());
            let usable = default.filter(|text| is_default(text)).map(str::to_owned);
            if usable.is_none() && default.is_some() {
                let reason = "A variable cannot have this default, so it has to be set.";
                self.pass(None, &format!("inputs[{number}].default"), reason);
            }
            let is_password = input.get("password") == Some(&Value::Bool(true));
            self.inputs.insert(id.to_owned(), Input { default: usable, is_password });
        }
    }

    fn read_entry(&mut self, server_name: String, mut map: Map<String, Value>, place: Vec<Value>) {
        map.retain(|_, value| !value.is_null());
        let at = |key: &str| [place.as_slice(), &[json!(key)]].concat();
        let disabled = map.shift_remove("disabled") == Some(Value::Bool(true));
        if map.shift_remove("enabled") == Some(Value::Bool(false)) || disabled {
            self.pass(Some(&server_name), "disabled", "It is switched off there, and left alone here.");
            return self.document.disabled.push(server_name.trim().to_owned());
        }
        for (key, msg) in REFUSED {
            if map.shift_remove(key).is_some_and(|value| value != json!("")) {
                self.fault(&at(key), msg);
            }
        }
        let mut config = Map::new();
        let mut keys = BTreeMap::new();
        let server_type = self.read_type(&mut map, &at, &mut keys);
        for key in ["command", "args", "env"] {
            if let Some(value) = map.shift_remove(key) {
                let value = match key {
                    "command" => self.plain(value, &at(key)),
                    "env" => self.texts(scalars(value), &server_name, &at(key)),
                    _ => self.texts(value, &server_name, &at(key)),
                };
                config.insert(key.to_owned(), value);
            }
        }
        let url = self.first_of(&mut map, ["url", "serverUrl", "server_url", "httpUrl"], &at);
        let by_name = url.as_ref().is_some_and(|(key, _)| *key == "httpUrl").then_some("streamable_http");
        let by_url = url.as_ref().and_then(|(_, url)| url.as_str()).map(|url| match self.format {
            Some(Format::Letta) => "sse",
            _ if is_sse(url) => "sse",
            _ => "streamable_http",
        });
        if let Some((key, url)) = url {
            keys.insert("server_url", key.to_owned());
            let url = self.texts(url, &server_name, &at(key));
            config.insert("server_url".to_owned(), url);
        }
        if let Some((key, headers)) = self.first_of(&mut map, ["headers", "custom_headers"], &at) {
            keys.insert("custom_headers", key.to_owned());
            let headers = self.texts(headers, &server_name, &at(key));
            config.insert("custom_headers".to_owned(), headers);
        }
        for key in ["auth_header", "auth_token"] {
            if let Some(value) = map.shift_remove(key) {
                let value = if key == "auth_token" { self.texts(value, &server_name, &at(key)) } else { value };
                config.insert(key.to_owned(), value);
            }
        }
        if !config.contains_key("command") && !config.contains_key("server_url") {
            self.fault(&place, "A server needs a command or a url.");
        }
        let found = server_type.or(if config.contains_key("command") { None } else { by_name.or(by_url) });
        if let Some(found) = found {
            config.insert("mcp_server_type".to_owned(), json!(found));
        }
        for key in map.keys() {
            self.pass(Some(&server_name), key, reason(key));
        }
        self.document.entries.push(Entry { server_name, config, place, keys });
    }

    /// The transport, under whatever name it is given.
    fn read_type(
        &mut self,
        map: &mut Map<String, Value>,
        at: &impl Fn(&str) -> Vec<Value>,
        keys: &mut BTreeMap<&'static str, String>,
    ) -> Option<&'static str> {
        let mut found = None;
        for key in ["type", "transport", "transportType"] {
            let Some(value) = map.shift_remove(key) else { continue };
            let text = value.as_str().map(|text| text.to_ascii_lowercase().replace(['-', '_'], ""));
            let known = match text.as_deref() {
                Some("stdio") => "stdio",
                Some("sse") => "sse",
                Some("http" | "streamablehttp") => "streamable_http",
                _ => {
                    self.fault(&at(key), BAD_TYPE);
                    continue;
                }
            };
            if found.is_some_and(|other| other != known) {
                self.fault(&at(key), "The transport is given twice, and differently.");
            }
            keys.insert("mcp_server_type", key.to_owned());
            found = Some(known);
        }
        found
    }

    /// The value of the one of these keys that is there.
    fn first_of<const N: usize>(
        &mut self,
        map: &mut Map<String, Value>,
        keys: [&'static str; N],
        at: &impl Fn(&str) -> Vec<Value>,
    ) -> Option<(&'static str, Value)> {
        let mut found = None;
        for key in keys {
            let Some(value) = map.shift_remove(key) else { continue };
            if found.is_some() {
                self.fault(&at(key), "This is given twice, under two names.");
            }
            found.get_or_insert((key, value));
        }
        found
    }

    /// A text without placeholders; whether it is one is checked elsewhere.
    fn plain(&mut self, value: Value, place: &[Value]) -> Value {
        let text = value.as_str().unwrap_or_default();
        // Longer than any is: that is said elsewhere.
        let is_short = text.len() <= MAX_TEXT;
        if is_short && (!placeholders(text, self.format).is_empty() || is_templated(text)) {
            self.fault(place, MISPLACED);
        }
        value
    }

    /// A value with templates in place of the placeholders of its texts: one text, a list, or an object of them.
    fn texts(&mut self, value: Value, server: &str, place: &[Value]) -> Value {
        let inside = |step: Value| [place, &[step]].concat();
        match value {
            Value::String(text) => match self.text(&text, server) {
                Ok(text) => text.into(),
                Err(msg) => {
                    self.fault(place, msg);
                    Value::Null
                }
            },
            Value::Array(items) if place.len() < 5 => {
                let items = items.into_iter().enumerate();
                items.map(|(number, item)| self.texts(item, server, &inside(json!(number)))).collect()
            }
            Value::Object(map) if place.len() < 5 => {
                let entries = map.into_iter().map(|(name, value)| {
                    let value = self.texts(value, server, &inside(json!(name)));
                    (name, value)
                });
                Value::Object(entries.collect())
            }
            other => other,
        }
    }

    fn text(&mut self, text: &str, server: &str) -> Result<String, &'static str> {
        if text.len() > MAX_TEXT {
            return Err(TOO_LONG);
        }
        let mut changed = String::with_capacity(text.len());
        let mut from = 0;
        for (range, placeholder) in placeholders(text, self.format) {
            let (name, default, is_password) = match placeholder {
                Placeholder::Foreign => return Err(FOREIGN),
                Placeholder::Variable { name, default } => (name, default.map(str::to_owned), false),
                Placeholder::Input(id) => match self.inputs.get(id) {
                    Some(input) => (id, input.default.clone(), input.is_password),
                    None => (id, None, false),
                },
            };
            if default.as_deref().is_some_and(|default| !is_default(default)) {
                return Err(BAD_DEFAULT);
            }
            let name = variable_name(name).ok_or(NAMELESS)?;
            changed += &text[from..range.start];
            changed += &template(&name, default.as_deref());
            from = range.end;
            // Without the default, which is a value.
            let written = text[range].split(":-").next().unwrap_or_default().trim_end_matches('}');
            self.need(&name, &format!("{written}}}"), server, default.is_some(), is_password);
        }
        for found in templates(text) {
            self.need(found.name, &template(found.name, None), server, found.default.is_some(), false);
        }
        Ok(changed + &text[from..])
    }

    fn need(&mut self, name: &str, placeholder: &str, server: &str, has_default: bool, is_password: bool) {
        let variable = self.variables.entry(name.to_owned()).or_insert_with(|| Variable {
            name: name.to_owned(),
            placeholders: BTreeSet::new(),
            servers: BTreeSet::new(),
            has_default: true,
            is_password: false,
        });
        variable.placeholders.insert(placeholder.to_owned());
        variable.servers.insert(server.trim().to_owned());
        variable.has_default &= has_default;
        variable.is_password |= is_password;
    }
}

/// Whether a template can have this default, to the letter.
fn is_default(text: &str) -> bool {
    let whole = text.trim() == text || text.chars().count() == 1;
    !text.is_empty() && whole && !text.contains('}') && !text.contains("${") && !text.contains("{{")
}

/// Numbers and switches as texts: programs take them for variables, too.
fn scalars(value: Value) -> Value {
    let Value::Object(map) = value else { return value };
    let entries = map.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| match value {
        Value::Number(number) => (name, number.to_string().into()),
        Value::Bool(switch) => (name, switch.to_string().into()),
        other => (name, other),
    });
    Value::Object(entries.collect())
}

/// Without these a server would be another one than the file means.
const REFUSED: [(&str, &str); 5] = [
    ("envFile", NO_FILES),
    ("env_file", NO_FILES),
    ("cwd", "Portolan starts each command in a folder of its own; write env -C FOLDER COMMAND as command and args."),
    ("workingDirectory", "Portolan starts each command in a folder of its own; write env -C FOLDER COMMAND instead."),
    (
        "headersHelper",
        "Portolan runs no programs for header values; write the headers, with templates where they differ.",
    ),
];
const NO_FILES: &str = "Portolan reads no files of variables; write the variables into env.";

/// Why a key of a server is passed over.
fn reason(key: &str) -> &'static str {
    match key {
        "alwaysAllow" | "autoApprove" | "trust" => "Portolan asks nobody before a tool is run.",
        "tools" | "disabledTools" | "enabledTools" | "includeTools" | "excludeTools" => {
            "Portolan has all tools of a server."
        }
        "timeout" | "startup_timeout_sec" | "tool_timeout_sec" | "connectTimeout" | "requestTimeout" => {
            "Portolan has the same timeouts for all servers; its settings say which."
        }
        "auth" | "oauth" | "authProviderType" => {
            "Sign-ins are not taken over: connect the server, and name a client of its own in its oauth."
        }
        "sandbox" | "sandboxEnabled" => "Portolan confines all commands alike; its settings say how.",
        "dev" | "gallery" | "version" | "description" | "name" | "server_name" => "This is of no use here.",
        _ => "Portolan does not know this key.",
    }
}
