"""Records of a block that is read whole, by several workers."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_checkpoint, tree

from moetier.tools import records
from moetier.tools.checkpoint import open_checkpoint
from moetier.tools.conversion import Conversion, Options
from moetier.tools.convert import convert
from moetier.tools.recipe import BlockBlueprint, Recipe


def test_a_block_that_is_read_whole_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last expert is held back before its first slice, for as long as it takes to forget the block too early."""
    source = save_checkpoint(tmp_path / "src", "ernie4_5_vl_moe")
    convert(source, tmp_path / "one", workers=1, fast=True)
    made: Counter[tuple[str, int | None]] = Counter()
    forgotten = threading.Event()
    make, forget, encode = Recipe.make, BlockBlueprint.forget, records.encode

    def count(recipe: Recipe, expert: int | None) -> Any:
        made[recipe.target, expert] += 1
        return make(recipe, expert)

    def tell(block: BlockBlueprint) -> None:
        forget(block)
        forgotten.set()

    def hold(tensors: Any, *arguments: Any, **options: Any) -> Any:
        if tensors._index == tensors._block.experts - 1:
            forgotten.wait(0.5)
        forgotten.clear()
        return encode(tensors, *arguments, **options)

    monkeypatch.setattr(Recipe, "make", count)
    monkeypatch.setattr(BlockBlueprint, "forget", tell)
    monkeypatch.setattr(records, "encode", hold)
    conversion = Conversion.plan(open_checkpoint(source), tmp_path / "two", Options(workers=2, fast=True))
    blocks = conversion.blueprint.blocks
    assert not any(block.apart for block in blocks)
    conversion.run(lambda line: None, quiet=True)
    assert made == {(recipe.target, None): 1 for block in blocks for recipe in block.recipes.values()}
    assert not any(block._whole for block in blocks)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
