"""Private names of transformers. No other module uses one.

All of them are in transformers 5.23 and 5.24. If a version lacks one, tests/runtime/libraries names the line to change.
What is public, and differs between the two, is in ``runtime.generation.compat``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

# -- configurations ----------------------------------------------------------------------------------------------------


def attention_of(config: Any) -> str:
    """Return the name of the attention function of a model's config.

    It is read past the config's own ``__getattribute__``, which takes too long for each layer and token.
    """
    return object.__getattribute__(config, "_attn_implementation_internal")


def set_attention(config: Any, name: str) -> None:
    """Set the attention function of one config, and of no config within it, as the public way would."""
    config._attn_implementation_internal = name


def experts_function_of(config: Any) -> Any:
    """Return the name of the experts function that a caller has chosen in a config; None if there is none."""
    return getattr(config, "_experts_implementation_internal", None)


def set_experts_function(config: Any, name: str) -> None:
    """Set the experts function of a config and of those within it.

    PreTrainedModel.set_experts_implementation refuses a name while the model is being built.
    """
    config._experts_implementation = name


def set_experts_function_alone(config: Any, name: str) -> None:
    """Set the experts function of one config: that of an Experts module need not be within the model's."""
    config._experts_implementation_internal = name


def forget_quantised(config: Any) -> None:
    """Remove from a config that its model is quantised. With that, FalconMamba computes in another order."""
    config.__dict__.pop("_is_quantized", None)


# -- models ------------------------------------------------------------------------------------------------------------


# whether an architecture can use torch's attention; else it has a function of its own, for sinks perhaps
can_use_sdpa: Callable[[Any], bool] = attrgetter("_supports_sdpa")


def can_use_dynamic_cache(model: Any) -> bool:
    """Return whether a model generates with transformers' DynamicCache. A model that does not generate can't."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is not None and bool(supports())


def dtype_plan_of(model: Any, dtype: Any) -> dict[str, Any]:
    """Return the dtypes of the parameters that stay in another dtype than ``dtype``, by patterns of their names."""
    return dict(model._get_dtype_plan(dtype))


def mark_initialised(module: Any) -> None:
    """Keep transformers from filling a module's parameters, which fails once they are removed."""
    module._is_hf_initialized = True


def may_lack(model: Any, name: str) -> bool:
    """Return whether a model's class says that checkpoints need not have a tensor of this name."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def ignore_weights(model: Any, pattern: str) -> None:
    """Keep transformers from listing weights of a checkpoint as ones that the model does not use."""
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}


def leave_out_of_plans(model: Any, part: str) -> None:
    """Remove the parameters with ``part`` in their names from the plans for several GPUs: transformers checks them."""
    for plan in ("_tp_plan", "_ep_plan"):
        setattr(model, plan, {key: style for key, style in (getattr(model, plan) or {}).items() if part not in key})


def is_experts_class(module_class: type) -> bool:
    """Return whether a module's class has transformers' experts interface, which adds a method to it."""
    return hasattr(module_class, "_apply_gate")


def apply_gate(module: Any, x: Any) -> Any:
    """Apply the activation of an Experts module to gate and up together, [rows, 2 * columns] -> [rows, columns]."""
    return module._apply_gate(x)


# -- serving -----------------------------------------------------------------------------------------------------------


# of a ResponseParser: the text that it has got, the prompt's end first; how many of its characters are parsed; and the
# field of the response template in which it is
parsed_text: Callable[[Any], str] = attrgetter("_buffer")
parsed_length: Callable[[Any], int] = attrgetter("_pos")
parsed_field: Callable[[Any], str | None] = attrgetter("_current")


# -- imports -----------------------------------------------------------------------------------------------------------


def search_later(utils: Any) -> None:
    """Search the folder of a model when a name is used that begins with the folder's, and all for any other name.

    transformers would search 560 folders, twice, whenever it is imported. ``utils`` is its module
    transformers.utils.import_utils, before any other module of it has used the names that are replaced. Without these
    names, as another patch release may be, nothing is changed.
    """
    search: Any = getattr(utils, "define_import_structure", None)  # gives the names in a folder
    lazy_module: Any = getattr(utils, "_LazyModule", None)  # class of transformers and of its packages
    if search is None or lazy_module is None:
        return

    class Structure(dict[Any, Any]):
        """No names yet. ``left`` has a prefix for modules, and the folders in which there are names."""

        left: tuple[str, list[Path]] = "", []

    def search_later(path: str | Path, prefix: str | None = None) -> Any:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if folder.name != "models":
            return search(path, prefix=prefix)
        structure = Structure({frozenset(): {prefix: set()} if prefix else {}})
        folders = [entry for entry in folder.iterdir() if entry.suffix != ".py" and entry.name != "__pycache__"]
        structure.left = f"{prefix}." if prefix else "", folders
        return structure

    class LazyModule(lazy_module):  # type: ignore[misc]
        def __init__(self, name: str, file: str, structure: Any, *more: Any, **named: Any) -> None:
            super().__init__(name, file, structure, *more, **named)
            self._prefix, self._left = structure.left if isinstance(structure, Structure) else ("", [])

        def __getattr__(self, name: str) -> Any:
            if self._left and not name.startswith("_") and not self._knows(name):
                plain = name.lower().replace("_", "")
                self._search([entry for entry in self._left if plain.startswith(entry.name.replace("_", ""))])
                # a module beside this one may be yet to be imported
                if not self._knows(name) and f"{name}.py" not in os.listdir(Path(self.__file__).parent):  # noqa: PTH208
                    self._search(self._left)
            return super().__getattr__(name)

        def _knows(self, name: str) -> bool:
            """Return whether a name has been found, or the tokenizer for which it is another name."""
            tables = (self._class_to_module, self._modules, self._objects, self._object_missing_backend)
            return any(spelling in names for spelling in (name, name.removesuffix("Fast")) for names in tables)

        def __dir__(self) -> list[str]:
            self._search(self._left)
            return [*super().__dir__()]

        def _search(self, folders: list[Path]) -> None:
            for folder in folders:
                structure = search(folder, prefix=f"{self._prefix}{folder.name}")
                other = vars(lazy_module(self.__name__, self.__file__, structure))
                self.__all__ += other["__all__"]
                self._modules |= other["_modules"]
                for table in ("_class_to_module", "_object_missing_backend", "_import_structure"):
                    vars(self)[table].update(other[table])
            searched = {*folders}  # another thread may have searched some, too
            self._left = [folder for folder in self._left if folder not in searched]

    utils.define_import_structure, utils._LazyModule = search_later, LazyModule
