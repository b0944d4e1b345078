"""kill -9 of Portolan at random moments of its writes."""

import asyncio
import time

from ledger import Ledger
from postgres import Cluster
from world import SLACK, Portolan, Upstream, below, figures, marked, processes, require, until

READY_WITHIN = 3.0
ORPHANS_GONE_WITHIN = 5.0


async def kills(world):
    rounds = 200 if world.long else 10
    upstream = await Upstream(world, "upstream").start()
    url = (await Cluster(world).make()).url() if world.database == "postgres" else None
    portolan = Portolan(world, "portolan", url)
    ledger = Ledger(world, upstream.port, stdio_share=0.5, grandchild=True, most=3)
    writers = [[] for _ in range(4)]
    ready, orphaned, killed, children_killed = [], [], 0, 0
    for _ in range(rounds):
        ready.append(await portolan.start())
        await ledger.check(portolan.client)
        # Each writes to servers of its own, one after another.
        for index, mine in enumerate(writers):
            mine[:] = [entry for at, entry in enumerate(ledger.entries) if at % len(writers) == index]
        stop = asyncio.Event()
        writing = [
            asyncio.create_task(ledger.write_until(portolan.client, stop, mine, world.rng)) for mine in writers
        ]
        await asyncio.sleep(world.rng.uniform(0.02, 0.8))
        children = below(portolan.pid)
        stop.set()
        await portolan.kill()
        killed += 1
        children_killed += len(children)
        began = time.monotonic()
        await asyncio.gather(*writing)

        def are_gone():
            return not (children & processes().keys() or marked(world.mark))

        await until("all its children are gone", are_gone, ORPHANS_GONE_WITHIN + SLACK)
        orphaned.append(time.monotonic() - began)
    ready.append(await portolan.start())
    await ledger.check(portolan.client)
    await portolan.stop()
    require(max(ready) <= READY_WITHIN, f"ready again only after {max(ready):.2f} s")
    require(ledger.acknowledged > rounds, f"only {ledger.acknowledged} writes: this has shown nothing")
    require(children_killed > 0, "no children: this has shown nothing")
    return (
        f"{killed} kills, {ledger.acknowledged} acknowledged writes, {ledger.unsure} unsure; ready again: {figures(ready)}; "
        f"{children_killed} children gone: {figures(orphaned)}"
    )
