"""What daemons of this user say of themselves: daemon.json, in each one's folder."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from moetier.tiers.errors import RefusedError

from .address import Address, check_folder, runtime_folder

FILE = "daemon.json"
SHORT = 12  # digits of a digest, for people: two stores of one model are told apart


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    digest: str
    directory: str
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class DaemonCard:
    """Of a daemon that runs, or was killed: only its sockets tell which."""

    pid: int
    version: str  # of moetier
    started_unix: float
    models: tuple[ServedModel, ...]
    listen: str = ""  # HOST:PORT, if it listens there too
    metrics: str = ""  # HOST:PORT, if Prometheus may read its metrics there

    def write(self, folder: Path) -> None:
        """In one step: a reader sees all of it or nothing."""
        new = folder / f"{FILE}.{os.getpid()}"
        new.write_text(json.dumps(asdict(self)))
        new.chmod(0o600)
        new.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> DaemonCard | None:
        """None where there is none, or one of another version. Raises RefusedError for a folder that is not safe."""
        try:
            check_folder(folder)
            card = json.loads((folder / FILE).read_bytes())
            models = tuple(ServedModel(**model) for model in card.pop("models"))
            return cls(models=models, **card)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def daemons() -> dict[Address, DaemonCard]:
    """By their addresses, those beneath ``runtime_folder()``."""
    found = {}
    for folder in sorted(path for path in runtime_folder().glob("*") if path.is_dir()):
        with contextlib.suppress(RefusedError):  # another's folder is no daemon of this user
            card = DaemonCard.read(folder)
            if card is not None:
                found[Address.of(folder)] = card
    return found


def serving(digest: str) -> list[Address]:
    """The daemons that say that they serve a store, by its digest; whether they still run shows when one connects."""
    return [address for address, card in daemons().items() if any(model.digest == digest for model in card.models)]
