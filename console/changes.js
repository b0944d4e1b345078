// The page of changes: who registered, changed, approved and deleted what.

import { html } from "./preact.js";
import { Filters, Rows, useLog } from "./log.js";
import { write } from "./exact.js";
import { Heading } from "./page.js";
import { Instant, Name, Shown } from "./text.js";

const ACTIONS = {
  "server.created": "Server registered",
  "server.updated": "Server changed",
  "server.deleted": "Server deleted",
  "tools.changed": "Tools changed",
  "tool.approved": "Tool approved",
  "sign_in.completed": "Signed in",
  "sign_in.adopted": "Sign-in taken over",
  "sign_in.removed": "Sign-in removed",
};

export function Changes({ query }) {
  const log = useLog("/v1/portolan/changes", "changes", query);
  return html`
    <${Heading}>Changes<//>
    <${Filters} page="changes" query=${query} onReload=${log.reload} />
    <${Rows} log=${log} what="Changes" filtered=${query.size > 0} empty=${html`<p>Nothing has been changed yet.</p>
      <p><a href="#/add">Add a server</a> to begin.</p>`}>
      <table class="log">
        <caption class="unseen">Changes, newest first</caption>
        <thead><tr><th scope="col">When</th><th scope="col">What</th><th scope="col">Server</th><th scope="col">Caller</th><th scope="col">Details</th></tr></thead>
        <tbody>${log.rows?.map((change) => html`<${Row} key=${change.id} change=${change} />`)}</tbody>
      </table>
    <//>`;
}

function Row({ change }) {
  const { action, mcp_server_id: id, server_name: name, caller, details } = change;
  const shown = name === null ? null : html`<${Name} text=${name} />`;
  return html`<tr data-action=${action}>
    <td><${Instant} at=${change.at} /></td>
    <td>${Object.hasOwn(ACTIONS, action) ? ACTIONS[action] : html`<code><${Shown} text=${action} limit=${80} /></code>`}</td>
    <td>${shown && (id === null || action === "server.deleted" ? shown : html`<a href="#/servers/${encodeURIComponent(id)}">${shown}</a>`)}</td>
    <td>${caller === null ? html`<span class="quiet">no token</span>` : html`<${Shown} text=${caller} limit=${80} />`}</td>
    <td><${Details} details=${details} /></td>
  </tr>`;
}

/** Names and counts, one below the other. */
function Details({ details }) {
  const entries = Object.entries(details ?? {}).filter(([, value]) => value?.count !== 0);
  if (entries.length === 0) return null;
  return html`<ul class="plain">${entries.map(([key, value]) => html`<li key=${key}><${Shown} text=${key.replaceAll("_", " ")} limit=${80} />: ${" "}
    <${Shown} text=${textOf(value)} limit=${200} /></li>`)}</ul>`;
}

/** Tools come as their count, most with the first names. */
function textOf(value) {
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map(textOf).join(", ");
  if (!Array.isArray(value?.names)) return write(value?.count ?? value, 0);
  const more = value.count - value.names.length;
  return value.count === 0 ? "none" : `${textOf(value.names)}${more > 0 ? ` and ${more} more` : ""}`;
}
