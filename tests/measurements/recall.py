"""Measure the recall of predictions by gates on texts, and compare it with that of simple predictions.

    python tests/measurements/recall.py DIR TEXT... --tokens 3072 --look-ahead 3

DIR is a model directory. A TEXT is a file, or a folder with .txt files; it is read in windows of 512 tokens, as in
`moetier quality`. Prints for each text and look-ahead the recall of three predictions: by the gates; the experts that
the previous token used; and the top-k experts that the block used most in the whole text. It also prints the recall of
experts chosen at random, top-k / experts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import moetier
from moetier.runtime.trace.recall import RULES, compare
from moetier.runtime.trace.recorder import Recorder
from moetier.runtime.trace.trace import Trace
from moetier.tools.cli.report import table
from moetier.tools.quality.quality import WINDOW, read_texts, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=3072, help="of the beginning of each text (default: %(default)s)")
    parser.add_argument("--look-ahead", type=int, default=3, help="(default: %(default)s)")
    arguments = parser.parse_args()
    model, tokenizer = moetier.load(arguments.directory, daemon=None)
    rows = [["text", "tokens", "ahead", *RULES, "chance"]]
    with model.tiers:
        for name, ids in tokenize(tokenizer, read_texts(arguments.texts), arguments.tokens).items():
            trace = trace_of(model, ids, arguments.look_ahead)
            rows += [[name, str(trace.tokens), *row] for row in rows_of(trace)]
    print(table(rows))


@torch.inference_mode()
def trace_of(model: Any, ids: torch.Tensor, look_ahead: int) -> Trace:
    """ids [T]; each window is a sequence."""
    with Recorder(model, look_ahead=look_ahead) as recorder:
        for window in ids.split(WINDOW):
            model(window[None].to(model.device), use_cache=False)
            recorder.end_sequence(window.tolist(), n_prefill=len(window))
        return recorder.trace()


def rows_of(trace: Trace) -> list[list[str]]:
    """One for each look-ahead."""
    chance = f"{trace.top_k / max(trace.num_experts):.3f}"
    return [[str(recall.lookahead), *recall.cells(), chance] for recall in compare(trace)]


if __name__ == "__main__":
    main()
