"""Loading of a model directory, for commands that generate text."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetier.runtime.libraries.lean import lean_imports
from moetier.runtime.machine.memory import shortage
from moetier.tiers.errors import ConfigError

from .failure import ReadableFormatter

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def loaded(directory: Path, resources: dict[str, Any]) -> Iterator[tuple[Any, Any, float]]:
    """Load a model. Yield it with its tokenizer and the seconds that loading took. Close its tiers after the block.

    ``resources`` are the keyword arguments of ``load``. A warning is logged if memory is short, if the budget exceeds
    the machine's memory, or if the context exceeds the one that the model was trained for. Raises MoetierError if the
    model can't be loaded, or has no tokenizer.
    """
    if short := shortage():
        _log.warning("%s", short)
    with lean_imports():
        from moetier.runtime.devices.device import chosen_device
        from moetier.runtime.kernels.ahead import compile_ahead
        from moetier.runtime.model.names import model_directory

        if not chosen_device(resources.get("device", "auto")).has_memory:
            compile_ahead(model_directory(directory))

        import transformers

        from moetier.runtime.model.load import load

        transformers.utils.logging.disable_progress_bar()
        for handler in logging.getLogger("transformers").handlers:
            handler.setFormatter(ReadableFormatter())
        start = time.perf_counter()
        model, tokenizer = load(directory, **resources)
        seconds = time.perf_counter() - start
    with model.tiers:
        if tokenizer is None:
            raise ConfigError(
                f"{directory} has no tokenizer.",
                "Give a GGUF file that has one."
                if directory.is_file()
                else "Copy the tokenizer files of the model into it.",
            )
        _warn(model, resources["ram"], resources["context"])
        yield model, tokenizer, seconds


def _warn(model: Any, ram: str | None, context: int | None) -> None:
    from moetier.runtime.config import Size
    from moetier.runtime.machine.memory import exceeded
    from moetier.runtime.model.context import longest_context
    from moetier.tiers.text import format_bytes

    limits = exceeded(None if ram is None else Size.parse(ram))
    if limits is not None and model.tiers.host.stats().name == "host":
        _log.warning(
            "--ram %s is more than the %s of %s. Only as much as all experts need is used.",
            ram,
            format_bytes(limits.bytes),
            limits.limiter,
        )
    if context is not None and (trained := longest_context(model.config)) and context > trained:
        said = f"--context {context} is more than the {trained:,} tokens of the model's training: no more are used."
        _log.warning("%s", said)
