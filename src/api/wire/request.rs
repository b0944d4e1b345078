//! What a client sends.
//!
//! Both generations of bodies are read here: `{server_name, config: {…}}` of every stable SDK, and the flat body of the
//! pre-releases. All that is wrong with a body is told at once, by place and never by value.

use serde_json::{Map, Value, json};

use crate::api::guard::shown;
use crate::error::{Error, Issue};
use crate::mcp::{FieldPlace, faults, server_url};
use crate::model::{Connector, GrantType, OauthClient, Remote, Secret, SecretMap, Server, ServerType, Stdio};

use super::mask;

const MAX_NAME_CHARS: usize = 255;
const MAX_COMMAND_CHARS: usize = 4096;
const MAX_VALUE_BYTES: usize = 32 * 1024;
const MAX_ITEMS: usize = 256;
const MAX_CLIENT_ID_CHARS: usize = 2048;
const MAX_SCOPE_CHARS: usize = 4096;

/// The most issues one answer names.
const MAX_ISSUES: usize = 100;
/// What is wrong with an entry of a list or map.
const ENTRY: &str = "This must be a string of at most 32 KiB.";

/// What is wrong with a mask.
const STRAY_MASK: &str = "This is a mask, and nothing is stored that it stands for; give the value itself.";
const MOVED_MASK: &str = "This is a mask, and the server_url has another origin than before; give the value itself.";

/// The body of a create.
pub struct CreateServer {
    pub server_name: String,
    pub connector: Connector,
}

impl CreateServer {
    pub fn read(body: Map<String, Value>) -> Result<Self, Error> {
        let mut reader = Reader::default();
        let (name, fields) = ConnectorFields::read_body(body, Kind::Create, &mut reader);
        if name.is_none() && !reader.has_issue_at("server_name") {
            reader.issue(&["body", "server_name"], "This field is required.");
        }
        fields.refuse_masks(&mut reader);
        let connector = fields.build(&mut reader);
        match (name, connector) {
            (Some(server_name), Some(connector)) if reader.issues.is_empty() => Ok(Self { server_name, connector }),
            _ => Err(Error::Invalid(reader.issues)),
        }
    }
}

/// The body of an update: absent and null keep what is there, `""` and `{}` clear (CONTRACT row 8).
pub struct UpdateServer {
    pub server_name: Option<String>,
    fields: ConnectorFields,
    /// If the server has any.
    clears_headers: bool,
}

impl UpdateServer {
    pub fn read(body: Map<String, Value>) -> Result<Self, Error> {
        let mut reader = Reader::default();
        let (server_name, fields) = ConnectorFields::read_body(body, Kind::Update, &mut reader);
        let request = Self { server_name, fields, clears_headers: false };
        if reader.issues.is_empty() { Ok(request) } else { Err(Error::Invalid(reader.issues)) }
    }

    /// As [`UpdateServer::read`], of Letta's older API: a command may stand in `stdio_config`, and a null clears
    /// `custom_headers` (docs/CONTRACT.md, By name).
    pub fn read_legacy(body: Map<String, Value>) -> Result<Self, Error> {
        let mut reader = Reader::default();
        let clears_headers = body.get("custom_headers").is_some_and(Value::is_null);
        let (server_name, fields) = ConnectorFields::read_body(body, Kind::LegacyUpdate, &mut reader);
        let request = Self { server_name, fields, clears_headers };
        if reader.issues.is_empty() { Ok(request) } else { Err(Error::Invalid(reader.issues)) }
    }

    /// Whether the body sets the client of the sign-in anew: it takes it away, or brings its secret in clear, be it the same
    /// one. A mask stands for what is there.
    pub fn sets_client(&self) -> bool {
        let secret = |oauth: &OauthFields| oauth.client_secret.as_ref().is_some_and(|secret| !mask::is_mask(secret));
        self.fields.oauth.as_ref().is_some_and(|oauth| oauth.is_empty() || secret(oauth))
    }

    /// The configuration that `server` gets; `None` when the body changes none.
    pub fn connector(self, server: &Server) -> Result<Option<Connector>, Error> {
        if self.fields.is_empty() && !self.clears_headers {
            return Ok(None);
        }
        if let Err(unreadable) = &server.config.0
            && unreadable.is_sealed()
        {
            return Err(Error::Sealed(*unreadable));
        }
        let sets_client = self.sets_client();
        let mut reader = Reader::default();
        let current = server.config.0.as_ref().ok().cloned().map(ConnectorFields::from);
        let (server_type, mut old) = self.fields.family(current, server.server_type);
        if self.clears_headers {
            old.custom_headers = None;
        }
        let fields = self.fields.unmask(&old, &mut reader);
        let connector = fields.over(old, server_type).build(&mut reader);
        match connector {
            Some(connector) if reader.issues.is_empty() => {
                // A client that is set anew ends the session, too.
                Ok(Some(connector).filter(|new| sets_client || server.config.0.as_ref().ok() != Some(new)))
            }
            _ => Err(Error::Invalid(reader.issues)),
        }
    }
}

/// Collects what is wrong with a body.
#[derive(Default)]
struct Reader {
    issues: Vec<Issue>,
}

impl Reader {
    fn issue(&mut self, loc: &[&str], msg: &str) {
        self.push(loc.iter().map(|step| json!(step)).collect(), msg);
    }

    fn push(&mut self, loc: Vec<Value>, msg: &str) {
        if self.issues.len() < MAX_ISSUES {
            self.issues.push(Issue { loc, msg: msg.to_owned() });
        }
    }

    /// As [`Reader::issue`], for an entry of a list or map.
    fn issue_at(&mut self, loc: Vec<&str>, entry: Value, msg: &str) {
        self.push(loc.into_iter().map(|step| json!(step)).chain([entry]).collect(), msg);
    }

    fn has_issue_at(&self, key: &str) -> bool {
        self.issues.iter().any(|issue| issue.loc.last() == Some(&json!(key)))
    }
}

/// One level of a body, whose keys are taken one by one; what is left is unknown.
struct Level<'a> {
    loc: Vec<&'a str>,
    map: Map<String, Value>,
}

impl<'a> Level<'a> {
    /// The value of a key; null is absent.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    fn at(&self, key: &'a str) -> Vec<&'a str> {
        self.loc.iter().copied().chain([key]).collect()
    }

    fn text(&mut self, key: &'a str, reader: &mut Reader) -> Option<String> {
        match self.take(key)? {
            Value::String(text) => Some(text),
            _ => {
                reader.issue(&self.at(key), "This must be a string.");
                None
            }
        }
    }

    fn list(&mut self, key: &'a str, reader: &mut Reader) -> Option<Vec<String>> {
        let Value::Array(items) = self.take(key)? else {
            reader.issue(&self.at(key), "This must be a list of strings.");
            return None;
        };
        if items.len() > MAX_ITEMS {
            reader.issue(&self.at(key), "This must have at most 256 entries.");
            return None;
        }
        let mut texts = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            match item {
                Value::String(text) if text.len() <= MAX_VALUE_BYTES => texts.push(text),
                _ => reader.issue_at(self.at(key), json!(index), ENTRY),
            }
        }
        Some(texts)
    }

    fn secrets(&mut self, key: &'a str, reader: &mut Reader) -> Option<SecretMap> {
        let Value::Object(map) = self.take(key)? else {
            reader.issue(&self.at(key), "This must be an object of strings.");
            return None;
        };
        if map.len() > MAX_ITEMS {
            reader.issue(&self.at(key), "This must have at most 256 entries.");
            return None;
        }
        let mut secrets = SecretMap::new();
        for (name, value) in map {
            match value {
                Value::String(text) if text.len() <= MAX_VALUE_BYTES => {
                    secrets.insert(name, text.into());
                }
                _ => reader.issue_at(self.at(key), json!(shown(&name)), ENTRY),
            }
        }
        Some(secrets)
    }

    fn refuse_rest(self, reader: &mut Reader) {
        for key in self.map.keys() {
            reader.issue_at(self.loc.clone(), json!(shown(key)), "Unknown field.");
        }
    }
}

/// What a body is for.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Create,
    Update,
    LegacyUpdate,
}

/// The two shapes a body can have.
#[derive(Clone, Copy, Default, PartialEq)]
enum Shape {
    #[default]
    Flat,
    /// Under this key.
    Within(&'static str),
}

/// The parts of a connector as a body names them, each absent until given.
#[derive(Default)]
struct ConnectorFields {
    shape: Shape,
    server_type: Option<ServerType>,
    command: Option<String>,
    args: Option<Vec<String>>,
    env: Option<SecretMap>,
    server_url: Option<String>,
    auth_header: Option<String>,
    auth_token: Option<Secret>,
    custom_headers: Option<SecretMap>,
    oauth: Option<OauthFields>,
}

/// The parts of an OAuth client as a body names them; none at all clear what is there.
#[derive(Default)]
struct OauthFields {
    client_id: Option<String>,
    client_secret: Option<Secret>,
    scope: Option<String>,
    grant_type: Option<GrantType>,
}

impl From<OauthClient> for OauthFields {
    fn from(OauthClient { client_id, client_secret, scope, grant_type }: OauthClient) -> Self {
        Self { client_id: Some(client_id), client_secret, scope, grant_type: Some(grant_type) }
    }
}

impl OauthFields {
    fn read(level: &mut Level<'_>, reader: &mut Reader) -> Option<Self> {
        let loc = level.at("oauth");
        let Value::Object(map) = level.take("oauth")? else {
            reader.issue(&loc, "This must be an object.");
            return None;
        };
        let mut level = Level { loc, map };
        let client_id = level.text("client_id", reader);
        let client_secret = level.text("client_secret", reader);
        let scope = level.text("scope", reader);
        let grant_type = match level.text("grant_type", reader).as_deref() {
            None => None,
            Some("authorization_code") => Some(GrantType::AuthorizationCode),
            Some("client_credentials") => Some(GrantType::ClientCredentials),
            Some(_) => {
                reader.issue(&level.at("grant_type"), "This must be authorization_code or client_credentials.");
                None
            }
        };
        // RFC 6749, appendix A: visible ASCII, with spaces between what is in a list.
        let is_text =
            |text: &str, max: usize| text.len() <= max && text.bytes().all(|byte| matches!(byte, 0x20..=0x7e));
        if client_id.as_deref().is_some_and(|id| id.is_empty() || !is_text(id, MAX_CLIENT_ID_CHARS)) {
            reader.issue(&level.at("client_id"), "A client_id has 1 to 2048 visible ASCII characters.");
        }
        if client_secret.as_deref().is_some_and(|secret| !is_text(secret, MAX_VALUE_BYTES)) {
            reader.issue(&level.at("client_secret"), "A client_secret has at most 32 KiB of visible ASCII characters.");
        }
        if scope.as_deref().is_some_and(|scope| !is_text(scope, MAX_SCOPE_CHARS)) {
            reader.issue(&level.at("scope"), "A scope has at most 4096 visible ASCII characters.");
        }
        level.refuse_rest(reader);
        Some(Self { client_id, client_secret: client_secret.map(Secret::from), scope, grant_type })
    }

    fn is_empty(&self) -> bool {
        self.client_id.is_none() && self.client_secret.is_none() && self.scope.is_none() && self.grant_type.is_none()
    }

    /// Whether what is there is the same client.
    fn is_of(&self, old: &Self) -> bool {
        self.client_id.is_none() || self.client_id == old.client_id
    }

    /// These fields over the present ones; another client starts with nothing of the old.
    fn over(self, old: Option<Self>) -> Self {
        let Some(old) = old.filter(|old| !self.is_empty() && self.is_of(old)) else { return self };
        Self {
            client_id: self.client_id.or(old.client_id),
            client_secret: self.client_secret.or(old.client_secret),
            scope: self.scope.or(old.scope),
            grant_type: self.grant_type.or(old.grant_type),
        }
    }

    fn build(self, loc: Vec<&'static str>, reader: &mut Reader) -> Option<OauthClient> {
        if self.is_empty() {
            return None;
        }
        if self.client_id.is_none() {
            reader.issue_at(loc.clone(), json!("client_id"), "This field is required.");
        }
        let client_secret = self.client_secret.filter(|secret| !secret.expose().is_empty());
        let grant_type = self.grant_type.unwrap_or_default();
        if grant_type == GrantType::ClientCredentials && client_secret.is_none() {
            reader.issue_at(loc, json!("client_secret"), "A client that signs in as itself needs a client_secret.");
        }
        let scope = self.scope.filter(|scope| !scope.trim().is_empty());
        Some(OauthClient { client_id: self.client_id?, client_secret, scope, grant_type })
    }
}

impl From<Connector> for ConnectorFields {
    fn from(connector: Connector) -> Self {
        let mut fields = Self { server_type: Some(connector.server_type()), ..Self::default() };
        match connector {
            Connector::Stdio(Stdio { command, args, env }) => {
                (fields.command, fields.args, fields.env) = (Some(command), Some(args), env);
            }
            Connector::Sse(remote) | Connector::StreamableHttp(remote) => {
                fields.server_url = Some(remote.server_url);
                fields.auth_header = remote.auth_header;
                fields.auth_token = remote.auth_token;
                fields.custom_headers = remote.custom_headers;
                fields.oauth = remote.oauth.map(OauthFields::from);
            }
        }
        fields
    }
}

impl ConnectorFields {
    fn is_empty(&self) -> bool {
        self.server_type.is_none() && !self.is_stdio() && !self.is_remote()
    }

    fn is_stdio(&self) -> bool {
        self.command.is_some() || self.args.is_some() || self.env.is_some()
    }

    fn is_remote(&self) -> bool {
        self.server_url.is_some()
            || self.auth_header.is_some()
            || self.auth_token.is_some()
            || self.custom_headers.is_some()
            || self.oauth.is_some()
    }

    /// Reads a body of either shape: the server's name, if it is given, and the fields of its connector.
    fn read_body(mut body: Map<String, Value>, kind: Kind, reader: &mut Reader) -> (Option<String>, Self) {
        let mut take = |key| Some((key, body.shift_remove(key).filter(|config| !config.is_null())?));
        let command = if kind == Kind::LegacyUpdate { take("stdio_config") } else { None };
        let config = take("config");
        if command.is_some() && config.is_some() {
            reader.issue(&["body", "stdio_config"], "Give either config or stdio_config, not both.");
        }
        let is_command = command.is_some();
        let mut top = Level { loc: vec!["body"], map: body };
        let name = top.text("server_name", reader).and_then(|name| valid_name(&name, reader));
        let (shape, mut level) = match command.or(config) {
            None => (Shape::Flat, Level { loc: vec!["body"], map: std::mem::take(&mut top.map) }),
            Some((key, Value::Object(map))) => (Shape::Within(key), Level { loc: vec!["body", key], map }),
            Some((key, _)) => {
                reader.issue(&["body", key], "This must be an object.");
                (Shape::Within(key), Level { loc: vec!["body", key], map: Map::new() })
            }
        };
        if is_command {
            // Letta wants a name there, and does nothing with it.
            level.text("server_name", reader);
        }
        // With `config`, whatever else stands beside it belongs to the other shape or to none.
        top.refuse_rest(reader);
        let mut server_type = read_type(&mut level, reader);
        if is_command && server_type.replace(ServerType::Stdio).is_some_and(|other| other != ServerType::Stdio) {
            reader.issue(&level.at("type"), "What stands in stdio_config is a stdio server.");
        }
        let fields = Self {
            shape,
            server_type,
            command: level.text("command", reader),
            args: level.list("args", reader),
            env: level.secrets("env", reader),
            server_url: level.text("server_url", reader),
            auth_header: level.text("auth_header", reader),
            auth_token: read_token(&mut level, kind != Kind::Create, reader),
            custom_headers: level.secrets("custom_headers", reader),
            oauth: OauthFields::read(&mut level, reader),
        };
        level.refuse_rest(reader);
        (name, fields)
    }

    /// Which type a server of `current_type` gets, and which of its present fields it may keep. Only a named type changes
    /// the type, and a stdio server that becomes a remote one, or the reverse, starts with nothing of the old.
    fn family(&self, current: Option<Self>, current_type: ServerType) -> (ServerType, Self) {
        let server_type = self.server_type.unwrap_or(current_type);
        let same_family = (server_type == ServerType::Stdio) == (current_type == ServerType::Stdio);
        (server_type, current.filter(|_| same_family).unwrap_or_default())
    }

    /// These fields over the present ones.
    fn over(self, old: Self, server_type: ServerType) -> Self {
        Self {
            shape: self.shape,
            server_type: Some(server_type),
            command: self.command.or(old.command),
            args: self.args.or(old.args),
            env: self.env.or(old.env),
            server_url: self.server_url.or(old.server_url),
            auth_header: self.auth_header.or(old.auth_header),
            auth_token: self.auth_token.or(old.auth_token),
            custom_headers: self.custom_headers.or(old.custom_headers),
            oauth: match self.oauth {
                Some(oauth) => Some(oauth.over(old.oauth)),
                None => old.oauth,
            },
        }
    }

    /// Where a field of these stands in the body.
    fn at(&self, key: &'static str) -> Vec<&'static str> {
        match self.shape {
            Shape::Within(part) => vec!["body", part, key],
            Shape::Flat => vec!["body", key],
        }
    }

    fn oauth_secret(&self) -> Option<&Secret> {
        self.oauth.as_ref()?.client_secret.as_ref()
    }

    /// What is new has no masks: they would stand for nothing (CONTRACT row 6).
    fn refuse_masks(&self, reader: &mut Reader) {
        if self.server_url.as_deref().is_some_and(mask::is_masked_url) {
            reader.issue(&self.at("server_url"), STRAY_MASK);
        }
        if self.auth_token.as_ref().is_some_and(mask::is_mask) {
            reader.issue(&self.at("auth_token"), STRAY_MASK);
        }
        if self.oauth_secret().is_some_and(mask::is_mask) {
            reader.issue_at(self.at("oauth"), json!("client_secret"), STRAY_MASK);
        }
        for (key, map) in [("custom_headers", &self.custom_headers), ("env", &self.env)] {
            for (name, _) in map.iter().flatten().filter(|(_, value)| mask::is_mask(value)) {
                reader.issue_at(self.at(key), json!(shown(name)), STRAY_MASK);
            }
        }
        let args = self.args.iter().flatten().enumerate();
        for (place, _) in args.filter(|(_, arg)| mask::is_masked_arg(arg)) {
            reader.issue_at(self.at("args"), json!(place), STRAY_MASK);
        }
    }

    /// These fields with what their masks stand for in `old` (CONTRACT row 6).
    fn unmask(mut self, old: &Self, reader: &mut Reader) -> Self {
        let mut moved = false;
        if let (Some(url), Some(stored)) = (&self.server_url, &old.server_url) {
            moved = !mask::same_origin(url, stored);
            if mask::is_masked_url(url) && !moved {
                match mask::unmasked_url(url, stored) {
                    Some(unmasked) => self.server_url = Some(unmasked),
                    None => reader.issue(&self.at("server_url"), STRAY_MASK),
                }
            }
        }
        if self.server_url.as_deref().is_some_and(mask::is_masked_url) && !reader.has_issue_at("server_url") {
            reader.issue(&self.at("server_url"), if moved { MOVED_MASK } else { STRAY_MASK });
        }
        let unmasked = |given: &Secret, stored: Option<&Secret>| match stored {
            Some(_) if moved => Err(MOVED_MASK),
            stored => stored.and_then(|stored| mask::unmasked_value(given, stored)).ok_or(STRAY_MASK),
        };
        if let Some(given) = self.auth_token.as_ref().filter(|token| mask::is_mask(token)) {
            match unmasked(given, old.auth_token.as_ref()) {
                Ok(token) => self.auth_token = Some(token),
                Err(msg) => reader.issue(&self.at("auth_token"), msg),
            }
        }
        if let Some(given) = self.oauth_secret().filter(|secret| mask::is_mask(secret)) {
            let same = old.oauth.as_ref().filter(|old| self.oauth.as_ref().is_some_and(|oauth| oauth.is_of(old)));
            match unmasked(given, same.and_then(|old| old.client_secret.as_ref())) {
                Ok(secret) => self.oauth.iter_mut().for_each(|oauth| oauth.client_secret = Some(secret.clone())),
                Err(msg) => reader.issue_at(self.at("oauth"), json!("client_secret"), msg),
            }
        }
        let (headers, env) = (self.at("custom_headers"), self.at("env"));
        for (name, value) in self.custom_headers.iter_mut().flatten().filter(|(_, value)| mask::is_mask(value)) {
            let stored = old.custom_headers.iter().flatten().find(|(other, _)| other.eq_ignore_ascii_case(name));
            match unmasked(value, stored.map(|(_, stored)| stored)) {
                Ok(stored) => *value = stored,
                Err(msg) => reader.issue_at(headers.clone(), json!(shown(name)), msg),
            }
        }
        for (name, value) in self.env.iter_mut().flatten().filter(|(_, value)| mask::is_mask(value)) {
            match unmasked(value, old.env.as_ref().and_then(|env| env.get(name))) {
                Ok(stored) => *value = stored,
                Err(msg) => reader.issue_at(env.clone(), json!(shown(name)), msg),
            }
        }
        if let Some(args) = self.args.take() {
            let (args, lost) = mask::unmasked_args(args, old.args.as_deref().unwrap_or_default());
            for place in lost {
                reader.issue_at(self.at("args"), json!(place), STRAY_MASK);
            }
            self.args = Some(args);
        }
        self
    }

    /// The connector these fields make, if they make one; a missing type is found from the fields (CONTRACT row 2).
    fn build(self, reader: &mut Reader) -> Option<Connector> {
        let base = match self.shape {
            Shape::Within(part) => vec!["body", part],
            Shape::Flat => vec!["body"],
        };
        let at = |key: &'static str| base.iter().copied().chain([key]).collect::<Vec<_>>();
        let server_type = match (self.server_type, self.is_stdio(), self.is_remote()) {
            (Some(server_type), ..) => server_type,
            (None, true, true) => {
                reader.issue(&at("server_url"), "Give either command or server_url, not both.");
                return None;
            }
            (None, true, false) => ServerType::Stdio,
            (None, false, true) if self.shape == Shape::Flat => ServerType::Sse,
            (None, false, true) => ServerType::StreamableHttp,
            (None, false, false) => {
                // A body with a misspelt or mistyped field has been told so already.
                if reader.issues.iter().all(|issue| issue.loc.last() == Some(&json!("server_name"))) {
                    reader.issue(&base, "Give a command (stdio) or a server_url (sse, streamable_http).");
                }
                return None;
            }
        };
        match server_type {
            ServerType::Stdio => {
                let foreign = [
                    ("server_url", self.server_url.is_some()),
                    ("auth_header", self.auth_header.is_some()),
                    ("auth_token", self.auth_token.is_some()),
                    ("custom_headers", self.custom_headers.is_some()),
                    ("oauth", self.oauth.is_some()),
                ];
                refuse_foreign(&foreign, "A stdio server does not take this field.", at, reader);
                let command = self.command.filter(|command| !command.trim().is_empty());
                let usable = command.as_ref().is_some_and(|command| command.chars().count() <= MAX_COMMAND_CHARS);
                if !usable && !reader.has_issue_at("command") {
                    reader.issue(&at("command"), "A stdio server needs a command of 1 to 4096 characters.");
                }
                let env = self.env.filter(|env| !env.is_empty());
                for name in env.iter().flat_map(SecretMap::keys).filter(|name| name.is_empty() || name.contains('=')) {
                    let msg = "The name of an environment variable is not empty and has no \"=\".";
                    reader.issue_at(at("env"), json!(shown(name)), msg);
                }
                Some(Connector::Stdio(Stdio { command: command?, args: self.args.unwrap_or_default(), env }))
            }
            ServerType::Sse | ServerType::StreamableHttp => {
                let foreign =
                    [("command", self.command.is_some()), ("args", self.args.is_some()), ("env", self.env.is_some())];
                refuse_foreign(&foreign, "Only a stdio server takes this field.", at, reader);
                let remote = Remote {
                    server_url: valid_url(self.server_url, &at("server_url"), reader)?,
                    auth_header: self.auth_header.filter(|name| !name.is_empty()),
                    auth_token: self.auth_token.filter(|token| !token.expose().is_empty()),
                    custom_headers: self.custom_headers.filter(|headers| !headers.is_empty()),
                    oauth: self.oauth.and_then(|oauth| oauth.build(at("oauth"), reader)),
                };
                check_headers(&remote, at, reader);
                Some(if server_type == ServerType::Sse {
                    Connector::Sse(remote)
                } else {
                    Connector::StreamableHttp(remote)
                })
            }
        }
    }
}

/// `mcp_server_type` and `type` are the same word of two generations; given both, they must agree.
fn read_type(level: &mut Level<'_>, reader: &mut Reader) -> Option<ServerType> {
    let mut found: Option<ServerType> = None;
    for key in ["mcp_server_type", "type"] {
        let Some(text) = level.text(key, reader) else { continue };
        match ServerType::from_name(&text) {
            Some(server_type) if found.is_none_or(|other| other == server_type) => found = Some(server_type),
            Some(_) => reader.issue(&level.at(key), "mcp_server_type and type differ; give one of them."),
            None => reader.issue(&level.at(key), "This must be stdio, sse or streamable_http."),
        }
    }
    found
}

/// In an update `token` is another name for `auth_token`.
fn read_token(level: &mut Level<'_>, update: bool, reader: &mut Reader) -> Option<Secret> {
    let auth_token = level.text("auth_token", reader);
    let token = if update { level.text("token", reader) } else { None };
    if auth_token.is_some() && token.is_some() {
        reader.issue(&level.at("token"), "token and auth_token are the same field; give one of them.");
    }
    auth_token.or(token).map(Secret::from)
}

fn refuse_foreign(
    fields: &[(&'static str, bool)],
    msg: &str,
    at: impl Fn(&'static str) -> Vec<&'static str>,
    reader: &mut Reader,
) {
    for (key, _) in fields.iter().filter(|(_, given)| *given) {
        reader.issue(&at(key), msg);
    }
}

fn valid_name(name: &str, reader: &mut Reader) -> Option<String> {
    let control = name.chars().any(char::is_control);
    let name = name.trim();
    if control || name.is_empty() || name.chars().count() > MAX_NAME_CHARS {
        reader.issue(&["body", "server_name"], "A name has 1 to 255 characters and no control characters.");
        return None;
    }
    Some(name.to_owned())
}

fn valid_url(url: Option<String>, loc: &[&str], reader: &mut Reader) -> Option<String> {
    let Some(url) = url else {
        if !reader.has_issue_at("server_url") {
            reader.issue(loc, "This server needs a server_url.");
        }
        return None;
    };
    match server_url(&url) {
        Ok(_) => Some(url),
        Err(error) => {
            reader.issue(loc, &error.to_string());
            None
        }
    }
}

/// Every header must be legal HTTP, none may be one that HTTP or MCP sets itself, and none may come twice.
fn check_headers(remote: &Remote, at: impl Fn(&'static str) -> Vec<&'static str>, reader: &mut Reader) {
    for (place, fault) in faults(remote) {
        let msg = fault.to_string();
        match place {
            FieldPlace::AuthHeader => reader.issue(&at("auth_header"), &msg),
            FieldPlace::AuthToken => reader.issue(&at("auth_token"), &msg),
            FieldPlace::Oauth => reader.issue(&at("oauth"), &msg),
            FieldPlace::CustomHeaders => reader.issue(&at("custom_headers"), &msg),
            FieldPlace::CustomHeader(name) => reader.issue_at(at("custom_headers"), json!(shown(name)), &msg),
        }
    }
}

/// The hash that an approval is for; without one it is for whatever definition there is.
pub fn approved_hash(mut body: Map<String, Value>) -> Result<Option<String>, Error> {
    let wrong = |key: &str, msg: &str| Err(Error::invalid(vec![json!("body"), json!(shown(key))], msg));
    let hash = match body.shift_remove("hash") {
        None | Some(Value::Null) => None,
        Some(Value::String(hash)) if hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            Some(hash.to_ascii_lowercase())
        }
        Some(_) => return wrong("hash", "This must be the definition_hash of the tool, 64 hexadecimal digits."),
    };
    match body.keys().next() {
        None => Ok(hash),
        Some(key) => wrong(key, "Unknown field."),
    }
}

/// The body of a run: `{"args": {…}}`, `{}`, or nothing.
pub fn run_arguments(mut body: Map<String, Value>) -> Result<Map<String, Value>, Error> {
    let arguments = match body.shift_remove("args") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(Error::invalid(vec![json!("body"), json!("args")], "This must be an object.")),
    };
    match body.keys().next() {
        None => Ok(arguments),
        Some(key) => Err(Error::invalid(vec![json!("body"), json!(shown(key))], "Unknown field.")),
    }
}
