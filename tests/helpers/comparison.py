"""A tiny model of an architecture, whole in memory with transformers' eager experts, against its converted self."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stores
import torch
import transformers
from architectures import tiny_model
from torch import Tensor

import moetier
from moetier.runtime.experts import experts_modules
from moetier.tiers.budget import smallest_budget
from moetier.tiers.folder import read_manifest, store_folder
from moetier.tiers.keys import Bits
from moetier.tools.convert import convert

stores.make_plan()  # its import starts zarr's thread, which stays, before a test looks for threads
transformers.utils.logging.disable_progress_bar()  # tqdm's monitor is another one

GENERATES_OTHERWISE = {"diffusion_gemma", "qwen3_omni_moe"}  # no plain generate() on token ids


@dataclass(frozen=True, slots=True)
class Comparison:
    """``differing`` names what is not bitwise equal among logits, decode steps, and each Experts module alone."""

    model_class: str
    blocks: int
    top_k: int
    differing: tuple[str, ...]


def smallest_ram(directory: Path) -> int:
    """Bytes of one block's top-k records."""
    return smallest_budget(read_manifest(store_folder(directory)))


def convert_tiny(
    model_type: str, dtype: torch.dtype, folder: Path, *, bits: Bits = 16, **changes: Any
) -> tuple[Any, Path]:
    """An ordinary tiny model, and the model directory made of it; ``changes`` go into its configuration."""
    ordinary = tiny_model(model_type, dtype, **changes)
    ordinary.save_pretrained(folder / "source")
    convert(folder / "source", folder / "converted", bits=bits)
    return ordinary, folder / "converted"


def compare(model_type: str, dtype: torch.dtype, folder: Path) -> Comparison:
    """Converts at 16 bits into ``folder``, and loads with room for one block's top-k records; every gate is asked ahead
    in each decode step."""
    ordinary, converted = convert_tiny(model_type, dtype, folder)
    tiered, _ = moetier.load(converted, ram=smallest_ram(converted), speculate="always")
    with tiered.tiers:
        manifest = tiered.tiers.manifest
        ids = torch.randint(2, 250, (2, 17), generator=torch.Generator().manual_seed(1))
        equal = {"logits": torch.equal(_logits(ordinary, ids), _logits(tiered, ids))}
        if ordinary.can_generate() and model_type not in GENERATES_OTHERWISE:
            equal["decode steps"] = all(map(torch.equal, _steps(ordinary, ids), _steps(tiered, ids)))
        modules = experts_modules(tiered)
        for path, module in experts_modules(ordinary).items():
            equal[path] = _same_output(module, modules[path], dtype)
        assert all(stats.failures == 0 for stats in tiered.tiers.stats())
    return Comparison(
        type(tiered).__name__,
        len(manifest.blocks),
        max(block.top_k for block in manifest.blocks),
        tuple(what for what, same in equal.items() if not same),
    )


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    torch.manual_seed(0)  # diffusion_gemma fills its canvas at random
    logits: Tensor = getattr(model, "thinker", model)(input_ids=ids).logits
    return logits


def _steps(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """The logits of a prefill and of three decode steps, with the cache that the model likes best."""
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits: tuple[Tensor, ...] = found.logits
    return logits


@torch.no_grad()
def _same_output(ordinary: Any, tiered: Any, dtype: torch.dtype) -> bool:
    """Of two Experts modules, whatever part of the model would call them: eleven tokens, three random experts each."""
    random = torch.Generator().manual_seed(2)
    width = ordinary.down_proj.shape[2 if ordinary.is_transposed else 1]
    states = torch.randn(11, width, generator=random).to(dtype)
    index = torch.rand(11, ordinary.num_experts, generator=random).topk(3).indices
    weights = torch.rand(11, 3, generator=random)
    return torch.equal(ordinary(states, index, weights), tiered(states, index, weights))
