#!/usr/bin/env python3
"""Soak: many mixed requests with faults among them; at the end memory, descriptors and behaviour are as at the start.

    python3 tests/faults/soak.py [--tinyauth BIN] [--requests N]

The faults: clients that leave in the middle, an upstream that is killed and restarted, keys that are read again, the log
opened anew, and --ip-conns reached. The last line is `N passed, N failed`.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from e2e import KEYS, Cut, Run, request, same  # noqa: E402
from load import Guest, Mixed, check_upstream  # noqa: E402
from run import check_settled, descriptors  # noqa: E402

CONNS = 40                          # --ip-conns
REQUESTS = 1000000
BATCH = 200                         # pipelined requests in one write
SLOWEST = 150                       # requests a second at least, or the soak is given up


class Batches(threading.Thread):
    """Pipelined small requests, good and bad ones by turns, on one connection after the other."""

    def __init__(self, tinyauth, source):
        super().__init__(daemon=True)
        self.tinyauth, self.source = tinyauth, source
        self.done, self.problems = 0, []
        self.stopping = False
        self.start()

    def run(self):
        while not self.stopping and not self.problems:
            try:
                with contextlib.closing(Guest(self.tinyauth.address, self.source)) as client:
                    for _ in range(10):
                        self.batch(client)
            except TimeoutError:
                self.problems.append("nothing for 10 s in a batch")
            except (Cut, OSError):
                time.sleep(0.01)
            except AssertionError as error:
                self.problems.append(str(error))

    def batch(self, client):
        pair = request("GET", "/api/version") + request("GET", "/t/evil", key=None)
        client.send(pair * (BATCH // 2))
        for number in range(BATCH):
            status = client.read().status
            wanted = {401} if number % 2 else {200, 502, 503}
            assert status in wanted, f"answer {number} of a batch: {status}"
            self.done += 1


def disturb(tinyauth, model, turn):
    """One fault a turn."""
    kind = turn % 5
    if kind == 0:
        tinyauth.lab.write(tinyauth.keys, KEYS + f"turn{turn} a-secret-of-turn-{turn:06}\n")
        tinyauth.signal(signal.SIGHUP)
    elif kind == 1:
        tinyauth.signal(signal.SIGUSR1)
    elif kind == 2:
        for client in [Guest(tinyauth.address, "127.0.7.7") for _ in range(CONNS + 5)]:
            client.close()
    elif kind == 3 and turn % 4 == 0:
        model.stop()
        time.sleep(0.1)
        check_upstream(model)
        model.log.unlink()
        model.__init__(model.log.parent, "--port", str(model.port))
    elif kind == 4:
        half = Guest(tinyauth.address, "127.0.7.8")
        half.send(request("POST", f"/t/echo?turn{turn}-{time.monotonic_ns()}", "Content-Length: 100000"))
        half.reset()
    with contextlib.suppress(FileNotFoundError):        # the log is not what is looked at
        os.truncate(tinyauth.log, 0)


def soak(tinyauth, model, requests):
    """Run until so many requests were answered; their number."""
    mixed = Mixed(tinyauth.address, clients=3, sources=3)
    batches = [Batches(tinyauth, f"127.0.6.{i + 1}") for i in range(3)]
    began = time.monotonic()

    def done():
        return mixed.done + sum(batch.done for batch in batches)
    for turn in range(1 << 30):
        if done() >= requests or mixed.problems or any(batch.problems for batch in batches):
            break
        assert time.monotonic() - began < requests / SLOWEST + 30, f"only {done()} requests in {time.monotonic() - began:.0f} s"
        time.sleep(0.5)
        disturb(tinyauth, model, turn)
    for batch in batches:
        batch.stopping = True
    problems = mixed.stop() + [problem for batch in batches for problem in batch.problems]
    for batch in batches:
        batch.join(20)
    same(problems, [], "problems of clients")
    print(f"{done()} requests in {time.monotonic() - began:.0f} s: {mixed.whole} mixed ones whole, {mixed.refused} refused, "
          f"{mixed.cut} cut; the others in pipelines", flush=True)


def test_soak(lab):
    """After many requests and faults, anonymous memory, descriptors and counts are as they were after the first ones."""
    log = lab.path("log")
    tinyauth, model = lab.pair("--ip-conns", str(CONNS), "--log", log, workers=2, log=log)
    workers = tinyauth.workers()
    soak(tinyauth, model, 3000)
    check_settled(tinyauth, 1 << 10, CONNS)
    memory, base = tinyauth.memory(), descriptors(workers)
    soak(tinyauth, model, REQUESTS)
    check_settled(tinyauth, base, CONNS)
    grown = tinyauth.memory() - memory
    print(f"anonymous memory {memory >> 10} KB at the start, {grown >> 10:+} KB; {base} descriptors", flush=True)
    assert grown < 512 << 10, f"anonymous memory grew by {grown >> 10} KB"
    same(tinyauth.workers(), workers, "workers")
    check_upstream(model)


def main():
    global REQUESTS
    parser = argparse.ArgumentParser(description="soak test of tinyauth")
    parser.add_argument("--tinyauth", metavar="BIN", default=HERE.parent.parent / "tinyauth")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    options = parser.parse_args()
    REQUESTS = options.requests
    run = Run(str(Path(options.tinyauth).resolve()), True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: run.abort(f"stopped by signal {number}"))
    run.one(test_soak)
    run.end()
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
