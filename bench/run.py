#!/usr/bin/env python3
"""tinyauth side by side with nginx, haproxy, caddy and a bare relay, on this machine, in one run.

    bench/run.py [--tinyauth BIN] [--only NAME[,NAME]] [--rounds N] [--quick] [--no-pin] [--out DIR] [--minutes N]

Installs what is missing, measures for 13 minutes, prints one table and writes RESULTS.md, results.tsv and results.svg.
--only runs the named items, --list names them; --rounds is for the most important one, the others have their part of it; --quick
is one short round of everything.

CPU time is measured with the proxies on the first CPU and what asks and serves them on the last (not with --no-pin): where the
scheduler puts them changes it by half from one second to the next. Work per second is measured in a run of its own, in which all
go where they like, and so do 1,000 streams: on two CPUs, a pinned client and upstream would be what limits a fast proxy.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

sys.dont_write_bytecode = True
import machine  # noqa: E402
import report  # noqa: E402
from machine import say  # noqa: E402
from proxies import KEYS, TITLES, Setup, Stable  # noqa: E402

HERE = Path(__file__).resolve().parent
BULK = 100 << 20                    # bytes of a large body: 100 MB
MB = 1 << 20
IDLE = 9000
WINDOW = 0.6                        # seconds of one measurement: short ones, often, so that noise meets all alike
WARM = 0.1
ROUNDS = 10
CHAT = ("-P", "/v1/chat/completions", "-b", 1024)       # half a KB comes back
STREAM = "/v1/chat/completions?stream"
WRONG_KEY = "sk-bench-a-key-that-nobody-has-0123456789ab"
FULL = ("relay", "tinyauth", "nginx", "plain", "haproxy", "caddy")
FLOORS = (*FULL, "epoll")
PROXIES = ("tinyauth", "nginx", "plain", "haproxy", "caddy")
TLS = ("tinyauth", "nginx", "haproxy", "caddy")
TLS_PROXIES = (*TLS, "plain")


@dataclass
class Item:
    name: str
    measure: Callable
    part: float                     # rounds, as a part of the most important item's
    seconds: float                  # of one round, about
    overhead: float                 # seconds for the rest
    tls: bool = False


class Bench:
    def __init__(self, options, processes, directory):
        self.options, self.processes = options, processes
        self.figures = report.Figures()
        self.began = time.monotonic()
        self.programs = directory
        self.build(directory)
        self.cpus = sorted(os.sched_getaffinity(0))
        self.stable = Stable(processes, directory, directory, options.tinyauth)
        self.rounds = 1
        self.brief = 0.5 if options.quick else 1.0      # how much shorter than usual each measurement is

    def build(self, directory):
        gcc = machine.find("gcc")
        if not gcc:
            raise SystemExit("bench: no gcc, and none could be installed")
        self.with_tls = Path("/usr/include/openssl/ssl.h").exists()
        for name, more in (("upstream", []), ("relay", []),
                           ("load", ["-DWITH_TLS", "-lssl", "-lcrypto"] if self.with_tls else [])):
            subprocess.run([gcc, "-std=c11", "-O2", "-Wall", "-Wextra", "-o", directory / name, HERE / f"{name}.c", *more],
                           check=True, timeout=120)

    # Clients

    def client(self, proxy, mode, *words, seconds=WINDOW, pinned=True, count_cpu=True):
        """The command of a client in front of `proxy`, after everybody was put in place."""
        pids = proxy.pids()
        apart = pinned and not self.options.no_pin and len(self.cpus) > 1
        last = {self.cpus[-1]} if apart else set(self.cpus)
        machine.place(pids, {self.cpus[0]} if apart else set(self.cpus))
        machine.place([self.stable.upstream.pid], last)
        command = ["taskset", "-c", ",".join(map(str, sorted(last))), self.programs / "load", mode, "-p", proxy.port,
                   "-K", proxy.key, "-s", seconds * self.brief, "-w", WARM]
        if pids and count_cpu:
            command += ["-C", ",".join(map(str, pids))]
        if proxy.setup.tls:
            command += ["-t", proxy.setup.tls]
        return command + list(words)

    def load(self, proxy, mode, *words, seconds=WINDOW, pinned=True):
        """What a client measured, or None after a line that says why not."""
        status, out, err = self.processes.run(self.client(proxy, mode, *words, seconds=seconds, pinned=pinned), 60 + seconds,
                                              stdin=subprocess.DEVNULL)
        if proxy.log:
            os.truncate(proxy.log, 0)               # a long log is written to the disk while others are measured
        if status != 0 or not out.strip():
            self.figures.note(f"{TITLES[proxy.name]}: no figure for {mode} {' '.join(map(str, words))}: "
                              f"{(err.strip().splitlines() or ['?'])[0]}")
            return None
        got = json.loads(out.strip().splitlines()[-1])
        if got["failed"] + got["wrong_status"] > 0:
            self.figures.note(f"{TITLES[proxy.name]}: {got['failed']} failed, {got['wrong_status']} of another status, "
                              f"of {got['done']} in {mode} {' '.join(map(str, words))}")
        return got

    def hold(self, proxy, mode, count, *words):
        """A client whose connections stay open until its standard input is closed; None when it fails."""
        command = self.client(proxy, mode, "-c", count, "-H", *words, seconds=0, pinned=False)
        process = self.processes.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if process.stdout.readline():
            return process
        self.processes.stop(process)
        self.figures.note(f"{TITLES[proxy.name]}: {count} {mode} connections cannot be held")
        return None

    def release(self, process):
        if process:
            process.stdin.close()
            self.processes.stop(process)

    # Turns

    def each(self, proxies):
        """Rounds, in which the proxies take turns, each round beginning with another."""
        for number in range(self.rounds):
            shift = number % max(1, len(proxies))
            for proxy in [*proxies[shift:], *proxies[:shift]]:
                yield number, proxy

    def work(self, row, proxy, number, *words, mode="requests", unit="done", scale=1, check=lambda got: True):
        """CPU time a unit of work, then how much work a second."""
        got = self.load(proxy, mode, *words)
        if got and got[unit] > 0 and got["cpu_ns"] > 0 and check(got):
            self.figures.add(f"{row}_cpu", proxy.name, number, got["cpu_ns"] / 1e3 / got[unit] * scale)
        got = self.load(proxy, mode, *words, pinned=False)
        if got and check(got):
            self.figures.add(f"{row}_rate", proxy.name, number, got[unit] / got["seconds"] / scale)
        return got


def cost(got):
    """us CPU each."""
    return got["cpu_ns"] / got["done"] / 1e3 if got and got["done"] else None


# Items

def requests(row, *words, names=FLOORS):
    def measure(bench):
        with bench.stable.fleet(names) as proxies:
            for number, proxy in bench.each(proxies):
                bench.work(row, proxy, number, *words)
    return measure


def by_wrk(bench):
    """The same with a client that others wrote."""
    wrk = machine.find("wrk")
    if not wrk:
        bench.figures.note("wrk is not there: its rows are left out")
        return
    with bench.stable.fleet(("tinyauth", "nginx", "plain")) as proxies:
        for number, proxy in bench.each(proxies):
            pids = proxy.pids()
            command = [wrk, "-t1", "-c64", "-d1s", "-H", f"Authorization: Bearer {proxy.key}",
                       f"http://127.0.0.1:{proxy.port}/api/tags"]
            bench.client(proxy, "requests", pinned=False)
            before, began = machine.cpu_ns(pids), time.monotonic()
            _, out, _ = bench.processes.run(command, 30)
            seconds, cpu = time.monotonic() - began, machine.cpu_ns(pids) - before
            found = [line for line in out.splitlines() if "requests in" in line]
            if not found or "Non-2xx" in out or "Socket errors" in out:
                bench.figures.note(f"{TITLES[proxy.name]}: wrk met errors")
                continue
            requests = int(found[0].split()[0])
            bench.figures.add("wrk64_cpu", proxy.name, number, cpu / requests / 1e3)
            bench.figures.add("wrk64_rate", proxy.name, number, requests / seconds)


def beside_idle(bench):
    """Two of each proxy, of which one holds idle connections."""
    count = min(IDLE, (machine.descriptors() - 1000) // 2)      # a descriptor on both sides of a proxy
    if count != IDLE:
        bench.figures.note(f"too few descriptors are allowed: {count} idle connections, not {IDLE}")
    names = ("tinyauth", "nginx", "haproxy", "caddy")
    with bench.stable.fleet(names) as without, bench.stable.fleet(names) as beside:
        held = {proxy.name: bench.hold(proxy, "idle", count) for proxy in beside}
        pairs = [(a, b) for a in without for b in beside if a.name == b.name and held[b.name]]
        for number, (alone, crowded) in bench.each(pairs):
            free, busy = cost(bench.load(alone, "requests", "-c", 64)), cost(bench.load(crowded, "requests", "-c", 64))
            if free and busy:
                bench.figures.add("idle_cpu", alone.name, number, busy)
                bench.figures.add("idle_own", alone.name, number, busy / free)
        for process in held.values():
            bench.release(process)


def add_delays(bench, row, number, delays):
    """What a proxy adds to the delay that is there without one, in the same round."""
    direct = delays.pop("direct", None)
    if direct is None:
        return
    for name, got in delays.items():
        for part in ("p50", "p99"):
            bench.figures.add(f"{row}_{part}", name, number, got[f"{part}_us"] - direct[f"{part}_us"])


def streams(count, row, names, tls="", pinned=True):
    def measure(bench):
        with bench.stable.fleet(names, Setup(tls=tls)) as proxies, bench.stable.fleet(("direct",)) as direct:
            delays, came = {}, {}
            for number, proxy in bench.each([*proxies, *direct]):
                got = bench.load(proxy, "streams", "-c", count, "-P", STREAM, "-w", 0.3, seconds=2 * WINDOW, pinned=pinned)
                if not got or not got["done"]:
                    continue
                came.setdefault(proxy.name, []).append(got["done"] / got["seconds"])
                if proxy.process:
                    bench.figures.add(f"{row}_cpu", proxy.name, number, cost(got))
                delays.setdefault(number, {})[proxy.name] = got
            for name, rates in came.items():
                if min(rates) < 0.95 * 50 * count:
                    bench.figures.note(f"{count} streams, {TITLES[name]}: {min(rates):.0f} events/s came in one round, of "
                                       f"{50 * count}: the machine, or the proxy, is too slow for them")
            for number, got in delays.items():
                add_delays(bench, row, number, got)
    return measure


def down(bench, row="down", names=FULL, tls=""):
    with bench.stable.fleet(names, Setup(tls=tls)) as proxies:
        for number, proxy in bench.each(proxies):
            bench.work(row, proxy, number, "-P", f"/api/tags?bytes={BULK}", unit="bytes_in", scale=MB)


def up(bench):
    with bench.stable.fleet(FULL) as proxies:
        for number, proxy in bench.each(proxies):
            bench.work("up", proxy, number, "-P", "/v1/embeddings", "-b", BULK, unit="bytes_out", scale=MB)


def refusals(bench):
    with bench.stable.fleet(PROXIES) as proxies:
        for number, proxy in bench.each(proxies):
            bench.work("refused", proxy, number, "-c", 64, "-K", WRONG_KEY, "-x", 401)


def many_keys(bench):
    stable, figures, counts = bench.stable, bench.figures, (1, 1000, 100000)
    started = [stable.start("tinyauth", Setup(keys=count)) for count in counts]
    try:
        if None in started:
            return
        costs = {}
        for number, proxy in bench.each(started):
            costs.setdefault(number, {})[proxy.setup.keys] = cost(bench.load(proxy, "requests", "-c", 64))
        for number, of in costs.items():
            figures.add("keys1_cpu", "tinyauth", number, of[1])
            for count in counts[1:]:
                if of[count] and of[1]:
                    figures.add(f"keys{count}_own", "tinyauth", number, of[count] / of[1])
    finally:
        stable.processes.stop(*(proxy.process for proxy in started if proxy))
    for number in range(3):
        figures.add("keys100000_start", "tinyauth", number, start_ms(bench, "tinyauth", Setup(room=0, keys=100000)))


def tls_requests(bench):
    with (bench.stable.fleet(TLS_PROXIES, Setup(tls="1.2")) as proxies,
          bench.stable.fleet(("plain",), Setup(tls="1.3")) as newer):
        for number, proxy in bench.each([*proxies, *newer]):
            if proxy.setup.tls == "1.3":
                got = bench.load(proxy, "requests", "-c", 64, *CHAT)
                bench.figures.add("tls13_cpu", proxy.name, number, cost(got))
            else:
                got = bench.work("tls64", proxy, number, "-c", 64, *CHAT)
            if got and number == 0:
                bench.figures.note(f"TLS of {TITLES[proxy.name]}: {got['tls']}")
        for number, value in bench.figures.all["tls64_cpu"].get("tinyauth", {}).items():
            bench.figures.add("tls13_cpu", "tinyauth", number, value)


def tls_down(bench):
    down(bench, "tlsdown", TLS, "1.2")


def handshakes(bench):
    def resumed(got):
        if got["resumed"] < 0.99 * got["done"]:
            bench.figures.note(f"{TITLES[proxy.name]}: only {got['resumed']} of {got['done']} handshakes were resumed")
            return False
        return True

    with bench.stable.fleet(TLS, Setup(tls="1.2")) as proxies:
        for number, proxy in bench.each(proxies):
            bench.work("full", proxy, number, "-c", 16, mode="handshakes")
            bench.work("resumed", proxy, number, "-c", 16, "-r", mode="handshakes", check=resumed)


def settled_memory(proxy):
    """Once two looks agree."""
    last = -1
    for _ in range(20):
        now = machine.anonymous_kb(proxy.pids())
        if now == last:
            break
        last = now
        time.sleep(0.05)
    return now


def memory_of(bench, name, setup, mode, count, words):
    """A service with `count` connections."""
    with bench.stable.fleet((name,), setup) as started:
        for proxy in started:
            held = bench.hold(proxy, mode, count, *words)
            if held:
                used = settled_memory(proxy)
                bench.release(held)
                return used
    return None


def memory_each(bench, row, names, tls, mode, count, words):
    """Between room for few connections, with 2 open, and room for as many more as are open: so that it counts, too, what is set
    aside for connections at the start."""
    for name in names:
        few, many = (memory_of(bench, name, Setup(tls=tls, room=100 + more, forwarding=mode == "streams"), mode, 2 + more, words)
                     for more in (0, count))
        if few is not None and many is not None:
            bench.figures.add(row, name, 0, (many - few) / count)


def memory(bench):
    memory_each(bench, "idle_memory", PROXIES, "", "idle", 1000, ())
    memory_each(bench, "stream_memory", PROXIES, "", "streams", 200, ("-P", STREAM))


def tls_memory(bench):
    memory_each(bench, "tlsidle_memory", TLS, "1.2", "idle", 1000, ())
    memory_each(bench, "tlsstream_memory", TLS, "1.2", "streams", 200, ("-P", STREAM))


def start_ms(bench, name, setup, mode="start"):
    """From exec to the first answer; the key is the last one of the file."""
    command, extra, port, _ = bench.stable.prepare(name, setup)
    if "stdout" in extra:
        extra.pop("stdout").close()
    key = f"sk-bulk-{setup.keys - 1:08}-0123456789abcdef" if setup.keys else KEYS[0]
    if mode == "inetd":
        command.insert(1, "-i")
    words = [mode, "-p", port, "-K", key, *(("-t", setup.tls) if setup.tls else ())]
    status, out, err = bench.processes.run([bench.programs / "load", *words, "--", *command], 30, stdin=subprocess.DEVNULL, **extra)
    if status != 0:
        bench.figures.note(f"{TITLES[name]}: no start-up time: {(err.strip().splitlines() or ['?'])[-1]}")
        return None
    return json.loads(out)["start_ms"]


def libraries_kb(binary):
    """The shared libraries that a binary loads at its start."""
    paths = {word for line in machine.output("ldd", str(binary)).splitlines() for word in line.split() if word.startswith("/")}
    return sum(Path(path).stat().st_size for path in paths if Path(path).exists()) / 1024


def sizes(bench, name):
    binary = Path(bench.options.tinyauth if name == "tinyauth" else machine.find(name)).resolve()
    copy = bench.programs / "stripped"
    shutil.copy(binary, copy)
    if machine.find("strip"):
        subprocess.run([machine.find("strip"), copy], stderr=subprocess.DEVNULL, timeout=30)
    own = copy.stat().st_size / 1024
    bench.figures.add("binary_size", name, 0, own)
    bench.figures.add("image_size", name, 0, own + libraries_kb(binary))


def at_rest(bench):
    """As each comes, before anything was asked but one request."""
    names = [name for name in ("tinyauth", "nginx", "haproxy", "caddy") if bench.stable.has(name)]
    for name in names:
        sizes(bench, name)
    with bench.stable.fleet(names, Setup(room=0)) as proxies:
        for proxy in proxies:
            bench.figures.add("rest_memory", proxy.name, 0, settled_memory(proxy))
    for number in range(2 if bench.options.quick else 9):
        for name in names:
            bench.figures.add("start", name, number, start_ms(bench, name, Setup(room=0)))
        bench.figures.add("start1000", "tinyauth", number, start_ms(bench, "tinyauth", Setup(room=0, keys=1000)))
        bench.figures.add("inetd1000", "tinyauth", number, start_ms(bench, "tinyauth", Setup(room=0, keys=1000), "inetd"))
        if bench.stable.has("tinyauth", Setup(tls="1.2")):
            bench.figures.add("tlsstart1000", "tinyauth", number, start_ms(bench, "tinyauth", Setup(room=0, keys=1000, tls="1.2")))


def reloads(bench):
    """Requests that fail while the configuration is read again and again."""
    with bench.stable.fleet(("tinyauth", "nginx")) as proxies:
        for number, proxy in bench.each(proxies):
            command = bench.client(proxy, "requests", "-c", 64, seconds=2.5, count_cpu=False)     # processes come and go
            client = bench.processes.start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                           stderr=subprocess.DEVNULL, text=True)
            client.stdout.readline()                # all are connected
            for _ in range(8):
                time.sleep(0.25 * bench.brief)
                proxy.process.send_signal(signal.SIGHUP)
            out, _ = client.communicate(timeout=60)
            bench.processes.stop(client)
            if out.strip():
                got = json.loads(out)
                bench.figures.add("reload_failed", proxy.name, number, got["failed"] + got["wrong_status"])


ITEMS = [
    Item("chat64", requests("chat64", "-c", 64, *CHAT), 1, 12, 2),
    Item("get64", requests("get64", "-c", 64), 0.8, 12, 2),
    Item("new", requests("new", "-c", 64, "-n", *CHAT), 0.8, 12, 2),
    Item("chat1", requests("chat1", "-c", 1, *CHAT), 0.4, 12, 2),
    Item("chat512", requests("chat512", "-c", 512, *CHAT), 0.4, 12, 2),
    Item("wrk", by_wrk, 0.4, 3.6, 1),
    Item("idle", beside_idle, 0.5, 7, 10),
    Item("streams200", streams(200, "stream200", FLOORS), 0.4, 16, 2),
    Item("streams1000", streams(1000, "stream1000", ("tinyauth", "nginx", "haproxy", "caddy", "epoll"), pinned=False),
         0.4, 14, 2),
    Item("down", down, 0.4, 12, 2),
    Item("up", up, 0.4, 12, 2),
    Item("refused", refusals, 0.5, 8, 2),
    Item("keys", many_keys, 1, 2.5, 4),
    Item("tls", tls_requests, 0.5, 10, 2, tls=True),
    Item("tlsdown", tls_down, 0.4, 8, 2, tls=True),
    Item("tlsstreams", streams(200, "tlsstream200", TLS, "1.2"), 0.4, 11, 2, tls=True),
    Item("handshakes", handshakes, 0.4, 13, 2, tls=True),
    Item("memory", memory, 0, 0, 10),
    Item("tlsmemory", tls_memory, 0, 0, 10, tls=True),
    Item("rest", at_rest, 0, 0, 10),
    Item("reload", reloads, 0.3, 6, 1),
]


def rounds_for(item, base):
    return max(1, round(item.part * base))


def planned(items, base):
    return sum(item.seconds * rounds_for(item, base) + item.overhead for item in items)


def plan(items, options):
    """As many rounds as fit."""
    base = options.rounds or (1 if options.quick else ROUNDS)
    while base > 1 and planned(items, base) > 60 * options.minutes:
        base -= 1
    return base


def choose(options, bench):
    names = options.only.split(",") if options.only else []
    unknown = set(names) - {item.name for item in ITEMS}
    if unknown:
        raise SystemExit(f"bench: no such item: {', '.join(sorted(unknown))}; there are {' '.join(item.name for item in ITEMS)}")
    items = [item for item in ITEMS if not names or item.name in names]
    if any(item.tls for item in items) and not bench.with_tls:
        bench.figures.note("libssl-dev is not there, so the client has no TLS: the TLS rows are left out")
        return [item for item in items if not item.tls]
    if any(item.tls for item in items) and not bench.stable.tinyauth_has_tls:
        bench.figures.note("this tinyauth has no --tls-cert: its TLS rows are left out")
        items = [item for item in items if not item.tls or names]
    return items        # named items are measured without tinyauth's TLS, if it has none


def run(options, processes, directory):
    noise = machine.Noise()
    bench = Bench(options, processes, directory)
    items = choose(options, bench)
    base = plan(items, options)
    say(f"{len(items)} items, about {planned(items, base) * (0.45 if options.quick else 1) / 60:.0f} minutes")
    for number, item in enumerate(items):
        spent = time.monotonic() - bench.began
        pace = max(1, spent / max(1, planned(items[:number], base)))     # on a busy machine all takes longer
        share = (60 * options.minutes - spent) / (pace * planned(items[number:], base))
        if share < 0:
            bench.figures.note(f"no time left for {item.name}")
            continue
        bench.rounds = max(1, int(rounds_for(item, base) * min(1, share)))
        say(f"{spent:4.0f} s  {item.name}, {bench.rounds} round{'s' if bench.rounds > 1 else ''}")
        try:
            item.measure(bench)
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            bench.figures.note(f"{item.name} ended early: {type(error).__name__} {error}")
    facts = [*machine.describe(options.tinyauth), ("noise", noise.told()),
             ("run", f"{time.strftime('%Y-%m-%d')}, {(time.monotonic() - bench.began) / 60:.1f} minutes, "
                     f"{'not pinned' if options.no_pin else 'CPU time with the proxies on a CPU of their own'}")]
    report.tell(processes, bench.figures, facts, options.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tinyauth", type=Path, default=Path("./tinyauth"), metavar="BIN")
    parser.add_argument("--only", metavar="NAME[,NAME]")
    parser.add_argument("--list", action="store_true", help="names the items")
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-pin", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where the results go (bench/)")
    parser.add_argument("--minutes", type=float, default=13, metavar="N")
    parser.add_argument("--no-install", action="store_true")
    options = parser.parse_args()
    if options.list:
        say("\n".join(item.name for item in ITEMS))
        return
    options.tinyauth = options.tinyauth.resolve()
    if not os.access(options.tinyauth, os.X_OK):
        raise SystemExit(f"bench: {options.tinyauth} is not there; run make")
    options.out = options.out.resolve()
    options.out.mkdir(exist_ok=True, parents=True)
    if not options.no_install:
        machine.install()
    machine.exit_on_signals()
    machine.raise_limits()
    processes = machine.Processes()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        os.chmod(directory, 0o755)                  # workers that gave up root write their logs here
        try:
            run(options, processes, Path(directory))
        finally:
            processes.stop_all()


if __name__ == "__main__":
    main()
