"""A filter of system calls for the kernel (classic BPF over struct seccomp_data): what is listed fails with EPERM."""

import errno
import platform
import struct
from collections.abc import Iterable, Sequence

from sdpo_megatron.envs.sandbox.base import SandboxFault

LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""By machine: the kernel's name of its calls, and its column in CALLS."""
FOREIGN_NUMBERS = 0x40000000
"""x86_64 has a second set of numbers for the same calls from here on."""
CALLS = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "connect": (42, 203),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "mq_open": (240, 180),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
}
Rule = tuple[str, int, int | None]
"""A call, which of its arguments is looked at, and the value (its lower 32 bits) that is refused: None is any but 0."""
KERNEL: list[str] = [
    "add_key",
    "request_key",
    "keyctl",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
]
"""What shares keys with the parent's session, or is a large part of the kernel that no program here needs."""
PROCESSES: list[str] = ["ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd"]
"""What reaches into another process. Without /proc there is no other way."""
SOCKETS: list[str | Rule] = ["connect", "sendmsg", "sendmmsg", ("sendto", 4, None)]
"""What reaches a socket by its name; a pair of them still works."""
SIGNAL_OWNERS: Sequence[Rule] = [("fcntl", 1, cmd) for cmd in (8, 10, 15)] + [
    ("ioctl", 1, cmd) for cmd in (0x8901, 0x8902)
]
"""What lets input and output on a file send a signal to any process: F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN and
SIOCSPGRP."""


def compiled(refused: Iterable[str | Rule]) -> bytes:
    """Returns the filter as an array of struct sock_filter. Raises SandboxFault on a machine that it does not know."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise SandboxFault(f"system calls are known of {' and '.join(MACHINES)}; this machine is {machine}")
    arch, column = MACHINES[machine]
    refuse = _instruction(RETURN, REFUSE)
    # calls by another machine's numbers would pass unseen
    code = [_instruction(LOAD, ARCH_AT), _instruction(EQUAL, arch, no=0, yes=1), refuse]
    code += [_instruction(LOAD, NUMBER_AT), _instruction(AT_LEAST, FOREIGN_NUMBERS, no=1), refuse]
    for rule in refused:
        if isinstance(rule, str):
            code += [_instruction(EQUAL, CALLS[rule][column], no=1), refuse]
            continue
        name, argument, value = rule
        at = ARGUMENTS_AT + 8 * argument
        code.append(_instruction(EQUAL, CALLS[name][column], no=4 if value is not None else 6))
        if value is None:
            code += [_instruction(LOAD, at), _instruction(EQUAL, 0, no=2)]
            code += [_instruction(LOAD, at + 4), _instruction(EQUAL, 0, yes=1), refuse]
        else:
            code += [_instruction(LOAD, at), _instruction(EQUAL, value, no=1), refuse]
        code.append(_instruction(LOAD, NUMBER_AT))
    return b"".join([*code, _instruction(RETURN, ALLOW)])


def _instruction(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    """`yes` and `no` say how many instructions are passed over where a comparison holds, or not."""
    return struct.pack("HBBI", code, yes, no, value)
