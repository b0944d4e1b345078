// The shell of the console: header, routes and the prompt for a token. Pages are components; each gets `id` and `tool` from
// its route, and `query`, the URLSearchParams after a `?` of the hash.

import { html, render, useEffect, useRef, useState } from "./preact.js";
import { onUnauthorized, setToken, token, watchToken } from "./api.js";
import { Boundary, Heading, announce, noteNavigation } from "./page.js";
import { TokenPrompt } from "./token.js";
import { Servers } from "./servers.js";
import { Add } from "./add.js";
import { Edit } from "./edit.js";
import { SignIn } from "./sign-in.js";
import { Server } from "./server.js";
import { Tool } from "./tool.js";
import { Runs } from "./runs.js";
import { Changes } from "./changes.js";

const ROUTES = [
  [/^\/servers$/, Servers],
  [/^\/add$/, Add],
  [/^\/servers\/(?<id>[^/]+)$/, Server],
  [/^\/servers\/(?<id>[^/]+)\/edit$/, Edit],
  [/^\/servers\/(?<id>[^/]+)\/sign-in$/, SignIn],
  [/^\/servers\/(?<id>[^/]+)\/tools\/(?<tool>[^/]+)$/, Tool],
  [/^\/runs$/, Runs],
  [/^\/changes$/, Changes],
];

const LINKS = [["/servers", "Servers"], ["/add", "Add a server"], ["/runs", "Runs"], ["/changes", "Changes"]];

function place() {
  const [path, search = ""] = location.hash.replace(/^#/, "").split("?");
  return { path: path === "" || path === "/" ? "/servers" : path, query: new URLSearchParams(search) };
}

const broken = (retry) => html`<${Heading}>This page cannot be shown<//>
  <div class="failure" role="alert"><p>There is something on it that the console cannot draw. Nothing was changed by that.</p>
    <p>Try again, or go to the <a href="#/servers">servers</a>. If it stays so, the same can be done over the <a href="/docs">API</a>;
      please report it with what the console of your browser says.</p>
    <button type="button" onClick=${retry}>Try again</button></div>`;

function Page(at) {
  return html`<${Boundary} key=${at.path} at=${at.query} instead=${broken}><${Route} ...${at} /><//>`;
}

function Route({ path, query }) {
  for (const [pattern, Component] of ROUTES) {
    const match = pattern.exec(path);
    if (!match) continue;
    const steps = Object.entries(match.groups ?? {}).map(([name, step]) => [name, decoded(step)]);
    return html`<${Component} key=${path} query=${query} ...${Object.fromEntries(steps)} />`;
  }
  return html`<${Heading} key=${path}>There is no such page<//><p>Go to the <a href="#/servers">servers</a>.</p>`;
}

function decoded(step) {
  try {
    return decodeURIComponent(step);
  } catch {
    return step;
  }
}

const THEMES = { "": "System", light: "Light", dark: "Dark" };

/** Which theme is painted: the system's, until one is chosen. */
function Theme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme ?? "");
  const choose = (event) => {
    const chosen = event.target.value;
    setTheme(chosen);
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    try {
      if (chosen) localStorage.setItem("portolan.theme", chosen);
      else localStorage.removeItem("portolan.theme");
    } catch {
      // It lasts as long as the page.
    }
  };
  return html`<label class="theme">Theme <select value=${theme} onChange=${choose}>
    ${Object.entries(THEMES).map(([value, name]) => html`<option value=${value}>${name}</option>`)}
  </select></label>`;
}

function App() {
  const [at, setAt] = useState(place);
  const [signedIn, setSignedIn] = useState(token() !== null);
  const [prompt, setPrompt] = useState(null);
  // Another token sees other things: the page begins anew.
  const [visitor, setVisitor] = useState(0);
  const main = useRef(null);

  useEffect(() => {
    const move = () => { noteNavigation(); setAt(place()); };
    addEventListener("hashchange", move);
    const unwatch = watchToken((value) => setSignedIn(value !== null));
    onUnauthorized(({ refused }) => new Promise((resolve) => setPrompt({ refused, resolve })));
    return () => { removeEventListener("hashchange", move); unwatch(); };
  }, []);

  const answer = (given) => {
    prompt.resolve(given);
    setPrompt(null);
    announce(given ? "The token is used." : "No token was given.");
  };
  const skip = (event) => { event.preventDefault(); main.current.focus(); };
  const logOut = () => { setToken(null); setVisitor(visitor + 1); announce("Logged out."); };
  const isHere = (path) => at.path === path || (path === "/servers" && at.path.startsWith("/servers/"));

  return html`
    <a class="skip" href="#/servers" onClick=${skip}>Skip to the page</a>
    <header>
      <a class="brand" href="#/servers">Portolan</a>
      <nav aria-label="Main">${LINKS.map(([path, name]) => html`<a href="#${path}"
        aria-current=${isHere(path) ? "page" : undefined}>${name}</a>`)}</nav>
      <div class="tools"><a href="/docs">API</a><${Theme} />${signedIn && html`<button type="button" onClick=${logOut}>Log out</button>`}</div>
    </header>
    <main ref=${main} tabindex="-1"><${Page} key=${visitor} ...${at} /></main>
    ${prompt && html`<${TokenPrompt} refused=${prompt.refused} onDone=${answer} />`}`;
}

render(html`<${App} />`, document.getElementById("app"));
