"""Free the inputs of decoder layers as soon as nothing reads them.

transformers' forward keeps a layer's input until the layer has ended. Forward passes that go on in lockstep all wait in
the same layer (``lockstep.py``), so that their inputs would take as much memory as a third of all other states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from moetier.runtime.libraries.torch_internals import hooks_after

from .experts import experts_modules


class LayerInputs:
    """The inputs of a model's decoder layers with experts."""

    def __init__(self, model: Any) -> None:
        modules = experts_modules(model)
        self._layers = {path: model.get_submodule(layer) for path in modules if (layer := _layer_of(path))}
        self._experts = [modules[path] for path in self._layers]
        self._input: Tensor | None = None  # of the layer that is being computed

    @contextlib.contextmanager
    def freed(self) -> Iterator[None]:
        """Free each layer's input when its experts are called, in forward passes within the block.

        A tensor that is freed has no elements any more. Views of it stay as they are, and keep the memory. A trial has
        to show that the model's code does not use it any more. Layers with hooks that get their input keep it.
        """
        hooks = [
            layer.register_forward_pre_hook(self._note, with_kwargs=True)
            for layer in self._layers.values()
            if not hooks_after(layer)
        ]
        hooks += [experts.register_forward_pre_hook(self._free) for experts in self._experts]
        try:
            yield
        finally:
            self._input = None
            for hook in hooks:
                hook.remove()

    def _note(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = arguments[0] if arguments else named.get("hidden_states")
        self._input = given if isinstance(given, Tensor) else None

    def _free(self, *_: object) -> None:
        given, self._input = self._input, None
        if given is not None:
            given.set_()  # type: ignore[call-overload] # without a source, the tensor becomes empty


def _layer_of(path: str) -> str:
    """Return the path of the decoder layer that has the Experts module at ``path``; "" if it is not in a list."""
    parts = path.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
