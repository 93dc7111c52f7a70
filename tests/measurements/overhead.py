"""Measure moetier's overhead in microseconds for each block of a decode step, when all experts are in memory.

    python tests/measurements/overhead.py [DIR]

Without DIR, a model with random weights is made in a temporary folder: 4 layers with 128 experts of 256 x 128, top-8.
Every expert is demanded once. Then fixed tokens are decoded one at a time. Prints for a block, as medians (quartiles)
over the steps:

    forward     the forward of an Experts module
    compiled    the compiled code in it
    products    the two matrix products in the compiled code
    beyond      forward without products: lookup, rounding, activation, weighted sum and Python
    Python      forward without the compiled code

The parts of the compiled code are called one by one to time each of them. This adds some microseconds. Layers are
computed by their modules, so that there is a forward to time.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import moetier
from moetier.runtime.config import Size
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.experts import expert_kernels as kernels
from moetier.runtime.kernels.jit.team import KernelTask, Program
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.layers import OneTokenLayer
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tools.synthetic.checkpoint import TOKENS_FILE, read_tokens
from moetier.tools.synthetic.store import convert_synthetic
from moetier.tools.synthetic.tensors import make_synthetic

GEOMETRY, LAYERS = "qwen3-8L", 4
SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4, "head_dim": 64}
CLOCKS = ("forward", "compiled", "products")


class Clocks:
    """Seconds of a step that functions took, those inside a forward of experts."""

    def __init__(self, experts: type) -> None:
        self.seconds: dict[str, float] = {}
        self.calls = 0  # of a block
        forward, clocks = experts.forward, self

        class Watched(Program):
            def __init__(self, tasks: Sequence[KernelTask]) -> None:
                super().__init__(tasks)
                self._alone = [Program([task]) for task in tasks]

            def run(self) -> None:
                for number, step in enumerate(self._alone):
                    began = time.perf_counter()
                    step.run()
                    seconds = time.perf_counter() - began
                    clocks.seconds["compiled"] += seconds
                    if number in (1, 3):  # the order: rounding, product, activation, product, placing, ...
                        clocks.seconds["products"] += seconds

        kernels.Program = Watched  # type: ignore[misc]

        def watched(module: Any, *arguments: Any) -> Any:
            began = time.perf_counter()
            output = forward(module, *arguments)
            self.seconds["forward"] += time.perf_counter() - began
            self.calls += 1
            return output

        experts.forward = watched
        OneTokenLayer.compute = lambda *_, **__: None  # type: ignore[method-assign]

    def reset(self) -> None:
        self.seconds, self.calls = dict.fromkeys(CLOCKS, 0.0), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm", type=int, default=40, help="steps that are not counted (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moetier-overhead-") as temporary:
        directory = arguments.directory or make_store(Path(temporary))
        model = load_warm(directory, ram="100%")
        manifest = model.tiers.manifest
        misses = model.tiers.host.stats().misses
        (experts,) = {type(module) for module in experts_modules(model).values()}
        ids = tokens_of(directory, model, arguments.warm + arguments.steps)
        steps = decode(model, ids, Clocks(experts))[arguments.warm :]
        assert model.tiers.host.stats().misses == misses, "not all experts are resident"
    print(
        f"machine     {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads; "
        f"{manifest.model}, {len(manifest.blocks)} blocks of {manifest.blocks[0].experts} experts, "
        f"{steps[0]['calls']:.0f} calls of a block a step"
    )
    for name in (*CLOCKS, "beyond", "Python"):
        low, middle, high = statistics.quantiles((1e6 * step[name] / step["calls"] for step in steps), n=4)
        print(f"{name:<12}{middle:7.2f} ({low:.2f} to {high:.2f}) us a block")
    print(f"a step      {1e3 * statistics.median(step['step'] for step in steps):7.2f} ms")


def load_warm(directory: Path, ram: str) -> Any:
    """The model, every expert demanded once; a share is of all experts."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    budget = Size.parse(ram).of(read_manifest(store_folder(directory)).stored_bytes)
    model, _ = moetier.load(directory, ram=budget, daemon=None, speculate="off")
    for number, block in enumerate(model.tiers.manifest.blocks):
        for expert in range(block.experts):
            assert all(lease.validate() for lease in model.tiers.source.acquire([ExpertKey(number, expert)]))
    return model


def make_store(base: Path) -> Path:
    make_synthetic(base / "checkpoint", geometry=GEOMETRY, blocks=LAYERS, sizes=SIZES)
    convert_synthetic(base / "checkpoint", base / "store")
    return base / "store"


def tokens_of(directory: Path, model: Any, count: int) -> list[int]:
    if (directory / TOKENS_FILE).exists():
        ids = read_tokens(directory)
    else:
        chance = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (count,), generator=chance).tolist()
    return (ids * (count // len(ids) + 1))[:count]


@torch.inference_mode()
def decode(model: Any, ids: list[int], clocks: Clocks) -> list[dict[str, float]]:
    """Seconds of each step, and how many experts it called."""
    cache, steps = None, []
    for token in ids:
        clocks.reset()
        began = time.perf_counter()
        output = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
        step, cache = time.perf_counter() - began, output.past_key_values
        beyond = clocks.seconds["forward"] - clocks.seconds["products"]
        python = clocks.seconds["forward"] - clocks.seconds["compiled"]
        steps.append(clocks.seconds | {"beyond": beyond, "Python": python, "step": step, "calls": clocks.calls})
    return steps


if __name__ == "__main__":
    sys.exit(main())
