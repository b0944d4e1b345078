// What there is to know about a tool before it is trusted: what changed in it, what cannot be seen in it, and the approval
// of one that is held.

import { html, useState } from "./preact.js";
import { call } from "./api.js";
import { write } from "./exact.js";
import { Failure, announce } from "./page.js";
import { Instant, Name, Shown, visible } from "./text.js";

/** Definitions that this tab has seen, by hash. The API tells only the present one; for what changes while somebody looks,
 *  the one before is still here. */
const seen = new Map();
const MOST_SEEN = 2000;

/** Keeps the definitions of `tools`, as the API lists them. */
export function remember(tools) {
  for (const tool of tools) {
    const { definition, definition_hash: hash } = tool.metadata_.mcp;
    if (definition === null || seen.has(hash)) continue;
    if (seen.size >= MOST_SEEN) seen.delete(seen.keys().next().value);
    seen.set(hash, definition);
  }
}

const KINDS = {
  control: "a control character",
  bidi: "a character that turns the direction of text",
  zero_width: "a character without width",
  tag: "an invisible tag character",
  variation_selector: "a variation selector",
  private_use: "a character without a known look",
};

/** Characters that people do not see, as the API found them. */
export function Flags({ flags }) {
  if (flags.length === 0) return null;
  return html`<div class="notice warn">
    <p><strong>Hidden characters.</strong> A model reads them, people do not see them. Look twice before you trust this tool.</p>
    <ul>${flags.map(({ kind, at }) => html`<li>${KINDS[kind] ?? "another one"} in <code><${Shown} text=${at} limit=${200} /></code></li>`)}</ul>
  </div>`;
}

const HEALTH = {
  STRICT_COMPLIANT: ["good", "The schema suits the strict mode of language models."],
  NON_STRICT_ONLY: ["warn", "The schema does not suit the strict mode of language models. The tool works."],
  INVALID: ["bad", "The schema has mistakes; some language models will not take this tool. It can be run here."],
};

/** How well the schema suits language models, and what keeps it from suiting better. */
export function Health({ schema }) {
  const [look, words] = HEALTH[schema["mcp:SCHEMA_STATUS"]] ?? ["idle", "The tool declares no schema."];
  const warnings = schema["mcp:SCHEMA_WARNINGS"] ?? [];
  return html`<p><span class="health state ${look}">${words}</span></p>
    ${warnings.length > 0 && html`<details><summary>${warnings.length === 1 ? "1 warning" : `${warnings.length} warnings`}</summary>
      <ul>${warnings.slice(0, 100).map((warning) => html`<li><${Shown} text=${warning} limit=${500} /></li>`)}</ul></details>`}`;
}

const short = (hash) => html`<code title=${hash}>${hash.slice(0, 12)}</code>`;

/** The last changes of a definition. */
export function Changes({ changes }) {
  if (!changes?.length) return html`<p class="quiet">It has not changed since its server was registered.</p>`;
  return html`<ul>${changes.map((change) => html`<li><${Instant} at=${change.at} />: ${change.old === null
    ? html`the tool came, as ${short(change.new)}`
    : html`${change.what.length ? html`<${Shown} text=${change.what.join(", ")} limit=${200} /> changed` : "the tool came back"},
      from ${short(change.old)} to ${short(change.new)}`}</li>`)}</ul>`;
}

/** A held tool: old beside new, and the way to let it run. `onDone` is told of the tool as it is then. */
export function Held({ tool, server, onDone, level = 2 }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const { definition, definition_hash: hash, changes } = tool.metadata_.mcp;
  const last = changes?.[0];
  const before = last?.old ? seen.get(last.old) : undefined;
  const approve = async () => {
    setBusy(true);
    setError(null);
    try {
      const path = `/v1/mcp-servers/${encodeURIComponent(server)}/tools/${encodeURIComponent(tool.id)}`;
      const approved = await call("POST", `${path}/approve`, { hash });
      announce("Approved. The tool may be run.");
      // The button that was pressed is gone with what it was about.
      document.querySelector("h1")?.focus();
      onDone(approved);
    } catch (failure) {
      setError(failure);
      if (failure.code === "tool_changed") onDone(null);
    } finally {
      setBusy(false);
    }
  };
  const isNew = !last || last.old === null;
  return html`<section class="notice warn held" aria-label="Held tool ${visible(tool.name, 60)}">
    <p><strong>${isNew ? "This tool came after its server was registered" : "The definition of this tool changed"}.</strong>
      ${" "}It is not run until an admin has looked at it and approved it.</p>
    ${!isNew && html`<p>What changed: <${Shown} text=${last.what.join(", ") || "nothing but where it stands"} limit=${300} />, <${Instant} at=${last.at} />.
      ${" "}Old ${short(last.old)}, new ${short(hash)}.</p>`}
    <${Comparison} before=${before} after=${definition} what=${isNew ? null : last.what} level=${level + 1} />
    ${!isNew && before === undefined && html`<p class="quiet">Portolan keeps the old definition's hash, not its text; this page has not seen it.</p>`}
    <${Failure} error=${error} />
    <div class="actions"><button type="button" class="main" aria-disabled=${busy} onClick=${() => !busy && approve()}>
      <span>Approve <${Name} text=${tool.name} limit=${60} /></span></button></div>
  </section>`;
}

/** The keys of a definition that are of interest, old beside new; all of a new one. */
function Comparison({ before, after, what, level }) {
  if (after === null) return html`<p class="problem">The definition cannot be read.</p>`;
  const keys = what?.length ? what : Object.keys(after);
  const own = (definition, key) => (definition && Object.hasOwn(definition, key) ? definition[key] : undefined);
  return keys.map((key) => html`<div class="compared" key=${key}>
    <${`h${level}`}><${Shown} text=${key} limit=${100} /><//>
    <div class="sides">
      ${before !== undefined && html`<div><p class="quiet">Old</p><${Value} value=${own(before, key)} label="old ${visible(key, 100)}" /></div>`}
      <div>${before !== undefined && html`<p class="quiet">New</p>`}<${Value} value=${own(after, key)} label="new ${visible(key, 100)}" /></div>
    </div></div>`);
}

function Value({ value, label }) {
  if (value === undefined) return html`<p class="quiet">not there</p>`;
  const text = typeof value === "string" ? value : write(value);
  return html`<pre tabindex="0" role="region" aria-label=${label}><${Shown} text=${text} limit=${4000} block=${true} /></pre>`;
}

/** A definition in full. */
export const Definition = ({ definition }) => (definition === null
  ? html`<p class="problem">The stored definition cannot be read. Refresh the tools of the server.</p>`
  : html`<${Value} value=${definition} label="definition" />`);
