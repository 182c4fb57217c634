"""The judges: long-running parsers of others that say what they read, and what it takes to agree with them."""

import asyncio
import struct
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LINE_MAX = 1 << 28

# What cpp-httplib's server answers 400 to before it reads a body, and has no way to take.
CPP_METHODS = {b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"}
HTTPTOOLS_METHODS = {
    b"ACL", b"BIND", b"CHECKOUT", b"COPY", b"DELETE", b"GET", b"HEAD", b"LINK", b"LOCK", b"M-SEARCH", b"MERGE", b"MKACTIVITY", b"MKCALENDAR",
    b"MKCOL", b"MOVE", b"NOTIFY", b"OPTIONS", b"PATCH", b"POST", b"PROPFIND", b"PROPPATCH", b"PURGE", b"PUT", b"REBIND", b"REPORT", b"SEARCH",
    b"SOURCE", b"SUBSCRIBE", b"UNBIND", b"UNLINK", b"UNLOCK", b"UNSUBSCRIBE"}
LLHTTP_METHODS = HTTPTOOLS_METHODS | {b"QUERY"}


def llhttp_takes(request):
    return request.method in LLHTTP_METHODS


def httptools_takes(request):
    """http_parser, which is in it, takes a field whose name only begins so for a coding that it does not know."""
    longer = any(name.lower().startswith(b"transfer-encoding") and len(name) > len(b"transfer-encoding") for name in request.names)
    return request.method in HTTPTOOLS_METHODS and not longer


def cpp_takes(request):
    """Its limits are lower than ours: a head past them may come, without a body that it would read on into."""
    return request.method in CPP_METHODS and request.target.count(b"?") < 2 and request.longest <= 8192 and len(request.names) <= 100


CPP = "cpp-httplib"
RELEASES = ("bookworm", "trixie", "forky")      # of Debian, and so of cpp-httplib

# By judge: whether it takes such a request at all. What it does not take it refuses, which hurts nobody, as long as it
# then reads nothing that was not sent.
TAKES = {"llhttp": llhttp_takes, "httptools": httptools_takes, CPP: cpp_takes}


@dataclass
class Sent:
    """A request as tinyauth sent it on, read strictly."""

    method: bytes
    target: bytes
    host: bytes
    body: bytes
    names: list
    longest: int    # bytes of its longest line

    def read_as(self, reading, unread_body):
        """Whether a judge's reading means this request; unread_body: it may leave the body alone."""
        return reading[:3] == (self.method, self.target, self.host) and (reading[3] == self.body or (unread_body and not reading[3]))


class Judge:
    def __init__(self, name, command):
        self.name, self.command = name, [str(word) for word in command]

    async def start(self):
        self.process = await asyncio.create_subprocess_exec(
            *self.command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_MAX)
        return self

    async def read(self, frames):
        """One line for each frame."""
        feeding = asyncio.ensure_future(self.feed(frames))
        lines = []
        for _ in frames:
            line = await self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the judge {self.name} died on frame {frames[len(lines)]!r}")
            lines.append(line.decode().rstrip("\n"))
        await feeding
        return lines

    async def feed(self, frames):
        for frame in frames:
            self.process.stdin.write(struct.pack(">I", len(frame)) + frame)
            await self.process.stdin.drain()

    async def stop(self):
        self.process.stdin.close()
        await self.process.wait()


def request_judges(python, build):
    return [Judge("h11", [python, HERE / "judge_python.py", "h11"]), Judge("httptools", [python, HERE / "judge_python.py", "httptools"]),
            Judge("llhttp", ["node", HERE / "judge_node.cjs", "requests"]), Judge("net/http", [build / "judge_go"]),
            *(Judge(f"{CPP} of {release}, {mode}", [build / f"judge_cpp_{release}", mode]) for release in RELEASES
              for mode in ("serving", "loading"))]


def client_judge(python):
    return Judge("h11 on the client's bytes", [python, HERE / "judge_python.py", "h11-lenient"])


def response_judges(python):
    return [Judge("h11 and http.client", [python, HERE / "judge_python.py", "responses"]),
            Judge("llhttp", ["node", HERE / "judge_node.cjs", "responses"])]


def exchange_frame(exchanges):
    """(method, how the connection stood afterwards, bytes) as the response judges read it."""
    return b"".join(struct.pack(">BBI", len(method), ending, len(data)) + method.encode() + data for method, ending, data in exchanges)


def parse_line(line):
    """(requests, marks): what a judge read, and what it said of the rest."""
    words = line.split(" ")
    return [tuple(bytes.fromhex(part) for part in word.split(",")) for word in words if "," in word], [w for w in words if "," not in w]


def is_cpp(name):
    return name.startswith(CPP)


def leaves_body(name, request):
    """cpp-httplib does not read the body of these, and none at all while it loads: it must at least not read it as requests."""
    unsized = b"content-length" not in [field.lower() for field in request.names]
    by_method = request.method in (b"GET", b"HEAD", b"OPTIONS") or (request.method == b"DELETE" and unsized)
    return is_cpp(name) and (by_method or name.endswith("loading"))


def disagreement(name, line, sent, partial, rest):
    """Why the judge's reading is not what was sent: a list of Sent, then, with `rest`, bytes that are no whole request, and
    of which `partial` is the head, when that is whole. None: it is."""
    requests, marks = parse_line(line)
    takes = TAKES.get(CPP if is_cpp(name) else name, lambda request: True)
    left = list(requests)
    for request in sent:
        if left and request.read_as(left[0], leaves_body(name, request)):
            left.pop(0)
        elif takes(request):
            return f"{name} misses a request: {request.method.decode()} {request.target.decode()}: it reads {readable(requests, marks)}"
        elif not is_cpp(name):
            return None if not left and marks == ["!"] else f"{name} goes on after a refusal: {readable(requests, marks)}"
    if left and partial and leaves_body(name, partial) and partial.read_as(left[0], True):
        left.pop(0)
    if left:
        return f"{name} reads one more: {readable(requests, marks)}"
    refused = "!" in marks and all(takes(request) for request in sent)
    if (refused or "~" in marks) and not rest:
        return f"{name} takes no clean end: {readable(requests, marks)}"
    return None


def readable(requests, marks):
    return f"{[b' '.join(one)[:120] for one in requests]} and then {' '.join(marks)}"


def is_subsequence(few, many):
    rest = iter(many)
    return all(any(one == other for other in rest) for one in few)
