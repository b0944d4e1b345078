//! The table `runs`: the log of what was run. Rows come in batches from [`crate::run_log`], and are never changed but by a
//! rotation of keys.

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use sqlx::{Connection, FromRow};
use uuid::{Builder, Uuid};

use crate::model::{Run, RunContent, RunOutcome};

use super::seal::{KEY_ID_CHARS, VERSION};
use super::{Database, Error, Place, Store, on_db};

/// How many rows one statement inserts, fourteen values each, of which SQLite takes 32,766. Few enough that a change which
/// waits for its turn to write to SQLite does not wait long.
pub const ROWS_AT_ONCE: usize = 200;
/// How many rows one statement of a sweep removes.
const SWEPT_AT_ONCE: i64 = 500;

const PREFIX: &str = "run-";
/// How much of an envelope says its version and its key.
pub(super) const SEALED_WITH: usize = VERSION.len() + 1 + KEY_ID_CHARS;

pub(super) fn content_of(id: &str) -> Place<'_> {
    Place { table: "runs", column: "content", id }
}

/// The id of a new run that started then, which is what its place among all runs comes from.
pub fn run_id(started_at: DateTime<Utc>) -> String {
    let random = Uuid::new_v4();
    let (_, random) = random.as_bytes().split_at(6);
    id_at(started_at, random.try_into().expect("a UUID has 16 bytes"))
}

/// Less than all ids from this time on, and more than those before it.
fn first_id_at(time: DateTime<Utc>) -> String {
    // An id has whole milliseconds: of what began within the first one all is before its end.
    let up = TimeDelta::milliseconds(1) - TimeDelta::nanoseconds(1);
    let whole = time.checked_add_signed(up).and_then(|time| time.duration_trunc(TimeDelta::milliseconds(1)).ok());
    id_at(whole.unwrap_or(time), [0; 10])
}

fn id_at(time: DateTime<Utc>, random: [u8; 10]) -> String {
    let millis = u64::try_from(time.timestamp_millis()).unwrap_or_default().min((1 << 48) - 1);
    format!("{PREFIX}{}", Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
}

/// The id of a run from the part of it that a cursor has; `None` when it is none.
pub fn run_id_of(cursor: &str) -> Option<String> {
    let is_plain = cursor.len() == 32 && cursor.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let uuid = Uuid::try_parse(cursor).ok().filter(|_| is_plain)?;
    Some(format!("{PREFIX}{uuid}"))
}

/// Which runs are asked for; of these the newest.
#[derive(Clone, Debug, Default)]
pub struct RunsWanted {
    pub mcp_server_id: Option<String>,
    pub tool_id: Option<String>,
    pub caller: Option<String>,
    pub outcome: Option<RunOutcome>,
    /// Started from this time on, and before that one.
    pub since: Option<DateTime<Utc>>,
    pub until: Option<DateTime<Utc>>,
    /// Those before this one, by its id.
    pub before: Option<String>,
    pub limit: i64,
}

#[derive(FromRow)]
struct Row {
    #[sqlx(flatten)]
    run: Run,
    content: Option<String>,
}

impl Store {
    /// Adds runs, at most [`ROWS_AT_ONCE`], in one statement. Those that are there already stay as they are: it may be tried
    /// again when nobody knows whether it was done.
    pub async fn add_runs(&self, runs: &[Run]) -> Result<(), Error> {
        const INSERT: &str = "INSERT INTO runs (id, started_at, duration_ms, caller, mcp_server_id, server_name, tool_id, \
                              tool_name, outcome, error_code, args_bytes, result_bytes, content, sealed_with) ";
        // Before the statement: sealing takes time, and SQLite has one writer.
        let rows: Vec<_> = runs.iter().map(|run| (run, self.sealed_content(run))).collect();
        on_db!(self, long write pool => {
            let mut insert = sqlx::QueryBuilder::new(INSERT);
            insert.push_values(&rows, |mut values, (run, content)| {
                values
                    .push_bind(&run.id)
                    .push_bind(run.started_at)
                    .push_bind(run.duration_ms)
                    .push_bind(&run.caller)
                    .push_bind(&run.mcp_server_id)
                    .push_bind(&run.server_name)
                    .push_bind(&run.tool_id)
                    .push_bind(&run.tool_name)
                    .push_bind(run.outcome.as_str())
                    .push_bind(&run.error_code)
                    .push_bind(run.args_bytes)
                    .push_bind(run.result_bytes)
                    .push_bind(content)
                    .push_bind(content.as_ref().map(|sealed| &sealed[..SEALED_WITH]));
            });
            insert.push(" ON CONFLICT (id) DO NOTHING");
            // Of as many lengths as there are none is worth to be remembered in place of other statements. Without a name it
            // needs a transaction: a pooler may give each message between two to another connection.
            let mut transaction = pool.begin().await?;
            insert.build().persistent(false).execute(&mut *transaction).await?;
            transaction.commit().await
        })?;
        Ok(())
    }

    fn sealed_content(&self, run: &Run) -> Option<String> {
        let text = serde_json::to_vec(run.content.as_ref()?).expect("it is texts and flags");
        Some(self.seal(content_of(&run.id), &secrecy::zeroize::Zeroizing::new(text)))
    }

    /// The runs that are wanted, the newest first. What of their contents cannot be opened is left out.
    pub async fn runs(&self, wanted: &RunsWanted) -> Result<Vec<Run>, Error> {
        const SELECT: &str = "SELECT id, started_at, duration_ms, caller, mcp_server_id, server_name, tool_id, tool_name, \
                              outcome, error_code, args_bytes, result_bytes, content FROM runs WHERE 1 = 1";
        let rows: Vec<Row> = on_db!(self, long read pool => {
            let mut query = sqlx::QueryBuilder::new(SELECT);
            if let Some(server_id) = &wanted.mcp_server_id {
                query.push(" AND mcp_server_id = ").push_bind(server_id);
            }
            if let Some(tool_id) = &wanted.tool_id {
                query.push(" AND tool_id = ").push_bind(tool_id);
            }
            if let Some(caller) = &wanted.caller {
                query.push(" AND caller = ").push_bind(caller);
            }
            if let Some(outcome) = wanted.outcome {
                if outcome != RunOutcome::Success {
                    // In the words of the index, which a parameter does not have.
                    query.push(" AND outcome <> 'success'");
                }
                query.push(" AND outcome = ").push_bind(outcome.as_str());
            }
            if let Some(since) = wanted.since {
                query.push(" AND id >= ").push_bind(first_id_at(since));
            }
            if let Some(until) = wanted.until {
                query.push(" AND id < ").push_bind(first_id_at(until));
            }
            if let Some(before) = &wanted.before {
                query.push(" AND id < ").push_bind(before);
            }
            query.push(" ORDER BY id DESC LIMIT ").push_bind(wanted.limit);
            query.build_query_as().fetch_all(pool).await
        })?;
        Ok(rows
            .into_iter()
            .map(|Row { run, content }| Run { content: self.content(&run.id, content), ..run })
            .collect())
    }

    fn content(&self, id: &str, envelope: Option<String>) -> Option<RunContent> {
        let text = self.open_sealed(content_of(id), &envelope?).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Removes some of the runs that started before `end`; how many, 0 when there are no more than what another Portolan
    /// removes just now.
    pub async fn forget_runs(&self, end: DateTime<Utc>) -> Result<u64, Error> {
        let sql = match self.database {
            // Several sweep at once: none waits for another.
            Database::Postgres(_) => {
                "DELETE FROM runs WHERE id IN \
                 (SELECT id FROM runs WHERE id < $1 ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED)"
            }
            Database::Sqlite { .. } => {
                "DELETE FROM runs WHERE id IN (SELECT id FROM runs WHERE id < $1 ORDER BY id LIMIT $2)"
            }
        };
        let end = first_id_at(end);
        Ok(on_db!(self, long write pool => {
            sqlx::query(sql).bind(end).bind(SWEPT_AT_ONCE).execute(pool).await.map(|done| done.rows_affected())
        })?)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_ids_is_that_of_time() {
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
        let (early, late) = (at("2026-01-02T03:04:05.006Z"), at("2026-01-02T03:04:05.007Z"));
        for _ in 0..100 {
            let (first, second) = (run_id(early), run_id(late));
            assert!(first < second);
            assert!(first_id_at(early) <= first && first < first_id_at(late) && first_id_at(late) <= second);
            assert!(first < first_id_at(at("2026-01-02T03:04:05.006001Z")), "a run starts with its millisecond");
        }
        assert!(run_id(at("1960-01-01T00:00:00Z")) < run_id(early), "what no clock shows is no panic");
        assert!(run_id(early) < first_id_at(DateTime::<Utc>::MAX_UTC));
    }

    #[test]
    fn a_cursor_is_the_uuid_of_a_run_and_nothing_else() {
        let id = run_id(crate::store::now());
        let cursor = id.strip_prefix(PREFIX).unwrap().replace('-', "");
        assert_eq!(run_id_of(&cursor), Some(id));
        for bad in [
            "",
            "0",
            &cursor.to_uppercase(),
            &cursor[1..],
            &format!("{cursor}0"),
            "{00000000-0000-0000-0000-0000000000}",
        ] {
            assert_eq!(run_id_of(bad), None, "{bad}");
        }
    }
}
