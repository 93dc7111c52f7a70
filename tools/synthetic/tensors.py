"""Tensors of a synthetic checkpoint, whose values are made when they are read, and the files that have them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetier.runtime.formats.tensors import SourceTensor, StoredTensor
from moetier.tiers.errors import DiskSpaceError, TargetExistsError
from moetier.tools.cli.progress import ByteProgress

from .checkpoint import (
    POOL_WEIGHTS,
    ROUTINGS,
    TOKENIZER,
    TOKENS_FILE,
    TOPICS,
    config_of,
    deviation_of,
    shapes_of,
    special_tokens,
    tinymix,
    tokens_json,
)


@dataclass(frozen=True)
class RandomTensor(SourceTensor):
    """Random tensor in bf16, whose values are made when they are read.

    The values of a matrix are the random numbers in ``pool``, times ``deviation``. They are taken from position
    ``start`` on, and from the pool's beginning after its end. All elements of a vector are ``deviation``.
    """

    shape: tuple[int, ...]
    start: int
    deviation: float
    pool: torch.Tensor  # [POOL_WEIGHTS], normally distributed
    dtype: str = "bfloat16"
    parts: tuple[StoredTensor, ...] = ()  # empty, as the tensor is made and not stored

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Make ``count`` rows from row ``first`` on, by default all rows: bf16 [count, ...]."""
        rows = self.shape[0] - first if count is None else count
        out = torch.empty((rows, *self.shape[1:]), dtype=torch.bfloat16)
        if len(self.shape) == 1:
            return out.fill_(self.deviation)
        flat, done = out.view(-1), 0
        position = (self.start + first * math.prod(self.shape[1:])) % POOL_WEIGHTS
        while done < len(flat):
            length = min(len(flat) - done, POOL_WEIGHTS - position)
            torch.mul(self.pool[position : position + length], self.deviation, out=flat[done : done + length])
            done, position = done + length, 0
        return out


@dataclass(frozen=True)
class Embeddings(SourceTensor):
    """Embeddings [V, H] of tokens with topics. Each is the sum of the token's own part and its topic's part.

    ``tokens`` [V, H] has the parts of the tokens, ``topics`` [TOPICS, H] those of the topics.
    """

    tokens: RandomTensor
    topics: RandomTensor
    dtype: str = "bfloat16"
    parts: tuple[StoredTensor, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape: vocabulary and hidden size."""
        return self.tokens.shape

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Make the embeddings of ``count`` tokens from token ``first`` on, by default of all: bf16 [count, hidden]."""
        own = self.tokens.read(first, count)
        return own.add_(self.topics.read()[torch.arange(first, first + len(own)) % TOPICS])


def make_tensors(config: dict[str, Any], share: float, seed: int) -> dict[str, SourceTensor]:
    """Return all tensors of a random checkpoint, by name. Their values are made when they are read.

    A token's embedding is a part of its own plus a part that all tokens of its topic have in common. ``share`` is the
    fraction of the variance, from 0 to 1, that comes from the common part.
    """
    pool = torch.empty(POOL_WEIGHTS).normal_(generator=torch.Generator().manual_seed(seed)).bfloat16()

    def tensor(name: str, shape: tuple[int, ...], deviation: float) -> RandomTensor:
        return RandomTensor(shape, zlib.crc32(name.encode()) % POOL_WEIGHTS, deviation, pool)

    tensors: dict[str, SourceTensor] = {
        name: tensor(name, shape, deviation_of(name, shape, config)) for name, shape in shapes_of(config).items()
    }
    embeddings = tensors["model.embed_tokens.weight"].shape
    return tensors | {
        "model.embed_tokens.weight": Embeddings(
            tensor("tokens", embeddings, (1 - share) ** 0.5),
            tensor("topics", (TOPICS, embeddings[1]), share**0.5),
        )
    }


def make_synthetic(
    folder: Path,
    *,
    geometry: str = "mixtral-4L",
    blocks: int | None = None,
    sizes: Mapping[str, Any] | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> int:
    """Write a synthetic checkpoint into ``folder``, and return the size of its weights in bytes.

    ``blocks`` and ``sizes`` replace values of the geometry's config.json. Raises TargetExistsError if ``folder`` is not
    empty, or DiskSpaceError.
    """
    from moetier.runtime.checkpoint.safetensors_folder import INDEX
    from moetier.tiers.store.atomic import disk_errors, make_folders, write_durably
    from moetier.tools.convert.model_files import free_bytes
    from moetier.tools.convert.trunk_writer import distribute_trunk, index_of

    config = config_of(geometry, blocks, sizes)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TargetExistsError(f"{folder} exists and is not an empty folder.", "Choose another folder, or empty it.")
    shards = distribute_trunk(make_tensors(config, ROUTINGS[geometry].share, seed), "model")
    size = sum(shard.size for shard in shards)
    if size > (free := free_bytes(folder)):
        raise DiskSpaceError(
            f"{folder} needs {size:,} bytes; {free:,} are free.", "Free some space, or choose another disk."
        )
    config |= special_tokens()
    make_folders(folder)
    with disk_errors(folder / "model"), ByteProgress("weights", size, quiet=quiet) as progress:
        for shard in shards:
            shard.write(folder, progress.advance)
        write_durably(folder / INDEX, index_of(shards))
        for name in TOKENIZER:
            write_durably(folder / name, (tinymix() / name).read_bytes())
        write_durably(folder / TOKENS_FILE, tokens_json(geometry, config["vocab_size"], seed))
        write_durably(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    return size
