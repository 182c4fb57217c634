#!/usr/bin/env python3
"""A swarm: many hostile and honest clients at once, while keys, log, binary, workers and upstream change under them.

    python3 tests/faults/swarm.py [--tinyauth BIN] [--seed N] [--seconds S] [--tls] [PATTERN]

A round is one tinyauth with two workers and a small pool, so that places are used again all the time and the border between
poll and epoll is crossed often. All is chosen by dice from the seed, which is printed; only the timing differs in a
repetition. Every request has an id of its own, in X-Request-Id and mostly in the answer's body, and whether it may reach the
model is known. So is at the end: that nothing else reached it, nothing twice, no answer went astray, and each has its line in
the log. Best with `make SANITIZE=1`. The last line is `N passed, N failed`.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tls")]
from e2e import (ALICE, BOB, EVENTS, KEYS, WRONG, Answer, Cut, Run, Secure, alive, children, parse_line, request,  # noqa: E402
                 same)
from model import pattern  # noqa: E402
from run import limited  # noqa: E402
from secure import client_context, self_signed  # noqa: E402

POOLS = {"8": (), "33": (), "40": (), "64": (), "few_descriptors": ("-n 60",)}    # -n, and a limit to start under
CROWDS = (0, 0, 3, 12, 40, 90, 150)     # connections at one time; 0: all leave and the workers have to be empty
SOURCES = 120                           # addresses of the clients
IP_CONNS = 8
PATIENCE = 30                           # seconds without a byte that are a problem
STAMPEDE = 1300                         # connections at once
FLOOD = 2500                            # requests of each: 80 KB
MOST = 20000                            # clients of a round
REFUSED = {408, 429, 502, 503, 504}     # what a fault elsewhere may make of a good request
OPTIONS = ("--ip-conns", str(IP_CONNS), "--ip-burst", "100", "--header-timeout", "1500ms", "--keepalive-timeout", "4s",
           "--first-byte-timeout", "2s", "--idle-timeout", "3s", "--drain-timeout", "5s")
LANE = "127.8.8.8"                      # the one address that runs into its limits
KNOWN = EVENTS | {"worker_died", "turned_away", "tls_failed", "accept_paused", "log_dropped", "sandbox_missing"}


class Asked:
    """One request: its bytes, whether it may reach the model, what its answer may be, and what came."""

    def __init__(self, data, number, method, target, key, source, **more):
        self.data, self.id, self.method, self.target, self.key, self.source = data, number, method, target, key, source
        self.good = more.get("good", True)              # it may reach the model
        self.whole = more.get("whole", True)            # and so may the end of its body
        self.statuses = more.get("statuses", {200})     # of its answer; for a good one those of REFUSED as well
        self.check = more.get("check")                  # of an answer with status 200
        self.unframed = more.get("unframed", False)     # the model's end is all that ends it
        self.status = self.at = self.wire = None


class Wire:
    """One connection of the swarm, plain or over TLS."""

    def __init__(self, swarm, source, rcvbuf=None):
        self.swarm, self.source, self.kills = swarm, source, swarm.kills
        self.loop, self.began = asyncio.get_running_loop(), time.monotonic()
        self.sock, self.tls, self.buffer, self.answers = socket.socket(), None, bytearray(), 0
        self.sending = asyncio.Lock()
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        if rcvbuf:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.sock.bind((source, 0))

    async def open(self, secure=True):
        await self.loop.sock_connect(self.sock, self.swarm.tinyauth.address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if Secure.pair and secure:
            self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self.tls = client_context().wrap_bio(self.incoming, self.outgoing)
            while (data := await self.step(self.tls.do_handshake)) is False:
                await self.pull()
        return self

    async def step(self, call, *args):
        """One call of the TLS side and what it has to send; False: it wants to read first."""
        try:
            done = call(*args)
        except ssl.SSLWantReadError:
            done = False
        except ssl.SSLZeroReturnError:
            raise Cut("eof") from None
        except ssl.SSLEOFError:
            raise Cut("ragged") from None
        except ssl.SSLError as error:       # turned away without an answer
            assert "ALERT_INTERNAL_ERROR" in str(error), f"TLS: {error}"
            raise Cut("alert") from None
        if self.outgoing.pending:
            await self.raw_send(self.outgoing.read())
        return done

    async def pull(self):
        async with asyncio.timeout(PATIENCE):
            data = await self.loop.sock_recv(self.sock, 1 << 16)
        if self.tls:
            self.incoming.write(data) if data else self.incoming.write_eof()
        return data

    async def raw_send(self, data):
        async with self.sending, asyncio.timeout(PATIENCE):
            await self.loop.sock_sendall(self.sock, data)

    async def send(self, *pieces):
        for piece in pieces:
            if self.tls:
                self.tls.write(piece)
                piece = self.outgoing.read()
            await self.raw_send(piece)

    async def fill(self):
        try:
            while self.tls and not (data := await self.step(self.tls.read, 1 << 16)):
                if data == b"":
                    raise Cut("eof")
                await self.pull()
            data = data if self.tls else await self.pull()
        except ConnectionError:
            raise Cut("reset") from None
        if not data:
            raise Cut("eof")
        self.buffer += data

    async def until(self, mark):
        while (end := self.buffer.find(mark)) < 0:
            await self.fill()
        return self.take(end, len(mark))

    def take(self, size, mark=0):
        data = bytes(self.buffer[:size])
        del self.buffer[:size + mark]
        return data

    async def exactly(self, size):
        while len(self.buffer) < size:
            await self.fill()
        return self.take(size)

    async def read(self, method="GET"):
        """A whole answer with the interim ones before it."""
        interim = []
        while (answer := Answer(await self.until(b"\r\n\r\n"))).status < 200 and answer.status != 101:
            interim.append(answer)
        answer.interim = interim
        if method == "HEAD" or answer.status in (101, 204, 304):
            return answer
        if answer.chunked:
            while size := int(await self.until(b"\r\n"), 16):
                answer.body += await self.exactly(size)
                same(await self.until(b"\r\n"), b"", "after chunk data")
            same(await self.until(b"\r\n"), b"", "after the last chunk")
        elif (length := answer.get("Content-Length")) is not None:
            answer.body = await self.exactly(int(length))
        else:
            try:
                await self.to_end()
            except Cut as cut:              # the end of a killed process is as clean as any other
                if str(cut) != "eof" or self.kills != self.swarm.kills:
                    raise
            answer.body = self.take(len(self.buffer))
        return answer

    async def to_end(self):
        """Reads until the end, which Cut tells."""
        while True:
            await self.fill()

    async def answer_to(self, asked):
        """The answer to one request; whose is it, and is it right?"""
        answer = await self.read(asked.method)
        self.answers += 1
        if answer.get("X-Request-Id") != asked.id:      # turned away, or the head was late
            assert answer.closes and (answer.status == 408 or (answer.status in (429, 503) and self.answers == 1)), \
                f"{asked.method} {asked.target} {asked.id}: a foreign answer {answer.status} {answer.fields}"
            raise Cut(f"turned away with {answer.status}")
        wanted = asked.statuses | REFUSED if asked.good else asked.statuses | {429, 503, 408}
        assert answer.status in wanted, f"{asked.method} {asked.target}: status {answer.status}, not one of {wanted}"
        asked.status, asked.at, asked.wire = answer.status, time.monotonic(), self
        if answer.status == 200 and asked.check:
            try:
                asked.check(answer)
            except (AssertionError, ValueError) as error:
                if asked.unframed and asked.restarts != self.swarm.restarts:    # a killed model ends as well as any
                    raise Cut("cut by the model") from None
                what = f"{asked.method} {asked.target}: {error}, {len(answer.body)} bytes {answer.body[:300]}"
                raise AssertionError(what) from None
        self.swarm.whole += asked.status == 200 and asked.good
        if answer.closes:
            raise Cut("closes")
        return answer

    def half_close(self):
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        self.sock.close()


class Logs:
    """The log file and those that it was renamed to, read as they grow."""

    def __init__(self, path):
        self.path, self.at, self.records, self.torn = path, {path: 0}, [], []

    def rename(self):
        fresh = f"{self.path}.{len(self.at)}"
        os.rename(self.path, fresh)
        self.at[fresh], self.at[self.path] = self.at[self.path], 0

    def read(self):
        for path, at in self.at.items():
            if not os.path.exists(path):
                continue
            with open(path, "rb") as file:
                file.seek(at)
                data = file.read()
            end = data.rfind(b"\n") + 1
            self.at[path] += end
            for line in data[:end].splitlines():
                self.records.append(parse_line(line))
                if not self.records[-1]:
                    self.torn.append(line)
        return self.records

    def events(self, name):
        return [record for record in self.read() if record.get("event") == name]


class Swarm:
    """One round: a tinyauth with its model, the clients, the conductor, and the books that are kept."""

    def __init__(self, lab, dice, pool, limit):
        self.lab, self.dice, self.seed = lab, dice, dice.random()
        self.asked, self.problems, self.whole = {}, [], 0
        self.kills, self.kill_times, self.killed, self.started = 0, [], set(), 0
        self.visitors, self.visitor = 0, None           # keys that come and go; the one that is in force
        self.running, self.busy, self.gathered, self.throng = set(), True, 0, asyncio.Lock()
        path = lab.path("log")
        more = {"binary": limited(lab, limit)} if limit else {}
        self.tinyauth, self.model = lab.pair("-n", pool, "--log", path, *OPTIONS, workers=2, ip_rate="100/s", log=path, **more)
        self.logs = Logs(path)
        self.lost = {} if not limit else {"upgrade_refused"}   # events that may happen besides
        self.restarts, self.base = 0, None

    # books

    def ask(self, source, method="GET", target="/t/echo", *fields, key=ALICE, body=None, chunked=False, version="1.1", **more):
        number = f"s{len(self.asked)}"
        data = request(method, target, f"X-Request-Id: {number}", *fields, key=key, body=body, chunked=chunked, version=version)
        asked = self.asked[number] = Asked(data, number, method, target, key, source, **more)
        asked.restarts = self.restarts
        return asked

    def note(self, text):
        if len(self.problems) < 12:
            self.problems.append(text)

    # processes

    def workers(self):
        """Those that live, the oldest first: before the last two are such as drain."""
        living = children(self.tinyauth.pid)
        return [pid for record in self.logs.events("worker_started") if (pid := int(record["pid"])) in living]

    @staticmethod
    def descriptors(pid):
        found = {"socket": 0, "other": 0}
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found["socket" if os.readlink(f"/proc/{pid}/fd/{entry}").startswith("socket:") else "other"] += 1
        return found

    async def wait(self, look, what, seconds=20):
        end = time.monotonic() + seconds
        while not (value := look()):
            assert time.monotonic() < end, f"no {what} within {seconds} s"
            await asyncio.sleep(0.01)
        return value

    def empty(self):
        """Do two workers run, and none has a connection?"""
        with contextlib.suppress(OSError):
            workers = self.workers()
            return len(workers) == 2 and all(self.descriptors(pid) == self.base for pid in workers)

    async def settle(self, when):
        try:
            await self.wait(self.empty, "empty workers")
        except AssertionError as error:
            found = {pid: self.descriptors(pid) for pid in self.workers()}
            raise AssertionError(f"{when}: {error}: descriptors {found}, at the start {self.base}") from None

    # the crowd

    async def client(self, number, script=None):
        dice = random.Random(f"{self.seed} {number}")
        script = script or dice.choices(list(SCRIPTS), list(SCRIPTS.values()))[0]
        wire = Wire(self, f"127.1.0.{dice.randrange(SOURCES) + 1}" if script is not lane else LANE,
                    dice.choice((None, None, 1 << 15)))
        try:
            await script(self, await wire.open(script not in NO_TLS), dice)
        except TimeoutError:
            self.note(f"{script.__name__} {number}: nothing for {PATIENCE} s")
        except (Cut, OSError):
            pass
        except (AssertionError, ValueError, KeyError) as error:
            self.note(f"{script.__name__} {number}: {type(error).__name__} {error}"[:500])
        finally:
            wire.reset() if dice.random() < 0.3 else wire.close()

    def launch(self, script=None):
        self.started += 1
        return asyncio.create_task(self.client(self.started, script))

    async def crowd(self):
        """Clients come and go in tides until the time is over."""
        while time.monotonic() < self.end and self.started < MOST and not self.problems:
            size, until = self.dice.choice(CROWDS), time.monotonic() + self.dice.uniform(0.1, 0.8)
            rush = self.dice.choice((None, None, None, health, health, lane, pipeline))     # all of one kind
            for task in self.dice.sample(sorted(self.running, key=id), max(0, len(self.running) - size)):
                task.cancel()
            while size and time.monotonic() < until and not self.problems:
                for _ in range(size - len(self.running)):
                    self.running.add(task := self.launch(rush))
                    task.add_done_callback(self.running.discard)
                await asyncio.sleep(0.01)
            if not size:
                await self.leave()

    async def leave(self):
        """All go away at once, wherever they are."""
        for task in self.running:
            task.cancel()
        while self.running:
            await asyncio.wait(self.running)
        async with self.throng:
            await self.settle("while nobody is there")

    # the conductor

    async def conduct(self):
        actions = {self.new_keys: 5, self.new_log: 3, self.freeze: 6, self.new_model: 2, self.new_binary: 2}
        deck = [action for action, count in actions.items() for _ in range(count)]
        self.dice.shuffle(deck)
        for action in (self.kill, self.stampede):
            deck.insert(self.dice.randrange(6), action)
        while self.busy and not self.problems:
            await (deck.pop(0) if deck else self.freeze)()
            await asyncio.sleep(self.dice.uniform(0.02, 0.4))

    async def new_keys(self):
        """One visitor's key ends and another one's begins; both may be either until the log says so."""
        seen, self.visitor = len(self.logs.events("keys_published")), None
        self.visitors += 1
        others = "".join(f"other{i} {ALICE}-{i}\n" for i in range(self.visitors % 5))
        self.lab.write(self.tinyauth.keys, f"{KEYS}visitor{self.visitors} {self.visitor_key(self.visitors)}\n{others}")
        self.tinyauth.signal(signal.SIGHUP)
        await self.wait(lambda: [event for event in self.logs.events("keys_published")[seen:]
                                 if int(event["keys"]) == 4 + self.visitors % 5], "event=keys_published")
        self.visitor = self.visitors

    def visitor_key(self, number):
        return f"visitor-{number}-{self.seed}"

    async def new_log(self):
        seen = len(self.logs.events("log_reopened"))
        self.logs.rename()
        self.tinyauth.signal(signal.SIGUSR1)
        await self.wait(lambda: self.logs.events("log_reopened")[seen:], "event=log_reopened")

    async def new_binary(self):
        """Half of the time other signals come at the same moment."""
        seen = {name: len(self.logs.events(name)) for name in ("ready", "upgrade_refused")}
        self.tinyauth.signal(signal.SIGUSR2)
        if self.dice.random() < 0.5:
            self.tinyauth.signal(signal.SIGHUP)
            self.tinyauth.signal(signal.SIGUSR1)
        await self.wait(lambda: any(self.logs.events(name)[count:] for name, count in seen.items()), "end of the upgrade")

    async def freeze(self):
        pid = self.dice.choice(self.workers() or [0])
        await self.held([pid] if pid else [], asyncio.sleep(self.dice.uniform(0.05, 0.4)))

    async def stampede(self):
        """Very many with very much to ask wait at the door while nobody opens; then one worker gets them all."""
        workers, self.gathered = self.workers(), 0
        tasks = []

        async def throng():
            tasks.extend(self.launch(flood) for _ in range(STAMPEDE))
            await self.wait(lambda: self.gathered >= STAMPEDE, "clients")
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[-1], signal.SIGCONT)
            await asyncio.wait(tasks, timeout=PATIENCE)

        async with self.throng:
            began = time.monotonic()
            await self.held(workers, throng())
            self.end += time.monotonic() - began        # what it took is not lost for the others

    async def held(self, pids, what):
        """Something while some workers stand still."""
        try:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            return await what
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def kill(self):
        for pid in self.workers()[:1]:
            self.kills += 1
            self.kill_times.append(time.monotonic())
            self.killed.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await self.wait(lambda pid=pid: not alive(pid), "end of a killed worker")

    async def new_model(self):
        self.restarts += 1
        self.model.stop()
        await asyncio.sleep(self.dice.uniform(0, 0.2))
        await asyncio.to_thread(self.model.__init__, self.model.log.parent, "--port", str(self.model.port))

    # the end

    async def serves_alone(self, pid, workers):
        """While the others stand still, one worker has more connections than fit in its poll set, then few, and answers all."""
        wires = []

        async def ask(wire):
            asked = self.ask(wire.source, "POST", body=b"alone", check=lambda answer: same(answer.json()["length"], 5, "length"))
            await wire.send(asked.data)
            same((await wire.answer_to(asked)).status, 200, "status")

        async def ask_all():
            try:
                for number in range(40):
                    wires.append(Wire(self, f"127.2.{number // 8}.1"))
                    await ask(await wires[-1].open())
                for wire in wires[:-5]:
                    wire.close()
                for wire in wires[-5:]:
                    await ask(wire)
            except (Cut, OSError) as error:
                raise AssertionError(f"worker {workers.index(pid)} alone, connection {len(wires)}: {error!r}") from None
            finally:
                for wire in wires:
                    wire.close()

        await self.held([other for other in workers if other != pid], ask_all())

    async def admits(self, source):
        """All the connections that an address may have, at once."""
        wires = []
        try:
            for _ in range(IP_CONNS):
                wires.append(await Wire(self, source).open())
                await wires[-1].send(request("GET", "/health", key=None))
                same((await wires[-1].read()).status, 200, f"connection {len(wires)} of {source} afterwards")
        finally:
            for wire in wires:
                wire.close()

    async def begin(self):
        """What a worker has open when it serves: looked at while it has one connection, which is one too many."""
        workers = self.workers()

        async def look(pid):
            with contextlib.closing(Wire(self, LANE)) as wire:
                await (await wire.open()).send(HEALTH)
                await healthy(wire, 1)
                found = self.descriptors(pid)
            return {**found, "socket": found["socket"] - 1}

        looks = [await self.held([other for other in workers if other != pid], look(pid)) for pid in workers]
        same(looks[0], looks[1], "descriptors of two workers at the start")
        self.base = looks[0]
        await self.settle("at the start")

    async def play(self, seconds):
        await self.begin()
        self.end = time.monotonic() + seconds
        conductor = asyncio.create_task(self.conduct())
        await self.crowd()
        self.busy = False
        await conductor
        if self.running:                    # who is honest gets an end by itself
            await asyncio.wait(self.running, timeout=2 * PATIENCE)
        if self.running:
            self.note(f"{len(self.running)} clients without an end")
        same(self.problems, [], "problems of clients")
        await self.leave()
        for source in [LANE, *(f"127.1.0.{i + 1}" for i in range(0, SOURCES, 10 if Secure.pair else 1))]:
            await self.admits(source)
        workers = self.workers()
        for pid in workers:
            await self.settle("after the swarm")
            await self.serves_alone(pid, workers)
        await self.settle("at the end")
        same(set(self.workers()), set(workers), "workers")
        await self.stop()
        same(self.problems, [], "problems of clients at the end")

    async def stop(self):
        """TERM with a crowd in full swing."""
        self.running = {self.launch() for _ in range(60)}
        await asyncio.sleep(self.dice.uniform(0, 0.5))
        self.tinyauth.signal(signal.SIGTERM)
        await self.wait(lambda: self.tinyauth.process.poll() is not None, "exit after TERM", 5 + PATIENCE)
        same(self.tinyauth.process.returncode, 0, "exit status")
        await asyncio.wait(self.running)

    def check_model(self):
        """Only requests with a good key reached the model, none twice, as they were sent and with the right address."""
        current, seen = {}, {}
        for line in self.model.log.read_bytes().splitlines():
            event = json.loads(line)
            if event["what"] == "request":
                names = {name.lower(): value for name, value in event["headers"]}
                asked = current[event["conn"]] = self.asked[names["x-request-id"]]
                what = f"{asked.method} {asked.target} {asked.id}"
                seen[asked.id] = seen.get(asked.id, 0) + 1
                assert asked.good, f"{what}, without a good key, reached the model"
                assert seen[asked.id] <= (1 if asked.method == "POST" else 2), f"{what} reached the model {seen[asked.id]} times"
                same((event["method"], event["target"], names["x-real-ip"]), (asked.method, asked.target, asked.source), what)
                assert not {"authorization", "x-api-key"} & set(names), f"{what}: a key reached the model"
            elif event["what"] == "body":
                asked = current[event["conn"]]
                assert asked.whole, f"{asked.method} {asked.target} {asked.id}: a cut body became whole"

    def check_log(self):
        """Every line is whole, says what the client saw, and none is missing."""
        lines, records = {}, self.logs.read()
        names = {ALICE: "alice", BOB: "bob", **{self.visitor_key(i): f"visitor{i}" for i in range(1, self.visitors + 1)}}
        same(self.logs.torn, [], "lines that are not whole")
        for record in records:
            if "method" not in record:
                assert record.get("event") in KNOWN or record["event"] in self.lost, f"event {record}"
                continue
            assert record["path"] != "/health", "a line for /health"
            if asked := self.asked.get(record["id"]):
                assert asked.id not in lines, f"two lines for {asked.id}: {record}"
                lines[asked.id] = record
                seen = (record["status"], record["addr"], record["method"], record["path"])
                wanted = (str(asked.status or record["status"]), asked.source, asked.method, asked.target.partition("?")[0])
                same(seen, wanted, f"line for {asked.id}")
                name = names.get(asked.key, "-")
                assert record["key"] in ("-", name)[asked.status == 200:], f"not {name}: {record}"
        for record in self.logs.events("worker_died"):
            assert int(record["pid"]) in self.killed and record["signal"] == "9", f"a worker died by itself: {record}"
        dropped = sum(int(record["lines"]) for record in self.logs.events("log_dropped"))
        missing = [asked.id for asked in self.asked.values() if asked.status and asked.id not in lines
                   and not any(asked.wire.began <= at <= asked.at + 5 for at in self.kill_times)]
        assert len(missing) <= dropped, f"no line for {missing[:9]}, {len(missing)} in all; {dropped} dropped"


# What a client does. Its connection is closed or reset afterwards, or in the middle.

def pieces(dice, data):
    """The same bytes in one write, in a few, or byte by byte."""
    kind = dice.random()
    if kind < 0.6 or len(data) < 3:
        return [data]
    if kind < 0.85 or len(data) > 3000:
        edges = [0, *sorted(dice.sample(range(1, len(data)), min(4, len(data) - 1))), len(data)]
    else:
        edges = range(len(data) + 1)
    return [data[start:end] for start, end in zip(edges, edges[1:])]


async def finish(wire, dice):
    """However a client may go."""
    kind = dice.random()
    if kind < 0.3:
        wire.half_close()
    if kind < 0.5:
        with contextlib.suppress(Cut):
            await wire.to_end()


def raw(swarm, source, dice):
    """An answer that is made here to the last byte, in each framing."""
    text = f"{source} {len(swarm.asked)} ".encode() * dice.randrange(1, 200)
    framing = dice.randrange(3)
    if framing == 0:
        answer = b"Content-Length: %d\r\n\r\n%b" % (len(text), text)
    elif framing == 1:
        step = dice.randrange(1, len(text) + 1) if len(text) < 300 else dice.randrange(50, len(text))
        chunks = [text[i:i + step] for i in range(0, len(text), step)] + [b""]
        answer = b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    else:
        answer = b"Connection: close\r\n\r\n" + text
    field = "X-Test-Raw: " + base64.b64encode(b"HTTP/1.1 200 OK\r\n" + answer).decode()
    then = "X-Test-Then: " + ("keep" if framing < 2 else "close")
    return swarm.ask(source, "GET", f"/t/raw?{len(swarm.asked)}", field, then, unframed=framing == 2,
                     check=lambda answer: same(answer.body == text, True, f"the bytes of a raw answer, {answer.body[:80]!r}"))


def echo(swarm, source, dice, key=ALICE, **more):
    """A body that comes back as its hash."""
    body = dice.randbytes(dice.choice((0, 10, 3000, 70000)))
    target = f"/t/echo?{len(swarm.asked)}"

    def check(answer):
        echoed = answer.json()
        same((echoed["target"], echoed["length"], echoed["sha256"]), (target, len(body), hashlib.sha256(body).hexdigest()), "echo")
    return swarm.ask(source, dice.choice(("POST", "PUT")), target, key=key, body=body, chunked=dice.random() < 0.5, check=check,
                     **more)


def stream(swarm, source, dice):
    """A stream whose every event names the request it belongs to."""
    events, name = dice.choice((1, 5, 30)), f"m{len(swarm.asked)} " * dice.choice((1, 10, 500))
    body = json.dumps({"model": name, "events": events, "gap_ms": dice.choice((0, 0, 3, 30))}).encode()

    def check(answer):
        told = [json.loads(line) for line in answer.body.splitlines()]
        same(([event["model"] == name for event in told], told[-1]["done"]), ([True] * (events + 1), True), "events of a stream")
    return swarm.ask(source, "POST", f"/api/generate?{len(swarm.asked)}", body=body, check=check)


def download(swarm, source, dice):
    kind, size = dice.choice(("cl", "chunked", "close")), dice.choice((1, 1000, 100000, 700000)) + dice.randrange(1000)
    return swarm.ask(source, "GET", f"/t/{kind}/{size}?chunk={dice.choice((500, 5000))}", unframed=kind == "close",
                     check=lambda answer: same(answer.body == pattern(size), True, f"{len(answer.body)} bytes of {kind}"))


def odd(swarm, source, dice):
    """What else a model may do."""
    method, target, statuses = dice.choice((
        ("GET", "/t/100?n=3", {200}), ("GET", "/t/204", {204}), ("GET", "/t/304", {304}), ("HEAD", "/t/cl/1000", {200}),
        ("GET", "/t/slow/200", {200}), ("GET", "/t/big-head/20000", {200}), ("GET", "/t/big-head/40000", {502}),
        ("GET", "/t/garbage", {502}), ("POST", "/t/die", {502}), ("GET", "/t/die", {502}),
        ("GET", "/t/none", {404})))
    return swarm.ask(source, method, target, statuses=statuses)


def refused(swarm, source, dice):
    """A request that must not get through."""
    key = dice.choice((None, WRONG, ALICE[:-1], ALICE + "x", swarm.visitor_key(swarm.visitors + 5),
                       swarm.visitor_key(swarm.visitors - 2)))
    return swarm.ask(source, dice.choice(("GET", "POST")), "/t/evil", key=key, good=False, statuses={401})


HONEST = (raw, raw, echo, echo, stream, stream, download, odd)


@contextlib.asynccontextmanager
async def sending(wire, *data):
    """Bytes that are sent while the answers to them are read."""
    task = asyncio.create_task(wire.send(*data))
    try:
        yield
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def batch(wire, dice, asked):
    """Requests in one write or many, and their answers in order."""
    async with sending(wire, *pieces(dice, b"".join(each.data for each in asked))):
        for each in asked:
            await wire.answer_to(each)


HEALTH = b"GET /health HTTP/1.1\r\nHost:a\r\n\r\n"
HEALTHY = re.compile(rb"(?:HTTP/1\.1 200 OK\r\n(?:[^\r\n]+\r\n)+\r\nOK)+")


async def health(swarm, wire, dice):
    """Many requests that need no key."""
    count = dice.choice((1, 17, 200, 2500))
    async with sending(wire, *pieces(dice, HEALTH * count) if count < 1000 else [HEALTH * count]):
        await healthy(wire, dice.choice((0, count // 2, count, count)))
        await finish(wire, dice)


async def healthy(wire, count):
    """So many answers, as many as are there in one look."""
    while count > 0:
        if found := HEALTHY.match(wire.buffer):
            count -= found[0].count(b"\r\n\r\n")
            del wire.buffer[:found.end()]
        elif b"\r\n\r\n" in wire.buffer[:-2]:
            turned = re.match(rb"HTTP/1.1 (408|429|503) .*\r\nConnection: close", wire.buffer, re.DOTALL)
            assert turned, f"health: {bytes(wire.buffer[:300])}"
            raise Cut("turned away")
        else:
            await wire.fill()


async def flood(swarm, wire, dice):
    """As much as the kernel takes before the connection is accepted."""
    await wire.send(HEALTH * FLOOD)
    swarm.gathered += 1
    if not Secure.pair:
        await healthy(wire, FLOOD)


async def silence(swarm, wire, dice):
    """Says nothing, for a while or until the server ends it."""
    if dice.random() < 0.5:
        await asyncio.sleep(dice.choice((0, 0.1, 1)))
    else:
        await wire.to_end()


async def half_head(swarm, wire, dice):
    asked = echo(swarm, wire.source, dice, good=False)
    await wire.send(*pieces(dice, asked.data[:dice.randrange(1, asked.data.find(b"\r\n\r\n") + 3)]))
    await finish(wire, dice)


async def pipeline(swarm, wire, dice):
    """Good requests, several in one write, and requests without a good key among them."""
    for _ in range(dice.randrange(1, 4)):
        kinds = HONEST + (refused,) * dice.choice((0, 0, 2, 20))
        await batch(wire, dice, [dice.choice(kinds)(swarm, wire.source, dice) for _ in range(dice.choice((1, 1, 4, 20)))])
    await finish(wire, dice)


async def expect(swarm, wire, dice):
    """A body that waits for 100; or, without a key, one that must not be taken for a request."""
    asked = echo(swarm, wire.source, dice)
    head, _, body = asked.data.partition(b"\r\n\r\n")
    await wire.send(head + b"\r\nExpect: 100-continue\r\n\r\n")
    if body:
        answer = Answer(await wire.until(b"\r\n\r\n"))
        if answer.status != 100:
            assert answer.status in REFUSED, f"status {answer.status} instead of 100"
            return
        await wire.send(*pieces(dice, body))
    await wire.answer_to(asked)


async def smuggle(swarm, wire, dice):
    """A request in the body of another one, and one behind a head that is refused."""
    inner = swarm.ask(wire.source, "POST", "/t/evil", body=b"", good=False)
    kind = dice.randrange(3)
    if kind == 0:
        await wire.send(*pieces(dice, swarm.ask(wire.source, "POST", "/t/evil", key=WRONG, body=inner.data, good=False).data))
    elif kind == 1:
        outer = swarm.ask(wire.source, "POST", "/t/sink", body=inner.data, chunked=dice.random() < 0.5,
                          check=lambda answer: same(answer.json()["length"], len(inner.data), "length"))
        return await batch(wire, dice, [outer])
    else:
        bad = dice.choice(("Content-Length: 5\r\nContent-Length: 5", "Transfer-Encoding: chunked\r\nContent-Length: 3", "A : b",
                           " fold", "Transfer-Encoding: gzip, chunked", "Host: b", "Content-Length: +1", "A: \x01",
                           f"Authorization: Bearer {ALICE}", "A: " + "x" * 20000))
        outer = swarm.ask(wire.source, "POST", "/t/evil", bad, good=False)
        await wire.send(*pieces(dice, outer.data + inner.data))
    answer = await wire.read()
    assert 400 <= answer.status < 600 and (answer.closes or kind == 0), f"{answer.status} for what is malformed"
    wire.half_close()
    with contextlib.suppress(Cut):
        await wire.to_end()
    same(bytes(wire.buffer), b"", "what follows the answer to what is malformed")


async def cut_body(swarm, wire, dice):
    asked = echo(swarm, wire.source, dice, whole=False)
    head, _, body = asked.data.partition(b"\r\n\r\n")
    if len(body) < 6:
        asked.whole = True
        return await wire.send(asked.data)
    await wire.send(*pieces(dice, head + b"\r\n\r\n" + body[:dice.randrange(len(body) - 2)]))
    await asyncio.sleep(dice.choice((0, 0.05, 0.5)))
    await finish(wire, dice)


async def stall(swarm, wire, dice):
    """Stops reading in the middle of a long answer, then vanishes or goes on."""
    asked = download(swarm, wire.source, dice)
    await wire.send(asked.data)
    await wire.fill()
    await asyncio.sleep(dice.choice((0, 0.1, 1)))
    if dice.random() < 0.5:
        await wire.answer_to(asked)


async def cut_answer(swarm, wire, dice):
    """A model that breaks off, answers early, or never."""
    kind = dice.choice(("cut-cl", "cut-cl?reset", "cut-chunked", "cut-chunked?reset", "cut-chunked?between", "early", "trailing",
                        "silent", "silent?unread"))
    asked = echo(swarm, wire.source, dice, statuses={"early": {413}, "trailing": {200}}.get(kind, set()))
    asked.target, asked.data = f"/t/{kind}", asked.data.replace(f"{asked.target} ".encode(), f"/t/{kind} ".encode(), 1)
    asked.check = None
    async with sending(wire, asked.data):
        if kind.startswith("silent") and dice.random() < 0.7:
            await asyncio.sleep(0.1)
        else:
            await wire.answer_to(asked)


async def websocket(swarm, wire, dice):
    asked = swarm.ask(wire.source, "GET", "/t/ws", "Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: " + "x" * 22,
                      statuses={101})
    await wire.send(asked.data)
    if (await wire.answer_to(asked)).status == 101:
        for _ in range(dice.randrange(6)):
            data = asked.id.encode() + dice.randbytes(dice.choice((1, 500, 30000)))
            async with sending(wire, data):
                same(await wire.exactly(len(data)) == data, True, "bytes through a tunnel")
    await finish(wire, dice)


async def visitor(swarm, wire, dice):
    """A key that comes and goes: while it is being changed both answers are right."""
    number = swarm.visitor or swarm.visitors
    for _ in range(20):
        asked = swarm.ask(wire.source, "GET", "/t/echo", key=swarm.visitor_key(number), statuses={200, 401})
        if swarm.visitor and number != swarm.visitor:
            asked.good, asked.statuses = False, {401}
        await wire.send(asked.data)
        await wire.answer_to(asked)
        await asyncio.sleep(dice.choice((0, 0.05)))


async def lane(swarm, wire, dice):
    """Many of one address, which run into its limits."""
    await batch(wire, dice, [swarm.ask(wire.source, "GET", "/t/echo", key=dice.choice((ALICE, BOB))) for _ in range(30)])


async def babble(swarm, wire, dice):
    """Another protocol than the listener's: TLS in plain, plain in TLS, records that are broken or cut."""
    hello = bytes.fromhex("160301007a0100007603030000") + dice.randbytes(110)
    text = swarm.ask(wire.source, "POST", "/t/evil", body=b"", good=not Secure.pair).data
    data = dice.choice((text, hello, hello[:dice.randrange(1, 100)], dice.randbytes(300),
                        b"\x17\x03\x03\x00\x10" + dice.randbytes(9)))
    await wire.send(*pieces(dice, data))
    await finish_soon(wire)


async def finish_soon(wire):
    with contextlib.suppress(TimeoutError, Cut):
        async with asyncio.timeout(1):
            await wire.to_end()


async def half_record(swarm, wire, dice):
    """A record, in plain a head, that ends in the middle or is changed."""
    asked = swarm.ask(wire.source, "POST", "/t/evil", body=b"", good=False)
    data = bytearray(asked.data)
    if wire.tls:
        wire.tls.write(data)
        data = bytearray(wire.outgoing.read())
    if wire.tls and dice.random() < 0.5:
        data[dice.randrange(5, len(data))] ^= 1
    else:
        del data[-1 - dice.randrange(20):]
    await wire.raw_send(data)
    await finish_soon(wire)


SCRIPTS = {health: 6, silence: 2, half_head: 2, pipeline: 10, expect: 2, smuggle: 3, cut_body: 3, stall: 3, cut_answer: 4,
           websocket: 2, visitor: 2, lane: 1, babble: 1, half_record: 1}
NO_TLS = {babble, flood}               # clients that come without a handshake


def round_test(name, limit, options):
    def test(lab):
        pool = name if name.isdigit() else "64"
        swarm = Swarm(lab, random.Random(f"{options.seed} {name}"), pool, *limit or ("",))
        asyncio.run(swarm.play(options.seconds / options.rounds))
        swarm.check_model()
        swarm.check_log()
        print(f"        {swarm.started} clients, {len(swarm.asked)} requests, {swarm.whole} whole answers to good ones, "
              f"{swarm.kills} workers killed", flush=True)
        assert swarm.whole, "no good request was answered"
    test.__name__ = f"test_pool_of_{name}"
    test.__doc__ = "However clients behave: no request gets past the key, no answer astray, and nothing stays behind."
    return test


def main():
    parser = argparse.ArgumentParser(description="a swarm of clients around tinyauth")
    parser.add_argument("--tinyauth", metavar="BIN", default=HERE.parent.parent / "tinyauth")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--seconds", type=float, default=20, help="how long the swarms last, all rounds together")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run = Run(str(Path(options.tinyauth).resolve()), True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: run.abort(f"stopped by signal {number}"))
    rounds = {name: limit for name, limit in POOLS.items() if options.pattern in name}
    options.rounds = max(1, len(rounds))
    watchdog = threading.Timer(2 * options.seconds + 120 * options.rounds, run.abort, ["not done in time"])
    watchdog.daemon = True
    watchdog.start()
    if options.tls:
        Secure.pair = self_signed(run.directory)
    for name, limit in rounds.items():
        run.one(round_test(name, limit, options))
    run.end()
    return 1 if run.failed or not rounds else 0


if __name__ == "__main__":
    sys.exit(main())
