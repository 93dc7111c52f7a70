"""Groups of options that several commands have: resources of a model, credentials for daemons, and decoding."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetier.runtime.config import MEMORY_GROUP, OF_HOST_TIER, TIER_OPTIONS, Size, TierConfig
from moetier.runtime.generation.decoding import DECODING, ONE_SEQUENCE, SAMPLING, penalties_of, sampling_of
from moetier.runtime.wire.address import CREDENTIALS, Credentials
from moetier.tiers.layout import BITS, Bits
from moetier.tiers.options import Option

from .parser import checked


def _in_groups(*titles: str) -> tuple[str, ...]:
    """Return the names of the options of TierConfig that --help lists under ``titles``."""
    return tuple(name for name, option in TIER_OPTIONS.items() if option.group in titles)


RESOURCES = _in_groups(MEMORY_GROUP, "daemon")
SPECULATION = _in_groups("speculation")  # only commands for generating text have these


def numbers(text: str) -> list[int]:
    """Parse whole numbers that are separated by commas. Raises ValueError for any other text."""
    return [int(part) for part in text.split(",")]


def add_bits(parser: argparse.ArgumentParser, trunk: Sequence[Bits]) -> None:
    """Add ``--bits``, by default all that experts may have, and ``--trunk-bits``, by default those of ``trunk``."""
    for name, what, default in (
        ("--bits", "expert weight", BITS),
        ("--trunk-bits", "weight of everything else", trunk),
    ):
        text = f"bits per {what} (default: {','.join(map(str, default))})"
        parser.add_argument(name, type=numbers, metavar="N,...", help=text)


@dataclass(frozen=True, slots=True)
class OneOf:
    """Type of an argument with choices: it returns the choice that a text stands for, or any other text unchanged."""

    choices: tuple[Any, ...]

    def __call__(self, text: str) -> Any:
        """Return the choice with this text. Any other text is returned unchanged, and argparse refuses it."""
        return next((choice for choice in self.choices if str(choice) == text), text)


@dataclass(frozen=True, slots=True)
class Checked:
    """Type of an argument whose text ``parse`` checks. The argument keeps the text, which is parsed later."""

    parse: Callable[[str], object]

    def __call__(self, text: str) -> str:
        """Return ``text`` unchanged. Raises ConfigError if it is not allowed."""
        self.parse(text)
        return text


size = Checked(Size.parse)  # type of an argument that is an amount of memory, such as "6GiB"


def add_option(parser: argparse._ActionsContainer, option: Option) -> None:
    """Add the argument that ``option`` declares.

    A value with ``parse`` is checked here and kept as text; ``TierConfig.of`` converts it.
    """
    text = option.help.replace("%", "%%")  # argparse formats it
    flags = [*([option.short] if option.short else []), f"--{option.name.replace('_', '-')}"]
    if option.value_type is bool and not option.is_setting:
        parser.add_argument(*flags, action="store_true", help=text)
        return
    if option.value_type is bool:
        # with default=, argparse would add the default to the help
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        parser.set_defaults(**{option.name: option.default})
        return
    if option.default not in (None, "") and "default:" not in text:
        text += " (default: %(default)s)"
    more: dict[str, Any] = {"type": option.numbers or (None if option.value_type is str else option.value_type)}
    if option.parse is not None:
        more = {"type": Checked(option.parse)}
    if option.choices:
        more = {"type": OneOf(option.choices), "choices": option.choices}
    parser.add_argument(*flags, default=option.default, metavar=option.metavar, help=text, **more)


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add the arguments that ``options`` declare, each to the group that it names."""
    for option in options:
        add_option(_group(parser, option.group) if option.group else parser, option)


def add_resource_arguments(parser: argparse.ArgumentParser, *, context: str = "") -> None:
    """Add options for a command that runs a model: those called RESOURCES, and those for credentials.

    ``context`` replaces the help text of --context.
    """
    changed = {
        name: replace(
            TIER_OPTIONS[name], help=f"{TIER_OPTIONS[name].help}. No effect if a local daemon holds the experts"
        )
        for name in OF_HOST_TIER
    }
    if context:
        changed["context"] = replace(TIER_OPTIONS["context"], help=context)
    add_options(parser, [changed.get(name, TIER_OPTIONS[name]) for name in RESOURCES])
    add_credentials(parser)


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options whose names are in SPECULATION."""
    add_options(parser, [TIER_OPTIONS[name] for name in SPECULATION])


def resources_of(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return checked keyword arguments for ``load``. ``more`` replaces values of the command line.

    Budgets have no effect if --daemon names a daemon of this machine, and credentials have an effect only if it names
    one of another host. An option without effect is ignored if it comes from the settings. Raises UsageError if the
    command line gives such an option, or if a value is invalid.
    """
    where = TierConfig.of(daemon=arguments.daemon)
    unused: dict[str, Any] = {}
    if where.mapped is not None:
        unused = {name: TIER_OPTIONS[name].default for name in OF_HOST_TIER}
    if not where.remote:
        unused |= {option.name: option.default for option in CREDENTIALS.values()}
    for name, default in unused.items():
        if not asked(arguments, name):
            setattr(arguments, name, default)
    options = {name: getattr(arguments, name, option.default) for name, option in TIER_OPTIONS.items()}
    options |= {"credentials": credentials(arguments)} | more
    with checked():
        TierConfig.of(**options)
    return options


def asked(arguments: argparse.Namespace, name: str) -> bool:
    """Return whether the command line, and not only a setting, gives the option called ``name``."""
    value, configured = getattr(arguments, name), getattr(arguments, "configured", {})
    return value is not None and value is not False and configured.get(name) != value


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Add the options of CREDENTIALS. They are for daemons on other hosts."""
    add_options(parser, CREDENTIALS.values())


def credentials(arguments: argparse.Namespace) -> Credentials:
    """Return the credentials that the options of ``add_credentials`` give."""
    return Credentials(**{field: getattr(arguments, option.name) for field, option in CREDENTIALS.items()})


def add_decoding_arguments(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    """Add the options for sampling, and --max-new-tokens with the default ``new_tokens``."""
    longest, *others = DECODING.values()
    add_options(parser, [replace(longest, default=new_tokens), *others])


def add_prefill_argument(parser: argparse.ArgumentParser) -> None:
    """Add --prefill-chunk."""
    add_options(parser, [TIER_OPTIONS["prefill_chunk"]])


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return keyword arguments for ``generate()`` from the decoding options, without the seed.

    They may include ``decoding.PENALTIES``, which ``generate()`` does not accept. ``decoding.behind`` replaces these by
    a logits processor.
    """
    asked = {name: value for name in SAMPLING if (value := getattr(arguments, name)) is not None}
    return {**sampling_of(asked), **penalties_of(asked), **ONE_SEQUENCE, "max_new_tokens": arguments.max_new_tokens}


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Return the parser's group called ``title``, which is added if the parser has none."""
    groups = (group for group in parser._action_groups if group.title == title)
    return next(groups, None) or parser.add_argument_group(title)
