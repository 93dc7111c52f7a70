"""Processes in which memory that was written can't be made executable, as under systemd's MemoryDenyWriteExecute=.

python restricted.py prctl|seccomp COMMAND...
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, EQUAL, SET, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: a word, jumps if it is equal, if any of its bits are set
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # places in struct seccomp_data
X86_64 = 0xC000003E
MMAP, MPROTECT, SHMAT, PKEY_MPROTECT = 9, 10, 30, 329
PROT_WRITE, PROT_EXEC, SHM_EXEC = 2, 4, 0o100000
KINDS = ("prctl", "seccomp")
_LIBRARY = ctypes.CDLL(None, use_errno=True)


def forbid(syscall: str) -> None:
    """Forbid new executable memory in this process and its children. Raises OSError if the kernel can't."""
    if syscall == "prctl":
        _prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0)
    else:
        _filter([(MMAP, PROT_WRITE | PROT_EXEC), *((call, PROT_EXEC) for call in (MPROTECT, PKEY_MPROTECT))])


def forbid_any_code() -> None:
    """The same, and no further file can be mapped to be run either."""
    _filter([(call, PROT_EXEC) for call in (MMAP, MPROTECT, PKEY_MPROTECT)])


def _filter(rules: list[tuple[int, int]]) -> None:
    """Refuse calls whose third argument has all the bits of a rule; those of systemd (seccomp-util.c)."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "the filter is written for x86-64")
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, X86_64), (RETURN, 0, 0, ALLOW)]
    for call, bits in (*rules, (SHMAT, SHM_EXEC)):
        flags = [1 << n for n in range(32) if bits & 1 << n]
        program += [(LOAD, 0, 0, NUMBER), (EQUAL, 0, len(flags) + 2, call), (LOAD, 0, 0, ARGUMENTS + 2 * 8)]
        program += [(SET, 0, len(flags) - place, flag) for place, flag in enumerate(flags)]
        program += [(RETURN, 0, 0, ERRNO | errno.EPERM)]
    program += [(RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    whole = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    _prctl(PR_SET_NO_NEW_PRIVS, 1, 0)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(whole))


def _prctl(option: int, value: int, place: int) -> None:
    zero = ctypes.c_ulong(0)
    if _LIBRARY.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(place), zero, zero):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    forbid(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
