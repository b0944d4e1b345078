"""Faults, and what Portolan promises under them; docs/faults.md says what that is.

    run.py short|long [--database sqlite|postgres] [--seed N] [--keep] [SCENARIO…]

Environment: PORTOLAN_BIN the binary. Root for what mounts. Standard library only.
"""

import argparse
import asyncio
import os
import pathlib
import shutil
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

# Which databases a scenario is for. Those of one group run one after another, the groups at the same time.
BOTH = ("sqlite", "postgres")
SCENARIOS = {
    "kills": (kills.kills, BOTH),
    "postgres": (database.faults_of_postgres, ("postgres",)),
    "replicas": (replicas.replicas, ("postgres",)),
    "upstreams": (upstreams.upstreams, BOTH),
    "disk": (disk.full_disk, ("sqlite",)),
    "clock": (clock.clock, BOTH),
    "descriptors": (descriptors.few_descriptors, BOTH),
    "soak": (soak.soak, BOTH),
    "proxy": (proxy_test.a_proxy_does_what_it_says, ("sqlite",)),
}


async def play(name, database, folder, length, seed):
    """Runs one scenario, says a line about it, and returns whether all was kept."""
    began = time.monotonic()
    world = World(name, folder, database, length == "long", seed)
    verdict = "ok"
    try:
        async with world:
            told = await SCENARIOS[name][0](world)
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
    parser.add_argument("--database", choices=BOTH)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FAULTS_SEED") or time.time()))
    parser.add_argument("--keep", action="store_true", help="leave the folder of all that was made")
    parser.add_argument("scenario", nargs="*", choices=[[], *SCENARIOS])
    given = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="portolan-faults-"))
    folder.chmod(0o711)
    print(f"seed {given.seed}", flush=True)
    databases = (given.database,) if given.database else BOTH
    good = True
    try:
        for name, (_, known) in SCENARIOS.items():
            for database in databases:
                if database in known and (not given.scenario or name in given.scenario):
                    good = await play(name, database, folder, given.length, given.seed) and good
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
