"""The unmodified SDKs of before 1.0, doing all they can about MCP, against a live Portolan."""

import json

import pytest

from dialect import FERN, KINDS
from processes import quoted

NAMES = ["echo", "add", "fail", "texts", "image", "structured", "empty", "whoami"]
MASK = "********"
DEAD_URL = "http://127.0.0.1:1/mcp"  # nobody listens on port 1


def names(servers):
    return [it.server_name for it in servers]


def assert_config(config, kind, server_name, fields):
    """A configuration of the kind, as the SDK parsed it."""
    assert (config.type, config.server_name) == (kind, server_name)
    for key, value in fields.items():
        assert getattr(config, key) == value
    if kind == "stdio":
        assert type(config).__name__ == "StdioServerConfig"
        assert config.env is None
    else:
        assert (config.auth_header, config.auth_token, config.custom_headers) == (None, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_add_list_update_delete(client, start, refused, kind):
    fields, other = start(kind), start(kind)
    assert client.list() == {}
    added = client.add(kind, server_name="one", **fields)
    assert isinstance(added, list) and names(added) == ["one"]
    assert_config(added[0], kind, "one", fields)
    assert names(client.add(kind, server_name="two words / ü", **other)) == ["one", "two words / ü"]
    listed = client.list()
    assert list(listed) == ["one", "two words / ü"]
    assert_config(listed["one"], kind, "one", fields)

    change = {"stdio_config": {"server_name": "one", **other}} if kind == "stdio" else other
    changed = client.update("one", kind, **change)
    assert_config(changed, kind, "one", other)
    assert [it.name for it in client.tools("one")] == NAMES

    left = client.delete("one")
    assert isinstance(left, list) and names(left) == ["two words / ü"]
    refused(404, lambda: client.delete("one"))
    refused(404, lambda: client.update("one", kind, **change))
    refused(404, lambda: client.tools("one"))
    refused(404, lambda: client.add_tool("one", "echo"))
    assert client.delete(quoted("two words / ü")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_live_tools_and_add_tool(client, start, list_as, refused, kind):
    client.add(kind, server_name="s", **start(kind))
    tools = client.tools("s")
    assert [it.name for it in tools] == NAMES
    echo, whoami = tools[0], tools[-1]
    assert echo.description == "Says it again"
    assert echo.input_schema["required"] == ["message"] and echo.input_schema["additionalProperties"] is False
    assert (echo.health.status, echo.health.reasons) == ("STRICT_COMPLIANT", [])
    assert whoami.health.status == "STRICT_COMPLIANT"
    tool = client.add_tool("s", "echo")
    assert tool.id.startswith("tool-") and (tool.name, tool.tags) == ("echo", ["mcp:s"])
    assert tool.json_schema["parameters"]["properties"]["message"] == {"type": "string"}
    assert client.add_tool("s", "echo").id == tool.id

    # The list is that of now, and a new tool can be added at once.
    list_as(hide=["fail"], extra={"more": "One more"})
    assert [it.name for it in client.tools("s")] == [it for it in NAMES if it != "fail"] + ["more"]
    assert client.add_tool("s", "more").description == "One more"
    assert client.add_tool("s", "echo").id == tool.id
    refused(404, lambda: client.add_tool("s", "nope"))


@pytest.mark.parametrize("kind", KINDS)
def test_test_registers_nothing(client, start, refused, kind):
    fields = start(kind)
    tried = client.test(kind, server_name="s", **fields)
    assert tried["status"] == "success"
    assert [it["name"] for it in tried["tools"]] == NAMES
    assert client.list() == {}
    # Also for the name of one that is there.
    client.add(kind, server_name="s", **fields)
    assert client.test(kind, server_name="s", **fields)["status"] == "success"
    away = {"command": "/nonexistent", "args": []} if kind == "stdio" else {"server_url": DEAD_URL}
    error = refused(502, lambda: client.test(kind, server_name="t", **away))
    assert error.body["error"]["type"] == "mcp_connection_error"
    assert list(client.list()) == ["s"]


@pytest.mark.parametrize("kind", ["sse", "streamable_http"])
def test_secrets_are_masked_kept_and_sent(client, start, refused, kind):
    fields = start(kind, require="X-Suite: one")
    given = {"auth_header": "X-Key", "auth_token": "abc", "custom_headers": {"X-Suite": "one"}}
    shown = given | {"auth_token": MASK, "custom_headers": {"X-Suite": MASK}}
    added = client.add(kind, server_name="s", **given, **fields)[0]
    assert {key: getattr(added, key) for key in given} == shown
    assert [it.name for it in client.tools("s")] == NAMES
    token = "token" if kind == "sse" else "auth_token"
    changed = client.update("s", kind, **{token: "def"})
    assert {key: getattr(changed, key) for key in given} == shown
    assert [it.name for it in client.tools("s")] == NAMES, "the headers are kept"
    # An explicit null clears them, and the server does not let Portolan in any more.
    cleared = client.update("s", kind, custom_headers=None)
    assert (cleared.custom_headers, cleared.auth_token) == (None, MASK)
    refused(502, lambda: client.tools("s"))


def test_what_is_taken_or_wrong_is_one_error(client, refused):
    client.add("sse", server_name="s", server_url=DEAD_URL)
    assert refused(409, lambda: client.add("sse", server_name="s", server_url=DEAD_URL)).body["code"] == "name_taken"
    error = refused(422, lambda: client.add("sse", server_name="t", server_url="ftp://x"))
    assert error.body.detail if FERN else error.body["detail"]
    refused(422, lambda: client.update("s", "sse", server_url="nope"))
    assert list(client.list()) == ["s"]


if FERN:

    def test_the_flow_of_lettas_command_line(client, start):
        """Connect first, list what is there, then add tools one by one."""
        from letta_client import types

        fields = start("streamable_http")
        config = types.StreamableHttpServerConfig(server_name="s", type="streamable_http", **fields)
        events = [(it.event, it) for it in client.sdk.tools.connect_mcp_server(request=config)]
        assert [event for event, _ in events] == ["connection_attempt", "success"]
        # This SDK says it is one tool.
        assert [it["name"] for it in events[1][1].dict()["tools"]] == NAMES
        assert client.list() == {}, "nothing is registered by that"
        client.add("streamable_http", server_name="s", **fields)
        added = [client.add_tool("s", it.name) for it in client.tools("s")]
        assert [it.name for it in added] == NAMES
        assert len({it.id for it in added}) == len(NAMES)

    def test_a_connect_to_nobody_is_an_error_event(client):
        from letta_client import types

        config = types.SseServerConfig(server_name="s", server_url=DEAD_URL)
        events = list(client.sdk.tools.connect_mcp_server(request=config))
        assert [it.event for it in events] == ["connection_attempt", "error"]
        assert "refused" in events[1].message
else:

    @pytest.mark.parametrize("kind", KINDS)
    def test_execute_and_resync(client, start, list_as, refused, kind):
        client.add(kind, server_name="s", **start(kind))
        assert client.execute("s", "add", a=1) == {"result": "3", "success": True}
        assert client.execute("s", "texts") == {"result": "one two\nlines ", "success": True}
        assert client.execute("s", "fail", message="m") == {"result": "failed: m", "success": False}
        assert json.loads(client.execute("s", "whoami", x=1)["result"])["arguments"] == {"x": 1}
        refused(404, lambda: client.execute("s", "nope"))
        list_as(hide=["fail"], describe={"echo": "Repeats"}, extra={"more": "One more"})
        changes = client.resync("s", agent_id="agent-1")
        assert (changes["deleted"], changes["updated"], changes["added"]) == (["fail"], ["echo"], ["more"])
        assert client.execute("s", "more") == {"result": "extra more", "success": True}
        refused(404, lambda: client.resync("nope"))

    def test_a_server_that_is_away_is_one_error(client, refused):
        client.add("streamable_http", server_name="s", server_url=DEAD_URL)
        assert refused(502, lambda: client.execute("s", "echo")).body["error"]["type"] == "mcp_connection_error"
        assert refused(404, lambda: client.resync("s")).body["detail"]["code"] == "MCPServerUnavailable"
