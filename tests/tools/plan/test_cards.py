"""Estimates for GPUs are bytes divided by the rates of data sheets, and say that nothing was measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from stores import make_plan

from moetier.tools.commands.plan import SHOWN_CARDS
from moetier.tools.plan.cards import CARDS, GB, GIB, USABLE, by_data_sheet, card_in, sheet

CARD = next(card for card in CARDS if card.name == "RTX 3060")


def found(trunk_bytes: int, hits: float) -> dict[str, dict[str, Any]]:
    """The cards of a model of 3 blocks of 4 experts, two of which each token uses."""
    manifest = make_plan(blocks=3, experts=4, top_k=2)
    choice: Any = SimpleNamespace(manifest=manifest, plain_bytes=trunk_bytes, matrices=(), trunk_bytes=trunk_bytes)
    return {each["card"]: each for each in by_data_sheet(choice, 1000, lambda slots: [hits] * 3)}


def test_a_token_takes_the_time_of_its_bytes() -> None:
    layout = make_plan(blocks=3, experts=4, top_k=2).layout(0)
    all_fit, half = (found(GB, hits)[CARD.name] for hits in (1.0, 0.5))
    reading = (GB + 6 * layout.payload_bytes) / CARD.memory_rate
    assert all_fit["slots"] == 12
    assert 1 / all_fit["tokens_per_s_at_most"] == pytest.approx(reading)
    assert half["tokens_per_s_at_most"] == all_fit["tokens_per_s_at_most"], "the link works beside the memory"
    linked = found(0, 0.0)[CARD.name]
    assert 1 / linked["tokens_per_s_at_most"] == pytest.approx(6 * layout.slot_bytes / CARD.link_rate)
    assert not all_fit["measured"]
    assert all_fit["source"]


def test_cards_without_room_are_left_out() -> None:
    room = round(USABLE * 16 * GIB)
    assert [name for name in found(room, 1.0) if name in ("Tesla T4", "RTX 3060", "RTX 3090")] == ["RTX 3090"]


def test_a_card_is_known_by_its_whole_name() -> None:
    assert card_in("cuda:0 NVIDIA GeForce RTX 3060, 11 GiB free of 12 GiB") is CARD
    assert card_in("cuda:0 NVIDIA GeForce RTX 3060 Laptop GPU, 5 GiB free of 6 GiB") is None
    assert card_in("cuda:0 NVIDIA GeForce RTX 3060, 7.5 GiB free of 7.8 GiB") is None
    assert card_in("cuda:0 NVIDIA H200, 139.2 GiB free of 139.8 GiB") is not None
    assert sheet(CARD) == "by its data sheet its memory gives 360 GB/s and its link 32 GB/s; not measured"
    assert set(SHOWN_CARDS) <= {card.name for card in CARDS}
