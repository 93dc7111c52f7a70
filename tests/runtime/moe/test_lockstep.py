"""Forward passes that go on block by block together compute what each computes alone, and read each expert once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from readers import PATIENCE
from torch import Tensor
from transformers import DynamicCache

import moetier
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.moe import grouped
from moetier.runtime.moe.lockstep import Pass, run_in_lockstep
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.reader import ShardStore

PART, PARTS = 9, 4


@pytest.fixture(scope="module")
def model(tinymix_4bit: Path) -> Iterator[Any]:
    model, _ = moetier.load(tinymix_4bit, daemon=None, ram="40%", speculate="off")
    with model.tiers, torch.no_grad():
        yield model


def ids_of(seed: int) -> list[Tensor]:
    ids = torch.randint(3, 1000, (1, PART * PARTS), generator=torch.Generator().manual_seed(seed))
    return [*torch.split(ids, PART, 1)]


def passes_of(model: Any, parts: list[Tensor], cache: DynamicCache, **options: Any) -> list[Pass]:
    """A pass for each part of a prompt, which continues after the parts before it."""

    def run(number: int, part: Tensor) -> Tensor:
        # each pass has a cache of its own, whose layers begin with what the passes before it have left
        own = Own(cache, number * PART)
        logits: Tensor = model(part, **{CACHE: own}, use_cache=True).logits[0, -1]
        return logits

    return [Pass(partial(run, number, part), **options) for number, part in enumerate(parts)]


class Own(DynamicCache):
    """Cache of one part of a prompt over the keys and values of all parts."""

    def __init__(self, shared: DynamicCache, begin: int) -> None:
        super().__init__()
        self.shared, self.begin = shared, begin

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return self.shared.update(keys, values, layer, *more, **named)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.begin

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.begin + query_length, 0


def in_turn(passes: list[Pass]) -> list[Tensor]:
    return [part.run() for part in passes]


@pytest.mark.parametrize("outputs", [5, 24, 4096])
def test_the_results_are_those_of_passes_in_turn(model: Any, outputs: int) -> None:
    """Whether a block's experts are one group or many."""
    wanted = in_turn(passes_of(model, ids_of(1), DynamicCache()))
    with patch.object(grouped, "GROUP_OUTPUTS", outputs):
        found = run_in_lockstep(passes_of(model, ids_of(1), DynamicCache()), lambda _: None)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def demands(model: Any, compute: Callable[[], object]) -> int:
    """How many records were demanded, a hit or not."""
    before = model.tiers.host.stats()
    compute()
    after = model.tiers.host.stats()
    return int(after.hits + after.misses - before.hits - before.misses)


def test_an_expert_is_demanded_once_for_all_passes(model: Any) -> None:
    blocks = model.tiers.manifest.blocks
    apart = demands(model, lambda: in_turn(passes_of(model, ids_of(2), DynamicCache())))
    together = demands(model, lambda: run_in_lockstep(passes_of(model, ids_of(2), DynamicCache()), lambda _: None))
    assert together <= sum(block.experts for block in blocks) < apart


def test_the_model_can_be_used_between_two_parts(model: Any) -> None:
    alone = model(torch.tensor([[5, 6, 7]])).logits
    wanted, others = in_turn(passes_of(model, ids_of(3), DynamicCache())), list[Tensor]()
    found = run_in_lockstep(
        passes_of(model, ids_of(3), DynamicCache()),
        lambda _: others.append(model(torch.tensor([[5, 6, 7]])).logits),
    )
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    assert len(others) > PARTS
    assert all(torch.equal(logits, alone) for logits in others)


def test_passes_that_are_not_wanted_any_more_are_dropped(model: Any) -> None:
    wanted = in_turn(passes_of(model, ids_of(4), DynamicCache()))
    called = 0

    def note(done: int) -> None:
        nonlocal called
        called = done

    other = passes_of(model, ids_of(5), DynamicCache(), is_wanted=lambda: called < 6)
    found = run_in_lockstep([*other, *passes_of(model, ids_of(4), DynamicCache())], note)
    assert found[:PARTS] == [None] * PARTS
    assert all(torch.equal(one, two) for one, two in zip(found[PARTS:], wanted, strict=True))


@pytest.mark.parametrize("calls", [1, 5, 9])
def test_an_error_between_two_parts_ends_all_passes(model: Any, calls: int) -> None:
    ended = list[int]()

    def run(number: int, part: Pass) -> object:
        try:
            return part.run()
        finally:
            ended.append(number)

    def fail(done: int) -> None:
        if done >= calls:
            raise ValueError("closed")

    passes = passes_of(model, ids_of(6), DynamicCache())
    with pytest.raises(ValueError, match="closed"):
        run_in_lockstep([Pass(partial(run, *each)) for each in enumerate(passes)], fail)
    assert sorted(ended) == [*range(min(calls, PARTS))], "those that have begun"
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_an_error_between_two_blocks_cancels_the_reads_for_the_next_one(
    tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = moetier.load(tinymix_4bit, daemon=None, ram="3520KiB", speculate="off")
    host, read, may_read = model.tiers.host, ShardStore.read_into, threading.Event()
    at_error = list[tuple[int, int]]()

    def ended() -> int:
        """Return how many prefetches were stopped, before or during their read."""
        return host.stats().cancelled + host.stats().dropped

    def held(store: ShardStore, key: ExpertKey, *arguments: Any) -> None:
        if key.block == 1:
            assert may_read.wait(PATIENCE)
        read(store, key, *arguments)

    def fail(done: int) -> None:
        if done > PARTS:  # block 0 was computed
            absent = host.absent([ExpertKey(1, expert) for expert in range(model.tiers.manifest.blocks[1].experts)])
            at_error.append((len(absent), ended()))
            raise ValueError("closed")

    monkeypatch.setattr(ShardStore, "read_into", held)
    monkeypatch.setattr(grouped, "GROUP_OUTPUTS", 5)
    monkeypatch.setattr(grouped, "NEARLY_ALL", 0.0)
    with model.tiers, torch.no_grad(), contextlib.ExitStack() as ending:
        ending.callback(may_read.set)
        with pytest.raises(ValueError, match="closed"):
            run_in_lockstep(passes_of(model, ids_of(8), DynamicCache()), fail)
        ((absent, before),) = at_error
        assert absent > 2
        assert ended() - before >= absent - 1, "one is being read"


def test_an_error_of_a_pass_is_raised(model: Any) -> None:
    passes = passes_of(model, ids_of(7), DynamicCache())

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_in_lockstep([*passes, Pass(fail)], lambda _: None)
