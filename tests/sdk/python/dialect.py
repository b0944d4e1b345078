"""The two generations of the SDK behind one face: `config` bodies (1.x) and flat bodies (1.0.0a21)."""

import inspect

import letta_client
from letta_client import types
from letta_client.resources.mcp_servers.mcp_servers import McpServersResource

FLAT = "config" not in inspect.signature(McpServersResource.create).parameters
KINDS = ["stdio", "sse", "streamable_http"]

CREATE = {
    "stdio": types.CreateStdioMcpServerParam,
    "sse": types.CreateSseMcpServerParam,
    "streamable_http": types.CreateStreamableHTTPMcpServerParam,
}
UPDATE = {
    "stdio": types.UpdateStdioMcpServerParam,
    "sse": types.UpdateSseMcpServerParam,
    "streamable_http": types.UpdateStreamableHTTPMcpServerParam,
}
# The flat generation cannot tell sse from streamable_http: both classes have the same shape and the first one wins.
CLASS = {
    "stdio": types.StdioMcpServer,
    "sse": types.SseMcpServer,
    "streamable_http": types.SseMcpServer if FLAT else types.StreamableHTTPMcpServer,
}
# What the SDK's own types call required but nullable.
REQUIRED = {"stdio": ("command", "args"), "sse": ("server_url",), "streamable_http": ("server_url",)}

try:
    from letta_client.types.agents import ToolExecutionResult
except ImportError:
    from letta_client.types import ToolExecutionResult  # before 1.3.3

__all__ = ["CLASS", "FLAT", "KINDS", "ToolExecutionResult", "create", "kind_of", "update"]


def create(client, server_name, kind, **fields):
    """`mcp_servers.create` with this SDK's typed parameters; returns what it returns (a coroutine from an async client)."""
    if FLAT:
        return client.mcp_servers.create(server_name=server_name, type=kind, **fields)
    config = CREATE.get(kind, dict)(mcp_server_type=kind, **fields)
    return client.mcp_servers.create(server_name=server_name, config=config)


def update(client, server_id, kind, **fields):
    """`mcp_servers.update`: `server_name` is optional, every other field goes where this SDK wants it."""
    name = {"server_name": fields.pop("server_name")} if "server_name" in fields else {}
    if FLAT:
        if "auth_token" in fields:
            fields["token"] = fields.pop("auth_token")
        return client.mcp_servers.update(server_id, **name, **fields)
    config = UPDATE[kind](mcp_server_type=kind, **(dict.fromkeys(REQUIRED[kind]) | fields))
    return client.mcp_servers.update(server_id, config=config, **name)


def kind_of(server):
    """The discriminator that this generation reads."""
    return server.type if FLAT else server.mcp_server_type


def version():
    return letta_client.__version__
