"""Kernels for a block's experts in slots: their place in a model, with stand-ins in torch for Triton's kernels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from slot_trials import check_model, models, trial
from torch import Tensor
from torch_experts import TorchExperts, TorchSums

from moetier.runtime.device_names import DEVICES
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.slots import SlotKernels, can_compute, slot_kernels
from moetier.tiers.layout import RecordLayout
from moetier.tiers.quant.codec import layout_for

LAYOUT = layout_for({"gate_up_proj": ((64, 128), "bfloat16"), "down_proj": ((128, 32), "bfloat16")}, bits=4)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_the_stand_ins_are_as_near_to_the_ideal_as_the_exact_way(first: int) -> None:
    for number in range(first, first + 20):
        trial(TorchExperts, number)


def test_the_stand_ins_with_blocks_of_models() -> None:
    models(TorchExperts)


def test_a_model_on_the_simulated_device(tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICES, "toy", "toy_device:Toy")
    monkeypatch.setattr("toy_device.Toy.block_kernels", None)  # as it was, afterwards
    check_model(TorchExperts, tinymix_4bit)


def test_codes_of_4_bits_and_weights_of_16_are_computed_as_they_lie() -> None:
    def layout(bits: int) -> RecordLayout:
        return RecordLayout(tuple(dataclasses.replace(p, bits=bits) for p in LAYOUT.projections))

    assert can_compute(LAYOUT)
    assert not any(can_compute(layout_for({"up_proj": ((64, 128), "bfloat16")}, bits=bits)) for bits in (8, 3, 2))
    assert can_compute(layout_for({"up_proj": ((64, 128), "float16")}, bits=16))
    assert (
        slot_kernels(Kernels(), [LAYOUT, layout_for({"up_proj": ((64, 128), "bfloat16")}, bits=3)], TorchExperts)
        is None
    )


class Wrong(TorchSums):
    def result(self) -> Tensor:
        return super().result() * 1.02


def test_kernels_that_are_wrong_or_fail_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = Kernels()
    found = slot_kernels(trunk, [LAYOUT], TorchExperts)
    assert isinstance(found, SlotKernels)
    assert found.arrange is None
    monkeypatch.setattr(TorchExperts, "begin", lambda *given: Wrong(*given))
    with pytest.warns(RuntimeWarning, match="results are wrong.*one by one"):
        assert slot_kernels(trunk, [LAYOUT], TorchExperts) is None

    def fail(*_: object) -> None:
        raise OSError("no compiler")

    with pytest.warns(RuntimeWarning, match="OSError: no compiler"):
        assert slot_kernels(trunk, [LAYOUT], fail) is None  # type: ignore[arg-type]


def test_the_trunks_kernels_make_room_too() -> None:
    trunk, asked = Kernels(), list[str]()
    SlotKernels(trunk, TorchExperts).on_out_of_memory(lambda: asked.append("room") or 1)
    tries = iter([torch.OutOfMemoryError("CUDA out of memory."), None])

    def work() -> Tensor:
        if (error := next(tries)) is not None:
            raise error
        return torch.zeros(1)

    trunk.with_room(work)
    assert asked == ["room"]
