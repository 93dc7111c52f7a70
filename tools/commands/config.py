"""``moetier config show [COMMAND]``: show the settings of commands, and where each comes from."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moetier.tools.cli.parser import examples

if TYPE_CHECKING:
    from moetier.tools.cli.settings import Setting, Settings

EXAMPLES = ("moetier config show", "moetier config show generate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `moetier config`, and their options."""
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", prog=parser.prog)
    line = "show each setting, its value and where the value comes from"
    show = subparsers.add_parser("show", help=line, description=f"{line.capitalize()}.", epilog=examples(EXAMPLES))
    show.add_argument(
        "of",
        nargs="?",
        type=_command,
        metavar="COMMAND",
        help="show all settings of COMMAND (default: general settings, and for each command those that differ)",
    )
    show.add_argument("--json", action="store_true", help="print one JSON object")


def _command(text: str) -> str:
    """Return ``text`` if it is the name of a command that has settings. Raises ConfigError if it is not."""
    from moetier.tiers.errors import ConfigError
    from moetier.tools.cli.parser import commands_of, settable
    from moetier.tools.main import build_parser

    known = [name for name, command in commands_of(build_parser()).items() if settable(command)]
    if text not in known:
        raise ConfigError(f"{text!r} is not a command with settings.", f"Name one of {', '.join(known)}.")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Print the settings and the mistakes in them; return 1 if there is a mistake, else 0.

    Raises ConfigError if the settings file can't be read.
    """
    from moetier.tools.cli.failure import EXIT_ERROR
    from moetier.tools.cli.parser import commands_of
    from moetier.tools.cli.settings import GENERAL, Settings
    from moetier.tools.main import build_parser

    settings = Settings(commands_of(build_parser()))
    if arguments.of is not None:
        shown = {arguments.of: settings.of(arguments.of)}
    else:
        general = {setting.key: setting for setting in settings.of(GENERAL)}
        shown = {GENERAL: [*general.values()]}
        for command in settings.sections:  # show only those settings of a command that differ from the general ones
            found = [each for each in settings.of(command) if not _same(each, general.get(each.key))]
            shown |= {command: found} if found else {}
    if arguments.json:
        print(json.dumps(_json(settings, shown), indent=2))
    else:
        print(_text(settings, shown))
    sys.stdout.flush()
    for said in settings.unknown_variables:
        print(f"moetier: {said}", file=sys.stderr)
    for fault in settings.faults:
        print(f"moetier: {fault.cause}\n  {fault.fix}", file=sys.stderr)
    return EXIT_ERROR if settings.faults else 0


def _same(own: Setting, general: Setting | None) -> bool:
    return general is not None and (own.value, own.where) == (general.value, general.where)


def _json(settings: Settings, shown: dict[str, list[Setting]]) -> dict[str, Any]:
    from moetier.tools.cli.settings import variable

    return {
        "file": str(settings.file),
        "file_exists": settings.file.exists(),
        "settings": {
            name: {
                each.key: {
                    "value": _plain(each.value),
                    "source": each.source,
                    "where": each.where,
                    "fault": None if each.fault is None else each.fault.cause,
                    "variable": variable(name, each.key),
                }
                for each in found
            }
            for name, found in shown.items()
        },
        "faults": [fault.cause for fault in settings.faults],
    }


def _plain(value: object) -> object:
    """Return ``value`` in a form that JSON can hold: paths and infinite numbers become text."""
    is_plain = isinstance(value, bool | int | list | tuple | None) or (
        isinstance(value, float) and math.isfinite(value)
    )
    return value if is_plain else str(value)


def _text(settings: Settings, shown: dict[str, list[Setting]]) -> str:
    there = "" if settings.file.exists() else " (does not exist)"
    lines = [f"file  {settings.file}{there}"]
    every = [each for found in shown.values() for each in found]
    width, wide = max(len(each.key) for each in every), max(len(_word(each.value)) for each in every)
    for name, found in shown.items():
        lines.append(f"\n[{name}]")
        for each in found:
            origin = f"{each.where}: invalid" if each.fault else each.where or "default"
            lines.append(f"{each.key:<{width}}  {_word(each.value):<{wide}}  {origin}")
    return "\n".join(lines)


def _word(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
