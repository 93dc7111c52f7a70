"""Draws the three tiers and a token's way through a block: python docs/figures/tiers.py writes tiers.svg beside it."""

from __future__ import annotations

from pathlib import Path

from drawing import DEVICE, DISK, GREY, HOST, HOT, PAPER, TRUNK, arrow, box, svg, text

WIDTH, HEIGHT = 960, 424
FIRST, PITCH = 590, 42  # of a row of slots


def slots(y: int, numbers: range, full: dict[int, str], fill: str) -> list[str]:
    """A row of slots; ``full`` ones have a label."""
    parts = []
    for number in numbers:
        x = FIRST + PITCH * number
        parts.append(box(x, y, PITCH - 6, 34, fill if number in full else PAPER, dashed=number not in full))
        if number in full:
            parts.append(text(x + (PITCH - 6) / 2, y + 22, full[number], at="middle"))
    return parts


def picture() -> str:
    parts = [
        # the model
        box(24, 24, 236, 376, TRUNK),
        text(142, 52, "The model without experts", bold=True, at="middle"),
        box(48, 74, 188, 40, PAPER),
        text(142, 99, "attention, norms", at="middle"),
        box(48, 144, 188, 40, PAPER),
        text(142, 169, "gate: experts 3 and 6", at="middle"),
        box(48, 214, 188, 40, PAPER),
        text(142, 239, "products, summed up", at="middle"),
        box(48, 300, 188, 40, PAPER, dashed=True),
        text(142, 325, "the next layer's gate", at="middle"),
        text(142, 382, "the trunk: always in memory", at="middle", fill=GREY, size=13),
        arrow((142, 114), (142, 142), colour=GREY),
        arrow((142, 184), (142, 212), colour=GREY),
        arrow((142, 254), (142, 298), colour=GREY, dashed=True),
    ]
    tiers = [
        (
            24,
            "Device",
            ("a cache on the GPU; on a", "CPU the host's, as it lies"),
            DEVICE,
            range(3, 7),
            {3: "3", 4: "1"},
        ),
        (
            170,
            "Host",
            ("a cache in a memory file", "that processes share"),
            HOST,
            range(8),
            {1: "3", 2: "1", 4: "0", 6: "6"},
        ),
        (316, "SSD", ("every expert, each with", "its checksum"), DISK, range(8), {n: str(n) for n in range(8)}),
    ]
    for y, name, lines, fill, numbers, full in tiers:
        parts += [
            box(404, y, 532, 84, PAPER),
            text(422, y + 27, name, bold=True, size=16),
            *(text(422, y + 48 + 18 * number, line, fill=GREY, size=13) for number, line in enumerate(lines)),
            *slots(y + 25, numbers, full, fill),
        ]
    hit, column = FIRST + PITCH * 3, FIRST + PITCH * 6 + (PITCH - 6) // 2
    parts += [
        # demand
        arrow((236, 164), (330, 164), (330, 66), (402, 66)),
        text(268, 154, "wanted", fill=HOT, size=13),
        f'<rect x="{hit - 3}" y="46" width="42" height="40" rx="9" fill="none" stroke="{HOT}" stroke-width="2.2"/>',
        text(hit - 10, 71, "3: a hit", fill=HOT, size=13, at="end"),
        arrow((column, 341), (column, 231)),
        text(column - 12, 289, "6: a miss, read at once past the page cache", fill=HOT, size=13, at="end"),
        arrow((column, 195), (column, 85)),
        text(column - 12, 143, "then copied to the GPU; on a CPU there is no copy", fill=HOT, size=13, at="end"),
        # a prefetch
        arrow((236, 320), (330, 320), (330, 358), (402, 358), dashed=True, colour=GREY),
        text(268, 310, "predicted: early", fill=GREY, size=13),
    ]
    return svg(
        WIDTH, HEIGHT, "The trunk stays in memory; experts move from the SSD to the host and to the device", parts
    )


if __name__ == "__main__":
    Path(__file__).with_name("tiers.svg").write_text(picture())
