// Servers are added one at a time by a form, or many by pasting the file of another program, which is looked at first.

import { html, useEffect, useRef, useState } from "./preact.js";
import { call } from "./api.js";
import { Failure, Heading, announce } from "./page.js";
import { Shown, visible } from "./text.js";
import { ServerForm } from "./server-form.js";

export function Add({ query }) {
  const byFile = query.get("how") === "file";
  const tab = (here, href, words) => html`<a class=${here ? "button main" : "button"} href=${href} aria-current=${here ? "true" : undefined}>${words}</a>`;
  return html`
    <${Heading}>Add a server<//>
    <nav class="actions" aria-label="Ways to add a server">
      ${tab(!byFile, "#/add", "By its command or URL")}${tab(byFile, "#/add?how=file", "By a configuration file")}
    </nav>
    ${byFile ? html`<${Paste} />` : html`<${ServerForm} submit=${add} action="Add the server" />`}`;
}

async function add(body) {
  announce("Adding the server and reading its tools.");
  const server = await call("POST", "/v1/mcp-servers/", body);
  announce(`${visible(server.server_name)} is added.`);
  const wantsSignIn = server.status.state === "auth_required" && server.mcp_server_type !== "stdio";
  location.hash = `#/servers/${encodeURIComponent(server.id)}${wantsSignIn ? "/sign-in" : ""}`;
}

const EXAMPLE = `{
  "mcpServers": {
    "everything": { "command": "npx", "args": ["-y", "@modelcontextprotocol/server-everything"] }
  }
}`;

/** The file is checked, the report is shown, and only what was checked is imported. */
function Paste() {
  const [text, setText] = useState("");
  const [replace, setReplace] = useState(false);
  // `{ text, replace, report }`: what the report is of is what will be imported, whatever is entered by then.
  const [checked, setChecked] = useState(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(null);
  const [done, setDone] = useState(null);
  const after = useRef(null);
  // Each edit and each check begins a turn; what comes of an older one is of no use any more.
  const turn = useRef(0);
  useEffect(() => () => { turn.current += 1; }, []);
  const edit = (change) => {
    turn.current += 1;
    change();
    setBusy(null);
    setChecked(null);
    setError(null);
    setDone(null);
  };
  const send = (given, dryRun) => call("POST", `/v1/portolan/import?mode=${given.replace ? "replace" : "merge"}&dry_run=${dryRun}`, given.text);
  const check = async (event) => {
    event.preventDefault();
    if (busy || text.trim() === "") return;
    const mine = ++turn.current;
    setBusy("check");
    setError(null);
    setDone(null);
    let report = null;
    let failure = null;
    try {
      report = await send({ text, replace }, true);
    } catch (thrown) {
      failure = thrown;
    }
    if (mine !== turn.current) return;
    setChecked(report && { text, replace, report });
    setError(failure);
    setBusy(null);
    if (report) announce("The file is checked. Nothing was changed yet.");
    after.current?.focus();
  };
  // Nothing can be edited meanwhile: what the import says is always of what is seen.
  const take = async () => {
    if (busy) return;
    setBusy("import");
    setError(null);
    try {
      setDone(await send(checked, false));
      announce("The servers are imported.");
    } catch (failure) {
      setError(failure);
    }
    setChecked(null);
    setBusy(null);
    after.current?.focus();
  };
  const open = async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    edit(() => {});
    const mine = turn.current;
    try {
      const read = await file.text();
      if (mine === turn.current) edit(() => setText(read));
    } catch {
      if (mine === turn.current) setError({ message: "The file cannot be read. Choose it again, or paste its text.", errors: [] });
    }
  };
  const locked = busy === "import";
  const report = checked?.report;

  return html`<form onSubmit=${check}>
      <label for="file-text">Configuration file</label>
      <p id="file-hint" class="hint">The file in which Claude, Cursor, Windsurf or Letta (mcpServers) or VS Code (servers) keep their
        MCP servers. Nothing is changed before you have seen what would be.</p>
      <textarea id="file-text" class="code" rows="12" spellcheck=${false} value=${text} readonly=${locked} placeholder=${EXAMPLE} aria-describedby="file-hint"
        aria-invalid=${error ? "true" : undefined} onInput=${(event) => edit(() => setText(event.target.value))}></textarea>
      <label for="file">Or open it from this computer</label>
      <input id="file" type="file" accept=".json,.jsonc,application/json" disabled=${locked} onChange=${open} />
      <label class="choice"><input type="checkbox" checked=${replace} disabled=${locked} onChange=${(event) => edit(() => setReplace(event.target.checked))} />
        Remove the servers that are not in the file</label>
      <div class="actions"><button type="submit" class="main" aria-disabled=${busy !== null || text.trim() === ""}>${busy === "check" ? "Checking…" : "Check the file"}</button></div>
    </form>
    <div ref=${after} tabindex="-1">
      ${error && html`<${FileProblems} error=${error} />`}
      ${report && html`<h2>What would be done</h2><${Report} report=${report} />
        ${isNothing(report) ? html`<p>There is nothing to do.</p>` : html`<div class="actions">
          <button type="button" class=${report.removed.length > 0 ? "danger" : "main"} aria-disabled=${busy !== null} onClick=${take}>
            ${locked ? "Importing…" : report.removed.length > 0 ? `Import, and remove ${report.removed.length}` : "Import"}</button></div>`}`}
      ${done && html`<h2>Imported</h2><${Report} report=${done} />
        <p class="done">Portolan connects to the servers now. <a href="#/servers">See how they are</a>.</p>`}
    </div>`;
}

function isNothing({ added, changed, removed }) {
  return added.length + changed.length + removed.length === 0;
}

function FileProblems({ error }) {
  if (!error.errors?.length) return html`<${Failure} error=${error} />`;
  return html`<div class="failure" role="alert"><p>The file was not taken, and nothing was changed:</p>
    <ul>${error.errors.map(({ msg }) => html`<li><${Shown} text=${msg} limit=${500} /></li>`)}</ul></div>`;
}

const PARTS = [["added", "Added"], ["changed", "Changed"], ["unchanged", "As they are"], ["removed", "Removed"]];

function Report({ report }) {
  const names = (list) => list.map((name, index) => html`${index > 0 && ", "}<${Shown} text=${name} limit=${120} />`);
  return html`<dl class="pairs">${PARTS.filter(([key]) => report[key].length > 0).map(([key, words]) => html`
      <dt>${words}</dt><dd>${names(report[key])}</dd>`)}</dl>
    ${report.ignored.length > 0 && html`<h3>Not taken over</h3>
      <ul>${report.ignored.map(({ server, key, reason }) => html`<li>${server && html`<${Shown} text=${server} limit=${120} />: `}<code><${Shown} text=${key} limit=${120} /></code>
        ${" "}<${Shown} text=${reason} limit=${500} /></li>`)}</ul>`}
    ${report.variables.length > 0 && html`<h3>Variables to set</h3>
      <p class="hint">The operator sets them in Portolan's variables file, or a request brings them.</p>
      <ul>${report.variables.map((variable) => html`<li><code><${Shown} text=${variable.name} /></code>
        ${variable.has_default ? " has a default" : " has to be set"}, for ${names(variable.servers)}</li>`)}</ul>`}`;
}
