//! Turns the `inputSchema` of an MCP tool into the `json_schema` that Letta keeps for it, health included.
//! Where Letta 0.16.8 has an answer, this one equals it byte for byte (CONTRACT row 12; golden vectors in
//! `tests/data`), up to the limits below. Where Letta throws and loses the tool, the tool is kept with what could be
//! understood. Every schema gets an answer; the limits hold its work, its size and its stack small, however hostile
//! the schema is, as long as the schema itself is small.

use std::{collections::HashMap, mem};

use serde::Serialize;
use serde_json::{Map, Value, json};

type Schema = Map<String, Value>;

/// The property that Letta adds to every tool.
pub const HEARTBEAT: &str = "request_heartbeat";
const HEARTBEAT_DESCRIPTION: &str = "Request an immediate heartbeat after function execution. You MUST set this value to `True` if you want to send a follow-up message or run a follow-up tool call (chain multiple tools together). If set to `False` (the default), then the chain of execution will end immediately after this function call.";

/// Schemas inside schemas that are looked at. JSON as deep as our parser takes it (128) stays below, inlined or not.
const DEPTH_LIMIT: usize = 160;

/// Schemas inside schemas through which Letta follows references.
const INLINE_DEPTH: usize = 10;

/// Bytes of JSON that inlining may add to one tool; what is over stays a `$ref`, which the kept `$defs` still explain.
/// Unrolled as deep as Letta does it, a type with two references to itself takes 250 KB, one with three 15 MB.
const INLINE_BYTES: usize = 512 * 1024;

/// Bytes of a definition's `type` that references to it take over; a larger one, copied to each, could fill the memory.
const TYPE_BYTES: usize = 256;

/// Schemas visited and alternatives compared while inlining one tool, a fraction of a second of work. What is over
/// stays as it is. Visits can multiply where bytes do not, as in a definition that is a reference to itself.
const INLINE_STEPS: usize = 1_000_000;

/// Bytes that inlining may add to all tools of one answer, and steps it may take for them: without this, thousands of
/// small hostile tools would add up to gigabytes.
const ANSWER_BYTES: usize = 16 * 1024 * 1024;
const ANSWER_STEPS: usize = 5_000_000;

/// Bytes of all warnings of one tool. Each names its whole path, so they could be far larger than the schema.
const WARNING_BYTES: usize = 64 * 1024;

const UNIONS: [&str; 3] = ["anyOf", "oneOf", "allOf"];

/// What is left for inlining in one answer.
pub struct Room {
    bytes: usize,
    steps: usize,
}

impl Default for Room {
    fn default() -> Self {
        Self { bytes: ANSWER_BYTES, steps: ANSWER_STEPS }
    }
}

/// Letta's `json_schema` of one MCP tool: `name`, `description`, `parameters` and, unless `input_schema` is `{}`,
/// `mcp:SCHEMA_STATUS` and `mcp:SCHEMA_WARNINGS` (CONTRACT row 12).
///
/// What makes Letta throw is answered like this:
///
/// | in `input_schema` | in `parameters` | health |
/// |---|---|---|
/// | not an object itself | as of `{}` | INVALID |
/// | root `properties` or `required` null | as if absent | by the rest |
/// | root `properties` not an object, root `required` not a list | as if absent | INVALID |
/// | a property or alternative that is not an object (`true`) | as it is | INVALID |
/// | `$defs` or one of them not an object, a `$ref` not a string | as it is, and resolves to nothing | by the rest |
/// | `minItems` not a number | as it is | as if absent |
///
/// An `anyOf` that is not a list, which Letta takes apart into its letters or keys, stays as it is too and is INVALID. Of
/// alternatives that differ in `1` and `1.0`, or `1` and `true`, Letta takes one for the other; here they differ.
///
/// What inlining takes is taken from `room`; when that is used up, references stay as they are.
pub fn json_schema(name: &str, description: Option<&str>, input_schema: &Value, room: &mut Room) -> Value {
    let parameters = parameters(input_schema, room);
    let is_empty = input_schema.as_object().is_some_and(Map::is_empty);
    let health = (!is_empty).then(|| Health::of(input_schema, &parameters));

    let mut tool = json!({"name": name, "description": description, "parameters": parameters});
    if let Some(health) = health {
        tool["mcp:SCHEMA_STATUS"] = health.status.name().into();
        tool["mcp:SCHEMA_WARNINGS"] = health.warnings.into();
    }
    tool
}

/// An `inputSchema` as Letta shows it in the live list of a server's tools, and how well it suits OpenAI's strict mode as it
/// stands there; `{}` has no health (docs/CONTRACT.md, normalisation, A and B).
pub fn listed_schema(input_schema: &Value) -> (Value, Option<Health>) {
    let mut schema = input_schema.as_object().cloned().unwrap_or_default();
    let is_empty = schema.is_empty();
    normalise(&mut schema);
    let health = (!is_empty).then(|| Health::of(input_schema, &schema));
    (schema.into(), health)
}

/// Whether the tool itself declares `property`, at its root or in an alternative of the root. `request_heartbeat`,
/// which [`json_schema`] adds to every tool, is taken out of a run's arguments unless this says yes (CONTRACT row 13).
pub fn declares(input_schema: &Value, property: &str) -> bool {
    declares_within(input_schema, property, DEPTH_LIMIT)
}

fn declares_within(schema: &Value, property: &str, depth: usize) -> bool {
    let own = || schema.get("properties").and_then(Value::as_object).is_some_and(|own| own.contains_key(property));
    let alternatives = || UNIONS.iter().filter_map(|union| schema.get(union)?.as_array()).flatten();
    depth > 0 && (own() || alternatives().any(|alternative| declares_within(alternative, property, depth - 1)))
}

fn parameters(input_schema: &Value, room: &mut Room) -> Schema {
    let mut schema = input_schema.as_object().cloned().unwrap_or_default();
    // Twice, as Letta does: the order of its keys depends on it.
    normalise(&mut schema);
    schema.entry("type").or_insert_with(|| "object".into());
    schema.entry("properties").or_insert_with(|| json!({}));
    normalise(&mut schema);
    schema.entry("required").or_insert_with(|| json!([]));

    let mut properties = match schema.get_mut("properties") {
        Some(Value::Object(properties)) => mem::take(properties),
        _ => Map::new(),
    };
    Inliner::within(room, &schema).inline_each(properties.values_mut(), 0);
    properties.insert(HEARTBEAT.into(), json!({"type": "boolean", "description": HEARTBEAT_DESCRIPTION}));
    schema.insert("properties".into(), properties.into());

    let mut required = match schema.get_mut("required") {
        Some(Value::Array(required)) => mem::take(required),
        _ => Vec::new(),
    };
    if !required.iter().any(|name| name == HEARTBEAT) {
        required.push(HEARTBEAT.into());
    }
    schema.insert("required".into(), required.into());
    schema
}

/// Closes objects (`additionalProperties: false`) and gives references a type, where Letta does it: not inside `oneOf`,
/// `allOf`, `patternProperties` or `definitions`.
fn normalise(schema: &mut Schema) {
    let types = definitions(schema)
        .filter_map(|(name, definition)| Some((name.to_owned(), definition.get("type")?.clone())))
        .filter(|(_, named)| named.to_string().len() <= TYPE_BYTES)
        .collect();
    if let Some(Value::Object(definitions)) = schema.get_mut("$defs") {
        for definition in definitions.values_mut().filter_map(Value::as_object_mut) {
            normalise_object(definition, &types, 0);
        }
    }
    normalise_object(schema, &types, 0);
}

fn normalise_object(schema: &mut Schema, types: &HashMap<String, Value>, depth: usize) {
    if depth == DEPTH_LIMIT {
        return;
    }
    if has_type(schema, "object") {
        schema.entry("additionalProperties").or_insert(Value::Bool(false));
    }
    if let Some(Value::Object(properties)) = schema.get_mut("properties") {
        for property in properties.values_mut().filter_map(Value::as_object_mut) {
            if property.contains_key("$ref") {
                name_type(property, types);
            } else {
                normalise_property(property, types, depth + 1);
            }
        }
    }
    if let Some(Value::Object(items)) = schema.get_mut("items")
        && has_type(items, "object")
    {
        normalise_object(items, types, depth + 1);
    }
}

fn normalise_property(property: &mut Schema, types: &HashMap<String, Value>, depth: usize) {
    if has_type(property, "object") {
        normalise_object(property, types, depth);
    }
    if has_type(property, "array")
        && let Some(Value::Object(items)) = property.get_mut("items")
    {
        normalise_part(items, types, depth);
    }
    if let Some(Value::Array(alternatives)) = property.get_mut("anyOf") {
        for alternative in alternatives.iter_mut().filter_map(Value::as_object_mut) {
            normalise_part(alternative, types, depth);
        }
    }
}

fn normalise_part(part: &mut Schema, types: &HashMap<String, Value>, depth: usize) {
    if part.contains_key("$ref") {
        name_type(part, types);
    }
    if has_type(part, "object") {
        normalise_object(part, types, depth);
    }
}

/// Gives a reference the type of what it names; what cannot be found counts as an object.
fn name_type(reference: &mut Schema, types: &HashMap<String, Value>) {
    if !reference.contains_key("type") {
        let named = referenced(reference).and_then(|name| types.get(name)).cloned();
        reference.insert("type".into(), named.unwrap_or_else(|| "object".into()));
    }
}

fn has_type(schema: &Schema, name: &str) -> bool {
    schema.get("type").is_some_and(|own| own == name)
}

fn definitions(schema: &Schema) -> impl Iterator<Item = (&str, &Schema)> {
    let definitions = schema.get("$defs").and_then(Value::as_object).into_iter().flatten();
    definitions.filter_map(|(name, definition)| Some((name.as_str(), definition.as_object()?)))
}

/// The name in `$ref: "#/$defs/name"`. Of a longer path the last part counts, as in Letta.
fn referenced(schema: &Schema) -> Option<&str> {
    schema.get("$ref")?.as_str()?.strip_prefix("#/$defs/")?.rsplit('/').next()
}

/// Puts definitions in the place of the references to them.
struct Inliner<'a> {
    definitions: HashMap<&'a str, Vec<Keyword<'a>>>,
    bytes_left: usize,
    steps_left: usize,
    /// What it started with, and where that came from.
    granted: (usize, usize),
    room: &'a mut Room,
}

impl Drop for Inliner<'_> {
    fn drop(&mut self) {
        self.room.bytes -= self.granted.0 - self.bytes_left;
        self.room.steps -= self.granted.1 - self.steps_left;
    }
}

/// A key of a definition with its value and the size of both.
#[derive(Clone, Copy)]
struct Keyword<'a> {
    name: &'a str,
    value: &'a Value,
    bytes: usize,
}

impl<'a> Inliner<'a> {
    fn within(room: &'a mut Room, schema: &'a Schema) -> Self {
        let keyword = |(name, value): (&'a String, &'a Value)| Keyword {
            name,
            value,
            bytes: name.len() + value.to_string().len(),
        };
        let definitions =
            definitions(schema).map(|(name, definition)| (name, definition.iter().map(keyword).collect()));
        let (bytes_left, steps_left) = (room.bytes.min(INLINE_BYTES), room.steps.min(INLINE_STEPS));
        Self { definitions: definitions.collect(), bytes_left, steps_left, granted: (bytes_left, steps_left), room }
    }

    fn inline_each<'v>(&mut self, schemas: impl IntoIterator<Item = &'v mut Value>, depth: usize) {
        for schema in schemas {
            if !self.spend_steps(1) {
                return;
            }
            if let Value::Object(schema) = schema {
                self.inline(schema, depth);
            }
        }
    }

    /// Takes that many steps, if as many are left.
    fn spend_steps(&mut self, steps: usize) -> bool {
        let left = self.steps_left.checked_sub(steps);
        self.steps_left = left.unwrap_or(self.steps_left);
        left.is_some()
    }

    fn inline(&mut self, schema: &mut Schema, depth: usize) {
        if depth > INLINE_DEPTH {
            return;
        }
        if self.resolve(schema) {
            // What follows goes through the same parts once more, one level higher up, and so unrolls a recursive type
            // further than this call alone. Letta does both, and its result has exactly that shape.
            self.inline(schema, depth + 1);
        }
        if let Some(Value::Array(alternatives)) = schema.get_mut("anyOf") {
            self.inline_each(alternatives.iter_mut(), depth + 1);
            self.deduplicate(alternatives);
        }
        if let Some(Value::Object(properties)) = schema.get_mut("properties") {
            self.inline_each(properties.values_mut(), depth + 1);
        }
        self.inline_each(schema.get_mut("items"), depth + 1);
    }

    /// Replaces the `$ref` of `schema` by the keys of its definition; keys that are there win. False if there is
    /// nothing to replace, or no room for it.
    fn resolve(&mut self, schema: &mut Schema) -> bool {
        let Some(definition) = referenced(schema).and_then(|name| self.definitions.get(name)) else {
            return false;
        };
        let is_new = |keyword: &&Keyword| keyword.name == "$ref" || !schema.contains_key(keyword.name);
        let new: Vec<Keyword> = definition.iter().filter(is_new).copied().collect();
        let bytes: usize = new.iter().map(|keyword| keyword.bytes).sum();
        let steps = definition.len();
        if bytes > self.bytes_left || !self.spend_steps(steps) {
            return false;
        }
        self.bytes_left -= bytes;
        schema.shift_remove("$ref");
        for keyword in new {
            schema.insert(keyword.name.into(), keyword.value.clone());
        }
        true
    }

    /// Drops the alternatives that say what another one says, or less.
    fn deduplicate(&mut self, alternatives: &mut Vec<Value>) {
        let pairs = alternatives.len() * alternatives.len().saturating_sub(1) / 2;
        if !self.spend_steps(pairs) {
            return;
        }
        let mut kept: Vec<Value> = Vec::with_capacity(alternatives.len());
        for alternative in mem::take(alternatives) {
            let rival = kept.iter_mut().find_map(|one| Some((prefers(one, &alternative)?, one)));
            match rival {
                Some((Preference::Old, _)) => {}
                Some((Preference::New, one)) => *one = alternative,
                None => kept.push(alternative),
            }
        }
        *alternatives = kept;
    }
}

enum Preference {
    Old,
    New,
}

/// Which of two alternatives is to stay; None: both. Of two with the same type it is the one with a `format`, else the
/// larger.
fn prefers(old: &Value, new: &Value) -> Option<Preference> {
    if old == new {
        return Some(Preference::Old);
    }
    let (old, new) = (old.as_object()?, new.as_object()?);
    if !is_set(new, "type") || old.get("type") != new.get("type") {
        return None;
    }
    match (is_set(old, "format"), is_set(new, "format")) {
        (false, true) => Some(Preference::New),
        (true, false) => Some(Preference::Old),
        _ if value(old, "format") != value(new, "format") => None,
        _ if new.len() >= old.len() => Some(Preference::New),
        _ => Some(Preference::Old),
    }
}

/// The value of `key`, null if it is absent.
fn value<'a>(schema: &'a Schema, key: &str) -> &'a Value {
    schema.get(key).unwrap_or(&Value::Null)
}

/// Whether `key` has a value other than the empty ones: Letta treats these as absent.
fn is_set(schema: &Schema, key: &str) -> bool {
    match value(schema, key) {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Status {
    StrictCompliant,
    NonStrictOnly,
    Invalid,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::StrictCompliant => "STRICT_COMPLIANT",
            Self::NonStrictOnly => "NON_STRICT_ONLY",
            Self::Invalid => "INVALID",
        }
    }
}

/// Which keywords of a schema are to be checked.
enum Kind<'a> {
    Object,
    Array,
    OneOf(&'a [Value]),
    Other,
    Missing,
}

impl<'a> Kind<'a> {
    fn of(schema: &'a Schema) -> Self {
        let has = |keyword: &str| schema.contains_key(keyword);
        match value(schema, "type") {
            Value::String(name) if name == "object" => Self::Object,
            Value::String(name) if name == "array" => Self::Array,
            Value::Array(names) if !names.is_empty() => Self::OneOf(names),
            _ if is_set(schema, "type") => Self::Other,
            _ if has("properties") || has("additionalProperties") => Self::Object,
            _ if has("items") => Self::Array,
            _ if UNIONS.into_iter().any(has) => Self::Other,
            _ => Self::Missing,
        }
    }
}

/// How well a schema suits OpenAI's strict mode, by Letta's rules and in its words.
#[derive(Serialize)]
pub struct Health {
    status: Status,
    #[serde(rename = "reasons")]
    warnings: Vec<String>,
    /// Bytes left for warnings; None once a warning found no room.
    #[serde(skip)]
    room: Option<usize>,
    #[serde(skip)]
    path: String,
}

impl Health {
    fn of(input_schema: &Value, parameters: &Schema) -> Self {
        let mut health = Self {
            status: Status::StrictCompliant,
            warnings: Vec::new(),
            room: Some(WARNING_BYTES),
            path: "root".into(),
        };
        if !input_schema.is_object() {
            health.mark(Status::Invalid, |_| "Top-level schema must be a dict".into());
        }
        if !has_type(parameters, "object") {
            health.mark(Status::Invalid, |_| "Top-level schema 'type' must be 'object' for OpenAI tools".into());
        }
        // In `parameters` these two are in order already.
        if input_schema.get("properties").is_some_and(|given| !given.is_null() && !given.is_object()) {
            health.invalid("'properties' must be a dict for objects");
        }
        if input_schema.get("required").is_some_and(|given| !given.is_null() && !given.is_array()) {
            health.invalid("'required' must be a list if present");
        }
        health.check(parameters, 0);
        if health.room.is_none() {
            health.warnings.push("root: too many warnings, the others are left out".into());
        }
        health
    }

    fn non_strict(&mut self, reason: &str) {
        self.mark(Status::NonStrictOnly, |path| format!("{path}: {reason}"));
    }

    fn invalid(&mut self, reason: &str) {
        self.mark(Status::Invalid, |path| format!("{path}: {reason}"));
    }

    fn mark(&mut self, status: Status, warning: impl FnOnce(&str) -> String) {
        self.status = self.status.max(status);
        if let Some(room) = self.room {
            let warning = warning(&self.path);
            self.room = room.checked_sub(warning.len());
            if self.room.is_some() {
                self.warnings.push(warning);
            }
        }
    }

    fn check(&mut self, schema: &Schema, depth: usize) {
        if depth == DEPTH_LIMIT {
            return self.invalid("Nested too deep");
        }
        match Kind::of(schema) {
            Kind::Object => {
                if !matches!(value(schema, "properties"), Value::Object(_) | Value::Null) {
                    return self.invalid("'properties' must be a dict for objects");
                }
                self.check_object(schema, depth);
            }
            Kind::Array => self.check_array(schema, depth),
            Kind::OneOf(names) => self.check_type_names(names),
            Kind::Other => {}
            Kind::Missing => return self.invalid("Missing 'type'"),
        }
        for union in UNIONS {
            match schema.get(union) {
                Some(Value::Array(alternatives)) => {
                    for (index, alternative) in alternatives.iter().enumerate() {
                        self.check_part(&format!(".{union}[{index}]"), alternative, depth);
                    }
                }
                Some(_) => self.invalid(&format!("'{union}' must be a list")),
                None => {}
            }
        }
    }

    fn check_part(&mut self, step: &str, part: &Value, depth: usize) {
        let here = self.path.len();
        self.path.push_str(step);
        match part {
            Value::Object(schema) => self.check(schema, depth + 1),
            _ => self.invalid("Not a valid schema dict"),
        }
        self.path.truncate(here);
    }

    fn check_object(&mut self, schema: &Schema, depth: usize) {
        match schema.get("additionalProperties") {
            None => self.non_strict("'additionalProperties' not explicitly set"),
            Some(Value::Bool(false)) => {}
            Some(_) => self.non_strict("'additionalProperties' is not false (free-form object)"),
        }
        let properties = schema.get("properties").and_then(Value::as_object).filter(|own| !own.is_empty());
        match value(schema, "required") {
            Value::Null => {}
            Value::Array(required) => {
                if let Some(properties) = properties {
                    self.check_required(required, properties);
                }
            }
            _ => self.invalid("'required' must be a list if present"),
        }
        for (name, property) in properties.into_iter().flatten() {
            self.check_part(&format!(".properties.{name}"), property, depth);
        }
    }

    fn check_required(&mut self, required: &[Value], properties: &Schema) {
        for name in required {
            let spelled = spell(name);
            match name.as_str().and_then(|name| properties.get(name)) {
                None => self.invalid(&format!("required contains '{spelled}' not found in properties")),
                Some(Value::Object(property)) if allows_empty_object(property) => {
                    self.invalid(&format!("required property '{spelled}' allows empty object (OpenAI will reject)"));
                }
                Some(Value::Object(property)) if allows_empty_array(property) => {
                    self.invalid(&format!("required property '{spelled}' allows empty array (OpenAI will reject)"));
                }
                Some(_) => {}
            }
        }
    }

    fn check_array(&mut self, schema: &Schema, depth: usize) {
        match value(schema, "items") {
            Value::Null => self.invalid("'items' must be defined for arrays in strict mode"),
            items @ Value::Object(_) => self.check_part(".items", items, depth),
            _ => self.invalid("'items' must be a schema dict for arrays"),
        }
    }

    fn check_type_names(&mut self, names: &[Value]) {
        const KNOWN: [&str; 7] = ["string", "number", "integer", "boolean", "null", "array", "object"];
        for name in names {
            if !name.as_str().is_some_and(|name| KNOWN.contains(&name)) {
                self.invalid(&format!("Invalid type '{}' in type array", spell(name)));
            }
        }
    }
}

fn allows_empty_object(schema: &Schema) -> bool {
    has_type(schema, "object") && !is_set(schema, "required") && *value(schema, "additionalProperties") == false
}

fn allows_empty_array(schema: &Schema) -> bool {
    let fewest = match value(schema, "minItems") {
        Value::Number(number) => number.as_f64().unwrap_or_default(),
        Value::Bool(true) => 1.0,
        _ => 0.0,
    };
    has_type(schema, "array") && fewest <= 0.0 && value(schema, "items").is_null()
}

/// A value as Letta's messages print it; lists and objects as JSON.
fn spell(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const LETTA: [&str; 2] = [
        include_str!("../../tests/data/schema_vectors.json"),
        include_str!("../../tests/data/schema_vectors_more.json"),
    ];

    fn convert(input_schema: &Value) -> Value {
        json_schema("add", Some("adds"), input_schema, &mut Room::default())
    }

    fn status(tool: &Value) -> &str {
        tool["mcp:SCHEMA_STATUS"].as_str().unwrap()
    }

    fn heartbeat() -> Value {
        json!({"type": "boolean", "description": HEARTBEAT_DESCRIPTION})
    }

    fn object_with(name: &str, property: Value) -> Value {
        json!({"type": "object", "properties": {name: property}})
    }

    /// `depth` arrays around a string: one level of JSON for each.
    fn nested_arrays(depth: usize) -> Value {
        (0..depth).fold(json!({"type": "string"}), |items, _| json!({"type": "array", "items": items}))
    }

    #[test]
    fn equals_letta_in_every_vector() {
        let mut compared = 0;
        for vectors in LETTA {
            let vectors: Schema = serde_json::from_str(&vectors.replace("<HB>", HEARTBEAT_DESCRIPTION)).unwrap();
            for (name, vector) in &vectors {
                let tool = convert(&vector["inputSchema"]);
                if vector.get("exception").is_some() {
                    continue;
                }
                let mut expected = json!({"name": "add", "description": "adds", "parameters": vector["parameters"]});
                if !vector["status"].is_null() {
                    expected["mcp:SCHEMA_STATUS"] = vector["status"].clone();
                    expected["mcp:SCHEMA_WARNINGS"] = vector["warnings"].clone();
                }
                // As text, for the order of keys counts.
                assert_eq!(tool.to_string(), expected.to_string(), "{name}");
                compared += 1;
            }
        }
        assert_eq!(compared, 131);
    }

    #[test]
    fn the_health_in_a_live_list_equals_lettas_in_every_vector() {
        let mut compared = 0;
        for vectors in LETTA {
            let vectors: Schema = serde_json::from_str(vectors).unwrap();
            for (name, vector) in &vectors {
                let Some(expected) = vector.get("list_health") else { continue };
                let (_, health) = listed_schema(&vector["inputSchema"]);
                let health = health.map(|health| json!([health.status.name(), health.warnings]));
                assert_eq!(health.unwrap_or(Value::Null), *expected, "{name}");
                compared += 1;
            }
        }
        assert!(compared > 20, "{compared}");
    }

    #[test]
    fn a_live_list_closes_objects_and_adds_nothing() {
        let given = object_with("a", json!({"type": "object", "properties": {}}));
        let (schema, health) = listed_schema(&given);
        let closed = json!({"type": "object", "properties": {}, "additionalProperties": false});
        let mut expected = object_with("a", closed);
        expected["additionalProperties"] = json!(false);
        assert_eq!(schema.to_string(), expected.to_string());
        assert_eq!(json!(health), json!({"status": "STRICT_COMPLIANT", "reasons": []}));
        let (schema, health) = listed_schema(&json!({}));
        assert_eq!((schema, json!(health)), (json!({}), Value::Null));
    }

    #[test]
    fn a_tool_without_description_has_a_null() {
        let tool = json_schema("add", None, &json!({}), &mut Room::default());
        let expected = json!({"name": "add", "description": null, "parameters": {
            "type": "object", "properties": {HEARTBEAT: heartbeat()}, "additionalProperties": false,
            "required": [HEARTBEAT]}});
        assert_eq!(tool.to_string(), expected.to_string());
    }

    #[test]
    fn input_that_is_no_object_is_an_invalid_tool_without_arguments() {
        let empty = convert(&json!({}));
        for input_schema in [json!(null), json!(true), json!("object"), json!([1])] {
            let tool = convert(&input_schema);
            assert_eq!(tool["parameters"], empty["parameters"]);
            assert_eq!(status(&tool), "INVALID");
            assert_eq!(tool["mcp:SCHEMA_WARNINGS"], json!(["Top-level schema must be a dict"]));
        }
    }

    #[test]
    fn root_properties_null_is_as_if_absent() {
        let tool = convert(&json!({"properties": null, "type": "object"}));
        assert_eq!(
            tool["parameters"].to_string(),
            json!({"properties": {HEARTBEAT: heartbeat()}, "type": "object", "additionalProperties": false,
                "required": [HEARTBEAT]})
            .to_string()
        );
        assert_eq!(status(&tool), "STRICT_COMPLIANT");
    }

    #[test]
    fn root_properties_of_another_type_are_replaced_and_invalid() {
        for properties in [json!([1]), json!("a"), json!(true)] {
            let tool = convert(&json!({"type": "object", "properties": properties}));
            assert_eq!(tool["parameters"]["properties"], json!({HEARTBEAT: heartbeat()}));
            assert_eq!(status(&tool), "INVALID");
            assert_eq!(tool["mcp:SCHEMA_WARNINGS"], json!(["root: 'properties' must be a dict for objects"]));
        }
    }

    #[test]
    fn root_required_null_is_as_if_absent() {
        let tool = convert(&json!({"type": "object", "required": null}));
        assert_eq!(tool["parameters"]["required"], json!([HEARTBEAT]));
        assert_eq!(status(&tool), "STRICT_COMPLIANT");
    }

    #[test]
    fn root_required_of_another_type_is_replaced_and_invalid() {
        for required in [json!("a"), json!(HEARTBEAT), json!({"a": 1}), json!(true)] {
            let tool = convert(&json!({"type": "object", "required": required}));
            assert_eq!(tool["parameters"]["required"], json!([HEARTBEAT]));
            assert_eq!(status(&tool), "INVALID");
            assert_eq!(tool["mcp:SCHEMA_WARNINGS"], json!(["root: 'required' must be a list if present"]));
        }
    }

    #[test]
    fn a_property_that_is_no_object_stays_and_is_invalid() {
        for property in [json!(true), json!(false), json!(null), json!(5), json!(["$ref"]), json!("$ref")] {
            let tool = convert(&object_with("a", property.clone()));
            assert_eq!(tool["parameters"]["properties"]["a"], property);
            assert_eq!(status(&tool), "INVALID");
            assert_eq!(tool["mcp:SCHEMA_WARNINGS"], json!(["root.properties.a: Not a valid schema dict"]));
        }
    }

    #[test]
    fn an_alternative_that_is_no_object_stays_and_is_invalid() {
        let tool = convert(&object_with("a", json!({"anyOf": [true, {"type": "null"}]})));
        assert_eq!(tool["parameters"]["properties"]["a"], json!({"anyOf": [true, {"type": "null"}]}));
        assert_eq!(tool["mcp:SCHEMA_WARNINGS"], json!(["root.properties.a.anyOf[0]: Not a valid schema dict"]));
    }

    #[test]
    fn any_of_that_is_no_list_stays_and_is_invalid() {
        for any_of in [json!("text"), json!({"type": "string"}), json!(null)] {
            let tool = convert(&object_with("a", json!({"anyOf": any_of})));
            assert_eq!(tool["parameters"]["properties"]["a"], json!({"anyOf": any_of}));
            assert_eq!(status(&tool), "INVALID");
            assert_eq!(tool["mcp:SCHEMA_WARNINGS"], json!(["root.properties.a: 'anyOf' must be a list"]));
        }
    }

    #[test]
    fn nested_properties_of_another_type_stay() {
        let tool = convert(&object_with("a", json!({"type": "object", "properties": [1]})));
        assert_eq!(tool["parameters"]["properties"]["a"]["properties"], json!([1]));
        assert_eq!(tool["mcp:SCHEMA_WARNINGS"], json!(["root.properties.a: 'properties' must be a dict for objects"]));

        let tool = convert(&object_with("a", json!({"type": "object", "properties": null})));
        assert_eq!(tool["parameters"]["properties"]["a"]["properties"], json!(null));
        assert_eq!(status(&tool), "STRICT_COMPLIANT");
    }

    #[test]
    fn a_reference_that_resolves_to_nothing_stays() {
        for (reference, defs) in [
            (json!(5), json!({"X": {"type": "string"}})),
            (json!(null), json!({"X": {"type": "string"}})),
            (json!("#/$defs/X"), json!({"X": true})),
            (json!("#/$defs/X"), json!({"X": ["type"]})),
            (json!("#/$defs/X"), json!(true)),
            (json!("#/$defs/X"), json!(null)),
        ] {
            let tool = convert(&json!({"type": "object", "properties": {"a": {"$ref": reference}}, "$defs": defs}));
            assert_eq!(tool["parameters"]["properties"]["a"], json!({"$ref": reference, "type": "object"}));
            assert_eq!(tool["parameters"]["$defs"], defs);
            assert_eq!(status(&tool), "NON_STRICT_ONLY");
        }
    }

    #[test]
    fn min_items_that_is_no_number_counts_as_absent() {
        for min_items in [json!("1"), json!(null), json!([1])] {
            let mut schema = object_with("a", json!({"type": "array", "minItems": min_items}));
            schema["required"] = json!(["a"]);
            let warnings = &convert(&schema)["mcp:SCHEMA_WARNINGS"];
            assert_eq!(warnings[0], "root: required property 'a' allows empty array (OpenAI will reject)");
        }
    }

    #[test]
    fn a_required_name_that_is_no_string_is_unknown() {
        let mut schema = object_with("a", json!({"type": "string"}));
        schema["required"] = json!([["a"], {"a": 1}]);
        let tool = convert(&schema);
        assert_eq!(tool["parameters"]["required"], json!([["a"], {"a": 1}, HEARTBEAT]));
        assert_eq!(
            tool["mcp:SCHEMA_WARNINGS"],
            json!([
                "root: required contains '[\"a\"]' not found in properties",
                "root: required contains '{\"a\":1}' not found in properties",
            ])
        );
    }

    #[test]
    fn a_recursive_type_is_unrolled_within_bounds() {
        let unrolled = |branches: usize| {
            let branch = |index| (format!("branch{index}"), json!({"$ref": "#/$defs/Tree"}));
            let tree = json!({"type": "object", "properties": (0..branches).map(branch).collect::<Schema>()});
            let root = json!({"type": "object", "properties": {"root": {"$ref": "#/$defs/Tree"}},
                "$defs": {"Tree": tree}});
            convert(&root)["parameters"].to_string().len()
        };
        // As large as Letta's; with three references Letta's takes 15 MB, with more soon all memory.
        assert_eq!((unrolled(1), unrolled(2)), (1_418, 250_410));
        for branches in [3, 10, 100] {
            assert!(unrolled(branches) < INLINE_BYTES * 3 / 2, "{branches}");
        }
    }

    #[test]
    fn a_type_that_refers_to_itself_twice_over_ends() {
        let branches: Schema = (0..100).map(|index| (index.to_string(), json!({"$ref": "#/$defs/X"}))).collect();
        let own = json!({"$ref": "#/$defs/X", "type": "object", "properties": branches});
        let tool = convert(&json!({"type": "object", "properties": {"a": own}, "$defs": {"X": own}}));
        assert!(tool.to_string().len() < INLINE_BYTES * 3 / 2);
    }

    #[test]
    fn a_large_definition_is_inlined_only_as_often_as_there_is_room() {
        let large = json!({"type": "string", "description": "x".repeat(INLINE_BYTES / 4)});
        let properties: Schema = (0..1_000).map(|index| (index.to_string(), json!({"$ref": "#/$defs/X"}))).collect();
        let tool = convert(&json!({"type": "object", "properties": properties, "$defs": {"X": large}}));
        let inlined = tool["parameters"]["properties"].as_object().unwrap().values();
        assert_eq!(inlined.filter(|property| **property == large).count(), 3);
        let kept = &tool["parameters"]["properties"]["999"];
        assert_eq!(*kept, json!({"$ref": "#/$defs/X", "type": "string"}));
    }

    #[test]
    fn a_huge_type_is_not_copied_to_references() {
        let named = |bytes| {
            let schema = json!({"type": "object", "properties": {"a": {"oneOf": [], "$ref": "#/$defs/X"}},
                "$defs": {"X": {"type": "x".repeat(bytes)}}});
            convert(&schema)["parameters"]["properties"]["a"]["type"].as_str().unwrap().len()
        };
        assert_eq!(named(TYPE_BYTES - 2), TYPE_BYTES - 2);
        assert_eq!(named(TYPE_BYTES), "object".len());
    }

    #[test]
    fn a_very_long_union_stays_as_it_is() {
        let kept = |count: usize| {
            let alternatives = vec![json!({"type": "string"}); count];
            let tool = convert(&object_with("a", json!({"anyOf": alternatives})));
            tool["parameters"]["properties"]["a"]["anyOf"].as_array().unwrap().len()
        };
        assert_eq!(kept(1_000), 1);
        assert_eq!(kept(2_000), 2_000);
    }

    #[test]
    fn the_deepest_json_of_the_parser_is_understood() {
        let deepest = object_with("a", nested_arrays(124)).to_string();
        assert!(serde_json::from_str::<Value>(&object_with("a", nested_arrays(125)).to_string()).is_err());
        let tool = convert(&serde_json::from_str(&deepest).unwrap());
        assert_eq!(status(&tool), "STRICT_COMPLIANT");

        let list =
            json!({"type": "object", "properties": {"deep": nested_arrays(122), "next": {"$ref": "#/$defs/List"}}});
        let tool = convert(&json!({"properties": {"list": {"$ref": "#/$defs/List"}}, "$defs": {"List": list}}));
        assert_eq!(status(&tool), "NON_STRICT_ONLY");
    }

    #[test]
    fn deeper_schemas_are_invalid_and_harmless() {
        let tool = convert(&object_with("a", nested_arrays(DEPTH_LIMIT - 2)));
        assert_eq!(status(&tool), "STRICT_COMPLIANT");

        let tool = convert(&object_with("a", nested_arrays(DEPTH_LIMIT + 20)));
        assert_eq!(status(&tool), "INVALID");
        let warning = tool["mcp:SCHEMA_WARNINGS"][0].as_str().unwrap();
        assert!(warning.ends_with(".items: Nested too deep"), "{warning}");

        let mut objects = json!({"type": "string"});
        let mut alternatives = object_with("a", json!({}));
        for _ in 0..DEPTH_LIMIT + 20 {
            objects = object_with("a", objects);
            alternatives = json!({"anyOf": [alternatives]});
        }
        assert_eq!(status(&convert(&objects)), "INVALID");
        assert_eq!(status(&convert(&alternatives)), "INVALID");
        assert!(!declares(&alternatives, "a"));
    }

    #[test]
    fn many_hostile_tools_share_the_room_of_one_answer() {
        let twice = json!({"$ref": "#/$defs/a"});
        let schema = json!({
            "type": "object",
            "$defs": {"a": {"type": "object", "properties": {"x": twice, "y": twice, "z": twice}}},
            "properties": {"p": twice},
        });
        let mut room = Room::default();
        let sizes = (0..100).map(|_| json_schema("t", None, &schema, &mut room).to_string().len());
        let all: usize = sizes.sum();
        assert!(all < 2 * ANSWER_BYTES, "{all}");
        assert!(room.bytes < ANSWER_BYTES / 100, "{}", room.bytes);
    }

    #[test]
    fn warnings_are_bounded() {
        let properties: Schema = (0..5_000).map(|index| (index.to_string(), json!({}))).collect();
        let long_name = "x".repeat(WARNING_BYTES / 2);
        let tool = convert(&object_with(&long_name, json!({"type": "object", "properties": properties})));
        assert_eq!(status(&tool), "INVALID");
        let warnings = tool["mcp:SCHEMA_WARNINGS"].as_array().unwrap();
        assert_eq!(warnings.len(), 2);
        assert_eq!(warnings[1], "root: too many warnings, the others are left out");
    }

    #[test]
    fn declares_what_the_tool_has_itself() {
        let plain = object_with("a", json!({"type": "string"}));
        assert!(declares(&plain, "a"));
        assert!(!declares(&plain, HEARTBEAT));
        assert!(declares(&object_with(HEARTBEAT, json!({})), HEARTBEAT));
        assert!(declares(&json!({"allOf": [{}, {"oneOf": [plain]}]}), "a"));
        assert!(!declares(&object_with("b", plain), "a"));
        for odd in [json!(null), json!([]), json!({"properties": null}), json!({"properties": ["a"], "anyOf": 1})] {
            assert!(!declares(&odd, "a"));
        }
    }
}
