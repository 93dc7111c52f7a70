"""``moetier rm NAME...``: remove pulled models, complete or not.

If a removal is interrupted, `moetier list` still shows the model, and a second `moetier rm` completes the removal.
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
    parser.add_argument("--yes", action="store_true", help="do not ask; without a terminal, rm never asks")


def run(arguments: argparse.Namespace) -> None:
    """Remove the models.

    Raises StoreFormatError for an unknown name, and TargetError if a model is in use. In both cases nothing is removed.
    If a model comes into use later, while the user is asked about it, TargetError is raised after the models before it
    were removed.
    """
    from moetier.runtime.config import format_bytes
    from moetier.runtime.model.names import pulled_model
    from moetier.tools.convert.model_files import disk_bytes

    models = dict(pulled_model(name) for name in arguments.names)
    for name, folder in models.items():
        _check(name, folder)
    for name, folder in models.items():
        size, mirrors = format_bytes(disk_bytes(folder)), _mirrors(folder)
        if not arguments.yes and sys.stdin.isatty():
            print(f"Remove {name} ({size})? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                continue
        _remove(name, folder)
        print(f"{name}: removed, {size}")
        for mirror in mirrors:
            print(f"{plain(str(mirror))}: mirror of {name}, which is not removed")


def _mirrors(folder: Path) -> list[Path]:
    from moetier.tiers.errors import StoreError
    from moetier.tiers.store.mirror import read_mirrors

    try:
        return [mirror for mirror in read_mirrors(folder) if mirror.exists()]
    except StoreError:
        return []


def _check(name: str, folder: Path) -> None:
    """Check that a model may be removed. Raises TargetError if it is outside of ``models_folder()``, or is in use."""
    from moetier.runtime.model.names import models_folder
    from moetier.tiers.errors import TargetError
    from moetier.tools.convert.model_files import check_unused

    root = models_folder().resolve()
    if folder.resolve() != root / folder.parent.name / folder.name:
        raise TargetError(
            f"{folder} leads through a link to {folder.resolve()}: moetier removes nothing outside of {root}.",
            "Remove the link and the folder yourself.",
        )
    check_unused(name, folder)


def _remove(name: str, folder: Path) -> None:
    """Remove a model's folder without following links. Raises TargetError if it is in use."""
    from moetier.tiers.store.folder import GROUP, replacement_folder
    from moetier.tools.convert.model_files import check_unused, delete, empty, locked

    # first, as a conversion that writes to this folder would put a new model in the place of the removed one
    if replacement_folder(folder).exists():
        from moetier.tools.convert.replacement import discard, finish_replacement

        check_unused(name, folder)
        finish_replacement(folder)
        discard(folder)
    store = folder / GROUP
    linked = store.is_symlink()  # needs no lock, as no conversion writes through a link
    with contextlib.nullcontext() if linked else locked(name, folder):
        check_unused(name, folder)  # again: answering the question may have taken long
        others = [path for path in folder.iterdir() if path != store]
        if linked:
            for path in others:
                delete(path)
        else:
            empty(folder, others)
        delete(folder)
    with contextlib.suppress(OSError):  # raised if the folder still has conversions of the model to other bits
        folder.parent.rmdir()
