"""Texts for a terminal: a cause and a fix for each error, and text from elsewhere without control characters."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from moetier.tiers.errors import MoetierError

EXIT_ERROR = 1
EXIT_FAULT = os.EX_SOFTWARE  # 70: a bug

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
    """Return cause and fix of any exception, and the exit code. If it is unexpected, the cause tells where it arose."""
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
        case MemoryError():
            cause, fix = "The memory is full.", _FIXES[errno.ENOMEM]
        case UnicodeDecodeError():
            cause, fix = f"The input is not UTF-8 text: {said}.", "Convert it (iconv -t UTF-8), or name another file."
        case _:
            return MoetierError(f"{type(error).__name__}: {said} ({_place(error)})", _FAULT), EXIT_FAULT
    return MoetierError(cause, fix), EXIT_ERROR


_FAULT = (
    "This is a bug in moetier or in a library. Run the command again with MOETIER_DEBUG=1, and report what it prints."
)


def _of_system(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' -> '.join(names)}: {error.strerror}." if names else f"{error.strerror} (errno {error.errno})."


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"


_TLS = {name: f"tls_{name}" for name in ("ca", "cert", "key")}  # fields of Credentials whose options have another name
# controls of ASCII and C1, DEL, and characters that change the direction of text: embeddings, overrides and isolates
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_READABLE = dict.fromkeys(_CONTROLS, "?") | {ord("\t"): "\t", ord("\n"): "\n", ord("\r"): ""}


def plain(text: str) -> str:
    """Return ``text`` in one line, with "?" for each character that is not printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def readable(text: str) -> str:
    """Return ``text`` without carriage returns, with "?" for other control characters and for marks of direction.

    Newlines and tabs stay. The result for a character does not depend on others, so a text may come in pieces.
    """
    return text.translate(_READABLE)


def show(text: str) -> None:
    """Print a piece of generated text at once: readable on a terminal, unchanged in a file or a pipe."""
    print(readable(text) if sys.stdout.isatty() else text, end="", flush=True)


def as_options(text: str) -> str:
    """Replace each parameter of ``load`` in an error's text by its option: `device_memory` by --device-memory."""

    def option(found: re.Match[str]) -> str:
        name = found[1] or _TLS.get(found[2], found[2])
        return f"--{name.replace('_', '-')}"

    return _parameters().sub(option, text)


@cache
def _parameters() -> re.Pattern[str]:
    """Return a pattern that matches the parameters of ``load`` in the form in which errors name them."""
    from moetier.runtime.config import OPTIONS
    from moetier.runtime.wire.address import Credentials

    return re.compile(
        rf"`(?:({'|'.join(OPTIONS)})|credentials\.({'|'.join(each.name for each in fields(Credentials))}))`"
    )


class PlainFormatter(logging.Formatter):
    """Format a log record as one line of printable characters; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message in one line of printable characters."""
        return plain(as_options(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        """Return a traceback whose lines are printable."""
        return "\n".join(map(plain, super().formatException(ei).split("\n")))


class ReadableFormatter(logging.Formatter):
    """Format log records of libraries, and replace control characters as ``readable`` does.

    The messages may quote a model's files, which may contain such characters. Line breaks stay.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record without control characters."""
        return readable(super().format(record))
