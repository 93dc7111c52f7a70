"""The steps in which sequences are computed: each admits sequences, schedules tasks, and runs them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from functools import partial

from torch import Tensor

from moetier.runtime.libraries.model_building import BUILDING

from .runner import Runner, Stopped, Task
from .sampling import Sampler, scored
from .scheduler import Scheduler
from .sequence import DeadlineError, EngineError, Finish, TokenSequence

# after a step of others that took t seconds, a long prompt is computed for PROMPT_SHARE * t seconds: at most
# LONGEST_PART, but never less than t
PROMPT_SHARE = 3.0
LONGEST_PART = 0.3
_log = logging.getLogger(__name__)


class Steps:
    """Computes the steps of an engine, on its thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        context: int,
        *,
        add_arrived: Callable[[], object],
        is_closed: Callable[[], bool],
        masks: Executor,
    ) -> None:
        """Have no sequences yet.

        Args:
            runner: computes tasks.
            scheduler: chooses them.
            context: most tokens of a sequence.
            add_arrived: adds the sequences that have arrived to the scheduler, between parts of long tasks.
            is_closed: returns whether nothing more is to be computed.
            masks: makes the masks of grammars.
        """
        self._runner = runner
        self._scheduler = scheduler
        self._context = context
        self._add_arrived = add_arrived
        self._is_closed = is_closed
        self._masks = masks
        self._samplers: dict[TokenSequence, Sampler] = {}
        self._next_beside = 0.0  # time at which a step is computed beside long tasks

    @property
    def sequences(self) -> list[TokenSequence]:
        """Sequences that run or wait."""
        return [*self._scheduler.running, *self._scheduler.waiting]

    def step(self) -> None:
        """Compute one step: admit sequences, choose tasks, run them, and append tokens to complete sequences."""
        self._admit()
        short, long = self._schedule()
        self._run(short)
        self._run(long)

    def _step_beside(self, busy: Collection[TokenSequence]) -> None:
        """Compute the short tasks of a step, in the middle of long ones. ``busy``: the sequences of those.

        No further step is computed beside this one, as the runner calls ``_between`` for long tasks only.
        """
        began = time.monotonic()
        self._add_arrived()
        self._admit(busy)
        short, _ = self._schedule(busy)
        self._run(short)
        now = time.monotonic()
        self._next_beside = now + max(min(PROMPT_SHARE * (now - began), LONGEST_PART), now - began)

    def _admit(self, busy: Collection[TokenSequence] = ()) -> None:
        """End sequences that should end, except ``busy`` ones, and begin those for which there is room."""
        for sequence in self.sequences:
            if sequence.should_end and sequence not in busy:
                self._end_early(sequence)
        try:
            while self._scheduler.begin_next():
                pass
        except Exception as error:
            self._fail(self._scheduler.waiting[0], error)
        for sequence in [*self._scheduler.running]:
            if sequence not in self._samplers:
                self._begin(sequence)

    def _begin(self, sequence: TokenSequence) -> None:
        """Make the sampler of a sequence. A sequence that can't have one ends."""
        try:
            sampler = self._samplers[sequence] = self._runner.begin(sequence)
            sampler.begin(self._masks)
        except Exception as error:
            self._fail(sequence, error)

    def _schedule(self, busy: Collection[TokenSequence] = ()) -> tuple[list[Task], list[Task]]:
        """Return the tasks of the next step: short ones, whose tokens must not wait, and long ones.

        ``busy`` is as in ``Scheduler.schedule``.
        """
        tasks, preempted = self._scheduler.schedule(busy)
        for sequence in preempted:
            self._runner.end(sequence)
        if preempted and not self._scheduler.running:  # the last one ran alone: it would be preempted for ever
            self._fail(preempted[-1], EngineError("Pages for keys and values are missing.", "Load the model again."))
        return [task for task in tasks if not self._is_long(task)], [task for task in tasks if self._is_long(task)]

    def _is_long(self, task: Task) -> bool:
        return self._runner.pass_tokens is not None and task.tokens > self._runner.pass_tokens

    def _run(self, tasks: list[Task]) -> None:
        """Run tasks, together if the runner can, and let their sequences go on."""
        busy = {task.sequence for task in tasks}
        batches = deque([tasks] if self._runner.computes_together and tasks else [[task] for task in tasks])
        while batches:
            batch = batches.popleft()
            try:
                outputs = self._compute(batch, busy)
            except Stopped:  # the others go on at once, or clients that cancel their prompts would stop them
                if others := [task for task in batch if task.tokens == 1 and not self._should_end(task)]:
                    batches.appendleft(others)
            except Exception as error:
                if len(batch) == 1:
                    self._fail(batch[0].sequence, error)
                else:  # each alone: an error of one sequence does not end others
                    batches.extendleft([task] for task in reversed(batch))
            else:
                for task, output in zip(batch, outputs, strict=True):
                    self._advance(task, output)

    def _should_end(self, task: Task) -> bool:
        return self._is_closed() or task.sequence.should_end

    def _compute(self, tasks: list[Task], busy: Collection[TokenSequence]) -> list[Tensor | None]:
        """Return what the runner computes, which stops if a prompt among ``tasks`` is over.

        ``busy``: the sequences of these tasks, and of those that are run before or after them.
        """
        prompts = [task for task in tasks if task.tokens > 1]
        try:
            return self._runner.run(
                tasks,
                lambda: self._is_closed() or any(map(self._should_end, prompts)),
                partial(self._between, tasks, busy),
            )
        finally:
            for task in prompts:
                task.sequence.note_underway(0.0)

    def _between(self, tasks: list[Task], busy: Collection[TokenSequence], done: float) -> None:
        """Note that the fraction ``done`` of long tasks is computed, and compute a step beside them if that is due.

        Raises Stopped if the engine is closed, or nothing of the tasks is wanted any more.
        """
        for task in tasks:
            task.sequence.note_underway(done * task.tokens)
        if all(map(self._should_end, tasks)):
            raise Stopped
        BUILDING.let_build()
        if time.monotonic() >= self._next_beside:
            self._step_beside(busy)

    def _advance(self, task: Task, output: Tensor | None) -> None:
        """Let a sequence go on after a task. ``output``: its logits, as ``Runner.run`` returns them."""
        if self._is_long(task) and task.sequence.should_end:  # it may not have been computed
            return
        self._scheduler.note_computed(task)
        if output is None:
            return
        try:
            if task.scores:
                self._score(task.sequence, task.first, output)
            if task.is_complete:
                self._sample(task.sequence, output[-1] if task.scores else output)
        except Exception as error:
            self._fail(task.sequence, error)

    def _score(self, sequence: TokenSequence, begin: int, logits: Tensor) -> None:
        """Note the log probabilities of the prompt's tokens after those from position ``begin`` on."""
        tokens = sequence.ids[begin + 1 : min(begin + 1 + len(logits), len(sequence.request.ids))]
        scores = scored(logits[: len(tokens)], tokens, sequence.request.logprobs or 0)
        sequence.score(begin + 1, scores)

    def _sample(self, sequence: TokenSequence, logits: Tensor) -> None:
        sampler = self._samplers[sequence]
        sampled = sampler(logits)
        sequence.append(sampled)
        if sampler.is_last(sampled.token):
            self.end(sequence, Finish.END)
        elif sequence.new_tokens == sequence.request.max_new_tokens or len(sequence.ids) == self._context:
            self.end(sequence, Finish.LENGTH)

    def _end_early(self, sequence: TokenSequence) -> None:
        """End a sequence that ``should_end``."""
        if sequence.is_cancelled:
            self.end(sequence, Finish.CANCELLED)
            return
        done = f"{sequence.new_tokens:,} of at most {sequence.request.max_new_tokens:,} tokens"
        error = DeadlineError(
            f"The deadline of a request has passed after {done} of its answer.",
            "Ask for fewer tokens, send fewer requests at a time, or give it a later deadline.",
        )
        self.end(sequence, Finish.DEADLINE, error)

    def _fail(self, sequence: TokenSequence, error: Exception) -> None:
        self.end(sequence, Finish.FAILED, error)

    def end(self, sequence: TokenSequence, finish: Finish, error: BaseException | None = None) -> None:
        """End a sequence, and forget what is kept of it besides its pages."""
        self._scheduler.remove(sequence, is_answered=finish is not Finish.FAILED and sequence.new_tokens > 0)
        self._runner.end(sequence)
        self._samplers.pop(sequence, None)
        try:
            sequence.end(finish, error)
        except Exception as failure:  # of the caller's function; the sequences that are computed need not end
            _log.error("A function that was to be called at the end of a sequence has failed: %s", failure)
