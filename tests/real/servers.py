"""The model servers as processes, and what stands between tinyauth and one of them to look."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

from e2e import Client, Started, until

STARTED = 60                            # seconds that a server may take to be ready


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A model server: ready when made, its log as it comes. `ready`: what its log says then; None: do not wait."""

    def __init__(self, command, env, ready):
        self.command, self.env, self.ready = command, env, ready
        self.lines = []                 # (when, line)
        self.start()

    def start(self):
        began = len(self.lines)
        self.process = Started.popen(self.command, env={**os.environ, **self.env}, stdin=subprocess.DEVNULL, start_new_session=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.pid = self.process.pid
        self.pump = threading.Thread(target=self.read_log, args=[self.process.stdout], daemon=True)
        self.pump.start()
        if self.ready:
            until(lambda: self.process.poll() is not None or self.said(self.ready, began), "ready server", STARTED)
            assert self.process.poll() is None, f"the server exited {self.process.returncode}: {self.text()[-800:]}"

    def read_log(self, pipe):
        for line in pipe:
            self.lines.append((time.monotonic(), line.decode("utf-8", "replace").rstrip()))

    def text(self):
        return "\n".join(line for _, line in self.lines)

    def mark(self):
        return len(self.lines)

    def said(self, expression, since=0):
        """(when, line) of each line since that mark that matches."""
        return [(at, line) for at, line in self.lines[since:] if re.search(expression, line)]

    def wait(self, expression, since=0, count=1, timeout=10):
        """When the count-th such line came."""
        return until(lambda: self.said(expression, since)[count - 1:], f"{expression!r} in the server's log", timeout)[0][0]

    def kill(self):
        """With what it started: Ollama's runners outlive it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(20)
        self.pump.join(2)

    def stop(self):
        self.kill()
        self.process.stdout.close()


class Llama(Server):
    """llama-server in its root. `model`: tiny or slow."""
    kind = "llama"
    BEGUN = "processing task"
    GONE = "cancel task"
    LOOKS = 1.0                         # seconds between two looks at whether a client is still there
    owner = None                        # the user whom it runs as

    def __init__(self, place, model="tiny", *options, gate=None, host="127.0.0.1", slots=4):
        self.root = place / "root"
        self.port = free_port()
        self.name = f"127.0.0.1:{self.port}"
        self.address = ("127.0.0.1", self.port)
        env = ["LD_PRELOAD=/real/gate.so", f"GATE={gate}"] if gate else []
        user = [f"--userspec={self.owner}:{self.owner}"] if self.owner else []
        super().__init__(["chroot", *user, self.root, "env", *env, "/usr/bin/llama-server", "-m", f"/real/{model}.gguf", "--alias", model,
                          "--host", host, "--port", str(self.port), "-c", str(2048 * slots), "-np", str(slots), "-t", "1",
                          "--metrics", "--slots", "-b", "64", "-ub", "64", *options], {},
                         None if gate else "listening on")

    @staticmethod
    def version(place):
        done = subprocess.run(["chroot", place / "root", "/usr/bin/llama-server", "--version"], capture_output=True, text=True, check=True)
        package = subprocess.run(["chroot", place / "root", "dpkg-query", "-W", "-f", "${Version}", "llama.cpp-tools"],
                                 capture_output=True, text=True, check=True)
        return re.search(r"version: (.*)", done.stdout + done.stderr)[1] + ", package " + package.stdout


class Ollama(Server):
    """Ollama with models `tiny` and `slow`."""
    kind = "ollama"
    BEGUN = "completion request"        # with OLLAMA_DEBUG
    LOOKS = 0.0
    GONE = r"\[GIN\].* \| +POST +"

    def __init__(self, place, home, **env):
        self.home = Path(home)
        self.port = free_port()
        self.name = f"127.0.0.1:{self.port}"
        self.address = ("127.0.0.1", self.port)
        env = {"HOME": str(home), "OLLAMA_HOST": self.name, "OLLAMA_NOPRUNE": "1", "OLLAMA_NUM_PARALLEL": "1", "OMP_NUM_THREADS": "1",
               "OLLAMA_KEEP_ALIVE": "10m", **env}
        self.place = place
        super().__init__([place / "ollama", "serve"], env, "Listening on")

    def create(self):
        """The models, which other servers of the same home find there."""
        for model in ("tiny", "slow"):
            recipe = self.home / f"{model}.model"
            recipe.write_text(f"FROM {self.place}/root/real/{model}.gguf\nPARAMETER num_thread 1\nPARAMETER temperature 0\n")
            subprocess.run([self.place / "ollama", "create", model, "-f", recipe], env={**os.environ, **self.env}, check=True,
                           stdin=subprocess.DEVNULL, capture_output=True, timeout=60)

    @staticmethod
    def version(place):
        done = subprocess.run(["go", "version", "-m", place / "ollama"], capture_output=True, text=True, check=True)
        return re.search(r"mod\s+github.com/ollama/ollama\s+(\S+)", done.stdout)[1] + ", " + done.stdout.split(": ")[1].split("\n")[0]


class Tap:
    """A relay between tinyauth and a server that keeps what the server said on each connection."""

    def __init__(self, address):
        self.upstream = address
        self.said, self.asked = [], []  # bytes by connection
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.name = f"127.0.0.1:{self.address[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.upstream)
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.said.append(bytearray())
                self.asked.append(bytearray())
                threading.Thread(target=self.copy, args=[client, server, self.asked[-1]], daemon=True).start()
                threading.Thread(target=self.copy, args=[server, client, self.said[-1]], daemon=True).start()

    @staticmethod
    def copy(source, sink, kept):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
        for sock, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                sock.shutdown(how)

    def answers(self):
        """How many answers came on each connection."""
        return [len(re.findall(rb"HTTP/1\.[01] [2-5]\d\d ", said)) for said in self.said]

    def stop(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def direct(server):
    return Client(server.address)
