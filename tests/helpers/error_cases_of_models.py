"""Faults of a model directory, and places that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from error_bench import Bench, Said, case
from faults import flip_bit, need_strace, only, strace
from prepared import MAIN

from moetier.runtime.checkpoint.safetensors_folder import INDEX
from moetier.tiers.store.folder import GROUP, METADATA, read_manifest
from moetier.tiers.store.shard import ShardFile

# Records and shards


def shard_of(model: Path, block: int = 0) -> Path:
    return ShardFile.of(model / GROUP, read_manifest(model / GROUP), block).path


def flip_every_record(model: Path) -> None:
    """One bit of each of block 0: whichever is wanted first."""
    manifest = read_manifest(model / GROUP)
    for expert in range(manifest.blocks[0].experts):
        flip_bit(shard_of(model), expert * manifest.layout(0).slot_bytes + 1000)


@case
def flipped_bit_while_it_generates(bench: Bench) -> Said:
    flip_every_record(model := bench.model())
    return bench.run("generate", model, "To be", "--speculate", "off", differs=((r"expert \d+", "expert N"),))


@case
def flipped_bit_is_found(bench: Bench) -> Said:
    flip_bit(shard_of(model := bench.model()), 1000)
    return bench.run("verify", model, output=True)


@case
def shard_missing(bench: Bench) -> Said:
    shard_of(model := bench.model(), 3).unlink()
    return bench.run("generate", model, "To be")


@case
def shard_truncated(bench: Bench) -> Said:
    os.truncate(shard_of(model := bench.model(), 3), 100_000)
    return bench.run("chat", model, input="To be?\n")


@case
def shard_longer(bench: Bench) -> Said:
    with shard_of(model := bench.model(), 3).open("ab") as stream:
        stream.write(b"x")
    return bench.run("daemon", model, "--folder", bench.folder / "run")


@case
def shard_empty(bench: Bench) -> Said:
    shard_of(model := bench.model(), 3).write_bytes(b"")
    return bench.run("inspect", model, output=True)


@case
def disk_fails(bench: Bench) -> Said:
    """Each read of one shard's records."""
    need_strace()
    bad = shard_of(model := bench.model(), 3)
    options = [*only("preadv,preadv2"), "-o", "/dev/null", "-P", str(bad), "-e", "inject=preadv,preadv2:error=EIO"]
    words = ("verify", model)
    return bench.said(words, strace(options, MAIN, *map(str, words)), output=True)


# The trunk and small files


@case
def trunk_missing(bench: Bench) -> Said:
    next((model := bench.model()).glob("trunk-*")).unlink()
    return bench.run("generate", model, "To be")


@case
def trunk_truncated(bench: Bench) -> Said:
    os.truncate(next((model := bench.model()).glob("trunk-*")), 100_000)
    return bench.run("generate", model, "To be")


@case
def trunk_that_leads_out(bench: Bench) -> Said:
    (model := bench.model()).joinpath(INDEX).write_text(json.dumps({"weight_map": {"a": "../trunk-1.safetensors"}}))
    return bench.run("generate", model, "To be")


@case
def tokenizer_missing(bench: Bench) -> Said:
    for file in (model := bench.model()).glob("tokenizer*"):
        file.unlink()
    return bench.run("generate", model, "To be")


@case
def vocabulary_missing(bench: Bench) -> Said:
    (model := bench.model()).joinpath("tokenizer.json").unlink()
    return bench.run("verify", model, output=True)


@case
def config_missing(bench: Bench) -> Said:
    (model := bench.model()).joinpath("config.json").unlink()
    return bench.run("inspect", model, output=True)


@case
def config_missing_while_it_generates(bench: Bench) -> Said:
    (model := bench.model()).joinpath("config.json").unlink()
    return bench.run("generate", model, "To be")


# A manifest


def edit_manifest(model: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    path = model / GROUP / METADATA
    group = json.loads(path.read_bytes())
    edit(group["attributes"]["moetier"])
    path.write_text(json.dumps(group))
    return model


@case
def manifest_missing(bench: Bench) -> Said:
    """As a conversion leaves it that is killed when all but the manifest is written."""
    source, target = bench.source(), bench.folder / "model"
    kill = (
        "import os, signal, sys\nfrom moetier.tiers.store.writer import StoreWriter\n"
        "StoreWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = bench.scripts.run(kill + MAIN, "convert", source, target, "--bits", "3")
    assert result.returncode == -9, result
    return bench.run("generate", target, "To be")


@case
def manifest_of_a_newer_version(bench: Bench) -> Said:
    model = edit_manifest(bench.model(), lambda manifest: manifest.update(format=2))
    return bench.run("generate", model, "To be")


@case
def manifest_that_requires_more(bench: Bench) -> Said:
    model = edit_manifest(bench.model(), lambda manifest: manifest.update(requires=["bank-order"], version="9.9"))
    return bench.run("daemon", model, "--folder", bench.folder / "run")


@case
def bits_that_are_not_supported(bench: Bench) -> Said:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["version"] = "9.9"
        for layout in manifest["layouts"].values():
            layout["projections"][0]["bits"] = 5

    return bench.run("verify", edit_manifest(bench.model(), edit))


@case
def kernel_layout_that_is_not_known(bench: Bench) -> Said:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["version"] = "9.9"
        for layout in manifest["layouts"].values():
            layout["projections"][0]["pairs"] = "float4"

    return bench.run("inspect", edit_manifest(bench.model(), edit))


# Places that are no model directory


@case
def nothing_there(bench: Bench) -> Said:
    return bench.run("generate", bench.folder / "nothing", "To be")


@case
def a_file_for_a_model(bench: Bench) -> Said:
    (bench.folder / "file").touch()
    return bench.run("chat", bench.folder / "file")


@case
def a_store_for_a_model(bench: Bench) -> Said:
    return bench.run("generate", bench.whole_model / GROUP, "To be")


@case
def a_checkpoint_for_a_model(bench: Bench) -> Said:
    return bench.run("mirror", bench.source(), bench.folder / "copy")


@case
def a_checkpoint_that_has_to_be_converted(bench: Bench) -> Said:
    path = (source := bench.source()) / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    return bench.run("generate", source, "To be")


@case
def a_linked_checkpoint_edited(bench: Bench) -> Said:
    source = bench.source()
    assert bench.run("link", source).code == 0
    victim = sorted(source.glob("*.safetensors"))[1]
    os.utime(victim, (0, 0))
    return bench.run("generate", source, "To be")


@case
def a_folder_of_something_else(bench: Bench) -> Said:
    (bench.folder / "photos").mkdir()
    return bench.run("inspect", bench.folder / "photos")
