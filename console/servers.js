// The servers: how each is, and what to do about it. The list is read again every few seconds while somebody looks.

import { html, useEffect, useRef, useState } from "./preact.js";
import { call } from "./api.js";
import { Confirm, Failure, Heading, Loading, announce, useLoaded } from "./page.js";
import { Instant, Name, Shown, visible } from "./text.js";

/** Milliseconds. */
const AGAIN = 3000;

/** How many are shown until the user asks for more. */
const SHOWN_AT_ONCE = 100;

export const KINDS = { stdio: "Command", streamable_http: "Streamable HTTP", sse: "HTTP+SSE" };

const STATES = {
  never_connected: ["Not connected yet", "idle"],
  ready: ["Ready", "good"],
  unreachable: ["Unreachable", "bad"],
  auth_required: ["Sign-in needed", "warn"],
  disabled: ["Not allowed", "bad"],
};

/** A server's state in words; the colour beside them says nothing more. */
export function State({ status }) {
  const [words, look] = STATES[status.state] ?? [status.state, "idle"];
  return html`<span class="state ${look}">${words}</span>`;
}

/** What a server is reached by. */
export function target(server) {
  return server.mcp_server_type === "stdio" ? [server.command, ...(server.args ?? [])].join(" ") : server.server_url;
}

export function Servers() {
  const { data: servers, error, loading, reload } = useLoaded("/v1/mcp-servers/", { every: AGAIN });
  const [filter, setFilter] = useState("");
  const [state, setState] = useState("");
  const [most, setMost] = useState(SHOWN_AT_ONCE);
  const [leaving, setLeaving] = useState(null);
  const heading = useRef(null);
  useChangesTold(servers);

  const remove = async () => {
    await call("DELETE", `/v1/mcp-servers/${leaving.id}`);
    announce(`${visible(leaving.server_name)} is deleted.`);
    setLeaving(null);
    await reload();
    // The button that was pressed is gone with its server.
    heading.current.querySelector("h1").focus();
  };

  const matches = (servers ?? []).filter((server) => isMatch(server, filter) && (state === "" || server.status.state === state));
  return html`
    <div ref=${heading}><${Heading}>Servers<//></div>
    <${Failure} error=${error} retry=${reload} />
    ${loading && !servers && html`<${Loading} what="Reading the servers" />`}
    ${servers?.length === 0 && html`<div class="empty">
      <p>There is no server yet. Add one by its command or URL, or paste the configuration file of another program.</p>
      <p><a class="button main" href="#/add">Add a server</a> <a class="button" href="#/add?how=file">Paste a file</a></p>
    </div>`}
    ${servers?.length > 0 && html`
      <div class="bar">
        <div class="grow"><label for="filter">Find by name, command or URL</label>
          <input id="filter" type="search" value=${filter} onInput=${(event) => setFilter(event.target.value)} /></div>
        <div><label for="state">State</label>
          <select id="state" value=${state} onChange=${(event) => setState(event.target.value)}>
            <option value="">All</option>
            ${Object.entries(STATES).map(([value, [words]]) => html`<option value=${value}>${words}</option>`)}
          </select></div>
        <p class="quiet" role="status">${matches.length} of ${servers.length}</p>
      </div>
      ${matches.length === 0 && html`<div class="empty"><p>No server is like that.</p>
        <button type="button" onClick=${() => { setFilter(""); setState(""); }}>Show all servers</button></div>`}
      <ul class="cards" role="list">${matches.slice(0, most).map((server) => html`
        <${Card} key=${server.id} server=${server} onDelete=${() => setLeaving(server)} reload=${reload} />`)}</ul>
      ${matches.length > most && html`<button type="button" onClick=${() => setMost(most + SHOWN_AT_ONCE)}>Show more</button>`}`}
    ${leaving && html`<${Confirm} title="Delete this server?" yes="Delete" onYes=${remove} onClose=${() => setLeaving(null)}>
      <p><strong><${Shown} text=${leaving.server_name} /></strong> and its tools are removed, and agents can run them no
        longer. This cannot be undone.</p>
    <//>`}`;
}

function isMatch(server, filter) {
  const wanted = filter.trim().toLowerCase();
  return wanted === "" || [server.server_name, target(server)].some((text) => (text ?? "").toLowerCase().includes(wanted));
}

/** Says when a server's state changes while one listens. */
function useChangesTold(servers) {
  const before = useRef(null);
  useEffect(() => {
    if (!servers) return;
    const now = new Map(servers.map((server) => [server.id, server.status.state]));
    const changed = before.current ? servers.filter((server) => {
      const known = before.current.get(server.id);
      return known !== undefined && known !== server.status.state;
    }) : [];
    before.current = now;
    if (changed.length === 1) announce(`${visible(changed[0].server_name)}: ${STATES[changed[0].status.state]?.[0]}.`);
    if (changed.length > 1) announce(`The states of ${changed.length} servers have changed.`);
  }, [servers]);
}

function Card({ server, onDelete, reload }) {
  const { status } = server;
  const path = `#/servers/${encodeURIComponent(server.id)}`;
  const [busy, setBusy] = useState(false);
  const [failed, setFailed] = useState(null);
  const name = visible(server.server_name);
  const refresh = async () => {
    if (busy) return;
    setBusy(true);
    setFailed(null);
    announce(`Connecting to ${name}.`);
    try {
      await call("PATCH", `/v1/mcp-servers/${server.id}/refresh`);
      announce(`${name} was reached.`);
    } catch (error) {
      // What the server's own state says anyway is not said twice.
      if (error.code !== "mcp_server_unavailable") setFailed(error);
      announce(`${name} was not reached.`);
    }
    await reload();
    setBusy(false);
  };
  return html`<li class="card">
    <div class="top"><h2><a href=${path}><${Name} text=${server.server_name} limit=${120} /></a></h2><${State} status=${status} /></div>
    <p class="code"><${Shown} text=${target(server)} limit=${200} /></p>
    <p class="facts"><span>${KINDS[server.mcp_server_type] ?? server.mcp_server_type}</span>
      <span>${status.tool_count === 1 ? "1 tool" : `${status.tool_count} tools`}</span>
      <span>${status.last_synced_at ? html`Tools read <${Instant} at=${status.last_synced_at} />` : "Tools never read"}</span></p>
    ${status.error && html`<p class="problem"><${Shown} text=${status.error} limit=${500} /></p>`}
    <${Advice} server=${server} />
    <${Failure} error=${failed} />
    <div class="actions">
      ${status.state === "auth_required" && server.mcp_server_type !== "stdio" && html`
        <a class="button main" href="${path}/sign-in" aria-label="Sign in to ${name}">Sign in</a>`}
      ${(status.state === "unreachable" || status.state === "never_connected") && html`
        <button type="button" onClick=${refresh} aria-disabled=${busy} aria-label="Connect to ${name}">${busy ? "Connecting…" : "Connect"}</button>`}
      <a class="button" href="${path}/edit" aria-label="Edit ${name}">Edit</a>
      <button type="button" onClick=${onDelete} aria-label="Delete ${name}">Delete</button>
    </div>
  </li>`;
}

/** What to do about a state that is not good. */
export function Advice({ server }) {
  const isCommand = server.mcp_server_type === "stdio";
  const words = {
    unreachable: isCommand ? "See that the command starts on this machine, or edit it; then connect again."
      : "See that the server runs and that its URL is right; then connect again.",
    auth_required: isCommand ? "Edit the credentials in its environment." : "Sign in, or edit its token.",
    disabled: "The operator's settings do not let this command be started. Ask the operator, or delete the server.",
    never_connected: "It is connected to when one of its tools is run, or now.",
  }[server.status.state];
  return words ? html`<p class="hint">${words}</p>` : null;
}
