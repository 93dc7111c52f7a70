"""Compare reads of the first tokens after a long prompt with those of the same tokens in a warm cache, by replay.

    python tests/measurements/after_prompt.py T.npz... [--slots .25 .5]

T.npz are traces, as `moetier trace` records them. No model is needed. ``--slots`` is the share of each block's experts
that are cached. The last TOKENS tokens of each sequence are replayed three times: in a cache in which the tokens before
them were decoded (warm); after a prompt that needed all experts once, as long prompts do, in an empty cache (first);
and after such a prompt in a cache in which the tokens before them were decoded (later). The prompt ends with the tokens
before the last ones. Printed
are the experts read a token in each, and the reads of warm divided by those of the others: the ratio of the speeds if
reading takes all the time. Where experts are read at least once in any cache, such reads are counted too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moetier.runtime.moe.grouped import RECENT
from moetier.runtime.trace.trace import Trace
from moetier.tiers.cache.policies import DEFAULT_POLICY, POLICIES
from moetier.tiers.layout import ExpertKey
from moetier.tools.cli.report import table
from moetier.tools.traces.simulation import SimulatedTier, demands_of

TOKENS = 32


def reads(trace: Trace, sequence: int, share: float) -> tuple[int, int, int]:
    """Return how many experts the last tokens of a sequence read: warm, after a first prompt, after a later one."""
    warm = first = later = 0
    for block, experts in enumerate(trace.num_experts):
        demands = [demand for demand in demands_of(trace, sequence, block) if not demand.is_prompt]
        context, last = demands[:-TOKENS], demands[-TOKENS:]
        prompt = [ExpertKey(block, expert) for expert in range(experts)]
        recent = {key for demand in context[-RECENT:] for key in demand.keys}
        tiers = [SimulatedTier.of_block(block, round(share * experts), POLICIES[DEFAULT_POLICY]) for _ in range(3)]
        for tier in (tiers[0], tiers[2]):
            for demand in context:
                tier.demand(demand.keys)
        for tier in tiers[1:]:
            tier.demand(prompt, is_prompt=True, kept=recent)
        counts = [sum(len(tier.demand(demand.keys)) for demand in last) for tier in tiers]
        warm, first, later = (total + count for total, count in zip((warm, first, later), counts, strict=True))
    return warm, first, later


def main() -> None:
    """Parse the arguments, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", metavar="T.npz")
    parser.add_argument("--slots", type=float, nargs="+", default=[0.25, 0.5])
    arguments = parser.parse_args()
    lines = [["trace", "slots", "warm", "first prompt", "ratio", "later prompt", "ratio"]]
    for path in arguments.traces:
        trace = Trace.load(path)
        sequences = [
            number
            for number, span in enumerate(trace.sequences)
            if len(span) - (trace.n_prefill[number] if trace.n_prefill else 0) >= 2 * TOKENS
        ]
        for share in arguments.slots:
            totals = [sum(counts) for counts in zip(*(reads(trace, n, share) for n in sequences), strict=True)]
            warm, first, later = (total / TOKENS / len(sequences) for total in totals)
            ratios = [f"{warm / max(count, 1e-9):.2f}" for count in (first, later)]
            lines.append(
                [path.stem, f"{share:.0%}", f"{warm:.1f}", f"{first:.1f}", ratios[0], f"{later:.1f}", ratios[1]]
            )
    print(table(lines))


if __name__ == "__main__":
    main()
