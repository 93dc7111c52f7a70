"""``moetier ray DIR``: serve a model with Ray Serve, on the nodes of a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from moetier.runtime.machine.threads import usable_cpus
from moetier.tiers.options import Number
from moetier.tools.cli.arguments import add_options
from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import show_first
from moetier.tools.ray.app import application
from moetier.tools.ray.options import add_application_arguments
from moetier.tools.serve.keys import keys_of
from moetier.tools.serve.options import SERVE_OPTIONS

EXAMPLES = (
    "moetier ray ./mixtral-4bit --ram 64GiB",
    "moetier ray s3://bucket/mixtral-4bit --ram 64GiB --threads 16 --max-replicas 4",
)

PORT = Number(int, 1, 65535)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier ray`."""
    add_application_arguments(parser)
    text = "the {} on which each node listens, if Ray Serve does not run yet"
    host = replace(SERVE_OPTIONS["host"], help=text.format("address"))
    add_options(parser, [host, replace(SERVE_OPTIONS["port"], help=text.format("port"), numbers=PORT)])
    show_first(parser, "--ram", "--threads", "--context", "--max-replicas", "--host", "--port", "--api-key-file")


def run(arguments: argparse.Namespace) -> None:
    """Deploy the model, or replace the one that is deployed, and wait until it is ready. Raises MoetierError."""
    arguments.threads = arguments.threads or usable_cpus()
    built = application(arguments)
    from moetier.tools.ray.deploy import connect, deploy

    keys = keys_of(arguments.api_key_file, arguments.api_keys)
    connect(arguments.threads)
    waited = f"replicas of {plain(arguments.model)} run"
    print(f"ray: waiting until {waited}, which may take minutes ...", file=sys.stderr, flush=True)
    print(f"http://{deploy(built, arguments.host, arguments.port, keys=keys)}/v1")
