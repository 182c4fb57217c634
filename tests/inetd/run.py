#!/usr/bin/env python3
"""`tinyauth -i` under the real openbsd-inetd and xinetd, with the files of contrib/.

    python3 tests/inetd/run.py [--tinyauth BIN] [--cache DIR] [-v] [PATTERN]

The two exclude each other as packages, and starting them is not wanted either: so those that are not installed are
fetched by apt-get and unpacked into DIR (default build/inetd). Each test_* function runs once for each of them, with a Super
that has started it on a free port of the loopback address. Where neither is to be had nothing is tested. The last line
is `N passed, N failed`.
"""

import argparse
import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from e2e import (ALICE, KEYS, Client, Model, Started, Stream, children, environment, parse_line, request,  # noqa: E402
                 same, until)

WATCHDOG = 180                          # seconds for the whole run
USER = "nobody"                         # as in contrib's files
# what has to come along where only the package itself is unpacked
LIBRARIES = ["libbsd0", "libmd0", "libevent-2.1-7", "libtirpc3", "libwrap0", "libgssapi-krb5-2", "libnsl2"]


# ---- the two servers

class Inetd:
    """openbsd-inetd with the first line of contrib/inetd.conf."""
    name, package, program = "inetd", "openbsd-inetd", "usr/sbin/inetd"

    @staticmethod
    def configuration(port, change):
        lines = [line for line in (ROOT / "contrib/inetd.conf").read_text().splitlines() if line and line[0] != "#"]
        same([line.split()[2] for line in lines], ["tcp", "tcp6"], "protocols of contrib/inetd.conf")
        return change(re.sub(r"^\d+ ", f"127.0.0.1:{port} ", lines[0]) + "\n")

    @staticmethod
    def command(binary, file, directory):
        return [binary, "-i", file]


class Xinetd:
    """xinetd with contrib/xinetd.tinyauth."""
    name, package, program = "xinetd", "xinetd", "usr/sbin/xinetd"

    @staticmethod
    def configuration(port, change):
        text = (ROOT / "contrib/xinetd.tinyauth").read_text()
        text = re.sub(r"(port\s*= )\d+", rf"\g<1>{port}", text)
        text = text.replace("flags           = IPv6 ", "flags           = IPv4 ")
        return change(text.replace("\tdisable ", "\tbind            = 127.0.0.1\n\tdisable "))

    @staticmethod
    def command(binary, file, directory):
        return [binary, "-dontfork", "-f", file, "-pidfile", f"{directory}/xinetd.pid", "-filelog", f"{directory}/xinetd.log"]


def find(server, cache):
    """The server's program and what its loader needs to know; None when it is not to be had."""
    installed = Path("/") / server.program
    if installed.exists():
        return installed, {}
    place = cache / server.name
    if not (place / server.program).exists() and not fetch(server, cache, place):
        return None, {}
    libraries = ":".join(str(path) for path in place.glob("**/*-linux-gnu*") if path.is_dir())
    return place / server.program, {"LD_LIBRARY_PATH": libraries}


def fetch(server, cache, place):
    """The package, and those of the libraries that exist, unpacked but not installed."""
    if not shutil.which("apt-get"):
        return False
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as download:
        for package in [server.package, *LIBRARIES]:
            subprocess.run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package], cwd=download,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        archives = list(Path(download).glob("*.deb"))
        if not any(archive.name.startswith(server.package + "_") for archive in archives):
            return False
        for archive in archives:
            subprocess.run(["dpkg-deb", "-x", archive, place], check=True)
    return True


def free_port():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return probe.getsockname()[1]


class Super:
    """The super-server, running: with its configuration, keys, state and log in a directory of its own."""

    def __init__(self, server, program, loader, binary, model, **variables):
        self.directory = Path(tempfile.mkdtemp(prefix="tinyauth-inetd-"))
        self.model, self.clients = model, []
        self.log = self.directory / "log"
        self.prepare(binary)
        port = free_port()
        self.address = ("127.0.0.1", port)
        file = self.directory / "conf"
        file.write_text(server.configuration(port, self.changed))
        settings = {"TINYAUTH_UPSTREAM": model.name, "TINYAUTH_IP_RATE": "off", **variables, **loader}
        self.said = open(self.directory / "said", "wb")
        self.process = Started.popen([str(part) for part in server.command(program, file, self.directory)],
                                     env=environment(**settings), stdin=subprocess.DEVNULL, stdout=self.said, stderr=self.said)
        until(self.listens, f"{server.name} on port {port}: {(self.directory / 'said').read_text()}")

    def prepare(self, binary):
        """Everything belongs to the user of contrib's files when root tests, else to the tester."""
        self.binary = self.directory / "tinyauth"
        shutil.copy(binary, self.binary)        # where that user may reach it
        (self.directory / "keys").write_text(KEYS)
        (self.directory / "keys").chmod(0o600)
        self.log.touch()
        (self.directory / "run").mkdir()
        self.directory.chmod(0o755)
        if os.geteuid() == 0:
            for path in (self.directory / "keys", self.log, self.directory / "run"):
                shutil.chown(path, USER)

    def changed(self, text):
        """contrib's text with this place's paths; each must have been there."""
        for old, new in (("/usr/local/sbin/tinyauth", self.binary), ("/etc/tinyauth/keys", self.directory / "keys"),
                         ("/run/tinyauth/state", self.directory / "run/state"), ("/var/log/tinyauth.log", self.log)):
            assert old in text, f"{old} is not in the file of contrib/"
            text = text.replace(old, str(new))
        if os.geteuid() != 0:
            text = text.replace(USER, pwd.getpwuid(os.geteuid()).pw_name)
        return text

    def listens(self):
        """Seen without a connection, which would start a process."""
        assert self.process.poll() is None, f"it ended: {(self.directory / 'said').read_text()}"
        port = f"0100007F:{self.address[1]:04X}"
        return any(port in line and " 0A " in line for line in Path("/proc/net/tcp").read_text().splitlines())

    def connect(self):
        client = Client(self.address)
        self.clients.append(client)
        return client

    def hold(self):
        """A connection whose request the model has, and does not answer."""
        client = self.connect()
        target = f"/t/silent?{client.port}.{self.address[1]}"
        client.send(request("GET", target))
        until(lambda: self.model.events("request", target=target), "request at the model")

    def ask(self, *arguments, **more):
        with contextlib.closing(Client(self.address)) as client:
            return client.ask(*arguments, **more)

    def children(self):
        """Those that are tinyauth by now, and not the server's copy before it executes it."""
        found, own = [], os.readlink(f"/proc/{self.process.pid}/exe")
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/exe") != own:
                    found.append(pid)
        return found

    def access(self, count):
        """The first access lines, awaited."""
        def look():
            lines = [parse_line(line) for line in self.log.read_bytes().splitlines()]
            return [line for line in lines if "method" in line]
        until(lambda: len(look()) >= count, f"access line number {count} in the log")
        return look()

    def stop(self):
        for client in self.clients:
            client.close()
        problems = []
        with contextlib.suppress(AssertionError):
            until(lambda: not self.children(), "end of the children", 5)
        for pid in self.children():
            problems.append(f"child {pid} did not end with its connection")
            os.kill(pid, signal.SIGKILL)
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()
        problems += [f"unexpected in the log: {line!r}" for line in self.log.read_bytes().splitlines() if not parse_line(line)]
        shutil.rmtree(self.directory)
        return problems


# ---- the tests; `variables` on a test go into the server's environment

def variables(**settings):
    def mark(test):
        test.variables = settings
        return test
    return mark


def test_key(server):
    """With the key an answer, without or with another 401; the log has the client's address."""
    same(server.ask("GET", "/api/version").status, 200, "with the key")
    same(server.ask("GET", "/api/version", key=None).status, 401, "without a key")
    same(server.ask("GET", "/api/version", key="sk-wrong").status, 401, "with a wrong key")
    lines = server.access(3)
    same([line["status"] for line in lines], ["200", "401", "401"], "statuses in the log")
    same({line["addr"] for line in lines}, {"127.0.0.1"}, "addresses in the log")


def test_keep_alive(server):
    """Several requests on a connection, in one process, each judged by itself; it ends with the connection."""
    client = server.connect()
    same(client.ask("GET", "/api/version").status, 200, "first")
    pids = server.children()
    same(len(pids), 1, "processes")
    same(client.ask("POST", "/t/echo", body=b"x" * 100000).json()["length"], 100000, "length of the second one's body")
    same(client.ask("GET", "/api/version", key="sk-wrong").status, 401, "third")
    same(client.ask("GET", "/api/version").status, 200, "fourth")
    same(server.children(), pids, "processes")
    client.close()
    until(lambda: not server.children(), "end of the process")


def test_pipelined(server):
    """Two requests in one packet get two answers, in order."""
    client = server.connect()
    client.send(request("GET", "/t/echo?1") + request("GET", "/t/echo?2"))
    same([client.read().json()["target"] for _ in range(2)], ["/t/echo?1", "/t/echo?2"], "targets")


def test_stream(server):
    """Events arrive one by one, as they are sent."""
    client = server.connect()
    client.send(request("POST", "/api/generate", body=json.dumps({"events": 8, "gap_ms": 100}).encode()))
    same(client.head().status, 200, "status")
    late, events = [], 0
    for piece in client.body():
        now = time.monotonic_ns()
        for line in piece.splitlines():
            events += 1
            late.append((now - json.loads(line)["t_ns"]) / 1e6)
    same(events, 9, "events")
    assert max(late) < 80, f"an event came {max(late):.0f} ms late"


def test_client_gone(server):
    """When the client goes away, the process ends, and with it the connection to the model."""
    client = server.connect()
    client.send(request("POST", "/api/generate", body=json.dumps({"events": 1000, "gap_ms": 100}).encode()))
    same(client.head().status, 200, "status")
    same(len(server.children()), 1, "processes")
    client.reset()
    until(lambda: not server.children(), "end of the process", 2)


@variables(TINYAUTH_IP_RATE="1/h", TINYAUTH_IP_BURST="4")
def test_rate_is_shared(server):
    """The address limit holds over connections: a burst passes, then 429."""
    same([server.ask("GET", "/api/version").status for _ in range(8)], [200] * 5 + [429] * 3, "statuses")


@variables(TINYAUTH_IP_CONNS="2")
def test_counts_come_back(server):
    """Connections of an address count together; those of processes that were killed in flight do not count on."""
    for _ in range(2):
        server.hold()
    same(len(server.children()), 2, "processes")
    until(lambda: server.ask("GET", "/api/version").status == 429, "refusal of a third connection")
    for pid in server.children():
        os.kill(pid, signal.SIGKILL)
    until(lambda: server.ask("GET", "/api/version").status == 200, "room again")
    server.hold()
    until(lambda: server.ask("GET", "/api/version").status == 200, "room for two")


def test_killed_at_random(server):
    """The state file stays usable, whenever its users are killed."""
    stopping = threading.Event()

    def kill():
        while not stopping.is_set():
            for pid in server.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    killer = threading.Thread(target=kill)
    killer.start()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            server.ask("GET", "/api/version")
    stopping.set()
    killer.join()
    for _ in range(5):
        same(server.ask("GET", "/api/version").status, 200, "status afterwards")


def test_many_at_once(server):
    """Forty connections, eight at a time; a stream beside them is whole."""
    stream = Stream(server.connect(), events=20, gap_ms=50)
    errors, left = [], list(range(40))

    def work():
        while left:
            with contextlib.suppress(IndexError):
                left.pop()
                try:
                    same(server.ask("GET", "/api/version").status, 200, "status")
                except Exception as error:
                    errors.append(repr(error))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(errors[:3], [], "first errors")
    assert stream.whole(), f"the stream was cut: {stream.error}"


# ---- the run

class Tests:
    def __init__(self, binary, verbose):
        self.binary, self.verbose = binary, verbose
        self.passed, self.failed = 0, 0
        self.scratch = tempfile.mkdtemp(prefix="tinyauth-inetd-model-")
        self.model = Model(self.scratch)

    def one(self, server, program, loader, test):
        running, problems, began = None, [], time.monotonic()
        try:
            running = Super(server, program, loader, self.binary, self.model, **getattr(test, "variables", {}))
            test(running)
        except Exception as error:
            where = ", ".join(str(frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
                              if frame.filename == __file__)
            problems.append(f"{type(error).__name__}: {error} (line {where})")
        if running:
            problems += running.stop()
        self.failed += bool(problems)
        self.passed += not problems
        seconds = time.monotonic() - began
        if problems:
            print(f"FAILED  {server.name} {test.__name__} ({seconds:.1f} s): {test.__doc__}")
            for problem in problems[:8]:
                print(f"        {problem}")
        elif self.verbose:
            print(f"ok      {server.name} {test.__name__} ({seconds:.1f} s)")
        sys.stdout.flush()

    def end(self, why=None):
        Started.kill_all()
        if why:
            self.failed += 1
            print(f"FAILED  {why}")
        shutil.rmtree(self.scratch, ignore_errors=True)
        print(f"{self.passed} passed, {self.failed} failed", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tinyauth", metavar="BIN", default="./tinyauth")
    parser.add_argument("--cache", metavar="DIR", type=Path, default=ROOT / "build/inetd")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="")
    options = parser.parse_args()
    tests = Tests(str(Path(options.tinyauth).resolve()), options.verbose)

    def abort(why):
        Started.aborted = True
        tests.end(why)
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: abort(f"stopped by signal {number}"))
    watchdog = threading.Timer(WATCHDOG, abort, [f"not done after {WATCHDOG} s"])
    watchdog.daemon = True
    watchdog.start()
    for server in (Inetd, Xinetd):
        program, loader = find(server, options.cache.resolve())
        if not program:
            print(f"skipped: no {server.name}; install {server.package}")
            continue
        for name, test in list(globals().items()):
            if name.startswith("test_") and options.pattern in f"{server.name} {name}":
                tests.one(server, program, loader, test)
    tests.end()
    return 1 if tests.failed else 0


if __name__ == "__main__":
    sys.exit(main())
