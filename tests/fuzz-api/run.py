"""schemathesis against a live Portolan: `run.py short|long`, environment as in ../sdk/processes.py.

That Portolan has an empty folder for PATH, so that no fuzzed command can ever run, and short deadlines, so that no fuzzed address
can hold it up. Ends non-zero when a check failed, when Portolan did not survive, or when it did not end cleanly.
"""

import os
import pathlib
import subprocess
import sys
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))

import processes  # noqa: E402

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
]
LENGTHS = {
    "short": ["--max-examples", "20", "--max-time", "120"],
    "long": ["--max-examples", "500", "--max-time", "1200"],
}


def main(length):
    with processes.new_folder() as folder:
        empty = pathlib.Path(folder) / "empty"
        empty.mkdir()
        portolan = processes.Portolan(
            folder,
            {
                "PATH": str(empty),
                "PORTOLAN_CONNECT_TIMEOUT": "1s",
                "PORTOLAN_HANDSHAKE_TIMEOUT": "2s",
                "PORTOLAN_CREATE_SYNC_TIMEOUT": "2s",
            },
        )
        try:
            with urllib.request.urlopen(f"{portolan.url}/openapi.yaml", timeout=10) as answer:
                assert answer.status == 200
            argv = [
                str(pathlib.Path(sys.executable).with_name("schemathesis")), "run", f"{portolan.url}/openapi.yaml",
                "--url", portolan.url, "--checks", ",".join(CHECKS), *LENGTHS[length],
                "--request-timeout", "15", "--workers", "2", "--continue-on-failure",
                "--suppress-health-check", "all", "--generation-database", "none", "--no-color", "--output-sanitize", "false",
            ]
            done = subprocess.run(
                argv, cwd=folder, env=os.environ | {"PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "hooks"}, check=False
            )
            assert portolan.child.poll() is None, "Portolan ended:\n" + "\n".join(portolan.lines[-40:])
        finally:
            portolan.stop()
        return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
