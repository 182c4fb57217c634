"""Goal: a renewed certificate is taken into use by itself, no request and no stream is lost, and a broken one changes nothing."""

import os
import shutil
import signal
import time
from pathlib import Path

from e2e import KEYS, WRONG, Load, Stream, alone
from lab import SecureClient, authority, client_context, connect, same, until
from secure import Pair
from sessions import replace, serve_copy


def subject(tinyauth, made):
    """The common name of the certificate that a new connection gets."""
    client = SecureClient(tinyauth.address, client_context(made.root.cert), name="localhost")
    try:
        return dict(part[0] for part in client.tls.getpeercert()["subject"])["commonName"]
    finally:
        client.close()


def named(made, name, kind="p256", fresh=False):
    return made.leaf(kind, key=made.make_key(kind) if fresh else None, subject=f"/CN={name}")


def wait_subject(tinyauth, made, name):
    until(lambda: subject(tinyauth, made) == name, f"certificate {name}", 5)


@alone
def test_renewal_under_load(lab):
    """Both files replaced three times without a signal, then by HUP, under load: new connections see the new certificate
    within 5 s, no request fails and every stream is whole."""
    made = authority(lab)
    pairs = [named(made, f"{i}.test", kind, fresh=True) for i, kind in enumerate(("p256", "rsa2048", "p384", "p256"))]
    tinyauth = serve_copy(lab, made.good(), workers=2)
    tinyauth.expect("event=certificate_refused")    # a look between the two files
    streams = [Stream(tinyauth.connect(), 400, 20) for _ in range(4)]
    loads = [Load(tinyauth, 2), Load(tinyauth, 2, fresh=True)]
    for i, pair in enumerate(pairs):
        replace(tinyauth, pair)
        if i == 3:
            tinyauth.signal(signal.SIGHUP)
        wait_subject(tinyauth, made, f"{i}.test")
    for load in loads:
        load.wait_done(load.done + 50)
    same([load.stop() for load in loads], [[], []], "failed requests")
    assert all(stream.whole() for stream in streams), f"streams: {[stream.error for stream in streams]}"


@alone
def test_idle_connection_outlives_a_renewal(lab):
    """A kept-alive connection made under the old certificate is answered once more, and told to close."""
    made = authority(lab)
    tinyauth = serve_copy(lab, made.good())
    client = connect(tinyauth)
    same(client.ask("GET", "/t/echo").closes, False, "Connection: close before")
    replace(tinyauth, named(made, "after.test", fresh=True))
    wait_subject(tinyauth, made, "after.test")
    answer = client.ask("GET", "/t/echo")
    same((answer.status, answer.closes, client.end()), (200, True, "eof"), "answer, its Connection and the end")
    tinyauth.expect("event=certificate_refused")


def test_hup_takes_the_new_pair(lab):
    """By HUP it is taken at once."""
    made = authority(lab)
    tinyauth = serve_copy(lab, made.good())
    replace(tinyauth, named(made, "hup.test", fresh=True))
    tinyauth.signal(signal.SIGHUP)
    tinyauth.wait_event("certificate", 2, 1)
    wait_subject(tinyauth, made, "hup.test")
    same(tinyauth.events("certificate")[1]["subject"], "CN=hup.test", "logged subject")


def test_links_as_acme_clients_have_them(lab):
    """Files that are links, of which only the targets change, are noticed too."""
    made = authority(lab)
    live, archive = lab.path("live"), lab.path("archive")
    os.mkdir(live)
    os.mkdir(archive)
    own = Pair(f"{live}/fullchain.pem", f"{live}/privkey.pem")
    for number, pair in enumerate((made.good(), named(made, "link.test", fresh=True))):
        for link, source in ((own.key, pair.key), (own.cert, pair.cert)):
            target = f"{archive}/{Path(link).stem}{number}.pem"
            shutil.copy(source, target)
            os.symlink(target, link + ".new")
            os.rename(link + ".new", link)
        if number == 0:
            tinyauth = lab.tinyauth(*own.options)
            tinyauth.expect("event=certificate_refused")
    wait_subject(tinyauth, made, "link.test")


def break_pair(tinyauth, cert=None, key=None):
    """Writes other bytes in place of the certificate, the key or both."""
    for path, data in ((tinyauth.pair.cert, cert), (tinyauth.pair.key, key)):
        if data is not None:
            Path(path + ".new").write_bytes(data)
            os.rename(path + ".new", path)


def test_broken_pair_keeps_the_old_one(lab):
    """A key of another certificate, half a file, an empty one, an expired one: by HUP and by itself the old pair stays, the
    log says so, and the mended pair is taken."""
    made = authority(lab)
    old = named(made, "old.test")
    tinyauth = serve_copy(lab, old, workers=1)
    tinyauth.expect("event=certificate_refused")
    workers = tinyauth.workers()
    good = Path(made.good().cert).read_bytes()
    cases = ({"key": Path(made.good("rsa2048").key).read_bytes()}, {"cert": good[:len(good) // 2]}, {"cert": b""}, {"key": b""},
             {"cert": Path(made.leaf(days=-1).cert).read_bytes()})
    for number, case in enumerate(cases, 1):
        replace(tinyauth, old)
        seen = len(tinyauth.events("certificate_refused"))
        break_pair(tinyauth, **case)
        if number % 2:
            tinyauth.signal(signal.SIGHUP)
        refused = tinyauth.wait_event("certificate_refused", seen + 1)
        path = tinyauth.pair.cert if "cert" in case else tinyauth.pair.key
        assert path in refused["what"] or "not that of" in refused["what"], f"what is said of {case}: {refused}"
        same(subject(tinyauth, made), "old.test", f"certificate after {case}")
    same(sorted(tinyauth.workers()), sorted(workers), "workers")
    replace(tinyauth, named(made, "mended.test", fresh=True))
    wait_subject(tinyauth, made, "mended.test")


def test_missing_pair_keeps_the_old_one(lab):
    """Files that go away change nothing, and new ones are taken when they come."""
    made = authority(lab)
    tinyauth = serve_copy(lab, named(made, "old.test"))
    tinyauth.expect("event=certificate_refused")
    os.unlink(tinyauth.pair.cert)
    os.unlink(tinyauth.pair.key)
    tinyauth.wait_event("certificate_refused")
    same(subject(tinyauth, made), "old.test", "certificate with both files gone")
    replace(tinyauth, named(made, "back.test", fresh=True))
    wait_subject(tinyauth, made, "back.test")


def test_slow_renewal(lab):
    """A certificate that is written long before its key, and slowly, is taken once both are there; nobody notices before."""
    made = authority(lab)
    tinyauth = serve_copy(lab, named(made, "old.test"))
    tinyauth.expect("event=certificate_refused")
    fresh = named(made, "slow.test", fresh=True)
    with open(tinyauth.pair.cert, "wb") as file:
        data = Path(fresh.cert).read_bytes()
        for at in range(0, len(data), 100):
            file.write(data[at:at + 100])
            file.flush()
            time.sleep(0.1)             # slow on purpose
    tinyauth.wait_event("certificate_refused")
    same(subject(tinyauth, made), "old.test", "certificate between the two")
    Path(tinyauth.pair.key).write_bytes(Path(fresh.key).read_bytes())
    wait_subject(tinyauth, made, "slow.test")


def test_keys_edit_beside_a_broken_certificate(lab):
    """HUP with a broken certificate still publishes the keys."""
    made = authority(lab)
    tinyauth = serve_copy(lab, made.good())
    tinyauth.expect("event=certificate_refused")
    break_pair(tinyauth, cert=b"broken")
    tinyauth.publish(KEYS + f"new {WRONG}\n")
    same(tinyauth.ask("GET", "/t/echo", key=WRONG).status, 200, "the new key")


def test_supervisor_forgets_old_keys(lab):
    """After many renewals its memory is what it was: the old pair is unmapped."""
    made = authority(lab)
    tinyauth = serve_copy(lab, made.good())
    pairs = [named(made, f"{i}.test", fresh=True) for i in range(4)]

    def renew(pair):
        seen = len(tinyauth.events("certificate"))
        replace(tinyauth, pair)
        tinyauth.signal(signal.SIGHUP)
        tinyauth.wait_event("certificate", seen + 1)

    def maps():
        return len(Path(f"/proc/{tinyauth.pid}/maps").read_text().splitlines())
    renew(pairs[0])
    before = maps()
    for i in range(1, 9):
        renew(pairs[i % 4])
    assert maps() <= before, f"{maps()} mappings, {before} before"


def test_clients_see_one_certificate_or_the_other(lab):
    """While the pair changes back and forth every handshake is whole: certificate and key always belong together."""
    made = authority(lab)
    pairs = [named(made, "a.test", fresh=True), named(made, "b.test", "rsa2048", fresh=True)]
    tinyauth = serve_copy(lab, pairs[0], workers=2)
    tinyauth.expect("event=certificate_refused")
    seen, end = set(), time.monotonic() + 20
    for turn in range(4):
        replace(tinyauth, pairs[turn % 2])
        tinyauth.signal(signal.SIGHUP)
        want = ("a.test", "b.test")[turn % 2]
        while (found := subject(tinyauth, made)) != want and time.monotonic() < end:
            seen.add(found)
        seen.add(found)
    same(seen, {"a.test", "b.test"}, "certificates seen")
