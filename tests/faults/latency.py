#!/usr/bin/env python3
"""The latency of a client with a key, quiet and while something else goes on; or that something: silent connections.

    latency.py ADDRESS KEY NAME SECONDS COMMAND...
    latency.py --silent N --for SECONDS ADDRESS

The client opens a new connection for every second request. Prints both medians; the exit status is 1 when a request
failed or the median under load is more than twice the quiet one.
"""

import contextlib
import resource
import select
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from e2e import Cut  # noqa: E402
from load import Guest  # noqa: E402

FACTOR = 2.0
QUIET_SECONDS = 3
GAP = 0.005                         # between two requests: latency is measured, not throughput


def address_of(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


def measure(address, key, seconds):
    """(latencies in ms, what went wrong) for so long."""
    took, errors = [], []
    end, client = time.monotonic() + seconds, None
    while time.monotonic() < end:
        began, fresh = time.monotonic(), client is None
        try:
            client = client or Guest(address, "127.0.200.1")
            status = client.ask("GET", "/api/version", key=key).status
            took.append((time.monotonic() - began) * 1000)
            if status != 200:
                errors.append(f"status {status}")
        except (Cut, OSError) as error:
            errors.append(repr(error))
            fresh = False
        if not fresh and client:
            client.close()
            client = None
        time.sleep(GAP)
    return took, errors


def judge(address, key, name, seconds, command):
    quiet, _ = measure(address, key, QUIET_SECONDS)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        loaded, errors = measure(address, key, seconds)
        gone = process.poll() is not None
    finally:
        process.terminate()
        process.wait()
    before, after = statistics.median(quiet), statistics.median(loaded or [1e9])
    worst = sorted(loaded)[len(loaded) * 99 // 100] if loaded else 0
    good = after <= FACTOR * before and not errors and not gone
    print(f"{'ok' if good else 'FAILED'}: {name}: median {after:.2f} ms, quiet {before:.2f} ms; 99 % within {worst:.1f} ms; "
          f"{len(loaded)} answers, {len(errors)} errors {errors[:2] or ''}{'; the attack ended early' if gone else ''}", flush=True)
    return 0 if good else 1


def silence(address, count, seconds):
    """Keeps so many connections open, opens those anew that were closed, and says nothing."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    poller, held, opened = select.poll(), {}, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(min(200, count - len(held))):
            sock = socket.socket()
            with contextlib.suppress(OSError):
                sock.bind((f"127.0.{opened // 100 % 200 + 1}.{opened % 100 + 1}", 0))
                sock.setblocking(False)
                sock.connect_ex(address)
                held[sock.fileno()] = sock
                poller.register(sock, select.POLLRDHUP)
            opened += 1
        for fd, _ in poller.poll(20):
            poller.unregister(fd)
            held.pop(fd).close()
    print(f"{opened} connections opened, {len(held)} open at the end")


def main():
    words = sys.argv[1:]
    if words[0] == "--silent":
        silence(address_of(words[4]), int(words[1]), float(words[3]))
        return 0
    return judge(address_of(words[0]), words[1], words[2], float(words[3]), words[4:])


if __name__ == "__main__":
    sys.exit(main())
