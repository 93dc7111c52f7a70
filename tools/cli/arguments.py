"""Groups of arguments that several commands have: resources of a model, credentials for daemons, and decoding."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
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

SPECULATION = ("speculate", "look_ahead", "prefetch")  # options of commands that only decode
RESOURCES = tuple(name for name in OPTIONS if name not in ("credentials", *SPECULATION))


def size(text: str) -> str:
    """Return ``text`` unchanged: an argument that is an amount of memory. Raises ConfigError for any other text."""
    Size.parse(text)
    return text


def numbers(text: str) -> list[int]:
    """Parse numbers that are separated by commas."""
    return [int(part) for part in text.split(",")]


def add_option(parser: argparse._ActionsContainer, name: str, *, help: str = "") -> None:
    """Add the option of TierConfig that is called ``name``; ``help`` replaces its own help text."""
    option = OPTIONS[name]
    flag, text = f"--{name.replace('_', '-')}", help or option.help
    if option.kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        parser.set_defaults(**{name: option.default})  # with default=, argparse would add it to the help
        return
    if option.default is not None and "default:" not in text:
        text += " (default: %(default)s)"

    def checked_text(written: str) -> str:
        option.read(name, written)
        return written

    form: dict[str, Any] = {"metavar": option.metavar, "type": option.numbers or checked_text}
    if option.choices:
        form = {"choices": list(option.choices)}
    parser.add_argument(flag, default=option.default, help=text, **form)


def add_resource_arguments(
    parser: argparse.ArgumentParser, *, names: Iterable[str] = RESOURCES, context: str = ""
) -> None:
    """Add the options ``names`` of a command that runs a model, and those for credentials.

    ``context`` replaces the help text of --context.
    """
    for name in names:
        add_option(_group(parser, OPTIONS[name].group), name, help=context if name == "context" else "")
    add_credentials(parser)


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options SPECULATION."""
    for name in SPECULATION:
        add_option(_group(parser, OPTIONS[name].group), name)


def resources_of(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the checked keyword arguments of ``load``; ``more`` replaces values of the command line.

    Budgets have no effect with a daemon whose memory is mapped, and credentials have one only with a daemon of another
    host. Such an option is an error on the command line, and is ignored in the settings. Raises UsageError.
    """
    where = TierConfig.of(daemon=arguments.daemon)
    unused: dict[str, Any] = {}
    if where.mapped is not None:
        unused = {name: OPTIONS[name].default for name in ("ram", "policy", "learn", "loaders")}
    if not where.remote:
        unused |= dict.fromkeys(("token_file", "tls_ca", "tls_cert", "tls_key"))
    for name, default in unused.items():
        if not asked(arguments, name):
            setattr(arguments, name, default)
    found = {name: getattr(arguments, name) for name in OPTIONS if hasattr(arguments, name)}
    found |= {"credentials": credentials(arguments)} | more
    with checked():
        TierConfig.of(**found)
    return found


def asked(arguments: argparse.Namespace, name: str) -> bool:
    """Whether the command line itself gives the option called ``name``, and not only the settings."""
    value, configured = getattr(arguments, name), getattr(arguments, "configured", {})
    return value is not None and value is not False and configured.get(name) != value


CREDENTIALS = ("token_file", "tls_ca", "tls_cert", "tls_key", "insecure")


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Add the options CREDENTIALS, which are for daemons of other hosts."""
    group = _group(parser, "daemons of other hosts")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="file with the daemon's token, in one line")
    group.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="CA that signed its certificate, PEM (default: the system's CAs)"
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate to show, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="private key of that certificate, PEM")
    group.add_argument("--insecure", action="store_true", help="connect without TLS")


def credentials(arguments: argparse.Namespace) -> Credentials:
    """Return the credentials that the options of ``add_credentials`` give."""
    return Credentials(
        token_file=arguments.token_file,
        ca=arguments.tls_ca,
        cert=arguments.tls_cert,
        key=arguments.tls_key,
        insecure=arguments.insecure,
    )


# the same for every budget, because the last bits of a result depend on which tokens are computed together
PREFILL_CHUNK = 1024


def add_decoding_arguments(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    """Add the options of sampling, and --max-new-tokens with the default ``new_tokens``."""
    group = _group(parser, "generation")
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
    _group(parser, "generation").add_argument(
        "--prefill-chunk",
        type=COUNT,
        default=PREFILL_CHUNK,
        metavar="N",
        help="tokens of a prompt that are computed together, if the model supports it; each expert is read once for "
        "all of them (default: %(default)s)",
    )


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of ``generate()`` that decoding options give, without the seed.

    They include ``decoding.PENALTIES``, which ``generate()`` does not know: pass the result through ``behind``.
    """
    asked = {name: value for name in SAMPLING if (value := getattr(arguments, name)) is not None}
    return {**sampling_of(asked), **penalties_of(asked), **ONE_SEQUENCE, "max_new_tokens": arguments.max_new_tokens}


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Return the parser's group with this title; make the group if it is missing."""
    found = (group for group in parser._action_groups if group.title == title)
    return next(found, None) or parser.add_argument_group(title)
