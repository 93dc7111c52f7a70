"""Lines and conversations that a chat in a terminal keeps for later chats.

Both are in ``$XDG_STATE_HOME/moetier/chat`` (XDG Base Directory Specification 0.8), in files that only the user can
read. If they can't be written, nothing is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetier.runtime.generation.conversation import Message
from moetier.tiers.errors import ConfigError
from moetier.tiers.store.folder import user_folder

MAX_LINES = 1000  # the file of lines is cut to these when it has twice as many
MAX_CONVERSATIONS = 20
MAX_BYTES = 16 << 20  # of a file that is read
_FOLD = str.maketrans("\n", "\r")  # a pasted text of several lines is one line of the file
_UNFOLD = str.maketrans("\r", "\n")


def state_folder() -> Path | None:
    """Return the user's folder for the state of chats; None if the user has no home folder."""
    folder = user_folder("STATE")
    return None if folder is None else folder / "chat"


class LineHistory:
    """Lines that were typed in all chats. Each is appended to a file at once, so that a crash loses none.

    The file is opened for each line, because another chat may have replaced it.
    """

    def __init__(self, folder: Path | None) -> None:
        """Read the lines in ``folder``; without one, keep none."""
        self.lines: list[str] = []
        self._path = None if folder is None else folder / "lines"
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(_open_private(self._path, os.O_RDWR), errors="replace", newline="\n") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - MAX_BYTES))
                lines = stream.read().split("\n")[:-1]
            self.lines = [line.translate(_UNFOLD) for line in lines[-MAX_LINES:]]
            if len(lines) > 2 * MAX_LINES:
                _replace_private(self._path, "".join(f"{line}\n" for line in lines[-MAX_LINES:]))

    def add(self, line: str) -> None:
        """Append a line."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                file = _open_private(self._path, os.O_WRONLY | os.O_APPEND)
                with os.fdopen(file, "wb") as stream:
                    stream.write(f"{line.translate(_FOLD)}\n".encode(errors="replace"))


class KeptConversation:
    """File of one chat's conversation, in the form of /save. Other chats have files of their own."""

    def __init__(self, folder: Path | None) -> None:
        """Keep the conversation in ``folder``; without one, nowhere."""
        self._path = None if folder is None else folder / "conversations" / f"{time.time_ns():020}-{os.getpid()}.json"

    def save(self, messages: Sequence[Message]) -> None:
        """Replace what was saved. The first time, remove the oldest files of other chats if there are too many."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if not self._path.exists():
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                for old in _conversations(self._path.parent)[: 1 - MAX_CONVERSATIONS]:
                    old.unlink(missing_ok=True)
            _replace_private(self._path, messages_text(messages))


def last_conversation(folder: Path | None) -> list[Message]:
    """Return the messages of the chat that began last. Raises ConfigError if there is none."""
    kept = [] if folder is None else _conversations(folder / "conversations")
    if not kept:
        raise ConfigError(
            "There is no conversation to resume.", "Leave out --resume. A chat in a terminal keeps its conversation."
        )
    return read_messages(kept[-1])


def messages_text(messages: Sequence[Message]) -> str:
    """Return messages as /save writes them: a JSON list."""
    return json.dumps(messages, ensure_ascii=False, indent=1) + "\n"


def read_messages(path: Path) -> list[Message]:
    """Return the messages in a file that /save has written. Raises ConfigError if it is not such a file."""
    fix = "Name a file that /save has written: a JSON list of messages, each with role and content."
    try:
        with path.open("rb") as stream:
            found: Any = json.loads(stream.read(MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}).", fix) from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is not JSON.", fix) from None
    if not isinstance(found, list) or not all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in found
    ):
        raise ConfigError(f"{path} is not a list of messages.", fix)
    return [{"role": each["role"], "content": each["content"]} for each in found]


def _conversations(folder: Path) -> list[Path]:
    """Return the files of conversations, the oldest first."""
    return sorted(folder.glob("*.json"))


def _open_private(path: Path, flags: int) -> int:
    file = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(file, 0o600)
    return file


def _replace_private(path: Path, text: str) -> None:
    """Write a file that only the user can read, whole or not at all."""
    new = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with os.fdopen(_open_private(new, os.O_WRONLY | os.O_TRUNC), "wb") as stream:
        stream.write(text.encode(errors="replace"))
    new.replace(path)
