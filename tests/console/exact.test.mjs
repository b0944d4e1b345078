import assert from "node:assert/strict";
import { test } from "node:test";

import { Exact, indent, numberOf, read, write, writeVisibly } from "../../console/exact.js";

test("numbers keep their digits", () => {
  for (const text of [
    '{"id":12345678901234567890,"near":9007199254740993,"small":-0.1234567890123456789,"far":1e400}',
    '[9007199254740993,"9007199254740993",{"9007199254740993":"exact:9007199254740993"}]',
    '"\\"12345678901234567890\\""',
    '{"__proto__":12345678901234567890,"exact:":1}',
    "12345678901234567890",
    "[123.45678901234567]",
  ]) {
    assert.equal(write(read(text), 0), text);
  }
  assert.equal(read('["\\u0065xact:1",12345678901234567890]')[0], "exact:1");
  assert.ok(read("9007199254740993") instanceof Exact);
  assert.equal(read("9007199254740991"), 9007199254740991);
  assert.equal(read("[1.5, 2e3]")[1], 2000);
  assert.equal(numberOf("0.25"), 0.25);
  assert.throws(() => read("{"), SyntaxError);
});

test("a key that is no key of a plain object stays one", () => {
  const value = read('{"__proto__":{"polluted":12345678901234567890}}');
  assert.equal({}.polluted, undefined);
  assert.deepEqual(Object.keys(value), ["__proto__"]);
});

test("indented JSON is the same JSON", () => {
  assert.equal(indent('{"a":[1.0,{"b":"x,{}:\\"]"}],"c":{},"a":[]}'), `{
  "a": [
    1.0,
    {
      "b": "x,{}:\\"]"
    }
  ],
  "c": {},
  "a": []
}`);
  for (const text of ["", "hello", "12", '"text"', "{broken", "[1,]", "null"]) assert.equal(indent(text), null, text);
  assert.equal(indent("[".repeat(5000) + "]".repeat(5000)), null);
  const long = JSON.stringify({ text: 'x"\\'.repeat(1_000_000) });
  assert.equal(JSON.parse(indent(long)).text.length, 3_000_000);
});

test("what is not seen is escaped, and means the same", () => {
  const value = { "a\u202e": ["\u200b\ufeff\u{e0041}", "\n plain é 漢 \u0000", 12345678901234567890n.toString()] };
  const text = writeVisibly(value);
  assert.match(text, /^[\x20-\x7eé漢\n]*$/);
  assert.deepEqual(JSON.parse(text), value);
});

test("what texts are like makes reading and writing neither slow nor large", () => {
  const colons = `exact:${":".repeat(50_000)}`;
  assert.deepEqual(JSON.parse(write({ colons })), { colons });
  const marks = Array.from({ length: 20_000 }, (_, number) => `exact${number}:`);
  const text = `{"colons":"${colons}","marks":${JSON.stringify(marks)},"ids":[${"12345678901234567890,".repeat(20_000)}0]}`;
  assert.equal(write(read(text), 0), text);
});
