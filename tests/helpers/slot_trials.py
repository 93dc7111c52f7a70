"""Trials of kernels for a block's experts in slots: random blocks, and those of tiny models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantised_records import levels_at_random
from torch import Tensor, nn
from toy_device import Toy
from transformers import DynamicCache
from twins import BLOCK, OneSlot, inputs, pair

import moetier
from moetier.runtime.device_names import DEVICES
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.experts.expert_code import FUNCTIONS, Activation
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.slots import BlockKernels, Make, SlotKernels, activate, can_compute
from moetier.runtime.moe.activation import activation_of
from moetier.runtime.moe.block import TieredBlock
from moetier.runtime.moe.experts import experts_forward
from moetier.tiers.layout import ALIGNMENT, GROUPS, PAIR_TYPES, ZERO_POINTS, Bias, Projection, RecordLayout
from moetier.tiers.quant.codec import encode
from moetier.tiers.quant.zero_points import Levels

CPU = torch.device("cpu")
GUARD = 4096  # bytes before and after each slot
TYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)


class Block(nn.Module):
    """An Experts module without parameters, which has its activation from ``Activation``."""

    has_post_expert_norm = False

    def __init__(self, layout: RecordLayout, activation: Activation, records: list[Tensor], kernels: Kernels) -> None:
        super().__init__()
        self.num_experts = len(records)
        self.has_gate, self.has_bias, self.activation = activation.gated, bool(layout.biases), activation
        self.tiered = TieredBlock(BLOCK, layout, OneSlot(records, lambda experts: experts), kernels, CPU)

    def _apply_gate(self, y: Tensor) -> Tensor:
        return activate(self.activation, y)

    act_fn = _apply_gate


def random_projection(
    chance: random.Random, name: str, rows: int, columns: int, transposed: bool, is_fp32: bool
) -> Projection:
    pairs = chance.choice([*PAIR_TYPES, PAIR_TYPES[0], *ZERO_POINTS])
    groups = [size for size in GROUPS.get(pairs, (16, 32, 64, 128)) if columns % size == 0]
    dtype = "bfloat16" if is_fp32 else chance.choice(["bfloat16", "bfloat16", "float16"])
    if not groups or chance.random() < 0.25:
        return Projection(name, rows, columns, 16, dtype, transposed)
    return Projection(name, rows, columns, 4, ZERO_POINTS.get(pairs, dtype), transposed, chance.choice(groups), pairs)


def random_record(chance: random.Random, layout: RecordLayout) -> Tensor:
    tensors: dict[str, Tensor | Levels] = {bias.name: torch.randn(bias.size) * 0.2 for bias in layout.biases}
    for p in layout.projections:
        if p.pairs in ZERO_POINTS:
            levels = levels_at_random(4, p.rows, p.columns, p.group, getattr(torch, ZERO_POINTS[p.pairs]))
            order = torch.randperm(p.rows)
            tensors[p.name] = Levels(levels.codes[order], levels.scales[order], levels.zeros[order])
        else:
            tensors[p.name] = torch.randn(p.shape) * chance.choice([0.02, 0.1])
    out = np.zeros(layout.record_bytes, np.uint8)
    encode(tensors, layout, out, fast=True)
    return torch.from_numpy(out)


def in_slots(chance: random.Random, records: list[Tensor], layout: RecordLayout, guard: int) -> tuple[Tensor, Tensor]:
    """Put records into slots at random, in memory whose other bytes are ``guard``; return it, and the address table."""
    places = chance.sample(range(len(records) + 2), len(records))
    stride = layout.slot_bytes + GUARD
    whole = torch.full(((len(records) + 2) * stride + GUARD + ALIGNMENT,), guard, dtype=torch.uint8)
    first = GUARD + -(whole.data_ptr() + GUARD) % ALIGNMENT
    table = torch.zeros(len(records), dtype=torch.int64)
    for expert, (record, place) in enumerate(zip(records, places, strict=True)):
        slot = whole[first + place * stride :]
        for section in layout.sections:  # what is between the sections is guard, too
            part = slice(section.offset, section.offset + section.nbytes)
            slot[part] = record[part]
        table[expert] = slot.data_ptr()
    return whole, table


def compute(
    block: BlockKernels, chance: random.Random, table: Tensor, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Compute a block whose records come in parts; the result must not depend on which."""
    part = torch.tensor([chance.choice([0, 0, 0, 1, 2]) for _ in table])
    sums = block.begin(x, index, weights)
    for number in range(3):
        if number == 0 or (part == number).any():
            sums.add(table.masked_fill(part != number, 0))
    return sums.result()


def error(y: Tensor, ideal: Tensor) -> float:
    return float((y.double() - ideal).norm() / ideal.norm().clamp_min(1e-30))


def check(
    make: Make, module: Any, layout: RecordLayout, records: list[Tensor], activation: Activation,
    given: tuple[Tensor, ...], chance: random.Random, what: str,
) -> None:  # fmt: skip
    """Compare kernels that ``make`` makes with the exact way: both with the ideal, in fp64."""
    x, index, weights = given
    assert can_compute(layout)
    with torch.no_grad():
        exact = experts_forward(module, x, index, weights)
        module.double()
        ideal = experts_forward(module, x.double(), index, weights.double())
    results = []
    for guard in (0, 0xFF):  # bf16 and fp16 of 0xFFFF are not numbers, and would show
        whole, table = in_slots(chance, records, layout, guard)
        block = make(layout, activation, len(records))
        results.append(compute(block, chance, table, x, index, weights))
        assert len(whole)
    assert all(torch.equal(results[0], other) for other in results[1:]), (
        f"{what}: late records, or bytes outside of the records, change the result"
    )
    ours, its = error(results[0], ideal), error(exact, ideal)
    # as near to the ideal as the exact way is, which rounds to the type of x; with fp32 sums of another order
    assert ours <= 1.1 * its + 1e-5, f"{what}: error {ours}, that of the exact way is {its}"


def trial(make: Make, number: int) -> None:
    """Check a random block; each number is another."""
    chance = random.Random(number)
    torch.manual_seed(number)
    hidden, inner = (chance.choice([16, 48, 64, 80, 128]) for _ in range(2))
    dtype = chance.choice(TYPES)
    function, gated = chance.choice(FUNCTIONS), chance.random() < 0.8
    activation = Activation(function, gated=False)
    if gated:
        limit, shift = chance.choice([(float("inf"), 0.0), (7.0, 1.0)])
        activation = Activation(function, chance.random() < 0.4, chance.choice([1.0, 1.702]), limit, shift)
    transposed, first = chance.random() < 0.3, "gate_up_proj" if gated else "up_proj"
    rows = 2 * inner if gated else inner
    projections = tuple(
        random_projection(chance, name, *shape, transposed, dtype is torch.float32)
        for name, shape in ((first, (rows, hidden)), ("down_proj", (hidden, inner)))
    )
    biases = (Bias(f"{first}_bias", rows), Bias("down_proj_bias", hidden)) if chance.random() < 0.4 else ()
    layout = RecordLayout(projections, biases)
    experts, tokens = chance.randrange(1, 6), chance.choice([1, 1, 1, 2, 5, 15, 16, 17, 33])
    top_k = chance.randrange(1, 5)
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    if chance.random() < 0.5 and top_k <= experts:
        index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    else:  # repeated experts; also those that are ignored
        index = torch.randint(0, experts + (chance.random() < 0.3), (tokens, top_k))
    records = [random_record(chance, layout) for _ in range(experts)]
    module = Block(layout, activation, records, Kernels(CPU))
    what = f"block {number}, {tokens} tokens, {layout}"
    check(make, module, layout, records, activation, (x, index, weights), chance, what)


def models(make: Make) -> None:
    """Check blocks of tiny models: with biases and interleaved, transposed, without a gate."""
    for model_type in ("mixtral", "gpt_oss", "aria", "nemotron_h"):
        for bits in (16, 4):
            for tokens in (1, 5, 33):
                ordinary, twin, source = pair(model_type, torch.bfloat16, bits=bits)
                activation = activation_of(twin)
                assert activation is not None
                given = inputs(ordinary, torch.bfloat16, tokens=tokens)
                what = f"{model_type}, {bits} bits, {tokens} tokens"
                check(make, twin, twin.tiered.layout, source.records, activation, given, random.Random(tokens), what)


def check_model(make: Make, folder: Path) -> None:
    """Compute a model of 4 bits on a device whose kernels ``make`` makes, with slots for few experts and for all."""
    tokens, prompt, results = torch.randint(4, 4000, (1, 20)), 17, list[Tensor]()
    DEVICES["toy"], Toy.block_kernels = "toy_device:Toy", make
    options = ({"device": "cpu", "exact": True}, {"device": "toy", "device_memory": "5MiB"}, {"device": "toy"})
    for given in options:
        model, _ = moetier.load(folder, daemon=None, speculate="off", **given)
        with model.tiers as tiers, torch.inference_mode():
            assert isinstance(tiers.kernels, SlotKernels) == (given["device"] == "toy")
            cache, parts = DynamicCache(), torch.split(tokens, [prompt, *[1] * (tokens.numel() - prompt)], 1)
            outputs = [model(input_ids=part, **{CACHE: cache}, use_cache=True).logits[0] for part in parts]
            results.append(torch.cat(outputs).float())
            found = tiers.snapshot().get("device", {})
    exact, few, many = results
    assert found["hits"] > 0
    assert torch.equal(few, many)
    assert error(many, exact) < 0.05
