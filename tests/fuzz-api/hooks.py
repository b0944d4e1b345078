"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): aims its cases at what `run.py` registered, and counts what is answered.

- A made-up URL becomes one of this machine where nobody listens, and a made-up command loses its slashes, so that it is looked
  for in an empty PATH: a run sends nothing to any other host and starts nothing but the fixture server. Other text stays.
- Most ids become those of live servers and their tools; the rest stay as they were made, or name a server whose upstream is gone.
- What deletes or reconfigures goes to throw-away servers: those that the fuzzer made itself, else one made for it.
- An import removes nothing: what is live would be gone.
- Most valid server names and all Idempotency-Keys are made unique, since the fuzzer loves short ones and a second "0" is only
  ever a conflict.

Choices hang on the content of a case, so that a case which is repeated (to shrink it) is aimed at the same kind of thing again.
There is one worker, hence no locks.
"""

import atexit
import collections
import contextlib
import itertools
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import zlib

import schemathesis
from schemathesis.core.failures import ServerError

# From run.py: url; live: [{id, name, tools: [ids], tool_names}]; gone: such a one; upstream: a URL that is alive; command; counts: a file to write.
GIVEN = json.loads(os.environ["PORTOLAN_FUZZ"])
LIVE, GONE = GIVEN["live"], GIVEN["gone"]
KEPT = {it["id"] for it in [*LIVE, GONE]}
MOST_THROWAWAYS = 60  # so that the list of all servers stays short

NOBODY = "http://127.0.0.1:1/"
HTTP = re.compile(r"[\x00-\x20]*h\s*t\s*t\s*p\s*s?\s*:", re.IGNORECASE)  # as lenient as URL parsers are
KEY = re.compile(r"[!-~]{1,200}")
NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,255}")
SERVER_ID = re.compile(r"mcp_server-[0-9a-f-]{36}")

numbers = itertools.count(1)
throwaways = {}  # id -> is it a command? oldest first
by_name = []  # the names of throw-away servers that the older API made; oldest first
counts = collections.defaultdict(collections.Counter)


def tame(value, key=None):
    if isinstance(value, dict):
        return {name: tame(it, name) for name, it in value.items()}
    if isinstance(value, list):
        return [tame(it) for it in value]
    if isinstance(value, str) and HTTP.match(value) and not value.startswith(NOBODY):
        return NOBODY + re.sub(r"[^a-z0-9]", "", value.lower())[:60]
    if key == "command" and isinstance(value, str) and value != GIVEN["command"]:
        return value.replace("/", "_")
    return value


def unique(name):
    if not NAME.fullmatch(name) or not name.strip():
        return name
    suffix = f" {next(numbers)}"
    return name[: 255 - len(suffix)] + suffix


def request(method, path, body=None, below="/v1/mcp-servers/"):
    """A request of our own, which is not counted."""
    wanted = urllib.request.Request(
        f"{GIVEN['url']}{below}{path}", json.dumps(body).encode() if body else None,
        {"content-type": "application/json"}, method=method,
    )
    with urllib.request.urlopen(wanted, timeout=30) as answer:
        return answer.read()


def throwaway(is_command, pick):
    """The id of a server that may be spoilt. Those made here are live, and their session ends by what is done to them."""
    known = next((it for it, kind in reversed(throwaways.items()) if kind == is_command), None)
    if known and pick % (64 if is_command else 8):  # to start a command takes a second
        return known
    config = {"command": GIVEN["command"]} if is_command else {"server_url": GIVEN["upstream"]}
    made = json.loads(request("POST", "", {"server_name": f"throw-away {next(numbers)}", "config": config}))["id"]
    keep_as_throwaway(made, is_command)
    return made


def keep_as_throwaway(server_id, is_command):
    throwaways[server_id] = is_command
    if len(throwaways) > MOST_THROWAWAYS:
        surplus = next(iter(throwaways))
        del throwaways[surplus]
        request("DELETE", surplus)


def register_by_name(name):
    with contextlib.suppress(urllib.error.HTTPError):  # it is there
        request("PUT", "", {"server_name": name, "server_url": NOBODY}, "/v1/tools/mcp/servers")
        by_name.append(name)
    while len(by_name) > MOST_THROWAWAYS:
        name = urllib.parse.quote(by_name.pop(0), safe="")
        with contextlib.suppress(urllib.error.HTTPError):  # it is gone already
            request("DELETE", name, None, "/v1/tools/mcp/servers/")
    return name


def aim_by_name(case, operation, roll):
    names, share, pick = case.path_parameters, roll % 8, roll // 8
    if operation in ("update_mcp_server", "delete_mcp_server"):
        # One that stood in an answer may be that of a live server, whatever that is called by now.
        made = f"by name {next(numbers)}"
        names["mcp_server_name"] = register_by_name(made) if share < 6 else f"nobody is called {made}"
        return
    if share == 7:
        return
    server = GONE if share == 6 else LIVE[pick % len(LIVE)]
    names["mcp_server_name"] = server["name"]
    for key in names.keys() & {"mcp_tool_name", "tool_name"}:
        if share != 5:
            names[key] = server["tool_names"][pick // len(LIVE) % len(server["tool_names"])]


def aim(case, operation, roll):
    ids = case.path_parameters
    made_up, share, pick = ids["mcp_server_id"], roll % 8, roll // 8
    # An id that stood in an answer is good for a second look, one out of thin air only for a 404.
    if SERVER_ID.fullmatch(str(made_up)) and made_up not in KEPT and share >= 4:
        return
    if operation == "mcp_delete_mcp_server":
        if share < 6 or made_up in KEPT:
            ids["mcp_server_id"] = throwaway(pick % 16 == 1, pick)
        return
    if operation == "mcp_update_mcp_server":
        body = case.body if isinstance(case.body, dict) else {"config": None, "": None}
        if body.keys() <= {"server_name"} and made_up != GONE["id"] and share < 4:
            ids["mcp_server_id"] = LIVE[pick % len(LIVE)]["id"]
        elif share < 7 or made_up in KEPT:
            config = body["config"] if isinstance(body.get("config"), dict) else body
            is_command = bool(config.keys() & {"command", "args", "env"}) or "stdio" in map(str, config.values())
            ids["mcp_server_id"] = throwaway(is_command != (share == 6), pick)  # a few of the other type: a switch or a 422
        return
    if share == 7:
        return
    server = GONE if share == 6 else LIVE[pick % len(LIVE)]
    ids["mcp_server_id"] = server["id"]
    if "tool_id" in ids and share != 5:
        ids["tool_id"] = server["tools"][pick // len(LIVE) % len(server["tools"])]


def aim_import(case, roll):
    if roll % 2 and case.meta.generation.mode.is_positive:
        name = f"imported {roll % MOST_THROWAWAYS}"  # not too many of them: each stays
        case.body = {"mcpServers": {name: {"type": "http", "url": f"{NOBODY}{roll % 8}"}}}
    # A replacement would remove what the other cases are aimed at.
    if case.query and "replace" in str(case.query.get("mode")):
        case.query["dry_run"] = "true"


@schemathesis.hook
def before_call(_context, case, _kwargs):
    operation = case.operation.definition.raw["operationId"]
    roll = zlib.crc32(repr((operation, case.path_parameters, case.query, case.body)).encode(errors="replace"))
    if isinstance(case.body, (dict, list)):
        case.body = tame(case.body)
    elif isinstance(case.body, bytes):
        case.body = re.sub(rb"(?i)https?:[^\"'\s]*", NOBODY.encode(), case.body)
    if isinstance(case.body, dict) and isinstance(case.body.get("server_name"), str) and roll % 8:
        case.body = case.body | {"server_name": unique(case.body["server_name"])}
    if case.headers and KEY.fullmatch(str(case.headers.get("Idempotency-Key", ""))):
        case.headers["Idempotency-Key"] += f"-{next(numbers)}"
    if "mcp_server_id" in case.path_parameters and case.method == case.operation.method.upper():
        aim(case, operation, roll)
    if "mcp_server_name" in case.path_parameters and case.method == case.operation.method.upper():
        aim_by_name(case, operation, roll)
    called = re.fullmatch(r"(?:update|delete)_mcp_server_called_(\w+)", operation)
    if called and roll % 4:
        register_by_name(called[1])
    if operation in ("test_mcp_server", "connect_mcp_server") and roll % 2 and case.meta.generation.mode.is_positive:
        case.body = {"server_name": "live", "type": "streamable_http", "server_url": GIVEN["upstream"]}
    if operation == "portolan_import" and case.method == case.operation.method.upper():
        aim_import(case, roll)


@schemathesis.hook
def after_call(_context, case, response):
    if case.method != case.operation.method.upper():
        return
    operation = case.operation.definition.raw["operationId"]
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    counts[operation][str(response.status_code)] += 1
    if positive:
        counts[operation][f"valid {response.status_code}"] += 1
    if operation == "mcp_run_tool" and response.status_code == 200:
        counts[operation][response.json()["status"]] += 1
    # A server that was tried a moment ago is not tried again yet: a 503, and which of the two comes is a matter of time.
    if operation == "mcp_run_tool" and response.status_code in (502, 503):
        counts[operation]["no session"] += 1
    if operation == "mcp_delete_mcp_server" and response.status_code == 204:
        throwaways.pop(case.path_parameters["mcp_server_id"], None)
    if operation == "add_mcp_server" and response.status_code == 200 and isinstance(case.body, dict):
        by_name.append(str(case.body.get("server_name")).strip())
    if operation.startswith("update_mcp_server") and response.status_code == 200:
        by_name.append(response.json()["server_name"])
    if response.status_code == 200 and operation in ("mcp_create_mcp_server", "mcp_update_mcp_server"):
        server = response.json()
        if server["id"] not in KEPT:
            keep_as_throwaway(server["id"], server["mcp_server_type"] == "stdio")
        for kept in [*LIVE, GONE]:
            if kept["id"] == server["id"]:
                kept["name"] = server["server_name"]


@schemathesis.hook
def filter_failure(_context, failure, case, response):
    """No session with a server that is not live is a 502 or 503 by contract, not a fault; nor is a 431 for a target that is
    too long, which the document has once for the whole server."""
    if response.status_code == 431 and len(response.request.url) > 30_000:
        return False
    operation = case.operation.definition.raw["operationId"]
    is_run = operation in ("mcp_run_tool", "execute_mcp_tool", "list_mcp_tools_by_server", "test_mcp_server") or (
        operation.startswith("add_mcp_tool")
    )
    given = case.path_parameters
    live = given.get("mcp_server_id") in {it["id"] for it in LIVE} or (
        given.get("mcp_server_name") in {it["name"] for it in LIVE}
    )
    return not (isinstance(failure, ServerError) and is_run and not live and response.status_code in (502, 503))


@atexit.register
def write_counts():
    with open(GIVEN["counts"], "w") as file:
        json.dump(counts, file)
