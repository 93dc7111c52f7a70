"""How a conversion that is there is told from the one that is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from stores import make_plan

from moetier.tiers.manifest import Manifest, TrunkRecords
from moetier.tiers.quant.codec import layout_for
from moetier.tools.convert.target import difference


def manifest(bits: Any = 4, group: int = 64, pairs: str = "uint8", trunk: Any = 16, **more: Any) -> Manifest:
    form = TrunkRecords(trunk, group, pairs) if trunk != 16 else None
    made = Manifest(
        model="m",
        source_digest="a",
        blocks=(),
        layouts={"records": layout_for({"up_proj": ((256, 256), "bfloat16")}, bits=bits, group=group, pairs=pairs)},
        version="1",
        requires=("trunk-records",) if form else (),
        trunk_records=form,
    )
    return replace(made, **more)


@pytest.mark.parametrize(
    ("found", "asked", "said"),
    [
        (manifest(), manifest(), ""),
        (manifest(), manifest(bits=3, group=128), "it has experts of 4 bits, not 3"),
        (manifest(), manifest(group=32), "it has experts in groups of 64, not 32"),
        (manifest(), manifest(pairs="bfloat16"), "it has scales of experts in uint8, not bfloat16"),
        (manifest(), manifest(trunk=8), "it has a trunk of 16 bits, not 8"),
        (manifest(trunk=4), manifest(trunk=8), "it has a trunk of 4 bits, not 8"),
        (manifest(method="rounding"), manifest(), "it has weights quantised by plain rounding (--fast), not HQQ"),
        (manifest(), manifest(model="n", bits=3), "it is of m, not of n"),
        (manifest(), manifest(source_digest="b"), "its manifest differs in source_digest"),
        (manifest(), manifest(solver=2), "its manifest differs in solver"),
        (
            manifest(),
            manifest(bits=8, trunk=8, source_digest="b"),
            "it has experts of 4 bits, not 8; it has a trunk of 16 bits, not 8; its manifest differs in source_digest",
        ),
    ],
)
def test_options_are_named_with_both_values(found: Manifest, asked: Manifest, said: str) -> None:
    assert difference(found, asked) == said


def test_a_manifest_that_names_no_solver_is_of_the_first() -> None:
    stored = make_plan().to_json()
    del stored["solver"]
    assert Manifest.from_json(stored, "here").solver == 1
    assert Manifest.from_json(stored | {"solver": 2}, "here").solver == 2
