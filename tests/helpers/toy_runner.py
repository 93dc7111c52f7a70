"""A runner without a model: the next token depends on all tokens before it, as pages have them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.runner import Runner, Stopped, Task
from moetier.runtime.engine.sampling import Sampler
from moetier.runtime.engine.sequence import Request, TokenSequence
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

VOCABULARY = 50


PROMPTS = [[*range(1, 100)], [*range(1, 70)], [*range(1, 65)], [7] * 150, [7] * 20, [9]]


def digests(ids: Sequence[int]) -> list[int]:
    """Return of each token a number that depends on it and on all before it."""
    return [*accumulate(ids, lambda before, token: hash((before, token)), initial=0)][1:]


class ToyLayer(NamedTuple):
    """The bytes of a token in a file."""

    token_bytes: int


class WrittenPages:
    """Memory of pages that has, in place of a token's keys and values, the digest of all tokens up to it."""

    @property
    def state_memory(self) -> WrittenStates | None:
        return None

    def __init__(self) -> None:
        self.pages: dict[int, list[int]] = {}

    def write(self, pages: Sequence[int], ids: Sequence[int], begin: int, end: int) -> None:
        for at, digest in enumerate(digests(ids[:end])[begin:], begin):
            page = self.pages.setdefault(pages[at // PAGE_TOKENS], [])
            del page[at % PAGE_TOKENS :]
            page.append(digest)

    def check(self, pages: Sequence[int], ids: Sequence[int]) -> None:
        """Fail if pages do not have these tokens."""
        assert [self.pages[pages[at // PAGE_TOKENS]][at % PAGE_TOKENS] for at in range(len(ids))] == digests(ids)

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        self.pages[target] = self.pages[source][:tokens]

    layout = (ToyLayer(32),)

    def save_page(self, page: int, tokens: int, data: memoryview) -> None:
        data[:] = bytes(len(data))
        for at, digest in enumerate(self.pages[page][:tokens]):
            data[32 * at : 32 * (at + 1)] = digest.to_bytes(32, "little", signed=True)

    def restore_page(self, page: int, tokens: int, layout: Any, data: memoryview) -> bool:
        assert len(data) == 32 * tokens
        saved = [int.from_bytes(data[32 * at : 32 * (at + 1)], "little", signed=True) for at in range(tokens)]
        self.pages[page] = [digest for digest in saved if digest]  # a copy of a state has one
        return bool(layout == [[32]])


class WrittenStates(WrittenPages):
    """Memory with the states of sequences besides: the digest of the last token. A copy takes ``size`` pages."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size
        self.states: dict[TokenSequence, int] = {}

    @property
    def state_memory(self) -> WrittenStates:
        return self

    def compute(self, pages: Sequence[int], sequence: TokenSequence, end: int) -> None:
        """Compute the tokens of a sequence up to ``end``, from its state."""
        ids, begin = sequence.ids, sequence.computed
        self.check(pages, ids[:begin])
        if begin:
            assert self.states[sequence] == digests(ids[:begin])[-1]
        self.write(pages, ids, begin, end)
        self.states[sequence] = digests(ids[:end])[-1]

    def state_pages(self, sequence: TokenSequence) -> int:
        return self.size if sequence in self.states else 0

    def save_state(self, sequence: TokenSequence, pages: list[int]) -> None:
        assert len({*pages}) == self.size
        for page in pages:
            self.pages[page] = [self.states[sequence]]

    def load_state(self, sequence: TokenSequence, pages: list[int]) -> None:
        (self.states[sequence],) = {self.pages[page][0] for page in pages}


class ToyRunner(WrittenPages, Runner):
    """Fails if a page has not what its sequence needs. A token is ``next_token`` of those before it."""

    can_resume = computes_together = True

    def __init__(self, *, fails_after: int = 1 << 30, pass_tokens: int | None = None) -> None:
        super().__init__()
        self.pass_tokens = pass_tokens
        self.computed = 0  # tokens
        self.fails_after = fails_after  # tokens of a sequence, after which it fails

    def begin(self, sequence: TokenSequence) -> Sampler:
        logprobs = sequence.request.logprobs
        return Sampler(sequence.ids, lambda _, scores: scores, ends=frozenset([0]), logprobs=logprobs)

    def run(
        self,
        tasks: Sequence[Task],
        should_stop: Callable[[], bool],
        between: Callable[[float], object] = lambda done: None,
    ) -> list[Tensor | None]:
        if self.pass_tokens is None or all(task.tokens <= self.pass_tokens for task in tasks):
            return [self.compute(task, should_stop) for task in tasks]
        parts = [(number, part) for number, task in enumerate(tasks) for part in task.parts(self.pass_tokens)]
        logits: list[Tensor | None] = [None] * len(tasks)
        for done, (number, part) in enumerate(parts):
            between(done / len(parts))
            if not part.sequence.should_end:
                logits[number] = self.compute(part, lambda: False)
        return logits

    def compute(self, task: Task, should_stop: Callable[[], bool]) -> Tensor | None:
        ids, begin, end = task.sequence.ids, task.first, task.stop
        if should_stop():
            raise Stopped
        if end > self.fails_after:
            raise OSError("a disk failed")
        self.check(task.pages, ids[:begin])
        self.write(task.pages, ids, begin, end)
        self.computed += task.tokens
        if task.scores:
            return torch.stack([logits_after(ids[:at]) for at in range(begin + 1, end + 1)])
        return logits_after(ids[:end]) if task.is_complete else None

    def end(self, sequence: TokenSequence) -> None:
        pass


class ToyStateRunner(WrittenStates, ToyRunner):
    """A runner whose sequences have states besides: it fails if one does not continue from its own."""

    computes_together = False

    def compute(self, task: Task, should_stop: Callable[[], bool]) -> Tensor | None:  # type: ignore[override]
        sequence = task.sequence
        if task.first:
            assert self.states[sequence] == digests(sequence.ids[: task.first])[-1]
        logits = ToyRunner.compute(self, task, should_stop)
        self.states[sequence] = digests(sequence.ids[: task.stop])[-1]
        return logits

    def end(self, sequence: TokenSequence) -> None:
        self.states.pop(sequence, None)


def next_token(ids: Sequence[int]) -> int:
    return hashlib.sha256(repr([*ids]).encode()).digest()[0] % VOCABULARY


def logits_after(ids: Sequence[int]) -> Tensor:
    return torch.eye(VOCABULARY)[next_token(ids)]


def answer_alone(ids: Sequence[int], most: int, context: int) -> list[int]:
    """Return the new tokens of a sequence that runs alone."""
    found = [*ids]
    while len(found) < min(len(ids) + most, context):
        found.append(next_token(found))
        if found[-1] == 0:
            break
    return found[len(ids) :]


class Endless(ToyRunner):
    """Notes when a part of a long prompt is computed. No token ends a sequence."""

    def __init__(self) -> None:
        super().__init__(pass_tokens=8)
        self.events = list[str]()

    def begin(self, sequence: TokenSequence) -> Sampler:
        return Sampler(sequence.ids, lambda _, scores: scores)

    def compute(self, task: Task, should_stop: Callable[[], bool]) -> Tensor | None:
        if len(task.sequence.request.ids) > 500:
            self.events.append(f"part of {task.sequence.request.ids[0]}")
            time.sleep(0.001)
        return super().compute(task, should_stop)


def tokens_of(engine: Engine, ids: list[int], most: int = 20, **options: object) -> list[int]:
    """Return the answer of an engine to a prompt."""
    return [*engine.stream(Request(tuple(ids), most, **options))]  # type: ignore[arg-type]
