-- Sign-ins to upstream servers by OAuth. material: the client and its tokens, sealed; version: grows with each write of it;
-- refresher, lease_until: who fetches new tokens, and until when nobody else does.
CREATE TABLE sign_ins (
    server_id   TEXT PRIMARY KEY REFERENCES servers (id) ON DELETE CASCADE,
    material    TEXT NOT NULL,
    version     INTEGER NOT NULL,
    refresher   TEXT,
    lease_until TEXT,
    updated_at  TEXT NOT NULL
) STRICT;

-- Sign-ins that somebody has begun. state_digest: SHA-256 (hex) of the state that comes back with the answer; server_id: NULL
-- for a server that is not registered; caller: who began it; status: pending, taken (its answer is here), done or failed;
-- material: what the answer is taken with, and then what came of it, sealed.
CREATE TABLE authorizations (
    id           TEXT PRIMARY KEY,
    state_digest TEXT NOT NULL UNIQUE,
    server_id    TEXT REFERENCES servers (id) ON DELETE CASCADE,
    caller       TEXT NOT NULL,
    material     TEXT NOT NULL,
    status       TEXT NOT NULL,
    created_at   TEXT NOT NULL,
    expires_at   TEXT NOT NULL
) STRICT;
CREATE INDEX authorizations_by_end ON authorizations (expires_at);
