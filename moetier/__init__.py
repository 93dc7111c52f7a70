"""Run Mixture-of-Experts language models on machines that are too small for them.

The public names are imported when they are first used, so that ``import moetier`` costs no torch:

    plan(SRC), convert(SRC, DST), pull(ID)             -> frozen reports
    load(DIR, ram=..., device_memory=..., device=...)  -> (model, tokenizer), also as a context manager
    Engine.of(model, max_sequences=...)                computes several requests at a time: Request(ids, max_new_tokens)
    Request.of(tokenizer, text, ..., schema=...)       an answer by a schema: a model of pydantic, or a dictionary
    GrammarCompiler(tokenizer).compile(Grammar...)     what an answer may be: a regular expression, Lark
    register(ram=..., exact=..., daemon=...)           afterwards plain from_pretrained(DIR) works

The subpackages in this folder are links to the folders proto, tiers, runtime and tools beside it, where the code is:
so a clone can be imported as it is. A wheel has the code itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .runtime.libraries.torch_variables import set_variables
from .tiers.exports import exports

if TYPE_CHECKING:
    __version__: str
    from .runtime.engine.constraint import GrammarProcessor as GrammarProcessor
    from .runtime.engine.engine import Engine as Engine
    from .runtime.engine.grammar import Grammar as Grammar
    from .runtime.engine.grammar import GrammarCompiler as GrammarCompiler
    from .runtime.engine.sequence import Request as Request
    from .runtime.model.load import load as load
    from .runtime.model.register import register as register
    from .tiers.errors import MoetierError as MoetierError
    from .tools.convert.api import convert as convert
    from .tools.convert.api import pull as pull
    from .tools.plan.api import plan as plan

set_variables()  # before anything imports torch

_exported = exports(
    __name__,
    {
        "Engine": "runtime.engine.engine",
        "Grammar": "runtime.engine.grammar",
        "GrammarCompiler": "runtime.engine.grammar",
        "GrammarProcessor": "runtime.engine.constraint",
        "MoetierError": "tiers.errors",
        "Request": "runtime.engine.sequence",
        "convert": "tools.convert.api",
        "load": "runtime.model.load",
        "plan": "tools.plan.api",
        "pull": "tools.convert.api",
        "register": "runtime.model.register",
    },
)

__all__ = [
    "Engine",
    "Grammar",
    "GrammarCompiler",
    "GrammarProcessor",
    "MoetierError",
    "Request",
    "__version__",
    "convert",
    "load",
    "plan",
    "pull",
    "register",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("moetier")
    return _exported(name)


def __dir__() -> list[str]:
    return sorted(__all__)
