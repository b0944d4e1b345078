"""Two replicas over one PostgreSQL: what is changed at one is honoured by the runs of the other.

What is asked of the database each time, as all lists are, is right at once whatever replicas hear of each other. Only runs use
what a replica remembers, so it is runs that are judged: each is of a tool whose path was known before the change.
"""

import asyncio
import time

from postgres import Cluster
from proxy import Backend, Frontend, Proxy
from world import SLACK, Portolan, Upstream, figures, percentile, require, run_body, run_path, until

HONOURED_WITHIN = 2.0
WITHOUT_LISTEN = 15.0
# What a run shows, and how often each is done.
KINDS = {"token": 4, "URL": 2, "tool gone": 2, "delete": 2}


class Change:
    """One server, changed at the first replica again and again, and run through the second."""

    def __init__(self, world, upstream, first, second, key, pause, limit):
        self.world, self.upstream, self.key, self.pause, self.limit = world, upstream, key, pause, limit
        self.first, self.second = first.client, second.client
        # Counted up and never used again: of URLs, lists of tools and tokens.
        self.url = self.list = self.token = self.name = 0
        # {kind: how long each took until it was honoured}, in runs and in what is read from the database.
        self.runs = {kind: [] for kind in KINDS}
        self.reads = []
        # What no call may use any more: {it: [when that was acknowledged, when it was honoured]}, by the log's clock.
        self.ended = {}
        self.wrong = []

    def version(self):
        return f"{self.key}-{self.url}", self.list, f"Bearer token-{self.key}-{self.token}"

    def config(self):
        key, number, token = self.version()
        return {
            "mcp_server_type": "streamable_http", "server_url": f"http://127.0.0.1:{self.upstream.port}/{key}/list/{number}",
            "auth_header": "Authorization", "auth_token": token,
        }

    def path_of(self, more=""):
        return f"/v1/mcp-servers/{self.id}{more}"

    async def create(self):
        self.token += 1
        self.id, _ = await self.first.register(f"{self.key} {self.token}", self.config())
        await self.honoured("a create", time.monotonic(), self.known, self.reads)
        await self.meet()

    async def meet(self):
        """Learns the path of a tool from the second replica, and has it remembered there by a run."""
        answer = await self.second.ask("GET", self.path_of("/tools"))
        require(answer.status == 200 and answer.json(), "the tools were answered", answer)
        self.tool = answer.json()[0]["name"]
        self.path = run_path(self.id, answer.json()[0]["id"])
        require(await self.runs_as_it_is(), f"a run of {self.key} is not what it should be at once")

    async def honoured(self, what, began, check, times):
        """Asks the second replica until `check` holds of its answer."""
        while not await check():
            if time.monotonic() - began > self.limit + 10:
                self.wrong.append(f"{what} of {self.key} was not honoured in {self.limit + 10:.0f} s")
                break
            await asyncio.sleep(self.pause)
        times.append(time.monotonic() - began)

    async def run(self):
        """A run of the known path through the second replica: its status, and what the upstream wrote down of it, if anything."""
        call, body = run_body()
        answer = await self.second.ask("POST", self.path, body)
        require(answer.status in (200, 404, 502, 503), "a run was answered", answer)
        return answer.status, next((it for it in reversed(self.upstream.calls()) if it.get("id") == call), None)

    async def runs_as_it_is(self):
        _, made = await self.run()
        return made is not None and (made["key"], made["list"], made["token"]) == self.version()

    async def runs_no_more(self):
        return (await self.run())[0] == 404

    async def known(self):
        return (await self.second.ask("GET", self.path_of())).status == 200

    async def named(self):
        answer = await self.second.ask("GET", self.path_of())
        return answer.json().get("server_name") == self.name

    async def ask_first(self, method, path, body=None, success=200):
        answer = await self.first.ask(method, path, body)
        require(answer.status == success, f"{method} was answered", answer)
        return time.time()

    async def change(self):
        what = self.world.rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        over, tool = [self.version()], None
        if what == "delete":
            acknowledged = await self.ask_first("DELETE", self.path_of(), success=204)
            check = self.runs_no_more
        else:
            if what == "token":
                self.token += 1
            elif what == "URL":
                self.url += 1
            else:
                self.list += 1
            acknowledged = await self.ask_first("PATCH", self.path_of(), {"config": self.config()})
            check = self.runs_as_it_is
        if what == "tool gone":
            # The list that has it no more is that of the new URL.
            tool = (self.key, self.tool)
            self.ended[tool] = [await self.ask_first("PATCH", self.path_of("/refresh")), None]
            over.append(tool)
            check = self.runs_no_more
        self.ended[over[0]] = [acknowledged, None]
        await self.honoured(what, time.monotonic(), check, self.runs[what])
        for it in over:
            self.ended[it][1] = time.time()
        if what in ("delete", "tool gone"):
            for _ in range(3):
                status, made = await self.run()
                if status != 404 or made:
                    self.wrong.append(f"a run after the 404 of {what} was {status} ({made})")
        if what == "delete":
            await self.create()
        elif what == "tool gone":
            await self.meet()
        if self.world.rng.random() < 0.2:
            self.name = f"{self.key} {time.monotonic_ns()}"
            await self.ask_first("PATCH", self.path_of(), {"server_name": self.name, "config": {}})
            await self.honoured("a rename", time.monotonic(), self.named, self.reads)

    def judge(self, calls):
        """The longest time after an end that a call used what was over. `calls` are those of this server."""
        latest = 0.0
        for it in calls:
            for used in ((it["key"], it["list"], it["token"]), (self.key, it["tool"])):
                acknowledged, honoured = self.ended.get(used, (None, None))
                if acknowledged is None:
                    continue
                # That clock is read once the answer is here, so that no call seems later than it was.
                late = it["at"] - acknowledged
                latest = max(latest, late)
                if late > self.limit + SLACK:
                    self.wrong.append(f"{used} was used {late:.2f} s after its end")
                if honoured is not None and it["at"] > honoured:
                    self.wrong.append(f"{used} was used after it was seen to be over")
        return latest


async def phase(world, upstream, first, second, name, changes, at_once, pause, limit, listening):
    """So many changes, and what is to be said of them."""
    began = time.monotonic()
    servers = [Change(world, upstream, first, second, f"{name}{index}", pause, limit) for index in range(at_once)]
    left = iter(range(changes))
    ages, states = [], set()

    async def follows():
        metrics = await second.metrics()
        # The first read has ended, and what comes after LISTEN is known.
        return metrics["portolan_changes_listening"] == listening and metrics["portolan_changes_age_seconds"] < 1

    await until(f"{name} follows, and listens or not as it should", follows)

    async def work(server):
        await server.create()
        for _ in left:
            await server.change()

    async def watch():
        while True:
            metrics = await second.metrics()
            ages.append(metrics["portolan_changes_age_seconds"])
            states.add(metrics["portolan_changes_listening"] == 1)
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    async with asyncio.TaskGroup() as group:
        for server in servers:
            group.create_task(work(server))
    require(not watching.done(), "the metrics were not answered:", watching)
    watching.cancel()
    # Whatever is left over shows itself.
    await asyncio.sleep(1)
    for server in servers:
        await server.run()
    mine = {}
    for it in upstream.calls():
        if "key" in it:
            mine.setdefault(it["key"].rpartition("-")[0], []).append(it)
    latest = max(server.judge(mine.get(server.key, [])) for server in servers)
    wrong = [it for server in servers for it in server.wrong]
    runs = {kind: [took for server in servers for took in server.runs[kind]] for kind in KINDS}
    reads = [took for server in servers for took in server.reads]
    slowest = max(max(times, default=0) for times in runs.values())
    told = (
        f"{name}: {sum(map(len, runs.values()))} changes in {time.monotonic() - began:.0f} s, honoured by runs: "
        + ", ".join(f"{len(times)} x {kind} {figures(times)}" for kind, times in runs.items())
        + f"; by lists: {len(reads)} x {figures(reads)}; {sum(len(it.ended) for it in servers)} things ended, "
        f"the last use of one {latest:.2f} s after; {max(ages):.1f} s without news at most"
    )
    for kind, times in runs.items():
        if not times:
            wrong.append(f"no change was of the kind {kind}: this has shown nothing")
        elif percentile(times, 0.99) > limit:
            wrong.append(f"the 99th percentile of {kind} is {percentile(times, 0.99):.2f} s, not {limit:.0f} s")
    if slowest > WITHOUT_LISTEN + SLACK:
        wrong.append(f"one took {slowest:.2f} s")
    if limit == WITHOUT_LISTEN and slowest < 1:
        wrong.append("nothing was remembered for as much as a second: this has shown nothing")
    if states != {listening}:
        wrong.append(f"it listens: {states}, not always {listening}")
    if max(ages) >= WITHOUT_LISTEN:
        wrong.append(f"it was without news for {max(ages):.1f} s")
    return told, [f"{name}: {it}" for it in wrong]


async def replicas(world):
    upstream = await Upstream(world, "upstream").start()
    cluster = await Cluster(world).make()
    counts = {"LISTEN refused": 0, "NOTIFY refused": 0, "notifications kept back": 0}

    def count(what):
        def one_more():
            counts[what] += 1

        return one_more

    def refuses(what, text):
        return lambda: (Frontend(count(what), text), None)

    no_listen = await Proxy(cluster.port, world.rng, refuses("LISTEN refused", b"LISTEN ")).start()
    no_notify = await Proxy(cluster.port, world.rng, refuses("NOTIFY refused", b"SELECT PG_NOTIFY(")).start()
    deaf = await Proxy(cluster.port, world.rng, lambda: (None, Backend(count("notifications kept back")))).start()
    first = Portolan(world, "first", cluster.url())
    mute = Portolan(world, "mute", cluster.url(no_notify.port))
    second = Portolan(world, "second", cluster.url())
    pooled = Portolan(world, "pooled", cluster.url(no_listen.port))
    unheard = Portolan(world, "unheard", cluster.url(deaf.port))
    changes, fewer, at_once = (1_000, 300, 60) if world.long else (100, 60, 30)
    told, wrong = [], []
    try:
        for changed, other, name, *how in (
            (first, second, "listening", changes, 8, 0.02, HONOURED_WITHIN, True),
            (first, pooled, "LISTEN-refused", fewer, at_once, 0.25, WITHOUT_LISTEN, False),
            (first, unheard, "NOTIFY-dropped", fewer, at_once, 0.25, WITHOUT_LISTEN, True),
            (mute, second, "NOTIFY-refused", fewer, at_once, 0.25, WITHOUT_LISTEN, True),
        ):
            await changed.start()
            await other.start()
            more, bad = await phase(world, upstream, changed, other, name, *how)
            told.append(more)
            wrong += bad
            await other.stop()
            await changed.stop()
    finally:
        for proxy in (no_listen, no_notify, deaf):
            await proxy.stop()
    if not all(counts.values()):
        wrong.append("a fault did not take place: this has shown nothing")
    told.append(", ".join(f"{count} x {what}" for what, count in counts.items()))
    require(not wrong, f"{len(wrong)} wrong:", "; ".join(wrong[:30]), "(" + "; ".join(told) + ")")
    return "; ".join(told)
