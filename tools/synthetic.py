"""``moetier synthetic``: a checkpoint of a large model's geometry with random weights, to try a machine with."""

from __future__ import annotations

import argparse
import json
import os
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import format_bytes
from moetier.tiers.errors import ConfigError, DiskSpaceError, TargetExistsError

if TYPE_CHECKING:
    import torch

    from .dequantize import SourceTensor

HELP = "make a checkpoint of a large model's geometry with random weights"

STD = 0.02
POOL_WEIGHTS = (1 << 24) - 3  # prime: rows of a power of two begin everywhere in it
GEOMETRIES: dict[str, dict[str, Any]] = {
    "mixtral-4L": {  # 4 of the 32 blocks of Mixtral-8x7B; the bundled model's vocabulary
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
    },
    "qwen3-8L": {  # 8 of the 48 blocks of Qwen3-30B-A3B
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
}
COMMON = {
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="DST", type=Path, help="folder of the checkpoint to be")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="mixtral-4L", help="(default: %(default)s)")
    parser.add_argument("--blocks", type=int, metavar="N", help="in place of the geometry's own number")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    size = make_synthetic(
        arguments.target, geometry=arguments.geometry, blocks=arguments.blocks, seed=arguments.seed, quiet=False
    )
    print(f"{arguments.target}: {format_bytes(size)}")
    return 0


def make_synthetic(
    folder: Path, *, geometry: str = "mixtral-4L", blocks: int | None = None, seed: int = 0, quiet: bool = True
) -> int:
    """Writes the checkpoint and returns its bytes. Raises ConfigError, TargetExistsError or DiskSpaceError."""
    from moetier.tiers.durable import disk_errors, make_folders, write_durably

    from .checkpoint import INDEX
    from .progress import Progress
    from .trunk import index_of, plan_trunk

    config = {**COMMON, **GEOMETRIES[geometry]}
    if blocks is not None:
        if blocks < 1:
            raise ConfigError(f"A model of {blocks} blocks is none.", "Give --blocks 1 or more.")
        config["num_hidden_layers"] = blocks
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TargetExistsError(f"{folder} exists and is not an empty folder.", "Choose another place.")
    shards = plan_trunk(_tensors(config, seed), "model")
    size = sum(shard.size for shard in shards)
    disk = os.statvfs(next(place for place in (folder, *folder.parents) if place.exists()))
    if size > (free := disk.f_bavail * disk.f_frsize):
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
        write_durably(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    return size


@dataclass(frozen=True)
class RandomTensor:
    """bf16. A stretch of one endless stream of normal numbers; ``start`` is where in it. Norms are ones."""

    shape: tuple[int, ...]
    start: int
    pool: torch.Tensor  # [POOL_WEIGHTS]
    dtype: str = "bfloat16"

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        import torch

        rows = self.shape[0] - first if count is None else count
        out = torch.empty((rows, *self.shape[1:]), dtype=torch.bfloat16)
        if len(self.shape) == 1:
            return out.fill_(1.0)
        flat, done = out.view(-1), 0
        position = (self.start + first * self.shape[1]) % POOL_WEIGHTS
        while done < len(flat):
            length = min(len(flat) - done, POOL_WEIGHTS - position)
            flat[done : done + length] = self.pool[position : position + length]
            done, position = done + length, 0
        return out


def _tensors(config: dict[str, Any], seed: int) -> dict[str, SourceTensor]:
    import torch

    pool = torch.empty(POOL_WEIGHTS).normal_(std=STD, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return {
        name: RandomTensor(shape, zlib.crc32(name.encode()) % POOL_WEIGHTS, pool)
        for name, shape in shapes_of(config).items()
    }


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of every tensor, in the published names of the architecture."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (queries, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, queries)
        if config["model_type"] == "qwen3_moe":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = shapes[f"{prefix}.self_attn.k_norm.weight"] = (head,)
            moe, names, inner = "mlp", ("gate_proj", "down_proj", "up_proj"), config["moe_intermediate_size"]
        else:
            moe, names, inner = "block_sparse_moe", ("w1", "w2", "w3"), config["intermediate_size"]
        experts = config.get("num_experts") or config["num_local_experts"]
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.{moe}.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, shape in zip(names, ((inner, hidden), (hidden, inner), (inner, hidden)), strict=True):
                shapes[f"{prefix}.{moe}.experts.{expert}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
