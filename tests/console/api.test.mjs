import assert from "node:assert/strict";
import { afterEach, test } from "node:test";

import { ApiError, call, onUnauthorized, setToken, stream, token } from "../../console/api.js";

/** Answers each request with the next of `answers`; gives the requests that were made. */
function serve(...answers) {
  const requests = [];
  globalThis.fetch = async (path, options) => {
    requests.push({ path, ...options });
    const answer = answers.shift();
    if (answer instanceof Error) throw answer;
    return answer;
  };
  return requests;
}

const json = (status, body) => new Response(JSON.stringify(body), { status });
const UNAUTHORIZED = { detail: "Unauthorized", code: "unauthorized", request_id: "r" };
const RUN = "/v1/mcp-servers/mcp_server-1/tools/tool-1/run";

afterEach(() => {
  setToken(null);
  onUnauthorized(null);
});

test("a call carries JSON, the token when there is one, and nothing of the browser's", async () => {
  const requests = serve(json(200, { a: 1 }), json(200, []), new Response(null, { status: 204 }));
  assert.deepEqual(await call("POST", "/v1/x", { b: 2 }), { a: 1 });
  setToken("t-1");
  assert.deepEqual(await call("GET", "/v1/x"), []);
  assert.equal(await call("DELETE", "/v1/x"), null);
  assert.equal(requests[0].body, '{"b":2}');
  assert.equal(requests[0].headers["content-type"], "application/json");
  assert.equal(requests[0].headers.authorization, undefined);
  assert.equal(requests[1].headers.authorization, "Bearer t-1");
  assert.equal(requests[1].body, undefined);
  for (const { credentials, cache, redirect } of requests) {
    assert.deepEqual([credentials, cache, redirect], ["omit", "no-store", "error"]);
  }
});

test("errors of every shape have a sentence and a code", async () => {
  for (const [answer, code, message] of [
    [json(404, { detail: "There is no MCP server with this id.", code: "not_found" }), "not_found", "There is no MCP server with this id."],
    [json(404, { detail: { code: "MCPServerUnavailable", message: "No", error: "refused" }, code: "mcp_server_unavailable" }), "mcp_server_unavailable", "No: refused"],
    [json(502, { error: { type: "mcp_connection_error", message: "No", detail: "gone" } }), "mcp_connection_error", "No: gone"],
    [new Response("<html>", { status: 503 }), "http_503", "Portolan, or a proxy before it, answered with the status 503."],
    [json(500, null), "http_500", "Portolan, or a proxy before it, answered with the status 500."],
    [new TypeError("Failed to fetch"), "no_connection", "Portolan cannot be reached. See that it is running, then try again."],
  ]) {
    serve(answer);
    await assert.rejects(call("GET", "/v1/x"), (error) => {
      assert.ok(error instanceof ApiError);
      assert.deepEqual([error.code, error.message], [code, message]);
      return true;
    });
  }
  const errors = [{ loc: ["body", "server_name"], msg: "no" }];
  serve(json(422, { detail: "no", code: "invalid_request", errors }));
  await assert.rejects(call("POST", "/v1/x", {}), (error) => assert.deepEqual(error.errors, errors) ?? true);
});

test("an answer that is no JSON is no lost connection", async () => {
  for (const parse of [undefined, () => { throw new RangeError("deep"); }]) {
    serve(new Response(parse ? "{}" : "<html>"));
    await assert.rejects(call("POST", RUN, {}, { parse }), { code: "unreadable_answer", status: 200 });
  }
});

test("however many calls are refused, the user is asked once, and the calls are made again", async () => {
  let asked = 0;
  onUnauthorized(async ({ refused }) => {
    asked += 1;
    assert.equal(refused, false);
    await new Promise((resolve) => setTimeout(resolve, 5));
    setToken("right");
    return true;
  });
  const requests = serve(json(401, UNAUTHORIZED), json(401, UNAUTHORIZED), json(200, 1), json(200, 2));
  await Promise.all([call("GET", "/v1/a"), call("GET", "/v1/b")]);
  assert.equal(asked, 1);
  assert.deepEqual(requests.map(({ headers }) => headers.authorization), [undefined, undefined, "Bearer right", "Bearer right"]);
});

test("a token that is not taken is said to be refused, and who gives none sees the refusal", async () => {
  const said = [];
  onUnauthorized(async ({ refused }) => {
    said.push(refused);
    if (said.length === 1) setToken("wrong");
    return said.length === 1;
  });
  serve(json(401, UNAUTHORIZED), json(401, UNAUTHORIZED));
  await assert.rejects(call("GET", "/v1/x"), { status: 401, code: "unauthorized" });
  assert.deepEqual(said, [false, true]);
  assert.equal(token(), "wrong");
});

test("a run is never made again by itself", async () => {
  onUnauthorized(async () => { setToken("right"); return true; });
  const requests = serve(json(401, UNAUTHORIZED), json(200, {}));
  await assert.rejects(call("POST", RUN, { args: {} }), { status: 401 });
  assert.equal(requests.length, 1);
  await call("POST", RUN, { args: {} });
  assert.equal(requests.length, 2);
});

test("no time runs while the user looks for a token", async () => {
  onUnauthorized(async () => {
    await new Promise((resolve) => setTimeout(resolve, 150));
    setToken("right");
    return true;
  });
  const requests = serve(json(401, UNAUTHORIZED), json(200, "here"));
  assert.equal(await call("GET", "/v1/x", undefined, { timeout: 100 }), "here");
  assert.equal(requests[0].signal.aborted, true);
  assert.equal(requests[1].signal.aborted, false);
});

test("a stream's events come whole, wherever its bytes are cut", async () => {
  const events = [{ event: "connection_attempt", server_name: "é😀" }, { event: "error", message: "a\nb" }];
  const text = `: ping\n\n${events.map((event) => `data: ${JSON.stringify(event)}\n\n`).join("")}`;
  const bytes = new TextEncoder().encode(text);
  for (const size of [1, 7, bytes.length]) {
    const body = new ReadableStream({
      start(controller) {
        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
        controller.close();
      },
    });
    serve(new Response(body));
    const seen = [];
    await stream("/v1/connect", (event) => seen.push(event), new AbortController().signal);
    assert.deepEqual(seen, events);
  }
  serve(json(404, { detail: "No", code: "not_found" }));
  await assert.rejects(stream("/v1/connect", assert.fail, new AbortController().signal), { code: "not_found" });
});
