// The page of recent runs: who ran what, when, for how long, and what came of it.

import { html, useState } from "./preact.js";
import { indent, write } from "./exact.js";
import { Filters, Rows, useLog } from "./log.js";
import { sizeOf, spanOf } from "./outcome.js";
import { Heading } from "./page.js";
import { Instant, Name, Shown } from "./text.js";

const OUTCOMES = { success: ["good", "Success"], error: ["bad", "Error"], failed: ["bad", "Not run"] };

/** Of a run whose client left, or that a stop of Portolan ended. */
const CUT_OFF = { error: "The tool may have been run.", failed: "The tool was not run." };

export function Runs({ query }) {
  const log = useLog("/v1/portolan/runs", "runs", query);
  return html`
    <${Heading}>Runs<//>
    <${Filters} page="runs" query=${query} onReload=${log.reload}
      outcomes=${Object.entries(OUTCOMES).map(([value, [, name]]) => [value, name])} />
    <${Rows} log=${log} what="Runs" filtered=${query.size > 0} empty=${html`<p>No tool has been run yet.</p>
      <p>Choose one at one of the <a href="#/servers">servers</a> and run it.</p>`}>
      <table class="log">
        <caption class="unseen">Runs, newest first</caption>
        <thead><tr><th scope="col">Started</th><th scope="col">Server</th><th scope="col">Tool</th><th scope="col">Caller</th>
          <th scope="col">Outcome</th><th scope="col">Duration</th><th scope="col">More</th></tr></thead>
        <tbody>${log.rows?.map((run) => html`<${Row} key=${run.id} run=${run} />`)}</tbody>
      </table>
    <//>`;
}

const wasCutOff = (run) => run.error_code === "cancelled";

function Row({ run }) {
  const [open, setOpen] = useState(false);
  const [look, name] = wasCutOff(run) ? ["bad", "Cut off"] : OUTCOMES[run.outcome] ?? ["idle", run.outcome];
  const server = `#/servers/${encodeURIComponent(run.mcp_server_id)}`;
  return html`
    <tr data-outcome=${run.outcome}>
      <td><${Instant} at=${run.started_at} /></td>
      <td><a href=${server}><${Name} text=${run.server_name} /></a></td>
      <td><a href="${server}/tools/${encodeURIComponent(run.tool_id)}"><${Name} text=${run.tool_name} /></a></td>
      <td>${run.caller === null ? html`<span class="quiet">no token</span>` : html`<${Shown} text=${run.caller} limit=${80} />`}</td>
      <td><span class="state ${look}">${name}</span>${run.error_code && html`<div class="quiet"><code>${run.error_code}</code></div>`}</td>
      <td>${spanOf(run.duration_ms)}</td>
      <td><button type="button" aria-expanded=${open ? "true" : "false"} onClick=${() => setOpen(!open)}>Details
        <span class="unseen"> of the run of <${Name} text=${run.tool_name} /></span></button></td>
    </tr>
    ${open && html`<tr class="details"><td colspan="7"><${Details} run=${run} /></td></tr>`}`;
}

function Details({ run }) {
  return html`
    <dl class="pairs">
      <dt>Run</dt><dd><code>${run.id}</code></dd>
      <dt>Started</dt><dd>${new Date(run.started_at).toLocaleString()}</dd>
      ${wasCutOff(run) && html`<dt>Cut off</dt><dd>${CUT_OFF[run.outcome]}</dd>`}
      <dt>Arguments</dt><dd>${sizeOf(run.args_bytes ?? 0)}</dd>
      <dt>Result</dt><dd>${sizeOf(run.result_bytes ?? 0)}</dd>
    </dl>
    ${run.args === null && run.result === null
      ? html`<p class="quiet">What went in and came out is not kept, unless Portolan is started with <code>--log-arguments</code>.</p>`
      : html`<${Kept} title="Arguments" cut=${run.args_cut}
          text=${run.args === null || typeof run.args === "string" ? run.args : write(run.args)} />
        <${Kept} title="Result" cut=${run.result_cut}
          text=${run.result === null ? null : (run.result.length < 300_000 && indent(run.result)) || run.result} />`}`;
}

const Kept = ({ title, text, cut }) => html`<h2>${title}</h2>${text === null
  ? html`<p class="quiet">Not kept.</p>`
  : html`${cut && html`<p class="quiet">Only its start is kept.</p>`}
    <pre tabindex="0" role="region" aria-label=${title}><${Shown} text=${text} limit=${20_000} block=${true} /></pre>`}`;
