"""Faults of a trunk, made in real files: each is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from faults import flip_bit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from stores import make_plan, make_records, write_store

from moetier.tiers.errors import ChecksumError, StoreError, StoreFormatError, StoreReadError, TargetExistsError
from moetier.tiers.manifest import FileSum, Manifest, TrunkRecords
from moetier.tiers.store import trunk
from moetier.tiers.store.folder import GROUP, read_manifest
from moetier.tiers.store.trunk import INDEX, check_sum, check_trunk, trunk_faults, trunk_records
from moetier.tiers.store.writer import StoreWriter

NAMES = ("trunk-00001-of-00002.safetensors", "trunk-00002-of-00002.safetensors")
STRANGE = "not the name of a trunk file in the model directory"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Make a trunk of two files and an index in ``tmp_path``."""
    places = {"a": NAMES[0], "b": NAMES[1], "c": NAMES[0]}
    for name, size in zip(NAMES, (1000, 200), strict=True):
        (tmp_path / name).write_bytes(safetensors_of([tensor for tensor in places if places[tensor] == name], size))
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return replace(make_plan(), trunk={name: summed(tmp_path / name) for name in NAMES})


def safetensors_of(names: list[str], size: int) -> bytes:
    """Make a whole file of ``size`` bytes with random tensors of 10 bytes."""
    entries = {
        name: {"dtype": "U8", "shape": [10], "data_offsets": [10 * i, 10 * i + 10]} for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode().ljust(size - 8 - 10 * len(names))
    return len(header).to_bytes(8, "little") + header + os.urandom(10 * len(names))


def summed(path: Path) -> FileSum:
    data = path.read_bytes()
    return FileSum(len(data), google_crc32c.value(data))


def index(value: object) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(json.dumps(value))


def test_a_good_one(manifest: Manifest, tmp_path: Path) -> None:
    check_trunk(tmp_path, manifest)
    check_trunk(tmp_path, replace(manifest, trunk={}))
    assert [sum(check_sum(tmp_path / name, entry)) for name, entry in manifest.trunk.items()] == [1000, 200]


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        (lambda folder: (folder / NAMES[1]).unlink(), NAMES[1], "is missing; it should have 200 bytes"),
        (lambda folder: os.truncate(folder / NAMES[0], 999), NAMES[0], "has 999 bytes; 1,000 were written"),
        (lambda folder: os.truncate(folder / NAMES[0], 0), NAMES[0], "has 0 bytes"),
        (lambda folder: (folder / INDEX).unlink(), INDEX, "is missing"),
        (lambda folder: (folder / INDEX).write_text("{"), INDEX, "is not JSON"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe\x00"), INDEX, "is not JSON"),
        (index([]), INDEX, "is not a JSON object"),
        (index({}), INDEX, "weight_map is missing"),
        (index({"weight_map": {}}), INDEX, "its weight_map is empty"),
        (index({"weight_map": ["a"]}), INDEX, "weight_map is ['a'], not an object"),
        (index({"weight_map": {"a": 1}}), INDEX, "weight_map.a is 1, not the name of a trunk file"),
        (index({"weight_map": {"a": f"../outside/{NAMES[0]}"}}), INDEX, STRANGE),
        (index({"weight_map": {"a": f"/tmp/{NAMES[0]}"}}), INDEX, STRANGE),
        (index({"weight_map": {"a": "trunk-../trunk-1.safetensors"}}), INDEX, STRANGE),
        (index({"weight_map": {"a": "pytorch_model.bin"}}), INDEX, STRANGE),
        (index({"weight_map": {"a": NAMES[0], "b": NAMES[1]}}), NAMES[0], "has the tensor 'c'"),
        (index({"weight_map": {"a": "trunk-00003-of-00003.safetensors"}}), INDEX, "which is not in the manifest"),
    ],
)
def test_a_fault_is_named(
    manifest: Manifest, tmp_path: Path, fault: Callable[[Path], object], name: str, words: str
) -> None:
    fault(tmp_path)
    faults = trunk_faults(tmp_path, manifest)
    assert list(faults) == [name]
    assert words in faults[name].cause
    assert "\n" not in faults[name].cause
    assert str(tmp_path / name) in faults[name].cause
    assert faults[name].fix
    with pytest.raises(StoreFormatError):
        check_trunk(tmp_path, manifest)


def test_without_sums_what_the_index_names_must_be_there(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).unlink()
    with pytest.raises(StoreFormatError, match="is missing"):
        check_trunk(tmp_path, replace(manifest, trunk={}))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**13 - 1))
def test_any_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int) -> None:
    path = tmp_path_factory.mktemp("flipped") / NAMES[0]
    path.write_bytes(bytes(range(256)) * 4)
    entry = summed(path)
    flip_bit(path, place // 8, place % 8)
    with pytest.raises(ChecksumError, match=f"{entry.crc32c:08x} was written"):
        list(check_sum(path, entry))


def test_a_file_of_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "READ_PIECE_BYTES", 100)
    path = tmp_path / NAMES[0]
    path.write_bytes(os.urandom(1050))
    assert list(check_sum(path, summed(path))) == [*[100] * 10, 50]


def test_what_cannot_be_read_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).mkdir()
    with pytest.raises(StoreReadError, match="can't be read"):
        list(check_sum(tmp_path / NAMES[0], FileSum(1, 1)))


def test_the_manifest_keeps_it_and_it_is_no_part_of_the_plan(manifest: Manifest, tmp_path: Path) -> None:
    plan = make_plan()
    records = make_records(plan)
    write_store(tmp_path, plan, records)
    without = read_manifest(tmp_path / GROUP)
    assert without.trunk == {}
    assert "trunk" not in without.to_json()
    for _ in range(2):  # the second time it is a finished store with a trunk that is opened with the plan
        with StoreWriter.open(tmp_path / GROUP, plan) as writer:
            assert writer.finished_blocks == {0, 1, 2}
            writer.finish(manifest.trunk)
        assert read_manifest(tmp_path / GROUP) == replace(without, trunk=manifest.trunk)
    with (
        pytest.raises(TargetExistsError, match="which differs in model"),
        StoreWriter.open(tmp_path / GROUP, replace(plan, model="another")),
    ):
        pass


@pytest.mark.parametrize(
    "value",
    [None, [], {NAMES[0]: None}, {NAMES[0]: {"bytes": 1}}, {"../trunk-1.safetensors": {"bytes": 1, "crc32c": 1}}],
)
def test_a_malformed_one_is_refused(value: object) -> None:
    with pytest.raises(StoreError, match="its manifest can't be used"):
        Manifest.from_json(make_plan().to_json() | {"trunk": value}, "here")


# records in it

FORM = TrunkRecords(4, 64, "bfloat16")


def with_records(folder: Path, tensors: dict[str, np.ndarray], named: str | None = None) -> Manifest:
    save_file(tensors, folder / NAMES[0])
    places = dict.fromkeys([*tensors, *([named] if named else [])], NAMES[0])
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return replace(make_plan(), trunk_records=FORM, requires=("trunk-records",))


def test_records_are_those_that_the_index_names_so(tmp_path: Path) -> None:
    tensors = {"a.b.record": np.zeros(128, np.uint8), "a.norm.weight": np.zeros(3, np.float32)}
    manifest = with_records(tmp_path, tensors | {"record": np.zeros(1, np.uint8)})
    assert trunk_records(tmp_path, manifest) == {"a.b": 128}
    with pytest.raises(StoreFormatError, match=r"names a\.b\.record, a quantised matrix, but the manifest says"):
        trunk_records(tmp_path, replace(manifest, trunk_records=None))


@pytest.mark.parametrize(
    ("tensors", "named", "words"),
    [
        ({"a.record": np.zeros(8, np.float32)}, None, "a.record has type F32"),
        ({"a.record": np.zeros((8, 8), np.uint8)}, None, "a.record has type U8"),
        ({"a.record": np.zeros(8, np.uint8)}, "b.record", "b.record is missing"),
    ],
)
def test_what_is_no_record_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], named: str | None, words: str
) -> None:
    with pytest.raises(StoreFormatError, match=words):
        trunk_records(tmp_path, with_records(tmp_path, tensors, named))


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    manifest = with_records(tmp_path, {"a.record": np.zeros(8, np.uint8)})
    (tmp_path / NAMES[0]).write_bytes(b"{}")
    with pytest.raises(StoreFormatError, match="can't be read"):
        trunk_records(tmp_path, manifest)


@pytest.mark.parametrize(
    ("value", "requires"),
    [
        ({"bits": 3, "group": 64, "pairs": "bfloat16"}, ["trunk-records"]),
        ({"bits": 16, "group": 64, "pairs": "bfloat16"}, ["trunk-records"]),
        ({"bits": 4, "group": "64", "pairs": "bfloat16"}, ["trunk-records"]),
        ({"bits": 4, "group": 64, "pairs": "float16"}, ["trunk-records"]),
        ({"bits": 4, "group": 64}, ["trunk-records"]),
        (None, ["trunk-records"]),
        ({"bits": 4, "group": 64, "pairs": "bfloat16"}, []),
    ],
)
def test_a_manifest_that_says_something_else_of_them(value: object, requires: list[str]) -> None:
    stored = make_plan().to_json() | {"trunk_records": value, "requires": requires}
    with pytest.raises(StoreError, match="its manifest can't be used"):
        Manifest.from_json(stored, "here")


def test_the_manifest_keeps_how_they_are_made() -> None:
    plan = replace(make_plan(), trunk_records=FORM, requires=("trunk-records",))
    assert Manifest.from_json(plan.to_json(), "here") == plan
    assert plan.trunk_bits == 4
