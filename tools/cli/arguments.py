"""Groups of options that several commands have: resources of a model, credentials for daemons, and decoding."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetier.runtime.config import COUNT, OPTIONS, PREFILL_CHUNK, Size, TierConfig
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

SPECULATION = ("speculate", "look_ahead", "prefetch")  # options that only commands for generating text have
OWN = ("credentials", "prefill_chunk", "all_logits", *SPECULATION)  # options that only some commands have
RESOURCES = tuple(name for name in OPTIONS if name not in OWN)


def size(text: str) -> str:
    """Return ``text`` unchanged if it is an amount of memory, such as "6GiB". Raises ConfigError if it is not."""
    Size.parse(text)
    return text


def numbers(text: str) -> list[int]:
    """Parse whole numbers that are separated by commas. Raises ValueError for any other text."""
    return [int(part) for part in text.split(",")]


def add_option(parser: argparse._ActionsContainer, name: str, *, help: str = "") -> None:
    """Add the option of TierConfig that is called ``name``. ``help`` replaces the option's own help text."""
    option = OPTIONS[name]
    flag, text = f"--{name.replace('_', '-')}", help or option.help
    if option.kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        parser.set_defaults(**{name: option.default})  # with default=, argparse would add the default to the help
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
    """Add options for a command that runs a model: those called ``names``, and those for credentials.

    ``context`` replaces the help text of --context.
    """
    for name in names:
        add_option(_group(parser, OPTIONS[name].group), name, help=context if name == "context" else "")
    add_credentials(parser)


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options whose names are in SPECULATION."""
    for name in SPECULATION:
        add_option(_group(parser, OPTIONS[name].group), name)


def resources_of(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return checked keyword arguments for ``load``. ``more`` replaces values of the command line.

    Budgets have no effect if --daemon names a daemon of this machine, and credentials have an effect only if it names
    one of another host. An option without effect is ignored if it comes from the settings. Raises UsageError if the
    command line gives such an option, or if a value is invalid.
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
    """Whether the command line, and not only a setting, gives the option called ``name``."""
    value, configured = getattr(arguments, name), getattr(arguments, "configured", {})
    return value is not None and value is not False and configured.get(name) != value


CREDENTIALS = ("token_file", "tls_ca", "tls_cert", "tls_key", "insecure")


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Add the options whose names are in CREDENTIALS. They are for daemons on other hosts."""
    group = _group(parser, "daemons on other hosts")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="file that holds the daemon's token in one line")
    group.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="PEM file of the CA that signed the daemon's certificate (default: the system's CAs)",
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM file of this client's certificate")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file of the private key of --tls-cert")
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


def add_decoding_arguments(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    """Add the options for sampling, and --max-new-tokens with the default ``new_tokens``."""
    group = _group(parser, "generation")
    group.add_argument(
        "-n",
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
        help="sample only from the K most likely tokens; 0: from all tokens (default, as for the next three options: "
        "from generation_config.json)",
    )
    group.add_argument(
        "--top-p",
        type=TOP_P,
        metavar="P",
        help="sample only from the most likely tokens, as many as have a total probability of P",
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
        help="divide by X the scores of tokens that are already in the prompt or the answer; 1 changes nothing",
    )
    for name, times in ("presence", ""), ("frequency", ", once for each occurrence"):
        group.add_argument(
            f"--{name}-penalty",
            type=OCCURRENCE_PENALTY,
            metavar="X",
            help=f"lower by X the scores of tokens that are already in the answer{times}; 0 changes nothing",
        )
    group.add_argument("--seed", type=SEED, default=0, metavar="N", help="seed for sampling (default: %(default)s)")


def add_prefill_argument(parser: argparse.ArgumentParser) -> None:
    """Add --prefill-chunk."""
    _group(parser, "generation").add_argument(
        "--prefill-chunk",
        type=COUNT,
        default=PREFILL_CHUNK,
        metavar="N",
        help=f"{OPTIONS['prefill_chunk'].help} (default: %(default)s)",
    )


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return keyword arguments for ``generate()`` from the decoding options, without the seed.

    They may include ``decoding.PENALTIES``, which ``generate()`` does not accept. ``behind`` replaces these by a logits
    processor.
    """
    asked = {name: value for name in SAMPLING if (value := getattr(arguments, name)) is not None}
    return {**sampling_of(asked), **penalties_of(asked), **ONE_SEQUENCE, "max_new_tokens": arguments.max_new_tokens}


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Return the parser's group called ``title``, which is added if the parser has none."""
    found = (group for group in parser._action_groups if group.title == title)
    return next(found, None) or parser.add_argument_group(title)
