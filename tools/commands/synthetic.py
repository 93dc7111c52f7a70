"""``moetier synthetic``: a checkpoint of a large model's geometry with random weights, to try a machine with."""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import COUNT, format_bytes
from moetier.runtime.generation.decoding import SEED
from moetier.tiers.errors import DiskSpaceError, TargetExistsError
from moetier.tools.cli.arguments import add_option
from moetier.tools.lab.synthetic import (
    GEOMETRIES,
    ROUTINGS,
    TOKENS_FILE,
    TOPICS,
    TRACED,
    config_of,
    curve_table,
    deviation_of,
    lru_curve,
    read_tokens,
    record_tokens,
    shapes_of,
    token_ids,
)

if TYPE_CHECKING:
    import torch

    from moetier.runtime.checkpoint.tensors import SourceTensor, StoredTensor
    from moetier.runtime.trace.trace import Trace

EXAMPLES = ("moetier synthetic build/mixtral-4L --store build/mixtral-4L-4bit",)

POOL_WEIGHTS = (1 << 24) - 3  # prime: rows of a power of two begin everywhere in it
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier synthetic`."""
    parser.add_argument("target", metavar="DST", type=Path, help="folder of the new checkpoint")
    parser.add_argument(
        "--geometry", choices=GEOMETRIES, default="mixtral-4L", help="which model's geometry (default: %(default)s)"
    )
    parser.add_argument("--blocks", type=COUNT, metavar="N", help="number of blocks (default: the geometry's own)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="seed of the weights (default: %(default)s)")
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="also convert it, to 4 bits by plain rounding, and compare its routing with a trained model's",
    )
    add_option(parser, "threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return 0. Raises MoetierError."""
    from moetier.runtime.threads import use_threads

    use_threads(arguments.threads)
    size = make_synthetic(
        arguments.target, geometry=arguments.geometry, blocks=arguments.blocks, seed=arguments.seed, quiet=False
    )
    found: dict[str, Any] = {"checkpoint": str(arguments.target), "bytes": size, "store": None, "hit_ratio": {}}
    if not arguments.json:
        print(f"{arguments.target}: {format_bytes(size)}", flush=True)
    if arguments.store is not None:
        convert_synthetic(arguments.target, arguments.store, threads=arguments.threads, quiet=False)
        trace = routing_of(arguments.store, threads=arguments.threads)
        if not arguments.json:
            print(curve_table(arguments.geometry, trace))
        else:
            curve = lru_curve(trace, list(ROUTINGS[arguments.geometry].curve))
            found |= {"store": str(arguments.store), "hit_ratio": curve}
    if arguments.json:
        print(json.dumps(found))
    return 0


def convert_synthetic(source: Path, target: Path, *, threads: int | None = None, quiet: bool = True) -> None:
    """To 4 bits, its fixed tokens with it. Raises CheckpointError, TargetError or ConfigError."""
    from moetier.tiers.store.atomic import write_durably

    from .convert import convert

    convert(source, target, bits=4, fast=True, threads=threads, quiet=quiet)
    write_durably(target / TOKENS_FILE, (source / TOKENS_FILE).read_bytes())


def routing_of(directory: Path, *, threads: int | None = None) -> Trace:
    """Of a model directory that ``convert_synthetic`` made, for the first of its fixed tokens."""
    from moetier.runtime.model.load import load

    model, _ = load(directory, daemon=None, speculate="off", threads=threads)
    with model.tiers:
        return record_tokens(model, read_tokens(directory)[:TRACED])


def make_synthetic(
    folder: Path,
    *,
    geometry: str = "mixtral-4L",
    blocks: int | None = None,
    sizes: Mapping[str, Any] | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> int:
    """Writes the checkpoint and returns its bytes; ``sizes`` are of its config.json, in place of the geometry's own.

    Raises ConfigError, TargetExistsError or DiskSpaceError.
    """
    from moetier.runtime.checkpoint.files import INDEX
    from moetier.tiers.store.atomic import disk_errors, make_folders, write_durably
    from moetier.tools.cli.progress import Progress
    from moetier.tools.convert.files import free_bytes
    from moetier.tools.convert.trunk import index_of, plan_trunk

    config = config_of(geometry, blocks, sizes)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TargetExistsError(f"{folder} exists and is not an empty folder.", "Choose another place.")
    shards = plan_trunk(_tensors(config, ROUTINGS[geometry].share, seed), "model")
    size = sum(shard.size for shard in shards)
    if size > (free := free_bytes(folder)):
        raise DiskSpaceError(f"{folder} needs {size:,} bytes; {free:,} are free.", "Free some space.")
    own = files("moetier.assets") / "tinymix"
    tokens = json.loads((own / "config.json").read_bytes())
    config |= {name: tokens[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in tokens}
    make_folders(folder)
    with disk_errors(folder / "model"), Progress("weights", size, quiet=quiet) as progress:
        for shard in shards:
            shard.write(folder, progress.advance)
        write_durably(folder / INDEX, index_of(shards))
        for name in TOKENIZER:
            write_durably(folder / name, (own / name).read_bytes())
        write_durably(folder / TOKENS_FILE, _tokens_json(geometry, config["vocab_size"], seed))
        write_durably(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    return size


@dataclass(frozen=True)
class RandomTensor:
    """bf16. A stretch of one endless stream of normal numbers; ``start`` is where in it. Norms are ones."""

    shape: tuple[int, ...]
    start: int
    deviation: float
    pool: torch.Tensor  # [POOL_WEIGHTS]
    dtype: str = "bfloat16"

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Nothing: the tensor [rows, ...] is made, not stored."""
        return ()

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Make ``count`` rows from ``first`` on, all by default: bf16 [count, columns], or ones [count]."""
        import torch

        rows = self.shape[0] - first if count is None else count
        out = torch.empty((rows, *self.shape[1:]), dtype=torch.bfloat16)
        if len(self.shape) == 1:
            return out.fill_(1.0)
        flat, done = out.view(-1), 0
        position = (self.start + first * self.shape[1]) % POOL_WEIGHTS
        while done < len(flat):
            length = min(len(flat) - done, POOL_WEIGHTS - position)
            torch.mul(self.pool[position : position + length], self.deviation, out=flat[done : done + length])
            done, position = done + length, 0
        return out


@dataclass(frozen=True)
class Embeddings:
    """bf16. Of tokens that have topics: ``tokens`` [V, H] are their own parts, ``topics`` [TOPICS, H] the others."""

    tokens: RandomTensor
    topics: RandomTensor
    dtype: str = "bfloat16"

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Nothing: the embeddings [tokens, hidden] are made, not stored."""
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Vocabulary and hidden size."""
        return self.tokens.shape

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Make the embeddings of ``count`` tokens from ``first`` on, all by default: bf16 [count, hidden]."""
        import torch

        own = self.tokens.read(first, count)
        return own.add_(self.topics.read()[torch.arange(first, first + len(own)) % TOPICS])


def _tensors(config: dict[str, Any], share: float, seed: int) -> dict[str, SourceTensor]:
    """``share``: of an embedding's variance, its topic's."""
    import torch

    pool = torch.empty(POOL_WEIGHTS).normal_(generator=torch.Generator().manual_seed(seed)).bfloat16()

    def tensor(name: str, shape: tuple[int, ...], deviation: float) -> RandomTensor:
        return RandomTensor(shape, zlib.crc32(name.encode()) % POOL_WEIGHTS, deviation, pool)

    found: dict[str, SourceTensor] = {
        name: tensor(name, shape, deviation_of(name, shape, config) if len(shape) > 1 else 0.0)
        for name, shape in shapes_of(config).items()
    }
    embeddings = found["model.embed_tokens.weight"].shape
    return found | {
        "model.embed_tokens.weight": Embeddings(
            tensor("tokens", embeddings, (1 - share) ** 0.5),
            tensor("topics", (TOPICS, embeddings[1]), share**0.5),
        )
    }


def _tokens_json(geometry: str, vocabulary: int, seed: int) -> bytes:
    ids = token_ids(geometry, vocabulary, seed=seed)
    return json.dumps({"geometry": geometry, "seed": seed, "token_ids": ids}).encode() + b"\n"
