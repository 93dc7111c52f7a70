"""Kernels in Triton that compute a block's experts from records in slots, in two launches for a few tokens.

A table on the device has the address of each expert's record, or 0 for records that are not there yet. A *pair* is a
token and one of its experts. ``_gate_up`` computes the first product and the activation of all pairs whose records are
there, and ``_down`` the second product, its weights and each token's sum. Weights are decoded in registers; no decoded
matrix is in memory. Records are used as they lie (``tiers/layout.py``): codes of 4 bits in kernel order with their
pairs or zero points, and matrices of 16 bits.

*These kernels have never run on a GPU.* The tests run them in Triton's interpreter, on tensors of a CPU.

Each program computes 64 rows of a matrix for the pairs of one *tile*: one pair, or up to TILE pairs of one expert,
whose products are ``tl.dot``. Sums are in fp32, and their order depends on shapes only, so a result does not depend on
the order in which records come. With tiles, a third launch adds up the outputs: a prompt has few launches anyway.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.tiers.layout import PAIR_RUN, ROW_TILE, ZERO_POINTS, RecordLayout

TILE = 16  # pairs of a tile, and the number of tokens from which on tiles are used: the least that ``tl.dot`` takes
COLUMNS = 64  # most columns that a program multiplies at a time
TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32, "uint8": tl.uint8}

_ROWS = tl.constexpr(ROW_TILE)
_HALF = tl.constexpr(ROW_TILE // 2)
_RUN = tl.constexpr(PAIR_RUN)


class _Matrix(NamedTuple):
    """A projection of a record: a constant of a kernel. Offsets are in bytes from the start of the record."""

    rows: int
    padded_rows: int
    columns: int
    step: int  # columns that are multiplied at a time: all of one group
    codes: int  # offset of the codes, or of the weights of 16 bits
    dtype: Any  # of the pairs, or of the weights of 16 bits
    bias: int  # offset of the bias, or -1
    bias_dtype: Any
    row_stride: int  # of weights of 16 bits
    column_stride: int
    group: int  # 0: the weights have 16 bits
    pairs: int  # offset of the pairs
    runs: int  # offset of the scales of pairs in 8 bits, or -1
    has_zeros: bool  # whether pairs are (s, z), not (s, b)

    @classmethod
    def of(cls, layout: RecordLayout, name: str) -> _Matrix:
        p, sections = layout.projection(name), {section.name: section for section in layout.sections}
        bias, runs = sections.get(f"{name}_bias"), sections.get(f"{name}.pair_scales")
        is_coded = p.bits == 4
        return cls(
            rows=p.rows,
            padded_rows=p.padded_rows,
            columns=p.columns,
            step=min(p.group, COLUMNS) if is_coded else COLUMNS,
            codes=sections[f"{name}.codes" if is_coded else name].offset,
            dtype=TYPES[ZERO_POINTS.get(p.pairs, p.pairs) if is_coded else p.dtype],
            bias=-1 if bias is None else bias.offset,
            bias_dtype=None if bias is None else TYPES[bias.dtype],
            row_stride=1 if p.transposed else p.columns,
            column_stride=p.rows if p.transposed else 1,
            group=p.group,
            pairs=sections[f"{name}.pairs"].offset if is_coded else -1,
            runs=-1 if runs is None else runs.offset,
            has_zeros=p.pairs in ZERO_POINTS,
        )


class _Activation(NamedTuple):
    """The fields of ``Activation``, and the number of its results: a constant of a kernel."""

    inner: int
    function: str
    interleaved: bool
    alpha: float
    limit: float  # 0: no limit
    shift: float
    gated: bool

    @classmethod
    def of(cls, activation: Activation, inner: int) -> _Activation:
        a = activation
        limit = 0.0 if math.isinf(a.limit) else a.limit
        return cls(inner, a.function, a.interleaved, a.alpha, limit, a.shift, a.gated)


@triton.jit
def _weights(record, row, inside, first, matrix: tl.constexpr):
    """Decode the weights of R rows of a matrix in its columns ``first`` to before ``first`` + step: fp32 [step, R].

    ``row`` [R] has the rows' numbers. ``inside`` [R] says which of the rows are read; the results of others mean
    nothing.
    """
    column = first + tl.arange(0, matrix.step)
    codes = record + matrix.codes
    if matrix.group == 0:
        at = row[None, :] * matrix.row_stride + column[:, None] * matrix.column_stride
        mask = inside[None, :] & (column < matrix.columns)[:, None]
        weights = tl.load(codes.to(tl.pointer_type(matrix.dtype)) + at, mask=mask, other=0.0).to(tl.float32)
    else:
        at = (row // _ROWS * (_HALF * matrix.columns) + row % _HALF)[None, :] + column[:, None] * _HALF
        packed = tl.load(codes + at, mask=inside[None, :], other=0).to(tl.int32)
        code = (packed >> (row % _ROWS // _HALF * 4)[None, :]) & 15
        scale, offset = _pairs(record, first // matrix.group * matrix.padded_rows + row, inside, matrix)
        # the bits of 2^23 + code are those of 2^23 plus code: GPUs convert integers at a quarter of the rate of sums
        number = (code | 0x4B000000).to(tl.float32, bitcast=True)
        if matrix.has_zeros:  # each operation is rounded to the type of the pair, as the checkpoint's format says
            weights = (number - 8388608.0 - offset[None, :]).to(matrix.dtype).to(tl.float32) * scale[None, :]
            weights = weights.to(matrix.dtype).to(tl.float32)
        else:
            weights = (number - 8388616.0) * scale[None, :] + offset[None, :]
    return weights


@triton.jit
def _pairs(record, number, inside, matrix: tl.constexpr):
    """Load pairs by their ``number`` [R], where ``inside`` [R]: the scale and the offset or zero point, fp32 [R]."""
    pairs = record + matrix.pairs
    if matrix.runs >= 0:  # each value is code * scale + minimum, rounded to bf16 (``tiers/quant/packing.py``)
        run = (record + matrix.runs).to(tl.pointer_type(tl.bfloat16)) + number // _RUN * 4
        code = tl.load(pairs + 2 * number, mask=inside, other=0).to(tl.float32)
        scale = code * tl.load(run, mask=inside, other=0.0) + tl.load(run + 1, mask=inside, other=0.0)
        code = tl.load(pairs + 2 * number + 1, mask=inside, other=0).to(tl.float32)
        offset = code * tl.load(run + 2, mask=inside, other=0.0) + tl.load(run + 3, mask=inside, other=0.0)
        scale, offset = scale.to(tl.bfloat16).to(tl.float32), offset.to(tl.bfloat16).to(tl.float32)
    elif matrix.dtype is tl.bfloat16:  # a word holds a pair, the scale in its lower half; bf16 is a half of fp32
        word = tl.load(pairs.to(tl.pointer_type(tl.uint32)) + number, mask=inside, other=0)
        scale, offset = (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        at = pairs.to(tl.pointer_type(matrix.dtype)) + 2 * number
        scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    return scale, offset


@triton.jit
def _product(record, x, present, row, inside, TOKENS: tl.constexpr, matrix: tl.constexpr):
    """Multiply ``row`` [R], where ``inside`` [R], and add the bias: fp32 [TOKENS, R].

    ``x`` [TOKENS] points to the numbers of each token; ``present`` [TOKENS] says which tokens there are.
    """
    sums = tl.zeros((matrix.step if TOKENS == 1 else TOKENS, _ROWS), tl.float32)
    for first in range(0, matrix.columns, matrix.step):
        weights = _weights(record, row, inside, first, matrix)
        column = first + tl.arange(0, matrix.step)
        mask = present[:, None] & (column < matrix.columns)[None, :]
        numbers = tl.load(x[:, None] + column[None, :], mask=mask, other=0.0)  # [TOKENS, step]
        if TOKENS == 1:
            sums += weights * tl.trans(numbers).to(tl.float32)
        else:
            sums = tl.dot(numbers, weights.to(numbers.dtype), sums, input_precision="ieee")
    result = tl.sum(sums, axis=0)[None, :] if TOKENS == 1 else sums
    if matrix.bias >= 0:
        bias = (record + matrix.bias).to(tl.pointer_type(matrix.bias_dtype))
        result += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def _activate(x, activation: tl.constexpr):
    """Apply the function of an activation to fp32 numbers."""
    if activation.function == "silu":
        result = x * tl.sigmoid(activation.alpha * x)
    elif activation.function == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation.function == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        result = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return result


@triton.jit
def _tile(index, table, experts, order, firsts, counts, TOKENS: tl.constexpr):
    """Return the record's address of the program's tile, its pairs [TOKENS], and which of them there are.

    The address is 0 if the record is not there, or if there is no such expert: with expert parallelism it belongs to
    another device.
    """
    tile = tl.program_id(1)
    if TOKENS == 1:
        pairs, present = tile + tl.arange(0, 1), tl.full((1,), 1, tl.int1)
        expert = tl.load(index + tile)
        is_known = (expert >= 0) & (expert < experts)
    else:
        order += tl.load(firsts + tile)
        count = tl.load(counts + tile)
        present = tl.arange(0, TOKENS) < count
        pairs = tl.load(order + tl.arange(0, TOKENS), mask=present, other=0)
        expert = tl.load(index + tl.load(order))
        is_known = count > 0
    return tl.load(table + expert, mask=is_known, other=0), pairs, present


@triton.jit
def _gate_up(
    x, index, table, experts, order, firsts, counts, activations, TOP_K: tl.constexpr, TOKENS: tl.constexpr,
    activation: tl.constexpr, matrix: tl.constexpr,
):  # fmt: skip
    """Compute ``activations`` [pairs, inner] of x [tokens, columns], of the pairs whose records are there."""
    address, pairs, present = _tile(index, table, experts, order, firsts, counts, TOKENS)
    if address != 0:
        record = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 64)  # slots and sections are aligned so
        tokens = x + pairs // TOP_K * matrix.columns
        number = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
        inside = number < activation.inner
        gate = 2 * number if activation.interleaved else number
        result = _product(record, tokens, present, gate, inside, TOKENS, matrix)
        if activation.gated:
            up = 2 * number + 1 if activation.interleaved else activation.inner + number
            factor = _product(record, tokens, present, up, inside, TOKENS, matrix)
            if activation.limit > 0:
                result = tl.minimum(result, activation.limit)
                factor = tl.minimum(tl.maximum(factor, -activation.limit), activation.limit)
            result = _activate(result, activation) * (factor + activation.shift)
        else:
            result = _activate(result, activation)
        at = activations + pairs[:, None] * activation.inner + number[None, :]
        tl.store(at, result, mask=present[:, None] & inside[None, :])


@triton.jit
def _down(
    activations, weights, index, table, experts, order, firsts, counts, outputs, arrived, out, TOP_K: tl.constexpr,
    TOKENS: tl.constexpr, matrix: tl.constexpr,
):  # fmt: skip
    """Compute ``outputs`` fp32 [pairs, rows], times ``weights`` [pairs], of the pairs whose records are there.

    Without tiles, also compute ``out`` [tokens, rows], the sums of the outputs so far. ``arrived`` int32 [tokens,
    programs of a pair] is 0 before and after. It counts a token's pairs: the program that comes last adds up their
    outputs, in the order of the pairs.
    """
    address, pairs, present = _tile(index, table, experts, order, firsts, counts, TOKENS)
    row = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    inside = row < matrix.rows
    if address != 0:
        record = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 64)
        result = _product(record, activations + pairs * matrix.columns, present, row, inside, TOKENS, matrix)
        result *= tl.load(weights + pairs, mask=present, other=0.0).to(tl.float32)[:, None]
        at = outputs + pairs[:, None] * matrix.rows + row[None, :]
        tl.store(at, result, mask=present[:, None] & inside[None, :])
    if TOKENS == 1:
        token = tl.program_id(1) // TOP_K
        counter = arrived + token * tl.num_programs(0) + tl.program_id(0)
        tl.debug_barrier()  # all threads of the program have stored their outputs
        if tl.atomic_add(counter, 1) == TOP_K - 1:  # acquires and releases, so outputs of other programs are seen
            total = tl.zeros((_ROWS,), tl.float32)
            for place in range(TOP_K):
                total += tl.load(outputs + (token * TOP_K + place) * matrix.rows + row, mask=inside, other=0.0)
            tl.store(out + token * matrix.rows + row, total, mask=inside)
            tl.store(counter, 0)


class _Tiles(NamedTuple):
    """Pairs of a token and one of its experts, sorted by expert and cut into tiles of one expert each."""

    order: Tensor  # int64 [pairs], the pairs in ascending order of experts
    firsts: Tensor  # int64 [tiles], the place in ``order`` of each tile's first pair
    counts: Tensor  # int64 [tiles], the number of pairs of each tile; 0 for tiles that are not needed


def _tiles(index: Tensor, experts: int) -> _Tiles:
    """Divide the pairs of ``index`` [tokens, top_k] into tiles of at most TILE, each of one expert.

    The host does not wait for the device. Experts of ``experts`` or more get no tile.
    """
    chosen = index.reshape(-1).clamp(max=experts)
    order = torch.argsort(chosen, stable=True)
    counts = chosen.new_zeros(experts + 1).index_add_(0, chosen, torch.ones_like(chosen))[:-1]
    starts, tiles = counts.cumsum(0) - counts, (counts + (TILE - 1)) // TILE
    ends = tiles.cumsum(0)
    most = -(-len(chosen) // TILE) + min(experts, len(chosen))
    tile = torch.arange(most, device=index.device)
    expert = torch.bucketize(tile, ends, right=True).clamp(max=experts - 1)
    within = (tile - (ends - tiles)[expert]) * TILE
    left = (counts[expert] - within).clamp(0, TILE)
    return _Tiles(order, (starts[expert] + within).clamp(max=len(chosen) - 1), left)


class SlotExperts:
    """Kernels for a block's experts, whose records are in slots of one layout.

    All work is queued on the current stream, and the host waits for nothing.
    """

    def __init__(self, layout: RecordLayout, activation: Activation, experts: int) -> None:
        """``experts``: the number of the block's experts. ``slots.can_compute(layout)`` must be true."""
        self.experts = experts
        self.first = _Matrix.of(layout, "gate_up_proj" if activation.gated else "up_proj")
        self.second = _Matrix.of(layout, "down_proj")
        self.activation = _Activation.of(activation, self.second.columns)

    def begin(self, x: Tensor, index: Tensor, weights: Tensor) -> SlotSums:
        """Begin to compute a block; ``SlotSums.add`` computes experts.

        Args:
            x: [tokens, hidden], contiguous.
            index: int64 [tokens, top_k], contiguous: the experts that each token uses.
            weights: [tokens, top_k], contiguous.
        """
        return SlotSums(self, x, index, weights)


class SlotSums:
    """The outputs of a block's experts, which are added up for each token."""

    def __init__(self, kernels: SlotExperts, x: Tensor, index: Tensor, weights: Tensor) -> None:
        tokens, pairs, hidden = len(index), index.numel(), kernels.second.rows
        inner, self._is_tiled, programs = kernels.second.columns, tokens >= TILE, -(-hidden // ROW_TILE)
        self._kernels, self._x, self._index, self._weights = kernels, x, index, weights
        self._tiles = _tiles(index, kernels.experts) if self._is_tiled else _Tiles(index, index, index)
        # more exact than x with single tokens, whose products take any type
        self._activations = x.new_empty((pairs, inner), dtype=x.dtype if self._is_tiled else torch.float32)
        counters = 0 if self._is_tiled else tokens * programs
        zeros = torch.zeros(pairs * hidden + counters, device=x.device)
        self._outputs, self._arrived = zeros[: pairs * hidden], zeros[pairs * hidden :].view(torch.int32)
        self._out = torch.empty_like(x)

    def add(self, table: Tensor) -> None:
        """Compute the experts whose records are there, for all their tokens.

        Args:
            table: int64 [experts], the address of each expert's record, or 0. Other calls have other experts.
        """
        kernels, top_k, tiles = self._kernels, self._index.shape[1], self._tiles
        among = (self._index, table, kernels.experts, *tiles)
        count, size = (len(tiles.counts), TILE) if self._is_tiled else (self._index.numel(), 1)
        _gate_up[-(-kernels.second.columns // ROW_TILE), count](
            self._x, *among, self._activations, TOP_K=top_k, TOKENS=size, activation=kernels.activation,
            matrix=kernels.first,
        )  # fmt: skip
        _down[-(-kernels.second.rows // ROW_TILE), count](
            self._activations, self._weights, *among, self._outputs, self._arrived, self._out, TOP_K=top_k,
            TOKENS=size, matrix=kernels.second,
        )  # fmt: skip

    def result(self) -> Tensor:
        """Return each token's sum of the outputs of all experts that were added: [tokens, hidden] in the type of x.

        At least one call of ``add`` comes before.
        """
        if self._is_tiled:
            return self._outputs.view(*self._index.shape, -1).sum(1).to(self._x.dtype)
        return self._out
