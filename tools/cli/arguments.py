"""Groups of arguments that several commands have: resources of a model, credentials for daemons, and decoding."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moetier.runtime.config import COUNT, OPTIONS, Size, TierConfig
from moetier.runtime.generation.decoding import (
    MIN_P,
    OCCURRENCE_PENALTY,
    ONE_SEQUENCE,
    REPETITION_PENALTY,
    SAMPLING,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    penalties_of,
    sampling_of,
)
from moetier.runtime.wire.address import Credentials

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


CREDENTIALS = ("token_file", "tls_ca", "tls_cert", "tls_key", "insecure")


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is shown to a daemon of another host."""
    group = group_of(parser, "daemons of other hosts")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="the token of the daemon, in one line")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="who has signed its certificate, PEM (the system's)")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="a certificate to show, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    group.add_argument("--insecure", action="store_true", help="without TLS")


def credentials(arguments: argparse.Namespace) -> Credentials:
    """Return the credentials that the options of ``add_credentials`` give."""
    return Credentials(
        token_file=arguments.token_file,
        ca=arguments.tls_ca,
        cert=arguments.tls_cert,
        key=arguments.tls_key,
        insecure=arguments.insecure,
    )


PREFILL_CHUNK = 1024  # no budget changes it: in what company a token is computed has a part in its last bits


def add_decoding_arguments(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    """Add the options of sampling. Without a temperature the model's generation_config.json decides."""
    group = group_of(parser, "generation")
    group.add_argument(
        "--max-new-tokens",
        type=COUNT,
        default=new_tokens,
        metavar="N",
        help="maximum length of the answer, in tokens (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=TEMPERATURE,
        metavar="T",
        help="sampling temperature; 0 always takes the most likely token (default: from the model's "
        "generation_config.json, else 0)",
    )
    group.add_argument(
        "--top-k",
        type=TOP_K,
        metavar="K",
        help="sample from the K most likely tokens; 0: from all (default of this and the next three: from "
        "generation_config.json)",
    )
    group.add_argument(
        "--top-p",
        type=TOP_P,
        metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P",
    )
    group.add_argument(
        "--min-p",
        type=MIN_P,
        metavar="P",
        help="leave out tokens that are less than P times as likely as the most likely one",
    )
    group.add_argument(
        "--repetition-penalty",
        type=REPETITION_PENALTY,
        metavar="X",
        help="divide the scores of tokens that the prompt or the answer already has; 1 changes nothing",
    )
    for name, times in ("presence", ""), ("frequency", " for each occurrence"):
        group.add_argument(
            f"--{name}-penalty",
            type=OCCURRENCE_PENALTY,
            metavar="X",
            help=f"lower the scores of tokens that the answer already has by X{times}; 0 changes nothing",
        )
    group.add_argument("--seed", type=SEED, default=0, metavar="N", help="seed of the sampling (default: %(default)s)")


def add_prefill_argument(parser: argparse.ArgumentParser) -> None:
    """Add --prefill-chunk."""
    group_of(parser, "generation").add_argument(
        "--prefill-chunk",
        type=COUNT,
        default=PREFILL_CHUNK,
        metavar="N",
        help="tokens of a prompt that are computed together, if the model supports it; each expert is read once for "
        "all of them (default: %(default)s)",
    )


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return keyword arguments of ``generate()``, and PENALTIES, which ``behind`` replaces.

    The seed is not among them: it is for ``torch.manual_seed``.
    """
    asked = {name: value for name in SAMPLING if (value := getattr(arguments, name)) is not None}
    return {**sampling_of(asked), **penalties_of(asked), **ONE_SEQUENCE, "max_new_tokens": arguments.max_new_tokens}


def group_of(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of that title in a parser's --help, made where it is missing: several functions add to one."""
    found = (group for group in parser._action_groups if group.title == title)
    return next(found, None) or parser.add_argument_group(title)
