#!/usr/bin/env python3
"""A stand-in model server for the tests.

    python3 tests/model.py [--port N] [--unix PATH] [--log FILE]

It listens on 127.0.0.1 (and on a unix socket when asked), prints `port=NNNN` and speaks Ollama, OpenAI and
Anthropic, with routes under /t/ that answer in every way an HTTP/1.1 server can, also the wrong ones. HTTP is
written by hand, so that each framing is exactly what the route says. One thread serves one connection.

Streams: the number of events and the gap between them come from the JSON body or the query (`events`, `gap_ms`)
or the header fields X-Test-Events and X-Test-Gap-Ms. Every event carries `t_ns`, CLOCK_MONOTONIC at its sending.

The log has one JSON object a line, written at once: `t` (monotonic ns), `conn`, `what`:
accept, request (n, method, target, headers), body (bytes), sent (bytes so far), close (reason: eof, reset, ours).
"""

import argparse
import array
import base64
import hashlib
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from http import HTTPStatus
from urllib.parse import parse_qs, unquote

CYCLE = bytes(range(251))           # of prime length, so that a lost or doubled byte shows
BLOCK = CYCLE * 4096                # about 1 MB
TWO_BLOCKS = memoryview(BLOCK * 2)
PROGRESS = 4 << 20                  # a `sent` line for so many bytes
HEAD_MAX = 64 << 10
MODEL = "tiny:latest"


def pattern(size):
    """The bytes that /t/cl, /t/chunked and /t/close answer with."""
    return BLOCK * (size // len(BLOCK)) + BLOCK[:size % len(BLOCK)]


def pieces(size, step=len(BLOCK)):
    """pattern(size), a piece at a time and without holding it."""
    done = 0
    while done < size:
        start = done % len(BLOCK)
        length = min(step, len(BLOCK), size - done)
        yield TWO_BLOCKS[start:start + length]
        done += length


class Gone(Exception):
    """The peer closed (eof) or reset the connection."""


class Log:
    def __init__(self, path):
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if path else None

    def write(self, conn, what, **fields):
        if self.fd is not None:
            line = {"t": time.monotonic_ns(), "conn": conn, "what": what, **fields}
            os.write(self.fd, json.dumps(line).encode() + b"\n")


class Request:
    def __init__(self, head, number):
        lines = head.decode("latin-1").split("\r\n")
        self.number = number                # on its connection, from 1
        self.method, self.target, self.version = lines[0].split(" ")
        self.headers = []
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers.append((name, value.strip(" \t")))
        path, _, query = self.target.partition("?")
        self.path = unquote(path)
        self.query = {name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()}
        self.json = {}

    def header(self, name, default=""):
        for field, value in self.headers:
            if field.lower() == name.lower():
                return value
        return default

    def knob(self, name, default):
        header = self.header("X-Test-" + name.replace("_", "-"), default)
        return int(self.json.get(name, self.query.get(name, header)))

    def chunked(self):
        return self.header("Transfer-Encoding").lower() == "chunked"

    def host_is_local(self):
        """Ollama's rule for a server that listens on the loopback address."""
        host = self.header("Host").lower()
        host = host[:host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        return (host in ("", "localhost", "[::1]", socket.gethostname().lower()) or host.startswith("127.")
                or host.endswith((".localhost", ".local", ".internal")))


class Conn:
    """One connection: reading, writing and noticing that the peer went away."""

    def __init__(self, sock, number, log):
        self.sock, self.number, self.log = sock, number, log
        self.buffer = bytearray()
        self.keep = True                    # another request may come
        self.linger = False                 # close without losing the answer to a reset
        self.unread = False                 # the body of the request has not been read
        self.trailers = []

    def note(self, what, **fields):
        self.log.write(self.number, what, **fields)

    def fill(self):
        data = self.sock.recv(1 << 18)
        if not data:
            raise Gone("eof")
        self.buffer += data

    def until(self, mark):
        while (end := self.buffer.find(mark)) < 0:
            if len(self.buffer) > HEAD_MAX:
                raise ValueError("no end of a head or chunk line in sight")
            self.fill()
        data = bytes(self.buffer[:end])
        del self.buffer[:end + len(mark)]
        return data

    def exactly(self, size):
        """Pieces of together `size` bytes; large ones straight from the socket."""
        early = bytes(self.buffer[:size])
        del self.buffer[:size]
        if early:
            yield early
        left = size - len(early)
        space = memoryview(bytearray(min(left, len(BLOCK))))
        while left:
            count = self.sock.recv_into(space[:min(left, len(space))])
            if not count:
                raise Gone("eof")
            yield space[:count]
            left -= count

    def chunks(self):
        while size := int(self.until(b"\r\n").partition(b";")[0], 16):
            yield from self.exactly(size)
            if self.until(b"\r\n"):
                raise ValueError("chunk data not followed by its end of line")
        while line := self.until(b"\r\n"):
            self.trailers.append(line.decode("latin-1"))

    def body(self):
        """The request's body in pieces; 100 Continue is sent when it was asked for."""
        request, total = self.request, 0
        if request.header("Expect").lower() == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(request.header("Content-Length", "0"))
        for piece in self.chunks() if request.chunked() else self.exactly(length):
            total += len(piece)
            yield piece
        self.unread = False
        self.note("body", bytes=total)

    def send(self, data):
        self.sock.sendall(data)

    def wait(self, seconds=None, watch=select.POLLIN | select.POLLRDHUP):
        """Sleep, for ever without `seconds`; Gone at once when the peer leaves."""
        end = time.monotonic() + seconds if seconds is not None else None
        poller = select.poll()
        poller.register(self.sock, watch)
        while end is None or time.monotonic() < end:
            ready = poller.poll(None if end is None else max(0, (end - time.monotonic()) * 1000))
            if ready and not watch & select.POLLIN:
                raise Gone("eof")
            if ready:
                self.fill()

    def head(self, status, *fields):
        try:
            reason = HTTPStatus(status).phrase
        except ValueError:
            reason = "Unknown"
        lines = [f"HTTP/1.1 {status} {reason}", "Server: model", *fields]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def answer(self, status, body=b"", kind="application/json", *fields):
        """A whole answer by Content-Length."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        head = self.head(status, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *fields)
        self.send(head if self.request.method == "HEAD" else head + body)

    def chunk(self, data):
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.keep = False

    def throw_away(self):
        """Half-close, then read for at most 2 s until the peer closes as well."""
        self.sock.settimeout(0.2)
        end = time.monotonic() + 2
        try:
            self.sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < end and self.sock.recv(1 << 18):
                pass
        except OSError:
            pass

    def serve(self):
        self.note("accept")
        reason = "ours"
        try:
            number = 0
            while self.keep:
                number += 1
                self.serve_one(number)
            if self.linger:
                self.throw_away()
        except Gone as gone:
            reason = str(gone)
        except (BrokenPipeError, ConnectionResetError):
            reason = "reset"
        except ValueError as error:
            reason = f"malformed: {error}"
        self.note("close", reason=reason)
        self.sock.close()

    def serve_one(self, number):
        request = self.request = Request(self.until(b"\r\n\r\n"), number)
        self.trailers = []
        self.unread = request.chunked() or request.header("Content-Length", "0") != "0"
        self.note("request", n=number, method=request.method, target=request.target, headers=request.headers)
        if request.header("Connection").lower() == "close":
            self.keep = False
        answer = find_route(request)
        answer(self, request)
        if self.unread:
            self.keep = False


# Ollama

def words(count):
    return [f"word{i} " for i in range(count)]


def read_json(conn, request):
    request.json = json.loads(b"".join(bytes(piece) for piece in conn.body()) or b"{}")
    return request.json


def stream(conn, request, kind, events):
    """Chunked, one event a chunk; `events` yields (is a model's event, how to make it)."""
    conn.send(conn.head(200, f"Content-Type: {kind}", "Cache-Control: no-cache", "Transfer-Encoding: chunked"))
    gap = request.knob("gap_ms", 10) / 1000
    first, due = True, time.monotonic()
    for spaced, make in events:
        if spaced and not first:
            due += gap
            conn.wait(max(0, due - time.monotonic()))
        first = first and not spaced
        conn.chunk(make())
    conn.send(b"0\r\n\r\n")


def ollama(conn, request, word):
    """/api/generate and /api/chat; `word` makes the part that differs."""
    asked = read_json(conn, request)
    texts = words(request.knob("events", 5))

    def made(text, **more):
        return {"model": asked.get("model", MODEL), "created_at": "2026-01-01T00:00:00Z", **word(text), **more}

    end = {"done": True, "done_reason": "stop", "total_duration": 1000000, "prompt_eval_count": 7,
           "eval_count": len(texts)}

    def line(event):
        return json.dumps({**event, "t_ns": time.monotonic_ns()}).encode() + b"\n"

    if asked.get("stream") is False:
        conn.answer(200, made("".join(texts), **end))
        return
    events = [(True, lambda text=text: line(made(text, done=False))) for text in texts]
    stream(conn, request, "application/x-ndjson", [*events, (False, lambda: line(made("", **end)))])


def api_generate(conn, request):
    ollama(conn, request, lambda text: {"response": text})


def api_chat(conn, request):
    ollama(conn, request, lambda text: {"message": {"role": "assistant", "content": text}})


def api_tags(conn, request):
    details = {"format": "gguf", "family": "tiny", "parameter_size": "1M", "quantization_level": "Q4_0"}
    conn.answer(200, {"models": [{"name": MODEL, "model": MODEL, "modified_at": "2026-01-01T00:00:00Z", "size": 1,
                                  "digest": "0" * 64, "details": details}]})


def api_version(conn, request):
    conn.answer(200, {"version": "0.0.0"})


def root(conn, request):
    conn.answer(200, b"Ollama is running", "text/plain; charset=utf-8")


# OpenAI

def sse(event, name=None):
    text = "data: " + json.dumps({**event, "t_ns": time.monotonic_ns()}) + "\n\n"
    return (f"event: {name}\n{text}" if name else text).encode()


def chat_completions(conn, request):
    asked = read_json(conn, request)
    texts = words(request.knob("events", 5))
    model = asked.get("model", MODEL)
    usage = {"prompt_tokens": 7, "completion_tokens": len(texts), "total_tokens": 7 + len(texts)}
    base = {"id": "chatcmpl-1", "created": 1767225600, "model": model}
    if not asked.get("stream"):
        message = {"role": "assistant", "content": "".join(texts)}
        conn.answer(200, {**base, "object": "chat.completion", "usage": usage,
                          "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        return

    def chunk(delta, finish=None):
        return sse({**base, "object": "chat.completion.chunk",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    events = [(True, lambda text=text: chunk({"role": "assistant", "content": text})) for text in texts]
    events.append((False, lambda: chunk({}, "stop")))
    if (asked.get("stream_options") or {}).get("include_usage"):
        events.append((False, lambda: sse({**base, "object": "chat.completion.chunk", "choices": [],
                                           "usage": usage})))
    events.append((False, lambda: b"data: [DONE]\n\n"))
    stream(conn, request, "text/event-stream", events)


def v1_models(conn, request):
    conn.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1767225600,
                                                  "owned_by": "library"}]})


def v1_embeddings(conn, request):
    asked = read_json(conn, request)
    inputs = asked.get("input", "")
    count = len(inputs) if isinstance(inputs, list) else 1
    vector = [0.25, -0.5, 1.0]
    if asked.get("encoding_format") == "base64":
        vector = base64.b64encode(array.array("f", vector).tobytes()).decode()
    conn.answer(200, {"object": "list", "model": asked.get("model", MODEL),
                      "data": [{"object": "embedding", "index": i, "embedding": vector} for i in range(count)],
                      "usage": {"prompt_tokens": 7, "total_tokens": 7}})


# Anthropic

def v1_messages(conn, request):
    asked = read_json(conn, request)
    texts = words(request.knob("events", 5))
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": asked.get("model", MODEL),
               "stop_sequence": None}
    if not asked.get("stream"):
        conn.answer(200, {**message, "content": [{"type": "text", "text": "".join(texts)}],
                          "stop_reason": "end_turn", "usage": {"input_tokens": 7, "output_tokens": len(texts)}})
        return
    start = {**message, "content": [], "stop_reason": None, "usage": {"input_tokens": 7, "output_tokens": 1}}

    def event(kind, **fields):
        return sse({"type": kind, **fields}, kind)

    def delta(text):
        return event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    stream(conn, request, "text/event-stream", [
        (False, lambda: event("message_start", message=start)),
        (False, lambda: event("content_block_start", index=0, content_block={"type": "text", "text": ""})),
        *[(True, lambda text=text: delta(text)) for text in texts],
        (False, lambda: event("content_block_stop", index=0)),
        (False, lambda: event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None},
                              usage={"output_tokens": len(texts)})),
        (False, lambda: event("message_stop")),
    ])


# Test routes: /t/NAME or /t/NAME/NUMBER

def t_echo(conn, request, number):
    """What arrived: method, target, version, fields in order, trailers, length and hash of the body."""
    size, digest = 0, hashlib.sha256()
    for piece in conn.body():
        size += len(piece)
        digest.update(piece)
    conn.answer(200, {"method": request.method, "target": request.target, "version": request.version,
                      "headers": request.headers, "trailers": conn.trailers, "length": size,
                      "sha256": digest.hexdigest()})


def counted(conn, size, step, write):
    done, told = 0, 0
    for piece in pieces(size, step):
        write(piece)
        done += len(piece)
        if done - told >= PROGRESS or done == size:
            conn.note("sent", bytes=done)
            told = done


def t_cl(conn, request, size):
    conn.send(conn.head(200, f"Content-Length: {size}"))
    if request.method != "HEAD":
        counted(conn, size, len(BLOCK), conn.send)


def t_chunked(conn, request, size):
    """?chunk=SIZE for chunks of another size than about 1 MB."""
    conn.send(conn.head(200, "Transfer-Encoding: chunked"))
    if request.method != "HEAD":
        counted(conn, size, request.knob("chunk", len(BLOCK)), conn.chunk)
        conn.send(b"0\r\n\r\n")


def t_close(conn, request, size):
    conn.keep, conn.linger = False, True
    conn.send(conn.head(200, "Connection: close"))
    if request.method != "HEAD":
        counted(conn, size, len(BLOCK), conn.send)


def t_sink(conn, request, number):
    conn.answer(200, {"length": sum(len(piece) for piece in conn.body())})


def t_silent(conn, request, number):
    """Never answers; with ?unread it leaves the body in the socket as well."""
    if "unread" in request.query:
        conn.wait(watch=select.POLLRDHUP)
    for _ in conn.body():
        pass
    conn.wait()


def t_slow(conn, request, ms):
    for _ in conn.body():
        pass
    conn.wait(ms / 1000)
    conn.answer(200, {"slow": ms})


def t_100(conn, request, number):
    """100, as many 103 as ?n says (1), then 200."""
    conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    for i in range(request.knob("n", 1)):
        conn.send(conn.head(103, f"Link: </{i}.css>; rel=preload"))
    conn.answer(200, {"interim": True})


def t_204(conn, request, number):
    conn.send(conn.head(204))


def t_304(conn, request, number):
    conn.send(conn.head(304, 'ETag: "x"', "Content-Length: 1000"))


def t_early(conn, request, number):
    """413 before a byte of the body is read, then the end of the connection."""
    conn.keep, conn.linger = False, True
    conn.answer(413, {"error": "too large"}, "application/json", "Connection: close")


def cut(conn, request):
    """The end that cuts an answer: a close, or with ?reset a reset once the bytes had time to arrive."""
    conn.keep = False
    if "reset" in request.query:
        conn.wait(0.05)
        conn.reset()


def t_cut_cl(conn, request, number):
    conn.send(conn.head(200, "Content-Length: 1000") + pattern(500))
    cut(conn, request)


def t_cut_chunked(conn, request, number):
    """A whole chunk and half a one; with ?between the end comes after the whole one."""
    conn.send(conn.head(200, "Transfer-Encoding: chunked"))
    conn.chunk(pattern(500))
    if "between" not in request.query:
        conn.send(b"1f4\r\n" + pattern(250))
    cut(conn, request)


def t_garbage(conn, request, number):
    conn.keep, conn.linger = False, True
    conn.send(b"\x00\x01\x02 this is not HTTP\r\n\r\n")


def t_die(conn, request, number):
    """Closes without an answer."""
    conn.keep = False


def t_trailing(conn, request, number):
    """A whole answer and bytes that nobody asked for; with ?later_ms they come so much later."""
    conn.send(conn.head(200, "Content-Length: 5") + b"hello")
    conn.wait(request.knob("later_ms", 0) / 1000)
    conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")


def t_ws(conn, request, number):
    """A WebSocket upgrade, then an echo of raw bytes."""
    if request.header("Upgrade").lower() != "websocket":
        conn.answer(426, {"error": "upgrade required"})
        return
    seed = request.header("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(seed.encode()).digest()).decode()
    conn.send(conn.head(101, "Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Accept: {accept}"))
    while True:
        if conn.buffer:
            conn.send(bytes(conn.buffer))
            conn.buffer.clear()
        conn.fill()


def t_big_head(conn, request, size):
    """A head of about `size` bytes."""
    fields = [f"X-Fill-{i}: {'x' * 1000}" for i in range(size // 1000)]
    conn.send(conn.head(200, *fields, "Content-Length: 0"))


def t_raw(conn, request, number):
    """The bytes of X-Test-Raw (base64); then X-Test-Then: close (default), keep or hold."""
    conn.send(base64.b64decode(request.header("X-Test-Raw")))
    then = request.header("X-Test-Then", "close")
    if then == "hold":
        conn.wait()
    if then == "close":
        conn.keep, conn.linger = False, True


def no_such_route(conn, request):
    for _ in conn.body():
        pass
    conn.answer(404, b"404 page not found", "text/plain")


def foreign_host(conn, request):
    conn.answer(403)


ROUTES = {
    ("GET", "/"): root,
    ("HEAD", "/"): root,
    ("POST", "/api/generate"): api_generate,
    ("POST", "/api/chat"): api_chat,
    ("GET", "/api/tags"): api_tags,
    ("HEAD", "/api/tags"): api_tags,
    ("GET", "/api/version"): api_version,
    ("HEAD", "/api/version"): api_version,
    ("POST", "/v1/chat/completions"): chat_completions,
    ("GET", "/v1/models"): v1_models,
    ("POST", "/v1/embeddings"): v1_embeddings,
    ("POST", "/v1/messages"): v1_messages,
}

TEST_ROUTES = {name[2:].replace("_", "-"): route for name, route in globals().items() if name.startswith("t_")}


def find_route(request):
    if not request.host_is_local():
        return foreign_host
    parts = request.path.split("/")
    if parts[1] == "t" and len(parts) in (3, 4) and parts[2] in TEST_ROUTES:
        number = int(parts[3]) if len(parts) == 4 else 0
        return lambda conn, request: TEST_ROUTES[parts[2]](conn, request, number)
    return ROUTES.get((request.method, request.path), no_such_route)


class Server:
    def __init__(self, log):
        self.log = log
        self.accepted = 0
        self.lock = threading.Lock()

    def accept(self, listener):
        while True:
            sock, _ = listener.accept()
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                self.accepted += 1
                conn = Conn(sock, self.accepted, self.log)
            threading.Thread(target=conn.serve, daemon=True).start()


def main():
    parser = argparse.ArgumentParser(description="a stand-in model server for the tests")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--unix", metavar="PATH")
    parser.add_argument("--log", metavar="FILE")
    options = parser.parse_args()
    threading.stack_size(256 << 10)
    sys.setswitchinterval(0.0005)
    server = Server(Log(options.log))
    listener = socket.create_server(("127.0.0.1", options.port), backlog=4096)
    if options.unix:
        local = socket.socket(socket.AF_UNIX)
        local.bind(options.unix)
        os.chmod(options.unix, 0o777)      # workers come as nobody
        local.listen(4096)
        threading.Thread(target=server.accept, args=(local,), daemon=True).start()
    print(f"port={listener.getsockname()[1]}", flush=True)
    try:
        server.accept(listener)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
