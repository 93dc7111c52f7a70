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
        (manifest(), manifest(bits=3, group=128), "with experts of 4 bits, and 3 were asked for"),
        (manifest(), manifest(group=32), "with experts in groups of 64, and 32 was asked for"),
        (manifest(), manifest(pairs="bfloat16"), "with scales of experts in uint8, and bfloat16 was asked for"),
        (manifest(), manifest(trunk=8), "with a trunk of 16 bits, and 8 were asked for"),
        (manifest(trunk=4), manifest(trunk=8), "with a trunk of 4 bits, and 8 were asked for"),
        (manifest(method="rounding"), manifest(), "with plain rounding (--fast), and HQQ was asked for"),
        (manifest(), manifest(model="n", bits=3), "of m, and n was asked for"),
        (manifest(), manifest(source_digest="b"), "they differ in source_digest"),
        (manifest(), manifest(solver=2), "they differ in solver"),
        (
            manifest(),
            manifest(bits=8, trunk=8, source_digest="b"),
            "with experts of 4 bits, and 8 were asked for; with a trunk of 16 bits, and 8 were asked for; "
            "they differ in source_digest",
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
