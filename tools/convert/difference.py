"""In what a conversion that is there differs from one that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

METHODS = {"hqq": "HQQ", "rounding": "plain rounding (--fast)"}


def _experts(key: str) -> Callable[[Mapping[str, Any]], str]:
    """One value, as a rule; of several all of them."""

    def read(manifest: Mapping[str, Any]) -> str:
        layouts = manifest["layouts"].values()
        return " and ".join(sorted({str(each[key]) for layout in layouts for each in layout["projections"]}))

    return read


def _trunk_bits(manifest: Mapping[str, Any]) -> str:
    records = manifest.get("trunk_records")
    return str(records["bits"]) if records else "16"


def _method(manifest: Mapping[str, Any]) -> str:
    return METHODS.get(manifest["method"], str(manifest["method"]))


# the fields of a manifest that an option has a part in, the option for people, and where its value is
OPTIONS: tuple[tuple[set[str], str, Callable[[Mapping[str, Any]], str]], ...] = (
    ({"layouts"}, "experts of {} bits", _experts("bits")),
    ({"layouts"}, "experts in groups of {}", _experts("group")),
    ({"layouts"}, "scales of experts in {}", _experts("pairs")),
    ({"trunk_records", "requires"}, "a trunk of {} bits", _trunk_bits),
    ({"method"}, "{}", _method),
)


def difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Of two manifests, as JSON has them: options, with their values, and names of fields for what comes of none. ""
    where they are the same."""
    rest = [name for name in asked if found.get(name) != asked[name]]
    if "model" in rest:
        return f"of {found.get('model')}, and {asked['model']} was asked for"
    said = []
    for fields, name, of in OPTIONS:
        if not fields & set(rest):
            continue
        try:
            old, new = of(found), of(asked)
        except (KeyError, TypeError, AttributeError):  # it may be anybody's JSON
            continue
        if old != new:  # what else is different in these fields follows from it
            said.append(f"with {name.format(old)}, and {new} {'were' if 'bits' in name else 'was'} asked for")
            rest = [each for each in rest if each not in fields]
    return "; ".join([*said, *([f"they differ in {', '.join(rest)}"] if rest else [])])
