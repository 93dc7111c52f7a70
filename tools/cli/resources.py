"""Options of the tiers on a command line, as runtime/config.py declares them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from moetier.runtime.config import OPTIONS, Size, TierConfig

from .access import add_credentials, credentials
from .options import group_of
from .parser import checked

SPECULATION = ("speculate", "look_ahead", "prefetch")  # of commands that decode and do nothing else
RESOURCES = tuple(name for name in OPTIONS if name not in ("credentials", *SPECULATION))


def size(text: str) -> str:
    """Return an amount of memory as it is written. Raises ConfigError where it is none."""
    Size.parse(text)
    return text


def _checked(name: str) -> Callable[[str], str]:
    """Return a type for argparse that checks the option called ``name`` and keeps its text."""

    def check(text: str) -> str:
        OPTIONS[name].read(name, text)
        return text

    return check


def add_option(parser: argparse._ActionsContainer, name: str, *, help: str = "") -> None:
    """Add the option called ``name``, with another help text where one is given."""
    option = OPTIONS[name]
    flag, text = f"--{name.replace('_', '-')}", help or option.help
    if option.kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        parser.set_defaults(**{name: option.default})  # argparse would name it in the help
        return
    if option.default is not None and "default:" not in text:
        text += " (default: %(default)s)"
    given: dict[str, Any] = {"default": option.default, "help": text}
    if option.choices:
        given["choices"] = list(option.choices)
    else:
        given |= {"metavar": option.metavar, "type": option.numbers or _checked(name)}
    parser.add_argument(flag, **given)


def add_resource_arguments(
    parser: argparse.ArgumentParser, *, names: Iterable[str] = RESOURCES, context: str = ""
) -> None:
    """Add the options of every command that runs a model. ``context`` is the help of --context."""
    for name in names:
        add_option(group_of(parser, OPTIONS[name].group), name, help=context if name == "context" else "")
    add_credentials(parser)


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that decode and do nothing else."""
    for name in SPECULATION:
        add_option(group_of(parser, OPTIONS[name].group), name)


def resources_of(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the keyword arguments of ``load``, ``more`` among them, checked. Raises UsageError.

    What is said on the command line and cannot be had is an error; what is set beforehand gives way (``settings.py``).
    """
    _give_way(arguments)
    found = {name: getattr(arguments, name) for name in OPTIONS if hasattr(arguments, name)}
    found |= {"credentials": credentials(arguments)} | more
    with checked():
        TierConfig.of(**found)
    return found


def asked(arguments: argparse.Namespace, name: str) -> bool:
    """Whether a command line says so, and not only what is set beforehand."""
    value, configured = getattr(arguments, name), getattr(arguments, "configured", {})
    said = value is not None and value is not False
    return said and (name not in configured or configured[name] != value)


def _give_way(arguments: argparse.Namespace) -> None:
    """Reset what was set beforehand and does not apply: budgets where a daemon's memory is mapped, and credentials
    where no daemon of another host is named."""
    where = TierConfig.of(daemon=arguments.daemon)
    unused: dict[str, Any] = {}
    if where.mapped is not None:
        unused = {name: OPTIONS[name].default for name in ("ram", "policy", "learn")}
    if not where.remote:
        unused |= dict.fromkeys(("token_file", "tls_ca", "tls_cert", "tls_key"))
    for name, default in unused.items():
        if not asked(arguments, name):
            setattr(arguments, name, default)
