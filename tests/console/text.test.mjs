import assert from "node:assert/strict";
import { test } from "node:test";

import { pieces, visible } from "../../console/text.js";

test("what nobody would see is written out", () => {
  for (const [text, shown] of [
    ["plain", "plain"],
    ["two\nlines\tand a tab", "two\nlines\tand a tab"],
    ["of\r\nWindows", "of\nWindows"],
    ["\x1b[31mred", "\\u{1b}[31mred"],
    ["a\rb\0c\x7fd\x9be", "a\\u{d}b\\u{0}c\\u{7f}d\\u{9b}e"],
    ["\u202egpj.exe\u2066", "\\u{202e}gpj.exe\\u{2066}"],
    ["zero\u200bwidth\ufeff\u00ad", "zero\\u{200b}width\\u{feff}\\u{ad}"],
    ["a\u2028b\u2029c", "a\\u{2028}b\\u{2029}c"],
    ["\u{e0041}\u{e0042}", "\\u{e0041}\\u{e0042}"],
    ["fill\u3164er\u2800s", "fill\\u{3164}er\\u{2800}s"],
    ["half \ud800 of a pair", "half \\u{d800} of a pair"],
    ["private \ue000", "private \\u{e000}"],
    ["selector b\ufe0f", "selector b\\u{fe0f}"],
    [`z${"\u0335".repeat(100)}algo`, `z${"\u0335".repeat(4)}\\u{335}\\u{335}…algo`],
  ]) {
    assert.equal(visible(text), shown);
  }
});

test("what people write is left as it is", () => {
  for (const text of ["naïve", "e\u0301", "नमस्ते", "ไม่เป็นไร", "عربي", "👩‍👩‍👧", "❤️", "👍🏽", "日本語", "<b>&amp;</b>", "'\"`${x}"]) {
    assert.equal(visible(text), text);
    assert.deepEqual(pieces(text), [text]);
  }
});

test("long text is cut, and never within a character", () => {
  assert.equal(visible("x".repeat(200)), "x".repeat(200));
  assert.equal(visible("x".repeat(201)), `${"x".repeat(200)}…`);
  assert.equal(visible("ab😀", 3), "ab…");
  assert.equal(visible("x".repeat(5_000_000), 10).length, 11);
  assert.deepEqual(pieces(""), []);
});
