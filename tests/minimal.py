#!/usr/bin/env python3
"""Tests of what small systems need: the sandbox, inetd, socket activation, the service manager, containers, peers that
speak for others, names, the state file.

    python3 tests/minimal.py [--tinyauth BIN] [-v] [--no-measure] [--measure] [PATTERN]

The harness, the way tests run and the last line are those of tests/e2e.py. Some tests want root, namespaces or setpriv; where
these are missing they are left out by name. --measure also holds the figures to their goals; without it they are only printed
and loosely bound, because other machines are slower and busy.
"""

import array
import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
from e2e import (ALICE, BOB, KEYS, WRONG, Client, Cut, Skip, Started, Stream, Tinyauth, children,  # noqa: E402
                 environment, frozen, main, many_keys, measured, parse_line, request, same, until, values)
from regressions import Upstream, read_head, ticks  # noqa: E402
from secure import SecureSocket, client_context, self_signed  # noqa: E402

ROOT = os.geteuid() == 0
USER, GROUP = 12345, 23456              # nobody else's
MEASURE = "--measure" in sys.argv       # taken out of the arguments at the end of this file
FIGURES = []


def only_root():
    if not ROOT:
        raise Skip("not started as root")


def status_of(pid):
    """/proc/PID/status as a dictionary."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespaces(*flags):
    """unshare(1) with these flags, where that is allowed."""
    only_root()
    command = ["unshare", *flags]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], stderr=subprocess.DEVNULL).returncode:
        raise Skip(f"no {' '.join(command)} here")
    return command


class Server(Tinyauth):
    """tinyauth with a command before it, descriptors from 3 on, or standard streams that are closed. `keys`: a text that is
    written to a file; `wait`: for event=ready."""

    HAND = ("import os, sys\n"
            "fds = [int(fd) for fd in sys.argv[1].split(',') if fd]\n"
            "for i, fd in enumerate(fds): os.dup2(fd, 100 + i)\n"
            "for i in range(len(fds)): os.dup2(100 + i, 3 + i); os.close(100 + i)\n"
            "for fd in sys.argv[2].split(','):\n"
            "    if fd: os.close(int(fd))\n"
            "if fds: os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=str(os.getpid()))\n"
            "os.execvp(sys.argv[3], sys.argv[3:])\n")

    def __init__(self, lab, *options, before=(), fds=(), closed=(), upstream=None, keys=KEYS, workers=1, env=None,
                 binary=None, listen="127.0.0.1:0", wait=True, ip_rate="off", stderr=True):
        self.lab, self.log = lab, None
        self.keys = lab.path("keys")
        self.clients, self.loads, self.lines, self.parsed, self.expected = [], [], [], [], []
        self.secure, self.status = set(), 0
        self.reading = threading.Event()
        self.reading.set()
        command = [*before, binary or lab.binary, "-u", upstream or lab.shared.name, "-w", str(workers), "--ip-rate", ip_rate]
        command += ["-l", listen] if listen else []
        if keys is not None:
            lab.write(self.keys, keys)
            command += ["-k", self.keys]
        command = [sys.executable, "-c", self.HAND, ",".join(map(str, fds)), ",".join(map(str, closed)), *command]
        self.began = time.monotonic_ns()
        self.process = Started.popen([*command, *options], env=environment(**(env or {})), stdin=subprocess.DEVNULL,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=fds)
        self.pid = self.process.pid
        self.pump = threading.Thread(target=self.pump_stderr, daemon=True)
        self.pump.start()
        lab.things.append(self)
        if not wait:
            return
        until(lambda: self.process.poll() is not None or self.events("ready"), "event=ready", 15)
        assert self.events("ready"), f"tinyauth exited {self.process.poll()}: {self.text()}"
        self.pid = int(self.events("ready")[0]["pid"]) if not before else self.pid
        self.name = self.events("listening")[0]["addr"]
        if not self.name.startswith("unix:"):
            self.address = ("127.0.0.1", int(self.name.rpartition(":")[2]))


class Held(Client):
    """A client on a socket that is there already."""

    def __init__(self, sock):
        sock.settimeout(10)
        self.sock, self.buffer, self.answer = sock, bytearray(), None


def tcp_pair():
    """Both ends of a connection on the loopback address: the client's, the server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return client, server


class Inetd:
    """`tinyauth -i` on one connection. `kind`: tcp, unix, pipes."""

    def __init__(self, lab, *options, kind="tcp", stderr="file", upstream=None, keys=KEYS, env=None, ip_rate="off",
                 before=(), hand=False):
        self.lab, self.kind = lab, kind
        self.path = lab.path(f"stderr-{len(lab.things)}")
        if keys is not None:
            lab.write(lab.path("keys"), keys)
            options = ("-k", lab.path("keys"), *options)
        command = [*before, lab.binary, "-i", "-u", upstream or lab.shared.name, "--ip-rate", ip_rate, *options]
        with open(self.path, "wb") as file:
            streams, fds = self.streams(), ()
            where = {"file": file, "same": streams[1], "input": streams[0]}[stderr]
            if hand:
                fds, command = (streams[0],), [sys.executable, "-c", Server.HAND, str(streams[0]), "", *command]
            self.process = Started.popen(command, env=environment(**(env or {})), pass_fds=fds, stderr=where,
                                         stdin=subprocess.DEVNULL if hand else streams[0],
                                         stdout=subprocess.DEVNULL if hand else streams[1])
        for fd in set(streams):
            os.close(fd)
        lab.things.append(self)

    def streams(self):
        if self.kind == "pipes":
            taken, self.input = os.pipe()
            self.output, given = os.pipe()
            return taken, given
        client, server = tcp_pair() if self.kind == "tcp" else socket.socketpair()
        self.client = Held(client)
        fd = server.detach()
        return fd, fd

    def ask(self, *args, **more):
        return self.client.ask(*args, **more)

    def words(self):
        return Path(self.path).read_text()

    def records(self):
        return [parse_line(line) for line in Path(self.path).read_bytes().splitlines()]

    def access(self):
        """The access lines of a connection that has ended."""
        return [record for record in self.records() if "method" in record]

    def finish(self, status=0, timeout=5):
        """Its end, after the client's."""
        if self.kind != "pipes":
            self.client.close()
        until(lambda: self.process.poll() is not None, "end of tinyauth -i", timeout)
        same(self.process.returncode, status, "exit status")

    def whole(self, data):
        """All that comes from the pipe when this, and the end, goes into the other one."""
        os.write(self.input, data)
        os.close(self.input)
        got = b""
        while piece := os.read(self.output, 1 << 16):
            got += piece
        os.close(self.output)
        return got

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.kind != "pipes":
            self.client.close()


class Answering(Upstream):
    """An upstream on an address of its own that says its name."""

    def __init__(self, lab, host, port=0, word=b"ok"):
        self.word = word
        self.socks, self.serve = [], self.say
        self.listener = socket.create_server((host, port), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.name = f"{host}:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()
        lab.things.append(self)

    def say(self, sock):
        sock.settimeout(60)
        while read_head(sock):
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(self.word), self.word))


def seen(answer):
    """What the upstream saw of the client: X-Real-IP and X-Forwarded-For."""
    echo = answer.json()
    return values(echo, "X-Real-IP"), values(echo, "X-Forwarded-For")


def check_client(answer, address):
    same(answer.status, 200, "status")
    same(seen(answer), ([address], [address]), "X-Real-IP and X-Forwarded-For")


# ---- the sandbox

def test_workers_are_walled(lab):
    """Workers of a server that root started: the user, no groups, an empty root, no new privileges, a filter; not dumpable."""
    only_root()
    tinyauth = lab.tinyauth("--user", f"{USER}:{GROUP}", workers=2)
    supervisor = status_of(tinyauth.pid)
    same(supervisor["Uid"].split()[0], "0", "supervisor's user")
    same((supervisor["NoNewPrivs"], supervisor["Seccomp"]), ("1", "2"), "supervisor's walls")
    for pid in tinyauth.workers():
        status = status_of(pid)
        same(set(status["Uid"].split()), {str(USER)}, "Uid")
        same(set(status["Gid"].split()), {str(GROUP)}, "Gid")
        same(status["Groups"].split(), [], "Groups")
        same((status["NoNewPrivs"], status["Seccomp"]), ("1", "2"), "NoNewPrivs and Seccomp")
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            same(int(status[name], 16), 0, name)
        root = os.readlink(f"/proc/{pid}/root")
        assert root != "/", "no chroot"
        same(os.listdir(f"/proc/{pid}/root"), [], f"what lies in the root {root}")
        same(os.readlink(f"/proc/{pid}/cwd"), root, "working directory")
        assert os.stat(f"/proc/{pid}/status").st_uid == 0, "a worker is dumpable"
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.M), "a worker may dump core"
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not any(link.startswith("/") and link != "/dev/null" for link in links), f"files are open in a worker: {links}"


def test_sandbox_is_told(lab):
    """event=sandbox names user and walls, and check says the same."""
    tinyauth = lab.tinyauth()
    event, = tinyauth.events("sandbox")
    walls = event["walls"].split(",")
    check = lab.run("check", "-k", tinyauth.keys, "-u", lab.shared.name).stdout
    line, = [line for line in check.splitlines() if line.startswith("sandbox ")]
    assert event["walls"] in line, f"{line!r} lacks {event['walls']}"
    assert "no_new_privs" in walls, walls
    if ROOT:
        same((event["uid"], event["gid"]), ("65534", "65534"), "who workers are")
        assert {"user", "chroot"} <= set(walls) and "workers run as 65534:65534" in line, line
    same(tinyauth.events("sandbox_missing"), [], "missing walls")


def test_user_by_name_and_number(lab):
    """--user takes a name, a number and both numbers; an unknown one and root are refused with one line."""
    only_root()
    for value, wanted in (("daemon", ("1", "1")), ("4711", ("4711", "4711")), ("4711:815", ("4711", "815")), ("daemon:815", ("1", "815"))):
        tinyauth = lab.tinyauth("--user", value)
        status = status_of(tinyauth.workers()[0])
        same((status["Uid"].split()[0], status["Gid"].split()[0]), wanted, f"user and group of {value}")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)
    for value, words in (("no-such-user", "no such user"), ("root", "never run as root"), ("0:5", "never run as root"), ("5:staff", "a number")):
        done = lab.run("-k", lab.path("keys"), "--user", value, status=64)
        assert words in done.stderr and done.stderr.count("\n") == 1, f"{value}: {done.stderr!r}"
        done = lab.run("-k", lab.path("keys"), TINYAUTH_USER=value, status=78)
        assert words in done.stderr, f"{value}: {done.stderr!r}"


def ordinary(lab):
    """A command that makes an ordinary user of what follows, and a directory that is that user's."""
    only_root()
    if not shutil.which("setpriv"):
        raise Skip("no setpriv here")
    os.chmod(lab.directory.parent, 0o755)
    os.chmod(lab.directory, 0o755)
    home = lab.directory / "home"
    home.mkdir()
    lab.program(home / "tinyauth")
    (home / "keys").write_text(KEYS)
    (home / "keys").chmod(0o600)
    for path in (home, home / "keys"):
        os.chown(path, USER, GROUP)
    return ["setpriv", "--reuid", str(USER), "--regid", str(GROUP), "--clear-groups"], home


def test_ordinary_user(lab):
    """Started by an ordinary user: no chroot and no other user, all other walls; it serves."""
    before, home = ordinary(lab)
    tinyauth = Server(lab, "-k", str(home / "keys"), before=before, binary=str(home / "tinyauth"), keys=None)
    walls = tinyauth.events("sandbox")[0]["walls"].split(",")
    assert "no_new_privs" in walls and not {"user", "chroot"} & set(walls), walls
    for pid in [tinyauth.process.pid, *tinyauth.workers()]:
        status = status_of(pid)
        same(os.stat(f"/proc/{pid}/status").st_uid, 0, "who owns its status: it is dumpable")
        same(set(status["Uid"].split()), {str(USER)}, "Uid")
        same((status["NoNewPrivs"], status["Seccomp"]), ("1", "2"), "walls")
    same(tinyauth.ask("GET", "/t/echo").status, 200, "status")
    (home / "keys").write_text(f"alice {BOB}\n")
    tinyauth.signal(signal.SIGHUP)
    tinyauth.wait_event("keys_published")
    same([tinyauth.ask("GET", "/t/echo", key=key).status for key in (ALICE, BOB)], [401, 200], "after a reload")
    done = subprocess.run([*before, home / "tinyauth", "check", "-k", home / "keys"], text=True, capture_output=True)
    assert "workers run as who starts them" in done.stdout, done


def test_key_edits_keep_the_group(lab):
    """What the file's owner edits stays readable for the group that serves it, or is not changed."""
    _, home = ordinary(lab)
    keys, before = home / "keys", ["setpriv", "--reuid", str(USER), "--regid", str(GROUP)]
    os.chown(keys, USER, GROUP + 1)
    keys.chmod(0o640)
    subprocess.run([*before, "--groups", str(GROUP + 1), home / "tinyauth", "key", "rm", "bob", "-k", keys], check=True)
    found = keys.stat()
    same((found.st_uid, found.st_gid, found.st_mode & 0o777), (USER, GROUP + 1, 0o640), "owner, group and mode")
    text = keys.read_text()
    assert "bob" not in text, text
    done = subprocess.run([*before, "--clear-groups", home / "tinyauth", "key", "rm", "alice", "-k", keys], text=True, capture_output=True)
    assert done.returncode == 1 and "not changed: its owner and group" in done.stderr, done
    same((keys.read_text(), sorted(os.listdir(home))), (text, ["keys", "tinyauth"]), "the file and what is beside it")


def test_keys_file_of_another_is_read_once_it_may_be(lab):
    """A new keys file that the server may not read is refused; once chown has mended it, it is taken without a signal."""
    before, home = ordinary(lab)
    tinyauth = Server(lab, "-k", str(home / "keys"), before=before, binary=str(home / "tinyauth"), keys=None)
    tinyauth.expect("keys")
    (home / "new").write_text(f"alice {WRONG}\n")
    (home / "new").chmod(0o600)
    (home / "new").rename(home / "keys")
    tinyauth.wait_event("keys_refused", 1, 10)
    same(tinyauth.ask("GET", "/t/echo").status, 200, "the old key")
    os.chown(home / "keys", USER, GROUP)
    until(lambda: tinyauth.ask("GET", "/t/echo", key=WRONG).status == 200, "the new key", 10)


def test_keys_are_read_by_the_supervisor_alone(lab):
    """Keys that only root can read are published to workers, also after an edit, an upgrade and a worker's death."""
    only_root()
    tinyauth = lab.tinyauth()
    tinyauth.expect("event=worker_died")
    tinyauth.publish(f"alice {BOB}\n")
    tinyauth.signal(signal.SIGUSR2)
    tinyauth.wait_event("ready", 2)
    until(lambda: len(tinyauth.workers()) == 1, "end of the old worker")
    os.kill(tinyauth.workers()[0], signal.SIGKILL)
    tinyauth.wait_event("worker_started", 3)
    same([tinyauth.ask("GET", "/t/echo", key=key).status for key in (ALICE, BOB)], [401, 200], "statuses")
    same(tinyauth.events("sandbox_missing"), [], "missing walls")


# ---- peers that speak for others

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"


def v2(address, port=4711, command=1, tlv=b""):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    body = socket.inet_pton(family, address) * 2 + struct.pack("!HH", port, 443) + tlv
    return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x20 | command, 0x21 if ":" in address else 0x11, len(body)) + body


def proxied(tinyauth, head, secure=False):
    """A connection that begins with this PROXY header."""
    sock = socket.create_connection(tinyauth.address, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(head)
    client = Held(SecureSocket(sock) if secure else sock)
    tinyauth.clients.append(client)
    return client


def test_proxy_header_names_the_client(lab):
    """PROXY 1 and 2 from a trusted peer: log, X-Real-IP and X-Forwarded-For have the client that it names."""
    tinyauth = lab.tinyauth("--trust", "127.0.0.1")
    cases = ((V1, "192.0.2.7"), (b"PROXY TCP6 2001:db8::7 ::1 1 2\r\n", "2001:db8::7"), (v2("203.0.113.9"), "203.0.113.9"),
             (v2("2001:db8::9", tlv=b"\x04\0\x04abcd"), "2001:db8::9"), (v2("203.0.113.9", command=0), "127.0.0.1"),
             (b"PROXY UNKNOWN\r\n", "127.0.0.1"), (b"", "127.0.0.1"), (v2("::ffff:192.0.2.9"), "192.0.2.9"))
    for head, address in cases:
        client = proxied(tinyauth, head)
        for _ in range(2):
            check_client(client.ask("GET", "/t/echo"), address)
        same(client.ask("GET", "/t/echo", key=WRONG).status, 401, "a wrong key")
    lines = tinyauth.access(3 * len(cases))
    same([line["addr"] for line in lines[::3]], [address for _, address in cases], "logged addresses")


def test_proxy_header_in_front_of_tls(lab):
    """The PROXY header comes in plain before the TLS handshake."""
    pair = self_signed(lab.directory)
    tinyauth = lab.tinyauth("--trust", "127.0.0.1", *pair.options)
    for head, address in ((V1, "192.0.2.7"), (v2("2001:db8::9"), "2001:db8::9"), (b"", "127.0.0.1")):
        answer = proxied(tinyauth, head, secure=True).ask("GET", "/t/echo")
        check_client(answer, address)
        same(values(answer.json(), "X-Forwarded-Proto"), ["https"], "X-Forwarded-Proto")


def test_proxy_header_byte_by_byte(lab):
    """A PROXY header, and the request behind it, that come one byte at a time or all at once."""
    tinyauth = lab.tinyauth("--trust", "127.0.0.1")
    for head, address in ((V1, "192.0.2.7"), (v2("2001:db8::9"), "2001:db8::9")):
        client = proxied(tinyauth, b"")
        for byte in head + request("GET", "/t/echo")[:20]:
            client.send(bytes([byte]))
            time.sleep(0.001)
        client.send(request("GET", "/t/echo")[20:])
        check_client(client.read(), address)
        check_client(proxied(tinyauth, head + request("GET", "/t/echo")).read(), address)


def test_proxy_header_broken(lab):
    """A broken PROXY header ends the connection without an answer, and is logged; one from nobody we trust is a 400."""
    tinyauth = lab.tinyauth("--trust", "127.0.0.1")
    tinyauth.expect("event=turned_away .*reason=bad_proxy_header")
    broken = (b"PROXY TCP4 1.2.3.256 1.2.3.4 1 2\r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n", b"PROXY " + b"x" * 200,
              b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c" + bytes(12), b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff" + bytes(12),
              b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x04" + bytes(12))
    for number, head in enumerate(broken):
        client = proxied(tinyauth, head + request("GET", "/t/echo"))
        assert client.end() in ("eof", "reset"), head
        tinyauth.wait_event("turned_away", number + 1)
    others = lab.tinyauth("--trust", "192.0.2.0/24")
    plain = lab.tinyauth()
    for server in (others, plain):
        for head in (V1, v2("192.0.2.7")):
            client = proxied(server, head + request("GET", "/t/echo"))
            same(client.read().status, 400, f"{head!r} from an untrusted peer")
            assert client.end() in ("eof", "reset")


def test_proxy_header_cut_short(lab):
    """Half a PROXY header and the end of the connection: over at once, without turning round and round."""
    tinyauth = lab.tinyauth("--trust", "127.0.0.1", "--header-timeout", "3s")
    tinyauth.expect("event=turned_away")
    for half in (V1[:10], v2("192.0.2.7")[:20], b"P", b"\r\n"):
        client = proxied(tinyauth, half)
        client.sock.shutdown(socket.SHUT_WR)
        began, before = time.monotonic(), ticks(tinyauth.workers()[0])
        client.end()
        used = (ticks(tinyauth.workers()[0]) - before) / os.sysconf("SC_CLK_TCK")
        took = time.monotonic() - began
        assert took < 1, f"{half!r} and the end is held for {took:.1f} s, with {used:.2f} s of processor time"


def test_proxy_header_that_waits_costs_nothing(lab):
    """A trusted peer that stops in the middle of its PROXY header is waited for, not polled; over a unix socket, where
    poll cannot wait for more, it is refused."""
    path = lab.path("socket")
    tinyauth = lab.tinyauth("--trust", "127.0.0.1", "--trust", "unix", "-l", f"unix:{path}", "--header-timeout", "2s")
    tinyauth.expect("event=turned_away .*reason=bad_proxy_header")
    tcp = proxied(tinyauth, V1[:10])
    local = socket.socket(socket.AF_UNIX)
    local.connect(path)
    for sock, name in ((tcp.sock, "TCP"), (local, "unix")):
        if name == "unix":
            sock.sendall(V1[:10])
        before = ticks(tinyauth.workers()[0])
        time.sleep(0.6)
        used = (ticks(tinyauth.workers()[0]) - before) / os.sysconf("SC_CLK_TCK")
        assert used < 0.2, f"{used:.2f} s of processor time in 0.6 s for half a header over {name}"
    local.close()


def test_proxy_header_counts_the_client(lab):
    """The address limits see the client that the PROXY header names, and not the proxy."""
    tinyauth = lab.tinyauth("--trust", "127.0.0.1", "--ip-burst", "1", "--ip-conns", "3", ip_rate="1/h")
    tinyauth.expect("event=turned_away .*reason=ip_conns")
    for number in range(5):
        head = v2(f"192.0.2.{number}")
        same([proxied(tinyauth, head).ask("GET", "/t/echo").status for _ in range(3)], [200, 200, 429], f"client {number}")
    kept = [proxied(tinyauth, v2("192.0.2.77")) for _ in range(4)]
    statuses = [client.ask("GET", "/health", key=None).status for client in kept]
    same(sorted(statuses), [200, 200, 200, 429], "connections of one client")
    same(proxied(tinyauth, v2("192.0.2.78")).ask("GET", "/health", key=None).status, 200, "another client")
    kept[statuses.index(200)].close()

    def one_more():
        with contextlib.closing(proxied(tinyauth, v2("192.0.2.77"))) as client:
            return client.ask("GET", "/health", key=None).status == 200
    until(one_more, "room for one more")


def test_clients_of_a_proxy_cannot_speak_for_others(lab):
    """Who is named by a PROXY header and is not trusted is not believed: no other address, no other scheme, one rate."""
    tinyauth = lab.tinyauth("--trust", "127.0.0.1", "--ip-burst", "1", ip_rate="1/h")
    client = proxied(tinyauth, V1)
    answer = client.ask("GET", "/t/echo", "X-Forwarded-For: 203.0.113.9", "X-Forwarded-Proto: https")
    check_client(answer, "192.0.2.7")
    same(values(answer.json(), "X-Forwarded-Proto"), ["http"], "X-Forwarded-Proto")
    statuses = [proxied(tinyauth, V1).ask("GET", "/t/echo", f"X-Forwarded-For: 203.0.113.{n}").status for n in range(3)]
    same(statuses, [200, 429, 429], "with other claims")


def test_forwarded_for_each_request(lab):
    """From a trusted peer each request of a connection has its own client; from another one all of that is dropped."""
    tinyauth = lab.tinyauth("--trust", "127.0.0.0/8", "--trust", "10.0.0.0/8")
    client = tinyauth.connect()
    cases = ((("X-Forwarded-For: 192.0.2.1",), "192.0.2.1"), ((), "127.0.0.1"),
             (("X-Forwarded-For: 203.0.113.1, 192.0.2.2",), "192.0.2.2"),
             (("X-Forwarded-For: 192.0.2.3, 10.1.1.1, 127.0.0.9",), "192.0.2.3"),
             (("X-Forwarded-For: 192.0.2.4", "X-Forwarded-For: 10.1.1.1"), "192.0.2.4"),
             (("X-Forwarded-For: [2001:db8::5]:443",), "2001:db8::5"), (("X-Forwarded-For: junk",), "127.0.0.1"),
             (("X-Real-IP: 192.0.2.6", "Forwarded: for=192.0.2.6"), "127.0.0.1"),
             (("X-Forwarded-For: 192.0.2.1, junk, 10.1.1.1",), "10.1.1.1"))
    for fields, address in cases:
        check_client(client.ask("GET", "/t/echo", *fields), address)
    same([line["addr"] for line in tinyauth.access(len(cases))], [address for _, address in cases], "logged addresses")
    other = lab.tinyauth("--trust", "192.0.2.0/24")
    client = other.connect()
    for fields, _ in cases:
        check_client(client.ask("GET", "/t/echo", *fields, "X-Forwarded-Proto: https"), "127.0.0.1")


def test_forwarded_for_counts_the_client(lab):
    """--ip-rate counts the client that a trusted peer names, each for itself, on one connection."""
    tinyauth = lab.tinyauth("--trust", "127.0.0.1", "--ip-burst", "1", ip_rate="1/h")
    client = tinyauth.connect()
    got = [client.ask("GET", "/t/echo", f"X-Forwarded-For: 192.0.2.{n % 3}").status for n in range(9)]
    same(got, [200] * 6 + [429] * 3, "statuses of three clients in turn")


def test_forwarded_for_of_an_unnamed_client(lab):
    """A client for whom a PROXY header has no address is not believed what it says of others; the peer itself is."""
    unnamed = b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x21, 0, 0)
    for head, wanted in ((b"PROXY UNKNOWN\r\n", [200, 200, 429]), (unnamed, [200, 200, 429]), (v2("::1", command=0), [200] * 3)):
        tinyauth = lab.tinyauth("--trust", "127.0.0.1", "--ip-burst", "1", ip_rate="1/h")
        got = [proxied(tinyauth, head).ask("GET", "/t/echo", f"X-Forwarded-For: 192.0.2.{n}").status for n in range(3)]
        same(got, wanted, f"statuses behind {head}")


def test_forwarded_proto(lab):
    """X-Forwarded-Proto of a trusted peer is passed on, of another one not."""
    for trust, wanted in (("127.0.0.1", "https"), ("192.0.2.1", "http")):
        tinyauth = lab.tinyauth("--trust", trust)
        answer = tinyauth.ask("GET", "/t/echo", "X-Forwarded-Proto: https")
        same(values(answer.json(), "X-Forwarded-Proto"), [wanted], f"with --trust {trust}")
        same(values(tinyauth.ask("GET", "/t/echo").json(), "X-Forwarded-Proto"), ["http"], "without")


def test_trust_unix(lab):
    """--trust unix believes peers of unix sockets, and nobody else."""
    path = lab.path("socket")
    tinyauth = lab.tinyauth("--trust", "unix", "-l", f"unix:{path}")
    with contextlib.closing(Client(path)) as client:
        check_client(client.ask("GET", "/t/echo", "X-Forwarded-For: 192.0.2.1"), "192.0.2.1")
        check_client(client.ask("GET", "/t/echo"), "unix")
    check_client(tinyauth.ask("GET", "/t/echo", "X-Forwarded-For: 192.0.2.1"), "127.0.0.1")


# ---- names

def named(lab, hosts):
    """A command that gives what follows an /etc/hosts of its own, which is this file."""
    file = lab.directory / "hosts"
    file.write_text(hosts)
    file.chmod(0o644)
    os.chmod(lab.directory.parent, 0o755)
    os.chmod(lab.directory, 0o755)
    return [*namespaces("-m", "--propagation", "private"), "sh", "-c", f'mount --bind {file} /etc/hosts && exec "$@"', "sh"], file


def test_upstream_by_name(lab):
    """--upstream localhost:PORT is looked up at start, and Host is localhost."""
    tinyauth = lab.tinyauth(upstream=f"localhost:{lab.shared.port}")
    answer = tinyauth.ask("GET", "/t/echo")
    same((answer.status, values(answer.json(), "Host")), (200, [f"localhost:{lab.shared.port}"]), "status and Host")
    same(tinyauth.events("ready")[0]["upstream"], f"localhost:{lab.shared.port}", "logged upstream")


def nameless(lab):
    """A command that gives what follows a system whose name server does not run, and the file of its /etc/hosts."""
    before, hosts = named(lab, "127.0.0.1 localhost\n")
    resolv = lab.directory / "resolv"
    resolv.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    before[-2] = before[-2].replace("&&", f"&& mount --bind {resolv} /etc/resolv.conf &&", 1)
    return before, hosts


def test_upstream_name_unknown(lab):
    """A name that is not found: check ends with 1 and one line."""
    before, _ = nameless(lab)
    lab.write(lab.path("keys"), KEYS)
    done = subprocess.run([*before, lab.binary, "check", "-k", lab.path("keys"), "-u", "no-such-name.test:80"], text=True,
                          capture_output=True, timeout=20)
    same(done.returncode, 1, f"exit status: {done.stderr}")
    assert done.stderr.count("\n") == 1 and "cannot find the address of 'no-such-name.test'" in done.stderr, done.stderr


def test_upstream_name_unknown_at_boot(lab):
    """A name that is not found at start: it serves, answers 502 that says so, and looks again until the name is there."""
    before, hosts = nameless(lab)
    model = Answering(lab, "127.0.0.1", word=b"there")
    tinyauth = Server(lab, before=before, upstream=f"models.test:{model.port}")
    tinyauth.expect("event=upstream_(unknown|found)")
    answer = tinyauth.ask("GET", "/")
    same(answer.status, 502, "status")
    assert f"the address of the model server at models.test:{model.port} cannot be found" in answer.body.decode(), answer.body
    tinyauth.wait_event("upstream_unknown")
    hosts.write_text("127.0.0.1 localhost models.test\n")
    until(lambda: tinyauth.ask("GET", "/").body == b"there", "an answer from there", 15)


def test_upstream_moves(lab):
    """The name means another address: within 35 s a new generation goes there; streams of the old one run on."""
    before, hosts = named(lab, "127.0.0.1 localhost models.test\n")
    first = Answering(lab, "127.0.0.1", word=b"first")
    Answering(lab, "127.0.0.2", first.port, word=b"second")
    tinyauth = Server(lab, before=before, upstream=f"models.test:{first.port}")
    tinyauth.expect("event=upstream_moved")
    kept = tinyauth.connect()
    same(kept.ask("GET", "/").body, b"first", "before")
    hosts.write_text("127.0.0.1 localhost\n127.0.0.2 models.test\n")
    tinyauth.wait_event("upstream_moved", timeout=37)
    until(lambda: tinyauth.ask("GET", "/").body == b"second", "an answer from there")
    assert kept.ask("GET", "/").closes, "the old generation goes on"


def test_upstream_moves_when_connecting_fails(lab):
    """Connecting fails: the name is looked up at once."""
    before, hosts = named(lab, "127.0.0.1 localhost\n127.0.0.3 models.test\n")
    second = Answering(lab, "127.0.0.2", word=b"second")
    tinyauth = Server(lab, before=before, upstream=f"models.test:{second.port}")
    tinyauth.expect("event=upstream_moved")
    same(tinyauth.ask("GET", "/").status, 502, "before")
    hosts.write_text("127.0.0.2 models.test\n")
    began = time.monotonic()
    until(lambda: tinyauth.ask("GET", "/").body == b"second", "an answer from there", 8)
    print(f"  an upstream that moved was found after {time.monotonic() - began:.1f} s")


def test_upstream_name_gone(lab):
    """A name that is no longer found changes nothing."""
    before, hosts = named(lab, "127.0.0.1 localhost models.test\n")
    first = Answering(lab, "127.0.0.1", word=b"first")
    tinyauth = Server(lab, before=before, upstream=f"models.test:{first.port}")
    hosts.write_text("127.0.0.1 localhost\n")
    first.stop()
    same(tinyauth.ask("GET", "/").status, 502, "while it is down")
    time.sleep(1.5)                         # for the look-up that this begins
    again = Answering(lab, "127.0.0.1", first.port, word=b"again")
    same(tinyauth.ask("GET", "/").body, again.word, "when it is back")
    same(tinyauth.events("upstream_moved"), [], "moves")


def test_upgrade_while_the_name_is_gone(lab):
    """The name has no address when the new binary starts, after its check found one: it comes up all the same."""
    before, hosts = named(lab, "127.0.0.1 localhost models.test\n")
    binary = lab.program(lab.path("tinyauth"))
    first = Answering(lab, "127.0.0.1", word=b"first")
    tinyauth = Server(lab, before=before, binary=binary, upstream=f"models.test:{first.port}")
    tinyauth.expect("event=upstream_(unknown|found)")
    os.rename(lab.program(binary + ".new", f'[ "$1" = check ] || echo >{hosts}\nexec {lab.binary} "$@"'), binary)
    tinyauth.signal(signal.SIGUSR2)
    tinyauth.wait_event("ready", 2, 15)
    until(lambda: tinyauth.ask("GET", "/").status == 502, "an answer of the new binary")
    hosts.write_text("127.0.0.1 localhost models.test\n")
    until(lambda: tinyauth.ask("GET", "/").body == b"first", "an answer from there", 15)


# ---- the state file

def limited(lab, state, *options):
    return lab.tinyauth("--state", state, "--ip-burst", "2", *options, ip_rate="1/h")


def test_state_survives_a_restart(lab):
    """--state keeps what an address has used; without it a restart begins anew."""
    state = lab.path("state")
    for number in range(2):
        tinyauth = limited(lab, state)
        wanted = [200, 200, 200, 429] if number == 0 else [429, 429, 429, 429]
        same([tinyauth.ask("GET", "/t/echo").status for _ in range(4)], wanted, f"statuses of run {number}")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)
    same(os.stat(state).st_mode & 0o777, 0o600, "mode")


def test_state_is_shared_by_two_servers(lab):
    """Two servers with one --state limit an address together."""
    state = lab.path("state")
    first, second = limited(lab, state), limited(lab, state)
    got = [server.ask("GET", "/t/echo").status for server in (first, second) * 3]
    same(got, [200, 200, 200, 429, 429, 429], "statuses in turn")


def test_state_that_is_broken_is_set_aside(lab):
    """A file of another size or content becomes FILE.old, and that is said in one line."""
    state = lab.path("state")
    Path(state).write_bytes(b"no table")
    tinyauth = lab.tinyauth("--state", state)
    same(Path(state + ".old").read_bytes(), b"no table", "what was set aside")
    tinyauth.expect(f"{re.escape(state)}: was no table of this version and size; set aside as .*[.]old")
    assert "set aside" in tinyauth.text(), tinyauth.text()
    same(tinyauth.ask("GET", "/t/echo").status, 200, "status")
    for path, words in (("/dev/null", "not a file that this user alone can write"), (str(lab.directory), ""), ("/nonexistent/state", "")):
        done = lab.run("-k", tinyauth.keys, "--state", path, status=78)
        assert done.stderr.count("\n") == 1 and path in done.stderr and words in done.stderr, done.stderr


def test_state_gives_back_what_the_dead_held(lab):
    """Servers whose processes were all killed: their open connections no longer count for the next one."""
    state = lab.path("state")
    first = lab.tinyauth("--state", state, "--ip-conns", "2")
    for _ in range(2):
        same(first.connect().ask("GET", "/t/echo").status, 200, "status")
    workers = first.workers()
    with frozen([first.pid]):
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        os.kill(first.pid, signal.SIGKILL)
    first.process.wait()
    first.status = -signal.SIGKILL
    with contextlib.suppress(AssertionError):
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "end of the workers", 2)
    tinyauth = lab.tinyauth("--state", state, "--ip-conns", "2")
    for _ in range(2):
        same(tinyauth.connect().ask("GET", "/t/echo").status, 200, "status with the next server")


def test_state_gives_back_what_a_dead_worker_held(lab):
    """A worker is killed: its connections no longer count, in the same server."""
    tinyauth = lab.tinyauth("--state", lab.path("state"), "--ip-conns", "2")
    tinyauth.expect("event=(worker_died|turned_away)")
    for _ in range(2):
        tinyauth.connect().ask("GET", "/t/echo")
    same(tinyauth.ask("GET", "/t/echo").status, 429, "one more")
    os.kill(tinyauth.workers()[0], signal.SIGKILL)
    tinyauth.wait_event("worker_started", 2)
    same(tinyauth.connect().ask("GET", "/t/echo").status, 200, "after the kill")


# ---- inetd

def test_inetd_keeps_alive(lab):
    """-i on a TCP or unix socket: several requests, good and bad ones, and the end with the client's."""
    for kind, address in (("tcp", "127.0.0.1"), ("unix", "unix")):
        served = Inetd(lab, kind=kind)
        check_client(served.ask("GET", "/t/echo"), address)
        same(served.ask("GET", "/t/echo", key=WRONG).status, 401, "a wrong key")
        same(served.ask("POST", "/t/sink", body=b"x" * 100000).status, 200, "a body")
        same(served.ask("GET", "/health", key=None).status, 200, "health")
        served.finish()
        same([(line["status"], line["addr"]) for line in served.access()], [("200", address), ("401", address), ("200", address)],
             "access lines")


def test_inetd_streams(lab):
    """-i passes a stream on as it comes, and ends after an answer that closes."""
    served = Inetd(lab)
    served.client.send(request("POST", "/api/generate", body=b'{"events": 20, "gap_ms": 20}'))
    same(served.client.head().status, 200, "status")
    gaps = []
    for piece in served.client.body():
        for line in piece.splitlines():
            gaps.append(time.monotonic_ns() - json.loads(line)["t_ns"])
    assert len(gaps) == 21 and max(gaps) < 1e9, gaps
    same(served.ask("GET", "/t/echo", "Connection: close").status, 200, "the last one")
    same(served.client.end(), "eof", "end")
    served.finish()


def test_inetd_over_pipes(lab):
    """-i between two pipes: requests whose input has ended already are answered whole; REMOTE_ADDR is the client."""
    served = Inetd(lab, kind="pipes", env={"REMOTE_ADDR": "192.0.2.7"})
    body = json.dumps({"events": 10, "gap_ms": 10}).encode()
    got = served.whole(request("GET", "/t/echo") + request("POST", "/api/generate", body=body))
    served.finish()
    assert got.startswith(b"HTTP/1.1 200 ") and got.count(b"HTTP/1.1 200 ") == 2 and got.endswith(b"0\r\n\r\n"), got
    assert b'"192.0.2.7"' in got, got
    same([line["addr"] for line in served.access()], ["192.0.2.7"] * 2, "logged addresses")
    for env, address in (({"TCPREMOTEIP": "2001:db8::1"}, "2001:db8::1"), ({"REMOTE_ADDR": "junk"}, "unix"), ({}, "unix")):
        served = Inetd(lab, kind="pipes", env=env)
        assert served.whole(request("GET", "/t/echo")).startswith(b"HTTP/1.1 200 ")
        served.finish()
        same([line["addr"] for line in served.access()], [address], f"logged address with {env}")


def test_inetd_pipes_end_without_delay(lab):
    """Between pipes: nothing at all, half a head and an answer that closes end the process at once."""
    for text, wanted in ((b"", b""), (request("GET", "/t/echo")[:30], b""), (request("GET", "/t/echo", "Connection: close"), b"HTTP/1.1 200 "),
                         (b"GET /\r\n\r\n", b"HTTP/1.1 400 "), (request("GET", "/t/echo", key=WRONG), b"HTTP/1.1 401 ")):
        served = Inetd(lab, kind="pipes")
        began = time.monotonic()
        got = served.whole(text)
        served.finish()
        assert got.startswith(wanted) and time.monotonic() - began < 1.5, f"{text[:20]!r}: {got[:20]!r} after {time.monotonic() - began:.1f} s"


def test_inetd_pipes_from_a_trusted_peer(lab):
    """Between pipes, where nothing can be looked at before it is taken, a trusted peer is served too."""
    for env, trust in (({"REMOTE_ADDR": "127.0.0.1"}, "127.0.0.1"), ({}, "unix")):
        served = Inetd(lab, "--trust", trust, kind="pipes", env=env)
        got = served.whole(request("GET", "/t/echo", "X-Forwarded-For: 192.0.2.9"))
        served.finish()
        assert got.startswith(b"HTTP/1.1 200 ") and b'"192.0.2.9"' in got, f"trusted {trust}: {got[:200]!r}"


def test_inetd_leaves_the_pipes_as_they_were(lab):
    """What others go on with, such as a terminal or a pipe, is not left non-blocking."""
    import fcntl
    served = Inetd.__new__(Inetd)
    taken, into = os.pipe()
    out, given = os.pipe()
    lab.write(lab.path("keys"), KEYS)
    os.write(into, request("GET", "/t/echo"))
    os.close(into)
    done = subprocess.run([lab.binary, "-i", "-u", lab.shared.name, "-k", lab.path("keys")], stdin=taken, stdout=given,
                          stderr=subprocess.DEVNULL, env=environment(), timeout=10)
    same(done.returncode, 0, "exit status")
    flags = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in (taken, given)]
    for fd in (taken, given, out):
        os.close(fd)
    same(flags, [0, 0], "O_NONBLOCK of stdin and stdout")
    del served


def test_inetd_tls(lab):
    """-i with a certificate speaks TLS to a TCP peer."""
    pair = self_signed(lab.directory)
    served = Inetd(lab, *pair.options)
    served.client.sock = SecureSocket(served.client.sock)
    for _ in range(2):
        answer = served.ask("GET", "/t/echo")
        check_client(answer, "127.0.0.1")
        same(values(answer.json(), "X-Forwarded-Proto"), ["https"], "X-Forwarded-Proto")
    served.finish()
    plain = Inetd(lab, *pair.options)
    same(plain.ask("GET", "/t/echo").status, 400, "plain HTTP")
    plain.finish(timeout=8)


def test_inetd_proxy_header(lab):
    """-i believes a PROXY header from a trusted peer."""
    served = Inetd(lab, "--trust", "127.0.0.1")
    served.client.send(V1)
    check_client(served.ask("GET", "/t/echo"), "192.0.2.7")
    served.finish()


def test_inetd_listening_socket(lab):
    """-i on a listening socket: 64 and one line that says what to write instead."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lab.write(lab.path("keys"), KEYS)
        done = subprocess.run([lab.binary, "-i", "-k", lab.path("keys")], stdin=listener, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, timeout=10, env=environment())
    same(done.returncode, 64, "exit status")
    assert "nowait" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def answers_only(lab, got):
    assert got.startswith(b"HTTP/1.1 ") and b"time=" not in got and b"tinyauth:" not in got, got


def test_inetd_log_never_goes_to_the_client(lab):
    """inetd makes the connection also stderr: nothing but the answer goes there; --log FILE has the lines."""
    log = lab.path("log")
    for options in ((), ("--log", log)):
        served = Inetd(lab, *options, stderr="same")
        served.client.send(request("GET", "/t/echo", "Connection: close"))
        answers_only(lab, b"".join(served.client.to_end()))
        served.finish()
    same(len([line for line in Path(log).read_text().splitlines() if "status=200" in line]), 1, "lines in the file")
    for stderr in ("same", "input"):
        if stderr == "same":
            served = Inetd(lab, kind="pipes", stderr=stderr)
            answers_only(lab, served.whole(request("GET", "/t/echo")))
            served.finish()


def test_inetd_warnings_never_go_to_the_client(lab):
    """With the connection as stderr, warnings and mistakes are not for the client: not that keys lie open, not a keys file's errors."""
    keys = lab.path("open")
    Path(keys).write_text(KEYS)
    os.chmod(keys, 0o644)
    served = Inetd(lab, "-k", keys, stderr="same", keys=None)
    served.client.send(request("GET", "/t/echo", "Connection: close"))
    answers_only(lab, b"".join(served.client.to_end()))
    served.finish()
    state = lab.path("state")
    Path(state).write_text("junk")
    served = Inetd(lab, "--state", state, stderr="same")
    served.client.send(request("GET", "/t/echo", "Connection: close"))
    answers_only(lab, b"".join(served.client.to_end()))
    served.finish()
    Path(keys).write_text("alice secret-of-alice one-word-too-many\n")
    served = Inetd(lab, "-k", keys, stderr="same", keys=None)
    got = b"".join(served.client.to_end())
    served.finish(status=78)
    assert b"open" not in got and b"alice" not in got, f"a client reads {got!r}"


def test_inetd_state_is_shared(lab):
    """Processes of -i, one after the other and side by side, limit an address together through --state."""
    state = lab.path("state")
    options = ("--state", state, "--ip-burst", "3")
    got = []
    for _ in range(3):
        served = Inetd(lab, *options, ip_rate="1/h")
        got.append(served.ask("GET", "/t/echo").status)
        served.finish()
    together = [Inetd(lab, *options, ip_rate="1/h") for _ in range(3)]
    got += [served.ask("GET", "/t/echo").status for served in together]
    same(got, [200] * 4 + [429] * 2, "statuses")
    alone = Inetd(lab, "--ip-burst", "3", ip_rate="1/h")
    same(alone.ask("GET", "/t/echo").status, 200, "without --state")
    check = lab.run("check", "-i", "-k", lab.path("keys"))
    assert "hold for each connection alone" in check.stdout, check.stdout
    assert state in lab.run("check", "-i", "-k", lab.path("keys"), "--state", state).stdout


def test_inetd_counts_beside_others_that_come_and_go(lab):
    """Processes of -i that start and end beside those that stay leave each of these its place in the state file."""
    options, ending = ("--state", lab.path("state"), "--ip-conns", "30"), time.monotonic() + 3
    kept = []

    def come_and_go(_):
        for turn in itertools.count():
            if time.monotonic() > ending:
                return
            served = Inetd(lab, "-k", lab.path("keys"), *options, keys=None)
            if turn % 8 == 7 and len(kept) < 25 and served.ask("GET", "/t/echo").status == 200:
                kept.append(served)
                continue
            served.client.close()
            served.process.wait(5)
    lab.write(lab.path("keys"), KEYS)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        list(pool.map(come_and_go, range(5)))
    assert len(kept) > 10, f"{len(kept)} processes stay"
    for _ in range(30 - len(kept)):
        kept.append(Inetd(lab, *options))
        same(kept[-1].ask("GET", "/t/echo").status, 200, "up to the limit")
    same(Inetd(lab, *options).ask("GET", "/t/echo").status, 429, "one more than the limit")


def test_inetd_counts_connections(lab):
    """--ip-conns over processes of -i; what a killed one held is given back."""
    options = ("--state", lab.path("state"), "--ip-conns", "2")
    kept = [Inetd(lab, *options) for _ in range(2)]
    for served in kept:
        same(served.ask("GET", "/t/echo").status, 200, "status")
    third = Inetd(lab, *options)
    same(third.ask("GET", "/t/echo").status, 429, "the third")
    third.finish()
    kept[0].process.kill()
    kept[0].process.wait()
    fourth = Inetd(lab, *options)
    same(fourth.ask("GET", "/t/echo").status, 200, "after the first was killed")
    kept[1].finish()
    fifth = Inetd(lab, *options)
    same(fifth.ask("GET", "/t/echo").status, 200, "after the second ended")


def test_inetd_from_the_service_manager(lab):
    """Accept=yes: the connection comes as descriptor 3 with LISTEN_FDS."""
    served = Inetd(lab, hand=True)
    check_client(served.ask("GET", "/t/echo"), "127.0.0.1")
    served.finish()


def test_inetd_is_walled(lab):
    """A process of -i stands behind the walls of a worker."""
    served = Inetd(lab, *(("--user", f"{USER}:{GROUP}") if ROOT else ()))
    same(served.ask("GET", "/t/echo").status, 200, "status")
    status = status_of(served.process.pid)
    same((status["NoNewPrivs"], status["Seccomp"]), ("1", "2"), "walls")
    if ROOT:
        same((set(status["Uid"].split()), set(status["Gid"].split()), status["Groups"].split()), ({str(USER)}, {str(GROUP)}, []), "user")
        assert os.readlink(f"/proc/{served.process.pid}/root") != "/", "no chroot"
    served.finish()


# ---- the service manager

class Manager:
    """NOTIFY_SOCKET of a service manager: what it was told, with the time."""

    def __init__(self, lab, abstract=False):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.name = f"@tinyauth-test-{os.getpid()}-{id(self)}" if abstract else lab.path("notify")
        self.sock.bind("\0" + self.name[1:] if abstract else self.name)
        self.told = []
        self.env = {"NOTIFY_SOCKET": self.name}
        lab.things.append(self)

    def hear(self, timeout=0.0):
        self.sock.settimeout(timeout or 0.001)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while True:
                self.told.append((time.monotonic(), self.sock.recv(4096).decode()))

    def wait(self, word, count=1, timeout=5):
        def look():
            self.hear()
            return [(at, text) for at, text in self.told if re.search(f"^{word}", text, re.M)][count - 1:]
        return until(look, f"{word} number {count} of {self.told}", timeout)[0]

    def words(self):
        """The first assignment of each message, without the watchdog's."""
        self.hear()
        return [text.split("\n")[0] for _, text in self.told if not text.startswith("WATCHDOG")]

    def stop(self):
        self.sock.close()
        if not self.name.startswith("@"):
            os.unlink(self.name)


def test_manager_is_told(lab):
    """READY with a status, RELOADING with the time and READY again at HUP and USR2, STOPPING at TERM."""
    for abstract in (False, True):
        manager = Manager(lab, abstract)
        tinyauth = lab.tinyauth(env=manager.env)
        _, text = manager.wait("READY=1")
        assert re.search(r"^STATUS=1 workers, 3 keys, upstream 127\.0\.0\.1:\d+$", text, re.M), text
        for count, number in enumerate((signal.SIGHUP, signal.SIGUSR2, signal.SIGHUP)):
            before = time.monotonic_ns() // 1000
            tinyauth.signal(number)
            _, text = manager.wait("RELOADING=1", count + 1)
            at = int(re.search(r"^MONOTONIC_USEC=(\d+)$", text, re.M)[1])
            assert before <= at <= time.monotonic_ns() // 1000, f"{at} is not between {before} and now"
            manager.wait("READY=1", count + 2)
        tinyauth.signal(signal.SIGTERM)
        manager.wait("STOPPING=1")
        same(tinyauth.wait_exit(), 0, "exit status")
        same(manager.words(), ["READY=1"] + ["RELOADING=1", "READY=1"] * 3 + ["STOPPING=1"], "all that was told")


def test_manager_reload_of_bad_keys(lab):
    """A reload that is refused ends with READY too: systemctl reload does not hang."""
    manager = Manager(lab)
    tinyauth = lab.tinyauth(env=manager.env)
    tinyauth.expect("event=keys_refused|keys:1: ")
    tinyauth.publish("alice two words\n", "keys_refused")
    manager.wait("READY=1", 2)
    same(manager.words(), ["READY=1", "RELOADING=1", "READY=1"], "all that was told")


def test_manager_that_is_gone(lab):
    """A NOTIFY_SOCKET that nobody listens on, or that is none, is no harm."""
    for name in (lab.path("nothing"), "@nothing-of-this-name", "", "x" * 200):
        tinyauth = lab.tinyauth(env={"NOTIFY_SOCKET": name})
        same(tinyauth.ask("GET", "/t/echo").status, 200, f"status with {name!r}")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)


def test_manager_watchdog(lab):
    """WATCHDOG at half of WATCHDOG_USEC, for as long as the supervisor runs; a stopped worker is killed and replaced."""
    manager = Manager(lab)
    tinyauth = lab.tinyauth(env={**manager.env, "WATCHDOG_USEC": "400000"}, workers=2)
    tinyauth.expect("event=(worker_stuck|worker_died)")
    manager.wait("WATCHDOG=1", 10)
    at = [when for when, text in manager.told if text.startswith("WATCHDOG=1")]
    gaps = [b - a for a, b in zip(at, at[1:])]
    assert 0.15 < statistics.median(gaps) < 0.3, gaps
    stopped, other = tinyauth.workers()
    stream = None
    with contextlib.suppress(Cut, OSError):
        stream = Stream(tinyauth.connect(), 5, 20)
    os.kill(stopped, signal.SIGSTOP)
    tinyauth.wait_event("worker_stuck", timeout=8)
    tinyauth.wait_event("worker_started", 3)
    same(other in tinyauth.workers() and stopped not in tinyauth.workers(), True, "the other worker goes on")
    count = len([1 for _, text in manager.told if text.startswith("WATCHDOG=1")])
    manager.wait("WATCHDOG=1", count + 3)
    until(lambda: tinyauth.ask("GET", "/t/echo").status == 200, "an answer")
    del stream


def test_manager_watchdog_of_another(lab):
    """WATCHDOG_PID of another process, or no number: nothing is said."""
    for more in ({"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "junk"}, {"WATCHDOG_USEC": ""}):
        manager = Manager(lab)
        tinyauth = lab.tinyauth(env={**manager.env, "WATCHDOG_USEC": "100000", **more})
        manager.wait("READY=1")
        manager.hear(0.4)
        same([text for _, text in manager.told if "WATCHDOG" in text], [], f"words with {more}")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)
        lab.things.remove(manager)
        manager.stop()


# ---- socket activation

def activated(lab, listener, *options, **more):
    return Server(lab, *options, fds=(listener.fileno(),), listen=None, **more)


def test_activation_serves_and_leaves(lab):
    """--idle-exit: the service ends when idle, not while a stream runs; what comes meanwhile finds the next instance."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tinyauth = activated(lab, listener, "--idle-exit", "600ms")
        tinyauth.expect("event=idle")
        same(tinyauth.ask("GET", "/t/echo").status, 200, "status")
        client = tinyauth.connect()
        assert Stream(client, 60, 25).whole(), "a stream of 1.5 s"
        same(client.ask("GET", "/t/echo").status, 200, "on the same connection")
        client.close()
        closed = time.monotonic()
        same(tinyauth.wait_exit(), 0, "exit status")
        took = time.monotonic() - closed
        assert took >= 0.5, f"it left after {took:.2f} s"
        waiting = Client(tinyauth.address)
        waiting.send(request("GET", "/t/echo"))
        again = activated(lab, listener, "--idle-exit", "600ms")
        again.expect("event=idle")
        same(waiting.read().status, 200, "the connection that was made meanwhile")
        waiting.close()
        same(again.wait_exit(), 0, "exit status of the second")


def test_activation_idle_connection(lab):
    """A service that leaves while a client keeps a silent connection open ends that one properly, and with status 0."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tinyauth = activated(lab, listener, "--idle-exit", "300ms", "--keepalive-timeout", "1500ms")
        tinyauth.expect("event=idle")
        client = tinyauth.connect()
        same(client.ask("GET", "/t/echo").status, 200, "status")
        same(client.end(), "eof", "end")
        same(tinyauth.wait_exit(), 0, "exit status")


def test_activation_under_load(lab):
    """The service leaves and comes back again and again while a client connects: no request is lost."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        stopping, errors, done = threading.Event(), [], [0]

        def ask():
            while not stopping.is_set():
                try:
                    with contextlib.closing(Client(listener.getsockname())) as client:
                        same(client.ask("GET", "/t/echo", "Connection: close").status, 200, "status")
                        done[0] += 1
                except (Cut, OSError, AssertionError) as error:
                    errors.append(repr(error))
                stopping.wait(0.03 + 0.017 * (done[0] % 13))
        threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(12):
            tinyauth = activated(lab, listener, "--idle-exit", "50ms")
            tinyauth.expect("event=idle")
            until(lambda: tinyauth.process.poll() is not None, "leaving", 15)
            same(tinyauth.process.returncode, 0, "exit status")
        last = activated(lab, listener)
        before = done[0]
        until(lambda: done[0] > before + 2 or errors, "answers of the last one")
        stopping.set()
        for thread in threads:
            thread.join(12)
        del last
    same(errors, [], f"failed requests of {done[0]}")
    assert done[0] > 3, done


def test_activation_with_several_sockets(lab):
    """Two sockets, one of them a unix one, are both served; --listen is ignored, and --idle-exit alone is told off."""
    path = lab.path("activated")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(path)
        local.listen()
        tinyauth = Server(lab, fds=(tcp.fileno(), local.fileno()), env={"LISTEN_FDNAMES": "a:b"})
        same([event["addr"] for event in tinyauth.events("listening")], [f"127.0.0.1:{tcp.getsockname()[1]}", f"unix:{path}"], "listeners")
        same(tinyauth.ask("GET", "/t/echo").status, 200, "status over TCP")
        with contextlib.closing(Client(path)) as client:
            same(client.ask("GET", "/t/echo").status, 200, "status over the unix socket")
        tinyauth.signal(signal.SIGUSR2)
        tinyauth.wait_event("ready", 2)
        same(tinyauth.ask("GET", "/t/echo").status, 200, "status after an upgrade")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)
        assert os.path.exists(path), "a socket that is not ours was removed"
    own = lab.tinyauth("--idle-exit", "100ms")
    own.expect("event=idle_exit_ignored")
    own.wait_event("idle_exit_ignored")
    same(own.ask("GET", "/t/echo").status, 200, "status")


# ---- check --url

def test_check_url(lab):
    """check --url: 0 when a server answers, over http, https and a unix socket; else 1 and one line."""
    path = lab.path("socket")
    plain = lab.tinyauth("-l", f"unix:{path}")
    pair = self_signed(lab.directory)
    secure = lab.tinyauth(*pair.options)
    name, tls = (f"127.0.0.1:{server.address[1]}" for server in (plain, secure))
    for url in (f"http://{name}/health", f"http://{name}", f"http://{name}/", f"unix:{path}", f"https://{tls}/health", f"https://{tls}",
                f"http://localhost:{plain.address[1]}/health"):
        for words in (["--url", url], [f"--url={url}"]):
            done = lab.run("check", *words)
            same((done.stdout, done.stderr), ("", ""), f"words for {words}")
    refused = lab.held_port().getsockname()[1]
    model = lab.shared.name
    for url, words in ((f"http://127.0.0.1:{refused}/", "cannot connect"), (f"http://{name}/t/echo", "401"), (f"http://{tls}/health", "400"),
                       (f"https://{name}/health", "200"), (f"unix:{path}.not", "cannot connect"), (f"https://{model}/health", "")):
        done = lab.run("check", "--url", url, status=1)
        assert words in done.stderr and done.stderr.count("\n") == 1, f"{url}: {done.stderr!r}"
    for url in ("ftp://x/", "127.0.0.1:80", "http://", "http://a:b/", "", "http:///health"):
        done = lab.run("check", "--url", url, status=64)
        assert done.stderr.count("\n") == 1, f"{url}: {done.stderr!r}"


def test_check_url_of_a_long_unix_path(lab):
    """The longest path that a unix socket can have."""
    directory = lab.path("d" * 10)
    os.mkdir(directory)
    path = directory + "/" + "s" * (107 - len(directory) - 1)
    lab.tinyauth("-l", f"unix:{path}")
    lab.run("check", "--url", f"unix:{path}")


def test_check_url_of_a_server_that_hangs(lab):
    """A server that takes the connection and says nothing, or a little now and then: 1 within ten seconds."""
    def drip(sock):
        while True:
            sock.sendall(b"H")
            time.sleep(1)
    for serve in (lambda sock: time.sleep(60), drip):
        upstream = Upstream(lab, serve)
        began = time.monotonic()
        try:
            done = subprocess.run([lab.binary, "check", "--url", f"http://{upstream.name}/health"], env=environment(), timeout=15,
                                  text=True, capture_output=True)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after 15 s: {'a server that drips' if serve is drip else 'a silent server'}") from None
        same(done.returncode, 1, "exit status")
        assert time.monotonic() - began < 12 and done.stderr.count("\n") == 1, done.stderr


# ---- strange surroundings

def test_closed_standard_streams(lab):
    """Started with 0, 1 or 2 closed, or all of them: no socket, file or key ends up in their place."""
    for closed in ((0,), (1,), (2,), (0, 1), (0, 1, 2)):
        log = lab.path(f"log-{len(closed)}-{closed[0]}")
        tinyauth = Server(lab, "--log", log, closed=closed, wait=False, listen="127.0.0.1:0")
        until(lambda: os.path.exists(log) and b"event=ready" in Path(log).read_bytes(), f"ready with {closed} closed")
        records = [parse_line(line) for line in Path(log).read_bytes().splitlines()]
        pid = int([record for record in records if record.get("event") == "ready"][0]["pid"])
        port = int([record for record in records if record.get("event") == "listening"][0]["addr"].rpartition(":")[2])
        for process in (pid, *children(pid)):
            for fd in closed:
                same(os.readlink(f"/proc/{process}/fd/{fd}"), "/dev/null", f"descriptor {fd}")
        with contextlib.closing(Client(("127.0.0.1", port))) as client:
            same(client.ask("GET", "/t/echo").status, 200, f"status with {closed} closed")
        same(tinyauth.stop(), [], "end")
        lab.things.remove(tinyauth)


class Container:
    """pid 1 of a namespace in a root that holds nothing but the binary (and what `files` name)."""

    def __init__(self, lab, *options, user=None, env=None, files=()):
        self.lab = lab
        root = lab.directory / f"root-{len(lab.things)}"
        root.mkdir()
        root.chmod(0o755)
        os.chmod(lab.directory.parent, 0o755)
        os.chmod(lab.directory, 0o755)
        lab.program(root / "tinyauth")
        for name, text in files:
            (root / name).write_text(text)
        before = namespaces("--pid", "--fork", "--kill-child")
        command = [*before, "--root", str(root), *(["--setuid", str(user), "--setgid", str(user)] if user else []), "/tinyauth",
                   "-l", "127.0.0.1:0", "-u", lab.shared.name, "-w", "1", "--ip-rate", "off", *options]
        self.path = lab.path(f"container-{len(lab.things)}")
        with open(self.path, "wb") as file:
            self.process = Started.popen(command, env={"TINYAUTH_KEY": ALICE, **(env or {})}, stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=file)
        lab.things.append(self)
        until(lambda: self.events("ready") or self.process.poll() is not None, "event=ready", 15)
        assert self.events("ready"), f"exit {self.process.poll()}: {Path(self.path).read_text()}"
        self.pid, = children(self.process.pid)
        self.address = ("127.0.0.1", int(self.events("listening")[0]["addr"].rpartition(":")[2]))
        self.root = root

    def events(self, name):
        return [record for record in map(parse_line, Path(self.path).read_bytes().splitlines()) if record.get("event") == name]

    def ask(self, *args, **more):
        with contextlib.closing(Client(self.address)) as client:
            return client.ask(*args, **more)

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def test_pid_one_in_an_empty_root(lab):
    """pid 1 where there is no /etc, /dev, /tmp or /proc, as root and as a numeric user: serves, reaps, ends at TERM."""
    for user in (None, 1000):
        container = Container(lab, user=user)
        same(container.events("ready")[0]["pid"], "1", "pid")
        same([container.ask("GET", "/t/echo", key=key).status for key in (ALICE, WRONG)], [200, 401], "statuses")
        same(container.events("sandbox_missing"), [], "missing walls")
        if user is None:
            assert "chroot" in container.events("sandbox")[0]["walls"], container.events("sandbox")
        same(sorted(path.name for path in container.root.iterdir()), ["tinyauth"], "what lies in the root")
        os.kill(container.pid, signal.SIGHUP)
        same(container.ask("GET", "/t/echo").status, 200, "status after HUP")
        worker, = children(container.pid)
        os.kill(worker, signal.SIGKILL)
        until(lambda: worker not in children(container.pid) and children(container.pid), "another worker")
        same(container.ask("GET", "/t/echo").status, 200, "status after a worker was killed")
        orphan(container)
        os.kill(container.pid, signal.SIGTERM)
        until(lambda: container.process.poll() is not None, "end at TERM")
        same(container.process.returncode, 0, "exit status")


def orphan(container):
    """A process that loses its parent in the namespace, and ends: nothing of it stays."""
    if not shutil.which("nsenter"):
        return
    subprocess.run(["nsenter", "-t", str(container.pid), "-p", "sh", "-c", "sleep 0.1 & exec true"], check=True, timeout=5)

    def all_children():
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == container.pid:
                    found.append(entry)
        return found
    until(lambda: len(all_children()) > 1, "an orphan", 2)
    until(lambda: len(all_children()) == 1, "its end", 5)


def test_container_with_keys_from_a_file(lab):
    """An empty root with a keys file in it, and the health check in the same root."""
    container = Container(lab, "-k", "/keys", files=(("keys", KEYS),), env={"TINYAUTH_KEY": BOB + "-env"})
    (container.root / "keys").chmod(0o600)
    same([container.ask("GET", "/t/echo", key=key).status for key in (ALICE, BOB, BOB + "-env", WRONG)], [200, 200, 200, 401], "statuses")
    done = subprocess.run([shutil.which("chroot"), container.root, "/tinyauth", "check", "--url", f"http://127.0.0.1:{container.address[1]}/health"],
                          capture_output=True, text=True, timeout=10, env={})
    same((done.returncode, done.stderr), (0, ""), "health check")


def test_idle_without_a_log(lab):
    """Where standard error leads nowhere, an idle server sleeps."""
    container = Container(lab)
    worker, = children(container.pid)
    before = [status_of(pid)["voluntary_ctxt_switches"] for pid in (worker,)]
    time.sleep(1.2)
    turns = int(status_of(worker)["voluntary_ctxt_switches"]) - int(before[0])
    assert turns <= 3, f"{turns} turns of an idle worker in 1.2 s"


# ---- figures

def figure(what, value, unit, goal, bound):
    FIGURES.append(f"{what}: {value:.2f} {unit} (goal {goal})")
    print(f"  {FIGURES[-1]}", flush=True)
    limit = goal if MEASURE else bound
    assert value <= limit, f"{what}: {value:.2f} {unit}, more than {limit}"


NOWHERE = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]


def beside(lab, took):
    """The best one, and what this machine needs for a process that does nothing."""
    nothing = []
    for _ in range(20):
        began = time.monotonic()
        os.waitpid(os.posix_spawn(lab.binary, [lab.binary, "-V"], {}, file_actions=NOWHERE), 0)
        nothing.append((time.monotonic() - began) * 1000)
    return f"median of 20 (best {min(took):.2f}; `tinyauth -V` {statistics.median(nothing):.2f}, best {min(nothing):.2f})"


def first_answer(lab, options, secure):
    """Milliseconds from exec to the first answered request."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = holder.getsockname()[1]
    command = [lab.binary, "-l", f"127.0.0.1:{port}", "-u", lab.shared.name, "-w", "1", "--log", lab.path("log"), *options]
    text = request("GET", "/t/echo")
    context = client_context()
    variables = environment()
    began = time.monotonic()
    pid = os.posix_spawn(lab.binary, command, variables, file_actions=NOWHERE)
    try:
        while True:
            sock = socket.socket()
            try:
                sock.connect(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                sock.close()
                assert time.monotonic() - began < 5, "never started"
                time.sleep(0.0001)
        sock.settimeout(5)
        if secure:
            sock = SecureSocket(sock, context)
        sock.sendall(text)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 "), "no 200"
        took = (time.monotonic() - began) * 1000
        sock.close()
        return took
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


@measured
def test_figure_start(lab):
    """From exec to the first answered request, with 1,000 keys: median of 20, plain and over TLS."""
    lab.write(lab.path("keys"), KEYS + many_keys(1000, True))
    options = ("-k", lab.path("keys"))
    pair = self_signed(lab.directory)
    for what, more, secure, goal, bound in (("plain", (), False, 5, 100), ("TLS", pair.options, True, 10, 200)):
        took = [first_answer(lab, (*options, *more), secure) for _ in range(20)]
        figure(f"exec to first answered request, 1,000 keys, {what}, {beside(lab, took)}", statistics.median(took), "ms", goal, bound)


@measured
def test_figure_inetd(lab):
    """-i from exec to the first byte of the answer, with 1,000 keys: median of 20."""
    lab.write(lab.path("keys"), KEYS + many_keys(1000, True))
    took = []
    for _ in range(20):
        client, server = tcp_pair()
        client.sendall(request("GET", "/t/echo"))
        command, variables = [lab.binary, "-i", "-k", lab.path("keys"), "-u", lab.shared.name], environment()
        actions = [(os.POSIX_SPAWN_DUP2, server.fileno(), fd) for fd in range(2)] + NOWHERE[2:]
        began = time.monotonic()
        pid = os.posix_spawn(lab.binary, command, variables, file_actions=actions)
        server.close()
        same(client.recv(13), b"HTTP/1.1 200 ", "answer")
        took.append((time.monotonic() - began) * 1000)
        client.close()
        os.waitpid(pid, 0)
    figure(f"-i, exec to first byte, 1,000 keys, {beside(lab, took)}", statistics.median(took), "ms", 3, 100)


@measured
def test_figure_memory(lab):
    """Anonymous memory of supervisor and idle worker together, plain and with TLS."""
    pair = self_signed(lab.directory)
    for what, options in (("plain", ()), ("TLS", pair.options)):
        tinyauth = lab.tinyauth(*options)
        for _ in range(20):
            with contextlib.closing(Client(tinyauth.address)) as client:
                same(client.ask("GET", "/t/echo").status, 200, "status")
        figure(f"anonymous memory of supervisor and idle worker, {what}", tinyauth.memory() / 1024, "KB", 1024, 1024)


NOT_OVER_TLS = {}
WATCHDOG = 400

if __name__ == "__main__":
    if MEASURE:
        sys.argv.remove("--measure")
    sys.exit(main(globals()))
