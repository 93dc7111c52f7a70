"""Runner for architectures whose attention is moetier's own: tokens of several sequences in one forward pass.

The tokens of all tasks are one row of transformers' forward, as if they were one sequence. All modules but attention
compute each token by itself. Attention is computed sequence by sequence, with keys and values in pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ManyOf
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import NAME, WITH_SINKS
from moetier.runtime.kernels.layer.attention_code import NO_WINDOW
from moetier.runtime.kernels.layer.masks import Band, band_mask
from moetier.runtime.kernels.layer.packing import Part, packed
from moetier.runtime.kernels.layer.paged_cache import PageMemory
from moetier.runtime.libraries.transformers_internals import attention_of
from moetier.runtime.model.context import can_resume
from moetier.runtime.moe.experts import without_experts

from .faster_way import FasterWay
from .model_runner import ModelRunner, stopping
from .runner import Task
from .sequence import Request, Sequence

LAYER_TYPES = {"full_attention", "sliding_attention"}  # layers of others have masks of their own
OWN_ANGLES = ("dynamic", "longrope")  # rope types whose angles depend on the length of all that is computed together


class PackedRunner(ModelRunner):
    """Computes all tasks of a step together, where that is faster than by turns."""

    def __init__(self, model: Any, pages: int) -> None:
        super().__init__(model, pages)
        self.computes_together = True
        self._ways = FasterWay()

    def run(self, tasks: ManyOf[Task], should_stop: Callable[[], bool]) -> list[Tensor | None]:
        """Compute tasks in one forward pass, or by turns. Return logits [vocabulary] as Runner says."""
        if len(tasks) == 1:
            return super().run(tasks, should_stop)
        if any(task.tokens > 1 for task in tasks):
            return self.run_together(tasks, should_stop)
        return self._ways.run(
            len(tasks),
            lambda: self.run_together(tasks, should_stop),
            lambda: [logits for task in tasks for logits in super(PackedRunner, self).run([task], should_stop)],
        )

    def run_together(self, tasks: ManyOf[Task], should_stop: Callable[[], bool]) -> list[Tensor | None]:
        """Compute tasks in one forward pass. Return logits [vocabulary] as Runner says."""
        ids = [token for task in tasks for token in task.sequence.ids[task.begin : task.end]]
        positions = [position for task in tasks for position in range(task.begin, task.end)]
        ends, total = list[int](), 0
        for task in tasks:
            total += task.tokens
            ends += range(total - (task.tokens if task.scores else int(task.is_complete)), total)
        step, device = _Step(self._memory, self.windows, tasks), self._model.device
        with torch.no_grad(), stopping(self._model, should_stop if len(ids) > len(tasks) else None), packed(step):
            logits = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                attention_mask=torch.empty(1, 1, 1, 1, device=device),  # of four dimensions: transformers makes none
                use_cache=True,
                logits_to_keep=torch.tensor(ends or [0], device=device),
                **{CACHE: _PackedCache(step)},
            ).logits[0]
        rows = iter(logits)
        return [
            torch.stack([*islice(rows, task.tokens)]) if task.scores else next(rows) if task.is_complete else None
            for task in tasks
        ]


class _Step:
    """Pages of the tasks that are computed together."""

    def __init__(self, memory: PageMemory, windows: list[int | None], tasks: ManyOf[Task]) -> None:
        self._memory = memory
        self._windows = windows
        self._tasks = tasks
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}  # by first token, end and window

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of all new tokens, [1, heads, tokens, width], into their pages."""
        counts = [task.tokens for task in self._tasks]
        for task, *parts in zip(self._tasks, torch.split(keys, counts, 2), torch.split(values, counts, 2), strict=True):
            self._memory.write(layer, task.pages, task.begin, *parts)

    def parts(self, layer: int, query: Tensor) -> Iterator[Part]:
        """Yield the attention of each task: query is [1, heads, tokens, width]."""
        window = self._windows[layer]
        queries = torch.split(query, [task.tokens for task in self._tasks], 2)
        for task, q in zip(self._tasks, queries, strict=True):
            first = 0 if window is None else max(0, task.begin - window + 1)
            if (key := (task.begin, task.end, window)) not in self._masks:
                band = Band(first, window or NO_WINDOW)
                self._masks[key] = band_mask(task.tokens, task.end - first, band, query.device)
            yield Part(q, *self._memory.read(layer, task.pages, first, task.end), self._masks[key])


class _PackedCache(Cache):
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


# -- which models ------------------------------------------------------------------------------------------------------


def can_pack(model: Any, *, near: float = 0.0) -> bool:
    """Return whether a model computes tokens of several sequences together as it computes each by itself.

    Its attention function and configuration must allow it, and a trial with a few tokens must give the logits of the
    model's own forward: the same bits, so that a request has the same answer in any company, or, with ``near``, nearly
    the same. The trial uses no experts, which would be read for it.

    ``near`` is the largest difference of logits, as a share of the largest logit.
    """
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if (
        not can_resume(model)
        or attention_of(model.config) not in (NAME, WITH_SINKS)
        or not {*(getattr(text, "layer_types", None) or ())} <= LAYER_TYPES
        or any(part.get("rope_type") in OWN_ANGLES for part in ropes)
    ):
        return False
    try:
        with without_experts(model), torch.no_grad():
            return all(_is_near(*pair, near) for pair in _trial(model, text.vocab_size))
    except Exception:  # the architecture needs or gives something else
        return False


def _trial(model: Any, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits that must be equal: those after two prompts computed in parts, and those of the model's forward."""
    prompts = [[(7 * number + 3) % vocabulary for number in range(begin, begin + 5)] for begin in (0, 40)]
    runner = PackedRunner(model, 2)
    sequences = [Sequence(Request(tuple(prompt), 1)) for prompt in prompts]
    # the first prompt but for its last token; then that token, and the whole other prompt
    runner.run_together([Task(sequences[0], 4, [1])], lambda: False)
    sequences[0].computed = 4
    together = runner.run_together([Task(sequences[0], 1, [1]), Task(sequences[1], 5, [0])], lambda: False)
    for prompt, logits in zip(prompts, together, strict=True):
        assert logits is not None
        ids = torch.tensor([prompt], device=model.device)
        yield logits, model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


def _is_near(logits: Tensor, wanted: Tensor, near: float) -> bool:
    """Return whether logits [vocabulary] are nearly the wanted ones."""
    largest, difference = wanted.float().abs().max(), (logits.float() - wanted.float()).abs().max()
    return logits.shape == wanted.shape and bool(difference <= near * largest)
