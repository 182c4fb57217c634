#!/usr/bin/env python3
"""Regression tests: what attacks on tinyauth once found, each kept from coming back.

    python3 tests/regressions.py [--tinyauth BIN] [-v] [--no-measure] [PATTERN]

The harness, the way tests run and the last line are those of tests/e2e.py.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import statistics
import sys
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
from e2e import (ALICE, BOB, KEYS, UPGRADE, WRONG, Client, Cut, Load, Skip, Started, Stream, alone, children,  # noqa: E402
                 connect_to, is_cut, main, many_keys, measured, request, same, until)
from model import pattern  # noqa: E402


class Upstream:
    """A model server of one test: `serve` gets each connection, in a thread of its own, and the connection's number."""

    def __init__(self, lab, serve):
        self.serve = serve
        self.socks = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()
        lab.things.append(self)

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                sock.settimeout(10)
                self.socks.append(sock)
                threading.Thread(target=self.run, args=(sock,), daemon=True).start()

    def run(self, sock):
        with contextlib.suppress(OSError):
            self.serve(sock)

    def stop(self):
        for sock in [self.listener, *self.socks]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def text(self):
        return ""


def read_head(sock):
    head = b""
    while b"\r\n\r\n" not in head:
        data = sock.recv(1 << 16)
        if not data:
            raise OSError("gone")
        head += data
    return head


def limited(lab, soft, hard):
    """The binary under these limits of open files."""
    path = lab.path("limited")
    Path(path).write_text(f'#!/bin/sh\nulimit -H -n {hard} && ulimit -S -n {soft} && exec {shlex.quote(lab.binary)} "$@"\n')
    os.chmod(path, 0o755)
    return path


def ticks(pid):
    """The processor time of a process so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# Bodies

class Slow(Client):
    """A client that takes a little at a time."""

    def fill(self):
        time.sleep(0.0005)
        data = self.sock.recv(6000)
        if not data:
            raise Cut("eof")
        self.buffer += data


def test_chunks_of_ours_stay_exact_when_writes_block(lab):
    """A close-delimited answer for an HTTP/1.1 client with a 4 KB window that reads slowly: every chunk is exact."""
    tinyauth = lab.tinyauth()
    client = Slow(tinyauth.address, rcvbuf=4096)
    tinyauth.clients.append(client)
    answer = client.ask("GET", "/t/close/6000000")
    same((answer.status, answer.chunked), (200, True), "answer")
    assert answer.body == pattern(6000000), "other bytes"


BROKEN_CHUNKS = (b"\n\r\n", b"\r\n", b"\n", b"0x1\r\n", b"g\r\n", b" 1\r\n", b"1 \r\nx\r\n", b"1\nx\r\n", b"1\r\nxx\r\n", b"1\r\nx\n\r\n",
                 b"0\n\r\n", b"0\r\n\n", b"1;\nx\r\n")


def test_broken_chunks_are_never_taken_up_again(lab):
    """A broken chunk in one write with the head, or a byte later: one 400, the end, and what follows is not answered."""
    tinyauth, model = lab.pair()
    for broken in BROKEN_CHUNKS:
        raw = request("POST", "/t/sink", "Transfer-Encoding: chunked") + broken
        follows = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" + request("GET", "/t/echo?smuggled")
        for cut in (0, 1, len(broken), len(broken) + len(follows)):
            client = tinyauth.connect()
            at = len(raw) + len(follows) - cut
            client.send((raw + follows)[:at])
            if cut == 1:
                time.sleep(0.002)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.send((raw + follows)[at:])
            what = f"{broken!r} cut {cut} from the end"
            answer = client.read()
            same((answer.status, answer.closes), (400, True), f"answer to {what}")
            same(client.end(), "eof", f"end of {what}")
    same([target for _, _, target in model.requests() if "smuggled" in target], [], "requests behind a broken body")
    same(model.events("body"), [], "whole bodies")
