import assert from "node:assert/strict";
import { test } from "node:test";

import { UNSHOWN, endingOf, failureOf, outcomeOf, resultOf, sizeOf, spanOf } from "../../console/outcome.js";

const answer = (result, more = {}) => ({ status: "success", func_return: "", result, duration_ms: 1, ...more });
const blocks = (...content) => outcomeOf(answer({ content })).blocks;
const base64 = (text) => Buffer.from(text).toString("base64");

test("texts are texts, and JSON is seen as such", () => {
  const [plain, json, html] = blocks(
    { type: "text", text: "\u001b[31mred\u001b[0m" }, { type: "text", text: '{"id":12345678901234567890}' }, { type: "text", text: "<b>x</b>" },
  );
  assert.deepEqual([plain.kind, plain.json, plain.text], ["text", null, "\u001b[31mred\u001b[0m"]);
  assert.equal(json.json, '{\n  "id": 12345678901234567890\n}');
  assert.deepEqual([html.kind, html.text], ["text", "<b>x</b>"]);
});

test("only safe pictures are drawn, only known sounds are played", () => {
  const kinds = (type, mimeType) => blocks({ type, data: base64("x"), mimeType })[0];
  for (const type of ["image/png", "image/jpeg", "image/webp", "IMAGE/PNG; x=y"]) assert.equal(kinds("image", type).kind, "picture");
  for (const type of ["image/svg+xml", "text/html", "image/svg+xml; charset=utf-8", "", undefined, 5]) {
    assert.deepEqual([kinds("image", type).kind, kinds("image", type).blobType], ["file", "application/octet-stream"]);
  }
  assert.equal(kinds("audio", "audio/mpeg").kind, "sound");
  assert.equal(kinds("audio", "text/html").kind, "file");
  assert.equal(blocks({ type: "image", data: "!!!", mimeType: "image/png" })[0].kind, "json");
});

test("resources, links and unknown blocks", () => {
  const [file, note, link, strange, none] = blocks(
    { type: "resource", resource: { uri: "file:///a.bin", blob: base64("abc"), mimeType: "application/pdf" } },
    { type: "resource", resource: { uri: "file:///a.txt", text: "body" } },
    { type: "resource_link", uri: "javascript:alert(1)", name: "x" },
    { type: "hologram", data: 1 },
    null,
  );
  assert.deepEqual([file.kind, file.bytes.length, file.name], ["file", 3, "file:///a.bin"]);
  assert.deepEqual([note.kind, note.text, note.title], ["text", "body", "file:///a.txt"]);
  assert.deepEqual(link, { kind: "link", uri: "javascript:alert(1)", name: "x", about: "" });
  assert.deepEqual([strange.kind, none.kind], ["json", "json"]);
});

test("structured content is shown once", () => {
  const structuredContent = { a: [1] };
  assert.equal(outcomeOf(answer({ content: [{ type: "text", text: '{"a": [1]}' }], structuredContent })).blocks.length, 1);
  assert.deepEqual(outcomeOf(answer({ content: [{ type: "text", text: "one" }], structuredContent })).blocks[1].text, '{\n  "a": [\n    1\n  ]\n}');
});

test("structured content beside many blocks is no more work than they are", () => {
  const began = performance.now();
  const content = Array.from({ length: 1000 }, (_, id) => ({ type: "text", text: `{"id":${id}}` }));
  for (const length of [250_000, 500_000]) {
    const structuredContent = { text: "a ".repeat(length / 2) };
    const { blocks } = outcomeOf(answer({ content, structuredContent }));
    assert.equal(blocks.length, 1001);
    assert.deepEqual(JSON.parse(blocks[1000].text), structuredContent);
  }
  // Once for each block it takes most of a minute.
  assert.ok(performance.now() - began < 15_000, `${performance.now() - began} ms`);
});

test("whoever ran a tool is told, whatever came of it", async () => {
  assert.equal(await resultOf(Promise.resolve(null)), UNSHOWN);
  assert.equal((await resultOf(Promise.resolve(answer({ content: [{ type: "text", text: "x" }] })))).state, "success");
  assert.equal((await resultOf(Promise.reject(new DOMException("stop", "AbortError")))).state, "cancelled");
});

test("failures of the tool, of the call and of Portolan are told apart", () => {
  const failed = outcomeOf(answer({ content: [{ type: "text", text: "no" }], isError: true }, { status: "error", func_return: "no" }));
  assert.deepEqual([failed.state, failed.title], ["error", "Error of the tool"]);
  const late = outcomeOf(answer(null, { status: "error", func_return: "The tool did not answer within 300 s." }));
  assert.deepEqual([late.title, late.blocks[0].text], ["Error: no answer from the tool", "The tool did not answer within 300 s."]);
  const held = failureOf(Object.assign(new Error("held"), { name: "ApiError", code: "tool_held", status: 403 }));
  assert.deepEqual([held.state, held.code, held.message], ["failed", "tool_held", "held"]);
  assert.match(held.advice, /approve/);
  assert.equal(failureOf(new DOMException("stop", "AbortError")).state, "cancelled");
  assert.equal(failureOf(Object.assign(new Error("odd"), { code: "constructor" })).advice, null);
});

test("times, sizes and endings", () => {
  assert.deepEqual([12.4, 1500, 61_000, undefined].map(spanOf), ["12 ms", "1.5 s", "1 min 1 s", ""]);
  assert.deepEqual([12, 1500, 2_500_000].map(sizeOf), ["12 B", "1.5 kB", "2.5 MB"]);
  assert.deepEqual(["image/png", "image/jpeg", "audio/x-wav", "audio/mp4", "text/plain"].map(endingOf), ["png", "jpg", "wav", "m4a", "txt"]);
  for (const type of ["image/exe", "audio/bat", "image/x-lnk", "text/html", "application/x-sh", "image/../x", "constructor", "", "audio/scr"]) {
    assert.equal(endingOf(type), "bin", type);
  }
});
