"""Headers of safetensors files that lie: a checkpoint is refused by name, or each extent lies within its file."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_checkpoints import save_native
from stores import read_record

from moetier.runtime.checkpoint import extents
from moetier.runtime.checkpoint.safetensors_folder import WEIGHTS, open_safetensors
from moetier.runtime.stores.checkpoint_store import CheckpointStore, make_table
from moetier.tiers.errors import CheckpointError, MoetierError
from moetier.tiers.headers.safetensors import ITEM_BYTES, MAX_HEADER_BYTES
from moetier.tiers.layout import ExpertKey

QUANTISED = ["gpt-oss", "deepseek-v4", "kimi-k2.5", "fp8-block", "nvfp4"]
CODES = ("_blocks", ".weight_packed", ".w2.weight", "down_proj.weight")  # of experts
SCALES = ("_scales", ".weight_scale", ".scale", ".weight_scale_inv")
# what else may be there: two names of one form, or another one that headers can't tell
ALSO = {"codes": {"U8": {"I8"}, "I8": {"U8"}}, "scales": {"F8_E8M0": {"U8"}, "U8": {"F8_E8M0"}, "BF16": {"F16"}}}


class Folder:
    """A checkpoint of one file, whose header is written anew each time. The model is built once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = (path / WEIGHTS).read_bytes()
        self.length = int.from_bytes(data[:8], "little")
        self.header: dict[str, Any] = json.loads(data[8 : 8 + self.length])
        self.data = len(data) - 8 - self.length
        checkpoint = open_safetensors(path)
        self.built = extents.build_on_meta(checkpoint.config, checkpoint.first_dtype)

    def write(self, header: bytes, length: int | None = None, size: int | None = None) -> None:
        """``length`` is what the file says of the header's, ``size`` that of the data."""
        with (self.path / WEIGHTS).open("wb") as stream:
            stream.write((len(header) if length is None else length).to_bytes(8, "little") + header)
            os.ftruncate(stream.fileno(), 8 + len(header) + (self.data if size is None else size))

    def look(self) -> bool:
        """Whether it is accepted. Then each extent is in the file, behind its header, and can be read."""
        try:
            table = make_table(open_safetensors(self.path))
        except MoetierError as error:
            refusal = error
        else:
            refusal = None
        if refusal is not None:
            assert str(self.path) in refusal.cause or "checkpoint" in refusal.cause, refusal.cause
            assert refusal.fix
            return False
        size = (self.path / WEIGHTS).stat().st_size
        with CheckpointStore.with_table(self.path, table) as store:
            for block, entry in enumerate(table.manifest.blocks):
                for expert in range(entry.experts):
                    for extent in table.extents(ExpertKey(block, expert)):
                        assert size - self.data <= extent.offset <= extent.offset + extent.length <= size
            read_record(store, ExpertKey(0, 0))
        return True


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(save_checkpoint(tmp_path_factory.mktemp("hostile") / "mixtral", shards=1))


@pytest.fixture
def folder(made: Folder, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(extents, "build_on_meta", lambda config, dtype: copy.deepcopy(made.built))
    return made


@pytest.fixture(scope="module", params=QUANTISED)
def made_quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(save_native(tmp_path_factory.mktemp("hostile"), request.param)[0])


@pytest.fixture
def quantised(made_quantised: Folder, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(extents, "build_on_meta", lambda config, dtype: copy.deepcopy(made_quantised.built))
    return made_quantised


def test_the_header_as_it_was_is_accepted(folder: Folder) -> None:
    folder.write(json.dumps(folder.header).encode())
    assert folder.look()


def test_a_quantised_header_as_it_was_is_accepted(quantised: Folder) -> None:
    quantised.write(json.dumps(quantised.header).encode())
    assert quantised.look()


def test_each_lie_about_codes_and_scales_is_refused_by_name(quantised: Folder) -> None:
    """Types of the same size, shapes of the same size, another type in the same bytes, and one without its scales."""
    known = [name for name in quantised.header if ".experts." in name and name.endswith(CODES)]
    belong = [name for name in quantised.header if ".experts." in name and name.endswith(SCALES)]
    assert known
    assert belong
    for what, name in (("codes", known[-1]), ("scales", belong[-1])):
        entry = quantised.header[name]
        size = ITEM_BYTES[entry["dtype"]]
        types = {kind for kind, item in ITEM_BYTES.items() if item == size} - {entry["dtype"]}
        types -= ALSO[what].get(entry["dtype"], set())
        lies = [{"dtype": kind} for kind in sorted(types)]
        if len(entry["shape"]) > 1:
            lies += [{"shape": [1, *entry["shape"]]}, {"shape": [math.prod(entry["shape"])]}]
            lies += [{"shape": entry["shape"][::-1]}] * (entry["shape"] != entry["shape"][::-1])
        for lie in lies:
            quantised.write(json.dumps(quantised.header | {name: entry | lie}).encode())
            assert not quantised.look(), (name, lie)
        renamed = {("x" if key == name else key): value for key, value in quantised.header.items()}
        quantised.write(json.dumps(renamed).encode())
        assert not quantised.look(), name


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def changed(folder: Folder, **fields: Any) -> bytes:
    return json.dumps(folder.header | {EXPERT: folder.header[EXPERT] | fields}).encode()


def test_each_lie_is_refused_by_name(folder: Folder) -> None:
    begin, end = folder.header[EXPERT]["data_offsets"]
    rows, columns = folder.header[EXPERT]["shape"]
    lies = {
        "beyond the file": changed(folder, data_offsets=[folder.data, folder.data + end - begin]),
        "overlapping": changed(folder, data_offsets=[begin - 2, end - 2]),
        "negative": changed(folder, data_offsets=[-(end - begin), 0]),
        "2^62": changed(folder, data_offsets=[1 << 62, (1 << 62) + end - begin]),
        "backwards": changed(folder, data_offsets=[end, begin]),
        "a shape of 2^62": changed(folder, shape=[1 << 62, columns]),
        "a shape below 0": changed(folder, shape=[-rows, -columns]),
        "another size of items": changed(folder, dtype="F32"),
        "another type of the same size": changed(folder, dtype="F16"),
        "another shape of the same size": changed(folder, shape=[columns, rows]),
        "no type": changed(folder, dtype="BF17"),
        "twice": json.dumps(folder.header).encode()[:-1]
        + f',"{EXPERT}":{json.dumps(folder.header[EXPERT])}}}'.encode(),
        "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "a digit that is none of ASCII": json.dumps(folder.header).encode().replace(b"model.norm", b"model.\\u00b2"),
        "a name of digits": json.dumps(folder.header).encode().replace(b"model.norm", b"9" * 5000),
        "digits": changed(folder, data_offsets=[int("9" * 4000), 1]),
    }
    for lie, header in lies.items():
        folder.write(header)
        assert not folder.look(), lie


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_a_length_that_lies_is_refused(length: int, folder: Folder) -> None:
    folder.write(json.dumps(folder.header).encode(), length)
    assert not folder.look()


def test_a_header_of_100_megabytes_is_not_read(folder: Folder) -> None:
    """Nor is one that is a little larger than what is read."""
    for size in (100_000_000, MAX_HEADER_BYTES + 1):
        folder.write(b"{" + b" " * (size - 2) + b"}", size=0)
        with pytest.raises(CheckpointError, match=f"{WEIGHTS} .*header of {size:,} bytes"):
            open_safetensors(folder.path)
    folder.write(b"{}", size=0)


NUMBERS = (
    st.sampled_from([-(2**62), -2, -1, 0, 1, 2, 64, 4096, 2**31, 2**50, 2**62, 2**63, 2**64, 10**40]) | st.integers()
)
ANYTHING = NUMBERS | st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(ITEM_BYTES))
FIELDS = {
    "dtype": st.sampled_from(sorted(ITEM_BYTES)) | ANYTHING,
    "shape": st.lists(NUMBERS, max_size=4) | ANYTHING,
    "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | ANYTHING,
}


@st.composite
def headers(draw: st.DrawFn, known: dict[str, Any]) -> bytes:
    """The header with one to three lies."""
    header = dict(known)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header) or ["a"]))
        match draw(st.sampled_from(["field", "field", "shift", "swap", "entry", "rename", "remove", "add"])):
            case "field":
                field = draw(st.sampled_from(sorted(FIELDS)))
                if isinstance(header.get(name), dict):
                    header[name] = header[name] | {field: draw(FIELDS[field])}
            case "shift":
                if isinstance(header.get(name), dict) and isinstance(header[name].get("data_offsets"), list):
                    by = draw(NUMBERS)
                    moved = [at + by if isinstance(at, int) else at for at in header[name]["data_offsets"]]
                    header[name] = header[name] | {"data_offsets": moved}
            case "swap":
                other = draw(st.sampled_from(sorted(header) or ["a"]))
                header[name], header[other] = header.get(other), header.get(name)
            case "entry":
                header[name] = draw(ANYTHING | st.dictionaries(st.sampled_from(sorted(FIELDS)), ANYTHING))
            case "rename":
                header[draw(st.text(max_size=5))] = header.pop(name, None)
            case "remove":
                header.pop(name, None)
            case "add":
                header[draw(st.text(max_size=5))] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    data = json.dumps(header).encode()
    if draw(st.integers(0, 9)) == 0:  # cut, or with a byte that is none of JSON's
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 2)) :]
    return data


def lies(folder: Folder, data: st.DataObject) -> None:
    folder.write(data.draw(headers(folder.header)))
    folder.look()


ON_FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=60, suppress_health_check=ON_FIXTURES)
@given(data=st.data())
def test_headers_with_lies(folder: Folder, data: st.DataObject) -> None:
    lies(folder, data)


@settings(max_examples=20, suppress_health_check=ON_FIXTURES)
@given(data=st.data())
def test_quantised_headers_with_lies(quantised: Folder, data: st.DataObject) -> None:
    lies(quantised, data)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=2_000, suppress_health_check=ON_FIXTURES)
@given(data=st.data())
def test_ten_thousand_quantised_headers_with_lies(quantised: Folder, data: st.DataObject) -> None:
    lies(quantised, data)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=10_000, suppress_health_check=ON_FIXTURES)
@given(data=st.data())
def test_ten_thousand_headers_with_lies(folder: Folder, data: st.DataObject) -> None:
    lies(folder, data)
