"""A daemon's service in the test's own process: its host tier can be looked into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from readers import PATIENCE

from moetier.runtime.daemon.clients import Clients
from moetier.runtime.daemon.control_server import ControlServer
from moetier.runtime.daemon.hosted_model import HostedModel
from moetier.runtime.daemon.server import local_server
from moetier.runtime.wire.address import SOCKET, make_folder
from moetier.tiers.host.tier import HostTier
from moetier.tiers.manifest import Manifest


@contextlib.contextmanager
def local_daemon(host: HostTier, manifest: Manifest, directory: Path, folder: Path) -> Iterator[Path]:
    """Serves ``host``, which stays the caller's; yields the folder where clients find it."""
    make_folder(folder)
    model = HostedModel(manifest, host, directory, timeout=PATIENCE)
    clients = Clients({manifest.digest: model}, max_leases=8, timeout=PATIENCE)
    server = local_server(clients, sessions=8)
    server.add_insecure_port(f"unix:{folder / SOCKET}")
    server.start()
    control = ControlServer(
        folder, register=clients.register, unregister=clients.unregister, max_clients=8, version="test"
    )
    try:
        yield folder
    finally:
        control.close()
        clients.end()
        server.stop(0).wait()
        model.close()
