"""How text is generated: options of every command that does so."""

from __future__ import annotations

import argparse
from typing import Any

from moetier.tiers.errors import ConfigError

ONE_SEQUENCE = {  # whatever generation_config.json prefers: text that streams is one sequence, token by token
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "dola_layers": None,
}

PREFILL_CHUNK = 1024  # no budget changes it: in what company a token is computed has a part in its last bits


def add_decoding_arguments(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=new_tokens, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 decodes greedily (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``generate()``, checked; the seed is for ``torch.manual_seed``. Raises ConfigError."""
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}.", "Give 1 or more.")
    if not 0 <= arguments.temperature < float("inf"):
        raise ConfigError(f"--temperature is {arguments.temperature}.", "Give 0, to decode greedily, or more.")
    if not 0 <= arguments.seed < 1 << 64:
        raise ConfigError(f"--seed is {arguments.seed}.", "Give a number from 0 to 2^64 - 1.")
    sampling = {"temperature": arguments.temperature} if arguments.temperature else {}
    return {
        "do_sample": bool(arguments.temperature),
        **sampling,
        **ONE_SEQUENCE,
        "max_new_tokens": arguments.max_new_tokens,
    }


def chunks_of(model: Any, tokens: int, chunk: int) -> dict[str, Any]:
    """What ``generate()`` is told beside, where a prompt of so many ``tokens`` is to be computed in chunks. Only models
    all of whose layers keep keys and values go on in the middle of a prompt: not all others take up their state."""
    if tokens <= chunk or not model._supports_default_dynamic_cache() or model.generation_config.use_cache is False:
        return {}
    from transformers import DynamicCache

    plain = {"DynamicLayer", "DynamicSlidingWindowLayer"}
    config = model.config.get_text_config()
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if not layers or layers - plain or rope == "longrope":  # its angles depend on the chunk's length
        return {}
    return {"prefill_chunk_size": chunk}


def encode(tokenizer: Any, prompt: str, device: Any) -> dict[str, Any]:
    """What ``generate()`` is given of one prompt: input_ids and attention_mask [1, T], no token types."""
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
