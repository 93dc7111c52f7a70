"""Attention of one new token of one sequence in one call, from the hidden state to the output projection.

With torch it takes some forty operations and calls of modules, most of which cost more than their arithmetic. Whether
an architecture's attention can be computed so is found by a trial: the output and the cache must have the same bits as
those of the architecture's own code, which uses the same products, norms and attention one by one.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import struct
import threading
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from . import attention_code as attend
from . import heads
from .attention import NAME, decode_attention
from .attention_code import attention_kernel
from .emitter import FLOATS, LANES
from .growing_cache import GrowingLayer
from .heads import heads_kernel
from .norm import QuickNorm, Scale
from .row import ProductSteps, RowMatrix
from .team import Program, Scratch, Step, threads_for

PROJECTIONS, NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
CACHES = ("cache", "past_key_values")  # names of the cache among the arguments of an attention's forward
# further arguments, which change nothing: positions are in cos and sin, and hooks take what is to be output
_HARMLESS = {"position_ids", "use_cache", "output_router_logits", "output_hidden_states"}
_TRIAL = "moetier_trial"  # name of an attention function
_FAR = 100_003  # position in a trial
_scratch = Scratch()
_trying = threading.Lock()


class Form(NamedTuple):
    """Sizes of an attention, and what it does besides products."""

    heads: int
    key_heads: int
    width: int  # of queries and keys
    values: int  # width of values
    rotated: int  # numbers of each query and key that are rotated
    scaling: float
    norm: tuple[Scale, float] | None  # how queries and keys are normed, and eps; None if they are not


class QuickAttention:
    """Class that is put before the class of an attention among the base classes, so that its ``forward`` comes first.

    For inputs that ``OneTokenAttention`` refuses, the module computes as before.
    """

    quick: OneTokenAttention

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Compute as the architecture does: the output [batch, tokens, hidden], and attention weights or None."""
        y = None if arguments else self.quick.of(self, **named)
        return super().forward(*arguments, **named) if y is None else (y, None)  # type: ignore[misc]


class OneTokenAttention:
    """The attention of one module. Threads may use it at the same time, for different caches."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self._local = threading.local()  # ``call``: the thread's _Call

    def __deepcopy__(self, _: Any) -> OneTokenAttention:
        return OneTokenAttention(self.form)

    def of(
        self,
        module: Any,
        hidden_states: Tensor | None = None,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Tensor | None:
        """Compute the attention of hidden_states [1, 1, hidden], and append its key and value to the cache.

        Returns [1, 1, hidden], or None for other inputs, for which nothing is changed.
        """
        x, cache = hidden_states, past_key_values if cache is None else cache
        if (
            x is None
            or x.shape[:-1] != (1, 1)
            or not isinstance(position_embeddings, tuple)
            or len(position_embeddings) != 2
            or attention_mask is not None
            or any(value for name, value in others.items() if name not in _HARMLESS)
            or torch.is_grad_enabled()
            or module.config._attn_implementation not in (NAME, _TRIAL)
            or not self._fits(x, *position_embeddings)
            or (layer := _layer_of(cache, module.layer_idx)) is None
        ):
            return None
        with torch._C.DisableTorchFunctionSubclass():  # attributes of a RowWeight are torch functions
            parts, memory = self._parts(module, x), layer.room()
            if parts is None or memory is None or not self._holds(memory, x.dtype):
                return None
            length = layer.get_seq_length() + 1
            items = self.form.key_heads * -(-length // attend.PIECE)
            threads = min(items, threads_for(self.form.heads * length * (self.form.width + self.form.values)))
            form = (x.dtype, torch.get_num_threads(), threads, *parts)
            call: _Call | None = getattr(self._local, "call", None)
            if call is None or call.form != form:
                call = self._local.call = _Call(self.form, form)
            cos, sin = position_embeddings
            y = call.of(x, cos, sin, memory, length, items)
        layer.extend()
        return y

    def _fits(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        return (
            x.dtype in FLOATS
            and all(part.numel() == self.form.rotated for part in (cos, sin))
            and all(part.is_cpu and part.dtype == x.dtype and part.is_contiguous() for part in (x, cos, sin))
        )

    def _holds(self, memory: tuple[Tensor, Tensor], dtype: torch.dtype) -> bool:
        """Return whether keys and values in memory [1, key heads, capacity, width] are this attention's."""
        return all(
            part.is_cpu
            and part.dtype == dtype
            and part.shape[:2] == (1, self.form.key_heads)
            and part.shape[3] == width
            for part, width in zip(memory, (self.form.width, self.form.values), strict=True)
        )

    def _parts(self, module: Any, x: Tensor) -> tuple[list[RowMatrix], list[Any]] | None:
        """Return the matrices and norms of a module; None if it has others now, or hooks that must be called."""
        parts = [module._modules.get(name) for name in (*PROJECTIONS, *NORMS)]
        if any(part is not None and (part._forward_hooks or part._forward_pre_hooks) for part in parts):
            return None
        matrices, norms = [_matrix_of(part) for part in parts[:4]], [part for part in parts[4:] if part is not None]
        if (
            not all(matrix is not None and matrix.fits(x.dtype) for matrix in matrices)
            or _norm_of(norms) != self.form.norm
        ):
            return None
        if any(norm.weight.dtype != x.dtype or not norm.weight.is_contiguous() for norm in norms):
            return None
        return None if x.shape[-1] != matrices[0].columns else (matrices, norms)  # type: ignore[union-attr,return-value]


def _layer_of(cache: Any, number: int) -> GrowingLayer | None:
    """Return layer ``number`` of a cache if nothing but the layer has to be updated; else None."""
    if getattr(type(cache), "update", None) is not Cache.update or cache.offloading or number >= len(cache.layers):
        return None
    layer = cache.layers[number]
    return layer if type(layer) is GrowingLayer else None


class _Call:
    """Contexts of an attention, which are made once for each thread."""

    def __init__(self, sizes: Form, form: tuple[Any, ...]) -> None:
        """``form``: type of x, numbers of threads for all and for the attention, the matrices, the norms."""
        self.form, self._sizes = form, sizes
        dtype, _, threads, matrices, norms = form
        count, key_count, width, values, rotated, scaling, norm = sizes
        widths = (count * width, key_count * width, key_count * values, count * values)
        self._memory = [torch.empty(size, dtype=dtype) for size in widths]
        q, k, v, attended = (part.data_ptr() for part in self._memory)
        self._first, self._last = (ProductSteps(part, dtype) for part in (matrices[:3], matrices[3:]))
        self._last.read(attended)
        self._targets = (q, k, v)

        scale, eps = norm or (None, 0.0)
        columns = [norm.weight.numel() for norm in norms] or [width, width]
        first = (0, count, key_count, width, values, rotated, q, k, v)
        self._heads = array("q", (*first, 0, 0, 0, 0, *columns, _bits(eps), 0, 0, 0, 0))
        shape = (0, 0, 0, key_count, count // key_count, 0, width, values, 0)
        self._finished = array("q", bytes(8 * key_count))
        self._attention = array("q", (*shape, q, 0, 0, 0, attended, *[0] * 8, _bits(scaling), *self._finished))
        self._of_thread, self._of_item = attend.scratch_numbers(count // key_count, width, values)
        self._program = Program(
            [
                *self._first.steps,
                Step(heads_kernel(dtype, scale), self._heads, 1),
                Step(attention_kernel(dtype), self._attention, threads),
                *self._last.steps,
            ]
        )

    def of(self, x: Tensor, cos: Tensor, sin: Tensor, memory: tuple[Tensor, Tensor], length: int, items: int) -> Tensor:
        """Compute x [1, 1, hidden] at position ``length`` - 1 of keys and values [1, key heads, capacity, width].

        ``items`` are those of the attention.
        """
        y = torch.empty_like(x)
        self._first.read(x.data_ptr())
        _, _, threads, matrices, norms = self.form
        for matrix, address in zip(matrices[:3], self._targets, strict=True):
            self._first.write(matrix, address)
        self._last.write(matrices[3], y.data_ptr())
        new, all_ = self._heads, self._attention
        for place, norm in enumerate(norms):
            new[heads.WEIGHTS + place] = norm.weight.data_ptr()
        new[heads.COS], new[heads.SIN] = cos.data_ptr(), sin.data_ptr()
        for place, part in enumerate(memory):
            address, strides = part.data_ptr(), part.stride()
            new[heads.CACHE + place] = address + x.itemsize * (length - 1) * strides[2]
            new[heads.STRIDES + place] = x.itemsize * strides[1]
            all_[attend.CACHE + place] = address
            for i in range(3):
                all_[attend.STRIDES + 3 * place + i] = strides[i]
        own = 4 * threads * self._of_thread
        nbytes = own + 4 * items * self._of_item
        scratch = _scratch.take(nbytes, spare=nbytes // 4)
        all_[attend.SCRATCH], all_[attend.SCRATCH + 1] = scratch, scratch + own
        all_[attend.BEGUN], all_[attend.ITEMS], all_[attend.LENGTH] = 0, items, length
        all_[attend.PIECES] = items // self._sizes.key_heads
        all_[attend.CONTEXT :] = self._finished
        self._program.run()
        return y


def _matrix_of(module: Any) -> RowMatrix | None:
    """Return the matrix of a linear module without a bias, for products with single rows; None if it has none."""
    if getattr(module, "bias", None) is not None:
        return None
    holder = module._parameters.get("weight") if type(module) is nn.Linear else module
    found: RowMatrix | None = vars(holder).get("matrix") if holder is not None else None
    return found


def _norm_of(norms: list[Any]) -> Any:
    """Return how norms of queries and keys multiply, and eps; None if there are no norms, "other" if they differ."""
    if not norms:
        return None
    kinds = {isinstance(norm, QuickNorm) and (norm.quick_scale, getattr(norm, norm.quick_eps)) for norm in norms}
    return kinds.pop() if len(kinds) == 1 and len(norms) == 2 else "other"


def _bits(number: float) -> int:
    (found,) = struct.unpack("I", struct.pack("f", number))
    return int(found)


# -- which modules -----------------------------------------------------------------------------------------------------


def use_quick_attention(model: PreTrainedModel) -> None:
    """Add QuickAttention to the class of each attention that a trial finds to be one.

    Norms, matrices and the attention function must have been replaced by quick ones before.
    """
    frequencies = [module._buffers.get("inv_freq") for module in model.modules()]
    rotated = {2 * len(buffer) for buffer in frequencies if buffer is not None}
    known: dict[Any, Form | None] = {}  # modules that differ only in their weights are tried once
    for module in model.modules():
        if module._modules.keys() >= {*PROJECTIONS} and hasattr(module, "layer_idx"):
            key = _key(module)
            if key not in known:
                forms = (_trial(module, columns, model.dtype) for columns in rotated)
                known[key] = next((form for form in forms if form is not None), None)
            if (form := known[key]) is not None:
                module.__dict__["quick"] = OneTokenAttention(form)
                module.__class__ = _quick(type(module))  # type: ignore[arg-type] # classes have a hash


def _key(module: Any) -> Any:
    """Return what a module's forward may depend on besides its inputs and weights."""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
    if not _names_layer(type(module)):  # type: ignore[arg-type] # classes have a hash
        del numbers["layer_idx"]
    parts = [(name, type(part)) for name, part in module.named_modules()]
    norm = _norm_of([part for name in NORMS if (part := module._modules.get(name)) is not None])
    sizes = [(name, tensor.shape) for name, tensor in (*module.named_parameters(), *module.named_buffers())]
    return (
        type(module),
        id(getattr(module, "config", None)),
        norm,
        *(tuple(each) for each in (numbers.items(), parts, sizes)),
    )


@functools.cache
def _names_layer(kind: type) -> bool:
    """Return whether the code of a forward uses the number of the layer other than as an argument."""
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
        return re.search(r"self\.layer_idx(?!\s*[,)])", source) is not None
    except (OSError, TypeError):  # the source can't be read, so it might
        return True


@functools.cache
def _quick(kind: type) -> type:
    return type(kind.__name__, (QuickAttention, kind), {"__module__": kind.__module__})


@torch.no_grad()
def _trial(module: Any, rotated: int, dtype: torch.dtype) -> Form | None:
    """Compute a token with the module and with OneTokenAttention; return the latter's form if results agree."""
    norm = _norm_of([module._modules[name] for name in NORMS if module._modules.get(name) is not None])
    first = _matrix_of(module._modules[PROJECTIONS[0]])
    name = next((name for name in CACHES if name in inspect.signature(type(module).forward).parameters), None)
    config = getattr(module, "config", None)
    if first is None or name is None or norm is False or norm == "other" or config is None:
        return None
    if config._attn_implementation != NAME:
        return None
    random, seen = torch.Generator().manual_seed(0), dict[str, Any]()

    def watch(_: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any) -> Any:
        seen.update(named, query=query.shape, key=key.shape, value=value.shape, mask=mask)
        return decode_attention(_, query, key, value, mask, **named)

    def inputs() -> dict[str, Any]:
        x, cos, sin = (
            torch.randn(1, 1, width, generator=random).to(dtype) for width in (first.columns, rotated, rotated)
        )
        here = {"attention_mask": None, "position_ids": torch.tensor([[_FAR]])}
        return {"hidden_states": x, "position_embeddings": (cos, sin), **here}

    cache: Any = DynamicCache()
    with _trying:
        AttentionInterface.register(_TRIAL, watch)
        config._attn_implementation_internal = _TRIAL
        try:
            for _ in range(2):
                module(**inputs(), **{name: cache})
                _grow(cache)
            sizes = _sizes(seen, rotated, norm)
            if sizes is None:
                return None
            found, given, other = OneTokenAttention(sizes), inputs(), copy.deepcopy(cache)
            wanted, nothing = module(**given, **{name: cache})
            y = found.of(module, **given, **{name: other})
        except Exception:  # the module needs something else
            return None
        finally:
            config._attn_implementation_internal = NAME
    layer, own = (each.layers[module.layer_idx] for each in (other, cache))
    pairs = [(y, wanted), (layer.keys, own.keys), (layer.values, own.values)]
    return sizes if y is not None and nothing is None and all(torch.equal(*pair) for pair in pairs) else None


def _grow(cache: Any) -> None:
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer


def _sizes(seen: dict[str, Any], rotated: int, norm: tuple[Scale, float] | None) -> Form | None:
    """Return the sizes of an attention from what its module gives to the attention function; None if it is another."""
    query, key, value = (seen.pop(name) for name in ("query", "key", "value"))
    scaling = seen.pop("scaling", None)
    for harmless in ("sliding_window", "position_ids"):  # a window's limit is in the mask
        seen.pop(harmless, None)
    widths = (query[3], value[3])
    if any(other is not None and other is not False and other != 0.0 for other in seen.values()) or query[0] != 1:
        return None
    if query[1] % key[1] or any(width % LANES for width in widths) or rotated > query[3] or rotated % (2 * LANES):
        return None
    return Form(query[1], key[1], *widths, rotated, query[3] ** -0.5 if scaling is None else scaling, norm)
