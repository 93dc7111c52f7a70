"""A replica of the application: a process that loads the model and answers requests as `moetier serve` does."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from moetier.runtime.config import Size
from moetier.runtime.pulled import directory_at, is_address, model_directory
from moetier.tools.serve.middleware import App
from moetier.tools.serve.options import api_key, served_name
from moetier.tools.serve.serving import serving

from .node import hold_daemon
from .options import daemon_words, replica_resources


class Replica:
    """Class of the deployment. Its experts are those in the memory of its node's daemon."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Start the node's daemon if it does not run yet, and load the model. ``options`` are those of ``parsed``."""
        arguments = argparse.Namespace(**options)
        memory = None if arguments.ram is None else Size.parse(arguments.ram).bytes
        folder = hold_daemon(daemon_words(arguments), memory)
        directory = (
            directory_at(arguments.model, arguments.store_cache, arguments.store_cache_size)
            if is_address(arguments.model)
            else model_directory(arguments.model)
        )
        self._closing = contextlib.ExitStack()
        self._app, self._engine = self._closing.enter_context(
            serving(
                directory,
                replica_resources(arguments, folder),
                arguments,
                name=served_name(directory, arguments.name),
                key=api_key(arguments.api_key_file),
            )
        )

    def __serve_build_asgi_app__(self) -> App:
        """Return the application of `moetier serve`. Ray calls this once."""
        return self._app

    def check_health(self) -> None:
        """Raise RuntimeError if the replica can't compute answers any more. Ray then replaces the replica."""
        if not self._engine.is_alive:
            raise RuntimeError("The thread that computes answers has failed.")
