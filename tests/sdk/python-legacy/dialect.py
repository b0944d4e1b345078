"""The two SDKs that name servers behind one face: letta-client 0.1.324 (made by Fern) and 1.0.0a6 (module `letta_sdk`)."""

import httpx

try:
    import letta_client
    from letta_client import types
    from letta_client.core.api_error import ApiError as StatusError

    FERN = True
except ImportError:
    import letta_sdk
    from letta_sdk import APIStatusError as StatusError

    FERN = False

KINDS = ["stdio", "sse", "streamable_http"]

__all__ = ["Client", "FERN", "KINDS", "StatusError"]


def version():
    return "0.1.324" if FERN else letta_sdk.__version__


def given(fields):
    """Without what an SDK's caller would leave out."""
    return {key: value for key, value in fields.items() if value is not ...}


class Client:
    """Every MCP call of the SDK at hand, by the names of the older one. Keyword arguments are fields of the body."""

    def __init__(self, base_url, hooks):
        if FERN:
            http = httpx.Client(event_hooks=hooks, timeout=60, follow_redirects=True)
            self.sdk = letta_client.Letta(base_url=base_url, token="any", httpx_client=http)
        else:
            http = letta_sdk.DefaultHttpxClient(event_hooks=hooks)
            self.sdk = letta_sdk.LettaSDK(base_url=base_url, api_key="any", http_client=http)
            self.servers = self.sdk.tools.mcp.servers

    @staticmethod
    def _config(kind, fields):
        known = {
            "stdio": "StdioServerConfig",
            "sse": "SseServerConfig",
            "streamable_http": "StreamableHttpServerConfig",
        }
        return getattr(types, known[kind])(type=kind, **fields)

    def list(self):
        return self.sdk.tools.list_mcp_servers() if FERN else self.servers.list()

    def add(self, kind, **fields):
        if FERN:
            return self.sdk.tools.add_mcp_server(request=self._config(kind, fields))
        return self.servers.add(type=kind, **fields)

    def update(self, name, kind, **fields):
        if not FERN:
            return self.servers.update(name, **fields)
        known = {
            "stdio": "UpdateStdioMcpServer",
            "sse": "UpdateSsemcpServer",
            "streamable_http": "UpdateStreamableHttpmcpServer",
        }
        if "stdio_config" in fields:
            fields["stdio_config"] = types.StdioServerConfig(**fields["stdio_config"])
        return self.sdk.tools.update_mcp_server(name, request=getattr(types, known[kind])(**fields))

    def delete(self, name):
        return self.sdk.tools.delete_mcp_server(name) if FERN else self.servers.delete(name)

    def tools(self, name):
        return self.sdk.tools.list_mcp_tools_by_server(name) if FERN else self.servers.tools.list(name)

    def add_tool(self, name, tool):
        if FERN:
            return self.sdk.tools.add_mcp_tool(name, tool)
        return self.servers.register_tool(tool, mcp_server_name=name)

    def test(self, kind, **fields):
        if FERN:
            return self.sdk.tools.test_mcp_server(request=self._config(kind, fields))
        return self.servers.test(type=kind, **fields)

    def resync(self, name, **query):
        return self.servers.resync(name, **query)

    def execute(self, name, tool, **args):
        return self.servers.tools.execute(tool, mcp_server_name=name, args=args)
