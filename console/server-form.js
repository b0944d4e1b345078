// The form of a server's connection: for one that is added, and for one that is changed.

import { html, useEffect, useRef, useState } from "./preact.js";
import { Failure } from "./page.js";
import { Shown } from "./text.js";
import { KINDS } from "./servers.js";

const HINTS = {
  stdio: "Portolan starts a program on its own machine and talks to it.",
  streamable_http: "The usual kind of remote server. Its URL often ends with /mcp.",
  sse: "The older kind of remote server. Its URL often ends with /sse.",
};

/** The fields of the form from a server as the API shows it; empty ones without. */
function fieldsOf(server) {
  const rows = (map) => Object.entries(map ?? {}).map(([name, value]) => ({ name, value }));
  return {
    kind: server?.mcp_server_type ?? "streamable_http",
    server_name: server?.server_name ?? "",
    command: server?.command ?? "",
    args: (server?.args ?? []).map((value) => ({ value })),
    env: rows(server?.env),
    server_url: server?.server_url ?? "",
    auth_header: server?.auth_header ?? "",
    auth_token: server?.auth_token ?? "",
    custom_headers: rows(server?.custom_headers),
    oauth: { client_id: "", client_secret: "", scope: "", grant_type: "", ...present(server?.oauth) },
  };
}

const present = (object) => Object.fromEntries(Object.entries(object ?? {}).filter(([, value]) => value !== null));

/** What the API is to be told, all of it. */
function configOf(fields) {
  const map = (rows) => Object.fromEntries(rows.filter((row) => row.name.trim() !== "").map((row) => [row.name.trim(), row.value]));
  const { kind } = fields;
  if (kind === "stdio") {
    return { mcp_server_type: kind, command: fields.command.trim(), args: fields.args.map((row) => row.value), env: map(fields.env) };
  }
  return {
    mcp_server_type: kind, server_url: fields.server_url.trim(), auth_header: fields.auth_header.trim(),
    auth_token: fields.auth_token.trim(), custom_headers: map(fields.custom_headers), oauth: clientOf(fields.oauth),
  };
}

/** A client of sign-ins; nothing at all where every field is empty. `""` clears what is stored, but for the grant. */
function clientOf(oauth) {
  const fields = Object.entries(oauth).map(([name, value]) => [name, value.trim()]);
  if (fields.every(([, value]) => value === "")) return {};
  return Object.fromEntries(fields.map(([name, value]) => [name, name === "grant_type" && value === "" ? null : value]));
}

/** The body of a create: what is empty is left out. */
function created(fields) {
  const whole = configOf(fields);
  if (whole.oauth) whole.oauth = Object.fromEntries(Object.entries(whole.oauth).filter(([, value]) => value));
  const config = Object.entries(whole).filter(([name, value]) => (
    name === "command" || name === "server_url" || (value !== "" && Object.keys(value).length > 0)
  ));
  return { server_name: fields.server_name.trim(), config: Object.fromEntries(config) };
}

/** The body of a change: what differs from `server`. A mask that is sent back stands for what is stored. */
function changed(fields, server) {
  const [now, before] = [configOf(fields), configOf(fieldsOf(server))];
  const differs = ([name, value]) => JSON.stringify(value) !== JSON.stringify(before[name]);
  const config = now.mcp_server_type === before.mcp_server_type ? Object.fromEntries(Object.entries(now).filter(differs)) : now;
  const body = {};
  if (fields.server_name.trim() !== server.server_name) body.server_name = fields.server_name.trim();
  if (Object.keys(config).length > 0) body.config = { mcp_server_type: now.mcp_server_type, ...config };
  return body;
}

/** The issues of a 422 by the field that they are about, and the others. */
function sorted(error) {
  if (!error) return { at: {}, rest: null };
  const issues = error.code === "server_name_taken" || (error.status === 409 && error.errors.length === 0)
    ? [{ loc: ["body", "server_name"], msg: error.message }] : error.errors;
  const at = {};
  let all = issues.length > 0;
  for (const { loc, msg } of issues) {
    const steps = loc.slice(loc[1] === "config" ? 2 : 1);
    const field = steps[0] === "token" ? "auth_token" : steps[0];
    if (field in fieldsOf(null)) (at[field] ??= []).push(steps.length > 1 ? `${steps.slice(1).join(".")}: ${msg}` : msg);
    else all = false;
  }
  return { at, rest: all ? null : error };
}

/** `server`: the one to change, if there is one. `submit(body)` sends it; what it throws is shown at its fields. */
export function ServerForm({ server, submit, action }) {
  const [fields, setFields] = useState(() => fieldsOf(server));
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const form = useRef(null);
  const { at, rest } = sorted(error);
  useEffect(() => {
    if (error) form.current.querySelector("[aria-invalid=true], .failure button, .failure")?.focus();
  }, [error]);

  const set = (name) => (value) => setFields((before) => ({ ...before, [name]: value }));
  const send = async (event) => {
    event.preventDefault();
    if (busy) return;
    setBusy(true);
    setError(null);
    try {
      await submit(server ? changed(fields, server) : created(fields));
    } catch (failure) {
      setError(failure);
    }
    setBusy(false);
  };
  const text = (name, label, more = {}) => html`<${TextField} name=${name} label=${label} value=${fields[name]} set=${set(name)}
    problems=${at[name]} ...${more} />`;
  const isRemote = fields.kind !== "stdio";
  const kept = server ? " What is masked with ******** stays as it is." : "";

  return html`<form class="narrow" ref=${form} onSubmit=${send} autocomplete="off" novalidate>
    <${Failure} error=${rest} />
    ${text("server_name", "Name", { hint: "What you and your agents call it." })}
    <fieldset><legend>Kind</legend>
      ${Object.entries(KINDS).map(([kind, words]) => html`<label class="choice"><input type="radio" name="kind" value=${kind}
        checked=${fields.kind === kind} onChange=${() => set("kind")(kind)} />
        <span>${words} <span class="hint">${HINTS[kind]}</span></span></label>`)}
    </fieldset>
    ${isRemote ? html`
      ${text("server_url", "URL", { type: "url", hint: "With https:// or http:// at its beginning.", code: true })}
      ${text("auth_token", "Token", { type: "password", hint: `If the server wants one; a server with sign-in wants none.${kept}` })}
      ${text("auth_header", "Header of the token", { hint: "Authorization, unless the server says otherwise." })}
      <${Pairs} name="custom_headers" legend="More headers" one="header" rows=${fields.custom_headers} set=${set("custom_headers")}
        problems=${at.custom_headers} hint=${kept} />
      <${Client} oauth=${fields.oauth} set=${set("oauth")} problems=${at.oauth} hint=${kept} />` : html`
      ${text("command", "Command", { hint: "The program alone, such as npx or /usr/bin/python3.", code: true })}
      <${Arguments} rows=${fields.args} set=${set("args")} problems=${at.args} />
      <${Pairs} name="env" legend="Environment" one="variable" rows=${fields.env} set=${set("env")} problems=${at.env}
        hint=${`The program sees these, and of Portolan's own environment little more than PATH.${kept}`} />`}
    <div class="actions"><button type="submit" class="main" aria-disabled=${busy}>${busy ? "One moment…" : action}</button>
      <a class="button" href=${server ? `#/servers/${encodeURIComponent(server.id)}` : "#/servers"}>Cancel</a></div>
  </form>`;
}

function Problems({ id, problems }) {
  return problems?.length > 0 && html`<div id=${id} class="problem">${problems.map((text) => html`<p><${Shown} text=${text} /></p>`)}</div>`;
}

function TextField({ name, label, value, set, problems, hint, type = "text", code = false }) {
  const described = [hint && `${name}-hint`, problems && `${name}-problem`].filter(Boolean).join(" ");
  return html`<label for=${name}>${label}</label>
    ${hint && html`<p id="${name}-hint" class="hint">${hint}</p>`}
    <input id=${name} type=${type} class=${code ? "code" : ""} value=${value} onInput=${(event) => set(event.target.value)}
      autocomplete=${type === "password" ? "new-password" : "off"} autocapitalize="none" spellcheck=${false}
      aria-invalid=${problems ? "true" : undefined} aria-describedby=${described || undefined} />
    <${Problems} id="${name}-problem" problems=${problems} />`;
}

const GRANTS = { "": "A person signs in", client_credentials: "Portolan alone, with the secret" };

/** The client that somebody registered by hand; most servers need none, so it is folded away. */
function Client({ oauth, set, problems, hint }) {
  const field = (name, label, more) => html`<${TextField} name="oauth-${name}" label=${label} value=${oauth[name]}
    set=${(value) => set({ ...oauth, [name]: value })} ...${more} />`;
  return html`<details open=${Boolean(problems) || oauth.client_id !== ""}><summary>A client for sign-ins that was registered by hand</summary>
    <p class="hint">Leave it empty where you have none: Portolan registers itself when you sign in.${hint}</p>
    ${field("client_id", "Client id", problems && { problems })}
    ${field("client_secret", "Client secret", { type: "password" })}
    ${field("scope", "Scope", { hint: "Several with spaces between them." })}
    <label for="oauth-grant">Who signs in</label>
    <select id="oauth-grant" value=${oauth.grant_type === "authorization_code" ? "" : oauth.grant_type}
      onChange=${(event) => set({ ...oauth, grant_type: event.target.value })}>
      ${Object.entries(GRANTS).map(([value, words]) => html`<option value=${value}>${words}</option>`)}
    </select>
  </details>`;
}

/** Rows that come and go. The new row's first field has the focus, and after one is gone the button that adds them. */
function useRows(rows, set) {
  const place = useRef(null);
  const next = useRef(null);
  useEffect(() => {
    if (next.current === null) return;
    [...place.current.querySelectorAll(next.current)].at(-1)?.focus();
    next.current = null;
  }, [rows.length]);
  return {
    place,
    add: (row) => { next.current = ".row > input:first-child"; set([...rows, row]); },
    remove: (index) => { next.current = "button.add"; set(rows.filter((_, other) => other !== index)); },
    change: (index, part) => set(rows.map((row, other) => (other === index ? { ...row, ...part } : row))),
  };
}

function Arguments({ rows, set, problems }) {
  const { place, add, remove, change } = useRows(rows, set);
  return html`<fieldset ref=${place}><legend>Arguments</legend>
    <p class="hint">One each, without quotes; spaces are kept as they are.</p>
    ${rows.map((row, index) => html`<div class="row single">
      <input class="code" value=${row.value} aria-label="Argument ${index + 1}" spellcheck=${false} autocapitalize="none"
        aria-invalid=${problems ? "true" : undefined} aria-describedby=${problems ? "args-problem" : undefined}
        onInput=${(event) => change(index, { value: event.target.value })} />
      <button type="button" onClick=${() => remove(index)} aria-label="Remove argument ${index + 1}">Remove</button>
    </div>`)}
    <${Problems} id="args-problem" problems=${problems} />
    <button type="button" class="add" onClick=${() => add({ value: "" })}>Add an argument</button>
  </fieldset>`;
}

function Pairs({ name, legend, one, rows, set, problems, hint }) {
  const { place, add, remove, change } = useRows(rows, set);
  const marks = { "aria-invalid": problems ? "true" : undefined, "aria-describedby": problems ? `${name}-problem` : undefined };
  return html`<fieldset ref=${place}><legend>${legend}</legend>
    ${hint && html`<p class="hint">${hint}</p>`}
    ${rows.map((row, index) => html`<div class="row">
      <input class="code" value=${row.name} placeholder="Name" aria-label="Name of ${one} ${index + 1}" spellcheck=${false}
        autocapitalize="none" ...${marks} onInput=${(event) => change(index, { name: event.target.value })} />
      <input class="code" value=${row.value} placeholder="Value" aria-label="Value of ${one} ${index + 1}" spellcheck=${false}
        autocapitalize="none" ...${marks} onInput=${(event) => change(index, { value: event.target.value })} />
      <button type="button" onClick=${() => remove(index)} aria-label="Remove ${one} ${index + 1}">Remove</button>
    </div>`)}
    <${Problems} id="${name}-problem" problems=${problems} />
    <button type="button" class="add" onClick=${() => add({ name: "", value: "" })}>Add a ${one}</button>
  </fieldset>`;
}
