"""The environment of another engine: without the variables that moetier sets for torch."""

from __future__ import annotations

import os

from moetier.runtime.libraries.torch_variables import VARIABLES


def remove_own_variables() -> None:
    """Remove the variables that ``import moetier`` has set for torch, here or in the process that started this one.

    Call this before torch is loaded: the other engine then runs as it does for its own users. A variable is taken for
    moetier's if it has moetier's value.
    """
    for name, value, _ in VARIABLES:
        if os.environ.get(name) == value:
            del os.environ[name]
