"""Options of every command that may talk to a daemon of another host: what is shown there."""

from __future__ import annotations

import argparse
from pathlib import Path

from moetier.runtime.wire.address import Credentials

from .options import group_of

CREDENTIALS = ("token_file", "tls_ca", "tls_cert", "tls_key", "insecure")


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is shown to a daemon of another host."""
    group = group_of(parser, "daemons of other hosts")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="the token of the daemon, in one line")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="who has signed its certificate, PEM (the system's)")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="a certificate to show, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    group.add_argument("--insecure", action="store_true", help="without TLS")


def credentials(arguments: argparse.Namespace) -> Credentials:
    """Return the credentials that the options of ``add_credentials`` give."""
    return Credentials(
        token_file=arguments.token_file,
        ca=arguments.tls_ca,
        cert=arguments.tls_cert,
        key=arguments.tls_key,
        insecure=arguments.insecure,
    )
