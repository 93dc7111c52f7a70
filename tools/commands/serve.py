"""``moetier serve DIR``: serve a model over HTTP, with OpenAI's API."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from moetier.runtime import pulled as models
from moetier.runtime.config import COUNT, MOST, Number
from moetier.runtime.context import longest_context
from moetier.tiers.errors import ConfigError
from moetier.tools.cli.arguments import (
    add_prefill_argument,
    add_resource_arguments,
    add_speculation_arguments,
    resources_of,
)
from moetier.tools.cli.loading import loaded
from moetier.tools.cli.parser import DIRECTORY, directory, show_first

EXAMPLES = (
    "moetier serve ./mixtral-4bit --ram 6GiB --port 8080",
    "moetier serve Qwen/Qwen3-30B-A3B:4bit --host 0.0.0.0 --api-key-file key --parallel 4",
)

KEY = "MOETIER_API_KEY"
PORT = Number(int, 0, 65535, "Give 1 to 65535, or 0 for any free port.")
QUEUE = Number(int, 0, MOST, "Give 0 or more; with 0, a request that can't be computed at once is refused.")
SPARE_CONNECTIONS = 128  # connections for health checks, metrics, and clients between two requests
NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier serve`."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="the address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=PORT,
        default=8000,
        metavar="PORT",
        help="the port to listen on; 0: any free port (default: %(default)s)",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="name of the model in requests (default: the folder's, or the pulled model's)"
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds, in one line, the key that requests must send (default: the key in ${KEY}). Without a "
        "key, the server answers only programs on this machine",
    )
    parser.add_argument(
        "--parallel",
        type=COUNT,
        default=1,
        metavar="N",
        help="number of requests to compute together, so that they share loaded experts; each needs memory for its "
        "own context (default: %(default)s)",
    )
    parser.add_argument(
        "--queue",
        type=QUEUE,
        default=64,
        metavar="N",
        help="number of requests that may wait; further ones are refused with status 429 (default: %(default)s)",
    )
    add_prefill_argument(parser)
    add_speculation_arguments(parser)
    add_resource_arguments(
        parser, context="maximum length of a prompt with its answer, in tokens; memory is reserved for it"
    )
    show_first(parser, "--ram", "--context", "--host", "--port", "--api-key-file", "--parallel")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then return 0. Raises MoetierError."""
    resources = resources_of(arguments, context=arguments.context * arguments.parallel)
    name = models.name_of(arguments.directory) if arguments.name is None else arguments.name
    if not name or not name.isprintable():
        raise ConfigError(f"{name!r} can't be the name of a model.", "Give a printable name: --name NAME.")
    key = _key(arguments.api_key_file)
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise ConfigError(
            f"moetier serve needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            'In the repository of moetier, run: pip install ".[serve]"',
        )
    from moetier.tools.serve.listen import Server, bind, is_loopback, url_of

    with bind(arguments.host, arguments.port) as bound:
        if key is None and not is_loopback(bound):
            raise ConfigError(
                f"Other machines can reach {arguments.host}, and there is no API key.",
                f"Give --api-key-file, or set {KEY} (make a key: openssl rand -hex 32); or leave out --host.",
            )
        with loaded(arguments.directory, resources, sequences=arguments.parallel) as (model, tokenizer, _):
            import transformers

            transformers.utils.logging.set_verbosity_error()  # otherwise transformers warns at each request

            from moetier.tools.serve.app import application
            from moetier.tools.serve.batched import Together
            from moetier.tools.serve.sequential import OneByOne

            if not hasattr(tokenizer, "_tokenizer"):
                raise ConfigError(
                    f"The model's tokenizer ({type(tokenizer).__name__}) can't decode text piece by piece.",
                    "Add a tokenizer.json to the model directory.",
                )
            context = min(arguments.context, longest_context(model.config) or arguments.context)
            parts = model, tokenizer, context, arguments.prefill_chunk
            engine = OneByOne(*parts) if arguments.parallel == 1 else Together(*parts, arguments.parallel)
            most = arguments.parallel + arguments.queue
            try:
                Server(
                    application(name, engine, key, most),
                    connections=most + SPARE_CONNECTIONS,
                    ready=lambda: print(
                        f"{name}, experts of {model.tiers.where}, a context of {context:,} tokens: {url_of(bound)}/v1",
                        flush=True,
                    ),
                    ending=engine.cut,
                ).serve_until_told(bound)
            finally:
                engine.stop()
    return 0


def _key(file: Path | None) -> str | None:
    """Return the API key from ``file`` or else from the environment, or None if there is none.

    Raises ConfigError if the key can't be read, or is not one word.
    """
    from moetier.runtime.wire.channel import read_token

    if file is not None:
        return read_token(file, "API key")
    key = os.environ.get(KEY)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{KEY} is not one word of printable ASCII characters.", "Make a key: openssl rand -hex 32")
    return key or None
