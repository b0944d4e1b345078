"""The images and the stack without an engine, in plain folders: what `plain.py` makes of the Dockerfile, started with the settings of
compose.yaml, over a real PostgreSQL and behind a real HAProxy."""

import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import threading
import time

import dockerfile
import files
from plain import Container, Image, wait_for
from proxy import Proxy, free_port

TOKEN = files.GIVEN["PORTOLAN_TOKEN"]
EVERYTHING = "@modelcontextprotocol/server-everything/dist/index.js"


def image(root, folder, name, **more):
    [stage] = [stage for stage in dockerfile.read(root / "Dockerfile") if stage.name == name]
    data, uv = folder / "data", folder / "uv"
    data.mkdir(mode=0o700)
    # In place of what another image has.
    uv.write_text("#!/bin/sh\necho uv is not here >&2\nexit 1\n")
    uv.chmod(0o755)
    built = {"/src/target/release/portolan": pathlib.Path(os.environ["PORTOLAN_BIN"]), "/data": data, "/uv": uv, "/uvx": uv}
    return Image(stage, folder, built, **more)


def settings(port, **more):
    """Listening where the machine is reached by itself alone: its network is not the container's own."""
    return {"PORTOLAN_LISTEN": f"127.0.0.1:{port}", "PORTOLAN_TOKEN": TOKEN} | more


def ask(port, method, path, body=None, token=TOKEN):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if text.startswith(("{", "[")) else text


def tree(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def the_slim_image_runs_read_only_without_rights_or_a_shell(root, folder):
    slim = image(root, folder, "slim")
    before, port = tree(slim.root), free_port()
    with Container(slim, folder / "one", environment=settings(port)) as container:
        container.until_it_listens()
        assert container.check() == (0, f"Portolan is well at http://127.0.0.1:{port}/v1/health.\n")
        assert container.check("--ready")[0] == 0
        assert ask(port, "GET", "/v1/mcp-servers/")[0] == 200 and ask(port, "GET", "/v1/mcp-servers/", token=None)[0] == 401
        status = pathlib.Path(f"/proc/{container.pid}/status").read_text()
        for name, value in (("Uid", "65532\t65532\t65532\t65532"), ("Groups", " "), ("CapEff", "0000000000000000"), ("NoNewPrivs", "1")):
            assert f"\n{name}:\t{value}\n" in status, f"{name}: {status}"
        assert re.search(r"^NSpid:\t\d+\t1$", status, re.MULTILINE), "it is the first process"
        mounts = pathlib.Path(f"/proc/{container.pid}/mountinfo").read_text()
        writable = {line.split()[4] for line in mounts.splitlines() if line.split()[5].startswith("rw")}
        assert not {place for place in writable if not place.startswith(("/dev/", "/proc"))} - set(slim.volumes), mounts
        shell = container.run(["/bin/sh", "-c", "true"])
        assert shell.returncode == 127, shell
        kept = container.volumes["/var/lib/portolan"]
        assert (kept.stat().st_mode & 0o777, kept.stat().st_uid) == (0o700, 65532)
        assert {"portolan.db", "portolan.key"} <= {path.name for path in kept.iterdir()}
        assert container.stopped() == 0, container.said()
    assert tree(slim.root) == before, "nothing was written beside the volume"


def the_image_refuses_what_it_should(root, folder):
    slim = image(root, folder, "slim")
    for name, environment, part in (
        ("token", {"PORTOLAN_LISTEN": "0.0.0.0:0"}, "it needs a token"),
        ("empty", {"PORTOLAN_LISTEN": "0.0.0.0:0", "PORTOLAN_TOKEN": ""}, "PORTOLAN_TOKEN is empty"),
        ("key", settings(0, DATABASE_URL="postgres://u@127.0.0.1:1/x"), "PostgreSQL needs a key"),
        ("elsewhere", settings(0, PORTOLAN_DATA_DIR="/elsewhere"), "Read-only file system"),
    ):
        with Container(slim, folder / name, environment=environment) as container:
            assert container.ended() == 1 and part in container.said(), f"{name}: {container.said()}"
    with Container(slim, folder / "well", environment=settings(0)) as container:
        container.until_it_listens()
    with Container(slim, folder / "command", arguments=["key", "new"]) as container:
        assert container.ended() == 0 and re.fullmatch(r"[A-Za-z0-9+/]{43}=\n", container.said()), container.said()


def commands_leave_nothing_in_a_container_and_a_stop_waits_for_runs(root, folder):
    modules = root / "tests/published/node_modules"
    stdio = image(root, folder, "stdio", machine=True)
    port = free_port()
    with Container(stdio, folder / "one", environment=settings(port), mounts=[(modules, "/opt/node_modules")]) as container:
        container.until_it_listens()
        servers = "/v1/mcp-servers"

        def register(name, script):
            # A process of another session stays behind the server that started it.
            config = {"mcp_server_type": "stdio", "command": "/bin/sh", "args": ["-c", script]}
            status, server = ask(port, "POST", f"{servers}/", {"server_name": name, "config": config})
            assert status == 200 and server["status"]["state"] == "ready", f"{server}\n{container.said()}"
            tools = {tool["name"]: tool["id"] for tool in ask(port, "GET", f"{servers}/{server['id']}/tools")[1]}
            return server["id"], tools

        def run(server, tool, **arguments):
            return ask(port, "POST", f"{servers}/{server}/tools/{tool}/run", {"args": arguments})

        def names():
            return sorted(name for _, name, _ in container.processes())

        def gone(what):
            wait_for(lambda: not container.processes(), what, lambda: str(container.processes()))

        script = f"setsid sleep 1000 & exec node /opt/node_modules/{EVERYTHING} stdio"
        server, tools = register("deleted", script)
        status, ran = run(server, tools["echo"], message="hello")
        assert status == 200 and ran["func_return"] == "Echo: hello", ran
        assert "sleep" in names() and "node" in names(), names()
        assert ask(port, "DELETE", f"{servers}/{server}")[0] in (200, 204)
        gone("a server left something behind")

        # Its keeper is killed, so that what it kept comes to the first process.
        server, tools = register("lost", script)
        before = {pid for pid, *_ in container.processes()}
        threads = pathlib.Path(f"/proc/{container.pid}/task").glob("*/children")
        [keeper] = [int(pid) for thread in threads for pid in thread.read_text().split()]
        os.kill(keeper, signal.SIGKILL)
        left = lambda: before & {pid for pid, *_ in container.processes()}
        wait_for(lambda: not left(), "a keeper that was killed left something behind", lambda: str(container.processes()))
        assert ask(port, "DELETE", f"{servers}/{server}")[0] in (200, 204)
        gone("a server left something behind")

        # Somebody looks into the container, and what was started there outlives them.
        assert container.run(["/bin/sh", "-c", "sleep 1000 >/dev/null 2>&1 <&- &"]).returncode == 0
        [(orphan, name, _)] = wait_for(container.processes, "there is no orphan")
        assert name == "sleep"
        os.kill(orphan, signal.SIGKILL)
        gone("an orphan stays as a zombie")

        # A stop while a run is under way.
        server, tools = register("slow", script)
        [slow] = [tool for name, tool in tools.items() if "long" in name.lower()]
        answers = []
        caller = threading.Thread(target=lambda: answers.append(run(server, slow, duration=4, steps=2)))
        caller.start()
        in_flight = re.compile(r"^portolan_upstream_calls_in_flight 1$", re.MULTILINE)
        wait_for(lambda: in_flight.search(ask(port, "GET", "/metrics")[1]), "the run is not under way")
        assert container.stopped() == 0, container.said()
        caller.join()
        [(status, ran)] = answers
        assert status == 200 and ran["status"] == "success", ran


def the_stack_goes_on_when_a_replica_is_killed(root, folder):
    url = os.environ["PORTOLAN_DATABASE_URL"]
    slim = image(root, folder, "slim")
    service = files.compose(root, files.GIVEN)["services"]["portolan"]
    environment = {name: str(value) for name, value in service["environment"].items()} | {"DATABASE_URL": url}
    ports = [free_port() for _ in range(service["deploy"]["replicas"])]
    replicas = [
        Container(slim, folder / f"replica-{port}", environment=environment | {"PORTOLAN_LISTEN": f"127.0.0.1:{port}"}) for port in ports
    ]
    try:
        # At once: one of them brings the tables to its version, the others wait.
        for replica in replicas:
            replica.until_it_listens()
            assert replica.check("--ready")[0] == 0, replica.said()
        with Proxy(root, folder, ports) as proxy:
            assert ask(proxy.port, "GET", "/v1/mcp-servers/", token=None)[0] == 401
            config = {"mcp_server_type": "streamable_http", "server_url": "http://127.0.0.1:9/mcp"}

            def register(name):
                return ask(proxy.port, "POST", "/v1/mcp-servers/", {"server_name": name, "config": config})

            assert register("before")[0] == 200
            for port in [proxy.port, *ports]:
                status, servers = ask(port, "GET", "/v1/mcp-servers/")
                assert status == 200 and [server["server_name"] for server in servers] == ["before"], servers
            replicas[0].killed()
            # A connection that HAProxy kept to it may die under the first request, which is then lost, and not repeated.
            wait_for(lambda: ask(proxy.port, "GET", "/v1/mcp-servers/")[0] == 200, "nobody answers")
            for number in range(20):
                status, said = register(f"after-{number}")
                assert status == 200, said
            names = [server["server_name"] for server in ask(proxy.port, "GET", "/v1/mcp-servers/")[1]]
            assert sorted(names) == sorted(["before", *(f"after-{number}" for number in range(20))]), "each once"
            assert replicas[1].stopped() == 0, replicas[1].said()
            status, said = ask(proxy.port, "GET", "/v1/mcp-servers/")
            assert status == 503 and "detail" in said
    finally:
        for replica in replicas:
            replica.__exit__()


TESTS = [
    the_slim_image_runs_read_only_without_rights_or_a_shell,
    the_image_refuses_what_it_should,
    commands_leave_nothing_in_a_container_and_a_stop_waits_for_runs,
    the_stack_goes_on_when_a_replica_is_killed,
]
