#!/usr/bin/env python3
"""CPU time a request of tinyauth and of nginx doing the same job, in one run.

  bench/run.py [--tinyauth BIN] [--nginx BIN] [--rounds N] [--seconds S] [--connections C]

Both get one worker, two keys, an address limit that never fires and an access log in a file, and stand in front of the
same upstream (an nginx that answers a short body). Rounds alternate; wrk makes the load; CPU time is the kernel's account
of the proxy's processes. Prints medians and the ratio; exit status 1 when tinyauth needs more CPU a request than nginx.
"""
import argparse
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KEYS = ("sk-bench-0123456789abcdef0123456789abcdef", "sk-bench-fedcba9876543210fedcba9876543210")
TICK = os.sysconf("SC_CLK_TCK")

UPSTREAM = """
worker_processes 1; daemon off; pid {dir}/upstream.pid; error_log {dir}/upstream.err;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600s;
  server {{ listen 127.0.0.1:{upstream} backlog=4096; location / {{ default_type application/json;
    return 200 '{{"models":[{{"name":"stand-in"}}]}}'; }} }} }}
"""

TUNED = """
worker_processes 1; daemon off; pid {dir}/proxy.pid; error_log {dir}/proxy.err;
events {{ worker_connections 4096; }}
http {{ access_log {dir}/proxy.log; keepalive_requests 1000000000; keepalive_timeout 600s;
  map_hash_bucket_size 128;
  map $http_authorization $key {{ default ""; "Bearer {key0}" one; "Bearer {key1}" two; }}
  limit_req_zone $binary_remote_addr zone=address:10m rate=1000000r/s;
  upstream model {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port} backlog=4096;
    location / {{
      if ($key = "") {{ return 401; }}
      limit_req zone=address burst=100000 nodelay;
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_set_header Host localhost; proxy_set_header X-Real-IP $remote_addr;
      proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;
    }} }} }}
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port):
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.01)
    raise SystemExit(f"bench: nothing listens on port {port}")


def tree(pid):
    """The process and its children."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += tree(int(child))
    return found


def cpu_seconds(pid):
    """User and system time of a process and its children so far."""
    total = 0
    for one in tree(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def load(port, options):
    """Requests that wrk got answered."""
    done = subprocess.run(["wrk", "-t1", f"-c{options.connections}", f"-d{options.seconds}s",
                           "-H", f"Authorization: Bearer {KEYS[0]}", f"http://127.0.0.1:{port}/api/tags"],
                          capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in done or "Socket errors" in done:
        raise SystemExit(f"bench: answers other than 200:\n{done}")
    return int(re.search(r"(\d+) requests in", done).group(1)), float(re.search(r"Requests/sec:\s+([\d.]+)", done).group(1))


def measure(name, pid, port, options):
    before = cpu_seconds(pid)
    requests, rate = load(port, options)
    cpu = (cpu_seconds(pid) - before) / requests * 1e6
    print(f"  {name:9} {cpu:7.2f} us CPU a request  {rate:9.0f} requests/s", flush=True)
    return cpu, rate


def start(command, running, **extra):
    running.append(subprocess.Popen(command, **extra))
    return running[-1].pid


def run(options, directory, running):
    ports = {"upstream": free_port(), "nginx": free_port(), "tinyauth": free_port()}
    fill = {"dir": directory, "upstream": ports["upstream"], "port": ports["nginx"], "key0": KEYS[0], "key1": KEYS[1]}
    for name, text in (("upstream", UPSTREAM), ("proxy", TUNED)):
        Path(f"{directory}/{name}.conf").write_text(text.format(**fill))
        pid = start([options.nginx, "-c", f"{directory}/{name}.conf", "-p", directory], running)
    keys = Path(f"{directory}/keys")
    keys.write_text(f"one {KEYS[0]}\ntwo {KEYS[1]}\n")
    keys.chmod(0o600)
    proxies = {"nginx": pid, "tinyauth": start(
        [options.tinyauth, "-k", str(keys), "-l", f"127.0.0.1:{ports['tinyauth']}", "-u", f"127.0.0.1:{ports['upstream']}",
         "-w", "1", "--ip-rate", "1000000/s", "--ip-burst", "100000", "--log", f"{directory}/tinyauth.log"], running)}
    for port in ports.values():
        wait_for(port)
    figures = {name: [] for name in proxies}
    for number in range(options.rounds + 1):
        print("warm-up" if number == 0 else f"round {number}")
        for name, pid in proxies.items():
            figure = measure(name, pid, ports[name], options)
            if number > 0:
                figures[name].append(figure)
    cpu, rate = ({name: statistics.median(figure[i] for figure in got) for name, got in figures.items()} for i in (0, 1))
    print(f"median CPU a request: tinyauth {cpu['tinyauth']:.2f} us, nginx {cpu['nginx']:.2f} us, "
          f"ratio {cpu['tinyauth'] / cpu['nginx']:.2f}")
    print(f"median requests/s: tinyauth {rate['tinyauth']:.0f}, nginx {rate['nginx']:.0f}, "
          f"ratio {rate['tinyauth'] / rate['nginx']:.2f}")
    return cpu["tinyauth"] <= cpu["nginx"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tinyauth", default="./tinyauth")
    parser.add_argument("--nginx", default="/usr/sbin/nginx")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=64)
    options = parser.parse_args()
    options.tinyauth = os.path.abspath(options.tinyauth)
    running = []
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        try:
            good = run(options, directory, running)
        finally:
            for process in reversed(running):
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait(30)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
