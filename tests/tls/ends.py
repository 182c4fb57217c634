"""Goal: both sides say close_notify, an end without it is never taken for the end of an answer, and a client that leaves,
however it does, ends the generation at once."""

import ssl
import threading
import time

from e2e import Cut, UPGRADE, request, start_download, start_silence, start_stream
from lab import SecureClient, connect, last_request, same, serve, serve_and_model, until
from model import pattern
from regressions import Upstream, read_head
from secure import ALERT, Ragged


def say_close_notify(client):
    client.sock.say_goodbye()


def half_close(client):
    client.sock.shutdown(1)             # close_notify, then FIN


def close(client):
    client.close()


def fin(client):
    client.sock.raw.shutdown(1)


def cut(client):
    client.sock.raw.close()


def reset(client):
    client.reset()


def fatal_alert(client):
    client.sock.fail()


def fatal_alert_and_end(client):
    client.sock.fail()
    client.sock.raw.close()


SAID = (say_close_notify, half_close, close)            # reason=client_closed
UNSAID = (fin, cut, reset, fatal_alert, fatal_alert_and_end)    # reason=client_cut


def start_upload(client, model):
    seen = len(model.events("request"))
    client.send(request("POST", "/t/sink", "Content-Length: 100000000") + bytes(100000))
    model.wait("request", seen + 1)


def test_client_that_leaves(lab):
    """Whichever way it leaves, and whatever runs, the upstream connection ends within 100 ms; status 499, and the reason
    tells a client that said close_notify from one that was cut."""
    tinyauth, model = serve_and_model(lab)
    count, slow = 0, []
    for start in (start_stream, start_silence, start_download, start_upload):
        for leave in (*SAID, *UNSAID):
            seen = len(model.events("close"))
            client = connect(tinyauth)
            start(client, model)
            left = time.monotonic_ns()
            leave(client)
            took = (model.wait("close", seen + 1)["t"] - left) / 1e6
            if took > 100:
                slow.append(f"{start.__name__}, {leave.__name__}: {took:.0f} ms")
            count += 1
            record = tinyauth.access(count)[-1]
            wanted = {"client_closed" if leave in SAID else "client_cut"}
            if start == start_download:     # a close with bytes unread is a reset, and a write may find the end first
                wanted = {"client_closed", "client_cut"}
            same((record["status"], record["reason"] in wanted), ("499", True), f"{start.__name__}, {leave.__name__}: {record}")
            client.sock.raw.close()
    same(slow, [], "upstream connections that ended late")


def test_client_that_leaves_with_more_to_say(lab):
    """Requests pipelined behind the one that runs do not hide close_notify or FIN."""
    tinyauth, model = serve_and_model(lab)
    for count, leave in enumerate((half_close, close, fin, reset), 1):
        client = connect(tinyauth)
        client.send(request("POST", "/t/silent", body=b"x") + request() * 3)
        model.wait("body", count)
        leave(client)
        model.wait("close", count)
        client.sock.raw.close()
        same(tinyauth.access(count)[-1]["status"], "499", f"status after {leave.__name__}")
    same(len(model.requests()), 4, "requests seen")


def test_idle_client_that_leaves(lab):
    """Between two requests each way of leaving ends the connection, without a log line."""
    tinyauth, model = serve_and_model(lab)
    for count, leave in enumerate((*SAID, *UNSAID), 1):
        client = connect(tinyauth)
        same(client.ask("GET", "/t/echo").status, 200, "status")
        leave(client)
        model.wait("close", count)
        client.sock.raw.close()
    same(len(tinyauth.access(count)), count, "access lines")


def test_half_close_behind_a_whole_request(lab):
    """A client that sends a request, close_notify and FIN at once has gone, as without TLS."""
    tinyauth, model = serve_and_model(lab)
    client = connect(tinyauth)
    data = client.sock.encrypt(request("POST", "/t/silent", body=b"x"))
    try:
        client.sock.tls.unwrap()
    except ssl.SSLError:
        pass
    client.sock.raw.sendall(data + client.sock.outgoing.read())
    client.sock.raw.shutdown(1)
    same(tinyauth.access()[0]["reason"], "client_closed", "reason")
    until(lambda: len(model.events("close")) == len(model.events("accept")), "end of what went upstream")


# What the server says

def last_alert(client):
    """Was the last record that came an alert?"""
    return client.sock.records[-1][0] == ALERT


def test_close_delimited_answer_ends_with_close_notify(lab):
    """An answer to HTTP/1.0 whose end is the connection's ends with close_notify, small or large."""
    tinyauth = serve(lab)
    for target in ("/t/close/10", "/t/close/300000", "/t/chunked/300000", "/t/close/5000000"):
        client = connect(tinyauth)
        answer = client.ask("GET", target, version="1.0")
        assert answer.body == pattern(int(target.rpartition("/")[2])), f"{target}: {len(answer.body)} bytes"
        same((client.end(), last_alert(client)), ("eof", True), f"end of {target}")


def test_every_end_of_ours_says_close_notify(lab):
    """Connection: close, a refusal that closes, the keep-alive time-out, the header time-out before and within a head, the
    end of a WebSocket, and a drain all end with close_notify."""
    tinyauth = serve(lab, "--keepalive-timeout", "300ms", "--header-timeout", "300ms")
    wrong = []

    def ends(what, *sent):
        client = connect(tinyauth)
        for data in sent:
            client.send(data)
            if data.endswith(b"\r\n\r\n"):
                client.read()
        try:
            end = client.end()
        except Cut as error:
            end = str(error)
        if end != "eof" or not last_alert(client):
            wrong.append(f"{what}: {end}")
    ends("Connection: close", last_request())
    ends("a refusal that closes", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n")
    ends("keep-alive time-out", request())
    ends("header time-out without a byte")
    same(wrong, [], "ends without close_notify")
    client = connect(tinyauth)
    client.send(b"GET / HT")
    same((client.read().status, client.end()), (408, "eof"), "header time-out within a head")
    client = connect(tinyauth)
    same(client.ask("GET", "/t/ws", *UPGRADE).status, 101, "upgrade")
    client.send(b"hello")
    same(b"".join(client.exactly(5)), b"hello", "echo")


def test_drain_says_close_notify(lab):
    """After TERM an idle connection's last answer, and the end of one that stays silent, are followed by close_notify."""
    tinyauth = serve(lab, "--keepalive-timeout", "600ms")
    asks, silent = connect(tinyauth), connect(tinyauth)
    for client in (asks, silent):
        same(client.ask("GET", "/t/echo").status, 200, "before")
    tinyauth.signal(15)
    tinyauth.wait_event("draining")
    answer = asks.ask("GET", "/t/echo")
    same((answer.closes, asks.end(), silent.end()), (True, "eof", "eof"), "ends")


def test_cut_answers_are_seen_as_cut(lab):
    """An answer that the model cut never ends with close_notify where only the end of the connection frames it, nor looks
    whole anywhere else."""
    tinyauth = serve(lab)
    count = 0
    for version in ("1.1", "1.0"):
        for target in ("/t/cut-cl", "/t/cut-cl?reset", "/t/cut-chunked", "/t/cut-chunked?between", "/t/cut-chunked?reset"):
            client = connect(tinyauth)
            count += 1
            try:
                client.ask("GET", target, version=version)
            except Cut:
                pass
            else:
                raise AssertionError(f"{target} for HTTP/{version} seems whole: {len(client.answer.body)} bytes")
            assert not client.sock.records or version == "1.1" or not last_alert(client), f"{target}: close_notify behind a cut answer"
    same({record["reason"] for record in tinyauth.access(count)}, {"upstream_cut"}, "logged reasons")


def test_reset_upstream_of_a_close_delimited_answer(lab):
    """An upstream that resets within an answer that only its end frames: the client sees no close_notify."""
    def serve_one(sock):
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(20000))
        go.wait(5)
        import struct
        sock.setsockopt(1, 13, struct.pack("ii", 1, 0))
        sock.close()
    go = threading.Event()
    tinyauth = serve(lab, upstream=Upstream(lab, serve_one).name)
    for version in ("1.0", "1.1"):
        go.clear()
        client = connect(tinyauth)
        client.send(request("GET", "/", version=version))
        same(client.head().status, 200, "status")
        body = client.body()
        next(body)
        go.set()
        try:
            for _ in body:
                pass
        except Cut:
            continue
        raise AssertionError(f"HTTP/{version}: a clean end of an answer that was reset")


def test_truncation_is_an_error_in_pythons_client(lab):
    """What an attacker cuts on the way is an error for an ordinary client: no close_notify, no end."""
    tinyauth = serve(lab)
    client = connect(tinyauth)
    client.send(request("GET", "/t/close/3000000", version="1.0"))
    client.head()
    next(client.body())
    with client.sock.lock:
        client.sock.incoming.write_eof()     # as if FIN came here
    try:
        while client.sock.tls.read(16384):
            pass
    except (ssl.SSLEOFError, Ragged):
        return
    raise AssertionError("a cut answer ended like a whole one")


def test_idle_tunnel_is_cut_without_close_notify(lab):
    """A WebSocket that stands still for the idle time-out is cut, and TLS shows that."""
    tinyauth = serve(lab, "--idle-timeout", "300ms")
    client = connect(tinyauth)
    same(client.ask("GET", "/t/ws", *UPGRADE).status, 101, "status")
    assert client.end() in ("ragged", "reset"), "a clean end"


def test_tunnel_ends(lab):
    """The end of either side of a WebSocket is the end of the other; what was said before it arrives."""
    sides = []

    def serve_one(sock):
        read_head(sock)
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        sides.append(sock)
    tinyauth = serve(lab, upstream=Upstream(lab, serve_one).name)
    client = connect(tinyauth)
    same(client.ask("GET", "/", *UPGRADE).status, 101, "status")
    upstream, = until(lambda: sides, "tunnel")
    upstream.sendall(b"last words")
    upstream.shutdown(1)
    same((b"".join(client.exactly(10)), client.end()), (b"last words", "eof"), "words and end")
    for leave in (half_close, close, fin, reset):
        client = SecureClient(tinyauth.address)
        same(client.ask("GET", "/", *UPGRADE).status, 101, "status")
        upstream = until(lambda: sides[1:], "tunnel")[-1]
        client.send(b"goodbye")
        until(lambda: upstream.recv(7, 2) == b"goodbye", "words at the upstream")
        upstream.recv(7)
        leave(client)
        try:
            same(upstream.recv(10), b"", f"end after {leave.__name__}")
        except ConnectionResetError:
            pass
        client.sock.raw.close()
        del sides[1:]


def test_lingering_close_over_tls(lab):
    """A refused upload whose body still comes: the refusal arrives before any reset."""
    tinyauth = serve(lab)
    for _ in range(5):
        client = connect(tinyauth)
        client.send(request("POST", "/api/chat", "Content-Length: 3000000", key=None))
        try:
            for _ in range(20):
                client.send(bytes(16384))
        except OSError:
            pass
        same(client.read().status, 401, "status")


