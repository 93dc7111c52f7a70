"""``moetier bench decode DIR``: decoded tokens per second, beside the upper bound that this machine's rates allow.

This module only defines the options; ``model`` runs the measurement.
"""

from __future__ import annotations

import argparse

from moetier.tiers.options import COUNT

from .model import Work, add_model_arguments, measure

EXAMPLES = ("moetier bench decode ./mixtral-4bit --ram 2GiB --ram 4GiB",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier bench decode`."""
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=COUNT, default=32, metavar="N", help="steps to measure (default: %(default)s)")
    parser.add_argument(
        "--prompt", type=COUNT, default=16, metavar="N", help="tokens of the prompt before them (default: %(default)s)"
    )
    parser.add_argument(
        "--warm", type=COUNT, default=16, metavar="N", help="steps before measuring (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=COUNT, default=1, metavar="B", help="sequences that are decoded together (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    pieces = [arguments.prompt, *[1] * (arguments.warm + arguments.tokens)]
    measure(arguments, Work.of(arguments, pieces, measured=arguments.tokens, sequences=arguments.batch))
