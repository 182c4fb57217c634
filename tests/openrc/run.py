#!/usr/bin/env python3
"""contrib's script for OpenRC under the real OpenRC, laid over this machine's root.

    python3 tests/openrc/run.py [--tinyauth BIN] [--cache DIR] [-v] [PATTERN]

OpenRC cannot be installed beside another init: its packages are fetched by apt-get into DIR (default build/openrc) and
unpacked over this machine's root in an overlay, which only this process sees, with a network and processes of its own.
Each test_* function gets a Service: script, settings and keys freshly installed, nothing started, a model on Ollama's
port. Needs root, unshare and overlayfs; without them nothing is tested. The last line is `N passed, N failed`.
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
import threading
import time
import traceback
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from e2e import ALICE, BOB, Client, Load, Model, Started, Stream, children, parse_line, same, sha256, until  # noqa: E402

WATCHDOG = 240                          # seconds for the whole run
PACKAGES = ["openrc", "insserv", "libeinfo1", "librc1"]
BINARY, KEYS = Path("/usr/sbin/tinyauth"), Path("/etc/tinyauth/keys")
LOG, ERRORS = Path("/var/log/tinyauth.log"), Path("/var/log/tinyauth.err")
SCRIPT, SETTINGS, PIDFILE = Path("/etc/init.d/tinyauth"), Path("/etc/conf.d/tinyauth"), Path("/run/tinyauth.pid")


# ---- the place

def fetch(cache):
    """The packages as files; False when they are not to be had."""
    def missing():
        return [package for package in PACKAGES if not list(cache.glob(f"{package}_*.deb"))]
    cache.mkdir(parents=True, exist_ok=True)
    if missing() and shutil.which("apt-get"):
        subprocess.run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *missing()], cwd=cache,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return not missing()


def mount(kind, place, *options, source="none"):
    Path(place).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, source, place, *(["-t", kind] if kind else [])], check=True)


def enter(cache, binary, scratch):
    """Makes the overlay and goes there; what is written from now on is gone with this process."""
    mount("tmpfs", scratch)
    root = Path(scratch) / "root"
    for name in ("upper", "work"):
        (Path(scratch) / name).mkdir()
    mount("overlay", root, "-o", f"lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work")
    for package in PACKAGES:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", next(cache.glob(f"{package}_*.deb"))], stdout=subprocess.PIPE) as tar:
            subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", root], stdin=tar.stdout, check=True)
    mount("proc", root / "proc")
    mount("tmpfs", root / "run")
    mount(None, root / "dev", "--rbind", source="/dev")
    shutil.copy(binary, f"{root}{BINARY}")
    shutil.rmtree(f"{root}/contrib", ignore_errors=True)
    shutil.copytree(PROJECT / "contrib", f"{root}/contrib")
    os.chroot(root)
    os.chdir("/")
    shutil.rmtree("/etc/init.d")            # this machine's services are not for OpenRC to start
    SCRIPT.parent.mkdir()
    for name in ("exclusive", "starting", "started", "stopping", "failed", "daemons", "options", "tmp"):
        Path("/run/openrc", name).mkdir(parents=True)
    Path("/run/openrc/softlevel").touch()
    with socket.socket() as any_socket:     # loopback goes up
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))


# ---- the service

class Service:
    """The service as an administrator meets it. address and loads are what e2e.Load wants of a server."""
    address = ("127.0.0.1", 21434)

    def __init__(self, model):
        self.model, self.loads, self.clients = model, [], []
        shutil.copy("/contrib/openrc/tinyauth", SCRIPT)
        SCRIPT.chmod(0o755)
        SETTINGS.parent.mkdir(exist_ok=True)
        shutil.copy("/contrib/openrc/tinyauth.confd", SETTINGS)
        with SETTINGS.open("a") as settings:
            settings.write('tinyauth_options="--ip-rate off"\n')
        KEYS.parent.mkdir(exist_ok=True)
        self.keys(f"alice {sha256(ALICE)}\n")

    def keys(self, text):
        fresh = KEYS.with_name("keys.new")
        fresh.write_text(text)
        fresh.chmod(0o600)
        fresh.rename(KEYS)

    def rc(self, *words, status=0):
        """rc-service to its end; what it printed."""
        done = subprocess.run(["rc-service", "tinyauth", *words], text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        same(done.returncode, status, f"status of {' '.join(words)}: {done.stdout}")
        return done.stdout

    def start(self):
        self.rc("start")
        until(lambda: self.status() == 200, "first answer")

    def status(self, key=ALICE):
        with contextlib.suppress(OSError), contextlib.closing(Client(self.address)) as client:
            return client.ask("GET", "/api/version", key=key).status
        return None

    def connect(self):
        client = Client(self.address)
        self.clients.append(client)
        return client

    def supervisor(self):
        """The one process that OpenRC's own starts."""
        found = children(int(PIDFILE.read_text()))
        same(len(found), 1, "processes of supervise-daemon")
        return found[0]

    @staticmethod
    def running():
        """Every process of the binary, also of one that was replaced."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/exe").startswith(str(BINARY)):
                    found.append(int(pid))
        return found

    @staticmethod
    def events(name):
        lines = [parse_line(line) for line in LOG.read_bytes().splitlines()] if LOG.exists() else []
        return [line for line in lines if line.get("event") == name]

    def close(self):
        for load in self.loads:
            load.stop()
        for client in self.clients:
            client.close()
        self.rc("--ifstarted", "stop")
        problems = [f"process {pid} left behind" for pid in self.running()]
        for pid in self.running():
            os.kill(pid, signal.SIGKILL)
        for path in (LOG, ERRORS, KEYS, SETTINGS):
            path.unlink(missing_ok=True)
        return problems


# ---- the tests

def test_start(service):
    """As shipped it serves port 21434 in front of Ollama's; OpenRC knows that it runs, and its workers are nobody's."""
    service.rc("status", status=3)
    service.start()
    same(service.status(key=None), 401, "without a key")
    assert "started" in service.rc("status")
    for pid in children(service.supervisor()):
        same(os.stat(f"/proc/{pid}").st_uid, 65534, f"user of worker {pid}")


def test_checkconfig(service):
    """checkconfig shows what would run; with a broken keys file it says the line, and nothing starts."""
    assert "keys      1 from /etc/tinyauth/keys" in service.rc("checkconfig")
    service.keys("alice\n")
    assert "/etc/tinyauth/keys:1: " in service.rc("start", status=1)
    same(service.running(), [], "processes")


def test_restart(service):
    """restart takes another process; with a broken keys file it says the line, and the old one goes on serving."""
    service.start()
    pid = service.supervisor()
    service.keys("alice\n")
    assert "/etc/tinyauth/keys:1: " in service.rc("restart", status=1)
    same((service.supervisor(), service.status()), (pid, 200), "process and answer")
    service.keys(f"bob {sha256(BOB)}\n")
    service.rc("restart")
    until(lambda: service.status(key=BOB) == 200, "first answer")
    assert service.supervisor() != pid, "the old process is still there"


def test_start_that_fails_later(service):
    """A start that fails after the check, as the port is in use, is told in a file, and tried again."""
    with socket.create_server(service.address):
        service.rc("start")
        until(lambda: ERRORS.exists() and "tinyauth: cannot listen on " in ERRORS.read_text(), "word from it")
    until(lambda: service.status() == 200, "an answer, once the port was free")


def test_reload(service):
    """A new key is taken, by the same process; a broken file is refused with its line and changes nothing."""
    service.start()
    pid = service.supervisor()
    service.keys(f"alice {sha256(ALICE)}\nbob {sha256(BOB)}\n")
    service.rc("reload")
    until(lambda: service.status(key=BOB) == 200, "acceptance of the new key")
    service.keys("alice\n")
    assert "/etc/tinyauth/keys:1: " in service.rc("reload", status=1)
    same((service.status(key=BOB), service.supervisor()), (200, pid), "answer and process")


def test_reopen(service):
    """After the log was renamed, reopen begins a new one."""
    service.start()
    old = LOG.rename(LOG.with_name("tinyauth.log.1"))
    service.rc("reopen")
    until(lambda: service.events("log_reopened"), "line in the new log")
    size = old.stat().st_size
    same(service.status(), 200, "answer")
    until(lambda: b"status=200" in LOG.read_bytes(), "access line in the new log")
    same(old.stat().st_size, size, "size of the old log")


def test_upgrade_under_load(service):
    """upgrade: the same process, new workers, nothing lost."""
    service.start()
    load, pid = Load(service), service.supervisor()
    old = set(children(pid))
    fresh = BINARY.with_name("tinyauth.new")
    shutil.copy(BINARY, fresh)
    fresh.rename(BINARY)
    service.rc("upgrade")
    until(lambda: children(pid) and not old & set(children(pid)), "new workers alone", 10)
    load.wait_done(load.done + 100)
    same(load.stop(), [], "errors under load")
    same((os.readlink(f"/proc/{pid}/exe"), service.supervisor()), (str(BINARY), pid), "binary and process")


def test_killed(service):
    """A server that is killed comes back, and the killed one's workers do not stay."""
    service.start()
    before = service.running()
    os.kill(service.supervisor(), signal.SIGKILL)
    until(lambda: not set(before) & set(service.running()), "end of the old processes", 10)
    until(lambda: service.status() == 200, "another one", 10)


def test_stop(service):
    """stop lets a stream run to its end, and leaves no process."""
    service.start()
    stream = Stream(service.connect(), events=20, gap_ms=50)
    began = time.monotonic()
    service.rc("stop")
    assert stream.whole(), f"the stream was cut: {stream.error}"
    assert time.monotonic() - began > 0.5, "stop did not wait for the stream"
    same(service.running(), [], "processes")


# ---- the run

class Tests:
    def __init__(self, verbose):
        self.verbose = verbose
        self.passed, self.failed = 0, 0

    def one(self, test, model):
        service, problems, began = None, [], time.monotonic()
        try:
            service = Service(model)
            test(service)
        except Exception as error:
            where = ", ".join(str(frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
                              if frame.filename == __file__)
            problems.append(f"{type(error).__name__}: {error} (line {where})")
        if problems and LOG.exists():
            problems += LOG.read_text().splitlines()[-8:]
        try:
            problems += service.close() if service else []
        except Exception as error:
            problems.append(f"at the end: {type(error).__name__}: {error}")
        self.failed += bool(problems)
        self.passed += not problems
        if problems:
            print(f"FAILED  {test.__name__} ({time.monotonic() - began:.1f} s): {test.__doc__}")
            for problem in problems:
                print(f"        {problem}")
        elif self.verbose:
            print(f"ok      {test.__name__} ({time.monotonic() - began:.1f} s)")
        sys.stdout.flush()

    def end(self, why=None):
        if why:
            self.failed += 1
            print(f"FAILED  {why}")
        print(f"{self.passed} passed, {self.failed} failed", flush=True)


def first_process():
    """Stays the first process of the namespaces, which reaps what daemons leave; returns in its child. All others go when
    it ends."""
    child = os.fork()
    while child:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 255)


def inside(options):
    first_process()
    tests = Tests(options.verbose)

    def abort(why):
        tests.end(why)
        os._exit(1)
    watchdog = threading.Timer(WATCHDOG, abort, [f"not done after {WATCHDOG} s"])
    watchdog.daemon = True
    watchdog.start()
    try:
        enter(options.cache.resolve(), Path(options.tinyauth).resolve(), options.inside)
    except subprocess.CalledProcessError as error:
        print(f"tests/openrc: skipped: {error}")
        tests.end()
        return 0
    model = Model("/run", "--port", "11434")
    for name, test in list(globals().items()):
        if name.startswith("test_") and options.pattern in name:
            tests.one(test, model)
    Started.kill_all()
    tests.end()
    return 1 if tests.failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tinyauth", metavar="BIN", default="./tinyauth")
    parser.add_argument("--cache", metavar="DIR", type=Path, default=PROJECT / "build/openrc")
    parser.add_argument("--inside", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="")
    options = parser.parse_args()
    if options.inside:
        return inside(options)
    why = ("not root" if os.geteuid() != 0 else "no unshare" if not shutil.which("unshare") else
           "OpenRC's packages are not to be had" if not fetch(options.cache.resolve()) else None)
    if why:
        print(f"tests/openrc: skipped: {why}")
        Tests(False).end()
        return 0
    with tempfile.TemporaryDirectory(prefix="tinyauth-openrc-") as scratch:
        return subprocess.run(["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child",
                               sys.executable, __file__, *sys.argv[1:], "--inside", scratch]).returncode


if __name__ == "__main__":
    sys.exit(main())
