"""Draw daemons on other machines that compute: python docs/figures/daemons.py writes daemons.svg beside it."""

from __future__ import annotations

from pathlib import Path

from drawing import DISK, GREY, HOST, HOT, PAPER, TRUNK, arrow, box, svg, text

WIDTH, HEIGHT = 900, 490
MACHINES = (24, 466)  # x of the left edge of each machine with a daemon
ACROSS = 410  # width of such a machine


def machine(x: int, name: str) -> list[str]:
    return [
        box(x, 242, ACROSS, 148, TRUNK),
        text(x + 16, 268, f"{name}: a share of the experts", bold=True),
        box(x + 16, 284, ACROSS - 32, 90, PAPER),
        text(x + 30, 310, "moetier daemon", bold=True),
        text(x + ACROSS - 30, 310, "experts in memory", at="end", fill=GREY, size=13),
        *(box(x + 30 + 40 * slot, 326, 32, 32, HOST) for slot in range(8)),
        # over the network
        arrow((x + 30, 156), (x + 30, 240)),
        text(x + 40, 192, "hidden states,", fill=HOT, size=13),
        text(x + 40, 210, "4 to 16 KB each", fill=HOT, size=13),
        arrow((x + 158, 242), (x + 158, 158)),
        text(x + 168, 192, "outputs of", fill=HOT, size=13),
        text(x + 168, 210, "its experts", fill=HOT, size=13),
        arrow((x + 250, 242), (x + 250, 158), dashed=True, colour=GREY),
        text(x + 260, 192, "an expert, 2 to 90 MB,", fill=GREY, size=13),
        text(x + 260, 210, "only if it is fetched", fill=GREY, size=13),
        arrow((x + 74, 434), (x + 74, 376)),
        text(x + 84, 418, "a miss", fill=HOT, size=13),
    ]


def picture() -> str:
    parts = [
        box(24, 20, WIDTH - 48, 136, TRUNK),
        text(40, 46, "Client", bold=True),
        box(40, 62, 200, 78, PAPER),
        text(140, 96, "trunk: attention,", at="middle"),
        text(140, 116, "gates, norms", at="middle"),
        box(256, 62, 384, 78, PAPER),
        text(270, 86, "host tier", bold=True),
        text(626, 86, "the experts that it uses most", at="end", fill=GREY, size=13),
        *(box(270 + 40 * slot, 96, 32, 32, HOST) for slot in range(4)),
        box(656, 62, 204, 78, PAPER),
        text(758, 96, "outputs are added up", at="middle"),
        text(758, 116, "in a fixed order", at="middle"),
        *machine(MACHINES[0], "Machine 1"),
        *machine(MACHINES[1], "Machine 2"),
        box(24, 434, WIDTH - 48, 42, DISK),
        text(WIDTH // 2, 460, "The model: a folder of each machine, or a bucket", at="middle", bold=True),
    ]
    return svg(WIDTH, HEIGHT, "Hidden states go to the daemons that hold the experts, and outputs come back", parts)


if __name__ == "__main__":
    Path(__file__).with_name("daemons.svg").write_text(picture())
