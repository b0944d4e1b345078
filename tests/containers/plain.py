"""A container without an engine: what a stage of the Dockerfile ends with, performed in a plain folder, and its process started as an
engine would: the first of its own process namespace, on a read-only root in its own mount namespace, as the user of the image, without
capabilities or a way to gain any. Its network is the machine's. Needs root, on Linux.

Nothing can be pulled, so something stands for the base image: for `slim` the libraries that the program is linked with, certificates
and users, and no shell; with `machine=True` this machine's own /usr, with what is installed there.
"""

import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

DEADLINE = 60
MACHINE = ("bin", "lib", "lib32", "lib64", "sbin", "usr")
DEVICES = ("null", "zero", "full", "random", "urandom")
USERS = "root:x:0:0::/root:/sbin/nologin\nnonroot:x:65532:65532::/home/nonroot:/sbin/nologin\n"
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, LAST_CAPABILITY = 38, 24, 40


class Image:
    """A stage, performed in `folder`. `built` has the files of other stages: their paths there, and what stands for them."""

    def __init__(self, stage, folder, built, machine=False):
        self.root, self.machine = folder / "root", machine
        self.volumes, self.user, self.workdir = [], "0:0", "/"
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        for place in ("proc", "dev", "tmp", "etc", "run", "usr/local/bin", "var/lib", "home"):
            (self.root / place).mkdir(parents=True)
        for device in DEVICES:
            (self.root / "dev" / device).touch()
        (self.root / "etc/passwd").write_text(USERS)
        for name in ("hosts", "resolv.conf", "nsswitch.conf"):
            shutil.copy(f"/etc/{name}", self.root / "etc")
        shutil.copytree("/etc/ssl/certs", self.root / "etc/ssl/certs")
        if not machine:
            linked = subprocess.run(["ldd", built["/src/target/release/portolan"]], check=True, capture_output=True, text=True)
            for library in re.findall(r"(/\S+) \(", linked.stdout):
                (self.root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, self.root / library[1:])
        for one in stage.instructions:
            match one.name:
                case "COPY":
                    for source in one.words[:-1]:
                        self.copy(built[source], source, one)
                case "ENV":
                    self.environment.update(one.pairs)
                case "WORKDIR":
                    self.workdir = one.text
                    (self.root / one.text[1:]).mkdir(parents=True, exist_ok=True)
                case "VOLUME":
                    self.volumes.extend(one.listed)
                case "USER":
                    self.user = one.text
        self.entrypoint = stage.only("ENTRYPOINT").listed
        self.healthcheck = stage.only("HEALTHCHECK").listed
        self.stop = getattr(signal, stage.only("STOPSIGNAL").text)

    def copy(self, made, source, instruction):
        target = instruction.words[-1]
        place = self.root / (target[1:] + (pathlib.Path(source).name if target.endswith("/") else ""))
        if made.is_dir():
            shutil.copytree(made, place)
        else:
            shutil.copy(made, place)
        if "chmod" in instruction.flags:
            place.chmod(int(instruction.flags["chmod"], 8))
        os.chown(place, *map(int, instruction.flags.get("chown", "0:0").split(":")))


class Container:
    """A process of an image. Each VOLUME is a new folder with what the image has there, unless `volumes` names one; `mounts` are
    folders of this machine that are seen in it, read-only."""

    def __init__(self, image, folder, arguments=(), environment=None, mounts=()):
        self.image, self.folder = image, folder
        folder.mkdir(parents=True)
        self.volumes = {}
        for volume in image.volumes:
            here = folder / volume.strip("/").replace("/", "-")
            shutil.copytree(image.root / volume[1:], here)
            there = (image.root / volume[1:]).stat()
            here.chmod(there.st_mode & 0o7777)
            os.chown(here, there.st_uid, there.st_gid)
            self.volumes[volume] = here
        self.environment = image.environment | {"HOME": "/home/nonroot"} | (environment or {})
        told = {
            "root": str(image.root),
            "machine": MACHINE if image.machine else (),
            "mounts": [(str(here), there) for here, there in mounts],
            "volumes": [(str(here), volume) for volume, here in self.volumes.items()],
            "user": [int(part) for part in image.user.split(":")],
            "workdir": image.workdir,
            "environment": self.environment,
            "command": [*image.entrypoint, *arguments],
        }
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, __file__, json.dumps(told)]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.outside = subprocess.Popen(enter, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def pid(self):
        """The first process, by its number on this machine."""
        children = pathlib.Path(f"/proc/{self.outside.pid}/task/{self.outside.pid}/children")
        return int(wait_for(lambda: children.read_text().split(), f"a process\n{self.said()}")[0])

    def said(self):
        return self.log.read_text(errors="replace")

    def until_it_listens(self):
        def listens():
            assert self.outside.poll() is None, f"it ended with {self.outside.returncode}:\n{self.said()}"
            return " listens on " in self.said()

        wait_for(listens, "it does not listen", self.said)
        return self

    def run(self, command, **more):
        """Another process in it, as `docker exec` does."""
        user, group = self.image.user.split(":")
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", f"--setuid={user}", f"--setgid={group}", "--"]
        return subprocess.run([*enter, *command], env=self.environment, capture_output=True, text=True, timeout=DEADLINE, **more)

    def check(self, *more):
        """What HEALTHCHECK says: the exit status and what was printed."""
        done = self.run([*self.image.healthcheck, *more])
        return done.returncode, done.stdout + done.stderr

    def processes(self):
        """All in it but the first: their numbers on this machine, names and states."""
        found, next_ones = [], [self.pid]
        while next_ones:
            parent = next_ones.pop()
            try:
                threads = list(pathlib.Path(f"/proc/{parent}/task").glob("*/children"))
            except OSError:
                continue  # It has ended since it was found.
            for thread in threads:
                try:
                    children = [int(pid) for pid in thread.read_text().split()]
                except OSError:
                    continue
                next_ones.extend(children)
                for pid in children:
                    try:
                        status = pathlib.Path(f"/proc/{pid}/status").read_text()
                    except OSError:
                        continue
                    found.append((pid, *re.findall(r"^(?:Name|State):\t(\S+)", status, re.MULTILINE)))
        return found

    def ended(self):
        """Its exit status, when it has ended by itself or was told to."""
        return self.outside.wait(DEADLINE)

    def stopped(self):
        os.kill(self.pid, self.image.stop)
        return self.ended()

    def killed(self):
        os.kill(self.pid, signal.SIGKILL)
        self.outside.wait(DEADLINE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # --kill-child takes the namespace with it.
        self.outside.kill()
        self.outside.wait()


def wait_for(ready, what, more=lambda: ""):
    deadline = time.monotonic() + DEADLINE
    while not (found := ready()):
        assert time.monotonic() < deadline, f"{what}\n{more()}"
        time.sleep(0.02)
    return found


def become(told):
    """In the new namespaces, the first process: makes the root and becomes the command."""

    def mount(*arguments):
        subprocess.run(["mount", *arguments], check=True)

    root = told["root"]
    mount("--make-rprivate", "/")
    mount("--bind", root, root)
    for name in told["machine"]:
        here, there = pathlib.Path("/", name), pathlib.Path(root, name)
        if here.is_symlink():
            there.is_symlink() or there.symlink_to(os.readlink(here))
        elif name == "usr":
            # What the image has in /usr/local/bin stays what it has.
            own = pathlib.Path(root + ".local")
            own.mkdir(exist_ok=True)
            mount("--bind", f"{root}/usr/local/bin", str(own))
            mount("--bind", "/usr", str(there))
            mount("-o", "remount,bind,ro", str(there))
            mount("--bind", str(own), f"{root}/usr/local/bin")
            mount("-o", "remount,bind,ro", f"{root}/usr/local/bin")
        elif here.is_dir():
            there.mkdir(exist_ok=True)
            mount("--bind", str(here), str(there))
            mount("-o", "remount,bind,ro", str(there))
    for here, there in told["mounts"]:
        pathlib.Path(root, there[1:]).mkdir(parents=True, exist_ok=True)
        mount("--bind", here, root + there)
        mount("-o", "remount,bind,ro", root + there)
    for device in DEVICES:
        mount("--bind", f"/dev/{device}", f"{root}/dev/{device}")
    for here, there in told["volumes"]:
        mount("--bind", here, root + there)
    mount("-t", "proc", "proc", f"{root}/proc")
    mount("-o", "remount,bind,ro", root)
    os.chroot(root)
    os.chdir(told["workdir"])
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.umask(0o022)
    os.setgroups([])
    user, group = told["user"]
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    os.execve(told["command"][0], told["command"], told["environment"])


if __name__ == "__main__":
    become(json.loads(sys.argv[1]))
