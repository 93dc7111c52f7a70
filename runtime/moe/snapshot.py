"""Snapshots, which detect that a module changed since its kernels were made, and trials of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, Generic, TypeVar

from torch import Tensor

from moetier.runtime.libraries.torch_internals import (
    GLOBAL_HOOKS,
    buffers_of,
    children_of,
    hooks_after,
    hooks_before,
    parameters_of,
)

# Most trials of one module with different scalars. One may change at every call, such as a counter in a user's own
# class, and trials take long. So a module keeps its own code once it would be tried again.
MAX_TRIALS = 4

Result = TypeVar("Result")


class Snapshot:
    """List of a module's parts at some time: the modules within it, their classes, attributes and tensors.

    It has the scalars of the module itself (``scalars_of``) and of configurations, too. It has references to the parts,
    but none to the module.
    """

    def __init__(self, module: Any, *, without: Sequence[Any] = (), watched: Sequence[Any] = ()) -> None:
        """Record how a module's parts are now.

        Args:
            module: the module.
            without: parts that are ignored with all their own parts, because the caller calls them as modules.
            watched: dictionaries of hooks that are ignored, because the caller calls these hooks.
        """
        left_out = [inner for part in without for inner in part.modules()]
        parts = [part for part in module.modules() if not any(part is other for other in (module, *left_out))]
        entries: list[tuple[dict[str, Any], str, Any]] = [
            (children_of(module), *pair) for pair in children_of(module).items()
        ]
        for inner in (own(part) for part in parts for own in (children_of, parameters_of, buffers_of)):
            entries += [(inner, *pair) for pair in inner.items()]
        configs = {id(config): vars(config) for part in parts if (config := vars(part).get("config")) is not None}
        self._children, self._parts, self._scalars = children_of(module), parts, scalars_of(module)
        self._attributes = [*map(vars, parts), *configs.values()]
        # a part that has a ``forward`` of its own is never as it was
        self._copies = [{name: own[name] for name in own if name != "forward"} for own in self._attributes]
        self._kinds = [*map(type, parts)]
        self._dictionaries, self._names, self._values = zip(*entries, strict=True)
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        self._matrices = [tensor for tensor in self._tensors if tensor.dim() > 1]
        self._lies = _lies(self._matrices)
        hooks = [*hooks_of(parts), *GLOBAL_HOOKS]
        self._hooks = [hook for hook in hooks if not any(hook is other for other in watched)]

    def holds(self, module: Any) -> bool:
        """Return whether a module's parts are as they were, and have no hooks and no ``forward`` of their own."""
        return (
            children_of(module) is self._children
            and not self.has_hooks()
            and [*map(type, self._parts)] == self._kinds
            and all(map(is_, map(dict.get, self._dictionaries, self._names), self._values))
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and _lies(self._matrices) == self._lies
            and self._has_same_attributes(module)
        )

    def _has_same_attributes(self, module: Any) -> bool:
        try:  # values that are the same objects are equal
            return has_scalars(module, self._scalars) and self._attributes == self._copies
        except Exception:  # others may be tensors, which can't be compared so
            return False

    def has_hooks(self) -> bool:
        """Return whether the module, or a module in it, has hooks now."""
        return any(self._hooks)


def _lies(matrices: Sequence[Tensor]) -> list[Any]:
    """Return how matrices lie in memory. ``weight.data = weight.data.T`` changes that, and not their addresses."""
    return [*map(Tensor.size, matrices), *map(Tensor.stride, matrices)]


def hooks_of(modules: Iterable[Any]) -> list[Mapping[int, Any]]:
    """Return the dictionaries of the hooks that torch calls before and after each module."""
    return [hooks for module in modules for hooks in (hooks_after(module), hooks_before(module))]


def has_global_hooks() -> bool:
    """Return whether there are hooks that torch calls before or after every module."""
    return any(GLOBAL_HOOKS)


class Trials(Generic[Result]):
    """Cache of what trials of one module have found: a result for each set of its scalars (``scalars_of``).

    Thread-safe: if two threads try at once, one result is kept.
    """

    def __init__(self) -> None:
        self._results: dict[Any, Result | None] = {}
        self._last: tuple[dict[str, Any], Result | None] | None = None  # scalars, and the result for them

    def result(self, module: Any, trial: Callable[[], Result | None]) -> Result | None:
        """Return the result of ``trial`` with the module's present scalars. It is called if there is none yet.

        After MAX_TRIALS trials, returns None for any other scalars, and from then on.
        """
        if (last := self._last) is None or not has_scalars(module, last[0]):
            scalars = frozenset(scalars_of(module).items())
            if scalars in self._results or len(self._results) < MAX_TRIALS:
                if scalars not in self._results:
                    self._results[scalars] = trial()
                last = scalars_of(module), self._results[scalars]  # a trial may count calls, too
            else:
                last = {}, None
            self._last = last
        return last[1]


def has_scalars(part: Any, scalars: Mapping[str, Any]) -> bool:
    """Return whether a module or a configuration has these attributes, as ``scalars_of`` returns them."""
    try:
        return bool(scalars.items() <= vars(part).items())
    except Exception:  # one is now a tensor, which can't be compared so
        return False


def scalars_of(part: Any) -> dict[str, Any]:
    """Return the attributes of a module or a configuration that are numbers, strings or None."""
    return {name: value for name, value in vars(part).items() if value is None or isinstance(value, int | float | str)}
