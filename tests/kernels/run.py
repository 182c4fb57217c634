#!/usr/bin/env python3
"""Debian's kernels for the processors that tinyauth is built for, booted in an emulator, with the tests inside.

    python3 tests/kernels/run.py [--source DIR] [--cache DIR] [--log DIR] [--jobs N] [--tests all|core] [-v]
            [--pattern PATTERN] [MACHINE...]

Each machine is a kernel, a processor and a root of Debian packages (packages.sh), which guest.py runs in: qemu-system counts
its instructions for its time, so that no time-out in it depends on how fast or busy this machine is. A machine's tests are
added to ours; besides, it must have come to its end, and no system call may have been refused to tinyauth: each is named.
--tests runs these on every machine, --source tests the tinyauth of another directory, --log keeps what the consoles said.
DIR (default build/kernels) keeps roots. Needs Debian on x86_64, root, and qemu-system. The last line is `N passed, N failed`.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
WATCHDOG = 1800                         # seconds for one machine, of this one's time
MEMORY = 1024                           # MB
PACKAGES = ["busybox-static", "python3", "openssl", "curl", "util-linux", "mount", "coreutils", "dash", "linux-libc-dev"]
APPEND = "loglevel=4 panic=-1 log_buf_len=4M audit=1 audit_backlog_limit=8192 random.trust_bootloader=on"


@dataclasses.dataclass
class Processor:
    arch: str                           # Debian's name of it
    triplet: str
    audit: int                          # the kernel's name of it, for audit and seccomp
    emulator: list
    console: str


PROCESSORS = {
    "aarch64": Processor("arm64", "aarch64-linux-gnu", 0xC00000B7, ["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72"], "ttyAMA0"),
    "armhf": Processor("armhf", "arm-linux-gnueabihf", 0x40000028, ["qemu-system-arm", "-M", "virt", "-cpu", "cortex-a15"], "ttyAMA0"),
    "riscv64": Processor("riscv64", "riscv64-linux-gnu", 0xC00000F3, ["qemu-system-riscv64", "-M", "virt"], "ttyS0"),
    # neither RDRAND nor AES
    "x86_64": Processor("amd64", "x86_64-linux-gnu", 0xC000003E,
                        ["qemu-system-x86_64", "-M", "q35", "-cpu", "qemu64,-rdrand,-rdseed,-aes"], "ttyS0"),
}


@dataclasses.dataclass
class Machine:
    name: str
    processor: str
    release: str
    kernel: str                         # package
    tests: str = "all"                  # or core
    landlock: int = 0                   # its version there, 0: none
    page: int = 4096
    without: tuple = ()                 # flags that /proc/cpuinfo must not have
    cpu: str = ""
    append: str = ""
    container: bool = False

    @property
    def arch(self):
        return PROCESSORS[self.processor].arch


MACHINES = [
    Machine("arm64-16k", "aarch64", "trixie", "linux-image-arm64-16k", landlock=6, page=16384, cpu="cortex-a76"),
    Machine("armhf-6.12", "armhf", "trixie", "linux-image-armmp", landlock=6),
    Machine("riscv64", "riscv64", "trixie", "linux-image-riscv64", landlock=6, tests="core"),
    Machine("x86_64", "x86_64", "trixie", "linux-image-amd64", landlock=6, without=("rdrand", "rdseed", "aes")),
    Machine("arm64-6.1", "aarch64", "bookworm", "linux-image-arm64", landlock=2, tests="core"),
    Machine("armhf-6.1", "armhf", "bookworm", "linux-image-armmp", landlock=2, tests="core"),
    Machine("arm64-6.12", "aarch64", "trixie", "linux-image-arm64", landlock=6, tests="core"),
    Machine("no-landlock", "aarch64", "trixie", "linux-image-arm64", tests="core", append="lsm=capability"),
    Machine("container", "x86_64", "trixie", "linux-image-amd64", landlock=6, tests="core", without=("rdrand", "aes"),
            container=True),
]


class Failed(Exception):
    """A machine cannot be made."""


def say(text):
    print(text, flush=True)


def run(*command, **more):
    done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", **more)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


# What goes into a machine

def build(work, source, cache, processor):
    """The program, and one with another layout of its table."""
    made = {}
    cross = cache / "cross" / processor
    if processor != "x86_64":
        run(PROJECT / "tests/cross/toolchain.sh", processor, cross, cwd=PROJECT)
    for name in ("tinyauth", "other"):
        folder = work / processor / name
        folder.mkdir(parents=True)
        for file in (PROJECT / "Makefile", source / "tinyauth.c", source / "tinyauth.h"):
            shutil.copy(file, folder)
        if name == "other":
            header = folder / "tinyauth.h"
            text, count = re.subn(r"(#define TABLE_MAGIC 0x)([0-9a-f])", lambda match: match[1] + f"{int(match[2], 16) ^ 1:x}",
                                  header.read_text(encoding="utf-8"))
            if count != 1:
                raise Failed("tinyauth.h has no TABLE_MAGIC")
            header.write_text(text, encoding="utf-8")
        if processor == "x86_64":
            run("make", "-s", "-C", folder, "tinyauth")
            made[name] = folder / "tinyauth"
        else:
            run("make", "-s", "-C", folder, "cross", f"ARCH={processor}", f"CROSS_ROOT={cross}")
            made[name] = folder / "build" / processor / "tinyauth"
    return made


def call_numbers(machine, root):
    """The system calls by name, as the kernel's headers of that architecture have them."""
    folders = ["-I", root / "usr/include", "-I", root / "usr/include" / PROCESSORS[machine.processor].triplet]
    known = {"armhf": ["-D__ARM_EABI__"], "riscv64": ["-D__riscv_xlen=64"]}.get(machine.processor, [])
    text = run("gcc", "-E", "-dM", "-undef", "-nostdinc", "-x", "c", *known, *folders, "-include", "asm/unistd.h", "/dev/null")
    bases = {"__NR_SYSCALL_BASE": 0, "__ARM_NR_BASE": 0xF0000}
    calls, others = {}, []
    for name, base, number, other in re.findall(
            r"^#define __(?:ARM_)?NR_(\w+) (?:\(?(?:(\w+) ?\+ ?)?(0x[0-9a-f]+|\d+)\)?|__NR3264_(\w+))$", text, re.M):
        if other:
            others.append((name, other))
        elif name not in ("syscalls", "arch_specific_syscall", "SYSCALL_BASE"):
            calls[name] = bases.get(base, 0) + int(number, 0)
    generic = dict(re.findall(r"^#define __NR3264_(\w+) (\d+)$", text, re.M))
    calls.update({name: int(generic[other]) for name, other in others if other in generic})
    if len(calls) < 280 or "openat" not in calls or "clone3" not in calls:
        raise Failed(f"only {len(calls)} system calls in the headers of {machine.name}")
    return calls


class Archive:
    """A file that the kernel unpacks as its first root: cpio, newc."""

    def __init__(self, path):
        self.path, self.count, self.file = path, 0, open(path, "wb")
        self.folders = set()

    def put(self, name, mode, data=b"", device=(0, 0)):
        self.count += 1
        label = name.encode() + b"\0"
        fields = (self.count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(label), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + label
        self.file.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    def folder(self, name):
        if name and name not in self.folders:
            self.folder(name.rpartition("/")[0])
            self.folders.add(name)
            self.put(name, 0o40755)

    def add(self, path, name):
        """A file, a link or a folder with all in it."""
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            self.folder(name)
            for entry in sorted(path.iterdir()):
                if entry.name != "__pycache__":
                    self.add(entry, f"{name}/{entry.name}")
            return
        self.folder(name.rpartition("/")[0])
        if stat.S_ISLNK(mode):
            self.put(name, 0o120777, os.readlink(path).encode())
        elif stat.S_ISREG(mode):
            self.put(name, 0o100000 | stat.S_IMODE(mode) & 0o755, path.read_bytes())

    def text(self, name, text, mode=0o644):
        self.folder(name.rpartition("/")[0])
        self.put(name, 0o100000 | mode, text.encode())

    def close(self):
        self.put("TRAILER!!!", 0)
        self.file.close()


# What of the packages no test needs
SPARE = re.compile(r"(boot|usr/share|usr/include|usr/lib/(linux-image|udev|systemd|klibc|initramfs|python3[^/]*/(test|idlelib|lib2to3|ensurepip"
                   r"|pydoc_data|turtledemo|tkinter))|usr/lib/[^/]+/(perl|gconv|systemd|security|libdb-|libgnutls-)|var|etc)")


def add_root(archive, root):
    """The packages; the kernel does not follow links while it unpacks, so that /bin and its like come first."""
    def walk(folder):
        for entry in sorted(folder.iterdir()):
            name = str(entry.relative_to(root))
            if SPARE.match(name):
                continue
            if entry.is_dir() and not entry.is_symlink():
                archive.folder(name)
                walk(entry)
            else:
                archive.add(entry, name)

    walk(root)
    archive.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/sh\n"
                 "nobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n")
    archive.text("etc/group", "root:x:0:\ndaemon:x:1:\nstaff:x:50:\nnogroup:x:65534:\n")
    archive.text("etc/hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost\n")
    archive.text("etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    archive.text("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    for name in ("dev", "proc", "sys", "tmp", "run", "root"):
        archive.folder(name)
    archive.put("dev/console", 0o20600, device=(5, 1))
    archive.put("dev/null", 0o20666, device=(1, 3))


# One machine

class Lab:
    """What machines share: a place to work in, programs, roots, keys; each is made once."""

    def __init__(self, options):
        self.options = options
        self.cache = Path(options.cache)
        self.cache.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="tinyauth-kernels-"))
        self.lock, self.made = threading.Lock(), {}

    def once(self, what, make):
        with self.lock:
            if what not in self.made:
                self.made[what] = make()
            return self.made[what]

    def programs(self, processor):
        def make():
            source = Path(self.options.source)
            return build(self.work, source, self.cache.resolve(), processor)
        return self.once(("programs", processor), make)

    def root(self, machine):
        """All packages of a release and architecture in one root."""
        def make():
            kernels = sorted({other.kernel for other in MACHINES if (other.release, other.arch) == (machine.release, machine.arch)})
            folder = self.cache / f"{machine.release}-{machine.arch}"
            run("sh", HERE / "packages.sh", machine.release, machine.arch, folder, *PACKAGES, *kernels)
            return folder / "root"
        return self.once(("root", machine.release, machine.arch), make)

    def keys(self):
        def make():
            folder = self.work / "keys"
            folder.mkdir()
            for bits in (2048, 4096):
                run("openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", f"rsa_keygen_bits:{bits}", "-out", folder / f"rsa{bits}.pem")
            return folder
        return self.once("keys", make)


def kernel_of(machine, root):
    """The kernel of the machine's package: with 16k pages or without."""
    found = [path for path in (root / "boot").glob("vmlinu?-*")
             if path.name.endswith("-16k") == machine.kernel.endswith("-16k")]
    if len(found) != 1:
        raise Failed(f"kernels of {machine.kernel}: {found}")
    return found[0]


def pack(lab, machine, root, programs, calls):
    """The first root of a machine as a file."""
    archive = Archive(lab.work / f"{machine.name}.cpio")
    add_root(archive, root)
    archive.add(HERE / "init", "init")
    archive.add(lab.keys(), "keys")
    archive.add(root / "etc/ssl/openssl.cnf", "etc/ssl/openssl.cnf")
    tests = PROJECT / "tests"
    for name in ("e2e.py", "minimal.py", "regressions.py", "model.py", "tls", "kernels"):
        archive.add(tests / name, f"tinyauth/tests/{name}")
    for name, path in programs.items():
        archive.add(path, f"tinyauth/{name}")
    told = {name: getattr(machine, name) for name in ("tests", "page", "landlock", "without", "container")}
    told["tests"] = lab.options.tests or machine.tests
    archive.text("machine.json", json.dumps({**told, "audit": PROCESSORS[machine.processor].audit, "calls": calls}))
    command = ["python3", "tests/kernels/guest.py", "--tinyauth", "/tinyauth/tinyauth"]
    command = (["python3", "tests/kernels/engine.py"] if machine.container else []) + command
    archive.text("command", " ".join([*command, *(["-v"] if lab.options.verbose else []), lab.options.pattern]) + "\n")
    archive.close()
    return archive.path


def boot(lab, machine, kernel, archive):
    """All that the console says."""
    processor = PROCESSORS[machine.processor]
    command = [*processor.emulator, *(["-cpu", machine.cpu] if machine.cpu else []), "-accel", "tcg", "-icount", "shift=1,sleep=off",
               "-m", str(MEMORY), "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-monitor", "none",
               "-kernel", str(kernel), "-initrd", str(archive), "-append", f"console={processor.console} {APPEND} {machine.append}"]
    path = Path(lab.options.log or lab.work, f"{machine.name}.log")
    with open(path, "wb") as log:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=WATCHDOG, check=False)
            why = f"the emulator ended, {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"not done after {WATCHDOG} s"
    return path.read_bytes().decode("utf-8", "replace").replace("\r", ""), why


def refused(said, calls, container):
    """The system calls that were refused to tinyauth, by name, with how often."""
    names = {}
    for name, number in calls.items():
        names.setdefault(number, name)
    found = {}

    def note(number, what):
        key = f"{names.get(number, 'call')} ({number}) {what}"
        found[key] = found.get(key, 0) + 1

    for line in re.findall(r"audit: type=1326 .*", said):
        match = re.search(r'comm="(\S*)" exe=(\S*) sig=(\d+) arch=(\w+) syscall=(\d+).* code=0x(\w+)', line)
        if match and ("tinyauth" in match[1] + match[2]):
            action = int(match[6], 16)
            how = {0x80000000: "killed", 0x30000: "trapped", 0x50000: "answered with an errno"}.get(action, f"action {action:#x}")
            note(int(match[5]), how)
    for comm, number in re.findall(r"^ *(\S+)-\d+ .*sys_exit: NR (\d+) = -38$", said, re.M):
        if "tinyauth" in comm and not container:
            note(int(number), "answered ENOSYS")
    return [f"{what}, {times} times" for what, times in sorted(found.items())]


def judge(said, why, calls, machine):
    """(passed, problems) of what a machine said."""
    tests, _, rest = said.partition("=== tests\n")[2].partition("=== log\n")
    count = re.search(r"^(\d+) passed, (\d+) failed$", tests, re.M)
    problems = []
    if not re.search(r"^=== status \d+$", rest, re.M):
        problems.append("it did not come to its end: " + why + "\n" + said[-2500:])
    elif not count:
        problems.append("no tests ran in it:\n" + tests[-2500:])
    shown = re.sub(r"^ok      .*\n", "", tests[:count.start() if count else None], flags=re.M)
    problems += re.split(r"^(?=FAILED  )", shown, flags=re.M)[1:]
    problems += [f"refused: {call}" for call in refused(rest, calls, machine.container)]
    problems += [f"the kernel says {line}" for line in re.findall(r"^.*(?:Oops|BUG:|Kernel panic|soft lockup).*$", rest, re.M)[:5]]
    return int(count[1]) if count else 0, problems


def one(lab, machine):
    began = time.monotonic()
    archive = None
    try:
        programs, root = lab.programs(machine.processor), lab.root(machine)
        calls = call_numbers(machine, root)
        archive = pack(lab, machine, root, programs, calls)
        said, why = boot(lab, machine, kernel_of(machine, root), archive)
        passed, problems = judge(said, why, calls, machine)
    except Failed as error:
        passed, problems, said = 0, [str(error)], ""
    if archive:
        archive.unlink()
    for problem in problems:
        say(f"FAILED  {machine.name}: " + problem.removeprefix("FAILED  ").rstrip().replace("\n", "\n        "))
    say(f"{machine.name}: {passed} passed, {len(problems)} failed, {time.monotonic() - began:.0f} s")
    if lab.options.verbose:
        say(re.sub(r"(?s)=== log.*", "", said))
    return passed, len(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", metavar="DIR", default=PROJECT)
    parser.add_argument("--cache", metavar="DIR", default=PROJECT / "build/kernels")
    parser.add_argument("--log", metavar="DIR")
    parser.add_argument("--jobs", metavar="N", type=int, default=2)
    parser.add_argument("--tests", choices=("all", "core"), help="on every machine")
    parser.add_argument("--pattern", default="", help="only these tests")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("machines", metavar="MACHINE", nargs="*")
    options = parser.parse_args()
    unknown = set(options.machines) - {machine.name for machine in MACHINES}
    if unknown:
        parser.error(f"no machine {', '.join(sorted(unknown))}")
    if options.log:
        Path(options.log).mkdir(parents=True, exist_ok=True)
    lab = Lab(options)
    passed = failed = 0
    try:
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            chosen = [machine for machine in MACHINES if not options.machines or machine.name in options.machines]
            for good, bad in pool.map(lambda machine: one(lab, machine), chosen):
                passed, failed = passed + good, failed + bad
    finally:
        shutil.rmtree(lab.work, ignore_errors=True)
    say(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
