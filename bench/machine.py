"""What the benchmark needs from the machine: programs, processes that surely end, ports, CPU and memory accounts."""

import ctypes
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = {"nginx": "nginx-light", "haproxy": "haproxy", "caddy": "caddy", "gnuplot": "gnuplot-nox", "wrk": "wrk",
            "openssl": "openssl", "gcc": "gcc", "musl-gcc": "musl-tools", "strip": "binutils", "make": "make"}
LIBRARIES = {"/usr/include/openssl/ssl.h": "libssl-dev", "/usr/include/stdlib.h": "libc6-dev",
             "/usr/include/bearssl/bearssl.h": "libbearssl-dev"}
FILES_WANTED = 65536                # descriptors: 9,000 connections on both sides of several proxies
POLICY = Path("/usr/sbin/policy-rc.d")


def say(text):
    print(text, flush=True)


# Programs

def find(name):
    """Debian keeps servers in /usr/sbin, which an ordinary user's PATH lacks."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def missing():
    """Packages that would bring what is not there."""
    return ([package for tool, package in PACKAGES.items() if not find(tool)] +
            [package for header, package in LIBRARIES.items() if not Path(header).exists()])


def apt_get(*words):
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run([*sudo, "apt-get", "-qq", *words], env=environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install():
    """Everything that is missing, else one line for each package that could not be installed."""
    wanted = missing()
    if not wanted:
        return
    if not shutil.which("apt-get"):
        say(f"not installed, and no apt-get to install it: {' '.join(wanted)}")
        return
    say(f"installing {' '.join(wanted)}")
    # Installing a server starts it as a rule; these are started by the benchmark alone.
    held = os.geteuid() == 0 and not POLICY.exists()
    if held:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        apt_get("update")
        if not apt_get("install", "-y", "--no-install-recommends", *wanted):
            for package in wanted:
                apt_get("install", "-y", "--no-install-recommends", package)
    finally:
        if held:
            POLICY.unlink()
    for package in missing():
        say(f"could not be installed: {package}")


def output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).strip()


def version(name, *words):
    path = find(name)
    found = re.search(r"\d+\.\d+[.\w]*", output(path, *words)) if path else None
    return found.group(0) if found else "none"


def first_match(pattern, path):
    try:
        found = re.search(pattern, Path(path).read_text(), re.M)
    except OSError:
        found = None
    return found.group(1).strip().strip('"') if found else "unknown"


def describe(tinyauth):
    """Machine, kernel, versions and commit, as pairs."""
    here = Path(__file__).resolve().parent
    commit = output("git", "-C", str(here), "rev-parse", "--short", "HEAD").splitlines()
    changed = output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no", "--", "../tinyauth.c",
                     "../tinyauth.h", "../Makefile")
    memory = int(first_match(r"^MemTotal:\s+(\d+)", "/proc/meminfo")) >> 20
    return [
        ("processor", f"{first_match(r'^model name.*?: (.*)', '/proc/cpuinfo')}, {len(os.sched_getaffinity(0))} CPUs, "
                      f"{platform.machine()}, {memory} GB"),
        ("kernel", f"Linux {re.match(r'[0-9.]+', platform.release()).group(0)}"),
        ("system", first_match(r"^PRETTY_NAME=(.*)", "/etc/os-release")),
        ("tinyauth", f"{output(tinyauth, '-V')}, commit {commit[0] if commit else 'unknown'}"
                     f"{' and changes on top' if changed else ''}"),
        ("others", f"nginx {version('nginx', '-v')}, haproxy {version('haproxy', '-v')}, caddy {version('caddy', 'version')}, "
                   f"OpenSSL {version('openssl', 'version')}, wrk {version('wrk', '-v')}, gcc {version('gcc', '--version')}"),
    ]


class Noise:
    """How much of the machine's time went to somebody else: CPU time stolen by the host, and the load at the start."""

    def __init__(self):
        self.load = os.getloadavg()[0]
        self.before = self.read()

    @staticmethod
    def read():
        return [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]

    def told(self):
        spent = [now - before for now, before in zip(self.read(), self.before)]
        return f"load average {self.load:.1f} at the start, {100 * spent[7] / max(1, sum(spent)):.1f} % of the time stolen"


# Processes

class Processes:
    """Those that we started. Each is ended by its pid on every way out."""

    def __init__(self):
        self.running = []
        libc = ctypes.CDLL(None)
        parent = os.getpid()

        def before_exec():
            libc.prctl(1, signal.SIGTERM)           # PR_SET_PDEATHSIG: should we be killed, they end too
            if os.getppid() != parent:
                os._exit(1)

        self.before_exec = before_exec

    def start(self, command, **extra):
        process = subprocess.Popen([str(word) for word in command], preexec_fn=self.before_exec, **extra)
        self.running.append(process)
        return process

    def run(self, command, timeout, **extra):
        """Runs to its end; returns (status, stdout, stderr). One that takes longer is ended, and has failed."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **extra)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.stop(process)
            return 1, "", f"no end after {timeout:.0f} s"
        self.running.remove(process)
        return process.returncode, out, err

    def stop(self, *processes):
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            children = tree(process.pid)[1:]
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                for pid in children:                # a supervisor that is killed cannot end its workers
                    kill(pid)
                process.kill()
                process.wait(10)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()
            if process in self.running:
                self.running.remove(process)

    def stop_all(self):
        self.stop(*self.running)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def tree(pid):
    """The process and all below it."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def place(pids, cpus):
    """Puts processes and all their threads on these CPUs."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                os.sched_setaffinity(int(task.name), cpus)
            except ProcessLookupError:
                pass                                # a thread that has ended meanwhile


def cpu_ns(pids):
    """CPU time of processes by their POSIX CPU clocks, which count in ns and include threads that have exited."""
    return sum(int(time.clock_gettime((~pid << 3) | 2) * 1e9) for pid in pids)


def anonymous_kb(pids):
    """Anonymous and shared memory touched, in KB; what processes share counts once."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += sum(int(re.search(rf"^{name}:\s+(\d+)", text, re.M).group(1)) for name in ("Pss_Anon", "Pss_Shmem"))
    return total


def descriptors():
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limits():
    """As many descriptors as we are allowed, and children inherit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for wanted in ((FILES_WANTED, max(hard, FILES_WANTED)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, wanted)
            return
        except (ValueError, OSError):
            continue


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def exit_on_signals():
    """Ways out that a `finally` would not see become ordinary ones."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
