#!/usr/bin/env python3
"""Goal: TLS is as good as plain: who may speak, what is refused, what is seen when a connection ends.

    python3 tests/tls/run.py [--tinyauth BIN] [-v] [--no-measure] [PATTERN]

Needs openssl, curl and node; sslscan and testssl.sh (Debian: testssl) are used where they are. The harness, the way tests
run and the last line are those of tests/e2e.py. The end-to-end tests, the regressions and the raw HTTP cases run over TLS
by themselves: e2e.py --tls, regressions.py --tls, http/run.py --tls.
"""

import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import e2e  # noqa: E402
import certificates  # noqa: E402
import ends  # noqa: E402
import handshakes  # noqa: E402
import hostile  # noqa: E402
import renewal  # noqa: E402
import scanners  # noqa: E402
import sessions  # noqa: E402
import traffic  # noqa: E402

MODULES = (handshakes, certificates, sessions, renewal, hostile, ends, traffic, scanners)
WATCHDOG = 900
NOT_OVER_TLS = {}

for module in MODULES:
    for name, test in vars(module).items():
        if name.startswith("test_"):
            assert name not in globals(), f"two tests are called {name}"
            globals()[name] = test

if __name__ == "__main__":
    sys.exit(e2e.main(globals()))
