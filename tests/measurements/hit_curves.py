"""Compute hit ratios by the share of cached experts, from traces of trained models, for ``moetier plan``.

    python tests/measurements/hit_curves.py tests/assets/traces/*.npz -o tools/plan/hit_curves.json

Each trace is simulated with the default policy and several numbers of slots for each block (as in ``moetier replay``).
The sequences of a trace are short and begin with an empty cache, which can't hit at the first use of an expert. So the
first use of an expert in a sequence counts as a part of a hit: the share of the block's experts that are cached, as if
the cached experts had been drawn at random.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moetier.runtime.trace.trace import Trace
from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tools.traces.simulation import demands_of, simulate

POINTS = (1 / 128, 1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, *(part / 16 for part in range(2, 17)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", metavar="T.npz")
    parser.add_argument("-o", type=Path, dest="target", required=True, metavar="FILE")
    arguments = parser.parse_args()
    curves = [curve_of(path) for path in arguments.traces]
    lines = ",\n".join("    " + json.dumps(curve) for curve in curves)
    arguments.target.write_text(f'{{\n  "policy": "{DEFAULT_POLICY}",\n  "curves": [\n{lines}\n  ]\n}}\n')


def curve_of(path: Path) -> dict[str, Any]:
    trace = Trace.load(path)
    (experts,) = set(trace.num_experts)
    counts = sorted({slots for share in POINTS if (slots := round(share * experts)) >= 1})
    first = first_uses(trace)
    ratios = []
    for slots in counts:
        found = simulate(trace, DEFAULT_POLICY, slots).decoding
        ratios.append(round((found.hits + first * slots / experts) / found.lookups, 4))
    shares = [round(slots / experts, 5) for slots in counts]
    return {"trace": path.stem, "experts": experts, "top_k": trace.top_k, "shares": shares, "hit_ratios": ratios}


def first_uses(trace: Trace) -> int:
    """Lookups while decoding of experts that their sequence had not used before."""
    count = 0
    for block in range(trace.block_count):
        for sequence in range(len(trace.sequences)):
            seen: set[object] = set()
            for demand in demands_of(trace, sequence, block):
                count += 0 if demand.is_prompt else len(set(demand.keys) - seen)
                seen.update(demand.keys)
    return count


if __name__ == "__main__":
    sys.exit(main())
