"""Let pytest's workers be forks of one process that has imported the libraries that most tests need."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from prepared import shared

# None begins a thread. Each worker imports moetier's own modules itself: what measures coverage begins in the worker.
LIBRARIES = ("torch", "transformers.modeling_utils", "transformers.models.auto.tokenization_auto")


class ForkedWorkers:
    """A plugin of pytest, whose workers pytest-xdist then starts by this file."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        for spec in specs:
            spec.python = f"{sys.executable} {__file__}"


if __name__ == "__main__":  # with the options of an interpreter, and at last the worker's script
    sys.exit(shared("workers", *LIBRARIES).start(sys.argv[-1], stdin=0, stdout=1).wait())
