"""Goal: sslscan and testssl.sh find nothing but the absence of TLS 1.3."""

import json
import os
import re
import shutil
import subprocess

from e2e import Skip, alone
from lab import authority, same, serve, still_serves

# Findings of testssl.sh above LOW that are known: id and why.
KNOWN = {
    "cert_revocation": "the test's own authority names no revocation service",
    "security_headers": "headers are the model's matter; what has a body of ours is an answer to a program",
}
WEAK = ("MEDIUM", "HIGH", "CRITICAL")


def environment():
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def sslscan(tinyauth):
    command = ["sslscan", "--no-colour", "--sni-name=localhost", f"127.0.0.1:{tinyauth.address[1]}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, text=True, env=environment())
    same(done.returncode, 0, f"sslscan: {done.stdout}{done.stderr}")
    return done.stdout


@alone
def test_sslscan(lab):
    """sslscan sees TLS 1.2 alone, six suites or three a key, P-256, no compression, no renegotiation and no heartbeat."""
    if not shutil.which("sslscan"):
        raise Skip("sslscan is not here")
    for kind, suites in (("p256", "ECDHE-ECDSA"), ("rsa2048", "ECDHE-RSA")):
        tinyauth = serve(lab, "--ip-conns", "1000", pair=authority(lab).good(kind))
        tinyauth.expect("event=tls_failed|reason=plain_http|status=40")
        said = sslscan(tinyauth)
        enabled = re.findall(r"^(SSLv\d|TLSv1\.\d)\s+enabled", said, re.M)
        same(enabled, ["TLSv1.2"], f"versions in {said}")
        accepted = re.findall(r"^(?:Preferred|Accepted)\s+(TLSv\S+)\s+(\d+) bits\s+(\S+)", said, re.M)
        same(sorted(suite for _, _, suite in accepted), sorted([f"{suites}-AES128-GCM-SHA256", f"{suites}-AES256-GCM-SHA384",
                                                                f"{suites}-CHACHA20-POLY1305"]), f"suites in {said}")
        same([int(bits) >= 128 for _, bits, _ in accepted], [True] * 3, "bits")
        for bad in ("vulnerable to heartbleed", "Insecure session renegotiation", "Compression enabled"):
            assert not re.search(rf"(?<!not ){bad}", said), f"{bad} in {said}"
        same(set(re.findall(r" Curve (\S+) DHE", said)), {"P-256"}, f"groups in {said}")
        still_serves(tinyauth, tinyauth.workers())


@alone
def test_testssl(lab):
    """testssl.sh's whole run: no finding above LOW."""
    program = shutil.which("testssl") or shutil.which("testssl.sh")
    if not program:
        raise Skip("testssl.sh is not here")
    tinyauth = serve(lab, "--ip-conns", "1000")
    tinyauth.expect("event=tls_failed|reason=plain_http|status=40")
    workers, report = tinyauth.workers(), lab.path("report.json")
    command = [program, "--quiet", "--color", "0", "--warnings", "off", "--nodns", "none", "--ip", "127.0.0.1", "--fast", "--connect-timeout",
               "5", "--openssl-timeout", "5", "--add-ca", authority(lab).root.cert, "--jsonfile", report,
               f"localhost:{tinyauth.address[1]}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=400, text=True, env=environment(),
                          cwd=lab.directory)
    assert os.path.exists(report), f"testssl.sh: {done.stdout[-2000:]}{done.stderr[-1000:]}"
    with open(report, encoding="utf-8", errors="replace") as file:
        findings = json.load(file)
    keep = os.environ.get("TESTSSL_REPORT")
    if keep:
        shutil.copy(report, keep)
    assert len(findings) > 50, f"only {len(findings)} findings: {done.stdout[-2000:]}"
    weak = [f"{one['severity']} {one['id']}: {one['finding']}" for one in findings if one["severity"] in WEAK and one["id"] not in KNOWN]
    for one in findings:
        if one["severity"] in ("LOW", "WARN", "FATAL", *WEAK):
            print(f"        testssl: {one['severity']} {one['id']}: {one['finding']}", flush=True)
    still_serves(tinyauth, workers)
    same(weak, [], "findings above LOW")
