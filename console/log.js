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
  const tool = query.get("tool_id");
  const server = query.get("mcp_server_id") ?? "";
  const show = (chosen) => {
    const next = new URLSearchParams(Object.entries(chosen).filter(([, value]) => value !== ""));
    if (tool && chosen.mcp_server_id === server) next.set("tool_id", tool);
    const hash = `#/${page}${next.size ? `?${next}` : ""}`;
    if (hash === location.hash) onReload();
    else location.hash = hash;
  };
  return html`
    <${Fields} page=${page} query=${query} outcomes=${outcomes} servers=${servers.data ?? []} onShow=${show} />
    ${tool && html`<p class="hint">Of one tool alone. <a href="#/${page}?${new URLSearchParams({ mcp_server_id: server })}">All tools of its server</a></p>`}`;
}

function chosenBy(query) {
  const asked = (name) => query.get(name) ?? "";
  return {
    mcp_server_id: asked("mcp_server_id"), outcome: asked("outcome"), caller: asked("caller"),
    since: localOf(asked("since")), until: localOf(asked("until")),
  };
}

/** What is chosen stays while rows and servers come in, until the address says something else. */
function Fields({ page, query, outcomes, servers, onShow }) {
  const [chosen, setChosen] = useState(() => chosenBy(query));
  const place = useRef(null);
  const search = query.toString();
  const shown = useRef(search);
  useEffect(() => {
    if (shown.current === search) return;
    shown.current = search;
    setChosen(chosenBy(query));
    // The link that cleared the filter is gone with it.
    if (document.activeElement === document.body) place.current.querySelector("button").focus();
  }, [search]);
  const server = chosen.mcp_server_id;
  const field = (name) => ({ name, value: chosen[name], onInput: (event) => setChosen({ ...chosen, [name]: event.target.value }) });
  const instant = (local) => (local === "" ? "" : new Date(local).toISOString());
  const submit = (event) => {
    event.preventDefault();
    onShow({ ...chosen, caller: chosen.caller.trim(), since: instant(chosen.since), until: instant(chosen.until) });
  };
  const isKnown = server === "" || servers.some(({ id }) => id === server);
  return html`<form ref=${place} class="filters" onSubmit=${submit} aria-label="Filter" autocomplete="off">
    <div><label for="log-server">Server</label>
      <select id="log-server" ...${field("mcp_server_id")}>
        <option value="" selected=${server === ""}>All</option>
        ${servers.map(({ id, server_name: name }) => html`<option key=${id} value=${id} selected=${id === server}>${visible(name, 80)}</option>`)}
        ${!isKnown && html`<option value=${server} selected>${visible(server, 80)}</option>`}
      </select></div>
    ${outcomes && html`<div><label for="log-outcome">Outcome</label>
      <select id="log-outcome" ...${field("outcome")}>
        <option value="" selected=${chosen.outcome === ""}>All</option>
        ${outcomes.map(([value, name]) => html`<option key=${value} value=${value} selected=${chosen.outcome === value}>${name}</option>`)}
      </select></div>`}
    <div><label for="log-caller">Caller</label><input id="log-caller" ...${field("caller")} /></div>
    <div><label for="log-since">From</label><input id="log-since" type="datetime-local" ...${field("since")} /></div>
    <div><label for="log-until">Until</label><input id="log-until" type="datetime-local" ...${field("until")} /></div>
    <div class="actions"><button type="submit" class="main">Show</button>
      ${query.size > 0 && html`<a class="button" href="#/${page}">Clear</a>`}</div>
  </form>`;
}
