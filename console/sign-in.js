// Signing in to a server: Portolan connects, and tells each step as it happens; the user signs in on a page of somebody
// else, in another tab.

import { html, useEffect, useRef, useState } from "./preact.js";
import { stream } from "./api.js";
import { Failure, Heading, announce, useLoaded } from "./page.js";
import { Shown, visible } from "./text.js";

export function SignIn({ id }) {
  const path = encodeURIComponent(id);
  const { data: server, error } = useLoaded(`/v1/mcp-servers/${path}`);
  const [events, setEvents] = useState([]);
  const [running, setRunning] = useState(false);
  const [failed, setFailed] = useState(null);
  const opened = useRef(null);
  useEffect(() => () => opened.current?.abort(), []);

  // Only a press of the button begins: whoever is sent to this address by another page has not asked for it.
  const start = async () => {
    const controller = new AbortController();
    opened.current = controller;
    setEvents([]);
    setFailed(null);
    setRunning(true);
    let last = null;
    try {
      await stream(`/v1/mcp-servers/connect/${path}`, (event) => {
        if (controller.signal.aborted) return;
        last = event.event;
        setEvents((before) => [...before, event]);
        announce(spoken(event));
      }, controller.signal);
      if (!controller.signal.aborted && last !== "success" && last !== "error") {
        setFailed(new Error("Portolan ended the connection before the sign-in was over. Start again."));
      }
    } catch (failure) {
      if (!controller.signal.aborted) setFailed(failure);
    }
    if (opened.current === controller) setRunning(false);
  };
  const stop = () => {
    opened.current.abort();
    setRunning(false);
    announce("Stopped waiting.");
  };
  const last = events.at(-1)?.event;

  return html`
    <${Heading} title=${server ? `Sign in to ${server.server_name}` : "Sign in"}>Sign in ${server && html`to <${Shown} text=${server.server_name} limit=${120} />`}<//>
    <${Failure} error=${error} />
    <p>Portolan connects to the server. If it wants a sign-in, you get a link to its page, and Portolan waits for you.</p>
    <div class="actions">
      <button type="button" class=${running || last === "success" ? "" : "main"} onClick=${running ? stop : start} disabled=${Boolean(error)}>
        ${running ? "Stop" : events.length > 0 || failed ? "Start again" : "Connect"}</button>
      <a class="button" href="#/servers/${path}">Back to the server</a>
    </div>
    ${events.length > 0 && html`<ol class="steps">${events.map((event, index) => html`<li key=${index} class=${look(event)}>
      <${Step} event=${event} id=${path} over=${!running} /></li>`)}</ol>`}
    <${Failure} error=${failed} />`;
}

function look({ event }) {
  return event === "success" ? "good" : event === "error" ? "bad" : "";
}

/** The list comes as the server gave it, also what is no tool in it. */
const named = (tools) => (tools ?? []).filter((tool) => typeof tool?.name === "string");

/** A step in a sentence, for whoever listens. */
function spoken(event) {
  switch (event.event) {
    case "connection_attempt": return "Connecting.";
    case "oauth_required": return "The server wants a sign-in.";
    case "authorization_url": return "The link to the sign-in page is there.";
    case "waiting_for_auth": return "Waiting for you to sign in.";
    case "success": return `Connected. ${named(event.tools).length} tools were read.`;
    default: return `Failed: ${visible(event.message)}`;
  }
}

function Step({ event, id, over }) {
  switch (event.event) {
    case "connection_attempt": return html`Connecting to <${Shown} text=${event.server_name} limit=${120} />.`;
    case "oauth_required": return html`The server wants a sign-in.`;
    case "authorization_url": return html`<${SignInLink} url=${event.url} over=${over} />`;
    case "waiting_for_auth": return html`Waiting until you have signed in there.`;
    case "success": return html`<${Success} tools=${named(event.tools)} id=${id} />`;
    case "error": return html`<p class="problem">It failed: <${Shown} text=${event.message} /></p>
      <p class="hint">Start again, or <a href="#/servers/${id}/edit">edit the server</a>.</p>`;
    default: return html`<${Shown} text=${event.event} limit=${120} />`;
  }
}

/** The address comes from the server: it is a link only if it is one of the web, and the user sees whose it is. */
function SignInLink({ url, over }) {
  const target = URL.canParse(url) ? new URL(url) : null;
  if (target?.protocol !== "https:" && target?.protocol !== "http:") {
    return html`<p class="problem">The server named a sign-in page that is no web address.</p>`;
  }
  return html`<p>Sign in at <strong><${Shown} text=${target.host} limit=${200} /></strong>, if you trust it; it opens in a new tab.</p>
    ${!over && html`<p><a class="button main" href=${target.href} target="_blank" rel="noopener noreferrer">Open the sign-in page</a></p>`}`;
}

function Success({ tools, id }) {
  const names = tools.slice(0, 20);
  return html`<p class="done">Connected. ${tools.length === 1 ? "1 tool was read" : `${tools.length} tools were read`}.
      <a href="#/servers/${id}">See the tools</a></p>
    ${names.length > 0 && html`<p class="quiet">${names.map((tool, index) => html`${index > 0 && ", "}<${Shown} text=${tool.name} limit=${120} />`)}
      ${tools.length > names.length && ` and ${tools.length - names.length} more`}</p>`}`;
}
