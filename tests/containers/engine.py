"""The images and the stack with the container engine of this machine: built as the Dockerfile says, started as compose.yaml does."""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request

import files
from plain import wait_for
from proxy import free_port

PROJECT = "portolan-tests"


def is_here():
    return shutil.which("docker") is not None


def docker(*arguments, check=True, **more):
    return subprocess.run(["docker", *arguments], check=check, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)


def ask(port, method, path, body=None):
    headers = {"content-type": "application/json", "authorization": f"Bearer {files.GIVEN['PORTOLAN_TOKEN']}"}
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def the_images_are_built_and_run_read_only(root, _):
    for name in files.SERVED:
        tag = f"{PROJECT}:{name}"
        docker("build", "--tag", tag, "--target", name, root)
        assert "needs a token" in docker("run", "--rm", "--read-only", tag, check=False).stdout
        hardened = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")
        container = docker("run", "--detach", *hardened, "--env", "PORTOLAN_TOKEN=t", tag).stdout.strip()
        try:
            look = ("inspect", "--format", "{{.State.Health.Status}}", container)
            wait_for(lambda: docker(*look).stdout.strip() == "healthy", f"{name} is not healthy", lambda: docker("logs", container).stdout)
            docker("stop", "--time=60", container)
            assert docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip() == "0"
        finally:
            docker("rm", "--force", "--volumes", container)


def the_stack_is_started_and_goes_on_when_a_replica_is_killed(root, _):
    port = free_port()
    environment = os.environ | files.GIVEN | {"PUBLISH": f"127.0.0.1:{port}", "TARGET": "slim"}
    compose = ("compose", "--project-name", PROJECT, "--file", root / "compose.yaml")
    with tempfile.TemporaryDirectory() as empty:
        # No file .env of whoever runs this.
        compose += ("--env-file", pathlib.Path(empty, "none"))
        compose[-1].touch()
        refused = docker(*compose, "config", check=False, env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ})
        assert refused.returncode != 0 and "openssl rand" in refused.stdout, refused.stdout
        try:
            docker(*compose, "up", "--build", "--detach", "--wait", env=environment)
            config = {"mcp_server_type": "streamable_http", "server_url": "http://192.0.2.1/mcp"}
            assert ask(port, "POST", "/v1/mcp-servers/", {"server_name": "before", "config": config})[0] == 200
            replicas = docker(*compose, "ps", "--quiet", "portolan", env=environment).stdout.split()
            assert len(replicas) == 2
            docker("kill", replicas[0])
            wait_for(lambda: ask(port, "GET", "/v1/mcp-servers/")[0] == 200, "nobody answers")
            for number in range(5):
                assert ask(port, "POST", "/v1/mcp-servers/", {"server_name": f"after-{number}", "config": config})[0] == 200
            assert len(ask(port, "GET", "/v1/mcp-servers/")[1]) == 6
        finally:
            docker(*compose, "down", "--volumes", "--timeout=60", check=False, env=environment)


TESTS = [
    the_images_are_built_and_run_read_only,
    the_stack_is_started_and_goes_on_when_a_replica_is_killed,
]
