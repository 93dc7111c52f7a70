"""Parser of the command line. It imports the module of the command that is named, and formats help and errors."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tiers.redaction import redacted

from .advice import OF_LLAMA_CPP, name_of, nearest, option_advice
from .help_format import HelpFormatter

HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?!(?:api|collections|datasets|docs|models|papers|spaces)/)"
    r"([\w.-]+/[\w.-]+)/?(?:tree/main/?)?(?:[?#].*)?"
)
NEGATIVE = re.compile(r"-\.?\d[\d_.]*(?:e[+-]?\d+|[KMGT]i?B|%)?$", re.ASCII | re.IGNORECASE)  # a value, not an option

EXIT_USAGE = 2  # the status that argparse uses
NUMBERS = {int: "a whole number", float: "a number"}


class UsageError(ConfigError):
    """Error in a command line that is wrong for every model and machine, such as options that exclude each other."""


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Turn a ConfigError of the block into a UsageError. The block must do nothing but check options."""
    try:
        yield
    except ConfigError as error:
        raise UsageError(error.cause, error.fix) from error


class CommandParser(argparse.ArgumentParser):
    """Parser that accepts positional arguments before and after options: ``generate DIR --ram 6GiB PROMPT``.

    An unknown option is reported before any other mistake, because the word after it may be its value.

    A command's parser has no arguments until they are needed. Then it imports ``module``, which defines
    ``add_arguments(parser)``, ``run(arguments)`` and EXAMPLES, the command lines at the end of --help.
    """

    def __init__(self, *args: Any, module: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter} | kwargs)
        self._module = module
        self.of_others: Mapping[str, str] = {}  # advice about commands that other programs have, by their names
        self.excess_advice = "If a text has several words, put it in quotes. "
        self._is_inside = False
        self._negative_number_matcher = NEGATIVE

    def fill(self) -> None:
        """Import the command's module and declare its arguments, unless that was done before."""
        if not self._module:
            return
        module = import_module(self._module)
        self._module = ""
        module.add_arguments(self)
        if arguments_by_name(self):
            add_cache_arguments(self)
        self.epilog = examples(module.EXAMPLES)
        if hasattr(module, "run"):
            self.set_defaults(run=module.run, configured={}, by_name=arguments_by_name(self))

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # as argparse declares it
        """Parse the command line. Unknown commands and options are reported before other mistakes.

        Raises SystemExit for a mistake. If no command is named, prints the help and raises SystemExit.
        """
        self.fill()
        if self._is_inside:  # argparse calls this method again for its own passes
            return super().parse_known_args(args, namespace)
        words = sys.argv[1:] if args is None else list(args)
        if commands := parsers_of(self):
            own = list(takewhile(lambda word: word.startswith("-"), words))
            self._check_options(own)
            rest = words[len(own) :]
            if rest and rest[0] not in commands:
                advice = self.of_others.get(rest[0]) or nearest(rest[0], commands)
                if not advice and self._name():
                    example = (self.epilog or "").split("\n")[1].strip()
                    advice = f"Name one of {', '.join(commands)} first ({example}). "
                self._refuse(f"There is no {self._name('command')} {rest[0]!r}.", advice)
            parsed, more = super().parse_known_args(args, namespace)
            if not rest and not more:
                self.print_help()
                self.exit()
            return parsed, more
        self._check_options(words)
        if any(isinstance(action, ModelOption) for action in self._actions):
            words = with_model_first(words)
        self._is_inside = True
        try:
            parsed, more = self.parse_known_intermixed_args(words, namespace)
        finally:
            self._is_inside = False
        if more:
            if more[0].startswith("-") and " " not in more[0]:
                self._refuse_option(more[0])
            self._refuse(
                f"{self._name()} takes no further argument, but there is {more[0]!r}.",
                self.excess_advice,
            )
        return parsed, more

    def _get_option_tuples(self, option_string):  # type: ignore[no-untyped-def]  # as argparse declares it
        """Return the options that a word may begin with: none if it has a space, as it is a text then."""
        return [] if " " in option_string else super()._get_option_tuples(option_string)

    def _get_value(self, action, arg_string):  # type: ignore[no-untyped-def]  # as argparse declares it
        """Return the value of an argument. Exit with a message if the argument's type does not accept the text."""
        value_type = getattr(action.type, "value_type", action.type)
        try:
            return super()._get_value(action, arg_string)
        except MoetierError as error:
            self.exit(EXIT_USAGE, f"moetier: {name_of(action)}: {redacted(error.cause)}\n  {error.fix}\n")
        except argparse.ArgumentError as error:
            said = f"{arg_string!r} is not {NUMBERS.get(value_type, f'of the form {action.metavar}')}"
            if isinstance(error.__context__, argparse.ArgumentTypeError):
                said = error.message
            self._refuse(f"{name_of(action)}: {said}.")

    def _check_value(self, action, value):  # type: ignore[no-untyped-def]  # as argparse declares it
        if action.choices is not None and value not in action.choices:
            self._refuse(f"{name_of(action)} can't be {value}.", f"Choose from {', '.join(map(str, action.choices))}. ")

    def error(self, message: str) -> NoReturn:
        """Exit with a message for a mistake that argparse found. The usage is not printed: it may have twenty lines."""
        if missing := re.fullmatch("the following arguments are required: (.*)", message):
            self._refuse(f"{self._name()} needs {missing[1]}.")
        if empty := re.fullmatch("argument (.*): expected (one|at least one) argument", message):
            self._refuse(f"{empty[1]} needs a value.")
        self._refuse(f"{name}: {message}." if (name := self._name()) else f"{message}.")

    def _name(self, of_none: str = "") -> str:
        """Return the name of the command ("bench decode"), or ``of_none`` for the parser of moetier itself."""
        return self.prog.removeprefix("moetier").strip() or of_none

    def _check_options(self, words: Iterable[str]) -> None:
        for word in takewhile("--".__ne__, words):
            name = word.partition("=")[0]
            # argparse accepts an unambiguous beginning of a long option, takes --word with a space for a value, and
            # would read -ngl as -n gl
            is_option = name in OF_LLAMA_CPP or (name.startswith("--") and " " not in word)
            if is_option and not any(option.startswith(name) for option in self._option_string_actions):
                self._refuse_option(name)

    def _refuse_option(self, name: str) -> NoReturn:
        """Exit with a message for an option that the command does not have."""
        self._refuse(f"{self._name('moetier')} has no option {name}.", option_advice(name, self._actions))

    def _refuse(self, cause: str, advice: str = "") -> NoReturn:
        self.exit(EXIT_USAGE, f"moetier: {redacted(cause)}\n  {advice}{self.prog} --help shows the usage.\n")


def add_commands(
    parser: argparse.ArgumentParser, groups: Mapping[str, Mapping[str, str]], package: str, metavar: str
) -> None:
    """Add the commands of ``groups``: dictionaries from the name of a command to its line in --help, by their titles.

    ``package`` has a module for each command. ``metavar`` stands for the command in the usage.
    """
    subparsers = parser.add_subparsers(dest=metavar.lower(), metavar=metavar, prog=parser.prog)
    if len(groups) > 1:
        parser._positionals.title = "commands"
        subparsers.groups = groups  # type: ignore[attr-defined]  # for HelpFormatter
    for name, line in ((name, line) for commands in groups.values() for name, line in commands.items()):
        description = f"{line[0].upper()}{line[1:]}."
        subparsers.add_parser(name, help=line, description=description, module=f"{package}.{name}")


def examples(lines: Iterable[str]) -> str:
    """Return example command lines as the end of a help text."""
    return "\n  ".join(("examples:", *lines))


def show_first(parser: argparse.ArgumentParser, *names: str) -> None:
    """Move the options ``names`` from their groups to the beginning of --help."""
    actions = [parser._option_string_actions[name] for name in names]
    for group in parser._action_groups:
        group._group_actions = [action for action in group._group_actions if action not in actions]
    options = parser._optionals._group_actions
    options[1:1] = actions  # after --help


# help of an argument that names a directory
DIRECTORY = (
    "a model directory, a name that moetier list shows, the folder of a checkpoint, a GGUF file, or an address in an "
    "object store: s3://bucket/model"
)


def add_directory(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``directory`` of commands that use a model."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)


def add_json(parser: argparse.ArgumentParser, what: str = "one JSON object") -> None:
    """Add the flag ``--json``, with which a command prints ``what``."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def check_utf8(text: str, name: str) -> str:
    """Return ``text``, which errors call ``name``. Raise ConfigError if it was read from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is not UTF-8 text.", "Convert it, for example with iconv -t UTF-8.") from None
    return text


def utf8(text: str) -> str:
    """Return ``text`` unchanged, as the argparse type of a text for the model. Raises ConfigError as ``check_utf8``."""
    return check_utf8(text, "The value")


def check_path(text: str) -> None:
    """Raise ConfigError if ``text``, a path, is empty."""
    if not text:
        raise ConfigError("The path is empty.", "Check that the shell variable is set.")


def directory(text: str) -> str | Path:
    """Return ``text`` as a path, or unchanged if it may be a model's name or an address, which ``by_name`` resolves.

    Arguments that are model directories have this function as their argparse type. Raises ConfigError if ``text`` is
    empty: Path would take it for the current folder.
    """
    from moetier.runtime.model.names import SCHEME, may_be_name

    text = hub_id(text)
    check_path(text)
    return text if may_be_name(text) or SCHEME.match(text) else Path(text)


def local_folder(text: str) -> Path:
    """Return ``text`` as the path of a folder to write. Raises ConfigError for an address, and if it is empty."""
    from moetier.runtime.model.names import SCHEME

    check_path(text)
    if SCHEME.match(text) and not Path(text).exists():
        raise ConfigError(
            f"{text!r} is an address, and not a folder of this machine.",
            "Give a folder. To copy a model directory to an address: moetier push DIR ADDRESS",
        )
    return Path(text)


def file_or_address(text: str) -> str:
    """Return ``text`` unchanged. As an argparse type it marks an argument that is a file, a folder or an address.

    Raises ConfigError if it is empty.
    """
    check_path(text)
    return text


def hub_id(text: str) -> str:
    """Return ORG/NAME for the address of a model's page on the Hugging Face hub, and any other text unchanged."""
    return page[1] if (page := HUB_PAGE.fullmatch(text)) else text


def source(text: str) -> str:
    """Return ``text`` as ``hub_id`` does. As an argparse type it marks a model directory, a checkpoint or a hub id.

    Raises ConfigError if it is empty.
    """
    check_path(text)
    return hub_id(text)


class ModelOption(argparse.Action):
    """The option -m, in place of the argument DIR. ``with_model_first`` removes it before the words are parsed."""

    def __call__(self, *_: object) -> NoReturn:
        raise AssertionError("-m was not removed")


def add_model_argument(parser: argparse.ArgumentParser, *, several: str = "") -> None:
    """Add the argument DIR, a model, and the option -m, which other programs have in its place.

    ``several``: help text of an argument that may be several models; its attribute is ``directories`` then.
    """
    name = "directories" if several else "directory"
    parser.add_argument(name, type=directory, nargs="+" if several else None, metavar="DIR", help=several or DIRECTORY)
    help = "the model, in place of DIR"
    parser.add_argument(
        "-m",
        "--model",
        action=ModelOption,
        dest=name,
        default=argparse.SUPPRESS,
        type=directory,
        metavar="DIR",
        help=help,
    )


def with_model_first(words: Iterable[str]) -> list[str]:
    """Return the words of a command line with the value of -m (or --model) as the first argument: DIR."""
    before = list(takewhile("--".__ne__, words))
    rest = [*words][len(before) :]
    for at, word in enumerate(before):
        if word in ("-m", "--model") and at + 1 < len(before):
            return [before[at + 1], *before[:at], *before[at + 2 :], *rest]
        if word.startswith("--model="):
            return [word.removeprefix("--model="), *before[:at], *before[at + 1 :], *rest]
    return [*before, *rest]


def parsers_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return a dictionary from the names of a parser's commands to their parsers, which may have no arguments yet."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((action.choices for action in actions), {})


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return a dictionary from the names of a parser's commands to their parsers, with all arguments.

    Imports the module of each command.
    """
    commands = parsers_of(parser)
    for command in commands.values():
        command.fill()  # type: ignore[attr-defined]  # a CommandParser
    return commands


def walk(parser: argparse.ArgumentParser, *path: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield the parser and, depth first, the parsers of its commands, each with the words that name the command."""
    yield path, parser
    for name, command in commands_of(parser).items():
        yield from walk(command, *path, name)


def settable(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options of a command that settings may give: a dictionary from key ("prefill-chunk") to action.

    These options take a value or have a --no- form, so the command line can override a setting. Required options are
    left out. A command with subcommands has no such options.
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
    """Return the arguments that may be names of models: a dictionary from attribute name to argparse type."""
    return {action.dest: action.type for action in parser._actions if action.type in (directory, source)}


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options CACHE, for models in an object store, to a command that takes model directories."""
    from moetier.runtime.config import CACHE

    group = parser.add_argument_group("object store")
    for name, option in CACHE.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=option.value_type, metavar=option.metavar, help=option.help)


def by_name(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return ``arguments`` with names and addresses of models replaced by the models' folders.

    The trunk of a model at an address is fetched, unless ``arguments.outline`` is true: then only headers are. Raises
    StoreFormatError if there is no model of that name, and as ``directory_at``.
    """
    from moetier.runtime.model.names import checkpoint_or_model, directory_at, is_address, model_directory

    values = dict(vars(arguments))

    def folder(text: str, *, of_source: bool) -> str | Path:
        if not is_address(text):
            return checkpoint_or_model(text) if of_source else model_directory(text)
        from .progress import transfer_progress

        outline, progress = values.get("outline", False), transfer_progress("fetch")
        at = directory_at(text, values["store_cache"], values["store_cache_size"], progress=progress, outline=outline)
        return str(at) if of_source else at

    for name in arguments.by_name.keys() & values.keys():
        find = partial(folder, of_source=arguments.by_name[name] is source)
        match values[name]:
            case str() as text:
                values[name] = find(text)
            case list() as several:
                values[name] = [find(item) if isinstance(item, str) else item for item in several]
    return argparse.Namespace(**values)
