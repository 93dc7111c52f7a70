"""Text for a terminal: cause and fix of any error, and text from outside with its control characters replaced."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from moetier.tiers.errors import MoetierError
from moetier.tiers.redaction import redacted

EXIT_ERROR = 1
EXIT_FAULT = os.EX_SOFTWARE  # 70: a bug

DEBUG = "MOETIER_DEBUG"  # the variable that has errors raised with their traceback
MORE = f"Set {DEBUG}=1 to see where the error arose."
_FIXES = {
    errno.ENOENT: "Check the path, or create what is missing.",
    errno.ENOTDIR: "Check the path: one of its folders is a file.",
    errno.EISDIR: "Name a file instead of a folder.",
    errno.EACCES: "Change the permissions, or name another file or folder.",
    errno.EPERM: "Change the permissions, or name another file or folder.",
    errno.EROFS: "Name a file or folder that can be written to.",
    errno.ENOSPC: "Free some space, or name a folder on another disk.",
    errno.EDQUOT: "Delete some of your files, or name a folder on another disk.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Check the symbolic links in the path.",
    errno.EMFILE: "Raise the limit on open files: ulimit -n 4096",
    errno.EIO: "Check the disk for errors.",
}


def failure_of(error: Exception) -> tuple[MoetierError, int]:
    """Return the cause and the fix of any exception as a MoetierError, and the exit code.

    For an unexpected exception the cause names the line of code that raised it.
    """
    from moetier.runtime.machine.memory import shortage_in

    if (shortage := shortage_in(error)) is not None:
        return shortage, EXIT_ERROR
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    match error:
        case OSError(errno=int() as number, strerror=str()):
            cause, fix = _of_system(error), _FIXES.get(number, MORE)
        case RuntimeError() if said.startswith("Symlink loop"):  # pathlib before Python 3.13
            cause, fix = f"{said}.", _FIXES[errno.ELOOP]
        case ModuleNotFoundError():
            cause, fix = f"{said}.", "Run moetier doctor, and install the packages that it names."
        case OSError():  # raised by a library, about a file
            cause, fix = said, f"Check the path. {MORE}"
        case UnicodeDecodeError():
            cause, fix = f"The input is not UTF-8 text: {said}.", "Convert it (iconv -t UTF-8), or name another file."
        case _:
            return MoetierError(f"{type(error).__name__}: {said} ({_source_line(error)})", _FAULT), EXIT_FAULT
    return MoetierError(cause, fix), EXIT_ERROR


_FAULT = f"This is a bug in moetier or in a library. Run the command again with {DEBUG}=1, and report what it prints."


def _of_system(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' -> '.join(names)}: {error.strerror}." if names else f"{error.strerror} (errno {error.errno})."


def _source_line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"


# controls of ASCII and C1, DEL, and characters that change the direction of text: embeddings, overrides and isolates
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_READABLE = dict.fromkeys(_CONTROLS, "?") | {ord("\t"): "\t", ord("\n"): "\n", ord("\r"): ""}


def plain(text: str) -> str:
    """Return ``text`` with "?" for each character that is not printable, line breaks among them."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def readable(text: str) -> str:
    """Return ``text`` with "?" for control characters, and for characters that change the direction of text.

    Newlines and tabs stay; carriage returns are removed. Each character is treated by itself, so a long text may be
    passed in pieces.
    """
    return text.translate(_READABLE)


def show(text: str) -> None:
    """Print a piece of generated text at once. It is made ``readable`` on a terminal, and unchanged elsewhere."""
    print(readable(text) if sys.stdout.isatty() else text, end="", flush=True)


def as_options(text: str) -> str:
    """Return an error's text with options in place of parameters of ``load``: --device-memory for `device_memory`."""

    def option(match: re.Match[str]) -> str:
        name = _parameters().get(match[1])
        return match[0] if name is None else f"--{name.replace('_', '-')}"

    return re.sub(r"`([a-z_.]+)`", option, text)


@cache
def _parameters() -> dict[str, str]:
    """Return the options of the parameters of ``load``, as errors write both: "credentials.ca" -> "tls_ca"."""
    from moetier.runtime.config import CACHE, TIER_OPTIONS
    from moetier.runtime.wire.address import CREDENTIALS

    of_credentials = {f"credentials.{field}": option.name for field, option in CREDENTIALS.items()}
    return {name: name for name in (*TIER_OPTIONS, *CACHE)} | of_credentials


class PlainFormatter(logging.Formatter):
    """Format a log record as one line of printable characters; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message in one line of printable characters."""
        return plain(redacted(as_options(super().formatMessage(record))))

    def formatException(self, ei: Any) -> str:
        """Return a traceback whose lines are printable."""
        return "\n".join(plain(redacted(line)) for line in super().formatException(ei).split("\n"))


class ReadableFormatter(logging.Formatter):
    """Format log records of libraries, and replace control characters as ``readable`` does.

    The messages may quote a model's files, which may contain such characters. Line breaks stay.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record without control characters."""
        return readable(super().format(record))
