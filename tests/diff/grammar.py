"""Seeded makers of what the two sides send: requests and responses by a grammar, and mutations of their bytes.

The same seed and index make the same bytes, whatever else was made before.
"""

import base64
import functools
import random
import re
from dataclasses import dataclass
from pathlib import Path

import cases

KEY = cases.KEY
CASE_FILES = sorted(Path(cases.__file__).parent.glob("*.cases"))

METHODS = ["POST"] * 9 + ["GET"] * 6 + ["PUT", "PUT", "PATCH", "DELETE", "DELETE", "HEAD", "OPTIONS"]
PATHS = ["/v1/chat/completions", "/api/chat", "/api/tags", "/v1/models", "/", "/a/b/c", "/a%20b", "/%e2%82%ac", "/..%2f", "//x", "/a;b=c",
         "/v1/../api", "/{}|^`", "/~user/[x]", "/a:b@c", "/" + "long/" * 300]
QUERIES = ["", "", "", "?a=b", "?", "?a=%41", "?x=1&y=2", "?a/b", "?u=http://h/", "?" + "q" * 2000]
HOSTS = ["localhost", "127.0.0.1:21434", "[::1]:80", "example.com", "a-b.example:8080", "EXAMPLE.com"]
FIELDS = ["User-Agent: curl/8.5.0", "Accept: */*", "accept-language:de", "X-Empty:", "X-Blank: ", "X-Tab:\ta\tb\t", "X-Wide:   a  b   ",
          "X-Obs: caf\xe9", "X-Name_With_Underscore: 1", "Content_Length: 7", "Transfer_Encoding: chunked", "TE: trailers", "TE: gzip",
          "Content-Type: application/json", "Connection: keep-alive", "Connection: X-Gone\r\nX-Gone: 1", "Keep-Alive: timeout=5",
          "Proxy-Connection: keep-alive", "X-Forwarded-For: 10.0.0.1", "X-Forwarded-Host: evil", "X-Real-IP: 10.0.0.1", "Forwarded: for=1.2.3.4",
          "Upgrade: h2c", "HTTP2-Settings: AAAA", "Cookie: a=b; c=d", "X-Request-Id: given-by-the-client", "X-Quoted: \"a\\\"b\"",
          "X-Long: " + "v" * 3000, "!#$%&'*+-.^`|~: odd", "X-Percent: a%0d%0aX-Injected:%201", "Origin: http://localhost"]
SMUGGLED = ["GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n", "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "\r\n\r\nPOST /smuggled HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nevil",
            f"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY.decode()}\r\n\r\n"]

# What mutations put in: bytes at any place, fields at the end of any line of a head.
BYTES = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\0", b"\t", b" ", b"\x0b", b"\x0c", b"\x7f", b"\x80", b"\xff", b":", b";", b",", b"\"", b"%",
         b"%00", b"%2f", b"#", b"?", b"/", b"\\", b"_", b"-", b"0", b"1", b"x", b"0x", b"HTTP/1.1", b"chunked"]
LINES = ["Transfer-Encoding: chunked", "Transfer-Encoding:chunked", "Transfer-Encoding: Chunked", "Transfer-Encoding : chunked",
         "Transfer-Encoding:\tchunked", "Transfer-Encoding: \x0bchunked", "Transfer-Encoding: xchunked", "Transfer-Encoding: chunked, chunked",
         "Transfer-Encoding: identity", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked;q=1", "Transfer-Encoding:\r\n chunked",
         "Transfer-Encoding: \"chunked\"", "Transfer-Encoding:", "Content-Length: 0", "Content-Length: 5", "Content-Length: +5",
         "Content-Length: -1", "Content-Length: 5, 5", "Content-Length: 0x5", "Content-Length: 5 5", "Content-Length:", "Content-Length : 5",
         "Content-Length: 4294967301", "Content-Length: 18446744073709551621", "Content-Length: 00005", "Content-Length: 5;", "Content-Length\t: 5",
         "Connection: content-length", "Connection: transfer-encoding", "Connection: host", "Connection: close, authorization",
         "Connection: close", "Connection: keep-alive", "Connection: Upgrade\r\nUpgrade: websocket", "Upgrade: websocket", "Expect: 100-continue",
         "Expect: 200-ok", "Host: other", "Host:", "Host: a, b", "Host: a/b", " folded", "\tfolded", ": no name", "no colon", "X-Nul: a\0b",
         "Authorization: Bearer wrong", f"Authorization: Bearer {KEY.decode()}", "X-Api-Key: wrong", "Trailer: X-T", "\xa0: 1", "X-A: b\rX-B: c",
         "X-A: b\nX-B: c", "Content-Length: 3\nX: y", "X-" + "n" * 300 + ": 1", "X: " + "v" * 9000]
NUMBERS = ["0", "1", "{n}0", "0{n}", "+{n}", "-{n}", " {n}", "{n} ", "{n},{n}", "0x{n}", "{n}.0", "{n}e0", "{n};", "2147483648", "4294967296",
           "4294967297", "9223372036854775808", "18446744073709551615", "18446744073709551616", "18446744073709551617", "999999999999999999",
           "9999999999999999999"]
ENDINGS = [b"\n", b"\r", b"\r\r\n", b"\n\r", b" \r\n", b"\t\r\n", b"\r\n ", b"\r\n\t", b"\0\r\n", b"\x0b\r\n"]


@dataclass
class Stream:
    """What one client sends on one connection, and what of it must be forwarded when no mutation touched it."""

    index: int
    raw: bytes
    cuts: list                      # where the client pauses
    expected: list | None = None    # (method, target, body); None: mutated
    last: bytes = b""               # the target of the well-known last request

    def pieces(self):
        edges = [0, *self.cuts, len(self.raw)]
        return [self.raw[a:b] for a, b in zip(edges, edges[1:]) if a < b]


@dataclass
class Script:
    """How a hostile upstream answers the first of two requests."""

    index: int
    kind: str                       # valid, cut, mutated
    method: str
    version: str
    raw: bytes
    cuts: list
    end: str                        # keep, close, reset
    pipelined: bool
    expected: str | None = None     # the outcome of the first request, as judges write it


# Requests

def request_stream(seed, index):
    rng = random.Random(f"{seed} request {index}")
    draw = rng.random()
    if draw < 0.25:
        return plain_stream(rng, index)
    untouched = rng.choice(case_seeds()) if draw < 0.5 else plain_stream(rng, index).raw
    raw = mutate(rng, untouched, lambda: rng.choice(case_seeds()))
    if rng.random() < 0.7:
        raw += last_request(index)
    return Stream(index, raw, cuts_of(rng, raw), last=last_target(index))


def plain_stream(rng, index):
    raw, expected = b"", []
    for number in range(rng.choice([1, 1, 1, 2, 3])):
        bytes_, meaning = one_request(rng, f"{index}-{number}")
        raw += bytes_
        expected += meaning
    raw += last_request(index)
    expected.append((b"GET", last_target(index), b""))
    return Stream(index, raw, cuts_of(rng, raw), expected, last_target(index))


def last_target(index):
    return b"/last-%d" % index


def last_request(index):
    return b"GET %b HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n\r\n" % (last_target(index), KEY)


def one_request(rng, name):
    """The bytes of a request, and a list with what is forwarded of it (nothing, when it has no key)."""
    method = rng.choice(METHODS)
    written, sent_on = target(rng, method)
    keyless = rng.random() < 0.05
    framing = "none" if keyless else rng.choice(["none", "length", "chunked"] if method != "POST" else ["length", "chunked"])
    body = request_body(rng) if framing != "none" else b""
    fields = [f"Host: {rng.choice(HOSTS)}", *credentials(rng, keyless), f"X-Name: {name}"]
    fields += rng.sample(FIELDS, rng.randrange(0, 6))
    if framing == "length":
        fields.append(f"Content-Length: {len(body)}")
    elif framing == "chunked":
        fields.append(rng.choice(["Transfer-Encoding: chunked", "transfer-encoding:Chunked", "Transfer-Encoding: CHUNKED "]))
    if body and rng.random() < 0.1:
        fields.append("Expect: 100-continue")
    rng.shuffle(fields)
    head = "\r\n".join([f"{method} {written} HTTP/1.1", *fields]).encode("latin-1") + b"\r\n\r\n"
    lead = b"\r\n" if rng.random() < 0.03 else b""
    sent = in_chunks(rng, body) if framing == "chunked" else body
    return lead + head + sent, [] if keyless else [(method.encode(), sent_on, body)]


def target(rng, method):
    """As the client writes it, and as it is sent on."""
    if method == "OPTIONS" and rng.random() < 0.5:
        return "*", b"*"
    query = rng.choice(QUERIES)
    if method != "OPTIONS" and rng.random() < 0.1:
        path = rng.choice(["", "/", "/v1/models"])
        return rng.choice(["http://", "https://", "HTTP://"]) + rng.choice(HOSTS) + path + query, ((path or "/") + query).encode()
    path = rng.choice(PATHS) + query
    return path, path.encode()


def credentials(rng, keyless):
    key = KEY.decode()
    if keyless:
        return rng.choice([[], ["Authorization: Bearer wrong"], [f"X-Api-Key: {key[:-1]}"], ["Authorization: Bearer"],
                           [f"Authorization: Bearer {key.swapcase()}"]])
    basic = base64.b64encode(b"user:" + KEY).decode()
    return [rng.choice([f"Authorization: Bearer {key}", f"authorization: bEaReR   {key}", f"X-Api-Key: {key}", f"Api-Key:{key}",
                        f"Authorization: Basic {basic}"])]


def request_body(rng):
    draw = rng.random()
    if draw < 0.3:
        return rng.choice(SMUGGLED).encode() * rng.randrange(1, 3)
    if draw < 0.4:
        return rng.randbytes(rng.choice([1, 17, 300, 5000, 70000]))
    return b'{"model":"m","messages":[{"role":"user","content":"' + b"hi " * rng.randrange(0, 60) + b'"}]}'


def in_chunks(rng, body):
    sent = b""
    while body:
        size = rng.choice([1, 2, 15, 16, 17, 255, 4096, 20000])
        piece, body = body[:size], body[size:]
        digits = f"{len(piece):{rng.choice(['x', 'X', '04x'])}}"
        extension = rng.choice(["", "", "", ";a", ";a=b", ';name="quoted; value"'])
        sent += f"{digits}{extension}\r\n".encode() + piece + b"\r\n"
    trailers = rng.choice(["", "", "", "X-Trailer: 1\r\n", f"Authorization: Bearer {KEY.decode()}\r\nContent-Length: 3\r\n"])
    return sent + rng.choice(["0", "0", "000", "0;x=y"]).encode() + b"\r\n" + trailers.encode() + b"\r\n"


def cuts_of(rng, raw):
    draw = rng.random()
    if draw < 0.6 or len(raw) < 2:
        return []
    if draw < 0.97 or len(raw) > 400:
        return sorted(rng.randrange(1, len(raw)) for _ in range(rng.randrange(1, 4)))
    return list(range(1, len(raw)))


@functools.cache
def case_seeds():
    """The client's bytes of every case file, without their marks."""
    held = [case for path in CASE_FILES for case in cases.read_file(path)]
    raws = [b"".join(piece for piece in case.pieces if isinstance(piece, bytes)) for case in held]
    return [raw for raw in raws if 0 < len(raw) < 20000]


# Mutations

def mutate(rng, raw, other):
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        raw = rng.choice(MUTATIONS)(rng, raw, other)
    return raw


def place(rng, raw):
    """A place to change: most often in a head or a chunk line, where the meaning is."""
    lines = [match.start() for match in re.finditer(rb"\r\n", raw)]
    if lines and rng.random() < 0.5:
        return min(len(raw), max(0, rng.choice(lines) + rng.randrange(-3, 5)))
    return rng.randrange(0, len(raw) + 1)


def put_bytes(rng, raw, other):
    at = place(rng, raw)
    return raw[:at] + rng.choice(BYTES) + raw[at:]


def replace_byte(rng, raw, other):
    at = place(rng, raw)
    return raw[:at] + rng.choice([*BYTES, bytes([rng.randrange(256)])]) + raw[at + 1:]


def flip_bit(rng, raw, other):
    at = place(rng, raw)
    return raw[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in raw[at:at + 1]) + raw[at + 1:]


def remove_bytes(rng, raw, other):
    at = place(rng, raw)
    return raw[:at] + raw[at + rng.choice([1, 1, 2, 4, 30]):]


def double_bytes(rng, raw, other):
    at = place(rng, raw)
    end = at + rng.choice([1, 2, 8, 60])
    return raw[:end] + raw[at:]


def change_ending(rng, raw, other):
    ends = [match.start() for match in re.finditer(rb"\r\n", raw)]
    if not ends:
        return raw
    at = rng.choice(ends)
    return raw[:at] + rng.choice(ENDINGS) + raw[at + 2:]


def head_lines(raw):
    head, blank, rest = raw.partition(b"\r\n\r\n")
    return head.split(b"\r\n"), blank + rest


def put_line(rng, raw, other):
    lines, rest = head_lines(raw)
    lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(LINES).encode("latin-1"))
    return b"\r\n".join(lines) + rest


def double_line(rng, raw, other):
    lines, rest = head_lines(raw)
    lines.insert(rng.randrange(0, len(lines) + 1), rng.choice(lines))
    return b"\r\n".join(lines) + rest


def remove_line(rng, raw, other):
    lines, rest = head_lines(raw)
    lines.pop(rng.randrange(len(lines)))
    return b"\r\n".join(lines) + rest


def swap_lines(rng, raw, other):
    lines, rest = head_lines(raw)
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\r\n".join(lines) + rest


def change_name(rng, raw, other):
    lines, rest = head_lines(raw)
    at = rng.randrange(len(lines))
    name, colon, value = lines[at].partition(b":")
    change = rng.choice([bytes.upper, bytes.swapcase, lambda n: n.replace(b"-", b"_"), lambda n: n + b" ", lambda n: b" " + n,
                         lambda n: n + b"\0", lambda n: n + b"x", lambda n: n[:-1]])
    lines[at] = change(name) + colon + value
    return b"\r\n".join(lines) + rest


def change_number(rng, raw, other):
    numbers = list(re.finditer(rb"(?<=: )\d+|(?<=\r\n)[0-9a-fA-F]+(?=[;\r])", raw))
    if not numbers:
        return raw
    number = rng.choice(numbers)
    near = str(max(0, int(number[0][:40], 16 if number[0].isalnum() else 10) + rng.choice([-2, -1, 1, 2, 16])))
    text = rng.choice([near, *(form.format(n=number[0].decode()) for form in NUMBERS)])
    return raw[:number.start()] + text.encode() + raw[number.end():]


def change_request_line(rng, raw, other):
    end = raw.find(b"\r\n")
    words = raw[:max(end, 0)].split(b" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice([words[at].lower(), b"", b"GET", b"CONNECT", b"TRACE", b"PRI", b"FOO", b"*", b"http://h", b"h:80", b"/a b", b"/a?b?c",
                            b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.10", words[at] + b"#x", words[at] + b" "])
    return b" ".join(words) + raw[max(end, 0):]


def splice(rng, raw, other):
    second = other()
    return raw[:place(rng, raw)] + second[place(rng, second):]


def truncate(rng, raw, other):
    return raw[:rng.randrange(1, len(raw) + 1)] if raw else raw


def put_smuggled(rng, raw, other):
    at = place(rng, raw)
    return raw[:at] + rng.choice(SMUGGLED).encode() + raw[at:]


MUTATIONS = [put_bytes, replace_byte, flip_bit, remove_bytes, double_bytes, change_ending, put_line, put_line, double_line, remove_line,
             swap_lines, change_name, change_number, change_number, change_request_line, splice, truncate, put_smuggled]


# Responses

STATUSES = ["200 OK", "200 OK", "200 OK", "200", "200 ", "201 Created", "206 Partial Content", "404 Not Found", "500 Oops", "204 No Content",
            "304 Not Modified"]
RESPONSE_FIELDS = ["Server: model", "Date: Mon, 01 Jan 2026 00:00:00 GMT", "Content-Type: text/event-stream", "X-Empty:", "Set-Cookie: a=b",
                   "Set-Cookie: c=d", "Connection: keep-alive", "Keep-Alive: timeout=5", "X-Long: " + "v" * 4000, "X-Obs: caf\xe9", "Trailer: X-T",
                   "Upgrade: h2c", "X-Accel-Redirect: /x"]
EVIL = "HTTP/1.1 200 OK\r\nX-Answer: evil\r\nContent-Length: 4\r\n\r\nevil"
RESPONSE_LINES = ["HTTP/1.1 200 OK", "HTTP/1.1 100 Continue\r\n", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
                  "Content-Length: 1", "Upgrade: websocket", EVIL]


def response_script(seed, index):
    rng = random.Random(f"{seed} response {index}")
    method = rng.choice(["GET", "GET", "POST", "POST", "HEAD", "PUT"])
    version = rng.choice(["1.1"] * 5 + ["1.0"])
    head, body, meaning = one_response(rng, method, index)
    script = Script(index, "valid", method, version, head + body, [], rng.choice(["keep", "keep", "close"]), rng.random() < 0.3, meaning)
    draw = rng.random()
    if draw < 0.2:
        if needs_close(head, method):
            script.end = "close"
    elif draw > 0.45 or not cut_short(rng, script, head):
        mutate_response(rng, script)
    script.cuts = cuts_of(rng, script.raw)
    return script


def framed_by(head):
    return "chunked" if b"\r\ntransfer-encoding" in head.lower() else "length" if b"\r\ncontent-length" in head.lower() else "close"


def bodiless(head, method):
    last = head[head.rindex(b"HTTP/1.1 "):]
    return method == "HEAD" or last[9:12] in (b"204", b"304")


def needs_close(head, method):
    return framed_by(head) == "close" and not bodiless(head, method)


def one_response(rng, method, index):
    status = rng.choice(STATUSES)
    body = rng.choice([b"", b"ok", b"x" * 3000, EVIL.encode(), b"\r\n" + EVIL.encode(), rng.randbytes(200), b"data: {}\n\n" * 50])
    framing = rng.choice(["length", "chunked", "close"])
    fields = [f"X-Answer: 1-{index}", *rng.sample(RESPONSE_FIELDS, rng.randrange(0, 4))]
    bodyless = method == "HEAD" or status[:3] in ("204", "304")
    if framing == "length":
        fields.append(f"Content-Length: {len(body)}")
    elif framing == "chunked":
        fields.append("Transfer-Encoding: chunked")
    rng.shuffle(fields)
    interim = rng.choice(["", "", "", "HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 3])
    head = (interim + "\r\n".join([f"HTTP/1.1 {status}", *fields]) + "\r\n\r\n").encode("latin-1")
    sent = b"" if bodyless else in_chunks(rng, body) if framing == "chunked" else body
    return head, sent, f"{status[:3]}:{'' if bodyless else body.hex()}"


def cut_short(rng, script, head):
    """End the response inside its body, or anywhere before that; true when that leaves it visibly cut."""
    least = 1 if rng.random() < 0.3 else len(head)
    whole_at = len(script.raw)
    if framed_by(head) == "close" or bodiless(head, script.method):
        least, whole_at = 1, len(head)
    if least >= whole_at:
        return False
    script.kind, script.expected = "cut", None
    script.raw = script.raw[:rng.randrange(least, whole_at)]
    script.end = rng.choice(["close", "close", "reset"])
    return True


def mutate_response(rng, script):
    script.kind, script.expected = "mutated", None
    script.end = rng.choice(["close", "close", "keep", "reset"])
    if rng.random() < 0.2:
        script.raw += rng.choice([EVIL.encode(), b"\r\n" + EVIL.encode(), b"x", b"\r\n", b"\0"])
        return
    other = lambda: EVIL.encode() * 2
    script.raw = mutate(rng, script.raw, other)
    if rng.random() < 0.3:
        lines, rest = head_lines(script.raw)
        lines.insert(rng.randrange(0, len(lines) + 1), rng.choice(RESPONSE_LINES).encode())
        script.raw = b"\r\n".join(lines) + rest
