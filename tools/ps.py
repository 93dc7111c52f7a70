"""``moetier ps``: the daemons of this user that run on this machine."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import format_bytes

from .plain import plain
from .report import table

if TYPE_CHECKING:
    from moetier.proto.expert_store_pb2 import ModelStats, StatsReply
    from moetier.runtime.running import DaemonCard

HELP = "list the daemons that run on this machine"

PATIENCE = 2.0  # seconds for a daemon to answer


@dataclass(frozen=True, slots=True)
class Running:
    """``stats`` is None for a daemon that does not answer."""

    folder: Path
    card: DaemonCard
    stats: StatsReply | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    from moetier.runtime.address import runtime_folder

    found = running()
    if arguments.json:
        print(json.dumps([_json(daemon) for daemon in found], indent=2))
    elif found:
        print(_text(found))
    else:
        print(f"No daemon runs in {runtime_folder()}.")
    return 0


def running() -> list[Running]:
    """Those beneath ``runtime_folder()``; what a killed one left is none."""
    from moetier.runtime.running import daemons
    from moetier.runtime.visit import visit
    from moetier.tiers.errors import DaemonError

    found = []
    for address, card in daemons().items():
        assert address.folder is not None
        try:
            with visit(address, patience=PATIENCE) as visited:
                found.append(Running(address.folder, card, visited.stats()))
        except DaemonError:
            if _lives(card, address.folder):
                found.append(Running(address.folder, card, None))
    return found


def _lives(card: DaemonCard, folder: Path) -> bool:
    """Whether the process has its folder's lock open: it is stopped, or busy."""
    try:
        links = list(Path(f"/proc/{card.pid}/fd").iterdir())
        return any(link.exists() and link.samefile(folder / "lock") for link in links)
    except OSError:
        return False


def _json(daemon: Running) -> dict[str, Any]:
    stats = {model.digest: model for model in daemon.stats.models} if daemon.stats is not None else {}
    return {
        "folder": str(daemon.folder),
        "pid": daemon.card.pid,
        "version": daemon.card.version,
        "listen": daemon.card.listen,
        "metrics": daemon.card.metrics,
        "answers": daemon.stats is not None,
        "uptime_s": time.time() - daemon.card.started_unix,
        "models": [
            {
                "name": model.name,
                "digest": model.digest,
                "directory": model.directory,
                "budget_bytes": model.budget_bytes,
            }
            | (
                {"ready": now.host.ready, "slots": now.host.slots, "clients": now.clients, "leases": now.leases}
                | ({"fault": now.fault} if now.fault else {})
                if (now := stats.get(model.digest)) is not None
                else {}
            )
            for model in daemon.card.models
        ],
    }


def _text(found: list[Running]) -> str:
    from moetier.runtime.running import SHORT

    rows = [["folder", "pid", "model", "store", "budget", "ready", "clients", "up", "listens"]]
    for daemon in found:
        stats = {model.digest: model for model in daemon.stats.models} if daemon.stats is not None else {}
        for number, model in enumerate(daemon.card.models):
            now = stats.get(model.digest)
            first = number == 0
            rows.append(
                [
                    plain(str(daemon.folder)) if first else "",
                    str(daemon.card.pid) if first else "",
                    plain(model.name),
                    plain(model.digest[:SHORT]),
                    format_bytes(model.budget_bytes),
                    _ready(now),
                    str(now.clients) if now is not None else "?",
                    format_seconds(time.time() - daemon.card.started_unix) if first else "",
                    plain(daemon.card.listen or "-") if first else "",
                ]
            )
    return table(rows)


def _ready(now: ModelStats | None) -> str:
    if now is None:
        return "no answer"
    return "bad shards" if now.fault else f"{now.host.ready}/{now.host.slots}"


def format_seconds(seconds: float) -> str:
    """3725 -> "1 h 2 min"."""
    whole = max(int(seconds), 0)
    days, hours, minutes = whole // 86_400, whole // 3_600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
