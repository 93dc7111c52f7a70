"""Simulate how a prefill changes the hit ratio of the decoding that follows it, for each policy.

    python tests/measurements/passages.py tests/assets/traces/gptoss_20b_12seq.npz --slots 8,16,24

The sequences of the trace are joined to one. At several places in it, three parts follow each other: 100 tokens that
are decoded, 512 tokens of a prefill, and 32 or 128 tokens that are decoded. Each place is simulated with and without
the prefill. Prints the difference of the last part's hit ratios in percentage points: the mean over all places, and the
worst. ``prefill.py`` measures hit ratios and times with a model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from moetier.runtime.trace.trace import Trace
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.layout import ExpertKey
from moetier.tools.traces.simulation import SimulatedTier, demands_of

BEFORE = 100  # tokens
PREFILL = 512
AFTER = (32, 128)

Rows = Sequence[tuple[ExpertKey, ...]]  # the experts of each token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="T.npz")
    parser.add_argument("--slots", required=True, metavar="N,N", help="experts of each block that are cached")
    parser.add_argument("--every", type=int, default=200, metavar="TOKENS", help="a place (default: %(default)s)")
    arguments = parser.parse_args()
    trace = Trace.load(arguments.trace)
    blocks = [rows_of(trace, block) for block in range(trace.block_count)]
    places = range(0, trace.tokens - BEFORE - PREFILL - max(AFTER) + 1, arguments.every)
    print(f"{arguments.trace.stem}, {len(places)} places")
    for tokens in AFTER:
        for slots in map(int, arguments.slots.split(",")):
            cells = [f"{policy} {_spread(blocks, policy, slots, places, tokens)}" for policy in POLICIES]
            print(f"{slots:>3} cached, {tokens:>3} tokens behind: {'; '.join(cells)}", flush=True)


def rows_of(trace: Trace, block: int) -> Rows:
    """One sequence behind the other."""
    return [demand.keys for sequence in range(len(trace.sequences)) for demand in demands_of(trace, sequence, block)]


def ratio_after(blocks: Sequence[Rows], policy: str, slots: int, start: int, tokens: int, *, prefill: bool) -> float:
    """Hit ratio of ``tokens`` that are decoded; before them 100 other tokens, and then perhaps a prefill of 512."""
    hits = wanted = 0
    for block in blocks:
        tier = SimulatedTier.of_block(block[0][0].block, slots, POLICIES[policy])
        rows = block[start:]
        for keys in rows[:BEFORE]:
            tier.demand(keys)
        behind = BEFORE + PREFILL
        if prefill:
            tier.demand(sorted(set().union(*rows[BEFORE:behind])), is_prompt=True)
        for keys in rows[behind : behind + tokens]:
            wanted += len(keys)
            hits += len(keys) - len(tier.demand(keys))
    return hits / wanted


def _spread(blocks: Sequence[Rows], policy: str, slots: int, places: Sequence[int], tokens: int) -> str:
    points = [
        100 * (ratio_after(blocks, policy, slots, place, tokens, prefill=True) - before)
        for place in places
        for before in [ratio_after(blocks, policy, slots, place, tokens, prefill=False)]
    ]
    return f"{statistics.fmean(points):z.1f}, {min(points):z.1f}"


if __name__ == "__main__":
    sys.exit(main())
