"""Options of every command that generates text."""

from __future__ import annotations

import argparse
from typing import Any

from moetier.runtime.config import COUNT
from moetier.runtime.generation.decoding import (
    MIN_P,
    OCCURRENCE_PENALTY,
    ONE_SEQUENCE,
    REPETITION_PENALTY,
    SAMPLING,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    penalties_of,
    sampling_of,
)

from .options import group_of

PREFILL_CHUNK = 1024  # no budget changes it: in what company a token is computed has a part in its last bits


def add_decoding_arguments(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    """Add the options of sampling. Without a temperature the model's generation_config.json decides."""
    group = group_of(parser, "generation")
    group.add_argument(
        "--max-new-tokens",
        type=COUNT,
        default=new_tokens,
        metavar="N",
        help="maximum length of the answer, in tokens (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=TEMPERATURE,
        metavar="T",
        help="sampling temperature; 0 always takes the most likely token (default: from the model's "
        "generation_config.json, else 0)",
    )
    group.add_argument(
        "--top-k",
        type=TOP_K,
        metavar="K",
        help="sample from the K most likely tokens; 0: from all (default of this and the next three: from "
        "generation_config.json)",
    )
    group.add_argument(
        "--top-p",
        type=TOP_P,
        metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P",
    )
    group.add_argument(
        "--min-p",
        type=MIN_P,
        metavar="P",
        help="leave out tokens that are less than P times as likely as the most likely one",
    )
    group.add_argument(
        "--repetition-penalty",
        type=REPETITION_PENALTY,
        metavar="X",
        help="divide the scores of tokens that the prompt or the answer already has; 1 changes nothing",
    )
    for name, times in ("presence", ""), ("frequency", " for each occurrence"):
        group.add_argument(
            f"--{name}-penalty",
            type=OCCURRENCE_PENALTY,
            metavar="X",
            help=f"lower the scores of tokens that the answer already has by X{times}; 0 changes nothing",
        )
    group.add_argument("--seed", type=SEED, default=0, metavar="N", help="seed of the sampling (default: %(default)s)")


def add_prefill_argument(parser: argparse.ArgumentParser) -> None:
    """Add --prefill-chunk."""
    group_of(parser, "generation").add_argument(
        "--prefill-chunk",
        type=COUNT,
        default=PREFILL_CHUNK,
        metavar="N",
        help="tokens of a prompt that are computed together, if the model supports it; each expert is read once for "
        "all of them (default: %(default)s)",
    )


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return keyword arguments of ``generate()``, and PENALTIES, which ``behind`` replaces.

    The seed is not among them: it is for ``torch.manual_seed``.
    """
    asked = {name: value for name in SAMPLING if (value := getattr(arguments, name)) is not None}
    return {**sampling_of(asked), **penalties_of(asked), **ONE_SEQUENCE, "max_new_tokens": arguments.max_new_tokens}
