"""A model that is loaded to be served: its engine, its answers and its prompts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.tiers.errors import ConfigError
from moetier.tools.cli.loading import loaded

from .options import ServeConfig

if TYPE_CHECKING:  # transformers is imported by ``loaded``, which takes less time and memory
    from .answers import AnswerService
    from .keys import Keys
    from .metrics import Tally
    from .prompts import Prompts


@dataclass(frozen=True, slots=True)
class Served:
    """What answers requests for one model.

    Attributes:
        service: submits jobs to the model's engine.
        prompts: makes jobs of what requests ask for.
        reserved: bytes of host memory that the model takes.
    """

    service: AnswerService
    prompts: Prompts
    reserved: int = 0


class ModelLoader:
    """Loads models with the options of a server."""

    def __init__(self, resources: Mapping[str, Any], config: ServeConfig, keys: Keys | None) -> None:
        """Keep the options.

        Args:
            resources: keyword arguments of ``load``.
            config: the options of the server.
            keys: API keys, of which requests must send one; None: they need no key.
        """
        self.resources = resources
        self.keys = keys
        self._config = config

    @contextlib.contextmanager
    def loaded(self, directory: Path, tally: Tally, options: Mapping[str, Any]) -> Iterator[Served]:
        """Load a model, and yield what answers requests for it. Stop computing after the block.

        ``tally`` counts its requests. ``options`` replace some of the keyword arguments of ``load``.

        Raises MoetierError if the model can't be loaded, or its tokenizer can't decode text piece by piece.
        """
        config = self._config
        with loaded(directory, {**self.resources, **options}) as (model, tokenizer, _):
            import transformers

            transformers.utils.logging.set_verbosity_error()  # otherwise transformers warns at each request

            from moetier.runtime.engine.engine import Engine

            from .answers import AnswerService
            from .prompts import Prompts
            from .reservation import reserved_bytes

            if not hasattr(tokenizer, "backend_tokenizer"):
                raise ConfigError(
                    f"The model's tokenizer ({type(tokenizer).__name__}) can't decode text piece by piece.",
                    "Add a tokenizer.json to the model directory.",
                )
            roots = {key.name: key.digest for key in self.keys or ()}
            with Engine.of(model, max_sequences=config.parallel, disk=config.open_disk(), keys=roots) as engine:
                service = AnswerService(model, tokenizer, engine, tally)
                prompts = Prompts(
                    model,
                    tokenizer,
                    context=service.context,
                    max_scored=service.max_scored,
                    leave_out=config.leave_out,
                )
                gc.collect()
                gc.freeze()  # collections stop all threads: from now on they visit only what requests have made
                try:
                    yield Served(service, prompts, reserved_bytes(model))
                finally:
                    gc.unfreeze()
