"""The way to an MCP server is disturbed: each run is answered in time, and a key runs a tool once."""

import asyncio
import time
import uuid
from collections import Counter

from postgres import Cluster
from proxy import Proxy
from world import SLACK, Portolan, Upstream, require, run_body

RUN_TIMEOUT = 4
# A server that failed rests for up to 30 s, and then has to shake hands.
WORKS_WITHIN = 40.0
RETRIED = {408, 409, 429}


async def run_as_sdk(client, path, body, key):
    """One call of an SDK: it tries three times on what it takes for passing, the key the same. Returns all that it saw."""
    seen = []
    for count in range(3):
        began = time.monotonic()
        try:
            answer = await client.ask(
                "POST", path, body, idempotency_key=key, x_stainless_retry_count=str(count), patience=RUN_TIMEOUT + 10
            )
        except OSError as error:
            # Portolan itself is well, so each is answered.
            seen.append((type(error).__name__, time.monotonic() - began, ""))
            continue
        seen.append((answer.status, answer.seconds, answer))
        welcome = answer.headers.get("x-should-retry")
        again = welcome == "true" or (welcome != "false" and (answer.status in RETRIED or answer.status >= 500))
        if not again:
            break
        await asyncio.sleep(min(float(answer.headers.get("retry-after", 0.2)), 1.0))
    return seen


async def upstreams(world):
    seconds = 10 if world.long else 3
    upstream = await Upstream(world, "upstream").start()
    proxy = await Proxy(upstream.port, world.rng).start()
    url = (await Cluster(world).make()).url() if world.database == "postgres" else None
    portolan = Portolan(
        world, "portolan", url, PORTOLAN_RUN_TIMEOUT=f"{RUN_TIMEOUT}s", PORTOLAN_CONNECT_TIMEOUT="1s",
        PORTOLAN_HANDSHAKE_TIMEOUT="2s",
    )
    await portolan.start()
    client = portolan.client
    paths = []
    for index in range(3):
        paths.append((await client.register(f"u{index}", world.http_config(proxy.port, f"u{index}", 1)))[1])
    wrong, told, calls, back_again = [], [], {}, []

    async def runs(end, what):
        while time.monotonic() < end:
            call, body = run_body(world.rng.choice((0, 0, 50, 500)))
            seen = await run_as_sdk(client, world.rng.choice(paths), body, uuid.uuid4().hex)
            calls[call] = what
            for status, took, answer in seen:
                times.append(took)
                statuses[status] += 1
                if took > RUN_TIMEOUT + 1 + SLACK:
                    wrong.append(f"{what}: a run was answered after {took:.1f} s ({status})")
                if status not in (200, 502, 503):
                    wrong.append(f"{what}: a run was answered {status} {answer}")
            await asyncio.sleep(0.01)

    async def cut():
        while True:
            proxy.cut()
            await asyncio.sleep(world.rng.uniform(0.05, 0.4))

    faults = {
        "delay": lambda: setattr(proxy, "delay", 0.3), "stall": proxy.stall, "cut": cut,
        "drip": lambda: setattr(proxy, "rate", 300), "corrupt there": lambda: setattr(proxy, "corrupt", (0.2, 0.0)),
        "corrupt back": lambda: setattr(proxy, "corrupt", (0.0, 0.2)),
        "refuse": lambda: (setattr(proxy, "refuses", True), proxy.cut()),
    }
    for name, begin in faults.items():
        times, statuses = [], Counter()
        begun = begin()
        task = asyncio.create_task(begun) if asyncio.iscoroutine(begun) else None
        end = time.monotonic() + seconds
        await asyncio.gather(*(runs(end, name) for _ in range(8)))
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        proxy.mend()
        proxy.cut()
        mended = time.monotonic()
        for path in paths:
            while True:
                answer, well = await client.runs_well(path)
                if well:
                    break
                if time.monotonic() > mended + WORKS_WITHIN:
                    wrong.append(f"{name}: a server does not work {WORKS_WITHIN:.0f} s after: {answer}")
                    break
                await asyncio.sleep(0.2)
        back_again.append(time.monotonic() - mended)
        counts = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items(), key=str))
        told.append(
            f"{name}: {len(times)} asked ({counts}), "
            f"slowest {max(times):.1f} s, works after {back_again[-1]:.1f} s"
        )
        require(portolan.runs, f"Portolan has ended in {name}")
    made = Counter(it.get("id") for it in upstream.calls())
    twice = {call: made[call] for call in calls if made[call] > 1}
    for call, count in twice.items():
        wrong.append(f"{calls[call]}: the run {call} was made {count} times")
    await portolan.stop()
    await proxy.stop()
    told.append(f"{sum(made[call] == 1 for call in calls)} of {len(calls)} keys ran once, {len(twice)} more often")
    require(not wrong, "; ".join(wrong[:30]), "(" + "; ".join(told) + ")")
    return "; ".join(told)
