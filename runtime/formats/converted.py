"""Model directories of moetier, which are no checkpoints."""

from __future__ import annotations

from typing import NoReturn

from moetier.tiers.errors import UnsupportedModelError

from .registry import Format


class Converted(Format):
    """A model directory: it is refused where a checkpoint is asked for."""

    def sources(self, dtype: str) -> NoReturn:
        """Raise UnsupportedModelError."""
        raise UnsupportedModelError(
            "This is a model directory of moetier: it is converted already.",
            "Use it as it is, or give the checkpoint that it was made from.",
        )
