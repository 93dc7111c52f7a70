"""The user's folders for caches, data and state (XDG Base Directory Specification 0.8)."""

from __future__ import annotations

import os
from pathlib import Path

BELOW_HOME = {"CACHE": ".cache", "DATA": ".local/share", "STATE": ".local/state"}


def user_folder(kind: str) -> Path | None:
    """Return ``moetier`` in ``$XDG_CACHE_HOME`` or the like. ``kind`` is a key of BELOW_HOME.

    Returns None if the variable names no folder and the user has no home folder.
    """
    folder = Path(os.environ.get(f"XDG_{kind}_HOME", ""))
    if not folder.is_absolute():  # the specification says to ignore such a value
        try:
            folder = Path.home() / BELOW_HOME[kind]
        except RuntimeError:
            return None
    return folder / "moetier"
