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

# Variables that libraries of torch read when torch is loaded: each with its value, and with other variables by which a
# user may have decided instead.
_FOR_TORCH = (
    # OpenMP's threads spin while they wait. Beside another busy process they take the core from the thread that they
    # wait for. So they sleep after some microseconds.
    ("GOMP_SPINCOUNT", "2000", "OMP_WAIT_POLICY"),
    # oneDNN, and torch's layer above it, keep compiled products by their numbers of rows: up to 1024 of them, a third
    # of a MiB each. A forward pass needs some ten at a time, and prompts of new lengths need new ones.
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32", "DNNL_PRIMITIVE_CACHE_CAPACITY"),
    ("LRU_CACHE_CAPACITY", "32", ""),
)
if "torch" not in sys.modules:
    os.environ |= {name: value for name, value, other in _FOR_TORCH if not {name, other} & os.environ.keys()}

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
