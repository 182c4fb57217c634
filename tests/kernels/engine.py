#!/usr/bin/env python3
"""Runs a command as a container engine does by default: few capabilities, and a filter of system calls.

    engine.py COMMAND...

The filter is of the kind that engines install: a list of what may be called; the rest of what the engine knows gets EPERM,
what it does not know ENOSYS, and so does clone3, whose flags a filter cannot see. /machine.json has the numbers of calls.
"""

import ctypes
import errno
import json
import os
import struct
import sys

# What such a list leaves out: it needs a capability that a container lacks, or is old, or reaches other processes or the
# whole machine.
REFUSED = set("""
    acct add_key bpf clock_adjtime clock_adjtime64 clock_settime clock_settime64 create_module delete_module fanotify_init
    finit_module fsconfig fsmount fsopen fspick get_kernel_syms get_mempolicy init_module io_uring_enter io_uring_register
    io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl lookup_dcookie mbind migrate_pages mount mount_setattr
    move_mount move_pages name_to_handle_at nfsservctl open_by_handle_at open_tree perf_event_open personality pivot_root
    process_madvise process_vm_readv process_vm_writev query_module quotactl quotactl_fd reboot request_key set_mempolicy
    set_mempolicy_home_node setdomainname sethostname setns settimeofday stime swapoff swapon sysfs _sysctl syslog umount
    umount2 unshare uselib userfaultfd ustat vhangup vm86 vm86old vserver""".split())
NEW_NAMESPACES = 0x7E020000
CAPABILITIES = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}     # chown to kill, setgid to bind, raw, chroot, mknod, ...

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, ARCH, FIRST = 0, 4, 16
ALLOW, KILL = 0x7FFF0000, 0x80000000
SET_SECCOMP, FILTER, DROP_BOUND, PRIVATE_ARM = 22, 2, 24, 0xF0000


def fail(error):
    return 0x50000 | error


def program(machine):
    """The filter, as (code, yes, no, k)."""
    calls = machine["calls"]
    known = max(number for number in calls.values() if number < PRIVATE_ARM)
    steps = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, machine["audit"]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    steps += [(EQUAL, 0, 1, calls["clone3"]), (RETURN, 0, 0, fail(errno.ENOSYS))]
    steps += [(EQUAL, 0, 4, calls["clone"]), (LOAD, 0, 0, FIRST), (AND, 0, 0, NEW_NAMESPACES), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW)]
    steps += [(LOAD, 0, 0, NUMBER)]
    for name, number in sorted(calls.items(), key=lambda item: item[1]):
        if name not in REFUSED | {"clone", "clone3"}:
            steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    steps += [(AT_LEAST, 0, 1, known + 1), (RETURN, 0, 0, fail(errno.ENOSYS)), (RETURN, 0, 0, fail(errno.EPERM))]
    return steps


def enter(machine):
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(*args):
        if libc.prctl(*(ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args)) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {args[0]}")

    for capability in range(41):
        if capability not in CAPABILITIES:
            prctl(DROP_BOUND, capability, 0, 0, 0)
    steps = b"".join(struct.pack("=HBBI", *step) for step in program(machine))
    code = ctypes.create_string_buffer(steps, len(steps))
    head = struct.pack("@HP", len(steps) // 8, ctypes.addressof(code))
    prctl(SET_SECCOMP, FILTER, ctypes.c_char_p(head), 0, 0)


if __name__ == "__main__":
    with open("/machine.json", encoding="ascii") as file:
        enter(json.load(file))
    os.execvp(sys.argv[1], sys.argv[1:])
