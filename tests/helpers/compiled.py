"""Object files of compiled kernels, which all processes of a test run share, and the next run takes over.

LLVM takes most of a short process's time. Each file is kept under a digest of everything that LLVM makes it of, so that
it is what the compiler would give again: a kernel whose code changes is compiled anew. The folder is that of how LLVM
is called: if that changes, all are.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from places import ROOT

from moetier.runtime.kernels.jit.processor import Processor

FOLDER = "COMPILED_KERNELS_OF_TESTS"  # a variable of the environment
KEPT = 30 * 24 * 3600  # seconds
LINKED_HERE = {"reloc": "pic", "codemodel": "small"}  # how the compiler is asked for an object file to run


class Cached:
    """A target machine of LLVM whose object file is in ``file``, or is written there."""

    def __init__(self, file: Path, compiled: Callable[[], tuple[Any, Any]]) -> None:
        self._file, self._compiled = file, compiled

    def emit_object(self, _: object) -> bytes:
        if not self._file.exists():
            code, machine = self._compiled()
            partial = self._file.with_suffix(f".{os.getpid()}")
            partial.write_bytes(machine.emit_object(code))
            partial.rename(self._file)
        return self._file.read_bytes()


def prepare_folder(folder: Path) -> Path:
    """Return the folder in ``folder`` for object files, after a removal of what is old."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update((ROOT / "runtime" / "kernels" / "jit" / "processor.py").read_bytes())
    current = folder / digest.hexdigest()[:16]
    current.mkdir(exist_ok=True)
    for other in folder.iterdir():
        if other != current:
            shutil.rmtree(other, ignore_errors=True)
    for file in current.iterdir():
        if file.stat().st_mtime < time.time() - KEPT:
            file.unlink()
    return current


def share_compiled() -> None:
    """Take object files from the folder that the environment names, and leave new ones there."""
    optimised = Processor.optimised

    @functools.wraps(optimised)
    def shared(self: Processor, module: Any, unroll: bool = True, **options: str) -> tuple[Any, Any]:
        folder = os.environ.get(FOLDER)
        if options != LINKED_HERE or folder is None or not Path(folder).is_dir():
            return optimised(self, module, unroll, **options)
        made_of = repr((llvm.llvm_version_info, self._cpu, unroll, str(module)))
        file = Path(folder, hashlib.sha256(made_of.encode()).hexdigest())
        return None, Cached(file, lambda: optimised(self, module, unroll, **options))

    setattr(Processor, "optimised", shared)  # noqa: B010  # mypy forbids the assignment
