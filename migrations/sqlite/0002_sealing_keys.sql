-- The keys that seal what is secret, by their ids, each with a known text sealed by it. The keys themselves are not here.
CREATE TABLE sealing_keys (
    id         TEXT PRIMARY KEY,
    known      TEXT NOT NULL,
    created_at TEXT NOT NULL
) STRICT;
