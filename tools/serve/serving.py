"""A model that is loaded to be served: its engine, and the ASGI application that answers requests with it."""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.tiers.errors import ConfigError
from moetier.tools.cli.loading import loaded

from .options import disk_of

if TYPE_CHECKING:  # transformers is imported by ``loaded``, which takes less time and memory
    from .answers import AnswerService
    from .keys import Keys
    from .middleware import App


@contextlib.contextmanager
def serving(
    directory: Path, resources: dict[str, Any], arguments: argparse.Namespace, *, name: str, keys: Keys | None
) -> Iterator[tuple[App, AnswerService]]:
    """Load a model, and yield the application that serves it with its answers. Stop computing after the block.

    Args:
        directory: the model directory.
        resources: keyword arguments of ``load``.
        arguments: the options of ``add_serving_arguments``.
        name: name of the model in requests.
        keys: API keys, of which requests must send one; None: they need no key.

    Raises MoetierError if the model can't be loaded, or its tokenizer can't decode text piece by piece.
    """
    with loaded(directory, resources) as (model, tokenizer, _):
        import transformers

        transformers.utils.logging.set_verbosity_error()  # otherwise transformers warns at each request

        from moetier.runtime.engine.engine import Engine

        from .answers import AnswerService
        from .app import application

        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ConfigError(
                f"The model's tokenizer ({type(tokenizer).__name__}) can't decode text piece by piece.",
                "Add a tokenizer.json to the model directory.",
            )
        roots = {key.name: key.digest for key in keys or ()}
        with Engine.of(model, max_sequences=arguments.parallel, disk=disk_of(arguments), keys=roots) as engine:
            service = AnswerService(model, tokenizer, engine, keys)
            try:
                gc.collect()
                gc.freeze()  # collections stop all threads: from now on they visit only what requests have made
                most = arguments.parallel + arguments.queue
                yield application(name, service, keys, most, leave_out=arguments.leave_out), service
            finally:
                gc.unfreeze()
