"""The configuration of the proxy, with a real HAProxy: what becomes of requests when a replica dies before or after it was sent one."""

import contextlib
import http.client
import http.server
import json
import shutil
import socket
import subprocess
import threading

from plain import DEADLINE, wait_for

CONFIGURATION = "deploy/haproxy/haproxy.cfg"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def configured(root, folder, port, replicas):
    """The configuration with an address of this machine in place of :8080, and these ports in place of a name that none has here."""
    text = (root / CONFIGURATION).read_text()
    servers = "".join(f"    server replica{number} 127.0.0.1:{port}\n" for number, port in enumerate(replicas))
    for old, new in (("    bind :8080\n", f"    bind 127.0.0.1:{port}\n"), ("    server-template replica 8 portolan:8283\n", servers)):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "haproxy.cfg"
    file.write_text(text)
    return file


class Proxy:
    """HAProxy in front of what listens on these ports of this machine, which are waited for unless they are `dead`."""

    def __init__(self, root, folder, replicas, dead=()):
        self.port = free_port()
        file = configured(root, folder, self.port, [*replicas, *dead])
        self.log = folder / "haproxy.log"
        nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*nobody, shutil.which("haproxy"), "-db", "-f", file], stdout=log, stderr=log)
        wait_for(self.takes_connections, "HAProxy does not listen", self.log.read_text)

    def takes_connections(self):
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True

    def ask(self, method, path, body=None, headers=None):
        """Status, headers and text of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        connection.request(method, path, json.dumps(body) if body is not None else None, {"content-type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


class Replica(http.server.ThreadingHTTPServer):
    """Stands for a Portolan: notes what it is asked, and answers as `answers` does, or not at all when that is None."""

    daemon_threads = True

    def __init__(self, answers):
        self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                if self.path == "/v1/health":
                    return self.whole(200)
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.server.asked.append((self.command, self.path, dict(self.headers)))
                if answers is None:
                    self.lost()
                else:
                    answers(self)

            def lost(self):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def whole(self, status, headers=(), body=b"{}"):
                self.send_response(status)
                for name, value in [*headers, ("content-length", str(len(body)))]:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

            do_GET = do_POST = do_DELETE = do_PATCH = answer

        super().__init__(("127.0.0.1", 0), Handler)
        # Checks of HAProxy end with a reset.
        self.handle_error = lambda *_: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self):
        return self.server_address[1]

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def haproxy_reads_its_configuration(root, folder):
    done = subprocess.run(["haproxy", "-c", "-f", root / CONFIGURATION], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = folder / "haproxy.cfg"
    wrong.write_text((root / CONFIGURATION).read_text().replace("retry-on conn-failure", "retry-on whatever"))
    assert subprocess.run(["haproxy", "-c", "-f", wrong], capture_output=True).returncode != 0, "it finds nothing in what is wrong"
    return subprocess.run(["haproxy", "-v"], capture_output=True, text=True).stdout.split(" 20")[0]


def a_request_that_was_sent_is_never_sent_again(root, folder):
    with Replica(None) as one, Replica(None) as other, Proxy(root, folder, [one.port, other.port]) as proxy:
        for number, method in enumerate(("POST", "PATCH", "DELETE", "GET"), 1):
            status, headers, text = proxy.ask(method, "/v1/mcp-servers/x/tools/y/run", None if method == "GET" else {})
            assert status == 502 and "detail" in json.loads(text), (status, text)
            assert len(one.asked) + len(other.asked) == number, f"{method}: {one.asked} {other.asked}"
            # A letta-client repeats a 502 by itself, unless it is told not to; reading again does no harm.
            assert headers["x-should-retry"] == (None if method == "GET" else "false"), f"{method}: {headers}"


def a_lost_answer_is_said_on_a_client_that_asked_before(root, folder):
    """SDKs keep their connections. HAProxy says nothing of a lost answer to any but the first request of one, and they repeat that."""
    answers = lambda handler: handler.whole(200) if handler.command == "GET" else handler.lost()
    with Replica(answers) as one, Replica(answers) as other, Proxy(root, folder, [one.port, other.port]) as proxy:
        # It opens another connection when the proxy says that it closes this one.
        client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=DEADLINE)
        for _ in range(3):
            for method in ("GET", "POST", "DELETE"):
                client.request(method, "/v1/mcp-servers/x/tools/y/run", None if method == "GET" else "{}")
                answer = client.getresponse()
                body = json.loads(answer.read())
                if method == "GET":
                    assert answer.status == 200, (answer.status, body)
                    continue
                assert (answer.status, answer.headers["x-should-retry"]) == (502, "false"), (method, answer.status, body)
                # The fields of Portolan's own errors, and an id that its log has.
                assert set(body) == {"detail", "code", "request_id"} and body["code"] == "connection_lost", body
                wait_for(lambda: body["request_id"] in proxy.log.read_text(), "the log does not have the id")
        client.close()
        assert len(one.asked) + len(other.asked) == 9, (one.asked, other.asked)


def a_request_that_could_not_be_sent_goes_to_another_replica_once(root, folder):
    answers = lambda handler: handler.whole(200)
    with Replica(answers) as alive, Proxy(root, folder, [alive.port], dead=[free_port()]) as proxy:
        for number in range(1, 9):
            assert proxy.ask("POST", "/v1/mcp-servers/", {})[0] == 200
            assert len(alive.asked) == number
    with Proxy(root, folder, [], dead=[free_port(), free_port()]) as proxy:
        status, headers, text = proxy.ask("POST", "/v1/mcp-servers/", {})
        assert status == 503 and headers["retry-after"] and "detail" in json.loads(text), (status, headers, text)
        # Nothing was done.
        assert headers["x-should-retry"] is None


def what_portolan_says_passes_as_it_is(root, folder):
    def answers(handler):
        handler.whole(502, [("x-request-id", "r"), ("x-of-portolan", "yes")], b'{"code":"mcp_connection_error"}')

    with Replica(answers) as one, Proxy(root, folder, [one.port]) as proxy:
        sent = {"host": "portolan.example.com", "authorization": "Bearer t", "x-large": "x" * 30_000}
        status, headers, text = proxy.ask("POST", "/v1/tools/mcp/oauth/callback?code=a-secret-code", {}, sent)
        assert (status, json.loads(text)["code"], headers["x-of-portolan"]) == (502, "mcp_connection_error", "yes")
        assert headers["x-should-retry"] is None, "it says that by itself"
        [(_, path, got)] = one.asked
        assert path.endswith("?code=a-secret-code")
        got = {name.lower(): value for name, value in got.items()}
        assert all(got[name] == value for name, value in sent.items()) and got["x-forwarded-for"] == "127.0.0.1", got
        log = wait_for(lambda: "/callback" in proxy.log.read_text() and proxy.log.read_text(), "there is no line of it")
        assert "a-secret-code" not in log and "Bearer" not in log, log


def events_are_not_held_back(root, folder):
    seen = threading.Event()

    def answers(handler):
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"6\r\none\n\n\n\r\n")
        handler.wfile.flush()
        # The second one is not sent before the first has arrived.
        last = b"two" if seen.wait(DEADLINE) else b"bad"
        handler.wfile.write(b"3\r\n" + last + b"\r\n0\r\n\r\n")

    with Replica(answers) as one, Proxy(root, folder, [one.port]) as proxy:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=DEADLINE)
        connection.request("GET", "/v1/mcp-servers/connect/x")
        answer = connection.getresponse()
        assert answer.read(6) == b"one\n\n\n"
        seen.set()
        assert answer.read() == b"two"
        connection.close()


TESTS = [
    haproxy_reads_its_configuration,
    a_request_that_was_sent_is_never_sent_again,
    a_lost_answer_is_said_on_a_client_that_asked_before,
    a_request_that_could_not_be_sent_goes_to_another_replica_once,
    what_portolan_says_passes_as_it_is,
    events_are_not_held_back,
]
