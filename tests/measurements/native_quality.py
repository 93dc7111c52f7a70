"""Perplexity of the bundled model in the quantised forms of published checkpoints, used as they are.

    python tests/measurements/native_quality.py

Experts are quantised by rounding, and the trunk stays in 16 bits. The first row is the checkpoint in 16 bits, the last
two are conversions with HQQ.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from checkpoints import reshard
from native_checkpoints import FORMS, quantise

import moetier
from moetier.runtime.stores.registry import read_manifest
from moetier.tools.cli.report import table
from moetier.tools.convert.api import convert
from moetier.tools.quality.quality import Loss, PerplexityChange, loss, read_texts, tokenize

TESTS = Path(__file__).parent.parent
TOKENS = 1 << 20  # all of each text


def measured(folder: Path) -> tuple[float, Loss]:
    """Bits a weight of the records, and the loss on the bundled texts."""
    manifest = read_manifest(folder)
    weights = sum(manifest.layout(n).weights * block.experts for n, block in enumerate(manifest.blocks))
    model, tokenizer = moetier.load(folder)
    with model.tiers:
        texts = tokenize(tokenizer, read_texts([TESTS / "assets/texts"]), TOKENS)
        return manifest.stored_bytes * 8 / weights, sum((loss(model, ids) for ids in texts.values()), Loss())


def main() -> None:
    losses: dict[str, tuple[float, Loss]] = {}
    for name, (_, of_experts, _, quantization) in {"16 bits": ("", None, None, {}), **FORMS}.items():
        if name == "gpt-oss":
            continue  # its layout needs gpt-oss's own module; the numbers are those of mxfp4
        with tempfile.TemporaryDirectory() as place:
            folder = reshard(TESTS / "assets/tinymix", Path(place) / "tinymix", 1)
            if of_experts is not None:
                quantise(folder, of_experts, None, quantization)
            losses[name] = measured(folder)
        print(f"{name} measured", file=sys.stderr)
    for bits in (8, 4):
        with tempfile.TemporaryDirectory() as place:
            convert(TESTS / "assets/tinymix", Path(place) / "converted", bits=bits)
            losses[f"HQQ, {bits} bits"] = measured(Path(place) / "converted")
    base = losses["16 bits"][1]
    rows = [["form", "bits/weight", "perplexity", "change"]]
    for name, (width, one) in losses.items():
        change = PerplexityChange.of(one, base)
        error = change.relative_error or 0.0
        rows.append([name, f"{width:.3f}", f"{one.perplexity:.3f}", f"{change.relative:+.2%} ± {error:.2%}"])
    print(table(rows))


if __name__ == "__main__":
    main()
