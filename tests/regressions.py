#!/usr/bin/env python3
"""Regression tests: what attacks on tinyauth once found, each kept from coming back.

    python3 tests/regressions.py [--tinyauth BIN] [-v] [--no-measure] [--tls] [PATTERN]

The harness, the way tests run and the last line are those of tests/e2e.py.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import socket
import statistics
import struct
import sys
import termios
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
from e2e import (ALICE, BOB, KEYS, UPGRADE, WRONG, Client, Cut, Load, Skip, Stream, alive, connect_to, frozen,  # noqa: E402
                 is_cut, main, many_keys, measured, request, same, stands_still, until)
from model import BLOCK, pattern  # noqa: E402


class Upstream:
    """A model server of one test: `serve` gets each connection, in a thread of its own."""

    def __init__(self, lab, serve):
        self.serve = serve
        self.socks = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()
        lab.things.append(self)

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                sock.settimeout(10)
                self.socks.append(sock)
                threading.Thread(target=self.run, args=(sock,), daemon=True).start()

    def run(self, sock):
        with contextlib.suppress(OSError):
            self.serve(sock)

    def stop(self):
        for sock in [self.listener, *self.socks]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def read_head(sock):
    head = b""
    while b"\r\n\r\n" not in head:
        data = sock.recv(1 << 16)
        if not data:
            raise OSError("gone")
        head += data
    return head


def limited(lab, soft, hard):
    """The binary under these limits of open files."""
    return lab.program(lab.path("limited"), f'ulimit -S -n {soft} && ulimit -H -n {hard} && exec {shlex.quote(lab.binary)} "$@"')


def ticks(pid):
    """The processor time of a process so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# Bodies

class Slow(Client):
    """A client that takes a little at a time."""

    def fill(self):
        time.sleep(0.0005)
        data = self.sock.recv(6000)
        if not data:
            raise Cut("eof")
        self.buffer += data


def test_chunks_of_ours_stay_exact_when_writes_block(lab):
    """A close-delimited answer for an HTTP/1.1 client with a 4 KB window that reads slowly: every chunk is exact."""
    tinyauth = lab.tinyauth()
    client = Slow(tinyauth.address, rcvbuf=4096)
    tinyauth.clients.append(client)
    answer = client.ask("GET", "/t/close/3000000")
    same((answer.status, answer.chunked), (200, True), "answer")
    assert answer.body == pattern(3000000), "other bytes"


BROKEN_CHUNKS = (b"\n\r\n", b"\r\n", b"\n", b"0x1\r\n", b"g\r\n", b" 1\r\n", b"1 \r\nx\r\n", b"1\nx\r\n", b"1\r\nxx\r\n",
                 b"1\r\nx\n\r\n", b"0\n\r\n", b"0\r\n\n", b"1;\nx\r\n")


def test_broken_body_is_never_taken_up_again(lab):
    """A broken chunk in one write with its head, or in two: one refusal, the end, and what follows is not answered."""
    tinyauth, model = lab.pair()
    follows = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" + request("GET", "/t/echo?smuggled")
    for key, status in ((ALICE, 400), (WRONG, 401)):
        head = request("POST", "/t/sink", "Transfer-Encoding: chunked", key=key)
        for broken in BROKEN_CHUNKS:
            for cut in (0, len(head), len(head) + 1, len(head + broken)):
                raw = head + broken + follows
                client = tinyauth.connect()
                client.send(raw[:cut])
                if cut:
                    time.sleep(0.002)       # mostly enough to be read by itself
                client.send(raw[cut:])
                what = f"{broken!r} cut at {cut - len(head)}"
                answer = client.read()
                same((answer.status, answer.closes), (status, True), f"answer to {what}")
                same(client.end(), "eof", f"end after {what}")
                client.close()
    same([target for _, _, target in model.requests() if "smuggled" in target], [], "requests behind a broken body")
    same(model.events("body"), [], "whole bodies")


def test_unasked_bytes_are_no_answer(lab):
    """Bytes from upstream while our own answers are blocked never become the answer to a later request."""
    answered = []

    def serve(sock):
        while read_head(sock):
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            answered.append(sock)
    upstream = Upstream(lab, serve)
    tinyauth = lab.tinyauth(upstream=upstream.name, log=lab.path("log"))
    client = tinyauth.connect(rcvbuf=4096)
    refused, groups = 60, 300
    text = (request("GET", "/refused", key=None) * refused + request("GET", "/asked")) * groups
    writer = threading.Thread(target=client.send, args=(text,), daemon=True)
    writer.start()
    count = stands_still(lambda: len(answered), "requests upstream")
    assert 0 < count < groups, f"{count} of {groups} requests went upstream before the client read"
    with contextlib.suppress(ConnectionError):      # which is over when the next request was read
        answered[-1].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nUNASKED")
    bodies = []
    for _ in range(groups):
        same({client.read().status for _ in range(refused)}, {401}, "statuses of the refused")
        bodies.append(client.read().body)
    writer.join(5)
    same(set(bodies), {b"ok"}, "bodies of the others")


# Others

def median_ms(client, count):
    """The median of the client's latency over so many requests."""
    took = []
    for _ in range(count):
        began = time.monotonic()
        same(client.ask("GET", "/t/echo").status, 200, "status")
        took.append((time.monotonic() - began) * 1000)
    return statistics.median(took)


@contextlib.contextmanager
def flood(tinyauth, text, count):
    """One connection on which `text` is pipelined all the time, and its answers are thrown away."""
    client = tinyauth.connect()
    stopping = False

    def write():
        with contextlib.suppress(OSError):
            while not stopping:
                client.send(text * count)

    def read():
        with contextlib.suppress(OSError):
            while client.sock.recv(1 << 20):
                pass
    threads = [threading.Thread(target=run, daemon=True) for run in (write, read)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping = True
        getattr(client.sock, "raw", client.sock).shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)


@measured
def test_pipelining_does_not_hold_up_others(lab):
    """While one connection pipelines /health, or requests without a key, another's latency stays within a few times."""
    tinyauth = lab.tinyauth(log=lab.path("log"))
    client = tinyauth.connect()
    quiet = median_ms(client, 200)
    for text in (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", request("GET", "/t/echo", key=None)):
        with flood(tinyauth, text, 5000):
            loud = min(median_ms(client, 50) for _ in range(3))
        assert loud < 20 * quiet, f"median {loud:.2f} ms beside {text[:11]!r}, {quiet:.2f} ms in the quiet"


def test_soft_limit_of_open_files_is_raised(lab):
    """Started with a low soft limit of open files and a higher hard one, it serves as many clients as it was told to."""
    tinyauth = lab.tinyauth("-n", "100", binary=limited(lab, 40, 1024))
    clients = [tinyauth.connect() for _ in range(60)]
    same({client.ask("GET", "/t/echo").status for client in clients}, {200}, "statuses")


def check_served(tinyauth, silent):
    """Clients with a key are served at once beside so many silent connections, which come all together."""
    with frozen(tinyauth.workers()):
        for _ in range(silent):
            tinyauth.connect(silent=True)
    for _ in range(3):
        client = tinyauth.connect()
        client.sock.settimeout(1)
        same(client.ask("GET", "/t/echo").status, 200, f"status beside {silent} silent connections")


def test_fewer_connections_than_the_hard_limit(lab):
    """Silent connections that stay below the hard limit of open files do not hold up the worker."""
    check_served(lab.tinyauth(binary=limited(lab, 64, 64)), 35)


def test_silent_connections_give_way(lab):
    """More silent connections than the hard limit of open files allows give way to a client with a key."""
    check_served(lab.tinyauth(binary=limited(lab, 64, 64)), 60)


def test_ip_conns_count_across_workers(lab):
    """--ip-conns holds for both workers together, and a killed worker's connections are given back."""
    tinyauth = lab.tinyauth("--ip-conns", "4", workers=2)
    tinyauth.expect(r"event=(worker_died .*signal=|turned_away .*reason=ip_conns)")
    victim, other = tinyauth.workers()
    kept = [connect_to(tinyauth, worker) for worker in (victim, victim, other, other)]
    same(tinyauth.ask("GET", "/t/echo").status, 429, "one more")
    os.kill(victim, signal.SIGKILL)
    tinyauth.wait_event("worker_started", 3)
    for worker in tinyauth.workers():
        kept.append(connect_to(tinyauth, worker))
    same(tinyauth.ask("GET", "/t/echo").status, 429, "one more after the kill")
    same([kept[i].ask("GET", "/t/echo").status for i in (2, 3, 4, 5)], [200] * 4, "those that stayed or came")


# WebSocket

def send_until_full(sock):
    """Send until nothing more goes for 0.2 s; what was sent."""
    sent = bytearray()
    sock.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        while len(sent) < 64 << 20:
            piece = BLOCK[:20000]
            sent += piece[:sock.send(piece)]
    return bytes(sent)


def unacknowledged(sock):
    """Bytes that have not reached the peer yet."""
    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]


def test_last_words_of_a_tunnel_arrive(lab):
    """The upstream of a WebSocket says its last words and closes while the client still writes: all of them arrive."""
    tunnels = []

    def serve(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        read_head(sock)
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        tunnels.append(sock)
    tinyauth = lab.tinyauth(upstream=Upstream(lab, serve).name)
    client = tinyauth.connect(rcvbuf=1 << 14)
    same(client.ask("GET", "/", *UPGRADE).status, 101, "status")
    upstream, = until(lambda: tunnels, "tunnel")
    words = send_until_full(upstream)
    got = bytearray()
    while unacknowledged(upstream):
        got += client.take(1 << 16)
    upstream.close()
    assert len(got) < len(words), "nothing is left on the way"
    for _ in range(10):
        client.send(b"and more")
        time.sleep(0.002)                   # the upstream's reset comes between them
    for piece in client.exactly(len(words) - len(got)):
        got += piece
    assert got == words, "other last words"


def test_idle_tunnel_is_logged_as_idle(lab):
    """A tunnel that stands still for the idle time-out ends, and its access line says so."""
    tinyauth = lab.tinyauth("--idle-timeout", "300ms")
    client = tinyauth.connect()
    same(client.ask("GET", "/t/ws", *UPGRADE).status, 101, "status")
    assert client.end(), "an end"
    record, = tinyauth.access()
    same((record["status"], record["reason"]), ("101", "idle"), "access line")


# Drain

def drained_stream(lab, *options):
    """A stream to an HTTP/1.0 client, which only its connection's end frames, on a server that was told to stop."""
    tinyauth = lab.tinyauth(*options)
    client = tinyauth.connect()
    client.send(request("POST", "/api/generate", version="1.0", body=b'{"events": 1000, "gap_ms": 20}'))
    same(client.head().status, 200, "status")
    tinyauth.signal(signal.SIGTERM)
    tinyauth.wait_event("draining")
    return tinyauth, client


def check_drained(tinyauth, client):
    with is_cut(client):
        for _ in client.body():
            pass
    same(tinyauth.wait_exit(), 0, "exit status")
    same([record["reason"] for record in tinyauth.access()], ["drain"], "logged reasons")


def test_drain_timeout_resets_what_only_the_end_frames(lab):
    """Past --drain-timeout a close-delimited stream ends in a reset and is logged with reason=drain."""
    check_drained(*drained_stream(lab, "--drain-timeout", "300ms"))


def test_second_term_resets_what_only_the_end_frames(lab):
    """At a second TERM a close-delimited stream ends in a reset and is logged with reason=drain."""
    tinyauth, client = drained_stream(lab)
    tinyauth.signal(signal.SIGTERM)
    check_drained(tinyauth, client)


def test_a_worker_with_many_connections(lab):
    """Beyond the number from which all wait in the epoll set: new clients are served, words of the supervisor are
    heard, a drain closes the door, and nothing spins."""
    tinyauth = lab.tinyauth(log=lab.path("log"))
    worker, = tinyauth.workers()
    clients = [tinyauth.connect() for _ in range(40)]
    for client in clients * 2:
        same(client.ask("GET", "/t/echo").status, 200, "one of many")
    same(tinyauth.ask("GET", "/t/echo").status, 200, "a new connection beside them")
    os.rename(lab.path("log"), lab.path("log.1"))
    tinyauth.signal(signal.SIGUSR1)
    until(lambda: os.path.exists(lab.path("log")), "new log")
    until(lambda: clients[0].ask("GET", "/t/echo").status == 200 and "/t/echo" in Path(lab.path("log")).read_text(),
          "an access line in it")
    stream = Stream(clients[1], 50, 20)
    before = ticks(worker)
    tinyauth.signal(signal.SIGTERM)
    tinyauth.wait_event("draining")
    for client in clients[2:]:
        same(client.ask("GET", "/t/echo").closes, True, "Connection: close while draining")
    try:
        tinyauth.connect()
        raise AssertionError("a new connection while draining")
    except ConnectionRefusedError:
        pass
    assert stream.whole(), f"stream: {stream.error}, {len(stream.seen)} events"
    used = (ticks(worker) - before) / os.sysconf("SC_CLK_TCK")
    assert used < 0.2, f"{used:.2f} s of processor time in a second of drain"


def test_a_drained_worker_with_many_connections_leaves_the_door(lab):
    """A worker of the generation before, with many connections, does not look at the listeners any more."""
    tinyauth = lab.tinyauth(log=lab.path("log"))
    old, = tinyauth.workers()
    clients = [tinyauth.connect() for _ in range(40)]
    for client in clients * 2:
        same(client.ask("GET", "/t/echo").status, 200, "one of many")
    tinyauth.publish(f"alice {ALICE}\n" + many_keys(120000, False))
    tinyauth.wait_event("worker_started", 2, 10)
    until(lambda: clients[0].ask("GET", "/t/echo").closes, "drain of the old worker")
    with frozen([pid for pid in tinyauth.workers() if pid != old]):
        waiting = socket.create_connection(tinyauth.address)
        before = ticks(old)
        same(clients[1].ask("GET", "/t/echo").closes, True, "Connection: close while draining")
        time.sleep(0.3)
        used = (ticks(old) - before) / os.sysconf("SC_CLK_TCK")
    assert used < 0.1, f"{used:.2f} s of processor time while somebody waits for the new worker"
    waiting.close()
    same(tinyauth.ask("GET", "/t/echo").status, 200, "by the new worker")


def test_drain_with_a_pending_respawn_does_not_spin(lab):
    """TERM while a dead worker waits for its successor: the supervisor sleeps while the last stream runs."""
    tinyauth = lab.tinyauth(workers=2)
    tinyauth.expect(r"event=worker_died .*signal=")
    victim, other = tinyauth.workers()
    client = connect_to(tinyauth, other)
    stream = Stream(client, 60, 20)
    with frozen([tinyauth.pid]):
        os.kill(victim, signal.SIGKILL)
        until(lambda: not alive(victim), "end of the worker")
        tinyauth.signal(signal.SIGTERM)
    tinyauth.wait_event("draining")
    before = ticks(tinyauth.pid)
    assert stream.whole(), f"stream: {stream.error}, {len(stream.seen)} events"
    used = (ticks(tinyauth.pid) - before) / os.sysconf("SC_CLK_TCK")
    assert used < 0.2, f"{used:.2f} s of processor time in 1.2 s of drain"


def test_stop_ends_though_the_keys_outgrow_their_table(lab):
    """TERM, then a keys file that needs a larger table: no new workers, and the end comes soon after the last stream,
    though its client keeps the connection."""
    tinyauth = lab.tinyauth(log=lab.path("log"))
    client = tinyauth.connect()
    stream = Stream(client, 80, 50)
    tinyauth.signal(signal.SIGTERM)
    tinyauth.wait_event("draining")
    tinyauth.publish(f"alice {ALICE}\n" + many_keys(120000, False))
    tinyauth.wait_event("keys_published", 1, 10)
    assert stream.whole(), f"stream: {stream.error}, {len(stream.seen)} events"
    same(tinyauth.wait_exit(15), 0, "exit status")
    same(len(tinyauth.events("worker_started")), 1, "workers ever started")


# Keys

def test_many_more_keys_refuse_nobody(lab):
    """The file grows from 2 to 120,001 keys: old keys are never refused, removed ones always, new ones never as unknown."""
    tinyauth = lab.tinyauth(workers=2, log=lab.path("log"), keys=f"alice {ALICE}\nbob {BOB}\n")
    removed, added = ([connect_to(tinyauth, worker) for worker in tinyauth.workers()] for _ in range(2))
    loads = [Load(tinyauth, 2), Load(tinyauth, 2, fresh=True)]
    tinyauth.publish(f"alice {ALICE}\n" + many_keys(120000, False))
    newest = "secret-119999-0123456789abcdef"
    for client in removed:
        status = client.ask("GET", "/t/echo", key=BOB).status
        assert status in (401, 503), f"a removed key on an old connection: {status}"
    for client in added:
        status = client.ask("GET", "/t/echo", key=newest).status
        assert status in (200, 503), f"a new key on an old connection: {status}"
    same([tinyauth.ask("GET", "/t/echo", key=key).status for key in (BOB, newest)], [401, 200], "on new connections")
    for load in loads:
        load.wait_done(load.done + 20)
    same([load.stop() for load in loads], [[], []], "failed requests with an old key")


def test_keys_file_that_is_no_file(lab):
    """A FIFO or a directory in place of the keys file is refused on reload: the old keys stay, a mended file is taken."""
    tinyauth = lab.tinyauth()
    tinyauth.expect("keys")
    for count, make in enumerate((os.mkfifo, os.mkdir), 1):
        os.rename(tinyauth.keys, lab.path("aside"))
        make(tinyauth.keys)
        tinyauth.signal(signal.SIGHUP)
        tinyauth.wait_event("keys_refused", count)
        same([tinyauth.ask("GET", "/", key=key).status for key in (ALICE, WRONG)], [200, 401], "the old keys")
        os.rename(tinyauth.keys, lab.path(f"odd{count}"))
        tinyauth.publish(KEYS + f"new{count} {WRONG}-{count}\n")
        same(tinyauth.ask("GET", "/", key=f"{WRONG}-{count}").status, 200, "the mended file")


def test_keys_file_that_breaks_during_an_upgrade(lab):
    """A keys file that breaks between the new binary's check and its start: it goes on with the keys it was handed."""
    binary = lab.program(lab.path("tinyauth"))
    tinyauth = lab.tinyauth(binary=binary)
    tinyauth.expect("keys")
    keys, real = shlex.quote(tinyauth.keys), shlex.quote(lab.binary)
    os.rename(lab.program(binary + ".new", f'[ "$1" = check ] || echo broken >{keys}\nexec {real} "$@"'), binary)
    tinyauth.signal(signal.SIGUSR2)
    until(lambda: tinyauth.events("ready")[1:] or tinyauth.process.poll() is not None, "the new binary")
    same(tinyauth.process.poll(), None, "exit status")
    same(Path(tinyauth.keys).read_text(), "broken\n", "the keys file")
    same([tinyauth.ask("GET", "/", key=key).status for key in (ALICE, WRONG)], [200, 401], "the old keys")
    tinyauth.publish(f"mia {WRONG}\n")
    same([tinyauth.ask("GET", "/", key=key).status for key in (ALICE, WRONG)], [401, 200], "the mended file")


@measured
def test_upgrade_whose_workers_do_not_start(lab):
    """USR2 to a binary that passes its check and whose workers die at once: the old ones serve on, until a better one comes."""
    binary = lab.program(lab.path("tinyauth"))
    tinyauth = lab.tinyauth(binary=binary, workers=2)
    tinyauth.expect("event=worker_died|cannot map")
    old = tinyauth.workers()
    real = shlex.quote(lab.binary)
    os.rename(lab.program(binary + ".new", f'[ "$1" = check ] || ulimit -v 40000\nexec {real} "$@"'), binary)
    tinyauth.signal(signal.SIGUSR2)
    tinyauth.wait_event("worker_died", 4)
    same({tinyauth.ask("GET", "/t/echo").status for _ in range(20)}, {200}, "answers meanwhile")
    assert set(old) <= set(tinyauth.workers()), "the old workers drained"


def test_upgrade_whose_check_hangs(lab):
    """A new binary that does not end its check is stopped, and the old one goes on: it replaces workers and hears TERM."""
    binary = lab.program(lab.path("tinyauth"))
    tinyauth = lab.tinyauth(binary=binary)
    tinyauth.expect("event=(worker_died|upgrade_refused)")
    os.rename(lab.program(binary + ".new", "exec sleep 100"), binary)
    tinyauth.signal(signal.SIGUSR2)
    tinyauth.wait_event("upgrade_refused", 1, 20)
    os.kill(tinyauth.workers()[0], signal.SIGKILL)
    until(lambda: tinyauth.ask("GET", "/t/echo").status == 200, "a new worker")


def test_stderr_that_nobody_reads(lab):
    """More words about a faulty keys file than stderr takes: they are left out, workers are replaced, and TERM ends it."""
    tinyauth = lab.tinyauth("--log", lab.path("log"), log=lab.path("log"))
    tinyauth.expect(".")
    tinyauth.reading.clear()
    for count in range(1, 60):
        lab.write(tinyauth.keys, "".join(f"name{n} {'x' * 40} no-attribute-{n}-{count}\n" for n in range(100)))
        tinyauth.signal(signal.SIGHUP)
        tinyauth.wait_event("keys_refused", count)
    os.kill(tinyauth.workers()[0], signal.SIGKILL)
    tinyauth.wait_event("worker_started", 2)
    same(tinyauth.ask("GET", "/t/echo").status, 200, "the new worker's answer")
    tinyauth.signal(signal.SIGTERM)
    same(tinyauth.process.wait(5), 0, "exit status")
    tinyauth.reading.set()


def secret_in(pids, secret):
    """Where a text stands in the memory of processes."""
    found = []
    for pid in pids:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
            for line in maps:
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
                if " rw" in line:
                    memory.seek(start)
                    with contextlib.suppress(OSError):
                        found += [f"{pid} {line.split()[-1]}"] if secret.encode() in memory.read(end - start) else []
    return found


@measured
def test_no_key_stays_in_memory(lab):
    """After requests with a key, pipelined ones, refused ones and half a one, no process holds the key's text."""
    if os.geteuid() != 0:
        raise Skip("only root reads another process's memory")
    secret = "sk-memory-0123456789abcdef-0123456789"
    one, refused = request(key=secret), request(key=secret).replace(b"Host:", b"Host :")
    padded = request("GET", "/t/echo", f"X-Padding: {'x' * 4000}", key=secret)
    tinyauth = lab.tinyauth(keys=f"alice {secret}\n")
    for text, statuses in ((one, [200]), (one * 400, [200] * 400), (request(key=secret + "x"), [401]), (padded + one, [200] * 2),
                           (refused, [400])):
        with contextlib.closing(tinyauth.connect()) as client:
            client.send(text[:-2])
            until(lambda: text == refused or secret_in(tinyauth.workers(), secret), "the last head in a buffer")
            client.send(text[-2:])
            same([client.read().status for _ in statuses], statuses, "statuses")
        pids = [tinyauth.process.pid, *tinyauth.workers()]
        same(secret_in(pids, secret), [], f"where the key still stands after {len(text)} bytes, statuses {set(statuses)}")
    closing = request("GET", "/t/echo", "Connection: close", key=secret)
    with contextlib.closing(tinyauth.connect()) as client:
        client.send(closing)
        same(client.read().status, 200, "status")
        client.send(one)                # while it lingers
        same(client.end() in ("eof", "reset"), True, "end")
    same(secret_in(pids, secret), [], "where the key stands after a request behind the last answer")
    limited = lab.tinyauth("--ip-conns", "1")
    limited.expect("event=turned_away")
    first, more = limited.connect(), limited.connect()
    with frozen(limited.workers()):
        third = limited.connect()
        third.send(one)
    same((first.ask("GET", "/t/echo").status, third.read().status), (200, 429), "statuses of the first and one too many")
    same(secret_in(limited.workers(), secret), [], "where the key stands after a refused connection")
    more.close()
    client = tinyauth.connect()
    client.send(one[:-2])
    until(lambda: secret_in(tinyauth.workers(), secret), "half a head in a buffer")
    client.close()
    until(lambda: not secret_in(pids, secret), "end of the half head")


NOT_OVER_TLS = {
}


if __name__ == "__main__":
    sys.exit(main(globals()))
