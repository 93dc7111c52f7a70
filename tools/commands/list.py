"""``moetier list``: list the pulled models."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from moetier.tools.cli.failure import plain

EXAMPLES = ("moetier list", "moetier list --json")
LOOKS = 3


@dataclass(frozen=True, slots=True)
class Listed:
    """A pulled model. ``bits``, ``trunk_bits``, ``blocks`` and ``experts`` are None where its folder does not say."""

    name: str
    folder: str
    bits: int | None
    trunk_bits: int | None
    blocks: int | None
    experts: int | None
    bytes: int  # that it takes on the disk, with what is on its way
    pulled_unix: float  # when it was finished, or last went on
    revision: str | None  # the hub's commit
    resume: str | None  # the command that completes it, or where its plan is lost replaces it; None of a complete one

    @property
    def complete(self) -> bool:
        """Whether the model's conversion has finished."""
        return self.resume is None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier list`."""
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    """Print the pulled models and return 0."""
    from moetier.runtime.pulled import models_folder, pulled

    found = [model for name, folder in pulled().items() if (model := look(name, folder)) is not None]
    if arguments.json:
        print(json.dumps([asdict(model) | {"complete": model.complete} for model in found], indent=2))
    elif found:
        print(_text(found))
    else:
        print(f"No model was pulled into {models_folder()}.")
    return 0


def look(name: str, folder: Path) -> Listed | None:
    """Describe a pulled model; return None if it is removed meanwhile.

    A conversion that ends meanwhile removes its plan: then the folder is read again.
    """
    for _ in range(LOOKS):
        with contextlib.suppress(FileNotFoundError):
            return _look(name, folder)
    return None


def _look(name: str, folder: Path) -> Listed:
    """Read the manifest, or the plan of an incomplete conversion. Raises FileNotFoundError."""
    from moetier.runtime.pulled import pulling
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
    from moetier.tools.convert.files import disk_bytes

    store, resume = folder / GROUP, None
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
    return Listed(
        name=name,
        folder=str(folder),
        bits=None if manifest is None else manifest.bits,
        trunk_bits=None if manifest is None else manifest.trunk_bits,
        blocks=None if manifest is None else len(manifest.blocks),
        experts=None if manifest is None else manifest.record_count,
        bytes=disk_bytes(folder),
        pulled_unix=last.stat().st_mtime,
        revision=read_origin(folder).get("revision"),
        resume=resume,
    )


def _text(found: list[Listed]) -> str:
    from moetier.runtime.config import format_bytes
    from moetier.tools.cli.report import table

    rows = [["name", "bits", "trunk", "size", "experts", "pulled", ""]]
    for model in found:
        does = "replaces" if model.bits is None else "resumes"
        experts = "?" if model.experts is None else f"{model.blocks} x {model.experts // (model.blocks or 1)}"
        rows.append(
            [
                model.name,
                str(model.bits or "?"),
                str(model.trunk_bits or "?"),
                format_bytes(model.bytes),
                experts,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(model.pulled_unix)),
                "complete" if model.complete else f"incomplete: {plain(str(model.resume))} {does} it",
            ]
        )
    return table(rows)
