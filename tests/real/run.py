#!/usr/bin/env python3
"""Real model servers behind tinyauth: llama-server and Ollama, each with a tiny model of random weights and a slow one.

    python3 tests/real/run.py [--tinyauth BIN] [--dir DIR] [-v] [PATTERN]

tests/real/make.sh makes the servers in DIR (default build/real), once. What cannot be had is a failure. Tests run one by one, in
the way of tests/e2e.py, which also judges tinyauth's log and end. A test named in NOT_YET shows what tinyauth should do and does
not do yet: it must fail, and is reported apart; when it passes, its line goes out of the list. The last line is
`N passed, N failed`.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import compare  # noqa: E402
import e2e  # noqa: E402
from e2e import ALICE, Client, Cut, Lab, Run, Started, request, same, until  # noqa: E402
from servers import Llama, Ollama, Server, Tap  # noqa: E402

WATCHDOG = 900
OWNER = 12345                           # nobody else's
CHAT = [{"role": "user", "content": "open the door"}]

# What tinyauth is to do and does not do yet, and what is missing.
NOT_YET = {
    "test_llama_ready": "/ready",
    "test_llama_unix_socket_of_another": "EACCES of a unix upstream is told with the socket's mode and owner",
    "test_llama_unix_socket_of_another_checked": "`check` looks at a unix upstream's mode",
}


class Shared:
    """The servers that tests share, each started when one first asks for it."""

    def __init__(self, place, directory):
        self.place, self.directory = place, Path(directory)
        self.home = self.directory / "ollama"
        self.home.mkdir()
        self.found = {}

    def get(self, name):
        if name not in self.found:
            self.found[name] = self.make(name)
        return self.found[name]

    def make(self, name):
        if name == "llama":
            return Llama(self.place)
        if name == "slow":
            return Llama(self.place, "slow")
        server = Ollama(self.place, self.home, OLLAMA_DEBUG="1")
        server.create()
        return server

    def stop(self):
        for server in self.found.values():
            server.stop()


def front(lab, server, *options, **more):
    """tinyauth before a server, or what has its name."""
    return lab.tinyauth("--ip-conns", "1000", *options, upstream=server.name, **more)


def keep(lab, thing):
    """Have it stopped with the lab."""
    lab.things.insert(0, thing)
    return thing


def post(target, body, *fields, key=ALICE, host=e2e.HOST, **more):
    return request("POST", target, "Content-Type: application/json", *fields, key=key, host=host, body=json.dumps(body).encode(), **more)


VARIED = {"temperature": 1.5, "seed": 7}        # Ollama ends an answer that says the same word thirty times
LONG = {"llama": 1900, "ollama": -1}    # tokens: what the context holds, and without end


def speech(server, tokens=None, stream=True, words=3):
    """(target, body) of a request that keeps the slow model busy for seconds; a word of the prompt is some tokens."""
    messages = [{"role": "user", "content": "door " * words}]
    tokens = tokens or LONG[server.kind]
    if server.kind == "llama":
        return "/v1/chat/completions", {"messages": messages, "max_tokens": tokens, "stream": stream, "cache_prompt": False}
    return "/api/chat", {"model": "slow", "messages": messages, "stream": stream, "options": {"num_predict": tokens, **VARIED}}


def local(server):
    """Host of a request that goes to the server itself: what tinyauth sends, too."""
    return f"localhost:{server.port}"


class Way:
    """How to reach a server: straight, or through tinyauth."""

    def __init__(self, server, tinyauth=None):
        self.address = tinyauth.address if tinyauth else server.address
        self.key = ALICE if tinyauth else None
        self.host = e2e.HOST if tinyauth else local(server)

    def post(self, client, target, body, **more):
        client.send(post(target, body, key=self.key, host=self.host, **more))

    def ask(self, method, target, *fields, body=None):
        with contextlib.closing(Client(self.address)) as client:
            client.sock.settimeout(60)
            client.send(request(method, target, *fields, key=self.key, host=self.host, body=body))
            return client.read(method)


def begin(server, way, lines=3, **more):
    """A stream of the slow model, so many lines of it read."""
    client = Client(way.address)
    client.sock.settimeout(60)
    way.post(client, *speech(server, **more))
    same(client.head().status, 200, "stream")
    client.rest, seen = client.body(), b""
    while seen.count(b"\n") < lines:
        seen += next(client.rest)
    return client


def idle(server, mark):
    """Wait until the server works for nobody. llama-server's log is read: asking it would keep it from seeing that a client left."""
    straight = Way(server)
    if server.kind == "llama":
        server.wait("stop processing", mark, timeout=60)
    else:
        target, body = speech(server, tokens=1, stream=False)
        same(straight.ask("POST", target, body=json.dumps(body).encode()).status, 200, "a short request")


# Direct against through

def judged(lab, server, cases):
    """Every case both ways; how many there were."""
    tinyauth, wrong, seen = front(lab, server), [], set()
    for case in cases:
        straight, found = compare.compare(server.address, local(server), tinyauth.address, case)
        for what, (one, other) in found.items():
            entries = [entry for entry in compare.UNLIKE if compare.covers(entry, server.kind, case, what)]
            seen.update(entries)
            if not entries:
                wrong.append(f"{case.name}: {what}: direct {str(one)[:300]}, through {str(other)[:300]}")
        if "end" in straight:
            wrong.append(f"{case.name}: the server itself: {straight['end']}")
    names = [case.name for case in cases]
    for entry in compare.UNLIKE:
        if entry[0] == server.kind and any(re.fullmatch(entry[1], name) for name in names) and entry not in seen:
            wrong.append(f"no longer unlike: {entry}")
    assert not wrong, f"{len(wrong)} differences\n        " + "\n        ".join(wrong[:20])
    lab.shared.note(f"{len(cases)} cases alike, but for: " + "; ".join(
        f"{name} ({what}): {why}" for _, name, what, why in sorted(seen)) + (" and " if seen else "") + "what is not compared")
    return len(cases)


def test_llama_direct_against_through(lab):
    """Each route of llama-server and each error: the answer through tinyauth is the server's own."""
    return judged(lab, lab.shared.get("llama"), compare.llama_cases())


def test_llama_embeddings_direct_against_through(lab):
    """The same of a llama-server that embeds."""
    server = keep(lab, Llama(lab.shared.place, "tiny", "--embedding", "--pooling", "mean"))
    return judged(lab, server, compare.llama_embedding_cases())


def test_ollama_direct_against_through(lab):
    """The same of Ollama."""
    return judged(lab, lab.shared.get("ollama"), compare.ollama_cases())


# Leaving

def leave(server, way, how):
    """How long after its client left the server's log says so, None if not within 6 s while there was work for more; and how long
    until it works for nobody."""
    mark = server.mark()
    blocker = Client(server.address) if how == "queued" else None
    if blocker:                         # not a stream: while one runs, llama-server looks after no other client
        Way(server).post(blocker, *speech(server, stream=False))
        server.wait(server.BEGUN, mark)
        mark = server.mark()
    client = Client(way.address)
    if how in ("three events", "half-close", "reset"):
        client.close()
        client = begin(server, way)
    else:
        # Ollama may go on with what it has not begun to say: not for long
        early = {"words": 60, "tokens": 200} if how == "before the first token" else {}
        way.post(client, *speech(server, stream=how != "whole answer", **early))
        if how == "queued" and server.kind == "llama":
            until(lambda: b"requests_deferred 1" in Way(server).ask("GET", "/metrics").body, "queued request")
        else:
            server.wait(server.BEGUN, mark)
    mark = server.mark()
    left = time.monotonic()
    if how == "half-close":
        client.sock.shutdown(socket.SHUT_WR)
    elif how == "reset":
        client.reset()
    else:
        client.close()
    try:
        took = server.wait(server.GONE, mark, timeout=6) - left
    except AssertionError:
        took = None
    client.close()
    if blocker:
        blocker.close()
    idle(server, mark)
    return took, time.monotonic() - left


def leaving(lab, server):
    tinyauth = front(lab, server)
    table, wrong = [], []
    for how in ("three events", "before the first token", "queued", "whole answer", "half-close", "reset"):
        (straight, free), (through, freed) = leave(server, Way(server), how), leave(server, Way(server, tinyauth), how)
        table.append(f"{how} {seconds(straight)} and {seconds(through)}")
        if straight is not None and (through is None or through > max(straight, server.LOOKS) + 1):
            wrong.append(table[-1])
        if free < 2 and freed > free + 2:
            wrong.append(f"{how}: busy for {free:.1f} s and {freed:.1f} s")
    assert not wrong, "the server went on: " + "; ".join(wrong)
    lab.shared.note(f"{server.kind} stops after its client left, direct and through: " + "; ".join(table))


def seconds(value):
    return "not within 6 s" if value is None else f"{value:.2f} s"


def test_llama_stops_when_its_client_leaves(lab):
    """The log of llama-server says that it stopped, within a second of what a direct client sees."""
    leaving(lab, keep(lab, Llama(lab.shared.place, "slow", slots=1)))


def test_ollama_stops_when_its_client_leaves(lab):
    """The same of Ollama, which answers the next request at once."""
    leaving(lab, lab.shared.get("ollama"))


def test_ollama_stops_loading_when_its_client_leaves(lab):
    """A client that leaves while its model still loads: Ollama's log says so, within a second of what a direct client sees."""
    took = []
    for through in (False, True):
        server = keep(lab, Ollama(lab.shared.place, lab.shared.get("ollama").home, OLLAMA_DEBUG="1"))
        way = Way(server, front(lab, server) if through else None)
        with contextlib.closing(Client(way.address)) as client:
            way.post(client, *speech(server))
            server.wait("waiting for llama runner", timeout=30)
        left, mark = time.monotonic(), server.mark()
        took.append(server.wait(server.GONE, mark, timeout=30) - left)
    lab.shared.note(f"Ollama gives a load up, direct and through: {seconds(took[0])} and {seconds(took[1])}")
    assert took[1] <= took[0] + 1, took


# A server's life

class Gate:
    """Holds a llama-server while it loads, until open()."""

    def __init__(self, place):
        self.file = place / "root/real" / f"gate-{os.getpid()}-{time.monotonic_ns()}"
        self.file.touch()
        self.name = f"/real/{self.file.name}"       # inside the root

    def open(self):
        self.file.unlink(missing_ok=True)

    stop = open


def loading(lab, *options):
    """A llama-server that loads, and the gate that holds it."""
    gate = keep(lab, Gate(lab.shared.place))
    server = keep(lab, Llama(lab.shared.place, "tiny", *options, gate=gate.name))
    until(lambda: answers(server), "an answer while loading", 20)
    return server, gate


def answers(server):
    with contextlib.suppress(OSError, Cut):
        return Way(server).ask("GET", "/v1/models")
    return None


def test_llama_loading(lab):
    """While a model loads the server's own 503 passes, whole and streamed; then the same client connection gets 200."""
    server, gate = loading(lab)
    tinyauth = front(lab, server)
    client = tinyauth.connect()
    for method, target, body in (("GET", "/v1/models", None), ("POST", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}),
                                 ("POST", "/v1/messages", {"messages": CHAT, "max_tokens": 3, "stream": True})):
        data = None if body is None else json.dumps(body).encode()
        straight = Way(server).ask(method, target, body=data)
        same(straight.status, 503, "direct")
        answer = client.ask(method, target, body=data)
        same((answer.status, answer.body), (503, straight.body), f"{method} {target} while loading")
        assert not answer.closes, "a 503 of the server ended the client's connection"
    gate.open()
    server.wait("listening on")
    same(client.ask("GET", "/v1/models").status, 200, "afterwards")


def test_llama_ready(lab):
    """/ready without a key: 200 while the server takes connections (also while it loads), 503 when it is gone."""
    server, gate = loading(lab)
    tinyauth = front(lab, server)
    same(tinyauth.ask("GET", "/ready", key=None).status, 200, "while loading")
    server.kill()
    until(lambda: tinyauth.ask("GET", "/ready", key=None).status == 503, "503 when it is gone", 3)
    same(tinyauth.ask("GET", "/health", key=None).status, 200, "/health meanwhile")


def cut_in_a_stream(lab, server, start):
    """Killed in a stream: cut. Gone: 502. Back: 200, all on connections that the client keeps."""
    tinyauth = front(lab, server)
    kept = tinyauth.connect()
    same(kept.ask("GET", "/v1/models").status, 200, "before")
    client = begin(server, Way(server, tinyauth))
    server.kill()
    with e2e.is_cut(client):
        for _ in client.rest:
            pass
    same(kept.ask("GET", "/v1/models").status, 502, "gone")
    target, body = speech(server, tokens=3, stream=False)
    answer = kept.ask("POST", target, "Content-Type: application/json", body=json.dumps(body).encode())
    e2e.check_error(answer, 502, target)
    start()
    same(kept.ask("GET", "/v1/models").status, 200, "back")
    same([(record["status"], record.get("reason")) for record in tinyauth.access(5)],
         [("200", None), ("200", "upstream_cut"), ("502", "upstream_refused"), ("502", "upstream_refused"), ("200", None)], "the log")
    client.close()


def test_llama_killed_gone_and_back(lab):
    """Killed in a stream: the client sees a cut; gone: 502; back: 200 on the same connection of the client."""
    server = keep(lab, Llama(lab.shared.place, "slow"))
    cut_in_a_stream(lab, server, server.start)


def test_ollama_killed_gone_and_back(lab):
    """The same of Ollama. Its runner is killed with it."""
    server = keep(lab, Ollama(lab.shared.place, lab.shared.get("ollama").home))
    cut_in_a_stream(lab, server, server.start)


def test_ollama_runner_killed(lab):
    """Ollama's runner dies in a stream, Ollama lives: its client gets what a direct one does."""
    server = keep(lab, Ollama(lab.shared.place, lab.shared.get("ollama").home))
    tinyauth, ends = front(lab, server), []
    for way in (Way(server), Way(server, tinyauth)):
        client = begin(server, way)
        for pid in e2e.children(server.pid):
            os.kill(pid, signal.SIGKILL)
        ends.append(how_it_ends(client))
        client.close()
    same(ends[1], ends[0], "end of the stream, through and direct")


def how_it_ends(client):
    """The last line of a stream without its numbers, and whether its end was clean."""
    text = b""
    try:
        for piece in client.rest:
            text += piece
    except Cut:
        return "cut"
    last = text.strip().splitlines()[-1].decode() if text.strip() else ""
    return "whole: " + re.sub(r"[\d.TZ:+-]+|\"content\":\s*\"[^\"]*\"", "", last)


def stopped(lab, server):
    """TERM while two streams run, one direct and one through: both clients see the same kind of end."""
    tinyauth = front(lab, server)
    ways = [Way(server), Way(server, tinyauth)]
    clients, ends = [begin(server, way) for way in ways], [None, None]

    def read(number):
        ends[number] = how_it_ends(clients[number])
    readers = [threading.Thread(target=read, args=[number], daemon=True) for number in (0, 1)]
    for reader in readers:
        reader.start()
    server.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(3)
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)      # llama-server waits for its streams; a second signal ends it at once
    for reader in readers:
        reader.join(20)
    assert None not in ends, f"a stream does not end with its server: {ends}"
    same(ends[1].partition(":")[0], ends[0].partition(":")[0], f"end of the stream, through and direct ({ends})")
    server.process.wait(20)
    same(tinyauth.ask("GET", "/v1/models").status, 502, "gone")
    for client in clients:
        client.close()


def test_llama_stopped_in_order(lab):
    """llama-server ends at TERM: the client of a stream sees what a direct one does, and then 502."""
    stopped(lab, keep(lab, Llama(lab.shared.place, "slow")))


def test_ollama_stopped_in_order(lab):
    """The same of Ollama."""
    stopped(lab, keep(lab, Ollama(lab.shared.place, lab.shared.get("ollama").home, OLLAMA_NUM_PARALLEL="2")))


def test_ollama_full(lab):
    """Ollama with a queue of one that is full: its own 503 passes, word for word, in each dialect."""
    server = keep(lab, Ollama(lab.shared.place, lab.shared.get("ollama").home, OLLAMA_MAX_QUEUE="1", OLLAMA_MAX_LOADED_MODELS="1",
                              OLLAMA_DEBUG="1"))
    tinyauth = front(lab, server)
    running = begin(server, Way(server))
    waiting, full = [], None
    for _ in range(6):                  # a busy model is in the way of another: one waits for room, one in the queue
        client = Client(server.address)
        client.sock.settimeout(1)
        client.send(post("/api/chat", {"model": "tiny", "messages": CHAT, "options": {"num_predict": 1}}, key=None, host=local(server)))
        try:
            full = client.read()
            break
        except TimeoutError:
            waiting.append(client)
    assert full and full.status == 503, f"Ollama answered {full and full.status} to a full queue"
    for target in ("/api/chat", "/v1/chat/completions", "/v1/messages"):
        body = json.dumps({"model": "tiny", "messages": CHAT, "max_tokens": 3}).encode()
        straight, through = (way.ask("POST", target, body=body) for way in (Way(server), Way(server, tinyauth)))
        strip = re.compile(rb"req_\w+")
        same((through.status, strip.sub(b"", through.body)), (503, strip.sub(b"", straight.body)), f"{target} when full")
    for client in [running, *waiting]:
        client.close()


# Its sockets

def connections(port):
    """How many connections to a local port are open."""
    count = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        count += fields[2].endswith(f":{port:04X}") and fields[3] == "01"
    return count


def test_llama_thirty_idle_clients(lab):
    """llama-server with four HTTP threads: thirty clients that keep their connections hold none of them, the fifth does not wait."""
    server = keep(lab, Llama(lab.shared.place, "tiny", "--threads-http", "4"))
    tinyauth, waits = front(lab, server), []
    clients = [tinyauth.connect() for _ in range(30)]
    for client in clients:
        began = time.monotonic()
        same(client.ask("GET", "/v1/models").status, 200, "status")
        waits.append(time.monotonic() - began)
    until(lambda: not connections(server.port), "end of all connections to the server while its clients are idle", 3)
    for client in clients:
        same(client.ask("GET", "/v1/models").status, 200, "a second request")
    assert max(waits) < 2, f"client number {waits.index(max(waits)) + 1} waited {max(waits):.1f} s"


def unix_server(lab):
    """A llama-server of another user on a socket that it makes itself: mode 0755."""
    folder = Path(tempfile.mkdtemp(prefix="socket-", dir=lab.shared.place / "root/real"))
    os.chown(folder, OWNER, OWNER)
    folder.chmod(0o755)
    server = Llama.__new__(Llama)
    keep(lab, Folder(folder))
    server.owner = OWNER
    server.__init__(lab.shared.place, "tiny", host=f"/real/{folder.name}/llama.sock")
    keep(lab, server)
    server.name = f"unix:{folder}/llama.sock"
    same(oct((folder / "llama.sock").stat().st_mode & 0o777), "0o755", "mode of the server's own socket")
    return server


class Folder:
    def __init__(self, path):
        self.path = path

    def stop(self):
        shutil.rmtree(self.path, ignore_errors=True)


def test_llama_unix_socket_as_its_owner(lab):
    """A unix socket that llama-server made itself (0755) serves workers that run as its owner, whole and streamed."""
    server = unix_server(lab)
    tinyauth = front(lab, server, "--user", f"{OWNER}:{OWNER}")
    same(tinyauth.ask("GET", "/v1/models").status, 200, "models")
    answer = tinyauth.ask("POST", "/v1/chat/completions", body=json.dumps({"messages": CHAT, "max_tokens": 5, "stream": True}).encode())
    assert answer.body.endswith(b"data: [DONE]\n\n"), answer.body[-200:]


def test_llama_unix_socket_of_another(lab):
    """Workers that may not connect to it: 502, and the log names the socket's mode and its owner."""
    server = unix_server(lab)
    tinyauth = front(lab, server)
    tinyauth.expect("event=")
    same(tinyauth.ask("GET", "/v1/models").status, 502, "status")
    until(lambda: re.search(r"0?755\b", tinyauth.text()) and str(OWNER) in tinyauth.text(), "mode and owner in the log", 2)


def test_llama_unix_socket_of_another_checked(lab):
    """`tinyauth check` sees it too."""
    server = unix_server(lab)
    lab.write(lab.path("keys"), e2e.KEYS)
    done = lab.run("check", "-k", lab.path("keys"), "-u", server.name, status=(0, 1))
    said = done.stdout + done.stderr
    assert re.search(r"0?755\b", said) and str(OWNER) in said, said


def test_llama_by_name(lab):
    """A name in place of an address."""
    server = lab.shared.get("llama")
    tinyauth = lab.tinyauth(upstream=f"localhost:{server.port}")
    same(tinyauth.ask("GET", "/v1/models").status, 200, "status")


def test_llama_ipv6(lab):
    """A server that listens on ::1."""
    server = keep(lab, Llama(lab.shared.place, "tiny", host="::1"))
    tinyauth = lab.tinyauth(upstream=f"[::1]:{server.port}")
    same(tinyauth.ask("GET", "/v1/models").status, 200, "status")


def test_ollama_streams_are_not_to_be_held(lab):
    """Event streams and NDJSON carry X-Accel-Buffering: no, whole answers do not."""
    tinyauth = front(lab, lab.shared.get("ollama"))
    for target, stream in (("/api/chat", True), ("/v1/chat/completions", True), ("/v1/messages", True), ("/api/chat", False)):
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 3, "stream": stream, "options": {"num_predict": 3}}
        answer = tinyauth.ask("POST", target, body=json.dumps(body).encode())
        same(answer.get("X-Accel-Buffering"), "no" if stream else None, f"{target}, stream {stream}")


# Its walls

ORIGINS = ["https://elsewhere.example", "null", "chrome-extension://abcdefghijklmnop", "moz-extension://1-2-3",
           "http://localhost.elsewhere.example"]


def test_ollama_foreign_host(lab):
    """Ollama answers 403 to a foreign Host; through tinyauth each name that a client uses is served."""
    server = lab.shared.get("ollama")
    tinyauth = front(lab, server)
    for host in ("models.example", "models.example:8080", "192.0.2.7", "[2001:db8::7]:1234", "localhost"):
        with contextlib.closing(Client(server.address)) as client:
            client.send(request("GET", "/api/tags", host=host, key=None))
            straight = client.read().status
        same(straight, 200 if host == "localhost" else 403, f"{host}, direct")
        same(tinyauth.ask("GET", "/api/tags", host=host).status, 200, f"{host}, through")


def test_ollama_foreign_origin(lab):
    """Ollama answers 403 to a foreign Origin, `null` or an extension's; a key is stronger than an origin."""
    server = lab.shared.get("ollama")
    tinyauth, refused = front(lab, server), []
    for origin in ORIGINS:
        straight = Way(server).ask("GET", "/api/tags", f"Origin: {origin}").status
        through = tinyauth.ask("GET", "/api/tags", f"Origin: {origin}")
        if through.status != 200:
            refused.append(f"{origin}: direct {straight}, through {through.status}")
        assert not through.get("Access-Control-Allow-Origin"), f"{origin}: told {through.fields}"
    assert not refused, refused


def test_llama_foreign_origin(lab):
    """llama-server tells every Origin that it may; through tinyauth a page of another origin is told nothing."""
    server = lab.shared.get("llama")
    tinyauth = front(lab, server)
    for origin in ORIGINS:
        same(Way(server).ask("GET", "/v1/models", f"Origin: {origin}").get("Access-Control-Allow-Origin"), origin, "direct")
        same(tinyauth.ask("GET", "/v1/models", f"Origin: {origin}").get("Access-Control-Allow-Origin") or None, None, "through")


def test_ollama_redirects(lab):
    """What gin redirects stays at the client's own address, and leads there."""
    server = lab.shared.get("ollama")
    tinyauth = front(lab, server)
    for method, target in (("POST", "/api/show/"), ("GET", "/api/tags/"), ("GET", "/v1/models/")):
        body = json.dumps({"model": "tiny"}).encode() if method == "POST" else None
        answer = tinyauth.ask(method, target, body=body)
        assert answer.status in (301, 307), f"{method} {target}: {answer.status}"
        where = re.sub(rf"^http://{re.escape(e2e.HOST)}(?=/)", "", answer.get("Location"))
        assert where.startswith("/") and not where.startswith("//"), f"{method} {target} leads to {answer.get('Location')}"
        same(tinyauth.ask(method, where, body=body).status, 200, f"{method} {where}")


# Counting

class Counted(Client):
    """Counts what it was sent and what it sends."""

    def __init__(self, address):
        super().__init__(address)
        self.got = self.sent = 0

    def send(self, data):
        self.sent += len(data)
        super().send(data)

    def fill(self):
        before = len(self.buffer)
        super().fill()
        self.got += len(self.buffer) - before


def counted(lab, server, chats):
    """The log's bytes of each request are those that its client sent and got."""
    tinyauth = front(lab, server)
    client = Counted(tinyauth.address)
    asked = [("GET", "/v1/models", None, {}), ("HEAD", "/", None, {}), ("GET", "/no-such-route", None, {})]
    asked += [("POST", target, json.dumps(body).encode(), {"chunked": chunked}) for target, body in chats for chunked in (False, True)]
    asked += [("POST", "/v1/no-such-route", b"x" * (1 << 20), {}), ("GET", "/v1/models", None, {"key": e2e.WRONG})]
    want = []
    for method, target, body, more in asked:
        client.got = client.sent = 0
        client.send(request(method, target, body=body, **more))
        answer = client.read(method)
        want.append((method, target, str(answer.status), client.sent, client.got))
        if answer.closes:
            client = Counted(tinyauth.address)
    client.close()
    for line, (method, target, status, sent, got) in zip(tinyauth.access(len(want)), want):
        same((line["method"], line["path"], line["status"], int(line["out"])), (method, target, status, got), "the log's line")
        # of a body that the server answered before its end, less may have been taken
        assert int(line["in"]) == sent or (sent > 1 << 20 and int(line["in"]) < sent), (line, sent)


def test_llama_counting(lab):
    """Bytes in the log are the client's, whole, streamed, refused."""
    body = {"messages": CHAT, "max_tokens": 40}
    counted(lab, lab.shared.get("llama"), [("/v1/chat/completions", body), ("/v1/chat/completions", {**body, "stream": True}),
                                           ("/v1/messages", {**body, "stream": True})])


def test_ollama_counting(lab):
    """The same of Ollama."""
    body = {"model": "tiny", "messages": CHAT, "options": {"num_predict": 40}}
    counted(lab, lab.shared.get("ollama"), [("/api/chat", {**body, "stream": False}), ("/api/chat", body),
                                            ("/v1/chat/completions", {**body, "max_tokens": 40, "stream": True})])


# Requests hidden in bodies

PAGE = 4096                             # what cpp-httplib reads at once
# (name, method, target, fields, what its body begins with): what a server may answer without reading the body
HIDING = [
    ("chat", "POST", "/v1/chat/completions", [], b"{"),
    ("unknown route", "POST", "/no-such-route", [], b""),
    ("wrong method", "PUT", "/v1/models", [], b""),
    ("GET with a body", "GET", "/v1/models", [], b""),
    ("GET of a file with a body", "GET", "/", [], b""),
    ("DELETE with a body", "DELETE", "/models", [], b""),
    ("OPTIONS with a body", "OPTIONS", "/v1/models", [], b""),
    ("HEAD with a body", "HEAD", "/v1/models", [], b""),
    ("multipart without boundary", "POST", "/v1/audio/transcriptions", ["Content-Type: multipart/form-data"], b""),
    ("unknown coding", "POST", "/v1/chat/completions", ["Content-Type: application/json", "Content-Encoding: nonsense"], b""),
    ("unreadable Accept", "POST", "/v1/chat/completions", ["Accept: ;;,q=x,/"], b"{"),
    ("unknown type", "POST", "/v1/chat/completions", ["Content-Type: text/x-nothing"], b""),
    ("form", "POST", "/v1/chat/completions", ["Content-Type: application/x-www-form-urlencoded"], b""),
    ("bad range", "GET", "/", ["Range: bytes=9-1"], b""),
]


def hiding(start, head, pages=8):
    """A body with a whole request at each page boundary, counted from the connection's first byte; `head`: bytes before it."""
    secret = post("/completion", {"prompt": "hidden", "n_predict": 1}, key=None, host="localhost")
    body = bytearray(start)
    for page in range(1, pages + 1):
        if (gap := page * PAGE - head - len(body)) >= 0:
            body += b"." * gap + secret
    return bytes(body)


def head_upstream(tap, tinyauth, method, target, fields, size):
    """How long the head of such a request is when tinyauth sends it on."""
    known = len(tap.asked)
    with contextlib.closing(tinyauth.connect()) as client:
        client.ask(method, target, *fields, body=b"0" * size)
    until(lambda: b"\r\n\r\n" in b"".join(tap.asked[known:]), "a head at the server")
    return bytes(tap.asked[-1]).index(b"\r\n\r\n") + 4


def control(server):
    """How many of these bodies the server itself takes for requests, when a client sends them to it directly."""
    fooled = []
    for name, method, target, fields, start in HIDING:
        size = len(hiding(b"", 600))
        head = len(request(method, target, *fields, key=None, host="localhost", body=b"0" * size)) - size
        raw = request(method, target, *fields, key=None, host="localhost", body=(hiding(start, head) + b"." * size)[:size])
        with contextlib.closing(Client(server.address)) as client, contextlib.suppress(OSError, Cut):
            client.send(raw)
            client.sock.shutdown(socket.SHUT_WR)
            while True:
                client.fill()
        if len(re.findall(rb"HTTP/1\.[01] [2-5]\d\d ", bytes(client.buffer))) > 1:
            fooled.append(name)
    return fooled


def hidden(lab, server, honest_status):
    """None of the requests in these bodies is answered, and who else asks meanwhile gets an answer of his own."""
    tap = keep(lab, Tap(server.address))
    tinyauth = front(lab, tap)
    honest, wrong, mark = tinyauth.connect(), [], server.mark()
    size = len(hiding(b"", 600))
    for name, method, target, fields, start in HIDING:
        head = head_upstream(tap, tinyauth, method, target, fields, size)
        body = hiding(start, head)
        body += b"." * (size - len(body)) if len(body) < size else b""
        known = len(tap.said)
        with contextlib.closing(tinyauth.connect()) as client:
            for _ in range(9):          # of eight hidden ones each: over 1,000 in all
                try:
                    client.send(request(method, target, *fields, body=body[:size]))
                    answer = client.read(method)
                except (Cut, OSError) as error:
                    wrong.append(f"{name}: {error!r}")
                    break
                if answer.closes:
                    break
        answer = honest.ask("GET", "/v1/models")
        if answer.status != honest_status:
            wrong.append(f"{name}: an honest client got {answer.status}")
        for asked, said in zip(tap.asked[known:], tap.said[known:]):
            answered = len(re.findall(rb"HTTP/1\.[01] [2-5]\d\d ", said))
            if answered > asked.count(b"X-Forwarded-For"):
                wrong.append(f"{name}: {answered} answers to one request")
    shared = max(asked.count(b"X-Forwarded-For") for asked in tap.asked)
    if shared > 1:
        wrong.append(f"{shared} requests on one connection to the server")
    ran = server.said("processing task", mark)
    if ran:
        wrong.append(f"{len(ran)} hidden requests ran")
    assert not wrong, "; ".join(wrong[:8])
    lab.shared.note(f"asked directly, llama-server reads requests in {len(control(server))} of these {len(HIDING)} bodies")


def test_llama_hidden_requests_while_serving(lab):
    """Bodies with requests at each 4096 bytes, where the server answers without reading them: none runs."""
    hidden(lab, keep(lab, Llama(lab.shared.place)), 200)


def test_llama_hidden_requests_while_loading(lab):
    """The same while a model loads, when every request is answered 503."""
    server, gate = loading(lab)
    hidden(lab, server, 503)
    mark = server.mark()
    gate.open()
    server.wait("listening on")
    same(Way(server).ask("GET", "/v1/models").status, 200, "afterwards")
    same(server.said("processing task", mark), [], "requests that ran when the model was there")


# The run

class RealRun(Run):
    """Of e2e.Run: one test after another, with shared servers and those tests that are known to fail."""

    def __init__(self, binary, verbose, place):
        self.binary, self.verbose = binary, verbose
        self.directory = tempfile.mkdtemp(prefix="tinyauth-real-")
        self.model = Shared(place, self.directory)
        self.model.note = lambda text: print(f"        {text}", flush=True)
        self.passed, self.failed, self.pending = 0, 0, 0
        self.lock = threading.Lock()

    def one(self, test):
        self.cases = 0

        def counting(lab):
            self.cases = (test(lab) or 1) - 1
        counting.__name__, counting.__doc__ = test.__name__, test.__doc__
        super().one(counting)

    def report(self, test, problems, word, seconds, lab):
        why = NOT_YET.get(test.__name__)
        if why and problems:
            self.pending += 1
            print(f"not yet {test.__name__} ({seconds:.1f} s): {why}", flush=True)
            if self.verbose:
                print(f"        {problems[0][:400]}", flush=True)
            return
        if why:
            problems = [f"passes: take it out of NOT_YET ({why})"]
        super().report(test, problems, word, seconds, lab)
        own = [thing for thing in lab.things if isinstance(thing, Server)]
        for server in (own or self.model.found.values()) if problems and not why else ():
            for _, line in server.lines[-12:]:
                print(f"        {server.kind} | {line[:260]}")
        self.passed += 0 if problems or word else self.cases

    def end(self):
        self.model.stop()
        Started.kill_all()
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.pending:
            print(f"{self.pending} not yet, as listed", flush=True)
        print(f"{self.passed} passed, {self.failed} failed", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tinyauth", metavar="BIN", default=HERE.parent.parent / "tinyauth")
    parser.add_argument("--dir", metavar="DIR", type=Path, default=HERE.parent.parent / "build/real")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="")
    options = parser.parse_args()
    if subprocess.run(["bash", HERE / "make.sh", options.dir], stdin=subprocess.DEVNULL).returncode:
        print("0 passed, 1 failed")
        return 1
    place = options.dir.resolve()
    print("not compared: " + "; ".join(f"{name}: {why}" for name, why in compare.HOP.items()))
    print(f"llama-server {Llama.version(place)}\nOllama {Ollama.version(place)}", flush=True)
    tests = [test for name, test in globals().items() if name.startswith("test_") and options.pattern in name]
    run = RealRun(str(Path(options.tinyauth).resolve()), options.verbose, place)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: run.abort(f"stopped by signal {number}"))
    watchdog = threading.Timer(WATCHDOG, run.abort, [f"not done after {WATCHDOG} s"])
    watchdog.daemon = True
    watchdog.start()
    for test in tests:
        run.one(test)
    run.end()
    return 1 if run.failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
