"""Tools through the unmodified SDK: list, retrieve, run; and the asynchronous client."""

import asyncio
import json
import re

import letta_client
import pytest
from dialect import KINDS, ToolExecutionResult, create, update
from letta_client.types import Tool

TOOL_ID = re.compile(r"tool-[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
DEAD_URL = "http://127.0.0.1:1/mcp"
HEARTBEAT = (
    "Request an immediate heartbeat after function execution. You MUST set this value to `True` if you want to send a follow-up "
    "message or run a follow-up tool call (chain multiple tools together). If set to `False` (the default), then the chain of "
    "execution will end immediately after this function call."
)


@pytest.fixture(params=KINDS)
def server(request, register, start):
    return register(request.param, **start(request.param))


@pytest.fixture
def run(client, server):
    ids = {tool.name: tool.id for tool in client.mcp_servers.tools.list(server.id)}

    def run(name, **kwargs):
        result = client.mcp_servers.tools.run(ids[name], mcp_server_id=server.id, **kwargs)
        assert type(result) is ToolExecutionResult
        everything = result.to_dict()
        assert everything.keys() >= {
            "status", "func_return", "agent_state", "stdout", "stderr", "sandbox_config_fingerprint", "result", "duration_ms",
        }
        assert isinstance(everything["duration_ms"], (int, float)) and everything["duration_ms"] >= 0
        return result

    return run


def test_list_and_retrieve(client, server):
    tools = client.mcp_servers.tools.list(server.id)
    assert isinstance(tools, list) and len(tools) == 8
    for tool in tools:
        assert type(tool) is Tool
        assert TOOL_ID.fullmatch(tool.id)
        assert tool.tool_type == "external_mcp"
        assert tool.source_type == "python"
        assert tool.tags == [f"mcp:{server.server_name}"]
        assert tool.metadata["mcp"]["server_name"] == server.server_name
        assert tool.metadata["mcp"]["server_id"] == server.id
        assert tool.metadata["mcp"]["definition"]["inputSchema"]["type"] == "object"
        assert tool.json_schema["name"] == tool.name
        assert tool.json_schema["description"] == tool.description
        assert tool.return_char_limit == 50000
        assert f"def {tool.name}(**kwargs)" in tool.source_code
        assert "metadata_" in tool.to_dict()
        again = client.mcp_servers.tools.retrieve(tool.id, mcp_server_id=server.id)
        assert type(again) is Tool
        assert again.to_dict() == tool.to_dict()
    add = next(tool for tool in tools if tool.name == "add")
    assert add.description == "Adds two integers"
    assert add.json_schema["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "integer", "default": 2},
            "request_heartbeat": {"type": "boolean", "description": HEARTBEAT},
        },
        "required": ["a", "request_heartbeat"],
        "additionalProperties": False,
    }
    assert add.json_schema["mcp:SCHEMA_STATUS"] == "STRICT_COMPLIANT"
    assert add.json_schema["mcp:SCHEMA_WARNINGS"] == []


def test_a_tool_of_another_server_is_not_found(client, register, start):
    one, two = register("stdio", **start("stdio")), register("stdio", **start("stdio"))
    ones, twos = client.mcp_servers.tools.list(one.id), client.mcp_servers.tools.list(two.id)
    assert not {tool.id for tool in ones} & {tool.id for tool in twos}
    assert client.mcp_servers.tools.retrieve(ones[0].id, mcp_server_id=one.id).name == "echo"
    with pytest.raises(letta_client.NotFoundError):
        client.mcp_servers.tools.retrieve(ones[0].id, mcp_server_id=two.id)
    with pytest.raises(letta_client.NotFoundError):
        client.mcp_servers.tools.run(ones[0].id, mcp_server_id=two.id, args={"message": "x"})
    with pytest.raises(letta_client.NotFoundError):
        client.mcp_servers.tools.run("tool-nope", mcp_server_id=one.id)


def test_run_text(run):
    said = run("echo", args={"message": "grüß dich ✓"})
    assert (said.status, said.func_return) == ("success", "grüß dich ✓")
    assert (said.agent_state, said.stdout, said.stderr, said.sandbox_config_fingerprint) == (None, None, None, None)
    assert said.to_dict()["result"]["content"] == [{"type": "text", "text": "grüß dich ✓"}]
    assert run("add", args={"a": 40}).func_return == "42"
    assert run("add", args={"a": 40, "b": 3, "request_heartbeat": True}).func_return == "43"
    assert run("texts", args={}).func_return == "one two\nlines "


def test_run_without_args(run):
    result = run("whoami")
    assert result.status == "success"
    assert json.loads(result.func_return)["arguments"] == {}


def test_the_heartbeat_does_not_reach_the_tool(run):
    result = run("whoami", args={"request_heartbeat": True, "kept": [1, None, {"a": 2.5}]})
    assert json.loads(result.func_return)["arguments"] == {"kept": [1, None, {"a": 2.5}]}


def test_run_tool_error(run, recorder):
    recorder.clear()
    result = run("fail", args={"message": "why"})
    assert (result.status, result.func_return) == ("error", "failed: why")
    assert result.to_dict()["result"]["isError"] is True
    assert len(recorder.requests) == 1
    assert recorder.responses[0].status_code == 200


def test_run_image(run):
    result = run("image", args={})
    assert result.status == "success"
    words, picture = result.to_dict()["result"]["content"]
    assert words == {"type": "text", "text": "pic:"}
    assert (picture["type"], picture["mimeType"]) == ("image", "image/png")
    prefix, _, block = result.func_return.partition(" ")
    assert prefix == "pic:"
    assert json.loads(block) == picture
    assert not re.search(r'[,:]\s', block), "compact JSON"


def test_run_without_content(run):
    structured = run("structured", args={})
    assert (structured.status, structured.func_return) == ("success", '{"answer":42,"words":["a","b"]}')
    assert structured.to_dict()["result"]["structuredContent"] == {"answer": 42, "words": ["a", "b"]}
    empty = run("empty", args={})
    assert (empty.status, empty.func_return) == ("success", "Empty response from tool")
    assert empty.to_dict()["result"]["content"] == []


def test_no_session_is_a_502_in_one_request(client, register, start, recorder):
    server = register("streamable_http", **start("streamable_http"))
    echo = client.mcp_servers.tools.list(server.id)[0]
    assert client.mcp_servers.tools.run(echo.id, mcp_server_id=server.id, args={"message": "x"}).func_return == "x"
    update(client, server.id, "streamable_http", server_url=DEAD_URL)
    recorder.clear()
    with pytest.raises(letta_client.InternalServerError) as error:
        client.mcp_servers.tools.run(echo.id, mcp_server_id=server.id, args={"message": "x"})
    assert error.value.status_code == 502
    assert error.value.body["error"]["type"] == "mcp_connection_error"
    assert error.value.response.headers["x-should-retry"] == "false"
    assert len(recorder.requests) == 1, "the SDK repeated a 502"


def test_async_client(open_async_client, start, name, recorder):
    async def scenario():
        async with open_async_client() as client:
            assert (await client.health()).status == "ok"
            server = await create(client, name(), "streamable_http", **start("streamable_http"))
            assert server.id in [it.id for it in await client.mcp_servers.list()]
            assert (await client.mcp_servers.retrieve(server.id)).server_name == server.server_name
            new_name = name()
            assert (await update(client, server.id, "streamable_http", server_name=new_name)).server_name == new_name
            changes = await client.mcp_servers.refresh(server.id)
            assert changes["added"] == changes["deleted"] == changes["updated"] == []
            echo = (await client.mcp_servers.tools.list(server.id))[0]
            assert (await client.mcp_servers.tools.retrieve(echo.id, mcp_server_id=server.id)).tags == [f"mcp:{new_name}"]
            runs = [
                client.mcp_servers.tools.run(echo.id, mcp_server_id=server.id, args={"message": f"m{n}"}) for n in range(16)
            ]
            assert [it.func_return for it in await asyncio.gather(*runs)] == [f"m{n}" for n in range(16)]
            recorder.clear()
            with pytest.raises(letta_client.ConflictError):
                await create(client, new_name, "streamable_http", server_url=DEAD_URL)
            assert len(recorder.requests) == 1
            assert await client.mcp_servers.delete(server.id) is None
            with pytest.raises(letta_client.NotFoundError):
                await client.mcp_servers.delete(server.id)

    asyncio.run(scenario())
