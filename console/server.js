// The page of one server: how it is, what it offers, what changed, and what waits for an approval.

import { html, useEffect, useMemo, useRef, useState } from "./preact.js";
import { call } from "./api.js";
import { Flags, Held, remember } from "./held.js";
import { Confirm, Failure, Heading, Loading, announce, useLoaded } from "./page.js";
import { Advice, KINDS, State } from "./servers.js";
import { Instant, Name, Shown } from "./text.js";

/** Milliseconds between two looks at the server's status. */
const EVERY = 5000;

/** Tools that are shown before the user asks for more. */
const PAGE = 100;

/** Milliseconds that a refresh may take: it has to start a command, and follow all pages. */
const PATIENCE = 10 * 60 * 1000;

export function Server({ id }) {
  const path = `/v1/mcp-servers/${encodeURIComponent(id)}`;
  const server = useLoaded(path, { every: EVERY });
  const tools = useLoaded(`${path}/tools`);
  const [asking, setAsking] = useState(false);
  const { data } = server;
  // Tools that were read elsewhere: by a first sync that went on, by a server that told of a change, in another tab.
  const synced = data?.status.last_synced_at;
  useEffect(() => { if (synced && tools.data) tools.reload(); }, [synced]);
  useEffect(() => { if (tools.data) remember(tools.data); }, [tools.data]);
  if (!data) {
    return html`<${Heading}>Server<//>${server.loading
      ? html`<${Loading} />`
      : html`<${Failure} error=${server.error} retry=${server.reload} /><p><a href="#/servers">All servers</a></p>`}`;
  }
  const both = () => { server.reload(); tools.reload(); };
  const own = `#/servers/${encodeURIComponent(id)}`;
  const remove = async () => {
    await call("DELETE", path);
    announce("The server is deleted.");
    location.hash = "#/servers";
  };
  return html`
    <nav aria-label="Where this is" class="way"><a href="#/servers">Servers</a></nav>
    <${Heading} title=${data.server_name}><${Shown} text=${data.server_name} limit=${200} /><//>
    <${Failure} error=${server.error} retry=${server.reload} />
    <${Status} server=${data} />
    <${Refresh} path=${path} onDone=${both}>
      ${data.mcp_server_type !== "stdio" && html`<a class=${data.status.state === "auth_required" ? "button main" : "button"} href="${own}/sign-in">Sign in</a>`}
      <a class="button" href="${own}/edit">Edit</a>
      <a class="button" href="#/runs?mcp_server_id=${encodeURIComponent(id)}">Runs</a>
      <button type="button" class="danger" onClick=${() => setAsking(true)}>Delete…</button>
    <//>
    ${asking && html`<${Confirm} title="Delete this server?" yes="Delete it" onYes=${remove} onClose=${() => setAsking(false)}>
      <p><${Shown} text=${data.server_name} limit=${200} /> and its ${data.status.tool_count} tools are deleted, with its settings and
        its sign-in. Clients that use it get an error.</p>
    <//>`}
    <${Tools} tools=${tools} id=${id} onApproved=${both} />`;
}

const CONFINEMENT = {
  session: "in a session of its own",
  limits: "with resource limits",
  no_new_privs: "without a way to more privileges",
  capabilities: "without capabilities",
  user: "as another user",
  signals: "without signals to others",
  wrapper: "below the operator's wrapper",
};

const confinementOf = (word) => CONFINEMENT[word] ?? (word.startsWith("landlock-") ? `kept out of files of others (${word})` : word);

function Status({ server }) {
  const { error, tool_count: count, last_synced_at: synced, confinement } = server.status;
  return html`
    <p><${State} status=${server.status} /></p>
    ${error && html`<p class="problem"><${Shown} text=${error} limit=${1000} /></p>`}
    <${Advice} server=${server} />
    <dl class="pairs">
      <dt>Type</dt><dd>${KINDS[server.mcp_server_type] ?? server.mcp_server_type}</dd>
      ${server.mcp_server_type === "stdio"
        ? html`<dt>Command</dt><dd><code><${Shown} text=${commandOf(server)} limit=${600} /></code></dd>`
        : html`<dt>URL</dt><dd><code><${Shown} text=${server.server_url} limit=${600} /></code></dd>`}
      <${Names} of=${server.env} what="Environment" />
      <${Names} of=${server.custom_headers} what="Headers" />
      ${server.auth_token && html`<dt>Token</dt><dd>sent as <code><${Shown} text=${server.auth_header ?? "Authorization"} limit=${100} /></code></dd>`}
      <dt>Tools</dt><dd>${count}</dd>
      <dt>Tools last read</dt><dd><${Instant} at=${synced} /></dd>
      <dt>Registered</dt><dd><${Instant} at=${server.created_at} /></dd>
      ${server.mcp_server_type === "stdio" && html`<dt>Confined</dt><dd>${confinement === null
        ? "not started since Portolan was"
        : confinement.length ? confinement.map(confinementOf).join(", ") : "not at all"}</dd>`}
      <dt>Id</dt><dd><code>${server.id}</code></dd>
    </dl>`;
}

const Names = ({ of, what }) => of && Object.keys(of).length > 0
  && html`<dt>${what}</dt><dd><code><${Shown} text=${Object.keys(of).join(", ")} limit=${400} /></code></dd>`;

/** A command line to look at; nobody runs it as such. */
const commandOf = ({ command, args }) =>
  [command, ...args].map((part) => (/^[\w@%+=:,./-]+$/.test(part) ? part : JSON.stringify(part))).join(" ");

/** Reads the tools again, and says what came of it. */
function Refresh({ path, onDone, children }) {
  const button = useRef(null);
  const [busy, setBusy] = useState(false);
  const [report, setReport] = useState(null);
  const [error, setError] = useState(null);
  const refresh = async () => {
    setBusy(true);
    setError(null);
    setReport(null);
    announce("The tools are read.");
    try {
      const found = await call("PATCH", `${path}/refresh`, undefined, { timeout: PATIENCE });
      setReport(found);
      announce(`The tools were read: ${summaryOf(found)}.`);
    } catch (failure) {
      // Why is said above, as long as it is so.
      const unreached = failure.code === "mcp_server_unavailable";
      setError(unreached ? new Error("The server was not reached. Its tools are what they were.") : failure);
    } finally {
      setBusy(false);
      onDone();
    }
  };
  return html`<div class="actions">
      <button type="button" class="main" ref=${button} onClick=${() => !busy && refresh()} aria-disabled=${busy}>${busy ? "Refreshing…" : "Refresh tools"}</button>${children}</div>
    <${Failure} error=${error} />
    ${report && html`<${Report} report=${report} onClose=${() => { setReport(null); button.current.focus(); }} />`}`;
}

function summaryOf({ added, updated, deleted, held, unchanged, skipped }) {
  const parts = [[added, "added"], [updated, "updated"], [deleted, "deleted"], [held, "held"], [skipped, "skipped"]]
    .filter(([names]) => names.length > 0).map(([names, word]) => `${names.length} ${word}`);
  return [...parts, `${unchanged} unchanged`].join(", ");
}

function Report({ report, onClose }) {
  const what = new Map(report.changed.map((change) => [change.name, change.what.join(", ")]));
  const lists = [
    ["Added", report.added.map((name) => [name])],
    ["Updated", report.updated.map((name) => [name, what.get(name)])],
    ["Deleted", report.deleted.map((name) => [name])],
    ["Held until they are approved", report.held.map((name) => [name])],
    ["Not kept", report.skipped.map(({ name, reason }) => [name, reason])],
    ["With hidden characters", report.flagged.map(({ name }) => [name])],
  ].filter(([, names]) => names.length > 0);
  return html`<section class="done report" aria-label="What the refresh did">
    <p><strong>${summaryOf(report)}.</strong></p>
    ${lists.map(([title, names]) => html`<h2>${title}</h2><${Listed} names=${names} />`)}
    <button type="button" class="link" onClick=${onClose}>Close</button>
  </section>`;
}

function Listed({ names }) {
  const [all, setAll] = useState(false);
  const shown = all ? names : names.slice(0, 20);
  return html`<ul>${shown.map(([name, more]) => html`<li><code><${Shown} text=${name} limit=${200} /></code>
      ${more && html`: <${Shown} text=${more} limit=${300} />`}</li>`)}
    ${shown.length < names.length && html`<li>
      <button type="button" class="link" onClick=${() => setAll(true)}>Show ${names.length - shown.length} more</button></li>`}</ul>`;
}

function Tools({ tools, id, onApproved }) {
  const [filter, setFilter] = useState("");
  const [most, setMost] = useState(PAGE);
  const { data, error, loading, reload } = tools;
  const held = useMemo(() => (data ?? []).filter((tool) => tool.metadata_.mcp.held), [data]);
  const found = useMemo(() => {
    const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
    return (data ?? []).filter((tool) => {
      const text = `${tool.name}\n${tool.description ?? ""}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
  }, [data, filter]);
  if (!data) return html`<h2>Tools</h2>${loading ? html`<${Loading} />` : html`<${Failure} error=${error} retry=${reload} />`}`;
  const shown = found.slice(0, most);
  return html`
    ${held.length > 0 && html`<h2>Waiting for an approval</h2><${Waiting} held=${held} id=${id} onApproved=${onApproved} />`}
    <h2 id="tools-title">Tools</h2>
    <${Failure} error=${error} retry=${reload} />
    ${data.length === 0
      ? html`<div class="empty"><p>No tool of this server is known.</p><p>Refresh the tools once it can be reached.</p></div>`
      : html`
        <label for="tool-filter">Filter</label>
        <input id="tool-filter" type="search" value=${filter} autocomplete="off" aria-describedby="tool-count"
          onInput=${(event) => { setFilter(event.target.value); setMost(PAGE); }} />
        <p class="hint" id="tool-count" role="status">${filter ? `${found.length} of ${data.length} tools` : `${data.length} tools`}</p>
        ${found.length === 0 && html`<p>No name or description has these words.${" "}
          <button type="button" class="link" onClick=${() => setFilter("")}>Show all tools</button></p>`}
        <ul class="cards" aria-labelledby="tools-title">${shown.map((tool) => html`<${Card} key=${tool.id} tool=${tool} id=${id} />`)}</ul>
        ${shown.length < found.length && html`<p><button type="button" onClick=${() => setMost(most + PAGE)}>Show more of the ${found.length} tools</button></p>`}`}`;
}

/** Held tools one below the other; with many, the others are on their own pages. */
function Waiting({ held, id, onApproved }) {
  const shown = held.slice(0, 10);
  return html`${shown.map((tool) => html`<div key=${tool.id}>
      <h3><a href=${pathOf(id, tool)}><${Name} text=${tool.name} /></a></h3>
      <${Flags} flags=${tool.metadata_.mcp.flags} />
      <${Held} tool=${tool} server=${id} level=${3} onDone=${onApproved} /></div>`)}
    ${held.length > shown.length && html`<p>${held.length - shown.length} more are marked below.</p>`}`;
}

const pathOf = (id, tool) => `#/servers/${encodeURIComponent(id)}/tools/${encodeURIComponent(tool.id)}`;

function Card({ tool, id }) {
  const { held, flags } = tool.metadata_.mcp;
  return html`<li class="card">
    <div class="top"><h3><a href=${pathOf(id, tool)}><${Name} text=${tool.name} /></a></h3>
      <div class="facts">
        ${held && html`<span class="state warn">Held</span>`}
        ${flags.length > 0 && html`<span class="state warn">Hidden characters</span>`}
        ${tool.json_schema["mcp:SCHEMA_STATUS"] === "INVALID" && html`<span class="state bad">Invalid schema</span>`}
      </div></div>
    ${tool.description && html`<p><${Shown} text=${tool.description} limit=${240} /></p>`}
  </li>`;
}
