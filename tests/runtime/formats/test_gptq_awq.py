"""Matrices of AWQ and GPTQ are read as what these mean, bit for bit; what is damaged is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from affine_matrices import COLUMNS, NAN, ROWS, Edit, changed, same, source, weight, with_value
from safetensors.torch import save_file
from torch import Tensor
from zero_point_checkpoints import AWQ, GPTQ, awq, gptq

from moetier.runtime.formats.registry import format_of
from moetier.runtime.formats.tensors import read_tensors
from moetier.testing import FormatTests
from moetier.tiers.errors import CheckpointError, UnsupportedModelError


class TestGptq(FormatTests):
    quantization: ClassVar = GPTQ
    is_native = True
    needed = ("qweight", "qzeros", "scales")

    def quantise(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, meant = gptq(weight)
        return tensors, meant.to(weight.dtype)


class TestAwq(FormatTests):
    quantization: ClassVar = AWQ
    is_native = True

    def quantise(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, meant = awq(weight)
        return tensors, meant.to(weight.dtype)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("group", "kept"), [(32, 32), (64, 64), (-1, 128), (48, 16), (96, 32)])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, group: int, kept: int, form: str) -> None:
    config = GPTQ | {"bits": bits, "group_size": group, "checkpoint_format": form}
    same(tmp_path, gptq(weight(), bits, group, form=form), config, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gptq_with_other_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    same(tmp_path, gptq(weight(), dtype=dtype), GPTQ, 32)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_symmetric_gptq_whatever_its_config_says(tmp_path: Path, bits: int, form: str) -> None:
    """Some checkpoints say "gptq", and have the zero points of "gptq_v2"."""
    config = GPTQ | {"bits": bits, "sym": True, "checkpoint_format": "gptq"}
    same(tmp_path, gptq(weight(), bits, form=form, symmetric=True), config, 32)


def test_gptq_without_groups_of_columns(tmp_path: Path) -> None:
    tensors, meant = gptq(weight())
    del tensors["g_idx"]
    same(tmp_path, (tensors, meant), GPTQ, 32)


def test_a_module_of_gptq_with_other_bits_than_the_rest(tmp_path: Path) -> None:
    """GPTQModel's "dynamic"."""
    same(tmp_path, gptq(weight(), 8, 64), GPTQ, 64)


# the numbers by which GPTQModel makes "gptq" of the packed zero points of "gptq_v2", and once did with 3 bits
LESS = {
    2: [0b01010101010101010101010101010101],
    3: [0b00100100100100100100100100100100, 0b10010010010010010010010010010010, 0b01001001001001001001001001001001],
    4: [0b00010001000100010001000100010001],
    8: [0b00000001000000010000000100000001],
}


def as_gptqmodel_stores(zeros: Tensor, bits: int) -> Tensor:
    zeros = zeros.clone()
    for i, number in enumerate(LESS[bits]):
        zeros[:, i :: len(LESS[bits])] -= torch.tensor(number).to(torch.int32)
    return zeros


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_zero_points_of_which_some_are_0(tmp_path: Path, bits: int) -> None:
    """GPTQ v1 stores a zero point less 1. For 0 the subtraction borrows from the next zero point of the same word."""
    tensors, _ = gptq(weight(), bits, form="gptq_v2")
    tensors["qzeros"] &= 0x5A5A5A5A
    meant = source(tmp_path, tensors, GPTQ | {"bits": bits, "checkpoint_format": "gptq_v2"}, "float16").read()
    tensors["qzeros"] = as_gptqmodel_stores(tensors["qzeros"], bits)
    found = source(tmp_path, tensors, GPTQ | {"bits": bits, "checkpoint_format": "gptq"}, "float16")
    assert torch.equal(found.read(), meant)


def test_symmetric_zero_points_of_3_bits_that_gptqmodel_packed_wrongly(tmp_path: Path) -> None:
    tensors, meant = gptq(weight(), 3, form="gptq_v2", symmetric=True)
    tensors["qzeros"] = as_gptqmodel_stores(tensors["qzeros"], 3)
    same(tmp_path, (tensors, meant), GPTQ | {"bits": 3, "sym": True}, 32)


def shuffled() -> Tensor:
    return torch.arange(COLUMNS)[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))] // 32


def test_gptq_in_the_order_of_activations(tmp_path: Path) -> None:
    """It is dequantised, but a record can't have it."""
    tensors, meant = gptq(weight(), order=shuffled())
    found = source(tmp_path, tensors, GPTQ | {"desc_act": True}, "float16")
    assert torch.equal(found.read(), meant)
    with pytest.raises(CheckpointError, match=r"a\.weight has groups of columns from all over the matrix \(desc_act\)"):
        found.levels(32)


def test_gptq_with_groups_in_another_order(tmp_path: Path) -> None:
    same(tmp_path, gptq(weight(), order=torch.tensor([2, 0, 3, 1]).repeat_interleave(32)), GPTQ, 32)


@pytest.mark.parametrize(("group", "kept"), [(32, 32), (64, 64), (128, 128), (-1, 128)])
def test_awq(tmp_path: Path, group: int, kept: int) -> None:
    same(tmp_path, awq(weight(), group), AWQ | {"group_size": group}, kept)


def test_what_is_not_quantised_stays(tmp_path: Path) -> None:
    """A tensor that only has such a name, and a bias."""
    tensors, _ = gptq(weight())
    others = {"b.scales": torch.ones(3), "a.bias": torch.ones(ROWS), "c.weight": torch.ones(2, 2)}
    save_file({f"a.{name}": tensor for name, tensor in tensors.items()} | others, tmp_path / "x.safetensors")
    found = format_of(read_tensors(tmp_path / "x.safetensors"), GPTQ, {}).sources("float16")
    assert found.keys() == {"a.weight", *others}
    assert torch.equal(found["b.scales"].read(), others["b.scales"])


OF_WORDS: list[tuple[Edit, str]] = [
    (changed("scales", lambda t: t[:, :-1]), r"a\.scales is float16 \[4, 95\], not .* \[4, 96\]"),
    (changed("scales", lambda t: t[:3]), r"a\.qzeros is int32 \[4, 12\], not int32 \[3, 12\]"),
    (changed("scales", lambda t: t[:0]), r"a\.scales is float16 \[0, 96\]"),
    (changed("scales", lambda t: t.int()), r"a\.scales is int32"),
    (changed("qzeros", lambda t: t[:, :-1]), r"a\.qzeros is int32 \[4, 11\]"),
    (changed("qzeros", lambda t: t.float()), r"a\.qzeros is float32"),
    (changed("qweight", lambda t: t.short()), r"a\.qweight is int16"),
    (changed("qweight", lambda t: t.view(-1)), r"a\.qweight is \[1536\]"),
    (changed("qweight", lambda t: t[:, :-1]), r"a\.(scales|qzeros) is"),
    (with_value("scales", NAN), r"a\.weight: a\.scales has numbers that are not finite"),
    (with_value("scales", float("inf")), r"a\.weight: a\.scales has numbers that are not finite"),
]


def narrower(tensors: dict[str, Tensor]) -> None:
    """A row less, of which a word of zero points has only a part."""
    for name, end in (("qweight", -1), ("scales", -1), ("qzeros", 11)):
        tensors[name] = tensors[name][:, :end].contiguous()


def with_many_groups(tensors: dict[str, Tensor]) -> None:
    for name in ("scales", "qzeros"):
        tensors[name] = tensors[name][:1].repeat(100, 1)


OF_GPTQ: list[tuple[Edit, str]] = [
    (with_value("g_idx", 4), r"a\.weight: a\.g_idx names groups that a\.scales does not have"),
    (with_value("g_idx", -1), r"a\.weight: a\.g_idx names groups that a\.scales does not have"),
    (changed("g_idx", lambda t: t[:-1]), r"to 4\.03\d+ bits, which moetier can't read"),
    (narrower, r"a\.weight: 95 rows do not fill words of 32 bits"),
    (with_many_groups, r"a\.scales has 100 groups, which do not fit 128 columns"),
    (changed("g_idx", lambda t: t.float()), r"a\.g_idx is float32"),
    (changed("g_idx", lambda t: t.view(2, 64)), r"a\.g_idx is int32 \[2, 64\], not int32 or int64 \[128\]"),
]


@pytest.mark.parametrize(
    ("form", "edit", "said"),
    [*(("awq", *case) for case in OF_WORDS), *(("gptq", *case) for case in [*OF_WORDS, *OF_GPTQ])],
)
def test_damage_is_refused_by_name(tmp_path: Path, form: str, edit: Edit, said: str) -> None:
    (tensors, _), config = {"awq": (awq(weight()), AWQ), "gptq": (gptq(weight()), GPTQ)}[form]
    edit(tensors)
    with pytest.raises(CheckpointError, match=said):
        source(tmp_path, tensors, config, "float16").read()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPTQ | {"checkpoint_format": "gptq_p"}, r"GPTQ's format 'gptq_p'"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"GPTQ's format 'marlin'"),
        (AWQ | {"version": "gemv"}, r"AWQ's format 'gemv'"),
        (AWQ | {"bits": 8}, r"AWQ's format 'gemm' with 8 bits"),
        ({"quant_method": "aqlm"}, r"quantised with aqlm"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    tensors, _ = gptq(weight())
    with pytest.raises(UnsupportedModelError, match=said):
        source(tmp_path, tensors, config, "float16")


@pytest.mark.parametrize(("bits", "known"), [(5, False), ("4", False), (True, False)])
def test_bits_that_no_g_idx_tells(tmp_path: Path, bits: Any, known: bool) -> None:
    tensors, _ = gptq(weight())
    del tensors["g_idx"]
    with pytest.raises(UnsupportedModelError, match="bits, which moetier can't read"):
        source(tmp_path, tensors, GPTQ | {"bits": bits}, "float16")
