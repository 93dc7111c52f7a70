"""Compare moetier's product of one row with a bf16 matrix with torch's.

    python tests/measurements/row.py

The matrices have the shapes of routers, attention and heads. So many of each are used in turn that they are read from
memory, not from a cache. The two implementations take turns. Each product has a tensor x of its own, because moetier
multiplies several matrices with the same tensor in one call. Prints the microseconds of a product, as medians (least to
most), and the rate at which moetier reads the matrix.
"""

from __future__ import annotations

import argparse
import platform
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from attention import microseconds

from moetier.runtime.kernels.products.row import RowWeight
from moetier.tools.bench.output import Spread, alternate
from moetier.tools.cli.report import table

SHAPES = {"8 experts": (8, 4096), "128 experts": (128, 2048), "512 experts": (512, 2048), "attention": (4096, 4096)}
UNCACHED = 256 << 20  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"machine  {platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}")
    lines = [["matrix", "moetier, us", "torch, us", "times as fast", "GB/s"]]
    for title, (rows, columns) in SHAPES.items():
        nbytes = 2 * rows * columns
        weights = [torch.randn(rows, columns).bfloat16() for _ in range(max(2, UNCACHED // nbytes))]
        x = torch.randn(1, columns).bfloat16()
        ways = {}
        for name, weight_class in (("moetier", RowWeight), ("torch", torch.nn.Parameter)):
            matrices = cycle([weight_class(weight, requires_grad=False) for weight in weights])
            ways[name] = partial(microseconds, lambda x=x, matrices=matrices: F.linear(x[:], next(matrices)))
        with torch.inference_mode():
            spreads = {name: Spread.of(times) for name, times in alternate(arguments.rounds, ways).items()}
        own, torchs = spreads["moetier"], spreads["torch"]
        rate = nbytes / own.median / 1e3
        shown = f"{title} {rows}x{columns}"
        lines.append([shown, own.text(), torchs.text(), f"{torchs.median / own.median:.1f}", f"{rate:.1f}"])
    print(table(lines))


if __name__ == "__main__":
    main()
