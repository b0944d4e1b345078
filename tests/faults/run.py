"""Faults, and what Portolan promises under them; docs/faults.md says what that is.

    run.py short|long [--database sqlite|postgres] [--seed N] [--keep] [SCENARIO…]

Environment: PORTOLAN_BIN the binary. Root for what mounts, in a namespace of its own. Standard library only.
"""

import argparse
import asyncio
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import traceback

import clock
import database
import descriptors
import disk
import kills
import proxy_test
import replicas
import soak
import upstreams
from world import Failed, World

SCENARIOS = {
    "kills": kills.kills,
    "postgres": database.faults_of_postgres,
    "replicas": replicas.replicas,
    "upstreams": upstreams.upstreams,
    "disk": disk.full_disk,
    "clock": clock.clock,
    "descriptors": descriptors.few_descriptors,
    "soak": soak.soak,
    "proxy": proxy_test.a_proxy_does_what_it_says,
}
# What runs one after another; the lanes of a form run at the same time.
LANES = {
    "short": (
        "soak-sqlite kills-sqlite soak-postgres kills-postgres",
        "proxy-sqlite disk-sqlite clock-sqlite descriptors-sqlite upstreams-sqlite postgres-postgres",
        "clock-postgres descriptors-postgres replicas-postgres",
    ),
    "long": (
        "soak-sqlite proxy-sqlite disk-sqlite clock-sqlite clock-postgres",
        "soak-postgres upstreams-sqlite upstreams-postgres",
        "kills-sqlite kills-postgres",
        "postgres-postgres replicas-postgres descriptors-sqlite descriptors-postgres",
    ),
}


async def play(name, database, folder, length, seed):
    """Runs one scenario, says a line about it, and returns whether all was kept."""
    began = time.monotonic()
    world = World(name, folder, database, length == "long", seed)
    verdict = "ok"
    try:
        async with world:
            told = await SCENARIOS[name](world)
    except Failed as failure:
        verdict, told = "FAILED", str(failure)
    except Exception:
        verdict, told = "BROKEN", traceback.format_exc()
    print(f"{verdict:6} {name}-{database} ({time.monotonic() - began:.0f} s): {told}", flush=True)
    if verdict != "ok":
        print(f"       seed {seed}; what was said is in {world.folder}", flush=True)
        for it in world.everything:
            print(f"--- the end of {it.log}:\n{it.said()}", flush=True)
    return verdict == "ok"


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("length", choices=("short", "long"))
    parser.add_argument("--database", choices=("sqlite", "postgres"), help="those of one database alone")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FAULTS_SEED") or time.time()))
    parser.add_argument("--keep", action="store_true", help="leave the folder of all that was made")
    parser.add_argument("scenario", nargs="*", help=f"those alone, of {', '.join(SCENARIOS)}")
    given = parser.parse_args()
    if unknown := set(given.scenario) - SCENARIOS.keys():
        parser.error(f"there is no scenario {', '.join(unknown)}")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="portolan-faults-"))
    # Another user than this one runs the clusters.
    folder.chmod(0o711)
    print(f"seed {given.seed}", flush=True)
    # Who ends this ends all that it started, and the disk is unmounted.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)

    async def drive(lane):
        good = []
        for one in lane.split():
            name, _, database = one.rpartition("-")
            if given.database in (None, database) and name in (given.scenario or SCENARIOS):
                good.append(await play(name, database, folder, given.length, given.seed))
        return good

    try:
        good = [it for lane in await asyncio.gather(*map(drive, LANES[given.length])) for it in lane]
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{sum(good)} of {len(good)} scenarios well", flush=True)
    return 0 if good and all(good) else 1


def leave_the_mounts_of_the_machine():
    """Begins anew where a mount is seen by nobody else, and goes with the last process there."""
    if os.getuid() == 0 and "FAULTS_MOUNTS" not in os.environ:
        again = ["unshare", "--mount", sys.executable, *sys.argv]
        os.execvpe(again[0], again, os.environ | {"FAULTS_MOUNTS": "own"})


if __name__ == "__main__":
    leave_the_mounts_of_the_machine()
    sys.exit(asyncio.run(main()))
