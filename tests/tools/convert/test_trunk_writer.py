"""The trunk's files: aligned, whole, and never held in memory as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import google_crc32c
import pytest
import torch
from faults import flip_bit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetier.runtime.formats import tensors as shards
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor, read_tensors
from moetier.tiers.errors import CheckpointError
from moetier.tiers.manifest import FileSum
from moetier.tools.convert.trunk_writer import TrunkFile, distribute_trunk, index_of, nbytes

DTYPES = {"BF16": 2, "F32": 4, "U8": 1, "F64": 8}


def offsets(file: TrunkFile) -> dict[str, int]:
    """From the file's start."""
    header = file.header
    entries = json.loads(header[8:])
    return {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 40), max_size=3)), min_size=1, max_size=30
    ),
    st.integers(64, 20_000),
)
def test_every_tensor_is_there_once_and_every_matrix_is_aligned(
    kinds: list[tuple[str, list[int]]], file_bytes: int
) -> None:
    tensors: dict[str, SourceTensor] = {
        f"t{i}": StoredTensor(f"t{i}", dtype, tuple(shape), Path(), 0) for i, (dtype, shape) in enumerate(kinds)
    }
    files = distribute_trunk(tensors, file_bytes=file_bytes)
    assert sorted(name for file in files for name in file.tensors) == sorted(tensors)
    for number, file in enumerate(files, start=1):
        assert file.name == f"trunk-{number:05}-of-{len(files):05}.safetensors"
        assert len(file.header) % 64 == 0
        end = len(file.header)
        for name, start in offsets(file).items():
            tensor = tensors[name]
            assert start == end  # no holes: safetensors refuses them
            end = start + nbytes(tensor)
            assert start % (getattr(torch, tensor.dtype).itemsize) == 0
            if len(tensor.shape) > 1 or nbytes(tensor) % 64 == 0:
                assert start % 64 == 0, (name, tensor.shape)
        assert end == file.size
    assert json.loads(index_of(files))["weight_map"] == {name: file.name for file in files for name in file.tensors}


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {
        "odd.vector": torch.randn(5, generator=random).bfloat16(),
        "norm": torch.randn(64, generator=random).bfloat16(),
        "odd.matrix": torch.randn(3, 7, generator=random),
        "matrix": torch.randn(300, 64, generator=random).bfloat16(),
        "scalar": torch.tensor(1.5),
        "odd.too": torch.randn(5, 5, generator=random).half(),
        "table": torch.randint(0, 9, (16, 8), generator=random),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    return tensors


def write(folder: Path, files: tuple[TrunkFile, ...]) -> None:
    for file in files:
        file.write(folder, lambda count: None)


def plan(tmp_path: Path, file_bytes: int = 20_000) -> tuple[TrunkFile, ...]:
    return distribute_trunk(read_tensors(tmp_path / "source.safetensors"), file_bytes=file_bytes)


def test_safetensors_reads_what_is_written(
    source: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1024)
    dst = tmp_path / "dst"
    dst.mkdir()
    files = plan(tmp_path)
    assert not any(file.is_complete(dst) for file in files)
    write(dst, files)
    assert all(file.is_complete(dst) for file in files)
    found: dict[str, Tensor] = {}
    for path in sorted(dst.iterdir()):
        found |= load_file(path)
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_written_is_summed(source: dict[str, Tensor], tmp_path: Path) -> None:
    for file in plan(tmp_path):
        made, _ = file.write(tmp_path, lambda count: None)
        data = (tmp_path / file.name).read_bytes()
        assert made == FileSum(len(data), google_crc32c.value(data))


def test_a_file_that_is_there_is_kept_if_every_bit_of_it_is_right(source: dict[str, Tensor], tmp_path: Path) -> None:
    """Its size says nothing."""
    for file in plan(tmp_path):
        counts: list[int] = []
        path = tmp_path / file.name
        made = file.make(tmp_path, counts.append)
        data, written = path.read_bytes(), path.stat().st_mtime_ns
        assert file.make(tmp_path, counts.append) == made
        assert path.stat().st_mtime_ns == written
        for position in (0, len(file.header), len(data) // 2, -1):
            flip_bit(path, position, 3)
            assert file.is_complete(tmp_path)
            assert file.make(tmp_path, counts.append) == made
            assert path.read_bytes() == data
        assert sum(counts) == 6 * file.size


def test_progress_counts_every_byte(source: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    for file in plan(tmp_path):
        counts: list[int] = []
        file.write(tmp_path / "dst", counts.append)
        assert sum(counts) == file.size == (tmp_path / "dst" / file.name).stat().st_size


@pytest.mark.parametrize("name", ["matrix", "odd.vector", "scalar", "odd.too"])
def test_a_tensor_with_a_nan_is_named_and_its_file_is_not_there(
    source: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    source[name].view(-1)[-1] = float("nan")
    save_file(source, tmp_path / "source.safetensors")
    dst = tmp_path / "dst"
    dst.mkdir()
    files = plan(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} has weights that are not numbers"):
        write(dst, files)
    (bad,) = [file for file in files if name in file.tensors]
    assert not (dst / bad.name).exists()


def test_an_infinity_is_let_through(source: dict[str, Tensor], tmp_path: Path) -> None:
    """Masks have them."""
    source["matrix"][0, 0] = float("-inf")
    save_file(source, tmp_path / "source.safetensors")
    (tmp_path / "dst").mkdir()
    write(tmp_path / "dst", plan(tmp_path))
