"""A PostgreSQL cluster of a scenario's own, and as much of its protocol as it takes to disturb it."""

import asyncio
import os
import pathlib
import pwd
import shutil
import signal
import struct
import subprocess

from world import NEVER, Failed, Process, free_port, require, until


def program(name):
    folders = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / name).exists() and (folder / "postgres").exists():
            return str(folder / name)
    found = shutil.which(name)
    require(found, f"{name} is missing: install PostgreSQL (Debian: apt-get install postgresql)")
    return found


class Cluster(Process):
    """A server with a database `portolan`, which belongs to a role of that name that is no superuser. It writes to the disk
    what it has acknowledged, as tests of lost writes need it."""

    MAX_CONNECTIONS = 60

    def __init__(self, world, name="postgres"):
        self.folder = world.folder / name
        self.folder.mkdir()
        self.port = free_port()
        # PostgreSQL refuses root, which lends it another user.
        self.us = ["setpriv", "--pdeathsig", "QUIT"]
        if os.getuid() == 0:
            users = {entry.pw_name: entry for entry in pwd.getpwall()}
            user = users.get("postgres") or users["nobody"]
            self.us += [f"--reuid={user.pw_name}", f"--regid={user.pw_gid}", "--clear-groups"]
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        argv = [
            *self.us, program("postgres"), "-D", str(self.folder / "cluster"), "-c", "listen_addresses=127.0.0.1",
            "-c", f"port={self.port}", "-c", "unix_socket_directories=", "-c", f"max_connections={self.MAX_CONNECTIONS}",
        ]
        super().__init__(argv, world.folder / f"{name}.log", os.environ | {"LC_ALL": "C"})
        world.everything.append(self)

    def url(self, port=None):
        return f"postgres://portolan@127.0.0.1:{port or self.port}/portolan"

    async def make(self):
        made = await asyncio.create_subprocess_exec(
            *self.us, program("initdb"), "-D", str(self.folder / "cluster"), "-U", "postgres", "-A", "trust", "-E", "UTF8",
            "--no-sync", cwd=self.folder, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        _, wrong = await made.communicate()
        require(made.returncode == 0, "initdb:", wrong.decode())
        await self.start()
        await self.sql("CREATE ROLE portolan LOGIN")
        await self.sql("CREATE DATABASE portolan OWNER portolan")
        return self

    async def start(self):
        await self.spawn(cwd=self.folder)
        await until("PostgreSQL answers", self._answers)

    async def _answers(self):
        require(self.runs, "PostgreSQL did not start:", self.said())
        try:
            await self.sql("SELECT 1")
        except (OSError, Refused):
            return False
        return True

    async def stop_at_once(self):
        """An immediate stop: no transaction ends, no client is told more than that."""
        await self.kill(signal.SIGQUIT)

    async def end(self):
        if self.runs:
            await self.kill(signal.SIGQUIT)

    async def connect(self, user="postgres", database="postgres"):
        return await Connection.open(self.port, user, database)

    async def sql(self, text, database="postgres"):
        connection = await self.connect(database=database)
        try:
            return await connection.query(text)
        finally:
            connection.close()


class Refused(Exception):
    """What PostgreSQL says instead of an answer."""


class Connection:
    """Protocol 3.0, trust authentication, simple queries."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port, user, database):
        async with asyncio.timeout(NEVER):
            self = cls(*await asyncio.open_connection("127.0.0.1", port))
            try:
                body = struct.pack("!i", 196608) + b"".join(
                    text.encode() + b"\0" for text in ("user", user, "database", database, "")
                )
                self.writer.write(struct.pack("!i", len(body) + 4) + body)
                await self._until_ready()
            except BaseException:
                self.close()
                raise
            return self

    async def query(self, text):
        """The rows, each a list of texts."""
        async with asyncio.timeout(NEVER):
            body = text.encode() + b"\0"
            self.writer.write(b"Q" + struct.pack("!i", len(body) + 4) + body)
            return await self._until_ready()

    async def _until_ready(self):
        rows, refusal = [], None
        while True:
            try:
                kind, length = struct.unpack("!ci", await self.reader.readexactly(5))
                body = await self.reader.readexactly(length - 4)
            except asyncio.IncompleteReadError as error:
                raise refusal or ConnectionResetError("PostgreSQL ended the connection") from error
            if kind == b"D":
                (count,), at, row = struct.unpack_from("!h", body), 2, []
                for _ in range(count):
                    (size,) = struct.unpack_from("!i", body, at)
                    at += 4
                    row.append(None if size < 0 else body[at : at + size].decode())
                    at += max(size, 0)
                rows.append(row)
            elif kind == b"E":
                refusal = Refused(body.decode(errors="replace").replace("\0", " "))
            elif kind == b"Z":
                if refusal:
                    raise refusal
                return rows
            elif kind == b"R" and struct.unpack_from("!i", body) != (0,):
                raise Failed("PostgreSQL wants a password, and these clusters have none")

    def close(self):
        self.writer.transport.abort()
