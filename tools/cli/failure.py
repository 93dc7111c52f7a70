"""What a person is told of an error that is no MoetierError: a cause, what to do, and the exit code."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

from moetier.tiers.errors import MoetierError

EXIT_ERROR = 1
EXIT_FAULT = os.EX_SOFTWARE  # 70: no mistake of who runs it

MORE = "MOETIER_DEBUG=1 shows where it happened."
_FIXES = {
    errno.ENOENT: "Check the path, or make what is missing.",
    errno.ENOTDIR: "Check the path: what stands before the last slash is no folder.",
    errno.EISDIR: "Name a file: this is a folder.",
    errno.EACCES: "Get the permission, or name another place.",
    errno.EPERM: "Get the permission, or name another place.",
    errno.EROFS: "Name a place that can be written to.",
    errno.ENOSPC: "Free some space, or name another place.",
    errno.EDQUOT: "Free some of the quota, or name another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Check the symbolic links on the way.",
    errno.EMFILE: "Raise the limit on open files: ulimit -n 4096",
    errno.EIO: "Check the disk.",
    errno.ENOMEM: "Free some memory, or give less: --ram, --context.",
}


def failure_of(error: Exception) -> tuple[MoetierError, int]:
    """For every Exception; the line of one that nobody foresaw says where it was raised."""
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    match error:
        case OSError(errno=int() as number, strerror=str()):
            cause, fix = _of_system(error), _FIXES.get(number, MORE)
        case RuntimeError() if said.startswith("Symlink loop"):  # of pathlib, before Python 3.13
            cause, fix = f"{said}.", _FIXES[errno.ELOOP]
        case ModuleNotFoundError():
            cause, fix = f"{said}.", "Install moetier anew, with what this command needs: moetier doctor says what."
        case OSError():  # of a library, about a file
            cause, fix = said, f"Check the path. {MORE}"
        case MemoryError():
            cause, fix = "The memory is full.", _FIXES[errno.ENOMEM]
        case UnicodeDecodeError():
            cause, fix = f"What was read is no text in UTF-8: {said}.", "Convert it (iconv -t UTF-8), or name another."
        case _:
            return MoetierError(f"{type(error).__name__}: {said} ({_place(error)})", _FAULT), EXIT_FAULT
    return MoetierError(cause, fix), EXIT_ERROR


_FAULT = "This is a fault of moetier, or of a library: report it with what it says with MOETIER_DEBUG=1."


def _of_system(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' -> '.join(names)}: {error.strerror}." if names else f"{error.strerror} (errno {error.errno})."


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
