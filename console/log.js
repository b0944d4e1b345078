// What the pages of runs and of changes share: their filters, which stand in the address, and pages of rows, newest first.

import { html, useEffect, useRef, useState } from "./preact.js";
import { call } from "./api.js";
import { read } from "./exact.js";
import { Failure, Loading, announce, useLoaded } from "./page.js";
import { visible } from "./text.js";

/** Rows that are asked for at a time. */
const PAGE = 50;

/**
 * The rows of `path` that `query` asks for: `{ rows, error, loading, hasMore, more, reload }`. `key` is what the answer calls
 * them.
 */
export function useLog(path, key, query) {
  const [state, setState] = useState({ rows: null, next: null, error: null, loading: true });
  const turn = useRef(0);
  const search = query.toString();
  const load = async (after) => {
    const mine = ++turn.current;
    setState((before) => ({ ...before, loading: true, error: null }));
    const asked = new URLSearchParams(search);
    asked.set("limit", PAGE);
    if (after) asked.set("after", after);
    try {
      const answer = await call("GET", `${path}?${asked}`, undefined, { parse: read });
      if (mine !== turn.current) return;
      setState((before) => ({ rows: after ? [...before.rows, ...answer[key]] : answer[key], next: answer.next, error: null, loading: false }));
      announce(after ? `${answer[key].length} more.` : `${answer[key].length}${answer.next ? " or more" : ""} found.`);
    } catch (error) {
      if (mine === turn.current) setState((before) => ({ ...before, error, loading: false }));
    }
  };
  useEffect(() => {
    setState({ rows: null, next: null, error: null, loading: true });
    load(null);
    return () => { turn.current += 1; };
  }, [path, search]);
  const { rows, next, error, loading } = state;
  return { rows, error, loading, hasMore: next !== null, more: () => load(next), reload: () => load(null) };
}

/** The rows under what is said while there are none; `children` shows them. */
export function Rows({ log, what, filtered, empty, children }) {
  const { rows, error, loading, hasMore, more, reload } = log;
  return html`
    ${error && (error.status === 403
      ? html`<div class="failure" role="alert"><p>${what} are shown to tokens with the scope <code>admin</code>. Log out and give one.</p></div>`
      : html`<${Failure} error=${error} retry=${rows ? more : reload} />`)}
    ${!rows && loading && html`<${Loading} />`}
    ${rows?.length === 0 && html`<div class="empty">${filtered ? html`<p>Nothing is like this. Change the filter, or clear it.</p>` : empty}</div>`}
    ${rows?.length > 0 && children}
    ${rows && hasMore && html`<p><button type="button" onClick=${more} disabled=${loading}>${loading ? "Loading…" : "Show older"}</button></p>`}`;
}

/** `datetime-local` has no zone: it is the user's. */
const localOf = (instant) => {
  const date = new Date(instant);
  if (!instant || Number.isNaN(date.getTime())) return "";
  return new Date(date.getTime() - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
};

/** The filter of a page. `outcomes` are the choices of that field, if there is one; what is chosen becomes the address. */
export function Filters({ page, query, outcomes, onReload }) {
  const servers = useLoaded("/v1/mcp-servers/");
  const place = useRef(null);
  const asked = (name) => query.get(name) ?? "";
  const show = (event) => {
    event.preventDefault();
    const given = new FormData(place.current);
    const next = new URLSearchParams();
    for (const [name, value] of given) {
      const text = value.trim();
      if (text) next.set(name, name === "since" || name === "until" ? new Date(text).toISOString() : text);
    }
    if (asked("tool_id") && next.get("mcp_server_id") === query.get("mcp_server_id")) next.set("tool_id", asked("tool_id"));
    const hash = `#/${page}${next.size ? `?${next}` : ""}`;
    if (hash === location.hash) onReload();
    else location.hash = hash;
  };
  const known = servers.data ?? [];
  const server = asked("mcp_server_id");
  return html`<form ref=${place} class="filters" onSubmit=${show} key=${query.toString()} aria-label="Filter" autocomplete="off">
    <div><label for="log-server">Server</label>
      <select id="log-server" name="mcp_server_id" value=${server}>
        <option value="" selected=${!server}>All</option>
        ${known.map(({ id, server_name: name }) => html`<option key=${id} value=${id} selected=${id === server}>${visible(name, 80)}</option>`)}
        ${server && !known.some(({ id }) => id === server) && html`<option value=${server} selected>${visible(server, 80)}</option>`}
      </select></div>
    ${outcomes && html`<div><label for="log-outcome">Outcome</label>
      <select id="log-outcome" name="outcome" value=${asked("outcome")}>
        <option value="" selected=${!asked("outcome")}>All</option>
        ${outcomes.map(([value, name]) => html`<option key=${value} value=${value} selected=${asked("outcome") === value}>${name}</option>`)}
      </select></div>`}
    <div><label for="log-caller">Caller</label><input id="log-caller" name="caller" value=${asked("caller")} /></div>
    <div><label for="log-since">From</label><input id="log-since" name="since" type="datetime-local" value=${localOf(asked("since"))} /></div>
    <div><label for="log-until">Until</label><input id="log-until" name="until" type="datetime-local" value=${localOf(asked("until"))} /></div>
    <div class="actions"><button type="submit" class="main">Show</button>
      ${query.size > 0 && html`<a class="button" href="#/${page}">Clear</a>`}</div>
  </form>
  ${asked("tool_id") && html`<p class="hint">Of one tool alone. <a href="#/${page}?${new URLSearchParams({ mcp_server_id: server })}">All tools of its server</a></p>`}`;
}
