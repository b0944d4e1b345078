-- Portolans that serve this database. answered_up_to: the last of run_questions that this one has answered. One process alone
-- has a SQLite database, so there is nothing in this table, nor in run_questions.
CREATE TABLE replicas (
    id             TEXT PRIMARY KEY,
    beat_at        TEXT NOT NULL,
    answered_up_to INTEGER NOT NULL
) STRICT;

-- Runs that another replica, or a later start, may ask about. id: the digest of what names a run with an Idempotency-Key, written
-- before the run begins; or <question>.<replica>, what this replica knows of a run that run_questions asks for. attempt: which
-- run of that replica it is. content: the digest of the arguments and the outcome, sealed; sealed_with: as in runs.
CREATE TABLE shared_runs (
    id            TEXT PRIMARY KEY,
    replica       TEXT NOT NULL,
    attempt       INTEGER NOT NULL,
    mcp_server_id TEXT NOT NULL,
    state         TEXT NOT NULL,
    content       TEXT NOT NULL,
    sealed_with   TEXT NOT NULL,
    expires_at    TEXT NOT NULL,
    question      INTEGER,
    claim         TEXT,
    began_at      TEXT NOT NULL
) STRICT;
CREATE INDEX shared_runs_by_age ON shared_runs (expires_at);
CREATE INDEX shared_runs_by_question ON shared_runs (question) WHERE question IS NOT NULL;
CREATE INDEX shared_runs_by_key ON shared_runs (sealed_with, mcp_server_id);

-- Which replica knows this run? Asked for an SDK that tries again at another replica than at first.
CREATE TABLE run_questions (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    identity      TEXT NOT NULL,
    mcp_server_id TEXT NOT NULL,
    asked_by      TEXT NOT NULL,
    expires_at    TEXT NOT NULL
) STRICT;
CREATE INDEX run_questions_by_age ON run_questions (expires_at);
