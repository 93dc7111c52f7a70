"""Forward pass of all Experts modules, with experts that are leased from a device tier.

transformers decorates each architecture's Experts class with ``use_experts_implementation``. It gives the class the
flags has_gate, has_bias, is_transposed and has_post_expert_norm, and the method _apply_gate. moetier removes the
parameters of these modules. There are two ways to compute a block. The *exact* way computes one expert after the other,
with the same bits as the architecture's own eager forward pass. The *quick* way computes experts that are available
together in one call of compiled code, directly from their records (``kernels/expert_kernels.py``). If all experts of a
single token are resident, it takes no lease: compiled code looks the records up, and proves afterwards that none of
them was replaced. The result of the quick way does not depend on which experts are available together. A module whose
activation compiled code does not have (``activation.py``), or which norms its outputs, is computed one expert after the
other too, but with products from records (``kernels/packed.py``).
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.api import FLOATS, Kernels, moved_error
from moetier.runtime.kernels.expert_code import Activation
from moetier.runtime.kernels.expert_kernels import ExpertKernels
from moetier.runtime.kernels.packed import PackedKernels
from moetier.runtime.kernels.snapshot import Trials
from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.quant.codec import sections
from moetier.tiers.source import ExpertSource, Lease

from .activation import activation_of

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
ROWS = 256  # largest number of rows computed together in the quick way, which limits memory for intermediate values

_open = threading.local()  # ``source``: the source of this thread's leases that have not ended regularly


# for each expert: the numbers of the rows of x that it computes, and the row of the outputs for each
Rows = Mapping[int, tuple[Sequence[int], Sequence[int]]]


class Sent(Protocol):
    """Interface of computations that other hosts do."""

    @property
    def experts(self) -> Collection[int]:
        """The experts that are computed elsewhere."""

    def collect(self, outputs: int) -> list[int]:
        """Wait for the outputs, and write them to their rows of ``outputs``, an address.

        Return the experts that no host has computed.
        """

    def close(self) -> None:
        """Cancel what is not collected. Idempotent."""


class Elsewhere(Protocol):
    """Interface of an object that has experts computed on other hosts."""

    def note(self, block: int, experts: Sequence[int]) -> None:
        """Note that one token has used experts of a block, which are all here."""

    def send(self, products: ExpertKernels, block: int, x: int, tokens: int, rows: Rows) -> Sent:
        """Begin to compute those experts of ``rows`` that are better computed elsewhere.

        ``x`` is the address of the hidden states [tokens, hidden]. The caller closes the result.
        """


@dataclass(frozen=True, slots=True)
class TieredBlock:
    """State of an experts module whose parameters were removed, stored as the module's attribute ``tiered``."""

    block: int  # number of the block
    layout: RecordLayout
    source: ExpertSource[Tensor]
    kernels: Kernels
    device: torch.device  # device of the records
    # called once for each demand with the block and the experts
    demanded: Callable[[int, Collection[int]], None] | None = None
    # by type of the hidden states and parts of the module: kernels for the quick way. Without kernels (None) the block
    # is computed in the exact way
    compiled: dict[Any, Trials[ExpertKernels]] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None  # computes absent experts on other hosts, if the quick way is used


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Return all Experts modules that use transformers' experts interface, by path, in module order."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate") and hasattr(module, "has_bias") and hasattr(module, "is_transposed")
    }


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the forward pass of the Experts module ``self``.

    Experts are computed in the order in which they arrive. Their outputs are kept until they can be added up in a fixed
    order, so that the result does not depend on the order of arrival. The outputs are at most tokens * top_k * hidden
    numbers. Memory budgets leave room for those of 4096 tokens (``output_bytes``); a longer prefill takes more memory.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, top_k].
        top_k_weights: [tokens, top_k].

    Returns:
        [tokens, hidden]. A backward pass through the result raises ConfigError.

    Raises:
        ConfigError: the hidden states are not on the device of the records.
        ValueError: the shapes do not fit each other, or do not fit the records.
    """
    here: TieredBlock = self.tiered
    if hidden_states.device != here.device:
        raise moved_error(hidden_states.device, here.device)
    _end_open_leases()
    if not torch.is_grad_enabled():
        return _compute(self, here, hidden_states, top_k_index, top_k_weights)
    with torch.no_grad():
        out = _compute(self, here, hidden_states, top_k_index, top_k_weights)
    return without_gradient(out, hidden_states, top_k_weights)


def one_token(
    module: Any, x: Tensor, experts: Sequence[int], weights: Tensor, residual: Tensor | None
) -> Tensor | None:
    """Compute ``experts_forward`` of one token without gradients, and add the residual if there is one.

    Args:
        module: the Experts module.
        x: [1, hidden] on a CPU.
        experts: [top_k].
        weights: [1, top_k].
        residual: [1, hidden], in the type of x; it may have more leading dimensions of size 1.

    Returns:
        The sum, in the shape of ``residual``, else [1, hidden]; None if the compiled code can't compute these inputs.
    """
    here: TieredBlock | None = getattr(module, "tiered", None)
    if here is None or here.device != x.device or weights.dtype not in FLOATS:
        return None
    kernels = _kernels_of(module, here, x.dtype)
    if kernels is None or kernels.dtype != x.dtype or x.shape[1] != kernels.width:
        return None
    _end_open_leases()
    return _one_token(kernels, here, x, experts, weights, residual)


def _end_open_leases() -> None:
    if (cut := getattr(_open, "source", None)) is not None:
        _open.source = None
        with suppress(MoetierError):  # the source may be closed, or belong to another process
            cut.reclaim()


def _compute(
    module: Any, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    if (kernels := _kernels_of(module, here, hidden_states.dtype)) is not None:
        return _quick(kernels, here, hidden_states, top_k_index, top_k_weights)
    work = partial(_eager, module, here, hidden_states, top_k_index, top_k_weights)
    return here.kernels.with_room(work)


def groups(here: TieredBlock, experts: Collection[int]) -> Generator[list[Lease[Tensor]], None, None]:
    """Lease a block's experts, and yield lists of leases that are valid at the same time.

    Records are uint8 [record bytes]. ``here.demanded`` is called once. If all experts are available together, it is
    called before they are yielded. Otherwise it is called after the first list has been computed: at that time other
    experts are still being read, so the call delays nothing.
    """
    _open.source = here.source
    left = len(experts)
    demanded = here.demanded  # set to None once it was called
    with closing(here.source.acquire([ExpertKey(here.block, expert) for expert in experts])) as leases:
        group = []
        for lease in leases:
            group.append(lease)
            left -= 1
            if lease.more:
                continue
            if demanded is not None and left <= 0:
                demanded(here.block, experts)
                demanded = None
            yield group
            group = []
            if demanded is not None:
                demanded(here.block, experts)
                demanded = None
    _open.source = None


def rows_of_experts(top_k_index: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Return for each expert that is used, in ascending order, the tokens that use it and its positions in their top-k.

    ``top_k_index`` is [tokens, top_k]. Both tensors of an expert are [n] if n tokens use it. They are in the order of
    the eager forward pass, by position and then by token. Indices of ``experts`` or more are ignored; with expert
    parallelism they mean "computed elsewhere". Waits for the device once.
    """
    tokens = len(top_k_index)
    index = top_k_index.T.reshape(-1).clamp(max=experts)  # by position, then by token
    counts = index.new_zeros(experts + 1).index_add_(0, index, torch.ones_like(index))
    order = torch.argsort(index, stable=True)
    positions, by_expert = order // tokens, order % tokens
    rows, start = {}, 0
    for expert, count in enumerate(counts[:-1].tolist()):
        if count:
            rows[expert] = (by_expert[start : start + count], positions[start : start + count])
            start += count
    return rows


def arithmetic(module: Any, hidden_states: Tensor, top_k_weights: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the types in which the architecture's eager forward pass multiplies, and in which it adds up outputs.

    Exceptions are listed here because no flag of the module tells them. Only the types of ``hidden_states``
    [tokens, hidden] and ``top_k_weights`` [tokens, top_k] are used.
    """
    match type(module).__name__:
        case "OpenAIPrivacyFilterExperts":
            return torch.float32, torch.float32
        case "Inkling2Experts" | "Inkling2LoopExperts":
            return hidden_states.dtype, torch.float32
        case "NemotronHExperts":
            return hidden_states.dtype, top_k_weights.dtype
        case _:
            return hidden_states.dtype, hidden_states.dtype


def output_bytes(module: Any, layout: RecordLayout, tokens: int, top_k: int, dtype: torch.dtype) -> int:
    """Return the most bytes that experts' outputs take in a prefill of ``tokens`` tokens, in a model of ``dtype``."""
    width = next(projection.rows for projection in layout.projections if projection.name == "down_proj")
    numbers = torch.empty(0, dtype=dtype)
    _, accumulate = arithmetic(module, numbers, numbers.float())  # some routers compute weights in fp32
    kept = torch.float32 if dtype == torch.float16 else accumulate  # compiled code has no float16
    return tokens * top_k * width * kept.itemsize


def _first(module: Any) -> str:
    """Return the name of the projection before the activation."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _activate(module: Any, inner: Tensor) -> Tensor:
    """Apply the module's own activation to ``inner``, the result of the first projection: [rows, *] -> [rows, *]."""
    out: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return out


def _kernels_of(module: Any, here: TieredBlock, dtype: torch.dtype) -> ExpertKernels | None:
    """Return compiled code for a block's experts, with hidden states of ``dtype``; None if they can't be compiled.

    Without it, experts are computed one after the other (``_eager``).
    """
    kind = (dtype, *module._modules.values())
    if (trials := here.compiled.get(kind)) is None:
        trials = here.compiled.setdefault(kind, Trials())
    return trials.result(module, partial(_compile, module, here, dtype))


def _compile(module: Any, here: TieredBlock, dtype: torch.dtype) -> ExpertKernels | None:
    activation = quick_activation(module, here.layout, here.kernels)
    if activation is None or not isinstance(here.kernels, PackedKernels):
        return None
    computed = dtype if dtype in FLOATS else torch.float32
    return ExpertKernels(here.layout, activation, computed, module.num_experts, here.kernels.processor)


def quick_activation(module: Any, layout: RecordLayout, kernels: Kernels) -> Activation | None:
    """Return the activation with which a block's experts are computed in the quick way; None if they can't be."""
    activation = activation_of(module) if isinstance(kernels, PackedKernels) else None
    return activation if activation is not None and ExpertKernels.fit(layout, activation) else None


# -- exactly -----------------------------------------------------------------------------------------------------------


def _eager(module: Any, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute ``experts_forward`` one expert after the other, and add up outputs in ascending order of experts.

    If ``here.kernels`` are exact, this is the exact way that the module's docstring describes.
    """
    compute, accumulate = arithmetic(module, hidden_states, top_k_weights)
    rows = rows_of_experts(top_k_index, module.num_experts)
    waiting, computed = deque(rows), dict[int, Tensor]()
    out = torch.zeros_like(hidden_states, dtype=accumulate)

    with closing(groups(here, rows)) as arriving:
        for leases in arriving:
            for lease in leases:
                tokens, positions = rows[lease.key.expert]
                y = _expert(module, here, lease.record, hidden_states[tokens].to(compute))
                y = (y * top_k_weights[tokens, positions, None]).to(accumulate)
                if not lease.holds():
                    continue  # the record was replaced during the computation; it will be leased again
                computed[lease.key.expert] = y
                while waiting and waiting[0] in computed:
                    expert = waiting.popleft()
                    out.index_add_(0, rows[expert][0], computed.pop(expert))
    assert not waiting
    return out.to(hidden_states.dtype)


def _expert(module: Any, here: TieredBlock, record: Tensor, x: Tensor) -> Tensor:
    """Compute one expert: x [rows, hidden] -> [rows, hidden]."""

    def project(x: Tensor, name: str) -> Tensor:
        y = here.kernels.project(x, record, here.layout, name)
        return y + sections(record, here.layout)[f"{name}_bias"].to(y.dtype) if module.has_bias else y

    x = project(_activate(module, project(x, _first(module))), "down_proj")
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


# -- quickly -----------------------------------------------------------------------------------------------------------


def _quick(
    kernels: ExpertKernels, here: TieredBlock, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute ``experts_forward`` with compiled code, all experts that are available in one call.

    This is the quick way that the module's docstring describes.
    """
    shape = top_k_index.shape
    if hidden_states.shape != (shape[0], kernels.width) or top_k_weights.shape != shape:
        given = f"{[*hidden_states.shape]}, {[*shape]} and {[*top_k_weights.shape]}"
        raise ValueError(f"hidden states, experts and weights of shapes {given}, where hidden is {kernels.width}")
    weights = top_k_weights if top_k_weights.dtype in FLOATS else top_k_weights.float()
    x, weights = hidden_states.to(kernels.dtype).contiguous(), weights.contiguous()
    out = _one_token(kernels, here, x, top_k_index.tolist()[0], weights) if len(x) == 1 else None
    return (_tokens(kernels, here, x, top_k_index, weights) if out is None else out).to(hidden_states.dtype)


def _one_token(
    kernels: ExpertKernels,
    here: TieredBlock,
    x: Tensor,
    experts: Sequence[int],
    weights: Tensor,
    residual: Tensor | None = None,
) -> Tensor | None:
    """Compute a single token, x [1, hidden], and add ``residual`` if there is one.

    If all experts are resident, they are found and used without a lease. Returns [1, hidden], or the shape of
    ``residual``; None if the router names an expert twice, or an expert that the block does not have.
    """
    if not experts or len(set(experts)) < len(experts):
        return None
    residents = here.source.residents(here.block)
    token = kernels.one_token(len(experts), weights.dtype, has_residual=residual is not None)
    if residents is not None and token.find(experts, residents):
        here.source.note_uses(here.block, experts)
        if here.elsewhere is not None:
            here.elsewhere.note(here.block, experts)
        if here.demanded is not None:
            here.demanded(here.block, experts)
        if (out := token.compute(x, weights, residual)) is not None:
            return out
        here.source.take_back_uses(here.block, experts)
        here = replace(here, demanded=None)  # it was called already
    if max(experts) >= kernels.experts:
        return None
    places = {expert: place for place, expert in enumerate(experts)}
    outputs = torch.empty(len(experts), x.shape[1], dtype=x.dtype)

    def compute(leases: Sequence[Lease[Tensor]]) -> None:
        jobs = [number for row, lease in enumerate(leases) for number in (lease.record.data_ptr(), row, 1)]
        at = array("q", [places[lease.key.expert] for lease in leases])
        kernels.compute(x, array("q", jobs), at, outputs)

    def placed() -> Rows:
        return {expert: ([0], [place]) for expert, place in places.items()}

    _experts(kernels, here, x, places, placed, compute, outputs)
    out = kernels.add_up(outputs, weights)
    return out if residual is None else residual + out


def _tokens(kernels: ExpertKernels, here: TieredBlock, x: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
    """Compute several tokens, x [tokens, hidden]. An expert is leased once for all tokens that use it."""
    tokens, k = top_k_index.shape
    rows = rows_of_experts(top_k_index, kernels.experts)
    outputs = x.new_zeros(tokens * k, x.shape[1])

    def compute(leases: Sequence[Lease[Tensor]]) -> None:
        for batch in _batches(leases, rows):
            jobs, first = array("q"), 0
            for lease, token, _ in batch:
                jobs.extend((lease.record.data_ptr(), first, len(token)))
                first += len(token)
            gathered = torch.cat([token for _, token, _ in batch])
            places = gathered * k + torch.cat([position for _, _, position in batch])
            kernels.compute(x.index_select(0, gathered), jobs, array("q", places.tolist()), outputs)

    def placed() -> Rows:
        return {expert: (own.tolist(), (own * k + position).tolist()) for expert, (own, position) in rows.items()}

    _experts(kernels, here, x, rows, placed, compute, outputs)
    return kernels.add_up(outputs, weights)


def _experts(
    kernels: ExpertKernels,
    here: TieredBlock,
    x: Tensor,
    experts: Collection[int],
    rows: Callable[[], Rows],
    compute: Callable[[Sequence[Lease[Tensor]]], None],
    outputs: Tensor,
) -> None:
    """Compute all ``experts`` of x [tokens, hidden], some of them on other hosts, and fill their rows of ``outputs``.

    ``compute`` computes experts that are leased together. ``rows`` returns what each expert computes.
    """
    left = experts
    if here.elsewhere is not None:
        with closing(here.elsewhere.send(kernels, here.block, x.data_ptr(), len(x), rows())) as sent:
            if sent.experts and here.demanded is not None:
                here.demanded(here.block, experts)
                here = replace(here, demanded=None)
            _arriving(here, [expert for expert in experts if expert not in sent.experts], compute)
            left = sent.collect(outputs.data_ptr())
    _arriving(here, left, compute)


def _arriving(here: TieredBlock, experts: Collection[int], compute: Callable[[Sequence[Lease[Tensor]]], None]) -> None:
    """Call ``compute`` with the leases of experts that are available together, until all were computed."""
    if not experts:
        return
    with closing(groups(here, experts)) as arriving:
        for leases in arriving:
            compute(leases)
            for lease in leases:
                lease.holds()  # if a lease does not hold, its expert is leased and computed again


Batch = list[tuple[Lease[Tensor], Tensor, Tensor]]  # (lease, tokens that use it, their positions in the top-k)


def _batches(leases: Sequence[Lease[Tensor]], rows: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    """Divide the rows of leased experts into batches of at most ROWS rows. ``rows`` is from ``rows_of_experts``."""
    batch: Batch = []
    left = ROWS
    for lease in leases:
        for tokens, positions in zip(*(torch.split(index, ROWS) for index in rows[lease.key.expert]), strict=True):
            if batch and len(tokens) > left:
                yield batch
                batch, left = [], ROWS
            batch.append((lease, tokens, positions))
            left -= len(tokens)
    yield batch


# -- gradients ---------------------------------------------------------------------------------------------------------


def without_gradient(out: Tensor, *inputs: Tensor) -> Tensor:
    """Return ``out``, computed from ``inputs`` without gradients, with a backward pass that raises ConfigError.

    Without this, gradients would silently be None. Gradients are not just switched off for the trunk's parameters,
    because then torch would multiply in another order, and the results would no longer have the same bits as the
    original model's. All tensors may have any shape, such as [tokens, hidden].
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return cast("Tensor", _NoGradient.apply(out, *inputs))  # type: ignore[no-untyped-call, unused-ignore]
    return out


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Any:
        raise ConfigError(
            "A gradient is wanted through the experts, or through a quantised matrix of the trunk, which moetier does "
            "not compute: its models are for inference.",
            "Train the ordinary model, and convert what comes out.",
        )
