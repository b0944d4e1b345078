"""Tokens through the unmodified SDK: its `api_key` is the token, and its errors are the ones for that."""

import os
import subprocess

import letta_client
import pytest
from dialect import create
from letta_client import DefaultHttpxClient, Letta

import processes

ADMIN = "admin-0123456789abcdef"


@pytest.fixture
def guarded(tmp_path):
    """A Portolan with an admin token and, in a file, one that may run."""
    tokens = tmp_path / "tokens"
    new = [os.environ["PORTOLAN_BIN"], "token", "new", "suite", "--scope", "run", "--file", str(tokens)]
    runner = subprocess.run(new, check=True, capture_output=True, text=True).stdout.strip()
    portolan = processes.Portolan(tmp_path, {"PORTOLAN_TOKENS_FILE": str(tokens), "LETTA_SERVER_PASSWORD": ADMIN})
    yield portolan, runner
    portolan.stop()


def test_the_api_key_is_the_token(guarded, start, name, recorder):
    portolan, runner = guarded

    def client(token):
        return Letta(base_url=portolan.url, api_key=token, http_client=DefaultHttpxClient(event_hooks=recorder.hooks()))

    with client(ADMIN) as admin, client(runner) as may_run, client("wrong") as stranger:
        fields = start("stdio")
        server = create(admin, name(), "stdio", **fields)
        try:
            echo = next(tool for tool in may_run.mcp_servers.tools.list(server.id) if tool.name == "echo")
            result = may_run.mcp_servers.tools.run(echo.id, mcp_server_id=server.id, args={"message": "hello"})
            assert (result.status, result.func_return) == ("success", "hello")
            with pytest.raises(letta_client.PermissionDeniedError):
                create(may_run, name(), "stdio", **fields)
            assert stranger.health().status == "ok"
            recorder.clear()
            for call in (lambda: stranger.mcp_servers.list(), lambda: create(stranger, name(), "stdio", **fields)):
                with pytest.raises(letta_client.AuthenticationError) as refused:
                    call()
                assert refused.value.status_code == 401
                assert refused.value.body["detail"] == "Unauthorized"
            assert len(recorder.requests) == 2
            # A guesser is told to stop, and the SDK does not go on by itself.
            refusals = []
            for _ in range(30):
                with pytest.raises(letta_client.APIStatusError) as refused:
                    stranger.mcp_servers.list()
                refusals.append(type(refused.value))
            assert set(refusals) == {letta_client.AuthenticationError, letta_client.RateLimitError}
            assert len(recorder.requests) == 32
        finally:
            admin.mcp_servers.delete(server.id)
