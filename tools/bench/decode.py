"""``moetier bench decode DIR``: tokens a second, one step after the other, beside the bound of a token."""

from __future__ import annotations

import argparse

from moetier.runtime.number import COUNT

from .model import Work, add_model_arguments, measure
from .output import check_bench

HELP = "decoding of fixed tokens, beside the bound of a token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=COUNT, default=32, metavar="N", help="measured steps (default: %(default)s)")
    parser.add_argument("--prompt", type=COUNT, default=16, metavar="N", help="tokens before (default: %(default)s)")
    parser.add_argument(
        "--warm", type=COUNT, default=16, metavar="N", help="steps that are not counted (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=COUNT, default=1, metavar="B", help="sequences, stepped together (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    check_bench(arguments)
    pieces = [arguments.prompt, *[1] * (arguments.warm + arguments.tokens)]
    return measure(arguments, Work.of(arguments, pieces, measured=arguments.tokens, sequences=arguments.batch))
