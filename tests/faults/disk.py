"""SQLite on a disk of 8 MB until it is full, and emptied again."""

import os
import subprocess
import time

from world import Portolan, Upstream, require, until

FULL = (507, 503)
WORKS_WITHIN = 3.0


class Disk:
    """A file system in memory, of 8 MB."""

    def __init__(self, world, name):
        self.folder = world.folder / name
        self.folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(self.folder)], capture_output=True, text=True, check=False
        )
        require(mounted.returncode == 0, "tmpfs cannot be mounted, which takes root:", mounted.stderr.strip())
        world.everything.append(self)
        self.log = world.folder / "no log"

    def said(self):
        return subprocess.run(["df", str(self.folder)], capture_output=True, text=True, check=False).stdout

    def free(self):
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self):
        """Another file takes all that is left."""
        with open(self.folder / "others", "ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                return

    def clear(self):
        (self.folder / "others").unlink(missing_ok=True)

    async def end(self):
        subprocess.run(["umount", "-l", str(self.folder)], check=False)


async def full_disk(world):
    upstream = await Upstream(world, "upstream").start()
    disk = Disk(world, "disk")
    portolan = Portolan(world, "portolan", PORTOLAN_DATA_DIR=str(disk.folder / "data"))
    await portolan.start()
    client = portolan.client
    server, run = await client.register("it", world.http_config(upstream.port, "it", 1))
    one = f"/v1/mcp-servers/{server}"
    reads = ["/v1/mcp-servers/", one, f"{one}/tools", "/v1/health", "/v1/ready"]
    counts = {"writes": 0, "refused": {}, "reads": 0, "runs": 0}
    kept = {server: "it"}

    async def read_all():
        for path in reads:
            answer = await client.ask("GET", path)
            require(answer.status == 200, f"{path} of a full disk was answered", answer)
            counts["reads"] += 1
        answer, well = await client.runs_well(run)
        require(well, "a run with a full disk was answered", answer)
        counts["runs"] += 1

    async def write(size=58_000):
        """Whether a write was made."""
        name = f"s{world.rng.getrandbits(60)}"
        # Nobody is there: stored all the same.
        config = {"server_url": f"http://127.0.0.1:{upstream.port}/{name}/list/no", "custom_headers": {
            f"X-{index}": "x" * (size // 2) for index in range(2)
        }}
        answer = await client.ask("POST", "/v1/mcp-servers/", {"server_name": name, "config": config})
        if answer.status == 200:
            kept[answer.json()["id"]] = name
            counts["writes"] += 1
            return True
        require(answer.status in FULL, "a write to a full disk was answered", answer)
        counts["refused"][answer.status] = counts["refused"].get(answer.status, 0) + 1
        return False

    async def all_there():
        answer = await client.ask("GET", "/v1/mcp-servers/")
        require(answer.status == 200, "a list was answered", answer)
        there = {it["id"]: it["server_name"] for it in answer.json()}
        require(there == kept, "acknowledged servers are lost, or others are there:", there.keys() ^ kept.keys())

    back = []
    for turn in range(6 if world.long else 2):
        if turn % 2 == 0:
            # Full by Portolan's own doing, with half of it in another's file.
            with open(disk.folder / "others", "wb") as file:
                file.write(b"\0" * min(disk.free() // 2, 4_000_000))
            for _ in range(500):
                if not await write():
                    break
            else:
                require(False, "the disk was never full: this has shown nothing")
        disk.fill()
        for _ in range(20):
            await write()
            await read_all()
        # Nothing of it is in the way of a start, or is lost by one.
        if turn == 1:
            await portolan.kill()
            disk.clear()
            await portolan.start()
            await all_there()
            disk.fill()
            await read_all()
        disk.clear()
        cleared = time.monotonic()
        await until("a write is made again", lambda: write(100), WORKS_WITHIN + 10)
        back.append(time.monotonic() - cleared)
        await all_there()
        await read_all()
        # Room for the next turn.
        for id in [id for id, name in kept.items() if name != "it"]:
            answer = await client.ask("DELETE", f"/v1/mcp-servers/{id}")
            require(answer.status == 204, "a delete was answered", answer)
            del kept[id]
        require(portolan.runs, "Portolan has ended")
    await all_there()
    await portolan.stop()
    require(max(back) <= WORKS_WITHIN, f"writes were made only {max(back):.1f} s after there was room")
    require(sum(counts["refused"].values()) > 10, "hardly a write was refused: this has shown nothing")
    return (
        f"{counts['writes']} writes made, refused: {counts['refused']}; {counts['reads']} reads and {counts['runs']} runs, "
        f"all well; writes again after {max(back):.2f} s"
    )
