"""Two checkpoints that differ in nothing but their weights are two conversions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import edit_tensors, save_checkpoint, tree
from safetensors.torch import load_file
from stores import without_table

import moetier
from moetier.runtime.checkpoint import containers as checkpoint
from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.tiers.errors import ChecksumError, TargetExistsError
from moetier.tiers.store.folder import GROUP, METADATA
from moetier.tools.convert.api import convert
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.options import Options
from moetier.tools.main import main

BEGUN = 1  # blocks that a cut conversion has finished


@pytest.fixture
def fine_tunes(tmp_path: Path) -> tuple[Path, Path]:
    """Of one base, under one name: the same config, names, shapes and sizes."""
    first = save_checkpoint(tmp_path / "a" / "tuned", shards=1)
    second = Path(shutil.copytree(first, tmp_path / "b" / "tuned"))

    def tune(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.5)

    edit_tensors(second, tune)
    sizes = [{path.name: path.stat().st_size for path in folder.iterdir()} for folder in (first, second)]
    assert sizes[0] == sizes[1]
    return first, second


def test_one_is_not_taken_for_the_other(fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = fine_tunes
    convert(first, tmp_path / "dst", fast=True)
    before = tree(tmp_path / "dst")
    with pytest.raises(TargetExistsError, match="its manifest differs in source_digest"):
        convert(second, tmp_path / "dst", fast=True)
    assert tree(tmp_path / "dst") == before


def test_one_does_not_go_on_with_the_other(
    fine_tunes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fine_tunes
    cut = Conversion.plan(open_safetensors(first), tmp_path / "dst", Options(fast=True))

    def stop(_: Conversion, line: str) -> None:
        if "relative error" in line:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(Conversion, "say", stop)
        with pytest.raises(Exception, match="dst"):
            cut.run()
    assert not (tmp_path / "dst" / GROUP / METADATA).exists()
    assert len(list((tmp_path / "dst").rglob("c/*/0/0"))) == BEGUN
    before = tree(tmp_path / "dst")
    with pytest.raises(TargetExistsError, match="its manifest differs in source_digest"):
        convert(second, tmp_path / "dst", fast=True)
    assert tree(tmp_path / "dst") == before
    assert convert(first, tmp_path / "dst", fast=True).resumed_blocks == BEGUN


def test_what_is_looked_at(fine_tunes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and last 64 bytes, 64 at each stride; whatever time the files were written at."""
    first, _ = fine_tunes
    monkeypatch.setattr(checkpoint, "SAMPLE_STRIDE", 1024)
    before = open_safetensors(first).digest
    (first / "model.safetensors").touch()
    assert open_safetensors(first).digest == before
    name = max(load_file(first / "model.safetensors").items(), key=lambda item: item[1].nbytes)[0]
    for position, seen in ((0, True), (31, True), (32, False), (512, True), (-1, True), (-32, True)):

        def change(tensors: dict[str, torch.Tensor], position: int = position) -> None:
            tensors[name].view(-1)[position] += 1

        edit_tensors(first, change)
        after = open_safetensors(first).digest
        assert (after != before) == seen, position
        before = after


@pytest.mark.parametrize("table", [True, False])
def test_a_shard_of_the_other_is_never_computed_with(
    fine_tunes: tuple[Path, Path],
    tmp_path: Path,
    table: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As when a copy of a newer one over an older one was cut."""
    first, second = fine_tunes

    def tune(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name:
                tensor.mul_(1.25)

    edit_tensors(second, tune)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for source, name in ((first, "model"), (second, "newer")):
        convert(source, tmp_path / name, fast=True)
    model, newer = tmp_path / "model", tmp_path / "newer"
    if not table:
        without_table(model)
    (shard, *_) = sorted(path.relative_to(newer) for path in newer.rglob("c/1/0/0"))
    assert main(["verify", str(model)]) == 0
    shutil.copy(newer / shard, model / shard)
    with pytest.raises(ChecksumError, match=str(model / shard) if table else "not all of one conversion") as caught:
        moetier.load(model)
    assert "from the original of this model directory" in caught.value.fix
    for command in (["generate", str(model), "a"], ["daemon", str(model)], ["verify", str(model)]):
        capsys.readouterr()
        assert main(command) == 1
        said = "".join(capsys.readouterr())
        assert "one conversion" in said or "another conversion" in said
        assert str(model / shard) in said or not table
