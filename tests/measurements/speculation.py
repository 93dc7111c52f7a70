"""What speculation gains and costs: decoding with and without, in turns, in one process.

    python tests/measurements/speculation.py DIR --ram 50% --disk 0.2 --rounds 20

Feeds fixed token ids, one at a time, to one model for each way: ``off``; ``off again``, which shows the noise;
``auto``; ``always``; and ``perfect``, whose guesses are the routing that ``off`` has recorded. Each round runs all of
them, in an order that rotates. Prints the median time of a step, and the ratio of ``off`` to each way with the 95 %
interval of its mean. ``--disk`` makes reads wait as a disk of so many GB/s would: bytes come one after the other.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moetier
from moetier.runtime.config import Size, format_bytes
from moetier.runtime.gates import Gates, Routing
from moetier.tiers.folder import read_manifest, store_folder
from moetier.tiers.keys import ExpertKey
from moetier.tiers.store import ExpertStore

WAYS = {"off": "off", "off again": "off", "auto": "auto", "always": "always", "perfect": "always"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram", default="50%", help="a share is of all experts (default: %(default)s)")
    parser.add_argument("--disk", type=float, default=0.0, metavar="GB/S", help="0: as fast as it is (default)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64, help="of a round (default: %(default)s)")
    parser.add_argument("--look-ahead", type=int, default=2)
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
            arguments.directory, ram=ram, daemon=None, speculate=mode, look_ahead=arguments.look_ahead
        )
    ids = tokens_of(arguments, next(iter(models.values())), tokenizer)
    print(
        f"machine  {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads; {manifest.model}, "
        f"{format_bytes(ram)} of {format_bytes(manifest.stored_bytes)}, disk {arguments.disk or 'as it is'}",
        flush=True,
    )
    recorded = Recorded(models["off"])
    if "perfect" in models:
        recorded.tell(models["perfect"])
    times: dict[str, list[float]] = {name: [] for name in ways}
    logits: dict[str, Tensor] = {}
    for number in range(-1, arguments.rounds):  # one that is not counted
        part = ids[(number + 1) * arguments.tokens : (number + 2) * arguments.tokens + 1]
        names = [*ways]
        turn = number % len(names)
        order = ["off", *(name for name in names[turn:] + names[:turn] if name != "off")]
        if number % 2:  # what is recorded must be known before: else off is last as often as it is first
            order = order if "perfect" in ways else order[::-1]
        for name in order:
            recorded.is_recording = name == "off"
            seconds, logits[name] = decode(models[name], part, recorded)
            if number >= 0:
                times[name].append(seconds / (len(part) - 1))
        assert all(torch.equal(logits["off"], found) for found in logits.values()), "tokens depend on speculation"
    for name in ways:
        report(name, times, models[name])


def report(name: str, times: dict[str, list[float]], model: Any) -> None:
    ratios = [math.log(off / on) for off, on in zip(times["off"], times[name], strict=True)]
    mean = statistics.fmean(ratios)
    half = 2.093 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0  # Student's t, 19
    (host,) = model.tiers.stats()
    print(
        f"{name:<9} {1e3 * statistics.median(times[name]):8.2f} ms a step, {math.exp(mean):.3f} times as fast as off "
        f"({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f}); hits {host.hit_ratio:.1%}, "
        f"{format_bytes(host.bytes_in)} read, {host.useful} useful, {host.late} late, {host.wasted} wasted",
        flush=True,
    )
    if model.tiers.speculation is not None:
        stats = model.tiers.speculation.stats()
        print(f"{'':9} in {stats.steps_on} of {stats.steps_on + stats.steps_off} steps")


@torch.no_grad()
def decode(model: Any, ids: list[int], recorded: Recorded) -> tuple[float, Tensor]:
    """Seconds of all steps behind the first; the last logits."""
    output = model(torch.tensor([ids[:1]]), use_cache=True)
    began = time.perf_counter()
    for step, token in enumerate(ids[1:]):
        recorded.step = step
        output = model(torch.tensor([[token]]), cache=output.past_key_values, use_cache=True)
    return time.perf_counter() - began, output.logits


def tokens_of(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> list[int]:
    count = (arguments.rounds + 1) * arguments.tokens + 1
    if arguments.text is None:
        chance = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (count,), generator=chance).tolist()
    found: list[int] = tokenizer(arguments.text.read_text()).input_ids
    return (found * (count // len(found) + 1))[:count]


class Recorded:
    """The routing of one model's steps, told to another as if its gates had guessed it."""

    def __init__(self, model: Any) -> None:
        self.step = 0
        self.is_recording = False
        self._routing: dict[tuple[int, int], Tensor] = {}
        Gates(model).observe(experts=self._record)

    def _record(self, block: int, experts: Tensor, weights: Tensor) -> None:
        if self.is_recording:
            self._routing[self.step, block] = experts

    def tell(self, model: Any) -> None:
        gates = model.tiers.speculation._gates

        def predict(block: int, hidden: Tensor) -> Routing:
            experts = self._routing.get((self.step, block), torch.zeros((1, 1), dtype=torch.int64))
            return Routing(experts, torch.ones(experts.shape))

        gates.predict = predict


def slow_down(bytes_a_second: float) -> None:
    """Reads take as long as they would on a disk of this speed, which serves one after the other."""
    lock, free = threading.Lock(), [0.0]
    read_into = ExpertStore.read_into

    def slow(store: ExpertStore, key: ExpertKey, buffer: memoryview, pause: Any = None) -> None:
        with lock:
            end = free[0] = max(time.perf_counter(), free[0]) + len(buffer) / bytes_a_second
        read_into(store, key, buffer, pause)
        time.sleep(max(0.0, end - time.perf_counter()))

    ExpertStore.read_into = slow  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
