"""Environment variables for libraries of torch, which read them when torch is loaded. Imports nothing large."""

from __future__ import annotations

import os
import sys

# name, value, and another variable by which a user may have decided instead
VARIABLES = (
    # OpenMP's threads spin while they wait. Beside another busy process they take the core from the thread that they
    # wait for. So they sleep after some microseconds.
    ("GOMP_SPINCOUNT", "2000", "OMP_WAIT_POLICY"),
    # oneDNN, and torch's layer above it, keep compiled products by their numbers of rows: up to 1024 of them, a third
    # of a MiB each. A forward pass needs some ten at a time, and prompts of new lengths need new ones.
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32", "DNNL_PRIMITIVE_CACHE_CAPACITY"),
    ("LRU_CACHE_CAPACITY", "32", ""),
)


def set_variables() -> None:
    """Set those of VARIABLES that the user has not set, unless torch is loaded."""
    if "torch" not in sys.modules:
        os.environ |= {name: value for name, value, other in VARIABLES if not {name, other} & os.environ.keys()}
