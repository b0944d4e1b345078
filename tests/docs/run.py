"""What the documents say is tried: every command of README.md, SECURITY.md and docs/ runs, every link leads somewhere.

The `sh` blocks of a document run one after another in one bash session, in a new folder with a HOME of its own (`tests/docs/home`)
and `portolan` on the PATH, and `python` and `js` blocks between them. A command that fails ends the document, and so does an HTTP answer of
400 or more to curl. What is special:

- `portolan` in the foreground is a server in another terminal: it is started, waited for, and ended at the next one.
- Ports of this machine stand for free ones, `postgres://portolan@db.example.com/portolan` for a new database of the server that
  PORTOLAN_TEST_POSTGRES_URL names, and `postgresql://letta@db.example.com/letta` for one of Letta's there.
- A block without a language right below a block is what that one prints on standard output; `…` is any text, a line with nothing else any lines.
- `<!-- not run: REASON -->` right above a block: it cannot run here. Its syntax is checked, and it is listed.
- `<!-- fails: REASON -->` right above a block: its last command ends with an error.

Usage: PORTOLAN_BIN=… tests/docs/run.py [DOCUMENT…]; needs bash, curl, Node with npm, sqlite3, and pg_dump and psql.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.parse
import uuid

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
POSTGRES = "postgres://portolan@db.example.com/portolan"
# A database of Letta's with made-up servers, and the key of its secrets.
LETTA = "postgresql://letta@db.example.com/letta"
LETTA_DUMP = ROOT / "tests/data/letta-0.16.8.sql"
LETTA_KEY = ("LETTA_ENCRYPTION_KEY=…", "LETTA_ENCRYPTION_KEY=made-up-letta-encryption-key-1")
# Downloads of npm and pip are among the commands of a document.
DOCUMENT_TIMEOUT = 900
# The languages of blocks that are run.
RUN = ("sh", "python", "js")

PRELUDE = r"""
set -eo pipefail

server=
stop_server() {
    [[ $server ]] || return 0
    kill "$server" 2>/dev/null || true
    wait "$server" || true
    server=
}

portolan() {
    local word
    for word in "$@"; do
        case $word in
            key | token | import | export | migrate-letta | rotate-keys | healthcheck | help | -h | --help | -V | --version)
                command portolan "$@"
                return
                ;;
        esac
    done
    # `portolan … &`: what runs is this very process, so that $! names it.
    if ((BASH_SUBSHELL)); then
        if [[ $server ]]; then
            kill "$server" 2>/dev/null || true
            # A child of the shell above, which alone can wait for it.
            until ! grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$server/status"; do sleep 0.05; done
        fi
        exec portolan "$@"
    fi
    stop_server
    command portolan "$@" >"$DOCS_STATE/server.log" 2>&1 &
    server=$!
    local deadline=$((SECONDS + 60))
    until grep -q ' listens on ' "$DOCS_STATE/server.log"; do
        if ! kill -0 "$server" 2>/dev/null || ((SECONDS > deadline)); then
            echo "Portolan did not start:"
            cat "$DOCS_STATE/server.log"
            wait "$server"
            return 1
        fi
        sleep 0.05
    done
}
"""


class Block:
    """A fenced block: where it begins, its language, its text without the indentation, and the remark right above it."""

    def __init__(self, line, language, text, remark):
        self.line, self.language, self.text = line, language, text
        found = re.fullmatch(r"<!-- (not run|fails): (.+) -->", remark)
        self.mark, self.reason = found.groups() if found else (None, None)
        # Whether this is what the block above it prints.
        self.is_output = language == "" and remark == "```"


class Document:
    def __init__(self, path):
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.blocks = []
        # Its lines with those of fenced blocks left empty, so that numbers stay.
        self.prose = []
        fence = None
        above = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            opening = re.fullmatch(r"(\s*)(`{3,})([A-Za-z0-9-]*)\s*", line)
            if fence is None and opening:
                fence = (number, len(opening[1]), opening[2], opening[3], above)
                held = []
            elif fence and line.strip() == fence[2]:
                self.blocks.append(Block(fence[0], fence[3], "".join(text + "\n" for text in held), fence[4]))
                fence = None
            elif fence:
                held.append(line[fence[1] :] if not line[: fence[1]].strip() else line)
                self.prose.append("")
                continue
            if line.strip():
                above = line.strip()
            self.prose.append("" if fence or opening or line.strip().startswith("```") else line)
        if fence:
            raise SystemExit(f"{self.name}:{fence[0]}: this block has no end")

    def anchors(self):
        """The fragments that GitHub gives its headings."""
        seen, found = {}, set()
        for line in self.prose:
            if heading := re.fullmatch(r"#{1,6} +(.+?)(?: +#+)?", line):
                text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
                slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
                count = seen.get(slug, 0)
                seen[slug] = count + 1
                found.add(f"{slug}-{count}" if count else slug)
            found.update(re.findall(r'<a (?:id|name)="([^"]+)"', line))
        return found


# --- What can be read without running anything ---------------------------------------------------------------------------------


def check_links(document, anchors_of, outside):
    """What is wrong with the links of a document. Those to other hosts, which cannot be reached here, go into `outside`."""
    wrong = []
    definitions = {}
    for line in document.prose:
        if definition := re.fullmatch(r"\[([^]]+)\]: +(\S+)", line):
            definitions[definition[1].lower()] = definition[2]
    # Code spans are no links; a link may go on in the next line.
    text = "\n".join(re.sub(r"`[^`]*`", lambda code: "`" + "x" * (len(code[0]) - 2) + "`", line) for line in document.prose)
    targets = [(found.start(), found[1]) for found in re.finditer(r"\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)", text)]
    targets += [(found.start(), found[1]) for found in re.finditer(r"<((?:https?|mailto):[^>\s]+)>", text)]
    for found in re.finditer(r"\]\[([^]]*)\]", text):
        if found[1].lower() not in definitions:
            wrong.append((found.start(), f"[{found[1]}] is defined nowhere"))
    targets += [(0, target) for target in definitions.values()]
    for start, target in targets:
        url = urllib.parse.urlsplit(target)
        if url.scheme == "http" and url.hostname in ("127.0.0.1", "localhost"):
            continue  # a Portolan that was just started
        if url.scheme or url.netloc:
            if url.scheme != "https" or not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", url.netloc):
                wrong.append((start, f"{target} is not https with a plain host"))
            outside.add(target)
            continue
        path = urllib.parse.unquote(url.path)
        file = (document.path.parent / path).resolve() if path else document.path
        if not file.is_relative_to(ROOT) or not file.exists():
            wrong.append((start, f"{target}: there is no such file"))
        elif url.fragment and url.fragment not in anchors_of(file):
            wrong.append((start, f"{target}: that file has no such heading"))
    return [f"{document.name}:{text.count(chr(10), 0, start) + 1}: {problem}" for start, problem in wrong]


# The folders of the repository whose files the documents name.
NAMED = r"(?:src|tests|docs|deploy|benches|migrations|console|fuzz)/[^`\s]*"


def check_paths(document):
    """Files that the document names in code spans and that are not there; a name may be a pattern."""
    wrong = []
    for number, line in enumerate(document.prose, 1):
        for path in re.findall(rf"`({NAMED})`", line):
            if not any(ROOT.glob(path.rstrip("/"))):
                wrong.append(f"{document.name}:{number}: {path} is not there")
    return wrong


def check_fences(document):
    """Commands that nobody would run, because they are no fenced block."""
    found = enumerate(document.prose, 1)
    indented = [number for number, line in found if re.match(r"( {4,}|\t)(?:\$ )?(?:curl|portolan|kill|psql|sqlite3|systemctl|cargo) ", line)]
    return [f"{document.name}:{number}: put this command into a block of sh" for number in indented]


def check_data(document):
    """JSON and TOML that cannot be read. (YAML needs more than the standard library: `tests/documents.rs` reads it.)"""
    wrong = []
    for block in document.blocks:
        reader = {"json": json.loads, "toml": tomllib.loads}.get(block.language)
        try:
            if reader:
                reader(block.text)
        except ValueError as error:
            wrong.append(f"{document.name}:{block.line}: {error}")
    return wrong


def check_syntax(document, block):
    """What bash says of a block that is not run."""
    said = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    return [] if said.returncode == 0 else [f"{document.name}:{block.line}: {said.stderr.strip()}"]


# --- Running -------------------------------------------------------------------------------------------------------------------


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def new_database(dump):
    """The URL of a new database on the throwaway PostgreSQL, with what is in `dump`, if there is one."""
    server = os.environ.get("PORTOLAN_TEST_POSTGRES_URL")
    if not server:
        raise SystemExit("a document uses PostgreSQL: name a throwaway server in PORTOLAN_TEST_POSTGRES_URL")
    name = f"docs_{uuid.uuid4().hex[:12]}"
    subprocess.run(["psql", "-Xqc", f"CREATE DATABASE {name}", server], check=True)
    url = urllib.parse.urlsplit(server)
    made = url._replace(path=f"/{name}").geturl()
    if dump:
        subprocess.run(["psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-f", str(dump), made], check=True, stdout=subprocess.DEVNULL)
    return made


class Names:
    """What stands in a document, and what stands for it here."""

    def __init__(self):
        self.here = {}

    def put_in(self, text):
        def port(found):
            name = found[2]
            self.here.setdefault(name, str(free_port()))
            return found[1] + self.here[name]

        text = re.sub(r"\b((?:127\.0\.0\.1|localhost|0\.0\.0\.0):)(\d{4,5})\b", port, text)
        for name, dump in ((POSTGRES, None), (LETTA, LETTA_DUMP)):
            if name in text:
                if name not in self.here:
                    self.here[name] = new_database(dump)
                text = text.replace(name, self.here[name])
        return text.replace(*LETTA_KEY)

    def drop_databases(self):
        for name in (POSTGRES, LETTA):
            if name in self.here:
                database = urllib.parse.urlsplit(self.here[name]).path.lstrip("/")
                server = os.environ["PORTOLAN_TEST_POSTGRES_URL"]
                subprocess.run(["psql", "-Xqc", f"DROP DATABASE {database} WITH (FORCE)", server], check=True)

    def take_out(self, text):
        for name, here in self.here.items():
            text = text.replace(here, name)
        return text


def is_as_shown(shown, printed):
    """Whether `printed` is what a document shows; spaces at the end of a line count for nothing."""
    pattern = ""
    for line in shown.splitlines():
        if line.strip() == "…":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += "[^\n]*?".join(re.escape(part) for part in line.rstrip().split("…")) + r"[ \t]*\n"
    return re.fullmatch(pattern, printed if printed.endswith("\n") else printed + "\n") is not None


def environment(folder, with_pip):
    """What a session sees: its own HOME, `portolan` and a Python of its own, and how packages are fetched here."""
    home, bin = folder / "home", folder / "bin"
    # Somebody's home, with the files of other programs.
    shutil.copytree(HERE / "home", home)
    for made in (bin, folder / "work", folder / "tmp", folder / "state"):
        made.mkdir()
    (bin / "portolan").symlink_to(pathlib.Path(os.environ["PORTOLAN_BIN"]).resolve())
    # An answer that is an error is a command that failed.
    (home / ".curlrc").write_text("fail-with-body\nshow-error\n")
    venv = [sys.executable, "-m", "venv", str(folder / "venv")]
    subprocess.run(venv if with_pip else venv + ["--without-pip"], check=True, stdout=subprocess.DEVNULL)
    kept = re.compile(r"(?i)(?:pip_.*|npm_config_.*|ssl_cert_.*|node_extra_ca_certs|(?:https?|no)_proxy)")
    found = {name: value for name, value in os.environ.items() if kept.fullmatch(name)}
    postgres = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    path = [bin, folder / "venv/bin", *os.environ["PATH"].split(":"), *postgres]
    return found | {
        "HOME": str(home),
        "PATH": ":".join(map(str, path)),
        "TMPDIR": str(folder / "tmp"),
        "LANG": "C.UTF-8",
        "DOCS_STATE": str(folder / "state"),
        # A slow machine may take its time to fetch a server.
        "PORTOLAN_START_TIMEOUT": "10m",
    }


def script(document, names, state):
    """The session of a document: its blocks, each of which leaves what it prints in a file."""
    steps = [PRELUDE]
    for block in document.blocks:
        if block.mark == "not run" or block.language not in RUN:
            continue
        name = f"block-{block.line}"
        printed = f'>"$DOCS_STATE/{name}.out" 2>"$DOCS_STATE/{name}.err" </dev/null'
        steps.append(f"echo {block.line} >>\"$DOCS_STATE/begun\"")
        text = names.put_in(block.text)
        if block.language == "sh":
            (state / f"{name}.sh").write_text(text)
            run = f'source "$DOCS_STATE/{name}.sh"'
        else:
            # Where `npm install` put what it imports.
            file = {"python": f"{name}.py", "js": f"{name}.mjs"}[block.language]
            (state.parent / "work" / file).write_text(text)
            run = f"{'python3' if block.language == 'python' else 'node'} {file}"
        if block.mark == "fails":
            steps.append(f"if ({run}) {printed}; then echo 'this should have failed'; exit 1; fi")
        else:
            steps.append(f"{run} {printed}")
    steps.append('echo end >>"$DOCS_STATE/begun"')
    steps.append("stop_server")
    return "\n".join(steps) + "\n"


def end(session):
    """Ends what is left of a session: bash and the servers that it started, which are in its process group."""
    for deadly in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(session.pid, deadly)
        except ProcessLookupError:
            return
        for _ in range(100):
            session.poll()
            time.sleep(0.05)
            try:
                os.killpg(session.pid, 0)
            except ProcessLookupError:
                return


def run_document(document, folder):
    """Runs the blocks of a document; what went wrong, with what was printed."""
    names = Names()
    names.here["8283"] = str(free_port())
    runnable = [block for block in document.blocks if block.mark != "not run"]
    env = environment(folder, any("pip install" in block.text for block in runnable))
    env["PORTOLAN_LISTEN"] = f"127.0.0.1:{names.here['8283']}"
    state = folder / "state"
    (state / "begun").write_text("")
    (state / "session.sh").write_text(script(document, names, state))
    with (state / "session.log").open("wb") as log:
        session = subprocess.Popen(
            ["bash", str(state / "session.sh")],
            cwd=folder / "work", env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )
        try:
            status = session.wait(DOCUMENT_TIMEOUT)
        except subprocess.TimeoutExpired:
            status = f"no end within {DOCUMENT_TIMEOUT} s"
        finally:
            end(session)
            names.drop_databases()
    begun = (state / "begun").read_text().split()
    wrong = []

    def printed(line, kind="out"):
        file = state / f"block-{line}.{kind}"
        return names.take_out(file.read_text(errors="replace")) if file.exists() else ""

    if begun[-1:] != ["end"] or status != 0:
        last = begun[-1] if begun and begun[-1] != "end" else 0
        server = (state / "server.log").read_text() if (state / "server.log").exists() else ""
        about = printed(last) + printed(last, "err") + (state / "session.log").read_text(errors="replace") + server
        about = "".join("    " + line + "\n" for line in about.splitlines()[-60:])
        wrong.append(f"{document.name}:{last}: this block failed ({status}):\n{about}")
    for above, below in zip(document.blocks, document.blocks[1:]):
        if below.is_output and above.mark != "not run" and str(above.line) in begun and not wrong:
            if not is_as_shown(below.text, printed(above.line)):
                about = "".join("    " + line + "\n" for line in printed(above.line).splitlines())
                wrong.append(f"{document.name}:{below.line}: this is not what was printed:\n{about}")
    return wrong, len([line for line in begun if line != "end"])


class Findings:
    """What came of reading and running some documents."""

    def __init__(self, documents):
        self.wrong, self.outside, self.left, self.ran = [], set(), [], 0
        known = {}

        def anchors_of(file):
            if file not in known:
                known[file] = Document(file).anchors() if file.suffix == ".md" else set()
            return known[file]

        for document in documents:
            self.wrong += check_links(document, anchors_of, self.outside) + check_paths(document)
            self.wrong += check_fences(document) + check_data(document)
            for block in document.blocks:
                if block.mark == "not run":
                    self.left.append(f"{document.name}:{block.line}: {block.reason}")
                    if block.language == "sh":
                        self.wrong += check_syntax(document, block)
        for document in documents:
            if any(block.language in RUN and block.mark != "not run" for block in document.blocks):
                started = time.monotonic()
                with tempfile.TemporaryDirectory(prefix="portolan-docs-", ignore_cleanup_errors=True) as folder:
                    failures, blocks = run_document(document, pathlib.Path(folder))
                print(f"{document.name}: {blocks} blocks run in {time.monotonic() - started:.0f} s", flush=True)
                self.ran += blocks
                self.wrong += failures


# Pages with mistakes, and what is to be found in each, by its line and a part of the sentence.
MISTAKES = {
    "links.md": [
        ("3", "missing.md: there is no such file"),
        ("3", "links.md#nowhere: that file has no such heading"),
        ("3", "[undefined] is defined nowhere"),
        ("3", "http://example.com/ is not https"),
        ("3", "src/nothing.rs is not there"),
        ("6", "put this command into a block"),
        ("8", "Expecting value"),
        ("13", "syntax error"),
    ],
    "commands.md": [("10", "this block failed")],
    "outputs.md": [("17", "this is not what was printed")],
    "refusals.md": [("4", "this block failed")],
}


def check_itself():
    """Finds every mistake of `tests/docs/wrong`, and nothing else there."""
    for name, mistakes in MISTAKES.items():
        path = HERE / "wrong" / name
        found = Findings([Document(path)]).wrong
        start = str(path.relative_to(ROOT))
        for line, part in mistakes:
            if not any(one.startswith(f"{start}:{line}: ") and part in one for one in found):
                raise SystemExit(f"{start}:{line}: {part!r} was not found among {found}")
        if len(found) != len(mistakes):
            raise SystemExit(f"{start}: too much was found: {found}")


def main():
    if "PORTOLAN_BIN" not in os.environ:
        raise SystemExit("set PORTOLAN_BIN to the portolan program that the documents are tried with")
    files = [pathlib.Path(file).resolve() for file in sys.argv[1:]]
    if not files:
        check_itself()
        files = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("deploy/*.md"))]
    documents = [Document(file) for file in files]
    found = Findings(documents)
    print("\nNot run, their syntax checked:", *found.left, sep="\n  ")
    print("\nLinks to other hosts, not followed:", *sorted(found.outside), sep="\n  ")
    if found.wrong:
        raise SystemExit("\n" + "\n".join(found.wrong) + f"\n{len(found.wrong)} wrong")
    print(f"\n{len(documents)} documents, {found.ran} blocks run, {len(found.left)} not")


if __name__ == "__main__":
    main()
