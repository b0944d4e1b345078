// Never twice: what the SDK repeats by itself, with its default retries, reaches the tool once.

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import Letta from "@letta-ai/letta-client";
import { Cutter, eventually, Portolan, Upstream } from "./processes.mjs";

// So that a client with a timeout of 2 s sees the head of a long run in time.
const EARLY = { PORTOLAN_EARLY_HEAD_AFTER: "500ms", PORTOLAN_DRIP_EVERY: "500ms" };
let number = 0;

/** Runs `body` with a Portolan of its own before a tool that counts how often it was called. */
function withBench(settings, body) {
  return async () => {
    const upstream = await Upstream.start("stdio", { effects: true });
    const portolan = await Portolan.start(settings);
    const bench = { portolan, tries: [], heads: 0, worked: () => upstream.worked() };
    const counted = async (url, init) => {
      bench.tries.push(new Headers(init.headers).get("x-stainless-retry-count"));
      const response = await fetch(url, init);
      bench.heads += 1;
      return response;
    };
    const setup = new Letta({ baseURL: portolan.url, apiKey: "any" });
    const config = { mcp_server_type: "stdio", ...upstream.fields };
    const server = await setup.mcpServers.create({ server_name: `bench-js-${number++}`, config });
    const work = (await setup.mcpServers.tools.list(server.id)).find((tool) => tool.name === "work");
    bench.run = (args, { url = portolan.url, ...options } = {}) => {
      const client = new Letta({ baseURL: url, apiKey: "any", fetch: counted, ...options });
      const running = client.mcpServers.tools.run(work.id, { mcp_server_id: server.id, args });
      // Awaited later; until then a failure is nobody's.
      running.catch(() => {});
      return running;
    };
    bench.working = () => eventually("the tool works", () => upstream.worked() > 0);
    try {
      await body(bench);
    } finally {
      if (!bench.stopped) await portolan.stop();
      await upstream.stop();
    }
  };
}

/** Asserts a good end, that these were the first tries, and one call. */
async function worked(bench, running, tries, more = 0) {
  const result = await running;
  assert.deepEqual([result.status, result.func_return], ["success", "worked"]);
  assert.deepEqual(bench.tries.slice(0, tries.length), tries);
  assert.ok(bench.tries.length <= tries.length + more, `${bench.tries.length} tries`);
  assert.equal(bench.worked(), 1);
}

describe("never twice", () => {
  test("a run longer than the timeout is one request", withBench(EARLY, async (bench) => {
    await worked(bench, bench.run({ seconds: 5 }, { timeout: 2_000 }), ["0"]);
  }));

  // Once is enough for what takes so long.
  if (!process.env.PORTOLAN_DATABASE_URL) {
    test("a run of 70 seconds is one request with every default", withBench({}, async (bench) => {
      await worked(bench, bench.run({ seconds: 70 }), ["0"]);
    }));
  }

  test("a client that gives up too early gets the outcome in a later try", withBench({}, async (bench) => {
    await worked(bench, bench.run({ seconds: 4 }, { timeout: 2_000 }), ["0", "1"], 1);
  }));

  test("a connection that is cut costs no second call", withBench({}, async (bench) => {
    const proxy = await Cutter.start(bench.portolan.url);
    const running = bench.run({ seconds: 3 }, { url: proxy.url });
    await bench.working();
    proxy.cut();
    await worked(bench, running, ["0", "1"]);
    proxy.stop();
  }));

  // This SDK repeats nothing once it has seen a head.
  test("a connection that is cut after the head is one error", withBench(EARLY, async (bench) => {
    const proxy = await Cutter.start(bench.portolan.url);
    const running = bench.run({ seconds: 3 }, { url: proxy.url });
    await eventually("the head is there", () => bench.heads > 0);
    proxy.cut();
    await assert.rejects(running);
    assert.deepEqual(bench.tries, ["0"]);
    assert.equal(bench.worked(), 1);
    proxy.stop();
  }));

  test("a server that dies after its work is one error", withBench({}, async (bench) => {
    const result = await bench.run({ die: true });
    assert.equal(result.status, "error");
    assert.match(result.func_return, /may have run/);
    assert.deepEqual(bench.tries, ["0"]);
    assert.equal(bench.worked(), 1);
  }));

  test("a stop during a run is one result", withBench({}, async (bench) => {
    const running = bench.run({ seconds: 3 });
    await bench.working();
    bench.stopped = true;
    await bench.portolan.stop();
    await worked(bench, running, ["0"]);
  }));

  for (const [name, settings] of Object.entries({ "without a head": {}, "after the head": EARLY })) {
    test(`a stop that cannot wait is one error, ${name}`, withBench({ PORTOLAN_DRAIN_TIMEOUT: "2s", ...settings }, async (bench) => {
      const running = bench.run({ seconds: 300 });
      await bench.working();
      bench.stopped = true;
      await bench.portolan.stop();
      const result = await running;
      assert.equal(result.status, "error");
      assert.match(result.func_return, /stopped before the tool answered/);
      assert.deepEqual(bench.tries, ["0"]);
      assert.equal(bench.worked(), 1);
    }));
  }
});
