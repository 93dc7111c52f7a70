"""``moetier ps``: list this user's daemons on this machine."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.tiers.text import format_bytes
from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import add_json
from moetier.tools.cli.report import format_seconds, table, with_processes

if TYPE_CHECKING:
    from moetier.runtime.wire.probe import RunningDaemon

EXAMPLES = ("moetier ps",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier ps`."""
    add_json(parser, "one JSON array")


def run(arguments: argparse.Namespace) -> None:
    """Print the running daemons."""
    from moetier.runtime.wire.address import runtime_folder
    from moetier.runtime.wire.probe import running_daemons

    daemons = [_look(daemon) for daemon in running_daemons(details=True)]
    text = _text(daemons) if daemons else f"No daemon runs in {runtime_folder()}."
    print(json.dumps(daemons, indent=2) if arguments.json else text)


def _look(daemon: RunningDaemon) -> dict[str, Any]:
    from moetier.runtime.model.names import listed_name
    from moetier.runtime.wire.probe import client_processes

    processes = {} if daemon.stats is None else client_processes(daemon.stats)
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
                "name": listed_name(Path(model.directory)) or model.name,
                "digest": model.digest,
                "directory": model.directory,
                "budget_bytes": model.budget_bytes,
            }
            | (
                {"ready": now.host.ready, "slots": now.host.slots, "clients": now.clients, "leases": now.leases}
                | {"client_pids": processes.get(model.digest, [])}
                | ({"fault": now.fault} if now.fault else {})
                if now is not None
                else {}
            )
            for model, now in daemon.models
        ],
    }


def _text(daemons: list[dict[str, Any]]) -> str:
    from moetier.runtime.wire.address import DIGEST_CHARS

    rows = [["folder", "process", "model", "digest", "memory", "experts in memory", "clients", "up", "listens on"]]
    for daemon in daemons:
        for number, model in enumerate(daemon["models"]):
            first = number == 0
            ready = f"{model['ready']} of {model['slots']}" if "ready" in model else "no answer"
            rows.append(
                [
                    plain(daemon["folder"]) if first else "",
                    str(daemon["pid"]) if first else "",
                    plain(model["name"]),
                    plain(model["digest"][:DIGEST_CHARS]),
                    format_bytes(model["budget_bytes"]),
                    "bad shards" if "fault" in model else ready,
                    with_processes(model.get("clients", "?"), model.get("client_pids", [])),
                    format_seconds(daemon["uptime_s"]) if first else "",
                    plain(daemon["listen"] or "-") if first else "",
                ]
            )
    return table(rows)
