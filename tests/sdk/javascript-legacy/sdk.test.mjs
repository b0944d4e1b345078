// The unmodified JavaScript SDK of before 1.0, doing all it can about MCP, against a live Portolan.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { LettaClient, LettaError } from "@letta-ai/letta-client";
import { Portolan, Upstream } from "../javascript/processes.mjs";

const KINDS = ["stdio", "sse", "streamable_http"];
const NAMES = ["echo", "add", "fail", "texts", "image", "structured", "empty", "whoami"];
const MASK = "********";
const DEAD_URL = "http://127.0.0.1:1/mcp"; // nobody listens on port 1

let portolan, client;

before(async () => {
  portolan = await Portolan.start();
  client = new LettaClient({ baseUrl: portolan.url, token: "any" });
});

after(() => portolan.stop());

/** A configuration in the words of the SDK. */
function config(serverName, kind, upstream, more = {}) {
  const { server_url: serverUrl, ...command } = upstream.fields;
  return { serverName, type: kind, ...(serverUrl ? { serverUrl } : command), ...more };
}

/** Runs `body` with an upstream of the kind, and ends it and every server that is registered. */
function withUpstream(kind, options, body) {
  return async () => {
    const upstream = await Upstream.start(kind, options);
    try {
      await body(upstream);
    } finally {
      for (const name of Object.keys(await client.tools.listMcpServers())) await client.tools.deleteMcpServer(name);
      await upstream.stop();
    }
  };
}

/** Asserts that `call` is refused with the status. */
async function refused(status, call) {
  let error;
  await assert.rejects(call, (it) => {
    error = it;
    return it instanceof LettaError;
  });
  assert.equal(error.statusCode, status);
  return error;
}

const names = (servers) => servers.map((it) => it.serverName);
/** The SDK gives nulls of answers as undefined, or leaves them out. */
const plain = (object) => JSON.parse(JSON.stringify(object));

for (const kind of KINDS) {
  describe(kind, () => {
    test("add, list, update, delete", withUpstream(kind, {}, async (upstream) => {
      const one = config("one", kind, upstream);
      const added = await client.tools.addMcpServer(one);
      assert.deepEqual(plain(added), [one]);
      // This SDK encodes what it puts into a path.
      for (const name of ["two words", "a/b", "100%", "名前 / ü", "test", "connect"]) {
        await client.tools.addMcpServer(config(name, kind, upstream));
        assert.deepEqual((await client.tools.listMcpToolsByServer(name)).map((it) => it.name), NAMES);
        assert.equal((await client.tools.addMcpTool(name, "echo")).tags[0], `mcp:${name}`);
        const fields = config(name, kind, upstream);
        // Of a change it sends `stdioConfig` alone; what else it is given it leaves out.
        const change = kind === "stdio" ? { stdioConfig: { ...fields, env: { A: "1" } } } : { serverUrl: DEAD_URL };
        const changed = await client.tools.updateMcpServer(name, change);
        assert.deepEqual(plain(changed), kind === "stdio" ? { ...fields, env: { A: "1" } } : fields);
        assert.ok(Object.keys(await client.tools.listMcpServers()).includes(name));
        assert.deepEqual(names(await client.tools.deleteMcpServer(name)), ["one"]);
      }
      assert.deepEqual(plain(await client.tools.listMcpServers()), { one });
      await refused(409, () => client.tools.addMcpServer(one));
      await refused(404, () => client.tools.deleteMcpServer("nope"));
      await refused(404, () => client.tools.updateMcpServer("nope", { serverUrl: DEAD_URL }));
      await refused(404, () => client.tools.listMcpToolsByServer("nope"));
    }));

    test("live tools, with their health, and tools that are added", withUpstream(kind, {}, async (upstream) => {
      await client.tools.addMcpServer(config("s", kind, upstream));
      const [echo] = await client.tools.listMcpToolsByServer("s");
      assert.deepEqual(plain(echo.health), { status: "STRICT_COMPLIANT", reasons: [] });
      assert.deepEqual(echo.inputSchema.required, ["message"]);
      const tool = await client.tools.addMcpTool("s", "echo");
      assert.match(tool.id, /^tool-/);
      upstream.setState({ hide: ["fail"], extra: { more: "One more" } });
      const now = (await client.tools.listMcpToolsByServer("s")).map((it) => it.name);
      assert.deepEqual(now, [...NAMES.filter((it) => it !== "fail"), "more"]);
      assert.equal((await client.tools.addMcpTool("s", "more")).description, "One more");
      assert.equal((await client.tools.addMcpTool("s", "echo")).id, tool.id);
      await refused(404, () => client.tools.addMcpTool("s", "nope"));
    }));

    test("a test, and a connect, register nothing", withUpstream(kind, {}, async (upstream) => {
      const tried = await client.tools.testMcpServer(config("s", kind, upstream));
      assert.equal(tried.status, "success");
      assert.deepEqual(tried.tools.map((it) => it.name), NAMES);
      const events = [];
      for await (const event of await client.tools.connectMcpServer(config("s", kind, upstream))) events.push(event);
      assert.deepEqual(events.map((it) => it.event), ["connection_attempt", "success"]);
      assert.deepEqual(events[1].tools.map((it) => it.name), NAMES);
      assert.deepEqual(await client.tools.listMcpServers(), {});
    }));
  });
}

test("secrets are masked and sent", withUpstream("streamable_http", { require: "X-Suite: one" }, async (upstream) => {
  const secret = { authHeader: "X-Key", authToken: "abc", customHeaders: { "X-Suite": "one" } };
  const [added] = await client.tools.addMcpServer(config("s", "streamable_http", upstream, secret));
  assert.deepEqual([added.authHeader, added.authToken, added.customHeaders], ["X-Key", MASK, { "X-Suite": MASK }]);
  assert.equal((await client.tools.listMcpToolsByServer("s")).length, NAMES.length);
}));

test("who is away is an error, also in a stream", withUpstream("streamable_http", {}, async () => {
  const away = { serverName: "s", type: "streamable_http", serverUrl: DEAD_URL };
  const error = await refused(502, () => client.tools.testMcpServer(away, { maxRetries: 0 }));
  assert.equal(error.body.error.type, "mcp_connection_error");
  const events = [];
  for await (const event of await client.tools.connectMcpServer(away)) events.push(event);
  assert.deepEqual(events.map((it) => it.event), ["connection_attempt", "error"]);
  await refused(422, () => client.tools.addMcpServer({ ...away, serverUrl: "ftp://x" }));
}));
