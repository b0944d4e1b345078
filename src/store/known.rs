//! Tools and their servers as they were last read, so that the run of a known tool does not wait for the database.
//!
//! What is answered from here never contradicts a change that was acknowledged. A write drops what is known of its server
//! when it ends, however it ends, and before its caller hears of it ([`Known::during`]); and nothing is remembered that
//! was read while a write ended ([`Reading`]), because it may have been read before that write and arrive after it.
//!
//! Writes of other Portolans on the same database are told by the feed, which drops what they concern in the same way. On
//! such a database anything is known only while the feed is current ([`Currency`]): who cannot be told of a change asks
//! the database.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use hashlink::LinkedHashMap;

use crate::model::ServerTool;

use super::servers::to_text;

/// A write whose caller left half-way may still be done by the thread or the server that has it. Until that has long
/// ended, everything is trusted for [`DOUBTED_TRUST`] only.
const DOUBT: Duration = Duration::from_secs(60);
const DOUBTED_TRUST: Duration = Duration::from_secs(1);
/// How many bytes may be remembered; beyond it, the server whose tools were not run for the longest time is forgotten.
const LIMIT: usize = 64 * 1024 * 1024;
/// What a tool counts for, beside its texts.
const OVERHEAD: usize = 1024;

pub(super) struct Known {
    memory: Mutex<Memory>,
    limit: usize,
}

#[derive(Default)]
struct Memory {
    currency: Currency,
    /// How often everything was forgotten because something may have been missed.
    epoch: u64,
    /// How many writes have ended, here, or elsewhere as far as is known.
    generation: u64,
    /// The tools of a server by its id, least recently used first.
    servers: LinkedHashMap<String, Tools>,
    bytes: usize,
    doubted_until: Option<Instant>,
}

/// Until when every change by others is known that was acknowledged some time ago.
#[derive(Default)]
enum Currency {
    /// There are no others.
    #[default]
    Always,
    Until(Instant),
    /// Nobody has told anything yet.
    Never,
}

impl Currency {
    fn holds(&self) -> bool {
        match self {
            Self::Always => true,
            Self::Until(end) => Instant::now() < *end,
            Self::Never => false,
        }
    }
}

#[derive(Default)]
struct Tools {
    by_id: HashMap<String, Entry>,
    bytes: usize,
}

struct Entry {
    row: Arc<ServerTool>,
    trusted_until: Option<Instant>,
    bytes: usize,
}

/// When a read began, in time and among the writes; taken before the statement is sent.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    generation: u64,
    began: Instant,
}

impl Known {
    /// Knows nothing yet. Of a database that others write to, too, it learns nothing before [`Known::begin`].
    pub(super) fn new(is_shared: bool) -> Self {
        let currency = if is_shared { Currency::Never } else { Currency::Always };
        Self { memory: Mutex::new(Memory { currency, ..Memory::default() }), limit: LIMIT }
    }

    /// Forgets everything: changes of others may have been missed. Those from now on will be told until `end`.
    pub(super) fn begin(&self, end: Instant) {
        let mut memory = self.lock();
        memory.currency = Currency::Until(end);
        memory.epoch += 1;
        memory.generation += 1;
        memory.servers.clear();
        memory.bytes = 0;
    }

    /// Forgets these servers, which others have changed.
    pub(super) fn forget<'a>(&self, server_ids: impl Iterator<Item = &'a str>) {
        self.lock().forget(server_ids);
    }

    /// All changes are told until `end`; `false`, and nothing happens, when there was a time without that since the last.
    pub(super) fn go_on(&self, end: Instant) -> bool {
        let mut memory = self.lock();
        let holds = memory.currency.holds();
        if holds {
            memory.currency = Currency::Until(end);
        }
        holds
    }

    /// Names the time without a gap in which all changes of others have been told, if that goes on: what was read in it,
    /// and no told change concerns, is so still.
    pub(super) fn epoch(&self) -> Option<u64> {
        let memory = self.lock();
        memory.currency.holds().then_some(memory.epoch)
    }

    /// When it stops to be current; `None` where there are no others, or before the first time.
    pub(super) fn end(&self) -> Option<Instant> {
        match self.lock().currency {
            Currency::Until(end) => Some(end),
            Currency::Always | Currency::Never => None,
        }
    }

    pub(super) fn find(&self, server_id: &str, tool_id: &str) -> Option<Arc<ServerTool>> {
        let mut memory = self.lock();
        if !memory.currency.holds() {
            return None;
        }
        let entry = memory.servers.to_back(server_id)?.by_id.get(tool_id)?;
        entry.trusted_until.is_none_or(|until| Instant::now() < until).then(|| entry.row.clone())
    }

    pub(super) fn reading(&self) -> Reading {
        Reading { generation: self.lock().generation, began: Instant::now() }
    }

    /// Keeps what a read found, unless a write has ended since it began.
    pub(super) fn remember(&self, reading: Reading, row: &Arc<ServerTool>) {
        let bytes = size(row);
        let memory = &mut *self.lock();
        if memory.generation != reading.generation || matches!(memory.currency, Currency::Never) {
            return;
        }
        let doubted = memory.doubted_until.is_some_and(|until| reading.began < until);
        let trusted_until = doubted.then(|| reading.began + DOUBTED_TRUST);
        let tools = memory.servers.entry(row.server.id.clone()).or_insert_with(Tools::default);
        let before = tools.bytes;
        if let Some(old) = tools.by_id.insert(row.tool.id.clone(), Entry { row: row.clone(), trusted_until, bytes }) {
            tools.bytes -= old.bytes;
        }
        tools.bytes += bytes;
        memory.bytes = memory.bytes - before + tools.bytes;
        memory.servers.to_back(&row.server.id);
        while memory.bytes > self.limit
            && let Some((_, oldest)) = memory.servers.pop_front()
        {
            memory.bytes -= oldest.bytes;
        }
    }

    /// Does a write that may change a server or its tools, and drops what is known of them at its end, also when it
    /// fails and when the caller leaves half-way.
    pub(super) async fn during<T>(&self, server_id: &str, write: impl Future<Output = T>) -> T {
        self.during_all(&[server_id], write).await
    }

    /// As [`Known::during`], of a write that may change several servers.
    pub(super) async fn during_all<T>(&self, server_ids: &[&str], write: impl Future<Output = T>) -> T {
        let mut change = Change { known: self, server_ids, left: true };
        let written = write.await;
        change.left = false;
        written
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().expect("no code panics while it holds the memory")
    }
}

impl Memory {
    fn forget<'a>(&mut self, server_ids: impl Iterator<Item = &'a str>) {
        self.generation += 1;
        for server_id in server_ids {
            if let Some(tools) = self.servers.remove(server_id) {
                self.bytes -= tools.bytes;
            }
        }
    }
}

struct Change<'a> {
    known: &'a Known,
    server_ids: &'a [&'a str],
    /// The database has not said what came of it.
    left: bool,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut memory = self.known.lock();
        memory.forget(self.server_ids.iter().copied());
        if self.left {
            memory.doubted_until = Some(Instant::now() + DOUBT);
        }
    }
}

fn size(ServerTool { server, tool }: &ServerTool) -> usize {
    let config = server.config.0.as_ref().map_or(0, |connector| to_text(connector).len());
    let error = server.error.as_ref().map_or(0, String::len);
    OVERHEAD + config + error + server.server_name.len() + tool.name.len() + tool.definition.len() + tool.changes.len()
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::*;
    use crate::model::{Config, Server, ServerType, State, Tool, Unreadable};

    fn row(server_id: &str, tool_id: &str, definition: &str) -> Arc<ServerTool> {
        let now = Utc::now();
        let server = Server {
            id: server_id.to_owned(),
            server_name: String::new(),
            server_type: ServerType::Stdio,
            config: Config(Err(Unreadable::Foreign)),
            revision: 1,
            era: None,
            state: State::Ready,
            error: None,
            last_synced_at: None,
            created_at: now,
            updated_at: now,
            tool_count: 0,
        };
        let tool = Tool {
            id: tool_id.to_owned(),
            server_id: server_id.to_owned(),
            name: String::new(),
            position: 0,
            definition: definition.to_owned(),
            definition_hash: None,
            approved_hash: None,
            changes: String::new(),
        };
        Arc::new(ServerTool { server, tool })
    }

    fn definition(known: &Known, server_id: &str, tool_id: &str) -> Option<String> {
        known.find(server_id, tool_id).map(|row| row.tool.definition.clone())
    }

    #[tokio::test]
    async fn what_was_read_before_a_write_ended_is_not_remembered_after_it() {
        let known = Known::new(false);
        known.remember(known.reading(), &row("s", "t", "old"));
        assert_eq!(definition(&known, "s", "t").as_deref(), Some("old"));

        // Reads that begin before the write, during it before and after its commit, and what they find.
        let before = known.reading();
        let (early, late) = known
            .during("s", async {
                let early = known.reading();
                known.remember(before, &row("s", "t", "old"));
                assert_eq!(definition(&known, "s", "t").as_deref(), Some("old"), "not acknowledged yet");
                (early, known.reading())
            })
            .await;
        assert_eq!(definition(&known, "s", "t"), None, "a write drops what was known");
        for reading in [before, early, late] {
            known.remember(reading, &row("s", "t", "old"));
            assert_eq!(definition(&known, "s", "t"), None);
        }
        known.remember(known.reading(), &row("s", "t", "new"));
        assert_eq!(definition(&known, "s", "t").as_deref(), Some("new"));
    }

    #[tokio::test]
    async fn a_write_drops_its_own_server_alone() {
        let known = Known::new(false);
        for (server, tool) in [("a", "1"), ("a", "2"), ("b", "1")] {
            known.remember(known.reading(), &row(server, tool, "{}"));
        }
        known.during("a", async {}).await;
        let left = [("a", "1"), ("a", "2"), ("b", "1")].map(|(server, tool)| known.find(server, tool).is_some());
        assert_eq!(left, [false, false, true]);
        assert_eq!(known.lock().bytes, size(&row("b", "1", "{}")));
    }

    #[tokio::test]
    async fn a_write_that_is_left_half_way_drops_too_and_leaves_a_doubt() {
        let known = Known::new(false);
        known.remember(known.reading(), &row("s", "t", "old"));
        drop(Box::pin(known.during("s", async {})));
        assert!(known.find("s", "t").is_some(), "it had not begun");
        let reading = known.reading();
        {
            let mut write = Box::pin(known.during("s", std::future::pending::<()>()));
            assert!(futures_util::poll!(&mut write).is_pending());
        }
        assert!(known.find("s", "t").is_none());
        known.remember(reading, &row("s", "t", "old"));
        assert!(known.find("s", "t").is_none());
        let trusted = |tool: &str| known.lock().servers["s"].by_id[tool].trusted_until;
        known.remember(known.reading(), &row("s", "t", "old"));
        assert!(trusted("t").is_some_and(|until| until <= Instant::now() + DOUBTED_TRUST));
        let after = Reading { generation: known.lock().generation, began: Instant::now() + 2 * DOUBT };
        known.remember(after, &row("s", "later", "new"));
        assert_eq!(trusted("later"), None);
    }

    #[test]
    fn what_others_may_change_is_known_while_they_tell() {
        let known = Known::new(true);
        let in_a_while = || Instant::now() + Duration::from_secs(60);
        known.remember(known.reading(), &row("s", "t", "{}"));
        assert!(known.epoch().is_none() && known.find("s", "t").is_none(), "nobody tells");
        assert!(!known.go_on(in_a_while()), "nobody has begun");

        let before = known.reading();
        known.begin(in_a_while());
        let first = known.epoch().expect("it has begun");
        assert!(known.find("s", "t").is_none());
        known.remember(before, &row("s", "t", "old"));
        assert!(known.find("s", "t").is_none(), "it was read before that");
        for server in ["s", "other"] {
            known.remember(known.reading(), &row(server, "t", "{}"));
        }
        assert!(known.find("s", "t").is_some() && known.go_on(in_a_while()));

        let before = known.reading();
        known.forget(["s"].into_iter());
        known.remember(before, &row("s", "t", "old"));
        assert!(known.find("s", "t").is_none() && known.find("other", "t").is_some());
        assert_eq!(known.epoch(), Some(first));

        assert!(known.go_on(Instant::now()));
        assert!(known.find("other", "t").is_none() && known.epoch().is_none(), "its time is over");
        assert!(!known.go_on(in_a_while()), "something may have been missed");
        assert!(known.epoch().is_none());
        known.begin(in_a_while());
        assert!(known.find("other", "t").is_none() && known.epoch().is_some_and(|epoch| epoch > first));
        assert_eq!(known.lock().bytes, 0);
    }

    #[test]
    fn the_least_recently_used_server_makes_room() {
        let one = size(&row("a", "t", ""));
        let known = Known { limit: 2 * one, ..Known::new(false) };
        for server in ["a", "b", "a", "c"] {
            known.remember(known.reading(), &row(server, "t", ""));
        }
        assert_eq!(["a", "b", "c"].map(|server| known.find(server, "t").is_some()), [true, false, true]);
        assert!(known.find("a", "t").is_some());
        known.remember(known.reading(), &row("d", "t", ""));
        assert_eq!(["a", "c", "d"].map(|server| known.find(server, "t").is_some()), [true, false, true]);
        assert_eq!(known.lock().bytes, 2 * one);
        known.remember(known.reading(), &row("e", "t", &"x".repeat(3 * one)));
        assert_eq!(known.lock().bytes, 0, "more than there is room for");
        assert!(known.lock().servers.is_empty());
    }
}
