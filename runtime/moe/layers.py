"""Compute a decoder layer for one token in two calls of compiled code: up to the choice of experts, and the experts.

Python and torch between the modules take longer than norms, router and additions themselves. A trial with a layer's
first token shows whether the layer can be computed so: its result, its cache, and the inputs of its experts must be the
same, bit for bit, as those of the architecture's own code, which calls the modules one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moetier.runtime.kernels.jit.team import Program
from moetier.runtime.kernels.layer.attention_tasks import AttentionTasks, Token, token_of
from moetier.runtime.kernels.layer.norm import MORE, SUM, X, Y, norm_task
from moetier.runtime.kernels.layer.packing import packed_step
from moetier.runtime.kernels.layer.routing import RoutingTasks
from moetier.runtime.kernels.products.api import CPU, is_readable
from moetier.runtime.libraries.torch_internals import children_of, hooks_after, hooks_before, without_subclasses

from .gates import Observer
from .layer_forms import LayerForm, find_form, key_of, parts_of
from .quick import forward_token, is_row_like
from .routers import quick_class, tensors_of
from .snapshot import MAX_TRIALS, Snapshot, has_global_hooks, hooks_of


class QuickLayer:
    """Base class that is put before a decoder layer's own class, so that its ``forward`` is called first.

    For inputs that ``OneTokenLayer`` refuses, the module computes as before.
    """

    quick_layer: OneTokenLayer

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Compute as the architecture does: [batch, tokens, hidden]."""
        y = self.quick_layer.compute(self, *arguments, **named)
        return super().forward(*arguments, **named) if y is None else y  # type: ignore[misc]


class OneTokenLayer:
    """A decoder layer for one token of one sequence. Threads may use it at the same time, for different caches."""

    def __init__(self, known: dict[Any, LayerForm | None]) -> None:
        """``known``: forms of layers that were tried. Layers that differ only in their weights are tried once."""
        self._known = known
        self._keys: set[Any] = set()  # of the trials whose results this layer has used
        # ``call``: the thread's _Call. ``refused``: kind of inputs for which the layer has no form
        self._local = threading.local()

    def __deepcopy__(self, _: Any) -> OneTokenLayer:
        return OneTokenLayer(self._known)

    def compute(
        self, layer: Any, hidden_states: Tensor | None = None, *more: Any, position_embeddings: Any = None, **named: Any
    ) -> Tensor | None:
        """Compute a layer for hidden_states [1, 1, hidden], and append the token's key and value to the cache.

        Returns [1, 1, hidden]. Returns None, and changes nothing, for inputs that can't be computed so.
        """
        x, angles = hidden_states, position_embeddings
        if type(x) is not Tensor or more or layer.training or x.shape[:-1] != (1, 1) or torch.is_grad_enabled():
            return None
        if not isinstance(angles, tuple) or not angles or not isinstance(angles[0], Tensor):
            return None
        if packed_step() is not None:  # its attention is that of other pages, in a trial, too
            return None
        kind = (x.dtype, angles[0].numel())
        if getattr(self._local, "refused", None) == kind:
            return None
        call: _Call | None = getattr(self._local, "call", None)
        with without_subclasses():  # attributes of a RowWeight are torch functions
            holds = call is not None and call.kind == kind and call.snapshot.holds(layer)
        if call is None or not holds:
            if call is not None and call.snapshot.has_hooks():  # they may stay, and a new snapshot takes long
                return None
            if (call := self._new_call(layer, kind)) is None:
                return None
            self._local.call = call
        token = token_of(call.attention, call.form.sizes, x, angles, **named)
        if token is None or x.shape[-1] != call.columns or not call.is_only_observed():
            return None
        if (states := call.run(x, token)) is None:
            return None
        token.layer.extend()
        return self._rest(call, *states)

    def _new_call(self, layer: Any, kind: tuple[torch.dtype, int]) -> _Call | None:
        """Return the steps of a layer; None if it has hooks that must be called, or no form."""
        if has_global_hooks():  # they would be called in a trial, too
            return None
        with without_subclasses():
            key = (*kind, *key_of(layer))
        form = None
        if key in self._keys or len(self._keys) < MAX_TRIALS:
            self._keys.add(key)
            if key not in self._known:
                with CPU:
                    self._known[key] = find_form(layer, *kind, lambda form: _Tried(form).compute)
            form = self._known[key]
        if form is None:
            self._local.refused = kind
            return None
        call = _Call(layer, form, kind)
        return call if call.snapshot.holds(layer) else None

    def _rest(self, call: _Call, total: Tensor, normed: Tensor) -> Tensor:
        """Compute the block, and return its result plus ``total``, [1, 1, hidden].

        ``total`` is the residual stream before the second norm, and ``normed`` the norm's result.
        """
        is_observed = any(call.observed)
        if is_observed:
            call.tell(0, call.second, (total,), {})
        if (routed := call.routed) is None:
            y = call.block(normed)
        else:
            if is_observed:
                logits = routed.logits.to(routed.logit_dtype)
                call.tell(1, call.router, (routed.row,), (logits, routed.weights, routed.experts))
                call.tell(2, call.experts, (routed.row, routed.experts, routed.weights), {})
            if call.shared is None and call.form.factor == 1.0:
                return self._mix(call, routed, total)
            # a module may keep or change what it gets, and the next token overwrites ``normed``
            y = self._mix(call, routed, None if call.shared is None else call.shared(normed.clone()))
        found: Tensor = total + (y if call.form.factor == 1.0 else y * call.form.factor)
        return found

    def _mix(self, call: _Call, routed: _Routed, more: Tensor | None) -> Tensor:
        """Compute the experts, and add ``more`` [1, 1, hidden] if it is given. Return the sum, or [1, hidden]."""
        # what a module has returned may be of any type and shape; then torch adds it
        added = more if more is call.total or (more is not None and is_row_like(more, routed.row)) else None
        y = forward_token(call.experts, routed.row, routed.chosen.tolist(), routed.weights, added)
        if y is None:
            y, added = call.experts.forward(routed.row, routed.experts, routed.weights), None
        found: Tensor = y if more is None or more is added else more + y
        return found


class _Routed(NamedTuple):
    """The input and the results of a layer's router. Each run of the layer overwrites them."""

    row: Tensor  # [1, hidden]
    logits: Tensor  # [1, experts]
    logit_dtype: torch.dtype  # of the logits that the router itself returns
    weights: Tensor  # [1, top_k]
    experts: Tensor  # [1, top_k], int64
    chosen: Any  # ``experts[0]`` as an array of numpy


class _Steps(NamedTuple):
    """The program of a layer's steps, and what it was made for."""

    variant: tuple[int, int, bool]  # threads of torch, those of the attention, and whether keys are in 8 bits
    attention: AttentionTasks
    program: Program
    routed: _Routed | None  # None without a router


class _Call:
    """The steps of a layer up to its block, which are made once for each thread."""

    def __init__(self, layer: Any, form: LayerForm, kind: tuple[torch.dtype, int]) -> None:
        """``kind``: type of x, number of angles."""
        self.form, self.kind = form, kind
        self.attention, self._first, self.second, self.block = (children_of(layer)[name] for name in form[:4])
        inner: Any = children_of(self.block)
        self.router, self.experts, self.shared = (inner.get(name) for name in (form.router, form.experts, form.shared))
        # hooks by id, of the second norm, and of the router and the Experts module if there are these
        self.observed: list[Mapping[int, Any]] = [hooks_before(self.second)]
        if self.router is not None and self.experts is not None:
            self.observed += [hooks_after(self.router), hooks_before(self.experts)]
        called = self.block if self.router is None else self.shared
        self.snapshot = Snapshot(layer, without=[] if called is None else [called], watched=self.observed)
        # torch calls hooks in what is called, but the layer's own code may give it other shapes, or in another order
        self.called_hooks = [] if called is None else hooks_of(called.modules())
        self.columns = len(self.second.weight)
        self._states = [torch.empty(1, 1, self.columns, dtype=kind[0], device=CPU) for _ in range(4)]
        self.total = self._states[0]  # residual stream before the second norm. Each run overwrites it
        self._before = norm_task(self._first, adds=False)
        self._between = norm_task(self.second, adds=True, factor=form.factor)
        self._before.context[Y], self._between.context[MORE] = (self._states[i].data_ptr() for i in (2, 3))
        self._steps: _Steps | None = None  # those of the latest run

    @property
    def routed(self) -> _Routed | None:
        """The router's results in the latest run; None without a router."""
        return None if self._steps is None else self._steps.routed

    def _prepare(self, variant: tuple[int, int, bool]) -> _Steps | None:
        """Make the program for numbers of threads, and for keys and values in 8 bits or not.

        Returns None if parts have been replaced by some that only the architecture's code takes.
        """
        for weight in (self._first.weight, self.second.weight):
            if (weight.dtype, weight.shape) != (self.kind[0], (self.columns,)) or not is_readable(weight):
                return None
        _, threads, has_codes = variant
        tasks = AttentionTasks.of(self.attention, self.form.sizes, self.kind[0], threads, has_codes=has_codes)
        if tasks is None or tasks.columns != self.columns:
            return None
        tasks.bind(*(self._states[i].data_ptr() for i in (2, 3)))
        all_, routed = [self._before, *tasks.tasks, self._between], None
        if self.router is not None:
            routing = self.router.quick_router.routing(self.router, self.kind[0])
            tensors = tensors_of(self.router, self.block)
            if routing is None or not routing.can_route(*tensors) or tensors[0].shape[1] != self.columns:
                return None
            choice = RoutingTasks(routing.variant, self.kind[0], *tensors)
            logits, weights, experts = choice.bind(self._states[1], *tensors)
            self._write(*self._states[:2])
            logit_dtype, row = routing.variant.logit_dtype, self._states[1][0]
            routed = _Routed(row, logits, logit_dtype, weights, experts, experts[0].numpy())
            all_ += choice.tasks
        return _Steps(variant, tasks, Program(all_), routed)

    def _write(self, total: Tensor, normed: Tensor) -> None:
        self._between.context[SUM], self._between.context[Y] = total.data_ptr(), normed.data_ptr()

    def tell(self, place: int, *given: Any) -> None:
        """Call the hooks on the second norm (0), the router (1) or the Experts module (2)."""
        for hook in [*self.observed[place].values()]:  # a hook may remove others
            hook(*given)

    def is_only_observed(self) -> bool:
        """Return whether all hooks on these modules, and in what is called, are Observers, which change nothing."""
        if not any(self.observed) and not any(self.called_hooks):
            return True
        all_ = (*self.observed, *self.called_hooks)
        return all(isinstance(hook, Observer) for hooks in all_ for hook in hooks.values())

    def run(self, x: Tensor, token: Token) -> tuple[Tensor, Tensor] | None:
        """Compute x [1, 1, hidden]. Return the residual stream before and after the second norm, [1, 1, hidden] each.

        If the steps include the router, the next token overwrites both. Returns None, and changes nothing, if the
        layer's parts don't fit the form.
        """
        variant, steps = (torch.get_num_threads(), token.threads, token.has_codes), self._steps
        if steps is None or steps.variant != variant:
            with without_subclasses():
                if (steps := self._prepare(variant)) is None:
                    return None
            self._steps = steps
        total, normed = self._states[:2]
        if self.router is None:
            total, normed = torch.empty_like(x), torch.empty_like(x)
            self._write(total, normed)
        self._before.context[X] = self._between.context[X] = x.data_ptr()
        steps.attention.at(token)
        steps.program.run()
        return total, normed


# -- which layers ------------------------------------------------------------------------------------------------------


def use_quick_layers(model: PreTrainedModel) -> None:
    """Add QuickLayer to the class of each module that may have a LayerForm. The first token tries each of them.

    The classes of norms and routers must have QuickNorm and QuickRouter already.
    """
    known: dict[Any, LayerForm | None] = {}
    for module in [*model.modules()]:
        if parts_of(module) is not None:
            module.__dict__["quick_layer"] = OneTokenLayer(known)
            module.__class__ = quick_class(QuickLayer, type(module))  # type: ignore[arg-type] # classes have a hash


class _Tried(OneTokenLayer):
    """A layer in a trial, with a form that may be wrong."""

    def __init__(self, form: LayerForm) -> None:
        super().__init__({})
        self._form = form

    def _new_call(self, layer: Any, kind: tuple[torch.dtype, int]) -> _Call | None:
        return _Call(layer, self._form, kind)

    def _mix(self, call: _Call, routed: _Routed, more: Tensor | None) -> Tensor:
        y: Tensor = call.experts(routed.row, routed.experts, routed.weights)
        return y if more is None else more + y
