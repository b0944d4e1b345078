"""The container files, tried: Dockerfile, compose.yaml, the proxy's configuration and deploy/kubernetes.

Linters read them first, and then rules of this repository that no linter knows: a stop is given the time that it takes, no proxy sends
a request twice, nothing starts without a token. Where a container engine answers, the images are built and the stack is started. Where
none does, the same steps are done in plain folders (`plain.py`) with the program that is built already, the same settings, PostgreSQL
and the same HAProxy configuration; the output says which of the two was done.

Usage: PORTOLAN_BIN=… PORTOLAN_DATABASE_URL=… tests/containers/run.py, a new database of PostgreSQL; needs root, haproxy, Node, the packages of requirements.txt and
package.json, and those of tests/published.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

import engine
import files
import folders
import proxy

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    answers = subprocess.run(["docker", "info"], capture_output=True).returncode == 0 if engine.is_here() else False
    with tempfile.TemporaryDirectory(prefix="portolan-containers-") as folder:
        folder = pathlib.Path(folder)
        # Another user passes it.
        folder.chmod(0o755)
        tests = [*files.TESTS, *proxy.TESTS, *(engine.TESTS if answers else folders.TESTS)]
        failed = 0
        for number, test in enumerate(tests):
            own = folder / str(number)
            own.mkdir()
            began = time.monotonic()
            try:
                remark = test(ROOT, own) or ""
                print(f"ok      {test.__name__.replace('_', ' ')} ({time.monotonic() - began:.1f} s) {remark}", flush=True)
            except Exception as error:
                failed += 1
                detail = getattr(error, "stdout", "") or ""
                print(f"FAILED  {test.__name__.replace('_', ' ')}: {type(error).__name__}: {error}\n{detail}", flush=True)
    if answers:
        print("The images were built and the stack was started by the container engine of this machine.")
    else:
        print("NOT BUILT: no container engine answers here. Linters read the files, and their steps were done in plain folders.")
    print(f"{len(tests) - failed} passed, {failed} failed")
    return failed > 0 or not tests


if __name__ == "__main__":
    sys.exit(main())
