"""``moetier config show [COMMAND]``: what is set beforehand for commands, and where."""

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
    line = "show each value that can be set, and where it comes from"
    show = subparsers.add_parser("show", help=line, description=f"{line.capitalize()}.", epilog=examples(EXAMPLES))
    show.add_argument(
        "of",
        nargs="?",
        type=_command,
        metavar="COMMAND",
        help="show all options of this command (default: what all share, and what each has of its own)",
    )
    show.add_argument("--json", action="store_true", help="print one JSON object")


def _command(text: str) -> str:
    """Raises ConfigError for what is no command with something to set."""
    from moetier.tiers.errors import ConfigError
    from moetier.tools.cli.parser import commands_of, settable
    from moetier.tools.main import build_parser

    known = [name for name, command in commands_of(build_parser()).items() if settable(command)]
    if text not in known:
        raise ConfigError(f"{text!r} is no command with something to set.", f"Those that have: {', '.join(known)}.")
    return text


def run(arguments: argparse.Namespace) -> int:
    """1 where something is wrong in any section; what is right is shown then too. Raises ConfigError for a file that
    can't be read."""
    from moetier.tiers.errors import ConfigError
    from moetier.tools.cli.failure import EXIT_ERROR
    from moetier.tools.cli.parser import commands_of
    from moetier.tools.cli.settings import Settings
    from moetier.tools.main import build_parser

    faults: list[ConfigError] = []
    settings = Settings.read(commands_of(build_parser()), faults=faults)
    shown = _shown(settings, arguments.of)
    if arguments.json:
        print(json.dumps(_json(settings, shown) | {"faults": [fault.cause for fault in faults]}, indent=2))
    else:
        print(_text(settings, shown))
    sys.stdout.flush()
    for said in settings.unknown_variables:
        print(f"moetier: {said}", file=sys.stderr)
    for fault in faults:
        print(f"moetier: {fault.cause}\n  {fault.fix}", file=sys.stderr)
    return EXIT_ERROR if faults else 0


def _shown(settings: Settings, command: str | None) -> dict[str, list[Setting]]:
    """By command, or GENERAL; of all commands each one's own, and what is set for it in another way than for all."""
    from moetier.tools.cli.settings import GENERAL

    if command is not None:
        return {command: settings.of(command)}
    shown = {GENERAL: settings.general()}
    general = {setting.key: setting for setting in shown[GENERAL]}
    for name in settings.sections:
        if name != GENERAL:
            found = settings.of(name)
            shown[name] = [each for each in found if each.key not in general or not _same(each, general[each.key])]
    return {name: found for name, found in shown.items() if found}


def _same(own: Setting, general: Setting) -> bool:
    return (own.value, own.where) == (general.value, general.where)


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
    }


def _plain(value: object) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):  # which JSON has not
        return str(value)
    return value if isinstance(value, bool | int | float | None) else str(value)


def _text(settings: Settings, shown: dict[str, list[Setting]]) -> str:
    there = "" if settings.file.exists() else " (there is none)"
    lines = [f"file  {settings.file}{there}"]
    keys = [each.key for found in shown.values() for each in found]
    values = [_word(each.value) for found in shown.values() for each in found]
    width, wide = max(map(len, keys)), max(map(len, values))
    for name, found in shown.items():
        lines.append(f"\n[{name}]")
        lines += [f"{each.key:<{width}}  {_word(each.value):<{wide}}  {_where(each)}" for each in found]
    return "\n".join(lines)


def _where(setting: Setting) -> str:
    return f"{setting.where}: this can't be" if setting.fault else setting.where or "default"


def _word(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
