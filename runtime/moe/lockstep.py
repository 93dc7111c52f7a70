"""Run several forward passes of one model in lockstep, and compute each block's experts for all of them together.

A long prompt is computed in several forward passes, because attention of all its tokens would take too much memory.
Each pass runs in a greenlet, which pauses at each block's experts until all passes are there. So the experts
of a block are read once for the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

from greenlet import getcurrent, greenlet
from torch import Tensor

from .block import RoutedTokens
from .experts import compute_together, pausing


class Pass(NamedTuple):
    """A forward pass of some tokens of a prompt."""

    run: Callable[[], Any]
    is_wanted: Callable[[], bool] = lambda: True  # if it returns False, the rest is not computed


class _Paused(NamedTuple):
    """A forward pass that waits for the outputs of an Experts module."""

    thread: greenlet
    module: Any
    routed: RoutedTokens


def run_in_lockstep(
    passes: Sequence[Pass],
    between: Callable[[int], object],
    running: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Any]:
    """Return the results of forward passes of a model; None for those that are not wanted any more.

    Each pass goes on to its next block of experts before those after it do. So it may use what those before it have
    left in caches, such as keys and values.

    Args:
        passes: forward passes, which are called without gradients.
        between: is called between groups of experts and passes, while no expert is leased, with the number of finished
            parts of all passes. A pass has one part more than the model has blocks of experts. It may compute with the
            model, and raise an exception, which ends all passes.
        running: gives a context in which passes run, but not ``between``.
    """
    results: list[Any] = [None] * len(passes)
    paused: dict[int, _Paused] = {}  # by number of the pass, ascending
    done = 0
    module: Any = None  # the Experts module that was computed last

    def proceed(number: int, thread: greenlet, *given: Any) -> None:
        """Let a pass run until it pauses or ends."""
        nonlocal done
        with running():
            reached = thread.switch(*given)
        done += 1
        if thread.dead:
            results[number] = reached
        else:
            paused[number] = _Paused(thread, *reached)

    try:
        for number, one in enumerate(passes):
            if one.is_wanted():
                thread = greenlet(one.run)
                thread.gr_context = pausing(_pause)
                proceed(number, thread)
                between(done)
        while paused:
            for number in [number for number in paused if not passes[number].is_wanted()]:
                paused.pop(number).thread.throw()  # GreenletExit
            if not paused:
                break
            module = next(iter(paused.values())).module
            waiting = [number for number, one in paused.items() if one.module is module]
            routed = [paused[number].routed for number in waiting]
            with closing(compute_together(module, routed, lambda: between(done))) as outputs:
                for number, output in zip(waiting, outputs, strict=True):
                    routed.clear()  # passes make the inputs of their next blocks, so those of this one must be freed
                    proceed(number, paused.pop(number).thread, output)
                    between(done)
    finally:
        while paused:
            paused.popitem()[1].thread.throw()
        if module is not None:  # unless it is the last one, the passes have ended early
            module.tiered.cancel_following()
    return results


def _pause(module: Any, routed: RoutedTokens) -> Tensor:
    """Return the outputs of an Experts module once ``run_in_lockstep`` has computed them."""
    outputs: Tensor = getcurrent().parent.switch((module, routed))
    return outputs
