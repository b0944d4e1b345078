-- Portolans that serve this database. answered_up_to: the last of run_questions that this one has answered.
CREATE TABLE replicas (
    id             TEXT COLLATE "C" PRIMARY KEY,
    beat_at        TIMESTAMPTZ NOT NULL,
    answered_up_to BIGINT NOT NULL
);

-- Runs that another replica, or a later start, may ask about. id: the digest of what names a run with an Idempotency-Key, written
-- before the run begins; or <question>.<replica>, what this replica knows of a run that run_questions asks for. attempt: which
-- run of that replica it is. content: the digest of the arguments and the outcome, sealed; sealed_with: as in runs.
CREATE TABLE shared_runs (
    id            TEXT COLLATE "C" PRIMARY KEY,
    replica       TEXT NOT NULL,
    attempt       BIGINT NOT NULL,
    mcp_server_id TEXT NOT NULL,
    state         TEXT NOT NULL,
    content       TEXT NOT NULL,
    sealed_with   TEXT NOT NULL,
    expires_at    TIMESTAMPTZ NOT NULL,
    question      BIGINT,
    claim         TEXT,
    began_at      TIMESTAMPTZ NOT NULL
);
CREATE INDEX shared_runs_by_age ON shared_runs (expires_at);
CREATE INDEX shared_runs_by_question ON shared_runs (question) WHERE question IS NOT NULL;
CREATE INDEX shared_runs_by_key ON shared_runs (sealed_with, mcp_server_id);

-- Which replica knows this run? Asked for an SDK that tries again at another replica than at first. Ids grow in the order in
-- which questions become visible, as those of changes do: whoever has answered up to an id has seen all before it.
CREATE TABLE run_questions (
    id            BIGSERIAL PRIMARY KEY,
    identity      TEXT NOT NULL,
    mcp_server_id TEXT NOT NULL,
    asked_by      TEXT NOT NULL,
    expires_at    TIMESTAMPTZ NOT NULL
);
CREATE INDEX run_questions_by_age ON run_questions (expires_at);

CREATE FUNCTION ask_about_runs_in_turn() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('portolan.run_questions'));
    RETURN NULL;
END
$$;
CREATE TRIGGER run_questions_in_turn BEFORE INSERT ON run_questions FOR EACH STATEMENT EXECUTE FUNCTION ask_about_runs_in_turn();
