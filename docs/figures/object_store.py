"""Draw a model in an object store: python docs/figures/object_store.py writes object_store.svg beside it."""

from __future__ import annotations

from pathlib import Path

from drawing import DISK, GREY, HOST, HOT, PAPER, TRUNK, arrow, box, svg, text

WIDTH, HEIGHT = 900, 466
FIRST, PITCH = 250, 40  # of a row of slots
CACHED = (0, 1, 3, 6)  # numbers of the experts in the cache


def picture() -> str:
    parts = [
        box(24, 20, WIDTH - 48, 326, TRUNK),
        text(40, 46, "One machine", bold=True),
        box(40, 62, WIDTH - 80, 96, PAPER),
        text(54, 88, "A process, or a daemon", bold=True),
        text(WIDTH - 54, 88, "host tier: slots in memory", at="end", fill=GREY, size=13),
        box(54, 104, 176, 36, TRUNK),
        text(142, 127, "trunk", at="middle"),
        *(box(FIRST + PITCH * slot, 106, 32, 32, HOST) for slot in range(12)),
        box(40, 234, 560, 96, PAPER),
        text(54, 260, "Cache on the disk", bold=True),
        text(586, 260, "a model directory, with gaps", at="end", fill=GREY, size=13),
        box(54, 276, 176, 36, DISK),
        text(142, 299, "trunk, manifest", at="middle"),
        *(
            box(FIRST + PITCH * slot, 278, 32, 32, DISK if slot in CACHED else PAPER, dashed=slot not in CACHED)
            for slot in range(8)
        ),
        box(24, 404, WIDTH - 48, 42, DISK),
        text(WIDTH // 2, 430, "Object store: the whole model", at="middle", bold=True),
        arrow((142, 404), (142, 314)),
        text(152, 370, "once, before the first token", fill=HOT, size=13),
        arrow((214, 276), (214, 142), colour=GREY),
        text(204, 200, "loaded", at="end", fill=GREY, size=13),
        arrow((266, 234), (266, 160)),
        text(276, 192, "a miss, in the cache:", fill=HOT, size=13),
        text(276, 210, "read from the disk", fill=HOT, size=13),
        arrow((680, 404), (680, 160)),
        text(690, 240, "a miss, not in the cache:", fill=HOT, size=13),
        text(690, 258, "one GET for a record,", fill=HOT, size=13),
        text(690, 276, "its checksum compared", fill=HOT, size=13),
        arrow((560, 158), (560, 232), dashed=True, colour=GREY),
        text(550, 192, "a copy,", at="end", fill=GREY, size=13),
        text(550, 210, "written later", at="end", fill=GREY, size=13),
    ]
    return svg(WIDTH, HEIGHT, "Records are fetched from an object store, and kept in a cache on the disk", parts)


if __name__ == "__main__":
    Path(__file__).with_name("object_store.svg").write_text(picture())
