"""The clock is set a day back and forth, by libfaketime; time that only runs stays as it is."""

import asyncio
import glob
import os
import time
import uuid
from datetime import datetime

from postgres import Cluster
from world import Failed, Portolan, Upstream, require, run_body, until

FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"
SETTLES_WITHIN = 3.0


class Clock:
    """A Portolan's own clock."""

    def __init__(self, world, name):
        found = glob.glob(FAKETIME)
        require(found, "libfaketime is missing: install it (Debian: apt-get install --no-install-recommends faketime)")
        self.file = world.folder / f"{name}.clock"
        self.settings = {
            "LD_PRELOAD": found[0], "FAKETIME_TIMESTAMP_FILE": str(self.file), "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
        }
        self.set(0)

    def set(self, hours):
        new = self.file.with_suffix(".new")
        new.write_text(f"{hours:+d}h\n")
        os.replace(new, self.file)


async def clock(world):
    upstream = await Upstream(world, "upstream").start()
    url = (await Cluster(world).make()).url() if world.database == "postgres" else None
    own = Clock(world, "clock")
    portolan = Portolan(world, "portolan", url, **own.settings, PORTOLAN_IDLE_TIMEOUT="30m")
    # On the time of everybody else.
    other = Portolan(world, "other", url) if url else None
    await portolan.start()
    if other:
        await other.start()
    client = portolan.client
    servers = {}
    signed = world.http_config(upstream.port, "signed", 1)
    for field in ("auth_header", "auth_token"):
        del signed[field]
    signed["oauth"] = {"client_id": "faults", "client_secret": "faults-secret", "grant_type": "client_credentials"}
    configs = {"http": world.http_config(upstream.port, "c", 1), "stdio": world.stdio_config(1), "signed": signed}
    for name, config in configs.items():
        servers[name] = await client.register(name, config)
    wrong, told = [], []

    async def well(what, replica=portolan):
        """All servers run, within a moment."""
        for name, (_, path) in servers.items():
            began = time.monotonic()
            while True:
                answer, fine = await replica.client.runs_well(path)
                if fine:
                    break
                if time.monotonic() - began > SETTLES_WITHIN:
                    wrong.append(f"{what}: a run of {name} is answered {answer}")
                    break
                await asyncio.sleep(0.1)
        for path in ("/v1/health", "/v1/ready", "/v1/mcp-servers/"):
            answer = await replica.client.ask("GET", path)
            if answer.status != 200:
                wrong.append(f"{what}: {path} is answered {answer}")
        if not replica.runs:
            raise Failed(f"{what}: Portolan has ended:\n{replica.said()}")

    async def logged():
        answer = await client.ask("GET", "/v1/portolan/runs?limit=100")
        require(answer.status == 200, "the run log was answered", answer)
        return answer.json()

    async def keyed(replica, key, body):
        answer = await replica.client.ask("POST", servers["http"][1], body, idempotency_key=key)
        if answer.status != 200 or answer.json()["status"] != "success":
            wrong.append(f"a run with a key is answered {answer}")
        return answer

    await well("at first")
    key = uuid.uuid4().hex
    call, body = run_body()
    await keyed(portolan, key, body)
    hours = [23, -24, 24, -23, 0] if world.long else [23, -24, 0]
    for shift in hours:
        what = f"{shift:+d} h"
        own.set(shift)
        # Shown by a write, or else the clock was not set at all.
        config = world.http_config(upstream.port, "shift", 1)
        made = await client.ask("POST", "/v1/mcp-servers/", {"server_name": what, "config": config})
        require(made.status == 200, "a create was answered", made)
        at = datetime.fromisoformat(made.json()["created_at"].replace("Z", "+00:00")).timestamp()
        ahead = at - time.time()
        require(abs(ahead - shift * 3600) < 60, f"the clock was not set by {what}: it is {ahead:.0f} s ahead")
        await well(what)
        # A day is the whole of a key's life.
        if shift < 24:
            await keyed(portolan, key, body)
        deleted = await client.ask("DELETE", f"/v1/mcp-servers/{made.json()['id']}")
        require(deleted.status == 204, "a delete was answered", deleted)
        if other:
            await two_clocks(world, what, portolan, other, servers, upstream, wrong)
            await well(f"{what}, the other", other)
        # A start at that time, too.
        await portolan.stop()
        await portolan.start()
        await well(f"{what}, after a start")
        told.append(what)
    made = sum(it.get("id") == call for it in upstream.calls())
    if made != 1:
        wrong.append(f"a key's run was made {made} times over {len(hours)} starts and settings of the clock")
    issued = sum("issued" in it for it in upstream.calls())
    rows = (await logged())
    require(rows, "the run log is empty")
    await portolan.stop()
    if other:
        await other.stop()
    require(not wrong, "; ".join(wrong))
    return f"{', '.join(told)}; {issued} tokens were asked for"


async def two_clocks(world, what, shifted, right, servers, upstream, wrong):
    """Replicas whose clocks are apart: what one changes the other honours, and a key that one uses the other knows."""
    key = uuid.uuid4().hex
    call, body = run_body(1_500)
    first = asyncio.create_task(shifted.client.ask("POST", servers["http"][1], body, idempotency_key=key))
    await until("the call is made", lambda: any(it.get("id") == call for it in upstream.calls()))
    second = await right.client.ask("POST", servers["http"][1], body, idempotency_key=key)
    await first
    third = await right.client.ask("POST", servers["http"][1], body, idempotency_key=key)
    made = sum(it.get("id") == call for it in upstream.calls())
    if made != 1:
        wrong.append(f"{what}: a key's run was made {made} times by two replicas ({second}, {third})")
    id = servers["stdio"][0]
    for one, another in ((shifted, right), (right, shifted)):
        name = f"stdio {time.monotonic_ns()}"
        answer = await one.client.ask("PATCH", f"/v1/mcp-servers/{id}", {"server_name": name, "config": {}})
        if answer.status != 200:
            wrong.append(f"{what}: a change is answered {answer}")
            continue

        async def honoured():
            answer = await another.client.ask("GET", f"/v1/mcp-servers/{id}")
            return answer.status == 200 and answer.json()["server_name"] == name

        try:
            await until("honoured", honoured, 15)
        except Failed:
            wrong.append(f"{what}: a change is not honoured within 15 s")
