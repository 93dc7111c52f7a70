"""``moetier rm NAME...``: remove pulled models, complete or not.

After an interrupted removal ``list`` still shows the model, and ``rm`` with its name completes the removal.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from moetier.tools.cli.failure import plain

EXAMPLES = ("moetier rm Qwen/Qwen3-30B-A3B:4bit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier rm`."""
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name that moetier list shows")
    parser.add_argument("--yes", action="store_true", help="remove without asking; only a terminal is asked")


def run(arguments: argparse.Namespace) -> int:
    """Remove the models and return 0. Raises StoreFormatError or TargetError.

    If a name is wrong, or a model is in use when the command begins, nothing is removed. If a model is used by the time
    the user has answered the question, the command ends there.
    """
    from moetier.runtime.config import format_bytes
    from moetier.runtime.pulled import pulled_model
    from moetier.tools.convert.files import disk_bytes

    found = dict(pulled_model(name) for name in arguments.names)
    for name, folder in found.items():
        _check(name, folder)
    for name, folder in found.items():
        size, mirrors = format_bytes(disk_bytes(folder)), _mirrors(folder)
        if not arguments.yes and sys.stdin.isatty():
            print(f"Remove {name} ({size})? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                continue
        _remove(name, folder)
        print(f"{name}: removed, {size}")
        for mirror in mirrors:
            print(f"{plain(str(mirror))}: its mirror, which is not removed")
    return 0


def _mirrors(folder: Path) -> list[Path]:
    from moetier.tiers.errors import StoreError
    from moetier.tiers.store.mirror import read_mirrors

    try:
        return [mirror for mirror in read_mirrors(folder) if mirror.exists()]
    except StoreError:
        return []


def _check(name: str, folder: Path) -> None:
    """Check that a model may be removed. Raises TargetError if it lies elsewhere, or is in use."""
    from moetier.runtime.pulled import models_folder
    from moetier.tiers.errors import TargetError
    from moetier.tools.convert.files import check_unused

    root = models_folder().resolve()
    if folder.resolve() != root / folder.parent.name / folder.name:
        raise TargetError(
            f"{folder} is a link, or in one, to {folder.resolve()}: moetier removes nothing outside of {root}.",
            "Remove link and folder yourself.",
        )
    check_unused(name, folder)


def _remove(name: str, folder: Path) -> None:
    """Remove a model's folder without following links. Raises TargetError if it is in use."""
    from moetier.tiers.store.folder import GROUP
    from moetier.tools.convert.files import check_unused, delete, empty, locked

    store = folder / GROUP
    linked = store.is_symlink()  # needs no lock, as no conversion writes through a link
    with contextlib.nullcontext() if linked else locked(name, folder):
        check_unused(name, folder)  # again: answering the question may have taken long
        beside = [path for path in folder.iterdir() if path != store]
        if linked:
            for path in beside:
                delete(path)
        else:
            empty(folder, beside)
        delete(folder)
    with contextlib.suppress(OSError):  # not empty: it has models of other widths
        folder.parent.rmdir()
