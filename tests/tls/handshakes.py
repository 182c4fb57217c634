"""Goal: whoever speaks TLS 1.2 with ECDHE on P-256 and an AEAD suite gets in, with every kind of key; nobody else does."""

import concurrent.futures
import contextlib
import http.client
import json
import re
import ssl
import subprocess
import time
from pathlib import Path

import hello
from lab import (ALICE, HERE, KINDS, SUITES, SecureClient, authority, client_context, connect, curl, failures, last_request,
                 raw_connect, s_client, same, serve, still_serves, until)
from secure import openssl

STANDARD_NAMES = {"AES128-GCM": "AES_128_GCM", "AES256-GCM": "AES_256_GCM", "CHACHA20-POLY1305": "CHACHA20_POLY1305"}


def every_key(lab):
    """(kind, tinyauth) for every kind of key that is served."""
    with concurrent.futures.ThreadPoolExecutor(len(KINDS)) as pool:
        list(pool.map(authority(lab).key, KINDS))
    return [(kind, serve(lab, pair=authority(lab).good(kind))) for kind in KINDS]


# Clients

def test_openssl_every_suite_and_key(lab):
    """openssl s_client gets an answer with each suite and each kind of key, verifying the certificate."""
    for kind, tinyauth in every_key(lab):
        for suite in SUITES[KINDS[kind]]:
            status, said = s_client(tinyauth, "-tls1_2", "-cipher", suite, "-CAfile", authority(lab).root.cert, "-servername",
                                    "localhost", "-verify_hostname", "localhost", "-verify_return_error", "-ign_eof",
                                    text=last_request())
            what = f"{suite} with {kind}: {said[-600:]}"
            assert "HTTP/1.1 200 OK" in said and "Verify return code: 0 (ok)" in said and status == 0, what
            # "Server" until OpenSSL 3.4, "Peer" since
            assert f"Cipher is {suite}" in said and re.search("(Server|Peer) Temp Key: ECDH, prime256v1", said), what


def test_curl_every_suite_and_key(lab):
    """curl does, too, also when it offers HTTP/2 first."""
    for kind, tinyauth in every_key(lab):
        for suite in SUITES[KINDS[kind]]:
            status, body, said = curl(tinyauth, "--cacert", authority(lab).root.cert, "--ciphers", suite, "--http2")
            same((status, json.loads(body or b"{}").get("target")), (0, "/t/echo"), f"{suite} with {kind}: {said[-600:]}")
            assert re.search(rf"SSL connection using TLSv1\.2 / {suite}\b", said), f"{suite} with {kind}: {said}"
            assert "server accepted http/1.1" in said, f"ALPN: {said}"


def test_node_every_suite_and_key(lab):
    """node's https does, and its keep-alive agent asks twice on one connection."""
    jobs, wanted = [], []
    for kind, tinyauth in every_key(lab):
        for suite in SUITES[KINDS[kind]]:
            jobs.append({"port": tinyauth.address[1], "cipher": suite})
            wanted.append(next(name for word, name in STANDARD_NAMES.items() if word in suite))
    work = {"jobs": jobs, "ca": authority(lab).root.cert, "key": ALICE}
    done = subprocess.run(["node", HERE / "client.mjs", json.dumps(work)], capture_output=True, timeout=60, text=True)
    same(done.returncode, 0, f"node: {done.stderr}")
    for job, name, result in zip(jobs, wanted, json.loads(done.stdout)):
        assert isinstance(result, list), f"{job}: {result}"
        same([(one["status"], one["protocol"]) for one in result], [(200, "TLSv1.2")] * 2, f"{job}")
        same([one["reused"] for one in result], [False, True], f"connections of {job}")
        assert all(name in one["cipher"] for one in result), f"{job}: {result}"


def test_python_every_suite_and_key(lab):
    """http.client over ssl does, with two requests on one connection."""
    for kind, tinyauth in every_key(lab):
        for suite in SUITES[KINDS[kind]]:
            context = client_context(authority(lab).root.cert, ciphers=suite)
            connection = http.client.HTTPSConnection("localhost", tinyauth.address[1], timeout=10, context=context)
            with contextlib.closing(connection):
                for _ in range(2):
                    connection.request("GET", "/t/echo", headers={"Authorization": f"Bearer {ALICE}"})
                    answer = connection.getresponse()
                    same((answer.status, json.loads(answer.read())["target"]), (200, "/t/echo"), f"{suite} with {kind}")
                same(connection.sock.cipher()[:2], (suite, "TLSv1.2"), "suite")


def test_suites_in_the_servers_order(lab):
    """The server chooses: AES first where there are instructions for it that are used, else ChaCha20, whatever the client prefers."""
    has_aes = re.search(r"^flags\s*:.*\baes\b", Path("/proc/cpuinfo").read_text(), re.M)     # BearSSL uses those of x86 alone
    for kind, family in (("p256", "ECDSA"), ("rsa2048", "RSA")):
        tinyauth = serve(lab, pair=authority(lab).good(kind))
        for ciphers in (SUITES[KINDS[kind]], SUITES[KINDS[kind]][::-1]):
            client = connect(tinyauth, context=client_context(ciphers=":".join(ciphers)))
            suite = f"ECDHE-{family}-" + ("AES128-GCM-SHA256" if has_aes else "CHACHA20-POLY1305")
            same(client.tls.cipher()[0], suite, f"suite of {ciphers}")


# Keys and chains

def test_key_file_forms(lab):
    """PKCS#8, SEC1 with and without EC PARAMETERS, PKCS#1, one file for both, words around, no last line end: all work."""
    made = authority(lab)
    for kind in ("p256", "p384", "rsa2048"):
        good = made.good(kind)
        key = Path(good.key)
        old = key.with_suffix(".old")
        openssl("ec" if KINDS[kind] == "EC" else "rsa", "-in", key, *(["-traditional"] if KINDS[kind] == "RSA" else []), "-out", old)
        assert ("BEGIN EC PRIVATE KEY" if KINDS[kind] == "EC" else "BEGIN RSA PRIVATE KEY") in old.read_text(), "the older form"
        forms = {"PKCS#8": (good.cert, good.key), "the older form": (good.cert, old)}
        if KINDS[kind] == "EC":
            parameters = key.with_suffix(".parameters")
            openssl("ecparam", "-name", {"p256": "prime256v1", "p384": "secp384r1"}[kind], "-out", parameters)
            forms["EC PARAMETERS before it"] = (good.cert, made.joined(parameters, old))
        if kind == "p256":
            both = made.joined(good.cert, good.key)
            Path(both).write_text("Bag Attributes\n  friendlyName: x\n" + Path(both).read_text())
            forms["one file, words before"] = (both, both)
            cut = made.joined(good.key)
            Path(cut).write_text(Path(cut).read_text().rstrip())
            forms["no last line end"] = (good.cert, cut)
        for what, (cert, private) in forms.items():
            tinyauth = lab.tinyauth("--tls-cert", str(cert), "--tls-key", str(private))
            client = connect(tinyauth, context=client_context(made.root.cert))
            same(client.ask("GET", "/t/echo").status, 200, f"{kind}, {what}")


def test_files_from_windows(lab):
    """CR LF at the line ends of certificate and key is as good as LF."""
    good = authority(lab).good()
    paths = [authority(lab).joined(path) for path in (good.cert, good.key)]
    for path in paths:
        Path(path).write_bytes(Path(path).read_bytes().replace(b"\n", b"\r\n"))
    tinyauth = lab.tinyauth("--tls-cert", paths[0], "--tls-key", paths[1])
    same(connect(tinyauth).ask("GET", "/t/echo").status, 200, "status")


def test_chain_with_an_intermediate(lab):
    """A leaf and its intermediate in one file satisfy clients that trust only the root; the leaf alone does not."""
    made = authority(lab)
    for kind in ("p256", "rsa2048"):
        leaf = made.leaf(kind, issuer=made.intermediate)
        chain = made.joined(leaf.cert, made.intermediate.cert)
        whole = lab.tinyauth("--tls-cert", chain, "--tls-key", leaf.key)
        alone = lab.tinyauth(*leaf.options)
        alone.expect(r"event=tls_failed .*error=client_rejects_certificate")
        same(connect(whole, context=client_context(made.root.cert)).ask("GET", "/t/echo").status, 200, "with the intermediate")
        same(curl(whole, "--cacert", made.root.cert)[0], 0, "curl")
        try:
            connect(alone, context=client_context(made.root.cert))
        except ssl.SSLCertVerificationError:
            failures(alone, 1)
            continue
        raise AssertionError("a leaf without its intermediate was believed")


# Who is refused

# what the client offers: options of s_client, the alert that it must get (RFC 5246 7.2), the word in the log
REFUSED = {
    # the alert comes in a record of TLS 1.2, which openssl takes ill here: test_old_hellos looks at the alert itself
    "TLS 1.0": (["-tls1", "-cipher", "ALL:@SECLEVEL=0"], "wrong version number", "version"),
    "TLS 1.1": (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], "wrong version number", "version"),
    "TLS 1.3 only": (["-tls1_3"], "alert handshake failure", "no_common_suite"),    # its hello says 1.2 and offers other suites
    "CBC only": (["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA:ECDHE-RSA-AES128-SHA256"],
                 "alert handshake failure", "no_common_suite"),
    "static RSA only": (["-tls1_2", "-cipher", "AES128-GCM-SHA256:AES256-GCM-SHA384"], "alert handshake failure", "no_common_suite"),
    "finite-field DHE only": (["-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256:DHE-RSA-CHACHA20-POLY1305"],
                              "alert handshake failure", "no_common_suite"),
    "CCM only": (["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-CCM:ECDHE-ECDSA-AES128-CCM8"], "alert handshake failure", "no_common_suite"),
    "the other kind of key only": (["-tls1_2", "-cipher", "ECDHE-RSA-AES128-GCM-SHA256"], "alert handshake failure", "no_common_suite"),
    "X25519 only": (["-tls1_2", "-groups", "X25519"], "alert handshake failure", "no_common_suite"),
    "P-384 and P-521 only": (["-tls1_2", "-groups", "P-384:P-521"], "alert handshake failure", "no_common_suite"),
}


def test_other_clients_are_refused(lab):
    """Older and newer versions only, other suites only, other groups only (the key exchange is ECDHE on P-256): an alert, and
    a log line with the name that was asked for."""
    tinyauth = serve(lab)
    tinyauth.expect("event=tls_failed")
    workers = tinyauth.workers()
    for number, (what, (options, alert, word)) in enumerate(REFUSED.items(), 1):
        name = f"client{number}.test"
        _, said = s_client(tinyauth, "-servername", name, *options)
        assert alert in said and "Cipher is (NONE)" in said, f"{what}: {said[-400:]}"
        record = failures(tinyauth, number)[-1]
        same((record["addr"], record["sni"], record["error"]), ("127.0.0.1", name, word), what)
    still_serves(tinyauth, workers)


def test_old_hellos(lab):
    """SSL 3.0, TLS 1.0 and TLS 1.1 get the alert protocol_version."""
    tinyauth = serve(lab)
    tinyauth.expect("event=tls_failed .*error=version")
    for number, version in enumerate((0x0300, 0x0301, 0x0302), 1):
        sock = raw_connect(tinyauth)
        sock.sendall(hello.record(22, hello.hello(version), 0x0301))
        found, end = hello.read_records(sock)
        same((hello.alerts(found), end), ([70], "eof"), f"answer to {version:#x}")
        failures(tinyauth, number)


def test_rsa_clients_of_an_rsa_server_without_ecdhe(lab):
    """An RSA key brings no static RSA back."""
    tinyauth = serve(lab, pair=authority(lab).good("rsa2048"))
    tinyauth.expect("event=tls_failed")
    for suites in ("AES128-GCM-SHA256", "AES256-SHA", "DHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-SHA"):
        _, said = s_client(tinyauth, "-tls1_2", "-cipher", suites)
        assert "alert handshake failure" in said, f"{suites}: {said[-400:]}"
    same({record["error"] for record in failures(tinyauth, 4)}, {"no_common_suite"}, "errors")


def test_alpn(lab):
    """http/1.1 is answered with itself, also beside h2; h2 alone gets no_application_protocol; none is fine."""
    tinyauth = serve(lab)
    tinyauth.expect("event=tls_failed")
    for offered, chosen in ((["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "http/1.1"), (["http/1.0", "http/1.1", "h2"], "http/1.1"),
                            (None, None)):
        client = connect(tinyauth, context=client_context(**({"alpn": offered} if offered else {})))
        same((client.tls.selected_alpn_protocol(), client.ask("GET", "/t/echo").status), (chosen, 200), f"offered {offered}")
    for number, offered in enumerate((["h2"], ["h2", "http/1.0"], ["http/1.1x"], ["HTTP/1.1"]), 1):
        try:
            connect(tinyauth, context=client_context(alpn=offered), name="alpn.test")
        except ssl.SSLError as error:
            assert "no application protocol" in str(error).lower().replace("_", " "), f"{offered}: {error}"
        else:
            raise AssertionError(f"{offered} was taken")
        record = failures(tinyauth, number)[-1]
        same((record["sni"], record["error"]), ("alpn.test", "no_common_protocol"), f"log of {offered}")


def test_names_in_the_log_are_escaped(lab):
    """A name that a client asks for cannot forge a log line, nor break one, however long it is."""
    tinyauth = serve(lab)
    tinyauth.expect("event=tls_failed")
    names = (b"a\nevent=ready\tx", b'a" status=200 key="alice', b"\x1b[31mred", b"\0", b"", b"x" * 255, b"y" * 5000, b"\xff\xfe")
    for name in names:
        sock = raw_connect(tinyauth)
        sock.sendall(hello.records(22, hello.hello(name=name, groups=(29,)), 16000))
        found, end = hello.read_records(sock)
        assert hello.alerts(found) and end == "eof", f"{name[:20]}: {found}, {end}"
    failed = failures(tinyauth, len(names))
    same([len(tinyauth.events("tls_failed")), {record["error"] for record in failed}], [len(names), {"no_common_suite"}], "lines")
    for _, line in tinyauth.lines:
        assert all(0x20 <= byte < 0x7f for byte in line) and len(line) < 1000, f"line {line[:100]}"


def test_renegotiation_is_refused(lab):
    """A client that wants to renegotiate is told no; it ends the connection, and others are served as before."""
    tinyauth = serve(lab)
    workers = tinyauth.workers()
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{tinyauth.address[1]}", "-tls1_2"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""
    try:
        process.stdin.write(b"R\n")
        process.stdin.flush()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            said = pool.submit(process.stdout.read).result(10)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert b"RENEGOTIATING" in said and b"no renegotiation" in said, f"s_client says {said[-500:]}"
    still_serves(tinyauth, workers)


def test_secure_renegotiation_is_signalled(lab):
    """The server knows RFC 5746, so that careful clients take it."""
    _, said = s_client(serve(lab), "-tls1_2")
    assert "Secure Renegotiation IS supported" in said, said


def test_compression_is_never_used(lab):
    """A client that offers compression, too, is answered without."""
    tinyauth = serve(lab)
    sock = raw_connect(tinyauth)
    sock.sendall(hello.record(22, hello.hello(compression=b"\1\0")))
    found, _ = hello.read_records(sock)
    body = found[0][1]
    same((found[0][0], body[0], body[4 + 34 + 1 + body[38] + 2]), (22, 2, 0), "type, message and compression of ServerHello")
    tinyauth.expect("event=tls_failed")


def test_handshake_in_pieces(lab):
    """A handshake whose bytes come one by one, and one whose messages are split over many records, succeeds."""
    tinyauth = serve(lab)
    for size in (1, 2, 7, 200):
        sock = raw_connect(tinyauth)
        message = hello.hello(name=b"localhost", protocols=(b"h2", b"http/1.1"))
        for byte in hello.records(22, message, size):
            sock.sendall(bytes([byte]))
        found, end = hello.read_records(sock)
        assert end == "open" and found[0][1][0] == 2, f"hello in records of {size}: {found}, {end}"
        sock.close()
    tinyauth.expect("event=tls_failed .*error=cut")
    still_serves(tinyauth, tinyauth.workers())


def test_many_handshakes_at_once(lab):
    """Handshakes that stand half done beside each other all come to their end, and none holds up another."""
    tinyauth = serve(lab)
    tinyauth.expect("event=tls_failed .*error=cut")
    halves = [raw_connect(tinyauth) for _ in range(30)]
    for sock in halves:
        sock.sendall(hello.HELLO[:40])
    began = time.monotonic()
    same({connect(tinyauth).ask("GET", "/t/echo").status for _ in range(10)}, {200}, "statuses")
    assert time.monotonic() - began < 5, "slow beside half hellos"
    for sock in halves:
        sock.sendall(hello.HELLO[40:])
    for sock in halves:
        found, end = hello.read_records(sock)
        same((found[0][1][0], end), (2, "open"), "answer to the second half")
    until(lambda: not tinyauth.events("tls_failed"), "quiet log")
    same(SecureClient(tinyauth.address).ask("GET", "/t/echo").status, 200, "after them")
