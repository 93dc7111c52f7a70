"""The table of extents as a file: what was written comes back, and nothing else is accepted."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extent_files import write_extents
from hypothesis import given
from hypothesis import strategies as st
from stores import make_plan, make_records

from moetier.tiers.errors import StoreError, StoreFormatError, TargetError
from moetier.tiers.extents.table import NAME, ExtentTable, cached, read_table, write_table

PLAN = make_plan()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


@pytest.fixture
def table(folder: Path) -> ExtentTable:
    return write_extents(folder, PLAN, make_records(PLAN))


def same(one: ExtentTable, other: ExtentTable | None) -> bool:
    return other is not None and one.to_json() == other.to_json()


def test_it_comes_back_from_beside_the_checkpoint(folder: Path, table: ExtentTable, cache: Path) -> None:
    assert read_table(folder) is None
    assert write_table(folder, table, into_cache=True).parent == cache / "moetier" / "extents"
    assert same(table, read_table(folder))
    assert write_table(folder, table, into_cache=False) == folder / NAME
    assert not cached(folder).exists(), "an older one, which would be read first"
    assert same(table, read_table(folder))


def test_it_is_parsed_once_until_it_changes(folder: Path, table: ExtentTable) -> None:
    write_table(folder, table, into_cache=False)
    first = read_table(folder)
    assert read_table(folder) is first
    path = folder / NAME
    path.write_bytes(path.read_bytes().replace(b"model-0", b"model-9"))  # in its place, of the same size
    assert not same(table, read_table(folder))


def test_it_goes_into_the_cache_where_the_checkpoint_cannot_be_written_to(
    folder: Path, table: ExtentTable, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / f"{NAME}.partial").mkdir()  # so that not even root can write it
    assert write_table(folder, table, into_cache=False) == cached(folder)
    assert same(table, read_table(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "model-0.safetensors"))
    with pytest.raises(TargetError, match="can't be written"):
        write_table(folder, table, into_cache=False)


def place(value: dict[str, Any], change: Callable[[Any], object]) -> None:
    entry = value["blocks"][0]
    places = np.frombuffer(base64.b64decode(entry["places"]), "<i8").reshape(-1, 2).copy()
    change(places)
    entry["places"] = base64.b64encode(places.tobytes()).decode()


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda value: value.update(format=2),
    "an offset behind the end": lambda value: place(value, lambda p: p.__setitem__((3, 1), 1 << 62)),
    "an extent that passes the end": lambda value: place(
        value, lambda p: p.__setitem__((0, 1), value["shards"][0]["bytes"] - 1)
    ),
    "a negative offset": lambda value: place(value, lambda p: p.__setitem__((0, 1), -1)),
    "a shard that is not there": lambda value: place(value, lambda p: p.__setitem__((0, 0), 3)),
    "a negative shard": lambda value: place(value, lambda p: p.__setitem__((0, 0), -1)),
    "a piece too few": lambda value: value["blocks"][0]["pieces"].pop(),
    "a piece of nothing": lambda value: value["blocks"][0]["pieces"].insert(0, ["gate_up_proj", 0]),
    "rows that do not alternate": lambda value: value["blocks"][0]["pieces"][0].extend([64, False]),
    "half a number": lambda value: value["blocks"][0]["pieces"].__setitem__(0, ["gate_up_proj", 5, 0, True]),
    "rows of half a number": lambda value: (
        value["blocks"][0].update(pieces=[[name, size, 1, True] for name, size in value["blocks"][0]["pieces"]]),
        value["shards"][0].update(bytes=1 << 30),  # room for twice the bytes
    ),
    "pieces in another order": lambda value: value["blocks"][0]["pieces"].reverse(),
    "a place too few": lambda value: value["blocks"][0].update(places=value["blocks"][0]["places"][:-64]),
    "a block too few": lambda value: value["blocks"].pop(),
    "a checksum too few": lambda value: value.update(record_checksums="AAAA"),
    "no base64": lambda value: value.update(record_checksums="?"),
    "a shard outside": lambda value: value["shards"][0].update(name="/etc/passwd"),
    "no digest of a header": lambda value: value["shards"][0].update(header="x"),
    "a shard of 2^62 bytes": lambda value: value["shards"][0].update(bytes=1 << 62),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_table_that_is_wrong_is_refused(wrong: str, folder: Path, table: ExtentTable) -> None:
    path = write_table(folder, table, into_cache=False)
    value = json.loads(path.read_text())
    WRONG[wrong](value)
    path.write_text(json.dumps(value))
    with pytest.raises(StoreFormatError, match=NAME) as caught:
        read_table(folder)
    assert "moetier link" in caught.value.fix or "manifest" in caught.value.cause


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for name, each in inner for leaf in leaves(each, (*path, name)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    table = _known(tmp_path_factory)
    value = json.loads(json.dumps(table.to_json()))
    path = data.draw(st.sampled_from(leaves(value)[1:]))
    at = value
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = data.draw(JSON)
    try:
        found = ExtentTable.from_json(value, "the table")
    except StoreError:
        return
    for block in found.blocks:
        for expert in range(len(block.places)):
            for extent in block.of(found.manifest.layout(0), expert):
                assert 0 <= extent.offset <= extent.offset + extent.length <= found.shards[extent.shard].bytes


_made: list[ExtentTable] = []


def _known(factory: pytest.TempPathFactory) -> ExtentTable:
    if not _made:
        plan = make_plan(blocks=1)
        _made.append(write_extents(factory.mktemp("table"), plan, make_records(plan)))
    return _made[0]
