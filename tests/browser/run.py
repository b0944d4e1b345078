"""A real browser against an open Portolan on loopback: pages of other origins try everything that a page can do to register a
server or to run a tool, and nothing comes of it; the same page, listed, succeeds. Standard library only.

Environment, set by `tests/run`: PORTOLAN_BIN the binary; CHROMIUM the browser.
"""

import http.server
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))

from processes import Cutter, Portolan, Process, new_folder, wait_until  # noqa: E402

# How long all attempts of a page may take.
PATIENCE = 120.0

# What a page tries without a look at the answer, and what its requests are. "beacon json", the JSON of a page that did not
# ask, gets no further than its preflight, and so do all that set a header or a method.
MUST_BE_SEEN = {
    ("POST", "create"): 9,  # fetch text, no-cors (3), xhr text, beacon, forms (3); the sandbox is one more
    ("POST", "run"): 4,
    ("OPTIONS", "create"): 2,
    ("OPTIONS", "refresh"): 1,
    ("OPTIONS", "delete"): 1,
    ("GET", "create"): 6,
}


class Pages(http.server.ThreadingHTTPServer):
    """Serves the page, and takes what it reports."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = self.server_address[1]
        self.settings = {}
        self.reports = queue.Queue()
        self.on_switch = lambda: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("cache-control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/sent-back":
            # As an authorization server does at the end of its own page.
            to = json.dumps(self.server.settings["back"])
            return self.answer(f"<!doctype html><script>location.href = {to}</script>".encode(), "text/html")
        if self.path != "/":
            return self.send_error(404)
        page = (HERE / "page.html").read_text().replace("/*settings*/", json.dumps(self.server.settings))
        self.answer(page.encode(), "text/html; charset=utf-8")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/switch":
            self.server.on_switch()
        elif self.path == "/report":
            self.server.reports.put(json.loads(body))
        self.answer(b"", "text/plain")


class Switch(Cutter):
    """One address that leads to the page first and to Portolan then, as a rebound name does."""

    def to(self, url):
        host, _, port = url.removeprefix("http://").partition(":")
        self._target = host, int(port)
        # Also what the browser has opened in advance.
        self.cut()


def browser(*arguments):
    """The command line of a browser with a profile of its own."""
    profile = tempfile.TemporaryDirectory(prefix="portolan-browser-", ignore_cleanup_errors=True)
    argv = [
        os.environ["CHROMIUM"], "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={profile.name}", *arguments,
    ]
    return argv, profile


def visit(pages, url, settings, *arguments):
    """Opens the page at `url` and returns what it reports."""
    pages.settings = {"report": f"http://127.0.0.1:{pages.port}/report", "own": None} | settings
    argv, profile = browser(*arguments, "--remote-debugging-port=0", url)
    with profile:
        process = Process(argv)
        try:
            return pages.reports.get(timeout=PATIENCE)
        except queue.Empty:
            raise AssertionError("the page reports nothing; the browser says:\n" + "\n".join(process.lines[-20:])) from None
        finally:
            process.stop()


def dump(url, *arguments):
    """The text of what the browser shows at `url`."""
    argv, profile = browser(*arguments, "--dump-dom", url)
    with profile:
        return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


def ask(url, body=None):
    request = urllib.request.Request(url, method="POST" if body else "GET", headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, json.dumps(body).encode() if body else None, timeout=30) as answer:
        return json.load(answer)


class Target:
    """An open Portolan with one server, whose tool leaves a trace of each run."""

    def __init__(self, **env):
        self.folder = new_folder()
        # A command adds nothing to a folder above Portolan's own.
        traces = pathlib.Path(self.folder.name) / "traces"
        traces.mkdir()
        self.trace = traces / "trace"
        self.portolan = Portolan(self.folder.name, {"PORTOLAN_LOG": "portolan=debug"} | env)
        self.url = self.portolan.url
        config = {"mcp_server_type": "stdio", "command": sys.executable, "args": [str(HERE / "server.py"), str(self.trace)]}
        server = ask(f"{self.url}/v1/mcp-servers/", {"server_name": "known", "config": config})
        self.id = server["id"]
        (tool,) = ask(f"{self.url}/v1/mcp-servers/{self.id}/tools")
        self.run = f"/v1/mcp-servers/{self.id}/tools/{tool['id']}/run"
        self.settings = {"api": self.url, "run": self.run}

    def servers(self):
        return sorted(server["server_name"] for server in ask(f"{self.url}/v1/mcp-servers/"))

    def runs(self):
        return len(self.trace.read_text().splitlines()) if self.trace.exists() else 0

    def refused(self):
        """How many requests were refused as a page's, by method and kind of path."""
        seen = {}
        for line in self.portolan.lines:
            if "refused what a browser says of a request" not in line:
                continue
            method = line.split("http.method=", 1)[1].split()[0].strip('"')
            path = line.split("http.path=", 1)[1].split()[0].rstrip(":}").strip('"')
            kind = {"/v1/mcp-servers/": "create", self.run: "run", f"/v1/mcp-servers/{self.id}": "delete"}.get(path, "refresh")
            seen[method, kind] = seen.get((method, kind), 0) + 1
        return seen

    def is_untouched(self):
        assert self.servers() == ["known"], self.servers()
        assert self.runs() == 0, "a tool was run"

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            # After a failure it shall only be gone.
            Process.stop(self.portolan)
        else:
            self.portolan.stop()
        self.folder.cleanup()


def pages_of_other_origins_do_nothing(pages):
    for host in ("127.0.0.1", "localhost"):
        with Target() as target:
            outcomes = visit(pages, f"http://{host}:{pages.port}/", target.settings)
            print(f"   from http://{host}:{pages.port}: {outcomes}")
            target.is_untouched()
            assert "read" not in outcomes.values(), outcomes
            assert outcomes["list script"] == "error", outcomes
            # They reached Portolan: it was not the browser that kept all of them.
            for what, least in MUST_BE_SEEN.items():
                wait_until(f"{what} is refused {least} times", lambda: target.refused().get(what, 0) >= least)
            target.is_untouched()


def a_listed_page_comes_in(pages):
    listed = {"PORTOLAN_CORS_ORIGINS": f"http://127.0.0.1:{pages.port}"}
    with Target(**listed) as target:
        outcomes = visit(pages, f"http://127.0.0.1:{pages.port}/", target.settings)
        print(f"   listed: {outcomes}")
        for name in ("fetch json", "xhr json", "run", "refresh", "list", "delete"):
            assert outcomes[name] == "read", (name, outcomes)
        # "known" was deleted last; a body of another type registers nothing, whoever sends it.
        assert {"fetch json", "xhr json"} <= set(target.servers()) <= {"fetch json", "xhr json", "beacon json"}, target.servers()
        assert target.runs() == 3, "a fetch, one without an answer, and a form, but nothing from a sandbox"
    # The listed page is that one alone.
    with Target(**listed) as target:
        outcomes = visit(pages, f"http://localhost:{pages.port}/", target.settings)
        target.is_untouched()
        assert "read" not in outcomes.values(), outcomes


def a_rebound_name_does_nothing(pages):
    """A page whose name leads to Portolan once it is loaded: to the browser they are one origin."""
    page = f"http://127.0.0.1:{pages.port}"
    resolver = "--host-resolver-rules=MAP evil.test 127.0.0.1"
    for env in ({}, {"PORTOLAN_ALLOWED_HOSTS": "evil.test"}):
        with Target(**env) as target:
            switch = Switch(page)
            pages.on_switch = lambda: switch.to(target.url)
            name = f"http://evil.test:{switch.url.rpartition(':')[2]}"
            outcomes = visit(pages, f"{name}/", target.settings | {"api": name, "own": f"{page}/switch"}, resolver)
            switch.stop()
            print(f"   from {name}, rebound, {env}: {outcomes}")
            shown = dump(f"http://evil.test:{target.url.rpartition(':')[2]}/v1/mcp-servers/", resolver)
            if env:
                for what in ("fetch json", "xhr json", "run", "refresh", "list", "delete"):
                    assert outcomes[what] == "read", (what, outcomes)
                assert "fetch json" in target.servers() and target.runs() >= 2, (target.servers(), target.runs())
                assert "host_not_allowed" not in shown, shown
            else:
                target.is_untouched()
                assert "read" not in outcomes.values(), outcomes
                # It may read its own refusal: to the browser, it is its own server's.
                for what in ("fetch json", "run", "list", "delete"):
                    assert outcomes[what] == "403 host_not_allowed", (what, outcomes)
                assert "host_not_allowed" in shown, shown


def a_user_comes_back_from_another_site(pages):
    """From the page of an authorization server to the callback, which is the one thing that its link may do."""
    with Target() as target:
        for path, shown, hidden in (
            ("/v1/tools/mcp/oauth/callback?state=unknown&code=c", "<h1>Not signed in</h1>", "origin_not_allowed"),
            ("/v1/mcp-servers/", "origin_not_allowed", target.id),
        ):
            pages.settings = {"back": target.url + path}
            text = dump(f"http://localhost:{pages.port}/sent-back", "--virtual-time-budget=20000")
            assert shown in text and hidden not in text, text
        target.is_untouched()


def a_user_may_look(_pages):
    """What is typed in the address bar."""
    with Target() as target:
        assert target.id in dump(f"{target.url}/v1/mcp-servers/")
        assert "swagger" in dump(f"{target.url}/docs").lower()


def main():
    pages = Pages()
    for check in (pages_of_other_origins_do_nothing, a_listed_page_comes_in, a_rebound_name_does_nothing,
                  a_user_comes_back_from_another_site, a_user_may_look):
        print(f"== {check.__name__.replace('_', ' ')}", flush=True)
        check(pages)
    pages.stop()
    print("ok")


if __name__ == "__main__":
    main()
