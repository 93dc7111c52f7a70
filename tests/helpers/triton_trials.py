"""Trials of ``runtime/kernels/triton_experts.py`` in an environment with Triton, without a GPU.

``python triton_trials.py random FIRST END`` computes random blocks in Triton's interpreter, on tensors of a CPU; each
number is another block. ``python triton_trials.py models`` computes those of tiny models. ``python triton_trials.py
compile`` compiles the kernels for two GPUs, of which none is needed, and prints what their code has.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0" if sys.argv[1] == "compile" else "1"

import numpy as np
import torch
import triton
from quantised_records import levels_at_random
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from twins import BLOCK, OneSlot, inputs, pair

from moetier.runtime.kernels import triton_experts
from moetier.runtime.kernels.experts.expert_code import FUNCTIONS, Activation
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.triton_experts import TILE, SlotExperts, can_compute
from moetier.runtime.moe.activation import _apply, activation_of
from moetier.runtime.moe.block import TieredBlock
from moetier.runtime.moe.experts import experts_forward
from moetier.tiers.layout import ALIGNMENT, GROUPS, PAIR_TYPES, ZERO_POINTS, Bias, Projection, RecordLayout
from moetier.tiers.quant.codec import encode
from moetier.tiers.quant.zero_points import Levels

CPU = torch.device("cpu")
GUARD = 4096  # bytes before and after each slot
TYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)


def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
    """Multiply as the interpreter does, which takes the bits of bf16 for integers."""
    a, b = (
        (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.is_bf16() else x.data.astype(np.float32)
        for x in (a, b)
    )
    return TensorHandle(np.matmul(a, b) + d.data, d.dtype.scalar)


def cast_impl(self: Any, source: Any, kind: Any, ours: Any = InterpreterBuilder.cast_impl) -> TensorHandle:
    """Round fp32 to the nearest bf16, as compiled code does; the interpreter cuts bits off."""
    if kind.scalar.is_bf16() and source.dtype.scalar.is_fp32():
        rounded = torch.from_numpy(np.atleast_1d(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(rounded.reshape(np.shape(source.data)), kind.scalar)
    return ours(self, source, kind)


InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


class Block(nn.Module):
    """An Experts module without parameters, which has its activation from ``Activation``."""

    has_post_expert_norm = False

    def __init__(self, layout: RecordLayout, activation: Activation, records: list[Tensor], kernels: Kernels) -> None:
        super().__init__()
        self.num_experts = len(records)
        self.has_gate, self.has_bias, self.activation = activation.gated, bool(layout.biases), activation
        self.tiered = TieredBlock(BLOCK, layout, OneSlot(records, lambda experts: experts), kernels, CPU)

    def _apply_gate(self, y: Tensor) -> Tensor:
        return _apply(self.activation, y)

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
    block: SlotExperts, chance: random.Random, table: Tensor, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Compute a block some of whose records come late; the result must not depend on which."""
    missing = torch.full((index.numel(),), -2)
    late = torch.tensor([chance.random() < 0.3 for _ in table])
    there = block.look_up(index, table.masked_fill(late, 0), missing)
    flat = index.reshape(-1)
    is_late = late[flat.clamp(max=len(table) - 1)] & (flat < len(table))
    assert torch.equal(missing, torch.where(is_late, flat, -1))
    activations = block.begin(x, index, there)
    everything = block.look_up(index, table, missing)
    assert (missing == -1).all()
    if is_late.any():
        activations = block.begin(x, index, everything.masked_fill(there != 0, 0), activations)
    return block.complete(activations, index, weights, everything, x.dtype)


def error(y: Tensor, ideal: Tensor) -> float:
    return float((y.double() - ideal).norm() / ideal.norm().clamp_min(1e-30))


def check(
    module: Any, layout: RecordLayout, records: list[Tensor], activation: Activation, given: tuple[Tensor, ...],
    chance: random.Random, what: str,
) -> None:  # fmt: skip
    x, index, weights = given
    assert can_compute(layout)
    with torch.no_grad():
        exact = experts_forward(module, x, index, weights)
        module.double()
        ideal = experts_forward(module, x.double(), index, weights.double())
    results = []
    for guard in (0, 0xFF):  # bf16 and fp16 of 0xFFFF are not numbers, and would show
        whole, table = in_slots(chance, records, layout, guard)
        block = SlotExperts(layout, activation, len(records))
        results.append(compute(block, chance, table, x, index, weights))
        assert len(whole)
    results.append(compute(block, chance, table, x, index, weights))  # again: no counter is left over
    assert all(torch.equal(results[0], other) for other in results[1:]), (
        f"{what}: late records, or bytes outside of the records, change the result"
    )
    ours, its = error(results[0], ideal), error(exact, ideal)
    # as near to the ideal as the exact way is, which rounds to the type of x; with fp32 sums of another order
    assert ours <= 1.1 * its + 1e-5, f"{what}: error {ours}, that of the exact way is {its}"


def trial(number: int) -> None:
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
    experts, tokens = chance.randrange(1, 6), chance.choice([1, 1, 1, 2, 5, TILE - 1, TILE, TILE + 1, 33])
    top_k = chance.randrange(1, 5)
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    if chance.random() < 0.5 and top_k <= experts:
        index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    else:  # repeated experts; also those that are ignored
        index = torch.randint(0, experts + (chance.random() < 0.3), (tokens, top_k))
    records = [random_record(chance, layout) for _ in range(experts)]
    module = Block(layout, activation, records, Kernels(CPU))
    check(
        module, layout, records, activation, (x, index, weights), chance, f"block {number}, {tokens} tokens, {layout}"
    )


def models() -> None:
    for model_type in ("mixtral", "gpt_oss", "aria", "nemotron_h"):
        for bits in (16, 4):
            for tokens in (1, 5, 33):
                ordinary, twin, source = pair(model_type, torch.bfloat16, bits=bits)
                activation = activation_of(twin)
                assert activation is not None
                given = inputs(ordinary, torch.bfloat16, tokens=tokens)
                what = f"{model_type}, {bits} bits, {tokens} tokens"
                check(twin, twin.tiered.layout, source.records, activation, given, random.Random(tokens), what)


class NoDriver:
    """Stands in for the driver of a GPU: kernels are compiled for it, and not launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, _: int) -> int:
        return 0


class Compiled:
    """Stands in for a kernel: compiles it for what would be launched, and prints what its code has."""

    def __init__(self, kernel: Any, what: str) -> None:
        self.kernel, self.what = kernel, what

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **constants: Any) -> None:
            compiled = self.kernel.warmup(*given, grid=grid, **constants)
            ptx = compiled.asm["ptx"]
            assert compiled.asm["cubin"]
            wide = len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\S* \[.*, 0x10|cp\.async\S*16", ptx))
            narrow = len(re.findall(r"ld\.global\S*\.b8\b", ptx))
            rounds, cuts = (int(f"cvt.{way}.bf16" in ptx) for way in ("rn", "rz"))
            print(self.kernel.__name__, self.what, wide, narrow, rounds, cuts)

        return launch


def compile_kernels() -> None:
    """Compile all kernels for GPUs of the compute capabilities 8.0 and 9.0, with the shapes of Qwen3-30B-A3B."""
    kernels = {name: getattr(triton_experts, name) for name in ("_look_up", "_gate_up", "_down")}
    for capability, group, tokens in itertools.product((80, 90), (0, 64), (1, 64)):
        triton.runtime.driver.set_active(NoDriver(capability))
        for name, kernel in kernels.items():
            setattr(triton_experts, name, Compiled(kernel, f"{capability} {group} {tokens}"))
        names = (("gate_up_proj", 1536, 2048), ("down_proj", 2048, 768))
        pairs = "bfloat16" if group else ""
        layout = RecordLayout(tuple(Projection(*n, 4 if group else 16, group=group, pairs=pairs) for n in names))
        block, index = SlotExperts(layout, Activation(), 128), torch.zeros(tokens, 8, dtype=torch.int64)
        table, missing = torch.zeros(128, dtype=torch.int64), torch.zeros(8 * tokens, dtype=torch.int64)
        addresses = block.look_up(index, table, missing)
        activations = block.begin(torch.zeros(tokens, 2048, dtype=torch.bfloat16), index, addresses)
        block.complete(activations, index, torch.zeros(tokens, 8), addresses, torch.bfloat16)


def main() -> None:
    match sys.argv[1:]:
        case ["random", first, end]:
            for number in range(int(first), int(end)):
                trial(number)
                print(number, flush=True)
        case ["models"]:
            models()
        case ["compile"]:
            compile_kernels()


if __name__ == "__main__":
    main()
