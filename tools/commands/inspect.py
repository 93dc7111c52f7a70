"""``moetier inspect DIR``: show what a model directory holds, from its manifest and the sizes of its files."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from moetier.tiers.text import format_bytes
from moetier.tools.cli.failure import EXIT_ERROR, plain
from moetier.tools.cli.parser import add_directory, add_json
from moetier.tools.doctor.survey import NO_TOKENIZER, survey

EXAMPLES = ("moetier inspect ./mixtral-4bit", "moetier inspect Qwen/Qwen3-30B-A3B:4bit --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier inspect`."""
    add_directory(parser)
    add_json(parser)
    parser.set_defaults(outline=True)


def run(arguments: argparse.Namespace) -> int:
    """Print what the model directory holds; return 1 if a shard or a trunk file is missing or malformed.

    Raises StoreError if there is no complete store.
    """
    from moetier.runtime.stores.registry import open_store

    with open_store(arguments.directory, damaged=True) as store:
        description = survey(store)
    print(json.dumps(description, indent=2) if arguments.json else _text(description))
    if description["faults"] and not arguments.json:
        print(store.fix, file=sys.stderr)
    return EXIT_ERROR if description["faults"] else 0


def _text(description: dict[str, Any]) -> str:
    from moetier.runtime.model.names import listed_name
    from moetier.runtime.model.same_bits import bits_of

    name = listed_name(Path(description["directory"]))
    trunk = format_bytes(description["trunk_bytes"])
    if records := description["trunk_records"]:
        trunk += f", {description['trunk_matrices']} matrices of {records['bits']} bits, groups of {records['group']}"
        trunk += f", {records['pairs']} pairs"
    lines = [
        f"model            {description['model'] if name is None else f'{name}, made from ' + description['model']}",
        f"format           {_format(description)}"
        + (f", requires {', '.join(description['requires'])}" if description["requires"] else ""),
        f"source digest    {description['source_digest']}",
        f"store digest     {description['digest']}",
        f"experts          {description['records']:,} in {len(description['blocks'])} blocks, "
        f"{description['expert_weights']:,} weights, "
        f"{format_bytes(description['expert_bytes'])}, {description['bits_per_weight']:.3f} bits a weight as stored",
        f"trunk            {trunk}",
        f"tokenizer        {'there' if description['tokenizer'] else NO_TOKENIZER}",
        f"logits           {bits_of(description['varying_part'])}",
        f"reads            {'O_DIRECT' if description['direct'] else 'buffered'}",
    ]
    lines += [
        f"mirror           {path}" + ("" if Path(path).exists() else " (not there)") for path in description["mirrors"]
    ]
    for name, layout in description["layouts"].items():
        lines.append(f"array {name:<11}{format_bytes(layout['slot_bytes'])} a record, checksum and padding included")
        lines += [f"  {_projection(p)}" for p in layout["projections"]]
        lines += [f"  {b['name']:<16} [{b['size']}] {b['dtype']}" for b in layout["biases"]]
    several = len(description["layouts"]) > 1
    layouts = Counter((b["array"], b["experts"], b["top_k"]) for b in description["blocks"])
    for (array, experts, top_k), count in layouts.items():
        where = f", array {array}" if several else ""
        lines.append(f"{count} block{'s' if count > 1 else ''} of {experts} experts, top-{top_k}{where}")
    lines += [f"  {block:>3}  {b['path']}" for block, b in enumerate(description["blocks"])]
    lines += [f"bad: {fault}" for fault in description["faults"]]
    return "\n".join(map(plain, lines))


def _projection(projection: dict[str, Any]) -> str:
    name, (rows, columns) = projection["name"], projection["shape"]
    stored = projection["dtype"]
    if coding := projection.get("coding"):
        stored = f"{projection['bits']} bits ({coding}), groups of {projection['group']}"
        if projection["scales"]:
            stored += f", {projection['scales']} scales"
    elif projection["bits"] != 16:
        stored = (
            f"{projection['bits']} bits, groups of {projection['group']}, {projection['pairs']} pairs, from {stored}"
        )
    return f"{name:<16} [{rows}, {columns}] {stored}"


def _format(description: dict[str, Any]) -> str:
    if description["checkpoint"]:
        return "a checkpoint, " + ("linked" if description["linked"] else "without checksums: moetier link makes them")
    return f"{description['format']}, written by moetier {description['version']}"
