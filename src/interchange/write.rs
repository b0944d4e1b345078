//! Servers as the file of another program.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::model::{Connector, Remote, SecretMap, ServerType, Stdio};
use crate::secrets::{is_secret_name, without_scheme};

use super::placeholders::{canonical, placeholders, with_templates};
use super::{Format, Passed, is_sse};

/// A file.
pub struct Written {
    pub file: Map<String, Value>,
    /// What it does not say.
    pub left_out: Vec<Passed>,
}

impl Written {
    /// The file with what it does not say in it, under a key that no program reads.
    pub fn into_one(mut self) -> Map<String, Value> {
        if !self.left_out.is_empty() {
            self.file.insert("portolan".to_owned(), json!({ "left_out": self.left_out }));
        }
        self.file
    }
}

/// The file of these servers, by name. `made` are the variables that stand for secrets that were left out.
pub fn write(format: Format, servers: &[(&str, &Connector)], made: &BTreeSet<String>) -> Written {
    let mut writer = Writer { format, made, server: "", inputs: Vec::new(), left_out: Vec::new() };
    let mut objects = Map::new();
    for (name, connector) in servers {
        writer.server = name;
        objects.insert((*name).to_owned(), Value::Object(writer.entry(connector)));
    }
    let mut file = Map::new();
    if !writer.inputs.is_empty() {
        let inputs: Vec<Value> = writer.inputs.iter().map(Input::object).collect();
        file.insert("inputs".to_owned(), inputs.into());
    }
    file.insert(format.top().to_owned(), objects.into());
    Written { file, left_out: writer.left_out }
}

/// The fields that go to a server with each request, by name: its token is one of them.
pub fn headers(remote: &Remote) -> BTreeMap<String, String> {
    let custom = remote.custom_headers.iter().flat_map(SecretMap::iter);
    let mut headers: BTreeMap<_, _> = custom.map(|(name, value)| (name.clone(), value.expose().to_owned())).collect();
    if let Some(token) = remote.auth_token.as_ref().map(|token| token.expose()) {
        match &remote.auth_header {
            Some(name) => headers.insert(name.clone(), token.to_owned()),
            // As it is sent (CONTRACT row 7).
            None => headers.insert("Authorization".to_owned(), format!("Bearer {}", without_scheme(token))),
        };
    }
    headers
}

struct Writer<'a> {
    format: Format,
    made: &'a BTreeSet<String>,
    server: &'a str,
    inputs: Vec<Input>,
    left_out: Vec<Passed>,
}

/// What VS Code is to ask for.
struct Input {
    id: String,
    variable: String,
    default: Option<String>,
    is_password: bool,
}

impl Input {
    fn object(&self) -> Value {
        let mut object = json!({ "type": "promptString", "id": self.id, "description": self.variable });
        if let Some(default) = &self.default {
            object["default"] = json!(default);
        }
        if self.is_password {
            object["password"] = json!(true);
        }
        object
    }
}

impl Writer<'_> {
    fn entry(&mut self, connector: &Connector) -> Map<String, Value> {
        let mut entry = Map::new();
        if let Some((key, name)) = self.transport(connector) {
            entry.insert(key.to_owned(), name.into());
        }
        match connector {
            Connector::Stdio(Stdio { command, args, env }) => {
                entry.insert("command".to_owned(), self.plain("command", command));
                if !args.is_empty() {
                    let args = args.iter().enumerate().map(|(number, arg)| self.text(&format!("args[{number}]"), arg));
                    entry.insert("args".to_owned(), args.collect());
                }
                if let Some(env) = env {
                    let env = env
                        .iter()
                        .map(|(name, value)| (name.clone(), self.text(&format!("env.{name}"), value.expose())));
                    entry.insert("env".to_owned(), Value::Object(env.collect()));
                }
            }
            Connector::Sse(remote) | Connector::StreamableHttp(remote) => {
                let key = if self.format == Format::Windsurf { "serverUrl" } else { "url" };
                let url = self.text(key, &remote.server_url);
                entry.insert(key.to_owned(), url);
                let headers = headers(remote);
                if !headers.is_empty() {
                    let headers = headers.iter().map(|(name, value)| {
                        let value = self.text(&format!("headers.{name}"), value);
                        (name.clone(), value)
                    });
                    entry.insert("headers".to_owned(), Value::Object(headers.collect()));
                }
                if remote.oauth.is_some() {
                    self.leave_out("oauth", "The client that it signs in as has no place in this file.");
                }
            }
        }
        entry
    }

    /// The key and the name of the transport, where the file needs to say it.
    fn transport(&self, connector: &Connector) -> Option<(&'static str, &'static str)> {
        let server_type = connector.server_type();
        let by_url = match connector {
            Connector::Stdio(_) => ServerType::Stdio,
            Connector::Sse(remote) | Connector::StreamableHttp(remote) if is_sse(&remote.server_url) => ServerType::Sse,
            _ => ServerType::StreamableHttp,
        };
        let name = if server_type == ServerType::StreamableHttp { "http" } else { server_type.as_str() };
        match self.format {
            Format::Letta => Some(("transport", server_type.as_str())),
            Format::VsCode => Some(("type", name)),
            Format::Claude if server_type != ServerType::Stdio => Some(("type", name)),
            Format::Claude => None,
            // They find it out by themselves, and Portolan does by the URL.
            Format::Cursor | Format::Windsurf => (server_type != by_url).then_some(("type", name)),
        }
    }

    fn leave_out(&mut self, key: &str, reason: &str) {
        let (server, key) = (Some(self.server.to_owned()), Some(key.to_owned()));
        self.left_out.push(Passed { server, key, reason: reason.to_owned() });
    }

    /// A text in which the program fills something in, although nothing is meant to be.
    fn plain(&mut self, key: &str, text: &str) -> Value {
        if !placeholders(text, Some(self.format)).is_empty() {
            self.leave_out(key, "The program would take a part of this text for a placeholder.");
        }
        text.into()
    }

    /// A text with placeholders in place of its templates.
    fn text(&mut self, key: &str, text: &str) -> Value {
        self.plain(key, text);
        if self.format == Format::Letta {
            return canonical(text).into();
        }
        with_templates(text, |name, default| self.placeholder(key, name, default)).into()
    }

    fn placeholder(&mut self, key: &str, name: &str, default: Option<&str>) -> String {
        const LOST: &str = "This file has no defaults for variables, so that it has to be set.";
        const OTHER: &str = "The variable has another default elsewhere, and an input only one.";
        match (self.format, default) {
            (Format::Claude, Some(default)) => format!("${{{name}:-{default}}}"),
            (Format::Claude, None) => format!("${{{name}}}"),
            (Format::VsCode, _) => {
                let id = name.to_ascii_lowercase();
                let default = default.map(str::to_owned);
                match self.inputs.iter().find(|input| input.id == id) {
                    Some(input) if input.default != default => self.leave_out(key, OTHER),
                    Some(_) => {}
                    None => self.inputs.push(Input {
                        id: id.clone(),
                        variable: name.to_owned(),
                        default,
                        is_password: self.made.contains(name) || is_secret_name(name),
                    }),
                }
                format!("${{input:{id}}}")
            }
            (_, default) => {
                if default.is_some() {
                    self.leave_out(key, LOST);
                }
                format!("${{env:{name}}}")
            }
        }
    }
}
