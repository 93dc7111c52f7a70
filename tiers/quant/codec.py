"""Codec: encodes the weights of one expert as the bytes of its record, and decodes them.

A quantised weight is w = (c - 2^(bits-1)) * s + b, where c is its code of ``bits`` bits and (s, b) is the bf16 pair of
its group. It is computed in fp32, where the product is exact and the sum is rounded once, and then rounded to the
requested type. ``decode`` does this. All other code that dequantises weights must give the same result, bit for bit.

Torch's int4 kernel computes w = (q - 8) * s + b with q from 0 to 15. Codes of each width are expanded to q:

    4 bits   q = c
    3 bits   q = c + 4; the two low bits of c are stored folded in 2 parts, the third bit is a plane folded in 4 parts
    2 bits   q = c + 6; c is stored folded in 2 parts (``packing`` explains folding)
    8 bits   w is a sum of two matrices: high nibbles q = c >> 4 with pairs (16 s, b), low ones q = c & 15 with (s, 8 s)

So b is the same number for each width. It is near the middle of its group's range, where rounding to bf16 costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moetier.tiers.errors import CheckpointError, ConfigError
from moetier.tiers.layout import BITS, GROUPS, PAIR_TYPES, ROW_TILE, Bias, Bits, Projection, RecordLayout

from . import hqq
from .packing import HALF, Bands, fold, from_kernel_order, load_pairs, store_pairs, to_kernel_order, unfold

# Default group size and type of pairs of each width: those with the best perplexity per stored byte on a real model
# (docs/quality.md), except that 8 and 4 bits have bf16 pairs, so that torch's int4 kernel can multiply a record in
# place.
DEFAULTS: dict[Bits, tuple[int, str]] = {
    8: (64, "bfloat16"),
    4: (64, "bfloat16"),
    3: (64, "uint8"),
    2: (32, "uint8"),
}
STORED_AS = {"bfloat16": "bfloat16", "float16": "float16", "float32": "bfloat16"}
TORCH_TYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float16": torch.float16}
CENTRING = {4: 0, 3: 0x44, 2: 0x66}  # by bits: what ``expand`` adds to both nibbles of a byte to get q from c
TILE_WEIGHTS = 2**19  # number of weights decoded at a time: 2 MiB in fp32


@dataclass(frozen=True, slots=True)
class WeightError:
    """Error of stored weights. It consists of sums over weights, so errors of several matrices can be added."""

    squared: float = 0.0  # sum of (stored - original)^2
    squared_norm: float = 0.0  # sum of original^2

    def __add__(self, other: WeightError) -> WeightError:
        return WeightError(self.squared + other.squared, self.squared_norm + other.squared_norm)

    @property
    def relative(self) -> float:
        """Frobenius norm of the error divided by the norm of the original weights; 0 if all weights are 0."""
        return (self.squared / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


def layout_for(
    parameters: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    bits: Bits,
    group: int | None = None,
    pairs: str | None = None,
    transposed: bool = False,
) -> RecordLayout:
    """Plan the layout of an expert's record.

    A projection's group size is the largest supported one up to ``group`` that divides its number of columns. If there
    is none, the projection stays at 16 bits. Parameters that are not quantised keep their type, except that fp32
    becomes bf16.

    Args:
        parameters: shape and dtype name of each parameter of one expert, by name. The shape is that in the module,
            without the dimension of experts. A parameter with two dimensions is a projection, one with one is a bias.
        bits: bits per weight.
        group: number of weights that share a pair; None for the default of ``bits``.
        pairs: type of the pairs; None for the default of ``bits``.
        transposed: whether the module holds projections as [columns, rows].

    Raises:
        ConfigError: the settings are not supported.
        CheckpointError: a parameter can't be stored.
    """
    group, pairs = group_and_pairs(bits, group, pairs)
    projections, biases = [], []
    for name, (shape, dtype) in parameters.items():
        if dtype not in STORED_AS:
            raise CheckpointError(f"{name} has type {dtype}.", f"moetier stores {', '.join(STORED_AS)}.")
        if len(shape) == 1:
            biases.append(Bias(name, shape[0], STORED_AS[dtype]))
        elif len(shape) == 2:
            columns, rows = shape if transposed else shape[::-1]
            groups = [each for each in GROUPS[pairs] if each <= group and columns % each == 0] if bits != 16 else []
            if groups:
                projections.append(Projection(name, rows, columns, bits, dtype, transposed, max(groups), pairs))
            else:
                projections.append(Projection(name, rows, columns, 16, STORED_AS[dtype], transposed))
        else:
            raise CheckpointError(
                f"{name} of one expert has shape {list(shape)}.", "One or two dimensions can be stored."
            )
    return RecordLayout(tuple(projections), tuple(biases))


def group_and_pairs(bits: Bits, group: int | None, pairs: str | None) -> tuple[int, str]:
    """Return group size and type of pairs, with the defaults of ``bits`` for those that are None.

    At 16 bits neither has a meaning. Raises ConfigError for settings that are not supported.
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
        known = [f"{', '.join(map(str, groups))} with pairs of {name}" for name, groups in GROUPS.items()]
        raise ConfigError(
            f"Groups of {group} weights are not supported with {pairs} pairs.", f"Choose among {'; or '.join(known)}."
        )
    return group, pairs


def sections(record: Tensor, layout: RecordLayout, of: str = "") -> dict[str, Tensor]:
    """Return views of a record's sections by name, in their types and shapes. Nothing is copied.

    ``record`` is uint8 [n], with n at least payload_bytes, and aligned to 64 bytes. ``of`` is the name of a quantised
    projection; if it is given, only the sections of that projection are returned.
    """
    wanted = [s for s in layout.sections if s.name.startswith(f"{of}.")] if of else layout.sections
    return {s.name: record[s.offset : s.offset + s.nbytes].view(TORCH_TYPES[s.dtype]).view(s.shape) for s in wanted}


# quantises weights [rows, columns] into the sections of a projection; the last argument is ``fast``
Quantise = Callable[[Tensor, Projection, Mapping[str, Tensor], bool], WeightError]


@torch.no_grad()
def encode(
    tensors: Mapping[str, Tensor],
    layout: RecordLayout,
    out: memoryview | np.ndarray,
    *,
    fast: bool = False,
    quantise: Quantise | None = None,
) -> dict[str, WeightError]:
    """Encode one expert. The bytes depend only on the weights, the layout and ``fast``, not on the number of threads.

    Args:
        tensors: the expert's parameters by name, in the module's shapes: [rows, columns], or [columns, rows] if
            transposed; a bias is [size].
        layout: the layout of the record.
        out: buffer of record_bytes, to which the record is written.
        fast: use plain rounding instead of HQQ.
        quantise: what quantises a projection; None for torch. All that do must make the same bytes.

    Returns:
        The error of each projection and bias, by name.

    Raises:
        CheckpointError: weights that are to be quantised are not finite.
    """
    record = torch.frombuffer(out, dtype=torch.uint8)
    assert len(record) == layout.record_bytes, f"a record has {layout.record_bytes} bytes, not {len(record)}"
    record.zero_()
    views = sections(record, layout)
    errors = {}
    for p in layout.projections:
        weights = tensors[p.name]
        assert tuple(weights.shape) == p.shape, f"{p.name} is {tuple(weights.shape)}, not {p.shape}"
        if p.bits == 16:
            errors[p.name] = _copy(weights, views[p.name])
        else:
            errors[p.name] = (quantise or _quantise)(weights.T if p.transposed else weights, p, views, fast)
    for b in layout.biases:
        errors[b.name] = _copy(tensors[b.name], views[b.name])
    return errors


def _copy(values: Tensor, section: Tensor) -> WeightError:
    section.copy_(values)
    error = WeightError()
    for start in range(0, len(values), ROW_TILE):
        original = values[start : start + ROW_TILE].float()
        difference = section[start : start + ROW_TILE].float().sub_(original)
        error += WeightError(_square(difference), _square(original))
    return error


def _square(values: Tensor) -> float:
    """Return the sum of squares. It is computed in fp32 unless the squares may overflow or underflow there."""
    norm = float(torch.linalg.vector_norm(values))
    if not 1e-12 < norm < 1e12:
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm**2


def _quantise(weights: Tensor, p: Projection, views: Mapping[str, Tensor], fast: bool) -> WeightError:
    """Quantise ``weights`` [rows, columns] into the sections of one projection, a band at a time."""
    bands = Bands(weights, p)
    # 8-bit pairs are quantised in runs that cross bands, so each pass covers all bands before the next one begins.
    batches = [[band] for band in bands] if p.pairs == "bfloat16" else [list(bands)]
    # ``low`` gets the codes in kernel order: a section itself, or a buffer that is folded into the sections at the end.
    if p.bits in (3, 2):
        low = torch.empty(p.padded_rows * p.columns // 2, dtype=torch.uint8)
    else:
        low = views[f"{p.name}.low" if p.bits == 8 else f"{p.name}.codes"].view(-1)
    error = WeightError()
    for batch in batches:
        # compute with the stored values, as they will be read
        steps = _store(0, lambda band: hqq.steps(bands.transpose(band), p.bits), bands, batch, p, views)

        def find_offsets(band: range, steps: Mapping[range, Tensor] = steps) -> Tensor:
            w, step = bands.transpose(band), steps[band]
            return hqq.plain_offsets(w, step) if fast else hqq.solve(w, step, p.bits, bands.scratch(band))

        offsets = _store(1, find_offsets, bands, batch, p, views)
        for band in batch:
            w, step, offset = bands.transpose(band), steps[band], offsets[band]
            centred, difference, _ = bands.scratch(band)
            hqq.centred_codes(w, step, offset, p.bits, out=centred)
            error += WeightError(_square(torch.addcmul(offset, centred, step, out=difference).sub_(w)), _square(w))
            # Cast to int16 first: torch's direct cast from fp32 to uint8 is six times slower than these two.
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
    return error


def _store(
    which: int,
    find: Callable[[range], Tensor],
    bands: Bands,
    batch: list[range],
    p: Projection,
    views: Mapping[str, Tensor],
) -> dict[range, Tensor]:
    """Store s (``which`` 0) or b (``which`` 1) of a batch of bands.

    ``find`` computes the values of a band, fp32 [n, 1, ROW_TILE]. Returns them by band as they were stored, with the
    same shape. Raises CheckpointError if some are not finite.
    """
    found = torch.cat([bands.by_rows(find(band)) for band in batch], 1)
    read = store_pairs(found, which, p, views, batch[0].start * ROW_TILE)
    if not read.isfinite().all():
        raise not_finite(p)
    parts = torch.split(read, [len(band) * ROW_TILE for band in batch], 1)
    return dict(zip(batch, map(bands.by_blocks, parts), strict=True))


def not_finite(p: Projection) -> CheckpointError:
    """Return the error for weights that can't be quantised, as they or their range are not finite numbers."""
    return CheckpointError(
        f"{p.name} has weights that are not finite numbers.",
        "Get an intact copy of the checkpoint; 16 bits would keep such weights as they are.",
    )


def expand(views: Mapping[str, Tensor], p: Projection, start: int, stop: int) -> Tensor:
    """Expand the codes of rows ``start`` to ``stop`` (multiples of 64) to the 4-bit codes q of torch's int4 kernel.

    ``views`` has the sections of a projection of at most 4 bits: codes [rows, columns / 2] at 4 bits, folded [n] at
    fewer. Returns uint8 [(stop - start) * columns / 2] in kernel order; at 4 bits it is a view.
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

    ``record`` is uint8 [record bytes]. ``out`` has the module's shape: [rows, columns], or [columns, rows] if
    transposed. Weights are computed in fp32, tile by tile, and rounded to the type of ``out``.
    """
    p = next(p for p in layout.projections if p.name == name)
    assert out.shape == p.shape, f"{name} is {p.shape}, not {tuple(out.shape)}"
    views = sections(record, layout)
    if p.bits == 16:
        return out.copy_(views[name])
    by_rows = out.T if p.transposed else out
    tile = max(1, TILE_WEIGHTS // p.columns // ROW_TILE) * ROW_TILE
    for start in range(0, p.rows, tile):
        rows = min(tile, p.rows - start)
        by_rows[start : start + rows] = _decode(views, p, start, min(start + tile, p.padded_rows))[:rows]
    return out


def _decode(views: Mapping[str, Tensor], p: Projection, start: int, stop: int) -> Tensor:
    """Dequantise rows ``start`` to ``stop``, padding rows included: fp32 [stop - start, columns]."""
    if p.bits == 8:
        high, low = (views[f"{p.name}.{plane}"][start:stop].view(-1) for plane in ("high", "low"))
        codes = (from_kernel_order(high, p.columns) << 4) | from_kernel_order(low, p.columns)
        centre = 128
    else:
        codes, centre = from_kernel_order(expand(views, p, start, stop), p.columns), 8
    # step and offset: [rows, columns / group, 1] each
    step, offset = load_pairs(p, views, start, stop).float().transpose(0, 1).unsqueeze(3).unbind(2)
    w = codes.view(stop - start, -1, p.group).float()
    return w.sub_(centre).mul_(step).add_(offset).view(stop - start, -1)
