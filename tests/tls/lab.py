"""What the TLS tests share: certificates for a run, servers with them, clients of every kind."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from e2e import ALICE, Client, request, same, until  # noqa: E402
from secure import Authority, SecureSocket, client_context  # noqa: E402

SUITES = {"EC": ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"),
          "RSA": ("ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-CHACHA20-POLY1305")}
KINDS = {"p256": "EC", "p384": "EC", "rsa2048": "RSA", "rsa4096": "RSA"}

authorities = {}
authorities_lock = threading.Lock()


def authority(lab):
    """The run's one authority; its folder goes with the run's."""
    folder = lab.directory.parent / "authority"
    with authorities_lock:
        if folder not in authorities:
            authorities[folder] = Authority(folder)
        return authorities[folder]


def serve(lab, *options, pair=None, **more):
    """tinyauth with TLS."""
    return lab.tinyauth(*(pair or authority(lab).good()).options, *options, **more)


def serve_and_model(lab, *options, **more):
    model = lab.model()
    return serve(lab, *options, upstream=model.name, **more), model


class SecureClient(Client):
    """A client over TLS that chooses its context, name and session."""

    def __init__(self, address, context=None, name="localhost", session=None, rcvbuf=None):
        super().__init__(address, rcvbuf, silent=True)
        try:
            self.sock = SecureSocket(self.sock, context, name, session)
        except BaseException:
            self.sock.close()
            raise

    @property
    def tls(self):
        return self.sock.tls


def connect(tinyauth, **more):
    client = SecureClient(tinyauth.address, **more)
    tinyauth.clients.append(client)
    return client


def raw_connect(tinyauth, timeout=10):
    """A TCP connection to the TLS port, for bytes made by hand."""
    client = Client(tinyauth.address, silent=True)
    client.sock.settimeout(timeout)
    tinyauth.clients.append(client)
    return client.sock


def still_serves(tinyauth, workers):
    """A good request is answered, by the same processes as before."""
    with contextlib.closing(SecureClient(tinyauth.address)) as client:
        same(client.ask("GET", "/t/echo").status, 200, "a good request")
    same(sorted(tinyauth.workers()), sorted(workers), "workers")


def failures(tinyauth, count):
    """The first `count` lines with event=tls_failed."""
    tinyauth.wait_event("tls_failed", count)
    return tinyauth.events("tls_failed")[:count]


def s_client(tinyauth, *options, text=None, timeout=15):
    """openssl s_client: its status and all that it says. `text` is sent; then it stays until the server ends."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{tinyauth.address[1]}", *map(str, options)]
    done = subprocess.run(command, input=text if text is not None else b"", capture_output=True, timeout=timeout)
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")


def last_request(target="/t/echo"):
    """A request after whose answer the server closes."""
    return request("GET", target, "Connection: close")


def curl(tinyauth, *options, target="/t/echo", host="localhost"):
    """curl over TLS: its status, body and all that -v says."""
    port = tinyauth.address[1]
    command = ["curl", "-q", "-sS", "-v", "--max-time", "15", "--resolve", f"{host}:{port}:127.0.0.1", "-H",
               f"Authorization: Bearer {ALICE}", *map(str, options), f"https://{host}:{port}{target}"]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, env=environment)
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")


def mappings(pid):
    """(name, flags, anonymous KB) of each mapping of a process."""
    found = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)", line):
            found.append([match[1], [], 0, line])
        elif line.startswith("VmFlags:"):
            found[-1][1] = line.split()[1:]
        elif line.startswith("Anonymous:"):
            found[-1][2] = int(line.split()[1])
    return found


def anonymous(pid):
    """Bytes of anonymous memory of one process."""
    return sum(kb for _, _, kb, _ in mappings(pid)) << 10


__all__ = [name for name in globals() if not name.startswith("_")] + ["client_context", "until", "socket"]
