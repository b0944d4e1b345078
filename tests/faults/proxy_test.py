"""The proxy does to bytes what its fault says, and nothing to others."""

import asyncio
import contextlib
import random
import struct
import time

from proxy import Backend, Frontend, Proxy
from world import require

TEXT = bytes(range(256)) * 64


async def echo(reader, writer):
    with contextlib.suppress(OSError):  # cut
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    writer.close()


async def there_and_back(port, data=TEXT, patience=5.0):
    async with asyncio.timeout(patience):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            writer.write_eof()
            return await reader.read(-1)
        finally:
            writer.transport.abort()


async def fails(work, kinds):
    try:
        await work
    except kinds:
        return True
    return False


def message(kind, body):
    return kind + struct.pack("!i", len(body) + 4) + body


async def a_proxy_does_what_it_says(_world):
    target = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = target.sockets[0].getsockname()[1]
    proxy = await Proxy(port, random.Random(1)).start()
    require(await there_and_back(proxy.port) == TEXT, "a proxy without a fault changes what passes")

    proxy.delay = 0.2
    began = time.monotonic()
    require(await there_and_back(proxy.port, b"x") == b"x" and time.monotonic() - began >= 0.4, "no delay")
    proxy.mend()

    proxy.rate = 100
    began = time.monotonic()
    require(await there_and_back(proxy.port, b"x" * 50) == b"x" * 50 and time.monotonic() - began >= 0.5, "no drip")
    proxy.mend()

    proxy.corrupt = (0.0, 1.0)
    damaged = await there_and_back(proxy.port, b"\0" * 1000)
    require(len(damaged) == 1000 and damaged != b"\0" * 1000 and proxy.flipped, "nothing was damaged")
    proxy.mend()

    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"before")
    require(await reader.readexactly(6) == b"before", "no way through")
    proxy.stall()
    writer.write(b"after")
    require(await fails(asyncio.wait_for(reader.read(1), 0.3), TimeoutError), "a stalled proxy passes bytes on")
    require(await fails(there_and_back(proxy.port, b"x", 0.3), TimeoutError), "a stalled proxy lets new connections pass")
    proxy.mend()
    require(await asyncio.wait_for(reader.readexactly(5), 5) == b"after", "what was stalled is lost")
    proxy.cut()
    require(await fails(reader.readexactly(1), OSError), "a cut leaves a connection")
    writer.transport.abort()
    require(await there_and_back(proxy.port) == TEXT, "no way through after a cut")
    proxy.refuses = True
    lost = (OSError, asyncio.IncompleteReadError)
    try:
        require(await there_and_back(proxy.port, b"x") == b"", "a refused connection answers")
    except lost:
        pass
    await proxy.stop()

    seen = []
    refusing = lambda: (Frontend(lambda: seen.append("refused"), b"LISTEN "), None)
    looking = await Proxy(port, random.Random(1), refusing).start()
    start = struct.pack("!ii", 8, 80877103) + struct.pack("!ii", 8, 196608)
    for text in (message(b"Q", b"SELECT 'LISTEN'\0"), message(b"P", b"name\0SELECT 1\0\0\0")):
        require(await there_and_back(looking.port, start + text) == start + text, "what does not listen is refused")
    no, end = Frontend.REFUSAL + b"\0", message(b"S", b"")
    for text, becomes in (
        (message(b"Q", b" listen x\0"), message(b"Q", no)),
        (message(b"P", b"name\0LISTEN x\0\0\1\0\0\0\2"), message(b"P", b"name\0" + no + b"\0\1\0\0\0\2")),
    ):
        # Also when it comes in pieces.
        reader, writer = await asyncio.open_connection("127.0.0.1", looking.port)
        for at in range(len(start + text + end)):
            writer.write((start + text + end)[at : at + 1])
            await asyncio.sleep(0.001)
        passed = await asyncio.wait_for(reader.readexactly(len(start + becomes + end)), 5)
        require(passed == start + becomes + end, "LISTEN passes, or what is beside it does not:", passed)
        writer.transport.abort()
    require(seen == ["refused"] * 2, seen)
    await looking.stop()

    dropping = await Proxy(port, random.Random(1), lambda: (None, Backend(lambda: seen.append("dropped")))).start()
    before, after = b"N" + message(b"R", b"\0\0\0\0"), message(b"Z", b"I")
    passed = await there_and_back(dropping.port, before + message(b"A", b"told") + after)
    require(passed == before + after, "a notification passes")
    require(seen[2:] == ["dropped"], seen)
    await dropping.stop()
    target.close()
    return "delays, drips, damages, stalls, cuts, refuses, and sees LISTEN and NOTIFY"
