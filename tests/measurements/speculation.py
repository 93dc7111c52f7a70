"""Compare decoding with and without speculation, in one process.

    python tests/measurements/speculation.py DIR --ram 50% --disk 0.2 --rounds 20

One model is loaded for each way, and all get the same token ids, one at a time:

    off, off again  no speculation; the difference between the two shows the noise
    auto, always    the values of ``speculate``
    asking          predictions are made and judged, and nothing is prefetched
    perfect         predictions are the true routing, which was recorded before
    adversary       ``auto`` with predictions that are all wrong, after the first few

In each round all ways decode a new sequence, by turns of a few steps, in an order that rotates. Prints the median time
of a step, and how many times as fast each way is as the first: the mean over the rounds, with its 95 % interval. With
``--disk``, reads take as long as on a disk of so many GB/s that serves one read after the other.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moetier
from moetier.runtime.config import TIER_OPTIONS, Size
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.moe.gates import Gates
from moetier.runtime.speculation.predictor import Prediction
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES
from moetier.tiers.stats import TierStats
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.store.shard import OpenShard
from moetier.tiers.text import format_bytes

WAYS = {
    "off": "off",
    "off again": "off",
    "auto": "auto",
    "always": "always",
    "asking": "always",
    "perfect": "always",
    "adversary": "auto",
}
TURN = 8  # steps
TRUSTED = 16  # steps for which the adversary is right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram", default="50%", help="a share is of all experts (default: %(default)s)")
    parser.add_argument("--disk", type=float, default=0.0, metavar="GB/S", help="0: as fast as it is (default)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64, help="of a round (default: %(default)s)")
    parser.add_argument("--policy", choices=list(POLICIES), default=DEFAULT_POLICY, help="(default: %(default)s)")
    parser.add_argument("--look-ahead", type=int, default=TIER_OPTIONS["look_ahead"].default)
    parser.add_argument("--ways", default=",".join(WAYS), help="(default: %(default)s)")
    parser.add_argument("--text", type=Path, help="whose tokens are fed; random ones without it")
    arguments = parser.parse_args()
    manifest = read_manifest(store_folder(arguments.directory))
    ram = Size.parse(arguments.ram).of(manifest.stored_bytes)
    if arguments.disk:
        slow_down(arguments.disk * 1e9)
    ways = {name: WAYS[name] for name in arguments.ways.split(",")}
    models = {}
    for name, mode in ways.items():
        models[name], tokenizer = moetier.load(
            arguments.directory,
            ram=ram,
            daemon=None,
            speculate=mode,
            look_ahead=arguments.look_ahead,
            policy=arguments.policy,
        )
    ids = tokens_of(arguments, next(iter(models.values())), tokenizer)
    print(
        f"machine  {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads; {manifest.model}, "
        f"{format_bytes(ram)} of {format_bytes(manifest.stored_bytes)}, disk {arguments.disk or 'as it is'}",
        flush=True,
    )
    parts = [ids[start : start + arguments.tokens + 1] for start in range(0, len(ids) - 1, arguments.tokens)]
    if told := [name for name in ("perfect", "adversary") if name in models]:
        routing = record(models["off"], parts)
        for name in told:
            tell(models[name], routing, is_right=name == "perfect")
    if "asking" in models:
        models["asking"].tiers.speculation._admission.request = lambda block, prediction: prediction.likely
    before = {name: model.tiers.stats()[0] for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number, part in enumerate(parts):
        seconds = decode(models, part, number)
        if number:  # the first is not counted
            for name in ways:
                times[name].append(seconds[name] / arguments.tokens)
    for name in ways:
        report(next(iter(ways)), name, times, models[name], before[name], len(ids) - 1)


def report(base: str, name: str, times: dict[str, list[float]], model: Any, before: TierStats, steps: int) -> None:
    ratios = [math.log(first / this) for first, this in zip(times[base], times[name], strict=True)]
    mean = statistics.fmean(ratios)
    half = student(len(ratios) - 1) * statistics.stdev(ratios) / math.sqrt(len(ratios))
    (host,) = model.tiers.stats()
    hits, misses = host.hits - before.hits, host.misses - before.misses
    waited = (host.wait_seconds - before.wait_seconds) / steps
    print(
        f"{name:<11} {1e3 * statistics.median(times[name]):8.2f} ms a step, {math.exp(mean):.3f} times as fast as "
        f"{base} ({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f}); hits {hits / (hits + misses):.1%}, "
        f"{format_bytes(host.bytes_in - before.bytes_in)} read, {host.useful} useful, {host.late} late, "
        f"{host.wasted} wasted, {host.cancelled} cancelled, {host.dropped} dropped; "
        f"waited {1e3 * waited:.2f} ms a step",
        flush=True,
    )
    if model.tiers.speculation is not None:
        predictions = model.tiers.speculation.stats()
        print(
            f"{'':11} in {predictions.steps_on} of {predictions.steps_on + predictions.steps_off} steps, "
            "in which asking took "
            f"{1e3 * predictions.seconds / max(predictions.steps_on, 1):.2f} ms, and "
            f"{sum(predictions.right) / max(sum(predictions.guesses), 1):.1%} of guesses were right"
        )


def student(freedom: int) -> float:
    """Of Student's t, the 97.5 % point: Abramowitz & Stegun, 26.7.5."""
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@torch.no_grad()
def decode(models: dict[str, Any], ids: list[int], number: int) -> dict[str, float]:
    """Seconds that all steps behind the first took, by way; the tokens must be the same."""
    outputs = {}
    for name, model in models.items():
        with alone(model):
            outputs[name] = model(torch.tensor([ids[:1]]), use_cache=True)
    seconds = dict.fromkeys(models, 0.0)
    names = [*models]
    for turn, start in enumerate(range(1, len(ids), TURN), start=number):
        first = turn % len(names)
        order = names[first:] + names[:first]
        for name in order if turn // len(names) % 2 == 0 else order[::-1]:
            model, output = models[name], outputs[name]
            with alone(model):
                began = time.perf_counter()
                for step in range(start, min(start + TURN, len(ids))):
                    model.present = (number, step)
                    output = model(
                        torch.tensor([ids[step : step + 1]]), **{CACHE: output.past_key_values}, use_cache=True
                    )
                seconds[name] += time.perf_counter() - began
            outputs[name] = output
        logits = [output.logits for output in outputs.values()]
        assert all(torch.equal(logits[0], other) for other in logits), "tokens depend on speculation"
    return seconds


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """What the others did meanwhile is in no step of the model's."""
    speculation = model.tiers.speculation
    if speculation is not None and speculation._began:
        paused = model.__dict__.get("paused")
        speculation._began = 0.0 if paused is None else speculation._began + time.perf_counter() - paused
    yield
    model.paused = time.perf_counter()


def tokens_of(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> list[int]:
    count = (arguments.rounds + 1) * arguments.tokens + 1
    if arguments.text is None:
        chance = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (count,), generator=chance).tolist()
    ids: list[int] = tokenizer(arguments.text.read_text()).input_ids
    return (ids * (count // len(ids) + 1))[:count]


@torch.no_grad()
def record(model: Any, parts: list[list[int]]) -> dict[tuple[int, int, int], Tensor]:
    """Round, step and block -> the experts that are used there."""
    states: dict[tuple[int, int, int], Tensor] = {}

    def note(block: int, experts: Tensor, weights: Tensor) -> None:
        states[number, step, block] = experts

    with Gates(model).observe(experts=note):
        for number, ids in enumerate(parts):  # noqa: B007 (noted)
            cache = None
            for step, token in enumerate(ids):  # noqa: B007
                output = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
                cache = output.past_key_values
    return states


def tell(model: Any, routing: dict[tuple[int, int, int], Tensor], *, is_right: bool) -> None:
    """As if its gates had guessed it; or, asked just the same, what is not used, once they are trusted."""
    model.present = (0, 0)
    shortcuts = model.tiers.speculation._shortcuts
    ask = shortcuts.predict

    def predict(block: int, hidden: Tensor) -> Prediction:
        used = routing[*model.present, block].flatten().tolist()
        if is_right:
            return Prediction(used, [])
        said = ask(block, hidden).likely
        if model.present < (0, TRUSTED):
            return Prediction(used, [])
        others = [expert for expert in range(model.tiers.manifest.blocks[block].experts) if expert not in used]
        return Prediction(others[: len(said)], [])

    shortcuts.predict = predict


def slow_down(bytes_a_second: float) -> None:
    """Reads take as long as they would on a disk of this speed, which serves one after the other."""
    lock, free = threading.Lock(), [0.0]
    read = OpenShard.read

    def slow(shard: OpenShard, offset: int, view: memoryview) -> None:
        with lock:
            end = free[0] = max(time.perf_counter(), free[0]) + len(view) / bytes_a_second
        read(shard, offset, view)
        time.sleep(max(0.0, end - time.perf_counter()))

    OpenShard.read = slow  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
