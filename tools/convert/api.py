"""``moetier.convert`` and ``moetier.pull``: conversions for programs, with the same options as on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint import hub
from moetier.runtime.model.name_files import register_name
from moetier.runtime.model.names import place_of, tag_of
from moetier.tiers.options import declare_keywords

from . import entry
from .conversion import ConversionReport
from .options import CONVERT_OPTIONS, DEFAULT_BITS, Options


def convert(
    source: str | Path, target: str | Path, *, mirror: str | Path | None = None, quiet: bool = True, **options: Any
) -> ConversionReport:
    """Make the model directory ``target`` from a checkpoint, or resume an interrupted conversion.

    ``moetier list`` then shows the model, with the name of its folder. If the model is complete, nothing is
    written, except a model card that is missing.

    Args:
        source: folder of the checkpoint, a GGUF file, or an id on the Hugging Face hub.
        target: the folder to write.
        mirror: folder on another disk into which the experts are copied too.
        quiet: show no progress on standard error.
        options: the fields of ``Options``.

    Raises:
        MoetierError: an option, the source or the target can't be used.
    """
    place = None if mirror is None else Path(mirror)
    report = entry.convert(source, target, mirror=place, quiet=quiet, **options)
    register_name(Path(target))
    return report


def pull(hub_id: str, *, quiet: bool = True, **options: Any) -> ConversionReport:
    """Download a model of the Hugging Face hub, converting it file by file, and keep it by name.

    Its name is ``hub_id`` with a tag of the bits, such as ORG/NAME:4bit, and its folder is the report's ``target``.

    Args:
        hub_id: ORG/NAME.
        quiet: show no progress on standard error.
        options: the fields of ``Options``.

    Raises:
        MoetierError: an option, the source or the target can't be used.
    """
    hub.check_id(hub_id)
    how = Options(**options)
    bits = how.bits or DEFAULT_BITS  # of every checkpoint, as the folder is named by it
    folder = place_of(hub_id, tag_of(bits, how.trunk_bits))
    return entry.pull(hub_id, folder, quiet=quiet, **options | {"bits": bits})


for _function in (convert, pull):
    declare_keywords(_function, CONVERT_OPTIONS)
