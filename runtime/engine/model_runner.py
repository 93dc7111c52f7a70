"""Runner for any architecture: one sequence at a time through transformers' forward, with a cache in pages.

A model that can't resume has a cache of its own for each sequence instead, which computes the whole prompt together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.paged_cache import PagedCache, PageMemory
from moetier.runtime.model.context import can_resume
from moetier.runtime.moe.experts import experts_modules

from .runner import Runner, Stopped, Task
from .sampling import Sampler, prepared
from .sequence import Sequence


class ModelRunner(Runner):
    """Computes one sequence at a time."""

    def __init__(self, model: Any, pages: int) -> None:
        self._model = model
        self.can_resume = can_resume(model)
        self.computes_together = False
        self.windows = windows_of(model) if self.can_resume else []
        self.memory = PageMemory(pages)
        self._cache = PagedCache(self.memory, self.windows)
        self._inputs: dict[Sequence, dict[str, Any]] = {}  # arguments of forward; the own cache among them, if any

    def sampler(self, sequence: Sequence) -> Sampler:
        """Return a sampler that chooses tokens as the model's ``generate()`` would."""
        self._inputs[sequence], sampler = prepared(self._model, sequence)
        return sampler

    def run(
        self,
        tasks: list[Task],
        should_stop: Callable[[], bool],
        between: Callable[[float], object] = lambda done: None,
    ) -> list[Tensor | None]:
        """Compute one task through the model's forward. Return its logits [vocabulary] as Runner says."""
        (task,) = tasks
        sequence = task.sequence
        if sequence not in self._inputs:  # it has waited for pages, or its computation has failed
            self._inputs[sequence], _ = prepared(self._model, sequence)
        inputs = self._inputs[sequence]
        if self.can_resume:
            self._cache.move(task.pages, task.begin)
            inputs[CACHE] = self._cache
        ids = torch.tensor([sequence.ids[task.begin : task.end]], device=self._model.device)
        try:
            with torch.no_grad(), stopping(self._model, should_stop if task.tokens > 1 else None):
                given = self._model.prepare_inputs_for_generation(
                    ids, **_sliced(inputs, task.begin, task.end), is_first_iteration=not task.begin
                )
                if task.scores:
                    given.pop("logits_to_keep", None)  # all
                outputs = self._model(**given, return_dict=True)
        except BaseException:
            self.end(sequence)  # the layers of a cache of its own may have different numbers of tokens
            raise
        if not self.can_resume:
            inputs[CACHE] = outputs.get(CACHE)
        return [outputs.logits[0] if task.scores else outputs.logits[0, -1] if task.is_complete else None]

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence's cache."""
        self._inputs.pop(sequence, None)

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of a page to another page."""
        self.memory.copy_page(source, target, tokens)


def windows_of(model: Any) -> list[int | None]:
    """Return, for each layer of a model that can resume, most tokens that a token attends to; None: all."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return [getattr(layer, "sliding_window", None) for layer in cache.layers]


def _sliced(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Return the arguments of forward for the tokens from ``begin`` to ``end``."""
    positions = inputs.get("position_ids")  # [..., tokens of the sequence when it began]
    if positions is None:
        return inputs
    if (more := end - positions.shape[-1]) > 0:
        further = positions[..., -1:] + torch.arange(1, more + 1, dtype=positions.dtype, device=positions.device)
        positions = inputs["position_ids"] = torch.cat([positions, further], -1)
    return {**inputs, "position_ids": positions[..., begin:end]}


@contextlib.contextmanager
def stopping(model: Any, should_stop: Callable[[], bool] | None) -> Iterator[None]:
    """Raise Stopped in the block before a block of experts if ``should_stop`` returns True."""
    if should_stop is None:
        yield
        return

    def check(*_: object) -> None:
        if should_stop():
            raise Stopped

    hooks = [module.register_forward_pre_hook(check) for module in experts_modules(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
