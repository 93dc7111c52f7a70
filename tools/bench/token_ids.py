"""Fixed token ids that are fed to every measured engine."""

from __future__ import annotations

import argparse
import json
import random
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ConfigError
from moetier.tools.synthetic.checkpoint import TOKENS_FILE

SEED = 0


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the tokens to feed."""
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--tokens-file",
        type=Path,
        metavar="FILE",
        help=f"file of token ids to feed, a JSON list (default: DIR/{TOKENS_FILE}, else random ids, always the same)",
    )
    given.add_argument("--prompt-file", type=Path, metavar="FILE", help="file of a text to feed")


def fixed_ids(arguments: argparse.Namespace, *, sequences: int, length: int) -> tuple[list[list[int]], str]:
    """Return token ids [sequences][length], and a text that says where they come from.

    If the source has too few ids, they are repeated. Raises ConfigError if the source can't be read.
    """
    directory, own = arguments.directory, arguments.directory / TOKENS_FILE
    if arguments.prompt_file is not None:
        ids, source = _of_text(directory, arguments.prompt_file), str(arguments.prompt_file)
    elif arguments.tokens_file is not None or own.is_file():
        path = arguments.tokens_file or own
        ids, source = read_ids(path), str(path)
    else:
        chance, vocabulary = random.Random(SEED), _vocabulary(directory)
        ids, source = [chance.randrange(vocabulary) for _ in range(sequences * length)], f"random, seed {SEED}"
    flat = list(islice(cycle(ids), sequences * length))
    return [flat[start : start + length] for start in range(0, len(flat), length)], source


def read_ids(path: Path) -> list[int]:
    """Read token ids from a file with a JSON list, or with an object that has the list as its "token_ids".

    Raises ConfigError if the file can't be read, or has no such list.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} can't be read as JSON ({error}).", "Give --tokens-file a JSON list of token ids."
        ) from error
    if isinstance(value, dict):
        value = value.get("token_ids")
    if not isinstance(value, list) or not value or not all(type(number) is int and number >= 0 for number in value):
        raise ConfigError(f"{path} has no list of token ids.", "Give --tokens-file a JSON list such as [1, 415, 2936].")
    return value


def _of_text(directory: Path, path: Path) -> list[int]:
    from moetier.runtime.checkpoint.containers import container_of

    try:
        if (tokenizer := container_of(directory).tokenizer(directory)) is None:
            raise ValueError("there is no tokenizer")
        ids: list[int] = tokenizer(path.read_text("utf-8")).input_ids
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} can't be tokenised: {error}", "Give --prompt-file a UTF-8 text, and a DIR that has a tokenizer."
        ) from error
    if not ids:
        raise ConfigError(f"The text in {path} gives no tokens.", "Give --prompt-file a file that contains text.")
    return ids


def _vocabulary(directory: Path) -> int:
    from moetier.runtime.checkpoint.model_config import config_of

    config: dict[str, Any] = config_of(directory)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(
            f"config.json in {directory} gives no vocabulary size, so random token ids can't be chosen.",
            "Give token ids with --tokens-file, or a text with --prompt-file.",
        )
    return size
