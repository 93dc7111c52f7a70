"""``moetier verify`` names each bad record of a real store, goes on behind it, and says so in its exit status."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from faults import flip_bit
from safetensors.numpy import save
from stores import NASTY, layout_of, make_plan, make_records, make_store, without_table, write_store

from moetier.tiers.errors import IncompleteStoreError, StoreFormatError
from moetier.tiers.manifest import FileSum
from moetier.tiers.store.folder import GROUP, METADATA, read_manifest
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.writer import StoreWriter
from moetier.tools.cli.progress import ByteProgress
from moetier.tools.commands import verify
from moetier.tools.main import main


def run(folder: Path, *options: str) -> int:
    parser = ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([str(folder), *options]))


def path_of(folder: Path, block: int) -> Path:
    return ShardFile.of(folder / GROUP, make_plan(), block).path


def test_a_good_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path)
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith("acme/tiny-moe: 12 records in 3 blocks, no checksums of the trunk, 192 KiB read in ")
    assert "GB/s" in out
    assert out.endswith("all good\n")
    assert run(tmp_path / GROUP, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["blocks"], report["bytes_read"], report["bad"]) == (12, 3, 12 * 16384, [])


def test_every_bad_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path)
    flip_bit(path_of(tmp_path, 0), 3 * 16384 + 17, 5)
    flip_bit(path_of(tmp_path, 2), 0)
    flip_bit(path_of(tmp_path, 2), 16383)  # in the checksum of expert 0, which is bad already
    flip_bit(path_of(tmp_path, 2), 2 * 16384 - 1, 7)
    assert run(tmp_path, "--json") == 1
    bad: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["bad"]
    assert [(b["block"], b["expert"], b["file"]) for b in bad] == [
        (0, 3, str(path_of(tmp_path, 0))),
        (2, 0, str(path_of(tmp_path, 2))),
        (2, 1, str(path_of(tmp_path, 2))),
    ]
    assert run(tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("bad: acme/tiny-moe, block 0 (model.layers.0.mlp.experts), expert 3: checksum mismatch")
    assert lines[-1].endswith("3 bad")


def test_what_is_advised_repairs_what_is_damaged(
    tinymix: Path, tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is removed is made again, and nothing else, by the conversion of before."""
    model = Path(shutil.copytree(tinymix_4bit, tmp_path / "model"))
    shard = ShardFile.of(model / GROUP, read_manifest(model / GROUP), 3).path
    flip_bit(shard, 1000)
    assert main(["verify", str(model)]) == 1
    said = capsys.readouterr()
    assert str(shard) in said.out
    assert "or remove them and run the same conversion again: it makes only what is missing." in said.err
    shard.unlink()
    assert main(["convert", str(tinymix), str(model)]) == 0
    assert "resumed: 7 of 8 blocks are complete" in capsys.readouterr().err
    assert main(["verify", str(model)]) == 0


def test_bad_shards_are_named_and_the_rest_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path, blocks=4)
    path_of(tmp_path, 0).unlink()
    path_of(tmp_path, 1).write_bytes(b"")
    flip_bit(ShardFile.of(tmp_path / GROUP, make_plan(blocks=4), 3).path, 100)
    assert run(tmp_path, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert [(b["block"], b["expert"]) for b in report["bad"]] == [(0, None), (1, None), (3, 0)]
    assert "is missing" in report["bad"][0]["cause"]
    assert "has 0 bytes" in report["bad"][1]["cause"]
    assert report["bytes_read"] == 8 * 16384


def test_no_shard_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path, blocks=1)
    path_of(tmp_path, 0).unlink()
    assert run(tmp_path) == 1
    assert "is missing" in capsys.readouterr().out


def test_whole_records_of_another_store_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path)
    shutil.copyfile(path_of(tmp_path, 0), path_of(tmp_path, 1))
    assert run(tmp_path) == 1
    said = capsys.readouterr().out
    assert f"its shard {path_of(tmp_path, 1)} belongs to another conversion than the manifest" in said
    without_table(tmp_path)
    assert run(tmp_path) == 1
    said = capsys.readouterr().out
    assert "not all of one conversion" in said
    assert "too old to tell which shards are wrong" in said


def test_more_records_than_reads_in_flight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path, blocks=3, experts=40)
    plan = make_plan(experts=40)
    flip_bit(ShardFile.of(tmp_path / GROUP, plan, 1).path, 39 * 16384)
    assert run(tmp_path, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert [(b["block"], b["expert"]) for b in report["bad"]] == [(1, 39)]
    assert report["bytes_read"] == 120 * 16384


def test_the_trunk_is_checked(tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a converted model: each fault by itself, then all together."""
    directory = Path(shutil.copytree(tinymix_4bit, tmp_path / "model"))
    (path,) = directory.glob("trunk-*")
    assert run(directory, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    manifest = read_manifest(directory / GROUP)
    assert report["trunk_files"] == 1
    assert report["bytes_read"] == manifest.stored_bytes + path.stat().st_size
    size = path.stat().st_size
    for position in (0, size // 2, -1):
        flip_bit(path, position)
        assert run(directory, "--json") == 1
        (bad,) = json.loads(capsys.readouterr().out)["bad"]
        assert (bad["block"], bad["expert"], bad["file"]) == (None, None, str(path))
        assert ("The header of" if position == 0 else "checksum mismatch") in bad["cause"]
        flip_bit(path, position)
    flip_bit(path, size // 2)
    flip_bit(next((directory / GROUP).glob("*/c/0/0/0")), 0)
    (directory / "model.safetensors.index.json").write_text("{")
    assert run(directory) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["bad"] * 3
    assert "1 file of the trunk" in lines[-1]
    assert lines[-1].endswith("3 bad")
    os.truncate(path, 1000)
    assert run(directory) == 1
    assert f"{path}, a file of the trunk, has 1,000 bytes; {size:,} were written" in capsys.readouterr().out
    path.unlink()
    assert run(directory) == 1
    assert f"{path}, a file of the trunk, is missing" in capsys.readouterr().out


def test_small_files_that_are_missing(tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json has to be there, and all of a tokenizer or nothing of it; inspect says the same."""
    directory = Path(shutil.copytree(tinymix_4bit, tmp_path / "model"))
    (directory / "tokenizer.json").unlink()
    causes = ["has tokenizer_config.json, but no vocabulary: tokenizer.json"]
    for more in ("", "config.json"):
        if more:
            (directory / more).unlink()
            causes.insert(0, "has no config.json")
        assert run(directory, "--json") == 1
        bad = json.loads(capsys.readouterr().out)["bad"]
        assert [cause in each["cause"] for cause, each in zip(causes, bad, strict=True)] == [True] * len(causes)
        assert main(["inspect", str(directory), "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["faults"] == [each["cause"] for each in bad]
    shutil.copy(tinymix_4bit / "config.json", directory)
    (directory / "tokenizer_config.json").unlink()
    for command in ("verify", "inspect"):  # as of a model that never had one
        assert main([command, str(directory)]) == 0
        assert re.search(r"tokenizer:? +none: .* need the tokenizer files of the model", capsys.readouterr().out)


MEASURE = """
import sys
from argparse import Namespace
from pathlib import Path
import moetier.tiers.store.reader, tqdm  # not what is measured
from moetier.tiers.store.writer import StoreWriter
from moetier.tiers.store import scrub
from moetier.tools.commands import verify

def peak():  # KiB; getrusage would say the parent's if that is larger
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

scrub.BUFFER_BYTES = 13 << 20
before = peak()
assert verify.run(Namespace(directory=Path(sys.argv[1]), json=True)) == 0
print(peak() - before, file=sys.stderr)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    plan = make_plan(blocks=2, experts=8, layout=layout_of(1024, 1024))  # 6 MiB a record, 96 MiB in all
    name, data = "trunk-00001-of-00001.safetensors", save({"a": np.zeros(96 << 20, np.uint8)})
    (tmp_path / name).write_bytes(data)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "moetier"}}))
    records = make_records(plan)
    write_store(tmp_path, plan, records)
    with StoreWriter.open(tmp_path / GROUP, plan) as writer:
        writer.finish({name: FileSum(len(data), google_crc32c.value(data))})
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 6 << 10 < int(result.stderr) < 24 << 10  # two buffers, not eight


def test_what_cannot_be_checked_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match="no experts"):
        run(tmp_path)
    make_store(tmp_path)
    (tmp_path / GROUP / METADATA).unlink()
    with pytest.raises(IncompleteStoreError, match="is incomplete"):
        run(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    make_store(tmp_path)
    command = [sys.executable, "-m", "moetier.tools.main", "verify", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("all good\n")
    (tmp_path / GROUP / METADATA).unlink()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 2
    assert "is incomplete" in result.stderr
    assert "moetier convert" in result.stderr


def test_names_are_told_in_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path, model=NASTY)
    assert run(tmp_path) == 0
    assert capsys.readouterr().out.startswith("x?[31m?]0;owned??y: 12 records")


def test_what_is_bad_is_told_in_what_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    with ByteProgress("verify", 1) as progress:
        progress.say(f"bad: {NASTY}")
    assert capsys.readouterr().out == "bad: x?[31m?]0;owned??y\n"
