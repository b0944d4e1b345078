import asyncio
import itertools
import os
import pathlib
import re
import sys

import httpx
import mcp
import pytest
from mcp.client.sse import sse_client

import processes

HERE = pathlib.Path(__file__).resolve().parent
EVERYTHING = HERE / "node_modules/@modelcontextprotocol/server-everything/dist/index.js"
NUMBERS = itertools.count()


def pytest_report_header():
    return f"database {'postgres' if os.environ.get('PORTOLAN_DATABASE_URL') else 'sqlite'}"


@pytest.fixture(scope="session")
def portolan():
    with processes.new_folder() as folder:
        server = processes.Portolan(folder)
        yield server
        server.stop()


@pytest.fixture
def http(portolan):
    with httpx.Client(base_url=f"{portolan.url}/v1/mcp-servers", timeout=60) as client:
        yield client


def listening_port(pid):
    """The port that process `pid` listens on, or None so far: no port needs to be guessed free."""
    sockets = set()
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(link))
        except FileNotFoundError:
            continue
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                return int(fields[1].rpartition(":")[2], 16)
    return None


class Upstream:
    """A published server: how Portolan is told of it, and how the `mcp` client package reaches it directly."""

    def __init__(self, config, direct, mode="auto", process=None, session_line=None):
        self.config, self.direct, self.mode, self.process, self.session_line = config, direct, mode, process, session_line

    def ask(self, question):
        """What `await question(client)` gives on a direct connection."""

        async def main():
            async with mcp.Client(self.direct(), mode=self.mode) as client:
                return await asyncio.wait_for(question(client), 60)

        return asyncio.run(main())

    def sessions(self):
        """How many sessions the server has logged so far."""
        return self.process.count(self.session_line)


def over_stdio(command, *args, mode="auto"):
    config = {"mcp_server_type": "stdio", "command": command, "args": list(args)}
    return Upstream(config, lambda: mcp.StdioServerParameters(command=command, args=list(args)), mode)


def everything(transport):
    """server-everything is one of the servers that speak no revision after 2025-11-25."""
    if transport == "node":
        return over_stdio("node", str(EVERYTHING), "stdio", mode="legacy")
    if transport == "npx":
        # npx finds the installed package from the folder that holds it; --offline: it must not look anywhere else.
        script = 'cd "$1" && exec npx -y --offline @modelcontextprotocol/server-everything'
        return over_stdio("sh", "-c", script, "sh", str(HERE), mode="legacy")
    mode, path = {"sse": ("sse", "/sse"), "http": ("streamableHttp", "/mcp")}[transport]
    process = processes.Process(["node", str(EVERYTHING), mode], os.environ | {"PORT": "0"})
    process.line_with("Server is running on" if transport == "sse" else "Server listening on")
    port = processes.wait_until("server-everything listens", lambda: listening_port(process.pid))
    url = f"http://127.0.0.1:{port}{path}"
    if transport == "sse":
        return Upstream({"mcp_server_type": "sse", "server_url": url}, lambda: sse_client(url), "legacy", process, "Client Connected:")
    config = {"mcp_server_type": "streamable_http", "server_url": url}
    return Upstream(config, lambda: url, "legacy", process, "Session initialized with ID")


def time_server(_transport):
    return over_stdio(sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC")


def fastmcp(transport):
    script = str(HERE / "fastmcp_server.py")
    if transport == "stdio":
        return over_stdio(sys.executable, script, "stdio")
    process = processes.Process([sys.executable, script, "http"])
    url = re.sub(r"\s.*", "", process.line_with("http://127.0.0.1:"))
    return Upstream({"mcp_server_type": "streamable_http", "server_url": url}, lambda: url, process=process)


SOURCES = {
    f"{make.__name__}-{transport}": (make, transport)
    for make, transports in ((everything, ["node", "npx", "sse", "http"]), (time_server, ["stdio"]), (fastmcp, ["stdio", "http"]))
    for transport in transports
}


@pytest.fixture
def upstream(request):
    """The published server named by an indirect parameter."""
    make, transport = SOURCES[request.param]
    it = make(transport)
    yield it
    if it.process:
        it.process.stop()


class Registered:
    """A published server as Portolan knows it."""

    def __init__(self, http, portolan, upstream):
        self.http, self.portolan, self.upstream = http, portolan, upstream
        answer = http.post("/", json={"server_name": f"published-{next(NUMBERS)}", "config": upstream.config})
        assert answer.status_code == 200, answer.text
        self.server = answer.json()
        assert self.server["status"]["state"] == "ready", self.server["status"]
        self.tools = self.list()

    def list(self):
        answer = self.http.get(f"/{self.server['id']}/tools")
        assert answer.status_code == 200, answer.text
        return {tool["name"]: tool for tool in answer.json()}

    def run(self, name, args=None):
        body = {} if args is None else {"args": args}
        answer = self.http.post(f"/{self.server['id']}/tools/{self.tools[name]['id']}/run", json=body)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        return answer.json()

    def processes(self):
        return processes.descendants(self.portolan.pid)


@pytest.fixture
def registered(http, portolan, upstream):
    assert not processes.descendants(portolan.pid), "an earlier test left a process"
    it = Registered(http, portolan, upstream)
    yield it
    assert http.delete(f"/{it.server['id']}").status_code == 204
    processes.wait_until("the processes of a deleted server end", lambda: not it.processes())
