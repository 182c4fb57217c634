"""Reads the case files. Their format:

    # a comment
    case r12-both-framings      the rule's number (r01 to r33; f01 to f10 for the table of chapter F) is in the name
    > POST /a HTTP/1.1\\r\\n      what the client sends: C escapes, no byte that is not written; lines are joined as they are
    < HTTP/1.1 200 OK\\r\\n       what the upstream answers (without such lines: 200 with the body `ok`)
    ^ POST /a HTTP/1.1          what must have been forwarded: a line with HTTP/ begins a request,
    ^ X-A: b                      a field that is there exactly once with exactly this value,
    ^ -X-B                        a field that is not there,
    ^ "hello"                     its body, ^ tunnel "hi" what came after a 101
    with NAME: BYTES            one case for each such line; its bytes stand for {it}, its name ends in -NAME

In bytes: {key} the valid key, {key:swapcase} {key:cut} spoilt ones, {basic} Basic credentials with it as the password,
{repeat:TEXT:N}, {fields:N} N harmless fields, {fill:TEXT:N} as much TEXT as makes the whole block N bytes long.
Marks in bytes:
    <<!>>               the byte before it is the first offending one: the answer must come here, and not one byte earlier (or, where
                        a <<.>> stands, not before that)
    <<N>> <<answered>>  wait for the head of an answer with status N, for a whole answer
    <<forwarded>> <<whole>>
                        wait until the upstream has a request's head, a whole request
    <<wait 50ms>> <<quiet 50ms>>
                        wait; the same, and nothing may arrive from tinyauth meanwhile
    <<fin>> <<close>> <<rst>>
                        shut the sending side, close, reset

    expect: 200 400 close       statuses in order: 200|401 either, 103*16 repeated, 100? optional, `HEAD 200` answers a HEAD; then how it
                                ends: open, close, any, cut (the last answer is visibly cut, then closed, or a whole 502), tunnel,
                                gone (no answer is waited for: the client has left), leave (the client leaves after its answer)
    upstream: 1                 whole requests that the upstream saw; none: not a byte; 0-1; cut: no whole one, and closed by tinyauth
    upstream-end: closed        tinyauth closes the upstream connection before the client leaves
    answer: whole|head|accept|never [only]
                                when the block of < lines that follows is sent: after the whole request, after its head
                                (`only`: nothing more for this request), at once on accept, never
    body: BYTES / never: BYTES  the last answer's body; bytes that the client must not see
    framing: length             of the last answer: none, length, chunked, close
    field: Name: value          in the last answer, exactly once; `-Name`: not there
    tunnel: BYTES               what the client gets after a 101
    log: WORDS                  one access line holds all of them
    time: 250ms 900ms           from the start to the end of the case
    options: --idle-timeout 1s  starts a tinyauth of its own
    listener: refused|full      the upstream refuses, or accepts no more
    hold: 4                     idle connections of the same client that are open meanwhile
    ways: whole split pipelined at keyless
    keyless: 401|417            the first status without `Authorization: Bearer {key}`, or `no`
"""

import base64
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

KEY = b"sk-Tinyauth-Raw-0123456789-abcdefXYZ"   # the lengths of some bodies in the case files count its 36 bytes
WAYS = ("whole", "split", "pipelined", "at", "keyless")
ENDS = ("open", "close", "any", "cut", "tunnel", "gone", "leave")
DIRECTIVES = ("expect", "upstream", "upstream-end", "answer", "body", "never", "framing", "field", "tunnel", "log", "time", "options",
              "listener", "hold", "ways", "keyless")
KEY_LINE = "Authorization: Bearer {key}\\r\\n"
TOKEN = re.compile(r"\\x([0-9a-fA-F]{2})|\\([rnt0\\\"])|<<([^<>]+)>>|\{((?:[^{}]|\{[^{}]*\})+)\}|([^\\{<]+|<)")
ESCAPES = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\", '"': b'"'}


class CaseError(Exception):
    """A case file is wrong."""


@dataclass
class Expected:
    statuses: frozenset
    to_head: bool = False
    optional: bool = False

    def __str__(self):
        return "|".join(map(str, sorted(self.statuses))) + ("?" if self.optional else "")


@dataclass
class Answer:
    when: str = "whole"
    only: bool = False
    lines: list = field(default_factory=list)
    pieces: list = field(default_factory=list)      # bytes, and marks as str


@dataclass
class Forwarded:
    line: bytes
    fields: list = field(default_factory=list)
    absent: list = field(default_factory=list)
    body: bytes = None
    tunnel: bytes = None


@dataclass
class Case:
    name: str
    place: str
    lines: list = field(default_factory=list)       # of the client, not yet expanded
    answers: list = field(default_factory=list)
    forwarded: list = field(default_factory=list)
    directives: dict = field(default_factory=dict)
    fields: list = field(default_factory=list)
    variants: list = field(default_factory=list)
    pieces: list = field(default_factory=list)
    keyless_pieces: list = None
    expect: list = field(default_factory=list)
    end: str = "any"
    upstream: tuple = None                          # least and most whole requests
    upstream_cut: bool = False

    def get(self, key, default=""):
        return self.directives.get(key, default)


def load_cases(folder):
    cases = [case for path in sorted(Path(folder).glob("*.cases")) for case in read_file(path)]
    names = [case.name for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    wanted = {f"r{n:02}" for n in range(1, 34)} | {f"f{n:02}" for n in range(1, 11)}
    missing = {rule for rule in wanted if not any(re.search(rf"(^|-){rule}-", name) for name in names)}
    if twice or missing:
        raise CaseError(f"names used twice: {sorted(twice)}; rules without a case: {sorted(missing)}")
    return cases


def read_file(path):
    templates = []
    for number, line in enumerate(path.read_text("ascii").splitlines(), 1):
        place = f"{os.path.basename(path)}:{number}"
        try:
            read_line(templates, line, place)
        except (ValueError, IndexError, KeyError) as error:
            raise CaseError(f"{place}: {error}") from error
    finished = []
    for template in templates:
        try:
            finished += [finish(template, name, text) for name, text in template.variants or [("", None)]]
        except (ValueError, IndexError, KeyError) as error:
            raise CaseError(f"{template.place}: {template.name}: {error}") from error
    return finished


def read_line(templates, line, place):
    if not line or line.startswith("#"):
        return
    if line != line.rstrip():
        raise ValueError("a blank at the end of a line: write \\x20")
    if line.startswith("case "):
        templates.append(Case(line[5:], place))
        return
    case = templates[-1]
    if line.startswith("> "):
        case.lines.append(line[2:])
    elif line.startswith("< "):
        if not case.answers:
            case.answers.append(Answer())
        case.answers[-1].lines.append(line[2:])
    elif line.startswith("^ "):
        read_forwarded(case, line[2:])
    elif line.startswith("with "):
        name, text = line[5:].split(": ", 1)
        case.variants.append((name, text))
    else:
        read_directive(case, *line.split(": ", 1))


def read_forwarded(case, text):
    begins = " HTTP/" in text and not text.startswith(('"', "tunnel "))
    case.forwarded.append(["line" if begins else "more", text])


def read_directive(case, key, value):
    if key not in DIRECTIVES:
        raise ValueError(f"unknown directive {key}")
    if key == "answer":
        when, *only = value.split()
        if when not in ("whole", "head", "accept", "never") or only not in ([], ["only"]):
            raise ValueError(f"answer: {value}")
        case.answers.append(Answer(when, bool(only)))
    elif key == "field":
        case.fields.append(value)
    else:
        case.directives[key] = value


def finish(template, variant, text):
    """The case that a template and one of its `with` lines make."""
    def put(line):
        return line if text is None else line.replace("{it}", text)
    lines = [put(line) for line in template.lines]
    case = Case(template.name + (f"-{variant}" if variant else ""), template.place, lines,
                directives={key: put(value) for key, value in template.directives.items()}, fields=[put(f) for f in template.fields])
    case.pieces = pieces_of("".join(lines))
    if has_keyless_way(case, template):
        case.keyless_pieces = pieces_of("".join(line.replace(KEY_LINE, "") for line in lines))
    case.answers = [Answer(a.when, a.only, pieces=pieces_of("".join(put(line) for line in a.lines))) for a in template.answers]
    case.forwarded = forwarded_of([(kind, put(line)) for kind, line in template.forwarded])
    case.expect, case.end = read_expect(case.directives["expect"])
    case.upstream, case.upstream_cut = read_upstream(case.directives["upstream"])
    return case


def has_keyless_way(case, template):
    """Whether the case says something about the same bytes without their key."""
    told = case.get("keyless") == "no" or case.get("options") or case.directives["expect"] == "gone"
    return any(KEY_LINE in line for line in case.lines) and not template.answers and not told


def pieces_of(text):
    """The bytes and marks that a text of the case file stands for."""
    pieces, at, fill = [], 0, None
    while at < len(text):
        token = TOKEN.match(text, at)
        if not token:
            raise ValueError(f"cannot read {text[at:at + 20]!r}")
        at = token.end()
        hexed, escape, mark, helper, plain = token.groups()
        if mark:
            pieces.append(mark)
        elif helper and helper.startswith("fill:"):
            fill = (len(pieces), *helper[5:].rsplit(":", 1))
            pieces.append(b"")
        elif helper:
            pieces += expand(helper)
        else:
            pieces.append(bytes([int(hexed, 16)]) if hexed else ESCAPES[escape] if escape else plain.encode("ascii"))
    if fill:
        index, unit, total = fill
        room = int(total) - sum(len(piece) for piece in pieces if isinstance(piece, bytes))
        pieces[index] = (unit.encode() * (room // len(unit) + 1))[:room]
    return joined(pieces)


def joined(pieces):
    """The same with neighbouring bytes in one piece."""
    result = []
    for is_bytes, group in itertools.groupby(pieces, lambda piece: isinstance(piece, bytes)):
        result += [b"".join(group)] if is_bytes else group
    return result


def expand(helper):
    """The pieces that a {helper} stands for."""
    name, _, rest = helper.partition(":")
    if name == "repeat":
        unit, count = rest.rsplit(":", 1)
        pieces = pieces_of(unit)
        return [pieces[0] * int(count)] if len(pieces) == 1 else joined(pieces * int(count))
    if name == "fields":
        return [b"".join(b"X-Filler-%d: v\r\n" % n for n in range(int(rest)))]
    if name == "basic":
        return [base64.b64encode(b"user:" + KEY)]
    if name == "key":
        return [{"": KEY, "swapcase": KEY.swapcase(), "cut": KEY[:-1]}[rest]]
    raise ValueError(f"unknown helper {helper}")


def forwarded_of(lines):
    """Requests that the upstream must have seen, from the ^ lines."""
    requests = []
    for kind, text in lines:
        if kind == "line":
            requests.append(Forwarded(plain(text)))
            continue
        request = requests[-1]
        if text.startswith("tunnel "):
            request.tunnel = plain(text[7:].strip('"'))
        elif text.startswith('"'):
            request.body = plain(text[1:-1])
        elif text.startswith("-"):
            request.absent.append(text[1:])
        else:
            name, value = text.split(":", 1)
            request.fields.append((name, plain(value[1:])))
    return requests


def plain(text):
    return b"".join(pieces_of(text))


def read_expect(text):
    *words, end = text.split()
    if end not in ENDS:
        raise ValueError(f"expect ends in one of {', '.join(ENDS)}")
    expected, to_head = [], False
    for word in words:
        if word == "HEAD":
            to_head = True
            continue
        word, _, count = word.partition("*")
        statuses = frozenset(int(status) for status in word.rstrip("?").split("|"))
        expected += [Expected(statuses, to_head, word.endswith("?"))] * int(count or 1)
        to_head = False
    return expected, end


def read_upstream(text):
    if text == "cut":
        return (0, 0), True
    if text == "none":
        return (0, 0), False
    least, _, most = text.partition("-")
    return (int(least), int(most or least)), False
