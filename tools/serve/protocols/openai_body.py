"""Fields that chat completions and text completions have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from .body import MOST_TOKENS, Body, NotEmpty, as_list


class OpenAIBody(Body):
    """Body of a chat or text completion request."""

    # every stream ends with the usage, for any stream_options
    ignored: ClassVar = (
        "user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier", "stream_options",
    )  # fmt: skip
    neutral: ClassVar[dict[str, Any]] = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "logprobs": False,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "top_logprobs": 0,
        "verbosity": "medium",
        "min_tokens": 0,
        "ignore_eos": False,
        "use_beam_search": False,
    }
    unsupported: ClassVar = frozenset({  # of OpenAI's API and of other servers
        "audio", "function_call", "functions", "prediction", "suffix", "web_search_options", "generation_config",
        "add_generation_prompt", "chat_template", "continue_final_message", "documents", "enable_thinking",
        "reasoning", "thinking", "allowed_token_ids", "bad_words", "stop_token_ids", "skip_special_tokens",
        "include_stop_str_in_output", "format", "grammar", "guided_choice", "guided_grammar", "guided_json",
        "guided_regex", "json_schema", "regex", "ebnf", "structured_outputs", "length_penalty", "mirostat",
        "repeat_penalty", "tfs_z", "top_a", "top_n_sigma", "typical_p", "xtc_probability", "dry_multiplier",
        "dynatemp_range", "samplers", "n_predict", "num_predict", "num_ctx", "options", "n_probs", "prompt_logprobs",
        "truncate_prompt_tokens", "lora",
    })  # fmt: skip

    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    stop: Annotated[list[NotEmpty], Field(max_length=4), BeforeValidator(as_list)] | None = None
