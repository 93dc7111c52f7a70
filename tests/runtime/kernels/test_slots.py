"""Kernels for a block's experts in slots: their place in a model, with stand-ins in torch for Triton's kernels."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slot_trials import TYPES, check_model, models, trial
from torch import Tensor
from torch_experts import TorchExperts, TorchSums

from moetier.runtime.device_names import DEVICES
from moetier.runtime.devices.cuda import Cuda
from moetier.runtime.kernels.experts.expert_code import FUNCTIONS, Activation
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.slots import Form, SlotKernels, can_compute, slot_kernels
from moetier.tiers.layout import (
    GROUPS,
    WEIGHT_TYPES,
    ZERO_POINT_GROUPS,
    ZERO_POINTS,
    Bias,
    Bits,
    Projection,
    RecordLayout,
)
from moetier.tiers.quant.codec import layout_for

LAYOUT = layout_for({"gate_up_proj": ((64, 128), "bfloat16"), "down_proj": ((128, 32), "bfloat16")}, bits=4)
FORM = Form(LAYOUT, Activation(), torch.bfloat16)


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
        return RecordLayout(tuple(replace(p, bits=bits) for p in LAYOUT.projections))

    assert can_compute(LAYOUT)
    assert not any(can_compute(layout_for({"up_proj": ((64, 128), "bfloat16")}, bits=bits)) for bits in (8, 3, 2))
    assert can_compute(layout_for({"up_proj": ((64, 128), "float16")}, bits=16))
    three = layout_for({"up_proj": ((64, 128), "bfloat16")}, bits=3)
    assert slot_kernels(Kernels(), [FORM, FORM._replace(layout=three)], TorchExperts) is None


class Wrong(TorchSums):
    def result(self) -> Tensor:
        return super().result() * 1.02


def test_kernels_that_are_wrong_or_fail_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = Kernels()
    found = slot_kernels(trunk, [FORM], TorchExperts)
    assert isinstance(found, SlotKernels)
    assert found.arrange is None
    monkeypatch.setattr(TorchExperts, "begin", lambda *given: Wrong(*given))
    with pytest.warns(RuntimeWarning, match="results are wrong.*one by one"):
        assert slot_kernels(trunk, [FORM], TorchExperts) is None

    def fail(*_: object) -> None:
        raise OSError("no compiler")

    with pytest.warns(RuntimeWarning, match="OSError: no compiler"):
        assert slot_kernels(trunk, [FORM], fail) is None  # type: ignore[arg-type]


def forms() -> list[Form]:
    """All pairs, groups, types, activations and so on that kernels know, each in some form."""
    ways: list[tuple[Bits, int, str, str]] = [(16, 0, "", dtype) for dtype in WEIGHT_TYPES]
    ways += [(4, group, pairs, "bfloat16") for pairs, groups in GROUPS.items() for group in groups]
    ways += [(4, group, pairs, dtype) for pairs, dtype in ZERO_POINTS.items() for group in ZERO_POINT_GROUPS]
    activations = [Activation(function, gated=gated) for function in FUNCTIONS for gated in (True, False)]
    activations += [Activation(interleaved=True, alpha=1.702, limit=7.0, shift=1.0)]
    result = []
    for number in range(2 * len(ways)):
        activation, way = activations[number % len(activations)], ways[number % len(ways)]
        bits, group, pairs, dtype = way
        first, rows = ("gate_up_proj", 1024) if activation.gated else ("up_proj", 512)
        transposed = (number + number // len(activations)) % 3 == 0
        projections = (
            Projection(first, rows, 768, bits, dtype, transposed, group, pairs),
            Projection("down_proj", 768, 512, bits, dtype, transposed, group, pairs),
        )
        biases = (Bias(f"{first}_bias", rows), Bias("down_proj_bias", 768, "float16")) if number % 2 else ()
        result.append(Form(RecordLayout(projections, biases), activation, TYPES[number % len(TYPES)]))
    return result


def test_all_forms_are_tried_and_found_right() -> None:
    assert isinstance(slot_kernels(Kernels(), forms(), TorchExperts), SlotKernels)


@pytest.mark.parametrize("field", ["pairs", "group", "dtype", "transposed", "biases", "activation", "hidden states"])
def test_a_form_that_the_kernels_get_wrong_is_found(field: str) -> None:
    """Kernels that compute the usual form and fail with another: a model of that form does not get them."""
    usual = LAYOUT.projections
    other = {
        "pairs": FORM._replace(layout=RecordLayout(tuple(replace(p, pairs="float16_zeros") for p in usual))),
        "group": FORM._replace(layout=RecordLayout(tuple(replace(p, group=16, pairs="uint8") for p in usual))),
        "dtype": FORM._replace(layout=layout_for({p.name: (p.shape, "float16") for p in usual}, bits=16)),
        "transposed": FORM._replace(layout=RecordLayout(tuple(replace(p, transposed=True) for p in usual))),
        "biases": FORM._replace(layout=RecordLayout(usual, (Bias("down_proj_bias", 128),))),
        "activation": FORM._replace(activation=Activation("gelu")),
        "hidden states": FORM._replace(dtype=torch.float16),
    }[field]

    def kind(layout: RecordLayout) -> object:
        return [replace(p, rows=0, columns=0) for p in layout.projections], len(layout.biases)

    class Narrow(TorchExperts):
        def begin(self, x: Tensor, index: Tensor, weights: Tensor) -> TorchSums:
            if (kind(self.layout), self.activation, x.dtype) == (kind(LAYOUT), Activation(), torch.bfloat16):
                return super().begin(x, index, weights)
            return Wrong(self, x, index, weights)

    assert slot_kernels(Kernels(), [FORM], Narrow) is not None
    with pytest.warns(RuntimeWarning, match="results are wrong"):
        assert slot_kernels(Kernels(), [FORM, other], Narrow) is None


@pytest.mark.parametrize("error", ["OSError", "ImportError"])
def test_a_triton_that_does_not_work_is_not_used(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton.py").write_text(f"raise {error}('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.delitem(sys.modules, "moetier.runtime.kernels.triton_experts", raising=False)
    with pytest.warns(RuntimeWarning, match=f"{error}: no driver.*one by one"):
        assert Cuda("cuda").slot_kernels(Kernels(), [FORM]) is None


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
