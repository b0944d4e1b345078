"""What was written and acknowledged, and what may be there after a fault.

Each server that is written has a number, which is in each place of its configuration, so that one that was written by half is
seen. A write that was acknowledged must be there; one whose answer never came, or was 503 or 507, may be.
"""

import asyncio
import time
from dataclasses import dataclass, field

from upstream import tools
from world import Failed, require, run_body, run_path

UNSURE = (503, 507)


@dataclass
class Entry:
    """A server, and the numbers that it may have; None stands for a server that is not there."""

    key: str
    kind: str
    id: str | None = None
    may_be: set = field(default_factory=set)
    last: int = 0
    # The newest list of tools that was acknowledged.
    listed: int | None = None
    # Nothing is done to one again that may be gone.
    settled: bool = True

    def name(self, number):
        return f"{self.key} {number}"


class Ledger:
    def __init__(self, world, upstream_port, stdio_share=0.0, grandchild=False, most=6):
        self.world, self.port = world, upstream_port
        self.stdio_share, self.grandchild, self.most = stdio_share, grandchild, most
        self.entries = []
        self.acknowledged = self.unsure = self.keys = 0
        # (what, when it began, how long it took, status or why there is none)
        self.asked = []
        # By the beginning: answers that are neither a success nor a refusal.
        self.odd = {}
        self.wrong = []
        # Whether a status that is no success is wrong at once; or else whoever reads `asked` judges it.
        self.strict = True

    def config(self, entry, number):
        if entry.kind == "stdio":
            return self.world.stdio_config(number, self.grandchild)
        return self.world.http_config(self.port, entry.key, number)

    async def ask(self, client, what, *arguments, **more):
        """The answer, or None when the connection was lost."""
        began = time.monotonic()
        try:
            answer = await client.ask(*arguments, **more)
        except TimeoutError:
            self.asked.append((what, began, time.monotonic() - began, "never"))
            return None
        except OSError:
            self.asked.append((what, began, time.monotonic() - began, "cut"))
            return None
        self.asked.append((what, began, answer.seconds, answer.status))
        if answer.status not in (200, 204, *UNSURE):
            self.odd[began] = answer
        return answer

    def _outcome(self, what, answer, success):
        """Whether a write was made: True, False, or None for unsure."""
        if answer is None or answer.status in UNSURE:
            self.unsure += 1
            return None
        if answer.status == success:
            self.acknowledged += 1
            return True
        self._object(what, answer)
        return None

    def _object(self, what, answer):
        if self.strict:
            self.wrong.append(f"{what} was answered {answer}")

    async def write(self, client, mine, rng):
        """One write to one of the servers in `mine`."""
        usable = [entry for entry in mine if entry.settled]
        if len(usable) < 2 or (len(usable) < self.most and rng.random() < 0.3):
            return await self.create(client, mine, rng)
        entry = rng.choice(usable)
        what = rng.choices((self.patch, self.refresh, self.delete, self.run), (5, 3, 1, 3))[0]
        return await what(client, entry, mine, rng)

    async def create(self, client, mine, rng):
        self.keys += 1
        entry = Entry(f"k{self.keys}", "stdio" if rng.random() < self.stdio_share else "http")
        entry.last = rng.randrange(5)
        self.entries.append(entry)
        mine.append(entry)
        entry.may_be, entry.settled = {None, entry.last}, False
        body = {"server_name": entry.name(entry.last), "config": self.config(entry, entry.last)}
        answer = await self.ask(client, "create", "POST", "/v1/mcp-servers/", body)
        if self._outcome("a create", answer, 200):
            entry.id, entry.may_be, entry.settled = answer.json()["id"], {entry.last}, True
            if answer.json()["status"]["state"] == "ready":
                entry.listed = entry.last
        return entry

    async def patch(self, client, entry, *_):
        entry.last += 1
        before, entry.may_be = entry.may_be, entry.may_be | {entry.last}
        body = {"server_name": entry.name(entry.last), "config": self.config(entry, entry.last)}
        answer = await self.ask(client, "patch", "PATCH", f"/v1/mcp-servers/{entry.id}", body)
        if answer is not None and answer.status == 409 and len(before) > 1:
            # Overtaken by one of those that nobody is sure of: not made, and rightly so.
            self.unsure += 1
            self.asked[-1] = (*self.asked[-1][:3], 200)
        elif self._outcome("a patch", answer, 200):
            entry.may_be = {entry.last}

    async def delete(self, client, entry, mine, _):
        entry.settled, entry.may_be = False, entry.may_be | {None}
        mine.remove(entry)
        answer = await self.ask(client, "delete", "DELETE", f"/v1/mcp-servers/{entry.id}")
        if self._outcome("a delete", answer, 204):
            entry.may_be = {None}

    async def refresh(self, client, entry, *_):
        answer = await self.ask(client, "refresh", "PATCH", f"/v1/mcp-servers/{entry.id}/refresh")
        if self._outcome("a refresh", answer, 200) and len(entry.may_be) == 1:
            (entry.listed,) = entry.may_be

    async def run(self, client, entry, *_):
        answer = await self.ask(client, "tools", "GET", f"/v1/mcp-servers/{entry.id}/tools")
        if answer is None or answer.status in UNSURE:
            return
        if answer.status != 200:
            self._object("a list of tools", answer)
            return
        if offered := answer.json():
            _, body = run_body()
            answer = await self.ask(client, "run", "POST", run_path(entry.id, offered[0]["id"]), body)
            # Its tools may be older than its configuration, and then its server refuses none of them.
            if answer is not None and answer.status not in (200, 503):
                self._object("a run", answer)

    async def write_until(self, client, stop, mine, rng, pause=0.0):
        """Writes one after another, until `stop` is set."""
        while not stop.is_set():
            await self.write(client, mine, rng)
            await asyncio.sleep(pause)

    async def check(self, client, settle=True):
        """Compares with what is there; afterwards all is known again, unless `settle` is false."""
        require(not self.wrong, "; ".join(self.wrong[:5]))
        answer = await client.ask("GET", "/v1/mcp-servers/?reveal=true")
        require(answer.status == 200, "a list was answered", answer)
        there = {}
        for server in answer.json():
            key, _, number = server["server_name"].rpartition(" ")
            require(key not in there, f"{key} is there twice")
            there[key] = server, int(number)
        known = {entry.key: entry for entry in self.entries}
        require(there.keys() <= known.keys(), "servers that nobody made:", there.keys() - known.keys())
        for key, entry in known.items():
            server, number = there.get(key, (None, None))
            if number not in entry.may_be:
                may_be = sorted(entry.may_be, key=str)
                raise Failed(f"an acknowledged write is lost: {key} ({entry.kind}) is {number}, and may be {may_be}")
            if server is None:
                continue
            self._whole(entry, server, number)
            listed = await self._tools(client, entry, server)
            if settle:
                entry.id, entry.may_be, entry.settled = server["id"], {number}, True
                entry.listed = listed
                entry.last = max(entry.last, number)
        if settle:
            # What is gone is never asked for again.
            self.entries = [entry for entry in self.entries if entry.key in there]

    def _whole(self, entry, server, number):
        if entry.kind == "stdio":
            places = {server["args"][-1], server["env"]["VERSION_TOKEN"]}
        else:
            places = {
                server["server_url"].rpartition("/")[2], server["auth_token"].rpartition("-")[2],
                server["custom_headers"]["X-Version"],
            }
        require(places == {str(number)}, f"{entry.key} is half-written: {number} in its name, {places} elsewhere")
        require(entry.id in (None, server["id"]), f"{entry.key} has another id than it was given")

    async def _tools(self, client, entry, server):
        answer = await client.ask("GET", f"/v1/mcp-servers/{server['id']}/tools")
        require(answer.status == 200, "a list of tools was answered", answer)
        names = [tool["name"] for tool in answer.json()]
        if not names:
            require(entry.listed is None, f"{entry.key} has lost its tools")
            return None
        number = int(names[0][1:].partition("_")[0])
        require(names == tools(number), f"{entry.key} has half a list of tools: {names}")
        least = entry.listed or 0
        require(least <= number <= entry.last, f"{entry.key} has tools of {number}, not {least}…{entry.last}")
        return number
