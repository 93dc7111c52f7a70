"""Make a model directory with random weights: from a synthetic checkpoint, or as a whole model without a checkpoint.

The values of a whole model are made when the converter reads them. The same command resumes an interrupted run.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moetier.runtime.checkpoint.containers import Checkpoint, open_checkpoint
from moetier.runtime.formats.tensors import StoredTensor
from moetier.runtime.machine.threads import use_threads
from moetier.tiers.store.atomic import write_durably
from moetier.tools.convert.api import convert_checkpoint
from moetier.tools.convert.conversion import Conversion, ConversionReport
from moetier.tools.convert.options import Options

from .checkpoint import (
    COMMON,
    ROUTINGS,
    TOKENIZER,
    TOKENS_FILE,
    TRACED,
    config_of,
    read_tokens,
    record_tokens,
    shapes_of,
    special_tokens,
    tinymix,
    tokens_json,
)
from .tensors import make_tensors

if TYPE_CHECKING:
    from moetier.runtime.trace.trace import Trace


class UnwrittenCheckpoint(Checkpoint):
    """Checkpoint whose tensors are made when they are read."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes, in bf16."""
        return 2 * sum(map(math.prod, shapes_of(dict(self.config)).values()))

    @property
    def digest(self) -> str:
        """sha256 of the configuration, the geometry and the seed, which determine all tensors."""
        return hashlib.sha256(json.dumps([self.config, self.source]).encode()).hexdigest()


def make_store(
    folder: Path,
    *,
    geometry: str,
    blocks: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    quiet: bool = True,
) -> ConversionReport:
    """Make the model directory ``folder``, or resume an interrupted run. All matrices get 4 bits by plain rounding.

    TOKENS_FILE has only ids that the bundled tokenizer knows. Raises TargetError if ``folder`` holds something else, or
    if its disk is too small.
    """
    use_threads(threads)
    config = config_of(geometry, blocks) | special_tokens()
    source = UnwrittenCheckpoint(
        name=geometry,
        folder=tinymix(),
        source=f"{geometry} {seed}",
        ignored_code=False,
        config=config,
        tensors=cast("dict[str, StoredTensor]", make_tensors(config, ROUTINGS[geometry].share, seed)),
        copied=TOKENIZER,
    )
    options = Options(bits=4, trunk_bits=4, fast=True, threads=threads)
    words: list[Any] = ["moetier", "synthetic", folder.resolve(), "--geometry", geometry, "--seed", seed]
    words += [] if blocks is None else ["--blocks", blocks]
    conversion = replace(Conversion.plan(source, folder, options, quiet=quiet), command=tuple(map(str, words)))
    report = conversion.report({}, was_complete=True) if conversion.target.is_complete() else conversion.run()
    write_durably(folder / TOKENS_FILE, tokens_json(geometry, COMMON["vocab_size"], seed))
    return report


def convert_synthetic(source: Path, target: Path, *, threads: int | None = None, quiet: bool = True) -> None:
    """Convert a synthetic checkpoint to 4 bits, and copy its TOKENS_FILE into the result.

    Raises CheckpointError, TargetError or ConfigError.
    """
    options = Options(bits=4, fast=True, threads=threads)
    convert_checkpoint(open_checkpoint(source), target, options, quiet=quiet)
    write_durably(target / TOKENS_FILE, (source / TOKENS_FILE).read_bytes())


def routing_of(directory: Path, *, threads: int | None = None) -> Trace:
    """Return a trace of the first TRACED token ids of a model directory that ``convert_synthetic`` made."""
    from moetier.runtime.model.load import load

    model, _ = load(directory, daemon=None, speculate="off", threads=threads)
    with model.tiers:
        return record_tokens(model, read_tokens(directory)[:TRACED])
