import assert from "node:assert/strict";
import { afterEach, mock, test } from "node:test";

import { open, until } from "./dom.mjs";

/** What answers, by method and path without its query; the others wait for ever. */
const answers = {};
const requests = [];
globalThis.fetch = async (path, options) => {
  requests.push({ path, ...options });
  const answer = answers[`${options.method} ${path.split("?")[0]}`];
  return answer ? answer(path) : new Promise(() => {});
};
const json = (body) => new Response(JSON.stringify(body));

const TOOL = "/v1/mcp-servers/s/tools/t";
const tool = (more = {}) => ({
  id: "t", name: "echo", description: "", json_schema: { name: "echo", parameters: { properties: {} } },
  metadata_: { mcp: { server_name: "s", definition_hash: "h", definition: { inputSchema: { type: "object", properties: {} } }, flags: [], changes: [], ...more } },
});

const { app, go } = await open("#/nowhere");
const button = (words) => app.all("button").find((node) => node.textContent.startsWith(words));
const says = (words) => until(() => app.textContent.includes(words));
const settle = () => new Promise((resolve) => setTimeout(resolve, 50));

const errors = mock.method(console, "error", () => {});
afterEach(() => {
  go("#/nowhere");
  for (const key of Object.keys(answers)) delete answers[key];
  requests.length = 0;
  errors.mock.resetCalls();
});

test("a page that cannot be drawn says what to do, and others are there", async () => {
  answers[`GET ${TOOL}`] = () => json({ id: "t", name: "broken" });
  go("#/servers/s/tools/t");
  await says("This page cannot be shown");
  assert.match(app.textContent, /Portolan.*Try again, or go to the servers/s);
  assert.equal(errors.mock.callCount(), 1);
  answers[`GET ${TOOL}`] = () => json(tool());
  button("Try again").fire("click");
  await says("Run it here");
  answers[`GET ${TOOL}`] = () => json({ id: "t", name: "broken" });
  go("#/nowhere");
  await says("There is no such page");
  go("#/servers/s/tools/t");
  await says("This page cannot be shown");
  // Another query is another page: what could not be drawn may be drawn there.
  answers[`GET ${TOOL}`] = () => json(tool());
  go("#/servers/s/tools/t?x=1");
  await says("Run it here");
});

test("a tool's page is drawn whatever its server writes", async () => {
  const definition = { inputSchema: { type: "object", properties: {} }, description: `exact:${":".repeat(35_000)}` };
  answers[`GET ${TOOL}`] = () => json(tool({ definition }));
  go("#/servers/s/tools/t");
  await says("Run it here");
  await says("exact::::");
});

test("who has run a tool hears of it, whatever the answer is like", async () => {
  answers[`GET ${TOOL}`] = () => json(tool());
  go("#/servers/s/tools/t");
  await says("Run it here");
  const run = async (body, words) => {
    answers[`POST ${TOOL}/run`] = () => new Response(body);
    app.all("form")[0].fire("submit");
    await says(words);
    await until(() => button("Run"));
  };
  await run("null", "The tool has run, but its answer cannot be shown here.");
  await run("<html>", "The tool has probably been run");
  await run('{"status":"success","func_return":"fine","result":null,"duration_ms":1}', "fine");
  // It is an answer, but a part of it is nothing that can be drawn.
  const draw = document.createTextNode;
  document.createTextNode = (data) => {
    if (data === "undrawable") throw new Error("No.");
    return draw(data);
  };
  await run('{"status":"success","func_return":"undrawable","result":null,"duration_ms":1}', "The tool has run, but its answer cannot be shown here.");
  document.createTextNode = draw;
  assert.ok(button("Run"), "the form stays");
});

const report = (...added) => ({ added, changed: [], unchanged: [], removed: [], ignored: [], variables: [] });

/** Answers imports one by one, when the test says so. */
function imports() {
  const waiting = [];
  answers["POST /v1/portolan/import"] = () => new Promise((resolve) => waiting.push((body) => resolve(json(body))));
  return waiting;
}

const box = () => app.all("input").find((node) => node.attributes.type === "checkbox");
const type = (text) => { const area = app.all("textarea")[0]; area.value = text; area.fire("input"); };

test("the answer to a check of what was edited since is dropped", async () => {
  const waiting = imports();
  go("#/add?how=file");
  await until(() => app.all("textarea").length);
  type("old");
  await settle();
  app.all("form")[0].fire("submit");
  await says("Checking…");
  type("new");
  await settle();
  assert.ok(!app.textContent.includes("Checking…"));
  app.all("form")[0].fire("submit");
  await until(() => waiting.length === 2);
  waiting[0](report("of-old"));
  await settle();
  assert.ok(!app.textContent.includes("of-old"));
  assert.equal(button("Import"), undefined);
  waiting[1](report("of-new"));
  await says("of-new");
  assert.deepEqual(requests.filter(({ method }) => method === "POST").map(({ body }) => body), ["old", "new"]);
});

test("what was checked is what is imported", async () => {
  const waiting = imports();
  go("#/add?how=file");
  await until(() => app.all("textarea").length);
  type("one");
  await settle();
  app.all("form")[0].fire("submit");
  await until(() => waiting.length === 1);
  const replace = box();
  waiting[0](report("a"));
  const take = await until(() => button("Import"));
  take.fire("click");
  await until(() => waiting.length === 2);
  await says("Importing…");
  const area = app.all("textarea")[0];
  assert.ok(area.attributes.readonly !== undefined, "nothing is edited while it is imported");
  assert.ok(replace.attributes.disabled !== undefined);
  waiting[1](report("a"));
  await says("Portolan connects to the servers now");
  const sent = requests.filter(({ method }) => method === "POST");
  assert.deepEqual(sent.map(({ body }) => body), ["one", "one"]);
  assert.deepEqual(sent.map(({ path }) => path.split("?")[1]), ["mode=merge&dry_run=true", "mode=merge&dry_run=false"]);
  await settle();
  assert.equal(area.attributes.readonly, undefined);
});

test("'Remove' that is chosen after a check wants another check", async () => {
  const waiting = imports();
  go("#/add?how=file");
  await until(() => app.all("textarea").length);
  type("one");
  await settle();
  app.all("form")[0].fire("submit");
  await until(() => waiting.length === 1);
  box().checked = true;
  box().fire("change");
  await settle();
  waiting[0](report("a"));
  await settle();
  assert.equal(button("Import"), undefined);
  app.all("form")[0].fire("submit");
  await until(() => waiting.length === 2);
  waiting[1](report("a"));
  await until(() => button("Import"));
  assert.match(requests.at(-1).path, /mode=replace&dry_run=true$/);
});
