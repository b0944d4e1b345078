-- What a start asks for, so that it does not read all servers: those that nobody has connected to, and which keys seal.
CREATE INDEX servers_to_connect ON servers (id, created_at) WHERE state = 'never_connected' AND last_synced_at IS NULL;
CREATE INDEX servers_by_key ON servers (substr(config, 1, 15)) WHERE substr(config, 1, 3) = 'v1.';
CREATE INDEX sign_ins_by_key ON sign_ins (substr(material, 1, 15)) WHERE substr(material, 1, 3) = 'v1.';
