"""Servers that answer a request without reading its body, and clients that hide requests in such bodies.

Between them stands tinyauth, and all of it is real: processes and sockets. A server records each request that it parsed: a
hidden one is a request of which the bytes were a body to the client who sent them. What a server does:

    loading     503 to everything, as llama-server while it loads a model
    /early      415, without looking at the body
    else        it reads the body and answers 200, or refuses as its library does

Its answers name the run, X-Run of the request, which is a number of its own for each.
"""

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import grammar
import judges
import traffic
from program import Tinyauth

HERE = Path(__file__).parent
AT_ONCE = 24
HONEST = 100
MODES = {"serving": 200, "loading": 503}


@dataclass
class Kind:
    """A reason to leave a body unread, as a client brings it about."""

    name: str
    start: str = "POST /early"
    fields: tuple = ()
    chunked: bool = False
    bare: bool = False          # what hides is no body: requests without a key follow
    more: int = 0               # bytes of the body that are claimed and never sent
    refused: int = 0            # the status with which tinyauth itself must refuse it
    only_cpp: bool = False      # others read such a body
    before: int = 0             # bytes of its head as a server gets it

    def head(self):
        lines = [f"{self.start} HTTP/1.1", "Host: localhost", "Authorization: Bearer {key}", "X-Run: {run}", *self.fields]
        return "".join(f"{line}\r\n" for line in lines)



KINDS = [
    Kind("not read"),
    Kind("not read, chunked", chunked=True),
    Kind("not read, more claimed", more=4_000_000),
    Kind("not read, PUT", "PUT /early"),
    Kind("not read, expected", fields=("Expect: 100-continue",)),
    Kind("multipart without boundary", "POST /v1/audio/transcriptions", ("Content-Type: multipart/form-data",), only_cpp=True),
    Kind("coding that was not built in", "POST /v1/chat/completions", ("Content-Encoding: gzip",), only_cpp=True),
    Kind("coding unknown", "POST /v1/chat/completions", ("Content-Encoding: rot13",), only_cpp=True),
    Kind("bad Accept", "POST /v1/chat/completions", ("Accept: text/html;q=7",), only_cpp=True),
    Kind("bad Range", "POST /v1/chat/completions", ("Range: bytes=9-1",), only_cpp=True),
    Kind("a form too long", "POST /v1/completions", ("Content-Type: application/x-www-form-urlencoded",), only_cpp=True),
    Kind("longer than the server takes", "POST /v1/chat/completions", more=4_000_000),
    Kind("GET with a body", "GET /v1/models"),
    Kind("OPTIONS with a body", "OPTIONS /v1/models"),
    Kind("DELETE with a body", "DELETE /v1/models", chunked=True),
    Kind("upgrade that is not had", "GET /v1/realtime", ("Connection: Upgrade", "Upgrade: websocket"), bare=True),
    # What cpp-httplib refuses before it can have seen `Connection: close`.
    Kind("unknown method", "PROPFIND /early", refused=501),
    Kind("two queries", "POST /early?a?b", refused=400),
    Kind("long line", "POST /early?" + "a" * 8172, refused=414),
    Kind("long field", fields=("X-Long: " + "v" * 8190,), refused=431),
    Kind("many fields", fields=tuple(f"X-{n}: v" for n in range(95)), refused=431),
]


def is_socket(link):
    try:
        return str(link.readlink()).startswith("socket:")
    except FileNotFoundError:       # closed meanwhile
        return False


class Server:
    def __init__(self, name, command, kinds):
        self.name, self.command, self.kinds = name, [str(word) for word in command], kinds

    async def start(self, mode, record):
        self.record = record
        self.process = await asyncio.create_subprocess_exec(
            *self.command, mode, str(record), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE)
        self.port = int(await self.process.stdout.readline())
        self.sockets = self.count_sockets()

    def count_sockets(self):
        return sum(is_socket(link) for link in Path(f"/proc/{self.process.pid}/fd").iterdir())

    async def stop(self):
        """Ends it when it has read all that was sent to it. Returns its record, one entry a request, and what it complained of."""
        for _ in range(1500):
            if self.sockets >= self.count_sockets():
                break
            await asyncio.sleep(0.02)
        busy = max(self.count_sockets() - self.sockets, 0)
        _, said = await self.process.communicate(b"")
        lines = self.record.read_text("latin-1").splitlines() if self.record.exists() else []
        said = said.decode("latin-1").splitlines() + ([f"{busy} connections stay open"] if busy else [])
        return [line.split(" ") for line in lines], said


def servers(python, build):
    cpp = [Server(f"cpp-httplib of {release}", [build / f"refuse_cpp_{release}"], KINDS) for release in judges.RELEASES]
    others = [kind for kind in KINDS if not kind.only_cpp and not kind.refused]
    uvicorn = [Server(f"uvicorn with {parser}", [python, HERE / "refuse_python.py", parser], others) for parser in ("h11", "httptools")]
    return [*cpp, *uvicorn, Server("net/http", [build / "refuse_go"], others)]


async def storm(build, to, kinds, runs, honest=0, status=200):
    """What the clients of storm.go got."""
    job = {"To": f"127.0.0.1:{to}", "Key": grammar.KEY.decode(), "Runs": runs, "AtOnce": AT_ONCE, "Honest": honest, "Status": status,
           "Kinds": [{"Name": kind.name, "Head": kind.head(), "Chunked": kind.chunked, "Bare": kind.bare, "More": kind.more, "Before": kind.before,
                      "Hidden": f"/hidden/{KINDS.index(kind):02}"} for kind in kinds]}
    process = await asyncio.create_subprocess_exec(str(build / "storm"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate(json.dumps(job).encode())
    if process.returncode:
        raise RuntimeError("the clients died")
    return json.loads(said)


async def measure_heads(options, folder):
    """How long the head of each kind is when it comes to a server: a recording one looks."""
    upstream = traffic.Upstream()
    tinyauth = Tinyauth(options.tinyauth, folder, await upstream.listen())
    port = await tinyauth.start()
    try:
        for kind in KINDS:
            await storm(options.build, port, [kind], 1)
            connections, _ = await upstream.take()
            kind.before = max((bytes(connection.data).find(b"\r\n\r\n") + 4 for connection in connections), default=0)
    finally:
        await tinyauth.stop()
        upstream.server.close()


def hidden_of(entries):
    """How many hidden requests of each kind, by its number, a server parsed."""
    found = (re.match(r"/hidden/(\d\d)", target) for _, target, *_ in entries)
    return Counter(int(match[1]) for match in found if match)


async def check_server(server, options, folder):
    """Asked without tinyauth, it does run what is hidden, or not: those that do are worth asking. Returns the kinds that do."""
    await server.start("serving", folder / "direct")
    await storm(options.build, server.port, [kind for kind in server.kinds if not kind.more and not kind.bare], 32)
    entries, _ = await server.stop()
    (folder / "direct").unlink()
    return [KINDS[number].name for number in sorted(hidden_of(entries))]


async def storm_server(server, mode, options, folder, score):
    record = folder / "record"
    await server.start(mode, record)
    tinyauth = Tinyauth(options.tinyauth, folder, server.port)
    try:
        result = await storm(options.build, await tinyauth.start(), server.kinds, options.refusals, HONEST, MODES[mode])
    finally:
        await tinyauth.stop()
    entries, complaints = await server.stop()
    record.unlink()
    judge(f"{server.name}, {mode}", server.kinds, result, entries, complaints + tinyauth.deaths(), options, score)


def judge(where, kinds, result, entries, complaints, options, score):
    hidden = hidden_of(entries)
    for kind in kinds:
        name, ran = f"{where}, {kind.name}", hidden[KINDS.index(kind)]
        score.check(f"{name}: nothing hidden ran", not ran, f"{ran} ran in {options.refusals} runs", quiet=True)
        statuses = result["Answers"].get(kind.name, {})
        good = set(statuses) <= {str(kind.refused), "left"} if kind.refused else "502" not in statuses and sum(statuses.values()) > 0
        score.check(f"{name}: its answers", good, statuses, quiet=True)
    garbled = [entry for entry in entries if entry[0] == "!" and entry[2] == "-"]
    score.check(f"{where}: every head was read as one", not garbled, f"{len(garbled)} were not, {garbled[:3]}", quiet=True)
    runs = Counter(entry[2] for entry in entries if entry not in garbled and not entry[1].startswith("/hidden"))
    twice = [run for run, times in runs.items() if times > 1 or not run.isdigit()]
    score.check(f"{where}: nothing came twice, or from nobody", not twice, twice[:5], quiet=True)
    score.check(f"{where}: the server was asked", len(runs) > options.refusals * len(kinds) / 2, f"{len(runs)} requests", quiet=True)
    score.check(f"{where}: honest clients got its own answers", result["Honest"] == HONEST, f"{result['Honest']} of {HONEST}")
    score.check(f"{where}: each answer belongs to its request", not result["Troubles"], result["Troubles"][:5] or "they do", quiet=True)
    score.check(f"{where}: nobody complained", not complaints, complaints[:3], quiet=True)


async def refusal_test(options, folder, python, score):
    await measure_heads(options, folder)
    for server in servers(python, options.build):
        if options.only_server and options.only_server not in server.name:
            continue
        ran = await check_server(server, options, folder)
        if "cpp-httplib" in server.name and "forky" not in server.name:
            score.check(f"{server.name}: asked without tinyauth it runs what is hidden", len(ran) > 5, ", ".join(ran))
        for mode in MODES:
            await storm_server(server, mode, options, folder, score)
