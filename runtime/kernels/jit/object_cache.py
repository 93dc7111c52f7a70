"""Cache of the compiler's object files, in ``$XDG_CACHE_HOME/moetier/kernels``.

LLVM takes a second of the processor's time to compile a model's kernels. The name of a cached file is a digest of
everything that the compiler is given, so the file holds what the compiler would return again. The file begins with the
SHA-256 of its name and of the object file, which follows. A damaged file, and one that another user owns or may write,
is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moetier.tiers.errors import TargetError
from moetier.tiers.store.folder import user_cache

KEPT_SECONDS = 30 * 24 * 3600.0  # for which a file is kept that no process reads
_TOUCHED_SECONDS = 24 * 3600.0  # after which a read is noted in the file's time
_DIGEST_BYTES = hashlib.sha256().digest_size


def cached_object(source: str, compile_object: Callable[[], bytes]) -> bytes:
    """Return the object file that is made of ``source``: from the cache, or compiled and then kept there.

    Where the cache can't be used, the object file is compiled each time.

    Args:
        source: all that the object file depends on.
        compile_object: compiles it.
    """
    path = None
    with contextlib.suppress(TargetError):
        path = user_cache("kernels") / hashlib.sha256(source.encode()).hexdigest()
    if path is not None and (kept := _read(path)) is not None:
        return kept
    made = compile_object()
    if path is not None:
        with contextlib.suppress(OSError):  # the next process compiles it again
            _write(path, made)
    return made


def _read(path: Path) -> bytes | None:
    """Return the object file at ``path``; None if there is none that can be trusted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # does not wait for who writes a pipe
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if not is_ours or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            content = file.read()
        digest, made = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if _digest(path, made) != digest:
            return None
    except OSError:
        return None
    if time.time() - status.st_mtime > _TOUCHED_SECONDS:
        with contextlib.suppress(OSError):  # the disk is read-only
            os.utime(path)
    return made


def _digest(path: Path, made: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + made).digest()


def _write(path: Path, made: bytes) -> None:
    """Write an object file, and remove files that were not read for KEPT_SECONDS. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # its mode is 0600
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_digest(path, made) + made)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    oldest = time.time() - KEPT_SECONDS
    for other in path.parent.iterdir():
        with contextlib.suppress(OSError):  # another process removes it too
            if other.stat().st_mtime < oldest:
                other.unlink()
