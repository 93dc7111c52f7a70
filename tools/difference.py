"""In what a conversion that is there differs from one that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS = {"hqq": "HQQ", "rounding": "plain rounding (--fast)"}


def difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Of two manifests, as JSON has them: options, with their values, and names of fields for what comes of none. ""
    where they are the same."""
    rest = [name for name in asked if found.get(name) != asked[name]]
    if "model" in rest:
        return f"of {found.get('model')}, and {asked['model']} was asked for"
    said = []
    for fields, name, of in (
        ({"layouts"}, "experts of {} bits", lambda manifest: _experts(manifest, "bits")),
        ({"layouts"}, "experts in groups of {}", lambda manifest: _experts(manifest, "group")),
        ({"layouts"}, "scales of experts in {}", lambda manifest: _experts(manifest, "pairs")),
        ({"trunk_records", "requires"}, "a trunk of {} bits", _trunk_bits),
        ({"method"}, "{}", lambda manifest: METHODS.get(manifest["method"], manifest["method"])),
    ):
        if not fields & set(rest):
            continue
        try:
            old, new = of(found), of(asked)
        except (KeyError, TypeError, AttributeError):  # it may be anybody's JSON
            continue
        if old != new:  # what else is different follows from it
            said.append(f"with {name.format(old)}, and {new} {'were' if 'bits' in name else 'was'} asked for")
            rest = [each for each in rest if each not in fields]
    return "; ".join([*said, *([f"they differ in {', '.join(rest)}"] if rest else [])])


def _experts(manifest: Mapping[str, Any], key: str) -> str:
    """One value, as a rule; of several all of them."""
    layouts = manifest["layouts"].values()
    return " and ".join(sorted({str(each[key]) for layout in layouts for each in layout["projections"]}))


def _trunk_bits(manifest: Mapping[str, Any]) -> int:
    records = manifest.get("trunk_records")
    bits: int = records["bits"] if records else 16
    return bits
