"""Measure how far a token's logits are apart between chunks, in tiny models of the types that have a varying part.

    python tests/measurements/same_bits.py [TYPE...]

Each prompt of 150 tokens is computed in chunks of 1, 7 and 33 tokens, and in one. Experts have 4 bits and the trunk 16.
Plain transformers has the same weights (``exact``). Prints the share of the tokens that have a logit that differs
between two of these ways, and by how much at most. ``runtime/model/same_bits.py`` has the results.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import torch
import transformers
from chunks import apart

from moetier.runtime.model.same_bits import VARYING
from moetier.tools.cli.report import table

OTHERS = ("deepseek_v2", "deepseek_v3", "lfm2_moe", "qwen3_moe")  # types that do not vary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="(default: those that vary, and a few more)")
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    print(f"machine  {platform.machine()}; torch {torch.__version__}, transformers {transformers.__version__}")
    rows = [["type", "varying part", "moetier", "transformers"]]
    for model_type in arguments.types or [*sorted(VARYING), *OTHERS]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = [str(each) for each in apart(model_type, Path(folder), prompts=arguments.prompts)]
            except (AttributeError, TypeError, RuntimeError):  # it computes no logits of a prompt in chunks
                found = ["not measured", ""]
        rows.append([model_type, VARYING[model_type].part if model_type in VARYING else "-", *found])
        print(f"{model_type} measured", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
