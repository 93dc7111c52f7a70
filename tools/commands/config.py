"""``moetier config show [COMMAND]``: show the settings of commands, and where each comes from."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moetier.tools.cli.parser import add_json, examples

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
    add_json(show)


def _command(text: str) -> str:
    """Return ``text`` if it is the name of a command that has settings. Raises ConfigError if it is not."""
    from moetier.tiers.errors import ConfigError
    from moetier.tools.cli.parser import commands_of, settable
    from moetier.tools.main import build_parser

    names = [name for name, command in commands_of(build_parser()).items() if settable(command)]
    if text not in names:
        raise ConfigError(f"{text!r} is not a command with settings.", f"Name one of {', '.join(names)}.")
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
            own = [one for one in settings.of(command) if not _same(one, general.get(one.key))]
            shown |= {command: own} if own else {}
    print(json.dumps(_json(settings, shown), indent=2) if arguments.json else _text(settings, shown), flush=True)
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
                setting.key: {
                    "value": _plain(setting.value),
                    "source": setting.source,
                    "where": setting.where,
                    "fault": None if setting.fault is None else setting.fault.cause,
                    "variable": variable(name, setting.key),
                }
                for setting in of_section
            }
            for name, of_section in shown.items()
        },
        "faults": [fault.cause for fault in settings.faults],
    }


def _plain(value: object) -> object:
    """Return ``value`` as JSON can hold it: paths and infinite numbers become text."""
    is_plain = isinstance(value, bool | int | list | tuple | None) or (
        isinstance(value, float) and math.isfinite(value)
    )
    return value if is_plain else str(value)


def _text(settings: Settings, shown: dict[str, list[Setting]]) -> str:
    note = "" if settings.file.exists() else " (does not exist)"
    lines = [f"file  {settings.file}{note}"]
    every = [setting for of_section in shown.values() for setting in of_section]
    width, wide = max(len(setting.key) for setting in every), max(len(_word(setting.value)) for setting in every)
    for name, of_section in shown.items():
        lines.append(f"\n[{name}]")
        for setting in of_section:
            origin = f"{setting.where}: invalid" if setting.fault else setting.where or "default"
            lines.append(f"{setting.key:<{width}}  {_word(setting.value):<{wide}}  {origin}")
    return "\n".join(lines)


def _word(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
