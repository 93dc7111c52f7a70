"""``moetier bench prefill DIR``: prompt tokens per second, beside the upper bound that this machine's rates allow.

This module only defines the options; ``model`` runs the measurement.
"""

from __future__ import annotations

import argparse

from moetier.tiers.options import COUNT

from .model import Work, add_model_arguments, measure

EXAMPLES = ("moetier bench prefill ./mixtral-4bit --tokens 2048",)

WARM = 8  # tokens fed before the prompt, so that work that is done once in a process is not timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier bench prefill`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens", type=COUNT, default=512, metavar="N", help="tokens of the prompt (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    measure(arguments, Work.of(arguments, [WARM, arguments.tokens], measured=1))
