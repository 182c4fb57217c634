"""The proxies side by side: one worker or thread each, and the same job each. Two keys, an address limit that is looked at
and never reached, an access log in a file."""

import hashlib
import os
import socket
import ssl
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import machine
from machine import say

KEYS = ("sk-bench-0123456789abcdef0123456789abcdef", "sk-bench-fedcba9876543210fedcba9876543210")
SUITE = "ECDHE-ECDSA-AES128-GCM-SHA256"
ROOM = 12000                        # 9,000 idle ones and those beside them
READY_S = 20                        # for a proxy to answer its first request
ALL = ("tinyauth", "nginx", "plain", "haproxy", "caddy", "relay", "epoll")
TITLES = {"tinyauth": "tinyauth", "nginx": "nginx tuned", "plain": "nginx plain", "haproxy": "haproxy", "caddy": "caddy",
          "relay": "poll relay", "epoll": "epoll relay", "direct": "direct"}


@dataclass
class Setup:
    """What differs between the runs of one proxy."""
    tls: str = ""                   # "1.2", "1.3" or none
    room: int = ROOM                # client connections at once; 0: as many as it comes with
    forwarding: bool = False        # all of them at work: nginx counts their upstream connections too
    keys: int = 0                   # tinyauth: so many keys in the file, not the two


@dataclass
class Proxy:
    name: str
    port: int
    process: subprocess.Popen
    log: Path
    key: str
    setup: Setup

    def pids(self):
        return machine.tree(self.process.pid) if self.process else []


# Configurations. `at` has the places: directory, own port, upstream's port, certificate.

NGINX = """
worker_processes 1; daemon off; pid {dir}/nginx.pid; error_log {dir}/error.log; {user}
events {{ worker_connections {connections}; }}
http {{
  access_log {log};
  client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4;
  scgi_temp_path {dir}/t5;
  keepalive_timeout 600s; {keepalive_requests}
  map_hash_bucket_size 128;
  map $http_authorization $key_name {{ default ""; "Bearer {key0}" one; "Bearer {key1}" two; }}
  limit_req_zone $binary_remote_addr zone=addr:10m rate=1000000r/s;
  {upstreams}
  server {{
    listen 127.0.0.1:{port} backlog=4096 {tls_listen};
    {tls}
    location = /health {{ access_log off; return 200 "OK"; }}
    location / {{
      limit_req zone=addr burst=100000 nodelay;
      limit_req_status 429;
      if ($key_name = "") {{ return 401; }}
      proxy_pass http://{target};
      proxy_set_header Host localhost:{upstream};
      proxy_set_header X-Real-IP $remote_addr;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_set_header X-Forwarded-Proto $scheme;
      {upstream_http}
      proxy_buffering off;
      client_max_body_size 0;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""

# By default haproxy gives up kept upstream connections once a quarter of its descriptors are in use, as they are beside 9,000
# idle clients.
HAPROXY = """
global
  nbthread 1
  tune.pool-low-fd-ratio 80
  tune.pool-high-fd-ratio 90
  maxconn {connections}
  log stdout format raw local0
defaults
  mode http
  log global
  option httplog
  option http-no-delay
  option forwardfor
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout http-request 10s
  timeout http-keep-alive 600s
frontend in
  bind 127.0.0.1:{port} backlog 4096 {tls}
  stick-table type ip size 100k expire 60s store http_req_rate(1s)
  http-request track-sc0 src
  http-request deny deny_status 429 if {{ sc_http_req_rate(0) gt 1000000 }}
  acl keyed req.hdr(authorization) -m str -f {dir}/bearers
  http-request return status 401 if !keyed
  http-request set-header X-Real-IP %[src]
  http-request set-header X-Forwarded-Proto {scheme}
  http-request set-header Host localhost:{upstream}
  default_backend model
backend model
  server model 127.0.0.1:{upstream}
"""

# caddy has no limit of requests in its own modules: it does less than the others here.
CADDY = """
{{
  admin off
  auto_https off
  grace_period 1s
  log {{
    output stderr
    level ERROR
  }}
  servers {{
    protocols h1
    timeouts {{
      idle 600s
    }}
  }}
}}
:{port} {{
  bind 127.0.0.1
  {tls}
  log {{
    output file {log} {{
      roll_disabled
    }}
  }}
  @keyed {{
    header Authorization "Bearer {key0}"
    header Authorization "Bearer {key1}"
  }}
  handle @keyed {{
    reverse_proxy 127.0.0.1:{upstream} {{
      flush_interval -1
      header_up Host localhost:{upstream}
      header_up X-Real-IP {{remote_host}}
      transport http {{
        keepalive_idle_conns_per_host 1024
      }}
    }}
  }}
  handle {{
    respond 401
  }}
}}
"""


def room(setup, default):
    """Connections to make room for; each may need a descriptor on both sides."""
    return min(setup.room, (machine.descriptors() - 200) // 2) if setup.room else default


def nginx(at, setup, tuned):
    fill = {"connections": room(setup, 768) * (2 if setup.forwarding else 1), "tls_listen": "ssl" if setup.tls else "", "tls": "",
            "user": "user root;" if os.geteuid() == 0 else "",
            "keepalive_requests": "", "upstreams": "", "target": f"127.0.0.1:{at['upstream']}", "upstream_http": ""}
    if setup.tls:
        fill["tls"] = (f"ssl_certificate {at['cert']}; ssl_certificate_key {at['cert_key']}; ssl_protocols TLSv{setup.tls}; "
                       f"ssl_ciphers {SUITE}; ssl_session_cache shared:tls:10m;")
    if tuned:
        fill.update({
            "keepalive_requests": "keepalive_requests 1000000000;", "target": "model",
            "upstreams": f"upstream model {{ server 127.0.0.1:{at['upstream']}; keepalive 1024; "
                         "keepalive_requests 1000000000; keepalive_timeout 600s; }",
            "upstream_http": 'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_request_buffering off;'})
    conf = at["dir"] / "nginx.conf"
    conf.write_text(NGINX.format(**at, **fill))
    return [machine.find("nginx"), "-c", conf, "-p", at["dir"]], {}


def haproxy(at, setup):
    tls = ""
    if setup.tls:
        pem = at["dir"] / "both.pem"
        pem.write_text(Path(at["cert"]).read_text() + Path(at["cert_key"]).read_text())
        tls = f"ssl crt {pem} ciphers {SUITE} alpn http/1.1 ssl-min-ver TLSv{setup.tls} ssl-max-ver TLSv{setup.tls}"
    (at["dir"] / "bearers").write_text("".join(f"Bearer {key}\n" for key in KEYS))
    conf = at["dir"] / "haproxy.cfg"
    conf.write_text(HAPROXY.format(**at, tls=tls, scheme="https" if setup.tls else "http",
                                   connections=room(setup, 1024)))
    return [machine.find("haproxy"), "-db", "-f", conf], {"stdout": open(at["log"], "a")}


def caddy(at, setup):
    tls = ""
    if setup.tls:
        tls = (f"tls {at['cert']} {at['cert_key']} {{\n    protocols tls{setup.tls} tls{setup.tls}\n"
               "    ciphers TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256\n  }")
    conf = at["dir"] / "Caddyfile"
    conf.write_text(CADDY.format(**at, tls=tls))
    environment = {**os.environ, "GOMAXPROCS": "1", "HOME": str(at["dir"]), "XDG_DATA_HOME": str(at["dir"]),
                   "XDG_CONFIG_HOME": str(at["dir"])}
    return [machine.find("caddy"), "run", "--adapter", "caddyfile", "--config", conf], {"env": environment}


def keys_text(count):
    """As `tinyauth key add` writes them."""
    return "".join(f"key{i} sha256:{hashlib.sha256(bulk_key(i).encode()).hexdigest()}\n" for i in range(count))


def bulk_key(i):
    return f"sk-bulk-{i:08}-0123456789abcdef"


def tinyauth(at, setup, binary):
    keys = at["dir"] / "keys"
    keys.touch(0o600)
    keys.write_text(keys_text(setup.keys) if setup.keys else f"one {KEYS[0]}\ntwo {KEYS[1]}\n")
    command = [binary, "-k", keys, "-l", f"127.0.0.1:{at['port']}", "-u", f"127.0.0.1:{at['upstream']}", "-w", "1",
               "--ip-rate", "1000000/s", "--ip-burst", "100000", "--ip-conns", "1000000", "--keepalive-timeout", "600s",
               "--log", at["log"]]
    if setup.room:
        command += ["--max-conns", room(setup, 0)]
    if setup.tls:
        command += ["--tls-cert", at["cert"], "--tls-key", at["cert_key"]]
    return command, {}


class Stable:
    """Starts proxies in front of one upstream, and ends them."""

    def __init__(self, processes, directory, programs, binary):
        self.processes, self.directory, self.programs, self.binary = processes, Path(directory), programs, binary
        self.count = 0
        self.upstream = processes.start([programs / "upstream", "48"], stdout=subprocess.PIPE, text=True)
        self.ports = [int(word) for word in self.upstream.stdout.readline().split()]
        if not self.ports:
            raise SystemExit("bench: the upstream does not start")
        self.cert, self.cert_key = self.make_certificate()
        self.tinyauth_has_tls = "--tls-cert" in machine.output(binary, "--help")

    def make_certificate(self):
        cert, key = self.directory / "cert.pem", self.directory / "key.pem"
        if machine.find("openssl"):
            subprocess.run([machine.find("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                            "-nodes", "-days", "30", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                            "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=20)
        return cert, key

    def has(self, name, setup=Setup()):
        if setup.tls and (not self.cert.exists() or (name == "tinyauth" and not self.tinyauth_has_tls)):
            return False
        tool = {"nginx": "nginx", "plain": "nginx", "haproxy": "haproxy", "caddy": "caddy"}.get(name)
        return tool is None or machine.find(tool) is not None

    def next_upstream(self):
        """A port of its own for each run, because of what connections leave behind."""
        self.count += 1
        return self.ports[self.count % len(self.ports)]

    def prepare(self, name, setup):
        """Everything but the start: (command, Popen's options, port, log)."""
        upstream = self.next_upstream()
        place = self.directory / f"{self.count}-{name}"
        place.mkdir()
        log = place / "access.log"
        log.touch()
        at = {"dir": place, "port": machine.free_port(), "upstream": upstream, "log": log,
              "cert": self.cert, "cert_key": self.cert_key, "key0": KEYS[0], "key1": KEYS[1]}
        if name in ("relay", "epoll"):
            kind = "poll" if name == "relay" else "epoll"
            command, extra = [self.programs / "relay", kind, upstream], {"stdout": subprocess.PIPE}
        elif name in ("nginx", "plain"):
            command, extra = nginx(at, setup, name == "nginx")
        elif name == "tinyauth":
            command, extra = tinyauth(at, setup, self.binary)
        else:
            command, extra = {"haproxy": haproxy, "caddy": caddy}[name](at, setup)
        return command, extra, at["port"], at["log"]

    def start(self, name, setup):
        if name == "direct":
            return Proxy(name, self.next_upstream(), None, None, KEYS[0], setup)
        command, extra, port, log = self.prepare(name, setup)
        with open(log.parent / "stderr", "w") as errors:
            process = self.processes.start(command, stderr=errors, stdin=subprocess.DEVNULL, **{"stdout": errors, **extra})
        if extra.get("stdout") == subprocess.PIPE:
            port = int(process.stdout.readline())
        elif "stdout" in extra:
            extra["stdout"].close()
        proxy = Proxy(name, port, process, log, bulk_key(setup.keys - 1) if setup.keys else KEYS[0], setup)
        if not wait_ready(proxy):
            said = (log.parent / "stderr").read_text().strip().splitlines()[-3:]
            self.processes.stop(process)
            say(f"  {TITLES[name]} does not answer: {' / '.join(said)}")
            return None
        return proxy

    @contextmanager
    def fleet(self, names, setup=Setup()):
        """Those of `names` that are installed and answer."""
        started = []
        try:
            for name in names:
                proxy = self.start(name, setup) if self.has(name, setup) else None
                if proxy:
                    started.append(proxy)
            yield started
        finally:
            self.processes.stop(*(proxy.process for proxy in started if proxy.process))


def ask(proxy):
    """The status of one request."""
    with socket.create_connection(("127.0.0.1", proxy.port), 2) as sock:
        if proxy.setup.tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            sock = context.wrap_socket(sock, server_hostname="localhost")
        sock.sendall(f"GET /api/tags HTTP/1.1\r\nHost: localhost:{proxy.port}\r\nAuthorization: Bearer {proxy.key}\r\n"
                     "Connection: close\r\n\r\n".encode())
        head = sock.recv(4096)
        sock.close()
        return int(head.split()[1]) if len(head.split()) > 1 else 0


def wait_ready(proxy):
    end = time.monotonic() + READY_S
    while time.monotonic() < end and proxy.process.poll() is None:
        try:
            if ask(proxy) == 200:
                return True
        except (OSError, ValueError):
            pass
        time.sleep(0.005)
    return False
