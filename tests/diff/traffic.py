"""Both ends of tinyauth: clients that send recorded bytes, an upstream that records, and one that is hostile.

Each client has its own loopback address, which tinyauth hands on as X-Real-IP, so that the upstream knows whose
connection it has.
"""

import asyncio
import re
import socket
import struct
import time

import wire

BASE = struct.unpack(">I", socket.inet_aton("127.64.0.0"))[0]
QUIET = 0.2             # so long nothing moves, and a mutated stream is over
PATIENCE = 10.0         # the same for a stream that must be answered
AT_ONCE = 96
OPEN, CLOSED, RESET = 0, 1, 2


def address_of(index):
    return socket.inet_ntoa(struct.pack(">I", BASE + index))


class Recorder(asyncio.Protocol):
    """One connection of tinyauth to the upstream: keeps its bytes and answers the one request that it carries."""

    def __init__(self, upstream):
        self.upstream = upstream
        self.data, self.at = bytearray(), 0
        self.requests = []
        self.partial = None             # a request of which the head came, and not the whole body
        self.rest = False               # bytes that are no whole request
        self.trouble = None
        self.client = None
        self.continued = False

    def connection_made(self, transport):
        self.transport = transport
        self.upstream.opened(self)

    def connection_lost(self, error):
        self.rest = self.at < len(self.data)
        self.upstream.closed(self)

    def data_received(self, data):
        self.data += data
        self.upstream.moved(self)
        if self.requests:
            self.trouble = "bytes came behind the request that the connection was for"
        elif not self.transport.is_closing():
            self.read_one()

    def read_one(self):
        try:
            message = wire.read_message(self.data, 0, "request")
        except wire.Malformed as error:
            self.trouble = f"malformed: {error}"
            self.transport.close()
            return
        if message is None:
            return
        self.identify(message)
        if not message.whole:
            self.partial = message
            self.go_on(message)
            return
        self.at, self.partial = message.end, None
        if self.at < len(self.data):
            self.trouble = "bytes came behind the request that the connection was for"
        self.requests.append(message)
        self.answer(message)

    def identify(self, message):
        if self.client is None and message.values("X-Real-IP"):
            self.client = message.values("X-Real-IP")[-1].decode("latin-1")

    def go_on(self, message):
        if not self.continued and message.tokens("Expect") == [b"100-continue"]:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.continued = True

    def answer(self, message):
        """Most answers end the connection, as the request asked for; some servers leave that to the other side."""
        last = not message.target.endswith(b"b=c")
        body = b"answer to " + message.target
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n" % (len(body), b"Connection: close\r\n" if last else b"")
        self.transport.write(head if message.start.startswith(b"HEAD ") else head + body)
        if last:
            self.transport.write_eof()      # and reads on: nothing more must come


class Upstream:
    """All connections of tinyauth to the recording upstream."""

    def __init__(self):
        self.connections = []
        self.open = 0
        self.quiet = asyncio.Event()
        self.last_move = {}

    async def listen(self):
        self.server = await asyncio.get_running_loop().create_server(lambda: Recorder(self), "127.0.0.1", 0, backlog=1024)
        return self.server.sockets[0].getsockname()[1]

    def opened(self, connection):
        self.connections.append(connection)
        self.open += 1
        self.quiet.clear()

    def closed(self, connection):
        self.open -= 1
        if not self.open:
            self.quiet.set()

    def moved(self, connection):
        self.last_move[connection.client] = time.monotonic()

    async def take(self):
        """The connections since the last call, when all of them are closed; second: how many had to be waited for in vain."""
        if self.open:
            try:
                await asyncio.wait_for(self.quiet.wait(), 5)
            except asyncio.TimeoutError:
                pass
        taken, self.connections = self.connections, []
        self.last_move.clear()
        return taken, self.open


async def send_stream(stream, port, upstream):
    """Send it piece by piece and read until its last answer, its end, or until nothing moves any more. Returns what was answered."""
    address = address_of(stream.index)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    answered = bytearray()
    try:
        for piece in stream.pieces():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        await read_answers(stream, reader, answered, lambda: upstream.last_move.get(address, 0))
    except ConnectionError as error:
        answered += f"<{type(error).__name__}>".encode()
    writer.transport.abort() if stream.index % 7 == 0 else writer.close()
    return bytes(answered)


async def read_answers(stream, reader, answered, last_move):
    patience = QUIET if stream.expected is None else PATIENCE
    end = b"answer to " + stream.last
    while True:
        try:
            data = await asyncio.wait_for(reader.read(1 << 16), patience)
        except asyncio.TimeoutError:
            if time.monotonic() - last_move() < patience:
                continue
            return
        answered += data
        if not data or end in answered:
            return


# Responses

def reset(transport):
    if not transport.is_closing():
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


class Hostile(asyncio.Protocol):
    """An upstream that answers the first request of a script with its bytes, and the second one well."""

    def __init__(self, scripts):
        self.scripts = scripts
        self.data, self.at = bytearray(), 0

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data
        message = wire.read_message(self.data, self.at, "request")
        if message and message.whole:
            self.at = message.end
            index, number = re.fullmatch(rb"/script/(\d+)/(\d)", message.target).groups()
            asyncio.ensure_future(self.follow(self.scripts[int(index)]) if number == b"1" else self.answer_well(int(index)))

    async def follow(self, script):
        edges = [0, *script.cuts, len(script.raw)]
        for start, end in zip(edges, edges[1:]):
            if self.transport.is_closing():
                return
            self.transport.write(script.raw[start:end])
            await asyncio.sleep(0)
        if script.end == "close":
            self.transport.close()
        elif script.end == "reset":
            await asyncio.sleep(0.01)
            reset(self.transport)

    async def answer_well(self, index):
        body = second_body(index)
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def second_body(index):
    return b"second answer of %d" % index


async def listen_hostile(scripts):
    server = await asyncio.get_running_loop().create_server(lambda: Hostile(scripts), "127.0.0.1", 0, backlog=1024)
    return server, server.sockets[0].getsockname()[1]


def script_request(script, number, key):
    method = script.method if number == 1 else "GET"
    body = b"hello" if method in ("POST", "PUT") else b""
    version = script.version if number == 1 else "1.1"
    lines = [f"{method} /script/{script.index}/{number} HTTP/{version}", "Host: localhost", f"Authorization: Bearer {key.decode()}"]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Exchanges:
    """What one client got for its two requests, split as a strict reader splits it."""

    def __init__(self, script):
        self.script = script
        self.data = bytearray()
        self.starts = [0]
        self.ending = OPEN
        self.patience = PATIENCE if script.kind == "valid" else QUIET * 2
        self.trouble = None

    async def run(self, port, key):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address_of(self.script.index), 0))
        first, second = (script_request(self.script, number, key) for number in (1, 2))
        try:
            writer.write(first + second if self.script.pipelined else first)
            if await self.read_one(reader, self.script.method):
                if not self.script.pipelined:
                    writer.write(second)
                await self.read_one(reader, "GET")
        except ConnectionError:
            self.ending = RESET
        except wire.Malformed as error:
            self.trouble = f"the client gets what is no HTTP: {error}"
        writer.transport.abort()
        return self

    async def read_one(self, reader, method):
        """Read one final answer; true when it is whole and another may come."""
        at = self.starts[-1]
        while True:
            message = wire.read_message(self.data, at, "response", method == "HEAD", self.ending == CLOSED)
            if message and message.whole and message.status < 200:
                at = message.end
                continue
            if message and message.whole:
                self.starts.append(message.end)
                return self.ending == OPEN
            if self.ending != OPEN:
                return False
            try:
                data = await asyncio.wait_for(reader.read(1 << 16), self.patience)
            except asyncio.TimeoutError:
                return False
            self.data += data
            if not data:
                self.ending = CLOSED

    def segments(self):
        """(method, how the connection stood afterwards, bytes) of each exchange that began."""
        edges = [*self.starts, len(self.data)]
        pieces = [bytes(self.data[a:b]) for a, b in zip(edges, edges[1:])]
        if len(pieces) > 2 and pieces[2]:
            self.trouble = f"the client gets a third answer: {wire.shown(pieces[2])}"
        count = 2 if len(pieces) > 1 and pieces[1] else 1
        endings = [OPEN] * (count - 1) + [self.ending]
        return list(zip((self.script.method, "GET"), endings, pieces))
