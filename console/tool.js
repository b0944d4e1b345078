// The page of one tool: what it says of itself, its arguments as a form or as JSON, and what comes of running it.

import { html, useEffect, useMemo, useRef, useState } from "./preact.js";
import { call } from "./api.js";
import { read, write, writeVisibly } from "./exact.js";
import { argumentsOf, draftOf, fit, formOf, valueOf } from "./fields.js";
import { Form, idOf } from "./form.js";
import { Changes, Definition, Flags, Health, Held, remember } from "./held.js";
import { UNSHOWN, resultOf, spanOf } from "./outcome.js";
import { Boundary, Failure, Heading, Loading, announce, useLoaded } from "./page.js";
import { Result } from "./result.js";
import { Name, Shown } from "./text.js";

/** Milliseconds a run may take here; Portolan's own deadline is much shorter, and its answer says more. */
const PATIENCE = 24 * 60 * 60 * 1000;

export function Tool({ id, tool: toolId }) {
  const path = `/v1/mcp-servers/${encodeURIComponent(id)}/tools/${encodeURIComponent(toolId)}`;
  const { data: tool, error, loading, reload } = useLoaded(path);
  const [approved, setApproved] = useState(null);
  const shown = approved ?? tool;
  if (!shown) {
    return html`<${Heading}>Tool<//><${Way} id=${id} />
      ${loading ? html`<${Loading} />` : html`<${Failure} error=${error} retry=${reload} />`}`;
  }
  remember([shown]);
  const { definition, held, flags, changes, server_name: server } = shown.metadata_.mcp;
  const done = (next) => { setApproved(next); if (!next) reload(); };
  return html`
    <${Way} id=${id} server=${server} />
    <${Heading} title=${shown.name}><${Shown} text=${shown.name} limit=${200} /><//>
    ${definition?.title && typeof definition.title === "string" && html`<p><strong><${Shown} text=${definition.title} limit=${200} /></strong></p>`}
    <${Failure} error=${error} retry=${reload} />
    ${held && html`<${Held} key=${shown.id} tool=${shown} server=${id} onDone=${done} />`}
    <${Flags} flags=${flags} />
    ${shown.description
      ? html`<p><${Shown} text=${shown.description} limit=${1500} block=${true} /></p>`
      : html`<p class="quiet">The server says nothing about this tool.</p>`}
    <${Hints} annotations=${definition?.annotations} />
    <${Run} key=${shown.metadata_.mcp.definition_hash} tool=${shown} path=${path} />
    <h2>About this tool</h2>
    <p><a href="#/runs?${new URLSearchParams({ mcp_server_id: id, tool_id: toolId })}">Runs of this tool</a></p>
    <${Health} schema=${shown.json_schema} />
    <${Changes} changes=${changes} />
    <details><summary>Definition</summary><${Definition} definition=${definition} /></details>
    <details><summary>As language models are given it</summary><${Definition} definition=${shown.json_schema} /></details>`;
}

const Way = ({ id, server }) => html`<nav aria-label="Where this is" class="way"><a href="#/servers">Servers</a> ›
  ${" "}<a href="#/servers/${encodeURIComponent(id)}">${server ? html`<${Name} text=${server} />` : "Server"}</a></nav>`;

const ANNOTATIONS = {
  readOnlyHint: ["changes nothing", null],
  destructiveHint: ["may destroy something", null],
  idempotentHint: ["does no more when it is run again", null],
  openWorldHint: ["deals with the world outside", null],
};

/** What the server claims of the tool; nobody checks it. */
function Hints({ annotations }) {
  const claims = Object.entries(ANNOTATIONS).filter(([key]) => annotations?.[key] === true).map(([, [words]]) => words);
  return claims.length > 0 && html`<p class="hint">By its server's own account, this tool ${claims.join(", ")}.</p>`;
}

/** The tool's own schema; the one for language models when that cannot be read. */
function schemaOf(tool) {
  const own = tool.metadata_.mcp.definition?.inputSchema;
  if (own !== undefined) return own;
  const { properties: { request_heartbeat: _, ...properties } = {}, required = [], ...rest } = tool.json_schema.parameters;
  return { ...rest, properties, required: required.filter((name) => name !== "request_heartbeat") };
}

/** Arguments, and a run with them. */
function Run({ tool, path }) {
  const field = useMemo(() => formOf(schemaOf(tool)), [tool]);
  const isForm = field.kind === "object";
  const [draft, setDraft] = useState(() => draftOf(field));
  const [text, setText] = useState(null);
  const [problems, setProblems] = useState([]);
  const [doubted, setDoubted] = useState(false);
  const [outcome, setOutcome] = useState(null);
  const [running, setRunning] = useState(null);
  // The state of the page comes a moment after a click; two clicks are one run.
  const current = useRef(null);
  const button = useRef(null);
  useEffect(() => () => current.current?.abort(), []);

  const collect = () => (text === null ? valueOf(field, draft) : argumentsOf(text));
  const edit = (change) => { change(); setDoubted(false); setProblems([]); };

  const toggle = () => {
    const { value, problems: found } = collect();
    const fatal = found.filter((problem) => problem.fatal);
    if (fatal.length > 0) return refuse(fatal);
    setProblems([]);
    setDoubted(false);
    if (text === null) {
      setText(writeVisibly(value));
      announce("The arguments are JSON now.");
    } else {
      setDraft(fit(field, value));
      setText(null);
      announce("The arguments are a form now.");
    }
  };

  const refuse = (found) => {
    setProblems(found);
    announce(found.length === 1 ? found[0].text : `${found.length} arguments need a look.`);
    const first = text === null ? idOf(found[0].path) : "arguments";
    setTimeout(() => document.getElementById(first)?.focus(), 0);
  };

  const run = async (anyway) => {
    if (current.current) return;
    const { value, problems: found } = collect();
    if (found.some((problem) => problem.fatal) || (found.length > 0 && !anyway)) {
      setDoubted(!found.some((problem) => problem.fatal));
      return refuse(found);
    }
    setProblems(found);
    setDoubted(false);
    let body;
    try {
      body = `{"args":${write(value, 0)}}`;
    } catch {
      return refuse([{ path: [], text: "These arguments are nested too deeply to be sent.", fatal: true }]);
    }
    const controller = new AbortController();
    current.current = controller;
    setRunning(performance.now());
    setOutcome(null);
    announce("The tool is running.");
    const result = await resultOf(call("POST", `${path}/run`, body, { signal: controller.signal, timeout: PATIENCE, parse: read }));
    current.current = null;
    setRunning(null);
    setOutcome(result);
    announce(`${result.title}${result.duration === undefined ? "" : ` after ${spanOf(result.duration)}`}.`);
  };

  const submit = (event) => { event.preventDefault(); run(doubted); };
  const press = (event) => {
    if (event.key !== "Enter") return;
    if (event.ctrlKey || event.metaKey) submit(event);
    // What a run did cannot be undone: the Enter that ends a line or leaves a field starts none.
    else if (event.target.tagName === "INPUT") event.preventDefault();
  };
  const whole = problems.filter(() => text !== null);

  return html`<form class="narrow run" onSubmit=${submit} onKeyDown=${press} noValidate autocomplete="off" aria-labelledby="run-title">
    <div class="bar"><h2 id="run-title" class="grow">Run it here</h2>
      ${isForm && html`<button type="button" onClick=${toggle} disabled=${running !== null}>${text === null ? "Edit as JSON" : "Edit as a form"}</button>`}</div>
    ${text === null
      ? html`<${Form} field=${field} draft=${draft} onDraft=${(next) => edit(() => setDraft(next))} problems=${problems} />`
      : html`<label for="arguments">Arguments</label>
        <textarea id="arguments" class="code" rows=${Math.min(Math.max(text.split("\n").length, 6), 30)} value=${text} spellcheck=${false}
          onInput=${(event) => edit(() => setText(event.target.value))} aria-describedby="arguments-hint arguments-problem"
          aria-invalid=${whole.length > 0 ? "true" : undefined}></textarea>
        <p class="hint" id="arguments-hint">A JSON object: a name and a value for each argument.</p>
        <div id="arguments-problem">${whole.map((problem) => html`<p class="problem">${problem.text}</p>`)}</div>`}
    ${doubted && html`<div class="notice warn"><p>The tool will probably refuse these arguments. Change them, or run it anyway.</p></div>`}
    <div class="actions">
      <button type="submit" class="main" ref=${button} aria-disabled=${running !== null}>${doubted ? "Run anyway" : "Run"}</button>
      ${running === null
        ? html`<span class="hint">Ctrl+Enter runs it, too.</span>`
        : html`<button type="button" onClick=${() => { current.current?.abort(); button.current.focus(); }}>Cancel</button><${Clock} since=${running} />`}
    </div>
  </form>
  <section aria-label="Result" class="outcome">${outcome && html`<h2>Result</h2>
    <${Boundary} at=${outcome} instead=${() => html`<${Result} outcome=${UNSHOWN} />`}><${Result} outcome=${outcome} /><//>`}</section>`;
}

/** How long it has been running; what a screen reader would say each time is not told. */
function Clock({ since }) {
  const [now, setNow] = useState(since);
  useEffect(() => {
    const timer = setInterval(() => setNow(performance.now()), 100);
    return () => clearInterval(timer);
  }, [since]);
  return html`<span class="quiet" role="timer" aria-live="off">Running for ${spanOf(Math.max(now - since, 0))}</span>`;
}
