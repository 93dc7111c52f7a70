"""Measure the rule by which an expert that daemons compute is fetched in place of that, on traces of real routing.

    python tests/measurements/remote_compute_slots.py tests/assets/traces/*.npz

A block's experts take one unit of time for each row that a daemon computes, and ``price`` units for each that is
fetched. Each block begins with empty slots. The tokens of a trace are repeated until there are TOKENS of them. A line
shows what the rule takes in units for each expert of a token; what it takes with the best choice of experts, made once
with the whole trace known; and what it takes if each absent expert is fetched, and the oldest one goes.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from pathlib import Path

from moetier.runtime.client.costs import RecentUses, earns_slot
from moetier.runtime.trace.trace import NO_EXPERT, Trace

PRICES = (3, 10, 30, 100, 300)
SHARES = (0.1, 0.25, 0.5)  # of a block's experts, that have slots
TOKENS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", metavar="T.npz")
    parser.add_argument("--blocks", type=int, default=4, help="of each trace, spread evenly (default: %(default)s)")
    arguments = parser.parse_args()
    ratios = []
    for path in arguments.traces:
        trace = Trace.load(path)
        for price in PRICES:
            for share in SHARES:
                parts = []
                for block in range(0, trace.block_count, -(-trace.block_count // arguments.blocks)):
                    tokens = [[int(e) for e in token if e != NO_EXPERT] for token in trace.experts[:, block]]
                    tokens *= -(-TOKENS // len(tokens))
                    slots = max(round(share * trace.num_experts[block]), 1)
                    rows = sum(map(len, tokens))
                    ways = (by_rule(tokens, slots, price), best(tokens, slots, price), by_age(tokens, slots, price))
                    parts.append([taken / rows for taken in ways])
                rule, choice, age = map(statistics.mean, zip(*parts, strict=True))
                ratios.append(rule / choice)
                print(
                    f"{path.stem:<36} price {price:3}, {share:.0%} slots: {rule:.3f}, best {choice:.3f}, all {age:.2f}"
                )
    print(f"the rule takes {statistics.geometric_mean(ratios):.2f} times the best choice, at most {max(ratios):.2f}")


def by_rule(tokens: list[list[int]], slots: int, price: float) -> float:
    uses, cached, taken = RecentUses(max(map(max, tokens)) + 1), set[int](), 0.0
    for experts in tokens:
        uses.add([(expert, 1) for expert in experts], 1)
        for expert in set(experts) - cached:
            least = min(map(uses.of, cached)) if len(cached) == slots else 0.0
            if not earns_slot(uses.of(expert), least, price):
                taken += 1
                continue
            if len(cached) == slots:
                cached.remove(min(cached, key=uses.of))
            cached.add(expert)
            taken += price
    return taken


def best(tokens: list[list[int]], slots: int, price: float) -> float:
    counts = [count for _, count in Counter(expert for token in tokens for expert in token).most_common()]
    return sum(min(price, count) for count in counts[:slots]) + sum(counts[slots:])


def by_age(tokens: list[list[int]], slots: int, price: float) -> float:
    cached, taken = dict[int, None](), 0.0  # in the order of their last use
    for experts in tokens:
        for expert in experts:
            if expert not in cached:
                taken += price
                if len(cached) == slots:
                    del cached[next(iter(cached))]
            cached.pop(expert, None)
            cached[expert] = None
    return taken


if __name__ == "__main__":
    main()
