"""The MCP server behind the SDK suites, on the published `mcp` package.

    fixture_server.py stdio|sse|http --state FILE [--require "Name: value"] [--effects FILE]

`FILE` is a JSON object read at every `tools/list`: `{"hide": [names], "describe": {name: text}, "extra": {name: text}}`. A missing
file is an empty object. The server never announces a change of its list, so only a refresh can find one. With `--require`, a
request without that header is answered 401. With `--effects` there is one more tool, `work`, which adds a line to that file
before anything else, then takes its time, or dies. On sse and http the first line of stdout is the URL to connect to.
"""

import argparse
import json
import os
import socket
import sys

import anyio
import mcp_types as types
import uvicorn
from mcp.server.lowlevel import Server
from mcp.server.sse import SseServerTransport
from mcp.server.stdio import stdio_server
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount, Route

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def schema(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
TOOLS = {
    "echo": ("Says it again", schema(["message"], message=STRING)),
    "add": ("Adds two integers", schema(["a"], a=INTEGER, b={"type": "integer", "default": 2})),
    "fail": ("Always fails", schema(["message"], message=STRING)),
    "texts": ("Answers in three text blocks", schema()),
    "image": ("A text and an image", schema()),
    "structured": ("Structured content and nothing else", schema()),
    "empty": ("Nothing at all", schema()),
    "whoami": ("What the server was started with and what the request brought", schema()),
}

WORK = ("Leaves a trace, then takes its time or dies", schema(seconds={"type": "number"}, die={"type": "boolean"}))


def text(value):
    return types.TextContent(type="text", text=value)


def build(state_file, effects=None):
    offered = TOOLS | ({"work": WORK} if effects else {})

    def state():
        try:
            with open(state_file) as file:
                return json.load(file)
        except FileNotFoundError:
            return {}

    async def list_tools(_ctx, _params):
        now = state()
        tools = [
            types.Tool(name=name, description=now.get("describe", {}).get(name, description), input_schema=input_schema)
            for name, (description, input_schema) in offered.items()
            if name not in now.get("hide", [])
        ]
        tools += [
            types.Tool(name=name, description=description, input_schema=schema())
            for name, description in now.get("extra", {}).items()
        ]
        return types.ListToolsResult(tools=tools)

    async def call_tool(ctx, params):
        args = params.arguments or {}
        match params.name:
            case "echo":
                return types.CallToolResult(content=[text(args.get("message", ""))])
            case "add":
                return types.CallToolResult(content=[text(str(args["a"] + args.get("b", 2)))])
            case "fail":
                return types.CallToolResult(content=[text(f"failed: {args.get('message')}")], is_error=True)
            case "texts":
                return types.CallToolResult(content=[text("one"), text("two\nlines"), text("")])
            case "image":
                picture = types.ImageContent(type="image", data=PIXEL, mime_type="image/png")
                return types.CallToolResult(content=[text("pic:"), picture])
            case "structured":
                return types.CallToolResult(content=[], structured_content={"answer": 42, "words": ["a", "b"]})
            case "empty":
                return types.CallToolResult(content=[])
            case "whoami":
                about = {"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ), "arguments": args}
                if ctx.request is not None:
                    about["headers"] = dict(ctx.request.headers)
                return types.CallToolResult(content=[text(json.dumps(about))])
            case "work" if effects:
                with open(effects, "a") as file:
                    file.write("worked\n")
                if args.get("die"):
                    os._exit(1)
                await anyio.sleep(args.get("seconds", 0))
                return types.CallToolResult(content=[text("worked")])
        if params.name in state().get("extra", {}):
            return types.CallToolResult(content=[text(f"extra {params.name}")])
        return types.CallToolResult(content=[text(f"no tool {params.name}")], is_error=True)

    return Server("fixture", version="1.0.0", on_list_tools=list_tools, on_call_tool=call_tool)


def sse_app(server):
    sse = SseServerTransport("/messages/")

    async def connect(request):
        async with sse.connect_sse(request.scope, request.receive, request._send) as (reader, writer):
            await server.run(reader, writer, server.create_initialization_options())
        return Response()

    return Starlette(routes=[Route("/sse", connect), Mount("/messages/", app=sse.handle_post_message)])


def guard(app, required):
    """`app`, answering 401 to a request without the required header."""
    name, _, value = required.partition(":")
    wanted = (name.strip().lower().encode(), value.strip().encode())

    async def guarded(scope, receive, send):
        if scope["type"] == "http" and wanted not in scope["headers"]:
            await Response("Unauthorized", 401, {"www-authenticate": "Bearer"})(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guarded


async def serve(app, path):
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}{path}", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    await uvicorn.Server(config).serve(sockets=[listener])


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("transport", choices=["stdio", "sse", "http"])
    parser.add_argument("--state", required=True)
    parser.add_argument("--require")
    parser.add_argument("--effects")
    parser.add_argument("--note", help="ignored: something for whoami to show")
    options = parser.parse_args()
    server = build(options.state, options.effects)
    if options.transport == "stdio":
        async with stdio_server() as (reader, writer):
            await server.run(reader, writer, server.create_initialization_options())
        return
    if options.transport == "sse":
        app, path = sse_app(server), "/sse"
    else:
        app, path = server.streamable_http_app(), "/mcp"
    await serve(guard(app, options.require) if options.require else app, path)


if __name__ == "__main__":
    anyio.run(main)
