"""Codec: encode the weights of one expert as the bytes of its record, and decode a record.

A quantised weight is w = (c - 2^(bits-1)) * s + b, where c is the weight's code, of ``bits`` bits, and (s, b) is the
bf16 pair of its group. ``decode`` computes w in fp32, where the product is exact and the sum is rounded once, and then
rounds w to the requested type. All other code that dequantises weights must give the same result, bit for bit.

Torch's int4 kernel computes w = (q - 8) * s + b with q from 0 to 15. So every code c is expanded to q:

    4 bits   q = c
    3 bits   q = c + 4; the two low bits of c are stored folded in 2 parts, the third bit is a plane folded in 4 parts
    2 bits   q = c + 6; c is stored folded in 2 parts (``packing`` explains folding)
    8 bits   w is a sum of two weights: one has q = c >> 4 and the pair (16 s, b), the other q = c & 15 and (s, 8 s)

With these formulas, b is the same number for each number of bits. It is near the middle of the group's range, where
rounding to bf16 costs little.

Records of checkpoints that HQQ, AWQ or GPTQ quantised have pairs (s, z) in place of (s, b), as the checkpoint has them:
w = (c - z) * s, where each operation is rounded to the type of s and z (``zero_points`` makes such records).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moetier.tiers.errors import CheckpointError, ConfigError
from moetier.tiers.layout import BITS, GROUPS, PAIR_TYPES, ROW_TILE, ZERO_POINTS, Bias, Bits, Projection, RecordLayout

from . import hqq
from .codings import decode_rows
from .packing import HALF, Bands, fold, from_kernel_order, load_pairs, store_pairs, to_kernel_order, unfold
from .zero_points import Levels, store

# A dictionary from bits per weight to the default group size and type of pairs. These gave the best perplexity per
# stored byte on a real model (docs/quality.md), with one exception: with 8 and 4 bits, pairs are bf16, so that torch's
# int4 kernel can multiply a record in place.
DEFAULTS: dict[Bits, tuple[int, str]] = {
    8: (64, "bfloat16"),
    4: (64, "bfloat16"),
    3: (64, "uint8"),
    2: (32, "uint8"),
}
STORED_AS = {"bfloat16": "bfloat16", "float16": "float16", "float32": "bfloat16"}
TORCH_TYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CENTRING = {4: 0, 3: 0x44, 2: 0x66}  # from bits to what ``expand`` adds to a byte, which has two codes c, to get two q
TILE_WEIGHTS = 2**19  # number of weights that are decoded at a time: 2 MiB in fp32


@dataclass(frozen=True, slots=True)
class WeightDeviation:
    """Deviation of stored weights from the original ones: two sums, so that those of several matrices can be added."""

    squared: float = 0.0  # sum of (stored - original)^2
    squared_norm: float = 0.0  # sum of original^2

    def __add__(self, other: WeightDeviation) -> WeightDeviation:
        return WeightDeviation(self.squared + other.squared, self.squared_norm + other.squared_norm)

    @property
    def relative(self) -> float:
        """Frobenius norm of the deviation, divided by that of the original weights; 0 if all original weights are 0."""
        return (self.squared / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


def layout_for(
    parameters: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    bits: Bits,
    group: int | None = None,
    pairs: str | None = None,
    transposed: bool = False,
) -> RecordLayout:
    """Return the layout of an expert's record.

    The group size of a projection is the largest supported size that is at most ``group`` and divides the number of
    columns. If there is no such size, the projection is stored with 16 bits. Parameters that are not quantised keep
    their type, except that fp32 becomes bf16.

    Args:
        parameters: a dictionary from the name of each parameter of one expert to its shape and the name of its type.
            The shape is that in the module, without the dimension of experts. A parameter with two dimensions is a
            projection; a parameter with one dimension is a bias.
        bits: bits per weight.
        group: number of weights that share a pair; None for the default of ``bits``.
        pairs: type of the pairs, one of PAIR_TYPES; None for the default of ``bits``.
        transposed: whether the module holds projections as [columns, rows].

    Raises:
        ConfigError: ``bits``, ``group`` or ``pairs`` has a value that is not supported.
        CheckpointError: the type or the shape of a parameter is not supported.
    """
    group, pairs = group_and_pairs(bits, group, pairs)
    projections, biases = [], []
    for name, (shape, dtype) in parameters.items():
        if dtype not in STORED_AS:
            raise CheckpointError(
                f"{name} has type {dtype}, which is not supported.",
                f"Convert a checkpoint whose experts have type {' or '.join(STORED_AS)}.",
            )
        if len(shape) == 1:
            biases.append(Bias(name, shape[0], STORED_AS[dtype]))
        elif len(shape) == 2:
            columns, rows = shape if transposed else shape[::-1]
            sizes = [size for size in GROUPS[pairs] if size <= group and columns % size == 0] if bits != 16 else []
            if sizes:
                projections.append(Projection(name, rows, columns, bits, dtype, transposed, max(sizes), pairs))
            else:
                projections.append(Projection(name, rows, columns, 16, STORED_AS[dtype], transposed))
        else:
            raise CheckpointError(
                f"{name} of one expert has shape {list(shape)}, which is not supported.",
                "Convert a model whose experts have parameters with one or two dimensions.",
            )
    return RecordLayout(tuple(projections), tuple(biases))


def group_and_pairs(bits: Bits, group: int | None, pairs: str | None) -> tuple[int, str]:
    """Return the group size and the type of pairs. An argument that is None is replaced by the default of ``bits``.

    With 16 bits, neither result has a meaning. Raises ConfigError if an argument has a value that is not supported.
    """
    if bits not in BITS:
        raise ConfigError(f"{bits} bits are not supported.", f"Choose among {', '.join(map(str, BITS))}.")
    default_group, default_pairs = DEFAULTS.get(bits, (0, ""))
    group, pairs = default_group if group is None else group, default_pairs if pairs is None else pairs
    if bits == 16:
        return group, pairs
    if pairs not in PAIR_TYPES:
        raise ConfigError(f"Pairs of type {pairs} are not supported.", f"Choose {' or '.join(PAIR_TYPES)}.")
    if group not in GROUPS[pairs]:
        supported = [f"{', '.join(map(str, groups))} with pairs of {name}" for name, groups in GROUPS.items()]
        raise ConfigError(
            f"Groups of {group} weights are not supported with pairs of {pairs}.",
            f"Choose among {'; or '.join(supported)}.",
        )
    return group, pairs


def sections(record: Tensor, layout: RecordLayout, of: str = "") -> dict[str, Tensor]:
    """Return a dictionary from the name of each section of a record to a tensor. The tensors are views of ``record``.

    Args:
        record: uint8 [n], aligned to 64 bytes, where n is at least ``layout.payload_bytes``.
        layout: the layout of the record.
        of: the name of a quantised projection, to get only the sections of that projection; "" for all sections.
    """
    chosen = [s for s in layout.sections if s.name.startswith(f"{of}.")] if of else layout.sections
    return {s.name: record[s.offset : s.offset + s.nbytes].view(TORCH_TYPES[s.dtype]).view(s.shape) for s in chosen}


# type of a function that quantises weights [rows, columns] into the sections of a projection; its last argument is
# ``fast``, as in ``encode``
Quantise = Callable[[Tensor, Projection, Mapping[str, Tensor], bool], WeightDeviation]


@torch.no_grad()
def encode(
    tensors: Mapping[str, Tensor | Levels],
    layout: RecordLayout,
    out: memoryview | np.ndarray,
    *,
    fast: bool = False,
    quantise: Quantise | None = None,
) -> dict[str, WeightDeviation]:
    """Encode one expert. The bytes depend only on the weights, the layout and ``fast``, not on the number of threads.

    Args:
        tensors: a dictionary from the name of each parameter of the expert to a tensor in the shape that the module
            has: [rows, columns], or [columns, rows] if the projection is transposed. A bias is [size]. A projection
            with zero points gets Levels, which are stored as they are.
        layout: the layout of the record.
        out: buffer of ``layout.record_bytes``, to which the record is written.
        fast: use plain rounding instead of HQQ.
        quantise: the function that quantises a projection; None for the function of this module, which uses torch. All
            such functions must make the same bytes.

    Returns:
        A dictionary from the name of each projection and bias to its deviation.

    Raises:
        CheckpointError: a weight that is to be quantised is not a finite number.
    """
    record = torch.frombuffer(out, dtype=torch.uint8)
    assert len(record) == layout.record_bytes, f"a record has {layout.record_bytes} bytes, not {len(record)}"
    record.zero_()
    views = sections(record, layout)
    deviations = {}
    for p in layout.projections:
        weights = tensors[p.name]
        if isinstance(weights, Levels):
            assert p.pairs in ZERO_POINTS, f"{p.name} has no zero points"
            assert weights.codes.shape == (p.rows, p.columns), f"{p.name} is {tuple(weights.codes.shape)}"
            store(weights, p, views)
            deviations[p.name] = WeightDeviation()
            continue
        assert tuple(weights.shape) == p.shape, f"{p.name} is {tuple(weights.shape)}, not {p.shape}"
        if p.bits == 16:
            deviations[p.name] = _copy(weights, views[p.name])
        else:
            deviations[p.name] = (quantise or _quantise)(weights.T if p.transposed else weights, p, views, fast)
    for b in layout.biases:
        bias = tensors[b.name]
        assert isinstance(bias, Tensor)
        deviations[b.name] = _copy(bias, views[b.name])
    return deviations


def _copy(values: Tensor, section: Tensor) -> WeightDeviation:
    section.copy_(values)
    deviation = WeightDeviation()
    for start in range(0, len(values), ROW_TILE):
        original = values[start : start + ROW_TILE].float()
        difference = section[start : start + ROW_TILE].float().sub_(original)
        deviation += WeightDeviation(_square(difference), _square(original))
    return deviation


def _square(values: Tensor) -> float:
    """Return the sum of the squares of ``values``. Squares that overflow or underflow in fp32 are added in fp64."""
    norm = float(torch.linalg.vector_norm(values))
    if not 1e-12 < norm < 1e12:
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm**2


def _quantise(weights: Tensor, p: Projection, views: Mapping[str, Tensor], fast: bool) -> WeightDeviation:
    """Quantise ``weights`` [rows, columns] into the sections of one projection, a band at a time."""
    bands = Bands(weights, p)
    # Pairs in 8 bits are quantised in runs that cross bands, so all bands are in one batch: s of all bands is stored
    # before b of the first. bf16 pairs are stored band by band.
    batches = [[band] for band in bands] if p.pairs == "bfloat16" else [list(bands)]
    # ``low`` gets the codes in kernel order. It is a section itself, or a buffer that is folded into sections at the
    # end.
    if p.bits in (3, 2):
        low = torch.empty(p.padded_rows * p.columns // 2, dtype=torch.uint8)
    else:
        low = views[f"{p.name}.low" if p.bits == 8 else f"{p.name}.codes"].view(-1)
    deviation = WeightDeviation()
    for batch in batches:
        # codes are computed with the values of s and b that are stored, as they will be read
        scales = _store(0, lambda band: hqq.scales(bands.transpose(band), p.bits), bands, batch, p, views)

        def find_offsets(band: range, scales: Mapping[range, Tensor] = scales) -> Tensor:
            w, scale = bands.transpose(band), scales[band]
            return hqq.plain_offsets(w, scale) if fast else hqq.solve(w, scale, p.bits, bands.scratch(band))

        offsets = _store(1, find_offsets, bands, batch, p, views)
        for band in batch:
            w, scale, offset = bands.transpose(band), scales[band], offsets[band]
            centred, difference, _ = bands.scratch(band)
            hqq.centred_codes(w, scale, offset, p.bits, out=centred)
            torch.addcmul(offset, centred, scale, out=difference).sub_(w)
            deviation += WeightDeviation(_square(difference), _square(w))
            # Cast to int16 first: torch's direct cast from fp32 to uint8 is six times slower than these two casts.
            codes = centred.add_(2 ** (p.bits - 1)).to(torch.int16).to(torch.uint8).view(len(band), -1, ROW_TILE)
            if band.stop * ROW_TILE > p.rows:
                codes[-1, :, p.rows % ROW_TILE :] = 0
            at = slice(band.start * p.columns * HALF, band.stop * p.columns * HALF)
            to_kernel_order(codes & 0xF, low[at])
            if p.bits == 8:
                to_kernel_order(codes >> 4, views[f"{p.name}.high"].view(-1)[at])
    if p.bits in (3, 2):
        fold(low, 2, views[f"{p.name}.codes"])
    if p.bits == 3:
        fold(low >> 2, 4, views[f"{p.name}.plane"])
    return deviation


def _store(
    which: int,
    find: Callable[[range], Tensor],
    bands: Bands,
    batch: list[range],
    p: Projection,
    views: Mapping[str, Tensor],
) -> dict[range, Tensor]:
    """Store s (if ``which`` is 0) or b (if ``which`` is 1) of all groups in a batch of bands.

    ``find`` computes the values of a band, fp32 [n, 1, ROW_TILE]. Returns a dictionary from each band to its values as
    they were stored, in the same shape. Raises CheckpointError if a value is not a finite number.
    """
    values = torch.cat([bands.by_rows(find(band)) for band in batch], 1)
    read = store_pairs(values, which, p, views, batch[0].start * ROW_TILE)
    if not read.isfinite().all():
        raise not_finite(p)
    parts = torch.split(read, [len(band) * ROW_TILE for band in batch], 1)
    return dict(zip(batch, map(bands.by_tiles, parts), strict=True))


def not_finite(p: Projection) -> CheckpointError:
    """Return the error for a projection that can't be quantised: a weight or a group's range is not a finite number."""
    return CheckpointError(
        f"{p.name} has weights that are not finite numbers, or that differ too much for one scale.",
        "Get an intact copy of the checkpoint, or convert with --bits 16, which keeps such weights as they are.",
    )


def expand(views: Mapping[str, Tensor], p: Projection, start: int, stop: int) -> Tensor:
    """Expand the codes of rows ``start`` to ``stop`` to the 4-bit codes q of torch's int4 kernel.

    ``start`` and ``stop`` are multiples of 64. ``views`` has the sections of a projection with at most 4 bits: codes
    [rows, columns / 2] with 4 bits, folded codes [n] with fewer. Returns uint8 [(stop - start) * columns / 2] in kernel
    order. With 4 bits, the result is a view of the section.
    """
    first, last = start * p.columns // 2, stop * p.columns // 2
    codes = views[f"{p.name}.codes"].view(-1)
    if p.bits == 4:
        return codes[first:last]
    nibbles = unfold(codes, 2, first, last)
    if p.bits == 3:
        nibbles |= unfold(views[f"{p.name}.plane"], 4, first, last) << 2
    return nibbles.add_(CENTRING[p.bits])


def decode(record: Tensor, layout: RecordLayout, name: str, out: Tensor) -> Tensor:
    """Dequantise the projection ``name`` of ``record`` into ``out``, and return ``out``.

    ``record`` is uint8 [record bytes]. ``out`` has the shape of the projection in the module: [rows, columns], or
    [columns, rows] if transposed. Weights are computed in fp32, or with zero points in their type, and then rounded to
    the type of ``out``.
    """
    p = next(p for p in layout.projections if p.name == name)
    assert out.shape == p.shape, f"{name} is {p.shape}, not {tuple(out.shape)}"
    views = sections(record, layout)
    if p.bits == 16:
        return out.copy_(views[name])
    by_rows = out.T if p.transposed else out
    tile = max(1, TILE_WEIGHTS // p.columns // ROW_TILE) * ROW_TILE
    decode_tile = decode_rows if p.coding else _decode
    for start in range(0, p.rows, tile):
        rows = min(tile, p.rows - start)
        by_rows[start : start + rows] = decode_tile(views, p, start, min(start + tile, p.padded_rows))[:rows]
    return out


def _decode(views: Mapping[str, Tensor], p: Projection, start: int, stop: int) -> Tensor:
    """Return the weights of rows ``start`` to ``stop``, [stop - start, columns]. Padding rows are included.

    Their type is fp32, or with zero points that of the zero points.
    """
    if p.bits == 8:
        high, low = (views[f"{p.name}.{plane}"][start:stop].view(-1) for plane in ("high", "low"))
        codes = (from_kernel_order(high, p.columns) << 4) | from_kernel_order(low, p.columns)
        centre = 128
    else:
        codes, centre = from_kernel_order(expand(views, p, start, stop), p.columns), 8
    codes = codes.view(stop - start, -1, p.group)
    if p.pairs in ZERO_POINTS:
        pairs = views[f"{p.name}.pairs"][:, start:stop]
        codes = codes - (CENTRING.get(p.bits, 0) & 0xF)  # q -> c
        return Levels(codes.view(stop - start, -1), *pairs.transpose(0, 1).unbind(2)).weights()
    # scale and offset: [rows, columns / group, 1] each
    scale, offset = load_pairs(p, views, start, stop).float().transpose(0, 1).unsqueeze(3).unbind(2)
    return codes.float().sub_(centre).mul_(scale).add_(offset).view(stop - start, -1)
