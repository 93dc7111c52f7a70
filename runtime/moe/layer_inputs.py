"""Free the inputs of decoder layers as soon as nothing reads them.

transformers' forward keeps a layer's input until the layer has ended. Forward passes that go on in lockstep all wait in
the same layer (``lockstep.py``), so that their inputs would take as much memory as a third of all other states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from threading import get_ident
from typing import Any

from torch import Tensor

from moetier.runtime.libraries.torch_internals import GLOBAL_HOOKS, children_of

from .experts import experts_modules
from .gates import Observer
from .snapshot import hooks_of


class LayerInputs:
    """The inputs of a model's decoder layers with experts."""

    def __init__(self, model: Any) -> None:
        # for each its Experts module, and the hooks that may get its input
        self._layers: list[tuple[Any, Any, list[Mapping[int, Any]]]] = []
        for path, experts in experts_modules(model).items():
            if layer := _layer_of(path):
                module = model.get_submodule(layer)
                givers = [*_givers(model, layer), module]
                hooks = hooks_of(inner for giver in givers for inner in giver.modules())
                self._layers.append((module, experts, hooks))

    @contextlib.contextmanager
    def freed(self) -> Iterator[None]:
        """Free each layer's input when its experts are called, in forward passes of this thread within the block.

        A tensor that is freed has no elements any more. Views of it stay as they are, and keep the memory. A trial has
        to show that the model's code does not use it any more. Inputs that a hook may keep stay, unless all such hooks
        are Observers: a hook of the layer, of a module in it, or of the modules before it, whose output the input is.
        """
        own, inputs = get_ident(), list[Tensor]()  # ``inputs``: that of the layer which is being computed

        def note(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = arguments[0] if arguments else named.get("hidden_states")
            inputs[:] = [given] if isinstance(given, Tensor) else []

        def free(*_: object) -> None:
            while inputs:
                inputs.pop().set_()  # type: ignore[call-overload] # without a source, the tensor becomes empty

        def on_own_thread(call: Callable[..., None]) -> Observer:  # hooks are called by all threads
            return Observer(lambda *given: call(*given) if get_ident() == own else None, lambda *given: given)

        hooks = []
        for layer, experts, others in self._layers:
            if all(isinstance(hook, Observer) for own_ in (*others, *GLOBAL_HOOKS) for hook in own_.values()):
                hooks.append(layer.register_forward_pre_hook(on_own_thread(note), with_kwargs=True))
                hooks.append(experts.register_forward_pre_hook(on_own_thread(free)))
        try:
            yield
        finally:
            inputs.clear()
            for hook in hooks:
                hook.remove()


def _givers(model: Any, path: str) -> list[Any]:
    """Return the modules whose output may be the input of the decoder layer at ``path``.

    These are the layer before it, or for the first one all modules beside the list of layers, such as the embedding.
    """
    of_list, _, number = path.rpartition(".")
    layers = children_of(model.get_submodule(of_list))
    names = [*layers]
    if place := names.index(number):
        return [layers[names[place - 1]]]
    parent, _, name = of_list.rpartition(".")
    return [
        child
        for other, child in children_of(model.get_submodule(parent)).items()
        if other != name and child is not None
    ]


def _layer_of(path: str) -> str:
    """Return the path of the decoder layer that has the Experts module at ``path``; "" if it is not in a list."""
    parts = path.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
