"""``moetier inspect DIR``: what a model directory holds, from its manifest and the sizes of its files."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import format_bytes

from .options import DIRECTORY, directory
from .plain import plain

if TYPE_CHECKING:
    from moetier.tiers.keys import RecordLayout
    from moetier.tiers.manifest import Manifest
    from moetier.tiers.store import ExpertStore

HELP = "say what is in a model directory"

EXIT_BAD = 1
MEND = "Convert the model again with --overwrite, or restore the files named."  # what verify says too
NO_TOKENIZER = "none: generate, chat and serve want one; if its source has one, copy the files of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """1 when a shard or a trunk file is missing or malformed. Raises StoreError where there is no finished store."""
    from moetier.tiers.store import ExpertStore

    with ExpertStore.open(arguments.directory, damaged=True) as store:
        found = survey(store)
    print(json.dumps(found, indent=2) if arguments.json else _text(found))
    if found["faults"] and not arguments.json:
        print(MEND, file=sys.stderr)
    return EXIT_BAD if found["faults"] else 0


def survey(store: ExpertStore) -> dict[str, Any]:
    """What ``--json`` prints. Sizes in bytes; no record is read."""
    from moetier.tiers.errors import StoreError
    from moetier.tiers.manifest import FORMAT
    from moetier.tiers.trunk import trunk_faults, trunk_records

    from .small_files import has_tokenizer, small_faults

    manifest = store.manifest
    directory = store.folder.parent
    trunk = sum(file.stat().st_size for file in directory.glob("*.safetensors") if file.is_file())
    faults = [fault for _, fault in sorted(store.faults.items())]
    if manifest.trunk:  # else it is a store alone, or of before there were sums
        faults += trunk_faults(directory, manifest).values()
    matrices = 0
    if manifest.trunk_records and not faults:
        try:
            matrices = len(trunk_records(directory, manifest))
        except StoreError as error:
            faults.append(error)
    small = list(small_faults(directory)) if manifest.trunk else []
    weights = sum(block.experts * manifest.layouts[block.array].weights for block in manifest.blocks)
    return {
        "directory": str(directory),
        "model": manifest.model,
        "format": FORMAT,
        "version": manifest.version,
        "requires": list(manifest.requires),
        "source_digest": manifest.source_digest,
        "digest": manifest.digest,
        "blocks": [
            {"path": block.path, "array": block.array, "experts": block.experts, "top_k": block.top_k}
            for block in manifest.blocks
        ],
        "records": manifest.record_count,
        "layouts": {name: _layout(layout, manifest, name) for name, layout in manifest.layouts.items()},
        "expert_weights": weights,
        "expert_bytes": manifest.stored_bytes,
        "bits_per_weight": 8 * manifest.stored_bytes / weights,
        "trunk_bytes": trunk,
        "trunk_records": asdict(manifest.trunk_records) if manifest.trunk_records else None,
        "trunk_matrices": matrices,
        "direct": store.direct,
        "trunk_files": {name: asdict(entry) for name, entry in sorted(manifest.trunk.items())},
        "tokenizer": has_tokenizer(directory),
        "faults": [fault.cause for fault in [*faults, *small]],
    }


def _layout(layout: RecordLayout, manifest: Manifest, array: str) -> dict[str, Any]:
    return {
        "blocks": manifest.shape(array)[0],
        "record_bytes": layout.record_bytes,
        "slot_bytes": layout.slot_bytes,
        "projections": [
            {
                "name": p.name,
                "shape": list(p.shape),
                "bits": p.bits,
                "group": p.group,
                "pairs": p.pairs,
                "dtype": p.dtype,
            }
            for p in layout.projections
        ],
        "biases": [{"name": b.name, "size": b.size, "dtype": b.dtype} for b in layout.biases],
        "sections": [
            {"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "offset": s.offset} for s in layout.sections
        ],
    }


def _text(found: dict[str, Any]) -> str:
    lines = [
        f"model            {found['model']}",
        f"format           {found['format']}, written by moetier {found['version']}"
        + (f", requires {', '.join(found['requires'])}" if found["requires"] else ""),
        f"source digest    {found['source_digest']}",
        f"store digest     {found['digest']}",
        f"experts          {found['records']:,} in {len(found['blocks'])} blocks, {found['expert_weights']:,} weights, "
        f"{format_bytes(found['expert_bytes'])}, {found['bits_per_weight']:.3f} bits a weight as stored",
        f"trunk            {format_bytes(found['trunk_bytes'])}{_trunk(found)}",
        f"tokenizer        {'there' if found['tokenizer'] else NO_TOKENIZER}",
        f"reads            {'O_DIRECT' if found['direct'] else 'buffered (no O_DIRECT on this file system)'}",
    ]
    for name, layout in found["layouts"].items():
        lines.append(f"array {name:<11}{format_bytes(layout['slot_bytes'])} a record, checksum and padding included")
        lines += [f"  {_projection(p)}" for p in layout["projections"]]
        lines += [f"  {b['name']:<16} [{b['size']}] {b['dtype']}" for b in layout["biases"]]
    several = len(found["layouts"]) > 1
    geometries = Counter((b["array"], b["experts"], b["top_k"]) for b in found["blocks"])
    for (array, experts, top_k), count in geometries.items():
        where = f", array {array}" if several else ""
        lines.append(f"{count} block{'s' if count > 1 else ''} of {experts} experts, top-{top_k}{where}")
    lines += [f"  {block:>3}  {b['path']}" for block, b in enumerate(found["blocks"])]
    lines += [f"bad: {fault}" for fault in found["faults"]]
    return "\n".join(map(plain, lines))


def _trunk(found: dict[str, Any]) -> str:
    form = found["trunk_records"]
    if not form:
        return ""
    return (
        f", {found['trunk_matrices']} matrices of {form['bits']} bits, groups of {form['group']}, {form['pairs']} pairs"
    )


def _projection(projection: dict[str, Any]) -> str:
    name, (rows, columns) = projection["name"], projection["shape"]
    stored = projection["dtype"]
    if projection["bits"] != 16:
        stored = (
            f"{projection['bits']} bits, groups of {projection['group']}, {projection['pairs']} pairs, from {stored}"
        )
    return f"{name:<16} [{rows}, {columns}] {stored}"
