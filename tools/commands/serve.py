"""``moetier serve DIR ...``: serve models over HTTP, with OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import AUTO
from moetier.runtime.libraries.lean import lean_imports
from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tiers.text import format_bytes, some
from moetier.tools.cli.arguments import add_resource_arguments, resources_of
from moetier.tools.cli.parser import DIRECTORY, add_model_argument, show_first
from moetier.tools.cli.settings import API_KEY_VARIABLE
from moetier.tools.serve.catalogue import Catalogue
from moetier.tools.serve.keys import keys_of
from moetier.tools.serve.options import DAY, ServeConfig, add_serving_arguments, alias, check_packages

if TYPE_CHECKING:
    from moetier.runtime.engine.pages.saved_pages import SavedPages, Traffic
    from moetier.runtime.model.kv_budget import KVBudget
    from moetier.tools.serve.models import Models

EXAMPLES = (
    "moetier serve ./mixtral-4bit --ram 6GiB --port 8080",
    "moetier serve Qwen/Qwen3-30B-A3B:4bit --host 0.0.0.0 --api-key-file key --parallel 4",
    "moetier serve ./mixtral-4bit ./qwen3-4bit --keep-alive 30m --alias gpt-4o=qwen3-4bit",
)

TOLD = 8_000  # tokens of a prompt for which the line at the start says what --kv-cache-dir reads
OTHER_SECONDS = 2.0  # longest wait for the answer of another server at the port
SPARE_CONNECTIONS = 128  # connections for health checks, metrics, and clients between two requests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier serve`."""
    add_model_argument(
        parser,
        several=f"{DIRECTORY}. Several models, or a folder of models, are loaded when requests name them, as many at a "
        "time as memory has room for",
    )
    parser.add_argument(
        "--alias",
        type=alias,
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="another name of a model in requests; give it several times for several (default: none)",
    )
    add_serving_arguments(parser)
    add_resource_arguments(
        parser,
        context="maximum length of a prompt with its answer, in tokens (default: what fits into --kv-cache, at "
        "most the model's own length)",
    )
    show_first(parser, "--ram", "--kv-cache", "--context", "--host", "--port", "--api-key-file", "--parallel")


def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT. Raises MoetierError."""
    config = ServeConfig.of(vars(arguments))
    resources = resources_of(arguments, sequences=config.parallel)
    catalogue = Catalogue(arguments.directories, name=config.name, aliases=dict(arguments.alias))
    keys = keys_of(config.api_key_file, config.api_keys)
    check_packages("moetier serve")
    from moetier.tools.serve.listen import Server, is_loopback, is_wildcard, url_of

    with bound_socket(config.host, config.port) as bound:
        if keys is None and not is_loopback(bound):
            raise ConfigError(
                f"Other machines can reach {config.host}, and there is no API key.",
                f"Give --api-key-file, or set {API_KEY_VARIABLE} (make a key: openssl rand -hex 32); --api-keys if "
                "there are several users; or leave out --host.",
            )
        from moetier.tools.serve.models import Models
        from moetier.tools.serve.serving import ModelLoader

        with Models(catalogue, ModelLoader(resources, config, keys), keep_alive=config.keep_alive) as models:
            names, notes = first_lines(models, config.parallel, shares=arguments.daemon == AUTO)
            if is_wildcard(bound) and socket.gethostname() != "localhost":
                notes.insert(0, f"for other machines: {url_of(bound, socket.gethostname())}/v1")
            with lean_imports():
                from moetier.tools.serve.app import application
            Server(
                application(models, keys, config.most_requests),
                connections=config.most_requests + SPARE_CONNECTIONS,
                ready=lambda: print("\n  ".join([f"{names}: {url_of(bound)}/v1", *notes]), flush=True),
                ending=models.cut,
            ).serve_until_told(bound)
        if config.kv_cache_dir is not None and models.traffic is not None:  # all models are unloaded now
            print(traffic_line(config.kv_cache_dir, models.traffic), flush=True)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket, as ``bind`` does. The error names the models of another server that answers there."""
    from moetier.tools.launch.server import models_of
    from moetier.tools.serve.listen import bind

    try:
        return bind(host, port)
    except ConfigError as error:
        if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE):
            raise
        models: list[dict[str, Any]] = []
        with contextlib.suppress(MoetierError):
            models = models_of(f"http://{f'[{host}]' if ':' in host else host}:{port}", None, OTHER_SECONDS)
        names = [model["id"] for model in models if model.get("owned_by") == "moetier"]
        if not names:
            raise
        raise ConfigError(
            f"{error.cause.removesuffix('.')}. Another server of moetier answers there, with {some(names)}.", error.fix
        ) from None


def first_lines(models: Models, parallel: int, *, shares: bool) -> tuple[str, list[str]]:
    """Return the names of the models, and lines to print below them. A single model is loaded for that.

    ``parallel``: most requests that are computed together; ``shares``: whether a daemon would be used if there was one.
    """
    names = ", ".join(models.catalogue.models())
    if not models.catalogue.has_one:
        return names, ["each of these models is loaded when a request names it"]
    from moetier.runtime.model.same_bits import bits_of, varying_part_here

    with models.load_only() as served:
        service = served.service
        tiers, bits = service.model.tiers, bits_of(varying_part_here(service.model))
        context = f"{tiers.describe_context(service.context)}; at most {parallel} requests are computed together"
        held = f"the experts are held by {tiers.where}"
        if tiers.origin.daemon is not None:
            host = tiers.host.stats()
            held += f", with room for {host.slots} of {tiers.manifest.record_count}, as its --ram says (with "
            held += "--daemon none, this process would hold them)"
        elif shares:
            held += "; to share them with other processes, start a daemon first"
        return names, [context, held, bits, disk_line(service.disk, tiers.kv, service.context)]


def disk_line(disk: SavedPages | None, kv: KVBudget, context: int) -> str:
    """Return how long keys and values are kept, and how to keep them longer. ``context``: most tokens of a sequence."""
    if disk is not None:
        options = disk.options
        days = options.seconds / DAY
        return f"keys and values are kept in {options.folder}: at most {format_bytes(options.size)}, for {days:g} days"
    text = "keys and values are kept in memory only; with --kv-cache-dir FOLDER, on disk too: prompts that begin alike"
    from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

    tokens = min(TOLD, context)
    if not kv.page_bytes:
        return text
    nbytes = format_bytes(tokens // PAGE_TOKENS * kv.page_bytes)
    return f"{text} are then read after a restart ({nbytes} for {tokens:,} tokens), and not computed again"


def traffic_line(folder: Path, traffic: Traffic) -> str:
    """Return what was read and written of keys and values in ``folder``."""
    read, written = format_bytes(traffic.read_bytes), format_bytes(traffic.written_bytes)
    return f"keys and values: {written} written to {folder}, {read} read from there"
