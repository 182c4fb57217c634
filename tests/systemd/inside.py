#!/usr/bin/env python3
"""Tests of the shipped systemd units, run by run.sh as a service of a container that is made for nothing else.

    inside.py [-v] [PATTERN]

/stage holds the binary, contrib/ and tests/. Each test_* function gets a Host: the units freshly installed, nothing
started, a model on Ollama's port. On the way out it stops everything; for a test that failed it shows what the journal
says of tinyauth. The last line is `N passed, N failed`.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from e2e import (ALICE, BOB, Client, Cut, Load, Model, Skip, Started, Stream, alive, children, request,  # noqa: E402
                 same, sha256, until)

STAGE = Path("/stage")
UNITS = Path("/etc/systemd/system")
BINARY = Path("/usr/local/sbin/tinyauth")
KEYS = Path("/etc/tinyauth/keys")
PORT = 21434
LOOPBACK = ("127.0.0.1", PORT)
SERVICE, SOCKET = "tinyauth.service", "tinyauth.socket"
INETD, INSTANCE = "tinyauth-inetd.socket", "tinyauth-inetd@.service"
EXPOSURE = 1.5                          # of 10, as `systemd-analyze security` counts


def run(*command, status=0, **more):
    """A command to its end; what it printed."""
    done = subprocess.run([str(part) for part in command], text=True, stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=60, **more)
    if status is not None:
        assert done.returncode == status, f"{command} exits {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def systemctl(*arguments, status=0):
    return run("systemctl", "--no-pager", *arguments, status=status)


def show(unit, name):
    return systemctl("show", "--value", "--property", name, unit).strip()


def version():
    return int(run("systemctl", "--version").split()[1])


def put(path, text, mode=0o644, group=None):
    """Replace a file at once."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.chmod(mode)
    if group:
        shutil.chown(fresh, "root", group)
    fresh.rename(path)


class Once(Stream):
    """A stream whose connection ends with it: an idle one would hold a draining worker back."""

    def run(self):
        super().run()
        self.client.close()


class Host:
    """The container's machine: units, keys, clients. address and loads are what e2e.Load wants of a server."""
    address = LOOPBACK

    def __init__(self, model):
        self.model, self.loads, self.clients = model, [], []
        self.began = time.time()
        self.install_binary()
        for unit in (SERVICE, SOCKET, INETD, INSTANCE):
            shutil.copy(STAGE / "contrib/systemd" / unit, UNITS)
        run("systemd-sysusers", STAGE / "contrib/systemd/tinyauth.sysusers")
        run("systemd-tmpfiles", "--create", STAGE / "contrib/systemd/tinyauth.tmpfiles")
        self.keys(f"alice {sha256(ALICE)}\n")
        if version() < 253:
            self.drop_in("before-253.conf")
        self.set(SERVICE, TINYAUTH_IP_RATE="off")
        self.set(INSTANCE, TINYAUTH_IP_RATE="off")

    def install_binary(self):
        """A new file, renamed over the old one, as package managers do."""
        fresh = BINARY.with_name("tinyauth.new")
        shutil.copy(STAGE / "tinyauth", fresh)
        fresh.chmod(0o755)
        fresh.rename(BINARY)

    def keys(self, text, mode=0o640, group="tinyauth"):
        put(KEYS, text, mode, group)

    def set(self, unit, *lines, section="Service", **environment):
        """A drop-in with lines and variables; each call adds one, after those that are shipped."""
        directory = UNITS / f"{unit}.d"
        directory.mkdir(exist_ok=True)
        variables = [f"Environment={name}={value}" for name, value in environment.items()]
        text = "\n".join([f"[{section}]", *lines, *variables, ""])
        put(directory / f"zz{len(list(directory.iterdir())):02}-test.conf", text)
        systemctl("daemon-reload")

    def drop_in(self, name):
        """A drop-in that is shipped."""
        directory = UNITS / f"{SERVICE}.d"
        directory.mkdir(exist_ok=True)
        shutil.copy(STAGE / "contrib/systemd" / name, directory)
        systemctl("daemon-reload")

    def start(self, socket_unit=SOCKET):
        systemctl("start", socket_unit)

    def connect(self, address=LOOPBACK):
        client = Client(address)
        self.clients.append(client)
        return client

    def hold(self):
        """A connection whose request the model has, and does not answer."""
        client = self.connect()
        target = f"/t/silent?{client.port}.{self.began}"
        client.send(request("GET", target))
        until(lambda: self.model.events("request", target=target), "request at the model")

    def ask(self, *arguments, address=LOOPBACK, **more):
        """One request on a connection of its own."""
        with contextlib.closing(Client(address)) as client:
            return client.ask(*arguments, **more)

    def served(self, address=LOOPBACK, **more):
        same(self.ask("GET", "/api/version", address=address, **more).status, 200, "status")

    def is_active(self, unit=SERVICE):
        return show(unit, "ActiveState") == "active"

    def pid(self):
        return int(show(SERVICE, "MainPID"))

    def instances(self):
        """Main processes of the connections that inetd's socket has."""
        units = systemctl("list-units", "--plain", "--no-legend", "--state=active", "tinyauth-inetd@*").split("\n")
        return [int(show(unit.split()[0], "MainPID")) for unit in units if unit]

    def journal(self):
        """What tinyauth and systemd said in this test, all that journald was sent until now."""
        run("journalctl", "--sync")
        return run("journalctl", "--no-pager", "--output=short-precise", f"--since=@{self.began:.3f}",
                   "--unit=tinyauth*", status=None)

    def close(self):
        for load in self.loads:
            load.stop()
        for client in self.clients:
            client.close()
        # the services first would come back by their sockets
        systemctl("kill", "--signal=CONT", "--kill-who=all", SERVICE, status=None)
        systemctl("stop", SOCKET, INETD, SERVICE, "tinyauth-inetd@*.service", status=None)
        systemctl("reset-failed", status=None)
        left = [pid for pid in os.listdir("/proc") if pid.isdigit() and self.is_tinyauth(pid)]
        for drop_ins in UNITS.glob("tinyauth*.d"):
            shutil.rmtree(drop_ins)
        shutil.rmtree("/run/tinyauth", ignore_errors=True)
        KEYS.unlink()
        systemctl("daemon-reload")
        return [f"process {pid} left behind" for pid in left]

    @staticmethod
    def is_tinyauth(pid):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{pid}/exe").startswith(str(BINARY))
        return False


# ---- the units as they are shipped

def test_units_are_sound(host):
    """systemd-analyze verify has nothing to say, but for the line that older versions do not know."""
    said = subprocess.run(["systemd-analyze", "verify", "--man=no", *(UNITS / unit for unit in (SOCKET, SERVICE, INETD, INSTANCE))],
                          text=True, capture_output=True)
    lines = [line for line in said.stderr.splitlines() if "tinyauth" in line]
    if version() < 253:
        lines = [line for line in lines if "ignoring: notify-reload" not in line]
    same(lines, [], "complaints")
    same(said.returncode, 0, "status of verify")


def test_exposure(host):
    """Both services expose at most 1.5, counted for the loaded units."""
    host.start()
    for unit in (SERVICE, "tinyauth-inetd@test.service"):
        text = run("systemd-analyze", "security", "--no-pager", unit, status=None)
        exposure = float(re.search(r"exposure level for \S+: ([\d.]+)", text)[1])
        assert exposure <= EXPOSURE, f"{unit}: {exposure}\n{text}"


def test_first_request_starts_it(host):
    """Nothing runs until the first request, which is answered; the service is ready before it counts as active."""
    host.start()
    assert not host.is_active(), "active without a request"
    host.served()
    assert host.is_active(), "not active after a request"
    same(host.ask("GET", "/api/version", key=None).status, 401, "without a key")
    same(show(SERVICE, "NotifyAccess"), "main", "who may notify")
    assert show(SERVICE, "StatusText"), "no STATUS="


def test_no_privileges(host):
    """Supervisor and workers: a user of their own, no capabilities, no new privileges, a seccomp filter."""
    host.start()
    host.served()
    for pid in [host.pid(), *children(host.pid())]:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        assert "0" not in status["Uid"].split(), f"process {pid} is root"
        same(int(status["CapEff"], 16) | int(status["CapPrm"], 16) | int(status["CapBnd"], 16), 0, "capabilities")
        same(status["NoNewPrivs"], "1", "NoNewPrivs")
        same(status["Seccomp"], "2", "Seccomp")


def test_several_sockets(host):
    """Two ports and a unix socket are all served."""
    host.set(SOCKET, "ListenStream=21435", "ListenStream=/run/tinyauth-test.sock", section="Socket")
    host.start()
    for address in (LOOPBACK, ("127.0.0.1", 21435), "/run/tinyauth-test.sock"):
        host.served(address=address)


def test_clients_from_elsewhere(host):
    """The service may connect to loopback addresses only, and yet serves clients of others."""
    run("ip", "address", "replace", "192.0.2.1/32", "dev", "lo")
    host.start()
    host.served(address=("192.0.2.1", PORT))


def address_rules_hold():
    """Does systemd have what it takes for IPAddressDeny=? Without, it lets everything pass and says nothing."""
    connect = "import socket; socket.create_connection(('127.0.0.1', 11434), 1)"
    done = subprocess.run(["systemd-run", "--quiet", "--wait", "--property=IPAddressDeny=any", "python3", "-c", connect])
    return done.returncode != 0


def test_no_connection_elsewhere(host):
    """The service cannot connect to an address that the unit does not allow."""
    if not address_rules_hold():
        raise Skip("address rules have no effect on this machine")
    run("ip", "address", "replace", "192.0.2.1/32", "dev", "lo")
    with socket.create_server(("192.0.2.1", 0)) as elsewhere:
        elsewhere.settimeout(0.1)
        host.set(SERVICE, TINYAUTH_UPSTREAM=f"192.0.2.1:{elsewhere.getsockname()[1]}", TINYAUTH_CONNECT_TIMEOUT="1s",
                 TINYAUTH_FIRST_BYTE_TIMEOUT="2s")
        host.start()
        status = host.ask("GET", "/api/version").status
        assert status in (502, 503, 504), f"status {status}"
        with contextlib.suppress(TimeoutError):
            elsewhere.accept()
            raise AssertionError("it connected")


# ---- changes

def accepted(host, key):
    return host.ask("GET", "/api/version", key=key).status == 200


def test_key_edit(host):
    """A key added by the command is taken without a signal, and the file stays readable for the service."""
    host.start()
    host.served()
    secret = run(BINARY, "key", "add", "bob", "-k", KEYS).split()[-1]
    until(lambda: accepted(host, secret), "acceptance of the new key")
    same(KEYS.group(), "tinyauth", "group of the keys file")


def test_reload_under_load(host):
    """systemctl reload: the same process, nothing lost, the new key taken and the old one refused."""
    host.start()
    load = Load(host)
    stream = Once(host.connect(), events=30, gap_ms=50)
    pid = host.pid()
    host.keys(f"alice {sha256(ALICE)}\nbob {sha256(BOB)}\n")
    systemctl("reload", SERVICE)
    if version() >= 253:
        assert accepted(host, BOB), "reload came back before the new key was in force"
    until(lambda: accepted(host, BOB), "acceptance of the new key", 1.0)
    until(lambda: show(SERVICE, "ActiveState") == "active", "end of the reload")
    same(host.pid(), pid, "main process")
    load.wait_done(load.done + 100)
    assert stream.whole(), f"the stream was cut: {stream.error}"
    same(load.stop(), [], "errors under load")


def test_reload_is_complete(host):
    """Ten times a reload; with systemd 253 and newer the change is in force when the command comes back."""
    host.start()
    host.served()
    workers = children(host.pid())
    for key in [BOB, ALICE] * 5:
        host.keys(f"someone {sha256(key)}\n")
        systemctl("reload", SERVICE)
        if version() < 253:
            until(lambda: accepted(host, key), "acceptance of the new key")
        assert accepted(host, key), "reload came back before the change was in force"
    same((children(host.pid()), show(SERVICE, "NRestarts")), (workers, "0"), "workers and restarts")


@contextlib.contextmanager
def held(pid):
    """This process stands still, also when systemd sends it a CONT."""
    group = Path("/sys/fs/cgroup" + show(SERVICE, "ControlGroup"))
    own = group / "held"
    own.mkdir()
    (own / "cgroup.procs").write_text(str(pid))
    (own / "cgroup.freeze").write_text("1")
    until(lambda: "frozen 1" in (own / "cgroup.events").read_text(), "standstill")
    try:
        yield
    finally:
        (own / "cgroup.freeze").write_text("0")
        (group / "cgroup.procs").write_text(str(pid))
        own.rmdir()


def test_reload_waits(host):
    """systemctl reload waits for a supervisor that is slow to hear of it; before systemd 253 it only sends the signal."""
    host.start()
    host.served()
    host.keys(f"bob {sha256(BOB)}\n")
    with held(host.pid()):
        reload = subprocess.Popen(["systemctl", "reload", SERVICE])
        until(lambda: show(SERVICE, "SubState") == "reload-signal" or reload.poll() is not None, "reload")
        same(reload.poll(), None if version() >= 253 else 0, "status of the reload before it was heard of")
    same(reload.wait(20), 0, "status of the reload")
    if version() >= 253:
        assert accepted(host, BOB), "reload came back before the change was in force"
    until(lambda: accepted(host, BOB), "acceptance of the new key")
    until(host.is_active, "end of the reload")


def test_reload_of_wrong_keys(host):
    """A keys file with an error changes nothing: reload ends, the service stays up with the old keys."""
    host.start()
    host.served()
    pid = host.pid()
    host.keys("alice\n")
    systemctl("reload", SERVICE, status=None)
    until(lambda: "keys_refused" in host.journal(), "line about the keys")
    host.served()
    same((host.pid(), show(SERVICE, "ActiveState")), (pid, "active"), "process and state")


@contextlib.contextmanager
def journald_limit(*lines):
    """journald with these settings."""
    path = Path("/run/systemd/journald.conf.d/test.conf")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["[Journal]", *lines, ""]))
    systemctl("restart", "systemd-journald")
    try:
        yield
    finally:
        path.unlink()
        systemctl("restart", "systemd-journald")


def flood(host, count):
    """So many requests, each with a line in the log, not faster than journald takes them."""
    client = host.connect()
    for _ in range(count // 50):
        client.send(request("GET", "/api/version") * 50)
        same({client.read().status for _ in range(50)}, {200}, "statuses")


def test_journal_keeps_every_line(host):
    """journald drops none of the service's lines, however many they are: it would at 10,000 in 30 s, here at a few hundred."""
    with journald_limit("RateLimitIntervalSec=1h", "RateLimitBurst=50"):
        host.start()
        flood(host, 2000)
        host.keys("alice\n")
        until(lambda: "keys_refused" in host.journal(), "line about the keys after many others")
        same(host.journal().count("path=/api/version status=200"), 2000, "lines of requests")


def test_upgrade_under_load(host):
    """USR2 with a new binary: the same process, new workers, nothing lost; reload works after it as before."""
    host.start()
    load = Load(host)
    stream = Once(host.connect(), events=30, gap_ms=50)
    pid = host.pid()
    old = set(children(pid))
    host.install_binary()
    os.kill(pid, signal.SIGUSR2)
    until(lambda: children(pid) and not old & set(children(pid)), "new workers alone", 10)
    same(os.readlink(f"/proc/{pid}/exe"), str(BINARY), "binary that runs")
    load.wait_done(load.done + 100)
    assert stream.whole(), f"the stream was cut: {stream.error}"
    same(load.stop(), [], "errors under load")
    same((host.pid(), show(SERVICE, "NRestarts"), show(SERVICE, "ActiveState")), (pid, "0", "active"), "the service")
    host.keys(f"bob {sha256(BOB)}\n")
    systemctl("reload", SERVICE)
    until(lambda: accepted(host, BOB), "acceptance of the new key", 1.0)


def test_restart_under_load(host):
    """systemctl restart: streams end, no connection is refused, the new process goes on."""
    host.start()
    load = Load(host)
    stream = Once(host.connect(), events=20, gap_ms=50)
    pid = host.pid()
    systemctl("restart", SERVICE)
    assert stream.whole(), f"the stream was cut: {stream.error}"
    load.wait_done(load.done + 100)
    same(load.stop(), [], "errors under load")
    assert host.pid() != pid, "the same process"
    same(show(SERVICE, "Result"), "success", "result")


def test_stop_drains(host):
    """systemctl stop waits for the stream, and the service ends well."""
    host.start()
    stream = Once(host.connect(), events=20, gap_ms=50)
    systemctl("stop", SOCKET, SERVICE)
    assert stream.whole(), f"the stream was cut: {stream.error}"
    same((show(SERVICE, "Result"), show(SERVICE, "ExecMainStatus")), ("success", "0"), "result and exit status")


# ---- coming and going

def test_idle_exit(host):
    """It leaves when idle, and the next request brings it back; a stream that takes longer is not cut."""
    host.drop_in("idle.conf")
    host.set(SERVICE, TINYAUTH_IDLE_EXIT="1s")
    host.start()
    stream = Once(host.connect(), events=20, gap_ms=100)
    assert stream.whole(), f"the stream was cut: {stream.error}"
    until(lambda: show(SERVICE, "ActiveState") == "inactive", "idle exit", 10)
    same((show(SERVICE, "Result"), show(SERVICE, "ExecMainStatus")), ("success", "0"), "result and exit status")
    assert host.is_active(SOCKET), "the port is closed"
    host.served()
    assert host.is_active(), "not back"


def test_idle_exit_loses_nothing(host):
    """Requests that come just as it leaves are answered."""
    host.set(SERVICE, TINYAUTH_IDLE_EXIT="300ms")
    # that many starts are meant here
    host.set(SERVICE, "StartLimitIntervalSec=0", section="Unit")
    host.set(SOCKET, "TriggerLimitIntervalSec=0", section="Socket")
    host.start()
    pids = set()
    for step in range(40):
        host.served()
        pids.add(host.pid())
        time.sleep(0.290 + step % 20 * 0.002)       # around the moment: this wait is what is tested
    until(lambda: show(SERVICE, "ActiveState") == "inactive", "idle exit", 10)
    assert len(pids - {0}) > 3, f"it hardly ever left: {pids}"


def test_watchdog(host):
    """A supervisor that hangs is replaced; one that does not is left alone."""
    host.set(SERVICE, "WatchdogSec=1", "TimeoutAbortSec=1")
    host.start()
    host.served()
    pid, began = host.pid(), time.monotonic()
    until(lambda: time.monotonic() > began + 3, "three periods", 4)
    same((host.pid(), show(SERVICE, "NRestarts")), (pid, "0"), "process and restarts of a sound service")
    os.kill(pid, signal.SIGSTOP)
    until(lambda: host.pid() not in (0, pid), "new main process", 15)
    same(show(SERVICE, "NRestarts"), "1", "restarts")
    host.served()


def test_watchdog_after_upgrade(host):
    """The watchdog is fed by the new binary, too."""
    host.set(SERVICE, "WatchdogSec=1", "TimeoutAbortSec=1")
    host.start()
    host.served()
    pid = host.pid()
    old = set(children(pid))
    os.kill(pid, signal.SIGUSR2)
    until(lambda: children(pid) and not old & set(children(pid)), "new workers alone", 10)
    began = time.monotonic()
    until(lambda: time.monotonic() > began + 3, "three periods", 4)
    same((host.pid(), show(SERVICE, "NRestarts")), (pid, "0"), "process and restarts")
    host.served()


def test_stopped_worker(host):
    """A worker that hangs does not stay: the supervisor replaces it, or the watchdog everything."""
    host.set(SERVICE, "WatchdogSec=1", "TimeoutAbortSec=1", TINYAUTH_WORKERS="2")
    host.start()
    host.served()
    worker = children(host.pid())[0]
    os.kill(worker, signal.SIGSTOP)
    until(lambda: not alive(worker), "end of the stopped worker", 20)
    until(host.is_active, "service", 10)
    for _ in range(20):
        host.served()


def test_crash(host):
    """A supervisor that is killed is replaced."""
    host.start()
    host.served()
    pid = host.pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: host.pid() not in (0, pid), "new main process", 10)
    host.served()


# ---- credentials and TLS

def test_keys_as_credential(host):
    """credentials.conf: the file belongs to root alone, and a restart takes a change up."""
    host.drop_in("credentials.conf")
    host.keys(f"alice {sha256(ALICE)}\n", mode=0o600, group="root")
    host.start()
    host.served()
    host.keys(f"bob {sha256(BOB)}\n", mode=0o600, group="root")
    systemctl("restart", SERVICE)
    assert accepted(host, BOB) and not accepted(host, ALICE), "the change is not in force"


def make_certificate(serial):
    """A certificate of its own authority where tls.conf expects it."""
    directory = KEYS.parent
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=models.test", "-addext", "subjectAltName=DNS:models.test", "-set_serial", str(serial),
        "-keyout", directory / "key.new", "-out", directory / "cert.new")
    for name in ("key", "cert"):
        fresh = directory / f"{name}.new"
        fresh.chmod(0o640)
        shutil.chown(fresh, "root", "tinyauth")
        fresh.rename(directory / f"{name}.pem")


def tls_request():
    """The status of a request by TLS, and the serial number of the certificate that was shown."""
    context = ssl.create_default_context(cafile=str(KEYS.parent / "cert.pem"))
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(LOOPBACK, 10) as plain, context.wrap_socket(plain, server_hostname="models.test") as secure:
        secure.sendall(request("GET", "/api/version"))
        status = int(secure.recv(4096).split()[1])
        shown = secure.getpeercert(binary_form=True)
    return status, serial_of(shown)


def serial_of(certificate):
    pem = ssl.DER_cert_to_PEM_cert(certificate)
    done = subprocess.run(["openssl", "x509", "-noout", "-serial"], input=pem, text=True, capture_output=True, check=True)
    return int(done.stdout.strip().partition("=")[2], 16)


def test_tls_renewal(host):
    """tls.conf: a new certificate is in force after a reload, in the same process; with systemd 253 and newer each of
    twenty when the command is back."""
    make_certificate(1)
    host.drop_in("tls.conf")
    host.start()
    same(tls_request(), (200, 1), "status and serial number")
    pid = host.pid()
    for serial in range(2, 22):
        make_certificate(serial)
        systemctl("reload", SERVICE)
        if version() >= 253:
            same(tls_request(), (200, serial), "status and serial number as the reload came back")
        until(lambda: tls_request() == (200, serial), "new certificate")
    same(host.pid(), pid, "main process")


# ---- a process for each connection

def test_inetd(host):
    """Accept=yes: each connection has a process, which keeps it alive, streams, logs to the journal and ends."""
    host.start(INETD)
    client = host.connect()
    for _ in range(2):
        same(client.ask("GET", "/api/version").status, 200, "status")
    same(len(host.instances()), 1, "instances")
    same(host.ask("GET", "/api/version", key=None).status, 401, "without a key")
    stream = Once(host.connect(), events=5, gap_ms=50)
    assert stream.whole(), f"no whole stream: {stream.error}"
    for client in host.clients:
        client.close()
    until(lambda: not host.instances(), "end of the instances")
    until(lambda: host.journal().count("path=/api/version status=200") == 2, "access lines in the journal")
    assert "addr=127.0.0.1 " in host.journal(), "the client's address is not in the log"


def test_inetd_shares_the_rate(host):
    """Accept=yes: the limit for an address holds over connections."""
    host.set(INSTANCE, TINYAUTH_IP_RATE="1/h", TINYAUTH_IP_BURST="4")
    host.start(INETD)
    same([host.ask("GET", "/api/version").status for _ in range(8)], [200] * 5 + [429] * 3, "statuses")


def test_inetd_gives_counts_back(host):
    """Accept=yes: connections count together, and one that is killed in flight is given back."""
    host.set(INSTANCE, TINYAUTH_IP_CONNS="2")
    host.start(INETD)
    for _ in range(2):
        host.hold()
    same(len(host.instances()), 2, "instances")
    until(lambda: host.ask("GET", "/api/version").status == 429, "refusal of a third connection")
    os.kill(host.instances()[0], signal.SIGKILL)
    until(lambda: host.ask("GET", "/api/version").status == 200, "room after one was killed")


def test_inetd_under_load(host):
    """Accept=yes under load: 60 connections, eight at a time, and none fails."""
    host.start(INETD)
    errors, left = [], list(range(60))

    def work():
        while left:
            with contextlib.suppress(IndexError):
                left.pop()
                try:
                    host.served()
                except (Cut, OSError, AssertionError) as error:
                    errors.append(repr(error))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(errors[:3], [], "first errors")


# ---- the run

class Tests:
    def __init__(self, verbose):
        self.verbose, self.passed, self.failed = verbose, 0, 0

    def one(self, test, model):
        host, problems, word, began = None, [], None, time.monotonic()
        try:
            host = Host(model)
            test(host)
        except Skip as why:
            word = f"skipped: {why}"
        except Exception as error:
            where = ", ".join(f"{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
                              if frame.filename == __file__)
            problems.append(f"{type(error).__name__}: {error} (line {where})")
        journal = host.journal() if problems and host else ""
        if host:
            problems += host.close()
        self.report(test, problems, word, time.monotonic() - began, journal)

    def report(self, test, problems, word, seconds, journal):
        self.failed += bool(problems)
        self.passed += not problems and not word
        if problems:
            print(f"FAILED  {test.__name__} ({seconds:.1f} s): {test.__doc__}")
            for line in problems:
                print(f"        {line}")
            for line in journal.splitlines()[-25:]:
                print(f"        | {line[:300]}")
        elif self.verbose or word:
            print(f"{word or 'ok':7} {test.__name__} ({seconds:.1f} s)")
        sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description="tests of the systemd units, inside their container")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("pattern", nargs="?", default="")
    options = parser.parse_args()
    tests = Tests(options.verbose)
    model = Model("/tmp", "--port", "11434")
    for name, test in list(globals().items()):
        if name.startswith("test_") and options.pattern in name:
            tests.one(test, model)
    model.stop()
    Started.kill_all()
    print(f"{tests.passed} passed, {tests.failed} failed", flush=True)
    return 1 if tests.failed else 0


if __name__ == "__main__":
    sys.exit(main())
