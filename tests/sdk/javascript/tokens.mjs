// Tokens through the unmodified SDK: its `apiKey` is the token, and its errors are the ones for that. Imported by sdk.test.mjs.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { test } from "node:test";
import Letta, { AuthenticationError, PermissionDeniedError, RateLimitError } from "@letta-ai/letta-client";
import { Portolan, Upstream } from "./processes.mjs";

const ADMIN = "admin-0123456789abcdef";

test("the apiKey is the token", async () => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "portolan-tokens-"));
  const tokens = path.join(folder, "tokens");
  const made = ["token", "new", "suite", "--scope", "run", "--file", tokens];
  const runner = execFileSync(process.env.PORTOLAN_BIN, made, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
  const portolan = await Portolan.start({ PORTOLAN_TOKENS_FILE: tokens, LETTA_SERVER_PASSWORD: ADMIN });
  const upstream = await Upstream.start("stdio");
  let requests = 0;
  const client = (apiKey) =>
    new Letta({ baseURL: portolan.url, apiKey, fetch: (...it) => ((requests += 1), fetch(...it)) });
  const [admin, mayRun, stranger] = [ADMIN, runner, "wrong"].map(client);
  let server;
  try {
    const config = { mcp_server_type: "stdio", ...upstream.fields };
    server = await admin.mcpServers.create({ server_name: "suite-js-tokens", config });
    const echo = (await mayRun.mcpServers.tools.list(server.id)).find((it) => it.name === "echo");
    const said = await mayRun.mcpServers.tools.run(echo.id, { mcp_server_id: server.id, args: { message: "hello" } });
    assert.deepEqual([said.status, said.func_return], ["success", "hello"]);
    const create = (it) => it.mcpServers.create({ server_name: "suite-js-refused", config });
    await assert.rejects(() => create(mayRun), PermissionDeniedError);
    assert.equal((await stranger.health()).status, "ok");
    requests = 0;
    for (const call of [() => stranger.mcpServers.list(), () => create(stranger)]) {
      await assert.rejects(call, (error) => {
        assert.ok(error instanceof AuthenticationError);
        assert.deepEqual([error.status, error.error.detail], [401, "Unauthorized"]);
        return true;
      });
    }
    assert.equal(requests, 2);
    // A guesser is told to stop, and the SDK does not go on by itself.
    const refusals = [];
    for (let n = 0; n < 30; n++) await stranger.mcpServers.list().catch((error) => refusals.push(error.constructor));
    assert.deepEqual(new Set(refusals), new Set([AuthenticationError, RateLimitError]));
    assert.deepEqual([refusals.length, requests], [30, 32]);
  } finally {
    if (server) await admin.mcpServers.delete(server.id);
    await upstream.stop();
    await portolan.stop();
    fs.rmSync(folder, { recursive: true, force: true });
  }
});
