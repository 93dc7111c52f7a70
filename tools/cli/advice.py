"""Advice about commands and options that do not exist: what was probably meant, also by those who know llama.cpp."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence

OF_LLAMA_CPP = {  # options of llama.cpp -> attributes of the arguments that stand for them here
    "-p": "prompt",
    "--n-predict": "max_new_tokens",
    "--predict": "max_new_tokens",
    "--ctx-size": "context",
    "-s": "seed",
    "-ngl": "device_memory",
    "--gpu-layers": "device_memory",
    "--n-gpu-layers": "device_memory",
}


def name_of(action: argparse.Action) -> str:
    """Return the name of an argument, as messages write it."""
    return "/".join(action.option_strings) or str(action.metavar or action.dest.upper())


def nearest(word: str, names: Iterable[str]) -> str:
    """Return a question that suggests the word of ``names`` nearest to ``word``, or "" if none is near."""
    matches = difflib.get_close_matches(word, list(names), n=1)
    return f"Did you mean {matches[0]}? " if matches else ""


def option_advice(name: str, actions: Sequence[argparse.Action]) -> str:
    """Return advice about the option ``name``, which a command with the arguments ``actions`` does not have."""
    dest = OF_LLAMA_CPP.get(name, name.removeprefix("--"))
    argument = next((action for action in actions if action.dest == dest), None)
    if argument is None:
        return nearest(name, [word for action in actions for word in action.option_strings if word.startswith("--")])
    return f"Give {name_of(argument)}" + (". " if argument.option_strings else f" without {name}. ")
