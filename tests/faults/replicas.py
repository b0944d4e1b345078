"""Two replicas over one PostgreSQL: what is changed at one is honoured by the other."""

import asyncio
import time

from postgres import Cluster
from proxy import Backend, Frontend, Proxy
from upstream import tools
from world import SLACK, Portolan, Upstream, figures, percentile, require, run_body, run_path

HONOURED_WITHIN = 2.0
WITHOUT_LISTEN = 15.0


class Change:
    """One server, changed at the first replica again and again, and watched through the second."""

    def __init__(self, world, upstream, first, second, key, pause, limit):
        self.world, self.upstream, self.key, self.pause, self.limit = world, upstream, key, pause, limit
        self.first, self.second = first.client, second.client
        self.number = 0
        self.times = []
        # Credentials that are over: {credential: when that was acknowledged, by the clock of the upstream's log}.
        self.ended = {}
        self.wrong = []

    def config(self):
        return self.world.http_config(self.upstream.port, self.key, self.number)

    async def create(self):
        self.number += 1
        self.id, _ = await self.first.register(f"{self.key} {self.number}", self.config())

    async def honoured(self, what, began, check):
        """Asks the second replica until `check` holds of its answer."""
        while True:
            answer = await check()
            took = time.monotonic() - began
            if answer:
                self.times.append(took)
                return
            if took > self.limit + 10:
                self.times.append(took)
                self.wrong.append(f"{what} of {self.key} was not honoured in {took:.0f} s")
                return
            await asyncio.sleep(self.pause)

    async def run(self):
        """The credential that a run through the second replica brings to the upstream: None when no call was made."""
        answer = await self.second.ask("GET", f"/v1/mcp-servers/{self.id}/tools")
        if answer.status != 200 or not answer.json():
            return None
        call, body = run_body()
        answer = await self.second.ask("POST", run_path(self.id, answer.json()[0]["id"]), body)
        require(answer.status in (200, 404, 502, 503), "a run was answered", answer)
        return next((it["token"] for it in reversed(self.upstream.calls()) if it.get("id") == call), None)

    async def runs_with_the_new(self):
        return await self.run() == f"Bearer token-{self.key}-{self.number}"

    async def known(self):
        return (await self.second.ask("GET", f"/v1/mcp-servers/{self.id}")).status == 200

    async def unknown(self):
        await self.run()
        return (await self.second.ask("GET", f"/v1/mcp-servers/{self.id}")).status == 404

    async def named(self):
        answer = await self.second.ask("GET", f"/v1/mcp-servers/{self.id}")
        return answer.json().get("server_name") == self.name

    async def lists(self):
        answer = await self.second.ask("GET", f"/v1/mcp-servers/{self.id}/tools")
        return [tool["name"] for tool in answer.json()] == tools(self.number)

    async def change(self):
        what = self.world.rng.choices(("key", "rename", "delete", "refresh"), (5, 2, 2, 2))[0]
        old = f"Bearer token-{self.key}-{self.number}"
        if what == "delete":
            # In use there until then.
            await self.run()
            answer = await self.first.ask("DELETE", f"/v1/mcp-servers/{self.id}")
            require(answer.status == 204, "a delete was answered", answer)
            self.ended[old] = time.time()
            await self.honoured(what, time.monotonic(), self.unknown)
            await self.create()
            await self.honoured("a create", time.monotonic(), self.known)
            return
        if what == "rename":
            self.name = f"{self.key} {self.number} {time.monotonic_ns()}"
            body, check = {"server_name": self.name, "config": {}}, self.named
        else:
            self.number += 1
            body, check = {"config": self.config()}, self.runs_with_the_new
        answer = await self.first.ask("PATCH", f"/v1/mcp-servers/{self.id}", body)
        require(answer.status == 200, f"a change ({what}) was answered", answer)
        if what != "rename":
            self.ended[old] = time.time()
        if what == "refresh":
            answer = await self.first.ask("PATCH", f"/v1/mcp-servers/{self.id}/refresh")
            require(answer.status == 200, "a refresh was answered", answer)
            check = self.lists
        await self.honoured(what, time.monotonic(), check)
        if what == "refresh":
            # Its key is new as well.
            await self.run()


async def phase(world, upstream, first, second, name, changes, at_once, pause, limit):
    """So many changes, and what is to be said of them."""
    began = time.monotonic()
    servers = [Change(world, upstream, first, second, f"{name}{index}", pause, limit) for index in range(at_once)]
    left = iter(range(changes))

    async def work(server):
        await server.create()
        await server.honoured("a create", time.monotonic(), server.known)
        for _ in left:
            await server.change()

    await asyncio.gather(*map(work, servers))
    times = [took for server in servers for took in server.times]
    # Whatever is left over shows itself.
    await asyncio.sleep(1)
    for server in servers:
        await server.run()
    ended = {token: at for server in servers for token, at in server.ended.items()}
    late = [(it["at"] - ended[it["token"]], it["token"]) for it in upstream.calls() if it.get("token") in ended]
    latest = max(late, default=(0, ""))
    told = (
        f"{name}: {len(times)} changes in {time.monotonic() - began:.0f} s, honoured: {figures(times)}; "
        f"{len(ended)} keys ended, the last use of one {max(latest[0], 0):.2f} s after"
    )
    wrong = [it for server in servers for it in server.wrong]
    if percentile(times, 0.99) > limit:
        wrong.append(f"the 99th percentile is {percentile(times, 0.99):.2f} s, not {limit:.0f} s")
    if max(times) > WITHOUT_LISTEN + SLACK:
        wrong.append(f"one took {max(times):.2f} s")
    # The first clock is read before the answer has come back, so that no call seems later than it was.
    if latest[0] > limit + SLACK:
        wrong.append(f"{latest[1]} was used {latest[0]:.2f} s after its end")
    return told, [f"{name}: {it}" for it in wrong]


async def replicas(world):
    changes = 1_000 if world.long else 100
    upstream = await Upstream(world, "upstream").start()
    cluster = await Cluster(world).make()
    cut_off = dropped = 0

    def refused():
        nonlocal cut_off
        cut_off += 1

    def kept_back():
        nonlocal dropped
        dropped += 1

    deaf = await Proxy(cluster.port, world.rng, lambda: (None, Backend(kept_back))).start()
    refusing = await Proxy(cluster.port, world.rng, lambda: (Frontend(refused), None)).start()
    first = Portolan(world, "first", cluster.url())
    second = Portolan(world, "second", cluster.url())
    pooled = Portolan(world, "pooled", cluster.url(refusing.port))
    unheard = Portolan(world, "unheard", cluster.url(deaf.port))
    told, wrong = [], []
    await first.start()
    try:
        for other, name, at_once, pause, limit in (
            (second, "listening", 8, 0.02, HONOURED_WITHIN),
            (pooled, "LISTEN-refused", 60, 0.25, WITHOUT_LISTEN),
            (unheard, "NOTIFY-dropped", 60, 0.25, WITHOUT_LISTEN),
        ):
            await other.start()
            more, bad = await phase(world, upstream, first, other, name, changes, at_once, pause, limit)
            told.append(more)
            wrong += bad
            await other.stop()
    finally:
        await deaf.stop()
        await refusing.stop()
    await first.stop()
    if not cut_off or not dropped:
        wrong.append("nobody listened, so that nobody was cut off: this has shown nothing")
    told.append(f"{cut_off} LISTEN refused, {dropped} notifications kept back")
    require(not wrong, "; ".join(wrong), "(" + "; ".join(told) + ")")
    return "; ".join(told)
