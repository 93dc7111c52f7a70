"""Interface of runners, which compute the tokens of sequences with a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .kv_cache import StateMemory
from .sampling import Sampler
from .sequence import TokenSequence


@dataclass(frozen=True, slots=True)
class Task:
    """The tokens of one sequence that a step computes: ``tokens`` of them from position ``first`` on."""

    sequence: TokenSequence
    first: int
    tokens: int
    # numbers of the sequence's pages, of all tokens before ``stop``; a list, as ``are_consecutive`` compares lists
    pages: list[int]

    @property
    def stop(self) -> int:
        """Position after the last one."""
        return self.first + self.tokens

    @property
    def is_complete(self) -> bool:
        """Whether these are the sequence's last tokens, so that the next one can be sampled."""
        return self.stop == len(self.sequence.ids)

    def parts(self, max_tokens: int) -> list[Task]:
        """Return tasks of at most ``max_tokens`` tokens each, one after the other."""
        return [
            Task(self.sequence, first, min(max_tokens, self.stop - first), self.pages)
            for first in range(self.first, self.stop, max_tokens)
        ]

    @property
    def scores(self) -> bool:
        """Whether the logits after each of the tokens are needed: they score the prompt."""
        return self.sequence.request.scores_prompt and self.first < len(self.sequence.request.ids)


class Stopped(Exception):
    """Ends the computation of a task between two layers, because its result is not wanted any more."""


class Runner(ABC):
    """Computes the tasks of a step, and has the memory of pages.

    A page holds the keys and values of PAGE_TOKENS consecutive tokens of a sequence, in all layers. Some models have a
    state of each sequence besides, which the runner keeps. A copy of it lies in pages as well.
    """

    can_resume: bool  # whether a sequence can be computed in several parts, and continue after pages of another one
    computes_together: bool  # whether ``run`` takes several tasks
    # a task with more tokens takes long, and ``run`` calls ``between``; None: it never does
    pass_tokens: int | None = None

    @abstractmethod
    def begin(self, sequence: TokenSequence) -> Sampler:
        """Prepare for a sequence that begins, until ``end``, and return its sampler.

        Raises ValueError for options that the model refuses.
        """

    @abstractmethod
    def run(
        self,
        tasks: list[Task],
        should_stop: Callable[[], bool],
        between: Callable[[float], object] = lambda done: None,
    ) -> list[Tensor | None]:
        """Compute tasks. Return, for each that is complete, the logits after its sequence's last token [vocabulary].

        For each task that ``scores``, return the logits after all of its tokens [tokens, vocabulary].

        Keys and values of the computed tokens are then in the tasks' pages. Those of earlier tokens are taken from
        there. After Stopped or an error, the same tasks can be computed again, unless the runner has a
        ``state_memory``: then the state of the sequence is lost.

        Args:
            tasks: several only if the runner ``computes_together``.
            should_stop: if it returns True between two layers, Stopped is raised. It is not called for long tasks:
                these end by themselves once their sequence ``should_end``.
            between: called with the fraction of the work that is done, between parts of long tasks. It may run other
                tasks, and raise an error, which ends these.
        """

    @abstractmethod
    def end(self, sequence: TokenSequence) -> None:
        """Free what the runner keeps of a sequence besides its pages, such as its state."""

    @abstractmethod
    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of the first ``tokens`` tokens of a page to another page."""

    @property
    def state_memory(self) -> StateMemory | None:
        """The states of sequences that can resume; None if they have none besides keys and values."""
        return None
