"""Attention of one new token of one sequence as compiled tasks, from the hidden state to the output projection.

With torch it takes some forty operations and calls of modules, most of which cost more than their arithmetic. What an
architecture's attention does is observed with a few trial tokens (``observe``, ``variants``). Results have the same
bits as those of the architecture's own code with the products, norms and attention of this package, which are called
one by one.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from moetier.runtime.kernels.jit.emitter import LANES
from moetier.runtime.kernels.jit.processor import this_processor
from moetier.runtime.kernels.jit.team import KernelTask, Scratch, threads_for
from moetier.runtime.kernels.products.api import CPU, FLOATS, is_readable
from moetier.runtime.kernels.products.row import ProductTasks, RowMatrix
from moetier.runtime.libraries.torch_internals import buffers_of, children_of, parameters_of
from moetier.runtime.libraries.transformers_internals import attention_of, set_attention

from .attention import NAME, SINKS, WITH_SINKS, asks_more, causal_attention, fits_sinks
from .attention_code import CONTEXT, NO_WINDOW, PLACE, AttentionContext, AttentionKernel
from .attention_piece import PIECE
from .eight_bits import SCALE_BYTES
from .growing_cache import CacheMemory, GrowingLayer, GrowingWindow, TokenPlace
from .heads import PLACE as HEADS_PLACE
from .heads import HeadsContext, heads_kernel
from .masks import band_of
from .norm import Scale, float_bits, is_quick_norm
from .paged_cache import PagedLayer

PROJECTIONS, NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
CACHES = ("cache", "past_key_values")  # names of the cache among the arguments of an attention's forward
_OBSERVED = "moetier_observed"  # name of an attention function
_scratch = Scratch()


class AttentionVariant(NamedTuple):
    """Sizes of an attention, and what it does besides products."""

    heads: int
    key_heads: int
    width: int  # of queries and keys
    values: int  # width of values
    rotated: int  # numbers of each query and key that are rotated
    angles: int  # numbers in cos and in sin: ``rotated``, or half of it if the numbers of a pair share theirs
    scaling: float
    norm: tuple[Scale, float] | None  # how queries and keys are normed, and eps; None if they are not
    has_sinks: bool

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """Numbers of all queries, keys, values, and attended values of a token."""
        return (
            self.heads * self.width,
            self.key_heads * self.width,
            self.key_heads * self.values,
            self.heads * self.values,
        )


class Token(NamedTuple):
    """Tensors that attention reads and writes for one token, other than its hidden state."""

    cos: Tensor  # of the position, [1, 1, angles]
    sin: Tensor  # [1, 1, angles]
    layer: GrowingLayer | GrowingWindow | PagedLayer  # of the cache
    room: CacheMemory  # of the layer
    place: TokenPlace  # in ``room``
    length: int  # number of tokens that are attended to, this one included
    offset: int  # positions from the beginning of a piece to the first token that is attended to
    items: int  # number of items of the attention kernel
    threads: int  # number of threads of the attention kernel

    @property
    def has_codes(self) -> bool:
        """Whether keys and values are in 8 bits."""
        return self.room.signature[0] == torch.int8


def token_of(
    module: Any,
    variant: AttentionVariant,
    x: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    **others: Any,
) -> Token | None:
    """Return what an attention reads and writes for x [1, 1, hidden]; None for inputs that it can't compute so.

    ``position_embeddings`` and what follows are arguments of the module's forward.
    """
    if (
        not isinstance(position_embeddings, tuple)
        or len(position_embeddings) != 2
        or (attention_mask is not None and band_of(attention_mask) is None)
        or asks_more(others)
        or attention_of(module.config) not in (NAME, WITH_SINKS, _OBSERVED)
        or not _fits(variant, x, *position_embeddings)
        or (layer := _layer_of(past_key_values if cache is None else cache, module.layer_idx)) is None
        or (room := layer.memory()) is None
        or room.signature not in _signatures(variant, x.dtype)
    ):
        return None
    length, offset = layer.length, layer.first_position % PIECE
    items = variant.key_heads * -(-(offset + length) // PIECE)
    threads = min(items, threads_for(variant.heads * length * (variant.width + variant.values)))
    return Token(*position_embeddings, layer, room, layer.place, length, offset, items, threads)


def _signatures(variant: AttentionVariant, dtype: torch.dtype) -> list[tuple[torch.dtype, int, int, int]]:
    """Return the signatures of memory that an attention can read: in 16 or 32 bits, and in 8."""
    heads, keys, values = variant.key_heads, variant.width, variant.values
    return [(dtype, heads, keys, values), (torch.int8, heads, keys + SCALE_BYTES, values + SCALE_BYTES)]


def _fits(variant: AttentionVariant, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        (is_readable(x) and is_readable(cos) and is_readable(sin))
        and x.dtype in FLOATS
        and x.dtype == cos.dtype == sin.dtype
        and cos.shape == sin.shape == (1, 1, variant.angles)
    )


def _layer_of(cache: Any, number: int) -> GrowingLayer | GrowingWindow | PagedLayer | None:
    """Return layer ``number`` of a cache if nothing but the layer has to be updated; else None."""
    if getattr(type(cache), "update", None) is not Cache.update or cache.offloading or number >= len(cache.layers):
        return None
    layer: Any = cache.layers[number]
    if (
        type(layer) not in (GrowingLayer, GrowingWindow, PagedLayer)
        or "update" in vars(layer)
        or "update" in vars(cache)
    ):
        return None
    return layer


class AttentionParts(NamedTuple):
    """Parts of an attention module that have numbers."""

    matrices: list[RowMatrix]  # of the projections q, k, v and o
    biases: list[Tensor | None]  # of the same
    norms: list[Any]  # of queries and keys, or none
    sinks: Tensor | None  # [heads]


class AttentionTasks:
    """Tasks that compute the attention of one token. Their contexts are made once, because that takes long."""

    @classmethod
    def of(
        cls, module: Any, variant: AttentionVariant, dtype: torch.dtype, threads: int, *, has_codes: bool = False
    ) -> AttentionTasks | None:
        """Return the tasks of a module for hidden states of ``dtype``; None if its parts don't fit.

        ``threads`` is the number of threads of the attention kernel. ``has_codes``: whether keys and values are in 8
        bits.
        """
        linears = [children_of(module)[name] for name in PROJECTIONS]
        matrices, biases = [*map(_matrix_of, linears)], [parameters_of(linear).get("bias") for linear in linears]
        norms = [part for name in NORMS if (part := children_of(module).get(name)) is not None]
        sinks: Tensor | None = parameters_of(module)[SINKS] if variant.has_sinks else None
        if (
            any(matrix is None or not matrix.is_readable(dtype) for matrix in matrices)
            or _norm_of(norms) != variant.norm
        ):
            return None
        hidden, (q, k, v, attended) = matrices[0].columns, variant.rows  # type: ignore[union-attr]
        shapes = [(q, hidden), (k, hidden), (v, hidden), (hidden, attended)]
        if [(matrix.rows, matrix.columns) for matrix in matrices] != shapes:  # type: ignore[union-attr]
            return None
        weights = [norm.weight for norm in norms]
        vectors = [(bias, rows) for bias, (rows, _) in zip(biases, shapes, strict=True) if bias is not None]
        vectors += [(weight, weight.numel()) for weight in weights]
        if sinks is not None and not (is_readable(sinks) and fits_sinks(sinks, variant.heads)):
            return None
        if any(not is_readable(vector) or (vector.dtype, vector.shape) != (dtype, (size,)) for vector, size in vectors):
            return None
        covered = [(len(weight), rows) for weight, rows in zip(weights, (q, k), strict=False)]
        if any(not size or size % LANES or rows % size for size, rows in covered):
            return None
        present: Any = matrices  # no matrix is None
        return cls(variant, dtype, threads, AttentionParts(present, biases, norms, sinks), has_codes=has_codes)

    def __init__(
        self, variant: AttentionVariant, dtype: torch.dtype, threads: int, parts: AttentionParts, *, has_codes: bool
    ) -> None:
        """Make the tasks, with parts that fit each other. The other parameters are those of ``of``."""
        matrices, biases, norms, sinks = parts
        self._variant, self._threads, self._itemsize = variant, threads, 1 if has_codes else dtype.itemsize
        self._room: CacheMemory | None = None
        self.columns, self._output = matrices[0].columns, matrices[3]
        self._memory = [torch.empty(size, dtype=dtype, device=CPU) for size in variant.rows]
        q, k, v, attended = (part.data_ptr() for part in self._memory)
        self._first, self._last = (
            ProductTasks(matrices[part], dtype, biases[part]) for part in (slice(3), slice(3, 4))
        )
        self._last.read(attended)
        for matrix, address in zip(matrices[:3], (q, k, v), strict=True):
            self._first.write(matrix, address)

        self._heads = array("q", _heads_context(variant, norms)._replace(q=q, k=k, v=v))
        self._compiled = AttentionKernel.of(
            this_processor(),
            dtype,
            variant.heads // variant.key_heads,
            (variant.width, variant.values),
            None if sinks is None else sinks.dtype,
            has_codes=has_codes,
        )
        self._finished = array("q", bytes(8 * variant.key_heads))
        given = _attention_context(variant, self._compiled, sinks)._replace(queries=q, out=attended)
        self._attention = array("q", (*given, *self._finished))
        scale = None if variant.norm is None else variant.norm[0]
        self.tasks = [
            *self._first.tasks,
            KernelTask(heads_kernel(dtype, scale, has_codes=has_codes), self._heads, 1),
            KernelTask(self._compiled.kernel, self._attention, threads),
            *self._last.tasks,
        ]

    def bind(self, x: int, y: int) -> None:
        """Set the addresses of the hidden state ``x`` and of the output ``y``."""
        self._first.read(x)
        self._last.write(self._output, y)

    def at(self, token: Token) -> None:
        """Write a token's addresses and positions into the contexts of the tasks. Call this before each run."""
        heads, attention, size, end = self._heads, self._attention, self._itemsize, token.offset + token.length
        heads[HEADS_PLACE["cos"]], heads[HEADS_PLACE["sin"]] = token.cos.data_ptr(), token.sin.data_ptr()
        strides, place = token.room.strides, token.place
        if token.room is not self._room:
            self._room = token.room
            heads[HEADS_PLACE["key_stride"]], heads[HEADS_PLACE["value_stride"]] = size * strides[1], size * strides[4]
            attention[PLACE["key_head"] : PLACE["key_head"] + 4] = array("q", (*strides[1:3], *strides[4:]))
        for number, (begin, stride) in enumerate(zip(token.room.addresses, strides[2::3], strict=True)):
            attention[PLACE["keys"] + number] = begin + size * (place.first - token.offset) * stride
            heads[HEADS_PLACE["key_place"] + number] = begin + size * place.new * stride
        attention[PLACE["pages"]], attention[PLACE["page_bits"]] = place.pages, place.page_bits
        own = self._threads * self._compiled.thread_bytes
        nbytes = own + token.items * self._compiled.item_bytes
        scratch = _scratch.take(nbytes, spare=nbytes // 4)
        attention[PLACE["scratch"]], attention[PLACE["results"]] = scratch, scratch + own
        attention[PLACE["threads"]], attention[PLACE["items"]] = 0, token.items
        attention[PLACE["first"]], attention[PLACE["end"]] = token.offset, end
        attention[PLACE["spans"]] = token.items // self._variant.key_heads
        attention[CONTEXT:] = self._finished


def _heads_context(variant: AttentionVariant, norms: list[Any]) -> HeadsContext:
    """Return the context of HEADS, which still lacks addresses of q, k and v, and what depends on a token."""
    q_weight, k_weight = (norm.weight.data_ptr() for norm in norms) if norms else (0, 0)
    q_columns, k_columns = (norm.weight.numel() for norm in norms) if norms else (variant.width, variant.width)
    return HeadsContext(
        heads=variant.heads,
        key_heads=variant.key_heads,
        key_width=variant.width,
        value_width=variant.values,
        rotated=variant.rotated,
        q_weight=q_weight,
        k_weight=k_weight,
        q_columns=q_columns,
        k_columns=k_columns,
        eps=float_bits(0.0 if variant.norm is None else variant.norm[1]),
        apart=variant.rotated // 2 if variant.angles == variant.rotated else 0,
    )


def _attention_context(variant: AttentionVariant, compiled: AttentionKernel, sinks: Tensor | None) -> AttentionContext:
    """Return the context of ATTEND, which still lacks addresses of queries and output, and what depends on a token."""
    return AttentionContext(
        key_heads=variant.key_heads,
        share=variant.heads // variant.key_heads,
        tokens=1,
        strip=1,
        window=NO_WINDOW,
        key_width=variant.width,
        value_width=variant.values,
        query_head=variant.width,
        thread_bytes=compiled.thread_bytes,
        item_bytes=compiled.item_bytes,
        scaling=float_bits(variant.scaling),
        sinks=0 if sinks is None else sinks.data_ptr(),
    )


def _matrix_of(module: Any) -> RowMatrix | None:
    """Return the matrix of a linear module for products with single rows; None if it has none, or an outdated one."""
    is_plain = type(module) is nn.Linear
    stored = parameters_of(module).get("weight") if is_plain else buffers_of(module).get("record")
    matrix: RowMatrix | None = vars(stored if is_plain else module).get("matrix") if stored is not None else None
    return matrix if matrix is not None and matrix.weight is stored else None


def _norm_of(norms: list[Any]) -> Any:
    """Return how norms of queries and keys multiply, and eps; None if there are no norms, "other" if they differ."""
    if not norms:
        return None
    ways = {is_quick_norm(norm) and (norm.quick_scale, getattr(norm, norm.quick_eps)) for norm in norms}
    return ways.pop() if len(ways) == 1 and len(norms) == 2 else "other"


# -- what an attention does --------------------------------------------------------------------------------------------


def is_attention(module: Any) -> bool:
    """Return whether a module may be an attention with a AttentionVariant, judged by its parts.

    Other parts with tensors are refused: an extra tensor, such as a factor of 1, might have no effect in the trial.
    """
    others = [
        part for name, part in children_of(module).items() if name not in (*PROJECTIONS, *NORMS) and part is not None
    ]
    return (
        children_of(module).keys() >= {*PROJECTIONS}
        and hasattr(module, "layer_idx")
        and hasattr(module, "config")
        and not buffers_of(module)
        and parameters_of(module).keys() <= {SINKS}
        and not any(part.state_dict() for part in others)
    )


def observe(module: Any) -> None:
    """Let ``variants`` see what an attention computes from now on. Its configuration is replaced by a copy."""
    AttentionInterface.register(_OBSERVED, _observed)
    module.__dict__["config"] = config = copy.copy(module.config)
    set_attention(config, _OBSERVED)


def _observed(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any) -> Any:
    vars(module)["seen"] = {**named, "mask": mask}, query.shape, key.shape, value.shape
    return causal_attention(module, query, key, value, mask, **named)


def variants(module: Any, angles: int) -> Iterator[AttentionVariant]:
    """Yield the variants that an attention may have by what it computed last since ``observe``.

    ``angles`` is the number of numbers in cos and in sin.
    """
    named, query, key, value = vars(module)["seen"]
    norm = _norm_of([part for name in NORMS if (part := children_of(module).get(name)) is not None])
    scaling, sinks = named.get("scaling"), named.get("s_aux")
    widths = (query[3], value[3])
    if asks_more(named, {"scaling", "s_aux"}) or query[0] != 1 or norm is False or norm == "other":
        return
    if query[1] % key[1] or any(width % LANES for width in widths):
        return
    if sinks is not parameters_of(module).get(SINKS):
        return
    for rotated in (angles, 2 * angles):
        if rotated <= query[3] and rotated % (2 * LANES) == 0:
            sizes = (query[1], key[1], *widths, rotated, angles)
            yield AttentionVariant(*sizes, query[3] ** -0.5 if scaling is None else scaling, norm, sinks is not None)
