"""A lane: one tinyauth, the raw upstream behind it, and one exchange at a time through both."""

import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tls"))
from cases import KEY, joined, plain
from secure import SecureSocket
from wire import Malformed, read_message

GOOD = b"GET /-good HTTP/1.1\r\nHost: example.com\r\nAuthorization: Bearer " + KEY + b"\r\n\r\n"
PROBE = GOOD.replace(b"/-good", b"/-probe")
OWN_TARGETS = {b"/-good": b"good", b"/-probe": b"probe"}
PATIENCE = 4.0              # seconds until an exchange that should be over is judged as it stands
SILENCE = "silence 30ms"
SPLIT_ALL = 600             # bytes; a longer case is split at its line ends and at 64 points more


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s)", text).groups()
    return int(number) / (1000 if unit == "ms" else 1)


def split_up(data, seed):
    """The pieces that a split run sends one by one."""
    if len(data) <= SPLIT_ALL:
        return [data[i:i + 1] for i in range(len(data))]
    points = set(random.Random(seed).sample(range(1, len(data)), 64))
    for end in re.finditer(rb"\r|\n", data):
        points.update(range(end.start() - 1, end.end() + 2))
    points = sorted(p for p in points if 0 < p < len(data))
    return [data[a:b] for a, b in zip([0, *points], [*points, len(data)])]


class Unread:
    """Asks the kernel (sock_diag) whether the peer of a loopback connection has read all that was sent to it."""

    def __init__(self):
        try:
            self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)
        except (OSError, AttributeError):
            self.netlink = None         # then the split is best effort

    def by_peer_of(self, ours, peer):
        if not self.netlink:
            time.sleep(0.0001)
            return 0
        ports = struct.pack("!HH", peer[1], ours[1])
        hosts = b"".join(socket.inet_aton(host[0]) + bytes(12) for host in (peer, ours))
        request = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + ports + hosts
        request += struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
        self.netlink.send(struct.pack("=IHHII", 16 + len(request), 20, 1, 1, 0) + request)
        reply = self.netlink.recv(4096)
        gone = struct.unpack_from("=H", reply, 4)[0] == 2
        return 0 if gone else struct.unpack_from("=I", reply, 72)[0]

    def close(self):
        if self.netlink:
            self.netlink.close()


class Tinyauth:
    """The program under test: started on a free port, its log collected, stopped by its pid."""

    def __init__(self, binary, keys, upstream_port, options):
        options = [*([] if "--ip-rate" in options else ["--ip-rate", "off"]), *options]
        command = [binary, "-k", keys, "-l", "127.0.0.1:0", "-u", f"127.0.0.1:{upstream_port}", "-w", "1", *options]
        env = {key: value for key, value in os.environ.items() if not key.startswith("TINYAUTH_")}
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, text=True, errors="replace")
        self.lines, self.more, self.ended = [], threading.Condition(), False
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        if not self.wait_log(["event=ready"]):
            self.stop()
            raise RuntimeError("tinyauth did not start: " + " | ".join(self.lines[-3:]))
        listening = next(line for line in self.lines if "event=listening" in line)
        self.port = int(re.search(r"addr=\S*:(\d+)", listening)[1])

    def read_log(self):
        for line in self.process.stderr:
            with self.more:
                self.lines.append(line.rstrip("\n"))
                self.more.notify_all()
        with self.more:
            self.ended = True
            self.more.notify_all()

    def wait_log(self, words, since=0, timeout=5.0):
        """Waits for a line that holds all words; False when none came."""
        def found():
            return any(all(word in line for word in words) for line in self.lines[since:])
        with self.more:
            self.more.wait_for(lambda: found() or self.ended, timeout)
            return found()

    def stop(self):
        """Ends it and returns what its log should not hold."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(3)
        return [line for line in self.lines if not line.startswith("time=") or "event=worker_died" in line]


class Lane:
    """`secure`: the certificate and key with which clients speak TLS, or nothing."""

    def __init__(self, binary, keys, options=(), listener="open", secure=None):
        self.secure = secure
        self.listener = socket.socket()
        self.fillers = []
        self.listener.bind(("127.0.0.1", 0))
        if listener != "refused":
            self.listener.listen(0 if listener == "full" else 64)
        self.listener.setblocking(False)
        if listener == "full":
            self.fill_backlog()
        self.accepts = listener == "open"
        self.unread = Unread()
        try:
            self.tinyauth = Tinyauth(binary, keys, self.listener.getsockname()[1], [*options, *(secure.options if secure else [])])
        except BaseException:
            self.close_sockets()
            raise

    def fill_backlog(self):
        """Connects until the kernel takes no more, so that the next connect hangs."""
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self.listener.getsockname())
            self.fillers.append(filler)

    def drop_stale(self):
        """Nobody has taken yet what the last exchange's client left behind at once."""
        while self.accepts:
            try:
                self.listener.accept()[0].close()
            except BlockingIOError:
                break

    def close_sockets(self):
        for sock in (self.listener, *self.fillers):
            sock.close()
        self.unread.close()

    def close(self):
        try:
            return self.tinyauth.stop()
        finally:
            self.close_sockets()


class Sender:
    """Sends pieces over a socket, one by one, and obeys the marks between them."""

    def __init__(self, exchange, sock, peer, split):
        self.exchange, self.sock, self.split = exchange, sock, split
        self.ours, self.peer = sock.getsockname(), peer
        self.queue, self.dead, self.blocked, self.sent = deque(), False, False, False
        self.since = None           # when the waiting for the front of the queue began
        self.allowance = 1.0        # seconds that may in all be spent waiting for the peer to read
        self.noise = 0

    def push(self, pieces):
        for number, piece in enumerate(pieces):
            if isinstance(piece, bytes) and self.split:
                self.queue.extend(split_up(piece, f"{self.exchange.case.name} {number}"))
            else:
                self.queue.append(piece)

    def turn(self, now):
        """Sends what may be sent now; true when something was."""
        moved, self.blocked = False, False
        while self.queue and not self.dead:
            piece = self.queue[0]
            if self.since is None:
                self.since, self.noise = now, self.exchange.noise()
            done = self.send(piece, now) if isinstance(piece, bytes) else self.obey(piece, now)
            if not done:
                break
            moved, self.since = True, None
            self.queue.popleft()
        return moved

    def send(self, piece, now):
        if self.split and not self.drained(now):
            return False
        try:
            count = self.sock.send(piece)
        except BlockingIOError:
            self.blocked = True
            return False
        except OSError:
            self.dead = True
            return False
        self.sent = True
        if count < len(piece):
            self.queue[0] = piece[count:]
            self.blocked = True
        return count == len(piece)

    def drained(self, now):
        """Whether the peer has read all; also true when it will not read for now."""
        if not self.sent or self.allowance <= 0:
            return True
        if self.exchange.lane.unread.by_peer_of(self.ours, self.peer) == 0:
            return True
        if now - self.since > 0.05:
            self.allowance -= now - self.since
            return True
        return False

    def obey(self, mark, now):
        word, _, rest = mark.partition(" ")
        if word.isdigit() or word in ("answered", "forwarded", "whole"):
            return self.exchange.has_come(word)
        if word not in ("fin", "close") and not self.drained(now):
            return False
        if word in ("wait", "quiet", "silence"):
            return self.pause(word, seconds(rest), now)
        if word == "fin":
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:             # it was reset
                self.dead = True
            return True
        if word == "rst":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            getattr(self.sock, "raw", self.sock).close()
        self.sock.close()
        self.dead = True
        return True

    def pause(self, word, length, now):
        if word != "wait" and self.exchange.noise() != self.noise:
            self.exchange.complaints.append("an answer before the offending byte" if word == "silence" else "bytes before they were due")
            self.noise = self.exchange.noise()
        return now - self.since >= length or self.exchange.ended


class Upstream:
    """One connection that tinyauth made to the upstream."""

    def __init__(self, exchange, sock, peer):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.exchange, self.sock = exchange, sock
        self.data, self.at, self.ended, self.malformed = bytearray(), 0, False, ""
        self.head_seen = self.silent = self.tunnel = False
        self.requests = []
        self.sender = Sender(exchange, sock, peer, exchange.way == "split")

    def read(self):
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.ended = not data
        self.data += data
        while not self.tunnel and not self.malformed and self.read_request():
            pass

    def read_request(self):
        """Reads one request from what has come and answers it; true when it was whole."""
        try:
            request = read_message(self.data, self.at, "request")
        except Malformed as error:
            self.malformed = str(error)
            return False
        if not request:
            return False
        if not self.head_seen:
            self.head_seen = True
            self.exchange.heads += request.target not in OWN_TARGETS
            self.answer(request, "head")
        if request.whole:
            self.at, self.head_seen = request.end, False
            self.requests.append(request)
            self.exchange.requests.append((request, self))
            self.answer(request, "whole")
        return request.whole

    def answer(self, request, when):
        body = OWN_TARGETS.get(request.target)
        script = self.exchange.script
        if body:
            self.send_plain(request, body, when)
        elif script and script[0].when == "never":
            self.silent = True
        elif script and script[0].when == when and not self.silent:
            self.send_scripted(request, script.pop(0))
        elif not self.silent and not script:
            self.send_plain(request, b"ok", when)
        if when == "whole":
            self.silent = False

    def send_scripted(self, request, answer):
        self.silent = answer.only
        head = b"".join(piece for piece in answer.pieces if isinstance(piece, bytes))
        self.tunnel = bool(request.values("Upgrade")) and head.startswith(b"HTTP/1.1 101 ")
        self.sender.push(answer.pieces)
        if self.tunnel:
            self.at = request.end

    def send_plain(self, request, body, when):
        if when == "whole":
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            # the request says that it is the connection's last; there are servers that do not act on it
            self.sender.push([head if request.start.startswith(b"HEAD ") else head + body, *([] if self.sender.split else ["fin"])])

    def rest(self):
        return bytes(self.data[self.at:])

    def is_closed(self):
        return self.ended or self.sender.dead

    def served_case(self):
        """Whether it carried anything besides the runner's own good requests."""
        return bool(self.rest()) or any(request.target not in OWN_TARGETS for request in self.requests)


class Exchange:
    """One case in one way: the client, the upstream, and all that passed."""

    def __init__(self, lane, case, way):
        self.lane, self.case, self.way = lane, case, way
        self.complaints, self.requests, self.upstreams, self.heads = [], [], [], 0
        self.script = list(case.answers)
        self.got, self.at, self.ended, self.reset = bytearray(), 0, False, False
        self.responses, self.partial, self.tunnel, self.probed = [], None, None, False
        self.expect = ([None] if way == "pipelined" else []) + case.expect
        self.end = "leave" if way == "keyless" else case.end
        self.log_from = len(lane.tinyauth.lines)
        self.started = time.monotonic()
        times = case.get("time").split()
        self.deadline = self.started + (seconds(times[1]) + 1 if times else PATIENCE)
        lane.drop_stale()
        self.held = [socket.create_connection(("127.0.0.1", lane.tinyauth.port)) for _ in range(int(case.get("hold") or 0))]
        self.client = socket.create_connection(("127.0.0.1", lane.tinyauth.port), PATIENCE)
        if lane.secure:
            self.client = SecureSocket(self.client)
        self.client.setblocking(False)
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sender = Sender(self, self.client, self.client.getpeername(), way == "split")
        self.sender.push(client_pieces(case, way))

    def run(self):
        try:
            while not self.is_over() and time.monotonic() < self.deadline and not self.complaints:
                self.turn(self.deadline - time.monotonic())
            self.took = time.monotonic() - self.started
            self.timed_out = not self.is_over()
            self.turn(0)
            self.turn(0)
            self.leave()
        finally:
            for sock in (self.client, *self.held, *(up.sock for up in self.upstreams)):
                sock.close()

    def leave(self):
        """The client goes: tinyauth must close what it had opened for it."""
        self.client.close()
        limit = time.monotonic() + 1.0
        while not all(up.is_closed() for up in self.upstreams) and time.monotonic() < limit:
            self.turn(limit - time.monotonic())
        if not all(up.is_closed() for up in self.upstreams):
            self.complaints.append("an upstream connection is left open after the client went")

    def turn(self, timeout):
        now = time.monotonic()
        senders = [self.sender, *(up.sender for up in self.upstreams)]
        moved = [sender.turn(now) for sender in senders]
        waiting = any(sender.queue and not sender.dead for sender in senders)
        timeout = 0 if any(moved) else min(timeout, 0.0002) if waiting else min(timeout, 0.1)
        readable = {up.sock: up.read for up in self.upstreams if not up.ended and up.sock.fileno() >= 0}
        if not self.ended and self.client.fileno() >= 0:
            readable[self.client] = self.read
        if self.lane.accepts:
            readable[self.lane.listener] = self.accept
        writable = [sender.sock for sender in senders if sender.blocked and not sender.dead]
        for sock in select.select(list(readable), writable, [], max(timeout, 0))[0]:
            readable[sock]()

    def accept(self):
        try:
            sock, peer = self.lane.listener.accept()    # it may have ended already: then it has no name to be asked for
        except BlockingIOError:
            return
        up = Upstream(self, sock, peer)
        self.upstreams.append(up)
        if self.script and self.script[0].when == "accept":
            up.sender.push(self.script.pop(0).pieces)

    def read(self):
        try:
            data = self.client.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:                 # over TLS an end without close_notify is as good as a reset
            data, self.reset = b"", True
        self.ended = not data
        self.got += data
        try:
            while self.tunnel is None and self.read_response():
                pass
        except Malformed as error:
            self.complaints.append(f"the client got a malformed answer: {error}")

    def read_response(self):
        number = len(self.finals())
        expected = self.expect[number] if number < len(self.expect) else None
        self.partial = read_message(self.got, self.at, "response", bool(expected and expected.to_head), self.ended)
        if not self.partial or not self.partial.whole:
            return False
        self.responses.append(self.partial)
        self.at, self.partial = self.responses[-1].end, None
        if self.responses[-1].status == 101:
            self.tunnel = self.at
        return self.at < len(self.got)

    def finals(self):
        return [r for r in self.responses if r.status >= 200 or r.status == 101]

    def wanted_finals(self):
        return sum(1 for e in self.expect if e is None or (not e.optional and (min(e.statuses) >= 200 or 101 in e.statuses)))

    def has_come(self, what):
        """Whether what a mark waits for is there; also when it never will be."""
        if what == "forwarded":
            return self.heads > 0 or self.refused()
        if what == "whole":
            return bool([r for r, _ in self.requests if r.target not in OWN_TARGETS]) or self.refused()
        if what == "answered":
            return len(self.finals()) > (self.way == "pipelined") or self.refused()
        heads = self.responses + ([self.partial] if self.partial else [])
        return any(r.status == int(what) and self.past_good(r) for r in heads) or self.refused()

    def past_good(self, response):
        return self.way != "pipelined" or response is not (self.responses[0] if self.responses else self.partial)

    def refused(self):
        return self.ended or any(r.status >= 400 for r in self.responses)

    def noise(self):
        """A number that changes when bytes arrive from tinyauth on the side that should be quiet."""
        return len(self.got) if self.way == "at" else sum(1 + len(up.data) for up in self.upstreams)

    def is_over(self):
        if self.sender.queue and not self.sender.dead:
            return False
        return not self.upstream_must_end() and self.client_is_done()

    def upstream_must_end(self):
        """Whether tinyauth still has to close a connection that served this case."""
        due = self.case.upstream_cut or self.case.get("upstream-end") == "closed"
        return due and self.way != "keyless" and any(up.served_case() and not up.is_closed() for up in self.upstreams)

    def client_is_done(self):
        if self.end in ("gone", "cut", "close"):
            return self.ended or (self.end == "gone" and self.sender.dead) or (self.end == "cut" and self.is_bad_gateway())
        if self.ended:
            return True
        if len(self.finals()) < self.wanted_finals():
            return False
        if self.end == "leave":
            return True
        if self.end == "tunnel":
            return self.tunnel_is_done()
        return self.probe_is_done()

    def is_bad_gateway(self):
        return bool(self.responses) and self.responses[-1].status == 502 and self.partial is None

    def tunnel_is_done(self):
        wanted = [f.tunnel for f in self.case.forwarded if f.tunnel is not None]
        there = self.tunnel is not None and len(self.got) - self.tunnel >= len(plain(self.case.get("tunnel")))
        return there and all(up.tunnel and len(up.rest()) >= len(w) for w in wanted for up in self.upstreams[-1:])

    def probe_is_done(self):
        """An open connection shows itself by answering one more request."""
        if not self.probed:
            self.probed = True
            self.sender.push([PROBE])
            return False
        return bool(self.finals()) and self.finals()[-1].body == OWN_TARGETS[b"/-probe"]


def client_pieces(case, way):
    pieces = case.keyless_pieces if way == "keyless" else case.pieces
    if way == "at":
        return pieces_to_offence(pieces)
    pieces = [p for p in pieces if p not in ("!", ".")]
    return joined(([GOOD] if way == "pipelined" else []) + pieces)


def pieces_to_offence(pieces):
    """All before the offending byte, a time in which nothing may be answered, and that byte."""
    pieces = pieces[:pieces.index("!")]
    if "." not in pieces:
        pieces = [*pieces[:-1], pieces[-1][:-1], ".", pieces[-1][-1:]]
    return [SILENCE if piece == "." else piece for piece in pieces if piece != b""]
