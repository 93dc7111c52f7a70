"""Chooses what the next step computes: the next token of each running sequence, and a part of one prompt."""

from __future__ import annotations

from collections import deque

from .kv_cache import KVCache
from .runner import Task
from .sequence import Sequence


class Scheduler:
    """Sequences that wait, in the order in which they came, and those that run. A running sequence holds pages."""

    def __init__(
        self, cache: KVCache, *, most: int, chunk: int, later: int | None = None, scored: int | None = None
    ) -> None:
        """Run at most ``most`` sequences at a time, and compute at most ``chunk`` tokens of a prompt in a step.

        Behind other tokens, or beside other sequences, at most ``later`` are computed, as they take more memory. Of a
        prompt that is scored, at most ``scored``, as each has logits for the whole vocabulary.
        """
        self._cache = cache
        self._most = most
        self._chunk = chunk
        self._later = later or chunk
        self._scored = scored or chunk
        self._step = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they began

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait behind all others."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence that has ended. Its pages may be found by others. Returns whether it was running."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.end(sequence)
            return True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        return False

    def schedule(self) -> tuple[list[Task], list[Sequence]]:
        """Return the tasks of the next step, and running sequences that now wait again because there is no page.

        Every sequence whose prompt is computed takes part. Of the others, one computes a part of its prompt: that
        whose last part, if any, is longest ago, so that a short prompt does not wait for the end of a long one.
        """
        self._step += 1
        if self.waiting and len(self.running) < self._most and self._cache.has_room(self.waiting[0]):
            sequence = self.waiting[0]  # it is in one of the two lists even if it can't begin
            self._cache.begin(sequence)
            self.waiting.popleft()
            sequence.begin()
            self.running.append(sequence)
        prompts = [sequence for sequence in self.running if sequence.remaining > 1]
        prompt = min(prompts, key=lambda sequence: sequence.last_step, default=None)
        if prompt is not None:
            prompt.last_step = self._step
        tasks, stopped = list[Task](), list[Sequence]()
        for sequence in [*self.running]:
            if sequence in stopped or (sequence.remaining > 1 and sequence is not prompt):
                continue
            is_alone = not sequence.computed and len(self.running) == 1
            tokens = min(sequence.remaining, self._chunk if is_alone else self._later)
            if sequence.request.scores_prompt:
                tokens = min(tokens, self._scored)
            while not self._cache.reserve(sequence, tokens):
                last = self.running[-1]  # the one that began last can wait best
                self._cache.end(last)
                self.running.pop()
                self.waiting.appendleft(last)
                stopped.append(last)
                if last is sequence:
                    break
            else:
                tasks.append(Task(sequence, tokens, self._cache.pages_of(sequence)))
        return [task for task in tasks if task.sequence not in stopped], stopped

    def computed(self, task: Task) -> None:
        """Note that a task was computed: other sequences may find its full pages."""
        task.sequence.computed += task.tokens
        self._cache.keep(task.sequence)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence."""
        return bool(self.running or self.waiting)
