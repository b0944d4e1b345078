import itertools
import json
import os
import pathlib
import sys

import pytest
from letta_client import AsyncLetta, DefaultAsyncHttpxClient, DefaultHttpxClient, Letta

import processes
from dialect import create, version


def pytest_report_header():
    return f"letta-client {version()}, database {'postgres' if os.environ.get('PORTOLAN_DATABASE_URL') else 'sqlite'}"


@pytest.fixture(scope="session")
def folder():
    with processes.new_folder() as name:
        yield pathlib.Path(name)


@pytest.fixture(scope="session")
def portolan(folder):
    server = processes.Portolan(folder)
    print(server.database, file=sys.stderr)
    yield server
    server.stop()


class Recorder:
    """What a client sent and got, one entry for each request that really went out."""

    def __init__(self):
        self.requests, self.responses = [], []

    def hooks(self):
        return {"request": [self.requests.append], "response": [self.responses.append]}

    def async_hooks(self):
        async def request(it):
            self.requests.append(it)

        async def response(it):
            self.responses.append(it)

        return {"request": [request], "response": [response]}

    def clear(self):
        self.requests.clear()
        self.responses.clear()


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def client(portolan, recorder):
    with Letta(base_url=portolan.url, api_key="any", http_client=DefaultHttpxClient(event_hooks=recorder.hooks())) as it:
        yield it


@pytest.fixture
def open_async_client(portolan, recorder):
    return lambda: AsyncLetta(
        base_url=portolan.url, api_key="any", http_client=DefaultAsyncHttpxClient(event_hooks=recorder.async_hooks())
    )


class State:
    """What the fixture server lists; written here, read by it at every tools/list."""

    def __init__(self, path):
        self.path = path

    def set(self, **state):
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(state))
        scratch.replace(self.path)


NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def shared(folder):
    """A folder that fixture servers may use: beside Portolan's own, which no command reaches, nor what lies around it."""
    it = folder / "shared"
    it.mkdir()
    return it


@pytest.fixture
def state(shared):
    """What the fixture servers list: of the shared kind, so every test begins with everything."""
    it = State(shared / "state.json")
    it.set()
    return it


@pytest.fixture(scope="session")
def upstreams(shared):
    """The upstreams over sse and http, started when first asked for and kept: a test that asks twice gets two different ones."""
    running = {}

    def upstream(kind, require, number):
        key = (kind, require, number)
        if key not in running:
            transport = "http" if kind == "streamable_http" else kind
            running[key] = processes.Upstream(transport, shared / "state.json", require)
        return running[key]

    yield upstream
    for it in running.values():
        it.stop()


@pytest.fixture
def start(state, upstreams):
    """An upstream of a kind, as the fields that tell Portolan of it; each call of one test gives another one."""
    number = itertools.count()

    def start(kind, require=None, note=None):
        if kind == "stdio":
            args = [processes.FIXTURE, "stdio", "--state", str(state.path)] + (["--note", note] if note else [])
            return {"command": processes.tools_python(), "args": args}
        return {"server_url": upstreams(kind, require, next(number)).url}

    return start


@pytest.fixture
def name():
    """A fresh server name each time it is called."""
    return lambda: f"suite-{next(NUMBERS)}"


@pytest.fixture
def register(client, name):
    """Creates a server and deletes it after the test (one that the test deleted itself answers 404 then, which is fine)."""
    made = []

    def register(kind, **fields):
        server = create(client, fields.pop("server_name", None) or name(), kind, **fields)
        made.append(server.id)
        return server

    yield register
    for server_id in made:
        if server_id in {server.id for server in client.mcp_servers.list()}:
            client.mcp_servers.delete(server_id)
