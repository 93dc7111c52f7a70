"""Run Mixture-of-Experts language models on machines that are too small for them.

The public names are imported when they are first used, so that ``import moetier`` costs no torch:

    load(DIR, ram=..., device_memory=..., device=...)  -> (model, tokenizer)
    register(ram=..., exact=..., daemon=...)           afterwards plain from_pretrained(DIR) works
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from .tiers.exports import exports

if TYPE_CHECKING:
    __version__: str
    from .runtime.model.load import load as load
    from .runtime.model.register import register as register
    from .tiers.errors import MoetierError as MoetierError

# OpenMP reads this when torch is loaded. Its threads wait for the next product by spinning; beside another busy process
# they would keep from the core the very thread that they wait for. After some microseconds they are to sleep.
_SPIN = "2000"
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = _SPIN

_exported = exports(
    __name__,
    {"MoetierError": "tiers.errors", "load": "runtime.model.load", "register": "runtime.model.register"},
)

__all__ = ["MoetierError", "__version__", "load", "register"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("moetier")
    return _exported(name)


def __dir__() -> list[str]:
    return sorted(__all__)
