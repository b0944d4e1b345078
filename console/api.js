// The REST API of this Portolan, as any other client uses it: one call and its JSON, or one stream and its events. A `401`
// asks the user for a token, which this tab keeps until it is closed or the user logs out.

const KEY = "portolan.token";

/** Milliseconds that a call may take, unless it is given others. */
const PATIENCE = 60_000;

/** Milliseconds that a stream may be silent: the server writes at least every 15 seconds. */
const SILENCE = 60_000;

/** The longest event of a stream, in characters. */
const MAX_EVENT = 16 * 1024 * 1024;

/** An answer that is no success. `status` is 0 when there was no answer; `code` is the API's word for it, `message` its
 *  sentence, `errors` what a 422 found, each with `loc` and `msg`. */
export class ApiError extends Error {
  constructor(status, code, message, errors = []) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.errors = errors;
  }
}

// Where a browser keeps nothing for this page, the token lasts as long as the page.
let held = null;
const watchers = new Set();

export function token() {
  try {
    return sessionStorage.getItem(KEY) ?? held;
  } catch {
    return held;
  }
}

/** `null` forgets it. */
export function setToken(value) {
  held = value;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // `held` has it.
  }
  for (const watcher of watchers) watcher(value);
}

/** Calls `watcher` with the token whenever it changes; returns what ends that. */
export function watchToken(watcher) {
  watchers.add(watcher);
  return () => watchers.delete(watcher);
}

let ask = null;
let asking = null;

/** `prompt({ refused })` asks the user for a token and resolves to whether there is a new one; `refused` says that the one
 *  of before was not taken. */
export function onUnauthorized(prompt) {
  ask = prompt;
}

/** However many calls are refused at a time, the user is asked once. Whether it is worth another try. */
async function newToken(tried) {
  if (token() !== tried && token() !== null) return true;
  if (!ask) return false;
  asking ??= ask({ refused: tried !== null }).finally(() => { asking = null; });
  return asking;
}

/** Sends a request and returns its JSON, `null` for an answer without a body.
 *
 *  `body` is what becomes JSON; a string is sent as it is. `timeout` is in milliseconds, `headers` are sent beside ours,
 *  `parse` reads the answer in place of `JSON.parse`.
 *  A call that was refused for its token is repeated with a new one; a run never is, the user starts it again. */
export async function call(method, path, body, { signal, timeout = PATIENCE, headers = {}, parse = JSON.parse } = {}) {
  const request = { method, headers: { accept: "application/json", ...headers } };
  if (body !== undefined) {
    request.headers["content-type"] = "application/json";
    request.body = typeof body === "string" ? body : JSON.stringify(body);
  }
  const response = await admitted(path, request, () => within(timeout, signal), !isRun(method, path));
  if (response.status === 204) return null;
  let text;
  try {
    text = await response.text();
  } catch (error) {
    throw unanswered(error);
  }
  try {
    return parse(text);
  } catch {
    throw new ApiError(response.status, "unreadable_answer", "Portolan, or a proxy before it, gave an answer that cannot be read here.");
  }
}

/** Opens a stream of events and calls `onEvent` with the object of each, until the server ends it or `signal` does.
 *  @throws {ApiError} when it does not begin, or breaks off. */
export async function stream(path, onEvent, signal) {
  const request = { method: "GET", headers: { accept: "text/event-stream" } };
  let silence;
  let timer;
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout((late) => late.abort(new DOMException("The stream is silent.", "TimeoutError")), SILENCE, silence);
  };
  const limit = () => {
    silence = new AbortController();
    wait();
    return AbortSignal.any([signal, silence.signal]);
  };
  try {
    const response = await admitted(path, request, limit, true);
    await events(response, onEvent, wait);
  } finally {
    clearTimeout(timer);
  }
}

async function events(response, onEvent, onSign) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      throw unanswered(error);
    }
    if (piece.done) return;
    onSign();
    rest += piece.value;
    const frames = rest.split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const data = frame.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data !== "") onEvent(JSON.parse(data));
    }
    if (rest.length > MAX_EVENT) {
      await reader.cancel();
      throw new ApiError(0, "event_too_large", "The answer is too large to be shown here.");
    }
  }
}

/** `limit()` gives the signal of one try: while the user looks for a token no time runs. */
async function admitted(path, request, limit, repeatable) {
  for (;;) {
    const tried = token();
    const headers = tried === null ? request.headers : { ...request.headers, authorization: `Bearer ${tried}` };
    let response;
    try {
      response = await fetch(path, { ...request, headers, signal: limit(), credentials: "omit", cache: "no-store", redirect: "error" });
    } catch (error) {
      throw unanswered(error);
    }
    if (response.ok) return response;
    const refusal = await refused(response);
    if (response.status !== 401 || !(await newToken(tried))) throw refusal;
    if (!repeatable) {
      throw new ApiError(401, "unauthorized", "The token was taken in. Nothing was run: start it again.");
    }
  }
}

function isRun(method, path) {
  return method === "POST" && /\/(run|execute)\/?$/.test(path.split("?")[0]);
}

function within(timeout, signal) {
  const late = AbortSignal.timeout(timeout);
  return signal ? AbortSignal.any([signal, late]) : late;
}

/** What an answer says that is no success, in any of the API's shapes. */
async function refused(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // A proxy's page, or nothing.
  }
  const detail = body?.detail ?? body?.error;
  const parts = typeof detail === "string" ? [detail] : [detail?.message, detail?.error ?? detail?.detail];
  const said = parts.filter((part) => typeof part === "string" && part !== "").join(": ");
  const code = body?.code ?? body?.error?.type ?? `http_${response.status}`;
  const message = said || `Portolan, or a proxy before it, answered with the status ${response.status}.`;
  return new ApiError(response.status, code, message, Array.isArray(body?.errors) ? body.errors : []);
}

function unanswered(error) {
  if (error.name === "AbortError") return error;
  if (error.name === "TimeoutError") {
    return new ApiError(0, "no_answer", "There was no answer in time. Look at the log of Portolan before you try again.");
  }
  return new ApiError(0, "no_connection", "Portolan cannot be reached. See that it is running, then try again.");
}
