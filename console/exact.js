// JSON without loss: JavaScript rounds numbers beyond 53 bits, and a tool may give or take an id that has more.

/** A number that JavaScript would round, with the digits it was written with. */
export class Exact {
  constructor(digits) {
    this.digits = digits;
  }
}

const TOKEN = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;

function isRounded(token) {
  const number = Number(token);
  if (!Number.isFinite(number)) return true;
  if (/^-?\d+$/.test(token)) return !Number.isSafeInteger(number);
  const digits = token.replace(/[eE].*$/, "").replace(/\D/g, "");
  return digits.replace(/^0+/, "").length > 15;
}

/** A number as it was typed: a plain one when it is kept so, else an Exact one. */
export const numberOf = (token) => (isRounded(token) ? new Exact(token) : Number(token));

/** Reads JSON, with Exact numbers where plain ones would be others; throws SyntaxError as JSON.parse does. */
export function read(text) {
  const value = JSON.parse(text);
  if (!/[\d.]{16}|\d[eE]/.test(text)) return value;
  const mark = unused(value);
  const marked = text.replace(TOKEN, (token) => (token[0] !== '"' && isRounded(token) ? `"${mark}${token}"` : token));
  return JSON.parse(marked, (_, part) =>
    typeof part === "string" && part.startsWith(mark) ? new Exact(part.slice(mark.length)) : part,
  );
}

/** Writes a value that `read` gave, or a plain one, on several lines. */
export function write(value, space = 2) {
  const mark = unused(value);
  const marked = JSON.stringify(mask(value, mark), null, space);
  return marked.replaceAll(new RegExp(`"${mark}([^"]*)"`, "g"), "$1");
}

/** Characters that people would not see in a field: those of `text.js`, but for the ones that JSON escapes anyway. */
const UNSEEN =
  /[\p{Cf}\p{Zl}\p{Zp}\p{Co}\u007F-\u009F\u034F\u115F\u1160\u17B4\u17B5\u2800\u3164\uFFA0\u{FE00}-\u{FE0F}\u{E0100}-\u{E01EF}]/gu;

const escape = (character) =>
  Array.from({ length: character.length }, (_, at) => `\\u${character.charCodeAt(at).toString(16).padStart(4, "0")}`).join("");

/** The same value as `write` writes, with escapes in place of what nobody would see: for fields, which show their text as it
 *  is. */
export const writeVisibly = (value) => write(value).replace(UNSEEN, escape);

/** What is in no text of `value`. It is short whatever they are: it stands before each exact number, and in a pattern. */
function unused(value) {
  const taken = new Set(Array.from(JSON.stringify(value).matchAll(/exact(\d+):/g), ([, number]) => number));
  let number = 0;
  while (taken.has(String(number))) number += 1;
  return `exact${number}:`;
}

function mask(value, mark) {
  if (value instanceof Exact) return mark + value.digits;
  if (Array.isArray(value)) return value.map((item) => mask(item, mark));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, mask(item, mark)]));
}

/** Deeper JSON than this is not indented: the spaces would be more than the text. */
const DEEPEST = 100;

/** The same JSON object or array on several lines, or null when the text is none: every number, escape and repeated key
 *  stays as it is written. */
export function indent(text) {
  if (!/^\s*[[{]/.test(text)) return null;
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  const out = [];
  let depth = 0;
  const line = () => out.push("\n", "  ".repeat(depth));
  const tokens = text.match(/"[^"\\]*(?:\\.[^"\\]*)*"|[[\]{},:]|[^\s[\]{},:"]+/g);
  for (const [at, token] of tokens.entries()) {
    if (token === "{" || token === "[") {
      out.push(token);
      depth += 1;
      if (depth > DEEPEST) return null;
      if (tokens[at + 1] !== "}" && tokens[at + 1] !== "]") line();
    } else if (token === "}" || token === "]") {
      depth -= 1;
      if (tokens[at - 1] !== "{" && tokens[at - 1] !== "[") line();
      out.push(token);
    } else if (token === ",") {
      out.push(token);
      line();
    } else {
      out.push(token === ":" ? ": " : token);
    }
  }
  return out.join("");
}
