"""PostgreSQL that restarts, ends its connections, stops to answer, has no room, is slow, or is not understood."""

import asyncio
import contextlib
import time
import uuid
from collections import Counter

from ledger import Entry, Ledger
from postgres import Cluster, Refused
from proxy import Proxy
from world import SLACK, Failed, Portolan, Upstream, require, run_body

ANSWERED_WITHIN = 5.0
# A run with a key is written down before it and after it: 4 s for the one, 2 s for the other.
KEYED_WITHIN = 6.0
SERVED_WITHIN = 3.0
SUCCESS = {
    "create": 200, "patch": 200, "delete": 204, "refresh": 200, "tools": 200, "run": 200, "retrieve": 200, "list": 200,
    "ready": 200, "health": 200, "keyed": 200, "retry": 200,
}
# What a repetition is answered whose first try was not 200: 409 where nobody can know whether it was made.
OF_AGAIN = (200, 409, 503)


class Load:
    """Writers, readers and runs, one after another each, until it is stopped."""

    def __init__(self, world, portolan, ledger, damaged):
        self.world, self.portolan, self.ledger, self.damaged = world, portolan, ledger, damaged
        self.stop = asyncio.Event()
        self.tasks = []
        # The arguments of runs that are one run, however often they are asked for.
        self.once = set()

    async def begin(self):
        client, rng = self.portolan.client, self.world.rng
        self.server, run = await client.register("k0 1", self.world.http_config(self.ledger.port, "k0", 1))
        # Known to the ledger like all others, and touched by nobody.
        self.ledger.entries.append(Entry("k0", "http", self.server, {1}, 1, 1))
        writers = [[] for _ in range(4)]
        self.tasks = [
            asyncio.create_task(it)
            for it in (
                *(self.ledger.write_until(client, self.stop, mine, rng, 0.01) for mine in writers),
                self._repeat("retrieve", "GET", f"/v1/mcp-servers/{self.server}"),
                self._repeat("list", "GET", "/v1/mcp-servers/"),
                self._repeat("ready", "GET", "/v1/ready"),
                self._repeat("health", "GET", "/v1/health"),
                *(self._repeat("run", "POST", run, True) for _ in range(3)),
                self._repeat_once("keyed", run, lambda: {"idempotency_key": uuid.uuid4().hex}),
                self._repeat_once("retry", run, lambda: {"x_stainless_retry_count": "1"}),
            )
        ]

    async def _repeat(self, what, method, path, body=None):
        while not self.stop.is_set():
            arguments = run_body()[1] if body else None
            answer = await self.ledger.ask(self.portolan.client, what, method, path, arguments)
            if what == "run":
                self._judge(answer)
            await asyncio.sleep(0.02)

    async def _repeat_once(self, what, path, naming):
        """Runs that say which they are, each again as a client does that was not answered with success."""
        while not self.stop.is_set():
            call, body = run_body()
            self.once.add(call)
            headers = naming()
            for turn in range(3):
                said = what if turn == 0 else f"{what} again"
                answer = await self.ledger.ask(self.portolan.client, said, "POST", path, body, **headers)
                self._judge(answer)
                if self.stop.is_set() or (answer is not None and answer.status == 200):
                    break
                await asyncio.sleep(1)
            await asyncio.sleep(0.05)

    def _judge(self, answer):
        if answer is not None and answer.status == 200 and answer.json()["status"] != "success" and not self.damaged():
            self.ledger.wrong.append(f"a run failed, and its server is well: {answer}")

    def made_twice(self, calls):
        """Which of the runs that are one run the upstream saw more than once, and how many it saw."""
        seen = Counter(it["id"] for it in calls if it.get("id") in self.once)
        return [call for call, times in seen.items() if times > 1], len(seen)

    async def end(self):
        self.stop.set()
        done = await asyncio.gather(*self.tasks, return_exceptions=True)
        for it in done:
            if isinstance(it, BaseException):
                raise it


# What is damaged and still looks like an answer is taken for one: for a row that is no row, or another one, or not there.
ALLOWED = {"corrupt": (503, 500, 409, 404)}


def judge(asked, faults, odd):
    """What of the answers was not as promised. `faults` are (name, beginning, end); between them all must be well. `odd` are
    answers by their beginnings."""
    wrong = []
    for what, began, took, status in asked:
        during = next((it for it in faults if it[1] <= began + took and began < it[2] + SERVED_WITHIN), None)
        at = "without a fault"
        if during:
            at = f"in {during[0]!r}, {began - during[1]:+.1f} s (it took {during[2] - during[1]:.1f} s)"
        if began in odd:
            at += f": {odd[began]}"
        within = KEYED_WITHIN if what.startswith("keyed") else ANSWERED_WITHIN
        if took > within + SLACK or status == "never":
            wrong.append(f"{what} took {took:.1f} s ({status}) {at}")
        elif what.endswith(" again"):
            if status not in OF_AGAIN:
                wrong.append(f"{what} was {status} after {took:.1f} s {at}")
        elif status != SUCCESS[what] and (during is None or status not in ALLOWED.get(during[0], (503,))):
            wrong.append(f"{what} was {status} after {took:.1f} s {at}")
    return wrong


def tell(asked, faults):
    """A figure for each fault."""
    told = []
    for name in dict.fromkeys(fault[0] for fault in faults):
        mine = [fault for fault in faults if fault[0] == name]
        met = [
            (what, began, took, status) for what, began, took, status in asked
            if any(begin <= began + took and began < end + SERVED_WITHIN for _, begin, end in mine)
        ]
        refused = sum(status == 503 for *_, status in met)
        # Until the next one begins, which has refusals of its own.
        back = [(0.0, "")]
        for _, begin, end in mine:
            then = min((other for _, other, _ in faults if other > begin), default=end + 15)
            back += [
                (began + took - end, f" ({what}, asked {began - end:+.1f} s)")
                for what, began, took, status in met if status == 503 and begin <= began and began + took < then
            ]
        slowest = max((took for _, _, took, _ in met), default=0)
        told.append(
            f"{name} x{len(mine)}: {len(met)} asked, {refused} x 503, slowest {slowest:.1f} s, "
            f"the last 503 {max(back)[0]:.1f} s after{max(back)[1]}"
        )
    return "; ".join(told)


class Faults:
    """Each is a coroutine that makes a fault, and is over when the fault is."""

    def __init__(self, world, cluster, proxy):
        self.world, self.cluster, self.proxy, self.long = world, cluster, proxy, world.long

    async def restart(self):
        await self.cluster.stop_at_once()
        await asyncio.sleep(self.world.rng.uniform(0, 1))
        await self.cluster.start()

    async def terminate(self):
        for _ in range(10 if self.long else 3):
            await self.cluster.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'portolan'"
            )
            await asyncio.sleep(self.world.rng.uniform(0, 0.5))

    async def _for_a_while(self, seconds):
        await asyncio.sleep(seconds * (2 if self.long else 1))
        self.proxy.mend()

    async def black_hole(self):
        self.proxy.stall()
        await self._for_a_while(8)

    async def black_hole_then_cut(self):
        self.proxy.stall()
        await asyncio.sleep(8)
        self.proxy.cut()
        self.proxy.mend()

    async def cut(self):
        for _ in range(5):
            self.proxy.cut()
            await asyncio.sleep(self.world.rng.uniform(0, 0.3))

    async def refuse(self):
        self.proxy.refuses = True
        self.proxy.cut()
        await self._for_a_while(4)

    async def exhaust(self):
        """Others have all the connections, also those that were Portolan's."""
        held, over = [], asyncio.Event()

        async def eat():
            while not over.is_set():
                try:
                    held.append(await self.cluster.connect("portolan", "portolan"))
                except (Refused, OSError):
                    await asyncio.sleep(0.005)

        eaters = [asyncio.create_task(eat()) for _ in range(8)]
        await asyncio.sleep(0.3)
        await self.cluster.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'portolan'"
        )
        await asyncio.sleep(7)
        over.set()
        await asyncio.gather(*eaters)
        require(len(held) > self.cluster.MAX_CONNECTIONS / 2, f"only {len(held)} connections were had: this has shown nothing")
        for it in held:
            it.close()
        # The server notices in its own time.
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(Refused, OSError):
                    (await self.cluster.connect("portolan", "portolan")).close()
                    return
                await asyncio.sleep(0.02)

    async def slow(self):
        # 0.2 s for each question; a create has a dozen.
        self.proxy.delay = 0.1
        await self._for_a_while(6)

    async def drip(self):
        self.proxy.rate = 4_000
        await self._for_a_while(6)

    async def corrupt(self):
        """What PostgreSQL answers is damaged; what it is asked is not, or else it would keep what nobody wrote."""
        self.proxy.corrupt = (0.0, 0.3)
        await self._for_a_while(6)
        require(self.proxy.flipped, "no byte was damaged: this has shown nothing")
        # Connections that have lost their thread are the proxy's fault as well.
        self.proxy.cut()


async def faults_of_postgres(world):
    upstream = await Upstream(world, "upstream").start()
    cluster = await Cluster(world).make()
    proxy = await Proxy(cluster.port, world.rng).start()
    portolan = Portolan(world, "portolan", cluster.url(proxy.port))
    await portolan.start()
    ledger = Ledger(world, upstream.port)
    ledger.strict = False
    load, made = Load(world, portolan, ledger, lambda: any(proxy.corrupt)), Faults(world, cluster, proxy)
    await load.begin()
    # With memory and connections warm.
    await asyncio.sleep(2)
    schedule = []
    if world.long:
        schedule += [(made.restart, 20)] * 15
    else:
        schedule += [(made.restart, 8)] * 2
    schedule += [
        (it, 5) for it in (
            made.terminate, made.cut, made.refuse, made.black_hole, made.black_hole_then_cut, made.exhaust, made.slow,
            made.drip, made.corrupt,
        )
    ]
    faults = []
    try:
        for make, period in schedule:
            began = time.monotonic()
            await make()
            faults.append((make.__name__.replace("_", " "), began, time.monotonic()))
            # So that there is something to see between them.
            await asyncio.sleep(max(period - (time.monotonic() - began), SERVED_WITHIN + 1.5))
            require(portolan.runs, f"Portolan has ended in {make.__name__}")
    finally:
        await load.end()
    told = f"{len(ledger.asked)} asked, {ledger.acknowledged} acknowledged writes, {ledger.unsure} unsure; "
    told += tell(ledger.asked, faults)
    wrong = judge(ledger.asked, faults, ledger.odd)
    twice, once = load.made_twice(upstream.calls())
    told += f"; {once} runs with a key or of a second try, none made twice"
    wrong += [f"the run {call} was made twice" for call in twice]
    # Whoever comes now comes by another way.
    portolan.env["DATABASE_URL"] = cluster.url()
    await portolan.stop()
    await proxy.stop()
    await portolan.start()
    try:
        await ledger.check(portolan.client)
    except Failed as failure:
        wrong.insert(0, str(failure))
    await portolan.stop()
    require(not wrong, f"{len(wrong)} wrong:", "; ".join(wrong[:40]), f"({told})")
    require(once > 50, "hardly a run with a key: this has shown nothing")
    require(ledger.acknowledged > 50, "hardly a write: this has shown nothing")
    return told
