"""A checkpoint as it is seen before its weights are there: its config, and of its tensors what small files say.

Of a folder with its shards, or of a hub id, their headers give names, types and shapes. Where there is only the index,
it gives the names, and the model that they are loaded into gives shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.dequantize import Plain, SourceTensor, source_tensors
from moetier.runtime.checkpoint.files import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    locate,
    names_code,
    open_checkpoint,
    read_json,
    read_places,
    some,
    weights_of,
)
from moetier.runtime.checkpoint.safetensors import StoredTensor, listed
from moetier.tiers.errors import CheckpointError
from moetier.tools.convert.trunk import SPELLINGS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ON_HUB = ("config.json", INDEX)  # what is fetched


@dataclass(frozen=True)
class Outline:
    """``checkpoint`` can't be read from; without ``shaped`` its tensors are names, and all else of them is made up."""

    checkpoint: Checkpoint
    shaped: bool
    nbytes: int | None  # of the checkpoint; None where its index does not say
    names_code: bool  # of its own: convert wants --ignore-code
    on_hub: bool  # and not here: it is to be downloaded

    def tensors(self, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, SourceTensor]:
        """What they mean, by name, in a ``model`` on meta that is not cut down."""
        name = str(dtype).removeprefix("torch.")
        found = source_tensors(self.checkpoint.tensors, self.checkpoint.quantization, name)
        return found if self.shaped else _shaped(model, found, name)


def open_outline(source: str | Path) -> Outline:
    """Of a folder or a hub id. Downloads config.json, the index and headers at most. Raises CheckpointError or
    UnsafeCheckpointError; code that a checkpoint names is no error, as nothing is done with it."""
    on_hub = not Path(source).is_dir()
    name, folder = locate(source, ON_HUB)
    config = read_json(folder, "config.json")
    files = weights_of(folder, config)
    absent = [file for file in files if not (folder / file).is_file()]
    if not absent:
        checkpoint = open_checkpoint(folder, ignore_code=True)
        return Outline(checkpoint, True, checkpoint.nbytes, names_code(dict(config)), on_hub=False)
    if on_hub:
        tensors = _of_hub(name, folder, files)
    elif len(absent) == len(files) and (folder / INDEX).is_file():
        tensors = _named(folder)
    elif (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} lacks {some(absent)}, which {INDEX} names.",
            "Download the checkpoint again, or leave config.json and the index alone in a folder to plan with.",
        )
    else:
        open_checkpoint(folder, ignore_code=True)  # says what it lacks
        raise AssertionError(f"{folder} has {WEIGHTS}")
    checkpoint = Checkpoint(name, folder, str(source), True, config, tensors, copied=())
    nbytes = checkpoint.nbytes if on_hub else _total(folder)
    return Outline(checkpoint, on_hub, nbytes, names_code(dict(config)), on_hub=on_hub)


def _of_hub(name: str, folder: Path, files: list[str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, header in hub.headers(name, files, folder.name).items():
        try:
            tensors |= listed(folder / file, header, 0)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} of {name} has a malformed header ({error}).", "Choose another.") from error
    return tensors


def _named(folder: Path) -> dict[str, StoredTensor]:
    """By the index alone."""
    return {
        tensor: StoredTensor(tensor, "BF16", (), folder / file, 0)
        for tensor, file in read_places(folder, INDEX).items()
    }


def _total(folder: Path) -> int | None:
    metadata = read_json(folder, INDEX).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    return int(total) if isinstance(total, int | float) and total > 0 else None


def _shaped(model: PreTrainedModel, names: Iterable[str], dtype: str) -> dict[str, SourceTensor]:
    """Each as large as its part of what the model makes of it; of an expert's matrices only their number counts."""
    from moetier.runtime.checkpoint.blueprint import destinations

    shapes: Mapping[str, Any] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made: dict[str, SourceTensor] = {}
    for members, targets in destinations(model, names):
        known = [shapes[target] for target in targets if target in shapes]
        plain = len(members) == 1 and len(known) == 1
        share = sum(map(math.prod, known)) // len(members)
        for name in members:
            shape = known[0] if plain else (share,)
            made[name] = Plain(StoredTensor(name, SPELLINGS[dtype], shape, Path(name), 0))
    return made
