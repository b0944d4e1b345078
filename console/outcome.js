// What came of a run, sorted for the eye: the blocks of the tool's answer, or why there is none and what to do.

import { indent, write } from "./exact.js";

/** Images a browser draws and nothing more. SVG is a document that may refer to others: it is offered as a file. */
const PICTURES = ["image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "image/bmp"];
const SOUNDS = ["audio/mpeg", "audio/wav", "audio/x-wav", "audio/wave", "audio/ogg", "audio/mp4", "audio/aac", "audio/flac", "audio/webm"];

/** Longer JSON than this, in characters, is shown as it came. */
const LONGEST_JSON = 300_000;

/** Blocks of JSON in which structured content is looked for: the text that servers send beside it is among the first. */
const MOST_COMPARED = 5;

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const text = (value) => (typeof value === "string" ? value : "");

/** What came of a run, in the form of `outcomeOf` or `failureOf`; `answering` is its call. It never rejects: the tool may have
 *  run, and whoever ran it has to hear of it whatever the answer is like. */
export async function resultOf(answering) {
  let answer;
  try {
    answer = await answering;
  } catch (error) {
    return failureOf(error);
  }
  try {
    return outcomeOf(answer);
  } catch {
    return UNSHOWN;
  }
}

/** What is said of a run whose answer came, but is nothing that can be shown. */
export const UNSHOWN = {
  state: "failed",
  title: "No result to show",
  message: "The tool has run, but its answer cannot be shown here.",
  advice: "See what the tool did before you run it again.",
  code: null,
  errors: [],
};

/**
 * The 200 answer of a run as `{ state, title, duration, text, blocks }`. `state` is `success` or `error`, `duration` in
 * milliseconds, `text` all of it as Letta's clients see it. A block is one of
 *   `{ kind: "text", text, json }`: `json` is the same on several lines if it is an object or an array, else null
 *   `{ kind: "picture" | "sound" | "file", type, bytes, name }`: `bytes` a Uint8Array
 *   `{ kind: "link", uri, name, about }`
 *   `{ kind: "json", title, text }`: what else there may be
 */
export function outcomeOf(answer) {
  const failed = answer.status !== "success";
  const content = Array.isArray(answer.result?.content) ? answer.result.content : [];
  const blocks = content.map(blockOf);
  const structured = answer.result?.structuredContent;
  if (structured !== undefined && structured !== null) {
    const plain = write(structured, 0);
    const isLong = plain.length > LONGEST_JSON;
    if (isLong || !isAmong(blocks, plain)) {
      blocks.push({ kind: "json", title: "Structured content", text: isLong ? plain : write(structured) });
    }
  }
  if (blocks.length === 0 && text(answer.func_return) !== "") blocks.push(textBlock(answer.func_return));
  let title = "Success";
  if (failed) title = answer.result ? "Error of the tool" : "Error: no answer from the tool";
  return { state: failed ? "error" : "success", title, duration: answer.duration_ms, text: text(answer.func_return), blocks };
}

const squeeze = (written) => written.replace(/\s/g, "");

/** Whether one of the first blocks of JSON is the same as `written`, but for white space. */
function isAmong(blocks, written) {
  const sought = squeeze(written);
  const candidates = blocks.filter((block) => block.kind === "text" && block.json !== null).slice(0, MOST_COMPARED);
  return candidates.some((block) => squeeze(block.text) === sought);
}

const textBlock = (given) => ({ kind: "text", text: given, json: given.length > LONGEST_JSON ? null : indent(given) });

function blockOf(block) {
  if (!isObject(block)) return { kind: "json", title: "A block that is none", text: write(block) };
  const resource = isObject(block.resource) ? block.resource : {};
  switch (block.type) {
    case "text":
      return typeof block.text === "string" ? textBlock(block.text) : other(block);
    case "image":
    case "audio":
      return fileOf(block, block.data, block.mimeType, block.type) ?? other(block);
    case "resource":
      if (typeof resource.text === "string") return { ...textBlock(resource.text), title: text(resource.uri) };
      return fileOf(block, resource.blob, resource.mimeType, text(resource.uri)) ?? other(block);
    case "resource_link":
      return { kind: "link", uri: text(block.uri), name: text(block.title) || text(block.name), about: text(block.description) };
    default:
      return other(block);
  }
}

const other = (block) => ({ kind: "json", title: "Other content", text: write(block) });

function fileOf(block, data, type, name) {
  const bytes = typeof data === "string" ? bytesOf(data) : null;
  if (bytes === null) return null;
  const plain = text(type).split(";")[0].trim().toLowerCase();
  const kind = PICTURES.includes(plain) ? "picture" : SOUNDS.includes(plain) ? "sound" : "file";
  // What is kept as a file has no type that a browser would run.
  return { kind, type: plain, blobType: kind === "file" ? "application/octet-stream" : plain, bytes, name };
}

function bytesOf(base64) {
  try {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at += 1) bytes[at] = text.charCodeAt(at);
    return bytes;
  } catch {
    return null;
  }
}

const ADVICE = {
  tool_held: "Look at what changed in it above, then approve it.",
  forbidden: "This token may not run tools. Log out and give one with the scope run or admin.",
  unauthorized: "Run it again with a token of this Portolan.",
  too_many_attempts: "Wait a minute, then run it again with the right token.",
  not_found: "It may have been deleted: go back to its server and refresh the tools.",
  mcp_connection_error: "Nothing was run. See on the page of the server what is wrong with it.",
  overloaded: "Nothing was run. Try again in a moment.",
  unavailable: "Nothing was run. Try again in a moment; if it stays so, look at the database of Portolan.",
  body_too_large: "The arguments are too large to be sent.",
  body_incomplete: "Nothing was run. Try again.",
  invalid_request: "Nothing was run. Look at the arguments.",
  variable_missing:
    "The server's settings have a template. Its value comes from the operator's variables file or from the program that runs the tool; the console sends none.",
  variable_invalid: "Look at the templates in the server's settings, and at the variables for them.",
  internal: "Look for the request in the log of Portolan. The tool may have been run.",
  no_connection: "The tool may have been run all the same: see what it did before you run it again.",
  unreadable_answer: "The tool has probably been run: see what it did before you run it again.",
  no_answer: "The tool may have been run all the same: see what it did before you run it again.",
};

/**
 * Why a call failed: `{ state, title, message, advice, code, errors }`. `state` is `cancelled` when the user ended it, else
 * `failed`.
 */
export function failureOf(error) {
  if (error.name === "AbortError") {
    const advice = "What the tool did until then it has done: look before you run it again.";
    return { state: "cancelled", title: "Cancelled", message: "The call was cancelled.", advice, code: null, errors: [] };
  }
  return {
    state: "failed",
    title: "Failed",
    message: error.message,
    advice: Object.hasOwn(ADVICE, error.code) ? ADVICE[error.code] : null,
    code: error.code ?? null,
    errors: error.errors ?? [],
  };
}

/** A time span in milliseconds, as people say it. */
export function spanOf(milliseconds) {
  if (!Number.isFinite(milliseconds)) return "";
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  if (milliseconds < 60_000) return `${(milliseconds / 1000).toFixed(1)} s`;
  return `${Math.floor(milliseconds / 60_000)} min ${Math.floor((milliseconds % 60_000) / 1000)} s`;
}

/** A number of bytes, as people say it. */
export function sizeOf(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  if (bytes < 1_000_000) return `${(bytes / 1000).toFixed(1)} kB`;
  return `${(bytes / 1_000_000).toFixed(1)} MB`;
}

/** The type is the server's word, and what a file is opened with depends on how its name ends: there are no endings but
 *  these, and none of a program. */
const ENDINGS = {
  "image/png": "png",
  "image/jpeg": "jpg",
  "image/gif": "gif",
  "image/webp": "webp",
  "image/avif": "avif",
  "image/bmp": "bmp",
  "image/tiff": "tif",
  "image/svg+xml": "svg",
  "audio/mpeg": "mp3",
  "audio/wav": "wav",
  "audio/x-wav": "wav",
  "audio/wave": "wav",
  "audio/ogg": "ogg",
  "audio/mp4": "m4a",
  "audio/aac": "aac",
  "audio/flac": "flac",
  "audio/webm": "webm",
  "text/plain": "txt",
  "text/csv": "csv",
  "application/json": "json",
  "application/pdf": "pdf",
};

/** What ends a name of a file of this type. */
export const endingOf = (type) => (Object.hasOwn(ENDINGS, type) ? ENDINGS[type] : "bin");
