"""``moetier link DIR``: make checksums of a checkpoint that is used as it is, so that damaged experts are noticed."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from moetier.tiers.text import format_bytes
from moetier.tools.cli.parser import file_or_address

EXAMPLES = ("moetier link ./Qwen3-30B-A3B", "moetier link ./Qwen3-30B-A3B-Q4_K_M.gguf --cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moetier link`."""
    parser.add_argument("directory", type=file_or_address, metavar="DIR", help="a checkpoint's folder, or a GGUF file")
    parser.add_argument(
        "--cache",
        action="store_true",
        help="write into the user's cache ($XDG_CACHE_HOME/moetier/extents) even if DIR can be written to",
    )
    parser.add_argument(
        "--ignore-code", action="store_true", help="accept a checkpoint with code of its own, which moetier never runs"
    )


def run(arguments: argparse.Namespace) -> None:
    """Read the checkpoint once, and write the table. Raises MoetierError."""
    from moetier.runtime.checkpoint.containers import open_checkpoint
    from moetier.runtime.checkpoint.model_config import is_checkpoint
    from moetier.runtime.libraries.lean import lean_imports
    from moetier.runtime.model.name_files import register_name
    from moetier.runtime.stores.checkpoint_store import CheckpointStore, make_table
    from moetier.tiers.errors import ConfigError
    from moetier.tiers.extents.link import link
    from moetier.tiers.extents.table import write_table
    from moetier.tiers.store.folder import GROUP, command
    from moetier.tools.cli.progress import ByteProgress

    folder = Path(arguments.directory)
    if folder.suffix == ".gguf" and not folder.exists():
        raise ConfigError(f"There is no file {folder.absolute()}.", "Check the path of the GGUF file.")
    if (folder / GROUP).is_dir():
        raise ConfigError(
            f"{folder} is a model directory: its experts have checksums.", f"Check them: {command('verify', folder)}"
        )
    if not is_checkpoint(folder):
        raise ConfigError(
            f"{arguments.directory} is neither the folder of a checkpoint in safetensors nor a GGUF file.",
            "Name the folder of its config.json, or a .gguf file.",
        )
    with lean_imports():
        table = make_table(open_checkpoint(folder, ignore_code=arguments.ignore_code))
    table = replace(table, ignored_code=arguments.ignore_code)
    total = sum(shard.bytes for shard in table.shards)
    with CheckpointStore.with_table(folder, table) as store, ByteProgress("link", total) as progress:
        for linked in link(store):
            if isinstance(linked, int):
                progress.advance(linked)
            else:
                table = linked
        seconds = progress.seconds
    path = write_table(folder, table, into_cache=arguments.cache)
    files = len(table.shards)
    print(
        f"{path}: {table.manifest.record_count:,} experts in {files} file{'s' * (files > 1)}, {format_bytes(total)} "
        f"read in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)"
    )
    if (name := register_name(folder)) is not None:
        print(f"Every command takes it by the name {name}: moetier generate {name} ...")
