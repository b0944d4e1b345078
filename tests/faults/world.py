"""What the scenarios are made of: Portolan as a process, a client for it, MCP servers, and the folder they live in."""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import sys
import time
import uuid

HERE = pathlib.Path(__file__).resolve().parent
UPSTREAM = str(HERE / "upstream.py")
# Isolated and without site packages: it starts in a fraction of the time.
PYTHON = [sys.executable, "-I", "-S"]
# Whatever is asked, longer than this means that it was never answered.
NEVER = 30.0
# What this harness itself may add to a time that it measures, on a machine that does much else.
SLACK = 0.5
# Ends with this process, however this one ends.
WITH_US = ["setpriv", "--pdeathsig", "KILL"]


class Failed(Exception):
    """A promise that was not kept."""


def require(holds, *what):
    if not holds:
        raise Failed(" ".join(str(it) for it in what))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def until(what, check, deadline=NEVER, pause=0.02):
    """Waits until `check()` is true, and returns that value."""
    end = time.monotonic() + deadline
    while True:
        value = check()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        require(time.monotonic() < end, f"not within {deadline:.0f} s: {what}")
        await asyncio.sleep(pause)


def percentile(times, share):
    """That of a list of numbers, 0 for none."""
    times = sorted(times)
    return times[min(len(times) - 1, int(len(times) * share))] if times else 0.0


def figures(times):
    return f"p50 {percentile(times, 0.5):.2f} s, p99 {percentile(times, 0.99):.2f} s, max {max(times, default=0):.2f} s"


# --- Processes --------------------------------------------------------------------------------------------------------------


def read_proc(pid, name):
    try:
        return pathlib.Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def processes():
    """All live processes: {pid: parent}."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = read_proc(entry, "stat").rpartition(b")")[2].split()
            if fields and fields[0] not in (b"Z", b"X"):
                found[int(entry)] = int(fields[1])
    return found


def below(pid):
    """All live processes below `pid`, keepers too."""
    everyone, found, grew = processes(), {pid}, True
    while grew:
        more = {child for child, parent in everyone.items() if parent in found} - found
        found |= more
        grew = bool(more)
    return found - {pid}


def marked(mark):
    """The live processes, but for this one, whose command line or environment has this text."""
    mark = mark.encode()
    return [
        pid for pid in processes()
        if pid != os.getpid() and (mark in read_proc(pid, "cmdline") or mark in read_proc(pid, "environ"))
    ]


class Process:
    """A child process whose output goes to a file."""

    def __init__(self, argv, log, env=None):
        self.argv, self.log, self.env = argv, log, env
        self.child = None

    @property
    def pid(self):
        return self.child.pid

    @property
    def runs(self):
        return self.child is not None and self.child.returncode is None

    async def spawn(self, **more):
        with open(self.log, "ab") as log:
            self.child = await asyncio.create_subprocess_exec(
                *self.argv, stdin=asyncio.subprocess.DEVNULL, **({"stdout": log, "stderr": log} | more), env=self.env
            )

    async def kill(self, sign=signal.SIGKILL):
        if self.runs:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(sign)
        return await asyncio.wait_for(self.child.wait(), NEVER)

    def said(self, lines=25):
        with contextlib.suppress(OSError):
            return "\n".join(pathlib.Path(self.log).read_text(errors="replace").splitlines()[-lines:])
        return ""


class Portolan(Process):
    """A Portolan on a port of its own, which it keeps when it is started again."""

    def __init__(self, world, name, database_url=None, wrapper=(), **settings):
        self.world = world
        folder = world.folder / name
        folder.mkdir()
        self.port = free_port()
        ours = ("PORTOLAN_", "LETTA_", "MCP_", "DATABASE_URL", "OTEL_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        # Commands get a fresh environment, their keepers this one.
        env |= {"FAULTS_MARK": world.mark, "PORTOLAN_KEY": "5f" * 32, "PORTOLAN_DATA_DIR": str(folder / "data")} | settings
        if database_url:
            env["DATABASE_URL"] = database_url
        env |= {"PORTOLAN_LISTEN": f"127.0.0.1:{self.port}"}
        argv = [*WITH_US, *wrapper, os.environ["PORTOLAN_BIN"]]
        super().__init__(argv, folder / "log", env)
        self.client = Client(self.port)
        world.everything.append(self)

    async def start(self):
        """Starts it, and returns how long it took until it was ready."""
        self.client.close()
        began = time.monotonic()
        await self.spawn()
        while True:
            require(self.runs, f"Portolan did not start (exit {self.child.returncode}):\n{self.said()}")
            with contextlib.suppress(OSError):
                if (await self.client.ask("GET", "/v1/ready", patience=1)).status == 200:
                    return time.monotonic() - began
            require(time.monotonic() - began < NEVER, f"Portolan was not ready:\n{self.said()}")
            await asyncio.sleep(0.01)

    async def stop(self):
        """A clean end."""
        self.client.close()
        require(self.runs, f"Portolan has ended (exit {self.child.returncode}):\n{self.said()}")
        children = below(self.pid)
        code = await self.kill(signal.SIGTERM)
        require(code == 0, f"exit {code} after SIGTERM:\n{self.said()}")
        await until("its children end", lambda: not children & processes().keys(), 5)

    async def end(self):
        self.client.close()
        if self.runs:
            await self.kill()

    def files(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def status(self, name):
        """A number of /proc/…/status."""
        text = read_proc(self.pid, "status").decode()
        return int(text.split(f"\n{name}:")[1].split()[0])

    async def metrics(self):
        """{name: sum over its labels}."""
        found = {}
        for line in (await self.client.ask("GET", "/metrics")).body.decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0]
                found[name] = found.get(name, 0) + float(value)
        return found


class Upstream(Process):
    """The MCP server over HTTP, which is there again on the same port after a restart."""

    def __init__(self, world, name):
        self.calls_file = world.traces / f"{name}.calls"
        self.port = 0
        self._read, self._calls, self._rest = 0, [], b""
        super().__init__([], world.folder / f"{name}.log")
        world.everything.append(self)

    async def start(self):
        self.argv = [*WITH_US, *PYTHON, UPSTREAM, "http", "--log", str(self.calls_file), "--port", str(self.port)]
        await self.spawn(stdout=asyncio.subprocess.PIPE)
        self.port = int(await asyncio.wait_for(self.child.stdout.readline(), NEVER))
        return self

    async def end(self):
        if self.runs:
            await self.kill()

    def calls(self):
        """Every call so far, as it was written down."""
        with contextlib.suppress(FileNotFoundError), open(self.calls_file, "rb") as file:
            file.seek(self._read)
            data = file.read()
            self._read += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._calls += map(json.loads, lines)
        return self._calls


# --- The client --------------------------------------------------------------------------------------------------------------


class Answer:
    def __init__(self, status, headers, body, seconds):
        self.status, self.headers, self.body, self.seconds = status, headers, body, seconds

    def json(self):
        return json.loads(self.body)

    def __str__(self):
        return f"{self.status} {self.body[:300].decode(errors='replace')}"


class Client:
    """HTTP/1.1 for one Portolan. An OSError is a connection that was lost or not had; a TimeoutError, one of these, no answer."""

    def __init__(self, port):
        self.port = port
        self._idle = []

    def close(self):
        for _, writer in self._idle:
            writer.transport.abort()
        self._idle.clear()

    async def ask(self, method, path, body=None, patience=NEVER, fresh=False, **headers):
        began = time.monotonic()
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"host: 127.0.0.1:{self.port}", f"content-length: {len(data)}"]
        if body is not None:
            lines.append("content-type: application/json")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        try:
            async with asyncio.timeout(patience):
                reader, writer = self._idle.pop() if self._idle and not fresh else await self._connect()
                try:
                    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
                    await writer.drain()
                    status, fields, answer = await self._read(reader)
                except BaseException:
                    writer.transport.abort()
                    raise
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the connection ended before the answer") from error
        if fields.get("connection") == "close" or fresh:
            writer.transport.abort()
        else:
            self._idle.append((reader, writer))
        return Answer(status, fields, answer, time.monotonic() - began)

    async def _connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)

    async def _read(self, reader):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        status = int(head[0].split()[1])
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readline()
        else:
            body = await reader.readexactly(int(fields.get("content-length", 0)))
        return status, fields, body

    async def register(self, name, config):
        """A server that is ready: its id, and the path that runs its first tool."""
        answer = await self.ask("POST", "/v1/mcp-servers/", {"server_name": name, "config": config})
        require(answer.status == 200, f"the create of {name} was answered", answer)
        require(answer.json()["status"]["state"] == "ready", f"{name} is not ready:", answer)
        server_id = answer.json()["id"]
        answer = await self.ask("GET", f"/v1/mcp-servers/{server_id}/tools")
        require(answer.status == 200 and answer.json(), f"the tools of {name} were answered", answer)
        return server_id, run_path(server_id, answer.json()[0]["id"])

    async def runs_well(self, path, patience=NEVER):
        """A run's answer, and whether it is as it should be; that of a connection that is lost is its error."""
        try:
            answer = await self.ask("POST", path, run_body()[1], patience=patience)
        except OSError as error:
            return error, False
        return answer, answer.status == 200 and answer.json()["status"] == "success"


def run_path(server_id, tool_id):
    return f"/v1/mcp-servers/{server_id}/tools/{tool_id}/run"


def run_body(ms=0):
    """Arguments that no other run has, and what tells it."""
    call = uuid.uuid4().hex
    return call, {"args": {"id": call, "ms": ms}}


# --- A scenario's own world --------------------------------------------------------------------------------------------------


class World:
    """What one scenario starts, in a folder of its own; leaving it ends all of it."""

    def __init__(self, name, folder, database, long, seed):
        self.name, self.database, self.long, self.seed = name, database, long, seed
        self.rng = random.Random(f"{seed}/{database}/{name}")
        self.mark = f"faults-{uuid.uuid4().hex}"
        self.folder = folder / f"{name}-{database}"
        self.folder.mkdir()
        self.folder.chmod(0o711)
        self.traces = self.folder / "traces"
        self.traces.mkdir()
        self.everything = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        for it in reversed(self.everything):
            await it.end()
        # All that was Portolan's child has ended with it: what is left here is a failure that is told elsewhere.
        for pid in marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stdio_config(self, number, grandchild=False):
        more = ["--grandchild"] if grandchild else []
        log = str(self.traces / "stdio.calls")
        args = [*PYTHON[1:], UPSTREAM, "stdio", "--log", log, "--mark", self.mark, *more, "--list", str(number)]
        return {"mcp_server_type": "stdio", "command": PYTHON[0], "args": args, "env": {"VERSION_TOKEN": str(number)}}

    def http_config(self, port, key, number):
        return {
            "mcp_server_type": "streamable_http", "server_url": f"http://127.0.0.1:{port}/{key}/list/{number}",
            "auth_header": "Authorization", "auth_token": f"Bearer token-{key}-{number}",
            "custom_headers": {"X-Version": str(number)},
        }
