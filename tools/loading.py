"""A model directory, loaded by a command that generates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ConfigError

from .startup import uncollected


@contextlib.contextmanager
def loaded(directory: Path, resources: dict[str, Any]) -> Iterator[tuple[Any, Any, float]]:
    """The model, its tokenizer, and the seconds that loading took; in the end closes the tiers. ``resources``: keyword
    arguments of ``load``. Raises MoetierError, for a directory without a tokenizer too."""
    with uncollected():
        import transformers

        from moetier.runtime.generate import load

        transformers.utils.logging.disable_progress_bar()
        start = time.perf_counter()
        model, tokenizer = load(directory, **resources)
        seconds = time.perf_counter() - start
    with model.tiers:
        if tokenizer is None:
            raise ConfigError(f"{directory} has no tokenizer.", "Copy the source's tokenizer files into it.")
        yield model, tokenizer, seconds
