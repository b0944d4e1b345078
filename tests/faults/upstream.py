"""An MCP server that writes down each call with the credentials that came with it, before it does anything else.

    upstream.py stdio --log FILE --list N [--mark TEXT] [--grandchild]
    upstream.py http --log FILE --port PORT

A server has one list of tools for each number: that of 7 is `v7_0`, `v7_1`, …, so that half a list, or one mixed of two, is
seen. Over HTTP the path names server and list: /KEY/list/7. A path that begins with /signed wants a token of /token, which lives
for an hour. `{"id", "ms"}` are the arguments of all tools.
"""

import argparse
import http.server
import json
import os
import sys
import threading
import time


def tools(number):
    """The names of list `number`: how many they are depends on it, too."""
    return [f"v{number}_{index}" for index in range(3 + number % 5)]


SCHEMA = {"type": "object", "properties": {"id": {"type": "string"}, "ms": {"type": "integer"}}}


class Server:
    def __init__(self, log):
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def note(self, **what):
        os.write(self.log, json.dumps({"at": time.time(), **what}).encode() + b"\n")

    def answer(self, message, key, number, token):
        """The answer to a request, or None for what has none."""
        if "id" not in message:
            return None
        params = message.get("params") or {}
        match message.get("method"):
            case "initialize":
                result = {
                    "protocolVersion": params.get("protocolVersion", "2025-06-18"), "capabilities": {"tools": {}},
                    "serverInfo": {"name": key, "version": "1"},
                }
            case "ping":
                result = {}
            case "tools/list":
                result = {"tools": [{"name": name, "description": key, "inputSchema": SCHEMA} for name in tools(number)]}
            case "tools/call":
                arguments = params.get("arguments") or {}
                name, call = params.get("name"), arguments.get("id")
                self.note(key=key, list=number, tool=name, id=call, token=token)
                time.sleep(arguments.get("ms", 0) / 1000)
                result = {"content": [{"type": "text", "text": f"{name} {call}"}]}
            case _:
                error = {"code": -32601, "message": "method not found"}
                return {"jsonrpc": "2.0", "id": message["id"], "error": error}
        return {"jsonrpc": "2.0", "id": message["id"], "result": result}


def stdio(arguments):
    if arguments.grandchild and os.fork() == 0:
        # Leaves its group and its parent, and outlives everybody who lets it.
        os.setsid()
        if os.fork() == 0:
            for fd in (0, 1, 2):
                os.close(fd)
            time.sleep(600)
        os._exit(0)
    server, lock = Server(arguments.log), threading.Lock()

    def reply(message):
        answer = server.answer(message, "stdio", arguments.list, os.environ.get("VERSION_TOKEN"))
        if answer is not None:
            with lock:
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()

    for line in sys.stdin:
        threading.Thread(target=reply, args=(json.loads(line),), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_):
        pass

    def send(self, status, body=b"", **fields):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        here = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.path.startswith("/.well-known/oauth-protected-resource"):
            path = self.path.removeprefix("/.well-known/oauth-protected-resource")
            about = {"resource": here + path, "authorization_servers": [here]}
        elif self.path.startswith("/.well-known/oauth-authorization-server"):
            about = {
                "issuer": here, "token_endpoint": f"{here}/token", "authorization_endpoint": f"{here}/authorize",
                "response_types_supported": ["code"], "grant_types_supported": ["client_credentials"],
                "code_challenge_methods_supported": ["S256"], "token_endpoint_auth_methods_supported": ["client_secret_post"],
            }
        else:
            return self.send(405)
        self.send(200, json.dumps(about).encode())

    def do_DELETE(self):
        self.send(200)

    def do_POST(self):
        held = self.server
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/token":
            with held.lock:
                held.issued += 1
                token = f"issued-{held.issued}"
                held.valid[token] = time.monotonic() + 3600
            held.mcp.note(issued=token)
            return self.send(200, json.dumps({"access_token": token, "token_type": "Bearer", "expires_in": 3600}).encode())
        token = self.headers.get("authorization")
        if self.path.startswith("/signed") and held.valid.get((token or "").removeprefix("Bearer "), 0) < time.monotonic():
            return self.send(401, www_authenticate="Bearer")
        try:
            key, number = self.path.strip("/").split("/list/")
            message = json.loads(body)
            number = int(number)
        except ValueError:
            return self.send(400)
        session = self.headers.get("mcp-session-id")
        if session and session not in held.sessions:
            # As a server answers that was started anew (MCP 2025-06-18, session management).
            return self.send(404)
        answer = held.mcp.answer(message, key, number, token)
        if answer is None:
            return self.send(202)
        fields = {}
        if message.get("method") == "initialize":
            with held.lock:
                name = f"{os.getpid()}-{len(held.sessions)}"
                held.sessions.add(name)
            fields["mcp_session_id"] = name
        self.send(200, json.dumps(answer).encode(), **fields)


class Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, *_):
        pass  # connections that are cut are what this is for


def serve(arguments):
    listener = Listener(("127.0.0.1", arguments.port), Handler)
    listener.mcp, listener.lock, listener.sessions = Server(arguments.log), threading.Lock(), set()
    listener.issued, listener.valid = 0, {}
    print(listener.server_address[1], flush=True)
    listener.serve_forever()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("stdio", "http"))
    parser.add_argument("--log", required=True)
    parser.add_argument("--list", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--mark", default="")
    parser.add_argument("--grandchild", action="store_true")
    arguments = parser.parse_args()
    (stdio if arguments.kind == "stdio" else serve)(arguments)


if __name__ == "__main__":
    main()
