"""Compiled products of oneDNN: how many of them a process keeps."""

from __future__ import annotations

import json
from pathlib import Path

from prepared import Prepared

LENGTHS = 32
MOST = 36 << 20  # bytes; each length of a prompt takes more than 1.5 MiB if its products are kept

CHILD = """
import json, sys
from pathlib import Path
import torch
import moetier

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

folder, lengths = json.loads(sys.argv[1])
model, _ = moetier.load(folder, daemon=None)
with model.tiers, torch.inference_mode():
    for number in range(lengths + 1):
        model(torch.full((1, 101 + number), 5), use_cache=False, logits_to_keep=1)
        before = before if number else anonymous()
print(anonymous() - before)
"""


def test_prompts_of_many_lengths_do_not_let_a_process_grow(tinymix_4bit: Path, scripts: Prepared) -> None:
    ended = scripts.run(CHILD, json.dumps([str(tinymix_4bit), LENGTHS]))
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < MOST
