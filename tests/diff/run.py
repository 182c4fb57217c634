#!/usr/bin/env python3
"""What tinyauth sends on must mean the same to every parser, and to the one who sent it. Called by run.sh."""

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "http"))

import grammar
import judges
import refusals
import traffic
import wire
from program import Tinyauth

BATCH = 500
REPORTED = 4            # failures of a kind that are told in full
CLIENT_FIELDS = ("Authorization", "X-Api-Key", "Api-Key", "Keep-Alive", "Proxy-Connection", "TE", "HTTP2-Settings", "Forwarded", "X-Client-IP",
                 "True-Client-IP", "X-Cluster-Client-IP")


class Score:
    def __init__(self, again):
        self.again = again          # the command that repeats one of them
        self.passed = 0
        self.kinds = Counter()

    def count(self, what, troubles, raw):
        if not troubles:
            self.passed += 1
            return
        kind = re.sub(r"[:=\[].*", "", troubles[0])
        if self.kinds[kind] < REPORTED:
            print(f"FAILED  {what} (again: {self.again} {what})")
            for trouble in troubles:
                print(f"        {trouble}")
            for name, data in raw:
                print(f"        {name}: {wire.shown(data, 1500)}")
        self.kinds[kind] += 1

    def check(self, name, good, found, quiet=False):
        """`quiet`: not told when it is good."""
        if not (good and quiet):
            print(f"{'ok     ' if good else 'FAILED '} {name}: {found}", flush=True)
        self.passed += good
        self.kinds[name] += not good

    def close(self):
        failed = sum(self.kinds.values())
        for kind, count in self.kinds.most_common():
            if count:
                print(f"{count:6} x {kind}")
        print(f"{self.passed} passed, {failed} failed")
        return 1 if failed or not self.passed else 0


async def at_once(most, jobs):
    """Run so many coroutines at a time; the results are in order."""
    gate = asyncio.Semaphore(most)

    async def one(job):
        async with gate:
            return await job
    return await asyncio.gather(*(one(job) for job in jobs))


async def read_all(all_judges, frames):
    return list(zip(*await asyncio.gather(*(judge.read(frames) for judge in all_judges))))


# Requests

def meaning(message):
    method = message.start.split(b" ")[0]
    return method, message.target, b" ".join(message.values("Host")), message.body


def house_rules(connection, host, stream):
    """What DESIGN and the parsing rules promise of each forwarded head, beside its framing."""
    for message in connection.requests:
        names = [name.lower() for name, _ in message.fields]
        kept = [name for name in CLIENT_FIELDS if message.values(name)]
        if kept:
            yield f"a field of the client went upstream: {', '.join(kept)}"
        wanted = b"upgrade" if message.values("Upgrade") else b"close"
        if message.values("Connection") != [wanted]:
            yield f"Connection went upstream as {message.values('Connection')}"
        if any(b"_" in name for name in names):
            yield "a field with _ in its name went upstream"
        for name, value in (("Host", host), ("X-Real-IP", traffic.address_of(stream.index)), ("X-Forwarded-For", traffic.address_of(stream.index)),
                            ("X-Forwarded-Proto", "http")):
            if message.values(name) != [value.encode()]:
                yield f"{name} went upstream as {message.values(name)}"
        if len(message.values("X-Request-Id")) != 1 or len(message.values("X-Forwarded-Host")) > 1:
            yield "not one X-Request-Id, or two X-Forwarded-Host"


def sent_on(message):
    lines = [message.start] + [b": ".join(field) for field in message.fields]
    return judges.Sent(*meaning(message), [name for name, _ in message.fields], max(len(line) + 2 for line in lines))


def agreement(connection, lines, all_judges):
    sent = [sent_on(message) for message in connection.requests]
    partial = sent_on(connection.partial) if connection.partial else None
    for judge, line in zip(all_judges, lines):
        trouble = judges.disagreement(judge.name, line, sent, partial, connection.rest)
        if trouble:
            yield trouble


def origin_form(target):
    match = re.fullmatch(rb"[hH][tT][tT][pP][sS]?://[^/?]*(/?)(.*)", target)
    return b"/" + match[2] if match else target


def same_as_sent(stream, forwarded, client_line):
    """The forwarded requests are those that the client sent: all, when untouched; else some, as a strict reader finds them."""
    seen = [(method, target, body) for method, target, _, body in forwarded]
    if stream.expected is not None:
        if seen != stream.expected:
            yield f"forwarded is not what was sent: {judges.readable(seen, [])} for {judges.readable(stream.expected, [])}"
        return
    requests, _ = judges.parse_line(client_line)
    written = [(method, origin_form(target), body) for method, target, _, body in requests]
    if not judges.is_subsequence(seen, written):
        yield f"forwarded what the client did not send: {judges.readable(seen, [])} of {judges.readable(written, [])}"


def request_troubles(stream, connections, lines, client_line, host, all_judges):
    troubles = [connection.trouble for connection in connections if connection.trouble]
    for connection, judged in zip(connections, lines):
        troubles += agreement(connection, judged, all_judges)
        troubles += house_rules(connection, host, stream)
    troubles += same_as_sent(stream, [meaning(m) for c in connections for m in c.requests], client_line)
    return troubles


async def judge_batch(answered, connections, host, all_judges, client_judge, score):
    used = [connection for connection in connections if connection.data]
    lines, client_lines = await asyncio.gather(
        read_all(all_judges, [bytes(connection.data) for connection in used]), client_judge.read([stream.raw for stream, _ in answered]))
    by_client = {}
    for connection, judged in zip(used, lines):
        by_client.setdefault(connection.client, []).append((connection, judged))
    by_client[None] = [one for one in by_client.get(None, []) if one[0].requests or one[0].trouble]    # else cut off inside its first head
    for (stream, answer), client_line in zip(answered, client_lines):
        mine = by_client.pop(traffic.address_of(stream.index), [])
        held, judged = [one for one, _ in mine], [line for _, line in mine]
        troubles = request_troubles(stream, held, judged, client_line, host, all_judges)
        score.count(f"--only {stream.index}", troubles, [("client", stream.raw), *(("upstream", c.data) for c in held), ("answer", answer)])
    for client, mine in by_client.items():
        if mine:
            score.count(f"client {client}", ["a connection of nobody"], [("upstream", connection.data) for connection, _ in mine])


async def request_test(options, folder, indices, score):
    upstream = traffic.Upstream()
    upstream_port = await upstream.listen()
    tinyauth = Tinyauth(options.tinyauth, folder, upstream_port)
    port = await tinyauth.start()
    all_judges = [await judge.start() for judge in judges.request_judges(sys.executable, options.build)]
    client_judge = await judges.client_judge(sys.executable).start()
    judging, forwarded, left_open = [], 0, 0
    try:
        for start in range(0, len(indices), BATCH):
            streams = [grammar.request_stream(options.seed, index) for index in indices[start:start + BATCH]]
            answers = await at_once(traffic.AT_ONCE, [traffic.send_stream(stream, port, upstream) for stream in streams])
            connections, open_still = await upstream.take()
            left_open += open_still
            forwarded += sum(len(connection.requests) for connection in connections)
            if judging:
                await judging.pop()
            judging.append(asyncio.ensure_future(
                judge_batch(list(zip(streams, answers)), connections, f"localhost:{upstream_port}", all_judges, client_judge, score)))
        await judging.pop()
        if len(indices) >= BATCH:
            await check_mutations(options.seed, indices[:2 * BATCH], all_judges, score)
    finally:
        await tinyauth.stop()
        for judge in [*all_judges, client_judge]:
            await judge.stop()
    score.check("upstream connections end with their clients", left_open == 0, f"{left_open} stayed open")
    score.check("every request stream left tinyauth healthy", not tinyauth.deaths(), tinyauth.deaths()[:3] or "no worker died")
    print(f"        {len(indices)} streams, {forwarded} requests forwarded")


async def check_mutations(seed, indices, all_judges, score):
    """The mutations are worth sending: read straight from the client, they divide the judges."""
    lines = await read_all(all_judges, [grammar.request_stream(seed, index).raw for index in indices])
    divided = sum(len({tuple(judges.parse_line(line)[0]) for line in readings}) > 1 for readings in lines)
    score.check("judges are divided over what clients sent", divided > len(indices) / 20, f"{divided} of {len(indices)} streams")


# Responses

def outcomes_of(lines):
    """{reader: outcomes} from the lines of the response judges."""
    return {name: outcomes.split(",") for line in lines for name, _, outcomes in (word.partition("=") for word in line.split(" "))}


def is_whole(outcome):
    return outcome != "none" and not outcome.endswith(":cut")


def response_troubles(got, lines):
    script, outcomes = got.script, outcomes_of(lines)
    if got.trouble:
        yield got.trouble
    first, *rest = outcomes["h11"]
    for name, others in outcomes.items():
        if others != outcomes["h11"]:
            yield f"{name} reads {others} and h11 {outcomes['h11']}"
    if script.kind == "valid" and first != script.expected:
        yield f"a good answer came as {first[:200]}, not {script.expected[:200]}"
    if script.kind == "cut" and is_whole(first) and not first.startswith("502:"):
        yield f"an answer that was cut came whole: {first[:200]}"
    good = f"200:{traffic.second_body(script.index).hex()}"
    second = rest[0] if rest else "none"
    if is_whole(second) and second != good and not second.startswith("502:"):
        yield f"the second request got another answer: {second[:200]}"
    if script.kind == "valid" and script.version == "1.1" and second != good:
        yield f"the second request after a good answer got {second[:200]}"


async def response_test(options, folder, indices, score):
    scripts = {index: grammar.response_script(options.seed, index) for index in indices}
    server, upstream_port = await traffic.listen_hostile(scripts)
    tinyauth = Tinyauth(options.tinyauth, folder, upstream_port)
    port = await tinyauth.start()
    all_judges = [await judge.start() for judge in judges.response_judges(sys.executable)]
    try:
        for start in range(0, len(indices), BATCH):
            runs = [traffic.Exchanges(scripts[index]).run(port, grammar.KEY) for index in indices[start:start + BATCH]]
            got = await at_once(traffic.AT_ONCE, runs)
            lines = await read_all(all_judges, [judges.exchange_frame(one.segments()) for one in got])
            for one, judged in zip(got, lines):
                score.count(f"--only-response {one.script.index}", list(response_troubles(one, judged)),
                            [(f"upstream ({one.script.kind}, {one.script.end})", one.script.raw), ("client", one.data)])
    finally:
        await tinyauth.stop()
        for judge in all_judges:
            await judge.stop()
        server.close()
    score.check("every response left tinyauth healthy", not tinyauth.deaths(), tinyauth.deaths()[:3] or "no worker died")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tinyauth", required=True)
    parser.add_argument("--build", required=True, type=Path)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--responses", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--refusals", type=int, default=1000, help="runs of each kind in front of each server")
    parser.add_argument("--only-server", help="no more than refusals in front of the servers with this in their name")
    parser.add_argument("--only", type=int, metavar="INDEX")
    parser.add_argument("--only-response", type=int, metavar="INDEX")
    return parser.parse_args()


async def main():
    options = arguments()
    requests, responses = range(options.requests), range(options.requests // 4 if options.responses is None else options.responses)
    if options.only is not None or options.only_response is not None or options.only_server:
        requests, responses = [], []
        options.refusals = options.refusals if options.only_server else 0
        requests = [options.only] if options.only is not None else requests
        responses = [options.only_response] if options.only_response is not None else responses
    score = Score(f"SEED={options.seed} {os.path.relpath(Path(__file__).parent)}/run.sh")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tinyauth-diff-") as folder:
        if requests:
            await request_test(options, Path(folder), requests, score)
        if responses:
            await response_test(options, Path(folder), responses, score)
        if options.refusals:
            await refusals.refusal_test(options, Path(folder), sys.executable, score)
    print(f"        {time.monotonic() - started:.0f} s")
    return score.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
