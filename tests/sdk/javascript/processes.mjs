// Starts and ends the processes of the JavaScript suite: a Portolan, and the MCP servers behind it. The environment is the one of
// ../processes.py: PORTOLAN_BIN, PORTOLAN_TOOLS_PYTHON and, for Postgres, PORTOLAN_DATABASE_URL.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";

const FIXTURE = path.join(import.meta.dirname, "..", "fixture_server.py");
const DEADLINE = 30_000;

function stat(pid) {
  try {
    const fields = fs.readFileSync(`/proc/${pid}/stat`, "utf8").split(")").pop().trim().split(" ");
    return { state: fields[0], parent: Number(fields[1]), start: fields[19] };
  } catch {
    return null;
  }
}

function commandLine(pid) {
  try {
    return fs.readFileSync(`/proc/${pid}/cmdline`, "utf8").replaceAll("\0", " ").trim();
  } catch {
    return "";
  }
}

const everyPid = () => fs.readdirSync("/proc").filter((name) => /^\d+$/.test(name)).map(Number);

/** Every live process below `pid`, as [pid, start time]. */
function descendants(pid) {
  const everyone = new Map(everyPid().map((it) => [it, stat(it)]));
  const below = new Set([pid]);
  for (let grew = true; grew; ) {
    grew = false;
    for (const [child, it] of everyone) {
      if (it && it.state !== "Z" && below.has(it.parent) && !below.has(child)) grew = Boolean(below.add(child));
    }
  }
  below.delete(pid);
  return [...below].map((child) => [child, everyone.get(child).start]);
}

/** A child with both outputs collected line by line, ended by its own pid. */
export class Process {
  constructor(command, args, env) {
    this.lines = [];
    this.waiting = new Set();
    this.child = spawn(command, args, { env, stdio: ["ignore", "pipe", "pipe"] });
    this.exited = once(this.child, "exit");
    this.exited.catch(() => {});
    for (const stream of [this.child.stdout, this.child.stderr]) {
      createInterface({ input: stream }).on("line", (line) => {
        this.lines.push(line);
        for (const look of [...this.waiting]) look();
      });
    }
    this.child.on("close", () => [...this.waiting].forEach((look) => look()));
  }

  /** The first line of output that holds `text`, waiting for it. */
  lineWith(text) {
    return new Promise((resolve, reject) => {
      const end = (settle, value) => {
        clearTimeout(timer);
        this.waiting.delete(look);
        settle(value);
      };
      const output = () => this.lines.slice(-40).join("\n");
      const look = () => {
        const line = this.lines.find((it) => it.includes(text));
        if (line !== undefined) end(resolve, line);
        else if (this.child.exitCode !== null) end(reject, new Error(`ended before ${text}:\n${output()}`));
      };
      const timer = setTimeout(() => end(reject, new Error(`no line with ${text}:\n${output()}`)), DEADLINE);
      this.waiting.add(look);
      look();
    });
  }

  async stop() {
    if (this.child.exitCode === null && this.child.signalCode === null) this.child.kill("SIGTERM");
    const timer = setTimeout(() => this.child.kill("SIGKILL"), DEADLINE);
    const [code, signal] = await this.exited;
    clearTimeout(timer);
    return code ?? signal;
  }
}

export class Portolan extends Process {
  static async start(settings = {}) {
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), "portolan-suite-"));
    fs.mkdirSync(path.join(folder, "data"));
    const ours = /^(PORTOLAN_|LETTA_|MCP_|NODE_|DATABASE_URL)/;
    const env = Object.fromEntries(Object.entries(process.env).filter(([key]) => !ours.test(key)));
    const args = ["--listen", "127.0.0.1:0", "--data-dir", path.join(folder, "data")];
    if (process.env.PORTOLAN_DATABASE_URL) {
      args.push("--database-url", process.env.PORTOLAN_DATABASE_URL);
      // 32 bytes like any others; SQLite makes its own.
      env.PORTOLAN_KEY = "5f".repeat(32);
    }
    const portolan = new Portolan(process.env.PORTOLAN_BIN, args, { ...env, ...settings });
    portolan.folder = folder;
    portolan.url = (await portolan.lineWith(" listens on http://")).split(" listens on ")[1].trim();
    await portolan.lineWith("API reference: ");
    return portolan;
  }

  /** SIGTERM; asserts exit code 0 and that no process is left. */
  async stop() {
    const below = descendants(this.child.pid);
    const code = await super.stop();
    const left = below.filter(([pid, start]) => stat(pid)?.start === start && stat(pid)?.state !== "Z").map(([pid]) => pid);
    left.push(...everyPid().filter((pid) => commandLine(pid).includes(this.folder)));
    fs.rmSync(this.folder, { recursive: true, force: true });
    assert.equal(code, 0, `exit code after SIGTERM; last output:\n${this.lines.slice(-40).join("\n")}`);
    assert.deepEqual(left.map((pid) => `${pid} ${commandLine(pid)}`), [], "processes left behind");
  }
}

/** An upstream of one kind: `fields` tells Portolan of it, `setState` changes what it lists, `stop` ends it. */
export class Upstream {
  static async start(kind, { require, note, effects } = {}) {
    const upstream = new Upstream();
    upstream.folder = fs.mkdtempSync(path.join(os.tmpdir(), "portolan-upstream-"));
    upstream.state = path.join(upstream.folder, "state.json");
    const python = process.env.PORTOLAN_TOOLS_PYTHON;
    if (kind === "stdio") {
      upstream.effects = path.join(upstream.folder, "effects");
      const more = [...(note ? ["--note", note] : []), ...(effects ? ["--effects", upstream.effects] : [])];
      upstream.fields = { command: python, args: [FIXTURE, "stdio", "--state", upstream.state, ...more] };
      return upstream;
    }
    const transport = kind === "streamable_http" ? "http" : kind;
    const args = [FIXTURE, transport, "--state", upstream.state, ...(require ? ["--require", require] : [])];
    upstream.process = new Process(python, args, process.env);
    upstream.fields = { server_url: await upstream.process.lineWith("http://127.0.0.1:") };
    return upstream;
  }

  setState(state) {
    fs.writeFileSync(`${this.state}.new`, JSON.stringify(state));
    fs.renameSync(`${this.state}.new`, this.state);
  }

  /** How often the tool `work` was called, with the option `effects`. */
  worked() {
    return fs.existsSync(this.effects) ? fs.readFileSync(this.effects, "utf8").split("\n").length - 1 : 0;
  }

  async stop() {
    await this.process?.stop();
    fs.rmSync(this.folder, { recursive: true, force: true });
  }
}

/** A TCP proxy in front of `url`, for clients that shall lose their connections. */
export class Cutter {
  static async start(url) {
    const cutter = new Cutter();
    cutter.open = new Set();
    cutter.server = net.createServer((client) => {
      const target = net.connect(Number(new URL(url).port), "127.0.0.1");
      for (const [one, other] of [[client, target], [target, client]]) {
        cutter.open.add(one);
        one.on("error", () => {}).on("close", () => other.destroy()).pipe(other);
      }
    });
    cutter.server.listen(0, "127.0.0.1");
    await once(cutter.server, "listening");
    cutter.url = `http://127.0.0.1:${cutter.server.address().port}`;
    return cutter;
  }

  /** Ends every connection; new ones are taken. */
  cut() {
    for (const socket of this.open) socket.destroy();
    this.open.clear();
  }

  stop() {
    this.server.close();
    this.cut();
  }
}

/** Polls until `check()` is true. */
export async function eventually(what, check) {
  const end = Date.now() + DEADLINE;
  while (!check()) {
    assert.ok(Date.now() < end, `not in time: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
