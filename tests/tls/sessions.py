"""Goal: a session is resumed by its id in every worker and generation, as long as the certificate's key is the same."""

import os
import re
import shutil
import signal

from e2e import alive, alone, frozen
from lab import SecureClient, authority, client_context, connect, last_request, s_client, same, serve, until
from secure import Pair


def serve_copy(lab, pair, **more):
    """tinyauth with a pair of its own, which the test may replace."""
    own = Pair(lab.path("own.crt"), lab.path("own.key"))
    shutil.copy(pair.cert, own.cert)
    shutil.copy(pair.key, own.key)
    tinyauth = lab.tinyauth(*own.options, **more)
    tinyauth.pair = own
    return tinyauth


def replace(tinyauth, pair):
    """Puts another pair in place, as ACME clients do: each file at once."""
    for old, new in ((tinyauth.pair.key, pair.key), (tinyauth.pair.cert, pair.cert)):
        shutil.copy(new, old + ".new")
        os.rename(old + ".new", old)


def take_into_use(tinyauth, pair):
    """Replaces the pair and waits until a new generation serves it."""
    seen, workers = len(tinyauth.events("certificate")), tinyauth.workers()
    replace(tinyauth, pair)
    tinyauth.expect("event=certificate_refused")    # a look between the two files
    tinyauth.signal(signal.SIGHUP)
    tinyauth.wait_event("certificate", seen + 1)
    until(lambda: not any(alive(worker) for worker in workers), "end of the old workers")


def resumes(tinyauth, context, session):
    """Whether the server takes this session up again; an answer comes in any case."""
    client = SecureClient(tinyauth.address, context, session=session)
    try:
        same(client.ask("GET", "/t/echo").status, 200, "status")
        return client.tls.session_reused
    finally:
        client.close()


def first_session(tinyauth, context):
    client = SecureClient(tinyauth.address, context)
    same((client.ask("GET", "/t/echo").status, client.tls.session_reused), (200, False), "first connection")
    session = client.tls.session
    assert len(session.id) == 32 and not session.has_ticket, f"session {session.id!r}"
    client.close()
    return session


def from_each_worker(tinyauth, context, session):
    """Resumed or not, by each worker; the others stand still meanwhile."""
    found = []
    count = int(tinyauth.events("ready")[-1]["workers"])
    until(lambda: len(tinyauth.workers()) >= count, "workers that were just started")
    for worker in tinyauth.workers():
        with frozen(set(tinyauth.workers()) - {worker}):
            found.append(resumes(tinyauth, context, session))
    return found


def test_session_is_resumed_by_every_worker(lab):
    """A session that one worker made is resumed by all four, with each kind of suite."""
    for kind, suite in (("p256", "ECDHE-ECDSA-AES128-GCM-SHA256"), ("p256", "ECDHE-ECDSA-AES256-GCM-SHA384"),
                        ("rsa2048", "ECDHE-RSA-CHACHA20-POLY1305")):
        tinyauth = serve(lab, pair=authority(lab).good(kind), workers=4)
        context = client_context(ciphers=suite)
        session = first_session(tinyauth, context)
        same(from_each_worker(tinyauth, context, session), [True] * 4, f"resumed with {suite}")


def test_openssl_reconnects(lab):
    """openssl s_client -reconnect resumes five times of five over four workers."""
    tinyauth = serve(lab, workers=4)
    _, said = s_client(tinyauth, "-tls1_2", "-no_ticket", "-reconnect", "-ign_eof", text=last_request())
    same((len(re.findall(r"^New, TLSv1\.2", said, re.M)), len(re.findall(r"^Reused, TLSv1\.2", said, re.M))), (1, 5), "handshakes")


def test_no_ticket_is_given(lab):
    """A client that could use tickets gets none, and resumes by id."""
    tinyauth = serve(lab)
    _, said = s_client(tinyauth, "-tls1_2", "-reconnect", "-ign_eof", text=last_request())
    assert "TLS session ticket" not in said and len(re.findall(r"^Reused, TLSv1\.2", said, re.M)) == 5, said


def test_unknown_session_is_a_full_handshake(lab):
    """An id that the server never gave, or that another server gave, is answered with a full handshake."""
    one, other = serve(lab), serve(lab)
    context = client_context()
    session = first_session(one, context)
    same((resumes(other, context, session), resumes(one, context, session)), (False, True), "resumed by another, by its own server")


def test_session_needs_its_suite(lab):
    """A session is not taken up again by a client that no longer offers its suite."""
    tinyauth = serve(lab)
    context = client_context(ciphers="ECDHE-ECDSA-AES128-GCM-SHA256")
    session = first_session(tinyauth, context)
    context.set_ciphers("ECDHE-ECDSA-CHACHA20-POLY1305")
    client = SecureClient(tinyauth.address, context, session=session)
    same((client.tls.session_reused, client.tls.cipher()[0]), (False, "ECDHE-ECDSA-CHACHA20-POLY1305"), "second connection")
    client.close()


def test_many_sessions(lab):
    """Two hundred sessions beside each other are all resumed: one does not push out another."""
    tinyauth = serve(lab, workers=2)
    context = client_context()
    held = [first_session(tinyauth, context) for _ in range(200)]
    same(len({session.id for session in held}), 200, "different ids")
    same([resumes(tinyauth, context, session) for session in held], [True] * 200, "resumed")


def test_sessions_survive_a_killed_worker(lab):
    """kill -9 of the worker that made a session: its successor resumes it."""
    tinyauth = serve(lab, workers=1)
    tinyauth.expect(r"event=worker_died .*signal=")
    context = client_context()
    session = first_session(tinyauth, context)
    os.kill(tinyauth.workers()[0], signal.SIGKILL)
    tinyauth.wait_event("worker_started", 2)
    same(from_each_worker(tinyauth, context, session), [True], "resumed")


def test_sessions_survive_a_reload(lab):
    """HUP with the same certificate keeps the workers and the sessions."""
    tinyauth = serve(lab, workers=2)
    context, workers = client_context(), tinyauth.workers()
    session = first_session(tinyauth, context)
    published = len(tinyauth.events("keys_published"))
    tinyauth.signal(signal.SIGHUP)
    tinyauth.wait_event("keys_published", published + 1)
    same(from_each_worker(tinyauth, context, session), [True] * 2, "resumed")
    same(sorted(tinyauth.workers()), sorted(workers), "workers")


@alone
def test_sessions_survive_an_upgrade(lab):
    """USR2, twice: the new binary's workers resume what the old ones made, and its own sessions live as well."""
    tinyauth = serve(lab, workers=2)
    context = client_context()
    sessions = [first_session(tinyauth, context)]
    for count in (2, 3):
        workers = tinyauth.workers()
        tinyauth.signal(signal.SIGUSR2)
        tinyauth.wait_event("ready", count)
        until(lambda: not any(map(alive, workers)), "end of the old workers")
        for session in sessions:
            same(from_each_worker(tinyauth, context, session), [True] * 2, f"resumed after upgrade {count - 1}")
        sessions.append(first_session(tinyauth, context))


def test_sessions_end_with_the_key(lab):
    """A certificate with another key: no old session is resumed, new ones are; also when the old pair comes back."""
    made = authority(lab)
    first, second = made.good(), made.leaf(key=made.make_key("p256"))
    tinyauth = serve_copy(lab, first, workers=2)
    context = client_context()
    old = first_session(tinyauth, context)
    take_into_use(tinyauth, second)
    same(from_each_worker(tinyauth, context, old), [False] * 2, "resumed under another key")
    new = first_session(tinyauth, context)
    same(from_each_worker(tinyauth, context, new), [True] * 2, "new sessions")
    take_into_use(tinyauth, first)
    same([resumes(tinyauth, context, session) for session in (old, new)], [False] * 2, "resumed under the first key again")


def test_sessions_outlive_a_renewal(lab):
    """A new certificate for the same key: sessions are resumed as before."""
    made = authority(lab)
    tinyauth = serve_copy(lab, made.good(), workers=2)
    context = client_context()
    session = first_session(tinyauth, context)
    renewed = made.leaf(subject="/CN=renewed.test")
    take_into_use(tinyauth, renewed)
    same(from_each_worker(tinyauth, context, session), [True] * 2, "resumed under the new certificate")
    client = connect(tinyauth, context=client_context(made.root.cert))
    same(client.tls.getpeercert()["subject"][0][0], ("commonName", "renewed.test"), "certificate of a full handshake")
