#!/usr/bin/env python3
"""Fault tests: what is tried against tinyauth, and what goes wrong around it.

    python3 tests/faults/run.py [--tinyauth BIN] [-v] [--seconds N] [PATTERN]

Each test_* function gets a lab as in tests/e2e.py, which also judges the log and the end of every tinyauth. System
calls are made to fail by strace; where it is missing or may not trace, those tests are skipped. Tests marked @slow
mostly wait and run beside the others; those marked @alone run one by one. --seconds is how long processes are killed at
random. The last line is `N passed, N failed`.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import e2e  # noqa: E402
from e2e import (ALICE, KEYS, Cut, Model, Run, Skip, Started, Stream, alive, alone, check_error, is_cut,  # noqa: E402
                 raw_answer, request, same, until)
from load import KINDS, Guest, Mixed, check_upstream, under_load  # noqa: E402

ROOT = HERE.parent.parent
KILL_SECONDS = 15
WATCHDOG = 350


def slow(test):
    test.slow = True
    return test


def descriptors(pids):
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def cpu_share(pids, seconds=1.0):
    """How much of one CPU the processes use from now on, for so long."""
    def ticks():
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        return sum(int(field[11]) + int(field[12]) for field in fields)
    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def guest(tinyauth, source, **more):
    client = Guest(tinyauth.address, source, **more)
    tinyauth.clients.append(client)
    return client


def hold_stream(tinyauth, source="127.0.0.1", events=100000):
    """An authenticated stream that stays open until its client is closed."""
    client = guest(tinyauth, source)
    client.send(request("POST", "/api/generate", body=json.dumps({"events": events, "gap_ms": 100}).encode()))
    same(client.head().status, 200, "stream")
    return client


def ends(client):
    """Did the server end this connection without a byte?"""
    try:
        return client.end() in ("eof", "reset")
    except TimeoutError:
        return False


def dribble(client, data, gap, stop):
    """Byte by byte from a thread of its own, until `stop` or the end of the connection."""
    def run():
        with contextlib.suppress(OSError):
            for byte in itertools.cycle(data):
                if stop.wait(gap):
                    return
                client.send(bytes([byte]))
    threading.Thread(target=run, daemon=True).start()


def check_settled(tinyauth, base, conns):
    """With all clients gone: descriptors as at the start, and an address may open all its connections again."""
    until(lambda: descriptors(tinyauth.workers()) <= base, f"return to {base} descriptors", 8)
    clients = [Guest(tinyauth.address) for _ in range(conns)]
    try:
        same({client.ask("GET", "/health").status for client in clients}, {200}, "answers to as many as an address may open")
    finally:
        for client in clients:
            client.close()
    until(lambda: descriptors(tinyauth.workers()) <= base, "end of those connections", 8)
    same(tinyauth.ask("GET", "/t/echo").status, 200, "a request afterwards")


# Slow and silent clients

def test_slow_heads(lab):
    """A head that comes byte by byte gets 408 at the header time-out, silence ends without a byte, others are served."""
    tinyauth = lab.tinyauth("--header-timeout", "500ms")
    began, stop = time.monotonic(), threading.Event()
    slow_ones = [tinyauth.connect() for _ in range(20)]
    silent = tinyauth.connect()
    for client in slow_ones:
        dribble(client, request("GET", "/t/echo")[:40] + b"a" * 1000, 0.05, stop)
    same(tinyauth.ask("GET", "/t/echo").status, 200, "a request meanwhile")
    same({client.read().status for client in slow_ones}, {408}, "answers")
    assert ends(silent), "silence was answered"
    assert 0.45 < time.monotonic() - began < 3, f"over after {time.monotonic() - began:.1f} s"
    stop.set()


def test_standing_body(lab):
    """A request body that stands still for the idle time-out gets 408 and reaches the model as a cut."""
    tinyauth, model = lab.pair("--idle-timeout", "400ms")
    for raw in (b"Content-Length: 100\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n64\r\nhalf"):
        client = tinyauth.connect()
        client.send(request("POST", "/t/echo")[:-2] + raw)
        same(client.read().status, 408, "answer")
        assert ends(client), "the connection goes on"
    same((len(model.requests()), model.events("body")), (2, []), "whole bodies that the model saw")


@slow
def test_slow_body(lab):
    """A body under 1 KB/s over 30 s gets 408 then, also when chunk extensions make up for it; one at 2 KB/s goes through."""
    tinyauth = lab.tinyauth()
    stop, began = threading.Event(), time.monotonic()
    length, chunks, steady = tinyauth.connect(), tinyauth.connect(), tinyauth.connect()
    length.send(request("POST", "/t/sink", "Content-Length: 100000"))
    chunks.send(request("POST", "/t/sink", "Transfer-Encoding: chunked"))
    steady.send(request("POST", "/t/sink", "Content-Length: 72000"))
    for client in (length, chunks):
        dribble(client, b"1;a=b\r\nx\r\n", 0.05, stop)

    def send_steadily():
        for _ in range(36):
            steady.send(b"x" * 2000)
            time.sleep(1)
    sender = threading.Thread(target=send_steadily, daemon=True)
    sender.start()
    for client in (length, chunks):
        client.sock.settimeout(40)
        same(client.read().status, 408, "answer to a slow body")
        assert 29 < time.monotonic() - began < 35, f"answered after {time.monotonic() - began:.1f} s"
    stop.set()
    sender.join()
    same(steady.read().json(), {"length": 72000}, "what arrived of the steady body")


@slow
def test_slow_reader(lab):
    """A client that reads nothing for 60 s while bytes wait for it is cut, and the model with it; memory stays."""
    tinyauth, model = lab.pair()
    base = tinyauth.memory()
    clients = [guest(tinyauth, "127.0.0.1", rcvbuf=4096) for _ in range(10)]
    for client in clients:
        client.send(request("GET", "/t/chunked/100000000"))
    began = time.monotonic()
    assert tinyauth.memory() - base < 2 << 20, f"{tinyauth.memory() - base} bytes for 10 slow readers"
    until(lambda: len(model.events("close")) == 10, "the model's connections cut", 70)
    assert time.monotonic() - began > 55, f"cut after {time.monotonic() - began:.1f} s"
    same({record.get("reason") for record in tinyauth.access(10)}, {"client_stalled"}, "reasons")
    with is_cut(clients[0]):
        clients[0].read()


def test_standing_stream(lab):
    """An answer that stands still for the idle time-out is visibly cut, in every framing."""
    tinyauth = lab.tinyauth("--idle-timeout", "400ms")
    for raw, version in ((b"Content-Length: 10\r\n\r\nabc", "1.1"), (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "1.1"),
                         (b"\r\nabc", "1.1"), (b"\r\nabc", "1.0")):
        client = tinyauth.connect()
        with is_cut(client):
            raw_answer(client, b"HTTP/1.1 200 OK\r\n" + raw, then="hold", version=version)


def test_idle_connections(lab):
    """A kept-alive connection without a next request ends at the keep-alive time-out; a hundred cost no pipe buffers."""
    tinyauth = lab.tinyauth("--keepalive-timeout", "700ms", "--ip-conns", "200")
    clients = [tinyauth.connect() for _ in range(100)]
    base = tinyauth.memory()
    for client in clients:
        same(client.ask("GET", "/t/echo").status, 200, "status")
    assert tinyauth.memory() - base < 1 << 20, f"{tinyauth.memory() - base} bytes more for 100 idle connections"
    assert all(map(ends, clients)), "a connection goes on"


def test_half_closed_client(lab):
    """A client that closes its sending side in the middle of an answer without framing sees a cut, and the model as well."""
    tinyauth, model = lab.pair()
    client = tinyauth.connect()
    client.send(request("GET", "/t/close/30000000", version="1.0"))
    client.head()
    client.take(1000)
    client.sock.shutdown(e2e.socket.SHUT_WR)
    with is_cut(client):
        client.answer.body = b"".join(client.body())
    model.wait("close")


# Floods

def test_header_floods(lab):
    """Endless lines, names, values and fields get 431 or 414 as soon as a limit is passed, and nothing goes upstream."""
    tinyauth, model = lab.pair()
    head = request("GET", "/t/echo")[:-2]
    floods = {"fields": head + b"A: b\r\n" * 101, "value": head + b"A: " + b"b" * 20000, "name": head + b"A" * 20000,
              "blanks": head + b"A:" + b" " * 20000, "options": head + b"Connection: " + b"a, " * 5000 + b"\r\n",
              "target": b"GET /" + b"a" * 20000}
    for name, flood in floods.items():
        client = tinyauth.connect()
        client.send(flood)
        same(client.read().status, 414 if name == "target" else 431, f"answer to {name}")
        assert ends(client), f"the connection goes on after {name}"
    same(model.requests(), [], "what the model saw")


def test_flood_from_one_address(lab):
    """Past --ip-conns an address gets 429 and event=turned_away, others are served, and a closed one makes room."""
    tinyauth = lab.tinyauth("--ip-conns", "5", workers=2)
    tinyauth.expect("event=turned_away addr=127.0.0.9 status=429 reason=ip_conns")
    held = [guest(tinyauth, "127.0.0.9") for _ in range(5)]
    same({client.ask("GET", "/t/echo").status for client in held}, {200}, "the first five")
    for _ in range(50):
        client = guest(tinyauth, "127.0.0.9")
        check_error(client.read(), 429)
        assert client.answer.closes and ends(client), "the connection goes on"
    same(guest(tinyauth, "127.0.0.8").ask("GET", "/t/echo").status, 200, "another address")
    same(len(tinyauth.events("turned_away")), 50, "event=turned_away")
    held.pop().close()
    until(lambda: guest(tinyauth, "127.0.0.9").ask("GET", "/t/echo").status == 200, "room for one more")


def test_flood_from_many_addresses(lab):
    """In a full pool the oldest idle connection gives way; a stream runs on to its end, and newcomers are served."""
    tinyauth = lab.tinyauth("-n", "32")
    stream = Stream(guest(tinyauth, "127.9.9.9"), 60, 20)
    idle = [guest(tinyauth, f"127.1.0.{i}") for i in range(1, 32)]
    for client in idle:
        same(client.ask("GET", "/t/echo").status, 200, "while there is room")
    guest(tinyauth, "127.2.0.1")
    assert ends(idle[0]), "the oldest did not give way"
    same([client.ask("GET", "/t/echo").status for client in idle[1:]], [200] * 30, "the others")
    flood = [guest(tinyauth, f"127.3.{i // 200}.{i % 200 + 1}") for i in range(400)]
    served = [guest(tinyauth, f"127.4.0.{i + 1}").ask("GET", "/t/echo").status for i in range(20)]
    same(served, [200] * 20, "newcomers with a key")
    assert all(map(ends, flood[:300])), "an early silent connection did not give way"
    assert stream.whole(), f"the stream was cut: {stream.error}"


def test_pool_full_of_streams(lab):
    """When nothing may give way a newcomer gets 503 with Retry-After, until a stream ends."""
    tinyauth = lab.tinyauth("-n", "8")
    tinyauth.expect("event=turned_away .*status=503 reason=full")
    streams = [hold_stream(tinyauth) for _ in range(8)]
    answer = guest(tinyauth, "127.0.0.2").ask("GET", "/t/echo")
    check_error(answer, 503)
    same((answer.get("Retry-After"), answer.closes), ("1", True), "Retry-After and Connection: close")
    for stream in streams:
        stream.fill()
    streams[0].close()
    until(lambda: guest(tinyauth, "127.0.0.2").ask("GET", "/t/echo").status == 200, "room for one more")


def test_endless_extensions_and_trailers(lab):
    """Chunk extensions and trailers past their limits get 400, and the model sees no whole body."""
    tinyauth, model = lab.pair()
    bodies = {"one extension": b"1;" + b"a" * 300, "a value": b'1;a="' + b"a" * 300, "many": b"1;a\r\nx\r\n" * 3000,
              "1 byte for 200": (b"1;" + b"a" * 200 + b"\r\nx\r\n") * 30, "a trailer": b"0\r\nA: " + b"b" * 5000,
              "many trailers": b"0\r\n" + b"A: b\r\n" * 1000, "zeroes": b"0" * 100}
    for name, body in bodies.items():
        client = tinyauth.connect()
        client.send(request("POST", "/t/echo", "Transfer-Encoding: chunked") + body)
        same(client.read().status, 400, f"answer to {name}")
        assert ends(client), f"the connection goes on after {name}"
    until(lambda: len(model.events("close")) == len(model.events("accept")), "end of the model's connections")
    same(model.events("body"), [], "whole bodies that the model saw")


# The log and descriptors

def test_log_pipe_that_nobody_reads(lab):
    """A full log pipe costs no CPU while nothing happens, and requests are served meanwhile."""
    tinyauth = lab.tinyauth()
    tinyauth.expect(r"event=log_dropped lines=\d+")
    client = tinyauth.connect()
    tinyauth.reading.clear()
    for _ in range(20):
        client.send(request("GET", "/api/version") * 100)
        same({client.read().status for _ in range(100)}, {200}, "statuses")
    share = cpu_share([tinyauth.pid, *tinyauth.workers()])
    assert share < 0.2, f"{share:.0%} of a CPU while nothing happens"
    tinyauth.reading.set()


@contextlib.contextmanager
def small_disk(lab, size="64k"):
    place = lab.path("disk")
    os.mkdir(place)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if done.returncode != 0:
        raise Skip("no small file system can be mounted")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def serve_with_a_stuck_log(tinyauth):
    client = tinyauth.connect()
    for _ in range(20):
        client.send(request("GET", "/api/version") * 100)
        same({client.read().status for _ in range(100)}, {200}, "statuses with a log that takes nothing")
    share = cpu_share([tinyauth.pid, *tinyauth.workers()])
    assert share < 0.2, f"{share:.0%} of a CPU while nothing happens"


def test_full_disk(lab):
    """A full disk under the log stops nothing; with room again lines are whole, and those lost are counted."""
    with small_disk(lab) as place:
        tinyauth = lab.tinyauth("--log", f"{place}/log", log=f"{place}/log")
        serve_with_a_stuck_log(tinyauth)
        same(os.path.getsize(f"{place}/log") >= 60000, True, "the disk is full")
        before = [record for record in tinyauth.records() if "method" in record]
        os.truncate(f"{place}/log", 0)
        until(lambda: tinyauth.ask("GET", "/api/version") and tinyauth.events("log_dropped"), "event=log_dropped")
        lines = Path(f"{place}/log").read_bytes().splitlines()[1:]      # of the first one half may be lost
        same([line for line in lines if not e2e.parse_line(line)], [], "lines that are not whole")
        assert before, "nothing was logged before the disk was full"
        tinyauth.stop()


def limited(lab, limit):
    """A tinyauth that starts under `ulimit`."""
    return lab.program(lab.path("limited"), f"ulimit {limit} || exit 1\nexec {shlex.quote(lab.binary)} \"$@\"")


def test_log_past_the_file_size_limit(lab):
    """A log file at RLIMIT_FSIZE stops nothing and kills no worker."""
    tinyauth = lab.tinyauth("--log", lab.path("log"), log=lab.path("log"), binary=limited(lab, "-f 16"))
    workers = tinyauth.workers()
    serve_with_a_stuck_log(tinyauth)
    same(tinyauth.workers(), workers, "workers")


def test_log_to_a_full_device(lab):
    """A log that only says ENOSPC stops nothing."""
    device = "/dev/full"
    if not os.path.exists(device):
        raise Skip(f"no {device}")
    port = lab.held_port().getsockname()[1]
    lab.held.pop().close()
    keys = lab.path("keys")
    lab.write(keys, KEYS)
    process = Started.popen([lab.binary, "-l", f"127.0.0.1:{port}", "-u", lab.shared.name, "-k", keys, "-w", "1",
                             "--ip-rate", "off", "--log", device], stderr=subprocess.DEVNULL, env=e2e.environment())
    try:
        client = until(lambda: connects(("127.0.0.1", port)), "start")
        for _ in range(500):
            same(client.ask("GET", "/api/version").status, 200, "status")
        share = cpu_share([process.pid, *e2e.children(process.pid)])
        assert share < 0.2, f"{share:.0%} of a CPU while nothing happens"
        client.close()
        process.terminate()
        same(process.wait(5), 0, "exit status")
    finally:
        process.kill()
        process.wait()


def connects(address):
    with contextlib.suppress(ConnectionRefusedError):
        return Guest(address)


@alone
def test_descriptors_exhausted_by_silence(lab):
    """With few descriptors silent connections give way to new ones: requests are served and no CPU is burnt."""
    tinyauth = lab.tinyauth("--ip-conns", "200", binary=limited(lab, "-n 40"))
    tinyauth.expect("event=accept_paused")
    silent = [tinyauth.connect() for _ in range(100)]
    share = cpu_share(tinyauth.workers())
    assert share < 0.2, f"{share:.0%} of a CPU with {len(silent)} silent connections"
    for _ in range(20):
        until(lambda: tinyauth.ask("GET", "/t/echo").status in (200, 503), "an answer meanwhile", 5)
    for client in silent:
        client.close()
    until(lambda: tinyauth.ask("GET", "/t/echo").status == 200, "a request afterwards", 5)


@alone
def test_descriptors_exhausted_by_streams(lab):
    """With all descriptors in streams newcomers get 503 and no CPU is burnt; serving goes on when they come back."""
    for limit in (32, 33):              # in one of both the last descriptor is half a stream
        tinyauth = lab.tinyauth(binary=limited(lab, f"-n {limit}"))
        tinyauth.expect("event=turned_away .*reason=full")
        streams = []
        with contextlib.suppress(AssertionError, TimeoutError):
            while len(streams) < 60:
                streams.append(guest(tinyauth, "127.0.0.1"))
                streams[-1].sock.settimeout(2)
                streams[-1].send(request("POST", "/api/generate", body=b'{"events": 100000, "gap_ms": 500}'))
                same(streams[-1].head().status, 200, "stream")
        waiting = tinyauth.connect()
        share = cpu_share(tinyauth.workers())
        assert share < 0.2, f"{share:.0%} of a CPU while descriptors are out"
        assert 5 < len(streams) < 60, f"{len(streams)} streams with {limit} descriptors"
        waiting.send(request("GET", "/t/echo"))
        same(waiting.read().status, 503, "one too many")
        for client in streams:
            client.close()
        until(lambda: tinyauth.connect().ask("GET", "/health").status == 200, "room again")
        same(tinyauth.ask("GET", "/t/echo").status, 200, "a request afterwards")


# The upstream

GARBAGE = {"not HTTP": b"\x00\x01\x02 this is not HTTP\r\n\r\n", "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
           "a line without end": b"HTTP/1.1 200 " + b"x" * 40000, "blanks": b"HTTP/1.1 200 OK\r\nA:" + b" " * 40000,
           "many fields": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 9000, "two lengths":
           b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", "a huge length":
           b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nx", "an unasked 101":
           b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"}


def test_upstream_garbage(lab):
    """Whatever is no HTTP/1.1 head within its limits is a 502, and the client's connection serves the next request."""
    class Speaker(threading.Thread):
        """Says the same to everyone and holds the connection."""
        def __init__(self):
            super().__init__(daemon=True)
            self.listener = e2e.socket.create_server(("127.0.0.1", 0))
            self.says = b""
            self.held = []
            self.start()

        def run(self):
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = self.listener.accept()
                    self.held.append(sock)
                    sock.recv(65536)
                    sock.sendall(self.says)

    speaker = Speaker()
    lab.held += [speaker.listener]
    tinyauth = lab.tinyauth(upstream=f"127.0.0.1:{speaker.listener.getsockname()[1]}")
    client = tinyauth.connect()
    for name, speaker.says in GARBAGE.items():
        answer = client.ask("GET", "/t/echo")
        same((answer.status, answer.closes), (502, False), f"answer to {name}")
    for name, body in {"a chunk": b"zz\r\n", "a chunk's end": b"1\r\nxyz", "a chunk's size": b"fffffffffffffffff\r\n"}.items():
        speaker.says = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n" + body
        client = tinyauth.connect()
        with is_cut(client):
            client.ask("GET", "/t/echo")
    lab.held += speaker.held


def test_upstream_that_never_stops(lab):
    """An answer without end costs no memory while its client is slow, and ends with the client; so do endless 1xx."""
    tinyauth, model = lab.pair()
    base = tinyauth.memory()
    client = guest(tinyauth, "127.0.0.1", rcvbuf=16384)
    client.send(request("GET", "/t/chunked/1000000000000"))
    client.head()
    for _ in range(200):
        client.take(1 << 16)
    assert tinyauth.memory() - base < 1 << 20, f"{tinyauth.memory() - base} bytes more for one stream"
    client.close()
    model.wait("close")
    same(tinyauth.ask("GET", "/t/100?n=100000").status, 502, "endless interim answers")


@alone
def test_upstream_killed_and_restarted_under_load(lab):
    """While the upstream is away there are 502s and nobody hangs; when it is back everything is served again."""
    model = lab.model()
    tinyauth = lab.tinyauth(upstream=model.name, workers=2)
    base = descriptors(tinyauth.workers())
    with under_load(tinyauth.address, clients=4, kinds=KINDS) as load:
        for _ in range(3):
            whole = load.whole
            until(lambda: load.whole > whole + 30, "answers while the model runs", 10)
            model.stop()
            same(tinyauth.ask("GET", "/t/echo").status, 502, "while the model is away")
            refused = load.refused
            until(lambda: load.refused > refused + 10, "502s while the model is away", 10)
            check_upstream(model)
            model.log.unlink()
            model.__init__(model.log.parent, "--port", str(model.port))
            same(tinyauth.ask("GET", "/t/echo").status, 200, "the first request after the restart")
    check_settled(tinyauth, base, 40)


# Processes

EVENTS_OF_DEATH = r"event=worker_died worker=\d+ pid=\d+ signal=9"


@alone
def test_workers_killed_under_load(lab):
    """Workers killed at random are replaced: no wrong answer, nothing unauthenticated upstream, no count kept."""
    tinyauth, model = lab.pair("--ip-conns", "40", workers=3)
    tinyauth.expect(EVENTS_OF_DEATH)
    base, dice, killed = descriptors(tinyauth.workers()), random.Random(1), 0
    with under_load(tinyauth.address, kinds=KINDS) as load:
        end = time.monotonic() + KILL_SECONDS
        while time.monotonic() < end:
            time.sleep(dice.uniform(0.05, 0.6))
            with contextlib.suppress(IndexError, ProcessLookupError):
                os.kill(dice.choice(tinyauth.workers()), signal.SIGKILL)
                killed += 1
    assert load.whole > 20 * KILL_SECONDS and killed > 2, f"only {load.whole} whole answers, {killed} killed"
    until(lambda: len(tinyauth.workers()) == 3, "three workers again")
    until(lambda: len(tinyauth.events("worker_died")) == killed, f"{killed} event=worker_died")
    check_upstream(model)
    check_settled(tinyauth, base, 40)


@alone
def test_supervisor_killed_under_load(lab):
    """After the supervisor's death its workers end what runs and go, and the port is free for a new start."""
    listen = "127.0.0.1:0"
    model = lab.model()
    for _ in range(3):
        tinyauth = lab.tinyauth(upstream=model.name, workers=2, listen=listen)
        listen, workers = tinyauth.name, tinyauth.workers()
        tinyauth.status = -signal.SIGKILL
        with under_load(tinyauth.address, clients=4) as load:
            until(lambda: load.whole > 40, "answers under load", 10)
            tinyauth.signal(signal.SIGKILL)
            tinyauth.process.wait()
            until(lambda: connects(tinyauth.address) is None, "end of the listeners", 2)
            following = lab.tinyauth(upstream=model.name, listen=listen)
            same(following.ask("GET", "/t/echo").status, 200, "the next start")
            whole = load.whole
            until(lambda: load.whole > whole + 40, "answers of the next start", 10)
        until(lambda: not any(map(alive, workers)), "end of the workers", 10)
        same(following.stop(), [], "problems of the next start")
        lab.things.remove(following)
    check_upstream(model)


@alone
def test_reloads_under_load(lab):
    """The keys are read again ten times a second, by HUP and by change of the file: no request fails, also with new keys."""
    tinyauth, model = lab.pair(workers=2)
    workers = tinyauth.workers()
    load = Mixed(tinyauth.address, clients=4)
    began = time.monotonic()
    for i in range(50):
        fresh = f"{ALICE}-{i}"
        lab.write(tinyauth.keys, KEYS + f"new{i} {fresh}\n" * (i % 2 == 0))
        if i % 10 != 9:
            tinyauth.signal(signal.SIGHUP)
        time.sleep(max(0.0, began + (i + 1) * 0.1 - time.monotonic()))
    same(load.stop(), [], "problems of clients")
    same(load.failures, [], "failed requests")
    assert load.whole > 200, f"only {load.whole} whole answers"
    lab.write(tinyauth.keys, KEYS + f"last {ALICE}-last\n")
    until(lambda: tinyauth.ask("GET", "/t/echo", key=f"{ALICE}-last").status == 200, "the last keys, without a signal")
    same(tinyauth.workers(), workers, "workers")
    check_upstream(model)


# Time

def clock_binary(lab):
    """tinyauth built with a wall clock that jumps by hours at every look."""
    flags = ROOT / "build" / "flags"
    if not flags.exists():
        raise Skip("build/flags is not there: run make first")
    compiler, *rest = shlex.split(flags.read_text())
    if not shutil.which(compiler):
        raise Skip(f"no {compiler}")
    out = lab.path("tinyauth-clock")
    done = subprocess.run([compiler, "-Wno-unused-function", "-o", out, str(HERE / "clock.c"), *rest], cwd=ROOT, text=True,
                          capture_output=True)
    same(done.returncode, 0, f"build with another clock ({done.stderr[:300]})")
    return out


def test_clock_set_back_and_forth(lab):
    """With a wall clock that jumps by hours, deadlines and rates are as always: only the monotonic clock drives them."""
    tinyauth = lab.tinyauth("--header-timeout", "500ms", "--ip-burst", "4", "--idle-timeout", "30s", ip_rate="5/s",
                            binary=clock_binary(lab))
    stream = Stream(tinyauth.connect(), 30, 20)
    began = time.monotonic()
    silent = guest(tinyauth, "127.0.0.2")
    assert ends(silent) and 0.45 < time.monotonic() - began < 2, f"header time-out after {time.monotonic() - began:.2f} s"
    client = guest(tinyauth, "127.0.0.3")
    statuses = [client.ask("GET", "/t/echo").status for _ in range(8)]
    same((statuses[:5], 429 in statuses[5:]), ([200] * 5, True), f"a burst of 4 and one more, then 429: {statuses}")
    until(lambda: client.ask("GET", "/t/echo").status == 200, "the rate's next request", 2)
    assert stream.whole(), f"the stream was cut: {stream.error}"
    hours = {record["time"][:13] for record in tinyauth.records() if "time" in record}
    assert len(hours) > 1, f"the wall clock did not jump: {hours}"
    assert all(float(record["ms"]) < 10000 for record in tinyauth.access(8)), "durations come from the wall clock"


# System calls that fail

def can_trace():
    try:
        return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def failing(lab, pids, calls, error, when):
    """System calls of running processes fail meanwhile; yields the file that has a line for each."""
    if not can_trace():
        raise Skip("no strace, or it may not trace here")
    trace = lab.path("trace")
    command = ["strace", "-f", "-o", trace, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}"]
    process = Started.popen([*command, *(f"--attach={pid}" for pid in pids)], stderr=subprocess.PIPE)
    for _ in pids:
        line = process.stderr.readline()
        assert b"attached" in line, f"strace says {line!r}"
    try:
        yield trace
    finally:
        process.terminate()
        process.wait(5)
        process.stderr.close()


def injected(trace):
    return Path(trace).read_text().count("(INJECTED)")


NETWORK = "EINTR EAGAIN ECONNRESET ENOMEM ETIMEDOUT EHOSTUNREACH"
FAULTS = {
    "accept4": ("2+3", "EINTR EAGAIN ECONNABORTED EMFILE ENFILE ENOBUFS ENOMEM EPROTO EPERM ENETDOWN"),
    "recvfrom": ("5+7", NETWORK + " ECONNREFUSED ENOBUFS EIO"),
    "sendto": ("3+7", NETWORK + " EPIPE ENOBUFS EACCES"),
    "connect": ("2+3", "EINTR EAGAIN ECONNREFUSED ETIMEDOUT ENETUNREACH EADDRNOTAVAIL EACCES EPERM"),
    "socket": ("2+3", "EMFILE ENFILE ENOBUFS ENOMEM EACCES EAFNOSUPPORT"),
    "?poll,?ppoll": ("3+5", "EINTR ENOMEM EINVAL"),
    "write": ("2+2", "EINTR EAGAIN ENOSPC EIO EDQUOT EFBIG EPIPE"),
    "shutdown": ("1+2", "ENOTCONN ENOBUFS"),
    "setsockopt": ("1+2", "ENOMEM ENOBUFS EINVAL"),
}
EPOLL_FAULTS = {"epoll_ctl": ("3+5", "ENOMEM ENOSPC"), "?epoll_wait,?epoll_pwait": ("2+3", "EINTR")}
FAULT_LINES = ["event=accept_paused", r"event=log_dropped lines=\d+", "event=turned_away"]


def one_fault(lab, tinyauth, calls, error, when):
    """Mixed requests while a system call of the workers fails, and what must hold then and afterwards."""
    what = f"{calls} {error}"
    with failing(lab, tinyauth.workers(), calls, error, when) as trace:
        load = Mixed(tinyauth.address, clients=4, rounds=14, seed=what, patience=4)
        problems = load.join(25)
    problems += [f"{what}: it was never called"] * (injected(trace) == 0)
    same(problems, [], f"problems of clients with {what}")
    assert load.whole > 0, f"{what}: no whole answer at all, but {load.refused} refused, {load.cut} cut"


def fault_test(calls, faults):
    def test(lab):
        tinyauth, model = lab.pair("--ip-conns", "40", "--log", lab.path("log"), workers=2, log=lab.path("log"))
        base = descriptors(tinyauth.workers())
        for error in faults[1].split():
            one_fault(lab, tinyauth, calls, error, faults[0])
            try:
                check_settled(tinyauth, base, 40)
            except AssertionError as problem:
                raise AssertionError(f"after {calls} {error}: {problem}") from None
        check_upstream(model)
        lines = Path(lab.path("log")).read_bytes().splitlines()
        strange = [line for line in lines if not tinyauth.is_expected(line) and not any(
            re.search(known, line.decode()) for known in FAULT_LINES)]
        same(strange[:3], [], "unknown lines in the log")
    name = re.findall(r"\w+", calls)[0]
    test.__name__ = f"test_fault_{name}"
    test.__doc__ = f"{name} failing with each errno hurts requests only: no wrong answer, no leak, nothing past the key."
    return alone(test)


for _calls, _faults in FAULTS.items():
    globals()[f"test_fault_{re.findall(r'[a-z0-9_]+', _calls)[0]}"] = fault_test(_calls, _faults)


@alone
def test_fault_epoll(lab):
    """The epoll set failing under many connections hurts only those it fails for: they end, none hangs."""
    for calls, (when, errors) in EPOLL_FAULTS.items():
        for error in errors.split():
            tinyauth, model = lab.pair("--ip-conns", "300")
            tinyauth.expect("event=accept_paused")
            base = descriptors(tinyauth.workers())
            with failing(lab, tinyauth.workers(), calls, error, when) as trace:
                idle = [Guest(tinyauth.address) for _ in range(60)]
                load = Mixed(tinyauth.address, clients=4, rounds=20, seed=error, patience=4)
                problems = load.join(25)
            for client in idle:
                client.close()
            assert injected(trace) > 0, f"{calls} was never called"
            same(problems, [], f"problems of clients with {calls} {error}")
            check_upstream(model)
            check_settled(tinyauth, base, 100)


@alone
def test_fault_fork(lab):
    """A fork that fails with each errno is tried again until the worker is there; others serve meanwhile."""
    tinyauth = lab.tinyauth(workers=2)
    for expected in (EVENTS_OF_DEATH, "event=worker_missing"):
        tinyauth.expect(expected)
    for count, error in enumerate(("EAGAIN", "ENOMEM"), 1):
        with failing(lab, [tinyauth.pid], "?fork,?vfork,?clone", error, "1..2"):
            os.kill(tinyauth.workers()[0], signal.SIGKILL)
            until(lambda: len(tinyauth.events("worker_missing")) >= count, "event=worker_missing")
            same(tinyauth.ask("GET", "/t/echo").status, 200, "meanwhile")
            until(lambda: len(tinyauth.workers()) == 2, "the second worker again")


@alone
def test_fault_fork_of_a_generation(lab):
    """When no new worker can be started for more keys than the old ones have room for, these serve on until one can."""
    tinyauth = lab.tinyauth(workers=2)
    tinyauth.expect("event=worker_missing")
    with failing(lab, [tinyauth.pid], "?fork,?vfork,?clone", "EAGAIN", "1..10"):
        tinyauth.publish(KEYS + "".join(f"more{n} {ALICE}-{n}\n" for n in range(110000)))
        until(lambda: tinyauth.events("worker_missing"), "event=worker_missing")
        for _ in range(10):
            client = tinyauth.connect()
            client.sock.settimeout(2)
            same(client.ask("GET", "/t/echo").status, 200, "meanwhile")
        until(lambda: tinyauth.ask("GET", "/t/echo", key=f"{ALICE}-109999").status == 200, "a new worker with the new keys", 15)


@alone
def test_fault_in_an_upgrade(lab):
    """An upgrade that fails half-way leaves a server that goes on, also with workers that are started later."""
    for calls, error, when in (("fcntl", "EMFILE", "1"), ("fcntl", "EMFILE", "2"), ("?dup2,?dup3", "EMFILE", "1"), ("?pipe,?pipe2", "EMFILE", "1"),
                               ("execve", "EACCES", "1")):
        tinyauth = lab.tinyauth()
        tinyauth.expect("event=(worker_died|upgrade_refused|upgrade)")
        with failing(lab, [tinyauth.pid], calls, error, when) as trace:
            tinyauth.signal(signal.SIGUSR2)
            until(lambda: injected(trace) and (tinyauth.events("upgrade_refused") or len(tinyauth.events("ready")) > 1), "its end")
        same(tinyauth.ask("GET", "/t/echo").status, 200, f"after {calls} {error}")
        os.kill(tinyauth.workers()[0], signal.SIGKILL)
        until(lambda: tinyauth.events("worker_died"), "the worker's end")
        until(lambda: tinyauth.ask("GET", "/t/echo").status == 200, f"a new worker's answer after {calls} {error}")


RELOAD_FAULTS = {"?open,?openat": "EMFILE ENFILE ENOENT EACCES EIO ENOMEM", "read": "EIO", "?fstat,?newfstatat": "EIO",
                 "mmap": "ENOMEM", "ppoll": "EINTR"}


@alone
def test_fault_while_keys_are_read(lab):
    """Whatever fails while the keys are read again, the old ones stay, nothing dies, and the next look brings the new ones."""
    problems = []
    for calls, errors in RELOAD_FAULTS.items():
        for error in errors.split():
            tinyauth = lab.tinyauth()
            for expected in ("event=keys_refused", r"keys: "):
                tinyauth.expect(expected)
            fresh = f"{ALICE}-{len(calls)}-{error}"
            with failing(lab, [tinyauth.pid], calls, error, "1+1" if calls != "ppoll" else "1..20") as trace:
                lab.write(tinyauth.keys, KEYS + f"fresh {fresh}\n")
                tinyauth.signal(signal.SIGHUP)
                with contextlib.suppress(AssertionError):
                    until(lambda: tinyauth.events("keys_refused"), "event=keys_refused", 1.2)
            assert injected(trace) > 0, f"{calls} was never called"
            if not alive(tinyauth.pid):
                problems.append(f"{calls} {error}: tinyauth died ({tinyauth.text().splitlines()[-1:]})")
                tinyauth.status = tinyauth.process.wait()
                continue
            same(tinyauth.ask("GET", "/t/echo").status, 200, f"an old key after {calls} {error}")
            tinyauth.signal(signal.SIGHUP)
            until(lambda: tinyauth.ask("GET", "/t/echo", key=fresh).status == 200, f"the new key after {calls} {error}")
    same(problems, [], "problems")


@alone
def test_fault_in_a_new_worker(lab):
    """A worker that fails while it starts is started again until one stands; the others serve meanwhile."""
    tinyauth = lab.tinyauth(workers=2)
    for expected in ("event=worker_died", "tinyauth: "):
        tinyauth.expect(expected)
    for calls, error in (("mmap", "ENOMEM"), ("epoll_create1", "EMFILE"), ("getrandom", "EIO"), ("mprotect", "ENOMEM")):
        with failing(lab, [tinyauth.pid], calls, error, "1+1") as trace:
            os.kill(tinyauth.workers()[0], signal.SIGKILL)
            until(lambda: injected(trace), f"{calls} in a new worker")
            same(tinyauth.ask("GET", "/t/echo").status, 200, f"while {calls} fails")
        until(lambda: len(tinyauth.workers()) == 2, "the second worker again")
        same({tinyauth.ask("GET", "/t/echo").status for _ in range(10)}, {200}, f"after {calls} {error}")


START_FAULTS = {"mmap": "ENOMEM", "?fork,?clone": "EAGAIN", "socket": "EMFILE EAFNOSUPPORT", "bind": "EADDRINUSE EACCES",
                "listen": "EADDRINUSE", "?open,?openat": "EMFILE EACCES", "memfd_create": "ENOSYS ENOMEM",
                "ftruncate": "ENOSPC", "epoll_create1": "EMFILE ENOSYS", "socketpair": "EMFILE", "getrandom": "EIO"}


def starts_or_says_why(lab, calls, error, number):
    """A start whose n-th such call fails either serves or ends with a line that says why. False: there is no n-th call."""
    trace, keys = lab.path("trace"), lab.path("keys")
    lab.write(keys, KEYS)
    process = Started.popen(["strace", "-o", trace, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={number}",
                             lab.binary, "-l", "127.0.0.1:0", "-u", lab.shared.name, "-k", keys, "-w", "1"],
                            stderr=subprocess.PIPE, env=e2e.environment())
    said = b""
    try:
        while b"event=ready" not in said and (line := process.stderr.readline()):
            said += line
        if b"event=ready" in said:
            port = int(re.search(rb"addr=127\.0\.0\.1:(\d+)", said)[1])
            same(Guest(("127.0.0.1", port)).ask("GET", "/t/echo").status, 200, f"{calls} {error} {number}: a request")
        else:
            status = process.wait(5)
            why = said.startswith(b"tinyauth: ") or b"keys: " in said
            assert status > 0 and why, f"{calls} {error} {number}: {status}, {said!r}"
    finally:
        for pid in e2e.children(process.pid):
            os.kill(pid, signal.SIGTERM)
        process.wait(5)
        process.stderr.close()
    return injected(trace) > 0


@alone
def test_fault_at_start(lab):
    """Whatever fails at start, tinyauth serves all the same or ends and says why."""
    if not can_trace():
        raise Skip("no strace, or it may not trace here")
    problems = []
    for calls, errors in START_FAULTS.items():
        for error in errors.split():
            for number in range(1, 6):
                try:
                    if not starts_or_says_why(lab, calls, error, number):
                        break
                except (AssertionError, Cut, OSError, subprocess.TimeoutExpired) as problem:
                    problems.append(f"{calls} {error} number {number}: {problem!r}")
    same(problems, [], "problems")


KEY_FAULTS = {"write": "ENOSPC EIO EDQUOT EFBIG", "fsync": "EIO ENOSPC", "rename": "EACCES ENOSPC EIO EROFS EXDEV",
              "?open,?openat": "EACCES EMFILE ENOSPC EROFS", "fchown": "EPERM", "fchmod": "EPERM", "flock": "ENOLCK",
              "mmap": "ENOMEM", "read": "EIO"}


def one_key_fault(lab, words, calls, error, number):
    """A key command whose n-th such call fails. False: there is no n-th call."""
    place = Path(lab.path("place"))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    keys, trace = place / "keys", lab.path("trace")
    keys.write_text(KEYS)
    keys.chmod(0o600)
    done = subprocess.run(["strace", "-o", trace, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={number}",
                           lab.binary, "key", *words], env=e2e.environment(TINYAUTH_KEYS=str(keys)), capture_output=True,
                          timeout=10)
    what = f"key {words[0]}, {calls} {error} number {number}"
    same(sorted(entry.name for entry in place.iterdir()), ["keys"], f"files after {what}")
    if done.returncode != 0:
        same(keys.read_text(), KEYS, f"keys file after {what}")
        assert done.stderr, f"{what}: not a word"
    else:
        assert keys.read_text() != KEYS, f"{what}: success, and nothing changed"
    return injected(trace) > 0


@alone
def test_fault_in_key_commands(lab):
    """Whatever fails in a key command, the keys file changes as a whole or not at all, and no temporary file stays."""
    if not can_trace():
        raise Skip("no strace, or it may not trace here")
    problems = []
    for words in (("add", "dave"), ("rotate", "bob"), ("rm", "carol")):
        for calls, errors in KEY_FAULTS.items():
            for error in errors.split():
                for number in range(1, 5):
                    try:
                        if not one_key_fault(lab, words, calls, error, number):
                            break
                    except AssertionError as problem:
                        problems.append(str(problem))
    same(problems, [], "problems")


def test_key_command_on_a_full_disk(lab):
    """On a full disk a key command fails, the keys file is as before, and no temporary file stays."""
    with small_disk(lab, "16k") as place:
        keys = Path(place) / "keys"
        keys.write_text(KEYS + "# " + "x" * 9000 + "\n")
        keys.chmod(0o600)
        before = keys.read_text()
        lab.run("key", "add", "dave", status=1, TINYAUTH_KEYS=str(keys))
        same((keys.read_text() == before, os.listdir(place)), (True, ["keys"]), "keys file and directory")


# The run

def run_all(run, tests):
    waiting = [test for test in tests if getattr(test, "slow", False)]
    single = [test for test in tests if getattr(test, "alone", False)]
    with concurrent.futures.ThreadPoolExecutor(max(1, len(waiting))) as beside:
        slow_ones = [beside.submit(run.one, test) for test in waiting]
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            list(pool.map(run.one, [test for test in tests if test not in waiting and test not in single]))
        for test in single:
            run.one(test)
        for done in slow_ones:
            done.result()


def main():
    global KILL_SECONDS
    parser = argparse.ArgumentParser(description="fault tests of tinyauth")
    parser.add_argument("--tinyauth", metavar="BIN", default=ROOT / "tinyauth")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--seconds", type=int, default=KILL_SECONDS)
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="")
    options = parser.parse_args()
    KILL_SECONDS = options.seconds
    tests = [test for name, test in globals().items() if name.startswith("test_") and options.pattern in name]
    run = Run(str(Path(options.tinyauth).resolve()), options.verbose)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: run.abort(f"stopped by signal {number}"))
    watchdog = threading.Timer(WATCHDOG + KILL_SECONDS - 15, run.abort, ["not done in time"])
    watchdog.daemon = True
    watchdog.start()
    run_all(run, tests)
    run.end()
    return 1 if run.failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
