-- Runs of tools. id: run-<UUIDv7 of started_at>, so that its order is that of time; no reference to servers, because the log
-- outlives them. content: arguments and result, sealed, where they are kept; sealed_with: version and key of that envelope, for an index
-- that has all that a count by keys needs.
CREATE TABLE runs (
    id            TEXT COLLATE "C" PRIMARY KEY,
    started_at    TIMESTAMPTZ NOT NULL,
    duration_ms   BIGINT NOT NULL,
    caller        TEXT,
    mcp_server_id TEXT NOT NULL,
    server_name   TEXT NOT NULL,
    tool_id       TEXT NOT NULL,
    tool_name     TEXT NOT NULL,
    outcome       TEXT NOT NULL,
    error_code    TEXT,
    args_bytes    BIGINT NOT NULL,
    result_bytes  BIGINT NOT NULL,
    content       TEXT,
    sealed_with   TEXT
);
CREATE INDEX runs_by_server ON runs (mcp_server_id, id);
CREATE INDEX runs_by_tool ON runs (tool_id, id);
CREATE INDEX runs_by_caller ON runs (caller, id);
CREATE INDEX runs_that_failed ON runs (id) WHERE outcome <> 'success';
CREATE INDEX runs_with_content ON runs (id) WHERE sealed_with IS NOT NULL;
CREATE INDEX runs_by_key ON runs (sealed_with, mcp_server_id) WHERE sealed_with IS NOT NULL;

-- Changes to servers, tools and sign-ins, each written in the transaction of the change itself. Ids grow in the order in which
-- the changes became visible and are never used again: whoever has read up to an id has seen all before it.
CREATE TABLE changes (
    id            BIGSERIAL PRIMARY KEY,
    at            TIMESTAMPTZ NOT NULL,
    caller        TEXT,
    action        TEXT NOT NULL,
    mcp_server_id TEXT,
    server_name   TEXT,
    details       TEXT NOT NULL
);
CREATE INDEX changes_by_server ON changes (mcp_server_id, id);
CREATE INDEX changes_by_caller ON changes (caller, id);
CREATE INDEX changes_by_age ON changes (at);

-- A sequence hands its numbers out at once, and transactions end in any order. Whoever notes a change holds this lock, which
-- nothing else in Portolan takes, until its transaction has ended: the trigger comes before the numbers of its rows.
CREATE FUNCTION note_changes_in_turn() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('portolan.changes'));
    RETURN NULL;
END
$$;
CREATE TRIGGER changes_in_turn BEFORE INSERT ON changes FOR EACH STATEMENT EXECUTE FUNCTION note_changes_in_turn();
