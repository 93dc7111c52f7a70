"""A reader of model directories that was written from docs/format.md alone: numpy, and nothing of moetier's.

It is the proof that the page says enough, and an example for who writes another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Weights = npt.NDArray[np.float32]

FEATURES = {"trunk-records"}


class Reader:
    """One model directory. ``manifest`` is what its store says of itself."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._folder = directory / "experts.zarr"
        self.manifest: dict[str, Any] = json.loads((self._folder / "zarr.json").read_text())["attributes"]["moetier"]
        if self.manifest["format"] != 1 or set(self.manifest["requires"]) - FEATURES:
            raise ValueError("of a later version")

    def record(self, block: int, expert: int) -> Bytes:
        """uint8 [record_bytes], its checksum proved."""
        record, crc = self._record(block, expert)
        if crc32c(record) != crc:
            raise ValueError("a damaged record")
        if (table := self.manifest.get("record_checksums")) is not None:
            number = sum(entry["experts"] for entry in self.manifest["blocks"][:block]) + expert
            if struct.unpack_from("<I", base64.b64decode(table), 4 * number) != (crc,):
                raise ValueError("a record of another conversion")
        return record

    def digest(self) -> str:
        """Return the digest of the checksums as they are stored."""
        sha = hashlib.sha256()
        for block, entry in enumerate(self.manifest["blocks"]):
            for expert in range(entry["experts"]):
                sha.update(struct.pack("<I", self._record(block, expert)[1]))
        return sha.hexdigest()

    def expert(self, block: int, expert: int) -> dict[str, Weights]:
        """fp32, before any rounding to another type: projections as the module holds them, and biases."""
        layout = self.manifest["layouts"][self.manifest["blocks"][block]["array"]]
        record, projections = self.record(block, expert), {}
        sections = {s["name"]: view(record, s["offset"], s["dtype"], s["shape"]) for s in layout["sections"]}
        for projection in layout["projections"]:
            projections[projection["name"]] = decode(projection, sections)
        for bias in layout["biases"]:
            projections[bias["name"]] = to_float(sections[bias["name"]], bias["dtype"])
        return projections

    def matrix(self, path: str, rows: int, columns: int) -> Weights:
        """A quantised matrix of the trunk, fp32 [rows, columns]."""
        stored = self.manifest["trunk_records"]
        group = max(g for g in {stored["group"], 128, 64, 32} if g <= stored["group"] and columns % g == 0)
        projection = {"name": "weight", "rows": rows, "columns": columns, "transposed": False, **stored, "group": group}
        index = json.loads((self._directory / "model.safetensors.index.json").read_text())["weight_map"]
        record = tensor(self._directory / index[f"{path}.record"], f"{path}.record")
        sections, offset = {}, 0
        for name, dtype, shape in pieces_of(projection):
            sections[name] = view(record, offset, dtype, shape)
            offset = -(-(offset + sections[name].nbytes) // 64) * 64
        return decode(projection, sections)

    def _record(self, block: int, expert: int) -> tuple[Bytes, int]:
        """The record and the checksum that is stored behind it."""
        entry = self.manifest["blocks"][block]
        path = self._folder / entry["array"] / "c" / str(entry["index"]) / "0" / "0"
        index_bytes = 16 * entry["experts"] + 4
        with path.open("rb") as file:
            file.seek(-index_bytes, 2)
            index = file.read(index_bytes)
            if crc32c(np.frombuffer(index[:-4], np.uint8)) != struct.unpack("<I", index[-4:])[0]:
                raise ValueError("a damaged index")
            offset, size = struct.unpack_from("<QQ", index, 16 * expert)
            file.seek(offset)
            data = np.frombuffer(file.read(size), np.uint8)
        assert offset % 4096 == 0 == size % 4096
        return data[:-4], int.from_bytes(data[-4:].tobytes(), "little")


def pieces_of(projection: dict[str, Any]) -> Iterator[tuple[str, str, list[int]]]:
    """Name, type and shape of the sections of a trunk's record, in their order."""
    name, bits = projection["name"], projection["bits"]
    rows, columns = -(-projection["rows"] // 64) * 64, projection["columns"]
    groups = columns // projection["group"]
    yield name + (".high" if bits == 8 else ".codes"), "uint8", [rows, columns // 2]
    yield f"{name}.pairs", projection["pairs"], [groups, rows, 2]
    if projection["pairs"] == "uint8":
        yield f"{name}.pair_scales", "bfloat16", [-(-groups * rows // 128), 2, 2]
    if bits == 8:
        yield f"{name}.low", "uint8", [rows, columns // 2]


def view(record: Bytes, offset: int, dtype: str, shape: list[int]) -> npt.NDArray[Any]:
    """bfloat16 as uint16, which numpy has."""
    item = np.dtype({"uint8": "u1", "bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}[dtype])
    return record[offset:][: int(np.prod(shape)) * item.itemsize].view(item).reshape(shape)


def to_float(values: npt.NDArray[Any], dtype: str) -> Weights:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def round_to_bfloat16(values: Weights) -> Weights:
    """Round to the nearest bfloat16, halves to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def round_to(values: Weights, dtype: str) -> Weights:
    if dtype == "bfloat16":
        return round_to_bfloat16(values)
    return values.astype(dtype).astype(np.float32)


def decode(projection: dict[str, Any], sections: dict[str, npt.NDArray[Any]]) -> Weights:
    name, bits, columns = projection["name"], projection["bits"], projection["columns"]
    if bits == 16:
        return to_float(sections[name], projection["dtype"])
    codes = codes_of(name, bits, columns, sections).astype(np.float32)
    pairs = pairs_of(name, projection["pairs"], sections)  # [K / group, N, 2]
    scale, offset = (np.repeat(pairs[:, :, which].T, projection["group"], axis=1) for which in (0, 1))  # [N, K]
    dtype, _, zeros = projection["pairs"].partition("_")
    if zeros:
        weights = round_to(round_to(codes - offset, dtype) * scale, dtype)
    else:
        weights = (codes - np.float32(2 ** (bits - 1))) * scale + offset
    weights = weights[: projection["rows"]]
    return weights.T if projection["transposed"] else weights


def codes_of(name: str, bits: int, columns: int, sections: dict[str, npt.NDArray[Any]]) -> Bytes:
    """[N, K], N padded."""
    if bits == 8:
        high, low = (rows_of(sections[f"{name}.{plane}"].ravel(), columns) for plane in ("high", "low"))
        return high << 4 | low
    codes = sections[f"{name}.codes"].ravel()
    if bits == 4:
        return rows_of(codes, columns)
    kernel_order = np.concatenate([codes & 0x33, codes >> 2 & 0x33])
    if bits == 3:
        plane = sections[f"{name}.plane"].ravel()
        kernel_order |= np.concatenate([plane >> part & 0x11 for part in range(4)]) << 2
    return rows_of(kernel_order, columns)


def rows_of(kernel_order: Bytes, columns: int) -> Bytes:
    blocks = kernel_order.reshape(-1, columns, 32)  # 64 rows each
    halves = np.stack([blocks & 15, blocks >> 4], axis=1)  # [N / 64, 2, K, 32]
    return halves.transpose(0, 1, 3, 2).reshape(-1, columns)


def pairs_of(name: str, dtype: str, sections: dict[str, npt.NDArray[Any]]) -> Weights:
    pairs = sections[f"{name}.pairs"]
    if dtype != "uint8":
        return to_float(pairs, dtype.partition("_")[0])
    scales = to_float(sections[f"{name}.pair_scales"], "bfloat16")  # [runs, 2, 2]
    run = np.arange(pairs.shape[0] * pairs.shape[1]).reshape(pairs.shape[:2]) // 128
    return round_to_bfloat16(pairs.astype(np.float32) * scales[run, :, 0] + scales[run, :, 1])


def tensor(path: Path, name: str) -> Bytes:
    """uint8, of a safetensors file: the length of its header as u64, the header in JSON, the tensors."""
    data = np.fromfile(path, np.uint8)
    length = int(data[:8].view("<u8")[0])
    start, end = json.loads(data[8 : 8 + length].tobytes())[name]["data_offsets"]
    return data[8 + length :][start:end]


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(data: Bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data.tobytes():
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
