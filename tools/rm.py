"""``moetier rm NAME...``: removes pulled models, and what was downloaded of those that are incomplete.

What gives a folder its name is its store. That goes last, so what is left of a removal that is cut has its name still:
``list`` shows it, and ``rm`` goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .users import check_unused

HELP = "remove pulled models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="as moetier list has it")
    parser.add_argument("--yes", action="store_true", help="don't ask; nobody is asked but at a terminal")


def run(arguments: argparse.Namespace) -> int:
    """Removes all of them or, where a name is wrong or a model in use, none; but what has come into use by the time of
    an answer stays, and what is behind it. Raises StoreFormatError or TargetError."""
    from moetier.runtime.config import format_bytes
    from moetier.runtime.models import pulled_model

    from .list import disk_bytes

    found = dict(pulled_model(name) for name in arguments.names)
    for name, folder in found.items():
        check_removable(name, folder)
    for name, folder in found.items():
        size = format_bytes(disk_bytes(folder))
        if not arguments.yes and sys.stdin.isatty() and not _agrees(f"Remove {name} ({size})? [y/N] "):
            continue
        remove(name, folder)
        print(f"{name}: removed, {size}")
    return 0


def _agrees(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def check_removable(name: str, folder: Path) -> None:
    """Raises TargetError for what lies elsewhere, or is in use."""
    from moetier.runtime.models import models_folder
    from moetier.tiers.errors import TargetError

    root = models_folder().resolve()
    if folder.resolve() != root / folder.parent.name / folder.name:
        raise TargetError(
            f"{folder} is a link, or in one, to {folder.resolve()}: moetier removes nothing outside of {root}.",
            "Remove link and folder yourself.",
        )
    check_unused(name, folder)


def remove(name: str, folder: Path) -> None:
    """First what makes it whole, so that nobody takes what is left of it, if this is cut, for a model; last its store.
    Links in it are not followed. Raises TargetError where it is in use."""
    from moetier.tiers.durable import sync_folder
    from moetier.tiers.shard import GROUP, METADATA

    store = folder / GROUP
    with _held(name, store):
        check_unused(name, folder)  # by now, whatever was seen before a person was asked
        if not store.is_symlink():
            (store / METADATA).unlink(missing_ok=True)
            sync_folder(store)
        for path in folder.iterdir():
            if path != store:
                _remove(path)
        sync_folder(folder)
        _remove(store)
        folder.rmdir()
    with contextlib.suppress(OSError):  # other widths are there
        folder.parent.rmdir()


@contextlib.contextmanager
def _held(name: str, store: Path) -> Iterator[None]:
    """With the lock of conversions into it, which the folder has until it is gone."""
    from moetier.tiers.errors import TargetError

    if store.is_symlink():  # no conversion writes there
        yield
        return
    lock = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TargetError(f"{name} is in use: a conversion writes into it.", "End that first.") from None
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
