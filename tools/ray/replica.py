"""A replica of the application: a process that loads the model and answers requests as `moetier serve` does."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from moetier.runtime.model.names import directory_at, is_address, model_directory
from moetier.tools.serve.catalogue import Catalogue
from moetier.tools.serve.keys import keys_of
from moetier.tools.serve.middleware import App
from moetier.tools.serve.models import Models
from moetier.tools.serve.options import ServeConfig
from moetier.tools.serve.serving import ModelLoader

from .daemon_actor import hold_daemon
from .options import daemon_words, replica_resources
from .supervisor import daemon_bytes


class Replica:
    """Class of the deployment. Its experts are those in the memory of its node's daemon."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Start the node's daemon if it does not run yet, and load the model. ``options`` are those of ``parsed``."""
        arguments = argparse.Namespace(**options)
        directory = (
            directory_at(arguments.model, arguments.store_cache, arguments.store_cache_size)
            if is_address(arguments.model)
            else model_directory(arguments.model)
        )
        folder = hold_daemon(daemon_words(arguments), partial(daemon_bytes, directory, arguments.ram))
        config = ServeConfig.of(options)
        keys = keys_of(config.api_key_file, config.api_keys)
        loader = ModelLoader(replica_resources(arguments, folder), config, keys)
        self._models = Models(Catalogue([directory], name=config.name), loader)
        with self._models.load_only():
            from moetier.tools.serve.app import application  # imports transformers, as the load does in less time

            self._app = application(self._models, keys, config.most_requests)

    def __serve_build_asgi_app__(self) -> App:
        """Return the application of `moetier serve`. Ray calls this once."""
        return self._app

    def check_health(self) -> None:
        """Raise RuntimeError if the replica can't compute answers any more. Ray then replaces the replica."""
        if not self._models.is_alive:
            raise RuntimeError("The thread that computes answers has failed.")
