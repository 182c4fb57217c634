"""Goal: whatever bytes come to the TLS port, a connection hurts only itself, and it ends in time."""

import os
import select
import socket
import ssl
import struct
import time

import hello
from e2e import Cut, frozen, request
from lab import (authority, connect, failures, last_request, raw_connect, s_client, same, serve, serve_and_model, still_serves,
                 until)
from secure import DATA

HELLO = hello.hello(name=b"localhost")


def overlong(size):
    return struct.pack("!BHH", 22, 0x0303, size) + HELLO + bytes(size - len(HELLO) if size > len(HELLO) else 0)


GARBAGE = {
    "zeros": bytes(1000),
    "0xff": b"\xff" * 1000,
    "SSH": b"\x00SSH-2.0-x\r\n" * 10,
    "64 KB of noise": b"\x80" + os.urandom(65535),
    "an SSL 2 hello": b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10" + bytes(64),
    "a record of size 0": hello.record(22, b"") + hello.record(22, HELLO),
    "many records of size 0": hello.record(22, b"") * 1000,
    "a record of 2^14 + 1": overlong(16385),
    "a record of 65535": overlong(65535),
    "a record of another major version": hello.record(22, HELLO, 0x0403),
    "data before the handshake": hello.record(23, b"GET / HTTP/1.1\r\n\r\n"),
    "ChangeCipherSpec first": hello.record(20, b"\x01"),
    "a fatal alert first": hello.record(21, b"\2\x28"),
    "close_notify first": hello.record(21, b"\1\0"),
    "many warnings": hello.record(21, b"\1\x5a") * 10000,
    "half an alert": hello.record(21, b"\2"),
    "another record type": hello.record(24, b"\1\0\3" + bytes(16)),
    "a heartbeat after the hello": hello.record(22, HELLO) + hello.record(24, b"\1\xff\xff" + bytes(16)),
    "Finished first": hello.record(22, b"\x14\0\0\x0c" + bytes(12)),
    "a ServerHello": hello.record(22, b"\x02" + HELLO[1:]),
    "a hello of 16 MB": hello.record(22, b"\x01\xff\xff\xff" + HELLO[4:]),
    "a hello that is shorter than it says": hello.record(22, HELLO[:3] + bytes([HELLO[3] - 9]) + HELLO[4:]),
    "no suites": hello.record(22, hello.hello(suites=())),
    "a thousand suites": hello.records(22, hello.hello(suites=tuple(range(0x4000, 0x43E8)), groups=tuple(range(2000))), 16000),
    "no compression method": hello.record(22, hello.hello(compression=b"")),
    "an extension that is too long": hello.record(22, hello.hello(more=b"\0\x23\xff\xff")),
    "a name that is too long": hello.record(22, hello.hello(more=hello.extension(0, b"\xff\xff\0\xff\xff"))),
    "an empty ALPN list": hello.record(22, hello.hello(more=hello.extension(16, b"\0\0"))),
    "an ALPN name that is too long": hello.record(22, hello.hello(more=hello.extension(16, b"\0\x03\xffh2"))),
    "two hellos": hello.record(22, HELLO + HELLO),
    "a hello after the hello": hello.record(22, HELLO) + hello.record(22, hello.hello()),
    "a ClientKeyExchange off the curve": hello.record(22, HELLO) + hello.record(22, b"\x10\0\0\x42\x41\4" + b"\x01" * 64)
    + hello.record(20, b"\1") + hello.record(22, bytes(40)),
    "a ClientKeyExchange of zeros": hello.record(22, HELLO) + hello.record(22, b"\x10\0\0\x42\x41\4" + bytes(64))
    + hello.record(20, b"\1") + hello.record(22, bytes(40)),
    "an empty ClientKeyExchange": hello.record(22, HELLO) + hello.record(22, b"\x10\0\0\0") + hello.record(20, b"\1"),
    "Finished without encryption": hello.record(22, HELLO) + hello.record(22, b"\x14\0\0\x0c" + bytes(12)),
    "data instead of a key exchange": hello.record(22, HELLO) + hello.record(23, last_request()),
}


def test_garbage(lab):
    """Each is refused: the connection ends, nothing goes upstream, and the same process goes on serving."""
    tinyauth, model = serve_and_model(lab)
    tinyauth.expect("event=tls_failed")
    tinyauth.expect("reason=(plain_http|bad_request)")
    workers, ended = tinyauth.workers(), {}
    socks = {}
    for what, raw in GARBAGE.items():
        socks[what] = raw_connect(tinyauth)
        try:
            socks[what].sendall(raw)
            socks[what].shutdown(1)
        except OSError:
            pass                        # it was refused before all was sent
    for what, sock in socks.items():
        found, ended[what] = hello.read_records(sock)
        assert DATA not in {kind for kind, _ in found}, f"{what} is answered with data: {found}"
    same({what: end for what, end in ended.items() if end == "silence"}, {}, "connections that did not end")
    same([event for event in model.events("request")], [], "what the model saw")
    still_serves(tinyauth, workers)


def test_truncated_hello(lab):
    """A hello that ends at any byte fails with a log line, or ends in silence when nothing came."""
    tinyauth = serve(lab, "--ip-conns", "1000")
    tinyauth.expect("event=tls_failed .*error=cut")
    workers, raw = tinyauth.workers(), hello.record(22, HELLO)
    socks = [raw_connect(tinyauth) for _ in raw]
    for number, sock in enumerate(socks):
        sock.sendall(raw[:number])
        sock.shutdown(1)
    for number, sock in enumerate(socks):
        found, end = hello.read_records(sock)
        assert end in ("eof", "reset") and not [kind for kind, _ in found if kind != 21], f"cut at {number}: {found}, {end}"
    failures(tinyauth, len(raw) - 1)
    same(len(tinyauth.events("tls_failed")), len(raw) - 1, "log lines, none for the connection that said nothing")
    still_serves(tinyauth, workers)


def test_silent_connections_end(lab):
    """A connection that says nothing, one with half a hello and one that stops after its hello all end within 12 s."""
    tinyauth = serve(lab)
    tinyauth.expect("event=tls_failed .*error=timeout")
    socks = [raw_connect(tinyauth, 13) for _ in range(4)]
    began = time.monotonic()
    socks[1].sendall(hello.HELLO[:30])
    socks[2].sendall(hello.HELLO)
    socks[3].sendall(hello.HELLO[:5])
    for sock in socks:
        _, end = hello.read_records(sock)
        if end == "open":               # the ServerHello; what is waited for is the end
            _, end = hello.read_records(sock)
        assert end in ("eof", "reset"), f"the connection is {end}"
    took = time.monotonic() - began
    assert 9 < took < 12, f"ended after {took:.1f} s"
    same({record["error"] for record in failures(tinyauth, 3)}, {"timeout"}, "errors")


def test_slow_handshake_ends_in_time(lab):
    """A hello that drips a byte a second does not stretch the time for a handshake."""
    tinyauth = serve(lab)
    tinyauth.expect("event=tls_failed .*error=timeout")
    sock = raw_connect(tinyauth, 1)
    began = time.monotonic()
    for byte in hello.HELLO:
        try:
            sock.sendall(bytes([byte]))
            if not sock.recv(1):
                break
        except TimeoutError:
            pass
        except OSError:
            break
        assert time.monotonic() - began < 12, "still open after 12 s"
    assert time.monotonic() - began > 9, "ended too early"
    failures(tinyauth, 1)


def test_plain_http_to_the_tls_port(lab):
    """A request without TLS gets a plain 400 that says so, whatever its key, and nothing goes upstream."""
    tinyauth, model = serve_and_model(lab)
    raw = {"a GET": request(), "a POST": request("POST", "/t/echo", body=bytes(100000)), "no key": request(key=None),
           "HTTP/1.0": request(version="1.0"), "health": request("GET", "/health", key=None), "one byte": b"G",
           "garbage": b"hello\r\n\r\n", "two requests": request() * 2}
    for number, (what, data) in enumerate(raw.items(), 1):
        sock = raw_connect(tinyauth)
        sock.sendall(data)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and b"Connection: close" in head and b"https://" in body, f"{what}: {answer}"
        record = tinyauth.access(number)[-1]
        same((record["status"], record["reason"], record["key"]), ("400", "plain_http", "-"), f"log of {what}")
    same(model.events("accept"), [], "connections to the model")
    still_serves(tinyauth, tinyauth.workers())


def test_plain_http_byte_by_byte(lab):
    """The same for a request whose bytes come one by one."""
    tinyauth = serve(lab)
    sock = raw_connect(tinyauth)
    for byte in request():
        try:
            sock.sendall(bytes([byte]))
        except OSError:
            break                       # answered already
    answer = b""
    while piece := sock.recv(65536):
        answer += piece
    assert answer.startswith(b"HTTP/1.1 400 "), f"answer {answer}"


def test_tls_hello_to_a_plain_port(lab):
    """A TLS client of a plain port: a log line that says so."""
    tinyauth = lab.tinyauth()
    _, said = s_client(tinyauth, "-tls1_2", "-servername", "localhost")
    assert "wrong version number" in said, said
    record, = tinyauth.access()
    same((record["status"], record["reason"]), ("400", "tls_hello"), "access line")
    for cut in (1, 3, 5, 40):
        sock = raw_connect(tinyauth)
        sock.sendall(hello.HELLO[:cut])
        sock.sendall(hello.HELLO[cut:])
        assert sock.recv(65536).startswith(b"HTTP/1.1 400 "), f"cut at {cut}"
    same({record["reason"] for record in tinyauth.access(5)}, {"tls_hello"}, "reasons")


def damaged(client, change):
    """Sends a request whose record was changed on its way."""
    data = bytearray(client.sock.encrypt(request()))
    change(data)
    client.sock.raw.sendall(data)


def flip(at):
    def change(data):
        data[at] ^= 1
    return change


DAMAGES = {"content": flip(20), "tag": flip(-1), "nonce": flip(6), "type": flip(0), "length": flip(4),
           "shorter": lambda data: data.__delitem__(slice(10, 20))}


def test_changed_records(lab):
    """A record that was changed on its way ends the connection with an alert; nothing of it goes upstream."""
    tinyauth, model = serve_and_model(lab)
    for what, change in DAMAGES.items():
        client = connect(tinyauth)
        damaged(client, change)
        client.sock.raw.shutdown(1)
        try:
            data = client.sock.recv(1000)
        except (ssl.SSLError, ConnectionResetError):
            data = b""
        same(data, b"", f"answer to a changed {what}")
        client.close()
    same(model.events("accept"), [], "connections to the model")
    still_serves(tinyauth, tinyauth.workers())


def test_replayed_record(lab):
    """A record that is sent twice is taken once; the second time it ends the connection."""
    tinyauth, model = serve_and_model(lab)
    client = connect(tinyauth)
    data = client.sock.encrypt(request("GET", "/t/echo?once"))
    client.sock.raw.sendall(data)
    same(client.read().status, 200, "the first time")
    client.sock.raw.sendall(data)
    try:
        same(client.sock.recv(1000), b"", "answer to a replay")
    except (ssl.SSLError, ConnectionResetError):
        pass
    same(len(model.requests()), 1, "requests at the model")


def test_plain_bytes_within_tls(lab):
    """Bytes without encryption in the midst of a connection are never taken for a request."""
    tinyauth, model = serve_and_model(lab)
    for raw in (request("GET", "/t/echo?plain"), hello.record(23, request("GET", "/t/echo?plain")), hello.HELLO):
        client = connect(tinyauth)
        same(client.ask("GET", "/t/echo").status, 200, "before")
        client.sock.raw.sendall(raw)
        try:
            same(client.sock.recv(1000), b"", f"answer to {raw[:12]}")
        except (ssl.SSLError, ConnectionResetError):
            pass
    same([target for _, _, target in model.requests() if "plain" in target], [], "plain requests at the model")


def test_empty_records(lab):
    """Empty records of data between others change nothing."""
    tinyauth = serve(lab)
    client = connect(tinyauth)
    for _ in range(2):
        for piece in (b"GET /t/echo HTTP/1.1\r\nHost: a\r\n", b"", last_request().partition(b"\r\n")[2].partition(b"\r\n")[2]):
            if piece:
                client.send(piece)
    same(client.read().status, 200, "status")


def test_flood_of_handshakes_that_stop(lab):
    """A full pool of silent connections and half handshakes gives way to a client with a key."""
    tinyauth = serve(lab, "-n", "20", "--ip-conns", "1000")
    tinyauth.expect("event=tls_failed|event=turned_away")
    socks = []
    for number in range(60):
        socks.append(raw_connect(tinyauth))
        if number % 2:
            socks[-1].sendall(hello.HELLO[:50])
    for _ in range(3):
        same(connect(tinyauth).ask("GET", "/t/echo").status, 200, "status")


def test_handshakes_that_come_at_once(lab):
    """A client that is served has its answer before most of many handshakes, which all came before, were worked on."""
    for early, head in ((True, b""), (False, b""), (True, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")):
        tinyauth = serve(lab, "--ip-conns", "1000", *(["--trust", "127.0.0.2"] if head else []))
        tinyauth.expect("event=tls_failed")
        client = connect(tinyauth)
        same(client.ask("GET", "/health").status, 200, "status")
        opened = [connection(tinyauth, head) for _ in range(100 * early)]
        with frozen(tinyauth.workers()):
            socks = opened or [connection(tinyauth, head) for _ in range(100)]
            for sock in socks:
                sock.sendall(head + hello.record(22, HELLO))
            client.send(last_request())
        same(client.read().status, 200, "status beside them")
        answered = len(select.select(socks, [], [], 0)[0])
        assert answered < 50, f"{answered} of 100 handshakes went first; opened before: {early}, behind {head}"


def connection(tinyauth, head):
    """One from an address of its own when it will begin with a PROXY header."""
    sock = socket.create_connection(tinyauth.address, 10, ("127.0.0.2" if head else "127.0.0.1", 0))
    tinyauth.clients.append(sock)
    return sock


def served(tinyauth):
    """Whether a new client gets an answer of the model's; past --ip-conns it is refused, or has no handshake at all."""
    try:
        return connect(tinyauth).ask("GET", "/t/echo").status == 200
    except (Cut, OSError):
        return False


def test_refused_address_over_tls(lab):
    """Past --ip-conns: 429 after the handshake, then the end; far past it an alert instead of a handshake."""
    tinyauth, model = serve_and_model(lab, "--ip-conns", "4")
    tinyauth.expect(r"event=turned_away .*status=429 reason=ip_conns")
    kept = [connect(tinyauth) for _ in range(4)]
    for client in kept:
        same(client.ask("GET", "/t/echo").status, 200, "within the limit")
    for number in range(1, 4):
        client = connect(tinyauth)
        answer = client.ask("GET", "/t/echo")
        same((answer.status, answer.closes, client.end()), (429, True, "eof"), "one more, and its end")
        assert answer.get("Retry-After") and answer.json()["error"], f"answer {answer.fields}"
        client.close()
        until(lambda: len(tinyauth.events("turned_away")) >= number, "log line")
    same(len(model.requests()), 4, "requests at the model")
    silent = [raw_connect(tinyauth) for _ in range(12)]
    ends = [hello.read_records(sock, 1) for sock in silent[8:]]
    same([hello.alerts(found) for found, _ in ends], [[80]] * 4, "alerts for those far past the limit")
    for client in (*kept, *silent):
        client.close()
    until(lambda: served(tinyauth), "service after all left")


def test_sessions_are_secret_from_each_other(lab):
    """A session id alone, without its secret, opens nothing: the connection fails at Finished."""
    tinyauth = serve(lab, pair=authority(lab).good())
    tinyauth.expect("event=tls_failed")
    client = connect(tinyauth)
    same(client.ask("GET", "/t/echo").status, 200, "status")
    session = client.tls.session.id
    sock = raw_connect(tinyauth)
    sock.sendall(hello.record(22, hello.hello(session=session)))
    found, _ = hello.read_records(sock, 3)
    assert found[0][0] == 22 and session in found[0][1], "the session was not taken up"
    sock.sendall(hello.record(20, b"\1") + hello.record(22, os.urandom(40)) + hello.record(23, os.urandom(100)))
    found, end = hello.read_records(sock)
    assert DATA not in {kind for kind, _ in found} and end in ("eof", "reset"), f"{found}, {end}"
    same(failures(tinyauth, 1)[0]["error"], "bad_mac", "logged error")
