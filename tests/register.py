#!/usr/bin/env python3
"""The register of faults: what real machines, networks and name servers did to tinyauth once, each kept from coming back;
and what its workers hold.

    python3 tests/register.py [--tinyauth BIN] [-v] [PATTERN]

The harness is that of tests/e2e.py. Disks that are full, machines that vanish and name servers are made in mounts and
network namespaces of their own, so that it wants root, and strace, gdb, ip, setpriv, prlimit and unshare. What is missing here
is a failure. Tests marked @slow mostly wait, a minute and more, and run beside the others; the whole takes some two minutes.
The last line is `N passed, N failed`.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
from e2e import (ALICE, KEYS, UPGRADE, Client, Cut, Model, Run, Secure, Started, Stream, alone, check_error,  # noqa: E402
                 children, environment, frozen, many_keys, request, same, until)
from faults.run import descriptors, hold_stream, run_all, slow, small_disk  # noqa: E402
from minimal import Answering, Held, Inetd, Manager, Server, named, nameless, namespaces, ordinary  # noqa: E402
from regressions import Upstream, read_head  # noqa: E402
from secure import self_signed  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("strace", "gdb", "ip", "mount", "setpriv", "prlimit", "unshare")
WATCHDOG = 280
VANISHED = 80                       # seconds in which a vanished peer is known: a minute, and what a busy machine needs
SILENT = 70                         # seconds for which one that lives says nothing
PATIENT = ("--idle-timeout", "600s", "--first-byte-timeout", "600s", "--keepalive-timeout", "600s")


# Other machines

def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"


class Net:
    """A network namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = itertools.count()
    made = set()

    def __init__(self, lab):
        self.name = f"tinyauth-{os.getpid()}-{next(self.numbers)}"
        ip("netns", "add", self.name)
        self.made.add(self.name)
        lab.things.append(self)
        ip("-n", self.name, "link", "set", "lo", "up")

    def enter(self, path):
        with open(path) as file:
            assert self.libc.setns(file.fileno(), 0x40000000) == 0, f"setns: {os.strerror(ctypes.get_errno())}"

    @contextlib.contextmanager
    def inside(self):
        """What this thread opens and starts here is in the namespace, and stays there."""
        own = f"/proc/self/fd/{os.open('/proc/thread-self/ns/net', os.O_RDONLY)}"
        self.enter(f"/run/netns/{self.name}")
        try:
            yield
        finally:
            self.enter(own)
            os.close(int(own.rpartition("/")[2]))

    def stop(self):
        if self.name in self.made:
            self.made.discard(self.name)
            ip("netns", "del", self.name)


class Far(Net):
    """Another machine, at the other end of a cable."""

    def __init__(self, lab, home):
        super().__init__(lab)
        number = next(self.numbers)
        self.near, self.address, self.cable = f"198.18.{number}.1", f"198.18.{number}.2", f"cable{number}"
        ip("link", "add", self.cable, "netns", home.name, "type", "veth", "peer", "name", self.cable, "netns", self.name)
        for net, address in ((home, self.near), (self, self.address)):
            ip("-n", net.name, "address", "add", f"{address}/30", "dev", self.cable)
            ip("-n", net.name, "link", "set", self.cable, "up")

    def vanish(self):
        """Without a word: nothing of it is sent or answered any more."""
        ip("-n", self.name, "link", "set", self.cable, "down")


class Site(Upstream):
    """An upstream at an address of its own. `serve` gets the connection and the head of its request."""

    def __init__(self, lab, serve, host="127.0.0.1", port=0):
        self.asked, self.gone = [], {}
        self.say = serve
        self.socks = []
        self.listener = socket.create_server((host, port), backlog=64, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self.listener.getsockname()[1]
        self.name = f"{host}:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()
        lab.things.append(self)

    def serve(self, sock):
        sock.settimeout(300)
        head = read_head(sock)
        target = head.split(b" ")[1].decode()
        self.asked.append(target)
        try:
            self.say(sock, head, target)
        finally:
            self.gone[target] = time.monotonic()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
EVENTS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def ended(sock, seconds):
    """Waits so long for the peer's end."""
    sock.settimeout(seconds)
    try:
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def behave(sock, head, target):
    """Answers as the target says."""
    if target.startswith("/stream"):
        sock.sendall(EVENTS)
        while not ended(sock, 1):
            sock.sendall(b"6\r\nevent\n\r\n")
    elif target.startswith("/tunnel"):
        sock.sendall(SWITCHED)
        sock.settimeout(300)
        while data := sock.recv(1 << 16):
            sock.sendall(data)
    elif target.startswith("/silent"):
        ended(sock, 300)
    elif target.startswith("/late"):
        if not ended(sock, SILENT):
            sock.sendall(OK)
    elif target.startswith("/reads-late"):
        time.sleep(SILENT)
        length = int(re.search(rb"Content-Length: (\d+)", head)[1]) - len(head.partition(b"\r\n\r\n")[2])
        while length > 0 and (data := sock.recv(1 << 18)):
            length -= len(data)
        if length == 0:
            sock.sendall(OK)
    else:
        sock.sendall(OK)


def begin(tinyauth, net, target, *fields, method="GET", **more):
    """A request from that machine, whose answer is not read yet."""
    with net.inside():
        client = Client(tinyauth.address)
    tinyauth.clients.append(client)
    client.send(request(method, target, *fields, **more))
    return client


def home_and_far(lab):
    home = Net(lab)
    return home, Far(lab, home)


def serve_home(lab, home, *options, **more):
    with home.inside():
        return Server(lab, *PATIENT, *options, **more)


def at(server, address):
    """Where a machine at the other end of the cable reaches it."""
    server.address = (address, server.address[1])
    return server


# The state file on a full disk

def start(lab, *options, before=(), timeout=8, fds=None):
    """tinyauth to its end, which comes by itself: its exit status and words."""
    lab.write(lab.path("keys"), KEYS)
    command = [*before, lab.binary, "-k", lab.path("keys"), "-u", lab.shared.name, "-w", "1"]
    if fds is None:
        command += ["-l", "127.0.0.1:0"]
    else:
        command = [sys.executable, "-c", Server.HAND, ",".join(map(str, fds)), "", *command]
    process = Started.popen([*command, *options], env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, pass_fds=fds or ())
    try:
        _, words = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise AssertionError(f"it serves: {process.communicate(timeout=10)[1]!r}") from None
    return process.returncode, words


@contextlib.contextmanager
def disk(lab, size):
    """A small disk, while it is wanted."""
    with small_disk(lab, size) as place:
        yield place
    os.rmdir(place)


def check_no_room(state, status, words):
    same(status, 78, f"exit status with {words!r}")
    assert words.count("\n") == 1 and state in words and "No space left" in words, words


def test_state_on_a_full_disk(lab):
    """--state where there is no room: at start one sentence names the file, and nothing of it is left in the way."""
    with disk(lab, "128k") as place:
        state = f"{place}/state"
        check_no_room(state, *start(lab, "--state", state))
        status, words = start(lab, "--state", state)
        check_no_room(state, status, words)
        subprocess.run(["mount", "-o", "remount,size=8m", place], check=True)
        tinyauth = lab.tinyauth("--state", state)
        same(tinyauth.ask("GET", "/t/echo").status, 200, "status with room")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)


def sparse(lab, place):
    """A state file as it was made before: whole by its size, with holes; moved to that place."""
    made = lab.path("state")
    tinyauth = lab.tinyauth("--state", made)
    same(tinyauth.stop(), [], "end")
    lab.things.remove(tinyauth)
    subprocess.run(["cp", "--sparse=always", made, f"{place}/state"], check=True)
    os.chmod(f"{place}/state", 0o600)
    return f"{place}/state"


def test_sparse_state_on_a_full_disk(lab):
    """A state file with holes, on a disk without room for them: the same sentence, and the file stays."""
    with disk(lab, "128k") as place:
        state = sparse(lab, place)
        before = Path(state).read_bytes()
        check_no_room(state, *start(lab, "--state", state))
        same((Path(state).read_bytes() == before, os.listdir(place)), (True, ["state"]), "the file and its directory")


def failing_calls(lab, calls, error, when=""):
    """A command under which these system calls of what follows fail."""
    return ["strace", "-o", lab.path("trace"), "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}{when}"]


def test_state_where_nothing_can_be_allocated_ahead(lab):
    """On a file system that cannot allocate (NFS, FAT and others): the file is whole all the same, also one that had holes, which
    keeps what it says; and a full disk is told."""
    before = failing_calls(lab, "fallocate", "EOPNOTSUPP")
    for number, prepare in enumerate((lambda place: f"{place}/state", lambda place: sparse(lab, place))):
        with disk(lab, "8m") as place:
            state = prepare(place)
            held = Path(state).read_bytes() if number else b""
            tinyauth = Server(lab, "--state", state, before=before)
            tinyauth.pid = int(tinyauth.events("ready")[0]["pid"])
            found = os.stat(state)
            assert found.st_blocks * 512 >= found.st_size, f"{found.st_blocks} blocks of 512 for {found.st_size} bytes"
            same(Path(state).read_bytes()[:len(held)][:SLOTS_AT], held[:SLOTS_AT], "the head of the file")
            same(tinyauth.ask("GET", "/t/echo").status, 200, "status")
            same(tinyauth.stop(), [], "end")
            lab.things.remove(tinyauth)
    with disk(lab, "128k") as place:
        check_no_room(f"{place}/state", *start(lab, "--state", f"{place}/state", before=before))


def test_inetd_state_on_a_full_disk(lab):
    """-i with --state where there is no room: the same sentence."""
    with disk(lab, "128k") as place:
        state = f"{place}/state"
        served = Inetd(lab, "--state", state)
        until(lambda: served.process.poll() is not None, "end")
        check_no_room(state, served.process.returncode, served.words())


def ask_for_many(tinyauth, count, **more):
    """A request each for so many clients, on one connection of a trusted proxy: the statuses."""
    client = tinyauth.connect()
    statuses = []
    for number in range(count):
        field = f"X-Forwarded-For: 10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        statuses.append(client.ask("GET", "/t/echo", field, **more).status)
    return statuses


def test_disk_that_fills_up_under_the_state(lab):
    """Others fill the disk, and then addresses come that no one has seen: they are served, and no worker dies. Also where the
    file had holes at start."""
    for prepare in (lambda place: f"{place}/state", lambda place: sparse(lab, place)):
        with disk(lab, "8m") as place:
            state = prepare(place)
            tinyauth = lab.tinyauth("--state", state, "--trust", "127.0.0.1", ip_rate="1/h")
            with contextlib.suppress(OSError), open(f"{place}/rest", "wb", buffering=0) as rest:
                while True:
                    rest.write(bytes(4096))
            try:
                statuses = set(ask_for_many(tinyauth, 300))
            except Cut as cut:
                statuses = {str(cut)}
            same((statuses, tinyauth.events("worker_died")), ({200}, []), "statuses and dead workers")
            os.unlink(f"{place}/rest")
            same(tinyauth.stop(), [], "end")
            lab.things.remove(tinyauth)


# The state file of a clock that was restarted

SLOTS = struct.Struct("=" + "QQ" * 4096 * 8)
SLOTS_AT = 64


def slots_of(state):
    with open(state, "rb") as file:
        file.seek(SLOTS_AT)
        flat = SLOTS.unpack(file.read(SLOTS.size))
    return list(zip(flat[::2], flat[1::2]))


def age(state, tat_ns):
    """As another machine's uptime, or another boot's, left it: each slot is somebody's, at these times."""
    drawn = random.Random(1)
    flat = itertools.chain.from_iterable((drawn.getrandbits(64) | 1, tat_ns() % (1 << 64)) for _ in range(4096 * 8))
    with open(state, "r+b") as file:
        file.seek(SLOTS_AT)
        file.write(SLOTS.pack(*flat))


def with_aged_slots(lab, name, tat_ns):
    state, options = lab.path(name), ("--trust", "127.0.0.1", "--ip-burst", "1")
    first = lab.tinyauth("--state", state, *options, ip_rate="1/h")
    same(ask_for_many(first, 1), [200], "status")
    used = [slot for slot in slots_of(state) if slot != (0, 0)]
    assert len(used) == 1 and used[0][1] > time.monotonic_ns(), f"slots after one request: {used}"
    same(first.stop(), [], "end")
    lab.things.remove(first)
    age(state, tat_ns)
    return lab.tinyauth("--state", state, *options, ip_rate="1/h")


def test_state_after_a_reboot(lab):
    """All slots have times in the future, of a clock that was restarted: they make room, and no two addresses evict each other."""
    now, hour = time.monotonic_ns(), 3600 * 10 ** 9
    for what, tat_ns in (("ten days ahead", lambda: now + 240 * hour + random.randrange(hour)),
                         ("a little more than can be", lambda: now + 2 * hour + 120 * 10 ** 9 + random.randrange(10 ** 9)),
                         ("the largest there are", lambda: (1 << 64) - 1 - random.randrange(1000))):
        tinyauth = with_aged_slots(lab, f"state {what}", tat_ns)
        rounds = [ask_for_many(tinyauth, 400) for _ in range(4)]
        passed = [statuses.count(200) for statuses in rounds]
        same(passed, [400, 400, 0, 0], f"requests that pass in each round, with times {what}")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)


def test_state_of_one_who_is_at_the_limit(lab):
    """Times that this clock can have given count: whoever used up the allowance is refused after a restart as well."""
    now = time.monotonic_ns()
    state, options = lab.path("state"), ("--trust", "127.0.0.1", "--ip-burst", "1")
    for number, wanted in enumerate(([50, 50, 0], [0, 0, 0])):
        tinyauth = lab.tinyauth("--state", state, *options, ip_rate="1/h")
        same([ask_for_many(tinyauth, 50).count(200) for _ in range(3)], wanted, f"requests that pass in run {number}")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)
    assert all(tat > now for identity, tat in slots_of(state) if identity), "a time that lies in the past"


# Upstreams on unix sockets

def unix_listener(lab, path, backlog):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o666)
    listener.listen(backlog)
    lab.held.append(listener)
    return listener


def accept_all(listener, word=b"ok"):
    """Serves the listener from now on."""
    def serve(sock):
        with contextlib.suppress(OSError), sock:
            sock.settimeout(20)
            read_head(sock)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(word), word))

    def accept():
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=serve, args=(sock,), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()


def fill_backlog(lab, path):
    """Connections that nobody takes, until there is no room for more."""
    for _ in range(64):
        filler = socket.socket(socket.AF_UNIX)
        filler.setblocking(False)
        lab.held.append(filler)
        try:
            filler.connect(path)
        except BlockingIOError:
            return
    raise AssertionError("the backlog is never full")


def passable(lab):
    """Workers are nobody, and their root is the directory of the upstream's socket."""
    os.chmod(lab.directory, 0o755)


def test_full_backlog_of_a_unix_upstream(lab):
    """Twenty requests at once to a unix socket with a backlog of two, whose server takes them a second later: all are served."""
    passable(lab)
    path = lab.path("model.sock")
    listener = unix_listener(lab, path, 2)
    tinyauth = lab.tinyauth(upstream=f"unix:{path}", workers=2)
    clients = [tinyauth.connect() for _ in range(20)]
    for client in clients:
        client.send(request("POST", "/v1/chat/completions", body=b"{}"))
    time.sleep(1)                           # for them to find the backlog full
    accept_all(listener)
    same([client.read().status for client in clients], [200] * 20, "statuses")


def test_full_backlog_that_stays_full(lab):
    """A unix socket whose server never takes a connection: 504 after the connect time-out and not before, without a busy wait;
    a client that leaves meanwhile is no longer waited for."""
    passable(lab)
    path = lab.path("model.sock")
    unix_listener(lab, path, 1)
    fill_backlog(lab, path)
    tinyauth = lab.tinyauth("--connect-timeout", "1500ms", upstream=f"unix:{path}")
    began, worker = time.monotonic(), tinyauth.workers()[0]
    cpu = Path(f"/proc/{worker}/stat").read_text().split()[13:15]
    leaver, clients = tinyauth.connect(), [tinyauth.connect() for _ in range(4)]
    for client in (leaver, *clients):
        client.send(request("GET", "/t/echo"))
    leaver.close()
    gone = tinyauth.access()[0]
    for client in clients:
        check_error(client.read(), 504)
    took = time.monotonic() - began
    used = (sum(map(int, Path(f"/proc/{worker}/stat").read_text().split()[13:15])) - sum(map(int, cpu))) / os.sysconf("SC_CLK_TCK")
    assert 1.4 < took < 5, f"504 after {took:.1f} s"
    assert used < 0.3, f"{used:.2f} s of processor time while it waited"
    same(gone["reason"], "client_closed", "the one who left")


def test_inetd_full_backlog(lab):
    """-i in front of a unix socket whose backlog is full for a second: served."""
    passable(lab)
    path = lab.path("model.sock")
    listener = unix_listener(lab, path, 1)
    fill_backlog(lab, path)
    served = Inetd(lab, upstream=f"unix:{path}")
    served.client.send(request("POST", "/v1/chat/completions", body=b"{}"))
    time.sleep(1)
    accept_all(listener)
    same(served.client.read().status, 200, "status")
    served.finish()


def test_unix_upstream_whose_server_is_gone(lab):
    """A unix socket that nobody listens on any more is refused at once: only what may pass is waited for."""
    passable(lab)
    path = lab.path("model.sock")
    unix_listener(lab, path, 1).close()
    tinyauth = lab.tinyauth("--connect-timeout", "5s", upstream=f"unix:{path}")
    began = time.monotonic()
    check_error(tinyauth.ask("GET", "/"), 502)
    assert time.monotonic() - began < 2, f"502 after {time.monotonic() - began:.1f} s"


def check_moved(lab, tinyauth, path, word, count):
    os.chmod(os.path.dirname(path), 0o755)
    accept_all(unix_listener(lab, path, 8), word)

    def served():
        answer = tinyauth.ask("GET", "/")
        return answer.status == 200 and answer.body == word
    until(served, f"an answer from the new directory ({word.decode()})", 12)
    tinyauth.wait_event("upstream_moved", count)


def test_unix_upstream_in_a_new_directory(lab):
    """The directory of a unix upstream is removed and made anew, replaced by another, and made anew with the one above it, as
    systemd's RuntimeDirectory= does: served again within seconds."""
    passable(lab)
    above = lab.path("run")
    place = f"{above}/model"
    path = f"{place}/model.sock"
    os.makedirs(place)
    os.chmod(above, 0o755)
    os.chmod(place, 0o755)
    accept_all(unix_listener(lab, path, 8), b"first")
    tinyauth = lab.tinyauth(upstream=f"unix:{path}")
    tinyauth.expect("event=upstream_moved")
    same(tinyauth.ask("GET", "/").body, b"first", "before")
    shutil.rmtree(place)
    os.mkdir(place)
    check_moved(lab, tinyauth, path, b"made anew", 1)
    os.rename(place, f"{above}/old")
    os.mkdir(f"{above}/new")
    os.rename(f"{above}/new", place)
    check_moved(lab, tinyauth, path, b"replaced", 2)
    shutil.rmtree(above)
    same(tinyauth.ask("GET", "/").status, 502, "while there is none")
    os.makedirs(place)
    os.chmod(above, 0o755)
    check_moved(lab, tinyauth, path, b"with the one above", 3)


def test_unix_upstream_behind_a_link(lab):
    """The directory is a link, which leads to another one from now on; a stream from the old one runs on."""
    passable(lab)
    path = lab.path("current/model.sock")
    for name in ("first", "second"):
        os.mkdir(lab.path(name))
        os.chmod(lab.path(name), 0o755)
    os.symlink("first", lab.path("current"))
    lab.things.append(Model(lab.path("first"), "--unix", lab.path("first/model.sock")))
    tinyauth = lab.tinyauth(upstream=f"unix:{path}")
    tinyauth.expect("event=upstream_moved")
    stream = Stream(tinyauth.connect(), 150, 20)
    accept_all(unix_listener(lab, lab.path("second/model.sock"), 8), b"second")
    os.symlink("second", lab.path("new"))
    os.rename(lab.path("new"), lab.path("current"))
    until(lambda: tinyauth.ask("GET", "/").body == b"second", "an answer from the second", 12)
    assert stream.whole(), f"stream: {stream.error}, {len(stream.seen)} events"


# Connecting

def full_tcp(lab, host="127.0.0.1"):
    """A listener that takes no connection, with as many waiting as may. Its answers come late: see free()."""
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen(0)
    lab.held.append(listener)
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        lab.held.append(filler)
    return listener


def free(listener, serve):
    """From now on it takes connections."""
    def accept():
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=run, args=(sock,), daemon=True).start()

    def run(sock):
        with contextlib.suppress(OSError), sock:
            sock.settimeout(10)
            serve(sock)
    threading.Thread(target=accept, daemon=True).start()


@slow
def test_long_connect_is_not_the_clients_fault(lab):
    """A connect that takes 31 s: what the client had to send then counts from then, and nobody is told 408."""
    heads = []

    def serve(sock):
        head = read_head(sock)
        heads.append(head)
        body = head.partition(b"\r\n\r\n")[2]
        length = re.search(rb"Content-Length: (\d+)", head)
        if b"Expect:" in head:
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while length and len(body) < int(length[1]):
            data = sock.recv(1 << 16)
            if not data:
                raise OSError("cut")
            body += data
        sock.sendall(OK)
    home = Net(lab)
    with home.inside():
        with contextlib.suppress(FileNotFoundError):    # so that the attempts come 1, 3, 7, 15 and 31 s after the first
            Path("/proc/sys/net/ipv4/tcp_syn_linear_timeouts").write_text("0")
        listener = full_tcp(lab)
    tinyauth = serve_home(lab, home, "--connect-timeout", "50s", upstream=f"127.0.0.1:{listener.getsockname()[1]}")
    clients = {"no body": begin(tinyauth, home, "/none"),
               "a whole body": begin(tinyauth, home, "/whole", method="POST", body=b"x" * 4000),
               "half a body": begin(tinyauth, home, "/half", "Content-Length: 4000", method="POST"),
               "a body to wait with": begin(tinyauth, home, "/asked", "Content-Length: 4000", "Expect: 100-continue", method="POST"),
               "a large body": begin(tinyauth, home, "/large", "Content-Length: 3000000", method="POST")}
    clients["half a body"].send(b"x" * 2000)
    clients["a large body"].sock.settimeout(60)
    threading.Thread(target=clients["a large body"].send, args=(b"x" * 3000000,), daemon=True).start()
    time.sleep(30.3)
    same(heads, [], "requests that came through before")
    free(listener, serve)
    until(lambda: len(heads) == len(clients), "connections for all of them", 20)
    time.sleep(0.3)                         # an end that is past is noticed within 10 ms
    got = {}
    for what, client in clients.items():
        try:
            client.sock.settimeout(20)
            if what == "half a body":
                client.send(b"x" * 2000)
            if what == "a body to wait with":
                same(client.head().status, 100, "interim status")
                client.send(b"x" * 4000)
            got[what] = client.read().status
        except (Cut, OSError, AssertionError) as error:
            got[what] = repr(error)
    same(got, dict.fromkeys(clients, 200), "statuses")


def two_addresses(lab, first, second):
    """A command with a name for both, models.test."""
    return named(lab, f"127.0.0.1 localhost\n{first} models.test\n{second} models.test\n")[0]


def timed(client):
    began = time.monotonic()
    answer = client.ask("GET", "/")
    return answer, time.monotonic() - began


def client_of(tinyauth, worker):
    """A connection that this worker takes."""
    with frozen(set(tinyauth.workers()) - {worker}):
        before = descriptors([worker])
        client = tinyauth.connect()
        until(lambda: descriptors([worker]) > before, "a worker that takes the connection")
    return client


def test_first_address_is_dead(lab):
    """The first of two addresses answers nothing: one request waits for it, later ones go to the other, in each worker; it is
    tried again after a rest, and used again once it lives."""
    dead = full_tcp(lab, "127.0.0.2")
    port = dead.getsockname()[1]
    Answering(lab, "127.0.0.3", port, word=b"second")
    tinyauth = Server(lab, "--connect-timeout", "1500ms", before=two_addresses(lab, "127.0.0.2", "127.0.0.3"), workers=2,
                      upstream=f"models.test:{port}")
    one, other = tinyauth.workers()
    answer, took = timed(client_of(tinyauth, one))
    same((answer.status, answer.body), (200, b"second"), "the first answer")
    assert took < 4, f"{took:.1f} s for the first"
    for worker in (one, one, other, other, one):
        answer, took = timed(client_of(tinyauth, worker))
        same((answer.status, answer.body), (200, b"second"), "a later answer")
        assert took < 1, f"{took:.1f} s for a later one, in {'the same worker' if worker == one else 'the other worker'}"
    free(dead, lambda sock: read_head(sock) and sock.sendall(OK))
    until(lambda: tinyauth.ask("GET", "/").body == b"ok", "an answer from the first again", 25)
    same(tinyauth.events("upstream_moved"), [], "moves")


def test_all_addresses_are_dead(lab):
    """Neither of two addresses answers: 504; as soon as one does, the next request is served, without a rest."""
    dead = full_tcp(lab, "127.0.0.2")
    port = dead.getsockname()[1]
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.3", port))
    lab.held.append(holder)
    tinyauth = Server(lab, "--connect-timeout", "500ms", before=two_addresses(lab, "127.0.0.2", "127.0.0.3"),
                      upstream=f"models.test:{port}")
    for _ in range(3):
        assert tinyauth.ask("GET", "/").status in (502, 504), "an answer from nowhere"
    holder.listen(8)
    free(holder, lambda sock: read_head(sock) and sock.sendall(OK))
    answer, took = timed(tinyauth.connect())
    same((answer.status, answer.body), (200, b"ok"), "answer of the one that came back")
    assert took < 2, f"{took:.1f} s for it"


# Name servers

A, AAAA = 1, 28
NXDOMAIN, SERVFAIL, REFUSED, SILENCE = 3, 2, 5, -1
WORDS = {NXDOMAIN: "NXDOMAIN", SERVFAIL: "SERVFAIL", REFUSED: "REFUSED", SILENCE: "nothing"}


class NameServer:
    """A name server of the namespace. It answers a type with an error, or with addresses."""

    def __init__(self, lab, net, answers):
        self.answers, self.asked = answers, []
        with net.inside():
            self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.sock.bind(("127.0.0.1", 53))
        threading.Thread(target=self.serve, daemon=True).start()
        lab.things.append(self)

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                query, peer = self.sock.recvfrom(4096)
                if not query:
                    break
                end = query.index(b"\0", 12) + 1
                kind, = struct.unpack_from("!H", query, end)
                answer = self.answers.get(kind, [])
                self.asked.append((kind, time.monotonic()))
                if answer == SILENCE:
                    continue
                code, addresses = (answer, []) if isinstance(answer, int) else (0, answer)
                head = query[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, len(addresses), 0, 0)
                text = head + query[12:end + 4]
                for address in addresses:
                    data = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
                    text += b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 0, len(data)) + data
                self.sock.sendto(text, peer)

    def stop(self):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def with_names(lab):
    """A command for what asks the namespace's name server, with the patience that a resolver has by default."""
    before, _ = nameless(lab)
    (lab.directory / "resolv").write_text("nameserver 127.0.0.1\n")
    return before


def check_found(lab, answers, host, what, limit):
    """The name is found within so many seconds, in which it serves already."""
    home = Net(lab)
    names = NameServer(lab, home, answers)
    with home.inside():
        site = Site(lab, behave, host)
    tinyauth = serve_home(lab, home, before=with_names(lab), upstream=f"models.test:{site.port}")
    tinyauth.expect("event=upstream_(unknown|found)")
    took = (tinyauth.events("ready")[0]["at"] - tinyauth.began) / 1e9
    assert took < 3, f"ready after {took:.1f} s with {what}"

    def found():
        with home.inside():
            return tinyauth.ask("GET", "/").body == b"ok"
    until(found, f"an answer with {what}; asked for {[kind for kind, _ in names.asked]}", limit)
    for thing in (tinyauth, site, names, home):
        same(thing.stop() or [], [], "end")
        lab.things.remove(thing)


def test_name_server_without_ipv6(lab):
    """AAAA is answered NXDOMAIN, SERVFAIL, REFUSED or not at all, A well: the name is found."""
    for error in (NXDOMAIN, SERVFAIL, REFUSED, SILENCE):
        check_found(lab, {A: ["127.0.0.1"], AAAA: error}, "127.0.0.1", f"AAAA answered {WORDS[error]}", 8)
    check_found(lab, {A: ["127.0.0.1"], AAAA: []}, "127.0.0.1", "AAAA answered with none", 8)


def test_name_server_without_ipv4(lab):
    """A is answered so, and AAAA well: the name is found, and meanwhile it serves."""
    for error in (NXDOMAIN, SERVFAIL, REFUSED, SILENCE):
        check_found(lab, {A: error, AAAA: ["::1"]}, "::1", f"A answered {WORDS[error]}", 15)
    check_found(lab, {A: [], AAAA: ["::1"]}, "::1", "A answered with none", 15)


@slow
def test_name_with_changing_subsets(lab):
    """Each look finds a few of a name's addresses: no new workers as long as one of ours is among them, and some when none is."""
    home = Net(lab)
    names = NameServer(lab, home, {A: ["127.0.0.1", "127.0.0.2"]})
    with home.inside():
        site = Answering(lab, "0.0.0.0")
    tinyauth = serve_home(lab, home, before=with_names(lab), upstream=f"models.test:{site.port}")
    tinyauth.expect("event=upstream_moved")
    workers = tinyauth.workers()

    def look(addresses):
        """The next look finds these."""
        count, names.answers[A] = len(names.asked), addresses
        until(lambda: len(names.asked) >= count + 2, "another look at the name", 40)
    look(["127.0.0.2", "127.0.0.3"])
    with home.inside():
        same(tinyauth.ask("GET", "/").status, 200, "status")
    time.sleep(1)                           # for new workers that there must not be
    same((tinyauth.events("upstream_moved"), tinyauth.workers()), ([], workers), "moves and workers with one of ours among them")
    look(["127.0.0.3", "127.0.0.4"])
    tinyauth.wait_event("upstream_moved")
    until(lambda: tinyauth.workers() and not set(workers) & set(tinyauth.workers()), "new workers")
    with home.inside():
        same(tinyauth.ask("GET", "/").status, 200, "status of the new ones")


# Sockets that are passed in

def test_passed_in_sockets_that_do_not_listen(lab):
    """A connection, a datagram socket, a device or a file in place of a listener: 78 and one line that says what it is."""
    with contextlib.ExitStack() as stack:
        def keep(thing):
            return stack.enter_context(thing)
        listener = keep(socket.create_server(("127.0.0.1", 0)))
        connected = keep(socket.create_connection(listener.getsockname()))
        bound = keep(socket.socket())
        bound.bind(("127.0.0.1", 0))
        datagram = keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagram.bind(("127.0.0.1", 0))
        pair = [keep(sock) for sock in socket.socketpair()]
        words = [keep(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)]
        packets = keep(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        packets.bind(lab.path("packets"))
        packets.listen()
        (lab.directory / "file").write_text("text")
        cases = (("a connection", connected, "does not listen"), ("a bound socket", bound, "does not listen"),
                 ("one of a pair", pair[0], "does not listen"), ("UDP", datagram, "datagram"),
                 ("a unix datagram", words[0], "datagram"), ("packets", packets, "packet"), ("/dev/null", keep(open("/dev/null")), "no socket"),
                 ("a file", keep(open(lab.path("file"))), "no socket"))
        problems = []
        for what, thing, word in cases:
            for fds in ((thing.fileno(),), (listener.fileno(), thing.fileno())):
                try:
                    status, said = start(lab, fds=fds, timeout=3)
                except AssertionError as error:
                    problems.append(f"{what}: {str(error)[:100]}")
                    continue
                if (status, said.count("\n")) != (78, 1) or word not in said or f"descriptor {2 + len(fds)} " not in said:
                    problems.append(f"{what}: {status} {said!r}")
        try:
            status, said = start(lab, timeout=3, before=[sys.executable, "-c", "import os, sys; os.environ.update(LISTEN_FDS='1', "
                                 "LISTEN_PID=str(os.getpid())); os.execvp(sys.argv[1], sys.argv[1:])"])
            same((status, said.count("\n")), (78, 1), f"exit status and lines with none at all: {said!r}")
        except AssertionError as error:
            problems.append(str(error))
        same(problems, [], "what was taken or said")


# Peers that vanish

def seconds_to(look, what, since):
    """How long until look() is true, or the words that it was not within what is allowed."""
    try:
        until(look, what, max(1.0, since + VANISHED - time.monotonic()))
    except AssertionError:
        return f"{what}: not within {VANISHED} s"
    return None


def check_each(looks, since):
    """Each of these comes true in time."""
    same([problem for what, look in looks.items() if (problem := seconds_to(look, what, since))], [], "not known to have vanished")


@slow
def test_clients_that_vanish(lab):
    """A client's machine vanishes without a word: within a minute its streams, silent requests, tunnels and idle connections
    end, and the model with them; also on a socket that was passed in, and with -i."""
    home, far = home_and_far(lab)
    with home.inside():
        site = Site(lab, behave)
        listener = socket.create_server(("0.0.0.0", 0), backlog=64)
        lab.held.append(listener)
        accepting = socket.create_server((far.near, 0))
        lab.held.append(accepting)
    own = at(serve_home(lab, home, upstream=site.name, listen="0.0.0.0:0"), far.near)
    passed = at(serve_home(lab, home, upstream=site.name, listen=None, fds=(listener.fileno(),)), far.near)
    base = descriptors(own.workers())
    inetd_client = []

    class FarInetd(Inetd):
        def streams(self):
            with far.inside():
                inetd_client.append(socket.create_connection(accepting.getsockname(), 10))
            server, _ = accepting.accept()
            self.client = Held(inetd_client[0])
            fd = server.detach()
            return fd, fd
    with home.inside():
        inetd = FarInetd(lab, *PATIENT, upstream=site.name)
    inetd.client.send(request("GET", "/stream-inetd"))
    idle = begin(own, far, "/idle")
    same(idle.read().status, 200, "an idle one")
    begin(own, far, "/silent")
    begin(own, far, "/silent-upload", method="POST", body=b"x" * 100)
    streams = [begin(own, far, "/stream"), begin(passed, far, "/stream-passed"), inetd.client]
    for client in streams:
        same(client.head().status, 200, "a stream")
    same(begin(own, far, "/tunnel", *UPGRADE).head().status, 101, "a tunnel")
    until(lambda: len(site.asked) == 7, "all requests at the model")
    far.vanish()
    vanished = time.monotonic()
    check_each({f"{target}: end at the model": lambda target=target: target in site.gone for target in site.asked}
               | {"all connections: end": lambda: descriptors(own.workers()) <= base,
                  "-i: end": lambda: inetd.process.poll() is not None}, vanished)


@slow
def test_upstreams_that_vanish(lab):
    """The model's machine vanishes without a word: within a minute its requests end, in an error where nothing was said yet."""
    home, far = home_and_far(lab)
    with far.inside():
        site = Site(lab, behave, far.address)
    tinyauth = serve_home(lab, home, upstream=site.name)
    stream, silent, posted = (begin(tinyauth, home, "/stream"), begin(tinyauth, home, "/silent"),
                              begin(tinyauth, home, "/silent-post", method="POST", body=b"x" * 1000))
    tunnel = begin(tinyauth, home, "/tunnel", *UPGRADE)
    upload = begin(tinyauth, home, "/silent-upload", "Content-Length: 9000000", method="POST")
    same((stream.head().status, tunnel.head().status), (200, 101), "a stream and a tunnel")
    until(lambda: len(site.asked) == 5, "all requests at the model")
    far.vanish()
    vanished = time.monotonic()
    got = {}

    def watch(what, client):
        client.sock.settimeout(VANISHED + 10)
        try:
            if what in ("stream", "tunnel"):
                client.buffer.clear()
                for _ in client.to_end() if what == "tunnel" else client.body():
                    pass
                got[what] = "end"
            else:
                got[what] = client.read().status
        except Cut:
            got[what] = "end"
        except OSError as error:
            got[what] = repr(error)

    def send():
        with contextlib.suppress(OSError):
            for _ in range(VANISHED * 5):
                upload.send(b"x" * 10000)
                time.sleep(0.2)
    threading.Thread(target=send, daemon=True).start()
    clients = {"stream": stream, "tunnel": tunnel, "silent": silent, "posted": posted, "upload": upload}
    for what, client in clients.items():
        threading.Thread(target=watch, args=(what, client), daemon=True).start()
    check_each({what: lambda what=what: what in got for what in clients}, vanished)
    assert got["stream"] == got["tunnel"] == "end" and {got[what] for what in ("silent", "posted", "upload")} <= {502, 504}, got


BODIES = (100_000, 300_000, 1_000_000, 3_000_000, 20_000_000)


def post_to_reads_late(tinyauth, net, size):
    """A body for a model that does not read it yet: some of it waits in the kernel, of a large one some with us and the client."""
    client = begin(tinyauth, net, f"/reads-late-{size}", f"Content-Length: {size}", method="POST")
    client.sock.settimeout(SILENT + 60)

    def send():
        with contextlib.suppress(OSError):
            client.send(b"x" * size)
    threading.Thread(target=send, daemon=True).start()
    return client


@slow
def test_silent_but_living(lab):
    """Who says nothing for 70 s but lives is left alone: a model, and the client that waits for it; an idle client; a tunnel; a
    model that takes so long to read a body, of any size. Not so a client that reads nothing while bytes wait for it."""
    home, far = home_and_far(lab)
    model = Far(lab, home)
    with home.inside():                     # the kernel takes all but the largest at once
        Path("/proc/sys/net/ipv4/tcp_wmem").write_text("4096 1048576 4194304")
    with model.inside():
        site = Site(lab, behave, model.address)
    tinyauth = at(serve_home(lab, home, upstream=site.name, listen="0.0.0.0:0"), far.near)
    clients = {"idle": begin(tinyauth, far, "/idle"), "tunnel": begin(tinyauth, far, "/tunnel", *UPGRADE)}
    same([client.read().status for client in clients.values()], [200, 101], "an idle client and a tunnel")
    clients["late"] = begin(tinyauth, far, "/late")
    clients |= {f"{size} bytes": post_to_reads_late(tinyauth, far, size) for size in BODIES}
    time.sleep(SILENT)
    got = {}
    for what, client in clients.items():
        client.sock.settimeout(30)
        try:
            if what == "tunnel":
                client.send(b"hello")
                same(b"".join(client.exactly(5)), b"hello", "echo")
                got[what] = 200
            else:
                got[what] = client.ask("GET", "/idle").status if what == "idle" else client.read().status
        except (Cut, OSError, AssertionError) as error:
            got[what] = repr(error)
    same(got, dict.fromkeys(clients, 200), "what became of each")


# Places and stops

def check_places(tinyauth, places, all_at_once):
    """So many places there are in all workers together: all are had before somebody is turned away."""
    statuses, held = [], []
    with frozen(tinyauth.workers()) if all_at_once else contextlib.nullcontext():
        for _ in range(places):
            held.append(tinyauth.connect(silent=all_at_once))
            held[-1].send(request("GET", "/stream"))
            if not all_at_once:
                statuses.append(held[-1].head().status)
    if all_at_once:
        statuses = [client.head().status for client in held]
    same(statuses.count(200), places, f"of {places} streams that began {'at once' if all_at_once else 'one by one'}, those served")
    began = time.monotonic()
    same(tinyauth.ask("GET", "/t/echo").status, 503, "one more")
    assert time.monotonic() - began < 2, f"503 after {time.monotonic() - began:.1f} s"
    for client in held[5:8]:
        client.close()
    until(lambda: tinyauth.ask("GET", "/t/echo").status == 200, "a place again")


@alone
def test_all_places_of_all_workers(lab):
    """Four workers of eight places, and two of forty: as many streams run before one more gets 503, and each that ends makes
    room."""
    site = Site(lab, behave)
    for workers, conns, all_at_once in ((4, 8, False), (4, 8, True), (2, 40, False), (2, 40, True), (4, 8, False)):
        tinyauth = lab.tinyauth("--max-conns", str(conns), "--ip-conns", "100", workers=workers, upstream=site.name)
        tinyauth.expect("event=turned_away .*reason=full")
        check_places(tinyauth, workers * conns, all_at_once)
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)


class Contained(Server):
    """tinyauth as pid 1. The process ids of its log are not ours."""

    def __init__(self, lab, *options, **more):
        super().__init__(lab, *options, before=namespaces("--pid", "--fork", "--kill-child"), **more)
        self.pid, = children(self.process.pid)

    def stop(self):
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            self.wait_exit(10)
        self.pump.join(2)
        self.process.stderr.close()


def test_places_of_another_server(lab):
    """Two containers share a state file, and each server is pid 1 in its own: the free places of one are not those of the other,
    who says 503 when its own are taken."""
    site, servers = Site(lab, behave), []
    for _ in range(2):
        servers.append(Contained(lab, "--max-conns", "4", "--state", lab.path("state"), workers=2, upstream=site.name))
    same({server.events("ready")[0]["pid"] for server in servers}, {"1"}, "process numbers")
    for server in servers:
        check_places(server, 8, False)


def stop_takes(tinyauth, timeout=20):
    began = time.monotonic()
    tinyauth.signal(signal.SIGTERM)
    same(tinyauth.wait_exit(timeout), 0, "exit status")
    return time.monotonic() - began


def test_stop_does_not_wait_for_those_who_asked_nothing(lab):
    """At TERM whoever has sent no whole request is let go at once: silence, half a head, half a second head, half a PROXY
    header, a TLS handshake that is not over, or not begun."""
    pair = self_signed(lab.directory)
    hello = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(20)
    cases = {"silence": ((), b"", False), "half a head": ((), request("GET", "/t/echo")[:40], False),
             "half a second head": ((), request("GET", "/t/echo")[:40], True),
             "half a PROXY header": (("--trust", "127.0.0.1"), b"PROXY TCP4 192.0.2.7", False),
             "half a handshake": (pair.options, hello, False), "silence where TLS is spoken": (pair.options, b"", False),
             "silence after a handshake": (pair.options, None, False)}
    took = {}
    for what, (options, text, asked) in cases.items():
        tinyauth = lab.tinyauth(*options)
        tinyauth.expect("event=turned_away")
        clients = [tinyauth.connect(silent=text is not None) for _ in range(3)]
        for client in clients:
            if asked:
                same(client.ask("GET", "/t/echo").status, 200, "the first request")
            client.send(text or b"")
        same(tinyauth.ask("GET", "/t/echo").status, 200, "another one")     # by then those were taken
        took[what] = stop_takes(tinyauth)
        lab.things.remove(tinyauth)
        tinyauth.stop()
    same({what: f"{seconds:.1f} s" for what, seconds in took.items() if seconds > 2}, {}, "stops that took long")


def test_stop_lets_those_who_asked_have_their_answer(lab):
    """Beside half a head at TERM: a stream runs to its end, and an idle connection gets one more answer."""
    tinyauth = lab.tinyauth()
    stream, idle, half = Stream(tinyauth.connect(), 100, 20), tinyauth.connect(), tinyauth.connect()
    same(idle.ask("GET", "/t/echo").status, 200, "the first answer")
    half.send(request("GET", "/t/echo")[:40])
    same(tinyauth.ask("GET", "/t/echo").status, 200, "another one")
    began = time.monotonic()
    tinyauth.signal(signal.SIGTERM)
    tinyauth.wait_event("draining")
    with contextlib.suppress(Cut):
        half.read()
        half.end()
    assert time.monotonic() - began < 1.5, f"half a head is let go after {time.monotonic() - began:.1f} s"
    answer = idle.ask("GET", "/t/echo")
    same((answer.status, answer.closes), (200, True), "the answer while it stops")
    assert stream.whole(), f"stream: {stream.error}, {len(stream.seen)} events"
    stream.client.close()                   # it might ask once more
    same(tinyauth.wait_exit(), 0, "exit status")


# Ready

FORKS = "?fork,?vfork,?clone,?clone3"


def with_processes(lab, most):
    """A command under which a user that has no other process may have so many, and that user's directory."""
    _, home = ordinary(lab)
    user = 1_000_000 + os.getpid() * 16 % 900_000 + next(Net.numbers) % 16
    for path in (home, home / "keys"):
        os.chown(path, user, user)
    return ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", "prlimit", f"--nproc={most}"], home


def check_no_worker(lab, what, *options, before=(), binary=None, **more):
    """Neither the log nor the service manager hears that it is ready; in a few seconds it ends with 1, and says why."""
    manager = Manager(lab)
    os.chmod(lab.directory, 0o755)
    os.chmod(manager.name, 0o777)
    tinyauth = Server(lab, *options, before=before, binary=binary, env=manager.env, wait=False, **more)
    tinyauth.status = 1
    tinyauth.expect("event=(worker_missing|worker_died|no_worker|fewer_connections)|^tinyauth: |strace")
    try:
        status = tinyauth.wait_exit(12)
    except AssertionError:
        status = "none"
    tinyauth.pump.join(2)
    manager.hear()
    same((status, len(tinyauth.events("ready")), len(tinyauth.events("no_worker"))), (1, 0, 1),
         f"exit status, event=ready and event=no_worker with {what}")
    assert not any("READY=1" in text for _, text in manager.told), manager.told
    took = (time.monotonic_ns() - tinyauth.began) / 1e9
    assert took < 10, f"its end after {took:.1f} s"
    lab.things.remove(manager)
    manager.stop()


def test_not_ready_without_processes(lab):
    """Where the user may have no other process."""
    before, home = with_processes(lab, 1)
    check_no_worker(lab, "RLIMIT_NPROC", "-k", str(home / "keys"), before=before, binary=str(home / "tinyauth"), keys=None, workers=2)


def test_not_ready_without_memory(lab):
    """Where a worker's memory is more than the limit of addresses allows, but the supervisor's is not."""
    options = ("--max-conns", "2000")
    tinyauth = lab.tinyauth(*options)
    tinyauth.expect("event=fewer_connections")
    supervisor, worker = (int(re.search(r"VmPeak:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) << 10
                          for pid in (tinyauth.pid, tinyauth.workers()[0]))
    assert worker > supervisor + (16 << 20), f"{supervisor} bytes of addresses in the supervisor, {worker} in a worker: too near"
    check_no_worker(lab, "RLIMIT_AS", *options, before=["prlimit", f"--as={(supervisor + worker) // 2}"], workers=2)


def test_not_ready_when_fork_fails(lab):
    """Where fork fails each time."""
    check_no_worker(lab, "fork that fails", before=failing_calls(lab, FORKS, "ENOMEM"))


def test_ready_when_one_can_live(lab):
    """Said at once when workers live; when the first forks fail, as soon as one lives; and when there is room for one of two."""
    manager = Manager(lab)
    tinyauth = Server(lab, env=manager.env, workers=2)
    took = (tinyauth.events("ready")[0]["at"] - tinyauth.began) / 1e9
    assert took < 2, f"ready after {took:.1f} s"
    manager.wait("READY=1")
    same(tinyauth.ask("GET", "/t/echo").status, 200, "status")
    late = Server(lab, workers=1, before=failing_calls(lab, FORKS, "EAGAIN", ":when=1..1"), wait=False)
    late.expect("event=worker_missing")
    until(lambda: late.events("ready"), "event=ready", 10)
    names = [record["event"] for record in late.records() if record.get("event") in ("worker_missing", "worker_started", "ready")]
    same(names, ["worker_missing", "worker_started", "ready"], "events in turn")
    late.pid = int(late.events("ready")[0]["pid"])
    late.signal(signal.SIGTERM)
    late.wait_exit()
    before, home = with_processes(lab, 2)
    one = Server(lab, "-k", str(home / "keys"), before=before, binary=str(home / "tinyauth"), keys=None, workers=2)
    one.expect("event=worker_missing")
    same(one.ask("GET", "/t/echo").status, 200, "status with one worker of two")


# Memory

def anonymous(pids):
    """Anonymous memory of these, in KB."""
    return sum(int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) for pid in pids)


def check_given_back(lab, options, count):
    tinyauth, model = lab.pair("--ip-conns", "1000", *options)
    keeper = tinyauth.connect()
    same(keeper.ask("GET", "/t/chunked/100000").status, 200, "one who stays")
    base = anonymous(tinyauth.workers())
    clients = []
    for _ in range(count):
        clients.append(tinyauth.connect(rcvbuf=4096))
        clients[-1].send(request("GET", "/t/chunked/100000000"))
        same(clients[-1].head().status, 200, "status")
    time.sleep(0.5)                         # for buffers to fill
    most = anonymous(tinyauth.workers())
    for client in clients:
        client.reset()
    assert most > base + 2000, f"{most} KB with {count} slow readers, {base} KB before: it shows nothing"
    began, now = time.monotonic(), most
    while now > base + 1000 and time.monotonic() < began + 12:
        time.sleep(0.2)
        now = anonymous(tinyauth.workers())
    assert now <= base + 1000, f"{now} KB 12 s after {count} slow readers left; {most} KB with them, {base} KB before"
    same(keeper.ask("GET", "/t/chunked/100000").status, 200, "the one who stayed")
    del model


@alone
def test_buffers_are_given_back(lab):
    """After 200 slow readers of large answers, plain and over TLS, a worker's memory is near what it was before."""
    check_given_back(lab, (), 200)
    check_given_back(lab, self_signed(lab.directory).options, 100)


def mappings(pid):
    """Of a process: first address, end, permissions, name."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(None, 5)
        first, _, end = fields[0].partition("-")
        found.append((int(first, 16), int(end, 16), fields[1], fields[5] if len(fields) > 5 else ""))
    return found


def holds(pid, word):
    """Where in the readable memory of a process these bytes are."""
    found = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for first, end, flags, name in mappings(pid):
            if "r" not in flags or name in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
                continue
            tail, at = b"", first
            while at < end:
                try:
                    data = os.pread(memory.fileno(), min(1 << 20, end - at), at)
                except OSError:
                    break               # past the end of what is mapped
                if not data:
                    break
                if (place := (tail + data).find(word)) >= 0:
                    found.append(f"{name or 'anonymous'} {flags} +{at - len(tail) + place - first:#x}")
                    break
                tail, at = data[-len(word):], at + len(data)
    return found


PLAIN = b"secret-"                      # what the plain keys of many_keys() begin with


def check_workers_hold(tinyauth, when, word=PLAIN):
    workers = tinyauth.workers()
    assert workers, f"no worker {when}"
    for pid in workers:
        same(holds(pid, word), [], f"plain keys in a worker's memory {when}")
        tables = [(flags, name) for _, _, flags, name in mappings(pid) if "tinyauth-keys" in name]
        same([flags for flags, _ in tables], ["r--s"], f"a worker's mappings of key tables {when}")


def only_new(tinyauth, before):
    """When no worker of before is left."""
    def look():
        now = tinyauth.workers()
        return now and not set(now) & set(before) and now
    until(look, "workers that are all new", 15)


@alone
def test_no_plain_key_in_workers(lab):
    """No plain key of the file is in a worker's memory, and one key table, which it may only read: at start, after edits, after
    growth past 100,000 lines and twice that, in a worker that is replaced, and after an upgrade."""
    tinyauth = lab.tinyauth(keys=KEYS + many_keys(1000, False), workers=2)
    tinyauth.expect("event=(worker_died|upgrade)")
    check_workers_hold(tinyauth, "at start")
    tinyauth.publish(KEYS + many_keys(2000, False))
    check_workers_hold(tinyauth, "after an edit")
    for count in (110000, 230000):
        before = tinyauth.workers()
        tinyauth.publish(KEYS + many_keys(count, False))
        only_new(tinyauth, before)
        until(lambda: len(tinyauth.workers()) == 2, "two workers")
        check_workers_hold(tinyauth, f"after growth to {count} keys")
        same(tinyauth.ask("GET", "/t/echo").status, 200, "status")
    before = tinyauth.workers()
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(set(tinyauth.workers()) - set(before)) == 1, "a new worker")
    until(lambda: tinyauth.ask("GET", "/t/echo").status == 200, "status")
    check_workers_hold(tinyauth, "after one was replaced")
    before = tinyauth.workers()
    tinyauth.signal(signal.SIGUSR2)
    tinyauth.wait_event("ready", 2, 15)
    only_new(tinyauth, before)
    check_workers_hold(tinyauth, "after an upgrade")


def test_old_workers_forget_too(lab):
    """A worker that still has a stream when the table is outgrown holds no plain key and no second table either."""
    tinyauth = lab.tinyauth()
    stream = hold_stream(tinyauth)
    before = tinyauth.workers()
    tinyauth.publish(KEYS + many_keys(110000, False))
    until(lambda: len(tinyauth.workers()) == 2, "the new worker beside the old one")
    until(lambda: tinyauth.ask("GET", "/t/echo", key="secret-109999-0123456789abcdef").status == 200, "an answer of the new one")
    for pid in before:
        same(holds(pid, b"secret-0000"), [], "plain keys in the old worker's memory")
        same([flags for _, _, flags, name in mappings(pid) if "tinyauth-keys" in name], ["r--s"], "its key tables")
    stream.close()


def test_key_of_the_environment(lab):
    """TINYAUTH_KEY is in no worker's memory."""
    key = "key-of-the-environment-0123456789"
    tinyauth = Server(lab, keys=None, env={"TINYAUTH_KEY": key})
    for pid in tinyauth.workers():
        same(holds(pid, key.encode()), [], "the key in a worker's memory")
    same(tinyauth.ask("GET", "/t/echo", key=key).status, 200, "status")


LEAK = ("import os, socket, sys\n"
        "a, b = socket.socketpair()\n"
        "for number, fd in ((3, os.open('/etc/passwd', os.O_RDONLY)), (9, os.pipe()[1]), (17, a.fileno()),\n"
        "                   (200, os.open(sys.argv[1], os.O_RDWR)), (900, os.open('/', os.O_RDONLY))):\n"
        "    os.dup2(fd, number, inheritable=True)\n"
        "os.execvp(sys.argv[2], sys.argv[2:])\n")


def owned(pid):
    """What a process has open from 3 on: a word and a count for each kind, and all else by name."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if int(fd) < 3:
            continue
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
            link = "socket" if link.startswith("socket:") else link
            found[link] = found.get(link, 0) + 1
    return found


def test_no_foreign_descriptor_in_workers(lab):
    """A parent leaked open files: workers have their listeners, the supervisor's line, the log, the state file and the epoll set,
    and nothing else; so have those of a later generation and of an upgrade."""
    (lab.directory / "foreign").write_text("foreign")
    log, state, pair = lab.path("log"), lab.path("state"), self_signed(lab.directory)
    tinyauth = Server(lab, "-l", f"unix:{lab.path('socket')}", "--log", log, "--state", state, *pair.options, wait=False,
                      before=[sys.executable, "-c", LEAK, lab.path("foreign")], workers=2)
    tinyauth.log = log
    tinyauth.expect("event=")
    until(lambda: tinyauth.events("ready"), "event=ready", 10)
    tinyauth.pid = int(tinyauth.events("ready")[0]["pid"])
    wanted = {"socket": 3, log: 1, state: 1, "anon_inode:[eventpoll]": 1}
    assert "/etc/passwd" in owned(tinyauth.pid), "nothing leaked to the supervisor: this shows nothing"

    def check(when):
        until(lambda: len(tinyauth.workers()) == 2, "two workers")
        for pid in tinyauth.workers():
            until(lambda: "anon_inode:[eventpoll]" in owned(pid), f"an epoll set {when}")
            same(owned(pid), wanted, f"descriptors of a worker {when}")
    check("at start")
    before = tinyauth.workers()
    tinyauth.publish(KEYS + many_keys(110000, True))
    only_new(tinyauth, before)
    check("after the table was outgrown")
    before = tinyauth.workers()
    os.rename(log, log + ".1")
    tinyauth.signal(signal.SIGUSR1)
    until(lambda: os.path.exists(log), "a new log")
    for pid in before:
        until(lambda: log in owned(pid) and log + ".1" not in owned(pid), "the new log in a worker")
    check("after the log was reopened")
    tinyauth.signal(signal.SIGUSR2)
    tinyauth.wait_event("ready", 1, 10)
    only_new(tinyauth, before)
    check("after an upgrade")


def test_look_up_holds_nothing(lab):
    """The child that looks up a name has neither listeners nor keys nor tables, and nothing that leaked."""
    home = Net(lab)
    names = NameServer(lab, home, {A: ["127.0.0.1"], AAAA: []})
    (lab.directory / "foreign").write_text("foreign")
    with home.inside():
        refused = socket.create_server(("127.0.0.1", 0))
        port = refused.getsockname()[1]
        refused.close()
    pair = self_signed(lab.directory)
    encoded = subprocess.run(["openssl", "pkey", "-in", pair.key, "-outform", "DER"], capture_output=True, check=True)
    private = re.search(rb"\x04\x20(.{32})", encoded.stdout, re.S)[1]
    tinyauth = serve_home(lab, home, *pair.options, before=[*with_names(lab), sys.executable, "-c", LEAK, lab.path("foreign")],
                          upstream=f"models.test:{port}", keys=KEYS + many_keys(100, False))
    tinyauth.secure = {tinyauth.address[1]}
    Secure.ports |= tinyauth.secure
    workers = tinyauth.workers()
    assert holds(workers[0], private), "the private key is found nowhere: this shows nothing"
    names.answers[A] = SILENCE              # so that the next one takes its time
    same(begin(tinyauth, home, "/").read().status, 502, "status")
    pid, = until(lambda: set(tinyauth.workers()) - set(workers), "the child that looks up the name", 10)
    until(lambda: len(names.asked) > 2, "its question")
    found = owned(pid)
    pipes = sum(found.pop(link) for link in list(found) if link.startswith("pipe:"))
    same((pipes, set(found)), (1, {"socket"}), "its descriptors: where it answers, and what it asks with")
    same([name for _, _, flags, name in mappings(pid) if "tinyauth" in name and "memfd" in name], [], "its shared mappings")
    same((holds(pid, PLAIN), holds(pid, private)), ([], []), "plain keys and the private key in its memory")


@alone
def test_forbidden_call_is_told(lab):
    """A worker that is made to call execve is killed, and the log has the number of the call."""
    tinyauth = lab.tinyauth()
    tinyauth.expect("event=worker_died")
    worker, = tinyauth.workers()
    words = ("handle SIGSYS nostop noprint pass", 'call (int)execve("/bin/true", 0, 0)')
    done = subprocess.run(["gdb", "-p", str(worker), "-batch", "-nx", *(word for text in words for word in ("-ex", text))], text=True,
                          capture_output=True, timeout=60, stdin=subprocess.DEVNULL, env=environment(DEBUGINFOD_URLS=""))
    try:
        died = tinyauth.wait_event("worker_died")
    except AssertionError as error:
        raise AssertionError(f"{error}; gdb says {(done.stdout + done.stderr)[-600:]!r}") from None
    number = {"x86_64": "59", "aarch64": "221", "riscv64": "221", "armv7l": "11"}[os.uname().machine]
    same(died.get("forbidden_call"), number, f"forbidden_call of {died}")
    until(lambda: tinyauth.ask("GET", "/t/echo").status == 200, "status after it")


# The run

class Strict(Run):
    """What this machine cannot show is a failure."""

    def report(self, test, problems, word, seconds, lab):
        super().report(test, problems + ([word] if word else []), None, seconds, lab)

    def end(self):
        for name in list(Net.made):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        super().end()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tinyauth", metavar="BIN", default=ROOT / "tinyauth")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="")
    options = parser.parse_args()
    missing = [tool for tool in TOOLS if not shutil.which(tool)] + (["root"] if os.geteuid() != 0 else [])
    if missing:
        print(f"FAILED  not here: {', '.join(missing)}\n0 passed, 1 failed")
        return 1
    tests = [test for name, test in globals().items() if name.startswith("test_") and options.pattern in name]
    run = Strict(str(Path(options.tinyauth).resolve()), options.verbose)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: run.abort(f"stopped by signal {number}"))
    watchdog = threading.Timer(WATCHDOG, run.abort, [f"not done after {WATCHDOG} s"])
    watchdog.daemon = True
    watchdog.start()
    run_all(run, tests)
    run.end()
    return 1 if run.failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
