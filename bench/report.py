"""Figures, and how they are told: one table, RESULTS.md, results.tsv and the chart drawn from it."""

import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import machine
from proxies import TITLES

COLUMNS = ("tinyauth", "nginx", "plain", "haproxy", "caddy", "relay", "epoll")
OTHERS = COLUMNS[1:]
RELAYS = ("relay", "epoll")
NONE = "-"


@dataclass(frozen=True)
class Row:
    id: str
    work: str
    unit: str
    less: bool = True               # less is better
    charted: bool = False
    difference: bool = False
    own: bool = False               # measured against the same proxy


ROWS = [
    Row("chat64_cpu", "chat completions, 64 connections", "us CPU a request", charted=True),
    Row("chat64_rate", "chat completions, 64 connections", "requests/s", less=False),
    Row("chat1_cpu", "chat completions, 1 connection", "us CPU a request", charted=True),
    Row("chat1_rate", "chat completions, 1 connection", "requests/s", less=False),
    Row("chat512_cpu", "chat completions, 512 connections", "us CPU a request", charted=True),
    Row("chat512_rate", "chat completions, 512 connections", "requests/s", less=False),
    Row("new_cpu", "chat completions, a new connection each", "us CPU a request", charted=True),
    Row("new_rate", "chat completions, a new connection each", "requests/s", less=False),
    Row("get64_cpu", "short GETs, 64 connections", "us CPU a request", charted=True),
    Row("get64_rate", "short GETs, 64 connections", "requests/s", less=False),
    Row("wrk64_cpu", "short GETs, 64 connections of wrk", "us CPU a request"),
    Row("wrk64_rate", "short GETs, 64 connections of wrk", "requests/s", less=False),
    Row("idle_cpu", "64 beside 9,000 idle", "us CPU a request", charted=True),
    Row("idle_own", "64 beside 9,000 idle", "x of without", own=True),
    Row("stream200_cpu", "200 streams, 50 events/s", "us CPU an event", charted=True),
    Row("stream200_p50", "200 streams, added delay p50", "us", difference=True, charted=True),
    Row("stream200_p99", "200 streams, added delay p99", "us", difference=True, charted=True),
    Row("stream1000_cpu", "1,000 streams, 50 events/s", "us CPU an event", charted=True),
    Row("stream1000_p50", "1,000 streams, added delay p50", "us", difference=True),
    Row("stream1000_p99", "1,000 streams, added delay p99", "us", difference=True),
    Row("down_cpu", "100 MB down", "us CPU a MB", charted=True),
    Row("down_rate", "100 MB down", "MB/s", less=False),
    Row("up_cpu", "100 MB up", "us CPU a MB", charted=True),
    Row("up_rate", "100 MB up", "MB/s", less=False),
    Row("refused_cpu", "401s, 64 connections", "us CPU a request", charted=True),
    Row("refused_rate", "401s, 64 connections", "requests/s", less=False),
    Row("keys1_cpu", "1 key", "us CPU a request"),
    Row("keys1000_own", "1,000 keys", "x of 1 key", own=True),
    Row("keys100000_own", "100,000 keys", "x of 1 key", own=True),
    Row("keys100000_start", "start with 100,000 keys", "ms"),
    Row("tls64_cpu", "chat completions, TLS 1.2, 64 conns", "us CPU a request", charted=True),
    Row("tls64_rate", "chat completions, TLS 1.2, 64 conns", "requests/s", less=False),
    Row("tls13_cpu", "the same, plain by TLS 1.3", "us CPU a request"),
    Row("tlsdown_cpu", "TLS 100 MB down", "us CPU a MB", charted=True),
    Row("tlsdown_rate", "TLS 100 MB down", "MB/s", less=False),
    Row("tlsstream200_cpu", "TLS 200 streams", "us CPU an event", charted=True),
    Row("tlsstream200_p50", "TLS 200 streams, added delay p50", "us", difference=True),
    Row("tlsstream200_p99", "TLS 200 streams, added delay p99", "us", difference=True),
    Row("full_cpu", "TLS handshakes, full", "us CPU each", charted=True),
    Row("full_rate", "TLS handshakes, full", "per second", less=False),
    Row("resumed_cpu", "TLS handshakes, resumed", "us CPU each", charted=True),
    Row("resumed_rate", "TLS handshakes, resumed", "per second", less=False),
    Row("idle_memory", "memory an idle connection", "KB"),
    Row("stream_memory", "memory a stream", "KB"),
    Row("tlsidle_memory", "memory an idle TLS connection", "KB"),
    Row("tlsstream_memory", "memory a TLS stream", "KB"),
    Row("rest_memory", "whole service at rest", "KB anonymous", charted=True),
    Row("binary_size", "binary, stripped", "KB"),
    Row("image_size", "binary and its libraries", "KB", charted=True),
    Row("start", "exec to first answer", "ms", charted=True),
    Row("start1000", "exec to first answer, 1,000 keys", "ms", own=True),
    Row("tlsstart1000", "the same with TLS", "ms", own=True),
    Row("inetd1000", "-i, exec to first byte, 1,000 keys", "ms", own=True),
    Row("reload_failed", "failed requests, 64 conns, 8 HUPs", "requests", own=True),
]
ROW = {row.id: row for row in ROWS}


@dataclass(frozen=True)
class Goal:
    work: str
    row: str
    other: str                      # the proxy that it is measured against; "" is tinyauth's figure itself
    least: bool                     # at least, else at most
    limit: float
    inverse: bool = False           # of work per CPU time, where the row has CPU time per work

    def text(self):
        name = {"": "", "relay": "the bare relay"}.get(self.other, TITLES.get(self.other, ""))
        return f"{'>=' if self.least else '<='} {self.limit:g}{' of ' + name if name else ''}"

    def measured(self, figures, name="tinyauth"):
        """What is told, and whether it reaches the goal; (None, None) when it was not measured."""
        other = self.leaner(figures) if self.other == "relay" else self.other
        ours, theirs = figures.median(self.row, name), figures.median(self.row, other)
        if ours is None or (other and theirs is None):
            return None, None
        if ROW[self.row].difference and other:
            return f"{shown(ours)} to {shown(theirs)} us", ours <= theirs * self.limit
        value = figures.ratio(self.row, other, name) if other else ours
        value = 1 / value if self.inverse else value
        return f"{value:.2f}", value >= self.limit if self.least else value <= self.limit

    def leaner(self, figures):
        """That of the bare relays which is harder to reach."""
        there = [name for name in RELAYS if figures.median(self.row, name)]
        return (max if self.least else min)(there, key=lambda name: figures.median(self.row, name), default="relay")

    def floor(self, figures):
        """The same of the bare relay, or of that with epoll where it spends less."""
        if self.other in ("", "relay") or ROW[self.row].difference:
            return None, None
        found = [told for told in (self.measured(figures, name) for name in RELAYS) if told[0]]
        return (max if self.least else min)(found, key=lambda told: float(told[0]), default=(None, None))


GOALS = [
    Goal("CPU a chat completion, 64 connections", "chat64_cpu", "relay", False, 1.10),
    Goal("CPU a chat completion, 64 connections", "chat64_cpu", "plain", False, 0.85),
    Goal("CPU a short GET, 64 connections", "get64_cpu", "relay", False, 1.10),
    Goal("CPU a short GET, 64 connections", "get64_cpu", "plain", False, 0.85),
    Goal("CPU a chat completion, a new connection each", "new_cpu", "relay", False, 1.10),
    Goal("CPU a chat completion, a new connection each", "new_cpu", "plain", False, 0.75),
    Goal("chat completions a second, 64 connections", "chat64_rate", "relay", True, 0.9),
    Goal("chat completions a second, 64 connections", "chat64_rate", "plain", True, 1.15),
    Goal("9,000 idle connections beside it, x of without", "idle_own", "", False, 1.1),
    Goal("CPU a streamed event, 200 streams", "stream200_cpu", "nginx", False, 0.85),
    Goal("CPU a streamed event, 1,000 streams", "stream1000_cpu", "nginx", False, 0.85),
    Goal("added delay p50, 200 streams", "stream200_p50", "nginx", False, 1),
    Goal("added delay p99, 200 streams", "stream200_p99", "nginx", False, 1),
    Goal("added delay p50, 1,000 streams", "stream1000_p50", "nginx", False, 1),
    Goal("added delay p99, 1,000 streams", "stream1000_p99", "nginx", False, 1),
    Goal("100,000 keys, CPU x of 1 key", "keys100000_own", "", False, 1.02),
    Goal("CPU a 401", "refused_cpu", "nginx", False, 0.8),
    Goal("bytes/s, 100 MB down", "down_rate", "nginx", True, 1),
    Goal("bytes/s, 100 MB up", "up_rate", "nginx", True, 1),
    Goal("bytes a CPU second, 100 MB down", "down_cpu", "nginx", True, 1, inverse=True),
    Goal("bytes a CPU second, 100 MB up", "up_cpu", "nginx", True, 1, inverse=True),
    Goal("KB an idle kept-alive connection", "idle_memory", "", False, 0.5),
    Goal("KB a stream", "stream_memory", "", False, 8),
    Goal("anonymous memory at rest", "rest_memory", "nginx", False, 0.1),
    Goal("KB of the stripped binary", "binary_size", "", False, 256),
    Goal("ms from exec to the first answer, 1,000 keys", "start1000", "", False, 5),
    Goal("ms from exec to the first answer, 1,000 keys, TLS", "tlsstart1000", "", False, 10),
    Goal("ms of -i from exec to the first byte, 1,000 keys", "inetd1000", "", False, 3),
    Goal("TLS chat completions a CPU second, 64 conns", "tls64_cpu", "plain", True, 0.9, inverse=True),
    Goal("TLS bytes a CPU second, 100 MB down", "tlsdown_cpu", "nginx", True, 0.8, inverse=True),
    Goal("resumed TLS handshakes a CPU second", "resumed_cpu", "nginx", True, 0.5, inverse=True),
    Goal("us of added delay p50, TLS 200 streams", "tlsstream200_p50", "", False, 1000),
    Goal("KB an idle TLS connection", "tlsidle_memory", "", False, 32),
]


class Figures:
    """Each row's figures: proxy by proxy, round by round."""

    def __init__(self):
        self.all = {row.id: {} for row in ROWS}
        self.notes = []

    def add(self, row, proxy, round_number, value):
        if value is not None:
            self.all[row].setdefault(proxy, {})[round_number] = value

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            machine.say(f"  {text}")

    def median(self, row, proxy):
        rounds = self.all[row].get(proxy)
        return statistics.median(rounds.values()) if rounds else None

    def ratio(self, row, other, name="tinyauth"):
        """tinyauth's figure by the other's of the same round; the median over the rounds. What is a difference itself, and may
        come out below nothing in one round, is compared by its medians."""
        if ROW[row].difference:
            mine, other = self.median(row, name), self.median(row, other)
            return mine / other if mine and other and mine > 0 and other > 0 else None
        ours, theirs = self.all[row].get(name, {}), self.all[row].get(other, {})
        ratios = [ours[n] / theirs[n] for n in ours if theirs.get(n)]
        return statistics.median(ratios) if ratios else None

    def rounds(self, row):
        return max((len(rounds) for rounds in self.all[row].values()), default=0)

    def rows(self):
        return [row for row in ROWS if self.all[row.id]]


def shown(value):
    if value is None:
        return NONE
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def ratio_cell(figures, row, name):
    """A figure that is a ratio itself has none."""
    return NONE if row.own else shown(figures.ratio(row.id, name))


def table_cells(figures):
    """Head and rows, ratios first."""
    head = ["work", "unit", *(f"/{name}" for name in OTHERS), *COLUMNS]
    rows = [[row.work, row.unit + ("" if row.less else " *"), *(ratio_cell(figures, row, name) for name in OTHERS),
             *(shown(figures.median(row.id, name)) for name in COLUMNS)] for row in figures.rows()]
    return head, rows


def goal_cells(figures):
    rows = []
    for goal in GOALS:
        (told, reached), (floor, possible) = goal.measured(figures), goal.floor(figures)
        verdict = "not measured" if told is None else "yes" if reached else "**no**" if possible is not False else \
            "**no**, nor by the relay"
        rows.append([goal.work, goal.text(), told or NONE, floor or NONE, verdict])
    return ["work", "goal", "measured", "bare relay", "reached"], rows


def aligned(head, rows):
    """Text left, numbers right."""
    widths = [max(len(cells[i]) for cells in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(cells, widths))).rstrip() for cells in [head, *rows])


def markdown(head, rows, text_columns):
    rule = ["---" if i < text_columns else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


LEGEND = ("`/NAME` is tinyauth's figure by NAME's, the median of the rounds' ratios; then the figures themselves, medians. "
          "Less is better, but where the unit has a `*`.")

METHOD = """\
Each proxy has one worker or thread and does the same job: two keys, an address limit that is looked at and never reached, an
access log in a file (caddy has no such limit of its own and does without). All stand in front of the same upstream,
`upstream.c`; `load.c` is the client, in one thread. A chat completion is a POST of 1 KB that is answered with half a KB, on
connections that the clients keep, unless the row says otherwise.

tinyauth connects upstream for each request: what a model server makes of one request's body can then never reach the next one.
So does `nginx plain`, which is `proxy_pass` as most people have it, and so do the bare relays, `relay.c`, which copy bytes and
do nothing else: one waits with poll, one with epoll, and a goal is measured against the one that spends less. `nginx tuned`,
haproxy and caddy share kept upstream connections between their clients: they save a connect for each request, and would carry
what one client hid in a body to another. They are in the table to show what that saves.

CPU time is the kernel's account, in nanoseconds, of all of a proxy's processes. The proxies take turns within each round. With two
processors the client and the upstream share the one that is not the proxy's, and may fill it before the proxy fills its own: then
requests a second tell more of them than of the proxy. A goal that the bare relay does not reach either is marked so. Delay is
from the upstream's write to the client's read, less the same without a proxy. Memory is anonymous and touched shared memory (Pss_Anon
and Pss_Shmem, what processes share counted once); the kernel's socket buffers are not in it. Start-up is from exec, by a client
that has started the same once before. All TLS figures are TLS 1.2, ECDHE-ECDSA-AES128-GCM-SHA256, P-256, but for the row that says
otherwise; a handshake is a connection that is opened, agreed and closed."""


def write_markdown(path, figures, facts, wrote_chart):
    head, rows = table_cells(figures)
    parts = ["# tinyauth beside nginx, haproxy and caddy", "Written by `make bench`.",
             markdown(*goal_cells(figures), 2), "## All figures", LEGEND, markdown(head, rows, 2)]
    if wrote_chart:
        parts.append("![each proxy's cost by tinyauth's](results.svg)")
    if figures.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in figures.notes)]
    parts += ["## How", METHOD, "## Where", "\n".join(f"- {name}: {text}" for name, text in facts)]
    path.write_text("\n\n".join(parts) + "\n")


def tsv_line(figures, row, place):
    values = [figures.median(row.id, name) for name in COLUMNS] + [figures.ratio(row.id, name) for name in OTHERS]
    values.append(max((ratio for ratio in (figures.ratio(row.id, name) for name in RELAYS) if ratio), default=None))
    return "\t".join([row.id, str(place), row.work, row.unit, "less" if row.less else "more", str(figures.rounds(row.id)),
                      *(NONE if value is None else f"{value:.4g}" for value in values)])


def write_tsv(path, figures):
    """What the chart is drawn from: first the rows that are in it, with their places from the bottom; behind two empty lines,
    which part blocks for gnuplot, all others. `-` is no figure. Returns how many places there are."""
    charted = [row for row in figures.rows() if row.charted and any(figures.ratio(row.id, name) for name in OTHERS)]
    others = [row for row in figures.rows() if row not in charted]
    head = ["id", "place", "work", "unit", "better", "rounds", *COLUMNS, *(f"tinyauth/{name}" for name in OTHERS), "tinyauth/floor"]
    lines = ["\t".join(head), *(tsv_line(figures, row, len(charted) - i) for i, row in enumerate(charted)), "", "",
             *(tsv_line(figures, row, NONE) for row in others)]
    path.write_text("\n".join(lines) + "\n")
    return len(charted)


def draw(processes, tsv, svg, places):
    """The chart, by gnuplot. False when there is none."""
    gnuplot = machine.find("gnuplot")
    if not gnuplot or places == 0:
        return False
    script = Path(__file__).resolve().parent / "chart.gp"
    status, _, said = processes.run([gnuplot, "-e", f"tsv='{tsv}'; svg='{svg}'; places={places}", script], 60,
                                    stdin=subprocess.DEVNULL)
    if status != 0:
        machine.say(f"no chart: {said.strip()}")
    return status == 0


def tell(processes, figures, facts, directory):
    """The table on the terminal, and the three files."""
    head, rows = table_cells(figures)
    machine.say("\n" + aligned(head, rows))
    machine.say(LEGEND.replace("`", ""))
    tsv, svg = directory / "results.tsv", directory / "results.svg"
    wrote_chart = draw(processes, tsv, svg, write_tsv(tsv, figures))
    write_markdown(directory / "RESULTS.md", figures, facts, wrote_chart)
    for work, goal, measured, floor, reached in goal_cells(figures)[1]:
        if "no**" in reached:
            machine.say(f"goal not reached: {work}: {goal}, measured {measured}; the bare relay: {floor}")
    machine.say(f"wrote {directory / 'RESULTS.md'}, results.tsv{', results.svg' if wrote_chart else ''}")
