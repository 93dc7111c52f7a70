"""``moetier inspect`` says what is in a model directory, from a real store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
from stores import NASTY, layout_of, make_plan, make_records, make_store, write_store

from moetier.tiers.errors import IncompleteStoreError, StoreFormatError
from moetier.tiers.layout import Bias, Projection, RecordLayout
from moetier.tiers.store.folder import GROUP, MIRRORS
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.writer import StoreWriter
from moetier.tools.commands import inspect


def run(folder: Path, *options: str) -> int:
    parser = ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args([str(folder), *options]))


FOUR_BITS = RecordLayout(
    (
        Projection("gate_up_proj", 128, 256, bits=4, group=64, pairs="bfloat16"),
        Projection("down_proj", 256, 64, bits=4, group=64, pairs="bfloat16"),
    ),
    (Bias("down_proj_bias", 256),),
)


def test_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(blocks=2, experts=3, layout=FOUR_BITS)
    manifest = write_store(tmp_path, plan, make_records(plan))
    (tmp_path / "trunk-00001.safetensors").write_bytes(bytes(1000))
    (tmp_path / "trunk-00002.safetensors").write_bytes(bytes(24))
    assert run(tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    weights = 6 * (128 * 256 + 256 * 64 + 256)
    with ShardStore.open(tmp_path) as store:
        assert found["direct"] == store.is_direct
    shards = sum(ShardFile.of(tmp_path / GROUP, plan, block).data_bytes for block in range(2))
    assert found["expert_bytes"] == shards == manifest.stored_bytes
    assert found["expert_weights"] == weights
    assert found["bits_per_weight"] == pytest.approx(8 * shards / weights)
    assert found["trunk_bytes"] == 1024
    assert (found["digest"], found["source_digest"]) == (manifest.digest, plan.source_digest)
    assert (found["model"], found["format"], found["version"]) == ("acme/tiny-moe", 1, "0.1.0")
    assert found["blocks"][1] == {
        "path": "model.layers.1.mlp.experts",
        "array": "records",
        "experts": 3,
        "top_k": 2,
    }
    assert found["layouts"]["records"]["projections"][1] == {
        "name": "down_proj",
        "shape": [256, 64],
        "bits": 4,
        "group": 64,
        "pairs": "bfloat16",
        "dtype": "bfloat16",
    }
    assert found["faults"] == []

    assert run(tmp_path) == 0
    text = capsys.readouterr().out
    for part in (
        "acme/tiny-moe",
        manifest.digest,
        f"6 in 2 blocks, {weights:,} weights, ",
        f"{8 * shards / weights:.3f} bits a weight",
        "trunk            1 KiB",
        "4 bits, groups of 64, bfloat16 pairs",
        "2 blocks of 3 experts, top-2",
        "    1  model.layers.1.mlp.experts",
    ):
        assert part in text


def test_a_list_of_mirrors_that_is_malformed_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path)
    (tmp_path / MIRRORS).write_text("{}")
    assert run(tmp_path, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["mirrors"] == []
    (fault,) = found["faults"]
    assert str(tmp_path / MIRRORS) in fault


def test_two_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(blocks=3)
    first, second, third = plan.blocks
    plan = replace(
        plan,
        blocks=(first, replace(second, array="wide", index=0, experts=6), replace(third, index=1)),
        layouts={"records": layout_of(), "wide": layout_of(96, 64)},
    )
    write_store(tmp_path, plan, make_records(plan))
    assert run(tmp_path) == 0
    text = capsys.readouterr().out
    assert "2 blocks of 4 experts, top-2, array records" in text
    assert "1 block of 6 experts, top-2, array wide" in text


def test_bad_shards_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path)
    path = ShardFile.of(tmp_path / GROUP, make_plan(), 1).path
    os.truncate(path, 5)
    assert run(tmp_path) == 1
    assert f"bad: block 1 (model.layers.1.mlp.experts): its shard {path} has 5 bytes" in capsys.readouterr().out
    assert run(tmp_path, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 1


def test_a_bad_trunk_is_reported(tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(shutil.copytree(tinymix_4bit, tmp_path / "model"))
    assert run(directory, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (path,) = directory.glob("trunk-*")
    assert found["trunk_bytes"] == found["trunk_files"][path.name]["bytes"] == path.stat().st_size
    os.truncate(path, 5)
    assert run(directory) == 1
    assert f"bad: {path}, a file of the trunk, has 5 bytes" in capsys.readouterr().out
    path.unlink()
    assert run(directory) == 1
    assert f"bad: {path}, a file of the trunk, is missing" in capsys.readouterr().out


def test_what_is_no_finished_store_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match="There is no folder"):
        run(tmp_path / "nowhere")
    with pytest.raises(StoreFormatError, match="has no experts"):
        run(tmp_path)
    with StoreWriter.open(tmp_path / GROUP, make_plan()):
        pass
    with pytest.raises(IncompleteStoreError, match="0 of 3 blocks are done"):
        run(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    make_store(tmp_path)
    command = [sys.executable, "-m", "moetier.tools.main", "inspect"]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "acme/tiny-moe" in result.stdout
    result = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 2


def test_names_are_told_in_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path, model=NASTY)
    assert run(tmp_path) == 0
    assert capsys.readouterr().out.startswith("model            x?[31m?]0;owned??y\n")
    assert run(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == NASTY
