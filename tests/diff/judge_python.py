"""Judges written in python. Usage: judge_python.py h11|h11-lenient|httptools|responses

Reads frames (32 bits of length, big endian, then the bytes) and answers each with one line.
Requests: `method,target,host,body` in hex for each whole one; then `.` at a clean end, `~` when the bytes end inside a
request, `!` when the rest is refused. `h11-lenient` reads every request by itself, as if none closed the connection.
Responses: a frame holds, for each exchange, the method, how the connection stood afterwards and the bytes; the line has
`h11=... http.client=...` with the outcomes of the exchanges, separated by commas.
"""

import http.client
import io
import struct
import sys

import h11

HEAD_MAX = 1 << 20
OPEN, CLOSED = 0, 1


def entry(method, target, host, body):
    return ",".join(part.hex() for part in (method, target, host, body))


def read_h11(data):
    server = h11.Connection(h11.SERVER, HEAD_MAX)
    server.receive_data(data)
    while True:
        request = yield from next_h11(server)
        if not request:
            return
        server.send(h11.Response(status_code=404, headers=[("Content-Length", "0")]))     # a 200 to CONNECT would be a tunnel
        server.send(h11.EndOfMessage())
        if server.our_state is not h11.DONE or server.their_state is not h11.DONE:
            yield "!" if server.trailing_data[0] else "."
            return
        server.start_next_cycle()


def read_h11_lenient(data):
    while True:
        data = data.removeprefix(b"\r\n")
        server = h11.Connection(h11.SERVER, HEAD_MAX)
        server.receive_data(data)
        request = yield from next_h11(server)
        if not request:
            return
        data = server.trailing_data[0]


def next_h11(server):
    """Yield one request of h11; true when another may follow."""
    request, body = None, b""
    try:
        while True:
            event = server.next_event()
            if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                yield "~" if request or server.trailing_data[0] else "."
                return False
            if event is h11.PAUSED:
                raise h11.RemoteProtocolError("paused")
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                hosts = [value for name, value in request.headers if name == b"host"]
                yield entry(request.method, request.target, b" ".join(hosts), body)
                return True
    except h11.RemoteProtocolError:
        yield "!"
        return False


class Httptools:
    """The callbacks of httptools, for one connection."""

    def __init__(self, httptools):
        self.library = httptools
        self.entries = []
        self.inside = False

    def on_message_begin(self):
        self.inside, self.target, self.hosts, self.body = True, b"", [], b""

    def on_url(self, url):
        self.target += url

    def on_header(self, name, value):
        if name.lower() == b"host":
            self.hosts.append(value)

    def on_body(self, body):
        self.body += body

    def on_message_complete(self):
        self.entries.append(entry(self.parser.get_method(), self.target, b" ".join(self.hosts), self.body))
        self.inside = False

    def read(self, data):
        while True:
            self.parser = self.library.HttpRequestParser(self)
            try:
                self.parser.feed_data(data)
                return [*self.entries, "~" if self.inside else "."]
            except self.library.HttpParserUpgrade as upgrade:
                # Nobody said 101, so what follows is an ordinary request.
                data = data[upgrade.args[0]:]
            except self.library.HttpParserError:
                return [*self.entries, "!"]


def exchanges(frame):
    """(method, how the connection stood afterwards, bytes) of each exchange."""
    at = 0
    while at < len(frame):
        size, ending, length = struct.unpack_from(">BBI", frame, at)
        at += 6
        yield frame[at:at + size].decode(), ending, frame[at + size:at + size + length]
        at += size + length


def whole(status, body):
    return f"{status}:{body.hex()}"


def h11_outcome(method, ending, data):
    client = h11.Connection(h11.CLIENT, HEAD_MAX)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    if ending == CLOSED:
        client.receive_data(b"")
    status, body = None, b""
    try:
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                return f"{status}:cut" if status else "none"
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return whole(status, body)
    except h11.RemoteProtocolError:
        return f"{status}:cut" if status else "none"


class Recorded(io.RawIOBase):
    """Recorded bytes as a socket; after them the connection is closed, or silent, which reads as an error."""

    def __init__(self, data, ending):
        self.data, self.ending = io.BytesIO(data), ending
        self.reader = Unclosed(self)

    def makefile(self, *_):
        return self.reader

    def readable(self):
        return True

    def readinto(self, space):
        count = self.data.readinto(space)
        if count == 0 and self.ending != CLOSED:
            raise TimeoutError("silent or reset")
        return count


class Unclosed(io.BufferedReader):
    """http.client closes its file after each response; the next one is to read on."""

    def close(self):
        pass


def python_outcome(method, ending, data):
    recorded = Recorded(data, ending)
    try:
        response = next_response(recorded, method)
    except (http.client.HTTPException, OSError, ValueError):
        return "none"
    try:
        return whole(response.status, response.read())
    except (http.client.HTTPException, OSError, ValueError, MemoryError):       # it makes room for a chunk before it comes
        return f"{response.status}:cut"


def next_response(recorded, method):
    """The next final one: http.client takes every 1xx but 100 for it."""
    while True:
        response = http.client.HTTPResponse(recorded, method=method)
        response.begin()
        if response.status >= 200:
            return response


def read_responses(frame):
    readers = {"h11": h11_outcome, "http.client": python_outcome}
    held = list(exchanges(frame))
    return [f"{name}=" + ",".join(read(*exchange) for exchange in held) for name, read in readers.items()]


def frames(stream):
    while header := stream.read(4):
        yield stream.read(struct.unpack(">I", header)[0])


def main():
    if sys.argv[1] == "httptools":
        import httptools
        read = lambda data: Httptools(httptools).read(data)
    else:
        if sys.argv[1] == "h11-lenient":        # trailers are checked as fields, and what they say is dropped
            h11._readers.EndOfMessage = lambda headers=(): h11.EndOfMessage()
        read = {"h11": read_h11, "h11-lenient": read_h11_lenient, "responses": read_responses}[sys.argv[1]]
    for frame in frames(sys.stdin.buffer):
        print(" ".join(read(frame)), flush=True)


if __name__ == "__main__":
    main()
