"""Draw pods and nodes of docs/deploy/kubernetes: python docs/figures/kubernetes.py writes kubernetes.svg beside it."""

from __future__ import annotations

from pathlib import Path

from drawing import DISK, GREY, HOST, HOT, PAPER, TRUNK, arrow, box, svg, text

WIDTH, HEIGHT = 960, 470
NODES = (24, 332, 640)  # x of each node's left edge
ACROSS = 296  # width of a node


def daemon_node(x: int, number: int) -> list[str]:
    middle = x + ACROSS // 2
    parts = [
        box(x, 92, ACROSS, 268, TRUNK),
        text(x + 16, 118, f"Node {number}, moetier=daemon", bold=True),
        *(box(left, 134, 124, 40, PAPER) for left in (x + 16, x + 156)),
        *(text(left + 62, 159, "serve", at="middle") for left in (x + 16, x + 156)),
        box(x + 16, 238, 264, 84, PAPER),
        text(x + 30, 264, "daemon", bold=True),
        text(x + 264, 264, "experts in memory", at="end", fill=GREY, size=13),
        *(box(x + 30 + 40 * slot, 276, 32, 32, HOST) for slot in range(6)),
        *(arrow((left, 174), (left, 236), colour=GREY) for left in (x + 78, x + 218)),
        text(middle, 202, "mapped: a hit", at="middle", fill=GREY, size=13),
        text(middle, 220, "sends no message", at="middle", fill=GREY, size=13),
    ]
    return parts + [arrow((left, 56), (left, 132), colour=GREY) for left in (x + 78, x + 218)]


def picture() -> str:
    first, second, third = NODES
    parts = [
        box(24, 20, WIDTH - 48, 36, PAPER),
        text(WIDTH // 2, 43, "Service moetier-serve: OpenAI's API", at="middle", bold=True),
        *daemon_node(first, 1),
        *daemon_node(second, 2),
        box(third, 92, ACROSS, 268, TRUNK),
        text(third + 16, 118, "Node 3, without a daemon", bold=True),
        arrow((third + 148, 56), (third + 148, 132), colour=GREY),
        box(third + 16, 134, 264, 104, PAPER),
        text(third + 30, 159, "serve", bold=True),
        text(third + 264, 159, "a host tier of its own", at="end", fill=GREY, size=13),
        *(box(third + 30 + 40 * slot, 180, 32, 32, HOST) for slot in range(3)),
        text(third + 30, 262, "dns:///moetier-daemon:7070", fill=HOT, size=13),
        text(third + 30, 280, "a share from each, over TLS", fill=HOT, size=13),
        # over the network, to both daemons
        f'<path d="M {third + 148} 342 L {first + 248} 342" fill="none" stroke="{HOT}" stroke-width="2.2"/>',
        f'<path d="M {third + 148} 290 L {third + 148} 342" fill="none" stroke="{HOT}" stroke-width="2.2"/>',
        *(arrow((x + 248, 342), (x + 248, 324)) for x in (first, second)),
        box(24, 408, WIDTH - 48, 42, DISK),
        text(WIDTH // 2, 434, "The model: a folder of each node, or a bucket", at="middle", bold=True),
        *(arrow((x + 78, 408), (x + 78, 324)) for x in (first, second)),
        *(text(x + 88, 392, "a miss", fill=HOT, size=13) for x in (first, second)),
    ]
    return svg(WIDTH, HEIGHT, "Pods of a node share its daemon's memory; other nodes fetch from all daemons", parts)


if __name__ == "__main__":
    Path(__file__).with_name("kubernetes.svg").write_text(picture())
