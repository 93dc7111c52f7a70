"""Runner for any architecture: transformers' forward with a cache of its own for each sequence.

The cache is made from pages when a sequence begins, and what it gets is written into pages. So a running sequence has
its keys and values twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ManyOf
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.growing_cache import grow
from moetier.runtime.model.budgets import kv_cache_bytes
from moetier.runtime.model.context import can_resume
from moetier.runtime.moe.experts import experts_modules

from .prefix_tree import PAGE
from .runner import Runner, Stopped, Task
from .sampling import Sampler, prepared
from .sequence import Sequence

Page = list[tuple[Tensor, Tensor]]  # for each layer: keys [heads, PAGE, width] and values [heads, PAGE, width]


class ModelRunner(Runner):
    """Computes one sequence at a time through a model's forward."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.can_resume = can_resume(model)
        self.computes_together = False
        self.page_bytes = kv_cache_bytes(model.config, PAGE, dtype=model.dtype)
        self._pages: dict[int, Page] = {}
        self._inputs: dict[Sequence, dict[str, Any]] = {}  # arguments of forward, the cache among them

    def sampler(self, sequence: Sequence) -> Sampler:
        """Return a sampler that chooses tokens as the model's ``generate()`` would."""
        return prepared(self._model, sequence)[1]

    def run(self, tasks: ManyOf[Task], should_stop: Callable[[], bool]) -> list[Tensor | None]:
        """Compute one task through the model's forward. See Runner."""
        (task,) = tasks
        sequence, begin = task.sequence, task.sequence.computed
        end = begin + task.tokens
        try:
            if sequence not in self._inputs:
                self._inputs[sequence] = self._open(task)
            inputs = self._inputs[sequence]
            ids = torch.tensor([sequence.ids[begin:end]], device=self._model.device)
            with torch.no_grad(), stopping(self._model, should_stop if task.tokens > 1 else None):
                given = self._model.prepare_inputs_for_generation(
                    ids, **_sliced(inputs, begin, end), is_first_iteration=not begin
                )
                outputs = self._model(**given, return_dict=True)
        except BaseException:
            self.end(sequence)  # its layers may have different numbers of tokens
            raise
        inputs[CACHE] = outputs.get(CACHE)
        if self.can_resume:
            self._write(inputs[CACHE], task.pages, begin)
        return [outputs.logits[0, -1] if task.is_complete else None]

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence's cache."""
        self._inputs.pop(sequence, None)

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of a page to another page."""
        copies = [(torch.empty_like(keys), torch.empty_like(values)) for keys, values in self._pages[source]]
        for new, old in zip(copies, self._pages[source], strict=True):
            for copy, original in zip(new, old, strict=True):
                copy[:, :tokens] = original[:, :tokens]
        self._pages[target] = copies

    def free_page(self, page: int) -> None:
        """Forget the contents of a page."""
        self._pages.pop(page, None)

    def _open(self, task: Task) -> dict[str, Any]:
        """Return the arguments of forward for a sequence, whose cache has the tokens that are computed."""
        inputs, _ = prepared(self._model, task.sequence)
        if not self.can_resume:
            return inputs
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        inputs[CACHE] = cache
        grow(cache)
        begin = task.sequence.computed
        if begin:
            pages = [self._pages[page] for page in task.pages[: -(-begin // PAGE)]]
            for number, parts in enumerate(zip(*pages, strict=True)):
                keys, values = (torch.cat(tensors, 1)[None, :, :begin] for tensors in zip(*parts, strict=True))
                cache.layers[number].update(keys, values)
        for layer in cache.layers:
            layer.new = []
        return inputs

    def _write(self, cache: Any, pages: list[int], begin: int) -> None:
        """Write what a cache has got since the last time into the pages of a sequence, from token ``begin`` on."""
        for number, layer in enumerate(cache.layers):
            new = [torch.cat(parts, -2)[0] for parts in zip(*layer.new, strict=True)]
            layer.new.clear()
            at = begin
            while at < begin + new[0].shape[1]:
                count = min(PAGE - at % PAGE, begin + new[0].shape[1] - at)
                page = self._pages.setdefault(pages[at // PAGE], [])
                if number == len(page):
                    keys, values = (part.new_empty((part.shape[0], PAGE, part.shape[2])) for part in new)
                    page.append((keys, values))
                for memory, part in zip(page[number], new, strict=True):
                    memory[:, at % PAGE : at % PAGE + count] = part[:, at - begin : at - begin + count]
                at += count


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
