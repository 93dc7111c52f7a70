"""Blocks of experts that are computed on a device of their own, from the host tier to the result."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, FakeStream, prompt_device
from host_waits import HostWaits
from int4 import cuda_operators
from integrity import check_integrity
from readers import RamReader
from stores import make_plan
from torch_experts import TorchExperts, TorchSums
from twins import inputs, pair

import moetier
from moetier.runtime.devices.cuda import CudaInt4, CudaStreams
from moetier.runtime.kernels.int4 import FusedKernels
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.slots import Make, SlotKernels, can_compute
from moetier.runtime.moe.block import TieredBlock, group_by_expert
from moetier.runtime.moe.experts import experts_forward, experts_modules
from moetier.runtime.moe.linear import QuantizedLinear
from moetier.runtime.moe.slots import slot_kernels_of
from moetier.tiers.cache.budget import slots_for
from moetier.tiers.device.stream import StreamDevice
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.errors import BudgetError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import Bits, ExpertKey
from moetier.tiers.quant.codec import encode, layout_for

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.fixture(params=["cpu", CUDA])
def where(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda":
        yield torch.device("cuda")
    else:
        with cuda_operators():
            yield torch.device("cpu")


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "aria"])  # plain; biased; transposed
def test_blocks_are_computed_on_the_device(where: torch.device, model_type: str, bits: Bits) -> None:
    """As they are with decoded weights, exactly so by the plain kernels; and the same at every number of slots."""
    ordinary, twin, source = pair(model_type, torch.bfloat16, bits=bits)
    layout, records = twin.tiered.layout, source.records
    plan = make_plan(blocks=6, experts=len(records), top_k=3, layout=layout)
    stored = {ExpertKey(b, e): bytes(record.numpy()) for b in range(6) for e, record in enumerate(records)}
    given_to = [[part.to(where) for part in inputs(ordinary, torch.bfloat16, tokens=n)] for n in (1, 1, 9)]
    with torch.no_grad():
        expected = [experts_forward(twin, *inputs(ordinary, torch.bfloat16, tokens=n)).float() for n in (1, 1, 9)]
    if where.type == "cuda":
        twin = twin.to(where)
    ways: list[Kernels] = [FusedKernels(where, CudaInt4()), Kernels(where)]
    if can_compute(layout):
        ways.append(SlotKernels(Kernels(where), block_kernels(where)))
    for kernels in ways:
        results = []
        for slots in (18, 48):
            device: StreamDevice = CudaStreams(where) if where.type == "cuda" else prompt_device(slots)
            with HostTier(RamReader(plan, stored), slots={"records": slots}) as host:
                tier = DeviceTier(host, plan, slots={"records": slots}, device=device, arrange=kernels.arrange)
                twin.tiered = TieredBlock(5, layout, tier, kernels, where)
                with torch.no_grad():
                    results.append([experts_forward(twin, *given).float().cpu() for given in given_to])
                tier.close()
        for few, many, ideal in zip(*results, expected, strict=True):
            assert torch.equal(few, many)
            if where.type == "cpu" and (type(kernels) is Kernels or (bits == 16 and kernels is ways[0])):
                assert torch.equal(few, ideal)
            assert float((few - ideal).norm() / ideal.norm()) < 0.03


def block_kernels(where: torch.device) -> Make:
    if where.type == "cpu":
        return TorchExperts
    return pytest.importorskip("moetier.runtime.kernels.triton_experts").SlotExperts  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["fused", "decoded", "in slots"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_block_waits_for_the_device_once(tokens: int, way: str) -> None:
    """To learn which experts it needs. It waits for no copy."""
    ordinary, twin, source = pair("mixtral", torch.bfloat16, bits=4)
    layout, records, device = twin.tiered.layout, source.records, prompt_device(0)
    plan = make_plan(blocks=6, experts=len(records), top_k=8, layout=layout)
    stored = {ExpertKey(b, e): bytes(record.numpy()) for b in range(6) for e, record in enumerate(records)}
    given_to = inputs(ordinary, torch.bfloat16, tokens=tokens)
    cpu = torch.device("cpu")
    with cuda_operators(), HostTier(RamReader(plan, stored), slots={"records": 48}) as host, torch.no_grad():
        kernels = FusedKernels(cpu, CudaInt4()) if way == "fused" else Kernels(cpu)
        if way == "in slots":
            kernels = SlotKernels(kernels, TorchExperts)
        tier = DeviceTier(host, plan, slots={"records": 48}, device=device, arrange=kernels.arrange)
        twin.tiered = TieredBlock(5, layout, tier, kernels, cpu)
        list(host.acquire([ExpertKey(5, expert) for expert in range(8)]))
        slot_kernels_of(twin, twin.tiered)  # tries activations, on the host, once
        for _ in range(2):
            with HostWaits() as waits:
                experts_forward(twin, *given_to)
            assert waits.counts == {"tolist": 1}
            assert device.waits_of_the_host == 0
        tier.close()


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_experts_in_slots_are_computed_together_and_each_other_as_it_comes(tokens: int) -> None:
    ordinary, twin, source = pair("mixtral", torch.bfloat16, bits=4)
    layout, records, cpu = twin.tiered.layout, source.records, torch.device("cpu")
    plan = make_plan(blocks=6, experts=len(records), top_k=3, layout=layout)
    stored = {ExpertKey(b, e): bytes(record.numpy()) for b in range(6) for e, record in enumerate(records)}
    given, calls = inputs(ordinary, torch.bfloat16, tokens=tokens), list[int]()

    class Counted(TorchSums):
        def add(self, table: torch.Tensor) -> None:
            calls.append(int(table.count_nonzero()))
            super().add(table)

    class Counting(TorchExperts):
        def begin(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> TorchSums:
            return Counted(self, x, index, weights)

    used = len(given[1].unique())
    with HostTier(RamReader(plan, stored), slots={"records": 48}) as host, torch.no_grad():
        tier = DeviceTier(host, plan, slots={"records": 48}, device=prompt_device(0))
        twin.tiered = TieredBlock(5, layout, tier, SlotKernels(Kernels(), Counting), cpu)
        list(tier.acquire([ExpertKey(5, int(given[1][0, 0]))]))
        first = experts_forward(twin, *given)
        assert calls[0] == 1
        assert sum(calls) == used
        assert max(calls) <= 2, "the last two that are copied"
        calls.clear()
        assert torch.equal(experts_forward(twin, *given), first)
        assert calls == [used]
        none = torch.full_like(given[1], len(records))  # experts of another device
        assert not experts_forward(twin, given[0], none, given[2]).any()
        assert calls == [used]
        with pytest.raises(ValueError, match="hidden states, experts and weights of shapes"):
            experts_forward(twin, given[0][:, 1:], *given[1:])
        tier.close()


@contextlib.contextmanager
def full(bits: Bits, *, fused: bool, beside: int) -> Iterator[tuple[Any, FakeDevice, DeviceTier, Kernels]]:
    """A block on a device that has memory for 48 experts and ``beside`` bytes, all slots full; products take scratch
    memory of that device."""
    _, twin, source = pair("mixtral", torch.bfloat16, bits=bits)
    layout, records, cpu = twin.tiered.layout, source.records, torch.device("cpu")
    plan = make_plan(blocks=6, experts=len(records), top_k=3, layout=layout)
    size = plan.layouts["records"].slot_bytes
    stored = {ExpertKey(b, e): bytes(record.numpy()) for b in range(6) for e, record in enumerate(records)}
    device = prompt_device(0, capacity=48 * size + beside)
    with cuda_operators(), HostTier(RamReader(plan, stored), slots={"records": 48}) as host, torch.no_grad():
        kernels = FusedKernels(cpu, CudaInt4()) if fused else Kernels(cpu)
        kernels._scratch = lambda shape, dtype: (  # type: ignore[method-assign]
            device.allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        )
        tier = DeviceTier(host, plan, slots={"records": 48}, device=device, arrange=kernels.arrange)
        kernels.on_out_of_memory(tier.shrink)
        twin.tiered = TieredBlock(5, layout, tier, kernels, cpu)
        for block in range(5):
            list(tier.acquire([ExpertKey(block, expert) for expert in range(len(records))]))
        yield twin, device, tier, kernels
        check_integrity(tier)
        tier.close()


@pytest.mark.parametrize(("bits", "fused"), [(4, False), (3, False), (3, True), (2, True)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_products_without_memory_shrink_the_tier_and_come_out_the_same(bits: Bits, fused: bool, tokens: int) -> None:
    """Decoded, or expanded, in scratch memory for which the device has no room beside the tier."""
    ordinary, *_ = pair("mixtral", torch.bfloat16, bits=bits)
    given = inputs(ordinary, torch.bfloat16, tokens=tokens)
    with full(bits, fused=fused, beside=1 << 30) as (twin, _, tier, _):
        expected = experts_forward(twin, *given)
        assert tier.stats().slots == 48
    with full(bits, fused=fused, beside=0) as (twin, _, tier, _):
        assert torch.equal(experts_forward(twin, *given), expected)
        assert tier.stats().slots == 36
        assert torch.equal(experts_forward(twin, *given), expected)
        assert tier.stats().slots == 36


@pytest.mark.parametrize("speculate", ["off", "always"])
def test_tokens_are_the_same_when_memory_runs_out_between(tinymix_4bit: Path, speculate: str) -> None:
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10]])
    model, _ = moetier.load(tinymix_4bit, daemon=None, exact=True, speculate=speculate)
    with model.tiers as tiers:
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
        device, kernels, scratches = prompt_device(0), Kernels(), itertools.count()
        real, fail_at = kernels._scratch, {50, 150}

        def scratch(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            if next(scratches) in fail_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
            return real(shape, dtype)

        kernels._scratch = scratch  # type: ignore[method-assign]
        slots = slots_for(tiers.manifest, tiers.manifest.stored_bytes // 2)
        with contextlib.closing(
            DeviceTier(tiers.host, tiers.manifest, slots=slots, device=device, promotes=True)
        ) as tier:
            kernels.on_out_of_memory(tier.shrink)
            for module in experts_modules(model).values():
                module.tiered = dataclasses.replace(module.tiered, source=tier, kernels=kernels)
            assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
            assert tier.stats().slots == sum(slots.values()) * 3 // 4 * 3 // 4
            check_integrity(tier)


def test_what_is_arranged_without_memory_shrinks_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary, *_ = pair("mixtral", torch.bfloat16, bits=4)
    given = inputs(ordinary, torch.bfloat16, tokens=9)
    with full(4, fused=True, beside=0) as (twin, device, tier, _):
        expected = experts_forward(twin, *given)
        run = device.run

        def arrange(stream: FakeStream, work: Callable[[], None]) -> None:
            device.allocate(1000)  # taken on the way
            run(stream, work)

        monkeypatch.setattr(device, "run", arrange)
        tier.shrink()
        room = [device.allocate(device.left)]
        assert torch.equal(experts_forward(twin, *given), expected)
        assert tier.stats().slots == 27
        assert len(room) == 1


def test_a_device_that_stays_without_memory_fails_with_the_numbers() -> None:
    ordinary, *_ = pair("mixtral", torch.bfloat16, bits=3)
    given = inputs(ordinary, torch.bfloat16, tokens=9)
    with full(3, fused=False, beside=0) as (twin, device, tier, kernels):
        size, real = tier.stats().memory_bytes // 48, kernels._scratch
        kernels._scratch = lambda shape, dtype: device.allocate(1 << 30)  # type: ignore[method-assign]
        cause = f"ran out of memory, after its tier gave back {12 * size:,} bytes: .*Tried to allocate 1073741824 of "
        with pytest.raises(BudgetError, match=cause) as failed:
            experts_forward(twin, *given)
        assert "`device_memory`" in failed.value.fix
        assert tier.stats().slots == 36
        while tier.shrink():
            pass
        with pytest.raises(BudgetError, match="and its tier has no slots to give back: CUDA out of memory"):
            experts_forward(twin, *given)
        kernels._scratch = real  # type: ignore[method-assign]
        experts_forward(twin, *given)  # it goes on, now that there is memory


def test_a_matrix_of_the_trunk_without_memory_shrinks_the_tier() -> None:
    linear = torch.nn.Linear(64, 96, bias=True, dtype=torch.bfloat16)
    layout = layout_for({"weight": ((96, 64), "bfloat16")}, bits=4)
    record = np.zeros(layout.record_bytes, np.uint8)
    encode({"weight": linear.weight.detach()}, layout, record, fast=True)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with full(4, fused=False, beside=0) as (_, _, tier, kernels):
        matrix = QuantizedLinear(linear, layout)
        matrix.record = torch.from_numpy(record)[: layout.payload_bytes]
        matrix.compute_with(Kernels())
        expected = matrix(x)
        matrix.compute_with(kernels)
        assert torch.equal(matrix(x), expected)
        assert tier.stats().slots == 36


def test_waits_are_seen() -> None:
    """By the test's own instrument."""
    x: Any = torch.arange(4)
    with HostWaits() as waits:
        x[x > 1], x.to("cpu"), x.to(torch.float32), bool(x[0] > 1), torch.where(x > 1), x[torch.tensor([0])]
    assert waits.counts == {"__getitem__": 1, "to": 1, "__bool__": 1, "where": 1}


@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
def test_tokens_of_experts(tokens: int) -> None:
    """By position and then by token, as torch.where gives them in the ordinary modules."""
    index = torch.randint(0, 9, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    index[::5] = 1_000_000
    rows = group_by_expert(index, 8)
    assert list(rows) == [expert for expert in range(8) if (index == expert).any()]
    for expert, (found, positions) in rows.items():
        expected = torch.where((index == expert).T)
        assert torch.equal(positions, expected[0])
        assert torch.equal(found, expected[1])
