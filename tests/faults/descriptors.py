"""256 file descriptors and 1,000 connections."""

import asyncio
import time

from postgres import Cluster
from world import SLACK, Portolan, Upstream, require, run_body

FILES = 256
CONNECTIONS = 1_000
RECOVERS_WITHIN = 5.0


async def few_descriptors(world):
    upstream = await Upstream(world, "upstream").start()
    url = (await Cluster(world).make()).url() if world.database == "postgres" else None
    portolan = Portolan(world, "portolan", url, wrapper=["prlimit", f"--nofile={FILES}:{FILES}"])
    await portolan.start()
    client = portolan.client
    runs = []
    for name, config in (("http", world.http_config(upstream.port, "d", 1)), ("stdio", world.stdio_config(1))):
        runs.append((await client.register(name, config))[1])
    told, files = [], []
    for turn in range(5 if world.long else 2):
        answered, lost, silent, statuses = 0, 0, 0, {}
        opened = []

        async def guest():
            nonlocal answered, lost, silent
            is_in = False
            try:
                async with asyncio.timeout(20):
                    reader, writer = await asyncio.open_connection("127.0.0.1", portolan.port)
                    is_in = True
                    opened.append(writer)
                    writer.write(b"GET /v1/mcp-servers/ HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
                    line = await reader.readline()
                if line:
                    status = int(line.split()[1])
                    statuses[status] = statuses.get(status, 0) + 1
                    answered += 1
                else:
                    lost += 1
            except TimeoutError:
                # Connected, and neither answered nor told to go; or not even that.
                silent += is_in
                lost += not is_in
            except (OSError, ValueError, IndexError):
                lost += 1

        began = time.monotonic()
        guests = [asyncio.create_task(guest()) for _ in range(CONNECTIONS)]
        # Who comes in meanwhile, again and again, as a client does.
        served, refused = 0, 0
        while not all(it.done() for it in guests):
            for path in runs:
                try:
                    answer = await client.ask("POST", path, run_body()[1], fresh=True, patience=5)
                    require(answer.status in (200, 502, 503), "a run was answered", answer)
                    served += answer.status == 200
                    refused += answer.status != 200
                except OSError:
                    refused += 1
            require(portolan.runs, "Portolan has ended:", portolan.said())
            await asyncio.sleep(0.05)
        took = time.monotonic() - began
        most = portolan.files()
        require(set(statuses) <= {200, 503}, "1,000 connections were answered", statuses)
        require(answered >= 100, f"only {answered} of {CONNECTIONS} connections were answered")
        require(not silent, f"{silent} connections were taken, and neither answered nor ended")
        for writer in opened:
            writer.transport.abort()
        client.close()
        left = time.monotonic()
        # All is well again, the upstreams and new children too.
        for path in runs:
            while True:
                answer, well = await client.runs_well(path, 5)
                if well:
                    break
                require(time.monotonic() - left < RECOVERS_WITHIN + SLACK, "a run after all have left:", answer)
                await asyncio.sleep(0.05)
        await client.register(f"new {turn}", world.stdio_config(2))
        told.append(
            f"{answered} of {CONNECTIONS} connections answered in {took:.1f} s ({statuses}), {lost} turned away, none left waiting; "
            f"{most} files at most; {served} runs made meanwhile, {refused} not; well {time.monotonic() - left:.2f} s after"
        )
        await asyncio.sleep(1)
        files.append(portolan.files())
    # The first time fills the pools. Then a new command each time, with the files of its session.
    require(files[-1] <= files[0] + 12 * (len(files) - 1), "files are left over each time:", files)
    await portolan.stop()
    return "; ".join(told)
