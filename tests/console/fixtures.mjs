// What every test of the console has: a Portolan of its own, MCP servers behind it, and a guard that looks over the browser's
// shoulder.

import { execFileSync } from "node:child_process";
import { once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";

import { test as base, expect } from "@playwright/test";

import { Portolan, Process, Upstream } from "../sdk/javascript/processes.mjs";

export { expect };

const HERE = import.meta.dirname;
const SHOTS = path.join(HERE, "../.cache/console");
const EVERYTHING = path.join(HERE, "../published/node_modules/@modelcontextprotocol/server-everything/dist/index.js");
const AXE = fs.readFileSync(path.join(HERE, "node_modules/axe-core/axe.min.js"), "utf8");

/** What a text of others must not bring to the screen as it is: control, bidi, zero-width and tag characters. */
const UNSEEN = "[\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f-\\u009f\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u206f\\ufeff\\u{e0000}-\\u{e007f}]";

// --- MCP servers -----------------------------------------------------------------------------------------------------------------

/** The published server-everything, as a command. */
export const everything = { command: "node", args: [EVERYTHING, "stdio"] };

/** The server that is out to break pages, with `more` tools beside, which changes them when `file` is there. */
export const hostile = (more = 0, file = "/nonexistent") => ({
  command: process.env.PORTOLAN_TOOLS_PYTHON,
  args: [path.join(HERE, "hostile.py"), String(more), file],
});

async function freePort() {
  const server = net.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}

/** The published server-everything over streamable HTTP, which can die and come back where it was. */
class EverythingHttp {
  async start() {
    for (let attempt = 1; ; attempt++) {
      this.port ??= await freePort();
      this.process = new Process("node", [EVERYTHING, "streamableHttp"], { ...process.env, PORT: String(this.port) });
      try {
        await this.process.lineWith("listening on");
        return;
      } catch (error) {
        // Somebody else took the port, as long as it is not known to anybody.
        if (this.url || attempt === 3) throw error;
        this.port = undefined;
      }
    }
  }

  async die() {
    this.process.child.kill("SIGKILL");
    await this.process.exited;
  }

  stop() {
    return this.process.stop();
  }
}

/** A program that prints its URL first. */
class Program {
  constructor(command, args) {
    this.process = new Process(command, args, process.env);
  }

  async start() {
    this.url = await this.process.lineWith("http://127.0.0.1:");
  }

  stop() {
    return this.process.stop();
  }
}

/** One address that leads to a Portolan that is not there yet, for settings that name it. */
class Gate {
  static async open() {
    const gate = new Gate();
    gate.sockets = new Set();
    gate.server = net.createServer((client) => {
      if (!gate.target) return client.destroy();
      const target = net.connect(Number(new URL(gate.target).port), "127.0.0.1");
      for (const [one, other] of [[client, target], [target, client]]) {
        gate.sockets.add(one);
        one.on("error", () => {}).on("close", () => gate.sockets.delete(one) && other.destroy()).pipe(other);
      }
    });
    gate.server.listen(0, "127.0.0.1");
    await once(gate.server, "listening");
    gate.url = `http://127.0.0.1:${gate.server.address().port}`;
    return gate;
  }

  /** Lets nobody through until it leads somewhere again. */
  close() {
    this.target = null;
    for (const socket of this.sockets) socket.destroy();
  }

  stop() {
    this.server.close();
    this.close();
  }
}

/** Starts MCP servers that end with the test. */
class Upstreams {
  running = [];

  async add(upstream) {
    this.running.push(upstream);
    await upstream.start?.();
    return upstream;
  }

  /** server-everything over streamable HTTP. */
  async everythingHttp() {
    const upstream = await this.add(new EverythingHttp());
    upstream.url = `http://127.0.0.1:${upstream.port}/mcp`;
    return upstream;
  }

  /** A server with a sign-in. */
  oauth() {
    return this.add(new Program(process.env.PORTOLAN_TOOLS_PYTHON, [path.join(HERE, "oauth_server.py")]));
  }

  /** The server of the SDK suites, whose list a test can change. */
  async fixture(kind = "stdio", options = {}) {
    return this.add(await Upstream.start(kind, options));
  }

  async stop() {
    await Promise.all(this.running.map((upstream) => upstream.stop()));
  }
}

// --- The guard -------------------------------------------------------------------------------------------------------------------

/** Collects what must not happen in the browser while a test runs. */
export class Guard {
  problems = [];
  /** Statuses of failures that a test asks for: Chromium writes a line to the console for each. */
  expected = new Map();
  /** Other origins, for other pages than the console. */
  elsewhere = new Set();

  constructor(context, page, origin) {
    Object.assign(this, { context, page, origin });
  }

  async watch() {
    await this.context.addInitScript(() => {
      const told = (event) => console.error(`CSP violation: ${event.effectiveDirective} ${event.blockedURI} ${event.sample}`);
      document.addEventListener("securitypolicyviolation", told);
    });
    this.context.on("console", (message) => {
      if (!["error", "warning", "assert"].includes(message.type())) return;
      // The browser looks for a picture of pages that name none, as the ones of a sign-in.
      if (message.page() !== this.page && message.location().url.endsWith("/favicon.ico")) return;
      const [, status, net] = message.text().match(/^Failed to load resource: (?:the server responded with a status of (\d+)|(net::ERR_))/) ?? [];
      const what = net ? "connection" : Number(status);
      if (this.expected.has(what)) return void this.expected.set(what, true);
      this.problems.push(`console ${message.type()}: ${message.text()} (${message.location().url})`);
    });
    this.context.on("weberror", (error) => this.problems.push(`uncaught: ${error.error().stack}`));
    this.context.on("dialog", (dialog) => {
      this.problems.push(`dialog: ${dialog.type()} ${dialog.message()}`);
      dialog.dismiss().catch(() => {});
    });
    this.context.on("request", (request) => {
      const url = new URL(request.url());
      if (["data:", "blob:"].includes(url.protocol) || url.origin === this.origin) return;
      const isConsole = !request.isNavigationRequest() && request.frame().page() === this.page;
      if (isConsole || !this.elsewhere.has(url.origin)) this.problems.push(`request to another origin: ${url}`);
    });
    this.context.on("response", (response) => {
      if (response.headers()["set-cookie"]) this.problems.push(`a cookie from ${response.url()}`);
    });
  }

  /** A failure with this status (or "connection") shall happen; what the browser itself says of it is no problem. */
  expect(...statuses) {
    for (const status of statuses) this.expected.set(status, false);
  }

  /** A failure with this status may happen. */
  allow(...statuses) {
    for (const status of statuses) this.expected.set(status, true);
  }

  /** What there is on a page that must never be there, whatever the page shows. */
  async harm(page = this.page) {
    return page.evaluate((unseen) => {
      const bad = [];
      if (window.pwned) bad.push("a script of others ran");
      const one = (selector) => document.querySelectorAll(selector).forEach((it) => bad.push(`element: ${it.outerHTML.slice(0, 200)}`));
      one(".injected, iframe, object, embed, base, form[action], a[href^='javascript:' i], script:not([src]), [style]");
      for (const it of document.querySelectorAll("*")) {
        for (const { name, value } of it.attributes) {
          if (name.startsWith("on")) bad.push(`attribute: ${name} of ${it.localName}`);
          if (["href", "src"].includes(name) && /^\s*(javascript|data:(?!image\/(png|jpeg|gif|webp)|audio\/))/i.test(value)) bad.push(`${name}: ${value.slice(0, 99)}`);
        }
      }
      const hidden = new RegExp(unseen, "u");
      const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (texts.nextNode()) {
        if (texts.currentNode.parentNode.localName === "textarea") continue;
        const at = texts.currentNode.data.search(hidden);
        if (at >= 0) bad.push(`hidden character in text: ${JSON.stringify(texts.currentNode.data.slice(Math.max(0, at - 20), at + 20))}`);
      }
      for (const it of document.querySelectorAll("[title], [aria-label], [alt], [placeholder]")) {
        for (const name of ["title", "aria-label", "alt", "placeholder"]) {
          if (hidden.test(it.getAttribute(name) ?? "")) bad.push(`hidden character in ${name} of ${it.localName}`);
        }
      }
      if (hidden.test(document.title)) bad.push("hidden character in the title");
      const root = document.scrollingElement;
      if (root.scrollWidth > root.clientWidth) {
        const wide = [...document.body.querySelectorAll("*")].filter((it) => it.getBoundingClientRect().right > root.clientWidth + 1);
        bad.push(`wider than the window: ${root.scrollWidth} > ${root.clientWidth}: ${wide.slice(0, 5).map((it) => `${it.localName}.${it.className}`).join(" ")}`);
      }
      return bad;
    }, UNSEEN);
  }

  async harmless(page = this.page) {
    expect(await this.harm(page), "what the page holds").toEqual([]);
  }

  /** What axe finds to be serious or critical, in words. */
  async axe(page = this.page) {
    if (!(await page.evaluate(() => "axe" in window))) await page.evaluate(AXE);
    return page.evaluate(async () => {
      const { violations } = await window.axe.run(document, { resultTypes: ["violations"], preload: false });
      const grave = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
      return grave.flatMap(({ id, nodes }) =>
        nodes.slice(0, 5).map((node) => `${id}: ${node.target} ${node.html.slice(0, 200)} ${(node.any[0] ?? node.all[0] ?? node.none[0])?.message}`));
    });
  }

  /** Photographs the page and searches it, in both themes. */
  async look(name, page = this.page) {
    const size = page.viewportSize().width;
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      const height = await page.evaluate(() => document.scrollingElement.scrollHeight);
      await page.screenshot({ path: path.join(SHOTS, `${name}-${colorScheme}-${size}.png`), fullPage: height < 6000, caret: "initial" });
      expect(await this.axe(page), `axe on ${name}, ${colorScheme}`).toEqual([]);
      await this.harmless(page);
    }
    await page.emulateMedia({ colorScheme: null });
  }

  /** Nothing bad happened, and what was to happen did. */
  async settle() {
    const cookies = await this.context.cookies();
    if (cookies.length) this.problems.push(`cookies: ${JSON.stringify(cookies)}`);
    if (!this.page.isClosed() && this.page.url().startsWith(this.origin)) this.problems.push(...(await this.harm()));
    expect(this.problems, "what happened in the browser").toEqual([]);
    const missing = [...this.expected].filter(([, seen]) => !seen).map(([status]) => status);
    expect(missing, "failures that were to happen and did not").toEqual([]);
  }
}

// --- Portolan --------------------------------------------------------------------------------------------------------------------

/** The public REST API, for what is not a test's own task. */
class Api {
  constructor(url, token) {
    Object.assign(this, { url, token });
  }

  async call(method, path, body) {
    const headers = { "content-type": "application/json", ...(this.token && { authorization: `Bearer ${this.token}` }) };
    const answer = await fetch(this.url + path, { method, headers, body: body && JSON.stringify(body) });
    const text = await answer.text();
    if (!answer.ok) throw new Error(`${method} ${path}: ${answer.status} ${text}`);
    return text ? JSON.parse(text) : null;
  }

  create(name, config) {
    return this.call("POST", "/v1/mcp-servers/", { server_name: name, config });
  }

  server(id) {
    return this.call("GET", `/v1/mcp-servers/${id}`);
  }

  servers() {
    return this.call("GET", "/v1/mcp-servers/");
  }

  tools(id) {
    return this.call("GET", `/v1/mcp-servers/${id}/tools`);
  }

  async run(id, name, args = {}) {
    const tool = (await this.tools(id)).find((it) => it.name === name);
    return this.call("POST", `/v1/mcp-servers/${id}/tools/${tool.id}/run`, { args });
  }
}

/** Takes the console's files out of a folder, for whoever changes them and does not want to wait for a build. */
async function serveFrom(folder, context) {
  const kinds = { ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml" };
  await context.route("**/console/*", (route) => {
    const file = path.join(folder, path.basename(new URL(route.request().url()).pathname));
    return route.fulfill({ path: file, contentType: kinds[path.extname(file)] });
  });
}

export const test = base.extend({
  /** Environment variables for Portolan, and `tokens`: names with their scopes. `portolan.tokens` has the tokens then. */
  settings: [{}, { option: true }],

  upstreams: async ({}, use) => {
    const upstreams = new Upstreams();
    await use(upstreams);
    await upstreams.stop();
  },

  /** The way from the browser to Portolan. */
  gate: async ({}, use) => {
    const gate = await Gate.open();
    await use(gate);
    gate.stop();
  },

  portolan: async ({ settings, gate, upstreams }, use) => {
    const { tokens: named, ...env } = settings;
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), "portolan-console-"));
    const tokens = {};
    for (const [name, scope] of Object.entries(named ?? {})) {
      const made = ["token", "new", name, "--scope", scope, "--file", path.join(folder, "tokens")];
      tokens[name] = execFileSync(process.env.PORTOLAN_BIN, made, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
      env.PORTOLAN_TOKENS_FILE = path.join(folder, "tokens");
    }
    const portolan = await Portolan.start({ PORTOLAN_PUBLIC_URL: gate.url, PORTOLAN_CREATE_SYNC_TIMEOUT: "60s", ...env });
    portolan.tokens = tokens;
    gate.target = portolan.url;
    await use(portolan);
    gate.close();
    await portolan.stop();
    fs.rmSync(folder, { recursive: true, force: true });
  },

  api: async ({ portolan, settings }, use) => use(new Api(portolan.url, portolan.tokens.admin ?? settings.PORTOLAN_TOKEN)),

  baseURL: async ({ gate, portolan }, use) => use(gate.url),

  guard: [
    async ({ context, page, gate }, use) => {
      if (process.env.CONSOLE_FROM) await serveFrom(process.env.CONSOLE_FROM, context);
      const guard = new Guard(context, page, gate.url);
      await guard.watch();
      await use(guard);
      await guard.settle();
    },
    { auto: true },
  ],
});
