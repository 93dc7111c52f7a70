"""A model to which the tiers could not be attached leaves nothing open, even while its error is kept."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from threads import wait_until
from transformers import MixtralForCausalLM

import moetier
from moetier.tiers.errors import BudgetError


def held() -> tuple[set[str], int, int]:
    """Return the threads, the number of descriptors, and that of mapped arenas."""
    threads = {thread.name for thread in threading.enumerate() if not thread.name.startswith("moetier-kernels")}
    arenas = Path("/proc/self/maps").read_text().count("moetier-arena")
    return threads, len(list(Path("/proc/self/fd").iterdir())), arenas


class Hookless(MixtralForCausalLM):
    """A user's model that refuses the last hook that is put on it."""

    def register_forward_pre_hook(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("no hooks, please")


def test_a_failure_at_the_end_closes_all(tinymix_4bit: Path) -> None:
    moetier.register(daemon=None, speculate="always")
    try:
        moetier.load(tinymix_4bit, daemon=None)[0].tiers.close()  # imports what loading imports
        gc.collect()
        wait_until(lambda: not any(name.startswith("moetier") for name in held()[0]))
        before = held()
        with pytest.raises(RuntimeError, match="no hooks, please") as caught:
            Hookless.from_pretrained(tinymix_4bit)
        assert held() == before
        assert caught.value.__traceback__ is not None, "its frames refer to the model, so no collector has closed it"
    finally:
        moetier.register()


def test_a_failed_load_leaves_the_number_of_threads(tinymix_4bit: Path) -> None:
    torch.set_num_threads(before := torch.get_num_threads() + 1)
    with pytest.raises(BudgetError):
        moetier.load(tinymix_4bit, ram="1KiB", threads=1, daemon=None)
    assert torch.get_num_threads() == before
