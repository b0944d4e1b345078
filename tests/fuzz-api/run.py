"""schemathesis against a live Portolan: `run.py short|long`, environment as in ../sdk/processes.py.

That Portolan has an empty folder for PATH, so that no fuzzed command can ever run, and short deadlines, so that no fuzzed address
can hold it up. It knows one server of each type with the fixture server behind it, and one whose upstream is gone; hooks.py aims
most cases at those. Ends non-zero when a check failed, when an operation was answered with success too seldom, when Portolan did
not survive or its servers do not work any more, or when it did not end cleanly.
"""

import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))

import processes  # noqa: E402

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
]
LENGTHS = {
    "short": ["--max-examples", "20", "--max-time", "130"],
    "long": ["--max-examples", "500", "--max-time", "1200"],
}
NO_STATE = "/nonexistent/state.json"  # the fixture server lists all its tools
NOBODY = "http://127.0.0.1:1/mcp"

# The success status of every operation. /openapi.yaml is not among them: schemathesis leaves out the document that it reads.
SUCCESS = {
    "mcp_create_mcp_server": 200,
    "mcp_list_mcp_servers": 200,
    "mcp_retrieve_mcp_server": 200,
    "mcp_update_mcp_server": 200,
    "mcp_delete_mcp_server": 204,
    "mcp_refresh_mcp_server_tools": 200,
    "mcp_list_tools_for_mcp_server": 200,
    "mcp_retrieve_mcp_tool": 200,
    "mcp_run_tool": 200,
    "mcp_approve_tool": 200,
    "mcp_connect_mcp_server": 200,
    "mcp_oauth_callback": 200,
    "mcp_oauth_callback_of_session": 200,
    "get_client_metadata": 404,  # there is no public URL
    "list_mcp_servers": 200,
    "add_mcp_server": 200,
    "test_mcp_server": 200,
    "connect_mcp_server": 200,
    "update_mcp_server": 200,
    "delete_mcp_server": 200,
    "update_mcp_server_called_test": 200,
    "delete_mcp_server_called_test": 200,
    "update_mcp_server_called_connect": 200,
    "delete_mcp_server_called_connect": 200,
    "list_mcp_tools_by_server": 200,
    "add_mcp_tool": 200,
    "add_mcp_tool_called_tools": 404,  # the fixture has no such tool
    "resync_mcp_server_tools": 200,
    "execute_mcp_tool": 200,
    "portolan_import": 200,
    "portolan_export": 200,
    "portolan_runs": 200,
    "portolan_changes": 200,
    "check_health": 200,
    "check_ready": 200,
    "read_metrics": 200,
    "get_reference_page": 200,
    "get_reference_file": 200,
    "get_console": 200,
    "get_console_file": 200,
}
# The share of an operation's cases with valid data that must have succeeded: enough to know that the core was reached.
LEAST = {operation: 0.25 if operation.startswith("mcp_") else 0 for operation in SUCCESS} | {"mcp_create_mcp_server": 0.6}
RUNS = ("success", "error", "no session")  # what runs must have come to, each at least once


def request(portolan, method, path, body=None):
    wanted = urllib.request.Request(
        f"{portolan.url}/v1/mcp-servers/{path}", json.dumps(body).encode() if body is not None else None,
        {"content-type": "application/json"}, method=method,
    )
    with urllib.request.urlopen(wanted, timeout=60) as answer:
        return json.load(answer)


def register(portolan, name, config):
    server = request(portolan, "POST", "", {"server_name": name, "config": config})
    assert server["status"]["state"] == "ready", server
    tools = request(portolan, "GET", f"{server['id']}/tools")
    assert tools
    return {
        "id": server["id"], "name": name, "tools": [tool["id"] for tool in tools],
        "tool_names": [tool["name"] for tool in tools],
    }


def works(portolan, server):
    echo = next(it for it in request(portolan, "GET", f"{server['id']}/tools") if it["name"] == "echo")
    ran = request(portolan, "POST", f"{server['id']}/tools/{echo['id']}/run", {"args": {"message": "still here"}})
    assert (ran["status"], ran["func_return"]) == ("success", "still here"), ran


def fuzz(portolan, folder, length, given):
    argv = [
        str(pathlib.Path(sys.executable).with_name("schemathesis")), "run", f"{portolan.url}/openapi.yaml",
        "--url", portolan.url, "--checks", ",".join(CHECKS), *LENGTHS[length],
        # One worker: CPython 3.11 cannot parse in two threads at once ("AST constructor recursion depth mismatch").
        "--request-timeout", "15", "--workers", "1", "--continue-on-failure",
        "--suppress-health-check", "all", "--generation-database", "none", "--no-color", "--output-sanitize", "false",
    ]
    hooks = {"PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "hooks", "PORTOLAN_FUZZ": json.dumps(given)}
    return subprocess.run(argv, cwd=folder, env=os.environ | hooks, check=False).returncode


def judge(counts):
    """Prints what was answered, and returns what is missing."""
    missing = [f"{operation}: unknown here" for operation in counts.keys() - SUCCESS.keys()]
    for operation, success in SUCCESS.items():
        answers = counts.get(operation, {})
        cases = sum(number for status, number in answers.items() if status.isdigit())
        valid = sum(number for status, number in answers.items() if status.startswith("valid "))
        good, valid_good = answers.get(str(success), 0), answers.get(f"valid {success}", 0)
        print(
            f"{operation:30}{cases:6} cases,{good:6} answered {success} ({good / max(cases, 1):.0%}); "
            f"{valid:6} with valid data,{valid_good:6} answered {success} ({valid_good / max(valid, 1):.0%})"
        )
        if good == 0 or valid_good < LEAST[operation] * valid:
            missing.append(f"{operation}: too few answers with {success}; all: {answers}")
    runs = counts.get("mcp_run_tool", {})
    print("runs:", ", ".join(f"{it} {runs.get(it, 0)}" for it in RUNS))
    return missing + [f"mcp_run_tool: no {it}" for it in RUNS if not runs.get(it)]


def main(length):
    with processes.new_folder() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        empty, command, counts = folder / "empty", folder / "fixture", folder / "counts.json"
        empty.mkdir()
        # A command that takes no notice of its arguments, so that fuzzed ones cannot make anything else of it.
        python, fixture = shlex.quote(processes.tools_python()), shlex.quote(processes.FIXTURE)
        command.write_text(f"#!/bin/sh\nexec {python} -I {fixture} stdio --state {NO_STATE}\n")
        command.chmod(0o700)

        configs = {"stdio": {"mcp_server_type": "stdio", "command": str(command)}}
        for kind, transport in (("sse", "sse"), ("streamable_http", "http")):
            upstream = processes.Upstream(transport, NO_STATE)
            stack.callback(upstream.stop)
            configs[kind] = {"mcp_server_type": kind, "server_url": upstream.url}
        portolan = processes.Portolan(
            folder,
            {
                "PATH": str(empty),
                # The fixture is a script, and no configuration names the Python that it is for; it may be in a home.
                "PORTOLAN_CHILD_PATHS": str(pathlib.Path(processes.tools_python()).resolve().parents[1]),
                "PORTOLAN_CONNECT_TIMEOUT": "1s",
                "PORTOLAN_HANDSHAKE_TIMEOUT": "10s",
                "PORTOLAN_CREATE_SYNC_TIMEOUT": "10s",
            },
        )
        stack.callback(portolan.stop)

        live = [register(portolan, f"live {kind}", config) for kind, config in configs.items()]
        gone = register(portolan, "gone", configs["streamable_http"])
        request(portolan, "PATCH", gone["id"], {"config": {"server_url": NOBODY}})
        given = {
            "url": portolan.url, "live": live, "gone": gone, "upstream": configs["streamable_http"]["server_url"],
            "command": str(command), "counts": str(counts),
        }
        failed = fuzz(portolan, folder, length, given)
        assert portolan.child.poll() is None, "Portolan ended:\n" + "\n".join(portolan.lines[-40:])
        missing = judge(json.loads(counts.read_text()))
        for it in missing:
            print(f"missing: {it}")
        for server in live:
            works(portolan, server)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
