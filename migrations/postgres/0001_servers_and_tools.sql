CREATE TABLE servers (
    id             TEXT PRIMARY KEY,
    server_name    TEXT NOT NULL UNIQUE,
    type           TEXT NOT NULL,
    config         TEXT NOT NULL,
    revision       BIGINT NOT NULL,
    era            TEXT,
    state          TEXT NOT NULL,
    error          TEXT,
    last_synced_at TIMESTAMPTZ,
    created_at     TIMESTAMPTZ NOT NULL,
    updated_at     TIMESTAMPTZ NOT NULL
);
CREATE INDEX servers_by_age ON servers (created_at, id);

-- name_digest (SHA-256, hex) stands in for name in the unique key: names may be longer than an index entry.
CREATE TABLE tools (
    id          TEXT PRIMARY KEY,
    server_id   TEXT NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    name        TEXT NOT NULL,
    name_digest TEXT NOT NULL,
    position    BIGINT NOT NULL,
    definition  TEXT NOT NULL,
    UNIQUE (server_id, name_digest)
);
