"""An MCP server on standard input and output, in the standard library alone: one tool, `trace`, which adds a line to the file
that the command line names."""

import json
import sys

TOOL = {"name": "trace", "description": "Leaves a trace", "inputSchema": {"type": "object", "properties": {}}}


def answer(method, params):
    if method == "initialize":
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                "serverInfo": {"name": "trace", "version": "1"}}
    if method == "tools/list":
        return {"tools": [TOOL]}
    if method == "tools/call":
        with open(sys.argv[1], "a") as file:
            file.write("called\n")
        return {"content": [{"type": "text", "text": "traced"}]}
    return None


for line in sys.stdin:
    message = json.loads(line)
    if "id" in message:
        result = answer(message["method"], message.get("params", {}))
        said = {"result": result} if result is not None else {"error": {"code": -32601, "message": "no such method"}}
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"]} | said), flush=True)
