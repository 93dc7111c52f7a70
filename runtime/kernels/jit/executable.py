"""Machine code in memory that is never both writable and executable.

systemd's MemoryDenyWriteExecute=, PR_SET_MDWE and SELinux forbid making memory executable that was written. LLVM's own
engine does not notice that, and running its code then kills the process. So the compiler's object file is linked here,
written to a memory file, and mapped from that for reading and running, which is permitted. Object files for other
processors than x86-64 go through LLVM's engine, where memory may become executable.

LLVM's newer engine ORC can't take the linker's place (tried with llvmlite 0.50, LLVM 22). With JITLink and with the
older linker alike, its code is in private memory that was written and then made executable (``r-xp`` without a file in
/proc/self/maps). Where that is forbidden, the older linker raises "Failed to materialize symbols", and JITLink ends the
process by an assertion. LLVM has a memory manager that maps shared memory twice, but llvmlite can't choose it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct
import weakref
from collections import namedtuple

from moetier.tiers.store.atomic import write_all

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mmap.restype = ctypes.c_void_p
_LIBRARY.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_LIBRARY.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBRARY.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value

# ELF-64 (System V ABI, and its supplement for AMD64)
_ELF, _X86_64 = b"\x7fELF\x02\x01", 62
_SYMBOLS, _ADDENDS, _NO_BITS = 2, 4, 8  # types of sections
_WRITABLE, _ALLOCATED = 1, 2  # flags of sections
_RELATIVE = (2, 4)  # types of relocations, of data and of functions: symbol + addend - place, in 32 bits


class LinkError(RuntimeError):
    """The object file has parts that ``link`` does not support."""


@functools.cache
def can_become_executable() -> bool:
    """Return whether memory that was written may be made executable, as LLVM and oneDNN need. Runs no code in it."""
    writable, private = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page = _LIBRARY.mmap(None, mmap.PAGESIZE, writable, private, -1, 0)
    if page == _FAILED:
        return False
    try:
        ctypes.memset(page, 0, 1)
        return bool(_LIBRARY.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) == 0)
    finally:
        _LIBRARY.munmap(page, mmap.PAGESIZE)


class Executable:
    """A linked object file, mapped for as long as this object lives."""

    def __init__(self, object_file: bytes) -> None:
        """Link and map a file. Raises LinkError as ``link`` does, and OSError if the code can't be mapped."""
        image, self._symbols = link(object_file)
        descriptor = os.memfd_create("moetier-code", os.MFD_CLOEXEC)
        try:
            write_all(descriptor, image, 0)
            # not mmap.mmap, which would keep a duplicate of the descriptor open
            protection = mmap.PROT_READ | mmap.PROT_EXEC
            self._base = _LIBRARY.mmap(None, len(image), protection, mmap.MAP_PRIVATE, descriptor, 0)
            if self._base == _FAILED:
                number = ctypes.get_errno()
                raise OSError(number, f"a memory file can't be mapped to be run: {os.strerror(number)}")
        finally:
            os.close(descriptor)
        # not unmapped at the end of the process, when other threads may still run the code
        weakref.finalize(self, _LIBRARY.munmap, self._base, len(image)).atexit = False

    def address(self, name: str) -> int:
        """Return the address of a function."""
        return int(self._base + self._symbols[name])


# all fields are integers
_Section = namedtuple("_Section", "name type flags address offset size link info alignment entry")


def link(object_file: bytes) -> tuple[bytes, dict[str, int]]:
    """Lay out the sections of an ELF object for x86-64, and resolve its references.

    Returns an image that works at any address, and the offset of each function in it, by name. Raises LinkError if a
    reference leads out of the object, or is of a type that compilers don't emit in position-independent code.
    """
    if object_file[:6] != _ELF or struct.unpack_from("<H", object_file, 18)[0] != _X86_64:
        raise LinkError("the object file is not of x86-64")
    (headers,) = struct.unpack_from("<Q", object_file, 40)
    size, count = struct.unpack_from("<HH", object_file, 58)
    sections = [_Section(*struct.unpack_from("<IIQQQQIIQQ", object_file, headers + size * n)) for n in range(count)]
    image, places = bytearray(), dict[int, int]()
    for number, section in enumerate(sections):
        if section.flags & _ALLOCATED and section.type != _ADDENDS:
            if section.flags & _WRITABLE and section.size:
                raise LinkError("the object file has data that is written")
            image += bytes(-len(image) % max(section.alignment, 1))
            places[number] = len(image)
            data = object_file[section.offset : section.offset + section.size]
            image += bytes(section.size) if section.type == _NO_BITS else data
    image += bytes(-len(image) % mmap.PAGESIZE)

    (table,) = (section for section in sections if section.type == _SYMBOLS)
    names, symbols = sections[table.link], dict[str, int]()
    values: list[int | None] = []  # offsets in the image by the symbol's number; None: not in this object
    for start in range(table.offset, table.offset + table.size, 24):
        name, _, _, home, value = struct.unpack_from("<IBBHQ", object_file, start)
        values.append(places[home] + value if home in places else None)
        text = object_file[names.offset + name :].split(b"\0", 1)[0].decode()
        if text and home in places:
            symbols[text] = places[home] + value

    for section in sections:
        if section.type != _ADDENDS or section.info not in places:
            continue
        for start in range(section.offset, section.offset + section.size, 24):
            offset, what, addend = struct.unpack_from("<QQq", object_file, start)
            place, symbol, relocation = places[section.info] + offset, values[what >> 32], what & 0xFFFFFFFF
            if relocation not in _RELATIVE or symbol is None:
                raise LinkError(f"the object file has a reference of type {relocation} that can't be resolved")
            struct.pack_into("<i", image, place, symbol + addend - place)
    return bytes(image), symbols
