"""Compute a router's choice of experts in one call.

Whether this can be done is found by a trial with the first row of each type, because architectures write routers in
many ways.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moetier.runtime.kernels.layer.routing import CompiledRouter, RouterVariant
from moetier.runtime.kernels.products.api import CPU
from moetier.runtime.libraries.torch_internals import (
    buffers_of,
    children_of,
    parameters_of,
    replace_buffers,
    replace_parameters,
    without_subclasses,
)

from .experts import experts_modules
from .snapshot import Trials, scalars_of

_TRIED_ROWS = 64  # random states with which a router is tried
# attributes of routers: by which weights are multiplied; numbers of groups, and of groups to choose from
_FACTORS, _GROUPS = ("routed_scaling_factor", "router_scaling_factor"), ("num_group", "topk_group")
# relative difference between a router's weights and ours, by their type
_SAME = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class QuickRouter:
    """Class that is put before the class of a router among the base classes, so that its ``forward`` comes first.

    With gradients, or for inputs that ``RowRouter`` refuses, the module computes as before.
    """

    quick_router: RowRouter
    weight: Tensor

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return logits [tokens, experts], weights [tokens, top_k] and experts [tokens, top_k].

        ``arguments``: the hidden states, and the router's further arguments: none, or a correction [experts].
        """
        output = None if named or not arguments else self.quick_router.compute(self, *arguments)
        return super().forward(*arguments, **named) if output is None else output  # type: ignore[misc]


class RowRouter:
    """A router for rows. Threads may use it at the same time."""

    def __init__(self, variants: dict[Any, RouterVariant | None]) -> None:
        """``variants``: those of routers that were tried. Routers that differ only in their weights are tried once."""
        self._variants = variants
        self._routings: dict[torch.dtype, Trials[CompiledRouter]] = {}  # by type of rows

    def __deepcopy__(self, _: Any) -> RowRouter:
        return RowRouter(self._variants)

    def routing(self, router: Any, dtype: torch.dtype) -> CompiledRouter | None:
        """Return the choice of a router for rows of a type; None if compiled code does not have it."""
        if (trials := self._routings.get(dtype)) is None:
            trials = self._routings.setdefault(dtype, Trials())
        return trials.result(router, functools.partial(self._tried, router, dtype))

    def _tried(self, router: Any, dtype: torch.dtype) -> CompiledRouter | None:
        sizes = [(name, tensor.shape, tensor.dtype) for name, tensor in router.state_dict().items()]
        scalars = scalars_of(router).items()
        key = (dtype, plain_class(router), id(getattr(router, "config", None)), *scalars, *sizes)
        if key not in self._variants:
            with CPU:
                self._variants[key] = _trial(router, dtype)
        variant = self._variants[key]
        return None if variant is None else CompiledRouter(variant)

    def compute(self, router: Any, x: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return logits [rows, experts], weights [rows, top_k] and experts [rows, top_k] of x [rows, columns].

        x may have other leading dimensions. Returns None for other inputs.
        """
        with without_subclasses():  # attributes of a RowWeight are torch functions
            weight = parameters_of(router).get("weight")  # None if its class computes it from others
            if weight is None or x.shape[-1] != weight.shape[-1] or torch.is_grad_enabled() or len(more) > 1:
                return None
            if (routing := self.routing(router, x.dtype)) is None:
                return None
            (correction,) = more or _corrections(router)
            return routing.compute(x, weight, parameters_of(router).get("bias"), correction)


def tensors_of(router: Any, parent: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return matrix [experts, hidden], bias [experts] and correction [experts] of a router that ``parent`` calls."""
    (correction,) = _corrections(router)
    for name in argument_names(router):
        correction = getattr(parent, name, None)
    return parameters_of(router)["weight"], parameters_of(router).get("bias"), correction


def _corrections(router: Any) -> list[Tensor | None]:
    return [*buffers_of(router).values()] or [None]


def argument_names(router: Any) -> list[str]:
    """Return the names of the arguments of a router's own forward, without the hidden states.

    They are those of the attributes of the router's parent that are given.
    """
    return [*inspect.signature(plain_class(router).forward).parameters][2:]  # type: ignore[attr-defined]


def plain_class(module: Any) -> type:
    """Return the class of a module without QuickRouter."""
    classes = type(module).__mro__
    return classes[classes.index(QuickRouter) + 1] if isinstance(module, QuickRouter) else classes[0]


@functools.cache
def quick_class(quick: type, class_: type) -> type:
    """Return a class like ``class_``, with ``quick`` before it among the base classes."""
    return type(class_.__name__, (quick, class_), {"__module__": class_.__module__})


def use_quick_routers(model: PreTrainedModel) -> None:
    """Put QuickRouter before the class of each module that may be a router with a RouterVariant."""
    variants: dict[Any, RouterVariant | None] = {}
    for path, experts in experts_modules(model).items():
        for module in model.get_submodule(path.rpartition(".")[0]).children():
            weight = parameters_of(module).get("weight")
            if (
                weight is not None
                and weight.dim() == 2
                and len(weight) == experts.num_experts
                and not isinstance(module, nn.Linear)
                and is_router(module)
            ):
                module.__dict__["quick_router"] = RowRouter(variants)
                module.__class__ = quick_class(QuickRouter, type(module))  # type: ignore[arg-type] # classes have a hash


def is_router(module: Any) -> bool:
    """Return whether a module has a router's tensors only. Another one might have no effect in the trial."""
    return (
        parameters_of(module).keys() <= {"weight", "bias"}
        and not children_of(module)
        and len(buffers_of(module)) + len(argument_names(module)) <= 1
    )


@torch.no_grad()
def _trial(router: Any, dtype: torch.dtype) -> RouterVariant | None:
    """Compare a router with the variants that it may have, on states of a type. Return the one that agrees."""
    twin = copy.copy(router)
    twin.__class__ = plain_class(router)
    weight, bias = parameters_of(twin)["weight"], parameters_of(twin).get("bias")
    experts, columns = weight.shape
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    # The correction is large enough to change choices. The first logits have all signs. The second ones are so small
    # that a number which the router adds to their sum shows in the result. With the correction their scores are
    # negative. So the result shows whether a router sets the scores of other groups to 0 or leaves them out.
    correction = 0.1 * numbers(experts) - 0.5
    if buffers_of(twin):
        ((name, buffer),) = buffers_of(twin).items()
        correction = correction.to(buffer.dtype)
        replace_buffers(twin, {name: correction})
    given = [correction] if argument_names(router) else []
    matrices = weight, (numbers(experts, columns) / columns - 20 / columns).to(weight.dtype)
    states = numbers(_TRIED_ROWS, columns).to(dtype), torch.ones(_TRIED_ROWS, columns, dtype=dtype)
    candidates = [*_variants(twin, has_correction=bool(buffers_of(twin) or given))]
    for matrix, x in zip(matrices, states, strict=True):
        replace_parameters(twin, parameters_of(twin) | {"weight": matrix})
        try:
            logits, weights, chosen = twin.forward(x, *given)  # without hooks
        except Exception:  # it needs or gives something else
            return None
        if logits.shape != (_TRIED_ROWS, experts) or weights.dtype not in _SAME or chosen.dtype != torch.int64:
            return None
        is_rounded = torch.equal(logits, logits.to(weight.dtype).to(logits.dtype))
        product = weight.dtype if is_rounded else torch.float32
        own = F.linear(x.to(product), matrix.to(product), None if bias is None else bias.to(product))
        if not torch.allclose(own, logits.to(own.dtype), rtol=0.05, atol=0.05):
            return None
        types = {"logit_dtype": logits.dtype, "weight_dtype": weights.dtype, "product_dtype": product}
        candidates = [variant._replace(top_k=chosen.shape[-1], **types) for variant in candidates]
        candidates = [variant for variant in candidates if _agrees(variant, logits, weights, chosen, correction)]
    return next(
        (
            variant
            for variant in candidates
            if CompiledRouter(variant).can_route(weight, bias, _like(variant, correction))
        ),
        None,
    )


def _like(variant: RouterVariant, correction: Tensor) -> Tensor | None:
    return correction if variant.has_correction else None


def _variants(router: Any, *, has_correction: bool) -> Iterator[RouterVariant]:
    """Yield the variants that a router may have. Types and top_k are still to be set."""
    attributes = vars(router)
    factors = [float(value) for name in _FACTORS if isinstance(value := attributes.get(name), float | int)]
    groups, best_groups = (attributes.get(name) for name in _GROUPS)
    divided = [(1, 1, 0)]
    if isinstance(groups, int) and isinstance(best_groups, int) and groups > best_groups > 0:
        divided += [(groups, best_groups, best) for best in (1, 2)]
    for is_sigmoid, normalised, factor, division in itertools.product(
        [True] if has_correction else [False, True], [False, True], [1.0, *factors], divided
    ):
        if is_sigmoid or division[2] < 2:  # scores of a softmax are not at hand when experts are chosen
            types = (torch.float32, torch.float32, None)
            yield RouterVariant(0, normalised, factor, *types, is_sigmoid, has_correction, *division)


def _agrees(variant: RouterVariant, logits: Tensor, weights: Tensor, chosen: Tensor, correction: Tensor) -> bool:
    """Return whether a router with a variant makes this choice from ``logits`` [rows, experts].

    ``weights`` and ``chosen`` are [rows, top_k], ``correction`` [experts].
    """
    logits = logits.float()
    scores = logits.sigmoid() if variant.is_sigmoid else logits.softmax(-1)
    ranks = scores if variant.is_sigmoid else logits
    if variant.has_correction:
        ranks = ranks + correction
    if variant.best_of_group:
        by_group = ranks.view(len(ranks), variant.groups, -1)
        if by_group.shape[-1] < variant.best_of_group:
            return False
        best = by_group.topk(variant.best_of_group).values.sum(-1).topk(variant.best_groups).indices
        is_best = torch.zeros(by_group.shape[:-1], dtype=torch.bool).scatter(-1, best, value=True)
        ranks = by_group.masked_fill(~is_best[..., None], -torch.inf).flatten(-2)
    if not torch.equal(ranks.gather(-1, chosen).sort().values, ranks.topk(variant.top_k).values.sort().values):
        return False
    shares = scores.gather(-1, chosen)
    if variant.normalised:
        shares = shares / shares.sum(-1, keepdim=True)
    near = _SAME[weights.dtype]
    return torch.allclose(weights.float(), variant.factor * shares, rtol=near, atol=near / 1000)
