"""Matrices of GPTQ, AWQ and HQQ in a file, what they are read as, and damage to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moetier.runtime.formats.affine import AffineTensor
from moetier.runtime.formats.registry import format_of
from moetier.runtime.formats.tensors import read_tensors

ROWS, COLUMNS = 96, 128


def weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)) * 0.02
    made[3] *= 1e-4  # scales that are denormal in fp16
    return made


def source(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], dtype: str) -> AffineTensor:
    save_file({f"a.{name}": tensor for name, tensor in tensors.items()}, folder / "x.safetensors")
    found = format_of(read_tensors(folder / "x.safetensors"), quantization, {}).sources(dtype)
    assert list(found) == ["a.weight"]
    assert isinstance(found["a.weight"], AffineTensor)
    return found["a.weight"]


def same(
    folder: Path, made: tuple[dict[str, Tensor], Tensor], quantization: dict[str, Any], group: int
) -> AffineTensor:
    """It reads as what was meant, whole and in rows, in other types too, and keeps it in groups of a record."""
    tensors, meant = made
    own = str(meant.dtype).removeprefix("torch.")
    for dtype in {own, "bfloat16", "float16"}:
        found = source(folder, tensors, quantization, dtype)
        assert found.shape == meant.shape
        assert torch.equal(found.read(), meant.to(getattr(torch, dtype)))
        assert torch.equal(found.read(5, 20), found.read()[5:25])
    found = source(folder, tensors, quantization, own)
    assert found.group == group
    while group >= 16:
        assert torch.equal(found.levels(group).weights(), meant)
        assert found.levels(group).scales.shape == (meant.shape[0], meant.shape[1] // group)
        group //= 2
    return found


Edit = Callable[[dict[str, Tensor]], Any]


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def with_value(name: str, value: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[1] = value

    return edit


NAN = float("nan")
