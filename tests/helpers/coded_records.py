"""Records in a checkpoint's own coding, of random bytes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moetier.tiers.layout import CODINGS, GGUF_BLOCKS, Bias, Projection, RecordLayout
from moetier.tiers.quant.codec import sections


def projection(coding: str, rows: int, columns: int, name: str = "up_proj", **fields: Any) -> Projection:
    """A projection in ``coding``."""
    return Projection(name, rows, columns, CODINGS[coding], coding=coding, **fields)


def coded(*projections: Projection, biases: tuple[Bias, ...] = (), seed: int = 0) -> tuple[RecordLayout, Tensor]:
    """A record with codes and scales at random: weights are at most about 1 in size, and finite."""
    layout = RecordLayout(projections, biases)
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    views, random = sections(record, layout), torch.Generator().manual_seed(seed)
    for p in projections:
        codes, scales = views[f"{p.name}.codes"], views[f"{p.name}.scales"]
        codes.random_(0, 256, generator=random)
        if p.coding == "e4m3":
            codes[(codes & 127) == 127] = 1  # which are no numbers
        largest = 448.0 if p.coding == "e4m3" else 8.0
        match p.scales:
            case "e8m0":
                exponent = 127 - int(largest).bit_length()
                scales.random_(exponent - 3, exponent + 1, generator=random)
            case "e4m3":  # globals make up for their size
                scales.random_(0x28, 0x58, generator=random)
            case _:
                scales.copy_((0.2 + torch.rand(scales.shape, generator=random)) / largest)
        if p.globals:
            given = (0.5 + torch.rand(p.parts, generator=random)) / 64
            views[f"{p.name}.globals"].copy_(given if p.globals == "multiply" else 1 / given)
    for bias in biases:
        views[bias.name].copy_(torch.randn(bias.size, generator=random) / 4)
    return layout, record


def blocks(coding: str, rows: int, columns: int, seed: int = 0) -> tuple[RecordLayout, Tensor]:
    """A record with one projection in the blocks of a GGUF file."""
    block = GGUF_BLOCKS[coding]
    p = Projection("up_proj", rows, columns, block.bits, group=block.group, coding=coding)
    layout = RecordLayout((p,))
    data = random_blocks(p.shape, coding.upper(), np.random.default_rng(seed)).reshape(-1)
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    record[: data.size] = torch.from_numpy(data)
    return layout, record


def random_blocks(shape: tuple[int, ...], ggml_type: str, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Valid ones, whose weights have about the size of those of a model."""
    block = GGUF_BLOCKS[ggml_type.lower()]
    rows = int(np.prod(shape[:-1]))
    blocks = random.integers(0, 256, (rows * shape[-1] // block.weights, block.nbytes), np.uint8)
    scale = random.uniform(0.5, 1, (len(blocks), 1)).astype(np.float16)
    match ggml_type:
        case "Q4_0" | "Q8_0":
            blocks[:, 0:2] = (scale * np.float16(0.01 if ggml_type == "Q4_0" else 0.0006)).view(np.uint8)
        case "MXFP4":
            blocks[:, 0] = random.integers(120, 124, len(blocks))
        case "Q4_K" | "Q5_K":
            blocks[:, 0:2] = (scale * np.float16(0.0003)).view(np.uint8)
            blocks[:, 2:4] = (scale * np.float16(0.002)).view(np.uint8)
        case "Q6_K":
            blocks[:, 208:210] = (scale * np.float16(0.00005)).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


@contextlib.contextmanager
def before_a_fence(payload: Tensor) -> Iterator[list[Tensor]]:
    """Yield a copy of ``payload``, as the one tensor of a list, that ends where memory begins that can't be read."""
    pages = -(-len(payload) // mmap.PAGESIZE) * mmap.PAGESIZE
    with mmap.mmap(-1, pages + mmap.PAGESIZE) as memory:
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        fence, nothing = ctypes.c_void_p(whole.data_ptr() + pages), 0
        assert ctypes.CDLL(None, use_errno=True).mprotect(fence, mmap.PAGESIZE, nothing) == 0
        moved = [whole[pages - len(payload) : pages]]
        moved[0].copy_(payload)
        try:
            yield moved
        finally:
            moved.clear()  # no tensor may be left when the memory is unmapped
            del whole
