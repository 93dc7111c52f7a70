"""Kernels are compiled before they are needed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from moetier.runtime.kernels.ahead import compile_ahead

CODE = """
import sys, threading
from pathlib import Path
from moetier.runtime.kernels.ahead import compile_ahead
from moetier.runtime.kernels.jit import Processor

assert "transformers" not in sys.modules  # it is to be imported while kernels are compiled
compile_ahead(Path(sys.argv[1]))
(compiler,) = [thread for thread in threading.enumerate() if thread.name == "moetier-compiler"]
compiler.join()
compile_all, late = Processor.compile_all, []

def noted(self, module, names, **how):
    late.extend(names)
    return compile_all(self, module, names, **how)

Processor.compile_all = noted
import moetier
model, tokenizer = moetier.load(sys.argv[1], daemon=None)
with model.tiers:
    ids = tokenizer("Il vecchio", return_tensors="pt").input_ids
    model.generate(ids, max_new_tokens=1, do_sample=False)
    print(*late)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    print(*late)
"""


def test_little_is_left_to_compile_for_the_first_token(tinymix_4bit: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tinymix_4bit)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    first, later = (line.split() for line in found.stdout.split("\n")[:2])
    assert set(first) <= {"moetier_add_up"}  # its form depends on the router
    assert "moetier_route" in later


def test_a_folder_that_is_no_model_is_left_to_whoever_loads_it(tmp_path: Path) -> None:
    compile_ahead(tmp_path)
    for thread in threading.enumerate():
        if thread.name == "moetier-compiler":
            thread.join()
