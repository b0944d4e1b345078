// A server's name and connection are changed with the form that it was added with.

import { html } from "./preact.js";
import { call } from "./api.js";
import { Failure, Heading, Loading, announce, useLoaded } from "./page.js";
import { Shown, visible } from "./text.js";
import { ServerForm } from "./server-form.js";

export function Edit({ id }) {
  const path = `/v1/mcp-servers/${encodeURIComponent(id)}`;
  const { data: server, error, loading, reload } = useLoaded(path);
  const submit = async (body) => {
    const now = Object.keys(body).length > 0 ? await call("PATCH", path, body) : server;
    announce(`${visible(now.server_name)} is saved.`);
    location.hash = `#/servers/${encodeURIComponent(id)}`;
  };
  return html`
    <${Heading} title=${server ? `Edit ${server.server_name}` : "Edit"}>Edit ${server && html`<${Shown} text=${server.server_name} limit=${120} />`}<//>
    ${loading && html`<${Loading} what="Reading the server" />`}
    <${Failure} error=${error} retry=${reload} />
    ${server && html`<p class="hint">Running calls end on the old connection, the next one uses the new one. The tools are read again
      when you refresh them.</p><${ServerForm} server=${server} submit=${submit} action="Save" />`}`;
}
