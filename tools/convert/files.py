"""How a model directory is removed: first what makes it whole, so that nobody takes what is left, if this is cut, for a
model; last its store, which makes the folder moetier's, and gives it its name: so it can be gone on with."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from moetier.tiers.errors import TargetError
from moetier.tiers.store.atomic import sync_folder
from moetier.tiers.store.folder import GROUP, METADATA


@contextlib.contextmanager
def locked(name: str, folder: Path) -> Iterator[None]:
    """With the lock of conversions into it. Raises TargetError where one has it."""
    lock = os.open(folder / GROUP, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TargetError(f"{name} is in use: a conversion writes into it.", "End that first.") from None
    finally:
        os.close(lock)


def empty(folder: Path, beside: Iterable[Path]) -> None:
    """Removes what is in its store, and ``beside`` it; the store's own folder stays."""
    store = folder / GROUP
    (store / METADATA).unlink(missing_ok=True)
    sync_folder(store)
    for path in beside:
        delete(path)
    sync_folder(folder)
    for path in store.iterdir():
        delete(path)


def delete(path: Path) -> None:
    """With all that is in it; of a link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
