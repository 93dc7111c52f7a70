"""docs/format.md: a reader written from it alone (``format_reader.py``) finds what moetier finds."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import format_reader
import numpy as np
import pytest
import torch
from checkpoints import save_checkpoint
from faults import flip_bit
from format_reader import Reader
from quantised_records import levels_at_random
from stores import make_plan, make_records, write_store

from moetier.runtime.moe.linear import matrix_layout
from moetier.tiers.layout import BITS, PAIR_TYPES, ZERO_POINTS, Bits, ExpertKey, RecordLayout
from moetier.tiers.manifest import TrunkRecords
from moetier.tiers.quant.codec import decode, encode, layout_for, sections
from moetier.tiers.quant.zero_points import Levels
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile
from moetier.tools.convert.api import convert

GENERATOR = torch.Generator().manual_seed(0)
SHAPES = {  # as modules hold them: rows that are no multiple of 64, one of a group that nothing of it divides, a bias
    False: {"gate_up_proj": (72, 192), "odd_proj": (48, 72), "down_proj": (192, 96), "bias": (72,)},
    True: {"gate_up_proj": (192, 72), "odd_proj": (72, 48), "down_proj": (96, 192), "bias": (72,)},
}


def record_of(layout: RecordLayout) -> bytes:
    shapes = [(p.name, p.shape) for p in layout.projections] + [(b.name, (b.size,)) for b in layout.biases]
    given: dict[str, torch.Tensor | Levels] = {name: torch.randn(shape, generator=GENERATOR) for name, shape in shapes}
    for p in layout.projections:
        if p.pairs in ZERO_POINTS:
            kind = getattr(torch, ZERO_POINTS[p.pairs])
            given[p.name] = levels_at_random(p.bits, p.rows, p.columns, p.group, kind)
    record = np.zeros(layout.record_bytes, np.uint8)
    encode(given, layout, record, fast=True)
    return record.tobytes()


def decoded(record: bytes, layout: RecordLayout) -> dict[str, torch.Tensor]:
    """Decode a record with moetier."""
    data = torch.frombuffer(bytearray(record), dtype=torch.uint8)
    found = {p.name: decode(data, layout, p.name, torch.empty(p.shape)) for p in layout.projections}
    return found | {bias.name: sections(data, layout)[bias.name].float() for bias in layout.biases}


def test_it_has_nothing_of_moetier_s() -> None:
    tree = ast.parse(Path(format_reader.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - {"__future__"} == {
        "base64", "collections", "hashlib", "json", "numpy", "pathlib", "struct", "typing",
    }  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("bits", "pairs"),
    [(16, ""), *((bits, pairs) for bits in BITS[1:] for pairs in (*PAIR_TYPES, *ZERO_POINTS))],
)
def test_records_and_weights_of_every_width(bits: Bits, pairs: str, transposed: bool, tmp_path: Path) -> None:
    shapes = {name: (shape, "bfloat16" if name == "bias" else "float16") for name, shape in SHAPES[transposed].items()}
    layout = layout_for(shapes, bits=bits, group=None if bits == 16 else 64, transposed=transposed)
    quantised = (replace(p, pairs=pairs) if p.bits != 16 else p for p in layout.projections)
    layout = RecordLayout(tuple(quantised), layout.biases)
    plan = make_plan(blocks=1, experts=2, layout=layout)
    records = {key: record_of(layout) for key in make_records(plan)}
    manifest = write_store(tmp_path, plan, records)

    reader = Reader(tmp_path)
    assert reader.digest() == manifest.digest
    for key, record in records.items():
        assert reader.record(*key).tobytes() == record
        found, expected = reader.expert(*key), decoded(record, layout)
        assert found.keys() == expected.keys()
        for name, weights in expected.items():
            assert np.array_equal(found[name], weights.numpy()), name


def test_a_converted_model(tinymix_4bit: Path) -> None:
    reader = Reader(tinymix_4bit)
    with ShardStore.open(tinymix_4bit) as store:
        layout = store.layout(5)
        assert reader.digest() == store.manifest.digest
        record = torch.frombuffer(bytearray(reader.record(5, 3).tobytes()), dtype=torch.uint8)
        slot = np.empty(layout.slot_bytes + 4096, np.uint8)
        slot = slot[-slot.ctypes.data % 4096 :][: layout.slot_bytes]  # begins on a page
        store.read_into(ExpertKey(5, 3), memoryview(slot))
    assert record.numpy().tobytes() == slot[:-4].tobytes()
    for p in layout.projections:
        assert np.array_equal(reader.expert(5, 3)[p.name], decode(record, layout, p.name, torch.empty(p.shape)).numpy())


@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_of_the_trunk(bits: Bits, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "tiny-moe")
    convert(source, tmp_path / "dst", bits=4, trunk_bits=bits, fast=True)
    reader = Reader(tmp_path / "dst")
    rows, columns = 64, 64
    path = "model.layers.1.self_attn.q_proj"
    layout = matrix_layout(rows, columns, TrunkRecords(**reader.manifest["trunk_records"]))
    index = (tmp_path / "dst" / "model.safetensors.index.json").read_text()
    assert f'"{path}.record"' in index
    (file,) = (tmp_path / "dst").glob("trunk-*.safetensors")
    record = torch.from_numpy(format_reader.tensor(file, f"{path}.record").copy())
    expected = decode(record, layout, "weight", torch.empty(rows, columns))
    assert np.array_equal(reader.matrix(path, rows, columns), expected.numpy())


def test_it_notices_damage(tmp_path: Path) -> None:
    plan = make_plan(blocks=1)
    records = make_records(plan)
    write_store(tmp_path, plan, records)
    flip_bit(ShardFile.of(tmp_path / "experts.zarr", plan, 0).path, 100)
    reader = Reader(tmp_path)
    with pytest.raises(ValueError, match="damaged record"):
        reader.record(0, 0)
    assert reader.record(0, 1).tobytes() == records[ExpertKey(0, 1)]
