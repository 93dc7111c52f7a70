"""Matrices of HQQ are read as what HQQ means, bit for bit; what is damaged is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from affine_matrices import NAN, Edit, changed, same, source, weight, with_value
from torch import Tensor
from zero_point_checkpoints import HQQ, hqq

from moetier.testing import FormatTests
from moetier.tiers.errors import CheckpointError


class TestHqq(FormatTests):
    quantization: ClassVar = HQQ
    is_native = True
    needed = ("W_q", "scale", "zero", "shape")

    def quantise(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return hqq(weight)


@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("group", "kept"), [(16, 16), (64, 64), (128, 128), (8, 0), (256, 0)])
def test_hqq(tmp_path: Path, nbits: float, dtype: torch.dtype, group: int, kept: int) -> None:
    same(tmp_path, hqq(weight(), nbits, group, dtype=dtype), HQQ, kept)


@pytest.mark.parametrize("nbits", [8, 4, 3, 2])
def test_hqq_with_groups_across_rows(tmp_path: Path, nbits: float) -> None:
    same(tmp_path, hqq(weight(), nbits, 64, axis=0), HQQ, 0)


@pytest.mark.parametrize("nbits", [8, 4, 3, 2])
def test_hqq_whose_bytes_are_called_floats(tmp_path: Path, nbits: float) -> None:
    same(tmp_path, hqq(weight(), nbits, 64, view_as_float=True), HQQ, 64)


OF_HQQ: list[tuple[Edit, str]] = [
    (changed("scale", lambda t: t[:-1]), r"a\.scale is bfloat16 \[191, 1\], not .* \[192, 1\]"),
    (changed("zero", lambda t: t.float()), r"a\.zero is float32 \[192, 1\], not bfloat16"),
    (changed("W_q", lambda t: t[:-1]), r"a\.W_q is uint8 \[95, 64\], which does not fit \[96, 128\] with 4 bits"),
    (changed("W_q", lambda t: t[:, :-1]), r"a\.W_q is uint8 \[96, 63\], which does not fit"),
    (changed("W_q", lambda t: t.view(-1)), r"a\.W_q is uint8 \[6144\], which does not fit"),
    (changed("shape", lambda t: t * 2), r"a\.W_q .* does not fit \[192, 256\]"),
    (changed("shape", lambda t: -t), r"groups of 64 along axis 1 do not fit \[-96, -128\]"),
    (changed("shape", lambda t: t + 2**62), r"does not fit|do not fit"),
    (changed("shape", lambda t: t[:1]), r"a\.weight: a\.shape is int64 \[1\]"),
    (changed("nbits", lambda t: t.new_tensor([4, 4])), r"a\.weight: a\.nbits is int32 \[2\]"),
    (with_value("zero", NAN), r"a\.weight: a\.zero has numbers that are not finite"),
    (with_value("scale", float("-inf")), r"a\.weight: a\.scale has numbers that are not finite"),
    (lambda t: t.update(axis=torch.tensor(2, dtype=torch.int32)), r"groups of 64 along axis 2 do not fit"),
    (lambda t: t.update(group_size=torch.tensor(0, dtype=torch.int32)), r"groups of 0 along axis 1 do not fit"),
    (lambda t: t.update(nbits=torch.tensor(7, dtype=torch.int32)), r"with HQQ to 7 bits, which moetier can't read"),
    (lambda t: t.update(nbits=torch.tensor(1, dtype=torch.int32)), r"with HQQ to 1 bits, which moetier can't read"),
    (lambda t: t.update(nbits=torch.tensor(float("nan"))), r"with HQQ to nan bits, which moetier can't read"),
]


@pytest.mark.parametrize(("edit", "said"), OF_HQQ)
def test_damage_is_refused_by_name(tmp_path: Path, edit: Edit, said: str) -> None:
    tensors, _ = hqq(weight(), 4, 64)
    edit(tensors)
    with pytest.raises(CheckpointError, match=said):
        source(tmp_path, tensors, HQQ, "float16").read()
