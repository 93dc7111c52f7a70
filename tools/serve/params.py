"""What a request wants of generation, and what both ways of generating share."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from moetier.runtime.context import counted
from moetier.tiers.errors import MoetierError

from .serve_refusal import Refusal

FAILED = "The answer failed; the server's log says why."
ENDING = "The server is ending."

_log = logging.getLogger(__name__)


@dataclass
class Wanted:
    """In the place of the GenerationConfig that transformers' handlers pass on, of which they read one number."""

    config: GenerationConfig
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    param: str = "prompt"  # the field of the request that it is in
    asked: dict[str, float] = field(default_factory=dict)  # of SAMPLING, what the request itself says

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of the answer."""
        found: int = self.config.max_new_tokens
        return found

    def fit(self, prompt: int, context: int, longest: int | None) -> None:
        """End the answer where a context of so many tokens ends. Raises Refusal for a prompt that does not fit.

        ``prompt`` is the length of what ``first_ids`` gave, ``longest`` the model's own maximum context.
        """
        if not prompt:
            raise Refusal(400, f"{self.param}: there is not one token in it.", param=self.param)
        if prompt >= context:
            whose = "the model's maximum context" if context == longest else "the context of this server (--context)"
            raise Refusal(
                400,
                f"The prompt has {counted(prompt, context)} tokens, and {whose} is {context:,}, prompt and answer "
                "together.",
                param=self.param,
                code="context_length_exceeded",
            )
        self.config.max_new_tokens = min(self.max_new_tokens, context - prompt)


def log_answer(prompt: int, kept: int | None, new: int, *, cancelled: bool) -> None:
    """In tokens; ``kept`` of the prompt's were not computed anew."""
    known = "" if kept is None else f" ({kept} kept)"
    _log.info("%s: prompt %d%s, new %d", "cancelled" if cancelled else "answered", prompt, known, new)


def log_failure(what: str, error: BaseException | None) -> None:
    """What other libraries say may quote a prompt: of their errors the kind is logged."""
    said = f": {error.cause}" if isinstance(error, MoetierError) else ""
    debug = error if os.environ.get("MOETIER_DEBUG") == "1" else None
    _log.error("%s failed with %s%s", what, type(error).__name__, said, exc_info=debug)


def ids_of(inputs: Any) -> list[int]:
    """Of one prompt, as transformers' handlers have it: a list, or a tensor [1, T]."""
    ids = inputs["input_ids"]
    found: list[int] = ids if isinstance(ids, list) else ids[0].tolist()
    return found
