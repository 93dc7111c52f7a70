"""``moetier bench``: what this machine does, beside what it can do, both measured in one run."""

from __future__ import annotations

import argparse
from importlib import import_module

HELP = "measure the disk, the kernels, decoding, prefill and conversion, each beside its bound"

NOUNS = ("disk", "kernels", "decode", "prefill", "convert", "peers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="noun", required=True, metavar="WHAT")
    for noun in NOUNS:
        module = import_module(f"moetier.tools.bench.{noun}")
        subparser = subparsers.add_parser(noun, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(measure=module.run)


def run(arguments: argparse.Namespace) -> int:
    status: int = arguments.measure(arguments)
    return status
