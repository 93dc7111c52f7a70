"""``moetier daemon DIR``: hold the experts of models in memory, for every process of this machine and for others."""

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
        help="model directories, made by moetier convert, or names of pulled models",
    )
    add_option(parser, "ram", help='host memory for all of them: "8GiB", "50%%" (default: 80%% of what is free)')
    add_option(parser, "policy")
    add_option(parser, "learn")
    add_option(parser, "loaders")
    parser.add_argument(
        "--folder",
        metavar="NAME|PATH",
        default="default",
        help="folder of its sockets: a path, or a name within $XDG_RUNTIME_DIR/moetier (without that variable "
        "/tmp/moetier-UID), where clients find it by themselves (default: %(default)s)",
    )
    parser.add_argument(
        "--leases",
        type=SEVERAL,
        metavar="N",
        default=DEFAULTS["leases"],
        help="most slots that a client may hold at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-clients",
        type=SEVERAL,
        metavar="N",
        default=DEFAULTS["max_clients"],
        help="most clients at once (default: %(default)s)",
    )
    parser.add_argument(
        "--wait",
        type=WAIT,
        metavar="SECONDS",
        default=DEFAULTS["wait"],
        help="longest wait for a free slot, before a request fails (default: %(default)g)",
    )
    parser.add_argument(
        "--drain",
        type=WAIT,
        metavar="SECONDS",
        default=DEFAULTS["drain"],
        help="time to finish running requests at shutdown (default: %(default)g)",
    )
    parser.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        default="",
        help="answer Prometheus (/metrics) and probes (/healthz) on this port, without TLS or a token; on 127.0.0.1 "
        "unless HOST is given (port 0: any)",
    )
    parser.add_argument("--reflection", action="store_true", help="answer gRPC server reflection")
    parser.add_argument(
        "--ready-fd",
        type=int,
        metavar="N",
        help='descriptor to write "ready" to once it serves; it is closed afterwards',
    )
    remote = parser.add_argument_group("other hosts")
    remote.add_argument("--listen", metavar="HOST:PORT", default="", help="serve on TCP too (port 0: any)")
    remote.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate and its chain, PEM")
    remote.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    remote.add_argument(
        "--tls-client-ca", type=Path, metavar="FILE", help="the CA that must have signed clients' certificates, PEM"
    )
    remote.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the token that clients must show, in one line"
    )
    remote.add_argument(
        "--insecure", action="store_true", help="serve on TCP without a token or TLS, whichever is not given"
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
        raise UsageError(f"{arguments.folder!r} is not a folder.", "Give a name or a path; for TCP there is --listen.")
    if arguments.metrics and importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(
            "moetier daemon --metrics needs prometheus_client, which is not installed.",
            'Install it: pip install ".[metrics]" in the repository.',
        )
    if arguments.ready_fd is not None:
        try:
            os.set_inheritable(arguments.ready_fd, False)
        except (OSError, OverflowError):
            raise ConfigError(f"Descriptor {arguments.ready_fd} is not open.", "Give --ready-fd an open one.") from None
    given = {name: getattr(arguments, name) for name in DEFAULTS if hasattr(arguments, name)}
    ram = None if arguments.ram is None else Size.parse(arguments.ram)
    config = DaemonConfig(**given | {"directories": tuple(arguments.directories), "folder": folder, "ram": ram})
    with checked():
        config.check()
    log_to_stderr()
    return serve(config)
