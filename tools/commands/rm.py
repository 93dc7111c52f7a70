"""``moetier rm NAME...``: remove models, complete or not, and forget names whose models are gone.

If a removal is interrupted, `moetier list` still shows the model, and a second `moetier rm` completes the removal. A
linked checkpoint is the user's: only its name is forgotten.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from moetier.tools.cli.failure import plain

EXAMPLES = ("moetier rm Qwen/Qwen3-30B-A3B:4bit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier rm`."""
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name that moetier list shows")
    parser.add_argument(
        "--yes",
        action="store_true",
        help="do not ask. Without a terminal, rm never asks, and removes converted models only with this option",
    )


def run(arguments: argparse.Namespace) -> None:
    """Remove the models.

    Raises StoreFormatError for an unknown name, UsageError for a converted model without --yes and a terminal, and
    TargetError if a model is in use. In all cases nothing is removed. If a model comes into use later, while the user
    is asked about it, TargetError is raised after the models before it were removed.
    """
    from moetier.runtime.model.name_files import forget_name
    from moetier.runtime.model.names import named_model
    from moetier.tiers.store.folder import GROUP
    from moetier.tiers.text import format_bytes
    from moetier.tools.convert.model_files import disk_bytes

    models = dict(named_model(name) for name in arguments.names)
    removed = {
        name: folder
        for name, folder in models.items()
        if _is_pulled(folder) or os.path.isdir(folder / GROUP)  # noqa: PTH112 - Path.is_dir may raise
    }
    for name, folder in removed.items():
        _check(name, folder, arguments.yes)
    for name, folder in models.items():
        if name not in removed:
            forget_name(name, folder)
            print(f"{name}: forgotten; nothing was removed of {plain(str(folder))}{_unreachable(folder)}")
            continue
        size, mirrors = format_bytes(disk_bytes(folder)), _mirrors(folder)
        place = "" if _is_pulled(folder) else f" in {plain(str(folder))}"
        if not arguments.yes and sys.stdin.isatty():
            print(f"Remove {name}{place} ({size})? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                continue
        kept = _remove(name, folder)
        forget_name(name, folder)
        print(f"{name}: removed, {size}{place}")
        for path in kept:
            print(f"{plain(str(path))}: stays, as it is not known to be of moetier")
        for mirror in mirrors:
            print(f"{plain(str(mirror))}: mirror of {name}, which is not removed")


def _is_pulled(folder: Path) -> bool:
    from moetier.runtime.model.names import models_folder

    return folder.parent.parent == models_folder()


def _unreachable(folder: Path) -> str:
    try:
        folder.stat()
    except FileNotFoundError:
        return ", which is gone"
    except OSError as error:
        return f", which can't be read ({error.strerror})"
    return ""


def _mirrors(folder: Path) -> list[Path]:
    from moetier.tiers.errors import StoreError
    from moetier.tiers.store.mirror import read_mirrors

    try:
        return [mirror for mirror in read_mirrors(folder) if mirror.exists()]
    except (StoreError, OSError):
        return []


def _check(name: str, folder: Path, is_sure: bool) -> None:
    """Check that a model may be removed. Raises TargetError if a link leads to it, or if it is in use."""
    from moetier.runtime.model.names import models_folder
    from moetier.tiers.errors import TargetError
    from moetier.tiers.store.folder import GROUP
    from moetier.tools.cli.parser import UsageError
    from moetier.tools.convert.model_files import check_unused

    real = folder.resolve()
    if _is_pulled(folder):
        root = models_folder().resolve()
        if real != root / folder.parent.name / folder.name:
            raise TargetError(
                f"{folder} leads through a link to {real}: moetier removes nothing outside of {root}.",
                "Remove the link and the folder yourself.",
            )
    elif real != folder or (folder / GROUP).is_symlink():
        raise TargetError(f"{folder} leads through a link.", "Remove the link and the folder yourself.")
    elif not is_sure and not sys.stdin.isatty():
        raise UsageError(
            f"{name} is a converted model, in {folder}: rm removes it only after a question.", "Give --yes."
        )
    check_unused(name, folder)


def _remove(name: str, folder: Path) -> list[Path]:
    """Remove a model's folder without following links. Return the files in it that are not moetier's, which stay.

    In the folder of pulled models no others are kept. Raises TargetError if the model is in use.
    """
    from moetier.tiers.store.folder import GROUP, REPLACED, replacement_folder
    from moetier.tools.convert.model_files import (
        check_unused,
        delete,
        delete_empty_folders,
        empty,
        files_of_users,
        foreign_copies,
        locked,
        outside_store,
    )

    # first, as a conversion that writes to this folder would put a new model in the place of the removed one
    if replacement_folder(folder).exists() or (folder / REPLACED).exists():
        from moetier.tools.convert.replacement import discard, finish_replacement

        check_unused(name, folder)
        finish_replacement(folder)
        discard(folder)
    store = folder / GROUP
    kept: list[Path] = []
    linked = store.is_symlink()  # needs no lock, as no conversion writes through a link
    with contextlib.nullcontext() if linked else locked(name, folder):
        check_unused(name, folder)  # again: answering the question may have taken long
        if _is_pulled(folder):
            others = [path for path in folder.iterdir() if path != store]
        else:
            kept = sorted([*files_of_users(folder), *foreign_copies(folder)])
            others = [path for path in outside_store(folder) if path not in kept]
        if linked:
            for path in others:
                delete(path)
        else:
            empty(folder, others)
        if kept:
            delete(store)
            delete_empty_folders(folder)
        else:
            delete(folder)
    if _is_pulled(folder):
        with contextlib.suppress(OSError):  # raised if the folder still has conversions of the model to other bits
            folder.parent.rmdir()
    return kept
