"""Weights in the blocks of GGUF files, decoded as the package gguf decodes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moetier.tiers.layout import GGUF_BLOCKS
from moetier.tiers.quant.gguf_blocks import decode_blocks

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("coding", GGUF_BLOCKS)
@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_give_the_bits_of_gguf(coding: str, seed: int) -> None:
    """Scales that are no numbers too."""
    form = GGUF_BLOCKS[coding]
    rows = np.random.default_rng(seed).integers(0, 256, (37, 3 * form.nbytes), np.uint8)
    if coding == "mxfp4":  # gguf reads 0xFF as a number
        rows[:, :: form.nbytes] = np.minimum(rows[:, :: form.nbytes], 254)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[coding.upper()])
    found = decode_blocks(torch.from_numpy(rows), coding).numpy()
    assert found.shape == wanted.shape
    numbers = ~np.isnan(wanted)
    assert (np.isnan(found) == ~numbers).all()
    assert (found.view(np.uint32)[numbers] == wanted.view(np.uint32)[numbers]).all()


def test_every_exponent_of_mxfp4() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (256, 17), np.uint8)
    rows[:, 0] = np.arange(256)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.MXFP4)
    found = decode_blocks(torch.from_numpy(rows), "mxfp4").numpy()
    assert (found[:255].view(np.uint32) == wanted[:255].view(np.uint32)).all()
    assert np.isnan(found[255]).all(), "by the standard; gguf reads a number"


def test_the_sizes_are_those_of_gguf() -> None:
    for coding, form in GGUF_BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[coding.upper()]] == (form.weights, form.nbytes)
