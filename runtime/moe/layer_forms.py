"""Find by a trial how a decoder layer can be computed for one token by compiled code (``layers.py``).

The layer computes some tokens with random hidden states. Then compiled code does so for each form that the layer may
have by its parts. Its result, its cache and the inputs of its experts must be the same, bit for bit.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from moetier.runtime.kernels.layer.attention_tasks import CACHES, AttentionVariant, is_attention, observe, variants
from moetier.runtime.kernels.layer.growing_cache import grow
from moetier.runtime.kernels.layer.norm import is_quick_norm
from moetier.runtime.kernels.products.api import FLOATS
from moetier.runtime.libraries.torch_internals import (
    buffers_of,
    children_of,
    parameters_of,
    replace_parameters,
    separate,
)

from .experts import experts_modules
from .routers import QuickRouter, argument_names, is_router
from .snapshot import scalars_of

_FACTORS = ("residual_multiplier",)  # attributes of layers by which results are multiplied before they are added
# Means of the norms' weights in trials. With the large one, a limit on the size of numbers would show.
_SCALES = (1.0, 30.0)
_FAR = 100_003  # position of the token in a trial

Compute = Callable[..., Tensor | None]  # ``OneTokenLayer.compute`` with a form


class Parts(NamedTuple):
    """Names of the parts of a layer, by which it may be one with a LayerForm."""

    attention: str
    norms: tuple[str, str]
    block: str


class LayerForm(NamedTuple):
    """How a layer computes h = x + factor * attention(first(x)), and then h + factor * block(second(h))."""

    attention: str  # name of this part
    first: str  # norm before the attention
    second: str  # norm before the block
    block: str
    sizes: AttentionVariant  # of the attention
    factor: float = 1.0
    # Names of router and Experts module, and of a module whose result is added to that of the experts ("": none), if
    # the block has nothing else. Without a router the block is called as a module.
    router: str = ""
    experts: str = ""
    shared: str = ""


def parts_of(layer: Any) -> Parts | None:
    """Return the parts of a layer if it may have a LayerForm, else None."""
    if parameters_of(layer) or buffers_of(layer):  # one, such as a factor of 1, might have no effect
        return None
    parts = {name: part for name, part in children_of(layer).items() if part is not None}
    attentions = [name for name, part in parts.items() if is_attention(part)]
    norms = [name for name, part in parts.items() if is_quick_norm(part)]
    others = [name for name in parts if name not in (*attentions, *norms)]
    if (len(attentions), len(norms), len(others)) != (1, 2, 1):
        return None
    return Parts(attentions[0], (norms[0], norms[1]), others[0])


def forms_of(layer: Any, parts: Parts, sizes: list[AttentionVariant]) -> Iterator[LayerForm]:
    """Yield the forms that a layer may have. ``sizes``: forms that its attention may have."""
    factors = [float(value) for name in _FACTORS if isinstance(value := vars(layer).get(name), int | float)]
    names = _in_block(children_of(layer)[parts.block])
    for (first, second), factor, size in itertools.product(
        itertools.permutations(parts.norms), factors or [1.0], sizes
    ):
        form = LayerForm(parts.attention, first, second, parts.block, size, factor)
        if names is not None:
            yield form._replace(router=names[0], experts=names[1], shared=names[2])
        yield form


def _in_block(block: Any) -> tuple[str, str, str] | None:
    """Return the names of router, Experts module and shared expert ("": none); None if a block has anything else."""
    routers = [
        name
        for name, part in children_of(block).items()
        if type(part).forward is QuickRouter.forward and is_router(part)
    ]
    experts = [path for path in experts_modules(block) if path in children_of(block)]
    others = [name for name in children_of(block) if name not in (*routers, *experts)]
    if len(routers) != 1 or len(experts) != 1 or len(others) > 1 or parameters_of(block):
        return None
    if not buffers_of(block).keys() <= {*argument_names(children_of(block)[routers[0]])}:
        return None
    return routers[0], experts[0], others[0] if others else ""


def key_of(layer: Any) -> Any:
    """Return what a layer's forward may depend on besides its inputs and weights."""
    parts = []
    for name, part in layer.named_modules():
        kind: Any = type(part)
        scalars, config = scalars_of(part), getattr(part, "config", None)
        if not _names_layer(kind):
            scalars.pop("layer_idx", None)
        more = () if config is None else (id(config), *scalars_of(config).items())
        parts.append((name, kind, *scalars.items(), *more))
    tensors = itertools.chain(layer.named_parameters(), layer.named_buffers())
    return (*parts, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors))


@functools.cache
def _names_layer(kind: type) -> bool:
    """Return whether the code of a forward uses the number of the layer other than as an argument."""
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
        return re.search(r"self\.layer_idx(?!\s*[,)])", source) is not None
    except (OSError, TypeError):  # the source can't be read, so it might
        return True


# -- trials ------------------------------------------------------------------------------------------------------------


class _FormTrial:
    """A comparison of compiled code with a layer: a copy of the layer, inputs of three tokens, and its results.

    The copy's norms have random weights, so that a norm that is left out, or used twice, changes the results.
    """

    def __init__(self, layer: Any, parts: Parts, dtype: torch.dtype, angles: int, scale: float) -> None:
        """Compute the tokens with a copy of ``layer``.

        Args:
            layer: the decoder layer.
            parts: names of its modules.
            dtype: type of hidden states, cos and sin.
            angles: width of cos and of sin.
            scale: mean of the norms' weights.
        """
        self.layer = twin = _twin(layer)
        self.attention = children_of(twin)[parts.attention]
        observe(self.attention)
        random, cache = torch.Generator().manual_seed(0), DynamicCache()
        for norm in (children_of(twin)[name] for name in parts.norms):
            columns = len(norm.weight)
            weight = scale * (0.5 + torch.rand(columns, generator=random))
            replace_parameters(norm, {"weight": weight.to(norm.weight.dtype)})
        self._stand_ins = [module for module in twin.modules() if isinstance(module, _ExpertsProbe)]
        self._name = next(name for name in CACHES if name in inspect.signature(type(twin).forward).parameters)
        for _ in range(3):
            x, cos, sin = (torch.randn(1, 1, size, generator=random).to(dtype) for size in (columns, angles, angles))
            here = {"attention_mask": None, "position_ids": torch.tensor([[_FAR]]), "use_cache": True}
            self._given = {"hidden_states": x, "position_embeddings": (cos, sin), **here}
            self._before = copy.deepcopy(cache)
            self._wanted = self._results(twin, cache)
            grow(cache)

    def _results(self, call: Any, cache: Any) -> list[Tensor]:
        x, *_ = self._given.values()
        named = {key: value for key, value in self._given.items() if value is not x}
        y = call(x, **named, **{self._name: cache})
        own = cache.layers[self.attention.layer_idx]
        return [y, own.keys, own.values, *(tensor for each in self._stand_ins for tensor in each.seen)]

    def agrees(self, compute: Compute) -> bool:
        """Return whether compiled code has the same results."""
        try:
            computed = self._results(functools.partial(compute, self.layer), copy.deepcopy(self._before))
        except Exception:  # the layer's parts are others than those of the form
            return False
        return all(
            isinstance(one, Tensor) and isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
            for one, two in zip(computed, self._wanted, strict=True)
        )


@torch.no_grad()
def find_form(
    layer: Any, dtype: torch.dtype, angles: int, with_form: Callable[[LayerForm], Compute]
) -> LayerForm | None:
    """Return the first form of a layer whose results agree with the layer's own; None if none does.

    Args:
        layer: the decoder layer.
        dtype: type of hidden states, cos and sin.
        angles: number of numbers in cos and in sin.
        with_form: gives the compiled code for a form. Experts modules are called as modules.
    """
    parts = parts_of(layer)
    if dtype not in FLOATS or parts is None:
        return None
    try:
        trials = [_FormTrial(layer, parts, dtype, angles, scale) for scale in _SCALES]
    except Exception:  # the layer needs other inputs, so that it is computed as before
        return None
    candidates = forms_of(layer, parts, [*variants(trials[0].attention, angles)])
    return next((form for form in candidates if all(trial.agrees(with_form(form)) for trial in trials)), None)


def _twin(module: Any) -> Any:
    """Return a copy of a layer that shares its tensors, computes as it does, and may be changed and called freely."""
    twin = copy.copy(module)
    separate(twin)
    if "quick_layer" in vars(twin):  # its class without QuickLayer
        twin.__class__ = type(twin).__mro__[2]
    if experts_modules(module).get("") is module:
        twin.__class__ = _ExpertsProbe
    for name, part in children_of(module).items():
        children_of(twin)[name] = None if part is None else _twin(part)
    return twin


class _ExpertsProbe(nn.Module):
    """Module that replaces an Experts module in a trial, and keeps its inputs."""

    seen: list[Tensor]

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return numbers that depend on all inputs: x [tokens, hidden]; experts, weights [tokens, top_k].

        The result is [tokens, hidden].
        """
        self.seen = [x.clone(), experts.clone(), weights.clone()]
        return (x * (weights.float() * (1 + experts)).sum()).to(x.dtype)
