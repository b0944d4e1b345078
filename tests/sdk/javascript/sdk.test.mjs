// The unmodified JavaScript SDK against a live Portolan: what ../python does, in the other language.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import Letta, { ConflictError, InternalServerError, NotFoundError, UnprocessableEntityError } from "@letta-ai/letta-client";
import { Portolan, Upstream } from "./processes.mjs";
// In this process, because all make servers in one database.
import "./repeats.mjs";
import "./tokens.mjs";

const KINDS = ["stdio", "sse", "streamable_http"];
const NAMES = ["echo", "add", "fail", "texts", "image", "structured", "empty", "whoami"];
const UNKNOWN = "mcp_server-00000000-0000-4000-8000-000000000000";
const MASK = "********";
const DEAD_URL = "http://127.0.0.1:1/mcp"; // nobody listens on port 1
const UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}";

let portolan, client;
let requests = []; // what really went out
let number = 0;
const name = () => `suite-js-${number++}`;

before(async () => {
  portolan = await Portolan.start();
  const counted = (url, init) => {
    requests.push(`${init?.method} ${url}`);
    return fetch(url, init);
  };
  client = new Letta({ baseURL: portolan.url, apiKey: "any", fetch: counted });
});

after(() => portolan.stop());

/** Runs `body` with an upstream of the kind, and ends it and the servers that `body` registered. */
function withUpstream(kind, options, body) {
  return async () => {
    const upstreams = [];
    const made = [];
    const start = async (more = options) => {
      upstreams.push(await Upstream.start(kind, more));
      return upstreams.at(-1);
    };
    const register = async (fields, serverName = name()) => {
      const server = await client.mcpServers.create({ server_name: serverName, config: { mcp_server_type: kind, ...fields } });
      made.push(server.id);
      return server;
    };
    try {
      await body({ upstream: await start(), start, register });
    } finally {
      const listed = new Set((await client.mcpServers.list()).map((it) => it.id));
      for (const id of made) if (listed.has(id)) await client.mcpServers.delete(id);
      for (const upstream of upstreams) await upstream.stop();
    }
  };
}

/** The config of an update: what the SDK's types call required is null unless given. */
const change = (kind, fields = {}) => ({
  mcp_server_type: kind,
  ...(kind === "stdio" ? { command: null, args: null } : { server_url: null }),
  ...fields,
});

async function run(server, toolName, args) {
  const tool = (await client.mcpServers.tools.list(server.id)).find((it) => it.name === toolName);
  assert.ok(tool, `no tool ${toolName}`);
  return client.mcpServers.tools.run(tool.id, { mcp_server_id: server.id, ...(args === undefined ? {} : { args }) });
}

async function whoami(server) {
  const result = await run(server, "whoami", {});
  assert.equal(result.status, "success", String(result.func_return));
  return JSON.parse(result.func_return);
}

/** Asserts that `call` is refused with the class and the status, at the cost of one request. */
async function refused(call, type, status) {
  requests = [];
  let error;
  await assert.rejects(call, (it) => {
    error = it;
    return it instanceof type;
  });
  assert.equal(error.status, status);
  assert.equal(requests.length, 1, `one request, not ${requests.length}`);
  return error;
}

test("health, with and without an API key", async () => {
  const health = await client.health();
  assert.equal(health.status, "ok");
  assert.match(health.version, /^\d+\.\d+\.\d+/);
  const keyless = new Letta({ baseURL: portolan.url, apiKey: null });
  assert.equal((await keyless.health()).status, "ok");
  assert.ok(Array.isArray(await keyless.mcpServers.list()));
});

for (const kind of KINDS) {
  describe(kind, () => {
    test("create, list, retrieve, rename, delete", withUpstream(kind, {}, async ({ upstream, register }) => {
      requests = [];
      const serverName = name();
      const server = await register(upstream.fields, serverName);
      assert.equal(requests.length, 1);
      assert.match(server.id, new RegExp(`^mcp_server-${UUID}$`));
      assert.equal(server.server_name, serverName);
      assert.equal(server.mcp_server_type, kind);
      assert.equal(server.type, kind);
      for (const [key, value] of Object.entries(upstream.fields)) assert.deepEqual(server[key], value);
      if (kind === "stdio") assert.equal(server.env, null);
      else for (const key of ["auth_header", "auth_token", "custom_headers"]) assert.equal(server[key], null);
      assert.equal(server.status.state, "ready");
      assert.equal(server.status.tool_count, NAMES.length);

      const again = await client.mcpServers.retrieve(server.id);
      assert.deepEqual({ ...again, status: null }, { ...server, status: null });
      const second = await register(upstream.fields);
      const listed = await client.mcpServers.list();
      assert.ok(Array.isArray(listed));
      assert.deepEqual(listed.slice(-2).map((it) => it.id), [server.id, second.id]);

      const before = await client.mcpServers.tools.list(server.id);
      const newName = name();
      const renamed = await client.mcpServers.update(server.id, { server_name: newName, config: change(kind) });
      assert.equal(renamed.server_name, newName);
      assert.equal(renamed.id, server.id);
      for (const [key, value] of Object.entries(upstream.fields)) assert.deepEqual(renamed[key], value);
      const after = await client.mcpServers.tools.list(server.id);
      assert.deepEqual(after.map((it) => it.id), before.map((it) => it.id));
      for (const tool of after) assert.deepEqual(tool.tags, [`mcp:${newName}`]);

      await client.mcpServers.delete(server.id);
      for (const gone of [
        () => client.mcpServers.retrieve(server.id),
        () => client.mcpServers.delete(server.id),
        () => client.mcpServers.refresh(server.id),
        () => client.mcpServers.tools.list(server.id),
        () => client.mcpServers.tools.retrieve(before[0].id, { mcp_server_id: server.id }),
        () => client.mcpServers.tools.run(before[0].id, { mcp_server_id: server.id, args: { message: "x" } }),
      ]) await refused(gone, NotFoundError, 404);
      assert.ok(await whoami(second));
    }));

    test("tools", withUpstream(kind, {}, async ({ upstream, register }) => {
      const server = await register(upstream.fields);
      const tools = await client.mcpServers.tools.list(server.id);
      assert.deepEqual(tools.map((it) => it.name), NAMES);
      for (const tool of tools) {
        assert.match(tool.id, new RegExp(`^tool-${UUID}$`));
        assert.equal(tool.tool_type, "external_mcp");
        assert.deepEqual(tool.tags, [`mcp:${server.server_name}`]);
        assert.equal(tool.metadata_.mcp.server_name, server.server_name);
        assert.equal(tool.metadata_.mcp.server_id, server.id);
        assert.equal(tool.json_schema.name, tool.name);
        assert.deepEqual(await client.mcpServers.tools.retrieve(tool.id, { mcp_server_id: server.id }), tool);
      }
      const { parameters } = tools.find((it) => it.name === "add").json_schema;
      assert.deepEqual(parameters.required, ["a", "request_heartbeat"]);
      assert.deepEqual(parameters.properties.b, { type: "integer", default: 2 });
      assert.equal(parameters.properties.request_heartbeat.type, "boolean");
      assert.equal(parameters.additionalProperties, false);
    }));

    test("run", withUpstream(kind, {}, async ({ upstream, register }) => {
      const server = await register(upstream.fields);
      const said = await run(server, "echo", { message: "grüß dich ✓" });
      assert.equal(said.status, "success");
      assert.equal(said.func_return, "grüß dich ✓");
      for (const key of ["agent_state", "stdout", "stderr", "sandbox_config_fingerprint"]) assert.equal(said[key], null);
      assert.deepEqual(said.result.content, [{ type: "text", text: "grüß dich ✓" }]);
      assert.equal(typeof said.duration_ms, "number");
      assert.equal((await run(server, "add", { a: 40, request_heartbeat: true })).func_return, "42");
      assert.equal((await run(server, "texts", {})).func_return, "one two\nlines ");
      assert.equal((await run(server, "empty", {})).func_return, "Empty response from tool");
      const structured = await run(server, "structured", {});
      assert.equal(structured.func_return, '{"answer":42,"words":["a","b"]}');
      assert.deepEqual(structured.result.structuredContent, { answer: 42, words: ["a", "b"] });
      const image = await run(server, "image", {});
      assert.ok(image.func_return.startsWith("pic: {"));
      assert.deepEqual(JSON.parse(image.func_return.slice(5)), image.result.content[1]);
      assert.deepEqual(JSON.parse((await run(server, "whoami")).func_return).arguments, {});
      requests = [];
      const failed = await run(server, "fail", { message: "why" });
      assert.equal(failed.status, "error");
      assert.equal(failed.func_return, "failed: why");
      assert.equal(failed.result.isError, true);
      assert.equal(requests.length, 2, "one list, one run");
      const many = await Promise.all(Array.from({ length: 16 }, (_, n) => run(server, "echo", { message: `m${n}` })));
      assert.deepEqual(many.map((it) => it.func_return), Array.from({ length: 16 }, (_, n) => `m${n}`));
    }));

    test("refresh", withUpstream(kind, {}, async ({ upstream, register }) => {
      const server = await register(upstream.fields);
      const nothing = await client.mcpServers.refresh(server.id, { agent_id: null });
      assert.deepEqual([nothing.deleted, nothing.updated, nothing.added], [[], [], []]);
      upstream.setState({ hide: ["fail"], describe: { echo: "Repeats" }, extra: { more: "One more" } });
      const changes = await client.mcpServers.refresh(server.id, { agent_id: "agent-1" });
      assert.deepEqual([changes.deleted, changes.updated, changes.added], [["fail"], ["echo"], ["more"]]);
      const tools = await client.mcpServers.tools.list(server.id);
      assert.deepEqual(tools.map((it) => it.name), [...NAMES.filter((it) => it !== "fail"), "more"]);
      assert.equal(tools[0].description, "Repeats");
      assert.equal((await run(server, "more")).func_return, "extra more");
    }));

    test("a taken name conflicts in one request", withUpstream(kind, {}, async ({ upstream, register }) => {
      const first = await register(upstream.fields);
      const second = await register(upstream.fields);
      for (const call of [
        () => client.mcpServers.create({ server_name: first.server_name, config: { mcp_server_type: kind, ...upstream.fields } }),
        () => client.mcpServers.update(second.id, { server_name: first.server_name, config: change(kind) }),
      ]) {
        const error = await refused(call, ConflictError, 409);
        assert.equal(error.headers.get("x-should-retry"), "false");
      }
      const names = new Map((await client.mcpServers.list()).map((it) => [it.id, it.server_name]));
      assert.equal(names.get(first.id), first.server_name);
      assert.equal(names.get(second.id), second.server_name);
    }));

    test("a dead upstream is still stored", withUpstream(kind, {}, async ({ register }) => {
      const dead = kind === "stdio" ? { command: "/nonexistent/command", args: [] } : { server_url: DEAD_URL };
      requests = [];
      const server = await register(dead);
      assert.equal(requests.length, 1);
      assert.equal(server.status.state, "unreachable");
      assert.ok(server.status.error);
      assert.deepEqual(await client.mcpServers.tools.list(server.id), []);
      const error = await refused(() => client.mcpServers.refresh(server.id), NotFoundError, 404);
      assert.equal(error.error.detail.code, "MCPServerUnavailable");
    }));
  });
}

for (const kind of ["sse", "streamable_http"]) {
  test(`${kind}: token and headers are kept and sent as given`, withUpstream(kind, {}, async ({ upstream, register }) => {
    const given = { auth_header: "X-API-Key", auth_token: "abc-1", custom_headers: { "X-Suite": "one", "X-Other": "two" } };
    const pick = ({ auth_header, auth_token, custom_headers }) => ({ auth_header, auth_token, custom_headers });
    const shown = { ...given, auth_token: MASK, custom_headers: { "X-Suite": MASK, "X-Other": MASK } };
    const server = await register({ ...upstream.fields, ...given });
    assert.deepEqual(pick(server), shown);
    assert.deepEqual(pick(await client.mcpServers.retrieve(server.id)), shown);
    assert.deepEqual(pick((await client.mcpServers.list()).find((it) => it.id === server.id)), shown);
    assert.deepEqual(pick(await client.mcpServers.retrieve(server.id, { query: { reveal: true } })), given);
    let { headers } = await whoami(server);
    assert.deepEqual([headers["x-api-key"], headers["x-suite"], headers["x-other"]], ["abc-1", "one", "two"]);

    const kept = await client.mcpServers.update(
      server.id, { server_name: null, config: change(kind, { auth_token: null, custom_headers: null }) },
    );
    assert.deepEqual(pick(kept), shown);
    assert.equal(kept.server_name, server.server_name);
    // Sending back what was answered changes nothing: a mask means what is stored.
    const { auth_token, custom_headers } = server;
    await client.mcpServers.update(server.id, { config: change(kind, { auth_token, custom_headers }) });
    ({ headers } = await whoami(server));
    assert.deepEqual([headers["x-api-key"], headers["x-suite"], headers["x-other"]], ["abc-1", "one", "two"]);
    await client.mcpServers.update(server.id, { config: change(kind, { auth_token: "abc-2", custom_headers: { "X-Suite": "3" } }) });
    ({ headers } = await whoami(server));
    assert.deepEqual([headers["x-api-key"], headers["x-suite"], headers["x-other"]], ["abc-2", "3", undefined]);
    const cleared = await client.mcpServers.update(server.id, { config: change(kind, { auth_token: "", custom_headers: {} }) });
    assert.ok(!cleared.auth_token);
    assert.deepEqual(cleared.custom_headers ?? {}, {});
    ({ headers } = await whoami(server));
    assert.deepEqual([headers["x-api-key"], headers["x-suite"]], [undefined, undefined]);
  }));

  test(`${kind}: a token opens a guarded upstream`, withUpstream(
    kind, { require: "Authorization: Bearer right" }, async ({ upstream, register }) => {
      const server = await register({ ...upstream.fields, auth_header: "Authorization", auth_token: "Bearer wrong" });
      assert.equal(server.status.state, "auth_required");
      await client.mcpServers.update(server.id, { config: change(kind, { auth_token: "Bearer right" }) });
      assert.deepEqual((await client.mcpServers.refresh(server.id)).added, NAMES);
      assert.equal((await whoami(server)).headers.authorization, "Bearer right");
    },
  ));

  test(`${kind}: a change of URL moves the next call`, withUpstream(kind, {}, async ({ upstream, start, register }) => {
    const server = await register(upstream.fields);
    assert.ok(upstream.fields.server_url.includes((await whoami(server)).headers.host));
    const other = await start();
    const moved = await client.mcpServers.update(server.id, { config: change(kind, other.fields) });
    assert.equal(moved.server_url, other.fields.server_url);
    assert.ok(other.fields.server_url.includes((await whoami(server)).headers.host));
  }));

  test(`${kind}: a bad URL is unprocessable`, withUpstream(kind, {}, async ({ upstream, register }) => {
    for (const url of ["ftp://127.0.0.1/mcp", "not a url", ""]) {
      const call = () => client.mcpServers.create({ server_name: name(), config: { mcp_server_type: kind, server_url: url } });
      const error = await refused(call, UnprocessableEntityError, 422);
      assert.ok(error.error.detail);
    }
    const server = await register(upstream.fields);
    const call = () => client.mcpServers.update(server.id, { config: change(kind, { server_url: "nope" }) });
    await refused(call, UnprocessableEntityError, 422);
    assert.equal((await client.mcpServers.retrieve(server.id)).server_url, upstream.fields.server_url);
  }));
}

test("stdio: a change of args moves the next call and keeps env", withUpstream(
  "stdio", { note: "one argument, with  spaces" }, async ({ upstream, start, register }) => {
    const server = await register({ ...upstream.fields, env: { SUITE: "kept" } });
    const before = await whoami(server);
    assert.equal(before.argv.at(-1), "one argument, with  spaces");
    assert.equal(before.env.SUITE, "kept");
    const other = await start({ note: "two" });
    await client.mcpServers.update(server.id, { config: change("stdio", other.fields) });
    const after = await whoami(server);
    assert.equal(after.argv.at(-1), "two");
    assert.equal(after.env.SUITE, "kept");
    assert.notEqual(after.pid, before.pid);
  },
));

test("the type may be missing", withUpstream("stdio", {}, async ({ upstream }) => {
  const stdio = await client.mcpServers.create({ server_name: name(), config: upstream.fields });
  assert.equal(stdio.mcp_server_type, "stdio");
  await client.mcpServers.delete(stdio.id);
  const http = await client.mcpServers.create({ server_name: name(), config: { server_url: DEAD_URL } });
  assert.equal(http.mcp_server_type, "streamable_http");
  await client.mcpServers.delete(http.id);
}));

test("an unknown type is unprocessable", async () => {
  const serverName = name();
  const call = () =>
    client.mcpServers.create({ server_name: serverName, config: { mcp_server_type: "websocket", server_url: DEAD_URL } });
  await refused(call, UnprocessableEntityError, 422);
  assert.ok(!(await client.mcpServers.list()).some((it) => it.server_name === serverName));
});

test("unknown ids are not found in one request", async () => {
  for (const id of [UNKNOWN, "mcp_server-nope", "nope"]) {
    for (const call of [
      () => client.mcpServers.retrieve(id),
      () => client.mcpServers.delete(id),
      () => client.mcpServers.refresh(id),
      () => client.mcpServers.update(id, { server_name: "x", config: change("stdio") }),
      () => client.mcpServers.tools.list(id),
      () => client.mcpServers.tools.retrieve("tool-nope", { mcp_server_id: id }),
      () => client.mcpServers.tools.run("tool-nope", { mcp_server_id: id }),
    ]) {
      const error = await refused(call, NotFoundError, 404);
      assert.ok(error.error.detail);
    }
  }
});

test("no session is a 502 in one request", withUpstream("streamable_http", {}, async ({ upstream, register }) => {
  const server = await register(upstream.fields);
  const [echo] = await client.mcpServers.tools.list(server.id);
  const call = () => client.mcpServers.tools.run(echo.id, { mcp_server_id: server.id, args: { message: "x" } });
  assert.equal((await call()).func_return, "x");
  await client.mcpServers.update(server.id, { config: change("streamable_http", { server_url: DEAD_URL }) });
  const error = await refused(call, InternalServerError, 502);
  assert.equal(error.error.error.type, "mcp_connection_error");
  assert.equal(error.headers.get("x-should-retry"), "false");
}));
