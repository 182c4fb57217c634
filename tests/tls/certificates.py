"""Goal: a certificate or key that cannot serve is refused at start and by `check`, in one line that names the file."""

import base64
import re
import time
from pathlib import Path

from lab import authority, connect, curl, same, serve
from secure import Pair, openssl

YEARS = ("20200101000000Z", "20490101000000Z")


def changed(lab, path, change):
    """A file made of another's bytes."""
    made = Path(authority(lab).joined(path))
    made.write_bytes(change(made.read_bytes()))
    return str(made)


def bad_pairs(lab):
    """What is wrong: (pair, which file the line must name, a word that it must hold)."""
    made = authority(lab)
    good, other = made.good(), made.good("rsa2048")
    cert, key = good.cert, good.key
    encrypted = made.path("encrypted.key")
    openssl("pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", encrypted)
    old = made.path("encrypted-old.key")
    openssl("ec", "-in", key, "-aes256", "-passout", "pass:x", "-out", old)
    empty, missing, folder = changed(lab, cert, lambda data: b""), str(made.path("missing")), str(made.folder)
    return {
        "no certificate file": (Pair(missing, key), missing, "No such file"),
        "no key file": (Pair(cert, missing), missing, "No such file"),
        "a folder": (Pair(folder, key), folder, ""),
        "an empty certificate file": (Pair(empty, key), empty, "certificate"),
        "an empty key file": (Pair(cert, empty), empty, "key"),
        "DER": (Pair(changed(lab, cert, lambda data: bytes(range(256)) * 4), key), None, ""),
        "half a certificate": (Pair(changed(lab, cert, lambda data: data[:len(data) // 2]), key), None, ""),
        "half a key": (Pair(cert, changed(lab, key, lambda data: data[:len(data) // 2])), None, ""),
        "a broken line": (Pair(changed(lab, cert, lambda data: data.replace(b"\n", b"\n!", 2)), key), None, "PEM"),
        "a certificate of zeros": (Pair(changed(lab, cert, lambda data: pem("CERTIFICATE", bytes(500))), key), None, ""),
        "a key of zeros": (Pair(cert, changed(lab, key, lambda data: pem("PRIVATE KEY", bytes(100)))), None, "key"),
        "the files mixed up": (Pair(key, cert), key, "certificate"),
        "the key of another kind": (Pair(cert, other.key), other.key, "not that of the certificate"),
        "the key of another certificate": (Pair(cert, made.make_key("p256")), None, "not that of the certificate"),
        "another RSA key": (Pair(other.cert, made.make_key("rsa2048")), None, "not that of the certificate"),
        "an encrypted key": (Pair(cert, encrypted), str(encrypted), "encrypted"),
        "an encrypted key, older form": (Pair(cert, old), str(old), ""),
        "expired": (made.leaf(days=-1), None, "expired"),
        "P-521": (made.leaf("p521"), None, ""),
        "secp256k1": (made.leaf("secp256k1"), None, ""),
        "Ed25519": (made.leaf("ed25519"), None, ""),
        "RSA of 1024 bits": (made.leaf("rsa1024"), None, "1024"),
        "the intermediate first": (Pair(made.joined(made.intermediate.cert, cert), key), None, "not that of the certificate"),
        "too many certificates": (Pair(made.joined(*[cert] * 9), key), None, "certificates"),
    }


def pem(name, data):
    lines = base64.encodebytes(data).decode().replace("\n\n", "\n")
    return f"-----BEGIN {name}-----\n{lines}-----END {name}-----\n".encode()


def test_bad_pairs_are_refused(lab):
    """Each gets status 78 at start and 1 from check, with one line on stderr that names the file."""
    lab.write(lab.path("keys"), "alice secret-0123456789\n")
    wrong = []
    for what, (pair, named, word) in bad_pairs(lab).items():
        for args, status in ((["check"], 1), ([], 78)):
            done = lab.run(*args, "-k", lab.path("keys"), "-l", "127.0.0.1:0", *pair.options, status=(0, 1, 64, 78))
            lines = done.stderr.splitlines()
            files = [named] if named else [pair.cert, pair.key]
            if done.returncode != status or len(lines) != 1 or not any(file in lines[0] for file in files) or word not in lines[0]:
                wrong.append(f"{what}, {' '.join(args) or 'start'}: {done.returncode} {done.stderr!r}")
    same(wrong, [], "pairs that were not refused as they should be")


def test_both_options_or_neither(lab):
    """One of the two options alone is refused, on the command line and from the environment."""
    lab.write(lab.path("keys"), "alice secret-0123456789\n")
    good = authority(lab).good()
    for options, env in ((good.options[:2], {}), (good.options[2:], {}), ((), {"TINYAUTH_TLS_CERT": good.cert})):
        for args, status in ((["check"], 1), ([], 78)):
            done = lab.run(*args, "-k", lab.path("keys"), "-l", "127.0.0.1:0", *options, status=(status, 64), **env)
            assert len(done.stderr.splitlines()) == 1 and "--tls-key" in done.stderr, f"{options}: {done.stderr!r}"


def test_options_from_the_environment(lab):
    """TINYAUTH_TLS_CERT and TINYAUTH_TLS_KEY do what the options do."""
    good = authority(lab).good()
    tinyauth = lab.tinyauth(env={"TINYAUTH_TLS_CERT": good.cert, "TINYAUTH_TLS_KEY": good.key})
    same(connect(tinyauth).ask("GET", "/t/echo").status, 200, "status")


def test_check_shows_the_certificate(lab):
    """check prints subject, names and the day of expiry, and whether all is well; without TLS it says that there is none."""
    lab.write(lab.path("keys"), "alice secret-0123456789\n")
    made = authority(lab)
    leaf = made.leaf(days=("20200101000000Z", "20490203040506Z"), subject="/O=Example, Inc./CN=models.example",
                     names="DNS:models.example,DNS:*.models.example,IP:192.0.2.7,IP:2001:db8::7")
    done = lab.run("check", "-k", lab.path("keys"), *leaf.options)
    for word in ("models.example", "Example, Inc.", "*.models.example", "192.0.2.7", "2001:db8::7", "2049-02-03", leaf.cert):
        assert word in done.stdout, f"no {word} in {done.stdout}"
    same(done.stderr, "", "warnings")
    assert re.search(r"^tls\s+none", lab.run("check", "-k", lab.path("keys")).stdout, re.M), "what check says without TLS"


def test_dates_before_and_after_2050(lab):
    """Both forms of a date (UTCTime up to 2049, GeneralizedTime from 2050) are understood."""
    lab.write(lab.path("keys"), "alice secret-0123456789\n")
    for end, day in (("20491231235959Z", "2049-12-31"), ("20500101000000Z", "2050-01-01"), ("21231231235959Z", "2123-12-31")):
        leaf = authority(lab).leaf(days=("19990101000000Z", end))
        done = lab.run("check", "-k", lab.path("keys"), *leaf.options)
        assert day in done.stdout and not done.stderr, f"{end}: {done}"


def dated(lab, seconds):
    """A certificate that ends so many seconds from now."""
    end = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + seconds))
    return authority(lab).leaf(days=("20200101000000Z", end))


def test_certificate_that_ends_soon(lab):
    """From 14 days before its end: a warning in check, with status 0, and one in the log; not before."""
    lab.write(lab.path("keys"), "alice secret-0123456789\n")
    day = 86400
    for days, warned in ((13.9, True), (0.1, True), (14.1, False)):
        leaf = dated(lab, days * day)
        done = lab.run("check", "-k", lab.path("keys"), *leaf.options)
        same((leaf.cert in done.stderr and "expires" in done.stderr), warned, f"warning of check {days} days before: {done.stderr!r}")
        tinyauth = lab.tinyauth(*leaf.options)
        tinyauth.expect("event=certificate_ends_soon")
        same(len(tinyauth.events("certificate_ends_soon")), int(warned), f"warnings in the log {days} days before")
        same(connect(tinyauth).ask("GET", "/t/echo").status, 200, "status")


def test_certificate_that_is_not_good_yet(lab):
    """One whose time has not come is served, with a warning in check and log: this machine's clock may be wrong."""
    lab.write(lab.path("keys"), "alice secret-0123456789\n")
    leaf = authority(lab).leaf(days=("20480101000000Z", "20490101000000Z"))
    assert leaf.cert in lab.run("check", "-k", lab.path("keys"), *leaf.options).stderr, "no warning of check"
    tinyauth = lab.tinyauth(*leaf.options)
    tinyauth.expect("event=certificate_not_yet_good")
    same(len(tinyauth.events("certificate_not_yet_good")), 1, "warnings in the log")


def test_certificate_that_ends_while_it_is_served(lab):
    """It goes on being served: clients decide. Nothing is said more than once a day."""
    leaf = dated(lab, 3)
    tinyauth = lab.tinyauth(*leaf.options)
    tinyauth.expect("event=certificate_(ends_soon|expired)")
    time.sleep(3.5)
    same(connect(tinyauth).ask("GET", "/t/echo").status, 200, "status")
    assert curl(tinyauth, "--cacert", authority(lab).root.cert)[0] == 60, "curl believes an expired certificate"
    tinyauth.expect("event=tls_failed .*error=client_rejects_certificate")


def test_odd_certificates(lab):
    """No subject, no names, hundreds of names, names with odd bytes: shown as far as there is room, and served."""
    lab.write(lab.path("keys"), "alice secret-0123456789\n")
    made = authority(lab)
    many = ",".join(f"DNS:host-{i:03}.models.example" for i in range(200))
    for what, more in (("no subject", {"subject": "/"}), ("many names", {"names": many}),
                       ("a name of another kind", {"names": "email:a@b.test,URI:http://x.test/"})):
        leaf = made.leaf(days=YEARS, **more) if what != "no subject" else made.leaf(**more)
        done = lab.run("check", "-k", lab.path("keys"), *leaf.options)
        assert re.search(r"^expires\s+20\d\d-", done.stdout, re.M), f"{what}: {done.stdout}"
        tinyauth = lab.tinyauth(*leaf.options)
        same(connect(tinyauth).ask("GET", "/t/echo").status, 200, what)


def broken_der(lab, mark, at, byte):
    """The good certificate with one byte changed, `at` bytes behind the last place of a mark in its DER."""
    der = bytearray(openssl("x509", "-in", authority(lab).good().cert, "-outform", "DER").stdout)
    der[der.rindex(mark) + at] = byte
    made = authority(lab).path(authority(lab).fresh_name() + ".crt")
    made.write_bytes(pem("CERTIFICATE", bytes(der)))
    return Pair(made, authority(lab).good().key)


def test_broken_certificates_are_read_to_their_end(lab):
    """A certificate whose subject or extensions do not fit into each other is refused or shown in part: the reader ends."""
    lab.write(lab.path("keys"), "alice secret-0123456789\n")
    common_name, alt_name = b"\x06\x03\x55\x04\x03", b"\x06\x03\x55\x1d\x11"
    for what, mark, at, byte in (("the length of a set of the subject", common_name, -3, 0x7F), ("its tag", common_name, -4, 0),
                                 ("the length of a part of it", common_name, -1, 0x7F), ("its object's length", common_name, 1, 0x70),
                                 ("the length of an extension", alt_name, -1, 0x7F), ("its tag", alt_name, -2, 0),
                                 ("the object of an extension", alt_name, 1, 0x70), ("the names", alt_name, 8, 0x7F)):
        pair = broken_der(lab, mark, at, byte)
        done = lab.run("check", "-k", lab.path("keys"), *pair.options, status=(0, 1))
        assert done.returncode == 0 or len(done.stderr.splitlines()) == 1, f"{what}: {done}"


def test_listeners(lab):
    """Every TCP listener speaks TLS, a unix socket stays plain, and the log says which is which."""
    tinyauth = serve(lab, "-l", "127.0.0.1:0", "-l", "unix:" + lab.path("plain.sock"))
    kinds = [(event["addr"].startswith("unix:"), event["tls"]) for event in tinyauth.events("listening")]
    same(kinds, [(False, "yes"), (False, "yes"), (True, "no")], "listeners")
    for event in tinyauth.events("listening")[:2]:
        tinyauth.address = ("127.0.0.1", int(event["addr"].rpartition(":")[2]))
        echo = connect(tinyauth).ask("GET", "/t/echo").json()
        same([value for name, value in echo["headers"] if name == "X-Forwarded-Proto"], ["https"], "X-Forwarded-Proto over TLS")
    tinyauth.address = lab.path("plain.sock")
    echo = tinyauth.ask("GET", "/t/echo").json()
    same([value for name, value in echo["headers"] if name == "X-Forwarded-Proto"], ["http"], "X-Forwarded-Proto over unix")
