"""Draw processes of moetier on Ray Serve: python docs/figures/ray_serve.py writes ray_serve.svg beside it."""

from __future__ import annotations

from pathlib import Path

from drawing import DISK, GREY, HOST, HOT, PAPER, TRUNK, arrow, box, svg, text

WIDTH, HEIGHT = 900, 500
NODES = (24, 466)  # x of each node's left edge
ACROSS = 410  # width of a node


def node(x: int, number: int) -> list[str]:
    return [
        box(x, 92, ACROSS, 306, TRUNK),
        text(x + 16, 118, f"Node {number}", bold=True),
        box(x + 16, 134, ACROSS - 32, 34, PAPER),
        text(x + ACROSS // 2, 156, "Ray's HTTP proxy, session ids", at="middle"),
        *(box(left, 204, 116, 40, PAPER) for left in (x + 16, x + 146)),
        *(text(left + 58, 229, "replica", at="middle") for left in (x + 16, x + 146)),
        box(x + 292, 204, 102, 40, PAPER, dashed=True),
        text(x + 343, 229, "actor", at="middle"),
        box(x + 16, 292, ACROSS - 32, 88, PAPER),
        text(x + 30, 318, "moetier daemon", bold=True),
        text(x + ACROSS - 30, 318, "experts in memory", at="end", fill=GREY, size=13),
        *(box(x + 30 + 40 * slot, 332, 32, 32, HOST) for slot in range(8)),
        *(arrow((left, 244), (left, 290), colour=GREY) for left in (x + 74, x + 204)),
        text(x + 139, 270, "mapped", at="middle", fill=GREY, size=13),
        arrow((x + 343, 244), (x + 343, 290)),
        text(x + 333, 270, "supervises", at="end", fill=HOT, size=13),
    ]


def picture() -> str:
    first, second = NODES
    parts = [
        box(24, 20, WIDTH - 48, 36, PAPER),
        text(WIDTH // 2, 43, "Clients: OpenAI's API, at any node", at="middle", bold=True),
        *node(first, 1),
        *node(second, 2),
        *(arrow((x + ACROSS // 2, 56), (x + ACROSS // 2, 132), colour=GREY) for x in NODES),
        # consistent hashing: any proxy, any replica
        *(
            arrow((x + ACROSS // 2, 168), (y + left, 202), colour=GREY)
            for x in NODES
            for y in NODES
            for left in (74, 204)
        ),
        box(24, 442, WIDTH - 48, 42, DISK),
        text(WIDTH // 2, 468, "The model: a folder of each node, or a bucket", at="middle", bold=True),
        *(arrow((x + 74, 442), (x + 74, 382)) for x in NODES),
        *(text(x + 84, 426, "a miss", fill=HOT, size=13) for x in NODES),
    ]
    return svg(WIDTH, HEIGHT, "Proxies choose replicas by conversation; replicas map their node's experts", parts)


if __name__ == "__main__":
    Path(__file__).with_name("ray_serve.svg").write_text(picture())
