"""Files of a trunk: whether they stay mapped, and whether they were written to.

A mapped trunk is computed from the file's pages, which processes share and the kernel may drop. So a program that
writes into the file changes the model, and one that truncates it causes a SIGBUS. A small trunk is copied instead. The
files of any other trunk stay open, and are compared with what they were before each forward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from moetier.runtime.machine.memory import mapped_files
from moetier.tiers.closeable import closed_on_error
from moetier.tiers.errors import StoreError, StoreFormatError
from moetier.tiers.store.folder import command
from moetier.tiers.store.unchanged import Unchanged

COPIED_BYTES = 256 << 20  # size of the largest trunk that is copied, in about a tenth of a second


class TrunkFiles:
    """The files of a trunk, opened before they are read, and compared with what they were then. Thread-safe."""

    def __init__(self, location: Path, paths: Sequence[Path]) -> None:
        """Open the files ``paths`` of the model at ``location``.

        Raises StoreReadError, and StoreFormatError if a file is missing.
        """
        fix = (
            "If it was changed on purpose, load the model again. Otherwise restore the file: "
            f"{command('verify', location)} says what differs."
        )
        self._files: list[Unchanged] = []
        self.close = weakref.finalize(self, _close, self._files)  # can be repeated
        for path in paths:
            try:
                self._files.append(Unchanged.open(path, fix))
            except FileNotFoundError:
                raise StoreFormatError(f"{path}, a file of the trunk, is missing.", fix) from None

    def check(self) -> None:
        """Raise StoreFormatError if a file was written to since it was opened. Do nothing once they are closed."""
        try:
            for file in list(self._files):
                file.check()
        except StoreError:
            if self.close.alive:  # else another thread has closed the descriptors meanwhile, and may use their numbers
                raise

    @contextlib.contextmanager
    def for_load(self) -> Iterator[None]:
        """Close the files if the ``with`` block, which loads the trunk, raises.

        Raises StoreFormatError in place of the block's error if a file was written to, as that explains any error.
        """
        with closed_on_error(self):
            try:
                yield
            except Exception:
                self.check()
                raise

    def finish_load(self, model: nn.Module, *, is_shared: bool) -> None:
        """Copy a small trunk out of its files after the load, unless it ``is_shared``, and close files without a use.

        Raises StoreFormatError if a file was written to, or replaced, while the model was loaded.
        """
        if not is_shared and mapped_bytes(model) <= COPIED_BYTES:
            _copy_mapped(model)
        self.check()
        for file in self._files:
            if file.is_replaced():
                raise StoreFormatError(f"{file.path} was replaced while it was being read.", "Load the model again.")
        if not mapped_bytes(model):
            self.close()


def _close(files: list[Unchanged]) -> None:
    while files:
        files.pop().close()


def mapped_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's tensors that are in mapped files. Their memory still counts as free."""
    return sum(tensor.nbytes for tensor in _mapped(model))


def _copy_mapped(model: nn.Module) -> None:
    """Copy the model's tensors out of mapped files."""
    copies: dict[tuple[object, ...], Tensor] = {}  # the head may be the embedding
    for tensor in _mapped(model):
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if place not in copies:
            copies[place] = tensor.detach().clone()
        tensor.data = copies[place]


def _mapped(model: nn.Module) -> Iterator[Tensor]:
    """Yield the model's parameters and buffers that are in mapped files."""
    maps = [addresses for addresses, _ in mapped_files()]  # ascending, as the system lists them
    starts = [addresses.start for addresses in maps]
    for tensor in chain[Tensor](model.parameters(), model.buffers()):
        address = tensor.data_ptr()
        place = bisect_right(starts, address) - 1
        if place >= 0 and address in maps[place]:
            yield tensor
