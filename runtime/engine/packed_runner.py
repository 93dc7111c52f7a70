"""Runner for architectures whose attention is moetier's own: tokens of several sequences in one forward pass.

The tokens of all tasks are one row of transformers' forward, as if they were one sequence. All modules but attention
compute each token by itself. Attention is computed sequence by sequence, with keys and values in pages. Long prompts
are computed in several passes in lockstep, layer by layer (``moe/lockstep.py``).
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import NAME, WITH_SINKS
from moetier.runtime.kernels.layer.attention_code import NO_WINDOW
from moetier.runtime.kernels.layer.masks import Band, band_mask
from moetier.runtime.kernels.layer.packing import PackedQuery, packed
from moetier.runtime.kernels.layer.paged_cache import PageMemory
from moetier.runtime.kernels.layer.pages import KeyPages
from moetier.runtime.libraries.transformers_internals import attention_of
from moetier.runtime.model.context import can_resume, has_index, has_states
from moetier.runtime.model.prefill_memory import PASS_TOKENS
from moetier.runtime.moe.experts import experts_modules, without_experts
from moetier.runtime.moe.layer_inputs import LayerInputs
from moetier.runtime.moe.lockstep import Pass, run_in_lockstep
from moetier.tiers.errors import UnsupportedModelError

from .faster_way import FasterWay
from .model_runner import ModelRunner, cache_of, stopping, windows_of
from .runner import Stopped, Task
from .sequence import Request, TokenSequence

LAYER_TYPES = {"full_attention", "sliding_attention"}  # layers of others have masks of their own
OWN_ANGLES = ("dynamic", "longrope")  # rope types whose angles depend on the length of all that is computed together


class PackedRunner(ModelRunner):
    """Computes all tasks of a step together, where that is faster than one by one, and long ones in lockstep."""

    def __init__(
        self,
        model: Any,
        pages: int,
        *,
        later_chunk: int,
        packs: bool | None = None,
        pass_tokens: int = PASS_TOKENS,
        bits: int = 16,
    ) -> None:
        """Compute at most ``later_chunk`` tokens in one forward pass, and long prompts in passes of ``pass_tokens``.

        ``packs``: whether the model ``can_pack``, in lockstep too; None: try it when several sequences or a long prompt
        come. ``bits``: those of keys and values.
        """
        super().__init__(model, pages, bits=bits)
        self.computes_together = True
        self.pass_tokens: int = pass_tokens
        self._later_chunk = later_chunk
        self._packs = self._packs_in_lockstep = packs
        self._ways = FasterWay()
        self.windows = windows_of(model)
        self.layer_inputs = LayerInputs(model)

    def run(
        self,
        tasks: list[Task],
        should_stop: Callable[[], bool],
        between: Callable[[float], object] = lambda done: None,
    ) -> list[Tensor | None]:
        """Compute tasks in one forward pass, one by one, or in lockstep. Return logits [vocabulary] as Runner says."""
        is_long = any(task.tokens > self.pass_tokens for task in tasks)
        if len(tasks) == 1 and not is_long:
            return super().run(tasks, should_stop)
        if self._packs is None:
            self._packs = can_pack(self._model)
        if is_long:
            if self._packs_in_lockstep is None:
                self._packs_in_lockstep = self._packs and can_pack(self._model, in_lockstep=True)
            return self._in_lockstep(tasks, between) if self._packs_in_lockstep else self._in_chunks(tasks, between)
        if not self._packs:
            return self._one_by_one(tasks, should_stop)
        if any(task.tokens > 1 for task in tasks):
            return self.run_together(tasks, should_stop)
        return self._ways.run(
            len(tasks),
            lambda: self.run_together(tasks, should_stop),
            lambda: self._one_by_one(tasks, should_stop),
        )

    def _one_by_one(self, tasks: list[Task], should_stop: Callable[[], bool]) -> list[Tensor | None]:
        chunks = [task.parts(self._later_chunk) for task in tasks]
        outputs = [[super(PackedRunner, self).run([part], should_stop)[0] for part in parts] for parts in chunks]
        return [
            torch.cat(of_parts) if task.scores else of_parts[-1]  # type: ignore[arg-type] # each part has scores
            for task, of_parts in zip(tasks, outputs, strict=True)
        ]

    def _in_chunks(self, tasks: list[Task], between: Callable[[float], object]) -> list[Tensor | None]:
        """Compute long tasks of a model that can't compute them in lockstep, one after the other."""
        results: list[Tensor | None] = [None] * len(tasks)
        chunks = [(number, part) for number, task in enumerate(tasks) for part in task.parts(self._later_chunk)]
        for done, (number, part) in enumerate(chunks):
            between(done / len(chunks))
            if _goes_on(part.sequence):
                with contextlib.suppress(Stopped):
                    (results[number],) = super().run([part], partial(_should_end, part.sequence))
        return results

    def _in_lockstep(self, tasks: list[Task], between: Callable[[float], object]) -> list[Tensor | None]:
        """Compute tasks in passes of ``pass_tokens`` tokens, and each layer's experts for all of them together."""
        parts = [part for task in tasks for part in task.parts(self.pass_tokens)]
        passes = [Pass(partial(self.run_together, [part], None), partial(_goes_on, part.sequence)) for part in parts]
        work = (len(experts_modules(self._model)) + 1) * len(parts)
        with torch.no_grad():
            results = run_in_lockstep(passes, lambda done: between(done / work), self.layer_inputs.freed)
        last = {part.sequence: result for part, result in zip(parts, results, strict=True)}
        return [None if (result := last[task.sequence]) is None else result[0] for task in tasks]

    def run_together(self, tasks: list[Task], should_stop: Callable[[], bool] | None) -> list[Tensor | None]:
        """Compute tasks in one forward pass. Return logits [vocabulary] as Runner says."""
        ids = [token for task in tasks for token in task.sequence.ids[task.first : task.stop]]
        positions = [position for task in tasks for position in range(task.first, task.stop)]
        ends, total = list[int](), 0
        for task in tasks:
            total += task.tokens
            ends += range(total - (task.tokens if task.scores else int(task.is_complete)), total)
        step, device = _Step(self.memory, self.windows, tasks), self._model.device
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


def _goes_on(sequence: TokenSequence) -> bool:
    return not sequence.should_end


def _should_end(sequence: TokenSequence) -> bool:
    return sequence.should_end


class _Step:
    """Pages of the tasks that are computed together."""

    def __init__(self, memory: PageMemory, windows: list[int | None], tasks: list[Task]) -> None:
        self._memory = memory
        self._windows = windows
        self._tasks = tasks
        self._pages = [KeyPages(array("q", task.pages)) for task in tasks]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of all new tokens, [1, heads, tokens, width], into their pages."""
        counts = [task.tokens for task in self._tasks]
        for task, *parts in zip(self._tasks, torch.split(keys, counts, 2), torch.split(values, counts, 2), strict=True):
            self._memory.write(layer, task.pages, task.first, *parts)

    def parts(self, layer: int, query: Tensor) -> Iterator[PackedQuery]:
        """Yield the attention of each task: query is [1, heads, tokens, width]."""
        window = self._windows[layer]
        queries = torch.split(query, [task.tokens for task in self._tasks], 2)
        for task, pages, q in zip(self._tasks, self._pages, queries, strict=True):
            first = 0 if window is None else max(0, task.first - window + 1)
            band = Band(first, window or NO_WINDOW, pages)
            mask = band_mask(task.tokens, task.stop - first, band, query.device)
            yield PackedQuery(q, *self._memory.layers[layer], mask)


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


def can_pack(model: Any, *, near: float = 0.0, in_lockstep: bool = False) -> bool:
    """Return whether a model computes tokens of several sequences together as it computes each by itself.

    It must be one that ``may_pack``, and a trial with a few tokens must give the logits of the model's own forward: the
    same bits, so that a request has the same answer in any company, or, with ``near``, nearly the same. The trial uses
    no experts, which would be read for it.

    ``near`` is the largest difference of logits, as a share of the largest logit. ``in_lockstep``: whether the
    inputs of layers are freed, as they are then.
    """
    if not may_pack(model):
        return False
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    try:
        with without_experts(model), torch.no_grad():
            return all(_is_near(*pair, near) for pair in _trial(model, vocabulary, in_lockstep=in_lockstep))
    except Exception:  # the architecture needs or gives something else
        return False


def may_pack(model: Any) -> bool:
    """Return whether a model's attention function and configuration allow what ``can_pack`` tries."""
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return (
        can_resume(model)
        and not (has_states(model) or has_index(model))
        and attention_of(model.config) in (NAME, WITH_SINKS)
        and {*(getattr(text, "layer_types", None) or ())} <= LAYER_TYPES
        and not any(part.get("rope_type") in OWN_ANGLES for part in ropes)
    )


def check_bits(model: Any, bits: int) -> None:
    """Raise UnsupportedModelError if a model can't have keys and values in ``bits`` bits.

    In 8 bits only moetier's own attention reads them: a model's code must give it what it has taken from the cache.
    """
    if bits == 8 and not (may_pack(model) and _reads_codes(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} can't have keys and values in 8 bits: its attention is not moetier's own.",
            "Leave out `kv_bits`.",
        )


def _reads_codes(model: Any) -> bool:
    """Return whether a model computes some tokens with keys and values in 8 bits, packed and through its own code."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.tensor([[number % vocabulary for number in range(5)]], device=model.device)
    try:
        with without_experts(model), torch.no_grad():
            for _ in _trial(model, vocabulary, bits=8):
                pass
            cache = cache_of(model, ids.shape[1], bits=8)
            for part in torch.split(ids, 3, 1):
                model(input_ids=part, use_cache=True, **{CACHE: cache})
    except Exception:  # attention of another width, type or device, which compiled code does not take
        return False
    return True


def _trial(
    model: Any, vocabulary: int, *, bits: int = 16, in_lockstep: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits that must be equal: those after two prompts computed in parts, and those of the model's forward."""
    prompts = [[(7 * number + 3) % vocabulary for number in range(begin, begin + 5)] for begin in (0, 40)]
    runner = PackedRunner(model, 2, later_chunk=len(prompts[0]), packs=True, bits=bits)
    sequences = [TokenSequence(Request(tuple(prompt), 1)) for prompt in prompts]
    # the first prompt but for its last token; then that token, and the whole other prompt
    runner.run_together([Task(sequences[0], 0, 4, [1])], None)
    with runner.layer_inputs.freed() if in_lockstep else contextlib.nullcontext():
        together = runner.run_together([Task(sequences[0], 4, 1, [1]), Task(sequences[1], 0, 5, [0])], None)
    for prompt, logits in zip(prompts, together, strict=True):
        assert logits is not None
        ids = torch.tensor([prompt], device=model.device)
        yield logits, model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


def _is_near(logits: Tensor, expected: Tensor, near: float) -> bool:
    """Return whether logits [vocabulary] are nearly the expected ones."""
    largest, difference = expected.float().abs().max(), (logits.float() - expected.float()).abs().max()
    return logits.shape == expected.shape and bool(difference <= near * largest)
