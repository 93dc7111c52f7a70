"""Layouts follow from their projections. Those of a manifest are accepted only if they have this format."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from moetier.tiers.fields import Fields
from moetier.tiers.layout import (
    ALIGNMENT,
    BITS,
    PAGE_BYTES,
    PAIR_TYPES,
    ZERO_POINTS,
    Bias,
    Bits,
    Projection,
    RecordLayout,
)


def layout_of(bits: Bits, pairs: str = "bfloat16") -> RecordLayout:
    settings: dict[str, Any] = {"bits": bits} | ({"group": 32, "pairs": pairs} if bits != 16 else {})
    projections = (Projection("up_proj", 100, 64, **settings), Projection("down_proj", 64, 96, **settings))
    return RecordLayout(projections, (Bias("up_proj_bias", 100), Bias("down_proj_bias", 64, "float16")))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pairs", [*PAIR_TYPES, *ZERO_POINTS])
def test_sections_are_aligned_apart_and_within_the_record(bits: Bits, pairs: str) -> None:
    layout = layout_of(bits, pairs)
    assert all(section.offset % ALIGNMENT == 0 for section in layout.sections)
    for before, after in itertools.pairwise(layout.sections):
        assert before.offset + before.nbytes <= after.offset
    assert layout.payload_bytes <= layout.record_bytes == layout.slot_bytes - 4
    assert layout.slot_bytes % PAGE_BYTES == 0
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


NVFP4: dict[str, Any] = {"bits": 4, "coding": "e2m1", "group": 16, "scales": "e4m3", "parts": 2, "globals": "divide"}
FP8: dict[str, Any] = {"bits": 8, "coding": "e4m3", "group": 128, "scales": "float32", "block_rows": 128}


def coded_layout() -> RecordLayout:
    return RecordLayout((Projection("up_proj", 600, 48, **NVFP4), Projection("down_proj", 150, 300, **FP8)))


def test_codings_keep_a_checkpoints_own_rows_and_scales() -> None:
    layout = coded_layout()
    assert [(s.name, s.dtype, s.shape) for s in layout.sections] == [
        ("up_proj.codes", "uint8", (600, 24)),
        ("up_proj.scales", "uint8", (600, 3)),
        ("up_proj.globals", "float32", (2,)),
        ("down_proj.codes", "uint8", (150, 300)),
        ("down_proj.scales", "float32", (2, 3)),
    ]
    assert RecordLayout.from_json(Fields(json.loads(json.dumps(layout.to_json())))) == layout


def test_fields_of_codings_are_in_no_other_manifest() -> None:
    """So manifests are what they were before there were codings."""
    for p in (*layout_of(4).to_json()["projections"], *layout_of(16).to_json()["projections"]):
        assert list(p) == ["name", "rows", "columns", "bits", "dtype", "transposed", "group", "pairs"]


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8},
        {"bits": 16},
        {"pairs": "bfloat16"},
        {"coding": ""},
        {"coding": "e5m2"},
        {"coding": "e4m3"},
        {"coding": 4},
        {"dtype": "e2m1"},
        {"group": 0},
        {"group": 8},
        {"group": 32},
        {"group": 48},
        {"group": 16.0},
        {"scales": ""},
        {"scales": "float64"},
        {"parts": 0},
        {"parts": -2},
        {"parts": 7},
        {"parts": 601},
        {"parts": 1 << 62},
        {"block_rows": 0},
        {"block_rows": 1 << 40},
        {"globals": "add"},
        {"rows": 601},
        {"columns": 40},
        {"unknown": 1},
    ],
    ids=str,
)
def test_codings_that_are_not_of_this_format(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="projections"):
        RecordLayout.from_json(Fields(forged("projections", coded_layout(), **changes)))


@pytest.mark.parametrize("field", [{"parts": 1}, {"block_rows": 1}, {"globals": ""}, {"coding": ""}], ids=str)
def test_fields_with_their_defaults_are_left_out(field: dict[str, Any]) -> None:
    value = coded_layout().to_json()
    value["projections"][0] |= field
    with pytest.raises(ValueError, match="projections"):
        RecordLayout.from_json(Fields(value))


@pytest.mark.parametrize("changes", [{"group": 0}, {"group": 1 << 25}, {"bits": 4}, {"block_rows": -128}], ids=str)
def test_grids_that_do_not_fit_the_matrix(changes: dict[str, Any]) -> None:
    layout = RecordLayout((Projection("up_proj", 150, 48, **FP8 | {"group": 48}),))
    with pytest.raises(ValueError, match="projections"):
        RecordLayout.from_json(Fields(forged("projections", layout, **changes)))


def forged(part: str, layout: RecordLayout, **changes: Any) -> dict[str, Any]:
    """Change the first projection or bias of a layout, and fit its sections to it where possible."""
    value = layout.to_json()
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
        {"pairs": "float64_zeros"},
        {"pairs": "float16_zeros", "group": 8},
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
        RecordLayout.from_json(Fields(forged("projections", layout_of(4), **changes)))


@pytest.mark.parametrize(
    "changes", [{"size": 0}, {"size": -1}, {"size": 100.0}, {"dtype": "float32"}, {"dtype": "uint8"}]
)
def test_biases_that_are_not_of_this_format(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"projections|biases|are named"):
        RecordLayout.from_json(Fields(forged("biases", layout_of(4), **changes)))


def test_sections_must_follow_from_the_projections() -> None:
    value = layout_of(4).to_json()
    value["sections"][1]["offset"] += ALIGNMENT
    with pytest.raises(ValueError, match="another kernel layout"):
        RecordLayout.from_json(Fields(value))
    with pytest.raises(ValueError, match="named"):
        RecordLayout.from_json(Fields({"record_bytes": 4092, "projections": [], "biases": [], "sections": []}))


@pytest.mark.parametrize(
    ("projection", "said"),
    [
        (
            Projection("up_proj", 100, 48, bits=4, group=32, pairs="bfloat16"),
            "32, which does not divide the 48 columns",
        ),
        (Projection("up_proj", 100, 48, bits=4, coding="q4_0", group=32), "columns is 48, no multiple of 32"),
    ],
    ids=["groups", "blocks"],
)
def test_columns_that_do_not_fill_groups_or_blocks_are_refused(projection: Projection, said: str) -> None:
    whole = RecordLayout((replace(projection, columns=64),)).to_json()
    whole["projections"][0]["columns"] = projection.columns
    with pytest.raises(ValueError, match=said):
        RecordLayout.from_json(Fields(whole))
