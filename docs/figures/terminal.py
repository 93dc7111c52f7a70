"""Draws a real session in a terminal: python docs/figures/terminal.py writes docs/figures/chat.svg.

It needs build/demo/tinymix-4bit (moetier convert tests/assets/tinymix build/demo/tinymix-4bit --bits 4).

The program runs in a pseudo terminal, keys are typed when its prompt is there, and what pyte's terminal then shows is
written as SVG.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import pyte

COLUMNS, LINES = 104, 44
PATIENCE = 120.0  # seconds for the next prompt
CELL, LINE, MARGIN, BAR = 8.4, 19, 16, 30  # pixels
COLOURS = {
    "default": "#d6dbe0", "black": "#5b6673", "red": "#ff7b72", "green": "#7ee787", "brown": "#e3b341",
    "blue": "#79c0ff", "magenta": "#d2a8ff", "cyan": "#76e3ea", "white": "#ffffff",
}  # fmt: skip
CHAT = ["chat", "build/demo/tinymix-4bit", "--daemon", "none", "--ram", "3520KiB", "--max-new-tokens", "40"]
KEYS = ["What is the matter?\n", '"""My lord,\n', 'where is the king?"""\n', "/stats\n"]


def session(command: Sequence[str], shown: str, keys: Sequence[str], prompts: Sequence[str]) -> pyte.Screen:
    """The screen of ``command``, begun as ``$ shown``, after all ``keys``: each is typed when the line of the cursor
    begins with one of ``prompts``."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    stream.feed(f"\x1b[32m$\x1b[0m {shown}\r\n".encode())
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
    )
    os.close(slave)

    def read() -> None:
        """Up to the next prompt."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ready, _, _ = select.select([master], [], [], 0.3)
            if ready:
                stream.feed(os.read(master, 65536))
            elif any(screen.display[screen.cursor.y].rstrip() == prompt for prompt in prompts):
                return
            assert time.monotonic() < deadline, "\n".join(screen.display)

    try:
        for typed in keys:
            read()
            os.write(master, typed.encode())
        read()
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return screen


def svg(*windows: tuple[pyte.Screen, str]) -> str:
    """Draw screens with their titles, one below the other, each down to the last line that has anything on it."""
    drawn, y = [], 0
    for screen, title in windows:
        height, parts = _window(screen, title)
        drawn += [f'<g transform="translate(0 {y})">', *parts, "</g>"]
        y += height + MARGIN
    width, height = round(max(screen.columns for screen, _ in windows) * CELL + 2 * MARGIN), y - MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="monospace" font-size="14" role="img">',
            f"<title>{escape(windows[0][1])}</title>",
            *drawn,
            "</svg>",
            "",
        ]
    )


def _window(screen: pyte.Screen, title: str) -> tuple[int, list[str]]:
    """Return the height of a window in pixels, and its parts."""
    used = max(y for y, line in enumerate(screen.display) if line.strip()) + 1
    width, height = round(screen.columns * CELL + 2 * MARGIN), used * LINE + 2 * MARGIN + BAR
    parts = [
        f'<rect width="{width}" height="{height}" rx="8" fill="#1b2027"/>',
        *(f'<circle cx="{20 + 18 * i}" cy="17" r="5.5" fill="#3a434e"/>' for i in range(3)),
        f'<text x="{width / 2}" y="22" fill="#8b96a3" text-anchor="middle" font-size="13">{escape(title)}</text>',
    ]
    for y in range(used):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        x = 0
        for (colour, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            text = "".join(cell.data for cell in run)
            weight = ' font-weight="bold"' if bold else ""
            if text.strip():
                parts.append(
                    f'<text x="{MARGIN + x * CELL:.1f}" y="{BAR + MARGIN + (y + 0.75) * LINE:.1f}" '
                    f'textLength="{len(text) * CELL:.1f}" lengthAdjust="spacingAndGlyphs" xml:space="preserve" '
                    f'fill="{COLOURS.get(colour) or "#" + colour}"{weight}>'
                    f"{escape(text)}</text>"
                )
            x += len(text)
    return height, parts


if __name__ == "__main__":
    drawn = session(
        [sys.executable, "-m", "moetier.tools.main", *CHAT], " ".join(["moetier", *CHAT]), KEYS, (">>>", "...")
    )
    Path(__file__).with_name("chat.svg").write_text(svg((drawn, "moetier chat")))
