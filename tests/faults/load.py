"""Mixed requests, each of which knows its right answer: what the fault tests and the soak put tinyauth under.

A client may see a whole right answer, an error of tinyauth, or a cut. Everything else is a problem: a wrong or a silently
shortened answer, one answer too many, a request without a key that is let through, or no answer for some seconds.
"""

import contextlib
import hashlib
import itertools
import json
import random
import socket
import sys
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from e2e import WRONG, Client, Cut, pattern, request, same  # noqa: E402

REFUSED = {408, 429, 502, 503, 504}     # errors that a fault elsewhere may cause
UPLOAD = pattern(150000)
UPLOAD_HASH = hashlib.sha256(UPLOAD).hexdigest()


class Guest(Client):
    """A client with an address of its own: 127.x.y.z."""

    def __init__(self, address, source="127.0.0.1", rcvbuf=None):
        self.sock = socket.socket()
        if rcvbuf:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.sock.settimeout(10)
        self.sock.bind((source, 0))
        self.sock.connect(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self.sock.getsockname()[1]
        self.buffer = bytearray()
        self.answer = None


def echo(client, tag):
    answer = client.ask("GET", f"/t/echo?{tag}")
    return answer, lambda: same(answer.json()["target"], f"/t/echo?{tag}", "echoed target")


def upload(client, tag):
    answer = client.ask("POST", f"/t/echo?{tag}", body=UPLOAD)
    return answer, lambda: same((answer.json()["target"], answer.json()["sha256"]), (f"/t/echo?{tag}", UPLOAD_HASH),
                                "echoed upload")


def upload_chunked(client, tag):
    answer = client.ask("POST", f"/t/echo?{tag}", body=UPLOAD, chunked=True)
    return answer, lambda: same((answer.json()["target"], answer.json()["sha256"]), (f"/t/echo?{tag}", UPLOAD_HASH),
                                "echoed upload")


def download(path, **more):
    def ask(client, tag):
        answer = client.ask("GET", f"/t/{path}{tag}", **more)
        return answer, lambda: same(answer.body == pattern(100000), True, f"{len(answer.body)} bytes of {path} are right")
    ask.__name__ = f"download {path}{more or ''}"
    return ask


def events(client, tag):
    body = json.dumps({"events": 5, "gap_ms": 3}).encode()
    answer = client.ask("POST", f"/api/generate?{tag}", body=body)
    return answer, lambda: same([json.loads(line)["done"] for line in answer.body.splitlines()], [False] * 5 + [True],
                                "events of a stream")


def no_key(client, tag):
    return client.ask("GET", f"/t/evil?{tag}", key=None), None


def wrong_key(client, tag):
    return client.ask("POST", f"/t/evil?{tag}", key=WRONG, body=b"x" * 5000), None


def no_host(client, tag):
    """Is refused, and its connection ended by the server."""
    client.send(f"GET /t/evil?{tag} HTTP/1.1\r\n\r\n".encode())
    return client.read(), None


def leave(client, tag):
    """Goes away in the middle of an answer."""
    client.send(request("GET", f"/t/chunked/5000000?{tag}"))
    client.take(1000)
    client.reset()
    raise Cut("ours")


KINDS = [echo, upload, upload_chunked, download("cl/100000?"), download("chunked/100000?chunk=1500&"),
         events, no_key, wrong_key, no_host, leave]
# The model's end is the end of these: only a reset shows that one was cut, and a process that is killed does not always reset.
UNFRAMED = [download("close/100000?"), download("close/100000?", version="1.0")]


class Mixed:
    """Some clients that go through all kinds of requests, for ever or `rounds` requests each."""
    tags = itertools.count()

    def __init__(self, address, clients=6, rounds=None, seed=1, sources=1, kinds=(*KINDS, *UNFRAMED), patience=10):
        self.address, self.rounds, self.sources = address, rounds, sources
        self.kinds, self.patience = kinds, patience     # patience: seconds without a byte that are a problem
        self.whole = self.refused = self.cut = 0
        self.failures, self.problems = [], []
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.run, args=(number, random.Random(f"{seed} {number}")), daemon=True)
                        for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self, number, dice):
        client = None
        for _ in itertools.repeat(None) if self.rounds is None else range(self.rounds):
            if self.stopping.is_set():
                break
            kind, tag = dice.choice(self.kinds), next(self.tags)
            try:
                client = client or Guest(self.address, f"127.0.1.{number % self.sources + 1}")
                client.sock.settimeout(self.patience)
                goes_on = self.one(client, kind, tag)
            except TimeoutError:
                self.note("problems", f"{kind.__name__} {tag}: nothing for {self.patience} s")
                goes_on = False
            except (Cut, OSError) as error:
                self.count("cut", kind is not leave and f"{kind.__name__} {tag}: {error!r}")
                goes_on = False
                self.stopping.wait(0.01)
            except (AssertionError, ValueError, KeyError) as error:
                self.note("problems", f"{kind.__name__} {tag}: {error}")
                goes_on = False
            if not goes_on and client:
                client.close()
                client = None
        if client:
            client.close()

    def one(self, client, kind, tag):
        """One request; may another one follow on its connection?"""
        answer, check = kind(client, tag)
        if answer.status in REFUSED:
            self.count("refused", f"{kind.__name__} {tag}: {answer.status}")
        elif check is None:
            same(answer.status, 400 if kind is no_host else 401, "status of a request that is refused")
            self.count("whole", None)
        else:
            same(answer.status, 200, "status")
            check()
            self.count("whole", None)
        same(bytes(client.buffer), b"", "bytes after an answer")
        return not answer.closes and (answer.chunked or answer.get("Content-Length") is not None)

    def count(self, what, failure):
        with self.lock:
            setattr(self, what, getattr(self, what) + 1)
        if failure:
            self.note("failures", failure)

    def note(self, where, text):
        with self.lock:
            if len(getattr(self, where)) < 20:
                getattr(self, where).append(text)

    @property
    def done(self):
        return self.whole + self.refused + self.cut

    def join(self, timeout):
        """Wait until all rounds are through; what was not as it may be."""
        end = time.monotonic() + timeout
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in self.threads):
            self.note("problems", f"not through after {timeout} s")
            self.stopping.set()
        return self.problems

    def stop(self, timeout=20):
        self.stopping.set()
        return self.join(timeout)


def check_upstream(model):
    """Nothing without a key came through, and nothing that must not be repeated came twice."""
    seen = model.requests()
    same([target for _, _, target in seen if "evil" in target], [], "requests without a key that the model saw")
    posts = [target for _, method, target in seen if method == "POST"]
    same(len(posts), len(set(posts)), "POST requests, and different ones, that the model saw")


@contextlib.contextmanager
def under_load(address, **more):
    """Mixed requests meanwhile; their problems are the caller's."""
    load = Mixed(address, **more)
    try:
        yield load
    finally:
        problems = load.stop()
    same(problems, [], "problems of clients")
