"""Options of decoding, and keyword arguments for ``generate()``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from moetier.runtime.model.context import can_resume, counted, first_ids, longest_context
from moetier.runtime.model.vocabulary import check_ids
from moetier.tiers.errors import BudgetError, ConfigError
from moetier.tiers.options import COUNT, MAX_COUNT, TINY, Number, Option, named

_log = logging.getLogger(__name__)

ONE_SEQUENCE = {  # overrides generation_config.json, because streamed text is one sequence, token by token
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "dola_layers": None,
}

GROUP = "generation"  # title of a group of options
SAMPLING = named(
    temperature=Option(
        None,
        "sampling temperature; 0 always takes the most likely token (default: from the model's generation_config.json, "
        "else 0)",
        group=GROUP,
        metavar="T",
        numbers=Number(float, 0, math.inf, "Give 0 to decode greedily, or a greater number."),
    ),
    top_k=Option(
        None,
        "sample only from the K most likely tokens; 0: from all tokens (default, as for the next three options: from "
        "generation_config.json)",
        group=GROUP,
        metavar="K",
        numbers=Number(int, 0, MAX_COUNT, "Give the number of tokens to choose from, or 0 for all tokens."),
    ),
    top_p=Option(
        None,
        "sample only from the most likely tokens, as many as have a total probability of P",
        group=GROUP,
        metavar="P",
        numbers=Number(float, TINY, 1, "Give a number greater than 0 and at most 1."),
    ),
    min_p=Option(
        None,
        "leave out tokens that are less than P times as likely as the most likely one",
        group=GROUP,
        metavar="P",
        numbers=Number(float, 0, 1, "Give 0 to 1."),
    ),
    repetition_penalty=Option(
        None,
        "divide by X the scores of tokens that are already in the prompt or the answer; 1 changes nothing",
        group=GROUP,
        metavar="X",
        numbers=Number(float, 0.01, 100, "Give 0.01 to 100; 1 changes nothing."),
    ),
    presence_penalty=Option(
        None,
        "lower by X the scores of tokens that are already in the answer; 0 changes nothing",
        group=GROUP,
        metavar="X",
        numbers=Number(float, -2, 2, "Give -2 to 2; 0 changes nothing."),
    ),
    frequency_penalty=Option(
        None,
        "lower by X the scores of tokens that are already in the answer, once for each occurrence; 0 changes nothing",
        group=GROUP,
        metavar="X",
        numbers=Number(float, -2, 2, "Give -2 to 2; 0 changes nothing."),
    ),
)
DECODING = {  # options of commands that generate text
    **named(
        max_new_tokens=Option(
            None, "maximum length of the answer, in tokens", group=GROUP, metavar="N", numbers=COUNT, short="-n"
        )
    ),
    **SAMPLING,
    **named(
        seed=Option(
            0,
            "seed for sampling",
            group=GROUP,
            metavar="N",
            numbers=Number(int, 0, (1 << 64) - 1, "Give a number from 0 to 2^64 - 1."),
        )
    ),
}
NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # samplers, and their values that exclude no token
PENALTIES = ("presence_penalty", "frequency_penalty")  # not in transformers
BIASES = "logit_bias"  # option of a request that is not in transformers either: what is added to scores, by token id
MIN_TEMPERATURE = 1e-5  # a lower one counts as 0, because scores divided by it may overflow


def sampling_of(asked: Mapping[str, float]) -> dict[str, Any]:
    """Return the keyword arguments of ``generate()`` for the sampling options in ``asked``, whose keys are in SAMPLING.

    PENALTIES are ignored here, because transformers has no such arguments; see ``penalties_of``. A temperature of 0
    decodes greedily. A higher temperature turns sampling on, and so does a top_k, top_p or min_p that excludes tokens.
    If ``asked`` has none of these options, the model's generation_config.json decides.
    """
    temperature = asked.get("temperature")
    given: dict[str, Any] = {name: asked[name] for name in ("repetition_penalty",) if name in asked}
    if temperature is not None and temperature < MIN_TEMPERATURE:
        return given | {"do_sample": False}
    given |= {name: asked[name] for name in ("temperature", *NEUTRAL) if name in asked}
    if temperature is not None or any(asked.get(name, neutral) != neutral for name, neutral in NEUTRAL.items()):
        given["do_sample"] = True
    return given


def penalties_of(asked: Mapping[str, float]) -> dict[str, float]:
    """Return a dictionary of those PENALTIES in ``asked`` that are not 0."""
    return {name: asked[name] for name in PENALTIES if asked.get(name)}


def behind(prompt: int, decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options ``decoding`` with logits processors in place of PENALTIES and BIASES, for ``generate()``.

    Penalties count only tokens after the prompt. ``prompt`` is the length of the prompt in tokens.
    """
    presence, frequency = (decoding.get(name, 0.0) for name in PENALTIES)
    biases = decoding.get(BIASES)
    given = {name: value for name, value in decoding.items() if name not in (*PENALTIES, BIASES)}
    if presence or frequency or biases:
        from .penalties import Biases, OccurrencePenalties

        penalties = [OccurrencePenalties(prompt, presence, frequency)] if presence or frequency else []
        given["logits_processor"] = [*penalties, *([Biases(biases)] if biases else [])]
    return given


def chunks_of(model: Any, tokens: int, chunk: int) -> dict[str, Any]:
    """Return arguments that make ``generate()`` compute a prompt of ``tokens`` in chunks of ``chunk`` tokens.

    They are empty if the prompt is no longer than a chunk, or if the model can't resume in the middle of a prompt. Then
    ``longest_prompt`` limits the prompt.
    """
    return {"prefill_chunk_size": chunk} if tokens > chunk and can_resume(model) else {}


def longest_prompt(model: Any) -> int | None:
    """Return for how many tokens of a prompt memory has room; None if a prompt of any length can be divided.

    A model without tiers has no limit.
    """
    tiers = getattr(model, "tiers", None)
    return None if tiers is None or tiers.prefill.resumes else tiers.prefill_chunk


def encode(model: Any, tokenizer: Any, prompt: str, name: str = "The prompt") -> dict[str, Any]:
    """Return a dictionary of the input_ids and the attention_mask of one prompt, [1, tokens] each.

    ``name`` is the prompt's name in errors. Raises ConfigError if the prompt leaves no room for an answer in the
    model's context, or has a token for which the model has no embedding. Raises BudgetError if the model computes all
    of a prompt together, and memory has no room for that.
    """
    import torch

    most = longest_context(model.config)
    ids = first_ids(tokenizer, prompt, most)
    if most is not None and len(ids) >= most:
        raise ConfigError(
            f"{name} has {counted(len(ids), most)} tokens, and the model's maximum context is {most:,}, prompt and "
            "answer together.",
            "Shorten it, or use a model with a longer context.",
        )
    longest = longest_prompt(model)
    if longest is not None and len(ids) > longest:
        raise BudgetError(
            f"{name} has {len(ids):,} tokens, which this model can only compute together. Memory has room for "
            f"{longest:,}.",
            "Shorten it, free some memory, give experts less of it with `ram`, or reserve more with `prefill_chunk`.",
        )
    check_ids(model, tokenizer, ids, name)
    given = torch.tensor([ids], dtype=torch.int64, device=model.device)
    return {"input_ids": given, "attention_mask": torch.ones_like(given)}


def within_context(model: Any, tokens: int, decoding: dict[str, Any]) -> dict[str, Any]:
    """Return ``decoding`` with max_new_tokens limited to what a prompt of ``tokens`` leaves of the model's context."""
    most = longest_context(model.config)
    if most is None or tokens + decoding["max_new_tokens"] <= most:
        return decoding
    return decoding | {"max_new_tokens": most - tokens}


def warn_if_cut(model: Any, tokens: int, new_tokens: int, decoding: dict[str, Any]) -> None:
    """Warn if the limit of ``within_context`` has ended a generation.

    Args:
        model: the model that generated.
        tokens: length of the prompt.
        new_tokens: number of generated tokens.
        decoding: the options before ``within_context`` limited them.
    """
    most = longest_context(model.config)
    if tokens + new_tokens == most and new_tokens < decoding["max_new_tokens"]:
        _log.warning(
            "The text ends at the model's maximum context of %s tokens, prompt and answer together.", f"{most:,}"
        )
