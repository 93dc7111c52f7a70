"""Models that were pulled, as far as names need them."""

from __future__ import annotations

from pathlib import Path

from moetier.tiers.store.folder import GROUP

NAME = "acme/tinymix:4bit"


def place(models: Path, *names: str) -> None:
    """As much of a model as has a name."""
    for name in names:
        hub_id, _, tag = name.partition(":")
        (models / hub_id.replace("/", "--") / tag / GROUP).mkdir(parents=True)
