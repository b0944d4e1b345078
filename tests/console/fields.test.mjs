import assert from "node:assert/strict";
import { test } from "node:test";

import { argumentsOf, draftOf, fit, formOf, valueOf } from "../../console/fields.js";
import { write } from "../../console/exact.js";

const schema = (properties, required = []) => ({ type: "object", properties, required });
const only = (property, required) => formOf(schema({ it: property }, required ? ["it"] : [])).fields[0];
const enter = (field, draft) => valueOf(field, draft);

/** What comes back of arguments that went through the form. */
const through = (form, value) => write(valueOf(form, fit(form, value)).value, 0);

test("each type has its control", () => {
  for (const [property, kind] of [
    [{ type: "string" }, "text"],
    [{ type: "number" }, "number"],
    [{ type: "integer" }, "integer"],
    [{ type: "boolean" }, "boolean"],
    [{ enum: ["a", 1, null] }, "choice"],
    [{ const: "a" }, "choice"],
    [{ type: "null" }, "choice"],
    [{ type: "array", items: { type: "string" } }, "list"],
    [schema({ a: { type: "string" } }), "object"],
    [{ properties: { a: { type: "string" } } }, "object"],
    [{ type: ["string", "integer"] }, "variants"],
    [{ anyOf: [{ type: "string" }, { type: "array", items: { type: "string" } }] }, "variants"],
    [{ oneOf: [{ const: 1, title: "one" }, { const: 2 }] }, "choice"],
    [{}, "json"],
    [true, "json"],
    [false, "json"],
    [null, "json"],
    [17, "json"],
    [{ type: "object" }, "json"],
    [{ type: "array" }, "json"],
    [{ type: "array", prefixItems: [{ type: "string" }], items: {} }, "json"],
    [{ type: "surprise" }, "json"],
    [{ allOf: [{ type: "string" }, { minLength: 1 }] }, "json"],
    [{ allOf: [{ type: "string" }] }, "text"],
    [{ enum: Array.from({ length: 501 }, (_, index) => index) }, "json"],
  ]) {
    assert.equal(only(property).kind, kind, JSON.stringify(property)?.slice(0, 80));
  }
});

test("null is an answer where the schema says so", () => {
  for (const property of [
    { type: ["string", "null"] },
    { anyOf: [{ type: "string" }, { type: "null" }], title: "It", default: null },
  ]) {
    const field = only(property);
    assert.deepEqual([field.kind, field.nullable], ["text", true]);
    assert.equal(enter(field, { mode: "null" }).value, null);
  }
  const usual = { anyOf: [{ type: "string" }, { type: "null" }], default: null };
  assert.deepEqual([draftOf(only(usual)), draftOf(only(usual, true))], [{ mode: "absent" }, { mode: "null" }]);
});

test("references are followed, but not for ever", () => {
  const form = formOf({
    ...schema({ point: { $ref: "#/$defs/Point", description: "where" }, tree: { $ref: "#/$defs/Tree" }, lost: { $ref: "#/$defs/None" } }),
    $defs: {
      Point: schema({ x: { type: "number" } }, ["x"]),
      Tree: schema({ name: { type: "string" }, children: { type: "array", items: { $ref: "#/$defs/Tree" } } }),
    },
  });
  const [point, tree, lost] = form.fields;
  assert.deepEqual([point.kind, point.hint, point.fields[0].required], ["object", "where", true]);
  assert.deepEqual([tree.kind, tree.fields[0].kind, tree.fields[1].kind], ["object", "text", "json"]);
  assert.match(tree.fields[1].why, /contains itself/);
  assert.equal(lost.kind, "json");
  assert.equal(formOf({ $ref: "#" }).kind, "json");
  assert.equal(formOf({ $ref: "#/$defs/A", $defs: { A: { $ref: "#/$defs/A" } } }).kind, "json");
});

test("a form has an end", () => {
  const wide = Object.fromEntries(Array.from({ length: 5000 }, (_, index) => [`p${index}`, { type: "string" }]));
  assert.equal(formOf(schema(wide)).kind, "json");
  let deep = { type: "string" };
  for (let level = 0; level < 60; level += 1) deep = schema({ deeper: deep });
  assert.equal(formOf(deep).kind, "object");
  const bushy = { $defs: {}, type: "object", properties: { a: { $ref: "#/$defs/L0" } } };
  for (let level = 0; level < 30; level += 1) {
    bushy.$defs[`L${level}`] = { anyOf: Array.from({ length: 12 }, () => schema({ a: { $ref: `#/$defs/L${level + 1}` } })) };
  }
  assert.equal(formOf(bushy).kind, "object");
  for (const odd of [{}, null, [], "x", { type: "object", properties: null }, { type: "object", required: "all" }]) {
    assert.ok(formOf(odd).kind);
  }
});

test("what is left out is left out, and what is empty is sent", () => {
  const form = formOf(schema({ a: { type: "string" }, b: { type: "boolean" }, c: { type: "array", items: { type: "string" } } }));
  assert.equal(through(form, {}), "{}");
  assert.equal(through(form, { a: "", b: false, c: [] }), '{"a":"","b":false,"c":[]}');
  assert.deepEqual(valueOf(form, draftOf(form)), { value: {}, problems: [] });
});

test("defaults stand in the form, unless they do not suit", () => {
  const form = formOf(schema({ a: { type: "integer", default: 2 }, b: { type: "string", default: 3 }, c: { const: "c" }, d: { enum: ["x", "y"], default: "y" } }, ["c"]));
  assert.deepEqual(valueOf(form, draftOf(form)).value, { a: 2, c: "c", d: "y" });
});

test("values survive the way through the form", () => {
  const form = formOf({
    ...schema({
      text: { type: "string" },
      count: { type: "integer" },
      ratio: { type: "number" },
      kind: { enum: ["a", 1, null, { deep: true }] },
      free: {},
      list: { type: "array", items: { anyOf: [{ type: "string" }, schema({ n: { type: "integer" } }, ["n"])] } },
      nested: schema({ inner: { type: "string" } }),
    }),
    additionalProperties: true,
  });
  for (const value of [
    { text: "two\nlines \u202e \u0000", count: 5, ratio: -0.5, kind: { deep: true }, free: [1, { a: null }] },
    { list: ["a", { n: 1 }, 5, { unknown: 1 }], nested: { inner: "x", more: 1 } },
    { text: 5, count: "five", ratio: null, kind: "other", nested: [], list: {} },
    { unknown: 1, constructor: 2, toString: 3 },
    {},
  ]) {
    const sent = valueOf(form, fit(form, value));
    assert.deepEqual(JSON.parse(write(sent.value)), JSON.parse(JSON.stringify(value)));
    assert.ok(sent.problems.every((problem) => !problem.fatal));
  }
  const digits = argumentsOf('{"count":12345678901234567890,"free":[12345678901234567890],"x":0.12345678901234567890}').value;
  assert.equal(through(form, digits), '{"count":12345678901234567890,"free":[12345678901234567890],"x":0.12345678901234567890}');
});

test("names that mean something to JavaScript are names", () => {
  const form = formOf(JSON.parse('{"type":"object","properties":{"__proto__":{"type":"string"},"constructor":{"type":"string"},"hasOwnProperty":{"type":"string"}}}'));
  assert.equal(through(form, {}), "{}");
  const text = '{"__proto__":"a","constructor":"b","hasOwnProperty":"c"}';
  assert.equal(through(form, argumentsOf(text).value), text);
  assert.equal({}.a, undefined);
});

test("numbers are taken as people write them", () => {
  const field = only({ type: "number" }, true);
  for (const [typed, sent] of [["1", "1"], [" -2.50 ", "-2.50"], ["+3", "3"], [".5", "0.5"], ["7.", "7"], ["007", "7"], ["1e3", "1000"], ["9007199254740993", "9007199254740993"]]) {
    const { value, problems } = enter(field, { mode: "given", value: typed });
    assert.equal(Number(write(value, 0)), Number(sent));
    assert.deepEqual(problems, []);
  }
  for (const typed of ["one", "1,5", "0x10", "--1", "Infinity", "NaN", ".", "1 2"]) {
    assert.equal(enter(field, { mode: "given", value: typed }).problems[0].fatal, true, typed);
  }
});

test("checks help, and do not forbid what can be sent", () => {
  const form = formOf(schema({
    name: { type: "string", minLength: 3, pattern: "(a+)+$" },
    age: { type: "integer", minimum: 18, exclusiveMaximum: 100 },
    list: { type: "array", items: { type: "string" }, minItems: 2 },
    must: { type: "string" },
  }, ["must"]));
  const { value, problems } = valueOf(form, fit(form, { name: "aa", age: 100, list: ["x"] }));
  assert.deepEqual(value, { name: "aa", age: 100, list: ["x"] });
  assert.deepEqual(problems.map(({ path, fatal }) => [path.join(), fatal]), [["0", false], ["1", false], ["2", false], ["3", false]]);
  assert.deepEqual(enter(form.fields[1], { mode: "given", value: "20.5" }).problems[0].text, "This is not a whole number.");
});

test("what is no JSON is said to be none, where it stands", () => {
  const form = formOf(schema({ free: {} }));
  const draft = { mode: "given", value: { drafts: [{ mode: "json", value: "{oops" }], extra: "[1]" } };
  const { problems } = valueOf(form, draft);
  assert.deepEqual(problems.map(({ path, fatal }) => [path.join(), fatal]), [["0", true], ["extra", true]]);
  assert.equal(argumentsOf("[1]").problems[0].fatal, true);
  assert.equal(argumentsOf("{").problems[0].fatal, true);
  assert.deepEqual(argumentsOf("  "), { value: {}, problems: [] });
});
