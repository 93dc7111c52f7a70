"""Runner for architectures whose attention is moetier's own: tokens of several sequences in one forward pass.

The tokens of all tasks are one row of transformers' forward, as if they were one sequence. All modules but attention
compute each token by itself. Attention is computed sequence by sequence, with keys and values in pages.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ManyOf
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import NAME, WITH_SINKS
from moetier.runtime.kernels.layer.paging import paged
from moetier.runtime.libraries.transformers_internals import attention_of
from moetier.runtime.model.budgets import kv_cache_bytes
from moetier.runtime.model.context import can_resume

from .model_runner import stopping
from .prefix_tree import PAGE
from .runner import Runner, Task
from .sampling import Sampler, prepared
from .sequence import Sequence


def can_page(model: Any) -> bool:
    """Return whether a model's attention can read keys and values from pages."""
    return can_resume(model) and attention_of(model.config) in (NAME, WITH_SINKS)


class PagedRunner(Runner):
    """Computes all tasks of a step together."""

    can_resume = True
    computes_together = True

    def __init__(self, model: Any, pages: int) -> None:
        self._model = model
        self._count = pages
        self.page_bytes = kv_cache_bytes(model.config, PAGE, dtype=model.dtype)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [pages, heads, PAGE, width] of a layer

    def sampler(self, sequence: Sequence) -> Sampler:
        """Return a sampler that chooses tokens as the model's ``generate()`` would."""
        return prepared(self._model, sequence)[1]

    def run(self, tasks: ManyOf[Task], should_stop: Callable[[], bool]) -> list[Tensor | None]:
        """Compute tasks in one forward pass. See Runner."""
        ids = [token for task in tasks for token in task.sequence.ids[task.begin : task.end]]
        positions = [position for task in tasks for position in range(task.begin, task.end)]
        ends, total = [], 0
        for task in tasks:
            total += task.tokens
            if task.is_complete:
                ends.append(total - 1)
        step = _Step(self, tasks)
        with torch.no_grad(), stopping(self._model, should_stop if len(ids) > len(tasks) else None), paged(step):
            logits = self._model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                attention_mask=torch.empty(1, 1, 1, 1),  # of four dimensions, so that transformers makes none
                use_cache=True,
                logits_to_keep=torch.tensor(ends or [0]),
                **{CACHE: _PagedCache(step)},
            ).logits[0]
        rows = iter(logits)
        return [next(rows) if task.is_complete else None for task in tasks]

    def end(self, sequence: Sequence) -> None:
        """Do nothing: all that is kept of a sequence is in its pages."""

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of a page to another page."""
        for layer in self._layers.values():
            for memory in layer:
                memory[target, :, :tokens] = memory[source, :, :tokens]

    def free_page(self, page: int) -> None:
        """Do nothing: the page's memory is used again."""

    def layer(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory of a layer. It is made for what it gets first, [1, heads, tokens, width]."""
        if number not in self._layers:
            self._layers[number] = tuple(  # type: ignore[assignment] # two tensors
                part.new_empty((self._count, part.shape[1], PAGE, part.shape[3])) for part in (keys, values)
            )
        return self._layers[number]


class _Step:
    """What attention needs to know of the tasks that are computed together."""

    def __init__(self, runner: PagedRunner, tasks: ManyOf[Task]) -> None:
        self._runner = runner
        self._tasks = tasks

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of all new tokens, [1, heads, tokens, width], into their pages."""
        memory, first = self._runner.layer(layer, keys, values), 0
        for task in self._tasks:
            at = task.begin
            while at < task.end:
                count = min(PAGE - at % PAGE, task.end - at)
                page, begin = task.pages[at // PAGE], at % PAGE
                for target, source in zip(memory, (keys, values), strict=True):
                    target[page, :, begin : begin + count] = source[0, :, first : first + count]
                at, first = at + count, first + count

    def attend(
        self, layer: int, query: Tensor, scaling: float | None, sinks: Tensor | None, window: int | None
    ) -> Tensor:
        """Compute attention of all new tokens: query [1, heads, tokens, width] -> [1, tokens, heads, values]."""
        keys, values = self._runner.layer(layer, query, query)
        outputs, first = [], 0
        for task in self._tasks:
            pages = task.pages[: -(-task.end // PAGE)]
            k, v = (torch.cat([memory[page] for page in pages], 1)[None, :, : task.end] for memory in (keys, values))
            q = query[:, :, first : first + task.tokens]
            outputs.append(_reference(q, k, v, task.begin, scaling, sinks, window))
            first += task.tokens
        return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _reference(
    q: Tensor, k: Tensor, v: Tensor, begin: int, scaling: float | None, sinks: Tensor | None, window: int | None
) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q.float() @ k.float().transpose(2, 3)) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    row = torch.arange(begin, begin + q.shape[2])[:, None]
    column = torch.arange(k.shape[2])[None]
    seen = column <= row
    if window:
        seen &= column > row - window
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)], 3)
    shares = scores.softmax(3)[..., : k.shape[2]]
    return (shares @ v.float()).to(q.dtype)


class _PagedCache(Cache):
    """Cache for one step: keys and values of new tokens go into pages."""

    def __init__(self, step: _Step) -> None:
        super().__init__(layers=[])
        self._step = step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of new tokens, [1, heads, tokens, width]. Attention reads them from the pages."""
        self._step.write(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: the positions of all tokens are given."""
        return 0
