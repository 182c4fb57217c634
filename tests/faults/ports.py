#!/usr/bin/env python3
"""Local ports: one upstream connection a request, and never one too few ports for them.

    python3 tests/faults/ports.py [--tinyauth BIN] [--minute]

Who closes a connection first holds its ports for a minute (TIME_WAIT). If that were tinyauth, an upstream at another address
could be asked as often in a minute as there are local ports, and no more. So 200 ports have to do for 2,000 requests, to an
upstream on loopback and to one at another address, on kept client connections and on new ones, and to an upstream that ends no
connection; then requests come at a steady rate for 10 s, in which more of them come than there are ports. --minute: 2,000 a
second for a minute, with the ports that Linux has by default. Each request must be answered by the upstream, and tinyauth may
hold the ports of one in fifty.

Everything runs in two network namespaces that are made for it: tinyauth in one, the upstream and its clients in the other (on
loopback all in the first). Needs root, ip, ss and gcc. The last line is `N passed, N failed`.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "sk-ports-0123456789abcdef0123456789abcdef"
CHAT = ("-P", "/v1/chat/completions", "-b", 1024)
OURS, THEIRS, BITS = "198.18.0.1", "198.18.0.2", 30     # of the range for tests of network devices (RFC 2544)
PORT = 21434                        # in a namespace of our own it is free
FEW = (40000, 40199)
RATE = 2000
READY_S = 20


def run(*command, timeout=60, **more):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout,
                          stdin=subprocess.DEVNULL, **more)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: {(done.stderr.strip() or done.stdout.strip())[-400:]}")
    return done.stdout


class Ground:
    """Two network namespaces with a cable between them, and the programs."""

    def __init__(self, directory, binary):
        self.directory, self.binary = directory, binary
        self.ours, self.theirs = (f"tinyauth-{os.getpid()}-{side}" for side in ("ours", "theirs"))
        self.made = []

    def build(self):
        for name in ("upstream", "load"):
            run("gcc", "-std=c11", "-O2", "-o", self.directory / name, ROOT / "bench" / f"{name}.c", timeout=120)
        (self.directory / "keys").write_text(f"one {KEY}\n")
        os.chmod(self.directory / "keys", 0o600)
        for name in (self.ours, self.theirs):
            run("ip", "netns", "add", name)
            self.made.append(name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "link", "add", "cable", "netns", self.ours, "type", "veth", "peer", "name", "cable", "netns", self.theirs)
        for name, address in ((self.ours, OURS), (self.theirs, THEIRS)):
            run("ip", "-n", name, "address", "add", f"{address}/{BITS}", "dev", "cable")
            run("ip", "-n", name, "link", "set", "cable", "up")

    def remove(self):
        for name in self.made:
            run("ip", "netns", "del", name)

    def inside(self, name, *command):
        return ["ip", "netns", "exec", name, *map(str, command)]

    def start(self, name, *command, **more):
        return subprocess.Popen(self.inside(name, *command), stdin=subprocess.DEVNULL, text=True, **more)

    def ports(self, first, last):
        run(*self.inside(self.ours, "sh", "-c", f"echo {first} {last} >/proc/sys/net/ipv4/ip_local_port_range"))

    def time_wait(self, name, side, port):
        """How many connections' ends with the upstream's port on this side wait here."""
        out = run(*self.inside(name, "ss", "-Htan", "state", "time-wait"))
        return sum(line.split()[2 if side == "local" else 3].endswith(f":{port}") for line in out.splitlines())


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_ready(process, log):
    end = time.monotonic() + READY_S
    while "event=ready" not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, f"tinyauth is not ready: {log.read_text()[-400:]}"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(ground, loopback, stays):
    """An upstream, and a tinyauth in front of it. Gives where to ask, from where, and the upstream's port."""
    name, address, door = (ground.ours, "127.0.0.1", "127.0.0.1") if loopback else (ground.theirs, THEIRS, OURS)
    log = ground.directory / "log"
    log.write_text("")
    upstream = ground.start(name, ground.directory / "upstream", 1, address, *(["stay"] if stays else []), stdout=subprocess.PIPE)
    try:
        port = int(upstream.stdout.readline())
        with open(log, "a") as errors:
            tinyauth = ground.start(ground.ours, ground.binary, "-k", ground.directory / "keys", "-l", f"{door}:{PORT}", "-u",
                                    f"{address}:{port}", "-w", 2, "--ip-rate", "off", "--ip-conns", 1000, stderr=errors)
        try:
            wait_ready(tinyauth, log)
            yield name, door, port
        finally:
            stop(tinyauth)
    finally:
        stop(upstream)
        upstream.stdout.close()


def ask(ground, loopback, *words, ports=None, stays=False, timeout=150):
    """Asks as `words` say, and tells what came of it."""
    default = run(*ground.inside(ground.ours, "cat", "/proc/sys/net/ipv4/ip_local_port_range")).split()
    if ports:
        ground.ports(*ports)
    try:
        with serving(ground, loopback, stays) as (name, door, port):
            said = run(*ground.inside(name, ground.directory / "load", "requests", "-a", door, "-p", PORT, "-K", KEY, "-w", 0,
                                      *CHAT, *words), timeout=timeout)
            got = json.loads(said.splitlines()[-1])
            got["held"] = ground.time_wait(ground.ours, "peer", port)
            got["theirs"] = ground.time_wait(name, "local", port)
    finally:
        ground.ports(*default)
    refused = re.findall(r"status=50\d[^\n]*", (ground.directory / "log").read_text())
    told = (f"{got['done']} requests in {got['seconds']:.1f} s, {got['done'] / got['seconds']:.0f}/s, {got['failed']} failed, "
            f"{got['wrong_status']} of another status; ports held: {got['held']} by tinyauth, {got['theirs']} by the upstream")
    assert got["failed"] == got["wrong_status"] == 0 and not refused, f"{told}; {refused[:1]}"
    assert got["held"] <= got["done"] // 50, f"tinyauth ends too many itself: {told}"
    return got, told


def few_kept(ground, loopback):
    return ask(ground, loopback, "-c", 16, "-N", 2000, ports=FEW)[1]


def few_new(ground, loopback):
    """On loopback the clients' own ports are among the few: each of their source addresses has all of them."""
    return ask(ground, loopback, "-c", 8, "-N", 400, "-n", ports=FEW)[1]


def few_staying(ground, loopback):
    return ask(ground, loopback, "-c", 16, "-N", 2000, ports=FEW, stays=True)[1]


def steady(ground, loopback, minute):
    """Without --minute there are fewer ports than a machine that is slow asks for in 10 s."""
    ports, seconds = (None, 60) if minute else ((40000, 41999), 10)
    got, told = ask(ground, loopback, "-c", 64, "-R", RATE, "-s", seconds, ports=ports)
    assert minute or got["done"] > 2500, f"too few requests to show anything: {told}"
    return told


def tests(minute):
    for loopback in (True, False):
        where = "loopback" if loopback else "another address"
        yield f"200 ports, {where}, 2,000 requests", lambda ground, here=loopback: few_kept(ground, here)
        yield f"200 ports, {where}, 400 clients", lambda ground, here=loopback: few_new(ground, here)
        yield f"200 ports, {where}, an upstream that stays", lambda ground, here=loopback: few_staying(ground, here)
        yield (f"{RATE} a second, {where}, {'a minute' if minute else '10 s and 2,000 ports'}",
               lambda ground, here=loopback: steady(ground, here, minute))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tinyauth", type=Path, default=ROOT / "tinyauth", metavar="BIN")
    parser.add_argument("--minute", action="store_true", help="2,000 requests a second for a minute")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="tinyauth-ports-") as directory:
        os.chmod(directory, 0o755)
        ground = Ground(Path(directory), options.tinyauth.resolve())
        try:
            ground.build()
            for name, test in tests(options.minute):
                try:
                    print(f"ok      {name}: {test(ground)}", flush=True)
                    passed += 1
                except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
                    print(f"FAILED  {name}: {error}", flush=True)
                    failed += 1
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            print(f"FAILED  the ground: {error}", flush=True)
            failed += 1
        finally:
            ground.remove()
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
