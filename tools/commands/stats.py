"""``moetier stats``: show the counters of a daemon."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.tiers.errors import RefusedError
from moetier.tiers.options import Number
from moetier.tiers.text import format_bytes
from moetier.tools.cli.arguments import add_credentials, credentials
from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import add_json, checked

if TYPE_CHECKING:
    from moetier.proto.expert_store_pb2 import DescribeReply, ModelStats, StatsReply, Tier
    from moetier.runtime.wire.address import Address

SECONDS = 1.0  # interval of --watch without a value
INTERVAL = Number(float, 0.01, 86_400, "Give 0.01 to 86,400 seconds.")
EXAMPLES = ("moetier stats", "moetier stats work --watch 5", "moetier stats host:7070 --token-file token --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier stats`."""
    parser.add_argument(
        "address",
        nargs="?",
        metavar="ADDRESS",
        help='the daemon\'s name, folder or HOST:PORT (default: the only daemon that runs here, or "default")',
    )
    add_json(parser, "one JSON object; with --watch, one in each line")
    parser.add_argument(
        "--watch",
        type=INTERVAL,
        nargs="?",
        const=SECONDS,
        metavar="SECONDS",
        help=f"print the changes every SECONDS (default: {SECONDS:g}), until Ctrl-C",
    )
    add_credentials(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the counters, with --watch until Ctrl-C. Raises UsageError, ConfigError or DaemonError."""
    from moetier.runtime.wire.probe import probe

    address = address_of(arguments.address)
    with probe(address, credentials(arguments)) as daemon:
        now = daemon.describe(), _named(daemon.stats(details=True), address)
        if arguments.watch is None:
            print(json.dumps(to_json(address, *now), indent=2) if arguments.json else _text(address, *now))
            return
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the watch
            if not arguments.json:
                print(_HEAD, flush=True)
            while True:
                time.sleep(arguments.watch)
                before, now = now, (daemon.describe(), _named(daemon.stats(details=True), address))
                print(json.dumps(to_json(address, *now)) if arguments.json else changes(before, now), flush=True)


def _named(stats: StatsReply, address: Address) -> StatsReply:
    """Name the models of a daemon of this machine as `moetier list` does. Return ``stats``."""
    from moetier.runtime.model.names import listed_name
    from moetier.runtime.wire.address import DaemonCard

    card = None
    if address.folder is not None:
        with contextlib.suppress(RefusedError):  # another user's folder
            card = DaemonCard.read(address.folder)
    places = {model.digest: model.directory for model in card.models} if card is not None else {}
    for model in stats.models:
        if model.digest in places:
            model.name = listed_name(Path(places[model.digest])) or model.name
    return stats


def to_json(address: Address, described: DescribeReply, stats: StatsReply) -> dict[str, Any]:
    """Return the counters since the daemon's start as JSON, in bytes and seconds."""
    from moetier.runtime.wire.probe import client_processes

    processes = client_processes(stats)
    return {
        "address": str(address),
        "version": described.version,
        "pid": described.pid,
        "started_unix": described.started_unix_ms / 1e3,
        "uptime_s": stats.uptime_s,
        "models": [
            {field.name: getattr(model, field.name) for field in model.DESCRIPTOR.fields if field.name != "host"}
            | {"client_pids": processes.get(model.digest, []), "host": _tier(model.host)}
            for model in stats.models
        ],
    }


def _tier(host: Tier) -> dict[str, Any]:
    several = {"load_bounds": list(host.load_bounds), "loads": list(host.loads)}
    return {field.name: getattr(host, field.name) for field in host.DESCRIPTOR.fields} | several


def address_of(text: str | None) -> Address:
    """Return ``text`` as an address; for None, that of the only running daemon, or of "default" if there is not one.

    Raises UsageError if ``text`` is not an address.
    """
    from moetier.runtime.wire.address import DEFAULT_NAME, Address
    from moetier.runtime.wire.probe import running_daemons

    if text is not None:
        with checked():
            return Address.parse(text)
    daemons = running_daemons()
    return Address.of(daemons[0].folder) if len(daemons) == 1 else Address.parse(DEFAULT_NAME)


def _text(address: Address, described: DescribeReply, stats: StatsReply) -> str:
    from moetier.runtime.wire.probe import client_processes
    from moetier.tools.cli.report import format_seconds, prefetch_text, with_processes

    processes = client_processes(stats)
    lines = [
        f"{address}: process {described.pid}, moetier {plain(described.version)}, up {format_seconds(stats.uptime_s)}"
    ]
    for model in stats.models:
        host = model.host
        demands = host.hits + host.misses
        lines += [
            f"{plain(model.name)} ({plain(model.digest[:12])})",
            *([f"  fault     {plain(model.fault)}"] if model.fault else []),
            f"  experts   {host.ready} in memory, with room for {host.slots} ({format_bytes(host.memory_bytes)}); "
            f"{model.recovered} kept from the previous daemon",
            f"  uses      {demands:,} of an expert: {host.hits:,} hits, in memory "
            f"({host.hits / demands if demands else 0:.1%}); {host.misses:,} misses, not in memory, of which "
            f"{host.joined:,} waited for a read already under way",
            f"  reads     {format_bytes(host.bytes_in)}; {host.evictions:,} experts made room for others; "
            f"{host.failures:,} failures",
            f"  prefetch  {prefetch_text(host)}",
            *([f"  preloaded {host.warmed:,} experts, {host.recalled:,} of them used"] if host.warmed else []),
            f"  clients   {with_processes(model.clients, processes.get(model.digest, []))}, {model.sessions} of them "
            f"connected; they use {model.leases} experts now",
            f"  requests  {model.requests:,} for missing experts, {format_bytes(model.session_bytes_in)} received, "
            f"{format_bytes(model.session_bytes_out)} sent; {model.reported_hits:,} hits reported",
            f"  fetches   {model.fetches:,} by other machines, {format_bytes(model.fetched_bytes)} sent",
        ]
    return "\n".join(lines)


_COLUMNS = "{:<20} {:>11} {:>7} {:>6} {:>9} {:>9} {:>9} {:>12} {:>12}"
_HEAD = _COLUMNS.format("model", "in memory", "clients", "in use", "hits/s", "misses/s", "failures", "read/s", "sent/s")


def changes(before: tuple[DescribeReply, StatsReply], now: tuple[DescribeReply, StatsReply]) -> str:
    """Return a line for each model: how a daemon's counters changed from ``before`` to ``now``."""
    from moetier.proto.expert_store_pb2 import ModelStats, StatsReply

    (daemon, stats), (was_daemon, was) = now, before
    started = (daemon.pid, daemon.started_unix_ms)
    if started != (was_daemon.pid, was_daemon.started_unix_ms) or stats.uptime_s < was.uptime_s:
        was = StatsReply()  # a new daemon has taken the address, possibly between the two replies: count from 0
    seconds = max(stats.uptime_s - was.uptime_s, 1e-9)
    former = {model.digest: model for model in was.models}
    return "\n".join(_line(former.get(model.digest, ModelStats()), model, seconds) for model in stats.models)


def _line(before: ModelStats, now: ModelStats, seconds: float) -> str:
    return _COLUMNS.format(
        plain(now.name[-20:]),
        f"{now.host.ready}/{now.host.slots}",
        now.clients,
        now.leases,
        f"{(now.host.hits - before.host.hits) / seconds:.0f}",
        f"{(now.host.misses - before.host.misses) / seconds:.0f}",
        now.host.failures - before.host.failures,
        format_bytes((now.host.bytes_in - before.host.bytes_in) / seconds),
        format_bytes((now.fetched_bytes - before.fetched_bytes) / seconds),
    )
