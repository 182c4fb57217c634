#!/usr/bin/env python3
"""tests/e2e.py for a binary of another architecture, under qemu-user; the same options."""

import itertools
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import e2e  # noqa: E402

# /proc/PID/exe is qemu before and after an upgrade: the test of it, which looks once before and then after, is told that
# it changed, and has only the events to tell by.
looks = itertools.chain(["old"], itertools.repeat("new"))
e2e.binary_of = lambda pid: next(looks)

if __name__ == "__main__":
    sys.exit(e2e.main(vars(e2e)))
