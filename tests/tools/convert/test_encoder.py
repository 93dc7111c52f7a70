"""Records by several workers: what overlaps with what, and a block that is read whole."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_checkpoint, tree
from readers import PATIENCE

from moetier.runtime.checkpoint.recipe import Merging, Recipe
from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.tools.convert import encoder as records
from moetier.tools.convert.api import convert
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.options import Options
from moetier.tools.synthetic.checkpoint import GEOMETRIES
from moetier.tools.synthetic.tensors import make_synthetic


def test_a_block_that_is_read_whole_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last expert is held back before its first slice, for as long as it takes to release the block too early."""
    source = save_checkpoint(tmp_path / "src", "ernie4_5_vl_moe")
    convert(source, tmp_path / "one", workers=1, fast=True)
    made: Counter[tuple[str, int | None]] = Counter()
    released, releases = threading.Event(), list[Merging]()
    make, release, encode = Recipe.make, Merging.release, records.encode

    def count(recipe: Recipe, expert: int | None) -> Any:
        made[recipe.parameter, expert] += 1
        return make(recipe, expert)

    def tell(merging: Merging) -> None:
        release(merging)
        releases.append(merging)
        released.set()

    def hold(tensors: Any, *arguments: Any, **options: Any) -> Any:
        if tensors.index == tensors.block.experts - 1:
            released.wait(0.5)
        released.clear()
        return encode(tensors, *arguments, **options)

    monkeypatch.setattr(Recipe, "make", count)
    monkeypatch.setattr(Merging, "release", tell)
    monkeypatch.setattr(records, "encode", hold)
    conversion = Conversion.plan(open_safetensors(source), tmp_path / "two", Options(workers=2, fast=True))
    blocks = conversion.planned.blueprint.blocks
    assert not any(block.is_separable for block in blocks)
    conversion.run()
    assert made == {(recipe.parameter, None): 1 for block in blocks for recipe in block.recipes.values()}
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.slow
def test_what_many_workers_take_was_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 workers beside one; an expert is 3 MiB, and each projection a whole band. Not all reach their peak at once."""
    wide = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64}
    monkeypatch.setitem(GEOMETRIES, "qwen3-8L", GEOMETRIES["qwen3-8L"] | wide)
    source = tmp_path / "src"
    make_synthetic(source, geometry="qwen3-8L", blocks=1)
    said, taken = {}, {}
    for workers in (1, 16):
        options = Options(4, workers=workers)
        said[workers] = Conversion.plan(open_safetensors(source), tmp_path / "dst", options).encoder.peak_bytes
        target = tmp_path / str(workers)
        words = ["convert", source, target, "--bits", 4, "--fast", "--workers", workers, "--json"]
        command = [sys.executable, "-m", "moetier.tools.main", *map(str, words)]
        taken[workers] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["peak_bytes"]
    assert 0.25 * (said[16] - said[1]) < taken[16] - taken[1] < 1.3 * (said[16] - said[1])


def test_reading_overlaps_with_quantising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that has been read is not quantised before another one is being read."""
    source = save_checkpoint(tmp_path / "src", "mixtral")
    conversion = Conversion.plan(open_safetensors(source), tmp_path / "dst", Options(workers=2, fast=True))
    make, encode, readers, overlapped = Recipe.make, records.encode, set[int](), threading.Event()

    def note(recipe: Recipe, expert: int | None, *turn: Any) -> Any:
        readers.add(threading.get_ident())
        if len(readers) == 2:
            overlapped.set()
        return make(recipe, expert, *turn)

    def hold(tensors: Any, *arguments: Any, **options: Any) -> Any:
        read = dict(tensors)
        assert overlapped.wait(PATIENCE)
        return encode(read, *arguments, **options)

    monkeypatch.setattr(Recipe, "make", note)
    monkeypatch.setattr(records, "encode", hold)
    conversion.run()
    assert len(readers) == 2


def test_workers_go_on_while_a_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_checkpoint(tmp_path / "src", "mixtral")
    conversion = Conversion.plan(open_safetensors(source), tmp_path / "dst", Options(workers=2, fast=True))
    encode, finished, blocks = records.encode, threading.Semaphore(0), conversion.target.manifest.blocks
    assert sum(block.experts for block in blocks) > 5

    def tell(*arguments: Any, **options: Any) -> Any:
        errors = encode(*arguments, **options)
        finished.release()
        return errors

    monkeypatch.setattr(records, "encode", tell)
    with closing(conversion.encoder.records(range(len(blocks)))) as made:
        next(made)  # and nobody asks for the next one
        for _ in range(5):  # more than the workers and one
            assert finished.acquire(timeout=PATIENCE)
