import itertools
import json
import os
import pathlib
import sys

import pytest

import processes
from dialect import Client, StatusError, version


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


@pytest.fixture
def requests():
    """Each request that really went out."""
    return []


@pytest.fixture
def client(portolan, requests):
    client = Client(portolan.url, {"request": [requests.append]})
    yield client
    for name in list(client.list()):
        client.delete(processes.quoted(name))


@pytest.fixture
def refused(requests):
    """Asserts that a call is refused with this status, at the cost of one request, and returns the error."""

    def refused(status, call):
        requests.clear()
        with pytest.raises(StatusError) as error:
            call()
        assert error.value.status_code == status, error.value
        assert len(requests) == 1, "the SDK repeated it"
        return error.value

    return refused


@pytest.fixture(scope="session")
def shared(folder):
    """A folder that fixture servers may use: beside Portolan's own, which no command reaches."""
    it = folder / "shared"
    it.mkdir()
    return it


@pytest.fixture
def list_as(shared):
    """Says what the fixture servers list from now on: of the shared kind, so every test begins with everything."""

    def list_as(**state):
        scratch = shared / "state.new"
        scratch.write_text(json.dumps(state))
        scratch.replace(shared / "state.json")

    list_as()
    return list_as


@pytest.fixture
def start(shared, list_as):
    """An upstream of a kind, as the fields that tell Portolan of it; each call gives another one."""
    running, numbers = [], itertools.count()

    def start(kind, require=None):
        state = shared / "state.json"
        if kind == "stdio":
            note = f"--note={next(numbers)}"
            return {"command": processes.tools_python(), "args": [processes.FIXTURE, "stdio", "--state", str(state), note]}
        running.append(processes.Upstream("http" if kind == "streamable_http" else kind, state, require))
        return {"server_url": running[-1].url}

    yield start
    for upstream in running:
        upstream.stop()
