"""Safetensors files, read by byte ranges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetier.runtime.formats import tensors as shards
from moetier.runtime.formats.tensors import read_tensors
from moetier.tiers.errors import CheckpointError

TENSORS = {
    "matrix": torch.randn(7, 5).bfloat16(),
    "stack": torch.randn(3, 4, 6),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "codes": torch.arange(24, dtype=torch.uint8).view(4, 6),
    "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_tensors_and_their_rows_are_what_safetensors_wrote(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 24)  # several reads for each
    found = read_tensors(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        stored = found[name]
        assert stored.shape == tuple(tensor.shape)
        read = stored.read()
        assert read.dtype == tensor.dtype
        assert torch.equal(read.float(), tensor.float())
        assert (
            b"".join(chunk.tobytes() for chunk in stored.chunks())
            == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    assert torch.equal(found["stack"].read(1, 2), TENSORS["stack"][1:])
    assert torch.equal(found["matrix"].read(6, 1), TENSORS["matrix"][6:])


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_file_that_is_cut_is_reported_to_be(file: Path, size: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match="truncated"):
        read_tensors(file)


def test_a_file_that_goes_on_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="longer"):
        read_tensors(file)


def test_a_file_that_is_cut_after_it_was_opened_is_an_error_and_no_crash(file: Path) -> None:
    found = read_tensors(file)
    file.write_bytes(file.read_bytes()[:-200])
    last = max(found.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(CheckpointError, match="ends at byte"):
        last.read()


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}',
        b'{"a": 1}',
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="malformed"):
        read_tensors(file)


def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + json.dumps({}).encode())
    with pytest.raises(CheckpointError, match="truncated"):
        read_tensors(file)


def test_a_file_that_cannot_be_read_is_named(file: Path, tmp_path: Path) -> None:
    found = read_tensors(file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"x\.safetensors can't be read: No such file"):
        found["matrix"].read()
    with pytest.raises(CheckpointError, match="can't be read: Is a directory"):
        read_tensors(tmp_path)
