"""Compute a router's choice of experts in one call.

Whether this can be done is found by a trial, because architectures write routers in many ways.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moetier.runtime.kernels.routing import Routing, RoutingForm

from .experts import experts_modules

_TRIED_ROWS = 64  # random states with which a router is tried
_FACTORS = ("routed_scaling_factor",)  # attributes of routers that multiply weights
# relative difference between a router's weights and ours, by their type
_SAME = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class QuickRouter:
    """Class that is put before the class of a router among the base classes, so that its ``forward`` comes first.

    With gradients, or for inputs that ``Routing`` refuses, the module computes as before.
    """

    quick_routing: Routing
    weight: Tensor
    bias: Tensor | None

    def forward(self, hidden_states: Tensor) -> Any:
        """Return logits [tokens, experts], weights [tokens, top_k] and experts [tokens, top_k] of a row."""
        found = self.quick_routing.of(hidden_states, self.weight, getattr(self, "bias", None))
        return super().forward(hidden_states) if found is None else found  # type: ignore[misc]


def use_quick_routers(model: PreTrainedModel) -> None:
    """Put QuickRouter before the class of each router whose results for random states are those of a ``Routing``.

    Each such module gets a new class of its own.
    """
    known: dict[Any, RoutingForm | None] = {}  # routers that differ only in their weights are tried once
    for path, experts in experts_modules(model).items():
        for module in model.get_submodule(path.rpartition(".")[0]).children():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() != 2 or len(weight) != experts.num_experts:
                continue
            numbers = [(name, value) for name, value in vars(module).items() if isinstance(value, int | float | str)]
            sizes = [(name, tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()]
            key = (type(module), id(getattr(module, "config", None)), *numbers, *sizes)
            if key not in known:
                known[key] = _trial(module, model.dtype)
            if (form := known[key]) is not None:
                kind = type(module)
                own = {"__module__": kind.__module__, "quick_routing": Routing(form)}
                module.__class__ = type(kind.__name__, (QuickRouter, kind), own)


@torch.no_grad()
def _trial(module: Any, dtype: torch.dtype) -> RoutingForm | None:
    """Compare a router with ``Routing`` on a few states; return its form if they agree."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    others = module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    if others - {"weight", "bias"} or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    if not Routing.fits(weight, bias):
        return None
    x = torch.randn(_TRIED_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        logits, weights, experts = module(x)
    except Exception:  # it needs or gives something else
        return None
    if logits.shape != (_TRIED_ROWS, len(weight)) or weights.dtype not in _SAME or experts.dtype != torch.int64:
        return None
    near = _SAME[weights.dtype]
    own = F.linear(x.to(weight.dtype), weight, bias)
    top_k = experts.shape[-1]
    if not torch.allclose(own, logits.to(own.dtype), rtol=0.05, atol=0.05) or not torch.equal(
        logits.gather(-1, experts), logits.topk(top_k).values
    ):
        return None
    shares = logits.float().softmax(-1).gather(-1, experts)
    factors = [1.0, *(float(value) for name in _FACTORS if isinstance(value := getattr(module, name, None), float))]
    for normalised in (False, True):
        for factor in factors:
            wanted = factor * (shares / shares.sum(-1, keepdim=True) if normalised else shares)
            if torch.allclose(weights.float(), wanted, rtol=near, atol=near / 100):
                return RoutingForm(top_k, normalised, factor, logits.dtype, weights.dtype)
    return None
