"""Tensors of a GGUF file: rows are decoded in the model's order, and what does not fit the model is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import encoded

from moetier.runtime.formats.gguf import DAMAGED, GgufExperts, GgufTensor, dequantised
from moetier.runtime.formats.tensors import StoredTensor
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import Projection

COLUMNS = 64
PLAIN = Projection("gate_up_proj", 8, COLUMNS, 16, "bfloat16")


def stored(path: Path, shape: tuple[int, ...], ggml_type: str = "Q8_0", seed: int = 0) -> GgufTensor:
    """A tensor of random numbers with ``shape``, in a file of its own."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal(shape, np.float32)
    data = encoded(weights.reshape(-1, shape[-1]), ggml_type, random)
    path.write_bytes(b"before" + data.tobytes())
    raw = (*shape[:-1], data.shape[-1])
    return GgufTensor(StoredTensor("blk.0.x", "U8", raw, path, 6), ggml_type, shape, "float32")


def decoded(tensor: GgufTensor) -> torch.Tensor:
    """All rows, decoded at once by the package gguf."""
    raw = tensor.stored.read().numpy()
    number = gguf.GGMLQuantizationType[tensor.ggml_type]
    return torch.from_numpy(gguf.quants.dequantize(raw.reshape(-1, raw.shape[-1]), number)).view(tensor.shape)


@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_0"])
def test_some_rows_are_those_of_the_whole(ggml_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = stored(tmp_path / "x", (12, COLUMNS), ggml_type)
    assert torch.equal(tensor.read(), decoded(tensor))
    assert torch.equal(tensor.read(3, 5), decoded(tensor)[3:8])
    monkeypatch.setattr("moetier.runtime.formats.gguf.TILE_WEIGHTS", 5 * COLUMNS)
    assert torch.equal(tensor.read(1), decoded(tensor)[1:]), "a few rows at a time"


def test_weights_that_are_not_quantised_are_only_converted() -> None:
    raw = torch.randn(3, COLUMNS)
    assert torch.equal(dequantised(raw, "F32", torch.bfloat16), raw.bfloat16())


def test_rows_in_another_order_are_read_without_the_others(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "x", (12, COLUMNS))
    order = np.arange(12)[::-1].copy()
    turned = GgufTensor(tensor.stored, "Q8_0", tensor.shape, "float32", lambda weights: weights.flip(0), order)
    assert torch.equal(turned.read(2, 4), decoded(tensor).flip(0)[2:6])
    assert turned.read(5, 0).shape == (0, COLUMNS)
    matrix = turned.as_matrix()
    assert matrix is not None
    assert matrix.layout.projections[0].coding == "q8_0"


def test_a_change_of_numbers_is_applied_to_the_whole_tensor(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "x", (12, COLUMNS))
    more = GgufTensor(tensor.stored, "Q8_0", tensor.shape, "float32", lambda weights: weights + 1)
    assert torch.equal(more.read(2, 4), decoded(tensor)[2:6] + 1)
    assert more.as_matrix() is None, "no kernel multiplies with what is only made when it is read"


@pytest.mark.parametrize("change", [lambda weights: weights[:5], lambda weights: weights.view(7, -1)])
def test_a_change_that_does_not_fit_is_the_files_fault(change: object, tmp_path: Path) -> None:
    tensor = stored(tmp_path / "x", (12, COLUMNS))
    other = GgufTensor(tensor.stored, "Q8_0", tensor.shape, "float32", change)  # type: ignore[arg-type]
    with pytest.raises(
        CheckpointError, match=r"blk\.0\.x of shape \[12, 64\] can't be made the model's \[12, 64\]"
    ) as e:
        other.read()
    assert e.value.fix == DAMAGED


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("alternate", [False, True])
def test_experts_have_the_rows_of_gate_and_up(alternate: bool, transposed: bool, tmp_path: Path) -> None:
    gate, up = (stored(tmp_path / str(seed), (3, 4, COLUMNS), seed=seed) for seed in (1, 2))
    experts = GgufExperts((gate, up), transposed, alternate)
    first, second = decoded(gate), decoded(up)
    rows = [first[:, :1], second[:, :1], first[:, 1:2], second[:, 1:2], first[:, 2:3], second[:, 2:3]]
    rows += [first[:, 3:], second[:, 3:]]
    expected = torch.cat(rows if alternate else [first, second], 1)
    assert torch.equal(experts.read(1, 2), (expected.transpose(1, 2) if transposed else expected)[1:])
    assert experts.shape == tuple((expected.transpose(1, 2) if transposed else expected).shape)
    assert experts.parts == (gate.stored, up.stored)
    runs = experts.by_expert(3)
    assert torch.equal(runs[1][2].read(), second[2])


def test_records_keep_the_type_of_the_file_if_gate_and_up_have_one(tmp_path: Path) -> None:
    gate, up = (stored(tmp_path / str(seed), (3, 4, COLUMNS), seed=seed) for seed in (1, 2))
    projection = GgufExperts((gate, up), False).record_projection(PLAIN, [])
    assert (projection.coding, projection.bits, projection.group) == ("q8_0", 8, 32)
    other = stored(tmp_path / "4", (3, 4, COLUMNS), "Q4_0")
    with pytest.raises(ValueError, match="is stored in Q4_0 and Q8_0"):
        GgufExperts((gate, other), False).record_projection(PLAIN, [])
    halves = GgufTensor(gate.stored, "F16", gate.shape, "float16")
    assert GgufExperts((halves,), False).record_projection(PLAIN, []).dtype == "float16"
