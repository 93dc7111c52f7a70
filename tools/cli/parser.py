"""The parser of the command line: commands that are imported when they are named, help texts, and what is said of a
command line that is wrong."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from moetier.tiers.errors import ConfigError, MoetierError

EXIT_USAGE = 2  # as argparse has it
WIDTH = 100  # columns of a help text, at most
NUMBERS = {int: "a whole number", float: "a number"}


class UsageError(ConfigError):
    """Options, each of which argparse has taken by itself, that can't be for any model."""


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Raise a ConfigError of the block, which looks at options alone, as a UsageError."""
    try:
        yield
    except ConfigError as error:
        raise UsageError(error.cause, error.fix) from error


class HelpFormatter(argparse.HelpFormatter):
    """Keeps lines within WIDTH, and names in the usage only the arguments that are required or have no name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=min(shutil.get_terminal_size().columns - 2, WIDTH))

    def add_usage(self, usage, actions, groups, prefix=None):  # type: ignore[no-untyped-def]  # as argparse declares it
        """Add a usage line with positional arguments and required options; "[options]" is for the rest."""
        words = ["%(prog)s", "[options]"]
        for action in actions:
            if not action.option_strings:
                words.append(self._format_args(action, action.metavar or action.dest))
            elif action.required:
                words += [action.option_strings[0], self._format_args(action, action.metavar)]
        super().add_usage(usage or " ".join(words), actions, groups, prefix)

    def add_argument(self, action: argparse.Action) -> None:
        """Add an argument; commands count as indented, for the width of the first column."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # whose commands argparse does not count as indented
            self._action_max_length += self._indent_increment

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """A text of several lines stays as it is: the examples."""
        return text if "\n" in text else super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """Takes positional arguments on both sides of options: ``generate DIR --ram 6GiB PROMPT``. An option that it does
    not have is named alone, before all else that may be wrong: what follows it may be its value, or not.

    The parser of a command is empty until something asks for its arguments: its ``module`` is imported then, which has
    ``add_arguments(parser)``, EXAMPLES (command lines for the end of --help), and ``run(arguments)``.
    """

    def __init__(self, *args: Any, module: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter} | kwargs)
        self._module = module
        self._inside = False

    def fill(self) -> None:
        """Declare the command's arguments, if that is not done yet."""
        if not self._module:
            return
        module = import_module(self._module)
        self._module = ""
        module.add_arguments(self)
        self.epilog = examples(module.EXAMPLES)
        if hasattr(module, "run"):
            self.set_defaults(run=module.run, configured={}, by_name=arguments_by_name(self))

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # as argparse declares it
        """Parse the command line, with unknown options and commands refused first. Raises SystemExit."""
        self.fill()
        if self._inside:  # argparse's own passes
            return super().parse_known_args(args, namespace)
        words = sys.argv[1:] if args is None else list(args)
        if commands := parsers_of(self):
            own = list(takewhile(lambda word: word.startswith("-"), words))
            self._check_options(own)
            rest = words[len(own) :]
            if rest and rest[0] not in commands:
                self._refuse(f"There is no {self._name('command')} {rest[0]!r}.", _nearest(rest[0], commands))
            found, more = super().parse_known_args(args, namespace)
            if not rest and not more:
                self.print_help()
                self.exit()
            return found, more
        self._check_options(words)
        self._inside = True
        try:
            found, more = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False
        if more:
            self._refuse(f"{self._name()} has no place for {more[0]!r}.", "Quote a text of several words; ")
        return found, more

    def _get_value(self, action, arg_string):  # type: ignore[no-untyped-def]  # as argparse declares it
        """Refuse a text that the type of an option does not take."""
        kind = getattr(action.type, "kind", action.type)
        try:
            return super()._get_value(action, arg_string)
        except MoetierError as error:
            self.exit(EXIT_USAGE, f"moetier: {_name_of(action)}: {error.cause}\n  {error.fix}\n")
        except argparse.ArgumentError as error:
            said = f"{arg_string!r} is not {NUMBERS.get(kind, f'of the form {action.metavar}')}"
            if isinstance(error.__context__, argparse.ArgumentTypeError):
                said = error.message
            self._refuse(f"{_name_of(action)}: {said}.")

    def _check_value(self, action, value):  # type: ignore[no-untyped-def]  # as argparse declares it
        if action.choices is not None and value not in action.choices:
            self._refuse(
                f"{_name_of(action)} can't be {value}.", f"Choose from {', '.join(map(str, action.choices))}; "
            )

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse itself finds. The usage, which may be twenty lines, is in --help."""
        if missing := re.fullmatch("the following arguments are required: (.*)", message):
            self._refuse(f"{self._name()} needs {missing[1]}.")
        if empty := re.fullmatch("argument (.*): expected (one|at least one) argument", message):
            self._refuse(f"{empty[1]} needs a value.")
        self._refuse(f"{name}: {message}." if (name := self._name()) else f"{message}.")

    def _name(self, of_none: str = "") -> str:
        """ "bench decode"; ``of_none`` for the whole."""
        return self.prog.removeprefix("moetier").strip() or of_none

    def _check_options(self, words: Iterable[str]) -> None:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in takewhile("--".__ne__, words):
            name = word.partition("=")[0]
            # argparse takes a word with a space in it for no option, and a beginning that is clear for the whole
            if name.startswith("--") and " " not in word and not any(each.startswith(name) for each in known):
                argument = next((a for a in self._actions if not a.option_strings and f"--{a.dest}" == name), None)
                advice = _nearest(name, known) if argument is None else f"Give {_name_of(argument)} without a name; "
                self._refuse(f"{self._name('moetier')} has no option {name}.", advice)

    def _refuse(self, cause: str, advice: str = "") -> NoReturn:
        self.exit(EXIT_USAGE, f"moetier: {cause}\n  {advice}{self.prog} --help says what there is.\n")


def add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, str], package: str, metavar: str) -> None:
    """Add ``commands``, each with its line of help. ``package`` has a module for each."""
    subparsers = parser.add_subparsers(dest=metavar.lower(), metavar=metavar, prog=parser.prog)
    for name, line in commands.items():
        description = f"{line[0].upper()}{line[1:]}."
        subparsers.add_parser(name, help=line, description=description, module=f"{package}.{name}")


def examples(lines: Iterable[str]) -> str:
    """The end of a help text."""
    return "\n  ".join(("examples:", *lines))


def show_first(parser: argparse.ArgumentParser, *names: str) -> None:
    """Let --help begin with these options, before the groups that they were declared in."""
    actions = [parser._option_string_actions[name] for name in names]
    for group in parser._action_groups:
        group._group_actions = [action for action in group._group_actions if action not in actions]
    options = parser._optionals._group_actions
    options[1:1] = actions  # behind --help


def _name_of(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest.upper())


def _nearest(word: str, known: Iterable[str]) -> str:
    """A suggestion, or nothing where none is close."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {found[0]}? " if found else ""


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
