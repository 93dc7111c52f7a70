"""A parser's commands and options, as configuration and completion see them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """By name; {} where there are none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: dict[str, argparse.ArgumentParser] = action.choices
            return found
    return {}


def walk(parser: argparse.ArgumentParser, *path: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The parser, and those of its commands and of theirs, each behind the words that lead to it."""
    yield path, parser
    for name, command in commands_of(parser).items():
        yield from walk(command, *path, name)


def group_of(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of that title in a parser's --help, made where it is missing: several functions add to one."""
    found = (group for group in parser._action_groups if group.title == title)
    return next(found, None) or parser.add_argument_group(title)


def settable(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a command that may be set beforehand, by key ("prefill-chunk").

    They have a default, and the command line can say otherwise: so a value, or a form with --no-. None of a command
    that has commands itself.
    """
    if commands_of(parser):
        return {}
    return {
        longest.removeprefix("--"): action
        for action in parser._actions
        if isinstance(action, argparse._StoreAction | argparse.BooleanOptionalAction)
        and action.option_strings
        and not action.required
        and (longest := next((name for name in action.option_strings if name.startswith("--")), ""))
    }
