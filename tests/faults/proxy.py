"""A TCP proxy that delays, stalls, cuts, drips and corrupts what passes through it, all of it set while connections are open."""

import asyncio
import contextlib
import socket
import struct

CHUNK = 16 * 1024


class Cut(Exception):
    """A look at what passes says that this connection ends here."""


class Proxy:
    """Leads from a port of its own to `target`, another port of this machine.

    `looks` makes, for each connection, the pair of functions that see what goes to the target and what comes back: bytes in,
    the bytes to pass on out; `Cut` ends the connection.
    """

    def __init__(self, target, rng, looks=None):
        self.target, self.rng, self.looks = target, rng, looks
        self.port = 0
        # What is counted, so that a test can say that its fault took place.
        self.connections = self.cuts = self.flipped = 0
        self._pairs = set()
        self._tasks = set()
        self._gate = asyncio.Event()
        self.mend()

    def mend(self):
        """Passes everything on, at once and as it is."""
        self.delay = 0.0  # seconds that each chunk waits, each way
        self.rate = None  # bytes a second, each way
        self.corrupt = (0.0, 0.0)  # how likely a chunk to the target, and one from it, has a byte flipped
        self.refuses = False
        self._gate.set()

    def stall(self):
        """Keeps everything back, ends and new connections too, and closes nothing: a cable that was pulled."""
        self._gate.clear()

    def cut(self):
        """Resets every open connection."""
        for pair in list(self._pairs):
            for writer in pair:
                # What was not sent is given up, and the peer is told so (RST), not that all was said (FIN).
                with contextlib.suppress(OSError):  # closed already
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        self.cuts += 1

    async def start(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self):
        self._server.close()
        self.mend()
        self.cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        self.connections += 1
        pair = (writer,)
        try:
            if self.refuses:
                return
            self._pairs.add(pair)
            await self._gate.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            self._pairs.discard(pair)
            pair = (writer, back)
            self._pairs.add(pair)
            out, home = self.looks() if self.looks else (None, None)
            ways = asyncio.gather(self._pump(reader, back, out, 0), self._pump(there, writer, home, 1))
            try:
                await ways
            finally:
                ways.cancel()
                await asyncio.gather(ways, return_exceptions=True)
        except (Cut, OSError, asyncio.CancelledError):
            pass
        finally:
            self._pairs.discard(pair)
            for it in pair:
                it.transport.abort()
            self._tasks.discard(task)

    def _few(self):
        return max(1, int((self.rate or CHUNK) / 50))

    async def _pump(self, reader, writer, look, way):
        while True:
            data = await reader.read(CHUNK)
            if self.delay:
                await asyncio.sleep(self.delay)
            await self._gate.wait()
            if look and data:
                data = look(data)
            if data and self.rng.random() < self.corrupt[way]:
                at = self.rng.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ (1 << self.rng.randrange(8))]) + data[at + 1 :]
                self.flipped += 1
            if not data and reader.at_eof():
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            while data:
                if self.rate is None:
                    some, data = data, b""
                else:
                    # A few at a time: a clock that is asked for each byte would be late.
                    some, data = data[: self._few()], data[self._few() :]
                    await asyncio.sleep(len(some) / self.rate)
                    await self._gate.wait()
                writer.write(some)
                await writer.drain()


class Frontend:
    """Sees the messages that a client sends to PostgreSQL (protocol 3.0), simple queries and prepared ones. A statement that
    begins with `text`, in capitals, is exchanged for one that fails with 0A000, feature_not_supported, as a database answers
    that has no such thing; all else passes as it is."""

    SSL_REQUEST, GSS_REQUEST, CANCEL = 80877103, 80877104, 80877102
    REFUSAL = b"DO $$BEGIN RAISE feature_not_supported USING MESSAGE = 'there is no such thing here'; END$$"

    def __init__(self, refused, text):
        self.refused, self.text = refused, text
        self._held = b""
        self._begun = False

    def __call__(self, data):
        self._held += data
        passed = b""
        while message := self._next():
            kind, body = message
            # A prepared one has its name before the text, and the types of its parameters after it.
            name, _, rest = body.partition(b"\0") if kind == b"P" else (b"", b"", body)
            text, _, types = rest.partition(b"\0")
            if kind in (b"Q", b"P") and text.lstrip().upper().startswith(self.text):
                self.refused()
                body = (name + b"\0" if kind == b"P" else b"") + self.REFUSAL + b"\0" + types
            passed += kind + struct.pack("!i", len(body) + 4) + body
        return passed

    def _next(self):
        head = 1 if self._begun else 0
        if len(self._held) < head + 4:
            return None
        (length,) = struct.unpack_from("!i", self._held, head)
        if len(self._held) < head + length:
            return None
        kind, body = self._held[:head], self._held[head + 4 : head + length]
        self._held = self._held[head + length :]
        if not self._begun:
            # A question for encryption comes before the start, and is answered "no" by these clusters.
            self._begun = struct.unpack("!i", body[:4])[0] not in (self.SSL_REQUEST, self.GSS_REQUEST, self.CANCEL)
        return kind, body


class Backend:
    """Sees the messages of PostgreSQL, and keeps notifications back, as a pooler does whose sessions are those of others."""

    def __init__(self, dropped):
        self.dropped = dropped
        self._held = b""
        self._begun = False

    def __call__(self, data):
        self._held += data
        passed = b""
        if not self._begun and self._held[:1] == b"N":
            # "No encryption", one byte alone. A notice has the same letter, and never comes first.
            passed, self._held = self._held[:1], self._held[1:]
        if self._held:
            self._begun = True
        while len(self._held) >= 5:
            (length,) = struct.unpack_from("!i", self._held, 1)
            if len(self._held) < 1 + length:
                break
            message, self._held = self._held[: 1 + length], self._held[1 + length :]
            if message[:1] == b"A":
                self.dropped()
            else:
                passed += message
        return passed
