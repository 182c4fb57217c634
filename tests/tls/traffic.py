"""Goal: what passes over TLS is what passes without, at once, exact, and within its memory."""

import hashlib
import json
import re
import signal
import statistics
import threading
import time

import e2e
from e2e import (ALICE, BAD_REQUESTS, BOB, CAROL, KEYS, UPGRADE, WRONG, Client, alone, measured, memory_stays, request, stands_still,
                 values)
from lab import anonymous, authority, connect, mappings, same, serve, serve_and_model, until
from model import pattern, pieces
from secure import DATA

# The same answers


def raw_answers(client, data):
    """Every byte that answers to these, until the end."""
    client.send(data)
    while True:
        try:
            client.fill()
        except e2e.Cut as cut:
            return bytes(client.buffer) + f" [{cut}]".encode()


def without_ids(answer):
    return re.sub(rb"(?i)(x-request-id: )[^\r\n]*|(retry-after-ms: )\d+|(\"t_ns\": )\d+|(\"X-Request-Id\", \")[^\"]*", rb"\1\2\3\4", answer)


LAST = "Connection: close"
SAME = {
    "health": request("GET", "/health", LAST, key=None),
    "HEAD of health": request("HEAD", "/health", LAST, key=None),
    "no key": request("GET", "/v1/models", LAST, key=None),
    "no key, Ollama": request("GET", "/api/tags", LAST, key=None),
    "no key, Anthropic": request("POST", "/v1/messages", LAST, key=None, body=b"{}"),
    "wrong key": request("GET", "/", LAST, key=WRONG),
    "disabled key": request("GET", "/", LAST, key=CAROL),
    "HEAD without a key": request("HEAD", "/", LAST, key=None),
    "a body behind a refused head": request("POST", "/", key=None, body=bytes(50000)),
    "no such route": request("GET", "/nothing", LAST),
    "an answer": request("GET", "/api/version", LAST),
    "an early answer": request("POST", "/t/early", "Content-Length: 500000") + bytes(1000),
    "not HTTP from upstream": request("GET", "/t/garbage", LAST),
    "an upstream that dies": request("POST", "/t/die", LAST, body=b"x"),
    "a close-delimited answer": request("GET", "/t/close/1000", LAST),
    "the same for HTTP/1.0": request("GET", "/t/close/1000", version="1.0"),
    "interim answers": request("GET", "/t/100", LAST),
    "a bad chunk": request("POST", "/t/sink", "Transfer-Encoding: chunked") + b"zz\r\n",
    "Expect without a key": request("POST", "/", "Expect: 100-continue", "Content-Length: 5", key=None),
    **{what: raw for what, (_, raw) in BAD_REQUESTS.items()},
}


def test_answers_are_the_same(lab):
    """Every kind of answer and refusal has the same status, head, body and end as without TLS, byte for byte."""
    secure, plain = serve(lab), lab.tinyauth()
    different = []
    for what, raw in SAME.items():
        with_tls, without = (without_ids(raw_answers(client, raw)) for client in (connect(secure), Client(plain.address, silent=True)))
        if with_tls != without:
            different.append(f"{what}: {with_tls[-300:]} instead of {without[-300:]}")
        assert without.startswith(b"HTTP/1.1 "), f"{what}: {without}"
    same(different, [], "answers that differ")


def test_limits_are_the_same(lab):
    """429 by rate, 502 and 504 are the same with TLS and without."""
    port = lab.held_port().getsockname()[1]
    for upstream, raw, options in ((None, [request("GET", "/api/version", LAST)] * 2, ("--ip-burst", "0")),
                                   (f"127.0.0.1:{port}", [request("GET", "/", LAST)], ()),
                                   (None, [request("POST", "/t/silent", LAST, body=b"x")], ("--first-byte-timeout", "200ms"))):
        rate = "1/m" if options[:1] == ("--ip-burst",) else "off"
        servers = (serve(lab, *options, upstream=upstream, ip_rate=rate), lab.tinyauth(*options, upstream=upstream, ip_rate=rate))
        for data in raw:
            with_tls, without = (without_ids(raw_answers(client, data)) for client in
                                 (connect(servers[0]), Client(servers[1].address, silent=True)))
            same(with_tls, without.replace(b'"http"', b'"https"'), f"answer to {data[:20]} with {options}")


def test_the_model_is_told(lab):
    """X-Forwarded-Proto is https; a client cannot say otherwise."""
    tinyauth = serve(lab)
    for fields in ((), ("X-Forwarded-Proto: http", "X-Forwarded-Ssl: off", "Forwarded: proto=http")):
        echo = connect(tinyauth).ask("GET", "/t/echo", *fields).json()
        same((values(echo, "X-Forwarded-Proto"), values(echo, "Forwarded"), values(echo, "X-Forwarded-Ssl")), (["https"], [], []),
             "fields")


def test_no_key_no_way(lab):
    """Over TLS no request without a valid key reaches the model, pipelined in one record with good ones or not."""
    tinyauth, model = serve_and_model(lab)
    client = connect(tinyauth)
    client.send(b"".join(request("GET", f"/t/echo?{i}", key=key) for i, key in enumerate((ALICE, None, WRONG, CAROL, BOB, None, ALICE))))
    same([client.read().status for _ in range(7)], [200, 401, 401, 401, 200, 401, 200], "statuses")
    same([target for _, _, target in model.requests()], ["/t/echo?0", "/t/echo?4", "/t/echo?6"], "what the model saw")
    tinyauth.publish(KEYS.replace("alice", "# alice"))
    same([client.ask("GET", "/t/echo", key=key).status for key in (ALICE, BOB)], [401, 200], "after the key is gone")


# Records and requests

def test_requests_and_records(lab):
    """However requests are cut into records - many in one, one in many, one byte each, two and a half - they are answered."""
    tinyauth = serve(lab)
    one = [request("POST", f"/t/echo?{i}", body=pattern(i * 50), chunked=i % 2) for i in range(40)]
    text = b"".join(one)
    cuts = {"all in one record": [text], "a request a record": one, "one byte a record": [bytes([byte]) for byte in one[3]],
            "two and a half": [b"".join(one[:2]) + one[2][:40], one[2][40:]],
            "records of 700": [text[at:at + 700] for at in range(0, len(text), 700)],
            "head and body apart": [part for raw in one for part in (raw[:raw.index(b"\r\n\r\n") + 4], raw[raw.index(b"\r\n\r\n") + 4:])]}
    for at_once in (True, False):
        for what, parts in cuts.items():
            client = connect(tinyauth)
            if at_once:                 # all of them in one write to the socket
                client.sock.raw.sendall(b"".join(client.sock.encrypt(part) for part in parts))
            else:
                for part in parts:
                    client.send(part)
            count = {"one byte a record": 1, "two and a half": 3}.get(what, 40)
            first = 3 if what == "one byte a record" else 0
            for i in range(first, first + count):
                echo = client.read().json()
                same((echo["target"], echo["sha256"]), (f"/t/echo?{i}", hashlib.sha256(pattern(i * 50)).hexdigest()), f"{what}, {i}")
            client.close()


def test_records_cut_anywhere(lab):
    """A record whose bytes come one by one, and several records cut at odd places, are read the same."""
    tinyauth = serve(lab)
    client = connect(tinyauth)
    data = client.sock.encrypt(request("POST", "/t/echo?bytes", body=b"hello"))
    for byte in data:
        client.sock.raw.sendall(bytes([byte]))
    same(client.read().json()["target"], "/t/echo?bytes", "byte by byte")
    body = pattern(100000)
    data = client.sock.encrypt(request("POST", "/t/echo", body=body))
    for at in range(0, len(data), 7001):
        client.sock.raw.sendall(data[at:at + 7001])
    same(client.read().json()["sha256"], hashlib.sha256(body).hexdigest(), "cut at odd places")


def test_bodies_of_many_sizes(lab):
    """Bodies around the size of a record and of a buffer pass whole both ways, on one connection."""
    client = connect(serve(lab))
    for size in (0, 1, 16383, 16384, 16385, 20479, 20480, 32767, 32768, 36863, 36864, 40960, 65536, 100000):
        for chunked in (False, True):
            same(client.ask("POST", "/t/echo", body=pattern(size), chunked=chunked).json()["length"], size, f"up, {size}")
        for target in (f"/t/cl/{size}", f"/t/chunked/{size}?chunk=16384", f"/t/close/{size}"):
            assert client.ask("GET", target).body == pattern(size), f"{target} differs"


HUNDRED_MB = 100000000


@measured
def test_100_mb_down_and_up(lab):
    """100 MB each way are exact, and memory stays."""
    tinyauth = serve(lab)
    client = connect(tinyauth)
    client.ask("GET", "/t/cl/4000000")
    client.ask("POST", "/t/sink", body=pattern(4000000))
    with memory_stays(tinyauth):
        client.send(request("GET", f"/t/cl/{HUNDRED_MB}"))
        client.head()
        digest = hashlib.sha256()
        for piece in client.body():
            digest.update(piece)
        wanted = hashlib.sha256()
        for piece in pieces(HUNDRED_MB):
            wanted.update(piece)
        same(digest.hexdigest(), wanted.hexdigest(), "bytes down")
        client.send(request("POST", "/t/echo", f"Content-Length: {HUNDRED_MB}"))
        for piece in pieces(HUNDRED_MB):
            client.send(piece)
        same(client.read().json()["sha256"], wanted.hexdigest(), "bytes up")


def test_both_ways_at_once(lab):
    """Through a WebSocket 20 MB go up and come back at the same time, exact."""
    tinyauth = serve(lab)
    client = connect(tinyauth)
    same(client.ask("GET", "/t/ws", *UPGRADE).status, 101, "status")
    size = 20000000

    def write():
        for piece in pieces(size, 60000):
            client.send(piece)
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    digest, wanted = hashlib.sha256(), hashlib.sha256()
    for piece in client.exactly(size):
        digest.update(piece)
    writer.join(5)
    for piece in pieces(size, 60000):
        wanted.update(piece)
    same(digest.hexdigest(), wanted.hexdigest(), "bytes")


def test_answer_while_the_request_still_comes(lab):
    """A request body and its answer at once: the model answers before the body ends, and both are whole."""
    from regressions import Upstream, read_head

    def serve_one(sock):
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
        sender = threading.Thread(target=sock.sendall, args=(pattern(3000000),), daemon=True)
        sender.start()
        left = 3000000
        while left > 0 and (data := sock.recv(1 << 16)):
            left -= len(data)
        took.append(left)
        sender.join(5)
    took = []
    tinyauth = serve(lab, upstream=Upstream(lab, serve_one).name)
    client = connect(tinyauth)
    client.send(request("POST", "/", "Content-Length: 3000000"))
    same(client.head().status, 200, "status before the body")
    writer = threading.Thread(target=lambda: [client.send(piece) for piece in pieces(3000000, 100000)], daemon=True)
    writer.start()
    assert b"".join(client.body()) == pattern(3000000), "other bytes"
    writer.join(5)
    until(lambda: took, "end of the body")
    same(took[0] < 100000, True, f"{took} bytes of the body are missing")


def test_slow_reader(lab):
    """A client with a small window that reads slowly gets exactly what was sent."""
    client = connect(serve(lab), rcvbuf=4096)
    client.send(request("GET", "/t/close/2000000"))
    client.head()
    body = bytearray()
    for piece in client.body():
        body += piece
        if len(body) < 200000:
            time.sleep(0.0005)
    assert bytes(body) == pattern(2000000), "other bytes"


@alone
def test_client_that_reads_nothing(lab):
    """Clients that read nothing of 1 GB each: the model's sender stops, memory stays, and one that reads on gets the rest."""
    tinyauth, model = serve_and_model(lab)
    connect(tinyauth).ask("GET", "/t/cl/4000000")
    clients = [connect(tinyauth, rcvbuf=1 << 16) for _ in range(8)]
    for client in clients:
        client.send(request("GET", "/t/cl/1000000000"))
        client.head()

    def sent():
        latest = {}
        for event in model.events("sent"):
            latest[event["conn"]] = event["bytes"]
        return sum(latest.values())
    before = stands_still(sent, "the model's sender")
    assert before < 8 * (16 << 20), f"{before} bytes went to clients that do not read"
    grown = anonymous(tinyauth.workers()[0])
    assert grown < 8 << 20, f"{grown} bytes of anonymous memory"
    for _ in clients[0].exactly(before + (8 << 20)):
        pass
    assert sent() > before, "the sender did not go on"


def test_client_that_reads_nothing_of_many_answers(lab):
    """Requests are pipelined and no answer is read: reading them stops; later all are answered, in order."""
    client = connect(serve(lab, log=lab.path("log")), rcvbuf=4096)
    count, text = 3000, request("GET", "/t/cl/3000") * 1
    writer = threading.Thread(target=lambda: [client.send(text * 100) for _ in range(count // 100)], daemon=True)
    writer.start()
    time.sleep(0.3)                     # let it fill up
    for _ in range(count):
        assert client.read().body == pattern(3000), "other bytes"
    writer.join(5)


# Streams

def read_events(client, target, events, gap_ms):
    """Delay of each event in ms, and the sizes of the records of data that came with each read."""
    client.send(request("POST", target, body=json.dumps({"events": events, "gap_ms": gap_ms, "stream": True}).encode()))
    client.head()
    delays, text = [], b""
    for piece in client.body():
        text += piece
        while match := re.search(rb'(?:data: )?(\{.*"t_ns".*\})\n', text):
            delays.append((time.monotonic_ns() - json.loads(match[1])["t_ns"]) / 1e6)
            text = text[match.end():]
    return delays[:events]


@measured
def test_stream_over_tls_is_as_quick_as_without(lab):
    """50 events 20 ms apart: each is a record of its own, and the median delay is at most 1 ms above that of plain."""
    tinyauth, plain = serve(lab), lab.tinyauth()
    for target in ("/api/generate", "/v1/chat/completions"):
        for _ in range(3):              # another process can hold up a reader, but not three times
            client = connect(tinyauth)
            before = len(client.sock.records)
            secure = read_events(client, target, 50, 20)
            records = [length for kind, length in client.sock.records[before:] if kind == DATA]
            direct = read_events(Client(plain.address, silent=True), target, 50, 20)
            added = statistics.median(secure) - statistics.median(direct)
            if added < 1 and len(records) >= 50:
                break
        print(f"        measured: {target}: median delay {statistics.median(secure):.3f} ms over TLS, {statistics.median(direct):.3f} ms"
              f" without, {len(records)} records", flush=True)
        assert added < 1, f"{target}: {added:.3f} ms added"
        assert len(records) >= 50, f"{target}: {len(records)} records for 50 events"   # the head may come with the first


# Memory

IDLE = 500
IDLE_BYTES = 32 << 10


def per_connection(lab, use):
    """Anonymous bytes of a worker for each of many idle connections after `use`."""
    tinyauth = serve(lab, "--ip-conns", "2000")
    worker, = tinyauth.workers()
    warm = connect(tinyauth)
    use(warm)
    warm.close()
    before = anonymous(worker)
    clients = []
    for _ in range(IDLE):
        clients.append(connect(tinyauth))
        use(clients[-1])
    each = (anonymous(worker) - before) / IDLE
    same(clients[0].ask("GET", "/t/echo").status, 200, "an idle connection's next request")
    return each, before


def small_requests(client):
    for _ in range(3):
        same(client.ask("GET", "/t/echo").status, 200, "status")


def large_bodies(client):
    same(client.ask("POST", "/t/sink", body=pattern(1 << 20)).status, 200, "upload")
    same(len(client.ask("GET", f"/t/cl/{1 << 20}").body), 1 << 20, "download")


def chunked_bodies(client):
    same(client.ask("POST", "/t/sink", body=pattern(1 << 18), chunked=True).status, 200, "upload")
    same(len(client.ask("GET", f"/t/chunked/{1 << 18}?chunk=3000").body), 1 << 18, "download")


@measured
def test_memory_of_idle_connections(lab):
    """An idle kept-alive TLS connection costs at most 32 KB, after small requests and after large bodies."""
    too_much = []
    for use in (small_requests, large_bodies, chunked_bodies):
        each, base = per_connection(lab, use)
        print(f"        measured: {each / 1024:.1f} KB for each of {IDLE} idle connections after {use.__name__}, worker before "
              f"{base / 1024:.0f} KB", flush=True)
        if each > IDLE_BYTES:
            too_much.append(f"{use.__name__}: {each / 1024:.1f} KB")
    same(too_much, [], "uses after which an idle connection costs more than 32 KB")


@measured
def test_memory_of_an_idle_server(lab):
    """Supervisor and an idle worker together hold at most 1 MB of anonymous memory with TLS, too."""
    tinyauth = serve(lab)
    print(f"        measured: {tinyauth.memory() / 1024:.0f} KB for supervisor and an idle worker", flush=True)
    assert tinyauth.memory() <= 1 << 20, f"{tinyauth.memory()} bytes"


def secret_places(pid, secrets):
    """Mappings in which one of these can be found, and their flags."""
    found = []
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for name, flags, _, line in mappings(pid):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if name.startswith("[v") or "rw" not in line.split()[1]:
                continue
            try:
                memory.seek(begin)
                data = memory.read(end - begin)
            except OSError:
                continue
            found += [(name or "anonymous", what, flags) for what, secret in secrets.items() if secret in data]
    return found


def private_number(path):
    """The secret number of an EC key, as bytes."""
    from secure import openssl
    text = openssl("ec", "-in", path, "-noout", "-text").stdout.decode()
    return bytes.fromhex("".join(re.search(r"priv:\s*((?:[0-9a-f:]+\s*)+)pub", text)[1].split()).replace(":", ""))[-32:]


def test_secrets_stay_out_of_dumps(lab):
    """The private key lies only in mappings that dumps leave out, in supervisor and worker, also after a renewal and an
    upgrade; the PEM text of the key nowhere; TLS links and the session cache lie in such mappings."""
    good = authority(lab).good()
    tinyauth = serve(lab, pair=good)
    secrets = {"the key": private_number(good.key), "its PEM text": b"\n".join(open(good.key, "rb").read().splitlines()[1:2])}
    client = connect(tinyauth)
    same(client.ask("GET", "/t/echo").status, 200, "status")
    for turn in range(2):
        for pid in (tinyauth.pid, *tinyauth.workers()):
            found = secret_places(pid, secrets)
            assert turn or {what for _, what, _ in found} == {"the key"} or not found, f"found: {found}"
            assert any(what == "the key" for _, what, _ in found), "the key was not found at all"
            exposed = [(name, what) for name, what, flags in found if "dd" not in flags]
            same(exposed, [], f"secrets that a dump of {'supervisor' if pid == tinyauth.pid else 'worker'} would hold, turn {turn}")
            cache = [flags for name, flags, _, _ in mappings(pid) if "tinyauth-sessions" in name]
            same(["dd" in flags for flags in cache], [True], f"session cache left out of dumps, turn {turn}")
        if turn == 0:
            workers = tinyauth.workers()
            client.close()
            tinyauth.signal(signal.SIGUSR2)
            tinyauth.wait_event("ready", 2)
            until(lambda: not any(map(e2e.alive, workers)), "end of the old workers")


def test_plain_text_of_an_ended_connection_is_wiped(lab):
    """After a connection ended, nothing of what it said in TLS lies in the worker's memory of TLS links."""
    tinyauth = serve(lab)
    mark = b"remember-me-" + bytes(range(65, 91))
    client = connect(tinyauth)
    same(client.ask("POST", "/t/echo", f"X-Mark: {mark.decode()}", body=mark * 300).status, 200, "status")
    client.close()
    worker, = tinyauth.workers()
    same(connect(tinyauth).ask("GET", "/t/echo").status, 200, "another connection")
    left = [place for place in secret_places(worker, {"the mark": mark}) if "dd" in place[2]]
    same(left, [], "places in TLS memory that still hold it")
