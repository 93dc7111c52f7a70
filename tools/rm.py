"""``moetier rm NAME...``: removes pulled models, and what was downloaded of those that are incomplete."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HELP = "remove pulled models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="as moetier list has it")
    parser.add_argument("--yes", action="store_true", help="don't ask; nobody is asked but at a terminal")


def run(arguments: argparse.Namespace) -> int:
    """Removes all of them or, where a name is wrong or a model in use, none. Raises StoreFormatError or TargetError."""
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
        remove(folder)
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
    if users := users_of(folder):
        which = "; ".join(f"process {pid} ({command})" for pid, command in users.items())
        raise TargetError(f"{name} is in use: {which}.", "End that first.")


def users_of(folder: Path) -> dict[int, str]:
    """The processes, as far as one may look at them, that have files of a folder open or mapped: a daemon, a server, a
    conversion. pid -> command line."""
    prefix = f"{folder.resolve()}/"
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(f"{path}/".startswith(prefix) for path in _opened(process)) or prefix in _maps(process):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found[int(process.name)] = " ".join(words).strip()[:100]
    return found


def _opened(process: Path) -> Iterator[str]:
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            yield str(link.readlink())


def _maps(process: Path) -> str:
    return (process / "maps").read_text(errors="replace")


def remove(folder: Path) -> None:
    """First what makes it whole, so that nobody takes what is left of it, if this is cut, for a model. Links in it are
    not followed."""
    from moetier.tiers.shard import GROUP, METADATA

    if not (folder / GROUP).is_symlink():
        (folder / GROUP / METADATA).unlink(missing_ok=True)
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # other widths are there
        folder.parent.rmdir()
