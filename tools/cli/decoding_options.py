"""Options of every command that generates text."""

from __future__ import annotations

import argparse
from typing import Any

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
from moetier.runtime.number import COUNT

from .options import group_of

PREFILL_CHUNK = 1024  # no budget changes it: in what company a token is computed has a part in its last bits


def add_decoding_arguments(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    """Who gives no temperature samples as the model's generation_config.json says."""
    group = group_of(parser, "generation")
    group.add_argument(
        "--max-new-tokens",
        type=COUNT,
        default=new_tokens,
        metavar="N",
        help="of an answer, at most (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=TEMPERATURE,
        metavar="T",
        help="0 decodes greedily (default: as the model's generation_config.json says, else greedily)",
    )
    group.add_argument(
        "--top-k",
        type=TOP_K,
        metavar="K",
        help="sample among the K most likely tokens; 0: among all (default of this and the next three: as "
        "generation_config.json says)",
    )
    group.add_argument(
        "--top-p",
        type=TOP_P,
        metavar="P",
        help="sample among the most likely tokens that together have this probability",
    )
    group.add_argument(
        "--min-p",
        type=MIN_P,
        metavar="P",
        help="leave out tokens with less than this part of the most likely one's probability",
    )
    group.add_argument(
        "--repetition-penalty",
        type=REPETITION_PENALTY,
        metavar="X",
        help="divide the scores of tokens of the prompt and the answer; 1 changes nothing",
    )
    for name, times in ("presence", ""), ("frequency", " for each time that it has them"):
        group.add_argument(
            f"--{name}-penalty",
            type=OCCURRENCE_PENALTY,
            metavar="X",
            help=f"lower the scores of tokens that the answer has by X{times}; 0 changes nothing",
        )
    group.add_argument("--seed", type=SEED, default=0, help="of the sampling (default: %(default)s)")


def add_prefill_argument(parser: argparse.ArgumentParser) -> None:
    group_of(parser, "generation").add_argument(
        "--prefill-chunk",
        type=COUNT,
        default=PREFILL_CHUNK,
        metavar="N",
        help="tokens of a prompt that are computed together, where the model can go on in the middle of one: each "
        "expert is read once for all of them (default: %(default)s)",
    )


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return keyword arguments of ``generate()``, and PENALTIES, which ``behind`` replaces.

    The seed is not among them: it is for ``torch.manual_seed``.
    """
    asked = {name: value for name in SAMPLING if (value := getattr(arguments, name)) is not None}
    return {**sampling_of(asked), **penalties_of(asked), **ONE_SEQUENCE, "max_new_tokens": arguments.max_new_tokens}
