#!/usr/bin/env python3
"""What several Portolans on one PostgreSQL do: runs each second and memory of 1, 2 and 4, with and without sticky routing by
server id through nginx, what idle ones ask of PostgreSQL, how many changes it takes, and starts beside a million servers.

    benches/scale.py --postgres postgres://postgres@127.0.0.1:5432/postgres [--portolan FILE] [--fake FILE] [PART ...]

Parts: idle changes replicas sticky million; all of them without any. Needs a PostgreSQL that nothing else uses, whose user may
create databases, psql, wrk and nginx (Debian's packages), and the machine to itself: all runs on it, so figures are for comparison
with each other. PostgreSQL counts its own statements where pg_stat_statements is loaded.
"""
import argparse, contextlib, json, os, pathlib, re, signal, socket, subprocess, sys, tempfile, time, urllib.request, uuid

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = "07" * 32
IDLE = (1, 10, 100)
REPLICAS = (1, 2, 4)
SERVERS = 64  # with a session each, in `replicas` and `sticky`
SECONDS = 10


def say(text=""):
    print(text, flush=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def request(url, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(asked, timeout=120) as answer:
        text = answer.read()
    return json.loads(text) if text else None


class Bench:
    def __init__(self, options, folder):
        self.options, self.folder = options, pathlib.Path(folder)

    def sql(self, sql, database="postgres"):
        url = self.options.postgres.rsplit("/", 1)[0] + "/" + database
        done = subprocess.run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", url], input=sql, text=True, capture_output=True)
        if done.returncode:
            sys.exit(f"psql: {done.stderr}")
        return done.stdout.strip()

    @contextlib.contextmanager
    def database(self):
        name = f"scale_{uuid.uuid4().hex}"
        self.sql(f"CREATE DATABASE {name}")
        try:
            yield name
        finally:
            self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    @contextlib.contextmanager
    def replicas(self, database, count, *settings):
        """So many Portolans on this database: their URLs and processes."""
        processes, urls, took = [], [], []
        url = self.options.postgres.rsplit("/", 1)[0] + "/" + database
        try:
            for _ in range(count):
                data = tempfile.mkdtemp(dir=self.folder)
                environment = {**os.environ, "DATABASE_URL": url, "PORTOLAN_KEY": KEY, "PORTOLAN_LOG": "error"}
                began = time.monotonic()
                command = [self.options.portolan, "--listen", "127.0.0.1:0", "--data-dir", data, *settings]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
                processes.append(process)
                urls.append(process.stdout.readline().split()[-1])
                took.append(time.monotonic() - began)
            yield urls, processes, took
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)
                process.stdout.close()

    @contextlib.contextmanager
    def upstream(self):
        process = subprocess.Popen([self.options.fake, "http"], stdout=subprocess.PIPE, text=True)
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    @contextlib.contextmanager
    def nginx(self, urls, sticky):
        """nginx before these: the lines of docs/operations.md, or each request to the next one."""
        port, place = free_port(), tempfile.mkdtemp(dir=self.folder)
        hosts = [url.removeprefix("http://") for url in urls]
        way = "hash $mcp_server consistent;" if sticky else ""
        pathlib.Path(place, "nginx.conf").write_text(f"""
            daemon off; worker_processes 1; pid {place}/pid; error_log {place}/error.log;
            events {{ worker_connections 4096; }}
            http {{
                access_log off; client_body_temp_path {place}; proxy_temp_path {place}; fastcgi_temp_path {place};
                uwsgi_temp_path {place}; scgi_temp_path {place};
                map $uri $mcp_server {{ ~^/v1/mcp-servers/(?<id>mcp_server-[^/]+) $id; default $request_id; }}
                upstream portolan {{ {way} {" ".join(f"server {host};" for host in hosts)} keepalive 64; }}
                server {{
                    listen 127.0.0.1:{port};
                    location / {{
                        proxy_pass http://portolan; proxy_http_version 1.1; proxy_set_header Connection "";
                        proxy_set_header Host $http_host; proxy_buffering off; proxy_next_upstream off;
                    }}
                }}
            }}""")
        process = subprocess.Popen(["nginx", "-p", place, "-c", f"{place}/nginx.conf", "-e", f"{place}/error.log"])
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(20)

    def register(self, url, upstream, count):
        """Servers with one tool to run each, as paths."""
        paths = []
        for number in range(count):
            server = request(f"{url}/v1/mcp-servers/", {"server_name": f"s{number}", "config": {"server_url": upstream}})
            tools = request(f"{url}/v1/mcp-servers/{server['id']}/tools")
            tool = next(tool["id"] for tool in tools if tool["name"] == "echo")
            paths.append(f"/v1/mcp-servers/{server['id']}/tools/{tool}/run")
        return paths

    def load(self, url, paths, connections=32, seconds=SECONDS):
        """Runs of all of them at random: each second, p50 and p99 in ms."""
        script = self.folder / "load.lua"
        listed = ", ".join(f'"{path}"' for path in paths)
        script.write_text(f"""
            local paths = {{ {listed} }}
            wrk.headers["content-type"] = "application/json"
            function init(args) math.randomseed(os.time()) end
            function request() return wrk.format("POST", paths[math.random(#paths)], nil, '{{"args": {{"message": "a"}}}}') end
            function done(summary, latency)
                local e = summary.errors
                io.write(string.format("RESULT %f %f %f %d\\n", summary.requests / summary.duration * 1e6,
                    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
                    e.connect + e.read + e.write + e.status + e.timeout))
            end""")
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", script, url]
        done = subprocess.run(command, text=True, capture_output=True, check=True)
        rate, p50, p99, errors = re.search(r"RESULT (\S+) (\S+) (\S+) (\d+)", done.stdout).groups()
        if int(errors):
            sys.exit(f"{errors} requests failed: {done.stdout}")
        return float(rate), float(p50), float(p99)


def resident(process):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 / 1e6


def metric(url, name):
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}(\{{|\s)", line))


def idle(bench):
    say("\nIdle replicas: what they ask of PostgreSQL (60 s after 15 s of rest; registered servers: none)")
    say("  replicas  transactions/s  statements/s  connections  memory of each, MB")
    has_statements = "pg_stat_statements" in bench.sql("SHOW shared_preload_libraries")
    for count in IDLE:
        with bench.database() as database, bench.replicas(database, count) as (_, processes, _):
            if has_statements:
                bench.sql("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
            time.sleep(15)
            transactions = f"SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '{database}'"
            calls = ("SELECT coalesce(sum(calls), 0) FROM pg_stat_statements JOIN pg_database ON pg_database.oid = dbid "
                     f"WHERE datname = '{database}'")
            connections = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'"
            before = [int(bench.sql(transactions)), int(bench.sql(calls)) if has_statements else 0]
            time.sleep(60)
            after = [int(bench.sql(transactions)), int(bench.sql(calls)) if has_statements else 0]
            rates = [(new - old) / 60 for new, old in zip(after, before)]
            memory = sum(map(resident, processes)) / count
            statements = f"{rates[1]:12.1f}" if has_statements else "           -"
            say(f"  {count:8}  {rates[0]:14.1f}  {statements}  {int(bench.sql(connections)):11}  {memory:19.1f}")


def changes(bench):
    say("\nChanges (renames of servers, 16 callers): PostgreSQL lets one transaction at a time note its own")
    say("  replicas  changes/s")
    for count in REPLICAS:
        with bench.database() as database, bench.upstream() as upstream, bench.replicas(database, count) as (urls, _, _):
            paths = [path.rsplit("/tools", 1)[0] for path in bench.register(urls[0], upstream, 16)]
            from concurrent.futures import ThreadPoolExecutor
            ends = time.monotonic() + SECONDS

            def rename(number):
                done = 0
                while time.monotonic() < ends:
                    body = {"server_name": f"{number} {done}"}
                    request(urls[number % count] + paths[number], body, "PATCH")
                    done += 1
                return done

            with ThreadPoolExecutor(16) as pool:
                total = sum(pool.map(rename, range(16)))
            say(f"  {count:8}  {total / SECONDS:9.0f}")


def replicas(bench):
    say(f"\nRuns (streamable HTTP, {SERVERS} servers, 32 callers through nginx)")
    say("  replicas  runs/s  p50 ms  p99 ms  memory of each, MB")
    for count in REPLICAS:
        with bench.database() as database, bench.upstream() as upstream:
            with bench.replicas(database, count) as (urls, processes, _), bench.nginx(urls, False) as front:
                paths = bench.register(urls[0], upstream, SERVERS)
                bench.load(front, paths, seconds=3)
                rate, p50, p99 = bench.load(front, paths)
                memory = sum(map(resident, processes)) / count
                say(f"  {count:8}  {rate:6.0f}  {p50:6.2f}  {p99:6.2f}  {memory:19.1f}")


def sticky(bench):
    count, many = 4, 200
    say(f"\nSticky routing: {count} replicas, {many} servers by streamable HTTP, 32 callers through nginx")
    say("  routing        sessions opened  live, all  memory of all, MB  runs/s  p50 ms  p99 ms")
    for name, is_sticky in (("next replica", False), ("by server id", True)):
        with bench.database() as database, bench.upstream() as upstream:
            with bench.replicas(database, 1) as (urls, _, _):
                paths = bench.register(urls[0], upstream, many)
            with bench.replicas(database, count) as (urls, processes, _), bench.nginx(urls, is_sticky) as front:
                bench.load(front, paths, seconds=SECONDS)
                rate, p50, p99 = bench.load(front, paths)
                opened = sum(metric(url, "portolan_session_opens_total") for url in urls)
                live = sum(metric(url, "portolan_sessions") for url in urls)
                memory = sum(map(resident, processes))
                say(f"  {name:13}  {opened:15.0f}  {live:9.0f}  {memory:17.1f}  {rate:6.0f}  {p50:6.2f}  {p99:6.2f}")


def million(bench):
    say("\nA start beside many servers (each by URL, with one tool; the second start of each, until the first line)")
    say("  servers  ready after, ms  memory, MB  GET one server, p50 ms")
    for servers in (10, 1_000_000):
        with bench.database() as database, bench.upstream() as upstream:
            with bench.replicas(database, 1) as (urls, _, _):
                path = bench.register(urls[0], upstream, 1)[0]
            server = path.split("/")[3]
            bench.sql(
                "INSERT INTO servers (id, server_name, type, config, revision, era, state, last_synced_at, created_at, updated_at) "
                "SELECT 'mcp_server-' || gen_random_uuid(), 'server ' || i, type, config, revision, era, 'ready', last_synced_at, "
                f"created_at + i * interval '1 ms', updated_at FROM generate_series(2, {servers}) i, servers; "
                "INSERT INTO tools (id, server_id, name, name_digest, position, definition, changes) "
                "SELECT 'tool-' || gen_random_uuid(), id, 'echo', 'digest', 0, '{}', '[]' FROM servers "
                f"WHERE id <> '{server}'; ANALYZE;", database)
            with bench.replicas(database, 1):
                pass
            with bench.replicas(database, 1) as (urls, processes, took):
                times = []
                for _ in range(200):
                    began = time.monotonic()
                    request(f"{urls[0]}/v1/mcp-servers/{server}")
                    times.append(time.monotonic() - began)
                time.sleep(5)
                say(f"  {servers:7}  {took[0] * 1e3:15.0f}  {resident(processes[0]):10.1f}  {sorted(times)[100] * 1e3:22.2f}")


PARTS = {part.__name__: part for part in (idle, changes, replicas, sticky, million)}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--postgres", required=True, metavar="URL")
    arguments.add_argument("--portolan", default=ROOT / "target/release/portolan", metavar="FILE")
    arguments.add_argument("--fake", default=ROOT / "target/release/examples/fake-mcp", metavar="FILE")
    arguments.add_argument("part", nargs="*", choices=[[], *PARTS], metavar="PART")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        version = bench.sql("SHOW server_version")
        say(f"{options.portolan}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, PostgreSQL {version}")
        for part in options.part or PARTS:
            PARTS[part](bench)


main()
