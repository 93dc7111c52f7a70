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
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.linear import WEIGHT, QuantizedLinear
from moetier.runtime.stores.registry import read_manifest
from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.layout import Bits
from moetier.tiers.quant.codec import decode
from moetier.tools.convert.api import convert

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
    return smallest_budget(read_manifest(directory))


def convert_tiny(
    model_type: str,
    dtype: torch.dtype,
    folder: Path,
    *,
    bits: Bits = 16,
    trunk_bits: Bits = 16,
    fast: bool = False,
    **changes: Any,
) -> tuple[Any, Path]:
    """An ordinary tiny model, and the model directory made of it; ``changes`` go into its configuration."""
    ordinary = tiny_model(model_type, dtype, **changes)
    ordinary.save_pretrained(folder / "source")
    convert(folder / "source", folder / "converted", bits=bits, trunk_bits=trunk_bits, fast=fast)
    return ordinary, folder / "converted"


@torch.no_grad()
def read_back(ordinary: Any, tiered: Any) -> list[str]:
    """Gives an ordinary model the weights that the trunk's records of ``tiered`` stand for. Returns their paths."""
    paths = []
    for path, module in tiered.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = ordinary.get_submodule(path)
            weights = torch.empty_like(linear.weight)
            linear.weight = torch.nn.Parameter(decode(module.record, module.layout, WEIGHT, weights))  # tied no longer
            paths.append(path)
    return paths


def compare(
    model_type: str, dtype: torch.dtype, folder: Path, *, trunk_bits: Bits = 16, converts: bool = True
) -> Comparison:
    """Converts at 16 bits into ``folder``, and loads with room for one block's top-k records; every gate is asked ahead
    in each decode step. The ordinary model gets the weights of a trunk of fewer bits. If not ``converts``, the
    checkpoint is loaded as it is."""
    if converts:
        ordinary, converted = convert_tiny(model_type, dtype, folder, trunk_bits=trunk_bits)
    else:
        ordinary, converted = tiny_model(model_type, dtype), folder / "source"
        ordinary.save_pretrained(converted)
    tiered, _ = moetier.load(converted, ram=smallest_ram(converted), speculate="always", exact=trunk_bits != 16)
    with tiered.tiers:
        quantised = read_back(ordinary, tiered)
        assert bool(quantised) == (trunk_bits != 16)
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


def _steps(model: Any, ids: Tensor, *, steps: int = 3, **options: Any) -> tuple[Tensor, ...]:
    """The logits of a prefill and of decode steps, with the cache that the model likes best."""
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1 + steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    logits: tuple[Tensor, ...] = generated.logits
    return logits


def _same_output(ordinary: Any, tiered: Any, dtype: torch.dtype) -> bool:
    """Return whether two Experts modules have the same output."""
    width = ordinary.down_proj.shape[2 if ordinary.is_transposed else 1]
    return torch.equal(_output(ordinary, width, dtype), _output(tiered, width, dtype))


@torch.no_grad()
def _output(module: Any, width: int, dtype: torch.dtype, tokens: int = 11) -> Tensor:
    """Return an Experts module's output for three random experts for each token."""
    random = torch.Generator().manual_seed(2)
    states = torch.randn(tokens, width, generator=random).to(dtype)
    index = torch.rand(tokens, module.num_experts, generator=random).topk(3).indices
    out: Tensor = module(states, index, torch.rand(tokens, 3, generator=random))
    return out


def farthest(model_type: str, dtype: torch.dtype, folder: Path) -> float:
    """Converts at 4 bits, and says how far the quick way to compute is from the exact one at most, in one Experts
    module: the norm of the difference over that of the output, for one token and for eleven. At the smallest budget and
    with all experts there, the quick way must give the same bits."""
    _, converted = convert_tiny(model_type, dtype, folder, bits=4)
    ways = {"exact": {"exact": True}, "quick": {}, "streamed": {"ram": smallest_ram(converted)}}
    models = {way: moetier.load(converted, speculate="off", **options)[0] for way, options in ways.items()}
    largest = 0.0
    for path, exact in experts_modules(models["exact"]).items():
        quick, streamed = (experts_modules(models[way])[path] for way in ("quick", "streamed"))
        width = next(p.rows for p in exact.tiered.layout.projections if p.name == "down_proj")
        for tokens in (1, 11):
            expected = _output(exact, width, dtype, tokens).float()
            got = _output(quick, width, dtype, tokens)
            assert torch.equal(got, _output(streamed, width, dtype, tokens))
            assert torch.equal(got, _output(quick, width, dtype, tokens)), "now that experts are there"
            largest = max(largest, float((got.float() - expected).norm() / expected.norm()))
    for model in models.values():
        model.tiers.close()
    return largest


def apart(model_type: str, dtype: torch.dtype, folder: Path) -> list[float]:
    """Converts at 4 bits, and says how far the logits of the model, as it is loaded by default, are from those that it
    computes exactly: the norm of the difference over that of the logits. First of a batch, and then, where the model
    generates, of a prefill and decode steps; of each the median over tokens, as one may be sent to other experts."""
    _, converted = convert_tiny(model_type, dtype, folder, bits=4)
    ids = torch.randint(2, 250, (1, 17), generator=torch.Generator().manual_seed(1))
    logits = []
    for exact in (True, False):
        model, _ = moetier.load(converted, speculate="off", exact=exact)
        with model.tiers:
            tiers = model.tiers
            assert exact or any(tiers.kernels.packs(layout) for layout in tiers.manifest.layouts.values())
            results = [_logits(model, ids)]
            if model.can_generate() and model_type not in GENERATES_OTHERWISE:
                results.append(
                    torch.cat(_steps(model, ids, steps=12, prefix_allowed_tokens_fn=lambda _, sent: [7 * len(sent)]))
                )
            logits.append(results)
    return [
        float(((quick - exact).float().norm(dim=-1) / exact.float().norm(dim=-1)).median())
        for exact, quick in zip(*logits, strict=True)
    ]
