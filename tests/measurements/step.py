"""Measure what each kernel saves of a decode step, and how long each part of the model takes.

    python tests/measurements/step.py DIR [--steps N] [--threads N]

Every expert is demanded once. Then fixed tokens are decoded one at a time: by turns with all kernels, and without some
of them (WAYS). Printed are medians (quartiles) of the milliseconds of a step, and of the ratio to the step with all
kernels in the same round.

Then the parts of a step are timed. Modules are grouped by the last part of their paths. Beside modules, the function of
attention, the rotation of queries and keys, and the update of the cache are timed. For each group: calls a step,
microseconds of a call with all that it calls, and microseconds a step of the group itself, without the parts that are
timed within it. They are medians (least) over the steps. The time of a part that calls others includes torch's dispatch
to them. A clock adds about a microsecond to each call, and a layer with clocks is computed by its modules.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from overhead import load_warm, tokens_of
from transformers import AttentionInterface, Cache

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer import attention, norm
from moetier.runtime.kernels.layer.routing import CompiledRouter
from moetier.runtime.kernels.products.row import RowMatrix
from moetier.runtime.moe.layers import OneTokenLayer
from moetier.tools.cli.report import table


def never(*_: Any, **__: Any) -> None:
    """Refuse all inputs."""


# way -> what is replaced: an object, the name of its attribute, and the value
LAYERS = (OneTokenLayer, "compute", never)  # a layer is computed by several modules
WAYS: dict[str, list[tuple[Any, str, Any]]] = {
    "all": [],
    "no layers": [LAYERS],
    "nor routing": [LAYERS, (CompiledRouter, "compute", never)],
    "nor norm": [LAYERS, (norm, "rms_norm", never)],
    "nor row": [LAYERS, (RowMatrix, "multiply", never)],
    "nor attention": [LAYERS, (attention, "_fits", never)],
}


class Clocks:
    """Nanoseconds of a step's parts."""

    def __init__(self) -> None:
        self._inside: list[int] = []  # for each open call, nanoseconds of the parts within it
        self.whole: dict[str, int] = defaultdict(int)
        self.own: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            self._inside.append(0)
            began = time.perf_counter_ns()
            try:
                return call(*arguments, **named)
            finally:
                spent = time.perf_counter_ns() - began
                self.own[name] += spent - self._inside.pop()
                self.whole[name] += spent
                self.calls[name] += 1
                if self._inside:
                    self._inside[-1] += spent

        return watched

    def take(self) -> list[dict[str, int]]:
        """Return calls, whole and own time by part since the last time, and begin anew."""
        counts_so_far = [dict(counts) for counts in (self.calls, self.whole, self.own)]
        for counts in (self.calls, self.whole, self.own):
            counts.clear()
        return counts_so_far


def watch(model: Any, clocks: Clocks) -> None:
    for path, module in model.named_modules():
        name = re.sub(r"\.?\d+$", "", path).rpartition(".")[2]
        module.forward = clocks.timed(name or "model", module.forward)
    code = sys.modules[type(model).__module__]
    if hasattr(code, "apply_rotary_pos_emb"):
        code.apply_rotary_pos_emb = clocks.timed("(rotation)", code.apply_rotary_pos_emb)
    Cache.update = clocks.timed("(cache)", Cache.update)
    name = model.config._attn_implementation
    AttentionInterface.register(name, clocks.timed("(attention)", AttentionInterface()[name]))


@torch.inference_mode()
def decode(model: Any, ids: list[int], clocks: Clocks) -> tuple[list[float], list[list[dict[str, int]]]]:
    cache, steps, parts = None, [], []
    for token in ids:
        began = time.perf_counter()
        output = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
        steps.append(time.perf_counter() - began)
        cache = output[CACHE]
        parts.append(clocks.take())
    return steps, parts


@torch.inference_mode()
def compare(model: Any, ids: list[int]) -> list[dict[str, float]]:
    """Return the milliseconds of a step in each way, for each round."""
    cache, rounds = None, []
    ways = [*WAYS]
    for number, token in enumerate(ids):
        results = {}
        for way in [*ways[number % len(ways) :], *ways[: number % len(ways)]]:
            with contextlib.ExitStack() as stack:
                for target, name, value in WAYS[way]:
                    stack.enter_context(patch.object(target, name, value, create=True))
                began = time.perf_counter()
                output = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
                results[way] = 1e3 * (time.perf_counter() - began)
            cache = output[CACHE]
        rounds.append(results)
    return rounds


def quartiles(numbers: list[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm", type=int, default=40, help="steps that are not counted (default: %(default)s)")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_warm(arguments.directory, ram="100%")
    ids = tokens_of(arguments.directory, model, arguments.warm + arguments.steps)
    rounds = compare(model, ids)[arguments.warm :]
    clocks = Clocks()
    watch(model, clocks)
    steps, parts = (durations[arguments.warm :] for durations in decode(model, ids, clocks))
    print(
        f"machine     {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads; "
        f"{model.tiers.manifest.model}"
    )
    lines = [["kernels", "ms a step", "ratio"]]
    for way in WAYS:
        times = [durations[way] for durations in rounds]
        ratios = [durations[way] / durations["all"] for durations in rounds]
        lines.append([way, quartiles(times, 2), quartiles(ratios, 3)])
    print(table(lines))
    print(f"with clocks {1e3 * statistics.median(steps):.2f} ({1e3 * min(steps):.2f}) ms")
    lines = [["part", "calls", "us a call", "least", "own us a step", "least"]]
    rows = []
    for name, calls in parts[-1][0].items():
        whole = [part[1][name] / 1e3 / calls for part in parts]
        own = [part[2][name] / 1e3 for part in parts]
        rows.append((statistics.median(own), name, calls, statistics.median(whole), min(whole), min(own)))
    for own, name, calls, whole, least, least_own in sorted(rows, reverse=True):
        lines.append([name, f"{calls}", f"{whole:.1f}", f"{least:.1f}", f"{own:.0f}", f"{least_own:.0f}"])
    print(table(lines))


if __name__ == "__main__":
    main()
