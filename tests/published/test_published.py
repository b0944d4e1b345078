"""Published MCP servers through Portolan's REST, held against what each server says when it is asked directly."""

import json
import os
import re
import signal

import httpx
import processes
import pytest
from conftest import SOURCES

EVERYTHING = [name for name in SOURCES if name.startswith("everything-")]
FASTMCP = [name for name in SOURCES if name.startswith("fastmcp-")]
STDIO = ["everything-node", "time_server-stdio", "fastmcp-stdio"]  # npx is a chain of processes: tested apart


def on(*names):
    return pytest.mark.parametrize("upstream", names, indirect=True)


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def rendered(result):
    """What func_return must be for a whole CallToolResult (CONTRACT row 13)."""
    blocks = result["content"]
    if blocks:
        return " ".join(block["text"] if block["type"] == "text" else compact(block) for block in blocks)
    return compact(result["structuredContent"]) if result.get("structuredContent") is not None else "Empty response from tool"


def assert_result(ran, status):
    assert ran["status"] == status, ran["func_return"]
    assert ran["func_return"] == rendered(ran["result"])
    assert bool(ran["result"].get("isError")) == (status == "error")
    assert isinstance(ran["duration_ms"], (int, float)) and not isinstance(ran["duration_ms"], bool)
    assert (ran["agent_state"], ran["stdout"], ran["stderr"], ran["sandbox_config_fingerprint"]) == (None, None, None, None)
    return ran


def without_nulls(value):
    return {key: it for key, it in value.items() if it is not None} if isinstance(value, dict) else value


def call_directly(upstream, name, args):
    async def call(client):
        return (await client.call_tool(name, args)).model_dump(mode="json", by_alias=True, exclude_none=True)

    return upstream.ask(call)


@on(*SOURCES)
def test_the_tools_are_those_of_the_server(registered, upstream):
    async def listing(client):
        tools, cursor = [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]

    direct = upstream.ask(listing)
    assert len(direct) >= 2
    assert list(registered.tools) == [tool["name"] for tool in direct]
    for tool in direct:
        ours = registered.tools[tool["name"]]
        assert ours["description"] == tool.get("description")
        definition = ours["metadata_"]["mcp"]["definition"]
        for key in ("title", "inputSchema", "outputSchema", "annotations", "icons", "_meta"):
            assert without_nulls(definition.get(key)) == without_nulls(tool.get(key)), (tool["name"], key)
        parameters = ours["json_schema"]["parameters"]
        assert set(parameters["properties"]) == set(tool["inputSchema"].get("properties", {})) | {"request_heartbeat"}
        assert set(parameters["required"]) == set(tool["inputSchema"].get("required", [])) | {"request_heartbeat"}
    assert registered.server["status"]["tool_count"] == len(direct)


@on(*SOURCES)
def test_a_refresh_finds_nothing_new(http, registered):
    answer = http.patch(f"/{registered.server['id']}/refresh")
    assert answer.status_code == 200, answer.text
    changes = answer.json()
    assert (changes["added"], changes["updated"], changes["deleted"]) == ([], [], [])
    assert {name: tool["id"] for name, tool in registered.list().items()} == {
        name: tool["id"] for name, tool in registered.tools.items()
    }


@on(*EVERYTHING)
def test_everything(registered, upstream):
    said = assert_result(registered.run("echo", {"message": "héllo\n✓"}), "success")
    assert said["func_return"] == "Echo: héllo\n✓"
    total = assert_result(registered.run("get-sum", {"a": 2, "b": 40.5, "request_heartbeat": False}), "success")
    assert total["func_return"] == "The sum of 2 and 40.5 is 42.5."

    image = assert_result(registered.run("get-tiny-image", {}), "success")
    assert [block["type"] for block in image["result"]["content"]] == ["text", "image", "text"]
    assert image["result"]["content"] == call_directly(upstream, "get-tiny-image", {})["content"]

    for kind, key in (("Text", "text"), ("Blob", "blob")):
        args = {"resourceType": kind, "resourceId": 3}
        embedded = assert_result(registered.run("get-resource-reference", args), "success")
        block = embedded["result"]["content"][1]
        assert block["type"] == "resource" and block["resource"][key]
        assert block["resource"]["uri"] == f"demo://resource/dynamic/{kind.lower()}/3"
    links = assert_result(registered.run("get-resource-links", {"count": 2}), "success")
    assert [block["type"] for block in links["result"]["content"]] == ["text", "resource_link", "resource_link"]
    noted = assert_result(registered.run("get-annotated-message", {"messageType": "error", "includeImage": True}), "success")
    assert noted["result"]["content"][0]["annotations"] == {"priority": 1, "audience": ["user", "assistant"]}

    weather = assert_result(registered.run("get-structured-content", {"location": "Chicago"}), "success")
    assert weather["result"]["structuredContent"] == {"temperature": 36, "conditions": "Light rain / drizzle", "humidity": 82}
    assert json.loads(weather["func_return"]) == weather["result"]["structuredContent"]


@on(*EVERYTHING)
def test_everything_errors_are_results(registered):
    for name, args in (
        ("get-sum", {"a": "two", "b": 40}),
        ("get-sum", {}),
        ("get-sum", None),
        ("echo", {"message": ["not", "a", "string"]}),
        ("get-resource-reference", {"resourceType": "Text", "resourceId": -1}),
        ("get-structured-content", {"location": "Atlantis"}),
    ):
        failed = assert_result(registered.run(name, args), "error")
        assert failed["func_return"]
    # An argument that the server does not know is the server's to judge: this one ignores it.
    assert registered.run("echo", {"message": "x", "unheard-of": {"deep": [1]}})["func_return"] == "Echo: x"
    # And the session has survived all of it.
    assert registered.run("echo", {"message": "still here"})["func_return"] == "Echo: still here"


@on(*EVERYTHING)
def test_everything_long_running_operation(registered):
    done = assert_result(registered.run("trigger-long-running-operation", {"duration": 1, "steps": 5}), "success")
    assert done["func_return"] == "Long running operation completed. Duration: 1 seconds, Steps: 5."
    assert 1000 <= done["duration_ms"] < 20_000


@on("everything-sse", "everything-http")
def test_one_session_serves_every_run(registered, upstream):
    before = upstream.sessions()
    assert before >= 1
    for n in range(3):
        assert registered.run("echo", {"message": f"m{n}"})["func_return"] == f"Echo: m{n}"
    assert upstream.sessions() == before


@on("everything-node", "everything-npx", "time_server-stdio", "fastmcp-stdio")
def test_one_process_serves_every_run(registered):
    name, args = next(it for it in PROBES if it[0] in registered.tools)
    assert_result(registered.run(name, args), "success")
    before = registered.processes()
    assert before
    for _ in range(3):
        assert_result(registered.run(name, args), "success")
    assert registered.processes() == before


PROBES = [("echo", {"message": "x"}), ("convert_time", {"source_timezone": "UTC", "time": "12:00", "target_timezone": "UTC"}),
          ("about", {})]


@on(*STDIO)
def test_a_killed_process_is_replaced(registered):
    name, args = next(it for it in PROBES if it[0] in registered.tools)
    assert_result(registered.run(name, args), "success")
    before = registered.processes()
    assert len(before) == 1
    (victim,) = before
    os.kill(victim, signal.SIGKILL)
    processes.wait_until("the killed process is reaped", lambda: processes.stat(victim) is None)
    assert_result(registered.run(name, args), "success")
    after = registered.processes()
    assert len(after) == 1 and after != before


@on("everything-npx")
def test_a_killed_chain_of_processes_is_replaced(registered):
    assert registered.run("echo", {"message": "x"})["func_return"] == "Echo: x"
    before = registered.processes()
    assert len(before) >= 2, "npx starts the server as a child"
    server, leader = max(before, key=before.get), min(before, key=before.get)  # the last and the first one started
    os.kill(server, signal.SIGKILL)
    # Reaped, not only ended: an ending process still holds the pipe, and what is written into that may have been read.
    processes.wait_until("npx and all below it have ended",
                         lambda: not set(before) & set(registered.processes()) and processes.stat(leader) is None)
    ran = registered.run("echo", {"message": "y"})
    if ran["status"] == "error":
        # The pipe of npx has been seen to take a call still, which nobody answered then. That is said, and not repeated.
        assert "connection was lost" in ran["func_return"], ran
        ran = registered.run("echo", {"message": "y"})
    assert ran["func_return"] == "Echo: y"
    assert not set(before) & set(registered.processes())


@on("time_server-stdio")
def test_time(registered):
    now = assert_result(registered.run("get_current_time", {"timezone": "Europe/Paris"}), "success")
    assert re.match(r"\d{4}-\d\d-\d\dT", now["result"]["structuredContent"]["datetime"])
    args = {"source_timezone": "Asia/Kolkata", "time": "16:30", "target_timezone": "UTC"}
    converted = assert_result(registered.run("convert_time", args), "success")
    assert converted["result"]["structuredContent"]["time_difference"] == "-5.5h"
    assert json.loads(converted["func_return"]) == converted["result"]["structuredContent"]
    for name, args in (
        ("get_current_time", {"timezone": "Nowhere/At_All"}),
        ("get_current_time", {"timezone": 7}),
        ("convert_time", {"time": "16:30"}),
        ("convert_time", {"source_timezone": "UTC", "time": "25:99", "target_timezone": "UTC"}),
    ):
        assert assert_result(registered.run(name, args), "error")["func_return"]


@on(*FASTMCP)
def test_fastmcp(registered, upstream):
    assert assert_result(registered.run("greet", {"name": "Ada"}), "success")["func_return"] == "Hello, Ada!"
    described = assert_result(registered.run("describe", {"place": {"city": "oslo", "population": 4}}), "success")
    assert described["result"]["structuredContent"] == {"city": "OSLO", "population": 5}
    for name in ("picture", "document"):
        ran = assert_result(registered.run(name), "success")
        assert ran["result"]["content"] == call_directly(upstream, name, {})["content"]
    assert assert_result(registered.run("slow", {"steps": 5}), "success")["func_return"] == "5 steps"
    failed = assert_result(registered.run("fail", {}), "error")
    assert failed["func_return"] == "this tool failed as it should"
    for args in ({"name": 7}, {"name": "x", "unheard-of": 1}, {"name": "x", "punctuation": "?"}, {}, None):
        assert assert_result(registered.run("greet", args), "error")["func_return"]


@on(*FASTMCP)
def test_fastmcp_speaks_the_newest_revision_it_offers(registered, upstream):
    ours = assert_result(registered.run("about", {}), "success")["result"]["structuredContent"]
    assert ours["protocol"] == call_directly(upstream, "about", {})["structuredContent"]["protocol"]
    assert ours["protocol"] >= "2026-07-28"


@on("everything-http")
def test_a_server_that_went_away_is_a_502_in_bounded_time(http, registered, upstream):
    assert registered.run("echo", {"message": "x"})["func_return"] == "Echo: x"
    upstream.process.stop()
    tool = registered.tools["echo"]["id"]
    answer = http.post(f"/{registered.server['id']}/tools/{tool}/run", json={"args": {"message": "x"}}, timeout=httpx.Timeout(30))
    # Nobody listens any more, so the call cannot have been sent (CONTRACT row 14).
    assert (answer.status_code, answer.headers.get("x-should-retry")) == (502, "false"), answer.text
    error = answer.json()["error"]
    assert error["type"] == "mcp_connection_error"
    assert error["message"] and error["detail"]
