"""Record which experts a model uses while it continues prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.generation.decoding import behind, chunks_of, encode, warn_if_cut, within_context
from moetier.tiers.errors import ConfigError
from moetier.tools.cli.parser import check_utf8

if TYPE_CHECKING:
    from moetier.runtime.trace.trace import Trace

PROMPT_KEYS = ("prompt", "turns", "text")  # keys of a JSON line that may hold the prompt, or a list that begins with it


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one in each line of text or of .jsonl. Empty lines are skipped.

    Raises ConfigError if the file can't be read, has no prompts, or has a line of JSON without a prompt.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path} can't be read ({why}).", "Name a text file or a .jsonl file.") from error
    filled = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ConfigError(f"{path} has no prompts.", "Write one prompt into each line.")
    is_json = path.suffix == ".jsonl"
    return [_prompt_of(line, f"{path}:{number}") if is_json else line for number, line in filled]


def _prompt_of(line: str, place: str) -> str:
    """Return the prompt of a line of JSON. Raises ConfigError if it has none; ``place`` names the line in the error."""
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON.", "Write one JSON object into each line.") from error
    value = next((parsed[key] for key in PROMPT_KEYS if key in parsed), None) if isinstance(parsed, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{place} has no prompt.", f"Give it as the value of one of {', '.join(PROMPT_KEYS)}.")
    return check_utf8(value, f"The prompt of {place}")  # JSON may contain half of a surrogate pair


def record(model: Any, tokenizer: Any, prompts: list[str], decoding: dict[str, Any], *, look_ahead: int) -> Trace:
    """Generate text from each prompt, and return a trace of the experts that each sequence uses.

    The last new token of a sequence is not recorded, because it is not fed to the model. ``model`` is from ``load``,
    and ``decoding`` from ``decoding_of``. ``look_ahead`` is the number of layers ahead for which the predictions of
    gates are recorded. Raises ConfigError, before anything is recorded, if a prompt has no tokens, or more than fit
    into the model's context.
    """
    from moetier.runtime.trace.recorder import Recorder, pieces_of

    encoded = [encode(model, tokenizer, prompt, f"Prompt {number}") for number, prompt in enumerate(prompts, 1)]
    if nothing := [str(number) for number, inputs in enumerate(encoded, 1) if not inputs["input_ids"].numel()]:
        raise ConfigError(f"There are no tokens in prompt {', '.join(nothing)}.", "Remove such prompts from the file.")
    with Recorder(model, look_ahead=look_ahead) as recorder:
        if recorder.refusals is not None:
            print(f"trace: {recorder.refusals}", file=sys.stderr)
        for number, inputs in enumerate(encoded, 1):
            length = inputs["input_ids"].shape[1]
            limited = within_context(model, length, decoding)
            given = behind(length, limited) | chunks_of(model, length, model.tiers.prefill_chunk)
            token_ids = model.generate(**inputs, **given, use_cache=True)[0, :-1].tolist()
            warn_if_cut(model, length, len(token_ids) + 1 - length, decoding)
            recorder.end_sequence(token_ids, n_prefill=length, pieces=pieces_of(tokenizer, token_ids))
            print(f"trace: {number} of {len(prompts)} prompts", file=sys.stderr)
        manifest = model.tiers.manifest
        return recorder.trace(model=manifest.model, digest=manifest.digest)
