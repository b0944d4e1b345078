"""A fault every 15 s, and what Portolan holds meanwhile: memory, descriptors, threads and children stay as they are."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections import Counter

from postgres import Cluster
from proxy import Proxy
from world import PYTHON, Portolan, Upstream, below, percentile, read_proc, require, run_body

EVERY = 15.0
STDIO, HTTP = 3, 4
# How many runs succeed at least between two faults, also in the short form, where a third of the time is the fault.
LEAST = 10


class Load:
    """Runs, reads and writes, from the beginning to the end. Each is answered; what with, is counted."""

    def __init__(self, world, portolan, paths, ids):
        self.world, self.portolan, self.paths, self.ids = world, portolan, paths, ids
        self.stop = asyncio.Event()
        self.statuses, self.times, self.wrong = Counter(), [], []
        # Runs whose tool has answered.
        self.good = 0

    async def ask(self, what, *arguments, **more):
        try:
            answer = await self.portolan.client.ask(*arguments, patience=20, **more)
        except OSError as error:
            self.wrong.append(f"{what}: {error or type(error).__name__}")
            await asyncio.sleep(0.5)
            return None
        self.times.append(answer.seconds)
        self.statuses[f"{what} {answer.status}"] += 1
        if answer.status >= 500 and answer.status not in (502, 503, 507):
            self.wrong.append(f"{what}: {answer}")
        return answer

    async def run(self):
        while not self.stop.is_set():
            body = run_body(self.world.rng.choice((0, 0, 20)))[1]
            answer = await self.ask("run", "POST", self.world.rng.choice(self.paths), body)
            self.good += answer is not None and answer.status == 200 and answer.json()["status"] == "success"
            await asyncio.sleep(0.02)

    async def look(self):
        while not self.stop.is_set():
            one = f"/v1/mcp-servers/{self.world.rng.choice(self.ids)}"
            await self.ask("read", "GET", self.world.rng.choice(("/v1/mcp-servers/", one, f"{one}/tools", "/v1/ready")))
            await asyncio.sleep(0.05)

    async def write(self, port):
        count = 0
        while not self.stop.is_set():
            count += 1
            body = {"server_name": f"soak {count}", "config": self.world.http_config(port, f"s{count}", 1)}
            answer = await self.ask("write", "POST", "/v1/mcp-servers/", body)
            if answer is not None and answer.status == 200:
                path = f"/v1/mcp-servers/{answer.json()['id']}"
                await self.ask("write", "PATCH", f"{path}/refresh")
                while not self.stop.is_set():
                    gone = await self.ask("write", "DELETE", path)
                    if gone is not None and gone.status in (204, 404):
                        break
                    await asyncio.sleep(0.5)
            await asyncio.sleep(0.2)

    async def leave(self):
        """Clients that go away in the middle of it."""
        while not self.stop.is_set():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.portolan.port)
                writer.write(
                    f"POST {self.world.rng.choice(self.paths)} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
                    "content-type: application/json\r\ncontent-length: 25\r\n\r\n".encode() + b'{"args":{"ms":200}}      '
                )
                await asyncio.sleep(self.world.rng.uniform(0, 0.1))
                writer.transport.abort()
            await asyncio.sleep(0.3)


class Faults:
    def __init__(self, world, portolan, upstream, way, cluster, to_database):
        self.world, self.portolan, self.upstream, self.way = world, portolan, upstream, way
        self.cluster, self.to_database = cluster, to_database
        self.all = [
            self.child_killed, self.upstream_killed, self.upstream_stalled, self.upstream_cut, self.upstream_damaged,
            self.clients_cut,
        ] + ([self.database_restarted, self.database_stalled, self.database_cut] if cluster else [self.database_locked])

    async def child_killed(self):
        for pid in below(self.portolan.pid):
            # Commands and their keepers alike.
            if self.world.rng.random() < 0.7:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def upstream_killed(self):
        await self.upstream.kill()
        await asyncio.sleep(1)
        await self.upstream.start()

    async def _mend(self, proxy, seconds):
        await asyncio.sleep(seconds)
        proxy.mend()
        proxy.cut()

    async def upstream_stalled(self):
        self.way.stall()
        await self._mend(self.way, 3)

    async def upstream_cut(self):
        for _ in range(10):
            self.way.cut()
            await asyncio.sleep(0.1)

    async def upstream_damaged(self):
        self.way.corrupt = (0.1, 0.1)
        await self._mend(self.way, 3)

    async def clients_cut(self):
        """Many clients at once, who leave without a word."""
        writers = []
        for _ in range(200):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.portolan.port)
                writer.write(b"GET /v1/mcp-servers/ HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
                writers.append(writer)
        for writer in writers:
            writer.transport.abort()

    async def database_restarted(self):
        await self.cluster.stop_at_once()
        await self.cluster.start()

    async def database_stalled(self):
        self.to_database.stall()
        await self._mend(self.to_database, 4)

    async def database_cut(self):
        self.to_database.cut()

    async def database_locked(self):
        """Another process writes for long."""
        file = os.path.join(self.portolan.env["PORTOLAN_DATA_DIR"], "portolan.db")

        def lock():
            other = sqlite3.connect(file, timeout=5, isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(3)
            other.execute("ROLLBACK")
            other.close()

        await asyncio.to_thread(lock)


async def soak(world):
    length = 600 if world.long else 60
    upstream = await Upstream(world, "upstream").start()
    way = await Proxy(upstream.port, world.rng).start()
    cluster = to_database = url = None
    if world.database == "postgres":
        cluster = await Cluster(world).make()
        to_database = await Proxy(cluster.port, world.rng).start()
        url = cluster.url(to_database.port)
    portolan = Portolan(
        world, "portolan", url, PORTOLAN_RUN_TIMEOUT="5s", PORTOLAN_HANDSHAKE_TIMEOUT="3s", PORTOLAN_CONNECT_TIMEOUT="2s",
        PORTOLAN_MAX_KEPT_BYTES=str(1 << 20), PORTOLAN_LOG="warn",
    )
    await portolan.start()
    client = portolan.client
    paths, ids = [], []
    for index in range(STDIO + HTTP):
        config = world.stdio_config(index, grandchild=True) if index < STDIO else world.http_config(way.port, f"h{index}", index)
        id, path = await client.register(f"it {index}", config)
        ids.append(id)
        paths.append(path)
    load = Load(world, portolan, paths, ids)
    tasks = [
        asyncio.create_task(it)
        for it in (*(load.run() for _ in range(6)), load.look(), load.write(way.port), load.leave())
    ]
    faults = Faults(world, portolan, upstream, way, cluster, to_database)
    order = []
    # How many runs succeeded from each fault to the next.
    few = []
    met = Counter()

    async def quiet():
        """What is held when all servers work, and nothing else is under way."""
        for path in paths:
            end = time.monotonic() + 60
            while True:
                answer, well = await client.runs_well(path)
                if well:
                    break
                require(time.monotonic() < end, "a server does not work any more:", answer)
                await asyncio.sleep(0.2)
        read = []
        for _ in range(5):
            metrics = await portolan.metrics()
            read.append({
                "memory": portolan.status("VmRSS") / 1024, "files": portolan.files(), "threads": portolan.status("Threads"),
                "children": len([pid for pid in below(portolan.pid) if b"keep-child" not in read_proc(pid, "cmdline")]),
                "sessions": metrics.get("portolan_sessions", 0),
            })
            await asyncio.sleep(0.2)
        return {name: percentile([it[name] for it in read], 0.5) for name in read[0]}

    async def disturb(until_then):
        while time.monotonic() < until_then:
            # The next begins a quarter of a minute after this one began.
            following = time.monotonic() + (EVERY if world.long else EVERY / 3)
            if not order:
                order.extend(world.rng.sample(faults.all, len(faults.all)))
            fault = order.pop()
            good = load.good
            await fault()
            met[fault.__name__.replace("_", " ")] += 1
            require(portolan.runs, f"Portolan has ended in {fault.__name__}:\n{portolan.said()}")
            await asyncio.sleep(max(following - time.monotonic(), 0))
            few.append((load.good - good, fault.__name__.replace("_", " ")))
            require(not any(it.done() for it in tasks), "a part of the load has ended:", tasks)

    began = time.monotonic()
    try:
        # A third of it fills what is filled once: pools, memories, the allocator.
        await disturb(began + length / 3)
        warm = await quiet()
        await disturb(began + length)
    finally:
        load.stop.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    for it in done:
        if isinstance(it, BaseException):
            raise it
    # Sessions that were lost rest a while, and what ends has its time.
    await asyncio.sleep(3)
    end = await quiet()
    told = "; ".join(f"{name} {warm[name]:.0f} -> {end[name]:.0f}" for name in warm)
    asked = ", ".join(f"{count} x {what}" for what, count in sorted(load.statuses.items()))
    told = f"{sum(met.values())} faults, asked: {asked}, slowest {max(load.times):.1f} s; {told}"
    told += f"; {load.good} runs succeeded, from one fault to the next {min(few)[0]} at least"
    wrong = list(load.wrong)
    wrong += [f"only {good} runs succeeded from {fault!r} to the next fault" for good, fault in few if good < LEAST]
    if end["memory"] > warm["memory"] * 1.3 + 10:
        wrong.append("memory grows")
    if end["files"] > warm["files"] + 30:
        wrong.append("descriptors are left over")
    if end["threads"] > warm["threads"] + 4:
        wrong.append("threads are left over")
    # A command each, and what it started, which may have been killed alone.
    if not STDIO <= end["children"] <= STDIO * 2:
        wrong.append(f"from {STDIO} to {STDIO * 2} children should be there")
    if end["sessions"] > STDIO + HTTP + 2:
        wrong.append("sessions are left over")
    await portolan.stop()
    await way.stop()
    if to_database:
        await to_database.stop()
    require(not wrong, f"{len(wrong)} wrong:", "; ".join(wrong[:20]), f"({told})")
    return told
