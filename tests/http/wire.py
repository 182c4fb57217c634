"""A strict reader of HTTP/1.1 messages: what it refuses, tinyauth must not have sent."""

import re
from dataclasses import dataclass, field

START = {
    "request": re.compile(rb"[A-Z-]{1,32} [\x21-\x22\x24-\x7e]+ HTTP/1\.1"),
    "response": re.compile(rb"HTTP/1\.1 [1-9][0-9]{2}( [\t\x20-\x7e\x80-\xff]*)?"),
}
VISIBLE = rb"[\x21-\x7e\x80-\xff]"
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:" + VISIBLE + rb"(?:[\t\x20-\x7e\x80-\xff]*" + VISIBLE + rb")?)?)[ \t]*")
CHUNK = re.compile(rb"(0|[1-9a-fA-F][0-9a-fA-F]{0,14})\r\n")
LENGTH = re.compile(rb"[0-9]{1,18}")


class Malformed(Exception):
    """The bytes are no message that a strict peer would take."""


@dataclass
class Message:
    start: bytes
    fields: list
    framing: str = "none"       # none, length, chunked or close
    body: bytes = b""
    whole: bool = False
    end: int = 0                # where the next message begins
    trailers: list = field(default_factory=list)

    def values(self, name):
        return [value for key, value in self.fields if key.lower() == name.lower().encode()]

    def tokens(self, name):
        return [t.strip().lower() for value in self.values(name) for t in value.split(b",") if t.strip()]

    @property
    def status(self):
        return int(self.start.split(b" ")[1])

    @property
    def target(self):
        return self.start.split(b" ")[1]


def read_message(data, at, kind, to_head=False, ended=False):
    """The message that starts at data[at:], whole or not; None while its head is not whole.

    kind is `request` or `response`; to_head: the response answers a HEAD; ended: no more bytes will come."""
    head_end = data.find(b"\r\n\r\n", at)
    if head_end < 0:
        refuse_bad_ends(data[at:])
        return None
    lines = bytes(data[at:head_end]).split(b"\r\n")
    if not START[kind].fullmatch(lines[0]):
        raise Malformed(f"start line {shown(lines[0])}")
    message = Message(lines[0], [read_field(line) for line in lines[1:]])
    message.framing = framing_of(message, kind, to_head)
    read_body(message, data, head_end + 4, ended)
    return message


def refuse_bad_ends(data):
    """A lone CR or LF is wrong wherever it stands; a CR at the very end may still get its LF."""
    if re.search(rb"(?<!\r)\n|\r(?![\n])(?!\Z)|\0", bytes(data)):
        raise Malformed(f"control bytes in a head: {shown(data)}")


def read_field(line):
    match = FIELD.fullmatch(line)
    if not match:
        raise Malformed(f"field {shown(line)}")
    return match.groups()


def framing_of(message, kind, to_head):
    coding, length = message.values("Transfer-Encoding"), message.values("Content-Length")
    if coding and length:
        raise Malformed("both Transfer-Encoding and Content-Length")
    if len(length) > 1 or (length and not LENGTH.fullmatch(length[0])):
        raise Malformed(f"Content-Length {length}")
    if coding and coding != [b"chunked"]:
        raise Malformed(f"Transfer-Encoding {coding}")
    if kind == "response" and (message.status < 200 or message.status == 204) and (coding or length):
        raise Malformed(f"framing fields on a {message.status}")
    if kind == "response" and (to_head or message.status < 200 or message.status in (204, 304)):
        return "none"
    if coding:
        return "chunked"
    if length:
        return "length"
    return "none" if kind == "request" else "close"


def read_body(message, data, at, ended):
    if message.framing == "chunked":
        read_chunks(message, data, at)
        return
    size = {"none": 0, "close": len(data) - at}.get(message.framing)
    if size is None:
        size = int(message.values("Content-Length")[0])
    message.body = bytes(data[at:at + size])
    message.end = at + len(message.body)
    message.whole = ended if message.framing == "close" else len(message.body) == size


def read_chunks(message, data, at):
    while True:
        line = CHUNK.match(data, at)
        if not line:
            if b"\n" in data[at:at + 17] or len(data) - at > 17:
                raise Malformed(f"chunk line {shown(data[at:at + 40])}")
            return
        size = int(line[1], 16)
        at = line.end()
        if size == 0:
            break
        message.body += bytes(data[at:at + size])
        if len(data) < at + size + 2:
            return
        if data[at + size:at + size + 2] != b"\r\n":
            raise Malformed(f"after chunk data {shown(data[at + size:at + size + 2])}")
        at += size + 2
    read_trailers(message, data, at)


def read_trailers(message, data, at):
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            refuse_bad_ends(data[at:])
            return
        if end == at:
            message.whole, message.end = True, end + 2
            return
        message.trailers.append(read_field(bytes(data[at:end])))
        at = end + 2


def shown(data, most=70):
    """Bytes as a C string for a report, cut to a readable length."""
    data = bytes(data)
    text = "".join({10: "\\n", 13: "\\r", 9: "\\t", 34: '\\"', 92: "\\\\"}.get(b, chr(b) if 32 <= b < 127 else f"\\x{b:02x}")
                   for b in data[:most])
    return f'"{text}"' + (f"... ({len(data)} bytes)" if len(data) > most else "")
