"""``moetier daemon DIR``: hold the experts of models in memory, for this machine's processes and for other hosts."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import fields
from pathlib import Path

from moetier.runtime.config import Number, Size
from moetier.runtime.daemon.options import DaemonConfig
from moetier.tools.cli.arguments import add_option
from moetier.tools.cli.parser import UsageError, checked, directory

EXAMPLES = (
    "moetier daemon ./mixtral-4bit --ram 12GiB",
    "moetier daemon ./mixtral-4bit ./qwen3-4bit --folder work --metrics 9090",
)

SEVERAL = Number(int, 1, 10_000, "Give 1 to 10,000.")
WAIT = Number(float, 0, 86_400, "Give 0 to 86,400 seconds.")
DEFAULTS = {field.name: field.default for field in fields(DaemonConfig)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier daemon`."""
    parser.add_argument(
        "directories",
        type=directory,
        nargs="+",
        metavar="DIR",
        help="model directories, names of pulled models, folders of checkpoints, GGUF files, or addresses in an object "
        "store",
    )
    add_option(parser, "ram", help='host memory for all experts: "8GiB", or "50%%" of what is free (default: 80%%)')
    add_option(parser, "policy")
    add_option(parser, "learn")
    add_option(parser, "loaders")
    parser.add_argument(
        "--folder",
        metavar="NAME|PATH",
        default="default",
        help="folder for the daemon's sockets: a path, or a name in $XDG_RUNTIME_DIR/moetier (/tmp/moetier-UID without "
        "that variable), where clients find the daemon by themselves (default: %(default)s)",
    )
    parser.add_argument(
        "--leases",
        type=SEVERAL,
        metavar="N",
        default=DEFAULTS["leases"],
        help="maximum number of slots that a client may hold at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-clients",
        type=SEVERAL,
        metavar="N",
        default=DEFAULTS["max_clients"],
        help="maximum number of clients at once (default: %(default)s)",
    )
    parser.add_argument(
        "--wait",
        type=WAIT,
        metavar="SECONDS",
        default=DEFAULTS["wait"],
        help="longest time that a request waits for a free slot before it fails (default: %(default)g)",
    )
    parser.add_argument(
        "--drain",
        type=WAIT,
        metavar="SECONDS",
        default=DEFAULTS["drain"],
        help="time for running requests to finish at shutdown (default: %(default)g)",
    )
    parser.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        default="",
        help="answer Prometheus (/metrics) and health probes (/healthz) on this port, without TLS or a token; the "
        "default HOST is 127.0.0.1, and port 0 means any free port",
    )
    parser.add_argument("--reflection", action="store_true", help="answer gRPC server reflection")
    parser.add_argument(
        "--ready-fd",
        type=int,
        metavar="N",
        help='file descriptor to which the daemon writes "ready" when it begins to serve, and which it then closes',
    )
    remote = parser.add_argument_group("other hosts")
    remote.add_argument("--listen", metavar="HOST:PORT", default="", help="serve on TCP, too (port 0: any free port)")
    remote.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM file of the daemon's certificate and its chain"
    )
    remote.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file of the private key of --tls-cert")
    remote.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="PEM file of the CA that must have signed the certificates of clients",
    )
    remote.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file that holds, in one line, the token that clients must send",
    )
    remote.add_argument(
        "--insecure", action="store_true", help="permit serving on TCP without a token, without TLS, or without both"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, and return 0. Raises UsageError, or MoetierError if the daemon can't start."""
    from moetier.runtime.daemon.entry import serve
    from moetier.runtime.daemon.log import log_to_stderr
    from moetier.runtime.wire.address import Address
    from moetier.tiers.errors import ConfigError

    with checked():
        folder = Address.parse(arguments.folder).folder
    if folder is None:
        raise UsageError(
            f"--folder: {arguments.folder!r} is not a folder.", "Give a name or a path. To serve on TCP, use --listen."
        )
    if arguments.metrics and importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(
            "moetier daemon --metrics needs prometheus_client, which is not installed.",
            'In the repository of moetier, run: pip install ".[metrics]"',
        )
    if arguments.ready_fd is not None:
        try:
            os.set_inheritable(arguments.ready_fd, False)
        except (OSError, OverflowError):
            raise ConfigError(
                f"--ready-fd: the file descriptor {arguments.ready_fd} is not open.",
                "Give the number of a descriptor that the daemon inherits.",
            ) from None
    given = {name: getattr(arguments, name) for name in DEFAULTS if hasattr(arguments, name)}
    ram = None if arguments.ram is None else Size.parse(arguments.ram)
    config = DaemonConfig(**given | {"directories": tuple(arguments.directories), "folder": folder, "ram": ram})
    with checked():
        config.check()
    log_to_stderr()
    return serve(config)
