#!/usr/bin/env python3
"""What the image does, its root entered as a container engine would: called by run.sh in a network of its own.

    entry.py --root DIR [-v] [PATTERN]

tinyauth is process 1 of a new pid namespace, user 65534, in a root that holds nothing but itself: no /etc, /dev, /tmp
or /proc. The last line is `N passed, N failed`.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from e2e import ALICE, BOB, Client, Model, Started, Stream, children, parse_line, same, sha256, until  # noqa: E402

USER = 65534
ADDRESS = ("127.0.0.1", 21434)
ENTER = ["--setuid", str(USER), "--setgid", str(USER)]


def loopback_up():
    """Sets IFF_UP on lo."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))


def state(pid):
    """The letter of /proc/PID/stat; nothing when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def parent(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


class Container:
    """The image's entry as process 1. `mounts` are directories at paths in its root, read-only as in the compose file."""

    def __init__(self, image, model, mounts=None, **variables):
        self.clients = []
        self.scratch = Path(tempfile.mkdtemp(prefix="tinyauth-image-"))
        self.root = self.scratch / "root"
        shutil.copytree(image, self.root)
        self.mounted = []
        for path, source in (mounts or {}).items():
            self.mount(source, self.root / path.lstrip("/"))
        variables = {"TINYAUTH_UPSTREAM": model.name, "TINYAUTH_IP_RATE": "off", **variables}
        self.log = open(self.scratch / "log", "wb")
        self.runner = Started.popen(
            ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--uts", "--ipc", f"--root={self.root}", *ENTER,
             "/tinyauth"], env=variables, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        until(lambda: self.runner.poll() is not None or self.events("ready"), "event=ready")
        assert self.events("ready"), f"it exited {self.runner.poll()}: {self.text()}"
        self.pid = children(self.runner.pid)[0]

    def mount(self, source, target):
        target.mkdir(parents=True)
        subprocess.run(["mount", "--bind", "-o", "ro", source, target], check=True)
        self.mounted.append(target)

    def text(self):
        return (self.scratch / "log").read_text()

    def events(self, name):
        return [line for line in map(parse_line, self.text().encode().splitlines()) if line.get("event") == name]

    def connect(self):
        client = Client(ADDRESS)
        self.clients.append(client)
        return client

    def ask(self, *arguments, **more):
        with contextlib.closing(Client(ADDRESS)) as client:
            return client.ask(*arguments, **more)

    def execute(self, *arguments):
        """Another process of the image beside the first, as a health check is: its exit status."""
        command = ["nsenter", f"--target={self.pid}", "--pid", "unshare", f"--root={self.root}", *ENTER, "/tinyauth", *arguments]
        return subprocess.run(command, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=20).returncode

    def stop(self):
        for client in self.clients:
            client.close()
        problems = []
        if self.runner.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
            try:
                same(self.runner.wait(5), 0, "exit status after TERM")
            except (subprocess.TimeoutExpired, AssertionError) as error:
                problems.append(str(error))
                self.runner.kill()
                self.runner.wait()
        self.log.close()
        for target in self.mounted:
            subprocess.run(["umount", target], check=True)
        problems += [f"unexpected in the log: {line}" for line in self.text().splitlines() if not parse_line(line.encode())]
        shutil.rmtree(self.scratch)
        return problems


# ---- the tests

def test_serves(start):
    """401 without a key, an answer with it; process 1 and its workers are user 65534."""
    container = start(TINYAUTH_KEY=ALICE)
    same(container.ask("GET", "/api/version", key=None).status, 401, "without a key")
    same(container.ask("GET", "/api/version").status, 200, "with the key")
    # its number outside and inside
    assert f"NSpid:\t{container.pid}\t1\n" in Path(f"/proc/{container.pid}/status").read_text(), "not process 1"
    ids = f"\t{USER}" * 4 + "\n"
    for pid in [container.pid, *children(container.pid)]:
        status = Path(f"/proc/{pid}/status").read_text()
        for line in (f"Uid:{ids}", f"Gid:{ids}", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"):
            assert line in status, f"process {pid}: no {line!r}"


def test_stream(start):
    """A stream passes and is whole."""
    container = start(TINYAUTH_KEY=ALICE)
    stream = Stream(container.connect(), events=10, gap_ms=20)
    assert stream.whole(), f"the stream was cut: {stream.error}"


def test_health_check(start):
    """check --url: 0 for the health page, 1 for another status, a closed port and silence."""
    container = start(TINYAUTH_KEY=ALICE)
    same(container.execute("check", "--url", "http://127.0.0.1:21434/health"), 0, "status for /health")
    same(container.execute("check", "--url", "http://127.0.0.1:21434/api/version"), 1, "status for 401")
    same(container.execute("check", "--url", "http://127.0.0.1:1/health"), 1, "status for a closed port")


def test_health_check_of_a_hung_server(start):
    """check --url comes back with 1, and before an engine's patience ends, when the server takes connections but is silent."""
    container = start(TINYAUTH_KEY=ALICE)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        same(container.execute("check", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}/health"), 1, "status")
        assert time.monotonic() - began < 12, "it took too long"


def test_orphans(start):
    """An orphan becomes a child of process 1, which reaps it."""
    container = start(TINYAUTH_KEY=ALICE)
    fifo = container.scratch / "fifo"
    os.mkfifo(fifo)
    # the shell is a child of nsenter, outside; when it ends, what it left is an orphan of the namespace
    subprocess.run(["nsenter", f"--target={container.pid}", "--pid", "/bin/sh", "-c", f"cat {fifo} & exit 0"], check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def found():
        known = set(children(container.pid))
        return [pid for pid in known if (Path(f"/proc/{pid}/comm").read_text().strip() in ("cat", "sh"))]
    orphan = until(found, "orphan below process 1")[0]
    same(parent(orphan), container.pid, "parent of the orphan")
    with open(fifo, "w"):
        pass                            # its input ends, and so does it
    until(lambda: state(orphan) == "", "end and burial of the orphan")
    same(container.ask("GET", "/api/version").status, 200, "status afterwards")


def test_drain(start):
    """TERM lets the stream end, then process 1 exits with 0."""
    container = start(TINYAUTH_KEY=ALICE)
    client = container.connect()
    stream = Stream(client, events=20, gap_ms=50)
    os.kill(container.pid, signal.SIGTERM)
    assert stream.whole(), f"the stream was cut: {stream.error}"
    client.close()
    same(container.runner.wait(5), 0, "exit status")


def test_mounted_keys(start):
    """Keys from a mounted directory, as in the compose file; a changed file is seen."""
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory) / "keys"

        def write(text):
            fresh = Path(directory) / "keys.new"
            fresh.write_text(text)
            fresh.chmod(0o400)
            os.chown(fresh, USER, USER)
            fresh.rename(keys)
        os.chmod(directory, 0o755)
        write(f"alice {sha256(ALICE)}\n")
        container = start(mounts={"/etc/tinyauth": directory}, TINYAUTH_KEYS="/etc/tinyauth/keys")
        same(container.ask("GET", "/api/version").status, 200, "with the key")
        write(f"bob {sha256(BOB)}\n")
        until(lambda: container.ask("GET", "/api/version", key=BOB).status == 200, "acceptance of the new key")
        same(container.ask("GET", "/api/version").status, 401, "with the removed key")
        same(container.stop(), [], "problems")
        start.containers.remove(container)


# ---- the run

class Start:
    """Starts containers for a test and stops them after it."""

    def __init__(self, image, model):
        self.image, self.model, self.containers = image, model, []

    def __call__(self, **more):
        container = Container(self.image, self.model, **more)
        self.containers.append(container)
        return container


def one(test, image, model):
    """The problems of a test."""
    start, problems = Start(image, model), []
    try:
        test(start)
    except Exception as error:
        where = ", ".join(str(frame.lineno) for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__)
        problems.append(f"{type(error).__name__}: {error} (line {where})")
    for container in start.containers:
        problems += container.stop()
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", metavar="DIR", required=True)
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="")
    options = parser.parse_args()
    loopback_up()
    passed = failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        model = Model(scratch)
        for name, test in list(globals().items()):
            if not name.startswith("test_") or options.pattern not in name:
                continue
            problems = one(test, options.root, model)
            failed += bool(problems)
            passed += not problems
            if problems:
                print(f"FAILED  {name}: {test.__doc__}")
                print("".join(f"        {problem}\n" for problem in problems), end="")
            elif options.verbose:
                print(f"ok      {name}")
        model.stop()
    Started.kill_all()
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
