"""Kernels are compiled before they are needed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from prepared import Prepared, for_daemons

from moetier.runtime.kernels.ahead import compile_ahead
from moetier.tools.main import main

LEFT = {"moetier_add_up", "moetier_route"}  # they depend on the router
CODE = """
import sys, threading
from pathlib import Path
from moetier.runtime.kernels.ahead import compile_ahead
from moetier.runtime.kernels.jit.processor import Processor

compile_ahead(Path(sys.argv[1]))
(compiler,) = [thread for thread in threading.enumerate() if thread.name == "moetier-ahead"]
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


def compiled_late(scripts: Prepared, model: Path) -> list[list[str]]:
    """The functions that are compiled for the first token, and until the fourth."""
    found = scripts.run(CODE, model)
    assert found.returncode == 0, found.stderr
    return [line.split() for line in found.stdout.split("\n")[:2]]


def test_transformers_can_be_imported_meanwhile() -> None:
    code = "import moetier.runtime.kernels.ahead, sys; assert 'transformers' not in sys.modules"
    found = for_daemons().run(code)
    assert found.returncode == 0, found.stderr


def test_little_is_left_to_compile_for_the_first_token(scripts: Prepared, tinymix_4bit: Path) -> None:
    first, later = compiled_late(scripts, tinymix_4bit)
    assert set(first) <= LEFT
    assert "moetier_route" in later


def test_little_is_left_to_compile_for_a_gguf_file(
    scripts: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pytest.importorskip("gguf")
    from gguf_files import mostly, tiny_weights, write_gguf

    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_0", "Q6_K"))
    assert main(["link", str(path)]) == 0
    first, later = compiled_late(scripts, path)
    assert set(first) <= LEFT
    assert "moetier_route" in later


def test_a_folder_that_is_no_model_is_left_to_whoever_loads_it(tmp_path: Path) -> None:
    compile_ahead(tmp_path)
    for thread in threading.enumerate():
        if thread.name == "moetier-ahead":
            thread.join()
