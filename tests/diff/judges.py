"""The judges: long-running parsers of others that say what they read, and what it takes to agree with them."""

import asyncio
import struct
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


def known_method(methods):
    return lambda method, target: method in methods


def cpp_reads(method, target):
    return method in CPP_METHODS and target.count(b"?") < 2


# By judge: whether it takes such a request at all. What it does not take it refuses, which hurts nobody, as long as it
# then reads nothing that was not sent.
TAKES = {"llhttp": known_method(LLHTTP_METHODS), "httptools": known_method(HTTPTOOLS_METHODS), "cpp-httplib": cpp_reads}


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
            Judge("llhttp", ["node", HERE / "judge_node.cjs", "requests"]), Judge("net/http", [build / "go"]),
            Judge("cpp-httplib", [build / "cpp"])]


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


def body_unread(name, method, fields):
    """cpp-httplib leaves the body of these alone: it must at least not read it as requests."""
    return name == "cpp-httplib" and (method in (b"GET", b"HEAD", b"OPTIONS") or (method == b"DELETE" and not fields))


def disagreement(name, line, sent, partial):
    """Why the judge's reading is not what was sent: requests as (method, target, host, body, has a length); None: it is."""
    requests, marks = parse_line(line)
    takes = TAKES.get(name, lambda method, target: True)
    left = list(requests)
    for method, target, host, body, has_length in sent:
        if left and left[0][:3] == (method, target, host) and (left[0][3] == body or (body_unread(name, method, has_length) and not left[0][3])):
            left.pop(0)
        elif takes(method, target):
            return f"{name} misses {method.decode()} {target.decode()}: it reads {readable(requests, marks)}"
        elif name != "cpp-httplib":
            return None if not left and marks == ["!"] else f"{name} goes on after a refusal: {readable(requests, marks)}"
    if left:
        return f"{name} reads one more: {readable(requests, marks)}"
    refused = "!" in marks and all(takes(one[0], one[1]) for one in sent)
    if (refused or "~" in marks) and not partial:
        return f"{name} takes no clean end: {readable(requests, marks)}"
    return None


def readable(requests, marks):
    return f"{[b' '.join(one)[:120] for one in requests]} and then {' '.join(marks)}"


def is_subsequence(few, many):
    rest = iter(many)
    return all(any(one == other for other in rest) for one in few)
