"""``moetier demo``: convert the bundled model to 4 bits, and generate with room for a quarter of its experts."""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from moetier.runtime.generation.decoding import ONE_SEQUENCE
from moetier.tiers.text import format_bytes
from moetier.tools.cli.loading import loaded
from moetier.tools.cli.parser import utf8

from .generate import stream_text

EXAMPLES = ("moetier demo", 'moetier demo "def main():"')

# tinymix has read plays: of all kinds of text, it continues these best
PROMPT = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
"""
DECODING = {"max_new_tokens": 96, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
SEED = 3
SHARE = 4  # one of so many experts has room


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moetier demo`."""
    parser.add_argument(
        "prompt", nargs="?", type=utf8, default=PROMPT, metavar="PROMPT", help="the text to continue (default: a play)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the text and, at last, what happened and what to do next. Raises MoetierError."""
    from moetier.runtime.stores.registry import read_manifest

    model_directory = converted()
    manifest = read_manifest(model_directory)
    ram = str(manifest.stored_bytes // SHARE)
    print(arguments.prompt, end="", flush=True)
    with loaded(model_directory, {"ram": ram, "context": None, "daemon": None}) as (model, tokenizer, _):
        stream_text(model, tokenizer, arguments.prompt, DECODING | ONE_SEQUENCE, SEED, echoes=True)
        host = model.tiers.host.stats()
    print(f"\n{happened(host, manifest.record_count)}\n{following(model_directory)}")


def converted() -> Path:
    """Return the model directory of the demo in the user's cache, which is made the first time.

    Raises TargetError if the cache can't be written.
    """
    from moetier.runtime.libraries.lean import lean_imports
    from moetier.tiers.errors import TargetExistsError
    from moetier.tiers.store.folder import user_cache

    folder = user_cache("demo") / "tinymix-4bit"
    source = Path(str(files("moetier.assets") / "tinymix"))
    if not folder.exists():
        print(f"converting the bundled model to 4 bits, once: {folder}", file=sys.stderr, flush=True)
    with lean_imports():
        from moetier.tools.convert.api import convert
    try:
        convert(source, folder, bits=4)
    except TargetExistsError:  # made by another version
        convert(source, folder, bits=4, overwrite=True)
    return folder


def happened(host: Any, records: int) -> str:
    """Return a sentence about the run. ``host``: counters of the host tier; ``records``: number of all experts."""
    return (
        f"Just now: a quarter of the experts, {host.slots} of {records}, had room in memory. Tokens used experts "
        f"{host.hits + host.misses:,} times: {host.hit_ratio:.0%} were in memory (hits); for the others, "
        f"{format_bytes(host.bytes_in)} were read."
    )


def following(folder: Path) -> str:
    """Return a sentence about what to do next with the model in ``folder``, and with another one."""
    from moetier.runtime.model.name_files import registered

    name = next((name for name, path in registered().items() if path == folder.resolve()), str(folder))
    return f"Next: moetier chat {name} -n 64 --temperature 0.6; or, for a model of the hub: moetier plan ORG/NAME"
