-- Runs of tools. id: run-<UUIDv7 of started_at>, so that its order is that of time; no reference to servers, because the log
-- outlives them. content: arguments and result, sealed, where they are kept; sealed_with: version and key of that envelope, for an index
-- that has all that a count by keys needs.
CREATE TABLE runs (
    id            TEXT PRIMARY KEY,
    started_at    TEXT NOT NULL,
    duration_ms   INTEGER NOT NULL,
    caller        TEXT,
    mcp_server_id TEXT NOT NULL,
    server_name   TEXT NOT NULL,
    tool_id       TEXT NOT NULL,
    tool_name     TEXT NOT NULL,
    outcome       TEXT NOT NULL,
    error_code    TEXT,
    args_bytes    INTEGER NOT NULL,
    result_bytes  INTEGER NOT NULL,
    content       TEXT,
    sealed_with   TEXT
) STRICT;
CREATE INDEX runs_by_server ON runs (mcp_server_id, id);
CREATE INDEX runs_by_tool ON runs (tool_id, id);
CREATE INDEX runs_by_caller ON runs (caller, id);
CREATE INDEX runs_that_failed ON runs (id) WHERE outcome <> 'success';
CREATE INDEX runs_with_content ON runs (id) WHERE sealed_with IS NOT NULL;
CREATE INDEX runs_by_key ON runs (sealed_with, mcp_server_id) WHERE sealed_with IS NOT NULL;

-- Changes to servers, tools and sign-ins, each written in the transaction of the change itself. Ids grow in the order in which
-- the changes became visible and are never used again: whoever has read up to an id has seen all before it.
CREATE TABLE changes (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    at            TEXT NOT NULL,
    caller        TEXT,
    action        TEXT NOT NULL,
    mcp_server_id TEXT,
    server_name   TEXT,
    details       TEXT NOT NULL
) STRICT;
CREATE INDEX changes_by_server ON changes (mcp_server_id, id);
CREATE INDEX changes_by_caller ON changes (caller, id);
CREATE INDEX changes_by_age ON changes (at);
