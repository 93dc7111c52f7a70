"""Runner for any architecture: one sequence at a time through transformers' forward, with a cache in pages.

A model that can't resume has a cache of its own for each sequence instead, which computes the whole prompt together.
One with states besides keys and values resumes from a copy of them (``kv_cache``).
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.paged_cache import PagedCache, PageMemory, StatePart
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.model.context import can_resume, has_states
from moetier.runtime.moe.experts import experts_modules

from .kv_cache import StateMemory
from .runner import Runner, Stopped, Task
from .sampling import Sampler, prepared
from .sequence import TokenSequence

ALIGNMENT = 8  # bytes: the size of the largest type
HEAD = struct.Struct("<Q")  # bytes of the JSON that a copy of a state begins with


class ModelRunner(Runner):
    """Computes one sequence at a time."""

    def __init__(self, model: Any, pages: int, *, bits: int = 16) -> None:
        """Compute with ``pages`` pages of keys and values in ``bits`` bits: 8, or 16 for those of any type."""
        self._model = model
        self.can_resume = can_resume(model)
        self.computes_together = False
        self._has_states = self.can_resume and has_states(model)
        self.memory = PageMemory(pages, bits=bits)
        self._inputs: dict[TokenSequence, dict[str, Any]] = {}  # arguments of forward; the own cache among them, if any
        self._caches: dict[TokenSequence, PagedCache] = {}  # if the model can resume

    def begin(self, sequence: TokenSequence) -> Sampler:
        """Prepare the inputs of a sequence. Return a sampler that chooses tokens as the model's ``generate()`` does."""
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
            inputs[CACHE] = self._cache_of(task)
        ids = torch.tensor([sequence.ids[task.first : task.stop]], device=self._model.device)
        try:
            with torch.no_grad(), stopping(self._model, should_stop if task.tokens > 1 else None):
                given = self._model.prepare_inputs_for_generation(
                    ids, **_sliced(inputs, task.first, task.stop), is_first_iteration=not task.first
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

    def _cache_of(self, task: Task) -> PagedCache:
        """Return the cache of a task's sequence, with the tokens before the task. Its state must be there."""
        cache = self._caches.get(task.sequence)
        if cache is None or not task.first:
            assert not (task.first and self._has_states), "the state of the sequence was lost"
            cache = self._caches[task.sequence] = PagedCache(self.memory, cache_layers(self._model))
        cache.resume_at(task.pages, task.first)
        return cache

    def end(self, sequence: TokenSequence) -> None:
        """Forget a sequence's cache."""
        self._inputs.pop(sequence, None)
        self._caches.pop(sequence, None)

    @property
    def state_memory(self) -> StateMemory | None:
        """This runner, if sequences have states besides keys and values and can resume from a copy of them."""
        return self if self._has_states else None

    def state_pages(self, sequence: TokenSequence) -> int:
        """Return how many pages the state of a sequence takes; 0 if it has none, as its last task was not computed."""
        cache = self._caches.get(sequence)
        if cache is None or cache.get_seq_length() != sequence.computed or not (state := cache.state()):
            return 0
        return -(-sum(map(_padded, (_head(state), *state.values()))) // self.memory.page_bytes)

    def save_state(self, sequence: TokenSequence, pages: list[int]) -> None:
        """Write the state of a sequence into pages: places, types and shapes of tensors, and one after the other."""
        state = self._caches[sequence].state()
        parts = _head(state), *state.values()
        numbers, begin = torch.zeros(sum(map(_padded, parts)), dtype=torch.uint8), 0
        for part in parts:
            numbers[begin : begin + part.nbytes] = part.contiguous().flatten().view(torch.uint8)
            begin += _padded(part)
        self.memory.save(pages, numbers)

    def load_state(self, sequence: TokenSequence, pages: list[int]) -> None:
        """Let a sequence that begins continue from the state in pages."""
        numbers = self.memory.load(pages, len(pages) * self.memory.page_bytes)
        end = HEAD.size + HEAD.unpack(bytes(numbers[: HEAD.size]))[0]
        begin, state = -(-end // ALIGNMENT) * ALIGNMENT, dict[StatePart, Tensor]()
        for place, dtype, shape in json.loads(bytes(numbers[HEAD.size : end])):
            part = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            found = numbers[begin : begin + part.nbytes].view(part.dtype).view(shape)
            state[StatePart(*place)] = found.to(self._model.device)
            begin += _padded(part)
        cache = self._caches[sequence] = PagedCache(self.memory, cache_layers(self._model))
        cache.set_state(state)

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of a page to another page."""
        self.memory.copy_page(source, target, tokens)


def cache_layers(model: Any) -> list[Any]:
    """Return transformers' layers of a cache for a model, without tokens."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True)).layers


def cache_of(model: Any, tokens: int, *, bits: int) -> PagedCache:
    """Return a cache for one sequence of at most ``tokens`` tokens, with keys and values in ``bits`` bits."""
    pages = -(-tokens // PAGE_TOKENS)
    cache = PagedCache(PageMemory(pages, bits=bits), cache_layers(model))
    cache.resume_at([*range(pages)], 0)
    return cache


def windows_of(model: Any) -> list[int | None]:
    """Return the window of each layer, in tokens; None: a token attends to all. The model must be able to resume."""
    return [getattr(layer, "sliding_window", None) for layer in cache_layers(model)]


def _head(state: dict[StatePart, Tensor]) -> Tensor:
    """Return what a copy of a state begins with, uint8 [bytes]: the JSON of places, types and shapes of its tensors."""
    parts = [(place, str(part.dtype).removeprefix("torch."), part.shape) for place, part in state.items()]
    text = json.dumps(parts, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(HEAD.pack(len(text)) + text), dtype=torch.uint8)


def _padded(part: Tensor) -> int:
    """Return how many bytes a tensor takes in a saved state, with padding up to the next multiple of ALIGNMENT."""
    return -(-part.nbytes // ALIGNMENT) * ALIGNMENT


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
    """Within the ``with`` block, raise Stopped before the experts of a layer if ``should_stop`` returns True then."""
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
