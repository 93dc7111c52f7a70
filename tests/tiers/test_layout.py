"""Layouts follow from their projections. Those of a manifest are accepted only if they have this format."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from moetier.tiers.fields import Fields
from moetier.tiers.layout import ALIGNMENT, BITS, PAGE, Bias, Bits, Projection, RecordLayout


def layout_of(bits: Bits, pairs: str = "bfloat16") -> RecordLayout:
    settings: dict[str, Any] = {"bits": bits} | ({"group": 32, "pairs": pairs} if bits != 16 else {})
    projections = (Projection("up_proj", 100, 64, **settings), Projection("down_proj", 64, 96, **settings))
    return RecordLayout(projections, (Bias("up_proj_bias", 100), Bias("down_proj_bias", 64, "float16")))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
def test_sections_are_aligned_apart_and_within_the_record(bits: Bits, pairs: str) -> None:
    layout = layout_of(bits, pairs)
    assert all(section.offset % ALIGNMENT == 0 for section in layout.sections)
    for before, after in itertools.pairwise(layout.sections):
        assert before.offset + before.nbytes <= after.offset
    assert layout.payload_bytes <= layout.record_bytes == layout.slot_bytes - 4
    assert layout.slot_bytes % PAGE == 0
    assert layout.weights == 100 * 64 + 64 * 96 + 164
    assert RecordLayout.from_json(Fields(layout.to_json())) == layout


def test_low_planes_of_eight_bits_are_behind_all_else() -> None:
    names = [section.name for section in layout_of(8).sections]
    assert names == [
        "up_proj.high",
        "down_proj.high",
        "up_proj.pairs",
        "down_proj.pairs",
        "up_proj_bias",
        "down_proj_bias",
        "up_proj.low",
        "down_proj.low",
    ]


def forged(part: str, **changes: Any) -> dict[str, Any]:
    """Change the first projection or bias of a layout, and fit its sections to it where possible."""
    value = layout_of(4).to_json()
    value[part][0] |= changes
    try:
        made = RecordLayout(
            tuple(Projection(**p) for p in value["projections"]), tuple(Bias(**b) for b in value["biases"])
        )
        return value | made.to_json()
    except (ArithmeticError, TypeError, KeyError):
        return value


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 5},
        {"bits": 4.0},
        {"bits": 16},
        {"group": 0},
        {"group": -32},
        {"group": 4},
        {"group": 16},
        {"group": 48},
        {"group": 32.0},
        {"pairs": "float8"},
        {"pairs": ""},
        {"rows": 0},
        {"rows": -64},
        {"rows": True},
        {"columns": 0},
        {"columns": "64"},
        {"name": 3},
        {"name": "down_proj"},
        {"name": "up_proj_bias"},
        {"unknown": 1},
    ],
)
def test_projections_that_are_not_of_this_format(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"projections|biases|are named"):
        RecordLayout.from_json(Fields(forged("projections", **changes)))


@pytest.mark.parametrize(
    "changes", [{"size": 0}, {"size": -1}, {"size": 100.0}, {"dtype": "float32"}, {"dtype": "uint8"}]
)
def test_biases_that_are_not_of_this_format(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"projections|biases|are named"):
        RecordLayout.from_json(Fields(forged("biases", **changes)))


def test_sections_must_follow_from_the_projections() -> None:
    value = layout_of(4).to_json()
    value["sections"][1]["offset"] += ALIGNMENT
    with pytest.raises(ValueError, match="another kernel layout"):
        RecordLayout.from_json(Fields(value))
    with pytest.raises(ValueError, match="named"):
        RecordLayout.from_json(Fields({"record_bytes": 4092, "projections": [], "biases": [], "sections": []}))
