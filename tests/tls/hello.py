"""TLS records and hellos made by hand, for what no library would send."""

import os
import socket
import struct

SUITES = (0xC02B, 0xC02F, 0xCCA9, 0xCCA8, 0xC02C, 0xC030)
TLS12 = 0x0303


def vector(data, size=2):
    return len(data).to_bytes(size, "big") + data


def words(numbers):
    return b"".join(struct.pack("!H", number) for number in numbers)


def extension(number, data):
    return struct.pack("!H", number) + vector(data)


def hello(version=TLS12, suites=SUITES, groups=(23,), name=None, protocols=(), session=b"", more=b"", compression=b"\0"):
    """A ClientHello: a handshake message without a record around it."""
    extensions = extension(10, vector(words(groups))) + extension(11, vector(b"\0", 1))
    extensions += extension(13, vector(words((0x0403, 0x0401, 0x0503, 0x0501, 0x0804))))
    if name is not None:
        extensions += extension(0, vector(b"\0" + vector(name)))
    if protocols:
        extensions += extension(16, vector(b"".join(vector(protocol, 1) for protocol in protocols)))
    body = struct.pack("!H", version) + os.urandom(32) + vector(session, 1) + vector(words(suites)) + vector(compression, 1)
    return b"\x01" + vector(body + vector(extensions + more), 3)


def record(kind, data, version=TLS12):
    return struct.pack("!BH", kind, version) + vector(data)


def records(kind, data, size):
    """The same bytes in records of so many."""
    return b"".join(record(kind, data[at:at + size]) for at in range(0, len(data), size))


HELLO = record(22, hello(), 0x0301)


def read_records(sock, most=64):
    """(type, content) of what comes until the end or until ServerHelloDone, and how it ended."""
    data, found = b"", []
    while True:
        while len(data) >= 5 and len(data) >= 5 + struct.unpack_from("!H", data, 3)[0]:
            length = struct.unpack_from("!H", data, 3)[0]
            found.append((data[0], data[5:5 + length]))
            data = data[5 + length:]
            if found[-1][0] == 22 and found[-1][1].endswith(b"\x0e\0\0\0"):
                return found, "open"
        if len(found) >= most:
            return found, "open"
        try:
            piece = sock.recv(1 << 16)
        except ConnectionResetError:
            return found, "reset"
        except socket.timeout:
            return found, "silence"
        if not piece:
            return found, "eof" if not data else "cut"
        data += piece


def alerts(found):
    """The descriptions of the alerts among records."""
    return [content[1] for kind, content in found if kind == 21 and len(content) == 2]
