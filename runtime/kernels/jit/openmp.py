"""Find the OpenMP library that torch computes with, and end its threads before a fork.

moetier's kernels have threads of their own (``team.py``). torch uses OpenMP's threads when it computes many tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re

from moetier.runtime.machine.memory import mapped_files

# A function of OpenMP 5.0, its argument omp_pause_hard, and the name of a function that all libraries but GNU's have.
# In GNU's library, the call of the first ends the threads of the calling thread's team; in LLVM's and Intel's, it ends
# the threads of all teams.
_PAUSE, _HARD, _NOT_GNU = "omp_pause_resource_all", 2, "__kmpc_fork_call"
_TORCH = re.compile(r"/libtorch_cpu\.so[^/]*$")


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch calls; None if there is none.

    Other packages may have loaded other OpenMP libraries. So search in the order in which the dynamic linker searches
    for torch: first the libraries whose symbols are visible to all others, then those that torch needs.
    """
    for name in (None, *sorted({path for _, path in mapped_files() if _TORCH.search(path)})):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            if hasattr(library, "omp_get_max_threads"):
                return library
    return None


def end_threads() -> None:
    """End the threads that GNU's OpenMP keeps for the calling thread; its next parallel operation starts new ones.

    Call this before a fork. Otherwise the forked child would inherit the list of these threads without the threads, and
    wait for them for ever. Other OpenMP libraries handle forks themselves.
    """
    if (library := openmp()) is not None and hasattr(library, _PAUSE) and not hasattr(library, _NOT_GNU):
        getattr(library, _PAUSE)(_HARD)
