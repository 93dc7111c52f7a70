"""Compiled kernels for AArch64, run by an emulator, on memory that they share with the process of the test."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from llvmlite import ir
from torch import Tensor

from moetier.runtime.kernels.jit.processor import Processor

TRIPLE = "aarch64-linux-gnu"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"  # Debian's gcc-aarch64-linux-gnu and qemu-user
ADDRESS = 0x70_0000_0000  # where the memory is in both processes; neither has anything there
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mmap.restype = ctypes.c_void_p
_LIBRARY.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_LIBRARY.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

# maps the file, and calls functions by number, each with a context
PROGRAM = """
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

%(declared)s
static void (*const functions[])(void *) = {%(names)s};

int main(int count, char **words) {
    int file = open(words[1], O_RDWR);
    void *memory = (void *)%(address)dL;
    if (file < 0 || mmap(memory, %(nbytes)dL, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != memory)
        return 1;
    for (int i = 2; i + 1 < count; i += 2)
        functions[atoi(words[i])]((void *)strtoul(words[i + 1], 0, 10));
    return 0;
}
"""


class SharedMemory:
    """Memory at ADDRESS, from which tensors and contexts are allocated one after the other. It is zero at first."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.file, self.nbytes, self._used = folder / "memory", nbytes, 0
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT)
        os.truncate(descriptor, nbytes)
        mapped = _LIBRARY.mmap(ADDRESS, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
        os.close(descriptor)
        assert mapped == ADDRESS
        self._all = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(ADDRESS), dtype=torch.uint8)

    def close(self) -> None:
        """Unmap the memory; tensors in it must not be used any more."""
        _LIBRARY.munmap(ADDRESS, self.nbytes)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Allocate a tensor."""
        nbytes, first = math.prod(shape) * dtype.itemsize, self._used
        self._used += -(-nbytes // 64) * 64
        assert self._used <= self.nbytes
        return self._all[first : first + nbytes].view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """Allocate a copy of a tensor."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def context(self, fields: Sequence[int]) -> Tensor:
        """Allocate a copy of a context."""
        return self.copy(torch.tensor(list(fields), dtype=torch.int64))


class ArmProgram:
    """A program of compiled functions: their modules, by the functions' names."""

    def __init__(self, folder: Path, memory: SharedMemory, processor: Processor, modules: Mapping[str, ir.Module]):
        for tool in (COMPILER, EMULATOR):
            if shutil.which(tool) is None:
                pytest.skip(f"no {tool}: install gcc-aarch64-linux-gnu and qemu-user")
        objects = []
        for name, module in modules.items():
            code, machine = processor.optimised(module, reloc="static", codemodel="small")
            objects.append(folder / f"{name}.o")
            objects[-1].write_bytes(machine.emit_object(code))
        declared = "".join(f"void {name}(void *);\n" for name in modules)
        source = PROGRAM % {
            "declared": declared, "names": ", ".join(modules), "address": ADDRESS, "nbytes": memory.nbytes
        }  # fmt: skip
        (folder / "program.c").write_text(source)
        self._path, self._memory, self._names = folder / "program", memory, list(modules)
        subprocess.run([COMPILER, "-static", "-O1", folder / "program.c", *objects, "-o", self._path], check=True)

    def run(self, *steps: tuple[str, Tensor]) -> None:
        """Call functions by name, each with a context that is in the memory."""
        words = [str(word) for name, context in steps for word in (self._names.index(name), context.data_ptr())]
        subprocess.run([EMULATOR, "-cpu", "max", self._path, self._memory.file, *words], check=True)
