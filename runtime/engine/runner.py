"""Interface of runners, which compute the tokens of sequences with a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as ManyOf
from dataclasses import dataclass

from torch import Tensor

from .sampling import Sampler
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Task:
    """The tokens of one sequence that a step computes: the next ``tokens`` of those that are not computed yet."""

    sequence: Sequence
    tokens: int
    pages: list[int]  # numbers of the pages of all tokens up to the end of these, from the sequence's first token on

    @property
    def begin(self) -> int:
        """Position of the first of these tokens."""
        return self.sequence.computed

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.sequence.computed + self.tokens

    @property
    def is_complete(self) -> bool:
        """Whether all tokens of the sequence are computed after the step, so that the next one can be sampled."""
        return self.tokens == self.sequence.remaining

    @property
    def scores(self) -> bool:
        """Whether the logits after each of the tokens are needed: they score the prompt."""
        return self.sequence.request.scores_prompt and self.begin < len(self.sequence.request.ids)


class Stopped(Exception):
    """Ends the computation of a task between two layers, because its result is not wanted any more."""


class Runner(ABC):
    """Computes the tasks of a step, and has the memory of pages.

    A page holds the keys and values of PAGE consecutive tokens of a sequence, in all layers.
    """

    can_resume: bool  # whether a sequence can be computed in several parts, and continue after pages of another one
    computes_together: bool  # whether ``run`` takes several tasks

    @abstractmethod
    def sampler(self, sequence: Sequence) -> Sampler:
        """Return the sampler of a sequence that begins. Raises ValueError for options that the model refuses."""

    @abstractmethod
    def run(self, tasks: ManyOf[Task], should_stop: Callable[[], bool]) -> list[Tensor | None]:
        """Compute tasks. Return, for each that is complete, the logits after its sequence's last token [vocabulary].

        For each task that ``scores``, return the logits after all of its tokens [tokens, vocabulary].

        Keys and values of the computed tokens are then in the tasks' pages. Those of earlier tokens are taken from
        there. Raises Stopped between two layers if ``should_stop`` returns True. After Stopped or an error, the same
        tasks can be computed again.
        """

    @abstractmethod
    def end(self, sequence: Sequence) -> None:
        """Forget what is kept of a sequence besides its pages. Nothing may be kept."""

    @abstractmethod
    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of the first ``tokens`` tokens of a page to another page."""
