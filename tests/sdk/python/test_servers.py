"""Servers through the unmodified SDK: create, list, retrieve, update, refresh, delete."""

import json
import re

import letta_client
import pytest
from dialect import CLASS, FLAT, KINDS, create, kind_of, update

UNKNOWN = "mcp_server-00000000-0000-4000-8000-000000000000"
MASK = "********"
DEAD_URL = "http://127.0.0.1:1/mcp"  # nobody listens on port 1
SERVER_ID = re.compile(r"mcp_server-[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
NAMES = ["echo", "add", "fail", "texts", "image", "structured", "empty", "whoami"]


def tool(client, server, name):
    return next(tool for tool in client.mcp_servers.tools.list(server.id) if tool.name == name)


def whoami(client, server):
    result = client.mcp_servers.tools.run(tool(client, server, "whoami").id, mcp_server_id=server.id, args={})
    assert result.status == "success", result.func_return
    return json.loads(result.func_return)


def assert_class(server, kind):
    assert type(server) is CLASS[kind]
    assert kind_of(server) == kind
    keys = server.to_dict()
    assert keys["mcp_server_type"] == keys["type"] == kind


def test_health(client):
    health = client.health()
    assert health.status == "ok"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", health.version)


def test_health_without_an_api_key(portolan, monkeypatch):
    monkeypatch.delenv("LETTA_API_KEY", raising=False)
    # Early releases want to be told that the header is left out on purpose.
    keyless = {"extra_headers": {"Authorization": letta_client.Omit()}}
    with letta_client.Letta(base_url=portolan.url) as client:
        assert client.health(**keyless).status == "ok"
        assert isinstance(client.mcp_servers.list(**keyless), list)


@pytest.mark.parametrize("kind", KINDS)
def test_create_list_retrieve(client, register, start, name, kind, recorder):
    fields, server_name = start(kind), name()
    server = register(kind, server_name=server_name, **fields)
    assert len(recorder.requests) == 1
    assert_class(server, kind)
    assert SERVER_ID.fullmatch(server.id)
    assert server.server_name == server_name
    for key, value in fields.items():
        assert getattr(server, key) == value
    if kind == "stdio":
        assert server.env is None
    else:
        assert (server.auth_header, server.auth_token, server.custom_headers) == (None, None, None)
    status = server.to_dict()["status"]
    assert (status["state"], status["error"], status["tool_count"]) == ("ready", None, len(NAMES))
    assert {"created_at", "updated_at"} <= server.to_dict().keys()

    again = client.mcp_servers.retrieve(server.id)
    assert_class(again, kind)
    assert again.to_dict() | {"status": None} == server.to_dict() | {"status": None}

    second = register(kind, **fields)
    listed = client.mcp_servers.list()
    assert isinstance(listed, list)
    assert [it.id for it in listed][-2:] == [server.id, second.id]
    assert_class(listed[-2], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rename_keeps_ids_and_moves_tags(client, register, start, name, kind):
    server = register(kind, **start(kind))
    before = client.mcp_servers.tools.list(server.id)
    new_name = name()
    renamed = update(client, server.id, kind, server_name=new_name)
    assert_class(renamed, kind)
    assert (renamed.id, renamed.server_name) == (server.id, new_name)
    after = client.mcp_servers.tools.list(server.id)
    assert [it.id for it in after] == [it.id for it in before]
    assert all(it.tags == [f"mcp:{new_name}"] for it in after)
    assert all(it.metadata["mcp"]["server_name"] == new_name for it in after)
    # The session on the old name still works for the new one.
    assert whoami(client, renamed)


@pytest.mark.parametrize("kind", ["sse", "streamable_http"])
def test_change_of_url_moves_the_next_call(client, register, start, kind):
    first, second = start(kind), start(kind)
    server = register(kind, **first)
    assert whoami(client, server)["headers"]["host"] in first["server_url"]
    moved = update(client, server.id, kind, **second)
    assert moved.server_url == second["server_url"]
    assert whoami(client, server)["headers"]["host"] in second["server_url"]
    kept = update(client, server.id, kind, server_url=None)
    assert kept.server_url == second["server_url"]


def test_change_of_args_moves_the_next_call(client, register, start):
    server = register("stdio", env={"SUITE": "kept"}, **start("stdio", note="one argument, with  spaces"))
    before = whoami(client, server)
    assert before["argv"][-1] == "one argument, with  spaces"
    assert before["env"]["SUITE"] == "kept"
    changed = update(client, server.id, "stdio", **start("stdio", note="two"))
    assert changed.args[-1] == "two"
    assert changed.env == {"SUITE": "kept"}
    after = whoami(client, server)
    assert after["argv"][-1] == "two"
    assert after["env"]["SUITE"] == "kept"
    assert after["pid"] != before["pid"]
    cleared = update(client, server.id, "stdio", env={})
    assert cleared.args[-1] == "two"
    assert not cleared.env
    assert "SUITE" not in whoami(client, server)["env"]


@pytest.mark.parametrize("kind", ["sse", "streamable_http"])
def test_token_and_headers_are_kept_and_sent_as_given(client, register, start, kind):
    given = {"auth_header": "X-API-Key", "auth_token": "abc-1", "custom_headers": {"X-Suite": "one", "X-Other": "two"}}
    shown = given | {"auth_token": MASK, "custom_headers": dict.fromkeys(given["custom_headers"], MASK)}
    server = register(kind, **given, **start(kind))
    assert {key: getattr(server, key) for key in given} == shown
    listed = next(it for it in client.mcp_servers.list() if it.id == server.id)
    for answered in (client.mcp_servers.retrieve(server.id), listed):
        assert {key: getattr(answered, key) for key in given} == shown
    revealed = client.mcp_servers.retrieve(server.id, extra_query={"reveal": "true"})
    assert {key: getattr(revealed, key) for key in given} == given
    sent = whoami(client, server)["headers"]
    assert (sent["x-api-key"], sent["x-suite"], sent["x-other"]) == ("abc-1", "one", "two")
    assert "authorization" not in sent

    # Sending back what was answered changes nothing: a mask means what is stored.
    same = update(client, server.id, kind, auth_token=server.auth_token, custom_headers=server.custom_headers)
    assert {key: getattr(same, key) for key in given} == shown
    assert whoami(client, server)["headers"]["x-api-key"] == "abc-1"

    # null keeps, also beside a change.
    kept = update(client, server.id, kind, auth_token=None, custom_headers=None)
    assert {key: getattr(kept, key) for key in given} == shown
    changed = update(client, server.id, kind, auth_token="abc-2")
    assert (changed.auth_token, changed.auth_header) == (MASK, "X-API-Key")
    assert changed.custom_headers == shown["custom_headers"]
    assert whoami(client, server)["headers"]["x-api-key"] == "abc-2"

    # A map replaces, {} and "" clear.
    replaced = update(client, server.id, kind, custom_headers={"X-Suite": "three"})
    assert replaced.custom_headers == {"X-Suite": MASK}
    sent = whoami(client, server)["headers"]
    assert sent["x-suite"] == "three" and "x-other" not in sent
    cleared = update(client, server.id, kind, custom_headers={}, auth_token="")
    assert not cleared.custom_headers and not cleared.auth_token
    sent = whoami(client, server)["headers"]
    assert "x-suite" not in sent and "x-api-key" not in sent


@pytest.mark.parametrize("kind", ["sse", "streamable_http"])
def test_a_token_opens_a_guarded_upstream(client, register, start, kind):
    fields = start(kind, require="Authorization: Bearer right")
    wrong = register(kind, auth_header="Authorization", auth_token="Bearer wrong", **fields)
    assert wrong.to_dict()["status"]["state"] == "auth_required"
    assert client.mcp_servers.tools.list(wrong.id) == []
    update(client, wrong.id, kind, auth_token="Bearer right")
    assert client.mcp_servers.refresh(wrong.id)["added"] == NAMES
    assert whoami(client, wrong)["headers"]["authorization"] == "Bearer right"
    # A token without a header goes into Authorization, with Bearer put before it.
    bare = register(kind, auth_token="right", **fields)
    assert bare.to_dict()["status"]["state"] == "ready"
    assert whoami(client, bare)["headers"]["authorization"] == "Bearer right"


@pytest.mark.parametrize("kind", KINDS)
def test_refresh(client, register, start, state, kind):
    server = register(kind, **start(kind))
    before = {it.name: it.id for it in client.mcp_servers.tools.list(server.id)}
    assert list(before) == NAMES
    unchanged = client.mcp_servers.refresh(server.id)
    assert {key: unchanged[key] for key in ("deleted", "updated", "added")} == {"deleted": [], "updated": [], "added": []}

    state.set(hide=["fail"], describe={"echo": "Repeats"}, extra={"more": "One more", "most": "And one"})
    changes = client.mcp_servers.refresh(server.id, agent_id="agent-1")
    assert isinstance(changes, dict)
    assert changes["deleted"] == ["fail"]
    assert changes["updated"] == ["echo"]
    assert changes["added"] == ["more", "most"]
    after = {it.name: it for it in client.mcp_servers.tools.list(server.id)}
    assert list(after) == [it for it in NAMES if it != "fail"] + ["more", "most"]
    assert after["echo"].id == before["echo"] and after["add"].id == before["add"]
    assert after["echo"].description == after["echo"].json_schema["description"] == "Repeats"
    result = client.mcp_servers.tools.run(after["most"].id, mcp_server_id=server.id)
    assert (result.status, result.func_return) == ("success", "extra most")
    with pytest.raises(letta_client.NotFoundError):
        client.mcp_servers.tools.retrieve(before["fail"], mcp_server_id=server.id)
    assert client.mcp_servers.retrieve(server.id).to_dict()["status"]["tool_count"] == len(after)


@pytest.mark.parametrize("kind", KINDS)
def test_delete(client, register, start, kind):
    server = register(kind, **start(kind))
    some_tool = tool(client, server, "echo")
    other = register(kind, **start(kind))
    assert client.mcp_servers.delete(server.id) is None
    for gone in (
        lambda: client.mcp_servers.retrieve(server.id),
        lambda: client.mcp_servers.delete(server.id),
        lambda: client.mcp_servers.refresh(server.id),
        lambda: client.mcp_servers.tools.list(server.id),
        lambda: client.mcp_servers.tools.retrieve(some_tool.id, mcp_server_id=server.id),
        lambda: client.mcp_servers.tools.run(some_tool.id, mcp_server_id=server.id, args={"message": "x"}),
    ):
        with pytest.raises(letta_client.NotFoundError):
            gone()
    assert server.id not in [it.id for it in client.mcp_servers.list()]
    assert whoami(client, other), "deleting one server left the other alone"


@pytest.mark.parametrize("server_id", [UNKNOWN, "mcp_server-nope", "nope"])
def test_unknown_ids_are_not_found_in_one_request(client, recorder, server_id):
    for call in (
        lambda: client.mcp_servers.retrieve(server_id),
        lambda: client.mcp_servers.delete(server_id),
        lambda: client.mcp_servers.refresh(server_id),
        lambda: update(client, server_id, "stdio", server_name="x"),
        lambda: client.mcp_servers.tools.list(server_id),
        lambda: client.mcp_servers.tools.retrieve("tool-nope", mcp_server_id=server_id),
        lambda: client.mcp_servers.tools.run("tool-nope", mcp_server_id=server_id),
    ):
        recorder.clear()
        with pytest.raises(letta_client.NotFoundError) as error:
            call()
        assert error.value.body["detail"]
        assert len(recorder.requests) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_taken_name_conflicts_in_one_request(client, register, start, recorder, kind):
    fields = start(kind)
    first, second = register(kind, **fields), register(kind, **fields)
    for call in (
        lambda: create(client, first.server_name, kind, **fields),
        lambda: update(client, second.id, kind, server_name=first.server_name),
    ):
        recorder.clear()
        with pytest.raises(letta_client.ConflictError) as error:
            call()
        assert error.value.status_code == 409
        assert error.value.response.headers["x-should-retry"] == "false"
        assert len(recorder.requests) == 1, "the SDK repeated a 409"
    # Nothing was lost or renamed.
    names = {it.id: it.server_name for it in client.mcp_servers.list()}
    assert names[first.id] == first.server_name
    assert names[second.id] == second.server_name
    assert whoami(client, first) and whoami(client, second)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/mcp", "not a url", ""])
@pytest.mark.parametrize("kind", ["sse", "streamable_http"])
def test_a_bad_url_is_unprocessable(client, register, start, recorder, name, kind, url):
    with pytest.raises(letta_client.UnprocessableEntityError) as error:
        create(client, name(), kind, server_url=url)
    assert error.value.status_code == 422
    assert len(recorder.requests) == 1
    server = register(kind, **start(kind))
    with pytest.raises(letta_client.UnprocessableEntityError):
        update(client, server.id, kind, server_url=url or "nope")
    assert client.mcp_servers.retrieve(server.id).server_url == server.server_url


def test_an_unknown_type_is_unprocessable(client, name):
    server_name = name()
    with pytest.raises(letta_client.UnprocessableEntityError) as error:
        create(client, server_name, "websocket", server_url=DEAD_URL)
    assert error.value.body["detail"]
    assert server_name not in [it.server_name for it in client.mcp_servers.list()]


@pytest.mark.parametrize("server_name", ["", "   ", "a\nb", "n" * 256])
def test_a_bad_name_is_unprocessable(client, register, server_name):
    with pytest.raises(letta_client.UnprocessableEntityError):
        create(client, server_name, "streamable_http", server_url=DEAD_URL)
    assert register("streamable_http", server_name="n" * 255, server_url=DEAD_URL).server_name == "n" * 255


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("stdio", {"command": "/nonexistent/command", "args": []}),
        ("stdio", {"command": "false", "args": []}),
        ("sse", {"server_url": "http://127.0.0.1:1/sse"}),
        ("streamable_http", {"server_url": DEAD_URL}),
    ],
)
def test_a_dead_upstream_is_still_stored(client, register, recorder, kind, fields):
    server = register(kind, **fields)
    assert len(recorder.requests) == 1
    assert_class(server, kind)
    status = server.to_dict()["status"]
    assert status["state"] == "unreachable"
    assert status["error"]
    assert status["tool_count"] == 0
    assert client.mcp_servers.tools.list(server.id) == []
    recorder.clear()
    with pytest.raises(letta_client.NotFoundError) as error:
        client.mcp_servers.refresh(server.id)
    assert error.value.body["detail"]["code"] == "MCPServerUnavailable"
    assert len(recorder.requests) == 1


def test_a_dead_upstream_that_comes_to_life(client, register, start):
    server = register("streamable_http", server_url=DEAD_URL)
    update(client, server.id, "streamable_http", **start("streamable_http"))
    assert client.mcp_servers.refresh(server.id)["added"] == NAMES
    assert client.mcp_servers.retrieve(server.id).to_dict()["status"]["state"] == "ready"


if FLAT:

    @pytest.mark.parametrize("missing", ["sse", "stdio"])
    def test_flat_bodies_without_a_type(client, start, name, missing):
        """The type is optional in the flat generation: a command means stdio, a URL means sse."""
        server = client.mcp_servers.create(server_name=name(), **start(missing))
        assert kind_of(server) == missing
        assert server.to_dict()["status"]["state"] == "ready"
        client.mcp_servers.delete(server.id)

    def test_flat_update_takes_auth_token_too(client, register, start):
        server = register("streamable_http", auth_header="X-API-Key", auth_token="one", **start("streamable_http"))
        client.mcp_servers.update(server.id, auth_token="two")
        assert whoami(client, server)["headers"]["x-api-key"] == "two"
else:

    @pytest.mark.parametrize("missing", ["streamable_http", "stdio"])
    def test_config_without_a_type(client, start, name, missing):
        """The SDK's types make the discriminator optional: a command means stdio, a URL means streamable_http."""
        server = client.mcp_servers.create(server_name=name(), config=start(missing))
        assert_class(server, missing)
        assert server.to_dict()["status"]["state"] == "ready"
        client.mcp_servers.delete(server.id)

    def test_update_can_switch_the_type(client, register, start):
        server = register("streamable_http", **start("streamable_http"))
        switched = update(client, server.id, "stdio", **start("stdio"))
        assert_class(switched, "stdio")
        assert whoami(client, switched)["argv"][0] == "stdio"
        with pytest.raises(letta_client.UnprocessableEntityError):
            client.mcp_servers.update(server.id, config={"mcp_server_type": "sse", "server_url": None})
