//! What a new list of tools means for those that are kept: which rows are written, which definitions changed, and which
//! of them wait for an approval.
//!
//! A server may show one definition to whoever registers it, and another one later. Under `--tool-changes hold` nothing
//! that came after the first list is run before somebody approved it: a changed definition, a new tool, one under another
//! name, one that was gone for a while. What was approved is known by its hash, also for tools that are gone.

use std::collections::HashMap;

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value, json};
use sqlx::FromRow;

use crate::model::{Changed, Offered, Tool, ToolChanges, definition_hash, sha256_hex};

/// How many changes of one tool are kept, how many keys of each, and the characters of a key.
const MAX_CHANGES: usize = 10;
const MAX_KEYS: usize = 20;
const MAX_KEY: usize = 64;

/// A tool that its server does not offer now.
#[derive(Debug, FromRow)]
pub(super) struct Gone {
    pub name_digest: String,
    pub definition_hash: String,
    pub approved_hash: Option<String>,
    pub changes: String,
}

/// What is done with a definition that nobody has seen before.
#[derive(Clone, Copy)]
pub(super) struct Trust {
    /// The first list of a server is what was registered, whatever was known of it before.
    pub is_first: bool,
    /// Whether others wait for an approval.
    pub hold: bool,
}

/// A tool as its row shall be.
pub(super) struct Row<'a> {
    pub position: i64,
    pub offered: &'a Offered,
    pub hash: String,
    pub approved_hash: Option<String>,
    pub changes: String,
}

/// The rows a sync writes, and what its answer says of them.
pub(super) struct Plan<'a> {
    pub delete: Vec<&'a Tool>,
    pub update: Vec<(&'a Tool, Row<'a>)>,
    pub insert: Vec<Row<'a>>,
    /// The digests of the names among `gone` that are offered again.
    pub returned: Vec<String>,
    pub changes: ToolChanges,
}

impl<'a> Plan<'a> {
    pub fn new(current: &'a [Tool], gone: Vec<Gone>, offered: &'a [Offered], trust: Trust, now: DateTime<Utc>) -> Self {
        let changes = ToolChanges::default();
        let mut plan = Self { delete: vec![], update: vec![], insert: vec![], returned: vec![], changes };
        let mut known: HashMap<&str, &Tool> = current.iter().map(|tool| (tool.name.as_str(), tool)).collect();
        let mut gone: HashMap<_, _> = gone.into_iter().map(|gone| (gone.name_digest.clone(), gone)).collect();
        for (position, offered) in (0..).zip(offered) {
            let row = match known.remove(offered.name.as_str()) {
                Some(tool) => plan.keep(tool, position, offered, trust, now),
                None => plan.add(gone.remove(&sha256_hex(&offered.name)), position, offered, trust, now),
            };
            if row {
                plan.changes.held.push(offered.name.clone());
            }
        }
        plan.delete = current.iter().filter(|tool| known.contains_key(tool.name.as_str())).collect();
        plan.changes.deleted = plan.delete.iter().map(|tool| tool.name.clone()).collect();
        plan
    }

    /// Nothing but the time of the sync is written.
    pub fn is_empty(&self) -> bool {
        self.delete.is_empty() && self.update.is_empty() && self.insert.is_empty()
    }

    /// Whether the tool waits for an approval.
    fn keep(&mut self, tool: &'a Tool, position: i64, offered: &'a Offered, trust: Trust, now: DateTime<Utc>) -> bool {
        let old = tool.hash();
        let hash = match tool.definition == offered.definition {
            true => old.clone().into_owned(),
            false => definition_hash(&offered.definition),
        };
        let mut changes = tool.changes.clone();
        let approved = match (&tool.approved_hash, trust.hold && !trust.is_first) {
            (_, false) => None,
            (Some(approved), true) => (*approved != hash).then(|| approved.clone()),
            (None, true) => (*old != hash).then(|| old.clone().into_owned()),
        };
        let held = approved.is_some();
        if *old == hash {
            self.changes.unchanged += 1;
        } else {
            let what = differences(&tool.definition, &offered.definition);
            // What stood there before the first list came from elsewhere: the list tells it for the first time.
            if !trust.is_first {
                changes = with_change(&changes, Some(&old), &hash, &what, now);
            }
            let (name, old, new) = (offered.name.clone(), old.clone().into_owned(), hash.clone());
            self.changes.updated.push(name.clone());
            self.changes.changed.push(Changed { name, what, old, new, held });
        }
        let is_same = tool.position == position
            && tool.definition == offered.definition
            && tool.definition_hash.is_some()
            && tool.approved_hash == approved;
        if !is_same {
            self.update.push((tool, Row { position, offered, hash, approved_hash: approved, changes }));
        }
        held
    }

    /// Whether the tool waits for an approval.
    fn add(
        &mut self,
        gone: Option<Gone>,
        position: i64,
        offered: &'a Offered,
        trust: Trust,
        now: DateTime<Utc>,
    ) -> bool {
        let hash = definition_hash(&offered.definition);
        let old = gone.as_ref().map(|gone| gone.definition_hash.as_str());
        let changes = gone.as_ref().map_or("[]", |gone| gone.changes.as_str());
        let changes = match trust.is_first || old == Some(&hash) {
            true => changes.to_owned(),
            false => with_change(changes, old, &hash, &[], now),
        };
        let approved = match &gone {
            _ if trust.is_first || !trust.hold => None,
            None => Some(String::new()),
            Some(gone) => {
                let approved = gone.approved_hash.as_ref().unwrap_or(&gone.definition_hash);
                (*approved != hash).then(|| approved.clone())
            }
        };
        let held = approved.is_some();
        self.returned.extend(gone.map(|gone| gone.name_digest));
        self.changes.added.push(offered.name.clone());
        self.insert.push(Row { position, offered, hash, approved_hash: approved, changes });
        held
    }
}

/// The history of a tool with one change more, and without those that are too many.
fn with_change(changes: &str, old: Option<&str>, new: &str, what: &[String], now: DateTime<Utc>) -> String {
    let known: Vec<Value> = serde_json::from_str(changes).unwrap_or_default();
    let what: Vec<String> = what.iter().take(MAX_KEYS).map(|key| key.chars().take(MAX_KEY).collect()).collect();
    let at = now.to_rfc3339_opts(SecondsFormat::Micros, true);
    let change = json!({ "at": at, "old": old, "new": new, "what": what });
    let all: Vec<_> = std::iter::once(change).chain(known).take(MAX_CHANGES).collect();
    Value::Array(all).to_string()
}

/// The top-level keys whose values differ between two tool definitions; spelling and key order do not count.
fn differences(old: &str, new: &str) -> Vec<String> {
    let read = |text| serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default();
    let (old, new) = (read(old), read(new));
    let mut keys: Vec<_> = new.keys().chain(old.keys().filter(|key| !new.contains_key(*key))).collect();
    keys.retain(|key| old.get(*key) != new.get(*key));
    keys.into_iter().cloned().collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const TRUSTING: Trust = Trust { is_first: false, hold: false };
    const HOLDING: Trust = Trust { is_first: false, hold: true };

    fn tool(name: &str, position: i64, definition: &str, approved: Option<&str>) -> Tool {
        Tool {
            id: format!("tool-{name}"),
            server_id: "mcp_server-1".to_owned(),
            name: name.to_owned(),
            position,
            definition: definition.to_owned(),
            definition_hash: Some(definition_hash(definition)),
            approved_hash: approved.map(str::to_owned),
            changes: "[]".to_owned(),
        }
    }

    fn offered(name: &str, definition: &str) -> Offered {
        Offered { name: name.to_owned(), definition: definition.to_owned() }
    }

    #[test]
    fn differences_name_the_keys_that_changed() {
        assert_eq!(differences(r#"{"a":1,"b":{"x":1,"y":2}}"#, r#"{"b":{"y":2,"x":1}, "a":1}"#), Vec::<String>::new());
        assert_eq!(differences(r#"{"a":1,"b":2}"#, r#"{"a":2,"c":3}"#), ["a", "c", "b"]);
    }

    #[test]
    fn a_plan_follows_the_servers_order_and_keeps_ids() {
        let one = r#"{"a":1}"#;
        let current = [tool("gone", 0, "{}", None), tool("same", 1, one, None), tool("new text", 2, one, None)];
        let listing = [offered("new text", r#"{"a":2}"#), offered("fresh", "{}"), offered("same", r#"{ "a": 1 }"#)];
        let plan = Plan::new(&current, vec![], &listing, TRUSTING, Utc::now());
        assert_eq!(plan.changes.added, ["fresh"]);
        assert_eq!(plan.changes.updated, ["new text"]);
        assert_eq!(plan.changes.deleted, ["gone"]);
        assert_eq!(plan.changes.unchanged, 1);
        assert_eq!(plan.changes.held, Vec::<String>::new());
        let moved: Vec<_> = plan.update.iter().map(|(tool, row)| (tool.id.as_str(), row.position)).collect();
        assert_eq!(moved, [("tool-new text", 0), ("tool-same", 2)]);
    }

    #[test]
    fn nothing_is_written_for_a_list_that_is_the_same() {
        let current = [tool("a", 0, "{}", None), tool("b", 1, "{}", Some("x"))];
        let listing = [offered("a", "{}"), offered("b", "{}")];
        let plan = Plan::new(&current, vec![], &listing, HOLDING, Utc::now());
        assert!(plan.is_empty());
        assert_eq!((plan.changes.unchanged, plan.changes.held), (2, vec!["b".to_owned()]));
        let unhashed = [Tool { definition_hash: None, ..tool("a", 0, "{}", None) }];
        let plan = Plan::new(&unhashed, vec![], &listing[..1], HOLDING, Utc::now());
        assert_eq!((plan.update.len(), plan.changes.unchanged), (1, 1), "a row of before gets its hash");
    }

    /// What is approved after a sync: `None` all that is there, `Some` that hash.
    fn approved(current: Option<Tool>, gone: Option<Gone>, definition: &str, trust: Trust) -> Option<String> {
        let current: Vec<_> = current.into_iter().collect();
        let listing = [offered("t", definition)];
        let plan = Plan::new(&current, gone.into_iter().collect(), &listing, trust, Utc::now());
        let row = plan.insert.first().or(plan.update.first().map(|(_, row)| row));
        row.map_or_else(|| current[0].approved_hash.clone(), |row| row.approved_hash.clone())
    }

    #[test]
    fn what_nobody_has_seen_waits_for_an_approval() {
        const OLD: &str = r#"{"v":1}"#;
        const NEW: &str = r#"{"v":2}"#;
        let old = definition_hash(OLD);
        let is = |definition, approved: Option<&str>| Some(tool("t", 0, definition, approved));
        let was = |definition: &str, approved: Option<&str>| {
            let hash = definition_hash(definition);
            let approved_hash = approved.map(str::to_owned);
            Some(Gone { name_digest: sha256_hex("t"), definition_hash: hash, approved_hash, changes: "[]".to_owned() })
        };
        let first = |hold| Trust { is_first: true, hold };
        for (current, gone, definition, trust, expected, what) in [
            (None, None, NEW, first(true), None, "what is registered is trusted"),
            (None, None, NEW, HOLDING, Some(""), "a new tool"),
            (None, None, NEW, TRUSTING, None, "a new tool, reported only"),
            (is(OLD, None), None, NEW, first(true), None, "what is registered, known from elsewhere before"),
            (is(OLD, None), None, NEW, HOLDING, Some(&*old), "a changed tool"),
            (is(OLD, None), None, NEW, TRUSTING, None, "a changed tool, reported only"),
            (is(OLD, None), None, r#"{ "v": 1 }"#, HOLDING, None, "spelling is no change"),
            (is(NEW, Some(&old)), None, NEW, HOLDING, Some(&*old), "still held"),
            (is(NEW, Some(&old)), None, r#"{"v":3}"#, HOLDING, Some(&*old), "changed again"),
            (is(NEW, Some(&old)), None, OLD, HOLDING, None, "changed back"),
            (is(NEW, Some("")), None, NEW, HOLDING, Some(""), "a new tool, still held"),
            (is(NEW, Some(&old)), None, NEW, TRUSTING, None, "released"),
            (None, was(OLD, None), OLD, HOLDING, None, "it returns as it was"),
            (None, was(OLD, None), NEW, HOLDING, Some(&*old), "it returns as another"),
            (None, was(NEW, Some(&old)), NEW, HOLDING, Some(&*old), "it left when it was held"),
            (None, was(NEW, Some(&old)), OLD, HOLDING, None, "it left when it was held, and returns as approved"),
            (None, was(NEW, Some("")), NEW, HOLDING, Some(""), "it left before anybody approved it"),
        ] {
            assert_eq!(approved(current, gone, definition, trust).as_deref(), expected, "{what}");
        }
    }

    #[test]
    fn the_history_of_a_tool_has_an_end() {
        let mut changes = "[]".to_owned();
        for number in 0..20 {
            let what = vec!["k".repeat(100); 30];
            changes = with_change(&changes, Some("old"), &format!("{number}"), &what, Utc::now());
        }
        let kept: Vec<Value> = serde_json::from_str(&changes).unwrap();
        assert_eq!((kept.len(), &kept[0]["new"], &kept[9]["new"]), (10, &json!("19"), &json!("10")));
        assert_eq!(kept[0]["what"], json!(vec!["k".repeat(64); 20]));
    }
}
