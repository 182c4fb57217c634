#!/usr/bin/env python3
"""Goal: every numbered rule of the HTTP rules holds on the wire, however the bytes are cut.

    run.py [--tinyauth BIN] [--jobs N] [-v] [--tls] [PATTERN]

Each case of the *.cases files (format: cases.py) is run whole in one write, split at every byte, pipelined behind a good request,
without its key, and, where its first offending byte is marked, up to that byte only. PATTERN is a regular expression searched in
`NAME/WAY`: `r11` one rule, `/split` one way, `^(?!issue3)` all but a group. --tls: the same with every client over TLS, a piece a
record, but for what NOT_OVER_TLS names."""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cases import KEY, WAYS, CaseError, load_cases, plain
from lane import OWN_TARGETS, Exchange, Lane, seconds
from secure import self_signed
from wire import shown

HERE = Path(__file__).parent
SET_BY_US = ("X-Real-IP", "X-Forwarded-For", "X-Forwarded-Proto", "X-Request-Id")
NOT_OVER_TLS = {
    "r31-idle-tunnel": "a tunnel that was cut for standing still must not end with close_notify: tests/tls looks at that",
}
NEVER_FORWARDED = ("Authorization", "X-Api-Key", "Api-Key", "Keep-Alive", "TE", "HTTP2-Settings", "Forwarded", "X-Client-IP",
                   "True-Client-IP", "X-Cluster-Client-IP")


# What must hold for every request that reaches the upstream

def judge_forwarded(request, port):
    said = [f"{name} forwarded" for name in NEVER_FORWARDED if request.values(name)]
    said += [f"field {shown(name)} forwarded" for name, _ in request.fields if b"_" in name or name.lower().startswith(b"proxy-")]
    said += [f"{name} forwarded {len(request.values(name))} times" for name in SET_BY_US if len(request.values(name)) != 1]
    if request.values("Host") != [b"localhost:%d" % port]:
        said.append(f"Host forwarded as {request.values('Host')}")
    if request.values("X-Forwarded-For") != [b"127.0.0.1"] or request.values("X-Real-IP") != [b"127.0.0.1"]:
        said.append(f"address forwarded as {request.values('X-Forwarded-For')} and {request.values('X-Real-IP')}")
    if len(request.values("X-Forwarded-Host")) > 1:
        said.append("several X-Forwarded-Host")
    upgrade = request.values("Upgrade")
    if upgrade not in ([], [b"websocket"]) or request.values("Connection") != [b"upgrade" if upgrade else b"close"]:
        said.append(f"Upgrade {upgrade} beside Connection {request.values('Connection')}")
    if request.trailers:
        said.append(f"trailers forwarded: {request.trailers}")
    return said


def judge_upstream(exchange):
    said = []
    port = exchange.lane.listener.getsockname()[1]
    for up in exchange.upstreams:
        if up.malformed:
            said.append(f"forwarded malformed: {up.malformed}")
        elif up.rest() and not up.tunnel and not exchange.case.upstream_cut and exchange.case.end != "leave":
            said.append(f"forwarded besides whole requests: {shown(up.rest())}")
        if len(up.requests) > 1:
            said.append(f"{len(up.requests)} requests on one connection: {', '.join(shown(request.start) for request in up.requests)}")
        if KEY in up.data:
            said.append("the key was forwarded")
    for request, _ in exchange.requests:
        said += judge_forwarded(request, port)
    return said + judge_requests(exchange)


def judge_requests(exchange):
    """Counts and contents of the case's own requests."""
    case = exchange.case
    requests = [(request, up) for request, up in exchange.requests if request.target not in OWN_TARGETS]
    least, most = (0, 0) if exchange.way == "keyless" else case.upstream
    if not least <= len(requests) <= most:
        seen = ", ".join(shown(request.start) for request, _ in requests)
        return [f"upstream: expected {least}" + (f" to {most}" if most > least else "") + f" whole requests, got {len(requests)}: {seen}"]
    said = []
    for wanted, (request, up) in zip(case.forwarded, requests):
        said += judge_contents(wanted, request, up)
    return said


def judge_contents(wanted, request, up):
    said = []
    if request.start != wanted.line:
        said.append(f"forwarded: expected {shown(wanted.line)}, got {shown(request.start)}")
    for name, value in wanted.fields:
        if name == "X-Forwarded-Proto" and up.exchange.lane.secure:
            value = b"https"
        if request.values(name) != [value]:
            said.append(f"forwarded {name}: expected {shown(value)}, got {request.values(name)}")
    said += [f"forwarded {name}, which should be dropped" for name in wanted.absent if request.values(name)]
    if wanted.body is not None and request.body != wanted.body:
        said.append(f"forwarded body: expected {shown(wanted.body)}, got {shown(request.body)}")
    if wanted.tunnel is not None and up.rest() != wanted.tunnel:
        said.append(f"forwarded in the tunnel: expected {shown(wanted.tunnel)}, got {shown(up.rest())}")
    return said


# What must hold for every answer that reaches the client

def judge_answers(exchange):
    said = []
    relayed = {int(status) for answer in exchange.case.answers for piece in answer.pieces if isinstance(piece, bytes)
               for status in re.findall(rb"HTTP/1\.[01] ([0-9]{3})", piece)}
    for number, response in enumerate(exchange.finals()):
        if response.status != 101 and len(response.values("X-Request-Id")) != 1:
            said.append(f"{response.status} with {len(response.values('X-Request-Id'))} X-Request-Id")
        if response.status >= 400 and response.status not in relayed:
            closes = exchange.ended and number == len(exchange.finals()) - 1
            said += judge_error(response, closes)
    if KEY in exchange.got:
        said.append("the key was sent to the client")
    return said


def judge_error(response, closes):
    """An answer of tinyauth's own: JSON that SDKs can show, and the fields that its status asks for."""
    said = []
    if [v.split(b";")[0] for v in response.values("Content-Type")] != [b"application/json"]:
        said.append(f"{response.status} with Content-Type {response.values('Content-Type')}")
    if response.framing != "none":
        try:
            json.loads(response.body)["error"]
        except (ValueError, KeyError, TypeError):
            said.append(f"{response.status} without a JSON error: {shown(response.body)}")
    if response.status == 401 and not any(v.startswith(b"Bearer") for v in response.values("WWW-Authenticate")):
        said.append("401 without WWW-Authenticate: Bearer")
    if response.status in (429, 503) and not response.values("Retry-After"):
        said.append(f"{response.status} without Retry-After")
    if closes and b"close" not in response.tokens("Connection"):
        said.append(f"{response.status} closes without Connection: close")
    return said


def judge_statuses(exchange):
    """The statuses in order; an optional one may be missing."""
    got = [(r.status, r) for r in exchange.responses] + ([(exchange.partial.status, exchange.partial)] if exchange.partial else [])
    wanted = [(None, {200})] if exchange.way == "pipelined" else []
    wanted += [(e, e.statuses) for e in expected_of(exchange)]
    left = list(got)
    for expected, statuses in wanted:
        if left and left[0][0] in statuses:
            left.pop(0)
        elif not (expected and expected.optional):
            break
    else:
        if exchange.probed and left and left[0][0] == 200 and left[0][1].body == b"probe":
            left.pop(0)
        if not left or exchange.way == "keyless":
            return judge_good(exchange)
    names = " ".join(["good"] * (exchange.way == "pipelined") + [str(e) for e in expected_of(exchange)])
    return [f"expected {names or 'no answer'}, got {' '.join(str(status) for status, _ in got) or 'no answer'}"]


def expected_of(exchange):
    """What is expected in this way; without a key the first answer may be 401, and only that one is looked at."""
    case = exchange.case
    if exchange.way != "keyless":
        return case.expect
    first = next(e for e in case.expect if min(e.statuses) >= 200 or 101 in e.statuses)
    if case.get("keyless"):
        statuses = frozenset(int(s) for s in case.get("keyless").split("|"))
    else:
        refused = frozenset(s for s in first.statuses if s >= 400)
        statuses = refused | {401} if case.upstream != (0, 0) or case.upstream_cut or not refused else refused
    return [type(first)(statuses, first.to_head)]


def judge_good(exchange):
    if exchange.way == "pipelined" and exchange.responses[0].body != b"good":
        return [f"the good request was answered with {shown(exchange.responses[0].body)}"]
    return []


def judge_end(exchange):
    case, got_whole = exchange.case, exchange.partial is None and exchange.at == len(exchange.got)
    if exchange.way == "keyless":
        return []
    if exchange.timed_out:
        return ["no end: " + ("the connection was to be closed" if exchange.end in ("close", "cut") else "still waiting after "
                f"{exchange.took:.1f} s") + f", the client has {shown(exchange.got[exchange.at:])} besides whole answers"]
    if exchange.reset and exchange.end not in ("cut", "gone"):
        return ["the connection was reset"]
    if exchange.end == "open" and exchange.ended:
        return ["the connection was closed"]
    if exchange.end == "cut" and got_whole and not exchange.is_bad_gateway():
        return ["the answer is not visibly cut"]
    if exchange.end in ("open", "any", "close", "leave") and not got_whole and exchange.tunnel is None:
        return [f"the client got, besides whole answers, {shown(exchange.got[exchange.at:])}"]
    if case.get("time"):
        low, high = (seconds(text) for text in case.get("time").split())
        if not low <= exchange.took <= high:
            return [f"took {exchange.took * 1000:.0f} ms, not {case.get('time')}"]
    return []


def judge_last(exchange):
    """What the case says of its last answer and of the client's bytes."""
    case, said = exchange.case, []
    if exchange.way == "keyless":
        return said
    if case.get("never") and plain(case.get("never")) in exchange.got:
        said.append(f"the client saw {shown(plain(case.get('never')))}")
    if exchange.tunnel is not None and bytes(exchange.got[exchange.tunnel:]) != plain(case.get("tunnel")):
        said.append(f"tunnel: expected {shown(plain(case.get('tunnel')))}, got {shown(exchange.got[exchange.tunnel:])}")
    finals = exchange.finals() + ([exchange.partial] if exchange.partial else [])
    if exchange.probed and exchange.finals() and exchange.finals()[-1].body == b"probe":
        finals.pop()
    if not finals:
        return said
    last = finals[-1]
    if "body" in case.directives and last.body != plain(case.get("body")):
        said.append(f"body: expected {shown(plain(case.get('body')))}, got {shown(last.body)}")
    if case.get("framing") and last.framing != case.get("framing"):
        said.append(f"framing: expected {case.get('framing')}, got {last.framing}")
    return said + [said_of for text in case.fields for said_of in judge_field(last, text)]


def judge_field(response, text):
    if text.startswith("-"):
        return [f"field {text[1:]} is there"] if response.values(text[1:]) else []
    name, value = text.split(": ", 1)
    got = response.values(name)
    return [] if got == [plain(value)] else [f"field {name}: expected {value}, got {got}"]


def judge_log(exchange):
    words = exchange.case.get("log").split()
    if not words or exchange.way == "keyless" or exchange.lane.tinyauth.wait_log(words, exchange.log_from, 1.0):
        return []
    lines = [line for line in exchange.lane.tinyauth.lines[exchange.log_from:] if "status=" in line]
    return [f"log: expected {' '.join(words)}, got {lines[-1] if lines else 'no line'}"]


def judge(exchange):
    said = exchange.complaints + judge_statuses(exchange) + judge_end(exchange) + judge_answers(exchange) + judge_last(exchange)
    return list(dict.fromkeys(said + judge_upstream(exchange) + judge_log(exchange)))


# Running

def ways_of(case):
    if case.get("ways"):
        return case.get("ways").split()
    ways = ["whole", "split", "pipelined"]
    ways += ["at"] if "!" in case.pieces else []
    return ways + (["keyless"] if case.keyless_pieces is not None else [])


def run_one(args, keys, lane, case, way):
    """The complaints about one case in one way."""
    if not case.get("options") and not case.get("listener"):
        exchange = Exchange(lane, case, way)
        exchange.run()
        return judge(exchange)
    own = Lane(args.tinyauth, keys, case.get("options").split(), case.get("listener", "open"), args.secure)
    try:
        exchange = Exchange(own, case, way)
        exchange.run()
        said = judge(exchange)
    finally:
        unexpected = own.close()
    return said + [f"log: {line}" for line in unexpected]


def work(args, keys, jobs, taken, results):
    """One process: takes jobs until none is left, over one lane, and says None at its end."""
    lane = None
    try:
        while (number := take(taken)) < len(jobs):
            case, way = jobs[number]
            try:
                lane = lane or Lane(args.tinyauth, keys, secure=args.secure)
                said = run_one(args, keys, lane, case, way)
            except (OSError, RuntimeError) as error:    # it did not start, or broke: one failed case, not the end of the run
                said = [f"{type(error).__name__}: {error}"]
            results.put((f"{case.name}/{way}", said))
            if said and lane:           # a fresh one, so that a failure does not spread
                end_lane(lane, results)
                lane = None
    except Exception:
        results.put(("harness", [traceback.format_exc()]))
    finally:
        if lane:
            end_lane(lane, results)
        results.put(None)


def take(taken):
    with taken.get_lock():
        taken.value += 1
        return taken.value - 1


def end_lane(lane, results):
    unexpected = lane.close()
    if unexpected:
        results.put(("log", [f"unexpected: {line}" for line in unexpected[:5]]))


def run_all(args, jobs, keys):
    """Runs the jobs in several processes, as one could not send bytes fast enough; returns how many passed and failed."""
    context = multiprocessing.get_context("fork")
    taken, results = context.Value("i", 0), context.SimpleQueue()
    processes = [context.Process(target=work, args=(args, keys, jobs, taken, results)) for _ in range(args.jobs)]
    for process in processes:
        process.start()
    passed, failed, running = 0, 0, len(processes)
    while running:
        result = results.get()
        if result is None:
            running -= 1
            continue
        name, said = result
        passed, failed = passed + (not said), failed + bool(said)
        if said:
            print(f"FAIL {name}: " + "; ".join(said), flush=True)
        elif args.verbose:
            print(f"ok   {name}", flush=True)
    for process in processes:
        process.join()
    return passed, failed


def choose_jobs(cases, pattern):
    """What to run: first what has to wait for time-outs."""
    jobs = [(case, way) for case in cases for way in ways_of(case) if re.search(pattern, f"{case.name}/{way}")]
    unknown = {way for _, way in jobs} - set(WAYS)
    if unknown:
        raise CaseError(f"unknown ways {unknown}")
    return sorted(jobs, key=lambda job: not job[0].get("options"))


def leave_out(jobs):
    """What can be told over TLS; the rest is named."""
    for name in sorted({case.name for case, _ in jobs} & set(NOT_OVER_TLS)):
        print(f"skipped {name}: {NOT_OVER_TLS[name]}", flush=True)
    return [(case, way) for case, way in jobs if case.name not in NOT_OVER_TLS]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tinyauth", default=str(HERE.parent.parent / "tinyauth"), metavar="BIN")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("pattern", nargs="?", default="")
    args = parser.parse_args()
    try:
        jobs = choose_jobs(load_cases(HERE), args.pattern)
    except CaseError as error:
        sys.exit(f"run.py: {error}")
    with tempfile.TemporaryDirectory(prefix="tinyauth-http-") as folder:
        keys = os.path.join(folder, "keys")
        with open(os.open(keys, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
            file.write(f"one {KEY.decode()}\n")
        args.secure = self_signed(folder) if args.tls else None
        if args.tls:
            jobs = leave_out(jobs)
        passed, failed = run_all(args, jobs, keys)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
