"""Headers of GGUF files, whole and hostile: each is read as the format says, or refused with what is wrong."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from moetier.tiers.headers import gguf
from moetier.tiers.headers.gguf import GGML_TYPES, digest_of, read_gguf

UINT32, FLOAT, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


KEYS = [
    key("general.architecture", STRING, text("qwen3moe")),
    key("qwen3moe.block_count", UINT32, struct.pack("<I", 2)),
    key("scale", FLOAT, struct.pack("<f", 0.5)),
    key("flag", BOOL, b"\x01"),
    key("tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("") + text("é")),
    key("sizes", ARRAY, struct.pack("<IQ", UINT64, 2) + struct.pack("<2Q", 1, 1 << 40)),
]
TENSORS = [tensor("norm.weight", (8,), 0, 0), tensor("exps.weight", (2, 3, 256), 12, 32)]
DATA = 32 + 2 * 3 * 144


def file_of(keys: list[bytes] = KEYS, tensors: list[bytes] = TENSORS, data: int = DATA, **changes: Any) -> bytes:
    counts = {"magic": b"GGUF", "version": 3, "count": len(tensors), "number": len(keys)} | changes
    head = counts["magic"] + struct.pack("<IQQ", counts["version"], counts["count"], counts["number"])
    head += b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + bytes(data)


def read(tmp_path: Path, data: bytes) -> gguf.GgufHeader:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def test_a_header_is_read(tmp_path: Path) -> None:
    data = file_of()
    found = read(tmp_path, data)
    assert found.metadata == {
        "general.architecture": "qwen3moe", "qwen3moe.block_count": 2, "scale": 0.5, "flag": True,
        "tokens": ["a", "", "é"], "sizes": [1, 1 << 40],
    }  # fmt: skip
    start = len(data) - DATA
    assert found.tensors["norm.weight"] == ("F32", 0, (8,), 32, start)
    assert found.tensors["exps.weight"] == ("Q4_K", 12, (2, 3, 256), 144, start + 32)
    assert found.tensors["exps.weight"].nbytes == 2 * 3 * 144
    assert start - 32 < found.nbytes <= start
    assert found.digest == digest_of(tmp_path / "model.gguf") == hashlib.sha256(data[: found.nbytes]).hexdigest()
    assert read(tmp_path, file_of(version=2)).tensors == found.tensors


def test_a_large_header_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "CHUNK_BYTES", 7)
    tokens = [f"token {number}" for number in range(5000)]
    many = key("tokens", ARRAY, struct.pack("<IQ", STRING, len(tokens)) + b"".join(map(text, tokens)))
    assert read(tmp_path, file_of([KEYS[0], many])).metadata["tokens"] == tokens


def aligned(to: int) -> bytes:
    return key("general.alignment", UINT32, struct.pack("<I", to))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "truncated"),
        (b"GGML" + bytes(100), "begins with b'GGML'"),
        (file_of(version=1), "version is 1"),
        (file_of(version=4), "version is 4"),
        (file_of(version=3 << 24), "big endian"),
        (file_of(count=1 << 62), "tensors"),
        (file_of(number=1 << 62), "keys"),
        (file_of(count=3), "'' has 0 dimensions"),
        (file_of([*KEYS, KEYS[0]]), "'general.architecture' twice"),
        (file_of([key("a" * 2000, BOOL, b"\x01")]), "a key has 2,000 bytes"),
        (file_of([text(b"\xff") + struct.pack("<I?", BOOL, True)]), "a key is not UTF-8"),
        (file_of([key("a", 13, b"")]), "'a' has values of type 13"),
        (file_of([key("a", STRING, struct.pack("<Q", 1 << 62))]), "truncated"),
        (file_of([key("a", STRING, text(b"\xc3"))]), "not UTF-8"),
        (file_of([key("a", ARRAY, struct.pack("<IQ", UINT32, 1 << 62))]), "values"),
        (file_of([key("a", ARRAY, struct.pack("<IQ", UINT32, 1 << 20))]), "truncated"),
        (file_of([key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 20))]), "truncated"),
        (file_of([key("a", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"\xff") * 2)]), "not UTF-8"),
        (file_of([key("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, UINT32, 0))]), "values of type 9"),
        (file_of([KEYS[0], aligned(0)]), "general.alignment is 0"),
        (file_of([KEYS[0], aligned(48)]), "general.alignment is 48"),
        (file_of([KEYS[0], aligned(1 << 31)]), "general.alignment is"),
        (file_of(tensors=[TENSORS[0], TENSORS[0]]), "'norm.weight' twice"),
        (file_of(tensors=[tensor("a" * 2000, (8,), 0, 0)]), "2,000 bytes"),
        (file_of(tensors=[tensor("a", (), 0, 0)]), "0 dimensions"),
        (file_of(tensors=[tensor("a", (1,) * 5, 0, 0)]), "5 dimensions"),
        (file_of(tensors=[text("a") + struct.pack("<I", 1 << 31)]), "2,147,483,648 dimensions"),
        (file_of(tensors=[tensor("a", (8,), 4, 0)]), "unknown type 4"),
        (file_of(tensors=[tensor("a", (8,), 1 << 31, 0)]), "unknown type"),
        (file_of(tensors=[tensor("a", (8, 0), 0, 0)]), r"the shape \[8, 0\]"),
        (file_of(tensors=[tensor("a", (1 << 40, 1 << 40), 0, 0)]), "has the shape"),
        (file_of(tensors=[tensor("a", (8,), 0, 1 << 62)]), "has the shape"),
        (file_of(tensors=[tensor("a", (2, 100), 12, 0)]), "100 columns, no multiple of 256"),
        (file_of(tensors=[tensor("a", (8,), 0, 1 << 20)]), "but the file has"),
        (file_of(data=DATA - 1), "but the file has"),
        (file_of(tensors=[tensor("a", (8,), 0, 4)]), "no multiple of 32"),
        (file_of(tensors=[tensor("a", (16,), 0, 0), tensor("b", (8,), 0, 32)]), "'a' and 'b' overlap"),
        (file_of(tensors=[tensor("a", (8,), 0, 0), tensor("b", (8,), 0, 0)]), "'a' and 'b' overlap"),
    ],
)
def test_a_hostile_header_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        read(tmp_path, data)


def test_a_header_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read(tmp_path, file_of([key("a", STRING, text("x" * 2000))]))
    monkeypatch.setattr(gguf, "MAX_VALUES", 4)
    with pytest.raises(ValueError, match="have 5 values, more than 4"):
        read(tmp_path, file_of())


def test_fuzzed_headers_are_refused_or_lie_in_the_file(tmp_path: Path) -> None:
    """Bytes changed, cut out and repeated; numbers become extreme ones."""
    whole = file_of()
    header = len(whole) - DATA
    chance = random.Random(0)
    path = tmp_path / "model.gguf"
    accepted = 0
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(header)
            match chance.randrange(4):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    data[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 255, 1 << 31, 1 << 62, (1 << 64) - 1]))
                case 2:
                    del data[at : at + chance.randint(1, 16)]
                case 3:
                    data[at:at] = data[at : at + chance.randint(1, 16)]
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            found = read_gguf(path)
        except ValueError:
            continue
        accepted += 1
        last = 0
        for entry in sorted(found.tensors.values(), key=lambda each: each.begin):
            assert found.nbytes <= entry.begin
            assert last <= entry.begin
            last = entry.begin + entry.nbytes
            assert last <= len(data)
    assert accepted


def test_the_sizes_of_blocks_divide_a_row() -> None:
    assert all(weights in (1, 32, 64, 256) and size > 0 for _, weights, size in GGML_TYPES.values())
