#!/usr/bin/env python3
"""End-to-end tests: the built binary between raw sockets and a stand-in model server.

    python3 tests/e2e.py [--tinyauth BIN] [-v] [--no-measure] [--tls] [PATTERN]

Each test_* function gets a Lab, in which it starts tinyauth, a model of its own when it reads the model's log, and
clients; the lab stops all of it. A test also fails when tinyauth does not drain within 5 s, exits with the wrong
status, leaves a process behind or wrote something unexpected to stderr. Tests run four at a time; those marked @alone
or @measured (they measure, or load the machine) run one by one afterwards. --no-measure leaves out what is measured,
for slow builds such as the sanitizers'. --tls runs all of it with every client over TLS, but for what NOT_OVER_TLS
names with the reason. PATTERN picks tests by a part of their name. The last line is `N passed, N failed`.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE / "tls"))
from model import BLOCK, pattern, pieces  # noqa: E402
from secure import Ragged, SecureSocket, self_signed  # noqa: E402

WATCHDOG = 240                      # seconds for the whole run
WATCHDOG_TLS = 400
HOST = "models.test:8080"
ALICE = "alice-Secret-0123456789"
BOB = "bob-Secret-9876543210"
CAROL = "carol-Secret-5555555555"
WRONG = "wrong-Secret-0000000000"


def sha256(secret):
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()


KEYS = f"""\
# people
alice\t{ALICE}

bob    {sha256(BOB)}    # hashed
carol  {CAROL} off
"""
EVENTS = {"listening", "sandbox", "certificate", "ready", "worker_started", "keys_published", "draining", "stopped", "log_reopened", "upgrade",
          "fewer_connections", "certificate"}


def same(got, want, what):
    assert got == want, f"{what}: got {got!r}, want {want!r}"


def until(look, what, timeout=5.0):
    """The first true value that look() gives."""
    end = time.monotonic() + timeout
    while not (value := look()):
        assert time.monotonic() < end, f"no {what} within {timeout} s"
        time.sleep(0.003)
    return value


class Skip(Exception):
    """This machine cannot show it."""


# HTTP as a client sees it

class Cut(Exception):
    """The connection ended (eof, reset) before the message was whole."""


def request(method="GET", target="/t/echo", *fields, key=ALICE, body=None, chunked=False, version="1.1", host=HOST):
    """The bytes of a request; `fields` are whole lines."""
    lines = [f"{method} {target} HTTP/{version}"]
    if host:
        lines.append(f"Host: {host}")
    if key:
        lines.append(f"Authorization: Bearer {key}")
    lines += fields
    payload = body or b""
    if chunked:
        lines.append("Transfer-Encoding: chunked")
        payload = (b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b"") + b"0\r\n\r\n"
    elif body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + payload


class Answer:
    """A status, its fields in order, and as much of the body as came."""

    def __init__(self, head):
        lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3})(?: [^\r\n]*)?", lines[0])
        assert match, f"bad status line {lines[0]!r}"
        self.status = int(match[1])
        self.fields = []
        for line in lines[1:]:
            match = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*", line)
            assert match, f"bad field {line!r}"
            self.fields.append((match[1], match[2]))
        self.body = b""
        self.interim = []
        lengths = self.all("Content-Length")
        assert len(lengths) < 2 and not (lengths and self.chunked), f"ambiguous framing {self.fields}"

    def all(self, name):
        return [value for field, value in self.fields if field.lower() == name.lower()]

    def get(self, name):
        values = self.all(name)
        assert len(values) < 2, f"{name} comes {len(values)} times"
        return values[0] if values else None

    @property
    def chunked(self):
        return [value.lower() for value in self.all("Transfer-Encoding")] == ["chunked"]

    @property
    def closes(self):
        return "close" in (self.get("Connection") or "").lower()

    def json(self):
        return json.loads(self.body)


class Secure:
    """Whether clients speak TLS, and to whom."""
    pair = None                         # with --tls: what every tinyauth gets that has none of its own
    ports = set()                       # listeners that want TLS

    @classmethod
    def scheme(cls):
        return "https" if cls.pair else "http"

    @classmethod
    def wrap(cls, sock, port):
        return SecureSocket(sock) if port in cls.ports else sock


class Client:
    """One connection, written and read as exactly as a test needs it. `silent`: without a TLS handshake."""

    def __init__(self, address, rcvbuf=None, silent=False):
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        if rcvbuf:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.sock.settimeout(10)
        self.sock.connect(address)
        if not isinstance(address, str):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.port = self.sock.getsockname()[1]
            if not silent:
                self.sock = Secure.wrap(self.sock, address[1])
        self.buffer = bytearray()
        self.answer = None

    def send(self, data):
        self.sock.sendall(data)

    def fill(self):
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionResetError:
            raise Cut("reset") from None
        except Ragged:
            raise Cut("ragged") from None
        if not data:
            raise Cut("eof")
        self.buffer += data

    def until(self, mark):
        while (end := self.buffer.find(mark)) < 0:
            self.fill()
        data = bytes(self.buffer[:end])
        del self.buffer[:end + len(mark)]
        return data

    def take(self, most):
        """At least one byte and at most `most`."""
        if not self.buffer:
            self.fill()
        data = bytes(self.buffer[:most])
        del self.buffer[:most]
        return data

    def head(self):
        """The next head, final or interim; its body follows."""
        self.answer = Answer(self.until(b"\r\n\r\n"))
        return self.answer

    def exactly(self, size):
        while size:
            data = self.take(size)
            size -= len(data)
            yield data

    def chunks(self):
        while size := int(self.until(b"\r\n"), 16):
            yield from self.exactly(size)
            same(self.until(b"\r\n"), b"", "after chunk data")
        same(self.until(b"\r\n"), b"", "after the last chunk")

    def to_end(self):
        try:
            while True:
                yield self.take(1 << 20)
        except Cut as cut:
            if str(cut) != "eof":
                raise

    def body(self, method="GET"):
        answer = self.answer
        if method == "HEAD" or answer.status in (101, 204, 304):
            return iter(())
        if answer.chunked:
            return self.chunks()
        if answer.get("Content-Length") is not None:
            return self.exactly(int(answer.get("Content-Length")))
        return self.to_end()

    def read(self, method="GET"):
        """A whole answer with the interim ones before it."""
        interim = []
        while (answer := self.head()).status < 200 and answer.status != 101:
            interim.append(answer)
        answer.interim = interim
        for piece in self.body(method):
            answer.body += piece
        return answer

    def ask(self, method="GET", *rest, **more):
        self.send(request(method, *rest, **more))
        return self.read(method)

    def end(self):
        """How the connection ends (eof or reset); nothing may come before."""
        assert not self.buffer, f"unasked bytes {bytes(self.buffer)!r}"
        try:
            self.fill()
        except Cut as cut:
            return str(cut)
        raise AssertionError(f"unasked bytes {bytes(self.buffer)!r}")

    def close(self):
        self.sock.close()

    def reset(self):
        raw = getattr(self.sock, "raw", self.sock)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()


# Processes

def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid):
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry))
    return [child for child in found if alive(child)]


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TINYAUTH_")}
    return {**clean, **more}


class Started:
    """Every process that runs, so that the watchdog can stop them too."""
    running = []
    aborted = False

    @classmethod
    def popen(cls, *args, **more):
        assert not cls.aborted, "the run was aborted"
        process = subprocess.Popen(*args, **more)
        cls.running.append(process)
        return process

    @classmethod
    def kill_all(cls):
        for process in list(cls.running):
            if process.poll() is None:
                for pid in [*children(process.pid), process.pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


class Model:
    """tests/model.py as a process, and its log."""

    def __init__(self, directory, *options):
        self.log = Path(directory) / "model.log"
        self.process = Started.popen([sys.executable, HERE / "model.py", "--log", self.log, *options],
                                     stdout=subprocess.PIPE)
        line = self.process.stdout.readline().decode()
        assert line.startswith("port="), f"the model says {line!r}"
        self.port = int(line[5:])
        self.name = f"127.0.0.1:{self.port}"

    def events(self, what, **match):
        lines = self.log.read_bytes().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [event for event in events if event["what"] == what
                and all(event[name] == value for name, value in match.items())]

    def wait(self, what, count=1, **match):
        """The count-th event of that kind."""
        def look():
            return self.events(what, **match)[count - 1:]
        return until(look, f"{what} number {count} in the model's log")[0]

    def requests(self):
        """(connection, method, target) of each request that was seen."""
        return [(event["conn"], event["method"], event["target"]) for event in self.events("request")]

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


LOGFMT = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "]*)(?: |$)')


def unescape(value):
    if not value.startswith('"'):
        return value
    return re.sub(r"\\(?:x([0-9a-fA-F]{2})|(.))",
                  lambda match: chr(int(match[1], 16)) if match[1] else match[2], value[1:-1])


def parse_line(line):
    """The fields of a log line, logfmt or JSON; nothing for another line."""
    text = line.decode("utf-8", "replace")
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            return {name: str(value) for name, value in json.loads(text).items()}
    if not re.match(r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", text):
        return {}
    fields, at = {}, 0
    while at < len(text):
        match = LOGFMT.match(text, at)
        if not match:
            return {}
        fields[match[1]] = unescape(match[2])
        at = match.end()
    return fields


class Tinyauth:
    """tinyauth as a process: ready when made, judged when stopped."""

    def __init__(self, lab, *options, upstream=None, keys=KEYS, workers=1, ip_rate="off", listen="127.0.0.1:0",
                 log=None, env=None, binary=None, cwd=None):
        self.lab, self.log = lab, log
        self.keys = lab.path("keys")
        self.clients, self.loads = [], []
        self.lines, self.parsed = [], []
        self.secure = set()                 # ports that want TLS
        self.expected = []                  # patterns of further lines that stderr may hold
        self.status = 0                     # expected
        self.reading = threading.Event()
        self.reading.set()
        command = [*lab.enter, binary or lab.binary, "-l", listen, "-u", upstream or lab.shared.name, "-w", str(workers),
                   "--ip-rate", ip_rate]
        if keys is not None:
            lab.write(self.keys, keys)
            command += ["-k", self.keys]
        if log:
            command += ["--log", log]
        if Secure.pair and "--tls-cert" not in options:
            command += Secure.pair.options
        self.began = time.monotonic_ns()
        self.process = Started.popen([*command, *options], env=environment(**(env or {})), cwd=cwd,
                                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.pid = self.process.pid
        self.pump = threading.Thread(target=self.pump_stderr, daemon=True)
        self.pump.start()
        lab.things.append(self)
        until(lambda: self.process.poll() is not None or self.events("ready"), "event=ready")
        assert self.events("ready"), f"tinyauth exited {self.process.poll()}: {self.text()}"
        self.name = self.events("listening")[0]["addr"]
        self.secure = {int(event["addr"].rpartition(":")[2]) for event in self.events("listening") if event.get("tls") == "yes"}
        Secure.ports |= self.secure
        host, _, port = self.name.rpartition(":")
        self.address = self.name[5:] if self.name.startswith("unix:") else ("127.0.0.1", int(port))

    def pump_stderr(self):
        rest, fd = b"", self.process.stderr.fileno()
        while True:
            self.reading.wait()
            data = os.read(fd, 1 << 16)
            if not data:
                break
            now = time.monotonic_ns()
            *whole, rest = (rest + data).split(b"\n")
            self.lines += [(now, line) for line in whole]
        if rest:
            self.lines.append((time.monotonic_ns(), rest))

    def text(self):
        return b"\n".join(line for _, line in self.lines).decode("utf-8", "replace")

    def records(self):
        """Each log line's fields; `at` is when it arrived (stderr only)."""
        if self.log:
            text = Path(self.log).read_bytes() if os.path.exists(self.log) else b""
            return [parse_line(line) for line in text.splitlines()]
        for at, line in self.lines[len(self.parsed):]:
            self.parsed.append({**parse_line(line), "at": at})
        return self.parsed

    def events(self, name):
        return [record for record in self.records() if record.get("event") == name]

    def wait_event(self, name, count=1, timeout=5):
        return until(lambda: self.events(name)[count - 1:], f"event={name} number {count}", timeout)[0]

    def access(self, count=1):
        """The first `count` access lines, awaited."""
        def look():
            return [record for record in self.records() if "method" in record]
        until(lambda: len(look()) >= count, f"access line number {count}")
        return look()

    def connect(self, **more):
        client = Client(self.address, **more)
        self.clients.append(client)
        return client

    def ask(self, *args, **more):
        """One request on a connection of its own."""
        with contextlib.closing(Client(self.address)) as client:
            return client.ask(*args, **more)

    def workers(self):
        return children(self.pid)

    def memory(self):
        """Anonymous memory of all processes, in bytes."""
        total = 0
        for pid in [self.pid, *self.workers()]:
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10
        return total

    def signal(self, number):
        os.kill(self.pid, number)

    def publish(self, text, event="keys_published"):
        """Put other keys in the file, have them read, and wait until it is done."""
        seen = len(self.events(event))
        self.lab.write(self.keys, text)
        self.signal(signal.SIGHUP)
        return self.wait_event(event, seen + 1)

    def expect(self, expression):
        self.expected.append(expression)

    def wait_exit(self, timeout=5.0):
        until(lambda: self.process.poll() is not None, "exit of tinyauth", timeout)
        return self.process.returncode

    def stop(self):
        """Stop it and say what was not as it should be."""
        problems = []
        for load in self.loads:
            load.stop()
        for client in self.clients:
            client.close()
        self.reading.set()
        family = {int(record["pid"]) for record in self.events("worker_started")} | set(self.workers())
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                problems.append("not drained 5 s after TERM with all clients gone")
                self.process.kill()
                self.process.wait()
        if not problems and self.process.returncode != self.status:
            problems.append(f"exit status {self.process.returncode}, not {self.status}")
        end = time.monotonic() + 2
        while any(map(alive, family)) and time.monotonic() < end:
            time.sleep(0.01)
        for pid in filter(alive, family):
            problems.append(f"child {pid} left behind")
            os.kill(pid, signal.SIGKILL)
        Secure.ports -= self.secure
        self.pump.join(2)
        self.process.stderr.close()
        problems += [f"unexpected on stderr: {line!r}" for _, line in self.lines if not self.is_expected(line)][:10]
        return problems

    def is_expected(self, line):
        fields = parse_line(line)
        if fields.get("event") in EVENTS or "method" in fields:
            return True
        return any(re.search(expression, line.decode("utf-8", "replace")) for expression in self.expected)


class Lab:
    """What one test starts and makes; close() ends it and names what was wrong."""

    enter = []                              # the command that runs tinyauth, if it is run elsewhere

    def __init__(self, binary, shared, directory):
        self.binary, self.shared = binary, shared
        self.directory = Path(tempfile.mkdtemp(dir=directory))
        self.things = []
        self.held = []

    def path(self, name):
        return str(self.directory / name)

    def write(self, path, text):
        """Replace a file at once, as editors do."""
        fresh = Path(path + ".new")
        fresh.write_text(text)
        fresh.chmod(0o600)
        fresh.rename(path)

    def program(self, path, script=None):
        """Put a shell script, or without one the binary, at a path, where it may run at once. A process of its own writes it:
        what this one had open to write, a child that another test starts meanwhile would hold too, and exec() says ETXTBSY."""
        text = f"#!/bin/sh\n{script}\n".encode() if script else b""
        subprocess.run(["install", "-m", "755", "/dev/stdin" if script else self.binary, path], input=text, check=True)
        return str(path)

    def tinyauth(self, *options, **more):
        return Tinyauth(self, *options, **more)

    def model(self, *options):
        model = Model(tempfile.mkdtemp(dir=self.directory), *options)
        self.things.append(model)
        return model

    def pair(self, *options, **more):
        """tinyauth before a model of its own."""
        model = self.model()
        return self.tinyauth(*options, upstream=model.name, **more), model

    def held_port(self):
        """A port that refuses connections, and that nobody else gets."""
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        self.held.append(holder)
        return holder

    def run(self, *args, status=0, **env):
        """A command to its end; its output as text."""
        done = subprocess.run([*self.enter, self.binary, *args], env=environment(**env), cwd=self.directory, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
        wanted = status if isinstance(status, tuple) else (status,)
        assert done.returncode in wanted, f"{args} exits {done.returncode}, not {status}: {done.stderr}"
        return done

    def key(self, *args, status=0):
        """tinyauth key …, on the keys file of this lab."""
        return self.run("key", *args, status=status, TINYAUTH_KEYS=self.path("keys"))

    def close(self):
        problems = []
        for thing in reversed(self.things):
            problems += thing.stop() or []
        for holder in self.held:
            holder.close()
        return problems

    def stderr(self):
        return [thing.text() for thing in self.things if isinstance(thing, Tinyauth)]


class Stream(threading.Thread):
    """A streamed answer that is read to its end while the test does other things."""

    def __init__(self, client, events, gap_ms, key=ALICE):
        super().__init__(daemon=True)
        self.client, self.events = client, events
        self.seen, self.error = [], None
        body = json.dumps({"events": events, "gap_ms": gap_ms}).encode()
        client.send(request("POST", "/api/generate", body=body, key=key))
        same(client.head().status, 200, "stream")
        self.start()

    def run(self):
        try:
            text = b"".join(self.client.body())
            self.seen = [json.loads(line) for line in text.splitlines()]
        except (Cut, OSError, ValueError) as error:
            self.error = error

    def whole(self):
        self.join(15)
        return not self.is_alive() and not self.error and len(self.seen) == self.events + 1 and self.seen[-1]["done"]


class Load:
    """Clients that ask all the time; every failure is remembered."""

    def __init__(self, tinyauth, clients=4, fresh=False):
        self.tinyauth, self.fresh = tinyauth, fresh
        self.done, self.refused, self.errors = 0, 0, []
        self.stopping = False
        self.ending = False                 # from now on a new connection may be refused
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(clients)]
        tinyauth.loads.append(self)
        for thread in self.threads:
            thread.start()
        self.wait_done(clients * 5)

    def wait_done(self, count):
        until(lambda: self.done >= count or self.errors, f"{count} requests under load")

    def run(self):
        while not self.stopping:
            asked, late = 0, self.ending
            try:
                with contextlib.closing(Client(self.tinyauth.address)) as client:
                    while not self.stopping:
                        answer = client.ask("GET", "/api/version")
                        same(answer.status, 200, "status under load")
                        self.done += 1
                        asked += 1
                        if self.fresh or answer.closes:
                            break
            except (Cut, OSError, AssertionError) as error:
                if (late or self.ending and isinstance(error, ConnectionRefusedError)) and not asked:
                    self.refused += 1
                    return
                self.errors.append(f"{type(error).__name__}: {error}")

    def stop(self):
        self.stopping = True
        for thread in self.threads:
            thread.join(10)
        return self.errors


def alone(test):
    test.alone = True
    return test


def measured(test):
    test.alone = test.measured = True
    return test


def values(echo, name):
    """The values of a field in what /t/echo saw."""
    return [value for field, value in echo["headers"] if field.lower() == name.lower()]


@contextlib.contextmanager
def is_cut(client):
    """What is done here ends with a cut answer."""
    try:
        yield
    except Cut:
        return
    raise AssertionError(f"a clean end: {client.answer.fields} and {len(client.answer.body)} bytes")


ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error",
                   502: "api_error", 504: "api_error"}


def check_error(answer, status, target="/"):
    """An error in the dialect that belongs to the target; its message."""
    same(answer.status, status, f"status of {target}")
    same(answer.get("Content-Type"), "application/json", "type of an error")
    assert answer.get("X-Request-Id"), "an error without X-Request-Id"
    body = answer.json()
    if target.startswith("/api/"):
        same(list(body), ["error"], "members of an Ollama error")
        assert isinstance(body["error"], str), f"an Ollama error is a string, not {body}"
        return body["error"]
    if target.startswith("/v1/messages"):
        same((body["type"], body["error"]["type"]), ("error", ANTHROPIC_TYPES[status]), "types of an Anthropic error")
    else:
        same(sorted(body["error"]), ["code", "message", "param", "type"], "members of an OpenAI error")
    return body["error"]["message"]


def raw_answer(client, raw, *fields, then="close", **more):
    """Have the model answer with these bytes."""
    return client.ask("GET", "/t/raw", "X-Test-Raw: " + base64.b64encode(raw).decode(), f"X-Test-Then: {then}",
                      *fields, **more)


# Connections and pipelining

def test_each_request_has_an_upstream_connection(lab):
    """Requests of kept-alive clients reach the model each on a connection of its own, which says that it is the only one."""
    tinyauth, model = lab.pair()
    clients = [tinyauth.connect() for _ in range(2)]
    for i in range(6):
        echo = clients[i % 2].ask("POST" if i % 3 else "GET", f"/t/echo?{i}").json()
        same((echo["target"], values(echo, "Connection")), (f"/t/echo?{i}", ["close"]), "what the model got")
    same([conn for conn, _, _ in model.requests()], list(range(1, 7)), "connections of the requests")


def test_the_upstream_ends_first(lab):
    """The upstream's own end is waited for: the port is held where the connection ended first, and that is not here."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    for i in range(20):
        client.ask("POST", "/t/echo", body=b"x")
        same(model.wait("close", i + 1)["reason"], "ours", "who ended first")


def test_an_upstream_that_does_not_end(lab):
    """An upstream that keeps its connection after the answer is left after a second; the client goes on meanwhile and afterwards."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    held = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nhi"
    same(raw_answer(client, held, then="hold").status, 200, "answer")
    same(model.wait("close")["reason"], "reset", "end of the connection that was kept")
    same(raw_answer(client, held, then="hold").status, 200, "the next answer")
    same(client.ask("GET", "/t/echo").status, 200, "the one after it, which does not wait")
    same(model.wait("close", conn=2)["reason"], "reset", "end of the second one")


def test_pipelining_keeps_the_order(lab):
    """Ten requests in one write are answered in order."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(b"".join(request("POST", f"/t/echo?{i}", body=pattern(i * 700), chunked=i % 2) for i in range(10)))
    for i in range(10):
        echo = client.read().json()
        same((echo["target"], echo["length"]), (f"/t/echo?{i}", i * 700), "answer")
    same([conn for conn, _, _ in model.requests()], list(range(1, 11)), "upstream connections")


def test_each_pipelined_request_is_judged(lab):
    """Between two good requests in one write, one without a key and one with a wrong key get 401."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request(target="/t/echo?1") + request(target="/t/echo?2", key=None)
                + request(target="/t/echo?3", key=WRONG) + request(target="/t/echo?4"))
    same([client.read().status for _ in range(4)], [200, 401, 401, 200], "statuses")
    same([target for _, _, target in model.requests()], ["/t/echo?1", "/t/echo?4"], "what the model saw")


def test_connection_close_is_honoured(lab):
    """After Connection: close the answer says so, and both connections end."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    answer = client.ask("GET", "/t/echo", "Connection: close")
    assert answer.closes, f"no Connection: close in {answer.fields}"
    same(client.end(), "eof", "end")
    model.wait("close")


def test_nothing_is_sent_twice(lab):
    """An upstream that ends without a byte: 502 whatever the method, and the model saw the request once."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    for method in ("GET", "PUT", "POST"):
        client.ask("GET", "/t/echo")
        client.send(request(method, "/t/die", body=b"" if method == "GET" else b"once"))
        check_error(client.read(), 502)
    same([method for _, method, _ in model.requests()], ["GET", "GET", "GET", "PUT", "GET", "POST"], "what the model saw")


def test_http_1_0_client(lab):
    """HTTP/1.0 gets chunked bodies decoded and ended by close, and its own body goes through."""
    tinyauth = lab.tinyauth()
    for target in ("/t/chunked/300000?chunk=7000", "/t/close/300000", "/t/cl/300000"):
        client = tinyauth.connect()
        answer = client.ask("GET", target, version="1.0")
        assert not answer.chunked and answer.body == pattern(300000), f"{target}: {answer.fields}"
        same(client.end(), "eof", f"end after {target}")
    echo = tinyauth.ask("POST", "/t/echo", version="1.0", host=None, body=b"hello").json()
    same((echo["version"], echo["length"]), ("HTTP/1.1", 5), "POST from HTTP/1.0")


def test_answers_in_every_framing(lab):
    """Content-Length, chunked and close-delimited answers arrive whole and leave the connection open."""
    tinyauth = lab.tinyauth()
    client = tinyauth.connect()
    for size in (0, 1, 251, 16384, 1 << 20, 3000001):
        for target in (f"/t/cl/{size}", f"/t/chunked/{size}", f"/t/chunked/{size}?chunk=1500", f"/t/close/{size}"):
            answer = client.ask("GET", target)
            assert answer.body == pattern(size), f"{target}: {len(answer.body)} bytes, {answer.fields}"
            same(answer.chunked, not target.startswith("/t/cl/"), f"{target} is chunked")


def test_request_bodies_in_every_framing(lab):
    """Bodies by Content-Length and chunked reach the model whole and in the same framing."""
    tinyauth = lab.tinyauth()
    client = tinyauth.connect()
    for size in (0, 1, 16384, 1 << 20, 3000001):
        for chunked in (False, True):
            echo = client.ask("POST", "/t/echo", body=pattern(size), chunked=chunked).json()
            same(echo["sha256"], hashlib.sha256(pattern(size)).hexdigest(), f"body of {size}")
            framing = (values(echo, "Content-Length"), values(echo, "Transfer-Encoding"))
            same(framing, ([], ["chunked"]) if chunked else ([str(size)], []), "framing")


def test_chunk_extensions_and_trailers_are_dropped(lab):
    """Chunk extensions and trailers do not reach the model, nor do they end the connection."""
    client = lab.tinyauth().connect()
    head = request("POST", "/t/echo", "Transfer-Encoding: chunked")
    client.send(head + b'5;a=b;c="d e"\r\nhello\r\n00006\r\n world\r\n'
                + b"0;z\r\nX-Evil: 1\r\nAuthorization: Bearer x\r\n\r\n")
    echo = client.read().json()
    same((echo["length"], echo["trailers"], values(echo, "X-Evil")), (11, [], []), "what arrived")
    same(client.ask("GET", "/t/echo").status, 200, "next request")


def test_body_byte_by_byte(lab):
    """A head and a chunked body that come one byte at a time are understood the same."""
    client = lab.tinyauth().connect()
    for byte in request("POST", "/t/echo", body=b"hello", chunked=True):
        client.send(bytes([byte]))
    same(client.read().json()["sha256"], hashlib.sha256(b"hello").hexdigest(), "body")


def test_interim_answers_are_relayed(lab):
    """100 and 103 reach an HTTP/1.1 client before the answer, and an HTTP/1.0 client never."""
    tinyauth = lab.tinyauth()
    client = tinyauth.connect()
    answer = client.ask("GET", "/t/100")
    same([early.status for early in answer.interim], [100, 103], "interim answers")
    same(answer.interim[1].get("Link"), "</0.css>; rel=preload", "a field of 103")
    same((answer.status, answer.json()), (200, {"interim": True}), "answer")
    same(tinyauth.ask("GET", "/t/100", version="1.0").interim, [], "interim answers for HTTP/1.0")
    same(client.ask("GET", "/t/echo").status, 200, "next request")


def test_interim_answers_are_counted(lab):
    """Of many interim answers 16 are relayed, and more than 100 are a 502."""
    tinyauth = lab.tinyauth()
    same(len(tinyauth.ask("GET", "/t/100?n=30").interim), 16, "relayed")
    same(tinyauth.ask("GET", "/t/100?n=150").status, 502, "status after 151")


def test_answers_without_a_body(lab):
    """HEAD, 204 and 304 have no body whatever their fields say, and the connection goes on."""
    client = lab.tinyauth().connect()
    head = client.ask("HEAD", "/t/cl/1000")
    same((head.status, head.get("Content-Length")), (200, "1000"), "HEAD")
    same(client.ask("HEAD", "/t/chunked/1000").status, 200, "HEAD of a chunked answer")
    same(client.ask("GET", "/t/204").status, 204, "204")
    same(client.answer.all("Content-Length") + client.answer.all("Transfer-Encoding"), [], "framing of 204")
    same(client.ask("GET", "/t/304").status, 304, "304")
    same(client.ask("GET", "/t/cl/5").body, pattern(5), "answer after those")


def test_head_of_an_unframed_answer(lab):
    """HEAD answered without any framing ends with its head."""
    client = lab.tinyauth().connect()
    same(client.ask("HEAD", "/t/close/1000").status, 200, "HEAD")
    if not client.answer.closes:
        same(client.ask("GET", "/t/echo").status, 200, "next request")


def test_expect_100_continue(lab):
    """100 Continue comes from the model after admission; the body follows it."""
    client = lab.tinyauth().connect()
    client.send(request("POST", "/t/echo", "Expect: 100-continue", "Content-Length: 5"))
    same(client.head().status, 100, "interim answer")
    client.send(b"hello")
    same(client.read().json()["length"], 5, "body")


def test_expect_is_refused_without_100(lab):
    """Without a key the final 401 comes at once, no 100 and no request upstream, and the connection ends."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request("POST", "/t/echo", "Expect: 100-continue", "Content-Length: 5", key=None))
    answer = client.read()
    same((answer.status, answer.interim), (401, []), "answer")
    same(client.end(), "eof", "end")
    same(tinyauth.ask("POST", "/t/echo", "Expect: miracles", body=b"x").status, 417, "another expectation")
    same(model.requests(), [], "what the model saw")


UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
           "Sec-WebSocket-Version: 13")


def test_websocket_becomes_a_tunnel(lab):
    """After 101 both ways are bytes, and the end of the client ends the model's connection."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    answer = client.ask("GET", "/t/ws", *UPGRADE)
    same((answer.status, answer.get("Upgrade")), (101, "websocket"), "answer")
    same(answer.get("Connection").lower(), "upgrade", "Connection")
    same(answer.get("Sec-WebSocket-Accept"), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "Sec-WebSocket-Accept")
    for data in (b"\0\xff\r\n0\r\n\r\n", os.urandom(50000), b"GET / HTTP/1.1\r\n\r\n"):
        client.send(data)
        same(b"".join(client.exactly(len(data))), data, "echo")
    client.close()
    model.wait("close")
    same(tinyauth.access()[0]["status"], "101", "logged status")


def test_websocket_needs_a_key(lab):
    """An upgrade without a key is a 401 and nothing goes upstream."""
    tinyauth, model = lab.pair()
    check_error(tinyauth.ask("GET", "/t/ws", *UPGRADE, key=None), 401)
    same(model.requests(), [], "what the model saw")


def test_refused_upgrade_is_an_ordinary_answer(lab):
    """A model that does not upgrade answers as always, and the connection goes on."""
    client = lab.tinyauth().connect()
    echo = client.ask("GET", "/t/echo", *UPGRADE).json()
    same(values(echo, "Upgrade"), ["websocket"], "Upgrade at the model")
    same(client.ask("GET", "/t/echo").status, 200, "next request")


def test_other_upgrades_are_not_forwarded(lab):
    """h2c and its settings are dropped, the request goes on as a plain one."""
    client = lab.tinyauth().connect()
    fields = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    echo = client.ask("GET", "/t/echo", *fields).json()
    for name in ("Upgrade", "HTTP2-Settings"):
        same(values(echo, name), [], name)


def test_early_answer_reaches_the_client(lab):
    """An answer that comes before the body was sent arrives, and the connection ends after it."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request("POST", "/t/early", "Content-Length: 50000000") + bytes(100000))
    answer = client.read()
    same((answer.status, answer.closes), (413, True), "answer")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.send(bytes(100000))
    same(client.end(), "eof", "end")
    same(model.events("body"), [], "whole bodies at the model")


def test_cut_answers_are_seen_as_cut(lab):
    """An answer that the model cut is never given a clean end."""
    tinyauth = lab.tinyauth()
    targets = ("/t/cut-cl", "/t/cut-cl?reset", "/t/cut-chunked", "/t/cut-chunked?between", "/t/cut-chunked?reset")
    for target in targets:
        client = tinyauth.connect()
        with is_cut(client):
            client.ask("GET", target)
        assert client.answer is None or (pattern(500) * 2).startswith(client.answer.body[500:]) and \
            pattern(1000).startswith(client.answer.body[:500]), f"{target}: other bytes"
    same({record["reason"] for record in tinyauth.access(len(targets))}, {"upstream_cut"}, "logged reasons")


def test_cut_answer_is_seen_by_http_1_0(lab):
    """A cut chunked answer ends in a reset where only the end of the connection frames it."""
    client = lab.tinyauth().connect()
    with is_cut(client):
        client.ask("GET", "/t/cut-chunked", version="1.0")


BAD_ANSWERS = {
    "another protocol": b"SSH-2.0-OpenSSH_9\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "length and chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a signed length": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nhello",
    "a length past 64 bits": b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551621\r\n\r\nhello",
    "no colon": b"HTTP/1.1 200 OK\r\nbroken\r\nContent-Length: 0\r\n\r\n",
    "a bare line feed": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "an unasked 101": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
}


def test_garbage_from_upstream_is_502(lab):
    """Whatever is not a response becomes a 502 that names the upstream, and its connection is closed."""
    tinyauth, model = lab.pair()
    for count, (what, raw) in enumerate(BAD_ANSWERS.items(), 1):
        client = tinyauth.connect()
        answer = raw_answer(client, raw, then="close" if what == "half a head" else "hold")
        same(answer.status, 502, what)
        assert model.name in check_error(answer, 502), f"{what}: {answer.body}"
        until(lambda: len(model.events("close")) >= count, f"close after {what}")
    check_error(tinyauth.ask("GET", "/t/garbage"), 502)


def test_endless_head_from_upstream_is_502(lab):
    """A response head of 30 KB passes, one of 40 KB is a 502."""
    tinyauth = lab.tinyauth()
    same(tinyauth.ask("GET", "/t/big-head/30000").status, 200, "30 KB")
    check_error(tinyauth.ask("GET", "/t/big-head/40000"), 502)


def test_equal_lengths_collapse(lab):
    """Identical Content-Length fields of a response become one."""
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello"
    answer = raw_answer(lab.tinyauth().connect(), raw)
    same((answer.status, answer.body), (200, b"hello"), "answer")


def test_bytes_after_an_answer_are_dropped(lab):
    """What the model sends after its answer is never seen, and its connection is given up."""
    tinyauth, model = lab.pair()
    for target in ("/t/trailing", "/t/trailing?later_ms=20"):
        client = tinyauth.connect()
        same(client.ask("GET", target).body, b"hello", "answer")
        first = model.requests()[-1][0]
        until(lambda: model.events("close", conn=first), f"close after {target}")
        same(client.ask("GET", "/t/echo").json()["target"], "/t/echo", "next answer")
        assert model.requests()[-1][0] != first, "the connection was used again"


def test_response_fields(lab):
    """Date, Server and others pass as they are, hop-by-hop fields do not."""
    raw = (b"HTTP/1.1 200 Fine\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nServer: old/1\r\nX-Multi: a\r\nX-Multi: b\r\n"
           b"Connection: keep-alive, X-Named\r\nX-Named: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\n"
           b"X-Request-Id: theirs\r\nContent-Length: 2\r\n\r\nok")
    answer = raw_answer(lab.tinyauth().connect(), raw, then="keep")
    same(answer.get("Date"), "Thu, 01 Jan 1970 00:00:00 GMT", "Date")
    same((answer.get("Server"), answer.all("X-Multi")), ("old/1", ["a", "b"]), "other fields")
    for name in ("X-Named", "Keep-Alive", "Proxy-Connection"):
        same(answer.get(name), None, name)
    assert answer.get("X-Request-Id"), "one X-Request-Id"


def test_unix_sockets_both_ways(lab):
    """It listens on a unix socket and reaches a model on one."""
    path = lab.path("model.sock")
    os.chmod(os.path.dirname(path), 0o755)   # started as root, its workers come as nobody
    model = lab.model("--unix", path)
    tinyauth = lab.tinyauth("-l", "127.0.0.1:0", listen="unix:" + lab.path("tinyauth.sock"), upstream="unix:" + path)
    same(tinyauth.ask("GET", "/api/version").status, 200, "over the unix socket")
    port = int(tinyauth.events("listening")[1]["addr"].rpartition(":")[2])
    with contextlib.closing(Client(("127.0.0.1", port))) as client:
        same(client.ask("GET", "/api/version").status, 200, "over the second listener")
        same(client.ask("GET", "/api/version", key=WRONG).status, 401, "wrong key")
    same(len(model.requests()), 2, "requests at the model")


def test_dual_stack_listener(lab):
    """[::] takes IPv4 clients as well and names them by their IPv4 address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        raise Skip("no IPv6 here") from None
    tinyauth = lab.tinyauth(listen="[::]:0")
    same(values(tinyauth.ask().json(), "X-Real-IP"), ["127.0.0.1"], "X-Real-IP over IPv4")
    with Secure.wrap(socket.create_connection(("::1", tinyauth.address[1]), 5), tinyauth.address[1]) as sock:
        sock.sendall(request("GET", "/t/echo", "Connection: close"))
        text = b"".join(iter(lambda: sock.recv(65536), b""))
    same(values(json.loads(text.partition(b"\r\n\r\n")[2]), "X-Real-IP"), ["::1"], "X-Real-IP over IPv6")


# Time-outs, ends and backpressure

def test_refused_upstream_is_502(lab):
    """Nobody listens upstream: 502 that names it; when it comes up the next request passes."""
    holder = lab.held_port()
    port = holder.getsockname()[1]
    tinyauth = lab.tinyauth(upstream=f"127.0.0.1:{port}")
    client = tinyauth.connect()
    for target in ("/api/chat", "/v1/messages", "/v1/models"):
        client.send(request("GET", target))
        message = check_error(client.read(), 502, target)
        assert f"127.0.0.1:{port}" in message, f"the message does not name the upstream: {message}"
    same(tinyauth.access()[0]["reason"], "upstream_refused", "logged reason")
    holder.close()
    lab.model("--port", str(port))
    same(tinyauth.ask("GET", "/api/version").status, 200, "with the model up")


def test_silent_upstream_is_504(lab):
    """A model that never answers: 504 after the first-byte time-out, naming the upstream and not to be repeated."""
    tinyauth, model = lab.pair("--first-byte-timeout", "300ms")
    began = time.monotonic()
    answer = tinyauth.ask("POST", "/t/silent", body=b"x")
    assert 0.25 < time.monotonic() - began < 2, f"504 after {time.monotonic() - began:.2f} s"
    message = check_error(answer, 504)
    assert model.name in message and "first-byte-timeout" in message, f"no upstream or no mend in: {message}"
    same(answer.get("x-should-retry"), "false", "x-should-retry")
    same(tinyauth.access()[0]["reason"], "upstream_timeout", "logged reason")
    model.wait("close")


def test_unanswered_connect_is_504(lab):
    """An upstream that does not take the connection: 504 after the connect time-out."""
    full = lab.held_port()
    full.listen(0)
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
        lab.held.append(filler)
    tinyauth = lab.tinyauth("--connect-timeout", "300ms", upstream=f"127.0.0.1:{full.getsockname()[1]}")
    began = time.monotonic()
    check_error(tinyauth.ask("GET", "/"), 504)
    assert 0.25 < time.monotonic() - began < 2, f"504 after {time.monotonic() - began:.2f} s"


def test_header_timeout(lab):
    """Half a head gets 408 in time, a connection without a byte a silent end."""
    tinyauth = lab.tinyauth("--header-timeout", "300ms")
    half, none = tinyauth.connect(), tinyauth.connect()
    half.send(b"GET / HTTP/1.1\r\nHost: x\r\n")
    same(none.end(), "eof", "without a byte")
    same(half.read().status, 408, "half a head")
    same(half.end(), "eof", "after 408")


def test_keepalive_timeout(lab):
    """An idle kept-alive connection ends silently after its time-out."""
    client = lab.tinyauth("--keepalive-timeout", "300ms").connect()
    client.ask("GET", "/t/echo")
    began = time.monotonic()
    same(client.end(), "eof", "end")
    assert 0.2 < time.monotonic() - began < 2, f"closed after {time.monotonic() - began:.2f} s"


def test_idle_timeout(lab):
    """A stream that stands still is cut, a body that stands still gets 408."""
    tinyauth, model = lab.pair("--idle-timeout", "300ms")
    client = tinyauth.connect()
    with is_cut(client):
        client.ask("POST", "/api/generate", body=b'{"events": 2, "gap_ms": 8000}')
    model.wait("close")
    client = tinyauth.connect()
    client.send(request("POST", "/t/sink", "Content-Length: 100") + b"half")
    same(client.read().status, 408, "a body that stands still")


def test_half_close_is_going_away(lab):
    """A client that shuts its sending side has gone: upstream closes, the log says 499 client_closed."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request("POST", "/t/silent", body=b"x"))
    model.wait("body")
    client.sock.shutdown(socket.SHUT_WR)
    model.wait("close")
    record = tinyauth.access()[0]
    same((record["status"], record["reason"]), ("499", "client_closed"), "access line")


def test_client_gone_behind_a_pipelined_request(lab):
    """A client that goes away with a second request still unread closes the upstream as well."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request("POST", "/t/silent", body=b"x") + request())
    model.wait("body")
    client.close()
    model.wait("close")
    same(len(model.requests()), 1, "requests seen")


def test_upload_cut_by_the_client_is_cut_upstream(lab):
    """The last chunk of a body that was not whole is never sent."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request("POST", "/t/sink", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n5\r\nhe")
    model.wait("request")
    client.close()
    model.wait("close")
    same(model.events("body"), [], "whole bodies")


def test_bad_chunk_aborts_both_sides(lab):
    """A broken chunk line gets 400, and the model's copy of the body is cut."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request("POST", "/t/sink", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0x5\r\nhello\r\n0\r\n\r\n")
    same(client.read().status, 400, "status")
    model.wait("close")
    same(model.events("body"), [], "whole bodies")


def stands_still(count, what):
    """The value of count() once it has not changed for 0.4 s."""
    last, since = count(), time.monotonic()

    def look():
        nonlocal last, since
        now = count()
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > 0.4
    until(look, f"standstill of {what}")
    return last


@alone
def test_reader_that_does_not_read_stops_the_sender(lab):
    """A client that does not read a 1 GB answer: the model's sender stops, memory stays, and it goes on later."""
    tinyauth, model = lab.pair()
    tinyauth.ask("GET", "/t/cl/4000000")
    before = tinyauth.memory()
    client = tinyauth.connect(rcvbuf=1 << 16)
    client.send(request("GET", "/t/cl/1000000000"))
    client.head()

    def sent():
        conn = model.events("accept")[-1]["conn"]
        return max((event["bytes"] for event in model.events("sent", conn=conn)), default=0)
    stopped_at = stands_still(sent, "the model's sender")
    assert stopped_at < 64 << 20, f"{stopped_at} bytes went into a client that does not read"
    grown = tinyauth.memory() - before
    assert grown < 1 << 20, f"anonymous memory grew by {grown} bytes"
    for _ in client.exactly(stopped_at + (20 << 20)):
        pass
    assert sent() > stopped_at, "the sender did not go on"


@alone
def test_model_that_does_not_read_stops_the_client(lab):
    """A model that does not read a 1 GB body: the client cannot send on, and memory stays."""
    tinyauth = lab.tinyauth("--idle-timeout", "1500ms")   # a client that leaves behind a full window is not seen
    tinyauth.ask("POST", "/t/sink", body=pattern(4000000))
    before = tinyauth.memory()
    client = tinyauth.connect()
    client.send(request("POST", "/t/silent?unread", "Content-Length: 1000000000"))
    client.sock.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 200 << 20:
            sent += client.sock.send(BLOCK)
    assert sent < 64 << 20, f"{sent} bytes went to a model that does not read"
    grown = tinyauth.memory() - before
    assert grown < 1 << 20, f"anonymous memory grew by {grown} bytes"


# Who is let in

def test_no_key_is_401_in_every_dialect(lab):
    """Without a key: 401 in the caller's dialect, with WWW-Authenticate, saying which field is missing."""
    tinyauth, model = lab.pair()
    targets = ("/", "/v1/chat/completions", "/api/chat", "/api/tags", "/v1/messages", "/v1/messages/count_tokens")
    for target in targets:
        answer = tinyauth.ask("GET", target, key=None)
        assert "Authorization" in check_error(answer, 401, target), f"the message names no field: {answer.body}"
        same(answer.all("WWW-Authenticate"), ["Bearer", 'Basic realm="tinyauth"'], "what is offered")
        same(answer.get("x-should-retry"), "false", "x-should-retry")
    page = tinyauth.ask("GET", "/v1/models", "Sec-Fetch-Mode: cors", key=None)
    same(page.all("WWW-Authenticate"), ["Bearer"], "what is offered to a page in a browser")
    user = tinyauth.ask("GET", "/v1/models", "Sec-Fetch-Mode: navigate", key=None)
    same(len(user.all("WWW-Authenticate")), 2, "offers to the user of a browser")
    same(tinyauth.ask("GET", "/v1/models", key=None).json()["error"]["code"], "invalid_api_key", "OpenAI code")
    same({record["reason"] for record in tinyauth.access(len(targets) + 3)}, {"no_key"}, "logged reasons")
    same(model.requests(), [], "what the model saw")


def test_wrong_key_is_401_in_every_dialect(lab):
    """With a wrong key the same, logged as bad_key and without a name."""
    tinyauth, model = lab.pair()
    targets = ("/v1/models", "/api/chat", "/v1/messages")
    for target in targets:
        check_error(tinyauth.ask("GET", target, key=WRONG), 401, target)
    for record in tinyauth.access(len(targets)):
        same((record["reason"], record["key"]), ("bad_key", "-"), "access line")
    same(model.requests(), [], "what the model saw")


def test_head_without_a_key(lab):
    """HEAD without a key is a 401 without a body, and the connection goes on."""
    client = lab.tinyauth().connect()
    same(client.ask("HEAD", "/", key=None).status, 401, "HEAD")
    same(client.ask("GET", "/t/echo").status, 200, "next request")


def test_refused_body_ends_the_connection(lab):
    """A refused request's body is never taken for a request."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request("POST", "/api/chat", key=None, body=b"A" * 200000 + request() * 3))
    answer = client.read()
    same((answer.status, answer.closes), (401, True), "answer")
    same(client.end(), "eof", "end")
    same(model.requests(), [], "what the model saw")


def basic(user, password):
    return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


GOOD_CREDENTIALS = {
    "Bearer": [f"Authorization: Bearer {ALICE}"],
    "bearer": [f"authorization: bearer {ALICE}"],
    "BEARER, blanks": [f"AUTHORIZATION: BEARER   {ALICE}"],
    "X-Api-Key": [f"X-Api-Key: {ALICE}"],
    "x-api-key": [f"x-api-key: {ALICE}"],
    "Api-Key": [f"Api-Key: {ALICE}"],
    "Basic": [basic("any", ALICE)],
    "Basic without a user": [basic("", ALICE)],
    "basic": [basic("any", ALICE).replace("Basic", "bAsIC")],
    "a hashed key": [f"Authorization: Bearer {BOB}"],
    "empty X-Api-Key beside Bearer": [f"Authorization: Bearer {ALICE}", "X-Api-Key:"],
    "empty Bearer beside X-Api-Key": ["Authorization: Bearer", f"X-Api-Key: {ALICE}"],
    "empty Authorization beside X-Api-Key": ["Authorization:", f"X-Api-Key: {ALICE}"],
    "empty X-Api-Key beside Api-Key": ["X-Api-Key:", f"Api-Key: {ALICE}"],
    "a wrong X-Api-Key beside Bearer": [f"X-Api-Key: {WRONG}", f"Authorization: Bearer {ALICE}"],
    "another's Bearer beside X-Api-Key": [f"X-Api-Key: {ALICE}", f"Authorization: Bearer {WRONG}"],
    "another's Basic beside X-Api-Key": [basic("any", WRONG), f"X-Api-Key: {ALICE}"],
    "a wrong X-Api-Key beside Basic": [basic("any", ALICE), f"X-Api-Key: {WRONG}"],
    "a disabled key beside a good one": [f"X-Api-Key: {ALICE}", f"Authorization: Bearer {CAROL}"],
    "the user of Basic": [basic(ALICE, "")],
    "a WebSocket's protocol": [*UPGRADE, f"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.{ALICE}"],
}

BAD_CREDENTIALS = {
    "several, none of them a key": [f"X-Api-Key: {WRONG}", "Api-Key: x", f"Authorization: Bearer {WRONG}"],
    "a disabled key beside a wrong one": [f"X-Api-Key: {CAROL}", f"Authorization: Bearer {WRONG}"],
    "a prefix": [f"Authorization: Bearer {ALICE[:-1]}"],
    "a longer one": [f"Authorization: Bearer {ALICE}x"],
    "another case": [f"Authorization: Bearer {ALICE.upper()}"],
    "the name": ["Authorization: Bearer alice"],
    "the hash": [f"Authorization: Bearer {sha256(BOB)}"],
    "the hash's digits": [f"Authorization: Bearer {sha256(BOB)[7:]}"],
    "a disabled key": [f"Authorization: Bearer {CAROL}"],
    "quoted": [f'Authorization: Bearer "{ALICE}"'],
    "no scheme": [f"Authorization: {ALICE}"],
    "another scheme": [f"Authorization: Token {ALICE}"],
    "glued scheme": [f"Authorization: Bearer{ALICE}"],
    "the user of Basic beside a password": [basic(ALICE, "x")],
    "Basic, no colon": ["Authorization: Basic " + base64.b64encode(ALICE.encode()).decode()],
    "Basic, not base64": [f"Authorization: Basic {ALICE}"],
    "Basic, prefix": [basic("any", ALICE[:-1])],
    "Basic, NUL": [basic("any", ALICE + "\0")],
    "empty ones only": ["Authorization: Bearer", "X-Api-Key:"],
    "an underscore": [f"X_Api_Key: {ALICE}"],
    "a proxy's": [f"Proxy-Authorization: Bearer {ALICE}"],
    "a cookie": [f"Cookie: Authorization={ALICE}"],
}


def test_good_credentials(lab):
    """Every form in which a key may come is taken."""
    tinyauth = lab.tinyauth()
    for what, fields in GOOD_CREDENTIALS.items():
        echo = tinyauth.ask("GET", "/t/echo", *fields, key=None)
        same(echo.status, 200, what)
        assert ALICE not in echo.body.decode() and WRONG not in echo.body.decode(), f"{what}: the model saw {echo.body}"


def test_origin(lab):
    """A key is stronger than an origin, which Ollama answers 403 to; a WebSocket's server may look at it."""
    tinyauth = lab.tinyauth()
    for origin in ("http://app.test", "null", "chrome-extension://abc"):
        same(values(tinyauth.ask("GET", "/t/echo", f"Origin: {origin}").json(), "Origin"), [], origin)
    echo = tinyauth.ask("GET", "/t/echo", *UPGRADE, "Origin: http://app.test").json()
    same(values(echo, "Origin"), ["http://app.test"], "of a WebSocket")


def test_anthropic_version(lab):
    """Who says anthropic-version reads Anthropic's errors, on every path."""
    for target in ("/", "/v1/models", "/api/tags", "/v1/chat/completions"):
        error = lab.tinyauth().ask("GET", target, "anthropic-version: 2023-06-01", key=None).json()
        same((error["type"], error["error"]["type"]), ("error", "authentication_error"), target)


def test_large_body_with_a_wrong_key(lab):
    """A refusal is read: who sends 24 MB with a wrong key before it looks for an answer finds the 401, and no reset."""
    client = lab.tinyauth().connect()
    client.send(request("POST", "/t/sink", key=WRONG, body=bytes(24 << 20)))
    same(client.read().status, 401, "status")
    same(client.end(), "eof", "end")


def test_bad_credentials(lab):
    """What is not exactly a key is refused, and nothing goes upstream."""
    tinyauth, model = lab.pair()
    for what, fields in BAD_CREDENTIALS.items():
        same(tinyauth.ask("GET", "/t/echo", *fields, key=None).status, 401, what)
    same(tinyauth.ask("GET", f"/t/echo?key={ALICE}", key=None).status, 401, "in the query")
    same(model.requests(), [], "what the model saw")


def test_colon_in_a_basic_password(lab):
    """The password of Basic begins after the first colon, so that a key may hold colons."""
    tinyauth = lab.tinyauth(keys="colon a:b:c-0123456789\n")
    same(tinyauth.ask("GET", "/t/echo", basic("user", "a:b:c-0123456789"), key=None).status, 200, "a key with colons")


AMBIGUOUS_CREDENTIALS = {
    "two Authorization": [f"Authorization: Bearer {ALICE}", f"Authorization: Bearer {ALICE}"],
    "two, one empty": [f"Authorization: Bearer {ALICE}", "Authorization:"],
    "two empty": ["Authorization:", "Authorization:"],
    "two kinds": [f"Authorization: Bearer {ALICE}", basic("any", ALICE)],
    "two X-Api-Key": [f"X-Api-Key: {ALICE}", f"X-Api-Key: {ALICE}"],
    "NUL after the key": [f"Authorization: Bearer {ALICE}\0"],
    "NUL and more": [f"Authorization: Bearer {ALICE}\0{WRONG}"],
    "NUL in X-Api-Key": [f"X-Api-Key: {ALICE}\0"],
}


def test_ambiguous_credentials_are_400(lab):
    """Two credentials of one kind and NUL bytes are 400, and the connection ends."""
    tinyauth, model = lab.pair()
    for what, fields in AMBIGUOUS_CREDENTIALS.items():
        client = tinyauth.connect()
        same(client.ask("GET", "/t/echo", *fields, key=None).status, 400, what)
        same(client.end(), "eof", f"end after {what}")
    reasons = {record["reason"] for record in tinyauth.access(len(AMBIGUOUS_CREDENTIALS))}
    same(reasons, {"bad_request"}, "logged reasons")
    same(model.requests(), [], "what the model saw")


def test_tab_and_words_after_bearer(lab):
    """A TAB before the key or a word behind it makes no credential."""
    tinyauth = lab.tinyauth()
    for value in (f"Bearer\t{ALICE}", f"Bearer {ALICE} more", f"Bearer {ALICE},{BOB}"):
        status = tinyauth.ask("GET", "/t/echo", f"Authorization: {value}", key=None).status
        assert status in (400, 401), f"{value!r} gets {status}"


BAD_REQUESTS = {
    "bare LF": (400, b"GET / HTTP/1.1\nHost: x\n\n"),
    "no version": (400, b"GET /\r\n\r\n"),
    "HTTP/2 preface": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "no Host": (400, request(host=None)),
    "two Hosts": (400, request("GET", "/", "Host: other")),
    "a Host with a path": (400, request(host="a/b")),
    "length and chunked": (400, request("POST", "/", "Content-Length: 5", chunked=True)),
    "two lengths": (400, request("POST", "/", "Content-Length: 5", body=b"hello")),
    "a signed length": (400, request("POST", "/", "Content-Length: +5")),
    "an unknown coding": (501, request("POST", "/", "Transfer-Encoding: gzip")),
    "a folded field": (400, request("GET", "/", "X-A: b\r\n c")),
    "a blank before the colon": (400, request("GET", "/", "X-A : b")),
    "CONNECT": (405, request("CONNECT", "a.test:80")),
    "TRACE": (405, request("TRACE", "/")),
    "another method": (501, request("get_it", "/")),
    "a long target": (414, request("GET", "/" + "a" * 9000)),
    "a long head": (431, request("GET", "/", *[f"X-{i}: {'a' * 1000}" for i in range(20)])),
    "many fields": (431, request("GET", "/", *[f"X-{i}: a" for i in range(120)])),
    "a raw control byte": (400, request("GET", "/\x1b[31m")),
    "%00": (400, request("GET", "/a%00b")),
}


def test_bad_requests_are_refused(lab):
    """What could be read in two ways is refused although the key is good, and the connection ends."""
    tinyauth, model = lab.pair()
    for what, (status, raw) in BAD_REQUESTS.items():
        client = tinyauth.connect()
        client.send(raw + request())
        same(client.read().status, status, what)
        same(client.end(), "eof", "end")
    same(model.requests(), [], "what the model saw")


def test_health(lab):
    """/health answers OK to GET and HEAD without a key, and leaves no log line."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    for target in ("/health", "/health?verbose", "/%68ealth"):
        answer = client.ask("GET", target, key=None)
        same((answer.status, answer.body.strip()), (200, b"OK"), target)
    head = client.ask("HEAD", "/health", key=None)
    same((head.status, head.body), (200, b""), "HEAD")
    client.ask("GET", "/t/echo")
    same([record["path"] for record in tinyauth.access()], ["/t/echo"], "logged paths")
    same(len(model.requests()), 1, "requests at the model")


def test_health_is_one_exact_path(lab):
    """Other methods on /health and paths that only look like it need a key."""
    tinyauth, model = lab.pair()
    same(tinyauth.ask("POST", "/health", key=None, body=b"").status, 401, "POST")
    targets = ("/health/", "//health", "/HEALTH", "/health;x", "/./health", "/a/../health", "/health%2f", "/healthz")
    for target in targets:
        same(tinyauth.ask("GET", target, key=None).status, 401, target)
    same(model.requests(), [], "what the model saw")


def test_rate_limit_in_every_dialect(lab):
    """Past the burst: 429 with both delay fields in the caller's dialect; after that delay one passes again."""
    tinyauth = lab.tinyauth("--ip-burst", "2", ip_rate="2/s")
    client = tinyauth.connect()
    same([client.ask("GET", "/t/echo").status for _ in range(3)], [200] * 3, "burst and one")
    for target in ("/api/chat", "/v1/messages", "/v1/models"):
        answer = client.ask("GET", target)
        check_error(answer, 429, target)
        wait_ms = int(answer.get("retry-after-ms"))
        assert 0 < wait_ms <= 500 and answer.get("Retry-After") == "1", f"delays {answer.fields}"
    same(client.ask("GET", "/v1/models").json()["error"]["code"], "rate_limit_exceeded", "OpenAI code")
    same(tinyauth.access(4)[3]["reason"], "ip_rate", "logged reason")
    same(client.ask("GET", "/health", key=None).status, 200, "health is not limited")
    time.sleep(wait_ms / 1000)
    same(client.ask("GET", "/t/echo").status, 200, "after the delay")


def test_rate_limit_counts_guesses(lab):
    """Wrong keys use up the address's rate, so that guessing is slow."""
    tinyauth = lab.tinyauth("--ip-burst", "2", ip_rate="1/m")
    statuses = [tinyauth.ask("GET", "/", key=key).status for key in (WRONG, None, WRONG, ALICE)]
    same(statuses, [401, 401, 401, 429], "statuses")


def burst(tinyauth, connections, each):
    """Pipelined requests on many connections at once: statuses and when they were sent and answered."""
    clients = [tinyauth.connect() for _ in range(connections)]
    began = time.monotonic()
    for client in clients:
        client.send(request("GET", "/api/version") * each)
    statuses = [client.read().status for client in clients for _ in range(each)]
    return statuses, began, time.monotonic()


@measured
def test_burst_of_200(lab):
    """Of 200 requests at once at the defaults exactly 21 pass; after a pause of 1 s exactly 10 more."""
    for _ in range(4):
        tinyauth = lab.tinyauth("--ip-burst", "20", ip_rate="10/s", workers=2)
        first, began, ended = burst(tinyauth, 8, 25)
        time.sleep(1)
        second, _, finished = burst(tinyauth, 8, 5)
        if ended - began < 0.1 and finished - began < 1.1:
            break
    else:
        raise AssertionError("the machine is too slow to send 200 requests within 100 ms")
    same(sorted(first), [200] * 21 + [429] * 179, "statuses of the burst")
    same(second.count(200), 10, "passed after 1 s")


# What the model is told

def test_fields_for_the_model(lab):
    """Host is the upstream's, the client's address, scheme, Host and request id come in fields of ours."""
    tinyauth = lab.tinyauth()
    echo = tinyauth.ask("GET", "/t/echo?a=b%20c", "X-Request-Id: req-42.A_b").json()
    wanted = {"Host": f"localhost:{lab.shared.port}", "X-Forwarded-Host": HOST, "X-Forwarded-For": "127.0.0.1",
              "X-Forwarded-Proto": Secure.scheme(), "X-Real-IP": "127.0.0.1", "X-Request-Id": "req-42.A_b"}
    for name, value in wanted.items():
        same(values(echo, name), [value], name)
    same((echo["method"], echo["target"], echo["version"]), ("GET", "/t/echo?a=b%20c", "HTTP/1.1"), "request line")


def test_credentials_are_removed(lab):
    """No credential reaches the model, whether it was used or not."""
    client = lab.tinyauth().connect()
    every = [f"Authorization: Bearer {ALICE}", f"X-Api-Key: {BOB}", f"Api-Key: {BOB}"]
    for what, fields in {**GOOD_CREDENTIALS, "all at once": every}.items():
        answer = client.ask("GET", "/t/echo", *fields, key=None)
        same(answer.status, 200, what)
        text = answer.body.decode().lower()
        for word in ("authorization", "api-key", ALICE.lower(), BOB.lower()):
            assert word not in text, f"{what}: {word} reached the model"


def test_spoofed_fields_are_dropped(lab):
    """Address fields from the client are dropped before ours are set."""
    names = ("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Real-IP", "x-forwarded-anything",
             "Forwarded", "X-Client-IP", "True-Client-IP", "X-Cluster-Client-IP")
    echo = lab.tinyauth().ask("GET", "/t/echo", *[f"{name}: 6.6.6.6" for name in names]).json()
    assert "6.6.6.6" not in json.dumps(echo), f"spoofed: {echo['headers']}"
    for name in names[4:]:
        same(values(echo, name), [], name)


def test_hop_by_hop_fields_are_dropped(lab):
    """Hop-by-hop fields, those that Connection names and those with an underscore end here."""
    fields = ("Connection: keep-alive, X-Named", "X-Named: 1", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive",
              "Proxy-Authorization: Basic eDp5", "TE: trailers", "X_Real_IP: 6.6.6.6", "Remote_Addr: 6.6.6.6",
              "X-Kept: yes")
    client = lab.tinyauth().connect()
    echo = client.ask("GET", "/t/echo", *fields).json()
    for name in ("X-Named", "Keep-Alive", "Proxy-Connection", "Proxy-Authorization", "TE", "X_Real_IP", "Remote_Addr"):
        same(values(echo, name), [], name)
    same(values(echo, "X-Kept"), ["yes"], "X-Kept")
    same(client.ask("GET", "/t/echo").status, 200, "next request")


def test_connection_cannot_drop_our_fields(lab):
    """Connection naming Host, the framing, the key or a field of ours does not drop it."""
    client = lab.tinyauth().connect()
    names = "Connection: Host, Content-Length, Authorization, X-Forwarded-For, X-Real-IP, X-Request-Id"
    echo = client.ask("POST", "/t/echo", names, body=b"hello").json()
    same(echo["length"], 5, "body")
    for name in ("Host", "X-Forwarded-For", "X-Real-IP", "X-Request-Id"):
        same(len(values(echo, name)), 1, name)
    echo = client.ask("POST", "/t/echo", "Connection: Transfer-Encoding", body=b"hello", chunked=True).json()
    same(echo["length"], 5, "chunked body")


def test_other_fields_pass_as_they_are(lab):
    """All else arrives in order, with case, repeats and odd bytes."""
    sent = ["Accept: */*", "x-stainless-lang: js", "X-Multi: b", "X-Multi: a", "User-Agent: test \"(x)\"",
            "X-Obs: caf\xe9", "Cookie: a=b; c=d", "X-Empty:"]
    echo = lab.tinyauth().ask("GET", "/t/echo", *sent).json()
    wanted = [[name, value.strip()] for name, _, value in (field.partition(":") for field in sent)]
    same([field for field in echo["headers"] if field in wanted], wanted, "fields")


def test_absolute_target(lab):
    """An absolute target goes on in origin form, and its authority replaces Host."""
    client = lab.tinyauth().connect()
    echo = client.ask("GET", "http://real.test:99/t/echo?x").json()
    same((echo["target"], values(echo, "X-Forwarded-Host")), ("/t/echo?x", ["real.test:99"]), "target and host")
    same(client.ask("GET", "http://real.test").body, b"Ollama is running", "an empty path")


def test_request_id(lab):
    """A sane X-Request-Id is kept, another is replaced, and answer, model and log agree on it."""
    tinyauth = lab.tinyauth()
    client = tinyauth.connect()
    ids = []
    for sent in ("kept-1", 'a b"c', "a" * 2000, "", None):
        answer = client.ask("GET", "/t/echo", *([] if sent is None else [f"X-Request-Id: {sent}"]))
        same(values(answer.json(), "X-Request-Id"), [answer.get("X-Request-Id")], "id at the model")
        ids.append(answer.get("X-Request-Id"))
    same([record["id"] for record in tinyauth.access(5)], ids, "ids in the log")
    same(ids[0], "kept-1", "a sane one")
    same(len(set(ids)), 5, "ids that differ")
    for made in ids[1:]:
        assert re.fullmatch(r"[A-Za-z0-9._-]{8,64}", made), f"made {made!r}"


# Streams

def read_stream(address, target, body):
    """(arrival, event) of each event, in ns of the one monotonic clock."""
    with contextlib.closing(Client(address)) as client:
        client.send(request("POST", target, body=json.dumps(body).encode(), host="localhost"))
        same(client.head().status, 200, target)
        arrivals, text = [], b""
        for piece in client.body():
            text += piece
            while match := re.search(rb'(?:data: )?(\{.*"t_ns".*\})\n', text):
                arrivals.append((time.monotonic_ns(), json.loads(match[1])))
                text = text[match.end():]
    return arrivals


STREAMS = {"/api/generate": {}, "/api/chat": {}, "/v1/chat/completions": {"stream_options": {"include_usage": True}},
           "/v1/messages": {}}


def test_streams_of_every_dialect(lab):
    """Ollama's, OpenAI's and Anthropic's streams arrive byte for byte, with their type."""
    tinyauth = lab.tinyauth()
    for target, more in STREAMS.items():
        body = json.dumps({"stream": True, "events": 20, "gap_ms": 1, **more}).encode()
        texts = []
        for address in (("127.0.0.1", lab.shared.port), tinyauth.address):
            with contextlib.closing(Client(address)) as client:
                answer = client.ask("POST", target, body=body, host="localhost")
            texts.append((answer.status, answer.get("Content-Type"), re.sub(rb'"t_ns": \d+', b"", answer.body)))
        same(texts[1], texts[0], target)
        assert texts[0][2].count(b"word") == 20, f"{target}: {texts[0]}"


def stream_delays(address, target):
    """Smallest gap between two arrivals and median delay of an event, in ms."""
    events = read_stream(address, target, {"stream": True, "events": 50, "gap_ms": 20})[:50]
    gaps = [after[0] - before[0] for before, after in zip(events, events[1:])]
    same(len(gaps), 49, "gaps")
    return min(gaps) / 1e6, statistics.median(arrived - event["t_ns"] for arrived, event in events) / 1e6


@measured
def test_stream_arrives_as_it_is_sent(lab):
    """50 events 20 ms apart: the median delay added is under 1 ms, and none is merged with the next."""
    tinyauth = lab.tinyauth()
    for target in ("/api/generate", "/v1/chat/completions"):
        for _ in range(10):         # other processes on the machine can hold up a reader, but not ten times
            _, direct = stream_delays(("127.0.0.1", lab.shared.port), target)
            gap, through = stream_delays(tinyauth.address, target)
            if gap > 2 and through - direct < 1:
                break
        assert gap > 2, f"{target}: two events {gap:.2f} ms apart"
        assert through - direct < 1, f"{target}: median delay {through:.3f} ms, without tinyauth {direct:.3f} ms"


def gone_after(lab, tinyauth, model, leave, start):
    """Milliseconds from a client's leaving to the end of its upstream connection."""
    seen = len(model.events("close"))
    client = tinyauth.connect()
    start(client, model)
    left = time.monotonic_ns()
    leave(client)
    return (model.wait("close", seen + 1)["t"] - left) / 1e6


def start_stream(client, model):
    client.send(request("POST", "/api/generate", body=b'{"events": 1000, "gap_ms": 20}'))
    client.head()
    next(client.body())


def start_download(client, model):
    client.send(request("GET", "/t/cl/1000000000"))
    client.head()


def start_silence(client, model):
    bodies = len(model.events("body"))
    client.send(request("POST", "/t/silent", body=b"x"))
    model.wait("body", bodies + 1)


@measured
def test_client_that_leaves_ends_the_generation(lab):
    """A client that closes or resets: the model sees its connection closed within 50 ms, in a stream and before it."""
    tinyauth, model = lab.pair()
    for leave in (Client.close, Client.reset):
        for start in (start_stream, start_download, start_silence):
            took = gone_after(lab, tinyauth, model, leave, start)
            assert took < 50, f"{start.__name__}, {leave.__name__}: closed after {took:.1f} ms"
    reasons = {"client_closed", "client_cut"} if Secure.pair else {"client_closed"}    # a reset says no close_notify
    same({record["reason"] for record in tinyauth.access(6)}, reasons, "logged reasons")


GIGABYTE = 1000000000


@contextlib.contextmanager
def memory_stays(tinyauth):
    """Within this, anonymous memory of all processes never grows by 1 MB."""
    before = peak = tinyauth.memory()
    done = threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, tinyauth.memory())
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()
    grown = max(peak, tinyauth.memory()) - before
    assert grown < 1 << 20, f"anonymous memory grew by {grown} bytes"


@measured
def test_gigabyte_down(lab):
    """A 1 GB download passes with anonymous memory unchanged within 1 MB."""
    tinyauth = lab.tinyauth()
    client = tinyauth.connect()
    client.ask("GET", "/t/cl/4000000")
    with memory_stays(tinyauth):
        client.send(request("GET", f"/t/cl/{GIGABYTE}"))
        same(client.head().get("Content-Length"), str(GIGABYTE), "length")
        count, space = len(client.buffer), bytearray(1 << 20)
        while count < GIGABYTE and (got := client.sock.recv_into(space)):
            count += got
        same(count, GIGABYTE, "bytes")
    client.buffer.clear()
    same(client.ask("GET", "/t/echo").status, 200, "next request")


@measured
def test_gigabyte_up(lab):
    """A 1 GB upload passes with anonymous memory unchanged within 1 MB."""
    tinyauth = lab.tinyauth()
    client = tinyauth.connect()
    client.ask("POST", "/t/sink", body=pattern(4000000))
    with memory_stays(tinyauth):
        client.send(request("POST", "/t/sink", f"Content-Length: {GIGABYTE}"))
        for piece in pieces(GIGABYTE):
            client.send(piece)
        same(client.read().json(), {"length": GIGABYTE}, "bytes")


# Keys file

def test_keys_file_forms(lab):
    """Comments, blanks, TABs, plain and hashed secrets, and `off` are understood."""
    upper = "sha256:" + sha256(BOB)[7:].upper()
    text = f"# x\n\n   \t\n a.b_c-d@e   {ALICE}\n\tbob\t{upper}   # y\ncarol {CAROL} off # z\n"
    tinyauth = lab.tinyauth(keys=text)
    statuses = [tinyauth.ask("GET", "/api/version", key=key).status for key in (ALICE, BOB, CAROL, "#", "off")]
    same(statuses, [200, 200, 401, 401, 401], "statuses")
    same([record["key"] for record in tinyauth.access(2)][:2], ["a.b_c-d@e", "bob"], "names")


def test_keys_file_without_last_newline(lab):
    """A last line without its end of line counts, and a # within a secret is no comment."""
    tinyauth = lab.tinyauth(keys="alice plain#not-a-comment-0123")
    same(tinyauth.ask("GET", "/", key="plain#not-a-comment-0123").status, 200, "status")


BAD_KEYS = f"""\
alice {ALICE}
alice {WRONG}-1
bob {ALICE}
carol
d/d {WRONG}-2
{"e" * 65} {WRONG}-3
frank sha256:1234
george sha256:{"g" * 64}
harry {WRONG}-4 nonsense=1
irene {sha256(ALICE)}
joe caf\u00e9-{WRONG}
kim {"x" * 4097}
lea {WRONG}-5 stray
mia {WRONG}-6
"""
BAD_LINES = list(range(2, 14))


def named_lines(path, text):
    """The line numbers of FILE:N: lines, each of which must say something more."""
    return [int(number) for number in re.findall(rf"^{re.escape(path)}:(\d+): \S.{{9}}", text, re.M)]


def test_bad_keys_file_is_refused_whole(lab):
    """Each bad line is named with its number; check exits 1 and serving 78, and no secret is shown."""
    path = lab.path("keys")
    lab.write(path, BAD_KEYS)
    for args, status in ((["check", "-k", path], 1), (["-k", path, "-l", "127.0.0.1:0"], 78)):
        done = lab.run(*args, status=status)
        same(named_lines(path, done.stderr), BAD_LINES, f"lines named by {args[0]}")
        for secret in (ALICE, WRONG, "x" * 100):
            assert secret not in done.stderr + done.stdout, f"a secret in {done.stderr}"


def test_empty_keys_file_is_an_error(lab):
    """A file without a key is refused."""
    path = lab.path("keys")
    for text in ("", "# nobody\n"):
        lab.write(path, text)
        lab.run("check", "-k", path, status=1)
        lab.run("-k", path, "-l", "127.0.0.1:0", status=78)


def test_readable_plain_secrets_get_a_warning(lab):
    """A keys file that others may read is warned of when it holds plain secrets, and only then."""
    path = lab.path("keys")
    for text, mode, warned in ((KEYS, 0o644, True), (KEYS, 0o600, False), (f"bob {sha256(BOB)}\n", 0o644, False)):
        lab.write(path, text)
        os.chmod(path, mode)
        same(path in lab.run("check", "-k", path).stderr, warned, f"warning for mode {mode:o}")


def test_long_keys(lab):
    """A key of 4,096 characters works in each form of credential, and one less or other is refused."""
    secret = ("k" * 4095) + "z"
    tinyauth = lab.tinyauth(keys=f"long {secret}\nhashed {sha256(secret[::-1])}\n")
    for fields in ([f"Authorization: Bearer {secret}"], [f"X-Api-Key: {secret[::-1]}"], [basic("u", secret)]):
        same(tinyauth.ask("GET", "/", *fields, key=None).status, 200, "long key")
    for wrong in (secret[:-1], secret[:-1] + "y", secret + "z"):
        same(tinyauth.ask("GET", "/", key=wrong).status, 401, "another long key")


def many_keys(count, hashed):
    secrets = [f"secret-{i:06d}-0123456789abcdef" for i in range(count)]
    return "".join(f"k{i} {sha256(secret) if hashed else secret}\n" for i, secret in enumerate(secrets))


def start_ms(lab, keys):
    """Milliseconds from the start to event=ready, the best of three."""
    best = []
    for _ in range(3):
        tinyauth = lab.tinyauth(keys=keys)
        best.append((tinyauth.events("ready")[0]["at"] - tinyauth.began) / 1e6)
    return min(best), tinyauth


def index_ms(keys):
    """Milliseconds in which this interpreter reads such a file into a dictionary by digest, the best of three."""
    best = []
    for _ in range(3):
        began = time.monotonic_ns()
        index = {hashlib.sha256(secret.encode()).digest(): name for name, secret in map(str.split, keys.splitlines())}
        best.append((time.monotonic_ns() - began) / 1e6)
        same(len(index), 100000, "keys in the dictionary")
    return min(best)


@measured
def test_100000_keys(lab):
    """100,000 keys, plain or hashed, are loaded no slower than into a Python dictionary, and all found."""
    base, _ = start_ms(lab, KEYS)
    for hashed in (False, True):
        keys = many_keys(100000, hashed)
        loaded, tinyauth = start_ms(lab, keys)
        measure = index_ms(keys)
        assert loaded - base < measure, f"{loaded - base:.0f} ms for 100,000 {'hashed' if hashed else 'plain'} keys, Python {measure:.0f}"
        same(tinyauth.events("ready")[0]["keys"], "100000", "keys")
        client = tinyauth.connect()
        for i in (0, 1, 4242, 50000, 99998, 99999):
            same(client.ask("GET", "/api/version", key=f"secret-{i:06d}-0123456789abcdef").status, 200, f"key {i}")
        same(client.ask("GET", "/api/version", key="secret-100000-0123456789abcdef").status, 401, "one more")


def test_more_keys_than_at_the_start(lab):
    """Keys past the first file's number, and then few again, are published to the running workers."""
    tinyauth = lab.tinyauth()
    tinyauth.publish(many_keys(100000, True))
    same(tinyauth.ask("GET", "/", key="secret-099999-0123456789abcdef").status, 200, "the last of many")
    same(tinyauth.ask("GET", "/").status, 401, "an old key")
    tinyauth.publish(KEYS)
    same(tinyauth.ask("GET", "/").status, 200, "the old key again")


def test_key_from_the_environment(lab):
    """TINYAUTH_KEY is a key named env, without any file and beside one."""
    tinyauth = lab.tinyauth(keys=None, env={"TINYAUTH_KEY": WRONG}, cwd=lab.directory)
    same([tinyauth.ask("GET", "/", key=key).status for key in (WRONG, ALICE)], [200, 401], "without a file")
    same(tinyauth.access()[0]["key"], "env", "name")
    tinyauth = lab.tinyauth(env={"TINYAUTH_KEY": WRONG})
    same([tinyauth.ask("GET", "/", key=key).status for key in (WRONG, ALICE)], [200, 200], "beside a file")


def test_options_from_the_environment(lab):
    """Long options come from the environment, repeatable ones by comma, and the command line wins."""
    tinyauth = lab.tinyauth("--ip-burst", "1", ip_rate="1/m", workers=2,
                            env={"TINYAUTH_WORKERS": "5", "TINYAUTH_IP_BURST": "9", "TINYAUTH_LOG_FORMAT": "json"})
    same(len(tinyauth.workers()), 2, "workers")
    same([tinyauth.ask("GET", "/").status for _ in range(3)], [200, 200, 429], "burst")
    assert all(line.startswith(b"{") for _, line in tinyauth.lines), "TINYAUTH_LOG_FORMAT=json had no effect"
    lab.write(lab.path("k"), KEYS)
    text = lab.run("check", TINYAUTH_LISTEN="127.0.0.1:7001, 127.0.0.1:7002", TINYAUTH_UPSTREAM="127.0.0.1:7003",
                   TINYAUTH_KEYS=lab.path("k")).stdout
    for word in ("127.0.0.1:7001", "127.0.0.1:7002", "127.0.0.1:7003"):
        assert word in text, f"check does not show {word}: {text}"


# Key edits while it runs

def test_changed_keys_file_is_noticed(lab):
    """Without a signal: an added key works, a removed one is refused on an idle kept-alive connection too."""
    tinyauth = lab.tinyauth()
    alice, bob = tinyauth.connect(), tinyauth.connect()
    same((alice.ask("GET", "/").status, bob.ask("GET", "/", key=BOB).status), (200, 200), "before")
    published = len(tinyauth.events("keys_published"))
    lab.write(tinyauth.keys, f"alice {ALICE}\ndora {WRONG}\n")
    same(tinyauth.wait_event("keys_published", published + 1, 10)["keys"], "2", "keys")
    same(tinyauth.ask("GET", "/", key=WRONG).status, 200, "the added key")
    same(bob.ask("GET", "/", key=BOB).status, 401, "the removed key on an idle connection")
    same(alice.ask("GET", "/").status, 200, "a key that stayed")


def test_edit_in_place_is_noticed(lab):
    """A key appended to the file as it is takes effect, and so does `key rm`."""
    tinyauth = lab.tinyauth()
    with open(tinyauth.keys, "a", encoding="ascii") as keys:
        keys.write(f"dora {WRONG}\n")
    until(lambda: tinyauth.ask("GET", "/", key=WRONG).status == 200, "effect of the edit", 10)
    lab.key("rm", "dora")
    until(lambda: tinyauth.ask("GET", "/", key=WRONG).status == 401, "effect of key rm", 10)


def test_edit_that_keeps_size_and_time_is_noticed(lab):
    """What chown and chmod change, or an edit with the old time put back, is looked at too."""
    tinyauth = lab.tinyauth(keys=f"alice {ALICE}\ndora {WRONG}x\n")
    seen = os.stat(tinyauth.keys)
    with open(tinyauth.keys, "r+", encoding="ascii") as keys:
        keys.write(f"alice {ALICE}\ndora x{WRONG}\n")
    os.utime(tinyauth.keys, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    same((os.stat(tinyauth.keys).st_size, os.stat(tinyauth.keys).st_mtime_ns), (seen.st_size, seen.st_mtime_ns), "size and time")
    until(lambda: tinyauth.ask("GET", "/", key=f"x{WRONG}").status == 200, "effect of the edit", 10)


def test_revoked_key_lets_its_stream_run(lab):
    """A stream in flight runs to its end after its key was removed."""
    tinyauth = lab.tinyauth()
    stream = Stream(tinyauth.connect(), 40, 20, key=BOB)
    tinyauth.publish(f"alice {ALICE}\n")
    same(tinyauth.ask("GET", "/", key=BOB).status, 401, "the removed key")
    assert stream.whole(), f"stream: {stream.error}, {len(stream.seen)} events"


def test_bad_keys_file_on_reload(lab):
    """A bad file on reload: every bad line is named, the old keys stay, and the mended file is taken."""
    tinyauth = lab.tinyauth()
    tinyauth.expect(r"event=keys_refused")
    tinyauth.expect(rf"^{re.escape(tinyauth.keys)}:\d+: ")
    same(tinyauth.publish(BAD_KEYS, "keys_refused")["errors"], str(len(BAD_LINES)), "errors")
    same(named_lines(tinyauth.keys, tinyauth.text()), BAD_LINES, "lines named")
    same([tinyauth.ask("GET", "/", key=key).status for key in (ALICE, BOB, f"{WRONG}-6")], [200, 200, 401], "old keys")
    tinyauth.publish(f"mia {WRONG}-6\n")
    same([tinyauth.ask("GET", "/", key=key).status for key in (ALICE, f"{WRONG}-6")], [401, 200], "mended")


def test_emptied_or_removed_keys_file_changes_nothing(lab):
    """A keys file that becomes empty or goes away leaves the old keys working."""
    tinyauth = lab.tinyauth()
    tinyauth.expect("keys")
    tinyauth.publish("", "keys_refused")
    same(tinyauth.ask("GET", "/").status, 200, "after an empty file")
    os.unlink(tinyauth.keys)
    tinyauth.signal(signal.SIGHUP)
    tinyauth.wait_event("keys_refused", 2)
    same(tinyauth.ask("GET", "/").status, 200, "after the file went away")


# tinyauth key

def new_secret(lab, done):
    """The one secret that `key add` or `key rotate` printed; the file holds its hash and not itself."""
    text = Path(lab.path("keys")).read_text()
    secrets = [word for word in done.stdout.split() if sha256(word) in text]
    same(len(secrets), 1, f"secrets in {done.stdout!r}")
    assert done.stdout.count(secrets[0]) == 1 and secrets[0] not in text + done.stderr, "the secret is more than once"
    assert len(secrets[0]) >= 32, f"a short secret {secrets[0]}"
    return secrets[0]


def test_key_add(lab):
    """key add appends a hashed key, prints the secret once, and leaves every other byte, mode and owner."""
    path = Path(lab.path("keys"))
    lab.write(str(path), KEYS + "# end")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    before = path.stat()
    with path.open():   # keeps its inode number from being given to the new file
        first, second = new_secret(lab, lab.key("add", "dora")), new_secret(lab, lab.key("add", "emil", "off"))
        after = path.stat()
    same((after.st_mode, after.st_uid, after.st_gid), (before.st_mode, before.st_uid, before.st_gid), "mode and owner")
    assert after.st_ino != before.st_ino, "the file was written in place"
    assert path.read_text().startswith(KEYS + "# end\n"), "other lines changed"
    tinyauth = lab.tinyauth(keys=path.read_text())
    same([tinyauth.ask("GET", "/", key=key).status for key in (first, second, ALICE)], [200, 401, 200], "statuses")
    left = [entry.name for entry in lab.directory.iterdir() if entry.is_file() and entry.stat().st_size]
    same(left, ["keys"], "files left")


def test_key_add_makes_the_file(lab):
    """The first key add makes a file that others cannot read; rotate, rm and list make none."""
    for command in (["rotate", "first"], ["rm", "first"], ["list"]):
        done = lab.key(*command, status=1)
        assert "No such file" in done.stderr and not os.path.exists(lab.path("keys")), f"{command}: {done.stderr}"
    secret = new_secret(lab, lab.key("add", "first"))
    same(os.stat(lab.path("keys")).st_mode & 0o077, 0, "rights of others")
    tinyauth = lab.tinyauth(keys=Path(lab.path("keys")).read_text())
    same(tinyauth.ask("GET", "/", key=secret).status, 200, "status")


def test_key_rm_and_rotate(lab):
    """rm takes one line out; rotate changes only the secret and keeps attributes and comments."""
    path = Path(lab.path("keys"))
    lab.write(str(path), KEYS)
    lab.key("rm", "alice")
    same(path.read_text(), "".join(line for line in KEYS.splitlines(True) if "alice" not in line), "the file after rm")
    secret = new_secret(lab, lab.key("rotate", "bob"))
    same(path.read_text().split(), KEYS.replace(sha256(BOB), sha256(secret)).replace(f"alice\t{ALICE}", "").split(),
         "the file after rotate")
    new_secret(lab, lab.key("rotate", "carol"))
    assert re.search(r"^carol\s+sha256:\S+ off$", path.read_text(), re.M), "rotate lost the attribute"
    tinyauth = lab.tinyauth(keys=path.read_text())
    statuses = [tinyauth.ask("GET", "/", key=key).status for key in (ALICE, BOB, secret, CAROL)]
    same(statuses, [401, 401, 200, 401], "statuses")


def test_key_list(lab):
    """list names every key and shows neither a secret nor a hash."""
    lab.write(lab.path("keys"), KEYS)
    text = lab.key("list").stdout
    same([line.split()[0] for line in text.splitlines() if line.split()[0] in ("alice", "bob", "carol")],
         ["alice", "bob", "carol"], "names")
    for secret in (ALICE, BOB, CAROL, sha256(BOB)[7:27]):
        assert secret not in text, f"{secret} is shown"
    assert re.search(r"^carol\b.*\boff\b", text, re.M), "off is not shown"


def test_key_refusals_leave_the_file(lab):
    """A name that exists, one that does not, a bad name or attribute and a broken file: an error and no change."""
    path = Path(lab.path("keys"))
    lab.write(str(path), KEYS)
    cases = (["add", "alice"], ["rm", "nobody"], ["rotate", "nobody"], ["add", "a/b"], ["add", "dora", "nonsense=1"],
             ["add"], ["rm"], ["list", "more"], ["nonsense"], [])
    for args in cases:
        done = lab.key(*args, status=(1, 64))
        assert done.stderr.strip() and not done.stdout, f"key {args}: {done.stdout!r}, {done.stderr!r}"
        same(path.read_text(), KEYS, f"the file after key {args}")
    done = lab.run("key", "add", "env", status=64, TINYAUTH_KEYS=str(path), TINYAUTH_KEY=WRONG)
    assert "TINYAUTH_KEY" in done.stderr, done.stderr
    lab.write(str(path), BAD_KEYS)
    lab.key("add", "dora", status=(1, 78))
    same(path.read_text(), BAD_KEYS, "a broken file")


def test_concurrent_key_writers(lab):
    """Eight key add at once all land, and nobody ever sees half a file."""
    path = Path(lab.path("keys"))
    lab.write(str(path), KEYS)
    done, torn = threading.Event(), []

    def watch():
        while not done.is_set():
            text = path.read_text()
            if not text.startswith(KEYS) or not text.endswith("\n"):
                torn.append(text)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            secrets = [new_secret(lab, added) for added in pool.map(lambda i: lab.key("add", f"new{i}"), range(8))]
    finally:
        done.set()
        watcher.join()
    same((torn, len(set(secrets))), ([], 8), "torn reads and secrets")
    tinyauth = lab.tinyauth(keys=path.read_text())
    same([tinyauth.ask("GET", "/", key=secret).status for secret in secrets], [200] * 8, "statuses")


# Commands and exit codes

def test_check(lab):
    """check says what would run, next to a running tinyauth too, and exits 0; 1 without keys; 64 for a bad option."""
    tinyauth = lab.tinyauth()
    args = ["check", "-k", tinyauth.keys, "-l", tinyauth.name, "-u", "127.0.0.1:4321", "-w", "3"]
    done = lab.run(*args)
    for word in (tinyauth.name, "127.0.0.1:4321", tinyauth.keys):
        assert word in done.stdout, f"check does not show {word}: {done.stdout}"
    for secret in (ALICE, BOB, CAROL):
        assert secret not in done.stdout + done.stderr, "check shows a secret"
    lab.run("check", "-k", lab.path("none"), status=1)
    lab.run("check", "--nonsense", status=64)
    os.symlink(lab.path("none/log"), lab.path("nowhere"))
    for option, path, said in (("--log", "none/log", "No such file"), ("--state", "none/state", "No such file"), ("--log", ".", "directory"),
                               ("--log", "nowhere", "No such file")):
        done = lab.run(*args, option, lab.path(path), status=1)
        assert said in done.stderr and option in done.stderr and done.stderr.count("\n") == 1, done.stderr
    lab.run(*args, "--log", lab.path("log"), "--state", lab.path("state"))
    same([name for name in ("log", "state") if os.path.exists(lab.path(name))], [], "files that check made")


def test_upgrade_without_a_place_for_the_log(lab):
    """USR2 after the log's directory is gone: the old binary goes on serving, and says why."""
    os.mkdir(lab.path("gone"))
    tinyauth = lab.tinyauth(log=lab.path("gone/log"))
    tinyauth.expect("log")
    pid = tinyauth.workers()
    shutil.rmtree(lab.path("gone"))
    tinyauth.signal(signal.SIGUSR2)
    until(lambda: any(b"cannot be opened for writing" in line for _, line in tinyauth.lines), "a word on stderr")
    same(tinyauth.ask("GET", "/t/echo").status, 200, "answer")
    until(lambda: tinyauth.workers() == pid, "the end of the check, with the workers from before")


OPTIONS = ("keys listen upstream workers max-conns ip-rate ip-burst log log-format header-timeout connect-timeout "
           "first-byte-timeout idle-timeout keepalive-timeout drain-timeout").split()


def test_help_and_version(lab):
    """-h names every option, -V the version; both exit 0 and keep stderr empty."""
    for flag in (["-h"], ["--help"], ["check", "--help"], ["key", "-h"]):
        done = lab.run(*flag)
        missing = [option for option in OPTIONS if f"--{option}" not in done.stdout]
        same((missing, done.stderr), ([], ""), "options missing in the help")
    for flag in ("-V", "--version"):
        done = lab.run(flag)
        assert re.match(r"tinyauth \d", done.stdout) and not done.stderr, f"version {done.stdout!r}"


def test_bad_options_are_one_line(lab):
    """A bad option exits 64 with one line on stderr that names it."""
    lab.write(lab.path("keys"), KEYS)
    cases = (["--nonsense"], ["-w", "0"], ["-w", "x"], ["-l", "127.0.0.1:99999"], ["-l", "nowhere"], ["--upstream"],
             ["--ip-rate", "10/x"], ["--ip-rate", "-1/s"], ["--idle-timeout", "abc"], ["--log-format", "xml"],
             ["-n", "-5"], ["nonsense"])
    for args in cases:
        done = lab.run("-k", lab.path("keys"), *args, status=64)
        same(len(done.stderr.splitlines()), 1, f"lines for {args}: {done.stderr!r}")
        assert args[-1] in done.stderr and not done.stdout, f"{args}: {done.stderr!r}"
    done = lab.run("-k", lab.path("keys"), status=(64, 78), TINYAUTH_WORKERS="x")
    assert "TINYAUTH_WORKERS" in done.stderr, f"the variable is not named: {done.stderr!r}"


def test_bad_surroundings_are_one_line(lab):
    """No keys, an unreadable file, an address in use: one line that names it, status 78 or 1."""
    lab.write(lab.path("keys"), KEYS)
    tinyauth = lab.tinyauth()
    cases = ((["-k", lab.path("none")], lab.path("none"), 78),
             (["-k", str(lab.directory)], str(lab.directory), 78),
             (["-k", lab.path("keys"), "-l", tinyauth.name], tinyauth.name, (1, 78)),
             (["-k", lab.path("keys"), "--log", lab.path("no/log")], lab.path("no/log"), (1, 78)))
    for args, named, status in cases:
        done = lab.run(*args, *([] if "-l" in args else ["-l", "127.0.0.1:0"]), status=status)
        same(len(done.stderr.splitlines()), 1, f"lines for {args}: {done.stderr!r}")
        assert named in done.stderr, f"{args}: {done.stderr!r}"


# Reload, drain, upgrade, crash

@contextlib.contextmanager
def frozen(pids):
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def connect_to(tinyauth, worker):
    """A client that this worker serves: the others stand still while it connects."""
    with frozen(set(tinyauth.workers()) - {worker}):
        client = tinyauth.connect()
        same(client.ask("GET", "/api/version").status, 200, f"worker {worker}")
    return client


@alone
def test_killed_worker(lab):
    """kill -9 of a worker under load: only its connections end, streams of the other go on, it is back within 1 s."""
    tinyauth, model = lab.pair(workers=2)
    tinyauth.expect(r"event=worker_died .*signal=")
    victim, other = tinyauth.workers()
    doomed = Stream(connect_to(tinyauth, victim), 200, 20)
    kept = Stream(connect_to(tinyauth, other), 75, 20)
    load = Load(tinyauth)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic_ns()
    back = tinyauth.wait_event("worker_started", 3)
    assert back["at"] - killed < 1e9, f"back after {(back['at'] - killed) / 1e9:.2f} s"
    died = tinyauth.wait_event("worker_died")
    same(died["pid"], str(victim), "pid of the dead worker")
    same(sorted(tinyauth.workers()), sorted([other, int(back["pid"])]), "workers")
    load.wait_done(load.done + 200)
    errors = load.stop()
    assert len(errors) <= 4, f"a client failed more than once: {errors}"
    assert not doomed.whole(), "the killed worker's stream ended whole"
    assert kept.whole(), f"the other worker's stream: {kept.error}, {len(kept.seen)} events"
    fresh = connect_to(tinyauth, int(back["pid"]))
    same(fresh.ask("GET", "/t/echo").status, 200, "the new worker")


@alone
def test_worker_that_dies_again_and_again(lab):
    """Three kills in a row are made good each time."""
    tinyauth = lab.tinyauth(workers=1)
    tinyauth.expect(r"event=worker_died .*signal=")
    for count in (2, 3, 4):
        os.kill(tinyauth.workers()[0], signal.SIGKILL)
        tinyauth.wait_event("worker_started", count)
        same(tinyauth.ask("GET", "/api/version").status, 200, "after the kill")


@alone
def test_reload_under_load(lab):
    """HUP ten times under load: no request fails, streams end whole, no process is replaced."""
    tinyauth = lab.tinyauth(workers=2)
    workers = tinyauth.workers()
    streams = [Stream(tinyauth.connect(), 50, 20) for _ in range(4)]
    loads = [Load(tinyauth, 2), Load(tinyauth, 2, fresh=True)]
    for i in range(10):
        tinyauth.publish(KEYS + f"new{i} {WRONG}-{i}\n")
        same(tinyauth.ask("GET", "/", key=f"{WRONG}-{i}").status, 200, "the new key")
    same([load.stop() for load in loads], [[], []], "failed requests")
    assert all(stream.whole() for stream in streams), f"streams: {[stream.error for stream in streams]}"
    same(sorted(tinyauth.workers()), sorted(workers), "workers")


def binary_of(pid):
    return os.stat(f"/proc/{pid}/exe").st_ino


@alone
def test_upgrade_under_load(lab):
    """USR2 under load: the pid stays, the new binary serves, no request fails, streams end whole, old workers go."""
    binary = lab.program(lab.path("tinyauth"))
    tinyauth = lab.tinyauth(workers=2, binary=binary)
    pid, old, before = tinyauth.pid, tinyauth.workers(), binary_of(tinyauth.pid)
    streams = [Stream(tinyauth.connect(), 60, 20) for _ in range(4)]
    loads = [Load(tinyauth, 2), Load(tinyauth, 2, fresh=True)]
    os.rename(lab.program(binary + ".new"), binary)
    tinyauth.signal(signal.SIGUSR2)
    tinyauth.wait_event("ready", 2)
    assert binary_of(pid) != before, "the supervisor still runs the old binary"
    for load in loads:
        load.wait_done(load.done + 100)
    same([load.stop() for load in loads], [[], []], "failed requests")
    assert all(stream.whole() for stream in streams), f"streams: {[stream.error for stream in streams]}"
    for client in tinyauth.clients:
        client.close()
    until(lambda: not any(map(alive, old)), "end of the old workers")
    same([binary_of(worker) == binary_of(pid) for worker in tinyauth.workers()], [True, True], "the workers' binary")
    tinyauth.signal(signal.SIGUSR2)
    tinyauth.wait_event("ready", 3)
    same(tinyauth.ask("GET", "/t/echo").status, 200, "after a second upgrade")


@alone
def test_upgrade_to_a_broken_binary(lab):
    """USR2 with a file that cannot run: the old binary goes on serving."""
    binary = lab.program(lab.path("tinyauth"))
    tinyauth = lab.tinyauth(binary=binary)
    tinyauth.expect(".")
    Path(binary + ".new").write_text("not a program")
    os.chmod(binary + ".new", 0o755)
    os.rename(binary + ".new", binary)
    lines = len(tinyauth.lines)
    tinyauth.signal(signal.SIGUSR2)
    until(lambda: len(tinyauth.lines) > lines, "word about the failed upgrade")
    same(tinyauth.ask("GET", "/t/echo").status, 200, "after the failed upgrade")


@alone
def test_drain_under_load(lab):
    """TERM under load: no request fails, streams end whole, nothing new is accepted, exit 0."""
    tinyauth = lab.tinyauth(workers=2)
    streams = [Stream(tinyauth.connect(), 50, 20) for _ in range(4)]
    load = Load(tinyauth)
    load.ending = True
    tinyauth.signal(signal.SIGTERM)
    until(lambda: load.refused == 4 or load.errors, "drain of the load's connections")
    same(load.stop(), [], "failed requests")
    assert all(stream.whole() for stream in streams), f"streams: {[stream.error for stream in streams]}"
    for client in tinyauth.clients:
        client.close()
    same(tinyauth.wait_exit(), 0, "exit status")
    assert tinyauth.events("draining") and tinyauth.events("stopped"), "no draining or stopped in the log"


def test_drain_answers_idle_connections_once_more(lab):
    """After TERM or INT an idle kept-alive connection gets one more answer, with Connection: close."""
    for number in (signal.SIGTERM, signal.SIGINT):
        tinyauth = lab.tinyauth()
        client = tinyauth.connect()
        same(client.ask("GET", "/t/echo").closes, False, "Connection: close before")
        tinyauth.signal(number)
        tinyauth.wait_event("draining")
        answer = client.ask("GET", "/t/echo")
        same((answer.status, answer.closes), (200, True), "answer while draining")
        same(client.end(), "eof", "end")
        same(tinyauth.wait_exit(), 0, "exit status")


def test_drain_ends_after_its_timeout(lab):
    """Past --drain-timeout a stream is cut and the exit status is 0."""
    tinyauth = lab.tinyauth("--drain-timeout", "300ms")
    stream = Stream(tinyauth.connect(), 1000, 20)
    tinyauth.signal(signal.SIGTERM)
    same(tinyauth.wait_exit(2), 0, "exit status")
    assert not stream.whole(), "the stream ended whole"


def test_second_term_stops_at_once(lab):
    """A second TERM does not wait for streams."""
    tinyauth = lab.tinyauth()
    stream = Stream(tinyauth.connect(), 1000, 20)
    tinyauth.signal(signal.SIGTERM)
    tinyauth.wait_event("draining")
    same(tinyauth.process.poll(), None, "exit before the second TERM")
    tinyauth.signal(signal.SIGTERM)
    tinyauth.wait_exit(2)
    tinyauth.status = tinyauth.process.returncode
    assert not stream.whole(), "the stream ended whole"


def test_workers_end_with_the_supervisor(lab):
    """When the supervisor is killed its workers go."""
    tinyauth = lab.tinyauth(workers=2)
    workers = tinyauth.workers()
    tinyauth.status = -signal.SIGKILL
    tinyauth.signal(signal.SIGKILL)
    until(lambda: not any(map(alive, workers)), "end of the workers")


# Log

def test_access_line(lab):
    """The access line has every field, with the path without its query, in logfmt and in JSON."""
    for form in ("logfmt", "json"):
        tinyauth = lab.tinyauth("--log-format", form)
        answer = tinyauth.ask("POST", "/t/echo?secret=1", body=bytes(1234))
        tinyauth.ask("GET", "/api/tags", key=None)
        good, bad = tinyauth.access(2)
        wanted = {"addr": "127.0.0.1", "key": "alice", "method": "POST", "path": "/t/echo", "status": "200",
                  "upstream": lab.shared.name, "id": answer.get("X-Request-Id")}
        same({name: good[name] for name in wanted}, wanted, f"{form} line")
        assert int(good["in"]) >= 1234 and int(good["out"]) >= len(answer.body), f"bytes {good}"
        assert 0 <= float(good["ttfb_ms"]) <= float(good["ms"]) < 5000, f"times {good}"
        same((bad["status"], bad["reason"], bad["path"]), ("401", "no_key", "/api/tags"), f"refused, {form}")
        unknown = {"logfmt": "-", "json": None}[form]
        same((bad.get("key"), bad.get("upstream")), (unknown, unknown), "what is unknown")
        same("secret" in tinyauth.text(), False, "the query in the log")


def test_json_log_is_json_throughout(lab):
    """With --log-format json every line is an object with typed numbers, events as well."""
    tinyauth = lab.tinyauth("--log-format", "json")
    tinyauth.ask("GET", '/nothing/"=b\'c')
    tinyauth.access()
    records = [json.loads(line) for _, line in tinyauth.lines]
    same({"listening", "ready"} <= {record.get("event") for record in records}, True, "events")
    access = [record for record in records if "method" in record][0]
    same((access["status"], type(access["ms"])), (404, float), "types")
    same(access["path"], '/nothing/"=b\'c', "path")


def test_log_escapes(lab):
    """Quotes, equals signs and control bytes cannot forge a field or a line."""
    tinyauth = lab.tinyauth()
    tinyauth.ask("GET", '/t/"x=y"=status=200')
    for raw in (b"GET /\x1b[31m HTTP/1.1\r\n\r\n", b"GET / x=y\" HTTP/1.1\r\n\r\n", b"\x00\xff\n\n",
                request("GET", "/t/echo", "X-Request-Id: a\tb\x7f\xe9 status=1"),
                request("GET", "/t/echo", "User-Agent: \xe9\x9b", key="\xe9")):
        client = tinyauth.connect()
        client.send(raw)
        client.read()
    first = tinyauth.access(6)[0]
    same((first["path"], first["status"]), ('/t/"x=y"=status=200', "404"), "the first line")
    for _, line in tinyauth.lines:
        assert all(0x20 <= byte < 0x7f for byte in line), f"a raw byte in {line!r}"


def test_no_secret_is_ever_logged(lab):
    """Whatever credential comes in whatever way, none of it is in the log."""
    tinyauth = lab.tinyauth()
    tinyauth.expect("keys")
    cases = {**GOOD_CREDENTIALS, **BAD_CREDENTIALS, **AMBIGUOUS_CREDENTIALS}
    for fields in cases.values():
        tinyauth.ask("GET", f"/api/version?key={ALICE}", *fields, key=None)
    tinyauth.publish(BAD_KEYS, "keys_refused")
    tinyauth.access(len(cases))
    text = tinyauth.text()
    for secret in (ALICE, ALICE[:-1], ALICE.upper(), BOB, CAROL, WRONG, sha256(ALICE)[7:], sha256(BOB)[7:],
                   basic("any", ALICE).split()[2]):
        assert secret not in text, f"{secret} is in the log"


def test_log_that_nobody_reads(lab):
    """A full log pipe never blocks serving; when it is read again lost lines are counted and the rest is whole."""
    tinyauth = lab.tinyauth()
    tinyauth.expect(r"event=log_dropped lines=\d+")
    client = tinyauth.connect()
    asked = 0

    def ask(count):
        nonlocal asked
        client.send(request("GET", "/api/version") * count)
        same({client.read().status for _ in range(count)}, {200}, "statuses")
        asked += count

    def dropped():
        return sum(int(record["lines"]) for record in tinyauth.events("log_dropped"))
    tinyauth.reading.clear()
    for _ in range(20 * os.sysconf("SC_PAGE_SIZE") // 4096):        # a pipe holds sixteen pages
        ask(100)
    tinyauth.reading.set()
    until(lambda: ask(1) or dropped(), "event=log_dropped")
    until(lambda: len(tinyauth.access()) + dropped() == asked, f"account of {asked} lines")
    assert dropped() > 500, f"only {dropped()} lines were dropped"


def test_log_file_is_reopened(lab):
    """--log FILE takes all lines; after a rename and USR1 they go to a new file."""
    path = lab.path("log")
    tinyauth = lab.tinyauth(log=path)
    tinyauth.ask("GET", "/t/echo?first")
    tinyauth.access()
    os.rename(path, path + ".1")
    tinyauth.ask("GET", "/api/version")
    until(lambda: "/api/version" in Path(path + ".1").read_text(), "line in the renamed file")
    tinyauth.signal(signal.SIGUSR1)
    until(lambda: tinyauth.events("log_reopened"), "event=log_reopened")
    tinyauth.ask("GET", "/v1/models")
    same([record["path"] for record in tinyauth.access()], ["/v1/models"], "paths in the new file")
    same((tinyauth.text(), "/v1/models" in Path(path + ".1").read_text()), ("", False), "stderr and the old file")


# Size

def load_end(binary):
    """Where the last loaded byte of a 64-bit ELF file ends, and whether it asks for a dynamic linker."""
    data = Path(binary).read_bytes()
    offset, = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
    return max(header[2] + header[5] for header in headers if header[0] == 1), any(header[0] == 3 for header in headers)


@measured
def test_size(lab):
    """The binary is static, stripped it has at most 256 KB, and idle at most 1 MB of anonymous memory."""
    end, dynamic = load_end(lab.binary)
    assert not dynamic and end <= 256 << 10, f"{end} bytes, {'dynamic' if dynamic else 'static'}"
    tinyauth = lab.tinyauth()
    assert tinyauth.memory() <= 1 << 20, f"{tinyauth.memory()} bytes of anonymous memory"


# The run

NOT_OVER_TLS = {
}


class Run:
    """The tests of one call, their count and what they leave."""

    def __init__(self, binary, verbose):
        self.binary, self.verbose = binary, verbose
        self.directory = tempfile.mkdtemp(prefix="tinyauth-test-")
        self.model = Model(self.directory)
        self.passed, self.failed = 0, 0
        self.lock = threading.Lock()

    def one(self, test):
        lab = Lab(self.binary, self.model, self.directory)
        began = time.monotonic()
        problems, word = [], None
        try:
            test(lab)
        except Skip as why:
            word = f"skipped: {why}"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames
                              if HERE in Path(frame.filename).parents)
            problems.append(f"{type(error).__name__}: {error} ({where})")
        try:
            problems += lab.close()
        except Exception as error:
            problems.append(f"while stopping: {type(error).__name__}: {error}")
        self.report(test, problems, word, time.monotonic() - began, lab)
        shutil.rmtree(lab.directory, ignore_errors=True)

    def report(self, test, problems, word, seconds, lab):
        with self.lock:
            self.failed += bool(problems)
            self.passed += not problems and not word
            if not problems:
                if self.verbose or word:
                    print(f"{word or 'ok':7} {test.__name__} ({seconds:.1f} s)", flush=True)
                return
            print(f"FAILED  {test.__name__} ({seconds:.1f} s): {test.__doc__}")
            for problem in problems:
                print(f"        {problem}")
            for text in lab.stderr()[-1:]:
                for line in text.splitlines()[-8:]:
                    print(f"        | {line[:300]}")
            sys.stdout.flush()

    def end(self):
        Started.kill_all()
        shutil.rmtree(self.directory, ignore_errors=True)
        print(f"{self.passed} passed, {self.failed} failed", flush=True)

    def skip(self, test, why):
        print(f"skipped {test.__name__}: {why}", flush=True)

    def abort(self, why):
        """From the watchdog or a signal: stop everything at once."""
        Started.aborted = True
        Started.kill_all()
        time.sleep(0.5)                 # for tests that were just starting something
        self.failed += 1
        print(f"FAILED  {why}")
        self.end()
        os._exit(1)


def main(module):
    """Runs the tests of a module, given as its globals()."""
    parser = argparse.ArgumentParser(description=module["__doc__"].partition("\n")[0])
    parser.add_argument("--tinyauth", metavar="BIN", default=HERE.parent / "tinyauth")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--no-measure", action="store_true")
    parser.add_argument("--enter", metavar="COMMAND", default="", help="runs tinyauth")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="")
    options = parser.parse_args()
    Lab.enter = shlex.split(options.enter)
    tests = [test for name, test in module.items() if name.startswith("test_") and options.pattern in name]
    if options.no_measure:
        tests = [test for test in tests if not getattr(test, "measured", False)]
    run = Run(str(Path(options.tinyauth).resolve()), options.verbose)
    seconds = module.get("WATCHDOG", WATCHDOG)
    if options.tls:
        Secure.pair, seconds = self_signed(run.directory), WATCHDOG_TLS
        for test in tests:
            if test.__name__ in module["NOT_OVER_TLS"]:
                run.skip(test, module["NOT_OVER_TLS"][test.__name__])
        tests = [test for test in tests if test.__name__ not in module["NOT_OVER_TLS"]]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: run.abort(f"stopped by signal {number}"))
    watchdog = threading.Timer(seconds, run.abort, [f"not done after {seconds} s"])
    watchdog.daemon = True
    watchdog.start()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(run.one, [test for test in tests if not getattr(test, "alone", False)]))
    for test in tests:
        if getattr(test, "alone", False):
            run.one(test)
    run.end()
    return 1 if run.failed or not (tests or options.pattern) else 0


if __name__ == "__main__":
    sys.exit(main(globals()))
