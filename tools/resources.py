"""What every command that runs a model is told: memory it may take, where it computes, whose experts it uses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moetier.runtime.address import Credentials
from moetier.runtime.config import AUTO, TierConfig


def add_resource_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ram",
        metavar="SIZE",
        help='host budget for experts: "6GiB", or "50%%" of what the rest leaves; default: 80%%',
    )
    parser.add_argument("--device-memory", metavar="SIZE", help="device budget for experts, where there is a GPU")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N" (default: %(default)s)')
    parser.add_argument(
        "--daemon",
        default=AUTO,
        metavar="WHOSE",
        help="whose experts: auto, a running daemon's that serves this very store, else this process's own; none, its "
        "own; NAME, FOLDER or HOST:PORT, that daemon's; A,B,C, each has a share (default: %(default)s)",
    )
    add_credential_arguments(parser)


def add_credential_arguments(parser: argparse.ArgumentParser) -> None:
    """For daemons on other hosts."""
    group = parser.add_argument_group("for a daemon at HOST:PORT")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token that the daemon wants to see")
    group.add_argument("--tls-ca", type=Path, metavar="PEM", help="who signed its certificate (default: the system's)")
    group.add_argument("--tls-cert", type=Path, metavar="PEM", help="this client's certificate, where it wants one")
    group.add_argument("--tls-key", type=Path, metavar="PEM", help="its key")
    group.add_argument("--insecure", action="store_true", help="without TLS")


def credentials_of(arguments: argparse.Namespace) -> Credentials:
    return Credentials(
        token_file=arguments.token_file,
        ca=arguments.tls_ca,
        cert=arguments.tls_cert,
        key=arguments.tls_key,
        insecure=arguments.insecure,
    )


def resources_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``load``, checked. Raises ConfigError."""
    found = {
        "ram": arguments.ram,
        "device_memory": arguments.device_memory,
        "device": arguments.device,
        "daemon": None if arguments.daemon == "none" else arguments.daemon,
        "credentials": credentials_of(arguments),
    }
    TierConfig.of(**found)
    return found
