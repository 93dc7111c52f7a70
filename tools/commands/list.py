"""``moetier list``: list the pulled models."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import add_json

EXAMPLES = ("moetier list", "moetier list --json")
LOOKS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier list`."""
    add_json(parser, "one JSON array")


def run(arguments: argparse.Namespace) -> None:
    """Print the pulled models."""
    from moetier.runtime.model.names import models_folder, pulled

    models = []
    for name, folder in pulled().items():
        for _ in range(LOOKS):  # try again if a conversion that ends, or a removal, deletes a file between two reads
            with contextlib.suppress(FileNotFoundError):
                models.append(_look(name, folder))
                break
    text = _text(models) if models else f"There are no pulled models in {models_folder()}."
    print(json.dumps(models, indent=2) if arguments.json else text)


def _look(name: str, folder: Path) -> dict[str, Any]:
    """Return a description of a pulled model as JSON.

    It is from the model's manifest or, if the model is incomplete, from the plan of the conversion. The value of
    ``resume`` is None for a complete model. Otherwise it is the command that completes the model, or replaces it if the
    plan can't be read.
    """
    from moetier.runtime.model.names import pulling
    from moetier.tiers.errors import StoreError
    from moetier.tiers.manifest import Manifest
    from moetier.tiers.store.folder import (
        GROUP,
        METADATA,
        PLAN,
        command,
        read_json,
        read_manifest,
        read_origin,
        resuming,
    )
    from moetier.tiers.store.mirror import read_mirrors
    from moetier.tools.convert.model_files import disk_bytes

    store, resume = folder / GROUP, None
    mirrors: list[Path] = []
    with contextlib.suppress(StoreError):
        mirrors = read_mirrors(folder)
    last = next((path for path in (store / METADATA, store / PLAN) if path.exists()), store)
    manifest: Manifest | None = None
    try:
        if last.name == PLAN:
            manifest = Manifest.from_json(read_json(last), str(folder))
            resume = resuming(folder, manifest)
        else:
            manifest = read_manifest(store)
    except StoreError:
        resume = command("pull", *pulling(name), "--overwrite")
    return {
        "name": name,
        "folder": str(folder),
        "bits": None if manifest is None else manifest.bits,
        "trunk_bits": None if manifest is None else manifest.trunk_bits,
        "blocks": None if manifest is None else len(manifest.blocks),
        "experts": None if manifest is None else manifest.record_count,
        "bytes": disk_bytes(folder),  # including an incomplete download
        "pulled_unix": last.stat().st_mtime,  # time when the model was completed, or last worked on
        "revision": read_origin(folder).get("revision"),
        "mirrors": [*map(str, mirrors)],
        "resume": resume,
        "complete": resume is None,
    }


def _text(models: list[dict[str, Any]]) -> str:
    from moetier.runtime.config import format_bytes
    from moetier.tools.cli.report import table

    rows = [["name", "bits", "trunk", "size", "experts", "pulled", ""]]
    for model in models:
        does = "replaces" if model["bits"] is None else "resumes"
        blocks, experts = model["blocks"], model["experts"]
        rows.append(
            [
                model["name"],
                str(model["bits"] or "?"),
                str(model["trunk_bits"] or "?"),
                format_bytes(model["bytes"]),
                "?" if experts is None else f"{blocks} x {experts // (blocks or 1)}",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(model["pulled_unix"])),
                ", ".join(["complete", *(f"mirror {plain(path)}" for path in model["mirrors"])])
                if model["complete"]
                else f"incomplete: {plain(model['resume'])} {does} it",
            ]
        )
    return table(rows)
