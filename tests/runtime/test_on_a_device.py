"""Blocks of experts that are computed on a device of their own, from the host tier to the result."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, FakeEvent, FakeStream
from host_waits import HostWaits
from int4 import cuda_operators
from readers import RamReader
from stores import make_plan
from twins import inputs, pair

from moetier.runtime.block import TieredBlock, rows_of_experts
from moetier.runtime.experts import experts_forward
from moetier.runtime.fused import CudaInt4, FusedKernels
from moetier.runtime.kernels import Kernels
from moetier.tiers.device import DeviceTier
from moetier.tiers.host import HostTier
from moetier.tiers.keys import Bits, ExpertKey
from moetier.tiers.stream import CudaDevice, Device

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


class PromptStream(FakeStream):
    """Of who computes at once: what it waits for is done before."""

    def wait_event(self, event: FakeEvent) -> None:
        self.device.run_until(event)


def fake_device(seed: int) -> FakeDevice:
    device = FakeDevice(random.Random(seed))
    device.streams[1] = PromptStream(device)
    return device


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
    for kernels in (FusedKernels(where, CudaInt4()), Kernels(where)):
        results = []
        for slots in (18, 48):
            device: Device = CudaDevice(where) if where.type == "cuda" else fake_device(slots)
            with HostTier(RamReader(plan, stored), slots={"records": slots}) as host:
                tier = DeviceTier(host, plan, slots={"records": slots}, device=device, arrange=kernels.arrange)
                twin.tiered = TieredBlock(5, layout, tier, kernels, where)
                with torch.no_grad():
                    results.append([experts_forward(twin, *given).float().cpu() for given in given_to])
                tier.close()
        for few, many, ideal in zip(*results, expected, strict=True):
            assert torch.equal(few, many)
            if where.type == "cpu" and (bits == 16 or kernels.arrange is None):
                assert torch.equal(few, ideal)
            assert float((few - ideal).norm() / ideal.norm()) < 0.03


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_block_waits_for_the_device_once(tokens: int, fused: bool) -> None:
    """To learn which experts it needs. The tier waits for the copies of those that the host has together, once, before
    it gives them back; for none where they are on the device."""
    ordinary, twin, source = pair("mixtral", torch.bfloat16, bits=4)
    layout, records, device = twin.tiered.layout, source.records, fake_device(0)
    plan = make_plan(blocks=6, experts=len(records), top_k=8, layout=layout)
    stored = {ExpertKey(b, e): bytes(record.numpy()) for b in range(6) for e, record in enumerate(records)}
    given_to = inputs(ordinary, torch.bfloat16, tokens=tokens)
    cpu = torch.device("cpu")
    with cuda_operators(), HostTier(RamReader(plan, stored), slots={"records": 48}) as host, torch.no_grad():
        kernels = FusedKernels(cpu, CudaInt4()) if fused else Kernels(cpu)
        tier = DeviceTier(host, plan, slots={"records": 48}, device=device, arrange=kernels.arrange)
        twin.tiered = TieredBlock(5, layout, tier, kernels, cpu)
        list(host.acquire([ExpertKey(5, expert) for expert in range(8)]))
        for copied in (1, 0):
            before = device.waits_of_the_host
            with HostWaits() as waits:
                experts_forward(twin, *given_to)
            assert waits.counts == {"tolist": 1}
            assert device.waits_of_the_host - before == copied
        tier.close()


def test_waits_are_seen() -> None:
    """By the test's own instrument."""
    x: Any = torch.arange(4)
    with HostWaits() as waits:
        x[x > 1], x.to("cpu"), x.to(torch.float32), bool(x[0] > 1), torch.where(x > 1), x[torch.tensor([0])]
    assert waits.counts == {"__getitem__": 1, "to": 1, "__bool__": 1, "where": 1}


@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
def test_rows_of_experts(tokens: int) -> None:
    """By position and then by token, as torch.where gives them in the ordinary modules."""
    index = torch.randint(0, 9, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    index[::5] = 1_000_000
    rows = rows_of_experts(index, 8)
    assert list(rows) == [expert for expert in range(8) if (index == expert).any()]
    for expert, (found, positions) in rows.items():
        expected = torch.where((index == expert).T)
        assert torch.equal(positions, expected[0])
        assert torch.equal(found, expected[1])
