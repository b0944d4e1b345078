"""Starts and ends the processes of the outer suites: a Portolan, and the MCP servers behind it. Standard library only, since
every SDK version has a venv of its own.

Environment, set by `tests/run`: PORTOLAN_BIN the binary; PORTOLAN_TOOLS_PYTHON a Python with `mcp`; PORTOLAN_DATABASE_URL, if
set, an empty Postgres database for this session alone (otherwise Portolan makes an SQLite file in its data folder).
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
FIXTURE = str(HERE / "fixture_server.py")
DEADLINE = 30.0


def tools_python():
    return os.environ["PORTOLAN_TOOLS_PYTHON"]


def quoted(name):
    """A server's name as a step of a path, for the SDKs that put it there as it is."""
    return urllib.parse.quote(name, safe="")


def wait_until(what, check, deadline=DEADLINE):
    """Polls until `check()` is true and returns that value; an AssertionError names what did not happen in time."""
    end = time.monotonic() + deadline
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline:.0f} s: {what}"
        time.sleep(0.02)


def stat(pid):
    """(state, parent pid, start time) of a process, or None when there is none."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1]), int(fields[19])


def descendants(pid):
    """Every live process below `pid`, as {pid: start time}, but for those that keep them."""
    everyone = {int(entry): stat(entry) for entry in os.listdir("/proc") if entry.isdigit()}
    below, grew = {pid}, True
    while grew:
        more = {child for child, it in everyone.items() if it and it[1] in below and it[0] != "Z"} - below
        grew = bool(more)
        below |= more
    below -= {pid, *(child for child in below if command_line(child).endswith(" keep-child"))}
    return {child: everyone[child][2] for child in below}


def command_line(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def mentioning(text):
    """The processes whose command line mentions `text`."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and text in command_line(pid)]


class Process:
    """A child with both outputs collected line by line, ended by its own pid."""

    def __init__(self, argv, env=None, cwd=None):
        self.lines = []
        self._grown = threading.Condition()
        self.child = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.child.stdout:
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self._grown.notify_all()

    @property
    def pid(self):
        return self.child.pid

    def line_with(self, text, deadline=DEADLINE):
        """The first line of output that holds `text`, waiting for it."""
        def found():
            return next((line for line in self.lines if text in line), None)

        with self._grown:
            self._grown.wait_for(lambda: found() or not self._reader.is_alive() or self.child.poll() is not None, deadline)
        if found() is None and self.child.poll() is not None:
            self._reader.join(5)
        line = found()
        assert line is not None, f"no line with {text!r}; exit {self.child.poll()}; output:\n" + "\n".join(self.lines[-40:])
        return line

    def count(self, text):
        return sum(text in line for line in self.lines)

    def stop(self, sign=signal.SIGTERM, deadline=DEADLINE):
        """Signals the process and returns its exit code; kills it and fails when it does not end in time."""
        if self.child.poll() is None:
            self.child.send_signal(sign)
        try:
            return self.child.wait(deadline)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
            raise AssertionError(f"{self.child.args[0]} did not end within {deadline:.0f} s of {sign.name}") from None


class Portolan(Process):
    """A running Portolan with a data folder of its own; `stop` asserts a clean end."""

    def __init__(self, folder, env=None):
        self.folder = pathlib.Path(folder)
        data = self.folder / "data"
        data.mkdir()
        ours = ("PORTOLAN_", "LETTA_", "MCP_", "DATABASE_URL")
        settings = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        argv = [os.environ["PORTOLAN_BIN"], "--listen", "127.0.0.1:0", "--data-dir", str(data)]
        if url := os.environ.get("PORTOLAN_DATABASE_URL"):
            argv += ["--database-url", url]
            # 32 bytes like any others; SQLite makes its own.
            settings["PORTOLAN_KEY"] = "5f" * 32
        super().__init__(argv, settings | (env or {}))
        self.url = self.line_with(" listens on http://").split(" listens on ")[1].strip()
        self.database = self.line_with("Database: ").removeprefix("Database: ")
        wait_until("health answers", self._healthy)

    def _healthy(self):
        try:
            with urllib.request.urlopen(f"{self.url}/v1/health", timeout=5) as answer:
                return json.load(answer)["status"] == "ok"
        except OSError:
            return False

    def stop(self, **_):
        below = descendants(self.pid)
        code = super().stop()
        left = {pid: command_line(pid) for pid, start in below.items() if (it := stat(pid)) and it[2] == start and it[0] != "Z"}
        left |= {pid: command_line(pid) for pid in mentioning(str(self.folder))}
        assert code == 0, f"exit code {code} after SIGTERM; last output:\n" + "\n".join(self.lines[-40:])
        assert not left, f"processes left behind: {left}"


class Upstream(Process):
    """The fixture server over sse or http."""

    def __init__(self, transport, state, require=None):
        argv = [tools_python(), FIXTURE, transport, "--state", str(state)]
        super().__init__(argv + (["--require", require] if require else []))
        self.url = self.line_with("http://127.0.0.1:")

    def stop(self, **_):
        super().stop()


class Cutter:
    """A TCP proxy in front of `url`, for clients that shall lose their connections."""

    def __init__(self, url):
        host, _, port = url.removeprefix("http://").partition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # stopped
                return
            server = socket.create_connection(self._target)
            self._open += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(one, other), daemon=True).start()

    @staticmethod
    def _forward(one, other):
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:  # cut
            pass
        for it in (one, other):
            with contextlib.suppress(OSError):
                it.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """Ends every connection; new ones are taken."""
        for it in self._open:
            with contextlib.suppress(OSError):
                it.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def stop(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


def new_folder():
    return tempfile.TemporaryDirectory(prefix="portolan-suite-")
