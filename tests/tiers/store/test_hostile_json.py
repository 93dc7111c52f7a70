"""Hostile values in every field of every JSON document of a model directory raise a StoreError that names the field.

The fields are those of real documents, so a new one is covered by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import without_sums

from moetier.tiers.errors import IncompleteStoreError, StoreError, StoreFormatError
from moetier.tiers.layout import Projection, RecordLayout
from moetier.tiers.manifest import FileSum
from moetier.tiers.store.folder import (
    GROUP,
    JOURNAL,
    MAX_JSON_BYTES,
    METADATA,
    ORIGIN,
    PLAN,
    read_manifest,
    read_origin,
    resuming,
)
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.trunk import INDEX, check_trunk, trunk_faults, trunk_records
from moetier.tools.convert.api import convert

TRUNK = "trunk-00001-of-00001.safetensors"
HEADER = f"the header of {TRUNK}"
GROUP_JSON, ARRAY_JSON = f"{GROUP}/{METADATA}", f"{GROUP}/records/{METADATA}"

DEEP = '[{"a":' * 5_000 + "0" + "}]" * 5_000
VALUES = (
    "0", "-1", str(2**62), "-0.5", "NaN", "Infinity", "9" * 5000, "null", "true", '"zz"', '"\\ud800"', '"../x"',
    "[]", "{}", '{"zz": {}}', DEEP,
)  # fmt: skip

# what a field may say as well, by its name; of what no reader looks at, anything
TEXTS = {'"zz"', '"../x"'}
OTHERS = {
    **dict.fromkeys(("model", "version", "method", "path", "__metadata__.format"), TEXTS),
    **{
        "crc32c": {"0"},
        "total_size": {"0"},
        "metadata": {"{}"},
        "__metadata__": {"{}"},
        "transposed": {"true"},
        "trunk": {"{}"},
        "copied": {"{}"},
    },
}
UNREAD = {"fill_value", "attributes", "dimension_names"}  # of an array

Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def directory(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    convert(tinymix, folder, bits=3, trunk_bits=4, fast=True)
    return folder


def use_experts(directory: Path) -> None:
    ShardStore.open(directory).close()


def use_trunk(directory: Path) -> None:
    manifest = read_manifest(directory / GROUP)
    check_trunk(directory, manifest)
    trunk_records(directory, manifest)


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the place of each value inside; of lists and of many members (tensors), only the first and the last."""
    inner: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    if isinstance(value, list) or len(inner) > 20:
        inner = [*inner[:1], *inner[1:][-1:]]
    for name, each in inner:
        yield (*place, name)
        yield from places(each, (*place, name))


def with_value(document: Any, place: Place, value: str) -> str:
    """Format a document with the text ``value`` at a place."""
    made = json.loads(json.dumps(document))
    inner = made
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = "@@HERE@@"
    return json.dumps(made).replace('"@@HERE@@"', value)


def header_of(path: Path) -> tuple[Any, bytes]:
    """Return the header of a safetensors file and the bytes after it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def framed(text: str) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode()


def document_of(directory: Path, name: str) -> tuple[Any, Callable[[str], None]]:
    """Prepare the directory for a document; return it with a function that replaces its text."""
    if name == HEADER:
        without_sums(directory)
        path = directory / TRUNK
        header, data = header_of(path)
        return header, lambda text: _write(path, framed(text) + data)
    path = directory / name
    if name == f"{GROUP}/{PLAN}":
        group = directory / GROUP_JSON
        manifest = json.loads(group.read_bytes())["attributes"]["moetier"]
        plan = {key: manifest[key] for key in manifest.keys() - {"trunk", "record_checksums", "copied"}} | {
            "digest": ""
        }
        group.unlink()
        return plan, lambda text: _write(path, text.encode())
    return json.loads(path.read_bytes()), lambda text: _write(path, text.encode())


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


@pytest.mark.parametrize("name", [GROUP_JSON, ARRAY_JSON, INDEX, HEADER, f"{GROUP}/{PLAN}"])
def test_each_field_is_named(directory: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "model"))
    use = use_trunk if name in (INDEX, HEADER) else use_experts
    document, write = document_of(copy, name)
    write(json.dumps(document))
    if name == f"{GROUP}/{PLAN}":
        with pytest.raises(IncompleteStoreError):
            use(copy)
    else:
        use(copy)
    for place in places(document):
        if name == f"{GROUP}/{PLAN}" and len(place) > 1:
            continue  # as of a manifest
        names = [part for part in place if isinstance(part, str)]
        field, allowed = names[-1], OTHERS.get(names[-1], set()) | OTHERS.get(".".join(names), set())
        if "copied" in names:  # files whose sizes are compared only when the model is removed
            allowed = allowed | {"0", str(2**62)}
        for value in VALUES:
            if value in allowed or (name == ARRAY_JSON and names[0] in UNREAD):
                continue
            text = with_value(document, place, value)
            write(text)
            began, cause = time.process_time(), ""
            try:
                use(copy)
            except IncompleteStoreError:
                assert name == f"{GROUP}/{PLAN}"
            except StoreError as error:
                cause = error.cause
            where = f"{place} = {value[:40]}: {cause}"
            assert time.process_time() - began < 1, where
            if text == json.dumps(document):
                assert not cause, where
                continue
            assert ("that are nested" if value is DEEP else field) in cause, where
            assert len(cause) < 1000, where


def test_hints_that_are_hostile_are_not_used(directory: Path, tmp_path: Path) -> None:
    """The documents about a model's origin and about resuming its conversion."""
    copy = Path(shutil.copytree(directory, tmp_path / "model"))
    plan = read_manifest(copy / GROUP)
    origin = {"id": "acme/moe", "revision": "0" * 40}
    journal = {"command": ["moetier", "convert"], "errors": {"0": 0.5}}
    for name, document in ((ORIGIN, origin), (JOURNAL, journal)):
        for place in places(document):
            for value in VALUES:
                (copy / name).write_text(with_value(document, place, value))
                assert set(read_origin(copy)) <= {"id", "revision"}
                assert resuming(copy, plan).startswith("moetier convert") or place[0] == "command"


CHILD = """
import json, sys, time
from pathlib import Path
from moetier.runtime.checkpoint.config_json import read_config
from moetier.tiers.errors import StoreError
from moetier.tiers.store.folder import read_manifest
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.trunk import check_trunk, trunk_records
for folder in sys.argv[1:]:
    directory, cause, began = Path(folder), "", time.process_time()
    try:
        ShardStore.open(directory).close()
        manifest = read_manifest(directory / "experts.zarr")
        check_trunk(directory, manifest)
        trunk_records(directory, manifest)
        read_config(directory)
    except StoreError as error:
        cause = error.cause
    peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
    print(json.dumps([cause, time.process_time() - began, peak]))
"""


@pytest.mark.slow
def test_documents_of_many_bytes(directory: Path, tmp_path: Path) -> None:
    """200 MB of JSON, and the largest accepted document of the most expensive kind."""
    large = tmp_path / "large"
    large.write_bytes(b'{"a": [' + b"{}," * 66_666_666 + b"0]}")
    expected: dict[Path, str] = {}
    for name in (GROUP_JSON, ARRAY_JSON, INDEX, HEADER, f"{GROUP}/{PLAN}", "config.json"):
        for size in ("large", "most"):
            copy = Path(shutil.copytree(directory, tmp_path / f"{size} {name.replace('/', ' ')}"))
            document, write = document_of(copy, name)
            if size == "large":
                path = copy / (TRUNK if name == HEADER else name)
                path.unlink(missing_ok=True)
                os.link(large, path)
                expected[copy] = "a header of" if name == HEADER else f"{path} has more than 2,097,152 bytes"
                continue
            place = next(places(document))
            rest = MAX_JSON_BYTES - len(with_value(document, place, ""))
            write(with_value(document, place, "[" + "{}," * (rest // 3 - 1) + "0]"))
            expected[copy] = "" if name == "config.json" else str(place[0])
    command = [sys.executable, "-c", CHILD, *map(str, expected)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    for line, (copy, words) in zip(ended.stdout.splitlines(), expected.items(), strict=True):
        cause, seconds, peak = json.loads(line)
        assert words in cause, (copy, cause)
        assert bool(words) == bool(cause)
        assert seconds < 2, copy  # of a processor; half of that on an idle machine
        assert peak < 256 << 20, copy


def test_many_arrays_and_long_names(directory: Path, tmp_path: Path) -> None:
    """As many layouts, blocks and required features as fit into a document, and the longest names."""
    copy = Path(shutil.copytree(directory, tmp_path / "model"))
    group, write = document_of(copy, GROUP_JSON)
    manifest = group["attributes"]["moetier"]
    del manifest["record_checksums"]
    layout = RecordLayout((Projection("w", 1, 1, 16),)).to_json()
    block = {"top_k": 1, "experts": 1}
    arrays, blocks = 3_000, 15_000
    many = {
        "layouts": {f"a{i}": layout for i in range(arrays)},
        "blocks": [{"path": f"{i}", "array": f"a{i % arrays}", "index": i // arrays} | block for i in range(blocks)],
    }
    long = {
        "layouts": {"a" * 300: manifest["layouts"]["records"]},
        "blocks": [each | {"array": "a" * 300} for each in manifest["blocks"]],
    }
    for changed, words in (
        (many, "a0/zarr.json is missing"),
        (long, "layouts.aaa"),
        ({"requires": ["trunk-records"] * 100_000, "trunk_records": None}, "trunk_records is None"),
    ):
        made = {key: value for key, value in (manifest | changed).items() if value is not None}
        write(json.dumps({**group, "attributes": {"moetier": made}}, separators=(",", ":")))
        began = time.process_time()
        with pytest.raises(StoreFormatError) as caught:
            use_experts(copy)
        assert time.process_time() - began < 1, words
        assert words in caught.value.cause
        assert len(caught.value.cause) < 1000
    (copy / GROUP / METADATA).unlink()
    _write(copy / GROUP / PLAN, json.dumps(manifest | long | {"digest": ""}).encode())
    with pytest.raises(StoreFormatError, match="can't be the name of an array"):
        use_experts(copy)


def test_a_trunk_of_many_files(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "model"))
    header = '{"%s": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    files = 15_000
    for i in range(files):
        _write(copy / f"trunk-{i}.safetensors", framed(header % i) + b"0")
    places = {str(i): f"trunk-{i}.safetensors" for i in range(files)}
    (copy / INDEX).write_text(json.dumps({"weight_map": places}))
    size = (copy / "trunk-1000.safetensors").stat().st_size
    sums = {name: FileSum(size + len(name) - len("trunk-1000.safetensors"), 0) for name in places.values()}
    manifest = replace(read_manifest(copy / GROUP), trunk=sums)
    began = time.process_time()
    assert not trunk_faults(copy, manifest)
    assert time.process_time() - began < 5, "minutes, if each file were compared with all others"
