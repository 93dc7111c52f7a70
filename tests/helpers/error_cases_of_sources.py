"""Faults of a checkpoint that is to be converted, and of where it is to be written."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import transformers
from checkpoints import edit_json
from error_bench import BYTES, Bench, Said, case
from faults import mounted
from prepared import MAIN

from moetier.runtime.checkpoint.safetensors_folder import INDEX

# Checkpoints


@case
def pickle_checkpoint(bench: Bench) -> Said:
    for file in (source := bench.source()).glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return bench.run("convert", source, bench.folder / "dst")


@case
def checkpoint_with_code(bench: Bench) -> Said:
    edit_json((source := bench.source()) / "config.json", auto_map={"AutoConfig": "evil.X"})
    return bench.run("convert", source, bench.folder / "dst")


def redirect(source: Path, name: str) -> Path:
    """The index says that every tensor is in ``name``."""
    places = json.loads((source / INDEX).read_text())["weight_map"]
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(places, name)}))
    return source


@case
def index_that_leads_up(bench: Bench) -> Said:
    return bench.run("convert", redirect(bench.source(), "../x.safetensors"), bench.folder / "dst")


@case
def index_with_an_absolute_path(bench: Bench) -> Said:
    return bench.run("convert", redirect(bench.source(), "/etc/x.safetensors"), bench.folder / "dst")


@case
def link_that_leads_out(bench: Bench) -> Said:
    victim = sorted((source := bench.source()).glob("*.safetensors"))[0]
    victim.symlink_to(victim.rename(bench.folder / "outside.safetensors"))
    return bench.run("convert", source, bench.folder / "dst")


@case
def shard_of_a_checkpoint_missing(bench: Bench) -> Said:
    sorted((source := bench.source()).glob("*.safetensors"))[1].unlink()
    return bench.run("convert", source, bench.folder / "dst")


@case
def shard_of_a_checkpoint_truncated(bench: Bench) -> Said:
    victim = sorted((source := bench.source()).glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - 1000)
    return bench.run("convert", source, bench.folder / "dst")


@case
def weights_that_are_no_numbers(bench: Bench) -> Said:
    from safetensors.torch import load_file, save_file

    victim = sorted((source := bench.source()).glob("*.safetensors"))[0]
    tensors = load_file(victim)
    name = next(name for name in sorted(tensors) if "experts" in name)
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, victim, metadata={"format": "pt"})
    return bench.run("convert", source, bench.folder / "dst", last=2)


@case
def dense_checkpoint(bench: Bench) -> Said:
    return bench.run("convert", _dense(bench), bench.folder / "dst")


@case
def dense_checkpoint_planned(bench: Bench) -> Said:
    return bench.run("plan", _dense(bench))


def _dense(bench: Bench) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(bench.folder / "dense")
    return bench.folder / "dense"


@case
def architecture_that_is_not_known(bench: Bench) -> Said:
    edit_json((source := bench.source()) / "config.json", architectures=["FooForCausalLM"], model_type="foo")
    return bench.run("convert", source, bench.folder / "dst")


@case
def config_that_is_no_json(bench: Bench) -> Said:
    (source := bench.source()).joinpath("config.json").write_text("{")
    return bench.run("plan", source)


# Where a conversion writes


@case
def disk_too_small(bench: Bench) -> Said:
    with mounted("tmpfs", bench.folder / "disk", "size=256k") as disk:
        return bench.run("convert", bench.source(), disk / "dst", "--bits", "16", differs=(BYTES,), last=2)


@case
def disk_full_on_the_way(bench: Bench) -> Said:
    """Something else fills it when the first block is renamed into place."""
    fill = """
import sys
from pathlib import Path
ballast = Path(sys.argv[3]).parent / "ballast"
def hook(event, arguments):
    if event == "os.rename" and "/c/0/0/0" in str(arguments[0]) and not ballast.exists():
        try:
            with ballast.open("wb", buffering=0) as stream:
                while True: stream.write(bytes(1 << 12))
        except OSError: pass
sys.addaudithook(hook)
"""
    with mounted("tmpfs", bench.folder / "disk", "size=64m") as disk:
        words = ("convert", bench.source(), disk / "dst")
        return bench.said(words, bench.scripts.run(fill + MAIN, *words), (BYTES,), last=2)


@case
def another_model_there(bench: Bench) -> Said:
    return bench.run("convert", bench.source(), bench.model(), last=2)


@case
def something_else_there(bench: Bench) -> Said:
    (bench.folder / "photos").mkdir()
    (bench.folder / "photos" / "one.jpeg").touch()
    return bench.run("convert", bench.source(), bench.folder / "photos", last=2)


@case
def into_its_own_source(bench: Bench) -> Said:
    return bench.run("convert", source := bench.source(), source / "dst")
