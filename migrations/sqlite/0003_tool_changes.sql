-- definition_hash: SHA-256 (hex) of the definition in canonical JSON; NULL until the next sync of a row from before.
-- approved_hash: NULL while the definition may be used; else the hash that was last approved, '' if none ever was.
-- changes: the last changes of the definition, newest first, as JSON.
ALTER TABLE tools ADD COLUMN definition_hash TEXT;
ALTER TABLE tools ADD COLUMN approved_hash TEXT;
ALTER TABLE tools ADD COLUMN changes TEXT NOT NULL DEFAULT '[]';

-- What a server offered once and does not now: a tool that returns is known again.
CREATE TABLE gone_tools (
    server_id       TEXT NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    name_digest     TEXT NOT NULL,
    definition_hash TEXT NOT NULL,
    approved_hash   TEXT,
    changes         TEXT NOT NULL,
    gone_at         TEXT NOT NULL,
    PRIMARY KEY (server_id, name_digest)
) STRICT;
