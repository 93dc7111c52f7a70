"""Estimate the speed of GPUs from their data sheets: the bytes of a token divided by rates. Nothing was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetier.tiers.cache.budget import slots_for, smallest_budget

from .choices import Choice

USABLE = 0.9  # share of a card's memory that is left beside its driver, the libraries and activations
DIFFERS = 1 / 8  # most by which the memory that a card reports differs from its data sheet's
GIB, GB = 1 << 30, 10**9


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by its data sheet. Rates are in bytes/s; that of the link is for one direction."""

    name: str  # as torch names it, or a part of that
    memory_bytes: int
    memory_rate: float
    link_rate: float
    source: str


# Data sheets give the rate of the link for both directions together: 32 GB/s for PCIe 3.0 x16, 64 for 4.0, 128 for 5.0.
# All numbers were compared with copies of these documents and with the specifications that shops and reviews quote, as
# NVIDIA's own pages could not be reached.
CARDS = (
    Card("Tesla T4", 16 * GIB, 320 * GB, 16 * GB, "NVIDIA T4, product brief: PCIe 3.0 x16"),
    Card("RTX 3060", 12 * GIB, 360 * GB, 32 * GB, "NVIDIA GeForce RTX 3060, specifications: PCIe 4.0 x16"),
    Card("RTX 3090", 24 * GIB, 936 * GB, 32 * GB, "NVIDIA Ampere GA102 GPU Architecture, V2.0: PCIe 4.0 x16"),
    Card("RTX 4090", 24 * GIB, 1008 * GB, 32 * GB, "NVIDIA Ada GPU Architecture, V2.01: PCIe 4.0 x16"),
    Card("RTX 5090", 32 * GIB, 1792 * GB, 64 * GB, "NVIDIA RTX Blackwell GPU Architecture: PCIe 5.0 x16"),
    Card("L40S", 48 * GIB, 864 * GB, 32 * GB, "NVIDIA L40S, datasheet: PCIe 4.0 x16"),
    Card("A100-SXM4-80GB", 80 * GIB, 2039 * GB, 32 * GB, "NVIDIA A100 Tensor Core GPU, datasheet: PCIe 4.0 x16"),
    Card("H100 80GB HBM3", 80 * GIB, 3350 * GB, 64 * GB, "NVIDIA H100 Tensor Core GPU, datasheet, SXM: PCIe 5.0 x16"),
    Card("H200", 141 * GIB, 4800 * GB, 64 * GB, "NVIDIA H200 Tensor Core GPU, datasheet, SXM: PCIe 5.0 x16"),
)


def card_in(text: str) -> Card | None:
    """Return the card that a device's description names, with the same memory; None if it is not in CARDS.

    Mobile cards have longer names, and cards of one name with less memory are slower.
    """
    memory = re.search(r" of ([\d.]+) GiB", text)
    return next(
        (
            card
            for card in CARDS
            if f"{card.name}," in f"{text},"
            and (memory is None or abs(float(memory[1]) * GIB / card.memory_bytes - 1) <= DIFFERS)
        ),
        None,
    )


def sheet(card: Card) -> str:
    """Return what a card's data sheet says, as part of a sentence."""
    return (
        f"by its data sheet its memory gives {card.memory_rate / GB:,.0f} GB/s and its link {card.link_rate / GB:.0f} "
        "GB/s; not measured"
    )


def by_data_sheet(
    choice: Choice, cache_bytes: int, hit_ratios: Callable[[Mapping[str, int]], Sequence[float]]
) -> list[dict[str, Any]]:
    """Return for each card, as JSON, how many experts fit, and how many tokens/s its rates would permit at most.

    The host is taken to have all experts in memory, and a token to read no keys and values. Cards that can't hold
    the trunk, the context and one token's experts of a block are left out.

    Args:
        choice: the model with the bits of its experts and trunk.
        cache_bytes: size of the keys and values.
        hit_ratios: returns the hit ratio of each block for a number of slots of each zarr array.
    """
    trunk = choice.plain_bytes + sum(layout.payload_bytes for layout in choice.matrices)
    found = []
    for card in CARDS:
        room = round(USABLE * card.memory_bytes) - choice.trunk_bytes - cache_bytes
        if room < smallest_budget(choice.manifest):
            continue
        slots = slots_for(choice.manifest, room)
        read, missing = trunk, 0.0
        for number, (block, hits) in enumerate(zip(choice.manifest.blocks, hit_ratios(slots), strict=True)):
            layout = choice.manifest.layout(number)
            read += block.top_k * layout.payload_bytes
            missing += block.top_k * (1 - hits) * layout.slot_bytes
        seconds = max(read / card.memory_rate, missing / card.link_rate)  # both can be at work at a time
        found.append(
            {
                "card": card.name,
                "source": card.source,
                "measured": False,
                "slots": sum(slots.values()),
                "tokens_per_s_at_most": 1 / seconds,
            }
        )
    return found
