"""Writes docs/api.md, the reference of Python names: ``python tests/helpers/api_reference.py``."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from moetier.tiers import errors

PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"

HEAD = """# Python reference

    python -c "import moetier; help(moetier.load)"

prints what a name does. This page lists all public names with their signatures; [Python](python.md) shows how they are
used. `python tests/helpers/api_reference.py` writes it, and a test compares it with the code.

Programs use the names in `moetier` itself. The interfaces below it are for replacing a part: another source of records,
another tier. Before version 1.0 they may change with any release ([changes](../CHANGELOG.md)). Type checkers use the
annotations (`py.typed`).

Everything may be used by several threads unless it says otherwise. A forked child must open its own models, tiers and
clients: those of its parent raise `ClosedError` there. Spawn children that use a daemon (`multiprocessing`'s method
`spawn`, or `exec`): gRPC may abort in a forked child of a process that is connected to one.
"""
SECTIONS: dict[str, tuple[str, ...]] = {
    "Plan, convert, pull, load": (
        "moetier.plan", "moetier.convert", "moetier.pull", "moetier.load", "moetier.register",
        "moetier.tools.plan.api.Plan", "moetier.tools.plan.api.PlannedChoice",
        "moetier.tools.convert.conversion.ConversionReport",
    ),
    "Requests and grammars": (
        "moetier.Engine", "moetier.Request", "moetier.Grammar", "moetier.GrammarCompiler", "moetier.GrammarProcessor",
    ),
    "Errors": ("moetier.MoetierError",),
    "A loaded model": (
        "moetier.runtime.model.Tiers", "moetier.tiers.stats.TierStats", "moetier.runtime.wire.address.Credentials",
    ),
    "Ray Serve": ("moetier.ray.app", "moetier.ray.session_ids"),
    "Tiers": (
        "moetier.tiers.source.ExpertSource", "moetier.tiers.source.CopySource", "moetier.tiers.source.Lease",
        "moetier.tiers.layout.ExpertKey", "moetier.tiers.host.HostTier", "moetier.tiers.device.DeviceTier",
        "moetier.tiers.device.HostViews", "moetier.runtime.client.DaemonTier",
    ),
    "Stores and formats": (
        "moetier.tiers.store.Store", "moetier.tiers.store.DirectoryStore", "moetier.tiers.store.WrapperStore",
        "moetier.runtime.stores.registry.open_store", "moetier.tiers.store.ShardStore",
        "moetier.tiers.store.StoreWriter", "moetier.tiers.store.ShardWriter", "moetier.tiers.manifest.Manifest",
        "moetier.tiers.manifest.Block", "moetier.tiers.layout.Projection", "moetier.tiers.layout.RecordLayout",
        "moetier.testing.StoreTests", "moetier.testing.FormatTests",
    ),
}  # fmt: skip
NOTES = {
    "Tiers": "A tier gives records of experts. [The protocol](protocol.md) says what a `DaemonTier` speaks.",
    "Stores and formats": "A host tier reads from a store; `StoreTests` and `FormatTests` check new ones. "
    "[Contributing](../CONTRIBUTING.md#a-new-store) says how to add a store or a format, and [the format](format.md) "
    "what a model directory holds.",
    "Ray Serve": "It needs the extra `ray` ([machines](machines.md#ray-serve)).",
}
NAMES = {path.rpartition(".")[2] for paths in SECTIONS.values() for path in paths}
WHOLE = ("moetier.plan", "moetier.convert", "moetier.pull", "moetier.load", "moetier.register", "moetier.ray.app")
NOT_MADE = ("moetier.runtime.model.Tiers", "moetier.runtime.client.DaemonTier")  # `load` or `open` makes them
WIDTH, LONGEST_DEFAULT = 110, 40


def named(path: str) -> Any:
    """Import what ``path`` names."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def first_line(thing: object) -> str:
    """Return the first sentence of a docstring, as one line of Markdown."""
    text = re.sub(r"\s+", " ", (inspect.getdoc(thing) or "").split("\n\n")[0]).replace("``", "`")
    return re.sub(r"\.( [^.]*:)?$", "", text).replace("|", "\\|")


def _parameter(parameter: inspect.Parameter) -> str:
    """Return a parameter as in the source: ``name: type = default``."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    annotation = getattr(parameter.annotation, "__forward_arg__", parameter.annotation)  # of a named tuple
    typed = "" if annotation is parameter.empty else f": {annotation}"
    default = repr(parameter.default)
    default = "..." if len(default) > LONGEST_DEFAULT or default == "<factory>" else default
    return f"{stars}{parameter.name}{typed}" + (
        "" if parameter.default is parameter.empty else f"{' = ' if typed else '='}{default}"
    )


def signature(thing: Any, name: str) -> str:
    """Return ``name`` with its parameters, one a line if they are many."""
    given = [one for one in inspect.signature(thing).parameters.values() if one.name not in ("self", "cls")]
    kinds = [parameter.kind for parameter in given]
    parameters = [*map(_parameter, given)]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and inspect.Parameter.KEYWORD_ONLY in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = None if inspect.isclass(thing) else getattr(thing, "__annotations__", {}).get("return")
    returns = f" -> {result}" if result not in (None, "None") else ""
    inner = "".join(f"\n    {parameter}," for parameter in parameters)
    line = f"{name}({', '.join(parameters)}){returns}"
    return line if len(line) <= WIDTH else f"{name}({inner}\n){returns}"


def is_method(value: object) -> bool:
    """Return whether a class attribute is a method of some type."""
    return inspect.isfunction(value) or isinstance(value, classmethod | staticmethod)


def members(owner: type) -> list[str]:
    """Return a line for each public method and property of a class."""
    lines = []
    for name, value in vars(owner).items():
        if name.startswith(("_", "test_")) or not (is_method(value) or isinstance(value, property)):
            continue
        shown = name if isinstance(value, property) else " ".join(signature(getattr(owner, name), name).split())
        said = first_line(value.fget if isinstance(value, property) else getattr(owner, name))
        lines.append(f"- `{shown.replace('( ', '(').replace(', )', ')')}`: {said}" if said else f"- `{shown}`")
    return lines


def entry(path: str) -> str:
    """Return the part of the page on one name."""
    thing, name = named(path), path.rpartition(".")[2]
    if inspect.isclass(thing):
        bases = ", ".join(f"`{base.__name__}`" for base in thing.__bases__ if base.__name__ in NAMES)
        is_abstract = inspect.isabstract(thing) or getattr(thing, "_is_protocol", False) or "Tests" in name
        is_made = not (is_abstract or path in NOT_MADE)
        shown = f"class {signature(thing, name) if is_made else name}"
        text = first_line(thing) + (f" (based on {bases})" if bases else "")
    else:
        shown, text = signature(thing, name), first_line(thing)
    parts = [f"### {path}", f"```python\n{shown}\n```", text + ("" if text.endswith(".") else ".")]
    if path in WHOLE:
        rest = (inspect.getdoc(thing) or "").partition("\n\n")[2]
        parts.append(f"```text\n{rest}\n```")
    if inspect.isclass(thing) and (lines := members(thing)):
        parts.append("\n".join(lines))
    if path == "moetier.MoetierError":
        tree = inspect.getdoc(errors) or ""
        parts.append("All errors that are not faults of moetier, in `moetier.tiers.errors`:")
        parts.append(f"```text\n{tree[tree.index('MoetierError') :].rstrip()}\n```")
    return "\n\n".join(parts)


def page() -> str:
    """Return the text of docs/api.md."""
    parts = [HEAD.rstrip()]
    for title, paths in SECTIONS.items():
        parts += [f"## {title}", *([NOTES[title]] if title in NOTES else []), *map(entry, paths)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
