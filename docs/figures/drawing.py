"""Boxes, arrows and texts, from which the other scripts of this folder draw pictures (SVG)."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

INK, GREY, PAPER = "#1f2933", "#616e7c", "#ffffff"
TRUNK, DEVICE, HOST, DISK, HOT = "#e4e7eb", "#f5d9a8", "#b8dbd9", "#c5cee8", "#c2410c"


def box(x: int, y: int, width: int, height: int, fill: str, *, dashed: bool = False) -> str:
    edge = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{GREY}"{edge}/>'


def text(
    x: float, y: float, words: str, *, size: int = 14, fill: str = INK, bold: bool = False, at: str = "start"
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{at}"{weight}>{escape(words)}</text>'


def arrow(*points: tuple[int, int], dashed: bool = False, colour: str = HOT) -> str:
    edge = ' stroke-dasharray="5 4"' if dashed else ""
    path = " L ".join(f"{x} {y}" for x, y in points)
    return (
        f'<path d="M {path}" fill="none" stroke="{colour}" stroke-width="2.2"{edge} marker-end="url(#{colour[1:]})"/>'
    )


def marker(colour: str) -> str:
    return (
        f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        f'<path d="M 0 0 L 10 5 L 0 10 z" fill="{colour}"/></marker>'
    )


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return a whole SVG file."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f"<defs>{marker(HOT)}{marker(GREY)}</defs>",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])
