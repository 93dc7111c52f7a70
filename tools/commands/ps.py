"""``moetier ps``: list the daemons of this user that run on this machine."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import format_bytes
from moetier.tools.cli.failure import plain
from moetier.tools.cli.report import format_seconds, table

if TYPE_CHECKING:
    from moetier.proto.expert_store_pb2 import ModelStats
    from moetier.runtime.wire.probe import RunningDaemon

EXAMPLES = ("moetier ps",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier ps`."""
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    """Print the running daemons and return 0."""
    from moetier.runtime.wire.address import runtime_folder
    from moetier.runtime.wire.probe import running_daemons

    found = running_daemons()
    if arguments.json:
        print(json.dumps([_json(daemon) for daemon in found], indent=2))
    elif found:
        print(_text(found))
    else:
        print(f"No daemon runs in {runtime_folder()}.")
    return 0


def _json(daemon: RunningDaemon) -> dict[str, Any]:
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
                if now is not None
                else {}
            )
            for model, now in daemon.models
        ],
    }


def _text(found: list[RunningDaemon]) -> str:
    from moetier.runtime.wire.address import DIGEST_CHARS

    rows = [["folder", "pid", "model", "store", "budget", "ready", "clients", "up", "listens"]]
    for daemon in found:
        for number, (model, now) in enumerate(daemon.models):
            first = number == 0
            rows.append(
                [
                    plain(str(daemon.folder)) if first else "",
                    str(daemon.card.pid) if first else "",
                    plain(model.name),
                    plain(model.digest[:DIGEST_CHARS]),
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
