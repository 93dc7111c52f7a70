"""Writes docs/architectures.md: ``python tests/helpers/architecture_table.py`` runs every architecture.

It takes a few minutes.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from architectures import FURTHER, REQUIRED
from comparison import Comparison, compare

TABLE = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
DTYPES = (torch.float32, torch.bfloat16)

HEAD = """# Architectures

Every model type of transformers {version} whose experts use its experts interface: {count}. A tiny random model of
each is saved, converted at 16 bits by `moetier convert`, and loaded with memory for exactly one block's top-k
records. Its logits on a batch, those of a prefill and three decode steps, and the output of each Experts module are
compared with those of the ordinary transformers model with `experts_implementation="eager"`. *equal* means bit for
bit. With a trunk of 8 or 4 bits (`--trunk-bits`) all are equal too, to the ordinary model with the trunk's decoded
weights.

That holds without quantised experts, or with `exact`. At 4 bits, each type is also loaded with the default options,
with moetier's own norms, attention and products. Its logits of a prefill and of decode steps are near those with
`exact`, not equal.

`python tests/helpers/architecture_table.py` writes this page. `tests/runtime/test_architectures.py` makes the same
comparisons, and fails if transformers has a type that is not in this table. moetier also works with transformers
5.23, which does not have hy_v4_vl, inkling2_loop and lara_mini; `make test-transformers` makes some of these
comparisons with it. Not in the table, because their experts do not use the interface: llama4, dbrx, jetmoe,
longcat_flash, step3p7, doge, nllb_moe, switch_transformers.

A prompt continues behind one that begins alike ([Serving](serve.md#keys-and-values)) with all types that generate
text but four, which compute every prompt as a whole. jamba: transformers computes several tokens behind others as if
the state before them were 0. minimax: its state is in a cache of a class of its own, and transformers refuses others.
deepseek_v4: its compressed keys are a state that grows with the context, and copies of it at many places of a long
prompt would take more memory than its keys. unlimited_ocr: tokens of an answer attend to the prompt and a window of
the answer, but once they are part of a prompt, to all tokens; so their keys and values would not be those of the
prompt. Checkpoints of other types with angles of `longrope`, as Phi-3.5-MoE, do so too: the angles depend on how many
tokens are computed together.

| model type | class | Experts modules | top-k | fp32 | bf16 |
|---|---|---|---|---|---|
"""


def row(model_type: str) -> str:
    """A line of the table; what can't be run says why."""
    answers, last = [], None
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            last = compare(model_type, dtype, Path(folder))
        answers.append(_answer(last))
    assert last is not None
    cells = (model_type, last.model_class, str(last.blocks), str(last.top_k), *answers)
    return f"| {' | '.join(cells)} |"


def _answer(comparison: Comparison) -> str:
    return f"differs: {', '.join(comparison.differing)}" if comparison.differing else "equal"


def listed(table: str) -> dict[str, tuple[str, str]]:
    """Model type -> what the table says of fp32 and of bf16."""
    lines = (re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines() if line.startswith("| "))
    return {cells[0]: (cells[-2], cells[-1]) for cells in lines if cells[0] != "model type"}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for model_type in sorted(REQUIRED | FURTHER):
        rows.append(row(model_type))
        print(rows[-1], file=sys.stderr, flush=True)
    head = HEAD.format(count=len(rows), version=transformers.__version__)
    TABLE.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
