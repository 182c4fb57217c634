#!/usr/bin/env python3
"""Goal: on a kernel of a processor that was booted for it, with every wall up, tinyauth does all that it does.

    python3 tests/kernels/guest.py [--tinyauth BIN] [-v] [PATTERN]

Runs in a machine that run.py made, as root. /machine.json says what that machine is and which tests are to run: `all` is
the end-to-end tests, those of minimal systems and those of handshakes and sessions over TLS; `core` leaves out of them what
another machine has shown; both have the tests below. What a test leaves out because something is missing has failed. The
harness, the way tests run and the last line are those of tests/e2e.py.
"""

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import sys
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent / "tls"))
import e2e  # noqa: E402
import handshakes  # noqa: E402
import minimal  # noqa: E402
import secure  # noqa: E402
import sessions  # noqa: E402
from e2e import ALICE, KEYS, Stream, alive, alone, many_keys, request, same, until  # noqa: E402
from lab import SecureClient, authority, client_context, connect, serve  # noqa: E402

WATCHDOG = 1200                         # of the machine's own time
NOT_OVER_TLS = {}
MACHINE = json.loads(Path("/machine.json").read_text(encoding="ascii"))
OTHER = HERE.parent.parent / "other"    # tinyauth with another layout of its table
MADE_KEYS = Path("/keys")               # RSA keys, which an emulator would take minutes for

# What a machine of this kind cannot have: node is not in it, and the time that is measured is not this world's.
LEFT_OUT = {"test_node_every_suite_and_key"}
# What a kernel or a processor could make go another way.
CORE = re.compile("""test_(
    keep_alive|upstream_connection_is_never_shared|answers_in_every|request_bodies_in_every|websocket_becomes|unix_sockets|
    dual_stack|refused_upstream|silent_upstream|half_close|no_key_is_401|rate_limit_in_every|streams_of_every|changed_keys_file|
    check$|killed_worker|reload_under_load|upgrade_under_load|drain_under_load|second_term|workers_end|log_file_is|
    sandbox_is_told|proxy_header_in_front|upstream_by_name|upstream_moves_when|state_survives|state_gives_back|
    inetd_(keeps|streams|over_pipes|tls|state|is_walled)|manager_is_told|activation_serves|check_url$|
    sessions_survive_an_upgrade)""", re.X)
# x86_64 without its instructions for AES does no AES at all.
WANTS_AES = re.compile("test_(openssl_every|curl_every|python_every|session_is_resumed_by_every|session_needs_its_suite)")
# Wants what a container does not have: namespaces, and other processes' /proc.
NOT_IN_A_CONTAINER = re.compile("test_(inetd_is_walled|upgrade_under_load|upstream_moves)")


def made_key(self, kind, make=secure.Authority.make_key):
    """An RSA key that was made before, where there is one and it is the first of its kind."""
    made = MADE_KEYS / f"{kind}.pem"
    if not made.exists():
        return make(self, kind)
    path = self.path(self.fresh_name() + ".key")
    shutil.move(made, path)
    return path


secure.Authority.make_key = made_key


class Run(e2e.Run):
    """Here nothing may be missing."""

    def report(self, test, problems, word, seconds, lab):
        super().report(test, problems + [word] * bool(word), None, seconds, lab)


# What this machine is

def test_machine(lab):
    """It is the machine that this run is about: page size, processor, Landlock, and the walls that follow from them."""
    same(mmap.PAGESIZE, MACHINE["page"], "page size")
    flags = re.search(r"^(flags|Features|isa)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[2].split()
    same(sorted(set(MACHINE["without"]) & set(flags)), [], "what the processor should lack")
    landlock = "landlock" in Path("/sys/kernel/security/lsm").read_text().split(",")
    same(landlock, MACHINE["landlock"] > 0, "Landlock")
    walls = {"user", "chroot", "no_new_privs", "seccomp"}
    walls |= {"landlock_files"} if MACHINE["landlock"] >= 1 else set()
    walls |= {"landlock_connect"} if MACHINE["landlock"] >= 4 else set()
    same(set(lab.tinyauth().events("sandbox")[0]["walls"].split(",")), walls, "walls")


# Many of each

def test_connections_past_poll(lab):
    """Sixty connections to one worker, where it waits by epoll, each asked twice and streamed to; then few again."""
    tinyauth = lab.tinyauth("-n", "128")
    clients = [tinyauth.connect() for _ in range(60)]
    for _ in range(2):
        for client in clients:
            client.send(request("GET", "/t/echo"))
        same({client.read().status for client in clients}, {200}, "statuses")
    streams = [Stream(client, 5, 20) for client in clients]
    assert all(stream.whole() for stream in streams), [str(stream.error) for stream in streams if stream.error]
    for client in clients[3:]:
        client.close()
    same({client.ask("GET", "/t/echo").status for client in clients[:3] for _ in range(40)}, {200}, "statuses of those that stay")


def test_secure_connections_past_poll(lab):
    """The same with forty over TLS, which resume one session."""
    tinyauth = serve(lab)
    context = client_context()
    session = sessions.first_session(tinyauth, context)
    clients = [connect(tinyauth, context=context, session=session) for _ in range(40)]
    for client in clients:
        client.send(request("GET", "/t/echo"))
    same([(client.read().status, client.tls.session_reused) for client in clients], [(200, True)] * 40, "statuses and resumed")


def test_every_kind_of_key(lab):
    """P-256, P-384 and RSA: a handshake, an answer, a stream, and a session that each worker resumes."""
    for kind in ("p256", "p384", "rsa2048"):
        tinyauth = serve(lab, pair=authority(lab).good(kind), workers=2)
        context = client_context()
        session = sessions.first_session(tinyauth, context)
        same(sessions.from_each_worker(tinyauth, context, session), [True, True], f"resumed with {kind}")
        stream = Stream(connect(tinyauth), 10, 10)
        assert stream.whole(), f"stream with {kind}: {stream.error}"


# Signals

def test_signals(lab):
    """Three rounds of HUP, USR1, a worker's death (CHLD) and USR2; after each of them plain and TLS are served, and TERM ends it."""
    log = lab.path("log")
    good = authority(lab).good()
    tinyauth = lab.tinyauth(*good.options, "-l", "unix:" + lab.path("plain"), workers=2, log=log)
    tinyauth.expect("event=worker_died .*signal=9")

    def served(what):
        with contextlib.closing(SecureClient(tinyauth.address)) as client:
            same(client.ask("GET", "/t/echo").status, 200, f"over TLS after {what}")
        with contextlib.closing(e2e.Client(lab.path("plain"))) as client:
            same(client.ask("GET", "/t/echo").status, 200, f"plain after {what}")
        assert tinyauth.process.poll() is None, f"the supervisor ended after {what}: {tinyauth.process.returncode}"

    served("the start")
    for count in (1, 2, 3):
        tinyauth.publish(KEYS + f"# {count}\n")
        served("HUP")
        os.rename(log, f"{log}.{count}")
        tinyauth.signal(signal.SIGUSR1)
        until(lambda: os.path.exists(log) and tinyauth.events("log_reopened"), "a new log")
        served("USR1")
        workers = tinyauth.workers()
        same(len(workers), 2, "workers that lived through USR1")
        os.kill(workers[0], signal.SIGKILL)
        tinyauth.wait_event("worker_started")
        served("the death of a worker")
        tinyauth.signal(signal.SIGUSR2)
        tinyauth.wait_event("ready", timeout=15)
        until(lambda: not any(map(alive, workers)), "end of the old workers")
        served("USR2")
    tinyauth.signal(signal.SIGTERM)
    same(tinyauth.wait_exit(), 0, "exit status after TERM")


# Growth and upgrades

def test_growth_of_the_key_table(lab):
    """101,000 keys where there were three: the last one opens, an old one does not, also for a worker that comes later; then
    three again."""
    tinyauth = lab.tinyauth()
    tinyauth.expect("event=worker_died .*signal=9")
    for text, good, bad in ((many_keys(101000, False), "secret-100999-0123456789abcdef", ALICE), (KEYS, ALICE, "secret-100999-0123456789abcdef")):
        seen = len(tinyauth.events("keys_published"))
        lab.write(tinyauth.keys, text)
        tinyauth.signal(signal.SIGHUP)
        tinyauth.wait_event("keys_published", seen + 1, timeout=30)
        until(lambda: tinyauth.ask("GET", "/", key=good).status == 200, "a worker that has them")
        for _ in range(2):
            same([tinyauth.ask("GET", "/", key=key).status for key in (good, bad)], [200, 401], "a good and a bad key")
            until(lambda: len(tinyauth.workers()) == 1, "end of the old worker")
            started = len(tinyauth.events("worker_started"))
            os.kill(tinyauth.workers()[0], signal.SIGKILL)
            tinyauth.wait_event("worker_started", started + 1)


@alone
def test_upgrade_to_another_layout(lab):
    """USR2 to a build whose table has another layout and back, with and without --state: the pid stays, streams run on, it
    serves, and what was in the file of the old layout is set aside."""
    for state in (None, lab.path("state")):
        binary = lab.program(lab.path("tinyauth"))
        tinyauth = lab.tinyauth(*authority(lab).good().options, *(("--state", state) if state else ()), workers=2, binary=binary)
        tinyauth.expect("was no table of this version and size; set aside as")
        pid, old = tinyauth.pid, tinyauth.workers()
        stream = Stream(connect(tinyauth), 60, 20)
        for count, other in enumerate((OTHER, lab.binary), 2):
            shutil.copy(other, binary + ".new")
            os.rename(binary + ".new", binary)
            tinyauth.signal(signal.SIGUSR2)
            same(int(tinyauth.wait_event("ready", count, 15)["pid"]), pid, "pid")
            same(connect(tinyauth).ask("GET", "/t/echo").status, 200, f"after upgrade {count - 1}")
        assert stream.whole(), f"stream: {stream.error}"
        for client in tinyauth.clients:
            client.close()
        until(lambda: not any(map(alive, old)), "end of the old workers")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)
        if state:
            same(sorted(path.name for path in lab.directory.glob("state*")), ["state", "state.old"], "files of the state")


def wanted(name, test):
    if not name.startswith("test_") or getattr(test, "measured", False) or name in LEFT_OUT:
        return False
    if "aes" in MACHINE["without"] and WANTS_AES.match(name):
        return False
    if MACHINE["container"] and NOT_IN_A_CONTAINER.match(name):
        return False
    return MACHINE["tests"] == "all" or bool(CORE.match(name))


if __name__ == "__main__":
    e2e.Run = Run
    for module in (e2e, minimal, handshakes, sessions):
        for name, test in vars(module).items():
            if wanted(name, test) and test.__module__ == module.__name__:
                assert name not in globals(), f"two tests are called {name}"
                globals()[name] = test
    sys.exit(e2e.main(globals()))
