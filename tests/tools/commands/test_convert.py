"""The command, and what it does when it is cut, killed, out of disk, or pointed at the wrong place."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from checkpoints import edit_json, edit_tensors, save_checkpoint, stored_experts, tree
from faults import flip_bit, mounted, only, strace
from prepared import Prepared
from torch import Tensor

from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.tiers.errors import (
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    IncompleteStoreError,
    TargetError,
    TargetExistsError,
)
from moetier.tiers.layout import BITS, GROUPS, PAIR_TYPES, Bits
from moetier.tiers.manifest import FileSum
from moetier.tiers.store.atomic import PARTIAL
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.reader import ShardStore
from moetier.tools.commands.convert import following, options_of
from moetier.tools.convert.api import convert
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.options import Options
from moetier.tools.main import build_parser, main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mixtral: 3 blocks of 8 experts."""
    return save_checkpoint(tmp_path_factory.mktemp("original") / "tiny-moe")


@pytest.fixture(scope="module")
def uncut(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion with the default options makes."""
    folder = tmp_path_factory.mktemp("uncut") / "dst"
    convert(source, folder)
    return tree(folder)


# what is made


def test_the_next_command_suits_the_model(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base model repeats itself without a temperature."""
    source = save_checkpoint(tmp_path / "tiny-moe")
    ends = {}
    for name, template in (("base", ""), ("talks", "{{ messages }}")):
        if template:
            (source / "chat_template.jinja").write_text(template)
        assert main(["convert", str(source), str(tmp_path / name), "--fast"]) == 0
        ends[name] = capsys.readouterr().err.splitlines()[-1].partition("Next: ")[2]
    assert ends == {"base": "moetier chat base -n 64 --temperature 0.6", "talks": "moetier chat talks"}
    (tmp_path / "base" / "generation_config.json").write_text('{"do_sample": true}')
    assert following(tmp_path / "base", "base") == "moetier chat base"


@pytest.mark.parametrize(
    ("tokenizer", "generation", "is_base"),
    [
        ('{"chat_template": "x"}', '{"chat_template": null}', False),
        ('{"do_sample": true}', '{"do_sample": false}', True),
        ("[" * 100_000, "{}", True),  # the tokenizer can't be loaded then, which chat says
        ('{"chat_template": "x"}', "[]", False),
        ("", '{"do_sample": true}', False),
    ],
    ids=["a template", "settings of the other file", "nested too deeply", "no object", "no JSON"],
)
def test_each_file_says_its_own_about_the_next_command(
    tokenizer: str, generation: str, is_base: bool, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(tokenizer)
    (tmp_path / "generation_config.json").write_text(generation)
    assert ("--temperature" in following(tmp_path, "one")) == is_base


@pytest.mark.parametrize("bits", BITS)
def test_every_width_says_what_it_made(source: Path, tmp_path: Path, bits: Bits) -> None:
    report = convert(source, tmp_path / "dst", bits=bits)
    assert not report.was_complete
    assert (report.bits, report.model, report.resumed_blocks) == (bits, "tiny-moe", 0)
    assert [(block.path, block.experts) for block in report.blocks] == [
        (f"model.layers.{layer}.mlp.experts", 8) for layer in range(3)
    ]
    highest = {16: 0.0, 8: 0.02, 4: 0.2, 3: 0.4, 2: 0.8}[bits]
    for block in report.blocks:
        assert block.error is not None
        assert 0 <= block.error <= highest
    shards = list((tmp_path / "dst" / GROUP).rglob("c/*/0/0"))
    assert report.expert_bytes == sum(path.stat().st_size for path in shards) - len(shards) * (16 * 8 + 4)
    assert report.trunk_bytes == sum(path.stat().st_size for path in (tmp_path / "dst").glob("trunk-*"))
    with ShardStore.open(tmp_path / "dst") as store:
        assert store.manifest.model == "tiny-moe"
        assert {p.bits for p in store.layout(0).projections} <= {bits, 16}
    text = report.table()
    assert f"{report.bits_per_weight:.3f}" in text
    most = max(block.error or 0 for block in report.blocks)
    assert (f" to {most:.4f}: usual at {bits} bits" if most else "0: the weights are those of the checkpoint") in text
    twice = tuple(replace(block, error=2 * (block.error or 0)) for block in report.blocks)
    worse = replace(report, blocks=twice).table()
    assert most == 0 or f"the usual at {bits} bits is " in worse


def test_the_directory_holds_what_it_should(source: Path, tmp_path: Path) -> None:
    src, dst = Path(shutil.copytree(source, tmp_path / "src")), tmp_path / "dst"
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "preprocessor_config.json"):
        (src / name).write_text("{}")
    (src / "additional_chat_templates").mkdir()
    copied = {
        "chat_template.jinja": "a",
        "additional_chat_templates/tools.jinja": "b",
        "LICENSE": "c",
        "merges.txt": "d",
    }
    left = {"modeling_x.py": "raise", "README.md": "", "training_args.bin": "", "optimizer.pt": "", "x.gguf": ""}
    for name, text in {**copied, **left}.items():
        (src / name).write_text(text)
    (src / "original").mkdir()
    (src / "original" / "tokenizer.json").write_text("{}")
    convert(src, dst, fast=True)
    beside = {path.relative_to(dst).as_posix() for path in dst.rglob("*") if path.is_file() and GROUP not in path.parts}
    assert beside == {
        *copied, "README.md", "tokenizer.json", "tokenizer_config.json", "vocab.json", "preprocessor_config.json",
        "config.json", "generation_config.json", "model.safetensors.index.json", "trunk-00001-of-00001.safetensors",
    }  # fmt: skip
    assert all((dst / name).read_text() == text for name, text in copied.items())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (src, dst))
    made = {
        "quantization_config": {"quant_method": "moetier", "format": 1, "bits": 4},
        "library_name": "moetier",
        "experts_implementation": "moetier",
    }
    assert after == before | made


def test_an_expert_of_zeros_is_read_back_exactly(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "layers.1." in name and "experts.2." in name:
                tensors[name].zero_()

    edit_tensors(source, edit)
    convert(source, tmp_path / "dst", bits=16)
    assert not any(t.any() for t in stored_experts(tmp_path / "dst")["model.layers.1.mlp.experts", 2].values())
    for bits in (8, 4, 3, 2):
        report = convert(source, tmp_path / f"dst{bits}", bits=bits)
        assert all(block.error is not None and block.error < 1 for block in report.blocks)


def test_the_bytes_do_not_depend_on_workers(source: Path, uncut: dict[str, bytes], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for workers in (1, 2, 5):
        convert(source, tmp_path / str(workers), workers=workers)
        assert tree(tmp_path / str(workers)) == uncut
    assert torch.get_num_threads() == threads


def test_plain_rounding_is_another_conversion(source: Path, uncut: dict[str, bytes], tmp_path: Path) -> None:
    exact, quick = convert(source, tmp_path / "a"), convert(source, tmp_path / "b", fast=True)
    assert tree(tmp_path / "a") == uncut != tree(tmp_path / "b")
    assert (
        json.loads((tmp_path / "b" / GROUP / "zarr.json").read_text())["attributes"]["moetier"]["method"] == "rounding"
    )
    assert [block.stored_bytes for block in exact.blocks] == [block.stored_bytes for block in quick.blocks]
    with pytest.raises(TargetExistsError, match=r"it has weights quantised by HQQ, not plain rounding \(--fast\)\."):
        convert(source, tmp_path / "a", fast=True)


def test_group_size_and_pairs_reach_the_store(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dst", bits=2, group_size=16, pairs="uint8", fast=True)
    with ShardStore.open(tmp_path / "dst") as store:
        assert {(p.group, p.pairs) for p in store.layout(0).projections} == {(16, "uint8")}
    with pytest.raises(ConfigError, match="`group_size` is 7"):
        convert(source, tmp_path / "other", group_size=7)
    with pytest.raises(ConfigError, match="`workers` is 0"):
        convert(source, tmp_path / "other", workers=0)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("option", [{"group_size": 64}, {"pairs": "uint8"}, {"fast": True}])
def test_what_says_nothing_at_sixteen_bits_is_refused(source: Path, tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="With --bits 16 nothing is quantised"):
        convert(source, tmp_path / "dst", bits=16, **option)
    assert not (tmp_path / "dst").exists()


# the command


def test_the_command_prints_a_table_and_says_what_it_does(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "dst"), "--bits", "3", "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert "bits per expert weight" in out
    assert re.search(r"^relative error +0\.1\d+ to 0\.\d+: usual at 3 bits$", out, re.MULTILINE)
    before, *lines, last = err.splitlines()
    assert before.startswith("tiny-moe: ")
    assert last.startswith("The trunk has 16 bits. --trunk-bits 8")
    assert "bits a weight)" in lines[0]
    assert "1 worker, " in lines[1]
    assert lines[2].startswith("the checkpoint has no tokenizer")
    assert [line.split(":")[0] for line in lines[3:]] == [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
    assert main(["convert", str(source), str(tmp_path / "dst"), "--bits", "3"]) == 0
    assert "is complete" in capsys.readouterr().out


def test_json_is_one_object(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "dst"), "--json", "--fast"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits"] == 4
    assert len(found["blocks"]) == 3
    assert found["expert_bytes"] == sum(block["stored_bytes"] for block in found["blocks"])
    assert found["was_complete"] is False


def test_a_mistake_is_two_lines(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "diary.txt").write_text("mine")
    assert main(["convert", str(source), str(tmp_path / "dst")]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "dst") in cause
    assert fix.startswith("  Choose another folder")


@pytest.mark.parametrize("words", [("convert", "SRC", "DST"), ("pull", "acme/nothing")], ids=["convert", "pull"])
@pytest.mark.parametrize(
    ("options", "cause", "fix"),
    [
        (
            ("--group-size", "16"),
            "Groups of 16 weights are not supported with pairs of bfloat16.",
            "256 with pairs of uint8.",
        ),
        (
            ("--bits", "2", "--group-size", "16", "--pairs", "bfloat16"),
            "Groups of 16",
            "256 with pairs of uint8.",
        ),
        (("--bits", "16", "--pairs", "uint8"), "With --bits 16 nothing is quantised", "choose fewer --bits"),
        (("--bits", "16", "--fast"), "With --bits 16 nothing is quantised", "choose fewer --bits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_no_model_can_be_stored_with_is_a_wrong_command_line(
    words: tuple[str, ...], options: tuple[str, ...], cause: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever the checkpoint is: it need not be there, and nobody has looked for it."""
    assert main([*words, *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert cause in said[0]
    assert fix in said[1]


@pytest.mark.parametrize(("pairs", "group"), [(pairs, group) for pairs in PAIR_TYPES for group in GROUPS[pairs]])
@pytest.mark.parametrize("words", [("convert", "SRC", "DST"), ("pull", "acme/nothing")], ids=["convert", "pull"])
def test_every_group_size_may_be_asked_for(words: tuple[str, ...], pairs: str, group: int) -> None:
    arguments = build_parser().parse_args([*words, "--group-size", str(group), "--pairs", pairs])
    assert options_of(arguments)["group_size"] == group


def test_what_resumes_it_has_every_option(source: Path, tmp_path: Path) -> None:
    """The command that a cut conversion names makes the very same."""
    src = Path(shutil.copytree(source, tmp_path / "with space"))
    edit_json(src / "config.json", auto_map={})
    options = Options(bits=2, group_size=16, pairs="uint8", fast=True, ignore_code=True)
    conversion = Conversion.plan(open_safetensors(src, ignore_code=True), tmp_path / "dst", options)
    assert main(conversion.command[1:]) == 0
    assert conversion.target.is_complete()


# where it writes


def test_a_complete_one_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    convert(source, dst)
    times = {path: path.stat().st_mtime_ns for path in dst.rglob("*")}
    assert convert(source, dst).was_complete
    assert {path: path.stat().st_mtime_ns for path in dst.rglob("*")} == times


def test_a_damaged_one_is_mended(source: Path, uncut: dict[str, bytes], tmp_path: Path) -> None:
    """What is missing or cut is seen and made again. Flipped bits are not looked for: --overwrite makes it anew."""
    dst = tmp_path / "dst"
    convert(source, dst)
    shards = sorted((dst / GROUP).glob("*/c/*/0/0"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    assert not convert(source, dst).was_complete
    assert tree(dst) == uncut
    flip_bit(shards[0], 100)
    assert convert(source, dst).was_complete
    assert not convert(source, dst, overwrite=True).was_complete
    assert tree(dst) == uncut


def test_what_is_missing_beside_a_complete_store_is_made_again(
    source: Path, uncut: dict[str, bytes], tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    convert(source, dst)
    for name in ("config.json", "trunk-00001-of-00001.safetensors"):
        (dst / name).unlink()
        assert not convert(source, dst).was_complete
        assert tree(dst) == uncut


def test_another_conversion_is_replaced_only_if_told_to(source: Path, uncut: dict[str, bytes], tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    convert(source, dst, bits=8)
    before = tree(dst)
    with pytest.raises(TargetExistsError, match="conversion: it has experts of 8 bits, not 4") as caught:
        convert(source, dst)
    assert "--overwrite" in caught.value.fix
    assert tree(dst) == before
    (dst / "notes.txt").write_text("mine")
    convert(source, dst, overwrite=True)
    assert tree(dst) == uncut | {"notes.txt": b"mine"}


def test_another_model_is_another_conversion(source: Path, uncut: dict[str, bytes], tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    edit_json(other / "config.json", rms_norm_eps=1e-4)
    convert(other, tmp_path / "dst")
    with pytest.raises(TargetExistsError, match=r"it is of other, not of tiny-moe\."):
        convert(source, tmp_path / "dst")


@pytest.mark.parametrize("text", ["{", "[]"])
@pytest.mark.parametrize("name", ["plan.json", "zarr.json"])
def test_a_store_that_cannot_be_read_is_replaced_only_if_told_to(
    source: Path, uncut: dict[str, bytes], tmp_path: Path, name: str, text: str
) -> None:
    dst = tmp_path / "dst"
    (dst / GROUP).mkdir(parents=True)
    (dst / GROUP / name).write_text(text)
    with pytest.raises(TargetExistsError, match="can't be read"):
        convert(source, dst)
    convert(source, dst, overwrite=True)
    assert tree(dst) == uncut


def test_a_model_that_has_lost_its_store_is_replaced_only_if_told_to(
    source: Path, uncut: dict[str, bytes], tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    convert(source, dst, bits=8)
    shutil.rmtree(dst / GROUP)
    (dst / "notes.txt").write_text("mine")
    before = tree(dst)
    with pytest.raises(TargetExistsError, match=r"its experts\.zarr is missing") as caught:
        convert(source, dst)
    assert "--overwrite" in caught.value.fix
    assert tree(dst) == before
    convert(source, dst, overwrite=True)
    assert tree(dst) == uncut | {"notes.txt": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_moetier_did_not_write_is_never_deleted(source: Path, tmp_path: Path, overwrite: bool) -> None:
    dst = Path(shutil.copytree(source, tmp_path / "dst"))  # somebody's checkpoint
    before = tree(dst)
    with pytest.raises(TargetExistsError, match="not a model directory of moetier"):
        convert(source, dst, overwrite=overwrite)
    assert tree(dst) == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(TargetExistsError, match="not a folder"):
        convert(source, file, overwrite=overwrite)
    assert file.read_text() == "mine"


def test_source_and_target_may_not_overlap(source: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(source, tmp_path / "a" / "src"))
    link = tmp_path / "link"
    link.symlink_to(src)
    for dst in (src, src / "converted", tmp_path / "a", link):
        with pytest.raises(TargetError, match="overlap"):
            convert(src, dst)
    assert tree(src) == tree(source)


def test_a_model_directory_is_no_source(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(source, tmp_path / "dst")
    assert main(["convert", str(tmp_path / "dst"), str(tmp_path / "again")]) == 1
    cause, fix = capsys.readouterr().err.splitlines()
    assert cause == "moetier: This is a model directory of moetier: it is converted already."
    assert "Use it as it is" in fix
    assert main(["link", str(tmp_path / "dst")]) == 1
    assert f"{tmp_path / 'dst'} is a model directory: its experts have checksums." in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_is_reported(
    source: Path, tinymix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for checkpoint in (source, tinymix):
        assert main(["convert", str(checkpoint), str(tmp_path / checkpoint.name), "--fast"]) == 0
        said.append(capsys.readouterr().err)
    assert "the checkpoint has no tokenizer" in said[0]
    assert "copy its tokenizer.json" in said[0]
    assert "tokenizer" not in said[1]


# what may happen to it


def test_a_disk_that_is_too_small_is_reported_before(source: Path, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=256k") as disk:
        with pytest.raises(DiskSpaceError, match=r"needs [\d,]+ bytes more; [\d,]+ are free"):
            convert(source, disk / "dst", bits=16)
        assert not (disk / "dst").exists()


PRELUDE = """
import os, signal, sys
from pathlib import Path
import moetier.tools.convert.conversion, transformers.models.mixtral.modeling_mixtral
from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.options import Options
from moetier.tools.convert.api import convert
from moetier.tools.main import main
source, target = sys.argv[1:3]

def on_events(act):
    'Calls act(event, path) before each of this process\\'s changes to files below the target.'
    def hook(event, arguments):
        if event in ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.truncate') and arguments:
            path, flags = str(arguments[0]), arguments[2] if event == 'open' else os.O_WRONLY
            if path.startswith(target) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                act(event, path)
    sys.addaudithook(hook)
"""


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def script(scripts: Prepared) -> Script:
    """Of a body, behind the prelude, and its arguments: the source and the target first."""
    return lambda body, *arguments: scripts.run(PRELUDE + body, *arguments)


def test_a_disk_that_fills_up_on_the_way_is_resumed(
    script: Script, source: Path, uncut: dict[str, bytes], tmp_path: Path
) -> None:
    """The ballast is written when the first block is renamed into place."""
    with mounted("tmpfs", tmp_path / "disk", "size=64m") as disk:
        body = """
ballast = Path(target).parent / 'ballast'
def act(event, path):
    if event == 'os.rename' and '/c/0/0/0' in path and not ballast.exists():
        try:
            with ballast.open('wb', buffering=0) as stream:
                while True: stream.write(bytes(1 << 12))
        except OSError: pass
on_events(act)
sys.exit(main(['convert', source, target]))
"""
        result = script(body, source, disk / "dst")
        assert result.returncode == 1, result.stderr
        *_, cause, fix = result.stderr.splitlines()
        assert cause.startswith("moetier: The disk of")
        assert "is full" in cause
        assert "run the same command again" in fix
        assert "Traceback" not in result.stderr
        assert not list((disk / "dst").rglob(f"*{PARTIAL}"))
        with pytest.raises(IncompleteStoreError):
            ShardStore.open(disk / "dst")
        (disk / "ballast").unlink()
        report = convert(source, disk / "dst")
        assert report.resumed_blocks >= 1
        assert all(block.error is not None for block in report.blocks)
        assert tree(disk / "dst") == uncut


def test_a_source_that_goes_away_is_not_taken_for_the_target(source: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(source, tmp_path / "src"))
    conversion = Conversion.plan(open_safetensors(src), tmp_path / "dst", Options())
    for path in src.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"{src}.* can't be read: No such file"):
        conversion.run()
    shutil.rmtree(src)
    shutil.copytree(source, src)
    convert(src, tmp_path / "dst")
    assert tree(tmp_path / "dst").keys() >= {"config.json", "experts.zarr/zarr.json"}


@pytest.mark.slow  # strace lets the imports take seconds
@pytest.mark.parametrize("after_plan", [False, True])
def test_a_source_whose_disk_fails_is_not_taken_for_the_target(tmp_path: Path, after_plan: bool) -> None:
    """strace counts each thread's reads: the main one samples every tensor, then it copies the trunk."""
    src = save_checkpoint(tmp_path / "src", shards=1)
    samples = sum(1 + (tensor.nbytes > 64) for tensor in open_safetensors(src).tensors.values())
    inject = f"inject=preadv,preadv2:error=EIO:when={samples + 1 if after_plan else 1}"
    options = [
        *only("preadv,preadv2"),
        "-o",
        str(tmp_path / "trace"),
        "-P",
        str(src / "model.safetensors"),
        "-e",
        inject,
    ]
    body = "sys.exit(main(['convert', source, target, '--fast', '--workers', '1']))"
    result = strace(options, PRELUDE + body, src, tmp_path / "dst")
    assert "EIO" in (tmp_path / "trace").read_text()
    assert result.returncode == 1, result.stderr
    *_, cause, fix = result.stderr.splitlines()
    assert cause == f"moetier: {src}/model.safetensors can't be read: Input/output error."
    assert fix == "  Check the file and its disk."
    assert (tmp_path / "dst").exists() == after_plan


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(
    script: Script, source: Path, uncut: dict[str, bytes], tmp_path: Path, number: int
) -> None:
    """It comes when the second block is begun."""
    dst = tmp_path / "dst"
    body = f"""
import threading
def act(event, path):
    if '/c/1/0/0' in path and threading.current_thread() is threading.main_thread():
        os.kill(os.getpid(), {number})
on_events(act)
sys.exit(main(['convert', source, target]))
"""
    result = script(body, source, dst)
    assert result.returncode == 128 + number, result.stderr
    assert "it resumes where it stopped" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list(dst.rglob(f"*{PARTIAL}"))
    with pytest.raises(IncompleteStoreError, match="1 of 3 blocks") as caught:
        ShardStore.open(dst)
    assert caught.value.fix == f"Resume it: moetier convert {source} {dst} --bits 4"
    first = (dst / GROUP / "records" / "c" / "0" / "0" / "0").stat().st_mtime_ns
    assert convert(source, dst).resumed_blocks == 1
    assert (dst / GROUP / "records" / "c" / "0" / "0" / "0").stat().st_mtime_ns == first
    assert tree(dst) == uncut


def test_the_manifest_sums_the_trunk(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dst")
    trunk = {path.name: path.read_bytes() for path in (tmp_path / "dst").glob("trunk-*")}
    with ShardStore.open(tmp_path / "dst") as store:
        assert store.manifest.trunk == {n: FileSum(len(data), google_crc32c.value(data)) for n, data in trunk.items()}


def test_a_trunk_that_has_rotted_is_not_taken_over(
    script: Script, source: Path, uncut: dict[str, bytes], tmp_path: Path
) -> None:
    """By a conversion that was killed in its second block and is resumed; and by one that lacks a small file."""
    dst = tmp_path / "dst"
    body = """
def act(event, path):
    if '/c/1/0/0' in path: os.kill(os.getpid(), signal.SIGKILL)
on_events(act)
convert(source, target)
"""
    assert script(body, source, dst).returncode == -signal.SIGKILL
    (trunk,) = dst.glob("trunk-*")
    flip_bit(trunk, -9, 2)
    assert convert(source, dst).resumed_blocks == 1
    assert tree(dst) == uncut
    flip_bit(trunk, 100)
    (dst / "config.json").unlink()
    assert not convert(source, dst).was_complete
    assert tree(dst) == uncut


KILLED = """
import json, random, time
chosen = json.loads(sys.argv[3])

def in_child(act=None):
    pid = os.fork()
    if not pid:
        try:
            if act: on_events(act)
            convert(source, target, workers=2)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid

def finished_shards():
    return {p: p.stat().st_mtime_ns for p in Path(target).rglob('c/*/0/0')}

def killer(step):
    count = 0
    def act(event, path):
        nonlocal count
        count += 1
        if count == step: os.kill(os.getpid(), signal.SIGKILL)
    return act
"""


def test_killed_at_any_step_it_resumes_to_the_same_bytes(
    script: Script, source: Path, uncut: dict[str, bytes], tmp_path: Path
) -> None:
    """Every change that it makes to a file is a step; it is killed right before."""
    kill_at(
        lambda steps: sorted({1, *random.Random(0).sample(range(2, steps), 3), steps}),
        script,
        source,
        uncut,
        tmp_path,
    )


@pytest.mark.slow
def test_killed_at_every_step_it_resumes_to_the_same_bytes(
    script: Script, source: Path, uncut: dict[str, bytes], tmp_path: Path
) -> None:
    kill_at(lambda steps: list(range(1, steps + 1)), script, source, uncut, tmp_path)


def kill_at(
    choose: Callable[[int], list[int]], script: Script, source: Path, uncut: dict[str, bytes], folder: Path
) -> None:
    body = """
for step in chosen:
    target = sys.argv[2] + str(step)
    _, status = os.waitpid(in_child(killer(step)), 0)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    whole = (Path(target) / 'experts.zarr' / 'zarr.json').exists()
    shards = finished_shards()
    _, status = os.waitpid(in_child(), 0)
    kept = all(finished_shards().get(p) == t for p, t in shards.items())
    print(json.dumps([step, died, whole, kept, status]), flush=True)
"""
    counting = """
steps = []
on_events(lambda event, path: steps.append(path))
convert(source, target)
print(len(steps), steps.index(target + '/experts.zarr/zarr.json.partial', steps.index(target + '/config.json.partial')))
"""
    count = script(KILLED + counting, source, folder / "count", "[]")
    assert count.returncode == 0, count.stderr
    steps, opened = map(int, count.stdout.split())  # the manifest is opened, renamed; these two are counted from 0
    assert steps > 30
    chosen = choose(steps)
    result = script(KILLED + body, source, folder / "dst", json.dumps(chosen))
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == chosen, result.stderr
    for step, died, whole, kept, status in lines:
        assert (died, status) == (True, 0), (step, result.stderr)
        assert kept, f"a finished block was written again after step {step}"
        assert tree(folder / f"dst{step}") == uncut, f"killed at step {step}"
        assert whole == (step > opened + 2), f"killed at step {step} of {steps}, complete: {whole}"


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_resumes_to_the_same_bytes(
    script: Script, source: Path, uncut: dict[str, bytes], tmp_path: Path
) -> None:
    """Moments of the clock: amid reads, computing, writes. Each run goes on where the last was cut."""
    body = """
start = time.monotonic()
assert os.waitpid(in_child(), 0)[1] == 0
whole = time.monotonic() - start
chance, kills = random.Random(chosen), 0
while kills < 20:
    import shutil
    shutil.rmtree(target)
    while kills < 20:
        pid = in_child()
        time.sleep(chance.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if (Path(target) / 'experts.zarr' / 'zarr.json').exists(): break
print(os.waitpid(in_child(), 0)[1])
"""
    result = script(KILLED + body, source, tmp_path / "dst", "1")
    assert result.stdout == "0\n", result.stderr
    assert tree(tmp_path / "dst") == uncut
