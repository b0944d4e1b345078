"""Never twice: what the SDK repeats by itself, with its default retries, reaches the tool once."""

import concurrent.futures
import itertools
import os
import signal

import pytest
from dialect import create, version
from letta_client import DefaultHttpxClient, Letta

import processes

NEWEST_ON_SQLITE = version() == "1.12.1" and not os.environ.get("PORTOLAN_DATABASE_URL")
NUMBERS = itertools.count()
# So that a client with a timeout of 2 s sees the head of a long run in time.
EARLY = {"PORTOLAN_EARLY_HEAD_AFTER": "500ms", "PORTOLAN_DRIP_EVERY": "500ms"}


class Bench:
    """A Portolan with settings of its own, before a tool that counts how often it was called."""

    def __init__(self, folder, settings):
        shared = folder / "shared"
        shared.mkdir()
        self.effects = shared / "effects"
        self.portolan = processes.Portolan(folder, settings)
        self.pool = concurrent.futures.ThreadPoolExecutor()
        args = [processes.FIXTURE, "stdio", "--state", str(shared / "state.json"), "--effects", str(self.effects)]
        with Letta(base_url=self.portolan.url, api_key="any") as client:
            self.server = create(client, f"bench-{next(NUMBERS)}", "stdio", command=processes.tools_python(), args=args)
            tools = client.mcp_servers.tools.list(self.server.id)
        self.tool_id = next(tool.id for tool in tools if tool.name == "work")

    def start(self, recorder, url=None, timeout=None, **args):
        """The run as a future; `timeout` is the SDK's own, 60 s if it is not given."""
        options = {"timeout": timeout} if timeout else {}

        def run():
            http_client = DefaultHttpxClient(event_hooks=recorder.hooks())
            with Letta(base_url=url or self.portolan.url, api_key="any", http_client=http_client, **options) as client:
                return client.mcp_servers.tools.run(self.tool_id, mcp_server_id=self.server.id, args=args)

        return self.pool.submit(run)

    def worked(self):
        return len(self.effects.read_text().splitlines()) if self.effects.exists() else 0


@pytest.fixture
def bench(tmp_path):
    benches = []

    def bench(**settings):
        folder = tmp_path / str(len(benches))
        folder.mkdir()
        benches.append(Bench(folder, settings))
        return benches[-1]

    yield bench
    for it in benches:
        it.pool.shutdown()
        if it.portolan.child.poll() is None:
            it.portolan.stop()


@pytest.fixture
def cutter():
    proxies = []

    def cutter(url):
        proxies.append(processes.Cutter(url))
        return proxies[-1]

    yield cutter
    for it in proxies:
        it.stop()


def test_a_run_longer_than_the_timeout_is_one_request(bench, recorder):
    it = bench(**EARLY)
    result = it.start(recorder, timeout=2.0, seconds=5).result()
    assert (result.status, result.func_return) == ("success", "worked")
    assert len(recorder.requests) == it.worked() == 1


# Once is enough for what takes so long.
if NEWEST_ON_SQLITE:

    def test_a_run_of_70_seconds_is_one_request_with_every_default(bench, recorder):
        it = bench()
        result = it.start(recorder, seconds=70).result()
        assert (result.status, result.func_return) == ("success", "worked")
        assert len(recorder.requests) == it.worked() == 1


def test_a_client_that_gives_up_too_early_gets_the_outcome_in_a_later_try(bench, recorder):
    it = bench()
    result = it.start(recorder, timeout=2.0, seconds=4).result()
    assert (result.status, result.func_return) == ("success", "worked")
    assert [request.headers["x-stainless-retry-count"] for request in recorder.requests][:2] == ["0", "1"]
    assert it.worked() == 1


@pytest.mark.parametrize("settings", [{}, EARLY], ids=["no head", "early head"])
def test_a_connection_that_is_cut_costs_no_second_call(bench, cutter, recorder, settings):
    it = bench(**settings)
    proxy = cutter(it.portolan.url)
    running = it.start(recorder, proxy.url, seconds=3)
    processes.wait_until("the tool works", it.worked)
    if settings:
        # The hook sees the head; the body is still to come, and is cut.
        processes.wait_until("the head is there", lambda: recorder.responses)
    proxy.cut()
    assert (running.result().status, running.result().func_return) == ("success", "worked")
    assert [request.headers["x-stainless-retry-count"] for request in recorder.requests] == ["0", "1"]
    assert it.worked() == 1


def test_a_server_that_dies_after_its_work_is_one_error(bench, recorder):
    it = bench()
    result = it.start(recorder, die=True).result()
    assert result.status == "error"
    assert "may have run" in result.func_return
    assert len(recorder.requests) == it.worked() == 1


def test_a_stop_during_a_run_is_one_result(bench, recorder):
    it = bench()
    running = it.start(recorder, seconds=3)
    processes.wait_until("the tool works", it.worked)
    it.portolan.stop()
    assert (running.result().status, running.result().func_return) == ("success", "worked")
    assert len(recorder.requests) == it.worked() == 1


@pytest.mark.parametrize("settings", [{}, EARLY], ids=["no head", "early head"])
def test_a_stop_that_cannot_wait_is_one_error(bench, recorder, settings):
    it = bench(PORTOLAN_DRAIN_TIMEOUT="2s", **settings)
    running = it.start(recorder, seconds=300)
    processes.wait_until("the tool works", it.worked)
    it.portolan.child.send_signal(signal.SIGTERM)
    result = running.result(processes.DEADLINE)
    assert result.status == "error"
    assert "stopped before the tool answered" in result.func_return
    assert len(recorder.requests) == it.worked() == 1
    assert it.portolan.child.wait(processes.DEADLINE) == 0
