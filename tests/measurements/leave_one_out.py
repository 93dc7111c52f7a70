"""Measure what each part of speculation saves: replay decoding on a virtual clock, with all parts and without one.

    python tests/measurements/leave_one_out.py --traces tinymix,mixtral --disks .1,.2,.5,1,2 --records .2,2,20,90

The project's own code decides: ``Speculation`` and all that it uses, and the host tier (``virtual_tier.py``). Costs of
Python's own are constants below. ``tinymix`` runs the bundled model on a text first: its hidden states and gates are
real. Other traces have no hidden states: their predictions are drawn at random, with the recall RECALL.

A line is a case: the mean step in ms with everything on, the share of it for which the caller waited, and MB read.
Then for each way, in percent of these: how much longer the step is, how much longer the caller waits, and how much
more is read. ``staging`` has no staging buffers, ``ghost cache`` a controller that is not told the misses,
``statistics`` one that compares two means, ``controller`` none, ``learning`` shortcuts that stay as they are.
``perfect`` is told the routing, and ``off`` does not speculate. A GPU, and a daemon's clients, are not simulated.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from virtual_tier import Clock, VirtualTier

from moetier.runtime.moe.experts import groups
from moetier.runtime.moe.gates import Gates
from moetier.runtime.speculation import controller, speculation
from moetier.runtime.speculation.controller import Controller, Mode
from moetier.runtime.speculation.predictor import Prediction, Shortcuts
from moetier.runtime.speculation.speculation import Speculation
from moetier.runtime.trace.trace import Trace

ASSETS = Path(__file__).parent.parent / "assets"
TRACES = {
    "mixtral": "mixtral_8x7b_instruct_h39s",
    "gptoss20b": "gptoss_20b_12seq",
    "gptoss120b": "gptoss_120b_top2_bigmoeonedge",
    "qwen3": "qwen3_30b_a3b_top6_bigmoeonedge",
    "gemma4": "gemma4_26b_a4b_top6_bigmoeonedge",
}
RECALL, LEARNED = 0.81, 0.03  # of drawn predictions, one layer ahead; and what learning contributes to it
POPULAR = 0.7  # how much a drawn prediction leans to experts used often, in standard deviations of its noise

# seconds
ATTENTION, EXPERT = 3e-4, 6e-5  # of a block and of an expert, besides its bytes
BYTE = 1 / 25e9  # of an expert that is computed with; attention takes a quarter of an expert's bytes
PREDICT, LEARN = 6e-5, 2e-5  # for a prediction, its requests and its judgement; for what it teaches

WAYS = ("staging", "ghost cache", "statistics", "controller", "learning", "perfect", "off")


class Routing(NamedTuple):
    """Routing of T tokens and B blocks, with the model's own states where it is run."""

    experts: Any  # [T, B, K]
    num_experts: int
    hidden: Tensor | None = None  # [T, B, 1, H], at the entry of the MoE part
    gates: Any = None


class Predictor:
    """In place of the model's shortcuts and their gates."""

    def __init__(self, clock: Clock, routing: Routing, way: str) -> None:
        blocks = routing.experts.shape[1]
        experts = SimpleNamespace(num_experts=routing.num_experts)
        self.gates, self.look_ahead, self.first = self, 1, 0
        self.blocks: Any = [SimpleNamespace(block=block, experts=experts) for block in range(blocks)]
        self.token = 0
        self.hooks: dict[int, Callable[[int, Tensor], None]] = {}
        self._clock, self._routing, self._way = clock, routing, way
        self._real = None if routing.gates is None else Shortcuts(routing.gates, 1)
        self._drawn = None
        if self._real is None:
            recall = RECALL - (LEARNED if way == "learning" else 0.0)
            self._drawn = draw(routing.experts.tobytes(), routing.experts.shape, routing.num_experts, recall)

    def ahead(self, block: int, distance: int) -> int | None:
        return block + distance if block + distance < len(self.blocks) else None

    def observe(self, *, entry: Any, blocks: Sequence[int], layer: Any = None) -> Any:
        self.hooks |= dict.fromkeys(blocks, entry)
        return SimpleNamespace(remove=lambda: [self.hooks.pop(block, None) for block in blocks])

    def predict(self, block: int, distance: int, hidden: Tensor) -> Prediction:
        self._clock.compute(PREDICT)
        if self._way == "perfect":
            return Prediction(self._routing.experts[self.token, block].tolist(), [])
        if self._real is not None:
            return self._real.predict(block, distance, hidden)
        top_k, ranked = self._routing.experts.shape[2], self._drawn[self.token, block].tolist()  # type: ignore[index]
        return Prediction(ranked[:top_k], ranked[top_k:])

    def learn(self, block: int, distance: int, hidden: Tensor, *, missed: set[int], in_vain: set[int]) -> None:
        if (missed or in_vain) and self._way != "learning":
            self._clock.compute(LEARN)
            if self._real is not None:
                self._real.learn(block, distance, hidden, missed=missed, in_vain=in_vain)


@cache
def draw(experts: bytes, shape: tuple[int, int, int], count: int, recall: float) -> Any:
    """Rank the best 2 K experts of each token and block, [T, B, 2 K], by noise, popularity among earlier tokens, and a
    bonus for the experts used, as large as gives the recall."""
    used = np.frombuffer(experts, np.int16).reshape(shape)
    chosen = np.zeros((*shape[:2], count), bool)
    np.put_along_axis(chosen, used.astype(np.int64), True, -1)
    popular = np.log(chosen.cumsum(0) - chosen + 0.5)
    popular = POPULAR * (popular - popular.mean(-1, keepdims=True)) / (popular.std(-1, keepdims=True) + 1e-9)
    noise = np.random.default_rng(0).standard_normal(chosen.shape) + popular
    least, most, top_k = 0.0, 9.0, shape[2]
    for _ in range(20):
        bonus = (least + most) / 2
        ranked = np.argsort(-(noise + bonus * chosen), -1)[..., : 2 * top_k]
        found = np.take_along_axis(chosen, ranked[..., :top_k], -1).mean()
        least, most = (bonus, most) if found < recall else (least, bonus)
    return ranked


@cache
def routing_of(name: str, tokens: int, blocks: int) -> Routing:
    """Read a trace, repeated where it is shorter, and evenly chosen ``blocks`` of it."""
    if name == "tinymix":
        return run_tinymix(tokens)
    trace = Trace.load(ASSETS / "traces" / f"{TRACES[name]}.npz")
    rows = np.resize(np.arange(sum(trace.n_prefill), trace.tokens), tokens)
    places = np.linspace(0, trace.block_count - 1, min(blocks, trace.block_count)).round().astype(int)
    return Routing(np.ascontiguousarray(trace.experts[rows][:, places]), max(trace.num_experts))


@torch.no_grad()
def run_tinymix(tokens: int) -> Routing:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(ASSETS / "tinymix")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tinymix")
    ids = tokenizer((ASSETS / "texts" / "it.txt").read_text(), return_tensors="pt").input_ids[:, :tokens]
    gates, hidden, experts = Gates(model), list[Tensor](), list[Tensor]()
    with gates.observe(
        entry=lambda block, state: hidden.append(state[0, :, None]),
        experts=lambda block, chosen, weights: experts.append(chosen),
    ):
        model(ids)
    chosen = torch.stack(experts, 1).numpy().astype(np.int16)
    return Routing(chosen, gates.blocks[0].experts.num_experts, torch.stack(hidden, 1), gates)


class Unadjusted(Controller):
    """Controller that is not told how many experts a step misses."""

    def step(self, seconds: float, misses: float = 0.0) -> None:
        super().step(seconds)


def compare_means(with_: list[Any], without: list[Any]) -> bool | None:
    """Compare means after the most pairs, in place of the controller's statistics."""
    if len(with_) < controller.MOST:
        return None
    return sum(window.seconds for window in with_) < sum(window.seconds for window in without)


STATISTICS = controller._verdict


class Case(NamedTuple):
    trace: str
    record: float  # MB
    disk: float  # GB/s
    share: int  # percent of the experts that are cached
    tokens: int
    blocks: int
    mode: str


class Result(NamedTuple):
    """Means of a step."""

    seconds: float
    waited: float  # seconds
    read: float  # bytes


def replay(case: Case, way: str) -> Result:
    routing = routing_of(case.trace, case.tokens, case.blocks)
    tokens, blocks, top_k = routing.experts.shape
    record = -(-int(case.record * 1e6) // 4096) * 4096
    quota = max(top_k, round(routing.num_experts * case.share / 100))
    clock = Clock()
    speculation.time = clock  # type: ignore[attr-defined, assignment]
    controller._verdict = compare_means if way == "statistics" else STATISTICS
    experts = routing.num_experts
    tier = VirtualTier(clock, blocks, experts, quota, record, case.disk * 1e9, staging=way != "staging")
    predictor: Any = Predictor(clock, routing, way)
    mode = Mode.OFF if way == "off" else Mode.ALWAYS if way in ("controller", "perfect") else Mode(case.mode)
    found = Speculation(predictor, tier, slots=quota, mode=mode)
    if way == "ghost cache":
        found._controller = Unadjusted(mode)
    found.attach()
    used, nothing = routing.experts.tolist(), torch.zeros(1, 1)
    warm, start = tokens // 8, Result(0, 0, 0)
    for token in range(tokens):
        predictor.token = token
        if token == warm:
            start = Result(clock.now, tier.virtual_monitor.waited, tier.virtual_loaders.bytes)
        for block in range(blocks):
            clock.compute(ATTENTION + record * BYTE / 4)
            if (hook := predictor.hooks.get(block)) is not None:
                hook(block, nothing if routing.hidden is None else routing.hidden[token, block])
            here: Any = SimpleNamespace(source=tier, block=block, demanded=found.demanded)
            for leases in groups(here, used[token][block]):
                clock.compute((EXPERT + record * BYTE) * len(leases))
    end = Result(clock.now, tier.virtual_monitor.waited, tier.virtual_loaders.bytes)
    return Result(*((after - before) / (tokens - warm) for after, before in zip(end, start, strict=True)))


def compare(case: Case, ways: Sequence[str]) -> dict[str, Result]:
    return {way: replay(case, way) for way in ("everything on", *ways)}


def percent(value: float, base: float) -> float:
    return 100 * (value / base - 1) if base else 0.0


def line(*cells: str) -> str:
    return "".join(f"{cell:>{10 if place < 7 else 22}}" for place, cell in enumerate(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--traces", default="tinymix", help=f"tinymix, {', '.join(TRACES)} (default: %(default)s)")
    add("--records", default=".2,2,20,90", help="MB (default: %(default)s)")
    add("--disks", default=".1,.2,.5,1,2", help="GB/s (default: %(default)s)")
    add("--shares", default="25,50,75", help="percent of the experts that are cached (default: %(default)s)")
    add("--ways", default=",".join(WAYS), help="(default: %(default)s)")
    add("--mode", choices=["auto", "always"], default="auto", help="with everything on (default: %(default)s)")
    add("--tokens", type=int, default=512, help="the first eighth is not counted (default: %(default)s)")
    add("--blocks", type=int, default=8, help="of a trace, at most (default: %(default)s)")
    add("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    arguments = parser.parse_args()
    ways = arguments.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"{unknown[0]!r} is not among {', '.join(WAYS)}")
    axes = [text.split(",") for text in (arguments.traces, arguments.records, arguments.disks, arguments.shares)]
    cases = [
        Case(trace, float(record), float(disk), int(share), arguments.tokens, arguments.blocks, arguments.mode)
        for trace, record, disk, share in itertools.product(*axes)
    ]
    print(line("trace", "MB", "GB/s", "%", "ms", "waited %", "MB read", *ways))
    savings: dict[str, list[tuple[float, Case]]] = {way: [] for way in ways}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for case, results in zip(cases, pool.map(compare, cases, itertools.repeat(ways)), strict=True):
            on = results["everything on"]
            cells = []
            for way, found in ((way, results[way]) for way in ways):
                bound = found if way == "controller" else min(found, results.get("off", found))
                savings[way].append((percent(bound.seconds, on.seconds), case))
                cells.append(" ".join(f"{percent(a, b):+.1f}" for a, b in zip(found, on, strict=True)))
            waited = f"{100 * on.waited / on.seconds:.0f}"
            head = [case.trace, *(f"{value:g}" for value in case[1:4])]
            print(line(*head, f"{1e3 * on.seconds:.2f}", waited, f"{on.read / 1e6:.2f}", *cells), flush=True)
    print(
        "\nWhat a part saves, in percent of the step with everything on; no more than speculation as a whole saves,\n"
        "but for the controller. The largest three, the median, and the smallest:"
    )
    for way, of_way in savings.items():
        places = [f"{gain:+.1f} ({', '.join(map(str, case[:4]))})" for gain, case in sorted(of_way, reverse=True)]
        print(f"{way:<16}{'; '.join(places[:3])}; {median(gain for gain, _ in of_way):+.1f}; {places[-1]}")


if __name__ == "__main__":
    main()
