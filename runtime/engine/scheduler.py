"""Chooses what the next step computes: the next token of each running sequence, and parts of prompts."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass

from .kv_cache import KVCache
from .runner import Runner, Task
from .sequence import TokenSequence

FETCH_SECONDS = 0.05  # time to wait for pages of a sequence while no other one runs; then it may have been cancelled
SCORED = 128  # most tokens of a prompt that are scored together: each has logits for the whole vocabulary
PASSES_BESIDE = 4  # most passes of a prompt that is computed beside long ones, a pass at a time


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How much a step may compute.

    Attributes:
        max_sequences: most sequences that run at a time.
        chunk: most tokens of prompts in a step. If prompts are computed one by one, only for the first part of a
            prompt that runs alone; otherwise for all prompts of the step together.
        later_chunk: if prompts are computed one by one, most tokens of a later part of a prompt, and of any part while
            other sequences run. It may be smaller than ``chunk``, as attention to earlier tokens takes memory.
        scored_chunk: most tokens of a prompt that is scored, as each has logits for the whole vocabulary.
        pass_tokens: a prompt with more tokens than this is long. Long prompts are computed together; between their
            parts, short ones are computed. None: prompts are computed one by one.
    """

    max_sequences: int
    chunk: int
    later_chunk: int
    scored_chunk: int
    pass_tokens: int | None = None

    @classmethod
    def of(cls, runner: Runner, *, max_sequences: int, chunk: int, later_chunk: int, context: int) -> StepLimits:
        """Return the limits of a runner. One that can't resume computes whole prompts, of up to ``context`` tokens."""
        if not runner.can_resume:
            return cls(max_sequences, context, context, context, runner.pass_tokens)
        least = runner.pass_tokens or 1
        scored = min(SCORED, runner.pass_tokens or chunk)
        return cls(max_sequences, max(chunk, least), min(chunk, later_chunk), scored, runner.pass_tokens)


class Scheduler:
    """Sequences that wait, and those that run. A running sequence holds pages.

    Sequences wait in the order in which they came, but those whose deadlines are near go before others (``due``).
    """

    def __init__(self, cache: KVCache, limits: StepLimits) -> None:
        """Make a scheduler of sequences that have their pages in ``cache``."""
        self._cache = cache
        self._limits = limits
        self._step = 0
        self.waiting: list[TokenSequence] = []  # ascending by ``due``
        self.running: list[TokenSequence] = []  # in the order in which they began

    def add(self, sequence: TokenSequence) -> None:
        """Let a sequence wait behind those that are due before it."""
        insort(self.waiting, sequence, key=_due)

    def remove(self, sequence: TokenSequence, *, is_answered: bool = False) -> None:
        """Remove a sequence that has ended. Its pages may be found by others, later too if it ``is_answered``."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.end(sequence, is_answered=is_answered)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self._cache.cancel_fetch(sequence)

    def begin_next(self) -> bool:
        """Begin the sequence that waits first, if there is room for it. If that raises an error, it still waits.

        Returns whether another one may begin in this step. If prompts are computed one by one, more of them would not
        be computed sooner, but would hold pages.
        """
        if (
            not self.waiting
            or len(self.running) >= self._limits.max_sequences
            or not self._cache.has_pages_for(self.waiting[0])
        ):
            return False
        if not self._cache.fetch(self.waiting[0], 0.0 if self.running else FETCH_SECONDS):
            return False
        sequence = self.waiting[0]  # it is in one of the two lists even if it can't begin
        self._cache.begin(sequence)
        self.waiting.remove(sequence)
        sequence.begin()
        self.running.append(sequence)
        return self._limits.pass_tokens is not None

    def schedule(self, busy: Collection[TokenSequence] = ()) -> tuple[list[Task], list[TokenSequence]]:
        """Return the tasks of the next step, and the sequences that were preempted because there is no page.

        Each sequence that decodes has a task of one token. Of those in prefill, one has a task with a part of its
        prompt: the one that has waited longest since its last part, so that a short prompt does not wait for the end
        of a long one. If prompts are computed together, all long ones have tasks, as far as they fit into a chunk.

        Args:
            busy: sequences that are in the middle of long tasks: they get no task, and lose no page. At most one other
                prompt gets a task, of one pass; it must have at most PASSES_BESIDE passes.
        """
        self._step += 1
        chosen = self._tokens([sequence for sequence in self.running if sequence not in busy], is_beside=bool(busy))
        tasks, preempted = list[Task](), list[TokenSequence]()
        for sequence, tokens in chosen.items():
            while sequence not in preempted:
                if self._cache.reserve(sequence, tokens):
                    tasks.append(Task(sequence, sequence.computed, tokens, self._cache.pages_of(sequence)))
                    break
                # it has no task yet, as tasks are made in the order of ``running``
                preempted.append(self._preempt_last(busy))
        return tasks, preempted

    def _preempt_last(self, busy: Collection[TokenSequence]) -> TokenSequence:
        """Let the sequence that began last, and is not ``busy``, wait again. It loses its pages. Return it."""
        last = next(sequence for sequence in reversed(self.running) if sequence not in busy)
        self._cache.end(last)
        self.running.remove(last)
        self.add(last)
        return last

    def _tokens(self, running: list[TokenSequence], *, is_beside: bool) -> dict[TokenSequence, int]:
        """Return how many tokens of which sequences the next step is to compute, in the order of ``running``."""
        prompts = sorted((s for s in running if s.remaining > 1), key=lambda sequence: sequence.last_step)
        if self._limits.pass_tokens is None:
            is_alone = len(self.running) == 1 and not self.running[0].computed
            left, chosen = self._limits.chunk if is_alone else self._limits.later_chunk, prompts[:1]
        else:
            long = [sequence for sequence in prompts if self._max_tokens(sequence) > self._limits.pass_tokens]
            short = [sequence for sequence in prompts if sequence not in long]
            left, chosen = self._limits.chunk, short[:1] + long
            if is_beside:
                # a pass of a prompt that is not very long; the others wait for a step of their own
                left = self._limits.pass_tokens
                chosen = [sequence for sequence in prompts if self._max_tokens(sequence) <= PASSES_BESIDE * left][:1]
        tokens = {sequence: 1 for sequence in running if sequence.remaining == 1}
        for sequence in chosen:
            # a few tokens use nearly as many experts as a full pass, so they are not worth one
            if left >= min(self._max_tokens(sequence), self._limits.pass_tokens or 1):
                sequence.note_part(self._step)
                tokens[sequence] = min(self._max_tokens(sequence), left)
                left -= tokens[sequence]
        return {sequence: tokens[sequence] for sequence in running if sequence in tokens}

    def _max_tokens(self, sequence: TokenSequence) -> int:
        """Return how many tokens of a sequence a step computes at most."""
        most = self._cache.max_tokens(sequence)
        return min(most, self._limits.scored_chunk) if sequence.request.scores_prompt else most

    def note_computed(self, task: Task) -> None:
        """Note that a task was computed: other sequences may find its full pages."""
        task.sequence.advance(task.tokens)
        self._cache.keep(task.sequence)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence."""
        return bool(self.running or self.waiting)


def _due(sequence: TokenSequence) -> float:
    return sequence.due
