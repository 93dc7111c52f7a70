"""A parser's commands and options, as configuration and completion see them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

DIRECTORY = "a model directory, made by moetier convert, or the name of a pulled model"


def directory(text: str) -> str | Path:
    """The type of an argument that is a model directory: a path, or what may be a name, for ``by_name``."""
    from moetier.runtime.pulled import may_be_name

    return text if may_be_name(text) else Path(text)


def file_or_address(text: str) -> str:
    """Of one that may be a file, or where a daemon is."""
    return text


def source(text: str) -> str:
    """Of one that may be an id of the hub as well, or a checkpoint's folder."""
    return text


def parsers_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of its commands by name, which may lack their arguments yet; {} where there are none."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((action.choices for action in actions), {})


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of its commands by name, with all their arguments: imports the module of each."""
    commands = parsers_of(parser)
    for command in commands.values():
        command.fill()  # type: ignore[attr-defined]  # a CommandParser
    return commands


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
    if parsers_of(parser):
        return {}
    return {
        longest.removeprefix("--"): action
        for action in parser._actions
        if isinstance(action, argparse._StoreAction | argparse.BooleanOptionalAction)
        and action.option_strings
        and not action.required
        and (longest := next((name for name in action.option_strings if name.startswith("--")), ""))
    }


def arguments_by_name(parser: argparse.ArgumentParser) -> dict[str, object]:
    """The arguments of a command that may be names of pulled models: their types."""
    return {action.dest: action.type for action in parser._actions if action.type in (directory, source)}


def by_name(arguments: argparse.Namespace) -> argparse.Namespace:
    """With folders in the place of names. Raises StoreFormatError for a name that nothing has."""
    from moetier.runtime.pulled import checkpoint_or_model, model_directory

    found = dict(vars(arguments))
    for name in arguments.by_name.keys() & found.keys():
        find = checkpoint_or_model if arguments.by_name[name] is source else model_directory
        match found[name]:
            case str() as text:
                found[name] = find(text)
            case list() as several:
                found[name] = [find(each) if isinstance(each, str) else each for each in several]
    return argparse.Namespace(**found)
