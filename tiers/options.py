"""Options, each declared once: its name, types, default, range and help.

The command line, the settings file, the environment and the checks of values all read the declaration. ``TierConfig``,
``Credentials``, ``DaemonConfig``, ``ServeConfig`` and ``convert``'s ``Options`` are frozen dataclasses. ``option``
declares their fields, and ``named`` declares options that belong to no class.
"""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from moetier.tiers.errors import ConfigError

EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


@dataclass(frozen=True)
class Number:
    """Type and range of a numeric option. As argparse's ``type``, it parses and checks a value.

    ``hint`` says what to give in place of a number out of range, where its range alone does not say enough.
    """

    value_type: type[int] | type[float]
    least: float
    most: float
    hint: str = ""

    def __call__(self, text: str) -> float:
        """Parse a number. Raises ConfigError if it is out of range, ValueError if the text is not a number."""
        number = self.value_type(text)
        if not self.least <= number <= self.most or number == math.inf:
            raise ConfigError(f"{text} is out of range.", self.fix)
        return number

    @property
    def fix(self) -> str:
        """The fix for a number out of range: a sentence that says what to give."""
        most = "2^31 - 1" if self.most == MAX_COUNT else f"{self.most:,}"
        least = "a number greater than 0 and at most" if self.least == TINY else f"{self.least:,} to"
        return self.hint or f"Give {least} {most}."

    @property
    def __name__(self) -> str:
        """Name of the type in argparse's errors."""
        return self.value_type.__name__


MAX_COUNT = (1 << 31) - 1  # largest count: a far larger number could overflow, or take for ever to compute with
TINY = math.ulp(0.0)  # the least float above 0
COUNT = Number(int, 1, MAX_COUNT)
SECONDS = Number(float, TINY, 86_400)


@dataclass(frozen=True, slots=True)
class Option:
    """Declaration of one option.

    Attributes:
        default: the default as a user would write it.
        help: the text of ``--help``, without the default.
        types: the types that Python code may give; by default the type of ``default``, or that of ``numbers``.
        expected: what to give instead of a value of a wrong type; the error says "Give" before it.
        group: the title under which ``--help`` lists the option; "" for the command's own options.
        metavar: the word for the value in ``--help``.
        choices: the only allowed values; empty if there is no such list.
        numbers: the allowed range of a number.
        parse: converts a value, or raises ConfigError.
        short: the short form on the command line, such as "-n".
        is_setting: whether the settings file and the environment may give the value. A flag with is_setting=False has
            no --no- form: there is no setting that it could switch off.
        in_config: whether a user may add it to the config.json of a model directory.
        resumes: whether the command that resumes a conversion repeats it: it changes the result, or what is downloaded.
        name: the name on the command line, with "_" for "-", and in errors; by default, that of the field.
    """

    default: Any
    help: str
    types: Any = None
    expected: str = ""
    group: str = ""
    metavar: str | None = None
    choices: tuple[Any, ...] = ()
    numbers: Number | None = None
    parse: Callable[[Any], Any] | None = None
    short: str = ""
    is_setting: bool = True
    in_config: bool = False
    resumes: bool = False
    name: str = ""

    @property
    def value_type(self) -> Any:
        """Type of the values on the command line, aside from None."""
        if self.numbers is not None:
            return self.numbers.value_type
        accepted = [value_class for value_class in (get_args(self.types) or (self.types,)) if value_class in EXPECTED]
        return accepted[0] if accepted else type(self.default)

    @property
    def python_type(self) -> Any:
        """Type of the values that Python code may give, such as ``str | None``."""
        types = self.types or (self.value_type if self.default is not None else self.value_type | None)
        return types | int if self.value_type is float else types

    def read(self, value: Any) -> Any:
        """Check and convert a value. Raises ConfigError if it is not allowed."""
        if not isinstance(value, self.python_type) or (isinstance(value, bool) and self.value_type is not bool):
            raise ConfigError(f"`{self.name}` is {value!r}.", f"Give {self.expected or EXPECTED[self.value_type]}.")
        if value is not None:
            if self.choices and value not in self.choices:
                choices = ", ".join(map(str, self.choices))
                raise ConfigError(f"`{self.name}` is {value!r}.", f"Give one of {choices}.")
            if self.numbers is not None and not self.numbers.least <= value <= self.numbers.most:
                raise ConfigError(f"`{self.name}` is {value}.", self.numbers.fix)
        return value if self.parse is None else self.parse(value)


def option(default: Any, help: str, **more: Any) -> Any:
    """Declare the field of a dataclass. The parameters are the attributes of ``Option``."""
    return option_like(Option(default, help, **more))


def file_option(help: str, group: str = "", name: str = "") -> Any:
    """Declare the field of a dataclass for the path of a file, by default None."""
    return option(None, help, name=name, types=Path | None, group=group, metavar="FILE")


def option_like(option: Option, **changes: Any) -> Any:
    """Declare the field of a dataclass as ``option`` with ``changes``. Its default is converted for each object."""
    option = replace(option, **changes)
    parse = option.parse
    if parse is None:
        return field(default=option.default, metadata={"option": option})
    return field(default_factory=lambda: parse(option.default), metadata={"option": option})


def options_of(config: type) -> dict[str, Option]:
    """Return the options that the fields of a dataclass declare, by name."""
    return named(**{field.name: field.metadata["option"] for field in fields(config) if "option" in field.metadata})


def named(**options: Option) -> dict[str, Option]:
    """Return ``options`` by name. An option without a name gets this one."""
    return {name: replace(option, name=option.name or name) for name, option in options.items()}


def read_all(options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check and convert values of ``options``. Raises ConfigError for a value, and TypeError for a name."""
    if unknown := given.keys() - options.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    return {name: options[name].read(value) for name, value in given.items()}


def declare_keywords(
    function: Callable[..., Any], options: Mapping[str, Option], further: Mapping[str, Option] = MappingProxyType({})
) -> None:
    """Give a function, whose last parameter is ``**options``, the signature and the documentation of its options.

    In its docstring, they replace the line of ``options``. ``further`` options are parameters already, and only
    documented.
    """
    own = list(inspect.signature(function).parameters.values())[:-1]
    first = [parameter for parameter in own if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for name, option in options.items()
    ]
    function.__signature__ = inspect.Signature([*first, *keywords, *own[len(first) :]])  # type: ignore[attr-defined]
    lines = "".join(
        textwrap.fill(f"{name}: {option.help}.", 108, initial_indent=" " * 4, subsequent_indent=" " * 8) + "\n"
        for name, option in (*options.items(), *further.items())
    )
    own_text = inspect.cleandoc(function.__doc__ or "")  # as Python 3.13 and newer keep it
    function.__doc__ = re.sub(r" +options: .*\n", lambda _: lines, own_text)


def command_words(values: Iterable[tuple[str, Any]]) -> list[str]:
    """Return pairs of a name and a value as words of a command line: ("trunk_bits", 8) -> ["--trunk-bits", "8"].

    True stands for a flag. None and False are left out.
    """
    words = []
    for name, value in values:
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words
